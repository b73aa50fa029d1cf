//! Servers that send each client its address as seen by the server.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

use super::{tcp::TcpServer, udp::UdpServer};
use crate::Namespace;

/// Responds with the textual address of the peer: `203.0.113.9:40001`, `[2001:db8:1::9]:40001`. A
/// server with a name adds it after a space.
///
/// TCP: immediately after accept, then shuts down its sending side, so `read_to_string` returns the
/// address. UDP: one datagram for each received one.
pub struct PeerServer(Transport);

enum Transport {
    Tcp(TcpServer),
    Udp(UdpServer),
}

impl PeerServer {
    /// Starts a TCP server on `addr` in `namespace`.
    #[track_caller]
    pub fn tcp(namespace: &Namespace, addr: SocketAddr) -> Self {
        Self::tcp_answering(namespace, addr, |peer| peer.to_string())
    }

    /// [`tcp`](Self::tcp) with a name.
    #[track_caller]
    pub fn tcp_named(namespace: &Namespace, addr: SocketAddr, name: &str) -> Self {
        let name = name.to_owned();
        Self::tcp_answering(namespace, addr, move |peer| format!("{peer} {name}"))
    }

    #[track_caller]
    fn tcp_answering(
        namespace: &Namespace,
        addr: SocketAddr,
        text: impl Fn(SocketAddr) -> String + Send + Sync + 'static,
    ) -> Self {
        Self(Transport::Tcp(TcpServer::start(namespace, addr, move |stream, peer| {
            let _ = answer(stream, &text(peer));
        })))
    }

    /// Starts a UDP server on `addr` in `namespace`.
    #[track_caller]
    pub fn udp(namespace: &Namespace, addr: SocketAddr) -> Self {
        Self::udp_answering(namespace, addr, |peer| peer.to_string())
    }

    /// [`udp`](Self::udp) with a name.
    #[track_caller]
    pub fn udp_named(namespace: &Namespace, addr: SocketAddr, name: &str) -> Self {
        let name = name.to_owned();
        Self::udp_answering(namespace, addr, move |peer| format!("{peer} {name}"))
    }

    #[track_caller]
    fn udp_answering(
        namespace: &Namespace,
        addr: SocketAddr,
        text: impl Fn(SocketAddr) -> String + Send + 'static,
    ) -> Self {
        Self(Transport::Udp(UdpServer::start(namespace, addr, move |socket, _datagram, peer| {
            let _ = socket.send_to(text(peer).as_bytes(), peer);
        })))
    }

    /// Returns the listening address.
    pub fn addr(&self) -> SocketAddr {
        match &self.0 {
            Transport::Tcp(server) => server.addr(),
            Transport::Udp(server) => server.addr(),
        }
    }
}

fn answer(mut stream: TcpStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    // Closing with unread data would send a reset, which can overtake the response.
    io::copy(&mut stream, &mut io::sink())?;
    Ok(())
}
