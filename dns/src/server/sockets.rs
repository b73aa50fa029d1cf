//! The UDP and TCP sockets of a server, created in the namespace that it serves.

use crate::handler::ServerContext;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use tidegate_netns::Namespace;
use tidegate_reactor::{revive_datagrams, revive_listener, says_destroyed};
use tokio::net::{TcpListener, UdpSocket};

/// Receive buffer for queries in bytes as the kernel counts them: about 5,000 queries, instead of
/// 277 by default.
const RECEIVE_BUFFER: usize = 4 << 20;
/// Length of the accept queue.
const BACKLOG: i32 = 128;

/// A UDP socket and a TCP listener at one address.
pub(super) struct SocketPair {
    udp: Socket,
    tcp: Socket,
    device: Option<Arc<str>>,
}

/// The address and interface of a socket, to restore it after it was destroyed (`ss -K`).
#[derive(Clone, Debug)]
pub(super) struct Binding {
    address: SocketAddr,
    device: Option<Arc<str>>,
}

impl Binding {
    /// Restores `listener` if `error` can mean that it was destroyed. Returns whether it was
    /// restored.
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

    /// Restores `socket` if `error` can mean that it was destroyed. Returns whether it was
    /// restored.
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

/// Logs the failure `error` of `socket` (`udp` or `tcp`), and counts it if the socket was destroyed
/// and restored.
pub(super) fn report(
    context: &ServerContext,
    socket: &str,
    revived: io::Result<bool>,
    error: &io::Error,
) {
    let (endpoint, network) = (context.client_id.endpoint(), context.client_id.network());
    match revived {
        Ok(true) => {
            context.shared.metrics.revived.increment(1);
            tracing::warn!(
                endpoint,
                network,
                kind = "dns",
                socket,
                "destroyed by other software; restored"
            );
        }
        Ok(false) => {
            tracing::warn!(endpoint, network, socket, %error, "DNS server socket failed");
        }
        Err(error) => {
            tracing::error!(endpoint, network, kind = "dns", socket, %error, "destroyed by other software; not restored");
        }
    }
}

impl SocketPair {
    /// Creates the sockets in `namespace`, bound to the interface `device` if given.
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
            // Exceeds `net.core.rmem_max` if privileged; otherwise the kernel caps the size at that
            // value.
            if rustix::net::sockopt::set_socket_recv_buffer_size_force(
                udp.as_fd(),
                RECEIVE_BUFFER / 2,
            )
            .is_err()
            {
                let _ = udp.set_recv_buffer_size(RECEIVE_BUFFER / 2);
            }
            udp.bind(&address.into())?;
            let tcp = open(Type::STREAM, Protocol::TCP)?;
            // Connections of a previous server leave the port in TIME_WAIT.
            tcp.set_reuse_address(true)?;
            tcp.bind(&address.into())?;
            tcp.listen(BACKLOG)?;
            Ok(Self { udp, tcp, device: device.map(Arc::from) })
        })?
    }

    /// The local ports (UDP, TCP).
    pub(super) fn ports(&self) -> io::Result<(u16, u16)> {
        let port = |socket: &Socket| {
            Ok(socket.local_addr()?.as_socket().map_or(0, |address| address.port()))
        };
        port(&self.udp).and_then(|udp| Ok::<_, io::Error>((udp, port(&self.tcp)?)))
    }

    /// Registers the sockets with the runtime. Returns each with its binding.
    pub(super) fn register(self) -> io::Result<((UdpSocket, Binding), (TcpListener, Binding))> {
        let binding = |socket: &Socket| {
            let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::InvalidData)?;
            Ok::<_, io::Error>(Binding { address, device: self.device.clone() })
        };
        let (udp_binding, tcp_binding) = (binding(&self.udp)?, binding(&self.tcp)?);
        let udp = UdpSocket::from_std(self.udp.into())?;
        Ok(((udp, udp_binding), (TcpListener::from_std(self.tcp.into())?, tcp_binding)))
    }
}
