//! Ethernet II: 14 bytes in front of a packet, and the addresses in them (IEEE 802.3).

use std::fmt;
use std::str::FromStr;

/// Bytes of the header.
pub const LENGTH: usize = 14;

/// The largest MTU of a device with such headers: a frame has 65535 bytes at most.
pub const ETHERNET_MAX_MTU: u16 = u16::MAX - LENGTH as u16;

/// Bytes of an address.
const ADDRESS: usize = 6;

/// The address of a device on an Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; ADDRESS]);

impl MacAddress {
    /// That of everybody.
    pub const BROADCAST: Self = Self([0xff; ADDRESS]);

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
            let part = parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or(MacAddressError)?;
            // `from_str_radix` takes a sign.
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or(MacAddressError)?;
        }
        let address = Self(address);
        if parts.next().is_none() && address.is_unicast() { Ok(address) } else { Err(MacAddressError) }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
