//! A bound socket, made here or taken over.

use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};
use socket2::{Domain, Protocol as IpProtocol, SockRef, Socket, TcpKeepalive, Type};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::LazyLock;
use std::time::Duration;
use tidegate_model::{Feature, Protocol, PublishLabel, canonical};
use tidegate_reactor::{
    batch, drop_forged_own_source, enable_stream_ingress, revive_datagrams, revive_listener,
    set_window_clamp,
};

/// The queue of connections that wait to be accepted; the kernel caps it at `net.core.somaxconn`,
/// whose default it is.
const BACKLOG: i32 = 4096;

/// Datagrams that can have come before a socket is opened, at the very most.
const MAX_STALE_DATAGRAMS: usize = 65_536;

/// When a silent connection is probed, how often, and after how many unanswered probes it is cut: a
/// vanished peer is noticed after 15 + 9 × 15 s, docker-proxy's (and Go's) figures.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(15))
    .with_retries(9);

/// Payload that may wait unsent in a socket's send buffer, in bytes (`TCP_NOTSENT_LOWAT`), where
/// the half that writes to it is narrow, and where it is wide. What is in flight comes on top, and
/// is the receiver's own window. Without it the send buffer grows to `tcp_wmem` (4 MiB) in front of
/// a peer that has stopped reading.
const UNSENT_NARROW: u32 = 64 << 10;
const UNSENT_WIDE: u32 = 256 << 10;

/// Payload that may wait to be read in a stream socket whose half is wide, in bytes (the kernel
/// doubles it for its own bookkeeping). Left to itself the receive buffer grows to `tcp_rmem` (6 to
/// 32 MiB) in front of a backend that has stopped reading. The price is the window: 1 MiB or a
/// little more for each round trip.
pub const UNREAD_BYTES: usize = 1 << 20;

/// The same where the half is narrow: the kernel's own beginning (`tcp_rmem`).
const UNREAD_NARROW: usize = 64 << 10;

/// What socket buffers of a UDP port are asked to be, in bytes; the kernel caps it at
/// `net.core.rmem_max`. A sender with segmentation offload delivers 64 KiB in one go.
pub const UDP_BUFFER: usize = 4 << 20;

/// A socket that a published port answers on.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    label: PublishLabel,
}

/// A port that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("listen {label}: {source}")]
pub struct BindError {
    /// What was to be opened.
    pub label: PublishLabel,
    /// Why not: in use, not permitted, no such address here, protocol not supported.
    pub source: io::Error,
}

/// A descriptor that was handed over and is not what it was said to be.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Not a socket, or closed.
    #[error("it is not a socket: {0}")]
    NotASocket(#[source] io::Error),
    /// A socket of another type.
    #[error("it is not a {0} socket")]
    WrongType(Protocol),
    /// A TCP socket that nobody called listen(2) on.
    #[error("it is not listening")]
    NotListening,
    /// A socket that does not speak IP, or is not bound.
    #[error("it has no IP address")]
    NoAddress,
}

impl Listener {
    /// Opens `address` for `protocol`, in the calling thread's namespace. Port 0 takes any free
    /// one.
    ///
    /// # Errors
    /// [`BindError`]; nothing is left open then.
    pub fn bind(address: SocketAddr, protocol: Protocol) -> Result<Self, BindError> {
        let reserved = Self::reserve(address, protocol)?;
        reserved.open()?;
        Ok(reserved)
    }

    /// Takes `address` for `protocol`, so that nobody else has it, and answers nobody there before
    /// [`open`](Self::open).
    ///
    /// # Errors
    /// [`BindError`]; nothing is left open then.
    pub fn reserve(address: SocketAddr, protocol: Protocol) -> Result<Self, BindError> {
        let error = |source| BindError { label: PublishLabel::new(address, protocol), source };
        let socket = bind(address, protocol).map_err(error)?;
        let bound = socket.local_addr().map_err(error)?.as_socket().unwrap_or(address);
        Ok(Self { socket: socket.into(), label: PublishLabel::new(bound, protocol) })
    }

    /// Prepares a UDP port that has a [`GatewayAcl`](crate::GatewayAcl), before it is opened: a
    /// source address that is the destination identifies the host then.
    ///
    /// # Errors
    /// [`BindError`]: what setsockopt(2) says.
    pub fn drop_forged_own_source(&self) -> Result<(), BindError> {
        if self.label.protocol() != Protocol::Udp {
            return Ok(());
        }
        let result = drop_forged_own_source(&self.socket, self.label.address().is_ipv6());
        result.map_err(|source| BindError { label: self.label, source })
    }

    /// Answers from here on. Clients that came before were refused, and what they sent is thrown
    /// away.
    ///
    /// # Errors
    /// [`BindError`]: someone else has taken the address at the same time.
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

    /// Takes over a socket that someone else has bound (and, for TCP, is listening on), as newer
    /// dockerd hands them down.
    ///
    /// # Errors
    /// [`AdoptError`] says what is wrong with it.
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
        Ok(Self { socket: socket.into(), label: PublishLabel::new(address, protocol) })
    }

    /// Answers again after other software has destroyed the socket (`ss -K`). Whether that had
    /// happened.
    ///
    /// # Errors
    /// The kernel's; the port is not answered at then.
    pub(crate) fn revive(&self) -> io::Result<bool> {
        let address = self.label.address();
        match self.label.protocol() {
            Protocol::Tcp => revive_listener(&self.socket, address, None, BACKLOG),
            Protocol::Udp | Protocol::Sctp => {
                revive_datagrams(&self.socket, address, None).map(|()| true)
            }
        }
    }

    /// What it is called in metrics and messages: its bound address and protocol.
    pub fn label(&self) -> PublishLabel {
        self.label
    }
}

impl From<Listener> for OwnedFd {
    /// For who carries its traffic in another way.
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
        // No kernel with SCTP has been at hand to prove it on.
        Protocol::Sctp => return Err(Errno::PROTONOSUPPORT.into()),
    };
    let socket =
        Socket::new(Domain::for_address(address), kind.nonblocking().cloexec(), Some(ip_protocol))?;
    if address.is_ipv6() {
        // The IPv4 half of the port has a socket of its own.
        socket.set_only_v6(true)?;
    }
    if protocol == Protocol::Tcp {
        // Past connections in TIME_WAIT do not hold the port; a live listener still does.
        socket.set_reuse_address(true)?;
    }
    prepare(&socket, address, protocol)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn prepare(socket: &Socket, address: SocketAddr, protocol: Protocol) -> io::Result<()> {
    if protocol == Protocol::Tcp {
        enable_stream_ingress(socket, address.is_ipv6())?;
        return prepare_stream(socket);
    }
    // Before Linux 5.0 there is no receive offload; nothing is lost but speed.
    let _ = enable_gro(socket);
    prepare_datagrams(socket);
    batch::enable_packet_info(socket, address.is_ipv6())
}

/// What both sockets of a TCP connection are set to. A listener's settings pass to what it accepts,
/// which saves a connection three system calls. The receive buffer is the kernel's at first, which
/// grows with what is read: one that is fixed before the handshake would bound the window for good
/// (`tcp_select_initial_window`).
pub(crate) fn prepare_stream(stream: impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(&stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    socket.set_tcp_notsent_lowat(UNSENT_NARROW)
}

/// Sets the buffers between `source` and `sink` for a wide half. The receive buffer is fixed at
/// [`UNREAD_BYTES`]; with neither the privilege nor a `net.core.rmem_max` that allows it, it is
/// left to the kernel: a much smaller one would cost more throughput than the bound is worth. One
/// that was narrow is as large as `rmem_max` then.
pub(crate) fn widen(source: impl AsFd, sink: impl AsFd, was_narrow: bool) {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| {
        let limit = std::fs::read_to_string("/proc/sys/net/core/rmem_max").ok();
        limit
            .and_then(|limit| limit.trim().parse::<usize>().ok())
            .is_some_and(|limit| limit >= UNREAD_BYTES)
    });
    if sockopt::set_socket_recv_buffer_size_force(&source, UNREAD_BYTES).is_err()
        && (*ALLOWED || was_narrow)
    {
        // A socket whose peer has gone has no use for it.
        let _ = sockopt::set_socket_recv_buffer_size(&source, UNREAD_BYTES);
    }
    // The buffer is twice that, of which the kernel's bookkeeping takes a part.
    let _ = set_window_clamp(&source, 2 * UNREAD_BYTES as u32);
    let _ = SockRef::from(&sink).set_tcp_notsent_lowat(UNSENT_WIDE);
}

/// Sets the buffers between `source` and `sink` for a narrow half. What has arrived stays; what
/// arrives beyond the buffer from here on is dropped, and sent again when there is room
/// (`tcp_try_rmem_schedule`).
pub(crate) fn narrow(source: impl AsFd, sink: impl AsFd) {
    let _ = sockopt::set_socket_recv_buffer_size(&source, UNREAD_NARROW);
    let _ = SockRef::from(&sink).set_tcp_notsent_lowat(UNSENT_NARROW);
}

/// Lets the kernel deliver GSO batches of datagrams.
pub(crate) fn enable_gro(datagrams: impl AsFd) -> io::Result<()> {
    if Feature::UdpGso.is_forced_off() {
        return Err(Errno::NOPROTOOPT.into());
    }
    batch::enable_receive_offload(datagrams)
}

/// Larger buffers for a datagram socket, as far as the system allows; less is no error.
pub(crate) fn prepare_datagrams(datagrams: impl AsFd) {
    let socket = SockRef::from(&datagrams);
    if sockopt::set_socket_recv_buffer_size_force(&datagrams, UDP_BUFFER).is_err() {
        let _ = socket.set_recv_buffer_size(UDP_BUFFER);
    }
    let _ = socket.set_send_buffer_size(UDP_BUFFER);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener, UdpSocket};

    #[test]
    fn a_busy_port_is_told_with_its_label() {
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
    fn sctp_is_refused_as_the_kernel_would() {
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
