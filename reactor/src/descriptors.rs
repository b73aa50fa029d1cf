//! Budget of file descriptors.
//!
//! A process at `RLIMIT_NOFILE` fails in whichever system call comes next, often halfway through an
//! operation that needs two descriptors. Reserving descriptors beforehand avoids partial failures:
//! an operation that cannot reserve all of its descriptors does not start.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A budget of descriptors, shared by all loops of a process.
#[derive(Debug)]
pub struct Descriptors {
    taken: AtomicUsize,
    limit: usize,
}

/// A reservation of descriptors, released on drop.
#[derive(Debug)]
pub struct Permit {
    descriptors: Arc<Descriptors>,
    count: u32,
}

impl Descriptors {
    /// Creates a budget of `limit` descriptors.
    pub const fn new(limit: usize) -> Self {
        Self { taken: AtomicUsize::new(0), limit }
    }

    /// The budget of this process: its soft `RLIMIT_NOFILE`, minus `reserved` for descriptors that
    /// are not counted here.
    pub fn of_process(reserved: usize) -> Self {
        let soft = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let soft = soft.and_then(|soft| usize::try_from(soft).ok()).unwrap_or(usize::MAX);
        Self::new(soft.saturating_sub(reserved))
    }

    /// Reserves `count` descriptors, if that many are available.
    pub fn take(self: &Arc<Self>, count: u32) -> Option<Permit> {
        let wanted = count as usize;
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                taken.checked_add(wanted).filter(|sum| *sum <= self.limit)
            })
            .ok()
            .map(|_| Permit { descriptors: Arc::clone(self), count })
    }

    /// Number of available descriptors.
    pub fn left(&self) -> usize {
        self.limit.saturating_sub(self.taken())
    }

    /// Number of reserved descriptors.
    pub fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// The size of the budget.
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
    fn a_reservation_is_all_or_nothing() {
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
