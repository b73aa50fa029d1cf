//! Configuration of a device through rtnetlink(7). The ioctl for the queue length requires a
//! privilege in the initial user namespace (`dev_ioctl`, net/core/dev_ioctl.c); netlink requires
//! one only over the network namespace.

use super::tun_options::TunOptions;
use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;
use std::io;
use std::net::IpAddr;
use tidegate_model::registry;
use tidegate_netlink::{NetlinkSocket, RouteRequest};
use tidegate_netns::Family;

/// Sets MTU and queue length, brings the device up, and adds its addresses and routes, in the
/// current namespace.
pub(super) fn configure(options: &TunOptions) -> io::Result<()> {
    let mut socket = NetlinkSocket::open(NETLINK_ROUTE)?;
    if options.loopback {
        request(&mut socket, RouteNetlinkMessage::SetLink(up("lo")), 0)?;
    }
    request(&mut socket, RouteNetlinkMessage::SetLink(link(options)), 0)?;
    let index = rustix::net::netdevice::name_to_index(&socket, &options.name)?;
    let create = NLM_F_CREATE | NLM_F_EXCL;
    for address in &options.addresses {
        request(
            &mut socket,
            RouteNetlinkMessage::NewAddress(address_message(*address, index)),
            create,
        )?;
    }
    for family in &options.default_routes {
        let gateway = options.gateways.iter().copied().find(|ip| Family::of(*ip) == *family);
        let route = default_route(*family, gateway, index, options.table);
        request(&mut socket, RouteNetlinkMessage::NewRoute(route), create)?;
    }
    Ok(())
}

/// Whether the current namespace has an interface `name`.
pub(super) fn has(name: &str) -> io::Result<bool> {
    match rustix::net::netdevice::name_to_index(NetlinkSocket::open(NETLINK_ROUTE)?, name) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn up(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    message
}

fn link(options: &TunOptions) -> LinkMessage {
    let mut message = up(&options.name);
    let station = options.layer2.as_ref().and_then(|layer2| layer2.mac);
    message.attributes.extend(station.map(|station| LinkAttribute::Address(station.0.to_vec())));
    message.attributes.push(LinkAttribute::Mtu(options.mtu.into()));
    message.attributes.push(LinkAttribute::TxQueueLen(options.queue_length));
    message
}

fn address_message(address: IpNet, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = Family::of(address.addr()).into();
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    // No other station on the link could have the address.
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes =
        vec![AddressAttribute::Local(address.addr()), AddressAttribute::Address(address.addr())];
    message
}

fn default_route(family: Family, gateway: Option<IpAddr>, index: u32, table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family.into(),
        // The attribute holds values above 255 (`RT_TABLE_COMPAT`).
        table: u8::try_from(table).unwrap_or(252),
        protocol: RouteProtocol::Other(registry::ROUTE_PROTOCOL),
        scope: if family == Family::V4 && gateway.is_none() {
            RouteScope::Link
        } else {
            RouteScope::Universe
        },
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Oif(index), RouteAttribute::Table(table)];
    message.attributes.extend(gateway.map(|gateway| {
        RouteAttribute::Gateway(match gateway {
            IpAddr::V4(ip) => RouteAddress::Inet(ip),
            IpAddr::V6(ip) => RouteAddress::Inet6(ip),
        })
    }));
    message
}

fn request(socket: &mut NetlinkSocket, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    socket.execute(&RouteRequest { message, flags })
}
