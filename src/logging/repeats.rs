//! Warnings and errors that repeat themselves: said once, and counted from then on.
//!
//! # Theory of operation
//! Two events are the same when they come from the same place in the source and all that they say
//! in words is the same; numbers may differ. The first is let through and opens a window of
//! [`WINDOW`]. Those that follow within it are counted, and when it closes one line says how many
//! there were ("repeated 412 times in 60 s") and the next window opens. A window in which nothing
//! has happened closes for good, and what comes after that is a first one again.
//!
//! [`Table`] is pure and bounded: for a new event at the limit that window closes early which would
//! have closed first. A thread sees to it that windows close in time; there is none before
//! something repeats itself.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// How long repetitions are counted before they are told.
const WINDOW: Duration = Duration::from_secs(60);

/// Windows that may be open.
const LIMIT: usize = 256;

/// The most of an event's words that is remembered, in bytes.
const LONGEST: usize = 512;

/// The target of the lines that tell how often; they are let through.
const TARGET: &str = "tidegate::repeats";

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Said {
    /// It is an error, not a warning.
    error: bool,
    /// Where in the source.
    place: (Option<&'static str>, Option<u32>),
    /// Its message, with the words among its fields that have no place below.
    text: String,
    publish: Option<String>,
    network: Option<String>,
    endpoint: Option<String>,
}

/// How often something was repeated.
#[derive(Debug, PartialEq, Eq)]
struct Repeated {
    said: Said,
    times: u64,
    within: Duration,
}

#[derive(Debug)]
struct Window {
    opened: Instant,
    times: u64,
}

/// The windows that are open.
#[derive(Debug)]
struct Table {
    windows: BTreeMap<Said, Window>,
    limit: usize,
}

impl Table {
    const fn new(limit: usize) -> Self {
        Self { windows: BTreeMap::new(), limit }
    }

    /// Whether `said` is to be said now, and what has to be told because it could not be counted
    /// any more.
    fn note(&mut self, said: Said, now: Instant) -> (bool, Option<Repeated>) {
        if let Some(window) = self.windows.get_mut(&said) {
            window.times += 1;
            return (false, None);
        }
        let mut closed = None;
        if self.windows.len() >= self.limit {
            let first = self.windows.iter().min_by_key(|(_, window)| window.opened);
            let first = first.map(|(said, _)| said.clone());
            closed = first.and_then(|said| {
                let window = self.windows.remove(&said)?;
                repeated(said, &window, now)
            });
        }
        self.windows.insert(said, Window { opened: now, times: 0 });
        (true, closed)
    }

    /// Closes the windows whose time is over at `now`.
    fn close(&mut self, now: Instant) -> Vec<Repeated> {
        let mut told = Vec::new();
        self.windows.retain(|said, window| {
            if now < window.opened + WINDOW {
                return true;
            }
            told.extend(repeated(said.clone(), window, now));
            let goes_on = window.times > 0;
            *window = Window { opened: now, times: 0 };
            goes_on
        });
        told
    }

    /// Closes all of them.
    fn close_all(&mut self, now: Instant) -> Vec<Repeated> {
        let windows = std::mem::take(&mut self.windows);
        windows.into_iter().filter_map(|(said, window)| repeated(said, &window, now)).collect()
    }

    /// When the next one closes.
    fn next(&self) -> Option<Instant> {
        self.windows.values().map(|window| window.opened + WINDOW).min()
    }
}

fn repeated(said: Said, window: &Window, now: Instant) -> Option<Repeated> {
    let within = now.saturating_duration_since(window.opened);
    (window.times > 0).then_some(Repeated { said, times: window.times, within })
}

static TABLE: Mutex<Table> = Mutex::new(Table::new(LIMIT));
static REPEATS: Condvar = Condvar::new();
static KEEPER: Once = Once::new();

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets events through, or counts them.
pub(super) struct Limiter;

impl<S: Subscriber> Layer<S> for Limiter {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN || metadata.target() == TARGET {
            return true;
        }
        let mut said = Said {
            error: *metadata.level() == Level::ERROR,
            place: (metadata.file(), metadata.line()),
            text: String::new(),
            publish: None,
            network: None,
            endpoint: None,
        };
        event.record(&mut said);
        let now = Instant::now();
        let (is_first, told) = {
            let mut table = table();
            let (is_first, closed) = table.note(said, now);
            // Where there is no thread that does it.
            (is_first, closed.into_iter().chain(table.close(now)).collect::<Vec<_>>())
        };
        if !is_first {
            // Without a thread they are told with the next event, or at the end.
            KEEPER.call_once(|| {
                let _ = std::thread::Builder::new().name("tidegate-log".into()).spawn(keep);
            });
            REPEATS.notify_one();
        }
        // Not under the lock: it comes by here again.
        told.iter().for_each(tell);
        is_first
    }
}

/// Tells what is repeated when it is time.
fn keep() {
    let mut open = table();
    loop {
        let told = open.close(Instant::now());
        if !told.is_empty() {
            drop(open);
            told.iter().for_each(tell);
            open = table();
        }
        let left = open.next().map(|next| next.saturating_duration_since(Instant::now()));
        open = match left {
            Some(left) => REPEATS
                .wait_timeout(open, left)
                .map_or_else(|lost| lost.into_inner().0, |(open, _)| open),
            None => REPEATS.wait(open).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

/// Tells what has been repeated until now: the program ends.
pub fn flush() {
    let told = table().close_all(Instant::now());
    told.iter().for_each(tell);
}

fn tell(Repeated { said, times, within }: &Repeated) {
    let (text, seconds) = (&said.text, within.as_secs_f64().ceil());
    let (publish, network, endpoint) =
        (said.publish.as_deref(), said.network.as_deref(), said.endpoint.as_deref());
    if said.error {
        tracing::error!(target: TARGET, publish, network, endpoint, times, "{text}: repeated {times} times in {seconds} s");
    } else {
        tracing::warn!(target: TARGET, publish, network, endpoint, times, "{text}: repeated {times} times in {seconds} s");
    }
}

impl Said {
    fn word(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        match field.name() {
            "publish" => self.publish = Some(value.to_string()),
            "network" => self.network = Some(value.to_string()),
            "endpoint" => self.endpoint = Some(value.to_string()),
            "message" => self.text.insert_str(0, &value.to_string()),
            // Writing to a String does not fail.
            name => drop(write!(self.text, " {name}={value}")),
        }
        let end =
            (0..=LONGEST.min(self.text.len())).rev().find(|end| self.text.is_char_boundary(*end));
        self.text.truncate(end.unwrap_or(0));
    }
}

impl Visit for Said {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.word(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.word(field, format_args!("{value}"));
    }

    // Numbers do not make a difference.
    fn record_f64(&mut self, _: &Field, _: f64) {}
    fn record_i64(&mut self, _: &Field, _: i64) {}
    fn record_u64(&mut self, _: &Field, _: u64) {}
    fn record_i128(&mut self, _: &Field, _: i128) {}
    fn record_u128(&mut self, _: &Field, _: u128) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Said {
        let place = (Some("x.rs"), Some(1));
        Said {
            error: false,
            place,
            text: text.into(),
            publish: None,
            network: None,
            endpoint: None,
        }
    }

    #[test]
    fn the_first_is_said_and_the_rest_is_counted_and_told_once_a_window() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut table = Table::new(8);
        assert_eq!(table.note(said("lost"), start), (true, None));
        for second in 1..=59 {
            assert_eq!(table.note(said("lost"), after(second)), (false, None));
            assert_eq!(table.close(after(second)), []);
        }
        assert_eq!(table.next(), Some(after(60)));
        let told = table.close(after(60));
        assert_eq!(
            told,
            [Repeated { said: said("lost"), times: 59, within: Duration::from_secs(60) }]
        );
        // It goes on, and is not said again, but counted.
        assert_eq!(table.note(said("lost"), after(61)), (false, None));
        assert_eq!(table.close(after(120))[0].times, 1);
        // Nothing more: the next one is a first one.
        assert_eq!(table.close(after(180)), []);
        assert_eq!(table.next(), None);
        assert_eq!(table.note(said("lost"), after(181)), (true, None));
    }

    #[test]
    fn what_is_said_of_one_port_is_not_what_is_said_of_another() {
        let now = Instant::now();
        let mut table = Table::new(8);
        let of = |publish: &str| Said { publish: Some(publish.into()), ..said("closed") };
        assert!(table.note(of("0.0.0.0:80/tcp"), now).0);
        assert!(table.note(of("0.0.0.0:81/tcp"), now).0);
        assert!(!table.note(of("0.0.0.0:80/tcp"), now).0);
        assert!(table.note(Said { error: true, ..of("0.0.0.0:80/tcp") }, now).0);
    }

    #[test]
    fn there_are_no_more_windows_than_there_may_be_and_nothing_that_was_counted_is_lost() {
        let start = Instant::now();
        let mut table = Table::new(3);
        let (mut said_at_once, mut told) = (0, 0);
        for index in 0..1000u64 {
            let now = start + Duration::from_millis(index);
            let (first, closed) = table.note(said(&format!("event {}", index / 4 % 7)), now);
            said_at_once += u64::from(first);
            told += closed.map_or(0, |repeated| repeated.times);
            assert!(table.windows.len() <= 3);
        }
        told += table.close_all(start).iter().map(|repeated| repeated.times).sum::<u64>();
        assert_eq!(said_at_once + told, 1000);
        assert_eq!(table.next(), None);
    }
}
