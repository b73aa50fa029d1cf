//! Questions that wait for an answer of another server, and who waits for them. Pure.
//!
//! # Theory of operation
//!
//! ```text
//! ask ──► queued ──launch──► in flight ──land──► all waiters are answered
//!            │                   │
//!            └──────► yielded ◄──┘   some waiters get SERVFAIL
//! ```
//!
//! Equal questions of one partition are one, however many ask; each asker waits by itself. A queued
//! question has its turn when that of any of its askers comes ([`Scheduler`]), so that an endpoint
//! does not wait in the queue of a greedy one that has asked the same. Then it is in *flight*, and
//! counts as its owner's, whose turn it was.
//!
//! Waiters and flights are bounded ([`Holdings`]). An endpoint that has as many waiters as one may
//! have loses its own oldest, which is the one whose client is most likely to have given up; the
//! queue stays short in time that way, where refusing the newest would make everybody wait for all
//! of it. At a limit of all, or of a partition, the largest holder loses its oldest to one that
//! holds less. What yields is answered (SERVFAIL): a client that hears nothing waits for seconds.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::cache::Key;
use crate::metrics::Overload;
use crate::partition::{Holdings, Source};
use crate::scheduler::{Rate, Scheduler};
use crate::zone::Asker;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// How long a question waits for its turn. With the time of a flight it stays below what clients
/// wait in all.
const QUEUE_TIME: Duration = Duration::from_secs(2);
/// Flights of the largest holder that are looked at for one that nobody else waits for.
const LOOKED_AT: usize = 16;
/// How often [`Pending::expire`] looks at all queues.
const LOOK: Duration = Duration::from_millis(100);

/// How much there may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) flights: usize,
    pub(crate) waiters: usize,
    /// The same of one endpoint.
    pub(crate) waiters_of_one: usize,
    pub(crate) rate: Rate,
}

/// What became of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Nobody had asked it.
    New,
    /// It was asked already.
    Joined,
    /// There are too many, and nobody has more than the asker.
    Refused,
}

/// A waiter whose question failed: it gets SERVFAIL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Yielded<W> {
    pub(crate) waiter: W,
    pub(crate) asker: Asker,
    pub(crate) reason: Overload,
}

/// A question that is to be forwarded now.
#[derive(Debug)]
pub(crate) struct Launch<'a, R> {
    pub(crate) key: Key,
    pub(crate) owner: Asker,
    pub(crate) route: &'a R,
}

/// `W` waits, `R` says how to forward, and `H` is a running flight, which ends when it is dropped.
pub(crate) struct Pending<W, R, H> {
    questions: HashMap<Key, Question<W, R, H>>,
    scheduler: Scheduler<Key>,
    flights: Holdings,
    waiters: Holdings,
    /// Flights by owner, the oldest first.
    owned: BTreeMap<(Source, u64), Key>,
    waiters_of_one: usize,
    next: u64,
    expired: Option<Instant>,
}

struct Question<W, R, H> {
    /// In the order in which they came.
    waiters: VecDeque<(Asker, W)>,
    /// How many of each; none has none.
    askers: BTreeMap<Asker, usize>,
    route: R,
    flight: Option<Flight<H>>,
}

struct Flight<H> {
    owner: Source,
    number: u64,
    _handle: Option<H>,
}

impl<W, R, H> Pending<W, R, H> {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            questions: HashMap::new(),
            scheduler: Scheduler::new(limits.rate),
            flights: Holdings::new(limits.flights),
            waiters: Holdings::new(limits.waiters),
            owned: BTreeMap::new(),
            waiters_of_one: limits.waiters_of_one.max(1),
            next: 0,
            expired: None,
        }
    }

    pub(crate) fn flights(&self) -> usize {
        self.flights.taken()
    }

    pub(crate) fn waiters(&self) -> usize {
        self.waiters.taken()
    }

    pub(crate) fn queued(&self) -> usize {
        self.scheduler.queued()
    }

    /// Waiters of the endpoint that has most.
    pub(crate) fn most_waiters(&self) -> usize {
        self.waiters.most()
    }

    pub(crate) fn rate(&self) -> Rate {
        self.scheduler.rate()
    }

    /// `asker` asks `key`. `waiter` is made if it waits, `route` if nobody has asked that. Who
    /// yields is added to `yielded`.
    pub(crate) fn ask(
        &mut self,
        key: &Key,
        asker: Asker,
        now: Instant,
        waiter: impl FnOnce() -> W,
        route: impl FnOnce() -> R,
        yielded: &mut Vec<Yielded<W>>,
    ) -> Asked {
        let source = Source { partition: key.partition.clone(), asker };
        let made_room = if self.waiters.held(&source) >= self.waiters_of_one {
            self.yield_oldest(&source, Overload::Share, yielded)
        } else {
            self.waiters.allows(&source.partition)
                || self
                    .waiters
                    .yields_to(&source)
                    .is_some_and(|largest| self.yield_oldest(&largest, Overload::Waiters, yielded))
        };
        if !made_room {
            return Asked::Refused;
        }
        self.waiters.take(&source);
        let is_new = !self.questions.contains_key(key);
        let question = self.questions.entry(key.clone()).or_insert_with(|| Question {
            waiters: VecDeque::new(),
            askers: BTreeMap::new(),
            route: route(),
            flight: None,
        });
        question.waiters.push_back((source.asker.clone(), waiter()));
        let asks = question.askers.entry(source.asker.clone()).or_default();
        *asks += 1;
        if *asks == 1 && question.flight.is_none() {
            self.scheduler.push(&source, key.clone(), now);
        }
        if is_new { Asked::New } else { Asked::Joined }
    }

    /// The next question to forward. It counts as in flight; the caller reports what runs for it
    /// with [`Self::launched`].
    pub(crate) fn launch(
        &mut self,
        now: Instant,
        yielded: &mut Vec<Yielded<W>>,
    ) -> Option<Launch<'_, R>> {
        let (key, source) = loop {
            let flights = &self.flights;
            let may = |source: &Source| {
                flights.allows(&source.partition) || flights.yields_to(source).is_some()
            };
            let turn = self.scheduler.next(now, may)?;
            let is_waiting = |question: &Question<W, R, H>| {
                question.flight.is_none() && question.askers.contains_key(&turn.source.asker)
            };
            if !self.questions.get(&turn.item).is_some_and(is_waiting) {
                // Answered or in flight already, for another asker, or given up.
                self.scheduler.refund(&turn.source, now);
                continue;
            }
            if !self.make_room(&turn.source, yielded) {
                self.scheduler.put_back(turn, now);
                return None;
            }
            break (turn.item, turn.source);
        };
        self.next += 1;
        let number = self.next;
        self.flights.take(&source);
        self.owned.insert((source.clone(), number), key.clone());
        let question = self.questions.get_mut(&key)?;
        question.flight = Some(Flight { owner: source.clone(), number, _handle: None });
        Some(Launch { key, owner: source.asker, route: &question.route })
    }

    /// `handle` is the flight of `key`.
    pub(crate) fn launched(&mut self, key: &Key, handle: H) {
        if let Some(flight) =
            self.questions.get_mut(key).and_then(|question| question.flight.as_mut())
        {
            flight._handle = Some(handle);
        }
    }

    /// `key` is answered: who waits for it.
    pub(crate) fn land(&mut self, key: &Key) -> VecDeque<(Asker, W)> {
        let Some(question) = self.questions.remove(key) else { return VecDeque::new() };
        self.end_flight(question.flight);
        for (asker, _) in &question.waiters {
            self.waiters
                .give_back(&Source { partition: key.partition.clone(), asker: asker.clone() });
        }
        question.waiters
    }

    /// Those whose turn does not come in time yield. To be called at any time while anything is
    /// remembered; it looks ten times a second.
    pub(crate) fn expire(&mut self, now: Instant, yielded: &mut Vec<Yielded<W>>) {
        if self.expired.is_some_and(|last| now.saturating_duration_since(last) < LOOK) {
            return;
        }
        self.expired = Some(now);
        for (source, key) in self.scheduler.expire(now, QUEUE_TIME) {
            while self.questions.get(&key).is_some_and(|question| question.flight.is_none())
                && self.yield_waiter(&key, &source.asker, Overload::Queue, yielded)
            {}
        }
    }

    /// When to call [`Self::launch`] again for want of tokens.
    pub(crate) fn wakes_at(&self) -> Option<Instant> {
        self.scheduler.wakes_at()
    }

    /// Nothing is remembered of endpoints.
    pub(crate) fn is_idle(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// The oldest waiter of `source` yields: one that is queued, if there is one.
    fn yield_oldest(
        &mut self,
        source: &Source,
        reason: Overload,
        yielded: &mut Vec<Yielded<W>>,
    ) -> bool {
        while let Some(key) = self.scheduler.front(source).cloned() {
            let is_queued =
                self.questions.get(&key).is_some_and(|question| question.flight.is_none());
            if is_queued && self.yield_waiter(&key, &source.asker, reason, yielded) {
                let question = self.questions.get(&key);
                if question.is_none_or(|question| !question.askers.contains_key(&source.asker)) {
                    self.scheduler.pop_front(source);
                }
                return true;
            }
            // Left from a question that another asker's turn has launched.
            self.scheduler.pop_front(source);
        }
        let oldest = self.owned.range((source.clone(), 0)..).next();
        let oldest = oldest.filter(|((owner, _), _)| owner == source).map(|(_, key)| key.clone());
        oldest.is_some_and(|key| self.yield_waiter(&key, &source.asker, reason, yielded))
    }

    /// Sees to it that `source` may have one more flight.
    fn make_room(&mut self, source: &Source, yielded: &mut Vec<Yielded<W>>) -> bool {
        for _ in 0..LOOKED_AT {
            if self.flights.allows(&source.partition) {
                return true;
            }
            let Some(largest) = self.flights.yields_to(source) else { return false };
            let oldest =
                self.owned.range((largest.clone(), 0)..).next().map(|(_, key)| key.clone());
            let Some(key) = oldest else { return false };
            // With its last waiter of its own it ends, or is another asker's.
            while self.questions.get(&key).is_some_and(|question| {
                question.flight.as_ref().is_some_and(|flight| flight.owner == largest)
            }) {
                if !self.yield_waiter(&key, &largest.asker, Overload::Flights, yielded) {
                    return false;
                }
            }
            // A partition at its share may still be above it; one flight for another one it is.
            if !self.questions.contains_key(&key) {
                return true;
            }
        }
        false
    }

    /// The oldest waiter of `asker` for `key` yields. Whether there was one.
    fn yield_waiter(
        &mut self,
        key: &Key,
        asker: &Asker,
        reason: Overload,
        yielded: &mut Vec<Yielded<W>>,
    ) -> bool {
        let Some(question) = self.questions.get_mut(key) else { return false };
        let Some(at) = question.waiters.iter().position(|(one, _)| one == asker) else {
            return false;
        };
        let Some((asker, waiter)) = question.waiters.remove(at) else { return false };
        let source = Source { partition: key.partition.clone(), asker };
        self.waiters.give_back(&source);
        let mut is_last = false;
        if let Some(asks) = question.askers.get_mut(&source.asker) {
            *asks -= 1;
            is_last = *asks == 0;
        }
        if is_last {
            question.askers.remove(&source.asker);
            match question.waiters.front().map(|(asker, _)| asker.clone()) {
                None => {
                    let question = self.questions.remove(key);
                    self.end_flight(question.and_then(|question| question.flight));
                }
                Some(next) => {
                    let next = Source { partition: key.partition.clone(), asker: next };
                    if let Some(flight) =
                        question.flight.as_mut().filter(|flight| flight.owner == source)
                    {
                        self.flights.give_back(&source);
                        self.flights.take(&next);
                        self.owned.remove(&(source.clone(), flight.number));
                        self.owned.insert((next.clone(), flight.number), key.clone());
                        flight.owner = next;
                    }
                }
            }
        }
        yielded.push(Yielded { waiter, asker: source.asker, reason });
        true
    }

    fn end_flight(&mut self, flight: Option<Flight<H>>) {
        if let Some(flight) = flight {
            self.flights.give_back(&flight.owner);
            self.owned.remove(&(flight.owner, flight.number));
        }
    }
}

#[cfg(test)]
mod tests;
