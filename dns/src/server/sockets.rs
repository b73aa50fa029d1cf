//! The two sockets of a server, made where it is to be.

use crate::handler::Site;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use tidegate_netns::Namespace;
use tidegate_reactor::{revive_datagrams, revive_listener, says_destroyed};
use tokio::net::{TcpListener, UdpSocket};

/// Bytes of questions that may wait, as the kernel counts them: some 5,000. By default it is 277.
const WAITING: usize = 4 << 20;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A datagram socket and a listener at one address.
pub(super) struct Pair {
    udp: Socket,
    tcp: Socket,
    device: Option<Arc<str>>,
}

/// What a socket is bound to, for the case that somebody destroys it.
#[derive(Clone, Debug)]
pub(super) struct Bound {
    address: SocketAddr,
    device: Option<Arc<str>>,
}

impl Bound {
    /// Has `listener` listen again, if `error` says that it was destroyed. Whether it was.
    pub(super) fn revive_listener(
        &self,
        listener: &TcpListener,
        error: &io::Error,
    ) -> io::Result<bool> {
        if !says_destroyed(error) {
            return Ok(false);
        }
        revive_listener(listener, self.address, self.device.as_deref(), BACKLOG)
    }

    /// Binds `socket` again, if `error` says that it was destroyed. Whether it was.
    pub(super) fn revive_datagrams(
        &self,
        socket: &UdpSocket,
        error: &io::Error,
    ) -> io::Result<bool> {
        if !says_destroyed(error) {
            return Ok(false);
        }
        revive_datagrams(socket, self.address, self.device.as_deref()).map(|()| true)
    }
}

/// Logs what became of the `socket`, UDP or TCP, of `site` that failed with `error`, and counts it
/// if it was destroyed and is `revived`.
pub(super) fn report(site: &Site, socket: &str, revived: io::Result<bool>, error: &io::Error) {
    let (endpoint, network) = (site.asker.endpoint(), site.asker.network());
    match revived {
        Ok(true) => {
            site.shared.metrics.revived.increment(1);
            tracing::warn!(
                endpoint,
                network,
                kind = "dns",
                socket,
                "destroyed by other software; restored"
            );
        }
        Ok(false) => {
            tracing::warn!(endpoint, network, socket, %error, "socket of the DNS server failed");
        }
        Err(error) => {
            tracing::error!(endpoint, network, kind = "dns", socket, %error, "destroyed by other software; not restored");
        }
    }
}

impl Pair {
    /// Makes them in `namespace`; bound to `device`, they hear nobody who comes by another one.
    pub(super) fn open(
        namespace: &Namespace,
        address: SocketAddr,
        device: Option<&str>,
    ) -> io::Result<Self> {
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
            if rustix::net::sockopt::set_socket_recv_buffer_size_force(udp.as_fd(), WAITING / 2)
                .is_err()
            {
                let _ = udp.set_recv_buffer_size(WAITING / 2);
            }
            udp.bind(&address.into())?;
            let tcp = open(Type::STREAM, Protocol::TCP)?;
            // Connections of the server before this one keep the port for a minute otherwise.
            tcp.set_reuse_address(true)?;
            tcp.bind(&address.into())?;
            tcp.listen(BACKLOG)?;
            Ok(Self { udp, tcp, device: device.map(Arc::from) })
        })?
    }

    /// The ports that they have: of UDP, of TCP.
    pub(super) fn ports(&self) -> io::Result<(u16, u16)> {
        let port = |socket: &Socket| {
            Ok(socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
        };
        port(&self.udp).and_then(|udp| Ok::<_, io::Error>((udp, port(&self.tcp)?)))
    }

    /// Hands them to the runtime, each with what it is bound to.
    pub(super) fn register(self) -> io::Result<((UdpSocket, Bound), (TcpListener, Bound))> {
        let bound = |socket: &Socket| {
            let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
            Ok::<_, io::Error>(Bound { address, device: self.device.clone() })
        };
        let (of_udp, of_tcp) = (bound(&self.udp)?, bound(&self.tcp)?);
        let udp = UdpSocket::from_std(self.udp.into())?;
        Ok(((udp, of_udp), (TcpListener::from_std(self.tcp.into())?, of_tcp)))
    }
}
