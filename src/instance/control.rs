//! The main loop of a running project: waits for its end, executes orders of the API, repairs
//! networks and re-attaches restarted containers.
//!
//! An adopted namespace belongs to a container of another runtime. After a restart of the
//! container, its path refers to a new namespace. The kernel sends no notification of that, so the
//! path is polled once a second. Our handle keeps the old namespace alive, so its inode number
//! cannot be reused meanwhile.
//!
//! Other software removes objects of ours. A daemon that flushes unknown policy rules when it
//! starts (systemd-networkd), or that enables forwarding on all links, breaks isolation. Processes
//! of a container can remove its addresses. The kernel notifies of changes to links, addresses,
//! routes, rules and nftables, on the host and in each endpoint's namespace. It does not notify of
//! changes to BPF programs and sysctls, which are polled every [`SILENT_POLL_INTERVAL`]. Missing
//! objects are restored, logged and counted at the times given by
//! [`repair_schedule`](super::repair_schedule).
//!
//! A path below `/proc` names a process, not a container. Once that process has ended, its PID can
//! be reused, and the path can refer to the namespace of an unrelated process.

use super::endpoint_watch::EndpointWatch;
use super::endpoint_work::{EndpointWork, Progress};
use super::layout::foreign_networks;
use super::names::{NameServers, NewServer};
use super::repair_schedule::{Check, SETTLE};
use super::routing::{
    foreign_bridges, preceding_rule, reply_paths, rules_ahead, uplinks, warn_of_preceding_rule,
};
use super::signals::Signals;
use super::{Instance, Outside, bridge_indexes};
use crate::api::{Order, Problem};
use crate::service_manager::ServiceManager;
use anyhow::Context;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tidegate_dns::Serving;
use tidegate_netns::{
    ChangeListener, Namespace, NamespaceId, Restored, drop_in_background,
    policy_route_sysctls_hold, repair_policy_routes,
};
use tidegate_netsetup::{Firewall, Place, RepairKind, Repaired, SetupError};
use tidegate_publish::firewall::BypassedRules;
use tidegate_publish::publisher::PublishError;
use tidegate_services::State;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at};

/// Poll interval of the paths of adopted namespaces.
const ADOPTED_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Poll interval of objects without change notifications.
const SILENT_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Number of endpoints whose sysctls are read in one poll. Each takes about 20 µs.
const ENDPOINTS_PER_POLL: usize = 64;

/// Poll interval of firewall rules without change notifications.
const RULES_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Number of [`ADOPTED_POLL_INTERVAL`]s between two reads of the default routes (if the kernel
/// publishes ports) and of DOCKER-USER (if legacy iptables is in use). Legacy rules take two runs
/// of iptables-save.
const SLOW_POLL_TICKS: u32 = 5;

/// Maximum time that shutdown waits for cleanup in the namespaces of endpoints.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Result of work in the namespace of an endpoint.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The objects of published ports and of the DNS server were checked.
    Checked(Checked),
    /// An attempt to relocate the ports and the DNS server to the endpoint's new namespace.
    Attached {
        /// Whether the ports were relocated.
        relocated: Result<(), Problem>,
        /// The new DNS server, or the previous one if the ports were not relocated.
        serving: anyhow::Result<Option<Serving>>,
    },
    /// An attempt to start the DNS server.
    Served(anyhow::Result<Serving>),
    /// The DNS server was closed.
    Ended,
}

/// Result of a check of the objects that are not [facts](tidegate_netsetup) of the setup: those of
/// published ports and of the DNS server.
#[derive(Debug)]
pub(super) struct Checked {
    /// Result of the preceding check of the endpoint's facts.
    facts: Check,
    /// The DNS server, which was borrowed for the check.
    serving: Option<Serving>,
    restored: Vec<(RepairKind, String)>,
    failed: Option<anyhow::Error>,
}

/// An endpoint that is attached to a new namespace and whose ports are being relocated.
#[derive(Debug)]
pub(super) struct Attaching {
    path: PathBuf,
    namespace: Namespace,
    /// Receives the result, if an API client requested the attachment.
    done: Option<oneshot::Sender<Result<(), Problem>>>,
}

/// The source of changes of firewall rules.
enum RuleChanges {
    /// None: changes are not observed.
    Unobserved,
    /// Notifications of the kernel.
    Notified(AsyncFd<ChangeListener>),
    /// Comparison of the rules every [`RULES_POLL_INTERVAL`].
    Polled,
}

impl RuleChanges {
    /// Returns the notifications of the kernel about rules of all software on `host`.
    fn of_host(host: &Namespace) -> io::Result<Self> {
        Self::notified(host.with(ChangeListener::of_rules)??)
    }

    fn notified(changes: ChangeListener) -> io::Result<Self> {
        // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
        Ok(Self::Notified(unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?))
    }

    fn of(firewall: &Firewall) -> io::Result<Self> {
        let Some(changes) = firewall.changes()? else { return Ok(Self::Polled) };
        Self::notified(changes)
    }

    /// Waits until rules have changed or, without notifications, until they have to be read.
    async fn changed(&self) {
        match self {
            Self::Unobserved => std::future::pending().await,
            Self::Polled => tokio::time::sleep(RULES_POLL_INTERVAL).await,
            Self::Notified(listener) => {
                if let Ok(mut changed) = listener.readable().await {
                    changed.get_inner().drain();
                    changed.clear_ready();
                }
            }
        }
    }
}

impl Instance {
    /// Runs until all services have ended or a signal arrives. Returns whether every service ended
    /// successfully, or true after a signal.
    pub(super) async fn supervise(
        &mut self,
        signals: &mut Signals,
        manager: &ServiceManager,
    ) -> bool {
        let rules = match &self.chosen.firewall {
            Some(firewall) => RuleChanges::of(firewall).unwrap_or_else(|error| {
                tracing::warn!(%error, "no notifications of firewall changes; rules are polled");
                RuleChanges::Polled
            }),
            // For reports of DOCKER-USER rules that published ports bypass.
            None => RuleChanges::of_host(&self.host).unwrap_or(RuleChanges::Unobserved),
        };
        let has_services = !self.up.supervisor.statuses().is_empty();
        let mut ticks = interval(ADOPTED_POLL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = interval(SILENT_POLL_INTERVAL);
        silent.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The endpoint whose sysctls were read last.
        let mut last_polled = String::new();
        let mut rules_changed = false;
        let mut ticked = 0;
        // The reported rules of DOCKER-USER. Each is reported once.
        let mut reported = BTreeSet::new();
        let mut mark_setters = BTreeSet::new();
        // Chains that exist at startup are reported too.
        self.report_mark_setters(&mut mark_setters);
        loop {
            tokio::select! {
                changed = self.changes.readable(), if !self.schedule.awaits_host() => {
                    let has_changed = changed.is_ok_and(|mut changed| {
                        let has_changed = changed.get_inner().drain();
                        changed.clear_ready();
                        has_changed
                    });
                    if has_changed {
                        self.schedule.host_changed(Instant::now());
                    }
                },
                () = outside_changed(self.outside.as_ref()), if !self.schedule.awaits_host() => {
                    self.schedule.host_changed(Instant::now());
                },
                () = rules.changed(), if !self.schedule.awaits_host() => {
                    self.schedule.host_changed(Instant::now());
                    rules_changed = true;
                },
                names = self.watch.changed() => {
                    for name in names {
                        self.schedule.endpoint_changed(name, Instant::now());
                    }
                },
                () = sleep_until(self.schedule.next().unwrap_or_else(Instant::now)), if self.schedule.next().is_some() => {
                    self.repair().await;
                },
                progress = self.work.next() => self.note_progress(progress),
                _ = silent.tick() => self.poll_silent_changes(&mut last_polled).await,
                ended = self.up.supervisor.wait(), if has_services => return ended.success(),
                ends = signals.any() => {
                    if ends {
                        return true;
                    }
                    self.check_everything(manager).await;
                },
                Some(order) = self.orders.recv() => self.execute_order(order).await,
                () = self.member.changed() => self.follow_cluster().await,
                Ok(()) = self.up.resolvers.changed() => {
                    let resolvers = Arc::clone(&self.up.resolvers.borrow_and_update());
                    if let Some(egress) = &mut self.up.egress {
                        egress.set_resolvers(&resolvers);
                    }
                },
                _ = ticks.tick() => {
                    // The kernel sends no notifications about legacy rules, and `Topic::Routes`
                    // does not cover the default routes of other software.
                    ticked = (ticked + 1) % SLOW_POLL_TICKS;
                    if ticked == 0 && self.up.publisher.translates() {
                        self.schedule.host_changed(Instant::now());
                    }
                    rules_changed |= ticked == 0 && !self.rootless && Firewall::legacy_is_in_use(&self.host);
                    if std::mem::take(&mut rules_changed) {
                        self.enforce_docker_user(&mut reported).await;
                        self.report_mark_setters(&mut mark_setters);
                    }
                    if let Some(firewall) = &self.chosen.firewall {
                        if matches!(rules, RuleChanges::Notified(_)) && !self.schedule.awaits_host() {
                            firewall.note_unchanged(SystemTime::now());
                        }
                        if let Err(error) = firewall.record_fingerprint() {
                            tracing::debug!(%error, "firewall rules cannot be read");
                        }
                    }
                    self.poll_adopted().await;
                    self.restart_mesh().await;
                    self.follow_services(true).await;
                },
            }
        }
    }

    /// Watches the namespaces of all endpoints.
    pub(super) fn watch_endpoints(&mut self) {
        for endpoint in &self.up.layout.desired.endpoints {
            let Some(namespace) = self.up.publisher.namespace(&endpoint.name) else { continue };
            watch(&mut self.watch, &endpoint.name, &namespace);
        }
    }

    /// Returns whether the namespace of `endpoint` is in use. That of an ended container is not
    /// repaired.
    fn is_in_use(&self, endpoint: &str) -> bool {
        if self.up.adopted.get(endpoint).is_some_and(|(_, gone)| gone) {
            return false;
        }
        let statuses = self.up.supervisor.statuses();
        let status = statuses.iter().find(|status| status.name == endpoint);
        !status.is_some_and(|status| matches!(status.state, State::Ended(_)))
    }

    /// Checks objects without change notifications: those of the host, and of the next
    /// [`ENDPOINTS_PER_POLL`] endpoints after `last`.
    async fn poll_silent_changes(&mut self, last: &mut String) {
        let endpoints = &self.up.layout.desired.endpoints;
        let mut names: Vec<String> =
            endpoints.iter().map(|endpoint| endpoint.name.clone()).collect();
        if names.len() > ENDPOINTS_PER_POLL {
            names.sort_unstable();
            let next = names.partition_point(|name| *name <= *last) % names.len();
            names.rotate_left(next);
            names.truncate(ENDPOINTS_PER_POLL);
            if let Some(name) = names.last() {
                last.clone_from(name);
            }
        }
        names.retain(|name| self.is_in_use(name));
        for name in &names {
            let namespace = self.up.publisher.namespace(name);
            if namespace.is_some_and(|namespace| !policy_route_sysctls_hold(namespace.id())) {
                self.schedule.endpoint_changed(name.clone(), Instant::now());
            }
        }
        let names = names.into_iter().collect();
        match self.setup.unannounced_changes(&self.up.layout.desired, &names).await {
            Ok(places) => {
                for place in places {
                    match place {
                        Place::Host => self.schedule.host_changed(Instant::now()),
                        Place::Endpoint(name) => {
                            self.schedule.endpoint_changed(name, Instant::now());
                        }
                    }
                }
            }
            Err(error) => tracing::debug!(%error, "programs and sysctls cannot be observed"),
        }
    }

    /// Reports new chains that run after ours and can change the packet mark of the gates. `known`
    /// holds the chains that were reported.
    fn report_mark_setters(&self, known: &mut BTreeSet<String>) {
        let setters = self.chosen.firewall.as_ref().map(|firewall| firewall.mark_setters_behind());
        let setters = match setters.transpose() {
            Ok(setters) => setters.unwrap_or_default().into_iter().collect(),
            Err(error) => return tracing::debug!(%error, "chains that set packet marks unknown"),
        };
        for chain in BTreeSet::difference(&setters, known) {
            tracing::warn!(
                chain,
                "chain may change the packet mark that lets traffic into networks; use --firewall=nftables if \
                 containers lose connectivity"
            );
        }
        *known = setters;
    }

    /// Enforces the rules of DOCKER-USER that published ports bypass: switches the ports from the
    /// proxy to the kernel. Ports that the kernel cannot publish stay with the proxy and are
    /// reported, each once per rule (`reported`).
    async fn enforce_docker_user(&self, reported: &mut BTreeSet<String>) {
        let kind = self.chosen.firewall.as_ref().map(|firewall| firewall.kind());
        let (host, publisher) = (self.host.clone(), Arc::clone(&self.up.publisher));
        // On another thread: reading legacy rules runs programs.
        let enforce = move || -> Result<_, PublishError> {
            let bypassed = BypassedRules::observe(kind, &host).map_err(PublishError::DockerUser)?;
            let (changed, left) = publisher.enforce(&bypassed)?;
            Ok((changed, left, bypassed))
        };
        let (changed, left, bypassed) = match tokio::task::spawn_blocking(enforce).await {
            Ok(Ok(enforced)) => enforced,
            Ok(Err(error)) => return tracing::warn!(%error, "DOCKER-USER rules not enforced"),
            Err(_) => return,
        };
        if changed && let Some(rule) = bypassed.any() {
            tracing::warn!(
                rule,
                "DOCKER-USER rule does not reach sockets; ports are published by the kernel from now on"
            );
        }
        let known = std::mem::take(reported);
        for (publish, rule) in left {
            let bypass = format!("{publish} {rule}");
            if !known.contains(&bypass) {
                tracing::warn!(
                    %publish,
                    rule,
                    "published port bypasses DOCKER-USER rule; restart with --firewall=iptables to enforce it"
                );
            }
            reported.insert(bypass);
        }
    }

    /// Checks the host and all endpoints at once, without waiting for a notification, and restores
    /// missing objects. For an operator (`systemctl reload`).
    async fn check_everything(&mut self, manager: &ServiceManager) {
        manager.notify_reloading();
        let endpoints = &self.up.layout.desired.endpoints;
        let endpoints = endpoints.iter().map(|endpoint| endpoint.name.clone()).collect();
        let restored = self.repair_at(true, endpoints).await;
        self.poll_adopted().await;
        tracing::info!(restored, "networks, endpoints and ports checked");
        manager.notify_ready();
    }

    /// Restores missing objects at the places that are due.
    async fn repair(&mut self) {
        let (host, endpoints) = self.schedule.take(Instant::now());
        self.repair_at(host, endpoints).await;
    }

    /// Restores missing objects on the host and of `endpoints`. Returns their number.
    async fn repair_at(&mut self, host: bool, mut endpoints: BTreeSet<String>) -> usize {
        let begun = Instant::now();
        endpoints.retain(|name| self.is_in_use(name));
        if host {
            // Before the repair, so that access checks know which bridges are missing. They would
            // take clients on a new bridge for external ones otherwise.
            self.update_bridge_indexes();
        }
        let mut repaired = self.restore(host, &endpoints).await;
        if !repaired.failed.is_empty() {
            // The kernel still lists a link that is being deleted, but rejects changes to it.
            tokio::time::sleep(SETTLE).await;
            let failed: BTreeSet<_> =
                repaired.failed.iter().map(|(endpoint, _)| endpoint.clone()).collect();
            let endpoints = failed.iter().flatten().cloned().collect();
            let again = self.restore(failed.contains(&None), &endpoints).await;
            repaired.restored.extend(again.restored);
            repaired.failed = again.failed;
            repaired.detached.extend(again.detached);
        }
        let now = Instant::now();
        for name in std::mem::take(&mut repaired.detached) {
            self.schedule.endpoint_changed(name, now);
        }
        if host {
            self.update_bridge_indexes();
            if self.schedule.host_checked(found(&repaired, None), now - begun, now) {
                tracing::warn!(
                    "objects on the host are removed repeatedly; repairs limited to five per second"
                );
            }
        }
        for endpoint in &endpoints {
            match found(&repaired, Some(endpoint)) {
                Check::Failed => self.note_check(endpoint, Check::Failed),
                facts => self.start_service_check(endpoint, facts),
            }
        }
        for fact in &repaired.restored {
            let kind = RepairKind::of(fact);
            self.repairs.count(kind);
            tracing::warn!(
                kind = kind.as_str(),
                object = %fact,
                endpoint = fact.endpoint(),
                "removed or changed by other software; restored"
            );
        }
        for (endpoint, error) in &repaired.failed {
            self.repairs.failed.increment(1);
            tracing::error!(endpoint, %error, "removed or changed by other software; not restored");
        }
        repaired.restored.len()
    }

    /// Records the result of a check of `endpoint`.
    fn note_check(&mut self, endpoint: &str, found: Check) {
        if self.schedule.endpoint_checked(endpoint, found, Instant::now()) {
            tracing::warn!(
                endpoint,
                "objects of the endpoint are removed repeatedly; repairs back off"
            );
        }
    }

    /// Starts a check of the objects that published ports and the DNS server have in the namespace
    /// of `endpoint`. `facts` is the result of the check of its facts.
    fn start_service_check(&mut self, endpoint: &str, facts: Check) {
        let Some(namespace) = self.up.publisher.namespace(endpoint) else {
            return self.note_check(endpoint, facts);
        };
        let (name, serving) = (endpoint.to_owned(), self.up.names.lend(endpoint));
        self.start_work(endpoint, move || {
            Outcome::Checked(check_services(&name, namespace.id(), facts, serving))
        });
    }

    /// Starts `work` in the namespace of `endpoint`, which is not repaired until that is done.
    pub(super) fn start_work(
        &mut self,
        endpoint: &str,
        work: impl FnOnce() -> Outcome + Send + 'static,
    ) {
        self.schedule.hold(endpoint);
        self.work.start(endpoint, work);
    }

    pub(super) fn note_progress(&mut self, progress: Progress<Outcome>) {
        let (endpoint, outcome) = match progress {
            Progress::Overdue { endpoint } => return warn_of_slow_namespace(&endpoint),
            Progress::Done { endpoint, outcome } => (endpoint, outcome),
        };
        self.schedule.release(&endpoint);
        match outcome {
            Outcome::Checked(checked) => self.note_checked(&endpoint, checked),
            Outcome::Attached { relocated, serving } => {
                self.note_attached(&endpoint, relocated, serving);
            }
            Outcome::Served(Ok(serving)) => {
                self.up.names.give_back(&endpoint, serving);
                self.note_health(endpoint, None);
            }
            Outcome::Served(Err(error)) => self.note_health(endpoint, Some(format!("{error:#}"))),
            Outcome::Ended => {}
        }
    }

    /// Records the result of [`Self::start_service_check`].
    fn note_checked(&mut self, endpoint: &str, checked: Checked) {
        let Checked { facts, serving, restored, failed } = checked;
        if let Some(serving) = serving {
            self.up.names.give_back(endpoint, serving);
        }
        for (kind, object) in &restored {
            self.repairs.count(*kind);
            tracing::warn!(
                kind = kind.as_str(),
                object,
                endpoint,
                "removed or changed by other software; restored"
            );
        }
        let found = match &failed {
            Some(error) => {
                self.repairs.failed.increment(1);
                tracing::error!(
                    endpoint,
                    "removed or changed by other software; not restored: {error:#}"
                );
                Check::Failed
            }
            None if restored.is_empty() => facts,
            None => Check::Restored,
        };
        self.note_check(endpoint, found);
    }

    /// Reads the index of each bridge again. ACLs contain these indexes, and the sockets of DNS
    /// servers at gateways are bound to them.
    fn update_bridge_indexes(&mut self) {
        let indexes = match bridge_indexes(&self.up.layout, &self.host) {
            Ok(indexes) => indexes,
            Err(error) => {
                tracing::warn!(%error, "bridge indexes unknown; ACLs unchanged");
                return;
            }
        };
        self.up.names.resolver().set_bridges(indexes.values().copied());
        for network in self.up.gateway_networks.set_bridges(&indexes) {
            if let Err(error) = self.up.names.serve_at_gateways_again(&network) {
                tracing::warn!(network, "no DNS server at the gateway: {error:#}");
            }
        }
    }

    /// Restores missing objects of `endpoints`, and of the host if `host` is set.
    async fn restore(&mut self, host: bool, endpoints: &BTreeSet<String>) -> Repaired {
        let adapted = if host { self.adapt_to_host().await } else { Ok(()) };
        let mut repaired = self.setup.repair(&self.up.layout.desired, host, endpoints).await;
        repaired.failed.extend(adapted.err().map(|error| (None, error)));
        repaired
    }

    /// Adapts the networks to changed links, routes and rules of other software.
    async fn adapt_to_host(&mut self) -> Result<(), SetupError> {
        let observed = self.setup.surroundings().await?;
        self.up.gateway_networks.set_foreign_networks(foreign_networks(&observed));
        let desired = &mut self.up.layout.desired;
        let ahead = rules_ahead(&observed);
        if ahead != desired.rules_ahead {
            desired.rules_ahead = ahead;
            tracing::info!(
                rules_of_others = observed.first_rule_of_others,
                "policy rules moved ahead of those of other software"
            );
            self.setup.change(desired).await?;
        }
        let preceding_rule = preceding_rule(&observed, self.chosen.firewall.as_ref());
        if let Some(priority) = preceding_rule.filter(|_| preceding_rule != self.up.preceding_rule)
        {
            warn_of_preceding_rule(priority);
        }
        self.up.preceding_rule = preceding_rule;
        if desired.guarded_links.as_ref().is_some_and(|links| *links != observed.receivers) {
            // Not a repair: another link was added or removed.
            desired.guarded_links = Some(observed.receivers.clone());
            self.setup.guard_links(desired).await?;
        }
        if let Some(firewall) = &self.chosen.firewall {
            let uplinks = uplinks(&observed, desired);
            let reply_paths = if self.up.publisher.translates() {
                reply_paths(&observed, &self.project)
            } else {
                Vec::new()
            };
            let bridges = foreign_bridges(&observed, desired);
            let rules_change = firewall.set_uplinks(&uplinks, bridges);
            if rules_change || uplinks != desired.uplinks || reply_paths != desired.reply_paths {
                // The host has a new uplink or forwards by itself now. An update, not a repair:
                // our objects are unmodified.
                (desired.uplinks, desired.reply_paths) = (uplinks, reply_paths);
                firewall.set_reply_paths(&desired.reply_paths);
                self.setup.update(desired).await?;
            }
        }
        if let Some(egress) = &mut self.up.egress {
            // Other software may have added container networks, to which the engine denies access.
            let mut observed = observed;
            if let Some(outside) = &mut self.outside {
                outside.add_to(&mut observed).await?;
            }
            egress.update_policy(&self.up.layout, &observed);
        }
        Ok(())
    }

    async fn execute_order(&mut self, order: Order) {
        match order {
            Order::Reattach { endpoint, netns, done } => {
                if let Some(attached) = self.attach_at(&endpoint, &netns).await {
                    let _ = done.send(attached);
                    return;
                }
                match self.namespace_to_attach(&endpoint, &netns) {
                    Ok(namespace) => {
                        self.reattach(&endpoint, netns, namespace, Some(done)).await;
                    }
                    // The receiver is gone if the client has disconnected.
                    Err(problem) => drop(done.send(Err(problem))),
                }
            }
            Order::Command { command: tidegate_control::Command::Detach(name), reserved, done } => {
                let Some(done) = self.drain(&name, done).await else { return };
                let command = tidegate_control::Command::Detach(name);
                let result = self.command(&command, reserved).await;
                let _ = done.send(result);
            }
            Order::Drained { endpoint, done } => {
                let result = self.drained(&endpoint).await;
                let _ = done.send(result);
            }
            Order::Command { command, reserved, done } => {
                let result = self.command(&command, reserved).await;
                let _ = done.send(result);
            }
            Order::CreateOverlay { spec, done } => {
                let result = self.create_overlay(spec).await;
                let _ = done.send(result);
            }
            Order::Join { membership, done } => {
                let result = self.join(membership).await;
                let _ = done.send(result);
            }
            Order::Leave { force, done } => {
                let result = self.leave_mesh(force).await;
                let _ = done.send(result);
            }
            Order::CreateService { name, service, done } => {
                let result = self.create_service(&name, service).await;
                let _ = done.send(result);
            }
            Order::RemoveService { name, done } => {
                let result = self.remove_service(&name).await;
                let _ = done.send(result);
            }
            Order::ScaleService { name, replicas, done } => {
                let result = self.scale_service(&name, replicas).await;
                let _ = done.send(result);
            }
            Order::Services { done } => drop(done.send(self.service_reports())),
            Order::RemoveHost { host, done } => {
                let result = self.remove_host(&host).await;
                let _ = done.send(result);
            }
            Order::MeshReport { done } => {
                let result = self.mesh_report().await;
                let _ = done.send(result);
            }
        }
    }

    /// Opens the namespace at `netns` for attaching `endpoint`.
    ///
    /// # Errors
    /// There is no such endpoint or namespace, the endpoint is not adopted, or it is being attached
    /// already.
    fn namespace_to_attach(&self, endpoint: &str, netns: &Path) -> Result<Namespace, Problem> {
        if self.up.adopted.get(endpoint).is_none() {
            let known = self.up.layout.desired.endpoints.iter().any(|one| one.name == endpoint);
            return Err(if known {
                Problem::conflict(&format!(
                    "endpoint {endpoint:?} is in a namespace that tidegate created; only adopted ones (x-netns) can be re-attached"
                ))
            } else {
                Problem::not_found(&format!("there is no endpoint {endpoint:?}"))
            });
        }
        if self.attaching.contains_key(endpoint) {
            return Err(Problem::conflict(&format!(
                "endpoint {endpoint:?} is being attached already; its network namespace answers slowly"
            )));
        }
        Namespace::from_path(netns).map_err(|error| Problem::bad_request(&error))
    }

    /// Attaches `endpoint` to `namespace`, which is at `path`, and starts relocating its ports.
    /// `done` receives the result.
    async fn reattach(
        &mut self,
        endpoint: &str,
        path: PathBuf,
        namespace: Namespace,
        done: Option<oneshot::Sender<Result<(), Problem>>>,
    ) {
        let attached =
            self.setup.reattach(&self.up.layout.desired, endpoint, namespace.clone()).await;
        let attached = attached.map_err(|error| match error {
            SetupError::Conflict(_) => Problem::conflict(&error),
            error => Problem::failed(&error),
        });
        if let Err(problem) = attached {
            return self.note_failed_attachment(endpoint, problem, done);
        }
        // Recorded before its ports are relocated, so that the next poll retries with this path if
        // that fails. An endpoint that was reported as gone stays so until its ports accept
        // connections.
        let gone = self.up.adopted.get(endpoint).is_some_and(|(_, gone)| gone);
        self.up.adopted.set(endpoint, path.clone(), gone);
        // Running work is a check of the previous namespace.
        self.work.abandon(endpoint);
        let old = self.up.publisher.namespace(endpoint).map(|namespace| namespace.id());
        let server_ends_first = old == Some(namespace.id());
        let desired = self.up.layout.desired.endpoints.iter().find(|one| one.name == endpoint);
        if let Some(desired) = desired.filter(|_| !server_ends_first).cloned()
            && let Err(problem) = self.end_flows_of(&desired).await
        {
            tracing::warn!(endpoint, error = %problem, "flows of the previous namespace not ended");
        }
        let (name, there) = (endpoint.to_owned(), namespace.clone());
        let addresses = self.up.layout.addresses.get(endpoint).cloned().unwrap_or_default();
        let (publisher, serving) = (Arc::clone(&self.up.publisher), self.up.names.lend(endpoint));
        let server = self.up.names.new_server(endpoint, &namespace);
        self.attaching.insert(endpoint.to_owned(), Attaching { path, namespace, done });
        self.start_work(endpoint, move || {
            if let Err(error) = publisher.relocate(&name, &there, &addresses) {
                return Outcome::Attached { relocated: Err(error.into()), serving: Ok(serving) };
            }
            if server_ends_first {
                drop(serving);
            } else {
                // Closing it changes nftables of the old namespace, which can block.
                drop_in_background(serving);
            }
            let serving = server.map(NewServer::start).transpose();
            Outcome::Attached { relocated: Ok(()), serving }
        });
    }

    /// Records the result of relocating the ports and the DNS server of `endpoint`.
    fn note_attached(
        &mut self,
        endpoint: &str,
        relocated: Result<(), Problem>,
        serving: anyhow::Result<Option<Serving>>,
    ) {
        match serving {
            Ok(Some(serving)) => self.up.names.give_back(endpoint, serving),
            Ok(None) => {}
            Err(error) => tracing::warn!(endpoint, "{error:#}"),
        }
        let Some(Attaching { path, namespace, done }) = self.attaching.remove(endpoint) else {
            return;
        };
        if let Err(problem) = relocated {
            return self.note_failed_attachment(endpoint, problem, done);
        }
        self.up.adopted.set(endpoint, path.clone(), false);
        let recorded = self.record_path(endpoint, &path);
        watch(&mut self.watch, endpoint, &namespace);
        tracing::info!(endpoint, path = %path.display(), namespace = %namespace.id(), "re-attached");
        self.note_health(endpoint.to_owned(), None);
        match (recorded, done) {
            (recorded, Some(done)) => drop(done.send(recorded)),
            (Err(problem), None) => tracing::error!(endpoint, "{problem}"),
            (Ok(()), None) => {}
        }
    }

    /// Reports a failed attachment of `endpoint`: to the API client that requested it, else to the
    /// log.
    fn note_failed_attachment(
        &mut self,
        endpoint: &str,
        problem: Problem,
        done: Option<oneshot::Sender<Result<(), Problem>>>,
    ) {
        match done {
            Some(done) => drop(done.send(Err(problem))),
            None => self.note_health(endpoint.to_owned(), Some(problem.to_string())),
        }
    }

    /// Records the health of `endpoint`: `None`, or the problem of its container. A problem is
    /// logged once, not with every poll.
    pub(super) fn note_health(&mut self, endpoint: String, unhealthy: Option<String>) {
        match unhealthy {
            None => drop(self.unhealthy.remove(&endpoint)),
            Some(reason) if self.unhealthy.get(&endpoint) == Some(&reason) => {}
            Some(reason) => {
                tracing::warn!(endpoint, "endpoint unhealthy: {reason}");
                self.unhealthy.insert(endpoint, reason);
            }
        }
    }

    /// Polls the paths of adopted namespaces. Re-attaches endpoints whose containers were restarted
    /// and starts missing DNS servers.
    async fn poll_adopted(&mut self) {
        self.attach_absent().await;
        for (endpoint, path) in self.up.adopted.paths() {
            if self.attaching.contains_key(&endpoint) {
                continue;
            }
            let Some(known) = self.up.publisher.namespace(&endpoint) else { continue };
            match replacement(&path, known.id()) {
                Ok(None) => {
                    self.up.adopted.set(&endpoint, path, false);
                    if self.work.is_busy(&endpoint) {
                        continue;
                    }
                    // The last attempt may have failed: address in use, or no descriptor left.
                    let server = self.up.names.new_server(&endpoint, &known);
                    match server.filter(|_| !self.up.names.serves(&endpoint)) {
                        Some(server) => {
                            self.start_work(&endpoint, || Outcome::Served(server.start()));
                        }
                        None => self.note_health(endpoint, None),
                    }
                }
                Ok(Some(namespace)) => self.reattach(&endpoint, path, namespace, None).await,
                Err(reason) => {
                    self.up.adopted.set(&endpoint, path, true);
                    self.note_health(endpoint, Some(reason));
                }
            }
        }
    }
}

/// Waits for a change of `outside`.
async fn outside_changed(outside: Option<&Outside>) {
    let Some(outside) = outside else { return std::future::pending().await };
    if let Ok(mut changed) = outside.changes.readable().await {
        changed.get_inner().drain();
        changed.clear_ready();
    }
}

/// Restores the objects of published ports and of the DNS server in `namespace`, that of
/// `endpoint`: an nftables table, and policy routes with their sysctls.
fn check_services(
    endpoint: &str,
    namespace: NamespaceId,
    facts: Check,
    mut serving: Option<Serving>,
) -> Checked {
    let mut restored = Vec::new();
    let mut restore = || -> anyhow::Result<()> {
        if let Some(serving) = &mut serving {
            let repaired = serving.repair();
            if repaired.with_context(|| format!("DNS of container {endpoint:?}"))? {
                let table = "nftables table that redirects to the DNS server";
                restored.push((RepairKind::Dns, table.to_owned()));
            }
        }
        for object in repair_policy_routes(namespace)? {
            restored.push(match object {
                Restored::Route(route) => (RepairKind::Route, route),
                Restored::Rule(rule) => (RepairKind::Rule, rule),
                Restored::Sysctl(sysctl) => (RepairKind::Sysctl, sysctl),
            });
        }
        Ok(())
    };
    let failed = restore().err();
    Checked { facts, serving, restored, failed }
}

fn warn_of_slow_namespace(endpoint: &str) {
    tracing::warn!(
        endpoint,
        "network namespace responds slowly; repairs of this endpoint are delayed"
    );
}

/// Closes all servers of `names`, each on its own thread. Servers that `work` has borrowed are
/// closed once it is done. Gives up after [`CLEANUP_TIMEOUT`].
pub(super) async fn end_servers(mut work: EndpointWork<Outcome>, mut names: NameServers) {
    let end = |work: &mut EndpointWork<Outcome>, endpoint: &str, serving: Serving| {
        work.start(endpoint, || {
            drop(serving);
            Outcome::Ended
        });
    };
    for service in names.served() {
        if let Some(serving) = names.lend(&service) {
            end(&mut work, &service, serving);
        }
    }
    let until = Instant::now() + CLEANUP_TIMEOUT;
    while !work.is_idle() {
        match timeout_at(until, work.next()).await {
            Ok(Progress::Overdue { .. }) => {}
            Ok(Progress::Done { endpoint, outcome }) => {
                let serving = match outcome {
                    Outcome::Checked(checked) => checked.serving,
                    Outcome::Attached { serving, .. } => serving.ok().flatten(),
                    Outcome::Served(serving) => serving.ok(),
                    Outcome::Ended => None,
                };
                if let Some(serving) = serving {
                    end(&mut work, &endpoint, serving);
                }
            }
            Err(_) => {
                tracing::warn!(
                    "network namespaces of containers respond slowly; nftables tables that redirect to DNS were left there"
                );
                return;
            }
        }
    }
}

/// Watches `namespace` as that of `endpoint`.
pub(super) fn watch(watch: &mut EndpointWatch, endpoint: &str, namespace: &Namespace) {
    if let Err(error) = watch.watch(endpoint, namespace) {
        tracing::warn!(endpoint, %error, "endpoint's namespace not watched; removed objects are not restored");
    }
}

/// Returns the result for `endpoint`, or for the host if it is `None`.
fn found(repaired: &Repaired, endpoint: Option<&str>) -> Check {
    if repaired.failed.iter().any(|(failed, _)| failed.as_deref() == endpoint) {
        Check::Failed
    } else if repaired.restored.iter().any(|fact| fact.endpoint() == endpoint) {
        Check::Restored
    } else {
        Check::Sound
    }
}

/// Opens the namespace that has replaced `known` at `path`. `None` if `known` is still there.
///
/// # Errors
/// There is no namespace at `path`, or `path` is below `/proc` and its process has ended or changed
/// its network namespace.
fn replacement(path: &Path, known: NamespaceId) -> Result<Option<Namespace>, String> {
    // stat() is cheaper than opening the namespace.
    let current =
        fs::metadata(path).map(|file| NamespaceId { device: file.dev(), inode: file.ino() });
    if current.is_ok_and(|current| current == known) {
        return Ok(None);
    }
    if path.starts_with("/proc") {
        return Err(format!(
            "the process of {} has ended or changed its network namespace",
            path.display()
        ));
    }
    Namespace::from_path(path).map(Some).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replacement_is_found_except_below_proc() {
        let own = Namespace::current().unwrap();
        let other = NamespaceId { device: own.id().device, inode: 1 };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("box");
        assert!(replacement(&path, own.id()).unwrap_err().starts_with("no such namespace "));
        std::os::unix::fs::symlink(format!("/proc/{}/ns/net", std::process::id()), &path).unwrap();
        assert!(replacement(&path, own.id()).unwrap().is_none());
        assert_eq!(replacement(&path, other).unwrap().unwrap().id(), own.id());
        let of_a_process = format!("/proc/{}/ns/net", std::process::id());
        assert!(replacement(Path::new(&of_a_process), own.id()).unwrap().is_none());
        assert!(replacement(Path::new(&of_a_process), other).is_err(), "an unrelated process");
    }
}
