//! Port guards: what an endpoint sends must come from its own addresses.
//!
//! A guard is attached to the host's end of an endpoint's veth pair, at ingress, before the link
//! becomes a port of a bridge. It sees each frame before the bridge and before any firewall, and
//! drops what carries a source that is not the endpoint's ([`rules`]). So behind it a source
//! address means an endpoint.
//!
//! | mechanism | where | counts drops by reason | needs |
//! |---|---|---|---|
//! | [`Tcx`](Mechanism::Tcx) | BPF program at the link | yes | Linux 6.6, CAP_BPF on the host |
//! | [`Clsact`](Mechanism::Clsact) | the same, in the qdisc `clsact` | yes | CAP_BPF on the host |
//! | [`Nftables`](Mechanism::Nftables) | chain of the family `netdev` | yes | CAP_NET_ADMIN over the namespace |
//! | [`Classic`](Mechanism::Classic) | classic BPF in the qdisc `clsact` | no | CAP_NET_ADMIN over the namespace |
//!
//! A guard can also police what may begin TCP connections ([`PortGuards::police`]): a flood then
//! ends at the port of the endpoint that sends it. Classic BPF has no state and cannot.

mod compile;
mod nftables;
mod rules;

use crate::bpf::clsact::{Attached, Clsact, Code, bytes_of};
use crate::bpf::{Counters, Direction, LOOPBACK, LinkProgram, Program, detach_tcx, tcx_programs};
use crate::socket::NetfilterSocket;
use ipnet::IpNet;
pub use rules::{PortPolicy, SpoofReason};
use rules::{Test, internal_rules, policed, rules};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_model::registry;

/// The name of the programs and of the counters (bpftool-prog(8)), and of the classifier.
const NAME: &str = "tg_port_guard";
const COUNTERS: &str = "tg_port_drops";
const INTERNAL_NAME: &str = "tg_internal";

/// How a guard is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// A BPF program, through tcx.
    Tcx,
    /// A BPF program, through the qdisc `clsact`.
    Clsact,
    /// A chain of nftables at the link's ingress.
    Nftables,
    /// A program of classic BPF, through the qdisc `clsact`.
    Classic,
}

impl Mechanism {
    /// All of them, the preferred one first.
    pub const ALL: [Self; 4] = [Self::Tcx, Self::Clsact, Self::Nftables, Self::Classic];

    /// What it is called in logs and reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "BPF (tcx)",
            Self::Clsact => "BPF (clsact)",
            Self::Nftables => "nftables (netdev)",
            Self::Classic => "classic BPF (clsact)",
        }
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Frames dropped at one bridge port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Those that an endpoint may not send, in the order of [`SpoofReason::ALL`].
    pub spoofed: [u64; SpoofReason::ALL.len()],
    /// Those beyond the rate of the policer.
    pub policed: u64,
}

impl Dropped {
    fn plus(mut self, other: Self) -> Self {
        for (total, more) in self.spoofed.iter_mut().zip(other.spoofed) {
            *total += more;
        }
        self.policed += other.policed;
        self
    }
}

/// The port guards of one owner, all of one mechanism. To be used in the namespace of the bridges.
#[derive(Debug)]
pub struct PortGuards {
    mechanism: Mechanism,
    /// The table that chains of [`Mechanism::Nftables`] are in.
    table: String,
    /// By link.
    installed: Mutex<BTreeMap<String, Installed>>,
}

/// A guard that was attached.
#[derive(Debug)]
struct Installed {
    /// The link's number, and what is enforced there.
    index: u32,
    policy: PortPolicy,
    /// The program's number, for BPF.
    program: u32,
    counters: Option<Counters>,
    /// What guards at this link before this one had dropped.
    earlier: Dropped,
    /// The rate of the policer.
    rate: Option<NonZeroU32>,
}

impl Installed {
    /// Sets the policer of a BPF program to the rate. It begins with a full burst.
    fn set_policer(&self) -> io::Result<()> {
        let interval = self.rate.map_or(0, |rate| 1_000_000_000 / u64::from(rate.get()));
        match &self.counters {
            Some(counters) => counters
                .write(compile::DUE, 0)
                .and_then(|()| counters.write(compile::INTERVAL, interval)),
            None => Ok(()),
        }
    }
}

impl PortGuards {
    /// Chooses the first of `candidates` that works, by trying it at `lo` in the namespace of the
    /// calling thread: to be called in one that was made for that.
    ///
    /// # Errors
    /// None works: what was in the way of each.
    pub fn probe(
        candidates: &[Mechanism],
        owner: &str,
    ) -> Result<Self, Vec<(Mechanism, io::Error)>> {
        let policy = PortPolicy {
            mac: [0; 6],
            bridge: [0; 6],
            v4: Vec::new(),
            v6: Vec::new(),
            any_address: false,
        };
        let mut failures = Vec::new();
        for mechanism in candidates.iter().copied() {
            let guards = Self { mechanism, table: table_of(owner), installed: Mutex::default() };
            match guards
                .attach(LOOPBACK, "lo", &policy)
                .and_then(|()| guards.is_attached(LOOPBACK, "lo", &policy))
            {
                Ok(true) => return Ok(Self { installed: Mutex::default(), ..guards }),
                Ok(false) => failures.push((mechanism, io::Error::other("it is not in effect"))),
                Err(error) => failures.push((mechanism, error)),
            }
        }
        Err(failures)
    }

    /// How they are attached.
    pub fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// Attaches a guard that enforces `policy` to the link `link`, numbered `index`, in the place
    /// of the one that is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn attach(&self, index: u32, link: &str, policy: &PortPolicy) -> io::Result<()> {
        let mut installed = self.installed();
        let rate = installed.get(link).and_then(|one| one.rate);
        self.replace(&mut installed, index, link, policy, rate)
    }

    /// Polices what may begin a TCP connection at the link `link`: `rate` frames a second pass, and
    /// the rest is dropped; without a rate, all pass. It holds for guards that are attached there
    /// later too.
    ///
    /// # Errors
    /// The kernel's. `ENOENT`: there is no guard at this link. `EOPNOTSUPP` of
    /// [`Mechanism::Classic`].
    pub fn police(&self, link: &str, rate: Option<NonZeroU32>) -> io::Result<()> {
        let mut installed = self.installed();
        let one = installed.get_mut(link).ok_or(Errno::NOENT)?;
        match self.mechanism {
            Mechanism::Tcx | Mechanism::Clsact => {
                one.rate = rate;
                one.set_policer()
            }
            Mechanism::Nftables if one.rate == rate => Ok(()),
            Mechanism::Nftables => {
                let (index, policy) = (one.index, one.policy.clone());
                self.replace(&mut installed, index, link, &policy, rate)
            }
            Mechanism::Classic => Err(Errno::OPNOTSUPP.into()),
        }
    }

    fn replace(
        &self,
        installed: &mut BTreeMap<String, Installed>,
        index: u32,
        link: &str,
        policy: &PortPolicy,
        rate: Option<NonZeroU32>,
    ) -> io::Result<()> {
        let rules = rules(policy);
        let earlier = installed.get(link).map(|one| self.total(link, one)).unwrap_or_default();
        let policy_of_link = policy.clone();
        let mut new =
            Installed { index, policy: policy_of_link, program: 0, counters: None, earlier, rate };
        match self.mechanism {
            Mechanism::Tcx | Mechanism::Clsact => {
                let counters = Counters::new(COUNTERS, compile::COUNTERS)?;
                let code = compile::extended(&rules, &policed(policy), counters.descriptor());
                let program = Program::load(NAME, &code)?;
                if self.mechanism == Mechanism::Tcx {
                    program.attach_tcx(index, Direction::Ingress)?;
                    let earlier = installed.get(link).map(|earlier| earlier.program);
                    for id in tcx_programs(index, Direction::Ingress)? {
                        if earlier == Some(id) {
                            detach_tcx(index, Direction::Ingress, id)?;
                        }
                    }
                } else {
                    let code = Code::Descriptor(program.descriptor());
                    Clsact::open()?.attach(index, Direction::Ingress, NAME, code)?;
                }
                new = Installed { program: program.id, counters: Some(counters), ..new };
                new.set_policer()?;
            }
            Mechanism::Nftables => {
                let policed = rate.map(|rate| (rate, policed(policy)));
                nftables::attach(
                    &mut NetfilterSocket::open()?,
                    &self.table,
                    link,
                    &rules,
                    policed.as_ref(),
                )?;
            }
            Mechanism::Classic => {
                let code = compile::classic(&rules);
                Clsact::open()?.attach(index, Direction::Ingress, NAME, Code::Classic(&code))?;
            }
        }
        installed.insert(link.to_owned(), new);
        Ok(())
    }

    /// Whether a guard that enforces `policy` is attached to the link `link`, numbered `index`.
    ///
    /// # Errors
    /// The kernel's: there is no such link.
    pub fn is_attached(&self, index: u32, link: &str, policy: &PortPolicy) -> io::Result<bool> {
        let installed = self.installed();
        let Some(one) = installed.get(link) else { return Ok(false) };
        match self.mechanism {
            Mechanism::Tcx => Ok(tcx_programs(index, Direction::Ingress)?.contains(&one.program)),
            Mechanism::Clsact => {
                let attached = Clsact::open()?.attached(index, Direction::Ingress, NAME)?;
                Ok(attached == Some(Attached::Program(one.program)))
            }
            Mechanism::Nftables => {
                let policed = one.rate.map(|rate| (rate, policed(policy)));
                let mut socket = NetfilterSocket::open()?;
                nftables::is_attached(
                    &mut socket,
                    &self.table,
                    link,
                    &rules(policy),
                    policed.as_ref(),
                )
            }
            Mechanism::Classic => {
                let code = bytes_of(&compile::classic(&rules(policy)));
                let attached = Clsact::open()?.attached(index, Direction::Ingress, NAME)?;
                Ok(attached == Some(Attached::Classic(code)))
            }
        }
    }

    /// The guard of `link` is no longer of interest; it goes with its link.
    pub fn forget(&self, link: &str) {
        self.installed().remove(link);
    }

    /// The frames dropped at each link. A counter that cannot be read counts as it was last.
    pub fn dropped(&self) -> BTreeMap<String, Dropped> {
        let installed = self.installed();
        installed.iter().map(|(link, one)| (link.clone(), self.total(link, one))).collect()
    }

    /// Makes the table of nftables for the guards of `owner`, which does not go with a link, in the
    /// calling thread's namespace.
    ///
    /// # Errors
    /// The kernel's.
    pub fn make_table(owner: &str) -> io::Result<()> {
        nftables::make(&mut NetfilterSocket::open()?, &table_of(owner))
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn has_table(owner: &str) -> io::Result<bool> {
        nftables::has_table(&mut NetfilterSocket::open()?, &table_of(owner))
    }

    /// Removes it.
    ///
    /// # Errors
    /// The kernel's. That it is not there is none.
    pub fn remove_table(owner: &str) -> io::Result<()> {
        nftables::remove(&mut NetfilterSocket::open()?, &table_of(owner))
    }

    fn total(&self, link: &str, one: &Installed) -> Dropped {
        let now = match (&one.counters, self.mechanism) {
            (Some(counters), _) => {
                let read = |number| counters.read(number).unwrap_or_default();
                Dropped {
                    spoofed: std::array::from_fn(|number| read(number as u32)),
                    policed: read(compile::POLICED),
                }
            }
            (None, Mechanism::Nftables) => NetfilterSocket::open()
                .and_then(|mut socket| nftables::dropped(&mut socket, &self.table, link))
                .unwrap_or_default(),
            (None, _) => Dropped::default(),
        };
        one.earlier.plus(now)
    }

    fn installed(&self) -> MutexGuard<'_, BTreeMap<String, Installed>> {
        self.installed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the program for `policy` takes for `frame`, of which it runs `times` times: for benches.
#[doc(hidden)]
pub fn program_time(policy: &PortPolicy, frame: &[u8], times: u32) -> io::Result<Duration> {
    let counters = Counters::new(COUNTERS, compile::COUNTERS)?;
    let code = compile::extended(&rules(policy), &policed(policy), counters.descriptor());
    let program = Program::load(NAME, &code)?;
    program.test_run(frame, times).map(|(_, time)| time)
}

/// A guard at the ingress of an internal network's bridge: the host takes what its members send to
/// its gateway addresses alone, and forwards nothing of theirs. A BPF program, as a
/// [`Gate`](crate::Gate) is.
#[derive(Debug)]
pub struct InternalGuard(LinkProgram);

impl InternalGuard {
    /// For a bridge that has these addresses, each with the prefix of its network.
    ///
    /// # Errors
    /// BPF programs are not available here: `EPERM` without the privilege.
    pub fn new(gateways: &[IpNet]) -> io::Result<Self> {
        let counters = Counters::new(COUNTERS, compile::COUNTERS)?;
        let code = compile::extended(&internal_rules(gateways), &[], counters.descriptor());
        LinkProgram::load(INTERNAL_NAME, Direction::Ingress, &code).map(Self)
    }

    /// Whether a guard for the same addresses is attached to the link numbered `index` of the
    /// calling thread's namespace.
    ///
    /// # Errors
    /// `ENODEV` without such a link.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        self.0.is_attached(index)
    }

    /// Attaches it there, ahead of other programs.
    ///
    /// # Errors
    /// `ENODEV` without such a link.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        self.0.attach(index)
    }
}

/// The rate of a policer, and the tests of which a frame passes one if it is policed.
type Policer = (NonZeroU32, Vec<Vec<Test>>);

/// The name of the table of `owner`.
fn table_of(owner: &str) -> String {
    format!("{}{owner}", registry::NFTABLES_PREFIX)
}

#[cfg(test)]
mod tests;
