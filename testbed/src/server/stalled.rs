//! A server that accepts and then does nothing.

use std::net::SocketAddr;

use rustix::event::{PollFd, PollFlags, poll};

use super::tcp::TcpServer;
use crate::Namespace;

/// Accepts connections and never reads or writes, so that all data of a client stays in buffers.
pub struct StalledServer(TcpServer);

impl StalledServer {
    /// Starts the server on `addr` in `namespace`.
    #[track_caller]
    pub fn tcp(namespace: &Namespace, addr: SocketAddr) -> Self {
        Self(TcpServer::start(namespace, addr, |stream, _peer| {
            // Without requested events, poll returns on a reset by the client or the end of the
            // server.
            while poll(&mut [PollFd::new(&stream, PollFlags::empty())], None).is_err() {}
        }))
    }

    /// Returns the listening address.
    pub fn addr(&self) -> SocketAddr {
        self.0.addr()
    }

    /// Returns the number of accepted connections.
    pub fn accepted(&self) -> u64 {
        self.0.accepted()
    }

    /// Returns the number of open connections.
    pub fn open_connections(&self) -> usize {
        self.0.open()
    }
}
