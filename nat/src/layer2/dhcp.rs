//! DHCP server for the emulated network (RFC 2131, RFC 2132). No I/O.
//!
//! It has 16 addresses and no clock: a lease is granted for a day, but never expires. A seventeenth
//! client gets the oldest lease.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::{Layer2Options, ipv4_at};
use crate::wire::checksum::{Sum, pseudo_header};
use crate::wire::ethernet;
use crate::wire::{protocol, read_u16, read_u32};
use std::net::Ipv4Addr;
use tidegate_model::MacAddress;

/// The first leased address, relative to the network address.
const FIRST: u32 = 15;
/// Number of addresses.
const COUNT: usize = 16;
/// Lease time in seconds.
const LEASE: u32 = 24 * 3600;

/// Ports of the server and of the client.
const SERVER: u16 = 67;
const CLIENT: u16 = 68;

/// Length of a message before its options, including the magic cookie.
const FIXED: usize = 240;
/// Minimum message length; clients may reject shorter ones (BOOTP, RFC 951).
const SHORTEST: usize = 300;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// Options (RFC 2132).
mod option {
    pub(super) const MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const DNS: u8 = 6;
    pub(super) const MTU: u8 = 26;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE: u8 = 51;
    pub(super) const TYPE: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const END: u8 = 255;
}

/// Message types.
mod message {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const RELEASE: u8 = 7;
    pub(super) const INFORM: u8 = 8;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    kind: u8,
    transaction: u32,
    flags: u16,
    client: Ipv4Addr,
    station: MacAddress,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

#[derive(Clone, Debug)]
pub(super) struct Reply {
    request: Request,
    kind: u8,
    yours: Ipv4Addr,
    options: Vec<u8>,
}

/// Parses a DHCP request in an IPv4 packet; `None` for any other packet.
pub(super) fn parse_request(packet: &[u8]) -> Option<Request> {
    let first = *packet.first()?;
    let length = usize::from(first & 15) * 4;
    let whole = first >> 4 == 4 && length >= 20 && read_u16(packet, 6) & 0x3fff == 0;
    if !whole || *packet.get(9)? != protocol::UDP {
        return None;
    }
    let total = usize::from(read_u16(packet, 2));
    let udp = packet.get(length..total.min(packet.len()))?;
    if read_u16(udp, 0) != CLIENT || read_u16(udp, 2) != SERVER {
        return None;
    }
    let message_bytes = udp.get(8..)?;
    // BOOTREQUEST, hardware type Ethernet, address length 6.
    if message_bytes.len() < FIXED
        || message_bytes[..3] != [1, 1, 6]
        || message_bytes[FIXED - 4..FIXED] != COOKIE
    {
        return None;
    }
    let station = ethernet::address_at(message_bytes, 28).filter(|station| station.is_unicast())?;
    let mut request = Request {
        kind: 0,
        transaction: read_u32(message_bytes, 4),
        flags: read_u16(message_bytes, 10),
        client: ipv4_at(message_bytes, 12)?,
        station,
        requested: None,
        server: None,
    };
    let mut options = &message_bytes[FIXED..];
    loop {
        match *options {
            [] | [option::END, ..] => break,
            [0, ref rest @ ..] => options = rest,
            [code, length, ref rest @ ..] => {
                let (value, rest) = rest.split_at_checked(length.into())?;
                match (code, value) {
                    (option::TYPE, [kind]) => request.kind = *kind,
                    (option::REQUESTED, _) => request.requested = ipv4_at(value, 0),
                    (option::SERVER, _) => request.server = ipv4_at(value, 0),
                    _ => {}
                }
                options = rest;
            }
            [_] => return None,
        }
    }
    Some(request)
}

/// Leases by address.
#[derive(Clone, Debug, Default)]
pub(super) struct Leases {
    holders: [Option<MacAddress>; COUNT],
    /// Index of the lease to replace next when all are in use.
    oldest: usize,
}

impl Leases {
    /// Returns the reply to a request; `None` for no reply.
    pub(super) fn reply(
        &mut self,
        of: &Layer2Options,
        mtu: u16,
        request: &Request,
    ) -> Option<Reply> {
        // The request accepts the offer of another server.
        if request.server.is_some_and(|server| server != of.gateway) {
            return None;
        }
        let wanted =
            request.requested.or((!request.client.is_unspecified()).then_some(request.client));
        let (kind, yours) = match request.kind {
            message::DISCOVER => {
                (message::OFFER, address(of, self.place(of, request.station, wanted)))
            }
            message::REQUEST => {
                let place = self.place(of, request.station, wanted);
                let address = address(of, place);
                if wanted.is_none_or(|wanted| wanted == address) {
                    (message::ACK, address)
                } else {
                    (message::NAK, Ipv4Addr::UNSPECIFIED)
                }
            }
            // The client has an address and requests only the other parameters.
            message::INFORM => (message::ACK, Ipv4Addr::UNSPECIFIED),
            message::RELEASE => {
                for holder in &mut self.holders {
                    holder.take_if(|holder| *holder == request.station);
                }
                return None;
            }
            _ => return None,
        };
        let mut options = vec![option::TYPE, 1, kind];
        let mut add = |code, value: &[u8]| {
            options.extend([code, value.len() as u8]);
            options.extend(value);
        };
        add(option::SERVER, &of.gateway.octets());
        if kind != message::NAK {
            if !yours.is_unspecified() {
                add(option::LEASE, &LEASE.to_be_bytes());
            }
            add(option::MASK, &of.network.netmask().octets());
            add(option::ROUTER, &of.gateway.octets());
            add(option::MTU, &mtu.to_be_bytes());
            if let Some(name_server) = of.name_server {
                add(option::DNS, &name_server.octets());
            }
        }
        options.push(option::END);
        Some(Reply { request: *request, kind, yours, options })
    }

    /// The index of the address of `station`: its current one, the requested one if free, any free
    /// one, or the oldest one.
    fn place(
        &mut self,
        of: &Layer2Options,
        station: MacAddress,
        wanted: Option<Ipv4Addr>,
    ) -> usize {
        let has = self.holders.iter().position(|holder| *holder == Some(station));
        if let Some(place) = has {
            return place;
        }
        let is_free = |place: &usize| self.holders[*place].is_none();
        let place = (0..COUNT).find(|place| wanted == Some(address(of, *place)) && is_free(place));
        let place = place.or_else(|| (0..COUNT).find(is_free)).unwrap_or_else(|| {
            let place = self.oldest;
            self.oldest = (self.oldest + 1) % COUNT;
            place
        });
        self.holders[place] = Some(station);
        place
    }
}

fn address(of: &Layer2Options, place: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(of.network.network().to_bits().wrapping_add(FIRST + place as u32))
}

impl Reply {
    /// The destination station (RFC 2131 section 4.1): broadcast for a NAK, or if the client
    /// requested it.
    pub(super) fn station(&self, asks: MacAddress) -> MacAddress {
        if self.is_broadcast() { MacAddress::BROADCAST } else { asks }
    }

    fn is_broadcast(&self) -> bool {
        self.kind == message::NAK || self.request.flags & 0x8000 != 0
    }

    /// Writes the IPv4 packet.
    pub(super) fn write(&self, server: Ipv4Addr, to: &mut Vec<u8>) {
        let Request { transaction, flags, client, station, .. } = self.request;
        let mut message = vec![0; FIXED];
        message[..3].copy_from_slice(&[2, 1, 6]);
        message[4..8].copy_from_slice(&transaction.to_be_bytes());
        message[10..12].copy_from_slice(&flags.to_be_bytes());
        if self.kind != message::NAK {
            message[12..16].copy_from_slice(&client.octets());
        }
        message[16..20].copy_from_slice(&self.yours.octets());
        message[20..24].copy_from_slice(&server.octets());
        message[28..34].copy_from_slice(&station.0);
        message[FIXED - 4..].copy_from_slice(&COOKIE);
        message.extend(&self.options);
        message.resize(message.len().max(SHORTEST), 0);

        let destination = if !client.is_unspecified() && self.kind != message::NAK {
            client
        } else if self.is_broadcast() {
            Ipv4Addr::BROADCAST
        } else {
            self.yours
        };
        let length = (8 + message.len()) as u16;
        let mut udp = Vec::with_capacity(length.into());
        for number in [SERVER, CLIENT, length, 0] {
            udp.extend(number.to_be_bytes());
        }
        udp.extend(message);
        let sum = pseudo_header(server.into(), destination.into(), protocol::UDP, udp.len());
        // 0 means "no checksum" (RFC 768).
        let sum = match sum.bytes(&udp).finish() {
            0 => u16::MAX,
            sum => sum,
        };
        udp[6..8].copy_from_slice(&sum.to_be_bytes());

        let mut head = [0; 20];
        head[0] = 0x45;
        head[2..4].copy_from_slice(&(20 + length).to_be_bytes());
        (head[8], head[9]) = (64, protocol::UDP);
        head[12..16].copy_from_slice(&server.octets());
        head[16..20].copy_from_slice(&destination.octets());
        let sum = Sum::default().bytes(&head).finish();
        head[10..12].copy_from_slice(&sum.to_be_bytes());
        to.extend(head);
        to.extend(udp);
    }
}
