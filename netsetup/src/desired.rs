//! Desired networks and endpoints, and the facts that implement them.

use crate::{Fact, Interface, Isolation, Place};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The desired state of one owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The networks, with unique names and bridges.
    pub networks: Vec<Network>,
    /// The endpoints, with unique names.
    pub endpoints: Vec<Endpoint>,
    /// Links of the host that forward for the networks only. Used with egress through the kernel,
    /// on a host that does not forward.
    pub uplinks: Vec<Uplink>,
    /// Reply paths of kernel-published ports, for replies through the uplink of the request. Empty
    /// with a single default route.
    pub reply_paths: Vec<ReplyPath>,
    /// Amount by which the priorities of tidegate's policy rules are lowered, to precede those of
    /// other software.
    pub rules_ahead: u32,
    /// Port guards of the endpoints.
    pub guards: Guards,
    /// Links of other software with [source guards](Fact::SourceGuard). `None` if there are no
    /// source guards.
    pub guarded_links: Option<BTreeSet<String>>,
}

/// The attachment of [port guards](Fact::PortGuard).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Guards {
    /// No port guards.
    #[default]
    None,
    /// Attached to links, and removed with them.
    AtLinks,
    /// In the nftables table of this owner.
    InTable(String),
}

/// A default route for replies of containers to requests that arrived at an address of this uplink.
/// It replaces the best default route of the `main` table for these replies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplyPath {
    /// Number in the packet mark, from 1 to [`UPLINKS`](tidegate_model::registry::UPLINKS).
    pub number: u8,
    /// The uplink.
    pub link: String,
    /// IPv6.
    pub v6: bool,
    /// The routing table with the route.
    pub table: u32,
    /// Gateway of the route that tidegate adds to the table; `None` if the route already exists
    /// there.
    pub made: Option<IpAddr>,
    /// Prefixes of the uplink's addresses.
    pub nets: Vec<IpNet>,
}

/// A link that receives replies to containers, on a host that does not forward.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Uplink {
    /// Name of the link.
    pub link: String,
    /// The link receives IPv4 replies.
    pub v4: bool,
    /// The link receives IPv6 replies.
    pub v6: bool,
    /// This owner enabled forwarding on the link for these families. Otherwise another owner did
    /// so, for its own networks only, or the host is a router.
    pub ours: bool,
}

/// A network: a bridge of the host and its subnets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Name given by the owner.
    pub name: String,
    /// The bridge.
    pub bridge: Interface,
    /// At most one subnet per family.
    pub subnets: Vec<Subnet>,
    /// The network has no egress: its endpoints have no default route.
    pub internal: bool,
    /// Endpoints of the network can communicate with each other.
    pub inter_container: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// The network spans hosts. Then it is `internal` here.
    pub overlay: Option<Overlay>,
}

/// The part of a network on this host, if the network spans hosts.
///
/// The host has no address on its bridge and does not reach it, and packets of the endpoints do not
/// reach the host. A VXLAN device, which is not a fact, connects the bridge with those of other
/// hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The number of the network in VXLAN.
    pub vni: u32,
    /// The network has no egress. Otherwise, endpoints have it on another network.
    pub internal: bool,
}

/// A subnet and the host's address in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// Address of the bridge, the gateway of the endpoints.
    pub gateway: IpAddr,
}

/// A network namespace that is attached to networks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name given by the owner.
    pub name: String,
    /// Attachments, with unique networks and interfaces.
    pub attachments: Vec<Attachment>,
}

/// A veth pair between an endpoint and the bridge of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Name of the network.
    pub network: String,
    /// The host's end.
    pub host_end: Interface,
    /// The endpoint's end.
    pub inside: Interface,
    /// Addresses, each with the prefix length of its subnet.
    pub addresses: Vec<IpNet>,
    /// The endpoint's default route uses this network, unless it is internal.
    pub default_route: bool,
    /// The endpoint may also send from other addresses (routers, VRRP).
    pub any_address: bool,
}

impl Network {
    /// Returns whether endpoints have no egress because of this network.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.overlay.map_or(self.internal, |overlay| overlay.internal)
    }

    /// Returns whether the network has a subnet of the family.
    #[must_use]
    pub fn has(&self, v6: bool) -> bool {
        self.subnets.iter().any(|subnet| subnet.gateway.is_ipv6() == v6)
    }

    /// Returns the facts of the network in order of creation. The network is isolated before it is
    /// up.
    pub(crate) fn facts(&self, isolation: &dyn Isolation) -> Vec<Fact> {
        let link = self.bridge.name.clone();
        let mut facts = vec![Fact::Bridge {
            interface: self.bridge.clone(),
            mtu: self.mtu,
            internal: self.internal,
        }];
        // Prevents members from resolving other addresses of the host, from source routing through
        // it, and from changing its routes. For arp_ignore, the higher value of `all` and the link
        // applies. accept_source_route is effective only if both permit it, as is accept_redirects
        // on a link that forwards. Port guards drop redirects in any case.
        for (name, value) in
            [("arp_ignore", "1"), ("accept_source_route", "0"), ("accept_redirects", "0")]
        {
            facts.push(setting(Place::Host, format!("net.ipv4.conf.{link}.{name}"), value));
        }
        facts.extend(isolation.facts(self));
        let own = self.subnets.iter().filter(|_| self.overlay.is_none());
        facts.extend(own.filter_map(|Subnet { subnet, gateway }| {
            let address = IpNet::new(*gateway, subnet.prefix_len()).ok()?;
            Some(Fact::Address { place: Place::Host, link: link.clone(), address })
        }));
        facts.push(Fact::Up { place: Place::Host, link });
        facts
    }
}

impl Desired {
    /// Returns whether source addresses on `network` identify endpoints, because port guards verify
    /// all of its members.
    #[must_use]
    pub fn verifies_sources(&self, network: &str) -> bool {
        let attachments = self.endpoints.iter().flat_map(|endpoint| &endpoint.attachments);
        let mut on_network = attachments.filter(|attachment| attachment.network == network);
        self.guards != Guards::None && !on_network.any(|attachment| attachment.any_address)
    }

    /// Returns the desired state reduced to the endpoints in `names`.
    pub(crate) fn with_endpoints(&self, names: &BTreeSet<String>) -> Self {
        let endpoints = self.endpoints.iter().filter(|endpoint| names.contains(&endpoint.name));
        Self { endpoints: endpoints.cloned().collect(), ..self.without_endpoints() }
    }

    /// Returns the desired state without endpoints.
    pub(crate) fn without_endpoints(&self) -> Self {
        Self {
            networks: self.networks.clone(),
            endpoints: Vec::new(),
            uplinks: self.uplinks.clone(),
            reply_paths: self.reply_paths.clone(),
            rules_ahead: self.rules_ahead,
            guards: self.guards.clone(),
            guarded_links: self.guarded_links.clone(),
        }
    }

    /// Returns the source guards. Without networks there are none.
    pub(crate) fn source_guards(&self) -> impl Iterator<Item = Fact> {
        let links = self.guarded_links.iter().filter(|_| !self.networks.is_empty()).flatten();
        links.map(|link| Fact::SourceGuard { link: link.clone() })
    }

    /// Returns all facts in order of creation.
    #[must_use]
    pub fn facts(&self, isolation: &dyn Isolation) -> Vec<Fact> {
        let table = match &self.guards {
            Guards::InTable(owner) => Some(Fact::GuardTable { owner: owner.clone() }),
            Guards::None | Guards::AtLinks => None,
        };
        let mut facts: Vec<Fact> = table.into_iter().collect();
        if self.guarded_links.is_some() {
            let subnets = self.networks.iter().flat_map(|network| &network.subnets);
            facts.extend(subnets.map(|one| Fact::GuardedSubnet(one.subnet.trunc())));
        }
        facts.extend(self.source_guards());
        facts.extend(isolation.shared_facts(self));
        facts.extend(self.networks.iter().flat_map(|network| network.facts(isolation)));
        facts.extend(self.endpoints.iter().flat_map(|endpoint| self.facts_of(endpoint)));
        for fact in &mut facts {
            if let Fact::Rule(rule) = fact {
                rule.priority = rule.priority.saturating_sub(self.rules_ahead);
            }
        }
        facts
    }

    /// Returns the facts of `endpoint`, in order of creation.
    pub(crate) fn facts_of(&self, endpoint: &Endpoint) -> Vec<Fact> {
        let place = Place::Endpoint(endpoint.name.clone());
        let mut facts = vec![Fact::Up { place: place.clone(), link: "lo".into() }];
        for attachment in &endpoint.attachments {
            if let Some(network) =
                self.networks.iter().find(|network| network.name == attachment.network)
            {
                facts.extend(attachment.facts(&place, &endpoint.name, network, &self.guards));
            }
        }
        facts
    }

    /// Returns whether `link` is the bridge of a network.
    pub(crate) fn has_bridge(&self, link: &str) -> bool {
        self.networks.iter().any(|network| network.bridge.name == link)
    }
}

impl Attachment {
    /// Facts that add the host's end to the bridge. The guard comes first, so that no frame
    /// bypasses it.
    fn port_facts(&self, network: &Network, guards: &Guards) -> Vec<Fact> {
        let (link, station) = (self.host_end.name.clone(), self.inside.mac);
        let guard = (*guards != Guards::None).then(|| Fact::PortGuard {
            link: link.clone(),
            station,
            bridge: network.bridge.mac,
            addresses: self.addresses.iter().map(IpNet::addr).collect(),
            any_address: self.any_address,
        });
        let port = Fact::Port {
            link: link.clone(),
            bridge: network.bridge.name.clone(),
            isolated: !network.inter_container,
        };
        guard.into_iter().chain([port, Fact::Station { link, station }]).collect()
    }

    fn facts(
        &self,
        place: &Place,
        endpoint: &str,
        network: &Network,
        guards: &Guards,
    ) -> Vec<Fact> {
        let (host_end, inside) = (self.host_end.name.clone(), self.inside.name.clone());
        let mut facts = vec![
            Fact::Veth {
                interface: self.host_end.clone(),
                endpoint: endpoint.to_owned(),
                inside: self.inside.clone(),
                mtu: network.mtu,
            },
            // A bridge port needs no address, and its own address would bypass the rules for the
            // bridge.
            setting(Place::Host, format!("net.ipv6.conf.{host_end}.disable_ipv6"), "1"),
            // A bridge port must not accept packets for the host, which the bridge receives. It
            // would receive frames that a bridge passes up on the port, and all frames while
            // another program has removed it from its bridge. With rp_filter all of them are
            // dropped: no route uses the bridge port, so no source address is valid there
            // (`__fib_validate_source`, net/ipv4/fib_frontend.c).
            setting(Place::Host, format!("net.ipv4.conf.{host_end}.rp_filter"), "1"),
            setting(Place::Host, format!("net.ipv4.conf.{host_end}.arp_ignore"), "8"),
        ];
        facts.extend(self.port_facts(network, guards));
        if network.has(true) {
            // Derive link-local addresses from MAC addresses (`IN6_ADDR_GEN_MODE_EUI64`), as the
            // guard expects.
            facts.push(setting(
                place.clone(),
                format!("net.ipv6.conf.{inside}.addr_gen_mode"),
                "0",
            ));
            // Neighbours of the endpoint are not routers.
            for name in ["accept_ra", "accept_redirects"] {
                facts.push(setting(place.clone(), format!("net.ipv6.conf.{inside}.{name}"), "0"));
            }
        } else {
            facts.push(setting(place.clone(), format!("net.ipv6.conf.{inside}.disable_ipv6"), "1"));
        }
        let address = |address: &IpNet| Fact::Address {
            place: place.clone(),
            link: inside.clone(),
            address: *address,
        };
        facts.extend(self.addresses.iter().map(address));
        facts.push(Fact::Up { place: Place::Host, link: host_end });
        facts.push(Fact::Up { place: place.clone(), link: inside.clone() });
        if self.default_route && !network.internal {
            let route = |subnet: &Subnet| Fact::DefaultRoute {
                place: place.clone(),
                link: inside.clone(),
                gateway: subnet.gateway,
            };
            facts.extend(network.subnets.iter().map(route));
        }
        facts
    }
}

/// A sysctl of a link of tidegate.
pub(crate) fn setting(place: Place, name: String, value: &str) -> Fact {
    Fact::Setting { place, name, value: value.to_owned() }
}
