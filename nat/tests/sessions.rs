//! Datagrams and echoes in simulated time.

mod world;

use std::net::SocketAddr;
use std::time::Duration;
use tidegate_nat::host::{Ready, SendOutcome, SocketError};
use tidegate_nat::wire::head;
use tidegate_nat::wire::icmp::{IcmpError, Message};
use tidegate_nat::wire::ip::Packet;
use tidegate_nat::wire::protocol;
use tidegate_nat::wire::udp::Datagram;
use tidegate_nat::wire::virtio::{Segmentation, VirtioHeader};
use tidegate_nat::{DropReason, FlowKind};
use world::{Bench, at};

const IN: &str = "10.0.2.100:4000";
const OUT: &str = "192.0.2.2:5000";
const READABLE: Ready = Ready { readable: true, writable: false, error: false, more: false };
const ERROR: Ready = Ready { readable: false, writable: false, error: true, more: true };

fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let head = head::datagrams(source, destination, payload.len(), payload.len().max(1), 1);
    [head.bytes(), payload].concat()
}

fn with_hop_limit(mut frame: Vec<u8>, hop_limit: u8) -> Vec<u8> {
    let before = frame[18];
    frame[18] = hop_limit;
    // RFC 1624: the checksum changes with the one word.
    let sum = u16::from_be_bytes([frame[20], frame[21]]);
    let change =
        u32::from(!sum) + u32::from(!(u16::from(before) << 8)) + (u32::from(hop_limit) << 8);
    let folded = (change & 0xffff) + (change >> 16);
    frame[20..22].copy_from_slice(&(!(((folded & 0xffff) + (folded >> 16)) as u16)).to_be_bytes());
    frame
}

/// Parses an ICMP error to the guest: error, quoted source and destination, and sender.
fn parse_error(frame: &[u8]) -> (IcmpError, SocketAddr, SocketAddr, std::net::IpAddr) {
    let (_, bytes) = VirtioHeader::parse(frame).unwrap();
    let packet = Packet::parse(bytes).unwrap();
    match Message::parse(&packet).unwrap() {
        Message::Error { icmp_error, source, destination, .. } => {
            (icmp_error, source, destination, packet.source)
        }
        other => panic!("{other:?}"),
    }
}

fn datagram(frame: &[u8]) -> (VirtioHeader, SocketAddr, SocketAddr, Vec<u8>) {
    let (header, bytes) = VirtioHeader::parse(frame).unwrap();
    let packet = Packet::parse(bytes).unwrap();
    let datagram = Datagram::parse(&packet, true, false).unwrap();
    (
        header,
        SocketAddr::new(packet.source, datagram.source),
        SocketAddr::new(packet.destination, datagram.destination),
        datagram.payload.to_vec(),
    )
}

#[test]
fn datagrams_are_sent_in_one_batch_with_their_boundaries() {
    let mut bench = Bench::new();
    let now = bench.now;
    for payload in [&[1; 100][..], &[2; 100], &[3; 40], &[4; 100], b""] {
        bench.engine.frame(&udp(at(IN), at(OUT), payload), now);
    }
    bench.settle();
    let sent: Vec<usize> = bench.host().datagrams[0].sent.iter().map(Vec::len).collect();
    assert_eq!(sent, [100, 100, 40, 100, 0]);
    assert_eq!(bench.host().datagrams.len(), 1);
}

#[test]
fn a_gso_batch_of_the_guest_is_segmented_by_the_kernel_only() {
    let mut bench = Bench::new();
    let head = head::datagrams(at(IN), at(OUT), 50_000, 1200, 1);
    bench.frame(&[head.bytes(), &[9; 50_000]].concat());
    let sent = &bench.host().datagrams[0].sent;
    assert_eq!(sent.len(), 42);
    assert!(sent[..41].iter().all(|datagram| datagram.len() == 1200));
}

#[test]
fn replies_are_merged_and_large_ones_fragmented() {
    let mut bench = Bench::new();
    bench.frame(&udp(at(IN), at(OUT), b"hello"));
    bench.host().datagrams[0].waiting.extend([
        vec![1; 1000],
        vec![2; 1000],
        vec![3; 10],
        vec![4; 5000],
    ]);
    bench.datagrams_ready(0, READABLE);
    let (header, source, destination, payload) = datagram(&bench.next_frame().unwrap());
    assert_eq!((header.segmentation, header.segment), (Segmentation::Udp, 1000));
    assert_eq!((source, destination, payload.len()), (at(OUT), at(IN), 2010));
    let mut whole = Vec::new();
    while let Some(frame) = bench.next_frame() {
        assert!(frame.len() - 10 <= 1500);
        let packet = Packet::parse(&frame[10..]).unwrap();
        assert_eq!(packet.fragment.unwrap().offset, whole.len());
        whole.extend_from_slice(packet.payload);
    }
    assert_eq!(whole.len(), 5008);
}

#[test]
fn rfc_4787_req_5_idle_sessions_end() {
    let alive_after = |answered: bool, port: u16, seconds: u64| {
        let mut bench = Bench::new();
        let out = SocketAddr::new(at(OUT).ip(), port);
        bench.frame(&udp(at(IN), out, b"hello"));
        if answered {
            bench.host().datagrams[0].waiting.push_back(b"hi".to_vec());
            bench.datagrams_ready(0, READABLE);
        }
        bench.pass(Duration::from_secs(seconds));
        bench.stats.flows(FlowKind::Udp) == 1
    };
    assert!(alive_after(false, 5000, 29) && !alive_after(false, 5000, 31));
    assert!(alive_after(true, 5000, 179) && !alive_after(true, 5000, 181));
    assert!(alive_after(true, 53, 9) && !alive_after(true, 53, 11));
}

#[test]
fn rfc_5508_icmp_errors_of_the_socket_are_forwarded_to_the_guest() {
    let mut bench = Bench::new();
    bench.frame(&udp(at(IN), at(OUT), b"hello"));
    let router = at("203.0.113.1:0").ip();
    for (icmp_error, offender) in [
        (IcmpError::PortUnreachable, Some(at(OUT).ip())),
        (IcmpError::HopLimit, Some(router)),
        (IcmpError::TooBig(1400), Some(router)),
        (IcmpError::HostUnreachable, None),
    ] {
        let payload = b"hello".to_vec();
        bench.host().datagrams[0].problems.push_back(SocketError {
            icmp_error,
            offender,
            destination: None,
            payload,
        });
        bench.datagrams_ready(0, ERROR);
        let (seen, source, destination, reporter) = parse_error(&bench.next_frame().unwrap());
        assert_eq!((seen, source, destination), (icmp_error, at(IN), at(OUT)));
        assert_eq!(reporter, offender.unwrap_or(at("10.0.2.2:0").ip()));
    }
}

#[test]
fn rfc_1191_a_datagram_over_the_path_mtu_is_answered_with_the_mtu() {
    let mut bench = Bench::new();
    bench.frame(&udp(at(IN), at(OUT), b"first"));
    bench.host().datagrams[0].outcome = Some(SendOutcome::TooBig(1280));
    bench.frame(&udp(at(IN), at(OUT), &[0; 1400]));
    assert_eq!(parse_error(&bench.next_frame().unwrap()).0, IcmpError::TooBig(1280));
    assert_eq!(bench.dropped(DropReason::TooBig), 1);
}

#[test]
fn rfc_1812_5_3_1_the_hop_limit_is_decremented_and_enforced() {
    let mut bench = Bench::new();
    bench.frame(&with_hop_limit(udp(at(IN), at(OUT), b"trace"), 1));
    let (icmp_error, _, _, reporter) = parse_error(&bench.next_frame().unwrap());
    assert_eq!((icmp_error, reporter), (IcmpError::HopLimit, at("10.0.2.2:0").ip()));
    assert_eq!(bench.engine.flows(), 0);
    bench.frame(&with_hop_limit(udp(at(IN), at(OUT), b"trace"), 5));
    assert_eq!(bench.host().datagrams[0].hop_limit, Some(4));
    bench.frame(&udp(at(IN), at(OUT), b"no trace"));
    assert_eq!(bench.host().datagrams[0].hop_limit, None);
}

fn echo(source: &str, destination: &str, identifier: u16, payload: &[u8]) -> Vec<u8> {
    let (source, destination) = (at(source).ip(), at(destination).ip());
    let kind = if source.is_ipv6() { 128 } else { 8 };
    let mut message = vec![kind, 0, 0, 0];
    message.extend_from_slice(&identifier.to_be_bytes());
    message.extend_from_slice(&[0, 1]);
    message.extend_from_slice(payload);
    head::complete_icmp(source, destination, &mut message);
    let protocol = if source.is_ipv6() { protocol::ICMPV6 } else { protocol::ICMP };
    [head::ip_header(source, destination, protocol, message.len()).bytes(), &message].concat()
}

#[test]
fn rfc_5508_req_2_an_echo_reply_has_the_identifier_of_the_request() {
    for (source, destination, reply) in
        [("10.0.2.100:0", "192.0.2.2:0", 0), ("[fd00::100]:0", "[2001:db8::2]:0", 129)]
    {
        let mut bench = Bench::new();
        bench.frame(&echo(source, destination, 0xabcd, b"payload"));
        let mut answer = bench.host().datagrams[0].sent[0].clone();
        answer[4..6].copy_from_slice(&[1, 2]);
        bench.host().datagrams[0].waiting.push_back(answer);
        bench.datagrams_ready(0, READABLE);
        let frame = bench.next_frame().unwrap();
        let packet = Packet::parse(&frame[10..]).unwrap();
        assert_eq!((packet.source, packet.destination), (at(destination).ip(), at(source).ip()));
        assert_eq!((packet.payload[0], &packet.payload[4..6]), (reply, &[0xab, 0xcd][..]));
        assert!(Message::parse(&packet).is_ok(), "valid checksum");
    }
}

#[test]
fn a_gateway_replies_to_echoes_and_refuses_ports() {
    let mut bench = Bench::new();
    bench.frame(&echo("10.0.2.100:0", "10.0.2.2:0", 7, b"payload"));
    let frame = bench.next_frame().unwrap();
    assert_eq!(Packet::parse(&frame[10..]).unwrap().payload[0], 0);
    assert_eq!(bench.engine.flows(), 0);
    bench.frame(&udp(at(IN), at("10.0.2.2:99"), b"anybody?"));
    assert_eq!(parse_error(&bench.next_frame().unwrap()).0, IcmpError::PortUnreachable);
}

#[test]
fn dns_fails_over_to_the_next_resolver() {
    let resolvers = ["127.0.0.53:53", "192.0.2.53:53"].map(at);
    let mut bench = Bench::with(|settings| settings.policy.resolvers = resolvers.to_vec());
    let gateway = at("10.0.2.2:53");
    bench.frame(&udp(at(IN), gateway, b"query"));
    assert_eq!(bench.host().datagrams[0].to, Some(resolvers[0]));
    bench.host().datagrams[0].waiting.push_back(b"answer".to_vec());
    bench.datagrams_ready(0, READABLE);
    let (_, source, _, payload) = datagram(&bench.next_frame().unwrap());
    assert_eq!((source, &payload[..]), (gateway, &b"answer"[..]));
    bench.host().datagrams[0].problems.push_back(SocketError {
        icmp_error: IcmpError::PortUnreachable,
        offender: Some(resolvers[0].ip()),
        destination: None,
        payload: b"query".to_vec(),
    });
    bench.datagrams_ready(0, ERROR);
    let (_, _, _, reporter) = parse_error(&bench.next_frame().unwrap());
    assert_eq!(reporter, gateway.ip(), "the guest does not know the resolver");
    bench.frame(&udp(at("10.0.2.100:4001"), gateway, b"query"));
    assert_eq!(bench.host().datagrams[1].to, Some(resolvers[1]));
    // This resolver does not reply at all.
    bench.pass(Duration::from_secs(11));
    bench.frame(&udp(at("10.0.2.100:4002"), gateway, b"query"));
    assert_eq!(bench.host().datagrams[2].to, Some(resolvers[0]));
}

#[test]
fn port_unreachable_from_the_guest_ends_the_session() {
    let mut bench = Bench::new();
    bench.frame(&udp(at(IN), at(OUT), b"hello"));
    let quoted = udp(at(OUT), at(IN), b"too late");
    let (head, message) =
        head::icmp_error(at(IN).ip(), at(OUT).ip(), IcmpError::PortUnreachable, &[&quoted[10..]]);
    bench.frame(&[head.bytes(), &message].concat());
    assert_eq!(bench.engine.flows(), 0);
    assert!(bench.host().datagrams[0].closed, "the host replies to later datagrams");
}

#[test]
fn rfc_4787_req_1_an_endpoint_independent_session_accepts_only_its_peers() {
    let mut bench = Bench::with(|settings| {
        settings.mapping = tidegate_nat::Mapping::EndpointIndependent;
        settings.policy.refused = tidegate_model::CidrSet::parse(["198.51.100.0/24"]).unwrap();
    });
    let (one, other, unknown) = (at(OUT), at("192.0.2.3:6000"), at("192.0.2.4:7000"));
    let now = bench.now;
    for to in [one, one, other, at("198.51.100.1:1")] {
        bench.engine.frame(&udp(at(IN), to, b"hello"), now);
    }
    bench.settle();
    assert_eq!(bench.host().datagrams.len(), 1);
    assert_eq!(bench.host().datagrams[0].sent_to, [one, other], "one GSO batch per peer");
    assert_eq!(
        parse_error(&bench.next_frame().unwrap()).0,
        IcmpError::Prohibited,
        "the policy applies to each peer"
    );
    let from = |from, byte| (from, vec![byte; 100]);
    let waiting = [
        from(one, 1),
        from(one, 2),
        from(unknown, 3),
        from(other, 4),
        from(at("192.0.2.3:6001"), 5),
    ];
    bench.host().datagrams[0].waiting_from.extend(waiting);
    bench.datagrams_ready(0, READABLE);
    let seen: Vec<_> =
        std::iter::from_fn(|| bench.next_frame()).map(|frame| datagram(&frame)).collect();
    let seen: Vec<_> =
        seen.iter().map(|(_, source, to, bytes)| (*source, *to, bytes.len())).collect();
    let here = at(IN);
    assert_eq!(seen, [(one, here, 200), (other, here, 100), (at("192.0.2.3:6001"), here, 100)]);
    assert_eq!(bench.dropped(DropReason::Unsolicited), 1);
    bench.host().datagrams[0].problems.push_back(SocketError {
        icmp_error: IcmpError::PortUnreachable,
        offender: Some(other.ip()),
        destination: Some(other),
        payload: b"hello".to_vec(),
    });
    bench.datagrams_ready(0, ERROR);
    assert_eq!(
        parse_error(&bench.next_frame().unwrap()),
        (IcmpError::PortUnreachable, here, other, other.ip())
    );
    // The first peer is no longer accepted after 64 others.
    for host in 5..200 {
        bench.frame(&udp(here, SocketAddr::from(([203, 0, 113, host], 1)), b"hello"));
    }
    bench.host().datagrams[0].waiting_from.push_back(from(one, 1));
    bench.datagrams_ready(0, READABLE);
    assert_eq!(bench.next_frame(), None);
    assert_eq!(bench.stats.flows(FlowKind::Udp), 1);
}
