//! Where a flow goes: the seam between the proxy and whoever knows the backend.
//!
//! The proxy forwards; it does not choose. Which address a flow goes to, from which address and in
//! which network namespace its socket is made, says an [`Upstream`]: the binary implements it over
//! a namespace, the NAT engine or the mesh.

use crate::listener::prepare_stream;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use tidegate_model::Protocol;
use tidegate_reactor::{SourcePorts, begin_connect};

/// A client that asks to be connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The client's own address and port.
    pub client: SocketAddr,
    /// The address of this host that the client used; `None` unless
    /// [`Upstream::wants_local_address`].
    pub local: Option<SocketAddr>,
    /// The port of the container that the published port stands for.
    pub container_port: u16,
}

/// Kept for as long as the flow lives, then dropped: what an upstream holds on its behalf.
pub type Lease = Box<dyn Send>;

/// A socket on its way to the backend.
pub struct Opened {
    /// Non-blocking, close-on-exec; UDP: connected, TCP: connected or connecting.
    pub socket: OwnedFd,
    /// What ends with the flow, if anything does.
    pub lease: Option<Lease>,
}

impl From<OwnedFd> for Opened {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, lease: None }
    }
}

/// Opens the way to a backend, flow by flow. Called on the data plane's threads: it must not wait.
pub trait Upstream: Send + Sync {
    /// A socket for `flow`. A TCP connect is begun, not awaited.
    ///
    /// # Errors
    /// What the system says. Lack of descriptors or memory ([`is_exhaustion`]) pauses accepting;
    /// everything else refuses this flow.
    fn open(&self, flow: &Flow) -> io::Result<Opened>;

    /// Whether the UDP `socket` that this upstream has opened has lost the address it sends from,
    /// so that answers cannot find it. Asked from time to time of sessions that get none.
    fn is_stale(&self, socket: BorrowedFd<'_>) -> bool {
        let _ = socket;
        false
    }

    /// Whether [`Flow::local`] is to be filled in; it costs a system call for each TCP connection.
    fn wants_local_address(&self) -> bool {
        false
    }
}

/// Whether `error` says that this process or the system has run out of something that comes back.
pub fn is_exhaustion(error: &io::Error) -> bool {
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    Errno::from_io_error(error).is_some_and(|errno| exhausted.contains(&errno))
}

/// A backend reached from this process's own namespace, from whatever address the route says.
#[derive(Debug)]
pub struct Direct {
    container: IpAddr,
    ports: SourcePorts,
}

impl Direct {
    /// The way to `container`.
    pub fn new(container: IpAddr) -> Self {
        Self { container, ports: SourcePorts::default() }
    }

    /// The container's address.
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
        has_lost_its_address(socket)
    }
}

/// Whether the address that `socket` sends from is not one of the calling thread's namespace any
/// more.
///
/// The kernel tells that to a connected IPv4 socket, and not to an IPv6 one, whose datagrams go on
/// leaving.
pub fn has_lost_its_address(socket: BorrowedFd<'_>) -> bool {
    let local =
        rustix::net::getsockname(socket).ok().and_then(|local| SocketAddr::try_from(local).ok());
    let Some(mut local) = local else { return false };
    local.set_port(0);
    match self::socket(Protocol::Udp, local.ip()) {
        Ok(probe) => rustix::net::bind(&probe, &local) == Err(Errno::ADDRNOTAVAIL),
        Err(_) => false,
    }
}

/// A non-blocking socket for `protocol`, of the family of `address`, in the calling thread's
/// namespace. A stream socket has the same options as the client's.
///
/// # Errors
/// What socket(2) and setsockopt(2) say; SCTP is `EPROTONOSUPPORT`.
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
        // Before the connect, not between it and the first bytes: the backend is awake by then.
        prepare_stream(&socket)?;
    }
    Ok(socket)
}
