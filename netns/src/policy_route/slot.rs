//! Rules and routes of one owner slot in the kernel.
//!
//! Rules and routes of tidegate are identified by the priority and table of their slot and by
//! [`ROUTE_PROTOCOL`]. Every request to add or delete specifies these attributes, so it cannot
//! affect other slots or other programs.

use super::Selector;
use crate::Family;
use crate::netlink::{Netlink, Operation};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{IpProtocol, RouteNetlinkMessage};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use tidegate_model::registry::{MARK_MASK, OwnerSlot, ROUTE_PROTOCOL, rule_priority, table_id};
use tidegate_model::{LOOPBACK_INDEX, Protocol};

/// Upper bound of the deletion loop, above the number of rules that an owner can have.
const DELETIONS: usize = 4 * super::MAX_SELECTORS;

/// Adds the rule `SELECTOR lookup TABLE`.
pub(super) fn add_rule(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    selector: &Selector,
) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::NewRule(rule_for(slot, selector)), Operation::Create)
}

/// Adds a duplicate of the rule after all other rules of the slot.
pub(super) fn add_duplicate_rule(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    selector: &Selector,
) -> io::Result<()> {
    netlink
        .execute(RouteNetlinkMessage::NewRule(rule_for(slot, selector)), Operation::CreateDuplicate)
}

/// Deletes the first rule of the slot that has at least the conditions of `selector`.
pub(super) fn delete_rule(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    selector: &Selector,
) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::DelRule(rule_for(slot, selector)), Operation::Delete)
}

/// Deletes all rules of the slot in both families.
pub(super) fn delete_rules(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<()> {
    Family::ALL.into_iter().try_for_each(|family| {
        repeat_until_absent(|| {
            netlink.execute(RouteNetlinkMessage::DelRule(rule(slot, family)), Operation::Delete)
        })
    })
}

/// Adds `local default dev lo`, which delivers all packets routed by the slot's table locally.
pub(super) fn add_route(netlink: &mut Netlink, slot: OwnerSlot, family: Family) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::NewRoute(route(slot, family)), Operation::Create)
}

/// Sets `source` as the preferred source address of the slot's route, for unbound sockets.
pub(super) fn set_source(netlink: &mut Netlink, slot: OwnerSlot, source: IpAddr) -> io::Result<()> {
    let mut route = route(slot, Family::of(source));
    route.attributes.push(RouteAttribute::PrefSource(source.into()));
    netlink.execute(RouteNetlinkMessage::NewRoute(route), Operation::Replace)
}

/// Deletes the route of the slot in `family`.
pub(super) fn delete_route(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    family: Family,
) -> io::Result<()> {
    repeat_until_absent(|| {
        netlink.execute(RouteNetlinkMessage::DelRoute(route(slot, family)), Operation::Delete)
    })
}

/// Deletes the routes of the slot in both families.
pub(super) fn delete_routes(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<()> {
    Family::ALL.into_iter().try_for_each(|family| delete_route(netlink, slot, family))
}

/// Returns the slots whose priority is used by a rule of any program.
pub(super) fn used_priorities(netlink: &mut Netlink) -> io::Result<BTreeSet<OwnerSlot>> {
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

/// The contents of a slot's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Table {
    Empty,
    /// Contains the route of [`add_route`].
    Ours,
    Foreign,
}

/// Inspects the slot's table.
pub(super) fn table(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<Table> {
    let mut filter = RouteMessage::default();
    filter.attributes.push(RouteAttribute::Table(table_id(slot)));
    let routes = match netlink.dump(&RouteNetlinkMessage::GetRoute(filter)) {
        // The table does not exist yet.
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

/// Builds a rule without conditions. In a deletion request, it matches any rule of the slot.
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

fn rule_for(slot: OwnerSlot, selector: &Selector) -> RuleMessage {
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
    // IPv4 requires this scope for local routes; IPv6 routes have no scope.
    route.header.scope = RouteScope::Host;
    route.attributes =
        vec![RouteAttribute::Table(table_id(slot)), RouteAttribute::Oif(LOOPBACK_INDEX)];
    route
}

/// Repeats a deletion until the kernel reports that the object does not exist.
fn repeat_until_absent(mut delete: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    for _ in 0..DELETIONS {
        match delete() {
            Ok(()) => {}
            Err(error) if is_absence(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::QuotaExceeded, "too many objects to delete"))
}

/// Returns whether the error means that the object to delete does not exist: a rule (`ENOENT`), a
/// route (`ESRCH`), or the address family (`EAFNOSUPPORT`, `EOPNOTSUPP`).
pub(super) fn is_absence(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::SRCH, Errno::AFNOSUPPORT, Errno::OPNOTSUPP];
    Errno::from_io_error(error).is_some_and(|errno| absent.contains(&errno))
}
