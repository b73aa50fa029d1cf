//! The sessions of one published UDP port: who is talking, in what order they fell silent, and who has
//! to go when the table is full. Pure: the caller brings the time, and owns what a session carries.
//!
//! # Theory of operation
//! A session is one client socket talking to one of our addresses ([`Client`]). It is *tentative* until
//! the backend has answered once and *assured* from then on, the kernel's words for the same thing
//! (`nf_conntrack_core.c`, `early_drop`). Each kind has a list from the longest silent to the most recent.
//!
//! | move | when |
//! |---|---|
//! | none -> tentative | a datagram of an unknown client, within the limits |
//! | tentative -> assured | the backend's first answer |
//! | any -> the end of its list | a datagram in either direction |
//! | any -> none | silent for the idle timeout; evicted; removed by the caller |
//!
//! At the limit the longest silent tentative session makes room, and only when there is none the
//! longest silent assured one: a flood of forged sources then evicts itself, not the clients at work. No
//! single source address may hold more than its share; beyond that it is refused, whatever room there is.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Key};

/// What tells one session from another: the client, and the address of ours it talks to (a client that talks
/// to two of them gets each answer from the right one).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// The client's address and port.
    pub address: SocketAddr,
    /// The address of this host that it sent to; `None` where it is not known.
    pub local: Option<IpAddr>,
}

/// The bounds of one table.
#[derive(Clone, Copy, Debug)]
pub struct TableLimits {
    /// Sessions in all; at least 1.
    pub sessions: usize,
    /// Sessions of one source address; at least 1.
    pub per_source: usize,
    /// A session that is silent for so long in both directions ends. docker-proxy has 90 s, passt 180 s;
    /// RFC 4787 REQ-5 wants no less than 2 minutes of a NAT and allows less for single applications.
    pub idle: Duration,
}

/// Why a new session was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceLimit;

#[derive(Debug)]
struct Session<T> {
    client: Client,
    last_seen: Instant,
    assured: bool,
    older: Option<Key>,
    newer: Option<Key>,
    value: T,
}

/// A list that runs through the sessions, from the longest silent to the most recent.
#[derive(Debug, Default)]
struct Silence {
    oldest: Option<Key>,
    newest: Option<Key>,
}

/// The sessions of one port, each with a `T`.
#[derive(Debug)]
pub struct SessionTable<T> {
    limits: TableLimits,
    sessions: Arena<Session<T>>,
    by_client: HashMap<Client, Key>,
    by_source: HashMap<IpAddr, usize>,
    /// Tentative sessions at 0, assured ones at 1.
    silence: [Silence; 2],
}

impl<T> SessionTable<T> {
    /// An empty table; allocates nothing yet.
    pub fn new(limits: TableLimits) -> Self {
        Self {
            limits,
            sessions: Arena::new(),
            by_client: HashMap::new(),
            by_source: HashMap::new(),
            silence: Default::default(),
        }
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// The session of `client`.
    pub fn find(&self, client: &Client) -> Option<Key> {
        self.by_client.get(client).copied()
    }

    /// What session `key` carries, and whose it is.
    pub fn get_mut(&mut self, key: Key) -> Option<(Client, &mut T)> {
        self.sessions.get_mut(key).map(|session| (session.client, &mut session.value))
    }

    /// Whether `client` may have a session more: asked before anything is made for it.
    ///
    /// # Errors
    /// [`SourceLimit`] when its source address has its share.
    pub fn admit(&self, client: &Client) -> Result<(), SourceLimit> {
        let held = self.by_source.get(&client.address.ip()).copied().unwrap_or(0);
        if held < self.limits.per_source { Ok(()) } else { Err(SourceLimit) }
    }

    /// Takes the session out that has to make room for a new one, if the table is full.
    pub fn evict(&mut self) -> Option<T> {
        if self.sessions.len() < self.limits.sessions {
            return None;
        }
        let [tentative, assured] = &self.silence;
        self.remove(tentative.oldest.or(assured.oldest)?)
    }

    /// Takes the session out that has been silent for longest of those that the backend has not answered, if that is since `before`:
    /// something else than room in the table is short.
    pub fn evict_tentative(&mut self, before: Instant) -> Option<T> {
        let oldest = self.silence[0].oldest?;
        self.sessions.get(oldest).filter(|session| session.last_seen <= before)?;
        self.remove(oldest)
    }

    /// Adds a session for `client`, which has none and was admitted; room was made by [`Self::evict`].
    pub fn insert(&mut self, client: Client, value: T, now: Instant) -> Key {
        let session = Session { client, last_seen: now, assured: false, older: None, newer: None, value };
        let key = self.sessions.insert(session);
        self.by_client.insert(client, key);
        *self.by_source.entry(client.address.ip()).or_default() += 1;
        self.append(key);
        key
    }

    /// Notes a datagram of session `key`; `answer` if it came from the backend.
    pub fn touch(&mut self, key: Key, answer: bool, now: Instant) {
        if self.sessions.get(key).is_none() {
            return;
        }
        self.unlink(key);
        if let Some(session) = self.sessions.get_mut(key) {
            session.last_seen = now;
            session.assured |= answer;
        }
        self.append(key);
    }

    /// Ends session `key` and hands out what it carried.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.sessions.get(key)?;
        self.unlink(key);
        let session = self.sessions.remove(key)?;
        self.by_client.remove(&session.client);
        let source = session.client.address.ip();
        if let Some(held) = self.by_source.get_mut(&source) {
            *held -= 1;
            if *held == 0 {
                self.by_source.remove(&source);
            }
        }
        Some(session.value)
    }

    /// Takes out one session that has been silent for the idle timeout.
    pub fn expire(&mut self, now: Instant) -> Option<T> {
        let due = self.oldest().filter(|(deadline, _)| *deadline <= now)?;
        self.remove(due.1)
    }

    /// When the next session is due to end, as things stand.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.oldest().map(|(deadline, _)| deadline)
    }

    /// Takes out every session.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        let keys = self.sessions.keys();
        keys.into_iter().filter_map(|key| self.remove(key))
    }

    fn oldest(&self) -> Option<(Instant, Key)> {
        let deadline = |key: Key| Some((self.sessions.get(key)?.last_seen + self.limits.idle, key));
        self.silence.iter().filter_map(|list| deadline(list.oldest?)).min()
    }

    /// Puts `key` at the recent end of its list.
    fn append(&mut self, key: Key) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        let list = &mut self.silence[usize::from(session.assured)];
        session.older = list.newest;
        session.newer = None;
        let before = list.newest.replace(key);
        match before.and_then(|before| self.sessions.get_mut(before)) {
            Some(before) => before.newer = Some(key),
            None => list.oldest = Some(key),
        }
    }

    /// Takes `key` out of its list.
    fn unlink(&mut self, key: Key) {
        let Some(session) = self.sessions.get_mut(key) else { return };
        let list = &mut self.silence[usize::from(session.assured)];
        let (older, newer) = (session.older.take(), session.newer.take());
        match older.and_then(|older| self.sessions.get_mut(older)) {
            Some(older) => older.newer = newer,
            None => list.oldest = newer,
        }
        match newer.and_then(|newer| self.sessions.get_mut(newer)) {
            Some(newer) => newer.older = older,
            None => list.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: TableLimits = TableLimits { sessions: 3, per_source: 2, idle: Duration::from_secs(90) };

    fn client(host: u8, port: u16) -> Client {
        Client { address: SocketAddr::from(([192, 0, 2, host], port)), local: None }
    }

    fn seconds(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn the_longest_silent_session_makes_room() {
        let start = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        let keys: Vec<_> =
            (1..=3).map(|host| table.insert(client(host, 1), host, seconds(start, host.into()))).collect();
        table.touch(keys[0], false, seconds(start, 9));
        assert_eq!(table.evict(), Some(2));
        assert_eq!(table.evict(), None, "there is room now");
    }

    #[test]
    fn a_flood_of_forged_sources_evicts_itself_and_not_a_client_at_work() {
        let start = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        let honest = table.insert(client(1, 1), 1, start);
        table.touch(honest, true, start);
        for forged in 2..200 {
            let now = seconds(start, forged.into());
            assert_eq!(table.admit(&client(forged, 1)), Ok(()));
            table.evict();
            table.insert(client(forged, 1), forged, now);
        }
        assert_eq!(table.len(), 3);
        assert!(table.find(&client(1, 1)).is_some());
    }

    #[test]
    fn one_source_has_no_more_than_its_share() {
        let start = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        let first = table.insert(client(1, 1), 'a', start);
        table.insert(client(1, 2), 'b', start);
        assert_eq!(table.admit(&client(1, 3)), Err(SourceLimit));
        assert_eq!(table.admit(&client(2, 3)), Ok(()));
        table.remove(first);
        assert_eq!(table.admit(&client(1, 3)), Ok(()));
    }

    #[test]
    fn traffic_in_one_direction_keeps_a_session() {
        let start = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        let sending = table.insert(client(1, 1), "sends", start);
        let answering = table.insert(client(2, 1), "is sent to", start);
        table.insert(client(3, 1), "silent", start);
        for step in 1..=3 {
            table.touch(sending, false, seconds(start, step * 60));
            table.touch(answering, true, seconds(start, step * 60));
        }
        assert_eq!(table.next_expiry(), Some(seconds(start, 90)));
        assert_eq!(table.expire(seconds(start, 180)), Some("silent"));
        assert_eq!(table.expire(seconds(start, 180)), None);
        assert_eq!(table.next_expiry(), Some(seconds(start, 270)));
    }

    #[test]
    fn one_client_socket_and_two_of_our_addresses_are_two_sessions() {
        let mut table = SessionTable::new(LIMITS);
        let to = |local: [u8; 4]| Client { local: Some(local.into()), ..client(1, 1) };
        let first = table.insert(to([192, 0, 2, 10]), 1, Instant::now());
        assert_eq!(table.find(&to([192, 0, 2, 11])), None);
        assert_eq!(table.find(&to([192, 0, 2, 10])), Some(first));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Datagram(u8, u16),
        Answer(u8, u16),
        Wait(u64),
        Remove(u8, u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        let who = || (0u8..4, 0u16..4);
        prop_oneof![
            4 => who().prop_map(|(host, port)| Step::Datagram(host, port)),
            2 => who().prop_map(|(host, port)| Step::Answer(host, port)),
            2 => (0u64..120).prop_map(Step::Wait),
            1 => who().prop_map(|(host, port)| Step::Remove(host, port)),
        ]
    }

    /// The same rules, in the plainest possible words: a vector in the order of last activity.
    #[derive(Default)]
    struct Oracle(Vec<(Client, bool, Instant)>);

    impl Oracle {
        fn position(&self, client: &Client) -> Option<usize> {
            self.0.iter().position(|(known, ..)| known == client)
        }

        fn move_to_end(&mut self, at: usize, answer: bool, now: Instant) {
            let (client, assured, _) = self.0.remove(at);
            self.0.push((client, assured || answer, now));
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_list(steps in prop::collection::vec(step(), 0..200)) {
            let mut now = Instant::now();
            let mut table = SessionTable::new(LIMITS);
            let mut oracle = Oracle::default();
            for step in steps {
                match step {
                    Step::Datagram(host, port) => {
                        let client = client(host, port);
                        if let Some(key) = table.find(&client) {
                            table.touch(key, false, now);
                            let at = oracle.position(&client).unwrap();
                            oracle.move_to_end(at, false, now);
                        } else {
                            let held = oracle.0.iter().filter(|(c, ..)| c.address.ip() == client.address.ip());
                            let admitted = held.count() < LIMITS.per_source;
                            prop_assert_eq!(table.admit(&client).is_ok(), admitted);
                            if admitted {
                                let full = oracle.0.len() >= LIMITS.sessions;
                                let victim = full.then(|| {
                                    let tentative = oracle.0.iter().position(|(_, assured, _)| !assured);
                                    oracle.0.remove(tentative.unwrap_or(0)).0
                                });
                                prop_assert_eq!(table.evict(), victim);
                                table.insert(client, client, now);
                                oracle.0.push((client, false, now));
                            }
                        }
                    }
                    Step::Answer(host, port) => {
                        let client = client(host, port);
                        if let Some(key) = table.find(&client) {
                            table.touch(key, true, now);
                            let at = oracle.position(&client).unwrap();
                            oracle.move_to_end(at, true, now);
                        }
                    }
                    Step::Wait(seconds) => {
                        now += Duration::from_secs(seconds);
                        let mut ended: Vec<_> = std::iter::from_fn(|| table.expire(now)).collect();
                        let (over, left) = oracle.0.drain(..).partition(|(.., seen)| *seen + LIMITS.idle <= now);
                        oracle.0 = left;
                        let mut over: Vec<Client> = Vec::from_iter::<Vec<_>>(over).into_iter().map(|(c, ..)| c).collect();
                        ended.sort_by_key(|c: &Client| c.address);
                        over.sort_by_key(|c| c.address);
                        prop_assert_eq!(ended, over);
                    }
                    Step::Remove(host, port) => {
                        let client = client(host, port);
                        let at = oracle.position(&client);
                        prop_assert_eq!(table.find(&client).is_some(), at.is_some());
                        if let Some(at) = at {
                            let key = table.find(&client).unwrap();
                            prop_assert_eq!(table.remove(key), Some(client));
                            oracle.0.remove(at);
                        }
                    }
                }
                prop_assert_eq!(table.len(), oracle.0.len());
                let next = oracle.0.iter().map(|(.., seen)| *seen + LIMITS.idle).min();
                prop_assert_eq!(table.next_expiry(), next);
            }
        }
    }
}
