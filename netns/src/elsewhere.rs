//! Dropping what takes the kernel long to let go of.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Threads that drop something at a time.
const THREADS: usize = 64;

/// Drops `value` on a thread of its own, or here if there are 64 of those or none can be started.
///
/// Closing a socket of nftables waits until the transaction ends that runs in its namespace
/// (`nft_rcv_nl_event`, net/netfilter/nf_tables_api.c), and then for a grace period if the
/// namespace has deleted something.
pub fn drop_elsewhere<T: Send + 'static>(value: T) {
    static RUNNING: AtomicUsize = AtomicUsize::new(0);
    if RUNNING.fetch_add(1, Ordering::Relaxed) < THREADS {
        let close = move || {
            drop(value);
            RUNNING.fetch_sub(1, Ordering::Relaxed);
        };
        // What could not be handed to a thread has been dropped here.
        if std::thread::Builder::new().name("tidegate-drop".into()).spawn(close).is_ok() {
            return;
        }
    }
    RUNNING.fetch_sub(1, Ordering::Relaxed);
}
