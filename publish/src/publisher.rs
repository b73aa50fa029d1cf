//! The published ports of endpoints: which are open, where they forward to, and how they are added
//! and removed at run time.
//!
//! An endpoint is a namespace and its addresses. All its ports of one protocol share one upstream
//! ([`RelocatableUpstream`]). When the container moves to another namespace, a single change
//! therefore relocates a thousand ports. Changes to one port or endpoint do not affect flows of
//! another.
//!
//! If the NAT engine provides egress, it also forwards published UDP ports ([`NatPublisher`]).
//!
//! Rootless networks are separate from the host ([`HostContext::is_rootless`]), and their gateway
//! addresses do not belong to the host. A port on all addresses then also listens on the gateways,
//! for as long as it is published.

use crate::bind::{PortError, reserve};
use crate::client_address::{RelocatableUpstream, Source, SourceError};
use crate::firewall::{BypassedRules, Chosen, PublishBy, opening};
use crate::limits::ProxyLimits;
use crate::nat_publish::{NatPort, NatPublisher};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_model::{PortSpec, Protocol, PublishLabel, host_addresses};
use tidegate_nat::Nat;
use tidegate_netns::HostContext;
use tidegate_netns::Namespace;
use tidegate_netsetup::{Firewall, Opening};
use tidegate_proxy::{
    BackendId, Drained, Engine, EngineUsage, GatewayAcl, Listener, Permit, PortOptions,
    PortSnapshot, ProxyProtocol, PublishedPort, SeriesLabel, Settings, Upstream,
};

/// Maximum number of listening sockets: every TCP and UDP port, on all IPv4 and on all IPv6
/// addresses. A higher number is a configuration error. The API returns the whole list in one
/// response, so the list must be bounded.
pub const MAX_PORTS: usize = 4 * 65_535;

/// The descriptors of an upstream into a namespace: two for its address book, one for its policy
/// route.
const UPSTREAM_DESCRIPTORS: u32 = 3;

/// The id of a published port. Ids are not reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortId(pub u32);

/// The description of a published port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenPort {
    /// The id.
    pub id: PortId,
    /// The endpoint that it forwards to.
    pub endpoint: String,
    /// The address and protocol that it listens on.
    pub label: PublishLabel,
    /// The port of the endpoint.
    pub container_port: u16,
}

/// Why a port was not published, or an endpoint not relocated. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The endpoint does not exist.
    #[error("there is no endpoint {0:?}")]
    NoEndpoint(String),
    /// The port cannot be bound.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The limit of [`MAX_PORTS`] is reached.
    #[error("{0} more ports would exceed the limit of {MAX_PORTS}; remove some first")]
    TooMany(usize),
    /// File descriptors are exhausted.
    #[error(
        "{0} more ports leave no file descriptors for connections; raise the limit of open files (ulimit -n, LimitNOFILE= of a service unit)"
    )]
    NoDescriptors(usize),
    /// File descriptors are exhausted.
    #[error(
        "endpoint {0} leaves no file descriptors for connections; raise the limit of open files (ulimit -n, LimitNOFILE= of a service unit)"
    )]
    NoDescriptorsForEndpoint(String),
    /// No upstream into the namespace of the endpoint could be created.
    #[error("endpoint {endpoint:?}: {source}")]
    NoUpstream {
        /// The endpoint.
        endpoint: String,
        /// The error of the upstream.
        source: SourceError,
    },
    /// The port would bypass a rule of DOCKER-USER.
    #[error(
        "port {0}: would be served by a userspace socket, which bypasses the rule {1:?} of DOCKER-USER; use --firewall=iptables, give the container an address of that family, or remove the rule"
    )]
    Bypasses(PublishLabel, String),
    /// The rules of DOCKER-USER cannot be read.
    #[error("the rules of DOCKER-USER cannot be read: {0}")]
    DockerUser(io::Error),
    /// The port could not be opened in the firewall.
    #[error("firewall: {0}")]
    Firewall(io::Error),
    /// An event loop could not be started.
    #[error("event loops: {0}")]
    Engine(io::Error),
    /// The publisher is closed.
    #[error("the project is being taken down")]
    Closed,
}

/// Publishes ports of endpoints.
pub struct Publisher {
    host_context: HostContext,
    /// The firewall in which ports are opened.
    firewall: Option<Arc<Firewall>>,
    engine: Arc<Engine>,
    limits: ProxyLimits,
    /// Publishes UDP ports through the NAT engine; `None` without it, and after the close.
    nat_publish: Mutex<Option<NatPublisher>>,
    /// Held during a change of ports, which may run programs and wait for event loops.
    changing: Mutex<()>,
    /// Held only to read or to update the state.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    endpoints: BTreeMap<String, PublishTarget>,
    /// Descriptors that other parts of the process hold for an endpoint.
    descriptors: BTreeMap<String, Permit>,
    ports: BTreeMap<PortId, Port>,
    /// Ports without series that the NAT engine forwards and that are being closed. Their counts
    /// are not yet added to the sum of closed ports.
    closing: BTreeMap<PortId, Arc<NatPort>>,
    /// The gateways on which ports on all addresses also listen.
    gateways: Vec<IpAddr>,
    /// The last assigned id.
    last: u32,
    /// Ports are translated by the kernel where possible.
    translates: bool,
    closed: bool,
}

/// The target of published ports.
pub struct PublishTarget {
    namespace: Namespace,
    addresses: Vec<IpAddr>,
    acl: GatewayAcl,
    /// The addresses that the kernel may translate its ports to.
    targets: Vec<IpAddr>,
    /// The addresses with egress through the NAT engine.
    behind_engine: Vec<IpAddr>,
    /// Chooses the container of each flow. Otherwise all flows go to the namespace.
    balanced: Option<Balanced>,
    relocations: u64,
    upstreams: BTreeMap<Protocol, EndpointUpstream>,
}

/// An upstream to several containers.
#[derive(Clone)]
struct Balanced {
    upstream: Arc<dyn Upstream>,
    proxy_protocol: Option<ProxyProtocol>,
}

impl PublishTarget {
    /// An endpoint with `addresses` in `namespace`. `acl` decides which clients may use which
    /// address of the host.
    pub fn new(namespace: Namespace, addresses: &[IpAddr], acl: GatewayAcl) -> Self {
        Self {
            namespace,
            addresses: addresses.to_vec(),
            acl,
            targets: Vec::new(),
            behind_engine: Vec::new(),
            balanced: None,
            relocations: 0,
            upstreams: BTreeMap::new(),
        }
    }

    /// Forwards all flows to `upstream`, which chooses the container. With `proxy_protocol`, TCP
    /// connections begin with the address of the client.
    pub fn balanced_by(
        self,
        upstream: Arc<dyn Upstream>,
        proxy_protocol: Option<ProxyProtocol>,
    ) -> Self {
        Self { balanced: Some(Balanced { upstream, proxy_protocol }), ..self }
    }

    /// Sets the addresses that the kernel translates its ports to.
    pub fn translated_to(self, targets: Vec<IpAddr>) -> Self {
        Self { targets, ..self }
    }

    /// Sets the addresses with egress through the NAT engine. UDP ports published to them are
    /// forwarded through the engine, too.
    pub fn behind_engine(self, addresses: Vec<IpAddr>) -> Self {
        Self { behind_engine: addresses, ..self }
    }
}

/// The upstream of an endpoint for one protocol, with the options of its ports.
struct EndpointUpstream {
    upstream: Arc<RelocatableUpstream>,
    options: EndpointOptions,
    _descriptors: Permit,
}

/// The port options of an endpoint for one protocol.
#[derive(Clone)]
struct EndpointOptions {
    /// For sockets on addresses of the host.
    outside: Arc<PortOptions>,
    /// For sockets on gateways outside of the namespace of the host.
    at_gateways: Arc<PortOptions>,
}

struct Port {
    view: OpenPort,
    /// The socket of the proxy, unless the NAT engine forwards the port.
    published: Option<PublishedPort>,
    /// The sockets on gateways, with a descriptor each.
    at_gateways: BTreeMap<IpAddr, (PublishedPort, Permit)>,
    /// The port in the NAT engine, if that forwards it.
    nat_port: Option<Arc<NatPort>>,
    _descriptor: Option<Permit>,
}

impl Port {
    /// All sockets of the proxy.
    fn sockets(&self) -> impl Iterator<Item = PublishedPort> {
        self.published.into_iter().chain(self.at_gateways.values().map(|(socket, _)| *socket))
    }
}

/// A port, by the component that forwards it.
enum Forwarder {
    Proxy(PublishedPort),
    NatEngine(NatPort),
}

impl Publisher {
    /// A publisher without ports. Ports are also opened in the firewall of `chosen`. `gateways` are
    /// the gateway addresses of all networks.
    pub fn new(
        host_context: HostContext,
        mut settings: Settings,
        limits: ProxyLimits,
        chosen: &Chosen,
        gateways: Vec<IpAddr>,
    ) -> Self {
        // The event loops connect to containers, so they run in the namespace of the networks.
        let (inside, gateways) = if host_context.is_rootless() {
            (Some(host_context.networks().clone()), gateways)
        } else {
            (None, Vec::new())
        };
        let enter = move || inside.as_ref().map_or(Ok(()), Namespace::enter);
        limits.limit_engine(&mut settings);
        let engine = Arc::new(Engine::with_prepared_threads(settings, enter));
        let firewall = chosen.firewall.clone();
        let translates = chosen.publish == PublishBy::Kernel;
        let state = Mutex::new(State { translates, gateways, ..State::default() });
        let (nat_publish, changing) = Default::default();
        Self { host_context, firewall, engine, limits, nat_publish, changing, state }
    }

    /// Sets the NAT engine. UDP ports published from now on are forwarded through it.
    pub fn use_nat_engine(&self, nat: Arc<Nat>) {
        *self.nat_publish() = Some(NatPublisher::new(nat, Arc::clone(&self.engine)));
    }

    fn nat_publish(&self) -> MutexGuard<'_, Option<NatPublisher>> {
        self.nat_publish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metrics of the open ports with series of their own, and the sums of the others.
    pub fn snapshot(&self) -> Vec<PortSnapshot> {
        // Under one lock, because a port that is being closed is counted in exactly one of the two.
        let state = self.state();
        let mut ports = self.engine.snapshot();
        for port in state.nat_ports() {
            let figures = port.snapshot();
            if port.has_series() {
                ports.push(figures);
                continue;
            }
            let series = SeriesLabel::Others(figures.series.protocol());
            match ports.iter_mut().find(|sum| sum.series == series) {
                Some(sum) => sum.add(&figures),
                None => ports.push(PortSnapshot { series, ..figures }),
            }
        }
        ports
    }

    /// The use of the limits of the proxy. Its port counts include the ports of the NAT engine.
    pub fn usage(&self) -> EngineUsage {
        let state = self.state();
        let mut usage = self.engine.usage();
        for port in state.ports.values().filter_map(|port| port.nat_port.as_ref()) {
            usage.ports[usize::from(!port.has_series())] += 1;
        }
        usage
    }

    /// Reserves `count` descriptors for an endpoint until it is removed, with two left for a
    /// connection. They are those that other parts of the process hold for it.
    ///
    /// # Errors
    /// [`PublishError::NoDescriptorsForEndpoint`].
    pub fn reserve_for_endpoint(&self, name: &str, count: u32) -> Result<(), PublishError> {
        let permit = self.engine.reserve(count);
        let permit = permit.filter(|_| self.engine.descriptors_left() >= 2);
        let permit =
            permit.ok_or_else(|| PublishError::NoDescriptorsForEndpoint(name.to_owned()))?;
        self.state().descriptors.insert(name.to_owned(), permit);
        Ok(())
    }

    /// Adds an endpoint.
    pub fn add_endpoint(&self, name: &str, endpoint: PublishTarget) {
        self.state().endpoints.insert(name.to_owned(), endpoint);
    }

    /// Ends the flows to published ports whose client has one of these addresses, which may get a
    /// new owner.
    pub fn end_clients(&self, addresses: &[IpAddr]) {
        self.engine.end_clients(addresses.iter().copied());
    }

    /// Resets the connections to these backends of [balanced](PublishTarget::balanced_by)
    /// upstreams, which no longer exist.
    pub fn end_backends(&self, backends: BTreeSet<BackendId>) {
        self.engine.end_backends(backends);
    }

    /// Closes the ports of an endpoint and removes it.
    pub fn remove_endpoint(&self, name: &str) {
        let ids: Vec<PortId> = {
            let state = self.state();
            let of = state.ports.iter().filter(|(_, port)| port.view.endpoint == name);
            of.map(|(id, _)| *id).collect()
        };
        for id in ids {
            self.unpublish(id);
        }
        // Not under the lock: the drop removes policy rules in the namespace, which takes a while.
        let removed = {
            let mut state = self.state();
            (state.endpoints.remove(name), state.descriptors.remove(name))
        };
        drop(removed);
    }

    /// Sets the gateway addresses of all networks: ports on all addresses listen on new ones, and
    /// no longer on removed ones. Does nothing if the networks are in the namespace of the host.
    ///
    /// # Errors
    /// [`PublishError`]: the first port that cannot listen on a new gateway.
    pub fn set_gateways(&self, gateways: Vec<IpAddr>) -> Result<(), PublishError> {
        if !self.host_context.is_rootless() {
            return Ok(());
        }
        let _changing = self.changing();
        let (closed, missing) = {
            let mut state = self.state();
            let old = std::mem::replace(&mut state.gateways, gateways);
            let new: Vec<IpAddr> =
                state.gateways.iter().filter(|ip| !old.contains(ip)).copied().collect();
            let State { gateways, ports, .. } = &mut *state;
            let mut closed = Vec::new();
            for port in ports.values_mut() {
                let gone = port.at_gateways.keys().filter(|gateway| !gateways.contains(gateway));
                let gone: Vec<IpAddr> = gone.copied().collect();
                closed.extend(gone.iter().filter_map(|gateway| port.at_gateways.remove(gateway)));
            }
            let missing: Vec<_> = ports
                .values()
                .flat_map(|port| {
                    let also = gateways_for(&new, port.view.label.address().ip());
                    also.map(|gateway| (port.view.clone(), gateway))
                })
                .collect();
            (closed, missing)
        };
        for (socket, _permit) in closed {
            self.engine.unpublish(socket);
        }
        for (view, gateway) in missing {
            let permit = self.permits(1)?.pop();
            let listener = self.open_at_gateways(view.label, &[gateway])?;
            let options = self.upstream_options(&view.endpoint, view.label.protocol())?;
            let listeners =
                listener.into_iter().map(|listener| (listener, view.container_port)).collect();
            let opened = self.engine.publish(listeners, &options.at_gateways);
            let opened = opened.map_err(PublishError::Engine)?.pop();
            let mut state = self.state();
            if let (Some(port), Some(opened), Some(permit)) =
                (state.ports.get_mut(&view.id), opened, permit)
            {
                port.at_gateways.insert(gateway, (opened, permit));
            }
        }
        Ok(())
    }

    /// The namespace of an endpoint.
    pub fn namespace(&self, name: &str) -> Option<Namespace> {
        self.state().endpoints.get(name).map(|endpoint| endpoint.namespace.clone())
    }

    /// The number of relocations of each endpoint.
    pub fn relocations(&self) -> BTreeMap<String, u64> {
        let state = self.state();
        state
            .endpoints
            .iter()
            .map(|(name, endpoint)| (name.clone(), endpoint.relocations))
            .collect()
    }

    /// Publishes the ports of `spec` for `endpoint`, either all of them or none.
    ///
    /// # Errors
    /// [`PublishError`].
    pub fn publish(&self, endpoint: &str, spec: &PortSpec) -> Result<Vec<OpenPort>, PublishError> {
        let per_mapping = host_addresses(spec.host_ip()).map(|ip| 1 + self.gateways_for(ip).len());
        let sockets = spec.mappings().len() * per_mapping.sum::<usize>();
        // Checked before anything is opened, so that it takes no descriptors from connections.
        self.state().check(endpoint, sockets)?;
        let permits = self.permits(sockets)?;
        let mut listeners = Vec::new();
        for mapping in spec.mappings() {
            let opened = reserve(&mapping)?;
            listeners.extend(opened.into_iter().map(|listener| (listener, mapping.container_port)));
        }
        self.publish_listeners(endpoint, spec.protocol(), listeners, permits)
    }

    /// Publishes `listeners`, all of `protocol`, each for the given port of `endpoint`. They are
    /// closed on error.
    ///
    /// # Errors
    /// [`PublishError`].
    pub fn adopt(
        &self,
        endpoint: &str,
        protocol: Protocol,
        listeners: Vec<(Listener, u16)>,
    ) -> Result<Vec<OpenPort>, PublishError> {
        let sockets = |(listener, _): &(Listener, u16)| {
            1 + self.gateways_for(listener.label().address().ip()).len()
        };
        let permits = self.permits(listeners.iter().map(sockets).sum())?;
        self.publish_listeners(endpoint, protocol, listeners, permits)
    }

    /// Reserves the descriptors of `count` sockets, with two left for a connection.
    fn permits(&self, count: usize) -> Result<Vec<Permit>, PublishError> {
        let permits: Option<Vec<Permit>> = (0..count).map(|_| self.engine.reserve(1)).collect();
        let permits = permits.filter(|_| self.engine.descriptors_left() >= 2);
        permits.ok_or(PublishError::NoDescriptors(count))
    }

    fn publish_listeners(
        &self,
        endpoint: &str,
        protocol: Protocol,
        listeners: Vec<(Listener, u16)>,
        permits: Vec<Permit>,
    ) -> Result<Vec<OpenPort>, PublishError> {
        let labels: Vec<_> =
            listeners.iter().map(|(listener, port)| (listener.label(), *port)).collect();
        // The current rules. Read before the lock is taken, because this may run a program.
        let bypassed = self.bypassed_rules(labels.iter().map(|(label, _)| *label))?;
        let mut at_gateways = Vec::new();
        // The gateways of each port.
        let mut gateways = Vec::with_capacity(labels.len());
        for (label, container_port) in &labels {
            let also = self.gateways_for(label.address().ip());
            let more = self.open_at_gateways(*label, &also)?;
            gateways.push(also);
            at_gateways.extend(more.into_iter().map(|listener| (listener, *container_port)));
        }
        let options = self.upstream_options(endpoint, protocol)?;
        let _changing = self.changing();
        self.state().check(endpoint, listeners.len() + at_gateways.len())?;
        let openings = || -> Vec<Opening> {
            let state = self.state();
            labels.iter().map(|(label, port)| state.opening(endpoint, *label, *port)).collect()
        };
        if openings().iter().any(|opening| bypassed.by(opening).is_some()) {
            self.translate(&bypassed)?;
        }
        let openings = openings();
        for ((label, _), opening) in labels.iter().zip(&openings) {
            if let Some(rule) = bypassed.by(opening) {
                return Err(PublishError::Bypasses(*label, rule.to_owned()));
            }
        }
        // The firewall opens before the sockets accept.
        self.change_firewall(&openings, &[])?;
        // The sockets accept only now, so that every connection has passed the rules.
        let open = |(listener, _): &(Listener, u16)| {
            listener.drop_forged_own_source()?;
            listener.open()
        };
        if let Err(error) = listeners.iter().try_for_each(open) {
            self.close_in_firewall(&openings);
            return Err(PortError::from(error).into());
        }
        let publish = |listeners, options| self.engine.publish(listeners, options);
        let nat_publish = self.nat_publish().clone();
        let by_engine =
            self.state().endpoints.get(endpoint).map(|endpoint| endpoint.behind_engine.clone());
        let forwarders = match (nat_publish, by_engine) {
            (Some(nat_publish), Some(addresses))
                if protocol == Protocol::Udp && !addresses.is_empty() =>
            {
                let acl = &options.outside.gateway_acl;
                let forward = |(listener, port)| {
                    nat_publish.publish(listener, port, &addresses, acl).map(Forwarder::NatEngine)
                };
                listeners.into_iter().map(forward).collect::<io::Result<Vec<_>>>()
            }
            _ => publish(listeners, &options.outside)
                .map(|published| published.into_iter().map(Forwarder::Proxy).collect()),
        };
        let published = forwarders
            .and_then(|forwarders| Ok((forwarders, publish(at_gateways, &options.at_gateways)?)));
        let (forwarders, at_gateways) = published.map_err(|error| {
            self.close_in_firewall(&openings);
            PublishError::Engine(error)
        })?;
        let (mut forwarders, mut at_gateways) = (forwarders.into_iter(), at_gateways.into_iter());
        let mut permits = permits.into_iter();
        let mut opened = Vec::with_capacity(labels.len());
        let mut state = self.state();
        if state.closed {
            // The engine closes the sockets.
            return Err(PublishError::Closed);
        }
        for ((label, container_port), gateways) in labels.into_iter().zip(gateways) {
            state.last += 1;
            let id = PortId(state.last);
            let view = OpenPort { id, endpoint: endpoint.to_owned(), label, container_port };
            opened.push(view.clone());
            let (published, nat_port) = match forwarders.next() {
                Some(Forwarder::Proxy(port)) => (Some(port), None),
                Some(Forwarder::NatEngine(port)) => (None, Some(Arc::new(port))),
                None => (None, None),
            };
            let descriptor = permits.next();
            let sockets = at_gateways.by_ref().take(gateways.len()).zip(permits.by_ref());
            let at_gateways = gateways.into_iter().zip(sockets).collect();
            let port = Port { view, published, at_gateways, nat_port, _descriptor: descriptor };
            state.ports.insert(id, port);
        }
        Ok(opened)
    }

    /// The port options of endpoint `name` for `protocol`. The upstream is created on first use,
    /// and not under the lock: root in the endpoint can delay it.
    fn upstream_options(
        &self,
        name: &str,
        protocol: Protocol,
    ) -> Result<EndpointOptions, PublishError> {
        let no_endpoint = || PublishError::NoEndpoint(name.to_owned());
        loop {
            let (namespace, addresses, acl, balanced) = {
                let state = self.state();
                let endpoint = state.endpoints.get(name).ok_or_else(no_endpoint)?;
                if let Some(known) = endpoint.upstreams.get(&protocol) {
                    return Ok(known.options.clone());
                }
                let (namespace, balanced) = (endpoint.namespace.clone(), endpoint.balanced.clone());
                (namespace, endpoint.addresses.clone(), endpoint.acl.clone(), balanced)
            };
            let descriptors =
                self.engine.reserve(UPSTREAM_DESCRIPTORS).ok_or(PublishError::NoDescriptors(1))?;
            let (upstream, header) = match balanced {
                Some(Balanced { upstream, proxy_protocol }) => (upstream, proxy_protocol),
                None => {
                    let context = &self.host_context;
                    (upstream_to(context, name, &namespace, &addresses, protocol)?, None)
                }
            };
            let header = header.filter(|_| protocol == Protocol::Tcp);
            let upstream = Arc::new(RelocatableUpstream::new(upstream, &addresses));
            let with = |acl| {
                let mut options = PortOptions::new(Arc::clone(&upstream) as Arc<dyn Upstream>);
                options.gateway_acl = acl;
                options.proxy_protocol = header;
                self.limits.limit_port(&mut options);
                Arc::new(options)
            };
            let at_gateways = with(acl.clone());
            let outside = if self.host_context.is_rootless() {
                with(acl.for_other_namespace())
            } else {
                Arc::clone(&at_gateways)
            };
            let options = EndpointOptions { outside, at_gateways };
            let new =
                EndpointUpstream { upstream, options: options.clone(), _descriptors: descriptors };
            let mut state = self.state();
            let endpoint = state.endpoints.get_mut(name).ok_or_else(no_endpoint)?;
            let is_first = !endpoint.upstreams.contains_key(&protocol);
            // Another port may have created it, or the endpoint may have been relocated.
            if is_first && endpoint.namespace.id() == namespace.id() {
                endpoint.upstreams.insert(protocol, new);
                return Ok(options);
            }
            drop(state);
        }
    }

    /// The gateways on which a port on `ip` also listens.
    fn gateways_for(&self, ip: IpAddr) -> Vec<IpAddr> {
        gateways_for(&self.state().gateways, ip).collect()
    }

    fn open_at_gateways(
        &self,
        label: PublishLabel,
        gateways: &[IpAddr],
    ) -> Result<Vec<Listener>, PublishError> {
        let at = |gateway| SocketAddr::new(gateway, label.address().port());
        let open = |gateway| {
            let listener = Listener::reserve(at(gateway), label.protocol())?;
            listener.drop_forged_own_source()?;
            listener.open()?;
            Ok::<_, PortError>(listener)
        };
        if gateways.is_empty() {
            return Ok(Vec::new());
        }
        let opened = self
            .host_context
            .networks()
            .with(|| gateways.iter().copied().map(open).collect::<Result<_, _>>());
        Ok(opened.map_err(PublishError::Engine)??)
    }

    /// Closes a port. Its connections are reset and its sessions end. The port can be bound again
    /// on return. Returns its description, or `None` if it does not exist.
    pub fn unpublish(&self, id: PortId) -> Option<OpenPort> {
        let _changing = self.changing();
        let (port, opening) = {
            let mut state = self.state();
            let port = state.ports.remove(&id)?;
            let opening =
                state.opening(&port.view.endpoint, port.view.label, port.view.container_port);
            if let Some(nat_port) = port.nat_port.as_ref().filter(|port| !port.has_series()) {
                state.closing.insert(id, Arc::clone(nat_port));
            }
            (port, opening)
        };
        if let Some(nat_port) = &port.nat_port {
            nat_port.close();
            let mut state = self.state();
            if state.closing.remove(&id).is_some() {
                self.engine.add_closed(&nat_port.snapshot());
            }
        }
        let closed = port.sockets().all(|socket| self.engine.unpublish(socket));
        self.close_in_firewall(&[opening]);
        closed.then_some(port.view)
    }

    /// The current rules that ports at `labels` would bypass if sockets served them.
    fn bypassed_rules(
        &self,
        mut labels: impl Iterator<Item = PublishLabel>,
    ) -> Result<BypassedRules, PublishError> {
        // Rules of the host do not apply to rootless networks, nor to connections over loopback.
        if self.host_context.is_rootless() || labels.all(|label| label.address().ip().is_loopback())
        {
            return Ok(BypassedRules::default());
        }
        let kind = self.firewall.as_ref().map(|firewall| firewall.kind());
        BypassedRules::observe(kind, self.host_context.networks()).map_err(PublishError::DockerUser)
    }

    /// Switches all ports to destination NAT of the kernel, because sockets bypass the rules
    /// `bypassed`. This is done only if the rules then apply to every affected port. Existing
    /// connections continue unchanged. Returns whether anything was changed.
    fn translate(&self, bypassed: &BypassedRules) -> Result<bool, PublishError> {
        let (before, after) = {
            let mut state = self.state();
            if self.firewall.is_none() || state.translates {
                return Ok(false);
            }
            let before = state.openings();
            state.translates = true;
            let after = state.openings();
            state.translates = false;
            (before, after)
        };
        let Some(firewall) = &self.firewall else { return Ok(false) };
        let mut affected = before.iter().filter(|opening| bypassed.by(opening).is_some());
        if !affected.all(|opening| bypassed.holds_when_forwarded(opening)) {
            return Ok(false);
        }
        firewall.redirect_ports(&before, &after).map_err(PublishError::Firewall)?;
        self.state().translates = true;
        Ok(true)
    }

    /// Whether the kernel translates ports where possible.
    pub fn translates(&self) -> bool {
        self.state().translates
    }

    /// Enforces new rules: translates ports by the kernel if that is possible. Returns whether
    /// anything was changed, and the ports that still bypass a rule, with the rule.
    ///
    /// # Errors
    /// The error of the firewall. Ports are forwarded as before.
    pub fn enforce(
        &self,
        bypassed: &BypassedRules,
    ) -> Result<(bool, Vec<(PublishLabel, String)>), PublishError> {
        let _changing = self.changing();
        let bypasses = || {
            let bypasses = |opening: &Opening| {
                let at = SocketAddr::new(opening.address, opening.port);
                Some((PublishLabel::new(at, opening.protocol), bypassed.by(opening)?.to_owned()))
            };
            self.state().openings().iter().filter_map(bypasses).collect::<Vec<_>>()
        };
        if bypasses().is_empty() {
            return Ok((false, Vec::new()));
        }
        let changed = self.translate(bypassed)?;
        Ok((changed, bypasses()))
    }

    fn change_firewall(&self, added: &[Opening], removed: &[Opening]) -> Result<(), PublishError> {
        let Some(firewall) = &self.firewall else { return Ok(()) };
        firewall.change_ports(added, removed).map_err(PublishError::Firewall)
    }

    /// Closes ports in the firewall. On error, their rules remain until all rules are removed, and
    /// no socket serves the ports.
    fn close_in_firewall(&self, ports: &[Opening]) {
        if let Err(error) = self.change_firewall(&[], ports) {
            for port in ports {
                let publish =
                    PublishLabel::new(SocketAddr::new(port.address, port.port), port.protocol);
                tracing::warn!(%publish, %error, "closed port not removed from the firewall");
            }
        }
    }

    /// The open ports in the order of publication.
    pub fn ports(&self) -> Vec<OpenPort> {
        self.state().ports.values().map(|port| port.view.clone()).collect()
    }

    /// The open ports with their metrics, which include those of their gateway sockets.
    pub fn figures(&self) -> Vec<(OpenPort, PortSnapshot)> {
        let mut figures: BTreeMap<PublishedPort, PortSnapshot> = BTreeMap::new();
        self.engine.for_each_port(|port, snapshot| {
            figures.insert(port, snapshot.clone());
        });
        let state = self.state();
        let of = |port: &Port| {
            let mut sum = PortSnapshot::empty(SeriesLabel::Port(port.view.label));
            port.sockets().filter_map(|socket| figures.get(&socket)).for_each(|more| sum.add(more));
            port.nat_port.iter().for_each(|nat_port| sum.add(&nat_port.snapshot()));
            (port.view.clone(), sum)
        };
        state.ports.values().map(of).collect()
    }

    /// Moves `endpoint` to `addresses` in `namespace`. Its ports stay open and forward there from
    /// now on.
    ///
    /// # Errors
    /// [`PublishError`]. Its ports forward as before.
    pub fn relocate(
        &self,
        endpoint: &str,
        namespace: &Namespace,
        addresses: &[IpAddr],
    ) -> Result<(), PublishError> {
        let mut ready: BTreeMap<Protocol, Arc<dyn Upstream>> = BTreeMap::new();
        let relocated: Vec<(Protocol, Arc<RelocatableUpstream>)> = loop {
            let missing = {
                let mut state = self.state();
                let Some(found) = state.endpoints.get_mut(endpoint) else {
                    return Err(PublishError::NoEndpoint(endpoint.to_owned()));
                };
                let Some(missing) = found.upstreams.keys().find(|one| !ready.contains_key(one))
                else {
                    found.namespace = namespace.clone();
                    found.addresses = addresses.to_vec();
                    found.relocations += 1;
                    let all = found.upstreams.iter();
                    break all.map(|(of, one)| (*of, Arc::clone(&one.upstream))).collect();
                };
                *missing
            };
            // Not under the lock: root in the endpoint can delay it.
            let upstream =
                upstream_to(&self.host_context, endpoint, namespace, addresses, missing)?;
            ready.insert(missing, upstream);
        };
        // Not under the lock either: this removes state from the old namespace.
        for (protocol, current) in relocated {
            if let Some(upstream) = ready.remove(&protocol) {
                current.relocate(upstream, addresses);
            }
        }
        Ok(())
    }

    /// Closes all ports for good. Connections may finish within `deadline` and are then reset. On
    /// return, no state is left in the namespaces of endpoints, even while other references to the
    /// publisher exist.
    pub fn close(&self, deadline: Duration) -> Drained {
        let ports = {
            let mut state = self.state();
            state.closed = true;
            std::mem::take(&mut state.ports)
        };
        // Not under the lock: this waits for the engine.
        drop(ports);
        // Other references to the publisher must not keep the NAT engine alive.
        self.nat_publish().take();
        let drained = self.engine.drain(deadline, || false);
        // Not under the lock: the drop removes policy rules in the namespaces, which takes a while.
        let endpoints = std::mem::take(&mut self.state().endpoints);
        drop(endpoints);
        drained
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The ports that the NAT engine forwards, including those that are being closed.
    fn nat_ports(&self) -> impl Iterator<Item = &Arc<NatPort>> {
        self.ports.values().filter_map(|port| port.nat_port.as_ref()).chain(self.closing.values())
    }

    /// The firewall opening of a port of `endpoint`.
    fn opening(&self, endpoint: &str, label: PublishLabel, container_port: u16) -> Opening {
        let endpoint = self.endpoints.get(endpoint).filter(|_| self.translates);
        let targets = endpoint.map(|endpoint| endpoint.targets.as_slice());
        opening(label, container_port, targets.unwrap_or_default())
    }

    /// The firewall openings of all ports.
    fn openings(&self) -> Vec<Opening> {
        let views = self.ports.values().map(|port| &port.view);
        views.map(|port| self.opening(&port.endpoint, port.label, port.container_port)).collect()
    }

    /// Checks that `more` ports of `endpoint` may be opened.
    fn check(&self, endpoint: &str, more: usize) -> Result<(), PublishError> {
        if self.closed {
            return Err(PublishError::Closed);
        }
        if !self.endpoints.contains_key(endpoint) {
            return Err(PublishError::NoEndpoint(endpoint.to_owned()));
        }
        if self.ports.len() + more > MAX_PORTS {
            return Err(PublishError::TooMany(more));
        }
        Ok(())
    }
}

/// The addresses among `gateways` on which a port on `ip` also listens.
fn gateways_for(gateways: &[IpAddr], ip: IpAddr) -> impl Iterator<Item = IpAddr> {
    let same = move |gateway: &&IpAddr| ip.is_unspecified() && gateway.is_ipv4() == ip.is_ipv4();
    gateways.iter().filter(same).copied()
}

fn upstream_to(
    host_context: &HostContext,
    endpoint: &str,
    namespace: &Namespace,
    addresses: &[IpAddr],
    protocol: Protocol,
) -> Result<Arc<dyn Upstream>, PublishError> {
    Source::upstream_to_namespace(None, host_context, namespace, addresses, protocol)
        .map_err(|source| PublishError::NoUpstream { endpoint: endpoint.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A publisher with one endpoint, `web`.
    fn publisher() -> Publisher {
        let publisher = Publisher::new(
            HostContext::here().unwrap(),
            Settings::default(),
            ProxyLimits::default(),
            &Chosen::default(),
            Vec::new(),
        );
        let web = PublishTarget::new(Namespace::current().unwrap(), &[], GatewayAcl::default());
        publisher.add_endpoint("web", web);
        publisher
    }

    #[test]
    fn unknown_endpoints_and_a_closed_publisher_are_rejected() {
        let publisher = publisher();
        let spec: PortSpec = "127.0.0.1::80".parse().unwrap();
        assert_eq!(
            publisher.publish("db", &spec).unwrap_err().to_string(),
            "there is no endpoint \"db\""
        );
        publisher.close(Duration::ZERO);
        assert!(matches!(publisher.publish("web", &spec), Err(PublishError::Closed)));
        assert_eq!(publisher.ports(), []);
        assert_eq!(publisher.unpublish(PortId(1)), None);
    }

    #[test]
    fn the_number_of_ports_is_limited() {
        let publisher = publisher();
        let state = publisher.state();
        assert!(state.check("web", MAX_PORTS).is_ok());
        assert!(matches!(state.check("web", MAX_PORTS + 1), Err(PublishError::TooMany(_))));
    }
}
