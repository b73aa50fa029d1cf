//! Packet parsing and header construction. Parsed views are validated once and cannot panic
//! afterwards.
//!
//! A view borrows the bytes that it was parsed from. Parsing checks all lengths that its accessors
//! rely on, so a packet of a hostile guest is either rejected with a reason or safe to read. Views
//! implement no policy and do not allocate.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

pub mod checksum;
pub mod ethernet;
pub mod head;
pub mod icmp;
pub mod ip;
pub mod tcp;
pub mod udp;
pub mod virtio;

/// IP protocol numbers (IANA) that the engine supports.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
}

/// Parse error of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The packet is shorter than its header.
    #[error("truncated")]
    Truncated,
    /// A length field contradicts the packet size or another length field.
    #[error("inconsistent lengths")]
    Length,
    /// Neither IPv4 nor IPv6.
    #[error("unknown IP version")]
    Version,
    /// A complete checksum is wrong.
    #[error("wrong checksum")]
    Checksum,
    /// Too many or unsupported IPv6 extension headers.
    #[error("extension headers")]
    Extensions,
    /// An invalid combination of fields: port 0, or SYN with FIN.
    #[error("contradictory fields")]
    Fields,
}

/// Reads 16 bits in big-endian order at `at`. The caller must check the length; out of bounds reads
/// return 0.
pub(crate) fn read_u16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]))
}

/// Like [`read_u16`], for 32 bits.
pub(crate) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |four| u32::from_be_bytes([four[0], four[1], four[2], four[3]]))
}
