//! Connects to containers on other hosts through a sandbox: a namespace of this host on their
//! network.
//!
//! The sockets are created in the sandbox, so the host itself has no route to the containers. A
//! socket that is bound to the address of the client (`IP_TRANSPARENT`) gets the replies because
//! the sandbox accepts all packets from the network as its own: a policy rule for the interface,
//! and a local default route. The container sends them back to the sandbox that its connection
//! came from (`tidegate_netfilter::ReplySteering`). Only these sockets exist in the sandbox, and it
//! forwards nothing.

use super::claims::Claims;
use super::{Fallbacks, SourceError, is_conflict, shows_as_gateway, transparent_socket};
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::Protocol;
use tidegate_netns::{
    AddressBook, Families, Family, Namespace, PolicyRoute, Selector, Steered, Sysctl,
};
use tidegate_proxy::{Flow, Lease, Opened, socket};
use tidegate_reactor::{SourcePorts, begin_connect};

/// Idle time after which a connection to a container is probed, and interval of the probes. A
/// host that disappears sends no reset, and an idle connection to it would stay forever.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// Unanswered probes after which a connection is reset.
const PROBES: u32 = 3;

/// Sysctls of a sandbox; `IF` is its interface. For the kernel, all addresses are local because of
/// the local default route. Without `arp_ignore`, it would answer ARP requests for those of all
/// containers (`arp_process`, net/ipv4/arp.c); neighbour discovery answers for addresses of the
/// interface only. A new namespace has the IPv4 settings of the first one
/// (`net.core.devconf_inherit_init_net`).
const SYSCTLS: [(&str, &str, Family); 6] = [
    ("net.ipv4.conf.IF.arp_ignore", "1", Family::V4),
    ("net.ipv4.ip_forward", "0", Family::V4),
    ("net.ipv4.conf.IF.accept_redirects", "0", Family::V4),
    ("net.ipv6.conf.all.forwarding", "0", Family::V6),
    ("net.ipv6.conf.IF.accept_redirects", "0", Family::V6),
    ("net.ipv6.conf.IF.accept_ra", "0", Family::V6),
];

/// A sandbox on a network.
pub struct Sandbox {
    namespace: Namespace,
    /// Addresses of the sandbox, at most one per family.
    own: Vec<IpAddr>,
    host: Arc<AddressBook>,
    there: Arc<AddressBook>,
    _rules: Vec<Steered>,
    fallbacks: Fallbacks,
    ports: SourcePorts,
    claims: Arc<Claims>,
}

impl Sandbox {
    /// Prepares the sandbox in `namespace`, which has the addresses `own` on `interface`. `host` is
    /// the namespace with the clients.
    ///
    /// # Errors
    /// [`SourceError`]. No state is left behind.
    pub fn new(
        host: &Namespace,
        namespace: &Namespace,
        interface: &str,
        own: &[IpAddr],
    ) -> Result<Self, SourceError> {
        let name = namespace.id().to_string();
        let addresses = |cause| SourceError::Addresses { namespace: name.clone(), cause };
        let families = match (own.iter().any(IpAddr::is_ipv4), own.iter().any(IpAddr::is_ipv6)) {
            (_, false) => Families::V4,
            (false, true) => Families::V6,
            (true, true) => Families::Both,
        };
        let sysctls: Vec<_> = SYSCTLS
            .iter()
            .filter(|(_, _, family)| families.contains(*family))
            .map(|(name, value, _)| Sysctl::new(name.replace("IF", interface), *value))
            .collect();
        let routes = Arc::new(PolicyRoute::install(namespace, families, &sysctls)?);
        let mut rules = Vec::new();
        for family in families.iter() {
            let input_interface = Some(interface.to_owned());
            rules.push(routes.steer(Selector { input_interface, ..Selector::new(family) })?);
        }
        Ok(Self {
            namespace: namespace.clone(),
            own: own.to_vec(),
            host: AddressBook::of(host).map_err(addresses)?,
            there: AddressBook::of(namespace).map_err(addresses)?,
            _rules: rules,
            fallbacks: Fallbacks::new(),
            ports: SourcePorts::default(),
            claims: Arc::default(),
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Returns whether `container` may see the address of `client`.
    pub fn shows(&self, client: IpAddr, container: IpAddr) -> bool {
        if shows_as_gateway(client, container, &self.host, Some(&self.there)) {
            return false;
        }
        if client.is_ipv4() != container.is_ipv4() {
            self.fallbacks.family.increment(1);
            return false;
        }
        true
    }

    /// Connects to `to` with the address and port of the client.
    ///
    /// # Errors
    /// [`is_taken`](Self::is_taken), if the client has a flow from this port to this container.
    pub fn connect_as_client(&self, flow: &Flow, to: SocketAddr) -> io::Result<Opened> {
        // A scope id is valid only on the link of the client.
        let client = SocketAddr::new(flow.client.ip(), flow.client.port());
        let lease = match flow.protocol {
            Protocol::Udp => Some(Box::new(self.claims.claim(client, to)?) as Lease),
            Protocol::Tcp | Protocol::Sctp => None,
        };
        let make = || {
            let socket = transparent_socket(flow.protocol, client, None)?;
            prepare(&socket, flow.protocol)?;
            begin_connect(&socket, to)?;
            Ok::<_, io::Error>(socket)
        };
        Ok(Opened { lease, ..self.namespace.with(make)??.into() })
    }

    /// Whether `error` of [`connect_as_client`](Self::connect_as_client) means that the port of the
    /// client is taken.
    #[must_use]
    pub fn is_taken(error: &io::Error) -> bool {
        is_conflict(error)
    }

    /// Connects to `to` with the address of the client, and another port.
    ///
    /// # Errors
    /// Errors of the system calls.
    pub fn connect_from_other_port(&self, flow: &Flow, to: SocketAddr) -> io::Result<Opened> {
        self.fallbacks.conflict.increment(1);
        self.connect_from(flow, Some(flow.client.ip()), to)
    }

    /// Connects to `to` with the address of the sandbox.
    ///
    /// # Errors
    /// Errors of the system calls.
    pub fn connect(&self, flow: &Flow, to: SocketAddr) -> io::Result<Opened> {
        let own = self.own.iter().find(|own| own.is_ipv4() == to.is_ipv4());
        self.connect_from(flow, own.copied(), to)
    }

    fn connect_from(
        &self,
        flow: &Flow,
        source: Option<IpAddr>,
        to: SocketAddr,
    ) -> io::Result<Opened> {
        let make = || {
            let socket = match source {
                Some(source) => {
                    transparent_socket(flow.protocol, SocketAddr::new(source, 0), None)?
                }
                None => socket(flow.protocol, to.ip())?,
            };
            prepare(&socket, flow.protocol)?;
            Ok(socket)
        };
        let connect = || match flow.protocol {
            Protocol::Tcp => self.ports.connect(make, source, to),
            Protocol::Udp | Protocol::Sctp => {
                let socket = make()?;
                begin_connect(&socket, to)?;
                Ok(socket)
            }
        };
        Ok(self.namespace.with(connect)??.into())
    }
}

/// Sets the options of a socket to a container.
fn prepare(socket: &OwnedFd, protocol: Protocol) -> io::Result<()> {
    if protocol != Protocol::Tcp {
        return Ok(());
    }
    let probes = TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE);
    SockRef::from(socket).set_tcp_keepalive(&probes.with_retries(PROBES))
}
