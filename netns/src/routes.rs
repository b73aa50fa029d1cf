//! Route lookups in a namespace.

use crate::Family;
use crate::netlink::Netlink;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteType, RouteVia,
};
use rustix::io::Errno;
use std::io;
use std::net::IpAddr;

/// Returns the index and name of the interface to which `ip` is on-link. Performs a full route
/// lookup in the kernel, which includes policy rules.
pub(crate) fn connected_interface(
    netlink: &mut Netlink,
    ip: IpAddr,
) -> io::Result<Option<(u32, String)>> {
    let Some(index) = connected_index(netlink, ip)? else { return Ok(None) };
    Ok(Some((index, netlink.interface_name(index)?)))
}

/// Returns the index of that interface.
pub(crate) fn connected_index(netlink: &mut Netlink, ip: IpAddr) -> io::Result<Option<u32>> {
    let ip = ip.to_canonical();
    let mut request = RouteMessage::default();
    request.header.address_family = Family::of(ip).into();
    request.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    request.attributes.push(RouteAttribute::Destination(ip.into()));
    let reply = match netlink.get(RouteNetlinkMessage::GetRoute(request)) {
        Err(error) if is_unreachable(&error) => return Ok(None),
        reply => reply?,
    };
    let Some(RouteNetlinkMessage::NewRoute(route)) = reply else { return Ok(None) };
    match NextHop::of(&route) {
        NextHop { interface: Some(index), gateway: None }
            if route.header.kind == RouteType::Unicast =>
        {
            Ok(Some(index))
        }
        _ => Ok(None),
    }
}

/// Returns whether the error means that no route matches, or one of type `unreachable`, `blackhole`
/// or `prohibit`.
fn is_unreachable(error: &io::Error) -> bool {
    let unreachable = [Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::INVAL, Errno::ACCESS];
    Errno::from_io_error(error).is_some_and(|errno| unreachable.contains(&errno))
}

/// The next hop of a route.
pub(crate) struct NextHop {
    pub(crate) interface: Option<u32>,
    pub(crate) gateway: Option<IpAddr>,
}

/// Returns the next hop of the default route with the lowest metric in the main table.
pub(crate) fn default_next_hop(
    netlink: &mut Netlink,
    family: Family,
) -> io::Result<Option<NextHop>> {
    let defaults = main_table(netlink, family)?.into_iter().filter(|route| {
        route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
    });
    Ok(defaults.min_by_key(metric).map(|route| NextHop::of(&route)))
}

fn main_table(netlink: &mut Netlink, family: Family) -> io::Result<Vec<RouteMessage>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = family.into();
    filter.header.table = RouteHeader::RT_TABLE_MAIN;
    let routes = netlink.dump(&RouteNetlinkMessage::GetRoute(filter))?;
    Ok(routes
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .collect())
}

fn metric(route: &RouteMessage) -> u32 {
    let metric = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    metric.unwrap_or(0)
}

impl NextHop {
    /// Reads the next hop of a route. Multipath hops are equivalent, so the first one is used.
    fn of(route: &RouteMessage) -> Self {
        Self::read(&route.attributes)
    }

    fn read(attributes: &[RouteAttribute]) -> Self {
        let mut hop = Self { interface: None, gateway: None };
        for attribute in attributes {
            match attribute {
                RouteAttribute::Oif(index) => hop.interface = Some(*index),
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => hop.gateway = Some((*ip).into()),
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => {
                    hop.gateway = Some((*ip).into());
                }
                // An IPv4 route with an IPv6 next hop (RFC 8950).
                RouteAttribute::Via(RouteVia::Inet(ip)) => hop.gateway = Some((*ip).into()),
                RouteAttribute::Via(RouteVia::Inet6(ip)) => hop.gateway = Some((*ip).into()),
                RouteAttribute::MultiPath(hops) => {
                    if let Some(hop) = hops.first() {
                        return Self::over(hop);
                    }
                }
                _ => {}
            }
        }
        hop
    }

    fn over(hop: &RouteNextHop) -> Self {
        Self { interface: Some(hop.interface_index), ..Self::read(&hop.attributes) }
    }
}
