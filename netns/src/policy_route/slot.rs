//! The rules and routes of one owner slot, in the kernel.
//!
//! What is ours carries three things: the slot's priority or table, and [`ROUTE_PROTOCOL`]. Every
//! request below names them, whether it adds or deletes, so that nothing of another slot or of
//! another program can be meant.

use super::Selector;
use crate::Family;
use crate::addresses::LOOPBACK;
use crate::netlink::{Netlink, Order};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{IpProtocol, RouteNetlinkMessage};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use tidegate_model::Protocol;
use tidegate_model::registry::{MARK_MASK, OwnerSlot, ROUTE_PROTOCOL, rule_priority, table_id};

/// More rules than any owner can have: the end of a loop that should end by itself.
const DELETIONS: usize = 4 * super::MAX_SELECTORS;

/// Adds the rule `SELECTOR lookup TABLE`.
pub(super) fn add_rule(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    selector: &Selector,
) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::NewRule(selected(slot, selector)), Order::Create)
}

/// Adds the same rule once more, behind all others of the slot.
pub(super) fn add_rule_again(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    selector: &Selector,
) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::NewRule(selected(slot, selector)), Order::CreateAgain)
}

/// Deletes the first rule of the slot that meets the conditions of `selector`; it may have further
/// ones.
pub(super) fn delete_rule(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    selector: &Selector,
) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::DelRule(selected(slot, selector)), Order::Delete)
}

/// Deletes every rule of the slot, of both families.
pub(super) fn delete_rules(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<()> {
    Family::ALL.into_iter().try_for_each(|family| {
        until_none_is_left(|| {
            netlink.execute(RouteNetlinkMessage::DelRule(rule(slot, family)), Order::Delete)
        })
    })
}

/// Adds `local default dev lo`, by which whatever is looked up in the slot's table is delivered
/// locally.
pub(super) fn add_route(netlink: &mut Netlink, slot: OwnerSlot, family: Family) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::NewRoute(route(slot, family)), Order::Create)
}

/// Gives it `source` as the address that local sockets send from when they have not chosen one.
pub(super) fn set_source(netlink: &mut Netlink, slot: OwnerSlot, source: IpAddr) -> io::Result<()> {
    let mut route = route(slot, Family::of(source));
    route.attributes.push(RouteAttribute::PrefSource(source.into()));
    netlink.execute(RouteNetlinkMessage::NewRoute(route), Order::Replace)
}

/// Deletes it again.
pub(super) fn delete_route(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    family: Family,
) -> io::Result<()> {
    until_none_is_left(|| {
        netlink.execute(RouteNetlinkMessage::DelRoute(route(slot, family)), Order::Delete)
    })
}

/// Deletes it again, in both families.
pub(super) fn delete_routes(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<()> {
    Family::ALL.into_iter().try_for_each(|family| delete_route(netlink, slot, family))
}

/// The slots at whose priority there is a rule, whoever put it there.
pub(super) fn with_rules(netlink: &mut Netlink) -> io::Result<BTreeSet<OwnerSlot>> {
    let rules = netlink.dump(&RouteNetlinkMessage::GetRule(RuleMessage::default()))?;
    let attributes = rules.iter().flat_map(|message| match message {
        RouteNetlinkMessage::NewRule(rule) => rule.attributes.as_slice(),
        _ => &[],
    });
    Ok(attributes
        .filter_map(|attribute| match attribute {
            RuleAttribute::Priority(priority) => OwnerSlot::of_rule_priority(*priority),
            _ => None,
        })
        .collect())
}

/// Whose the routes in a slot's table are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Empty,
    /// The route that [`add_route`] adds.
    Ours,
    Foreign,
}

/// Looks into the slot's table.
pub(super) fn table(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<Table> {
    let mut filter = RouteMessage::default();
    filter.attributes.push(RouteAttribute::Table(table_id(slot)));
    let routes = match netlink.dump(&RouteNetlinkMessage::GetRoute(filter)) {
        // There is no such table yet.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Vec::new(),
        routes => routes?,
    };
    let mut routes = routes.iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    });
    let protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    Ok(match routes.next() {
        None => Table::Empty,
        Some(first) if first.header.protocol == protocol => Table::Ours,
        Some(_) => Table::Foreign,
    })
}

/// A rule without conditions; in a request to delete, any rule of the slot.
fn rule(slot: OwnerSlot, family: Family) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family.into();
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(rule_priority(slot)),
        RuleAttribute::Table(table_id(slot)),
        RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)),
    ];
    rule
}

fn selected(slot: OwnerSlot, selector: &Selector) -> RuleMessage {
    let mut rule = rule(slot, selector.family);
    let host_prefix = match selector.family {
        Family::V4 => 32,
        Family::V6 => 128,
    };
    if let Some(ip) = selector.from {
        rule.header.src_len = host_prefix;
        rule.attributes.push(RuleAttribute::Source(ip.to_canonical()));
    }
    if let Some(ip) = selector.to {
        rule.header.dst_len = host_prefix;
        rule.attributes.push(RuleAttribute::Destination(ip.to_canonical()));
    }
    if let Some(mark) = selector.mark {
        rule.attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(MARK_MASK)]);
    }
    if let Some(protocol) = selector.protocol {
        rule.attributes.push(RuleAttribute::IpProtocol(match protocol {
            Protocol::Tcp => IpProtocol::Tcp,
            Protocol::Udp => IpProtocol::Udp,
            Protocol::Sctp => IpProtocol::Sctp,
        }));
    }
    if let Some(port) = selector.source_port {
        rule.attributes
            .push(RuleAttribute::SourcePortRange(RulePortRange { start: port, end: port }));
    }
    if let Some(name) = &selector.input_interface {
        rule.attributes.push(RuleAttribute::Iifname(name.clone()));
    }
    rule
}

fn route(slot: OwnerSlot, family: Family) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = family.into();
    route.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    route.header.kind = RouteType::Local;
    // IPv4 demands it of a local route; IPv6 knows no scopes of routes.
    route.header.scope = RouteScope::Host;
    route.attributes = vec![RouteAttribute::Table(table_id(slot)), RouteAttribute::Oif(LOOPBACK)];
    route
}

/// Repeats a deletion until the kernel finds nothing more.
fn until_none_is_left(mut delete: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..DELETIONS {
        match delete() {
            Ok(()) => {}
            Err(error) if is_absence(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("there is no end to them"))
}

/// Whether the kernel says that what was to be deleted is not there: a rule (`ENOENT`), a route
/// (`ESRCH`), or the whole family (`EAFNOSUPPORT`, `EOPNOTSUPP`).
pub(super) fn is_absence(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::SRCH, Errno::AFNOSUPPORT, Errno::OPNOTSUPP];
    Errno::from_io_error(error).is_some_and(|errno| absent.contains(&errno))
}
