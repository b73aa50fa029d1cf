//! Restart policy and backoff of a service. Pure: run times are arguments.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::Exit;
use std::time::Duration;
use tidegate_model::Restart;

/// Initial pause, doubled with each restart. Same values as dockerd (restartmanager), so that
/// Compose files behave alike.
const FIRST: Duration = Duration::from_millis(100);

/// Maximum pause.
const MAX: Duration = Duration::from_secs(60);

/// Run time after which the pause is reset to [`FIRST`].
const SETTLED: Duration = Duration::from_secs(10);

/// Restart state of one service.
#[derive(Debug)]
pub(super) struct Restarts {
    policy: Restart,
    pause: Duration,
    count: u32,
}

impl Restarts {
    pub(super) fn new(policy: Restart) -> Self {
        Self { policy, pause: FIRST, count: 0 }
    }

    /// Number of restarts.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Returns the pause before the restart of a service that ended with `exit` after it ran for
    /// `ran`. `None` if it is not restarted.
    pub(super) fn next(&mut self, exit: Exit, ran: Duration) -> Option<Duration> {
        let restarts = match self.policy {
            Restart::No => false,
            Restart::OnFailure { max } => !exit.success() && max.is_none_or(|max| self.count < max),
            Restart::Always | Restart::UnlessStopped => true,
        };
        if !restarts {
            return None;
        }
        if ran >= SETTLED {
            self.pause = FIRST;
        }
        self.count = self.count.saturating_add(1);
        let pause = self.pause;
        self.pause = (pause * 2).min(MAX);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILED: Exit = Exit::Code(1);
    const AT_ONCE: Duration = Duration::ZERO;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let mut restarts = Restarts::new(Restart::Always);
        let pauses: Vec<u128> = (0..12)
            .filter_map(|_| restarts.next(FAILED, AT_ONCE))
            .map(|pause| pause.as_millis())
            .collect();
        let expected =
            [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 51_200, 60_000, 60_000];
        assert_eq!(pauses, expected);
        assert_eq!(restarts.count(), 12);
    }

    #[test]
    fn the_pause_is_reset_after_ten_seconds_of_run_time() {
        let mut restarts = Restarts::new(Restart::UnlessStopped);
        for _ in 0..5 {
            restarts.next(FAILED, AT_ONCE);
        }
        assert_eq!(restarts.next(FAILED, SETTLED - Duration::from_nanos(1)), Some(FIRST * 32));
        assert_eq!(restarts.next(FAILED, SETTLED), Some(FIRST));
        assert_eq!(restarts.next(FAILED, AT_ONCE), Some(FIRST * 2));
    }

    #[test]
    fn death_by_a_signal_is_a_failure() {
        let mut on_failure = Restarts::new(Restart::OnFailure { max: None });
        assert_eq!(on_failure.next(Exit::Code(0), AT_ONCE), None);
        assert_eq!(on_failure.next(Exit::Signal(9), AT_ONCE), Some(FIRST));
        assert_eq!(Restarts::new(Restart::Always).next(Exit::Code(0), AT_ONCE), Some(FIRST));
        assert_eq!(Restarts::new(Restart::No).next(FAILED, AT_ONCE), None);
    }

    #[test]
    fn restarts_on_failure_are_limited() {
        let mut restarts = Restarts::new(Restart::OnFailure { max: Some(2) });
        let given = [(); 4].map(|()| restarts.next(FAILED, SETTLED).is_some());
        assert_eq!(given, [true, true, false, false]);
        assert_eq!(Restarts::new(Restart::OnFailure { max: Some(0) }).next(FAILED, AT_ONCE), None);
    }
}
