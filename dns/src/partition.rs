//! Partitions: clients that share upstream responses, and the share of a bounded resource that one
//! partition, or one endpoint, may hold. Pure.
//!
//! Clients on exactly the same networks form one partition. Cached responses and outstanding
//! queries are shared only within a partition: a shared entry responds sooner and with a reduced
//! TTL, which reveals what was queried before.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::client_id::ClientId;
use std::collections::BTreeMap;
use std::sync::Arc;
use tidegate_model::may_take;

/// The networks of a client, as numbers in ascending order.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Partition(Arc<[u32]>);

impl Partition {
    /// The partition of clients on exactly `networks`.
    pub(crate) fn of(networks: impl IntoIterator<Item = u32>) -> Self {
        let mut numbers: Vec<u32> = networks.into_iter().collect();
        numbers.sort_unstable();
        Self(numbers.into())
    }
}

/// The units of a bounded resource that each partition holds.
///
/// A partition may take one more unit while it holds fewer than twice as many units as are free
/// (dynamic threshold, Choudhury and Hahne 1998). One greedy partition thus gets two thirds of the
/// limit. `n` greedy partitions get `2 / (1 + 2n)` each, and `1 / (1 + 2n)` stays free for others.
/// Units in use are never revoked.
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
        may_take(self.by.get(partition).copied().unwrap_or(0), self.free())
    }

    /// Takes one unit for `partition`, which [`Self::allows`] has allowed.
    pub(crate) fn take(&mut self, partition: &Partition) {
        self.taken += 1;
        match self.by.get_mut(partition) {
            Some(held) => *held += 1,
            None => drop(self.by.insert(partition.clone(), 1)),
        }
    }

    /// Releases `count` units of `partition`.
    pub(crate) fn release(&mut self, partition: &Partition, count: usize) {
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

/// An endpoint as the holder of a share.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Source {
    pub(crate) partition: Partition,
    /// At a gateway with unverified source addresses, all clients are one.
    pub(crate) client_id: ClientId,
}

/// The units of a bounded resource that each endpoint holds, by partition.
///
/// [`Shares`] leave units for other partitions. Within a partition, and where many partitions leave
/// nothing free, the largest holder loses one.
#[derive(Debug)]
pub(crate) struct Holdings {
    shares: Shares,
    by: BTreeMap<Partition, BTreeMap<ClientId, usize>>,
}

impl Holdings {
    pub(crate) fn new(limit: usize) -> Self {
        Self { shares: Shares::new(limit), by: BTreeMap::new() }
    }

    /// Whether an endpoint of `partition` may take one more unit without an eviction.
    pub(crate) fn allows(&self, partition: &Partition) -> bool {
        self.shares.allows(partition)
    }

    /// The endpoint that loses a unit to `source` at a limit: the largest holder of the partition,
    /// or of the largest partition if nothing is free. `None` unless it holds at least two more
    /// than `source`.
    pub(crate) fn eviction_victim(&self, source: &Source) -> Option<Source> {
        let total = |holders: &BTreeMap<ClientId, usize>| holders.values().sum::<usize>();
        let (partition, holders) = if self.shares.free() == 0 {
            self.by.iter().max_by_key(|(_, holders)| total(holders))?
        } else {
            self.by.get_key_value(&source.partition)?
        };
        let (client_id, largest) = holders.iter().max_by_key(|(_, held)| **held)?;
        (*largest > self.held(source) + 1)
            .then(|| Source { partition: partition.clone(), client_id: client_id.clone() })
    }

    /// Takes one unit for `source`.
    pub(crate) fn take(&mut self, source: &Source) {
        self.shares.take(&source.partition);
        let holders = self.by.entry(source.partition.clone()).or_default();
        *holders.entry(source.client_id.clone()).or_default() += 1;
    }

    /// Releases one unit of `source`.
    pub(crate) fn release(&mut self, source: &Source) {
        let Some(holders) = self.by.get_mut(&source.partition) else { return };
        let Some(held) = holders.get_mut(&source.client_id) else { return };
        *held -= 1;
        self.shares.release(&source.partition, 1);
        if *held == 0 {
            holders.remove(&source.client_id);
            if holders.is_empty() {
                self.by.remove(&source.partition);
            }
        }
    }

    pub(crate) fn held(&self, source: &Source) -> usize {
        self.by
            .get(&source.partition)
            .and_then(|holders| holders.get(&source.client_id))
            .copied()
            .unwrap_or(0)
    }

    /// The number of units of the largest holder.
    pub(crate) fn largest(&self) -> usize {
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
        Source {
            partition: Partition::of([partition]),
            client_id: ClientId::Container(name.into()),
        }
    }

    #[test]
    fn the_largest_endpoint_of_a_partition_loses_to_a_smaller_one() {
        let mut holdings = Holdings::new(9);
        let [greedy, modest, other] =
            [source(1, "greedy"), source(1, "modest"), source(2, "other")];
        while holdings.allows(&greedy.partition) {
            holdings.take(&greedy);
        }
        assert_eq!(holdings.held(&greedy), 6);
        assert_eq!(holdings.eviction_victim(&modest), Some(greedy.clone()));
        assert_eq!(holdings.eviction_victim(&greedy), None, "not to itself");
        assert!(holdings.allows(&other.partition));
        (0..3).for_each(|_| holdings.take(&other));
        assert_eq!(
            holdings.eviction_victim(&source(3, "third")),
            Some(greedy.clone()),
            "nothing is free"
        );
        (0..6).for_each(|_| holdings.release(&greedy));
        holdings.release(&greedy);
        assert_eq!((holdings.taken(), holdings.largest()), (3, 3));
    }

    /// Takes units for `partition` until it is refused. Returns their number.
    fn fill(shares: &mut Shares, partition: &Partition) -> usize {
        let mut count = 0;
        while shares.allows(partition) {
            shares.take(partition);
            count += 1;
        }
        count
    }

    #[test]
    fn the_order_of_networks_does_not_matter() {
        assert_eq!(Partition::of([2, 1]), Partition::of([1, 2]));
        assert_ne!(Partition::of([1]), Partition::of([1, 2]));
    }

    #[test]
    fn one_partition_cannot_exhaust_a_limit() {
        let mut shares = Shares::new(9_000);
        let [one, two, three] = [1, 2, 3].map(|number| Partition::of([number]));
        assert_eq!(fill(&mut shares, &one), 6_000);
        assert_eq!(fill(&mut shares, &two), 2_000);
        assert!(fill(&mut shares, &three) > 600);
        assert!(shares.free() > 0);
        shares.release(&one, 6_000);
        shares.release(&one, 1);
        assert!(fill(&mut shares, &two) > 2_000, "released units can be taken");
    }

    #[test]
    fn a_limit_of_one_can_be_used() {
        let mut shares = Shares::new(1);
        let one = Partition::of([1]);
        assert_eq!(fill(&mut shares, &one), 1);
        shares.release(&one, 1);
        assert_eq!((shares.taken(), shares.free(), shares.by.len()), (0, 1, 0));
    }
}
