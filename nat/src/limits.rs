//! Rate limits. The caller provides the current time.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::time::{Duration, Instant};

/// A token bucket: `burst` tokens at once, `per_second` sustained.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    /// Available tokens, in millionths.
    level: u64,
    filled: Instant,
}

/// Rate of a [`Bucket`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens added per second.
    pub per_second: u32,
    /// Capacity in tokens.
    pub burst: u32,
}

const UNIT: u64 = 1_000_000;

impl Bucket {
    /// Creates a full bucket.
    #[must_use]
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { level: u64::from(rate.burst) * UNIT, filled: now }
    }

    /// Takes a token, if one is available.
    pub fn take(&mut self, rate: Rate, now: Instant) -> bool {
        self.fill(rate, now);
        let taken = self.level >= UNIT;
        if taken {
            self.level -= UNIT;
        }
        taken
    }

    /// Whether the bucket is full, so that it can be discarded without loss of state.
    pub fn is_full(&mut self, rate: Rate, now: Instant) -> bool {
        self.fill(rate, now);
        self.level >= u64::from(rate.burst) * UNIT
    }

    /// Returns a token to the bucket.
    pub fn refund(&mut self, rate: Rate) {
        self.level = (self.level + UNIT).min(u64::from(rate.burst) * UNIT);
    }

    /// Number of available tokens.
    pub fn level(&mut self, rate: Rate, now: Instant) -> u32 {
        self.fill(rate, now);
        (self.level / UNIT) as u32
    }

    fn fill(&mut self, rate: Rate, now: Instant) {
        // An hour fills any bucket. The bound prevents an overflow of the product.
        let passed = now.saturating_duration_since(self.filled).min(Duration::from_secs(3600));
        let added = passed.as_micros() as u64 * u64::from(rate.per_second);
        // If the elapsed time adds less than a millionth of a token, `filled` stays, and the time
        // counts later.
        if added > 0 {
            self.level = (self.level + added).min(u64::from(rate.burst) * UNIT);
            self.filled = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_allows_a_burst_and_then_the_rate() {
        let start = Instant::now();
        let rate = Rate { per_second: 10, burst: 3 };
        let mut bucket = Bucket::new(rate, start);
        assert_eq!((0..5).filter(|_| bucket.take(rate, start)).count(), 3);
        let later = start + Duration::from_millis(250);
        assert_eq!((0..5).filter(|_| bucket.take(rate, later)).count(), 2);
        assert!(!bucket.is_full(rate, later));
        assert!(bucket.is_full(rate, later + Duration::from_secs(1)));
    }
}
