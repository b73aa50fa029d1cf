//! A table of slots with generational keys.
//!
//! An epoll event identifies a descriptor by the number it was registered with. By the time the
//! event is read, the connection may have been closed and its slot reused. A [`Key`] therefore
//! includes the generation of the slot, and a lookup with a stale key returns nothing.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

/// Identifies one use of one slot of an [`Arena`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// A growable table of `T`. Freed slots are reused, most recently freed first, because they are in
/// the cache.
#[derive(Debug)]
pub struct Arena<T> {
    slots: Vec<Slot<T>>,
    /// Head of the free list.
    vacant: Option<u32>,
    len: usize,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    entry: Entry<T>,
}

#[derive(Debug)]
enum Entry<T> {
    Occupied(T),
    Vacant { next: Option<u32> },
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), vacant: None, len: 0 }
    }
}

impl<T> Arena<T> {
    /// Maximum number of slots: an index must fit the 28 bits that a token has for it.
    pub const MAX_SLOTS: usize = 1 << 28;

    /// Creates an empty arena without allocating.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of occupied slots.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no slot is occupied.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Stores `value` in a free slot.
    ///
    /// # Panics
    /// If all [`Self::MAX_SLOTS`] are occupied. The limits of the callers are far lower.
    pub fn insert(&mut self, value: T) -> Key {
        self.insert_with(|_| value)
    }

    /// Stores in a free slot the value that `make` builds from the key.
    pub fn insert_with(&mut self, make: impl FnOnce(Key) -> T) -> Key {
        let index = self.vacant.unwrap_or_else(|| {
            assert!(self.slots.len() < Self::MAX_SLOTS, "arena is full");
            self.slots.push(Slot { generation: 0, entry: Entry::Vacant { next: None } });
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        let Entry::Vacant { next } = slot.entry else {
            unreachable!("the free list holds vacant slots only")
        };
        let key = Key { index, generation: slot.generation };
        slot.entry = Entry::Occupied(make(key));
        self.vacant = next;
        self.len += 1;
        key
    }

    /// Returns the value of `key`, unless the key is stale.
    pub fn get(&self, key: Key) -> Option<&T> {
        match self.slots.get(key.index as usize)? {
            Slot { generation, entry: Entry::Occupied(value) } if *generation == key.generation => {
                Some(value)
            }
            _ => None,
        }
    }

    /// Like [`Self::get`], mutably.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        match self.slots.get_mut(key.index as usize)? {
            Slot { generation, entry: Entry::Occupied(value) } if *generation == key.generation => {
                Some(value)
            }
            _ => None,
        }
    }

    /// Frees the slot and returns its value. All copies of `key` become stale.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        let slot = &mut self.slots[key.index as usize];
        let entry = std::mem::replace(&mut slot.entry, Entry::Vacant { next: self.vacant });
        slot.generation = slot.generation.wrapping_add(1);
        self.vacant = Some(key.index);
        self.len -= 1;
        match entry {
            Entry::Occupied(value) => Some(value),
            Entry::Vacant { .. } => None,
        }
    }

    /// The occupied slots, ordered by index.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| match &slot.entry {
            Entry::Occupied(value) => {
                Some((Key { index: index as u32, generation: slot.generation }, value))
            }
            Entry::Vacant { .. } => None,
        })
    }

    /// The keys of the occupied slots, for a caller that modifies the arena while iterating.
    pub fn keys(&self) -> Vec<Key> {
        self.iter().map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_stale_key_finds_nothing() {
        let mut arena = Arena::new();
        let first = arena.insert("first");
        assert_eq!(arena.remove(first), Some("first"));
        let second = arena.insert("second");
        assert_eq!(first.index, second.index, "the slot is reused");
        assert_eq!(arena.get(first), None);
        assert_eq!(arena.remove(first), None);
        assert_eq!(arena.get(second), Some(&"second"));
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(operations in prop::collection::vec((any::<bool>(), any::<u8>()), 0..200)) {
            let mut arena = Arena::new();
            let mut map = BTreeMap::new();
            let mut keys = Vec::new();
            for (insert, value) in operations {
                if insert || keys.is_empty() {
                    let key = arena.insert(value);
                    prop_assert!(map.insert(key, value).is_none(), "keys are unique");
                    keys.push(key);
                } else {
                    let key = keys[usize::from(value) % keys.len()];
                    prop_assert_eq!(arena.remove(key), map.remove(&key));
                }
                prop_assert_eq!(arena.len(), map.len());
                for key in &keys {
                    prop_assert_eq!(arena.get(*key), map.get(key));
                }
            }
        }
    }
}
