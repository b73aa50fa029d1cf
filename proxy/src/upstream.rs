//! Connections to backends: the interface between the proxy and the rest of the program.
//!
//! The proxy forwards, it does not route. An [`Upstream`] determines the backend of a flow, the
//! source address, and the network namespace of the socket. [`Direct`] uses the namespace of this
//! process; `tidegate_publish` implements upstreams for other namespaces and for transparent
//! sockets.
//!
//! An upstream with several backends gives each a [`BackendId`]. While a backend is dialled, the
//! proxy asks for others: if the dial fails ([`Upstream::open_other`]), and if it is not answered
//! in time ([`Upstream::hedge_after`]). It reports each outcome to the upstream.

use crate::listener::prepare_stream;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;
use tidegate_model::Protocol;
use tidegate_reactor::{SourcePorts, begin_connect};

/// A new flow of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The address and port of the client.
    pub client: SocketAddr,
    /// The local address that the client connected to; `None` unless
    /// [`Upstream::wants_local_address`].
    pub local: Option<SocketAddr>,
    /// The container port that the published port maps to.
    pub container_port: u16,
}

/// A resource that an upstream holds for a flow; dropped with it.
pub type Lease = Box<dyn Send>;

/// Identifies a backend of an upstream that has several. Chosen by the upstream, and meaningful to
/// it alone.
pub type BackendId = u64;

/// Why the dial to a backend failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DialFailure {
    /// The connect failed: the backend sent a reset, or it is unreachable.
    Refused,
    /// The backend did not answer before one that was dialled later did, or before a timeout.
    Silent,
}

/// A socket connected, or connecting, to the backend.
pub struct Opened {
    /// Non-blocking and close-on-exec. UDP: connected; TCP: connected or connecting.
    pub socket: OwnedFd,
    /// A resource that is dropped with the flow, or with the socket if another backend is used.
    pub lease: Option<Lease>,
    /// The backend; `None` if the upstream has only one.
    pub backend: Option<BackendId>,
}

impl From<OwnedFd> for Opened {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, lease: None, backend: None }
    }
}

/// Opens connections to backends. Called on data plane threads, so implementations must not block.
pub trait Upstream: Send + Sync {
    /// Opens a socket for `flow`. A TCP connect may still be in progress when this returns.
    ///
    /// # Errors
    /// Errors of the system calls. If descriptors or memory are exhausted
    /// ([`is_exhaustion`](tidegate_reactor::is_exhaustion)), accepting pauses; any other error
    /// refuses this flow.
    fn open(&self, flow: &Flow) -> io::Result<Opened>;

    /// Opens a TCP socket for `flow` to a backend that is not in `tried`. `None` if there is none
    /// left. Called only for a flow whose [`Opened::backend`] is set, and returns one with a
    /// backend as well.
    ///
    /// The proxy dials at most [`MAX_TRIES`](crate::tcp::MAX_TRIES) backends for one connection.
    ///
    /// # Errors
    /// As for [`open`](Self::open). An error names no backend, so it does not add to `tried`. It
    /// counts as a dial, and unless it is exhaustion, the proxy calls again. The upstream should
    /// then return another backend.
    fn open_other(&self, flow: &Flow, tried: &[BackendId]) -> Option<io::Result<Opened>> {
        let _ = (flow, tried);
        None
    }

    /// Time after the last dial of a flow after which the proxy dials one more backend at the same
    /// time, if none has answered; at least 1 ms. `None`: never. At most
    /// [`MAX_IN_FLIGHT`](crate::tcp::MAX_IN_FLIGHT) are dialled at once.
    fn hedge_after(&self) -> Option<Duration> {
        None
    }

    /// The TCP connect to `backend` has completed, and the flow uses it; or it has sent the first
    /// reply of a UDP session.
    ///
    /// At most one of this and [`failed`](Self::failed) is called for each TCP socket. Neither is
    /// called if the client goes away during the dial, or if `backend` was dialled after the one
    /// that is used.
    fn connected(&self, backend: BackendId) {
        let _ = backend;
    }

    /// The TCP connect to `backend` has failed. For UDP: the port of `backend` is closed, as ICMP
    /// has reported; called for each batch of datagrams with such a report.
    fn failed(&self, backend: BackendId, why: DialFailure) {
        let _ = (backend, why);
    }

    /// Whether UDP sessions with `backend` may continue. If not, the next datagram of the client
    /// opens a new session. Called for each batch of datagrams of such a session, so it must be
    /// cheap.
    fn is_available(&self, backend: BackendId) -> bool {
        let _ = backend;
        true
    }

    /// Whether the UDP `socket`, opened by this upstream, has lost its local address, so that
    /// replies cannot arrive. Called periodically for sessions without replies.
    fn is_stale(&self, socket: BorrowedFd<'_>) -> bool {
        let _ = socket;
        false
    }

    /// Whether [`Flow::local`] is required. It costs one system call per TCP connection.
    fn wants_local_address(&self) -> bool {
        false
    }
}

/// An upstream that connects to a container from the namespace of this process, with the source
/// address that routing selects.
#[derive(Debug)]
pub struct Direct {
    container: IpAddr,
    ports: SourcePorts,
}

impl Direct {
    /// Creates an upstream to `container`.
    pub fn new(container: IpAddr) -> Self {
        Self { container, ports: SourcePorts::default() }
    }

    /// The address of the container.
    pub fn container(&self) -> IpAddr {
        self.container
    }
}

impl Upstream for Direct {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        let to = SocketAddr::new(self.container, flow.container_port);
        let make = || socket(flow.protocol, self.container);
        if flow.protocol == Protocol::Tcp {
            return Ok(self.ports.connect(make, None, to)?.into());
        }
        let socket = make()?;
        begin_connect(&socket, to)?;
        Ok(socket.into())
    }

    fn is_stale(&self, socket: BorrowedFd<'_>) -> bool {
        has_lost_local_address(socket)
    }
}

/// Whether the local address of `socket` no longer exists in the namespace of the calling thread.
///
/// The kernel reports this to a connected IPv4 socket, but not to an IPv6 socket, which continues
/// to send.
pub fn has_lost_local_address(socket: BorrowedFd<'_>) -> bool {
    let local =
        rustix::net::getsockname(socket).ok().and_then(|local| SocketAddr::try_from(local).ok());
    let Some(mut local) = local else { return false };
    local.set_port(0);
    match self::socket(Protocol::Udp, local.ip()) {
        Ok(probe) => rustix::net::bind(&probe, &local) == Err(Errno::ADDRNOTAVAIL),
        Err(_) => false,
    }
}

/// Creates a non-blocking socket for `protocol` with the family of `address`, in the namespace of
/// the calling thread. A stream socket gets the same options as the socket of the client.
///
/// # Errors
/// Errors of socket(2) and setsockopt(2); `EPROTONOSUPPORT` for SCTP.
pub fn socket(protocol: Protocol, address: IpAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let (kind, protocol) = match protocol {
        Protocol::Tcp => (SocketType::STREAM, ipproto::TCP),
        Protocol::Udp => (SocketType::DGRAM, ipproto::UDP),
        Protocol::Sctp => return Err(Errno::PROTONOSUPPORT.into()),
    };
    let socket =
        socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, Some(protocol))?;
    if kind == SocketType::STREAM {
        // Before the connect, because afterwards it would delay the first bytes to a backend that
        // is already awake.
        prepare_stream(&socket)?;
    }
    Ok(socket)
}
