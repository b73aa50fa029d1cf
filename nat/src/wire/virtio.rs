//! The header in front of each packet of a TUN device with `IFF_VNET_HDR`
//! (include/uapi/linux/virtio_net.h): what is left to do of checksum and segmentation.

/// Bytes of the header (`TUNSETVNETHDRSZ`).
pub const LENGTH: usize = 10;

/// The checksum field holds the sum of the pseudo-header, and the rest is to be added.
const NEEDS_CSUM: u8 = 1;
/// The checksum was found right.
const DATA_VALID: u8 = 2;
/// With the type: the first segment has ECN's CWR.
const ECN: u8 = 0x80;

/// How the payload is to be cut, or was left uncut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segmentation {
    /// Not at all.
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP, each piece a datagram (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
    /// UDP, one datagram in fragments (`VIRTIO_NET_HDR_GSO_UDP`): not cut, as far as it concerns
    /// us.
    Fragments,
}

/// The header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioHeader {
    /// Whether the transport's checksum is complete (and not vouched for): it is to be verified
    /// then.
    pub verify: bool,
    /// How the payload is cut.
    pub segmentation: Segmentation,
    /// Payload of each segment but the last, in bytes; 0 without segmentation.
    pub segment: u16,
}

impl VirtioHeader {
    /// Reads the header off the front of `frame`; `None` if it is too short or of a type that was
    /// not offered.
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

/// The same header in front of a packet that gets `shift` bytes more at its beginning.
pub(crate) fn shifted(header: [u8; LENGTH], shift: u16) -> [u8; LENGTH] {
    let mut header = header;
    // Where nothing is left to do, the fields say nothing.
    if header[0] & NEEDS_CSUM != 0 || header[1] != 0 {
        for at in [2, 6] {
            let moved = u16::from_ne_bytes([header[at], header[at + 1]]).saturating_add(shift);
            header[at..at + 2].copy_from_slice(&moved.to_ne_bytes());
        }
    }
    header
}

/// Writes a header for a packet whose checksum the kernel completes: `start` is where the
/// transport's header begins, `offset` where in it the checksum is, `head` the length of all
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
