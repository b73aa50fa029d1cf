//! Ethernet II headers of 14 bytes (IEEE 802.3), and the MAC addresses of emulated stations.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::{Ipv4Addr, Ipv6Addr};
use tidegate_model::MacAddress;

/// Length of the header in bytes.
pub const LENGTH: usize = 14;

/// Maximum MTU of a device with Ethernet headers: a frame has at most 65535 bytes.
pub const ETHERNET_MAX_MTU: u16 = u16::MAX - LENGTH as u16;

/// EtherTypes (IANA).
pub mod kind {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// Builds the header of a frame.
#[must_use]
pub fn header(to: MacAddress, from: MacAddress, kind: u16) -> [u8; LENGTH] {
    let mut header = [0; LENGTH];
    header[..6].copy_from_slice(&to.0);
    header[6..12].copy_from_slice(&from.0);
    header[12..].copy_from_slice(&kind.to_be_bytes());
    header
}

/// The address of the emulated station of an IPv4 address, as in libslirp.
#[must_use]
pub fn station_of_v4(ip: Ipv4Addr) -> MacAddress {
    let [a, b, c, d] = ip.octets();
    MacAddress([0x52, 0x55, a, b, c, d])
}

/// The address of the emulated station of an IPv6 address.
#[must_use]
pub fn station_of_v6(ip: Ipv6Addr) -> MacAddress {
    let [.., a, b, c, d] = ip.octets();
    MacAddress([0x52, 0x56, a, b, c, d])
}

/// The address of an IPv6 multicast group (RFC 2464 section 7).
#[must_use]
pub fn group_address(group: Ipv6Addr) -> MacAddress {
    let [.., a, b, c, d] = group.octets();
    MacAddress([0x33, 0x33, a, b, c, d])
}

/// Reads a MAC address at offset `at`.
#[must_use]
pub fn address_at(bytes: &[u8], at: usize) -> Option<MacAddress> {
    bytes.get(at..)?.first_chunk().copied().map(MacAddress)
}
