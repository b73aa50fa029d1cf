//! Observation and modification of the kernel over rtnetlink, with one socket per namespace.

mod link;
mod messages;
mod observe;

use crate::{Fact, Firewall, Interface, KernelError, Observed, Op, Passes, Place, Uplink};
use futures_util::TryStreamExt;
use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoVeth, LinkAttribute, LinkExtentMask, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use tidegate_model::{Feature, registry};
use tidegate_netfilter::{
    BridgeGuard, BridgePolicy, Gate, GatePolicy, PortGuards, PortPolicy, SourceGuard,
};
use tidegate_netns::{Namespace, interface_index};
use tokio::runtime::Handle as Runtime;
use tokio::task::JoinHandle;

use link::Link;
use messages::{
    default_route, engine_route, group, link_of, message_of, reply_route, subnet_route,
};
use observe::{Depth, Snapshot};

/// Number of the `main` table (`RT_TABLE_MAIN`).
const MAIN: u32 = 254;

/// The TUN device of the NAT engine, which this crate can observe but not create.
pub trait EngineDevice: fmt::Debug + Send + Sync {
    /// Returns the interface index of the device.
    fn index(&self) -> u32;

    /// Creates the deleted link again with the same name and interface index, and attaches the
    /// engine to it.
    ///
    /// # Errors
    /// Another link has the name, or the kernel rejects it.
    fn reopen(&self) -> io::Result<()>;
}

/// The kernel state of a host namespace and of endpoint namespaces.
#[derive(Debug)]
pub struct Kernel {
    host: Namespace,
    /// The host namespace is used by tidegate only.
    exclusive: bool,
    firewall: Option<Arc<Firewall>>,
    guards: Option<Arc<PortGuards>>,
    sources: Option<Arc<SourceGuard>>,
    engine: Option<Arc<dyn EngineDevice>>,
    /// Gates that do not belong to the firewall, loaded on demand.
    gates: BTreeMap<Passes, Gate>,
    /// Key: addresses of the bridge.
    bridge_guards: BTreeMap<BridgePolicy, BridgeGuard>,
    endpoints: BTreeMap<String, Namespace>,
    connections: BTreeMap<Place, Connection>,
}

/// The location of an endpoint's end of a veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// In its namespace, under its name.
    InPlace,
    /// In place, but the host's end has another MAC address or MTU than it was given.
    Changed,
    /// Missing, or renamed; its name is free.
    Missing,
    /// In its namespace with this interface index, but the host's end is missing.
    Stray(u32),
    /// Replaced by another link with its name.
    Replaced,
}

/// An rtnetlink connection in one namespace, and its cached interface indexes.
#[derive(Debug)]
struct Connection {
    handle: Handle,
    task: JoinHandle<()>,
    indexes: BTreeMap<String, u32>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kernel {
    /// Creates an instance for the namespace `host`. Must be used within a tokio runtime.
    #[must_use]
    pub fn new(host: Namespace) -> Self {
        Self {
            host,
            exclusive: false,
            firewall: None,
            guards: None,
            sources: None,
            engine: None,
            gates: BTreeMap::new(),
            bridge_guards: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            connections: BTreeMap::new(),
        }
    }

    /// Declares that only tidegate uses the host namespace, so settings for all links may be
    /// changed.
    #[must_use]
    pub fn exclusive(self) -> Self {
        Self { exclusive: true, ..self }
    }

    /// Sets the firewall of the host.
    pub fn use_firewall(&mut self, firewall: Arc<Firewall>) {
        self.firewall = Some(firewall);
    }

    /// Sets the source guard for links of other software.
    pub fn use_source_guard(&mut self, guard: Arc<SourceGuard>) {
        self.sources = Some(guard);
    }

    /// Sets the port guards for endpoints.
    pub fn use_guards(&mut self, guards: Arc<PortGuards>) {
        self.guards = Some(guards);
    }

    /// Sets the device that is reopened if its link is deleted.
    pub fn use_engine(&mut self, device: Arc<dyn EngineDevice>) {
        self.engine = Some(device);
    }

    /// Returns whether the link with interface index `index` is the engine's device.
    fn is_engine_device(&self, index: u32) -> bool {
        self.engine.as_ref().is_none_or(|device| device.index() == index)
    }

    /// Registers the namespace of the endpoint `name` and returns the previous one.
    pub fn add_endpoint(&mut self, name: &str, namespace: Namespace) -> Option<Namespace> {
        self.connections.remove(&Place::Endpoint(name.to_owned()));
        self.endpoints.insert(name.to_owned(), namespace)
    }

    /// Forgets the namespace of the endpoint `name`.
    pub fn remove_endpoint(&mut self, name: &str) {
        self.connections.remove(&Place::Endpoint(name.to_owned()));
        self.endpoints.remove(name);
    }

    /// Returns whether the endpoint `name` is in the host namespace.
    pub(crate) fn is_on_the_host(&self, name: &str) -> bool {
        self.endpoints.get(name).is_some_and(|namespace| namespace.id() == self.host.id())
    }

    fn namespace(&self, place: &Place) -> Result<&Namespace, KernelError> {
        match place {
            Place::Host => Ok(&self.host),
            Place::Endpoint(name) => self.endpoints.get(name).ok_or_else(|| KernelError {
                what: format!("enter the namespace of {place}"),
                source: io::Error::new(io::ErrorKind::NotFound, "unknown endpoint"),
            }),
        }
    }

    /// Returns the connection to `place`, opened on demand. Only the most recent endpoint
    /// connection is kept, because there may be thousands of endpoints, each used once.
    fn connection(&mut self, place: &Place) -> Result<&mut Connection, KernelError> {
        if !self.connections.contains_key(place) {
            let open = || -> io::Result<Connection> {
                let namespace = self.namespace(place).map_err(|error| error.source)?;
                // The socket is registered with the runtime, possibly from another thread.
                let runtime = Runtime::current();
                let connect = || {
                    let _runtime = runtime.enter();
                    rtnetlink::new_connection()
                };
                let (connection, handle, _) = namespace.with(connect)??;
                let task = tokio::spawn(connection);
                Ok(Connection { handle, task, indexes: BTreeMap::new() })
            };
            let connection = open().map_err(|source| KernelError {
                what: format!("rtnetlink socket on {place}"),
                source,
            })?;
            if *place != Place::Host {
                self.connections.retain(|other, _| *other == Place::Host);
            }
            self.connections.insert(place.clone(), connection);
        }
        self.connections.get_mut(place).ok_or_else(|| KernelError {
            what: format!("rtnetlink socket on {place}"),
            source: io::ErrorKind::NotConnected.into(),
        })
    }

    /// Observes which of `facts` hold, and the surrounding state of the host.
    ///
    /// # Errors
    /// The first failed request. No facts hold for an unknown endpoint.
    pub async fn observe(&mut self, facts: &[Fact]) -> Result<Observed, KernelError> {
        self.observe_at(&Place::Host, facts, Depth::All).await
    }

    /// Observes `place` and the namespaces of `facts`, but not the addresses and routes of
    /// endpoints, which count as missing. The time does not depend on their number.
    pub(crate) async fn observe_links(
        &mut self,
        place: &Place,
        facts: &[Fact],
    ) -> Result<Observed, KernelError> {
        self.observe_at(place, facts, Depth::Links).await
    }

    /// Observes like [`observe`](Self::observe), but on the host only the links that `facts` name.
    pub(crate) async fn observe_named(&mut self, facts: &[Fact]) -> Result<Observed, KernelError> {
        self.observe_at(&Place::Host, facts, Depth::Named).await
    }

    async fn observe_at(
        &mut self,
        place: &Place,
        facts: &[Fact],
        depth: Depth,
    ) -> Result<Observed, KernelError> {
        let mut observed = Observed::default();
        let mut by_place: BTreeMap<&Place, Vec<&Fact>> = BTreeMap::from([(place, Vec::new())]);
        for fact in facts {
            by_place.entry(place_of(fact).unwrap_or(&Place::Host)).or_default().push(fact);
        }
        by_place.retain(|place, _| self.namespace(place).is_ok());
        for (place, facts) in by_place {
            let snapshot = Snapshot::observe(self, place, &facts, depth).await?;
            observed.links.insert(place.clone(), snapshot.links_by_name(place));
            if *place == Place::Host {
                observed.routes = snapshot.reached();
                observed.default_mtu = snapshot.default_mtu();
                observed.first_rule_of_others = snapshot.first_rule_of_others();
                observed.bridges = snapshot.bridges();
                observed.default_routes = snapshot.default_routes();
                observed.uplinks = self.uplinks(&snapshot);
                observed.receivers = snapshot.receivers();
                // Otherwise not all links are known.
                if depth != Depth::Named
                    && let Some(guard) = &self.sources
                {
                    let updated = guard
                        .retain(&snapshot.indexes())
                        .and_then(|()| guard.set_own(&snapshot.own_addresses()));
                    updated.map_err(|source| KernelError {
                        what: "update source guards".to_owned(),
                        source,
                    })?;
                }
                observed.forwarding = self.forwarding(&observed.uplinks);
            }
            for fact in facts {
                let holds = match fact {
                    Fact::Ruleset { .. } => self.ruleset_holds(fact).await?,
                    Fact::Gate { link, passes } => match snapshot.index(link) {
                        Some(index) => self.has_gate(index, passes)?,
                        None => false,
                    },
                    Fact::BridgeGuard { link, .. } => match snapshot.index(link) {
                        Some(index) => self.has_bridge_guard(index, fact)?,
                        None => false,
                    },
                    Fact::PortGuard { link, .. } => match snapshot.index(link) {
                        Some(index) => self.has_guard(index, fact)?,
                        None => false,
                    },
                    Fact::SourceGuard { link } => match snapshot.index(link) {
                        Some(index) => self.has_source_guard(index)?,
                        None => false,
                    },
                    Fact::GuardedSubnet(net) => {
                        self.sources.as_ref().is_some_and(|guard| guard.refuses(*net))
                    }
                    Fact::GuardTable { owner } => self.has_guard_table(owner)?,
                    _ => snapshot.holds(self, fact)?,
                };
                if holds {
                    observed.facts.insert(fact.clone());
                }
            }
        }
        Ok(observed)
    }

    /// Locates the endpoint's end of the veth pair `fact`.
    ///
    /// Root in an endpoint can give its links any name and MAC address. The end is therefore
    /// identified by the peer indexes of both ends, which must refer to each other.
    pub(crate) async fn find_end(&mut self, fact: &Fact) -> Result<End, KernelError> {
        let Fact::Veth { interface, endpoint, inside, mtu } = fact else { return Ok(End::Missing) };
        let place = Place::Endpoint(endpoint.clone());
        let failed = |source| KernelError { what: format!("query {fact}"), source };
        let host = self.host().map_err(failed)?;
        let Some(host) = link_named(&host, &interface.name).await.map_err(failed)? else {
            let handle = self.handle(&place).map_err(failed)?;
            let link = link_named(&handle, &inside.name).await.map_err(failed)?;
            // The host's end was renamed or moved.
            return Ok(match link {
                None => End::Missing,
                Some(link) if link.peer.is_some() && link.mac == Some(inside.mac) => {
                    End::Stray(link.index)
                }
                Some(_) => End::Replaced,
            });
        };
        let handle = self.handle(&place).map_err(failed)?;
        let link = link_named(&handle, &inside.name).await.map_err(failed)?;
        Ok(match link {
            None => End::Missing,
            Some(link) if host.peer == Some(link.index) && link.peer == Some(host.index) => {
                let is_changed = host.mac != Some(interface.mac) || host.mtu != *mtu;
                if is_changed { End::Changed } else { End::InPlace }
            }
            Some(_) => End::Replaced,
        })
    }

    /// Deletes the link with interface index `index` in the namespace of the endpoint `name`.
    pub(crate) async fn delete_end(&mut self, name: &str, index: u32) -> Result<(), KernelError> {
        let what = || format!("remove stray veth end in endpoint {name:?}");
        let handle = self.handle(&Place::Endpoint(name.to_owned()));
        let handle = handle.map_err(|source| KernelError { what: what(), source })?;
        match handle.link().del(index).execute().await.map_err(error) {
            Err(error) if is_absent(&error) => Ok(()),
            result => result.map_err(|source| KernelError { what: what(), source }),
        }
    }

    /// Returns the links on which replies to containers may arrive, on a host that does not
    /// forward.
    fn uplinks(&self, snapshot: &Snapshot) -> Vec<Uplink> {
        // A setting that cannot be read cannot be changed either.
        let forwards = |v6| self.forwards(v6).unwrap_or(true);
        snapshot.uplinks(!forwards(false), !forwards(true) && self.has_per_link_v6_forwarding())
    }

    /// Returns the `uplinks` for which forwarding is enabled individually.
    fn forwarding(&self, uplinks: &[Uplink]) -> BTreeSet<(String, bool)> {
        let each = uplinks.iter().flat_map(|Uplink { link, v4, v6, .. }| {
            [(v4, false), (v6, true)]
                .into_iter()
                .filter(|(is, _)| **is)
                .map(|(_, v6)| (link.clone(), v6))
        });
        let forwards = |(link, v6): &(String, bool)| {
            self.forwarding_at(link, *v6).is_ok_and(|value| value == "1")
        };
        each.filter(forwards).collect()
    }

    /// Returns whether the gate for `passes` is attached to the link with interface index `index`.
    fn has_gate(&mut self, index: u32, passes: &Passes) -> Result<bool, KernelError> {
        match self.with_gate(passes, |gate| gate.is_attached(index)) {
            // A gate of a firewall that is no longer used. The new gate replaces it.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            attached => found(attached, "gate of a bridge"),
        }
    }

    /// Calls `f` in the host namespace with the gate for `passes`.
    fn with_gate<T: Send>(
        &mut self,
        passes: &Passes,
        f: impl FnOnce(&Gate) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        let host = self.host.clone();
        let gate = match passes {
            Passes::Marked => self.firewall.as_ref().and_then(|firewall| firewall.gate()),
            Passes::From(_) | Passes::Nothing => {
                if !self.gates.contains_key(passes) {
                    let links = match passes {
                        Passes::From(link) => vec![host.with(|| interface_index(link)).flatten()?],
                        Passes::Marked | Passes::Nothing => Vec::new(),
                    };
                    let gate = host.with(|| Gate::new(&GatePolicy::From(links))).flatten()?;
                    self.gates.insert(passes.clone(), gate);
                }
                self.gates.get(passes)
            }
        };
        let gate = gate.ok_or(io::ErrorKind::Unsupported)?;
        host.with(|| f(gate)).flatten()
    }

    fn has_bridge_guard(&mut self, index: u32, fact: &Fact) -> Result<bool, KernelError> {
        let attached = self.with_bridge_guard(fact, |guard| guard.is_attached(index));
        found(attached, "guard of a bridge")
    }

    /// Calls `f` in the host namespace with the bridge guard of `fact`.
    fn with_bridge_guard<T: Send>(
        &mut self,
        fact: &Fact,
        f: impl FnOnce(&BridgeGuard) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        let policy = bridge_policy(fact).ok_or(io::ErrorKind::Unsupported)?;
        let host = self.host.clone();
        let guard = match self.bridge_guards.entry(policy) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let guard = host.with(|| BridgeGuard::new(entry.key())).flatten()?;
                entry.insert(guard)
            }
        };
        host.with(|| f(guard)).flatten()
    }

    /// Returns whether the port guard of `fact` is attached to the link with interface index
    /// `index`.
    fn has_guard(&self, index: u32, fact: &Fact) -> Result<bool, KernelError> {
        let (Some(guards), Some((link, policy))) = (&self.guards, guard_of(fact)) else {
            return Ok(false);
        };
        let attached = self.host.with(|| guards.is_attached(index, link, &policy)).flatten();
        found(attached, "port guard")
    }

    /// Returns whether the source guard is attached to the link with interface index `index`.
    fn has_source_guard(&self, index: u32) -> Result<bool, KernelError> {
        let Some(guard) = &self.sources else { return Ok(false) };
        found(self.host.with(|| guard.is_attached(index)).flatten(), "source guard")
    }

    fn has_guard_table(&self, owner: &str) -> Result<bool, KernelError> {
        let attached = self.host.with(|| PortGuards::has_table(owner)).flatten();
        found(attached, "nftables table for port guards")
    }

    /// Returns whether all gates and guards are still attached. The kernel sends no notification
    /// when a program is detached.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub async fn programs_hold(&mut self, facts: &[Fact]) -> Result<bool, KernelError> {
        for fact in facts {
            let (Fact::Gate { link, .. }
            | Fact::BridgeGuard { link, .. }
            | Fact::PortGuard { link, .. }
            | Fact::SourceGuard { link }) = fact
            else {
                continue;
            };
            let index = match self.index(&Place::Host, link).await {
                Err(error) if is_absent(&error) => return Ok(false),
                index => {
                    index.map_err(|source| KernelError { what: format!("query {fact}"), source })?
                }
            };
            let holds = match fact {
                Fact::Gate { passes, .. } => self.has_gate(index, passes)?,
                Fact::BridgeGuard { .. } => self.has_bridge_guard(index, fact)?,
                Fact::SourceGuard { .. } => self.has_source_guard(index)?,
                _ => self.has_guard(index, fact)?,
            };
            if !holds {
                self.discard_index(&Place::Host, link);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the namespaces in which sysctls of `facts` have different values. Unreadable
    /// sysctls, for example of deleted links, are ignored.
    pub(crate) fn places_with_changed_sysctls(&self, facts: &[Fact]) -> BTreeSet<Place> {
        let differs = |fact: &Fact| match fact {
            Fact::Setting { place, name, value } => {
                let found = self.namespace(place).ok()?.sysctl(name).ok()?;
                (found != *value).then(|| place.clone())
            }
            // If all links forward IPv6, the setting of this link is irrelevant.
            Fact::Forwarding { link, v6 } => {
                let found = self.forwarding_at(link, *v6).ok()?;
                let differs = found != "1" && !(*v6 && self.forwards(true).unwrap_or(true));
                differs.then_some(Place::Host)
            }
            _ => None,
        };
        facts.iter().filter_map(differs).collect()
    }

    /// Returns whether the rules are in force. Runs on a blocking thread, because it may run slow
    /// external programs.
    async fn ruleset_holds(&self, fact: &Fact) -> Result<bool, KernelError> {
        // The fact belongs to a killed process. Assume that it holds, because removing missing
        // rules is cheap.
        let Ok(firewall) = self.firewall(fact) else { return Ok(true) };
        let failed = |source| KernelError { what: format!("query {fact}"), source };
        blocking(move || firewall.holds()).await.map_err(failed)
    }

    /// Performs `op`.
    ///
    /// # Errors
    /// Errors of the kernel. Removing a missing object is not an error. A foreign object in its
    /// place is left alone.
    pub async fn execute(&mut self, op: &Op) -> Result<(), KernelError> {
        let result = match op {
            Op::Add(fact) => self.add(fact).await,
            Op::Remove(fact) => match self.remove(fact).await {
                Err(error) if is_absent(&error) => Ok(()),
                result => result,
            },
        };
        result.map_err(|source| KernelError { what: op.to_string(), source })
    }

    /// Removes links of the host in one operation. Individual removal takes one RCU grace period
    /// per link, 20 s for a thousand links. The links are therefore moved to an unused interface
    /// group (ip-link(8), `group`), and the group is deleted.
    ///
    /// # Errors
    /// Same as [`execute`](Self::execute).
    pub async fn remove_links(&mut self, interfaces: &[&Interface]) -> Result<(), KernelError> {
        self.delete_together(interfaces).await.map_err(|source| KernelError {
            what: format!("remove {} links", interfaces.len()),
            source,
        })
    }

    async fn delete_together(&mut self, interfaces: &[&Interface]) -> io::Result<()> {
        if interfaces.is_empty() {
            return Ok(());
        }
        let handle = self.host()?;
        let links = all_links(&handle).await.map_err(error)?;
        let groups: BTreeSet<u32> =
            links.iter().flat_map(|link| &link.attributes).filter_map(group).collect();
        // The group is empty, so no foreign link is deleted.
        let free =
            (registry::DELETION_GROUP..).find(|group| !groups.contains(group)).unwrap_or(u32::MAX);
        let wanted: BTreeMap<&str, &Interface> =
            interfaces.iter().map(|one| (one.name.as_str(), *one)).collect();
        let links: Vec<Link> = links.iter().map(link_of).collect();
        let bridges: BTreeSet<u32> = links
            .iter()
            .filter(|link| link.is_bridge_of_tidegate())
            .map(|link| link.index)
            .collect();
        let mut any = false;
        for link in &links {
            let is_bridge_of_tidegate = |index| bridges.contains(&index);
            if wanted
                .get(link.name.as_str())
                .is_some_and(|interface| link.observed(is_bridge_of_tidegate).is(interface))
            {
                self.discard_index(&Place::Host, &link.name);
                let message = LinkUnspec::new_with_index(link.index).link_group(free).build();
                match handle.link().set(message).execute().await.map_err(error) {
                    Err(error) if is_absent(&error) => {}
                    result => {
                        result?;
                        any = true;
                    }
                }
            }
        }
        if !any {
            return Ok(());
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(free));
        handle.link().del_with_message(message).execute().await.map_err(error)
    }

    async fn add(&mut self, fact: &Fact) -> io::Result<()> {
        match fact {
            Fact::Bridge { interface, mtu, internal } => {
                // Another program may have deleted the previous bridge.
                self.discard_index(&Place::Host, &interface.name);
                let bridge =
                    LinkBridge::new(&interface.name).address(interface.mac.0.to_vec()).mtu(*mtu);
                let added = self.host()?.link().add(bridge.build()).execute().await.map_err(error);
                self.or_set(added, interface, *mtu).await?;
                // Set after creation, because `rtnl_create_link` (net/core/rtnetlink.c) ignores the
                // alias.
                let index = self.index(&Place::Host, &interface.name).await?;
                let alias = registry::bridge_alias(*internal, interface.mac);
                let alias = LinkAttribute::IfAlias(alias);
                let message =
                    LinkUnspec::new_with_index(index).append_extra_attribute(alias).build();
                self.host()?.link().set(message).execute().await.map_err(error)
            }
            Fact::Veth { interface, endpoint, inside, mtu } => {
                self.discard_index(&Place::Host, &interface.name);
                self.discard_index(&Place::Endpoint(endpoint.clone()), &inside.name);
                let namespace = self
                    .namespace(&Place::Endpoint(endpoint.clone()))
                    .map_err(|error| error.source)?;
                let namespace = namespace.clone();
                let peer = LinkMessageBuilder::<LinkUnspec>::new()
                    .name(inside.name.clone())
                    .address(inside.mac.0.to_vec())
                    .mtu(*mtu)
                    .setns_by_fd(namespace.as_fd().as_raw_fd())
                    .build();
                let pair = LinkVeth::new(&interface.name, &inside.name)
                    .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                    .address(interface.mac.0.to_vec())
                    .mtu(*mtu);
                let added = self.host()?.link().add(pair.build()).execute().await.map_err(error);
                self.or_set(added, interface, *mtu).await
            }
            Fact::Port { link, bridge, isolated } => {
                let (link, bridge) = (
                    self.index(&Place::Host, link).await?,
                    self.index(&Place::Host, bridge).await?,
                );
                let enslave = LinkUnspec::new_with_index(link).controller(bridge).build();
                self.host()?.link().set(enslave).execute().await.map_err(error)?;
                let port = LinkBridgePort::new(link)
                    .isolated(*isolated)
                    .learning(false)
                    .flood(false)
                    .build();
                self.host()?.link().set_port(port).execute().await.map_err(error)
            }
            Fact::Station { link, station } => {
                let link = self.index(&Place::Host, link).await?;
                // Equivalent to `bridge fdb replace STATION dev LINK master static`.
                let entry = self.host()?.neighbours().add_bridge(link, &station.0).replace();
                let entry = entry.state(NeighbourState::Noarp).flags(NeighbourFlags::Controller);
                entry.execute().await.map_err(error)
            }
            Fact::Setting { place, name, value } => {
                match self.namespace(place).map_err(|error| error.source)?.set_sysctl(name, value) {
                    Err(error) if is_without_ipv6(&error, name) => Ok(()),
                    result => result,
                }
            }
            Fact::Address { place, link, address } => {
                let index = self.index(place, link).await?;
                let handle = self.handle(place)?;
                let mut request = handle.address().add(index, address.addr(), address.prefix_len());
                if address.addr().is_loopback() {
                    request.message_mut().header.scope = AddressScope::Host;
                }
                if address.addr().is_ipv6() {
                    // Duplicate address detection takes a second and is unnecessary, because
                    // tidegate assigns all addresses.
                    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
                }
                request.execute().await.map_err(error)
            }
            Fact::Up { place, link } => {
                let index = self.index(place, link).await?;
                let up = LinkUnspec::new_with_index(index).up().build();
                self.handle(place)?.link().set(up).execute().await.map_err(error)
            }
            Fact::SubnetRoute { place, link, address } => {
                let route = subnet_route(self.index(place, link).await?, *address);
                self.handle(place)?.route().add(route).execute().await.map_err(error)
            }
            Fact::DefaultRoute { place, link, gateway } => {
                let route = default_route(self.index(place, link).await?, *gateway);
                self.handle(place)?.route().add(route).execute().await.map_err(error)
            }
            Fact::ReplyRoute { link, table, gateway } => {
                let route = reply_route(self.index(&Place::Host, link).await?, *gateway, *table);
                self.host()?.route().add(route).execute().await.map_err(error)
            }
            Fact::EngineDevice { link } => {
                self.discard_index(&Place::Host, link);
                self.engine.as_ref().ok_or(io::ErrorKind::NotFound)?.reopen()
            }
            Fact::EngineRoute { link, table, v6 } => {
                let route = engine_route(self.index(&Place::Host, link).await?, *v6, *table);
                // The table belongs to tidegate, so foreign routes in it are replaced.
                self.host()?.route().add(route).replace().execute().await.map_err(error)
            }
            Fact::Rule(rule) => {
                let mut request = self.host()?.rule().add();
                *request.message_mut() = message_of(rule);
                request.execute().await.map_err(error)
            }
            Fact::Forwarding { v6: true, .. } if !self.has_per_link_v6_forwarding() => {
                self.forward_everything()
            }
            Fact::Forwarding { link, v6 } => self.host.set_sysctl(&forwarding_of(link, *v6), "1"),
            Fact::Group { link, group } => {
                let index = self.index(&Place::Host, link).await?;
                let message = LinkUnspec::new_with_index(index).link_group(*group).build();
                self.host()?.link().set(message).execute().await.map_err(error)
            }
            Fact::Gate { link, passes } => {
                let index = self.index(&Place::Host, link).await?;
                self.with_gate(passes, |gate| gate.attach(index))
            }
            Fact::BridgeGuard { link, .. } => {
                let index = self.index(&Place::Host, link).await?;
                self.with_bridge_guard(fact, |guard| guard.attach(index))
            }
            Fact::PortGuard { link, .. } => {
                let index = self.index(&Place::Host, link).await?;
                let (Some(guards), Some((link, policy))) = (&self.guards, guard_of(fact)) else {
                    return Err(io::ErrorKind::Unsupported.into());
                };
                self.host.with(|| guards.attach(index, link, &policy)).flatten()
            }
            Fact::SourceGuard { link } => {
                let Some(guard) = self.sources.clone() else {
                    return Err(io::ErrorKind::Unsupported.into());
                };
                // Links of other software come and go, also under the same name.
                self.discard_index(&Place::Host, link);
                let attached = match self.index(&Place::Host, link).await {
                    Ok(index) => self.host.with(|| guard.attach(index)).flatten(),
                    Err(error) => Err(error),
                };
                attached.or_else(|error| if is_absent(&error) { Ok(()) } else { Err(error) })
            }
            Fact::GuardedSubnet(net) => match &self.sources {
                Some(guard) => guard.refuse(*net),
                None => Err(io::ErrorKind::Unsupported.into()),
            },
            Fact::GuardTable { owner } => {
                self.host.with(|| PortGuards::make_table(owner)).flatten()
            }
            Fact::Ruleset { .. } => {
                let firewall = self.firewall(fact)?;
                blocking(move || firewall.apply()).await
            }
        }
    }

    /// Sets the MTU if `added` reports `EEXIST`: the link exists, is known to belong to tidegate,
    /// and only its MTU was changed.
    async fn or_set(
        &mut self,
        added: io::Result<()>,
        interface: &Interface,
        mtu: u32,
    ) -> io::Result<()> {
        let Err(error_of_add) = added else { return Ok(()) };
        if error_of_add.kind() != io::ErrorKind::AlreadyExists {
            return Err(error_of_add);
        }
        let index = self.index(&Place::Host, &interface.name).await?;
        let message = LinkUnspec::new_with_index(index).address(interface.mac.0.to_vec()).mtu(mtu);
        self.host()?.link().set(message.build()).execute().await.map_err(error)
    }

    async fn remove(&mut self, fact: &Fact) -> io::Result<()> {
        match fact {
            Fact::Bridge { interface, .. } | Fact::Veth { interface, .. } => {
                self.delete_link(interface).await
            }
            Fact::Port { link, .. } => {
                let index = self.index(&Place::Host, link).await?;
                let free = LinkUnspec::new_with_index(index).nocontroller().build();
                self.host()?.link().set(free).execute().await.map_err(error)
            }
            // Removed with their links, and the device with the engine.
            Fact::Station { .. } | Fact::SubnetRoute { .. } => Ok(()),
            Fact::EngineDevice { .. } | Fact::EngineRoute { .. } => Ok(()),
            Fact::Setting { .. } | Fact::Group { .. } | Fact::Gate { .. } => Ok(()),
            Fact::BridgeGuard { .. } => {
                self.bridge_guards.retain(|policy, _| Some(policy) != bridge_policy(fact).as_ref());
                Ok(())
            }
            Fact::PortGuard { link, .. } => {
                if let Some(guards) = &self.guards {
                    guards.forget(link);
                }
                Ok(())
            }
            // Without a source guard, those of a killed process, on another kernel, are gone.
            Fact::SourceGuard { link } => {
                let Some(guard) = self.sources.clone() else { return Ok(()) };
                self.discard_index(&Place::Host, link);
                let index = self.index(&Place::Host, link).await?;
                self.host.with(|| guard.detach(index)).flatten()
            }
            Fact::GuardedSubnet(net) => match &self.sources {
                Some(guard) => guard.permit(*net),
                None => Ok(()),
            },
            Fact::GuardTable { owner } => {
                self.host.with(|| PortGuards::remove_table(owner)).flatten()
            }
            Fact::Address { place, link, address } => {
                let index = self.index(place, link).await?;
                let handle = self.handle(place)?;
                let message = handle
                    .address()
                    .add(index, address.addr(), address.prefix_len())
                    .message_mut()
                    .clone();
                handle.address().del(message).execute().await.map_err(error)
            }
            Fact::Up { place, link } => {
                let index = self.index(place, link).await?;
                let down = LinkUnspec::new_with_index(index).down().build();
                self.handle(place)?.link().set(down).execute().await.map_err(error)
            }
            Fact::DefaultRoute { place, link, gateway } => {
                let route = default_route(self.index(place, link).await?, *gateway);
                self.handle(place)?.route().del(route).execute().await.map_err(error)
            }
            Fact::ReplyRoute { link, table, gateway } => {
                let route = reply_route(self.index(&Place::Host, link).await?, *gateway, *table);
                self.host()?.route().del(route).execute().await.map_err(error)
            }
            Fact::Rule(rule) => {
                self.host()?.rule().del(message_of(rule)).execute().await.map_err(error)
            }
            Fact::Forwarding { link, v6 } => {
                // If forwarding has been enabled for all links since, leave it enabled.
                if self.forwards(*v6)? || *v6 && !self.has_per_link_v6_forwarding() {
                    return Ok(());
                }
                self.host.set_sysctl(&forwarding_of(link, *v6), "0")
            }
            Fact::Ruleset { firewall, owner } => match self.firewall(fact) {
                Ok(firewall) => firewall.remove(),
                // A killed process had chosen another firewall.
                Err(_) => Firewall::new(*firewall, &self.host, owner)?.remove(),
            },
        }
    }

    /// Deletes the neighbour entries of the host for `addresses` on `link`, which may have the MAC
    /// address of a previous owner. A failure only delays packets.
    pub async fn forget_neighbours(&mut self, link: &str, addresses: &[IpAddr]) {
        let Ok(index) = self.index(&Place::Host, link).await else { return };
        let Ok(host) = self.host() else { return };
        for address in addresses {
            let mut known = host.neighbours().add(index, *address);
            let deletion = host.neighbours().del(known.message_mut().clone());
            if let Err(failed) = deletion.execute().await {
                tracing::trace!(link, %address, error = %error(failed), "no neighbour entry");
            }
        }
    }

    /// Returns the firewall of `fact`, if it is in use.
    fn firewall(&self, fact: &Fact) -> io::Result<Arc<Firewall>> {
        let named = |firewall: &&Arc<Firewall>| firewall.fact() == *fact;
        let firewall = self.firewall.as_ref().filter(named);
        firewall
            .cloned()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "firewall not in use"))
    }

    /// Returns whether the kernel supports IPv6 forwarding per link.
    fn has_per_link_v6_forwarding(&self) -> bool {
        !Feature::ForceForwarding.is_forced_off() && self.host.sysctl(FORCE_FORWARDING).is_ok()
    }

    /// Reads the forwarding setting of a link.
    fn forwarding_at(&self, link: &str, v6: bool) -> io::Result<String> {
        if v6 && !self.has_per_link_v6_forwarding() {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.host.sysctl(&forwarding_of(link, v6))
    }

    /// Enables IPv6 forwarding for all links if the host namespace is exclusive; policy rules
    /// isolate the networks. A shared host is not turned into a router.
    fn forward_everything(&self) -> io::Result<()> {
        const ALL: &str = "net.ipv6.conf.all.forwarding";
        if self.forwards(true)? {
            return Ok(());
        }
        if self.exclusive {
            return self.host.set_sysctl(ALL, "1");
        }
        tracing::warn!(
            "containers have no egress over IPv6: before Linux 6.17, forwarding cannot be enabled per link; set {ALL}=1 if this host may act as a router"
        );
        Ok(())
    }

    /// Returns whether the host forwards on all links.
    fn forwards(&self, v6: bool) -> io::Result<bool> {
        let name = if v6 { "net.ipv6.conf.all.forwarding" } else { "net.ipv4.ip_forward" };
        match self.host.sysctl(name) {
            Err(error) if is_without_ipv6(&error, name) => Ok(false),
            value => Ok(value? != "0"),
        }
    }

    /// Deletes a link of the host if it has the expected MAC address.
    async fn delete_link(&mut self, interface: &Interface) -> io::Result<()> {
        let handle = self.host()?;
        let mut found = handle.link().get().match_name(interface.name.clone()).execute();
        let Some(message) = found.try_next().await.map_err(error)? else { return Ok(()) };
        let link = link_of(&message);
        self.discard_index(&Place::Host, &interface.name);
        let bridge = match link.controller {
            Some(index) if link.mac != Some(interface.mac) => {
                let mut found = handle.link().get().match_index(index).execute();
                found
                    .try_next()
                    .await
                    .map_err(error)?
                    .is_some_and(|one| link_of(&one).is_bridge_of_tidegate())
            }
            _ => false,
        };
        if !link.observed(|_| bridge).is(interface) {
            tracing::warn!(interface = %interface.name, "interface replaced externally; not deleted");
            return Ok(());
        }
        handle.link().del(link.index).execute().await.map_err(error)
    }

    fn host(&mut self) -> io::Result<Handle> {
        self.handle(&Place::Host)
    }

    fn handle(&mut self, place: &Place) -> io::Result<Handle> {
        Ok(self.connection(place).map_err(|error| error.source)?.handle.clone())
    }

    /// Discards cached interface indexes of endpoints.
    pub(crate) fn discard_endpoint_indexes(&mut self) {
        self.connections.retain(|place, _| *place == Place::Host);
    }

    fn discard_index(&mut self, place: &Place, link: &str) {
        if let Some(connection) = self.connections.get_mut(place) {
            connection.indexes.remove(link);
        }
    }

    /// Returns the interface index of a link.
    async fn index(&mut self, place: &Place, link: &str) -> io::Result<u32> {
        let connection = self.connection(place).map_err(|error| error.source)?;
        if let Some(index) = connection.indexes.get(link) {
            return Ok(*index);
        }
        let mut found = connection.handle.link().get().match_name(link.to_owned()).execute();
        let message = found.try_next().await.map_err(error)?;
        let index = message.ok_or_else(|| io::Error::from_raw_os_error(NO_DEVICE))?.header.index;
        connection.indexes.insert(link.to_owned(), index);
        Ok(index)
    }
}

/// Lists all links, without statistics, which are half of a message.
async fn all_links(handle: &Handle) -> Result<Vec<LinkMessage>, rtnetlink::Error> {
    let request = handle.link().get();
    let request = request.set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
    request.execute().try_collect().await
}

/// Returns the link with the name or alternative name `name`.
async fn link_named(handle: &Handle, name: &str) -> io::Result<Option<Link>> {
    let found = handle.link().get().match_name(name.to_owned()).execute().try_next().await;
    match found.map_err(error) {
        Err(error) if is_absent(&error) => Ok(None),
        found => Ok(found?.as_ref().map(link_of)),
    }
}

/// Runs `f` on a blocking thread.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(io::Error::other)?
}

/// Returns the sysctl that enables forwarding of packets received on a foreign link.
fn forwarding_of(link: &str, v6: bool) -> String {
    if v6 {
        format!("net.ipv6.conf.{link}.force_forwarding")
    } else {
        format!("net.ipv4.conf.{link}.forwarding")
    }
}

/// Returns whether a sysctl is missing because the kernel lacks IPv6, or the link, whose MTU is
/// below 1280 (RFC 8200, section 5). IPv6 is then as disabled as required.
fn is_without_ipv6(error: &io::Error, setting: &str) -> bool {
    error.kind() == io::ErrorKind::NotFound
        && setting.starts_with("net.ipv6.")
        && (setting.ends_with(".disable_ipv6")
            || !std::path::Path::new("/proc/sys/net/ipv6").exists())
}

/// Exists if the kernel supports IPv6 forwarding per link.
const FORCE_FORWARDING: &str = "net.ipv6.conf.all.force_forwarding";

/// `ENODEV`.
const NO_DEVICE: i32 = rustix::io::Errno::NODEV.raw_os_error();

/// Returns whether the error means that the object does not exist.
fn is_absent(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let absent = [Errno::NODEV, Errno::NOENT, Errno::SRCH, Errno::ADDRNOTAVAIL, Errno::NXIO];
    error.kind() == io::ErrorKind::NotFound
        || Errno::from_io_error(error).is_some_and(|errno| absent.contains(&errno))
}

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) => {
            io::Error::from_raw_os_error(code.get().abs())
        }
        error => io::Error::other(error),
    }
}

/// Returns the namespace of `fact`; `None` for the host.
fn place_of(fact: &Fact) -> Option<&Place> {
    match fact {
        Fact::Setting { place, .. }
        | Fact::Address { place, .. }
        | Fact::Up { place, .. }
        | Fact::SubnetRoute { place, .. }
        | Fact::DefaultRoute { place, .. } => Some(place),
        Fact::Bridge { .. }
        | Fact::Veth { .. }
        | Fact::Port { .. }
        | Fact::Station { .. }
        | Fact::EngineDevice { .. }
        | Fact::EngineRoute { .. }
        | Fact::Rule(_)
        | Fact::ReplyRoute { .. }
        | Fact::Forwarding { .. }
        | Fact::Group { .. }
        | Fact::Gate { .. }
        | Fact::PortGuard { .. }
        | Fact::BridgeGuard { .. }
        | Fact::SourceGuard { .. }
        | Fact::GuardedSubnet(_)
        | Fact::GuardTable { .. }
        | Fact::Ruleset { .. } => None,
    }
}

/// Returns link and policy of the port guard `fact`.
fn guard_of(fact: &Fact) -> Option<(&str, PortPolicy)> {
    let Fact::PortGuard { link, station, bridge, addresses, any_address } = fact else {
        return None;
    };
    let v4 = addresses.iter().filter_map(|ip| match ip {
        IpAddr::V4(ip) => Some(*ip),
        IpAddr::V6(_) => None,
    });
    let v6 = addresses.iter().filter_map(|ip| match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(*ip),
    });
    let policy = PortPolicy {
        mac: *station,
        bridge: *bridge,
        v4: v4.collect(),
        v6: v6.collect(),
        any_address: *any_address,
    };
    Some((link, policy))
}

fn bridge_policy(fact: &Fact) -> Option<BridgePolicy> {
    let Fact::BridgeGuard { gateways, internal, .. } = fact else { return None };
    Some(BridgePolicy { gateways: gateways.clone(), internal: *internal })
}

/// Converts the result of a query about `what`. An object whose link has been deleted counts as
/// missing.
fn found(result: io::Result<bool>, what: &str) -> Result<bool, KernelError> {
    match result {
        Err(error) if is_absent(&error) => Ok(false),
        result => result.map_err(|source| KernelError { what: format!("query {what}"), source }),
    }
}
