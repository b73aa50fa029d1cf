//! Plan, apply, verify, and take it all back.

use crate::plan::{plan_again, removals};
use crate::{
    ApplyError, ConflictError, Desired, Fact, Interface, Isolation, Journal, JournalError, Kernel,
    KernelError, Observed, Op, Place, World, plan,
};
use std::collections::BTreeSet;
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
        Op::Remove(Fact::Bridge { interface, .. } | Fact::Veth { interface, .. }) => Some(interface),
        _ => None,
    }
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

    /// Makes it so where an earlier version of `desired` has been applied. What is new comes before what is over, so that
    /// nothing opens in between. Returns the number of steps.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn change(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let added = self.repair(desired).await?;
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

    /// Puts back what someone else has removed or changed of the networks of `desired`, which must have been applied: their bridges and
    /// what keeps them closed. Endpoints are looked at only if a bridge was gone. Returns the number of steps.
    ///
    /// # Errors
    /// [`SetupError`].
    pub async fn repair(&mut self, desired: &Desired) -> Result<usize, SetupError> {
        let networks = desired.without_endpoints();
        let mut ops = self.plan_part(&networks).await?;
        ops.extend(self.missing_of_ports(desired).await?);
        self.carry_out(&ops).await?;
        let others = if ops.iter().any(|op| op.fact().is_link()) { self.apply(desired).await? } else { 0 };
        Ok(ops.len() + others)
    }

    /// What is missing of the bridge ports of `desired` whose links are there.
    async fn missing_of_ports(&mut self, desired: &Desired) -> Result<Vec<Op>, SetupError> {
        let facts = desired.port_facts();
        let observed = self.kernel.observe(&facts).await?;
        let links = observed.links.get(&Place::Host);
        let is_there = |name: &str| links.is_some_and(|links| links.contains_key(name));
        let missing = facts.into_iter().filter(|fact| !observed.facts.contains(fact));
        Ok(missing.filter(|fact| fact.on().all(|(_, link)| is_there(link))).map(Op::Add).collect())
    }

    /// Whether the gates and port guards of `desired` are still attached; nothing announces it when one is detached.
    /// Links that are not there are no matter of this.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn programs_hold(&mut self, desired: &Desired) -> Result<bool, KernelError> {
        let facts = desired.facts(&*self.isolation);
        self.kernel.programs_hold(&facts).await
    }

    /// Plugs the endpoint `name` of `desired`, which must have been applied, into `namespace`: its container has come back in
    /// another one. It keeps its interfaces, addresses and routes; other endpoints are not touched. In the namespace that it is in
    /// already, what is missing is made again. Returns the number of steps.
    ///
    /// # Errors
    /// [`SetupError`]. Where it cannot be, because an interface is in the way for instance, nothing was changed; where a step
    /// fails, the endpoint is unplugged.
    pub async fn replug(
        &mut self,
        desired: &Desired,
        name: &str,
        namespace: Namespace,
    ) -> Result<usize, SetupError> {
        let part = desired.with_endpoint(name);
        let old = self.kernel.add_endpoint(name, namespace.clone());
        if let Some(old) = old.filter(|old| old.id() != namespace.id()) {
            let fits = self.plan_part(&part).await;
            self.kernel.add_endpoint(name, old);
            fits?;
            self.unplug(name).await?;
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
    async fn unplug(&mut self, name: &str) -> Result<(), SetupError> {
        let facts = self.journal.facts().iter().rev().filter(|fact| fact.is_of_endpoint(name)).cloned();
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
                    tracing::debug!(%error, "not taken back in a namespace that is left");
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
            return Err(ApplyError { op: Box::new(ops[at].clone()), source, left: Vec::new() }.into());
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

    /// Carries `ops` out: links that are to be removed together, as far as they come first, and all else one by one. The
    /// journal has all of it before the first step. Returns which steps failed; with `go_on` those after them were tried.
    async fn execute(&mut self, ops: &[Op], go_on: bool) -> Result<Vec<(usize, KernelError)>, JournalError> {
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

    /// Notes what was carried out. With `go_on` what cannot be noted is let be: what is gone can be removed once more.
    fn note(&mut self, ops: &[Op], go_on: bool) -> Result<(), JournalError> {
        match self.journal.after(ops) {
            Err(error) if go_on => {
                tracing::debug!(%error, "not noted");
                Ok(())
            }
            result => result,
        }
    }

    /// Undoes `ops`, of which the one at `failed` was the last to be tried and may have been done in part.
    async fn undo(&mut self, ops: &[Op], failed: usize) -> Result<Vec<KernelError>, JournalError> {
        let back = way_back(&ops[..failed], &ops[failed]);
        let left = self.execute(&back, true).await?;
        // With its link has gone what was on it, and what was not tried has never been.
        let stays: BTreeSet<&Fact> = left.iter().map(|(at, _)| back[*at].fact()).collect();
        let never: Vec<Op> = ops.iter().map(Op::inverse).filter(|op| !stays.contains(op.fact())).collect();
        self.note(&never, true)?;
        Ok(left.into_iter().map(|(_, error)| error).collect())
    }
}

/// The steps that undo `done`, and the one after them that failed. What that was to remove is still there.
fn way_back(done: &[Op], failed: &Op) -> Vec<Op> {
    let added: Vec<Fact> = done.iter().chain([failed]).filter_map(Op::added).cloned().collect();
    let mut back = removals(&added, &mut World::new(added.iter().cloned().collect()));
    back.extend(done.iter().rev().filter(|op| op.added().is_none()).map(Op::inverse));
    back
}

#[cfg(test)]
mod tests;
