//! Which address the container sees as its client's, and how the socket for that is made.
//!
//! | | TCP | UDP |
//! |---|---|---|
//! | [`Source::Proxy`], no namespace at hand | the host's own, by the route | the same |
//! | [`Source::Proxy`], with the container's namespace | its gateway | its gateway |
//! | [`Source::Client`], no namespace at hand | the client's: transparent socket, rule for its answers | the same |
//! | [`Source::Client`], with the container's namespace | the client's: the short path | the client's: socket inside, rule for its answers |
//!
//! The short path: the socket is made inside the container's namespace, bound to the client's
//! address (`IP_TRANSPARENT`) and marked. The container's answers inherit the mark
//! (`tcp_fwmark_accept`), and a rule for the mark leads them to `lo` and so back to our socket.
//! Nothing crosses the veth pair or the bridge: it is as fast as the kernel's own path, and rules
//! and captures on the container's interface do not see it.
//!
//! UDP answers inherit no mark. What leads them back is a rule for the published port *and* the
//! client's address, there for as long as the client has a session; a broader one would swallow the
//! answers to others who talk to the container directly.
//!
//! Some clients are never shown as themselves but as the gateway: those on a network of the
//! container's own (it would answer them directly), the host's own addresses, and loopback above
//! all (applications trust 127.0.0.1: CVE-2021-20199). Where binding a single flow fails, it goes
//! by the gateway too, and that is counted.

mod claims;
mod inside;
mod relocatable;
mod transparent;

use crate::host_context::HostContext;
use metrics::{Counter, counter};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use tidegate_model::Protocol;
use tidegate_netns::{AddressBook, Namespace, PolicyRouteError};
use tidegate_proxy::{Direct, Upstream};

pub use inside::Inside;
pub use relocatable::Relocatable;
pub use transparent::Transparent;

/// Removes what processes that were killed have left in namespaces, as their journal tells.
pub fn sweep_stale_owners() {
    match tidegate_netns::sweep() {
        Ok(0) => {}
        Ok(owners) => tracing::info!(owners, "cleaned up after processes that were killed"),
        // It is the next one's turn then; nothing that is begun here depends on it.
        Err(error) => tracing::debug!(%error, "cannot look for what killed processes left"),
    }
}

/// What the container sees as its client's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The proxy's: the gateway of the container.
    Proxy,
    /// The client's own.
    Client,
    /// The proxy's, and a header in front of the connection tells the client's.
    ProxyProtocol,
}

impl Source {
    /// What there is to choose from.
    pub const ALL: [Self; 3] = [Self::Proxy, Self::Client, Self::ProxyProtocol];

    /// Its name on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Client => "client",
            Self::ProxyProtocol => "proxy-protocol",
        }
    }

    /// The way to `container` from this process's own namespace.
    ///
    /// # Errors
    /// [`SourceError`] when the client's address is to be shown and this process may not do that.
    pub fn towards(self, container: IpAddr) -> Result<Arc<dyn Upstream>, SourceError> {
        match self {
            Self::Proxy | Self::ProxyProtocol => Ok(Arc::new(Direct::new(container))),
            Self::Client => Ok(Arc::new(Transparent::new(container)?)),
        }
    }

    /// The way to the container that lives in `namespace`, on a network of `host_context`.
    /// `protocol` matters where nothing was asked for (`None`): TCP then shows the client's
    /// address, and UDP the gateway's.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn towards_namespace(
        asked: Option<Self>,
        host_context: &HostContext,
        namespace: &Namespace,
        container: &[IpAddr],
        protocol: Protocol,
    ) -> Result<Arc<dyn Upstream>, SourceError> {
        let show_client = match asked {
            Some(source) => source == Self::Client,
            None => protocol == Protocol::Tcp,
        };
        Ok(Arc::new(Inside::new(host_context, namespace, container, protocol, show_client)?))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A source that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of proxy, client, proxy-protocol")]
pub struct UnknownSource(String);

impl FromStr for Source {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|source| source.as_str() == text);
        known.ok_or_else(|| UnknownSource(text.to_owned()))
    }
}

/// Why a source cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Transparent sockets need a privilege.
    #[error("source address \"client\": a transparent socket needs CAP_NET_ADMIN: {0}")]
    Transparent(io::Error),
    /// The rules that lead answers back could not be set.
    #[error(transparent)]
    PolicyRoute(#[from] PolicyRouteError),
    /// The container's addresses and routes could not be read.
    #[error("addresses of {namespace}: {cause}{}", hint(.cause))]
    Addresses {
        /// Whose.
        namespace: String,
        /// What the system said.
        cause: io::Error,
    },
    /// The namespace has nothing to connect to.
    #[error("{namespace} has no address but loopback: give it one, or say --to ADDRESS")]
    NoAddress {
        /// Which.
        namespace: String,
    },
    /// The container cannot be reached from here other than by the default route.
    #[error(
        "source address \"client\": {0} is on no network of this host, so its answers do not pass here"
    )]
    NotConnected(IpAddr),
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::PermissionDenied => {
            " (entering a namespace needs CAP_SYS_ADMIN: run as root)"
        }
        _ => "",
    }
}

/// How often a flow could not show the address it should, by reason.
struct Fallbacks {
    /// The client's address and port were taken, at the container's end or ours.
    conflict: Counter,
    /// The client speaks IPv6 and the container IPv4, or the other way round.
    family: Counter,
    /// No rule could be made to lead the answers back; mostly because there are as many as there
    /// may be.
    rule: Counter,
}

impl Fallbacks {
    fn new() -> Self {
        const NAME: &str = "tidegate_proxy_source_fallbacks_total";
        metrics::describe_counter!(
            NAME,
            "Flows that showed the gateway where the client was to be shown."
        );
        let reason = |reason: &'static str| counter!(NAME, "reason" => reason);
        Self { conflict: reason("conflict"), family: reason("family"), rule: reason("rule") }
    }
}

/// Whether `client` must not be shown to a container at `container` as itself. `there` is what is
/// known of the container's own namespace.
fn shows_as_gateway(
    client: IpAddr,
    container: IpAddr,
    host: &AddressBook,
    there: Option<&AddressBook>,
) -> bool {
    client.is_loopback()
        || client.is_unspecified()
        || matches!(client, IpAddr::V6(v6) if is_link_local(v6))
        || host.is_local(client)
        || host.on_link_with(client, container)
        || there.is_some_and(|there| there.is_local(client) || there.is_on_link(client))
}

/// `fe80::/10` says nothing without an interface, and the client's is not the container's.
fn is_link_local(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

/// A transparent socket bound to `source`, in the calling thread's namespace, with `mark` if there
/// is one.
///
/// A `source` with port 0 gets its port on connecting (`IP_BIND_ADDRESS_NO_PORT`): then ports are
/// scarce for each destination only, and those in TIME_WAIT serve again.
fn transparent_socket(
    protocol: Protocol,
    source: SocketAddr,
    mark: Option<u32>,
) -> io::Result<std::os::fd::OwnedFd> {
    let socket = socket2::Socket::from(tidegate_proxy::socket(protocol, source.ip())?);
    if source.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    if source.port() == 0 {
        bind_without_port(&socket)?;
    } else {
        // The same client port may be talking to another published port.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&source.into())?;
    Ok(socket.into())
}

fn bind_without_port(socket: &socket2::Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let on: libc::c_int = 1;
    // SAFETY: the pointer and the length describe `on`. The option is one of level IP for IPv6
    // sockets too.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether `error` says that an address is taken, rather than that something is wrong.
fn is_conflict(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// An error of our own making, which no system call returns: there is no rule to lead the answers
/// back.
fn no_rule(error: PolicyRouteError) -> io::Error {
    io::Error::other(error)
}

fn is_missing_rule(error: &io::Error) -> bool {
    error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<PolicyRouteError>)
}
