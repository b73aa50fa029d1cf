//! Connects to a container with sockets in its namespace.

use super::claims::Claims;
use super::{
    Fallbacks, SourceError, is_conflict, is_missing_rule, no_rule, shows_as_gateway,
    transparent_socket,
};
use socket2::SockRef;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use tidegate_model::{Protocol, registry};
use tidegate_netns::HostContext;
use tidegate_netns::{
    AddressBook, Families, Family, Namespace, PolicyRoute, Selector, Steered, Sysctl,
};
use tidegate_proxy::{Flow, Lease, Opened, Upstream, has_lost_local_address, socket};
use tidegate_reactor::{SourcePorts, begin_connect};

/// The sysctls that make TCP replies inherit the mark of their connection: replies of accepted
/// connections, and replies without a socket (the RST of a closed port, ICMP errors).
const MARK_SYSCTLS: [(&str, Family); 3] = [
    ("net.ipv4.tcp_fwmark_accept", Family::V4),
    ("net.ipv4.fwmark_reflect", Family::V4),
    ("net.ipv6.fwmark_reflect", Family::V6),
];

/// An upstream with sockets in the namespace of the container.
pub struct NamespaceUpstream {
    namespace: Namespace,
    /// At most one per address family.
    containers: Vec<Container>,
    host: Arc<AddressBook>,
    there: Arc<AddressBook>,
    show_client: bool,
    routes: Option<Arc<PolicyRoute>>,
    /// The policy rules for the mark.
    _marked: Vec<Steered>,
    fallbacks: Fallbacks,
    ports: SourcePorts,
    claims: Arc<Claims>,
}

/// An address of the container.
struct Container {
    address: IpAddr,
    /// The address of the host on its network; otherwise the gateway of its default route.
    gateway: Option<IpAddr>,
    /// The interface to its network, if the namespace of the event loops is on that network.
    interface: Option<String>,
}

impl NamespaceUpstream {
    /// An upstream for flows of `protocol` to `containers`; if empty, to the addresses of the
    /// namespace.
    ///
    /// # Errors
    /// [`SourceError`]. No state is left behind.
    pub fn new(
        host_context: &HostContext,
        namespace: &Namespace,
        containers: &[IpAddr],
        protocol: Protocol,
        show_client: bool,
    ) -> Result<Self, SourceError> {
        let name = namespace.id().to_string();
        let addresses = |cause| SourceError::Addresses { namespace: name.clone(), cause };
        let host = AddressBook::of(host_context.ports()).map_err(addresses)?;
        let there = AddressBook::of(namespace).map_err(addresses)?;
        let home = AddressBook::of(host_context.networks()).map_err(addresses)?;
        let mut found = containers.to_vec();
        if found.is_empty() {
            found = there.container_addresses();
        }
        let mut containers = Vec::new();
        for family in Family::ALL {
            let Some(address) =
                found.iter().copied().find(|address| Family::of(*address) == family)
            else {
                continue;
            };
            let (mut interface, mut gateway) = (None, None);
            if namespace.id() != host_context.networks().id() {
                let connected = home.connected_interface(address).map_err(addresses)?;
                interface = connected.map(|(_, name)| name);
                gateway = home.own_on_link_with(address);
            }
            // An internal network has no default route, and root in a container can change it.
            if gateway.is_none() {
                gateway = there.gateway(family).map_err(addresses)?;
            }
            containers.push(Container { address, gateway, interface });
        }
        if containers.is_empty() {
            return Err(SourceError::NoAddress { namespace: name });
        }
        let mut inside = Self {
            namespace: namespace.clone(),
            containers,
            host,
            there,
            show_client,
            routes: None,
            _marked: Vec::new(),
            fallbacks: Fallbacks::new(),
            claims: Arc::default(),
            ports: SourcePorts::default(),
        };
        let families = match (inside.has(Family::V4), inside.has(Family::V6)) {
            (true, false) => Families::V4,
            (false, _) => Families::V6,
            (true, true) => Families::Both,
        };
        match protocol {
            Protocol::Tcp => {
                // The first sysctl also applies to IPv6, despite its name.
                let needed = |family| family == Family::V4 || families.contains(family);
                let sysctls = MARK_SYSCTLS.iter().filter(|(_, family)| needed(*family));
                let sysctls: Vec<_> = sysctls.map(|(name, _)| Sysctl::new(*name, "1")).collect();
                let routes = Arc::new(PolicyRoute::install(namespace, families, &sysctls)?);
                for family in families.iter() {
                    inside._marked.push(routes.steer(Selector::marked(family, registry::MARK))?);
                }
                inside.routes = Some(routes);
            }
            Protocol::Udp if show_client => {
                let routes = PolicyRoute::install(namespace, families, &[])?;
                for container in
                    inside.containers.iter().filter(|container| container.address.is_ipv4())
                {
                    routes.set_source(container.address)?;
                }
                inside.routes = Some(Arc::new(routes));
            }
            Protocol::Udp | Protocol::Sctp => {}
        }
        Ok(inside)
    }

    fn has(&self, family: Family) -> bool {
        self.containers.iter().any(|container| Family::of(container.address) == family)
    }

    /// The container address for `client`, preferably of the same family.
    fn container_for(&self, client: IpAddr) -> &Container {
        let same = self
            .containers
            .iter()
            .find(|container| container.address.is_ipv4() == client.is_ipv4());
        // `new` guarantees at least one.
        same.unwrap_or(&self.containers[0])
    }

    /// The address of the client, if this flow may use it.
    fn shown(&self, flow: &Flow, container: &Container) -> Option<SocketAddr> {
        let client = flow.client;
        if !self.show_client
            || shows_as_gateway(client.ip(), container.address, &self.host, Some(&self.there))
        {
            return None;
        }
        if client.is_ipv4() != container.address.is_ipv4() {
            self.fallbacks.family.increment(1);
            return None;
        }
        // A scope id is valid only on the link of the client.
        Some(SocketAddr::new(client.ip(), client.port()))
    }

    /// Connects from `source` inside the namespace. TCP sockets are marked. A missing source
    /// address or port is chosen automatically.
    fn connect_inside(
        &self,
        flow: &Flow,
        source: Option<SocketAddr>,
        to: SocketAddr,
    ) -> io::Result<OwnedFd> {
        let mark = (flow.protocol == Protocol::Tcp).then_some(registry::MARK);
        let make = || match source {
            Some(source) => transparent_socket(flow.protocol, source, mark),
            None => socket(flow.protocol, to.ip()),
        };
        self.namespace.with(|| match source {
            _ if flow.protocol == Protocol::Tcp
                && source.is_none_or(|source| source.port() == 0) =>
            {
                self.ports.connect(make, source.map(|source| source.ip()), to)
            }
            _ => {
                let socket = make()?;
                begin_connect(&socket, to)?;
                Ok(socket)
            }
        })?
    }

    /// Opens a flow with the source address of the gateway.
    fn open_as_gateway(&self, flow: &Flow, container: &Container) -> io::Result<Opened> {
        let to = SocketAddr::new(container.address, flow.container_port);
        let socket = match (flow.protocol, container.gateway, &container.interface) {
            (Protocol::Tcp, Some(gateway), _) => {
                self.connect_inside(flow, Some(SocketAddr::new(gateway, 0)), to)?
            }
            // From the namespace of the event loops, the route selects the gateway address as the
            // source, and replies are routed back. Only the network of the container may send them.
            (Protocol::Udp, _, Some(interface)) => {
                let socket = socket(flow.protocol, to.ip())?;
                SockRef::from(&socket).bind_device(Some(interface.as_bytes()))?;
                begin_connect(&socket, to)?;
                socket
            }
            // TCP without a gateway, or UDP to a namespace that is not connected: the source is an
            // address of the namespace.
            _ => self.connect_inside(flow, None, to)?,
        };
        Ok(socket.into())
    }

    /// Opens a flow with the source address of the client.
    fn open_as_client(
        &self,
        flow: &Flow,
        client: SocketAddr,
        container: &Container,
    ) -> io::Result<Opened> {
        let to = SocketAddr::new(container.address, flow.container_port);
        let lease = match (&self.routes, flow.protocol) {
            (Some(routes), Protocol::Udp) => {
                let claim = self.claims.claim(client, to)?;
                let replies = Selector {
                    to: Some(client.ip()),
                    protocol: Some(Protocol::Udp),
                    source_port: Some(flow.container_port),
                    ..Selector::new(Family::of(client.ip()))
                };
                Some(Box::new((routes.steer(replies).map_err(no_rule)?, claim)) as Lease)
            }
            _ => None,
        };
        Ok(Opened { lease, ..self.connect_inside(flow, Some(client), to)?.into() })
    }
}

impl Upstream for NamespaceUpstream {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        let container = self.container_for(flow.client.ip());
        if let Some(client) = self.shown(flow, container) {
            match self.open_as_client(flow, client, container) {
                Err(error) if is_conflict(&error) => self.fallbacks.conflict.increment(1),
                Err(error) if is_missing_rule(&error) => self.fallbacks.rule.increment(1),
                result => return result,
            }
        }
        self.open_as_gateway(flow, container)
    }

    fn is_stale(&self, socket: BorrowedFd<'_>) -> bool {
        // Only sockets of the current namespace can be checked. With `show_client`, a socket may
        // belong to the namespace of the container.
        let all_ours = !self.show_client
            && self.containers.iter().all(|container| container.interface.is_some());
        all_ours && has_lost_local_address(socket)
    }
}
