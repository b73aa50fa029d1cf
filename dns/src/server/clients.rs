//! The TCP clients of one server, and which of them is closed at the limit.

use crate::handler::ServerContext;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::AbortHandle;

/// The clients of one listener.
#[derive(Default)]
pub(super) struct Clients {
    clients: Vec<(AbortHandle, Arc<Activity>)>,
    clock: Arc<AtomicU64>,
}

/// The last activity of a client, on a clock that counts the messages of all clients.
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
    /// Makes room for one more of at most `limit` clients: at the limit, closes the one that was
    /// idle longest (RFC 7766 section 6.2.3). Returns whether one was closed.
    pub(super) fn make_room(&mut self, limit: usize) -> bool {
        self.clients.retain(|(task, _)| !task.is_finished());
        if self.clients.len() < limit {
            return false;
        }
        let last =
            |(_, activity): &&(AbortHandle, Arc<Activity>)| activity.last.load(Ordering::Relaxed);
        let oldest = self.clients.iter().min_by_key(last).map(|(task, _)| task.id());
        self.clients.retain(|(task, _)| {
            let is_oldest = Some(task.id()) == oldest;
            if is_oldest {
                task.abort();
            }
            !is_oldest
        });
        true
    }

    /// The activity of a new client.
    pub(super) fn activity(&self) -> Arc<Activity> {
        let activity = Activity { last: AtomicU64::new(0), clock: Arc::clone(&self.clock) };
        activity.note();
        Arc::new(activity)
    }

    pub(super) fn add(&mut self, task: AbortHandle, activity: Arc<Activity>) {
        self.clients.push((task, activity));
    }
}

/// Maximum number of clients of one server.
pub(super) fn limit(context: &ServerContext) -> usize {
    context.shared.tcp_clients
}
