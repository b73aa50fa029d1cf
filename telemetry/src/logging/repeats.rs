//! Rate limiting of warnings and errors: the first event is logged, repetitions are counted.
//!
//! # Theory of operation
//! Two events are the same if they come from the same source line and all their text is equal;
//! numbers may differ. The first event is logged and opens a window of [`WINDOW`]. Repetitions
//! within the window are counted. When the window closes, one line reports the count ("repeated 412
//! times in 60 s") and the next window opens. A window without repetitions has no successor: the
//! next occurrence is logged as a first event.
//!
//! [`Table`] is pure and bounded: at the limit, a new event closes the window that expires next. A
//! thread closes windows in time. It is started at the first repetition.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// The length of a window.
const WINDOW: Duration = Duration::from_secs(60);

/// Maximum number of open windows.
const LIMIT: usize = 256;

/// Maximum number of bytes of text in an [`EventKey`].
const MAX_TEXT: usize = 512;

/// The target of the lines that report counts. The limiter lets them pass.
const TARGET: &str = "tidegate::repeats";

/// The identity of an event.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct EventKey {
    /// Whether the level is ERROR, and not WARN.
    error: bool,
    /// The file and line of the source.
    place: (Option<&'static str>, Option<u32>),
    /// The message, followed by the text fields without a member below.
    text: String,
    publish: Option<String>,
    network: Option<String>,
    endpoint: Option<String>,
}

/// The number of repetitions of an event.
#[derive(Debug, PartialEq, Eq)]
struct RepeatCount {
    key: EventKey,
    times: u64,
    within: Duration,
}

#[derive(Debug)]
struct Window {
    opened: Instant,
    times: u64,
}

/// The open windows.
#[derive(Debug)]
struct Table {
    windows: BTreeMap<EventKey, Window>,
    limit: usize,
}

impl Table {
    const fn new(limit: usize) -> Self {
        Self { windows: BTreeMap::new(), limit }
    }

    /// Counts an event. Returns whether to log it, and the count of a window that was closed early
    /// to make room.
    fn note(&mut self, key: EventKey, now: Instant) -> (bool, Option<RepeatCount>) {
        if let Some(window) = self.windows.get_mut(&key) {
            window.times += 1;
            return (false, None);
        }
        let mut closed = None;
        if self.windows.len() >= self.limit {
            let first = self.windows.iter().min_by_key(|(_, window)| window.opened);
            let first = first.map(|(key, _)| key.clone());
            closed = first.and_then(|key| {
                let window = self.windows.remove(&key)?;
                repeated(key, &window, now)
            });
        }
        self.windows.insert(key, Window { opened: now, times: 0 });
        (true, closed)
    }

    /// Closes the windows that have expired at `now`.
    fn close(&mut self, now: Instant) -> Vec<RepeatCount> {
        let mut counts = Vec::new();
        self.windows.retain(|key, window| {
            if now < window.opened + WINDOW {
                return true;
            }
            counts.extend(repeated(key.clone(), window, now));
            let continues = window.times > 0;
            *window = Window { opened: now, times: 0 };
            continues
        });
        counts
    }

    /// Closes all windows.
    fn close_all(&mut self, now: Instant) -> Vec<RepeatCount> {
        let windows = std::mem::take(&mut self.windows);
        windows.into_iter().filter_map(|(key, window)| repeated(key, &window, now)).collect()
    }

    /// When the next window expires.
    fn next(&self) -> Option<Instant> {
        self.windows.values().map(|window| window.opened + WINDOW).min()
    }
}

fn repeated(key: EventKey, window: &Window, now: Instant) -> Option<RepeatCount> {
    let within = now.saturating_duration_since(window.opened);
    (window.times > 0).then_some(RepeatCount { key, times: window.times, within })
}

static TABLE: Mutex<Table> = Mutex::new(Table::new(LIMIT));
static REPETITION: Condvar = Condvar::new();
static REPORTER: Once = Once::new();

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// End of the target of events that begin or end a state. All of them are logged.
const STATE: &str = "::state";

/// Logs the first event of a window and counts the others.
pub(super) struct Limiter;

impl<S: Subscriber> Layer<S> for Limiter {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // The end of a state is logged at a lower level, so its next begin has to be as well.
        let is_state = metadata.target().ends_with(STATE);
        if *metadata.level() > Level::WARN || metadata.target() == TARGET || is_state {
            return true;
        }
        let mut key = EventKey {
            error: *metadata.level() == Level::ERROR,
            place: (metadata.file(), metadata.line()),
            text: String::new(),
            publish: None,
            network: None,
            endpoint: None,
        };
        event.record(&mut key);
        let now = Instant::now();
        let (is_first, counts) = {
            let mut table = table();
            let (is_first, closed) = table.note(key, now);
            // This also closes windows if the thread could not be started.
            (is_first, closed.into_iter().chain(table.close(now)).collect::<Vec<_>>())
        };
        if !is_first {
            // Without the thread, counts are reported with the next event or at the end.
            REPORTER.call_once(|| {
                let _ =
                    std::thread::Builder::new().name("tidegate-log".into()).spawn(report_expired);
            });
            REPETITION.notify_one();
        }
        // Without the lock: the report is an event and passes through here.
        counts.iter().for_each(report);
        is_first
    }
}

/// Closes windows when they expire, and reports their counts.
fn report_expired() {
    let mut open = table();
    loop {
        let counts = open.close(Instant::now());
        if !counts.is_empty() {
            drop(open);
            counts.iter().for_each(report);
            open = table();
        }
        let left = open.next().map(|next| next.saturating_duration_since(Instant::now()));
        open = match left {
            Some(left) => REPETITION
                .wait_timeout(open, left)
                .map_or_else(|lost| lost.into_inner().0, |(open, _)| open),
            None => REPETITION.wait(open).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// Reports all counts before the program ends.
pub fn flush() {
    let counts = table().close_all(Instant::now());
    counts.iter().for_each(report);
}

fn report(RepeatCount { key, times, within }: &RepeatCount) {
    let (text, seconds) = (&key.text, within.as_secs_f64().ceil());
    let (publish, network, endpoint) =
        (key.publish.as_deref(), key.network.as_deref(), key.endpoint.as_deref());
    if key.error {
        tracing::error!(target: TARGET, publish, network, endpoint, times, "{text}: repeated {times} times in {seconds} s");
    } else {
        tracing::warn!(target: TARGET, publish, network, endpoint, times, "{text}: repeated {times} times in {seconds} s");
    }
}

impl EventKey {
    fn append(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        match field.name() {
            "publish" => self.publish = Some(value.to_string()),
            "network" => self.network = Some(value.to_string()),
            "endpoint" => self.endpoint = Some(value.to_string()),
            "message" => self.text.insert_str(0, &value.to_string()),
            // Writing to a String cannot fail.
            name => drop(write!(self.text, " {name}={value}")),
        }
        let end =
            (0..=MAX_TEXT.min(self.text.len())).rev().find(|end| self.text.is_char_boundary(*end));
        self.text.truncate(end.unwrap_or(0));
    }
}

impl Visit for EventKey {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.append(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.append(field, format_args!("{value}"));
    }

    // Numbers are not part of the identity.
    fn record_f64(&mut self, _: &Field, _: f64) {}
    fn record_i64(&mut self, _: &Field, _: i64) {}
    fn record_u64(&mut self, _: &Field, _: u64) {}
    fn record_i128(&mut self, _: &Field, _: i128) {}
    fn record_u128(&mut self, _: &Field, _: u128) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> EventKey {
        let place = (Some("x.rs"), Some(1));
        EventKey {
            error: false,
            place,
            text: text.into(),
            publish: None,
            network: None,
            endpoint: None,
        }
    }

    #[test]
    fn the_first_event_is_logged_and_repetitions_are_counted_per_window() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut table = Table::new(8);
        assert_eq!(table.note(key("lost"), start), (true, None));
        for second in 1..=59 {
            assert_eq!(table.note(key("lost"), after(second)), (false, None));
            assert_eq!(table.close(after(second)), []);
        }
        assert_eq!(table.next(), Some(after(60)));
        let counts = table.close(after(60));
        assert_eq!(
            counts,
            [RepeatCount { key: key("lost"), times: 59, within: Duration::from_secs(60) }]
        );
        // The event continues: it is counted and not logged again.
        assert_eq!(table.note(key("lost"), after(61)), (false, None));
        assert_eq!(table.close(after(120))[0].times, 1);
        // After an empty window, the next event is a first one.
        assert_eq!(table.close(after(180)), []);
        assert_eq!(table.next(), None);
        assert_eq!(table.note(key("lost"), after(181)), (true, None));
    }

    #[test]
    fn events_of_different_ports_are_different() {
        let now = Instant::now();
        let mut table = Table::new(8);
        let of = |publish: &str| EventKey { publish: Some(publish.into()), ..key("closed") };
        assert!(table.note(of("0.0.0.0:80/tcp"), now).0);
        assert!(table.note(of("0.0.0.0:81/tcp"), now).0);
        assert!(!table.note(of("0.0.0.0:80/tcp"), now).0);
        assert!(table.note(EventKey { error: true, ..of("0.0.0.0:80/tcp") }, now).0);
    }

    #[test]
    fn windows_are_bounded_and_no_count_is_lost() {
        let start = Instant::now();
        let mut table = Table::new(3);
        let (mut logged, mut counts) = (0, 0);
        for index in 0..1000u64 {
            let now = start + Duration::from_millis(index);
            let (first, closed) = table.note(key(&format!("event {}", index / 4 % 7)), now);
            logged += u64::from(first);
            counts += closed.map_or(0, |repeated| repeated.times);
            assert!(table.windows.len() <= 3);
        }
        counts += table.close_all(start).iter().map(|repeated| repeated.times).sum::<u64>();
        assert_eq!(logged + counts, 1000);
        assert_eq!(table.next(), None);
    }
}
