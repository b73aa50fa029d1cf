//! Accounting of TCP connections and held bytes per client and port, and the choice of what is
//! evicted at a limit. Pure except for the lock: all loops share one [`ShareTable`].
//!
//! # Theory of operation
//!
//! Connections are limited in total, per port, and by file descriptors. A *client* is an IPv4
//! address or an IPv6 /64. It may take one more connection if [`may_take`] permits it for the free
//! connections, both in total and at the port. A greedy client thus gets two thirds of each, and no
//! running connection has to be reset for others. If several ports are published, a port gets at
//! most four fifths of the total, so that a client with its full share leaves capacity for other
//! ports.
//!
//! If a client may not take more and another client has more than twice as many connections, the
//! connection of that client with the longest idle time is evicted. Otherwise the new connection is
//! refused. If only descriptors are exhausted and the client has at most one connection, the client
//! waits for a descriptor.
//!
//! Bytes have one budget. A half may become wide if [`may_take`] permits it for the rest of the
//! budget ([`ShareTable::take_bytes`]). The bytes of a blocked narrow half are always charged
//! ([`ShareTable::charge_bytes`]). If the sum exceeds the budget, a connection of the client that
//! holds most bytes is evicted ([`ShareTable::over_budget`]).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::port::Refusal;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tidegate_model::{Ranking, may_take};
use tidegate_reactor::Permit;

/// A client at a port ([`Port::id`](crate::port::Port::id)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Holder {
    pub(crate) client: IpAddr,
    pub(crate) port: u64,
}

/// Decision about a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Admitted and counted.
    Admitted,
    /// A limit is reached.
    Refused(Refusal),
    /// A connection of `holder` in loop `at` has to be evicted first, because of `limit`.
    Evict { holder: Holder, at: usize, limit: Refusal },
    /// No descriptor is free, and no client has enough connections to be evicted.
    Wait,
}

/// Capacity for a new connection at one port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capacity {
    /// Maximum connections of the port.
    pub(crate) port_limit: usize,
    /// Further connections that the free descriptors allow.
    pub(crate) descriptors: usize,
    /// Whether other ports are published.
    pub(crate) several_ports: bool,
}

/// Limits over all ports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) connections: usize,
    /// Maximum connections of one client, if lower than its share.
    pub(crate) per_client: Option<usize>,
    /// Maximum bytes held for peers that do not read.
    pub(crate) bytes: usize,
}

/// Current use of the limits by all connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// The client with the most connections and their number, if it is more than one.
    pub(crate) largest: Option<(IpAddr, usize)>,
    /// Number of connections of the client that has most.
    pub(crate) most: usize,
    /// Bytes held for peers that do not read.
    pub(crate) bytes: usize,
    /// The client that holds most bytes, and how many.
    pub(crate) largest_of_bytes: Option<(IpAddr, usize)>,
}

/// The [`ShareTable`] that all loops share.
#[derive(Debug)]
pub(crate) struct Shares(Mutex<ShareTable>);

impl Shares {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Mutex::new(ShareTable::new(limits)))
    }

    /// See [`ShareTable::admit`]. The lock guard is private to this type, so no caller can lock
    /// twice.
    pub(crate) fn admit(&self, holder: Holder, at: usize, capacity: Capacity) -> Verdict {
        self.table().admit(holder, at, capacity)
    }

    /// See [`ShareTable::add`].
    pub(crate) fn add(&self, holder: Holder, at: usize) {
        self.table().add(holder, at);
    }

    /// See [`ShareTable::end`].
    pub(crate) fn end(&self, holder: Holder, at: usize) {
        self.table().end(holder, at);
    }

    /// See [`ShareTable::over_budget`].
    pub(crate) fn over_budget(&self) -> Option<(Holder, usize)> {
        self.table().over_budget()
    }

    /// Returns the current use of the limits.
    pub(crate) fn usage(&self) -> Usage {
        self.table().usage()
    }

    fn table(&self) -> MutexGuard<'_, ShareTable> {
        // A panic between two updates leaves counts that are off by one, which is acceptable.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The entry of a connection in the [`ShareTable`], and its descriptors. Dropping it releases both.
#[derive(Debug)]
pub(crate) struct Reservation {
    shares: Arc<Shares>,
    holder: Holder,
    at: usize,
    /// Bytes charged to the budget.
    bytes: usize,
    _permit: Permit,
}

impl Reservation {
    /// Creates the reservation of a connection of `holder` in loop `at`, which the table has
    /// already counted.
    pub(crate) fn new(shares: Arc<Shares>, holder: Holder, at: usize, permit: Permit) -> Self {
        Self { shares, holder, at, bytes: 0, _permit: permit }
    }

    pub(crate) fn holder(&self) -> Holder {
        self.holder
    }

    /// Takes `more` bytes of the budget if the share of the client permits it.
    pub(crate) fn take(&mut self, more: usize) -> bool {
        let taken = self.shares.table().take_bytes(self.holder, self.at, more);
        self.bytes += if taken { more } else { 0 };
        taken
    }

    /// Changes the charge of one half from `before` to `now` bytes.
    pub(crate) fn charge(&mut self, before: usize, now: usize) {
        if before != now {
            self.shares.table().charge_bytes(self.holder, self.at, before, now);
            self.bytes = self.bytes + now - before;
        }
    }

    /// Assigns the connection to loop `to`. It is not charged any bytes at this point.
    pub(crate) fn hand_over(&mut self, to: usize) {
        if to != self.at {
            self.shares.table().hand_over(self.holder, self.at, to);
            self.at = to;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut table = self.shares.table();
        table.charge_bytes(self.holder, self.at, self.bytes, 0);
        table.end(self.holder, self.at);
    }
}

/// Amount of one resource, connections or bytes, that each client holds.
#[derive(Debug, Default)]
struct Holdings {
    held: usize,
    clients: HashMap<IpAddr, usize>,
    ranking: Ranking<IpAddr>,
}

impl Holdings {
    fn of(&self, client: IpAddr) -> usize {
        self.clients.get(&client).copied().unwrap_or(0)
    }

    /// Changes one part of what `client` holds from `before` to `now`.
    fn change(&mut self, client: IpAddr, before: usize, now: usize) {
        self.held = self.held + now - before;
        let of_client = self.clients.entry(client).or_default();
        let old = std::mem::replace(of_client, *of_client + now - before);
        self.ranking.change(client, old, *of_client);
        if *of_client == 0 {
            self.clients.remove(&client);
        }
    }
}

/// [`Holdings`] with a breakdown by holder and loop.
#[derive(Debug, Default)]
struct HoldingsByLoop {
    all: Holdings,
    loops: BTreeMap<(Holder, usize), usize>,
}

impl HoldingsByLoop {
    fn change(&mut self, holder: Holder, at: usize, before: usize, now: usize) {
        if before != now {
            self.all.change(holder.client, before, now);
            self.change_in_loop(holder, at, before, now);
        }
    }

    fn change_in_loop(&mut self, holder: Holder, at: usize, before: usize, now: usize) {
        let in_loop = self.loops.entry((holder, at)).or_default();
        *in_loop = *in_loop + now - before;
        if *in_loop == 0 {
            self.loops.remove(&(holder, at));
        }
    }

    /// Returns the port and the loop in which `client` holds most.
    fn largest_holding(&self, client: IpAddr) -> Option<(Holder, usize)> {
        let of_client = self.loops.range((Holder { client, port: 0 }, 0)..);
        let of_client = of_client.take_while(|((holder, _), _)| holder.client == client);
        of_client.max_by_key(|(_, held)| **held).map(|(key, _)| *key)
    }
}

#[derive(Debug)]
struct ShareTable {
    limits: Limits,
    connections: HoldingsByLoop,
    /// Connections by port.
    ports: HashMap<u64, Holdings>,
    /// Bytes held for peers that do not read.
    bytes: HoldingsByLoop,
}

impl ShareTable {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            connections: HoldingsByLoop::default(),
            ports: HashMap::new(),
            bytes: HoldingsByLoop::default(),
        }
    }

    /// Decides about a new connection of `holder` that loop `at` accepted, and counts it if
    /// admitted.
    fn admit(&mut self, holder: Holder, at: usize, capacity: Capacity) -> Verdict {
        let verdict = self.judge(holder, at, capacity);
        if verdict == Verdict::Admitted {
            self.add(holder, at);
        }
        verdict
    }

    fn judge(&self, holder: Holder, at: usize, capacity: Capacity) -> Verdict {
        let all = &self.connections.all;
        let client_held = all.of(holder.client);
        let port = self.ports.get(&holder.port);
        let port_held = port.map_or(0, |port| port.held);
        let client_held_at_port = port.map_or(0, |port| port.of(holder.client));
        let within_limit = self.limits.connections.saturating_sub(all.held);
        let free = within_limit.min(capacity.descriptors);
        let port_free = capacity.port_limit.saturating_sub(port_held);

        let evictable = |of: &Holdings, held: usize| {
            let largest = of.ranking.largest();
            largest.filter(|(_, most)| *most > 2 * held + 1).map(|(client, _)| client)
        };
        let largest_at_port = || {
            let client = evictable(port?, client_held_at_port)?;
            Some(Holder { client, ..holder })
        };
        let largest = || Some(self.connections.largest_holding(evictable(all, client_held)?)?.0);

        if self.limits.per_client.is_some_and(|limit| client_held >= limit) {
            return Verdict::Refused(Refusal::ClientLimit);
        }
        let (limit, victim, otherwise) = if free == 0 {
            let otherwise = match (within_limit, client_held) {
                (0, _) => Verdict::Refused(Refusal::TotalLimit),
                (_, 0 | 1) => Verdict::Wait,
                _ => Verdict::Refused(Refusal::ClientLimit),
            };
            (Refusal::TotalLimit, largest(), otherwise)
        } else if !may_take(client_held, free) {
            (Refusal::TotalLimit, largest(), Verdict::Refused(Refusal::ClientLimit))
        } else if port_free > 0 && !may_take(client_held_at_port, port_free) {
            (Refusal::PortLimit, largest_at_port(), Verdict::Refused(Refusal::ClientLimit))
        } else if port_free == 0 || capacity.several_ports && !may_take(port_held / 2, free) {
            (Refusal::PortLimit, largest_at_port(), Verdict::Refused(Refusal::PortLimit))
        } else {
            return Verdict::Admitted;
        };
        victim.and_then(|victim| self.eviction(victim, at, limit)).unwrap_or(otherwise)
    }

    /// Returns the eviction of a connection of `holder`, in loop `at` if the holder has one there.
    fn eviction(&self, holder: Holder, at: usize, limit: Refusal) -> Option<Verdict> {
        let loops = &self.connections.loops;
        let here = loops.contains_key(&(holder, at)).then_some(at);
        let elsewhere =
            || loops.range((holder, 0)..).next().filter(|((other, _), _)| *other == holder);
        let at = here.or_else(|| elsewhere().map(|((_, at), _)| *at))?;
        Some(Verdict::Evict { holder, at, limit })
    }

    /// Counts a connection without a decision, after another one was evicted for it.
    fn add(&mut self, holder: Holder, at: usize) {
        self.connections.change(holder, at, 0, 1);
        self.ports.entry(holder.port).or_default().change(holder.client, 0, 1);
    }

    /// Removes a connection of `holder` in loop `at`.
    fn end(&mut self, holder: Holder, at: usize) {
        if !self.connections.loops.contains_key(&(holder, at)) {
            return;
        }
        self.connections.change(holder, at, 1, 0);
        if let Entry::Occupied(mut port) = self.ports.entry(holder.port) {
            port.get_mut().change(holder.client, 1, 0);
            if port.get().held == 0 {
                port.remove();
            }
        }
    }

    /// Moves a connection of `holder` between loops.
    fn hand_over(&mut self, holder: Holder, from: usize, to: usize) {
        if self.connections.loops.contains_key(&(holder, from)) {
            self.connections.change_in_loop(holder, from, 1, 0);
            self.connections.change_in_loop(holder, to, 0, 1);
        }
    }

    /// Charges `more` bytes to a connection of `holder` in loop `at`, if the share of the client
    /// permits it. Returns whether it did.
    fn take_bytes(&mut self, holder: Holder, at: usize, more: usize) -> bool {
        let free = self.limits.bytes.saturating_sub(self.bytes.all.held);
        let granted = more <= free && may_take(self.bytes.all.of(holder.client), free);
        if granted {
            self.charge_bytes(holder, at, 0, more);
        }
        granted
    }

    /// Changes the charge of a connection of `holder` in loop `at` from `before` to `now` bytes.
    fn charge_bytes(&mut self, holder: Holder, at: usize, before: usize, now: usize) {
        self.bytes.change(holder, at, before, now);
    }

    /// If the budget is exceeded, returns the holder and the loop of the connection to evict.
    fn over_budget(&self) -> Option<(Holder, usize)> {
        let Holdings { held, ranking, .. } = &self.bytes.all;
        let (client, _) = ranking.largest().filter(|_| *held > self.limits.bytes)?;
        self.bytes.largest_holding(client)
    }

    fn usage(&self) -> Usage {
        let (all, bytes) = (&self.connections.all, &self.bytes.all);
        let largest = all.ranking.largest();
        Usage {
            largest,
            most: largest.map_or(usize::from(all.held > 0), |(_, held)| held),
            bytes: bytes.held,
            largest_of_bytes: bytes.ranking.largest(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holder(client: u8, port: u64) -> Holder {
        Holder { client: [192, 0, 2, client].into(), port }
    }

    fn table(connections: usize) -> ShareTable {
        ShareTable::new(Limits { connections, per_client: None, bytes: 1000 })
    }

    const CAPACITY: Capacity =
        Capacity { port_limit: 1000, descriptors: 1000, several_ports: true };

    /// Returns how many of `asked` connections are admitted for `holder`.
    fn admitted(table: &mut ShareTable, holder: Holder, asked: usize, capacity: Capacity) -> usize {
        (0..asked).filter(|_| table.admit(holder, 0, capacity) == Verdict::Admitted).count()
    }

    #[test]
    fn one_client_gets_two_thirds_and_others_are_served_at_any_port() {
        let mut table = table(9);
        assert_eq!(admitted(&mut table, holder(1, 1), 9, CAPACITY), 6);
        assert_eq!(table.admit(holder(1, 2), 0, CAPACITY), Verdict::Refused(Refusal::ClientLimit));
        let alone = Capacity { several_ports: false, ..CAPACITY };
        assert_eq!(admitted(&mut table, holder(2, 1), 1, alone), 1);
        assert_eq!(admitted(&mut table, holder(3, 2), 1, CAPACITY), 1);
    }

    #[test]
    fn one_client_gets_two_thirds_of_the_limit_of_a_port() {
        let mut table = table(1000);
        let capacity = Capacity { port_limit: 3, ..CAPACITY };
        assert_eq!(admitted(&mut table, holder(1, 1), 3, capacity), 2);
        assert_eq!(admitted(&mut table, holder(2, 1), 3, capacity), 1);
        let eviction = Verdict::Evict { holder: holder(1, 1), at: 0, limit: Refusal::PortLimit };
        assert_eq!(table.admit(holder(3, 1), 0, capacity), eviction);
        table.end(holder(1, 1), 0);
        assert_eq!(table.admit(holder(3, 1), 0, capacity), Verdict::Admitted);
        assert_eq!(
            table.admit(holder(4, 1), 0, capacity),
            Verdict::Refused(Refusal::PortLimit),
            "no client has more than twice as many"
        );
    }

    #[test]
    fn clients_of_one_port_leave_a_fifth_to_other_ports() {
        let mut table = table(10);
        let clients = (1..=10).map(|client| admitted(&mut table, holder(client, 1), 1, CAPACITY));
        assert_eq!(clients.sum::<usize>(), 8);
        assert_eq!(admitted(&mut table, holder(1, 2), 1, CAPACITY), 1);
        let alone = Capacity { several_ports: false, ..CAPACITY };
        assert_eq!(admitted(&mut table, holder(9, 1), 1, alone), 1);
    }

    #[test]
    fn without_descriptors_the_largest_client_is_evicted_and_equal_ones_wait() {
        let mut table = table(1000);
        admitted(&mut table, holder(1, 1), 2, CAPACITY);
        admitted(&mut table, holder(1, 2), 3, CAPACITY);
        assert_eq!(table.connections.all.ranking.largest(), Some((holder(1, 1).client, 5)));
        let short = Capacity { descriptors: 0, ..CAPACITY };
        let eviction = Verdict::Evict { holder: holder(1, 2), at: 0, limit: Refusal::TotalLimit };
        assert_eq!(table.admit(holder(2, 1), 1, short), eviction);
        assert_eq!(table.admit(holder(1, 1), 0, short), Verdict::Refused(Refusal::ClientLimit));
        for _ in 0..3 {
            table.end(holder(1, 2), 0);
        }
        table.end(holder(1, 1), 0);
        assert_eq!(table.admit(holder(2, 1), 0, short), Verdict::Wait);
    }

    #[test]
    fn the_client_limit_applies_below_the_share() {
        let mut table =
            ShareTable::new(Limits { connections: 100, per_client: Some(2), bytes: 1000 });
        assert_eq!(admitted(&mut table, holder(1, 1), 5, CAPACITY), 2);
    }

    #[test]
    fn a_connection_that_was_handed_over_is_evicted_in_its_new_loop() {
        let mut table = table(3);
        admitted(&mut table, holder(1, 1), 2, CAPACITY);
        table.hand_over(holder(1, 1), 0, 3);
        admitted(&mut table, holder(2, 1), 1, Capacity { several_ports: false, ..CAPACITY });
        let at = |verdict| match verdict {
            Verdict::Evict { at, .. } => Some(at),
            _ => None,
        };
        assert_eq!(at(table.admit(holder(3, 1), 0, CAPACITY)), Some(0));
        assert_eq!(at(table.admit(holder(3, 1), 3, CAPACITY)), Some(3));
    }

    #[test]
    fn one_client_gets_two_thirds_of_the_bytes_and_the_largest_is_evicted_above_the_budget() {
        let mut table = table(9);
        let greedy = holder(1, 1);
        let taken = (0..20).filter(|_| table.take_bytes(greedy, 1, 100)).count();
        assert_eq!(taken, 7, "600 of 1000 held is less than twice the free 400");
        assert!(table.take_bytes(holder(2, 1), 0, 100));
        table.charge_bytes(holder(2, 2), 0, 0, 200);
        assert_eq!(table.over_budget(), None, "exactly the budget of 1000 is held");
        table.charge_bytes(greedy, 0, 0, 1);
        assert_eq!(table.over_budget(), Some((greedy, 1)));
        table.charge_bytes(greedy, 1, 700, 0);
        assert_eq!((table.over_budget(), table.bytes.all.held), (None, 301));
        table.charge_bytes(greedy, 0, 1, 0);
        assert_eq!(table.bytes.all.ranking.largest(), Some((holder(2, 1).client, 300)));
    }

    proptest! {
        /// No limit is exceeded, and a client with a single connection never loses it.
        #[test]
        fn limits_hold_and_single_connections_are_never_evicted(
            steps in prop::collection::vec((0_u8..5, 0_u64..3, 0_usize..2, any::<bool>()), 0..200),
        ) {
            let mut table = table(12);
            let mut held: Vec<(Holder, usize)> = Vec::new();
            for (client, port, at, ends) in steps {
                let holder = holder(client, port);
                if ends {
                    if let Some(index) = held.iter().position(|held| *held == (holder, at)) {
                        held.swap_remove(index);
                        table.end(holder, at);
                    }
                    continue;
                }
                let capacity = Capacity { port_limit: 6, descriptors: 10 - held.len().min(10), several_ports: true };
                match table.admit(holder, at, capacity) {
                    Verdict::Admitted => held.push((holder, at)),
                    Verdict::Evict { holder: victim, at, .. } => {
                        let of = |client| held.iter().filter(|(held, _)| held.client == client).count();
                        prop_assert!(of(victim.client) > 1);
                        let index = held.iter().position(|held| *held == (victim, at));
                        prop_assert!(index.is_some());
                        held.swap_remove(index.unwrap());
                        table.end(victim, at);
                    }
                    Verdict::Refused(_) | Verdict::Wait => {}
                }
                prop_assert!(held.len() <= 10);
                prop_assert_eq!(table.connections.all.held, held.len());
                for port in 0..3 {
                    prop_assert!(held.iter().filter(|(held, _)| held.port == port).count() <= 6);
                }
            }
            for (holder, at) in held {
                table.end(holder, at);
            }
            prop_assert!(table.connections.all.clients.is_empty() && table.ports.is_empty());
            prop_assert!(table.connections.loops.is_empty());
            prop_assert_eq!(table.connections.all.ranking.largest(), None);
        }
    }
}
