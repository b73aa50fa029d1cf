//! The engine: packets of the guest in, calls to the host's sockets out, and back.
//!
//! # Theory of operation
//! A driver calls, in each round of its loop:
//!
//! 1. [`classify`](Engine::classify) for each frame that it reads off the device, whose queue it
//!    then enters; [`packet`](Engine::packet) for each one whose turn it is, and
//!    [`flush`](Engine::flush) when there are no more for now;
//! 2. [`ready`](Engine::ready) for each socket that has become ready,
//!    [`port_ready`](Engine::port_ready) for one of a published port;
//! 3. [`handle_timeout`](Engine::handle_timeout) when [`poll_timeout`](Engine::poll_timeout) has
//!    come;
//! 4. [`turn`](Engine::turn) once, which does the work that the others made possible, with a budget
//!    for each flow.
//!
//! The engine calls its [`Host`] for everything that has an effect, and what it calls must not
//! wait. There is no queue of outputs in between: payload goes from the buffer it was read into to
//! the socket, and from the socket's queue to the device.
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

pub mod classify;
mod datagrams;
pub(crate) mod inbound;
mod problems;
mod tcp;

use crate::fair_queue::{FairQueue, QueueLimits};
use crate::flow_table::{Admission, Class, FlowKey, FlowTable, Limit, Origin, Refused};
use crate::forward::ForwardId;
use crate::fragments::{Piece, Reassembly};
use crate::gso_batch::GsoBatch;
use crate::host::{Host, Ready};
use crate::metrics::{DropReason, FlowKind, Stats};
use crate::policy::Policy;
use crate::settings::Settings;
use crate::siphash::{HashKey, SipHasher};
use crate::tcp::{Connection, Io, Opening, Params};
use crate::wire::ip::Packet;
use crate::wire::protocol;
use crate::wire::virtio::{Segmentation, VirtioHeader};
use classify::Parsed;
use datagrams::Session;
use inbound::{Client, Published};
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::LogInterval;
use tidegate_reactor::{Arena, Key, Timers, Token};

/// Flows that are worked on in one turn. More would delay the packets behind them.
const FLOWS_PER_TURN: usize = 64;

/// Each flow waits once, so the flow table bounds the queue.
const WORK: QueueLimits = QueueLimits { items: usize::MAX, bytes: usize::MAX, quantum: 4 };

/// Flows whose time is over that are dealt with at a time.
const TIMEOUTS_PER_TURN: usize = 64;

/// Flows that are younger, or have had a packet since, do not yield where descriptors are short:
/// unanswered and answered ones.
const ANSWER_TIME: Duration = Duration::from_millis(100);
const IDLE_TIME: Duration = Duration::from_secs(10);

/// How often the largest shares are looked for, which takes a look at every source.
const SHARES_INTERVAL: Duration = Duration::from_millis(200);

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
    /// Flows that have something to do, each once; endpoints in turn.
    queue: FairQueue<Key>,
    gso_batch: GsoBatch,
    batch: H::Batch,
    scratch: Vec<u8>,
    secrets: Secrets,
    epoch: Instant,
    identification: u32,
    /// Which of the resolvers is asked.
    resolver: usize,
    /// What was taken for the flow that the packet at hand begins.
    admission: Option<Admission>,
    /// The latest turn.
    latest: Instant,
    /// When the largest shares are to be looked for; `None` as long as they cannot have changed.
    measure_at: Option<Instant>,
    limit_log: LogInterval,
    /// SYNs refused so far.
    refused_syns: u32,
    /// The published ports, and what they are known by.
    ports: Arena<Published<H>>,
    ports_by_id: BTreeMap<ForwardId, Key>,
    /// The sessions of published ports.
    clients: HashMap<Client, Key, HashKey>,
    /// Those of each client, by its share.
    sessions: HashMap<IpAddr, inbound::OfClient, HashKey>,
    /// How many TCP connections of published ports each client has, by its share.
    connections: HashMap<IpAddr, usize, HashKey>,
    /// Ports that are left alone until then.
    paused: Vec<Key>,
    resume_at: Option<Instant>,
    /// The port that the gateway was shown with last.
    next_port: u16,
}

impl<H: Host> Engine<H> {
    /// An engine without flows. `now` is the beginning of its clocks.
    pub fn new(
        host: H,
        settings: Settings,
        secrets: Secrets,
        stats: Arc<Stats>,
        now: Instant,
    ) -> Self {
        Self {
            host,
            params: Params::new(&settings, now),
            stats,
            flows: FlowTable::new(settings.limits, secrets.table),
            reassembly: Reassembly::new(settings.timeouts.fragments),
            timers: Timers::default(),
            queue: FairQueue::new(WORK),
            gso_batch: GsoBatch::default(),
            batch: H::Batch::default(),
            scratch: vec![0; 1 << 16],
            identification: secrets.sequence.0[0] as u32,
            resolver: 0,
            admission: None,
            latest: now,
            measure_at: None,
            limit_log: LogInterval::default(),
            refused_syns: 0,
            ports: Arena::new(),
            ports_by_id: BTreeMap::new(),
            clients: HashMap::with_hasher(secrets.table),
            sessions: HashMap::with_hasher(secrets.table),
            connections: HashMap::with_hasher(secrets.table),
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

    /// Classifies a frame and deals with it at once, for a driver without a queue.
    pub fn frame(&mut self, frame: &[u8], now: Instant) {
        if let Some((class, parsed)) = self.classify(frame, now) {
            self.serve(&parsed, &class, now);
        }
    }

    /// A frame of the device, virtio's header first, which [`Self::classify`] has let pass.
    pub fn packet(&mut self, frame: &[u8], class: &classify::Class, now: Instant) {
        match Parsed::of(frame) {
            // The policy may have changed while it waited.
            Some(parsed) if self.settings.policy.knows(parsed.packet.source) => {
                self.serve(&parsed, class, now);
            }
            parsed => {
                let reason = if parsed.is_some() {
                    DropReason::ForeignSource
                } else {
                    DropReason::Malformed
                };
                self.stats.refuse(reason);
                if let Some(admission) = class.admission {
                    self.flows.give_back(class.endpoint, admission);
                }
            }
        }
    }

    /// The same of a frame that was not queued since it was classified.
    pub(crate) fn serve(&mut self, parsed: &Parsed<'_>, class: &classify::Class, now: Instant) {
        self.admission = class.admission;
        self.serve_packet(parsed, now);
        // The flow is there already: the first of several packets that were read at once has begun
        // it.
        if let Some(admission) = self.admission.take() {
            self.flows.give_back(class.endpoint, admission);
        }
    }

    fn serve_packet(&mut self, parsed: &Parsed<'_>, now: Instant) {
        let Parsed { header, packet } = parsed;
        let Some(fragment) = packet.fragment else { return self.whole(packet, *header, now) };
        match self.reassembly.add(packet, fragment, now) {
            Piece::Kept => {}
            Piece::Dropped => self.stats.refuse(DropReason::Fragments),
            Piece::Whole(payload) => {
                let whole =
                    Packet { payload: &payload, fragment: None, dont_fragment: false, ..*packet };
                let header =
                    VirtioHeader { verify: true, segmentation: Segmentation::None, segment: 0 };
                self.whole(&whole, header, now);
            }
        }
    }

    /// A frame is dropped for want of room in the queue, at the expense of `endpoint`.
    pub fn note_queue_drop(&mut self, class: &classify::Class, now: Instant) {
        let endpoint = class.endpoint;
        if let Some(admission) = class.admission {
            self.flows.give_back(endpoint, admission);
        }
        self.at_a_limit(DropReason::Queue, Some(endpoint), now);
    }

    /// [`Settings::one_guest`].
    #[must_use]
    pub fn has_one_guest(&self) -> bool {
        self.settings.one_guest
    }

    /// How many bytes wait in the queue, for the metrics.
    pub fn note_queue(&self, bytes: usize) {
        self.stats.queued_bytes.set(bytes as u64);
    }

    /// Looks for the largest shares, if they may have changed and it is time.
    fn measure_shares(&mut self, now: Instant) {
        if self.measure_at.is_some_and(|at| at <= now) {
            self.measure_at = None;
            let (flows, unanswered) = self.flows.largest_shares();
            self.stats.largest_shares[0].set(flows as u64);
            self.stats.largest_shares[1].set(unanswered as u64);
        }
    }

    /// No more frames wait at this moment.
    pub fn flush(&mut self, now: Instant) {
        self.send_gso_batch(now);
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
        self.latest = now;
        self.measure_shares(now);
        for _ in 0..self.queue.len().min(FLOWS_PER_TURN) {
            let Some(key) = self.queue.pop() else { break };
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
        let others = [self.reassembly.next_deadline(), self.resume_at, self.measure_at];
        self.timers.next_deadline().into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Does what is due. [`Self::turn`] is to be called afterwards.
    pub fn handle_timeout(&mut self, now: Instant) {
        for _ in 0..self.reassembly.expire(now) {
            self.stats.refuse(DropReason::Fragments);
        }
        self.resume_ports(now);
        for _ in 0..TIMEOUTS_PER_TURN {
            let Some(token) = self.timers.expire(now) else { break };
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
        let (five_tuple, queued) = match self.flows.get_mut(key) {
            Some((five_tuple, Flow::Tcp(connection))) => (five_tuple, &mut connection.queued),
            Some((five_tuple, Flow::Datagrams(session))) => (five_tuple, &mut session.queued),
            None => return,
        };
        if !std::mem::replace(queued, true) {
            let endpoint = five_tuple.inside.ip();
            self.queue.push(self.flows.network(key), endpoint, 1, 0, key);
        }
    }

    /// Sees to it that the flow's timer fires at `deadline`, or earlier: one that is pushed back
    /// with every packet is not armed anew each time.
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

    /// Admits a flow, unless its packet was admitted when it was classified, and makes room for it.
    /// `None` if it is refused, which is counted.
    fn admit(&mut self, source: IpAddr, class: Class, now: Instant) -> Option<Admission> {
        let network = self.settings.policy.network_of(source);
        let admitted = match self.admission.take() {
            Some(admission) => Ok(admission),
            None => self.flows.admit(source, network, Origin::Inside, now),
        };
        self.stats.sources.set(self.flows.sources() as u64);
        match admitted {
            Ok(admission) => {
                self.make_room(source, Origin::Inside, class, now).then_some(admission)
            }
            Err(refused) => {
                self.at_a_limit(drop_reason(refused), Some(source), now);
                None
            }
        }
    }

    /// Makes room for a flow that was admitted.
    fn make_room(&mut self, source: IpAddr, origin: Origin, class: Class, now: Instant) -> bool {
        while let Some((key, flow, limit)) = self.flows.evict_for(source, origin, class) {
            self.evicted(key, flow, limit, now);
        }
        if self.flows.is_full() {
            self.at_a_limit(DropReason::TableFull, Some(source), now);
            return false;
        }
        true
    }

    /// Ends a flow that yields at `limit`.
    fn evicted(&mut self, key: FlowKey, mut flow: Flow<H>, limit: Limit, now: Instant) {
        self.stats.evicted_by_limit[limit as usize].add(1);
        if matches!(flow, Flow::Datagrams(_)) {
            self.stats.evicted.add(1);
        }
        self.warn(limit.as_str(), Some(key.inside.ip()), now);
        self.evicted_at_port(&flow);
        if let Flow::Tcp(connection) = &mut flow
            && connection.is_established()
        {
            // A connection that is cut must look neither complete nor alive.
            connection.send_reset(&mut self.io(now));
        }
        self.ended(key, flow, true);
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

    /// Counts a new flow that is refused.
    fn at_a_limit(&mut self, reason: DropReason, source: Option<IpAddr>, now: Instant) {
        self.stats.refuse(reason);
        self.warn(reason.as_str(), source, now);
    }

    /// Logs that a limit was reached, once a minute at most.
    fn warn(&mut self, limit: &str, source: Option<IpAddr>, now: Instant) {
        if !self.limit_log.is_due(now) {
            return;
        }
        let flows = self.flows.len();
        let (largest, held) = self.flows.largest_holder().unzip();
        let endpoint = source.map(|ip| ip.to_string()).unwrap_or_default();
        let largest_holder = largest.map(|ip| ip.to_string()).unwrap_or_default();
        let largest_network = largest
            .map_or("", |ip| self.settings.policy.name_of(self.settings.policy.network_of(ip)));
        tracing::warn!(
            network = &*self.settings.network,
            limit,
            endpoint,
            flows,
            largest_holder,
            largest_network,
            largest_holder_flows = held.unwrap_or(0),
            "NAT engine at a limit"
        );
    }

    /// A descriptor is short: whether a flow of the largest holder could be ended for it.
    fn give_up_a_flow(&mut self, now: Instant) -> bool {
        let ago = |time| now.checked_sub(time);
        // As long as an answer may take, so that those who come all at once do not push one another
        // out.
        let evicted = ago(ANSWER_TIME).and_then(|before| self.flows.evict_unanswered(before));
        let evicted =
            evicted.or_else(|| ago(IDLE_TIME).and_then(|before| self.flows.evict_idle(before)));
        let Some((key, flow)) = evicted else { return false };
        self.evicted(key, flow, Limit::Descriptors, now);
        true
    }

    fn begun(&mut self, kind: FlowKind, now: Instant) {
        self.measure_at.get_or_insert(now + SHARES_INTERVAL);
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
        self.measure_at.get_or_insert(self.latest + SHARES_INTERVAL);
        // Its timer finds nothing when it fires, but would stay until then: hours, for a
        // connection.
        if let Some(armed) = flow.timer().take()
            && let Some(token) = self.timer_token(&flow)
        {
            self.timers.disarm(armed, token);
        }
        match flow {
            Flow::Tcp(mut connection) => {
                if let Some(inbound) = &connection.inbound {
                    inbound.stats.flows.sub();
                    self.forget_connection_of(inbound.client);
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
        Refused::Rate => DropReason::Rate,
        Refused::Unanswered => DropReason::Unanswered,
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
