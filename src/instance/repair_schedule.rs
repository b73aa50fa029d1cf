//! Schedule of the checks for objects that other software has removed. Pure.
//!
//! A place is the host or the namespace of one endpoint. A change makes the place due after
//! [`SETTLE`], so that a flush of many objects causes one repair. The interval between two checks
//! of a place grows in two cases, and returns to [`INTERVAL`] after a quiet period:
//!
//! - Objects are removed again after [`FREE_REPAIRS`] repairs. The interval then doubles with each
//!   repair, up to 200 ms on the host and 30 s in an endpoint. The limit is low on the host, where
//!   a missing object can break isolation. It is high in an endpoint, whose own processes can
//!   remove objects at no cost.
//! - Changes continue without removing any of our objects. The interval is then 200 ms on the host
//!   and [`BUSY_INTERVAL`] in an endpoint, which bounds the CPU time that an endpoint can cause.
//!
//! An endpoint is held while work runs in its namespace. It is not due during that time, and
//! changes during that time make it due afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// Delay between a change and the check, so that one check covers a burst of changes.
pub(super) const SETTLE: Duration = Duration::from_millis(10);

/// Minimum time between two checks of a place.
const INTERVAL: Duration = Duration::from_millis(100);

/// Minimum time between two checks of an endpoint after [`BUSY_CHECKS`] consecutive checks.
const BUSY_INTERVAL: Duration = Duration::from_millis(500);

/// Consecutive checks after which [`BUSY_INTERVAL`] applies.
const BUSY_CHECKS: u32 = 16;

/// Consecutive repairs after which each further one doubles the interval.
const FREE_REPAIRS: u32 = 10;

/// A place is quiet after this time plus twice its interval without a repair. The count of
/// consecutive repairs then starts again at zero.
const QUIET: Duration = Duration::from_secs(10);

/// Maximum interval on the host. A repair has to be complete within a second, including runs of
/// iptables programs.
const HOST_LIMIT: Duration = Duration::from_millis(200);

/// A check of the host is followed by this multiple of its duration without one, but by at most
/// [`MAX_PAUSE`]. With thousands of objects a check takes a tenth of a second, and commands that
/// change the host wait for it.
const PAUSE: u32 = 4;
const MAX_PAUSE: Duration = Duration::from_millis(500);

/// Maximum interval in an endpoint.
const ENDPOINT_LIMIT: Duration = Duration::from_secs(30);

/// Delay of the next attempt after a failed repair.
const RETRY: Duration = Duration::from_secs(1);

/// Result of a check of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// No object was missing.
    Sound,
    /// Missing objects were restored.
    Restored,
    /// An object could not be restored. The place becomes due again without a further change.
    Failed,
}

/// Check interval of a place.
#[derive(Debug)]
struct Pace {
    limit: Duration,
    /// Minimum interval after [`BUSY_CHECKS`] consecutive checks.
    busy_interval: Duration,
    interval: Duration,
    /// Minimum time after the last check.
    pause: Duration,
    checked: Option<Instant>,
    /// Number of consecutive checks.
    busy: u32,
    /// Number of consecutive repairs.
    restored: u32,
    /// Time of the last repair.
    restored_at: Option<Instant>,
}

impl Pace {
    fn new(limit: Duration, busy_interval: Duration) -> Self {
        Self {
            limit,
            busy_interval,
            interval: INTERVAL,
            pause: Duration::ZERO,
            checked: None,
            busy: 0,
            restored: 0,
            restored_at: None,
        }
    }

    /// When a place that changed at `now` is due.
    fn due(&self, now: Instant) -> Instant {
        let soon = now + SETTLE;
        self.checked.map_or(soon, |checked| soon.max(checked + self.interval.max(self.pause)))
    }

    /// Records a check. Returns true if the interval starts to double because objects are removed
    /// repeatedly.
    fn note(&mut self, found: Check, now: Instant) -> bool {
        let since = |at: Option<Instant>| at.map(|at| now.saturating_duration_since(at));
        let follows = since(self.checked).is_some_and(|gap| gap < 2 * self.interval);
        self.busy = if follows { self.busy + 1 } else { 0 };
        if since(self.restored_at).is_some_and(|gap| gap > QUIET + 2 * self.interval) {
            self.restored = 0;
        }
        self.checked = Some(now);
        if found != Check::Sound {
            self.restored += 1;
            self.restored_at = Some(now);
        }
        let doublings = self.restored.saturating_sub(FREE_REPAIRS);
        let minimum = if self.busy > BUSY_CHECKS { self.busy_interval } else { INTERVAL };
        self.interval =
            (INTERVAL * 2_u32.saturating_pow(doublings.min(16))).max(minimum).min(self.limit);
        found != Check::Sound && doublings == 1
    }
}

/// Due times of all places.
#[derive(Debug)]
pub(super) struct RepairSchedule {
    host: Pace,
    host_at: Option<Instant>,
    endpoints: BTreeMap<String, Pace>,
    endpoints_at: BTreeMap<String, Instant>,
    /// Endpoints with running work in their namespaces.
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

    /// Returns whether a check of the host is scheduled.
    pub(super) fn awaits_host(&self) -> bool {
        self.host_at.is_some()
    }

    /// Schedules a check of the host, which changed at `now`.
    pub(super) fn host_changed(&mut self, now: Instant) {
        self.host_at.get_or_insert(self.host.due(now));
    }

    /// Schedules a check of `endpoint`, whose namespace or link changed at `now`.
    pub(super) fn endpoint_changed(&mut self, endpoint: String, now: Instant) {
        let due = self.endpoints.get(&endpoint).map_or(now + SETTLE, |pace| pace.due(now));
        self.endpoints_at.entry(endpoint).or_insert(due);
    }

    /// Holds `endpoint` while work runs in its namespace.
    pub(super) fn hold(&mut self, endpoint: &str) {
        self.held.insert(endpoint.to_owned());
    }

    /// Ends [`Self::hold`].
    pub(super) fn release(&mut self, endpoint: &str) {
        self.held.remove(endpoint);
    }

    /// Returns the earliest due time of a place that is not held.
    pub(super) fn next(&self) -> Option<Instant> {
        let is_free = |(name, _): &(&String, &Instant)| !self.held.contains(*name);
        let endpoints = self.endpoints_at.iter().filter(is_free).map(|(_, at)| *at);
        self.host_at.into_iter().chain(endpoints).min()
    }

    /// Takes the places that are due at `now`: whether the host is, and the endpoints.
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

    /// Records a check of the host that has ended after `took`. Returns true once when repairs
    /// start to back off, because objects are removed repeatedly.
    pub(super) fn host_checked(&mut self, found: Check, took: Duration, now: Instant) -> bool {
        let backs_off = self.host.note(found, now);
        self.host.pause = (PAUSE * took).min(MAX_PAUSE);
        if found == Check::Failed {
            // There may be no further notification.
            self.host_at.get_or_insert(now + RETRY);
        }
        backs_off
    }

    /// Records a check of `endpoint`, as [`Self::host_checked`].
    pub(super) fn endpoint_checked(&mut self, endpoint: &str, found: Check, now: Instant) -> bool {
        let pace = self
            .endpoints
            .entry(endpoint.to_owned())
            .or_insert_with(|| Pace::new(ENDPOINT_LIMIT, BUSY_INTERVAL));
        let backs_off = pace.note(found, now);
        let retry = now + pace.interval.max(RETRY);
        if found == Check::Failed {
            self.endpoints_at.entry(endpoint.to_owned()).or_insert(retry);
        }
        backs_off
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changes an endpoint whenever it is not due, for `seconds`. Each check has the result
    /// `found`. Returns the times of the checks and the number of reports.
    fn checks(schedule: &mut RepairSchedule, found: Check, seconds: u64) -> (Vec<Duration>, usize) {
        let start = Instant::now();
        let (mut now, mut at, mut reports) = (start, Vec::new(), 0);
        while now < start + Duration::from_secs(seconds) {
            schedule.endpoint_changed("web".into(), now);
            now = schedule.next().unwrap();
            assert_eq!(schedule.take(now), (false, BTreeSet::from(["web".to_owned()])));
            reports += usize::from(schedule.endpoint_checked("web", found, now));
            at.push(now - start);
        }
        (at, reports)
    }

    #[test]
    fn the_first_change_is_checked_at_once_and_further_ones_after_the_interval() {
        let mut schedule = RepairSchedule::new();
        let now = Instant::now();
        assert_eq!(schedule.next(), None);
        schedule.host_changed(now);
        schedule.host_changed(now + Duration::from_millis(5));
        assert_eq!(schedule.next(), Some(now + SETTLE));
        assert_eq!(schedule.take(now), (false, BTreeSet::new()));
        assert_eq!(schedule.take(now + SETTLE), (true, BTreeSet::new()));
        assert!(!schedule.host_checked(Check::Restored, Duration::ZERO, now + SETTLE));
        assert!(!schedule.awaits_host());
        schedule.host_changed(now + 2 * SETTLE);
        assert_eq!(schedule.next(), Some(now + SETTLE + INTERVAL));
    }

    #[test]
    fn long_checks_of_the_host_take_a_fifth_of_the_time() {
        let mut schedule = RepairSchedule::new();
        let now = Instant::now();
        let took = Duration::from_millis(80);
        schedule.host_checked(Check::Sound, took, now);
        schedule.host_changed(now);
        assert_eq!(schedule.next(), Some(now + 4 * took));
        schedule.take(now + 4 * took);
        schedule.host_checked(Check::Sound, Duration::from_secs(3), now);
        schedule.host_changed(now);
        assert_eq!(schedule.next(), Some(now + MAX_PAUSE), "a repair is not postponed for long");
    }

    #[test]
    fn repairs_of_repeatedly_removed_objects_back_off_and_are_reported_once() {
        let (at, reports) = checks(&mut RepairSchedule::new(), Check::Restored, 600);
        assert!(at[9] < Duration::from_millis(1100), "{at:?}");
        assert!(at.len() < 45, "{} checks in 10 minutes", at.len());
        assert_eq!(reports, 1);
        let mut host = RepairSchedule::new();
        let mut now = Instant::now();
        for _ in 0..100 {
            host.host_changed(now);
            assert!(
                host.next().unwrap() - now <= HOST_LIMIT + SETTLE,
                "the interval of the host stays below its limit"
            );
            now = host.next().unwrap();
            host.take(now);
            host.host_checked(Check::Restored, Duration::ZERO, now);
        }
    }

    #[test]
    fn changes_that_remove_nothing_cause_two_checks_per_second() {
        let (at, reports) = checks(&mut RepairSchedule::new(), Check::Sound, 60);
        assert!(at.len() < 150, "{} checks in a minute", at.len());
        assert!(at.windows(2).all(|two| two[1] - two[0] <= BUSY_INTERVAL + SETTLE));
        assert_eq!(reports, 0);
    }

    #[test]
    fn the_interval_is_reset_after_a_quiet_period() {
        let mut schedule = RepairSchedule::new();
        let _ = checks(&mut schedule, Check::Restored, 5);
        let later = Instant::now() + Duration::from_secs(120);
        schedule.endpoint_checked("web", Check::Restored, later);
        schedule.endpoint_changed("web".into(), later);
        assert_eq!(schedule.next(), Some(later + INTERVAL));
    }

    #[test]
    fn a_held_endpoint_is_not_due_and_does_not_delay_others() {
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
    fn a_failed_repair_is_retried_without_a_notification() {
        let mut schedule = RepairSchedule::new();
        let now = Instant::now();
        schedule.endpoint_checked("web", Check::Failed, now);
        assert_eq!(schedule.next(), Some(now + RETRY));
        schedule.host_checked(Check::Failed, Duration::ZERO, now);
        assert!(schedule.awaits_host());
    }
}
