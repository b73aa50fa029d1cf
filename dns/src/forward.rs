//! Forwarding of queries to upstream servers.
//!
//! Equal queries of one partition are forwarded once. [`Pending`] decides which query is forwarded
//! next and which is evicted at a limit; one task ([`dispatch`]) asks it for the next query. Each
//! forwarded query is a task that ends with its [`Failover`]. If an upstream server forwards a
//! query back to tidegate, the copy joins the outstanding query, so a forwarding loop ends with
//! that query.

mod port;
mod tcp;

use crate::answer::{Answer, Response};
use crate::cache::{Cache, Key};
use crate::client_id::ClientId;
use crate::message::{Bits, Request, StoredRequest, kind, relay};
use crate::metrics::{NetworkStats, Overload, ProcessMetrics, Usage};
use crate::partition::Partition;
use crate::pending::{Admission, Evicted, Limits, NextQuery, Pending};
use crate::scheduler::Rate;
use crate::servers::{HOST, ServerList};
use crate::upstream::{Check, CheckStep, Failover, Figures, Form, Health, Step};
pub(crate) use port::Bridges;
use port::{Egress, Ingress, Outstanding, Ports};
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

/// Limits of forwarding and of the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Maximum number of outstanding upstream queries.
    pub(crate) in_flight: usize,
    /// Maximum number of waiting clients.
    pub(crate) waiters: usize,
    /// Maximum number of waiting clients of one endpoint.
    pub(crate) waiters_per_endpoint: usize,
    /// Maximum number of queries forwarded for one endpoint per second.
    pub(crate) rate: u32,
    /// Maximum size of the cache in bytes.
    pub(crate) cache: usize,
    /// Maximum number of open source ports.
    pub(crate) ports: usize,
}

/// Upstream servers whose state is kept. At the limit, the least recently used is dropped.
const MAX_SERVERS: usize = 256;
/// Concurrent TCP connections to upstream servers: in total, per partition and per endpoint.
const TCP_AT_ONCE: usize = 64;
const TCP_PER_PARTITION: usize = 16;
const TCP_PER_ENDPOINT: usize = 8;
/// Queries started before the task yields to others: about 100 us of work.
const QUERIES_PER_TURN: usize = 16;
/// Interval of the check for expired queries while any are pending.
const TICK: Duration = Duration::from_millis(100);
/// Timeout of a query over TCP, including the wait for a connection slot.
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
/// Capacity of the channel of responses to one query.
const RESPONSE_QUEUE: usize = 16;
/// Maximum number of source ports that replace closed ones, per query and server, if the server
/// does not support TCP.
const MAX_NEW_PORTS: u32 = 2;

/// The namespaces from which queries are sent.
#[derive(Clone, Debug)]
pub(crate) struct Namespaces {
    /// The namespace of the host.
    pub(crate) host: Namespace,
    /// The namespace of the networks, for servers with an address in one of their subnets. It
    /// differs from that of the host in rootless mode.
    pub(crate) networks: Namespace,
}

/// The servers of a query.
struct Route {
    servers: Arc<[SocketAddr]>,
    /// The subset in subnets of networks.
    within: Arc<[SocketAddr]>,
}

/// Aborts the task on drop.
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A query that is being forwarded.
#[derive(Clone)]
struct ForwardedQuery {
    key: Key,
    /// The endpoint to which the query is charged.
    owner: ClientId,
    /// The servers in subnets of networks.
    within: Arc<[SocketAddr]>,
}

/// A response of one server to one query.
struct ServerResponse {
    server: SocketAddr,
    response: Response,
    /// Whether the case of the name was repeated. Known over TCP only.
    same_case: Option<bool>,
}

/// State of one query at one server.
#[derive(Debug)]
struct Attempt {
    form: Form,
    /// It has answered FORMERR or NOTIMP.
    format_error: bool,
    /// A response over UDP had the name in another case.
    case_changed: bool,
    /// A response over UDP was truncated.
    truncated: bool,
    /// The query was sent over TCP, which is tried once.
    tcp_tried: bool,
    /// Closed source ports that were replaced.
    new_ports: u32,
}

/// Forwards queries and caches the responses.
pub(crate) struct Forwarder {
    state: Mutex<State>,
    ports: Ports,
    bridges: Arc<Bridges>,
    namespaces: Namespaces,
    tcp: Semaphore,
    tcp_of: Mutex<BTreeMap<TcpHolder, Arc<Semaphore>>>,
    /// Notified when a query can possibly be started.
    wake: Arc<Notify>,
    bounds: Bounds,
    mixed_case: bool,
    metrics: Arc<ProcessMetrics>,
}

/// Holder of TCP connections: a partition, or an endpoint of it.
type TcpHolder = (Partition, Option<ClientId>);

struct State {
    cache: Cache,
    health: Health,
    pending: Pending<Waiter, Route, Running>,
    host: Arc<[SocketAddr]>,
}

type EvictedWaiters = Vec<Evicted<Waiter>>;

/// A client that waits for a response.
pub(crate) struct Waiter {
    pub(crate) request: StoredRequest,
    pub(crate) to: ReplyTo,
    /// Maximum size of the response in bytes.
    pub(crate) limit: usize,
    pub(crate) stats: Option<Arc<NetworkStats>>,
}

/// The destination of a response.
pub(crate) enum ReplyTo {
    Datagram(Arc<UdpSocket>, SocketAddr),
    /// A TCP connection. Its channel has room for all outstanding queries of the connection.
    Stream(mpsc::Sender<Vec<u8>>),
}

/// The immediate result of a query.
pub(crate) enum Lookup {
    /// Found in the cache. The second value is the age.
    Cached(Arc<Answer>, Duration),
    /// Pending: the waiter gets the response.
    Pending,
    /// Refused at a limit.
    Refused,
}

impl Forwarder {
    pub(crate) fn new(
        namespaces: Namespaces,
        bounds: Bounds,
        mixed_case: bool,
        metrics: Arc<ProcessMetrics>,
    ) -> Self {
        let state = State {
            cache: Cache::new(bounds.cache),
            health: Health::new(MAX_SERVERS),
            pending: Pending::new(Limits {
                in_flight: bounds.in_flight,
                waiters: bounds.waiters,
                waiters_per_endpoint: bounds.waiters_per_endpoint,
                rate: Rate::new(bounds.rate),
            }),
            host: Arc::new([]),
        };
        Self {
            state: Mutex::new(state),
            ports: Ports::new(bounds.ports, Arc::clone(&metrics)),
            bridges: Arc::default(),
            namespaces,
            tcp: Semaphore::new(TCP_AT_ONCE),
            tcp_of: Mutex::default(),
            wake: Arc::default(),
            bounds,
            mixed_case,
            metrics,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Invariants hold after every statement, so a poisoned lock is usable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bridges of the networks.
    pub(crate) fn bridges(&self) -> &Bridges {
        &self.bridges
    }

    /// Sets the servers of the host and drops cached responses of the previous ones.
    pub(crate) fn set_host(&self, servers: Arc<[SocketAddr]>) {
        let mut state = self.state();
        if state.host != servers {
            state.host = servers;
            state.cache.forget(HOST);
            self.metrics.entries.set(state.cache.len() as f64);
        }
    }

    /// Usage and limits.
    pub(crate) fn usage(&self) -> Usage {
        let (state, bounds) = (self.state(), &self.bounds);
        let pending = &state.pending;
        Usage {
            cache_bytes: [state.cache.size(), bounds.cache],
            in_flight: [pending.in_flight(), bounds.in_flight],
            waiting: [pending.waiters(), bounds.waiters],
            waiting_of_one: [pending.max_waiters(), bounds.waiters_per_endpoint],
            queued: pending.queued(),
            rate: pending.rate().per_second(),
            tcp_clients: [0; 2],
        }
    }

    /// The upstream servers: address, whether it is trusted, counters.
    pub(crate) fn figures(&self) -> Vec<(SocketAddr, bool, Figures)> {
        self.state().health.figures().collect()
    }

    /// Resolves `request` for an endpoint of `partition` from the cache or the servers of `list`
    /// (`None`: those of the host). `client_id` returns the endpoint, `is_within` whether an
    /// address is in the subnet of a network. `waiter` is called if the client has to wait.
    pub(crate) fn ask(
        &self,
        request: &Request<'_>,
        partition: &Partition,
        list: Option<&ServerList>,
        client_id: impl FnOnce() -> ClientId,
        is_within: impl Fn(IpAddr) -> bool,
        waiter: impl FnOnce() -> Waiter,
    ) -> Lookup {
        let bits = Bits::of(request);
        let servers = list.map_or(HOST, |list| list.number);
        let name = request.name().into();
        let key = Key { partition: partition.clone(), servers, kind: request.kind, bits, name };
        let now = now();
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some((answer, received)) = state.cache.get(&key, now) {
            self.metrics.hits.increment(1);
            return Lookup::Cached(Arc::clone(answer), now.saturating_duration_since(received));
        }
        let host = &state.host;
        let route = || {
            let servers = list.map_or_else(|| Arc::clone(host), |list| Arc::clone(&list.servers));
            let within = servers.iter().copied().filter(|server| is_within(server.ip())).collect();
            Route { servers, within }
        };
        let (client_id, mut evicted) = (client_id(), EvictedWaiters::new());
        let admission =
            state.pending.ask(&key, client_id.clone(), now, waiter, route, &mut evicted);
        drop(guard);
        self.fail_evicted(evicted);
        match admission {
            Admission::New => self.metrics.misses.increment(1),
            Admission::Joined => self.metrics.coalesced.increment(1),
            Admission::Refused => {
                self.metrics.refused(Overload::Waiters, Some(&client_id));
                return Lookup::Refused;
            }
        }
        self.wake.notify_one();
        Lookup::Pending
    }

    /// Starts up to [`QUERIES_PER_TURN`] queries. Returns when to call it again.
    fn turn(self: &Arc<Self>) -> Next {
        let (mut evicted, mut checks) = (EvictedWaiters::new(), Vec::new());
        let mut guard = self.state();
        let state = &mut *guard;
        let now = now();
        state.pending.expire(now, &mut evicted);
        let mut started = 0;
        while started < QUERIES_PER_TURN {
            let Some(NextQuery { key, owner, route }) = state.pending.next_query(now, &mut evicted)
            else {
                break;
            };
            let (failover, due) = state.health.begin_failover(&route.servers, now);
            let query =
                ForwardedQuery { key: key.clone(), owner, within: Arc::clone(&route.within) };
            checks.extend(due.into_iter().map(|check| (query.clone(), check)));
            let running = tokio::spawn(Arc::clone(self).run(query, failover)).abort_handle();
            state.pending.set_handle(&key, Running(running));
            started += 1;
        }
        self.metrics.in_flight.set(state.pending.in_flight() as f64);
        let next = if started == QUERIES_PER_TURN {
            Next::AtOnce
        } else if state.pending.is_idle() {
            Next::WhenAsked
        } else {
            Next::At(state.pending.wakes_at().unwrap_or(now + TICK).min(now + TICK))
        };
        drop(guard);
        self.fail_evicted(evicted);
        for (query, check) in checks {
            self.check(&query, check);
        }
        next
    }

    async fn run(self: Arc<Self>, query: ForwardedQuery, failover: Failover) {
        let answer = self.query_servers(&query, failover).await;
        self.complete(query.key, answer);
    }

    /// Answers the evicted waiters with SERVFAIL.
    fn fail_evicted(&self, evicted: EvictedWaiters) {
        if evicted.is_empty() {
            return;
        }
        let failure = Answer::failure();
        for Evicted { waiter, client_id, reason } in evicted {
            self.metrics.refused(reason, Some(&client_id));
            self.respond(&waiter, &failure);
        }
    }

    /// Queries the servers until one responds or the deadline passes.
    async fn query_servers(
        self: &Arc<Self>,
        query: &ForwardedQuery,
        mut failover: Failover,
    ) -> Answer {
        let (responses, mut received) = mpsc::channel(RESPONSE_QUEUE);
        let mut outstanding = Vec::new();
        let mut attempts = BTreeMap::new();
        let mut last = None;
        loop {
            let until = match failover.step(now()) {
                Step::Ask(server) => {
                    let attempt = attempts.entry(server).or_insert_with(|| self.attempt(server));
                    if !self.put(query, server, attempt.form, &responses, &mut outstanding) {
                        self.give_up_on(query, server, &mut failover);
                    }
                    continue;
                }
                Step::Silent(server, asked) => {
                    self.check_if_silent(query, server, asked);
                    continue;
                }
                Step::Wait(until) => until,
                Step::GiveUp => {
                    self.note_silent(&failover, None);
                    return last.unwrap_or_else(Answer::failure);
                }
            };
            let message = tokio::select! {
                message = received.recv() => message,
                () = sleep_until(until.into()) => continue,
            };
            let Some(ServerResponse { server, response, same_case }) = message else { continue };
            let attempt = attempts.entry(server).or_insert_with(|| self.attempt(server));
            match response {
                Response::Unrelated => {}
                Response::Answer(answer) => {
                    self.note_response(server, &mut failover, &outstanding);
                    self.note_features(server, attempt, &query.key, &answer, same_case);
                    if !answer.is_failure() {
                        self.note_silent(&failover, Some(server));
                        return answer;
                    }
                    self.state().health.failed(server);
                    failover.failed(server, now());
                    last = Some(answer);
                }
                Response::Truncated => {
                    self.note_response(server, &mut failover, &outstanding);
                    attempt.truncated = true;
                    self.fetch(query, server, attempt, &responses);
                }
                // A blind attacker cannot forge a response over TCP.
                Response::CaseChanged => {
                    attempt.case_changed = true;
                    self.fetch(query, server, attempt, &responses);
                }
                Response::Flooded => {
                    outstanding.retain(|one: &Outstanding| one.server() != server);
                    self.fetch(query, server, attempt, &responses);
                }
                Response::TcpFailed => {
                    let goes_on = if attempt.truncated {
                        false
                    } else if attempt.case_changed && attempt.form.mixed {
                        // Repeated in lower case, with a new source port and ID, so that an
                        // attacker who has guessed the previous ones has no advantage. Responses to
                        // the previous port are ignored.
                        self.state().health.note_case_changed(server, None, now());
                        attempt.form.mixed = false;
                        outstanding.retain(|one| one.server() != server);
                        self.put(query, server, attempt.form, &responses, &mut outstanding)
                    } else if attempt.new_ports < MAX_NEW_PORTS {
                        attempt.new_ports += 1;
                        attempt.tcp_tried = false;
                        self.put(query, server, attempt.form, &responses, &mut outstanding)
                    } else {
                        false
                    };
                    if !goes_on {
                        self.state().health.failed(server);
                        failover.failed(server, now());
                    }
                }
                // Repeated without EDNS even if other queries have recorded EDNS support of the
                // server meanwhile.
                Response::FormatError if attempt.form.edns => {
                    attempt.format_error = true;
                    attempt.form.edns = false;
                    if !self.put(query, server, attempt.form, &responses, &mut outstanding) {
                        self.give_up_on(query, server, &mut failover);
                    }
                }
                Response::FormatError | Response::Malformed => {
                    self.note_response(server, &mut failover, &outstanding);
                    self.state().health.failed(server);
                    failover.failed(server, now());
                }
                Response::Unreachable => self.give_up_on(query, server, &mut failover),
            }
        }
    }

    fn attempt(&self, server: SocketAddr) -> Attempt {
        let mut form = self.state().health.form(server, now());
        form.mixed &= self.mixed_case;
        Attempt {
            form,
            format_error: false,
            case_changed: false,
            truncated: false,
            tcp_tried: false,
            new_ports: 0,
        }
    }

    /// Sends the query to `server`. Returns whether that succeeded.
    fn put(
        &self,
        query: &ForwardedQuery,
        server: SocketAddr,
        form: Form,
        responses: &mpsc::Sender<ServerResponse>,
        outstanding: &mut Vec<Outstanding>,
    ) -> bool {
        self.state().health.note_sent(server);
        // Retransmissions use the same port and ID, so that a late response to an earlier one is
        // accepted.
        if let Some(before) =
            outstanding.iter().find(|one| one.server() == server && one.form() == form)
        {
            return before.send();
        }
        match self.ports.ask(
            self.egress(query, server),
            server,
            &query.key,
            form,
            responses.clone(),
        ) {
            Ok(one) => {
                let sent = one.send();
                outstanding.push(one);
                sent
            }
            Err(error) => {
                tracing::debug!(%server, %error, "upstream query not sent");
                false
            }
        }
    }

    /// Queries `server` over TCP, at most once per query and server. Runs in a separate task,
    /// because other servers may respond first.
    fn fetch(
        self: &Arc<Self>,
        query: &ForwardedQuery,
        server: SocketAddr,
        attempt: &mut Attempt,
        responses: &mpsc::Sender<ServerResponse>,
    ) {
        if std::mem::replace(&mut attempt.tcp_tried, true) {
            return;
        }
        let (this, query, responses) = (Arc::clone(self), query.clone(), responses.clone());
        let form = attempt.form;
        tokio::spawn(async move {
            let fetched = async {
                let (partition, owner) = (&query.key.partition, query.owner.clone());
                // Acquired from the narrowest to the widest scope, so that an endpoint that waits
                // for its own slots does not occupy those of others.
                let of_endpoint = this.tcp_of((partition.clone(), Some(owner)), TCP_PER_ENDPOINT);
                let _of_endpoint = of_endpoint.acquire().await;
                let of_partition = this.tcp_of((partition.clone(), None), TCP_PER_PARTITION);
                let _of_partition = of_partition.acquire().await;
                let _permit = this.tcp.acquire().await;
                tcp::fetch(this.egress(&query, server).namespace, server, &query.key, form).await
            };
            let fetched = tokio::select! {
                fetched = timeout(TCP_TIMEOUT, fetched) => fetched.ok().and_then(Result::ok),
                // The query has ended.
                () = responses.closed() => return,
            };
            let message = match fetched {
                None => ServerResponse { server, response: Response::TcpFailed, same_case: None },
                // There is no better transport for a truncated or unrelated response over TCP.
                Some((Response::Truncated | Response::Unrelated, same)) => {
                    ServerResponse { server, response: Response::Malformed, same_case: Some(same) }
                }
                Some((response, same)) => {
                    ServerResponse { server, response, same_case: Some(same) }
                }
            };
            let _ = responses.send(message).await;
        });
    }

    /// The semaphore that limits the connections of `holder` to `limit`.
    fn tcp_of(&self, holder: TcpHolder, limit: usize) -> Arc<Semaphore> {
        let mut all = self.tcp_of.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= TCP_AT_ONCE {
            all.retain(|_, one| Arc::strong_count(one) > 1);
        }
        Arc::clone(all.entry(holder).or_insert_with(|| Arc::new(Semaphore::new(limit))))
    }

    fn egress(&self, query: &ForwardedQuery, server: SocketAddr) -> Egress<'_> {
        let within = query.within.contains(&server);
        let namespace = if within { &self.namespaces.networks } else { &self.namespaces.host };
        // Bridge indexes are valid in the namespace of the networks only.
        let ingress = if within {
            Ingress::Inside(Arc::clone(&self.bridges))
        } else if namespace.id() == self.namespaces.networks.id() {
            Ingress::Outside(Arc::clone(&self.bridges))
        } else {
            Ingress::Any
        };
        Egress { namespace, ingress }
    }

    /// Records that `server` has responded. The response time is recorded once per query.
    fn note_response(
        &self,
        server: SocketAddr,
        failover: &mut Failover,
        outstanding: &[Outstanding],
    ) {
        let now = now();
        let mut state = self.state();
        let one = outstanding.iter().find(|one| one.server() == server);
        if let Some(one) = one.filter(|_| failover.responded(server)) {
            state.health.note_response_time(
                server,
                now.saturating_duration_since(one.asked()),
                now,
            );
        }
        if state.health.responded(server, now) {
            tracing::info!(%server, "DNS server responds again");
        }
    }

    /// Records the features of `server` that `answer` shows.
    fn note_features(
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
            health.note_edns(server, now);
        } else if attempt.format_error && !attempt.form.edns && !answer.is_failure() {
            health.note_no_edns(server, now);
        }
        // A name without letters has no case.
        if key.name.iter().any(u8::is_ascii_alphabetic) {
            match same_case {
                None if attempt.form.mixed => health.note_case_preserved(server, now),
                Some(same) if attempt.case_changed => {
                    health.note_case_changed(server, Some(!same), now);
                }
                _ => {}
            }
        }
    }

    fn give_up_on(
        self: &Arc<Self>,
        query: &ForwardedQuery,
        server: SocketAddr,
        failover: &mut Failover,
    ) {
        self.state().health.missed(server);
        let now = now();
        self.check_if_silent(query, server, now);
        failover.unreachable(server, now);
    }

    /// Counts the servers that did not respond in time. Only a liveness check decides whether they
    /// are alive.
    fn note_silent(&self, failover: &Failover, winner: Option<SocketAddr>) {
        let mut state = self.state();
        failover.silent(now(), winner).into_iter().for_each(|server| state.health.missed(server));
    }

    /// Starts a liveness check of `server`, if one is due, after a query sent at `asked` was not
    /// answered.
    fn check_if_silent(
        self: &Arc<Self>,
        query: &ForwardedQuery,
        server: SocketAddr,
        asked: Instant,
    ) {
        let check = self.state().health.check_silent(server, asked, now());
        if let Some(check) = check {
            self.check(query, check);
        }
    }

    /// Runs a liveness check in a separate task.
    fn check(self: &Arc<Self>, query: &ForwardedQuery, mut check: Check) {
        let (this, within) = (Arc::clone(self), Arc::clone(&query.within));
        tokio::spawn(async move {
            // A separate partition, so that checks have their own share of source ports. The query
            // is for `. NS`.
            let key = Key {
                partition: Partition::of([]),
                servers: HOST,
                kind: kind::NS,
                bits: Bits::default(),
                name: [0].into(),
            };
            let owner = ClientId::Container(Arc::from(""));
            this.run_check(&ForwardedQuery { key, owner, within }, &mut check).await;
            this.state().health.check_ended(check.server);
        });
    }

    async fn run_check(&self, query: &ForwardedQuery, check: &mut Check) {
        let server = check.server;
        let (responses, mut received) = mpsc::channel(RESPONSE_QUEUE);
        let mut outstanding: Option<Outstanding> = None;
        let form = Form { edns: false, mixed: false };
        loop {
            let until = match check.step(now()) {
                CheckStep::Ask => {
                    if outstanding.is_none() {
                        let egress = self.egress(query, server);
                        let Ok(one) =
                            self.ports.ask(egress, server, &query.key, form, responses.clone())
                        else {
                            // Without a source port, the check says nothing about the server.
                            return;
                        };
                        outstanding = Some(one);
                    }
                    // A query that cannot be sent counts as unanswered.
                    outstanding.as_ref().map(Outstanding::send);
                    continue;
                }
                CheckStep::Fail => {
                    self.check_failed(check);
                    continue;
                }
                CheckStep::Wait(until) => until,
                CheckStep::End => return,
            };
            let message = tokio::select! {
                message = received.recv() => message,
                () = sleep_until(until.into()) => continue,
            };
            match message.map(|message| message.response) {
                // The server may be starting.
                Some(Response::Unreachable) => {
                    if check.refused() {
                        self.check_failed(check);
                    }
                }
                Some(Response::Flooded) | None => return,
                Some(_) => {
                    let now = now();
                    let mut state = self.state();
                    if state.health.responded(server, now) {
                        tracing::info!(%server, "DNS server responds again");
                    }
                    return;
                }
            }
        }
    }

    fn check_failed(&self, check: &Check) {
        if self.state().health.check_failed(check, now()) {
            tracing::warn!(server = %check.server, "DNS server does not respond; moved to the end of the list");
        }
    }

    /// Caches the response and sends it to all waiters.
    fn complete(&self, key: Key, answer: Answer) {
        let answer = Arc::new(answer);
        let waiters = {
            let mut state = self.state();
            let waiters = state.pending.complete(&key);
            let evicted = state.cache.put(key, Arc::clone(&answer), now());
            self.metrics.evicted.increment(evicted as u64);
            self.metrics.entries.set(state.cache.len() as f64);
            self.metrics.in_flight.set(state.pending.in_flight() as f64);
            if state.pending.queued() > 0 {
                self.wake.notify_one();
            }
            waiters
        };
        for (_, waiter) in waiters {
            self.respond(&waiter, &answer);
        }
    }

    fn respond(&self, waiter: &Waiter, answer: &Answer) {
        let request = waiter.request.request();
        if let Some(stats) = &waiter.stats {
            stats.count(request.kind, answer.rcode);
        }
        let mut out = Vec::new();
        relay(&request, &answer.relayed(Duration::ZERO), waiter.limit, &mut out);
        let sent = match &waiter.to {
            ReplyTo::Datagram(socket, client) => {
                rustix::net::sendto(socket, &out, SendFlags::DONTWAIT, client).is_ok()
            }
            // The channel has room, unless the connection is closed.
            ReplyTo::Stream(stream) => stream.try_send(out).is_ok() || stream.is_closed(),
        };
        if !sent {
            self.metrics.refused(Overload::Socket, None);
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        // Wakes the dispatcher so that it ends.
        self.wake.notify_one();
    }
}

/// When [`Forwarder::turn`] has to be called again.
enum Next {
    AtOnce,
    /// At this time, or at the next query.
    At(Instant),
    WhenAsked,
}

/// Forwards the pending queries of `forwarder` until it is dropped.
pub(crate) async fn dispatch(forwarder: Arc<Forwarder>) {
    let wake = Arc::clone(&forwarder.wake);
    let weak = Arc::downgrade(&forwarder);
    drop(forwarder);
    loop {
        let Some(forwarder) = weak.upgrade() else { return };
        let next = forwarder.turn();
        drop(forwarder);
        match next {
            // Lets other tasks run.
            Next::AtOnce => tokio::task::yield_now().await,
            Next::WhenAsked => wake.notified().await,
            Next::At(at) => tokio::select! {
                () = wake.notified() => {}
                () = sleep_until(at.into()) => {}
            },
        }
    }
}

/// The time of tokio, which tests can pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
