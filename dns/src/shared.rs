//! State that all servers of a resolver share.

use crate::error::ZoneError;
use crate::forward::{Forwarder, Namespaces};
use crate::metrics::ProcessMetrics;
use crate::partition::{Partition, Shares};
use crate::resolve::Policy;
use crate::servers::{ServerList, ServerLists, TooManyLists};
use crate::zone::Zones;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::watch;

/// Addresses of servers in the namespaces from which queries are sent.
#[derive(Default)]
pub(crate) struct Host {
    /// Addresses of servers of this resolver, with their number.
    pub(crate) own_addresses: BTreeMap<SocketAddr, usize>,
    /// The servers in the `resolv.conf` of the host.
    pub(crate) servers: Arc<[SocketAddr]>,
}

/// State that all servers share.
pub(crate) struct Shared {
    pub(crate) zones: RwLock<Zones>,
    pub(crate) lists: Mutex<ServerLists>,
    pub(crate) host: Mutex<Host>,
    pub(crate) forwarder: Arc<Forwarder>,
    /// The upstream servers of the host, for subscribers.
    pub(crate) announced: watch::Sender<Arc<[SocketAddr]>>,
    pub(crate) policy: Policy,
    pub(crate) ttl: u32,
    pub(crate) namespaces: Namespaces,
    pub(crate) tcp_clients: usize,
    /// The TCP clients of all servers.
    pub(crate) connections: Mutex<Shares>,
    pub(crate) metrics: Arc<ProcessMetrics>,
}

impl Shared {
    pub(crate) fn zones(&self) -> RwLockReadGuard<'_, Zones> {
        // Invariants hold after every change, so a poisoned lock is usable.
        self.zones.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn zones_mut(&self) -> RwLockWriteGuard<'_, Zones> {
        self.zones.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that this resolver serves at `address`.
    pub(crate) fn add_own_address(&self, address: SocketAddr) {
        let mut host = lock(&self.host);
        *host.own_addresses.entry(address).or_default() += 1;
        self.update_host_servers(&host);
    }

    pub(crate) fn remove_own_address(&self, address: SocketAddr) {
        let mut host = lock(&self.host);
        if let Some(count) = host.own_addresses.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                host.own_addresses.remove(&address);
            }
        }
        self.update_host_servers(&host);
    }

    pub(crate) fn host_servers(&self, servers: Arc<[SocketAddr]>) {
        let mut host = lock(&self.host);
        host.servers = servers;
        self.update_host_servers(&host);
    }

    /// Sets the upstream servers of the host: those of its file without addresses of this resolver,
    /// which would be a forwarding loop.
    pub(crate) fn update_host_servers(&self, host: &Host) {
        let is_own = |server: &SocketAddr| host.own_addresses.contains_key(server);
        let (own, others): (Vec<_>, Vec<_>) = host.servers.iter().copied().partition(is_own);
        for server in own {
            tracing::warn!(%server, "DNS server in resolv.conf is tidegate itself; skipped");
        }
        let others: Arc<[SocketAddr]> = others.into();
        self.announced.send_if_modified(|announced| {
            let changed = *announced != others;
            announced.clone_from(&others);
            changed
        });
        self.forwarder.set_host(others);
    }

    /// Admits a TCP client of `partition` until the value is dropped. `None` at the limit.
    pub(crate) fn admit(self: &Arc<Self>, partition: Partition) -> Option<Admitted> {
        let mut connections = lock(&self.connections);
        connections.allows(&partition).then(|| {
            connections.take(&partition);
            Admitted { shared: Arc::clone(self), partition }
        })
    }

    /// The list of `servers`, for the network or container that `of` names.
    pub(crate) fn list(
        &self,
        of: impl Fn() -> String,
        servers: &[SocketAddr],
    ) -> Result<Option<ServerList>, ZoneError> {
        if let Some(server) =
            servers.iter().find(|server| lock(&self.host).own_addresses.contains_key(server))
        {
            return Err(ZoneError::OwnAddress { of: of(), server: *server });
        }
        lock(&self.lists).get(servers).map_err(|TooManyLists| ZoneError::TooManyServerLists(of()))
    }
}

/// An admitted TCP client.
pub(crate) struct Admitted {
    shared: Arc<Shared>,
    partition: Partition,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        lock(&self.shared.connections).release(&self.partition, 1);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
