//! IPv4 (RFC 791) and IPv6 (RFC 8200) packets, seen alike.

use super::checksum::Sum;
use super::{Malformed, read_u16, read_u32};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Extension headers followed in one packet; more than a sender has reason for (RFC 8504
/// section 5.3).
const MAX_EXTENSIONS: usize = 8;

/// IPv6 next-header values that are skipped (RFC 8200 section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Which part of a packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// What all parts have in common, beside addresses and protocol.
    pub identification: u32,
    /// Where its payload belongs, in bytes.
    pub offset: usize,
    /// Whether others follow it.
    pub more: bool,
}

/// A packet whose lengths agree.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Who sent it.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// What the payload is ([`super::protocol`]).
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// No router may fragment it. Of IPv6 always true, unless the sender has fragmented it already.
    pub dont_fragment: bool,
    /// Set unless it is whole.
    pub fragment: Option<Fragment>,
    /// The header and what extends it, for an ICMP error to quote.
    pub header: &'a [u8],
    /// What the header is of.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Checks the packet at the start of `bytes`; what follows it is ignored.
    ///
    /// # Errors
    /// Why it is none.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        match bytes.first().ok_or(Malformed::Truncated)? >> 4 {
            4 => Self::parse_v4(bytes),
            6 => Self::parse_v6(bytes),
            _ => Err(Malformed::Version),
        }
    }

    fn parse_v4(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() < 20 {
            return Err(Malformed::Truncated);
        }
        let header_length = usize::from(bytes[0] & 0xf) * 4;
        let total = usize::from(read_u16(bytes, 2));
        if header_length < 20 || total < header_length {
            return Err(Malformed::Length);
        }
        let bytes = bytes.get(..total).ok_or(Malformed::Truncated)?;
        let (header, payload) = bytes.split_at(header_length);
        if Sum::default().bytes(header).finish() != 0 {
            return Err(Malformed::Checksum);
        }
        let flags = read_u16(bytes, 6);
        let (offset, more) = (usize::from(flags & 0x1fff) * 8, flags & 0x2000 != 0);
        let fragment = (offset > 0 || more).then(|| Fragment {
            identification: u32::from(read_u16(bytes, 4)),
            offset,
            more,
        });
        Ok(Self {
            source: Ipv4Addr::from(read_u32(bytes, 12)).into(),
            destination: Ipv4Addr::from(read_u32(bytes, 16)).into(),
            protocol: bytes[9],
            hop_limit: bytes[8],
            dont_fragment: flags & 0x4000 != 0,
            fragment,
            header,
            payload,
        })
    }

    fn parse_v6(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.len() < 40 {
            return Err(Malformed::Truncated);
        }
        // A length of 0 would be a jumbogram (RFC 2675), or no payload, which is of no use to
        // anybody either.
        let total = 40 + usize::from(read_u16(bytes, 4));
        let bytes = bytes.get(..total).ok_or(Malformed::Truncated)?;
        let mut protocol = bytes[6];
        let mut at = 40;
        let mut fragment = None;
        for _ in 0..=MAX_EXTENSIONS {
            let length = match protocol {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    (usize::from(*bytes.get(at + 1).ok_or(Malformed::Truncated)?) + 1) * 8
                }
                FRAGMENT => 8,
                _ => {
                    let (header, payload) = bytes.split_at(at);
                    return Ok(Self {
                        source: address_v6(bytes, 8),
                        destination: address_v6(bytes, 24),
                        protocol,
                        hop_limit: bytes[7],
                        dont_fragment: fragment.is_none(),
                        // An atomic fragment is whole (RFC 6946).
                        fragment: fragment.filter(|part: &Fragment| part.more || part.offset > 0),
                        header,
                        payload,
                    });
                }
            };
            let extension = bytes.get(at..at + length).ok_or(Malformed::Truncated)?;
            if protocol == FRAGMENT {
                if fragment.is_some() {
                    return Err(Malformed::Extensions);
                }
                let flags = read_u16(extension, 2);
                fragment = Some(Fragment {
                    identification: read_u32(extension, 4),
                    offset: usize::from(flags & 0xfff8),
                    more: flags & 1 != 0,
                });
            }
            protocol = extension[0];
            at += length;
            // Behind the first fragment's header comes payload, whatever its first byte looks like.
            if fragment.is_some_and(|part| part.offset > 0) {
                let (header, payload) = bytes.split_at(at);
                return Ok(Self {
                    source: address_v6(bytes, 8),
                    destination: address_v6(bytes, 24),
                    protocol,
                    hop_limit: bytes[7],
                    dont_fragment: false,
                    fragment,
                    header,
                    payload,
                });
            }
        }
        Err(Malformed::Extensions)
    }
}

fn address_v6(bytes: &[u8], at: usize) -> IpAddr {
    let mut octets = [0; 16];
    if let Some(source) = bytes.get(at..at + 16) {
        octets.copy_from_slice(source);
    }
    Ipv6Addr::from(octets).into()
}
