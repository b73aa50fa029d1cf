//! Compares the wire layer with etherparse, and tests it with arbitrary bytes.

use etherparse::{PacketHeaders, TransportHeader};
use proptest::prelude::*;
use std::net::{IpAddr, SocketAddr};
use tidegate_nat::wire::head::{self, TcpHead};
use tidegate_nat::wire::icmp::{IcmpError, Message};
use tidegate_nat::wire::ip::Packet;
use tidegate_nat::wire::tcp::{self, Segment};
use tidegate_nat::wire::udp::Datagram;
use tidegate_nat::wire::virtio::{self, Segmentation, VirtioHeader};
use tidegate_nat::wire::{Malformed, protocol};

fn ends() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    let port = 1u16..;
    prop_oneof![
        (any::<[u8; 4]>(), any::<[u8; 4]>(), port.clone(), port.clone())
            .prop_map(|(a, b, p, q)| (SocketAddr::from((a, p)), SocketAddr::from((b, q)))),
        (any::<[u8; 16]>(), any::<[u8; 16]>(), port.clone(), port)
            .prop_map(|(a, b, p, q)| (SocketAddr::from((a, p)), SocketAddr::from((b, q)))),
    ]
}

fn frame(head: &head::Head, payload: &[u8]) -> Vec<u8> {
    [head.bytes(), payload].concat()
}

/// Completes the checksum as the kernel does with `NEEDS_CSUM`, and returns the packet.
fn completed(frame: &[u8]) -> Vec<u8> {
    let (header, packet) = frame.split_at(virtio::LENGTH);
    let mut packet = packet.to_vec();
    let field = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
    if header[0] & 1 != 0 {
        let (start, offset) = (field(6), field(8));
        let mut sum = 0u32;
        for pair in packet[start..].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // A checksum of zero becomes all ones (`CSUM_MANGLED_0`), because zero means "no checksum"
        // in UDP.
        let checksum = Some(!(sum as u16)).filter(|sum| *sum != 0).unwrap_or(0xffff);
        packet[start + offset..start + offset + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

fn addresses(headers: &PacketHeaders<'_>) -> (IpAddr, IpAddr) {
    match headers.net.as_ref().unwrap() {
        etherparse::NetHeaders::Ipv4(header, _) => {
            (header.source.into(), header.destination.into())
        }
        etherparse::NetHeaders::Ipv6(header, _) => {
            (header.source.into(), header.destination.into())
        }
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn a_built_segment_parses_back(
        (source, destination) in ends(),
        sequence: u32,
        acknowledgement: u32,
        window: u16,
        mss in prop::option::of(any::<u16>()),
        scale in prop::option::of(0u8..15),
        timestamps in prop::option::of(any::<(u32, u32)>()),
        payload in prop::collection::vec(any::<u8>(), 0..3000),
        cut in 500u16..2000,
    ) {
        let flags = tcp::flags::ACK | tcp::flags::PSH;
        let head = TcpHead {
            source, destination, sequence, acknowledgement, flags, window, mss, scale, timestamps, segment: cut,
        };
        let frame = frame(&head.write(payload.len()), &payload);
        let packet = completed(&frame);

        let seen = PacketHeaders::from_ip_slice(&packet).unwrap();
        prop_assert_eq!(addresses(&seen), (source.ip(), destination.ip()));
        let Some(TransportHeader::Tcp(theirs)) = &seen.transport else { panic!("{seen:?}") };
        prop_assert_eq!((theirs.source_port, theirs.destination_port), (source.port(), destination.port()));
        prop_assert_eq!((theirs.sequence_number, theirs.acknowledgment_number), (sequence, acknowledgement));
        prop_assert_eq!((theirs.ack, theirs.psh, theirs.syn, theirs.window_size), (true, true, false, window));
        prop_assert_eq!(seen.payload.slice(), &payload[..]);
        let checksum = match seen.net.as_ref().unwrap() {
            etherparse::NetHeaders::Ipv4(ip, _) => theirs.calc_checksum_ipv4(ip, &payload),
            etherparse::NetHeaders::Ipv6(ip, _) => theirs.calc_checksum_ipv6(ip, &payload),
            _ => unreachable!(),
        };
        // Zero has two representations (RFC 1071, 2), and receivers take either.
        prop_assert_eq!(theirs.checksum % 0xffff, checksum.unwrap() % 0xffff);

        let (virtio, bytes) = VirtioHeader::parse(&frame).unwrap();
        prop_assert!(!virtio.verify);
        prop_assert_eq!(virtio.segmentation != Segmentation::None, payload.len() > usize::from(cut));
        let ours = Packet::parse(bytes).unwrap();
        let ours = Segment::parse(&ours, false).unwrap();
        prop_assert_eq!(ours.options, tcp::TcpOptions { mss, scale, timestamps });
        prop_assert_eq!(ours.payload, &payload[..]);
        let whole = Packet::parse(&packet).unwrap();
        prop_assert!(Segment::parse(&whole, true).is_ok(), "valid checksum");
    }

    #[test]
    fn a_built_datagram_parses_back(
        (source, destination) in ends(),
        payload in prop::collection::vec(any::<u8>(), 0..3000),
    ) {
        let packet = completed(&frame(&head::datagrams(source, destination, payload.len(), 3000, 7), &payload));
        let seen = PacketHeaders::from_ip_slice(&packet).unwrap();
        let Some(TransportHeader::Udp(theirs)) = &seen.transport else { panic!("{seen:?}") };
        prop_assert_eq!((theirs.source_port, theirs.destination_port), (source.port(), destination.port()));
        prop_assert_eq!(seen.payload.slice(), &payload[..]);
        let ours = Packet::parse(&packet).unwrap();
        let datagram = Datagram::parse(&ours, false, true).unwrap();
        prop_assert_eq!((datagram.source, datagram.payload), (source.port(), &payload[..]));
        let whole = head::checksummed_udp_header(source, destination, &payload);
        prop_assert_eq!(&whole[..6], &packet[packet.len() - payload.len() - 8..][..6]);
    }

    #[test]
    fn fragments_reassemble_to_the_datagram(
        (source, destination) in ends(),
        payload in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        let whole = [&head::checksummed_udp_header(source, destination, &payload)[..], &payload].concat();
        let mut again = Vec::new();
        for at in (0..whole.len()).step_by(1200) {
            let piece = at..(at + 1200).min(whole.len());
            let more = piece.end < whole.len();
            let head = head::fragment(source.ip(), destination.ip(), protocol::UDP, piece.clone(), more, 99);
            let frame = frame(&head, &whole[piece]);
            let (_, bytes) = VirtioHeader::parse(&frame).unwrap();
            let packet = Packet::parse(bytes).unwrap();
            prop_assert!(etherparse::IpSlice::from_slice(bytes).is_ok());
            if whole.len() > 1200 {
                let fragment = packet.fragment.unwrap();
                prop_assert_eq!((fragment.offset, fragment.more, fragment.identification & 0xffff), (at, more, 99));
            }
            again.extend_from_slice(packet.payload);
        }
        prop_assert_eq!(&again, &whole);
        let header = head::ip_header(source.ip(), destination.ip(), protocol::UDP, whole.len());
        let frame = frame(&header, &whole);
        let packet = Packet::parse(&frame[virtio::LENGTH..]).unwrap();
        prop_assert!(Datagram::parse(&packet, false, true).is_ok(), "valid checksum");
    }

    #[test]
    fn an_icmp_error_quotes_its_packet(
        (source, destination) in ends(),
        payload in prop::collection::vec(any::<u8>(), 0..3000),
        which in 0usize..6,
    ) {
        let icmp_error = [
            IcmpError::NetworkUnreachable,
            IcmpError::HostUnreachable,
            IcmpError::PortUnreachable,
            IcmpError::TooBig(1400),
            IcmpError::Prohibited,
            IcmpError::HopLimit,
        ][which];
        let quoted = completed(&frame(&head::datagrams(source, destination, payload.len(), 3000, 7), &payload));
        let (head, message) = head::icmp_error(destination.ip(), source.ip(), icmp_error, &[&quoted]);
        let frame = frame(&head, &message);
        let most = if source.is_ipv4() { 576 } else { 1280 };
        prop_assert!(frame.len() - virtio::LENGTH <= most);
        let packet = Packet::parse(&frame[virtio::LENGTH..]).unwrap();
        let parsed = Message::parse(&packet).unwrap();
        let Message::Error { icmp_error: parsed, source: by, destination: to, protocol } = parsed else { panic!("{parsed:?}") };
        prop_assert_eq!((parsed, by, to, protocol), (icmp_error, source, destination, protocol::UDP));
        let seen = PacketHeaders::from_ip_slice(&frame[virtio::LENGTH..]).unwrap();
        match &seen.transport {
            Some(TransportHeader::Icmpv4(icmp)) => {
                let payload = seen.payload.slice();
                prop_assert_eq!(icmp.icmp_type.calc_checksum(payload), icmp.checksum);
            }
            Some(TransportHeader::Icmpv6(icmp)) => {
                let IpAddr::V6(from) = destination.ip() else { panic!() };
                let IpAddr::V6(to) = source.ip() else { panic!() };
                let sum = icmp.icmp_type.calc_checksum(from.octets(), to.octets(), seen.payload.slice());
                prop_assert_eq!(sum.unwrap(), icmp.checksum);
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parsing_arbitrary_bytes_does_not_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), version in 0u8..4) {
        if let Some(first) = bytes.first_mut() {
            *first = match version { 0 => *first, 1 => 0x45, 2 => 0x4f, _ => 0x60 };
        }
        let _ = VirtioHeader::parse(&bytes);
        if let Ok(packet) = Packet::parse(&bytes) {
            for verify in [true, false] {
                let _ = Segment::parse(&packet, verify);
                let _ = Datagram::parse(&packet, false, verify);
                let _ = Datagram::parse(&packet, true, verify);
            }
            let _ = Message::parse(&packet);
        }
    }

    #[test]
    fn a_truncated_or_modified_packet_is_rejected_or_consistent(
        (source, destination) in ends(),
        payload in prop::collection::vec(any::<u8>(), 0..100),
        cut in 0usize..200,
        changes in prop::collection::vec((0usize..120, any::<u8>()), 0..4),
    ) {
        let head = TcpHead {
            source, destination, sequence: 1, acknowledgement: 2, flags: tcp::flags::ACK, window: 3,
            mss: Some(4), scale: Some(5), timestamps: Some((6, 7)), segment: u16::MAX,
        };
        let mut packet = completed(&frame(&head.write(payload.len()), &payload));
        let whole = packet.len();
        packet.truncate(whole.saturating_sub(cut));
        for (at, byte) in changes {
            if let Some(place) = packet.get_mut(at) {
                *place = byte;
            }
        }
        if let Ok(view) = Packet::parse(&packet) {
            prop_assert!(view.header.len() + view.payload.len() <= packet.len());
            if let Ok(segment) = Segment::parse(&view, true) {
                prop_assert!(segment.payload.len() <= view.payload.len());
            }
            let _ = Datagram::parse(&view, false, true);
            let _ = Message::parse(&view);
        }
    }
}

#[test]
fn segments_with_invalid_fields_are_rejected() {
    let ends =
        |port| (SocketAddr::from(([10, 0, 0, 1], port)), SocketAddr::from(([10, 0, 0, 2], 80)));
    let refused = |port, flags| {
        let (source, destination) = ends(port);
        let head = TcpHead {
            source,
            destination,
            sequence: 0,
            acknowledgement: 0,
            flags,
            window: 0,
            mss: None,
            scale: None,
            timestamps: None,
            segment: 1,
        };
        let frame = head.write(0).bytes().to_vec();
        let packet = Packet::parse(&frame[virtio::LENGTH..]).unwrap();
        Segment::parse(&packet, false).err()
    };
    assert_eq!(refused(1, tcp::flags::SYN), None);
    assert_eq!(refused(0, tcp::flags::SYN), Some(Malformed::Fields));
    assert_eq!(refused(1, tcp::flags::SYN | tcp::flags::FIN), Some(Malformed::Fields));
    assert_eq!(refused(1, tcp::flags::SYN | tcp::flags::RST), Some(Malformed::Fields));
}

#[test]
fn ipv6_extension_headers_are_limited() {
    let (source, destination) = (SocketAddr::from(([1; 16], 5)), SocketAddr::from(([2; 16], 6)));
    let frame = frame(&head::datagrams(source, destination, 3, 3, 0), b"abc");
    let plain = &frame[virtio::LENGTH..];
    let with = |extensions: usize| {
        let mut packet = plain[..40].to_vec();
        packet[6] = if extensions > 0 { 60 } else { 17 };
        for left in (0..extensions).rev() {
            packet.extend_from_slice(&[if left > 0 { 60 } else { 17 }, 0, 1, 4, 0, 0, 0, 0]);
        }
        packet.extend_from_slice(&plain[40..]);
        let length = (packet.len() - 40) as u16;
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet
    };
    for extensions in 0..=8 {
        let packet = with(extensions);
        let packet = Packet::parse(&packet).unwrap();
        assert_eq!(Datagram::parse(&packet, false, false).unwrap().payload, b"abc");
    }
    assert_eq!(Packet::parse(&with(9)).unwrap_err(), Malformed::Extensions);
}
