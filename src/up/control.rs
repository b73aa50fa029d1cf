//! While a project runs: its end is waited for, orders are carried out, and containers that come
//! back are re-attached.
//!
//! An adopted namespace is a container of somebody else's. When that is restarted, the path it was
//! adopted by leads to another namespace: that is looked for once a second, since nothing announces
//! it. The old namespace cannot be mistaken for a new one meanwhile, because our handle keeps it,
//! and with it its number.
//!
//! Other software removes objects of ours: a daemon that flushes policy rules when it starts
//! (systemd-networkd does with those it does not know) or that switches forwarding on everywhere
//! opens what is closed, and processes of a container can remove its addresses. The kernel
//! announces changes of links, addresses, routes, rules and nftables, on the host and in each
//! endpoint's namespace; programs and sysctls, of which it announces nothing, are looked at every
//! [`SILENT_CHANGES`]. What is missing is restored ([`repair_schedule`](super::repair_schedule)
//! says when), logged and counted.
//!
//! A path below `/proc` names a process and not a container. What it leads to once that process has
//! ended is a stranger's.

use super::endpoint_watch::EndpointWatch;
use super::endpoint_work::{EndpointWork, Progress};
use super::layout::foreign_networks;
use super::names::{NameServers, NewServer};
use super::repair_schedule::{Check, SETTLE};
use super::{
    Instance, Signals, bridge_indexes, foreign_bridges, preceding_rule, reply_paths, rules_ahead,
    uplinks, warn_of_preceding_rule,
};
use crate::api::{Order, Problem};
use crate::firewall::BypassedRules;
use crate::publisher::PublishError;
use crate::services::State;
use anyhow::Context;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tidegate_dns::Serving;
use tidegate_netns::{
    ChangeListener, Namespace, NamespaceId, Restored, drop_in_background,
    policy_route_sysctls_hold, repair_policy_routes,
};
use tidegate_netsetup::{Firewall, Place, RepairKind, Repaired, SetupError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout_at};

/// How often adopted namespaces are looked after.
const LOOK: Duration = Duration::from_secs(1);

/// How often that is looked at which the kernel announces to nobody.
const SILENT_CHANGES: Duration = Duration::from_millis(500);

/// Endpoints whose sysctls are read at a time, which takes the kernel some 20 µs for each.
const ENDPOINTS_AT_A_TIME: usize = 64;

/// How often rules are looked at where the kernel sends no word of changes.
const LOOK_AT_RULES: Duration = Duration::from_millis(200);

/// Every how many looks default routes are looked for where the kernel publishes, and DOCKER-USER
/// is read where the legacy variant of iptables is in use, which takes two runs of a program.
const LOOK_AT_LEGACY: u32 = 5;

/// Maximum time that shutdown waits for cleanup in the namespaces of endpoints.
const PARTING: Duration = Duration::from_secs(2);

/// What came of work in the namespace of an endpoint.
#[derive(Debug)]
pub(super) enum Outcome {
    /// What published ports and the DNS server have there was checked.
    Checked(Checked),
    /// Its ports, and unless that failed its DNS server, lead to the namespace that the endpoint
    /// was attached to.
    Attached {
        /// Whether its ports do.
        relocated: Result<(), Problem>,
        /// The server there; where ports could not be relocated, the one from before.
        serving: anyhow::Result<Option<Serving>>,
    },
    /// It has a DNS server, or not.
    Served(anyhow::Result<Serving>),
    /// Its DNS server has ended.
    Ended,
}

/// What a check beyond facts has found.
#[derive(Debug)]
pub(super) struct Checked {
    /// What the check of its facts had found.
    facts: Check,
    /// The server, which was lent for it.
    serving: Option<Serving>,
    restored: Vec<(RepairKind, String)>,
    failed: Option<anyhow::Error>,
}

/// An endpoint that was attached to a namespace, to which its ports do not lead yet.
#[derive(Debug)]
pub(super) struct Attaching {
    path: PathBuf,
    namespace: Namespace,
    /// Told what comes of it, if somebody has ordered it.
    done: Option<oneshot::Sender<Result<(), Problem>>>,
}

/// What tells that rules of the firewall have changed.
enum Rules {
    /// There are none.
    None,
    /// Word of the kernel's.
    Word(AsyncFd<ChangeListener>),
    /// Nothing does.
    Look,
}

impl Rules {
    /// What others do, if the kernel tells.
    fn heard_of(host: &Namespace) -> io::Result<Self> {
        Self::word(host.with(ChangeListener::of_rules)??)
    }

    fn word(changes: ChangeListener) -> io::Result<Self> {
        // SAFETY: its descriptor is its own, and the same for as long as it lives.
        Ok(Self::Word(unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?))
    }

    fn of(firewall: &Firewall) -> io::Result<Self> {
        let Some(changes) = firewall.changes()? else { return Ok(Self::Look) };
        Self::word(changes)
    }

    /// Returns when it is time to look.
    async fn changed(&self) {
        match self {
            Self::None => std::future::pending().await,
            Self::Look => tokio::time::sleep(LOOK_AT_RULES).await,
            Self::Word(word) => {
                if let Ok(mut changed) = word.readable().await {
                    changed.get_inner().drain();
                    changed.clear_ready();
                }
            }
        }
    }
}

impl Instance {
    /// Waits for the services to end, or a signal. Whether all is well.
    pub(super) async fn follow(&mut self, signals: &mut Signals) -> bool {
        let rules = match &self.chosen.firewall {
            Some(firewall) => Rules::of(firewall).unwrap_or_else(|error| {
                tracing::warn!(%error, "rules of the firewall that others remove are looked for now and then only");
                Rules::Look
            }),
            // Of those that ports pass by one is told.
            None => Rules::heard_of(&self.host).unwrap_or(Rules::None),
        };
        let has_services = !self.up.supervisor.statuses().is_empty();
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent = interval(SILENT_CHANGES);
        silent.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The endpoint whose sysctls were read last.
        let mut looked_at = String::new();
        let mut rules_changed = false;
        let mut ticked = 0;
        // The rules of DOCKER-USER that were reported, so that each is reported once.
        let mut reported = BTreeSet::new();
        let mut mark_setters = BTreeSet::new();
        // What is there already is reported too.
        self.look_at_marks(&mut mark_setters);
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
                _ = silent.tick() => self.look_for_silent_changes(&mut looked_at).await,
                ended = self.up.supervisor.wait(), if has_services => return ended.success(),
                () = signals.next() => return true,
                Some(order) = self.orders.recv() => self.carry_out(order).await,
                Ok(()) = self.up.resolvers.changed() => {
                    let resolvers = Arc::clone(&self.up.resolvers.borrow_and_update());
                    if let Some(egress) = &mut self.up.egress {
                        egress.set_resolvers(&resolvers);
                    }
                },
                _ = ticks.tick() => {
                    // The kernel sends no word of changes of legacy rules, and of routes none is
                    // heard.
                    ticked = (ticked + 1) % LOOK_AT_LEGACY;
                    if ticked == 0 && self.up.publisher.translates() {
                        self.schedule.host_changed(Instant::now());
                    }
                    rules_changed |= ticked == 0 && !self.apart && Firewall::legacy_is_in_use(&self.host);
                    if std::mem::take(&mut rules_changed) {
                        self.look_at_docker_user(&mut reported).await;
                        self.look_at_marks(&mut mark_setters);
                    }
                    if let Some(Err(error)) = self.chosen.firewall.as_ref().map(|firewall| firewall.record_fingerprint()) {
                        tracing::debug!(%error, "a look at the firewall's rules");
                    }
                    self.look_after_adopted().await;
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

    /// Whether the namespace of `endpoint` is in use: a container that has ended is not repaired.
    fn is_in_use(&self, endpoint: &str) -> bool {
        if self.up.adopted.get(endpoint).is_some_and(|(_, gone)| gone) {
            return false;
        }
        let statuses = self.up.supervisor.statuses();
        let status = statuses.iter().find(|status| status.name == endpoint);
        !status.is_some_and(|status| matches!(status.state, State::Ended(_)))
    }

    /// Looks at what the kernel announces to nobody. Of many endpoints, those that follow `last`
    /// are looked at.
    async fn look_for_silent_changes(&mut self, last: &mut String) {
        let endpoints = &self.up.layout.desired.endpoints;
        let mut names: Vec<String> =
            endpoints.iter().map(|endpoint| endpoint.name.clone()).collect();
        if names.len() > ENDPOINTS_AT_A_TIME {
            names.sort_unstable();
            let next = names.partition_point(|name| *name <= *last) % names.len();
            names.rotate_left(next);
            names.truncate(ENDPOINTS_AT_A_TIME);
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

    /// Rules have changed: reports chains, each once, that may change the mark of the gates behind
    /// ours.
    fn look_at_marks(&self, known: &mut BTreeSet<String>) {
        let setters = self.chosen.firewall.as_ref().map(|firewall| firewall.mark_setters_behind());
        let setters = match setters.transpose() {
            Ok(setters) => setters.unwrap_or_default().into_iter().collect(),
            Err(error) => return tracing::debug!(%error, "chains that set packet marks"),
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

    /// Rules have changed: has DOCKER-USER one that published ports bypass? Then the kernel
    /// publishes them from here on; what it cannot publish is reported, and goes on.
    async fn look_at_docker_user(&self, reported: &mut BTreeSet<String>) {
        let kind = self.chosen.firewall.as_ref().map(|firewall| firewall.kind());
        let (host, publisher) = (self.host.clone(), Arc::clone(&self.up.publisher));
        // Programs are asked, which take their time.
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

    /// Restores what is missing at the places that are due.
    async fn repair(&mut self) {
        let (host, mut endpoints) = self.schedule.take(Instant::now());
        endpoints.retain(|name| self.is_in_use(name));
        if host {
            // A bridge that is missing has to be known to be before it is made again: its members
            // would pass for outsiders otherwise.
            self.update_bridge_indexes();
        }
        let mut repaired = self.restore(host, &endpoints).await;
        if !repaired.failed.is_empty() {
            // A link about to go is still listed for a moment, and nothing can be put on it.
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
            if self.schedule.host_checked(found(&repaired, None), now) {
                tracing::warn!(
                    "objects on the host are removed again and again; they are restored five times a second at most"
                );
            }
        }
        for endpoint in &endpoints {
            match found(&repaired, Some(endpoint)) {
                Check::Failed => self.note_check(endpoint, Check::Failed),
                facts => self.begin_check_beyond_facts(endpoint, facts),
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
    }

    /// Notes what a check of `endpoint` has found.
    fn note_check(&mut self, endpoint: &str, found: Check) {
        if self.schedule.endpoint_checked(endpoint, found, Instant::now()) {
            tracing::warn!(
                endpoint,
                "objects of the endpoint are removed again and again; they are restored less and less often"
            );
        }
    }

    /// Begins to restore what published ports and the DNS server have in the namespace of
    /// `endpoint`, where a check of its facts has found `facts`.
    fn begin_check_beyond_facts(&mut self, endpoint: &str, facts: Check) {
        let Some(namespace) = self.up.publisher.namespace(endpoint) else {
            return self.note_check(endpoint, facts);
        };
        let (name, serving) = (endpoint.to_owned(), self.up.names.lend(endpoint));
        self.begin_work(endpoint, move || {
            Outcome::Checked(check_beyond_facts(&name, namespace.id(), facts, serving))
        });
    }

    /// Begins `work` in the namespace of `endpoint`, which is not repaired until that is done.
    fn begin_work(&mut self, endpoint: &str, work: impl FnOnce() -> Outcome + Send + 'static) {
        self.schedule.hold(endpoint);
        self.work.start(endpoint, work);
    }

    fn note_progress(&mut self, progress: Progress<Outcome>) {
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

    /// Notes what a check of `endpoint` beyond facts has found.
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

    /// Notes which index each bridge has now: access lists depend on it, and DNS servers at
    /// gateways are bound to it.
    fn update_bridge_indexes(&mut self) {
        let indexes = match bridge_indexes(&self.up.layout, &self.host) {
            Ok(indexes) => indexes,
            Err(error) => {
                tracing::warn!(%error, "bridge indexes unknown; access lists unchanged");
                return;
            }
        };
        self.up.names.resolver().set_bridges(indexes.values().copied());
        for network in self.up.gateway_networks.set_bridges(&indexes) {
            if let Err(error) = self.up.names.serve_at_gateways_again(&network, &self.host) {
                tracing::warn!(network, "no DNS server at the gateway: {error:#}");
            }
        }
    }

    /// Restores what is missing on the host, with `host`, and at `endpoints`.
    async fn restore(&mut self, host: bool, endpoints: &BTreeSet<String>) -> Repaired {
        let adapted = if host { self.adapt_to_host().await } else { Ok(()) };
        let mut repaired = self.setup.repair(&self.up.layout.desired, host, endpoints).await;
        repaired.failed.extend(adapted.err().map(|error| (None, error)));
        repaired
    }

    /// Adapts networks to links, routes and rules of others that have come and gone.
    async fn adapt_to_host(&mut self) -> Result<(), SetupError> {
        let observed = self.setup.surroundings().await?;
        self.up.gateway_networks.set_foreign_networks(foreign_networks(&observed));
        let desired = &mut self.up.layout.desired;
        let ahead = rules_ahead(&observed);
        if ahead != desired.rules_ahead {
            desired.rules_ahead = ahead;
            tracing::info!(
                rules_of_others = observed.first_rule_of_others,
                "policy rules moved, to precede those of others"
            );
            self.setup.change(desired).await?;
        }
        let preceding_rule = preceding_rule(&observed, self.chosen.firewall.as_ref());
        if let Some(priority) = preceding_rule.filter(|_| preceding_rule != self.up.preceding_rule)
        {
            warn_of_preceding_rule(priority);
        }
        self.up.preceding_rule = preceding_rule;
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
                // A new link, or the host has begun to forward: not our networks that someone has
                // changed.
                (desired.uplinks, desired.reply_paths) = (uplinks, reply_paths);
                firewall.set_reply_paths(&desired.reply_paths);
                self.setup.update(desired).await?;
            }
        }
        if let Some(egress) = self.up.egress.as_mut().filter(|_| !self.apart) {
            // Networks of others may have come.
            egress.look_again(&self.up.layout, &observed);
        }
        Ok(())
    }

    async fn carry_out(&mut self, order: Order) {
        match order {
            Order::Reattach { endpoint, netns, done } => {
                match self.namespace_to_attach(&endpoint, &netns) {
                    Ok(namespace) => {
                        self.reattach(&endpoint, netns, namespace, Some(done)).await;
                    }
                    // Who has gone meanwhile does not hear of it.
                    Err(problem) => drop(done.send(Err(problem))),
                }
            }
        }
    }

    /// The namespace at `netns`, if `endpoint` may be attached there.
    fn namespace_to_attach(&self, endpoint: &str, netns: &Path) -> Result<Namespace, Problem> {
        if self.up.adopted.get(endpoint).is_none() {
            let known = self.up.layout.desired.endpoints.iter().any(|one| one.name == endpoint);
            return Err(if known {
                Problem::conflict(&format!(
                    "endpoint {endpoint:?} is in a namespace that tidegate made; only adopted ones (x-netns) can be attached elsewhere"
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

    /// Attaches `endpoint` to `namespace`, which is at `path`, and starts to relocate its ports.
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
        // Before its ports are relocated: if that fails, the next check tries this path again. An
        // endpoint that was gone stays so until its ports answer.
        let gone = self.up.adopted.get(endpoint).is_some_and(|(_, gone)| gone);
        self.up.adopted.set(endpoint, path.clone(), gone);
        // What goes on is a check of the namespace that it has left.
        self.work.abandon(endpoint);
        let old = self.up.publisher.namespace(endpoint).map(|namespace| namespace.id());
        let server_ends_first = old == Some(namespace.id());
        let (name, there) = (endpoint.to_owned(), namespace.clone());
        let addresses = self.up.layout.addresses.get(endpoint).cloned().unwrap_or_default();
        let (publisher, serving) = (Arc::clone(&self.up.publisher), self.up.names.lend(endpoint));
        let server = self.up.names.new_server(endpoint, &namespace);
        self.attaching.insert(endpoint.to_owned(), Attaching { path, namespace, done });
        self.begin_work(endpoint, move || {
            if let Err(error) = publisher.relocate(&name, &there, &addresses) {
                return Outcome::Attached { relocated: Err(error.into()), serving: Ok(serving) };
            }
            if server_ends_first {
                drop(serving);
            } else {
                // In a namespace that may never answer.
                drop_in_background(serving);
            }
            let serving = server.map(NewServer::make).transpose();
            Outcome::Attached { relocated: Ok(()), serving }
        });
    }

    /// Notes that the ports of `endpoint` lead to the namespace that it was attached to, or not.
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
        watch(&mut self.watch, endpoint, &namespace);
        tracing::info!(endpoint, path = %path.display(), namespace = %namespace.id(), "re-attached");
        self.note_health(endpoint.to_owned(), None);
        if let Some(done) = done {
            let _ = done.send(Ok(()));
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

    /// Notes whether all is well with the container of `endpoint`. What is not is logged once, and
    /// not with every look.
    fn note_health(&mut self, endpoint: String, unhealthy: Option<String>) {
        match unhealthy {
            None => drop(self.unhealthy.remove(&endpoint)),
            Some(reason) if self.unhealthy.get(&endpoint) == Some(&reason) => {}
            Some(reason) => {
                tracing::warn!(endpoint, "not all is well with its container: {reason}");
                self.unhealthy.insert(endpoint, reason);
            }
        }
    }

    /// Plugs those in again whose containers have come back.
    async fn look_after_adopted(&mut self) {
        for (endpoint, path) in self.up.adopted.paths() {
            if self.attaching.contains_key(&endpoint) {
                continue;
            }
            let Some(known) = self.up.publisher.namespace(&endpoint) else { continue };
            match look(&path, known.id()) {
                Ok(None) => {
                    self.up.adopted.set(&endpoint, path, false);
                    if self.work.is_busy(&endpoint) {
                        continue;
                    }
                    // Its server may have found the port taken, or no descriptor.
                    let server = self.up.names.new_server(&endpoint, &known);
                    match server.filter(|_| !self.up.names.serves(&endpoint)) {
                        Some(server) => {
                            self.begin_work(&endpoint, || Outcome::Served(server.make()));
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

/// Restores what published ports and the DNS server have in `namespace`, that of `endpoint`.
fn check_beyond_facts(
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
                let table = "table of nftables that leads to the DNS server";
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
        "network namespace answers slowly; repairs of this endpoint are delayed, those of others are not"
    );
}

/// Ends all servers of `names`, each on a thread of its own, once the `work` that has some of them
/// is done. What takes longer than [`PARTING`] is left behind.
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
    let until = Instant::now() + PARTING;
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
                    "network namespaces of containers answer slowly; tables of nftables that lead to DNS are left there"
                );
                return;
            }
        }
    }
}

/// Watches `endpoint` in `namespace` from here on.
fn watch(watch: &mut EndpointWatch, endpoint: &str, namespace: &Namespace) {
    if let Err(error) = watch.watch(endpoint, namespace) {
        tracing::warn!(endpoint, %error, "objects removed in the endpoint's namespace are not noticed");
    }
}

/// What a check of a place, the host or an `endpoint`, has found.
fn found(repaired: &Repaired, endpoint: Option<&str>) -> Check {
    if repaired.failed.iter().any(|(failed, _)| failed.as_deref() == endpoint) {
        Check::Failed
    } else if repaired.restored.iter().any(|fact| fact.endpoint() == endpoint) {
        Check::Restored
    } else {
        Check::Sound
    }
}

/// What `path` leads to, unless it still is the namespace `known`.
///
/// # Errors
/// Why it leads to none that the container could have come back in.
fn look(path: &Path, known: NamespaceId) -> Result<Option<Namespace>, String> {
    // Without opening it, which is more work for everyone.
    let there =
        fs::metadata(path).map(|there| NamespaceId { device: there.dev(), inode: there.ino() });
    if there.is_ok_and(|there| there == known) {
        return Ok(None);
    }
    if path.starts_with("/proc") {
        return Err(format!("the process of {} is another one now, or none", path.display()));
    }
    Namespace::from_path(path).map(Some).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_where_it_did_or_elsewhere_or_nowhere() {
        let own = Namespace::current().unwrap();
        let other = NamespaceId { device: own.id().device, inode: 1 };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("box");
        assert!(look(&path, own.id()).unwrap_err().starts_with("no such namespace "));
        std::os::unix::fs::symlink(format!("/proc/{}/ns/net", std::process::id()), &path).unwrap();
        assert!(look(&path, own.id()).unwrap().is_none());
        assert_eq!(look(&path, other).unwrap().unwrap().id(), own.id());
        let of_a_process = format!("/proc/{}/ns/net", std::process::id());
        assert!(look(Path::new(&of_a_process), own.id()).unwrap().is_none());
        assert!(look(Path::new(&of_a_process), other).is_err(), "a stranger");
    }
}
