//! Simulation of a connection in simulated time. The link between guest and engine loses,
//! duplicates, delays and reorders packets.
//!
//! In every run, each byte arrives exactly once and in order, or the connection ends visibly: one
//! side sees a reset. A run is determined by its seed.

mod world;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tidegate_nat::host::Ready;
use tidegate_nat::wire::head::TcpHead;
use tidegate_nat::wire::tcp::flags::{ACK, FIN, PSH, RST, SYN};
use tidegate_nat::{ForwardSource, Settings};
use world::{Bench, Random, Seen, at, frame, segment};

/// Properties of the link and of both sides in a run.
#[derive(Clone, Copy, Debug)]
struct Conditions {
    loss: u64,
    duplication: u64,
    /// Maximum random delay of each packet in milliseconds.
    delay: u64,
    up: usize,
    down: usize,
    /// Receive window of the guest.
    window: usize,
    scale: Option<u8>,
    timestamps: bool,
    mss: u16,
    /// Bytes that the remote side accepts at a time.
    read_size: usize,
    guest_closes_first: bool,
    /// The remote side is a client of a published port, and opens the connection.
    inbound: bool,
}

const LOSSLESS: Conditions = Conditions {
    loss: 0,
    duplication: 0,
    delay: 1,
    up: 300_000,
    down: 300_000,
    window: 1 << 20,
    scale: Some(7),
    timestamps: true,
    mss: 1460,
    read_size: usize::MAX,
    guest_closes_first: true,
    inbound: false,
};

fn byte(position: usize) -> u8 {
    (position as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(byte).collect()
}

/// A minimal TCP implementation for the guest.
struct Guest {
    conditions: Conditions,
    inside: SocketAddr,
    outside: SocketAddr,
    iss: u32,
    /// Positions in the stream: 0 is the SYN, 1 the first byte.
    una: usize,
    nxt: usize,
    window: usize,
    established: bool,
    /// A SYN of the engine was received.
    syn_received: bool,
    irs: u32,
    received: Vec<u8>,
    out_of_order: BTreeMap<usize, Vec<u8>>,
    fin_at: Option<usize>,
    fin_received: bool,
    may_close: bool,
    resend_at: Option<Instant>,
    tries: u32,
    dup: u32,
    reset: bool,
    done_at: Option<Instant>,
    echo: u32,
    scaled: bool,
}

impl Guest {
    fn new(conditions: Conditions) -> Self {
        Self {
            conditions,
            inside: at("10.0.2.100:40000"),
            outside: at("192.0.2.2:80"),
            iss: u32::MAX - 5000,
            una: 0,
            nxt: 0,
            window: 1,
            established: false,
            syn_received: false,
            irs: 0,
            received: Vec::new(),
            out_of_order: BTreeMap::new(),
            fin_at: None,
            fin_received: false,
            may_close: conditions.guest_closes_first,
            resend_at: None,
            tries: 0,
            dup: 0,
            reset: false,
            done_at: None,
            echo: 0,
            scaled: false,
        }
    }

    /// Length of the stream in sequence numbers: SYN, bytes, FIN.
    fn end(&self) -> usize {
        1 + self.conditions.up + usize::from(self.may_close)
    }

    fn sent_all(&self) -> bool {
        self.may_close && self.una == 2 + self.conditions.up
    }

    fn acknowledgement(&self) -> u32 {
        let received = 1 + self.received.len() + usize::from(self.fin_received);
        self.irs.wrapping_add(received as u32)
    }

    fn write(&self, at: usize, flags: u8, payload: &[u8], now: Duration) -> Vec<u8> {
        let kept: usize = self.out_of_order.values().map(Vec::len).sum();
        let free = self.conditions.window.saturating_sub(kept);
        let syn = flags & SYN != 0;
        let window = match self.conditions.scale {
            Some(scale) if self.scaled && !syn => free >> scale,
            _ => free,
        };
        let head = TcpHead {
            sequence: self.iss.wrapping_add(at as u32),
            acknowledgement: if syn && !self.syn_received { 0 } else { self.acknowledgement() },
            flags,
            window: window.min(0xffff) as u16,
            mss: syn.then_some(self.conditions.mss),
            scale: self.conditions.scale.filter(|_| syn),
            timestamps: self.conditions.timestamps.then(|| (now.as_millis() as u32 + 1, self.echo)),
            ..segment(self.inside, self.outside)
        };
        frame(&head, payload)
    }

    /// Sends what is due now.
    fn transmit(&mut self, now: Instant, clock: Duration, out: &mut Vec<Vec<u8>>) {
        if self.reset || self.done_at.is_some() || self.conditions.inbound && !self.syn_received {
            return;
        }
        if self.resend_at.is_some_and(|at| at <= now) {
            self.tries += 1;
            if self.tries > 15 {
                out.push(self.write(self.nxt, RST | ACK, b"", clock));
                self.reset = true;
                return;
            }
            self.nxt = self.una;
            self.resend_at = None;
        }
        // A closed window is probed with one byte.
        let window = if self.tries > 0 && self.window == 0 { 1 } else { self.window };
        while self.nxt < self.end() && self.nxt < self.una + window {
            let bytes = 1 + self.conditions.up;
            let (flags, payload) = if self.nxt == 0 {
                (if self.syn_received { SYN | ACK } else { SYN }, Vec::new())
            } else if self.nxt < bytes {
                // Large segments, as with offload.
                let room = (self.una + window - self.nxt).min(4 * usize::from(self.conditions.mss));
                let length = room.min(bytes - self.nxt);
                (ACK | PSH, (self.nxt - 1..self.nxt - 1 + length).map(byte).collect())
            } else {
                (ACK | FIN, Vec::new())
            };
            out.push(self.write(self.nxt, flags, &payload, clock));
            self.nxt += payload.len().max(1);
            if !self.established {
                break;
            }
        }
        if self.nxt > self.una || self.window == 0 && self.nxt < self.end() {
            let wait = Duration::from_millis(200) * 2u32.pow(self.tries.min(6));
            self.resend_at.get_or_insert(now + wait);
        }
    }

    fn receive(&mut self, seen: &Seen, now: Instant, clock: Duration, out: &mut Vec<Vec<u8>>) {
        if self.reset {
            return;
        }
        if seen.has(RST) {
            let ours = self.iss.wrapping_add(self.nxt as u32);
            let answers_syn = !self.established && seen.acknowledgement == self.iss.wrapping_add(1);
            if answers_syn
                || (self.established || self.syn_received)
                    && (seen.sequence == self.acknowledgement() || ours == seen.acknowledgement)
            {
                self.reset = true;
            }
            return;
        }
        if self.conditions.inbound && !self.established {
            if seen.has(SYN) {
                if !self.syn_received {
                    (self.syn_received, self.irs, self.scaled) =
                        (true, seen.sequence, seen.scale.is_some());
                    self.scaled &= self.conditions.scale.is_some();
                    self.echo = seen.timestamps.map_or(0, |stamps| stamps.0);
                }
                // Sends the SYN-ACK again, in case the first was lost.
                (self.nxt, self.resend_at) = (0, None);
                return;
            }
            if !self.syn_received || seen.acknowledgement != self.iss.wrapping_add(1) {
                return;
            }
            self.established = true;
            (self.una, self.nxt, self.tries, self.resend_at) = (1, 1, 0, None);
            self.window = usize::from(seen.window) << if self.scaled { 5 } else { 0 };
        }
        if !self.established {
            if !seen.has(SYN | ACK) {
                return;
            }
            (self.established, self.irs, self.scaled) = (true, seen.sequence, seen.scale.is_some());
            self.scaled &= self.conditions.scale.is_some();
            (self.una, self.nxt, self.resend_at) = (1, 1, None);
            self.window = seen.window.into();
            self.echo = seen.timestamps.map_or(0, |stamps| stamps.0);
            out.push(self.write(1, ACK, b"", clock));
            return;
        }
        if seen.has(SYN) {
            out.push(self.write(self.nxt, ACK, b"", clock));
            return;
        }
        let position = seen.acknowledgement.wrapping_sub(self.iss) as usize;
        let window = usize::from(seen.window) << if self.scaled { 5 } else { 0 };
        if position > self.una && position <= self.end() {
            (self.una, self.nxt) = (position, self.nxt.max(position));
            (self.tries, self.dup, self.resend_at) = (0, 0, None);
            self.window = window;
        } else if position == self.una {
            self.dup +=
                u32::from(seen.payload.is_empty() && window == self.window && self.nxt > self.una);
            if self.window == 0 && window > 0 {
                (self.tries, self.resend_at) = (0, None);
            }
            self.window = window;
            if self.dup == 3 {
                self.nxt = self.una;
            }
        }
        // Positions start at the SYN: the first byte has 1.
        let at = seen.sequence.wrapping_sub(self.irs) as i32 as i64 - 1;
        if seen.has(FIN) {
            self.fin_at = Some((at + seen.payload.len() as i64) as usize);
        }
        let next = self.received.len() as i64;
        if !seen.payload.is_empty() && at + seen.payload.len() as i64 > next {
            if at <= next {
                self.received.extend_from_slice(&seen.payload[(next - at) as usize..]);
                while let Some((at, bytes)) = self.out_of_order.pop_first() {
                    if at > self.received.len() {
                        self.out_of_order.insert(at, bytes);
                        break;
                    }
                    let known = self.received.len() - at;
                    self.received.extend_from_slice(bytes.get(known..).unwrap_or_default());
                }
            } else if (at as usize) < self.received.len() + self.conditions.window {
                self.out_of_order.insert(at as usize, seen.payload.clone());
            }
        }
        self.fin_received |= self.fin_at == Some(self.received.len());
        let probed = seen.sequence != self.acknowledgement();
        if !seen.payload.is_empty() || seen.has(FIN) || probed {
            if let Some((value, _)) = seen.timestamps {
                self.echo = value;
            }
            out.push(self.write(self.nxt, ACK, b"", clock));
        }
        self.may_close |= self.fin_received;
        if self.fin_received && self.sent_all() {
            self.done_at.get_or_insert(now);
        }
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    ToEngine(Vec<u8>),
    ToGuest(Vec<u8>),
    FarEnd,
}

#[derive(Debug)]
struct Report {
    guest_reset: bool,
    remote_reset: bool,
    up: Vec<u8>,
    up_ended: bool,
    down: Vec<u8>,
    down_ended: bool,
    took: Duration,
    flows_left: usize,
}

impl Report {
    fn is_complete(&self, conditions: &Conditions) -> bool {
        self.up_ended
            && self.down_ended
            && self.up.len() == conditions.up
            && self.down.len() == conditions.down
    }
}

fn run(conditions: Conditions, seed: u64, change: impl FnOnce(&mut Settings)) -> Report {
    let mut random = Random(seed);
    let mut bench = Bench::with(change);
    bench.host().room = conditions.read_size.min(100_000);
    bench.host().connect_result_at_once = Some(Ok(()));
    let mut guest = Guest::new(conditions);
    if conditions.inbound {
        bench.publish_tcp(&guest.inside.to_string(), ForwardSource::Client);
        bench.client(0, &guest.outside.to_string());
    }
    let start = bench.now;
    let mut events: BinaryHeap<Reverse<(Instant, u64, Event)>> = BinaryHeap::new();
    let mut order = 0;
    let mut fed = 0;
    let mut out = Vec::new();
    // Longer than the engine keeps a connection of a guest that disappeared.
    let limit = start + Duration::from_secs(3 * 3600);
    events.push(Reverse((start, 0, Event::FarEnd)));
    for step in 0.. {
        assert!(step < 4_000_000, "seed {seed}: not finished at {:?}", bench.now - start);
        guest.transmit(bench.now, bench.now - start, &mut out);
        let mut travel =
            |event: Event, random: &mut Random, events: &mut BinaryHeap<_>, now: Instant| {
                if random.percent(conditions.loss) {
                    return;
                }
                let copies = 1 + u32::from(random.percent(conditions.duplication));
                for copy in 0..copies {
                    let delay = Duration::from_micros(10 + random.below(conditions.delay * 1000));
                    order += 1;
                    let event = match (&event, copy) {
                        (Event::ToEngine(bytes), _) => Event::ToEngine(bytes.clone()),
                        (Event::ToGuest(bytes), _) => Event::ToGuest(bytes.clone()),
                        (Event::FarEnd, _) => Event::FarEnd,
                    };
                    events.push(Reverse((now + delay, order, event)));
                }
            };
        for frame in out.drain(..) {
            travel(Event::ToEngine(frame), &mut random, &mut events, bench.now);
        }
        while let Some(frame) = bench.next_frame() {
            for piece in cut(&frame) {
                travel(Event::ToGuest(piece), &mut random, &mut events, bench.now);
            }
        }
        let next_event = events.peek().map(|Reverse((at, _, _))| *at);
        let resend_at = guest.resend_at.filter(|_| !guest.reset && guest.done_at.is_none());
        let timers = [bench.engine.poll_timeout(), resend_at, next_event];
        let Some(next) = timers.into_iter().flatten().min() else { break };
        if next > limit || guest.reset && bench.engine.flows() == 0 {
            break;
        }
        bench.now = bench.now.max(next);
        if bench.engine.poll_timeout().is_some_and(|at| at <= bench.now) {
            let now = bench.now;
            bench.engine.handle_timeout(now);
            bench.settle();
        }
        if next_event.is_none_or(|at| at > bench.now) {
            continue;
        }
        let Some(Reverse((_, _, event))) = events.pop() else { break };
        match event {
            Event::ToEngine(frame) => bench.frame(&frame),
            Event::ToGuest(frame) => {
                let seen = Seen::of(&frame).expect("a segment");
                guest.receive(&seen, bench.now, bench.now - start, &mut out);
            }
            Event::FarEnd => {
                // The remote side reads some, sends some, and closes when everything is sent.
                if let Some(stream) = bench.host().streams.first_mut() {
                    stream.room = stream.room.max(conditions.read_size.min(100_000));
                    let queued = stream.queue.len();
                    let more = (conditions.down - fed)
                        .min(200_000usize.saturating_sub(queued))
                        .min(50_000);
                    stream.queue.extend((fed..fed + more).map(byte));
                    fed += more;
                    let close =
                        fed == conditions.down && (!conditions.guest_closes_first || stream.shut);
                    stream.ended |= close;
                    bench.stream_ready(
                        0,
                        Ready { readable: true, writable: true, error: false, more: close },
                    );
                }
                let begun = !bench.host().streams.is_empty();
                let over = begun && bench.engine.flows() == 0;
                if !over && !guest.reset {
                    order += 1;
                    events.push(Reverse((
                        bench.now + Duration::from_millis(1),
                        order,
                        Event::FarEnd,
                    )));
                }
            }
        }
    }
    let took = bench.now - start;
    let flows_left = bench.engine.flows();
    // There is no stream if no SYN arrived.
    let stream = bench.host().streams.drain(..).next().unwrap_or_default();
    Report {
        guest_reset: guest.reset,
        remote_reset: stream.aborted,
        up: stream.sent,
        up_ended: stream.shut && !stream.aborted,
        down: guest.received,
        down_ended: guest.fin_received,
        took,
        flows_left,
    }
}

/// Segments a packet as the kernel of the guest would, so that single segments can be lost.
fn cut(bytes: &[u8]) -> Vec<Vec<u8>> {
    let seen = Seen::of(bytes).expect("a segment");
    if seen.cut == 0 {
        return vec![bytes.to_vec()];
    }
    let pieces = seen.payload.chunks(seen.cut.into()).enumerate();
    pieces
        .map(|(index, payload)| {
            let head = TcpHead {
                sequence: seen.sequence.wrapping_add(index as u32 * u32::from(seen.cut)),
                acknowledgement: seen.acknowledgement,
                flags: seen.flags,
                window: seen.window,
                timestamps: seen.timestamps,
                ..segment(at("192.0.2.2:80"), at("10.0.2.100:40000"))
            };
            frame(&head, payload)
        })
        .collect()
}

/// Checks the invariants of every run.
fn check(conditions: Conditions, seed: u64) -> Report {
    check_with(conditions, seed, |_| {})
}

fn check_with(conditions: Conditions, seed: u64, change: impl FnOnce(&mut Settings)) -> Report {
    let report = run(conditions, seed, change);
    let context = format!("seed {seed}, {conditions:?}, after {:?}", report.took);
    assert_eq!(
        report.up,
        pattern(conditions.up)[..report.up.len().min(conditions.up)],
        "up: {context}"
    );
    assert_eq!(
        report.down,
        pattern(conditions.down)[..report.down.len().min(conditions.down)],
        "down: {context}"
    );
    if report.up_ended {
        assert_eq!(report.up.len(), conditions.up, "premature end, up: {context}");
    }
    if report.down_ended {
        assert_eq!(report.down.len(), conditions.down, "premature end, down: {context}");
    }
    let visible = report.guest_reset || report.remote_reset;
    assert!(
        report.is_complete(&conditions) || visible,
        "invisible end of the connection: {context}"
    );
    assert_eq!(report.flows_left, 0, "no flow remains: {context}");
    report
}

#[test]
fn without_loss_all_data_arrives() {
    for (guest_closes_first, inbound) in
        [(true, false), (false, false), (true, true), (false, true)]
    {
        let conditions = Conditions { guest_closes_first, inbound, ..LOSSLESS };
        let report = check(conditions, 1);
        assert!(report.is_complete(&conditions), "{report:?}");
        assert!(!report.guest_reset && !report.remote_reset);
    }
}

#[test]
fn with_loss_all_data_arrives() {
    for seed in 0..40 {
        let conditions = Conditions {
            loss: 1 + seed % 20,
            duplication: seed % 7,
            delay: 1 + seed % 30,
            guest_closes_first: seed % 2 == 0,
            inbound: seed % 4 > 1,
            up: 60_000,
            down: 60_000,
            ..LOSSLESS
        };
        let report = check(conditions, seed);
        assert!(report.is_complete(&conditions), "seed {seed}: {conditions:?}");
    }
}

#[test]
fn with_reordering_and_duplication_each_byte_arrives_once() {
    for seed in 0..20 {
        let inbound = seed % 2 == 1;
        let conditions = Conditions {
            duplication: 30,
            delay: 50,
            up: 200_000,
            down: 200_000,
            inbound,
            ..LOSSLESS
        };
        assert!(check(conditions, seed).is_complete(&conditions), "seed {seed}");
    }
}

#[test]
fn with_tiny_windows_all_data_arrives() {
    for (window, mss) in [(1, 1460), (100, 1460), (1460, 1460), (3000, 88), (65_535, 536)] {
        for seed in 0..4 {
            let size = if window < 1000 { 2000 } else { 50_000 };
            let conditions = Conditions {
                window,
                mss,
                scale: None,
                timestamps: seed % 2 == 0,
                loss: seed,
                up: size,
                down: size,
                read_size: window.max(10),
                inbound: seed > 1,
                ..LOSSLESS
            };
            assert!(
                check(conditions, seed).is_complete(&conditions),
                "seed {seed}: {conditions:?}"
            );
        }
    }
}

#[test]
fn a_slow_reader_slows_the_guest_without_loss() {
    let conditions = Conditions { read_size: 700, up: 3_000_000, down: 1000, ..LOSSLESS };
    assert!(check(conditions, 3).is_complete(&conditions));
}

#[test]
fn without_so_peek_off_and_offload_all_data_arrives() {
    for seed in 0..10 {
        let conditions = Conditions { loss: seed, delay: 5, up: 50_000, down: 400_000, ..LOSSLESS };
        let report = check_with(conditions, seed, |settings| {
            settings.capabilities = tidegate_nat::Capabilities::NONE;
        });
        assert!(report.is_complete(&conditions));
    }
}

#[test]
fn under_heavy_loss_data_is_intact_and_aborts_are_visible() {
    heavy_loss(false);
}

#[test]
fn under_heavy_loss_clients_of_a_port_are_served_or_reset() {
    heavy_loss(true);
}

fn heavy_loss(inbound: bool) {
    let mut complete = 0;
    for seed in 100..160 {
        let mut random = Random(seed);
        let conditions = Conditions {
            loss: 20 + random.below(60),
            duplication: random.below(50),
            delay: 1 + random.below(400),
            up: random.below(20_000) as usize,
            down: random.below(20_000) as usize,
            window: 500 + random.below(60_000) as usize,
            scale: if random.percent(50) { Some(random.below(8) as u8) } else { None },
            timestamps: random.percent(50),
            mss: 100 + random.below(1400) as u16,
            read_size: 1 + random.below(5000) as usize,
            guest_closes_first: random.percent(50),
            inbound,
        };
        complete += u32::from(check(conditions, seed).is_complete(&conditions));
    }
    assert!(complete > 5, "some connections complete: {complete}");
}
