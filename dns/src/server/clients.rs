//! Who is connected, and who has to go for another one.

use crate::handler::Site;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::AbortHandle;

/// The clients of one listener.
#[derive(Default)]
pub(super) struct Clients {
    clients: Vec<(AbortHandle, Arc<Activity>)>,
    clock: Arc<AtomicU64>,
}

/// When a client was last heard of, in messages of all of them.
pub(super) struct Activity {
    last: AtomicU64,
    clock: Arc<AtomicU64>,
}

impl Activity {
    pub(super) fn note(&self) {
        self.last.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl Clients {
    /// Makes room for one more of at most `limit`: at the limit, who has been silent for longest
    /// goes (RFC 7766 section 6.2.3). Whether somebody had to.
    pub(super) fn make_room(&mut self, limit: usize) -> bool {
        self.clients.retain(|(task, _)| !task.is_finished());
        if self.clients.len() < limit {
            return false;
        }
        let last =
            |(_, activity): &&(AbortHandle, Arc<Activity>)| activity.last.load(Ordering::Relaxed);
        let oldest = self.clients.iter().min_by_key(last).map(|(task, _)| task.id());
        self.clients.retain(|(task, _)| {
            let goes = Some(task.id()) == oldest;
            if goes {
                task.abort();
            }
            !goes
        });
        true
    }

    /// What a new client notes its messages in.
    pub(super) fn activity(&self) -> Arc<Activity> {
        let activity = Activity { last: AtomicU64::new(0), clock: Arc::clone(&self.clock) };
        activity.note();
        Arc::new(activity)
    }

    pub(super) fn add(&mut self, task: AbortHandle, activity: Arc<Activity>) {
        self.clients.push((task, activity));
    }
}

/// The most clients of one server.
pub(super) fn limit(site: &Site) -> usize {
    site.shared.tcp_clients
}
