//! MAC addresses.

use std::fmt;
use std::str::FromStr;

/// A MAC address.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Creates a locally administered unicast address from `random`: the second-lowest bit of the
    /// first byte is set (IEEE 802, 8.4).
    #[must_use]
    pub const fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [b, c, d, e, f] = rest;
        Self([first & 0xfc | 0x02, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

/// A failure to parse a MAC address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address (six bytes, as in 02:42:ac:1e:00:02)")]
pub struct ParseMacError(String);

impl FromStr for Mac {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| {
                part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit())
            });
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(|| ParseMacError(text.to_owned()))?;
        }
        if parts.next().is_some() {
            return Err(ParseMacError(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, ParseMacError> {
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
            let mac = Mac::local(random);
            prop_assert_eq!(mac.0[0] & 0x03, 0x02);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }
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
        ] {
            assert_eq!(text.parse::<Mac>(), Err(ParseMacError(text.to_owned())));
        }
    }
}
