//! Intrusive lists of [`Arena`] slots, oldest first. Finding the oldest slot, moving a slot to the
//! newest end and removing a slot take constant time.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::{Arena, Key};

/// The links of a slot in one list.
#[derive(Clone, Copy, Debug, Default)]
pub struct Links {
    older: Option<Key>,
    newer: Option<Key>,
}

/// An intrusive list. A slot may be in several lists, so each operation takes a function that
/// returns the [`Links`] of a slot for this list.
#[derive(Clone, Copy, Debug, Default)]
pub struct List {
    oldest: Option<Key>,
    newest: Option<Key>,
}

impl List {
    /// The oldest slot.
    pub fn oldest(&self) -> Option<Key> {
        self.oldest
    }

    /// Whether the list is empty.
    pub fn is_empty(&self) -> bool {
        self.oldest.is_none()
    }

    /// The slots, oldest first.
    pub fn iter<'a, T>(
        &self,
        arena: &'a Arena<T>,
        links: impl Fn(&T) -> &Links + 'a,
    ) -> impl Iterator<Item = Key> + 'a {
        std::iter::successors(self.oldest, move |key| links(arena.get(*key)?).newer)
    }

    /// Appends `key` as the newest. It must not be in a list that uses the same `links`.
    pub fn append<T>(
        &mut self,
        arena: &mut Arena<T>,
        key: Key,
        links: impl Fn(&mut T) -> &mut Links,
    ) {
        let Some(slot) = arena.get_mut(key) else { return };
        *links(slot) = Links { older: self.newest, newer: None };
        match self.newest.replace(key).and_then(|before| arena.get_mut(before)) {
            Some(before) => links(before).newer = Some(key),
            None => self.oldest = Some(key),
        }
    }

    /// Removes `key`, which must be in this list.
    pub fn remove<T>(
        &mut self,
        arena: &mut Arena<T>,
        key: Key,
        links: impl Fn(&mut T) -> &mut Links,
    ) {
        let Some(slot) = arena.get_mut(key) else { return };
        let Links { older, newer } = std::mem::take(links(slot));
        match older.and_then(|older| arena.get_mut(older)) {
            Some(older) => links(older).newer = newer,
            None => self.oldest = newer,
        }
        match newer.and_then(|newer| arena.get_mut(newer)) {
            Some(newer) => links(newer).older = older,
            None => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_vector(steps in prop::collection::vec((0_usize..6, 0_u8..3), 0..100)) {
            let mut arena: Arena<Links> = Arena::new();
            let keys: Vec<Key> = (0..6).map(|_| arena.insert(Links::default())).collect();
            let (mut list, mut oracle) = (List::default(), Vec::new());
            for (which, what) in steps {
                let key = keys[which];
                let at = oracle.iter().position(|other| *other == key);
                if let Some(at) = at {
                    list.remove(&mut arena, key, |links| links);
                    oracle.remove(at);
                }
                if what > 0 {
                    list.append(&mut arena, key, |links| links);
                    oracle.push(key);
                }
                prop_assert_eq!(list.oldest(), oracle.first().copied());
                prop_assert_eq!(list.is_empty(), oracle.is_empty());
                prop_assert_eq!(list.iter(&arena, |links| links).collect::<Vec<_>>(), oracle.clone());
            }
        }
    }
}
