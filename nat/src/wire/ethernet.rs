//! Ethernet II: 14 bytes in front of a packet, and the addresses in them (IEEE 802.3).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Bytes of the header.
pub const LENGTH: usize = 14;

/// The largest MTU of a device with such headers: a frame has 65535 bytes at most.
pub const ETHERNET_MAX_MTU: u16 = u16::MAX - LENGTH as u16;

/// Bytes of an address.
const ADDRESS: usize = 6;

/// What a frame carries (IANA, "EtherTypes").
pub mod kind {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// The header of a frame.
#[must_use]
pub fn header(to: MacAddress, from: MacAddress, kind: u16) -> [u8; LENGTH] {
    let mut header = [0; LENGTH];
    header[..6].copy_from_slice(&to.0);
    header[6..12].copy_from_slice(&from.0);
    header[12..].copy_from_slice(&kind.to_be_bytes());
    header
}

/// The address of a device on an Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; ADDRESS]);

impl MacAddress {
    /// That of everybody.
    pub const BROADCAST: Self = Self([0xff; ADDRESS]);

    /// That of the station that is played for an IPv4 address, as libslirp has it.
    #[must_use]
    pub fn of_v4(ip: Ipv4Addr) -> Self {
        let [a, b, c, d] = ip.octets();
        Self([0x52, 0x55, a, b, c, d])
    }

    /// The same for an IPv6 address.
    #[must_use]
    pub fn of_v6(ip: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = ip.octets();
        Self([0x52, 0x56, a, b, c, d])
    }

    /// That of an IPv6 multicast group (RFC 2464 section 7).
    #[must_use]
    pub fn of_group(group: Ipv6Addr) -> Self {
        let [.., a, b, c, d] = group.octets();
        Self([0x33, 0x33, a, b, c, d])
    }

    /// The one that stands at `at`.
    #[must_use]
    pub fn at(bytes: &[u8], at: usize) -> Option<Self> {
        bytes.get(at..)?.first_chunk().copied().map(Self)
    }

    /// Whether it is of one device: neither a group's nor none at all.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; ADDRESS]
    }
}

/// What is no address of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address of one device")]
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
