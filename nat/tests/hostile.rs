//! Hostile guests: no limit is exceeded, and flows of other guests are unaffected.

mod world;

use proptest::prelude::*;
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_model::CidrSet;
use tidegate_nat::flow_table::Limit;
use tidegate_nat::host::{Ready, ReceiveBuffer};
use tidegate_nat::tcp::memory::{NARROW_BYTES, WIDE_BYTES};
use tidegate_nat::wire::head::{self, TcpHead};
use tidegate_nat::wire::protocol;
use tidegate_nat::wire::tcp::flags::{ACK, FIN, PSH, RST, SYN};
use tidegate_nat::{DropReason, FlowKind, Rate, Settings, TableLimits};
use world::{Bench, Random, Seen, at, frame, segment};

const LIMITS: TableLimits = TableLimits {
    flows: 500,
    flows_per_source: 200,
    unanswered_per_source: 50,
    new_flows_per_source: Rate { per_second: 1000, burst: 1000 },
    sessions_per_client: 100,
    held_bytes: 6 << 20,
    errors_per_source: Rate { per_second: 10, burst: 20 },
    sources: 100,
    queued_packets: 1000,
    queued_bytes: 1 << 20,
};

fn bench() -> Bench {
    Bench::with(|settings| {
        settings.limits = LIMITS;
        settings.policy.sources = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
    })
}

/// Another active guest, with a connection and a session that must not be affected.
struct Neighbour {
    stream: usize,
    datagrams: usize,
    next: u32,
    expected: u32,
}

const NEIGHBOUR: &str = "10.9.9.9:5000";
const REMOTE: &str = "192.0.2.9:443";

impl Neighbour {
    fn start(bench: &mut Bench) -> Self {
        let syn = TcpHead { sequence: 99, flags: SYN, ..segment(at(NEIGHBOUR), at(REMOTE)) };
        bench.frame(&frame(&syn, b""));
        let stream = bench.host().streams.len() - 1;
        bench.remote_answers(stream, Ok(()));
        let answer = bench.next_segment().unwrap();
        let mut neighbour =
            Self { stream, datagrams: 0, next: 100, expected: answer.sequence.wrapping_add(1) };
        bench.frame(&frame(&neighbour.head(ACK), b""));
        bench.frame(&udp(at(NEIGHBOUR), at(REMOTE), b"ping"));
        neighbour.datagrams = bench.host().datagrams.len() - 1;
        neighbour.check(bench);
        neighbour
    }

    fn head(&self, flags: u8) -> TcpHead {
        TcpHead {
            sequence: self.next,
            acknowledgement: self.expected,
            flags,
            ..segment(at(NEIGHBOUR), at(REMOTE))
        }
    }

    fn check(&mut self, bench: &mut Bench) {
        bench.host().frames.clear();
        let before = bench.host().streams[self.stream].sent.len();
        bench.frame(&frame(&self.head(ACK | PSH), b"question"));
        self.next += 8;
        assert_eq!(&bench.host().streams[self.stream].sent[before..], b"question");
        bench.host().frames.clear();
        bench.remote_sends(self.stream, b"answer");
        let seen = bench.next_segment().unwrap();
        assert_eq!((seen.sequence, &seen.payload[..]), (self.expected, &b"answer"[..]));
        self.expected = self.expected.wrapping_add(6);
        bench.frame(&frame(&self.head(ACK), b""));
        let index = self.datagrams;
        let before = bench.host().datagrams[index].sent.len();
        bench.frame(&udp(at(NEIGHBOUR), at(REMOTE), b"ping"));
        assert_eq!(bench.host().datagrams[index].sent.len(), before + 1);
        bench.host().datagrams[index].waiting.push_back(b"pong".to_vec());
        bench.host().frames.clear();
        bench.datagrams_ready(index, Ready { readable: true, ..Ready::default() });
        assert!(bench.next_frame().unwrap().ends_with(b"pong"));
    }
}

fn udp(source: SocketAddr, destination: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let head = head::datagrams(source, destination, payload.len(), payload.len(), 1);
    [head.bytes(), payload].concat()
}

fn assert_limits(bench: &Bench) {
    assert!(bench.engine.flows() <= LIMITS.flows);
}

#[test]
fn a_syn_flood_is_limited_to_its_share() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    for port in 1..20_000u16 {
        let syn =
            TcpHead { flags: SYN, ..segment(at(&format!("10.0.0.1:{port}")), at("192.0.2.1:80")) };
        bench.frame(&frame(&syn, b""));
        assert_limits(&bench);
    }
    assert_eq!(bench.stats.flows(FlowKind::Tcp), 1 + LIMITS.unanswered_per_source as u64);
    assert_eq!(bench.dropped(DropReason::Unanswered), 19_999 - LIMITS.unanswered_per_source as u64);
    neighbour.check(&mut bench);
    bench.pass(Duration::from_secs(80));
    assert_eq!(bench.stats.flows(FlowKind::Tcp), 1, "unanswered connections end");
    neighbour.check(&mut bench);
}

#[test]
fn connections_that_the_guest_never_completes_count_as_unanswered() {
    let mut bench = bench();
    bench.host().connect_result_at_once = Some(Ok(()));
    for port in 1..1000u16 {
        let syn =
            TcpHead { flags: SYN, ..segment(at(&format!("10.0.0.1:{port}")), at("192.0.2.1:80")) };
        bench.frame(&frame(&syn, b""));
    }
    assert_eq!(bench.engine.flows(), LIMITS.unanswered_per_source);
    bench.pass(Duration::from_secs(1000));
    assert_eq!(bench.engine.flows(), 0);
    assert_eq!(bench.host().open, 0, "all sockets are closed");
}

#[test]
fn the_number_of_sources_is_limited() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    for number in 0..1_000_000u32 {
        let source = SocketAddr::from(((0x0a00_0000 + number).to_be_bytes(), 1000));
        let now = bench.now;
        bench.engine.frame(&udp(source, at("192.0.2.1:9"), b"x"), now);
    }
    bench.settle();
    assert_limits(&bench);
    assert!(bench.dropped(DropReason::Sources) > 999_000);
    let outside = udp(at("172.16.0.1:9"), at("192.0.2.1:9"), b"x");
    bench.frame(&outside);
    assert_eq!(bench.dropped(DropReason::ForeignSource), 1);
    neighbour.check(&mut bench);
}

#[test]
fn a_flood_of_sessions_evicts_itself() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    for host in 1..50u8 {
        for port in 1..100u16 {
            bench.frame(&udp(SocketAddr::from(([10, 0, 0, host], port)), at("192.0.2.1:9"), b"x"));
            assert_limits(&bench);
        }
    }
    assert!(bench.stats.evicted.get() + bench.dropped(DropReason::Unanswered) > 4000);
    neighbour.check(&mut bench);
}

#[test]
fn descriptor_exhaustion_evicts_unanswered_flows_first() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    bench.host().descriptors = 12;
    for port in 1..100u16 {
        bench.frame(&udp(SocketAddr::from(([10, 0, 0, 1], port)), at("192.0.2.1:9"), b"x"));
    }
    assert!(bench.host().open <= 12);
    assert!(bench.dropped(DropReason::Descriptors) > 0);
    bench.pass(Duration::from_millis(200));
    let syn = TcpHead { flags: SYN, ..segment(at("10.0.0.2:1"), at("192.0.2.1:80")) };
    let connections = bench.host().streams.len();
    bench.frame(&frame(&syn, b""));
    assert_eq!(bench.host().streams.len(), connections + 1, "a descriptor was freed");
    neighbour.check(&mut bench);
}

/// Opens a connection from `source` to a server that accepts at once.
fn open(bench: &mut Bench, source: SocketAddr) -> TcpHead {
    let head = segment(source, at("192.0.2.1:80"));
    bench.frame(&frame(&TcpHead { flags: SYN, scale: Some(0), ..head }, b""));
    let answer = std::iter::from_fn(|| bench.next_segment()).last().unwrap();
    let head = TcpHead { sequence: 1, acknowledgement: answer.sequence.wrapping_add(1), ..head };
    bench.frame(&frame(&head, b""));
    head
}

#[test]
fn buffers_are_limited_per_source() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    bench.host().room = 0;
    bench.host().connect_result_at_once = Some(Ok(()));
    let mut kept = 0usize;
    for port in 1..5u16 {
        let head = open(&mut bench, SocketAddr::from(([10, 0, 0, 1], port)));
        // In order until the window is closed, and then far beyond it.
        let mut next = 1u32;
        for _ in 0..30 {
            bench.frame(&frame(&TcpHead { sequence: next, ..head }, &[1; 60_000]));
            let seen = std::iter::from_fn(|| bench.next_segment()).last().unwrap();
            next = seen.acknowledgement;
        }
        kept += next as usize - 1;
        bench.frame(&frame(&TcpHead { sequence: next + 500_000, ..head }, &[1; 60_000]));
    }
    // One source gets two thirds of the budget; sockets that are full are charged in any case.
    let held = bench.stats.held_bytes.get() as usize;
    let share = LIMITS.held_bytes * 2 / 3;
    assert!(kept < held, "{kept}, {held}");
    assert!((share * 9 / 10..=share + 2 * NARROW_BYTES).contains(&held), "{held}");
    assert_eq!(bench.stats.evicted_by_limit[Limit::HeldBytes as usize].get(), 0);
    neighbour.check(&mut bench);
}

#[test]
fn a_guest_that_does_not_read_loses_its_longest_blocked_connection() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    bench.host().connect_result_at_once = Some(Ok(()));
    let first = bench.host().streams.len();
    let evicted = |bench: &Bench| bench.stats.evicted_by_limit[Limit::HeldBytes as usize].get();
    let stall = |bench: &mut Bench, source: SocketAddr| {
        let head = open(bench, source);
        bench.frame(&frame(&TcpHead { sequence: 1, window: 100, ..head }, b""));
        let index = bench.host().streams.len() - 1;
        bench.remote_sends(index, &[7; 60_000]);
        index
    };
    let other = stall(&mut bench, at("10.0.0.2:1"));
    let budget = LIMITS.held_bytes / NARROW_BYTES;
    for port in 1..budget as u16 {
        stall(&mut bench, SocketAddr::from(([10, 0, 0, 1], port)));
    }
    assert_eq!((evicted(&bench), bench.stats.held_bytes.get()), (0, LIMITS.held_bytes as u64));
    for port in 100..105 {
        stall(&mut bench, SocketAddr::from(([10, 0, 0, 1], port)));
    }
    assert_eq!((evicted(&bench), bench.stats.held_bytes.get()), (5, LIMITS.held_bytes as u64));
    let aborted: Vec<usize> = (first..bench.host().streams.len())
        .filter(|index| bench.host().streams[*index].aborted)
        .collect();
    assert_eq!(aborted, (other + 1..=other + 5).collect::<Vec<_>>());
    assert_eq!(bench.host().streams[other].receive_buffer, Some(ReceiveBuffer::Narrow));
    neighbour.check(&mut bench);
}

/// The server sends at once, and the guest never completes the handshake.
#[test]
fn data_before_the_end_of_the_handshake_is_charged() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    bench.host().connect_result_at_once = Some(Ok(()));
    for port in 1..40u16 {
        let head = segment(SocketAddr::from(([10, 0, 0, 1], port)), at("192.0.2.1:80"));
        bench.frame(&frame(&TcpHead { flags: SYN, ..head }, b""));
        let index = bench.host().streams.len() - 1;
        bench.remote_sends(index, &[7; 60_000]);
        assert!(bench.stats.held_bytes.get() <= LIMITS.held_bytes as u64);
    }
    assert!(bench.stats.evicted_by_limit[Limit::HeldBytes as usize].get() > 20);
    neighbour.check(&mut bench);
}

#[test]
fn a_guest_that_reads_gets_a_wide_buffer_until_it_is_idle() {
    let mut bench = bench();
    bench.host().connect_result_at_once = Some(Ok(()));
    let head = open(&mut bench, at("10.0.0.1:1"));
    let index = bench.host().streams.len() - 1;
    let mut expected = head.acknowledgement;
    let mut download = |bench: &mut Bench| {
        bench.remote_sends(index, &[7; 30_000]);
        for seen in std::iter::from_fn(|| bench.next_segment()).collect::<Vec<_>>() {
            expected = expected.max(seen.sequence.wrapping_add(seen.payload.len() as u32));
        }
        bench.frame(&frame(&TcpHead { acknowledgement: expected, ..head }, b""));
        bench.host().streams[index].receive_buffer
    };
    assert_eq!(download(&mut bench), Some(ReceiveBuffer::Narrow));
    let sizes: Vec<_> = (0..10).map(|_| download(&mut bench)).collect();
    assert_eq!(sizes.last().unwrap(), &Some(ReceiveBuffer::Wide));
    assert_eq!(bench.stats.held_bytes.get(), WIDE_BYTES as u64);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.host().streams[index].receive_buffer, Some(ReceiveBuffer::Narrow));
    assert_eq!(bench.stats.held_bytes.get(), 0);
}

#[test]
fn overlapping_fragments_are_dropped() {
    let mut bench = bench();
    let (source, destination) = (at("10.0.0.1:7"), at("192.0.2.1:9"));
    let payload = [7; 2000];
    let whole =
        [&head::checksummed_udp_header(source, destination, &payload)[..], &payload].concat();
    let mut piece = |range: std::ops::Range<usize>, more, id| {
        let head =
            head::fragment(source.ip(), destination.ip(), protocol::UDP, range.clone(), more, id);
        bench.frame(&[head.bytes(), &whole[range]].concat());
    };
    piece(0..1000, true, 1);
    piece(800..1600, true, 1);
    piece(1600..2008, false, 1);
    piece(0..1000, true, 2);
    piece(1000..2008, false, 2);
    assert_eq!(bench.host().datagrams.len(), 1);
    assert_eq!(
        bench.host().datagrams[0].sent,
        [payload.to_vec()],
        "only the second packet, which is valid"
    );
    assert!(!bench.host().datagrams[0].dont_fragment);
}

#[test]
fn first_fragments_without_the_rest_are_limited() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    let mut random = Random(5);
    for id in 0..200_000u32 {
        let source = at(&format!("10.0.0.{}:0", 1 + random.below(200)));
        let offset = random.below(8000) as usize * 8;
        let head = head::fragment(
            source.ip(),
            at(REMOTE).ip(),
            protocol::UDP,
            offset..offset + 400,
            true,
            id,
        );
        let now = bench.now;
        bench.engine.frame(&[head.bytes(), &[0; 400]].concat(), now);
    }
    neighbour.check(&mut bench);
    bench.pass(Duration::from_secs(31));
    assert_eq!(bench.stats.flows(FlowKind::Tcp), 1);
}

#[test]
fn errors_and_resets_are_rate_limited() {
    let mut bench = Bench::with(|settings| {
        settings.policy.refused = CidrSet::parse(["198.51.100.0/24"]).unwrap();
        settings.limits.errors_per_source = Rate { per_second: 10, burst: 20 };
    });
    for port in 1..10_000u16 {
        bench.frame(&udp(SocketAddr::from(([10, 0, 0, 1], port)), at("198.51.100.1:9"), b"x"));
        let stray =
            TcpHead { flags: ACK, ..segment(at(&format!("10.0.0.1:{port}")), at("192.0.2.1:80")) };
        bench.frame(&frame(&stray, b""));
    }
    assert_eq!(bench.host().frames.len(), 20);
    assert_eq!(bench.dropped(DropReason::Policy), 9999);
    bench.frame(&udp(at(NEIGHBOUR), at("198.51.100.1:9"), b"x"));
    assert_eq!(bench.host().frames.len(), 21, "a neighbour still gets errors");
}

#[test]
fn forged_errors_about_others_flows_change_nothing() {
    let mut bench = bench();
    let mut neighbour = Neighbour::start(&mut bench);
    let quoted = udp(at(REMOTE), at(NEIGHBOUR), b"pong");
    let (head, message) = head::icmp_error(
        at("10.0.0.1:0").ip(),
        at(REMOTE).ip(),
        tidegate_nat::wire::icmp::IcmpError::PortUnreachable,
        &[&quoted[10..]],
    );
    bench.frame(&[head.bytes(), &message].concat());
    neighbour.check(&mut bench);
}

/// Segments of any kind for a connection in any state.
fn anything() -> impl Strategy<Value = (u8, u32, u32, u16, usize, bool)> {
    let near = prop_oneof![
        0u32..3000,
        (u32::MAX - 3000)..,
        any::<u32>(),
        (1u32 << 20) - 2000..(1 << 20) + 2000
    ];
    let flags =
        prop_oneof![Just(ACK), Just(ACK | FIN), Just(SYN), Just(RST), Just(RST | ACK), any::<u8>()];
    (flags, near.clone(), near, any::<u16>(), 0usize..3000, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_segments_breaks_the_engine_or_a_neighbour(
        segments in prop::collection::vec((anything(), 0u64..400, 0u8..10), 1..80),
    ) {
        let mut bench = bench();
        let mut neighbour = Neighbour::start(&mut bench);
        let (inside, outside) = (at("10.0.0.1:7"), at("192.0.2.1:80"));
        let mut expected = 0;
        bench.host().room = 50_000;
        for ((flags, sequence, acknowledgement, window, length, echo), wait, act) in segments {
            let head = TcpHead {
                sequence,
                acknowledgement: acknowledgement.wrapping_add(expected),
                flags,
                window,
                scale: echo.then_some(14),
                timestamps: echo.then_some((sequence, acknowledgement)),
                mss: (flags & SYN != 0).then_some(window),
                ..segment(inside, outside)
            };
            bench.frame(&frame(&head, &vec![1; length]));
            let last = bench.host().streams.len() - 1;
            if last != neighbour.stream {
                match act {
                    0 => bench.remote_answers(last, Ok(())),
                    1 if bench.host().streams[last].answer.is_some() => bench.remote_sends(last, &[5; 3000]),
                    2 => bench.remote_closes(last),
                    3 if bench.host().streams[last].answer.is_some() => bench.stream_ready(last, Ready { writable: true, ..Ready::default() }),
                    4 => {
                        bench.host().streams[last].broken = true;
                        bench.stream_ready(last, Ready { error: true, ..Ready::default() });
                    }
                    _ => {}
                }
            }
            while let Some(frame) = bench.next_frame() {
                if let Some(seen) = Seen::of(&frame) && seen.flags & SYN != 0 {
                    expected = seen.sequence.wrapping_add(1);
                }
            }
            bench.pass(Duration::from_millis(wait));
        }
        neighbour.check(&mut bench);
        bench.pass(Duration::from_secs(3 * 3600));
        prop_assert_eq!(bench.engine.flows(), 0);
        prop_assert_eq!(bench.host().open, 0);
    }

    #[test]
    fn arbitrary_bytes_do_not_break_the_engine(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..50)) {
        let mut bench = bench();
        let mut neighbour = Neighbour::start(&mut bench);
        for mut frame in frames {
            // Some frames must pass the first check.
            if frame.len() > 30 {
                frame[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 20, 0, 16, 0]);
                frame[10] = if frame[20] % 2 == 0 { 0x45 } else { 0x60 };
            }
            bench.frame(&frame);
        }
        neighbour.check(&mut bench);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Runs the check of the fuzz target with steps that are valid more often than those of a
    /// fuzzer.
    #[test]
    fn frames_events_and_time_in_any_order_hold(
        steps in prop::collection::vec((anything(), any::<[u8; 4]>(), 0u8..4), 1..60),
    ) {
        let mut data = Vec::new();
        for ((flags, sequence, acknowledgement, window, length, echo), event, which) in steps {
            let (inside, outside) = (at("10.0.0.1:7"), at("192.0.2.1:80"));
            match which {
                0 => {
                    let head = TcpHead { sequence, acknowledgement, flags, window, ..segment(inside, outside) };
                    let frame = frame(&head, &vec![1; length]);
                    data.push(0);
                    data.extend((frame.len() as u16).to_be_bytes());
                    data.extend(frame);
                }
                1 => {
                    let frame = udp(inside, outside, &vec![1; length]);
                    data.push(u8::from(echo));
                    data.extend((frame.len() as u16).to_be_bytes());
                    data.extend(frame);
                }
                2 => data.extend([2, event[0], event[1], event[2]]),
                _ => data.extend([3, event[3]]),
            }
        }
        tidegate_nat::fuzz::check_engine(&data);
    }

    #[test]
    fn arbitrary_fuzz_input_holds(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        tidegate_nat::fuzz::check_engine(&data);
    }
}

#[test]
fn every_limit_can_be_one() {
    let mut bench = Bench::with(|settings: &mut Settings| {
        settings.limits = TableLimits {
            flows: 1,
            flows_per_source: 1,
            unanswered_per_source: 1,
            new_flows_per_source: Rate { per_second: 1, burst: 1 },
            sessions_per_client: usize::MAX,
            held_bytes: 1,
            errors_per_source: Rate { per_second: 1, burst: 1 },
            sources: 1,
            queued_packets: 1,
            queued_bytes: 1,
        };
    });
    bench.frame(&udp(at("10.0.0.1:1"), at("192.0.2.1:1"), b"x"));
    bench.frame(&udp(at("10.0.0.1:2"), at("192.0.2.1:1"), b"x"));
    bench.frame(&udp(at("10.0.0.2:2"), at("192.0.2.1:1"), b"x"));
    assert_eq!(bench.engine.flows(), 1);
}
