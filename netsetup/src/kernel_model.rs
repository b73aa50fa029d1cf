//! An in-memory model of the kernel, for planning and tests.

use crate::{Fact, Op};
use std::collections::BTreeSet;

/// The set of facts that hold, updated by operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelModel {
    facts: BTreeSet<Fact>,
}

impl KernelModel {
    /// Creates a model in which `facts` hold.
    #[must_use]
    pub fn new(facts: BTreeSet<Fact>) -> Self {
        Self { facts }
    }

    /// Returns the facts that hold.
    #[must_use]
    pub fn facts(&self) -> &BTreeSet<Fact> {
        &self.facts
    }

    /// Returns whether `fact` holds.
    #[must_use]
    pub fn holds(&self, fact: &Fact) -> bool {
        self.facts.contains(fact)
    }

    /// Performs `op`. Removing a link also removes the facts on it.
    pub fn execute(&mut self, op: &Op) {
        match op {
            Op::Add(fact) => drop(self.facts.insert(fact.clone())),
            Op::Remove(fact) => self.remove([fact]),
        }
    }

    /// Removes `facts` and the facts on removed links, in one pass.
    pub(crate) fn remove<'a>(&mut self, facts: impl IntoIterator<Item = &'a Fact>) {
        self.facts.retain(outlasts(&facts.into_iter().collect()));
    }
}

/// Returns a predicate for the facts that remain after the removal of `gone`: all others, except
/// for facts on links in `gone`.
pub(crate) fn outlasts<'a>(gone: &'a BTreeSet<&'a Fact>) -> impl Fn(&Fact) -> bool + 'a {
    let links: BTreeSet<_> = gone.iter().flat_map(|fact| fact.links()).collect();
    move |fact| !gone.contains(fact) && !fact.on().any(|link| links.contains(&link))
}
