//! DNS over TCP (RFC 7766): pipelined queries, answered as responses become available.
//!
//! A client costs a task and the bytes of an incomplete query. tidegate reads from it only while
//! fewer than [`PIPELINE`] of its queries are outstanding and fewer than [`MAX_UNSENT`] bytes of
//! responses are unsent. A client is closed when it is idle, stops within a query, or does not
//! read.

use super::clients::{Activity, Clients, limit};
use super::sockets::{Binding, report};
use crate::handler::{Channel, Outcome, ServerContext};
use crate::metrics::Overload;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Idle timeout (RFC 7766 section 6.2.3: "on the order of seconds").
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of an incomplete query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Outstanding queries of one client.
const PIPELINE: usize = 64;
/// Limit of unsent responses in bytes, which the last response may exceed.
const MAX_UNSENT: usize = 64 << 10;
/// Maximum size of a query in bytes. A longer length field closes the connection.
const MAX_QUERY: usize = 4096;
/// Pause after a failed accept, for example without free descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves clients of `listener` until the task is aborted, which closes them.
pub(super) async fn serve(
    mut listener: TcpListener,
    binding: Binding,
    context: Arc<ServerContext>,
) {
    let mut clients = Clients::default();
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                let revived = binding.revive_listener(&listener, &error);
                let is_revived = matches!(revived, Ok(true));
                report(&context, "tcp", revived, &error);
                if is_revived {
                    // The runtime keeps the closed state (`EPOLLHUP`) of a registered socket, so it
                    // is registered again.
                    match listener.into_std().and_then(TcpListener::from_std) {
                        Ok(registered) => listener = registered,
                        Err(error) => {
                            return report(
                                &context,
                                "tcp",
                                Err(error),
                                &io::ErrorKind::Other.into(),
                            );
                        }
                    }
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let partition = context.shared.zones().view(&context.client_id, client.ip()).partition();
        let Some(admitted) = context.shared.admit(partition) else {
            context.shared.metrics.refused(Overload::Clients, Some(&context.client_id));
            continue;
        };
        if clients.make_room(limit(&context)) {
            context.shared.metrics.refused(Overload::Clients, Some(&context.client_id));
            tracing::debug!(
                endpoint = context.client_id.endpoint(),
                network = context.client_id.network(),
                "idle DNS client closed for a new one"
            );
        }
        let activity = clients.activity();
        let connection =
            ClientConnection::new(stream, client, Arc::clone(&context), Arc::clone(&activity));
        let task = tasks.spawn(async move {
            connection.run().await;
            drop(admitted);
        });
        clients.add(task, activity);
    }
}

/// The connection of one client.
struct ClientConnection {
    stream: TcpStream,
    client: SocketAddr,
    context: Arc<ServerContext>,
    activity: Arc<Activity>,
    /// Received bytes of an incomplete query.
    inbox: Vec<u8>,
    /// Framed responses, of which `sent` bytes are sent.
    outbox: Vec<u8>,
    sent: usize,
    /// Outstanding queries.
    waiting: usize,
    /// The client has closed its side.
    ended: bool,
    /// Time at which the connection is closed.
    until: Instant,
}

impl ClientConnection {
    fn new(
        stream: TcpStream,
        client: SocketAddr,
        context: Arc<ServerContext>,
        activity: Arc<Activity>,
    ) -> Self {
        // Responses are small and complete, so Nagle's algorithm would only delay them.
        let _ = stream.set_nodelay(true);
        let until = Instant::now() + IDLE_TIMEOUT;
        let (inbox, outbox) = (Vec::new(), Vec::new());
        Self {
            stream,
            client,
            context,
            activity,
            inbox,
            outbox,
            sent: 0,
            waiting: 0,
            ended: false,
            until,
        }
    }

    async fn run(mut self) {
        let (sender, mut answers) = mpsc::channel::<Vec<u8>>(PIPELINE);
        loop {
            let unsent = self.sent < self.outbox.len();
            let may_read = !self.ended
                && self.waiting < PIPELINE
                && self.outbox.len() - self.sent < MAX_UNSENT;
            if self.ended && !unsent && self.waiting == 0 {
                return;
            }
            let ready = tokio::select! {
                ready = self.stream.readable(), if may_read => ready.and_then(|()| self.read()),
                ready = self.stream.writable(), if unsent => ready.and_then(|()| self.write()),
                Some(answer) = answers.recv(), if self.waiting > 0 => {
                    self.waiting -= 1;
                    self.queue(&answer);
                    Ok(())
                }
                () = sleep_until(self.until) => return,
            };
            let stays_open = match ready {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                _ => self.handle_queries(&sender),
            };
            if !stays_open {
                return;
            }
        }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; MAX_QUERY];
        let length = self.stream.try_read(&mut buffer)?;
        self.ended = length == 0;
        if self.inbox.is_empty() {
            self.until = Instant::now() + QUERY_TIMEOUT;
        }
        self.inbox.extend(&buffer[..length]);
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.sent += self.stream.try_write(&self.outbox[self.sent..])?;
        if self.sent == self.outbox.len() {
            // Frees the memory of a long response.
            self.outbox = Vec::new();
            self.sent = 0;
        } else if self.sent >= MAX_UNSENT {
            self.outbox.drain(..std::mem::take(&mut self.sent));
        }
        self.until = Instant::now() + IDLE_TIMEOUT;
        Ok(())
    }

    /// Handles the complete queries. Returns whether the connection stays open.
    fn handle_queries(&mut self, sender: &mpsc::Sender<Vec<u8>>) -> bool {
        let mut at = 0;
        while self.waiting < PIPELINE && self.outbox.len() - self.sent < MAX_UNSENT {
            let Some(length) = crate::message::short(&self.inbox, at).map(usize::from) else {
                break;
            };
            if length > MAX_QUERY {
                return false;
            }
            let Some(message) = self.inbox.get(at + 2..at + 2 + length) else { break };
            at += 2 + length;
            self.activity.note();
            self.until = Instant::now() + IDLE_TIMEOUT;
            let start = self.outbox.len();
            self.outbox.extend([0; 2]);
            let zones = self.context.shared.zones();
            let channel = Channel::Stream(sender);
            match self.context.handle(&zones, message, self.client, &channel, &mut self.outbox) {
                Outcome::Answered => {
                    let length = (self.outbox.len() - start - 2) as u16;
                    self.outbox[start..start + 2].copy_from_slice(&length.to_be_bytes());
                }
                outcome => {
                    self.outbox.truncate(start);
                    self.waiting += usize::from(outcome == Outcome::Waiting);
                }
            }
        }
        self.inbox.drain(..at);
        if self.inbox.is_empty() {
            self.inbox = Vec::new();
        } else if at > 0 {
            self.until = Instant::now() + QUERY_TIMEOUT;
        }
        true
    }

    fn queue(&mut self, answer: &[u8]) {
        self.until = Instant::now() + IDLE_TIMEOUT;
        self.outbox.extend((answer.len() as u16).to_be_bytes());
        self.outbox.extend(answer);
    }
}
