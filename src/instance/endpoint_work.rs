//! Work in the namespaces of endpoints, on one thread per busy endpoint. Root in a container can
//! make such work slow.
//!
//! The kernel runs one nftables transaction per namespace at a time, and each visits all chains of
//! the namespace. Policy rules are a list that the kernel walks for every new rule. With 100,000
//! of either, or with continuous transactions, our requests in the namespace take seconds and
//! cannot be interrupted. Each endpoint therefore delays only itself. Work that takes longer than
//! [`DEADLINE`] is reported.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_netns::drop_in_background;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep_until};

/// Duration of work after which it is reported. It takes about 1 ms on an idle machine.
pub(super) const DEADLINE: Duration = Duration::from_secs(1);

/// An event of [`EndpointWork`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress<T> {
    /// Work of `endpoint` is done.
    Done { endpoint: String, outcome: T },
    /// Work of `endpoint` takes longer than [`DEADLINE`] and continues.
    Overdue { endpoint: String },
}

/// Runs work with results of type `T`, one item per endpoint at a time.
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

    pub(super) fn is_busy(&self, endpoint: &str) -> bool {
        self.table.running.contains_key(endpoint)
    }

    /// Returns whether no endpoint is busy.
    pub(super) fn is_idle(&self) -> bool {
        self.table.running.is_empty()
    }

    /// Starts `work` of `endpoint`, which must not be busy. Runs it on the calling thread if no
    /// thread can be created.
    pub(super) fn start(&mut self, endpoint: &str, work: impl FnOnce() -> T + Send + 'static) {
        let number = self.table.begin(endpoint, Instant::now());
        let (sender, name) = (self.sender.clone(), endpoint.to_owned());
        let run = move || {
            // Fails if the receiver was dropped, at shutdown.
            let _ = sender.send((name, number, work()));
        };
        // Shared, because a failing `spawn` drops the closure that it was given.
        let run = Arc::new(Mutex::new(Some(run)));
        let shared = Arc::clone(&run);
        let started = std::thread::Builder::new().name("tidegate-inside".into()).spawn(move || {
            if let Some(run) = take(&shared) {
                run();
            }
        });
        if let Err(error) = started {
            tracing::debug!(endpoint, %error, "no thread for work in the endpoint's namespace");
            if let Some(run) = take(&run) {
                run();
            }
        }
    }

    /// Marks `endpoint` as not busy. Its work continues, and its result is discarded.
    pub(super) fn abandon(&mut self, endpoint: &str) {
        self.table.running.remove(endpoint);
    }

    /// Waits until work is done or overdue. Cancel safe.
    pub(super) async fn next(&mut self) -> Progress<T> {
        loop {
            let deadline = self.table.next_deadline();
            tokio::select! {
                // The channel stays open: `self` holds a sender.
                Some((endpoint, number, outcome)) = self.receiver.recv() => {
                    if self.table.end(&endpoint, number) {
                        return Progress::Done { endpoint, outcome };
                    }
                    // Dropping it can block like the work itself: it may hold a DNS server.
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

/// Busy endpoints with their start times. Pure.
#[derive(Debug, Default)]
struct WorkTable {
    running: BTreeMap<String, Running>,
    /// The last assigned work number.
    last: u64,
}

#[derive(Debug)]
struct Running {
    number: u64,
    since: Instant,
    is_reported: bool,
}

impl WorkTable {
    /// Records the start of work. Returns its number.
    fn begin(&mut self, endpoint: &str, now: Instant) -> u64 {
        self.last += 1;
        let running = Running { number: self.last, since: now, is_reported: false };
        self.running.insert(endpoint.to_owned(), running);
        self.last
    }

    /// Records the end of work `number` of `endpoint`. Returns false if it was abandoned.
    fn end(&mut self, endpoint: &str, number: u64) -> bool {
        let is_it = self.running.get(endpoint).is_some_and(|running| running.number == number);
        is_it && self.running.remove(endpoint).is_some()
    }

    /// When the next work becomes overdue. Reported work is not considered.
    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self.running.values().filter(|running| !running.is_reported);
        waiting.map(|running| running.since + DEADLINE).min()
    }

    /// An endpoint whose work is overdue at `now`. Returns each work once.
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
    fn overdue_work_is_reported_once_and_abandoned_work_is_ignored() {
        let (mut table, start) = (WorkTable::default(), Instant::now());
        let first = table.begin("web", start);
        assert_eq!(table.next_deadline(), Some(start + DEADLINE));
        assert_eq!(table.overdue(start), None);
        assert_eq!(table.overdue(start + DEADLINE).as_deref(), Some("web"));
        assert_eq!(table.overdue(start + 2 * DEADLINE), None);
        assert_eq!(table.next_deadline(), None);
        let second = table.begin("web", start + 2 * DEADLINE);
        assert!(!table.end("web", first), "replaced by the second");
        assert!(table.end("web", second));
        assert!(!table.end("web", second));
    }

    #[tokio::test]
    async fn a_slow_endpoint_does_not_delay_others() {
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
    async fn the_outcome_of_abandoned_work_is_discarded() {
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
