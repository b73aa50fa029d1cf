//! Connections to backends: the interface between the proxy and the rest of the program.
//!
//! The proxy forwards, it does not route. An [`Upstream`] determines the backend of a flow, the
//! source address, and the network namespace of the socket. [`Direct`] uses the namespace of this
//! process; `tidegate_publish` implements upstreams for other namespaces and for transparent
//! sockets.

use crate::listener::prepare_stream;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
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

/// A socket connected, or connecting, to the backend.
pub struct Opened {
    /// Non-blocking and close-on-exec. UDP: connected; TCP: connected or connecting.
    pub socket: OwnedFd,
    /// A resource that is dropped with the flow.
    pub lease: Option<Lease>,
}

impl From<OwnedFd> for Opened {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, lease: None }
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
