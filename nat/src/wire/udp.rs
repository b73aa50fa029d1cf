//! UDP datagrams (RFC 768).

use super::checksum::pseudo_header;
use super::{Malformed, ip, protocol, read_u16};

/// Bytes of the header.
pub const HEADER: usize = 8;

/// A datagram, or a GSO batch of them, whose lengths agree.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// The sender's port.
    pub source: u16,
    /// The receiver's port, never 0.
    pub destination: u16,
    /// The bytes.
    pub payload: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Checks the payload of `packet`; its checksum too, if `verify`. With `batch` it is several
    /// datagrams behind one header, whose length field is then of no meaning to us.
    ///
    /// # Errors
    /// Why it is no datagram.
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
        // Port 0 is reserved, and no answer could be sent there.
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
        // RFC 8200 section 8.1: over IPv6 a datagram must have one.
        return if packet.source.is_ipv4() { Ok(()) } else { Err(Malformed::Checksum) };
    }
    let sum =
        pseudo_header(packet.source, packet.destination, protocol::UDP, bytes.len()).bytes(bytes);
    if sum.finish() == 0 { Ok(()) } else { Err(Malformed::Checksum) }
}
