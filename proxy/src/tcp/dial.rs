//! Dials to upstreams with several backends: the next backend after a failure, and rivals to a
//! backend that does not answer.

use super::accept::refusal;
use super::connection::{connect_result, reset_on_close};
use super::{MAX_IN_FLIGHT, MAX_TRIES};
use crate::port::Refusal;
use crate::side::Side;
use crate::upstream::{BackendId, DialFailure, Flow, Lease, Opened, Upstream};
use crate::worker::{Tag, Worker};
use std::io;
use std::iter::once;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};
use tidegate_reactor::{Context, Epoll, Interest, Key, Permit, Readiness, is_exhaustion};

/// Minimum hedge interval: the resolution of the timers of a loop.
const MIN_HEDGE: Duration = Duration::from_millis(1);

/// State of a dial that may move to another backend. Exists until the dial has completed.
pub(crate) struct Dial {
    flow: Flow,
    /// The backends that were dialled, of which the first `count` are set.
    tried: [BackendId; MAX_TRIES],
    count: usize,
    /// Number of calls of [`Upstream::open_other`] that returned an error.
    errors: usize,
    /// The attempt whose socket is the backend socket of the connection.
    primary: Attempt,
    /// Further attempts in flight.
    rivals: Vec<Rival>,
    /// Time after the last attempt at which the next one starts, if there is no answer.
    hedge_after: Option<Duration>,
    /// The deadline of the armed hedge timer.
    hedge_at: Option<Instant>,
}

/// A connect to a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Attempt {
    backend: BackendId,
    /// Position among the attempts of the dial, by start time.
    number: usize,
}

/// An attempt besides the primary one.
struct Rival {
    attempt: Attempt,
    socket: OwnedFd,
    lease: Option<Lease>,
    permit: Permit,
}

/// Result of polling the attempts of a dial.
#[derive(Default)]
struct Answers {
    /// The completed attempt that started first.
    winner: Option<(Attempt, Readiness)>,
    failures: Vec<(Attempt, io::Error)>,
}

impl Dial {
    /// A dial for `flow` whose first attempt, to `backend`, was started.
    pub(crate) fn new(flow: Flow, backend: BackendId) -> Self {
        let mut tried = [0; MAX_TRIES];
        tried[0] = backend;
        Self {
            flow,
            tried,
            count: 1,
            errors: 0,
            primary: Attempt { backend, number: 0 },
            rivals: Vec::new(),
            hedge_after: None,
            hedge_at: None,
        }
    }

    /// The deadline of the armed hedge timer.
    pub(crate) fn hedge_at(&self) -> Option<Instant> {
        self.hedge_at
    }

    /// Resets the rivals.
    pub(crate) fn abort(self) {
        for rival in self.rivals {
            reset_on_close(&rival.socket);
        }
    }

    fn tried(&self) -> &[BackendId] {
        self.tried.get(..self.count).unwrap_or(&self.tried)
    }

    fn in_flight(&self) -> usize {
        1 + self.rivals.len()
    }

    fn rival_index(&self, attempt: Attempt) -> Option<usize> {
        self.rivals.iter().position(|rival| rival.attempt == attempt)
    }

    /// Opens a socket to another backend. Otherwise returns the last error, if there was one: no
    /// backend is left, or descriptors are exhausted.
    fn open_other(
        &mut self,
        upstream: &dyn Upstream,
    ) -> Result<(Attempt, OwnedFd, Option<Lease>), Option<io::Error>> {
        let mut last = None;
        while self.count + self.errors < MAX_TRIES {
            match upstream.open_other(&self.flow, self.tried()) {
                Some(Ok(Opened { socket, lease, backend: Some(backend) })) => {
                    let attempt = Attempt { backend, number: self.count };
                    if let Some(next) = self.tried.get_mut(self.count) {
                        *next = backend;
                    }
                    self.count += 1;
                    return Ok((attempt, socket, lease));
                }
                Some(Err(error)) => {
                    self.errors += 1;
                    let exhausted = is_exhaustion(&error);
                    last = Some(error);
                    if exhausted {
                        break;
                    }
                }
                // A backend without an identifier cannot be excluded from the next call.
                Some(Ok(Opened { backend: None, .. })) | None => break,
            }
        }
        Err(last)
    }

    /// Polls the sockets of all attempts. `reported` is the readiness of `primary`, the backend
    /// socket of the connection, from an event; it is used only if there was no other attempt,
    /// because the event may be of an earlier socket.
    fn answers(&self, primary: &OwnedFd, reported: Option<Readiness>) -> Answers {
        let reported = reported.filter(|_| self.count == 1);
        let rivals = self.rivals.iter().map(|rival| (rival.attempt, &rival.socket));
        let mut answers = Answers::default();
        for (attempt, socket) in once((self.primary, primary)).chain(rivals) {
            let readiness = reported.unwrap_or_else(|| poll(socket));
            match answer(socket, readiness) {
                None => {}
                Some(Ok(())) => {
                    let earlier =
                        answers.winner.filter(|(earlier, _)| earlier.number < attempt.number);
                    answers.winner = earlier.or(Some((attempt, readiness)));
                }
                Some(Err(error)) => answers.failures.push((attempt, error)),
            }
        }
        answers
    }
}

impl Worker {
    /// Takes the answers to the dial of connection `key`: completes it, dials other backends
    /// instead of those that have failed, or refuses the client. `reported` is the readiness of the
    /// backend socket, if known. Returns whether payload may be transferred.
    pub(crate) fn advance_dial(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        mut reported: Option<Readiness>,
    ) -> bool {
        // Bounded by the tries: each iteration but the last replaces or removes an attempt.
        loop {
            let Some(connection) = self.connections.get(key) else { return false };
            let Some(dial) = &connection.dial else { return false };
            let Answers { winner, failures } =
                dial.answers(connection.socket(Side::Backend), reported.take());
            for (Attempt { backend, .. }, error) in &failures {
                let port = &connection.port;
                tracing::debug!(publish = %port.label, backend, %error, "backend dial failed");
                port.options.upstream.failed(*backend, failure(error));
            }
            if let Some((winner, readiness)) = winner {
                return self.complete_dial(cx, key, winner, readiness, &failures);
            }
            if failures.is_empty() {
                return false;
            }
            for (attempt, error) in failures {
                if !self.replace(cx, key, attempt, &error) {
                    return false;
                }
            }
        }
    }

    /// Starts the hedge timer of connection `key` if it is still dialling and the upstream hedges.
    pub(crate) fn begin_hedging(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(dial) = connection.dial.as_deref_mut() else { return };
        let hedge_after = connection.port.options.upstream.hedge_after();
        dial.hedge_after = hedge_after.map(|after| after.max(MIN_HEDGE));
        self.arm_hedge(cx, key);
    }

    /// Starts a rival for connection `key`, whose dial has had no answer.
    pub(crate) fn hedge(&mut self, cx: &mut Context<'_>, key: Key) {
        match self.shared.descriptors.take(1) {
            Some(permit) => self.start_rival(cx, key, permit),
            None => self.arm_hedge(cx, key),
        }
        if self.advance_dial(cx, key, None) {
            self.enqueue(key);
        }
    }

    /// Refuses connection `key`, whose dial has had no answer within the dial timeout.
    pub(crate) fn time_out_dial(&mut self, cx: &mut Context<'_>, key: Key) {
        if let Some(connection) = self.connections.get(key)
            && let Some(dial) = &connection.dial
        {
            let rivals = dial.rivals.iter().map(|rival| rival.attempt);
            for attempt in once(dial.primary).chain(rivals) {
                connection.port.options.upstream.failed(attempt.backend, DialFailure::Silent);
            }
        }
        self.refuse_connection(cx, key, Refusal::DialTimeout);
    }

    /// Completes the dial of connection `key` with `winner` and resets all other attempts. Returns
    /// false if the connection was refused instead.
    fn complete_dial(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        winner: Attempt,
        readiness: Readiness,
        failures: &[(Attempt, io::Error)],
    ) -> bool {
        if !self.promote(cx, key, winner) {
            return false;
        }
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let Some(dial) = connection.dial.take() else { return false };
        connection.backend = Some(winner.backend);
        let Dial { rivals, hedge_at, .. } = *dial;
        if let Some(hedge_at) = hedge_at {
            cx.timers.disarm(hedge_at, Tag::Hedge.token(key));
        }
        let upstream = &connection.port.options.upstream;
        upstream.connected(winner.backend);
        for rival in rivals {
            let attempt = rival.attempt;
            let is_reported = failures.iter().any(|(failed, _)| *failed == attempt);
            if attempt.number < winner.number && !is_reported {
                upstream.failed(attempt.backend, DialFailure::Silent);
            }
            rival.discard(cx.epoll);
        }
        connection.record_readiness(Side::Backend, readiness);
        self.open_connection(cx, key);
        true
    }

    /// Makes `attempt` the primary one of connection `key`. The previous one becomes a rival, which
    /// the caller discards. Returns false if the connection was refused.
    fn promote(&mut self, cx: &mut Context<'_>, key: Key, attempt: Attempt) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let Some(mut dial) = connection.dial.take() else { return false };
        let index = dial.rival_index(attempt);
        if let Some(rival) = index.and_then(|index| dial.rivals.get_mut(index)) {
            std::mem::swap(&mut dial.primary, &mut rival.attempt);
            connection.swap_backend(&mut rival.socket, &mut rival.lease);
        }
        connection.dial = Some(dial);
        if index.is_none() {
            return true;
        }
        self.replaced.insert(key);
        let interest = connection.interest(Side::Backend);
        let backend = connection.socket(Side::Backend);
        let modified = cx.epoll.modify(backend, Tag::Backend.token(key), interest);
        if modified.is_err() {
            self.refuse_connection(cx, key, Refusal::Exhausted);
        }
        modified.is_ok()
    }

    /// Replaces the attempt of connection `key` that has failed with `error`. If no backend is
    /// left, the dial continues with its other attempts. Returns false if the connection was
    /// refused.
    fn replace(
        &mut self,
        cx: &mut Context<'_>,
        key: Key,
        failed: Attempt,
        error: &io::Error,
    ) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let Some(dial) = connection.dial.as_deref_mut() else { return false };
        let rivals = dial.rivals.iter().map(|rival| rival.attempt);
        let Some(oldest) = rivals.min_by_key(|attempt| attempt.number) else {
            return self.replace_only(cx, key, error);
        };
        if failed == dial.primary && !self.promote(cx, key, oldest) {
            return false;
        }
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let Some(dial) = connection.dial.as_deref_mut() else { return false };
        if let Some(index) = dial.rival_index(failed) {
            let permit = dial.rivals.swap_remove(index).discard(cx.epoll);
            self.start_rival(cx, key, permit);
        }
        true
    }

    /// Replaces the only attempt of connection `key`, which has failed with `error`, or refuses the
    /// connection. The failed socket is closed after the next one is open. The descriptor that each
    /// loop reserves for a client being accepted covers it.
    fn replace_only(&mut self, cx: &mut Context<'_>, key: Key, error: &io::Error) -> bool {
        let Some(connection) = self.connections.get_mut(key) else { return false };
        let Some(dial) = connection.dial.as_deref_mut() else { return false };
        let (attempt, mut socket, mut lease) =
            match dial.open_other(&*connection.port.options.upstream) {
                Ok(opened) => opened,
                Err(last) => {
                    self.refuse_connection(cx, key, refusal(last.as_ref().unwrap_or(error)));
                    return false;
                }
            };
        dial.primary = attempt;
        connection.swap_backend(&mut socket, &mut lease);
        if connection.is_registered(Side::Backend) {
            unwatch(cx.epoll, &socket);
            self.replaced.insert(key);
            let interest = connection.interest(Side::Backend);
            let backend = connection.socket(Side::Backend);
            if cx.epoll.add(backend, Tag::Backend.token(key), interest).is_err() {
                self.refuse_connection(cx, key, Refusal::Exhausted);
                return false;
            }
        }
        self.arm_hedge(cx, key);
        true
    }

    /// Starts a rival for connection `key`, if a backend is left and [`MAX_IN_FLIGHT`] permits it.
    fn start_rival(&mut self, cx: &mut Context<'_>, key: Key, permit: Permit) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(dial) = connection.dial.as_deref_mut() else { return };
        if dial.in_flight() >= MAX_IN_FLIGHT {
            return;
        }
        match dial.open_other(&*connection.port.options.upstream) {
            Ok((attempt, socket, lease)) => {
                // Without a registration, the dial continues as if no backend had been left.
                if cx.epoll.add(&socket, Tag::Rival.token(key), Interest::Edges).is_ok() {
                    dial.rivals.push(Rival { attempt, socket, lease, permit });
                }
            }
            Err(Some(error)) if is_exhaustion(&error) => {}
            Err(_) => return,
        }
        self.arm_hedge(cx, key);
    }

    /// Arms the hedge timer of connection `key` for one period from now, if it may start a rival.
    fn arm_hedge(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Some(dial) = connection.dial.as_deref_mut() else { return };
        if let Some(before) = dial.hedge_at.take() {
            cx.timers.disarm(before, Tag::Hedge.token(key));
        }
        if dial.in_flight() < MAX_IN_FLIGHT
            && let Some(after) = dial.hedge_after
            && let Some(at) = cx.now.checked_add(after)
        {
            dial.hedge_at = Some(at);
            cx.timers.arm(at, Tag::Hedge.token(key));
        }
    }
}

impl Rival {
    /// Resets the socket. Returns the permit for its descriptor.
    fn discard(self, epoll: &Epoll) -> Permit {
        unwatch(epoll, &self.socket);
        reset_on_close(&self.socket);
        self.permit
    }
}

/// Stops watching a socket before it is closed. Otherwise a child process that has just been forked
/// and holds a copy of it could keep the registration, whose token stays valid.
fn unwatch(epoll: &Epoll, socket: &OwnedFd) {
    // Fails only if the socket is not watched.
    let _ = epoll.remove(socket);
}

/// The result of a connect, if it has completed.
fn answer(socket: &OwnedFd, readiness: Readiness) -> Option<io::Result<()>> {
    readiness.is_writable().then(|| connect_result(socket, readiness))
}

fn poll(socket: &OwnedFd) -> Readiness {
    let [readiness, _] = Readiness::of([socket.as_fd(), socket.as_fd()]);
    readiness
}

/// What an error of a connect says about the backend. The kernel reports a timeout after its last
/// SYN.
fn failure(error: &io::Error) -> DialFailure {
    match error.kind() {
        io::ErrorKind::TimedOut => DialFailure::Silent,
        _ => DialFailure::Refused,
    }
}
