//! When which place is checked for objects that other software has removed. Pure.
//!
//! A place is the host or the namespace of one endpoint. Word of a change makes it due after
//! [`SETTLE`], so that a flush of many objects is one repair. The pause between two checks of a
//! place grows in two cases, and returns to [`PAUSE`] when it was quiet for a while:
//!
//! - Something was removed again after it had been restored [`PATIENCE`] times: the other software
//!   is not going to stop. The pause doubles up to 200 ms on the host, where what is missing may be
//!   what closes a network, and up to 30 seconds in an endpoint, whose own processes can remove
//!   objects at no cost.
//! - Changes go on that remove nothing of ours: the pause is then 200 ms on the host and
//!   [`BUSY_PAUSE`] in an endpoint, which bounds the processor time that an endpoint can cause.
//!
//! While work goes on in the namespace of an endpoint, the endpoint is held: it is not due, however
//! long that takes, and what has changed meanwhile makes it due afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// How long changes may go on before what they removed is restored.
pub(super) const SETTLE: Duration = Duration::from_millis(10);

/// The least time between two checks of a place.
const PAUSE: Duration = Duration::from_millis(100);

/// The same of an endpoint, when checks follow one another and find nothing missing.
const BUSY_PAUSE: Duration = Duration::from_millis(500);

/// Checks in a row after which it applies.
const BUSY: u32 = 16;

/// Restorations in a row after which the pause doubles with each.
const PATIENCE: u32 = 10;

/// How long after the last restoration the next one is the first again, beside twice the pause.
const QUIET: Duration = Duration::from_secs(10);

/// The longest pauses. On the host all is restored within a second, which the programs of iptables
/// take a part of.
const HOST_LIMIT: Duration = Duration::from_millis(200);
const ENDPOINT_LIMIT: Duration = Duration::from_secs(30);

/// How long after a failure the next attempt is made.
const RETRY: Duration = Duration::from_secs(1);

/// What a check of a place has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Nothing was missing.
    Sound,
    /// Something was restored.
    Restored,
    /// Something could not be restored, so that the place is due again by itself.
    Failed,
}

/// How often a place is checked.
#[derive(Debug)]
struct Pace {
    limit: Duration,
    /// The least pause when checks follow one another and find nothing missing.
    busy_pause: Duration,
    pause: Duration,
    checked: Option<Instant>,
    /// Checks that followed one another.
    busy: u32,
    /// Restorations that followed one another, and the last of them.
    restored: u32,
    restored_at: Option<Instant>,
}

impl Pace {
    fn new(limit: Duration, busy_pause: Duration) -> Self {
        Self {
            limit,
            busy_pause,
            pause: PAUSE,
            checked: None,
            busy: 0,
            restored: 0,
            restored_at: None,
        }
    }

    /// When a place that has changed at `now` is checked.
    fn due(&self, now: Instant) -> Instant {
        let soon = now + SETTLE;
        self.checked.map_or(soon, |checked| soon.max(checked + self.pause))
    }

    /// Notes a check. Whether the place is checked less often from now on, because objects are
    /// removed again and again.
    fn note(&mut self, found: Check, now: Instant) -> bool {
        let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
        let follows = since(self.checked).is_some_and(|gap| gap < 2 * self.pause);
        self.busy = if follows { self.busy + 1 } else { 0 };
        if since(self.restored_at).is_some_and(|gap| gap > QUIET + 2 * self.pause) {
            self.restored = 0;
        }
        self.checked = Some(now);
        if found != Check::Sound {
            self.restored += 1;
            self.restored_at = Some(now);
        }
        let doublings = self.restored.saturating_sub(PATIENCE);
        let least = if self.busy > BUSY { self.busy_pause } else { PAUSE };
        self.pause = (PAUSE * 2_u32.saturating_pow(doublings.min(16))).max(least).min(self.limit);
        found != Check::Sound && doublings == 1
    }
}

/// Which places are due, and when.
#[derive(Debug)]
pub(super) struct RepairSchedule {
    host: Pace,
    host_at: Option<Instant>,
    endpoints: BTreeMap<String, Pace>,
    endpoints_at: BTreeMap<String, Instant>,
    /// Endpoints in whose namespaces work goes on.
    held: BTreeSet<String>,
}

impl RepairSchedule {
    pub(super) fn new() -> Self {
        Self {
            host: Pace::new(HOST_LIMIT, HOST_LIMIT),
            host_at: None,
            endpoints: BTreeMap::new(),
            endpoints_at: BTreeMap::new(),
            held: BTreeSet::new(),
        }
    }

    /// Whether the host is due at some time.
    pub(super) fn awaits_host(&self) -> bool {
        self.host_at.is_some()
    }

    /// Something on the host has changed.
    pub(super) fn host_changed(&mut self, now: Instant) {
        self.host_at.get_or_insert(self.host.due(now));
    }

    /// Something in the namespace of `endpoint` has changed, or its link.
    pub(super) fn endpoint_changed(&mut self, endpoint: String, now: Instant) {
        let due = self.endpoints.get(&endpoint).map_or(now + SETTLE, |pace| pace.due(now));
        self.endpoints_at.entry(endpoint).or_insert(due);
    }

    /// Work begins in the namespace of `endpoint`.
    pub(super) fn hold(&mut self, endpoint: &str) {
        self.held.insert(endpoint.to_owned());
    }

    /// It has ended.
    pub(super) fn release(&mut self, endpoint: &str) {
        self.held.remove(endpoint);
    }

    /// When the next place is due.
    pub(super) fn next(&self) -> Option<Instant> {
        let is_free = |(name, _): &(&String, &Instant)| !self.held.contains(*name);
        let endpoints = self.endpoints_at.iter().filter(is_free).map(|(_, at)| *at);
        self.host_at.into_iter().chain(endpoints).min()
    }

    /// Takes what is due at `now`: the host or not, and these endpoints.
    pub(super) fn take(&mut self, now: Instant) -> (bool, BTreeSet<String>) {
        let host = self.host_at.take_if(|at| *at <= now).is_some();
        let due: BTreeSet<String> = self
            .endpoints_at
            .iter()
            .filter(|(name, at)| **at <= now && !self.held.contains(*name))
            .map(|(name, _)| name.clone())
            .collect();
        self.endpoints_at.retain(|name, _| !due.contains(name));
        (host, due)
    }

    /// Notes a check of the host, of which others removed objects again and again if this returns
    /// true.
    pub(super) fn host_checked(&mut self, found: Check, now: Instant) -> bool {
        let backs_off = self.host.note(found, now);
        if found == Check::Failed {
            // Nobody may say a word about it again.
            self.host_at.get_or_insert(now + RETRY);
        }
        backs_off
    }

    /// The same of an endpoint.
    pub(super) fn endpoint_checked(&mut self, endpoint: &str, found: Check, now: Instant) -> bool {
        let pace = self
            .endpoints
            .entry(endpoint.to_owned())
            .or_insert_with(|| Pace::new(ENDPOINT_LIMIT, BUSY_PAUSE));
        let backs_off = pace.note(found, now);
        let again = now + pace.pause.max(RETRY);
        if found == Check::Failed {
            self.endpoints_at.entry(endpoint.to_owned()).or_insert(again);
        }
        backs_off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `endpoint` change whenever it is not due, for `seconds`. When it was checked, with what
    /// was `found`.
    fn checks(schedule: &mut RepairSchedule, found: Check, seconds: u64) -> (Vec<Duration>, usize) {
        let start = Instant::now();
        let (mut now, mut at, mut told) = (start, Vec::new(), 0);
        while now < start + Duration::from_secs(seconds) {
            schedule.endpoint_changed("web".into(), now);
            now = schedule.next().unwrap();
            assert_eq!(schedule.take(now), (false, BTreeSet::from(["web".to_owned()])));
            told += usize::from(schedule.endpoint_checked("web", found, now));
            at.push(now - start);
        }
        (at, told)
    }

    #[test]
    fn the_first_change_is_checked_at_once_and_those_that_follow_after_a_pause() {
        let mut schedule = RepairSchedule::new();
        let now = Instant::now();
        assert_eq!(schedule.next(), None);
        schedule.host_changed(now);
        schedule.host_changed(now + Duration::from_millis(5));
        assert_eq!(schedule.next(), Some(now + SETTLE));
        assert_eq!(schedule.take(now), (false, BTreeSet::new()));
        assert_eq!(schedule.take(now + SETTLE), (true, BTreeSet::new()));
        assert!(!schedule.host_checked(Check::Restored, now + SETTLE));
        assert!(!schedule.awaits_host());
        schedule.host_changed(now + 2 * SETTLE);
        assert_eq!(schedule.next(), Some(now + SETTLE + PAUSE));
    }

    #[test]
    fn what_is_removed_again_and_again_is_restored_less_and_less_often_and_that_is_told_once() {
        let (at, told) = checks(&mut RepairSchedule::new(), Check::Restored, 600);
        assert!(at[9] < Duration::from_millis(1100), "{at:?}");
        assert!(at.len() < 45, "{} checks in 10 minutes", at.len());
        assert_eq!(told, 1);
        let mut host = RepairSchedule::new();
        let mut now = Instant::now();
        for _ in 0..100 {
            host.host_changed(now);
            assert!(
                host.next().unwrap() - now <= HOST_LIMIT + SETTLE,
                "the host is never left alone"
            );
            now = host.next().unwrap();
            host.take(now);
            host.host_checked(Check::Restored, now);
        }
    }

    #[test]
    fn changes_that_remove_nothing_cost_two_checks_a_second_and_delay_none_by_more() {
        let (at, told) = checks(&mut RepairSchedule::new(), Check::Sound, 60);
        assert!(at.len() < 150, "{} checks in a minute", at.len());
        assert!(at.windows(2).all(|two| two[1] - two[0] <= BUSY_PAUSE + SETTLE));
        assert_eq!(told, 0);
    }

    #[test]
    fn a_place_that_was_quiet_is_checked_at_once_again() {
        let mut schedule = RepairSchedule::new();
        let _ = checks(&mut schedule, Check::Restored, 5);
        let later = Instant::now() + Duration::from_secs(120);
        schedule.endpoint_checked("web", Check::Restored, later);
        schedule.endpoint_changed("web".into(), later);
        assert_eq!(schedule.next(), Some(later + PAUSE));
    }

    #[test]
    fn an_endpoint_is_not_due_while_work_goes_on_in_it_and_delays_no_other() {
        let mut schedule = RepairSchedule::new();
        let now = Instant::now();
        schedule.hold("slow");
        schedule.endpoint_changed("slow".into(), now);
        assert_eq!(schedule.next(), None);
        schedule.endpoint_changed("quick".into(), now);
        let later = now + Duration::from_secs(60);
        assert_eq!(schedule.take(later), (false, BTreeSet::from(["quick".to_owned()])));
        schedule.release("slow");
        assert_eq!(schedule.take(later), (false, BTreeSet::from(["slow".to_owned()])));
    }

    #[test]
    fn what_could_not_be_restored_is_tried_again_without_a_word() {
        let mut schedule = RepairSchedule::new();
        let now = Instant::now();
        schedule.endpoint_checked("web", Check::Failed, now);
        assert_eq!(schedule.next(), Some(now + RETRY));
        schedule.host_checked(Check::Failed, now);
        assert!(schedule.awaits_host());
    }
}
