//! The real kernel: observes and carries out, by rtnetlink, with sockets made in the namespaces
//! concerned.

mod messages;
mod observe;

use crate::{Fact, Firewall, Interface, KernelError, Mac, Observed, Op, Passes, Place, Uplink};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::packet_route::address::{AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use tidegate_model::{Feature, registry};
use tidegate_netfilter::{Gate, GatePolicy, InternalGuard, PortGuards, PortPolicy};
use tidegate_netns::{Namespace, interface_index};
use tokio::runtime::Handle as Runtime;
use tokio::task::JoinHandle;

use messages::{
    default_route, engine_route, group, link_of, message_of, reply_route, subnet_route,
};
use observe::{Depth, Link, Snapshot};

/// The kernel's own number of the `main` table (`RT_TABLE_MAIN`).
const MAIN: u32 = 254;

/// The TUN device of the NAT engine, which this crate can observe but not make.
pub trait EngineDevice: fmt::Debug + Send + Sync {
    /// The number of its link.
    fn index(&self) -> u32;

    /// Makes a link of the same name and number in the place of the one that has gone, and has the
    /// engine use it.
    ///
    /// # Errors
    /// Something else has the name, or the kernel refuses it.
    fn reopen(&self) -> io::Result<()>;
}

/// The kernel of one host namespace and of the endpoints' namespaces.
#[derive(Debug)]
pub struct Kernel {
    host: Namespace,
    /// Nobody but us is there.
    alone: bool,
    firewall: Option<Arc<Firewall>>,
    guards: Option<Arc<PortGuards>>,
    engine: Option<Arc<dyn EngineDevice>>,
    /// Those that do not belong to a firewall, as they are needed.
    gates: BTreeMap<Passes, Gate>,
    /// By the addresses of the bridge.
    internal: BTreeMap<Vec<IpNet>, InternalGuard>,
    endpoints: BTreeMap<String, Namespace>,
    connections: BTreeMap<Place, Connection>,
}

/// Where the endpoint's end of a veth pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Where it belongs, under its name.
    InPlace,
    /// Nowhere, or under another name, which is free.
    Missing,
    /// Where it belongs, under this number, but the host's end is not.
    Stray(u32),
    /// Another link has its name.
    Replaced,
}

/// A routing socket in one namespace, and what is known of its links.
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
    /// The kernel as `host` sees it. To be used within a tokio runtime.
    #[must_use]
    pub fn new(host: Namespace) -> Self {
        Self {
            host,
            alone: false,
            firewall: None,
            guards: None,
            engine: None,
            gates: BTreeMap::new(),
            internal: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            connections: BTreeMap::new(),
        }
    }

    /// `host` is a namespace of our own: what has to be set for all its links may be.
    #[must_use]
    pub fn alone(self) -> Self {
        Self { alone: true, ..self }
    }

    /// Closes networks with `firewall`, which is the host's.
    pub fn use_firewall(&mut self, firewall: Arc<Firewall>) {
        self.firewall = Some(firewall);
    }

    /// Checks with `guards` what endpoints send.
    pub fn use_guards(&mut self, guards: Arc<PortGuards>) {
        self.guards = Some(guards);
    }

    /// Restores `device` where its link has gone.
    pub fn use_engine(&mut self, device: Arc<dyn EngineDevice>) {
        self.engine = Some(device);
    }

    /// Whether the link numbered `index` is the engine's device.
    fn is_engine_device(&self, index: u32) -> bool {
        self.engine.as_ref().is_none_or(|device| device.index() == index)
    }

    /// Tells where the endpoint `name` is, and returns where it was.
    pub fn add_endpoint(&mut self, name: &str, namespace: Namespace) -> Option<Namespace> {
        self.connections.remove(&Place::Endpoint(name.to_owned()));
        self.endpoints.insert(name.to_owned(), namespace)
    }

    /// Whether the endpoint `name` is in the host's own namespace.
    pub(crate) fn is_on_the_host(&self, name: &str) -> bool {
        self.endpoints.get(name).is_some_and(|namespace| namespace.id() == self.host.id())
    }

    fn namespace(&self, place: &Place) -> Result<&Namespace, KernelError> {
        match place {
            Place::Host => Ok(&self.host),
            Place::Endpoint(name) => self.endpoints.get(name).ok_or_else(|| KernelError {
                what: format!("enter the namespace of {place}"),
                source: io::Error::new(io::ErrorKind::NotFound, "it is not known"),
            }),
        }
    }

    /// The connection to `place`, made when it is first asked for. Of endpoints only the last one's
    /// is kept: there may be thousands, and each is dealt with once.
    fn connection(&mut self, place: &Place) -> Result<&mut Connection, KernelError> {
        if !self.connections.contains_key(place) {
            let open = || -> io::Result<Connection> {
                let namespace = self.namespace(place).map_err(|error| error.source)?;
                // It registers its socket with the runtime, and may do so on another thread.
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
                what: format!("routing socket on {place}"),
                source,
            })?;
            if *place != Place::Host {
                self.connections.retain(|other, _| *other == Place::Host);
            }
            self.connections.insert(place.clone(), connection);
        }
        self.connections.get_mut(place).ok_or_else(|| KernelError {
            what: format!("routing socket on {place}"),
            source: io::ErrorKind::NotConnected.into(),
        })
    }

    /// Looks which of `asked` are true, and what there is besides.
    ///
    /// # Errors
    /// The first question that the kernel did not answer. An endpoint that is not known has
    /// nothing.
    pub async fn observe(&mut self, asked: &[Fact]) -> Result<Observed, KernelError> {
        self.observe_at(&Place::Host, asked, Depth::All).await
    }

    /// The same of `place` and of the places that `asked` is about, without the addresses and
    /// routes of endpoints, none of which is found: the time that it takes does not depend on how
    /// many there are.
    pub(crate) async fn observe_links(
        &mut self,
        place: &Place,
        asked: &[Fact],
    ) -> Result<Observed, KernelError> {
        self.observe_at(place, asked, Depth::Links).await
    }

    async fn observe_at(
        &mut self,
        place: &Place,
        asked: &[Fact],
        depth: Depth,
    ) -> Result<Observed, KernelError> {
        let mut observed = Observed::default();
        let mut by_place: BTreeMap<&Place, Vec<&Fact>> = BTreeMap::from([(place, Vec::new())]);
        for fact in asked {
            by_place.entry(place_of(fact).unwrap_or(&Place::Host)).or_default().push(fact);
        }
        by_place.retain(|place, _| self.namespace(place).is_ok());
        for (place, asked) in by_place {
            let here = Snapshot::observe(self, place, &asked, depth).await?;
            let links = here.links.values().map(|link| (link.name.clone(), link.mac)).collect();
            observed.links.insert(place.clone(), links);
            if *place == Place::Host {
                observed.routes = here.reached();
                observed.default_mtu = here.default_mtu();
                observed.first_rule_of_others = here.first_rule_of_others();
                observed.bridges = here.bridges();
                observed.default_routes = here.default_routes();
                observed.uplinks = self.uplinks(&here);
                observed.forwarding = self.forwarding(&observed.uplinks);
            }
            for fact in asked {
                let holds = match fact {
                    Fact::Ruleset { .. } => self.ruleset_holds(fact).await?,
                    Fact::Gate { link, passes } => match here.index(link) {
                        Some(index) => self.has_gate(index, passes)?,
                        None => false,
                    },
                    Fact::InternalGuard { link, gateways } => match here.index(link) {
                        Some(index) => self.has_internal_guard(index, gateways)?,
                        None => false,
                    },
                    Fact::PortGuard { link, .. } => match here.index(link) {
                        Some(index) => self.has_guard(index, fact)?,
                        None => false,
                    },
                    Fact::GuardTable { owner } => self.has_guard_table(owner)?,
                    _ => here.holds(self, fact)?,
                };
                if holds {
                    observed.facts.insert(fact.clone());
                }
            }
        }
        Ok(observed)
    }

    /// Where the other end of the veth pair `fact` is.
    ///
    /// An endpoint's root can give its links any name and hardware address. So the end is the link
    /// that the host's end says is its peer, and that says so of the host's end.
    pub(crate) async fn find_end(&mut self, fact: &Fact) -> Result<End, KernelError> {
        let Fact::Veth { interface, endpoint, inside, .. } = fact else { return Ok(End::Missing) };
        let place = Place::Endpoint(endpoint.clone());
        let failed = |source| KernelError { what: format!("look for {fact}"), source };
        let host = self.host().map_err(failed)?;
        let Some(host) = link_named(&host, &interface.name).await.map_err(failed)? else {
            let handle = self.handle(&place).map_err(failed)?;
            let link = link_named(&handle, &inside.name).await.map_err(failed)?;
            // Its host's end was renamed or moved elsewhere.
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
                End::InPlace
            }
            Some(_) => End::Replaced,
        })
    }

    /// Deletes the link numbered `index` in the namespace of the endpoint `name`.
    pub(crate) async fn delete_end(&mut self, name: &str, index: u32) -> Result<(), KernelError> {
        let what = || format!("remove the stray end of a veth pair in endpoint {name:?}");
        let handle = self.handle(&Place::Endpoint(name.to_owned()));
        let handle = handle.map_err(|source| KernelError { what: what(), source })?;
        match handle.link().del(index).execute().await.map_err(error) {
            Err(error) if is_absent(&error) => Ok(()),
            result => result.map_err(|source| KernelError { what: what(), source }),
        }
    }

    /// The links of a host that forwards for nobody by which answers to containers may come.
    fn uplinks(&self, here: &Snapshot) -> Vec<Uplink> {
        // What cannot be read here cannot be changed either.
        let forwards = |v6| self.forwards(v6).unwrap_or(true);
        here.uplinks(!forwards(false), !forwards(true) && self.singles_links_out())
    }

    /// Which of `uplinks` forward although the host as a whole does not.
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

    /// Whether the gate that lets `passes` pass is at the egress of the link numbered `index`.
    fn has_gate(&mut self, index: u32, passes: &Passes) -> Result<bool, KernelError> {
        let asked = self.with_gate(passes, |gate| gate.is_attached(index));
        found(asked, "gate of a bridge")
    }

    /// Calls `f` on the host with the gate that lets `passes` pass.
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

    fn has_internal_guard(&mut self, index: u32, gateways: &[IpNet]) -> Result<bool, KernelError> {
        let asked = self.with_internal_guard(gateways, |guard| guard.is_attached(index));
        found(asked, "guard of an internal network")
    }

    /// Calls `f` on the host with the guard of a bridge that has these addresses.
    fn with_internal_guard<T: Send>(
        &mut self,
        gateways: &[IpNet],
        f: impl FnOnce(&InternalGuard) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        let host = self.host.clone();
        if !self.internal.contains_key(gateways) {
            let guard = host.with(|| InternalGuard::new(gateways)).flatten()?;
            self.internal.insert(gateways.to_vec(), guard);
        }
        let guard = self.internal.get(gateways).ok_or(io::ErrorKind::Unsupported)?;
        host.with(|| f(guard)).flatten()
    }

    /// Whether the guard of `fact` is at the link numbered `index`.
    fn has_guard(&self, index: u32, fact: &Fact) -> Result<bool, KernelError> {
        let (Some(guards), Some((link, policy))) = (&self.guards, guard_of(fact)) else {
            return Ok(false);
        };
        let asked = self.host.with(|| guards.is_attached(index, link, &policy)).flatten();
        found(asked, "port guard")
    }

    fn has_guard_table(&self, owner: &str) -> Result<bool, KernelError> {
        let asked = self.host.with(|| PortGuards::has_table(owner)).flatten();
        found(asked, "table of nftables for port guards")
    }

    /// Whether all gates and guards are still attached. Nothing announces that one was detached.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn programs_hold(&mut self, facts: &[Fact]) -> Result<bool, KernelError> {
        for fact in facts {
            let (Fact::Gate { link, .. }
            | Fact::InternalGuard { link, .. }
            | Fact::PortGuard { link, .. }) = fact
            else {
                continue;
            };
            let index = match self.index(&Place::Host, link).await {
                Err(error) if is_absent(&error) => return Ok(false),
                index => index
                    .map_err(|source| KernelError { what: format!("look for {fact}"), source })?,
            };
            let holds = match fact {
                Fact::Gate { passes, .. } => self.has_gate(index, passes)?,
                Fact::InternalGuard { gateways, .. } => self.has_internal_guard(index, gateways)?,
                _ => self.has_guard(index, fact)?,
            };
            if !holds {
                self.forget(&Place::Host, link);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The places in which sysctls of `facts` have other values. One that cannot be read, because
    /// its link has gone for instance, is none of those.
    pub(crate) fn places_with_other_settings(&self, facts: &[Fact]) -> BTreeSet<Place> {
        let differs = |fact: &Fact| match fact {
            Fact::Setting { place, name, value } => {
                let found = self.namespace(place).ok()?.sysctl(name).ok()?;
                (found != *value).then(|| place.clone())
            }
            // With all links that forward IPv6 this one does, whatever its own setting.
            Fact::Forwarding { link, v6 } => {
                let found = self.forwarding_at(link, *v6).ok()?;
                let differs = found != "1" && !(*v6 && self.forwards(true).unwrap_or(true));
                differs.then_some(Place::Host)
            }
            _ => None,
        };
        facts.iter().filter_map(differs).collect()
    }

    /// Whether the rules are in force; not on this thread, for it may take programs that take their
    /// time.
    async fn ruleset_holds(&self, fact: &Fact) -> Result<bool, KernelError> {
        // Of one that was killed: removing what is not there costs nothing.
        let Ok(firewall) = self.firewall(fact) else { return Ok(true) };
        let failed = |source| KernelError { what: format!("look for {fact}"), source };
        blocking(move || firewall.holds()).await.map_err(failed)
    }

    /// Carries `op` out.
    ///
    /// # Errors
    /// What the kernel said. That what is to be removed is not there is none, nor that in its place
    /// is something else, which is left alone.
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

    /// Removes links of the host all at once. One by one each would cost the kernel a grace period,
    /// which makes 20 s of a thousand of them: so they are put into a group of their own
    /// (ip-link(8), `group`), and the group is deleted.
    ///
    /// # Errors
    /// As of [`execute`](Self::execute).
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
        let links: Vec<LinkMessage> =
            handle.link().get().execute().try_collect().await.map_err(error)?;
        let groups: BTreeSet<u32> =
            links.iter().flat_map(|link| &link.attributes).filter_map(group).collect();
        // Nobody is in it, so nobody else's link goes with ours.
        let free =
            (registry::DELETION_GROUP..).find(|group| !groups.contains(group)).unwrap_or(u32::MAX);
        let wanted: BTreeMap<&str, Mac> =
            interfaces.iter().map(|one| (one.name.as_str(), one.mac)).collect();
        let mut any = false;
        for link in links.iter().map(link_of) {
            if link.mac.is_some() && wanted.get(link.name.as_str()).copied() == link.mac {
                self.forget(&Place::Host, &link.name);
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
                // Somebody may have deleted the one that had the name.
                self.forget(&Place::Host, &interface.name);
                let bridge =
                    LinkBridge::new(&interface.name).address(interface.mac.0.to_vec()).mtu(*mtu);
                let added = self.host()?.link().add(bridge.build()).execute().await.map_err(error);
                self.or_set_mtu(added, interface, *mtu).await?;
                // Not with the link: `rtnl_create_link` (net/core/rtnetlink.c) knows no alias.
                let index = self.index(&Place::Host, &interface.name).await?;
                let alias =
                    if *internal { registry::INTERNAL_ALIAS } else { registry::NETWORK_ALIAS };
                let alias = LinkAttribute::IfAlias(alias.to_owned());
                let message =
                    LinkUnspec::new_with_index(index).append_extra_attribute(alias).build();
                self.host()?.link().set(message).execute().await.map_err(error)
            }
            Fact::Veth { interface, endpoint, inside, mtu } => {
                self.forget(&Place::Host, &interface.name);
                self.forget(&Place::Endpoint(endpoint.clone()), &inside.name);
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
                self.or_set_mtu(added, interface, *mtu).await
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
                // As `bridge fdb replace STATION dev LINK master static`.
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
                    // Nobody else can have it: it is we who give addresses out, and waiting for
                    // that would take a second.
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
                self.forget(&Place::Host, link);
                self.engine.as_ref().ok_or(io::ErrorKind::NotFound)?.reopen()
            }
            Fact::EngineRoute { link, table, v6 } => {
                let route = engine_route(self.index(&Place::Host, link).await?, *v6, *table);
                // The table is ours: what others have put there does not stay.
                self.host()?.route().add(route).replace().execute().await.map_err(error)
            }
            Fact::Rule(rule) => {
                let mut request = self.host()?.rule().add();
                *request.message_mut() = message_of(rule);
                request.execute().await.map_err(error)
            }
            Fact::Forwarding { v6: true, .. } if !self.singles_links_out() => {
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
            Fact::InternalGuard { link, gateways } => {
                let index = self.index(&Place::Host, link).await?;
                self.with_internal_guard(gateways, |guard| guard.attach(index))
            }
            Fact::PortGuard { link, .. } => {
                let index = self.index(&Place::Host, link).await?;
                let (Some(guards), Some((link, policy))) = (&self.guards, guard_of(fact)) else {
                    return Err(io::ErrorKind::Unsupported.into());
                };
                self.host.with(|| guards.attach(index, link, &policy)).flatten()
            }
            Fact::GuardTable { owner } => {
                self.host.with(|| PortGuards::make_table(owner)).flatten()
            }
            Fact::Ruleset { .. } => {
                let firewall = self.firewall(fact)?;
                blocking(move || firewall.apply()).await
            }
        }
    }

    /// Where `added` says that the link is there already, which is known to be ours: somebody has
    /// changed its MTU.
    async fn or_set_mtu(
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
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.host()?.link().set(message).execute().await.map_err(error)
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
            // They go with their links, and the device with the engine.
            Fact::Station { .. } | Fact::SubnetRoute { .. } => Ok(()),
            Fact::EngineDevice { .. } | Fact::EngineRoute { .. } => Ok(()),
            Fact::Setting { .. }
            | Fact::Group { .. }
            | Fact::Gate { .. }
            | Fact::InternalGuard { .. } => Ok(()),
            Fact::PortGuard { link, .. } => {
                if let Some(guards) = &self.guards {
                    guards.forget(link);
                }
                Ok(())
            }
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
                // Has someone switched it on for all links meanwhile, it is no longer ours to
                // switch off.
                if self.forwards(*v6)? || *v6 && !self.singles_links_out() {
                    return Ok(());
                }
                self.host.set_sysctl(&forwarding_of(link, *v6), "0")
            }
            Fact::Ruleset { firewall, owner } => match self.firewall(fact) {
                Ok(firewall) => firewall.remove(),
                // Of one that was killed, which had chosen another.
                Err(_) => Firewall::new(*firewall, &self.host, owner)?.remove(),
            },
        }
    }

    /// The firewall that `fact` is about, if it is the one in use.
    fn firewall(&self, fact: &Fact) -> io::Result<Arc<Firewall>> {
        let named = |firewall: &&Arc<Firewall>| firewall.fact() == *fact;
        let firewall = self.firewall.as_ref().filter(named);
        firewall.cloned().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it is not in use"))
    }

    /// Whether the kernel can let single links forward IPv6.
    fn singles_links_out(&self) -> bool {
        !Feature::ForceForwarding.is_forced_off() && self.host.sysctl(FORCE_FORWARDING).is_ok()
    }

    /// What is set for a link that is to forward.
    fn forwarding_at(&self, link: &str, v6: bool) -> io::Result<String> {
        if v6 && !self.singles_links_out() {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.host.sysctl(&forwarding_of(link, v6))
    }

    /// Has all links forward IPv6, where they are all ours; policy rules keep closed what is not to
    /// be open. A host is not made a router.
    fn forward_everything(&self) -> io::Result<()> {
        const ALL: &str = "net.ipv6.conf.all.forwarding";
        if self.forwards(true)? {
            return Ok(());
        }
        if self.alone {
            return self.host.set_sysctl(ALL, "1");
        }
        tracing::warn!(
            "containers have no egress over IPv6: before Linux 6.17 it is all links that forward or none; set {ALL}=1 if this host may be a router"
        );
        Ok(())
    }

    /// Whether the host forwards, from all its links.
    fn forwards(&self, v6: bool) -> io::Result<bool> {
        let name = if v6 { "net.ipv6.conf.all.forwarding" } else { "net.ipv4.ip_forward" };
        match self.host.sysctl(name) {
            Err(error) if is_without_ipv6(&error, name) => Ok(false),
            value => Ok(value? != "0"),
        }
    }

    /// Deletes a link of the host, if it is the one that is meant.
    async fn delete_link(&mut self, interface: &Interface) -> io::Result<()> {
        let handle = self.host()?;
        let mut found = handle.link().get().match_name(interface.name.clone()).execute();
        let Some(message) = found.try_next().await.map_err(error)? else { return Ok(()) };
        let link = link_of(&message);
        self.forget(&Place::Host, &interface.name);
        if link.mac != Some(interface.mac) {
            tracing::warn!(interface = %interface.name, "an interface that is not ours any more is left alone");
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

    /// Forgets the numbers of links of endpoints.
    pub(crate) fn forget_endpoints(&mut self) {
        self.connections.retain(|place, _| *place == Place::Host);
    }

    fn forget(&mut self, place: &Place, link: &str) {
        if let Some(connection) = self.connections.get_mut(place) {
            connection.indexes.remove(link);
        }
    }

    /// The number of a link.
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

/// The link that has the name `name`, or the alternative name.
async fn link_named(handle: &Handle, name: &str) -> io::Result<Option<Link>> {
    let found = handle.link().get().match_name(name.to_owned()).execute().try_next().await;
    match found.map_err(error) {
        Err(error) if is_absent(&error) => Ok(None),
        found => Ok(found?.as_ref().map(link_of)),
    }
}

/// Has `f` done on a thread of its own.
async fn blocking<T: Send + 'static>(
    f: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(io::Error::other)?
}

/// The setting of a link of somebody else's that lets what comes in there be forwarded.
fn forwarding_of(link: &str, v6: bool) -> String {
    if v6 {
        format!("net.ipv6.conf.{link}.force_forwarding")
    } else {
        format!("net.ipv4.conf.{link}.forwarding")
    }
}

/// Whether a setting is not there because the kernel has no IPv6: then it is switched off as far as
/// can be.
fn is_without_ipv6(error: &io::Error, setting: &str) -> bool {
    error.kind() == io::ErrorKind::NotFound
        && setting.starts_with("net.ipv6.")
        && !std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// What lets single links forward IPv6, if the kernel has it.
const FORCE_FORWARDING: &str = "net.ipv6.conf.all.force_forwarding";

/// `ENODEV`.
const NO_DEVICE: i32 = rustix::io::Errno::NODEV.raw_os_error();

/// Whether the kernel says that there is no such thing.
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

/// The namespace that decides whether `fact` is true; `None` for the host.
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
        | Fact::InternalGuard { .. }
        | Fact::GuardTable { .. }
        | Fact::Ruleset { .. } => None,
    }
}

/// The link that the guard of `fact` is at, and what it enforces.
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
        mac: station.0,
        bridge: bridge.0,
        v4: v4.collect(),
        v6: v6.collect(),
        any_address: *any_address,
    };
    Some((link, policy))
}

/// What was asked of the kernel about `what`, which is not there if its link has gone meanwhile.
fn found(asked: io::Result<bool>, what: &str) -> Result<bool, KernelError> {
    match asked {
        Err(error) if is_absent(&error) => Ok(false),
        asked => {
            asked.map_err(|source| KernelError { what: format!("look for the {what}"), source })
        }
    }
}
