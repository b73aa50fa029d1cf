//! Sessions of one published UDP port: lookup, idle order, and eviction when the table is full.
//! Pure: the caller passes the time and stores its own value with each session.
//!
//! # Theory of operation
//! A session is a client socket that communicates with one local address ([`Client`]). It is
//! *tentative* until the first reply of the backend and *assured* afterwards, as in conntrack
//! (`early_drop`, `nf_conntrack_core.c`). Sessions of each kind are in a list by idle time, longest
//! first.
//!
//! | transition | condition |
//! |---|---|
//! | none -> tentative | a datagram of an unknown client, within the limits |
//! | tentative -> assured | the first reply of the backend |
//! | any -> end of its list | a datagram in either direction |
//! | any -> none | idle timeout; eviction; removal by the caller |
//!
//! Every new session is accepted. At a limit, another session is evicted for it
//! ([`SessionTable::make_room`]).
//!
//! - At the limit of a source (an IPv4 address or an IPv6 /64), a session of the same source is
//!   evicted. The first choice is the longest idle tentative session, if it has been idle for
//!   [`ANSWER_TIME`]; then the longest idle assured one; then the longest idle tentative one. A
//!   resolver that uses a new port for each query thus loses sessions that it no longer needs.
//! - At the limit of the port, the longest idle tentative session is evicted if most sessions are
//!   tentative. A flood of forged sources then evicts its own sessions. Otherwise a session of the
//!   source with the most sessions is evicted.
//!
//! In addition, a source may have at most twice as many sessions as there are free descriptors
//! ([`may_take`]); the same applies to a port.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tidegate_model::{Ranking, may_take, share_of};
use tidegate_reactor::{Arena, Key, Links, List};

/// How long a backend may take to reply before its tentative session is evicted first. Within this
/// time, sessions that started together do not evict one another.
const ANSWER_TIME: Duration = Duration::from_millis(100);

/// Identity of a session: the client, and the local address that it sends to. A client that uses
/// two local addresses has two sessions, so that each reply has the right source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Client {
    /// The address and port of the client.
    pub address: SocketAddr,
    /// The local address that the client sent to; `None` if unknown.
    pub local: Option<IpAddr>,
}

/// Limits of a table.
#[derive(Clone, Copy, Debug)]
pub struct TableLimits {
    /// Maximum number of sessions, at least 1.
    pub sessions: usize,
    /// Maximum number of sessions of one source (an IPv4 address or an IPv6 /64), at least 1.
    pub per_source: usize,
    /// Idle timeout: a session ends after this time without a datagram in either direction.
    /// docker-proxy uses 90 s, passt 180 s. RFC 4787 REQ-5 requires at least 2 minutes for a NAT
    /// and permits less for specific applications.
    pub idle: Duration,
}

#[derive(Debug)]
struct Session<T> {
    client: Client,
    source: Key,
    last_seen: Instant,
    assured: bool,
    /// Links in the list of its kind, and in the list of its source.
    links: Links,
    source_links: Links,
    value: T,
}

/// Tentative sessions at index 0, assured ones at 1, each by idle time, longest first.
type IdleLists = [List; 2];

/// The sessions of one source.
#[derive(Debug)]
struct Source {
    address: IpAddr,
    held: usize,
    idle_lists: IdleLists,
}

/// The sessions of one port, each with a value of type `T`.
#[derive(Debug)]
pub struct SessionTable<T> {
    limits: TableLimits,
    sessions: Arena<Session<T>>,
    by_client: HashMap<Client, Key>,
    sources: Arena<Source>,
    by_source: HashMap<IpAddr, Key>,
    ranking: Ranking<IpAddr>,
    tentative: usize,
    idle_lists: IdleLists,
}

impl<T> SessionTable<T> {
    /// Creates an empty table without allocating.
    pub fn new(limits: TableLimits) -> Self {
        Self {
            limits,
            sessions: Arena::new(),
            by_client: HashMap::new(),
            sources: Arena::new(),
            by_source: HashMap::new(),
            ranking: Ranking::default(),
            tentative: 0,
            idle_lists: IdleLists::default(),
        }
    }

    /// Number of sessions.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// The session of `client`.
    pub fn find(&self, client: &Client) -> Option<Key> {
        self.by_client.get(client).copied()
    }

    /// The value of session `key`, and its client.
    pub fn get_mut(&mut self, key: Key) -> Option<(Client, &mut T)> {
        self.sessions.get_mut(key).map(|session| (session.client, &mut session.value))
    }

    /// Removes and returns the session that has to be evicted for a new one of `client`, if any.
    /// `free` is the number of free descriptors. If `free` is 0 and nothing is returned, a session
    /// cannot be opened.
    pub fn make_room(&mut self, client: &Client, free: usize, now: Instant) -> Option<T> {
        let source = self.by_source.get(&share_of(client.address.ip()));
        let source = source.and_then(|source| self.sources.get(*source));
        let victim = match source {
            Some(own) if own.held >= self.limits.per_source || !may_take(own.held, free) => {
                self.candidate_of(own, now)
            }
            _ if self.len() >= self.limits.sessions || !may_take(self.len(), free) => {
                self.candidate()
            }
            _ => None,
        };
        self.remove(victim?)
    }

    /// The session to evict for a new one of the same source.
    fn candidate_of(&self, source: &Source, now: Instant) -> Option<Key> {
        let [tentative, assured] = source.idle_lists.map(|list| list.oldest());
        let had_time = |key: &Key| {
            self.sessions.get(*key).is_some_and(|session| session.last_seen + ANSWER_TIME <= now)
        };
        tentative.filter(had_time).or(assured).or(tentative)
    }

    /// The session to evict for a new one of another source.
    fn candidate(&self) -> Option<Key> {
        let oldest = |idle_lists: &IdleLists| {
            let [tentative, assured] = idle_lists.map(|list| list.oldest());
            tentative.or(assured)
        };
        let is_flood = 2 * self.tentative > self.len();
        let largest = self.ranking.largest().filter(|_| !is_flood);
        let largest =
            largest.and_then(|(largest, _)| self.sources.get(*self.by_source.get(&largest)?));
        oldest(largest.map_or(&self.idle_lists, |source| &source.idle_lists))
    }

    /// Adds a session for `client`, which must not have one. Call [`Self::make_room`] before.
    pub fn insert(&mut self, client: Client, value: T, now: Instant) -> Key {
        let address = share_of(client.address.ip());
        let sources = &mut self.sources;
        let source = *self.by_source.entry(address).or_insert_with(|| {
            sources.insert(Source { address, held: 0, idle_lists: IdleLists::default() })
        });
        let key = self.sessions.insert(Session {
            client,
            source,
            last_seen: now,
            assured: false,
            links: Links::default(),
            source_links: Links::default(),
            value,
        });
        self.by_client.insert(client, key);
        if let Some(held) = self.sources.get_mut(source).map(|source| &mut source.held) {
            *held += 1;
            self.ranking.change(address, *held - 1, *held);
        }
        self.append(key);
        key
    }

    /// Records a datagram of session `key`; `answer` if the backend sent it.
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

    /// Removes session `key` and returns its value.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.sessions.get(key)?;
        self.unlink(key);
        let session = self.sessions.remove(key)?;
        self.by_client.remove(&session.client);
        if let Some(source) = self.sources.get_mut(session.source) {
            source.held -= 1;
            let (address, held) = (source.address, source.held);
            self.ranking.change(address, held + 1, held);
            if held == 0 {
                self.by_source.remove(&address);
                self.sources.remove(session.source);
            }
        }
        Some(session.value)
    }

    /// Removes and returns one session that has reached the idle timeout.
    pub fn expire(&mut self, now: Instant) -> Option<T> {
        let due = self.oldest().filter(|(deadline, _)| *deadline <= now)?;
        self.remove(due.1)
    }

    /// The earliest idle timeout.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.oldest().map(|(deadline, _)| deadline)
    }

    /// Removes and returns all sessions.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        let keys = self.sessions.keys();
        keys.into_iter().filter_map(|key| self.remove(key))
    }

    /// Removes and returns the sessions of the clients selected by `which`.
    pub fn remove_clients(&mut self, which: impl Fn(&Client) -> bool) -> Vec<T> {
        let of = |key: &Key| self.sessions.get(*key).is_some_and(|session| which(&session.client));
        let keys: Vec<Key> = self.sessions.keys().into_iter().filter(of).collect();
        keys.into_iter().filter_map(|key| self.remove(key)).collect()
    }

    fn oldest(&self) -> Option<(Instant, Key)> {
        let deadline = |key: Key| Some((self.sessions.get(key)?.last_seen + self.limits.idle, key));
        self.idle_lists.iter().filter_map(|list| deadline(list.oldest()?)).min()
    }

    /// Appends session `key` to its lists as the most recent one.
    fn append(&mut self, key: Key) {
        let Some(session) = self.sessions.get(key) else { return };
        let (kind, source) = (usize::from(session.assured), session.source);
        self.tentative += 1 - kind;
        self.idle_lists[kind].append(&mut self.sessions, key, |session| &mut session.links);
        if let Some(source) = self.sources.get_mut(source) {
            source.idle_lists[kind]
                .append(&mut self.sessions, key, |session| &mut session.source_links);
        }
    }

    /// Removes session `key` from its lists.
    fn unlink(&mut self, key: Key) {
        let Some(session) = self.sessions.get(key) else { return };
        let (kind, source) = (usize::from(session.assured), session.source);
        self.tentative -= 1 - kind;
        self.idle_lists[kind].remove(&mut self.sessions, key, |session| &mut session.links);
        if let Some(source) = self.sources.get_mut(source) {
            source.idle_lists[kind]
                .remove(&mut self.sessions, key, |session| &mut session.source_links);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: TableLimits =
        TableLimits { sessions: 3, per_source: 2, idle: Duration::from_secs(90) };

    fn client(host: u8, port: u16) -> Client {
        Client { address: SocketAddr::from(([192, 0, 2, host], port)), local: None }
    }

    fn seconds(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    /// Enough free descriptors.
    const PLENTY: usize = 1000;

    #[test]
    fn the_longest_idle_session_is_evicted() {
        let start = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        let keys: Vec<_> = (1..=3)
            .map(|host| table.insert(client(host, 1), host, seconds(start, host.into())))
            .collect();
        table.touch(keys[0], false, seconds(start, 9));
        assert_eq!(table.make_room(&client(4, 1), PLENTY, seconds(start, 9)), Some(2));
        assert_eq!(
            table.make_room(&client(4, 1), PLENTY, seconds(start, 9)),
            None,
            "the table is no longer full"
        );
    }

    #[test]
    fn a_flood_of_forged_sources_evicts_its_own_sessions() {
        let start = Instant::now();
        let mut table = SessionTable::new(TableLimits { sessions: 5, ..LIMITS });
        for port in 1..=2 {
            let honest = table.insert(client(1, port), 1, start);
            table.touch(honest, true, start);
        }
        for forged in 2..200 {
            let now = seconds(start, forged.into());
            table.make_room(&client(forged, 1), PLENTY, now);
            table.insert(client(forged, 1), forged, now);
        }
        assert_eq!(table.len(), 5);
        assert!((1..=2).all(|port| table.find(&client(1, port)).is_some()));
    }

    #[test]
    fn a_source_at_its_limit_loses_its_own_tentative_session_first() {
        let start = Instant::now();
        let mut table = SessionTable::new(TableLimits { sessions: 9, per_source: 3, ..LIMITS });
        table.insert(client(2, 1), 'x', start);
        for (port, name) in [(1, 'a'), (2, 'b'), (3, 'c')] {
            let key = table.insert(client(1, port), name, seconds(start, port.into()));
            if name != 'b' {
                table.touch(key, true, seconds(start, port.into()));
            }
        }
        let mut replace = |port: u16, name, now| {
            let ended = table.make_room(&client(1, port), PLENTY, now);
            table.insert(client(1, port), name, now);
            ended
        };
        let later = seconds(start, 9);
        assert_eq!(replace(4, 'd', later), Some('b'), "tentative");
        assert_eq!(
            replace(5, 'e', later),
            Some('a'),
            "'d' is tentative, but within the time to reply"
        );
        assert_eq!(replace(6, 'f', later), Some('c'));
        assert_eq!(replace(7, 'g', later), Some('d'), "all are tentative and new");
        assert_eq!(table.make_room(&client(2, 2), PLENTY, later), None);
    }

    #[test]
    fn an_ipv6_64_is_one_source() {
        let mut table = SessionTable::new(LIMITS);
        let client = |host: u16| Client {
            address: SocketAddr::from(([0x2001, 0xdb8, 0, 1, 0, 0, 0, host], 9)),
            local: None,
        };
        let now = Instant::now();
        for host in 1..=2 {
            table.insert(client(host), host, now);
        }
        assert_eq!(table.make_room(&client(3), PLENTY, now), Some(1));
    }

    #[test]
    fn with_few_descriptors_a_source_gets_two_thirds_and_the_largest_is_evicted() {
        let now = Instant::now();
        let mut table = SessionTable::new(TableLimits { sessions: 100, per_source: 100, ..LIMITS });
        let mut free = 9;
        for port in 0..20 {
            free += usize::from(table.make_room(&client(1, port), free, now).is_some());
            table.insert(client(1, port), 1, now);
            free -= 1;
        }
        assert_eq!((table.len(), free), (6, 3));
        for host in 2..=4 {
            assert_eq!(
                table.make_room(&client(host, 1), 0, now),
                Some(1),
                "a session of the largest source"
            );
            let key = table.insert(client(host, 1), host, now);
            table.touch(key, true, now);
        }
    }

    #[test]
    fn a_session_of_the_largest_source_is_evicted_for_a_smaller_one() {
        let now = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        for (host, port) in [(1, 1), (2, 1), (2, 2)] {
            let key = table.insert(client(host, port), host, now);
            table.touch(key, true, now);
        }
        assert_eq!(table.make_room(&client(3, 1), PLENTY, seconds(now, 1)), Some(2));
    }

    #[test]
    fn traffic_in_one_direction_keeps_a_session() {
        let start = Instant::now();
        let mut table = SessionTable::new(LIMITS);
        let sending = table.insert(client(1, 1), "sends", start);
        let answering = table.insert(client(2, 1), "receives", start);
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
    fn one_client_and_two_local_addresses_are_two_sessions() {
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
        let address = || (0u8..4, 0u16..4);
        prop_oneof![
            4 => address().prop_map(|(host, port)| Step::Datagram(host, port)),
            2 => address().prop_map(|(host, port)| Step::Answer(host, port)),
            2 => (0u64..120).prop_map(Step::Wait),
            1 => address().prop_map(|(host, port)| Step::Remove(host, port)),
        ]
    }

    /// Reference model of the same rules: a vector in the order of last activity.
    #[derive(Default)]
    struct Oracle(Vec<(Client, bool, Instant)>);

    impl Oracle {
        fn position(&self, client: &Client) -> Option<usize> {
            self.0.iter().position(|(known, ..)| known == client)
        }

        /// The session to evict for a new one of the same source.
        fn candidate_of(&self, host: IpAddr, now: Instant) -> Option<usize> {
            let of = |which: &dyn Fn(bool, Instant) -> bool| {
                self.0
                    .iter()
                    .position(|(c, assured, seen)| c.address.ip() == host && which(*assured, *seen))
            };
            of(&|assured, seen| !assured && seen + ANSWER_TIME <= now)
                .or_else(|| of(&|assured, _| assured))
                .or_else(|| of(&|_, _| true))
        }

        fn make_room(&mut self, client: &Client, free: usize, now: Instant) -> Option<Client> {
            let held =
                |host: IpAddr| self.0.iter().filter(|(c, ..)| c.address.ip() == host).count();
            let host = client.address.ip();
            let at = if held(host) > 0
                && (held(host) >= LIMITS.per_source || held(host) >= 2 * free)
            {
                self.candidate_of(host, now)
            } else if self.0.len() >= LIMITS.sessions || self.0.len() >= 2 * free {
                let is_flood =
                    2 * self.0.iter().filter(|(_, assured, _)| !assured).count() > self.0.len();
                let largest =
                    self.0.iter().map(|(c, ..)| c.address.ip()).max_by_key(|ip| (held(*ip), *ip));
                let largest = largest.filter(|ip| held(*ip) > 1 && !is_flood);
                let of = |assured: bool| {
                    let is_its =
                        |c: &Client| largest.is_none_or(|largest| c.address.ip() == largest);
                    self.0.iter().position(|(c, is_assured, _)| *is_assured == assured && is_its(c))
                };
                of(false).or(of(true))
            } else {
                None
            };
            at.map(|at| self.0.remove(at).0)
        }

        fn move_to_end(&mut self, at: usize, answer: bool, now: Instant) {
            let (client, assured, _) = self.0.remove(at);
            self.0.push((client, assured || answer, now));
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_oracle(steps in prop::collection::vec(step(), 0..200), free in 0_usize..5) {
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
                            prop_assert_eq!(table.make_room(&client, free, now), oracle.make_room(&client, free, now));
                            table.insert(client, client, now);
                            oracle.0.push((client, false, now));
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
