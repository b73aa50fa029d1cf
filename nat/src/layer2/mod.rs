//! Ethernet emulation around the engine, for guests that require it. No I/O.
//!
//! # Theory of operation
//! A TAP device carries frames: the packets of the engine with a 14-byte header. The guest is the
//! only real station. The engine emulates the others: router and name server. Requests to them at
//! the link layer are answered directly from the frame, and do not reach the engine:
//!
//! | request | reply |
//! |---|---|
//! | ARP (RFC 826) for an address of the engine | its MAC address: 52:55 and the IPv4 address, as in slirp4netns |
//! | neighbour solicitation (RFC 4861 section 4.3) | neighbour advertisement |
//! | router solicitation (section 4.1) | router advertisement with prefix, MTU and DNS server (RFC 8106) |
//! | DHCP (RFC 2131) | a lease for one of the addresses 15 to 30 of the network |
//!
//! All other unicast IP packets are passed to the engine. To address replies, the sender of each
//! frame is recorded. Packets for an unknown address go to the most recent sender, which is
//! initially the device itself.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

mod dhcp;
mod v6;

use crate::wire::ethernet::{self, kind};
use crate::wire::{read_u16, virtio};
use dhcp::Leases;
use ipnet::Ipv4Net;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use tidegate_model::MacAddress;

/// Maximum number of recorded stations. A bridge inside the namespace has several.
const MOST_NEIGHBOURS: usize = 256;

/// Length of the virtio and Ethernet headers.
pub const HEAD: usize = virtio::LENGTH + ethernet::LENGTH;

/// Interval of router advertisements (RFC 4861 section 6.2.1, `MaxRtrAdvInterval`).
pub const ADVERTISEMENTS: Duration = Duration::from_secs(600);

/// ARP over Ethernet for IPv4: hardware type 1, protocol 0x0800, lengths 6 and 4.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Length of an ARP message.
const ARP_LENGTH: usize = 28;

/// The emulated network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer2Options {
    /// The IPv4 subnet.
    pub network: Ipv4Net,
    /// Address of the router.
    pub gateway: Ipv4Addr,
    /// Address of the name server, if any.
    pub name_server: Option<Ipv4Addr>,
    /// IPv6 configuration, if enabled.
    pub v6: Option<Layer2V6>,
    /// MAC address of the device; chosen by the kernel if `None`.
    pub mac: Option<MacAddress>,
}

/// IPv6 configuration of an emulated network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer2V6 {
    /// The /64 prefix for stateless address autoconfiguration (RFC 4862).
    pub prefix: Ipv6Addr,
    /// Address of the router.
    pub gateway: Ipv6Addr,
    /// Address of the name server, if any.
    pub name_server: Option<Ipv6Addr>,
}

/// The emulated stations, and the recorded real ones.
#[derive(Clone, Debug)]
pub struct Layer2 {
    options: Layer2Options,
    mtu: u16,
    neighbours: Vec<(IpAddr, MacAddress)>,
    /// Index of the next entry to replace when the table is full.
    oldest: usize,
    /// Most recent sender.
    last: MacAddress,
    leases: Leases,
}

impl Layer2 {
    /// Creates an emulated network. `guest` is the MAC address of the device, `mtu` its MTU in
    /// bytes.
    #[must_use]
    pub fn new(options: Layer2Options, guest: MacAddress, mtu: u16) -> Self {
        Self {
            options,
            mtu,
            neighbours: Vec::new(),
            oldest: 0,
            last: guest,
            leases: Leases::default(),
        }
    }

    /// Processes a frame of the device, including the virtio header. A packet for the engine is
    /// returned with the virtio header and without the Ethernet header. A reply is passed to
    /// `answer` as a frame.
    pub fn receive<'a>(
        &mut self,
        frame: &'a mut [u8],
        mut answer: impl FnMut(&[u8]),
    ) -> Option<&'a [u8]> {
        let payload = frame.get(HEAD..)?;
        let to = ethernet::address_at(frame, virtio::LENGTH)?;
        let from =
            ethernet::address_at(frame, virtio::LENGTH + 6).filter(|from| from.is_unicast())?;
        let answered = match read_u16(frame, virtio::LENGTH + 12) {
            kind::ARP => self.arp(from, payload),
            kind::IPV4 => {
                let source = ipv4_at(payload, 12)?;
                if let Some(answered) = self.dhcp(from, payload) {
                    Some(answered)
                } else if to.is_unicast() {
                    self.learn(source.into(), from);
                    return strip(frame);
                } else {
                    None
                }
            }
            kind::IPV6 => {
                let source = v6::address_at(payload, 8)?;
                let options = self.options.v6?;
                if let Some(answered) = v6::answer(&options, self.mtu, from, payload) {
                    self.learn(source.into(), from);
                    Some(answered)
                } else if to.is_unicast() {
                    self.learn(source.into(), from);
                    return strip(frame);
                } else {
                    None
                }
            }
            _ => None,
        };
        if let Some(answered) = answered {
            answer(&answered);
        }
        None
    }

    /// The unsolicited router advertisement, to be sent every [`ADVERTISEMENTS`] so that the guest
    /// does not expire the router.
    #[must_use]
    pub fn advertisement(&self) -> Option<Vec<u8>> {
        self.options.v6.map(|options| v6::unsolicited(&options, self.mtu))
    }

    /// The Ethernet header for a packet to the guest that starts with `packet`.
    #[must_use]
    pub fn header(&self, packet: &[u8]) -> [u8; ethernet::LENGTH] {
        let is_v6 = packet.first().is_some_and(|first| first >> 4 == 6);
        // The router is the link-layer source of every packet.
        let (kind, router, destination) = match self.options.v6 {
            Some(v6) if is_v6 => {
                let to = v6::address_at(packet, 24).unwrap_or(Ipv6Addr::UNSPECIFIED);
                (kind::IPV6, ethernet::station_of_v6(v6.gateway), IpAddr::V6(to))
            }
            _ => {
                let to = ipv4_at(packet, 16).unwrap_or(Ipv4Addr::UNSPECIFIED);
                (kind::IPV4, ethernet::station_of_v4(self.options.gateway), IpAddr::V4(to))
            }
        };
        ethernet::header(self.station(destination), router, kind)
    }

    fn station(&self, ip: IpAddr) -> MacAddress {
        let known = self.neighbours.iter().find(|(neighbour, _)| *neighbour == ip);
        known.map_or(self.last, |(_, station)| *station)
    }

    /// Records that `ip` is at `station`.
    fn learn(&mut self, ip: IpAddr, station: MacAddress) {
        self.last = station;
        if ip.is_unspecified() || ip.is_multicast() || self.is_own(ip) {
            return;
        }
        if let Some((_, known)) = self.neighbours.iter_mut().find(|(neighbour, _)| *neighbour == ip)
        {
            *known = station;
        } else if self.neighbours.len() < MOST_NEIGHBOURS {
            self.neighbours.push((ip, station));
        } else {
            self.neighbours[self.oldest] = (ip, station);
            self.oldest = (self.oldest + 1) % MOST_NEIGHBOURS;
        }
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.options.gateway || Some(ip) == self.options.name_server,
            IpAddr::V6(ip) => self.options.v6.is_some_and(|v6| v6::is_own(&v6, ip)),
        }
    }

    fn arp(&mut self, from: MacAddress, message: &[u8]) -> Option<Vec<u8>> {
        let message = message.get(..ARP_LENGTH).filter(|message| message[..6] == ARP_HEAD)?;
        let sender = ipv4_at(message, 14)?;
        let target = ipv4_at(message, 24)?;
        self.learn(sender.into(), from);
        // Operation 1 is a request, 2 a reply.
        if read_u16(message, 6) != 1 || !self.is_own(target.into()) {
            return None;
        }
        let station = ethernet::station_of_v4(target);
        let mut answer = frame(from, station, kind::ARP);
        answer.extend(ARP_HEAD);
        answer.extend([0, 2]);
        answer.extend(station.0);
        answer.extend(target.octets());
        answer.extend(from.0);
        answer.extend(sender.octets());
        Some(answer)
    }

    fn dhcp(&mut self, from: MacAddress, packet: &[u8]) -> Option<Vec<u8>> {
        let request = dhcp::parse_request(packet)?;
        let reply = self.leases.reply(&self.options, self.mtu, &request)?;
        self.last = from;
        let mut answer =
            frame(reply.station(from), ethernet::station_of_v4(self.options.gateway), kind::IPV4);
        reply.write(self.options.gateway, &mut answer);
        Some(answer)
    }
}

/// The start of a frame: an empty virtio header and the Ethernet header.
fn frame(to: MacAddress, from: MacAddress, kind: u16) -> Vec<u8> {
    let mut frame = vec![0; virtio::LENGTH];
    frame.extend(ethernet::header(to, from, kind));
    frame
}

/// Moves the virtio header over the Ethernet header.
fn strip(frame: &mut [u8]) -> Option<&[u8]> {
    frame.copy_within(..virtio::LENGTH, ethernet::LENGTH);
    frame.get(ethernet::LENGTH..)
}

fn ipv4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let bytes = bytes.get(at..)?.first_chunk::<4>()?;
    Some(Ipv4Addr::from(*bytes))
}

#[cfg(test)]
mod tests;
