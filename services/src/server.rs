//! Answers the requests to a supervisor process, see [`wire`](super::wire).
//!
//! Every limit protects the services and other clients from a client that sends or reads nothing.
//! Only clients of the same user are served.

use super::log::{Dropped, Limits, LogLine, size_of_line};
use super::output::SharedLog;
use super::protocol::Inbox;
use super::wire::{Failure, Reply, Request};
use super::wire::{encode_message, receive_message, send_message};
use super::{RemoteSpec, Status, Supervisor};
use rustix::process::geteuid;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidegate_netns::Namespace;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Maximum number of connections.
pub(super) const MAX_CONNECTIONS: usize = 32;

/// Maximum number of connections that transfer logs. The remaining ones are for the daemon, which
/// must be able to stop the services.
pub(super) const MAX_LOG_READERS: usize = 24;

/// Maximum size of the lines that readers of the log have not received, in bytes. They exist in
/// addition to the lines of the log if these were dropped from it.
const MAX_TRANSFER: usize = 32 * 1024 * 1024;

/// Maximum time from the connection to the complete request.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum time for the last messages to clients: when a follower was too slow, and when the
/// process ends.
const LAST_MESSAGES: Duration = Duration::from_secs(2);

/// Pause after accept(2) has failed, usually for lack of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Maximum number of lines that are sent in one system call.
const BATCH: usize = 32;

/// Progress of the process. It only increases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    Serving,
    /// Services are being stopped.
    Stopping,
    /// All services have ended. Readers get what they have not received yet.
    Ended,
}

/// The state of a supervisor process.
#[derive(Debug)]
pub(super) struct Server {
    directory: PathBuf,
    /// The program that runs as the init of services.
    init: PathBuf,
    namespaces: BTreeMap<String, Namespace>,
    log: SharedLog,
    statuses: watch::Sender<Vec<Status>>,
    /// Locked while services start. `None` until a start has succeeded.
    supervisor: Mutex<Option<Supervisor>>,
    /// Set by the first successful start.
    started: AtomicBool,
    phase: watch::Sender<Phase>,
    log_readers: Semaphore,
    transfer: Semaphore,
}

impl Server {
    /// A server without services. Their files are in `directory`.
    pub(super) fn new(directory: PathBuf, namespaces: BTreeMap<String, Namespace>) -> Self {
        Self {
            directory,
            init: PathBuf::from("/proc/self/exe"),
            namespaces,
            log: SharedLog::new(Limits::default()),
            statuses: watch::Sender::default(),
            supervisor: Mutex::default(),
            started: AtomicBool::new(false),
            phase: watch::Sender::new(Phase::Serving),
            log_readers: Semaphore::new(MAX_LOG_READERS),
            transfer: Semaphore::new(MAX_TRANSFER),
        }
    }

    /// Serves until a client or the end of `stop` stops the services. Returns when all services
    /// have ended and clients have received their last messages.
    pub(super) async fn serve(self: Arc<Self>, listener: UnixListener, stop: impl Future) {
        let mut connections = JoinSet::new();
        let stopped = async {
            let mut phase = self.phase.subscribe();
            tokio::select! {
                _ = stop => {}
                _ = phase.wait_for(|phase| *phase >= Phase::Stopping) => {}
            }
            self.stop_services().await;
        };
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                () = &mut stopped => break,
                Some(_) = connections.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) if is_own(&stream) => {
                        if connections.len() < MAX_CONNECTIONS {
                            connections.spawn(Arc::clone(&self).answer(stream));
                        } else {
                            refuse(stream);
                        }
                    }
                    Ok(_) => {}
                    Err(_) => sleep(ACCEPT_PAUSE).await,
                },
            }
        }
        drop(listener);
        let all = async { while connections.join_next().await.is_some() {} };
        let _ = timeout(LAST_MESSAGES, all).await;
    }

    /// Stops all services. Waits for a start in progress, which the phase interrupts.
    async fn stop_services(&self) {
        self.phase.send_replace(Phase::Stopping);
        if let Some(supervisor) = self.supervisor.lock().await.as_mut() {
            supervisor.stop().await;
        }
        self.phase.send_replace(Phase::Ended);
    }

    async fn answer(self: Arc<Self>, mut stream: UnixStream) {
        let mut inbox = Inbox::default();
        let request = timeout(REQUEST_TIMEOUT, receive_message(&mut inbox, &mut stream)).await;
        // An error means that the client has closed the connection.
        let _ = match request {
            Err(_) => return,
            Ok(Err(error)) => match error.into_failure() {
                Some(failure) => fail(&mut stream, failure).await,
                None => return,
            },
            Ok(Ok(request)) => self.handle(request, &mut stream).await,
        };
    }

    async fn handle(self: Arc<Self>, request: Request, stream: &mut UnixStream) -> io::Result<()> {
        match request {
            Request::Describe => {
                let number = |namespace: &Namespace| namespace.as_fd().as_raw_fd();
                let numbers = self.namespaces.iter();
                let numbers = numbers.map(|(name, one)| (name.clone(), number(one))).collect();
                reply(stream, Reply::Description(numbers)).await
            }
            Request::Start { specs, grace_ms } => {
                let grace = Duration::from_millis(grace_ms);
                // On its own task: the start continues when the client disconnects.
                let start = tokio::spawn(async move { self.start(specs, grace).await });
                match start.await {
                    Ok(Ok(())) => reply(stream, Reply::Done).await,
                    Ok(Err(failure)) => fail(stream, failure).await,
                    Err(error) => fail(stream, Failure::Other(error.to_string())).await,
                }
            }
            Request::IsStarted => {
                // Waits for a start in progress. `stop_services` holds the lock as well, but does
                // not change the result.
                let mut phase = self.phase.subscribe();
                tokio::select! {
                    _ = self.supervisor.lock() => {}
                    _ = phase.wait_for(|phase| *phase >= Phase::Stopping) => {}
                }
                reply(stream, Reply::Started(self.started.load(Ordering::Relaxed))).await
            }
            Request::Statuses => self.stream_statuses(stream).await,
            Request::Logs { service, tail, follow } => {
                self.stream_logs(stream, service.as_deref(), tail, follow).await
            }
            Request::Stop => {
                self.phase.send_if_modified(|phase| {
                    let serves = *phase == Phase::Serving;
                    if serves {
                        *phase = Phase::Stopping;
                    }
                    serves
                });
                reply(stream, Reply::Done).await
            }
        }
    }

    async fn start(&self, specs: Vec<RemoteSpec>, grace: Duration) -> Result<(), Failure> {
        let mut phase = self.phase.subscribe();
        if *phase.borrow() != Phase::Serving {
            return Err(Failure::Stopping);
        }
        let mut supervisor = self.supervisor.try_lock().map_err(|_| Failure::Starting)?;
        if supervisor.is_some() {
            return Err(Failure::AlreadyStarted);
        }
        let in_namespace = |spec: RemoteSpec| match self.namespaces.get(&spec.name) {
            Some(namespace) => Ok(spec.in_namespace(namespace.clone())),
            None => Err(Failure::UnknownService(spec.name)),
        };
        let specs = specs.into_iter().map(in_namespace).collect::<Result<Vec<_>, _>>()?;
        let (log, statuses) = (self.log.clone(), self.statuses.clone());
        let mut starting = Supervisor::with_log(&self.directory, log, statuses, grace)
            .with_init(self.init.clone());
        tokio::select! {
            // After an error, the services have been stopped.
            started = starting.start(specs) => {
                started.map_err(|error| Failure::Other(error.to_string()))?;
            }
            _ = phase.wait_for(|phase| *phase >= Phase::Stopping) => {
                *supervisor = Some(starting);
                return Err(Failure::Stopping);
            }
        }
        *supervisor = Some(starting);
        self.started.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Sends all statuses now and after each change. Several changes may be sent as one.
    async fn stream_statuses(&self, stream: &mut UnixStream) -> io::Result<()> {
        let (mut reader, mut writer) = stream.split();
        let (mut statuses, mut phase) = (self.statuses.subscribe(), self.phase.subscribe());
        reply(&mut writer, Reply::Done).await?;
        loop {
            // In this order, so that the last statuses are sent.
            let ended = *phase.borrow() == Phase::Ended;
            let current = statuses.borrow_and_update().clone();
            reply(&mut writer, Reply::Statuses(current)).await?;
            if ended {
                return reply(&mut writer, Reply::End).await;
            }
            tokio::select! {
                _ = statuses.changed() => {}
                _ = phase.wait_for(|phase| *phase == Phase::Ended) => {}
                () = closed(&mut reader) => return Ok(()),
            }
        }
    }

    async fn stream_logs(
        &self,
        stream: &mut UnixStream,
        service: Option<&str>,
        tail: usize,
        follow: bool,
    ) -> io::Result<()> {
        if let Some(unknown) = service.filter(|name| !self.namespaces.contains_key(*name)) {
            return fail(stream, Failure::UnknownService(unknown.to_owned())).await;
        }
        let (lines, position) = {
            let log = self.log.lock();
            (log.tail(service, tail), log.end())
        };
        let size = lines.iter().map(|line| size_of_line(line)).sum::<usize>();
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let (Ok(_reader), Ok(transfer)) =
            (self.log_readers.try_acquire(), self.transfer.try_acquire_many(size))
        else {
            return fail(stream, Failure::TooManyLogReaders).await;
        };
        let (mut reader, mut writer) = stream.split();
        reply(&mut writer, Reply::Done).await?;
        for batch in lines.chunks(BATCH) {
            writer.write_all(&encode_lines(batch)?).await?;
        }
        drop((lines, transfer));
        if !follow {
            return reply(&mut writer, Reply::End).await;
        }
        match self.follow(&mut reader, &mut writer, service, position).await? {
            Followed::ToTheEnd => reply(&mut writer, Reply::End).await,
            Followed::Dropped => {
                let last = reply(&mut writer, Reply::Dropped);
                timeout(LAST_MESSAGES, last).await.unwrap_or(Ok(()))
            }
            Followed::Closed => Ok(()),
        }
    }

    /// Sends the lines from number `position` on.
    async fn follow(
        &self,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
        service: Option<&str>,
        mut position: u64,
    ) -> io::Result<Followed> {
        let (mut changes, mut phase) = (self.log.changes(), self.phase.subscribe());
        loop {
            // In this order, so that the last lines are sent.
            let ended = *phase.borrow() == Phase::Ended;
            changes.mark_unchanged();
            let read = self.log.lock().read(service, position, BATCH);
            let Ok((lines, next)) = read else { return Ok(Followed::Dropped) };
            position = next;
            if !lines.is_empty() {
                let batch = encode_lines(&lines)?;
                drop(lines);
                let mut sent = 0;
                let is_sent = tokio::select! {
                    result = write_counted(writer, &batch, &mut sent) => { result?; true }
                    Dropped = self.log.dropped(service, position) => false,
                };
                if !is_sent {
                    let rest = writer.write_all(&batch[sent..]);
                    return match timeout(LAST_MESSAGES, rest).await {
                        Ok(result) => result.map(|()| Followed::Dropped),
                        Err(_) => Ok(Followed::Closed),
                    };
                }
                continue;
            }
            if ended {
                return Ok(Followed::ToTheEnd);
            }
            tokio::select! {
                _ = changes.changed() => {}
                _ = phase.wait_for(|phase| *phase == Phase::Ended) => {}
                () = closed(reader) => return Ok(Followed::Closed),
            }
        }
    }
}

/// Why a log is not followed any longer.
enum Followed {
    /// All services have ended.
    ToTheEnd,
    /// Lines were dropped that the client has not received.
    Dropped,
    /// The client has closed the connection, or reads nothing.
    Closed,
}

/// Returns whether the peer is of the user of this process.
fn is_own(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == geteuid().as_raw())
}

/// Answers a connection above the limit.
fn refuse(stream: UnixStream) {
    let failure = Reply::<()>::Failed(Failure::TooManyConnections);
    let (Ok(stream), Ok(message)) = (stream.into_std(), encode_message(&failure)) else { return };
    // Does not block. The message fits into the empty buffer.
    let _ = io::Write::write(&mut &stream, &message);
}

async fn reply(socket: &mut (impl AsyncWrite + Unpin), reply: Reply) -> io::Result<()> {
    send_message(socket, &reply).await
}

async fn fail(socket: &mut (impl AsyncWrite + Unpin), failure: Failure) -> io::Result<()> {
    reply(socket, Reply::Failed(failure)).await
}

fn encode_lines(lines: &[Arc<LogLine>]) -> io::Result<Vec<u8>> {
    let mut batch = Vec::new();
    for line in lines {
        batch.extend(encode_message(&Reply::Line(&**line))?);
    }
    Ok(batch)
}

/// Writes `bytes` and counts in `sent`, which remains valid if the call is cancelled.
async fn write_counted(
    writer: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    sent: &mut usize,
) -> io::Result<()> {
    while *sent < bytes.len() {
        match writer.write(&bytes[*sent..]).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => *sent += written,
        }
    }
    Ok(())
}

/// Waits until the client closes the connection. A second request counts as such.
async fn closed(reader: &mut (impl AsyncRead + Unpin)) {
    let _ = reader.read(&mut [0; 1]).await;
}

#[cfg(test)]
mod tests;
