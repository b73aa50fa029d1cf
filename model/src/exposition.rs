//! The text format of Prometheus (exposition format 0.0.4).
//!
//! Families with one series per object are written from the counters of the objects at scrape time:
//! the series of an object end with the object.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::HistogramReading;
use std::fmt::{self, Display, Write};

/// Type of a metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never decreases.
    Counter,
    /// Increases and decreases.
    Gauge,
    /// Durations in buckets.
    Histogram,
}

/// A metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The name, with the unit; `_total` for a counter.
    pub name: &'static str,
    /// The type.
    pub kind: Kind,
    /// The help text, one sentence without line feed and backslash.
    pub help: &'static str,
}

/// Labels of a series: names and values. A value may be any text.
pub type Labels<'a> = &'a [(&'a str, &'a dyn Display)];

impl Family {
    /// A counter.
    #[must_use]
    pub const fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, help }
    }

    /// A gauge.
    #[must_use]
    pub const fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, help }
    }

    /// A histogram.
    #[must_use]
    pub const fn histogram(name: &'static str, help: &'static str) -> Self {
        Self { name, kind: Kind::Histogram, help }
    }

    /// Writes the lines `HELP` and `TYPE`, which precede all series of the family.
    ///
    /// # Errors
    /// Only errors of `page`.
    pub fn write_head(&self, page: &mut impl Write) -> fmt::Result {
        let Self { name, kind, help } = self;
        writeln!(page, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str())
    }

    /// Writes one series of a counter or a gauge.
    ///
    /// # Errors
    /// Only errors of `page`.
    pub fn write_value(
        &self,
        labels: Labels<'_>,
        value: impl Display,
        page: &mut impl Write,
    ) -> fmt::Result {
        write_series(self.name, "", labels, None, value, page)
    }

    /// Writes the family of a single value without labels, with its head.
    ///
    /// # Errors
    /// Only errors of `page`.
    pub fn write_single(&self, value: impl Display, page: &mut impl Write) -> fmt::Result {
        self.write_head(page)?;
        self.write_value(&[], value, page)
    }

    /// Writes the series of one histogram.
    ///
    /// # Errors
    /// Only errors of `page`.
    pub fn write_histogram<const N: usize>(
        &self,
        labels: Labels<'_>,
        reading: &HistogramReading<N>,
        page: &mut impl Write,
    ) -> fmt::Result {
        let mut sum = 0;
        for (bound, count) in reading.buckets() {
            sum += count;
            let bound: &dyn Display = match &bound {
                Some(bound) => bound,
                None => &"+Inf",
            };
            write_series(self.name, "_bucket", labels, Some(bound), sum, page)?;
        }
        let seconds = reading.total().as_secs_f64();
        write_series(self.name, "_sum", labels, None, seconds, page)?;
        write_series(self.name, "_count", labels, None, sum, page)
    }
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

fn write_series(
    name: &str,
    suffix: &str,
    labels: Labels<'_>,
    bound: Option<&dyn Display>,
    value: impl Display,
    page: &mut impl Write,
) -> fmt::Result {
    page.write_str(name)?;
    page.write_str(suffix)?;
    let mut separator = '{';
    let bound = bound.as_ref().map(|bound| ("le", *bound));
    for (label, value) in labels.iter().copied().chain(bound) {
        write!(page, "{separator}{label}=\"")?;
        write!(Escaped(page), "{value}")?;
        page.write_char('"')?;
        separator = ',';
    }
    if separator == ',' {
        page.write_char('}')?;
    }
    writeln!(page, " {value}")
}

/// Escapes the value of a label: backslash, double quote and line feed.
struct Escaped<'a, W>(&'a mut W);

impl<W: Write> Write for Escaped<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(['\\', '"', '\n']) {
            self.0.write_str(&rest[..at])?;
            self.0.write_str(match rest.as_bytes()[at] {
                b'\n' => "\\n",
                b'"' => "\\\"",
                _ => "\\\\",
            })?;
            rest = &rest[at + 1..];
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Histogram;
    use std::time::Duration;

    const BOUNDS: [f64; 3] = [0.001, 0.1, 1.0];

    #[test]
    fn a_family_has_a_head_and_a_line_per_series() {
        let family = Family::counter("ports_total", "Ports.");
        let mut page = String::new();
        family.write_head(&mut page).unwrap();
        family.write_value(&[("a", &"b"), ("c", &7)], 1, &mut page).unwrap();
        Family::gauge("size_bytes", "Size.").write_single(1.5, &mut page).unwrap();
        let lines = [
            "# HELP ports_total Ports.",
            "# TYPE ports_total counter",
            "ports_total{a=\"b\",c=\"7\"} 1",
            "# HELP size_bytes Size.",
            "# TYPE size_bytes gauge",
            "size_bytes 1.5",
        ];
        assert_eq!(page.lines().collect::<Vec<_>>(), lines);
    }

    #[test]
    fn label_values_are_escaped() {
        let mut page = String::new();
        Family::gauge("g", "").write_value(&[("a", &"\"x\\\ny")], 0, &mut page).unwrap();
        assert_eq!(page, "g{a=\"\\\"x\\\\\\ny\"} 0\n");
    }

    #[test]
    fn a_duration_counts_in_its_bucket_and_all_higher_ones() {
        let histogram = Histogram::new(&BOUNDS);
        for milliseconds in [0, 1, 2, 100, 1000, 1001, 60_000] {
            histogram.record(Duration::from_millis(milliseconds));
        }
        let family = Family::histogram("took_seconds", "Time.");
        let mut page = String::new();
        family.write_histogram(&[("a", &"b")], &histogram.read(), &mut page).unwrap();
        let lines = [
            "took_seconds_bucket{a=\"b\",le=\"0.001\"} 2",
            "took_seconds_bucket{a=\"b\",le=\"0.1\"} 4",
            "took_seconds_bucket{a=\"b\",le=\"1\"} 5",
            "took_seconds_bucket{a=\"b\",le=\"+Inf\"} 7",
            "took_seconds_sum{a=\"b\"} 62.104",
            "took_seconds_count{a=\"b\"} 7",
        ];
        assert_eq!(page.lines().collect::<Vec<_>>(), lines);
        page.clear();
        family.write_histogram(&[], &HistogramReading::empty(&BOUNDS), &mut page).unwrap();
        assert!(page.starts_with("took_seconds_bucket{le=\"0.001\"} 0\n"), "{page}");
        assert!(page.ends_with("took_seconds_sum 0\ntook_seconds_count 0\n"), "{page}");
    }
}
