//! ICMP (RFC 792) and ICMPv6 (RFC 4443): echo messages and errors.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::checksum::{Sum, pseudo_header};
use super::{Malformed, ip, protocol, read_u16, read_u32};
use std::net::{IpAddr, SocketAddr};

/// Length of the header of echo and error messages in bytes.
pub const HEADER: usize = 8;

/// An ICMP error, independent of the IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    /// No route to the network.
    NetworkUnreachable,
    /// The host is unreachable.
    HostUnreachable,
    /// The host does not support the protocol.
    ProtocolUnreachable,
    /// The port is closed.
    PortUnreachable,
    /// The packet exceeds the path MTU and must not be fragmented; the MTU in bytes.
    TooBig(u32),
    /// Administratively prohibited.
    Prohibited,
    /// The hop limit is exceeded.
    HopLimit,
}

impl IcmpError {
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

    /// Type, code and the 32 bits after the checksum for ICMPv6: RFC 4443 section 3. ICMPv6 reports
    /// an unsupported protocol only as "parameter problem".
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

    /// Converts type and code of a received error; `None` for an error that is unrelated to the
    /// path.
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

/// A message with a valid checksum.
#[derive(Clone, Copy, Debug)]
pub enum Message<'a> {
    /// An echo request.
    EchoRequest {
        /// Identifier of the sending program.
        identifier: u16,
        /// The whole message including the header.
        bytes: &'a [u8],
    },
    /// An error about a packet of the engine.
    Error {
        /// The error.
        icmp_error: IcmpError,
        /// Source of the quoted packet.
        source: SocketAddr,
        /// Destination of the quoted packet.
        destination: SocketAddr,
        /// Protocol of the quoted packet.
        protocol: u8,
    },
    /// Any other message.
    Other,
}

impl<'a> Message<'a> {
    /// Parses the payload of `packet`, which must be ICMP for IPv4 and ICMPv6 for IPv6.
    ///
    /// # Errors
    /// The reason why it is not a valid message.
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
                let icmp_error = IcmpError::of(v6, kind, code, info);
                Ok(icmp_error
                    .and_then(|icmp_error| quoted(icmp_error, &bytes[HEADER..]))
                    .unwrap_or(Self::Other))
            }
        }
    }
}

/// Parses the packet that an error quotes, which is usually truncated.
fn quoted(icmp_error: IcmpError, bytes: &[u8]) -> Option<Message<'_>> {
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
        icmp_error,
        source: SocketAddr::new(source, read_u16(ports, 0)),
        destination: SocketAddr::new(destination, read_u16(ports, 2)),
        protocol,
    })
}
