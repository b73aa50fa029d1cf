//! Questions for other servers, from the first asker to the last answer.
//!
//! Equal questions are one *flight*, however many ask. A flight is a task that lives as long as its [`Pursuit`]; all of them, and all who wait for them,
//! are counted and bounded. A question that comes back to us because a server forwards to whom it has it from finds its own flight and waits there: a loop ends
//! with the flight.

mod port;
mod tcp;

use crate::answer::{Answer, Reading};
use crate::cache::{Cache, Key};
use crate::message::{Bits, Kept, Request, relay};
use crate::metrics::{NetworkStats, Overload, ProcessMetrics};
use crate::servers::{HOST, ServerList};
use crate::upstream::{Figures, Health, Pursuit, Step};
use port::{Outstanding, Ports};
use rustix::net::SendFlags;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_netns::Namespace;
use tokio::net::UdpSocket;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep_until, timeout};

/// How much is on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) flights: usize,
    pub(crate) waiters: usize,
    pub(crate) cache: usize,
}

/// Servers that are remembered.
const SERVERS: usize = 256;
/// Answers that are fetched over TCP at once.
const TCP_AT_ONCE: usize = 64;
/// How long one may take.
const TCP_TIME: Duration = Duration::from_secs(3);
/// What servers have said to one question and nobody has looked at.
const UNREAD: usize = 16;

/// Where questions go out from.
#[derive(Clone, Debug)]
pub(crate) struct Ways {
    /// The host's namespace.
    pub(crate) outside: Namespace,
    /// The one that networks are in, for servers that are on one of them. An ordinary user's networks are not on the host.
    pub(crate) networks: Namespace,
}

/// One question on its way.
#[derive(Clone)]
struct Flight {
    key: Key,
    /// Those servers that are on a network.
    within: Arc<[SocketAddr]>,
}

/// Asks other servers.
pub(crate) struct Forwarder {
    state: Mutex<State>,
    ports: Ports,
    ways: Ways,
    tcp: Semaphore,
    bounds: Bounds,
    metrics: Arc<ProcessMetrics>,
}

struct State {
    cache: Cache,
    health: Health,
    flights: HashMap<Key, Vec<Waiter>>,
    waiters: usize,
    host: Arc<[SocketAddr]>,
}

/// One of the places that a server's askers have to wait in, so that one container cannot take all there are. Given back when it is dropped.
pub(crate) struct Seat(Arc<AtomicUsize>);

impl Seat {
    /// Takes one of `limit`.
    pub(crate) fn take(taken: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let seat = Self(Arc::clone(taken));
        (taken.fetch_add(1, Ordering::Relaxed) < limit).then_some(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An asker that waits.
pub(crate) struct Waiter {
    pub(crate) request: Kept,
    pub(crate) to: ReplyTo,
    /// The most bytes that the answer may have.
    pub(crate) limit: usize,
    pub(crate) stats: Option<Arc<NetworkStats>>,
    pub(crate) _seat: Seat,
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
    pub(crate) fn new(ways: Ways, bounds: Bounds, metrics: Arc<ProcessMetrics>) -> Self {
        let state = State {
            cache: Cache::new(bounds.cache),
            health: Health::new(SERVERS),
            flights: HashMap::new(),
            waiters: 0,
            host: Arc::new([]),
        };
        let ports = Ports::new(metrics.strangers.clone());
        Self { state: Mutex::new(state), ports, ways, tcp: Semaphore::new(TCP_AT_ONCE), bounds, metrics }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is in there holds after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the host's servers are these. What others have said for them is forgotten: names may mean something else now.
    pub(crate) fn set_host(&self, servers: Arc<[SocketAddr]>) {
        let mut state = self.state();
        if state.host != servers {
            state.host = servers;
            state.cache.forget(HOST);
            self.metrics.entries.set(state.cache.len() as f64);
        }
    }

    /// How much is on its way and kept, and how much may be.
    pub(crate) fn fill(&self) -> (Bounds, Bounds) {
        let state = self.state();
        let (flights, waiters, cache) = (state.flights.len(), state.waiters, state.cache.size());
        (Bounds { flights, waiters, cache }, self.bounds)
    }

    /// What is remembered of servers: each, whether it is trusted, its figures.
    pub(crate) fn figures(&self) -> Vec<(SocketAddr, bool, Figures)> {
        self.state().health.figures().collect()
    }

    /// Asks the servers of `list`, or the host's, what `request` asks; `is_within` tells which of them are on a
    /// network, and `waiter` is made if somebody has to wait, and may.
    pub(crate) fn ask(
        self: &Arc<Self>,
        request: &Request<'_>,
        list: Option<&ServerList>,
        is_within: impl Fn(IpAddr) -> bool,
        waiter: impl FnOnce() -> Option<Waiter>,
    ) -> Taken {
        let bits = Bits::of(request);
        let servers = list.map_or(HOST, |list| list.number);
        let key = Key { servers, kind: request.kind, bits, name: request.name().into() };
        let now = now();
        let mut state = self.state();
        if let Some((answer, came)) = state.cache.get(&key, now) {
            self.metrics.hits.increment(1);
            return Taken::Known(Arc::clone(answer), now.saturating_duration_since(came));
        }
        if state.waiters >= self.bounds.waiters {
            self.metrics.refused(Overload::Waiters);
            return Taken::Refused;
        }
        let flights = state.flights.len();
        let known = state.flights.get_mut(&key);
        if known.is_none() && flights >= self.bounds.flights {
            self.metrics.refused(Overload::Flights);
            return Taken::Refused;
        }
        let Some(waiter) = waiter() else {
            self.metrics.refused(Overload::Waiters);
            return Taken::Refused;
        };
        if let Some(waiters) = known {
            waiters.push(waiter);
            state.waiters += 1;
            self.metrics.coalesced.increment(1);
            return Taken::OnItsWay;
        }
        self.metrics.misses.increment(1);
        let servers = list.map_or_else(|| Arc::clone(&state.host), |list| Arc::clone(&list.servers));
        let pursuit = state.health.pursue(&servers, now);
        state.flights.insert(key.clone(), vec![waiter]);
        state.waiters += 1;
        self.metrics.flights.set(state.flights.len() as f64);
        drop(state);
        let within = servers.iter().copied().filter(|server| is_within(server.ip())).collect();
        tokio::spawn(Arc::clone(self).fly(Flight { key, within }, pursuit));
        Taken::OnItsWay
    }

    async fn fly(self: Arc<Self>, flight: Flight, mut pursuit: Pursuit) {
        let (heard, mut hearing) = mpsc::channel(UNREAD);
        let mut outstanding = Vec::new();
        let answer = self.pursue(&flight, &mut pursuit, &heard, &mut hearing, &mut outstanding).await;
        self.land(flight.key, answer);
        // A probe that others have overtaken is heard to its end.
        let Some((server, until)) = pursuit.probe() else { return };
        let back = timeout(until.saturating_duration_since(now()), async {
            while let Some((from, reading)) = hearing.recv().await {
                if from == server {
                    return reading != Reading::Unreachable;
                }
            }
            false
        });
        if back.await.unwrap_or(false) {
            self.note_time(server, &mut pursuit, &outstanding);
        } else {
            self.miss(server);
        }
    }

    /// Asks until there is an answer or no time left.
    async fn pursue(
        self: &Arc<Self>,
        flight: &Flight,
        pursuit: &mut Pursuit,
        heard: &mpsc::Sender<(SocketAddr, Reading)>,
        hearing: &mut mpsc::Receiver<(SocketAddr, Reading)>,
        outstanding: &mut Vec<Outstanding>,
    ) -> Answer {
        let mut last = None;
        loop {
            let until = match pursuit.step(now()) {
                Step::Ask(server) => {
                    if !self.put(flight, server, heard, outstanding) {
                        self.give_up_on(server, pursuit);
                    }
                    continue;
                }
                Step::Wait(until) => until,
                Step::GiveUp => {
                    self.strike(pursuit, None);
                    return last.unwrap_or_else(Answer::failure);
                }
            };
            let (server, reading) = tokio::select! {
                heard = hearing.recv() => match heard {
                    Some(heard) => heard,
                    None => continue,
                },
                () = sleep_until(until.into()) => continue,
            };
            match reading {
                Reading::Other => {}
                Reading::Answer(answer) => {
                    self.note_time(server, pursuit, outstanding);
                    if !answer.is_failure() {
                        self.strike(pursuit, Some(server));
                        return answer;
                    }
                    self.state().health.failed(server);
                    pursuit.failed(server, now());
                    last = Some(answer);
                }
                Reading::Truncated => {
                    self.note_time(server, pursuit, outstanding);
                    self.fetch(flight, server, heard);
                }
                // Whatever others have learnt of it meanwhile.
                Reading::NotUnderstood
                    if outstanding.iter().all(|one| one.server() != server || one.bits().edns) =>
                {
                    self.state().health.plain(server, now());
                    if !self.put(flight, server, heard, outstanding) {
                        self.give_up_on(server, pursuit);
                    }
                }
                Reading::NotUnderstood | Reading::Malformed => {
                    self.note_time(server, pursuit, outstanding);
                    self.state().health.failed(server);
                    pursuit.failed(server, now());
                }
                Reading::Unreachable => self.give_up_on(server, pursuit),
            }
        }
    }

    /// Sends the question to `server`. Whether that was possible.
    fn put(
        self: &Arc<Self>,
        flight: &Flight,
        server: SocketAddr,
        heard: &mpsc::Sender<(SocketAddr, Reading)>,
        outstanding: &mut Vec<Outstanding>,
    ) -> bool {
        let edns = {
            let mut state = self.state();
            state.health.asks(server);
            state.health.takes_edns(server, now())
        };
        let bits = Bits { edns, ..flight.key.bits };
        // Again is from the same port with the same number, so that the answer to the first one counts.
        if let Some(before) = outstanding.iter().find(|one| one.server() == server && one.bits() == bits) {
            return before.send();
        }
        match self.ports.ask(self.way(flight, server), server, &flight.key, bits, heard.clone()) {
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

    /// Gets the whole answer over TCP, in a task of its own: other servers may be faster.
    fn fetch(
        self: &Arc<Self>,
        flight: &Flight,
        server: SocketAddr,
        heard: &mpsc::Sender<(SocketAddr, Reading)>,
    ) {
        let (this, flight, heard) = (Arc::clone(self), flight.clone(), heard.clone());
        tokio::spawn(async move {
            let bits = Bits { edns: this.state().health.takes_edns(server, now()), ..flight.key.bits };
            let fetched = async {
                let _permit = this.tcp.acquire().await;
                tcp::fetch(this.way(&flight, server), server, &flight.key, bits).await
            };
            let reading = tokio::select! {
                fetched = timeout(TCP_TIME, fetched) => fetched.ok().and_then(Result::ok).unwrap_or(Reading::Malformed),
                // Nobody wants it any more.
                () = heard.closed() => return,
            };
            // An answer over TCP that is cut short has no better form.
            let reading = if reading == Reading::Truncated { Reading::Malformed } else { reading };
            let _ = heard.send((server, reading)).await;
        });
    }

    fn way(&self, flight: &Flight, server: SocketAddr) -> &Namespace {
        if flight.within.contains(&server) { &self.ways.networks } else { &self.ways.outside }
    }

    /// `server` has answered, for the first time in this pursuit.
    fn note_time(&self, server: SocketAddr, pursuit: &mut Pursuit, outstanding: &[Outstanding]) {
        let one = outstanding.iter().find(|one| one.server() == server);
        if let Some(one) = one.filter(|_| pursuit.heard(server)) {
            let took = now().saturating_duration_since(one.asked());
            if self.state().health.answered(server, took) {
                tracing::info!(%server, "DNS server answers again");
            }
        }
    }

    fn give_up_on(&self, server: SocketAddr, pursuit: &mut Pursuit) {
        self.miss(server);
        pursuit.gone(server, now());
    }

    fn strike(&self, pursuit: &Pursuit, winner: Option<SocketAddr>) {
        // Of a probe, `fly` hears the end.
        let probed = pursuit.probe().map(|(server, _)| server);
        let silent = pursuit.silent(now(), winner);
        silent.into_iter().filter(|server| Some(*server) != probed).for_each(|server| self.miss(server));
    }

    fn miss(&self, server: SocketAddr) {
        if self.state().health.missed(server, now()) {
            tracing::warn!(%server, "DNS server does not answer; others are asked first");
        }
    }

    /// Tells all who wait.
    fn land(&self, key: Key, answer: Answer) {
        let answer = Arc::new(answer);
        let waiters = {
            let mut state = self.state();
            let waiters = state.flights.remove(&key).unwrap_or_default();
            state.waiters -= waiters.len();
            let evicted = state.cache.put(key, Arc::clone(&answer), now());
            self.metrics.evicted.increment(evicted as u64);
            self.metrics.entries.set(state.cache.len() as f64);
            self.metrics.flights.set(state.flights.len() as f64);
            waiters
        };
        for waiter in waiters {
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
                self.metrics.refused(Overload::Socket);
            }
        }
    }
}

/// As timers have it, so that tests can stop it.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
