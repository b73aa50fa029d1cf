//! Pending queries to upstream servers, and the clients that wait for them. Pure.
//!
//! # Theory of operation
//!
//! ```text
//! ask ──► queued ──next_query──► in flight ──complete──► all waiters get the response
//!            │                       │
//!            └───────► evicted ◄─────┘   evicted waiters get SERVFAIL
//! ```
//!
//! Equal queries of one partition are one entry with several waiters. An entry starts when the
//! [`Scheduler`] selects any of its clients, so that a client does not wait in the queue of a
//! greedy one that sent the same query. The entry is then *in flight* and charged to the selected
//! client, its owner.
//!
//! Waiters and entries in flight are bounded ([`Holdings`]). An endpoint at its own limit of
//! waiters loses its oldest, whose client has most likely given up. Dropping the oldest keeps the
//! queueing delay short; refusing the newest would make every client wait for the whole queue. At
//! the limit of all endpoints or of a partition, the largest holder loses its oldest to one that
//! holds less. Evicted waiters get SERVFAIL, because a client without a response waits for seconds.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::cache::Key;
use crate::client_id::ClientId;
use crate::metrics::Overload;
use crate::partition::{Holdings, Source};
use crate::scheduler::{Rate, Scheduler};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Maximum time in the queue. Together with the time in flight it is below the timeout of clients.
const QUEUE_TIME: Duration = Duration::from_secs(2);
/// Entries of the largest holder that are examined for one without other waiters.
const MAX_CANDIDATES: usize = 16;
/// Interval at which [`Pending::expire`] examines the queues.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(100);

/// Limits of [`Pending`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of entries in flight.
    pub(crate) in_flight: usize,
    /// Maximum number of waiters.
    pub(crate) waiters: usize,
    /// Maximum number of waiters of one endpoint.
    pub(crate) waiters_per_endpoint: usize,
    /// Rate of queries that are started for one endpoint.
    pub(crate) rate: Rate,
}

/// The result of [`Pending::ask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// A new entry.
    New,
    /// Added to an existing entry.
    Joined,
    /// At a limit, and no endpoint holds more than the client.
    Refused,
}

/// An evicted waiter, which gets SERVFAIL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Evicted<W> {
    pub(crate) waiter: W,
    pub(crate) client_id: ClientId,
    pub(crate) reason: Overload,
}

/// An entry to forward now.
#[derive(Debug)]
pub(crate) struct NextQuery<'a, R> {
    pub(crate) key: Key,
    pub(crate) owner: ClientId,
    pub(crate) route: &'a R,
}

/// The table of pending queries. `W` is a waiter, `R` the route of a query, and `H` the handle of
/// its task, which ends when the handle is dropped.
pub(crate) struct Pending<W, R, H> {
    queries: HashMap<Key, PendingQuery<W, R, H>>,
    scheduler: Scheduler<Key>,
    in_flight: Holdings,
    waiters: Holdings,
    /// Entries in flight by owner, oldest first.
    owned: BTreeMap<(Source, u64), Key>,
    waiters_per_endpoint: usize,
    next: u64,
    expired: Option<Instant>,
}

struct PendingQuery<W, R, H> {
    /// In order of arrival.
    waiters: VecDeque<(ClientId, W)>,
    /// Number of waiters by client, without zeros.
    clients: BTreeMap<ClientId, usize>,
    route: R,
    in_flight: Option<InFlight<H>>,
}

struct InFlight<H> {
    owner: Source,
    number: u64,
    _handle: Option<H>,
}

impl<W, R, H> Pending<W, R, H> {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            queries: HashMap::new(),
            scheduler: Scheduler::new(limits.rate),
            in_flight: Holdings::new(limits.in_flight),
            waiters: Holdings::new(limits.waiters),
            owned: BTreeMap::new(),
            waiters_per_endpoint: limits.waiters_per_endpoint.max(1),
            next: 0,
            expired: None,
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.taken()
    }

    pub(crate) fn waiters(&self) -> usize {
        self.waiters.taken()
    }

    pub(crate) fn queued(&self) -> usize {
        self.scheduler.queued()
    }

    /// Highest number of waiters of one endpoint.
    pub(crate) fn max_waiters(&self) -> usize {
        self.waiters.largest()
    }

    pub(crate) fn rate(&self) -> Rate {
        self.scheduler.rate()
    }

    /// Adds a waiter of `client_id` for `key`. `waiter` is called if it is admitted, `route` for a
    /// new entry. Evicted waiters are added to `evicted`.
    pub(crate) fn ask(
        &mut self,
        key: &Key,
        client_id: ClientId,
        now: Instant,
        waiter: impl FnOnce() -> W,
        route: impl FnOnce() -> R,
        evicted: &mut Vec<Evicted<W>>,
    ) -> Admission {
        let source = Source { partition: key.partition.clone(), client_id };
        let made_room = if self.waiters.held(&source) >= self.waiters_per_endpoint {
            self.evict_oldest(&source, Overload::Share, evicted)
        } else {
            self.waiters.allows(&source.partition)
                || self
                    .waiters
                    .eviction_victim(&source)
                    .is_some_and(|largest| self.evict_oldest(&largest, Overload::Waiters, evicted))
        };
        if !made_room {
            return Admission::Refused;
        }
        self.waiters.take(&source);
        let is_new = !self.queries.contains_key(key);
        let query = self.queries.entry(key.clone()).or_insert_with(|| PendingQuery {
            waiters: VecDeque::new(),
            clients: BTreeMap::new(),
            route: route(),
            in_flight: None,
        });
        query.waiters.push_back((source.client_id.clone(), waiter()));
        let asks = query.clients.entry(source.client_id.clone()).or_default();
        *asks += 1;
        if *asks == 1 && query.in_flight.is_none() {
            self.scheduler.push(&source, key.clone(), now);
        }
        if is_new { Admission::New } else { Admission::Joined }
    }

    /// Returns the next query to forward, which then counts as in flight. The caller passes the
    /// handle of its task to [`Self::set_handle`].
    pub(crate) fn next_query(
        &mut self,
        now: Instant,
        evicted: &mut Vec<Evicted<W>>,
    ) -> Option<NextQuery<'_, R>> {
        let (key, source) = loop {
            let in_flight = &self.in_flight;
            let may = |source: &Source| {
                in_flight.allows(&source.partition) || in_flight.eviction_victim(source).is_some()
            };
            let turn = self.scheduler.next(now, may)?;
            let is_waiting = |query: &PendingQuery<W, R, H>| {
                query.in_flight.is_none() && query.clients.contains_key(&turn.source.client_id)
            };
            if !self.queries.get(&turn.item).is_some_and(is_waiting) {
                // Already answered, in flight for another client, or evicted.
                self.scheduler.refund(&turn.source, now);
                continue;
            }
            if !self.make_room(&turn.source, evicted) {
                self.scheduler.put_back(turn, now);
                return None;
            }
            break (turn.item, turn.source);
        };
        self.next += 1;
        let number = self.next;
        self.in_flight.take(&source);
        self.owned.insert((source.clone(), number), key.clone());
        let query = self.queries.get_mut(&key)?;
        query.in_flight = Some(InFlight { owner: source.clone(), number, _handle: None });
        Some(NextQuery { key, owner: source.client_id, route: &query.route })
    }

    /// Stores the handle of the task of `key`.
    pub(crate) fn set_handle(&mut self, key: &Key, handle: H) {
        if let Some(in_flight) =
            self.queries.get_mut(key).and_then(|query| query.in_flight.as_mut())
        {
            in_flight._handle = Some(handle);
        }
    }

    /// Removes the entry of `key` and returns its waiters.
    pub(crate) fn complete(&mut self, key: &Key) -> VecDeque<(ClientId, W)> {
        let Some(query) = self.queries.remove(key) else { return VecDeque::new() };
        self.end_in_flight(query.in_flight);
        for (client_id, _) in &query.waiters {
            self.waiters.release(&Source {
                partition: key.partition.clone(),
                client_id: client_id.clone(),
            });
        }
        query.waiters
    }

    /// Evicts waiters that have been queued for [`QUEUE_TIME`]. Can be called at any time; examines
    /// the queues at most once per [`EXPIRY_INTERVAL`].
    pub(crate) fn expire(&mut self, now: Instant, evicted: &mut Vec<Evicted<W>>) {
        if self.expired.is_some_and(|last| now.saturating_duration_since(last) < EXPIRY_INTERVAL) {
            return;
        }
        self.expired = Some(now);
        for (source, key) in self.scheduler.expire(now, QUEUE_TIME) {
            while self.queries.get(&key).is_some_and(|query| query.in_flight.is_none())
                && self.evict_waiter(&key, &source.client_id, Overload::Queue, evicted)
            {
            }
        }
    }

    /// When the next endpoint without tokens gets one, for [`Self::next_query`].
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        self.scheduler.wakes_at()
    }

    /// Whether no state of endpoints is left.
    pub(crate) fn is_idle(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// Evicts the oldest waiter of `source`, preferably a queued one. Returns whether there was
    /// one.
    fn evict_oldest(
        &mut self,
        source: &Source,
        reason: Overload,
        evicted: &mut Vec<Evicted<W>>,
    ) -> bool {
        while let Some(key) = self.scheduler.front(source).cloned() {
            let is_queued = self.queries.get(&key).is_some_and(|query| query.in_flight.is_none());
            if is_queued && self.evict_waiter(&key, &source.client_id, reason, evicted) {
                let query = self.queries.get(&key);
                if query.is_none_or(|query| !query.clients.contains_key(&source.client_id)) {
                    self.scheduler.pop_front(source);
                }
                return true;
            }
            // A stale queue item: the entry was started for another client.
            self.scheduler.pop_front(source);
        }
        let oldest = self.owned.range((source.clone(), 0)..).next();
        let oldest = oldest.filter(|((owner, _), _)| owner == source).map(|(_, key)| key.clone());
        oldest.is_some_and(|key| self.evict_waiter(&key, &source.client_id, reason, evicted))
    }

    /// Evicts until `source` may have one more entry in flight. Returns whether that succeeded.
    fn make_room(&mut self, source: &Source, evicted: &mut Vec<Evicted<W>>) -> bool {
        for _ in 0..MAX_CANDIDATES {
            if self.in_flight.allows(&source.partition) {
                return true;
            }
            let Some(largest) = self.in_flight.eviction_victim(source) else { return false };
            let oldest =
                self.owned.range((largest.clone(), 0)..).next().map(|(_, key)| key.clone());
            let Some(key) = oldest else { return false };
            // When the last waiter of its owner is evicted, the entry ends or moves to another
            // client.
            while self.queries.get(&key).is_some_and(|query| {
                query.in_flight.as_ref().is_some_and(|in_flight| in_flight.owner == largest)
            }) {
                if !self.evict_waiter(&key, &largest.client_id, Overload::InFlight, evicted) {
                    return false;
                }
            }
            // The partition may still exceed its share, but one entry has ended for the new one.
            if !self.queries.contains_key(&key) {
                return true;
            }
        }
        false
    }

    /// Evicts the oldest waiter of `client_id` for `key`. Returns whether there was one.
    fn evict_waiter(
        &mut self,
        key: &Key,
        client_id: &ClientId,
        reason: Overload,
        evicted: &mut Vec<Evicted<W>>,
    ) -> bool {
        let Some(query) = self.queries.get_mut(key) else { return false };
        let Some(at) = query.waiters.iter().position(|(one, _)| one == client_id) else {
            return false;
        };
        let Some((client_id, waiter)) = query.waiters.remove(at) else { return false };
        let source = Source { partition: key.partition.clone(), client_id };
        self.waiters.release(&source);
        let mut is_last = false;
        if let Some(asks) = query.clients.get_mut(&source.client_id) {
            *asks -= 1;
            is_last = *asks == 0;
        }
        if is_last {
            query.clients.remove(&source.client_id);
            match query.waiters.front().map(|(client_id, _)| client_id.clone()) {
                None => {
                    let query = self.queries.remove(key);
                    self.end_in_flight(query.and_then(|query| query.in_flight));
                }
                Some(next) => {
                    let next = Source { partition: key.partition.clone(), client_id: next };
                    if let Some(in_flight) =
                        query.in_flight.as_mut().filter(|in_flight| in_flight.owner == source)
                    {
                        self.in_flight.release(&source);
                        self.in_flight.take(&next);
                        self.owned.remove(&(source.clone(), in_flight.number));
                        self.owned.insert((next.clone(), in_flight.number), key.clone());
                        in_flight.owner = next;
                    }
                }
            }
        }
        evicted.push(Evicted { waiter, client_id: source.client_id, reason });
        true
    }

    fn end_in_flight(&mut self, in_flight: Option<InFlight<H>>) {
        if let Some(in_flight) = in_flight {
            self.in_flight.release(&in_flight.owner);
            self.owned.remove(&(in_flight.owner, in_flight.number));
        }
    }
}

#[cfg(test)]
mod tests;
