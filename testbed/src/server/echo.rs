//! Servers that send back what they get.

use std::io;
use std::net::{Shutdown, SocketAddr};

use super::{tcp::TcpServer, udp::UdpServer};
use crate::Namespace;

/// Sends back every byte or datagram.
///
/// TCP: until the client's half-close, then closes its own half as well. UDP: datagrams of any
/// length, empty ones and those of 65,507 bytes included, from the address that the kernel picks.
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
            // An error is the client's reset or the server's end: there is nobody left to tell.
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

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        match &self.0 {
            Transport::Tcp(server) => server.addr(),
            Transport::Udp(server) => server.addr(),
        }
    }

    /// How many connections it has accepted, or datagrams it has received.
    pub fn served(&self) -> u64 {
        match &self.0 {
            Transport::Tcp(server) => server.accepted(),
            Transport::Udp(server) => server.received(),
        }
    }

    /// How many TCP connections are open; 0 for UDP.
    pub fn open_connections(&self) -> usize {
        match &self.0 {
            Transport::Tcp(server) => server.open(),
            Transport::Udp(_) => 0,
        }
    }
}
