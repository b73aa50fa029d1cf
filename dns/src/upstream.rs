//! Upstream servers: their state, and the order and times at which one query is sent to them. Pure.
//!
//! # Theory of operation
//!
//! ```text
//! query first server ──FAILOVER_DELAY──► query next server too ──► ... ──► all queried: retransmit
//!       │                                                                  after 1 s, then 2 s
//!       │ SERVFAIL, REFUSED or unreachable: next server at once                     │
//!       ▼                                                                           ▼
//! first response of any server                                          deadline: SERVFAIL
//! ```
//!
//! Servers are queried in the order of their list. Only a *suspect* server is queried after the
//! others. An unanswered query does not make a server suspect, because a client can choose a name
//! whose authoritative servers are slow or silent. Only a failed *liveness check* does:
//!
//! ```text
//! a query is unanswered for CHECK_DELAY, and the server has sent no response since
//!   └─► check: queries `. NS` at the server, up to five times
//!         ├─ any response, to this or any other query: alive
//!         └─ no response for CHECK_GRACE: suspect, queried last; a later response: alive again
//! ```
//!
//! The check always sends the same query, so no client can influence its result. Its grace period
//! ends before the failover delay of the query that caused it. A dead server therefore delays one
//! query by [`FAILOVER_DELAY`], and later queries not at all. When the suspicion expires, the next
//! query causes a new check, while the query itself still goes to the other servers first.
//!
//! The failover delay is constant. If it followed the response times of a server, a client could
//! shorten it for others with fast queries, and could infer the response times of others.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tidegate_model::HistogramReading;

/// Time without a response after which the next server is queried as well.
const FAILOVER_DELAY: Duration = Duration::from_millis(200);
/// Time without a response after which a server is checked, unless it has responded to another
/// query.
const CHECK_DELAY: Duration = Duration::from_millis(50);
/// Times of the queries of a check, from its start. The first two are within the grace, so that one
/// may be lost. The others detect a server that responds late or is starting.
const CHECK_TIMES: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(70),
    Duration::from_millis(300),
    Duration::from_millis(800),
    Duration::from_millis(1_800),
];
/// Time without a response to a check after which a server is suspect. `CHECK_DELAY` plus this is
/// just below `FAILOVER_DELAY`. For a server with a long round trip, it is three times the round
/// trip.
const CHECK_GRACE: Duration = Duration::from_millis(140);
/// Duration of a check.
const CHECK_DURATION: Duration = Duration::from_secs(3);
/// Time for which the shortest round-trip time is valid. Paths change.
const ROUND_TRIP_LIFETIME: Duration = Duration::from_secs(300);
/// Deadline of a query. A glibc client retries after 5 s (`timeout` in resolv.conf(5)) and gets the
/// response before.
const DEADLINE: Duration = Duration::from_millis(4_500);
/// Deadline of a query when all servers have failed [`SILENT`] checks in a row.
const SHORT_DEADLINE: Duration = Duration::from_millis(1_500);
/// Failed checks after which a server counts as silent.
const SILENT: u32 = 2;
/// Time of the first retransmission after all servers were queried. It doubles each time.
const RETRANSMIT_DELAY: Duration = Duration::from_secs(1);
/// When all servers are unreachable (ICMP): delay before they are queried again, which doubles each
/// time, and number of repetitions.
const RESTART_DELAY: Duration = Duration::from_millis(100);
const MAX_RESTARTS: u32 = 3;
/// Maximum number of times that a query is sent to one server.
const MAX_TRIES: u32 = 3;
/// Initial and maximum duration of a suspicion.
const SUSPICION: Duration = Duration::from_secs(5);
const MAX_SUSPICION: Duration = Duration::from_secs(60);
/// Validity of the detected features of a server: EDNS and preservation of case.
const FEATURE_LIFETIME: Duration = Duration::from_secs(3_600);
/// Number of responses with changed case after which a server without TCP is queried in lower case.
const MAX_CASE_CHANGES: u8 = 3;

/// Upper bounds of the response time buckets in seconds.
const BUCKETS: [f64; 8] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

#[derive(Clone, Debug, Default)]
pub(crate) struct ServerState {
    /// Time of the last response, to any query.
    responded: Option<Instant>,
    /// The shortest response time, and when it was measured.
    round_trip: Option<(Duration, Instant)>,
    /// Failed checks in a row.
    failed_checks: u32,
    suspect_until: Option<Instant>,
    /// Whether a check is running.
    is_checking: bool,
    features: Features,
    /// Sequence number of the last use.
    used: u64,
    pub(crate) figures: Figures,
}

/// Detected features of a server. Each is valid for [`FEATURE_LIFETIME`].
#[derive(Clone, Debug, Default)]
struct Features {
    /// It does not support EDNS.
    no_edns: Option<Instant>,
    /// It has sent an OPT record.
    edns: Option<Instant>,
    /// It changes the case of names.
    changes_case: Option<Instant>,
    /// It has preserved the case of a name.
    preserves_case: Option<Instant>,
    /// Responses with changed case while the server could not be queried over TCP.
    case_changes: u8,
}

/// Form of the queries to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// With an OPT record.
    pub(crate) edns: bool,
    /// With the name in random case, which the response has to repeat.
    pub(crate) mixed: bool,
}

/// Counters of a server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Figures {
    pub(crate) asked: u64,
    pub(crate) missed: u64,
    pub(crate) failed: u64,
    /// Response times.
    pub(crate) took: HistogramReading<{ BUCKETS.len() }>,
}

impl Default for Figures {
    fn default() -> Self {
        Self { asked: 0, missed: 0, failed: 0, took: HistogramReading::empty(&BUCKETS) }
    }
}

/// State of all servers.
#[derive(Debug)]
pub(crate) struct Health {
    servers: BTreeMap<SocketAddr, ServerState>,
    limit: usize,
    uses: u64,
}

impl Health {
    /// Keeps the state of at most `limit` servers.
    pub(crate) fn new(limit: usize) -> Self {
        Self { servers: BTreeMap::new(), limit, uses: 0 }
    }

    fn state(&mut self, server: SocketAddr) -> &mut ServerState {
        if !self.servers.contains_key(&server) && self.servers.len() >= self.limit {
            let oldest =
                self.servers.iter().min_by_key(|(_, state)| state.used).map(|(server, _)| *server);
            oldest.map(|server| self.servers.remove(&server));
        }
        self.uses += 1;
        let state = self.servers.entry(server).or_default();
        state.used = self.uses;
        state
    }

    /// Starts the failover of a query to `servers`. Also returns the checks that are due because a
    /// suspicion has expired.
    pub(crate) fn begin_failover(
        &mut self,
        servers: &[SocketAddr],
        now: Instant,
    ) -> (Failover, Vec<Check>) {
        let mut healthy = Vec::new();
        let mut suspects = Vec::new();
        let mut checks = Vec::new();
        let mut silent = 0;
        for server in servers {
            let state = self.state(*server);
            silent += usize::from(state.failed_checks >= SILENT);
            let candidate = Candidate::new(*server);
            match state.suspect_until {
                None => healthy.push(candidate),
                Some(until) => {
                    if until <= now && !state.is_checking {
                        checks.push(state.check(*server, now));
                    }
                    suspects.push(candidate);
                }
            }
        }
        let (budget, max_restarts) =
            if silent == servers.len() { (SHORT_DEADLINE, 0) } else { (DEADLINE, MAX_RESTARTS) };
        healthy.append(&mut suspects);
        let failover = Failover {
            candidates: healthy,
            due: now,
            rounds: 0,
            restarts: 0,
            max_restarts,
            deadline: now + budget,
        };
        (failover, checks)
    }

    /// Counts a query sent to `server`.
    pub(crate) fn note_sent(&mut self, server: SocketAddr) {
        self.state(server).figures.asked += 1;
    }

    /// Records a response of `server`. Returns whether it was suspect.
    pub(crate) fn responded(&mut self, server: SocketAddr, now: Instant) -> bool {
        let state = self.state(server);
        state.responded = Some(now);
        state.failed_checks = 0;
        state.suspect_until.take().is_some()
    }

    /// Records the response time of `server`.
    pub(crate) fn note_response_time(&mut self, server: SocketAddr, took: Duration, now: Instant) {
        let state = self.state(server);
        state.note_round_trip(took, now);
        state.figures.took.record(took);
    }

    /// Counts a failure response of `server`.
    pub(crate) fn failed(&mut self, server: SocketAddr) {
        self.state(server).figures.failed += 1;
    }

    /// Counts a query that `server` did not answer in time. This does not affect the order of
    /// servers.
    pub(crate) fn missed(&mut self, server: SocketAddr) {
        self.state(server).figures.missed += 1;
    }

    /// Returns the check to run for `server`, to which a query was sent at `asked` without a
    /// response so far. `None` if the server has sent any response since, is suspect already, or is
    /// being checked.
    pub(crate) fn check_silent(
        &mut self,
        server: SocketAddr,
        asked: Instant,
        now: Instant,
    ) -> Option<Check> {
        let state = self.state(server);
        let is_heard = state.responded.is_some_and(|responded| responded >= asked);
        let is_due = !is_heard && !state.is_checking && state.suspect_until.is_none();
        is_due.then(|| state.check(server, now))
    }

    /// Records that `check` has failed. Returns whether the server has become suspect.
    pub(crate) fn check_failed(&mut self, check: &Check, now: Instant) -> bool {
        let state = self.state(check.server);
        if state.responded.is_some_and(|responded| responded >= check.began) {
            return false;
        }
        let is_new = state.suspect_until.is_none();
        state.failed_checks += 1;
        state.suspect_until = Some(now + state.suspicion());
        is_new
    }

    /// Records that the check of `server` has ended.
    pub(crate) fn check_ended(&mut self, server: SocketAddr) {
        self.state(server).is_checking = false;
    }

    /// The form of queries to `server`.
    pub(crate) fn form(&mut self, server: SocketAddr, now: Instant) -> Form {
        let features = &self.state(server).features;
        Form {
            edns: !is_recent(features.no_edns, now),
            mixed: !is_recent(features.changes_case, now),
        }
    }

    /// Records that `server` has responded to a query without EDNS after it rejected the same query
    /// with EDNS. Ignored if the server has used EDNS, because it may reject the query itself.
    pub(crate) fn note_no_edns(&mut self, server: SocketAddr, now: Instant) {
        let features = &mut self.state(server).features;
        if !is_recent(features.edns, now) {
            features.no_edns = Some(now);
        }
    }

    /// Records that `server` has sent an OPT record.
    pub(crate) fn note_edns(&mut self, server: SocketAddr, now: Instant) {
        self.state(server).features.edns = Some(now);
    }

    /// Records that `server` has preserved the case of a name.
    pub(crate) fn note_case_preserved(&mut self, server: SocketAddr, now: Instant) {
        let features = &mut self.state(server).features;
        features.preserves_case = Some(now);
        features.case_changes = 0;
    }

    /// Records a response over UDP with changed case. `over_tcp` is the result of the same query
    /// over TCP, where a blind attacker cannot forge a response: `Some(true)` if the case was
    /// changed too, `None` if TCP failed.
    pub(crate) fn note_case_changed(
        &mut self,
        server: SocketAddr,
        over_tcp: Option<bool>,
        now: Instant,
    ) {
        let features = &mut self.state(server).features;
        match over_tcp {
            Some(true) => features.changes_case = Some(now),
            Some(false) => features.preserves_case = Some(now),
            None if is_recent(features.preserves_case, now) => {}
            None => {
                features.case_changes += 1;
                if features.case_changes >= MAX_CASE_CHANGES {
                    features.case_changes = 0;
                    features.changes_case = Some(now);
                }
            }
        }
    }

    /// Address, whether it is trusted, and counters of each server.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (SocketAddr, bool, Figures)> {
        self.servers
            .iter()
            .map(|(server, state)| (*server, state.suspect_until.is_none(), state.figures))
    }
}

/// Whether an observation at `since` is still valid.
fn is_recent(since: Option<Instant>, now: Instant) -> bool {
    since.is_some_and(|since| now.saturating_duration_since(since) < FEATURE_LIFETIME)
}

impl ServerState {
    fn check(&mut self, server: SocketAddr, now: Instant) -> Check {
        self.is_checking = true;
        let round_trip = self.round_trip.map_or(Duration::ZERO, |(time, _)| time);
        Check {
            server,
            began: now,
            grace: CHECK_GRACE.max(3 * round_trip),
            asked: 0,
            has_failed: false,
        }
    }

    fn note_round_trip(&mut self, took: Duration, now: Instant) {
        let kept = self.round_trip.filter(|(least, at)| {
            *least <= took && now.saturating_duration_since(*at) < ROUND_TRIP_LIFETIME
        });
        self.round_trip = Some(kept.unwrap_or((took, now)));
    }

    /// Duration of the suspicion after the current number of failed checks.
    fn suspicion(&self) -> Duration {
        let doubled = 1 << self.failed_checks.saturating_sub(1).min(8);
        (SUSPICION * doubled).min(MAX_SUSPICION)
    }
}

/// A liveness check of one server.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    pub(crate) server: SocketAddr,
    began: Instant,
    grace: Duration,
    /// Number of queries sent.
    asked: usize,
    /// Whether the check has failed.
    has_failed: bool,
}

/// The next step of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckStep {
    Ask,
    /// The grace has ended: the check has failed.
    Fail,
    /// Wait until this time.
    Wait(Instant),
    End,
}

impl Check {
    /// Records that the server is unreachable. Returns true if this makes the check fail, which
    /// happens at most once.
    ///
    /// One more query is sent for a server that is starting. Further ones would use up the ICMP
    /// error limit of the host (`net.ipv4.icmp_ratelimit`: a burst of 6, then one per second),
    /// which client queries need.
    pub(crate) fn refused(&mut self) -> bool {
        self.asked = self.asked.max(CHECK_TIMES.len() - 1);
        !std::mem::replace(&mut self.has_failed, true)
    }

    /// Returns the next step. Each step is returned once, so the caller has to execute it.
    pub(crate) fn step(&mut self, now: Instant) -> CheckStep {
        let next = CHECK_TIMES.get(self.asked).map(|after| self.began + *after);
        if next.is_some_and(|next| next <= now) {
            self.asked += 1;
            return CheckStep::Ask;
        }
        if !self.has_failed && now >= self.began + self.grace {
            self.has_failed = true;
            return CheckStep::Fail;
        }
        let end = self.began + CHECK_DURATION.max(2 * self.grace);
        if now >= end {
            return CheckStep::End;
        }
        let failure = (!self.has_failed).then_some(self.began + self.grace);
        CheckStep::Wait(next.into_iter().chain(failure).fold(end, Instant::min))
    }
}

/// One server of a failover.
#[derive(Clone, Debug)]
struct Candidate {
    server: SocketAddr,
    /// Time of the first query.
    asked: Option<Instant>,
    tries: u32,
    /// Excluded: it has failed.
    excluded: bool,
    /// Unreachable (ICMP).
    unreachable: bool,
    /// It has responded.
    responded: bool,
    /// [`Step::Silent`] was returned for it.
    silence_reported: bool,
}

/// The failover of one query over its servers.
#[derive(Clone, Debug)]
pub(crate) struct Failover {
    candidates: Vec<Candidate>,
    /// Time of the next query.
    due: Instant,
    rounds: u32,
    /// Repetitions because all servers were unreachable, and their limit.
    restarts: u32,
    max_restarts: u32,
    deadline: Instant,
}

/// The next step of a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Ask(SocketAddr),
    /// The server, first queried at this time, has not responded for [`CHECK_DELAY`].
    Silent(SocketAddr, Instant),
    /// Wait until this time.
    Wait(Instant),
    GiveUp,
}

impl Failover {
    /// Returns the next step. A returned server counts as queried.
    pub(crate) fn step(&mut self, now: Instant) -> Step {
        if now >= self.deadline {
            return Step::GiveUp;
        }
        if self.candidates.iter().all(|one| one.excluded) {
            if self.restarts >= self.max_restarts
                || !self.candidates.iter().all(|one| one.unreachable)
            {
                return Step::GiveUp;
            }
            // The servers are possibly restarting.
            self.due = now + RESTART_DELAY * (1 << self.restarts);
            self.restarts += 1;
            for one in &mut self.candidates {
                *one = Candidate::new(one.server);
            }
        }
        let mut silent = self.candidates.iter_mut().filter_map(|one| Some((one.silent_at()?, one)));
        if let Some((_, one)) = silent.find(|(at, _)| *at <= now) {
            one.silence_reported = true;
            return Step::Silent(one.server, one.asked.unwrap_or(now));
        }
        if now < self.due {
            let silent = self.candidates.iter().filter_map(Candidate::silent_at);
            return Step::Wait(silent.fold(self.due.min(self.deadline), Instant::min));
        }
        let fresh = self.candidates.iter_mut().find(|one| !one.excluded && one.asked.is_none());
        if let Some(one) = fresh {
            one.ask(now);
            self.due = now + FAILOVER_DELAY;
            let server = one.server;
            if self.candidates.iter().all(|one| one.excluded || one.asked.is_some()) {
                self.due = now + RETRANSMIT_DELAY;
            }
            return Step::Ask(server);
        }
        let again = self
            .candidates
            .iter_mut()
            .filter(|one| !one.excluded && one.tries < MAX_TRIES)
            .min_by_key(|one| one.tries);
        let Some(one) = again else {
            self.due = self.deadline;
            return Step::Wait(self.deadline);
        };
        one.ask(now);
        let (server, tries) = (one.server, one.tries);
        // After a round of retransmissions, the interval doubles.
        if self.candidates.iter().all(|one| one.excluded || one.tries >= tries) {
            self.rounds += 1;
            self.due = now + RETRANSMIT_DELAY * (1 << self.rounds);
        }
        Step::Ask(server)
    }

    /// Records any response of `server`. Returns whether it is the first.
    pub(crate) fn responded(&mut self, server: SocketAddr) -> bool {
        let one = self.candidates.iter_mut().find(|one| one.server == server);
        one.is_some_and(|one| !std::mem::replace(&mut one.responded, true))
    }

    /// Records that `server` is unreachable. The next server is queried at once.
    pub(crate) fn unreachable(&mut self, server: SocketAddr, now: Instant) {
        for one in self.candidates.iter_mut().filter(|one| one.server == server) {
            one.unreachable = true;
        }
        self.failed(server, now);
    }

    /// Records that `server` has failed. The next server is queried at once.
    pub(crate) fn failed(&mut self, server: SocketAddr, now: Instant) {
        for one in self.candidates.iter_mut().filter(|one| one.server == server) {
            one.excluded = true;
        }
        if self.candidates.iter().any(|one| !one.excluded && one.asked.is_none()) {
            self.due = now;
        }
    }

    /// The servers that did not respond within [`FAILOVER_DELAY`] although they were queried before
    /// `winner`. Without a winner, all queried servers without a response.
    pub(crate) fn silent(&self, now: Instant, winner: Option<SocketAddr>) -> Vec<SocketAddr> {
        let asked = |server| {
            self.candidates.iter().find(|one| one.server == server).and_then(|one| one.asked)
        };
        let won = winner.and_then(asked);
        let is_silent = |one: &&Candidate| {
            let Some(asked) = one.asked.filter(|_| !one.excluded && !one.responded) else {
                return false;
            };
            winner.is_none()
                || (won >= Some(asked) && now.saturating_duration_since(asked) >= FAILOVER_DELAY)
        };
        self.candidates.iter().filter(is_silent).map(|one| one.server).collect()
    }
}

impl Candidate {
    fn new(server: SocketAddr) -> Self {
        Self {
            server,
            asked: None,
            tries: 0,
            excluded: false,
            unreachable: false,
            responded: false,
            silence_reported: false,
        }
    }

    fn ask(&mut self, now: Instant) {
        self.asked.get_or_insert(now);
        self.tries += 1;
    }

    /// Time at which a check is due.
    fn silent_at(&self) -> Option<Instant> {
        self.asked
            .filter(|_| !self.excluded && !self.responded && !self.silence_reported)
            .map(|asked| asked + CHECK_DELAY)
    }
}

#[cfg(test)]
mod tests;
