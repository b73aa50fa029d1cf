//! Names as they are compared: in lower case, in the form of messages (RFC 1035 sections 3.1
//! and 2.3.3). Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The longest name in a message, the last length byte included (RFC 1035 section 2.3.4).
pub(crate) const LONGEST: usize = 255;
/// The longest label (RFC 1035 section 2.3.4).
const LONGEST_LABEL: usize = 63;

/// Why a text is no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing, or nothing between two dots.
    #[error("has an empty label")]
    Empty,
    /// RFC 1035 section 2.3.4.
    #[error("has a label of more than 63 bytes")]
    LabelTooLong,
    /// RFC 1035 section 2.3.4.
    #[error("is longer than 253 bytes")]
    TooLong,
    /// White space, control characters, or beyond ASCII.
    #[error("has a character that no host name has")]
    Character,
}

/// A name: labels in lower case, each behind its length, and a zero.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Name(Box<[u8]>);

impl Name {
    /// Reads `web` or `web.example.com.`; the last dot says nothing.
    pub(crate) fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_suffix('.').unwrap_or(text);
        let mut wire = Vec::with_capacity(text.len() + 2);
        for label in text.split('.') {
            if !label.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\')) {
                return Err(NameError::Character);
            }
            match u8::try_from(label.len()) {
                Ok(0) => return Err(NameError::Empty),
                Ok(length) if usize::from(length) <= LONGEST_LABEL => wire.push(length),
                _ => return Err(NameError::LabelTooLong),
            }
            wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
        }
        wire.push(0);
        if wire.len() > LONGEST { Err(NameError::TooLong) } else { Ok(Self(wire.into())) }
    }

    /// This name below `parent`.
    pub(crate) fn below(&self, parent: &Self) -> Result<Self, NameError> {
        let wire = [&self.0[..self.0.len() - 1], &parent.0].concat();
        if wire.len() > LONGEST { Err(NameError::TooLong) } else { Ok(Self(wire.into())) }
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

/// `web.example.com`, without a dot at its end.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Shown(&self.0).fmt(f)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A name of a message, for logs.
pub(crate) struct Shown<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Shown<'_> {
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

/// The labels of a name without pointers.
pub(crate) fn each_label(wire: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = wire;
    std::iter::from_fn(move || {
        let (length, behind) = rest.split_first()?;
        let (label, behind) =
            behind.split_at_checked(usize::from(*length)).filter(|_| *length > 0)?;
        rest = behind;
        Some(label)
    })
}

/// How many labels a name has; the root has none.
pub(crate) fn labels(wire: &[u8]) -> usize {
    each_label(wire).count()
}

/// A name and the names it is below, the root last, each with where it begins in `wire`.
pub(crate) fn suffixes(wire: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = Some(0);
    std::iter::from_fn(move || {
        let here = at?;
        let suffix = wire.get(here..).filter(|suffix| !suffix.is_empty())?;
        at = Some(here + 1 + usize::from(suffix[0])).filter(|_| suffix[0] > 0);
        Some((here, suffix))
    })
}

/// The labels of a name above `parent`, if it is below that.
fn above<'a>(wire: &'a [u8], parent: &[u8]) -> Option<&'a [u8]> {
    let front = wire.strip_suffix(parent)?;
    // A label may hold any byte, those of the parent's included.
    suffixes(wire).any(|(at, _)| at == front.len()).then_some(front)
}

/// What a name below `in-addr.arpa` or `ip6.arpa` is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reverse {
    /// One address (RFC 1035 section 3.5, RFC 3596 section 2.5).
    Of(IpAddr),
    /// All addresses that begin like this: a first address, and how many of its bits are given.
    Part(IpAddr, u8),
}

const IN_ADDR_ARPA: &[u8] = b"\x07in-addr\x04arpa\0";
const IP6_ARPA: &[u8] = b"\x03ip6\x04arpa\0";

/// Reads a name of the reverse tree. `None` for all others, and for what is in that tree and stands
/// for no address.
pub(crate) fn reverse(wire: &[u8]) -> Option<Reverse> {
    if let Some(front) = above(wire, IN_ADDR_ARPA) {
        let mut octets = [0; 4];
        let labels: Vec<_> = each_label(front).collect();
        if labels.len() > octets.len() {
            return None;
        }
        for (octet, label) in octets.iter_mut().zip(labels.iter().rev()) {
            // One way to write a number: else 010 and 10 would be two names of one address.
            let canonical = *label == b"0" || !label.starts_with(b"0");
            let digits = canonical && label.iter().all(u8::is_ascii_digit);
            *octet = std::str::from_utf8(label).ok().filter(|_| digits)?.parse().ok()?;
        }
        let ip = Ipv4Addr::from(octets).into();
        return Some(if labels.len() == 4 {
            Reverse::Of(ip)
        } else {
            Reverse::Part(ip, 8 * labels.len() as u8)
        });
    }
    let front = above(wire, IP6_ARPA)?;
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
    let ip = Ipv6Addr::from(bits).into();
    Some(if labels.len() == 32 {
        Reverse::Of(ip)
    } else {
        Reverse::Part(ip, 4 * labels.len() as u8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn about(text: &str) -> Option<Reverse> {
        reverse(name(text).wire())
    }

    #[test]
    fn names_are_in_lower_case_whatever_they_were() {
        assert_eq!(name("Web.Example.COM."), name("web.example.com"));
        assert_eq!(name("web").wire(), b"\x03web\0");
        assert_eq!(name("a_b-c").to_string(), "a_b-c");
    }

    #[test]
    fn what_is_no_name_is_told_why() {
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
            suffixes(name.wire()).map(|(at, one)| (at, Shown(one).to_string())).collect();
        assert_eq!(
            found,
            [(0, "a.bc.d".into()), (2, "bc.d".into()), (5, "d".into()), (7, ".".into())]
        );
    }

    /// RFC 1035 section 3.5: "Domain names in the IN-ADDR.ARPA domain are defined to have up to
    /// four labels in addition to the IN-ADDR.ARPA suffix."
    #[test]
    fn addresses_are_read_backwards() {
        assert_eq!(about("2.0.9.10.in-addr.arpa"), Some(Reverse::Of("10.9.0.2".parse().unwrap())));
        assert_eq!(
            about("9.10.in-addr.arpa"),
            Some(Reverse::Part("10.9.0.0".parse().unwrap(), 16))
        );
        assert_eq!(about("in-addr.arpa"), Some(Reverse::Part("0.0.0.0".parse().unwrap(), 0)));
        for odd in [
            "02.0.9.10.in-addr.arpa",
            "256.0.0.1.in-addr.arpa",
            "1.2.3.4.5.in-addr.arpa",
            "x.in-addr.arpa",
            "+1.in-addr.arpa",
        ] {
            assert_eq!(about(odd), None, "{odd}");
        }
        assert_eq!(about("web"), None);
        assert_eq!(reverse(b"\x0c1234\x07in-addr\x04arpa\0"), None, "one label, not two");
    }

    /// RFC 3596 section 2.5: "An IPv6 address is represented as a name in the IP6.ARPA domain by a
    /// sequence of nibbles separated by dots".
    #[test]
    fn addresses_of_ipv6_are_read_by_nibbles() {
        let zeros = "0.".repeat(26);
        assert_eq!(
            about(&format!("2.{zeros}0.8.8.d.f.ip6.arpa")),
            Some(Reverse::Of("fd88::2".parse().unwrap()))
        );
        assert_eq!(about("d.f.ip6.arpa"), Some(Reverse::Part("fd00::".parse().unwrap(), 8)));
        assert_eq!(about("fd.ip6.arpa"), None);
    }
}
