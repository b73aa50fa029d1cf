//! The source address that a container sees, and the sockets that connect with it.
//!
//! | | TCP | UDP |
//! |---|---|---|
//! | [`Source::Proxy`], without the namespace of the container | an address of the host, chosen by the route | the same |
//! | [`Source::Proxy`], with the namespace of the container | the gateway | the gateway |
//! | [`Source::Client`], without the namespace of the container | the client: transparent socket, policy rule for replies | the same |
//! | [`Source::Client`], with the namespace of the container | the client: short path | the client: socket inside, policy rule for replies |
//!
//! On the short path, the socket is created inside the namespace of the container, bound to the
//! address of the client (`IP_TRANSPARENT`) and marked. Replies of the container inherit the mark
//! (`tcp_fwmark_accept`), and a policy rule for the mark routes them to `lo` and thus back to the
//! socket. No packet crosses the veth pair or the bridge. The path is as fast as that of the
//! kernel, but firewall rules and captures on the interface of the container do not see it.
//!
//! UDP replies do not inherit a mark. They are routed back by a policy rule for the published port
//! *and* the address of the client, which exists as long as the client has a session. A broader
//! rule would also match replies to peers that talk to the container directly.
//!
//! The container always sees the gateway instead of clients on its own network (it would reply to
//! them directly), addresses of the host, and loopback (applications trust 127.0.0.1:
//! CVE-2021-20199). If the socket of a flow cannot be bound to the address of the client, the flow
//! falls back to the gateway, and the fallback is counted.

mod claims;
mod host;
mod inside;
mod relocatable;
mod sandbox;
mod transparent;

use metrics::{Counter, counter};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use tidegate_model::Protocol;
use tidegate_netns::HostContext;
use tidegate_netns::{AddressBook, Namespace, PolicyRouteError};
use tidegate_proxy::{Direct, Upstream};
use tidegate_reactor::set_number;

pub use host::HostUpstream;
pub use inside::NamespaceUpstream;
pub use relocatable::RelocatableUpstream;
pub use sandbox::Sandbox;
pub use transparent::TransparentUpstream;

/// Removes state that killed processes left in namespaces, according to their journals.
pub fn sweep_stale_owners() {
    match tidegate_netns::sweep() {
        Ok(0) => {}
        Ok(owners) => tracing::info!(owners, "state of killed processes removed"),
        // The next process retries; nothing here depends on the result.
        Err(error) => tracing::debug!(%error, "state of killed processes not removed"),
    }
}

/// The source address that a container sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The address of the gateway.
    Proxy,
    /// The address of the client.
    Client,
    /// The address of the gateway, with a PROXY protocol header that carries the address of the
    /// client.
    ProxyProtocol,
}

impl Source {
    /// All variants.
    pub const ALL: [Self; 3] = [Self::Proxy, Self::Client, Self::ProxyProtocol];

    /// The value on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Proxy => "proxy",
            Self::Client => "client",
            Self::ProxyProtocol => "proxy-protocol",
        }
    }

    /// An upstream that connects to `container` from the namespace of this process.
    ///
    /// # Errors
    /// [`SourceError`] if the addresses of this host cannot be read, or if the address of the client
    /// is requested and not possible.
    pub fn upstream_to(
        self,
        container: IpAddr,
        protocol: Protocol,
    ) -> Result<Arc<dyn Upstream>, SourceError> {
        match self {
            // The routes are only needed for UDP.
            Self::Proxy | Self::ProxyProtocol if protocol == Protocol::Udp => {
                let (_, host) = this_host()?;
                Ok(Arc::new(HostUpstream::new(container, host)))
            }
            Self::Proxy | Self::ProxyProtocol => Ok(Arc::new(Direct::new(container))),
            Self::Client => Ok(Arc::new(TransparentUpstream::new(container)?)),
        }
    }

    /// An upstream that connects to the container in `namespace`, on a network of `host_context`.
    /// With `requested` set to `None`, TCP shows the address of the client, and UDP that of the
    /// gateway.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn upstream_to_namespace(
        requested: Option<Self>,
        host_context: &HostContext,
        namespace: &Namespace,
        container: &[IpAddr],
        protocol: Protocol,
    ) -> Result<Arc<dyn Upstream>, SourceError> {
        let show_client = match requested {
            Some(source) => source == Self::Client,
            None => protocol == Protocol::Tcp,
        };
        Ok(Arc::new(NamespaceUpstream::new(
            host_context,
            namespace,
            container,
            protocol,
            show_client,
        )?))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a source is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not proxy, client or proxy-protocol")]
pub struct UnknownSource(String);

impl FromStr for Source {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.into_iter().find(|source| source.as_str() == text);
        known.ok_or_else(|| UnknownSource(text.to_owned()))
    }
}

/// Why a source address is not possible.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A transparent socket needs a privilege.
    #[error("source address \"client\": a transparent socket needs CAP_NET_ADMIN: {0}")]
    Transparent(io::Error),
    /// The policy rules for replies cannot be added.
    #[error(transparent)]
    PolicyRoute(#[from] PolicyRouteError),
    /// The addresses and routes of the container cannot be read.
    #[error("addresses of {namespace}: {cause}{}", hint(.cause))]
    Addresses {
        /// The namespace.
        namespace: String,
        /// The error of the system call.
        cause: io::Error,
    },
    /// The namespace has no address to connect to.
    #[error("{namespace} has only loopback addresses; add an address, or set one with --to")]
    NoAddress {
        /// The namespace.
        namespace: String,
    },
    /// The container is reachable only by the default route.
    #[error(
        "source address \"client\": {0} is not on a network of this host, so its replies do not pass this host"
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

/// The namespace of the calling thread, and its addresses.
fn this_host() -> Result<(Namespace, Arc<AddressBook>), SourceError> {
    let failed = |cause| SourceError::Addresses { namespace: "this host".to_owned(), cause };
    let home = Namespace::current().map_err(failed)?;
    let host = AddressBook::of(&home).map_err(failed)?;
    Ok((home, host))
}

/// Counters of flows that fell back to another source address, by reason.
struct Fallbacks {
    /// The address and port of the client were in use, in the container or in the proxy.
    conflict: Counter,
    /// Client and container use different address families.
    family: Counter,
    /// The policy rule for replies could not be added, usually because the limit of rules is
    /// reached.
    rule: Counter,
}

impl Fallbacks {
    fn new() -> Self {
        const NAME: &str = "tidegate_proxy_source_fallbacks_total";
        metrics::describe_counter!(
            NAME,
            "Flows with the source address of the gateway instead of the client."
        );
        let reason = |reason: &'static str| counter!(NAME, "reason" => reason);
        Self { conflict: reason("conflict"), family: reason("family"), rule: reason("rule") }
    }
}

/// Whether the container at `container` sees the gateway instead of `client`. `there` is the
/// address book of the container namespace, if known.
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

/// Whether `ip` is in `fe80::/10`. Such an address is valid only on the link of the client, which
/// is not the link of the container.
fn is_link_local(ip: Ipv6Addr) -> bool {
    ip.segments()[0] & 0xffc0 == 0xfe80
}

/// A transparent socket bound to `source`, in the namespace of the calling thread, with `mark` if
/// given.
///
/// For port 0, the port is chosen at connect time (`IP_BIND_ADDRESS_NO_PORT`). The number of ports
/// is then limited per destination, and ports in TIME_WAIT can be reused.
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
        // The option has level IP for IPv6 sockets, too.
        set_number(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    } else {
        // The same port of the client may already talk to another published port.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&source.into())?;
    Ok(socket.into())
}

/// Whether `error` means that an address is in use.
fn is_conflict(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// The error for a missing policy rule. No system call returns this kind.
fn no_rule(error: PolicyRouteError) -> io::Error {
    io::Error::other(error)
}

fn is_missing_rule(error: &io::Error) -> bool {
    error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<PolicyRouteError>)
}
