//! The flows: found by their five-tuple, counted for each source, bounded in every respect. Pure.
//!
//! # Theory of operation
//! A flow belongs to a class, and each class but [`Class::Connection`] is a list from the longest silent to the most recent:
//!
//! | class | what | when the table is full |
//! |---|---|---|
//! | `Tentative` | a session nobody has answered | goes first, longest silent first |
//! | `Assured` | a session with traffic both ways | goes when no tentative one is left |
//! | `Connection` | TCP | never makes room: cutting one is visible, refusing one is honest |
//!
//! Sources (containers, by address) have a share each: flows, connections under way, new flows a second, buffered bytes.
//! A source is remembered for as long as it has flows or its rate is not restored, and only so many are: a flood of invented
//! addresses is refused, whoever has flows is not forgotten for it.
//!
//! What comes in by a container's published ports has shares of its own beside those of what the container itself begins
//! ([`Origin`]): whoever floods the port does not shut the container in.

use crate::limits::{Bucket, Rate};
use crate::siphash::HashKey;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Key};

/// What tells one flow from another, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    /// The container's end.
    pub inside: SocketAddr,
    /// The far end, as the container addresses it.
    pub outside: SocketAddr,
    /// [`crate::wire::protocol`].
    pub protocol: u8,
}

impl Hash for FlowKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let ports = u64::from(self.inside.port()) << 32
            | u64::from(self.outside.port()) << 16
            | u64::from(self.protocol);
        match (self.inside.ip(), self.outside.ip()) {
            (IpAddr::V4(inside), IpAddr::V4(outside)) => {
                state.write_u64(u64::from(inside.to_bits()) << 32 | u64::from(outside.to_bits()));
            }
            (inside, outside) => {
                for ip in [inside, outside] {
                    let bits = match ip {
                        IpAddr::V4(ip) => u128::from(ip.to_bits()),
                        IpAddr::V6(ip) => ip.to_bits(),
                    };
                    state.write_u64((bits >> 64) as u64);
                    state.write_u64(bits as u64);
                }
            }
        }
        state.write_u64(ports);
    }
}

/// How dear a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nobody has answered it.
    Tentative = 0,
    /// It has traffic both ways.
    Assured = 1,
    /// It is a TCP connection.
    Connection = 2,
}

/// Who has begun a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The container.
    Inside,
    /// A client of a published port of the container's.
    Outside,
}

/// The bounds of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLimits {
    /// Flows in all.
    pub flows: usize,
    /// Flows of one source.
    pub flows_per_source: usize,
    /// TCP connections of one source that have not been accepted yet.
    pub half_open_per_source: usize,
    /// New flows of one source.
    pub new_flows_per_source: Rate,
    /// Sessions of one client of published ports, by its address: one that can be answered at thousands of ports does not shut others out.
    pub sessions_per_client: usize,
    /// Bytes that wait in buffers on behalf of one source.
    pub buffered_per_source: usize,
    /// ICMP errors, and resets that belong to no connection, that one source is told.
    pub errors_per_source: Rate,
    /// Sources remembered.
    pub sources: usize,
}

impl Default for TableLimits {
    fn default() -> Self {
        Self {
            flows: 65_536,
            flows_per_source: 16_384,
            half_open_per_source: 1024,
            new_flows_per_source: Rate { per_second: 20_000, burst: 20_000 },
            // As with ports of the port publisher.
            sessions_per_client: 1024,
            buffered_per_source: 64 << 20,
            // The kernel's own: net.ipv4.icmp_msgs_per_sec and icmp_msgs_burst.
            errors_per_source: Rate { per_second: 1000, burst: 1000 },
            sources: 4096,
        }
    }
}

/// Why a new flow was not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The table is full of connections.
    TableFull,
    /// The source has its share of flows.
    SourceShare,
    /// The source has its share of connections under way.
    HalfOpen,
    /// The source makes new flows too fast.
    Rate,
    /// There are too many sources.
    Sources,
}

#[derive(Debug)]
struct Source {
    ip: IpAddr,
    origin: Origin,
    flows: usize,
    half_open: usize,
    buffered: usize,
    bucket: Bucket,
    /// What it may be told.
    errors: Bucket,
}

#[derive(Debug)]
struct Entry<T> {
    key: FlowKey,
    source: Key,
    class: Class,
    half_open: bool,
    last_seen: Instant,
    older: Option<Key>,
    newer: Option<Key>,
    value: T,
}

#[derive(Clone, Copy, Debug, Default)]
struct Silence {
    oldest: Option<Key>,
    newest: Option<Key>,
}

/// How often forgotten sources are looked for at most, when there are too many.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Sessions that are looked at to find one that can make room for another of the same source.
const LOOKED_AT: usize = 256;

/// The flows, each with a `T`.
#[derive(Debug)]
pub struct FlowTable<T> {
    limits: TableLimits,
    flows: Arena<Entry<T>>,
    by_key: HashMap<FlowKey, Key, HashKey>,
    sources: Arena<Source>,
    by_source: BTreeMap<(IpAddr, Origin), Key>,
    silence: [Silence; 2],
    counts: [usize; 3],
    swept: Option<Instant>,
}

impl<T> FlowTable<T> {
    /// An empty table; allocates nothing yet.
    #[must_use]
    pub fn new(limits: TableLimits, key: HashKey) -> Self {
        Self {
            limits,
            flows: Arena::new(),
            by_key: HashMap::with_hasher(key),
            sources: Arena::new(),
            by_source: BTreeMap::new(),
            silence: Default::default(),
            counts: [0; 3],
            swept: None,
        }
    }

    /// How many sources are remembered.
    #[must_use]
    pub fn sources(&self) -> usize {
        self.by_source.len()
    }

    /// How many flows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// How many there are of a class.
    #[must_use]
    pub fn count(&self, class: Class) -> usize {
        self.counts[class as usize]
    }

    /// The flow with this five-tuple.
    #[must_use]
    pub fn find(&self, key: &FlowKey) -> Option<Key> {
        self.by_key.get(key).copied()
    }

    /// What flow `key` carries.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&T> {
        self.flows.get(key).map(|entry| &entry.value)
    }

    /// As [`Self::get`], to change it; and its five-tuple.
    pub fn get_mut(&mut self, key: Key) -> Option<(FlowKey, &mut T)> {
        self.flows.get_mut(key).map(|entry| (entry.key, &mut entry.value))
    }

    /// What flow `key` carries, and how many bytes more its source may have buffered.
    pub fn with_allowance(&mut self, key: Key) -> Option<(&mut T, usize)> {
        let entry = self.flows.get_mut(key)?;
        let buffered = self.sources.get(entry.source).map_or(0, |source| source.buffered);
        Some((&mut entry.value, self.limits.buffered_per_source.saturating_sub(buffered)))
    }

    /// Notes that flow `key` has `before` buffered bytes no longer, but `after`.
    pub fn account_buffered(&mut self, key: Key, before: usize, after: usize) {
        if before != after
            && let Some(entry) = self.flows.get(key)
            && let Some(source) = self.sources.get_mut(entry.source)
        {
            source.buffered = (source.buffered + after).saturating_sub(before);
        }
    }

    /// Whether `ip` may have one flow more of this origin: asked before anything is made for it, and counted against its rate.
    ///
    /// # Errors
    /// Which limit forbids it.
    pub fn admit(&mut self, ip: IpAddr, origin: Origin, class: Class, now: Instant) -> Result<(), Refused> {
        let source = self.source(ip, origin, now)?;
        let limits = self.limits;
        let source = self.sources.get_mut(source).ok_or(Refused::Sources)?;
        if source.flows >= limits.flows_per_source {
            return Err(Refused::SourceShare);
        }
        if class == Class::Connection && source.half_open >= limits.half_open_per_source {
            return Err(Refused::HalfOpen);
        }
        if !source.bucket.take(limits.new_flows_per_source, now) {
            return Err(Refused::Rate);
        }
        let evictable = self.counts[0] + self.counts[1];
        if self.flows.len() >= self.limits.flows && evictable == 0 {
            return Err(Refused::TableFull);
        }
        Ok(())
    }

    /// Whether source `ip` may be told of an error: counted, so that it cannot have the engine answer all day.
    pub fn may_tell(&mut self, ip: IpAddr, now: Instant) -> bool {
        let rate = self.limits.errors_per_source;
        let source =
            self.source(ip, Origin::Inside, now).ok().and_then(|source| self.sources.get_mut(source));
        source.is_some_and(|source| source.errors.take(rate, now))
    }

    /// Takes the flow out that has to make room for a new one, if the table is full.
    pub fn evict(&mut self) -> Option<(FlowKey, T)> {
        if self.flows.len() < self.limits.flows {
            return None;
        }
        self.remove(self.silence[0].oldest.or(self.silence[1].oldest)?)
    }

    /// Takes the longest silent unanswered session out, if it has been so since `before`: something else than room is short.
    pub fn evict_tentative(&mut self, before: Instant) -> Option<(FlowKey, T)> {
        let oldest = self.silence[0].oldest?;
        self.flows.get(oldest).filter(|entry| entry.last_seen <= before)?;
        self.remove(oldest)
    }

    /// Takes the longest silent unanswered session of a source out that has its share. Only so many are looked at: of a flood that takes up
    /// a share, one is among them.
    pub fn evict_tentative_of(&mut self, ip: IpAddr, origin: Origin) -> Option<(FlowKey, T)> {
        let source = *self.by_source.get(&(ip, origin))?;
        let mut next = self.silence[0].oldest;
        for _ in 0..LOOKED_AT {
            let key = next?;
            let entry = self.flows.get(key)?;
            if entry.source == source {
                return self.remove(key);
            }
            next = entry.newer;
        }
        None
    }

    /// Adds a flow, which was admitted and for which room was made. A connection begins half-open.
    pub fn insert(
        &mut self,
        key: FlowKey,
        origin: Origin,
        class: Class,
        value: T,
        now: Instant,
    ) -> Option<Key> {
        let source = self.source(key.inside.ip(), origin, now).ok()?;
        let half_open = class == Class::Connection;
        let entry = Entry { key, source, class, half_open, last_seen: now, older: None, newer: None, value };
        let flow = self.flows.insert(entry);
        self.by_key.insert(key, flow);
        self.counts[class as usize] += 1;
        if let Some(source) = self.sources.get_mut(source) {
            source.flows += 1;
            source.half_open += usize::from(half_open);
        }
        self.append(flow);
        Some(flow)
    }

    /// Notes that connection `key` was accepted.
    pub fn opened(&mut self, key: Key) {
        if let Some(entry) = self.flows.get_mut(key)
            && std::mem::take(&mut entry.half_open)
            && let Some(source) = self.sources.get_mut(entry.source)
        {
            source.half_open -= 1;
        }
    }

    /// Notes a packet of session `key`; `answer` if it came from the far end.
    pub fn touch(&mut self, key: Key, answer: bool, now: Instant) {
        let Some(entry) = self.flows.get_mut(key) else { return };
        // A list in the order of silence need not be exact to the packet.
        let moves = answer && entry.class == Class::Tentative;
        if !moves && now.saturating_duration_since(entry.last_seen) < Duration::from_millis(10) {
            return;
        }
        self.unlink(key);
        if let Some(entry) = self.flows.get_mut(key) {
            entry.last_seen = now;
            if moves {
                entry.class = Class::Assured;
                self.counts[Class::Tentative as usize] -= 1;
                self.counts[Class::Assured as usize] += 1;
            }
        }
        self.append(key);
    }

    /// When flow `key` was last noted, and of which class it is.
    #[must_use]
    pub fn last_seen(&self, key: Key) -> Option<(Instant, Class)> {
        self.flows.get(key).map(|entry| (entry.last_seen, entry.class))
    }

    /// Ends flow `key` and hands out what it carried.
    pub fn remove(&mut self, key: Key) -> Option<(FlowKey, T)> {
        self.flows.get(key)?;
        self.opened(key);
        self.unlink(key);
        let entry = self.flows.remove(key)?;
        self.by_key.remove(&entry.key);
        self.counts[entry.class as usize] -= 1;
        if let Some(source) = self.sources.get_mut(entry.source) {
            source.flows -= 1;
        }
        Some((entry.key, entry.value))
    }

    /// The keys of all flows, in no order of meaning.
    #[must_use]
    pub fn keys(&self) -> Vec<Key> {
        self.flows.keys()
    }

    fn source(&mut self, ip: IpAddr, origin: Origin, now: Instant) -> Result<Key, Refused> {
        if let Some(key) = self.by_source.get(&(ip, origin)) {
            return Ok(*key);
        }
        if self.by_source.len() >= self.limits.sources {
            self.forget_sources(now);
            if self.by_source.len() >= self.limits.sources {
                return Err(Refused::Sources);
            }
        }
        let bucket = Bucket::new(self.limits.new_flows_per_source, now);
        let errors = Bucket::new(self.limits.errors_per_source, now);
        let source = Source { ip, origin, flows: 0, half_open: 0, buffered: 0, bucket, errors };
        let key = self.sources.insert(source);
        self.by_source.insert((ip, origin), key);
        Ok(key)
    }

    fn forget_sources(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP_INTERVAL) {
            return;
        }
        self.swept = Some(now);
        let rate = self.limits.new_flows_per_source;
        for key in self.sources.keys() {
            if let Some(source) = self.sources.get_mut(key)
                && source.flows == 0
                && source.bucket.is_full(rate, now)
            {
                self.by_source.remove(&(source.ip, source.origin));
                self.sources.remove(key);
            }
        }
    }

    /// Puts `key` at the recent end of its list.
    fn append(&mut self, key: Key) {
        let Some(entry) = self.flows.get_mut(key) else { return };
        let Some(list) = self.silence.get_mut(entry.class as usize) else { return };
        entry.older = list.newest;
        entry.newer = None;
        let before = list.newest.replace(key);
        match before.and_then(|before| self.flows.get_mut(before)) {
            Some(before) => before.newer = Some(key),
            None => list.oldest = Some(key),
        }
    }

    /// Takes `key` out of its list.
    fn unlink(&mut self, key: Key) {
        let Some(entry) = self.flows.get_mut(key) else { return };
        let Some(list) = self.silence.get_mut(entry.class as usize) else { return };
        let (older, newer) = (entry.older.take(), entry.newer.take());
        match older.and_then(|older| self.flows.get_mut(older)) {
            Some(older) => older.newer = newer,
            None => list.oldest = newer,
        }
        match newer.and_then(|newer| self.flows.get_mut(newer)) {
            Some(newer) => newer.older = older,
            None => list.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: HashKey = HashKey([1, 2]);
    const LIMITS: TableLimits = TableLimits {
        flows: 4,
        flows_per_source: 3,
        half_open_per_source: 2,
        new_flows_per_source: Rate { per_second: 1000, burst: 1000 },
        sessions_per_client: 2,
        buffered_per_source: 100,
        errors_per_source: Rate { per_second: 1, burst: 1 },
        sources: 3,
    };

    fn key(host: u8, port: u16) -> FlowKey {
        let inside = SocketAddr::from(([10, 0, 0, host], port));
        FlowKey { inside, outside: SocketAddr::from(([192, 0, 2, 1], 53)), protocol: 17 }
    }

    fn add(
        table: &mut FlowTable<u16>,
        host: u8,
        port: u16,
        class: Class,
        now: Instant,
    ) -> Result<Key, Refused> {
        table.admit(key(host, port).inside.ip(), Origin::Inside, class, now)?;
        table.evict();
        Ok(table.insert(key(host, port), Origin::Inside, class, port, now).unwrap())
    }

    #[test]
    fn a_connection_never_makes_room_and_an_unanswered_session_goes_first() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let old = add(&mut table, 1, 1, Class::Tentative, now).unwrap();
        table.touch(old, true, now);
        add(&mut table, 1, 2, Class::Tentative, now).unwrap();
        add(&mut table, 2, 3, Class::Connection, now).unwrap();
        add(&mut table, 2, 4, Class::Connection, now).unwrap();
        add(&mut table, 3, 5, Class::Connection, now).unwrap();
        assert_eq!(table.find(&key(1, 2)), None, "the unanswered one");
        assert!(table.find(&key(1, 1)).is_some());
        add(&mut table, 3, 6, Class::Connection, now).unwrap();
        assert_eq!(table.find(&key(1, 1)), None, "then the answered one");
        assert_eq!(add(&mut table, 1, 7, Class::Tentative, now), Err(Refused::TableFull));
        assert_eq!(table.count(Class::Connection), 4);
    }

    #[test]
    fn a_source_has_its_share_of_flows_and_of_connections_under_way() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let first = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        add(&mut table, 1, 2, Class::Connection, now).unwrap();
        assert_eq!(add(&mut table, 1, 3, Class::Connection, now), Err(Refused::HalfOpen));
        table.opened(first);
        add(&mut table, 1, 3, Class::Connection, now).unwrap();
        assert_eq!(add(&mut table, 1, 4, Class::Tentative, now), Err(Refused::SourceShare));
        assert!(add(&mut table, 2, 4, Class::Tentative, now).is_ok(), "others have theirs");
    }

    #[test]
    fn invented_sources_are_refused_and_forgotten_when_their_rate_is_restored() {
        let now = Instant::now();
        let mut table = FlowTable::<u16>::new(LIMITS, KEY);
        let honest = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        let mut refused = 0;
        for host in 2..=255 {
            let ip = key(host, 1).inside.ip();
            refused += usize::from(table.admit(ip, Origin::Inside, Class::Tentative, now).is_err());
        }
        assert_eq!(refused, 252, "two places were free");
        assert!(table.get(honest).is_some());
        let later = now + Duration::from_secs(2);
        assert_eq!(table.admit(key(77, 1).inside.ip(), Origin::Inside, Class::Tentative, later), Ok(()));
    }

    #[test]
    fn who_floods_a_published_port_takes_its_share_and_evicts_his_own() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        add(&mut table, 1, 1, Class::Tentative, now).unwrap();
        let ip = key(1, 1).inside.ip();
        for port in 10..12 {
            table.admit(ip, Origin::Outside, Class::Tentative, now).unwrap();
            table.insert(key(1, port), Origin::Outside, Class::Tentative, port, now).unwrap();
        }
        let share = TableLimits { flows_per_source: 2, ..LIMITS };
        table.limits = share;
        let more = table.admit(ip, Origin::Outside, Class::Tentative, now);
        assert_eq!(more, Err(Refused::SourceShare));
        assert_eq!(table.admit(ip, Origin::Inside, Class::Tentative, now), Ok(()));
        let evicted = table.evict_tentative_of(ip, Origin::Outside).map(|(_, port)| port);
        assert_eq!(evicted, Some(10), "the longest silent, and not the container's own");
        assert_eq!(table.admit(ip, Origin::Outside, Class::Tentative, now), Ok(()));
    }

    #[test]
    fn buffered_bytes_count_against_their_source_alone() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let one = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        let same = add(&mut table, 1, 2, Class::Connection, now).unwrap();
        let other = add(&mut table, 2, 1, Class::Connection, now).unwrap();
        table.account_buffered(one, 0, 70);
        assert_eq!(table.with_allowance(same).unwrap().1, 30);
        assert_eq!(table.with_allowance(other).unwrap().1, 100);
        table.account_buffered(one, 70, 0);
        assert_eq!(table.with_allowance(same).unwrap().1, 100);
    }

    proptest! {
        #[test]
        fn no_limit_is_ever_passed_and_every_flow_is_found(
            steps in prop::collection::vec((0u8..6, 1u16..6, 0u8..5), 1..200),
        ) {
            let now = Instant::now();
            let mut table = FlowTable::new(LIMITS, KEY);
            for (host, port, action) in steps {
                let key = key(host, port);
                match (table.find(&key), action) {
                    (Some(flow), 0) => drop(table.remove(flow)),
                    (Some(flow), 1) => table.opened(flow),
                    (Some(flow), _) => table.touch(flow, action == 2, now),
                    (None, action) => {
                        let class = if action < 3 { Class::Connection } else { Class::Tentative };
                        let _ = add(&mut table, host, port, class, now);
                    }
                }
                prop_assert!(table.len() <= LIMITS.flows);
                prop_assert!(table.by_source.len() <= LIMITS.sources);
                prop_assert_eq!(table.by_key.len(), table.len());
                prop_assert_eq!(table.counts.iter().sum::<usize>(), table.len());
                let flows: usize = table.sources.iter().map(|(_, source)| source.flows).sum();
                prop_assert_eq!(flows, table.len());
                for (_, source) in table.sources.iter() {
                    prop_assert!(source.flows <= LIMITS.flows_per_source);
                    prop_assert!(source.half_open <= LIMITS.half_open_per_source);
                }
            }
        }
    }
}
