#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Rate limit for a recurring log event, such as reaching a limit.
#[derive(Debug)]
pub struct LogInterval {
    every: Duration,
    last: Mutex<Option<Instant>>,
}

impl LogInterval {
    /// Allows one event per `every`.
    #[must_use]
    pub const fn new(every: Duration) -> Self {
        Self { every, last: Mutex::new(None) }
    }

    /// Whether to log an event at `now`: it is the first one, or `every` has passed since the last
    /// logged one.
    pub fn is_due(&self, now: Instant) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| now.saturating_duration_since(last) >= self.every);
        if is_due {
            *last = Some(now);
        }
        is_due
    }
}

/// One event per minute.
impl Default for LogInterval {
    fn default() -> Self {
        Self::new(Duration::from_secs(60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_per_interval_is_due() {
        let (interval, start) = (LogInterval::default(), Instant::now());
        let due = |seconds| interval.is_due(start + Duration::from_secs(seconds));
        assert_eq!(
            [0, 1, 59, 60, 61, 200, 201].map(due),
            [true, false, false, true, false, true, false]
        );
        assert!(!due(100), "earlier than the last event");
    }
}
