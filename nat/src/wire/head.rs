//! Construction of headers (virtio, IP and transport) in a small buffer. The payload is written
//! separately, without a copy.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::checksum::{Sum, pseudo_header};
use super::icmp::IcmpError;
use super::virtio::{self, Segmentation};
use super::{icmp, protocol, udp};
use std::net::{IpAddr, SocketAddr};

/// Maximum length: virtio (10), IPv6 with a fragment header (48), TCP with options (60).
const ROOM: usize = 128;

/// Hop limit of generated packets (RFC 1340 recommends 64). The guest is one hop away.
const HOP_LIMIT: u8 = 64;

/// Maximum length of a packet: its length field has 16 bits.
pub const MAX_PACKET: usize = 65_535;

/// Complete headers of a packet.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; ROOM],
    length: usize,
}

impl Head {
    /// The headers as bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    const fn new() -> Self {
        Self { bytes: [0; ROOM], length: virtio::LENGTH }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// Appends the IP header for `length` bytes of payload.
    fn push_ip(
        &mut self,
        source: IpAddr,
        destination: IpAddr,
        kind: u8,
        length: usize,
        fragmentation: Fragmentation,
    ) {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (identification, flags) = match fragmentation {
                    Fragmentation::Never => (0, 0x4000),
                    Fragmentation::Allowed { identification } => (identification as u16, 0),
                    Fragmentation::Fragment { identification, offset, more } => {
                        (identification as u16, (offset / 8) as u16 | if more { 0x2000 } else { 0 })
                    }
                };
                let mut header = [0; 20];
                header[0] = 0x45;
                header[2..4].copy_from_slice(&((20 + length) as u16).to_be_bytes());
                header[4..6].copy_from_slice(&identification.to_be_bytes());
                header[6..8].copy_from_slice(&flags.to_be_bytes());
                header[8] = HOP_LIMIT;
                header[9] = kind;
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
                let checksum = Sum::default().bytes(&header).finish();
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                self.push(&header);
            }
            (source, destination) => {
                let extension = if let Fragmentation::Fragment { identification, offset, more } =
                    fragmentation
                {
                    let mut extension = [0; 8];
                    extension[0] = kind;
                    extension[2..4]
                        .copy_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
                    extension[4..8].copy_from_slice(&identification.to_be_bytes());
                    Some(extension)
                } else {
                    None
                };
                let mut header = [0; 40];
                header[0] = 0x60;
                let length = length + extension.map_or(0, |extension| extension.len());
                header[4..6].copy_from_slice(&(length as u16).to_be_bytes());
                header[6] = if extension.is_some() { 44 } else { kind };
                header[7] = HOP_LIMIT;
                header[8..24].copy_from_slice(&octets_v6(source));
                header[24..40].copy_from_slice(&octets_v6(destination));
                self.push(&header);
                if let Some(extension) = extension {
                    self.push(&extension);
                }
            }
        }
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Head({:02x?})", self.bytes())
    }
}

fn octets_v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[derive(Clone, Copy, Debug)]
enum Fragmentation {
    /// DF is set.
    Never,
    /// IPv4 routers may fragment the packet.
    Allowed { identification: u32 },
    /// The packet is a fragment.
    Fragment { identification: u32, offset: usize, more: bool },
}

/// Header fields of a TCP segment.
#[derive(Clone, Copy, Debug)]
pub struct TcpHead {
    /// Source.
    pub source: SocketAddr,
    /// Destination, of the same family.
    pub destination: SocketAddr,
    /// Sequence number of the first byte.
    pub sequence: u32,
    /// Next expected sequence number.
    pub acknowledgement: u32,
    /// Control bits ([`super::tcp::flags`]).
    pub flags: u8,
    /// The window field.
    pub window: u16,
    /// Maximum segment size, on SYN.
    pub mss: Option<u16>,
    /// Window scale, on SYN.
    pub scale: Option<u8>,
    /// Timestamp value and echo reply.
    pub timestamps: Option<(u32, u32)>,
    /// Segment size for segmentation of a longer payload.
    pub segment: u16,
}

impl TcpHead {
    /// Builds the headers for `payload` bytes. The kernel completes the checksum and segments.
    #[must_use]
    pub fn write(&self, payload: usize) -> Head {
        let mut options = [1u8; 24];
        let mut length = 0;
        let mut push = |option: &[u8]| {
            options[length..length + option.len()].copy_from_slice(option);
            // NOPs pad options to words.
            length += option.len().next_multiple_of(4);
        };
        if let Some(mss) = self.mss {
            let [high, low] = mss.to_be_bytes();
            push(&[2, 4, high, low]);
        }
        if let Some(scale) = self.scale {
            push(&[1, 3, 3, scale]);
        }
        if let Some((value, echo)) = self.timestamps {
            let mut option = [1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0];
            option[4..8].copy_from_slice(&value.to_be_bytes());
            option[8..12].copy_from_slice(&echo.to_be_bytes());
            push(&option);
        }
        let header_length = 20 + length;
        let (source, destination) = (self.source.ip(), self.destination.ip());
        let mut head = Head::new();
        head.push_ip(
            source,
            destination,
            protocol::TCP,
            header_length + payload,
            Fragmentation::Never,
        );
        let start = head.length - virtio::LENGTH;
        let sum = pseudo_header(source, destination, protocol::TCP, header_length + payload);
        let mut header = [0; 20];
        header[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        header[2..4].copy_from_slice(&self.destination.port().to_be_bytes());
        header[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        header[8..12].copy_from_slice(&self.acknowledgement.to_be_bytes());
        header[12] = (header_length as u8 / 4) << 4;
        header[13] = self.flags;
        header[14..16].copy_from_slice(&self.window.to_be_bytes());
        header[16..18].copy_from_slice(&sum.partial().to_be_bytes());
        head.push(&header);
        head.push(&options[..length]);
        let (segmentation, segment) = match (payload > usize::from(self.segment), source) {
            (false, _) => (Segmentation::None, 0),
            (true, IpAddr::V4(_)) => (Segmentation::TcpV4, self.segment),
            (true, IpAddr::V6(_)) => (Segmentation::TcpV6, self.segment),
        };
        let all = (start + header_length) as u16;
        head.bytes[..virtio::LENGTH].copy_from_slice(&virtio::offloaded(
            segmentation,
            segment,
            all,
            start as u16,
            16,
        ));
        head
    }
}

/// Builds the headers of a datagram of `payload` bytes, or of a GSO batch with segment size
/// `segment`. The kernel completes the checksum.
#[must_use]
pub fn datagrams(
    source: SocketAddr,
    destination: SocketAddr,
    payload: usize,
    segment: usize,
    identification: u16,
) -> Head {
    let length = udp::HEADER + payload;
    let mut head = Head::new();
    let fragmentation = Fragmentation::Allowed { identification: identification.into() };
    head.push_ip(source.ip(), destination.ip(), protocol::UDP, length, fragmentation);
    let start = head.length - virtio::LENGTH;
    let sum = pseudo_header(source.ip(), destination.ip(), protocol::UDP, length);
    head.push(&udp_header(source, destination, length, sum.partial()));
    let (segmentation, segment) = if payload > segment {
        (Segmentation::Udp, segment as u16)
    } else {
        (Segmentation::None, 0)
    };
    let all = (start + udp::HEADER) as u16;
    head.bytes[..virtio::LENGTH].copy_from_slice(&virtio::offloaded(
        segmentation,
        segment,
        all,
        start as u16,
        6,
    ));
    head
}

fn udp_header(
    source: SocketAddr,
    destination: SocketAddr,
    length: usize,
    checksum: u16,
) -> [u8; udp::HEADER] {
    let mut header = [0; udp::HEADER];
    header[0..2].copy_from_slice(&source.port().to_be_bytes());
    header[2..4].copy_from_slice(&destination.port().to_be_bytes());
    header[4..6].copy_from_slice(&(length as u16).to_be_bytes());
    header[6..8].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// Builds a UDP header with a complete checksum, for a datagram that is sent in fragments.
#[must_use]
pub fn checksummed_udp_header(
    source: SocketAddr,
    destination: SocketAddr,
    payload: &[u8],
) -> [u8; udp::HEADER] {
    let length = udp::HEADER + payload.len();
    let header = udp_header(source, destination, length, 0);
    let sum = pseudo_header(source.ip(), destination.ip(), protocol::UDP, length)
        .bytes(&header)
        .bytes(payload);
    // RFC 768: a checksum of zero is transmitted as all ones.
    let checksum = match sum.finish() {
        0 => 0xffff,
        checksum => checksum,
    };
    udp_header(source, destination, length, checksum)
}

/// Builds the IP header of a packet whose transport header and payload are complete.
#[must_use]
pub fn ip_header(source: IpAddr, destination: IpAddr, kind: u8, length: usize) -> Head {
    let mut head = Head::new();
    head.push_ip(source, destination, kind, length, Fragmentation::Allowed { identification: 0 });
    head
}

/// Builds the IP header of a fragment.
#[must_use]
pub fn fragment(
    source: IpAddr,
    destination: IpAddr,
    kind: u8,
    piece: std::ops::Range<usize>,
    more: bool,
    identification: u32,
) -> Head {
    let mut head = Head::new();
    let fragmentation = Fragmentation::Fragment { identification, offset: piece.start, more };
    head.push_ip(source, destination, kind, piece.len(), fragmentation);
    head
}

/// Sets the checksum of `message`, an ICMP or ICMPv6 message from `source` to `destination`.
pub fn complete_icmp(source: IpAddr, destination: IpAddr, message: &mut [u8]) {
    if message.len() < icmp::HEADER {
        return;
    }
    message[2..4].fill(0);
    let sum = if source.is_ipv6() {
        pseudo_header(source, destination, protocol::ICMPV6, message.len())
    } else {
        Sum::default()
    };
    let checksum = sum.bytes(message).finish();
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
}

/// Maximum length of the quoted packet. The error must not exceed 576 bytes for IPv4 (RFC 1812
/// section 4.3.2.3) and 1280 for IPv6 (RFC 4443 section 2.4).
const fn max_quoted(v6: bool) -> usize {
    if v6 { 1280 - 40 - icmp::HEADER } else { 576 - 20 - icmp::HEADER }
}

/// Builds an ICMP error to `destination` about a packet that it sent. `quotation` is that packet as
/// a list of slices. Returns headers and message.
#[must_use]
pub fn icmp_error(
    source: IpAddr,
    destination: IpAddr,
    icmp_error: IcmpError,
    quotation: &[&[u8]],
) -> (Head, Vec<u8>) {
    let v6 = source.is_ipv6();
    let (kind, code, info) = if v6 { icmp_error.v6() } else { icmp_error.v4() };
    let mut message = vec![kind, code, 0, 0];
    message.extend_from_slice(&info.to_be_bytes());
    for piece in quotation {
        let room = max_quoted(v6) + icmp::HEADER - message.len();
        message.extend_from_slice(&piece[..piece.len().min(room)]);
    }
    complete_icmp(source, destination, &mut message);
    let kind = if v6 { protocol::ICMPV6 } else { protocol::ICMP };
    (ip_header(source, destination, kind, message.len()), message)
}

/// Rebuilds the headers of a packet of `source` that is no longer available, for quoting in an ICMP
/// error. `transport` is the start of its transport header.
#[must_use]
pub fn quoted_headers(
    source: IpAddr,
    destination: IpAddr,
    kind: u8,
    transport: &[u8],
    length: usize,
) -> Vec<u8> {
    let head = ip_header(source, destination, kind, length);
    [&head.bytes()[virtio::LENGTH..], transport].concat()
}

/// Builds the first eight bytes of a UDP or TCP header: ports, and length or sequence number.
#[must_use]
pub fn quoted_ports(source: SocketAddr, destination: SocketAddr, rest: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[0..2].copy_from_slice(&source.port().to_be_bytes());
    bytes[2..4].copy_from_slice(&destination.port().to_be_bytes());
    bytes[4..8].copy_from_slice(&rest.to_be_bytes());
    bytes
}
