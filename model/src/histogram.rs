//! Times counted in buckets, by as many threads as like to, without a lock: a histogram as
//! Prometheus has it. The bounds are fixed, and so is what it takes: `N + 2` words.
//!
//! Counts are relaxed. One that is read while another thread records may have the bucket and not
//! yet the sum, which the next reading has.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Times by `N` upper bounds, in seconds and ascending, each inclusive; there is one more bucket
/// for what is longer.
#[derive(Debug)]
pub struct Histogram<const N: usize> {
    bounds: &'static [f64; N],
    counts: [AtomicU64; N],
    longer: AtomicU64,
    nanoseconds: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    /// An empty one.
    #[must_use]
    pub const fn new(bounds: &'static [f64; N]) -> Self {
        Self {
            bounds,
            counts: [const { AtomicU64::new(0) }; N],
            longer: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
        }
    }

    /// Counts a time.
    pub fn record(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound);
        bucket.map_or(&self.longer, |index| &self.counts[index]).fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// What it has counted until now.
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

/// What a [`Histogram`] had counted at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct HistogramReading<const N: usize> {
    bounds: &'static [f64; N],
    counts: [u64; N],
    longer: u64,
    nanoseconds: u64,
}

impl<const N: usize> HistogramReading<N> {
    /// That of an empty one.
    #[must_use]
    pub const fn empty(bounds: &'static [f64; N]) -> Self {
        Self { bounds, counts: [0; N], longer: 0, nanoseconds: 0 }
    }

    /// Counts what `other`, of the same bounds, has counted as well.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.counts.iter_mut().zip(&other.counts) {
            *sum += more;
        }
        self.longer += other.longer;
        self.nanoseconds = self.nanoseconds.wrapping_add(other.nanoseconds);
    }

    /// How many times there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.longer
    }

    /// How long they took together.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.nanoseconds)
    }

    /// Writes the series of `family` that bear `labels` (`a="b",c="d"`, or nothing) in the text
    /// format of Prometheus (exposition format 0.0.4).
    ///
    /// # Errors
    /// Only those of `out`.
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
    fn a_time_is_in_the_first_bucket_that_holds_it_and_buckets_add_up() {
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
    fn two_readings_add_up_to_one_of_both() {
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
