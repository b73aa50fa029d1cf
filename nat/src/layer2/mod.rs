//! An Ethernet around the engine, for guests that insist on one. Pure.
//!
//! # Theory of operation
//! A TAP device carries frames: the engine's packets with 14 bytes in front. The guest is the only
//! real station; the others, router and name server, are played here. What a guest asks them as
//! stations is answered at once, from the frame alone, and never seen by the engine:
//!
//! | asked | answered |
//! |---|---|
//! | ARP (RFC 826) for an address of ours | its MAC address: 52:55 and the IPv4 address, as slirp4netns has it |
//! | neighbour solicitation (RFC 4861 section 4.3) | neighbour advertisement |
//! | router solicitation (section 4.1) | router advertisement with prefix, MTU and DNS server (RFC 8106) |
//! | DHCP (RFC 2131) | a lease of one of the addresses 15 to 30 of the network |
//!
//! Everything else that is an IP packet for one station goes on. To know where packets go that come
//! back, the sender of each frame is remembered; a guest that has not said anything has the address
//! of its device, or of whoever spoke last.

mod dhcp;
mod v6;

use crate::wire::ethernet::{self, MacAddress, kind};
use crate::wire::{read_u16, virtio};
use dhcp::Leases;
use ipnet::Ipv4Net;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// Stations that are remembered: bridges inside a namespace have some.
const MOST_NEIGHBOURS: usize = 256;

/// Virtio's header and Ethernet's.
pub const HEAD: usize = virtio::LENGTH + ethernet::LENGTH;

/// How often the router tells of itself (RFC 4861 section 6.2.1, `MaxRtrAdvInterval`).
pub const ADVERTISEMENTS: Duration = Duration::from_secs(600);

/// ARP over Ethernet for IPv4: hardware type 1, protocol 0x0800, lengths 6 and 4.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
/// Bytes of such a message.
const ARP_LENGTH: usize = 28;

/// What is played.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer2Options {
    /// The network's addresses.
    pub network: Ipv4Net,
    /// The router.
    pub gateway: Ipv4Addr,
    /// Who answers DNS, if somebody does.
    pub name_server: Option<Ipv4Addr>,
    /// The same by IPv6, if that is spoken.
    pub v6: Option<Layer2V6>,
    /// What the device shall have as its address; the kernel draws one otherwise.
    pub mac: Option<MacAddress>,
}

/// IPv6 of an Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer2V6 {
    /// The /64 that guests make themselves an address of (RFC 4862).
    pub prefix: Ipv6Addr,
    /// The router.
    pub gateway: Ipv6Addr,
    /// Who answers DNS, if somebody does.
    pub name_server: Option<Ipv6Addr>,
}

/// The stations that are played, and what is known of the real ones.
#[derive(Clone, Debug)]
pub struct Layer2 {
    options: Layer2Options,
    mtu: u16,
    neighbours: Vec<(IpAddr, MacAddress)>,
    /// Who is overwritten next, when all places are taken.
    oldest: usize,
    /// Whose word came last.
    last: MacAddress,
    leases: Leases,
}

impl Layer2 {
    /// An Ethernet whose guest's device has the address `guest`, and takes packets of `mtu` bytes.
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

    /// A frame of the device, virtio's header first. What is for the engine is returned, virtio's
    /// header first, without Ethernet's; what is to be answered is handed to `answer` as a frame.
    pub fn receive<'a>(
        &mut self,
        frame: &'a mut [u8],
        mut answer: impl FnMut(&[u8]),
    ) -> Option<&'a [u8]> {
        let payload = frame.get(HEAD..)?;
        let to = MacAddress::at(frame, virtio::LENGTH)?;
        let from = MacAddress::at(frame, virtio::LENGTH + 6).filter(|from| from.is_unicast())?;
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

    /// The frame by which the router tells of itself, unasked: now and then, or it is forgotten
    /// ([`ADVERTISEMENTS`]).
    #[must_use]
    pub fn advertisement(&self) -> Option<Vec<u8>> {
        self.options.v6.map(|options| v6::unsolicited(&options, self.mtu))
    }

    /// Ethernet's header for a packet that goes to the guest: `packet` is its beginning.
    #[must_use]
    pub fn header(&self, packet: &[u8]) -> [u8; ethernet::LENGTH] {
        let is_v6 = packet.first().is_some_and(|first| first >> 4 == 6);
        // Whoever a packet is from, the router has brought it.
        let (kind, router, destination) = match self.options.v6 {
            Some(v6) if is_v6 => {
                let to = v6::address_at(packet, 24).unwrap_or(Ipv6Addr::UNSPECIFIED);
                (kind::IPV6, MacAddress::of_v6(v6.gateway), IpAddr::V6(to))
            }
            _ => {
                let to = ipv4_at(packet, 16).unwrap_or(Ipv4Addr::UNSPECIFIED);
                (kind::IPV4, MacAddress::of_v4(self.options.gateway), IpAddr::V4(to))
            }
        };
        ethernet::header(self.station(destination), router, kind)
    }

    fn station(&self, ip: IpAddr) -> MacAddress {
        let known = self.neighbours.iter().find(|(neighbour, _)| *neighbour == ip);
        known.map_or(self.last, |(_, station)| *station)
    }

    /// `ip` is at `station`, as far as it says.
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
        // 1 asks, 2 answers.
        if read_u16(message, 6) != 1 || !self.is_own(target.into()) {
            return None;
        }
        let station = MacAddress::of_v4(target);
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
        let asked = dhcp::question(packet)?;
        let told = self.leases.answer(&self.options, self.mtu, &asked)?;
        self.last = from;
        let mut answer =
            frame(told.station(from), MacAddress::of_v4(self.options.gateway), kind::IPV4);
        told.write(self.options.gateway, &mut answer);
        Some(answer)
    }
}

/// The beginning of a frame that we send: virtio's header, which says nothing, and Ethernet's.
fn frame(to: MacAddress, from: MacAddress, kind: u16) -> Vec<u8> {
    let mut frame = vec![0; virtio::LENGTH];
    frame.extend(ethernet::header(to, from, kind));
    frame
}

/// Moves virtio's header over Ethernet's.
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
