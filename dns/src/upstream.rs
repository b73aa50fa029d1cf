//! Which server is asked when: what is remembered of servers, and how one question is pursued. Pure.
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
//! Servers are asked in the order of their list. A server that let another one, asked later, be faster than its patience allows, or that did not
//! answer at all, gets a *strike* and is *suspect* for a while: others are asked before it. When that time is over, it is asked beside another one
//! (a *probe*), which costs nobody time, and is its old self if it answers. So a dead server costs one question [`PATIENCE`], and others nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long a server is waited for before the next is asked as well: three times what it usually takes, within these.
const LEAST_PATIENCE: Duration = Duration::from_millis(30);
const PATIENCE: Duration = Duration::from_millis(200);
/// A question is over after it: a client of glibc asks again after 5 s (resolv.conf(5), `timeout`), and shall have heard by then.
const DEADLINE: Duration = Duration::from_millis(4_500);
/// The same where all servers have been silent several times.
const DEADLINE_OF_SILENT: Duration = Duration::from_millis(1_500);
/// Strikes after which a server counts as silent.
const SILENT: u32 = 2;
/// When all have been asked, after how long again; it doubles.
const AGAIN: Duration = Duration::from_secs(1);
/// When nobody is there at all (ICMP), after how long they are asked anew, and how often; it doubles.
const RETURN: Duration = Duration::from_millis(100);
const RETURNS: u32 = 3;
/// How often one question goes to one server.
const TRIES: u32 = 3;
/// How long a server is suspect at first, and at most.
const SUSPECT: Duration = Duration::from_secs(5);
const LONGEST_SUSPECT: Duration = Duration::from_secs(60);
/// How long a server that does not understand EDNS is asked without.
const PLAIN: Duration = Duration::from_secs(3_600);

/// The bounds of the buckets of answering times, in seconds.
pub(crate) const BUCKETS: [f64; 8] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0];

/// What is remembered of a server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Memory {
    /// What it takes to answer, smoothed (an eighth of the newest, as RFC 6298 section 2.3).
    usual: Option<Duration>,
    strikes: u32,
    suspect_until: Option<Instant>,
    /// A probe is on its way.
    probed: bool,
    plain_until: Option<Instant>,
    used: u64,
    pub(crate) figures: Figures,
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
            let oldest = self.servers.iter().min_by_key(|(_, memory)| memory.used).map(|(server, _)| *server);
            oldest.map(|server| self.servers.remove(&server));
        }
        self.uses += 1;
        let memory = self.servers.entry(server).or_default();
        memory.used = self.uses;
        memory
    }

    /// Begins to pursue a question to `servers`.
    pub(crate) fn pursue(&mut self, servers: &[SocketAddr], now: Instant) -> Pursuit {
        let mut healthy = Vec::new();
        let mut suspects = Vec::new();
        let mut probe = None;
        let mut silent = 0;
        for server in servers {
            let memory = self.memory(*server);
            silent += usize::from(memory.strikes >= SILENT);
            let candidate = Candidate {
                server: *server,
                patience: memory.patience(),
                asked: None,
                tries: 0,
                out: false,
                gone: false,
                heard: false,
            };
            match memory.suspect_until {
                None => healthy.push(candidate),
                Some(until) => {
                    if until <= now && !memory.probed && probe.is_none() {
                        probe = Some(*server);
                    }
                    suspects.push(candidate);
                }
            }
        }
        let (budget, may_return) =
            if silent == servers.len() { (DEADLINE_OF_SILENT, 0) } else { (DEADLINE, RETURNS) };
        // With nobody to ask instead, it is no probe.
        let probe = probe.filter(|_| !healthy.is_empty());
        if let Some(server) = probe {
            self.memory(server).probed = true;
        }
        healthy.append(&mut suspects);
        Pursuit {
            candidates: healthy,
            probe,
            due: now,
            rounds: 0,
            returns: 0,
            may_return,
            deadline: now + budget,
        }
    }

    /// A question goes to `server`.
    pub(crate) fn asks(&mut self, server: SocketAddr) {
        self.memory(server).figures.asked += 1;
    }

    /// `server` has answered. Whether it was suspect until now.
    pub(crate) fn answered(&mut self, server: SocketAddr, took: Duration) -> bool {
        let memory = self.memory(server);
        let was_suspect = memory.suspect_until.is_some();
        memory.strikes = 0;
        memory.suspect_until = None;
        memory.probed = false;
        memory.usual = Some(memory.usual.map_or(took, |usual| (usual * 7 + took) / 8));
        let seconds = took.as_secs_f64();
        let bucket = BUCKETS.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS.len());
        memory.figures.took[bucket] += 1;
        memory.figures.took_micros += u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        was_suspect
    }

    /// `server` has answered that it cannot, or will not.
    pub(crate) fn failed(&mut self, server: SocketAddr) {
        self.memory(server).figures.failed += 1;
    }

    /// `server` has not answered in time. Whether it is suspect only now.
    pub(crate) fn missed(&mut self, server: SocketAddr, now: Instant) -> bool {
        let memory = self.memory(server);
        memory.figures.missed += 1;
        let is_new = memory.suspect_until.is_none();
        memory.probed = false;
        // Many questions may miss one answerer at the same time; that is one strike.
        if memory.suspect_until.is_none_or(|until| until <= now) {
            memory.strikes += 1;
            memory.suspect_until = Some(now + memory.suspicion());
        }
        is_new
    }

    /// `server` does not understand EDNS.
    pub(crate) fn plain(&mut self, server: SocketAddr, now: Instant) {
        self.memory(server).plain_until = Some(now + PLAIN);
    }

    /// Whether `server` is asked with EDNS.
    pub(crate) fn takes_edns(&mut self, server: SocketAddr, now: Instant) -> bool {
        self.memory(server).plain_until.is_none_or(|until| until <= now)
    }

    /// All that is remembered: the server, whether it is trusted, its figures.
    pub(crate) fn figures(&self) -> impl Iterator<Item = (SocketAddr, bool, Figures)> {
        self.servers.iter().map(|(server, memory)| (*server, memory.suspect_until.is_none(), memory.figures))
    }
}

impl Memory {
    fn patience(&self) -> Duration {
        self.usual.map_or(PATIENCE, |usual| (3 * usual).clamp(LEAST_PATIENCE, PATIENCE))
    }

    /// How long it is suspect with as many strikes as it has.
    fn suspicion(&self) -> Duration {
        let doubled = 1 << self.strikes.saturating_sub(1).min(8);
        (SUSPECT * doubled).min(LONGEST_SUSPECT)
    }
}

/// One server of a pursuit.
#[derive(Clone, Debug)]
struct Candidate {
    server: SocketAddr,
    patience: Duration,
    /// When it was asked first.
    asked: Option<Instant>,
    tries: u32,
    /// It has failed.
    out: bool,
    /// Nobody is there.
    gone: bool,
    /// It has said something.
    heard: bool,
}

/// One question on its way.
#[derive(Clone, Debug)]
pub(crate) struct Pursuit {
    candidates: Vec<Candidate>,
    probe: Option<SocketAddr>,
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
                *one = Candidate { asked: None, tries: 0, out: false, gone: false, heard: false, ..*one };
            }
        }
        if now < self.due {
            return Step::Wait(self.due.min(self.deadline));
        }
        let probe =
            self.candidates.iter_mut().find(|one| Some(one.server) == self.probe && one.asked.is_none());
        if let Some(one) = probe {
            one.ask(now);
            return Step::Ask(one.server);
        }
        let fresh = self.candidates.iter_mut().find(|one| !one.out && one.asked.is_none());
        if let Some(one) = fresh {
            one.ask(now);
            self.due = now + one.patience;
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

    /// Those that let `winner` be faster although they were asked before it and had their time; without a winner all that have been asked and said nothing.
    pub(crate) fn silent(&self, now: Instant, winner: Option<SocketAddr>) -> Vec<SocketAddr> {
        let asked =
            |server| self.candidates.iter().find(|one| one.server == server).and_then(|one| one.asked);
        let won = winner.and_then(asked);
        let is_silent = |one: &&Candidate| {
            let Some(asked) = one.asked.filter(|_| !one.out && !one.heard) else { return false };
            winner.is_none() || (won >= Some(asked) && now.saturating_duration_since(asked) >= one.patience)
        };
        self.candidates.iter().filter(is_silent).map(|one| one.server).collect()
    }

    /// The server that is asked only to learn whether it is back, and when it has had its time.
    pub(crate) fn probe(&self) -> Option<(SocketAddr, Instant)> {
        let one =
            self.candidates.iter().find(|one| Some(one.server) == self.probe && !one.out && !one.heard)?;
        one.asked.map(|asked| (one.server, asked + one.patience))
    }
}

impl Candidate {
    fn ask(&mut self, now: Instant) {
        self.asked.get_or_insert(now);
        self.tries += 1;
    }
}

#[cfg(test)]
mod tests;
