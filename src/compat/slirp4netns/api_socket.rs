//! The API's socket: one request for each connection, and none of its clients is waited for.

use super::api::{Forwarder, Forwards, LONGEST_REQUEST, is_whole, too_large};
use rustix::event::PollFlags;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

/// Clients at a time. One more, and the one that has been there longest goes.
pub(super) const MOST_CLIENTS: usize = 32;

/// How long a client may take over its request and over reading the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket, its clients, and what they ask for.
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
    /// What has come of the request.
    Asks(Vec<u8>),
    /// What is left of the answer.
    IsTold(Vec<u8>),
    Done,
}

/// Listens at `path`. A socket that somebody has left there is put away, as slirp4netns does it.
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

    /// What is to be polled, and for what: the listener, then the clients.
    pub(super) fn polled(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let clients = self.clients.iter().map(|client| {
            let flags = match client.state {
                State::Asks(_) => PollFlags::IN,
                State::IsTold(_) | State::Done => PollFlags::OUT,
            };
            (client.socket.as_fd(), flags)
        });
        std::iter::once((self.listener.as_fd(), PollFlags::IN)).chain(clients)
    }

    /// When the next client's patience is at its end.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.clients.front().map(|client| client.until)
    }

    /// Does what has become possible; `ready` tells of each that was polled whether it is.
    pub(super) fn turn(&mut self, ready: &[bool], now: Instant) {
        let (listener, clients) = ready.split_first().unwrap_or((&false, &[]));
        for (client, _) in self.clients.iter_mut().zip(clients).filter(|(_, ready)| **ready) {
            client.turn(&mut self.forwards);
        }
        self.clients.retain(|client| now < client.until && !matches!(client.state, State::Done));
        // In order of their coming, so of their deadlines too.
        for _ in 0..if *listener { MOST_CLIENTS } else { 0 } {
            // An error is nobody there, or no descriptor left, which a client that goes frees.
            let Ok((client, _)) = self.listener.accept() else { break };
            if self.clients.len() == MOST_CLIENTS {
                self.clients.pop_front();
            }
            let client = Client {
                socket: client.into(),
                until: now + PATIENCE,
                state: State::Asks(Vec::new()),
            };
            self.clients.push_back(client);
        }
    }
}

impl Client {
    fn turn<F: Forwarder>(&mut self, forwards: &mut Forwards<F>) {
        if let State::Asks(request) = &mut self.state {
            let mut chunk = [0; LONGEST_REQUEST];
            let room = LONGEST_REQUEST - request.len();
            let answer = match recv(&self.socket, &mut chunk[..room], RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
                Err(_) => {
                    self.state = State::Done;
                    return;
                }
                // Its half has ended.
                Ok((_, 0)) => forwards.answer(request),
                Ok((_, length)) => {
                    request.extend_from_slice(&chunk[..length]);
                    if request.len() >= LONGEST_REQUEST {
                        too_large()
                    } else if is_whole(request) {
                        forwards.answer(request)
                    } else {
                        return;
                    }
                }
            };
            self.state = State::IsTold(answer.into_bytes());
        }
        if let State::IsTold(answer) = &mut self.state {
            match send(&self.socket, answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) if sent < answer.len() => _ = answer.drain(..sent),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => self.state = State::Done,
            }
        }
    }
}
