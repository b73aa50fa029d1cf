//! Echo servers.

use std::io;
use std::net::{Shutdown, SocketAddr};

use super::{tcp::TcpServer, udp::UdpServer};
use crate::Namespace;

/// Echoes every byte or datagram.
///
/// TCP: until the client shuts down its sending side, then the server does the same. UDP: datagrams
/// of 0 to 65,507 bytes, from the address that the kernel selects.
pub struct EchoServer(Transport);

enum Transport {
    Tcp(TcpServer),
    Udp(UdpServer),
}

impl EchoServer {
    /// Starts a TCP echo server on `addr` in `namespace`.
    #[track_caller]
    pub fn tcp(namespace: &Namespace, addr: SocketAddr) -> Self {
        Self(Transport::Tcp(TcpServer::start(namespace, addr, |stream, _peer| {
            // An error means a reset by the client, or the end of the server.
            if io::copy(&mut &stream, &mut &stream).is_ok() {
                let _ = stream.shutdown(Shutdown::Write);
            }
        })))
    }

    /// Starts a UDP echo server on `addr` in `namespace`.
    #[track_caller]
    pub fn udp(namespace: &Namespace, addr: SocketAddr) -> Self {
        Self(Transport::Udp(UdpServer::start(namespace, addr, |socket, datagram, peer| {
            let _ = socket.send_to(datagram, peer);
        })))
    }

    /// Returns the listening address.
    pub fn addr(&self) -> SocketAddr {
        match &self.0 {
            Transport::Tcp(server) => server.addr(),
            Transport::Udp(server) => server.addr(),
        }
    }

    /// Returns the number of accepted connections or received datagrams.
    pub fn served(&self) -> u64 {
        match &self.0 {
            Transport::Tcp(server) => server.accepted(),
            Transport::Udp(server) => server.received(),
        }
    }

    /// Returns the number of open TCP connections; 0 for UDP.
    pub fn open_connections(&self) -> usize {
        match &self.0 {
            Transport::Tcp(server) => server.open(),
            Transport::Udp(_) => 0,
        }
    }
}
