//! A snapshot of one namespace.

use super::link::Link;
use super::messages::{
    first_foreign_priority, is_default, is_to, is_v6, leads, link_of, rule_of, table,
};
use super::{Kernel, MAIN, error, is_without_ipv6};
use crate::{
    DefaultRoute, Fact, Interface, KernelError, ObservedBridge, ObservedLink, Place, Rule, Uplink,
};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags};
use rtnetlink::packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use rtnetlink::packet_route::rule::RuleMessage;
use rtnetlink::{IpVersion, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tidegate_model::{LOOPBACK_INDEX, MacAddress, registry};
use tidegate_netfilter::OwnAddresses;

/// The observed state of one namespace.
pub(super) struct Snapshot {
    pub(super) links: BTreeMap<u32, Link>,
    indexes: BTreeMap<String, u32>,
    addresses: Vec<(u32, IpNet)>,
    /// Addresses of the host that another host has as well, so that they are not used (RFC 4862,
    /// 5.4.5).
    duplicates: BTreeSet<Ipv6Addr>,
    routes: Vec<RouteMessage>,
    /// Foreign default routes in tables other than `main`.
    elsewhere: Vec<RouteMessage>,
    /// Default routes of tidegate in tables other than `main`.
    replies: Vec<RouteMessage>,
    rules: Vec<Rule>,
    first_rule_of_others: Option<u32>,
    /// Static forwarding database entries: bridge port and station.
    stations: BTreeSet<(u32, MacAddress)>,
}

/// The depth of observation in the namespace of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// Links by name, with their attributes. Addresses and routes are not listed, so the time does
    /// not depend on their number. They count as missing, and adding an existing one fails with
    /// `EEXIST`.
    Links,
    /// Also addresses and routes.
    All,
    /// The same in endpoints. On the host, only the links that the facts name are queried, so the
    /// time does not depend on the number of links. Addresses, routes and rules of the host count
    /// as missing.
    Named,
}

/// Maximum number of addresses and routes read per namespace. Further ones count as missing.
const MAX_ENTRIES: usize = 65_536;

impl Snapshot {
    /// Lists links, and other objects only as far as `facts` requires, because there may be
    /// thousands of endpoints. On the host, all links are listed, unless `depth` is
    /// [`Depth::Named`]. In an endpoint, only the links in
    /// `facts` are queried, because its processes may create any number of links.
    pub(super) async fn observe(
        kernel: &mut Kernel,
        place: &Place,
        facts: &[&Fact],
        depth: Depth,
    ) -> Result<Self, KernelError> {
        let failed = |what: &'static str| {
            move |source| KernelError {
                what: format!("list the {what} of {place}"),
                source: error(source),
            }
        };
        let handle = kernel.connection(place)?.handle.clone();
        let host = *place == Place::Host && depth != Depth::Named;
        let links = if host {
            let links = super::all_links(&handle).await.map_err(failed("links"))?;
            links.iter().map(link_of).map(|link| (link.index, link)).collect()
        } else {
            let mut links = BTreeMap::new();
            let names: BTreeSet<&str> =
                facts.iter().flat_map(|fact| fact.on()).map(|(_, name)| name).collect();
            for name in names {
                let link = super::link_named(&handle, name).await;
                let link = link.map_err(|source| KernelError {
                    what: format!("query link {name:?} of {place}"),
                    source,
                })?;
                links.extend(link.map(|link| (link.index, link)));
            }
            links
        };
        let is_deep = *place != Place::Host && depth != Depth::Links;
        let indexes = links.values().map(|link| (link.name.clone(), link.index)).collect();
        let mut snapshot = Self {
            links,
            indexes,
            addresses: Vec::new(),
            duplicates: BTreeSet::new(),
            routes: Vec::new(),
            first_rule_of_others: None,
            stations: BTreeSet::new(),
            elsewhere: Vec::new(),
            replies: Vec::new(),
            rules: Vec::new(),
        };
        let mut truncated = false;
        let has_addresses = || {
            facts
                .iter()
                .any(|fact| matches!(fact, Fact::Address { .. }) && snapshot.has_links_of(fact))
        };
        if host || is_deep && has_addresses() {
            let mut listed = handle.address().get().execute();
            while let Some(message) = listed.try_next().await.map_err(failed("addresses"))? {
                if !host && snapshot.addresses.len() >= MAX_ENTRIES {
                    truncated = true;
                    break;
                }
                // On a point-to-point link `IFA_ADDRESS` is the peer. `IFA_LOCAL` is always present
                // for IPv4.
                let is_duplicate = message.header.flags.contains(AddressHeaderFlags::Dadfailed);
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
                    snapshot.addresses.push((message.header.index, net));
                    if let (true, IpNet::V6(net)) = (is_duplicate, net) {
                        snapshot.duplicates.insert(net.addr());
                    }
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
            let has_routes =
                || facts.iter().any(|fact| is_route(fact) && snapshot.has_links_of(fact));
            if host || is_deep && has_routes() {
                let ours = RouteProtocol::Other(registry::ROUTE_PROTOCOL);
                let mut listed = handle.route().get(any).execute();
                let mut read = 0;
                // Streamed, because a container may have any number of routes.
                while let Some(route) = listed.try_next().await.map_err(failed("routes"))? {
                    read += 1;
                    if read > MAX_ENTRIES && !host {
                        truncated = true;
                        break;
                    }
                    if table(&route) == MAIN {
                        if snapshot.routes.len() < MAX_ENTRIES {
                            snapshot.routes.push(route);
                        }
                    } else if host && is_default(&route) {
                        let list = if route.header.protocol == ours {
                            &mut snapshot.replies
                        } else {
                            &mut snapshot.elsewhere
                        };
                        list.push(route);
                    }
                }
            }
        }
        if truncated && !host {
            // Close the connection, which would otherwise read the remaining entries.
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
                snapshot.rules.extend(listed.iter().filter_map(rule_of));
                let first = first_foreign_priority(&listed);
                snapshot.first_rule_of_others =
                    snapshot.first_rule_of_others.into_iter().chain(first).min();
            }
        }
        if facts
            .iter()
            .any(|fact| matches!(fact, Fact::Station { .. }) && snapshot.has_links_of(fact))
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
                let stations = stations.filter(|_| is_static).map(MacAddress);
                snapshot.stations.extend(stations.map(|station| (entry.header.ifindex, station)));
            }
        }
        Ok(snapshot)
    }

    fn link(&self, name: &str) -> Option<&Link> {
        self.links.get(self.indexes.get(name)?)
    }

    /// Returns the interface index of a link.
    pub(super) fn index(&self, name: &str) -> Option<u32> {
        self.indexes.get(name).copied()
    }

    /// Returns whether the links on which `fact` depends exist.
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
                // Use the value from the link attributes: with thousands of namespaces, the lookup
                // of a sysctl file is slow.
                let reported = fact.on().find_map(|(_, link)| self.link(link)?.without_ipv6);
                match reported.filter(|_| name.ends_with(".disable_ipv6")) {
                    Some(off) => *value == u8::from(off).to_string(),
                    None => match kernel.namespace(place)?.sysctl(name) {
                        Ok(found) => found == *value,
                        // Consistent with `Kernel::add`.
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
                    // The kernel lacks IPv6 forwarding per link. Either all links forward, or
                    // `Kernel::add` has logged a warning.
                    Err(_) if *v6 && self.indexes.contains_key(link) => {
                        !kernel.exclusive || kernel.forwards(true).unwrap_or(false)
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
            // Evaluated by `Kernel::observe`.
            Fact::Gate { .. }
            | Fact::BridgeGuard { .. }
            | Fact::PortGuard { .. }
            | Fact::SourceGuard { .. }
            | Fact::GuardedSubnet(_)
            | Fact::GuardTable { .. }
            | Fact::Ruleset { .. } => true,
        })
    }

    /// Returns the interface indexes of all links.
    pub(super) fn indexes(&self) -> BTreeSet<u32> {
        self.links.keys().copied().collect()
    }

    /// Returns the links of other software on which the host can receive packets, and the ports of
    /// its bridges: frames to link control addresses are received at the port (`br_handle_frame`).
    pub(super) fn receivers(&self) -> BTreeSet<String> {
        let is_ours = |index: u32| self.links.get(&index).is_some_and(Link::is_bridge_of_tidegate);
        let receives = |link: &&Link| {
            link.index != LOOPBACK_INDEX
                && !link.name.starts_with(registry::INTERFACE_PREFIX)
                && !link.is_tap
                && !link.is_bridge_of_tidegate()
                && !link.controller.is_some_and(is_ours)
        };
        self.links.values().filter(receives).map(|link| link.name.clone()).collect()
    }

    /// Returns the addresses of the host that no other host may use as a source.
    pub(super) fn own_addresses(&self) -> OwnAddresses {
        let is_bridge = |index: u32| self.links.get(&index).is_some_and(|link| link.is_bridge);
        let stations = self.links.values().filter(|link| {
            !link.is_bridge_of_tidegate()
                && (link.is_bridge || link.controller.is_some_and(is_bridge))
        });
        let mut v6 = BTreeSet::new();
        for (index, net) in &self.addresses {
            if let IpNet::V6(net) = net
                && !net.addr().is_loopback()
                && !self.duplicates.contains(&net.addr())
            {
                v6.insert((*index, net.addr()));
                // Subnet-router anycast (RFC 4291, 2.6.1), but not with RFC 6164.
                if net.prefix_len() < 127 {
                    v6.insert((*index, net.network()));
                }
            }
        }
        OwnAddresses { stations: stations.filter_map(|link| link.mac).collect(), v6 }
    }

    /// Returns the links with an address at which replies may arrive, for the requested families.
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

    /// Returns the lowest priority of the foreign policy rules after the rule for the `local`
    /// table.
    pub(super) fn first_rule_of_others(&self) -> Option<u32> {
        self.first_rule_of_others
    }

    /// Returns the default routes: those of `main`, best first, then those of other tables.
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

    /// Returns all links of `place` by name.
    pub(super) fn links_by_name(&self, place: &Place) -> BTreeMap<String, ObservedLink> {
        let is_bridge_of_tidegate =
            |index: u32| self.links.get(&index).is_some_and(Link::is_bridge_of_tidegate);
        let of = |link: &Link| {
            let observed = match place {
                Place::Host => link.observed(is_bridge_of_tidegate),
                // Root in an endpoint can give its links any alias.
                Place::Endpoint(_) => ObservedLink { mac: link.mac, ..ObservedLink::default() },
            };
            (link.name.clone(), observed)
        };
        self.links.values().map(of).collect()
    }

    /// Returns the bridges of tidegate, of all projects.
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
        let ours = self.links.values().filter(|link| link.is_bridge_of_tidegate());
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
        // With several default routes, the smallest MTU applies.
        by.filter_map(link).min()
    }

    /// Returns the prefixes that are reachable without a default route, with their link.
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
            // Link-local and multicast prefixes exist on every link.
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
