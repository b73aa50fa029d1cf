//! Ethernet II headers of 14 bytes, and MAC addresses (IEEE 802.3).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Length of the header in bytes.
pub const LENGTH: usize = 14;

/// Maximum MTU of a device with Ethernet headers: a frame has at most 65535 bytes.
pub const ETHERNET_MAX_MTU: u16 = u16::MAX - LENGTH as u16;

/// Length of an address in bytes.
const ADDRESS: usize = 6;

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

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; ADDRESS]);

impl MacAddress {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; ADDRESS]);

    /// The address of the emulated station of an IPv4 address, as in libslirp.
    #[must_use]
    pub fn of_v4(ip: Ipv4Addr) -> Self {
        let [a, b, c, d] = ip.octets();
        Self([0x52, 0x55, a, b, c, d])
    }

    /// The address of the emulated station of an IPv6 address.
    #[must_use]
    pub fn of_v6(ip: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = ip.octets();
        Self([0x52, 0x56, a, b, c, d])
    }

    /// The address of an IPv6 multicast group (RFC 2464 section 7).
    #[must_use]
    pub fn of_group(group: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = group.octets();
        Self([0x33, 0x33, a, b, c, d])
    }

    /// Reads an address at offset `at`.
    #[must_use]
    pub fn at(bytes: &[u8], at: usize) -> Option<Self> {
        bytes.get(at..)?.first_chunk().copied().map(Self)
    }

    /// Whether it is a unicast address other than all zeros.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; ADDRESS]
    }
}

/// Not a unicast MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address of a single device")]
pub struct MacAddressError;

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut address = [0; ADDRESS];
        let mut parts = text.split(':');
        for byte in &mut address {
            let part =
                parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or(MacAddressError)?;
            // `from_str_radix` takes a sign.
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or(MacAddressError)?;
        }
        let address = Self(address);
        if parts.next().is_none() && address.is_unicast() {
            Ok(address)
        } else {
            Err(MacAddressError)
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
