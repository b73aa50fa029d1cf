//! The engine: packets of the guest in, calls to the host's sockets out, and back.
//!
//! # Theory of operation
//! A driver calls, in each round of its loop:
//!
//! 1. [`packet`](Engine::packet) for each frame that it reads off the device, from whatever buffer it reads into, and
//!    [`flush`](Engine::flush) when there are no more for now;
//! 2. [`ready`](Engine::ready) for each socket that has become ready, [`port_ready`](Engine::port_ready) for one of a published port;
//! 3. [`handle_timeout`](Engine::handle_timeout) when [`poll_timeout`](Engine::poll_timeout) has come;
//! 4. [`turn`](Engine::turn) once, which does the work that the others made possible, with a budget for each flow.
//!
//! The engine calls its [`Host`] for everything that has an effect, and what it calls must not wait. There is no queue of outputs in
//! between: payload goes from the buffer it was read into to the socket, and from the socket's queue to the
//! device.
//!
//! ```text
//!  frame ─► virtio, IP ─► whole? ─no─► reassembly ─┐
//!            │ malformed    │ yes ◄────────────────┘
//!            ▼              ▼
//!          drop      TCP / UDP / ICMP ─► flow there? ─no─► policy, limits, descriptor ─no─► refuse: ICMP, RST or silence
//!                                          │ yes               │ yes
//!                                          ▼                   ▼
//!                                     its state machine ◄── new flow: connect
//! ```

mod datagrams;
pub(crate) mod inbound;
mod problems;
mod tcp;

use crate::flow_table::{Class, FlowKey, FlowTable, Origin, Refused};
use crate::forward::ForwardId;
use crate::fragments::{Piece, Reassembly};
use crate::host::{Host, Ready};
use crate::metrics::{DropReason, FlowKind, Stats};
use crate::policy::Policy;
use crate::settings::Settings;
use crate::siphash::{HashKey, SipHasher};
use crate::tcp::{Connection, Io, Opening, Params};
use crate::train::Train;
use crate::wire::ip::Packet;
use crate::wire::protocol;
use crate::wire::virtio::{Segmentation, VirtioHeader};
use datagrams::Session;
use inbound::{Client, Published};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Key, Timers, Token};

/// Limits that are hit are complained about this often at most.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Numbers that nobody may guess, drawn once.
#[derive(Clone, Copy, Debug)]
pub struct Secrets {
    /// Of the flow table.
    pub table: HashKey,
    /// Of initial sequence numbers (RFC 6528) and timestamps.
    pub sequence: HashKey,
}

/// A flow of any kind.
enum Flow<H: Host> {
    Tcp(Box<Connection<H::Stream>>),
    Datagrams(Session<H::Datagrams>),
}

impl<H: Host> Flow<H> {
    fn kind(&self) -> FlowKind {
        match self {
            Self::Tcp(_) => FlowKind::Tcp,
            Self::Datagrams(session) => session.kind(),
        }
    }

    fn timer(&mut self) -> &mut Option<Instant> {
        match self {
            Self::Tcp(connection) => &mut connection.timer,
            Self::Datagrams(session) => &mut session.timer,
        }
    }
}

/// See the module.
pub struct Engine<H: Host> {
    host: H,
    settings: Settings,
    params: Params,
    stats: Arc<Stats>,
    flows: FlowTable<Flow<H>>,
    reassembly: Reassembly,
    timers: Timers,
    /// Flows that have something to do, each once.
    queue: VecDeque<Key>,
    train: Train,
    batch: H::Batch,
    scratch: Vec<u8>,
    secrets: Secrets,
    epoch: Instant,
    identification: u32,
    /// Which of the resolvers is asked.
    resolver: usize,
    /// When a limit was last complained about.
    warned: Option<Instant>,
    /// The published ports, and what they are known by.
    ports: Arena<Published<H>>,
    ports_by_id: BTreeMap<ForwardId, Key>,
    /// The sessions of published ports.
    clients: HashMap<Client, Key, HashKey>,
    /// How many of them each client has.
    sessions: HashMap<IpAddr, usize, HashKey>,
    /// Ports that are left alone until then.
    paused: Vec<Key>,
    resume_at: Option<Instant>,
    /// The port that the gateway was shown with last.
    next_port: u16,
}

impl<H: Host> Engine<H> {
    /// An engine without flows. `now` is the beginning of its clocks.
    pub fn new(host: H, settings: Settings, secrets: Secrets, stats: Arc<Stats>, now: Instant) -> Self {
        Self {
            host,
            params: Params::new(&settings, now),
            stats,
            flows: FlowTable::new(settings.limits, secrets.table),
            reassembly: Reassembly::new(settings.timeouts.fragments),
            timers: Timers::default(),
            queue: VecDeque::new(),
            train: Train::default(),
            batch: H::Batch::default(),
            scratch: vec![0; 1 << 16],
            identification: secrets.sequence.0[0] as u32,
            resolver: 0,
            warned: None,
            ports: Arena::new(),
            ports_by_id: BTreeMap::new(),
            clients: HashMap::with_hasher(secrets.table),
            sessions: HashMap::with_hasher(secrets.table),
            paused: Vec::new(),
            resume_at: None,
            next_port: secrets.sequence.0[1] as u16,
            settings,
            secrets,
            epoch: now,
        }
    }

    /// The world, as it was given.
    pub fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// Who may go where from now on; flows that are there go on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.settings.policy = policy;
    }

    /// How many flows there are.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// A frame of the device, virtio's header first.
    pub fn packet(&mut self, frame: &[u8], now: Instant) {
        self.stats.packets[0].add(1);
        let Some((header, bytes)) = VirtioHeader::parse(frame) else {
            return self.stats.refuse(DropReason::Malformed);
        };
        let Ok(packet) = Packet::parse(bytes) else { return self.stats.refuse(DropReason::Malformed) };
        if !self.settings.policy.knows(packet.source) {
            return self.stats.refuse(DropReason::ForeignSource);
        }
        let Some(fragment) = packet.fragment else { return self.whole(&packet, header, now) };
        match self.reassembly.add(&packet, fragment, now) {
            Piece::Kept => {}
            Piece::Dropped => self.stats.refuse(DropReason::Fragments),
            Piece::Whole(payload) => {
                let whole = Packet { payload: &payload, fragment: None, dont_fragment: false, ..packet };
                let header = VirtioHeader { verify: true, segmentation: Segmentation::None, segment: 0 };
                self.whole(&whole, header, now);
            }
        }
    }

    /// No more frames wait at this moment.
    pub fn flush(&mut self, now: Instant) {
        self.send_train(now);
    }

    fn whole(&mut self, packet: &Packet<'_>, header: VirtioHeader, now: Instant) {
        match (packet.protocol, packet.source) {
            (protocol::TCP, _) => self.tcp_packet(packet, header, now),
            (protocol::UDP, _) => self.udp_packet(packet, header, now),
            (protocol::ICMP, IpAddr::V4(_)) | (protocol::ICMPV6, IpAddr::V6(_)) => {
                self.icmp_packet(packet, now);
            }
            _ => self.stats.refuse(DropReason::Protocol),
        }
    }

    /// The socket of flow `key` has become ready. The key may be stale.
    pub fn ready(&mut self, key: Key, ready: Ready, now: Instant) {
        match self.flows.get_mut(key) {
            None => {}
            Some((_, Flow::Tcp(_))) => self.stream_ready(key, ready, now),
            Some((_, Flow::Datagrams(session))) => {
                session.note(ready);
                self.enqueue(key);
            }
        }
    }

    /// Does the work that has become possible. True if some is left.
    pub fn turn(&mut self, now: Instant) -> bool {
        for _ in 0..self.queue.len() {
            let Some(key) = self.queue.pop_front() else { break };
            match self.flows.get_mut(key) {
                None => {}
                Some((_, Flow::Tcp(connection))) => {
                    connection.queued = false;
                    self.stream_turn(key, now);
                }
                Some((_, Flow::Datagrams(session))) => {
                    session.queued = false;
                    self.session_turn(key, now);
                }
            }
        }
        !self.queue.is_empty()
    }

    /// When [`Self::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let others = [self.reassembly.next_deadline(), self.resume_at];
        self.timers.next_deadline().into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Does what is due. [`Self::turn`] is to be called afterwards.
    pub fn handle_timeout(&mut self, now: Instant) {
        for _ in 0..self.reassembly.expire(now) {
            self.stats.refuse(DropReason::Fragments);
        }
        self.resume_ports(now);
        while let Some(token) = self.timers.expire(now) {
            let key = token.key();
            let Some((_, flow)) = self.flows.get_mut(key) else { continue };
            *flow.timer() = None;
            match flow {
                Flow::Tcp(_) => self.stream_timeout(key, now),
                Flow::Datagrams(_) => self.session_timeout(key, now),
            }
        }
    }

    /// Closes every port and ends every flow: far ends see resets.
    pub fn shutdown(&mut self) {
        for id in self.published() {
            self.unpublish(id);
        }
        for key in self.flows.keys() {
            self.end(key, true);
        }
    }

    fn enqueue(&mut self, key: Key) {
        let queued = match self.flows.get_mut(key) {
            Some((_, Flow::Tcp(connection))) => &mut connection.queued,
            Some((_, Flow::Datagrams(session))) => &mut session.queued,
            None => return,
        };
        if !std::mem::replace(queued, true) {
            self.queue.push_back(key);
        }
    }

    /// Sees to it that the flow's timer fires at `deadline`, or earlier: one that is pushed back with every packet is not armed
    /// anew each time.
    fn arm(&mut self, key: Key, deadline: Instant) {
        let Some((_, flow)) = self.flows.get_mut(key) else { return };
        let timer = flow.timer();
        match *timer {
            Some(armed) if armed <= deadline => return,
            Some(armed) => self.timers.disarm(armed, token(key)),
            None => {}
        }
        *timer = Some(deadline);
        self.timers.arm(deadline, token(key));
    }

    /// Admits a flow, makes room for it and tells why not.
    fn admit(&mut self, source: IpAddr, class: Class, now: Instant) -> bool {
        let admitted = self.flows.admit(source, Origin::Inside, class, now);
        self.stats.sources.set(self.flows.sources() as u64);
        if let Err(refused) = admitted {
            self.at_a_limit(drop_reason(refused), now);
            return false;
        }
        self.make_room();
        true
    }

    /// Makes room for a flow that was admitted.
    fn make_room(&mut self) {
        if let Some((key, flow)) = self.flows.evict() {
            self.stats.evicted.add(1);
            self.evicted_at_port(&flow);
            self.ended(key, flow, false);
        }
    }

    /// What connection `key` begins with.
    fn opening(&self, key: &FlowKey, now: Instant) -> Opening {
        // RFC 6528 section 3: a clock of 4 microseconds, and a function of the connection.
        let clock = now.saturating_duration_since(self.epoch).as_micros() as u64 / 4;
        Opening {
            inside: key.inside,
            outside: key.outside,
            iss: self.secret_of(key, 1).wrapping_add(clock) as u32,
            clock_offset: self.secret_of(key, 2) as u32,
        }
    }

    /// What a connection may use that has nothing buffered yet.
    fn io(&mut self, now: Instant) -> Io<'_, H> {
        Io {
            host: &mut self.host,
            scratch: &mut self.scratch,
            now,
            stats: &self.stats,
            params: &self.params,
            allowance: 0,
        }
    }

    /// A new flow is refused, and the log hears of it now and then.
    fn at_a_limit(&mut self, reason: DropReason, now: Instant) {
        self.stats.refuse(reason);
        if self.warned.is_none_or(|warned| now.saturating_duration_since(warned) >= WARNING_INTERVAL) {
            self.warned = Some(now);
            let flows = self.flows.len();
            tracing::warn!(
                network = &*self.settings.network,
                reason = reason.as_str(),
                flows,
                "containers are refused new flows"
            );
        }
    }

    /// A descriptor is short: whether a session that nobody has answered for a while could be ended for it.
    fn give_up_a_session(&mut self, now: Instant) -> bool {
        // As long as an answer may take, so that those who come all at once do not push one another out.
        let evicted =
            now.checked_sub(Duration::from_millis(100)).and_then(|before| self.flows.evict_tentative(before));
        let Some((key, flow)) = evicted else { return false };
        self.stats.evicted.add(1);
        self.evicted_at_port(&flow);
        self.ended(key, flow, false);
        true
    }

    fn begun(&self, kind: FlowKind) {
        self.stats.flows[kind as usize].add(1);
        self.stats.flows_begun[kind as usize].add(1);
    }

    /// Ends flow `key`; `cut` if its far end is to see a reset.
    fn end(&mut self, key: Key, cut: bool) {
        if let Some((five_tuple, flow)) = self.flows.remove(key) {
            self.ended(five_tuple, flow, cut);
        }
    }

    fn ended(&mut self, key: FlowKey, mut flow: Flow<H>, cut: bool) {
        self.stats.flows[flow.kind() as usize].sub();
        // Its timer finds nothing when it fires, but would stay until then: hours, for a connection.
        if let Some(armed) = flow.timer().take()
            && let Some(token) = self.timer_token(&flow)
        {
            self.timers.disarm(armed, token);
        }
        match flow {
            Flow::Tcp(mut connection) => {
                if let Some(forward) = &connection.forward {
                    forward.flows.sub();
                }
                if let Some(stream) = connection.take_stream().filter(|_| cut) {
                    self.stats.resets.add(1);
                    self.host.abort(stream);
                }
            }
            Flow::Datagrams(session) => self.forget_client(&session.via),
        }
        tracing::debug!(protocol = key.protocol, cut, "flow ended");
    }

    fn timer_token(&self, flow: &Flow<H>) -> Option<Token> {
        match flow {
            Flow::Tcp(connection) => connection.key,
            Flow::Datagrams(session) => session.key,
        }
        .map(token)
    }

    /// The next number for a packet that may be cut.
    fn next_identification(&mut self) -> u32 {
        self.identification = self.identification.wrapping_add(1);
        self.identification
    }

    /// A number that only who knows the key can tell from the five-tuple.
    fn secret_of(&self, key: &FlowKey, purpose: u64) -> u64 {
        let mut hasher = SipHasher::<2, 4>::new(self.secrets.sequence);
        key.hash(&mut hasher);
        hasher.write_u64(purpose);
        hasher.finish()
    }

    /// Our own address of a family, or what stands for it.
    fn own_address(&self, instead: IpAddr) -> IpAddr {
        let gateways = &self.settings.policy.gateways;
        gateways.iter().copied().find(|ip| ip.is_ipv4() == instead.is_ipv4()).unwrap_or(instead)
    }
}

fn drop_reason(refused: Refused) -> DropReason {
    match refused {
        Refused::TableFull => DropReason::TableFull,
        Refused::SourceShare | Refused::HalfOpen => DropReason::SourceShare,
        Refused::Rate => DropReason::Rate,
        Refused::Sources => DropReason::Sources,
    }
}

fn token(key: Key) -> Token {
    Token::new(0, key)
}

impl<H: Host> std::fmt::Debug for Engine<H> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({} flows)", self.flows.len())
    }
}
