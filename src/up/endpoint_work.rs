//! Work in the namespaces of endpoints whose duration root in a container decides: a thread for
//! each endpoint, as long as there is work for it.
//!
//! The kernel carries out one transaction of nftables in a namespace at a time, and each visits all
//! chains that the namespace has. Policy rules are a list that is walked for every new one. With
//! 100,000 of either, or with transactions without end, a container makes what we do there take
//! seconds. That cannot be interrupted, so nobody waits for it but the endpoint itself, and what
//! takes longer than [`DEADLINE`] is reported.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_netns::drop_in_background;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep_until};

/// How long work in a namespace may take before it is reported. On an idle machine it is a
/// millisecond.
pub(super) const DEADLINE: Duration = Duration::from_secs(1);

/// What has become of work.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress<T> {
    /// It is done.
    Done {
        /// Of which endpoint.
        endpoint: String,
        /// What came of it.
        outcome: T,
    },
    /// It takes longer than [`DEADLINE`], and goes on.
    Overdue {
        /// Of which endpoint.
        endpoint: String,
    },
}

/// Runs work of type `T`, for each endpoint one piece at a time.
pub(super) struct EndpointWork<T> {
    table: WorkTable,
    sender: UnboundedSender<(String, u64, T)>,
    receiver: UnboundedReceiver<(String, u64, T)>,
}

impl<T> fmt::Debug for EndpointWork<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EndpointWork").field(&self.table).finish()
    }
}

impl<T: Send + 'static> EndpointWork<T> {
    pub(super) fn new() -> Self {
        let (sender, receiver) = unbounded_channel();
        Self { table: WorkTable::default(), sender, receiver }
    }

    /// Whether work of `endpoint` goes on.
    pub(super) fn is_busy(&self, endpoint: &str) -> bool {
        self.table.running.contains_key(endpoint)
    }

    /// Whether work of any endpoint goes on.
    pub(super) fn is_idle(&self) -> bool {
        self.table.running.is_empty()
    }

    /// Begins `work` of `endpoint`, which is not busy. It is done here and now if no thread can be
    /// started.
    pub(super) fn start(&mut self, endpoint: &str, work: impl FnOnce() -> T + Send + 'static) {
        let number = self.table.begin(endpoint, Instant::now());
        let (sender, name) = (self.sender.clone(), endpoint.to_owned());
        let run = move || {
            // Who has abandoned it and gone does not hear of it.
            let _ = sender.send((name, number, work()));
        };
        // A closure that no thread could be started for is lost otherwise.
        let run = Arc::new(Mutex::new(Some(run)));
        let theirs = Arc::clone(&run);
        let started = std::thread::Builder::new().name("tidegate-inside".into()).spawn(move || {
            if let Some(run) = take(&theirs) {
                run();
            }
        });
        if let Err(error) = started {
            tracing::debug!(endpoint, %error, "no thread for work in its namespace");
            if let Some(run) = take(&run) {
                run();
            }
        }
    }

    /// Forgets the work of `endpoint`, which goes on: nobody hears what comes of it.
    pub(super) fn abandon(&mut self, endpoint: &str) {
        self.table.running.remove(endpoint);
    }

    /// Waits until work is done or overdue. May be cancelled.
    pub(super) async fn next(&mut self) -> Progress<T> {
        loop {
            let deadline = self.table.next_deadline();
            tokio::select! {
                // The channel does not end: there is a sender here.
                Some((endpoint, number, outcome)) = self.receiver.recv() => {
                    if self.table.end(&endpoint, number) {
                        return Progress::Done { endpoint, outcome };
                    }
                    // It may hold what takes as long to take back.
                    drop_in_background(outcome);
                }
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    if let Some(endpoint) = self.table.overdue(Instant::now()) {
                        return Progress::Overdue { endpoint };
                    }
                }
            }
        }
    }
}

fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Which endpoints are busy since when. Pure.
#[derive(Debug, Default)]
struct WorkTable {
    running: BTreeMap<String, Running>,
    /// The last number that was given out.
    last: u64,
}

#[derive(Debug)]
struct Running {
    number: u64,
    since: Instant,
    is_reported: bool,
}

impl WorkTable {
    /// Notes that work of `endpoint` begins. Returns its number.
    fn begin(&mut self, endpoint: &str, now: Instant) -> u64 {
        self.last += 1;
        let running = Running { number: self.last, since: now, is_reported: false };
        self.running.insert(endpoint.to_owned(), running);
        self.last
    }

    /// Notes that work `number` of `endpoint` has ended. False if it was abandoned.
    fn end(&mut self, endpoint: &str, number: u64) -> bool {
        let is_it = self.running.get(endpoint).is_some_and(|running| running.number == number);
        is_it && self.running.remove(endpoint).is_some()
    }

    /// When the next work is overdue that was not reported.
    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.running.values().filter(|running| !running.is_reported);
        waiting.map(|running| running.since + DEADLINE).min()
    }

    /// An endpoint whose work is overdue at `now`, each once.
    fn overdue(&mut self, now: Instant) -> Option<String> {
        let is_overdue =
            |running: &Running| !running.is_reported && running.since + DEADLINE <= now;
        let (endpoint, running) =
            self.running.iter_mut().find(|(_, running)| is_overdue(running))?;
        running.is_reported = true;
        Some(endpoint.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn overdue_work_is_reported_once_and_abandoned_work_never_ends() {
        let (mut table, start) = (WorkTable::default(), Instant::now());
        let first = table.begin("web", start);
        assert_eq!(table.next_deadline(), Some(start + DEADLINE));
        assert_eq!(table.overdue(start), None);
        assert_eq!(table.overdue(start + DEADLINE).as_deref(), Some("web"));
        assert_eq!(table.overdue(start + 2 * DEADLINE), None);
        assert_eq!(table.next_deadline(), None);
        let second = table.begin("web", start + 2 * DEADLINE);
        assert!(!table.end("web", first), "another one has taken its place");
        assert!(table.end("web", second));
        assert!(!table.end("web", second));
    }

    #[tokio::test]
    async fn an_endpoint_that_is_slow_delays_no_other() {
        let mut work = EndpointWork::new();
        let (go, wait) = channel::<()>();
        work.start("slow", move || {
            let _ = wait.recv();
            1
        });
        work.start("quick", || 2);
        let done =
            |endpoint: &str, outcome| Progress::Done { endpoint: endpoint.to_owned(), outcome };
        assert_eq!(work.next().await, done("quick", 2));
        assert!(work.is_busy("slow") && !work.is_busy("quick"));
        assert_eq!(work.next().await, Progress::Overdue { endpoint: "slow".to_owned() });
        drop(go);
        assert_eq!(work.next().await, done("slow", 1));
        assert!(work.is_idle());
    }

    #[tokio::test]
    async fn what_comes_of_abandoned_work_is_not_told() {
        let mut work = EndpointWork::new();
        let (go, wait) = channel::<()>();
        work.start("web", move || {
            let _ = wait.recv();
            1
        });
        work.abandon("web");
        work.start("web", || 2);
        drop(go);
        let done = Progress::Done { endpoint: "web".to_owned(), outcome: 2 };
        assert_eq!(work.next().await, done);
        assert!(work.is_idle());
    }
}
