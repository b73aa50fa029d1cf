//! Rates, bounded. Pure: the caller brings the time.

use std::time::{Duration, Instant};

/// A token bucket: `burst` at once, and `per_second` in the long run.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    /// Tokens, in millionths.
    level: u64,
    filled: Instant,
}

/// How much a [`Bucket`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens added each second.
    pub per_second: u32,
    /// Tokens it holds.
    pub burst: u32,
}

const UNIT: u64 = 1_000_000;

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { level: u64::from(rate.burst) * UNIT, filled: now }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, rate: Rate, now: Instant) -> bool {
        self.fill(rate, now);
        let taken = self.level >= UNIT;
        if taken {
            self.level -= UNIT;
        }
        taken
    }

    /// Whether nothing would be forgotten with it.
    pub fn is_full(&mut self, rate: Rate, now: Instant) -> bool {
        self.fill(rate, now);
        self.level >= u64::from(rate.burst) * UNIT
    }

    /// Gives a token back that was taken.
    pub fn give_back(&mut self, rate: Rate) {
        self.level = (self.level + UNIT).min(u64::from(rate.burst) * UNIT);
    }

    /// How many tokens there are.
    pub fn level(&mut self, rate: Rate, now: Instant) -> u32 {
        self.fill(rate, now);
        (self.level / UNIT) as u32
    }

    fn fill(&mut self, rate: Rate, now: Instant) {
        // More than an hour fills whatever there is; the bound keeps the product in range.
        let passed = now.saturating_duration_since(self.filled).min(Duration::from_secs(3600));
        let added = passed.as_micros() as u64 * u64::from(rate.per_second);
        // What is too little for a millionth is not lost: the time it took counts again.
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
    fn a_burst_is_given_and_then_the_rate() {
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
