//! The state of the running project, converted to the types of the API.

use super::problem::Problem;
use super::projects_view::{ProjectsView, Supervised};
use super::reserve::Reserved;
use super::service::{service_of, time};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tidegate_api::types::{
    Attachment, Driver, Endpoint, Figures, Fill, Mesh, MeshService, Metrics, NatFigures, Network,
    NetworkFigures, Port, PortFigures, Service, State, Status, Subnet, Transport, UpstreamFigures,
};
use tidegate_control::{Command, Membership, Name, NetworkSpec};
use tidegate_dns::Resolver;
use tidegate_mesh::record;
use tidegate_model::{Direction, Protocol};
use tidegate_nat as nat;
use tidegate_netsetup::{self as netsetup, Desired};
use tidegate_proxy::PortSnapshot;
use tidegate_publish::publisher::{OpenPort, Publisher};
use tidegate_services::Observer;
use tidegate_telemetry::metrics_endpoint::MetricsStatus;
use tidegate_telemetry::version::{COMMIT, VERSION};
use tokio::sync::{mpsc, oneshot, watch};

/// A running project.
pub(crate) struct View {
    /// The name of the project.
    pub(crate) project: String,
    /// The path of its Compose file.
    pub(crate) compose_file: Option<PathBuf>,
    /// The path of the state file of a daemon.
    pub(crate) state_file: Option<PathBuf>,
    /// The start time by the wall clock.
    pub(crate) started: SystemTime,
    /// The start time by a monotonic clock.
    pub(crate) begun: Instant,
    /// The isolation of its networks.
    pub(crate) isolation: &'static str,
    /// Its networks and endpoints.
    pub(crate) desired: watch::Receiver<Arc<Desired>>,
    /// The names of its services, in the order of the file.
    pub(crate) services: Vec<String>,
    /// The states of its services.
    pub(crate) observer: Observer,
    /// The namespaces of its endpoints and their published ports.
    pub(crate) publisher: Arc<Publisher>,
    /// Its DNS resolver.
    pub(crate) names: Arc<Resolver>,
    /// The NAT engine, if there is no firewall.
    pub(crate) nat: Option<nat::Figures>,
    /// The paths of adopted namespaces.
    pub(crate) adopted: Arc<Adopted>,
    /// The metrics endpoint, if enabled.
    pub(crate) metrics: Option<MetricsStatus>,
    /// The channel to the task that changes networks.
    pub(crate) orders: mpsc::Sender<Order>,
    /// The projects of a daemon; `None` for a project in the foreground.
    pub(crate) projects: Option<ProjectsView>,
    /// Notified when this API publishes or closes a port of a project in the foreground. All other
    /// changes of ports follow one of `desired`.
    pub(crate) ports_changed: watch::Sender<()>,
}

/// Waits for changes of what a [`View`] shows.
pub(super) struct Changes {
    desired: watch::Receiver<Arc<Desired>>,
    observer: Observer,
    supervised: Option<watch::Receiver<Arc<BTreeMap<Name, Supervised>>>>,
    ports: watch::Receiver<()>,
    adopted: watch::Receiver<()>,
}

/// Time in which changes are combined.
const COMBINE: Duration = Duration::from_millis(20);

impl Changes {
    /// Waits for the next change. `None` if the instance ends.
    pub(super) async fn next(&mut self) -> Option<()> {
        let supervised = async {
            match &mut self.supervised {
                Some(supervised) => supervised.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = self.desired.changed() => changed.ok()?,
            changed = supervised => changed.ok()?,
            changed = self.ports.changed() => changed.ok()?,
            changed = self.adopted.changed() => changed.ok()?,
            () = self.observer.changed() => {}
        }
        tokio::time::sleep(COMBINE).await;
        Some(())
    }
}

/// The paths of adopted namespaces by endpoint, and whether each of them is gone.
#[derive(Debug, Default)]
pub(crate) struct Adopted {
    paths: Mutex<BTreeMap<String, (PathBuf, bool)>>,
    changed: watch::Sender<()>,
}

/// A change to the networks.
#[derive(Debug)]
pub(crate) enum Order {
    /// The container of an adopted endpoint is in another namespace.
    Reattach {
        endpoint: String,
        /// The path of its new namespace.
        netns: PathBuf,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// A command to the owner of the state.
    Command {
        command: Command,
        /// The sockets of the ports that it publishes.
        reserved: Reserved,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Detach a task of a service, which has no connections any more, or whose drain time is over.
    Drained {
        endpoint: Name,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Create an overlay network.
    CreateOverlay {
        spec: NetworkSpec,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Join a cluster.
    Join {
        membership: Membership,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Leave the cluster.
    Leave {
        /// Detach endpoints on overlay networks, and leave even if etcd does not answer.
        force: bool,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Create a service of the cluster.
    CreateService {
        name: String,
        service: record::Service,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Remove a service of the cluster.
    RemoveService {
        name: String,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Set the maximum number of tasks of a service with connections.
    ScaleService {
        name: String,
        replicas: Option<u32>,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Report the services of the cluster.
    Services {
        /// Receives the report.
        done: oneshot::Sender<Result<Vec<MeshService>, Problem>>,
    },
    /// Remove another host from the cluster.
    RemoveHost {
        host: String,
        /// Receives the result.
        done: oneshot::Sender<Result<(), Problem>>,
    },
    /// Report the cluster.
    MeshReport {
        /// Receives the report.
        done: oneshot::Sender<Result<Mesh, Problem>>,
    },
}

impl Adopted {
    /// All `paths` lead to existing namespaces.
    pub(crate) fn new(paths: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let paths = paths.into_iter().map(|(name, path)| (name, (path, false))).collect();
        Self { paths: Mutex::new(paths), ..Self::default() }
    }

    /// All paths.
    pub(crate) fn paths(&self) -> BTreeMap<String, PathBuf> {
        self.all().iter().map(|(name, (path, _))| (name.clone(), path.clone())).collect()
    }

    /// Returns the path of `endpoint`, and whether its namespace is gone.
    pub(crate) fn get(&self, endpoint: &str) -> Option<(PathBuf, bool)> {
        self.all().get(endpoint).cloned()
    }

    /// Records that the namespaces of `endpoints` are gone.
    pub(crate) fn set_gone(&self, endpoints: impl Iterator<Item = String>) {
        let mut all = self.all();
        for name in endpoints {
            all.entry(name).and_modify(|(_, gone)| *gone = true);
        }
        self.changed.send_replace(());
    }

    /// Forgets `endpoint`.
    pub(crate) fn remove(&self, endpoint: &str) {
        self.all().remove(endpoint);
        self.changed.send_replace(());
    }

    /// Records the path of the namespace of `endpoint`, and whether the namespace is gone.
    pub(crate) fn set(&self, endpoint: &str, path: PathBuf, gone: bool) {
        let new = (path, gone);
        let old = self.all().insert(endpoint.to_owned(), new.clone());
        // It is set again with each poll.
        if old != Some(new) {
            self.changed.send_replace(());
        }
    }

    fn all(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (PathBuf, bool)>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The current value of `desired`.
pub(crate) fn snapshot(desired: &watch::Receiver<Arc<Desired>>) -> Arc<Desired> {
    Arc::clone(&desired.borrow())
}

impl View {
    /// Subscribes to changes.
    pub(super) fn changes(&self) -> Changes {
        Changes {
            desired: self.desired.clone(),
            observer: self.observer.clone(),
            supervised: self.projects.as_ref().map(|projects| projects.supervised.clone()),
            ports: self.ports_changed.subscribe(),
            adopted: self.adopted.changed.subscribe(),
        }
    }

    pub(super) fn status(&self) -> Status {
        let statuses = self.observer.statuses();
        let service = |name: &String| match statuses.iter().find(|status| status.name == *name) {
            Some(status) => service_of(status),
            None => self.projects.as_ref().and_then(|all| all.service(name)).unwrap_or_else(|| {
                let gone = self.adopted.get(name).is_some_and(|(_, gone)| gone);
                let state = if gone { State::Gone } else { State::Adopted };
                Service {
                    name: name.clone(),
                    state,
                    pid: None,
                    restarts: 0,
                    exit: None,
                    since: None,
                }
            }),
        };
        Status {
            version: VERSION.to_owned(),
            commit: COMMIT.to_owned(),
            project: self.project.clone(),
            compose_file: self.compose_file.as_ref().map(|path| path.display().to_string()),
            state_file: self.state_file.as_ref().map(|path| path.display().to_string()),
            pid: std::process::id(),
            started: time(self.started),
            isolation: self.isolation.to_owned(),
            metrics: self.metrics.as_ref().map(|metrics| Metrics {
                address: metrics.wanted().to_string(),
                served: metrics.served().map(|address| address.to_string()),
            }),
            services: self.service_names().iter().map(service).collect(),
        }
    }

    /// The services of a project, or the endpoints of a daemon.
    fn service_names(&self) -> Vec<String> {
        if self.state_file.is_none() {
            return self.services.clone();
        }
        self.adopted.paths().into_keys().collect()
    }

    pub(super) fn networks(&self) -> Vec<Network> {
        let desired = snapshot(&self.desired);
        desired.networks.iter().map(|network| network_of(&desired, network)).collect()
    }

    pub(super) fn endpoints(&self) -> Vec<Endpoint> {
        let desired = snapshot(&self.desired);
        let mut ports: BTreeMap<String, Vec<Port>> = BTreeMap::new();
        for port in self.publisher.ports() {
            ports.entry(port.endpoint.clone()).or_default().push(port_of(&port));
        }
        let endpoint = |endpoint: &netsetup::Endpoint| Endpoint {
            name: endpoint.name.clone(),
            namespace: self
                .publisher
                .namespace(&endpoint.name)
                .map_or_else(String::new, |it| it.id().to_string()),
            netns: self.adopted.get(&endpoint.name).map(|(path, _)| path.display().to_string()),
            attachments: attachments(&desired, endpoint),
            ports: ports.remove(&endpoint.name).unwrap_or_default(),
        };
        // A sandbox is part of the network, not of what the user has attached.
        let is_sandbox = |name: &str| name.parse().is_ok_and(|name: Name| name.is_sandbox());
        let attached = desired.endpoints.iter().filter(|one| !is_sandbox(&one.name));
        let mut all: Vec<Endpoint> = attached.map(endpoint).collect();
        if self.state_file.is_some() {
            let known: BTreeSet<String> = all.iter().map(|one| one.name.clone()).collect();
            let absent = self.adopted.paths().into_iter().filter(|(name, _)| !known.contains(name));
            all.extend(absent.map(|(name, path)| Endpoint {
                name,
                namespace: String::new(),
                netns: Some(path.display().to_string()),
                attachments: Vec::new(),
                ports: Vec::new(),
            }));
        }
        all
    }

    pub(super) fn figures(&self) -> Figures {
        let usage = self.publisher.usage();
        let figures = self.publisher.figures();
        Figures {
            project: self.project.clone(),
            pid: std::process::id(),
            started: time(self.started),
            elapsed_ms: self.begun.elapsed().as_millis() as u64,
            ports: figures.iter().map(|(port, figures)| port_figures(port, figures)).collect(),
            connections: Fill { used: usage.connections, limit: usage.connections_limit },
            descriptors: Fill { used: usage.descriptors, limit: usage.descriptors_limit },
            networks: self.network_figures(),
            nat: self.nat.as_ref().map(nat_figures),
            upstreams: self.names.upstreams().iter().map(upstream_figures).collect(),
        }
    }

    fn network_figures(&self) -> Vec<NetworkFigures> {
        let desired = snapshot(&self.desired);
        let asked: BTreeMap<_, _> = self.names.questions().into_iter().collect();
        let figures = |network: &netsetup::Network| {
            let questions = asked.get(&network.name).copied().unwrap_or_default();
            NetworkFigures {
                name: network.name.clone(),
                endpoints: endpoints_on(&desired, &network.name),
                questions: questions.answered,
                questions_failed: questions.failed,
                questions_unknown: questions.unknown,
            }
        };
        desired.networks.iter().map(figures).collect()
    }

    pub(super) fn ports(&self) -> Vec<Port> {
        self.publisher.ports().iter().map(port_of).collect()
    }
}

fn network_of(desired: &Desired, network: &netsetup::Network) -> Network {
    let subnet = |one: &netsetup::Subnet| Subnet { subnet: one.subnet, gateway: one.gateway };
    Network {
        name: network.name.clone(),
        bridge: network.bridge.name.clone(),
        driver: if network.overlay.is_some() { Driver::Overlay } else { Driver::Bridge },
        subnets: network.subnets.iter().map(subnet).collect(),
        internal: network.is_closed(),
        inter_container: network.inter_container,
        mtu: network.mtu,
        endpoints: endpoints_on(desired, &network.name),
    }
}

/// Returns the names of the endpoints on `network`.
fn endpoints_on(desired: &Desired, network: &str) -> Vec<String> {
    let on_it = |endpoint: &&netsetup::Endpoint| {
        endpoint.attachments.iter().any(|attachment| attachment.network == network)
    };
    desired.endpoints.iter().filter(on_it).map(|endpoint| endpoint.name.clone()).collect()
}

fn attachments(desired: &Desired, endpoint: &netsetup::Endpoint) -> Vec<Attachment> {
    let internal: BTreeSet<&str> = desired
        .networks
        .iter()
        .filter(|network| network.internal)
        .map(|network| network.name.as_str())
        .collect();
    let attachment = |one: &netsetup::Attachment| Attachment {
        network: one.network.clone(),
        interface: one.inside.name.clone(),
        mac: one.inside.mac.to_string(),
        addresses: one.addresses.clone(),
        default_route: one.default_route && !internal.contains(one.network.as_str()),
    };
    endpoint.attachments.iter().map(attachment).collect()
}

pub(super) fn port_of(port: &OpenPort) -> Port {
    let address = port.label.address();
    Port {
        id: port.id.0,
        endpoint: port.endpoint.clone(),
        publish: port.label.to_string(),
        host_ip: address.ip(),
        host_port: address.port(),
        protocol: match port.label.protocol() {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        },
        container_port: port.container_port,
    }
}

fn port_figures(port: &OpenPort, figures: &PortSnapshot) -> PortFigures {
    PortFigures {
        id: port.id.0,
        endpoint: port.endpoint.clone(),
        publish: port.label.to_string(),
        container_port: port.container_port,
        open: Fill { used: figures.live, limit: figures.limit },
        begun: figures.accepted,
        refused: figures.refused.iter().sum(),
        cut: figures.cut,
        bytes_in: figures.bytes[Direction::In],
        bytes_out: figures.bytes[Direction::Out],
        datagrams_in: figures.datagrams[Direction::In],
        datagrams_out: figures.datagrams[Direction::Out],
        dropped: figures.dropped.iter().sum(),
        dialled: figures.dial.count(),
        dial_us: microseconds(figures.dial.total()),
    }
}

fn nat_figures(figures: &nat::Figures) -> NatFigures {
    let sum = |counts: &[nat::Count]| counts.iter().map(nat::Count::get).sum();
    let stats = &figures.stats;
    NatFigures {
        flows: Fill { used: sum(&stats.flows), limit: figures.flows_limit },
        flows_tcp: stats.flows(nat::FlowKind::Tcp),
        begun: sum(&stats.flows_begun),
        bytes_in: stats.bytes[Direction::In].get(),
        bytes_out: stats.bytes[Direction::Out].get(),
        packets_in: stats.packets[Direction::In].get(),
        packets_out: stats.packets[Direction::Out].get(),
        dropped: sum(&stats.dropped),
        resets: stats.resets.get(),
        retransmissions: stats.retransmissions.get(),
    }
}

fn upstream_figures(upstream: &tidegate_dns::Upstream) -> UpstreamFigures {
    UpstreamFigures {
        server: upstream.server.to_string(),
        trusted: upstream.trusted,
        asked: upstream.asked,
        silent: upstream.silent,
        failed: upstream.failed,
        answered: upstream.answered,
        took_us: microseconds(upstream.took),
    }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
