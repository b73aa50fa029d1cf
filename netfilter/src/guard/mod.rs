//! Port guards: anti-spoofing for the frames of an endpoint.
//!
//! A guard is attached at the ingress of the host's end of an endpoint's veth pair, before that
//! link joins a bridge. It processes each frame before the bridge and any firewall. It drops frames
//! with a source address that does not belong to the endpoint ([`rules`]). After the guard, a
//! source address therefore identifies an endpoint.
//!
//! | mechanism | attachment point | counts drops by reason | needs |
//! |---|---|---|---|
//! | [`Tcx`](Mechanism::Tcx) | BPF program, tcx | yes | Linux 6.6, CAP_BPF on the host |
//! | [`Clsact`](Mechanism::Clsact) | BPF program, `clsact` qdisc | yes | CAP_BPF on the host |
//! | [`Nftables`](Mechanism::Nftables) | chain of family `netdev` | yes | CAP_NET_ADMIN over the namespace |
//! | [`Classic`](Mechanism::Classic) | classic BPF program, `clsact` qdisc | no | CAP_NET_ADMIN over the namespace |
//!
//! A guard can also police frames that may open TCP connections ([`PortGuards::police`]). This
//! stops a flood at the bridge port of the flooding endpoint. Classic BPF is stateless and cannot
//! police.

mod compile;
mod nftables;
mod rules;

use crate::bpf::clsact::{Attached, Classic, Clsact, Code, bytes_of};
use crate::bpf::{
    Counters, Direction, Instruction, LinkProgram, Program, counters_of, detach_stale, find_named,
    tcx_programs,
};
use crate::wire::open_socket;
use ipnet::IpNet;
pub use rules::{PortPolicy, SpoofReason};
use rules::{Test, bridge_rules, policed, rules};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::num::NonZeroU32;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_model::{Feature, LOOPBACK_INDEX, MacAddress, registry};

/// Names of the programs and counters in bpftool(8), and of the classifier.
pub(crate) const NAME: &str = "tg_port_guard";

/// Start of the name of a program, before the hash of its instructions.
const PROGRAM_PREFIX: &str = "tg_pg_";
const COUNTERS: &str = "tg_port_drops";
pub(crate) const BRIDGE_NAME: &str = "tg_bridge";

/// The mechanism that implements a guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// eBPF program attached through tcx.
    Tcx,
    /// eBPF program in a `clsact` qdisc.
    Clsact,
    /// nftables chain at the ingress hook of the link.
    Nftables,
    /// Classic BPF program in a `clsact` qdisc.
    Classic,
}

impl Mechanism {
    /// All mechanisms, in order of preference.
    ///
    /// Attaching through tcx waits for an RCU grace period, about 12 ms, in which no other link can
    /// be configured (`tcx_prog_attach` in `kernel/bpf/tcx.c`, under the RTNL mutex).
    pub const ALL: [Self; 4] = [Self::Clsact, Self::Tcx, Self::Nftables, Self::Classic];

    /// Name in logs and reports.
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
    /// Frames dropped by the rules, in the order of [`SpoofReason::ALL`].
    pub spoofed: [u64; SpoofReason::ALL.len()],
    /// Frames in excess of the policer rate.
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

/// The port guards of one owner, with a common mechanism. Methods must be called in the network
/// namespace of the bridges.
#[derive(Debug)]
pub struct PortGuards {
    mechanism: Mechanism,
    /// Table for the chains of [`Mechanism::Nftables`].
    table: String,
    /// Key: link name.
    installed: Mutex<BTreeMap<String, Installed>>,
}

/// An attached guard.
#[derive(Debug)]
struct Installed {
    /// Interface index of the link.
    index: u32,
    policy: PortPolicy,
    /// Program ID, for eBPF.
    program: u32,
    counters: Option<Counters>,
    /// Frames dropped by previous guards of this link.
    earlier: Dropped,
    /// Policer rate, in frames per second.
    rate: Option<NonZeroU32>,
}

/// Returns the instructions of a compiled program that counts in `counters`.
fn with_counters(code: Vec<Instruction>, counters: &Counters) -> Vec<Instruction> {
    code.into_iter().map(|one| one.with_map(counters)).collect()
}

/// Returns the name of the compiled program `code`, without counters: at most 15 bytes, with 36
/// bits of a hash.
fn program_name(code: &[Instruction]) -> String {
    let bytes: Vec<u8> = code.iter().flat_map(Instruction::bytes).collect();
    let hash = registry::fnv1a(&bytes) & 0xf_ffff_ffff;
    format!("{PROGRAM_PREFIX}{hash:09x}")
}

impl Installed {
    /// Configures the policer of an eBPF program with the rate. The policer starts with a full
    /// burst.
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
    /// Chooses the first of `candidates` that works. Probes by attaching a guard to `lo` in the
    /// calling thread's network namespace, which should be a temporary one.
    ///
    /// # Errors
    /// The failure of each candidate, if none works.
    pub fn probe(
        candidates: &[Mechanism],
        owner: &str,
    ) -> Result<Self, Vec<(Mechanism, io::Error)>> {
        let policy = PortPolicy {
            mac: MacAddress([0; 6]),
            bridge: MacAddress([0; 6]),
            v4: Vec::new(),
            v6: Vec::new(),
            any_address: false,
        };
        let mut failures = Vec::new();
        for mechanism in candidates.iter().copied() {
            let guards = Self { mechanism, table: table_of(owner), installed: Mutex::default() };
            match guards
                .attach(LOOPBACK_INDEX, "lo", &policy)
                .and_then(|()| guards.is_attached(LOOPBACK_INDEX, "lo", &policy))
            {
                Ok(true) => return Ok(Self { installed: Mutex::default(), ..guards }),
                Ok(false) => {
                    let source =
                        io::Error::new(io::ErrorKind::NotFound, "attached guard not found");
                    failures.push((mechanism, source));
                }
                Err(error) => failures.push((mechanism, error)),
            }
        }
        Err(failures)
    }

    /// Returns the mechanism of the guards.
    pub fn mechanism(&self) -> Mechanism {
        self.mechanism
    }

    /// Attaches a guard with `policy` to the link `link` with interface index `index`, replacing
    /// the current guard.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn attach(&self, index: u32, link: &str, policy: &PortPolicy) -> io::Result<()> {
        let mut installed = self.installed();
        let rate = installed.get(link).and_then(|one| one.rate);
        self.replace(&mut installed, index, link, policy, rate)
    }

    /// Polices frames that may open a TCP connection at the link `link`. At most `rate` frames per
    /// second pass; `None` disables the policer. The setting also applies to guards attached to
    /// this link later.
    ///
    /// # Errors
    /// Errors of the kernel. `ENOENT` if the link has no guard; `EOPNOTSUPP` for
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
                let code = compile::extended(&rules, &policed(policy));
                let name = program_name(&code);
                // The guard of a process that was killed is kept if it is the same. Loading one
                // takes milliseconds, and detaching one an RCU grace period.
                let kept = match self.mechanism {
                    Mechanism::Tcx => find_named(index, Direction::Ingress, &name)?,
                    _ => match Clsact::open()?.attached(index, Direction::Ingress, NAME)? {
                        Some(Attached::Program(id)) => {
                            counters_of(id, &name)?.map(|counters| (id, counters))
                        }
                        _ => None,
                    },
                };
                let (program, counters) = match kept {
                    Some(kept) => kept,
                    None => {
                        let counters = Counters::new(COUNTERS, compile::COUNTERS)?;
                        let program = Program::load(&name, &with_counters(code, &counters))?;
                        if self.mechanism == Mechanism::Tcx {
                            program.attach_tcx(index, Direction::Ingress)?;
                        } else {
                            let code = Code::Descriptor(program.descriptor());
                            Clsact::open()?.attach(index, Direction::Ingress, NAME, code)?;
                        }
                        (program.id, counters)
                    }
                };
                // Of an earlier policy, or of a version that prefers tcx. The kernel may lack it.
                let detached = detach_stale(index, Direction::Ingress, PROGRAM_PREFIX, program);
                if self.mechanism == Mechanism::Tcx {
                    detached?;
                }
                new = Installed { program, counters: Some(counters), ..new };
                new.set_policer()?;
            }
            Mechanism::Nftables => {
                let policed = rate.map(|rate| (rate, policed(policy)));
                nftables::attach(&mut open_socket()?, &self.table, link, &rules, policed.as_ref())?;
            }
            Mechanism::Classic => {
                let code = compile::classic(&rules);
                Clsact::open()?.attach(index, Direction::Ingress, NAME, Code::Classic(&code))?;
            }
        }
        installed.insert(link.to_owned(), new);
        Ok(())
    }

    /// Returns whether a guard with `policy` was attached to the link `link` with interface index
    /// `index`, and still is. Compares the program ID for eBPF, the number of rules of `policy` for
    /// nftables, and the instructions of `policy` for classic BPF.
    ///
    /// # Errors
    /// Errors of the kernel, for example a missing link.
    pub fn is_attached(&self, index: u32, link: &str, policy: &PortPolicy) -> io::Result<bool> {
        let installed = self.installed();
        let Some(one) = installed.get(link).filter(|one| one.policy == *policy) else {
            return Ok(false);
        };
        match self.mechanism {
            Mechanism::Tcx => Ok(tcx_programs(index, Direction::Ingress)?.contains(&one.program)),
            Mechanism::Clsact => {
                let attached = Clsact::open()?.attached(index, Direction::Ingress, NAME)?;
                Ok(attached == Some(Attached::Program(one.program)))
            }
            Mechanism::Nftables => {
                let policed = one.rate.map(|rate| (rate, policed(policy)));
                let mut socket = open_socket()?;
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

    /// Discards the state of the guard of `link`. The kernel removes the guard itself with its
    /// link.
    pub fn forget(&self, link: &str) {
        self.installed().remove(link);
    }

    /// Returns the frames dropped at each link. Counters that cannot be read count as 0.
    pub fn dropped(&self) -> BTreeMap<String, Dropped> {
        let installed = self.installed();
        installed.iter().map(|(link, one)| (link.clone(), self.total(link, one))).collect()
    }

    /// Creates the nftables table for the guards of `owner` in the calling thread's network
    /// namespace. Unlike the chains, it is not removed with a link.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn make_table(owner: &str) -> io::Result<()> {
        nftables::make(&mut open_socket()?, &table_of(owner))
    }

    /// Returns whether the table of [`make_table`](Self::make_table) exists.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn has_table(owner: &str) -> io::Result<bool> {
        nftables::has_table(&mut open_socket()?, &table_of(owner))
    }

    /// Removes the table of [`make_table`](Self::make_table).
    ///
    /// # Errors
    /// Errors of the kernel. A missing table is not an error.
    pub fn remove_table(owner: &str) -> io::Result<()> {
        nftables::remove(&mut open_socket()?, &table_of(owner))
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
            (None, Mechanism::Nftables) => open_socket()
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

/// Measures the mean run time of the program for `policy` on `frame`, over `times` runs. For
/// benchmarks.
#[doc(hidden)]
pub fn program_time(policy: &PortPolicy, frame: &[u8], times: u32) -> io::Result<Duration> {
    let counters = Counters::new(COUNTERS, compile::COUNTERS)?;
    let code = with_counters(compile::extended(&rules(policy), &policed(policy)), &counters);
    let program = Program::load(NAME, &code)?;
    program.test_run(frame, times).map(|(_, time)| time)
}

/// What the host accepts from the members of a bridge.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BridgePolicy {
    /// The addresses of the bridge, each with the prefix length of its subnet.
    pub gateways: Vec<IpNet>,
    /// Accepts only packets to `gateways`. Otherwise to any destination, from addresses of the
    /// subnets.
    pub internal: bool,
}

/// A guard at the ingress of a bridge. The host accepts packets from members only if they have a
/// source address of the subnets, and for an internal network only if they are addressed to the
/// gateway addresses. It is an eBPF program if the process may load one. Otherwise, for example in
/// a user namespace, it is a classic BPF program in a `clsact` qdisc.
#[derive(Debug)]
pub struct BridgeGuard(BridgeProgram);

#[derive(Debug)]
enum BridgeProgram {
    Extended(LinkProgram),
    Classic(Vec<Classic>),
}

impl BridgeGuard {
    /// Loads a guard.
    ///
    /// # Errors
    /// An eBPF program cannot be loaded, and classic BPF is disabled for tests
    /// ([`Feature::ClassicGuards`]).
    pub fn new(policy: &BridgePolicy) -> io::Result<Self> {
        let rules = bridge_rules(policy);
        let extended = Counters::new(COUNTERS, compile::COUNTERS).and_then(|counters| {
            let code = with_counters(compile::extended(&rules, &[]), &counters);
            LinkProgram::load(BRIDGE_NAME, Direction::Ingress, &code)
        });
        match extended {
            Err(_) if !Feature::ClassicGuards.is_forced_off() => {
                Ok(Self(BridgeProgram::Classic(compile::classic(&rules))))
            }
            extended => extended.map(BridgeProgram::Extended).map(Self),
        }
    }

    /// Attaches a guard to `lo` in the calling thread's network namespace, which should be a
    /// temporary one.
    ///
    /// # Errors
    /// Guards of bridges are unavailable.
    pub fn probe() -> io::Result<()> {
        Self::new(&BridgePolicy { gateways: Vec::new(), internal: true })?.attach(LOOPBACK_INDEX)
    }

    /// Returns whether a guard with the same policy is attached to the link with interface index
    /// `index` in the calling thread's network namespace.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist.
    pub fn is_attached(&self, index: u32) -> io::Result<bool> {
        match &self.0 {
            BridgeProgram::Extended(program) => program.is_attached(index),
            BridgeProgram::Classic(code) => {
                let attached = Clsact::open()?.attached(index, Direction::Ingress, BRIDGE_NAME)?;
                Ok(attached == Some(Attached::Classic(bytes_of(code))))
            }
        }
    }

    /// Attaches the guard to the link with interface index `index` in the calling thread's network
    /// namespace, ahead of existing programs.
    ///
    /// # Errors
    /// `ENODEV` if the link does not exist; for classic BPF, `ENOENT` or `EOPNOTSUPP` if the kernel
    /// lacks `clsact` or `cls_bpf`.
    pub fn attach(&self, index: u32) -> io::Result<()> {
        match &self.0 {
            BridgeProgram::Extended(program) => program.attach(index),
            BridgeProgram::Classic(code) => {
                let code = Code::Classic(code);
                Clsact::open()?.attach(index, Direction::Ingress, BRIDGE_NAME, code)
            }
        }
    }
}

/// Policer rate, and alternative test lists. A frame that passes any list is policed.
type Policer = (NonZeroU32, Vec<Vec<Test>>);

/// Name of the nftables table of `owner`.
fn table_of(owner: &str) -> String {
    format!("{}{owner}", registry::NFTABLES_PREFIX)
}

#[cfg(test)]
mod tests;
