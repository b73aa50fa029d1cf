//! What one namespace has, as the kernel tells it.

use super::messages::{first_of_others, is_default, is_to, is_v6, leads, link_of, rule_of, table};
use super::{Kernel, MAIN, error, is_without_ipv6};
use crate::{DefaultRoute, Fact, Interface, KernelError, Mac, ObservedBridge, Place, Rule, Uplink};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{IpVersion, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tidegate_model::registry;

/// A link as it was found.
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Option<Mac>,
    /// Of a veth pair in two namespaces, the number of the other end in its namespace.
    pub(super) peer: Option<u32>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) controller: Option<u32>,
    pub(super) group: u32,
    pub(super) isolated: bool,
    /// Its alias says that it is the bridge of an internal network of tidegate.
    pub(super) internal: bool,
    /// Its alias says that it is a bridge of tidegate.
    pub(super) of_tidegate: bool,
    /// As a port of a bridge it learns addresses, or frames to unknown ones are flooded to it.
    pub(super) learns: bool,
    /// Its `disable_ipv6`, if the kernel has IPv6.
    pub(super) without_ipv6: Option<bool>,
}

/// What one namespace has.
pub(super) struct Snapshot {
    pub(super) links: BTreeMap<u32, Link>,
    indexes: BTreeMap<String, u32>,
    addresses: Vec<(u32, IpNet)>,
    routes: Vec<RouteMessage>,
    /// Default routes of others in tables beside `main`.
    elsewhere: Vec<RouteMessage>,
    /// The same of ours.
    replies: Vec<RouteMessage>,
    rules: Vec<Rule>,
    first_rule_of_others: Option<u32>,
    /// Static entries of bridges' forwarding databases: the port, and the station behind it.
    stations: BTreeSet<(u32, Mac)>,
}

/// How much is asked of the namespace of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Links by name, and what is told with them. Addresses and routes are not listed, so that the
    /// time does not depend on how many there are: none of them counts as true, and the kernel
    /// answers `EEXIST` when one that is there is added.
    Links,
    /// Addresses and routes too.
    All,
}

/// Addresses and routes that are looked at in one place. Further ones are taken not to be there.
const MOST: usize = 65_536;

impl Snapshot {
    /// Asks for links, and for the rest as far as `asked` makes it necessary: there may be
    /// thousands of endpoints. Of the host all is of interest, of an endpoint the links that
    /// `asked` is about: its processes may make as many of their own as they like.
    pub(super) async fn observe(
        kernel: &mut Kernel,
        place: &Place,
        asked: &[&Fact],
        depth: Depth,
    ) -> Result<Self, KernelError> {
        let failed = |what: &'static str| {
            move |source| KernelError {
                what: format!("list the {what} of {place}"),
                source: error(source),
            }
        };
        let handle = kernel.connection(place)?.handle.clone();
        let host = *place == Place::Host;
        let links = if host {
            let links: Vec<LinkMessage> =
                handle.link().get().execute().try_collect().await.map_err(failed("links"))?;
            links.iter().map(link_of).map(|link| (link.index, link)).collect()
        } else {
            let mut links = BTreeMap::new();
            let names: BTreeSet<&str> =
                asked.iter().flat_map(|fact| fact.on()).map(|(_, name)| name).collect();
            for name in names {
                let link = super::link_named(&handle, name).await;
                let link = link.map_err(|source| KernelError {
                    what: format!("look for {name:?} of {place}"),
                    source,
                })?;
                links.extend(link.map(|link| (link.index, link)));
            }
            links
        };
        let depth = if host { Depth::All } else { depth };
        let indexes = links.values().map(|link| (link.name.clone(), link.index)).collect();
        let mut here = Self {
            links,
            indexes,
            addresses: Vec::new(),
            routes: Vec::new(),
            first_rule_of_others: None,
            stations: BTreeSet::new(),
            elsewhere: Vec::new(),
            replies: Vec::new(),
            rules: Vec::new(),
        };
        let mut is_cut_short = false;
        let has_addresses = || {
            asked.iter().any(|fact| matches!(fact, Fact::Address { .. }) && here.has_links_of(fact))
        };
        if host || depth == Depth::All && has_addresses() {
            let mut listed = handle.address().get().execute();
            while let Some(message) = listed.try_next().await.map_err(failed("addresses"))? {
                if !host && here.addresses.len() >= MOST {
                    is_cut_short = true;
                    break;
                }
                // On a point-to-point link `IFA_ADDRESS` is the peer's; `IFA_LOCAL` is there on
                // IPv4 only.
                let mut address = None;
                for attribute in message.attributes {
                    match attribute {
                        AddressAttribute::Local(ip) => address = Some(ip),
                        AddressAttribute::Address(ip) => address = address.or(Some(ip)),
                        _ => {}
                    }
                }
                if let Some(net) =
                    address.and_then(|ip| IpNet::new(ip, message.header.prefix_len).ok())
                {
                    here.addresses.push((message.header.index, net));
                }
            }
        }
        for (v6, any) in [
            (false, RouteMessageBuilder::<Ipv4Addr>::new().build()),
            (true, RouteMessageBuilder::<Ipv6Addr>::new().build()),
        ] {
            let is_route = |fact: &Fact| match fact {
                Fact::DefaultRoute { gateway, .. } => gateway.is_ipv6() == v6,
                Fact::SubnetRoute { address, .. } => address.addr().is_ipv6() == v6,
                _ => false,
            };
            let has_routes = || asked.iter().any(|fact| is_route(fact) && here.has_links_of(fact));
            if host || depth == Depth::All && has_routes() {
                let ours = RouteProtocol::Other(registry::ROUTE_PROTOCOL);
                let mut listed = handle.route().get(any).execute();
                let mut read = 0;
                // One by one: a container may have as many routes as it likes.
                while let Some(route) = listed.try_next().await.map_err(failed("routes"))? {
                    read += 1;
                    if read > MOST && !host {
                        is_cut_short = true;
                        break;
                    }
                    if table(&route) == MAIN {
                        if here.routes.len() < MOST {
                            here.routes.push(route);
                        }
                    } else if host && is_default(&route) {
                        let list = if route.header.protocol == ours {
                            &mut here.replies
                        } else {
                            &mut here.elsewhere
                        };
                        list.push(route);
                    }
                }
            }
        }
        if is_cut_short && !host {
            // The rest would be read to its end otherwise.
            kernel.connections.remove(place);
        }
        if host {
            for version in [IpVersion::V4, IpVersion::V6] {
                let listed: Vec<RuleMessage> = handle
                    .rule()
                    .get(version)
                    .execute()
                    .try_collect()
                    .await
                    .map_err(failed("rules"))?;
                here.rules.extend(listed.iter().filter_map(rule_of));
                let first = first_of_others(&listed);
                here.first_rule_of_others =
                    here.first_rule_of_others.into_iter().chain(first).min();
            }
        }
        if asked.iter().any(|fact| matches!(fact, Fact::Station { .. }) && here.has_links_of(fact))
        {
            let listed =
                handle.neighbours().get().set_address_family(AddressFamily::Bridge).execute();
            let listed: Vec<_> =
                listed.try_collect().await.map_err(failed("forwarding databases"))?;
            for entry in listed {
                let is_static = entry.header.state == NeighbourState::Noarp;
                let stations = entry.attributes.iter().filter_map(|attribute| match attribute {
                    NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
                    _ => None,
                });
                let stations = stations.filter(|_| is_static).map(Mac);
                here.stations.extend(stations.map(|station| (entry.header.ifindex, station)));
            }
        }
        Ok(here)
    }

    fn link(&self, name: &str) -> Option<&Link> {
        self.links.get(self.indexes.get(name)?)
    }

    /// The number of a link.
    pub(super) fn index(&self, name: &str) -> Option<u32> {
        self.indexes.get(name).copied()
    }

    /// Whether the links are there without which `fact` cannot be true.
    fn has_links_of(&self, fact: &Fact) -> bool {
        fact.on().all(|(_, name)| self.indexes.contains_key(name))
    }

    pub(super) fn holds(&self, kernel: &Kernel, fact: &Fact) -> Result<bool, KernelError> {
        if !self.has_links_of(fact) {
            return Ok(false);
        }
        let is = |interface: &Interface, mtu: u32| {
            self.link(&interface.name)
                .is_some_and(|link| link.mac == Some(interface.mac) && link.mtu == mtu)
        };
        Ok(match fact {
            Fact::Bridge { interface, mtu, .. } | Fact::Veth { interface, mtu, .. } => {
                is(interface, *mtu)
            }
            Fact::Port { link, bridge, isolated } => {
                let bridge = self.link(bridge).map(|bridge| bridge.index);
                bridge.is_some()
                    && self.link(link).is_some_and(|port| {
                        port.controller == bridge && port.isolated == *isolated && !port.learns
                    })
            }
            Fact::Station { link, station } => self.link(link).is_some_and(|port| {
                port.controller.is_some() && self.stations.contains(&(port.index, *station))
            }),
            Fact::Setting { place, name, value } => {
                // Told with the link; and a file that thousands of namespaces have takes the kernel
                // long to find.
                let told = fact.on().find_map(|(_, link)| self.link(link)?.without_ipv6);
                match told.filter(|_| name.ends_with(".disable_ipv6")) {
                    Some(off) => *value == u8::from(off).to_string(),
                    None => match kernel.namespace(place)?.sysctl(name) {
                        Ok(found) => found == *value,
                        // As in `add`.
                        Err(error) => is_without_ipv6(&error, name),
                    },
                }
            }
            Fact::Address { link, address, .. } => self.link(link).is_some_and(|link| {
                self.addresses.iter().any(|(index, one)| *index == link.index && one == address)
            }),
            Fact::Up { link, .. } => self.link(link).is_some_and(|link| link.up),
            Fact::SubnetRoute { link, address, .. } => self.link(link).is_some_and(|link| {
                self.routes.iter().any(|route| is_to(route, link.index, address.trunc()))
            }),
            Fact::DefaultRoute { link, gateway, .. } => self.link(link).is_some_and(|link| {
                self.routes
                    .iter()
                    .any(|route| is_default(route) && leads(route, link.index, *gateway))
            }),
            Fact::Rule(rule) => self.rules.contains(rule),
            Fact::Forwarding { link, v6 } => {
                match kernel.forwarding_at(link, *v6) {
                    Ok(value) if value == "1" => true,
                    // A kernel that cannot single links out; that is told elsewhere, or all of them
                    // forward.
                    Err(_) if *v6 && self.indexes.contains_key(link) => {
                        !kernel.alone || kernel.forwards(true).unwrap_or(false)
                    }
                    _ => *v6 && kernel.forwards(true).unwrap_or(false),
                }
            }
            Fact::Group { link, group } => self.link(link).is_some_and(|link| link.group == *group),
            Fact::ReplyRoute { link, table: of, gateway } => self.link(link).is_some_and(|link| {
                self.replies.iter().any(|route| {
                    is_default(route) && table(route) == *of && leads(route, link.index, *gateway)
                })
            }),
            Fact::EngineDevice { link } => {
                self.link(link).is_some_and(|link| kernel.is_engine_device(link.index))
            }
            Fact::EngineRoute { link, table: of, v6 } => self.link(link).is_some_and(|link| {
                self.replies.iter().any(|route| {
                    is_v6(route) == *v6
                        && table(route) == *of
                        && route.attributes.contains(&RouteAttribute::Oif(link.index))
                })
            }),
            // Those are no matters of links: `Kernel::observe`.
            Fact::Gate { .. }
            | Fact::InternalGuard { .. }
            | Fact::PortGuard { .. }
            | Fact::GuardTable { .. }
            | Fact::Ruleset { .. } => true,
        })
    }

    /// The links that have an address which others may answer to, of the families that are asked
    /// for.
    pub(super) fn uplinks(&self, v4: bool, v6: bool) -> Vec<Uplink> {
        let of = |link: &Link| {
            let has = |v6: bool| {
                let usable = |net: &IpNet| {
                    let ip = net.addr();
                    ip.is_ipv6() == v6 && !ip.is_loopback() && !is_link_local(ip)
                };
                self.addresses.iter().any(|(index, net)| *index == link.index && usable(net))
            };
            Uplink {
                link: link.name.clone(),
                v4: v4 && has(false),
                v6: v6 && has(true),
                ours: false,
            }
        };
        self.links.values().map(of).filter(|uplink| uplink.v4 || uplink.v6).collect()
    }

    /// The lowest priority of a policy rule of others that is behind the `local` table's.
    pub(super) fn first_rule_of_others(&self) -> Option<u32> {
        self.first_rule_of_others
    }

    /// The default routes: of `main` the best one first, then those of other tables.
    pub(super) fn default_routes(&self) -> Vec<DefaultRoute> {
        let metric = |route: &RouteMessage| {
            let metric = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Priority(metric) => Some(*metric),
                _ => None,
            });
            metric.unwrap_or(0)
        };
        let mut main: Vec<&RouteMessage> =
            self.routes.iter().filter(|route| is_default(route)).collect();
        main.sort_by_key(|route| metric(route));
        main.into_iter().chain(&self.elsewhere).flat_map(|route| self.hops(route)).collect()
    }

    fn hops(&self, route: &RouteMessage) -> Vec<DefaultRoute> {
        let v6 = is_v6(route);
        let of = |index: u32, attributes: &[RouteAttribute], shared: bool| {
            let gateway = attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some(IpAddr::from(*ip)),
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => Some(IpAddr::from(*ip)),
                _ => None,
            });
            let own = self.addresses.iter().filter(|(link, net)| {
                *link == index && net.addr().is_ipv6() == v6 && !is_link_local(net.addr())
            });
            Some(DefaultRoute {
                link: self.links.get(&index)?.name.clone(),
                v6,
                table: Some(table(route)).filter(|table| *table != MAIN),
                gateway,
                shared,
                nets: own.map(|(_, net)| net.trunc()).collect(),
            })
        };
        let mut hops = Vec::new();
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => hops.extend(of(*index, &route.attributes, false)),
                RouteAttribute::MultiPath(several) => hops.extend(
                    several.iter().filter_map(|hop| of(hop.interface_index, &hop.attributes, true)),
                ),
                _ => {}
            }
        }
        hops
    }

    /// The bridges of tidegate, ours and those of other projects.
    pub(super) fn bridges(&self) -> BTreeMap<String, ObservedBridge> {
        let bridge = |link: &Link| {
            let own = self.addresses.iter().filter(|(index, _)| *index == link.index);
            let subnets = own.map(|(_, net)| net.trunc()).filter(|net| !is_link_local(net.addr()));
            ObservedBridge {
                index: link.index,
                internal: link.internal,
                subnets: subnets.collect(),
            }
        };
        let ours = self.links.values().filter(|link| link.of_tidegate);
        ours.map(|link| (link.name.clone(), bridge(link))).collect()
    }

    pub(super) fn default_mtu(&self) -> Option<u32> {
        let by = self
            .routes
            .iter()
            .filter(|route| is_default(route))
            .flat_map(|route| &route.attributes);
        let link = |attribute: &RouteAttribute| match attribute {
            RouteAttribute::Oif(index) => self.links.get(index).map(|link| link.mtu),
            _ => None,
        };
        // With several routes out a packet must fit through each.
        by.filter_map(link).min()
    }

    /// What is reached from here otherwise than by a default route.
    pub(super) fn reached(&self) -> Vec<(IpNet, String)> {
        let name =
            |index: u32| self.links.get(&index).map(|link| link.name.clone()).unwrap_or_default();
        let routes = self.routes.iter().filter(|route| !is_default(route)).filter_map(|route| {
            let mut to = None;
            let mut by = 0;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = Some(IpAddr::from(*ip)),
                    RouteAttribute::Destination(RouteAddress::Inet6(ip)) => to = Some(IpAddr::from(*ip)),
                    RouteAttribute::Oif(index) => by = *index,
                    _ => {}
                }
            }
            let net = IpNet::new(to?, route.header.destination_prefix_length).ok()?;
            // Link-local prefixes are on every link.
            let everywhere = matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local() || net.addr().is_multicast());
            (!everywhere).then(|| (net.trunc(), name(by)))
        });
        let addresses = self.addresses.iter().filter(|(_, net)| !is_link_local(net.addr()));
        routes.chain(addresses.map(|(index, net)| (net.trunc(), name(*index)))).collect()
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}
