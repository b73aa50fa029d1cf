//! Published ports in simulated time: RFC requirements for the connecting side, and hostile guests
//! and clients.

mod world;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::Ingress;
use tidegate_nat::host::{Port, Ready, SendOutcome, SocketError};
use tidegate_nat::wire::head::{self, TcpHead};
use tidegate_nat::wire::icmp::{IcmpError, Message};
use tidegate_nat::wire::ip::Packet;
use tidegate_nat::wire::protocol;
use tidegate_nat::wire::tcp::Segment;
use tidegate_nat::wire::tcp::flags::{ACK, FIN, PSH, RST, SYN};
use tidegate_nat::wire::udp::Datagram;
use tidegate_nat::{DropReason, FlowKind, ForwardSource, ForwardStats, Guard, Rate};
use world::{Bench, FakeListener, GATEWAY, Random, Seen, at, frame, segment};

const GUEST: &str = "10.0.2.100:80";
const CLIENT: &str = "198.51.100.7:40000";
const ISN: u32 = u32::MAX - 3;

/// A server in the container, with the TCP state of one connection.
struct Server {
    bench: Bench,
    stats: Arc<ForwardStats>,
    outside: SocketAddr,
    next: u32,
    expected: u32,
}

impl Server {
    /// Creates a server that has received a SYN.
    fn syn_received() -> Self {
        Self::syn_received_from(Bench::new(), ForwardSource::Client, CLIENT)
    }

    fn syn_received_from(mut bench: Bench, source: ForwardSource, client: &str) -> Self {
        let stats = bench.publish_tcp(GUEST, source);
        bench.client(0, client);
        let (syn, outside) = next_syn(&mut bench).expect("a SYN");
        Self { bench, stats, outside, next: ISN, expected: syn.sequence.wrapping_add(1) }
    }

    /// Creates a server with an established connection.
    fn connected() -> Self {
        let mut server = Self::syn_received();
        server.reply(SYN | ACK, |head| head.mss = Some(1460));
        let last = server.bench.next_segment().expect("the ACK of the handshake");
        assert_eq!((last.flags, last.sequence), (ACK, server.expected));
        assert_eq!(last.acknowledgement, ISN.wrapping_add(1));
        server
    }

    fn head(&self, flags: u8) -> TcpHead {
        TcpHead {
            sequence: self.next,
            acknowledgement: if flags & ACK == 0 { 0 } else { self.expected },
            flags,
            ..segment(at(GUEST), self.outside)
        }
    }

    /// Sends the next segment in order.
    fn reply(&mut self, flags: u8, change: impl FnOnce(&mut TcpHead)) {
        let mut head = self.head(flags);
        change(&mut head);
        self.bench.frame(&frame(&head, b""));
        self.next = self.next.wrapping_add(u32::from(flags & (SYN | FIN) != 0));
    }

    fn send(&mut self, payload: &[u8]) {
        let head = self.head(ACK | PSH);
        self.bench.frame(&frame(&head, payload));
        self.next = self.next.wrapping_add(payload.len() as u32);
    }

    /// Sends a modified segment without changing the state.
    fn send_as(&mut self, flags: u8, change: impl FnOnce(&mut TcpHead)) {
        let mut head = self.head(flags);
        change(&mut head);
        self.bench.frame(&frame(&head, b""));
    }

    fn is_reset(&mut self) -> bool {
        let aborted = self.bench.host().streams[0].aborted;
        aborted && self.bench.engine.flows() == 0
    }
}

/// Returns the next segment to the guest, and its source.
fn next_syn(bench: &mut Bench) -> Option<(Seen, SocketAddr)> {
    let bytes = bench.next_frame()?;
    let packet = Packet::parse(&bytes[10..]).unwrap();
    assert_eq!(packet.protocol, protocol::TCP);
    let source = Segment::parse(&packet, false).unwrap().source;
    Some((Seen::of(&bytes).unwrap(), SocketAddr::new(packet.source, source)))
}

#[test]
fn rfc_9293_3_10_7_3_a_syn_ack_establishes_the_connection() {
    let mut server = Server::syn_received();
    assert_eq!(server.outside, at(CLIENT));
    assert_eq!((server.bench.stats.flows(FlowKind::Tcp), server.stats.flows.get()), (1, 1));
    // Data of the client stays in the socket.
    server.bench.remote_sends(0, b"question");
    assert_eq!(server.bench.next_frame(), None);
    server.reply(SYN | ACK, |head| head.mss = Some(1000));
    let first = server.bench.next_segment().unwrap();
    assert_eq!((first.sequence, &first.payload[..]), (server.expected, &b"question"[..]));
    assert_eq!(first.acknowledgement, server.next, "it also completes the handshake");
    server.expected = server.expected.wrapping_add(8);
    server.send(b"answer");
    assert_eq!(server.bench.host().streams[0].sent, b"answer");
    assert_eq!(server.stats.bytes.values().map(tidegate_nat::Count::get), [8, 6]);
}

#[test]
fn rfc_7323_the_syn_offers_options_that_the_guest_may_decline() {
    let mut bench = Bench::new();
    bench.publish_tcp(GUEST, ForwardSource::Client);
    bench.client(0, CLIENT);
    let (syn, _) = next_syn(&mut bench).unwrap();
    assert_eq!((syn.flags, syn.mss, syn.scale, syn.window), (SYN, Some(1460), Some(5), 0xffff));
    assert_eq!(syn.timestamps.unwrap().1, 0);
    let accepts = |bench: &mut Bench, change: &dyn Fn(&mut TcpHead)| {
        let mut head = TcpHead {
            sequence: 7,
            acknowledgement: syn.sequence.wrapping_add(1),
            flags: SYN | ACK,
            window: 4,
            mss: Some(500),
            ..segment(at(GUEST), at(CLIENT))
        };
        change(&mut head);
        bench.frame(&frame(&head, b""));
    };
    accepts(&mut bench, &|_| {});
    let last = bench.next_segment().unwrap();
    assert_eq!((last.timestamps, last.window), (None, 0xffff), "neither option was negotiated");
    bench.remote_sends(0, &[1; 100]);
    assert_eq!(bench.next_segment().unwrap().payload.len(), 4);

    let mut server = Server::syn_received();
    server.reply(SYN | ACK, |head| {
        (head.mss, head.scale, head.timestamps, head.window) =
            (Some(500), Some(7), Some((70, 1)), 2000);
    });
    let last = server.bench.next_segment().unwrap();
    assert_eq!((last.timestamps.unwrap().1, last.window), (70, (1 << 20 >> 5) as u16));
    server.bench.remote_sends(0, &[1; 5000]);
    let data = server.bench.next_segment().unwrap();
    assert_eq!(data.payload.len(), 4 * (500 - 12), "the window of a SYN-ACK is not scaled");
    assert_eq!(usize::from(data.cut), 500 - 12, "timestamps reduce the MSS");
}

#[test]
fn rfc_9293_3_10_7_3_a_wrong_acknowledgement_is_reset_and_the_handshake_continues() {
    let mut server = Server::syn_received();
    // The guest still has an earlier connection with this five-tuple.
    server.send_as(ACK, |head| head.acknowledgement = 4711);
    let reset = server.bench.next_segment().unwrap();
    assert_eq!((reset.flags, reset.sequence), (RST, 4711));
    server.send_as(SYN | ACK, |head| head.acknowledgement = head.acknowledgement.wrapping_add(1));
    assert_eq!(server.bench.next_segment().unwrap().flags, RST);
    server.send_as(RST | ACK, |head| head.acknowledgement = 4711);
    server.send_as(RST, |_| {});
    server.send_as(ACK, |_| {});
    assert_eq!(server.bench.next_frame(), None);
    server.bench.pass(Duration::from_millis(200));
    let again = server.bench.next_segment().unwrap();
    assert_eq!((again.flags, again.sequence.wrapping_add(1)), (SYN, server.expected));
    server.reply(SYN | ACK, |_| {});
    assert_eq!(server.bench.next_segment().unwrap().flags, ACK);
    assert!(!server.is_reset());
}

#[test]
fn rfc_9293_3_10_7_3_a_reset_that_acknowledges_the_syn_refuses_the_client() {
    let mut server = Server::syn_received();
    server.send_as(RST | ACK, |head| head.sequence = 0);
    assert!(server.is_reset());
    assert_eq!(server.bench.next_frame(), None);
    assert_eq!(server.stats.flows.get(), 0);
}

#[test]
fn rfc_9293_3_5_a_simultaneous_open_succeeds() {
    let mut server = Server::syn_received();
    server.send_as(SYN, |head| head.mss = Some(1460));
    let answer = server.bench.next_segment().unwrap();
    assert_eq!((answer.flags, answer.sequence.wrapping_add(1)), (SYN | ACK, server.expected));
    assert_eq!(answer.acknowledgement, ISN.wrapping_add(1));
    server.bench.remote_sends(0, b"hello");
    assert_eq!(server.bench.next_frame(), None, "the guest has not acknowledged the SYN yet");
    server.reply(SYN | ACK, |_| {});
    assert_eq!(server.bench.next_segment().unwrap().payload, b"hello");
    server.expected = server.expected.wrapping_add(5);
    server.send(b"hello");
    assert_eq!(server.bench.host().streams[0].sent, b"hello");
}

#[test]
fn rfc_6298_a_syn_is_retransmitted_and_given_up() {
    let mut server = Server::syn_received();
    server.bench.pass(Duration::from_secs(74));
    let syns: Vec<_> = std::iter::from_fn(|| server.bench.next_segment()).collect();
    assert!(syns.iter().all(|syn| syn.flags == SYN && syn.sequence == syns[0].sequence));
    assert_eq!(syns.len(), 8, "after 0.2, 0.6, 1.4 s and so on");
    assert!(!server.is_reset());
    server.bench.pass(Duration::from_secs(2));
    let reset = server.bench.next_segment().unwrap();
    assert_eq!((reset.flags, reset.sequence), (RST, server.expected), "the guest is notified");
    assert!(server.is_reset());
}

#[test]
fn rfc_1122_4_2_3_9_port_unreachable_counts_only_from_the_guest() {
    for (reporter, is_believed) in [(GUEST, true), ("10.0.2.55:0", false)] {
        let mut server = Server::syn_received();
        let quoted = head::quoted_ports(at(CLIENT), at(GUEST), 0);
        let header =
            head::quoted_headers(at(CLIENT).ip(), at(GUEST).ip(), protocol::TCP, &quoted, 8);
        let own: IpAddr = GATEWAY.parse().unwrap();
        let (head, message) =
            head::icmp_error(at(reporter).ip(), own, IcmpError::PortUnreachable, &[&header]);
        server.bench.frame(&[head.bytes(), &message].concat());
        assert_eq!(server.is_reset(), is_believed);
    }
}

#[test]
fn a_client_reset_before_accept_ends_the_connection_but_a_half_close_does_not() {
    let mut server = Server::syn_received();
    server.bench.remote_closes(0);
    assert!(!server.is_reset(), "the client can still receive");
    server.reply(SYN | ACK, |_| {});
    let fin = std::iter::from_fn(|| server.bench.next_segment()).last().unwrap();
    assert!(fin.has(FIN));

    let mut server = Server::syn_received();
    server.bench.host().streams[0].broken = true;
    server.bench.stream_ready(0, Ready { readable: true, writable: true, error: true, more: true });
    let reset = server.bench.next_segment().unwrap();
    assert_eq!((reset.flags, reset.sequence), (RST, server.expected));
    assert!(server.is_reset());
}

#[test]
fn a_lingering_connection_is_replaced_by_the_next() {
    let mut server = Server::connected();
    // The client closes first, so the engine keeps acknowledging the FIN of the guest for a while.
    server.bench.remote_closes(0);
    assert!(server.bench.next_segment().unwrap().has(FIN));
    server.expected = server.expected.wrapping_add(1);
    server.reply(FIN | ACK, |_| {});
    assert_eq!(server.bench.next_segment().unwrap().flags, ACK);
    assert_eq!(server.bench.engine.flows(), 1, "the connection lingers");
    server.bench.client(0, CLIENT);
    let (syn, outside) = next_syn(&mut server.bench).unwrap();
    assert_eq!((syn.flags, outside), (SYN, at(CLIENT)), "the lingering connection is replaced");
    assert_eq!((server.bench.engine.flows(), server.stats.fallbacks.get()), (1, 0));
}

#[test]
fn local_container_and_link_local_clients_are_shown_as_the_gateway() {
    for client in [
        "127.0.0.1:5",
        "192.0.2.1:5",
        "10.0.2.2:5",
        "10.0.2.7:5",
        "169.254.1.1:5",
        "[2001:db8::7]:5",
    ] {
        let mut bench =
            Bench::with(|settings| settings.policy.sources = vec!["10.0.2.0/24".parse().unwrap()]);
        bench.host().local.push("192.0.2.1".parse().unwrap());
        let server = Server::syn_received_from(bench, ForwardSource::Client, client);
        assert_eq!(server.outside.ip(), GATEWAY.parse::<IpAddr>().unwrap(), "{client}");
        assert!(server.outside.port() >= 1024);
    }
    let server =
        Server::syn_received_from(Bench::new(), ForwardSource::Client, "[::ffff:198.51.100.7]:5");
    assert_eq!(server.outside, at("198.51.100.7:5"), "a mapped address is converted");
    let server = Server::syn_received_from(Bench::new(), ForwardSource::Gateway, CLIENT);
    assert_eq!((server.outside.ip(), server.stats.fallbacks.get()), (GATEWAY.parse().unwrap(), 0));
}

#[test]
fn a_five_tuple_in_use_shows_the_gateway_and_is_counted() {
    let mut bench = Bench::new();
    // The guest itself connects to the client, from the port that it publishes.
    bench.frame(&frame(&TcpHead { flags: SYN, ..segment(at(GUEST), at(CLIENT)) }, b""));
    let server = Server::syn_received_from(bench, ForwardSource::Client, CLIENT);
    assert_eq!(server.outside.ip(), GATEWAY.parse::<IpAddr>().unwrap());
    assert_eq!((server.stats.fallbacks.get(), server.stats.refused()), (1, 0));

    let mut bench = Bench::with(|settings| settings.policy.gateways.clear());
    bench.frame(&frame(&TcpHead { flags: SYN, ..segment(at(GUEST), at(CLIENT)) }, b""));
    let stats = bench.publish_tcp(GUEST, ForwardSource::Client);
    bench.client(0, CLIENT);
    assert_eq!(next_syn(&mut bench), None);
    assert_eq!((stats.refused(), bench.dropped(DropReason::Conflict)), (1, 1));
    assert!(bench.host().streams[1].aborted);
}

#[test]
fn unanswered_clients_of_a_stopped_guest_have_a_separate_limit() {
    let mut bench = Bench::with(|settings| settings.limits.unanswered_per_source = 10);
    let stats = bench.publish_tcp(GUEST, ForwardSource::Client);
    for port in 1..=30 {
        bench.client(0, &format!("198.51.100.7:{port}"));
    }
    assert_eq!((stats.flows.get(), stats.refused(), stats.evicted.get()), (10, 0, 20));
    let cut = bench.host().streams.iter().filter(|stream| stream.aborted).count();
    assert_eq!(cut, 20, "the oldest clients are reset");
    let before = bench.host().streams.len();
    bench.frame(&frame(
        &TcpHead { flags: SYN, ..segment(at("10.0.2.100:5"), at("192.0.2.9:80")) },
        b"",
    ));
    assert_eq!(bench.host().streams.len(), before + 1, "the guest itself can still connect");
    bench.pass(Duration::from_secs(80));
    assert_eq!(stats.flows.get(), 0);
}

#[test]
fn a_client_at_its_connection_limit_is_reset_and_others_are_not() {
    let mut bench = Bench::with(|settings| settings.limits.flows_per_source = 9);
    let stats = bench.publish_tcp(GUEST, ForwardSource::Client);
    for port in 1..=8 {
        bench.client(0, &format!("198.51.100.7:{port}"));
    }
    assert_eq!((stats.flows.get(), stats.evicted.get()), (6, 0), "two thirds");
    assert_eq!((stats.refused(), bench.dropped(DropReason::ClientLimit)), (2, 2));
    let aborted =
        |bench: &mut Bench| bench.host().streams.iter().filter(|stream| stream.aborted).count();
    assert_eq!(aborted(&mut bench), 2);
    for host in 1..=3 {
        bench.client(0, &format!("198.51.100.{}:1", 10 + host));
    }
    assert_eq!((stats.flows.get(), stats.refused(), stats.evicted.get()), (9, 2, 0));
    // Ended connections do not count.
    bench.pass(Duration::from_secs(80));
    assert_eq!(stats.flows.get(), 0);
    bench.client(0, "198.51.100.7:99");
    assert_eq!((stats.flows.get(), stats.refused()), (1, 2));
}

#[test]
fn without_descriptors_clients_wait_in_the_accept_queue() {
    let mut bench = Bench::new();
    let stats = bench.publish_tcp(GUEST, ForwardSource::Client);
    bench.host().descriptors = 1;
    for port in 1..=3 {
        bench.host().listeners[0].clients.push_back(at(&format!("198.51.100.7:{port}")));
    }
    bench.listener_ready(0);
    assert_eq!((stats.flows.get(), bench.host().listeners[0].clients.len()), (1, 2));
    assert_eq!(bench.host().listeners[0].key, None, "the listener is not watched");
    bench.host().descriptors = 100;
    bench.pass(Duration::from_millis(100));
    assert!(bench.host().listeners[0].key.is_some());
    bench.listener_ready(0);
    assert_eq!((stats.flows.get(), stats.refused()), (3, 0));
}

/// Returns source, destination and payload of the next datagram to the guest.
fn datagram(bench: &mut Bench) -> Option<(SocketAddr, SocketAddr, Vec<u8>)> {
    let frame = bench.next_frame()?;
    let packet = Packet::parse(&frame[10..]).unwrap();
    let datagram = Datagram::parse(&packet, true, false).unwrap();
    let from = SocketAddr::new(packet.source, datagram.source);
    Some((
        from,
        SocketAddr::new(packet.destination, datagram.destination),
        datagram.payload.to_vec(),
    ))
}

fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let head = head::datagrams(source, destination, payload.len(), payload.len().max(1), 1);
    [head.bytes(), payload].concat()
}

#[test]
fn datagrams_show_the_client_and_replies_leave_through_the_port() {
    let mut bench = Bench::new();
    let stats = bench.publish_udp(GUEST, ForwardSource::Client);
    bench.datagram_from(0, CLIENT, b"question");
    assert_eq!(datagram(&mut bench), Some((at(CLIENT), at(GUEST), b"question".to_vec())));
    bench.frame(&udp(at(GUEST), at(CLIENT), b"answer"));
    let port = &bench.host().datagrams[0];
    assert_eq!((&port.sent[..], port.sent_to[0]), (&[b"answer".to_vec()][..], at(CLIENT)));
    assert_eq!(
        port.sent_from,
        [Some("192.0.2.1".parse().unwrap())],
        "from the address that the client used"
    );
    assert_eq!((stats.flows.get(), bench.stats.flows(FlowKind::Udp)), (1, 1));
    assert_eq!(stats.bytes.values().map(tidegate_nat::Count::get), [8, 6]);
    assert_eq!(bench.host().datagrams.len(), 1, "the session has no socket of its own");
    // An answered session is kept for three minutes.
    bench.pass(Duration::from_secs(100));
    assert_eq!(stats.flows.get(), 1);
    bench.pass(Duration::from_secs(100));
    assert_eq!(stats.flows.get(), 0);
}

#[test]
fn a_guest_can_use_the_port_only_to_reply() {
    let mut bench = Bench::new();
    bench.publish_udp(GUEST, ForwardSource::Client);
    bench.datagram_from(0, CLIENT, b"question");
    bench.frame(&udp(at(GUEST), at("198.51.100.7:40001"), b"unasked"));
    bench.frame(&udp(at("10.0.2.100:81"), at(CLIENT), b"unasked"));
    bench.frame(&udp(at("10.0.2.55:80"), at(CLIENT), b"unasked"));
    assert_eq!(bench.host().datagrams[0].sent, Vec::<Vec<u8>>::new());
    assert_eq!(
        bench.host().datagrams.len(),
        4,
        "such datagrams leave through sockets of their own"
    );
}

#[test]
fn a_client_of_two_host_addresses_has_two_sessions() {
    let mut bench = Bench::new();
    let stats = bench.publish_udp(GUEST, ForwardSource::Client);
    bench.datagram_from(0, CLIENT, b"one");
    let second: IpAddr = "192.0.2.55".parse().unwrap();
    bench.host().datagrams[0].arrival = Some(second);
    bench.datagram_from(0, CLIENT, b"two");
    assert_eq!(datagram(&mut bench).unwrap().0, at(CLIENT));
    let (shown, _, _) = datagram(&mut bench).unwrap();
    assert_eq!(
        shown.ip(),
        GATEWAY.parse::<IpAddr>().unwrap(),
        "the second session needs another five-tuple"
    );
    assert_eq!((stats.flows.get(), stats.fallbacks.get()), (2, 1));
    bench.frame(&udp(at(GUEST), shown, b"answer"));
    let port = &bench.host().datagrams[0];
    assert_eq!((port.sent_to[0], port.sent_from[0]), (at(CLIENT), Some(second)));
}

#[test]
fn a_flood_of_spoofed_clients_evicts_itself() {
    let mut bench = Bench::with(|settings| {
        settings.limits.flows_per_source = 50;
        settings.limits.new_flows_per_source = Rate { per_second: 100_000, burst: 100_000 };
    });
    let stats = bench.publish_udp(GUEST, ForwardSource::Client);
    bench.datagram_from(0, CLIENT, b"question");
    bench.frame(&udp(at(GUEST), at(CLIENT), b"answer"));
    for number in 0..5000u16 {
        bench.datagram_from(0, &format!("203.0.113.{}:{}", number % 250, number + 1), b"flood");
    }
    assert_eq!((stats.flows.get(), stats.refused()), (50, 0));
    bench.host().frames.clear();
    bench.frame(&udp(at(GUEST), at(CLIENT), b"more"));
    assert_eq!(bench.host().datagrams[0].sent.len(), 2, "the answered session remains");
    bench.frame(&udp(at("10.0.2.100:5"), at("192.0.2.9:53"), b"q"));
    assert_eq!(bench.host().datagrams.len(), 2, "the guest itself can still send");
}

#[test]
fn refused_datagrams_are_counted_and_the_session_remains() {
    let mut bench = Bench::new();
    let stats = bench.publish_udp(GUEST, ForwardSource::Client);
    for _ in 0..3 {
        bench.datagram_from(0, CLIENT, b"?");
        let quoted = head::quoted_ports(at(CLIENT), at(GUEST), 9 << 16);
        let header =
            head::quoted_headers(at(CLIENT).ip(), at(GUEST).ip(), protocol::UDP, &quoted, 9);
        let (head, message) = head::icmp_error(
            at(GUEST).ip(),
            at(CLIENT).ip(),
            IcmpError::PortUnreachable,
            &[&header],
        );
        bench.frame(&[head.bytes(), &message].concat());
    }
    assert_eq!((stats.refusals.get(), stats.flows_begun.get(), stats.flows.get()), (3, 1, 1));
}

#[test]
fn a_client_at_its_session_limit_replaces_its_own_oldest() {
    let mut bench = Bench::with(|settings| settings.limits.sessions_per_client = 3);
    let stats = bench.publish_udp(GUEST, ForwardSource::Client);
    for port in 1..=5 {
        bench.datagram_from(0, &format!("198.51.100.7:{port}"), b"?");
        bench.frame(&udp(at(GUEST), at(&format!("198.51.100.7:{port}")), b"!"));
    }
    bench.datagram_from(0, "198.51.100.8:1", b"?");
    assert_eq!((stats.flows.get(), stats.flows_begun.get(), stats.refused()), (4, 6, 0));
    assert_eq!(stats.evicted.get(), 2);
    bench.frame(&udp(at(GUEST), at("198.51.100.7:5"), b"still there"));
    assert_eq!(stats.flows.get(), 4);
    bench.pass(Duration::from_secs(400));
    bench.datagram_from(0, "198.51.100.7:5", b"?");
    assert_eq!(stats.flows.get(), 1, "ended sessions do not count");
}

#[test]
fn an_ipv6_slash_64_is_one_client() {
    let mut bench = Bench::with(|settings| settings.limits.sessions_per_client = 3);
    let stats = bench.publish_udp(GUEST, ForwardSource::Gateway);
    for host in 1..=9 {
        bench.datagram_from(0, &format!("[2001:db8:1:2::{host}]:7"), b"?");
    }
    assert_eq!((stats.flows.get(), stats.evicted.get()), (3, 6));
}

#[test]
fn datagrams_with_the_address_of_the_server_are_dropped() {
    let mut bench = Bench::new();
    let stats = bench.publish_udp(GUEST, ForwardSource::Client);
    bench.datagram_from(0, GUEST, b"?");
    assert_eq!((bench.next_frame(), stats.refused()), (None, 1));
}

#[test]
fn icmp_errors_about_replies_reach_the_guest() {
    let mut bench = Bench::new();
    bench.publish_udp(GUEST, ForwardSource::Client);
    bench.datagram_from(0, CLIENT, b"question");
    bench.host().frames.clear();
    let gone = SocketError {
        icmp_error: IcmpError::PortUnreachable,
        offender: Some(at(CLIENT).ip()),
        destination: Some(at(CLIENT)),
        payload: b"answer".to_vec(),
    };
    let unknown = SocketError { destination: Some(at("203.0.113.9:9")), ..gone.clone() };
    bench.host().datagrams[0].problems.extend([unknown, gone]);
    let key = bench.host().datagrams[0].key.unwrap();
    let now = bench.now;
    bench.engine.port_ready(key, Ready { error: true, ..Ready::default() }, now);
    let frame = bench.next_frame().unwrap();
    let packet = Packet::parse(&frame[10..]).unwrap();
    assert_eq!(packet.source, at(CLIENT).ip());
    let Ok(Message::Error { icmp_error, source, destination, .. }) = Message::parse(&packet) else {
        panic!("an error")
    };
    assert_eq!(
        (icmp_error, source, destination),
        (IcmpError::PortUnreachable, at(GUEST), at(CLIENT))
    );
    assert_eq!(bench.next_frame(), None, "errors about unknown clients are dropped");
    bench.host().datagrams[0].outcome = Some(SendOutcome::TooBig(1400));
    bench.frame(&udp(at(GUEST), at(CLIENT), &[1; 1450]));
    let frame = bench.next_frame().unwrap();
    let parsed = Message::parse(&Packet::parse(&frame[10..]).unwrap());
    assert!(matches!(parsed, Ok(Message::Error { icmp_error: IcmpError::TooBig(1400), .. })));
}

#[test]
fn unpublishing_keeps_connections_and_ends_sessions() {
    let mut server = Server::connected();
    let udp_stats = server.bench.publish_udp(GUEST, ForwardSource::Client);
    server.bench.datagram_from(0, CLIENT, b"question");
    for id in server.bench.engine.published() {
        assert!(server.bench.engine.unpublish(id) && !server.bench.engine.unpublish(id));
    }
    server.bench.settle();
    assert_eq!((udp_stats.flows.get(), server.stats.flows.get()), (0, 1));
    assert!(server.bench.host().datagrams[0].closed);
    server.send(b"still here");
    assert_eq!(server.bench.host().streams[0].sent, b"still here");
}

/// A guard that denies all clients.
struct DenyAll;

impl Guard for DenyAll {
    fn admits(&self, ingress: &Ingress) -> bool {
        let expected = Ingress {
            client: at(CLIENT),
            destination: Some("192.0.2.1".parse().unwrap()),
            to_group: false,
            interface: 7,
            handshake: true,
        };
        assert_eq!(*ingress, expected);
        false
    }
}

#[test]
fn a_denied_client_is_reset_without_a_flow() {
    let mut bench = Bench::new();
    bench.host().listeners.push(FakeListener::default());
    let guard: Arc<dyn Guard> = Arc::new(DenyAll);
    let protocol = tidegate_model::Protocol::Tcp;
    let stats = bench.publish(protocol, GUEST, ForwardSource::Client, Port::Tcp(0), Some(guard));
    bench.client(0, CLIENT);
    assert_eq!((next_syn(&mut bench), stats.refused(), bench.engine.flows()), (None, 1, 0));
    assert_eq!(bench.dropped(DropReason::Denied), 1);
    assert!(bench.host().streams[0].aborted);
}

#[test]
fn a_guest_outside_the_policy_gets_no_clients() {
    let mut bench =
        Bench::with(|settings| settings.policy.sources = vec!["10.9.0.0/16".parse().unwrap()]);
    let stats = bench.publish_tcp(GUEST, ForwardSource::Client);
    bench.client(0, CLIENT);
    assert_eq!((next_syn(&mut bench), stats.refused()), (None, 1));
}

/// For any replies of a guest, no limit is exceeded, every client is served or reset, and the
/// connection of another guest is unaffected.
#[test]
fn a_hostile_server_does_not_affect_others() {
    for seed in 0..200 {
        let mut random = Random(seed);
        let mut bench = Bench::with(|settings| {
            (settings.limits.flows, settings.limits.flows_per_source) = (40, 30);
        });
        let stats = bench.publish_tcp(GUEST, ForwardSource::Client);
        let neighbour_stats = bench.publish_tcp("10.0.2.9:80", ForwardSource::Client);
        bench.client(1, "198.51.100.9:9");
        let (syn, outside) = next_syn(&mut bench).unwrap();
        let neighbour = |flags, sequence: u32, acknowledgement: u32| {
            let head =
                TcpHead { flags, sequence, acknowledgement, ..segment(at("10.0.2.9:80"), outside) };
            frame(&head, if flags & SYN == 0 { b"work" } else { b"" })
        };
        bench.frame(&neighbour(SYN | ACK, 1, syn.sequence.wrapping_add(1)));
        for step in 0..200u16 {
            if random.percent(20) {
                bench.client(0, &format!("203.0.113.1:{}", 1 + step));
            }
            let mut syns = vec![at("203.0.113.1:1")];
            let mut numbers = vec![0];
            while let Some(bytes) = bench.next_frame() {
                let packet = Packet::parse(&bytes[10..]).unwrap();
                if packet.protocol == protocol::TCP && packet.destination == at(GUEST).ip() {
                    let seen = Segment::parse(&packet, false).unwrap();
                    syns.push(SocketAddr::new(packet.source, seen.source));
                    numbers.extend([seen.sequence.wrapping_add(1), seen.acknowledgement]);
                }
            }
            let outside = syns[random.below(syns.len() as u64) as usize];
            let mut number = || match random.below(4) {
                0 => random.next() as u32,
                _ => numbers[random.below(numbers.len() as u64) as usize],
            };
            let (sequence, acknowledgement) = (number(), number());
            let flags = [SYN | ACK, SYN, ACK, RST, RST | ACK, FIN | ACK][random.below(6) as usize];
            let scale = random.percent(50).then(|| random.below(256) as u8);
            let mss = random.percent(50).then(|| random.below(70_000) as u16);
            let head = TcpHead {
                flags,
                sequence,
                acknowledgement,
                window: random.next() as u16,
                mss: mss.filter(|_| flags & SYN != 0),
                scale: scale.filter(|_| flags & SYN != 0),
                ..segment(at(GUEST), outside)
            };
            bench.frame(&frame(&head, if random.percent(50) { b"data" } else { b"" }));
            if random.percent(30) {
                bench.pass(Duration::from_millis(random.below(2000)));
            }
            assert!(bench.engine.flows() <= 40);
        }
        let sent = bench.host().streams[0].sent.len();
        bench.frame(&neighbour(ACK, 2 + sent as u32, syn.sequence.wrapping_add(1)));
        assert_eq!(
            bench.host().streams[0].sent.len(),
            sent + 4,
            "seed {seed}: the neighbour is unaffected"
        );
        bench.pass(Duration::from_secs(3 * 3600));
        assert_eq!(
            (stats.flows.get(), neighbour_stats.flows.get()),
            (0, 0),
            "seed {seed}: idle flows end"
        );
        let host = bench.host();
        assert!(
            host.streams.iter().all(|stream| stream.aborted || stream.shut),
            "every remote side is notified"
        );
    }
}
