//! Access control for published ports by ingress interface, client and destination address.
//!
//! A socket bound to all addresses also accepts traffic to the gateway addresses of container
//! networks, to link-local addresses, and to broadcast and multicast addresses. The kernel delivers
//! such packets from any interface (weak host model, RFC 1122 section 3.3.4.2). A client can choose
//! its source and destination address, and a link-local address belongs to no subnet. A client
//! cannot choose the bridge on which its packets arrive, so the ingress interface decides. For a
//! port of an endpoint:
//!
//! | ingress interface | destination | access |
//! |---|---|---|
//! | `lo`, or source and destination address are equal | any | allowed: the host itself |
//! | any other interface than `lo` | a loopback address | denied |
//! | bridge of an internal network | its own gateway | allowed if the endpoint is attached to it |
//! | | anything else | denied |
//! | bridge of another network of the project | its own gateway | allowed |
//! | | an address in a subnet of another network | denied |
//! | | link-local, multicast, broadcast | allowed if the endpoint is attached to it |
//! | | another address of the host | allowed |
//! | bridge of an internal network of another project | any | denied |
//! | any other interface | an address in a subnet of the project | denied |
//! | | anything else | allowed, except with a source address in a subnet of the project; for a datagram also in a subnet of another project |
//! | unknown | any | denied |
//!
//! For traffic of the host to itself, the kernel reports the interface that has the destination
//! address, so `lo` alone does not identify the host. Equal source and destination addresses do: no
//! other host can establish such a connection, and
//! [`Listener::drop_forged_own_source`](crate::Listener::drop_forged_own_source) drops such
//! datagrams unless they were delivered by `lo`.
//!
//! Broadcast and multicast packets that arrive on an uplink are accepted: they reach a port on all
//! addresses of the host and reveal nothing about its networks.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use tidegate_model::{Ingress, LOOPBACK_INDEX, canonical, registry};

/// A bridge, identified by its interface index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bridge {
    /// The bridge exists.
    Present(u32),
    /// The bridge was deleted; the value is its last index. A new bridge gets a higher index
    /// (`dev_new_index`, net/core/dev.c). Until that index is known, interfaces with a higher index
    /// that belong to no network could be the bridge, and are denied.
    Missing(u32),
}

/// The properties of a container network that determine access to ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayNetwork {
    /// The name of the network.
    pub name: String,
    /// The bridge of the network.
    pub bridge: Bridge,
    /// The network has no egress, and its members reach only addresses of the host on this network.
    pub internal: bool,
    /// The subnets, each with its gateway address.
    pub subnets: Vec<(IpNet, IpAddr)>,
}

impl GatewayNetwork {
    fn contains(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|(subnet, _)| subnet.contains(&address))
    }

    fn has_gateway(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|(_, gateway)| *gateway == address)
    }
}

/// The networks of a project. All its ports share one value, so that the index of a recreated
/// bridge applies to all of them at once.
#[derive(Debug, Default)]
pub struct GatewayNetworks {
    networks: RwLock<Vec<GatewayNetwork>>,
    /// Networks of other projects on this host, by bridge index.
    foreign: RwLock<BTreeMap<u32, ForeignNetwork>>,
}

/// A network of another project on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignNetwork {
    /// The network has no egress, and its members reach no port of this project.
    pub internal: bool,
    /// The subnets of the network.
    pub subnets: Vec<IpNet>,
}

impl GatewayNetworks {
    /// Creates a value with these networks.
    #[must_use]
    pub fn new(networks: Vec<GatewayNetwork>) -> Self {
        Self { networks: RwLock::new(networks), foreign: RwLock::default() }
    }

    /// Replaces the networks.
    pub fn set_networks(&self, networks: Vec<GatewayNetwork>) {
        *self.networks.write().unwrap_or_else(PoisonError::into_inner) = networks;
    }

    /// Sets the bridge index of each network by name. A network without an index has no bridge.
    /// Returns the names of the networks whose index has changed.
    pub fn set_bridges(&self, indexes: &BTreeMap<String, u32>) -> Vec<String> {
        let mut changed = Vec::new();
        for network in &mut *self.networks.write().unwrap_or_else(PoisonError::into_inner) {
            let (Bridge::Present(old) | Bridge::Missing(old)) = network.bridge;
            let index = indexes.get(&network.name).copied();
            network.bridge = index.map_or(Bridge::Missing(old), Bridge::Present);
            if index.is_some_and(|index| index != old) {
                changed.push(network.name.clone());
            }
        }
        changed
    }

    /// Sets the networks of other projects by bridge index. Networks of this project may be
    /// included.
    pub fn set_foreign_networks(&self, networks: BTreeMap<u32, ForeignNetwork>) {
        *self.foreign.write().unwrap_or_else(PoisonError::into_inner) = networks;
    }

    /// Locks the networks for one decision. No system call is made while the lock is held.
    fn read(&self) -> RwLockReadGuard<'_, Vec<GatewayNetwork>> {
        self.networks.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compares `ingress` with the networks of other projects.
    fn classify_foreign(&self, ingress: &Ingress) -> Foreign {
        let networks = self.foreign.read().unwrap_or_else(PoisonError::into_inner);
        let client = canonical(ingress.client).ip();
        let has_client =
            |network: &ForeignNetwork| network.subnets.iter().any(|net| net.contains(&client));
        let by = networks.get(&ingress.interface);
        Foreign {
            internal: by.is_some_and(|network| network.internal),
            forged: !by.is_some_and(has_client) && networks.values().any(has_client),
        }
    }
}

/// Relation of a client to the networks of other projects.
#[derive(Clone, Copy, Debug)]
struct Foreign {
    /// The ingress interface is the bridge of an internal network. This may be a network of this
    /// project.
    internal: bool,
    /// The source address is in the subnet of a network, but the ingress interface is not its
    /// bridge.
    forged: bool,
}

/// The access list of the ports of one endpoint. The default has no networks and denies nothing.
#[derive(Clone, Debug, Default)]
pub struct GatewayAcl {
    networks: Option<Arc<GatewayNetworks>>,
    /// Names of the networks that the endpoint is attached to.
    attached: Arc<BTreeSet<String>>,
    /// The sockets are in a different namespace from the bridges.
    other_namespace: bool,
}

impl GatewayAcl {
    /// Creates the list of an endpoint that is attached to the networks named `attached`. A port
    /// without an endpoint is attached to none.
    #[must_use]
    pub fn new(networks: Arc<GatewayNetworks>, attached: impl IntoIterator<Item = String>) -> Self {
        let attached = Arc::new(attached.into_iter().collect());
        Self { networks: Some(networks), attached, other_namespace: false }
    }

    /// Returns the list for sockets in a different namespace from the networks. There is no bridge
    /// in that namespace, and traffic of members does not arrive there with their addresses.
    #[must_use]
    pub fn for_other_namespace(&self) -> Self {
        Self { other_namespace: true, ..self.clone() }
    }

    /// Whether the list denies nothing, so that the ingress need not be determined.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.networks.is_none()
    }

    /// Whether `address` is a gateway address of one of the networks.
    #[must_use]
    pub fn has_gateway(&self, address: IpAddr) -> bool {
        let Some(networks) = &self.networks else { return false };
        networks.read().iter().any(|network| network.has_gateway(address))
    }

    /// Whether access is denied to the client of `ingress`.
    #[must_use]
    pub fn denies(&self, ingress: &Ingress) -> bool {
        let Some(networks) = &self.networks else { return false };
        let foreign = networks.classify_foreign(ingress);
        !self.allows(&networks.read(), foreign, ingress)
    }

    fn allows(&self, networks: &[GatewayNetwork], foreign: Foreign, ingress: &Ingress) -> bool {
        let &Ingress { destination, to_group, interface, handshake, .. } = ingress;
        let client = canonical(ingress.client).ip();
        let Some(destination) = destination.map(|address| address.to_canonical()) else {
            return false;
        };
        // No kernel sends from an IPv4-mapped address to an IPv6 address, and no host has an
        // address of a NAT engine. A service would mistake such a client for the host.
        let is_mapped = |ip: IpAddr| matches!(ip, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        let forged_family = is_mapped(ingress.client.ip()) && destination.is_ipv6();
        if interface == 0 || forged_family || registry::ENGINE_ADDRESSES.contains(&client) {
            return false;
        }
        let is_gateway = |address| networks.iter().any(|network| network.has_gateway(address));
        let is_host =
            interface == LOOPBACK_INDEX || client == destination || handshake && is_gateway(client);
        if is_host {
            return true;
        }
        // With `route_localnet` set, as by kube-proxy, such packets can arrive on a link
        // (CVE-2020-8558).
        if destination.is_loopback() {
            return false;
        }
        if self.other_namespace {
            return self.allows_from_other_namespace(networks, client, destination, handshake);
        }
        match networks.iter().find(|network| network.bridge == Bridge::Present(interface)) {
            Some(network) => {
                self.allows_member(networks, network, client, destination, to_group, handshake)
            }
            // A completed handshake proves the source address.
            None if foreign.internal || foreign.forged && !handshake => false,
            None => !networks.iter().any(|network| {
                let could_be_bridge =
                    matches!(network.bridge, Bridge::Missing(old) if interface > old);
                network.contains(client) || network.contains(destination) || could_be_bridge
            }),
        }
    }

    /// Decides about traffic that arrived on the bridge of `network`.
    fn allows_member(
        &self,
        networks: &[GatewayNetwork],
        network: &GatewayNetwork,
        client: IpAddr,
        destination: IpAddr,
        to_group: bool,
        handshake: bool,
    ) -> bool {
        let is_attached = self.attached.contains(&network.name);
        let at_own_gateway = network.has_gateway(destination);
        if network.internal {
            return is_attached && at_own_gateway;
        }
        let is_link_local = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let link_local = is_link_local(destination);
        let in_another = |address| {
            !network.contains(address) && networks.iter().any(|other| other.contains(address))
        };
        // A completed handshake proves the source address, and a container on two networks may use
        // either bridge. The reply to a datagram with a source address outside the network would be
        // sent to that address.
        let is_member = network.contains(client) || is_link_local(client);
        if in_another(destination) || !handshake && !is_member {
            return false;
        }
        at_own_gateway || is_attached || !(link_local || to_group)
    }

    /// Decides about traffic to a socket in a different namespace from the networks. Traffic of
    /// members reaches it only through the NAT engine, with an address of the host.
    fn allows_from_other_namespace(
        &self,
        networks: &[GatewayNetwork],
        client: IpAddr,
        destination: IpAddr,
        handshake: bool,
    ) -> bool {
        !networks.iter().any(|network| {
            let closed = network.internal && !self.attached.contains(&network.name);
            network.contains(client) && (closed || !handshake) || network.has_gateway(destination)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    const UPLINK: u32 = 2;
    const FRONT: u32 = 7;
    const BACK: u32 = 8;
    const SHUT: u32 = 9;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// Three networks, the last one internal.
    fn networks() -> Arc<GatewayNetworks> {
        let network = |name: &str, index, number: u32, internal| GatewayNetwork {
            name: name.to_owned(),
            bridge: Bridge::Present(index),
            internal,
            subnets: [("10.77.N.0/24", "10.77.N.1"), ("fd77:N::/64", "fd77:N::1")]
                .map(|(subnet, gateway)| {
                    let with = |text: &str| text.replace('N', &number.to_string());
                    (with(subnet).parse().unwrap(), ip(&with(gateway)))
                })
                .into(),
        };
        let all = [("front", FRONT, 1, false), ("back", BACK, 2, false), ("shut", SHUT, 3, true)];
        let all = all.map(|(name, index, number, internal)| network(name, index, number, internal));
        Arc::new(GatewayNetworks::new(all.into()))
    }

    fn attached(to: &[&str]) -> GatewayAcl {
        GatewayAcl::new(networks(), to.iter().map(|name| (*name).to_owned()))
    }

    fn datagram(interface: u32, client: &str, destination: &str) -> Ingress {
        let destination = ip(destination);
        let is_broadcast = matches!(destination, IpAddr::V4(v4) if v4.octets()[3] == 255);
        Ingress {
            client: SocketAddr::new(ip(client), 5000),
            destination: Some(destination),
            to_group: destination.is_multicast() || is_broadcast,
            interface,
            handshake: false,
        }
    }

    fn connection(interface: u32, client: &str, destination: &str) -> Ingress {
        Ingress { handshake: true, ..datagram(interface, client, destination) }
    }

    /// Every destination from every interface, for ports of endpoints on `front`, on `shut`, on
    /// both, and for a port without an endpoint.
    #[test]
    fn the_ingress_interface_decides() {
        let ports = [&["front"][..], &["shut"], &["front", "shut"], &[]].map(attached);
        let (y, n) = (true, false);
        for (interface, client, destination, allowed) in [
            // The host itself. The kernel reports the interface that has the destination address.
            (LOOPBACK_INDEX, "127.0.0.1", "127.0.0.1", [y, y, y, y]),
            (SHUT, "10.77.3.1", "10.77.3.1", [y, y, y, y]),
            (SHUT, "fe80::1", "fe80::1", [y, y, y, y]),
            (UPLINK, "203.0.113.1", "203.0.113.1", [y, y, y, y]),
            // A network of the project.
            (FRONT, "10.77.1.7", "10.77.1.1", [y, y, y, y]),
            (FRONT, "fd77:1::7", "fd77:1::1", [y, y, y, y]),
            (FRONT, "10.77.1.7", "203.0.113.1", [y, y, y, y]),
            (FRONT, "fd77:1::7", "2001:db8::1", [y, y, y, y]),
            (FRONT, "10.77.1.7", "10.77.2.1", [n, n, n, n]),
            (FRONT, "fd77:1::7", "fd77:3::1", [n, n, n, n]),
            (FRONT, "10.77.1.7", "10.77.2.255", [n, n, n, n]),
            (FRONT, "fe80::7", "fe80::1", [y, n, y, n]),
            (FRONT, "fd77:1::7", "fe80::1", [y, n, y, n]),
            (FRONT, "10.77.1.7", "169.254.9.9", [y, n, y, n]),
            (FRONT, "fe80::7", "ff02::1", [y, n, y, n]),
            (FRONT, "10.77.1.7", "224.0.0.1", [y, n, y, n]),
            (FRONT, "10.77.1.7", "10.77.1.255", [y, n, y, n]),
            (FRONT, "10.77.1.7", "255.255.255.255", [y, n, y, n]),
            (FRONT, "10.77.1.7", "203.0.113.255", [y, n, y, n]),
            (BACK, "fe80::7", "fe80::2", [n, n, n, n]),
            (BACK, "10.77.2.7", "10.77.2.1", [y, y, y, y]),
            // Source address of another network.
            (FRONT, "10.77.2.7", "203.0.113.1", [n, n, n, n]),
            // An internal network.
            (SHUT, "10.77.3.7", "10.77.3.1", [n, y, y, n]),
            (SHUT, "fd77:3::7", "fd77:3::1", [n, y, y, n]),
            (SHUT, "fe80::7", "fe80::3", [n, n, n, n]),
            (SHUT, "fd77:3::7", "fe80::3", [n, n, n, n]),
            (SHUT, "10.77.3.7", "203.0.113.1", [n, n, n, n]),
            (SHUT, "203.0.113.77", "203.0.113.1", [n, n, n, n]),
            (SHUT, "203.0.113.77", "10.77.3.255", [n, n, n, n]),
            (SHUT, "10.77.3.7", "10.77.1.1", [n, n, n, n]),
            (SHUT, "10.77.3.7", "255.255.255.255", [n, n, n, n]),
            (SHUT, "10.77.3.7", "169.254.9.9", [n, n, n, n]),
            (SHUT, "fe80::7", "ff02::1", [n, n, n, n]),
            // Any other interface.
            (UPLINK, "203.0.113.9", "203.0.113.1", [y, y, y, y]),
            (UPLINK, "203.0.113.9", "10.77.1.1", [n, n, n, n]),
            (UPLINK, "2001:db8::9", "fd77:3::1", [n, n, n, n]),
            (UPLINK, "203.0.113.9", "10.77.1.255", [n, n, n, n]),
            (UPLINK, "10.77.1.7", "203.0.113.1", [n, n, n, n]),
            (UPLINK, "fe80::9", "fe80::5", [y, y, y, y]),
            (UPLINK, "fe80::9", "ff02::1", [y, y, y, y]),
            (UPLINK, "203.0.113.9", "203.0.113.255", [y, y, y, y]),
            // Loopback addresses are reachable from the host only.
            (UPLINK, "203.0.113.9", "127.0.0.1", [n, n, n, n]),
            (FRONT, "10.77.1.7", "127.0.0.1", [n, n, n, n]),
            // Unknown interface.
            (0, "203.0.113.9", "203.0.113.1", [n, n, n, n]),
        ] {
            for (port, allowed) in ports.iter().zip(allowed) {
                for ingress in [
                    datagram(interface, client, destination),
                    connection(interface, client, destination),
                ] {
                    // Cases that exist for datagrams only.
                    let is_forged = interface == FRONT && client == "10.77.2.7";
                    if ingress.handshake && (ingress.to_group || is_forged) {
                        continue;
                    }
                    assert_eq!(
                        !port.denies(&ingress),
                        allowed,
                        "{ingress:?} for {:?}",
                        port.attached
                    );
                }
            }
        }
        let unknown = Ingress { destination: None, ..datagram(FRONT, "10.77.1.7", "10.77.1.1") };
        assert!(ports[0].denies(&unknown));
        assert!(!GatewayAcl::default().denies(&unknown), "an empty list denies nothing");
    }

    #[test]
    fn a_handshake_proves_the_source_address() {
        let port = attached(&["front"]);
        // A container on two networks that uses the bridge of the other one.
        assert!(!port.denies(&connection(FRONT, "10.77.2.7", "203.0.113.1")));
        assert!(port.denies(&datagram(FRONT, "10.77.2.7", "203.0.113.1")));
        // The host, from one of its addresses to another.
        assert!(!port.denies(&connection(UPLINK, "10.77.1.1", "203.0.113.1")));
        assert!(port.denies(&datagram(UPLINK, "10.77.1.1", "203.0.113.1")));
        assert!(!port.denies(&connection(UPLINK, "::ffff:203.0.113.9", "203.0.113.1")));
        assert!(port.denies(&connection(UPLINK, "::ffff:203.0.113.9", "::ffff:10.77.1.1")));
    }

    #[test]
    fn a_recreated_bridge_has_a_new_index() {
        let networks = networks();
        let port = GatewayAcl::new(Arc::clone(&networks), ["front".to_owned()]);
        let indexes = |shut: Option<u32>| {
            let all = [("front", Some(FRONT)), ("back", Some(BACK)), ("shut", shut)];
            all.into_iter().filter_map(|(name, index)| Some((name.to_owned(), index?))).collect()
        };
        let (again, vpn) = (20, 19);
        assert_eq!(networks.set_bridges(&indexes(None)), [""; 0]);
        // The new interface could be the recreated bridge, and a member may use any source address.
        assert!(port.denies(&datagram(again, "203.0.113.77", "203.0.113.1")));
        assert!(port.denies(&connection(again, "fe80::7", "fe80::1")));
        assert!(!port.denies(&connection(UPLINK, "203.0.113.9", "203.0.113.1")));
        assert!(!port.denies(&connection(FRONT, "10.77.1.7", "10.77.1.1")));
        assert_eq!(networks.set_bridges(&indexes(Some(again))), ["shut"]);
        assert!(port.denies(&datagram(again, "203.0.113.77", "203.0.113.1")));
        assert!(!port.denies(&connection(vpn, "192.0.2.7", "203.0.113.1")));
        assert!(
            !port.denies(&connection(SHUT, "192.0.2.7", "203.0.113.1")),
            "the old index belongs to another interface"
        );
        // After two updates without the bridge, its last index is still known.
        networks.set_bridges(&indexes(None));
        networks.set_bridges(&indexes(None));
        assert!(!port.denies(&connection(vpn, "192.0.2.7", "203.0.113.1")));
        assert!(port.denies(&connection(again + 1, "192.0.2.7", "203.0.113.1")));
    }

    #[test]
    fn an_internal_network_of_another_project_reaches_nothing() {
        const THEIRS: u32 = 30;
        let networks = networks();
        let port = GatewayAcl::new(Arc::clone(&networks), ["front".to_owned(), "shut".to_owned()]);
        let ingresses = [
            connection(THEIRS, "10.78.3.7", "203.0.113.1"),
            connection(THEIRS, "fe80::7", "fe80::3"),
            datagram(THEIRS, "fe80::7", "ff02::1"),
        ];
        assert!(ingresses.iter().all(|ingress| !port.denies(ingress)), "not yet known as internal");
        let foreign = ForeignNetwork { internal: true, subnets: Vec::new() };
        networks.set_foreign_networks([THEIRS, SHUT].map(|index| (index, foreign.clone())).into());
        assert!(ingresses.iter().all(|ingress| port.denies(ingress)));
        assert!(
            !port.denies(&connection(SHUT, "10.77.3.7", "10.77.3.1")),
            "a network of the project"
        );
        assert!(!port.denies(&connection(UPLINK, "203.0.113.9", "203.0.113.1")));
    }

    /// The reply to a forged datagram would be sent into the network of the other project.
    #[test]
    fn datagrams_with_a_source_of_another_project_are_accepted_from_its_bridge_only() {
        const THEIRS: u32 = 30;
        let networks = networks();
        let port = GatewayAcl::new(Arc::clone(&networks), ["front".to_owned()]);
        let foreign = ForeignNetwork {
            internal: false,
            subnets: ["10.78.1.0/24", "fd78:1::/64"].map(|net| net.parse().unwrap()).into(),
        };
        networks.set_foreign_networks([(THEIRS, foreign)].into());
        for client in ["10.78.1.7", "fd78:1::7", "::ffff:10.78.1.7"] {
            for (interface, allowed) in [(THEIRS, true), (UPLINK, false), (THEIRS + 1, false)] {
                let datagram = datagram(interface, client, "203.0.113.1");
                assert_eq!(!port.denies(&datagram), allowed, "{client} via interface {interface}");
                assert!(!port.denies(&connection(interface, client, "203.0.113.1")));
            }
        }
        assert!(!port.denies(&datagram(UPLINK, "203.0.113.9", "203.0.113.1")));
    }

    /// Without root, the sockets are in the namespace of the host, and the bridges are not.
    #[test]
    fn nobody_speaks_for_the_host_or_for_others() {
        let port = attached(&["front"]);
        for (interface, client, destination) in [
            // IPv4-mapped addresses over IPv6, and those of NAT engines.
            (UPLINK, "::ffff:127.0.0.1", "2001:db8::1"),
            (UPLINK, "::ffff:203.0.113.9", "2001:db8::1"),
            (FRONT, "::ffff:10.77.1.7", "fd77:1::1"),
            (UPLINK, "169.254.116.103", "203.0.113.1"),
            (FRONT, "fd74:6964:6567:6174::1", "fd77:1::1"),
        ] {
            assert!(port.denies(&datagram(interface, client, destination)), "{client}");
            assert!(port.denies(&connection(interface, client, destination)), "{client}");
        }
        // A router in a container uses the address of an external client.
        assert!(port.denies(&datagram(FRONT, "203.0.113.77", "10.77.1.1")));
        assert!(!port.denies(&datagram(FRONT, "10.77.1.7", "10.77.1.1")));
        // A dual-stack socket reports IPv4 clients in this form.
        assert!(!port.denies(&datagram(UPLINK, "::ffff:203.0.113.9", "::ffff:203.0.113.1")));
    }

    #[test]
    fn sockets_in_another_namespace_ignore_bridge_indexes() {
        let port = attached(&["front"]).for_other_namespace();
        for (interface, client, destination, datagrams, connections) in [
            (LOOPBACK_INDEX, "127.0.0.1", "127.0.0.1", true, true),
            (UPLINK, "203.0.113.1", "203.0.113.1", true, true),
            (UPLINK, "203.0.113.9", "203.0.113.1", true, true),
            // An interface whose index happens to equal that of a bridge.
            (SHUT, "203.0.113.9", "203.0.113.1", true, true),
            (SHUT, "fe80::9", "fe80::1", true, true),
            // A LAN may use the same subnet; a datagram does not prove its source address.
            (UPLINK, "10.77.1.7", "203.0.113.1", false, true),
            (UPLINK, "10.77.3.7", "203.0.113.1", false, false),
            (UPLINK, "203.0.113.9", "10.77.1.1", false, false),
        ] {
            assert_eq!(
                !port.denies(&datagram(interface, client, destination)),
                datagrams,
                "{client}"
            );
            assert_eq!(
                !port.denies(&connection(interface, client, destination)),
                connections,
                "{client}"
            );
        }
    }
}
