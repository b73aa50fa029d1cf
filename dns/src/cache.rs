//! Cache of upstream responses (RFC 1035 section 7.4, RFC 2308). Pure.
//!
//! Names of endpoints are never cached. Each [`Partition`] has its own entries. A full cache evicts
//! from the partition that holds most bytes, and there the entry that expires first, so a partition
//! that floods the cache evicts its own entries.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::answer::Answer;
use crate::message::Bits;
use crate::partition::Partition;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// The key of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) partition: Partition,
    /// Number of the server list ([`ServerList::number`](crate::servers::ServerList)).
    pub(crate) servers: u32,
    pub(crate) kind: u16,
    pub(crate) bits: Bits,
    /// The name in wire format, in lower case.
    pub(crate) name: Box<[u8]>,
}

/// Estimated size of an entry without its response and name, in bytes.
const OVERHEAD: usize = 350;

#[derive(Debug)]
struct Entry {
    answer: Arc<Answer>,
    received: Instant,
    expires: Instant,
    number: u64,
    size: usize,
}

/// Keys by expiry. The sequence number distinguishes equal times.
type Order = BTreeMap<(Instant, u64), Key>;

/// The entries of one partition.
#[derive(Debug, Default)]
struct Share {
    order: Order,
    size: usize,
}

/// The cache of all partitions.
#[derive(Debug)]
pub(crate) struct Cache {
    entries: HashMap<Key, Entry>,
    order: Order,
    shares: BTreeMap<Partition, Share>,
    /// Partitions by the bytes that they hold. Contains each partition of `shares` once.
    sizes: BTreeSet<(usize, Partition)>,
    size: usize,
    limit: usize,
    next: u64,
}

impl Cache {
    /// Creates an empty cache of at most `limit` bytes, estimated.
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

    /// Returns the unexpired response for `key`, and when it was received.
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<(&Arc<Answer>, Instant)> {
        self.entries
            .get(key)
            .filter(|entry| now < entry.expires)
            .map(|entry| (&entry.answer, entry.received))
    }

    /// Stores a response until it expires. Returns the number of evicted entries.
    pub(crate) fn put(&mut self, key: Key, answer: Arc<Answer>, now: Instant) -> usize {
        let lifetime = answer.lifetime();
        let size = answer.size() + 2 * key.name.len() + OVERHEAD;
        if lifetime.is_zero() || size > self.limit {
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
        let (expires, number) = (now + lifetime, self.next);
        self.next += 1;
        self.order.insert((expires, number), key.clone());
        self.change_share(&key.partition, |share| {
            share.size += size;
            share.order.insert((expires, number), key.clone());
        });
        self.size += size;
        self.entries.insert(key, Entry { answer, received: now, expires, number, size });
        evicted
    }

    /// The entry to evict so that `partition` can store `size` more bytes; `None` if that exceeds
    /// its share.
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
        let place = (entry.expires, entry.number);
        self.order.remove(&place);
        self.change_share(&key.partition, |share| {
            share.size -= entry.size;
            share.order.remove(&place);
        });
        self.size -= entry.size;
    }

    /// Applies `change` to the share of `partition` and updates the indexes.
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

    /// Removes all responses from servers of the list with number `servers`.
    pub(crate) fn forget(&mut self, servers: u32) {
        let theirs: Vec<Key> =
            self.order.values().filter(|key| key.servers == servers).cloned().collect();
        for key in theirs {
            self.remove(&key);
        }
    }

    /// Size of all entries in bytes, estimated.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests;
