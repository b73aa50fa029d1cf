//! What the RFCs ask of TCP, section by section, in invented time.

mod world;

use std::net::SocketAddr;
use std::time::Duration;
use tidegate_nat::DropReason;
use tidegate_nat::host::Ready;
use tidegate_nat::wire::head::TcpHead;
use tidegate_nat::wire::icmp::{Message, Problem};
use tidegate_nat::wire::ip::Packet;
use tidegate_nat::wire::tcp::flags::{ACK, FIN, PSH, RST, SYN};
use world::{Bench, Seen, at, frame, segment};

const ISN: u32 = u32::MAX - 10;

/// A guest that knows where it is in one connection.
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

    /// Receives an ICMP error of the far end: packets on the path may have `mtu` bytes. It quotes
    /// `quoted`.
    fn path_is_said_to_carry(&mut self, mtu: u32, quoted: &[u8]) {
        let (head, message) = tidegate_nat::wire::head::problem(
            self.inside.ip(),
            self.outside.ip(),
            Problem::TooBig(mtu),
            &[quoted],
        );
        self.bench.frame(&[head.bytes(), &message].concat());
    }

    /// One that has its connection.
    fn connected() -> Self {
        Self::connected_with(Bench::new(), |_| {})
    }

    fn connected_with(bench: Bench, change: impl FnOnce(&mut TcpHead)) -> Self {
        let mut guest = Self::new(bench);
        guest.syn(change);
        let index = guest.index();
        guest.bench.far_end_answers(index, Ok(()));
        let answer = guest.bench.next_segment().expect("a SYN-ACK");
        assert!(answer.has(SYN | ACK));
        assert_eq!(answer.acknowledgement, guest.next);
        guest.expected = answer.sequence.wrapping_add(1);
        guest.send(ACK, b"");
        assert_eq!(guest.bench.next_frame(), None);
        guest
    }

    fn index(&mut self) -> usize {
        self.bench.world().streams.len() - 1
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

    /// Sends one as it is.
    fn send_as(&mut self, change: impl FnOnce(&mut TcpHead), payload: &[u8]) {
        let mut head = self.head(ACK);
        change(&mut head);
        self.bench.frame(&frame(&head, payload));
    }

    fn got(&mut self) -> Option<Seen> {
        self.bench.next_segment()
    }

    /// Takes the next segment, which must be data in order.
    fn takes_data(&mut self) -> Vec<u8> {
        let seen = self.got().expect("data");
        assert_eq!(seen.sequence, self.expected);
        self.expected = self.expected.wrapping_add(seen.payload.len() as u32);
        seen.payload
    }

    fn sent(&mut self) -> &[u8] {
        let index = self.index();
        &self.bench.world().streams[index].sent
    }
}

#[test]
fn rfc_9293_3_5_a_syn_is_answered_only_when_the_far_end_has_accepted() {
    let mut guest = Guest::new(Bench::new());
    guest.syn(|_| {});
    assert_eq!(guest.got(), None);
    guest.bench.pass(Duration::from_secs(1));
    assert_eq!(guest.got(), None, "nor by a timer");
    guest.bench.far_end_answers(0, Ok(()));
    let answer = guest.got().unwrap();
    assert!(answer.has(SYN | ACK));
    assert_eq!((answer.mss, answer.scale, answer.timestamps), (Some(1460), None, None));
}

#[test]
fn rfc_9293_3_10_7_1_a_closed_port_is_closed_to_the_guest() {
    let mut guest = Guest::new(Bench::new());
    guest.syn(|_| {});
    guest.bench.far_end_answers(0, Err(111));
    let answer = guest.got().unwrap();
    assert_eq!((answer.flags, answer.sequence), (RST | ACK, 0));
    assert_eq!(answer.acknowledgement, ISN.wrapping_add(1));
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_792_a_host_that_cannot_be_reached_is_told_by_icmp() {
    for (errno, problem) in [(113, Problem::HostUnreachable), (101, Problem::NetworkUnreachable)] {
        let mut guest = Guest::new(Bench::new());
        guest.syn(|_| {});
        guest.bench.far_end_answers(0, Err(errno));
        let frame = guest.bench.next_frame().unwrap();
        let packet = Packet::parse(&frame[10..]).unwrap();
        assert_eq!(packet.source, at("10.0.2.2:0").ip());
        let Ok(Message::Error { problem: told, source, destination, protocol: 6 }) =
            Message::parse(&packet)
        else {
            panic!("an error about a segment")
        };
        assert_eq!((told, source, destination), (problem, guest.inside, guest.outside));
        assert_eq!(guest.bench.next_frame(), None);
    }
}

#[test]
fn rfc_9293_3_10_7_1_segments_of_no_connection_are_reset_and_resets_are_not() {
    let mut guest = Guest::new(Bench::new());
    guest.send_as(|head| (head.sequence, head.acknowledgement) = (7, 9), b"lost");
    let answer = guest.got().unwrap();
    assert_eq!((answer.flags, answer.sequence), (RST, 9));
    guest.send_as(|head| (head.sequence, head.flags) = (7, FIN), b"lost");
    let answer = guest.got().unwrap();
    assert_eq!((answer.flags, answer.sequence, answer.acknowledgement), (RST | ACK, 0, 12));
    guest.send_as(|head| head.flags = RST, b"");
    assert_eq!(guest.got(), None);
}

#[test]
fn rfc_6528_initial_numbers_differ_by_connection_and_grow_with_time() {
    let iss = |port: u16, wait: u64| {
        let mut guest = Guest::new(Bench::new());
        guest.inside.set_port(port);
        guest.bench.pass(Duration::from_secs(wait));
        guest.syn(|_| {});
        guest.bench.far_end_answers(0, Ok(()));
        guest.got().unwrap().sequence
    };
    let far_apart = |a: u32, b: u32| a.wrapping_sub(b).min(b.wrapping_sub(a)) > 1000;
    assert!(far_apart(iss(1, 0), iss(2, 0)));
    assert_eq!(iss(1, 4).wrapping_sub(iss(1, 0)), 1_000_000, "a tick is 4 microseconds");
}

#[test]
fn rfc_7323_windows_are_scaled_and_timestamps_echoed_if_the_guest_offers() {
    let mut guest = Guest::new(Bench::new());
    guest.clock = Some(700);
    guest.syn(|head| head.scale = Some(7));
    guest.bench.far_end_answers(0, Ok(()));
    let answer = guest.got().unwrap();
    assert_eq!(answer.scale, Some(5));
    assert_eq!(answer.timestamps.unwrap().1, 700);
    guest.expected = answer.sequence.wrapping_add(1);
    guest.clock = Some(701);
    guest.send_as(|head| head.window = 2, b"");
    guest.bench.far_end_sends(0, &[1; 1000]);
    let data = guest.got().unwrap();
    assert_eq!(data.payload.len(), 256, "a window of 2, shifted by 7");
    assert_eq!(data.timestamps.unwrap().1, 701);
    assert_eq!(data.window, (1 << 20 >> 5) as u16);
}

#[test]
fn rfc_7323_5_3_an_old_timestamp_marks_an_old_segment() {
    let mut guest = Guest::new(Bench::new());
    guest.clock = Some(700);
    guest.syn(|_| {});
    guest.bench.far_end_answers(0, Ok(()));
    guest.expected = guest.got().unwrap().sequence.wrapping_add(1);
    guest.clock = Some(701);
    guest.send(ACK, b"new");
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next);
    guest.clock = Some(699);
    guest.send_as(|_| {}, b"old");
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next, "it is told where we are");
    guest.send_as(|head| head.timestamps = None, b"none");
    assert_eq!(guest.got(), None);
    assert_eq!(guest.sent(), b"new");
}

#[test]
fn rfc_5961_3_2_a_reset_counts_only_with_the_very_next_number() {
    let mut guest = Guest::connected();
    guest.send_as(|head| (head.flags, head.sequence) = (RST, head.sequence.wrapping_add(5)), b"");
    let challenge = guest.got().unwrap();
    assert_eq!((challenge.flags, challenge.acknowledgement), (ACK, guest.next));
    guest.send_as(|head| (head.flags, head.sequence) = (RST, head.sequence.wrapping_sub(5)), b"");
    assert_eq!(guest.got(), None);
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.send_as(|head| head.flags = RST, b"");
    assert_eq!(guest.bench.engine.flows(), 0);
    assert!(guest.bench.world().streams[0].aborted, "a reset is told on as one");
}

#[test]
fn rfc_5961_4_2_a_syn_in_a_connection_is_challenged() {
    let mut guest = Guest::connected();
    guest.send_as(|head| (head.flags, head.acknowledgement) = (SYN, 0), b"");
    assert_eq!(guest.got().unwrap().flags, ACK);
    assert_eq!(guest.bench.engine.flows(), 1);
}

#[test]
fn rfc_5961_5_2_acknowledgements_of_what_was_never_sent_are_challenged() {
    let mut guest = Guest::connected();
    guest.send_as(|head| head.acknowledgement = head.acknowledgement.wrapping_add(1), b"forged");
    assert_eq!(guest.got().unwrap().flags, ACK);
    guest.send_as(
        |head| head.acknowledgement = head.acknowledgement.wrapping_sub(1 << 31),
        b"forged",
    );
    assert_eq!(guest.sent(), b"");
}

#[test]
fn rfc_5961_7_challenges_are_few() {
    let mut guest = Guest::connected();
    for _ in 0..1000 {
        guest.send_as(|head| (head.flags, head.acknowledgement) = (SYN, 0), b"");
    }
    assert_eq!(std::iter::from_fn(|| guest.got()).count(), 1);
}

#[test]
fn rfc_9293_3_4_data_passes_in_order_and_one_acknowledgement_answers_a_batch() {
    let mut guest = Guest::connected();
    for word in ["one ", "two ", "three"] {
        let bytes = frame(&guest.head(ACK | PSH), word.as_bytes());
        let now = guest.bench.now;
        guest.bench.engine.frame(&bytes, now);
        guest.next = guest.next.wrapping_add(word.len() as u32);
    }
    guest.bench.settle();
    assert_eq!(guest.sent(), b"one two three");
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next);
    assert_eq!(guest.got(), None);
}

#[test]
fn rfc_5681_4_2_segments_out_of_order_are_kept_and_acknowledged_at_once() {
    let mut guest = Guest::connected();
    let start = guest.next;
    for (at, word) in [(8, "three"), (4, "two "), (4, "two th")] {
        guest.send_as(|head| head.sequence = start.wrapping_add(at), word.as_bytes());
        assert_eq!(guest.got().unwrap().acknowledgement, start);
    }
    guest.send_as(|_| {}, b"one ");
    assert_eq!(guest.sent(), b"one two three");
    while let Some(last) = guest.got() {
        guest.next = last.acknowledgement;
    }
    assert_eq!(guest.next, start.wrapping_add(13));
}

#[test]
fn rfc_9293_3_10_7_4_what_is_outside_of_the_window_is_not_taken() {
    let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(0));
    let start = guest.next;
    guest.send_as(|head| head.sequence = start.wrapping_add((1 << 20) + 1), b"beyond");
    guest.send_as(|head| head.sequence = start.wrapping_sub(100), b"before");
    assert_eq!(guest.got().unwrap().acknowledgement, start);
    assert_eq!(guest.bench.dropped(DropReason::Window), 2);
    // What straddles an edge is taken up to it.
    guest.send_as(|head| head.sequence = start.wrapping_sub(3), b"oldnew");
    assert_eq!(guest.sent(), b"new");
}

#[test]
fn rfc_9293_3_8_6_the_window_closes_when_the_far_end_does_not_read_and_opens_again() {
    let mut bench = Bench::new();
    bench.world().room = 1000;
    let mut guest = Guest::connected_with(bench, |head| head.scale = Some(0));
    let mut sent = 0usize;
    loop {
        guest.send(ACK, &[7; 60_000]);
        let seen = guest.got().unwrap();
        if seen.window == 0 {
            sent += seen.acknowledgement.wrapping_sub(guest.next.wrapping_sub(60_000)) as usize;
            guest.next = seen.acknowledgement;
            break;
        }
        sent += 60_000;
    }
    assert_eq!(sent, (1 << 20) + 1000, "what the socket took, and a window");
    // A probe is answered, and nothing of it taken.
    guest.send_as(|_| {}, b"x");
    let answer = guest.got().unwrap();
    assert_eq!((answer.acknowledgement, answer.window), (guest.next, 0));
    guest.bench.world().streams[0].room = usize::MAX;
    guest.bench.stream_ready(0, Ready { writable: true, ..Ready::default() });
    assert!(guest.got().unwrap().window > 0, "the guest is told");
    assert_eq!(guest.sent().len(), sent);
}

#[test]
fn rfc_6298_5_what_is_not_acknowledged_is_sent_again_with_patience() {
    let mut guest = Guest::connected();
    guest.bench.far_end_sends(0, b"hello");
    assert_eq!(guest.got().unwrap().payload, b"hello");
    let mut waits = Vec::new();
    let mut last = guest.bench.now;
    while waits.len() < 4 {
        guest.bench.pass(Duration::from_millis(10));
        if let Some(again) = guest.got() {
            assert_eq!(again.payload, b"hello");
            waits.push((guest.bench.now - last).as_millis());
            last = guest.bench.now;
        }
    }
    assert_eq!(waits, [200, 400, 800, 1600]);
    guest.expected = guest.expected.wrapping_add(5);
    guest.send(ACK, b"");
    assert_eq!(guest.bench.world().streams[0].queue.len(), 0, "taken out when it is acknowledged");
    guest.bench.pass(Duration::from_secs(60));
    assert_eq!(guest.got(), None);
}

#[test]
fn rfc_9293_3_8_3_a_guest_that_is_gone_ends_the_connection_for_all_to_see() {
    let mut guest = Guest::connected();
    guest.bench.far_end_sends(0, b"hello");
    guest.bench.pass(Duration::from_secs(100));
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.bench.pass(Duration::from_secs(600));
    assert_eq!(guest.bench.engine.flows(), 0);
    assert!(guest.bench.world().streams[0].aborted);
    assert!(std::iter::from_fn(|| guest.got()).last().unwrap().has(RST));
}

#[test]
fn rfc_5681_3_2_three_duplicates_send_again_and_further_ones_do_not() {
    let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(4));
    guest.bench.far_end_sends(0, &[1; 10_000]);
    while guest.got().is_some() {}
    for count in 1..=6 {
        guest.send_as(|_| {}, b"");
        let again = guest.got();
        assert_eq!(again.is_some(), count == 3, "duplicate {count}");
        if let Some(again) = again {
            assert_eq!((again.sequence, again.payload.len()), (guest.expected, 10_000));
        }
    }
}

#[test]
fn rfc_9293_3_8_6_1_a_closed_window_is_probed_and_the_rest_sent_when_it_opens() {
    let mut guest = Guest::connected();
    guest.send_as(|head| head.window = 0, b"");
    guest.bench.far_end_sends(0, b"hello");
    assert_eq!(guest.got(), None);
    let mut probes = 0;
    for _ in 0..600 {
        guest.bench.pass(Duration::from_millis(100));
        while let Some(probe) = guest.got() {
            assert_eq!((probe.sequence, probe.payload.len()), (guest.expected.wrapping_sub(1), 0));
            probes += 1;
            guest.send_as(|head| head.window = 0, b"");
        }
    }
    assert!((8..12).contains(&probes), "{probes} in a minute: further and further apart");
    guest.bench.pass(Duration::from_secs(3600));
    assert_eq!(guest.bench.engine.flows(), 0, "one that answers no more is given up");

    let mut guest = Guest::connected();
    guest.send_as(|head| head.window = 0, b"");
    guest.bench.far_end_sends(0, b"hello");
    guest.send_as(|head| head.window = 3, b"");
    assert_eq!(guest.takes_data(), b"hel");
    guest.send(ACK, b"");
    assert_eq!(guest.takes_data(), b"lo");
}

#[test]
fn rfc_9293_3_6_a_half_close_of_the_guest_leaves_the_other_half_open() {
    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"request");
    assert_eq!(guest.sent(), b"request");
    guest.bench.pass(Duration::from_millis(10));
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next);
    assert!(guest.bench.world().streams[0].shut);
    guest.bench.far_end_sends(0, b"answer");
    assert_eq!(guest.takes_data(), b"answer");
    guest.send(ACK, b"");
    guest.bench.far_end_closes(0);
    let fin = guest.got().unwrap();
    assert!(fin.has(FIN));
    assert_eq!(guest.bench.engine.flows(), 1);
    guest.expected = guest.expected.wrapping_add(1);
    guest.send(ACK, b"");
    assert_eq!(guest.bench.engine.flows(), 0);
    assert!(!guest.bench.world().streams[0].aborted, "an orderly end");
}

#[test]
fn rfc_9293_3_8_6_3_the_far_ends_fin_acknowledges_the_guests() {
    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"");
    guest.bench.pass(Duration::from_millis(9));
    assert_eq!(guest.bench.next_frame(), None, "it waits");
    guest.bench.far_end_closes(0);
    let fin = guest.got().unwrap();
    assert_eq!((fin.has(FIN), fin.acknowledgement), (true, guest.next));
    guest.bench.pass(Duration::from_millis(100));
    assert_eq!(guest.bench.next_frame(), None, "once is enough");
}

#[test]
fn rfc_9293_3_8_6_3_no_acknowledgement_waits_for_a_far_end_that_does_not_close() {
    let mut guest = Guest::connected();
    guest.send(ACK | FIN, b"");
    guest.bench.pass(Duration::from_millis(10));
    let acknowledgement = guest.got().unwrap();
    assert_eq!((acknowledgement.has(FIN), acknowledgement.acknowledgement), (false, guest.next));
    // A FIN that comes again has not been heard of.
    guest.next = guest.next.wrapping_sub(1);
    guest.send(ACK | FIN, b"");
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next);
}

#[test]
fn a_far_end_that_is_to_speak_first_hears_of_its_connection_soon() {
    let mut bench = Bench::new();
    bench.world().crowded = true;
    let mut guest = Guest::connected_with(bench, |_| {});
    assert!(guest.bench.world().streams[0].quiet, "the guest's first bytes may tell");
    guest.bench.pass(Duration::from_millis(1));
    assert!(!guest.bench.world().streams[0].quiet);
    guest.bench.far_end_sends(0, b"hello");
    assert_eq!(guest.takes_data(), b"hello");
}

#[test]
fn rfc_9293_3_6_a_far_end_that_closes_first_still_gets_everything() {
    let mut guest = Guest::connected();
    guest.bench.far_end_closes(0);
    assert!(guest.got().unwrap().has(FIN));
    guest.expected = guest.expected.wrapping_add(1);
    guest.send(ACK, b"late");
    guest.got().unwrap();
    guest.send(ACK | FIN, b"");
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next);
    assert_eq!(guest.sent(), b"late");
    assert_eq!(guest.bench.world().streams_closed.get(&0), Some(&true), "the socket is given back");
    // The last acknowledgement was lost: the FIN comes again.
    guest.next = guest.next.wrapping_sub(1);
    guest.send(ACK | FIN, b"");
    assert_eq!(guest.got().unwrap().acknowledgement, guest.next);
    guest.bench.pass(Duration::from_secs(3));
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_9293_3_6_data_and_the_end_behind_it_told_in_one_event_both_arrive() {
    let mut guest = Guest::connected();
    guest.bench.world().streams[0].queue.extend(b"all there is");
    guest.bench.far_end_closes(0);
    assert_eq!(guest.takes_data(), b"all there is");
    assert!(guest.got().unwrap().has(FIN));
}

#[test]
fn rfc_9293_3_10_7_4_nothing_comes_after_a_fin() {
    let mut guest = Guest::connected();
    let start = guest.next;
    guest.send_as(|head| head.sequence = start.wrapping_add(4), b"after the end");
    guest.send_as(|head| head.flags = ACK | FIN, b"this");
    assert_eq!(guest.sent(), b"this");
    guest.send_as(|head| head.sequence = start.wrapping_add(5), b"and this");
    assert_eq!(guest.sent(), b"this");
    assert!(guest.bench.world().streams[0].shut);
    guest.bench.pass(Duration::from_millis(10));
    let last = std::iter::from_fn(|| guest.got()).last().unwrap();
    assert_eq!(last.acknowledgement, start.wrapping_add(5));
}

#[test]
fn rfc_6191_a_new_connection_takes_the_place_of_one_that_lingers() {
    let mut guest = Guest::connected();
    guest.bench.far_end_closes(0);
    guest.got().unwrap();
    guest.expected = guest.expected.wrapping_add(1);
    guest.send(ACK | FIN, b"");
    guest.got().unwrap();
    guest.send_as(
        |head| {
            (head.flags, head.acknowledgement, head.sequence) =
                (SYN, 0, head.sequence.wrapping_add(1000));
        },
        b"",
    );
    assert_eq!(guest.bench.world().streams.len(), 2);
    guest.bench.far_end_answers(1, Ok(()));
    assert!(guest.got().unwrap().has(SYN | ACK));
}

#[test]
fn rfc_9293_3_5_3_a_far_end_that_resets_resets_the_guest() {
    let mut guest = Guest::connected();
    guest.bench.world().streams[0].broken = true;
    guest.bench.stream_ready(0, Ready { error: true, readable: true, writable: true, more: true });
    let reset = guest.got().unwrap();
    assert!(reset.has(RST));
    assert_eq!(reset.sequence, guest.expected);
    assert_eq!(guest.bench.engine.flows(), 0);
}

#[test]
fn rfc_5382_req_5_silent_connections_end_after_hours_and_half_closed_ones_after_minutes() {
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
fn rfc_1191_a_smaller_path_behind_the_guest_is_respected() {
    let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(4));
    guest.bench.far_end_sends(0, &[1; 5000]);
    let data = guest.got().unwrap();
    assert_eq!((data.payload.len(), data.cut), (5000, 1460));
    let quoted = frame(
        &TcpHead { sequence: data.sequence, ..segment(guest.outside, guest.inside) },
        &data.payload[..100],
    );
    guest.path_is_said_to_carry(1300, &quoted[10..]);
    let again = guest.got().unwrap();
    assert_eq!((again.sequence, again.payload.len(), again.cut), (data.sequence, 5000, 1260));
}

/// The urgent pointer takes no byte out of the stream and no length is computed from it (RFC
/// 6093, 3.1).
#[test]
fn rfc_6093_urgent_data_is_data_in_order_whatever_the_pointer_says() {
    /// The offset of the pointer behind the offload header of the device (10 bytes) and the IPv4
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

/// However small a path is said to be, segments carry payload and all of it arrives (RFC 1191, 3;
/// RFC 8201, 4).
#[test]
fn rfc_1191_a_path_that_is_said_to_be_tiny_still_carries_payload() {
    for mtu in [0_u32, 1, 20, 40, 52, 67, 68, 88, 576, 1279, 65_535, u32::MAX] {
        let mut guest = Guest::connected_with(Bench::new(), |head| head.scale = Some(4));
        guest.bench.far_end_sends(0, &[7; 5000]);
        let data = guest.got().unwrap();
        let quoted = frame(
            &TcpHead { sequence: data.sequence, ..segment(guest.outside, guest.inside) },
            &data.payload[..100],
        );
        guest.path_is_said_to_carry(mtu, &quoted[10..]);
        if let Some(again) = guest.got() {
            assert!(again.cut >= 48, "segments of {} bytes for a path of {mtu}", again.cut);
            assert_eq!(again.payload, data.payload, "{mtu}");
        }
        guest.expected = guest.expected.wrapping_add(5000);
        guest.send(ACK, b"");
        guest.send(ACK, b"still here");
        assert_eq!(guest.sent(), b"still here", "{mtu}");
    }
}

/// An error that quotes too little, or a header of any length, is not read beyond its end (RFC 792;
/// RFC 1812, 4.3.2.3).
#[test]
fn rfc_792_errors_are_read_within_their_bounds_whatever_they_quote() {
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
            guest.path_is_said_to_carry(1300, &quote);
        }
    }
    guest.send(ACK, b"still here");
    assert_eq!(guest.sent(), b"still here");
}
