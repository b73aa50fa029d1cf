//! Networks kept closed by the host's firewall.
//!
//! ```text
//! Ruleset ──► nftables: a table of our own     ──► one netlink transaction
//!        └──► iptables: chains of our own      ──► iptables-restore --noflush, one for each family
//! ```
//!
//! [`Ruleset`] says what shall be let through, and is pure; a back-end renders it as a whole and
//! puts it in the place of what it rendered before. [`Firewall`] is what others hold: it knows the
//! ruleset that is in force, opens ports in it and closes them.

#[cfg(test)]
mod golden;
mod iptables;
mod nftables;
mod ruleset;

pub use iptables::{DockerUser, IptablesState, UserRule};
pub use ruleset::{Opening, Ruleset, Zone};

use crate::{Fact, ReplyPath, Uplink};
use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tidegate_model::{Histogram, HistogramReading, Protocol, registry};
use tidegate_netfilter::{Conntrack, Flow, Gate, GatePolicy, TableFamily, Transport};
use tidegate_netns::{ChangeListener, Namespace};

/// Which firewall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FirewallKind {
    /// nf_tables, over netlink.
    Nftables,
    /// iptables and ip6tables, of either variant.
    Iptables,
}

impl FirewallKind {
    /// What it is called: a word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

impl fmt::Display for FirewallKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A way to put a ruleset into force. Called in the namespace of the host.
trait Backend: fmt::Debug + Send + Sync {
    /// Puts `ruleset` in the place of what its owner had: all of it, or nothing changes.
    fn apply(&mut self, ruleset: &Ruleset) -> io::Result<()>;

    /// The same, where only its ports differ from what was applied last, by `change`.
    fn change_ports(&mut self, ruleset: &Ruleset, _change: &Ports) -> io::Result<()> {
        self.apply(ruleset)
    }

    /// Whether all of `ruleset` is in force, and nothing of others among it.
    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool>;

    /// Removes what `owner` has, whoever made it.
    fn remove(&mut self, owner: &str) -> io::Result<()>;

    /// Takes note of how the rules of `owner` look when they are as they were put, to know them
    /// again. Now and then, while nobody waits.
    fn settle(&mut self, _owner: &str) -> io::Result<()> {
        Ok(())
    }

    /// Leaves its rules open to changes by others, as kernels do that know no better.
    fn share(&mut self) {}

    /// Word of changes; `None` if the kernel sends none, and one has to look.
    fn changes(&self) -> io::Result<Option<ChangeListener>>;
}

/// Ports that come and go.
#[derive(Debug)]
struct Ports {
    added: BTreeSet<Opening>,
    removed: BTreeSet<Opening>,
}

/// The host's firewall, with the rules of one owner.
#[derive(Debug)]
pub struct Firewall {
    kind: FirewallKind,
    owner: String,
    host: Namespace,
    gate: Option<Gate>,
    state: Mutex<State>,
    updates: [Updates; Change::ALL.len()],
}

/// What is changed of the rules at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// All of them are put in the place of what was there: at the start, and to repair them.
    All,
    /// Ports that come and go.
    Ports,
}

impl Change {
    /// Both.
    pub const ALL: [Self; 2] = [Self::All, Self::Ports];

    /// A word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Ports => "ports",
        }
    }
}

/// Bounds of the time that a change of rules takes, in seconds: from one port in nftables to
/// `iptables-restore`, which is given ten.
pub const UPDATE_BOUNDS: [f64; 8] = [0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 1.0, 10.0];

/// Changes of one kind.
#[derive(Debug)]
pub struct Updates {
    took: Histogram<{ UPDATE_BOUNDS.len() }>,
    failed: AtomicU64,
}

impl Default for Updates {
    fn default() -> Self {
        Self { took: Histogram::new(&UPDATE_BOUNDS), failed: AtomicU64::new(0) }
    }
}

impl Updates {
    /// How long those took that succeeded.
    #[must_use]
    pub fn took(&self) -> HistogramReading<{ UPDATE_BOUNDS.len() }> {
        self.took.read()
    }

    /// How many have failed.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Does `update`, and counts it.
    fn count<T>(&self, update: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let begun = Instant::now();
        let result = update();
        match &result {
            Ok(_) => self.took.record(begun.elapsed()),
            Err(_) => drop(self.failed.fetch_add(1, Ordering::Relaxed)),
        }
        result
    }
}

#[derive(Debug)]
struct State {
    backend: Box<dyn Backend>,
    ruleset: Ruleset,
    in_force: bool,
    /// The ruleset was changed since.
    stale: bool,
}

impl Firewall {
    /// The firewall of `host`, with no rules of `owner` as yet.
    ///
    /// # Errors
    /// It cannot be used here: one line that says what is missing.
    pub fn new(kind: FirewallKind, host: &Namespace, owner: &str) -> io::Result<Self> {
        let backend: Box<dyn Backend> = match kind {
            FirewallKind::Nftables => Box::new(host.with(nftables::Nftables::open)??),
            FirewallKind::Iptables => Box::new(host.with(iptables::Iptables::open)??),
        };
        let marked =
            GatePolicy::Marked { mark: registry::FORWARD_MARK, mask: registry::FORWARD_MARK_MASK };
        let gate = host.with(|| Gate::new(&marked))?;
        let gate = gate
            .inspect_err(
                |error| tracing::debug!(%error, "no gates: policy rules stand behind the firewall"),
            )
            .ok();
        let ruleset =
            Ruleset { owner: owner.to_owned(), gated: gate.is_some(), ..Ruleset::default() };
        let state = Mutex::new(State { backend, ruleset, in_force: false, stale: false });
        let updates = Default::default();
        Ok(Self { kind, owner: owner.to_owned(), host: host.clone(), gate, state, updates })
    }

    /// Does without gates, whatever the kernel can do: policy rules stand behind its rules. Before
    /// those are in force.
    #[must_use]
    pub fn ungated(mut self) -> Self {
        self.gate = None;
        self.state().ruleset.gated = false;
        self
    }

    /// What stands at the exits of bridges behind its rules, if the kernel has that.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// Does without tables that are out of reach for others, whatever the kernel can do. Before the
    /// rules are in force.
    #[must_use]
    pub fn shared(self) -> Self {
        self.state().backend.share();
        self
    }

    /// Which one it is.
    pub fn kind(&self) -> FirewallKind {
        self.kind
    }

    /// Whose rules it has.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// The changes of its rules of that kind.
    pub fn updates(&self, change: Change) -> &Updates {
        &self.updates[change as usize]
    }

    /// The fact that its rules are in force.
    pub(crate) fn fact(&self) -> Fact {
        Fact::Ruleset { firewall: self.kind, owner: self.owner.clone() }
    }

    /// Whether rules of the legacy variant of iptables are in use on its host: the kernel sends no
    /// word of changes of those.
    #[must_use]
    pub fn legacy_is_in_use(host: &Namespace) -> bool {
        iptables::legacy_is_in_use(host)
    }

    /// Chains of nftables that may change the mark of the gates behind the rules that set it, as
    /// `ip nat POSTROUTING`: only with iptables, since nftables sets it in the last hook.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mark_setters_behind(&self) -> io::Result<Vec<String>> {
        match self.kind {
            FirewallKind::Iptables if self.gate.is_some() => {
                self.host.with(IptablesState::mark_setters_behind)?
            }
            FirewallKind::Iptables | FirewallKind::Nftables => Ok(Vec::new()),
        }
    }

    /// Where word of changes of rules arrives; `None` if the kernel sends none, and one has to
    /// look.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn changes(&self) -> io::Result<Option<ChangeListener>> {
        let state = self.state();
        let backend = &state.backend;
        self.host.with(|| backend.changes())?
    }

    /// What there shall be, before it is in force.
    pub fn prepare(&self, zones: Vec<Zone>, ports: BTreeSet<Opening>) {
        let mut state = self.state();
        state.ruleset.zones = zones;
        state.ruleset.ports = ports;
    }

    /// Which links of the host forward for the networks alone, and which bridges other projects
    /// have, from the next time that the rules
    /// are put in place: they do not hold until then.
    pub fn set_uplinks(&self, uplinks: &[Uplink], bridges: BTreeSet<String>) -> bool {
        let of = |uplink: &Uplink| {
            let Uplink { link, v4, v6, .. } = uplink.clone();
            [(v4, (link.clone(), false)), (v6, (link, true))]
        };
        let ours = uplinks.iter().filter(|uplink| uplink.ours).flat_map(of);
        let uplinks: Vec<_> = ours.filter(|(is, _)| *is).map(|(_, uplink)| uplink).collect();
        let mut state = self.state();
        // Without such links it does not matter which bridges there are.
        let bridges = if uplinks.is_empty() { BTreeSet::new() } else { bridges };
        let changes = (&state.ruleset.uplinks, &state.ruleset.bridges) != (&uplinks, &bridges);
        if changes {
            (state.ruleset.uplinks, state.ruleset.bridges) = (uplinks, bridges);
            state.stale = state.in_force;
        }
        changes
    }

    /// Which answers leave by which reply path, from the next time that the rules are put in place:
    /// they do not hold until then.
    pub fn set_reply_paths(&self, paths: &[ReplyPath]) {
        let of = |path: &ReplyPath| {
            let number = path.number;
            path.nets.iter().map(move |net| (number, *net)).collect::<Vec<_>>()
        };
        let mut replies: Vec<_> = paths.iter().flat_map(of).collect();
        replies.sort_by_key(|(number, net)| (Reverse(net.prefix_len()), *number, *net));
        let mut state = self.state();
        if state.ruleset.replies != replies {
            state.ruleset.replies = replies;
            state.stale = state.in_force;
        }
    }

    /// Opens `added` and closes `removed`.
    ///
    /// # Errors
    /// The firewall's; nothing has changed then.
    pub fn change_ports(&self, added: &[Opening], removed: &[Opening]) -> io::Result<()> {
        self.change(added, removed, |_| true)
    }

    /// Replaces `before` by `after`: the same ports, carried otherwise. Connections of TCP go on as
    /// they are; flows of UDP, which have no end, follow.
    ///
    /// # Errors
    /// The firewall's; nothing has changed then.
    pub fn redirect_ports(&self, before: &[Opening], after: &[Opening]) -> io::Result<()> {
        self.change(after, before, |port| port.protocol == Protocol::Udp)
    }

    /// `forgets` tells of which ports the flows are deleted.
    fn change(
        &self,
        added: &[Opening],
        removed: &[Opening],
        forgets: impl Fn(&Opening) -> bool,
    ) -> io::Result<()> {
        let mut state = self.state();
        let mut ruleset = state.ruleset.clone();
        let added: BTreeSet<Opening> =
            added.iter().copied().filter(|one| ruleset.ports.insert(*one)).collect();
        let removed: BTreeSet<Opening> =
            removed.iter().copied().filter(|one| ruleset.ports.remove(one)).collect();
        if state.in_force && !(added.is_empty() && removed.is_empty()) {
            let backend = &mut state.backend;
            let ports = Ports { added, removed };
            let update = || self.host.with(|| backend.change_ports(&ruleset, &ports))?;
            self.updates(Change::Ports).count(update)?;
            let changed = ports.added.union(&ports.removed).copied().filter(forgets).collect();
            // Containers may have sent from such a port while nothing was published there.
            let from = ports.added.iter().filter(|port| ruleset::is_source_port(&port.port));
            let from = from.map(|port| (port.protocol, port.port)).collect();
            let subnets: Vec<_> = subnets_of(&ruleset).collect();
            let forget = || {
                forget(&[], &changed)?;
                forget_shadows(&subnets, &from)
            };
            if let Err(error) = self.host.with(forget).flatten() {
                tracing::warn!(%error, "flows of ports that have changed may go on as before");
            }
        }
        state.ruleset = ruleset;
        Ok(())
    }

    /// Takes note of how its rules look, so that what others change elsewhere is told from what
    /// they change here. To be called now and then; a port that comes or goes does not wait for it.
    ///
    /// # Errors
    /// The firewall's.
    pub fn settle(&self) -> io::Result<()> {
        let mut state = self.state();
        if !state.in_force {
            return Ok(());
        }
        let backend = &mut state.backend;
        self.host.with(|| backend.settle(&self.owner))?
    }

    pub(crate) fn apply(&self) -> io::Result<()> {
        let mut state = self.state();
        let State { backend, ruleset, in_force, stale } = &mut *state;
        let begins = !*in_force;
        self.updates(Change::All).count(|| self.host.with(|| backend.apply(ruleset))?)?;
        self.host.with(|| {
            let subnets = subnets_of(ruleset);
            if begins { forget(&subnets.collect::<Vec<_>>(), &ruleset.ports) } else { Ok(()) }
        })??;
        (*in_force, *stale) = (true, false);
        Ok(())
    }

    pub(crate) fn holds(&self) -> io::Result<bool> {
        let mut state = self.state();
        let State { backend, ruleset, in_force, stale } = &mut *state;
        Ok(*in_force && !*stale && self.host.with(|| backend.holds(ruleset))??)
    }

    pub(crate) fn remove(&self) -> io::Result<()> {
        let mut state = self.state();
        state.in_force = false;
        let backend = &mut state.backend;
        self.host.with(|| backend.remove(&self.owner))?
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Addresses of one family that are meant for the link, whoever is on it: IPv6 cannot do without.
fn on_link(v6: bool) -> Vec<IpNet> {
    let nets: &[Ipv6Net] = &[
        Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
        Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
    ];
    nets.iter().filter(|_| v6).copied().map(IpNet::V6).collect()
}

fn subnets_of(ruleset: &Ruleset) -> impl Iterator<Item = IpNet> + '_ {
    ruleset.zones.iter().flat_map(|zone| &zone.subnets).map(IpNet::trunc)
}

fn protocol_of(flow: &Flow) -> Protocol {
    match flow.protocol {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
    }
}

/// Forgets what containers in `subnets` have sent from these ports of the host, at which services
/// are published now: what clients send to those would be taken for an answer to a container.
fn forget_shadows(subnets: &[IpNet], ports: &BTreeSet<(Protocol, u16)>) -> io::Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let is_one = |flow: &Flow| {
        let is_ours = subnets.iter().any(|net| net.contains(&flow.client.ip()));
        is_ours
            && flow.client.ip() != flow.reply_destination.ip()
            && ports.contains(&(protocol_of(flow), flow.reply_destination.port()))
    };
    let deleted = Conntrack::open()?.delete(&[TableFamily::Ipv4, TableFamily::Ipv6], is_one)?;
    tracing::debug!(flows = deleted, "deleted: from ports that are published now");
    Ok(())
}

/// Forgets what is known of flows from and to `subnets`, where others may have been let through
/// before there were rules, and of those of `ports` that the kernel translates: they would go on
/// going where they went before, however long that is no longer right.
fn forget(subnets: &[IpNet], ports: &BTreeSet<Opening>) -> io::Result<()> {
    let concerns = |v6: bool| {
        subnets.iter().any(|net| net.addr().is_ipv6() == v6)
            || ports.iter().any(|port| port.to.is_some() && port.address.is_ipv6() == v6)
    };
    let families = [(TableFamily::Ipv4, false), (TableFamily::Ipv6, true)];
    let families: Vec<_> =
        families.iter().filter(|(_, v6)| concerns(*v6)).map(|(family, _)| *family).collect();
    if families.is_empty() {
        return Ok(());
    }
    let inside = |address: SocketAddr| subnets.iter().any(|net| net.contains(&address.ip()));
    let is_one = |flow: &Flow| {
        let protocol = protocol_of(flow);
        let at = |address: IpAddr| {
            // In the order of a set: all ports that differ in where they lead.
            let port = |to| Opening { protocol, address, port: flow.destination.port(), to };
            ports
                .range(port(None)..)
                .take_while(|one| {
                    (one.protocol, one.address, one.port)
                        == (protocol, address, flow.destination.port())
                })
                .any(|one| one.to.is_some())
        };
        let any = if flow.destination.is_ipv4() {
            IpAddr::from(Ipv4Addr::UNSPECIFIED)
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        at(flow.destination.ip())
            || at(any)
            || [flow.client, flow.destination, flow.server].into_iter().any(inside)
    };
    let deleted = Conntrack::open()?.delete(&families, is_one)?;
    tracing::debug!(
        flows = deleted,
        "deleted: older than the rules, or of ports that have changed"
    );
    Ok(())
}
