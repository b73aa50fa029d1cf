//! Word of changes in the namespaces of endpoints: a task for each, that waits at a routing socket
//! and at one of nftables there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_netns::{ChangeListener, Namespace, Topic, drop_in_background};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// Descriptors for each endpoint.
pub(super) const DESCRIPTORS: usize = 2;

/// How long a task rests after a change: processes of an endpoint can make thousands of changes a
/// second.
const REST: Duration = Duration::from_millis(50);

/// The endpoints that have changed.
#[derive(Debug, Default)]
struct Changed {
    names: Mutex<BTreeSet<String>>,
    notify: Notify,
}

/// Watches endpoints until it is dropped.
#[derive(Debug, Default)]
pub(super) struct EndpointWatch {
    tasks: BTreeMap<String, AbortHandle>,
    changed: Arc<Changed>,
}

impl EndpointWatch {
    /// Watches `endpoint` in `namespace` from here on, and no longer where it was.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no descriptor is left.
    pub(super) fn watch(&mut self, endpoint: &str, namespace: &Namespace) -> io::Result<()> {
        if let Some(task) = self.tasks.remove(endpoint) {
            task.abort();
        }
        let topics = [Topic::Links, Topic::Addresses, Topic::Routes, Topic::Rules, Topic::Settings];
        let links = register(ChangeListener::of(namespace, &topics)?)?;
        // Without nftables there is no table to lose.
        let rules = namespace.with(ChangeListener::of_rules)?.and_then(RuleListener::new).ok();
        let task =
            tokio::spawn(follow(endpoint.to_owned(), links, rules, Arc::clone(&self.changed)));
        self.tasks.insert(endpoint.to_owned(), task.abort_handle());
        Ok(())
    }

    /// Returns when endpoints have changed.
    pub(super) async fn changed(&self) -> BTreeSet<String> {
        loop {
            let names = std::mem::take(
                &mut *self.changed.names.lock().unwrap_or_else(PoisonError::into_inner),
            );
            if !names.is_empty() {
                return names;
            }
            self.changed.notify.notified().await;
        }
    }
}

impl Drop for EndpointWatch {
    fn drop(&mut self) {
        self.tasks.values().for_each(AbortHandle::abort);
    }
}

/// Word of changes of nftables. Closing the socket waits for transactions of the namespace, and is
/// done elsewhere.
struct RuleListener(Option<AsyncFd<ChangeListener>>);

impl RuleListener {
    fn new(changes: ChangeListener) -> io::Result<Self> {
        register(changes).map(|rules| Self(Some(rules)))
    }
}

impl Drop for RuleListener {
    fn drop(&mut self) {
        if let Some(rules) = self.0.take() {
            drop_in_background(rules.into_inner());
        }
    }
}

fn register(changes: ChangeListener) -> io::Result<AsyncFd<ChangeListener>> {
    // SAFETY: its descriptor is its own, and the same for as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?)
}

async fn follow(
    endpoint: String,
    links: AsyncFd<ChangeListener>,
    rules: Option<RuleListener>,
    changed: Arc<Changed>,
) {
    loop {
        let rules_changed = async {
            match &rules {
                Some(RuleListener(Some(rules))) => heard(rules).await,
                _ => std::future::pending().await,
            }
        };
        let has_changed = tokio::select! {
            changed = heard(&links) => changed,
            changed = rules_changed => changed,
        };
        if has_changed {
            changed.names.lock().unwrap_or_else(PoisonError::into_inner).insert(endpoint.clone());
            changed.notify.notify_one();
        }
        // After word of no interest too: a container can send as much of it as it likes.
        tokio::time::sleep(REST).await;
    }
}

/// Waits for word. Whether it is of interest.
async fn heard(changes: &AsyncFd<ChangeListener>) -> bool {
    let Ok(mut ready) = changes.readable().await else { return std::future::pending().await };
    let changed = ready.get_inner().drain();
    ready.clear_ready();
    changed
}
