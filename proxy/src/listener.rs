//! Bound sockets of published ports, created here or inherited.

use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};
use socket2::{Domain, Protocol as IpProtocol, SockRef, Socket, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tidegate_model::{Feature, Protocol, PublishLabel, canonical};
use tidegate_reactor::{
    BACKLOG, KEEPALIVE, UNSENT_NARROW, UNSENT_WIDE, accept_only_from_loopback, batch,
    drop_forged_own_source, drop_mapped_sources, enable_stream_ingress, enlarge_datagram_buffers,
    narrow_receive_buffer, revive_datagrams, revive_listener, widen_receive_buffer,
};

/// Maximum number of datagrams that [`Listener::open`] discards.
const MAX_STALE_DATAGRAMS: usize = 65_536;

/// The socket of a published port.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    label: PublishLabel,
}

/// A port that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("listen {label}: {source}")]
pub struct BindError {
    /// The address and protocol.
    pub label: PublishLabel,
    /// The cause: in use, not permitted, no such address on this host, or protocol not supported.
    pub source: io::Error,
}

/// An inherited descriptor that cannot serve the port.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Not a socket, or closed.
    #[error("it is not a socket: {0}")]
    NotASocket(#[source] io::Error),
    /// A socket of a different type.
    #[error("it is not a {0} socket")]
    WrongType(Protocol),
    /// A TCP socket without listen(2).
    #[error("it is not listening")]
    NotListening,
    /// Not an IP socket, or not bound.
    #[error("it has no IP address")]
    NoAddress,
}

impl Listener {
    /// Opens `address` for `protocol` in the namespace of the calling thread. Port 0 selects a free
    /// port.
    ///
    /// # Errors
    /// [`BindError`]; no socket is left open.
    pub fn bind(address: SocketAddr, protocol: Protocol) -> Result<Self, BindError> {
        let reserved = Self::reserve(address, protocol)?;
        reserved.open()?;
        Ok(reserved)
    }

    /// Binds `address` for `protocol` without serving it: clients are refused until
    /// [`open`](Self::open).
    ///
    /// # Errors
    /// [`BindError`]; no socket is left open.
    pub fn reserve(address: SocketAddr, protocol: Protocol) -> Result<Self, BindError> {
        let error = |source| BindError { label: PublishLabel::new(address, protocol), source };
        let socket = bind(address, protocol).map_err(error)?;
        let bound = socket.local_addr().map_err(error)?.as_socket().unwrap_or(address);
        Ok(Self { socket: socket.into(), label: PublishLabel::new(bound, protocol) })
    }

    /// Prepares a UDP port with a [`GatewayAcl`](crate::GatewayAcl), before it is opened: drops
    /// forged datagrams with equal source and destination addresses, so that such addresses
    /// identify the host.
    ///
    /// # Errors
    /// [`BindError`] with the error of setsockopt(2).
    pub fn drop_forged_own_source(&self) -> Result<(), BindError> {
        if self.label.protocol() != Protocol::Udp {
            return Ok(());
        }
        let result = drop_forged_own_source(&self.socket, self.label.address().is_ipv6());
        result.map_err(|source| BindError { label: self.label, source })
    }

    /// Starts serving the port. Discards datagrams that arrived before.
    ///
    /// # Errors
    /// [`BindError`] if another socket has started to listen on the address meanwhile.
    pub fn open(&self) -> Result<(), BindError> {
        let opened = match self.label.protocol() {
            Protocol::Udp => {
                for _ in 0..MAX_STALE_DATAGRAMS {
                    if rustix::net::recv(
                        &self.socket,
                        &mut [0; 1],
                        rustix::net::RecvFlags::DONTWAIT,
                    )
                    .is_err()
                    {
                        break;
                    }
                }
                Ok(())
            }
            Protocol::Tcp | Protocol::Sctp => rustix::net::listen(&self.socket, BACKLOG),
        };
        opened.map_err(|errno| BindError { label: self.label, source: errno.into() })
    }

    /// Adopts a socket that another process has bound (and, for TCP, listens on), as newer versions
    /// of dockerd pass to their proxy.
    ///
    /// # Errors
    /// [`AdoptError`] with the reason.
    pub fn adopt(socket: OwnedFd, protocol: Protocol) -> Result<Self, AdoptError> {
        let kind =
            sockopt::socket_type(&socket).map_err(|errno| AdoptError::NotASocket(errno.into()))?;
        let wanted = match protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
            Protocol::Sctp => return Err(AdoptError::WrongType(protocol)),
        };
        if kind != wanted {
            return Err(AdoptError::WrongType(protocol));
        }
        let socket = Socket::from(socket);
        let address = socket.local_addr().ok().and_then(|address| address.as_socket());
        let address =
            canonical(address.filter(|address| address.port() != 0).ok_or(AdoptError::NoAddress)?);
        if protocol == Protocol::Tcp && !sockopt::socket_acceptconn(&socket).unwrap_or(false) {
            return Err(AdoptError::NotListening);
        }
        let prepared = socket
            .set_nonblocking(true)
            .and_then(|()| socket.set_cloexec(true))
            .and_then(|()| prepare(&socket, address, protocol));
        prepared.map_err(AdoptError::NotASocket)?;
        accept_from_loopback(&socket, address);
        Ok(Self { socket: socket.into(), label: PublishLabel::new(address, protocol) })
    }

    /// Restores the socket after other software destroyed it (`ss -K`). Returns whether it was
    /// destroyed.
    ///
    /// # Errors
    /// Errors of the system calls; the port is then not served.
    pub(crate) fn revive(&self) -> io::Result<bool> {
        let address = self.label.address();
        match self.label.protocol() {
            Protocol::Tcp => revive_listener(&self.socket, address, None, BACKLOG),
            Protocol::Udp | Protocol::Sctp => {
                revive_datagrams(&self.socket, address, None).map(|()| true)
            }
        }
    }

    /// The bound address and protocol, as shown in metrics and messages.
    pub fn label(&self) -> PublishLabel {
        self.label
    }
}

impl From<Listener> for OwnedFd {
    /// For callers that forward the traffic themselves.
    fn from(listener: Listener) -> Self {
        listener.socket
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<Socket> {
    let (kind, ip_protocol) = match protocol {
        Protocol::Tcp => (Type::STREAM, IpProtocol::TCP),
        Protocol::Udp => (Type::DGRAM, IpProtocol::UDP),
        // Not implemented: no kernel with SCTP was available for tests.
        Protocol::Sctp => return Err(Errno::PROTONOSUPPORT.into()),
    };
    let socket =
        Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), Some(ip_protocol))?;
    if address.is_ipv6() {
        // A separate socket serves the IPv4 address of the port.
        socket.set_only_v6(true)?;
    }
    if protocol == Protocol::Tcp {
        // Connections in TIME_WAIT do not block the port; a listening socket still does.
        socket.set_reuse_address(true)?;
    }
    prepare(&socket, address, protocol)?;
    socket.bind(&address.into())?;
    accept_from_loopback(&socket, address);
    Ok(socket)
}

/// Old kernels require a privilege. Without it, the socket also accepts packets from links.
fn accept_from_loopback(socket: &Socket, address: SocketAddr) {
    if let Err(error) = accept_only_from_loopback(socket, address.ip()) {
        tracing::debug!(%address, %error, "socket not bound to the loopback interface");
    }
}

fn prepare(socket: &Socket, address: SocketAddr, protocol: Protocol) -> io::Result<()> {
    if protocol == Protocol::Tcp {
        enable_stream_ingress(socket, address.is_ipv6())?;
        return prepare_stream(socket);
    }
    // Receive offload requires Linux 5.0. Without it only throughput is lower.
    let _ = enable_gro(socket);
    enlarge_datagram_buffers(socket);
    if address.is_ipv6() && socket.only_v6()? {
        drop_mapped_sources(socket)?;
    }
    batch::enable_packet_info(socket, address.is_ipv6())
}

/// Sets the options of both sockets of a TCP connection. Accepted sockets inherit them from the
/// listener, which saves three system calls per connection. The receive buffer is not fixed here,
/// because a size set before the handshake would bound the window permanently
/// (`tcp_select_initial_window`). Until it is fixed, the kernel grows it as data is read.
pub(crate) fn prepare_stream(stream: impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(&stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_tcp_notsent_lowat(UNSENT_NARROW)
}

/// Sets the buffers between `source` and `sink` for a wide half.
pub(crate) fn widen(source: impl AsFd, sink: impl AsFd) {
    widen_receive_buffer(source);
    let _ = SockRef::from(&sink).set_tcp_notsent_lowat(UNSENT_WIDE);
}

/// Sets the buffers between `source` and `sink` for a narrow half.
pub(crate) fn narrow(source: impl AsFd, sink: impl AsFd) {
    narrow_receive_buffer(source);
    let _ = SockRef::from(&sink).set_tcp_notsent_lowat(UNSENT_NARROW);
}

/// Enables receive offload: the kernel delivers GSO batches of datagrams.
pub(crate) fn enable_gro(datagrams: impl AsFd) -> io::Result<()> {
    if Feature::UdpGso.is_forced_off() {
        return Err(Errno::NOPROTOOPT.into());
    }
    batch::enable_receive_offload(datagrams)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};

    #[test]
    fn a_port_in_use_is_reported_with_its_label() {
        let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = holder.local_addr().unwrap();
        let error = Listener::bind(address, Protocol::Tcp).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(
            error.to_string(),
            format!("listen {address}/tcp: Address already in use (os error 98)")
        );
    }

    #[test]
    fn sctp_is_refused_with_the_error_of_the_kernel() {
        let error =
            Listener::bind(SocketAddr::from(([127, 0, 0, 1], 0)), Protocol::Sctp).unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(Errno::PROTONOSUPPORT.raw_os_error()));
    }

    #[test]
    fn only_a_listening_socket_of_the_right_type_is_adopted() {
        let listening = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listening.local_addr().unwrap().port();
        let adopted = Listener::adopt(listening.into(), Protocol::Tcp).unwrap();
        assert_eq!(adopted.label().to_string(), format!("127.0.0.1:{port}/tcp"));

        let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(matches!(
            Listener::adopt(udp.into(), Protocol::Tcp),
            Err(AdoptError::WrongType(_))
        ));
        let idle = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        idle.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        assert!(matches!(
            Listener::adopt(idle.into(), Protocol::Tcp),
            Err(AdoptError::NotListening)
        ));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(
            Listener::adopt(file.into(), Protocol::Tcp),
            Err(AdoptError::NotASocket(_))
        ));
    }
}
