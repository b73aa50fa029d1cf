//! While a project runs: its end is waited for, orders are carried out, and containers that come back are plugged in again.
//!
//! An adopted namespace is a container of somebody else's. When that is restarted, the path it was adopted by leads to another namespace:
//! that is looked for once a second, since nothing announces it. The old namespace cannot be mistaken for a new one meanwhile, because
//! our handle keeps it, and with it its number.
//!
//! The host's networks are others' too: a daemon that flushes policy rules when it starts (systemd-networkd does with those it does not know), or one
//! that switches forwarding on everywhere, would open what is closed. So changes of rules, links and settings are listened for, and what is ours
//! is put back.
//!
//! A path below `/proc` names a process and not a container. What it leads to once that process has ended is a stranger's.

use super::{Instance, Signals, bridge_indexes, reply_paths, rules_ahead, uplinks};
use crate::api::{Order, Problem};
use crate::firewall::BypassedRules;
use crate::publisher::PublishError;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tidegate_netns::{Namespace, NamespaceId, News};
use tidegate_netsetup::{Firewall, SetupError};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// How often adopted namespaces are looked after.
const LOOK: Duration = Duration::from_secs(1);

/// How long what changes may go on changing before it is put right, so that a flush of many rules is one repair.
const SETTLE: Duration = Duration::from_millis(10);

/// The least time between two repairs, should someone insist.
const REPAIR_PAUSE: Duration = Duration::from_millis(100);

/// How often rules are looked at where the kernel sends no word of changes.
const LOOK_AT_RULES: Duration = Duration::from_millis(200);

/// Every how many looks default routes are looked for where the kernel publishes, and DOCKER-USER is read
/// where the legacy variant of iptables is in use, which takes two runs of a program.
const LOOK_AT_LEGACY: u32 = 5;

/// What tells that rules of the firewall have changed.
enum Rules {
    /// There are none.
    None,
    /// Word of the kernel's.
    Word(AsyncFd<News>),
    /// Nothing does.
    Look,
}

impl Rules {
    /// What others do, if the kernel tells.
    fn heard_of(host: &Namespace) -> io::Result<Self> {
        Self::word(host.with(News::of_rules)??)
    }

    fn word(news: News) -> io::Result<Self> {
        // SAFETY: its descriptor is its own, and the same for as long as it lives.
        Ok(Self::Word(unsafe { AsyncFd::register_with_interest(news, Interest::READABLE) }?))
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
        // What was said last of an endpoint that could not be plugged in, so that it is not said every second.
        let mut said = BTreeMap::new();
        let mut repair_at: Option<Instant> = None;
        let mut repaired = Instant::now() - REPAIR_PAUSE;
        let mut rules_changed = false;
        let mut ticked = 0;
        // The rules of DOCKER-USER that were reported, so that each is reported once.
        let mut reported = BTreeSet::new();
        let mut mark_setters = BTreeSet::new();
        // What is there already is reported too.
        self.look_at_marks(&mut mark_setters);
        loop {
            tokio::select! {
                changed = self.news.readable(), if repair_at.is_none() => {
                    if let Ok(mut changed) = changed {
                        changed.get_inner().drain();
                        changed.clear_ready();
                    }
                    repair_at = Some((Instant::now() + SETTLE).max(repaired + REPAIR_PAUSE));
                },
                () = rules.changed(), if repair_at.is_none() => {
                    repair_at = Some((Instant::now() + SETTLE).max(repaired + REPAIR_PAUSE));
                    rules_changed = true;
                },
                () = sleep_until(repair_at.unwrap_or(repaired)), if repair_at.is_some() => {
                    let done = self.repair().await;
                    repaired = Instant::now();
                    // Nobody may say a word about it again.
                    repair_at = (!done).then(|| repaired + LOOK);
                },
                ended = self.up.supervisor.wait(), if has_services => return ended.success(),
                () = signals.next() => return true,
                Some(order) = self.orders.recv() => self.carry_out(order).await,
                Ok(()) = self.up.resolvers.changed() => {
                    let resolvers = Arc::clone(&self.up.resolvers.borrow_and_update());
                    if let Some(way_out) = &mut self.up.way_out {
                        way_out.set_resolvers(&resolvers);
                    }
                },
                _ = ticks.tick() => {
                    // The kernel sends no word of changes of legacy rules, and of routes none is heard.
                    ticked = (ticked + 1) % LOOK_AT_LEGACY;
                    if ticked == 0 && repair_at.is_none() && self.up.publisher.translates() {
                        repair_at = Some(Instant::now());
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
                    if repair_at.is_none() && !self.programs_hold().await {
                        repair_at = Some(Instant::now());
                    }
                },
            }
        }
    }

    /// Whether nobody has detached a gate or a port guard.
    async fn programs_hold(&mut self) -> bool {
        match self.setup.programs_hold(&self.up.layout.desired).await {
            Ok(hold) => hold,
            Err(error) => {
                tracing::debug!(%error, "gates and port guards cannot be observed");
                true
            }
        }
    }

    /// Rules have changed: reports chains, each once, that may change the mark of the gates behind ours.
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

    /// Rules have changed: has DOCKER-USER one that published ports bypass? Then the kernel publishes
    /// them from here on; what it cannot publish is reported, and goes on.
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

    /// Whether all is as it shall be.
    async fn repair(&mut self) -> bool {
        // A bridge that is missing has to be known to be before it is made again: its members would
        // pass for outsiders otherwise.
        self.update_bridge_indexes();
        let mut repaired = self.put_right().await;
        if repaired.is_err() {
            // A link on its way out is still listed for a moment, and nothing can be put on it.
            tokio::time::sleep(SETTLE).await;
            repaired = self.put_right().await;
        }
        self.update_bridge_indexes();
        match &repaired {
            Ok(0) => {}
            Ok(steps) => {
                self.repairs.done.increment(1);
                tracing::warn!(steps, "someone else has changed our networks; put right again");
            }
            Err(error) => {
                self.repairs.failed.increment(1);
                tracing::error!(%error, "someone else has changed our networks, and they cannot be put right");
            }
        }
        repaired.is_ok()
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

    async fn put_right(&mut self) -> Result<usize, SetupError> {
        let observed = self.setup.surroundings().await?;
        self.up.gateway_networks.set_internal_of_others(observed.internal_bridges.clone());
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
        if let Some(firewall) = &self.chosen.firewall {
            let uplinks = uplinks(&observed, desired);
            let reply_paths = if self.up.publisher.translates() {
                reply_paths(&observed, &self.project)
            } else {
                Vec::new()
            };
            if uplinks != desired.uplinks || reply_paths != desired.reply_paths {
                // A new link, or the host has begun to forward: not our networks that someone has changed.
                (desired.uplinks, desired.reply_paths) = (uplinks, reply_paths);
                firewall.set_reply_paths(&desired.reply_paths);
                return self.setup.update(desired).await.map(|_| 0);
            }
        }
        if let Some(way_out) = self.up.way_out.as_mut().filter(|_| !self.apart) {
            // Networks of others may have come.
            way_out.look_again(&self.up.layout, &observed);
        }
        self.setup.repair(&self.up.layout.desired).await
    }

    async fn carry_out(&mut self, order: Order) {
        match order {
            Order::Replug { endpoint, netns, done } => {
                let result = self.replug_to(&endpoint, netns).await;
                // Who has gone meanwhile does not hear of it.
                let _ = done.send(result);
            }
        }
    }

    async fn replug_to(&mut self, endpoint: &str, netns: PathBuf) -> Result<(), Problem> {
        if self.up.adopted.get(endpoint).is_none() {
            let known = self.up.layout.desired.endpoints.iter().any(|one| one.name == endpoint);
            return Err(if known {
                Problem::conflict(&format!(
                    "endpoint {endpoint:?} is in a namespace that tidegate made; only adopted ones (x-netns) can be plugged in elsewhere"
                ))
            } else {
                Problem::not_found(&format!("there is no endpoint {endpoint:?}"))
            });
        }
        let namespace = Namespace::from_path(&netns).map_err(|error| Problem::bad_request(&error))?;
        self.replug(endpoint, netns, &namespace).await
    }

    /// Plugs `endpoint` into `namespace`, which is at `path`, and leads its ports there.
    async fn replug(&mut self, endpoint: &str, path: PathBuf, namespace: &Namespace) -> Result<(), Problem> {
        let plugged = self.setup.replug(&self.up.layout.desired, endpoint, namespace.clone()).await;
        plugged.map_err(|error| match error {
            SetupError::Conflict(_) => Problem::conflict(&error),
            error => Problem::failed(&error),
        })?;
        // Before its ports: should those not follow, the next look tries again, here.
        self.up.adopted.set(endpoint, path.clone(), false);
        let addresses = self.up.layout.addresses.get(endpoint).map(Vec::as_slice).unwrap_or_default();
        self.up.publisher.relocate(endpoint, namespace, addresses)?;
        if let Err(error) = self.up.names.serve(endpoint, namespace) {
            tracing::warn!(endpoint, "{error:#}");
        }
        tracing::info!(endpoint, path = %path.display(), namespace = %namespace.id(), "plugged in again");
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
                    self.up.names.serve_if_unserved(&endpoint, &known).err().map(|error| format!("{error:#}"))
                }
                Ok(Some(namespace)) => {
                    self.replug(&endpoint, path, &namespace).await.err().map(|problem| problem.to_string())
                }
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

/// What `path` leads to, unless it still is the namespace `known`.
///
/// # Errors
/// Why it leads to none that the container could have come back in.
fn look(path: &Path, known: NamespaceId) -> Result<Option<Namespace>, String> {
    // Without opening it, which is more work for everyone.
    let there = fs::metadata(path).map(|there| NamespaceId { device: there.dev(), inode: there.ino() });
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
