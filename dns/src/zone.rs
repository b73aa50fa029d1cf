//! Networks, their endpoints and names, and the names that each client can resolve. Pure.
//!
//! A container is a client with an endpoint on each of its networks. It can resolve the names of
//! endpoints on its own networks only; a name on another network does not exist for it.
//!
//! ```text
//! container ──► its networks, in the order of joining ──► names ──► endpoints ──► addresses
//! ```
//!
//! All tables have limits ([`Limits`]). A change that exceeds one is rejected as a whole.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::client_id::ClientId;
use crate::error::ZoneError;
use crate::metrics::NetworkStats;
use crate::name::{Name, suffixes};
use crate::partition::Partition;
use crate::servers::ServerList;
use ipnet::IpNet;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// Limits of networks, endpoints and names.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Networks. Default: 4096.
    pub networks: usize,
    /// Endpoints of all networks. Default: 65,536.
    pub endpoints: usize,
    /// Names of one endpoint, including aliases. Default: 64.
    pub names: usize,
    /// Addresses of one endpoint. Default: 16.
    pub addresses: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { networks: 4096, endpoints: 65_536, names: 64, addresses: 16 }
    }
}

/// A network as the resolver needs it.
#[derive(Clone, Debug)]
pub struct NetworkSpec {
    /// The unique name of the network, as in metrics.
    pub name: String,
    /// `DOMAIN` in `web.DOMAIN`. Networks may share it. Default: the name.
    pub domain: Option<String>,
    /// The subnets. Reverse queries for addresses in them are never forwarded; without an endpoint
    /// the response is NXDOMAIN.
    pub subnets: Vec<IpNet>,
    /// The network has no egress: no query is forwarded for containers on internal networks only.
    pub internal: bool,
    /// The upstream servers; empty for those of the host.
    pub servers: Vec<std::net::SocketAddr>,
    /// A guard at every bridge port drops packets with a source address other than that of the
    /// endpoint. A server at the gateway then identifies clients by their address, and refuses
    /// addresses without an endpoint. If `false`, because an endpoint may use any address, no
    /// client is identified, and all of them get what an endpoint on this network alone would get.
    pub sources_are_verified: bool,
}

/// A network without a name and with verified source addresses.
impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            domain: None,
            subnets: Vec::new(),
            internal: false,
            servers: Vec::new(),
            sources_are_verified: true,
        }
    }
}

/// An endpoint of a container on a network.
#[derive(Clone, Debug, Default)]
pub struct EndpointSpec {
    /// The container, as in [`ClientId::Container`].
    pub container: String,
    /// The name of the container.
    pub name: String,
    /// Aliases on this network, and the short ID.
    pub aliases: Vec<String>,
    /// The host name of the container, if it differs from the name. A host name with dots resolves
    /// only for the container itself, because other containers may mean the public host of that
    /// name.
    pub hostname: Option<String>,
    /// The addresses on this network.
    pub addresses: Vec<IpAddr>,
}

/// A stored endpoint.
#[derive(Debug)]
pub(crate) struct Endpoint {
    container: Arc<str>,
    pub(crate) v4: Vec<Ipv4Addr>,
    pub(crate) v6: Vec<Ipv6Addr>,
    /// The PTR target of its addresses: `name.domain.` in wire format.
    pub(crate) canonical: Arc<[u8]>,
    names: Vec<Name>,
}

/// An endpoint that holds a name.
#[derive(Debug)]
struct Holder {
    endpoint: Arc<Endpoint>,
    /// Whether the name resolves for the container itself only.
    own: bool,
}

#[derive(Debug)]
pub(crate) struct Network {
    domain: Name,
    subnets: Vec<IpNet>,
    internal: bool,
    sources_are_verified: bool,
    /// The partition of clients on this network only.
    own_partition: Partition,
    servers: Option<ServerList>,
    names: HashMap<Name, Vec<Holder>>,
    reverse: HashMap<IpAddr, Arc<Endpoint>>,
    /// Endpoints by container and name.
    endpoints: BTreeMap<(Arc<str>, Name), Arc<Endpoint>>,
    /// `name.domain` of removed endpoints, oldest first. They are not forwarded, so that the name
    /// of a restarting service is not disclosed to upstream servers.
    removed: VecDeque<Name>,
    pub(crate) stats: Arc<NetworkStats>,
}

/// Maximum number of removed names per network.
const MAX_REMOVED: usize = 256;

impl Network {
    /// Records a removed name if it is qualified; other names are not forwarded anyway.
    fn remember_removed(&mut self, name: &Name) {
        let is_qualified =
            suffixes(name.wire()).skip(1).any(|(_, suffix)| suffix == self.domain.wire());
        if is_qualified && !self.removed.contains(name) {
            if self.removed.len() == MAX_REMOVED {
                self.removed.pop_front();
            }
            self.removed.push_back(name.clone());
        }
    }
}

/// Number of a network, ascending in the order of creation and never reused.
type Number = u32;

/// The networks of a container.
#[derive(Debug)]
struct Membership {
    /// Networks in the order of joining, with the number of endpoints on each.
    networks: Vec<(Number, usize)>,
    partition: Partition,
}

impl Membership {
    fn of(networks: Vec<(Number, usize)>) -> Self {
        let partition = Partition::of(networks.iter().map(|(number, _)| *number));
        Self { networks, partition }
    }
}

/// All networks and endpoints.
#[derive(Debug, Default)]
pub(crate) struct Zones {
    limits: Limits,
    networks: BTreeMap<Number, Network>,
    by_name: BTreeMap<String, Number>,
    by_domain: HashMap<Name, Vec<Number>>,
    containers: HashMap<Arc<str>, Membership>,
    endpoints: usize,
    next: Number,
}

impl Zones {
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Adds a network without endpoints.
    pub(crate) fn add_network(
        &mut self,
        spec: &NetworkSpec,
        servers: Option<ServerList>,
        stats: Arc<NetworkStats>,
    ) -> Result<(), ZoneError> {
        let domain = parse(spec.domain.as_ref().unwrap_or(&spec.name))?;
        let is_taken = spec.domain.is_none() && self.by_domain.contains_key(&domain);
        if is_taken || self.by_name.contains_key(&spec.name) {
            return Err(ZoneError::NetworkExists(spec.name.clone()));
        }
        if self.networks.len() >= self.limits.networks {
            return Err(ZoneError::TooManyNetworks {
                network: spec.name.clone(),
                limit: self.limits.networks,
            });
        }
        let number = self.next;
        self.next += 1;
        self.by_name.insert(spec.name.clone(), number);
        self.by_domain.entry(domain.clone()).or_default().push(number);
        let network = Network {
            domain,
            subnets: spec.subnets.clone(),
            internal: spec.internal,
            sources_are_verified: spec.sources_are_verified,
            own_partition: Partition::of([number]),
            servers,
            names: HashMap::new(),
            reverse: HashMap::new(),
            endpoints: BTreeMap::new(),
            removed: VecDeque::new(),
            stats,
        };
        self.networks.insert(number, network);
        Ok(())
    }

    /// Sets whether sources of queries on `network` identify endpoints.
    pub(crate) fn set_sources_verified(&mut self, network: &str, verified: bool) {
        let number = self.by_name.get(network);
        if let Some(network) = number.and_then(|number| self.networks.get_mut(number)) {
            network.sources_are_verified = verified;
        }
    }

    /// Removes a network and its endpoints. Returns whether it existed.
    pub(crate) fn remove_network(&mut self, name: &str) -> bool {
        let Some(number) = self.by_name.remove(name) else { return false };
        let Some(network) = self.networks.remove(&number) else { return false };
        if let Some(numbers) = self.by_domain.get_mut(&network.domain) {
            numbers.retain(|one| *one != number);
            if numbers.is_empty() {
                self.by_domain.remove(&network.domain);
            }
        }
        self.endpoints -= network.endpoints.len();
        for (container, _) in network.endpoints.into_keys() {
            self.leave(&container, number);
        }
        true
    }

    /// Adds an endpoint, or replaces the one of this container on this network with the same name.
    /// Returns its names that are also names of endpoints of other containers.
    pub(crate) fn add_endpoint(
        &mut self,
        network: &str,
        spec: &EndpointSpec,
    ) -> Result<Vec<String>, ZoneError> {
        let number = self.number(network)?;
        let limit_exceeded =
            |what, limit| ZoneError::TooMany { endpoint: spec.name.clone(), what, limit };
        if spec.aliases.len() + 2 > self.limits.names {
            return Err(limit_exceeded("names", self.limits.names));
        }
        if spec.addresses.len() > self.limits.addresses {
            return Err(limit_exceeded("addresses", self.limits.addresses));
        }
        let name = parse(&spec.name)?;
        let Some(suffix) = self.networks.get(&number).map(|one| one.domain.clone()) else {
            return Err(ZoneError::NoNetwork(network.to_owned()));
        };
        let mut names: Vec<(Name, bool)> = Vec::new();
        let mut add = |name: Name, own: bool| {
            if !names.iter().any(|(other, _)| *other == name) {
                names.push((name, own));
            }
        };
        for text in std::iter::once(&spec.name).chain(&spec.aliases) {
            let name = parse(text)?;
            add(
                name.below(&suffix)
                    .map_err(|source| ZoneError::Name { name: text.clone(), source })?,
                false,
            );
            add(name, false);
        }
        if let Some(text) = &spec.hostname {
            let name = parse(text)?;
            let own = !name.is_single_label();
            add(name, own);
        }
        let key = (Arc::from(spec.container.as_str()), name.clone());
        let exists = self.networks.get(&number).is_some_and(|one| one.endpoints.contains_key(&key));
        if !exists && self.endpoints >= self.limits.endpoints {
            return Err(limit_exceeded("endpoints", self.limits.endpoints));
        }
        let canonical = name
            .below(&suffix)
            .map_err(|source| ZoneError::Name { name: spec.name.clone(), source })?;
        // Joined before the replaced endpoint is removed, so that the network keeps its position in
        // the order of the container.
        self.join(key.0.clone(), number);
        if exists {
            self.remove_endpoint(network, &spec.container, &spec.name);
        }
        let Some(zone) = self.networks.get_mut(&number) else { return Ok(Vec::new()) };
        let endpoint = Arc::new(Endpoint {
            container: key.0.clone(),
            v4: spec.addresses.iter().filter_map(v4).collect(),
            v6: spec.addresses.iter().filter_map(v6).collect(),
            canonical: canonical.wire().into(),
            names: names.iter().map(|(name, _)| name.clone()).collect(),
        });
        let mut shared = Vec::new();
        for (name, own) in names {
            let text = name.to_string();
            let holders = zone.names.entry(name).or_default();
            if holders.iter().any(|other| other.endpoint.container != endpoint.container) {
                shared.push(text);
            }
            holders.push(Holder { endpoint: Arc::clone(&endpoint), own });
        }
        for address in &spec.addresses {
            zone.reverse.insert(*address, Arc::clone(&endpoint));
        }
        zone.endpoints.insert(key, endpoint);
        self.endpoints += 1;
        Ok(shared)
    }

    /// Removes an endpoint. Returns whether it existed.
    pub(crate) fn remove_endpoint(&mut self, network: &str, container: &str, name: &str) -> bool {
        let (Ok(number), Ok(name)) = (self.number(network), parse(name)) else { return false };
        let Some(zone) = self.networks.get_mut(&number) else { return false };
        let key = (Arc::from(container), name);
        let Some(endpoint) = zone.endpoints.remove(&key) else { return false };
        for name in &endpoint.names {
            if let Some(holders) = zone.names.get_mut(name) {
                holders.retain(|holder| !Arc::ptr_eq(&holder.endpoint, &endpoint));
                if holders.is_empty() {
                    zone.names.remove(name);
                    zone.remember_removed(name);
                }
            }
        }
        let addresses = endpoint.v4.iter().map(|ip| IpAddr::V4(*ip));
        for address in addresses.chain(endpoint.v6.iter().map(|ip| IpAddr::V6(*ip))) {
            if zone.reverse.get(&address).is_some_and(|holder| Arc::ptr_eq(holder, &endpoint)) {
                zone.reverse.remove(&address);
            }
        }
        self.endpoints -= 1;
        self.leave(&key.0, number);
        true
    }

    /// The counters of each network, and its number of endpoints.
    pub(crate) fn stats(&self) -> Vec<(Arc<NetworkStats>, usize)> {
        self.networks.values().map(|one| (Arc::clone(&one.stats), one.endpoints.len())).collect()
    }

    fn number(&self, network: &str) -> Result<Number, ZoneError> {
        self.by_name.get(network).copied().ok_or_else(|| ZoneError::NoNetwork(network.to_owned()))
    }

    fn join(&mut self, container: Arc<str>, number: Number) {
        let membership =
            self.containers.entry(container).or_insert_with(|| Membership::of(Vec::new()));
        match membership.networks.iter_mut().find(|(one, _)| *one == number) {
            Some((_, endpoints)) => *endpoints += 1,
            None => {
                let mut networks = std::mem::take(&mut membership.networks);
                networks.push((number, 1));
                *membership = Membership::of(networks);
            }
        }
    }

    fn leave(&mut self, container: &Arc<str>, number: Number) {
        let Some(membership) = self.containers.get_mut(container) else { return };
        let mut networks = std::mem::take(&mut membership.networks);
        for (one, endpoints) in &mut networks {
            if *one == number {
                *endpoints -= 1;
            }
        }
        networks.retain(|(_, endpoints)| *endpoints > 0);
        if networks.is_empty() {
            self.containers.remove(container);
        } else {
            *membership = Membership::of(networks);
        }
    }

    /// The view of `client_id` for a query from `source`.
    pub(crate) fn view<'a>(&'a self, client_id: &'a ClientId, source: IpAddr) -> View<'a> {
        match client_id {
            ClientId::Container(container) => {
                let membership = self.containers.get(container);
                let visible = membership.map_or(Visibility::Nothing(None), Visibility::Joined);
                View { zones: self, container: Some(container), visible }
            }
            ClientId::Network(name) => {
                let network =
                    self.by_name.get(&**name).and_then(|number| self.networks.get(number));
                let Some(network) = network else {
                    return View {
                        zones: self,
                        container: None,
                        visible: Visibility::Nothing(None),
                    };
                };
                if !network.sources_are_verified {
                    return View {
                        zones: self,
                        container: None,
                        visible: Visibility::One(network),
                    };
                }
                let container = network.reverse.get(&source).map(|endpoint| &endpoint.container);
                let membership = container.and_then(|container| self.containers.get(container));
                let visible =
                    membership.map_or(Visibility::Nothing(Some(network)), Visibility::Joined);
                View { zones: self, container, visible }
            }
        }
    }
}

/// The networks and names that are visible to one client.
pub(crate) struct View<'a> {
    zones: &'a Zones,
    container: Option<&'a Arc<str>>,
    visible: Visibility<'a>,
}

/// The visible networks.
#[derive(Clone, Copy)]
enum Visibility<'a> {
    /// Those of a container.
    Joined(&'a Membership),
    /// The one whose gateway received the query.
    One(&'a Network),
    /// None. The queries of an unknown client at a gateway are counted for that network.
    Nothing(Option<&'a Network>),
}

impl<'a> View<'a> {
    /// The visible networks in the order of joining.
    fn networks(&self) -> impl Iterator<Item = &'a Network> + use<'a> {
        let zones = self.zones;
        let (joined, one) = match self.visible {
            Visibility::Joined(membership) => (&*membership.networks, None),
            Visibility::One(network) => (&[][..], Some(network)),
            Visibility::Nothing(_) => (&[][..], None),
        };
        joined.iter().filter_map(|(number, _)| zones.networks.get(number)).chain(one)
    }

    /// The counters for queries of this client: those of the network that it joined first.
    pub(crate) fn stats(&self) -> Option<&'a Arc<NetworkStats>> {
        let network = match self.visible {
            Visibility::Nothing(network) => network,
            Visibility::Joined(_) | Visibility::One(_) => self.networks().next(),
        };
        network.map(|network| &network.stats)
    }

    /// Whether the client is at a gateway and its address belongs to no endpoint of that network.
    pub(crate) fn is_unknown_client(&self) -> bool {
        matches!(self.visible, Visibility::Nothing(Some(_)))
    }

    /// The client to whose share of the limits the query is charged: the container, whichever
    /// server it uses, or `client_id` if the container is not known.
    pub(crate) fn client_id(&self, client_id: &ClientId) -> ClientId {
        self.container.map_or_else(
            || client_id.clone(),
            |container| ClientId::Container(Arc::clone(container)),
        )
    }

    /// The partition of the client.
    pub(crate) fn partition(&self) -> Partition {
        match self.visible {
            Visibility::Joined(membership) => membership.partition.clone(),
            Visibility::One(network) => network.own_partition.clone(),
            Visibility::Nothing(_) => Partition::of([]),
        }
    }

    /// The visible endpoints with a name, by network.
    pub(crate) fn endpoints_with_name<'n>(
        &self,
        name: &'n [u8],
    ) -> impl Iterator<Item = impl Iterator<Item = &'a Endpoint> + use<'a>> + use<'a, 'n> {
        let container = self.container;
        self.networks().filter_map(|network| network.names.get(name)).map(move |holders| {
            let is_visible = move |holder: &&Holder| {
                !holder.own
                    || container.is_some_and(|container| **container == *holder.endpoint.container)
            };
            holders.iter().filter(is_visible).map(|holder| &*holder.endpoint)
        })
    }

    /// The endpoint with `address` on a visible network.
    pub(crate) fn endpoint_with_address(&self, address: IpAddr) -> Option<&'a Endpoint> {
        self.networks()
            .find_map(|network| network.reverse.get(&address))
            .map(|endpoint| &**endpoint)
    }

    /// Whether `address` is in the subnet of any network.
    pub(crate) fn is_in_any_subnet(&self, address: IpAddr) -> bool {
        self.zones
            .networks
            .values()
            .any(|network| network.subnets.iter().any(|subnet| subnet.contains(&address)))
    }

    /// If `name` is or was `name.domain` of an endpoint on any network, the offset of the domain in
    /// it.
    pub(crate) fn hidden(&self, name: &[u8]) -> Option<usize> {
        let is_known = |network: &Network| {
            network.names.contains_key(name)
                || network.removed.iter().any(|removed| removed.wire() == name)
        };
        suffixes(name).skip(1).find_map(|(at, suffix)| {
            let mut numbers = self.zones.by_domain.get(suffix)?.iter();
            numbers
                .any(|number| self.zones.networks.get(number).is_some_and(is_known))
                .then_some(at)
        })
    }

    /// Whether the client has egress.
    pub(crate) fn may_forward(&self) -> bool {
        self.networks().any(|network| !network.internal)
    }

    /// The server list of the first visible network with egress that has one.
    pub(crate) fn servers(&self) -> Option<&'a ServerList> {
        self.networks()
            .filter(|network| !network.internal)
            .find_map(|network| network.servers.as_ref())
    }
}

fn v4(ip: &IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Some(*ip),
        IpAddr::V6(_) => None,
    }
}

fn v6(ip: &IpAddr) -> Option<Ipv6Addr> {
    match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(*ip),
    }
}

fn parse(text: &str) -> Result<Name, ZoneError> {
    Name::parse(text).map_err(|source| ZoneError::Name { name: text.to_owned(), source })
}

#[cfg(test)]
pub(crate) mod tests;
