//! Partitions: who may share what upstream servers said, and how much of a bounded resource one
//! partition may hold. Pure.
//!
//! Askers that are on exactly the same networks are one partition. Cached answers and queries in
//! flight are shared within a partition only: a shared entry answers sooner and with an older TTL,
//! and so tells an asker what others asked before it.

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

#[cfg(test)]
mod tests {
    use super::*;

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
