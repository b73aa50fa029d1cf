//! State shared by all loops, and the commands that they receive.

use crate::config::Settings;
use crate::listener::Listener;
use crate::metrics::ProcessMetrics;
use crate::port::{Port, Refusal};
use crate::tcp::{Accepted, Reservation, Shares};
use crate::udp::LoopGuard;
use crate::upstream::BackendId;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;
use tidegate_model::LogInterval;
use tidegate_reactor::{Descriptors, EventLoop, Sender};

/// A command for a loop.
#[derive(Debug)]
pub(crate) enum Message {
    /// Serve these ports.
    Publish(Vec<(Arc<Port>, Listener)>),
    /// Close this port and end its flows. `done` is dropped when that is complete.
    Unpublish { port: Arc<Port>, done: mpsc::Sender<()> },
    /// End the flows of these clients. `done` is dropped when that is complete.
    EndClients { clients: Arc<BTreeSet<IpAddr>>, done: mpsc::Sender<()> },
    /// Reset the connections to these backends.
    EndBackends { backends: Arc<BTreeSet<BackendId>>, done: mpsc::Sender<()> },
    /// Take over a connection that another loop accepted.
    Adopt(Box<(Accepted, Reservation)>),
    /// Take over a connection that another loop accepted. Evict a connection of this loop for it,
    /// because of `limit`.
    AdmitByEviction { accepted: Box<Accepted>, limit: Refusal },
    /// The byte budget is exceeded, and the connection to evict is in this loop.
    EnforceByteBudget,
    /// Stop accepting; running connections continue. `done` is dropped when that is complete.
    Drain { done: mpsc::Sender<()> },
    /// Reset all connections and exit.
    Stop,
}

/// State shared by all loops.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) descriptors: Arc<Descriptors>,
    /// TCP connections of each loop. The length is the maximum number of loops.
    pub(crate) loads: Box<[AtomicUsize]>,
    pub(crate) shares: Arc<Shares>,
    /// Whether TCP ports with different port numbers are published.
    pub(crate) several_ports: AtomicBool,
    pub(crate) metrics: ProcessMetrics,
    pub(crate) pause_log: LogInterval,
    pub(crate) limit_logs: [LogInterval; Refusal::ALL.len()],
    pub(crate) budget_log: LogInterval,
    pub(crate) loop_guard: LoopGuard,
    /// Called by each thread before anything else.
    pub(crate) prepare: Prepare,
    /// Runs a loop on its thread.
    pub(crate) run: Run,
    pub(crate) loops: Mutex<Vec<Option<Loop>>>,
}

/// Runs the loop with this index until it is stopped.
pub(crate) type Run = fn(usize, Arc<Shared>, EventLoop<Message>);

/// Prepares the calling thread.
pub(crate) type Prepare = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// A running loop.
pub(crate) struct Loop {
    pub(crate) sender: Sender<Message>,
    pub(crate) thread: JoinHandle<()>,
}

impl Shared {
    /// TCP connections of all loops.
    pub(crate) fn connections(&self) -> usize {
        self.loads.iter().map(|load| load.load(Ordering::Relaxed)).sum()
    }

    /// Logs that `limit` is reached at `port`, with the largest client; at most once a minute per
    /// limit.
    pub(crate) fn log_limit(&self, port: &Port, limit: Refusal, now: Instant) {
        if self.limit_logs[limit as usize].is_due(now) {
            let (client, held) = self.shares.usage().largest.unzip();
            tracing::warn!(
                publish = %port.label,
                limit = limit.as_str(),
                largest = client.map(|client| client.to_string()),
                connections = held,
                "limit of connections reached"
            );
        }
    }

    /// Logs that the byte budget is exhausted, with the largest client; at most once a minute.
    pub(crate) fn log_budget(&self, port: &Port, now: Instant) {
        if self.budget_log.is_due(now) {
            let (client, bytes) = self.shares.usage().largest_of_bytes.unzip();
            tracing::warn!(
                publish = %port.label,
                limit = self.settings.held_bytes,
                largest = client.map(|client| client.to_string()),
                bytes,
                "limit of bytes held for peers that do not read reached"
            );
        }
    }

    /// The loop with the fewest TCP connections, started or not.
    pub(crate) fn least_loaded(&self) -> usize {
        let load = |index: &usize| self.loads[*index].load(Ordering::Relaxed);
        (0..self.loads.len()).min_by_key(load).unwrap_or(0)
    }

    /// Sends `message` to loop `index`, and starts the loop if necessary.
    ///
    /// # Errors
    /// Returns the message if the loop cannot be started or has ended.
    pub(crate) fn send(self: &Arc<Self>, index: usize, message: Message) -> Result<(), Message> {
        if let Err(error) = self.ensure_started(index) {
            tracing::error!(%error, "event loop could not be started");
            return Err(message);
        }
        match &self.loops()[index] {
            Some(Loop { sender, .. }) => sender.send(message).map_err(|closed| closed.0),
            None => Err(message),
        }
    }

    /// Starts loop `index` if necessary.
    ///
    /// # Errors
    /// Errors of its preparation, `EMFILE`, and `EAGAIN` at the limit on threads.
    pub(crate) fn ensure_started(self: &Arc<Self>, index: usize) -> io::Result<()> {
        let mut loops = self.loops();
        if loops[index].is_none() {
            loops[index] = Some(self.start(index)?);
        }
        Ok(())
    }

    fn start(self: &Arc<Self>, index: usize) -> io::Result<Loop> {
        let (event_loop, sender) = EventLoop::new()?;
        let shared = Arc::clone(self);
        let (prepared, is_prepared) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("tidegate-data-{index}")).spawn(
            move || {
                let ready = (shared.prepare)();
                let failed = ready.is_err();
                // `start` waits for this result below.
                let _ = prepared.send(ready);
                if failed {
                    return;
                }
                (shared.run)(index, Arc::clone(&shared), event_loop);
            },
        )?;
        // `prepare` has panicked if the channel is closed.
        is_prepared.recv().unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Loop { sender, thread })
    }

    pub(crate) fn loops(&self) -> MutexGuard<'_, Vec<Option<Loop>>> {
        self.loops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `message` to every running loop, and waits until each has dropped its `done`.
    pub(crate) fn broadcast(&self, message: impl Fn(mpsc::Sender<()>) -> Message) {
        let (done, all_done) = mpsc::channel();
        for running in self.loops().iter().flatten() {
            // A loop that has ended has closed its ports.
            let _ = running.sender.send(message(done.clone()));
        }
        drop(done);
        // Nothing is sent on this channel; `recv` returns when the last sender is dropped.
        let _ = all_done.recv();
    }
}
