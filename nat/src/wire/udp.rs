//! UDP datagrams (RFC 768).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::checksum::pseudo_header;
use super::{Malformed, ip, protocol, read_u16};

/// Length of the header in bytes.
pub const HEADER: usize = 8;

/// A datagram or a GSO batch, with consistent lengths.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Source port, never 0.
    pub source: u16,
    /// Destination port, never 0.
    pub destination: u16,
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Parses the payload of `packet`, and verifies its checksum if `verify`. With `batch`, several
    /// datagrams share one header, and its length field is ignored.
    ///
    /// # Errors
    /// The reason why it is not a valid datagram.
    pub fn parse(packet: &ip::Packet<'a>, batch: bool, verify: bool) -> Result<Self, Malformed> {
        let bytes = packet.payload;
        if bytes.len() < HEADER {
            return Err(Malformed::Truncated);
        }
        let length = if batch { bytes.len() } else { usize::from(read_u16(bytes, 4)) };
        if length < HEADER {
            return Err(Malformed::Length);
        }
        let bytes = bytes.get(..length).ok_or(Malformed::Truncated)?;
        if verify {
            verify_checksum(packet, bytes)?;
        }
        let datagram = Self {
            source: read_u16(bytes, 0),
            destination: read_u16(bytes, 2),
            payload: &bytes[HEADER..],
        };
        // Port 0 is reserved, and replies to it are impossible.
        if datagram.source == 0 || datagram.destination == 0 {
            Err(Malformed::Fields)
        } else {
            Ok(datagram)
        }
    }
}

fn verify_checksum(packet: &ip::Packet<'_>, bytes: &[u8]) -> Result<(), Malformed> {
    let unsummed = read_u16(bytes, 6) == 0;
    if unsummed {
        // RFC 8200 section 8.1: the checksum is mandatory over IPv6.
        return if packet.source.is_ipv4() { Ok(()) } else { Err(Malformed::Checksum) };
    }
    let sum =
        pseudo_header(packet.source, packet.destination, protocol::UDP, bytes.len()).bytes(bytes);
    if sum.finish() == 0 { Ok(()) } else { Err(Malformed::Checksum) }
}
