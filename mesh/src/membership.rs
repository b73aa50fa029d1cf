//! What a host writes to the cluster state. Pure.
//!
//! A host owns its record and those of its endpoints. [`registration`] leads from any view to the
//! records that the host should have, like a reconciler: after a restart, after its lease has
//! ended, and after an endpoint has come or gone. Each transaction is conditional on the entries
//! that its decision has read, so a decision on an outdated view changes nothing.
//!
//! The claim of an address is written with the record of its endpoint, but without a lease. An
//! endpoint that is removed leaves its addresses in quarantine, because other hosts may still have
//! packets and connections for them.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::key::{Key, MAX_VNI};
use crate::record::{Claim, Endpoint, Network, Node, Record};
use crate::store::{Condition, LeaseId, Transaction, Write};
use crate::view::View;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tidegate_model::validity::{address_problem, subnets_overlap};

/// Time for which a released address is not used again.
pub const QUARANTINE: Duration = Duration::from_mins(10);

/// Maximum number of hosts of a cluster. Each sends heartbeats to all others.
pub const MAX_HOSTS: u16 = 128;

/// Maximum number of overlay networks of a cluster.
pub const MAX_NETWORKS: usize = 1_000;

/// Smallest VNI that is chosen. Swarm and others start at the lower end.
const FIRST_VNI: u32 = 1 << 20;

/// Endpoints in one transaction, each with at most three conditions and writes.
const BATCH: usize = 32;

/// A host with its endpoints, as they should be recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// ID of the host: its name.
    pub id: String,
    /// Its record. The index is assigned by [`registration`].
    pub node: Node,
    /// Networks that are reachable without the overlay: those of the host's links.
    pub underlay: Vec<IpNet>,
    /// Its endpoints by network and name.
    pub endpoints: BTreeMap<(String, String), Endpoint>,
}

/// Why a host, a network or an endpoint is not recorded.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// Another machine has this name.
    #[error("host {0} is in the cluster already, on another machine; choose another name (--name)")]
    HostExists(String),
    /// Another host has this VTEP.
    #[error(
        "{address} is the address of host {host}; use another --advertise address, or remove that host (tidegate mesh leave --host {host})"
    )]
    AddressOfHost {
        /// The address.
        address: IpAddr,
        /// The other host.
        host: String,
    },
    /// A network contains addresses of the underlay.
    #[error(
        "network {network}: subnet {subnet} overlaps {underlay} of this host; it is not available here"
    )]
    Underlay {
        /// The network.
        network: String,
        /// Its subnet.
        subnet: IpNet,
        /// The network of the host.
        underlay: IpNet,
    },
    /// The packets of a network do not fit into those of the underlay.
    #[error(
        "network {network}: MTU {mtu} requires {needed} bytes between the hosts, and {available} are available; create it with --mtu {fitting}"
    )]
    Mtu {
        /// The network.
        network: String,
        /// Its MTU.
        mtu: u32,
        /// The MTU that the underlay needs.
        needed: u32,
        /// The MTU of the underlay.
        available: u32,
        /// The largest MTU that fits.
        fitting: u32,
    },
    /// The cluster has [`MAX_HOSTS`] hosts.
    #[error("the cluster has {MAX_HOSTS} hosts, which is the maximum")]
    TooManyHosts,
    /// The cluster has [`MAX_NETWORKS`] networks.
    #[error("the cluster has {MAX_NETWORKS} overlay networks, which is the maximum")]
    TooManyNetworks,
    /// The network exists.
    #[error("network {0} exists in the cluster")]
    NetworkExists(String),
    /// The network does not exist.
    #[error("network {0} does not exist in the cluster")]
    UnknownNetwork(String),
    /// A subnet is in use.
    #[error("network {network}: subnet {subnet} overlaps {other} of network {other_network}")]
    SubnetsOverlap {
        /// The network.
        network: String,
        /// Its subnet.
        subnet: IpNet,
        /// The other network.
        other_network: String,
        /// The subnet of the other network.
        other: IpNet,
    },
    /// The network has endpoints.
    #[error("network {network} has endpoints, on this host or others: {}; detach them first", .endpoints.join(", "))]
    InUse {
        /// The network.
        network: String,
        /// The endpoints with their hosts.
        endpoints: Vec<String>,
    },
    /// An endpoint of another host has this name.
    #[error("endpoint {name}: host {host} has an endpoint with this name on network {network}")]
    EndpointExists {
        /// The network.
        network: String,
        /// The name.
        name: String,
        /// The other host.
        host: String,
    },
    /// An address is in use.
    #[error(
        "endpoint {name}: {address} on network {network} is in use by endpoint {holder} of host {host}"
    )]
    AddressTaken {
        /// The network.
        network: String,
        /// The endpoint.
        name: String,
        /// The address.
        address: IpAddr,
        /// The endpoint that has it.
        holder: String,
        /// Its host.
        host: String,
    },
    /// An address was released a short time ago.
    #[error(
        "endpoint {name}: {address} on network {network} was released recently, and is free in {seconds} s"
    )]
    Quarantined {
        /// The network.
        network: String,
        /// The endpoint.
        name: String,
        /// The address.
        address: IpAddr,
        /// Remaining time, in seconds.
        seconds: u64,
    },
    /// All addresses of a subnet are in use or in quarantine.
    #[error("network {network}: no address of {subnet} is free")]
    NoAddress {
        /// The network.
        network: String,
        /// The subnet.
        subnet: IpNet,
    },
}

/// The writes of [`registration`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// Transactions that do not depend on each other. If there are none, the records are as they
    /// should be.
    pub transactions: Vec<Transaction>,
    /// Endpoints that cannot be recorded, by network and name.
    pub refused: BTreeMap<(String, String), Refusal>,
}

fn put(record: &Record, lease: Option<LeaseId>) -> Write {
    let (key, value) = record.encode();
    Write::Put { key: key.to_string(), value, lease }
}

fn claim_key(network: &str, address: IpAddr) -> Key {
    Key::Address { network: network.to_owned(), address }
}

/// Returns the transactions that make the records of a host equal to `own`, under `lease`, at
/// `now` in seconds since the Unix epoch.
///
/// # Errors
/// The host cannot be in the cluster.
pub fn registration(
    view: &View,
    own: &Own,
    lease: LeaseId,
    now: u64,
) -> Result<Registration, Refusal> {
    let mut registration = Registration::default();
    registration.transactions.extend(host(view, own, lease)?);
    let mut puts = Vec::new();
    for (key, endpoint) in &own.endpoints {
        match record(view, key, endpoint, lease, now) {
            Ok(changes) => puts.extend(changes),
            Err(refusal) => drop(registration.refused.insert(key.clone(), refusal)),
        }
    }
    puts.extend(stale(view, own, now));
    for batch in puts.chunks(BATCH) {
        let mut all = Transaction::default();
        for one in batch {
            all.conditions.extend(one.conditions.iter().cloned());
            all.writes.extend(one.writes.iter().cloned());
        }
        // Endpoints of one network share a condition.
        all.conditions.sort();
        all.conditions.dedup();
        registration.transactions.push(all);
    }
    Ok(registration)
}

/// The record of the host itself.
fn host(view: &View, own: &Own, lease: LeaseId) -> Result<Option<Transaction>, Refusal> {
    let (id, node) = (&own.id, &own.node);
    if view.nodes.get(id).is_some_and(|known| known.machine != node.machine) {
        return Err(Refusal::HostExists(id.clone()));
    }
    if let Some((host, _)) =
        view.nodes.iter().find(|(host, other)| other.vtep == node.vtep && *host != id)
    {
        return Err(Refusal::AddressOfHost { address: node.vtep, host: host.clone() });
    }
    let held = view.node_indexes.iter().find(|(_, holder)| *holder == id).map(|(index, _)| *index);
    let mut free = (1..=MAX_HOSTS).filter(|index| {
        !view.node_indexes.contains_key(index)
            && !view.written.contains_key(&Key::NodeIndex(*index))
    });
    let index = held.or_else(|| free.next()).ok_or(Refusal::TooManyHosts)?;
    let node = Node { index, ..node.clone() };
    let (key, index_key) = (Key::Node(id.clone()), Key::NodeIndex(index));
    let has_lease = view.written.get(&key).is_some_and(|written| written.lease == Some(lease));
    if held.is_some() && has_lease && view.nodes.get(id) == Some(&node) {
        return Ok(None);
    }
    Ok(Some(Transaction {
        conditions: vec![view.unmodified(&key), view.unmodified(&index_key)],
        writes: vec![
            put(&Record::Node(id.clone(), node), Some(lease)),
            put(&Record::NodeIndex(index, id.clone()), None),
        ],
    }))
}

/// The record of an endpoint with the claims of its addresses. `None` if they are up to date.
fn record(
    view: &View,
    (network, name): &(String, String),
    endpoint: &Endpoint,
    lease: LeaseId,
    now: u64,
) -> Result<Option<Transaction>, Refusal> {
    if !view.networks.contains_key(network) {
        return Err(Refusal::UnknownNetwork(network.clone()));
    }
    let entry = (network.clone(), name.clone());
    let known = view.endpoints.get(&entry);
    if let Some(other) = known.filter(|known| known.node != endpoint.node) {
        let (network, name) = entry;
        return Err(Refusal::EndpointExists { network, name, host: other.node.clone() });
    }
    let own = Claim::Endpoint { name: name.clone(), node: endpoint.node.clone() };
    let mut writes = Vec::new();
    let network_key = Key::Network(network.clone());
    let mut conditions = vec![view.unmodified(&network_key)];
    for &address in &endpoint.addresses {
        let claim = view.addresses.get(&(network.clone(), address));
        let (network, name) = entry.clone();
        match claim {
            Some(Claim::Endpoint { name: holder, node }) if claim != Some(&own) => {
                let (holder, host) = (holder.clone(), node.clone());
                return Err(Refusal::AddressTaken { network, name, address, holder, host });
            }
            Some(Claim::Quarantined(until)) if *until > now => {
                let seconds = until - now;
                return Err(Refusal::Quarantined { network, name, address, seconds });
            }
            _ => {}
        }
        conditions.push(view.unmodified(&claim_key(&network, address)));
        if claim != Some(&own) {
            writes.push(put(&Record::Address(network, address, own.clone()), None));
        }
    }
    let key = Key::Endpoint { network: network.clone(), name: name.clone() };
    let has_lease = view.written.get(&key).is_some_and(|written| written.lease == Some(lease));
    if known != Some(endpoint) || !has_lease {
        conditions.push(view.unmodified(&key));
        let record = Record::Endpoint(network.clone(), name.clone(), endpoint.clone());
        writes.push(put(&record, Some(lease)));
    }
    Ok((!writes.is_empty()).then_some(Transaction { conditions, writes }))
}

/// Removes records and claims of endpoints that the host no longer has.
fn stale(view: &View, own: &Own, now: u64) -> Vec<Transaction> {
    let mut gone: BTreeMap<(String, String), Transaction> = BTreeMap::new();
    let mut remove = |entry: (String, String), key: Key, write: Write| {
        let transaction = gone.entry(entry).or_default();
        transaction.conditions.push(view.unmodified(&key));
        transaction.writes.push(write);
    };
    for (entry, endpoint) in &view.endpoints {
        if endpoint.node == own.id && !own.endpoints.contains_key(entry) {
            let key = Key::Endpoint { network: entry.0.clone(), name: entry.1.clone() };
            remove(entry.clone(), key.clone(), Write::Delete(key.to_string()));
        }
    }
    for ((network, address), claim) in &view.addresses {
        let Claim::Endpoint { name, node } = claim else { continue };
        let entry = (network.clone(), name.clone());
        let is_used = own.endpoints.get(&entry).is_some_and(|one| one.addresses.contains(address));
        if *node == own.id && !is_used {
            let key = claim_key(network, *address);
            remove(entry, key.clone(), quarantine(network, *address, now));
        }
    }
    gone.into_values().collect()
}

fn quarantine(network: &str, address: IpAddr, now: u64) -> Write {
    let until = Claim::Quarantined(now + QUARANTINE.as_secs());
    put(&Record::Address(network.to_owned(), address, until), None)
}

/// Returns the transactions that remove the host `id`, with its endpoints and claims: the last one
/// removes the host itself.
#[must_use]
pub fn removal(view: &View, id: &str, now: u64) -> Vec<Transaction> {
    let nobody = Node {
        index: 0,
        vtep: [0, 0, 0, 0].into(),
        boot: String::new(),
        machine: String::new(),
        mtu: 0,
    };
    let own =
        Own { id: id.to_owned(), node: nobody, underlay: Vec::new(), endpoints: BTreeMap::new() };
    let mut transactions = stale(view, &own, now);
    let mut last = Transaction::default();
    let indexes = view.node_indexes.iter().filter(|(_, holder)| *holder == id);
    let keys = indexes.map(|(index, _)| Key::NodeIndex(*index));
    for key in keys.chain([Key::Node(id.to_owned())]) {
        last.conditions.push(view.unmodified(&key));
        last.writes.push(Write::Delete(key.to_string()));
    }
    transactions.push(last);
    transactions
}

/// Returns a VNI that no network has. `random` is called until one is found.
pub fn unused_vni(view: &View, mut random: impl FnMut() -> u32) -> u32 {
    loop {
        let vni = FIRST_VNI + random() % (MAX_VNI - FIRST_VNI + 1);
        if !view.written.contains_key(&Key::Vni(vni)) {
            return vni;
        }
    }
}

/// Returns the transaction that creates a network.
///
/// # Errors
/// The network exists, a subnet is in use, or the limit is reached.
pub fn creation(view: &View, name: &str, network: &Network) -> Result<Transaction, Refusal> {
    if view.networks.contains_key(name) {
        return Err(Refusal::NetworkExists(name.to_owned()));
    }
    if view.networks.len() >= MAX_NETWORKS {
        return Err(Refusal::TooManyNetworks);
    }
    for subnet in network.subnets.iter().map(|one| one.subnet) {
        let others = view
            .networks
            .iter()
            .flat_map(|(name, other)| other.subnets.iter().map(move |one| (name, one.subnet)));
        for (other_network, other) in others {
            if subnets_overlap(&other, &subnet) {
                let (network, other_network) = (name.to_owned(), other_network.clone());
                return Err(Refusal::SubnetsOverlap { network, subnet, other_network, other });
            }
        }
    }
    let keys = [Key::Network(name.to_owned()), Key::Vni(network.vni), Key::Topology];
    Ok(Transaction {
        conditions: keys.iter().map(|key| view.unmodified(key)).collect(),
        writes: vec![
            put(&Record::Network(name.to_owned(), network.clone()), None),
            put(&Record::Vni(network.vni, name.to_owned()), None),
            put(&Record::Topology(view.topology + 1), None),
        ],
    })
}

/// Returns the transaction that removes a network without endpoints.
///
/// # Errors
/// The network does not exist, or has endpoints.
pub fn deletion(view: &View, name: &str) -> Result<Transaction, Refusal> {
    let network = view.networks.get(name);
    let network = network.ok_or_else(|| Refusal::UnknownNetwork(name.to_owned()))?;
    let mut endpoints: BTreeSet<String> = view
        .endpoints_on(name)
        .map(|(endpoint, record)| format!("{endpoint} on {}", record.node))
        .collect();
    // Those of silent hosts have no record, but keep their addresses.
    endpoints.extend(view.claims_on(name).filter_map(|(_, claim)| match claim {
        Claim::Endpoint { name, node } => Some(format!("{name} on {node}")),
        Claim::Quarantined(_) => None,
    }));
    if !endpoints.is_empty() {
        let endpoints = endpoints.into_iter().collect();
        return Err(Refusal::InUse { network: name.to_owned(), endpoints });
    }
    let keys = [Key::Network(name.to_owned()), Key::Vni(network.vni)];
    let mut conditions: Vec<_> = keys.iter().map(|key| view.unmodified(key)).collect();
    conditions.push(Condition::NoneBelow(Key::endpoints_of(name)));
    let writes = keys.iter().map(|key| Write::Delete(key.to_string())).collect();
    Ok(Transaction { conditions, writes })
}

/// Returns a free address in each subnet of `network` without one in `fixed`, at `now` in seconds
/// since the Unix epoch: the one after the highest that is claimed, or the lowest free one.
///
/// # Errors
/// The network does not exist, or a subnet is full.
pub fn free_addresses(
    view: &View,
    network: &str,
    fixed: &[IpAddr],
    now: u64,
) -> Result<Vec<IpAddr>, Refusal> {
    let record = view.networks.get(network);
    let record = record.ok_or_else(|| Refusal::UnknownNetwork(network.to_owned()))?;
    let is_taken = |address: IpAddr| match view.addresses.get(&(network.to_owned(), address)) {
        Some(Claim::Endpoint { .. }) => true,
        Some(Claim::Quarantined(until)) => *until > now,
        None => false,
    };
    let mut chosen = Vec::new();
    for one in &record.subnets {
        if fixed.iter().any(|address| one.subnet.contains(address)) {
            continue;
        }
        let highest = view.claims_on(network).map(|(address, _)| address);
        let highest = highest.filter(|address| one.subnet.contains(address)).max();
        let after = highest.map(|highest| next(highest)).into_iter();
        // More addresses than claims need not be tried.
        let hosts = one.subnet.hosts().take(view.addresses.len() + 4);
        let free = after.chain(hosts).find(|address| {
            one.subnet.contains(address)
                && *address != one.gateway
                && address_problem(*address, &one.subnet).is_none()
                && !is_taken(*address)
        });
        let (network, subnet) = (network.to_owned(), one.subnet);
        chosen.push(free.ok_or(Refusal::NoAddress { network, subnet })?);
    }
    Ok(chosen)
}

/// The address after `ip`.
fn next(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4(ip.to_bits().wrapping_add(1).into()),
        IpAddr::V6(ip) => IpAddr::V6(ip.to_bits().wrapping_add(1).into()),
    }
}

/// Returns why `network` is not available on the host `own`.
#[must_use]
pub fn obstacle(own: &Own, name: &str, network: &Network) -> Option<Refusal> {
    for subnet in network.subnets.iter().map(|one| one.subnet) {
        if let Some(underlay) = own.underlay.iter().find(|net| subnets_overlap(net, &subnet)) {
            let (network, underlay) = (name.to_owned(), *underlay);
            return Some(Refusal::Underlay { network, subnet, underlay });
        }
    }
    let (overhead, available) = (crate::device::overhead(&own.node.vtep), own.node.mtu);
    let needed = network.mtu + overhead;
    (needed > available).then(|| Refusal::Mtu {
        network: name.to_owned(),
        mtu: network.mtu,
        needed,
        available,
        fitting: available.saturating_sub(overhead),
    })
}
