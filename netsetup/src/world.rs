//! A kernel that is only thought: what plans are computed with, and what tests apply them to.

use crate::{Fact, Op, Place};
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
            Op::Add(fact) => {
                self.facts.insert(fact.clone());
            }
            Op::Remove(fact) => {
                self.facts.remove(fact);
                if !links_of(fact).is_empty() {
                    self.facts.retain(outlasts(fact));
                }
            }
        }
    }
}

/// Which facts are still true when `gone` is not: neither `gone` itself nor, if it is a link, what was on it.
pub(crate) fn outlasts(gone: &Fact) -> impl Fn(&Fact) -> bool {
    let links = links_of(gone);
    move |fact| {
        let on_it = || links.iter().any(|(place, link)| is_on(fact, place, link));
        fact != gone && !(fact.goes_with_its_link() && on_it())
    }
}

/// The links that are there because of `fact`.
fn links_of(fact: &Fact) -> Vec<(Place, String)> {
    match fact {
        Fact::Bridge { interface, .. } => vec![(Place::Host, interface.name.clone())],
        Fact::Veth { interface, endpoint, inside, .. } => vec![
            (Place::Host, interface.name.clone()),
            (Place::Endpoint(endpoint.clone()), inside.name.clone()),
        ],
        _ => Vec::new(),
    }
}

/// Whether `fact` is about that link, or about its being a port of that bridge.
fn is_on(fact: &Fact, place: &Place, name: &str) -> bool {
    match fact {
        Fact::Port { link, bridge, .. } => *place == Place::Host && (link == name || bridge == name),
        Fact::Setting { place: there, name: setting, .. } => {
            there == place && setting.split('.').nth(3) == Some(name)
        }
        Fact::Address { place: there, link, .. }
        | Fact::Up { place: there, link }
        | Fact::DefaultRoute { place: there, link, .. } => there == place && link == name,
        Fact::Bridge { .. } | Fact::Veth { .. } | Fact::Rule(_) => false,
    }
}
