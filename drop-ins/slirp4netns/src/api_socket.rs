//! The API socket: one request per connection, with nonblocking clients.

use super::api::{Forwarder, Forwards, MAX_REQUEST, is_complete, too_large};
use rustix::event::PollFlags;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

/// Maximum number of concurrent clients. A further one evicts the oldest.
pub(super) const MAX_CLIENTS: usize = 32;

/// The time for a client to send its request and to read the response.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The socket with its clients and the forwarded ports.
pub(super) struct Server<F: Forwarder> {
    listener: UnixListener,
    clients: VecDeque<Client>,
    forwards: Forwards<F>,
}

struct Client {
    socket: OwnedFd,
    until: Instant,
    state: State,
}

enum State {
    /// The request received so far.
    Receiving(Vec<u8>),
    /// The rest of the response.
    Sending(Vec<u8>),
    Done,
}

/// Listens on `path`. Like slirp4netns, this removes an existing socket.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if is_socket {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl<F: Forwarder> Server<F> {
    pub(super) fn new(listener: UnixListener, forwards: Forwards<F>) -> Self {
        Self { listener, clients: VecDeque::new(), forwards }
    }

    /// Returns the descriptors to poll with their events: the listener, then the clients.
    pub(super) fn polled(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let clients = self.clients.iter().map(|client| {
            let flags = match client.state {
                State::Receiving(_) => PollFlags::IN,
                State::Sending(_) | State::Done => PollFlags::OUT,
            };
            (client.socket.as_fd(), flags)
        });
        std::iter::once((self.listener.as_fd(), PollFlags::IN)).chain(clients)
    }

    /// When the next client times out.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.clients.front().map(|client| client.until)
    }

    /// Handles ready descriptors. `ready` is in the order of [`Self::polled`].
    pub(super) fn handle(&mut self, ready: &[bool], now: Instant) {
        let (listener, clients) = ready.split_first().unwrap_or((&false, &[]));
        for (client, _) in self.clients.iter_mut().zip(clients).filter(|(_, ready)| **ready) {
            client.handle(&mut self.forwards);
        }
        self.clients.retain(|client| now < client.until && !matches!(client.state, State::Done));
        // Clients are in order of acceptance, so in order of their deadlines.
        for _ in 0..if *listener { MAX_CLIENTS } else { 0 } {
            // The error is EAGAIN, or descriptors are exhausted until a client closes.
            let Ok((client, _)) = self.listener.accept() else { break };
            if self.clients.len() == MAX_CLIENTS {
                self.clients.pop_front();
            }
            let client = Client {
                socket: client.into(),
                until: now + TIMEOUT,
                state: State::Receiving(Vec::new()),
            };
            self.clients.push_back(client);
        }
    }
}

impl Client {
    fn handle<F: Forwarder>(&mut self, forwards: &mut Forwards<F>) {
        if let State::Receiving(request) = &mut self.state {
            let mut chunk = [0; MAX_REQUEST];
            let room = MAX_REQUEST - request.len();
            let answer = match recv(&self.socket, &mut chunk[..room], RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => {
                    self.state = State::Done;
                    return;
                }
                // The client has shut down its side.
                Ok((_, 0)) => forwards.answer(request),
                Ok((_, length)) => {
                    request.extend_from_slice(&chunk[..length]);
                    if request.len() >= MAX_REQUEST {
                        too_large()
                    } else if is_complete(request) {
                        forwards.answer(request)
                    } else {
                        return;
                    }
                }
            };
            self.state = State::Sending(answer.into_bytes());
        }
        if let State::Sending(answer) = &mut self.state {
            match send(&self.socket, answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) if sent < answer.len() => _ = answer.drain(..sent),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => self.state = State::Done,
            }
        }
    }
}
