//! Order in which queries are forwarded, and rate limit per endpoint. Pure.
//!
//! # Theory of operation
//!
//! ```text
//!            ┌ partition ┬ endpoint: queue, tokens
//! next() ──► │           └ endpoint: queue, tokens      round robin over partitions, and within
//!            └ partition ─ endpoint: queue, tokens      a partition over its endpoints
//! ```
//!
//! Each endpoint has a queue, and a token bucket that limits how many of its queries are forwarded
//! per second. Partitions, and the endpoints of a partition, are served by deficit round robin
//! (Shreedhar and Varghese 1995). Costs are equal, so no deficit is carried over. A query waits for
//! at most one query of each other endpoint with tokens, however many queries another endpoint has
//! queued.
//!
//! The token bucket is the virtual scheduling form of GCRA (ITU-T I.371): `due` is the time of the
//! next query at exactly the rate, and a query may be forwarded while `due` is less than a burst
//! ahead. An endpoint without tokens is *parked* until it has one.
//!
//! ```text
//! idle ──push──► ready ──next──► ready, parked or idle
//!   └────push──► parked ──time──► ready
//! ```

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::client_id::ClientId;
use crate::partition::{Partition, Source};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Queries per second that are forwarded for one endpoint. It is also the size of a burst after a
/// second without queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate(u32);

impl Rate {
    /// `per_second`, at least 1.
    pub(crate) fn new(per_second: u32) -> Self {
        Self(per_second.max(1))
    }

    pub(crate) fn per_second(self) -> u32 {
        self.0
    }

    fn interval(self) -> Duration {
        Duration::from_secs(1) / self.0
    }

    /// Maximum lead of `due`.
    fn tolerance(self) -> Duration {
        self.interval() * (self.0 - 1)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing is queued.
    Idle,
    /// In the ring of its partition.
    Ready,
    /// Waiting for a token.
    Parked,
}

/// The queue of one endpoint.
#[derive(Debug)]
struct EndpointQueue<T> {
    /// Oldest first, with the enqueue time.
    queue: VecDeque<(Instant, T)>,
    due: Instant,
    state: State,
}

/// A selected item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn<T> {
    pub(crate) source: Source,
    pub(crate) item: T,
    /// The enqueue time.
    at: Instant,
}

#[derive(Debug)]
struct PartitionQueue<T> {
    endpoints: BTreeMap<ClientId, EndpointQueue<T>>,
    /// Ready endpoints.
    ring: VecDeque<ClientId>,
}

impl<T> Default for PartitionQueue<T> {
    fn default() -> Self {
        Self { endpoints: BTreeMap::new(), ring: VecDeque::new() }
    }
}

/// The queues of all endpoints. The caller limits the number of items.
#[derive(Debug)]
pub(crate) struct Scheduler<T> {
    rate: Rate,
    partitions: BTreeMap<Partition, PartitionQueue<T>>,
    /// Partitions with a ready endpoint, each once.
    ring: VecDeque<Partition>,
    parked: BTreeSet<(Instant, Source)>,
    queued: usize,
}

impl<T> Scheduler<T> {
    pub(crate) fn new(rate: Rate) -> Self {
        Self {
            rate,
            partitions: BTreeMap::new(),
            ring: VecDeque::new(),
            parked: BTreeSet::new(),
            queued: 0,
        }
    }

    pub(crate) fn rate(&self) -> Rate {
        self.rate
    }

    /// Number of queued items.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Whether nothing is queued and every bucket is full, so that no state is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.partitions.is_empty()
    }

    /// Appends `item` to the queue of `source`.
    pub(crate) fn push(&mut self, source: &Source, item: T, now: Instant) {
        let group = self.partitions.entry(source.partition.clone()).or_default();
        let endpoint = group.endpoints.entry(source.client_id.clone()).or_insert_with(|| {
            EndpointQueue { queue: VecDeque::new(), due: now, state: State::Idle }
        });
        endpoint.queue.push_back((now, item));
        self.queued += 1;
        self.place(source, now);
    }

    /// The oldest queued item of `source`.
    pub(crate) fn front(&self, source: &Source) -> Option<&T> {
        let endpoint = self.partitions.get(&source.partition)?.endpoints.get(&source.client_id)?;
        endpoint.queue.front().map(|(_, item)| item)
    }

    /// Removes the oldest queued item of `source`.
    pub(crate) fn pop_front(&mut self, source: &Source) -> Option<T> {
        // The endpoint stays in the ring and becomes idle when it is selected.
        let endpoint =
            self.partitions.get_mut(&source.partition)?.endpoints.get_mut(&source.client_id)?;
        let (_, item) = endpoint.queue.pop_front()?;
        self.queued -= 1;
        Some(item)
    }

    /// Selects the next item of a source for which `allows` is true, and takes a token for it.
    pub(crate) fn next(
        &mut self,
        now: Instant,
        mut allows: impl FnMut(&Source) -> bool,
    ) -> Option<Turn<T>> {
        self.unpark(now);
        for _ in 0..self.ring.len() {
            let partition = self.ring.pop_front()?;
            let taken = self.next_of(&partition, now, &mut allows);
            if self.partitions.get(&partition).is_some_and(|group| !group.ring.is_empty()) {
                self.ring.push_back(partition);
            }
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    /// The next item of `partition`, which the caller has removed from the ring.
    fn next_of(
        &mut self,
        partition: &Partition,
        now: Instant,
        allows: &mut impl FnMut(&Source) -> bool,
    ) -> Option<Turn<T>> {
        let interval = self.rate.interval();
        let group = self.partitions.get_mut(partition)?;
        for _ in 0..group.ring.len() {
            let client_id = group.ring.pop_front()?;
            let Some(endpoint) = group.endpoints.get_mut(&client_id) else { continue };
            if endpoint.queue.is_empty() {
                endpoint.state = State::Idle;
                continue;
            }
            let source = Source { partition: partition.clone(), client_id };
            if !allows(&source) {
                group.ring.push_back(source.client_id);
                continue;
            }
            let (at, item) = endpoint.queue.pop_front()?;
            self.queued -= 1;
            endpoint.due = endpoint.due.max(now) + interval;
            endpoint.state = State::Idle;
            let place =
                if endpoint.queue.is_empty() { None } else { Some(self.rate.place(endpoint, now)) };
            match place {
                Some(None) => group.ring.push_back(source.client_id.clone()),
                Some(Some(until)) => drop(self.parked.insert((until, source.clone()))),
                None => {}
            }
            return Some(Turn { source, item, at });
        }
        None
    }

    /// Returns an item of [`Self::next`] to the front of its queue, with its token.
    pub(crate) fn put_back(&mut self, turn: Turn<T>, now: Instant) {
        let Turn { source, item, at } = turn;
        self.refund(&source, now);
        if let Some(endpoint) = self.endpoint(&source) {
            endpoint.queue.push_front((at, item));
            self.queued += 1;
            self.place(&source, now);
        }
    }

    /// Returns the token of an item of [`Self::next`] that was not forwarded.
    pub(crate) fn refund(&mut self, source: &Source, now: Instant) {
        let rate = self.rate;
        let Some(endpoint) = self.endpoint(source) else { return };
        let parked_until = endpoint.due.checked_sub(rate.tolerance());
        endpoint.due = endpoint.due.checked_sub(rate.interval()).unwrap_or(endpoint.due);
        if endpoint.state == State::Parked {
            endpoint.state = State::Idle;
            let is_queued = !endpoint.queue.is_empty();
            if let Some(until) = parked_until {
                self.parked.remove(&(until, source.clone()));
            }
            if is_queued {
                self.place(source, now);
            }
        }
    }

    /// Removes items that were queued for `max_wait`, and the state of idle endpoints with a full
    /// bucket.
    pub(crate) fn expire(&mut self, now: Instant, max_wait: Duration) -> Vec<(Source, T)> {
        let mut expired = Vec::new();
        for (partition, group) in &mut self.partitions {
            for (client_id, endpoint) in &mut group.endpoints {
                let is_late = |at: &Instant| now.saturating_duration_since(*at) >= max_wait;
                while endpoint.queue.front().is_some_and(|(at, _)| is_late(at)) {
                    let Some((_, item)) = endpoint.queue.pop_front() else { break };
                    self.queued -= 1;
                    expired.push((
                        Source { partition: partition.clone(), client_id: client_id.clone() },
                        item,
                    ));
                }
            }
            // A ready or parked endpoint is referenced by a ring or by `parked`.
            group
                .endpoints
                .retain(|_, endpoint| endpoint.state != State::Idle || endpoint.due > now);
        }
        self.partitions.retain(|_, group| !group.endpoints.is_empty());
        expired
    }

    /// When the next parked endpoint gets a token.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        self.parked.first().map(|(at, _)| *at)
    }

    fn endpoint(&mut self, source: &Source) -> Option<&mut EndpointQueue<T>> {
        self.partitions.get_mut(&source.partition)?.endpoints.get_mut(&source.client_id)
    }

    /// Makes the endpoint of `source`, which has queued items, ready or parked.
    fn place(&mut self, source: &Source, now: Instant) {
        let Some(group) = self.partitions.get_mut(&source.partition) else { return };
        let Some(endpoint) = group
            .endpoints
            .get_mut(&source.client_id)
            .filter(|endpoint| endpoint.state == State::Idle)
        else {
            return;
        };
        match self.rate.place(endpoint, now) {
            Some(at) => drop(self.parked.insert((at, source.clone()))),
            None => {
                if group.ring.is_empty() && !self.ring.contains(&source.partition) {
                    self.ring.push_back(source.partition.clone());
                }
                group.ring.push_back(source.client_id.clone());
            }
        }
    }

    /// Makes parked endpoints with a token ready.
    fn unpark(&mut self, now: Instant) {
        while self.parked.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, source)) = self.parked.pop_first() else { return };
            let Some(endpoint) = self.endpoint(&source) else { continue };
            endpoint.state = State::Idle;
            if !endpoint.queue.is_empty() {
                self.place(&source, now);
            }
        }
    }
}

impl Rate {
    /// Marks an idle endpoint as ready or parked. Returns the end of parking.
    fn place<T>(self, endpoint: &mut EndpointQueue<T>, now: Instant) -> Option<Instant> {
        let at = endpoint.due.checked_sub(self.tolerance()).filter(|at| *at > now);
        endpoint.state = if at.is_some() { State::Parked } else { State::Ready };
        at
    }
}

#[cfg(test)]
mod tests;
