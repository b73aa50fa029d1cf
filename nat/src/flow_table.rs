//! Flow table: lookup by five-tuple, accounting per endpoint and network, and limits. No I/O.
//!
//! # Theory of operation
//! Each source (the address of an endpoint) has two lists of flows, each ordered from the longest
//! idle to the most recent: *unanswered* flows ([`Class::Tentative`], and TCP connections until the
//! handshake is complete on both sides) and *answered* flows.
//!
//! | limit | evicted flow or source |
//! |---|---|
//! | unanswered flows of a source | its longest unanswered flow |
//! | flows of a source | its longest unanswered flow, then its longest idle flow |
//! | total flows | the same, of the source with the most flows in the network with the most flows |
//! | sources | a source without flows, of the network with the most sources |
//! | held bytes | the longest blocked connection of the source that holds most, among those that are blocked |
//!
//! A new flow costs a socket and several system calls, about as much as forwarding fifty small
//! packets. For an answered flow this cost is justified. A flood consists of flows that stay
//! unanswered. Unanswered flows therefore have a budget, which is refunded when a flow is answered:
//!
//! - A source in *good standing* has created few unanswered flows recently. It is charged only to
//!   the budget of its network, and to no budget once it has had an answered flow.
//! - Any other source is charged to its own budget (a burst of
//!   [`TableLimits::unanswered_per_source`], half of it per second). Unless it has had an answered
//!   flow, it is also charged to the budget of its network (twice the burst, the same rate). The
//!   last half of the network budget is reserved for sources in good standing.
//!
//! Spoofed source addresses therefore neither multiply the budget nor lock out the other endpoints
//! of their network.
//!
//! Flows through published ports are counted separately from those that the container creates
//! ([`Origin`]), so a flood of clients does not exhaust the egress of the container.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::limits::{Bucket, Rate};
use crate::siphash::HashKey;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Key, Links, List};

/// Identifies a flow, as seen by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    /// Address and port of the container.
    pub inside: SocketAddr,
    /// Address and port of the remote side, as the container addresses it.
    pub outside: SocketAddr,
    /// Protocol number ([`crate::wire::protocol`]).
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

/// Number of longest idle flows of a source that are searched for one with a descriptor.
const EVICTION_SCAN: usize = 64;

/// Class of a flow, by increasing value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A session without a reply.
    Tentative = 0,
    /// A session with traffic in both directions.
    Assured = 1,
    /// A TCP connection.
    Connection = 2,
}

/// Initiator of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The container.
    Inside,
    /// A client of a published port of the container.
    Outside,
}

/// Limits of a flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLimits {
    /// Maximum number of flows.
    pub flows: usize,
    /// Maximum number of flows per source.
    pub flows_per_source: usize,
    /// Maximum number of unanswered flows per source: TCP connections with an incomplete handshake,
    /// and sessions without a reply. It is also the burst of new flows that stay unanswered; their
    /// sustained rate is half of it per second.
    pub unanswered_per_source: usize,
    /// Rate of new flows per source.
    pub new_flows_per_source: Rate,
    /// Maximum number of UDP sessions, and of TCP connections, per client of published ports (an
    /// IPv4 address or an IPv6 /64), so that one client with many ports does not lock out others.
    pub sessions_per_client: usize,
    /// Maximum number of bytes that connections hold for a side that does not take them. A source
    /// may hold twice as much as it leaves free. [`crate::tcp::memory`] lists what is charged.
    pub held_bytes: usize,
    /// Rate of ICMP errors and of resets without a connection, per source.
    pub errors_per_source: Rate,
    /// Maximum number of sources.
    pub sources: usize,
    /// Maximum number of queued packets from containers.
    pub queued_packets: usize,
    /// Maximum number of queued bytes from containers.
    pub queued_bytes: usize,
}

impl Default for TableLimits {
    fn default() -> Self {
        Self {
            flows: 65_536,
            flows_per_source: 16_384,
            unanswered_per_source: 1024,
            new_flows_per_source: Rate { per_second: 20_000, burst: 20_000 },
            // The same as for ports of the port publisher.
            sessions_per_client: 8192,
            // The same as for ports of the port publisher.
            held_bytes: 256 << 20,
            // The defaults of the kernel: net.ipv4.icmp_msgs_per_sec and icmp_msgs_burst.
            errors_per_source: Rate { per_second: 1000, burst: 1000 },
            sources: 4096,
            queued_packets: 4096,
            // Sixteen TCP windows of 1 MiB each.
            queued_bytes: 16 << 20,
        }
    }
}

impl TableLimits {
    fn unanswered_rate(&self) -> Rate {
        let flows = u32::try_from(self.unanswered_per_source).unwrap_or(u32::MAX);
        Rate { per_second: flows.div_ceil(2), burst: flows }
    }

    fn network_rate(&self) -> Rate {
        let Rate { per_second, burst } = self.unanswered_rate();
        Rate { per_second, burst: burst.saturating_mul(2) }
    }
}

/// Reason for not admitting a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdmissionError {
    /// The table is full, and no flow can be evicted.
    TableFull,
    /// The source exceeds its rate of new flows.
    Rate,
    /// The source or its network has exhausted the budget for unanswered flows.
    Unanswered,
    /// The table of sources is full.
    Sources,
}

/// Limit that caused an eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// [`TableLimits::flows`].
    Flows,
    /// [`TableLimits::flows_per_source`].
    SourceFlows,
    /// [`TableLimits::unanswered_per_source`].
    Unanswered,
    /// [`TableLimits::sessions_per_client`].
    Client,
    /// File descriptors.
    Descriptors,
    /// [`TableLimits::held_bytes`].
    HeldBytes,
}

impl Limit {
    /// All limits.
    pub const ALL: [Self; 6] = [
        Self::Flows,
        Self::SourceFlows,
        Self::Unanswered,
        Self::Client,
        Self::Descriptors,
        Self::HeldBytes,
    ];

    /// The value of the label `limit`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flows => "flows",
            Self::SourceFlows => "endpoint_flows",
            Self::Unanswered => "unanswered",
            Self::Client => "client",
            Self::Descriptors => "descriptors",
            Self::HeldBytes => "held_bytes",
        }
    }
}

/// Rate and burst of unanswered flows up to which a source is in good standing.
const GOOD_STANDING: Rate = Rate { per_second: 4, burst: 32 };

/// Budgets to which an unanswered flow is charged, and which are refunded once it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Charge {
    Standing,
    StandingAndNetwork,
    Source,
    SourceAndNetwork,
    None,
}

/// Permission to insert a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    network: u16,
    origin: Origin,
    charge: Charge,
}

#[derive(Debug)]
struct Source {
    ip: IpAddr,
    origin: Origin,
    network: u16,
    flows: usize,
    unanswered: usize,
    held: usize,
    bucket: Bucket,
    /// The source has had an answered flow.
    answered: bool,
    standing: Bucket,
    budget: Bucket,
    /// Rate limit for ICMP errors and resets.
    errors: Bucket,
    /// Unanswered flows, then answered ones.
    idle: [List; 2],
    /// Blocked connections, the one that is blocked for longest first.
    blocked: List,
}

impl Charge {
    fn includes_network(self) -> bool {
        matches!(self, Self::StandingAndNetwork | Self::SourceAndNetwork)
    }
}

impl Source {
    fn refund(&mut self, charge: Charge, limits: TableLimits) {
        match charge {
            Charge::Standing | Charge::StandingAndNetwork => self.standing.refund(GOOD_STANDING),
            Charge::Source | Charge::SourceAndNetwork => {
                self.budget.refund(limits.unanswered_rate());
            }
            Charge::None => {}
        }
    }
}

#[derive(Debug)]
struct NetworkState {
    flows: usize,
    sources: usize,
    budget: Bucket,
}

#[derive(Debug)]
struct Entry<T> {
    key: FlowKey,
    source: Key,
    class: Class,
    unanswered: bool,
    charge: Charge,
    last_seen: Instant,
    links: Links,
    is_blocked: bool,
    /// At most a few windows.
    held: u32,
    blocked_links: Links,
    value: T,
}

/// Minimum interval between sweeps for sources without flows.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// Precision of the idle lists: for sessions, and for connections, which have a packet every few
/// microseconds.
const SESSION_PRECISION: Duration = Duration::from_millis(10);
const CONNECTION_PRECISION: Duration = Duration::from_millis(500);

/// A table of flows, each with a value of type `T`.
#[derive(Debug)]
pub struct FlowTable<T> {
    limits: TableLimits,
    flows: Arena<Entry<T>>,
    by_key: HashMap<FlowKey, Key, HashKey>,
    sources: Arena<Source>,
    by_source: BTreeMap<(IpAddr, Origin), Key>,
    networks: BTreeMap<u16, NetworkState>,
    /// Bytes held by all flows.
    held: usize,
    counts: [usize; 3],
    swept: Option<Instant>,
}

impl<T> FlowTable<T> {
    /// Creates an empty table without allocating.
    #[must_use]
    pub fn new(limits: TableLimits, key: HashKey) -> Self {
        Self {
            limits,
            flows: Arena::new(),
            by_key: HashMap::with_hasher(key),
            sources: Arena::new(),
            by_source: BTreeMap::new(),
            networks: BTreeMap::new(),
            held: 0,
            counts: [0; 3],
            swept: None,
        }
    }

    /// Number of sources.
    #[must_use]
    pub fn sources(&self) -> usize {
        self.by_source.len()
    }

    /// Number of flows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether the table is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Whether the table is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.flows.len() >= self.limits.flows
    }

    /// Number of flows of `class`.
    #[must_use]
    pub fn count(&self, class: Class) -> usize {
        self.counts[class as usize]
    }

    /// Returns the flow with this five-tuple.
    #[must_use]
    pub fn find(&self, key: &FlowKey) -> Option<Key> {
        self.by_key.get(key).copied()
    }

    /// Returns the value of flow `key`.
    #[must_use]
    pub fn get(&self, key: Key) -> Option<&T> {
        self.flows.get(key).map(|entry| &entry.value)
    }

    /// Returns the five-tuple and, mutably, the value of flow `key`.
    pub fn get_mut(&mut self, key: Key) -> Option<(FlowKey, &mut T)> {
        self.flows.get_mut(key).map(|entry| (entry.key, &mut entry.value))
    }

    /// Returns the network of flow `key`.
    #[must_use]
    pub fn network(&self, key: Key) -> u16 {
        let source = self.flows.get(key).and_then(|entry| self.sources.get(entry.source));
        source.map_or(0, |source| source.network)
    }

    /// Whether flow `key` is unanswered.
    #[must_use]
    pub fn is_unanswered(&self, key: Key) -> bool {
        self.flows.get(key).is_some_and(|entry| entry.unanswered)
    }

    /// Returns the value of flow `key`, and the number of bytes that its source may still take: as
    /// many as leave it with at most twice of what is free ([`tidegate_model::may_take`]).
    pub fn with_allowance(&mut self, key: Key) -> Option<(&mut T, usize)> {
        let entry = self.flows.get_mut(key)?;
        let held = self.sources.get(entry.source).map_or(0, |source| source.held);
        let free = self.limits.held_bytes.saturating_sub(self.held);
        Some((&mut entry.value, free.saturating_mul(2).saturating_sub(held) / 3))
    }

    /// Updates the number of bytes that flow `key` holds, and whether it is blocked.
    pub fn set_held(&mut self, key: Key, held: usize, is_blocked: bool) {
        let Some(entry) = self.flows.get_mut(key) else { return };
        let before = std::mem::replace(&mut entry.held, held as u32) as usize;
        let was_blocked = std::mem::replace(&mut entry.is_blocked, is_blocked);
        let Some(source) = self.sources.get_mut(entry.source) else { return };
        source.held = source.held + held - before;
        self.held = self.held + held - before;
        match (was_blocked, is_blocked) {
            (false, true) => {
                source.blocked.append(&mut self.flows, key, |entry| &mut entry.blocked_links);
            }
            (true, false) => {
                source.blocked.remove(&mut self.flows, key, |entry| &mut entry.blocked_links);
            }
            _ => {}
        }
    }

    /// Number of bytes that all flows hold.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// If flows hold more bytes than the limit, removes the connection that has been blocked for
    /// longest, of the source that holds most among those with a blocked one.
    pub fn evict_over_budget(&mut self) -> Option<(FlowKey, T)> {
        if self.held <= self.limits.held_bytes {
            return None;
        }
        let candidates = self
            .sources
            .iter()
            .filter_map(|(_, source)| Some((source.held, source.blocked.oldest()?)));
        let (_, victim) = candidates.max_by_key(|(held, _)| *held)?;
        self.remove(victim)
    }

    /// Decides whether `ip` of `network` may create a flow, and charges its budgets. Called before
    /// any resource is allocated; [`Self::evict_for`] then makes room.
    ///
    /// # Errors
    /// The limit that was exceeded.
    pub fn admit(
        &mut self,
        ip: IpAddr,
        network: u16,
        origin: Origin,
        now: Instant,
    ) -> Result<Admission, AdmissionError> {
        let admission = |charge| Admission { network, origin, charge };
        let limits = self.limits;
        let budget_rate = limits.unanswered_rate();
        let network_rate = limits.network_rate();
        let source = self.source(ip, network, origin, now)?;
        let source = self.sources.get_mut(source).ok_or(AdmissionError::Sources)?;
        if source.bucket.level(limits.new_flows_per_source, now) == 0 {
            return Err(AdmissionError::Rate);
        }
        if origin == Origin::Outside {
            // A published service may never reply to its clients (syslog).
            source.bucket.take(limits.new_flows_per_source, now);
            return Ok(admission(Charge::None));
        }
        let in_good_standing = source.standing.take(GOOD_STANDING, now);
        if in_good_standing && source.answered {
            source.bucket.take(limits.new_flows_per_source, now);
            return Ok(admission(Charge::Standing));
        }
        if source.answered {
            // A reply proves that the address is not spoofed. Only the budget of the source itself
            // applies, so flooding neighbours do not affect it.
            if !source.budget.take(budget_rate, now) {
                return Err(AdmissionError::Unanswered);
            }
            source.bucket.take(limits.new_flows_per_source, now);
            return Ok(admission(Charge::Source));
        }
        let network = self.networks.get_mut(&source.network).ok_or(AdmissionError::Unanswered)?;
        let reserve = if in_good_standing { 0 } else { network_rate.burst / 2 };
        if network.budget.level(network_rate, now) <= reserve
            || !in_good_standing && !source.budget.take(budget_rate, now)
        {
            return Err(AdmissionError::Unanswered);
        }
        network.budget.take(network_rate, now);
        source.bucket.take(limits.new_flows_per_source, now);
        Ok(admission(if in_good_standing {
            Charge::StandingAndNetwork
        } else {
            Charge::SourceAndNetwork
        }))
    }

    /// Refunds the charges of a flow of `ip` that is not created.
    pub fn refund(&mut self, ip: IpAddr, Admission { origin, charge, .. }: Admission) {
        let source = self.by_source.get(&(ip, origin));
        if let Some(source) = source.and_then(|key| self.sources.get_mut(*key)) {
            source.refund(charge, self.limits);
            if charge.includes_network()
                && let Some(network) = self.networks.get_mut(&source.network)
            {
                network.budget.refund(self.limits.network_rate());
            }
        }
    }

    /// Whether an ICMP error or a reset may be sent to source `ip`. Rate limited, so that a source
    /// cannot keep the engine busy with replies.
    pub fn may_send_error(&mut self, ip: IpAddr, network: u16, now: Instant) -> bool {
        let rate = self.limits.errors_per_source;
        let source = self
            .source(ip, network, Origin::Inside, now)
            .ok()
            .and_then(|source| self.sources.get_mut(source));
        source.is_some_and(|source| source.errors.take(rate, now))
    }

    /// Removes the flow to evict for a new flow of `ip`, and returns it with the limit. Must be
    /// called until it returns `None`.
    pub fn evict_for(
        &mut self,
        ip: IpAddr,
        origin: Origin,
        class: Class,
    ) -> Option<(FlowKey, T, Limit)> {
        let is_limited = origin == Origin::Inside || class == Class::Connection;
        let own = self.by_source.get(&(ip, origin)).and_then(|key| self.sources.get(*key));
        let (victim, limit) = match own {
            Some(own) if is_limited && own.unanswered >= self.limits.unanswered_per_source => {
                (own.idle[0].oldest(), Limit::Unanswered)
            }
            Some(own) if own.flows >= self.limits.flows_per_source => {
                (own.idle[0].oldest().or(own.idle[1].oldest()), Limit::SourceFlows)
            }
            _ if self.flows.len() >= self.limits.flows => {
                let largest = self.largest().and_then(|key| self.sources.get(key))?;
                (largest.idle[0].oldest().or(largest.idle[1].oldest()), Limit::Flows)
            }
            _ => return None,
        };
        self.remove(victim?).map(|(key, value)| (key, value, limit))
    }

    /// Evicts a flow to free a descriptor: the longest unanswered flow of a source, if its last
    /// packet is not later than `before`. Of several such sources, the one with the most unanswered
    /// flows loses its flow.
    pub fn evict_unanswered(&mut self, before: Instant) -> Option<(FlowKey, T)> {
        self.evict_with_descriptor(0, before, |source| source.unanswered)
    }

    /// Like [`Self::evict_unanswered`], for answered flows: evicts the longest idle flow of the
    /// source with the most flows.
    pub fn evict_idle(&mut self, before: Instant) -> Option<(FlowKey, T)> {
        self.evict_with_descriptor(1, before, |source| source.flows)
    }

    /// Evicts the longest idle flow with a descriptor in `Source::idle[list]` of the source with
    /// the largest `share` among those that have such a flow.
    fn evict_with_descriptor(
        &mut self,
        list: usize,
        before: Instant,
        share: impl Fn(&Source) -> usize,
    ) -> Option<(FlowKey, T)> {
        let victim = |source: &Source| {
            // Sessions of published ports have no descriptor of their own.
            let frees = |class| source.origin == Origin::Inside || class == Class::Connection;
            let mut idle = source.idle[list].iter(&self.flows, |entry| &entry.links);
            idle.by_ref().take(EVICTION_SCAN).find(|key| {
                let entry = self.flows.get(*key);
                entry.is_some_and(|entry| entry.last_seen <= before && frees(entry.class))
            })
        };
        let candidates =
            self.sources.iter().filter_map(|(_, source)| Some((share(source), victim(source)?)));
        let (_, victim) = candidates.max_by_key(|(share, _)| *share)?;
        self.remove(victim)
    }

    /// The source with the most flows, in the network with the most flows.
    fn largest(&self) -> Option<Key> {
        let (network, _) = self.networks.iter().max_by_key(|(_, network)| network.flows)?;
        let sources = self.sources.iter().filter(|(_, source)| source.network == *network);
        sources.max_by_key(|(_, source)| source.flows).map(|(key, _)| key)
    }

    /// The source with the most flows in the network with the most flows, and their number.
    #[must_use]
    pub fn largest_holder(&self) -> Option<(IpAddr, usize)> {
        self.largest().and_then(|key| self.sources.get(key)).map(|source| (source.ip, source.flows))
    }

    /// The maximum number of flows of any source, and the maximum number of unanswered flows.
    #[must_use]
    pub fn largest_shares(&self) -> (usize, usize) {
        let shares = self.sources.iter().map(|(_, source)| (source.flows, source.unanswered));
        shares.fold((0, 0), |(a, b), (c, d)| (a.max(c), b.max(d)))
    }

    /// Inserts a flow that was admitted and for which room was made. It starts unanswered.
    pub fn insert(
        &mut self,
        key: FlowKey,
        admission: Admission,
        class: Class,
        value: T,
        now: Instant,
    ) -> Option<Key> {
        let Admission { network, origin, charge } = admission;
        let source = self.source(key.inside.ip(), network, origin, now).ok()?;
        let unanswered = class != Class::Assured;
        let entry = Entry {
            key,
            source,
            class,
            unanswered,
            charge,
            last_seen: now,
            links: Links::default(),
            held: 0,
            is_blocked: false,
            blocked_links: Links::default(),
            value,
        };
        let flow = self.flows.insert(entry);
        self.by_key.insert(key, flow);
        self.counts[class as usize] += 1;
        if let Some(source) = self.sources.get_mut(source) {
            source.flows += 1;
            source.unanswered += usize::from(unanswered);
            if let Some(network) = self.networks.get_mut(&source.network) {
                network.flows += 1;
            }
        }
        self.append(flow);
        Some(flow)
    }

    /// Marks a flow as answered: the connection is established on both sides, or the session had a
    /// reply.
    pub fn mark_answered(&mut self, key: Key) {
        if self.flows.get(key).is_none_or(|entry| !entry.unanswered) {
            return;
        }
        self.unlink(key);
        let limits = self.limits;
        if let Some(entry) = self.flows.get_mut(key) {
            entry.unanswered = false;
            let charge = std::mem::replace(&mut entry.charge, Charge::None);
            if let Some(source) = self.sources.get_mut(entry.source) {
                source.unanswered -= 1;
                source.answered = true;
                source.refund(charge, limits);
                if charge.includes_network()
                    && let Some(network) = self.networks.get_mut(&source.network)
                {
                    network.budget.refund(limits.network_rate());
                }
            }
        }
        self.append(key);
    }

    /// Records a packet of flow `key`; `answer` if it came from the remote side of a session.
    pub fn touch(&mut self, key: Key, answer: bool, now: Instant) {
        let Some(entry) = self.flows.get_mut(key) else { return };
        let answers = answer && entry.class == Class::Tentative;
        // The order of the idle lists need not be exact to the packet.
        let precision =
            if entry.class == Class::Connection { CONNECTION_PRECISION } else { SESSION_PRECISION };
        if !answers && now.saturating_duration_since(entry.last_seen) < precision {
            return;
        }
        entry.last_seen = now;
        if answers {
            entry.class = Class::Assured;
            self.counts[Class::Tentative as usize] -= 1;
            self.counts[Class::Assured as usize] += 1;
            self.mark_answered(key);
        } else {
            self.unlink(key);
            self.append(key);
        }
    }

    /// The time of the last recorded packet of flow `key`, and its class.
    #[must_use]
    pub fn last_seen(&self, key: Key) -> Option<(Instant, Class)> {
        self.flows.get(key).map(|entry| (entry.last_seen, entry.class))
    }

    /// Removes flow `key` and returns its value.
    pub fn remove(&mut self, key: Key) -> Option<(FlowKey, T)> {
        self.set_held(key, 0, false);
        self.unlink(key);
        let entry = self.flows.remove(key)?;
        self.by_key.remove(&entry.key);
        self.counts[entry.class as usize] -= 1;
        if let Some(source) = self.sources.get_mut(entry.source) {
            source.flows -= 1;
            source.unanswered -= usize::from(entry.unanswered);
            if let Some(network) = self.networks.get_mut(&source.network) {
                network.flows -= 1;
            }
        }
        Some((entry.key, entry.value))
    }

    /// The keys of all flows, in arbitrary order.
    #[must_use]
    pub fn keys(&self) -> Vec<Key> {
        self.flows.keys()
    }

    fn source(
        &mut self,
        ip: IpAddr,
        network: u16,
        origin: Origin,
        now: Instant,
    ) -> Result<Key, AdmissionError> {
        if let Some(key) = self.by_source.get(&(ip, origin)) {
            return Ok(*key);
        }
        if self.by_source.len() >= self.limits.sources {
            self.remove_idle_sources(now);
            if self.by_source.len() >= self.limits.sources {
                return Err(AdmissionError::Sources);
            }
        }
        let source = Source {
            ip,
            origin,
            network,
            flows: 0,
            unanswered: 0,
            answered: false,
            held: 0,
            bucket: Bucket::new(self.limits.new_flows_per_source, now),
            standing: Bucket::new(GOOD_STANDING, now),
            budget: Bucket::new(self.limits.unanswered_rate(), now),
            errors: Bucket::new(self.limits.errors_per_source, now),
            idle: Default::default(),
            blocked: List::default(),
        };
        let key = self.sources.insert(source);
        self.by_source.insert((ip, origin), key);
        let budget = Bucket::new(self.limits.network_rate(), now);
        let fresh = NetworkState { flows: 0, sources: 0, budget };
        self.networks.entry(network).or_insert(fresh).sources += 1;
        Ok(key)
    }

    /// Removes sources without flows from the network with the most sources, if their rate limits
    /// are fully restored.
    fn remove_idle_sources(&mut self, now: Instant) {
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < SWEEP_INTERVAL) {
            return;
        }
        self.swept = Some(now);
        let Some((network, _)) = self.networks.iter().max_by_key(|(_, network)| network.sources)
        else {
            return;
        };
        let (network, rate, budget) =
            (*network, self.limits.new_flows_per_source, self.limits.unanswered_rate());
        for key in self.sources.keys() {
            if let Some(source) = self.sources.get_mut(key)
                && source.network == network
                && source.flows == 0
                && source.bucket.is_full(rate, now)
                && source.budget.is_full(budget, now)
            {
                self.by_source.remove(&(source.ip, source.origin));
                self.sources.remove(key);
                if let Some(network) = self.networks.get_mut(&network) {
                    network.sources -= 1;
                }
            }
        }
    }

    fn list(&mut self, entry: Key) -> Option<(&mut List, &mut Arena<Entry<T>>)> {
        let entry = self.flows.get(entry)?;
        let index = usize::from(!entry.unanswered);
        let list = &mut self.sources.get_mut(entry.source)?.idle[index];
        Some((list, &mut self.flows))
    }

    /// Appends `key` to its list as the most recent.
    fn append(&mut self, key: Key) {
        if let Some((list, flows)) = self.list(key) {
            list.append(flows, key, |entry| &mut entry.links);
        }
    }

    /// Removes `key` from its list.
    fn unlink(&mut self, key: Key) {
        if let Some((list, flows)) = self.list(key) {
            list.remove(flows, key, |entry| &mut entry.links);
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
        unanswered_per_source: 2,
        new_flows_per_source: Rate { per_second: 1000, burst: 1000 },
        sessions_per_client: 2,
        held_bytes: 300,
        errors_per_source: Rate { per_second: 1, burst: 1 },
        sources: 3,
        queued_packets: 8,
        queued_bytes: 1000,
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
    ) -> Result<(Key, Vec<u16>), AdmissionError> {
        let (key, network) = (key(host, port), u16::from(host / 10));
        let admission = table.admit(key.inside.ip(), network, Origin::Inside, now)?;
        let mut evicted = Vec::new();
        while let Some((_, port, _)) = table.evict_for(key.inside.ip(), Origin::Inside, class) {
            evicted.push(port);
        }
        let flow = table.insert(key, admission, class, port, now).unwrap();
        Ok((flow, evicted))
    }

    #[test]
    fn the_largest_source_loses_its_unanswered_flow_then_its_longest_idle() {
        let mut now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let mut add = |host, port, answered| {
            now += Duration::from_millis(20);
            let (flow, evicted) = add(&mut table, host, port, Class::Tentative, now).unwrap();
            if answered {
                table.touch(flow, true, now);
            }
            evicted
        };
        assert!(add(1, 1, true).is_empty());
        assert!(add(1, 2, true).is_empty());
        assert!(add(1, 3, false).is_empty());
        assert!(add(11, 4, true).is_empty());
        assert_eq!(add(11, 5, true), [3], "unanswered flow of the largest source");
        assert_eq!(add(12, 6, true), [4], "then its longest idle flow");
    }

    #[test]
    fn a_source_at_its_limits_loses_its_own_flows() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let (first, _) = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        add(&mut table, 1, 2, Class::Connection, now).unwrap();
        assert_eq!(
            add(&mut table, 1, 3, Class::Connection, now).unwrap().1,
            [1],
            "two flows are unanswered"
        );
        assert!(table.get(first).is_none());
        let keys = table.keys();
        keys.into_iter().for_each(|key| table.mark_answered(key));
        assert!(add(&mut table, 1, 4, Class::Connection, now).unwrap().1.is_empty());
        assert_eq!(
            add(&mut table, 1, 5, Class::Tentative, now).unwrap().1,
            [4],
            "the limit is three flows"
        );
        assert!(
            add(&mut table, 2, 6, Class::Tentative, now).unwrap().1.is_empty(),
            "other sources have their own limit"
        );
    }

    #[test]
    fn a_flood_of_unanswered_flows_is_policed_and_answered_flows_are_not() {
        let limits = TableLimits {
            flows: 100_000,
            flows_per_source: 50_000,
            unanswered_per_source: 1000,
            new_flows_per_source: Rate { per_second: 100_000, burst: 100_000 },
            sources: 1000,
            ..LIMITS
        };
        let now = Instant::now();
        let mut table = FlowTable::new(limits, KEY);
        let mut admitted = 0;
        let ip = |host: u8| key(host, 1).inside.ip();
        for _ in 0..20_000 {
            admitted += usize::from(table.admit(ip(1), 0, Origin::Inside, now).is_ok());
        }
        assert!((900..=1032).contains(&admitted), "{admitted} of one source");
        // Two hundred spoofed sources of the same network share the rest of its budget.
        let spoofed = (0..100).flat_map(|_| 20..220u8);
        let admitted =
            spoofed.filter(|host| table.admit(ip(*host), 0, Origin::Inside, now).is_ok()).count();
        assert!(admitted <= 1100, "{admitted} of many sources");
        // Another network has its own budget.
        for port in 1..2000 {
            let key = key(7, port);
            let admission = table.admit(key.inside.ip(), 1, Origin::Inside, now).unwrap();
            let flow = table.insert(key, admission, Class::Tentative, port, now).unwrap();
            table.touch(flow, true, now);
        }
    }

    #[test]
    fn spoofed_neighbours_do_not_lock_out_a_source_with_answered_flows() {
        let limits = TableLimits { unanswered_per_source: 10, flows: 1000, sources: 300, ..LIMITS };
        let now = Instant::now();
        let mut table = FlowTable::new(limits, KEY);
        let answered = |table: &mut FlowTable<u16>, port| {
            let key = key(7, port);
            let admission = table.admit(key.inside.ip(), 0, Origin::Inside, now)?;
            let flow = table.insert(key, admission, Class::Tentative, port, now).unwrap();
            table.touch(flow, true, now);
            Ok::<_, AdmissionError>(())
        };
        answered(&mut table, 1).unwrap();
        for host in 20..220u8 {
            let _ = table.admit(key(host, 1).inside.ip(), 0, Origin::Inside, now);
        }
        assert_eq!(
            table.admit(key(230, 1).inside.ip(), 0, Origin::Inside, now),
            Err(AdmissionError::Unanswered)
        );
        for port in 2..200 {
            answered(&mut table, port).unwrap();
        }
    }

    #[test]
    fn spoofed_sources_are_refused_and_removed_once_their_rate_is_restored() {
        let now = Instant::now();
        let limits = TableLimits { unanswered_per_source: 1000, ..LIMITS };
        let mut table = FlowTable::<u16>::new(limits, KEY);
        let (honest, _) = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        let mut refused = 0;
        for host in 2..=255 {
            let ip = key(host, 1).inside.ip();
            refused += usize::from(table.admit(ip, 0, Origin::Inside, now).is_err());
        }
        assert_eq!(refused, 252, "two sources were free");
        assert!(table.get(honest).is_some());
        let later = now + Duration::from_secs(2);
        assert!(table.admit(key(77, 1).inside.ip(), 0, Origin::Inside, later).is_ok());
    }

    #[test]
    fn clients_of_a_published_port_have_a_separate_limit() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        add(&mut table, 1, 1, Class::Tentative, now).unwrap();
        let ip = key(1, 1).inside.ip();
        for port in 10..12 {
            let admission = table.admit(ip, 0, Origin::Outside, now).unwrap();
            table.insert(key(1, port), admission, Class::Tentative, port, now).unwrap();
        }
        let evicted =
            table.evict_for(ip, Origin::Inside, Class::Tentative).map(|(_, port, _)| port);
        assert_eq!(evicted, None, "the limit of the container itself is not reached");
        let evicted =
            table.evict_for(ip, Origin::Outside, Class::Tentative).map(|(_, port, _)| port);
        assert_eq!(evicted, None, "sessions of a service that does not reply");
        let evicted =
            table.evict_for(ip, Origin::Outside, Class::Connection).map(|(_, port, _)| port);
        assert_eq!(evicted, Some(10), "the longest idle client flow, not a flow of the container");
    }

    #[test]
    fn eviction_for_a_descriptor_skips_sessions_without_one() {
        let now = Instant::now();
        let limits = TableLimits { flows_per_source: 9, unanswered_per_source: 9, ..LIMITS };
        let mut table = FlowTable::new(limits, KEY);
        let ip = key(1, 1).inside.ip();
        for (port, class) in [(10, Class::Tentative), (11, Class::Connection)] {
            let admission = table.admit(ip, 0, Origin::Outside, now).unwrap();
            table.insert(key(1, port), admission, class, port, now).unwrap();
        }
        let later = now + Duration::from_secs(1);
        assert!(table.evict_unanswered(now - Duration::from_secs(1)).is_none(), "too recent");
        assert_eq!(table.evict_unanswered(later).map(|(_, port)| port), Some(11));
        assert!(table.evict_unanswered(later).is_none(), "a session of a published port");
        // Answered connections of clients hold descriptors, too.
        let admission = table.admit(ip, 0, Origin::Outside, now).unwrap();
        let flow = table.insert(key(1, 12), admission, Class::Connection, 12, now).unwrap();
        table.mark_answered(flow);
        assert_eq!(table.evict_idle(later).map(|(_, port)| port), Some(12));
    }

    #[test]
    fn a_source_may_hold_twice_as_much_as_it_leaves_free() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let (one, _) = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        let (same, _) = add(&mut table, 1, 2, Class::Connection, now).unwrap();
        let (other, _) = add(&mut table, 2, 1, Class::Connection, now).unwrap();
        assert_eq!(table.with_allowance(same).unwrap().1, 200);
        table.set_held(one, 120, true);
        assert_eq!(table.with_allowance(same).unwrap().1, 80);
        assert_eq!(table.with_allowance(other).unwrap().1, 120);
        table.set_held(one, 200, true);
        assert_eq!(table.with_allowance(same).unwrap().1, 0);
        assert_eq!(table.with_allowance(other).unwrap().1, 66);
        table.remove(one).unwrap();
        assert_eq!((table.held(), table.with_allowance(same).unwrap().1), (0, 200));
    }

    #[test]
    fn the_largest_holder_loses_its_longest_blocked_connection() {
        let now = Instant::now();
        let mut table = FlowTable::new(LIMITS, KEY);
        let (wide, _) = add(&mut table, 1, 1, Class::Connection, now).unwrap();
        let (first, _) = add(&mut table, 2, 2, Class::Connection, now).unwrap();
        let (second, _) = add(&mut table, 2, 3, Class::Connection, now).unwrap();
        let (small, _) = add(&mut table, 11, 4, Class::Connection, now).unwrap();
        table.set_held(wide, 150, false);
        table.set_held(small, 10, true);
        table.set_held(first, 70, true);
        table.set_held(second, 70, true);
        assert_eq!(table.evict_over_budget(), None, "at the limit");
        table.set_held(first, 75, true);
        assert_eq!(table.evict_over_budget().map(|(_, port)| port), Some(2));
        assert_eq!((table.evict_over_budget(), table.held()), (None, 230));
        table.set_held(second, 70, false);
        table.set_held(small, 90, true);
        assert_eq!(table.evict_over_budget().map(|(_, port)| port), Some(4), "no other is blocked");
    }

    proptest! {
        #[test]
        fn no_limit_is_exceeded_and_every_flow_is_found(
            steps in prop::collection::vec((0u8..6, 1u16..6, 0u8..5), 1..200),
        ) {
            let now = Instant::now();
            let mut table = FlowTable::new(LIMITS, KEY);
            for (host, port, action) in steps {
                let key = key(host, port);
                match (table.find(&key), action) {
                    (Some(flow), 0) => drop(table.remove(flow)),
                    (Some(flow), 1) => table.mark_answered(flow),
                    (Some(flow), 3) => table.set_held(flow, usize::from(port), host % 2 == 0),
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
                    prop_assert!(source.unanswered <= LIMITS.unanswered_per_source);
                    for (list, count) in source.idle.iter().zip([source.unanswered, source.flows - source.unanswered]) {
                        let listed = list.iter(&table.flows, |entry| &entry.links);
                        prop_assert_eq!(listed.count(), count);
                    }
                    let blocked = source.blocked.iter(&table.flows, |entry| &entry.blocked_links);
                    let listed = blocked.filter_map(|key| table.flows.get(key));
                    prop_assert!(listed.into_iter().all(|entry| entry.is_blocked));
                }
                let flows: usize = table.networks.values().map(|network| network.flows).sum();
                prop_assert_eq!(flows, table.len());
                let held: usize = table.flows.iter().map(|(_, entry)| entry.held as usize).sum();
                prop_assert_eq!(held, table.held);
                let held: usize = table.sources.iter().map(|(_, source)| source.held).sum();
                prop_assert_eq!(held, table.held);
            }
        }
    }
}
