//! Questions for other servers, from the first asker to the last answer.
//!
//! Equal questions of one partition are one *flight*, however many ask. Which question is forwarded
//! when, and who yields at a limit, [`Pending`] decides; one task asks it for the next
//! ([`dispatch`]). A flight is a task that lives as long as its [`Pursuit`]. A question that comes
//! back to us, because a server forwards to where it came from, finds its own flight and waits
//! there: a loop ends with the flight.

mod port;
mod tcp;

use crate::answer::{Answer, Reading};
use crate::cache::{Cache, Key};
use crate::message::{Bits, Kept, Request, kind, relay};
use crate::metrics::{Fill, NetworkStats, Overload, ProcessMetrics};
use crate::partition::Partition;
use crate::pending::{Asked, Launch, Limits, Pending, Yielded};
use crate::scheduler::Rate;
use crate::servers::{HOST, ServerList};
use crate::upstream::{Check, CheckStep, Figures, Form, Health, Pursuit, Step};
use crate::zone::Asker;
pub(crate) use port::Bridges;
use port::{Outstanding, Ports, Way};
use rustix::net::SendFlags;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_netns::Namespace;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{sleep_until, timeout};

/// How much may be on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) flights: usize,
    pub(crate) waiters: usize,
    /// Of one endpoint.
    pub(crate) waiters_of_one: usize,
    /// Questions of one endpoint that are forwarded in a second.
    pub(crate) rate: u32,
    pub(crate) cache: usize,
    /// Source ports that are open at once.
    pub(crate) ports: usize,
}

/// Servers that are remembered.
const SERVERS: usize = 256;
/// Answers that are fetched over TCP at once, by all, by one partition and by one endpoint.
const TCP_AT_ONCE: usize = 64;
const TCP_OF_PARTITION: usize = 16;
const TCP_OF_ENDPOINT: usize = 8;
/// Questions that are forwarded before other tasks have their turn: some 100 us.
const AT_A_TIME: usize = 16;
/// How often it is looked for questions that have waited too long, while there are any.
const TICK: Duration = Duration::from_millis(100);
/// How long one may take.
const TCP_TIME: Duration = Duration::from_secs(3);
/// What servers have said to one question and nobody has looked at.
const UNREAD: usize = 16;
/// How many source ports of one question may be given up to someone who guesses, where the server
/// does not answer over TCP.
const RENEWALS: u32 = 2;

/// Where questions go out from.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    /// The host's namespace.
    pub(crate) outside: Namespace,
    /// The one that networks are in, for servers that are on one of them. An ordinary user's
    /// networks are not on the host.
    pub(crate) networks: Namespace,
}

/// How a question is forwarded.
struct Route {
    servers: Arc<[SocketAddr]>,
    /// Those that are on a network.
    within: Arc<[SocketAddr]>,
}

/// A task that ends with it.
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One question on its way.
#[derive(Clone)]
struct Flight {
    key: Key,
    /// Whose turn it was.
    owner: Asker,
    /// Those servers that are on a network.
    within: Arc<[SocketAddr]>,
}

/// What a server has said to a question.
struct Word {
    server: SocketAddr,
    reading: Reading,
    /// Over TCP: whether the case of the name was repeated.
    same_case: Option<bool>,
}

/// What one question has gone through with one server.
#[derive(Debug)]
struct Attempt {
    form: Form,
    /// It did not understand EDNS, or said so.
    misunderstood: bool,
    /// An answer over UDP had the name in another case.
    changed: bool,
    /// An answer over UDP was cut short.
    cut: bool,
    /// TCP is being tried, or has been.
    fetched: bool,
    renewals: u32,
}

/// Asks other servers.
pub(crate) struct Forwarder {
    state: Mutex<State>,
    ports: Ports,
    bridges: Arc<Bridges>,
    ways: Ways,
    tcp: Semaphore,
    tcp_of: Mutex<BTreeMap<TcpHolder, Arc<Semaphore>>>,
    /// A question may have its turn.
    wake: Arc<Notify>,
    bounds: Bounds,
    mixed_case: bool,
    metrics: Arc<ProcessMetrics>,
}

/// Whose TCP connections are bounded: a partition's, and of those an endpoint's.
type TcpHolder = (Partition, Option<Asker>);

struct State {
    cache: Cache,
    health: Health,
    pending: Pending<Waiter, Route, Running>,
    host: Arc<[SocketAddr]>,
}

type Yields = Vec<Yielded<Waiter>>;

/// An asker that waits.
pub(crate) struct Waiter {
    pub(crate) request: Kept,
    pub(crate) to: ReplyTo,
    /// The most bytes that the answer may have.
    pub(crate) limit: usize,
    pub(crate) stats: Option<Arc<NetworkStats>>,
}

/// Where an answer goes.
pub(crate) enum ReplyTo {
    Datagram(Arc<UdpSocket>, SocketAddr),
    /// To a connection, which bounds how many it waits for.
    Stream(mpsc::Sender<Vec<u8>>),
}

/// What became of a question at once.
pub(crate) enum Taken {
    /// It was known.
    Known(Arc<Answer>, Duration),
    /// The waiter will hear.
    OnItsWay,
    /// At a limit.
    Refused,
}

impl Forwarder {
    pub(crate) fn new(
        ways: Ways,
        bounds: Bounds,
        mixed_case: bool,
        metrics: Arc<ProcessMetrics>,
    ) -> Self {
        let state = State {
            cache: Cache::new(bounds.cache),
            health: Health::new(SERVERS),
            pending: Pending::new(Limits {
                flights: bounds.flights,
                waiters: bounds.waiters,
                waiters_of_one: bounds.waiters_of_one,
                rate: Rate::new(bounds.rate),
            }),
            host: Arc::new([]),
        };
        Self {
            state: Mutex::new(state),
            ports: Ports::new(bounds.ports, Arc::clone(&metrics)),
            bridges: Arc::default(),
            ways,
            tcp: Semaphore::new(TCP_AT_ONCE),
            tcp_of: Mutex::default(),
            wake: Arc::default(),
            bounds,
            mixed_case,
            metrics,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is in there holds after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bridges of our networks.
    pub(crate) fn bridges(&self) -> &Bridges {
        &self.bridges
    }

    /// From now on the host's servers are these. What others have said for them is forgotten: names
    /// may mean something else now.
    pub(crate) fn set_host(&self, servers: Arc<[SocketAddr]>) {
        let mut state = self.state();
        if state.host != servers {
            state.host = servers;
            state.cache.forget(HOST);
            self.metrics.entries.set(state.cache.len() as f64);
        }
    }

    /// How much is on its way and kept, and how much may be.
    pub(crate) fn fill(&self) -> Fill {
        let (state, bounds) = (self.state(), &self.bounds);
        let pending = &state.pending;
        Fill {
            cache_bytes: [state.cache.size(), bounds.cache],
            in_flight: [pending.flights(), bounds.flights],
            waiting: [pending.waiters(), bounds.waiters],
            waiting_of_one: [pending.most_waiters(), bounds.waiters_of_one],
            queued: pending.queued(),
            rate: pending.rate().per_second(),
            tcp_clients: [0; 2],
        }
    }

    /// What is remembered of servers: each, whether it is trusted, its figures.
    pub(crate) fn figures(&self) -> Vec<(SocketAddr, bool, Figures)> {
        self.state().health.figures().collect()
    }

    /// Asks the servers of `list`, or the host's, what `request` asks, for an endpoint of
    /// `partition`. `asker` names the endpoint, `is_within` tells which of the servers are on a
    /// network, and `waiter` is made if somebody has to wait, and may.
    pub(crate) fn ask(
        &self,
        request: &Request<'_>,
        partition: &Partition,
        list: Option<&ServerList>,
        asker: impl FnOnce() -> Asker,
        is_within: impl Fn(IpAddr) -> bool,
        waiter: impl FnOnce() -> Waiter,
    ) -> Taken {
        let bits = Bits::of(request);
        let servers = list.map_or(HOST, |list| list.number);
        let name = request.name().into();
        let key = Key { partition: partition.clone(), servers, kind: request.kind, bits, name };
        let now = now();
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some((answer, came)) = state.cache.get(&key, now) {
            self.metrics.hits.increment(1);
            return Taken::Known(Arc::clone(answer), now.saturating_duration_since(came));
        }
        let host = &state.host;
        let route = || {
            let servers = list.map_or_else(|| Arc::clone(host), |list| Arc::clone(&list.servers));
            let within = servers.iter().copied().filter(|server| is_within(server.ip())).collect();
            Route { servers, within }
        };
        let (asker, mut yielded) = (asker(), Yields::new());
        let asked = state.pending.ask(&key, asker.clone(), now, waiter, route, &mut yielded);
        drop(guard);
        self.tell_yielded(yielded);
        match asked {
            Asked::New => self.metrics.misses.increment(1),
            Asked::Joined => self.metrics.coalesced.increment(1),
            Asked::Refused => {
                self.metrics.refused(Overload::Waiters, Some(&asker));
                return Taken::Refused;
            }
        }
        self.wake.notify_one();
        Taken::OnItsWay
    }

    /// Forwards what has its turn, a few at a time. When to be called again.
    fn turn(self: &Arc<Self>) -> Next {
        let (mut yielded, mut checks) = (Yields::new(), Vec::new());
        let mut guard = self.state();
        let state = &mut *guard;
        let now = now();
        state.pending.expire(now, &mut yielded);
        let mut launched = 0;
        while launched < AT_A_TIME {
            let Some(Launch { key, owner, route }) = state.pending.launch(now, &mut yielded) else {
                break;
            };
            let (pursuit, due) = state.health.pursue(&route.servers, now);
            let flight = Flight { key: key.clone(), owner, within: Arc::clone(&route.within) };
            checks.extend(due.into_iter().map(|check| (flight.clone(), check)));
            let running = tokio::spawn(Arc::clone(self).fly(flight, pursuit)).abort_handle();
            state.pending.launched(&key, Running(running));
            launched += 1;
        }
        self.metrics.flights.set(state.pending.flights() as f64);
        let next = if launched == AT_A_TIME {
            Next::AtOnce
        } else if state.pending.is_idle() {
            Next::WhenAsked
        } else {
            Next::At(state.pending.wakes_at().unwrap_or(now + TICK).min(now + TICK))
        };
        drop(guard);
        self.tell_yielded(yielded);
        for (flight, check) in checks {
            self.check(&flight, check);
        }
        next
    }

    async fn fly(self: Arc<Self>, flight: Flight, pursuit: Pursuit) {
        let answer = self.pursue(&flight, pursuit).await;
        self.land(flight.key, answer);
    }

    /// Tells those whose question had to yield that it failed.
    fn tell_yielded(&self, yielded: Yields) {
        if yielded.is_empty() {
            return;
        }
        let failure = Answer::failure();
        for Yielded { waiter, asker, reason } in yielded {
            self.metrics.refused(reason, Some(&asker));
            self.tell(&waiter, &failure);
        }
    }

    /// Asks until there is an answer or no time left.
    async fn pursue(self: &Arc<Self>, flight: &Flight, mut pursuit: Pursuit) -> Answer {
        let (heard, mut hearing) = mpsc::channel(UNREAD);
        let mut outstanding = Vec::new();
        let mut attempts = BTreeMap::new();
        let mut last = None;
        loop {
            let until = match pursuit.step(now()) {
                Step::Ask(server) => {
                    let attempt = attempts.entry(server).or_insert_with(|| self.attempt(server));
                    if !self.put(flight, server, attempt.form, &heard, &mut outstanding) {
                        self.give_up_on(flight, server, &mut pursuit);
                    }
                    continue;
                }
                Step::Doubt(server, asked) => {
                    self.doubt(flight, server, asked);
                    continue;
                }
                Step::Wait(until) => until,
                Step::GiveUp => {
                    self.note_silent(&pursuit, None);
                    return last.unwrap_or_else(Answer::failure);
                }
            };
            let word = tokio::select! {
                heard = hearing.recv() => heard,
                () = sleep_until(until.into()) => continue,
            };
            let Some(Word { server, reading, same_case }) = word else { continue };
            let attempt = attempts.entry(server).or_insert_with(|| self.attempt(server));
            match reading {
                Reading::Other => {}
                Reading::Answer(answer) => {
                    self.note_heard(server, &mut pursuit, &outstanding);
                    self.note_abilities(server, attempt, &flight.key, &answer, same_case);
                    if !answer.is_failure() {
                        self.note_silent(&pursuit, Some(server));
                        return answer;
                    }
                    self.state().health.failed(server);
                    pursuit.failed(server, now());
                    last = Some(answer);
                }
                Reading::Truncated => {
                    self.note_heard(server, &mut pursuit, &outstanding);
                    attempt.cut = true;
                    self.fetch(flight, server, attempt, &heard);
                }
                // Over TCP nobody can forge it without seeing the connection.
                Reading::CaseChanged => {
                    attempt.changed = true;
                    self.fetch(flight, server, attempt, &heard);
                }
                Reading::Flooded => {
                    outstanding.retain(|one: &Outstanding| one.server() != server);
                    self.fetch(flight, server, attempt, &heard);
                }
                Reading::NoTcp => {
                    let goes_on = if attempt.cut {
                        false
                    } else if attempt.changed && attempt.form.mixed {
                        // In lower case, from another port and with another ID, so that an attacker
                        // who has guessed the old ones gains nothing. What reaches the old port is
                        // ignored.
                        self.state().health.changed_case(server, None, now());
                        attempt.form.mixed = false;
                        outstanding.retain(|one| one.server() != server);
                        self.put(flight, server, attempt.form, &heard, &mut outstanding)
                    } else if attempt.renewals < RENEWALS {
                        attempt.renewals += 1;
                        attempt.fetched = false;
                        self.put(flight, server, attempt.form, &heard, &mut outstanding)
                    } else {
                        false
                    };
                    if !goes_on {
                        self.state().health.failed(server);
                        pursuit.failed(server, now());
                    }
                }
                // Whatever others have learnt of it meanwhile.
                Reading::NotUnderstood if attempt.form.edns => {
                    attempt.misunderstood = true;
                    attempt.form.edns = false;
                    if !self.put(flight, server, attempt.form, &heard, &mut outstanding) {
                        self.give_up_on(flight, server, &mut pursuit);
                    }
                }
                Reading::NotUnderstood | Reading::Malformed => {
                    self.note_heard(server, &mut pursuit, &outstanding);
                    self.state().health.failed(server);
                    pursuit.failed(server, now());
                }
                Reading::Unreachable => self.give_up_on(flight, server, &mut pursuit),
            }
        }
    }

    fn attempt(&self, server: SocketAddr) -> Attempt {
        let mut form = self.state().health.form(server, now());
        form.mixed &= self.mixed_case;
        Attempt {
            form,
            misunderstood: false,
            changed: false,
            cut: false,
            fetched: false,
            renewals: 0,
        }
    }

    /// Sends the question to `server`. Whether that was possible.
    fn put(
        &self,
        flight: &Flight,
        server: SocketAddr,
        form: Form,
        heard: &mpsc::Sender<Word>,
        outstanding: &mut Vec<Outstanding>,
    ) -> bool {
        self.state().health.asks(server);
        // Again is from the same port with the same ID, so that the answer to the first one counts.
        if let Some(before) =
            outstanding.iter().find(|one| one.server() == server && one.form() == form)
        {
            return before.send();
        }
        match self.ports.ask(self.way(flight, server), server, &flight.key, form, heard.clone()) {
            Ok(one) => {
                let sent = one.send();
                outstanding.push(one);
                sent
            }
            Err(error) => {
                tracing::debug!(%server, %error, "a question cannot be sent");
                false
            }
        }
    }

    /// Gets the answer over TCP, in a task of its own: other servers may be faster. Once for each
    /// question and server.
    fn fetch(
        self: &Arc<Self>,
        flight: &Flight,
        server: SocketAddr,
        attempt: &mut Attempt,
        heard: &mpsc::Sender<Word>,
    ) {
        if std::mem::replace(&mut attempt.fetched, true) {
            return;
        }
        let (this, flight, heard) = (Arc::clone(self), flight.clone(), heard.clone());
        let form = attempt.form;
        tokio::spawn(async move {
            let fetched = async {
                let (partition, owner) = (&flight.key.partition, flight.owner.clone());
                // In this order, so that one endpoint fills neither queue of the others.
                let of_endpoint = this.tcp_of((partition.clone(), Some(owner)), TCP_OF_ENDPOINT);
                let _of_endpoint = of_endpoint.acquire().await;
                let of_partition = this.tcp_of((partition.clone(), None), TCP_OF_PARTITION);
                let _of_partition = of_partition.acquire().await;
                let _permit = this.tcp.acquire().await;
                tcp::fetch(this.way(&flight, server).namespace, server, &flight.key, form).await
            };
            let fetched = tokio::select! {
                fetched = timeout(TCP_TIME, fetched) => fetched.ok().and_then(Result::ok),
                // Nobody wants it any more.
                () = heard.closed() => return,
            };
            let word = match fetched {
                None => Word { server, reading: Reading::NoTcp, same_case: None },
                // An answer over TCP that is cut short, or to another question, has no better form.
                Some((Reading::Truncated | Reading::Other, same)) => {
                    Word { server, reading: Reading::Malformed, same_case: Some(same) }
                }
                Some((reading, same)) => Word { server, reading, same_case: Some(same) },
            };
            let _ = heard.send(word).await;
        });
    }

    /// What bounds the connections of `holder` to `limit`.
    fn tcp_of(&self, holder: TcpHolder, limit: usize) -> Arc<Semaphore> {
        let mut all = self.tcp_of.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= TCP_AT_ONCE {
            all.retain(|_, one| Arc::strong_count(one) > 1);
        }
        Arc::clone(all.entry(holder).or_insert_with(|| Arc::new(Semaphore::new(limit))))
    }

    fn way(&self, flight: &Flight, server: SocketAddr) -> Way<'_> {
        let within = flight.within.contains(&server);
        let namespace = if within { &self.ways.networks } else { &self.ways.outside };
        // Indexes are those of the namespace that the bridges are in.
        let is_beside_bridges = !within && namespace.id() == self.ways.networks.id();
        Way { namespace, bridges: is_beside_bridges.then(|| Arc::clone(&self.bridges)) }
    }

    /// `server` has answered; the time that it took is noted once in this pursuit.
    fn note_heard(&self, server: SocketAddr, pursuit: &mut Pursuit, outstanding: &[Outstanding]) {
        let now = now();
        let mut state = self.state();
        let one = outstanding.iter().find(|one| one.server() == server);
        if let Some(one) = one.filter(|_| pursuit.heard(server)) {
            state.health.took(server, now.saturating_duration_since(one.asked()), now);
        }
        if state.health.heard(server, now) {
            tracing::info!(%server, "DNS server answers again");
        }
    }

    /// What `answer` shows of what `server` can do.
    fn note_abilities(
        &self,
        server: SocketAddr,
        attempt: &Attempt,
        key: &Key,
        answer: &Answer,
        same_case: Option<bool>,
    ) {
        let now = now();
        let mut state = self.state();
        let health = &mut state.health;
        if answer.edns {
            health.speaks_edns(server, now);
        } else if attempt.misunderstood && !attempt.form.edns && !answer.is_failure() {
            health.plain(server, now);
        }
        // A name without letters shows nothing.
        if key.name.iter().any(u8::is_ascii_alphabetic) {
            match same_case {
                None if attempt.form.mixed => health.keeps_case(server, now),
                Some(same) if attempt.changed => health.changed_case(server, Some(!same), now),
                _ => {}
            }
        }
    }

    fn give_up_on(self: &Arc<Self>, flight: &Flight, server: SocketAddr, pursuit: &mut Pursuit) {
        self.state().health.missed(server);
        let now = now();
        self.doubt(flight, server, now);
        pursuit.gone(server, now);
    }

    /// Counts the servers that were silent. Whether they are alive their checks find out.
    fn note_silent(&self, pursuit: &Pursuit, winner: Option<SocketAddr>) {
        let mut state = self.state();
        pursuit.silent(now(), winner).into_iter().for_each(|server| state.health.missed(server));
    }

    /// Begins a check of `server` if there is reason to: a question that went there at `asked` is
    /// not answered.
    fn doubt(self: &Arc<Self>, flight: &Flight, server: SocketAddr, asked: Instant) {
        let check = self.state().health.doubt(server, asked, now());
        if let Some(check) = check {
            self.check(flight, check);
        }
    }

    /// Runs a check in a task of its own.
    fn check(self: &Arc<Self>, flight: &Flight, mut check: Check) {
        let (this, within) = (Arc::clone(self), Arc::clone(&flight.within));
        tokio::spawn(async move {
            // Of nobody's, so that it has a share of the ports of its own. The name is the root's.
            let key = Key {
                partition: Partition::of([]),
                servers: HOST,
                kind: kind::NS,
                bits: Bits::default(),
                name: [0].into(),
            };
            let owner = Asker::Container(Arc::from(""));
            this.run_check(&Flight { key, owner, within }, &mut check).await;
            this.state().health.checked(check.server);
        });
    }

    async fn run_check(&self, flight: &Flight, check: &mut Check) {
        let server = check.server;
        let (heard, mut hearing) = mpsc::channel(UNREAD);
        let mut question: Option<Outstanding> = None;
        let form = Form { edns: false, mixed: false };
        loop {
            let until = match check.step(now()) {
                CheckStep::Ask => {
                    if question.is_none() {
                        let way = self.way(flight, server);
                        let Ok(one) = self.ports.ask(way, server, &flight.key, form, heard.clone())
                        else {
                            // For want of a port: that says nothing about the server.
                            return;
                        };
                        question = Some(one);
                    }
                    // What cannot be sent is as good as unanswered.
                    question.as_ref().map(Outstanding::send);
                    continue;
                }
                CheckStep::Strike => {
                    self.strike(check);
                    continue;
                }
                CheckStep::Wait(until) => until,
                CheckStep::End => return,
            };
            let word = tokio::select! {
                heard = hearing.recv() => heard,
                () = sleep_until(until.into()) => continue,
            };
            match word.map(|word| word.reading) {
                // It may be about to start.
                Some(Reading::Unreachable) => {
                    if check.refused() {
                        self.strike(check);
                    }
                }
                Some(Reading::Flooded) | None => return,
                Some(_) => {
                    let now = now();
                    let mut state = self.state();
                    if state.health.heard(server, now) {
                        tracing::info!(%server, "DNS server answers again");
                    }
                    return;
                }
            }
        }
    }

    fn strike(&self, check: &Check) {
        if self.state().health.strike(check, now()) {
            tracing::warn!(server = %check.server, "DNS server does not answer; others are asked first");
        }
    }

    /// Tells all who wait.
    fn land(&self, key: Key, answer: Answer) {
        let answer = Arc::new(answer);
        let waiters = {
            let mut state = self.state();
            let waiters = state.pending.land(&key);
            let evicted = state.cache.put(key, Arc::clone(&answer), now());
            self.metrics.evicted.increment(evicted as u64);
            self.metrics.entries.set(state.cache.len() as f64);
            self.metrics.flights.set(state.pending.flights() as f64);
            if state.pending.queued() > 0 {
                self.wake.notify_one();
            }
            waiters
        };
        for (_, waiter) in waiters {
            self.tell(&waiter, &answer);
        }
    }

    fn tell(&self, waiter: &Waiter, answer: &Answer) {
        let request = waiter.request.request();
        if let Some(stats) = &waiter.stats {
            stats.count(request.kind, answer.rcode);
        }
        let mut out = Vec::new();
        relay(&request, &answer.given(Duration::ZERO), waiter.limit, &mut out);
        let sent = match &waiter.to {
            ReplyTo::Datagram(socket, client) => {
                rustix::net::sendto(socket, &out, SendFlags::DONTWAIT, client).is_ok()
            }
            // It has room, or is gone.
            ReplyTo::Stream(stream) => stream.try_send(out).is_ok() || stream.is_closed(),
        };
        if !sent {
            self.metrics.refused(Overload::Socket, None);
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // For the dispatcher to end.
        self.wake.notify_one();
    }
}

/// When [`Forwarder::turn`] is to be called again.
enum Next {
    AtOnce,
    /// Or when something is asked.
    At(Instant),
    WhenAsked,
}

/// Forwards the questions of `forwarder` for as long as it is there.
pub(crate) async fn dispatch(forwarder: Arc<Forwarder>) {
    let wake = Arc::clone(&forwarder.wake);
    let weak = Arc::downgrade(&forwarder);
    drop(forwarder);
    loop {
        let Some(forwarder) = weak.upgrade() else { return };
        let next = forwarder.turn();
        drop(forwarder);
        match next {
            // The others have their turn.
            Next::AtOnce => tokio::task::yield_now().await,
            Next::WhenAsked => wake.notified().await,
            Next::At(at) => tokio::select! {
                () = wake.notified() => {}
                () = sleep_until(at.into()) => {}
            },
        }
    }
}

/// As timers have it, so that tests can stop it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
