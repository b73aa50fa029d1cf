//! While a project runs: its end is waited for, orders are carried out, and containers that come back are plugged in again.
//!
//! An adopted namespace is a container of somebody else's. When that is restarted, the path it was adopted by leads to another namespace:
//! that is looked for once a second, since nothing announces it. The old namespace cannot be mistaken for a new one meanwhile, because
//! our handle keeps it, and with it its number.

use super::{Instance, Signals};
use crate::api::{Order, Problem};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidegate_netns::{Namespace, NamespaceId};
use tidegate_netsetup::SetupError;
use tokio::time::{MissedTickBehavior, interval};

/// How often adopted namespaces are looked after.
const LOOK: Duration = Duration::from_secs(1);

impl Instance {
    /// Waits for the services to end, or a signal. Whether all is well.
    pub(super) async fn follow(&mut self, signals: &mut Signals) -> bool {
        let has_services = !self.up.supervisor.statuses().is_empty();
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // What was said last of an endpoint that could not be plugged in, so that it is not said every second.
        let mut said = BTreeMap::new();
        loop {
            tokio::select! {
                ended = self.up.supervisor.wait(), if has_services => return ended.success(),
                () = signals.next() => return true,
                Some(order) = self.orders.recv() => self.carry_out(order).await,
                _ = ticks.tick() => self.look_after_adopted(&mut said).await,
            }
        }
    }

    async fn carry_out(&mut self, order: Order) {
        match order {
            Order::Replug { endpoint, netns, done } => {
                let result = self.replug_to(&endpoint, netns).await;
                // Who has gone meanwhile does not hear of it.
                let _ = done.send(result);
            }
        }
    }

    async fn replug_to(&mut self, endpoint: &str, netns: PathBuf) -> Result<(), Problem> {
        if self.up.adopted.get(endpoint).is_none() {
            let known = self.up.layout.desired.endpoints.iter().any(|one| one.name == endpoint);
            return Err(if known {
                Problem::conflict(&format!(
                    "endpoint {endpoint:?} is in a namespace that tidegate made; only adopted ones (x-netns) can be plugged in elsewhere"
                ))
            } else {
                Problem::not_found(&format!("there is no endpoint {endpoint:?}"))
            });
        }
        let namespace = Namespace::from_path(&netns).map_err(|error| Problem::bad_request(&error))?;
        self.replug(endpoint, netns, &namespace).await
    }

    /// Plugs `endpoint` into `namespace`, which is at `path`, and leads its ports there.
    async fn replug(&mut self, endpoint: &str, path: PathBuf, namespace: &Namespace) -> Result<(), Problem> {
        let plugged = self.setup.replug(&self.up.layout.desired, endpoint, namespace.clone()).await;
        plugged.map_err(|error| match error {
            SetupError::Conflict(_) => Problem::conflict(&error),
            error => Problem::failed(&error),
        })?;
        let addresses = self.up.layout.addresses.get(endpoint).map(Vec::as_slice).unwrap_or_default();
        self.up.publisher.relocate(endpoint, namespace, addresses)?;
        tracing::info!(endpoint, path = %path.display(), namespace = %namespace.id(), "plugged in again");
        self.up.adopted.set(endpoint, path, false);
        Ok(())
    }

    /// Plugs those in again whose containers have come back.
    async fn look_after_adopted(&mut self, said: &mut BTreeMap<String, String>) {
        for (endpoint, path) in self.up.adopted.paths() {
            let Some(known) = self.up.publisher.namespace(&endpoint) else { continue };
            let there = if leads_to(&path) == Some(known.id()) {
                Ok(known.clone())
            } else {
                Namespace::from_path(&path)
            };
            let failed = match there {
                Ok(namespace) if namespace.id() == known.id() => {
                    self.up.adopted.set(&endpoint, path, false);
                    None
                }
                Ok(namespace) => {
                    self.replug(&endpoint, path, &namespace).await.err().map(|problem| problem.to_string())
                }
                Err(error) => {
                    self.up.adopted.set(&endpoint, path, true);
                    Some(error.to_string())
                }
            };
            match failed {
                None => drop(said.remove(&endpoint)),
                Some(reason) if said.get(&endpoint) == Some(&reason) => {}
                Some(reason) => {
                    tracing::warn!(endpoint, "waiting for its container to come back: {reason}");
                    said.insert(endpoint, reason);
                }
            }
        }
    }
}

/// Which namespace is at `path`, without opening it; nonsense if it is none.
fn leads_to(path: &Path) -> Option<NamespaceId> {
    let there = fs::metadata(path).ok()?;
    Some(NamespaceId { device: there.dev(), inode: there.ino() })
}
