//! The allowance of file descriptors.
//!
//! A process that runs into `RLIMIT_NOFILE` learns it from whichever call comes next, usually
//! half-way through something that needs two descriptors. Counting them beforehand turns that into
//! a decision: what cannot have all it needs is not begun.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many descriptors may be in use, shared by all loops of a process.
#[derive(Debug)]
pub struct Descriptors {
    taken: AtomicUsize,
    limit: usize,
}

/// The right to have some descriptors open; dropped, it goes back.
#[derive(Debug)]
pub struct Permit {
    descriptors: Arc<Descriptors>,
    count: u32,
}

impl Descriptors {
    /// An allowance of `limit` descriptors.
    pub const fn new(limit: usize) -> Self {
        Self { taken: AtomicUsize::new(0), limit }
    }

    /// The process's own allowance: its soft `RLIMIT_NOFILE` less `reserved` for everything that is
    /// not counted here.
    pub fn of_process(reserved: usize) -> Self {
        let soft = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let soft = soft.and_then(|soft| usize::try_from(soft).ok()).unwrap_or(usize::MAX);
        Self::new(soft.saturating_sub(reserved))
    }

    /// The right to `count` more, if that many are left.
    pub fn take(self: &Arc<Self>, count: u32) -> Option<Permit> {
        let wanted = count as usize;
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                taken.checked_add(wanted).filter(|sum| *sum <= self.limit)
            })
            .ok()
            .map(|_| Permit { descriptors: Arc::clone(self), count })
    }

    /// How many may still be taken.
    pub fn left(&self) -> usize {
        self.limit.saturating_sub(self.taken())
    }

    /// How many are in use.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// How many there may be.
    pub fn limit(&self) -> usize {
        self.limit
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.descriptors.taken.fetch_sub(self.count as usize, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_have_all_it_needs_gets_nothing() {
        let descriptors = Arc::new(Descriptors::new(3));
        let two = descriptors.take(2).unwrap();
        assert!(descriptors.take(2).is_none());
        let one = descriptors.take(1).unwrap();
        drop(two);
        assert!(descriptors.take(2).is_some());
        drop(one);
        assert_eq!(descriptors.taken(), 0);
    }
}
