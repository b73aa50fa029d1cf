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
use crate::record::{Binding, Claim, Endpoint, EndpointKey, Network, Node, Record, ServicePort};
use crate::store::{Condition, LeaseId, Transaction, Write};
use crate::view::View;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tidegate_model::validity::{address_problem, subnets_overlap};

/// Time for which a released address is not used again.
pub const QUARANTINE: Duration = Duration::from_secs(600);

/// Maximum number of hosts of a cluster. Each sends heartbeats to all others.
pub const MAX_HOSTS: u16 = 128;

/// Maximum number of overlay networks of a cluster.
pub const MAX_NETWORKS: usize = 1_000;

/// Smallest VNI that is chosen. Swarm and others start at the lower end.
const FIRST_VNI: u32 = 1 << 20;

/// Endpoints in one transaction: each has at most six conditions and five writes, if both of its
/// addresses change.
const BATCH: usize = 16;

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
    pub endpoints: BTreeMap<EndpointKey, Endpoint>,
    /// What it has made of services, by their names.
    pub bindings: BTreeMap<String, Binding>,
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
    /// The service exists.
    #[error("service {0} exists in the cluster")]
    ServiceExists(String),
    /// The service does not exist.
    #[error("there is no service {0} in the cluster")]
    UnknownService(String),
    /// The service is not valid.
    #[error("service {service}: {problem}")]
    InvalidService {
        /// The service.
        service: String,
        /// Why.
        problem: &'static str,
    },
    /// Another service publishes the port.
    #[error("service {service}: port {port} is published by service {holder} of the cluster")]
    PortTaken {
        /// The service.
        service: String,
        /// The port.
        port: ServicePort,
        /// The other service.
        holder: String,
    },
    /// The cluster has [`MAX_SERVICES`](crate::services::MAX_SERVICES) services.
    #[error("the cluster has {} services, which is the maximum", crate::services::MAX_SERVICES)]
    TooManyServices,
    /// Services are on the network.
    #[error("network {network} has services: {}; remove them first", .services.join(", "))]
    HasServices {
        /// The network.
        network: String,
        /// The services.
        services: Vec<String>,
    },
}

/// The writes of [`registration`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// Transactions that do not depend on each other. If there are none, the records are as they
    /// should be.
    pub transactions: Vec<Transaction>,
    /// Endpoints that cannot be recorded, by network and name.
    pub refused: BTreeMap<EndpointKey, Refusal>,
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
    // The changes of one endpoint are one transaction: a recorded endpoint has its addresses.
    let mut changes: BTreeMap<EndpointKey, Transaction> = BTreeMap::new();
    let mut taken: BTreeMap<(&str, IpAddr), &str> = BTreeMap::new();
    for (key, endpoint) in &own.endpoints {
        let (network, name) = key;
        let holder = endpoint.addresses.iter().find_map(|address| {
            taken.get(&(network, *address)).map(|holder| (*address, (*holder).to_owned()))
        });
        let recorded = match holder {
            Some((address, holder)) => Err(Refusal::AddressTaken {
                network: network.clone(),
                name: name.clone(),
                address,
                holder,
                host: own.id.clone(),
            }),
            None => record(view, key, endpoint, lease, now),
        };
        match recorded {
            Ok(transaction) => {
                taken.extend(
                    endpoint.addresses.iter().map(|address| ((&**network, *address), &**name)),
                );
                changes.extend(transaction.map(|transaction| (key.clone(), transaction)));
            }
            Err(refusal) => drop(registration.refused.insert(key.clone(), refusal)),
        }
    }
    for (key, transaction) in stale(view, own, &registration.refused, now) {
        changes.entry(key).or_default().extend(transaction);
    }
    let mut changes: Vec<Transaction> = changes.into_values().collect();
    changes.extend(bindings(view, own, lease));
    for batch in changes.chunks(BATCH) {
        let mut all = Transaction::default();
        batch.iter().for_each(|one| all.extend(one.clone()));
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
            Record::Node(id.clone(), node).put(Some(lease)),
            Record::NodeIndex(index, id.clone()).put(None),
        ],
    }))
}

/// The record of an endpoint with the claims of its addresses. `None` if they are up to date.
fn record(
    view: &View,
    (network, name): &EndpointKey,
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
            Some(Claim::Quarantined(until)) if remaining(*until, now) > 0 => {
                let seconds = remaining(*until, now);
                return Err(Refusal::Quarantined { network, name, address, seconds });
            }
            _ => {}
        }
        conditions.push(view.unmodified(&claim_key(&network, address)));
        if claim != Some(&own) {
            writes.push(Record::Address(network, address, own.clone()).put(None));
        }
    }
    let key = Key::Endpoint { network: network.clone(), name: name.clone() };
    let has_lease = view.written.get(&key).is_some_and(|written| written.lease == Some(lease));
    if known != Some(endpoint) || !has_lease {
        conditions.push(view.unmodified(&key));
        let record = Record::Endpoint(network.clone(), name.clone(), endpoint.clone());
        writes.push(record.put(Some(lease)));
    }
    Ok((!writes.is_empty()).then_some(Transaction { conditions, writes }))
}

/// Writes and removes the records of services that the host has made.
fn bindings(view: &View, own: &Own, lease: LeaseId) -> Vec<Transaction> {
    let key_of = |service: &str| Key::Binding { service: service.to_owned(), node: own.id.clone() };
    let change = |key: &Key, write: Write| Transaction {
        conditions: vec![view.unmodified(key)],
        writes: vec![write],
    };
    let mut transactions = Vec::new();
    for (service, binding) in &own.bindings {
        let key = key_of(service);
        let entry = (service.clone(), own.id.clone());
        let has_lease = view.written.get(&key).is_some_and(|written| written.lease == Some(lease));
        if view.bindings.get(&entry) != Some(binding) || !has_lease {
            let record = Record::Binding(service.clone(), own.id.clone(), binding.clone());
            transactions.push(change(&key, record.put(Some(lease))));
        }
    }
    let recorded = view.bindings.keys().filter(|(_, node)| *node == own.id);
    for (service, _) in recorded.filter(|(service, _)| !own.bindings.contains_key(service)) {
        let key = key_of(service);
        transactions.push(change(&key, Write::Delete(key.to_string())));
    }
    transactions
}

/// Removes records and claims that the host no longer needs, by endpoint. `refused` are those of
/// its endpoints that cannot be recorded as they are.
fn stale(
    view: &View,
    own: &Own,
    refused: &BTreeMap<EndpointKey, Refusal>,
    now: u64,
) -> BTreeMap<EndpointKey, Transaction> {
    let mut gone: BTreeMap<EndpointKey, Transaction> = BTreeMap::new();
    let mut remove = |entry: EndpointKey, key: Key, write: Write| {
        let record = Key::Endpoint { network: entry.0.clone(), name: entry.1.clone() };
        let transaction = gone.entry(entry).or_default();
        // Also on an outdated view, no recorded endpoint loses an address.
        transaction.conditions.extend([view.unmodified(&key), view.unmodified(&record)]);
        transaction.writes.push(write);
    };
    for (entry, endpoint) in &view.endpoints {
        let is_former = match own.endpoints.get(entry) {
            Some(now) => refused.contains_key(entry) && now.addresses != endpoint.addresses,
            None => true,
        };
        if endpoint.node == own.id && is_former {
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
    gone
}

/// Returns the seconds until a quarantine ends. One that ends implausibly late was written by a
/// host whose clock was wrong, and would block the address for years: it is over.
fn remaining(until: u64, now: u64) -> u64 {
    let remaining = until.saturating_sub(now);
    if remaining > 2 * QUARANTINE.as_secs() { 0 } else { remaining }
}

fn quarantine(network: &str, address: IpAddr, now: u64) -> Write {
    let until = Claim::Quarantined(now + QUARANTINE.as_secs());
    Record::Address(network.to_owned(), address, until).put(None)
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
    let (underlay, endpoints, bindings) = Default::default();
    let own = Own { id: id.to_owned(), node: nobody, underlay, endpoints, bindings };
    let mut transactions: Vec<_> = stale(view, &own, &BTreeMap::new(), now).into_values().collect();
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
            Record::Network(name.to_owned(), network.clone()).put(None),
            Record::Vni(network.vni, name.to_owned()).put(None),
            Record::Topology(view.topology + 1).put(None),
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
    let services = view.services.iter().filter(|(_, service)| service.network == name);
    let services: Vec<String> = services.map(|(service, _)| service.clone()).collect();
    if !services.is_empty() {
        return Err(Refusal::HasServices { network: name.to_owned(), services });
    }
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
        Some(Claim::Quarantined(until)) => remaining(*until, now) > 0,
        None => false,
    };
    let mut chosen = Vec::new();
    for one in &record.subnets {
        if fixed.iter().any(|address| one.subnet.contains(address)) {
            continue;
        }
        let highest = view.claims_on(network).map(|(address, _)| address);
        let highest = highest.filter(|address| one.subnet.contains(address)).max();
        let after = highest.map(next).into_iter();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PREFIX;
    use crate::record::{EndpointState, Role, Subnet};
    use crate::store::{ClusterStore, Embedded};
    use proptest::prelude::*;
    use tidegate_model::MacAddress;

    fn own(number: u8) -> Own {
        let node = Node {
            index: 0,
            vtep: [192, 0, 2, number].into(),
            boot: String::new(),
            machine: format!("m{number}"),
            mtu: 1500,
        };
        let underlay = vec!["192.0.2.0/24".parse().unwrap()];
        let (endpoints, bindings) = Default::default();
        Own { id: format!("host-{number}"), node, underlay, endpoints, bindings }
    }

    fn endpoint(own: &Own, number: u8) -> Endpoint {
        Endpoint {
            node: own.id.clone(),
            generation: number.into(),
            addresses: vec![
                [10, 9, 0, number].into(),
                IpAddr::from([0xfd09, 0, 0, 0, 0, 0, 0, number.into()]),
            ],
            mac: MacAddress([2, 0, 0, 0, 0, number]),
            state: EndpointState::Ready,
            aliases: Vec::new(),
            hostname: None,
            role: Role::Container,
        }
    }

    fn network(vni: u32, subnet: &str) -> Network {
        let subnet: IpNet = subnet.parse().unwrap();
        let gateway = subnet.hosts().next().unwrap();
        Network { vni, subnets: vec![Subnet { subnet, gateway }], mtu: 1450, internal: false }
    }

    async fn view(store: &Embedded) -> View {
        let (entries, revision) = store.list(PREFIX).await.unwrap();
        View::of(&entries, revision).0
    }

    async fn commit(store: &Embedded, transaction: Transaction) -> bool {
        store.commit(transaction).await.unwrap().is_some()
    }

    fn run<T>(test: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test)
    }

    /// An operation of a random test, on host and name `0..3`.
    #[derive(Clone, Debug)]
    enum Op {
        /// The host has the endpoint, with one of a few addresses.
        Attach(u8, u8, u8),
        Detach(u8, u8),
        /// The host registers, on the view of this many operations ago.
        Register(u8, usize),
        /// The lease of the host ends.
        Expire(u8),
        /// Time passes.
        Later,
    }

    fn ops() -> impl Strategy<Value = Op> {
        let host = || 1_u8..4;
        prop_oneof![
            4 => (host(), 0_u8..3, 2_u8..6).prop_map(|(host, name, at)| Op::Attach(host, name, at)),
            2 => (host(), 0_u8..3).prop_map(|(host, name)| Op::Detach(host, name)),
            8 => (host(), 0_usize..4).prop_map(|(host, age)| Op::Register(host, age)),
            1 => host().prop_map(Op::Expire),
            1 => Just(Op::Later),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        /// Hosts register on old views, at any time, and with leases that end. A recorded endpoint
        /// has all of its addresses, no address has two owners, and in the end every host has
        /// recorded what it has, or knows why not.
        #[test]
        fn an_address_has_one_owner_and_registrations_converge(ops in proptest::collection::vec(ops(), 1..60)) {
            run(async {
                let store = Embedded::new();
                assert!(commit(&store, creation(&View::default(), "front", &network(9, "10.9.0.0/24")).unwrap()).await);
                let mut hosts: BTreeMap<u8, Own> = (1..4).map(|number| (number, own(number))).collect();
                let mut leases = BTreeMap::new();
                for number in 1..4 {
                    leases.insert(number, store.grant(Duration::from_secs(60)).await.unwrap());
                }
                let mut views = vec![view(&store).await];
                let mut now = 1_000;
                let check = |view: &View| {
                    for ((network, name), endpoint) in &view.endpoints {
                        let own = Claim::Endpoint { name: name.clone(), node: endpoint.node.clone() };
                        for address in &endpoint.addresses {
                            assert_eq!(view.addresses.get(&(network.clone(), *address)), Some(&own), "{name}");
                        }
                    }
                };
                for op in ops {
                    match op {
                        Op::Attach(host, name, at) => {
                            let own = hosts.get_mut(&host).unwrap();
                            let new = endpoint(own, at);
                            own.endpoints.insert(("front".into(), format!("e{name}")), new);
                        }
                        Op::Detach(host, name) => {
                            hosts.get_mut(&host).unwrap().endpoints.remove(&("front".into(), format!("e{name}")));
                        }
                        Op::Register(host, age) => {
                            let old = &views[views.len().saturating_sub(1 + age)];
                            if let Ok(registration) = registration(old, &hosts[&host], leases[&host], now) {
                                for transaction in registration.transactions {
                                    commit(&store, transaction).await;
                                }
                            }
                        }
                        Op::Expire(host) => {
                            store.revoke(leases[&host]).await.unwrap();
                            leases.insert(host, store.grant(Duration::from_secs(60)).await.unwrap());
                        }
                        Op::Later => now += QUARANTINE.as_secs() + 1,
                    }
                    let new = view(&store).await;
                    check(&new);
                    views.push(new);
                }
                now += QUARANTINE.as_secs() + 1;
                for _ in 0..6 {
                    for (number, own) in &hosts {
                        let old = view(&store).await;
                        for transaction in registration(&old, own, leases[number], now).unwrap().transactions {
                            commit(&store, transaction).await;
                        }
                    }
                    now += QUARANTINE.as_secs() + 1;
                }
                let last = view(&store).await;
                check(&last);
                for (number, own) in &hosts {
                    let registration = registration(&last, own, leases[number], now).unwrap();
                    assert_eq!(registration.transactions, [], "{}", own.id);
                    for (key, endpoint) in &own.endpoints {
                        let recorded = last.endpoints.get(key) == Some(endpoint);
                        assert!(recorded != registration.refused.contains_key(key), "{key:?}");
                    }
                }
            });
        }

        /// Free addresses are free, and are found while there are any.
        #[test]
        fn addresses_are_found_until_the_subnet_is_full(order in proptest::collection::vec(any::<bool>(), 20)) {
            let mut view = View::default();
            view.networks.insert("front".into(), network(9, "10.9.0.0/28"));
            let mut held: Vec<IpAddr> = Vec::new();
            for release in order {
                if release && !held.is_empty() {
                    view.addresses.remove(&("front".into(), held.remove(0)));
                    continue;
                }
                match free_addresses(&view, "front", &[], 0) {
                    Ok(found) => {
                        assert!(!held.contains(&found[0]) && found[0] != view.networks["front"].subnets[0].gateway);
                        let claim = Claim::Endpoint { name: "e".into(), node: "a".into() };
                        view.addresses.insert(("front".into(), found[0]), claim);
                        held.push(found[0]);
                    }
                    // 14 hosts without the gateway.
                    Err(Refusal::NoAddress { .. }) => assert_eq!(held.len(), 13),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    #[test]
    fn networks_are_created_one_after_another_and_removed_without_endpoints() {
        run(async {
            let store = Embedded::new();
            let empty = view(&store).await;
            let first = creation(&empty, "front", &network(9, "10.9.0.0/24")).unwrap();
            let second = creation(&empty, "back", &network(8, "10.9.0.0/16")).unwrap();
            assert!(commit(&store, first).await);
            assert!(!commit(&store, second).await, "decided without the first one");
            let now = view(&store).await;
            let error = creation(&now, "back", &network(8, "10.9.0.0/16")).unwrap_err();
            assert!(matches!(error, Refusal::SubnetsOverlap { .. }), "{error}");
            let removal = deletion(&now, "front").unwrap();
            // Another host attaches meanwhile.
            let mut own = own(1);
            own.endpoints.insert(("front".into(), "web".into()), endpoint(&own, 2));
            let lease = store.grant(Duration::from_secs(60)).await.unwrap();
            for transaction in registration(&now, &own, lease, 0).unwrap().transactions {
                assert!(commit(&store, transaction).await);
            }
            assert!(!commit(&store, removal).await);
            let now = view(&store).await;
            assert_eq!(now.endpoints.len(), 1);
            let error = deletion(&now, "front").unwrap_err().to_string();
            assert!(error.contains("web on host-1"), "{error}");
            // The host is removed for good.
            for transaction in removal_of(&now) {
                assert!(commit(&store, transaction).await);
            }
            let now = view(&store).await;
            assert!(
                now.nodes.is_empty() && now.node_indexes.is_empty() && now.endpoints.is_empty()
            );
            assert!(commit(&store, deletion(&now, "front").unwrap()).await);
        });
    }

    fn removal_of(view: &View) -> Vec<Transaction> {
        removal(view, "host-1", 0)
    }

    /// Commits the registration of `own`, and returns what is refused.
    async fn register(store: &Embedded, own: &Own, now: u64) -> Vec<Refusal> {
        let lease = store.grant(Duration::from_secs(60)).await.unwrap();
        let registration = registration(&view(store).await, own, lease, now).unwrap();
        for transaction in registration.transactions {
            assert!(commit(store, transaction).await);
        }
        registration.refused.into_values().collect()
    }

    #[test]
    fn a_host_that_returns_after_a_week_has_its_addresses_unless_it_was_removed() {
        const WEEK: u64 = 7 * 24 * 3_600;
        for removed in [false, true] {
            run(async {
                let store = Embedded::new();
                let network = creation(&View::default(), "front", &network(9, "10.9.0.0/29"));
                assert!(commit(&store, network.unwrap()).await);
                let mut first = own(1);
                first.endpoints.insert(("front".into(), "web".into()), endpoint(&first, 2));
                assert_eq!(register(&store, &first, 0).await, []);
                // Its lease has ended.
                let (entries, _) = store.list(PREFIX).await.unwrap();
                for lease in entries.iter().filter_map(|entry| entry.lease) {
                    let _ = store.revoke(lease).await;
                }
                let gone = view(&store).await;
                assert!(gone.endpoints.is_empty() && gone.nodes.is_empty());
                if removed {
                    for transaction in removal_of(&gone) {
                        assert!(commit(&store, transaction).await);
                    }
                }
                let mut second = own(2);
                second.endpoints.insert(("front".into(), "db".into()), endpoint(&second, 2));
                let refused = register(&store, &second, WEEK).await;
                let taken = |refused: &[Refusal]| match refused {
                    [Refusal::AddressTaken { host, .. }] => Some(host.clone()),
                    _ => None,
                };
                let returned = register(&store, &first, WEEK + 1).await;
                if removed {
                    assert_eq!(refused, []);
                    assert_eq!(taken(&returned).as_deref(), Some("host-2"));
                } else {
                    assert_eq!(taken(&refused).as_deref(), Some("host-1"));
                    assert_eq!(returned, []);
                }
            });
        }
    }

    #[test]
    fn a_clock_that_was_wrong_blocks_no_address() {
        const YEAR: u64 = 365 * 24 * 3_600;
        let (now, quarantine) = (50 * YEAR, QUARANTINE.as_secs());
        assert_eq!(remaining(now + quarantine, now), quarantine);
        assert_eq!(remaining(now, now), 0);
        // The clocks of two hosts differ by some minutes.
        assert_eq!(remaining(now + quarantine + 300, now), quarantine + 300);
        // A clock was a year ahead, or at the epoch.
        assert_eq!(remaining(now + YEAR, now), 0);
        assert_eq!(remaining(quarantine, now), 0);
    }

    #[test]
    fn obstacles_of_a_host_are_named() {
        let own = own(1);
        assert_eq!(obstacle(&own, "front", &network(9, "10.9.0.0/24")), None);
        let error = obstacle(&own, "front", &network(9, "192.0.0.0/16")).unwrap().to_string();
        assert!(error.contains("192.0.0.0/16 overlaps 192.0.2.0/24"), "{error}");
        let large = Network { mtu: 1451, ..network(9, "10.9.0.0/24") };
        let error = obstacle(&own, "front", &large).unwrap().to_string();
        assert!(error.ends_with("create it with --mtu 1450"), "{error}");
    }
}
