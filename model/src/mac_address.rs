//! MAC addresses (IEEE 802, section 8).

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// A MAC address. Its text form is `02:42:ac:1e:00:02`; parsing accepts one digit per byte, too.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// The broadcast address.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Creates a locally administered unicast address from `random`: the second-lowest bit of the
    /// first byte is set, the lowest is clear (IEEE 802, 8.4).
    #[must_use]
    pub const fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [b, c, d, e, f] = rest;
        Self([first & 0xfc | 0x02, b, c, d, e, f])
    }

    /// Whether it is a unicast address other than all zeros.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// The link-local address that the kernel derives from a MAC address (RFC 4291, appendix A).
    #[must_use]
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        let mut octets = [0; 16];
        octets[..2].copy_from_slice(&[0xfe, 0x80]);
        octets[8..].copy_from_slice(&id);
        octets.into()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// A failure to parse a MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address (six bytes, as in 02:42:ac:1e:00:02)")]
pub struct ParseMacAddressError(String);

impl FromStr for MacAddress {
    type Err = ParseMacAddressError;

    fn from_str(text: &str) -> Result<Self, ParseMacAddressError> {
        let invalid = || ParseMacAddressError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            // `from_str_radix` accepts a sign.
            let part = parts.next().filter(|part| {
                (1..=2).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(invalid)?;
        }
        if parts.next().is_some() { Err(invalid()) } else { Ok(Self(bytes)) }
    }
}

impl From<MacAddress> for String {
    fn from(address: MacAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseMacAddressError;

    fn try_from(text: String) -> Result<Self, ParseMacAddressError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn local_address_is_unicast_and_round_trips(random: [u8; 6]) {
            let address = MacAddress::local(random);
            prop_assert_eq!(address.0[0] & 0x03, 0x02);
            prop_assert!(address.is_unicast());
            prop_assert_eq!(address.to_string().parse(), Ok(address));
        }
    }

    #[test]
    fn one_digit_per_byte_is_accepted() {
        assert_eq!("2:0:a:1e:0:b".parse(), Ok(MacAddress([2, 0, 10, 0x1e, 0, 11])));
    }

    #[test]
    fn invalid_addresses_are_rejected() {
        for text in [
            "",
            "02:42",
            "02:42:ac:1e:00:02:03",
            "02:42:ac:1e:00:zz",
            "2:42:ac:1e:00:002",
            "+2:42:ac:1e:00:02",
            "02:42:ac:1e::02",
        ] {
            assert_eq!(text.parse::<MacAddress>(), Err(ParseMacAddressError(text.to_owned())));
        }
    }

    #[test]
    fn group_and_zero_addresses_are_not_unicast() {
        assert!(!MacAddress::BROADCAST.is_unicast());
        assert!(!MacAddress([0x33, 0x33, 0, 0, 0, 1]).is_unicast());
        assert!(!MacAddress([0; 6]).is_unicast());
    }
}
