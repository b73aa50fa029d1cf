//! Planning, application, verification, repair and removal of networks.

use crate::kernel::End;
use crate::plan::{check_free, check_links, plan_extension, plan_update, removals};
use crate::repair::{causes, with_derived};
use crate::{
    ApplyError, ConflictError, Desired, Fact, FirewallKind, Interface, Isolation, Journal,
    JournalError, Kernel, KernelError, KernelModel, Network, Observed, Op, Place, Repaired, plan,
};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tidegate_netns::Namespace;

/// The networks and endpoints of one owner.
#[derive(Debug)]
pub struct Setup {
    kernel: Kernel,
    journal: Journal,
    isolation: Box<dyn Isolation>,
    stop: Stop,
}

/// Stops a running change of a [`Setup`] from another task.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Makes the running and every later change fail with [`SetupError::Stopped`] before its next
    /// operation. Rollbacks and removals are not affected.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Returns the link of the host that `op` removes, if any.
fn removes_link(op: &Op) -> Option<&Interface> {
    match op {
        Op::Remove(Fact::Bridge { interface, .. } | Fact::Veth { interface, .. }) => {
            Some(interface)
        }
        _ => None,
    }
}

/// Returns whether `fact` depends on the host's end of a veth pair of `part`.
fn depends_on_pair_of(part: &Desired, fact: &Fact) -> bool {
    let ends = part
        .endpoints
        .iter()
        .flat_map(|one| &one.attachments)
        .map(|one| one.host_end.name.as_str());
    ends.into_iter().any(|end| fact.on().any(|link| link == (None, end)))
}

/// A failure to reach the desired state.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The desired state conflicts with itself or with foreign objects. Nothing was changed.
    #[error(transparent)]
    Conflict(#[from] ConflictError),
    /// The kernel could not be observed. Nothing was changed.
    #[error(transparent)]
    Observe(#[from] KernelError),
    /// An operation failed. The previous ones were rolled back.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The journal failed. Unrecorded operations are not performed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// All operations succeeded, but the desired state does not hold: another program interferes.
    #[error("{0}: reverted concurrently by another program")]
    Verify(Op),
    /// [`Stop::stop`] was called. The previous operations were rolled back.
    #[error("interrupted")]
    Stopped,
}

impl Setup {
    /// Creates a setup on `kernel`, recorded in `journal`.
    pub fn new(kernel: Kernel, journal: Journal, isolation: impl Isolation + 'static) -> Self {
        Self { kernel, journal, isolation: Box::new(isolation), stop: Stop::default() }
    }

    /// Returns a handle that stops changes.
    #[must_use]
    pub fn stop_handle(&self) -> Stop {
        self.stop.clone()
    }

    /// Returns the kernel, to register endpoints.
    pub fn kernel(&mut self) -> &mut Kernel {
        &mut self.kernel
    }

    /// Returns the isolation mechanism.
    pub fn isolation(&self) -> &dyn Isolation {
        &*self.isolation
    }

    /// Returns the facts of this owner that may hold.
    #[must_use]
    pub fn owned(&self) -> &[Fact] {
        self.journal.facts()
    }

    /// Returns whether rules of this owner in `firewall` may be in force.
    #[must_use]
    pub fn owns_rules_of(&self, firewall: FirewallKind) -> bool {
        let is_one =
            |fact: &Fact| matches!(fact, Fact::Ruleset { firewall: kind, .. } if *kind == firewall);
        self.journal.facts().iter().any(is_one)
    }

    /// Observes the host, for the choice of names and subnets.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn surroundings(&mut self) -> Result<Observed, KernelError> {
        self.kernel.observe(&[]).await
    }

    /// Applies `desired` and verifies the result. Returns the number of operations. If an operation
    /// fails, the previous ones are rolled back.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn apply(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let ops = self.plan(desired).await?;
        self.execute_or_roll_back(&ops).await?;
        match self.plan(desired).await?.into_iter().next() {
            None => Ok(ops.len()),
            Some(op) => Err(SetupError::Verify(op)),
        }
    }

    /// Applies a new version of `desired`. Adds new facts before it removes old ones, so that
    /// networks stay isolated in between. Returns the number of operations.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn change(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let ops = self.plan_part(&desired.without_endpoints()).await?;
        self.execute_or_roll_back(&ops).await?;
        let added = ops.len();
        Ok(added + self.update(desired).await?)
    }

    /// Applies a new version of `desired`. Removes old facts before it adds new ones, for new facts
    /// that replace old ones. Returns the number of operations.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn update(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let observed = self.observe_with_owned(desired).await?;
        let ops = plan_update(desired, self.journal.facts(), &observed, &*self.isolation)?.ops;
        self.execute_or_roll_back(&ops).await?;
        Ok(ops.len())
    }

    /// Adds the networks of `desired` and those of its endpoints that are in `endpoints`, as far as
    /// they do not exist yet. All other endpoints of `desired` must have been applied, and are
    /// neither observed nor changed. Returns the number of operations. If one fails, the previous
    /// ones are rolled back. The caller should call [`repair`](Self::repair) later, which verifies
    /// the result.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn extend(
        &mut self,
        desired: &Desired,
        endpoints: &BTreeSet<String>,
    ) -> Result<usize, SetupError> {
        let mut part = desired.with_endpoints(endpoints);
        self.check_places(&part)?;
        // Other networks that exist are not observed, so that the time of a command does not depend
        // on their number.
        let existing: BTreeSet<&str> = self
            .journal
            .facts()
            .iter()
            .filter_map(|fact| match fact {
                Fact::Bridge { interface, .. } => Some(interface.name.as_str()),
                _ => None,
            })
            .collect();
        let attachments = || part.endpoints.iter().flat_map(|endpoint| &endpoint.attachments);
        let used: BTreeSet<String> = attachments().map(|one| one.network.clone()).collect();
        let is_new = |network: &Network| !existing.contains(network.bridge.name.as_str());
        part.networks.retain(|network| used.contains(&network.name) || is_new(network));
        let has_new = part.networks.iter().any(is_new);
        let (facts, observed) = self.observe_part(&part, has_new).await?;
        let ops = plan_extension(&part, desired, &facts, self.journal.facts(), &observed)?;
        self.execute_or_roll_back(&ops.ops).await?;
        Ok(ops.ops.len())
    }

    /// Returns the facts of `part` that may be missing, and observes them. Those of its networks
    /// exist, unless one is new or other software has removed it.
    async fn observe_part(
        &mut self,
        part: &Desired,
        has_new_network: bool,
    ) -> Result<(Vec<Fact>, Observed), SetupError> {
        let facts = part.facts(&*self.isolation);
        if !has_new_network {
            let of_endpoints: BTreeSet<Fact> =
                part.endpoints.iter().flat_map(|endpoint| part.facts_of(endpoint)).collect();
            let is_shared =
                |fact: &Fact| matches!(fact, Fact::Ruleset { .. } | Fact::GuardTable { .. });
            let narrow =
                facts.iter().filter(|fact| is_shared(fact) || of_endpoints.contains(*fact));
            let narrow: Vec<Fact> = narrow.cloned().collect();
            let observed = self.kernel.observe_named(&narrow).await?;
            let links = observed.links.get(&Place::Host);
            let exists = |network: &Network| {
                links.is_some_and(|links| links.contains_key(&network.bridge.name))
            };
            if part.networks.iter().all(exists) {
                return Ok((narrow, observed));
            }
        }
        let observed = self.kernel.observe(&facts).await?;
        Ok((facts, observed))
    }

    /// Removes the networks of `before`, which was applied, that are not in `after`. They must have
    /// no endpoints. Returns the number of operations. Continues after failures.
    ///
    /// # Errors
    /// [`SetupError`]: the first failure. Facts that could not be removed stay in the journal.
    pub async fn retract(
        &mut self,
        before: &Desired,
        after: &Desired,
    ) -> Result<usize, SetupError> {
        let wanted: BTreeSet<Fact> =
            after.without_endpoints().facts(&*self.isolation).into_iter().collect();
        let owned: BTreeSet<&Fact> = self.journal.facts().iter().collect();
        let mut stale = before.without_endpoints().facts(&*self.isolation);
        stale.retain(|fact| owned.contains(fact) && !wanted.contains(fact));
        self.remove_facts(&stale).await
    }

    /// Returns whether the registered namespace of the endpoint `name` has all its interfaces.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn has_interfaces(
        &mut self,
        desired: &Desired,
        name: &str,
    ) -> Result<bool, KernelError> {
        let endpoint = desired.endpoints.iter().find(|endpoint| endpoint.name == name);
        let facts = endpoint.map(|endpoint| desired.facts_of(endpoint)).unwrap_or_default();
        for pair in facts.iter().filter(|fact| fact.is_link()) {
            if pair.is_of_endpoint(name) && self.kernel.find_end(pair).await? != End::InPlace {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes the facts of the endpoint `name`, whose namespace may no longer exist, and forgets
    /// the namespace.
    ///
    /// # Errors
    /// [`SetupError`]. Facts that could not be removed stay in the journal.
    pub async fn remove_endpoint(&mut self, name: &str) -> Result<(), SetupError> {
        self.detach(name).await?;
        self.kernel.remove_endpoint(name);
        Ok(())
    }

    /// Restores the facts of `desired` that other software has removed or changed: those of the
    /// host if `host` is set, and those of `endpoints`. `desired` must have been applied. A missing
    /// veth pair is restored if its endpoint is in `endpoints`.
    ///
    /// Failures do not cause a rollback, because facts that close a network precede those that open
    /// it. A failure in one namespace does not prevent repairs in the others.
    pub async fn repair(
        &mut self,
        desired: &Desired,
        host: bool,
        endpoints: &BTreeSet<String>,
    ) -> Repaired {
        let mut repaired = Repaired::default();
        // A removed link of an endpoint may have been replaced by another one with the same name.
        self.kernel.discard_endpoint_indexes();
        let mut detached = BTreeSet::new();
        if host {
            match self.repair_host(desired).await {
                Ok((restored, failed, missing)) => {
                    repaired.restored = restored;
                    repaired.failed.extend(failed.map(|error| (None, error)));
                    detached = missing;
                }
                Err(error) => repaired.failed.push((None, error)),
            }
        }
        for name in endpoints {
            let result = self.repair_endpoint(desired, name, detached.contains(name)).await;
            let (restored, failed) = result.unwrap_or_else(|error| (Vec::new(), Some(error)));
            repaired.restored.extend(restored);
            repaired.failed.extend(failed.map(|error| (Some(name.clone()), error)));
        }
        repaired.restored = causes(std::mem::take(&mut repaired.restored));
        repaired.detached = detached.difference(endpoints).cloned().collect();
        repaired
    }

    /// Restores the facts of the host, except for veth pairs and facts on them. Returns the
    /// restored facts, the first failure, and the endpoints without their pairs.
    async fn repair_host(
        &mut self,
        desired: &Desired,
    ) -> Result<(Vec<Fact>, Option<SetupError>, BTreeSet<String>), SetupError> {
        let facts = with_derived(desired.facts(&*self.isolation));
        let facts: Vec<Fact> = facts.into_iter().filter(Fact::is_of_the_host).collect();
        let observed = self.kernel.observe(&facts).await?;
        // A foreign link under the name of a bridge is left alone, and the facts on it cannot be
        // restored.
        let networks = desired.without_endpoints();
        let taken: BTreeMap<&str, ConflictError> = networks
            .networks
            .iter()
            .filter_map(|network| {
                let conflict = check_free(&observed, &Place::Host, &network.bridge).err()?;
                Some((network.bridge.name.as_str(), conflict))
            })
            .collect();
        let is_on_taken =
            |fact: &Fact| fact.on().chain(fact.links()).any(|(_, link)| taken.contains_key(link));
        let exists = |link: &str| {
            observed.links.get(&Place::Host).is_some_and(|links| links.contains_key(link))
        };
        let devices: BTreeSet<String> = facts
            .iter()
            .filter_map(|fact| match fact {
                Fact::EngineDevice { link } => Some(link.clone()),
                _ => None,
            })
            .collect();
        let is_ours = |link: &str| desired.has_bridge(link) || devices.contains(link);
        let mut detached = BTreeSet::new();
        let mut missing_links = BTreeSet::new();
        let mut ops = Vec::new();
        for fact in facts.into_iter().filter(|fact| !observed.facts.contains(fact)) {
            match &fact {
                Fact::Veth { interface, endpoint, .. } => {
                    detached.insert(endpoint.clone());
                    missing_links.insert(interface.name.clone());
                }
                // The foreign link has been removed.
                Fact::Forwarding { link, .. } if !exists(link) && !is_ours(link) => {}
                _ if fact.on().any(|(_, link)| missing_links.contains(link)) => {}
                _ if is_on_taken(&fact) => {}
                _ => ops.push(Op::Add(fact)),
            }
        }
        let (restored, failed) = self.restore(&ops).await?;
        let failed = failed.or_else(|| taken.into_values().next().map(SetupError::from));
        Ok((restored, failed, detached))
    }

    /// Restores the facts in the namespace of the endpoint `name`, and its veth pairs. If
    /// `detached` is not set, missing pairs are detected. A link that the endpoint has created
    /// under the name of its own end is left alone, and the facts on it cannot be restored.
    ///
    /// Existing addresses and routes are detected by adding them, because processes of an endpoint
    /// could make listing them arbitrarily slow.
    async fn repair_endpoint(
        &mut self,
        desired: &Desired,
        name: &str,
        detached: bool,
    ) -> Result<(Vec<Fact>, Option<SetupError>), SetupError> {
        let mut part = desired.with_endpoints(&BTreeSet::from([name.to_owned()]));
        let place = Place::Endpoint(name.to_owned());
        let pairs: Vec<Fact> =
            part.facts(&*self.isolation).into_iter().filter(Fact::is_link).collect();
        let (mut lost, mut taken) = (Vec::new(), None);
        for pair in pairs {
            let Fact::Veth { inside, .. } = &pair else { continue };
            match self.kernel.find_end(&pair).await? {
                End::InPlace => {}
                End::Missing | End::Changed => lost.push(pair),
                End::Stray(index) => {
                    self.kernel.delete_end(name, index).await?;
                    lost.push(pair);
                }
                End::Replaced => {
                    for endpoint in &mut part.endpoints {
                        endpoint.attachments.retain(|one| one.inside.name != inside.name);
                    }
                    let name = inside.name.clone();
                    taken = Some(ConflictError::NameTaken { place: place.clone(), name });
                }
            }
        }
        let mut facts = with_derived(part.facts(&*self.isolation));
        let inside: Vec<Fact> = facts
            .iter()
            .filter(|fact| fact.is_of_endpoint(name) && !fact.is_of_the_host())
            .cloned()
            .collect();
        facts.retain(|fact| fact.is_of_endpoint(name) || depends_on_pair_of(&part, fact));
        let mut model;
        if detached || !lost.is_empty() {
            let observed = self.kernel.observe_links(&place, &facts).await?;
            check_links(&part, &observed)?;
            model = KernelModel::new(observed.facts);
            // The other end may have been renamed or moved. The pair is then deleted and created
            // again.
            let left: Vec<Op> =
                lost.into_iter().filter(|fact| model.holds(fact)).map(Op::Remove).collect();
            self.execute_or_roll_back(&left).await?;
            left.iter().for_each(|op| model.execute(op));
        } else {
            model = KernelModel::new(self.kernel.observe_links(&place, &inside).await?.facts);
            facts = inside;
        }
        let ops: Vec<Op> =
            facts.into_iter().filter(|fact| !model.holds(fact)).map(Op::Add).collect();
        let (restored, failed) = self.restore(&ops).await?;
        Ok((restored, failed.or_else(|| taken.map(SetupError::from))))
    }

    /// Performs `ops`, which add facts. Returns the facts that did not hold before, and the first
    /// failure. The journal records each fact once, even if it is restored repeatedly, and no fact
    /// that the kernel adds implicitly.
    async fn restore(&mut self, ops: &[Op]) -> Result<(Vec<Fact>, Option<SetupError>), SetupError> {
        if ops.is_empty() {
            return Ok((Vec::new(), None));
        }
        let known: BTreeSet<&Fact> = self.journal.facts().iter().collect();
        let is_new = |fact: &Fact| !known.contains(fact) && !fact.is_derived();
        let new: Vec<Op> = ops.iter().filter(|op| is_new(op.fact())).cloned().collect();
        if !new.is_empty() {
            self.journal.before(&new)?;
        }
        let (mut restored, mut failed) = (Vec::new(), None);
        for op in ops {
            match self.kernel.execute(op).await {
                Ok(()) => restored.push(op.fact().clone()),
                // The kernel has added the fact implicitly, or another program has replaced it.
                Err(error)
                    if error.source.kind() == io::ErrorKind::AlreadyExists
                        && op.fact().may_exist() => {}
                Err(source) => {
                    // Continue, so that one failure does not leave other networks open.
                    let error = ApplyError { op: Box::new(op.clone()), source, left: Vec::new() };
                    failed.get_or_insert(error.into());
                }
            }
        }
        Ok((restored, failed))
    }

    /// Detects changes for which the kernel sends no notification: detached programs, and sysctls
    /// of bridges and of `endpoints`. Returns the namespaces with such changes. Missing links are
    /// ignored.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn unannounced_changes(
        &mut self,
        desired: &Desired,
        endpoints: &BTreeSet<String>,
    ) -> Result<BTreeSet<Place>, KernelError> {
        let part = desired.with_endpoints(endpoints).facts(&*self.isolation);
        let mut places = self.kernel.places_with_changed_sysctls(&part);
        if !self.kernel.programs_hold(&desired.facts(&*self.isolation)).await? {
            places.insert(Place::Host);
        }
        Ok(places)
    }

    /// Moves the endpoint `name` to `namespace`, because its container was restarted there.
    /// `desired` must have been applied. The endpoint keeps its interfaces, addresses and routes;
    /// other endpoints are not changed. If the namespace is the current one, missing facts are
    /// added. Returns the number of operations.
    ///
    /// # Errors
    /// [`SetupError`]. After a conflict, such as an existing interface, nothing was changed. After
    /// a failed operation, the endpoint is detached.
    pub async fn reattach(
        &mut self,
        desired: &Desired,
        name: &str,
        namespace: Namespace,
    ) -> Result<usize, SetupError> {
        let part = desired.with_endpoints(&BTreeSet::from([name.to_owned()]));
        let old = self.kernel.add_endpoint(name, namespace.clone());
        if let Some(old) = old.filter(|old| old.id() != namespace.id()) {
            let fits = self.plan_part(&part).await;
            self.kernel.add_endpoint(name, old);
            fits?;
            self.detach(name).await?;
            self.kernel.add_endpoint(name, namespace);
        }
        let ops = self.plan_part(&part).await?;
        self.execute_or_roll_back(&ops).await?;
        match self.plan_part(&part).await?.into_iter().next() {
            None => Ok(ops.len()),
            Some(op) => Err(SetupError::Verify(op)),
        }
    }

    /// Removes the facts of the endpoint `name`.
    async fn detach(&mut self, name: &str) -> Result<(), SetupError> {
        let facts =
            self.journal.facts().iter().rev().filter(|fact| fact.is_of_endpoint(name)).cloned();
        let (on_links, others): (Vec<Fact>, Vec<Fact>) =
            facts.partition(Fact::is_removed_with_link);
        for op in others.into_iter().map(Op::Remove) {
            match self.kernel.execute(&op).await {
                Ok(()) => self.journal.after(&[op])?,
                Err(source) => {
                    return Err(ApplyError { op: Box::new(op), source, left: Vec::new() }.into());
                }
            }
        }
        // Facts on foreign links, mainly `lo`. Failures are ignored, because the namespace is being
        // abandoned.
        for op in on_links.into_iter().map(Op::Remove) {
            if self.journal.facts().contains(op.fact()) {
                if let Err(error) = self.kernel.execute(&op).await {
                    tracing::debug!(%error, "not reverted in abandoned namespace");
                }
                self.journal.after(&[op])?;
            }
        }
        Ok(())
    }

    /// Removes all facts of this owner, including those of a previous process that was killed.
    /// Returns the number of operations.
    ///
    /// # Errors
    /// [`SetupError`]: the first failure. Facts that could not be removed stay in the journal.
    pub async fn clear(&mut self) -> Result<usize, SetupError> {
        let steps = self.remove_all().await?;
        self.journal.clear()?;
        Ok(steps)
    }

    /// Removes all facts of this owner, and the journal.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn finish(mut self) -> Result<(), SetupError> {
        self.remove_all().await?;
        Ok(self.journal.finish()?)
    }

    async fn remove_all(&mut self) -> Result<usize, SetupError> {
        let facts = self.journal.facts().to_vec();
        self.remove_facts(&facts).await
    }

    /// Removes `facts`, which are in order of creation. Continues after failures, and returns the
    /// first one. Observing first is unnecessary, because a missing object is not an error.
    async fn remove_facts(&mut self, facts: &[Fact]) -> Result<usize, SetupError> {
        let ops = removals(facts, &mut KernelModel::new(facts.iter().cloned().collect()));
        let failed = self.execute(&ops, true).await?;
        if let Some((at, source)) = failed.into_iter().next() {
            return Err(
                ApplyError { op: Box::new(ops[at].clone()), source, left: Vec::new() }.into()
            );
        }
        Ok(ops.len())
    }

    async fn plan(&mut self, desired: &Desired) -> Result<Vec<Op>, SetupError> {
        let observed = self.observe_with_owned(desired).await?;
        Ok(plan(desired, self.journal.facts(), &observed, &*self.isolation)?.ops)
    }

    /// Observes the facts of `desired` and the owned facts.
    async fn observe_with_owned(&mut self, desired: &Desired) -> Result<Observed, SetupError> {
        self.check_places(desired)?;
        let mut facts = desired.facts(&*self.isolation);
        facts.extend_from_slice(self.journal.facts());
        facts.sort_unstable();
        facts.dedup();
        Ok(self.kernel.observe(&facts).await?)
    }

    /// Plans the missing facts of `part`, which is part of the applied state.
    async fn plan_part(&mut self, part: &Desired) -> Result<Vec<Op>, SetupError> {
        self.check_places(part)?;
        let observed = self.kernel.observe(&part.facts(&*self.isolation)).await?;
        Ok(plan_update(part, &[], &observed, &*self.isolation)?.ops)
    }

    /// Checks that no endpoint is in the namespace of the bridges.
    fn check_places(&self, desired: &Desired) -> Result<(), ConflictError> {
        match desired.endpoints.iter().find(|endpoint| self.kernel.is_on_the_host(&endpoint.name)) {
            Some(endpoint) => Err(ConflictError::OnTheHost { endpoint: endpoint.name.clone() }),
            None => Ok(()),
        }
    }

    /// Attaches the source guards of `desired`, and detaches others.
    ///
    /// # Errors
    /// [`SetupError`]: the journal cannot be written.
    pub async fn guard_links(&mut self, desired: &Desired) -> Result<(), SetupError> {
        let wanted: BTreeSet<Fact> = desired.source_guards().collect();
        let facts = self.journal.facts().iter();
        let owned = facts.filter(|fact| matches!(fact, Fact::SourceGuard { .. })).cloned();
        let owned: BTreeSet<Fact> = owned.collect();
        let mut ops: Vec<Op> = owned.difference(&wanted).cloned().map(Op::Remove).collect();
        ops.extend(wanted.difference(&owned).cloned().map(Op::Add));
        for (_, error) in self.execute(&ops, true).await? {
            tracing::warn!(%error, "source guard");
        }
        Ok(())
    }

    async fn execute_or_roll_back(&mut self, ops: &[Op]) -> Result<(), SetupError> {
        // An operation that renews an owned fact, such as the rules of the firewall, is not undone:
        // removing the fact would remove more than the operation has added.
        let added: BTreeSet<&Fact> = ops.iter().filter_map(Op::added).collect();
        let renewed: BTreeSet<Fact> =
            self.journal.facts().iter().filter(|fact| added.contains(fact)).cloned().collect();
        let failed = self.execute(ops, false).await?;
        let Some((at, source)) = failed.into_iter().next() else { return Ok(()) };
        let left = self.roll_back(ops, at, &renewed).await?;
        if self.stop.is_set() && left.is_empty() {
            return Err(SetupError::Stopped);
        }
        Err(ApplyError { op: Box::new(ops[at].clone()), source, left }.into())
    }

    /// Performs `ops`: leading removals of links together, and the other operations one by one. All
    /// of them are in the journal before the first one is performed. Returns the failed operations.
    /// With `keep_going`, continues after failures and ignores [`Stop`].
    async fn execute(
        &mut self,
        ops: &[Op],
        keep_going: bool,
    ) -> Result<Vec<(usize, KernelError)>, JournalError> {
        self.journal.before(ops)?;
        let links: Vec<&Interface> = ops.iter().map_while(removes_link).collect();
        let mut done = 0;
        // If the combined removal fails, individual removals identify the link.
        if self.kernel.remove_links(&links).await.is_ok() {
            done = links.len();
            self.record(&ops[..done], keep_going)?;
        }
        let mut failed = Vec::new();
        for (at, op) in ops.iter().enumerate().skip(done) {
            let performed = if self.stop.is_set() && !keep_going {
                Err(KernelError { what: op.to_string(), source: io::ErrorKind::Interrupted.into() })
            } else {
                self.kernel.execute(op).await
            };
            match performed {
                Ok(()) => self.record(std::slice::from_ref(op), keep_going)?,
                Err(error) => {
                    failed.push((at, error));
                    if !keep_going {
                        break;
                    }
                }
            }
        }
        Ok(failed)
    }

    /// Records performed operations. With `keep_going`, a failure to record is ignored, because
    /// removing a missing object again is harmless.
    fn record(&mut self, ops: &[Op], keep_going: bool) -> Result<(), JournalError> {
        match self.journal.after(ops) {
            Err(error) if keep_going => {
                tracing::debug!(%error, "journal entry not written");
                Ok(())
            }
            result => result,
        }
    }

    /// Rolls back `ops` up to and including the one at `failed`, which may have been performed in
    /// part.
    async fn roll_back(
        &mut self,
        ops: &[Op],
        failed: usize,
        renewed: &BTreeSet<Fact>,
    ) -> Result<Vec<KernelError>, JournalError> {
        let mut back = rollback(&ops[..failed], &ops[failed]);
        back.retain(|op| !renewed.contains(op.fact()));
        let left = self.execute(&back, true).await?;
        // Facts on removed links, and facts that were never attempted, no longer hold.
        let kept: BTreeSet<&Fact> = left.iter().map(|(at, _)| back[*at].fact()).collect();
        let absent: Vec<Op> =
            ops.iter().map(Op::inverse).filter(|op| !kept.contains(op.fact())).collect();
        let absent: Vec<Op> =
            absent.into_iter().filter(|op| !renewed.contains(op.fact())).collect();
        self.record(&absent, true)?;
        Ok(left.into_iter().map(|(_, error)| error).collect())
    }
}

/// Returns the operations that roll back `done` and the subsequent operation `failed`. An object
/// that `failed` was to remove still exists.
fn rollback(done: &[Op], failed: &Op) -> Vec<Op> {
    let added: Vec<Fact> = done.iter().chain([failed]).filter_map(Op::added).cloned().collect();
    let mut back = removals(&added, &mut KernelModel::new(added.iter().cloned().collect()));
    back.extend(done.iter().rev().filter(|op| op.added().is_none()).map(Op::inverse));
    back
}

#[cfg(test)]
mod tests;
