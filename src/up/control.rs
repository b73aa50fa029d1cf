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
use super::layout::foreign_networks;
use super::repair_schedule::{Check, RepairSchedule, SETTLE};
use super::{
    Instance, Signals, bridge_indexes, preceding_rule, reply_paths, rules_ahead, uplinks,
    warn_of_preceding_rule,
};
use crate::api::{Order, Problem};
use crate::firewall::BypassedRules;
use crate::publisher::PublishError;
use crate::services::State;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tidegate_netns::{
    ChangeListener, Namespace, NamespaceId, Restored, policy_route_sysctls_hold,
    repair_policy_routes,
};
use tidegate_netsetup::{Firewall, Place, RepairKind, Repaired, SetupError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

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
        // What was said last of an endpoint that could not be attached, so that it is not said
        // every second.
        let mut said = BTreeMap::new();
        let mut silent = interval(SILENT_CHANGES);
        silent.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The endpoint whose sysctls were read last.
        let mut looked_at = String::new();
        let mut schedule = RepairSchedule::new();
        let mut rules_changed = false;
        let mut ticked = 0;
        // The rules of DOCKER-USER that were reported, so that each is reported once.
        let mut reported = BTreeSet::new();
        let mut mark_setters = BTreeSet::new();
        // What is there already is reported too.
        self.look_at_marks(&mut mark_setters);
        loop {
            tokio::select! {
                changed = self.changes.readable(), if !schedule.awaits_host() => {
                    let has_changed = changed.is_ok_and(|mut changed| {
                        let has_changed = changed.get_inner().drain();
                        changed.clear_ready();
                        has_changed
                    });
                    if has_changed {
                        schedule.host_changed(Instant::now());
                    }
                },
                () = rules.changed(), if !schedule.awaits_host() => {
                    schedule.host_changed(Instant::now());
                    rules_changed = true;
                },
                names = self.watch.changed() => {
                    for name in names {
                        schedule.endpoint_changed(name, Instant::now());
                    }
                },
                () = sleep_until(schedule.next().unwrap_or_else(Instant::now)), if schedule.next().is_some() => {
                    self.repair(&mut schedule).await;
                },
                _ = silent.tick() => self.look_for_silent_changes(&mut schedule, &mut looked_at).await,
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
                        schedule.host_changed(Instant::now());
                    }
                    rules_changed |= ticked == 0 && !self.apart && Firewall::legacy_is_in_use(&self.host);
                    if std::mem::take(&mut rules_changed) {
                        self.look_at_docker_user(&mut reported).await;
                        self.look_at_marks(&mut mark_setters);
                    }
                    if let Some(Err(error)) = self.chosen.firewall.as_ref().map(|firewall| firewall.settle()) {
                        tracing::debug!(%error, "a look at the firewall's rules");
                    }
                    self.look_after_adopted(&mut said).await;
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
    async fn look_for_silent_changes(&mut self, schedule: &mut RepairSchedule, last: &mut String) {
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
                schedule.endpoint_changed(name.clone(), Instant::now());
            }
        }
        let names = names.into_iter().collect();
        match self.setup.changed_silently(&self.up.layout.desired, &names).await {
            Ok(places) => {
                for place in places {
                    match place {
                        Place::Host => schedule.host_changed(Instant::now()),
                        Place::Endpoint(name) => schedule.endpoint_changed(name, Instant::now()),
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
    async fn repair(&mut self, schedule: &mut RepairSchedule) {
        let (host, mut endpoints) = schedule.take(Instant::now());
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
            schedule.endpoint_changed(name, now);
        }
        if host {
            self.update_bridge_indexes();
            if schedule.host_checked(found(&repaired, None), now) {
                tracing::warn!(
                    "objects on the host are removed again and again; they are restored five times a second at most"
                );
            }
        }
        for endpoint in &endpoints {
            let mut found = found(&repaired, Some(endpoint));
            if found != Check::Failed {
                match self.restore_beyond_facts(endpoint) {
                    Ok(true) => found = Check::Restored,
                    Ok(false) => {}
                    Err(error) => {
                        found = Check::Failed;
                        self.repairs.failed.increment(1);
                        tracing::error!(
                            endpoint,
                            "removed or changed by other software; not restored: {error:#}"
                        );
                    }
                }
            }
            if schedule.endpoint_checked(endpoint, found, now) {
                tracing::warn!(
                    endpoint,
                    "objects of the endpoint are removed again and again; they are restored less and less often"
                );
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

    /// Restores what published ports and the DNS server have in the namespace of `endpoint`.
    /// Whether any of it was missing.
    fn restore_beyond_facts(&mut self, endpoint: &str) -> anyhow::Result<bool> {
        let Some(namespace) = self.up.publisher.namespace(endpoint) else { return Ok(false) };
        let mut restored: Vec<(RepairKind, String)> = Vec::new();
        if self.up.names.repair(endpoint)? {
            restored.push((
                RepairKind::Dns,
                "table of nftables that leads to the DNS server".to_owned(),
            ));
        }
        for object in repair_policy_routes(namespace.id())? {
            restored.push(match object {
                Restored::Route(route) => (RepairKind::Route, route),
                Restored::Rule(rule) => (RepairKind::Rule, rule),
                Restored::Sysctl(sysctl) => (RepairKind::Sysctl, sysctl),
            });
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
        Ok(!restored.is_empty())
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
        self.up.gateway_networks.set_others(foreign_networks(&observed));
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
            if uplinks != desired.uplinks || reply_paths != desired.reply_paths {
                // A new link, or the host has begun to forward: not our networks that someone has
                // changed.
                (desired.uplinks, desired.reply_paths) = (uplinks, reply_paths);
                firewall.set_uplinks(&desired.uplinks);
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
                let result = self.reattach_to(&endpoint, netns).await;
                // Who has gone meanwhile does not hear of it.
                let _ = done.send(result);
            }
        }
    }

    async fn reattach_to(&mut self, endpoint: &str, netns: PathBuf) -> Result<(), Problem> {
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
        let namespace =
            Namespace::from_path(&netns).map_err(|error| Problem::bad_request(&error))?;
        self.reattach(endpoint, netns, &namespace).await
    }

    /// Plugs `endpoint` into `namespace`, which is at `path`, and leads its ports there.
    async fn reattach(
        &mut self,
        endpoint: &str,
        path: PathBuf,
        namespace: &Namespace,
    ) -> Result<(), Problem> {
        let attached =
            self.setup.reattach(&self.up.layout.desired, endpoint, namespace.clone()).await;
        attached.map_err(|error| match error {
            SetupError::Conflict(_) => Problem::conflict(&error),
            error => Problem::failed(&error),
        })?;
        // Before its ports: should those not follow, the next look tries again, here.
        self.up.adopted.set(endpoint, path.clone(), false);
        let addresses =
            self.up.layout.addresses.get(endpoint).map(Vec::as_slice).unwrap_or_default();
        self.up.publisher.relocate(endpoint, namespace, addresses)?;
        if let Err(error) = self.up.names.serve(endpoint, namespace) {
            tracing::warn!(endpoint, "{error:#}");
        }
        watch(&mut self.watch, endpoint, namespace);
        tracing::info!(endpoint, path = %path.display(), namespace = %namespace.id(), "re-attached");
        Ok(())
    }

    /// Plugs those in again whose containers have come back.
    async fn look_after_adopted(&mut self, said: &mut BTreeMap<String, String>) {
        for (endpoint, path) in self.up.adopted.paths() {
            let Some(known) = self.up.publisher.namespace(&endpoint) else { continue };
            let failed = match look(&path, known.id()) {
                Ok(None) => {
                    self.up.adopted.set(&endpoint, path, false);
                    // Its server may have found the port taken, or no descriptor.
                    self.up
                        .names
                        .serve_if_unserved(&endpoint, &known)
                        .err()
                        .map(|error| format!("{error:#}"))
                }
                Ok(Some(namespace)) => self
                    .reattach(&endpoint, path, &namespace)
                    .await
                    .err()
                    .map(|problem| problem.to_string()),
                Err(reason) => {
                    self.up.adopted.set(&endpoint, path, true);
                    Some(reason)
                }
            };
            match failed {
                None => drop(said.remove(&endpoint)),
                Some(reason) if said.get(&endpoint) == Some(&reason) => {}
                Some(reason) => {
                    tracing::warn!(endpoint, "not all is well with its container: {reason}");
                    said.insert(endpoint, reason);
                }
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
