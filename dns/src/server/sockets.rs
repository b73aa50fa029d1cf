//! The two sockets of a server, made where it is to be.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use tidegate_netns::Namespace;
use tokio::net::{TcpListener, UdpSocket};

/// Bytes of questions that may wait, as the kernel counts them: some 5,000. By default it is 277.
const WAITING: usize = 4 << 20;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A datagram socket and a listener at one address.
pub(super) struct Pair {
    udp: Socket,
    tcp: Socket,
}

impl Pair {
    /// Makes them in `namespace`; bound to `device`, they hear nobody who comes by another one.
    pub(super) fn open(namespace: &Namespace, address: SocketAddr, device: Option<&str>) -> io::Result<Self> {
        namespace.with(|| {
            let open = |kind, protocol| {
                let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
                socket.set_nonblocking(true)?;
                if address.is_ipv6() {
                    socket.set_only_v6(true)?;
                }
                if let Some(device) = device {
                    socket.bind_device(Some(device.as_bytes()))?;
                }
                Ok::<_, io::Error>(socket)
            };
            let udp = open(Type::DGRAM, Protocol::UDP)?;
            // Beyond the limit that holds for everyone; without the privilege, up to it.
            if rustix::net::sockopt::set_socket_recv_buffer_size_force(udp.as_fd(), WAITING / 2).is_err() {
                let _ = udp.set_recv_buffer_size(WAITING / 2);
            }
            udp.bind(&address.into())?;
            let tcp = open(Type::STREAM, Protocol::TCP)?;
            // Connections of the server before this one keep the port for a minute otherwise.
            tcp.set_reuse_address(true)?;
            tcp.bind(&address.into())?;
            tcp.listen(BACKLOG)?;
            Ok(Self { udp, tcp })
        })?
    }

    /// The ports that they have: of UDP, of TCP.
    pub(super) fn ports(&self) -> io::Result<(u16, u16)> {
        let port = |socket: &Socket| Ok(socket.local_addr()?.as_socket().map_or(0, |address| address.port()));
        port(&self.udp).and_then(|udp| Ok::<_, io::Error>((udp, port(&self.tcp)?)))
    }

    /// Hands them to the runtime.
    pub(super) fn register(self) -> io::Result<(UdpSocket, TcpListener)> {
        Ok((UdpSocket::from_std(self.udp.into())?, TcpListener::from_std(self.tcp.into())?))
    }
}
