//! Isolation by the host's firewall.
//!
//! ```text
//! Ruleset ──► nftables: own table     ──► one netlink transaction
//!        └──► iptables: own chains      ──► iptables-restore --noflush, one run per family
//! ```
//!
//! [`Ruleset`] defines the permitted traffic and is pure. A back end renders it as a whole and
//! replaces the previously installed rules. [`Firewall`] is the public interface: it holds the
//! current ruleset and opens and closes ports in it.

#[cfg(test)]
mod golden;
mod iptables;
mod nftables;
mod ruleset;
mod tracked_flows;

pub use iptables::{DockerUser, IptablesState, UserRule};
pub use ruleset::{Opening, Ruleset, Zone};
pub use tracked_flows::EvictedFlows;

use crate::{Fact, ReplyPath, Uplink};
use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};
use tidegate_model::{Histogram, HistogramReading, Protocol, registry};
use tidegate_netfilter::{
    Conntrack, Entry, Flow, Gate, GatePolicy, TIMESTAMPS, TableFamily, Transport,
};
use tidegate_netns::{ChangeListener, Namespace};

/// A firewall of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum FirewallKind {
    /// nf_tables, over netlink.
    Nftables,
    /// iptables and ip6tables, nf_tables or legacy variant.
    Iptables,
}

impl FirewallKind {
    /// Name of the firewall, one word.
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

/// A back end that installs rulesets. Its methods are called in the host namespace.
trait Backend: fmt::Debug + Send + Sync {
    /// Atomically replaces the rules of the owner by `ruleset`.
    fn apply(&mut self, ruleset: &Ruleset) -> io::Result<Previous>;

    /// Installs `ruleset`, which differs from the last installed one only by the ports in `change`.
    fn change_ports(&mut self, ruleset: &Ruleset, _change: &PortChange) -> io::Result<Previous> {
        self.apply(ruleset)
    }

    /// Returns whether exactly the rules of `ruleset` are in force.
    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool>;

    /// Removes all rules of `owner`, including those of a previous process.
    fn remove(&mut self, owner: &str) -> io::Result<()>;

    /// Records a fingerprint of the unmodified rules of `owner`, for later comparison. Called
    /// periodically, off the critical path.
    fn record_fingerprint(&mut self, _owner: &str) -> io::Result<()> {
        Ok(())
    }

    /// Disables owned tables, as on kernels without support for them.
    fn disable_ownership(&mut self) {}

    /// Subscribes to changes of rules. Returns `None` if the kernel sends no notifications, so the
    /// caller must poll.
    fn changes(&self) -> io::Result<Option<ChangeListener>>;
}

/// The state of the rules before they were replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Previous {
    /// No rule was missing.
    Complete,
    /// Other software had removed or changed rules.
    Changed,
}

/// A change of the published ports.
#[derive(Debug)]
struct PortChange {
    added: BTreeSet<Opening>,
    removed: BTreeSet<Opening>,
}

/// The rules of one owner in the host's firewall.
#[derive(Debug)]
pub struct Firewall {
    kind: FirewallKind,
    owner: String,
    host: Namespace,
    gate: Option<Gate>,
    state: Mutex<State>,
    updates: [Updates; Change::ALL.len()],
    tracked: TrackedFlows,
}

/// Usage of the conntrack table at the last check.
#[derive(Debug, Default)]
struct TrackedFlows {
    entries: AtomicU64,
    limit: AtomicU64,
    evicted: AtomicU64,
}

/// A type of rule update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Installation of the whole ruleset, at start and for repairs.
    All,
    /// A change of the published ports.
    Ports,
}

impl Change {
    /// All types.
    pub const ALL: [Self; 2] = [Self::All, Self::Ports];

    /// Value of the metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Ports => "ports",
        }
    }
}

/// Histogram bounds of the duration of an update in seconds: from one port in nftables to the 10 s
/// timeout of `iptables-restore`.
pub const UPDATE_BOUNDS: [f64; 8] = [0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 1.0, 10.0];

/// Statistics of the updates of one type.
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
    /// Returns the durations of successful updates.
    #[must_use]
    pub fn took(&self) -> HistogramReading<{ UPDATE_BOUNDS.len() }> {
        self.took.read()
    }

    /// Returns the number of failed updates.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Runs `update` and records the result.
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
    /// The ruleset has changed since it was applied.
    stale: bool,
    /// The subnets that the applied rules protect. `None` if none were applied, or those of a
    /// process that was killed, which protected the same ones.
    protected: Option<BTreeSet<IpNet>>,
    held: Held,
    /// The link-local addresses of the endpoints on each network, in the order of the zones.
    link_local_members: Vec<BTreeSet<Ipv6Addr>>,
}

/// The families of tracked flows.
const FAMILIES: [TableFamily; 2] = [TableFamily::Ipv4, TableFamily::Ipv6];

/// When the rules were in force.
#[derive(Debug, Default)]
struct Held {
    /// A time until which they were complete; `None` if unknown.
    until: Option<SystemTime>,
    /// The time of the last call of [`Firewall::note_unchanged`].
    unchanged: Option<SystemTime>,
}

impl Held {
    fn at(now: SystemTime) -> Self {
        Self { until: Some(now), unchanged: None }
    }
}

impl Firewall {
    /// Opens the firewall of `host` without installing rules of `owner`.
    ///
    /// # Errors
    /// The firewall is unavailable; the error is one line that names the missing prerequisite.
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
                |error| tracing::debug!(%error, "gates unavailable; using policy rules as guards"),
            )
            .ok();
        let ruleset =
            Ruleset { owner: owner.to_owned(), gated: gate.is_some(), ..Ruleset::default() };
        let state = Mutex::new(State {
            backend,
            ruleset,
            in_force: false,
            stale: false,
            protected: None,
            held: Held::default(),
            link_local_members: Vec::new(),
        });
        let updates = Default::default();
        Ok(Self {
            kind,
            owner: owner.to_owned(),
            host: host.clone(),
            gate,
            state,
            updates,
            tracked: TrackedFlows::default(),
        })
    }

    /// Disables gates even if the kernel supports them, so policy rules are the guards. Must be
    /// called before the rules are in force.
    #[must_use]
    pub fn ungated(mut self) -> Self {
        self.gate = None;
        self.state().ruleset.gated = false;
        self
    }

    /// Returns the egress gate for bridges, if the kernel supports it.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.as_ref()
    }

    /// Disables owned tables even if the kernel supports them. Must be called before the rules are
    /// in force.
    #[must_use]
    pub fn shared(self) -> Self {
        self.state().backend.disable_ownership();
        self
    }

    /// Returns the type of the firewall.
    pub fn kind(&self) -> FirewallKind {
        self.kind
    }

    /// Returns the owner of the rules.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// Returns the statistics of the updates of type `change`.
    pub fn updates(&self, change: Change) -> &Updates {
        &self.updates[change as usize]
    }

    /// Returns the fact that the rules are in force.
    pub(crate) fn fact(&self) -> Fact {
        Fact::Ruleset { firewall: self.kind, owner: self.owner.clone() }
    }

    /// Returns whether the user chain of nftables has rules in `host`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the rules cannot be listed.
    pub fn nftables_has_user_rules(host: &Namespace) -> io::Result<bool> {
        let table = registry::NFTABLES_USER_TABLE;
        host.with(|| iptables::user_chain_has_rules(TableFamily::Inet, table))?
    }

    /// Returns whether legacy iptables is in use on `host`. The kernel sends no notifications about
    /// its changes.
    #[must_use]
    pub fn legacy_is_in_use(host: &Namespace) -> bool {
        iptables::legacy_is_in_use(host)
    }

    /// Lists nftables chains that may change the gate mark after tidegate's rules have set it, as
    /// `ip nat POSTROUTING`. Always empty with nftables, which sets the mark in the last hook.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn mark_setters_behind(&self) -> io::Result<Vec<String>> {
        match self.kind {
            FirewallKind::Iptables if self.gate.is_some() => {
                self.host.with(IptablesState::mark_setters_behind)?
            }
            FirewallKind::Iptables | FirewallKind::Nftables => Ok(Vec::new()),
        }
    }

    /// Subscribes to changes of rules. Returns `None` if the kernel sends no notifications, so the
    /// caller must poll.
    ///
    /// # Errors
    /// The process is out of file descriptors.
    pub fn changes(&self) -> io::Result<Option<ChangeListener>> {
        let state = self.state();
        let backend = &state.backend;
        self.host.with(|| backend.changes())?
    }

    /// Sets the ruleset before it is applied.
    pub fn prepare(&self, zones: Vec<Zone>, ports: BTreeSet<Opening>) {
        let mut state = self.state();
        state.ruleset.zones = zones;
        state.ruleset.ports = ports;
    }

    /// Sets the networks. Takes effect when the rules are applied again; until then,
    /// [`holds`](Self::holds) is false.
    pub fn set_zones(&self, zones: Vec<Zone>) {
        let mut state = self.state();
        if state.ruleset.zones != zones {
            state.ruleset.zones = zones;
            state.stale = state.in_force;
        }
    }

    /// Sets the link-local addresses of the endpoints on each network, in the order of the zones,
    /// by which their tracked flows are recognized.
    pub fn set_link_local_members(&self, members: Vec<BTreeSet<Ipv6Addr>>) {
        self.state().link_local_members = members;
    }

    /// Declares that rules of this owner, of a process that was killed, are still in force. They
    /// are replaced when the rules are applied, and tracked flows continue.
    pub fn adopt(&self) {
        let mut state = self.state();
        (state.in_force, state.stale) = (true, true);
    }

    /// Sets the links of the host that forward for the networks only, and the bridges of other
    /// projects, to which these links forward too. Takes effect when the rules are applied again;
    /// until then, [`holds`](Self::holds) is false. Returns whether the rules change.
    pub fn set_uplinks(&self, uplinks: &[Uplink], bridges: BTreeSet<String>) -> bool {
        let of = |uplink: &Uplink| {
            let Uplink { link, v4, v6, .. } = uplink.clone();
            [(v4, (link.clone(), false)), (v6, (link, true))]
        };
        let ours = uplinks.iter().filter(|uplink| uplink.ours).flat_map(of);
        let uplinks: Vec<_> = ours.filter(|(is, _)| *is).map(|(_, uplink)| uplink).collect();
        let mut state = self.state();
        // Without such links, no rule depends on the bridges.
        let bridges = if uplinks.is_empty() { BTreeSet::new() } else { bridges };
        let changes = (&state.ruleset.uplinks, &state.ruleset.bridges) != (&uplinks, &bridges);
        if changes {
            (state.ruleset.uplinks, state.ruleset.bridges) = (uplinks, bridges);
            state.stale = state.in_force;
        }
        changes
    }

    /// Sets the reply paths. Takes effect when the rules are applied again; until then,
    /// [`holds`](Self::holds) is false.
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

    /// Opens the ports `added` and closes the ports `removed`.
    ///
    /// # Errors
    /// Errors of the firewall; nothing was changed.
    pub fn change_ports(&self, added: &[Opening], removed: &[Opening]) -> io::Result<()> {
        self.change(added, removed, |_| true)
    }

    /// Replaces `before` by `after`: the same ports, published by another mechanism. TCP
    /// connections continue unchanged; UDP flows, which have no end, move to the new mechanism.
    ///
    /// # Errors
    /// Errors of the firewall; nothing was changed.
    pub fn redirect_ports(&self, before: &[Opening], after: &[Opening]) -> io::Result<()> {
        self.change(after, before, |port| port.protocol == Protocol::Udp)
    }

    /// Changes the ports. The conntrack entries of the ports that satisfy `delete_flows_of` are
    /// deleted.
    fn change(
        &self,
        added: &[Opening],
        removed: &[Opening],
        delete_flows_of: impl Fn(&Opening) -> bool,
    ) -> io::Result<()> {
        let mut state = self.state();
        let mut ruleset = state.ruleset.clone();
        let added: BTreeSet<Opening> =
            added.iter().copied().filter(|one| ruleset.ports.insert(*one)).collect();
        let removed: BTreeSet<Opening> =
            removed.iter().copied().filter(|one| ruleset.ports.remove(one)).collect();
        if state.in_force && !(added.is_empty() && removed.is_empty()) {
            let backend = &mut state.backend;
            let ports = PortChange { added, removed };
            let update = || self.host.with(|| backend.change_ports(&ruleset, &ports))?;
            let previous = self.updates(Change::Ports).count(update)?;
            self.end_unprotected_flows(&mut state, previous);
            let changed =
                ports.added.union(&ports.removed).copied().filter(delete_flows_of).collect();
            // Containers may have used such a source port while it was not published.
            let from = ports.added.iter().filter(|port| ruleset::is_source_port(&port.port));
            let from = from.map(|port| (port.protocol, port.port)).collect();
            let subnets: Vec<_> = subnets_of(&ruleset).collect();
            let delete_stale = || {
                delete_flows(&[], &changed)?;
                delete_shadowing_flows(&subnets, &from)
            };
            if let Err(error) = self.host.with(delete_stale).flatten() {
                tracing::warn!(%error, "conntrack entries of changed ports not deleted; their flows may continue as before");
            }
        }
        state.ruleset = ruleset;
        Ok(())
    }

    /// Records a fingerprint of the rules, to distinguish external changes of these rules from
    /// changes elsewhere. Should be called periodically; updates of ports do not wait for it.
    ///
    /// # Errors
    /// Errors of the firewall.
    pub fn record_fingerprint(&self) -> io::Result<()> {
        let mut state = self.state();
        if !state.in_force {
            return Ok(());
        }
        let backend = &mut state.backend;
        self.host.with(|| backend.record_fingerprint(&self.owner))?
    }

    /// Evicts flows of the networks if the conntrack table has more than `limit` assured entries.
    /// The default limit is three quarters of the size of the table. Does nothing on a host without
    /// conntrack. Should be called periodically.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn limit_tracked_flows(&self, limit: Option<usize>) -> io::Result<EvictedFlows> {
        let owned = {
            let state = self.state();
            let subnets = |zone: &Zone| zone.subnets.iter().map(IpNet::trunc).collect();
            tracked_flows::Owned {
                networks: state.ruleset.zones.iter().map(subnets).collect(),
                link_local: state.link_local_members.clone(),
                ports: state.ruleset.ports.iter().map(|one| (one.protocol, one.port)).collect(),
            }
        };
        self.host.with(|| {
            let Ok((entries, size)) = Conntrack::usage() else {
                return Ok(EvictedFlows::default());
            };
            let limit = limit.unwrap_or(size / 4 * 3).min(size);
            self.tracked.entries.store(entries as u64, Ordering::Relaxed);
            self.tracked.limit.store(limit as u64, Ordering::Relaxed);
            if entries <= limit {
                return Ok(EvictedFlows::default());
            }
            let evicted = tracked_flows::evict(&owned, limit)?;
            self.tracked.evicted.fetch_add(evicted.flows as u64, Ordering::Relaxed);
            Ok(evicted)
        })?
    }

    /// Ends the tracked flows of containers with `addresses`, which may get new owners.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn end_flows_of(&self, addresses: &[IpAddr]) -> io::Result<()> {
        let hosts: Vec<IpNet> = addresses.iter().map(|ip| IpNet::from(*ip)).collect();
        self.host.with(|| delete_flows(&hosts, &BTreeSet::new()))?
    }

    /// Ends the tracked flows of `subnets` except for those of the addresses in `kept`: endpoints
    /// and gateways. A killed process may have removed an endpoint without ending its flows.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn end_flows_except(&self, subnets: &[IpNet], kept: &BTreeSet<IpAddr>) -> io::Result<()> {
        let is_left = |address: &IpAddr| {
            !kept.contains(address) && subnets.iter().any(|net| net.contains(address))
        };
        let is_one = |entry: &Entry<'_>| entry.has_address(is_left);
        let deleted = self.host.with(|| Conntrack::open()?.delete(&FAMILIES, is_one))??;
        tracing::debug!(flows = deleted, "conntrack entries of removed endpoints deleted");
        Ok(())
    }

    /// Returns the number of entries of the conntrack table at the last check, the limit above
    /// which flows are evicted, and the number of flows evicted so far.
    #[must_use]
    pub fn tracked_flows(&self) -> [u64; 3] {
        let TrackedFlows { entries, limit, evicted } = &self.tracked;
        [entries, limit, evicted].map(|value| value.load(Ordering::Relaxed))
    }

    pub(crate) fn apply(&self) -> io::Result<()> {
        let mut state = self.state();
        let State { backend, ruleset, in_force, protected, held, .. } = &mut *state;
        let previous =
            self.updates(Change::All).count(|| self.host.with(|| backend.apply(ruleset))?)?;
        // The kernel has the sysctl once a rule needs conntrack.
        if held.until.is_none()
            && let Err(error) = self.host.set_sysctl(TIMESTAMPS, "1")
        {
            tracing::debug!(%error, "no start times of tracked flows");
        }
        let subnets: BTreeSet<_> = subnets_of(ruleset).collect();
        let added: Vec<_> = match protected {
            Some(protected) => subnets.difference(protected).copied().collect(),
            None if *in_force => Vec::new(),
            None => subnets.iter().copied().collect(),
        };
        // Flows that began before the rules were in force.
        let none = BTreeSet::new();
        let ports = if *in_force { &none } else { &ruleset.ports };
        let ended = self.host.with(|| delete_flows(&added, ports))?;
        *protected = Some(subnets);
        if *in_force {
            self.end_unprotected_flows(&mut state, previous);
        }
        ended?;
        state.held = Held::at(SystemTime::now());
        (state.in_force, state.stale) = (true, false);
        Ok(())
    }

    /// Ends the flows of the protected subnets that began after the rules were last known to be
    /// complete, if they were not complete in the end. Without rules, a host that forwards, or
    /// translates for others, tracks forged packets with the address of a container as a flow of
    /// that container. Its rules would then accept the replies.
    fn end_unprotected_flows(&self, state: &mut State, previous: Previous) {
        if previous == Previous::Complete {
            return;
        }
        let protected: Vec<_> = state.protected.iter().flatten().copied().collect();
        let inside = |address: &IpAddr| protected.iter().any(|net| net.contains(address));
        let until = state.held.until;
        let is_one = |entry: &Entry<'_>| {
            let is_earlier = until.zip(entry.began()).is_some_and(|(until, began)| began < until);
            !is_earlier && entry.has_address(inside)
        };
        let ended = || Conntrack::open()?.delete(&FAMILIES, is_one);
        match self.host.with(ended).flatten() {
            Ok(flows) => tracing::info!(
                flows,
                "firewall rules restored; flows that began without them ended"
            ),
            Err(error) => {
                tracing::warn!(%error, "flows that began without firewall rules not ended");
            }
        }
        state.held = Held::at(SystemTime::now());
    }

    /// Records that no change of the rules has been notified until `now`. Should be called
    /// periodically, unless changes are not notified. The kernel queues a notification with the
    /// change, so the rules were complete at the time of the previous call.
    pub fn note_unchanged(&self, now: SystemTime) {
        let mut state = self.state();
        if state.in_force && state.held.until.is_some() {
            state.held.until = state.held.unchanged.or(state.held.until);
            state.held.unchanged = Some(now);
        }
    }

    pub(crate) fn holds(&self) -> io::Result<bool> {
        let mut state = self.state();
        let State { backend, ruleset, in_force, stale, .. } = &mut *state;
        if !*in_force || *stale {
            return Ok(false);
        }
        let now = SystemTime::now();
        let holds = self.host.with(|| backend.holds(ruleset))??;
        if holds {
            state.held = Held::at(now);
        }
        Ok(holds)
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

/// Returns the link-local and multicast prefixes, which IPv6 requires; none for IPv4.
fn link_scoped_prefixes(v6: bool) -> Vec<IpNet> {
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

/// Deletes flows of containers in `subnets` whose masqueraded source port is now published. Packets
/// of clients to such a port would otherwise match as replies to a container.
fn delete_shadowing_flows(subnets: &[IpNet], ports: &BTreeSet<(Protocol, u16)>) -> io::Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let is_one = |flow: &Flow| {
        let is_ours = subnets.iter().any(|net| net.contains(&flow.client.ip()));
        is_ours
            && flow.client.ip() != flow.reply_destination.ip()
            && ports.contains(&(protocol_of(flow), flow.reply_destination.port()))
    };
    let is_one = |entry: &Entry<'_>| entry.flow.as_ref().is_some_and(is_one);
    let deleted = Conntrack::open()?.delete(&FAMILIES, is_one)?;
    tracing::debug!(flows = deleted, "shadowing conntrack entries deleted");
    Ok(())
}

/// Deletes flows from and to `subnets`, which may have been permitted before the rules existed, and
/// flows of kernel-published `ports`, which would otherwise keep their old destination
/// indefinitely.
fn delete_flows(subnets: &[IpNet], ports: &BTreeSet<Opening>) -> io::Result<()> {
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
    let inside = |address: &IpAddr| subnets.iter().any(|net| net.contains(address));
    let is_to_port = |flow: &Flow| {
        let protocol = protocol_of(flow);
        let at = |address: IpAddr| {
            // The set is ordered, so the ports that differ only in their target are adjacent.
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
        at(flow.destination.ip()) || at(any)
    };
    let is_one = |entry: &Entry<'_>| {
        entry.has_address(inside) || entry.flow.as_ref().is_some_and(is_to_port)
    };
    let deleted = Conntrack::open()?.delete(&families, is_one)?;
    tracing::debug!(flows = deleted, "stale conntrack entries deleted");
    Ok(())
}
