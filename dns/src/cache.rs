//! Answers of other servers, kept for as long as they hold (RFC 1035 section 7.4, RFC 2308). Pure.
//!
//! Answers about endpoints are never in here. Each [`Partition`] sees its own entries only. A full
//! cache evicts from the partition that holds most bytes, and there what would expire first: a
//! partition that floods the cache evicts its own entries.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::answer::Answer;
use crate::message::Bits;
use crate::partition::Partition;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// What an answer is an answer to, and for whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) partition: Partition,
    /// The number of the list of servers.
    pub(crate) servers: u32,
    pub(crate) kind: u16,
    pub(crate) bits: Bits,
    /// In lower case.
    pub(crate) name: Box<[u8]>,
}

/// Bytes that an entry takes besides its answer and its name, estimated.
const OVERHEAD: usize = 350;

#[derive(Debug)]
struct Entry {
    answer: Arc<Answer>,
    came: Instant,
    ends: Instant,
    number: u64,
    size: usize,
}

/// Keys by expiry. The number makes equal times distinct.
type Order = BTreeMap<(Instant, u64), Key>;

/// The entries of one partition.
#[derive(Debug, Default)]
struct Share {
    order: Order,
    size: usize,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct Cache {
    entries: HashMap<Key, Entry>,
    order: Order,
    shares: BTreeMap<Partition, Share>,
    /// The partitions by the bytes that they hold; each partition in `shares` is in here once.
    sizes: BTreeSet<(usize, Partition)>,
    size: usize,
    limit: usize,
    next: u64,
}

impl Cache {
    /// One that takes `limit` bytes at most.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            entries: HashMap::new(),
            order: Order::new(),
            shares: BTreeMap::new(),
            sizes: BTreeSet::new(),
            size: 0,
            limit,
            next: 0,
        }
    }

    /// The answer to `key`, and when it came.
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<(&Arc<Answer>, Instant)> {
        self.entries
            .get(key)
            .filter(|entry| now < entry.ends)
            .map(|entry| (&entry.answer, entry.came))
    }

    /// Keeps an answer for as long as it holds. Returns how many others were evicted for it.
    pub(crate) fn put(&mut self, key: Key, answer: Arc<Answer>, now: Instant) -> usize {
        let keep = answer.keep();
        let size = answer.size() + 2 * key.name.len() + OVERHEAD;
        if keep.is_zero() || size > self.limit {
            return 0;
        }
        self.remove(&key);
        while let Some(entry) = self.order.first_entry().filter(|entry| entry.key().0 <= now) {
            let expired = entry.get().clone();
            self.remove(&expired);
        }
        let mut evicted = 0;
        while self.size + size > self.limit {
            let Some(victim) = self.victim(&key.partition, size) else { return evicted };
            self.remove(&victim);
            evicted += 1;
        }
        let (ends, number) = (now + keep, self.next);
        self.next += 1;
        self.order.insert((ends, number), key.clone());
        self.change_share(&key.partition, |share| {
            share.size += size;
            share.order.insert((ends, number), key.clone());
        });
        self.size += size;
        self.entries.insert(key, Entry { answer, came: now, ends, number, size });
        evicted
    }

    /// What is evicted so that `partition` can have `size` bytes more; `None` if those are too many
    /// for its share.
    fn victim(&self, partition: &Partition, size: usize) -> Option<Key> {
        let first = |share: &Share| share.order.first_key_value().map(|(_, key)| key.clone());
        let own = self.shares.get(partition);
        let wanted = own.map_or(0, |share| share.size) + size;
        let (largest, holder) = self.sizes.last()?;
        match own {
            Some(share) if *largest <= wanted => first(share),
            None if *largest < wanted => None,
            _ => self.shares.get(holder).and_then(first),
        }
    }

    fn remove(&mut self, key: &Key) {
        let Some(entry) = self.entries.remove(key) else { return };
        let place = (entry.ends, entry.number);
        self.order.remove(&place);
        self.change_share(&key.partition, |share| {
            share.size -= entry.size;
            share.order.remove(&place);
        });
        self.size -= entry.size;
    }

    /// Changes what `partition` holds.
    fn change_share(&mut self, partition: &Partition, change: impl FnOnce(&mut Share)) {
        let share = self.shares.entry(partition.clone()).or_default();
        let before = share.size;
        change(share);
        let after = share.size;
        self.sizes.remove(&(before, partition.clone()));
        if share.order.is_empty() {
            self.shares.remove(partition);
        } else {
            self.sizes.insert((after, partition.clone()));
        }
    }

    /// Forgets everything that servers of the list `servers` have said.
    pub(crate) fn forget(&mut self, servers: u32) {
        let theirs: Vec<Key> =
            self.order.values().filter(|key| key.servers == servers).cloned().collect();
        for key in theirs {
            self.remove(&key);
        }
    }

    /// How many bytes they take, estimated.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// How many answers are kept.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests;
