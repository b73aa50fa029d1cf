//! TCP requirements of the RFCs, by section, in simulated time.

mod world;

use std::net::SocketAddr;
use std::time::Duration;
use tidegate_nat::DropReason;
use tidegate_nat::host::Ready;
use tidegate_nat::wire::head::TcpHead;
use tidegate_nat::wire::icmp::{IcmpError, Message};
use tidegate_nat::wire::ip::Packet;
use tidegate_nat::wire::tcp::flags::{ACK, FIN, PSH, RST, SYN};
use world::{Bench, Seen, at, frame, segment};

const ISN: u32 = u32::MAX - 10;

/// A guest with the state of one connection.
struct Guest {
    bench: Bench,
    inside: SocketAddr,
    outside: SocketAddr,
    next: u32,
    expected: u32,
    clock: Option<u32>,
}

impl Guest {
    fn new(bench: Bench) -> Self {
        let (inside, outside) = (at("10.0.2.100:40000"), at("192.0.2.2:80"));
        Self { bench, inside, outside, next: ISN, expected: 0, clock: None }
    }

    /// Sends an ICMP error to the engine that reports a path MTU of `mtu` bytes and quotes
    /// `quoted`.
    fn receive_path_mtu(&mut self, mtu: u32, quoted: &[u8]) {
        let (head, message) = tidegate_nat::wire::head::icmp_error(
            self.inside.ip(),
            self.outside.ip(),
            IcmpError::TooBig(mtu),
            &[quoted],
        );
        self.bench.frame(&[head.bytes(), &message].concat());
    }

    /// Creates a guest with an established connection.
    fn connected() -> Self {
        Self::connected_with(Bench::new(), |_| {})
    }

    fn connected_with(bench: Bench, change: impl FnOnce(&mut TcpHead)) -> Self {
        let mut guest = Self::new(bench);
        guest.syn(change);
        let index = guest.index();
        guest.bench.remote_answers(index, Ok(()));
        let answer = guest.bench.next_segment().expect("a SYN-ACK");
        assert!(answer.has(SYN | ACK));
        assert_eq!(answer.acknowledgement, guest.next);
        guest.expected = answer.sequence.wrapping_add(1);
        guest.send(ACK, b"");
        assert_eq!(guest.bench.next_frame(), None);
        guest
    }

    fn index(&mut self) -> usize {
        self.bench.host().streams.len() - 1
    }

    fn head(&self, flags: u8) -> TcpHead {
        TcpHead {
            sequence: self.next,
            acknowledgement: self.expected,
            flags,
            timestamps: self.clock.map(|clock| (clock, 0)),
            ..segment(self.inside, self.outside)
        }
    }

    fn syn(&mut self, change: impl FnOnce(&mut TcpHead)) {
        let mut head = TcpHead { mss: Some(1460), acknowledgement: 0, ..self.head(SYN) };
        change(&mut head);
        self.bench.frame(&frame(&head, b""));
        self.next = ISN.wrapping_add(1);
    }

    /// Sends the next segment in order.
    fn send(&mut self, flags: u8, payload: &[u8]) {
        self.bench.frame(&frame(&self.head(flags), payload));
        self.next = self.next.wrapping_add(payload.len() as u32 + u32::from(flags & FIN != 0));
    }

    /// Sends a modified segment without changing the state.
    fn send_as(&mut self, change: impl FnOnce(&mut TcpHead), payload: &[u8]) {
        let mut head = self.head(ACK);
        change(&mut head);
        self.bench.frame(&frame(&head, payload));
    }

    fn receive(&mut self) -> Option<Seen> {
        self.bench.next_segment()
    }

    /// Receives the next segment, which must contain data in order.
    fn receive_data(&mut self) -> Vec<u8> {
        let seen = self.receive().expect("data");
        assert_eq!(seen.sequence, self.expected);
        self.expected = self.expected.wrapping_add(seen.payload.len() as u32);
        seen.payload
    }

    fn sent(&mut self) -> &[u8] {
        let index = self.index();
        &self.bench.host().streams[index].sent
    }
}

#[test]
fn rfc_9293_3_5_a_syn_is_answered_only_after_the_server_has_accepted() {
    let mut guest = Guest::new(Bench::new());
    guest.syn(|_| {});
    assert_eq!(guest.receive(), None);
    guest.bench.pass(Duration::from_secs(1));
    assert_eq!(guest.receive(), None, "nor by a timer");
    guest.bench.remote_answers(0, Ok(()));
    let answer = guest.receive().unwrap();
    assert!(answer.has(SYN | ACK));
    assert_eq!((answer.mss, answer.scale, answer.timestamps), (Some(1460), None, None));
}

#[test]
fn rfc_9293_3_10_7_1_a_closed_port_resets_the_guest() {
    let mut guest = Guest::new(Bench::new());
    guest.syn(|_| {});
    guest.bench.remote_answers(0, Err(111));
    let answer = guest.receive().unwrap();
    assert_eq!((answer.flags, answer.sequence), (RST | ACK, 0));
    assert_eq!(answer.acknowledgement, ISN.wrapping_add(1));
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_792_an_unreachable_host_is_reported_by_icmp() {
    for (errno, icmp_error) in
        [(113, IcmpError::HostUnreachable), (101, IcmpError::NetworkUnreachable)]
    {
        let mut guest = Guest::new(Bench::new());
        guest.syn(|_| {});
        guest.bench.remote_answers(0, Err(errno));
        let frame = guest.bench.next_frame().unwrap();
        let packet = Packet::parse(&frame[10..]).unwrap();
        assert_eq!(packet.source, at("10.0.2.2:0").ip());
        let Ok(Message::Error { icmp_error: reported, source, destination, protocol: 6 }) =
            Message::parse(&packet)
        else {
            panic!("an ICMP error about a TCP segment")
        };
        assert_eq!((reported, source, destination), (icmp_error, guest.inside, guest.outside));
        assert_eq!(guest.bench.next_frame(), None);
    }
}

#[test]
fn rfc_9293_3_10_7_1_segments_without_a_connection_are_reset_except_resets() {
    let mut guest = Guest::new(Bench::new());
    guest.send_as(|head| (head.sequence, head.acknowledgement) = (7, 9), b"lost");
    let answer = guest.receive().unwrap();
    assert_eq!((answer.flags, answer.sequence), (RST, 9));
    guest.send_as(|head| (head.sequence, head.flags) = (7, FIN), b"lost");
    let answer = guest.receive().unwrap();
    assert_eq!((answer.flags, answer.sequence, answer.acknowledgement), (RST | ACK, 0, 12));
    guest.send_as(|head| head.flags = RST, b"");
    assert_eq!(guest.receive(), None);
}

#[test]
fn rfc_6528_initial_sequence_numbers_differ_by_connection_and_grow_with_time() {
    let iss = |port: u16, wait: u64| {
        let mut guest = Guest::new(Bench::new());
        guest.inside.set_port(port);
        guest.bench.pass(Duration::from_secs(wait));
        guest.syn(|_| {});
        guest.bench.remote_answers(0, Ok(()));
        guest.receive().unwrap().sequence
    };
    let far_apart = |a: u32, b: u32| a.wrapping_sub(b).min(b.wrapping_sub(a)) > 1000;
    assert!(far_apart(iss(1, 0), iss(2, 0)));
    assert_eq!(iss(1, 4).wrapping_sub(iss(1, 0)), 1_000_000, "a tick is 4 microseconds");
}

#[test]
fn rfc_7323_windows_are_scaled_and_timestamps_echoed_if_offered() {
    let mut guest = Guest::new(Bench::new());
    guest.clock = Some(700);
    guest.syn(|head| head.scale = Some(7));
    guest.bench.remote_answers(0, Ok(()));
    let answer = guest.receive().unwrap();
    assert_eq!(answer.scale, Some(5));
    assert_eq!(answer.timestamps.unwrap().1, 700);
    guest.expected = answer.sequence.wrapping_add(1);
    guest.clock = Some(701);
    guest.send_as(|head| head.window = 2, b"");
    guest.bench.remote_sends(0, &[1; 1000]);
    let data = guest.receive().unwrap();
    assert_eq!(data.payload.len(), 256, "a window of 2, scaled by 7");
    assert_eq!(data.timestamps.unwrap().1, 701);
    assert_eq!(data.window, (1 << 20 >> 5) as u16);
}

#[test]
fn rfc_7323_5_3_a_segment_with_an_old_timestamp_is_rejected() {
    let mut guest = Guest::new(Bench::new());
    guest.clock = Some(700);
    guest.syn(|_| {});
    guest.bench.remote_answers(0, Ok(()));
    guest.expected = guest.receive().unwrap().sequence.wrapping_add(1);
    guest.clock = Some(701);
    guest.send(ACK, b"new");
    assert_eq!(guest.receive().unwrap().acknowledgement, guest.next);
    guest.clock = Some(699);
    guest.send_as(|_| {}, b"old");
    assert_eq!(
        guest.receive().unwrap().acknowledgement,
        guest.next,
        "replies with the current acknowledgement"
    );
    guest.send_as(|head| head.timestamps = None, b"none");
    assert_eq!(guest.receive(), None);
    assert_eq!(guest.sent(), b"new");
}

#[test]
fn rfc_5961_3_2_a_reset_is_valid_only_with_the_next_sequence_number() {
    let mut guest = Guest::connected();
    guest.send_as(|head| (head.flags, head.sequence) = (RST, head.sequence.wrapping_add(5)), b"");
    let challenge = guest.receive().unwrap();
    assert_eq!((challenge.flags, challenge.acknowledgement), (ACK, guest.next));
    guest.send_as(|head| (head.flags, head.sequence) = (RST, head.sequence.wrapping_sub(5)), b"");
    assert_eq!(guest.receive(), None);
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.send_as(|head| head.flags = RST, b"");
    assert_eq!(guest.bench.engine.flows(), 0);
    assert!(guest.bench.host().streams[0].aborted, "the reset is forwarded");
}

#[test]
fn rfc_5961_4_2_a_syn_in_a_connection_is_challenged() {
    let mut guest = Guest::connected();
    guest.send_as(|head| (head.flags, head.acknowledgement) = (SYN, 0), b"");
    assert_eq!(guest.receive().unwrap().flags, ACK);
    assert_eq!(guest.bench.engine.flows(), 1);
}

#[test]
fn rfc_5961_5_2_acknowledgements_of_unsent_data_are_challenged() {
    let mut guest = Guest::connected();
    guest.send_as(|head| head.acknowledgement = head.acknowledgement.wrapping_add(1), b"forged");
    assert_eq!(guest.receive().unwrap().flags, ACK);
    guest.send_as(
        |head| head.acknowledgement = head.acknowledgement.wrapping_sub(1 << 31),
        b"forged",
    );
    assert_eq!(guest.sent(), b"");
}

#[test]
fn rfc_5961_7_challenge_acks_are_rate_limited() {
    let mut guest = Guest::connected();
    for _ in 0..1000 {
        guest.send_as(|head| (head.flags, head.acknowledgement) = (SYN, 0), b"");
    }
    assert_eq!(std::iter::from_fn(|| guest.receive()).count(), 1);
}

#[test]
fn rfc_9293_3_4_data_passes_in_order_with_one_acknowledgement_per_batch() {
    let mut guest = Guest::connected();
    for word in ["one ", "two ", "three"] {
        let bytes = frame(&guest.head(ACK | PSH), word.as_bytes());
        let now = guest.bench.now;
        guest.bench.engine.frame(&bytes, now);
        guest.next = guest.next.wrapping_add(word.len() as u32);
    }
    guest.bench.settle();
    assert_eq!(guest.sent(), b"one two three");
    assert_eq!(guest.receive().unwrap().acknowledgement, guest.next);
    assert_eq!(guest.receive(), None);
}

#[test]
fn rfc_5681_4_2_out_of_order_segments_are_stored_and_acknowledged_at_once() {
    let mut guest = Guest::connected();
    let start = guest.next;
    for (at, word) in [(8, "three"), (4, "two "), (4, "two th")] {
        guest.send_as(|head| head.sequence = start.wrapping_add(at), word.as_bytes());
        assert_eq!(guest.receive().unwrap().acknowledgement, start);
    }
    guest.send_as(|_| {}, b"one ");
    assert_eq!(guest.sent(), b"one two three");
    while let Some(last) = guest.receive() {
        guest.next = last.acknowledgement;
    }
    assert_eq!(guest.next, start.wrapping_add(13));
}

#[test]
fn rfc_9293_3_10_7_4_data_outside_of_the_window_is_dropped() {
    let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(0));
    let start = guest.next;
    guest.send_as(|head| head.sequence = start.wrapping_add((1 << 20) + 1), b"beyond");
    guest.send_as(|head| head.sequence = start.wrapping_sub(100), b"before");
    assert_eq!(guest.receive().unwrap().acknowledgement, start);
    assert_eq!(guest.bench.dropped(DropReason::Window), 2);
    // A segment across the edge is accepted up to the edge.
    guest.send_as(|head| head.sequence = start.wrapping_sub(3), b"oldnew");
    assert_eq!(guest.sent(), b"new");
}

#[test]
fn rfc_9293_3_8_6_the_window_closes_for_a_stalled_server_and_reopens() {
    let mut bench = Bench::new();
    bench.host().room = 1000;
    let mut guest = Guest::connected_with(bench, |head| head.scale = Some(0));
    let mut sent = 0usize;
    loop {
        guest.send(ACK, &[7; 60_000]);
        let seen = guest.receive().unwrap();
        if seen.window == 0 {
            sent += seen.acknowledgement.wrapping_sub(guest.next.wrapping_sub(60_000)) as usize;
            guest.next = seen.acknowledgement;
            break;
        }
        sent += 60_000;
    }
    assert_eq!(sent, (1 << 20) + 1000, "send buffer plus one window");
    // A probe is answered, and its payload is not accepted.
    guest.send_as(|_| {}, b"x");
    let answer = guest.receive().unwrap();
    assert_eq!((answer.acknowledgement, answer.window), (guest.next, 0));
    guest.bench.host().streams[0].room = usize::MAX;
    guest.bench.stream_ready(0, Ready { writable: true, ..Ready::default() });
    assert!(guest.receive().unwrap().window > 0, "a window update is sent");
    assert_eq!(guest.sent().len(), sent);
}

#[test]
fn rfc_6298_5_unacknowledged_data_is_retransmitted_with_backoff() {
    let mut guest = Guest::connected();
    guest.bench.remote_sends(0, b"hello");
    assert_eq!(guest.receive().unwrap().payload, b"hello");
    let mut waits = Vec::new();
    let mut last = guest.bench.now;
    while waits.len() < 4 {
        guest.bench.pass(Duration::from_millis(10));
        if let Some(again) = guest.receive() {
            assert_eq!(again.payload, b"hello");
            waits.push((guest.bench.now - last).as_millis());
            last = guest.bench.now;
        }
    }
    assert_eq!(waits, [200, 400, 800, 1600]);
    guest.expected = guest.expected.wrapping_add(5);
    guest.send(ACK, b"");
    assert_eq!(guest.bench.host().streams[0].queue.len(), 0, "acknowledged data is discarded");
    guest.bench.pass(Duration::from_secs(60));
    assert_eq!(guest.receive(), None);
}

#[test]
fn rfc_9293_3_8_3_an_unresponsive_guest_resets_the_connection() {
    let mut guest = Guest::connected();
    guest.bench.remote_sends(0, b"hello");
    guest.bench.pass(Duration::from_secs(100));
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.bench.pass(Duration::from_secs(600));
    assert_eq!(guest.bench.engine.flows(), 0);
    assert!(guest.bench.host().streams[0].aborted);
    assert!(std::iter::from_fn(|| guest.receive()).last().unwrap().has(RST));
}

#[test]
fn rfc_5681_3_2_only_the_third_duplicate_ack_retransmits() {
    let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(4));
    guest.bench.remote_sends(0, &[1; 10_000]);
    while guest.receive().is_some() {}
    for count in 1..=6 {
        guest.send_as(|_| {}, b"");
        let again = guest.receive();
        assert_eq!(again.is_some(), count == 3, "duplicate {count}");
        if let Some(again) = again {
            assert_eq!((again.sequence, again.payload.len()), (guest.expected, 10_000));
        }
    }
}

#[test]
fn rfc_9293_3_8_6_1_a_closed_window_is_probed_until_it_opens() {
    let mut guest = Guest::connected();
    guest.send_as(|head| head.window = 0, b"");
    guest.bench.remote_sends(0, b"hello");
    assert_eq!(guest.receive(), None);
    let mut probes = 0;
    for _ in 0..600 {
        guest.bench.pass(Duration::from_millis(100));
        while let Some(probe) = guest.receive() {
            assert_eq!((probe.sequence, probe.payload.len()), (guest.expected.wrapping_sub(1), 0));
            probes += 1;
            guest.send_as(|head| head.window = 0, b"");
        }
    }
    assert!((8..12).contains(&probes), "{probes} probes in a minute, with exponential backoff");
    guest.bench.pass(Duration::from_secs(3600));
    assert_eq!(guest.bench.engine.flows(), 0, "a guest that stops replying is given up");

    let mut guest = Guest::connected();
    guest.send_as(|head| head.window = 0, b"");
    guest.bench.remote_sends(0, b"hello");
    guest.send_as(|head| head.window = 3, b"");
    assert_eq!(guest.receive_data(), b"hel");
    guest.send(ACK, b"");
    assert_eq!(guest.receive_data(), b"lo");
}

#[test]
fn rfc_9293_3_6_a_half_close_of_the_guest_leaves_the_other_half_open() {
    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"request");
    assert_eq!(guest.sent(), b"request");
    guest.bench.pass(Duration::from_millis(10));
    assert_eq!(guest.receive().unwrap().acknowledgement, guest.next);
    assert!(guest.bench.host().streams[0].shut);
    guest.bench.remote_sends(0, b"answer");
    assert_eq!(guest.receive_data(), b"answer");
    guest.send(ACK, b"");
    guest.bench.remote_closes(0);
    let fin = guest.receive().unwrap();
    assert!(fin.has(FIN));
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.expected = guest.expected.wrapping_add(1);
    guest.send(ACK, b"");
    assert_eq!(guest.bench.engine.flows(), 0);
    assert!(!guest.bench.host().streams[0].aborted, "orderly close");
}

#[test]
fn rfc_9293_3_8_6_3_the_fin_of_the_server_acknowledges_that_of_the_guest() {
    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"");
    guest.bench.pass(Duration::from_millis(9));
    assert_eq!(guest.bench.next_frame(), None, "the acknowledgement is delayed");
    guest.bench.remote_closes(0);
    let fin = guest.receive().unwrap();
    assert_eq!((fin.has(FIN), fin.acknowledgement), (true, guest.next));
    guest.bench.pass(Duration::from_millis(100));
    assert_eq!(guest.bench.next_frame(), None, "no second acknowledgement");
}

#[test]
fn rfc_9293_3_8_6_3_a_fin_is_acknowledged_if_the_server_does_not_close() {
    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"");
    guest.bench.pass(Duration::from_millis(10));
    let acknowledgement = guest.receive().unwrap();
    assert_eq!((acknowledgement.has(FIN), acknowledgement.acknowledgement), (false, guest.next));
    // A retransmitted FIN is acknowledged at once, because the guest has not seen the
    // acknowledgement.
    guest.next = guest.next.wrapping_sub(1);
    guest.send(ACK | FIN, b"");
    assert_eq!(guest.receive().unwrap().acknowledgement, guest.next);
}

#[test]
fn a_server_that_sends_first_gets_the_handshake_ack_soon() {
    let mut bench = Bench::new();
    bench.host().delay_handshake_acks = true;
    let mut guest = Guest::connected_with(bench, |_| {});
    assert!(guest.bench.host().streams[0].delay_ack, "the handshake ACK is delayed");
    guest.bench.pass(Duration::from_millis(1));
    assert!(!guest.bench.host().streams[0].delay_ack);
    guest.bench.remote_sends(0, b"hello");
    assert_eq!(guest.receive_data(), b"hello");
}

#[test]
fn rfc_9293_3_6_a_server_that_closes_first_still_receives_all_data() {
    let mut guest = Guest::connected();
    guest.bench.remote_closes(0);
    assert!(guest.receive().unwrap().has(FIN));
    guest.expected = guest.expected.wrapping_add(1);
    guest.send(ACK, b"late");
    guest.receive().unwrap();
    guest.send(ACK | FIN, b"");
    assert_eq!(guest.receive().unwrap().acknowledgement, guest.next);
    assert_eq!(guest.sent(), b"late");
    assert_eq!(guest.bench.host().streams_closed.get(&0), Some(&true), "the socket is closed");
    // The last acknowledgement was lost, so the FIN is retransmitted.
    guest.next = guest.next.wrapping_sub(1);
    guest.send(ACK | FIN, b"");
    assert_eq!(guest.receive().unwrap().acknowledgement, guest.next);
    guest.bench.pass(Duration::from_secs(3));
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_9293_3_6_data_and_close_in_one_event_both_arrive() {
    let mut guest = Guest::connected();
    guest.bench.host().streams[0].queue.extend(b"all there is");
    guest.bench.remote_closes(0);
    assert_eq!(guest.receive_data(), b"all there is");
    assert!(guest.receive().unwrap().has(FIN));
}

#[test]
fn rfc_9293_3_10_7_4_data_after_a_fin_is_dropped() {
    let mut guest = Guest::connected();
    let start = guest.next;
    guest.send_as(|head| head.sequence = start.wrapping_add(4), b"after the end");
    guest.send_as(|head| head.flags = ACK | FIN, b"this");
    assert_eq!(guest.sent(), b"this");
    guest.send_as(|head| head.sequence = start.wrapping_add(5), b"and this");
    assert_eq!(guest.sent(), b"this");
    assert!(guest.bench.host().streams[0].shut);
    guest.bench.pass(Duration::from_millis(10));
    let last = std::iter::from_fn(|| guest.receive()).last().unwrap();
    assert_eq!(last.acknowledgement, start.wrapping_add(5));
}

#[test]
fn rfc_6191_a_new_connection_replaces_a_lingering_one() {
    let mut guest = Guest::connected();
    guest.bench.remote_closes(0);
    guest.receive().unwrap();
    guest.expected = guest.expected.wrapping_add(1);
    guest.send(ACK | FIN, b"");
    guest.receive().unwrap();
    guest.send_as(
        |head| {
            (head.flags, head.acknowledgement, head.sequence) =
                (SYN, 0, head.sequence.wrapping_add(1000));
        },
        b"",
    );
    assert_eq!(guest.bench.host().streams.len(), 2);
    guest.bench.remote_answers(1, Ok(()));
    assert!(guest.receive().unwrap().has(SYN | ACK));
}

#[test]
fn rfc_9293_3_5_3_a_reset_of_the_server_is_forwarded() {
    let mut guest = Guest::connected();
    guest.bench.host().streams[0].broken = true;
    guest.bench.stream_ready(0, Ready { error: true, readable: true, writable: true, more: true });
    let reset = guest.receive().unwrap();
    assert!(reset.has(RST));
    assert_eq!(reset.sequence, guest.expected);
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_5382_req_5_idle_connections_end_after_hours_and_half_closed_ones_after_minutes() {
    let mut guest = Guest::connected();
    guest.bench.pass(Duration::from_secs(7200));
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.bench.pass(Duration::from_secs(300));
    assert_eq!(guest.bench.engine.flows(), 0);

    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"");
    guest.bench.pass(Duration::from_secs(239));
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.bench.pass(Duration::from_secs(2));
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_1191_a_smaller_path_mtu_of_the_guest_is_respected() {
    let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(4));
    guest.bench.remote_sends(0, &[1; 5000]);
    let data = guest.receive().unwrap();
    assert_eq!((data.payload.len(), data.cut), (5000, 1460));
    let quoted = frame(
        &TcpHead { sequence: data.sequence, ..segment(guest.outside, guest.inside) },
        &data.payload[..100],
    );
    guest.receive_path_mtu(1300, &quoted[10..]);
    let again = guest.receive().unwrap();
    assert_eq!((again.sequence, again.payload.len(), again.cut), (data.sequence, 5000, 1260));
}

/// The urgent pointer removes no byte from the stream, and no length is computed from it (RFC 6093,
/// 3.1).
#[test]
fn rfc_6093_urgent_data_is_in_order_for_any_urgent_pointer() {
    /// Offset of the pointer: offload header of the device (10 bytes), IPv4 header, 18 bytes of TCP
    /// header.
    const POINTER: usize = 10 + 20 + 18;
    const URG: u8 = 0x20;
    let mut guest = Guest::connected();
    let mut expected = Vec::new();
    for pointer in [0_u16, 1, 2, 5, 6, 0x7fff, 0xffff] {
        for payload in [&b""[..], b"x", b"hello"] {
            let mut bytes = frame(&guest.head(ACK | PSH | URG), payload);
            bytes[POINTER..POINTER + 2].copy_from_slice(&pointer.to_be_bytes());
            guest.bench.frame(&bytes);
            guest.next = guest.next.wrapping_add(payload.len() as u32);
            expected.extend_from_slice(payload);
        }
    }
    assert_eq!(guest.sent(), expected);
}

/// For any reported path MTU, segments carry payload and all data arrives (RFC 1191, 3; RFC 8201,
/// 4).
#[test]
fn rfc_1191_a_tiny_reported_path_mtu_still_permits_payload() {
    for mtu in [0_u32, 1, 20, 40, 52, 67, 68, 88, 576, 1279, 65_535, u32::MAX] {
        let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(4));
        guest.bench.remote_sends(0, &[7; 5000]);
        let data = guest.receive().unwrap();
        let quoted = frame(
            &TcpHead { sequence: data.sequence, ..segment(guest.outside, guest.inside) },
            &data.payload[..100],
        );
        guest.receive_path_mtu(mtu, &quoted[10..]);
        if let Some(again) = guest.receive() {
            assert!(again.cut >= 48, "segments of {} bytes for a path MTU of {mtu}", again.cut);
            assert_eq!(again.payload, data.payload, "{mtu}");
        }
        guest.expected = guest.expected.wrapping_add(5000);
        guest.send(ACK, b"");
        guest.send(ACK, b"still here");
        assert_eq!(guest.sent(), b"still here", "{mtu}");
    }
}

/// An error with a short quotation or any header length is not read beyond its end (RFC 792; RFC
/// 1812, 4.3.2.3).
#[test]
fn rfc_792_errors_with_any_quotation_are_read_within_bounds() {
    let mut guest = Guest::connected();
    let quoted = frame(
        &TcpHead { sequence: guest.expected, ..segment(guest.outside, guest.inside) },
        &[1; 40],
    );
    for length in 0..quoted.len() - 10 {
        for header_words in 0..16_u8 {
            let mut quote = quoted[10..10 + length].to_vec();
            if let Some(first) = quote.first_mut() {
                *first = *first & 0xf0 | header_words;
            }
            guest.receive_path_mtu(1300, &quote);
        }
    }
    guest.send(ACK, b"still here");
    assert_eq!(guest.sent(), b"still here");
}
