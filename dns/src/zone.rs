//! Who is on which network under which names. Pure.
//!
//! A container is whoever asks, and has an endpoint on each network that it is on. What it may
//! learn are the names of the endpoints on its own networks, whatever else is known: a name of
//! another network is none to it.
//!
//! ```text
//! container ──► its networks, in the order in which it joined them ──► names ──► endpoints ──► addresses
//! ```
//!
//! Everything has a limit ([`Limits`]); what exceeds one is refused and changes nothing.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::error::ZoneError;
use crate::metrics::NetworkStats;
use crate::name::{Name, suffixes};
use crate::partition::Partition;
use crate::servers::ServerList;
use ipnet::IpNet;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Networks.
    pub networks: usize,
    /// Endpoints, of all networks together.
    pub endpoints: usize,
    /// Names of one endpoint, its aliases above all.
    pub names: usize,
    /// Addresses of one endpoint.
    pub addresses: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { networks: 4096, endpoints: 65_536, names: 64, addresses: 16 }
    }
}

/// A network, as far as names go.
#[derive(Clone, Debug)]
pub struct NetworkSpec {
    /// Its name: `NAME` in `web.NAME`, and in metrics.
    pub name: String,
    /// Its subnets: who asks for the name of an address in there that nobody has is told so, and
    /// nobody else is asked.
    pub subnets: Vec<IpNet>,
    /// Nothing is forwarded for containers that are on such networks only.
    pub internal: bool,
    /// The servers to forward to; empty for the host's.
    pub servers: Vec<std::net::SocketAddr>,
    /// Something at every bridge port drops packets whose source address is not the endpoint's. A
    /// server at the gateway then knows its clients by their addresses, and refuses addresses that
    /// no endpoint has. Where it is false, because an endpoint may use any address, no client is
    /// certain: all of them get what an endpoint on this network alone would get.
    pub sources_are_verified: bool,
}

/// A network without a name whose sources are verified.
impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            subnets: Vec::new(),
            internal: false,
            servers: Vec::new(),
            sources_are_verified: true,
        }
    }
}

/// A container's place on a network.
#[derive(Clone, Debug, Default)]
pub struct EndpointSpec {
    /// Whose it is: what [`Asker::Container`] has.
    pub container: String,
    /// The container's name.
    pub name: String,
    /// Other names that it has on this network, and its short id.
    pub aliases: Vec<String>,
    /// The container's host name, if it is not its name. One with dots is known to the container
    /// alone: its neighbours may want to reach whoever has it on the Internet.
    pub hostname: Option<String>,
    /// Its addresses on this network.
    pub addresses: Vec<IpAddr>,
}

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Asker {
    /// This container.
    Container(Arc<str>),
    /// The endpoint on this network that has the address that the question came from. Where sources
    /// are not verified ([`NetworkSpec::sources_are_verified`]), somebody on this network.
    Network(Arc<str>),
}

impl Asker {
    /// For the log: the endpoint that it is.
    pub(crate) fn endpoint(&self) -> Option<&str> {
        match self {
            Self::Container(name) => Some(name),
            Self::Network(_) => None,
        }
    }

    /// For the log: the network that it is on, where that is all that is known.
    pub(crate) fn network(&self) -> Option<&str> {
        match self {
            Self::Container(_) => None,
            Self::Network(name) => Some(name),
        }
    }
}

/// An endpoint as it is kept.
#[derive(Debug)]
pub(crate) struct Endpoint {
    container: Arc<str>,
    pub(crate) v4: Vec<Ipv4Addr>,
    pub(crate) v6: Vec<Ipv6Addr>,
    /// What its addresses are said to be: `name.network.`
    pub(crate) canonical: Arc<[u8]>,
    names: Vec<Name>,
}

/// One of the endpoints that have a name.
#[derive(Debug)]
struct Holder {
    endpoint: Arc<Endpoint>,
    /// Only the container itself is told.
    own: bool,
}

#[derive(Debug)]
pub(crate) struct Network {
    name: Name,
    subnets: Vec<IpNet>,
    internal: bool,
    sources_are_verified: bool,
    /// The partition of those who are on this network alone.
    alone: Partition,
    servers: Option<ServerList>,
    names: HashMap<Name, Vec<Holder>>,
    reverse: HashMap<IpAddr, Arc<Endpoint>>,
    /// By container and name.
    endpoints: BTreeMap<(Arc<str>, Name), Arc<Endpoint>>,
    /// `name.network` of endpoints that have gone, the oldest first: nobody outside shall be asked
    /// for a service that is being restarted.
    gone: VecDeque<Name>,
    pub(crate) stats: Arc<NetworkStats>,
}

/// Names of endpoints that have gone that a network remembers.
const GONE: usize = 256;

impl Network {
    /// Remembers a name that has gone, if it is one that others could be asked for.
    fn remember(&mut self, name: &Name) {
        let is_qualified =
            suffixes(name.wire()).skip(1).any(|(_, suffix)| suffix == self.name.wire());
        if is_qualified && !self.gone.contains(name) {
            if self.gone.len() == GONE {
                self.gone.pop_front();
            }
            self.gone.push_back(name.clone());
        }
    }
}

/// A network's number: in the order in which they were added.
type Number = u32;

/// Where a container is.
#[derive(Debug)]
struct Membership {
    /// Its networks, in the order in which it joined them, and how many endpoints it has on each.
    networks: Vec<(Number, usize)>,
    partition: Partition,
}

impl Membership {
    fn of(networks: Vec<(Number, usize)>) -> Self {
        let partition = Partition::of(networks.iter().map(|(number, _)| *number));
        Self { networks, partition }
    }
}

/// All networks.
#[derive(Debug, Default)]
pub(crate) struct Zones {
    limits: Limits,
    networks: BTreeMap<Number, Network>,
    by_name: BTreeMap<String, Number>,
    by_wire: HashMap<Name, Number>,
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
        let wire = parse(&spec.name)?;
        if self.by_wire.contains_key(&wire) {
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
        self.by_wire.insert(wire.clone(), number);
        let network = Network {
            name: wire,
            subnets: spec.subnets.clone(),
            internal: spec.internal,
            sources_are_verified: spec.sources_are_verified,
            alone: Partition::of([number]),
            servers,
            names: HashMap::new(),
            reverse: HashMap::new(),
            endpoints: BTreeMap::new(),
            gone: VecDeque::new(),
            stats,
        };
        self.networks.insert(number, network);
        Ok(())
    }

    /// Removes a network with its endpoints. Whether it was there.
    pub(crate) fn remove_network(&mut self, name: &str) -> bool {
        let Some(number) = self.by_name.remove(name) else { return false };
        let Some(network) = self.networks.remove(&number) else { return false };
        self.by_wire.remove(&network.name);
        self.endpoints -= network.endpoints.len();
        for (container, _) in network.endpoints.into_keys() {
            self.leave(&container, number);
        }
        true
    }

    /// Adds an endpoint, or puts it in the place of the one that this container has on this network
    /// under this name. Returns those of its names that other endpoints have as well.
    pub(crate) fn add_endpoint(
        &mut self,
        network: &str,
        spec: &EndpointSpec,
    ) -> Result<Vec<String>, ZoneError> {
        let number = self.number(network)?;
        let too_many =
            |what, limit| ZoneError::TooMany { endpoint: spec.name.clone(), what, limit };
        if spec.aliases.len() + 2 > self.limits.names {
            return Err(too_many("names", self.limits.names));
        }
        if spec.addresses.len() > self.limits.addresses {
            return Err(too_many("addresses", self.limits.addresses));
        }
        let name = parse(&spec.name)?;
        let suffix = parse(network)?;
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
        let there = self.networks.get(&number).is_some_and(|one| one.endpoints.contains_key(&key));
        if !there && self.endpoints >= self.limits.endpoints {
            return Err(too_many("endpoints", self.limits.endpoints));
        }
        let canonical = name
            .below(&suffix)
            .map_err(|source| ZoneError::Name { name: spec.name.clone(), source })?;
        // Before the old one goes, so that the network keeps its place in the container's order.
        self.join(key.0.clone(), number);
        if there {
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

    /// Removes an endpoint. Whether it was there.
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
                    zone.remember(name);
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

    /// What is counted of each network, and how many endpoints it has.
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

    /// What `asker` sees, having sent a question from `source`.
    pub(crate) fn view<'a>(&'a self, asker: &'a Asker, source: IpAddr) -> View<'a> {
        match asker {
            Asker::Container(container) => {
                let membership = self.containers.get(container);
                let sees = membership.map_or(Sees::Nothing(None), Sees::Joined);
                View { zones: self, container: Some(container), sees }
            }
            Asker::Network(name) => {
                let network =
                    self.by_name.get(&**name).and_then(|number| self.networks.get(number));
                let Some(network) = network else {
                    return View { zones: self, container: None, sees: Sees::Nothing(None) };
                };
                if !network.sources_are_verified {
                    return View { zones: self, container: None, sees: Sees::One(network) };
                }
                let container = network.reverse.get(&source).map(|endpoint| &endpoint.container);
                let membership = container.and_then(|container| self.containers.get(container));
                let sees = membership.map_or(Sees::Nothing(Some(network)), Sees::Joined);
                View { zones: self, container, sees }
            }
        }
    }
}

/// What one asker sees of the networks.
pub(crate) struct View<'a> {
    zones: &'a Zones,
    container: Option<&'a Arc<str>>,
    sees: Sees<'a>,
}

/// Which networks.
#[derive(Clone, Copy)]
enum Sees<'a> {
    /// Those that a container has joined.
    Joined(&'a Membership),
    /// The one at whose gateway somebody asks.
    One(&'a Network),
    /// None. A stranger at a gateway is counted with its network.
    Nothing(Option<&'a Network>),
}

impl<'a> View<'a> {
    /// In the order in which the asker joined them.
    fn networks(&self) -> impl Iterator<Item = &'a Network> + use<'a> {
        let zones = self.zones;
        let (joined, one) = match self.sees {
            Sees::Joined(membership) => (&*membership.networks, None),
            Sees::One(network) => (&[][..], Some(network)),
            Sees::Nothing(_) => (&[][..], None),
        };
        joined.iter().filter_map(|(number, _)| zones.networks.get(number)).chain(one)
    }

    /// What the asker's questions are counted with: the network that it joined first.
    pub(crate) fn stats(&self) -> Option<&'a Arc<NetworkStats>> {
        let network = match self.sees {
            Sees::Nothing(network) => network,
            Sees::Joined(_) | Sees::One(_) => self.networks().next(),
        };
        network.map(|network| &network.stats)
    }

    /// Whether it is somebody at a gateway whose address no endpoint there has.
    pub(crate) fn is_stranger(&self) -> bool {
        matches!(self.sees, Sees::Nothing(Some(_)))
    }

    /// Whose share of limits the question counts to: the container's that asks, whichever server it
    /// asks; of `asker` where the container is not known.
    pub(crate) fn asker(&self, asker: &Asker) -> Asker {
        self.container
            .map_or_else(|| asker.clone(), |container| Asker::Container(Arc::clone(container)))
    }

    /// With whom the asker shares what other servers have said.
    pub(crate) fn partition(&self) -> Partition {
        match self.sees {
            Sees::Joined(membership) => membership.partition.clone(),
            Sees::One(network) => network.alone.clone(),
            Sees::Nothing(_) => Partition::of([]),
        }
    }

    /// The endpoints that have a name and that the asker is told of, network by network.
    pub(crate) fn holders<'n>(
        &self,
        name: &'n [u8],
    ) -> impl Iterator<Item = impl Iterator<Item = &'a Endpoint> + use<'a>> + use<'a, 'n> {
        let container = self.container;
        self.networks().filter_map(|network| network.names.get(name)).map(move |holders| {
            let told = move |holder: &&Holder| {
                !holder.own
                    || container.is_some_and(|container| **container == *holder.endpoint.container)
            };
            holders.iter().filter(told).map(|holder| &*holder.endpoint)
        })
    }

    /// Whose address it is, on one of the asker's networks.
    pub(crate) fn holder(&self, address: IpAddr) -> Option<&'a Endpoint> {
        self.networks()
            .find_map(|network| network.reverse.get(&address))
            .map(|endpoint| &**endpoint)
    }

    /// Whether an address is one of a network, the asker's or not.
    pub(crate) fn is_inside(&self, address: IpAddr) -> bool {
        self.zones
            .networks
            .values()
            .any(|network| network.subnets.iter().any(|subnet| subnet.contains(&address)))
    }

    /// Whether it is, or was, `name.network` of an endpoint on some network, and if so where that
    /// network's name begins.
    pub(crate) fn hidden(&self, name: &[u8]) -> Option<usize> {
        suffixes(name).skip(1).find_map(|(at, suffix)| {
            let network = self.zones.networks.get(self.zones.by_wire.get(suffix)?)?;
            let is_known = network.names.contains_key(name)
                || network.gone.iter().any(|gone| gone.wire() == name);
            is_known.then_some(at)
        })
    }

    /// Whether the asker has egress.
    pub(crate) fn may_forward(&self) -> bool {
        self.networks().any(|network| !network.internal)
    }

    /// The servers of the first network that has some of its own and egress.
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
