//! Which server is asked when: what is remembered of servers, and how one question is pursued.
//! Pure.
//!
//! # Theory of operation
//!
//! ```text
//!            asked ──patience──► the next is asked as well ──► ... ──► all asked: again, after a second, then two
//!              │ SERVFAIL, REFUSED, nobody there: the next at once             │
//!              ▼                                                               ▼
//!     an answer, of whichever                                        deadline: SERVFAIL
//! ```
//!
//! Servers are asked in the order of their list. Only a server that is *dead* is asked after the
//! others; it is *suspect* then. An unanswered question does not prove it: a client can choose a
//! name whose authoritative servers are slow or silent. Only a *liveness check* proves it:
//!
//! ```text
//! a question is silent for DOUBT, and the server has said nothing to anybody since it was asked
//!   └─► check: asks the server for the name servers of the root, up to five times
//!         ├─ the server says anything, to this or any other question: it is alive
//!         └─ nothing for CHECK_GRACE: suspect, asked last; said something later: alive again
//! ```
//!
//! The check always asks the same question, so no client can influence its result. Its grace ends
//! before the patience of the question that caused it: a dead server costs one question
//! [`PATIENCE`] and later ones nothing. When the time of a suspicion is over, the next question
//! causes a new check; the question itself still goes to the others first.
//!
//! The patience is the same for all servers and questions. One that followed the usual time of a
//! server would let an asker shorten it for others with quick questions, and would tell an asker
//! how quick the questions of others are.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a server is waited for before the next is asked as well.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long a question is unanswered before its server is checked, if nothing else is heard from
/// it.
const DOUBT: Duration = Duration::from_millis(50);
/// When a check asks, after its begin. The first two lie within the grace: one may be lost. The
/// others find a server that was late, or is being started.
const CHECKS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(70),
    Duration::from_millis(300),
    Duration::from_millis(800),
    Duration::from_millis(1_800),
];
/// How long a server may be silent under check before it is suspect: `DOUBT` and this end just
/// before `PATIENCE`. A server with a long round trip has three times that instead.
const CHECK_GRACE: Duration = Duration::from_millis(140);
/// How long a check listens.
const CHECK_TIME: Duration = Duration::from_secs(3);
/// How long a shortest round trip counts: paths change.
const ROUND_TRIP_LIFE: Duration = Duration::from_secs(300);
/// A question is over after it: a client of glibc asks again after 5 s (resolv.conf(5), `timeout`),
/// and shall have heard by then.
const DEADLINE: Duration = Duration::from_millis(4_500);
/// The same where all servers have been silent several times.
const DEADLINE_OF_SILENT: Duration = Duration::from_millis(1_500);
/// Strikes after which a server counts as silent.
const SILENT: u32 = 2;
/// When all have been asked, after how long again; it doubles.
const AGAIN: Duration = Duration::from_secs(1);
/// When nobody is there at all (ICMP), after how long they are asked anew, and how often; it
/// doubles.
const RETURN: Duration = Duration::from_millis(100);
const RETURNS: u32 = 3;
/// How often one question goes to one server.
const TRIES: u32 = 3;
/// How long a server is suspect at first, and at most.
const SUSPECT: Duration = Duration::from_secs(5);
const LONGEST_SUSPECT: Duration = Duration::from_secs(60);
/// How long it is remembered what a server can do: EDNS, and preserving the case of names.
const ABILITY_LIFE: Duration = Duration::from_secs(3_600);
/// Questions whose case a server without TCP must have changed before it is asked in lower case.
const CHANGES: u8 = 3;

/// The bounds of the buckets of answering times, in seconds.
pub(crate) const BUCKETS: [f64; 8] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// What is remembered of a server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    /// When it last said something, to any question.
    heard: Option<Instant>,
    /// The shortest time to an answer, and when that was.
    round_trip: Option<(Duration, Instant)>,
    strikes: u32,
    suspect_until: Option<Instant>,
    /// A check is under way.
    checked: bool,
    abilities: Abilities,
    used: u64,
    pub(crate) figures: Figures,
}

/// What a server was seen to be able to do. Each is forgotten after [`ABILITY_LIFE`].
#[derive(Clone, Debug, Default)]
struct Abilities {
    /// It does not understand EDNS.
    plain: Option<Instant>,
    /// It has answered with an OPT record.
    edns: Option<Instant>,
    /// It changes the case of the name in the question.
    folds: Option<Instant>,
    /// It has repeated the case of a name.
    keeps: Option<Instant>,
    /// Questions that came back with another case while the server could not be asked over TCP.
    changes: u8,
}

/// How a server is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// With an OPT record.
    pub(crate) edns: bool,
    /// With the name in random case, which the answer must repeat.
    pub(crate) mixed: bool,
}

/// What is told of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    pub(crate) asked: u64,
    pub(crate) missed: u64,
    pub(crate) failed: u64,
    /// Answers by the time that they took; the last is for all that took longer than the bounds.
    pub(crate) took: [u64; BUCKETS.len() + 1],
    pub(crate) took_micros: u64,
}

/// What is remembered of all servers.
#[derive(Debug)]
pub(crate) struct Health {
    servers: BTreeMap<SocketAddr, Memory>,
    limit: usize,
    uses: u64,
}

impl Health {
    /// Remembers `limit` servers.
    pub(crate) fn new(limit: usize) -> Self {
        Self { servers: BTreeMap::new(), limit, uses: 0 }
    }

    fn memory(&mut self, server: SocketAddr) -> &mut Memory {
        if !self.servers.contains_key(&server) && self.servers.len() >= self.limit {
            let oldest = self
                .servers
                .iter()
                .min_by_key(|(_, memory)| memory.used)
                .map(|(server, _)| *server);
            oldest.map(|server| self.servers.remove(&server));
        }
        self.uses += 1;
        let memory = self.servers.entry(server).or_default();
        memory.used = self.uses;
        memory
    }

    /// Begins to pursue a question to `servers`, and tells which of them are to be checked: their
    /// suspicion is over.
    pub(crate) fn pursue(&mut self, servers: &[SocketAddr], now: Instant) -> (Pursuit, Vec<Check>) {
        let mut healthy = Vec::new();
        let mut suspects = Vec::new();
        let mut checks = Vec::new();
        let mut silent = 0;
        for server in servers {
            let memory = self.memory(*server);
            silent += usize::from(memory.strikes >= SILENT);
            let candidate = Candidate::new(*server);
            match memory.suspect_until {
                None => healthy.push(candidate),
                Some(until) => {
                    if until <= now && !memory.checked {
                        checks.push(memory.check(*server, now));
                    }
                    suspects.push(candidate);
                }
            }
        }
        let (budget, may_return) =
            if silent == servers.len() { (DEADLINE_OF_SILENT, 0) } else { (DEADLINE, RETURNS) };
        healthy.append(&mut suspects);
        let pursuit = Pursuit {
            candidates: healthy,
            due: now,
            rounds: 0,
            returns: 0,
            may_return,
            deadline: now + budget,
        };
        (pursuit, checks)
    }

    /// A question goes to `server`.
    pub(crate) fn asks(&mut self, server: SocketAddr) {
        self.memory(server).figures.asked += 1;
    }

    /// `server` has said something. Whether it was suspect until now.
    pub(crate) fn heard(&mut self, server: SocketAddr, now: Instant) -> bool {
        let memory = self.memory(server);
        memory.heard = Some(now);
        memory.strikes = 0;
        memory.suspect_until.take().is_some()
    }

    /// `server` took this long to answer.
    pub(crate) fn took(&mut self, server: SocketAddr, took: Duration, now: Instant) {
        let memory = self.memory(server);
        memory.note_round_trip(took, now);
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        memory.figures.took[bucket] += 1;
        memory.figures.took_micros += u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    }

    /// `server` has answered that it cannot, or will not.
    pub(crate) fn failed(&mut self, server: SocketAddr) {
        self.memory(server).figures.failed += 1;
    }

    /// `server` has not answered one question in time. That alone says nothing about the server.
    pub(crate) fn missed(&mut self, server: SocketAddr) {
        self.memory(server).figures.missed += 1;
    }

    /// A question that went to `server` at `asked` is still unanswered. The check to run, if
    /// nothing has been heard from the server since, and no check runs.
    pub(crate) fn doubt(
        &mut self,
        server: SocketAddr,
        asked: Instant,
        now: Instant,
    ) -> Option<Check> {
        let memory = self.memory(server);
        let is_heard = memory.heard.is_some_and(|heard| heard >= asked);
        let is_due = !is_heard && !memory.checked && memory.suspect_until.is_none();
        is_due.then(|| memory.check(server, now))
    }

    /// `check` had no answer. Whether its server is suspect only now.
    pub(crate) fn strike(&mut self, check: &Check, now: Instant) -> bool {
        let memory = self.memory(check.server);
        if memory.heard.is_some_and(|heard| heard >= check.began) {
            return false;
        }
        let is_new = memory.suspect_until.is_none();
        memory.strikes += 1;
        memory.suspect_until = Some(now + memory.suspicion());
        is_new
    }

    /// The check of `server` is over.
    pub(crate) fn checked(&mut self, server: SocketAddr) {
        self.memory(server).checked = false;
    }

    /// How `server` is asked.
    pub(crate) fn form(&mut self, server: SocketAddr, now: Instant) -> Form {
        let abilities = &self.memory(server).abilities;
        Form { edns: !holds(abilities.plain, now), mixed: !holds(abilities.folds, now) }
    }

    /// `server` has answered without EDNS what it did not understand with it. That alone is no
    /// evidence where it has used EDNS itself: the question may be one that it takes from nobody.
    pub(crate) fn plain(&mut self, server: SocketAddr, now: Instant) {
        let abilities = &mut self.memory(server).abilities;
        if !holds(abilities.edns, now) {
            abilities.plain = Some(now);
        }
    }

    /// `server` has answered with an OPT record.
    pub(crate) fn speaks_edns(&mut self, server: SocketAddr, now: Instant) {
        self.memory(server).abilities.edns = Some(now);
    }

    /// `server` has repeated the case of a name.
    pub(crate) fn keeps_case(&mut self, server: SocketAddr, now: Instant) {
        let abilities = &mut self.memory(server).abilities;
        abilities.keeps = Some(now);
        abilities.changes = 0;
    }

    /// The case of a name came back changed over UDP; `over_tcp` is what the same question showed
    /// over TCP, where nobody can forge blindly: `Some(true)` if it was changed there as well,
    /// `None` where the server could not be asked.
    pub(crate) fn changed_case(
        &mut self,
        server: SocketAddr,
        over_tcp: Option<bool>,
        now: Instant,
    ) {
        let abilities = &mut self.memory(server).abilities;
        match over_tcp {
            Some(true) => abilities.folds = Some(now),
            Some(false) => abilities.keeps = Some(now),
            None if holds(abilities.keeps, now) => {}
            None => {
                abilities.changes += 1;
                if abilities.changes >= CHANGES {
                    abilities.changes = 0;
                    abilities.folds = Some(now);
                }
            }
        }
    }

    /// All that is remembered: the server, whether it is trusted, its figures.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (SocketAddr, bool, Figures)> {
        self.servers
            .iter()
            .map(|(server, memory)| (*server, memory.suspect_until.is_none(), memory.figures))
    }
}

/// Whether something seen at `since` still holds.
fn holds(since: Option<Instant>, now: Instant) -> bool {
    since.is_some_and(|since| now.saturating_duration_since(since) < ABILITY_LIFE)
}

impl Memory {
    fn check(&mut self, server: SocketAddr, now: Instant) -> Check {
        self.checked = true;
        let round_trip = self.round_trip.map_or(Duration::ZERO, |(time, _)| time);
        Check {
            server,
            began: now,
            grace: CHECK_GRACE.max(3 * round_trip),
            asked: 0,
            struck: false,
        }
    }

    fn note_round_trip(&mut self, took: Duration, now: Instant) {
        let kept = self.round_trip.filter(|(least, at)| {
            *least <= took && now.saturating_duration_since(*at) < ROUND_TRIP_LIFE
        });
        self.round_trip = Some(kept.unwrap_or((took, now)));
    }

    /// How long it is suspect with as many strikes as it has.
    fn suspicion(&self) -> Duration {
        let doubled = 1 << self.strikes.saturating_sub(1).min(8);
        (SUSPECT * doubled).min(LONGEST_SUSPECT)
    }
}

/// A liveness check of one server.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    pub(crate) server: SocketAddr,
    began: Instant,
    grace: Duration,
    /// How often it has asked.
    asked: usize,
    struck: bool,
}

/// What a check does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckStep {
    Ask,
    /// The grace is over.
    Strike,
    /// Nothing before then.
    Wait(Instant),
    End,
}

impl Check {
    /// Nobody is at the server. Whether it is the first word of its absence: the grace is over
    /// then.
    ///
    /// It asks once more only, for a server that is being started: hosts limit the ICMP errors that
    /// they send (`net.ipv4.icmp_ratelimit`: 6, and one each second), and questions need them.
    pub(crate) fn refused(&mut self) -> bool {
        self.asked = self.asked.max(CHECKS.len() - 1);
        !std::mem::replace(&mut self.struck, true)
    }

    /// The next step, which the caller has to take: it is not returned again.
    pub(crate) fn step(&mut self, now: Instant) -> CheckStep {
        let next = CHECKS.get(self.asked).map(|after| self.began + *after);
        if next.is_some_and(|next| next <= now) {
            self.asked += 1;
            return CheckStep::Ask;
        }
        if !self.struck && now >= self.began + self.grace {
            self.struck = true;
            return CheckStep::Strike;
        }
        let end = self.began + CHECK_TIME.max(2 * self.grace);
        if now >= end {
            return CheckStep::End;
        }
        let strike = (!self.struck).then_some(self.began + self.grace);
        CheckStep::Wait(next.into_iter().chain(strike).fold(end, Instant::min))
    }
}

/// One server of a pursuit.
#[derive(Clone, Debug)]
struct Candidate {
    server: SocketAddr,
    /// When it was asked first.
    asked: Option<Instant>,
    tries: u32,
    /// It has failed.
    out: bool,
    /// Nobody is there.
    gone: bool,
    /// It has said something.
    heard: bool,
    /// Its silence has been told.
    doubted: bool,
}

/// One question on its way.
#[derive(Clone, Debug)]
pub(crate) struct Pursuit {
    candidates: Vec<Candidate>,
    /// When the next step is taken.
    due: Instant,
    rounds: u32,
    /// How often it was begun anew because nobody was there, and may be.
    returns: u32,
    may_return: u32,
    deadline: Instant,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Ask(SocketAddr),
    /// This server, asked at that time, is silent: is it alive?
    Doubt(SocketAddr, Instant),
    /// Nothing before then.
    Wait(Instant),
    GiveUp,
}

impl Pursuit {
    /// The next step. What is to be asked counts as asked.
    pub(crate) fn step(&mut self, now: Instant) -> Step {
        if now >= self.deadline {
            return Step::GiveUp;
        }
        if self.candidates.iter().all(|one| one.out) {
            if self.returns >= self.may_return || !self.candidates.iter().all(|one| one.gone) {
                return Step::GiveUp;
            }
            // They are being restarted, as likely as not.
            self.due = now + RETURN * (1 << self.returns);
            self.returns += 1;
            for one in &mut self.candidates {
                *one = Candidate::new(one.server);
            }
        }
        let mut doubts = self.candidates.iter_mut().filter_map(|one| Some((one.doubt()?, one)));
        if let Some((_, one)) = doubts.find(|(at, _)| *at <= now) {
            one.doubted = true;
            return Step::Doubt(one.server, one.asked.unwrap_or(now));
        }
        if now < self.due {
            let doubts = self.candidates.iter().filter_map(Candidate::doubt);
            return Step::Wait(doubts.fold(self.due.min(self.deadline), Instant::min));
        }
        let fresh = self.candidates.iter_mut().find(|one| !one.out && one.asked.is_none());
        if let Some(one) = fresh {
            one.ask(now);
            self.due = now + PATIENCE;
            let server = one.server;
            if self.candidates.iter().all(|one| one.out || one.asked.is_some()) {
                self.due = now + AGAIN;
            }
            return Step::Ask(server);
        }
        let again = self
            .candidates
            .iter_mut()
            .filter(|one| !one.out && one.tries < TRIES)
            .min_by_key(|one| one.tries);
        let Some(one) = again else {
            self.due = self.deadline;
            return Step::Wait(self.deadline);
        };
        one.ask(now);
        let (server, tries) = (one.server, one.tries);
        // All of them once more, then a longer rest.
        if self.candidates.iter().all(|one| one.out || one.tries >= tries) {
            self.rounds += 1;
            self.due = now + AGAIN * (1 << self.rounds);
        }
        Step::Ask(server)
    }

    /// `server` has said something, whatever it is. Whether it was the first time.
    pub(crate) fn heard(&mut self, server: SocketAddr) -> bool {
        let one = self.candidates.iter_mut().find(|one| one.server == server);
        one.is_some_and(|one| !std::mem::replace(&mut one.heard, true))
    }

    /// Nobody is at `server`: the next is asked at once.
    pub(crate) fn gone(&mut self, server: SocketAddr, now: Instant) {
        for one in self.candidates.iter_mut().filter(|one| one.server == server) {
            one.gone = true;
        }
        self.failed(server, now);
    }

    /// `server` cannot help: the next is asked at once.
    pub(crate) fn failed(&mut self, server: SocketAddr, now: Instant) {
        for one in self.candidates.iter_mut().filter(|one| one.server == server) {
            one.out = true;
        }
        if self.candidates.iter().any(|one| !one.out && one.asked.is_none()) {
            self.due = now;
        }
    }

    /// Those that let `winner` be faster although they were asked before it and had their time;
    /// without a winner all that have been asked and said nothing.
    pub(crate) fn silent(&self, now: Instant, winner: Option<SocketAddr>) -> Vec<SocketAddr> {
        let asked = |server| {
            self.candidates.iter().find(|one| one.server == server).and_then(|one| one.asked)
        };
        let won = winner.and_then(asked);
        let is_silent = |one: &&Candidate| {
            let Some(asked) = one.asked.filter(|_| !one.out && !one.heard) else { return false };
            winner.is_none()
                || (won >= Some(asked) && now.saturating_duration_since(asked) >= PATIENCE)
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
            out: false,
            gone: false,
            heard: false,
            doubted: false,
        }
    }

    fn ask(&mut self, now: Instant) {
        self.asked.get_or_insert(now);
        self.tries += 1;
    }

    /// When its silence is worth a check.
    fn doubt(&self) -> Option<Instant> {
        self.asked.filter(|_| !self.out && !self.heard && !self.doubted).map(|asked| asked + DOUBT)
    }
}

#[cfg(test)]
mod tests;
