//! An event loop of the engine with its ports, connections and sessions.

use crate::cpu_meter::Meter;
use crate::listener::Listener;
use crate::port::{Port, Refusal, Tally};
use crate::shared::{Message, Shared};
use crate::side::Side;
use crate::tcp::{
    AcceptBatch, Accepted, Claim, Connection, Holder, NARROW_BYTES, Phase, Scratch, Turn,
    WIDE_BYTES, connect_result,
};
use crate::udp::{Batches, Relay};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_model::{Direction, share_of};
use tidegate_reactor::{Arena, Context, Handler, Interest, Key, List, PipePool, Readiness, Token};

/// Maximum number of pipes that one loop lends at a time, and number that it keeps when idle. A
/// pipe takes two descriptors and, when full, up to 1 MiB of kernel memory.
const PIPES: usize = 256;
const IDLE_PIPES: usize = 16;

/// Minimum interval between two moves of an active connection to the end of its list.
const REORDER_INTERVAL: Duration = Duration::from_secs(1);

/// How long a wide half may be idle before it becomes narrow.
const WIDE_IDLE: Duration = Duration::from_secs(2);

/// Maximum number of holders whose connections become narrow in one pass when the budget is
/// exceeded.
const HOLDERS_PER_PASS: usize = 8;

/// Maximum number of connections of a holder that are searched for a blocked one.
const MAX_SCANNED: usize = 4096;

/// Type of the object that a token refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// The client socket of a connection.
    Client = Side::Client as isize,
    /// The backend socket of a connection.
    Backend = Side::Backend as isize,
    /// A further socket of a connection that is dialling.
    Rival,
    /// The dial timer of a connection.
    Dial,
    /// The hedge timer of a connection.
    Hedge,
    /// A published port.
    Port,
    /// The session timer of a UDP port.
    Sessions,
    /// The socket of a UDP session.
    Session,
    /// The timer that resumes paused ports.
    Resume,
    /// The timer of connections with a wide half.
    Wide,
}

impl Tag {
    const ALL: [Self; 10] = [
        Self::Client,
        Self::Backend,
        Self::Rival,
        Self::Dial,
        Self::Hedge,
        Self::Port,
        Self::Sessions,
        Self::Session,
        Self::Resume,
        Self::Wide,
    ];

    pub(crate) fn token(self, key: Key) -> Token {
        Token::new(self as u8, key)
    }

    fn of(token: Token) -> Self {
        Self::ALL[usize::from(token.tag())]
    }
}

/// State of a published port in its loop.
pub(crate) enum PortState {
    Tcp {
        port: Arc<Port>,
        listener: Listener,
        /// Not accepting: descriptors are exhausted, or the socket could not be restored.
        paused: bool,
        accept_batch: AcceptBatch,
    },
    Udp(Box<Relay>),
}

impl PortState {
    fn port(&self) -> &Arc<Port> {
        match self {
            Self::Tcp { port, .. } => port,
            Self::Udp(relay) => &relay.port,
        }
    }

    fn listener(&self) -> &Listener {
        match self {
            Self::Tcp { listener, .. } => listener,
            Self::Udp(relay) => &relay.listener,
        }
    }
}

/// Location of a UDP session: its port and its key in the table of that port.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionRef {
    pub(crate) port: Key,
    pub(crate) session: Key,
}

/// The event handler of one loop.
pub(crate) struct Worker {
    pub(crate) index: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ports: Arena<PortState>,
    pub(crate) connections: Arena<Connection>,
    /// The connections of each holder by idle time, longest first, with a resolution of
    /// [`REORDER_INTERVAL`].
    pub(crate) idle_order: HashMap<Holder, List>,
    /// Connections with a half that is wide, or was narrowed and still holds more than
    /// [`NARROW_BYTES`]; in the same order.
    wide: List,
    /// Whether the timer of `wide` is armed.
    wide_timer: bool,
    pub(crate) sessions: Arena<SessionRef>,
    pub(crate) paused: Vec<Key>,
    /// A client that was accepted when no descriptor was free, and its port.
    pub(crate) waiting: Option<(Key, Accepted)>,
    pub(crate) scratch: Scratch,
    pub(crate) batches: Option<Batches>,
    pub(crate) meter: Meter,
    /// Until when the first event of the last accepted connection is expected.
    pub(crate) expects_until: Option<Instant>,
    /// Connections whose registered backend socket was replaced in this round. Backend events of
    /// this round are of the previous socket, because the loop waits for events once per round.
    /// The registration of the new socket makes epoll report its state in the next one.
    pub(crate) replaced: BTreeSet<Key>,
    run_queue: VecDeque<Key>,
}

impl Worker {
    pub(crate) fn new(index: usize, shared: Arc<Shared>) -> Self {
        let pipes = PipePool::new(PIPES, IDLE_PIPES, Arc::clone(&shared.descriptors));
        let scratch = Scratch::new(pipes, shared.settings.splice_from);
        Self {
            index,
            shared,
            ports: Arena::new(),
            connections: Arena::new(),
            idle_order: HashMap::new(),
            wide: List::default(),
            wide_timer: false,
            sessions: Arena::new(),
            paused: Vec::new(),
            waiting: None,
            scratch,
            batches: None,
            meter: Meter::new(Instant::now()),
            expects_until: None,
            replaced: BTreeSet::new(),
            run_queue: VecDeque::new(),
        }
    }

    fn publish(&mut self, cx: &mut Context<'_>, port: Arc<Port>, listener: Listener) {
        let label = port.label;
        let state = match label.protocol() {
            tidegate_model::Protocol::Udp => PortState::Udp(Box::new(Relay::new(port, listener))),
            _ => PortState::Tcp {
                port,
                listener,
                paused: false,
                accept_batch: AcceptBatch::default(),
            },
        };
        let key = self.ports.insert(state);
        let added = match self.ports.get(key) {
            Some(state) => cx.epoll.add(state.listener(), Tag::Port.token(key), Interest::Readable),
            None => Ok(()),
        };
        if let Err(error) = added {
            tracing::error!(publish = %label, %error, "epoll registration of port failed; see fs.epoll.max_user_watches");
            self.ports.remove(key);
        }
    }

    /// Closes the ports selected by `which` and ends their UDP sessions. TCP connections continue.
    fn close_ports(&mut self, which: impl Fn(&Arc<Port>) -> bool) {
        self.waiting = self.waiting.take().filter(|(_, accepted)| !which(&accepted.port));
        for key in self.ports.keys() {
            if self.ports.get(key).is_some_and(|state| which(state.port()))
                && let Some(PortState::Udp(mut relay)) = self.ports.remove(key)
            {
                for reference in relay.end_sessions() {
                    self.sessions.remove(reference);
                }
            }
        }
    }

    /// Ends the UDP sessions of `clients` and resets their connections.
    fn end_clients(&mut self, cx: &mut Context<'_>, clients: &BTreeSet<IpAddr>) {
        for key in self.ports.keys() {
            if let Some(PortState::Udp(relay)) = self.ports.get_mut(key) {
                for reference in relay.end_sessions_of(clients) {
                    self.sessions.remove(reference);
                }
            }
        }
        self.waiting =
            self.waiting.take().filter(|(_, accepted)| !clients.contains(&accepted.client_ip()));
        // Connections of an IPv6 client are listed by its /64.
        let shares: BTreeSet<IpAddr> = clients.iter().copied().map(share_of).collect();
        self.cut_connections(cx, |connection| {
            shares.contains(&connection.holder().client)
                && connection.client_ip().is_some_and(|ip| clients.contains(&ip))
        });
    }

    /// Resets the connections selected by `which`.
    fn cut_connections(&mut self, cx: &mut Context<'_>, which: impl Fn(&Connection) -> bool) {
        for key in self.connections.keys() {
            if self.connections.get(key).is_some_and(&which) {
                self.end_connection(cx, key, |connection, scratch| {
                    connection.reset(&mut scratch.pipes);
                });
            }
        }
    }

    /// Removes connection `key` and ends it with `how`.
    fn end_connection(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        how: impl FnOnce(Connection, &mut Scratch),
    ) {
        let Some(holder) = self.connections.get(key).map(Connection::holder) else { return };
        if let Some(idle_order) = self.idle_order.get_mut(&holder) {
            idle_order.remove(&mut self.connections, key, |connection| &mut connection.links);
            if idle_order.is_empty() {
                self.idle_order.remove(&holder);
            }
        }
        self.unlist_wide(key);
        let Some(connection) = self.connections.remove(key) else { return };
        match connection.phase {
            Phase::Dialling { deadline, .. } => {
                cx.timers.disarm(deadline, Tag::Dial.token(key));
                if let Some(hedge_at) = connection.dial.as_ref().and_then(|dial| dial.hedge_at()) {
                    cx.timers.disarm(hedge_at, Tag::Hedge.token(key));
                }
            }
            Phase::Open { since } => {
                connection.port.stats.record_lifetime(cx.now.saturating_duration_since(since));
            }
        }
        connection.port.stats.live.fetch_sub(1, Ordering::Relaxed);
        self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
        how(connection, &mut self.scratch);
        if !self.paused.is_empty() {
            self.resume_accepting(cx);
        }
    }

    /// Ends a connection that did not reach its backend.
    pub(crate) fn refuse_connection(&mut self, cx: &mut Context<'_>, key: Key, refusal: Refusal) {
        if let Some(connection) = self.connections.get(key) {
            connection.port.stats.refuse(refusal);
            tracing::debug!(publish = %connection.port.label, reason = refusal.as_str(), "connection refused");
        }
        self.end_connection(cx, key, |connection, scratch| connection.refuse(&mut scratch.pipes));
    }

    /// Handles an event on one of the sockets of a connection.
    fn connection_ready(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        side: Side,
        readiness: Readiness,
    ) {
        if self.apply_readiness(cx, key, side, readiness) {
            self.enqueue(key);
        }
    }

    /// Adds connection `key` to the run queue unless it is there.
    pub(crate) fn enqueue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(key)
            && !connection.queued
        {
            connection.queued = true;
            self.run_queue.push_back(key);
        }
    }

    /// Records the readiness of one side, and completes or fails a dial. Returns whether payload
    /// may be transferred.
    pub(crate) fn apply_readiness(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        side: Side,
        readiness: Readiness,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        if side == Side::Backend && connection.dial.is_some() {
            return self.advance_dial(cx, key, Some(readiness));
        }
        connection.record_readiness(side, readiness);
        if let Phase::Dialling { .. } = connection.phase {
            match side {
                Side::Client if connection.has_failed(Side::Client) => {
                    self.refuse_connection(cx, key, Refusal::ClientGone);
                    return false;
                }
                // The payload stays in the receive buffer.
                Side::Client => return false,
                Side::Backend if !readiness.is_writable() => return false,
                Side::Backend => {}
            }
            if let Err(error) = connect_result(connection.socket(Side::Backend), readiness) {
                self.refuse_connection(cx, key, crate::tcp::refusal(&error));
                return false;
            }
            self.open_connection(cx, key);
        }
        true
    }

    /// Ends the dial of connection `key`, whose backend is connected.
    pub(crate) fn open_connection(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Phase::Dialling { since, deadline } = connection.phase else { return };
        // `cx.now` is the time of the round, which is often the one that accepted this connection.
        let now = Instant::now();
        connection.phase = Phase::Open { since: now };
        connection.port.stats.record_dial(now.saturating_duration_since(since));
        cx.timers.disarm(deadline, Tag::Dial.token(key));
    }

    /// Gives connection `key` its turn, and ends it when it is complete.
    pub(crate) fn run_connection(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.queued = false;
        let turn = connection.turn(&mut self.scratch);
        if connection.take_progress() && cx.now >= connection.reordered + REORDER_INTERVAL {
            connection.reordered = cx.now;
            let (holder, is_listed_wide) = (connection.holder(), connection.is_listed_wide);
            if let Some(idle_order) = self.idle_order.get_mut(&holder) {
                idle_order.remove(&mut self.connections, key, |connection| &mut connection.links);
                idle_order.append(&mut self.connections, key, |connection| &mut connection.links);
            }
            if is_listed_wide {
                self.wide
                    .remove(&mut self.connections, key, |connection| &mut connection.wide_links);
                self.wide
                    .append(&mut self.connections, key, |connection| &mut connection.wide_links);
            }
        }
        if matches!(turn, Turn::Wait | Turn::Again) {
            self.update_budget(cx, key);
        }
        let Some(connection) = self.connections.get_mut(key) else { return };
        match turn {
            Turn::Wait => self.watch_writable(cx, key),
            Turn::Again => {
                connection.queued = true;
                self.run_queue.push_back(key);
                self.watch_writable(cx, key);
            }
            Turn::Done => self.end_connection(cx, key, |connection, scratch| {
                connection.close(&mut scratch.pipes);
            }),
            Turn::Broken => self.cut_connection(cx, key),
        }
    }

    /// Applies the budget requests of both halves of connection `key`.
    fn update_budget(&mut self, cx: &mut Context<'_>, key: Key) {
        let mut holds_more = false;
        for direction in Direction::ALL {
            let Some(connection) = self.connections.get_mut(key) else { return };
            match connection.claim(direction, cx.now) {
                None => {}
                Some(Claim::Widen) => holds_more |= self.widen(cx, key, direction),
                Some(Claim::Hold) => {
                    connection.limit_receive_buffer(direction);
                    let before = connection.charge(direction, NARROW_BYTES);
                    connection.reservation().charge(before, NARROW_BYTES);
                    holds_more = true;
                }
                Some(Claim::Release) => {
                    let before = connection.charge(direction, 0);
                    connection.reservation().charge(before, 0);
                }
            }
        }
        if holds_more {
            self.enforce_byte_budget(cx);
        }
    }

    /// Makes a half wide if the budget permits it. Otherwise returns whether its charge has grown.
    fn widen(&mut self, cx: &mut Context<'_>, key: Key, direction: Direction) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let before = connection.charge(direction, 0);
        connection.reservation().charge(before, 0);
        if !connection.reservation().take(WIDE_BYTES) {
            let now = connection.narrow(direction);
            connection.reservation().charge(0, now);
            return now > before;
        }
        connection.widen(direction);
        if !std::mem::replace(&mut connection.is_listed_wide, true) {
            self.wide.append(&mut self.connections, key, |connection| &mut connection.wide_links);
        }
        self.arm_wide_timer(cx);
        false
    }

    /// Arms the timer of `wide` unless it is armed.
    fn arm_wide_timer(&mut self, cx: &mut Context<'_>) {
        if !self.wide_timer
            && let Some(key) = self.wide.oldest()
        {
            self.wide_timer = true;
            cx.timers.arm(cx.now + WIDE_IDLE, Tag::Wide.token(key));
        }
    }

    fn unlist_wide(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if std::mem::take(&mut connection.is_listed_wide) {
            self.wide.remove(&mut self.connections, key, |connection| &mut connection.wide_links);
        }
    }

    /// Narrows connections that have been idle for [`WIDE_IDLE`]. Their charge decreases as they
    /// drain.
    fn narrow_idle(&mut self, now: Instant) {
        self.narrow_matching(|connection| connection.reordered + WIDE_IDLE <= now);
    }

    /// Narrows the wide connections selected by `which`. Returns whether any half was wide.
    fn narrow_matching(&mut self, which: impl Fn(&Connection) -> bool) -> bool {
        // The byte budget limits the length of this list.
        let keys: Vec<Key> =
            self.wide.iter(&self.connections, |connection| &connection.wide_links).collect();
        let mut were_there = false;
        for key in keys {
            let Some(connection) =
                self.connections.get_mut(key).filter(|connection| which(connection))
            else {
                continue;
            };
            let mut holds_much = false;
            for direction in Direction::ALL {
                let before = connection.charged(direction);
                let was_wide = connection.is_wide(direction);
                let now = if was_wide || before > NARROW_BYTES {
                    connection.narrow(direction)
                } else {
                    before
                };
                connection.reservation().charge(before, now);
                were_there |= was_wide;
                holds_much |= now > NARROW_BYTES;
            }
            if !holds_much {
                self.unlist_wide(key);
            }
        }
        were_there
    }

    /// If the byte budget is exceeded, narrows idle connections, then those of the largest holder,
    /// and finally resets one.
    fn enforce_byte_budget(&mut self, cx: &mut Context<'_>) {
        if self.shared.shares.over_budget().is_some() {
            self.narrow_idle(cx.now);
        }
        for _ in 0..HOLDERS_PER_PASS {
            let Some((holder, at)) = self.shared.shares.over_budget() else { return };
            if at != self.index {
                // A loop that has ended holds nothing.
                return drop(self.shared.send(at, Message::EnforceByteBudget));
            }
            if !self.narrow_matching(|connection| connection.holder() == holder) {
                return self.cut_blocked(cx, holder);
            }
        }
    }

    /// Resets the blocked connection of `holder` with the longest idle time.
    fn cut_blocked(&mut self, cx: &mut Context<'_>, holder: Holder) {
        let Some(idle_order) = self.idle_order.get(&holder) else { return };
        let blocked = |key: &Key| self.connections.get(*key).is_some_and(Connection::is_blocked);
        let mut keys = idle_order.iter(&self.connections, |connection| &connection.links);
        let Some(key) = keys.by_ref().take(MAX_SCANNED).find(blocked) else { return };
        drop(keys);
        if let Some(connection) = self.connections.get(key) {
            self.shared.log_budget(&connection.port, cx.now);
        }
        self.shared.metrics.evicted_for_bytes.increment(1);
        self.cut_connection(cx, key);
    }

    /// Ends a connection that has failed.
    pub(crate) fn cut_connection(&mut self, cx: &mut Context<'_>, key: Key) {
        self.end_connection(cx, key, |connection, scratch| {
            connection.port.stats.cut.add(1);
            connection.reset(&mut scratch.pipes);
        });
    }
}

impl Handler for Worker {
    type Message = Message;

    fn ready(&mut self, cx: &mut Context<'_>, token: Token, readiness: Readiness) {
        let key = token.key();
        match Tag::of(token) {
            Tag::Client => self.connection_ready(cx, key, Side::Client, readiness),
            Tag::Backend if self.replaced.contains(&key) => {}
            Tag::Backend => self.connection_ready(cx, key, Side::Backend, readiness),
            Tag::Rival => {
                if self.advance_dial(cx, key, None) {
                    self.enqueue(key);
                }
            }
            Tag::Port => match self.ports.get(key) {
                Some(PortState::Tcp { .. }) => self.accept(cx, key),
                Some(PortState::Udp(_)) => self.relay_in(cx, key),
                None => {}
            },
            Tag::Session => self.relay_out(cx, key),
            Tag::Dial | Tag::Hedge | Tag::Sessions | Tag::Resume | Tag::Wide => {}
        }
    }

    fn message(&mut self, cx: &mut Context<'_>, message: Message) {
        match message {
            Message::Publish(ports) => {
                for (port, listener) in ports {
                    self.publish(cx, port, listener);
                }
            }
            Message::Unpublish { port, done } => {
                self.close_ports(|other| Arc::ptr_eq(other, &port));
                self.cut_connections(cx, |other| Arc::ptr_eq(&other.port, &port));
                drop(done);
            }
            Message::EndBackends { backends, done } => {
                self.cut_connections(cx, |connection| {
                    connection.backend.is_some_and(|backend| backends.contains(&backend))
                });
                drop(done);
            }
            Message::EndClients { clients, done } => {
                self.end_clients(cx, &clients);
                drop(done);
            }
            Message::Adopt(adopted) => self.adopt(cx, adopted.0, adopted.1),
            Message::AdmitByEviction { accepted, limit } => {
                self.admit_forwarded(cx, *accepted, limit);
            }
            Message::EnforceByteBudget => self.enforce_byte_budget(cx),
            Message::Drain { done } => {
                self.close_ports(|_| true);
                drop(done);
            }
            Message::Stop => {
                self.close_ports(|_| true);
                self.cut_connections(cx, |_| true);
                cx.stop();
            }
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>, token: Token) {
        match Tag::of(token) {
            Tag::Dial => self.time_out_dial(cx, token.key()),
            Tag::Hedge => self.hedge(cx, token.key()),
            Tag::Sessions => self.expire_sessions(cx, token.key()),
            Tag::Resume => self.resume_accepting(cx),
            Tag::Wide => {
                self.wide_timer = false;
                self.narrow_idle(cx.now);
                self.arm_wide_timer(cx);
            }
            Tag::Client | Tag::Backend | Tag::Rival | Tag::Port | Tag::Session => {}
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..self.run_queue.len() {
            let Some(key) = self.run_queue.pop_front() else { break };
            self.run_connection(cx, key);
        }
        self.replaced.clear();
        !self.run_queue.is_empty()
    }

    fn expects_until(&self) -> Option<Instant> {
        self.expects_until
    }
}
