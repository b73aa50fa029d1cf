//! The difference between two states, as steps for the reconciler.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::{Endpoint, Name, Network, PublishedPort, State};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

/// A step from one state to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Closes a published port.
    ClosePort {
        /// The endpoint, with its old settings.
        endpoint: Arc<Endpoint>,
        /// The port.
        port: PublishedPort,
    },
    /// Removes an endpoint, whose ports are closed.
    RemoveEndpoint(Arc<Endpoint>),
    /// Removes a network, whose endpoints are removed.
    RemoveNetwork(Arc<Network>),
    /// Creates a network.
    AddNetwork(Arc<Network>),
    /// Changes settings of an endpoint other than attachments and ports, above all its namespace.
    /// Published ports stay open.
    MoveEndpoint {
        /// The old settings.
        old: Arc<Endpoint>,
        /// The new settings.
        new: Arc<Endpoint>,
    },
    /// Creates an endpoint, without its ports.
    AddEndpoint(Arc<Endpoint>),
    /// Opens a published port.
    OpenPort {
        /// The endpoint, with its new settings.
        endpoint: Arc<Endpoint>,
        /// The port.
        port: PublishedPort,
    },
}

/// Returns the steps from `old` to `new`, in an order that is safe to execute.
///
/// Depends only on the two states, not on the commands between them. First ports close, and
/// endpoints and networks are removed, so that names, addresses, namespaces and ports are free.
/// Then networks and endpoints are created, and ports open.
///
/// A network that differs is removed and created again, and so are its endpoints. An endpoint whose
/// attachments differ is removed and created again, and its ports close for that time.
#[must_use]
pub fn changes(old: &State, new: &State) -> Vec<Change> {
    let (removed_networks, added_networks) = difference(&old.networks, &new.networks);
    let (left, joined) = difference(&old.endpoints, &new.endpoints);
    let replaced: BTreeSet<&Name> = removed_networks.iter().map(|network| &network.name).collect();
    let mut removed: BTreeMap<&Name, &Arc<Endpoint>> = BTreeMap::new();
    let mut added: BTreeMap<&Name, &Arc<Endpoint>> = BTreeMap::new();
    let mut moved: BTreeMap<&Name, (&Arc<Endpoint>, &Arc<Endpoint>)> = BTreeMap::new();

    // Endpoints of replaced networks follow their networks, even if they do not differ.
    let stays = |endpoint: &Endpoint| {
        replaced.is_empty() || !endpoint.aliases.keys().any(|network| replaced.contains(network))
    };
    if !replaced.is_empty() {
        removed.extend(old.endpoints.iter().filter(|(_, endpoint)| !stays(endpoint)));
        added.extend(new.endpoints.iter().filter(|(name, _)| removed.contains_key(name)));
    }
    for endpoint in left {
        removed.insert(&endpoint.name, endpoint);
    }
    for endpoint in joined {
        match old.endpoints.get(&endpoint.name) {
            Some(before) if stays(before) && before.setup == endpoint.setup => {
                removed.remove(&endpoint.name);
                moved.insert(&endpoint.name, (before, endpoint));
            }
            _ => {
                added.insert(&endpoint.name, endpoint);
            }
        }
    }
    // Two endpoints that exchange namespaces cannot move one after the other.
    let leaving: BTreeSet<&Path> = moved
        .values()
        .filter(|(before, after)| before.namespace != after.namespace)
        .map(|(before, _)| before.namespace.as_path())
        .collect();
    let blocked = |after: &Endpoint, before: &Endpoint| {
        before.namespace != after.namespace && leaving.contains(after.namespace.as_path())
    };
    moved.retain(|name, (before, after)| {
        let blocked = blocked(after, before);
        if blocked {
            removed.insert(name, before);
            added.insert(name, after);
        }
        !blocked
    });

    let mut changes = Vec::new();
    for endpoint in removed.values() {
        changes.extend(endpoint.ports.iter().map(|port| close(endpoint, *port)));
    }
    for (before, after) in moved.values() {
        let gone = before.ports.iter().filter(|port| after.ports.binary_search(port).is_err());
        changes.extend(gone.map(|port| close(before, *port)));
    }
    changes.extend(removed.values().map(|one| Change::RemoveEndpoint(Arc::clone(one))));
    changes.extend(removed_networks.into_iter().cloned().map(Change::RemoveNetwork));
    changes.extend(added_networks.into_iter().cloned().map(Change::AddNetwork));
    for (before, after) in moved.values() {
        let same_ports = Endpoint { ports: before.ports.clone(), ..Endpoint::clone(after) };
        if same_ports != ***before {
            changes.push(Change::MoveEndpoint { old: Arc::clone(before), new: Arc::clone(after) });
        }
    }
    changes.extend(added.values().map(|one| Change::AddEndpoint(Arc::clone(one))));
    for (before, after) in moved.values() {
        let more = after.ports.iter().filter(|port| before.ports.binary_search(port).is_err());
        changes.extend(more.map(|port| open(after, *port)));
    }
    for endpoint in added.values() {
        changes.extend(endpoint.ports.iter().map(|port| open(endpoint, *port)));
    }
    changes
}

fn close(endpoint: &Arc<Endpoint>, port: PublishedPort) -> Change {
    Change::ClosePort { endpoint: Arc::clone(endpoint), port }
}

fn open(endpoint: &Arc<Endpoint>, port: PublishedPort) -> Change {
    Change::OpenPort { endpoint: Arc::clone(endpoint), port }
}

/// Returns the values of `old` that `new` does not contain, and the reverse. Shared values are
/// equal without a comparison.
pub(crate) fn difference<'a, T: PartialEq>(
    old: &'a BTreeMap<Name, Arc<T>>,
    new: &'a BTreeMap<Name, Arc<T>>,
) -> (Vec<&'a Arc<T>>, Vec<&'a Arc<T>>) {
    let (mut removed, mut added) = (Vec::new(), Vec::new());
    let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return (removed, added),
            (Some((old, _)), Some((new, _))) => old.cmp(new),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
        };
        let old = if order.is_le() { olds.next() } else { None };
        let new = if order.is_ge() { news.next() } else { None };
        if let (Some((_, old)), Some((_, new))) = (old, new)
            && (Arc::ptr_eq(old, new) || old == new)
        {
            continue;
        }
        removed.extend(old.map(|(_, value)| value));
        added.extend(new.map(|(_, value)| value));
    }
}
