//! Rules and routes of one owner slot in the kernel.
//!
//! Rules and routes of tidegate are identified by the priority and table of their slot and by
//! [`ROUTE_PROTOCOL`]. Every request to add or delete specifies these attributes, so it cannot
//! affect other slots or other programs.

use super::{Route, Selector};
use crate::Family;
use crate::netlink::{Netlink, Operation};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
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

/// Adds `route` to the slot's table.
pub(super) fn add_route(netlink: &mut Netlink, slot: OwnerSlot, route: &Route) -> io::Result<()> {
    netlink.execute(RouteNetlinkMessage::NewRoute(message(slot, route)), Operation::Create)
}

/// Sets `source` as the preferred source address of the slot's route, for unbound sockets.
pub(super) fn set_source(netlink: &mut Netlink, slot: OwnerSlot, source: IpAddr) -> io::Result<()> {
    let mut route = message(slot, &Route::Local(Family::of(source)));
    route.attributes.push(RouteAttribute::PrefSource(source.into()));
    netlink.execute(RouteNetlinkMessage::NewRoute(route), Operation::Replace)
}

/// Deletes `route` from the slot's table.
pub(super) fn delete_route(
    netlink: &mut Netlink,
    slot: OwnerSlot,
    route: &Route,
) -> io::Result<()> {
    repeat_until_absent(|| {
        let message = RouteNetlinkMessage::DelRoute(message(slot, route));
        netlink.execute(message, Operation::Delete)
    })
}

/// Deletes all routes of the slot in both families.
pub(super) fn delete_routes(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<()> {
    let protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    for route in routes(netlink, slot)? {
        if route.header.protocol != protocol {
            continue;
        }
        match netlink.execute(RouteNetlinkMessage::DelRoute(route), Operation::Delete) {
            Err(error) if !is_absence(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
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
    /// Begins with a route of [`add_route`].
    Ours,
    Foreign,
}

/// Inspects the slot's table.
pub(super) fn table(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<Table> {
    let protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    Ok(match routes(netlink, slot)?.first() {
        None => Table::Empty,
        Some(first) if first.header.protocol == protocol => Table::Ours,
        Some(_) => Table::Foreign,
    })
}

/// Lists the routes of the slot's table in both families.
fn routes(netlink: &mut Netlink, slot: OwnerSlot) -> io::Result<Vec<RouteMessage>> {
    let mut filter = RouteMessage::default();
    filter.attributes.push(RouteAttribute::Table(table_id(slot)));
    let messages = match netlink.dump(&RouteNetlinkMessage::GetRoute(filter)) {
        // The table does not exist yet.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Vec::new(),
        messages => messages?,
    };
    let route = |message| match message {
        RouteNetlinkMessage::NewRoute(route) => Some(route),
        _ => None,
    };
    Ok(messages.into_iter().filter_map(route).collect())
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

fn message(slot: OwnerSlot, route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = route.family().into();
    message.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    message.attributes = vec![RouteAttribute::Table(table_id(slot))];
    // IPv4 requires a matching scope; IPv6 routes have none.
    (message.header.kind, message.header.scope) = match route {
        Route::Local(_) => (RouteType::Local, RouteScope::Host),
        Route::Via { .. } => (RouteType::Unicast, RouteScope::Universe),
        Route::Throw(_) => (RouteType::Throw, RouteScope::Universe),
    };
    match route {
        Route::Local(_) => message.attributes.push(RouteAttribute::Oif(LOOPBACK_INDEX)),
        Route::Via { gateway, link } => message.attributes.extend([
            RouteAttribute::Gateway(RouteAddress::from(*gateway)),
            RouteAttribute::Oif(*link),
        ]),
        Route::Throw(subnet) => {
            message.header.destination_prefix_length = subnet.prefix_len();
            let network = RouteAddress::from(subnet.network());
            message.attributes.push(RouteAttribute::Destination(network));
        }
    }
    message
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
