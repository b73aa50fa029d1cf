//! The log of a supervisor process: the last lines of each service, in memory. Pure.
//!
//! Lines have consecutive numbers over all services. Readers continue at a number, so a reader
//! needs no queue, and no memory depends on its speed.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::milliseconds;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

/// What a line counts for in addition to its text, in bytes: its record and allocations. Without
/// it, a service that writes empty lines could use any amount of memory.
const OVERHEAD: usize = 128;

/// Where a line comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputStream {
    /// Standard output of the service.
    Stdout,
    /// Standard error of the service.
    Stderr,
    /// A notice of the supervisor about the service, such as `exited with code 1`. A service cannot
    /// write such a line.
    Notice,
}

/// A line of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Name of the service.
    pub service: String,
    /// Where the line comes from.
    pub stream: OutputStream,
    /// Time at which the supervisor process read the line, with a resolution of 1 ms after the
    /// transfer.
    #[serde(with = "milliseconds")]
    pub time: SystemTime,
    /// The line without its newline, at most 16 KiB of the service's output. Valid UTF-8 without
    /// control characters except tabs and SGR sequences (colours).
    pub text: String,
}

/// Limits of a [`Log`] in bytes. A line counts for its text and 128 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Maximum of a service.
    pub(super) service: usize,
    /// Maximum of all services together.
    pub(super) total: usize,
}

impl Default for Limits {
    /// 1 MiB for a service, 8 MiB for all together.
    fn default() -> Self {
        Self { service: 1024 * 1024, total: 8 * 1024 * 1024 }
    }
}

/// The last lines of each service.
///
/// Each service keeps up to 1 MiB, and all services together keep up to 8 MiB ([`Limits`]). A
/// service at its limit loses its oldest lines. At the limit of all services, the service with the
/// most bytes loses its oldest lines. A service that writes much thus removes lines of others only
/// if they hold more than it.
#[derive(Debug)]
pub(super) struct Log {
    limits: Limits,
    services: BTreeMap<String, Lines>,
    /// Number of the next line.
    end: u64,
    /// Bytes of all lines.
    size: usize,
}

/// The lines of a service.
#[derive(Debug, Default)]
struct Lines {
    /// In ascending order of their numbers.
    lines: VecDeque<(u64, Arc<LogLine>)>,
    size: usize,
    /// Number after that of the last dropped line, 0 if none was dropped.
    dropped: u64,
}

/// A reader is too slow: lines after its position have been dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dropped;

impl Log {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, services: BTreeMap::new(), end: 0, size: 0 }
    }

    /// Adds a line, and drops the oldest lines above the limits.
    pub(super) fn append(&mut self, line: LogLine) {
        if !self.services.contains_key(&line.service) {
            self.services.insert(line.service.clone(), Lines::default());
        }
        let Some(own) = self.services.get_mut(&line.service) else { return };
        let size = size_of_line(&line);
        own.lines.push_back((self.end, Arc::new(line)));
        own.size += size;
        self.end += 1;
        self.size += size;
        while own.size > self.limits.service {
            self.size -= own.drop_oldest();
        }
        while self.size > self.limits.total {
            let largest = self.services.values_mut().max_by_key(|lines| lines.size);
            match largest.map_or(0, Lines::drop_oldest) {
                0 => return,
                dropped => self.size -= dropped,
            }
        }
    }

    /// Returns the number of the next line.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Returns the last `count` lines of `service`, or of all services.
    pub(super) fn tail(&self, service: Option<&str>, count: usize) -> Vec<Arc<LogLine>> {
        let mut lines: Vec<&(u64, Arc<LogLine>)> = self
            .lines_of(service)
            .flat_map(|one| one.lines.range(one.lines.len().saturating_sub(count)..))
            .collect();
        lines.sort_unstable_by_key(|(number, _)| *number);
        let surplus = lines.len().saturating_sub(count);
        lines.into_iter().skip(surplus).map(|(_, line)| Arc::clone(line)).collect()
    }

    /// Returns up to `max` lines from number `from` on, and the number at which to continue.
    ///
    /// # Errors
    /// [`Dropped`], see [`has_dropped`](Self::has_dropped).
    pub(super) fn read(
        &self,
        service: Option<&str>,
        from: u64,
        max: usize,
    ) -> Result<(Vec<Arc<LogLine>>, u64), Dropped> {
        if self.has_dropped(service, from) {
            return Err(Dropped);
        }
        let mut lines: Vec<&(u64, Arc<LogLine>)> = self
            .lines_of(service)
            .flat_map(|one| {
                let first = one.lines.partition_point(|(number, _)| *number < from);
                one.lines.range(first..).take(max)
            })
            .collect();
        lines.sort_unstable_by_key(|(number, _)| *number);
        lines.truncate(max);
        let next = match lines.last() {
            Some((number, _)) if lines.len() == max => number + 1,
            _ => self.end,
        };
        Ok((lines.into_iter().map(|(_, line)| Arc::clone(line)).collect(), next))
    }

    /// Returns whether a line of `service`, or of any service, with the number `from` or a higher
    /// one has been dropped.
    pub(super) fn has_dropped(&self, service: Option<&str>, from: u64) -> bool {
        self.lines_of(service).any(|one| one.dropped > from)
    }

    fn lines_of(&self, service: Option<&str>) -> impl Iterator<Item = &Lines> {
        self.services
            .iter()
            .filter(move |(name, _)| service.is_none_or(|service| service == *name))
            .map(|(_, lines)| lines)
    }
}

impl Lines {
    /// Returns the bytes of the dropped line, 0 if there is none.
    fn drop_oldest(&mut self) -> usize {
        let Some((number, line)) = self.lines.pop_front() else { return 0 };
        let size = size_of_line(&line);
        self.size -= size;
        self.dropped = number + 1;
        size
    }
}

/// What `line` counts for, in bytes.
pub(super) fn size_of_line(line: &LogLine) -> usize {
    line.text.len() + OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(service: &str, text: &str) -> LogLine {
        LogLine {
            service: service.to_owned(),
            stream: OutputStream::Stdout,
            time: SystemTime::UNIX_EPOCH,
            text: text.to_owned(),
        }
    }

    fn log(service: usize, total: usize, lines: &[(&str, &str)]) -> Log {
        let mut log =
            Log::new(Limits { service: service * (OVERHEAD + 1), total: total * (OVERHEAD + 1) });
        for (service, text) in lines {
            log.append(line(service, text));
        }
        log
    }

    fn texts(lines: &[Arc<LogLine>]) -> String {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    const MIXED: [(&str, &str); 5] = [("a", "0"), ("b", "1"), ("a", "2"), ("a", "3"), ("b", "4")];

    #[test]
    fn the_tail_has_the_order_of_all_services() {
        let log = log(8, 8, &MIXED);
        assert_eq!(texts(&log.tail(None, usize::MAX)), "01234");
        assert_eq!(texts(&log.tail(None, 3)), "234");
        assert_eq!(texts(&log.tail(Some("a"), 2)), "23");
        assert_eq!(texts(&log.tail(Some("a"), 0)), "");
        assert_eq!(texts(&log.tail(Some("unknown"), 2)), "");
    }

    #[test]
    fn reading_continues_where_it_ended() {
        let log = log(8, 8, &MIXED);
        let (lines, next) = log.read(None, 0, 2).unwrap();
        assert_eq!((texts(&lines).as_str(), next), ("01", 2));
        let (lines, next) = log.read(None, next, 8).unwrap();
        assert_eq!((texts(&lines).as_str(), next), ("234", 5));
        assert_eq!(log.read(None, next, 8).unwrap(), (vec![], 5));
        let (lines, next) = log.read(Some("b"), 2, 8).unwrap();
        assert_eq!((texts(&lines).as_str(), next), ("4", 5));
    }

    #[test]
    fn a_service_at_its_limit_loses_its_own_lines() {
        let log = log(2, 8, &MIXED);
        assert_eq!(texts(&log.tail(None, 8)), "1234");
        assert_eq!(log.read(None, 0, 8), Err(Dropped));
        assert_eq!(log.read(Some("a"), 0, 8), Err(Dropped));
        assert_eq!(texts(&log.read(Some("b"), 0, 8).unwrap().0), "14");
        assert_eq!(texts(&log.read(None, 1, 8).unwrap().0), "1234");
    }

    #[test]
    fn at_the_limit_of_all_the_largest_holder_yields() {
        let mut log = log(8, 4, &MIXED);
        assert_eq!(texts(&log.tail(None, 8)), "1234");
        for _ in 0..100 {
            log.append(line("a", "x"));
        }
        assert_eq!(texts(&log.tail(None, 8)), "14xx", "two lines each");
    }

    #[test]
    fn empty_lines_count() {
        let mut log = log(2, 8, &[]);
        for _ in 0..100 {
            log.append(line("a", ""));
        }
        assert_eq!(log.tail(None, 100).len(), 2);
    }

    #[test]
    fn a_line_above_the_limit_is_dropped() {
        let mut log = log(1, 8, &[]);
        log.append(line("a", "longer"));
        assert!(log.tail(None, 8).is_empty());
        assert_eq!(log.size, 0);
    }

    #[test]
    fn a_line_is_json_with_its_time_in_milliseconds() {
        let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(1_234_567);
        let line = LogLine { time, ..line("web", "hi") };
        let json = serde_json::to_string(&line).unwrap();
        assert_eq!(json, r#"{"service":"web","stream":"Stdout","time":1234,"text":"hi"}"#);
        let read: LogLine = serde_json::from_str(&json).unwrap();
        assert_eq!(read.time, SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(1234));
    }

    proptest! {
        #[test]
        fn limits_hold_and_a_reader_misses_no_line_unnoticed(
            written in prop::collection::vec((0..4_usize, 0..300_usize), 0..200),
            read_every in 1..40_usize,
            batch in 1..20_usize,
        ) {
            let limits = Limits { service: 2000, total: 5000 };
            let mut log = Log::new(limits);
            let (mut position, mut seen, mut expected) = (0, Vec::new(), Vec::new());
            for (number, (service, length)) in written.into_iter().enumerate() {
                let name = ["a", "b", "c", "d"][service];
                let text = format!("{number}{}", "x".repeat(length));
                expected.push(text.clone());
                log.append(line(name, &text));

                let held: usize = log.services.values().map(|lines| lines.size).sum();
                prop_assert_eq!(held, log.size);
                prop_assert!(log.size <= limits.total);
                for lines in log.services.values() {
                    let sum: usize = lines.lines.iter().map(|(_, line)| size_of_line(line)).sum();
                    prop_assert_eq!(sum, lines.size);
                    prop_assert!(lines.size <= limits.service);
                }
                if number % read_every == 0 {
                    match log.read(None, position, batch) {
                        Ok((lines, next)) => {
                            seen.extend(lines.iter().map(|line| line.text.clone()));
                            position = next;
                            prop_assert_eq!(seen.len() as u64, next);
                        }
                        Err(Dropped) => break,
                    }
                }
            }
            prop_assert_eq!(&expected[..seen.len()], &seen[..]);
        }
    }
}
