//! IPv6 neighbour and router discovery (RFC 4861). No I/O.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::{Layer2V6, frame};
use crate::wire::checksum::pseudo_header;
use crate::wire::ethernet::{self, kind};
use crate::wire::{protocol, read_u16};
use std::net::Ipv6Addr;
use tidegate_model::MacAddress;

/// Length of the IPv6 header.
const HEAD: usize = 40;
/// Hop limit of neighbour discovery messages, which proves that no router forwarded them (section
/// 7.1.1).
const HOP_LIMIT: u8 = 255;
/// Link-local address of the router, the source of its advertisements (section 4.2).
pub(super) const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// All nodes on the link.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Router lifetime in seconds: the maximum (section 6.2.1).
const ROUTER_LIFETIME: u16 = 9000;
/// Lifetime of prefix and DNS server: infinite.
const FOR_EVER: [u8; 4] = [0xff; 4];

pub(super) fn address_at(bytes: &[u8], at: usize) -> Option<Ipv6Addr> {
    let bytes = bytes.get(at..)?.first_chunk::<16>()?;
    Some(Ipv6Addr::from(*bytes))
}

/// Whether `ip` belongs to an emulated station.
pub(super) fn is_own(options: &Layer2V6, ip: Ipv6Addr) -> bool {
    ip == ROUTER || ip == options.gateway || Some(ip) == options.name_server
}

/// Returns the reply to a neighbour discovery message; `None` for other packets.
pub(super) fn answer(
    options: &Layer2V6,
    mtu: u16,
    from: MacAddress,
    packet: &[u8],
) -> Option<Vec<u8>> {
    // Messages with extension headers are ignored (RFC 6980).
    if packet.len() < HEAD || packet[6] != protocol::ICMPV6 || packet[7] != HOP_LIMIT {
        return None;
    }
    let (source, destination) = (address_at(packet, 8)?, address_at(packet, 24)?);
    let message = packet[HEAD..].get(..usize::from(read_u16(packet, 4)))?;
    let sum = pseudo_header(source.into(), destination.into(), protocol::ICMPV6, message.len());
    if message.len() < 8 || message[1] != 0 || sum.bytes(message).finish() != 0 {
        return None;
    }
    match message[0] {
        NEIGHBOUR_SOLICITATION => {
            let target = address_at(message, 8).filter(|target| is_own(options, *target))?;
            let station = ethernet::station_of_v6(target);
            // Duplicate address detection has no source address (section 7.2.4), so the reply goes
            // to all nodes.
            let (to, solicited) =
                if source.is_unspecified() { (ALL_NODES, 0) } else { (source, 0x40) };
            // Flags: router, override.
            let mut answer =
                vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0x80 | 0x20 | solicited, 0, 0, 0];
            answer.extend(target.octets());
            answer.extend([2, 1]);
            answer.extend(station.0);
            let station_to =
                if source.is_unspecified() { ethernet::group_address(to) } else { from };
            Some(packet_of(target, station, to, station_to, answer))
        }
        ROUTER_SOLICITATION => {
            let (to, station) = if source.is_unspecified() {
                (ALL_NODES, ethernet::group_address(ALL_NODES))
            } else {
                (source, from)
            };
            let from = ethernet::station_of_v6(options.gateway);
            Some(packet_of(ROUTER, from, to, station, advertisement(options, mtu, from)))
        }
        _ => None,
    }
}

/// The unsolicited router advertisement to all nodes.
pub(super) fn unsolicited(options: &Layer2V6, mtu: u16) -> Vec<u8> {
    let from = ethernet::station_of_v6(options.gateway);
    let message = advertisement(options, mtu, from);
    packet_of(ROUTER, from, ALL_NODES, ethernet::group_address(ALL_NODES), message)
}

fn advertisement(options: &Layer2V6, mtu: u16, station: MacAddress) -> Vec<u8> {
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0];
    message.extend(ROUTER_LIFETIME.to_be_bytes());
    // Reachable time and retransmission timer: unspecified.
    message.extend([0; 8]);
    message.extend([1, 1]);
    message.extend(station.0);
    message.extend([5, 1, 0, 0, 0, 0]);
    message.extend(mtu.to_be_bytes());
    // Flags: on-link, autonomous address configuration.
    message.extend([3, 4, 64, 0x80 | 0x40]);
    message.extend(FOR_EVER);
    message.extend(FOR_EVER);
    message.extend([0; 4]);
    message.extend(options.prefix.octets());
    if let Some(name_server) = options.name_server {
        message.extend([25, 3, 0, 0]);
        message.extend(FOR_EVER);
        message.extend(name_server.octets());
    }
    message
}

fn packet_of(
    from: Ipv6Addr,
    station: MacAddress,
    to: Ipv6Addr,
    to_station: MacAddress,
    mut message: Vec<u8>,
) -> Vec<u8> {
    let sum = pseudo_header(from.into(), to.into(), protocol::ICMPV6, message.len())
        .bytes(&message)
        .finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut answer = frame(to_station, station, kind::IPV6);
    answer.extend([0x60, 0, 0, 0]);
    answer.extend((message.len() as u16).to_be_bytes());
    answer.extend([protocol::ICMPV6, HOP_LIMIT]);
    answer.extend(from.octets());
    answer.extend(to.octets());
    answer.extend(message);
    answer
}
