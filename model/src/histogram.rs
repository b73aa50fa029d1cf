//! A lock-free histogram of durations. Any number of threads may record. The bounds are
//! fixed, and the histogram takes `N + 2` words.
//!
//! Counters use relaxed ordering. A snapshot taken while another thread records may include the
//! bucket but not yet the sum; the next snapshot includes both.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Durations by `N` inclusive upper bounds, in seconds and ascending. One more bucket counts longer
/// durations.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    bounds: &'static [f64; N],
    counts: [AtomicU64; N],
    longer: AtomicU64,
    nanoseconds: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    /// Creates an empty histogram.
    #[must_use]
    pub const fn new(bounds: &'static [f64; N]) -> Self {
        Self {
            bounds,
            counts: [const { AtomicU64::new(0) }; N],
            longer: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
        }
    }

    /// Records a duration.
    pub fn record(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound);
        bucket.map_or(&self.longer, |index| &self.counts[index]).fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Takes a snapshot of the counters.
    #[must_use]
    pub fn read(&self) -> HistogramReading<N> {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        HistogramReading {
            bounds: self.bounds,
            counts: self.counts.each_ref().map(read),
            longer: read(&self.longer),
            nanoseconds: read(&self.nanoseconds),
        }
    }
}

/// Snapshot of a [`Histogram`], or a histogram that a single thread records.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HistogramReading<const N: usize> {
    bounds: &'static [f64; N],
    counts: [u64; N],
    longer: u64,
    nanoseconds: u64,
}

impl<const N: usize> HistogramReading<N> {
    /// The snapshot of an empty histogram.
    #[must_use]
    pub const fn empty(bounds: &'static [f64; N]) -> Self {
        Self { bounds, counts: [0; N], longer: 0, nanoseconds: 0 }
    }

    /// Records a duration.
    pub fn record(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound);
        *bucket.map_or(&mut self.longer, |index| &mut self.counts[index]) += 1;
        self.nanoseconds = self.nanoseconds.wrapping_add(time.as_nanos() as u64);
    }

    /// Adds the counts of `other`, which must have the same bounds.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.counts.iter_mut().zip(&other.counts) {
            *sum += more;
        }
        self.longer += other.longer;
        self.nanoseconds = self.nanoseconds.wrapping_add(other.nanoseconds);
    }

    /// Number of recorded durations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.longer
    }

    /// Sum of all recorded durations.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds)
    }

    /// The buckets in ascending order: the inclusive upper bound in seconds, `None` for the last,
    /// and the number of durations in this bucket alone.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<f64>, u64)> {
        let bounded = self.bounds.iter().copied().map(Some).zip(self.counts);
        bounded.chain([(None, self.longer)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: [f64; 3] = [0.001, 0.1, 1.0];

    #[test]
    fn a_duration_counts_in_its_bucket() {
        let histogram = Histogram::new(&BOUNDS);
        for milliseconds in [0, 1, 2, 100, 1000, 1001, 60_000] {
            histogram.record(Duration::from_millis(milliseconds));
        }
        let reading = histogram.read();
        assert_eq!((reading.count(), reading.total()), (7, Duration::from_millis(62_104)));
        let buckets = [(Some(0.001), 2), (Some(0.1), 2), (Some(1.0), 1), (None, 2)];
        assert_eq!(reading.buckets().collect::<Vec<_>>(), buckets);
    }

    #[test]
    fn the_sum_of_two_snapshots_counts_both() {
        let (one, other, both) =
            (Histogram::new(&BOUNDS), Histogram::new(&BOUNDS), Histogram::new(&BOUNDS));
        for (histogram, microseconds) in
            [(&one, 7), (&one, 70_000), (&other, 70_000), (&other, 5_000_000)]
        {
            histogram.record(Duration::from_micros(microseconds));
            both.record(Duration::from_micros(microseconds));
        }
        let mut sum = HistogramReading::empty(&BOUNDS);
        sum.add(&one.read());
        sum.add(&other.read());
        assert_eq!(sum, both.read());
    }
}
