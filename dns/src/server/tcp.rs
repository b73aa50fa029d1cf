//! Connections (RFC 7766): several questions on one, answered as their answers are there.
//!
//! A client costs a task and what it has sent of an unfinished question. It is read from for as
//! long as fewer than [`PIPELINE`] of its questions wait and it takes its answers; it goes when it
//! is idle, or stops in the middle of a question, or does not read.

use super::clients::{Activity, Clients, limit};
use super::sockets::{Bound, report};
use crate::handler::{Channel, Outcome, Site};
use crate::metrics::Overload;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How long a client may be silent (RFC 7766 section 6.2.3: "on the order of seconds").
const IDLE: Duration = Duration::from_secs(10);
/// How long a question may take to come in, once it has begun.
const QUESTION: Duration = Duration::from_secs(2);
/// Questions of one client that wait for other servers.
const PIPELINE: usize = 64;
/// Bytes of answers that a client has not taken: one more is written beyond that.
const UNTAKEN: usize = 64 << 10;
/// The longest question: what comes after its length is not waited for.
const LONGEST: usize = 4096;
/// How long nobody is accepted after that has failed: descriptors come back.
const REST: Duration = Duration::from_millis(100);

/// Serves clients of `listener` for as long as the task lives; they go with it.
pub(super) async fn serve(mut listener: TcpListener, bound: Bound, site: Arc<Site>) {
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
                let revived = bound.revive_listener(&listener, &error);
                let is_revived = matches!(revived, Ok(true));
                report(&site, "tcp", revived, &error);
                if is_revived {
                    // To the runtime a socket that was closed (`EPOLLHUP`) remains so.
                    match listener.into_std().and_then(TcpListener::from_std) {
                        Ok(registered) => listener = registered,
                        Err(error) => {
                            return report(&site, "tcp", Err(error), &io::ErrorKind::Other.into());
                        }
                    }
                }
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let partition = site.shared.zones().view(&site.asker, client.ip()).partition();
        let Some(admitted) = site.shared.admit(partition) else {
            site.shared.metrics.refused(Overload::Clients, Some(&site.asker));
            continue;
        };
        if clients.make_room(limit(&site)) {
            site.shared.metrics.refused(Overload::Clients, Some(&site.asker));
            tracing::debug!(
                endpoint = site.asker.endpoint(),
                network = site.asker.network(),
                "an idle DNS client makes room"
            );
        }
        let activity = clients.activity();
        let conversation =
            Conversation::new(stream, client, Arc::clone(&site), Arc::clone(&activity));
        let task = tasks.spawn(async move {
            conversation.hold().await;
            drop(admitted);
        });
        clients.add(task, activity);
    }
}

/// One client.
struct Conversation {
    stream: TcpStream,
    client: SocketAddr,
    site: Arc<Site>,
    activity: Arc<Activity>,
    /// What has come and is no whole question yet.
    inbox: Vec<u8>,
    /// Answers with their lengths, and how much of that is sent.
    outbox: Vec<u8>,
    sent: usize,
    /// Questions whose answers will come.
    waiting: usize,
    /// The client will send no more.
    ended: bool,
    /// When it has to go.
    until: Instant,
}

impl Conversation {
    fn new(
        stream: TcpStream,
        client: SocketAddr,
        site: Arc<Site>,
        activity: Arc<Activity>,
    ) -> Self {
        // Answers are small and complete.
        let _ = stream.set_nodelay(true);
        let until = Instant::now() + IDLE;
        let (inbox, outbox) = (Vec::new(), Vec::new());
        Self {
            stream,
            client,
            site,
            activity,
            inbox,
            outbox,
            sent: 0,
            waiting: 0,
            ended: false,
            until,
        }
    }

    async fn hold(mut self) {
        let (sender, mut answers) = mpsc::channel::<Vec<u8>>(PIPELINE);
        loop {
            let unsent = self.sent < self.outbox.len();
            let reads =
                !self.ended && self.waiting < PIPELINE && self.outbox.len() - self.sent < UNTAKEN;
            if self.ended && !unsent && self.waiting == 0 {
                return;
            }
            let ready = tokio::select! {
                ready = self.stream.readable(), if reads => ready.and_then(|()| self.read()),
                ready = self.stream.writable(), if unsent => ready.and_then(|()| self.write()),
                Some(answer) = answers.recv(), if self.waiting > 0 => {
                    self.waiting -= 1;
                    self.queue(&answer);
                    Ok(())
                }
                () = sleep_until(self.until) => return,
            };
            let kept = match ready {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                _ => self.questions(&sender),
            };
            if !kept {
                return;
            }
        }
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; LONGEST];
        let length = self.stream.try_read(&mut buffer)?;
        self.ended = length == 0;
        if self.inbox.is_empty() {
            self.until = Instant::now() + QUESTION;
        }
        self.inbox.extend(&buffer[..length]);
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        self.sent += self.stream.try_write(&self.outbox[self.sent..])?;
        if self.sent == self.outbox.len() {
            // What one long answer took is given back.
            self.outbox = Vec::new();
            self.sent = 0;
        } else if self.sent >= UNTAKEN {
            self.outbox.drain(..std::mem::take(&mut self.sent));
        }
        self.until = Instant::now() + IDLE;
        Ok(())
    }

    /// Handles the questions that are whole. Whether the client may stay.
    fn questions(&mut self, sender: &mpsc::Sender<Vec<u8>>) -> bool {
        let mut at = 0;
        while self.waiting < PIPELINE && self.outbox.len() - self.sent < UNTAKEN {
            let Some(length) = crate::message::short(&self.inbox, at).map(usize::from) else {
                break;
            };
            if length > LONGEST {
                return false;
            }
            let Some(message) = self.inbox.get(at + 2..at + 2 + length) else { break };
            at += 2 + length;
            self.activity.note();
            self.until = Instant::now() + IDLE;
            let start = self.outbox.len();
            self.outbox.extend([0; 2]);
            let zones = self.site.shared.zones();
            let channel = Channel::Stream(sender);
            match self.site.handle(&zones, message, self.client, &channel, &mut self.outbox) {
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
            self.until = Instant::now() + QUESTION;
        }
        true
    }

    fn queue(&mut self, answer: &[u8]) {
        self.until = Instant::now() + IDLE;
        self.outbox.extend((answer.len() as u16).to_be_bytes());
        self.outbox.extend(answer);
    }
}
