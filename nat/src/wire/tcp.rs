//! TCP segments (RFC 9293 section 3.1) and the options that matter: MSS, window scale and
//! timestamps (RFC 7323).

use super::checksum::pseudo_header;
use super::{Malformed, ip, protocol, read_u16, read_u32};

/// Control bits.
pub mod flags {
    /// The sender is done.
    pub const FIN: u8 = 0x01;
    /// Sequence numbers begin.
    pub const SYN: u8 = 0x02;
    /// The connection is no more.
    pub const RST: u8 = 0x04;
    /// Hand it over at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement counts.
    pub const ACK: u8 = 0x10;
}

/// What the options say, as far as it is understood.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The largest segment that the sender takes; on SYN only.
    pub mss: Option<u16>,
    /// By how many bits its windows are shifted; on SYN only.
    pub scale: Option<u8>,
    /// Its clock, and the echo of ours.
    pub timestamps: Option<(u32, u32)>,
}

/// A segment whose lengths agree.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// The sender's port, never 0.
    pub source: u16,
    /// The receiver's port, never 0.
    pub destination: u16,
    /// The number of the first byte (of SYN, if it is set).
    pub sequence: u32,
    /// The next number that the sender expects.
    pub acknowledgement: u32,
    /// Control bits ([`flags`]).
    pub flags: u8,
    /// The window as it stands there, not scaled.
    pub window: u16,
    /// What it has in the way of options.
    pub options: Options,
    /// The bytes.
    pub payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Checks the payload of `packet`; its checksum too, if `verify`.
    ///
    /// # Errors
    /// Why it is no segment.
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

    /// Whether all of `wanted` are set.
    #[must_use]
    pub fn has(&self, wanted: u8) -> bool {
        self.flags & wanted == wanted
    }

    /// How many sequence numbers it takes: bytes, SYN and FIN.
    #[must_use]
    pub fn length(&self) -> u32 {
        self.payload.len() as u32
            + u32::from(self.has(flags::SYN))
            + u32::from(self.has(flags::FIN))
    }
}

/// Reads options until they end or make no sense any more; what makes none is ignored (RFC 9293
/// section 3.1, MUST-7).
fn options(mut bytes: &[u8]) -> Options {
    // Two NOPs and the timestamps, the form in which every segment of a connection has them.
    if let [1, 1, 8, 10, stamps @ ..] = bytes
        && stamps.len() == 8
    {
        let timestamps = Some((read_u32(stamps, 0), read_u32(stamps, 4)));
        return Options { timestamps, ..Options::default() };
    }
    let mut options = Options::default();
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
