//! In-memory host for the engine: sockets are queues, and the device is a list of frames.

#![allow(dead_code, unreachable_pub)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::Protocol;
use tidegate_nat::engine::{Engine, Secrets};
use tidegate_nat::host::{
    Arrival, Batch, DatagramKind, Destination, Host, Port, Ready, ReceiveBuffer, SendOutcome,
    SocketError,
};
use tidegate_nat::siphash::HashKey;
use tidegate_nat::wire::head::TcpHead;
use tidegate_nat::wire::ip::Packet;
use tidegate_nat::wire::protocol;
use tidegate_nat::wire::tcp::{Segment, flags};
use tidegate_nat::wire::virtio::VirtioHeader;
use tidegate_nat::{
    DropReason, Forward, ForwardId, ForwardSource, ForwardStats, Guard, Settings, Stats,
};
use tidegate_reactor::{Key, StreamIngress};

pub const GATEWAY: &str = "10.0.2.2";

/// A TCP socket of the host, and its remote side.
#[derive(Debug, Default)]
pub struct FakeStream {
    /// The client, if the socket was accepted.
    pub client: Option<SocketAddr>,
    pub to: Option<SocketAddr>,
    pub key: Option<Key>,
    /// Result of the connect; `None` while connecting.
    pub answer: Option<Result<(), i32>>,
    /// The receive queue.
    pub queue: VecDeque<u8>,
    /// The remote side has closed after the data in `queue`.
    pub ended: bool,
    /// The remote side has reset the connection.
    pub broken: bool,
    /// Data that the engine has sent.
    pub sent: Vec<u8>,
    /// Space in the send buffer.
    pub room: usize,
    pub shut: bool,
    pub aborted: bool,
    /// The handshake ACK is delayed.
    pub delay_ack: bool,
    /// Size of the receive buffer, once set.
    pub receive_buffer: Option<ReceiveBuffer>,
    /// Number of bytes peeked.
    pub peeked_bytes: u64,
}

/// A listening socket and its accept queue.
#[derive(Debug, Default)]
pub struct FakeListener {
    pub key: Option<Key>,
    pub clients: VecDeque<SocketAddr>,
}

/// A datagram socket.
#[derive(Debug, Default)]
pub struct FakeDatagrams {
    pub to: Option<SocketAddr>,
    pub key: Option<Key>,
    pub sent: Vec<Vec<u8>>,
    pub hop_limit: Option<u8>,
    pub dont_fragment: bool,
    pub waiting: VecDeque<Vec<u8>>,
    /// Queued datagrams of a shared socket, with their source.
    pub waiting_from: VecDeque<(SocketAddr, Vec<u8>)>,
    pub sent_to: Vec<SocketAddr>,
    pub sent_from: Vec<Option<IpAddr>>,
    /// For a published port: the destination address of queued datagrams.
    pub arrival: Option<IpAddr>,
    pub kind: Option<DatagramKind>,
    pub problems: VecDeque<SocketError>,
    pub outcome: Option<SendOutcome>,
    pub closed: bool,
}

/// Socket handle that reports its drop to the host.
pub struct Handle(usize, Arc<std::sync::Mutex<Vec<usize>>>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.1.lock().unwrap().push(self.0);
    }
}

#[derive(Default)]
pub struct Datagrams(Vec<(Option<SocketAddr>, Vec<u8>)>, Option<IpAddr>);

impl Batch for Datagrams {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, index: usize) -> (&[u8], usize) {
        (&self.0[index].1, self.0[index].1.len())
    }

    fn source(&self, index: usize) -> Option<SocketAddr> {
        self.0[index].0
    }

    fn arrival(&self, _index: usize) -> Arrival {
        Arrival { local: self.1, destination: self.1, to_group: false, interface: 7 }
    }
}

#[derive(Default)]
pub struct FakeHost {
    pub frames: VecDeque<Vec<u8>>,
    pub streams: Vec<FakeStream>,
    pub datagrams: Vec<FakeDatagrams>,
    pub listeners: Vec<FakeListener>,
    pub local: Vec<IpAddr>,
    /// Immediate result of a connect; if `None`, the test sets the result later.
    pub connect_result_at_once: Option<Result<(), i32>>,
    /// Space in the send buffer of new streams.
    pub room: usize,
    /// Whether handshake ACKs are delayed.
    pub delay_handshake_acks: bool,
    pub descriptors: usize,
    pub open: usize,
    pub ready: Vec<(Key, Ready)>,
    closed_streams: Arc<std::sync::Mutex<Vec<usize>>>,
    closed_datagrams: Arc<std::sync::Mutex<Vec<usize>>>,
    pub streams_closed: BTreeMap<usize, bool>,
}

impl FakeHost {
    pub fn new() -> Self {
        Self { room: usize::MAX, descriptors: 1000, ..Self::default() }
    }

    fn note_closed(&mut self) {
        for index in self.closed_streams.lock().unwrap().drain(..) {
            self.open -= 1;
            self.streams_closed.insert(index, true);
        }
        for index in self.closed_datagrams.lock().unwrap().drain(..) {
            self.open -= 1;
            self.datagrams[index].closed = true;
        }
    }
}

impl Host for FakeHost {
    type Stream = Handle;
    type Datagrams = Handle;
    type Listener = usize;
    type Batch = Datagrams;

    fn emit(&mut self, head: &[u8], payload: &[IoSlice<'_>]) -> bool {
        let mut frame = head.to_vec();
        payload.iter().for_each(|piece| frame.extend_from_slice(piece));
        assert!(frame.len() <= 10 + 65_535, "packet longer than 65,535 bytes");
        self.frames.push_back(frame);
        true
    }

    fn is_local(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.local.contains(&ip)
    }

    fn connect(&mut self, to: SocketAddr) -> io::Result<Handle> {
        self.note_closed();
        if self.open >= self.descriptors {
            return Err(io::Error::from_raw_os_error(24));
        }
        self.open += 1;
        let answer = self.connect_result_at_once;
        let (room, delay_ack) = (self.room, self.delay_handshake_acks);
        self.streams.push(FakeStream {
            to: Some(to),
            answer,
            room,
            delay_ack,
            ..FakeStream::default()
        });
        Ok(Handle(self.streams.len() - 1, Arc::clone(&self.closed_streams)))
    }

    fn is_handshake_ack_delayed(&self, stream: &Handle) -> bool {
        self.streams[stream.0].delay_ack
    }

    fn send_handshake_ack(&mut self, stream: &mut Handle) {
        self.streams[stream.0].delay_ack = false;
    }

    fn watch_stream(&mut self, stream: &mut Handle, key: Key) -> io::Result<Ready> {
        self.streams[stream.0].key = Some(key);
        Ok(Ready {
            writable: self.streams[stream.0].answer.is_some(),
            error: self.streams[stream.0].answer.is_some_and(|answer| answer.is_err()),
            ..Ready::default()
        })
    }

    fn watch_port(&mut self, port: &Port<usize, Handle>, key: Key) -> io::Result<()> {
        match port {
            Port::Tcp(listener) => self.listeners[*listener].key = Some(key),
            Port::Udp(socket) => self.datagrams[socket.0].key = Some(key),
        }
        Ok(())
    }

    fn ignore_port(&mut self, port: &Port<usize, Handle>) {
        let Port::Tcp(listener) = port else { panic!("datagram ports are never paused") };
        self.listeners[*listener].key = None;
    }

    fn accept(&mut self, listener: &mut usize) -> io::Result<(Handle, SocketAddr)> {
        self.note_closed();
        if self.listeners[*listener].clients.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.open >= self.descriptors {
            return Err(io::Error::from_raw_os_error(24));
        }
        let client = self.listeners[*listener].clients.pop_front().unwrap();
        self.open += 1;
        self.streams.push(FakeStream {
            client: Some(client),
            answer: Some(Ok(())),
            room: self.room,
            ..FakeStream::default()
        });
        Ok((Handle(self.streams.len() - 1, Arc::clone(&self.closed_streams)), client))
    }

    fn ingress(&self, _stream: &Handle) -> Option<StreamIngress> {
        Some(StreamIngress { interface: 7, local: "192.0.2.1".parse().unwrap() })
    }

    fn connect_result(&mut self, stream: &Handle) -> io::Result<()> {
        let stream = &self.streams[stream.0];
        let reset = stream.broken.then_some(Err(104));
        reset
            .or(stream.answer)
            .expect("the result is queried only when ready")
            .map_err(io::Error::from_raw_os_error)
    }

    fn set_receive_buffer(&mut self, stream: &mut Handle, size: ReceiveBuffer) {
        self.streams[stream.0].receive_buffer = Some(size);
    }

    fn send(&mut self, stream: &mut Handle, bytes: &[u8]) -> io::Result<usize> {
        let stream = &mut self.streams[stream.0];
        assert!(!stream.shut && !bytes.is_empty());
        if stream.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let taken = bytes.len().min(stream.room);
        if taken == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        stream.room -= taken;
        stream.sent.extend_from_slice(&bytes[..taken]);
        Ok(taken)
    }

    fn peek(&mut self, stream: &mut Handle, offset: usize, into: &mut [u8]) -> io::Result<usize> {
        let stream = &mut self.streams[stream.0];
        assert!(offset <= stream.queue.len(), "peek beyond the end of the queue");
        if stream.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let count = into.len().min(stream.queue.len() - offset);
        if count == 0 && !stream.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for (to, from) in into.iter_mut().zip(stream.queue.range(offset..)) {
            *to = *from;
        }
        stream.peeked_bytes += count as u64;
        Ok(count)
    }

    fn discard(&mut self, stream: &mut Handle, length: usize) -> io::Result<()> {
        let stream = &mut self.streams[stream.0];
        assert!(length <= stream.queue.len(), "discard beyond the end of the queue");
        stream.queue.drain(..length);
        Ok(())
    }

    fn shutdown(&mut self, stream: &mut Handle) {
        self.streams[stream.0].shut = true;
    }

    fn abort(&mut self, stream: Handle) {
        self.streams[stream.0].aborted = true;
    }

    fn open(&mut self, kind: DatagramKind, to: SocketAddr) -> io::Result<Handle> {
        self.note_closed();
        if self.open >= self.descriptors {
            return Err(io::Error::from_raw_os_error(24));
        }
        self.open += 1;
        self.datagrams.push(FakeDatagrams {
            to: Some(to),
            kind: Some(kind),
            ..FakeDatagrams::default()
        });
        Ok(Handle(self.datagrams.len() - 1, Arc::clone(&self.closed_datagrams)))
    }

    fn watch_datagrams(&mut self, socket: &Handle, key: Key) -> io::Result<()> {
        self.datagrams[socket.0].key = Some(key);
        Ok(())
    }

    fn send_gso_batch(
        &mut self,
        socket: &mut Handle,
        destination: Option<Destination>,
        bytes: &[u8],
        segment: usize,
        dont_fragment: bool,
        hop_limit: Option<u8>,
    ) -> SendOutcome {
        let socket = &mut self.datagrams[socket.0];
        (socket.dont_fragment, socket.hop_limit) = (dont_fragment, hop_limit);
        assert_eq!(destination.is_some(), socket.kind == Some(DatagramKind::SharedUdp));
        socket.sent_to.extend(destination.map(|destination| destination.to));
        socket.sent_from.extend(destination.map(|destination| destination.from));
        if let Some(outcome) = socket.outcome {
            return outcome;
        }
        if bytes.is_empty() {
            socket.sent.push(Vec::new());
        }
        socket.sent.extend(bytes.chunks(segment.max(1)).map(<[u8]>::to_vec));
        SendOutcome::Sent
    }

    fn receive(&mut self, socket: &mut Handle, batch: &mut Datagrams) -> io::Result<usize> {
        let socket = &mut self.datagrams[socket.0];
        let whole = socket.waiting.drain(..).map(|bytes| (None, bytes));
        let named = socket.waiting_from.drain(..).map(|(from, bytes)| (Some(from), bytes));
        batch.0 = whole.chain(named).collect();
        batch.1 = socket.arrival;
        assert!(batch.0.len() <= 64);
        if batch.0.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(batch.0.len()) }
    }

    fn next_socket_error(&mut self, socket: &mut Handle) -> Option<SocketError> {
        self.datagrams[socket.0].problems.pop_front()
    }
}

/// An engine with an in-memory host and simulated time.
pub struct Bench {
    pub engine: Engine<FakeHost>,
    pub stats: Arc<Stats>,
    pub start: Instant,
    pub now: Instant,
}

pub const SECRETS: Secrets = Secrets { table: HashKey([1, 2]), sequence: HashKey([3, 4]) };

impl Bench {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Settings::new(1500);
        settings.policy.gateways = vec![GATEWAY.parse().unwrap(), "fd00::2".parse().unwrap()];
        change(&mut settings);
        let (start, stats) = (Instant::now(), Arc::new(Stats::default()));
        let engine = Engine::new(FakeHost::new(), settings, SECRETS, Arc::clone(&stats), start);
        Self { engine, stats, start, now: start }
    }

    pub fn host(&mut self) -> &mut FakeHost {
        self.engine.host_mut()
    }

    /// Passes a frame to the engine and runs it until it is idle.
    pub fn frame(&mut self, frame: &[u8]) {
        self.engine.frame(frame, self.now);
        self.settle();
    }

    pub fn settle(&mut self) {
        self.engine.flush(self.now);
        for _ in 0..100_000 {
            let ready = std::mem::take(&mut self.host().ready);
            let idle = ready.is_empty();
            for (key, ready) in ready {
                self.engine.ready(key, ready, self.now);
            }
            if !self.engine.turn(self.now) && idle {
                self.host().note_closed();
                return;
            }
        }
        panic!("the engine does not become idle");
    }

    /// Advances the time, and handles all timers that expire.
    pub fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        for _ in 0..1_000_000 {
            match self.engine.poll_timeout() {
                Some(due) if due <= until => {
                    self.now = self.now.max(due);
                    self.engine.handle_timeout(self.now);
                    self.settle();
                }
                _ => {
                    self.now = until;
                    return;
                }
            }
        }
        panic!("timers do not stop firing");
    }

    /// Reports the readiness of a stream.
    pub fn stream_ready(&mut self, index: usize, ready: Ready) {
        if let Some(key) = self.host().streams[index].key {
            self.engine.ready(key, ready, self.now);
        }
        self.settle();
    }

    /// The remote side sends `bytes`.
    pub fn remote_sends(&mut self, index: usize, bytes: &[u8]) {
        self.host().streams[index].queue.extend(bytes);
        self.stream_ready(index, Ready { readable: true, ..Ready::default() });
    }

    pub fn remote_closes(&mut self, index: usize) {
        self.host().streams[index].ended = true;
        self.stream_ready(index, Ready { readable: true, more: true, ..Ready::default() });
    }

    pub fn remote_answers(&mut self, index: usize, answer: Result<(), i32>) {
        self.host().streams[index].answer = Some(answer);
        self.stream_ready(
            index,
            Ready { writable: true, error: answer.is_err(), ..Ready::default() },
        );
    }

    pub fn datagrams_ready(&mut self, index: usize, ready: Ready) {
        if let Some(key) = self.host().datagrams[index].key {
            self.engine.ready(key, ready, self.now);
        }
        self.settle();
    }

    /// Publishes a TCP port. Its clients connect to listener 0, 1 and so on.
    pub fn publish_tcp(&mut self, guest: &str, source: ForwardSource) -> Arc<ForwardStats> {
        let index = self.host().listeners.len();
        self.host().listeners.push(FakeListener::default());
        self.publish(Protocol::Tcp, guest, source, Port::Tcp(index), None)
    }

    /// Publishes a UDP port. Its socket is the next entry of `datagrams`.
    pub fn publish_udp(&mut self, guest: &str, source: ForwardSource) -> Arc<ForwardStats> {
        let kind = Some(DatagramKind::SharedUdp);
        let world = self.host();
        world.open += 1;
        let arrival = Some("192.0.2.1".parse().unwrap());
        world.datagrams.push(FakeDatagrams { kind, arrival, ..FakeDatagrams::default() });
        let handle = Handle(world.datagrams.len() - 1, Arc::clone(&world.closed_datagrams));
        self.publish(Protocol::Udp, guest, source, Port::Udp(handle), None)
    }

    pub fn publish(
        &mut self,
        protocol: Protocol,
        guest: &str,
        source: ForwardSource,
        port: Port<usize, Handle>,
        guard: Option<Arc<dyn Guard>>,
    ) -> Arc<ForwardStats> {
        let id = ForwardId::for_test(self.engine.published().len() as u32);
        let forward = Forward { protocol, listen: at("192.0.2.1:80"), guest: at(guest), source };
        let stats = Arc::new(ForwardStats::default());
        self.engine.publish(id, forward, port, guard, Arc::clone(&stats)).unwrap();
        stats
    }

    /// A client connects to listener `index`.
    pub fn client(&mut self, index: usize, client: &str) {
        self.host().listeners[index].clients.push_back(at(client));
        self.listener_ready(index);
    }

    pub fn listener_ready(&mut self, index: usize) {
        if let Some(key) = self.host().listeners[index].key {
            self.engine.port_ready(key, Ready { readable: true, ..Ready::default() }, self.now);
        }
        self.settle();
    }

    /// A datagram arrives at published socket `index`.
    pub fn datagram_from(&mut self, index: usize, client: &str, bytes: &[u8]) {
        self.host().datagrams[index].waiting_from.push_back((at(client), bytes.to_vec()));
        if let Some(key) = self.host().datagrams[index].key {
            self.engine.port_ready(key, Ready { readable: true, ..Ready::default() }, self.now);
        }
        self.settle();
    }

    pub fn next_frame(&mut self) -> Option<Vec<u8>> {
        self.host().frames.pop_front()
    }

    /// Returns the next frame, which must be a TCP segment.
    pub fn next_segment(&mut self) -> Option<Seen> {
        let frame = self.next_frame()?;
        Some(Seen::of(&frame).unwrap_or_else(|| panic!("not a TCP segment: {frame:02x?}")))
    }

    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.stats.dropped(reason)
    }
}

/// A segment received by the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub sequence: u32,
    pub acknowledgement: u32,
    pub flags: u8,
    pub window: u16,
    pub mss: Option<u16>,
    pub scale: Option<u8>,
    pub timestamps: Option<(u32, u32)>,
    pub cut: u16,
    pub payload: Vec<u8>,
}

impl Seen {
    pub fn of(frame: &[u8]) -> Option<Self> {
        let (header, bytes) = VirtioHeader::parse(frame).unwrap();
        let packet = Packet::parse(bytes).unwrap();
        if packet.protocol != protocol::TCP {
            return None;
        }
        let segment = Segment::parse(&packet, false).unwrap();
        Some(Self {
            sequence: segment.sequence,
            acknowledgement: segment.acknowledgement,
            flags: segment.flags,
            window: segment.window,
            mss: segment.options.mss,
            scale: segment.options.scale,
            timestamps: segment.options.timestamps,
            cut: header.segment,
            payload: segment.payload.to_vec(),
        })
    }

    pub fn has(&self, wanted: u8) -> bool {
        self.flags & wanted == wanted
    }
}

/// A segment of the guest.
pub fn segment(source: SocketAddr, destination: SocketAddr) -> TcpHead {
    TcpHead {
        source,
        destination,
        sequence: 0,
        acknowledgement: 0,
        flags: flags::ACK,
        window: 0xffff,
        mss: None,
        scale: None,
        timestamps: None,
        segment: u16::MAX,
    }
}

pub fn frame(head: &TcpHead, payload: &[u8]) -> Vec<u8> {
    [head.write(payload.len()).bytes(), payload].concat()
}

pub fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Pseudo-random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
