//! Domain names in lower-case wire format (RFC 1035 sections 3.1 and 2.3.3). Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Maximum size of a name in wire format in bytes, with the terminating zero (RFC 1035 section
/// 2.3.4).
pub(crate) const MAX_NAME: usize = 255;
/// Maximum length of a label in bytes (RFC 1035 section 2.3.4).
const MAX_LABEL: usize = 63;

/// Why a text is not a valid name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty, or two dots are adjacent.
    #[error("has an empty label")]
    Empty,
    /// A label exceeds 63 bytes (RFC 1035 section 2.3.4).
    #[error("has a label of more than 63 bytes")]
    LabelTooLong,
    /// The name exceeds 255 bytes in wire format (RFC 1035 section 2.3.4).
    #[error("is longer than 253 bytes")]
    TooLong,
    /// White space, a control character, a quotation mark, a backslash, or not ASCII.
    #[error("has a character that is not permitted in a host name")]
    Character,
}

/// A name in wire format: lower-case labels, each preceded by its length, and a zero.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name(Box<[u8]>);

impl Name {
    /// Parses `web` or `web.example.com.`. The final dot is optional.
    pub(crate) fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let mut wire = Vec::with_capacity(text.len() + 2);
        for label in text.split('.') {
            if !label.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\')) {
                return Err(NameError::Character);
            }
            match u8::try_from(label.len()) {
                Ok(0) => return Err(NameError::Empty),
                Ok(length) if usize::from(length) <= MAX_LABEL => wire.push(length),
                _ => return Err(NameError::LabelTooLong),
            }
            wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
        }
        wire.push(0);
        if wire.len() > MAX_NAME { Err(NameError::TooLong) } else { Ok(Self(wire.into())) }
    }

    /// This name as a subdomain of `parent`.
    pub(crate) fn below(&self, parent: &Self) -> Result<Self, NameError> {
        let wire = [&self.0[..self.0.len() - 1], &parent.0].concat();
        if wire.len() > MAX_NAME { Err(NameError::TooLong) } else { Ok(Self(wire.into())) }
    }

    pub(crate) fn wire(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn is_single_label(&self) -> bool {
        labels(&self.0) == 1
    }
}

impl std::borrow::Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// For example `web.example.com`, without the final dot.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        DisplayName(&self.0).fmt(f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A name in wire format, for logs.
pub(crate) struct DisplayName<'a>(pub(crate) &'a [u8]);

impl fmt::Display for DisplayName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if labels(self.0) == 0 {
            return f.write_str(".");
        }
        for (number, label) in each_label(self.0).enumerate() {
            if number > 0 {
                f.write_str(".")?;
            }
            write!(f, "{}", label.escape_ascii())?;
        }
        Ok(())
    }
}

/// The labels of an uncompressed name.
pub(crate) fn each_label(wire: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = wire;
    std::iter::from_fn(move || {
        let (length, rest_of_name) = rest.split_first()?;
        let (label, rest_of_name) =
            rest_of_name.split_at_checked(usize::from(*length)).filter(|_| *length > 0)?;
        rest = rest_of_name;
        Some(label)
    })
}

/// The number of labels. The root has none.
pub(crate) fn labels(wire: &[u8]) -> usize {
    each_label(wire).count()
}

/// The name and all its parent domains up to the root, each with its offset in `wire`.
pub(crate) fn suffixes(wire: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = Some(0);
    std::iter::from_fn(move || {
        let here = at?;
        let suffix = wire.get(here..).filter(|suffix| !suffix.is_empty())?;
        at = Some(here + 1 + usize::from(suffix[0])).filter(|_| suffix[0] > 0);
        Some((here, suffix))
    })
}

/// The labels in front of `parent`, if `wire` is a subdomain of it.
fn labels_before<'a>(wire: &'a [u8], parent: &[u8]) -> Option<&'a [u8]> {
    let front = wire.strip_suffix(parent)?;
    // A label can contain any byte, so a suffix match has to end at a label boundary.
    suffixes(wire).any(|(at, _)| at == front.len()).then_some(front)
}

/// The address or prefix that a name below `in-addr.arpa` or `ip6.arpa` represents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reverse {
    /// One address (RFC 1035 section 3.5, RFC 3596 section 2.5).
    Address(IpAddr),
    /// A prefix: first address and prefix length.
    Prefix(IpAddr, u8),
}

const IN_ADDR_ARPA: &[u8] = b"\x07in-addr\x04arpa\0";
const IP6_ARPA: &[u8] = b"\x03ip6\x04arpa\0";

/// Length of the prefix of IPv4-mapped addresses.
const MAPPED_PREFIX: u8 = 96;

/// Parses a name of the reverse tree. `None` for other names, and for names in that tree that
/// represent no address or prefix.
pub(crate) fn reverse(wire: &[u8]) -> Option<Reverse> {
    if let Some(front) = labels_before(wire, IN_ADDR_ARPA) {
        let mut octets = [0; 4];
        let labels: Vec<_> = each_label(front).collect();
        if labels.len() > octets.len() {
            return None;
        }
        for (octet, label) in octets.iter_mut().zip(labels.iter().rev()) {
            // Only the canonical form: otherwise 010 and 10 would be two names of one address.
            let canonical = *label == b"0" || !label.starts_with(b"0");
            let digits = canonical && label.iter().all(u8::is_ascii_digit);
            *octet = std::str::from_utf8(label).ok().filter(|_| digits)?.parse().ok()?;
        }
        let ip = Ipv4Addr::from(octets).into();
        return Some(if labels.len() == 4 {
            Reverse::Address(ip)
        } else {
            Reverse::Prefix(ip, 8 * labels.len() as u8)
        });
    }
    let front = labels_before(wire, IP6_ARPA)?;
    let labels: Vec<_> = each_label(front).collect();
    if labels.len() > 32 {
        return None;
    }
    let mut bits = 0_u128;
    for (index, label) in labels.iter().rev().enumerate() {
        let [digit] = label else { return None };
        let digit = char::from(*digit).to_digit(16)?;
        bits |= u128::from(digit) << (124 - 4 * index);
    }
    let (ip, length) = (Ipv6Addr::from(bits), 4 * labels.len() as u8);
    // An IPv4-mapped address (RFC 4291 section 2.5.5.2) is as private as the IPv4 address.
    let (ip, length, full) = match ip.to_ipv4_mapped().filter(|_| length >= MAPPED_PREFIX) {
        Some(ip) => (IpAddr::V4(ip), length - MAPPED_PREFIX, 32),
        None => (IpAddr::V6(ip), length, 128),
    };
    Some(if length == full { Reverse::Address(ip) } else { Reverse::Prefix(ip, length) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn parse_reverse(text: &str) -> Option<Reverse> {
        reverse(name(text).wire())
    }

    #[test]
    fn names_are_converted_to_lower_case() {
        assert_eq!(name("Web.Example.COM."), name("web.example.com"));
        assert_eq!(name("web").wire(), b"\x03web\0");
        assert_eq!(name("a_b-c").to_string(), "a_b-c");
    }

    #[test]
    fn invalid_names_are_rejected_with_a_reason() {
        for (text, error) in [
            ("", NameError::Empty),
            ("a..b", NameError::Empty),
            (&"x".repeat(64), NameError::LabelTooLong),
            (&"x".repeat(300), NameError::LabelTooLong),
            (&"xy.".repeat(85), NameError::TooLong),
            ("a b", NameError::Character),
            ("bücher", NameError::Character),
        ] {
            assert_eq!(Name::parse(text), Err(error), "{text:?}");
        }
        assert!(Name::parse(&"x".repeat(63)).is_ok());
        assert_eq!(name(&"x".repeat(63)).below(&name(&"y.".repeat(96))), Err(NameError::TooLong));
    }

    #[test]
    fn suffixes_end_with_the_root() {
        let name = name("a.bc.d");
        let found: Vec<_> =
            suffixes(name.wire()).map(|(at, one)| (at, DisplayName(one).to_string())).collect();
        assert_eq!(
            found,
            [(0, "a.bc.d".into()), (2, "bc.d".into()), (5, "d".into()), (7, ".".into())]
        );
    }

    /// RFC 1035 section 3.5: "Domain names in the IN-ADDR.ARPA domain are defined to have up to
    /// four labels in addition to the IN-ADDR.ARPA suffix."
    #[test]
    fn ipv4_reverse_names_are_parsed() {
        assert_eq!(
            parse_reverse("2.0.9.10.in-addr.arpa"),
            Some(Reverse::Address("10.9.0.2".parse().unwrap()))
        );
        assert_eq!(
            parse_reverse("9.10.in-addr.arpa"),
            Some(Reverse::Prefix("10.9.0.0".parse().unwrap(), 16))
        );
        assert_eq!(
            parse_reverse("in-addr.arpa"),
            Some(Reverse::Prefix("0.0.0.0".parse().unwrap(), 0))
        );
        for odd in [
            "02.0.9.10.in-addr.arpa",
            "256.0.0.1.in-addr.arpa",
            "1.2.3.4.5.in-addr.arpa",
            "x.in-addr.arpa",
            "+1.in-addr.arpa",
        ] {
            assert_eq!(parse_reverse(odd), None, "{odd}");
        }
        assert_eq!(parse_reverse("web"), None);
        assert_eq!(reverse(b"\x0c1234\x07in-addr\x04arpa\0"), None, "one label, not two");
    }

    /// RFC 3596 section 2.5: "An IPv6 address is represented as a name in the IP6.ARPA domain by a
    /// sequence of nibbles separated by dots".
    #[test]
    fn ipv6_reverse_names_are_parsed() {
        let zeros = "0.".repeat(26);
        assert_eq!(
            parse_reverse(&format!("2.{zeros}0.8.8.d.f.ip6.arpa")),
            Some(Reverse::Address("fd88::2".parse().unwrap()))
        );
        assert_eq!(
            parse_reverse("d.f.ip6.arpa"),
            Some(Reverse::Prefix("fd00::".parse().unwrap(), 8))
        );
        assert_eq!(parse_reverse("fd.ip6.arpa"), None);
    }

    #[test]
    fn reverse_names_of_ipv4_mapped_addresses_are_those_of_ipv4_addresses() {
        let mapped = format!("f.f.f.f.{}ip6.arpa", "0.".repeat(20));
        assert_eq!(
            parse_reverse(&format!("2.0.0.0.9.0.a.0.{mapped}")),
            Some(Reverse::Address("10.9.0.2".parse().unwrap()))
        );
        assert_eq!(
            parse_reverse(&format!("9.0.a.0.{mapped}")),
            Some(Reverse::Prefix("10.9.0.0".parse().unwrap(), 16))
        );
    }
}
