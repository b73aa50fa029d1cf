//! A server that accepts and then does nothing.

use std::net::SocketAddr;

use rustix::event::{PollFd, PollFlags, poll};

use super::tcp::TcpServer;
use crate::Namespace;

/// Accepts connections and never reads or writes: whatever a client can push into one is held by
/// buffers.
pub struct StalledServer(TcpServer);

impl StalledServer {
    /// Starts the server on `addr` in `namespace`.
    #[track_caller]
    pub fn tcp(namespace: &Namespace, addr: SocketAddr) -> Self {
        Self(TcpServer::start(namespace, addr, |stream, _peer| {
            // Asks for no event: what is left is a reset by the client, or the server's end.
            while poll(&mut [PollFd::new(&stream, PollFlags::empty())], None).is_err() {}
        }))
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> u64 {
        self.0.accepted()
    }

    /// How many connections are open.
    pub fn open_connections(&self) -> usize {
        self.0.open()
    }
}
