//! Change notifications from the namespaces of endpoints. One task per endpoint reads a routing
//! socket and an nftables socket there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidegate_netns::{ChangeListener, Namespace, Topic, drop_in_background};
use tidegate_reactor::is_exhaustion;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// File descriptors per endpoint.
pub(super) const DESCRIPTORS: u32 = 2;

/// Pause of a task after a notification. Processes of an endpoint can cause thousands of them per
/// second.
const PAUSE: Duration = Duration::from_millis(50);

/// Changed endpoints that were not taken yet.
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
    /// Watches `namespace` as that of `endpoint`. Replaces a previous watch of the endpoint.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no file descriptor is left.
    pub(super) fn watch(&mut self, endpoint: &str, namespace: &Namespace) -> io::Result<()> {
        if let Some(task) = self.tasks.remove(endpoint) {
            task.abort();
        }
        let topics = [Topic::Links, Topic::Addresses, Topic::Routes, Topic::Rules, Topic::Settings];
        let links = register(ChangeListener::of(namespace, &topics)?)?;
        let rules = match namespace.with(ChangeListener::of_rules)?.and_then(RuleListener::new) {
            Err(error) if is_exhaustion(&error) => return Err(error),
            // A kernel without nftables, where there is no table to watch.
            rules => rules.ok(),
        };
        let task =
            tokio::spawn(watch(endpoint.to_owned(), links, rules, Arc::clone(&self.changed)));
        self.tasks.insert(endpoint.to_owned(), task.abort_handle());
        Ok(())
    }

    /// Ends the watch of `endpoint`.
    pub(super) fn unwatch(&mut self, endpoint: &str) {
        if let Some(task) = self.tasks.remove(endpoint) {
            task.abort();
        }
    }

    /// Waits for changes. Returns the changed endpoints. Cancel safe.
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

/// Notifications of nftables changes. Closing the socket waits for running nftables transactions of
/// the namespace, so it happens in the background.
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
    // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?)
}

async fn watch(
    endpoint: String,
    links: AsyncFd<ChangeListener>,
    rules: Option<RuleListener>,
    changed: Arc<Changed>,
) {
    loop {
        let rules_changed = async {
            match &rules {
                Some(RuleListener(Some(rules))) => notified(rules).await,
                _ => std::future::pending().await,
            }
        };
        let has_changed = tokio::select! {
            changed = notified(&links) => changed,
            changed = rules_changed => changed,
        };
        if has_changed {
            changed.names.lock().unwrap_or_else(PoisonError::into_inner).insert(endpoint.clone());
            changed.notify.notify_one();
        }
        // After irrelevant notifications too, since a container can cause any number of them.
        tokio::time::sleep(PAUSE).await;
    }
}

/// Waits for notifications. Returns whether any of them is relevant.
async fn notified(changes: &AsyncFd<ChangeListener>) -> bool {
    let Ok(mut ready) = changes.readable().await else { return std::future::pending().await };
    let changed = ready.get_inner().drain();
    ready.clear_ready();
    changed
}
