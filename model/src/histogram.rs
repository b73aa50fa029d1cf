//! A lock-free Prometheus histogram of durations. Any number of threads may record. The bounds are
//! fixed, and the histogram takes `N + 2` words.
//!
//! Counters use relaxed ordering. A snapshot taken while another thread records may include the
//! bucket but not yet the sum; the next snapshot includes both.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt::{self, Write};
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

/// Snapshot of a [`Histogram`].
#[derive(Clone, Debug, PartialEq)]
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

    /// Writes the series of `family` with `labels` (`a="b",c="d"`, or empty) in the text format of
    /// Prometheus (exposition format 0.0.4).
    ///
    /// # Errors
    /// Only errors of `out`.
    pub fn describe(&self, family: &str, labels: &str, out: &mut impl Write) -> fmt::Result {
        let separator = if labels.is_empty() { "" } else { "," };
        let mut sum = 0;
        for (bound, count) in self.bounds.iter().zip(&self.counts) {
            sum += count;
            writeln!(out, "{family}_bucket{{{labels}{separator}le=\"{bound}\"}} {sum}")?;
        }
        sum += self.longer;
        writeln!(out, "{family}_bucket{{{labels}{separator}le=\"+Inf\"}} {sum}")?;
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        writeln!(out, "{family}_sum{labels} {}", self.nanoseconds as f64 / 1e9)?;
        writeln!(out, "{family}_count{labels} {sum}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: [f64; 3] = [0.001, 0.1, 1.0];

    #[test]
    fn a_duration_counts_in_its_bucket_and_all_higher_ones() {
        let histogram = Histogram::new(&BOUNDS);
        for milliseconds in [0, 1, 2, 100, 1000, 1001, 60_000] {
            histogram.record(Duration::from_millis(milliseconds));
        }
        let reading = histogram.read();
        assert_eq!((reading.count(), reading.total()), (7, Duration::from_millis(62_104)));
        let mut page = String::new();
        reading.describe("took_seconds", "a=\"b\"", &mut page).unwrap();
        let lines = [
            "took_seconds_bucket{a=\"b\",le=\"0.001\"} 2",
            "took_seconds_bucket{a=\"b\",le=\"0.1\"} 4",
            "took_seconds_bucket{a=\"b\",le=\"1\"} 5",
            "took_seconds_bucket{a=\"b\",le=\"+Inf\"} 7",
            "took_seconds_sum{a=\"b\"} 62.104",
            "took_seconds_count{a=\"b\"} 7",
        ];
        assert_eq!(page.lines().collect::<Vec<_>>(), lines);
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
        let mut page = String::new();
        HistogramReading::empty(&BOUNDS).describe("idle_seconds", "", &mut page).unwrap();
        assert!(page.starts_with("idle_seconds_bucket{le=\"0.001\"} 0\n"), "{page}");
        assert!(page.ends_with("idle_seconds_sum 0\nidle_seconds_count 0\n"), "{page}");
    }
}
