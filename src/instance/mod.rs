//! An instance of tidegate: the networks and services of a Compose file until they end (`tidegate
//! up`), or the networks of a daemon (`tidegate daemon`).
//!
//! ```text
//! parse file ─► roll back a killed instance ─► layout ─► bind ports ─► networks ─► publish ─► services
//!                                                                                               │ all ended,
//! remove networks ◄─ close ports, cut connections ◄─ stop services ◄───────────────────────────┘ or a signal
//! ```
//!
//! Published ports are bound before any change to the host, because binding is the step that fails
//! most often. They accept traffic once the rules are in force. Networks are isolated before their
//! links are set up (see [`tidegate_netsetup`]), so nothing but published ports is reachable at any
//! time.

mod announce;
mod commands;
mod control;
mod egress;
mod endpoint_watch;
mod endpoint_work;
mod flood_control;
mod front_end;
mod initial;
mod layout;
mod mesh;
mod metrics;
mod names;
mod projects;
mod repair_schedule;
mod routing;
mod signals;
mod stored;
mod tracked_flows;

use crate::api::{Adopted, MAX_CLIENTS, Order, ProjectsView, Server, View, blocking, snapshot};
use crate::port_guards::{self, bridge_programs, has_bridge_guards};
use crate::service_manager::ServiceManager;
use anyhow::{Context, anyhow, bail};
use commands::Owner;
use control::{Attaching, Outcome, end_servers};
use egress::Egress;
pub use egress::NatLimits;
use endpoint_watch::EndpointWatch;
use endpoint_work::EndpointWork;
use front_end::FrontEnd;
use initial::{Initial, openings, specs, targets_of};
use layout::{Layout, foreign_networks};
use names::NameServers;
use projects::Projects;
use repair_schedule::RepairSchedule;
use routing::{
    foreign_bridges, preceding_rule, reply_paths, rules_ahead, uplinks, warn_of_preceding_rule,
};
use rustix::io::Errno;
use signals::Signals;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};
use tidegate_api::socket::{self, Socket, SocketError};
use tidegate_compose::{self, Project};
use tidegate_control::{Name, State, Store};

use tidegate_mesh::agent::Status;
use tidegate_netfilter::PortGuards;
use tidegate_netns::HostContext;
use tidegate_netns::{ChangeListener, Namespace, Topic, interface_index, run_directory};
use tidegate_netsetup::{
    BridgePrograms, Desired, Fact, Firewall, FirewallIsolation, Journal, JournalError, Kernel,
    KernelError, Observed, RuleIsolation, Setup, SetupError,
};
use tidegate_process::raise_descriptor_limit;
use tidegate_proxy::{GatewayAcl, GatewayNetworks, Settings, describe_engine};
use tidegate_publish::client_address::sweep_stale_owners;
use tidegate_publish::firewall::{
    Chosen, FirewallChoice, PublishBy, choose, link_local_members, zones,
};
use tidegate_publish::limits::ProxyLimits;
use tidegate_publish::publisher::{PublishTarget, Publisher};
use tidegate_services::keeper::Keeper;
use tidegate_services::{StandardOutput, Supervisor};
use tidegate_telemetry::metrics_endpoint::{MetricsAddress, MetricsStatus, Recorder};
use tokio::io::{Interest, unix::AsyncFd};
use tokio::sync::{mpsc, watch};

/// Time for open connections to finish after all services have ended. Their peers in the containers
/// no longer exist, so they only flush data.
const DRAIN: Duration = Duration::from_millis(100);

/// File descriptors for each endpoint: its namespace, two directories of sysctls in it, the map of
/// its port guard, and those of its DNS server and of the [`endpoint_watch`].
const ENDPOINT_DESCRIPTORS: u32 = 4 + names::DESCRIPTORS + endpoint_watch::DESCRIPTORS;

/// File descriptors for each service of a project in the foreground: the socket, pidfd, stdout and
/// stderr of its init process.
const SERVICE_DESCRIPTORS: usize = 4;

/// Capacity of the queue of API orders. The API waits while it is full.
const ORDER_QUEUE: usize = 8;

/// The program of detached processes: this one.
const PROGRAM: &str = "/proc/self/exe";

/// There is no directory for runtime files.
const NO_RUN_DIRECTORY: &str =
    "no directory for runtime files: set XDG_RUNTIME_DIR or TIDEGATE_RUN_DIR";

/// How an instance has ended.
struct End {
    /// Every service ended successfully or was stopped.
    success: bool,
    /// Networks were left for the next daemon.
    networks_remain: bool,
}

/// Where the networks of an instance come from.
#[derive(Debug)]
pub enum Source {
    /// A Compose file, whose services run as long as the instance.
    Project {
        /// Path of the file.
        file: PathBuf,
        /// Project name. Default: `name` in the file, or the name of its directory.
        name: Option<String>,
    },
    /// The state file of a daemon, whose networks outlive the process.
    Daemon {
        /// Directory of the state file.
        state: PathBuf,
    },
}

/// The owner of the rules of a daemon. Names of Compose projects have no capitals.
const DAEMON: &str = "Daemon";

/// The state file below the directory of [`Source::Daemon`].
const STATE_FILE: &str = "state.redb";

/// Arguments of `tidegate up`.
#[derive(Debug)]
pub struct Up {
    /// Where the networks come from.
    pub source: Source,
    /// The isolation of networks: a firewall, or none.
    pub firewall: FirewallChoice,
    /// What forwards published ports: the proxy or the kernel. `None` selects one of them.
    pub publish: Option<PublishBy>,
    /// Listen address of the metrics endpoint. `None` disables it.
    pub metrics: Option<MetricsAddress>,
    /// Maximum number of published ports with their own metric series.
    pub ports_with_series: usize,
    /// Time between SIGTERM and SIGKILL when services are stopped.
    pub grace: Duration,
    /// TTL of DNS answers for names of the project.
    pub dns_ttl: Duration,
    /// DNS queries per second of one endpoint that are forwarded to upstream servers.
    pub dns_forward_rate: u32,
    /// Limits of published ports.
    pub limits: ProxyLimits,
    /// Limits of the NAT engine.
    pub nat_limits: NatLimits,
    /// Number of conntrack entries above which flows of containers are evicted. Default: three
    /// quarters of the size of the table.
    pub max_tracked_flows: Option<NonZeroUsize>,
    /// Whether containers can reach the host's loopback, at an address of the NAT engine.
    pub allow_host_loopback: bool,
}

/// A project that is up, with everything that is rolled back at its end.
struct Instance {
    setup: Setup,
    chosen: Chosen,
    /// The namespace of the bridges.
    host: Namespace,
    /// Whether `host` differs from the host's own namespace.
    rootless: bool,
    up: Running,
    /// The project's name.
    project: String,
    server: Server,
    orders: mpsc::Receiver<Order>,
    /// For orders of its own tasks.
    own_orders: mpsc::Sender<Order>,
    /// Changes on the host that can affect the isolation of the networks.
    changes: AsyncFd<ChangeListener>,
    /// The host, if the networks are in a namespace of their own.
    outside: Option<Outside>,
    /// Changes in the namespaces of endpoints.
    watch: EndpointWatch,
    /// When the host and each endpoint are checked next.
    schedule: RepairSchedule,
    /// Running work in the namespaces of endpoints.
    work: EndpointWork<Outcome>,
    /// Endpoints that `work` attaches to another namespace.
    attaching: BTreeMap<String, Attaching>,
    /// The last logged problem of each unhealthy endpoint.
    unhealthy: BTreeMap<String, String>,
    /// Counters of restored objects.
    repairs: metrics::Repairs,
    owner: Owner,
    /// The cluster.
    member: mesh::Member,
    /// The services of the cluster that this host forwards.
    services: mesh::Registry,
    /// The last report of the agent of the cluster, for the metrics.
    mesh_reports: watch::Sender<Option<Arc<Status>>>,
}

/// The host's own namespace, in rootless mode. The NAT engine reaches its container networks, and
/// has to deny access to them.
struct Outside {
    kernel: Kernel,
    changes: AsyncFd<ChangeListener>,
}

impl Outside {
    fn of(host_context: &HostContext) -> anyhow::Result<Self> {
        let topics = [Topic::Links, Topic::Addresses, Topic::Routes];
        let changes = ChangeListener::of(host_context.ports(), &topics)?;
        // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
        let changes = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }?;
        Ok(Self { kernel: Kernel::new(host_context.ports().clone()), changes })
    }

    /// Adds the routes and bridges of the host to `observed`.
    async fn add_to(&mut self, observed: &mut Observed) -> Result<(), KernelError> {
        let host = self.kernel.observe(&[]).await?;
        observed.routes.extend(host.routes);
        observed.bridges.extend(host.bridges);
        Ok(())
    }
}

/// The parts that run on the networks.
struct Running {
    layout: Layout,
    /// The desired state for the API and the metrics.
    shown: watch::Sender<Arc<Desired>>,
    /// Input of the access checks at published ports.
    gateway_networks: Arc<GatewayNetworks>,
    /// Priority of the last logged policy rule of other software that ours cannot precede.
    preceding_rule: Option<u32>,
    publisher: Arc<Publisher>,
    adopted: Arc<Adopted>,
    names: NameServers,
    /// The NAT engine. `None` with a firewall.
    egress: Option<Egress>,
    /// The host's DNS servers, to which the NAT engine forwards queries.
    resolvers: watch::Receiver<Arc<[SocketAddr]>>,
    supervisor: Supervisor,
    metrics: Option<MetricsStatus>,
}

/// Where [`Initial`] comes from.
enum InitialSource<'a> {
    Project(&'a Project),
    State(&'a State),
}

/// Input of [`Up::start`].
struct Resources<'a> {
    /// The setup has a source guard.
    guards_sources: bool,
    /// Reports of the agent of the cluster.
    mesh_reports: watch::Receiver<Option<Arc<Status>>>,
    /// The services of the cluster that this host forwards.
    mesh_services: mesh::Registry,
    host_context: &'a HostContext,
    outside: Option<&'a mut Outside>,
    /// Owner of the rules: the name of the project.
    owner: &'a str,
    front_end: &'a FrontEnd,
    chosen: &'a Chosen,
    /// The TUN device of the NAT engine. `None` with a firewall.
    device: Option<egress::Device>,
    /// Source address checks at bridge ports. `None` if the host supports no mechanism for them.
    guards: Option<Arc<PortGuards>>,
    /// Directory of the project's runtime files.
    run: &'a Path,
}

impl Up {
    /// Runs the project until all services have ended or a signal arrives. Returns whether every
    /// service ended successfully or was stopped. `manager` is notified, and its socket is that of
    /// the API.
    ///
    /// # Errors
    /// The project could not be brought up or rolled back. The text has one line. After an error
    /// at startup, all changes have been rolled back, unless the log says `rollback incomplete`.
    pub(crate) fn run(&self, manager: ServiceManager) -> anyhow::Result<bool> {
        // Creating or joining a user namespace requires a single-threaded process (unshare(2)).
        let (host_context, keeper) = match &self.source {
            Source::Project { .. } => (HostContext::for_networks()?, None),
            Source::Daemon { .. } => {
                let directory = run_directory().context(NO_RUN_DIRECTORY)?.join("daemon");
                Keeper::namespaces(Path::new(PROGRAM), &directory)?
            }
        };
        // One thread starts all children: PR_SET_PDEATHSIG kills a child when the thread that
        // created it exits. DNS and the API run on another thread (`FrontEnd`).
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("event loop")?;
        let end = runtime.block_on(self.run_on(&host_context, manager));
        if let Some(keeper) = keeper {
            // After an error, the networks of a previous daemon still exist.
            let is_needed = end.as_ref().map_or(!keeper.is_new(), |end| end.networks_remain);
            if !is_needed {
                keeper.end();
            }
        }
        Ok(end?.success)
    }

    async fn run_on(
        &self,
        host_context: &HostContext,
        mut manager: ServiceManager,
    ) -> anyhow::Result<End> {
        let (started, begun) = (SystemTime::now(), Instant::now());
        let project = match &self.source {
            Source::Project { file, name } => {
                let mut project = tidegate_compose::load(file)?;
                if let Some(name) = name {
                    project.name.clone_from(name);
                }
                Some(project)
            }
            Source::Daemon { .. } => None,
        };
        let owner = project.as_ref().map_or(DAEMON, |project| &project.name).to_owned();
        // After reading the file: it can be a pipe without a writer, and Ctrl-C then still has to
        // end the process.
        let mut signals = Signals::new().context("signal handlers")?;
        for warning in project.iter().flat_map(|project| &project.warnings) {
            tracing::warn!("{warning}");
        }
        let run = run_directory().context(NO_RUN_DIRECTORY)?;
        let run = match &project {
            Some(project) => run.join("projects").join(&project.name),
            None => run.join("daemon"),
        };
        let front_end = FrontEnd::start().context("thread of DNS and the API")?;
        let up_already = |process: u32| {
            anyhow!(
                "project {owner:?} is up already (process {process}); stop that one, or choose another name"
            )
        };
        let socket = {
            let project = project.as_ref().map(|project| project.name.as_str());
            let _runtime = front_end.runtime().enter();
            match manager.take_socket() {
                Some(socket) => Socket::inherited(socket)?,
                None => {
                    Socket::open(socket::path(project)?).map_err(|error| match error {
                        // The path contains the name of the project.
                        SocketError::InUse { pid, .. }
                            if project.is_some() && !socket::is_given() =>
                        {
                            up_already(pid)
                        }
                        error => error.into(),
                    })?
                }
            }
        };
        let stored = match &self.source {
            Source::Project { .. } => None,
            Source::Daemon { state } => Some(Store::open(&state.join(STATE_FILE))?),
        };
        let journal = Journal::open(&run.join("network.journal")).map_err(|error| match error {
            JournalError::InUse { holder, .. } if stored.is_some() => {
                anyhow!("a daemon is running already (process {holder}); stop that one first")
            }
            JournalError::InUse { holder, .. } => up_already(holder),
            error => error.into(),
        })?;
        tidegate_services::sweep(&run).context("files of services that were killed")?;
        sweep_stale_owners();
        raise_descriptor_limit();
        let chosen = choose(self.firewall, self.publish, host_context, &owner)?;
        chosen.tell();
        if self.allow_host_loopback && chosen.firewall.is_some() {
            bail!(
                "--allow-host-loopback: requires the NAT engine, but the kernel forwards egress here; add --firewall=none"
            );
        }
        let device = match &chosen.firewall {
            Some(_) => None,
            None => egress::Device::open(
                host_context,
                &owner,
                project.as_ref().map_or_else(is_v6_available, has_v6),
            )
            .inspect_err(|error| {
                tracing::warn!(
                    "containers have no egress: {error}; run tidegate doctor for remedies"
                );
            })
            .ok(),
        };
        let mut setup =
            setup_with(host_context, journal, chosen.firewall.as_ref(), device.as_ref());
        let guards = port_guards::port_guards(&owner)
            .inspect_err(|error| {
                tracing::warn!(
                    "source addresses of containers are not checked and can be spoofed: {error}; {}; run tidegate \
                     doctor for the guarantees that do not hold",
                    error.remedy()
                );
            })
            .ok();
        if let Some(guards) = &guards {
            tracing::debug!(mechanism = %guards.mechanism(), "port guards");
            setup.kernel().use_guards(Arc::clone(guards));
        }
        let sources = match host_context.is_rootless() {
            // No other link leads to the networks of an ordinary user.
            true => None,
            false => port_guards::source_guard(&owner, host_context.networks()),
        };
        let guards_sources = sources.is_some();
        if let Some(sources) = sources {
            setup.kernel().use_source_guard(sources);
        }
        if stored.is_none() {
            let left = setup.clear().await?;
            if left > 0 {
                tracing::info!(steps = left, "rolled back a killed instance");
            }
        } else if let Some(firewall) = &chosen.firewall
            && setup.owns_rules_of(firewall.kind())
        {
            firewall.adopt();
        }
        let (state, mut store) = match stored {
            Some((store, state)) => (state, Some(store)),
            None => (State::default(), None),
        };

        let topics = [
            Topic::Links,
            Topic::Rules,
            Topic::Settings,
            Topic::Addresses,
            Topic::Routes,
            Topic::Fdb,
        ];
        let changes = ChangeListener::of(host_context.networks(), &topics)
            .context("listen for network changes")?;
        // SAFETY: the listener owns its descriptor and returns the same one until it is dropped.
        let changes = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) }
            .context("listen for network changes")?;
        let mut outside = host_context
            .is_rootless()
            .then(|| Outside::of(host_context).context("listen for network changes of the host"))
            .transpose()?;
        let mesh_reports = watch::Sender::new(None);
        let mesh_services = mesh::Registry::default();
        let resources = Resources {
            mesh_services: Arc::clone(&mesh_services),
            mesh_reports: mesh_reports.subscribe(),
            guards_sources,
            host_context,
            outside: outside.as_mut(),
            owner: &owner,
            front_end: &front_end,
            chosen: &chosen,
            device,
            guards,
            run: &run,
        };
        let source = match &project {
            Some(project) => InitialSource::Project(project),
            None => InitialSource::State(&state),
        };
        let (up, absent) = match self.start(resources, source, &mut setup, &mut signals).await {
            Ok(Some(up)) => up,
            failed_or_interrupted if store.is_some() => {
                // Networks of a daemon outlive it.
                let networks_remain = !state.networks().is_empty();
                return failed_or_interrupted.map(|_| End { success: true, networks_remain });
            }
            failed_or_interrupted => {
                // The first error is returned. The journal keeps what could not be rolled back for
                // the next start.
                match setup.finish().await {
                    Ok(()) => drop(fs::remove_dir_all(&run)),
                    Err(second) => tracing::warn!(error = %second, "rollback incomplete"),
                }
                return failed_or_interrupted
                    .map(|_| End { success: true, networks_remain: false });
            }
        };
        let (orders, received) = mpsc::channel(ORDER_QUEUE);
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let (compose_file, state_file) = match &self.source {
            Source::Project { file, .. } => (Some(absolute(file.clone())), None),
            Source::Daemon { state } => (None, Some(absolute(state.join(STATE_FILE)))),
        };
        let services = project.iter().flat_map(|project| &project.services);
        let state = watch::Sender::new(Arc::new(state));
        let projects = store.is_some().then(|| {
            let directory = run.join("projects");
            let projects = Projects::new(directory, orders.clone(), state.subscribe());
            let (orders, received) = mpsc::channel(ORDER_QUEUE);
            let supervised = projects.supervised();
            // It begins with orders, which are executed once the instance is complete.
            front_end.runtime().spawn(projects.serve(received));
            ProjectsView { state: state.subscribe(), supervised, orders }
        });
        let view = View {
            compose_file,
            state_file,
            started,
            begun,
            isolation: setup.isolation().name(),
            desired: up.shown.subscribe(),
            services: services.map(|service| service.name.clone()).collect(),
            observer: up.supervisor.observer(),
            publisher: Arc::clone(&up.publisher),
            names: up.names.resolver(),
            nat: up.egress.as_ref().map(|nat| nat.nat().figures().clone()),
            adopted: Arc::clone(&up.adopted),
            metrics: up.metrics.clone(),
            orders: orders.clone(),
            projects,
            ports_changed: watch::Sender::default(),
            project: project.as_ref().map_or("daemon", |project| &project.name).to_owned(),
        };
        let server = {
            let _runtime = front_end.runtime().enter();
            Server::start(socket, Arc::new(view))
        };
        let repairs = metrics::Repairs::new();
        let (host, rootless) = (host_context.networks().clone(), host_context.is_rootless());
        let mut instance = Instance {
            setup,
            chosen,
            host,
            rootless,
            up,
            project: owner,
            server,
            orders: received,
            own_orders: orders,
            changes,
            outside,
            watch: EndpointWatch::default(),
            schedule: RepairSchedule::new(),
            work: EndpointWork::new(),
            attaching: BTreeMap::new(),
            unhealthy: BTreeMap::new(),
            repairs,
            owner: Owner::new(state, store.take(), absent),
            member: mesh::Member::default(),
            services: mesh_services,
            mesh_reports,
        };
        instance.watch_endpoints();
        if project.is_none() {
            instance.start_mesh().await;
        }
        instance.up.log();
        manager.notify_ready();
        let announced = match &project {
            Some(_) => instance.up.announce(),
            None => instance.announce_daemon(),
        };
        if let Err(error) = announced {
            // The reader of standard output has closed it or does not read.
            tracing::debug!(%error, "standard output");
        }
        let success = instance.supervise(&mut signals, &manager).await;
        manager.notify("STOPPING=1\nSTATUS=Closing published ports");
        if project.is_none() {
            let networks_remain = !instance.owner.state().networks().is_empty();
            instance.leave().await;
            return Ok(End { success, networks_remain });
        }
        instance.take_down(&mut signals).await?;
        let _ = fs::remove_dir_all(&run);
        Ok(End { success, networks_remain: false })
    }

    /// Brings the project up. Returns `None` if a signal interrupted it. After an interruption or
    /// an error the caller rolls the networks back with `setup`.
    async fn start(
        &self,
        resources: Resources<'_>,
        source: InitialSource<'_>,
        setup: &mut Setup,
        signals: &mut Signals,
    ) -> anyhow::Result<Option<(Running, BTreeSet<Name>)>> {
        let Resources {
            guards_sources,
            mesh_reports,
            mesh_services,
            host_context,
            outside,
            owner,
            front_end,
            chosen,
            device,
            guards,
            run,
        } = resources;
        let mut observed = setup.surroundings().await?;
        // A killed daemon enabled forwarding on these links, which did not forward before.
        for fact in setup.owned() {
            if let Fact::Forwarding { link, v6 } = fact {
                observed.forwarding.remove(&(link.clone(), *v6));
            }
        }
        let foreign = foreign_networks(&observed);
        if let Some(outside) = outside {
            // The host's routes are in another namespace and do not conflict with the bridges. A
            // subnet that overlaps one of them would still hide it from the containers.
            outside.add_to(&mut observed).await?;
        }
        let initial = match source {
            InitialSource::Project(project) => Initial::of_project(project, &observed)?,
            InitialSource::State(state) => Initial::of_state(state, host_context, setup).await,
        };
        let Initial {
            mut layout,
            networks,
            endpoints,
            waiting,
            namespaces,
            adopted,
            ports,
            project,
        } = initial;
        layout.desired.guards = port_guards::attachment(guards.as_deref(), owner);
        layout.desired.guarded_links = guards_sources.then(|| observed.receivers.clone());
        layout.desired.rules_ahead = rules_ahead(&observed);
        let preceding_rule = preceding_rule(&observed, chosen.firewall.as_ref());
        if let Some(priority) = preceding_rule {
            warn_of_preceding_rule(priority);
        }
        if let Some(firewall) = &chosen.firewall {
            layout.desired.uplinks = uplinks(&observed, &layout.desired);
            if chosen.publish == PublishBy::Kernel {
                layout.desired.reply_paths = reply_paths(&observed, owner);
            }
            let _ = firewall
                .set_uplinks(&layout.desired.uplinks, foreign_bridges(&observed, &layout.desired));
            firewall.set_reply_paths(&layout.desired.reply_paths);
            firewall.prepare(zones(&layout.desired), openings(&layout, &ports, chosen.publish));
            firewall.set_link_local_members(link_local_members(&layout.desired));
        }
        let recorder = self.metrics.map(Recorder::install).transpose()?;
        let metrics = recorder.as_ref().map(Recorder::status);

        for (name, namespace) in &namespaces {
            setup.kernel().add_endpoint(name, namespace.clone());
        }
        let stop = setup.stop_handle();
        let kind = chosen.firewall.as_ref().map(|firewall| firewall.kind());
        let rulesets = setup.owned().iter().filter_map(|fact| match fact {
            Fact::Ruleset { firewall, .. } => Some(*firewall),
            _ => None,
        });
        // From none to a firewall, too: without its rules, packets would leave untranslated once
        // the policy rules are gone.
        let other_rules = !rulesets.collect::<BTreeSet<_>>().into_iter().eq(kind);
        let applied = {
            let applying = async {
                if project.is_some() {
                    setup.apply(&layout.desired).await
                } else if other_rules {
                    // They are removed last.
                    setup.change(&layout.desired).await
                } else {
                    // Networks of a daemon are in use: routes that were added since are no
                    // conflict.
                    setup.update(&layout.desired).await
                }
            };
            tokio::pin!(applying);
            tokio::select! {
                applied = &mut applying => applied,
                () = signals.next() => {
                    stop.stop();
                    // It may have been done already.
                    applying.await.and(Err(SetupError::Stopped))
                }
            }
        };
        match applied {
            Err(SetupError::Stopped) => return Ok(None),
            applied => applied?,
        };
        if let Some(firewall) = chosen.firewall.clone().filter(|_| project.is_none()) {
            end_flows_of_removed(firewall, &layout).await;
        }
        let start = |device: egress::Device| -> anyhow::Result<_> {
            let rate = NonZeroU32::new(self.nat_limits.unanswered).unwrap_or(NonZeroU32::MIN);
            let guards = guards.as_ref();
            let floods = guards
                .map(|guards| flood_control::start(&layout.desired, guards, host_context, rate));
            let floods = floods.transpose().context("start the flood control thread")?.flatten();
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
        if let Some(firewall) = &chosen.firewall {
            let limit = self.max_tracked_flows.map(NonZeroUsize::get);
            tracked_flows::start(firewall, host_context.networks(), limit)
                .context("start the thread that limits tracked flows")?;
        }

        let mut settings =
            Settings { ports_with_series: self.ports_with_series, ..Settings::default() };
        if egress.is_some() {
            settings.reserved_descriptors += egress::descriptors();
        }
        let services = namespaces.len().saturating_sub(adopted.len());
        settings.reserved_descriptors +=
            names::SHARED_DESCRIPTORS + MAX_CLIENTS + SERVICE_DESCRIPTORS * services;
        let bridges = bridge_indexes(&layout, host_context.networks())
            .context("read the indexes of the bridges")?;
        let gateway_networks = Arc::new(GatewayNetworks::new(layout.gateway_networks(&bridges)));
        gateway_networks.set_foreign_networks(foreign);
        let gateways = layout.desired.networks.iter().flat_map(|network| &network.subnets);
        let gateways = gateways.map(|subnet| subnet.gateway).collect();
        let publisher =
            Arc::new(Publisher::new(host_context.clone(), settings, self.limits, chosen, gateways));
        for (name, namespace) in &namespaces {
            let addresses = layout.addresses.get(name).map(Vec::as_slice).unwrap_or_default();
            let acl = GatewayAcl::new(Arc::clone(&gateway_networks), layout.networks_of(name));
            let endpoint = PublishTarget::new(namespace.clone(), addresses, acl);
            let endpoint = endpoint.translated_to(targets_of(&layout, name));
            let behind_engine = egress::addresses_behind_engine(&layout, name);
            // A start is not prevented: published ports fail first.
            if let Err(error) = publisher.reserve_for_endpoint(name, ENDPOINT_DESCRIPTORS) {
                tracing::error!("{error}");
            }
            publisher.add_endpoint(name, endpoint.behind_engine(behind_engine));
        }
        if let Some(egress) = &egress {
            publisher.use_nat_engine(Arc::clone(egress.nat()));
        }
        let shown = watch::Sender::new(Arc::new(layout.desired.clone()));
        // Set once the supervisor runs, which starts after the metrics endpoint.
        let observer: Arc<OnceLock<tidegate_services::Observer>> = Arc::default();
        let starting = async {
            let mut names = NameServers::new(
                host_context,
                front_end.runtime(),
                self.dns_ttl,
                self.dns_forward_rate,
            )?;
            names.resolver().set_bridges(bridges.into_values());
            for network in &layout.desired.networks {
                let dns = networks.get(&network.name).cloned().unwrap_or_default();
                let verified = layout.desired.verifies_sources(&network.name);
                names.add_network(network, &dns, verified)?;
            }
            for endpoint in &layout.desired.endpoints {
                let dns = endpoints.get(&endpoint.name).cloned().unwrap_or_default();
                names.add_endpoint(endpoint, &dns)?;
            }
            for endpoint in waiting.values() {
                let dns = endpoints.get(&endpoint.name).cloned().unwrap_or_default();
                names.add_waiting_endpoint(endpoint, &dns);
            }
            let mut resolvers = names.resolver().host_servers();
            if let Some(egress) = &mut egress {
                egress.set_resolvers(&resolvers.borrow_and_update());
            }
            names.serve_all(&namespaces, |name| adopted.contains_key(name))?;
            for ((service, protocol), listeners) in ports {
                publisher.adopt(&service, protocol, listeners)?;
            }
            if let Some(recorder) = recorder {
                let reported = Arc::clone(&publisher);
                let recorder = recorder.with(move |page| {
                    // Writing to text cannot fail.
                    let _ = describe_engine(&reported.snapshot(), &reported.usage(), page);
                });
                let (desired, reported) = (shown.subscribe(), Arc::clone(&publisher));
                let services = Arc::clone(&observer);
                let recorder = recorder.with(move |page| {
                    metrics::families(&snapshot(&desired), &reported, services.get(), page);
                });
                let firewall = chosen.firewall.clone();
                let recorder =
                    recorder.with(move |page| metrics::ruleset_families(firewall.as_deref(), page));
                let nat =
                    egress.as_ref().map(|nat| (owner.to_owned(), nat.nat().figures().clone()));
                let recorder = recorder.with(move |page| {
                    let engines: Vec<_> =
                        nat.iter().map(|(name, figures)| (name.as_str(), figures)).collect();
                    let _ = tidegate_nat::describe(&engines, page);
                });
                let host = host_context.networks().clone();
                let desired = shown.subscribe();
                let recorder = recorder.with(move |page| {
                    if let Some(guards) = &guards {
                        metrics::spoofed_families(&snapshot(&desired), guards, &host, page);
                    }
                });
                let recorder = recorder.with(move |page| {
                    metrics::mesh_families(mesh_reports.borrow().as_deref(), page);
                    metrics::service_families(&mesh_services, page);
                });
                let resolver = names.resolver();
                let recorder = recorder.with(move |page| {
                    // Writing to a string does not fail.
                    let _ = resolver.describe(page);
                });
                // The ACL of a port that belongs to no endpoint.
                let acl = GatewayAcl::new(Arc::clone(&gateway_networks), []);
                let acl = if host_context.is_rootless() { acl.for_other_namespace() } else { acl };
                recorder
                    .denying(move |ingress| acl.denies(ingress))
                    .serve()
                    .context("metrics endpoint")?;
            }
            let mut supervisor = Supervisor::new(run, StandardOutput, self.grace);
            let specs = project.map(|project| specs(project, &layout, &namespaces));
            let specs = specs.unwrap_or_default();
            let interrupted = {
                let starting = supervisor.start(specs);
                tokio::pin!(starting);
                tokio::select! {
                    started = &mut starting => started.map(|()| false)?,
                    () = signals.next() => true,
                }
            };
            // Cannot fail: this is the only call.
            let _ = observer.set(supervisor.observer());
            if interrupted {
                supervisor.kill();
                supervisor.wait().await;
            }
            anyhow::Ok((!interrupted).then_some((names, resolvers, supervisor)))
        };
        // The metrics recorder holds the publisher until the process ends, so it is closed here.
        let Some((names, resolvers, supervisor)) = starting.await.inspect_err(|_| {
            publisher.close(Duration::ZERO);
        })?
        else {
            publisher.close(Duration::ZERO);
            return Ok(None);
        };
        let running = Running {
            layout,
            shown,
            gateway_networks,
            preceding_rule,
            publisher,
            adopted: {
                let adopted = Adopted::new(adopted);
                adopted.set_gone(waiting.keys().map(ToString::to_string));
                Arc::new(adopted)
            },
            names,
            egress,
            resolvers,
            supervisor,
            metrics,
        };
        Ok(Some((running, waiting.into_keys().collect())))
    }
}

/// Ends tracked flows in the networks of a daemon that are not those of its endpoints.
async fn end_flows_of_removed(firewall: Arc<Firewall>, layout: &Layout) {
    let subnets = || layout.desired.networks.iter().flat_map(|network| &network.subnets);
    let gateways = subnets().map(|subnet| subnet.gateway);
    let kept = layout.addresses.values().flatten().copied().chain(gateways).collect();
    let subnets: Vec<_> = subnets().map(|subnet| subnet.subnet).collect();
    let ended = blocking(move || firewall.end_flows_except(&subnets, &kept)).await;
    if let Ok(Err(error)) = ended {
        tracing::warn!(%error, "tracked flows of removed endpoints not ended");
    }
}

/// Whether the kernel has IPv6.
fn is_v6_available() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether a network of `project` has egress over IPv6.
fn has_v6(project: &Project) -> bool {
    project.networks.values().any(|network| {
        let given = network.subnets.iter().any(|one| one.subnet.addr().is_ipv6());
        !network.internal && (network.enable_ipv6 || given)
    })
}

impl Instance {
    /// Stops the services and rolls everything back. A signal during this time kills services that
    /// have not ended yet.
    async fn take_down(self, signals: &mut Signals) -> anyhow::Result<()> {
        self.server.close();
        let Running { publisher, mut supervisor, names, egress, .. } = self.up;
        let interrupted = {
            let stop = supervisor.stop();
            tokio::pin!(stop);
            tokio::select! {
                () = &mut stop => false,
                () = signals.next() => true,
            }
        };
        if interrupted {
            supervisor.kill();
            supervisor.wait().await;
        }
        end_servers(self.work, names).await;
        let drained = publisher.close(DRAIN);
        // After the publisher, whose UDP ports can use the engine.
        drop(egress);
        if drained.cut > 0 {
            tracing::info!(connections = drained.cut, "connections cut");
        }
        Ok(self.setup.finish().await?)
    }
}

impl Instance {
    /// Ends a daemon. Its networks continue to exist, with their rules; the next daemon takes them
    /// over.
    async fn leave(self) {
        self.server.close();
        let Running { publisher, names, egress, layout, .. } = self.up;
        end_servers(self.work, names).await;
        publisher.close(DRAIN);
        // After the publisher, whose UDP ports can use the engine.
        drop(egress);
        let (networks, endpoints) = (layout.desired.networks.len(), layout.desired.endpoints.len());
        if networks > 0 {
            tracing::info!(
                networks,
                endpoints,
                "networks stay up without published ports and names; start tidegate daemon to manage or remove them"
            );
        }
        for project in self.owner.state().projects().values() {
            tracing::info!(
                project = %project.name,
                services = project.services.len(),
                "services continue to run; tidegate down {} stops them once a daemon runs again",
                project.name
            );
        }
    }
}

/// Creates the setup of the networks. Isolation is by `firewall` if there is one, otherwise by the
/// NAT engine on `device`, otherwise by policy rules without egress.
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
            let programs = BridgePrograms {
                gates: firewall.gate().is_some(),
                bridge_guards: has_bridge_guards(),
            };
            Setup::new(kernel, journal, FirewallIsolation { firewall: kind, owner, programs })
        }
    }
}

/// Returns the interface index of each bridge in `host`, by network name. A missing bridge has no
/// entry.
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
