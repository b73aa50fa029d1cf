//! Answers of other servers, kept for as long as they hold (RFC 1035 section 7.4, RFC 2308). Pure.
//!
//! What names of endpoints say is never in here. Full, it gives up what would have ended first.

use crate::answer::Answer;
use crate::message::Bits;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// What an answer is an answer to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    /// The number of the list of servers.
    pub(crate) servers: u32,
    pub(crate) kind: u16,
    pub(crate) bits: Bits,
    /// In lower case.
    pub(crate) name: Box<[u8]>,
}

/// Bytes that an entry takes beside its answer and its name, about.
const OVERHEAD: usize = 250;

#[derive(Debug)]
struct Entry {
    answer: Arc<Answer>,
    came: Instant,
    ends: Instant,
    number: u64,
    size: usize,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct Cache {
    entries: HashMap<Key, Entry>,
    /// By when they end.
    order: BTreeMap<(Instant, u64), Key>,
    size: usize,
    limit: usize,
    next: u64,
}

impl Cache {
    /// One that takes `limit` bytes at most.
    pub(crate) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), order: BTreeMap::new(), size: 0, limit, next: 0 }
    }

    /// The answer to `key`, and when it came.
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<(&Arc<Answer>, Instant)> {
        self.entries.get(key).filter(|entry| now < entry.ends).map(|entry| (&entry.answer, entry.came))
    }

    /// Keeps an answer for as long as it holds. Returns how many others had to go for it.
    pub(crate) fn put(&mut self, key: Key, answer: Arc<Answer>, now: Instant) -> usize {
        let keep = answer.keep();
        let size = answer.size() + 2 * key.name.len() + OVERHEAD;
        if keep.is_zero() || size > self.limit {
            return 0;
        }
        self.remove(&key);
        let mut evicted = 0;
        while let Some(entry) = self.order.first_entry() {
            let over = entry.key().0 <= now;
            if !over && self.size + size <= self.limit {
                break;
            }
            let key = entry.get().clone();
            self.remove(&key);
            evicted += usize::from(!over);
        }
        let (ends, number) = (now + keep, self.next);
        self.next += 1;
        self.size += size;
        self.order.insert((ends, number), key.clone());
        self.entries.insert(key, Entry { answer, came: now, ends, number, size });
        evicted
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.order.remove(&(entry.ends, entry.number));
            self.size -= entry.size;
        }
    }

    /// Forgets all that servers of the list `servers` have said.
    pub(crate) fn forget(&mut self, servers: u32) {
        let theirs: Vec<Key> = self.order.values().filter(|key| key.servers == servers).cloned().collect();
        for key in theirs {
            self.remove(&key);
        }
    }

    /// How many bytes they take, about.
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
