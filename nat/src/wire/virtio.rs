//! The header of each packet of a TUN device with `IFF_VNET_HDR` (include/uapi/linux/virtio_net.h).
//! It describes pending checksum and segmentation work.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

/// Length of the header in bytes (`TUNSETVNETHDRSZ`).
pub const LENGTH: usize = 10;

/// The checksum field contains the sum of the pseudo-header; the rest must be added.
const NEEDS_CSUM: u8 = 1;
/// The checksum has been verified.
const DATA_VALID: u8 = 2;
/// Flag in the type: the first segment has the ECN flag CWR.
const ECN: u8 = 0x80;

/// Segmentation of the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segmentation {
    /// No segmentation.
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP, each segment a datagram (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
    /// UDP, one datagram in fragments (`VIRTIO_NET_HDR_GSO_UDP`); treated like an unsegmented
    /// datagram.
    Fragments,
}

/// The header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioHeader {
    /// Whether the transport checksum is complete and unverified, and must be verified.
    pub verify: bool,
    /// Segmentation of the payload.
    pub segmentation: Segmentation,
    /// Payload bytes of each segment except the last; 0 without segmentation.
    pub segment: u16,
}

impl VirtioHeader {
    /// Parses the header at the start of `frame`. Returns `None` if the frame is too short, or has
    /// a type that was not offered.
    #[must_use]
    pub fn parse(frame: &[u8]) -> Option<(Self, &[u8])> {
        let (header, packet) = frame.split_first_chunk::<LENGTH>()?;
        let segmentation = match header[1] & !ECN {
            0 => Segmentation::None,
            1 => Segmentation::TcpV4,
            3 => Segmentation::Fragments,
            4 => Segmentation::TcpV6,
            5 => Segmentation::Udp,
            _ => return None,
        };
        let segment = u16::from_ne_bytes([header[4], header[5]]);
        let verify = header[0] & (NEEDS_CSUM | DATA_VALID) == 0;
        Some((Self { verify, segmentation, segment }, packet))
    }
}

/// Adjusts a header for a packet to which `shift` bytes are prepended.
pub(crate) fn shifted(header: [u8; LENGTH], shift: u16) -> [u8; LENGTH] {
    let mut header = header;
    // Without pending work the offsets are unused.
    if header[0] & NEEDS_CSUM != 0 || header[1] != 0 {
        for at in [2, 6] {
            let moved = u16::from_ne_bytes([header[at], header[at + 1]]).saturating_add(shift);
            header[at..at + 2].copy_from_slice(&moved.to_ne_bytes());
        }
    }
    header
}

/// Builds a header for a packet with a checksum that the kernel completes. `start` is the offset of
/// the transport header, `offset` that of the checksum within it, and `head` the length of all
/// headers.
#[must_use]
pub fn offloaded(
    segmentation: Segmentation,
    segment: u16,
    head: u16,
    start: u16,
    offset: u16,
) -> [u8; LENGTH] {
    let mut header = [0; LENGTH];
    header[0] = NEEDS_CSUM;
    header[1] = match segmentation {
        Segmentation::None => 0,
        Segmentation::TcpV4 => 1,
        Segmentation::Fragments => 3,
        Segmentation::TcpV6 => 4,
        Segmentation::Udp => 5,
    };
    header[2..4].copy_from_slice(&head.to_ne_bytes());
    header[4..6].copy_from_slice(&segment.to_ne_bytes());
    header[6..8].copy_from_slice(&start.to_ne_bytes());
    header[8..10].copy_from_slice(&offset.to_ne_bytes());
    header
}
