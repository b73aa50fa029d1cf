//! IPv4 (RFC 791) and IPv6 (RFC 8200) packets in a common representation.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::checksum::Sum;
use super::{Malformed, read_u16, read_u32};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Maximum number of extension headers per packet; no sender needs more (RFC 8504 section 5.3).
const MAX_EXTENSIONS: usize = 8;

/// IPv6 next-header values that the parser skips (RFC 8200 section 4).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Position of a fragment within its packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identification, which all fragments of a packet share.
    pub identification: u32,
    /// Offset of the payload in bytes.
    pub offset: usize,
    /// Whether more fragments follow.
    pub more: bool,
}

/// A packet with consistent lengths.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Protocol of the payload ([`super::protocol`]).
    pub protocol: u8,
    /// Time to live, or hop limit.
    pub hop_limit: u8,
    /// DF is set. For IPv6 always true, unless the sender has fragmented the packet.
    pub dont_fragment: bool,
    /// Position of a fragment; `None` for a complete packet.
    pub fragment: Option<Fragment>,
    /// The header with extension headers, for quoting in an ICMP error.
    pub header: &'a [u8],
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// Parses the packet at the start of `bytes`. Trailing bytes are ignored.
    ///
    /// # Errors
    /// The reason why it is not a valid packet.
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
        // A length of 0 means a jumbogram (RFC 2675) or an empty payload; neither is supported.
        let total = 40 + usize::from(read_u16(bytes, 4));
        let bytes = bytes.get(..total).ok_or(Malformed::Truncated)?;
        let packet = |protocol, at, dont_fragment, fragment| {
            let (header, payload) = bytes.split_at(at);
            Self {
                source: address_v6(bytes, 8),
                destination: address_v6(bytes, 24),
                protocol,
                hop_limit: bytes[7],
                dont_fragment,
                fragment,
                header,
                payload,
            }
        };
        let mut protocol = bytes[6];
        let mut at = 40;
        let mut fragment = None;
        for _ in 0..=MAX_EXTENSIONS {
            let length = match protocol {
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    (usize::from(*bytes.get(at + 1).ok_or(Malformed::Truncated)?) + 1) * 8
                }
                FRAGMENT => 8,
                // An atomic fragment is whole (RFC 6946).
                _ => {
                    let part = fragment.filter(|part: &Fragment| part.more || part.offset > 0);
                    return Ok(packet(protocol, at, fragment.is_none(), part));
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
            // After the fragment header of a later fragment, the rest is payload, whatever its
            // first byte is.
            if fragment.is_some_and(|part| part.offset > 0) {
                return Ok(packet(protocol, at, false, fragment));
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
