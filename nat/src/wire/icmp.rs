//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echoes, and errors about other packets.

use super::checksum::{Sum, pseudo_header};
use super::{Malformed, ip, protocol, read_u16, read_u32};
use std::net::{IpAddr, SocketAddr};

/// Bytes of the header of echoes and errors.
pub const HEADER: usize = 8;

/// What an error says, in the words of neither version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// No route to the network.
    NetworkUnreachable,
    /// The host does not answer.
    HostUnreachable,
    /// The host does not speak the protocol.
    ProtocolUnreachable,
    /// Nobody listens at the port.
    PortUnreachable,
    /// It does not fit, and may not be cut: what would fit, in bytes.
    TooBig(u32),
    /// Someone forbids it.
    Prohibited,
    /// It has been under way for too many hops.
    HopLimit,
}

impl Problem {
    /// Type, code and the 32 bits after the checksum: RFC 792, RFC 1191 section 4, RFC 1812
    /// section 5.2.7.1.
    #[must_use]
    pub const fn v4(self) -> (u8, u8, u32) {
        match self {
            Self::NetworkUnreachable => (3, 0, 0),
            Self::HostUnreachable => (3, 1, 0),
            Self::ProtocolUnreachable => (3, 2, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::TooBig(mtu) => (3, 4, if mtu > 0xffff { 0xffff } else { mtu }),
            Self::Prohibited => (3, 13, 0),
            Self::HopLimit => (11, 0, 0),
        }
    }

    /// The same of ICMPv6: RFC 4443 section 3. It has no word for a protocol nobody speaks but
    /// "parameter problem".
    #[must_use]
    pub const fn v6(self) -> (u8, u8, u32) {
        match self {
            Self::NetworkUnreachable => (1, 0, 0),
            Self::HostUnreachable => (1, 3, 0),
            Self::ProtocolUnreachable => (4, 1, 6),
            Self::PortUnreachable => (1, 4, 0),
            Self::TooBig(mtu) => (2, 0, mtu),
            Self::Prohibited => (1, 1, 0),
            Self::HopLimit => (3, 0, 0),
        }
    }

    /// What type and code of a received error mean; `None` for one that tells nothing about a path.
    #[must_use]
    pub const fn of(v6: bool, kind: u8, code: u8, info: u32) -> Option<Self> {
        Some(match (v6, kind, code) {
            (false, 3, 0 | 6 | 11) | (true, 1, 0) => Self::NetworkUnreachable,
            (false, 3, 1 | 5 | 7 | 8 | 12) | (true, 1, 2 | 3) => Self::HostUnreachable,
            (false, 3, 2) | (true, 4, 1) => Self::ProtocolUnreachable,
            (false, 3, 3) | (true, 1, 4) => Self::PortUnreachable,
            (false, 3, 4) | (true, 2, _) => Self::TooBig(info),
            (false, 3, 9 | 10 | 13) | (true, 1, 1 | 5 | 6) => Self::Prohibited,
            (false, 11, 0) | (true, 3, 0) => Self::HopLimit,
            _ => return None,
        })
    }
}

/// A message whose checksum is right.
#[derive(Clone, Copy, Debug)]
pub enum Message<'a> {
    /// A request to be answered.
    EchoRequest {
        /// Which program asks.
        identifier: u16,
        /// The whole message, header included.
        bytes: &'a [u8],
    },
    /// What went wrong with a packet of ours.
    Error {
        /// What.
        problem: Problem,
        /// Who had sent it, as far as the quotation tells.
        source: SocketAddr,
        /// To whom.
        destination: SocketAddr,
        /// Its protocol.
        protocol: u8,
    },
    /// Nothing that concerns a NAT.
    Other,
}

impl<'a> Message<'a> {
    /// Checks the payload of `packet`, which is ICMP or ICMPv6 as its family has it.
    ///
    /// # Errors
    /// Why it is no message.
    pub fn parse(packet: &ip::Packet<'a>) -> Result<Self, Malformed> {
        let bytes = packet.payload;
        if bytes.len() < HEADER {
            return Err(Malformed::Truncated);
        }
        let v6 = packet.source.is_ipv6();
        let sum = if v6 {
            pseudo_header(packet.source, packet.destination, protocol::ICMPV6, bytes.len())
        } else {
            Sum::default()
        };
        if sum.bytes(bytes).finish() != 0 {
            return Err(Malformed::Checksum);
        }
        match (v6, bytes[0], bytes[1]) {
            (false, 8, 0) | (true, 128, 0) => {
                Ok(Self::EchoRequest { identifier: read_u16(bytes, 4), bytes })
            }
            (v6, kind, code) => {
                let info = if v6 { read_u32(bytes, 4) } else { u32::from(read_u16(bytes, 6)) };
                let problem = Problem::of(v6, kind, code, info);
                Ok(problem
                    .and_then(|problem| quoted(problem, &bytes[HEADER..]))
                    .unwrap_or(Self::Other))
            }
        }
    }
}

/// Reads the packet that an error quotes, which is cut short as a rule.
fn quoted(problem: Problem, bytes: &[u8]) -> Option<Message<'_>> {
    let v6 = bytes.first()? >> 4 == 6;
    let (source, destination, protocol, at): (IpAddr, IpAddr, u8, usize) = if v6 {
        let address = |at| Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
        (address(8)?, address(24)?, *bytes.get(6)?, 40)
    } else {
        let address = |at| Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
        (address(12)?, address(16)?, *bytes.get(9)?, usize::from(bytes[0] & 0xf) * 4)
    };
    let ports = bytes.get(at..at + 4)?;
    Some(Message::Error {
        problem,
        source: SocketAddr::new(source, read_u16(ports, 0)),
        destination: SocketAddr::new(destination, read_u16(ports, 2)),
        protocol,
    })
}
