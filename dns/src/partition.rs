//! Partitions: who may share what upstream servers said, and how much of a bounded resource one
//! partition, and one endpoint, may hold. Pure.
//!
//! Askers that are on exactly the same networks are one partition. Cached answers and queries in
//! flight are shared within a partition only: a shared entry answers sooner and with an older TTL,
//! and so tells an asker what others asked before it.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::zone::Asker;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The networks of an asker, as numbers in ascending order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Partition(Arc<[u32]>);

impl Partition {
    /// The partition of askers on exactly `networks`.
    pub(crate) fn of(networks: impl IntoIterator<Item = u32>) -> Self {
        let mut numbers: Vec<u32> = networks.into_iter().collect();
        numbers.sort_unstable();
        Self(numbers.into())
    }
}

/// Who holds how much of a bounded resource.
///
/// A partition may take one more unit while it holds less than twice what is free (a dynamic
/// threshold, Choudhury and Hahne 1998). One greedy partition thus gets two thirds of the limit,
/// `n` of them `2 / (1 + 2n)` each, and `1 / (1 + 2n)` stays free for those that come later.
/// Nothing that is held is taken away.
#[derive(Debug)]
pub(crate) struct Shares {
    limit: usize,
    taken: usize,
    by: BTreeMap<Partition, usize>,
}

impl Shares {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, taken: 0, by: BTreeMap::new() }
    }

    /// Whether `partition` may take one more unit.
    pub(crate) fn allows(&self, partition: &Partition) -> bool {
        let held = self.by.get(partition).copied().unwrap_or(0);
        held < 2 * self.free()
    }

    /// Takes one unit for `partition`, which [`Self::allows`] has allowed.
    pub(crate) fn take(&mut self, partition: &Partition) {
        self.taken += 1;
        match self.by.get_mut(partition) {
            Some(held) => *held += 1,
            None => drop(self.by.insert(partition.clone(), 1)),
        }
    }

    /// Gives `count` units of `partition` back.
    pub(crate) fn give_back(&mut self, partition: &Partition, count: usize) {
        let Some(held) = self.by.get_mut(partition) else { return };
        let count = count.min(*held);
        *held -= count;
        self.taken -= count;
        if *held == 0 {
            self.by.remove(partition);
        }
    }

    pub(crate) fn free(&self) -> usize {
        self.limit.saturating_sub(self.taken)
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken
    }
}

/// An endpoint, as the holder of a share: who asks, and with whom it shares answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Source {
    pub(crate) partition: Partition,
    /// At a gateway where sources are not verified, all clients are one.
    pub(crate) asker: Asker,
}

/// Who holds how much of a bounded resource, by partition and endpoint.
///
/// [`Shares`] leave room to other partitions. Within a partition, and where many partitions leave
/// nothing free, the endpoint that holds most yields.
#[derive(Debug)]
pub(crate) struct Holdings {
    shares: Shares,
    by: BTreeMap<Partition, BTreeMap<Asker, usize>>,
}

impl Holdings {
    pub(crate) fn new(limit: usize) -> Self {
        Self { shares: Shares::new(limit), by: BTreeMap::new() }
    }

    /// Whether an endpoint of `partition` may take one more unit without another one yielding.
    pub(crate) fn allows(&self, partition: &Partition) -> bool {
        self.shares.allows(partition)
    }

    /// Where `source` is not allowed one more unit: the endpoint that yields one to it. It is the
    /// largest holder of the partition, or of the largest partition if nothing is free. `None` if
    /// that holds hardly more than `source`.
    pub(crate) fn yields_to(&self, source: &Source) -> Option<Source> {
        let total = |holders: &BTreeMap<Asker, usize>| holders.values().sum::<usize>();
        let (partition, holders) = if self.shares.free() == 0 {
            self.by.iter().max_by_key(|(_, holders)| total(holders))?
        } else {
            self.by.get_key_value(&source.partition)?
        };
        let (asker, most) = holders.iter().max_by_key(|(_, held)| **held)?;
        (*most > self.held(source) + 1)
            .then(|| Source { partition: partition.clone(), asker: asker.clone() })
    }

    /// Takes one unit for `source`.
    pub(crate) fn take(&mut self, source: &Source) {
        self.shares.take(&source.partition);
        let holders = self.by.entry(source.partition.clone()).or_default();
        *holders.entry(source.asker.clone()).or_default() += 1;
    }

    /// Gives one unit of `source` back.
    pub(crate) fn give_back(&mut self, source: &Source) {
        let Some(holders) = self.by.get_mut(&source.partition) else { return };
        let Some(held) = holders.get_mut(&source.asker) else { return };
        *held -= 1;
        self.shares.give_back(&source.partition, 1);
        if *held == 0 {
            holders.remove(&source.asker);
            if holders.is_empty() {
                self.by.remove(&source.partition);
            }
        }
    }

    pub(crate) fn held(&self, source: &Source) -> usize {
        self.by
            .get(&source.partition)
            .and_then(|holders| holders.get(&source.asker))
            .copied()
            .unwrap_or(0)
    }

    /// What the endpoint holds that holds most.
    pub(crate) fn most(&self) -> usize {
        self.by.values().flat_map(BTreeMap::values).copied().max().unwrap_or(0)
    }

    pub(crate) fn taken(&self) -> usize {
        self.shares.taken()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(partition: u32, name: &str) -> Source {
        Source { partition: Partition::of([partition]), asker: Asker::Container(name.into()) }
    }

    #[test]
    fn the_largest_endpoint_of_a_partition_yields_to_a_smaller_one() {
        let mut holdings = Holdings::new(9);
        let [greedy, modest, other] =
            [source(1, "greedy"), source(1, "modest"), source(2, "other")];
        while holdings.allows(&greedy.partition) {
            holdings.take(&greedy);
        }
        assert_eq!(holdings.held(&greedy), 6);
        assert_eq!(holdings.yields_to(&modest), Some(greedy.clone()));
        assert_eq!(holdings.yields_to(&greedy), None, "not to itself");
        assert!(holdings.allows(&other.partition));
        (0..3).for_each(|_| holdings.take(&other));
        assert_eq!(
            holdings.yields_to(&source(3, "third")),
            Some(greedy.clone()),
            "nothing is free"
        );
        (0..6).for_each(|_| holdings.give_back(&greedy));
        holdings.give_back(&greedy);
        assert_eq!((holdings.taken(), holdings.most()), (3, 3));
    }

    /// Takes as much as there is for `partition`; how much that was.
    fn fill(shares: &mut Shares, partition: &Partition) -> usize {
        let mut count = 0;
        while shares.allows(partition) {
            shares.take(partition);
            count += 1;
        }
        count
    }

    #[test]
    fn networks_in_any_order_are_one_partition() {
        assert_eq!(Partition::of([2, 1]), Partition::of([1, 2]));
        assert_ne!(Partition::of([1]), Partition::of([1, 2]));
    }

    #[test]
    fn one_partition_cannot_use_up_a_limit() {
        let mut shares = Shares::new(9_000);
        let [one, two, three] = [1, 2, 3].map(|number| Partition::of([number]));
        assert_eq!(fill(&mut shares, &one), 6_000);
        assert_eq!(fill(&mut shares, &two), 2_000);
        assert!(fill(&mut shares, &three) > 600);
        assert!(shares.free() > 0);
        shares.give_back(&one, 6_000);
        shares.give_back(&one, 1);
        assert!(fill(&mut shares, &two) > 2_000, "what is given back can be taken");
    }

    #[test]
    fn the_smallest_limit_can_be_used() {
        let mut shares = Shares::new(1);
        let one = Partition::of([1]);
        assert_eq!(fill(&mut shares, &one), 1);
        shares.give_back(&one, 1);
        assert_eq!((shares.taken(), shares.free(), shares.by.len()), (0, 1, 0));
    }
}
