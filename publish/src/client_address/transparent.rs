//! Transparent sockets in the namespace of this process: the address of the client without access
//! to the container namespace.
//!
//! The container sends replies to the address of the client, through this host. A policy rule for
//! the container, the published port and the client routes them to the transparent socket. The rule
//! exists while the client has a flow. It also matches replies to this client that did not pass the
//! proxy (kernel DNAT), so this mode must be requested explicitly.

use super::claims::Claims;
use super::host::HostUpstream;
use super::{
    Fallbacks, SourceError, is_conflict, is_missing_rule, no_rule, shows_as_gateway, this_host,
    transparent_socket,
};
use socket2::SockRef;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use tidegate_model::Protocol;
use tidegate_netns::{AddressBook, Families, Family, PolicyRoute, Selector};
use tidegate_proxy::{Flow, Lease, Opened, Upstream};
use tidegate_reactor::begin_connect;

/// An upstream with transparent sockets of this host.
pub struct TransparentUpstream {
    plain: HostUpstream,
    interface: String,
    host: Arc<AddressBook>,
    routes: Arc<PolicyRoute>,
    fallbacks: Fallbacks,
    claims: Arc<Claims>,
}

impl TransparentUpstream {
    /// An upstream to `container`, which must be on a network of this host.
    ///
    /// # Errors
    /// [`SourceError`] if the container is on no such network, or without the privilege.
    pub fn new(container: IpAddr) -> Result<Self, SourceError> {
        let addresses = |cause| SourceError::Addresses { namespace: "this host".to_owned(), cause };
        let (home, host) = this_host()?;
        let (_, interface) = host
            .connected_interface(container)
            .map_err(addresses)?
            .ok_or(SourceError::NotConnected(container))?;
        let any =
            SocketAddr::new(if container.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0);
        transparent_socket(Protocol::Tcp, any, None).map_err(SourceError::Transparent)?;
        let families = if container.is_ipv4() { Families::V4 } else { Families::V6 };
        let routes = Arc::new(PolicyRoute::install(&home, families, &[])?);
        Ok(Self {
            plain: HostUpstream::new(container, Arc::clone(&host)),
            interface,
            host,
            routes,
            fallbacks: Fallbacks::new(),
            claims: Arc::default(),
        })
    }

    fn open_as_client(&self, flow: &Flow) -> io::Result<Opened> {
        let container = self.plain.container();
        let replies = Selector {
            from: Some(container),
            to: Some(flow.client.ip()),
            protocol: Some(flow.protocol),
            source_port: Some(flow.container_port),
            input_interface: Some(self.interface.clone()),
            ..Selector::new(Family::of(container))
        };
        let client = SocketAddr::new(flow.client.ip(), flow.client.port());
        let to = SocketAddr::new(container, flow.container_port);
        let claim = self.claims.claim(client, to)?;
        let lease: Lease = Box::new((self.routes.steer(replies).map_err(no_rule)?, claim));
        let socket = transparent_socket(flow.protocol, client, None)?;
        if flow.protocol == Protocol::Udp {
            // The kernel delivers a datagram to a connected socket before it evaluates the policy
            // rule with the interface (`udp_v4_early_demux`).
            SockRef::from(&socket).bind_device(Some(self.interface.as_bytes()))?;
        }
        begin_connect(&socket, to)?;
        Ok(Opened { lease: Some(lease), ..socket.into() })
    }
}

impl Upstream for TransparentUpstream {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        let container = self.plain.container();
        let client = flow.client.ip();
        if shows_as_gateway(client, container, &self.host, None) {
            return self.plain.open(flow);
        }
        if client.is_ipv4() != container.is_ipv4() {
            self.fallbacks.family.increment(1);
            return self.plain.open(flow);
        }
        match self.open_as_client(flow) {
            Err(error) if is_conflict(&error) => self.fallbacks.conflict.increment(1),
            Err(error) if is_missing_rule(&error) => self.fallbacks.rule.increment(1),
            result => return result,
        }
        self.plain.open(flow)
    }
}
