//! The engine: forwards packets of the guest to sockets of the host, and received data back to the
//! guest.
//!
//! # Theory of operation
//! In each iteration of its loop, a driver calls:
//!
//! 1. [`classify`](Engine::classify) for each frame read from the device, before it is queued;
//!    [`packet`](Engine::packet) for each packet that leaves the queue; and
//!    [`flush`](Engine::flush) when no more packets are available;
//! 2. [`ready`](Engine::ready) for each socket that has become ready, and
//!    [`port_ready`](Engine::port_ready) for the socket of a published port;
//! 3. [`handle_timeout`](Engine::handle_timeout) when [`poll_timeout`](Engine::poll_timeout) is
//!    due;
//! 4. [`turn`](Engine::turn) once, which performs pending work with a budget for each flow.
//!
//! The engine calls its [`Host`] for every side effect, and these calls must not block. There is no
//! output queue in between: payload moves from the read buffer directly to the socket, and from the
//! socket queue to the device.
//!
//! ```text
//!  frame ─► virtio, IP ─► complete? ─no─► reassembly ─┐
//!            │ malformed    │ yes ◄───────────────────┘
//!            ▼              ▼
//!          drop      TCP / UDP / ICMP ─► flow exists? ─no─► policy, limits, descriptor ─no─► refuse: ICMP, RST or drop
//!                                          │ yes                │ yes
//!                                          ▼                    ▼
//!                                     state machine ◄────── new flow: connect
//! ```

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

pub mod classify;
mod datagrams;
mod icmp;
pub(crate) mod inbound;
mod published;
mod tcp;

use crate::fair_queue::{FairQueue, QueueLimits};
use crate::flow_table::{Admission, AdmissionError, Class, FlowKey, FlowTable, Limit, Origin};
use crate::fragments::{FragmentOutcome, Reassembly};
use crate::gso_batch::GsoBatch;
use crate::host::{Host, Ready};
use crate::metrics::{DropReason, FlowKind, Stats};
use crate::policy::{Policy, Verdict};
use crate::settings::Settings;
use crate::siphash::{HashKey, SipHasher};
use crate::tcp::{Connection, Io, Opening, Params};
use crate::wire::ip::Packet;
use crate::wire::protocol;
use crate::wire::virtio::{Segmentation, VirtioHeader};
use classify::Parsed;
use datagrams::Session;
use published::{Clients, GatewayPorts, PublishedPorts};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::LogInterval;
use tidegate_reactor::{Key, Timers, Token};

/// Maximum number of flows served per turn. More would delay queued packets.
const FLOWS_PER_TURN: usize = 64;

/// Each flow is queued at most once, so the flow table limits the queue.
const WORK: QueueLimits = QueueLimits { items: usize::MAX, bytes: usize::MAX, quantum: 4 };

/// Maximum number of expired timers handled per call.
const TIMEOUTS_PER_TURN: usize = 64;

/// Minimum age of an unanswered flow, and minimum idle time of an answered flow, before it can be
/// evicted for its descriptor.
const ANSWER_TIME: Duration = Duration::from_millis(100);
const IDLE_TIME: Duration = Duration::from_secs(10);

/// Minimum interval between updates of the largest shares, which scan all sources.
const SHARES_INTERVAL: Duration = Duration::from_millis(200);

/// Secret keys, generated at start.
#[derive(Clone, Copy, Debug)]
pub struct Secrets {
    /// Key of the flow table.
    pub table: HashKey,
    /// Key of initial sequence numbers (RFC 6528) and timestamps.
    pub sequence: HashKey,
}

/// A TCP connection or a datagram session. Both are boxed, so that an entry of the table is small.
enum Flow<H: Host> {
    Tcp(Box<Connection<H::Stream>>),
    Datagrams(Box<Session<H::Datagrams>>),
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

/// The NAT engine; see the module documentation.
pub struct Engine<H: Host> {
    host: H,
    settings: Settings,
    params: Params,
    stats: Arc<Stats>,
    flows: FlowTable<Flow<H>>,
    reassembly: Reassembly,
    timers: Timers,
    /// Flows with pending work, each at most once, scheduled fairly between endpoints.
    queue: FairQueue<Key>,
    gso_batch: GsoBatch,
    batch: H::Batch,
    scratch: Vec<u8>,
    secrets: Secrets,
    epoch: Instant,
    identification: u32,
    /// Index of the current resolver.
    resolver: usize,
    /// Admission of the flow that the current packet creates.
    admission: Option<Admission>,
    /// Time of the last turn.
    latest: Instant,
    /// Time of the next update of the largest shares; `None` if they are unchanged.
    measure_at: Option<Instant>,
    limit_log: LogInterval,
    /// Number of dropped SYNs.
    refused_syns: u32,
    ports: PublishedPorts<H>,
    clients: Clients,
    gateway_ports: GatewayPorts,
}

impl<H: Host> Engine<H> {
    /// Creates an engine without flows. Its clocks start at `now`.
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
            ports: PublishedPorts::new(),
            clients: Clients::new(secrets.table),
            gateway_ports: GatewayPorts::after(secrets.sequence.0[1] as u16),
            settings,
            secrets,
            epoch: now,
        }
    }

    /// Returns the host.
    pub fn host_mut(&mut self) -> &mut H {
        &mut self.host
    }

    /// Sets the policy. Flows of containers to destinations that it rejects end, also those that
    /// are still connecting; all others continue.
    pub fn set_policy(&mut self, policy: Policy) {
        self.settings.policy = policy;
        let policy = &self.settings.policy;
        let host = &self.host;
        let rejects = |outside: SocketAddr| {
            policy.verdict(outside, |ip| host.is_local(ip)) == Verdict::Reject
        };
        let mut ended = Vec::new();
        for key in self.flows.keys() {
            let Some((five_tuple, flow)) = self.flows.get_mut(key) else { continue };
            let is_rejected = match flow {
                // The other side is the client of a published port.
                Flow::Tcp(connection) if connection.inbound.is_some() => false,
                Flow::Datagrams(session) if session.is_of_published_port() => false,
                Flow::Datagrams(session) if session.is_shared() => {
                    session.retain_peers(|peer| !rejects(SocketAddr::new(peer, 0)));
                    false
                }
                _ => rejects(five_tuple.outside),
            };
            if is_rejected {
                ended.push(key);
            }
        }
        for key in ended {
            self.stats.count_drop(DropReason::Policy);
            self.end(key, true);
        }
    }

    /// Ends all flows of containers with `addresses`, and those in which they are clients of
    /// published ports. Remote sides receive resets.
    pub fn end_flows_of(&mut self, addresses: &[IpAddr]) {
        let sessions = self.clients.sessions_of(addresses);
        for key in self.flows.keys() {
            let Some((five_tuple, flow)) = self.flows.get_mut(key) else { continue };
            let client = match flow {
                Flow::Tcp(connection) => connection.inbound.as_ref().map(|inbound| inbound.client),
                Flow::Datagrams(_) => None,
            };
            let has_address = |ip: IpAddr| addresses.contains(&ip);
            if has_address(five_tuple.inside.ip()) || client.is_some_and(has_address) {
                self.end(key, true);
            }
        }
        for session in sessions {
            self.end(session, false);
        }
    }

    /// Number of flows.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// Classifies and processes a frame immediately, for a driver without a queue.
    pub fn frame(&mut self, frame: &[u8], now: Instant) {
        if let Some((class, parsed)) = self.classify(frame, now) {
            self.serve(&parsed, &class, now);
        }
    }

    /// Processes a queued frame of the device, including the virtio header, that [`Self::classify`]
    /// accepted.
    pub fn packet(&mut self, frame: &[u8], class: &classify::Class, now: Instant) {
        match Parsed::of(frame) {
            // The policy may have changed while the frame was queued.
            Some(parsed) if self.settings.policy.accepts_source(parsed.packet.source) => {
                self.serve(&parsed, class, now);
            }
            parsed => {
                let reason = if parsed.is_some() {
                    DropReason::ForeignSource
                } else {
                    DropReason::Malformed
                };
                self.stats.count_drop(reason);
                if let Some(admission) = class.admission {
                    self.flows.refund(class.endpoint, admission);
                }
            }
        }
    }

    /// Processes a frame that was not queued after classification.
    pub(crate) fn serve(&mut self, parsed: &Parsed<'_>, class: &classify::Class, now: Instant) {
        self.admission = class.admission;
        self.serve_packet(parsed, now);
        // The flow already exists: an earlier packet of the same read created it.
        if let Some(admission) = self.admission.take() {
            self.flows.refund(class.endpoint, admission);
        }
    }

    fn serve_packet(&mut self, parsed: &Parsed<'_>, now: Instant) {
        let Parsed { header, packet } = parsed;
        let Some(fragment) = packet.fragment else {
            return self.process_whole(packet, *header, now);
        };
        match self.reassembly.add(packet, fragment, now) {
            FragmentOutcome::Stored => {}
            FragmentOutcome::Dropped => self.stats.count_drop(DropReason::Fragments),
            FragmentOutcome::Complete(payload) => {
                let whole =
                    Packet { payload: &payload, fragment: None, dont_fragment: false, ..*packet };
                let header =
                    VirtioHeader { verify: true, segmentation: Segmentation::None, segment: 0 };
                self.process_whole(&whole, header, now);
            }
        }
    }

    /// Records that the queue dropped a frame of `class`.
    pub fn note_queue_drop(&mut self, class: &classify::Class, now: Instant) {
        let endpoint = class.endpoint;
        if let Some(admission) = class.admission {
            self.flows.refund(endpoint, admission);
        }
        self.count_limit_drop(DropReason::Queue, Some(endpoint), now);
    }

    /// Whether the device has only one guest ([`Settings::one_guest`]).
    #[must_use]
    pub fn has_one_guest(&self) -> bool {
        self.settings.one_guest
    }

    /// Updates the number of queued bytes in the metrics.
    pub fn note_queue(&self, bytes: usize) {
        self.stats.queued_bytes.set(bytes as u64);
    }

    /// Updates the largest shares, if they may have changed and the interval has passed.
    fn measure_shares(&mut self, now: Instant) {
        if self.measure_at.is_some_and(|at| at <= now) {
            self.measure_at = None;
            let (flows, unanswered) = self.flows.largest_shares();
            self.stats.largest_shares[0].set(flows as u64);
            self.stats.largest_shares[1].set(unanswered as u64);
        }
    }

    /// Sends the pending GSO batch. Called when no more frames are available.
    pub fn flush(&mut self, now: Instant) {
        self.send_gso_batch(now);
    }

    fn process_whole(&mut self, packet: &Packet<'_>, header: VirtioHeader, now: Instant) {
        match (packet.protocol, packet.source) {
            (protocol::TCP, _) => self.tcp_packet(packet, header, now),
            (protocol::UDP, _) => self.udp_packet(packet, header, now),
            (protocol::ICMP, IpAddr::V4(_)) | (protocol::ICMPV6, IpAddr::V6(_)) => {
                self.icmp_packet(packet, now);
            }
            _ => self.stats.count_drop(DropReason::Protocol),
        }
    }

    /// Records the readiness of the socket of flow `key`. The key may be stale.
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

    /// Performs pending work. Returns true if some is left.
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
        while let Some((key, flow)) = self.flows.evict_over_budget() {
            self.finish_eviction(key, flow, Limit::HeldBytes, now);
        }
        self.stats.held_bytes.set(self.flows.held() as u64);
        !self.queue.is_empty()
    }

    /// The earliest deadline, at which to call [`Self::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let others = [self.reassembly.next_deadline(), self.ports.resume_at(), self.measure_at];
        self.timers.next_deadline().into_iter().chain(others.into_iter().flatten()).min()
    }

    /// Handles expired timers. [`Self::turn`] must be called afterwards.
    pub fn handle_timeout(&mut self, now: Instant) {
        for _ in 0..self.reassembly.expire(now) {
            self.stats.count_drop(DropReason::Fragments);
        }
        let host = &mut self.host;
        self.ports.resume(now, |port, key| host.watch_port(port, key));
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

    /// Closes all published ports and ends all flows. Remote sides receive resets.
    pub fn shutdown(&mut self) {
        for id in self.ports.ids() {
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

    /// Ensures that the timer of the flow fires at `deadline` or earlier. A deadline that every
    /// packet postpones does not re-arm the timer.
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

    /// Admits a flow, unless its packet was admitted at classification, and makes room for it. A
    /// refusal is counted and returns `None`.
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
                self.count_limit_drop(drop_reason(refused), Some(source), now);
                None
            }
        }
    }

    /// Evicts flows for a flow that was admitted.
    fn make_room(&mut self, source: IpAddr, origin: Origin, class: Class, now: Instant) -> bool {
        while let Some((key, flow, limit)) = self.flows.evict_for(source, origin, class) {
            self.finish_eviction(key, flow, limit, now);
        }
        if self.flows.is_full() {
            self.count_limit_drop(DropReason::TableFull, Some(source), now);
            return false;
        }
        true
    }

    /// Ends a flow that was evicted for `limit`.
    fn finish_eviction(&mut self, key: FlowKey, mut flow: Flow<H>, limit: Limit, now: Instant) {
        self.stats.evicted_by_limit[limit as usize].add(1);
        if matches!(flow, Flow::Datagrams(_)) {
            self.stats.evicted.add(1);
        }
        self.warn(limit.as_str(), Some(key.inside.ip()), now);
        self.count_port_eviction(&flow);
        if let Flow::Tcp(connection) = &mut flow
            && connection.is_established()
        {
            // The guest must not see an evicted connection as complete or as open.
            connection.send_reset(&mut self.io(now));
        }
        self.finish_flow(key, flow, true);
    }

    /// Initial parameters of connection `key`.
    fn opening(&self, key: &FlowKey, now: Instant) -> Opening {
        // RFC 6528 section 3: a clock with a tick of 4 microseconds, plus a keyed hash of the
        // five-tuple.
        let clock = now.saturating_duration_since(self.epoch).as_micros() as u64 / 4;
        Opening {
            inside: key.inside,
            outside: key.outside,
            iss: self.secret_of(key, 1).wrapping_add(clock) as u32,
            clock_offset: self.secret_of(key, 2) as u32,
        }
    }

    /// Resources for a connection without buffered data.
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

    /// Counts and logs a drop caused by a limit.
    fn count_limit_drop(&mut self, reason: DropReason, source: Option<IpAddr>, now: Instant) {
        self.stats.count_drop(reason);
        self.warn(reason.as_str(), source, now);
    }

    /// Logs that a limit was reached, at most once per minute.
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
            "NAT engine limit reached"
        );
    }

    /// Evicts a flow of the largest source to free a descriptor. Returns whether one was evicted.
    fn evict_for_descriptor(&mut self, now: Instant) -> bool {
        let ago = |time| now.checked_sub(time);
        // An unanswered flow must be old enough to have had a reply, so that concurrent new flows
        // do not evict one another.
        let evicted = ago(ANSWER_TIME).and_then(|before| self.flows.evict_unanswered(before));
        let evicted =
            evicted.or_else(|| ago(IDLE_TIME).and_then(|before| self.flows.evict_idle(before)));
        let Some((key, flow)) = evicted else { return false };
        self.finish_eviction(key, flow, Limit::Descriptors, now);
        true
    }

    fn count_new_flow(&mut self, kind: FlowKind, now: Instant) {
        self.measure_at.get_or_insert(now + SHARES_INTERVAL);
        self.stats.flows[kind as usize].add(1);
        self.stats.flows_begun[kind as usize].add(1);
    }

    /// Ends flow `key`. `cut` sends a reset to the remote side.
    fn end(&mut self, key: Key, cut: bool) {
        if let Some((five_tuple, flow)) = self.flows.remove(key) {
            self.finish_flow(five_tuple, flow, cut);
        }
    }

    fn finish_flow(&mut self, key: FlowKey, mut flow: Flow<H>, cut: bool) {
        self.stats.flows[flow.kind() as usize].sub();
        self.measure_at.get_or_insert(self.latest + SHARES_INTERVAL);
        // A stale timer is harmless, but would otherwise stay armed for hours in the case of a
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
                    self.clients.end_connection(inbound.client);
                }
                if let Some(stream) = connection.take_stream().filter(|_| cut) {
                    self.stats.resets.add(1);
                    self.host.abort(stream);
                }
            }
            Flow::Datagrams(session) => self.remove_client_session(&session.via),
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

    /// The next IP identification, for a packet that may be fragmented.
    fn next_identification(&mut self) -> u32 {
        self.identification = self.identification.wrapping_add(1);
        self.identification
    }

    /// A keyed hash of the five-tuple. Hashes for different values of `purpose` are independent.
    fn secret_of(&self, key: &FlowKey, purpose: u64) -> u64 {
        let mut hasher = SipHasher::<2, 4>::new(self.secrets.sequence);
        key.hash(&mut hasher);
        hasher.write_u64(purpose);
        hasher.finish()
    }

    /// The gateway address of the same family as `instead`, or `instead` itself.
    fn own_address(&self, instead: IpAddr) -> IpAddr {
        let gateways = &self.settings.policy.gateways;
        gateways.iter().copied().find(|ip| ip.is_ipv4() == instead.is_ipv4()).unwrap_or(instead)
    }
}

fn drop_reason(refused: AdmissionError) -> DropReason {
    match refused {
        AdmissionError::TableFull => DropReason::TableFull,
        AdmissionError::Rate => DropReason::Rate,
        AdmissionError::Unanswered => DropReason::Unanswered,
        AdmissionError::Sources => DropReason::Sources,
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
