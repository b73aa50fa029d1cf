//! What networks and endpoints there shall be, and which facts make them.

use crate::{Fact, Interface, Isolation, Place};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Everything that one owner wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// The networks; names and bridges differ.
    pub networks: Vec<Network>,
    /// What is attached to them; names differ.
    pub endpoints: Vec<Endpoint>,
    /// Links of the host that forward for the networks alone, where their egress is the kernel's
    /// and the host forwards for nobody.
    pub uplinks: Vec<Uplink>,
    /// How answers of ports that the kernel translates leave by the uplink that was asked; empty
    /// where there is one default route.
    pub reply_paths: Vec<ReplyPath>,
    /// How far ahead of their usual priorities our policy rules are, so that they precede those of
    /// other software.
    pub rules_ahead: u32,
    /// How what endpoints send is checked.
    pub guards: Guards,
}

/// How [port guards](Fact::PortGuard) are attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Guards {
    /// There are none.
    #[default]
    None,
    /// To links, with which they go.
    AtLinks,
    /// In a table of nftables of this owner.
    InTable(String),
}

/// A default route of the host by which answers of containers leave that are not to take the best
/// one of the `main` table: the host was asked at an address of this uplink.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReplyPath {
    /// Its number in the mark of packets, from 1 to [`UPLINKS`](tidegate_model::registry::UPLINKS).
    pub number: u8,
    /// The uplink.
    pub link: String,
    /// IPv6.
    pub v6: bool,
    /// The table that has the route.
    pub table: u32,
    /// The route is made in that table, by this gateway; otherwise others have it there.
    pub made: Option<IpAddr>,
    /// The networks of the uplink's own addresses.
    pub nets: Vec<IpNet>,
}

/// A link of a host that forwards for nobody.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Uplink {
    /// Its name.
    pub link: String,
    /// Answers over IPv4 come by it.
    pub v4: bool,
    /// Answers over IPv6.
    pub v6: bool,
    /// It forwards, for those families, because of this owner. Otherwise others see to that:
    /// another owner, which lets nothing but its own networks be reached by it, or a router.
    pub ours: bool,
}

/// A network: a bridge of the host and the subnets on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// What its owner calls it.
    pub name: String,
    /// The bridge.
    pub bridge: Interface,
    /// At most one of each family.
    pub subnets: Vec<Subnet>,
    /// It has no egress: its endpoints get no default route.
    pub internal: bool,
    /// Its endpoints reach one another.
    pub inter_container: bool,
    /// Bytes that fit into one packet.
    pub mtu: u32,
}

/// A subnet and the host's address in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// The bridge's address, which endpoints send by.
    pub gateway: IpAddr,
}

/// A namespace that is attached to networks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// What its owner calls it.
    pub name: String,
    /// Where it is attached; networks and interfaces differ.
    pub attachments: Vec<Attachment>,
}

/// One end of a veth pair in an endpoint, the other on a network's bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// The end on the host.
    pub host_end: Interface,
    /// The end in the namespace.
    pub inside: Interface,
    /// Its addresses, each with its subnet's prefix length.
    pub addresses: Vec<IpNet>,
    /// The endpoint's default route leads by this network, unless it is internal.
    pub default_route: bool,
    /// The endpoint may send from other addresses too: a router, VRRP.
    pub any_address: bool,
}

impl Network {
    /// Whether it has a subnet of that family.
    #[must_use]
    pub fn has(&self, v6: bool) -> bool {
        self.subnets.iter().any(|subnet| subnet.gateway.is_ipv6() == v6)
    }

    /// The facts of the network itself, in the order to make them. What closes it comes before it
    /// is up.
    pub(crate) fn facts(&self, isolation: &dyn Isolation) -> Vec<Fact> {
        let link = self.bridge.name.clone();
        let mut facts = vec![Fact::Bridge {
            interface: self.bridge.clone(),
            mtu: self.mtu,
            internal: self.internal,
        }];
        // Members learn no other address of the host (arp_ignore: the higher value of `all` and the
        // link applies), choose no route through it (accept_source_route, which both must allow),
        // and change none of its routes (accept_redirects, which both must allow on a link that
        // forwards; port guards drop redirects everywhere).
        for (name, value) in
            [("arp_ignore", "1"), ("accept_source_route", "0"), ("accept_redirects", "0")]
        {
            facts.push(setting(Place::Host, format!("net.ipv4.conf.{link}.{name}"), value));
        }
        facts.extend(isolation.facts(self));
        facts.extend(self.subnets.iter().filter_map(|Subnet { subnet, gateway }| {
            let address = IpNet::new(*gateway, subnet.prefix_len()).ok()?;
            Some(Fact::Address { place: Place::Host, link: link.clone(), address })
        }));
        facts.push(Fact::Up { place: Place::Host, link });
        facts
    }
}

impl Desired {
    /// Whether a source address on `network` means an endpoint: port guards check all of its
    /// members.
    #[must_use]
    pub fn verifies_sources(&self, network: &str) -> bool {
        let attachments = self.endpoints.iter().flat_map(|endpoint| &endpoint.attachments);
        let mut there = attachments.filter(|attachment| attachment.network == network);
        self.guards != Guards::None && !there.any(|attachment| attachment.any_address)
    }

    /// The networks, and of the endpoints those of these `names`.
    pub(crate) fn with_endpoints(&self, names: &BTreeSet<String>) -> Self {
        let endpoints = self.endpoints.iter().filter(|endpoint| names.contains(&endpoint.name));
        Self { endpoints: endpoints.cloned().collect(), ..self.without_endpoints() }
    }

    /// The same without any endpoint.
    pub(crate) fn without_endpoints(&self) -> Self {
        Self {
            networks: self.networks.clone(),
            endpoints: Vec::new(),
            uplinks: self.uplinks.clone(),
            reply_paths: self.reply_paths.clone(),
            rules_ahead: self.rules_ahead,
            guards: self.guards.clone(),
        }
    }

    /// All facts, in the order to make them.
    #[must_use]
    pub fn facts(&self, isolation: &dyn Isolation) -> Vec<Fact> {
        let table = match &self.guards {
            Guards::InTable(owner) => Some(Fact::GuardTable { owner: owner.clone() }),
            Guards::None | Guards::AtLinks => None,
        };
        let mut facts: Vec<Fact> = table.into_iter().chain(isolation.groundwork(self)).collect();
        facts.extend(self.networks.iter().flat_map(|network| network.facts(isolation)));
        for endpoint in &self.endpoints {
            let place = Place::Endpoint(endpoint.name.clone());
            facts.push(Fact::Up { place: place.clone(), link: "lo".into() });
            for attachment in &endpoint.attachments {
                if let Some(network) =
                    self.networks.iter().find(|network| network.name == attachment.network)
                {
                    facts.extend(attachment.facts(&place, &endpoint.name, network, &self.guards));
                }
            }
        }
        for fact in &mut facts {
            if let Fact::Rule(rule) = fact {
                rule.priority = rule.priority.saturating_sub(self.rules_ahead);
            }
        }
        facts
    }

    /// Whether `link` is the bridge of one of the networks.
    pub(crate) fn has_bridge(&self, link: &str) -> bool {
        self.networks.iter().any(|network| network.bridge.name == link)
    }
}

impl Attachment {
    /// What makes the host's end a port: guarded first, so that no frame precedes the guard.
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
            // A port of a bridge needs no address of its own, and one would be a way around the
            // bridge's rules.
            setting(Place::Host, format!("net.ipv6.conf.{host_end}.disable_ipv6"), "1"),
            // Nor does it take packets for the host, which are the bridge's to take. It gets those
            // that a bridge leaves to its port, and all of them while others have taken it from its
            // bridge. No route leads back by a port, so that it has no valid source address
            // (`__fib_validate_source`, net/ipv4/fib_frontend.c).
            setting(Place::Host, format!("net.ipv4.conf.{host_end}.rp_filter"), "1"),
            setting(Place::Host, format!("net.ipv4.conf.{host_end}.arp_ignore"), "8"),
        ];
        facts.extend(self.port_facts(network, guards));
        if network.has(true) {
            // Link-local addresses are those of hardware addresses (`IN6_ADDR_GEN_MODE_EUI64`),
            // which the guard knows.
            facts.push(setting(
                place.clone(),
                format!("net.ipv6.conf.{inside}.addr_gen_mode"),
                "0",
            ));
            // Its neighbours are no routers.
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

/// A setting of one of our own links.
pub(crate) fn setting(place: Place, name: String, value: &str) -> Fact {
    Fact::Setting { place, name, value: value.to_owned() }
}
