//! Drops values whose release blocks in the kernel, on background threads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Maximum number of concurrent drop threads.
const MAX_THREADS: usize = 64;

/// Drops `value` on a separate thread, or on the calling thread if 64 such threads are running or
/// no thread can be created.
///
/// Closing an nftables socket waits for the current transaction of its network namespace
/// (`nft_rcv_nl_event`, net/netfilter/nf_tables_api.c), and for a grace period if objects have been
/// deleted in the namespace.
pub fn drop_in_background<T: Send + 'static>(value: T) {
    static RUNNING: AtomicUsize = AtomicUsize::new(0);
    if RUNNING.fetch_add(1, Ordering::Relaxed) < MAX_THREADS {
        let close = move || {
            drop(value);
            RUNNING.fetch_sub(1, Ordering::Relaxed);
        };
        // If the thread cannot be started, `spawn` drops the closure and `value` with it.
        if std::thread::Builder::new().name("tidegate-drop".into()).spawn(close).is_ok() {
            return;
        }
    }
    RUNNING.fetch_sub(1, Ordering::Relaxed);
}
