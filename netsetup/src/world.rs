//! A kernel that is only thought: what plans are computed with, and what tests apply them to.

use crate::{Fact, Op};
use std::collections::BTreeSet;

/// The facts that are true, and what becomes of them as operations are carried out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    facts: BTreeSet<Fact>,
}

impl World {
    /// One in which `facts` are true.
    #[must_use]
    pub fn new(facts: BTreeSet<Fact>) -> Self {
        Self { facts }
    }

    /// What is true.
    #[must_use]
    pub fn facts(&self) -> &BTreeSet<Fact> {
        &self.facts
    }

    /// Whether `fact` is true.
    #[must_use]
    pub fn holds(&self, fact: &Fact) -> bool {
        self.facts.contains(fact)
    }

    /// Carries `op` out. With a link goes what was on it.
    pub fn execute(&mut self, op: &Op) {
        match op {
            Op::Add(fact) => drop(self.facts.insert(fact.clone())),
            Op::Remove(fact) => self.remove([fact]),
        }
    }

    /// Removes `facts`, and with links what was on them, in one go through all.
    pub(crate) fn remove<'a>(&mut self, facts: impl IntoIterator<Item = &'a Fact>) {
        self.facts.retain(outlasts(&facts.into_iter().collect()));
    }
}

/// Which facts are still true when those that are `gone` are not: neither they themselves nor, of
/// links, what was on them.
pub(crate) fn outlasts<'a>(gone: &'a BTreeSet<&'a Fact>) -> impl Fn(&Fact) -> bool + 'a {
    let links: BTreeSet<_> = gone.iter().flat_map(|fact| fact.links()).collect();
    move |fact| !gone.contains(fact) && !fact.on().any(|link| links.contains(&link))
}
