//! One event loop of the engine: its ports, its connections, its sessions.

use crate::cpu_meter::Meter;
use crate::engine::Shared;
use crate::listener::Listener;
use crate::port::{Direction, Port, Refusal, Tally};
use crate::tcp::{
    Accepted, Claim, Connection, Crowd, Holder, NARROW_BYTES, Phase, Scratch, Seat, Side, Turn,
    WIDE_BYTES,
};
use crate::udp::{Batches, Relay};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use tidegate_reactor::{Arena, Context, Handler, Interest, Key, List, PipePool, Readiness, Token};

/// Pipes that one loop may have lent at a time, and keeps when idle. Each is two descriptors and,
/// full, up to 1 MiB of kernel memory.
const PIPES: usize = 256;
const IDLE_PIPES: usize = 16;

/// How often a connection that carries payload is moved to the end of its list, at most.
const MOVED: Duration = Duration::from_secs(1);

/// How long a wide half may carry nothing before it is made narrow.
const WIDE_FOR: Duration = Duration::from_secs(2);

/// Holders whose connections are made narrow at a time when the budget is exceeded.
const RELIEVED_AT_A_TIME: usize = 8;

/// Connections of a holder that are looked at for a blocked one.
const MOST_LOOKED_AT: usize = 4096;

/// What a token refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    /// The client's socket of a connection.
    Client = Side::Client as isize,
    /// The backend's.
    Backend = Side::Backend as isize,
    /// A connection's dial timer.
    Dial,
    /// A published port.
    Port,
    /// A UDP port's session timer.
    Sessions,
    /// A UDP session's socket.
    Session,
    /// The timer of ports that rest.
    Rest,
    /// The timer of connections with a wide half.
    Wide,
}

impl Tag {
    const ALL: [Self; 8] = [
        Self::Client,
        Self::Backend,
        Self::Dial,
        Self::Port,
        Self::Sessions,
        Self::Session,
        Self::Rest,
        Self::Wide,
    ];

    pub(crate) fn token(self, key: Key) -> Token {
        Token::new(self as u8, key)
    }

    fn of(token: Token) -> Self {
        Self::ALL[usize::from(token.tag())]
    }
}

/// What a loop is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// Serve these ports.
    Publish(Vec<(Arc<Port>, Listener)>),
    /// Close this port; its flows end now. `done` is dropped when that has happened.
    Unpublish { port: Arc<Port>, done: mpsc::Sender<()> },
    /// Take over a connection that another loop accepted.
    Adopt(Box<(Accepted, Seat)>),
    /// Take over a connection that another loop accepted, for which one of yours has to end, for
    /// this limit.
    Supplant { accepted: Box<Accepted>, limit: Refusal },
    /// One of yours holds most of the bytes, of which there are too many.
    Relieve,
    /// Accept nothing more; what is running goes on.
    Drain { done: mpsc::Sender<()> },
    /// Cut everything and end.
    Stop,
}

/// A port as its loop sees it.
pub(crate) enum PortState {
    Tcp {
        port: Arc<Port>,
        listener: Listener,
        /// Not accepting, for want of descriptors.
        resting: bool,
        crowd: Crowd,
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

/// Where the session of an event is to be found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SessionRef {
    pub(crate) port: Key,
    pub(crate) session: Key,
}

/// The handler of one loop.
pub(crate) struct Worker {
    pub(crate) index: usize,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ports: Arena<PortState>,
    pub(crate) connections: Arena<Connection>,
    /// The connections of each holder, from the one that has carried nothing for longest, by about
    /// [`MOVED`].
    pub(crate) silence: HashMap<Holder, List>,
    /// Those with a wide half, or with one that has been narrowed and still holds much, in the same
    /// order.
    wide: List,
    /// Whether their timer is armed.
    wide_timer: bool,
    pub(crate) sessions: Arena<SessionRef>,
    pub(crate) resting: Vec<Key>,
    /// A client that was accepted when no descriptor was left, and its port.
    pub(crate) waiting: Option<(Key, Accepted)>,
    pub(crate) scratch: Scratch,
    pub(crate) batches: Option<Batches>,
    pub(crate) meter: Meter,
    /// Something will come of the connection that was accepted last, and soon.
    pub(crate) expects_until: Option<Instant>,
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
            silence: HashMap::new(),
            wide: List::default(),
            wide_timer: false,
            sessions: Arena::new(),
            resting: Vec::new(),
            waiting: None,
            scratch,
            batches: None,
            meter: Meter::new(Instant::now()),
            expects_until: None,
            run_queue: VecDeque::new(),
        }
    }

    fn publish(&mut self, cx: &mut Context<'_>, port: Arc<Port>, listener: Listener) {
        let label = port.label;
        let state = match label.protocol() {
            tidegate_model::Protocol::Udp => PortState::Udp(Box::new(Relay::new(port, listener))),
            _ => PortState::Tcp { port, listener, resting: false, crowd: Crowd::default() },
        };
        let key = self.ports.insert(state);
        let added = match self.ports.get(key) {
            Some(state) => cx.epoll.add(state.listener(), Tag::Port.token(key), Interest::Readable),
            None => Ok(()),
        };
        if let Err(error) = added {
            tracing::error!(publish = %label, %error, "port cannot be watched; see fs.epoll.max_user_watches");
            self.ports.remove(key);
        }
    }

    /// Closes the ports that `which` names; their UDP sessions end, their TCP connections do not.
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

    /// Cuts the connections that `which` names.
    fn cut_connections(&mut self, cx: &mut Context<'_>, which: impl Fn(&Arc<Port>) -> bool) {
        for key in self.connections.keys() {
            if self.connections.get(key).is_some_and(|connection| which(&connection.port)) {
                self.end_connection(cx, key, |connection, scratch| {
                    connection.reset(&mut scratch.pipes);
                });
            }
        }
    }

    /// Takes connection `key` out and ends it with `how`.
    fn end_connection(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        how: impl FnOnce(Connection, &mut Scratch),
    ) {
        let Some(holder) = self.connections.get(key).map(Connection::holder) else { return };
        if let Some(silence) = self.silence.get_mut(&holder) {
            silence.remove(&mut self.connections, key, |connection| &mut connection.links);
            if silence.is_empty() {
                self.silence.remove(&holder);
            }
        }
        self.unlist_wide(key);
        let Some(connection) = self.connections.remove(key) else { return };
        match connection.phase {
            Phase::Dialling { deadline, .. } => cx.timers.disarm(deadline, Tag::Dial.token(key)),
            Phase::Open { since } => {
                connection.port.stats.lived(cx.now.saturating_duration_since(since));
            }
        }
        connection.port.stats.live.fetch_sub(1, Ordering::Relaxed);
        self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
        how(connection, &mut self.scratch);
        if !self.resting.is_empty() {
            self.wake_resting(cx);
        }
    }

    /// Ends a connection whose backend was not reached.
    pub(crate) fn refuse_connection(&mut self, cx: &mut Context<'_>, key: Key, refusal: Refusal) {
        if let Some(connection) = self.connections.get(key) {
            connection.port.stats.refuse(refusal);
            tracing::debug!(publish = %connection.port.label, reason = refusal.as_str(), "connection refused");
        }
        self.end_connection(cx, key, |connection, scratch| connection.refuse(&mut scratch.pipes));
    }

    /// An event on one of a connection's sockets.
    fn connection_ready(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        side: Side,
        readiness: Readiness,
    ) {
        if self.learn(cx, key, side, readiness)
            && let Some(connection) = self.connections.get_mut(key)
            && !connection.queued
        {
            connection.queued = true;
            self.run_queue.push_back(key);
        }
    }

    /// Notes what one of a connection's sockets is ready for, and ends a dial that is over; whether
    /// payload may flow.
    pub(crate) fn learn(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        side: Side,
        readiness: Readiness,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        connection.note(side, readiness);
        if let Phase::Dialling { since, deadline } = connection.phase {
            match side {
                Side::Client if connection.has_failed(Side::Client) => {
                    self.refuse_connection(cx, key, Refusal::ClientGone);
                    return false;
                }
                // Its bytes wait in the socket.
                Side::Client => return false,
                Side::Backend if !readiness.is_writable() => return false,
                Side::Backend => {}
            }
            // One that was accepted and reset since was reached all the same, and may have said
            // something.
            if readiness.is_error()
                && let Err(error) = connection.connect_result()
                && error.kind() != io::ErrorKind::ConnectionReset
            {
                let refusal = crate::tcp::refusal(&error);
                self.refuse_connection(cx, key, refusal);
                return false;
            }
            // Often it is the round in which it was accepted, whose time stands still.
            let now = Instant::now();
            connection.phase = Phase::Open { since: now };
            connection.port.stats.dialled(now.saturating_duration_since(since));
            cx.timers.disarm(deadline, Tag::Dial.token(key));
        }
        true
    }

    /// Lets connection `key` move payload, and ends it when it is through.
    pub(crate) fn take_turn(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.queued = false;
        let turn = connection.turn(&mut self.scratch);
        if connection.take_progress() && cx.now >= connection.moved + MOVED {
            connection.moved = cx.now;
            let (holder, is_listed_wide) = (connection.holder(), connection.is_listed_wide);
            if let Some(silence) = self.silence.get_mut(&holder) {
                silence.remove(&mut self.connections, key, |connection| &mut connection.links);
                silence.append(&mut self.connections, key, |connection| &mut connection.links);
            }
            if is_listed_wide {
                self.wide
                    .remove(&mut self.connections, key, |connection| &mut connection.wide_links);
                self.wide
                    .append(&mut self.connections, key, |connection| &mut connection.wide_links);
            }
        }
        if matches!(turn, Turn::Wait | Turn::Again) {
            self.settle(cx, key);
        }
        let Some(connection) = self.connections.get_mut(key) else { return };
        match turn {
            Turn::Wait => self.watch_for_room(cx, key),
            Turn::Again => {
                connection.queued = true;
                self.run_queue.push_back(key);
                self.watch_for_room(cx, key);
            }
            Turn::Done => self.end_connection(cx, key, |connection, scratch| {
                connection.close(&mut scratch.pipes);
            }),
            Turn::Broken => self.cut_connection(cx, key),
        }
    }

    /// Gives and takes what the halves of connection `key` claim of the budget of bytes.
    fn settle(&mut self, cx: &mut Context<'_>, key: Key) {
        let mut holds_more = false;
        for direction in Direction::ALL {
            let Some(connection) = self.connections.get_mut(key) else { return };
            match connection.claim(direction, cx.now) {
                None => {}
                Some(Claim::Widen) => holds_more |= self.widen(cx, key, direction),
                Some(Claim::Hold) => {
                    connection.bound(direction);
                    let before = connection.charge(direction, NARROW_BYTES);
                    connection.seat().charge(before, NARROW_BYTES);
                    holds_more = true;
                }
                Some(Claim::Release) => {
                    let before = connection.charge(direction, 0);
                    connection.seat().charge(before, 0);
                }
            }
        }
        if holds_more {
            self.relieve(cx);
        }
    }

    /// Makes a half wide if the budget allows it; whether it holds more in any case.
    fn widen(&mut self, cx: &mut Context<'_>, key: Key, direction: Direction) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let before = connection.charge(direction, 0);
        connection.seat().charge(before, 0);
        if !connection.seat().take(WIDE_BYTES) {
            let now = connection.narrow(direction);
            connection.seat().charge(0, now);
            return now > before;
        }
        connection.widen(direction);
        if !std::mem::replace(&mut connection.is_listed_wide, true) {
            self.wide.append(&mut self.connections, key, |connection| &mut connection.wide_links);
        }
        self.look_at_wide(cx);
        false
    }

    /// Arms the timer of those with a wide half, if it is not.
    fn look_at_wide(&mut self, cx: &mut Context<'_>) {
        if !self.wide_timer
            && let Some(key) = self.wide.oldest()
        {
            self.wide_timer = true;
            cx.timers.arm(cx.now + WIDE_FOR, Tag::Wide.token(key));
        }
    }

    fn unlist_wide(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if std::mem::take(&mut connection.is_listed_wide) {
            self.wide.remove(&mut self.connections, key, |connection| &mut connection.wide_links);
        }
    }

    /// Makes those narrow that have carried nothing for a while, and gives back what they have of
    /// the budget as they drain.
    fn narrow_idle(&mut self, now: Instant) {
        self.narrow_those(|connection| connection.moved + WIDE_FOR <= now);
    }

    /// Makes the wide ones narrow that `which` names; whether there were any.
    fn narrow_those(&mut self, which: impl Fn(&Connection) -> bool) -> bool {
        // The budget bounds how many they are.
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
                connection.seat().charge(before, now);
                were_there |= was_wide;
                holds_much |= now > NARROW_BYTES;
            }
            if !holds_much {
                self.unlist_wide(key);
            }
        }
        were_there
    }

    /// Makes room if more bytes are held than may be: connections read less first, and then one
    /// ends.
    fn relieve(&mut self, cx: &mut Context<'_>) {
        if self.shared.shares.over_budget().is_some() {
            self.narrow_idle(cx.now);
        }
        for _ in 0..RELIEVED_AT_A_TIME {
            let Some((holder, at)) = self.shared.shares.over_budget() else { return };
            if at != self.index {
                // A loop that has ended holds nothing.
                return drop(self.shared.send(at, Message::Relieve));
            }
            if !self.narrow_those(|connection| connection.holder() == holder) {
                return self.cut_blocked(cx, holder);
            }
        }
    }

    /// Cuts the blocked connection of `holder` that has carried nothing for longest.
    fn cut_blocked(&mut self, cx: &mut Context<'_>, holder: Holder) {
        let Some(silence) = self.silence.get(&holder) else { return };
        let blocked = |key: &Key| self.connections.get(*key).is_some_and(Connection::is_blocked);
        let mut keys = silence.iter(&self.connections, |connection| &connection.links);
        let Some(key) = keys.by_ref().take(MOST_LOOKED_AT).find(blocked) else { return };
        drop(keys);
        if let Some(connection) = self.connections.get(key) {
            self.shared.log_budget(&connection.port, cx.now);
        }
        self.shared.metrics.evicted_for_bytes.increment(1);
        self.cut_connection(cx, key);
    }

    /// Ends a connection that did not end well.
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
            Tag::Backend => self.connection_ready(cx, key, Side::Backend, readiness),
            Tag::Port => match self.ports.get(key) {
                Some(PortState::Tcp { .. }) => self.accept(cx, key),
                Some(PortState::Udp(_)) => self.relay_in(cx, key),
                None => {}
            },
            Tag::Session => self.relay_out(cx, key),
            Tag::Dial | Tag::Sessions | Tag::Rest | Tag::Wide => {}
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
                self.cut_connections(cx, |other| Arc::ptr_eq(other, &port));
                drop(done);
            }
            Message::Adopt(adopted) => self.adopt(cx, adopted.0, adopted.1),
            Message::Supplant { accepted, limit } => self.seat_here(cx, *accepted, limit),
            Message::Relieve => self.relieve(cx),
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
            Tag::Dial => self.refuse_connection(cx, token.key(), Refusal::DialTimeout),
            Tag::Sessions => self.expire_sessions(cx, token.key()),
            Tag::Rest => self.wake_resting(cx),
            Tag::Wide => {
                self.wide_timer = false;
                self.narrow_idle(cx.now);
                self.look_at_wide(cx);
            }
            Tag::Client | Tag::Backend | Tag::Port | Tag::Session => {}
        }
    }

    fn turn(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..self.run_queue.len() {
            let Some(key) = self.run_queue.pop_front() else { break };
            self.take_turn(cx, key);
        }
        !self.run_queue.is_empty()
    }

    fn expects_until(&self) -> Option<Instant> {
        self.expects_until
    }
}
