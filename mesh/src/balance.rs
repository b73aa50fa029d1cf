//! Load balancing: which endpoint of a service gets the next connection. Pure.
//!
//! | method | next endpoint |
//! |---|---|
//! | [`Method::RoundRobin`] | in turn, by weight: interleaved, so an endpoint with weight 3 of 5 does not get three connections in a row |
//! | [`Method::LeastConnections`] | the one with the fewest open connections for its weight; among equals, in turn |
//! | [`Method::Source`] | by the address of the client, through a Maglev table |
//!
//! ```text
//! targets ─ready?─► ─ejected?─► ─on this host?─► ─tried?─► method ─► target
//!                        │             │
//!                        │             └ only if asked for, and if one is left
//!                        └ unless too few would be left
//! ```
//!
//! An endpoint that has failed [`FAILURES`] times in succession is ejected for a time, which
//! doubles with each ejection. Failures of many endpoints are more likely a fault of this host or
//! of the network than of the endpoints, so ejections are ignored while endpoints with less than
//! [`PANIC_SHARE`] of the weight would be left. Ejections are local and end by themselves; they
//! remove nothing from the cluster state.
//!
//! Maglev (Eisenbud et al., NSDI 2016, section 3.4) gives all hosts the same choice for a client
//! without communication, and moves few other clients if an endpoint is added or removed. An
//! ejected endpoint keeps its entries in the table, so that its clients return to it; meanwhile
//! they are spread over the others by the next entries.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tidegate_model::registry::fnv1a;

/// Failures in succession after which an endpoint is ejected.
pub const FAILURES: u32 = 3;

/// Time of the first ejection.
pub const EJECTION: Duration = Duration::from_secs(1);

/// Longest time of an ejection.
pub const LONGEST_EJECTION: Duration = Duration::from_secs(60);

/// Share of the weight, as numerator and denominator, below which ejections are ignored.
pub const PANIC_SHARE: (u64, u64) = (1, 2);

/// Largest weight.
pub const MAX_WEIGHT: u16 = 256;

/// Entries of a Maglev table: a prime, and some hundred times the largest number of endpoints.
const TABLE: usize = 65_537;

/// How a target is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// In turn, by weight.
    #[default]
    RoundRobin,
    /// The fewest open connections for the weight.
    LeastConnections,
    /// By the address of the client.
    Source,
}

/// An endpoint of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its share, from 1 to [`MAX_WEIGHT`].
    pub weight: u16,
    /// It accepts new connections, and its host is heard.
    pub is_ready: bool,
    /// It is on this host.
    pub is_local: bool,
}

/// Identifies an endpoint for its whole life: a name that is used again is another endpoint.
pub type TargetId = u64;

/// Chooses targets of one service.
#[derive(Debug)]
pub struct Balancer {
    method: Method,
    prefers_local: bool,
    targets: BTreeMap<TargetId, Known>,
    /// For [`Method::Source`]: the targets that are ready, by entry.
    table: Vec<TargetId>,
}

#[derive(Debug)]
struct Known {
    target: Target,
    /// Open connections.
    open: u32,
    /// What the target is owed in its turns (the smooth weighted round robin of nginx).
    credit: i64,
    /// Failures since the last success.
    failures: u32,
    /// Ejections since the last success.
    ejections: u32,
    ejected_until: Option<Instant>,
}

impl Known {
    fn new(target: Target) -> Self {
        let (open, credit, failures, ejections, ejected_until) = Default::default();
        Self { target, open, credit, failures, ejections, ejected_until }
    }

    fn is_ejected(&self, now: Instant) -> bool {
        self.ejected_until.is_some_and(|until| now < until)
    }

    fn weight(&self) -> u64 {
        u64::from(self.target.weight.max(1))
    }
}

impl Balancer {
    /// Creates a balancer without targets. With `prefers_local`, targets on this host are used
    /// while one of them is left.
    #[must_use]
    pub fn new(method: Method, prefers_local: bool) -> Self {
        Self { method, prefers_local, targets: BTreeMap::new(), table: Vec::new() }
    }

    /// Replaces the targets. Those that stay keep their connections and failures.
    pub fn set(&mut self, targets: BTreeMap<TargetId, Target>) {
        let of_table = |known: &Self| -> Vec<(TargetId, u16)> {
            let ready = known.targets.iter().filter(|(_, known)| known.target.is_ready);
            ready.map(|(id, known)| (*id, known.target.weight)).collect()
        };
        let before = of_table(self);
        self.targets.retain(|id, _| targets.contains_key(id));
        for (id, target) in targets {
            match self.targets.get_mut(&id) {
                Some(known) => known.target = target,
                None => drop(self.targets.insert(id, Known::new(target))),
            }
        }
        let after = of_table(self);
        if self.method == Method::Source && before != after {
            self.table = table(&after);
        }
    }

    /// Chooses the target for a connection of `client` at `now`, other than those in `tried`.
    /// `None` if there is none.
    pub fn choose(&mut self, client: IpAddr, tried: &[TargetId], now: Instant) -> Option<TargetId> {
        let candidates = self.candidates(tried, now);
        match self.method {
            Method::RoundRobin => self.in_turn(&candidates),
            Method::LeastConnections => {
                let of = |id: &TargetId| &self.targets[id];
                // Fractions of the weights, without rounding.
                let order = |a: &TargetId, b: &TargetId| {
                    let (a, b) = (of(a), of(b));
                    (u64::from(a.open) * b.weight()).cmp(&(u64::from(b.open) * a.weight()))
                };
                let least = candidates.iter().copied().min_by(order)?;
                let equal = candidates.iter().copied().filter(|id| order(id, &least).is_eq());
                self.in_turn(&equal.collect::<Vec<_>>())
            }
            Method::Source => {
                let start = (hash(client) % TABLE as u64) as usize;
                let entries = self.table.iter().cycle().skip(start).take(self.table.len());
                entries.copied().find(|id| candidates.binary_search(id).is_ok())
            }
        }
    }

    /// The targets that may be chosen, in order.
    fn candidates(&self, tried: &[TargetId], now: Instant) -> Vec<TargetId> {
        let ready = || self.targets.iter().filter(|(_, known)| known.target.is_ready);
        let weight = |ejected: bool| -> u64 {
            let left = ready().filter(|(_, known)| ejected || !known.is_ejected(now));
            left.map(|(_, known)| known.weight()).sum()
        };
        let panics = weight(false) * PANIC_SHARE.1 < weight(true) * PANIC_SHARE.0;
        let untried = |(id, _): &(&TargetId, &Known)| !tried.contains(id);
        let usable = || {
            let usable = ready().filter(|(_, known)| panics || !known.is_ejected(now));
            usable.filter(untried)
        };
        let has_local = self.prefers_local && usable().any(|(_, known)| known.target.is_local);
        let left = usable().filter(|(_, known)| !has_local || known.target.is_local);
        let left: Vec<_> = left.map(|(id, _)| *id).collect();
        if left.is_empty() {
            // All that are not ejected were tried: better an ejected one than none.
            return ready().filter(untried).map(|(id, _)| *id).collect();
        }
        left
    }

    fn in_turn(&mut self, candidates: &[TargetId]) -> Option<TargetId> {
        let (mut total, mut next) = (0, None::<(i64, TargetId)>);
        for id in candidates {
            let Some(known) = self.targets.get_mut(id) else { continue };
            let weight = known.weight() as i64;
            known.credit += weight;
            total += weight;
            // The first of equals.
            if next.is_none_or(|(credit, _)| known.credit > credit) {
                next = Some((known.credit, *id));
            }
        }
        let (_, id) = next?;
        self.targets.get_mut(&id)?.credit -= total;
        Some(id)
    }

    /// Records that a connection to `id` begins.
    pub fn opened(&mut self, id: TargetId) {
        if let Some(known) = self.targets.get_mut(&id) {
            known.open += 1;
        }
    }

    /// Records that a connection to `id` has ended.
    pub fn closed(&mut self, id: TargetId) {
        if let Some(known) = self.targets.get_mut(&id) {
            known.open = known.open.saturating_sub(1);
        }
    }

    /// Records that `id` has accepted a connection.
    pub fn succeeded(&mut self, id: TargetId) {
        if let Some(known) = self.targets.get_mut(&id) {
            (known.failures, known.ejections, known.ejected_until) = (0, 0, None);
        }
    }

    /// Records that `id` has refused a connection, or not answered in time, at `now`. Returns the
    /// time for which it is ejected if this failure ejects it.
    pub fn failed(&mut self, id: TargetId, now: Instant) -> Option<Duration> {
        let known = self.targets.get_mut(&id)?;
        if known.is_ejected(now) {
            return None;
        }
        known.failures = known.failures.saturating_add(1);
        // After an ejection, the first failure ejects again.
        if known.failures < FAILURES && known.ejections == 0 {
            return None;
        }
        let time = EJECTION.saturating_mul(1 << known.ejections.min(16)).min(LONGEST_EJECTION);
        known.ejections += 1;
        known.ejected_until = Some(now + time);
        Some(time)
    }

    /// The targets that are ejected at `now`.
    pub fn ejected(&self, now: Instant) -> impl Iterator<Item = TargetId> {
        self.targets.iter().filter(move |(_, known)| known.is_ejected(now)).map(|(id, _)| *id)
    }

    /// Number of open connections to `id`.
    #[must_use]
    pub fn open(&self, id: TargetId) -> u32 {
        self.targets.get(&id).map_or(0, |known| known.open)
    }
}

/// A hash without visible structure: FNV-1a, with the finalizer of SplitMix64 (Steele et al.,
/// OOPSLA 2014). Not cryptographic: a client with many addresses can choose its endpoint.
fn mix(bytes: &[u8]) -> u64 {
    let mut hash = fnv1a(bytes);
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

fn hash(client: IpAddr) -> u64 {
    match client {
        IpAddr::V4(ip) => mix(&ip.octets()),
        IpAddr::V6(ip) => mix(&ip.octets()),
    }
}

/// Builds a Maglev table: the targets take turns, as often as their weight, and each takes the next
/// free entry of its own permutation.
fn table(targets: &[(TargetId, u16)]) -> Vec<TargetId> {
    if targets.is_empty() {
        return Vec::new();
    }
    struct Turn {
        id: TargetId,
        weight: u64,
        /// Weight that was not used for a turn yet.
        saved: u64,
        next: usize,
        skip: usize,
    }
    let heaviest = targets.iter().map(|(_, weight)| u64::from((*weight).max(1))).max().unwrap_or(1);
    let of = |seed: u8, id: TargetId| mix(&[&[seed][..], &id.to_be_bytes()].concat());
    let mut turns: Vec<Turn> = targets
        .iter()
        .map(|&(id, weight)| Turn {
            id,
            weight: u64::from(weight.max(1)),
            saved: 0,
            next: (of(0, id) % TABLE as u64) as usize,
            skip: (of(1, id) % (TABLE as u64 - 1)) as usize + 1,
        })
        .collect();
    let mut entries: Vec<Option<TargetId>> = vec![None; TABLE];
    let mut left = TABLE;
    while left > 0 {
        for turn in &mut turns {
            turn.saved += turn.weight;
            if turn.saved < heaviest || left == 0 {
                continue;
            }
            turn.saved -= heaviest;
            while entries[turn.next].is_some() {
                turn.next = (turn.next + turn.skip) % TABLE;
            }
            entries[turn.next] = Some(turn.id);
            left -= 1;
        }
    }
    entries.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const READY: Target = Target { weight: 1, is_ready: true, is_local: false };

    fn client(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    fn with(method: Method, targets: impl IntoIterator<Item = (TargetId, Target)>) -> Balancer {
        let mut balancer = Balancer::new(method, false);
        balancer.set(targets.into_iter().collect());
        balancer
    }

    fn shares(balancer: &mut Balancer, picks: u32, now: Instant) -> BTreeMap<TargetId, u32> {
        let mut shares = BTreeMap::new();
        for number in 0..picks {
            *shares.entry(balancer.choose(client(number), &[], now).unwrap()).or_default() += 1;
        }
        shares
    }

    fn target() -> impl Strategy<Value = Target> {
        (1_u16..=20, prop::bool::weighted(0.8), any::<bool>())
            .prop_map(|(weight, is_ready, is_local)| Target { weight, is_ready, is_local })
    }

    fn method() -> impl Strategy<Value = Method> {
        prop_oneof![Just(Method::RoundRobin), Just(Method::LeastConnections), Just(Method::Source)]
    }

    proptest! {
        /// Whatever has happened: a target that is ready and was not tried is chosen if there is
        /// one, and no other.
        #[test]
        fn only_ready_and_untried_targets_are_chosen(
            method in method(),
            prefers_local in any::<bool>(),
            targets in prop::collection::btree_map(0_u64..12, target(), 0..8),
            next in prop::collection::btree_map(0_u64..12, target(), 0..8),
            events in prop::collection::vec((0_u64..12, 0_u8..4, 0_u64..3_000), 0..60),
            tried in prop::collection::vec(0_u64..12, 0..6),
        ) {
            let mut balancer = Balancer::new(method, prefers_local);
            balancer.set(targets);
            let mut now = Instant::now();
            for (number, (id, event, pause)) in events.into_iter().enumerate() {
                now += Duration::from_millis(pause);
                match event {
                    0 => balancer.opened(id),
                    1 => balancer.closed(id),
                    2 => balancer.succeeded(id),
                    _ => drop(balancer.failed(id, now)),
                }
                balancer.choose(client(number as u32), &[], now);
            }
            balancer.set(next.clone());
            let usable: BTreeSet<TargetId> = next
                .iter()
                .filter(|(id, target)| target.is_ready && !tried.contains(id))
                .map(|(id, _)| *id)
                .collect();
            let chosen = balancer.choose(client(1), &tried, now);
            prop_assert_eq!(chosen.is_some(), !usable.is_empty());
            prop_assert!(chosen.is_none_or(|id| usable.contains(&id)));
        }

        /// In each period of as many connections as the sum of the weights, each target gets as
        /// many as its weight.
        #[test]
        fn turns_follow_the_weights(weights in prop::collection::vec(1_u16..=20, 1..9)) {
            let targets = (0..).zip(&weights).map(|(id, &weight)| (id, Target { weight, ..READY }));
            let mut balancer = with(Method::RoundRobin, targets);
            let total: u32 = weights.iter().map(|weight| u32::from(*weight)).sum();
            for _ in 0..3 {
                let shares = shares(&mut balancer, total, Instant::now());
                for (id, weight) in weights.iter().enumerate() {
                    prop_assert_eq!(shares[&(id as u64)], u32::from(*weight));
                }
            }
        }

        /// The choice has no more connections for its weight than any other candidate.
        #[test]
        fn the_least_loaded_target_is_chosen(
            targets in prop::collection::btree_map(0_u64..12, (1_u16..=256, 0_u32..300), 1..8),
        ) {
            let mut balancer = with(
                Method::LeastConnections,
                targets.iter().map(|(id, (weight, _))| (*id, Target { weight: *weight, ..READY })),
            );
            for (id, (_, open)) in &targets {
                (0..*open).for_each(|_| balancer.opened(*id));
            }
            let (weight, open) = targets[&balancer.choose(client(1), &[], Instant::now()).unwrap()];
            for (other, more) in targets.values() {
                prop_assert!(u64::from(open) * u64::from(*other) <= u64::from(*more) * u64::from(weight));
            }
        }
    }

    #[test]
    fn an_endpoint_that_fails_is_ejected_for_longer_each_time() {
        let mut balancer = with(Method::RoundRobin, (0..4).map(|id| (id, READY)));
        let mut now = Instant::now();
        assert_eq!((1..FAILURES).find_map(|_| balancer.failed(2, now)), None);
        balancer.succeeded(2);
        assert_eq!((1..FAILURES).find_map(|_| balancer.failed(2, now)), None, "in succession");
        for time in [1, 2, 4, 8, 16, 32, 60, 60] {
            let time = Duration::from_secs(time);
            assert_eq!(balancer.failed(2, now), Some(time));
            assert_eq!(balancer.failed(2, now), None, "it is ejected already");
            assert!(!shares(&mut balancer, 100, now).contains_key(&2));
            assert!(balancer.ejected(now).eq([2]));
            now += time;
            assert_eq!(shares(&mut balancer, 100, now)[&2], 25, "it is tried again");
        }
        balancer.succeeded(2);
        assert_eq!(balancer.failed(2, now), None);
    }

    #[test]
    fn ejections_are_ignored_while_most_endpoints_fail() {
        let mut balancer = with(Method::RoundRobin, (0..4).map(|id| (id, READY)));
        let now = Instant::now();
        let fail =
            |balancer: &mut Balancer, id| (0..FAILURES).find_map(|_| balancer.failed(id, now));
        fail(&mut balancer, 0);
        fail(&mut balancer, 1);
        assert_eq!(shares(&mut balancer, 100, now), BTreeMap::from([(2, 50), (3, 50)]));
        fail(&mut balancer, 2);
        assert_eq!(shares(&mut balancer, 100, now).len(), 4, "a quarter is left");
        // Also if what is left was tried.
        balancer.succeeded(2);
        assert!(balancer.choose(client(1), &[2, 3], now).is_some_and(|id| id < 2));
    }

    #[test]
    fn endpoints_on_this_host_are_preferred_while_one_is_left() {
        let mut balancer = Balancer::new(Method::RoundRobin, true);
        let target = |id| (id, Target { is_local: id < 2, ..READY });
        balancer.set((0..6).map(target).collect());
        let now = Instant::now();
        assert_eq!(shares(&mut balancer, 100, now), BTreeMap::from([(0, 50), (1, 50)]));
        assert_eq!(balancer.choose(client(1), &[0], now), Some(1));
        assert!(balancer.choose(client(1), &[0, 1], now).is_some_and(|id| id >= 2));
    }

    #[test]
    fn sources_keep_their_endpoint_and_few_others_move() {
        const CLIENTS: u32 = 100_000;
        let ids = || (0..10).map(|number| number * 7_919);
        let choices = |balancer: &mut Balancer| -> Vec<TargetId> {
            let now = Instant::now();
            (0..CLIENTS).map(|number| balancer.choose(client(number), &[], now).unwrap()).collect()
        };
        let mut balancer = with(Method::Source, ids().map(|id| (id, READY)));
        let mut entries = BTreeMap::new();
        for id in &balancer.table {
            *entries.entry(*id).or_insert(0) += 1;
        }
        let (most, least) = (entries.values().max().unwrap(), entries.values().min().unwrap());
        assert!(most - least <= 1, "{entries:?}");
        let before = choices(&mut balancer);
        let gone = 3 * 7_919;
        balancer.set(ids().filter(|id| *id != gone).map(|id| (id, READY)).collect());
        let after = choices(&mut balancer);
        let moved =
            before.iter().zip(&after).filter(|(old, new)| **old != gone && old != new).count();
        assert!(moved < CLIENTS as usize / 100, "{moved} of {CLIENTS}");
        // An endpoint that returns has its clients again.
        balancer.set(ids().map(|id| (id, READY)).collect());
        assert_eq!(choices(&mut balancer), before);
        // One that is ejected moves no others.
        let now = Instant::now();
        assert!((0..FAILURES).any(|_| balancer.failed(gone, now).is_some()));
        let mut rest = BTreeMap::new();
        for (number, old) in (0..).zip(&before) {
            let new = balancer.choose(client(number), &[], now).unwrap();
            match *old == gone {
                true => *rest.entry(new).or_insert(0) += 1,
                false => assert_eq!(new, *old),
            }
        }
        assert_eq!(rest.len(), 9, "its clients are spread: {rest:?}");
    }

    #[test]
    fn table_entries_follow_the_weights() {
        let entries = table(&[(1, 1), (2, 2), (3, 5)]);
        assert_eq!(entries.len(), TABLE);
        for (id, share) in [(1, 0.125), (2, 0.25), (3, 0.625)] {
            let count = entries.iter().filter(|entry| **entry == id).count() as f64;
            assert!((count / TABLE as f64 - share).abs() < 0.001, "{id}: {count}");
        }
    }
}
