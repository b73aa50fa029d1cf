//! In which order questions are forwarded, and how many of each endpoint in a second. Pure.
//!
//! # Theory of operation
//!
//! ```text
//!            ┌ partition ┬ endpoint: queue, tokens
//! next() ──► │           └ endpoint: queue, tokens      one question of one endpoint of one
//!            └ partition ─ endpoint: queue, tokens      partition after the other
//! ```
//!
//! Each endpoint has a queue, and a token bucket that bounds how many of its questions are
//! forwarded in a second. Partitions take turns, and within a partition its endpoints: deficit
//! round robin (Shreedhar and Varghese 1995) where every question costs the same, so that there is
//! no deficit to carry over. However many questions one endpoint has, a question of another one
//! waits for one question of each endpoint that has tokens.
//!
//! The token bucket is the virtual scheduling form of GCRA (ITU-T I.371): `due` is when the next
//! question would be due at exactly the rate, and a question may go while `due` is less than a
//! burst ahead. An endpoint without tokens is *parked* until it has one.
//!
//! ```text
//! idle ──push──► ready ──next──► ready, parked or idle
//!   └────push──► parked ──time──► ready
//! ```

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::partition::{Partition, Source};
use crate::zone::Asker;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Questions in a second that are forwarded for one endpoint, and how many may go at once after a
/// second of silence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate(u32);

impl Rate {
    /// `per_second`, one at least.
    pub(crate) fn new(per_second: u32) -> Self {
        Self(per_second.max(1))
    }

    pub(crate) fn per_second(self) -> u32 {
        self.0
    }

    fn interval(self) -> Duration {
        Duration::from_secs(1) / self.0
    }

    /// How far ahead `due` may be.
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
    /// Waits for a token.
    Parked,
}

/// What one endpoint has queued.
#[derive(Debug)]
struct Lane<T> {
    /// The oldest first, with the time that it was queued at.
    queue: VecDeque<(Instant, T)>,
    due: Instant,
    state: State,
}

/// What is next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn<T> {
    pub(crate) source: Source,
    pub(crate) item: T,
    /// When it was queued.
    at: Instant,
}

#[derive(Debug)]
struct Group<T> {
    lanes: BTreeMap<Asker, Lane<T>>,
    /// Those that are ready.
    ring: VecDeque<Asker>,
}

impl<T> Default for Group<T> {
    fn default() -> Self {
        Self { lanes: BTreeMap::new(), ring: VecDeque::new() }
    }
}

/// All queues. The caller bounds how much is in them.
#[derive(Debug)]
pub(crate) struct Scheduler<T> {
    rate: Rate,
    groups: BTreeMap<Partition, Group<T>>,
    /// Partitions that have an endpoint that is ready, each once.
    ring: VecDeque<Partition>,
    parked: BTreeSet<(Instant, Source)>,
    queued: usize,
}

impl<T> Scheduler<T> {
    pub(crate) fn new(rate: Rate) -> Self {
        Self {
            rate,
            groups: BTreeMap::new(),
            ring: VecDeque::new(),
            parked: BTreeSet::new(),
            queued: 0,
        }
    }

    pub(crate) fn rate(&self) -> Rate {
        self.rate
    }

    /// How many are queued.
    pub(crate) fn queued(&self) -> usize {
        self.queued
    }

    /// Nothing is queued and every bucket is full: nothing is remembered.
    pub(crate) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Queues `item` behind the others of `source`.
    pub(crate) fn push(&mut self, source: &Source, item: T, now: Instant) {
        let group = self.groups.entry(source.partition.clone()).or_default();
        let lane = group.lanes.entry(source.asker.clone()).or_insert_with(|| Lane {
            queue: VecDeque::new(),
            due: now,
            state: State::Idle,
        });
        lane.queue.push_back((now, item));
        self.queued += 1;
        self.place(source, now);
    }

    /// The oldest that `source` has queued.
    pub(crate) fn front(&self, source: &Source) -> Option<&T> {
        let lane = self.groups.get(&source.partition)?.lanes.get(&source.asker)?;
        lane.queue.front().map(|(_, item)| item)
    }

    /// Takes the oldest that `source` has queued out of the queue.
    pub(crate) fn pop_front(&mut self, source: &Source) -> Option<T> {
        // It stays in its ring, and is idle when its turn comes.
        let lane = self.groups.get_mut(&source.partition)?.lanes.get_mut(&source.asker)?;
        let (_, item) = lane.queue.pop_front()?;
        self.queued -= 1;
        Some(item)
    }

    /// Takes the next one out of the queues, of a source that `allows` allows, and a token for it.
    pub(crate) fn next(
        &mut self,
        now: Instant,
        mut allows: impl FnMut(&Source) -> bool,
    ) -> Option<Turn<T>> {
        self.unpark(now);
        for _ in 0..self.ring.len() {
            let partition = self.ring.pop_front()?;
            let taken = self.next_of(&partition, now, &mut allows);
            if self.groups.get(&partition).is_some_and(|group| !group.ring.is_empty()) {
                self.ring.push_back(partition);
            }
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    /// The next one of `partition`, which is not in the ring.
    fn next_of(
        &mut self,
        partition: &Partition,
        now: Instant,
        allows: &mut impl FnMut(&Source) -> bool,
    ) -> Option<Turn<T>> {
        let interval = self.rate.interval();
        let group = self.groups.get_mut(partition)?;
        for _ in 0..group.ring.len() {
            let asker = group.ring.pop_front()?;
            let Some(lane) = group.lanes.get_mut(&asker) else { continue };
            if lane.queue.is_empty() {
                lane.state = State::Idle;
                continue;
            }
            let source = Source { partition: partition.clone(), asker };
            if !allows(&source) {
                group.ring.push_back(source.asker);
                continue;
            }
            let (at, item) = lane.queue.pop_front()?;
            self.queued -= 1;
            lane.due = lane.due.max(now) + interval;
            lane.state = State::Idle;
            let place = if lane.queue.is_empty() { None } else { Some(self.rate.place(lane, now)) };
            match place {
                Some(None) => group.ring.push_back(source.asker.clone()),
                Some(Some(until)) => drop(self.parked.insert((until, source.clone()))),
                None => {}
            }
            return Some(Turn { source, item, at });
        }
        None
    }

    /// Gives what [`Self::next`] has returned back to the front of its queue, with its token.
    pub(crate) fn put_back(&mut self, turn: Turn<T>, now: Instant) {
        let Turn { source, item, at } = turn;
        self.refund(&source, now);
        if let Some(lane) = self.lane(&source) {
            lane.queue.push_front((at, item));
            self.queued += 1;
            self.place(&source, now);
        }
    }

    /// Gives back the token of what [`Self::next`] has returned: it was not forwarded.
    pub(crate) fn refund(&mut self, source: &Source, now: Instant) {
        let rate = self.rate;
        let Some(lane) = self.lane(source) else { return };
        let parked_until = lane.due.checked_sub(rate.tolerance());
        lane.due = lane.due.checked_sub(rate.interval()).unwrap_or(lane.due);
        if lane.state == State::Parked {
            lane.state = State::Idle;
            let is_queued = !lane.queue.is_empty();
            if let Some(until) = parked_until {
                self.parked.remove(&(until, source.clone()));
            }
            if is_queued {
                self.place(source, now);
            }
        }
    }

    /// Takes out what has been queued for `patience`, and forgets endpoints whose bucket is full.
    pub(crate) fn expire(&mut self, now: Instant, patience: Duration) -> Vec<(Source, T)> {
        let mut expired = Vec::new();
        for (partition, group) in &mut self.groups {
            for (asker, lane) in &mut group.lanes {
                let is_late = |at: &Instant| now.saturating_duration_since(*at) >= patience;
                while lane.queue.front().is_some_and(|(at, _)| is_late(at)) {
                    let Some((_, item)) = lane.queue.pop_front() else { break };
                    self.queued -= 1;
                    expired.push((
                        Source { partition: partition.clone(), asker: asker.clone() },
                        item,
                    ));
                }
            }
            // One that is ready or parked is in a ring or a set.
            group.lanes.retain(|_, lane| lane.state != State::Idle || lane.due > now);
        }
        self.groups.retain(|_, group| !group.lanes.is_empty());
        expired
    }

    /// When the next parked endpoint has a token.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        self.parked.first().map(|(at, _)| *at)
    }

    fn lane(&mut self, source: &Source) -> Option<&mut Lane<T>> {
        self.groups.get_mut(&source.partition)?.lanes.get_mut(&source.asker)
    }

    /// Puts the lane of `source`, which has something queued, where it belongs.
    fn place(&mut self, source: &Source, now: Instant) {
        let Some(group) = self.groups.get_mut(&source.partition) else { return };
        let Some(lane) =
            group.lanes.get_mut(&source.asker).filter(|lane| lane.state == State::Idle)
        else {
            return;
        };
        match self.rate.place(lane, now) {
            Some(at) => drop(self.parked.insert((at, source.clone()))),
            None => {
                if group.ring.is_empty() && !self.ring.contains(&source.partition) {
                    self.ring.push_back(source.partition.clone());
                }
                group.ring.push_back(source.asker.clone());
            }
        }
    }

    /// Makes those ready that have a token now.
    fn unpark(&mut self, now: Instant) {
        while self.parked.first().is_some_and(|(at, _)| *at <= now) {
            let Some((_, source)) = self.parked.pop_first() else { return };
            let Some(lane) = self.lane(&source) else { continue };
            lane.state = State::Idle;
            if !lane.queue.is_empty() {
                self.place(&source, now);
            }
        }
    }
}

impl Rate {
    /// Marks an idle lane as ready or parked; until when it is parked.
    fn place<T>(self, lane: &mut Lane<T>, now: Instant) -> Option<Instant> {
        let at = lane.due.checked_sub(self.tolerance()).filter(|at| *at > now);
        lane.state = if at.is_some() { State::Parked } else { State::Ready };
        at
    }
}

#[cfg(test)]
mod tests;
