//! The published ports of endpoints: which are open, where they lead, and how they come and go at
//! run time.
//!
//! An endpoint is a namespace and its addresses. All its ports of one protocol share one way to it
//! ([`Relocatable`]), so that a container that comes back elsewhere takes a thousand ports along at
//! once. Nothing that is done to one port or one endpoint is noticed by the flows of another.
//!
//! Where the NAT engine leads containers out, ports of UDP come in by it as well
//! ([`NatPublisher`]).
//!
//! Where networks are apart from the host ([`HostContext::is_rootless`]) their gateways are no
//! addresses of its own. What is published on all addresses is opened there too then, and comes and
//! goes with the port.

use crate::bind::{PortError, reserve};
use crate::client_address::{Relocatable, Source, SourceError};
use crate::firewall::{BypassedRules, Chosen, PublishBy, opening};
use crate::host_context::HostContext;
use crate::limits::ProxyLimits;
use crate::nat_publish::{NatPort, NatPublisher};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tidegate_model::{PortSpec, Protocol, PublishLabel, host_addresses};
use tidegate_nat::Nat;
use tidegate_netns::Namespace;
use tidegate_netsetup::{Firewall, Opening};
use tidegate_proxy::{
    Drained, Engine, Fill, GatewayAcl, Listener, Permit, PortOptions, PortSnapshot, PublishedPort,
    Settings, Upstream, Whose,
};

/// Sockets to listen on at most: every port of TCP and UDP, on all IPv4 and on all IPv6 addresses.
/// What goes beyond that is a mistake, and the list of them has to be told in one piece.
pub(crate) const MAX_PORTS: usize = 4 * 65_535;

/// Descriptors that a way into a namespace keeps: two for its book of addresses, one for its policy
/// route.
const WAY_DESCRIPTORS: u32 = 3;

/// Which port it is. Numbers are not given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PortId(pub(crate) u32);

/// A published port, as it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenPort {
    /// Which one.
    pub(crate) id: PortId,
    /// Whose port it leads to.
    pub(crate) endpoint: String,
    /// Where it listens.
    pub(crate) label: PublishLabel,
    /// The endpoint's port.
    pub(crate) container_port: u16,
}

/// Why a port is not published, or an endpoint not relocated. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    /// There is no such endpoint.
    #[error("there is no endpoint {0:?}")]
    NoEndpoint(String),
    /// The port cannot be had.
    #[error(transparent)]
    Port(#[from] PortError),
    /// There are [`MAX_PORTS`].
    #[error(
        "{0} ports more would be over {MAX_PORTS}, which is all there may be; remove some first"
    )]
    TooMany(usize),
    /// Descriptors have run out.
    #[error(
        "{0} ports more leave no file descriptors for connections; raise the limit (ulimit -n)"
    )]
    NoDescriptors(usize),
    /// There is no way into the endpoint.
    #[error("endpoint {endpoint:?}: {source}")]
    NoWay {
        /// Which endpoint.
        endpoint: String,
        /// What is in the way.
        source: SourceError,
    },
    /// A rule of DOCKER-USER would not be asked.
    #[error(
        "port {0}: would be served by a userspace socket, which bypasses the rule {1:?} of DOCKER-USER; use --firewall=iptables, give the container an address of that family, or remove the rule"
    )]
    Bypasses(PublishLabel, String),
    /// Whether there is such a rule is not known.
    #[error("the rules of DOCKER-USER cannot be read: {0}")]
    DockerUser(io::Error),
    /// The firewall has not opened it.
    #[error("firewall: {0}")]
    Firewall(io::Error),
    /// No event loop could be started.
    #[error("event loops: {0}")]
    Engine(io::Error),
    /// The end has begun.
    #[error("everything is being taken down")]
    Closed,
}

/// Publishes ports of endpoints.
pub(crate) struct Publisher {
    host_context: HostContext,
    /// Where ports are opened too.
    firewall: Option<Arc<Firewall>>,
    engine: Arc<Engine>,
    limits: ProxyLimits,
    /// Where a port on all addresses has to be opened besides.
    gateways: Vec<IpAddr>,
    /// By the NAT engine, until everything is closed.
    nat_publish: Mutex<Option<NatPublisher>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    endpoints: BTreeMap<String, Endpoint>,
    ports: BTreeMap<PortId, Port>,
    /// Those without series that the NAT engine carries and that are being closed: what they have
    /// counted is not remembered yet.
    leaving: BTreeMap<PortId, Arc<NatPort>>,
    /// The last number that was given out.
    last: u32,
    /// The kernel translates ports, where it can.
    translates: bool,
    closed: bool,
}

/// What ports can lead to.
pub(crate) struct Endpoint {
    namespace: Namespace,
    addresses: Vec<IpAddr>,
    acl: GatewayAcl,
    /// Those of its addresses that the kernel may translate its ports to.
    targets: Vec<IpAddr>,
    /// Those from which its answers go to the NAT engine, if there is one.
    behind_engine: Vec<IpAddr>,
    relocations: u64,
    ways: BTreeMap<Protocol, Way>,
}

impl Endpoint {
    /// At `addresses` in `namespace`; `acl` says which clients may use which address of this host.
    pub(crate) fn new(namespace: Namespace, addresses: &[IpAddr], acl: GatewayAcl) -> Self {
        Self {
            namespace,
            addresses: addresses.to_vec(),
            acl,
            targets: Vec::new(),
            behind_engine: Vec::new(),
            relocations: 0,
            ways: BTreeMap::new(),
        }
    }

    /// Its ports are translated to `targets` where the kernel translates ports.
    pub(crate) fn translated_to(self, targets: Vec<IpAddr>) -> Self {
        Self { targets, ..self }
    }

    /// What it sends from `addresses` goes out by the NAT engine, so what comes in for them may
    /// come by it.
    pub(crate) fn behind_engine(self, addresses: Vec<IpAddr>) -> Self {
        Self { behind_engine: addresses, ..self }
    }
}

/// How flows of one protocol reach an endpoint.
struct Way {
    upstream: Arc<Relocatable>,
    options: Ways,
    _descriptors: Permit,
}

/// Options of ports of one protocol of an endpoint.
#[derive(Clone)]
struct Ways {
    /// Of sockets of the host.
    outside: Arc<PortOptions>,
    /// Of those at gateways that are not addresses of the host's namespace.
    at_gateways: Arc<PortOptions>,
}

struct Port {
    told: OpenPort,
    /// Itself, and the same at gateways.
    published: Vec<PublishedPort>,
    /// Itself, where the NAT engine carries it.
    carried: Option<Arc<NatPort>>,
    _descriptors: Vec<Permit>,
}

/// By whom a port is carried.
enum Carried {
    Publisher(PublishedPort),
    Engine(NatPort),
}

impl Publisher {
    /// Publishes nothing yet. Ports are opened in the firewall of `chosen` too. `gateways` are the
    /// addresses of all networks on this side.
    pub(crate) fn new(
        host_context: HostContext,
        mut settings: Settings,
        limits: ProxyLimits,
        chosen: &Chosen,
        gateways: Vec<IpAddr>,
    ) -> Self {
        // What connects to containers lives where their networks are.
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
        let state = Mutex::new(State { translates, ..State::default() });
        Self {
            host_context,
            firewall,
            engine,
            limits,
            gateways,
            nat_publish: Mutex::default(),
            state,
        }
    }

    /// Ports of UDP come in by `nat` from here on, which leads containers out.
    pub(crate) fn come_in_by(&self, nat: Arc<Nat>) {
        *self.nat_publish() = Some(NatPublisher::new(nat, Arc::clone(&self.engine)));
    }

    fn nat_publish(&self) -> MutexGuard<'_, Option<NatPublisher>> {
        self.nat_publish.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The figures of the open ports that have series of their own, and the sums of the others.
    pub(crate) fn snapshot(&self) -> Vec<PortSnapshot> {
        // What is counted by one and by the other belongs together: a port that is being closed is
        // in one of the two.
        let state = self.state();
        let mut ports = self.engine.snapshot();
        for carried in state.carried() {
            let figures = carried.snapshot();
            if carried.has_series() {
                ports.push(figures);
                continue;
            }
            let whose = Whose::Others(figures.whose.protocol());
            match ports.iter_mut().find(|sum| sum.whose == whose) {
                Some(sum) => sum.add(&figures),
                None => ports.push(PortSnapshot { whose, ..figures }),
            }
        }
        ports
    }

    /// How full the tables are.
    pub(crate) fn fill(&self) -> Fill {
        let state = self.state();
        let mut fill = self.engine.fill();
        for port in state.ports.values().filter_map(|port| port.carried.as_ref()) {
            fill.ports[usize::from(!port.has_series())] += 1;
        }
        fill
    }

    /// Makes `name` an endpoint that ports can lead to.
    pub(crate) fn add_endpoint(&self, name: &str, endpoint: Endpoint) {
        self.state().endpoints.insert(name.to_owned(), endpoint);
    }

    /// Where endpoint `name` is.
    pub(crate) fn namespace(&self, name: &str) -> Option<Namespace> {
        self.state().endpoints.get(name).map(|endpoint| endpoint.namespace.clone())
    }

    /// How often each endpoint has moved.
    pub(crate) fn relocations(&self) -> BTreeMap<String, u64> {
        let state = self.state();
        state
            .endpoints
            .iter()
            .map(|(name, endpoint)| (name.clone(), endpoint.relocations))
            .collect()
    }

    /// Opens the ports of `spec` and leads them to `endpoint`: all, or none.
    ///
    /// # Errors
    /// [`PublishError`].
    pub(crate) fn publish(
        &self,
        endpoint: &str,
        spec: &PortSpec,
    ) -> Result<Vec<OpenPort>, PublishError> {
        let per_mapping =
            host_addresses(spec.host_ip()).map(|ip| 1 + self.gateways_for(ip).count());
        let sockets = spec.mappings().len() * per_mapping.sum::<usize>();
        // Before anything is opened, so that nobody else is left without descriptors meanwhile.
        self.state().check(endpoint, sockets)?;
        let permits = self.permits(sockets)?;
        let mut listeners = Vec::new();
        for mapping in spec.mappings() {
            let opened = reserve(&mapping)?;
            listeners.extend(opened.into_iter().map(|listener| (listener, mapping.container_port)));
        }
        self.lead(endpoint, spec.protocol(), listeners, permits)
    }

    /// Leads `listeners`, which are all of `protocol`, each to the port of `endpoint` beside it.
    /// They are closed if that fails.
    ///
    /// # Errors
    /// [`PublishError`].
    pub(crate) fn adopt(
        &self,
        endpoint: &str,
        protocol: Protocol,
        listeners: Vec<(Listener, u16)>,
    ) -> Result<Vec<OpenPort>, PublishError> {
        let sockets = |(listener, _): &(Listener, u16)| {
            1 + self.gateways_for(listener.label().address().ip()).count()
        };
        let permits = self.permits(listeners.iter().map(sockets).sum())?;
        self.lead(endpoint, protocol, listeners, permits)
    }

    /// What `count` sockets need: one descriptor each, with two left for a connection.
    fn permits(&self, count: usize) -> Result<Vec<Permit>, PublishError> {
        let permits: Option<Vec<Permit>> = (0..count).map(|_| self.engine.reserve(1)).collect();
        let permits = permits.filter(|_| self.engine.descriptors_left() >= 2);
        permits.ok_or(PublishError::NoDescriptors(count))
    }

    fn lead(
        &self,
        endpoint: &str,
        protocol: Protocol,
        listeners: Vec<(Listener, u16)>,
        permits: Vec<Permit>,
    ) -> Result<Vec<OpenPort>, PublishError> {
        let told: Vec<_> =
            listeners.iter().map(|(listener, port)| (listener.label(), *port)).collect();
        // As they are now, and before the lock is taken: a program may run.
        let bypassed = self.bypassed_rules(told.iter().map(|(label, _)| *label))?;
        let mut at_gateways = Vec::new();
        // How many of those each port has.
        let mut counts = Vec::with_capacity(told.len());
        for (label, container_port) in &told {
            let more = self.open_at_gateways(*label)?;
            counts.push(more.len());
            at_gateways.extend(more.into_iter().map(|listener| (listener, *container_port)));
        }
        let options = self.way(endpoint, protocol)?;
        let mut state = self.state();
        state.check(endpoint, listeners.len() + at_gateways.len())?;
        let openings = |state: &State| -> Vec<Opening> {
            told.iter().map(|(label, port)| state.opening(endpoint, *label, *port)).collect()
        };
        if openings(&state).iter().any(|opening| bypassed.by(opening).is_some()) {
            self.translate(&mut state, &bypassed)?;
        }
        let openings = openings(&state);
        for ((label, _), opening) in told.iter().zip(&openings) {
            if let Some(rule) = bypassed.by(opening) {
                return Err(PublishError::Bypasses(*label, rule.to_owned()));
            }
        }
        // Before anything is answered.
        self.change_firewall(&openings, &[])?;
        // Not before: who connects must have passed the rules.
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
            state.endpoints.get(endpoint).map(|endpoint| endpoint.behind_engine.as_slice());
        let carried = match (nat_publish, by_engine) {
            (Some(nat_publish), Some(guests))
                if protocol == Protocol::Udp && !guests.is_empty() =>
            {
                let acl = &options.outside.gateway_acl;
                let carry = |(listener, port)| {
                    nat_publish.publish(listener, port, guests, acl).map(Carried::Engine)
                };
                listeners.into_iter().map(carry).collect::<io::Result<Vec<_>>>()
            }
            _ => publish(listeners, &options.outside)
                .map(|published| published.into_iter().map(Carried::Publisher).collect()),
        };
        let published =
            carried.and_then(|carried| Ok((carried, publish(at_gateways, &options.at_gateways)?)));
        let (carried, at_gateways) = published.map_err(|error| {
            self.close_in_firewall(&openings);
            PublishError::Engine(error)
        })?;
        let (mut carried, mut at_gateways) = (carried.into_iter(), at_gateways.into_iter());
        let mut permits = permits.into_iter();
        let mut opened = Vec::with_capacity(told.len());
        for ((label, container_port), count) in told.into_iter().zip(counts) {
            state.last += 1;
            let id = PortId(state.last);
            let told = OpenPort { id, endpoint: endpoint.to_owned(), label, container_port };
            opened.push(told.clone());
            let (mut published, carried) = match carried.next() {
                Some(Carried::Publisher(port)) => (vec![port], None),
                Some(Carried::Engine(port)) => (Vec::new(), Some(Arc::new(port))),
                None => (Vec::new(), None),
            };
            published.extend(at_gateways.by_ref().take(count));
            let descriptors = permits.by_ref().take(1 + count).collect();
            state.ports.insert(id, Port { told, published, carried, _descriptors: descriptors });
        }
        Ok(opened)
    }

    /// The way of `protocol` to `name`, made when it is first asked for. That is not done under the
    /// lock: root in the endpoint decides how long it takes.
    fn way(&self, name: &str, protocol: Protocol) -> Result<Ways, PublishError> {
        let no_endpoint = || PublishError::NoEndpoint(name.to_owned());
        loop {
            let (namespace, addresses, acl) = {
                let state = self.state();
                let endpoint = state.endpoints.get(name).ok_or_else(no_endpoint)?;
                if let Some(way) = endpoint.ways.get(&protocol) {
                    return Ok(way.options.clone());
                }
                (endpoint.namespace.clone(), endpoint.addresses.clone(), endpoint.acl.clone())
            };
            let descriptors =
                self.engine.reserve(WAY_DESCRIPTORS).ok_or(PublishError::NoDescriptors(1))?;
            let upstream = towards(&self.host_context, name, &namespace, &addresses, protocol)?;
            let upstream = Arc::new(Relocatable::new(upstream, &addresses));
            let with = |acl| {
                let mut options = PortOptions::new(Arc::clone(&upstream) as Arc<dyn Upstream>);
                options.gateway_acl = acl;
                self.limits.limit_port(&mut options);
                Arc::new(options)
            };
            let at_gateways = with(acl.clone());
            let outside = if self.host_context.is_rootless() {
                with(acl.for_sockets_elsewhere())
            } else {
                Arc::clone(&at_gateways)
            };
            let options = Ways { outside, at_gateways };
            let way = Way { upstream, options: options.clone(), _descriptors: descriptors };
            let mut state = self.state();
            let endpoint = state.endpoints.get_mut(name).ok_or_else(no_endpoint)?;
            let is_first = !endpoint.ways.contains_key(&protocol);
            // Another port may have made it meanwhile, or the endpoint have been relocated.
            if is_first && endpoint.namespace.id() == namespace.id() {
                endpoint.ways.insert(protocol, way);
                return Ok(options);
            }
            drop(state);
        }
    }

    /// The gateways at which a port on `ip` is opened too.
    fn gateways_for(&self, ip: IpAddr) -> impl Iterator<Item = IpAddr> + '_ {
        let same = move |gateway: &IpAddr| ip.is_unspecified() && gateway.is_ipv4() == ip.is_ipv4();
        self.gateways.iter().copied().filter(same)
    }

    fn open_at_gateways(&self, label: PublishLabel) -> Result<Vec<Listener>, PublishError> {
        let at = |gateway| SocketAddr::new(gateway, label.address().port());
        let open = |gateway| {
            let listener = Listener::reserve(at(gateway), label.protocol())?;
            listener.drop_forged_own_source()?;
            listener.open()?;
            Ok::<_, PortError>(listener)
        };
        let gateways: Vec<IpAddr> = self.gateways_for(label.address().ip()).collect();
        if gateways.is_empty() {
            return Ok(Vec::new());
        }
        let opened = self
            .host_context
            .networks()
            .with(|| gateways.into_iter().map(open).collect::<Result<_, _>>());
        Ok(opened.map_err(PublishError::Engine)??)
    }

    /// Closes a port: it can be bound again when this returns. Its connections are reset, its
    /// sessions end. Returns what it was; nothing if there is no such port (any more).
    pub(crate) fn unpublish(&self, id: PortId) -> Option<OpenPort> {
        // Not under the lock: the loops have to be waited for.
        let (port, opening) = {
            let mut state = self.state();
            let port = state.ports.remove(&id)?;
            let opening =
                state.opening(&port.told.endpoint, port.told.label, port.told.container_port);
            if let Some(carried) = port.carried.as_ref().filter(|carried| !carried.has_series()) {
                state.leaving.insert(id, Arc::clone(carried));
            }
            (port, opening)
        };
        if let Some(carried) = port.carried {
            carried.close();
            let mut state = self.state();
            if state.leaving.remove(&id).is_some() {
                self.engine.remember(&carried.snapshot());
            }
        }
        let closed = port.published.into_iter().all(|socket| self.engine.unpublish(socket));
        self.close_in_firewall(&[opening]);
        closed.then_some(port.told)
    }

    /// The rules that ports at `labels` would bypass if sockets served them, as they are now.
    fn bypassed_rules(
        &self,
        mut labels: impl Iterator<Item = PublishLabel>,
    ) -> Result<BypassedRules, PublishError> {
        // What is apart from the host no rules of the host's are about; nor what it asks itself.
        if self.host_context.is_rootless() || labels.all(|label| label.address().ip().is_loopback())
        {
            return Ok(BypassedRules::default());
        }
        let kind = self.firewall.as_ref().map(|firewall| firewall.kind());
        BypassedRules::observe(kind, self.host_context.networks()).map_err(PublishError::DockerUser)
    }

    /// Rules have come that sockets bypass: all ports are translated by the kernel from here on,
    /// where it can and where the rules are asked of what it forwards. Connections go on as they
    /// are. Whether that has changed anything.
    fn translate(&self, state: &mut State, bypassed: &BypassedRules) -> Result<bool, PublishError> {
        let Some(firewall) = self.firewall.as_ref().filter(|_| !state.translates) else {
            return Ok(false);
        };
        let before = state.openings();
        state.translates = true;
        let after = state.openings();
        let concerned = before.iter().filter(|opening| bypassed.by(opening).is_some());
        let result = if concerned.clone().all(|opening| bypassed.holds_when_forwarded(opening)) {
            firewall.redirect_ports(&before, &after).map(|()| true)
        } else {
            Ok(false)
        };
        state.translates = matches!(result, Ok(true));
        result.map_err(PublishError::Firewall)
    }

    /// Whether the kernel translates ports, where it can.
    pub(crate) fn translates(&self) -> bool {
        self.state().translates
    }

    /// Rules have come: the same, and the ports that go on bypassing one, with the rule.
    ///
    /// # Errors
    /// The firewall's; ports are carried as before.
    pub(crate) fn enforce(
        &self,
        bypassed: &BypassedRules,
    ) -> Result<(bool, Vec<(PublishLabel, String)>), PublishError> {
        let mut state = self.state();
        let bypasses = |state: &State| {
            let bypasses = |opening: &Opening| {
                let at = SocketAddr::new(opening.address, opening.port);
                Some((PublishLabel::new(at, opening.protocol), bypassed.by(opening)?.to_owned()))
            };
            state.openings().iter().filter_map(bypasses).collect::<Vec<_>>()
        };
        if bypasses(&state).is_empty() {
            return Ok((false, Vec::new()));
        }
        let changed = self.translate(&mut state, bypassed)?;
        Ok((changed, bypasses(&state)))
    }

    fn change_firewall(&self, added: &[Opening], removed: &[Opening]) -> Result<(), PublishError> {
        let Some(firewall) = &self.firewall else { return Ok(()) };
        firewall.change_ports(added, removed).map_err(PublishError::Firewall)
    }

    /// Where that fails nothing answers any more, and it goes with the rest in the end.
    fn close_in_firewall(&self, ports: &[Opening]) {
        if let Err(error) = self.change_firewall(&[], ports) {
            for port in ports {
                let publish =
                    PublishLabel::new(SocketAddr::new(port.address, port.port), port.protocol);
                tracing::warn!(%publish, %error, "a port that is closed is still in the firewall");
            }
        }
    }

    /// The open ports, in the order in which they were published.
    pub(crate) fn ports(&self) -> Vec<OpenPort> {
        self.state().ports.values().map(|port| port.told.clone()).collect()
    }

    /// The same with their figures; those of the same port at gateways are in them.
    pub(crate) fn figures(&self) -> Vec<(OpenPort, PortSnapshot)> {
        let mut figures: BTreeMap<PublishedPort, PortSnapshot> = BTreeMap::new();
        self.engine.visit(|port, snapshot| {
            figures.insert(port, snapshot.clone());
        });
        let state = self.state();
        let of = |port: &Port| {
            let mut sum = PortSnapshot::empty(Whose::Port(port.told.label));
            port.published
                .iter()
                .filter_map(|socket| figures.get(socket))
                .for_each(|more| sum.add(more));
            port.carried.iter().for_each(|carried| sum.add(&carried.snapshot()));
            (port.told.clone(), sum)
        };
        state.ports.values().map(of).collect()
    }

    /// `endpoint` is now at `addresses` in `namespace`. Its ports stay open and lead there from
    /// here on.
    ///
    /// # Errors
    /// [`PublishError`]; its ports lead where they did.
    pub(crate) fn relocate(
        &self,
        endpoint: &str,
        namespace: &Namespace,
        addresses: &[IpAddr],
    ) -> Result<(), PublishError> {
        let mut ready: BTreeMap<Protocol, Arc<dyn Upstream>> = BTreeMap::new();
        let relocated: Vec<(Protocol, Arc<Relocatable>)> = loop {
            let missing = {
                let mut state = self.state();
                let Some(found) = state.endpoints.get_mut(endpoint) else {
                    return Err(PublishError::NoEndpoint(endpoint.to_owned()));
                };
                let Some(missing) = found.ways.keys().find(|way| !ready.contains_key(way)) else {
                    found.namespace = namespace.clone();
                    found.addresses = addresses.to_vec();
                    found.relocations += 1;
                    let ways = found.ways.iter();
                    break ways.map(|(of, way)| (*of, Arc::clone(&way.upstream))).collect();
                };
                *missing
            };
            // Not under the lock: root in the endpoint decides how long it takes.
            let way = towards(&self.host_context, endpoint, namespace, addresses, missing)?;
            ready.insert(missing, way);
        };
        // Nor this, which takes back what is in the old namespace.
        for (protocol, way) in relocated {
            if let Some(upstream) = ready.remove(&protocol) {
                way.relocate(upstream, addresses);
            }
        }
        Ok(())
    }

    /// Closes every port for good, lets connections go on for at most `deadline`, and cuts what is
    /// left. Nothing is left in the endpoints' namespaces then, whoever still knows of this.
    pub(crate) fn close(&self, deadline: Duration) -> Drained {
        let ports = {
            let mut state = self.state();
            state.closed = true;
            std::mem::take(&mut state.ports)
        };
        // Not under the lock either: the engine has to be waited for.
        drop(ports);
        // Whoever still knows of this does not keep the engine.
        self.nat_publish().take();
        let drained = self.engine.drain(deadline, || false);
        // With the ways goes what they have set in there. Not under the lock: it takes a while.
        let endpoints = std::mem::take(&mut self.state().endpoints);
        drop(endpoints);
        drained
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The ports that the NAT engine carries, and those of the sum that it has carried until now.
    fn carried(&self) -> impl Iterator<Item = &Arc<NatPort>> {
        self.ports.values().filter_map(|port| port.carried.as_ref()).chain(self.leaving.values())
    }

    /// What a firewall has to know of a port of `endpoint`.
    fn opening(&self, endpoint: &str, label: PublishLabel, container_port: u16) -> Opening {
        let endpoint = self.endpoints.get(endpoint).filter(|_| self.translates);
        let targets = endpoint.map(|endpoint| endpoint.targets.as_slice());
        opening(label, container_port, targets.unwrap_or_default())
    }

    /// The same of all its ports.
    fn openings(&self) -> Vec<Opening> {
        let told = self.ports.values().map(|port| &port.told);
        told.map(|port| self.opening(&port.endpoint, port.label, port.container_port)).collect()
    }

    /// Whether `more` ports of `endpoint` may be opened.
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

fn towards(
    host_context: &HostContext,
    endpoint: &str,
    namespace: &Namespace,
    addresses: &[IpAddr],
    protocol: Protocol,
) -> Result<Arc<dyn Upstream>, PublishError> {
    Source::towards_namespace(None, host_context, namespace, addresses, protocol)
        .map_err(|source| PublishError::NoWay { endpoint: endpoint.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With one endpoint, `web`.
    fn publisher() -> Publisher {
        let publisher = Publisher::new(
            HostContext::here().unwrap(),
            Settings::default(),
            ProxyLimits::default(),
            &Chosen::default(),
            Vec::new(),
        );
        let web = Endpoint::new(Namespace::current().unwrap(), &[], GatewayAcl::default());
        publisher.add_endpoint("web", web);
        publisher
    }

    #[test]
    fn nothing_is_opened_for_an_endpoint_that_is_not_there_nor_after_the_end_has_begun() {
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
    fn there_is_an_end_to_how_many_ports_there_are() {
        let publisher = publisher();
        let state = publisher.state();
        assert!(state.check("web", MAX_PORTS).is_ok());
        assert!(matches!(state.check("web", MAX_PORTS + 1), Err(PublishError::TooMany(_))));
    }
}
