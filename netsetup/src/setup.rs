//! Plan, apply, verify, and take it all back.

use crate::kernel::End;
use crate::plan::{check_links, plan_again, removals};
use crate::repair::{causes, with_derived};
use crate::{
    ApplyError, ConflictError, Desired, Fact, Interface, Isolation, Journal, JournalError, Kernel,
    KernelError, Observed, Op, Place, Repaired, World, plan,
};
use std::collections::BTreeSet;
use std::io;
use tidegate_netns::Namespace;

/// Networks and endpoints of one owner.
#[derive(Debug)]
pub struct Setup {
    kernel: Kernel,
    journal: Journal,
    isolation: Box<dyn Isolation>,
}

/// The link of the host that `op` removes, if that is what it does.
fn removes_link(op: &Op) -> Option<&Interface> {
    match op {
        Op::Remove(Fact::Bridge { interface, .. } | Fact::Veth { interface, .. }) => {
            Some(interface)
        }
        _ => None,
    }
}

/// Whether `fact` is about the host's end of a veth pair of `part`.
fn is_on_pair_of(part: &Desired, fact: &Fact) -> bool {
    let ends = part
        .endpoints
        .iter()
        .flat_map(|one| &one.attachments)
        .map(|one| one.host_end.name.as_str());
    ends.into_iter().any(|end| fact.on().any(|link| link == (None, end)))
}

/// Why networks are not as desired.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// They cannot be; nothing was changed.
    #[error(transparent)]
    Conflict(#[from] ConflictError),
    /// The kernel did not answer; nothing was changed.
    #[error(transparent)]
    Observe(#[from] KernelError),
    /// A step failed; what was done before it was undone.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The journal failed; nothing is done that it does not tell of.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel took every step, and yet not all is as it should be: someone else is at it.
    #[error("{0} was undone by someone else meanwhile")]
    Verify(Op),
}

impl Setup {
    /// Works on `kernel`, and keeps `journal`.
    pub fn new(kernel: Kernel, journal: Journal, isolation: impl Isolation + 'static) -> Self {
        Self { kernel, journal, isolation: Box::new(isolation) }
    }

    /// The kernel, to tell it of endpoints.
    pub fn kernel(&mut self) -> &mut Kernel {
        &mut self.kernel
    }

    /// How networks are kept closed.
    pub fn isolation(&self) -> &dyn Isolation {
        &*self.isolation
    }

    /// What may be there because of us.
    #[must_use]
    pub fn owned(&self) -> &[Fact] {
        self.journal.facts()
    }

    /// What the host has besides, to choose names and subnets by.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn surroundings(&mut self) -> Result<Observed, KernelError> {
        self.kernel.observe(&[]).await
    }

    /// Makes it so. Fails a step, the ones before it are undone.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn apply(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let ops = self.plan(desired).await?;
        self.carry_out(&ops).await?;
        match self.plan(desired).await?.into_iter().next() {
            None => Ok(ops.len()),
            Some(op) => Err(SetupError::Verify(op)),
        }
    }

    /// Makes it so where an earlier version of `desired` has been applied. What is new comes before
    /// what is over, so that nothing opens in between. Returns the number of steps.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn change(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let ops = self.plan_part(&desired.without_endpoints()).await?;
        self.carry_out(&ops).await?;
        let added = ops.len();
        Ok(added + self.update(desired).await?)
    }

    /// The same, with what is over removed first: where what is new takes its place.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn update(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let observed = self.observe_with_owned(desired).await?;
        let ops = plan_again(desired, self.journal.facts(), &observed, &*self.isolation)?.ops;
        self.carry_out(&ops).await?;
        Ok(ops.len())
    }

    /// Restores what other software has removed or changed of `desired`, which must have been
    /// applied: of the host with `host`, and of these `endpoints`. A veth pair that is missing is
    /// restored if its endpoint is among them.
    ///
    /// Nothing is undone where a step fails, since facts are in an order in which what closes a
    /// network precedes what opens it. What the other place needs is done all the same.
    pub async fn repair(
        &mut self,
        desired: &Desired,
        host: bool,
        endpoints: &BTreeSet<String>,
    ) -> Repaired {
        let mut repaired = Repaired::default();
        // Whoever has removed a link of an endpoint may have made another one of the same name.
        self.kernel.forget_endpoints();
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

    /// Restores what is on the host, but for veth pairs and what is on them. Returns what was
    /// restored, what has failed, and the endpoints whose pairs are missing.
    async fn repair_host(
        &mut self,
        desired: &Desired,
    ) -> Result<(Vec<Fact>, Option<SetupError>, BTreeSet<String>), SetupError> {
        let facts = with_derived(desired.facts(&*self.isolation));
        let facts: Vec<Fact> = facts.into_iter().filter(Fact::is_of_the_host).collect();
        let observed = self.kernel.observe(&facts).await?;
        check_links(&desired.without_endpoints(), &observed)?;
        let is_there = |link: &str| {
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
                // Of a link of somebody else's that has gone.
                Fact::Forwarding { link, .. } if !is_there(link) && !is_ours(link) => {}
                _ if fact.on().any(|(_, link)| missing_links.contains(link)) => {}
                _ => ops.push(Op::Add(fact)),
            }
        }
        let (restored, failed) = self.restore(&ops).await?;
        Ok((restored, failed, detached))
    }

    /// Restores what is in the namespace of the endpoint `name`, and its veth pairs. It is known to
    /// be `detached`, or that is found out. A link that the endpoint has made under the name of
    /// one of its own is left alone; what belongs on that cannot be restored.
    ///
    /// What is there is found by adding it: processes of an endpoint can make listing it take as
    /// long as they like.
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
                End::Missing => lost.push(pair),
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
        facts.retain(|fact| fact.is_of_endpoint(name) || is_on_pair_of(&part, fact));
        let mut world;
        if detached || !lost.is_empty() {
            let observed = self.kernel.observe_links(&place, &facts).await?;
            check_links(&part, &observed)?;
            world = World::new(observed.facts);
            // The other end may have been renamed, or moved elsewhere: then the pair is made anew.
            let left: Vec<Op> =
                lost.into_iter().filter(|fact| world.holds(fact)).map(Op::Remove).collect();
            self.carry_out(&left).await?;
            left.iter().for_each(|op| world.execute(op));
        } else {
            world = World::new(self.kernel.observe_links(&place, &inside).await?.facts);
            facts = inside;
        }
        let ops: Vec<Op> =
            facts.into_iter().filter(|fact| !world.holds(fact)).map(Op::Add).collect();
        let (restored, failed) = self.restore(&ops).await?;
        Ok((restored, failed.or_else(|| taken.map(SetupError::from))))
    }

    /// Carries `ops`, which add facts, out. Returns the facts that were not true before, and the
    /// first failure. The journal has each fact once, however often it is restored, and none that
    /// the kernel makes true by itself.
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
                // The kernel has added it with what was restored before, or somebody has put
                // another one in its place.
                Err(error)
                    if error.source.kind() == io::ErrorKind::AlreadyExists
                        && op.fact().may_exist() => {}
                Err(source) => {
                    // One object that cannot be restored keeps no other network open.
                    let error = ApplyError { op: Box::new(op.clone()), source, left: Vec::new() };
                    failed.get_or_insert(error.into());
                }
            }
        }
        Ok((restored, failed))
    }

    /// Looks for changes of `desired` that the kernel announces to nobody: programs that were
    /// detached, and sysctls of bridges and of `endpoints`. Returns the places that have some.
    /// Links that are not there are no matter of this.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn changed_silently(
        &mut self,
        desired: &Desired,
        endpoints: &BTreeSet<String>,
    ) -> Result<BTreeSet<Place>, KernelError> {
        let part = desired.with_endpoints(endpoints).facts(&*self.isolation);
        let mut places = self.kernel.places_with_other_settings(&part);
        if !self.kernel.programs_hold(&desired.facts(&*self.isolation)).await? {
            places.insert(Place::Host);
        }
        Ok(places)
    }

    /// Plugs the endpoint `name` of `desired`, which must have been applied, into `namespace`: its
    /// container has come back in another one. It keeps its interfaces, addresses and routes; other
    /// endpoints are not touched. In the namespace that it is in already, what is missing is made
    /// again. Returns the number of steps.
    ///
    /// # Errors
    /// [`SetupError`]. Where it cannot be, because an interface is in the way for instance, nothing
    /// was changed; where a step fails, the endpoint is detached.
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
        self.carry_out(&ops).await?;
        match self.plan_part(&part).await?.into_iter().next() {
            None => Ok(ops.len()),
            Some(op) => Err(SetupError::Verify(op)),
        }
    }

    /// Takes back what endpoint `name` has.
    async fn detach(&mut self, name: &str) -> Result<(), SetupError> {
        let facts =
            self.journal.facts().iter().rev().filter(|fact| fact.is_of_endpoint(name)).cloned();
        let (on_links, others): (Vec<Fact>, Vec<Fact>) = facts.partition(Fact::goes_with_its_link);
        for op in others.into_iter().map(Op::Remove) {
            match self.kernel.execute(&op).await {
                Ok(()) => self.journal.after(&[op])?,
                Err(source) => {
                    return Err(ApplyError { op: Box::new(op), source, left: Vec::new() }.into());
                }
            }
        }
        // Of links that are not ours, `lo` above all. The namespace may be past everything.
        for op in on_links.into_iter().map(Op::Remove) {
            if self.journal.facts().contains(op.fact()) {
                if let Err(error) = self.kernel.execute(&op).await {
                    tracing::debug!(%error, "not reverted in a namespace that is left");
                }
                self.journal.after(&[op])?;
            }
        }
        Ok(())
    }

    /// Takes back all that is ours, whoever made it: this process or one before it that was killed.
    ///
    /// # Errors
    /// [`SetupError`]: the first failure; what could be removed is, and the rest stays in the journal.
    pub async fn clear(&mut self) -> Result<usize, SetupError> {
        let steps = self.take_back().await?;
        self.journal.forget_all()?;
        Ok(steps)
    }

    /// Takes back all that is ours, and the journal with it.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn finish(mut self) -> Result<(), SetupError> {
        self.take_back().await?;
        Ok(self.journal.finish()?)
    }

    async fn take_back(&mut self) -> Result<usize, SetupError> {
        // Without looking first: that something is gone already is no error.
        let facts = self.journal.facts();
        let ops = removals(facts, &mut World::new(facts.iter().cloned().collect()));
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

    /// What holds of `desired`, and of what we own.
    async fn observe_with_owned(&mut self, desired: &Desired) -> Result<Observed, SetupError> {
        self.check_places(desired)?;
        let mut asked = desired.facts(&*self.isolation);
        asked.extend_from_slice(self.journal.facts());
        asked.sort_unstable();
        asked.dedup();
        Ok(self.kernel.observe(&asked).await?)
    }

    /// What is missing of `part`, which is a part of what was applied.
    async fn plan_part(&mut self, part: &Desired) -> Result<Vec<Op>, SetupError> {
        self.check_places(part)?;
        let observed = self.kernel.observe(&part.facts(&*self.isolation)).await?;
        Ok(plan_again(part, &[], &observed, &*self.isolation)?.ops)
    }

    /// Whether every endpoint is somewhere else than its bridge.
    fn check_places(&self, desired: &Desired) -> Result<(), ConflictError> {
        match desired.endpoints.iter().find(|endpoint| self.kernel.is_on_the_host(&endpoint.name)) {
            Some(endpoint) => Err(ConflictError::OnTheHost { endpoint: endpoint.name.clone() }),
            None => Ok(()),
        }
    }

    async fn carry_out(&mut self, ops: &[Op]) -> Result<(), SetupError> {
        let failed = self.execute(ops, false).await?;
        let Some((at, source)) = failed.into_iter().next() else { return Ok(()) };
        let left = self.undo(ops, at).await?;
        Err(ApplyError { op: Box::new(ops[at].clone()), source, left }.into())
    }

    /// Carries `ops` out: links that are to be removed together, as far as they come first, and all
    /// else one by one. The journal has all of it before the first step. Returns which steps
    /// failed; with `go_on` those after them were tried.
    async fn execute(
        &mut self,
        ops: &[Op],
        go_on: bool,
    ) -> Result<Vec<(usize, KernelError)>, JournalError> {
        self.journal.before(ops)?;
        let links: Vec<&Interface> = ops.iter().map_while(removes_link).collect();
        let mut done = 0;
        // If they cannot be removed together, one by one tells which it is.
        if self.kernel.remove_links(&links).await.is_ok() {
            done = links.len();
            self.note(&ops[..done], go_on)?;
        }
        let mut failed = Vec::new();
        for (at, op) in ops.iter().enumerate().skip(done) {
            match self.kernel.execute(op).await {
                Ok(()) => self.note(std::slice::from_ref(op), go_on)?,
                Err(error) => {
                    failed.push((at, error));
                    if !go_on {
                        break;
                    }
                }
            }
        }
        Ok(failed)
    }

    /// Notes what was carried out. With `go_on` what cannot be noted is let be: what is gone can be
    /// removed once more.
    fn note(&mut self, ops: &[Op], go_on: bool) -> Result<(), JournalError> {
        match self.journal.after(ops) {
            Err(error) if go_on => {
                tracing::debug!(%error, "not noted");
                Ok(())
            }
            result => result,
        }
    }

    /// Undoes `ops`, of which the one at `failed` was the last to be tried and may have been done
    /// in part.
    async fn undo(&mut self, ops: &[Op], failed: usize) -> Result<Vec<KernelError>, JournalError> {
        let back = way_back(&ops[..failed], &ops[failed]);
        let left = self.execute(&back, true).await?;
        // With its link has gone what was on it, and what was not tried has never been.
        let stays: BTreeSet<&Fact> = left.iter().map(|(at, _)| back[*at].fact()).collect();
        let never: Vec<Op> =
            ops.iter().map(Op::inverse).filter(|op| !stays.contains(op.fact())).collect();
        self.note(&never, true)?;
        Ok(left.into_iter().map(|(_, error)| error).collect())
    }
}

/// The steps that undo `done`, and the one after them that failed. What that was to remove is still
/// there.
fn way_back(done: &[Op], failed: &Op) -> Vec<Op> {
    let added: Vec<Fact> = done.iter().chain([failed]).filter_map(Op::added).cloned().collect();
    let mut back = removals(&added, &mut World::new(added.iter().cloned().collect()));
    back.extend(done.iter().rev().filter(|op| op.added().is_none()).map(Op::inverse));
    back
}

#[cfg(test)]
mod tests;
