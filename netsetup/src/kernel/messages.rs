//! Conversion between facts and rtnetlink messages.

use super::MAIN;
use super::link::Link;
use crate::{Reach, Rule};
use ipnet::IpNet;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tidegate_model::{MacAddress, registry};

pub(super) fn link_of(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        peer: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        controller: None,
        is_bridge: false,
        is_tap: false,
        group: 0,
        isolated: false,
        internal: false,
        created_with: None,
        learns: false,
        without_ipv6: None,
    };
    let is_elsewhere = message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Link(peer) => link.peer = Some(*peer).filter(|_| is_elsewhere),
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => {
                link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress);
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::Group(group) => link.group = *group,
            LinkAttribute::IfAlias(alias) => {
                let of_tidegate = registry::parse_bridge_alias(alias);
                link.internal = of_tidegate.is_some_and(|(internal, _)| internal);
                link.created_with = of_tidegate.map(|(_, mac)| mac);
            }
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    link.is_bridge |= *info == LinkInfo::Kind(InfoKind::Bridge);
                    link.is_tap |=
                        matches!(info, LinkInfo::Kind(InfoKind::MacVtap | InfoKind::IpVtap));
                    if let LinkInfo::PortData(InfoPortData::BridgePort(port)) = info {
                        link.isolated = port.contains(&InfoBridgePort::Isolated(true));
                        let is = |one| port.contains(&one);
                        link.learns = is(InfoBridgePort::Learning(true))
                            || is(InfoBridgePort::UnicastFlood(true));
                    }
                }
            }
            LinkAttribute::AfSpecUnspec(families) => {
                for family in families {
                    let AfSpecUnspec::Inet6(attributes) = family else { continue };
                    link.without_ipv6 = attributes.iter().find_map(|one| match one {
                        AfSpecInet6::DevConf(settings) => Some(settings.disable_ipv6 != 0),
                        _ => None,
                    });
                }
            }
            _ => {}
        }
    }
    link
}

pub(super) fn group(attribute: &LinkAttribute) -> Option<u32> {
    match attribute {
        LinkAttribute::Group(group) => Some(*group),
        _ => None,
    }
}

pub(super) fn table(route: &RouteMessage) -> u32 {
    let wide = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or_else(|| u32::from(route.header.table))
}

pub(super) fn is_default(route: &RouteMessage) -> bool {
    route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
}

pub(super) fn leads(route: &RouteMessage, by: u32, to: IpAddr) -> bool {
    let to = match to {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    route.attributes.contains(&RouteAttribute::Oif(by))
        && route.attributes.contains(&RouteAttribute::Gateway(to))
}

pub(super) fn is_v6(route: &RouteMessage) -> bool {
    route.header.address_family == AddressFamily::Inet6
}

/// Returns whether `route` is an on-link route to `net` through the link with interface index `by`.
pub(super) fn is_to(route: &RouteMessage, by: u32, net: IpNet) -> bool {
    let to = match net.network() {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    route.header.destination_prefix_length == net.prefix_len()
        && route.attributes.contains(&RouteAttribute::Oif(by))
        && route.attributes.contains(&RouteAttribute::Destination(to))
        && !route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)))
}

/// Builds the route that the kernel adds with `address` (`fib_add_ifaddr`, net/ipv4/fib_frontend.c;
/// `addrconf_prefix_route`, net/ipv6/addrconf.c).
pub(super) fn subnet_route(by: u32, address: IpNet) -> RouteMessage {
    /// `IP6_RT_PRIO_ADDRCONF`.
    const METRIC: u32 = 256;
    match address {
        IpNet::V4(net) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .pref_source(net.addr())
            .output_interface(by)
            .scope(RouteScope::Link)
            .protocol(RouteProtocol::Kernel)
            .build(),
        IpNet::V6(net) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .output_interface(by)
            .priority(METRIC)
            .protocol(RouteProtocol::Kernel)
            .build(),
    }
}

pub(super) fn default_route(by: u32, gateway: IpAddr) -> RouteMessage {
    let protocol = RouteProtocol::Other(registry::ROUTE_PROTOCOL);
    match gateway {
        IpAddr::V4(gateway) => RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(gateway)
            .output_interface(by)
            .protocol(protocol)
            .build(),
        IpAddr::V6(gateway) => RouteMessageBuilder::<Ipv6Addr>::new()
            .gateway(gateway)
            .output_interface(by)
            .protocol(protocol)
            .build(),
    }
}

/// Builds a default route in the table `table`.
pub(super) fn reply_route(by: u32, gateway: IpAddr, table: u32) -> RouteMessage {
    in_table(default_route(by, gateway), table)
}

/// Builds a default route to a device, without a gateway.
pub(super) fn engine_route(by: u32, v6: bool, table: u32) -> RouteMessage {
    let protocol = RouteProtocol::Other(registry::ROUTE_PROTOCOL);
    let route = if v6 {
        RouteMessageBuilder::<Ipv6Addr>::new().output_interface(by).protocol(protocol).build()
    } else {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().output_interface(by);
        route.scope(RouteScope::Link).protocol(protocol).build()
    };
    in_table(route, table)
}

fn in_table(mut route: RouteMessage, table: u32) -> RouteMessage {
    // Table numbers above 255 are stored in the attribute only (`RT_TABLE_UNSPEC` in the header).
    route.header.table = 0;
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Table(_)));
    route.attributes.push(RouteAttribute::Table(table));
    route
}

pub(super) fn message_of(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = match rule.reach {
        Reach::Main | Reach::MainButDefault | Reach::Table(_) => RuleAction::ToTable,
        Reach::Nothing => RuleAction::Unreachable,
        Reach::Silence => RuleAction::Blackhole,
    };
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(registry::ROUTE_PROTOCOL)));
    match rule.reach {
        Reach::Main => {
            message.header.table = MAIN as u8;
            attributes.push(RuleAttribute::Table(MAIN));
        }
        Reach::MainButDefault => {
            message.header.table = MAIN as u8;
            attributes.push(RuleAttribute::Table(MAIN));
            attributes.push(RuleAttribute::SuppressPrefixLen(0));
        }
        // Table numbers above 255 are stored in the attribute only.
        Reach::Table(table) => attributes.push(RuleAttribute::Table(table)),
        Reach::Nothing | Reach::Silence => {}
    }
    if let Some(interface) = &rule.from_interface {
        attributes.push(RuleAttribute::Iifname(interface.clone()));
    }
    if rule.marked {
        attributes.push(RuleAttribute::FwMark(registry::FORWARD_MARK));
        attributes.push(RuleAttribute::FwMask(registry::FORWARD_MARK_MASK));
    }
    if rule.uplink != 0 {
        attributes.push(RuleAttribute::FwMark(registry::uplink_mark(rule.uplink)));
        attributes.push(RuleAttribute::FwMask(registry::UPLINK_MARK_MASK));
    }
    if let Some(from) = &rule.from {
        message.header.src_len = from.prefix_len();
        attributes.push(RuleAttribute::Source(from.network()));
    }
    if let Some(to) = &rule.to {
        message.header.dst_len = to.prefix_len();
        attributes.push(RuleAttribute::Destination(to.network()));
    }
    message
}

fn table_of(attribute: &RuleAttribute) -> Option<u32> {
    match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    }
}

/// Returns the lowest priority of a foreign rule after the last rule for the `local` table. `rules`
/// are all rules of one family in the order of the kernel. Rules before the `local` table need not
/// be preceded.
pub(super) fn first_foreign_priority(rules: &[RuleMessage]) -> Option<u32> {
    /// `RT_TABLE_LOCAL`.
    const LOCAL: u32 = 255;
    let ours = RuleAttribute::Protocol(RouteProtocol::Other(registry::ROUTE_PROTOCOL));
    let priority = |rule: &RuleMessage| {
        let given = rule.attributes.iter().find_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => Some(*priority),
            _ => None,
        });
        given.unwrap_or(0)
    };
    let is_local = |rule: &&RuleMessage| {
        let table =
            rule.attributes.iter().find_map(table_of).unwrap_or(u32::from(rule.header.table));
        rule.header.action == RuleAction::ToTable && table == LOCAL
    };
    // The kernel lists rules in order of evaluation: by priority, then by order of addition.
    let behind = rules.iter().rposition(|rule| is_local(&rule)).map_or(0, |local| local + 1);
    rules[behind..].iter().filter(|rule| !rule.attributes.contains(&ours)).map(priority).min()
}

/// Parses a rule of tidegate. Returns `None` for foreign rules, and for rules that tidegate never
/// creates.
pub(super) fn rule_of(message: &RuleMessage) -> Option<Rule> {
    let ours = RuleAttribute::Protocol(RouteProtocol::Other(registry::ROUTE_PROTOCOL));
    if !message.attributes.contains(&ours) {
        return None;
    }
    let mut rule = Rule {
        priority: 0,
        v6: message.header.family == AddressFamily::Inet6,
        from_interface: None,
        from: None,
        to: None,
        uplink: 0,
        marked: message.attributes.contains(&RuleAttribute::FwMark(registry::FORWARD_MARK)),
        reach: match message.header.action {
            RuleAction::ToTable => match message.attributes.iter().find_map(table_of) {
                Some(table) if table != MAIN => Reach::Table(table),
                _ if message.attributes.contains(&RuleAttribute::SuppressPrefixLen(0)) => {
                    Reach::MainButDefault
                }
                _ => Reach::Main,
            },
            RuleAction::Unreachable => Reach::Nothing,
            RuleAction::Blackhole => Reach::Silence,
            _ => return None,
        },
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(mark) => {
                let of = |number: &u8| registry::uplink_mark(*number) == *mark;
                rule.uplink = (1..=registry::UPLINKS).find(of).unwrap_or(0);
            }
            RuleAttribute::Iifname(name) => rule.from_interface = Some(name.clone()),
            RuleAttribute::Source(ip) => {
                rule.from = IpNet::new(*ip, message.header.src_len).ok();
            }
            RuleAttribute::Destination(ip) => {
                rule.to = IpNet::new(*ip, message.header.dst_len).ok();
            }
            _ => {}
        }
    }
    Some(rule)
}
