//! Where a namespace sends its packets.

use crate::Family;
use crate::netlink::Netlink;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteNextHop, RouteType, RouteVia,
};
use rustix::io::Errno;
use std::io;
use std::net::IpAddr;

/// Index and name of the interface behind which `ip` is on the same link: asks the kernel for the
/// way of one packet, so policy rules have their say.
pub(crate) fn connected_interface(
    netlink: &mut Netlink,
    ip: IpAddr,
) -> io::Result<Option<(u32, String)>> {
    let ip = ip.to_canonical();
    let mut question = RouteMessage::default();
    question.header.address_family = Family::of(ip).into();
    question.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    question.attributes.push(RouteAttribute::Destination(ip.into()));
    let answer = match netlink.get(RouteNetlinkMessage::GetRoute(question)) {
        Err(error) if is_no_way(&error) => return Ok(None),
        answer => answer?,
    };
    let Some(RouteNetlinkMessage::NewRoute(route)) = answer else { return Ok(None) };
    match Way::of(&route) {
        Way { interface: Some(index), gateway: None }
            if route.header.kind == RouteType::Unicast =>
        {
            Ok(Some((index, netlink.interface_name(index)?)))
        }
        _ => Ok(None),
    }
}

/// Whether the kernel says that no route, or one of type `unreachable`, `blackhole` or `prohibit`,
/// matches.
fn is_no_way(error: &io::Error) -> bool {
    let no_way = [Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::INVAL, Errno::ACCESS];
    Errno::from_io_error(error).is_some_and(|errno| no_way.contains(&errno))
}

/// Where a route leads.
pub(crate) struct Way {
    pub(crate) interface: Option<u32>,
    pub(crate) gateway: Option<IpAddr>,
}

/// The default route of lowest metric in the main table.
pub(crate) fn default_route(netlink: &mut Netlink, family: Family) -> io::Result<Option<Way>> {
    let defaults = main_table(netlink, family)?.into_iter().filter(|route| {
        route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast
    });
    Ok(defaults.min_by_key(metric).map(|route| Way::of(&route)))
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

impl Way {
    /// Reads the attributes of a route or of one of its next hops. Of several hops the first
    /// counts: they are equivalent.
    fn of(route: &RouteMessage) -> Self {
        Self::read(&route.attributes)
    }

    fn read(attributes: &[RouteAttribute]) -> Self {
        let mut way = Self { interface: None, gateway: None };
        for attribute in attributes {
            match attribute {
                RouteAttribute::Oif(index) => way.interface = Some(*index),
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => way.gateway = Some((*ip).into()),
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => {
                    way.gateway = Some((*ip).into());
                }
                // An IPv4 route over an IPv6 router (RFC 8950).
                RouteAttribute::Via(RouteVia::Inet(ip)) => way.gateway = Some((*ip).into()),
                RouteAttribute::Via(RouteVia::Inet6(ip)) => way.gateway = Some((*ip).into()),
                RouteAttribute::MultiPath(hops) => {
                    if let Some(hop) = hops.first() {
                        return Self::over(hop);
                    }
                }
                _ => {}
            }
        }
        way
    }

    fn over(hop: &RouteNextHop) -> Self {
        Self { interface: Some(hop.interface_index), ..Self::read(&hop.attributes) }
    }
}
