//! Packets as bytes: views that are validated once and cannot panic afterwards, and the writing of
//! headers.
//!
//! A view borrows the bytes it was made of. Making one checks every length that its accessors rely
//! on, so a hostile guest's packet is either refused here, with the reason, or is safe to read
//! everywhere else. No view interprets policy, and none allocates.

pub mod checksum;
pub mod ethernet;
pub mod head;
pub mod icmp;
pub mod ip;
pub mod tcp;
pub mod udp;
pub mod virtio;

/// Protocol numbers of IP (IANA), as far as they are spoken here.
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

/// Why bytes are not the packet that they claim to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes end before the header does.
    #[error("truncated")]
    Truncated,
    /// A length field contradicts the packet's size, or another one.
    #[error("inconsistent lengths")]
    Length,
    /// Neither IPv4 nor IPv6.
    #[error("unknown IP version")]
    Version,
    /// A checksum that is complete is wrong.
    #[error("wrong checksum")]
    Checksum,
    /// IPv6 extension headers that are too many, or that nobody here understands.
    #[error("extension headers")]
    Extensions,
    /// A combination of fields that no sender means: port 0, SYN with FIN.
    #[error("contradictory fields")]
    Fields,
}

/// Reads the big-endian 16 bits at `at`. The caller has checked the length; beyond it the answer
/// is 0.
pub(crate) fn read_u16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]))
}

/// As [`read_u16`], 32 bits.
pub(crate) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |four| u32::from_be_bytes([four[0], four[1], four[2], four[3]]))
}
