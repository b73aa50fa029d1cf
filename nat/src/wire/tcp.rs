//! TCP segments (RFC 9293 section 3.1) and the supported options: MSS, window scale and timestamps
//! (RFC 7323).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::checksum::pseudo_header;
use super::{Malformed, ip, protocol, read_u16, read_u32};

/// Control bits.
pub mod flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronize sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push: deliver data immediately.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement field is valid.
    pub const ACK: u8 = 0x10;
}

/// Parsed options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpOptions {
    /// Maximum segment size of the sender; on SYN only.
    pub mss: Option<u16>,
    /// Window scale of the sender; on SYN only.
    pub scale: Option<u8>,
    /// Timestamp value and echo reply.
    pub timestamps: Option<(u32, u32)>,
}

/// A segment with consistent lengths.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Source port, never 0.
    pub source: u16,
    /// Destination port, never 0.
    pub destination: u16,
    /// Sequence number of the first byte, or of the SYN.
    pub sequence: u32,
    /// Next sequence number that the sender expects.
    pub acknowledgement: u32,
    /// Control bits ([`flags`]).
    pub flags: u8,
    /// The unscaled window field.
    pub window: u16,
    /// Options.
    pub options: TcpOptions,
    /// Payload.
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Parses the payload of `packet`, and verifies its checksum if `verify`.
    ///
    /// # Errors
    /// The reason why it is not a valid segment.
    pub fn parse(packet: &ip::Packet<'a>, verify: bool) -> Result<Self, Malformed> {
        let bytes = packet.payload;
        if bytes.len() < 20 {
            return Err(Malformed::Truncated);
        }
        let header_length = usize::from(bytes[12] >> 4) * 4;
        if header_length < 20 {
            return Err(Malformed::Length);
        }
        let header = bytes.get(..header_length).ok_or(Malformed::Truncated)?;
        if verify {
            let sum = pseudo_header(packet.source, packet.destination, protocol::TCP, bytes.len());
            if sum.bytes(bytes).finish() != 0 {
                return Err(Malformed::Checksum);
            }
        }
        let segment = Self {
            source: read_u16(bytes, 0),
            destination: read_u16(bytes, 2),
            sequence: read_u32(bytes, 4),
            acknowledgement: read_u32(bytes, 8),
            flags: bytes[13],
            window: read_u16(bytes, 14),
            options: options(&header[20..]),
            payload: &bytes[header_length..],
        };
        let contradictory =
            segment.has(flags::SYN) && (segment.has(flags::FIN) || segment.has(flags::RST));
        if segment.source == 0 || segment.destination == 0 || contradictory {
            return Err(Malformed::Fields);
        }
        Ok(segment)
    }

    /// Whether all flags of `wanted` are set.
    #[must_use]
    pub fn has(&self, wanted: u8) -> bool {
        self.flags & wanted == wanted
    }

    /// Length in sequence numbers: payload, SYN and FIN.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.payload.len() as u32
            + u32::from(self.has(flags::SYN))
            + u32::from(self.has(flags::FIN))
    }
}

/// Parses options until they end or are malformed; the rest is ignored (RFC 9293 section 3.1,
/// MUST-7).
fn options(mut bytes: &[u8]) -> TcpOptions {
    // Fast path: two NOPs and timestamps, the form in all segments of an established connection.
    if let [1, 1, 8, 10, stamps @ ..] = bytes
        && stamps.len() == 8
    {
        let timestamps = Some((read_u32(stamps, 0), read_u32(stamps, 4)));
        return TcpOptions { timestamps, ..TcpOptions::default() };
    }
    let mut options = TcpOptions::default();
    loop {
        match bytes {
            [1, rest @ ..] => bytes = rest,
            [kind, length, ..] if *kind != 0 => {
                let Some(option) = bytes.get(2..usize::from(*length)) else { return options };
                match (*kind, option.len()) {
                    (2, 2) => options.mss = Some(read_u16(option, 0)),
                    (3, 1) => options.scale = Some(option[0]),
                    (8, 8) => options.timestamps = Some((read_u32(option, 0), read_u32(option, 4))),
                    _ => {}
                }
                bytes = &bytes[usize::from(*length)..];
            }
            _ => return options,
        }
    }
}
