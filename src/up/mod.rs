//! `tidegate up`: the networks and services of a Compose file, for as long as it runs.
//!
//! ```text
//! read the file ─► clear what a killed instance left ─► lay out ─► take ports ─► networks ─► publish ─► services
//!                                                                                                        │ all ended,
//! remove networks ◄─ close ports, cut connections ◄─ stop services ◄────────────────────────────────────┘ or a signal
//! ```
//!
//! Ports are taken before anything is changed, because that is what fails most, and answered at
//! when the rules are in force. Networks are closed before they are up (see [`tidegate_netsetup`]),
//! so there is no moment at which more can be reached than what is published.

mod announce;
mod control;
mod egress;
mod endpoint_watch;
mod endpoint_work;
mod flood_control;
mod front_end;
mod layout;
mod metrics;
mod names;
mod repair_schedule;

use crate::api::socket::{self, Socket};
use crate::api::{Adopted, MAX_CLIENTS, Order, Server, View};
use crate::bind::{raise_descriptor_limit, reserve};
use crate::client_address::sweep_stale_owners;
use crate::compose::{self, Project, Run};
use crate::firewall::{Chosen, FirewallChoice, PublishBy, choose, opening, targets, zones};
use crate::host_context::HostContext;
use crate::limits::ProxyLimits;
use crate::metrics_endpoint::{MetricsAddress, MetricsStatus, Recorder};
use crate::port_guards::{self, bridge_programs};
use crate::publisher::{Endpoint, Publisher};
use crate::services::{self, ServiceSpec, StandardOutput, Supervisor};
use anyhow::{Context, anyhow, bail};
use control::{Attaching, Outcome, end_servers};
use egress::Egress;
pub use egress::NatLimits;
use endpoint_watch::EndpointWatch;
use endpoint_work::EndpointWork;
use front_end::FrontEnd;
use layout::{Layout, Surroundings, fnv, foreign_networks, layout};
use names::NameServers;
use repair_schedule::RepairSchedule;
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};
use tidegate_model::{PortSpec, Protocol, registry};
use tidegate_netfilter::PortGuards;
use tidegate_netns::{ChangeListener, Namespace, Topic, interface_index, run_directory};
use tidegate_netsetup::{
    BridgePrograms, DefaultRoute, Desired, Firewall, FirewallIsolation, Journal, JournalError,
    Kernel, Observed, Opening, ReplyPath, RuleIsolation, Setup, Uplink,
};
use tidegate_proxy::{GatewayAcl, GatewayNetworks, Listener, Settings};
use tokio::io::{Interest, unix::AsyncFd};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// How long running connections may go on once all services have ended: none is answered any more.
const DRAIN: Duration = Duration::from_millis(100);

/// Descriptors that a service keeps: its namespace, and its init's socket, process and two streams.
const SERVICE_DESCRIPTORS: usize = 5;

/// Orders that may wait; whoever gives one more waits.
const ORDERS: usize = 8;

/// What is asked for.
#[derive(Debug)]
pub struct Up {
    /// The Compose file.
    pub file: PathBuf,
    /// Instead of the file's or its directory's name.
    pub project: Option<String>,
    /// What closes networks.
    pub firewall: FirewallChoice,
    /// What carries published ports; none for what suits.
    pub publish: Option<PublishBy>,
    /// Where metrics are served.
    pub metrics: Option<MetricsAddress>,
    /// Published ports that have series of their own in metrics.
    pub ports_with_series: usize,
    /// How long services may take to end.
    pub grace: Duration,
    /// How long what is told of names may be kept.
    pub dns_ttl: Duration,
    /// Questions of one endpoint that are forwarded to other servers in a second.
    pub dns_forward_rate: u32,
    /// Limits of published ports.
    pub limits: ProxyLimits,
    /// Limits of the NAT engine.
    pub nat_limits: NatLimits,
    /// Containers may reach what the host has on its loopback, at an address that stands for it.
    pub allow_host_loopback: bool,
}

/// What is made for the project, to be taken back in the end.
struct Instance {
    setup: Setup,
    chosen: Chosen,
    /// Where the networks are.
    host: Namespace,
    /// That is not the host itself.
    apart: bool,
    up: Running,
    /// Its name.
    project: String,
    server: Server,
    orders: mpsc::Receiver<Order>,
    /// Of what could have opened the networks.
    changes: AsyncFd<ChangeListener>,
    /// Of what was removed in the namespaces of endpoints.
    watch: EndpointWatch,
    /// When what is checked.
    schedule: RepairSchedule,
    /// What goes on in the namespaces of endpoints.
    work: EndpointWork<Outcome>,
    /// Those for which that leads to another namespace.
    attaching: BTreeMap<String, Attaching>,
    /// What the log has told last of endpoints whose containers something is wrong with.
    unhealthy: BTreeMap<String, String>,
    /// What was restored.
    repairs: metrics::Repairs,
}

/// What runs on the networks.
struct Running {
    layout: Layout,
    /// What access to ports depends on.
    gateway_networks: Arc<GatewayNetworks>,
    /// The priority of a rule of other software that ours cannot precede, as the log has told.
    preceding_rule: Option<u32>,
    publisher: Arc<Publisher>,
    adopted: Arc<Adopted>,
    names: NameServers,
    /// The NAT engine, where there is no firewall.
    egress: Option<Egress>,
    /// The host's DNS servers, for it.
    resolvers: watch::Receiver<Arc<[SocketAddr]>>,
    supervisor: Supervisor,
    /// If they are wanted.
    metrics: Option<MetricsStatus>,
}

/// What a project is brought up with.
struct Resources<'a> {
    host_context: &'a HostContext,
    /// Of DNS.
    front_end: &'a FrontEnd,
    chosen: &'a Chosen,
    /// Of egress, where there is no firewall.
    device: Option<egress::Device>,
    /// What checks what endpoints send, where the host has a mechanism for that.
    guards: Option<Arc<PortGuards>>,
    /// Where what is to be remembered goes.
    run: &'a Path,
}

/// The signals that end it.
struct Signals([Signal; 4]);

impl Signals {
    /// Ctrl-C, a request to end, a terminal that was closed, Ctrl-\.
    const KINDS: [SignalKind; 4] = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
    ];

    /// From here on none of them kills.
    fn new() -> io::Result<Self> {
        let [interrupt, terminate, hangup, quit] = Self::KINDS.map(signal);
        Ok(Self([interrupt?, terminate?, hangup?, quit?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup, quit] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

impl Up {
    /// Runs until all services have ended or a signal comes. True if every service ended well, or
    /// was told to.
    ///
    /// # Errors
    /// One line. Nothing is left behind, unless it says so.
    pub fn run(&self) -> anyhow::Result<bool> {
        // While there is one thread only.
        let host_context = HostContext::for_networks()?;
        // One thread: children are tied to the thread that made them, so that they go when this
        // process is killed. What answers has another one (`FrontEnd`).
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("event loop")?;
        runtime.block_on(self.run_on(&host_context))
    }

    async fn run_on(&self, host_context: &HostContext) -> anyhow::Result<bool> {
        let (started, begun) = (SystemTime::now(), Instant::now());
        let mut project = compose::load(&self.file)?;
        if let Some(name) = &self.project {
            project.name.clone_from(name);
        }
        // Not before the file was read, which may be a pipe that nobody writes to.
        let mut signals = Signals::new().context("signal handlers")?;
        for warning in &project.warnings {
            tracing::warn!("{warning}");
        }
        let run = run_directory().context(
            "no place for what is to be remembered: set XDG_RUNTIME_DIR or TIDEGATE_RUN_DIR",
        )?;
        let run = run.join("projects").join(&project.name);
        let front_end = FrontEnd::start().context("thread of DNS and the API")?;
        let socket = {
            let _runtime = front_end.runtime().enter();
            Socket::open(socket::path()?)?
        };
        let journal = Journal::open(&run.join("network.journal")).map_err(|error| match error {
            JournalError::InUse { holder, .. } => {
                anyhow!(
                    "project {:?} is up already (process {holder}); stop that one, or choose another name",
                    project.name
                )
            }
            error => error.into(),
        })?;
        services::sweep(&run).context("files of services that were killed")?;
        sweep_stale_owners();
        raise_descriptor_limit();
        let chosen = choose(self.firewall, self.publish, host_context, &project.name)?;
        chosen.tell();
        if self.allow_host_loopback && chosen.firewall.is_some() {
            bail!(
                "--allow-host-loopback: containers reach the host's loopback by the NAT engine only, and here the kernel leads them out; say --firewall=none"
            );
        }
        let device = match &chosen.firewall {
            Some(_) => None,
            None => egress::Device::open(host_context, &project)
                .inspect_err(|error| {
                    tracing::warn!(
                        "containers have no egress: {error}; tidegate doctor says what helps"
                    );
                })
                .ok(),
        };
        let mut setup =
            setup_with(host_context, journal, chosen.firewall.as_ref(), device.as_ref());
        let guards = port_guards::port_guards(&project.name)
            .inspect_err(|error| {
                tracing::warn!(
                    "what containers send is not checked, so they can forge addresses: {error}; {}; tidegate doctor \
                     lists which guarantees do not hold",
                    error.remedy()
                );
            })
            .ok();
        if let Some(guards) = &guards {
            tracing::debug!(mechanism = %guards.mechanism(), "port guards");
            setup.kernel().use_guards(Arc::clone(guards));
        }
        let left = setup.clear().await?;
        if left > 0 {
            tracing::info!(steps = left, "cleared what an instance that was killed had left");
        }

        let topics = [
            Topic::Links,
            Topic::Rules,
            Topic::Settings,
            Topic::Addresses,
            Topic::Routes,
            Topic::Fdb,
        ];
        let changes = ChangeListener::of(host_context.networks(), &topics)
            .context("listen for changes of networks")?;
        // SAFETY: its descriptor is its own, and the same for as long as it lives.
        let changes = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }
            .context("listen for changes of networks")?;
        let means = Resources {
            host_context,
            front_end: &front_end,
            chosen: &chosen,
            device,
            guards,
            run: &run,
        };
        let up = match self.start(means, &project, &mut setup, &mut signals).await {
            Ok(Some(up)) => up,
            not_up => {
                // What went wrong first is what matters; what cannot be taken back is in the
                // journal, for the next start.
                match setup.finish().await {
                    Ok(()) => drop(fs::remove_dir_all(&run)),
                    Err(second) => tracing::warn!(error = %second, "not all could be taken back"),
                }
                return not_up.map(|_| true);
            }
        };
        let (orders, received) = mpsc::channel(ORDERS);
        let name = project.name.clone();
        let view = View {
            compose_file: std::path::absolute(&self.file).unwrap_or_else(|_| self.file.clone()),
            started,
            begun,
            isolation: setup.isolation().name(),
            desired: up.layout.desired.clone(),
            services: project.services.iter().map(|service| service.name.clone()).collect(),
            observer: up.supervisor.observer(),
            publisher: Arc::clone(&up.publisher),
            names: up.names.resolver(),
            nat: up.egress.as_ref().map(|nat| nat.nat().figures().clone()),
            adopted: Arc::clone(&up.adopted),
            metrics: up.metrics.clone(),
            orders,
            project: project.name,
        };
        let server = {
            let _runtime = front_end.runtime().enter();
            Server::start(socket, Arc::new(view))
        };
        let repairs = metrics::Repairs::new();
        let (host, apart) = (host_context.networks().clone(), host_context.is_rootless());
        let mut instance = Instance {
            setup,
            chosen,
            host,
            apart,
            up,
            project: name,
            server,
            orders: received,
            changes,
            watch: EndpointWatch::default(),
            schedule: RepairSchedule::new(),
            work: EndpointWork::new(),
            attaching: BTreeMap::new(),
            unhealthy: BTreeMap::new(),
            repairs,
        };
        instance.watch_endpoints();
        instance.up.log();
        if let Err(error) = instance.up.announce() {
            // Whoever read it has seen enough.
            tracing::debug!(%error, "standard output");
        }
        let well = instance.follow(&mut signals).await;
        instance.take_down(&mut signals).await?;
        let _ = fs::remove_dir_all(&run);
        Ok(well)
    }

    /// Brings the project up; `None` if a signal came meanwhile. What was made of its networks is
    /// then, and with an error, in `setup`, to be taken back.
    async fn start(
        &self,
        means: Resources<'_>,
        project: &Project,
        setup: &mut Setup,
        signals: &mut Signals,
    ) -> anyhow::Result<Option<Running>> {
        let Resources { host_context, front_end, chosen, device, guards, run } = means;
        let mut observed = setup.surroundings().await?;
        if host_context.is_rootless() {
            // The networks of the host are not in the way there. But who is to reach them one day
            // must not have their addresses.
            let host = Kernel::new(host_context.ports().clone()).observe(&[]).await?;
            observed.routes.extend(host.routes);
            observed.bridges.extend(host.bridges);
        }
        let mut random = || {
            let mut bytes = [0; 6];
            // Without a source of randomness names collide, and that is told as what it is.
            let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
            bytes
        };
        let mut surroundings = Surroundings {
            observed: &observed,
            host_id: host_id(),
            random: &mut random,
            now: Instant::now(),
        };
        let mut layout = layout(project, &mut surroundings)?;
        layout.desired.guards = port_guards::attachment(guards.as_deref(), &project.name);
        layout.desired.rules_ahead = rules_ahead(&observed);
        let preceding_rule = preceding_rule(&observed, chosen.firewall.as_ref());
        if let Some(priority) = preceding_rule {
            warn_of_preceding_rule(priority);
        }
        let ports = open_ports(project)?;
        if let Some(firewall) = &chosen.firewall {
            layout.desired.uplinks = uplinks(&observed, &layout.desired);
            if chosen.publish == PublishBy::Kernel {
                layout.desired.reply_paths = reply_paths(&observed, &project.name);
            }
            let _ = firewall
                .set_uplinks(&layout.desired.uplinks, foreign_bridges(&observed, &layout.desired));
            firewall.set_reply_paths(&layout.desired.reply_paths);
            firewall.prepare(zones(&layout.desired), openings(&layout, &ports, chosen.publish));
        }
        let recorder = self.metrics.map(Recorder::install).transpose()?;
        let metrics = recorder.as_ref().map(Recorder::status);

        let mut namespaces = BTreeMap::new();
        for service in &project.services {
            let namespace = match &service.run {
                Run::Command(_) => host_context
                    .create_for_service()
                    .with_context(|| format!("service {:?}", service.name))?,
                Run::Adopt(path) => Namespace::from_path(path)
                    .with_context(|| format!("service {:?}", service.name))?,
            };
            let shared = |(_, other): &(&String, &Namespace)| other.id() == namespace.id();
            if let Some((other, _)) = namespaces.iter().find(shared) {
                bail!(
                    "services {other:?} and {:?} are in the same namespace, {}; adopt it once",
                    service.name,
                    namespace.id()
                );
            }
            setup.kernel().add_endpoint(&service.name, namespace.clone());
            namespaces.insert(service.name.clone(), namespace);
        }
        setup.apply(&layout.desired).await?;
        let start = |device: egress::Device| -> anyhow::Result<_> {
            let rate = NonZeroU32::new(self.nat_limits.unanswered).unwrap_or(NonZeroU32::MIN);
            let guards = guards.as_ref();
            let floods = guards
                .map(|guards| flood_control::start(&layout.desired, guards, host_context, rate));
            let floods = floods.transpose().context("start a thread")?.flatten();
            Ok(device.start(
                &layout,
                &observed,
                host_context,
                self.allow_host_loopback,
                self.nat_limits,
                floods,
            )?)
        };
        let mut egress = device.map(start).transpose()?;

        let mut settings =
            Settings { ports_with_series: self.ports_with_series, ..Settings::default() };
        if egress.is_some() {
            settings.reserved_descriptors += egress::descriptors();
        }
        let of_a_service = SERVICE_DESCRIPTORS + names::DESCRIPTORS + endpoint_watch::DESCRIPTORS;
        settings.reserved_descriptors +=
            of_a_service * namespaces.len() + names::SHARED_DESCRIPTORS + MAX_CLIENTS;
        let bridges =
            bridge_indexes(&layout, host_context.networks()).context("look for the bridges")?;
        let gateway_networks = Arc::new(GatewayNetworks::new(layout.gateway_networks(&bridges)));
        gateway_networks.set_foreign_networks(foreign_networks(&observed));
        let gateways = layout.desired.networks.iter().flat_map(|network| &network.subnets);
        let gateways = gateways.map(|subnet| subnet.gateway).collect();
        let publisher =
            Arc::new(Publisher::new(host_context.clone(), settings, self.limits, chosen, gateways));
        for (name, namespace) in &namespaces {
            let addresses = layout.addresses.get(name).map(Vec::as_slice).unwrap_or_default();
            let acl = GatewayAcl::new(Arc::clone(&gateway_networks), layout.networks_of(name));
            let endpoint = Endpoint::new(namespace.clone(), addresses, acl);
            let endpoint = endpoint.translated_to(targets_of(&layout, name));
            publisher.add_endpoint(name, endpoint.behind_engine(egress::behind_it(&layout, name)));
        }
        if let Some(egress) = &egress {
            publisher.come_in_by(Arc::clone(egress.nat()));
        }
        // Of services, once they have been started.
        let observer: Arc<OnceLock<services::Observer>> = Arc::default();
        let begun = async {
            let mut names = NameServers::new(
                project,
                &layout,
                host_context,
                front_end.runtime(),
                self.dns_ttl,
                self.dns_forward_rate,
            )?;
            let mut resolvers = names.resolver().host_servers();
            if let Some(egress) = &mut egress {
                egress.set_resolvers(&resolvers.borrow_and_update());
            }
            names.serve_all(project, &namespaces)?;
            for ((service, protocol), listeners) in ports {
                publisher.adopt(&service, protocol, listeners)?;
            }
            if let Some(recorder) = recorder {
                let (desired, told) = (layout.desired.clone(), Arc::clone(&publisher));
                let seen = Arc::clone(&observer);
                let recorder =
                    recorder.with(move |page| metrics::families(&desired, &told, seen.get(), page));
                let firewall = chosen.firewall.clone();
                let recorder =
                    recorder.with(move |page| metrics::ruleset_families(firewall.as_deref(), page));
                let nat =
                    egress.as_ref().map(|nat| (project.name.clone(), nat.nat().figures().clone()));
                let recorder = recorder.with(move |page| {
                    let engines: Vec<_> =
                        nat.iter().map(|(name, figures)| (name.as_str(), figures)).collect();
                    let _ = tidegate_nat::describe(&engines, page);
                });
                let host = host_context.networks().clone();
                let desired = layout.desired.clone();
                let recorder = recorder.with(move |page| {
                    if let Some(guards) = &guards {
                        metrics::spoofed_families(&desired, guards, &host, page);
                    }
                });
                let resolver = names.resolver();
                let recorder = recorder.with(move |page| {
                    // Writing to a string does not fail.
                    let _ = resolver.describe(page);
                });
                // As a port that belongs to no endpoint.
                let acl = GatewayAcl::new(Arc::clone(&gateway_networks), []);
                let acl = if host_context.is_rootless() { acl.for_other_namespace() } else { acl };
                let recorder = recorder.controlled_by(acl);
                let told = Arc::clone(&publisher);
                recorder
                    .serve(move || (told.snapshot(), told.usage()))
                    .context("metrics endpoint")?;
            }
            let mut supervisor = Supervisor::new(run, StandardOutput, self.grace);
            let specs = specs(project, &layout, &namespaces);
            let interrupted = {
                let starting = supervisor.start(specs);
                tokio::pin!(starting);
                tokio::select! {
                    started = &mut starting => started.map(|()| false)?,
                    () = signals.next() => true,
                }
            };
            // Nobody else sets it.
            let _ = observer.set(supervisor.observer());
            if interrupted {
                supervisor.kill();
                supervisor.wait().await;
            }
            anyhow::Ok((!interrupted).then_some((names, resolvers, supervisor)))
        };
        // The metrics know of the publisher until the process ends.
        let Some((names, resolvers, supervisor)) = begun.await.inspect_err(|_| {
            publisher.close(Duration::ZERO);
        })?
        else {
            publisher.close(Duration::ZERO);
            return Ok(None);
        };
        let adopted = project.services.iter().filter_map(|service| match &service.run {
            Run::Adopt(path) => Some((service.name.clone(), path.clone())),
            Run::Command(_) => None,
        });
        Ok(Some(Running {
            layout,
            gateway_networks,
            preceding_rule,
            publisher,
            adopted: Arc::new(Adopted::new(adopted)),
            names,
            egress,
            resolvers,
            supervisor,
            metrics,
        }))
    }
}

/// What the kernel may translate ports of the endpoint `name` to.
fn targets_of(layout: &Layout, name: &str) -> Vec<IpAddr> {
    let endpoint = layout.desired.endpoints.iter().find(|endpoint| endpoint.name == name);
    endpoint.map(targets).unwrap_or_default()
}

/// What the firewall has to know of `ports`.
fn openings(layout: &Layout, ports: &OpenPorts, publish: PublishBy) -> BTreeSet<Opening> {
    let of = |((service, _), listeners): (&(String, Protocol), &Vec<(Listener, u16)>)| {
        let targets = match publish {
            PublishBy::Proxy => Vec::new(),
            PublishBy::Kernel => targets_of(layout, service),
        };
        let openings =
            listeners.iter().map(|(listener, port)| opening(listener.label(), *port, &targets));
        openings.collect::<Vec<_>>()
    };
    ports.iter().flat_map(of).collect()
}

impl Instance {
    /// Takes everything back; a signal meanwhile ends the patience with services.
    async fn take_down(self, signals: &mut Signals) -> anyhow::Result<()> {
        self.server.close();
        let Running { publisher, mut supervisor, names, egress, .. } = self.up;
        let impatient = {
            let stop = supervisor.stop();
            tokio::pin!(stop);
            tokio::select! {
                () = &mut stop => false,
                () = signals.next() => true,
            }
        };
        if impatient {
            supervisor.kill();
            supervisor.wait().await;
        }
        end_servers(self.work, names).await;
        let drained = publisher.close(DRAIN);
        // Not before: ports come in by it.
        drop(egress);
        if drained.cut > 0 {
            tracing::info!(connections = drained.cut, "connections were cut");
        }
        Ok(self.setup.finish().await?)
    }
}

/// How networks are made and taken back; closed by `firewall`, if there is one.
fn setup_with(
    host_context: &HostContext,
    journal: Journal,
    firewall: Option<&Arc<Firewall>>,
    device: Option<&egress::Device>,
) -> Setup {
    let mut kernel = Kernel::new(host_context.networks().clone());
    if host_context.is_rootless() {
        kernel = kernel.exclusive();
    }
    match firewall {
        None => match device {
            Some(device) => {
                kernel.use_engine(device.link());
                Setup::new(kernel, journal, device.isolation())
            }
            None => Setup::new(kernel, journal, RuleIsolation { programs: bridge_programs() }),
        },
        Some(firewall) => {
            kernel.use_firewall(Arc::clone(firewall));
            let (kind, owner) = (firewall.kind(), firewall.owner().to_owned());
            let programs = BridgePrograms { gates: firewall.gate().is_some(), ..bridge_programs() };
            Setup::new(kernel, journal, FirewallIsolation { firewall: kind, owner, programs })
        }
    }
}

/// The links of others by which answers to the containers of `desired` come, each once for what it
/// forwards because of us and once for what others see to.
fn uplinks(observed: &Observed, desired: &Desired) -> Vec<Uplink> {
    let one = |uplink: &Uplink, ours: bool| {
        let is_ours = |v6: bool| {
            let is_it = |one: &Uplink| {
                one.link == uplink.link && one.ours && if v6 { one.v6 } else { one.v4 }
            };
            // One that forwards by itself is a router's, whose business is not ours.
            let is_ours = desired.uplinks.iter().any(is_it)
                || !observed.forwarding.contains(&(uplink.link.clone(), v6));
            is_ours == ours
        };
        let link = uplink.link.clone();
        let part =
            Uplink { link, v4: uplink.v4 && is_ours(false), v6: uplink.v6 && is_ours(true), ours };
        (part.v4 || part.v6).then_some(part)
    };
    // Nobody comes by the networks of containers, of ours or of others.
    let uplinks = observed.uplinks.iter().filter(|uplink| {
        !egress::is_bridge_of_containers(&uplink.link)
            && !observed.bridges.contains_key(&uplink.link)
    });
    uplinks
        .flat_map(|uplink| [true, false].into_iter().filter_map(|ours| one(uplink, ours)))
        .collect()
}

/// The bridges of other projects.
fn foreign_bridges(observed: &Observed, desired: &Desired) -> BTreeSet<String> {
    let is_ours =
        |name: &String| desired.networks.iter().any(|network| network.bridge.name == *name);
    observed.bridges.keys().filter(|name| !is_ours(name)).cloned().collect()
}

/// How far ahead of their usual priorities our policy rules have to be to precede those of other
/// software. A rule that is added without a priority gets one ahead of all others but the `local`
/// table's (`fib_default_rule_pref`, net/core/fib_rules.c): wg-quick does that.
fn rules_ahead(observed: &Observed) -> u32 {
    /// Priorities that our rules take.
    const COUNT: u32 = registry::UPLINK_PRIORITY - registry::GUARD_EXEMPTION_PRIORITY + 1;
    match observed.first_rule_of_others {
        Some(first) if first <= registry::UPLINK_PRIORITY => {
            registry::GUARD_EXEMPTION_PRIORITY - first.saturating_sub(COUNT).max(1)
        }
        _ => 0,
    }
}

/// The priority of a rule of other software that ours cannot precede, where they have to.
fn preceding_rule(observed: &Observed, firewall: Option<&Arc<Firewall>>) -> Option<u32> {
    // With gates the firewall needs no rules of ours for what containers send, and what closes
    // networks are programs.
    let matters = firewall.is_none_or(|firewall| firewall.gate().is_none());
    observed
        .first_rule_of_others
        .filter(|first| matters && *first <= registry::PRECEDING_PRIORITIES)
}

fn warn_of_preceding_rule(priority: u32) {
    tracing::warn!(
        priority,
        "a policy rule of other software precedes those of tidegate, which have no room ahead of it: what containers \
         send may leave by its route, with the container's address; give it a priority of {} or higher",
        registry::PRECEDING_PRIORITIES + 1
    );
}

/// How answers leave by the uplink that was asked, where the host has several default routes: by
/// all but the best one of `main`, which they take anyway.
fn reply_paths(observed: &Observed, project: &str) -> Vec<ReplyPath> {
    let mut paths: Vec<ReplyPath> = Vec::new();
    for v6 in [false, true] {
        let routes = observed.default_routes.iter().filter(|route| {
            route.v6 == v6
                && !route.link.starts_with(registry::INTERFACE_PREFIX)
                && !egress::is_bridge_of_containers(&route.link)
        });
        let routes: Vec<&DefaultRoute> = routes.collect();
        let best = routes.first().filter(|best| best.table.is_none() && !best.shared);
        for route in &routes {
            let known = paths.iter().any(|path| path.v6 == v6 && path.link == route.link);
            let is_best = best.is_some_and(|best| best.link == route.link);
            // A table of others is better than one of ours, as they keep it up to date.
            let elsewhere = routes.iter().find(|one| one.link == route.link && one.table.is_some());
            let made = if elsewhere.is_some() { None } else { route.gateway };
            if known || is_best || route.nets.is_empty() || elsewhere.is_none() && made.is_none() {
                continue;
            }
            let (link, nets) = (route.link.clone(), route.nets.clone());
            let table = elsewhere.and_then(|route| route.table).unwrap_or(0);
            paths.push(ReplyPath { number: 0, link, v6, table, made, nets });
        }
    }
    // By name, so that a link keeps its number whatever the order of routes.
    paths.sort_by(|a, b| (a.v6, &a.link).cmp(&(b.v6, &b.link)));
    paths.truncate(registry::UPLINKS.into());
    for (number, path) in (1..).zip(&mut paths) {
        path.number = number;
        if path.made.is_some() {
            path.table = registry::uplink_table(project, number);
        }
    }
    paths
}

/// Open sockets and the port of the container that each stands for, by service and protocol.
type OpenPorts = BTreeMap<(String, Protocol), Vec<(Listener, u16)>>;

/// Takes every published port, by service and protocol.
fn open_ports(project: &Project) -> anyhow::Result<OpenPorts> {
    let mut ports = OpenPorts::new();
    for service in &project.services {
        for mapping in service.ports.iter().flat_map(PortSpec::mappings) {
            if mapping.protocol == Protocol::Sctp {
                bail!(
                    "service {:?}: port {}/sctp: protocol not supported",
                    service.name,
                    mapping.container_port
                );
            }
            let opened =
                reserve(&mapping).with_context(|| format!("service {:?}", service.name))?;
            let entry = ports.entry((service.name.clone(), mapping.protocol)).or_default();
            entry.extend(opened.into_iter().map(|listener| (listener, mapping.container_port)));
        }
    }
    Ok(ports)
}

/// The index of each bridge in `host`, by the name of its network. A bridge that is not there has
/// none.
fn bridge_indexes(layout: &Layout, host: &Namespace) -> io::Result<BTreeMap<String, u32>> {
    host.with(|| {
        let mut indexes = BTreeMap::new();
        for network in &layout.desired.networks {
            match interface_index(&network.bridge.name) {
                Ok(index) => drop(indexes.insert(network.name.clone(), index)),
                Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(indexes)
    })?
}

/// What the supervisor is to run. Adopted namespaces have processes of their own.
fn specs(
    project: &Project,
    layout: &Layout,
    namespaces: &BTreeMap<String, Namespace>,
) -> Vec<ServiceSpec> {
    let runs = |name: &String| {
        project
            .services
            .iter()
            .any(|service| service.name == *name && matches!(service.run, Run::Command(_)))
    };
    let host = names::host_resolv_conf();
    let spec = |service: &compose::Service| {
        let Run::Command(command) = &service.run else { return None };
        let hostname = service.hostname.clone().unwrap_or_else(|| service.name.clone());
        Some(ServiceSpec {
            name: service.name.clone(),
            command: command.clone(),
            environment: service.environment.clone(),
            hosts: names::hosts(layout, &service.name, &hostname),
            hostname,
            working_dir: service.working_dir.clone(),
            namespace: namespaces.get(&service.name)?.clone(),
            resolv_conf: names::resolv_conf(project, layout, service, &host),
            restart: service.restart,
            depends_on: service.depends_on.iter().filter(|name| runs(name)).cloned().collect(),
        })
    };
    project.services.iter().filter_map(spec).collect()
}

/// Five bytes that are this host's, and the same at every start: of its machine id (machine-id(5)),
/// which itself is not to be shown.
fn host_id() -> [u8; 5] {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let [.., a, b, c, d, e] = fnv(format!("tidegate {}", id.trim()).as_bytes()).to_be_bytes();
    [a, b, c, d, e]
}
