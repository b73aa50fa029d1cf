//! The agent of a host: keeps its records in the cluster state, follows the records of the others,
//! and programs the overlay networks of this host.
//!
//! ```text
//!            ┌── follow: list, watch, list again ───────────┐
//!   store ◄──┼── keep: the lease of this host               ├──► agent ──► kernel, names, snapshots
//!            └── register: the records of this host ◄───────┘      ▲
//!                                              heartbeats ◄────────┘ requests
//! ```
//!
//! The calls to the store run as tasks, so that a store that does not answer stops nothing else.
//! Everything is level-triggered: the agent compares what it should have with what the view shows,
//! whatever has happened in between.

use crate::device::LinkChanges;
use crate::key::PREFIX;
use crate::liveness::{self, Hearing, INTERVAL, Liveness, Retention};
use crate::membership::{self, Own, Refusal, registration};
use crate::programmer::{LocalNetwork, NetworkFigures, Programmer};
use crate::record::{Binding, Endpoint, EndpointKey, Network, Node, Service};
use crate::services;
use crate::store::{
    Changes, ClusterStore, Connect, Entry, LeaseId, Revision, StoreError, Transaction,
};
use crate::view::View;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tidegate_netns::Namespace;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

/// Time after which the records of a silent host end.
const LEASE: Duration = Duration::from_secs(5);

/// Interval at which the lease is kept alive.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Pause after a failed call.
const RETRY: Duration = Duration::from_millis(300);

/// Time for a change of the cluster state. A healthy store needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);

/// Interval of checks of the kernel.
const CHECK: Duration = Duration::from_secs(2);

/// Capacity of the queue of requests.
const QUEUE: usize = 64;

/// Target of events that begin or end a state, and are all logged.
const STATE: &str = "tidegate_mesh::state";

/// Receives the endpoints of other hosts.
pub trait Names: Send {
    /// Sets the endpoints of other hosts on `network`, by name.
    fn set(&mut self, network: &str, endpoints: &BTreeMap<String, Endpoint>);
}

/// What the agent needs.
pub struct Options {
    /// This host, with its endpoints on overlay networks.
    pub own: Own,
    /// The cluster state.
    pub store: Arc<dyn Connect>,
    /// The namespace of the bridges, and of the underlay.
    pub namespace: Namespace,
    /// The overlay networks that exist on this host.
    pub networks: Vec<LocalNetwork>,
    /// Receives the names of other hosts.
    pub names: Box<dyn Names>,
    /// Is called with each new state of the cluster, on the thread of the agent.
    pub follower: Box<dyn Fn(&Cluster) + Send>,
    /// Receives reports, every few seconds.
    pub reports: watch::Sender<Option<Arc<Status>>>,
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("own", &self.own.id).field("store", &self.store).finish()
    }
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    /// The request contradicts the cluster state.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store does not answer, or rejects the credentials. Nothing has changed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The change was not seen in time. It is withdrawn when the store answers.
    #[error("cluster store: no answer within {} s; nothing was changed", PATIENCE.as_secs())]
    Late,
    /// The host is alive.
    #[error("host {0} is alive; run tidegate mesh leave on that host")]
    Alive(String),
    /// There is no such host.
    #[error("there is no host {0} in the cluster")]
    UnknownHost(String),
    /// The agent has ended.
    #[error("the agent of the mesh has ended")]
    Ended,
}

type Done<T> = oneshot::Sender<Result<T, MeshError>>;

enum Request {
    Networks { networks: Vec<LocalNetwork>, done: Done<()> },
    Endpoints(BTreeMap<EndpointKey, Endpoint>),
    Claim { key: EndpointKey, endpoint: Endpoint, done: Done<()> },
    Release { key: EndpointKey, done: Done<()> },
    Create { name: String, network: Network, done: Done<()> },
    Delete { name: String, done: Done<()> },
    CreateService { name: String, service: Service, done: Done<()> },
    RemoveService { name: String, done: Done<()> },
    Scale { name: String, replicas: Option<u32>, done: Done<()> },
    Bindings(BTreeMap<String, Binding>),
    Noticed { done: Done<()> },
    Leave { done: Done<()> },
    RemoveHost { id: String, done: Done<()> },
    Status { done: oneshot::Sender<Status> },
}

/// Whether the store answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreState {
    /// It answers.
    Connected,
    /// It has not answered since the agent started.
    Connecting,
    /// It does not answer.
    Lost(StoreError),
}

/// The cluster as the agent knows it.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Records, and those that are kept of hosts that are heard. Empty until the store has
    /// answered.
    pub view: Arc<View>,
    /// Whether the store has answered since the agent started.
    pub is_known: bool,
    /// The store.
    pub store: StoreState,
    /// The record of this host is in the cluster state.
    pub has_joined: bool,
    /// Why this host cannot be in the cluster.
    pub refused: Option<Refusal>,
    /// The hosts that are heard.
    pub heard: BTreeSet<String>,
    /// ID of this host.
    pub own: String,
}

impl Cluster {
    /// Returns whether packets to `host` arrive: it is heard, or this host.
    #[must_use]
    pub fn hears(&self, host: &str) -> bool {
        host == self.own || self.heard.contains(host)
    }
}

/// A host, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostStatus {
    /// Its ID.
    pub id: String,
    /// Its VTEP, if it has a record.
    pub vtep: Option<IpAddr>,
    /// Whether it is this host.
    pub is_own: bool,
    /// Since when it is not heard; `None` if it is, or if that is unknown.
    pub silent_since: Option<SystemTime>,
    /// Whether it is heard, or this host.
    pub is_heard: bool,
    /// Its lease is valid.
    pub has_record: bool,
    /// Mean round-trip time.
    pub latency: Option<Duration>,
    /// Number of its endpoints on overlay networks.
    pub endpoints: usize,
}

/// A report.
#[derive(Clone, Debug)]
pub struct Status {
    /// ID of this host.
    pub id: String,
    /// The store, and since when it has been in this state.
    pub store: StoreState,
    /// Since when the store has been in this state.
    pub store_since: SystemTime,
    /// Revision of the view.
    pub revision: Revision,
    /// All hosts.
    pub hosts: Vec<HostStatus>,
    /// Number of networks of the cluster.
    pub networks: usize,
    /// What is wrong, and since when.
    pub problems: Vec<(String, SystemTime)>,
    /// Figures of the networks on this host.
    pub figures: BTreeMap<String, NetworkFigures>,
    /// Objects that other software had removed or changed.
    pub repairs: u64,
}

/// A running agent. It ends when it is dropped; devices and records then stay, and the records end
/// with the lease.
#[derive(Debug)]
pub struct Agent {
    requests: mpsc::Sender<Request>,
    cluster: watch::Receiver<Arc<Cluster>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    /// Starts an agent on a thread of its own.
    ///
    /// # Errors
    /// The kernel lacks what the guards need, the port of heartbeats is in use, or the thread
    /// cannot be created.
    pub fn start(options: Options) -> std::io::Result<Self> {
        let (requests, received) = mpsc::channel(QUEUE);
        let (publish, cluster) = watch::channel(Arc::new(Cluster {
            view: Arc::default(),
            is_known: false,
            store: StoreState::Connecting,
            has_joined: false,
            refused: None,
            heard: BTreeSet::new(),
            own: options.own.id.clone(),
        }));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let running = {
            let _runtime = runtime.enter();
            Running::new(options, received, publish)?
        };
        let run = move || {
            runtime.block_on(running.run());
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("tidegate-mesh".into()).spawn(run)?;
        Ok(Self { requests, cluster, thread: Some(thread) })
    }

    /// Returns the cluster, and its changes.
    #[must_use]
    pub fn cluster(&self) -> watch::Receiver<Arc<Cluster>> {
        self.cluster.clone()
    }

    /// Waits until this host is in the cluster.
    ///
    /// # Errors
    /// The host is refused, or the store does not answer within `time`.
    pub async fn joined(&self, time: Duration) -> Result<(), MeshError> {
        let mut cluster = self.cluster.clone();
        let is_decided = |cluster: &Arc<Cluster>| {
            let is_final = matches!(
                cluster.store,
                StoreState::Lost(StoreError::Denied(_) | StoreError::Invalid(_))
            );
            cluster.has_joined || cluster.refused.is_some() || is_final
        };
        let decided = timeout(time, cluster.wait_for(is_decided)).await;
        let cluster = match decided {
            Ok(cluster) => cluster.map_err(|_| MeshError::Ended)?.clone(),
            Err(_) => self.cluster.borrow().clone(),
        };
        match (&cluster.refused, &cluster.store) {
            _ if cluster.has_joined => Ok(()),
            (Some(refusal), _) => Err(refusal.clone().into()),
            (None, StoreState::Lost(error)) => Err(error.clone().into()),
            _ => Err(MeshError::Late),
        }
    }

    /// Sets the overlay networks that exist on this host, and programs them. Those that are no
    /// longer among them have no names and no device when this returns.
    pub async fn set_networks(&self, networks: Vec<LocalNetwork>) {
        let _ = self.request(|done| Request::Networks { networks, done }).await;
    }

    /// Sets the endpoints of this host, by network and name.
    pub async fn set_endpoints(&self, endpoints: BTreeMap<EndpointKey, Endpoint>) {
        let _ = self.requests.send(Request::Endpoints(endpoints)).await;
    }

    /// Records `endpoint` with the claims of its addresses.
    ///
    /// # Errors
    /// The name or an address is in use, or the store does not answer.
    pub async fn claim(
        &self,
        network: &str,
        name: &str,
        endpoint: Endpoint,
    ) -> Result<(), MeshError> {
        let key = (network.to_owned(), name.to_owned());
        self.request(|done| Request::Claim { key, endpoint, done }).await
    }

    /// Removes the record of an endpoint, and releases its addresses.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn release(&self, network: &str, name: &str) -> Result<(), MeshError> {
        let key = (network.to_owned(), name.to_owned());
        self.request(|done| Request::Release { key, done }).await
    }

    /// Creates a network.
    ///
    /// # Errors
    /// It exists, a subnet is in use, or the store does not answer.
    pub async fn create(&self, name: &str, network: Network) -> Result<(), MeshError> {
        let name = name.to_owned();
        self.request(|done| Request::Create { name, network, done }).await
    }

    /// Removes a network without endpoints.
    ///
    /// # Errors
    /// It does not exist, has endpoints, or the store does not answer.
    pub async fn delete(&self, name: &str) -> Result<(), MeshError> {
        let name = name.to_owned();
        self.request(|done| Request::Delete { name, done }).await
    }

    /// Creates a service.
    ///
    /// # Errors
    /// It is refused, or the store does not answer.
    pub async fn create_service(&self, name: &str, service: Service) -> Result<(), MeshError> {
        let name = name.to_owned();
        self.request(|done| Request::CreateService { name, service, done }).await
    }

    /// Removes a service. Its tasks stay attached.
    ///
    /// # Errors
    /// It does not exist, or the store does not answer.
    pub async fn remove_service(&self, name: &str) -> Result<(), MeshError> {
        let name = name.to_owned();
        self.request(|done| Request::RemoveService { name, done }).await
    }

    /// Sets the maximum number of tasks of a service with connections; `None` for all.
    ///
    /// # Errors
    /// It does not exist, or the store does not answer.
    pub async fn scale(&self, name: &str, replicas: Option<u32>) -> Result<(), MeshError> {
        let name = name.to_owned();
        self.request(|done| Request::Scale { name, replicas, done }).await
    }

    /// Waits until all hosts that are heard have put the view of this host into effect.
    ///
    /// # Errors
    /// One of them takes too long.
    pub async fn noticed(&self) -> Result<(), MeshError> {
        self.request(|done| Request::Noticed { done }).await
    }

    /// Sets what this host has made of services, by their names.
    pub async fn set_bindings(&self, bindings: BTreeMap<String, Binding>) {
        let _ = self.requests.send(Request::Bindings(bindings)).await;
    }

    /// Removes this host from the cluster, with its devices and guards.
    ///
    /// # Errors
    /// The store does not answer. The host is still a member then.
    pub async fn leave(&self) -> Result<(), MeshError> {
        self.request(|done| Request::Leave { done }).await
    }

    /// Removes another host that no longer exists.
    ///
    /// # Errors
    /// It is alive or unknown, or the store does not answer.
    pub async fn remove_host(&self, id: &str) -> Result<(), MeshError> {
        let id = id.to_owned();
        self.request(|done| Request::RemoveHost { id, done }).await
    }

    /// Reports hosts and problems.
    pub async fn status(&self) -> Option<Status> {
        let (done, is_done) = oneshot::channel();
        self.requests.send(Request::Status { done }).await.ok()?;
        is_done.await.ok()
    }

    async fn request<T>(&self, request: impl FnOnce(Done<T>) -> Request) -> Result<T, MeshError> {
        let (done, is_done) = oneshot::channel();
        self.requests.send(request(done)).await.map_err(|_| MeshError::Ended)?;
        is_done.await.map_err(|_| MeshError::Ended)?
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The agent ends when the last sender of requests is gone.
        let (closed, _) = mpsc::channel(1);
        self.requests = closed;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the tasks report.
enum Event {
    Connected(Arc<dyn ClusterStore>),
    Listed(Vec<Entry>, Revision),
    Changed(Changes),
    Lost(StoreError),
    Lease(Option<LeaseId>),
    /// The result of a registration under a lease.
    Registered(LeaseId, Result<Option<Revision>, StoreError>),
    Left(Result<(), MeshError>, Done<()>),
    /// A listing that was requested because the view may be behind.
    Refreshed(Result<(Vec<Entry>, Revision), StoreError>),
}

/// A claim or a release that waits for the view to show it.
struct Waiting {
    key: EndpointKey,
    /// The claimed endpoint; `None` for a release.
    endpoint: Option<Endpoint>,
    /// The number of the refresh after which the view is not older than the request.
    refresh: u64,
    deadline: Instant,
    done: Done<()>,
}

struct Running {
    own: Own,
    connect: Arc<dyn Connect>,
    store: Option<Arc<dyn ClusterStore>>,
    requests: mpsc::Receiver<Request>,
    publish: watch::Sender<Arc<Cluster>>,
    reports: watch::Sender<Option<Arc<Status>>>,
    events: mpsc::UnboundedSender<Event>,
    received: mpsc::UnboundedReceiver<Event>,
    tasks: Vec<AbortHandle>,
    /// The records of the store. `None` until it has answered.
    view: Option<View>,
    /// `view` with retained records.
    effective: Arc<View>,
    retention: Retention,
    liveness: Liveness,
    /// Hosts that were heard at the last check.
    heard: BTreeSet<String>,
    /// When each host was heard last.
    last_heard: BTreeMap<String, Instant>,
    socket: UdpSocket,
    lease: Option<LeaseId>,
    /// A registration is under way.
    registers: bool,
    /// The view has to reach this revision before the next registration.
    awaited: Revision,
    refused: Option<Refusal>,
    refused_endpoints: BTreeMap<EndpointKey, Refusal>,
    waiting: Vec<Waiting>,
    /// Revisions that other hosts have to notice, each with a deadline.
    unnoticed: Vec<(Revision, Instant, Done<()>)>,
    /// Number of refreshes of the view that were started, and that are done.
    refreshes: (u64, u64),
    store_state: StoreState,
    store_since: SystemTime,
    problems: BTreeMap<String, SystemTime>,
    networks: Vec<LocalNetwork>,
    programmer: Programmer,
    names: Box<dyn Names>,
    follower: Box<dyn Fn(&Cluster) + Send>,
    /// The endpoints of other hosts that `names` has, by network.
    named: BTreeMap<String, BTreeMap<String, Endpoint>>,
    is_swept: bool,
    /// The host leaves the cluster, and is not registered.
    leaves: bool,
    left: Option<(Result<(), MeshError>, Done<()>)>,
}

impl Running {
    fn new(
        options: Options,
        requests: mpsc::Receiver<Request>,
        publish: watch::Sender<Arc<Cluster>>,
    ) -> std::io::Result<Self> {
        let Options { own, store, namespace, networks, names, follower, reports } = options;
        let at = SocketAddr::new(own.node.vtep, liveness::PORT);
        let socket = namespace.with(|| std::net::UdpSocket::bind(at))?.map_err(|error| {
            std::io::Error::new(error.kind(), format!("UDP port of heartbeats, {at}: {error}"))
        })?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        let programmer = Programmer::open(&namespace, own.node.vtep)?;
        let (events, received) = mpsc::unbounded_channel();
        Ok(Self {
            own,
            connect: store,
            store: None,
            requests,
            publish,
            reports,
            events,
            received,
            tasks: Vec::new(),
            view: None,
            effective: Arc::default(),
            retention: Retention::default(),
            liveness: Liveness::new(Instant::now()),
            heard: BTreeSet::new(),
            last_heard: BTreeMap::new(),
            socket,
            lease: None,
            registers: false,
            awaited: Revision::default(),
            refused: None,
            refused_endpoints: BTreeMap::new(),
            waiting: Vec::new(),
            unnoticed: Vec::new(),
            refreshes: (0, 0),
            store_state: StoreState::Connecting,
            store_since: SystemTime::now(),
            problems: BTreeMap::new(),
            networks,
            programmer,
            names,
            follower,
            named: BTreeMap::new(),
            is_swept: false,
            leaves: false,
            left: None,
        })
    }

    async fn run(mut self) {
        let follow = follow(Arc::clone(&self.connect), self.events.clone());
        self.tasks.push(tokio::spawn(follow).abort_handle());
        let mut beats = interval(INTERVAL);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut checks = interval(CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut links = match self.programmer.link_changes() {
            Ok(links) => links,
            Err(error) => {
                tracing::warn!(%error, "new links of the host are guarded after {} s", CHECK.as_secs());
                None
            }
        };
        let mut buffer = [0; 64];
        loop {
            tokio::select! {
                request = self.requests.recv() => {
                    let Some(request) = request else { break };
                    self.handle(request).await;
                }
                Some(event) = self.received.recv() => {
                    let mut changed = self.note(event);
                    // One pass over the kernel for all that has arrived.
                    while let Ok(event) = self.received.try_recv() {
                        changed |= self.note(event);
                    }
                    if changed {
                        self.changed().await;
                    }
                    if let Some((left, done)) = self.left.take()
                        && self.end(left, done).await
                    {
                        break;
                    }
                    self.register();
                }
                Ok((length, from)) = self.socket.recv_from(&mut buffer) => {
                    self.liveness.receive(&buffer[..length], from.ip(), Instant::now());
                }
                _ = beats.tick() => {
                    self.beat();
                    if self.listen() {
                        self.changed().await;
                    }
                    self.settle();
                    self.settle_noticed();
                }
                _ = checks.tick() => self.check().await,
                () = changed(&mut links) => drop(self.programmer.follow_links().await),
            }
        }
        for task in self.tasks {
            task.abort();
        }
    }

    /// Notes what a task reports. Returns whether the view has changed.
    fn note(&mut self, event: Event) -> bool {
        match event {
            Event::Connected(store) => {
                let keep = keep(Arc::clone(&store), self.events.clone());
                self.tasks.push(tokio::spawn(keep).abort_handle());
                self.store = Some(store);
                return false;
            }
            Event::Listed(entries, revision) => {
                let (view, errors) = View::of(&entries, revision);
                self.view = Some(view);
                self.set_store(StoreState::Connected);
                for error in errors {
                    tracing::warn!("{error}");
                }
            }
            Event::Changed(changes) => {
                for error in
                    self.view.as_mut().map(|view| view.apply(&changes)).into_iter().flatten()
                {
                    tracing::warn!("{error}");
                }
            }
            Event::Refreshed(Ok((entries, revision))) => {
                self.refreshes.1 = self.refreshes.0;
                // Decided on the older view.
                self.refused_endpoints.clear();
                if self.view.as_ref().is_none_or(|view| view.revision < revision) {
                    self.view = Some(View::of(&entries, revision).0);
                }
            }
            Event::Refreshed(Err(error)) => {
                tracing::debug!("refresh of the view: {error}");
                self.refreshes.0 = self.refreshes.1;
                return false;
            }
            Event::Lost(error) => {
                self.set_store(StoreState::Lost(error));
                return true;
            }
            Event::Lease(lease) => {
                self.lease = lease;
                return false;
            }
            Event::Left(left, done) => {
                self.left = Some((left, done));
                return false;
            }
            Event::Registered(lease, result) => {
                self.registers = false;
                match result {
                    Ok(Some(revision)) => self.awaited = self.awaited.max(revision),
                    // A condition did not hold: the view is about to change.
                    Ok(None) => {}
                    // There may be another one already.
                    Err(StoreError::LeaseEnded) if self.lease == Some(lease) => self.lease = None,
                    Err(error) => tracing::debug!("registration: {error}"),
                }
                return false;
            }
        }
        true
    }

    fn set_store(&mut self, state: StoreState) {
        let is_same = matches!(
            (&state, &self.store_state),
            (StoreState::Connected, StoreState::Connected)
                | (StoreState::Lost(_), StoreState::Lost(_))
        );
        if !is_same {
            match &state {
                StoreState::Connected => tracing::info!(target: STATE, "cluster store answers"),
                StoreState::Lost(error) => {
                    tracing::warn!(target: STATE, "{error}; networks keep working, and cannot be changed");
                }
                StoreState::Connecting => {}
            }
            self.store_since = SystemTime::now();
        }
        self.store_state = state;
    }

    /// Follows a change of the view, of the networks, or of the hosts that are heard.
    async fn changed(&mut self) {
        if let Some(view) = &self.view {
            let mut effective = view.clone();
            let (heard, own) = (&self.heard, &self.own);
            self.retention.extend(&mut effective, |id| heard.contains(id) || *id == own.id);
            self.effective = Arc::new(effective);
            let now = Instant::now();
            let others = self.effective.nodes.iter().filter(|(id, _)| **id != own.id);
            self.liveness.set_peers(others, now);
            self.program().await;
        }
        self.publish();
        self.settle();
    }

    async fn program(&mut self) {
        let view = Arc::clone(&self.effective);
        if !self.is_swept {
            match self.programmer.sweep(&self.networks).await {
                Ok(removed) => {
                    self.is_swept = true;
                    for device in removed {
                        tracing::info!(device, "VXLAN device of a removed network removed");
                    }
                }
                Err(error) => tracing::warn!(%error, "old VXLAN devices not removed"),
            }
        }
        self.programmer.program(&self.networks, &view, &self.own.id).await;
        let mut gone: BTreeSet<String> = self.named.keys().cloned().collect();
        for network in &self.networks {
            gone.remove(&network.name);
            let remote = view.endpoints_on(&network.name);
            let remote = remote.filter(|(_, endpoint)| endpoint.node != self.own.id);
            let remote: BTreeMap<String, Endpoint> =
                remote.map(|(name, endpoint)| (name.to_owned(), endpoint.clone())).collect();
            if self.named.get(&network.name) != Some(&remote) {
                self.names.set(&network.name, &remote);
                self.named.insert(network.name.clone(), remote);
            }
        }
        for name in gone {
            self.named.remove(&name);
            self.names.set(&name, &BTreeMap::new());
        }
    }

    fn publish(&self) {
        let record = self.effective.nodes.get(&self.own.id);
        let cluster = Cluster {
            view: Arc::clone(&self.effective),
            is_known: self.view.is_some(),
            store: self.store_state.clone(),
            has_joined: self.refused.is_none()
                && record.is_some_and(|node| node.vtep == self.own.node.vtep),
            refused: self.refused.clone(),
            heard: self.heard.clone(),
            own: self.own.id.clone(),
        };
        (self.follower)(&cluster);
        self.publish.send_replace(Arc::new(cluster));
    }

    /// Starts a registration, if the records of this host differ from what they should be.
    fn register(&mut self) {
        let (Some(view), Some(lease), Some(store)) = (&self.view, self.lease, &self.store) else {
            return;
        };
        if self.registers || self.leaves || view.revision < self.awaited {
            return;
        }
        let transactions = match registration(view, &self.own, lease, now()) {
            Ok(registration) => {
                self.refused_endpoints = registration.refused;
                if self.refused.take().is_some() {
                    self.publish();
                }
                registration.transactions
            }
            Err(refusal) => {
                if self.refused.as_ref() != Some(&refusal) {
                    self.refused = Some(refusal);
                    self.publish();
                }
                return;
            }
        };
        if transactions.is_empty() {
            return self.settle();
        }
        self.registers = true;
        let (store, events) = (Arc::clone(store), self.events.clone());
        // Refused endpoints do not wait for the others.
        self.settle();
        tokio::spawn(async move {
            let result = commit_all(&*store, transactions).await;
            match result {
                Ok(Some(_)) => {}
                // The view is about to change.
                Ok(None) => sleep(RETRY / 10).await,
                Err(_) => sleep(RETRY).await,
            }
            let _ = events.send(Event::Registered(lease, result));
        });
    }

    /// Answers claims and releases that are done, refused or late.
    fn settle(&mut self) {
        let now = Instant::now();
        let (mut withdrawn, mut is_outdated) = (false, false);
        for waiting in std::mem::take(&mut self.waiting) {
            let recorded = self.view.as_ref().map(|view| view.endpoints.get(&waiting.key));
            let result = match (&waiting.endpoint, recorded) {
                (Some(endpoint), Some(Some(recorded))) if endpoint == recorded => Ok(()),
                (None, Some(None)) if !self.holds_claims(&waiting.key) => Ok(()),
                _ => match self.refused_endpoints.get(&waiting.key) {
                    Some(refusal)
                        if waiting.endpoint.is_some() && waiting.refresh <= self.refreshes.1 =>
                    {
                        Err(refusal.clone().into())
                    }
                    refusal => match &self.store_state {
                        StoreState::Lost(error) => Err(error.clone().into()),
                        _ if now >= waiting.deadline => Err(MeshError::Late),
                        _ => {
                            is_outdated |= refusal.is_some() && waiting.endpoint.is_some();
                            self.waiting.push(waiting);
                            continue;
                        }
                    },
                },
            };
            if waiting.endpoint.is_some() && result.is_err() {
                // Level-triggered: what was written of it is removed.
                self.own.endpoints.remove(&waiting.key);
                self.refused_endpoints.remove(&waiting.key);
                withdrawn = true;
            }
            let _ = waiting.done.send(result);
        }
        if is_outdated {
            self.refresh();
        }
        if withdrawn {
            self.register();
        }
    }

    /// Answers those who wait for other hosts to notice a change.
    fn settle_noticed(&mut self) {
        let now = Instant::now();
        for (revision, deadline, done) in std::mem::take(&mut self.unnoticed) {
            if self.liveness.noticed(revision.0, now) {
                let _ = done.send(Ok(()));
            } else if now >= deadline {
                let _ = done.send(Err(MeshError::Late));
            } else {
                self.unnoticed.push((revision, deadline, done));
            }
        }
    }

    /// Lists the cluster state, on a task: a claim was refused by a view that may not show what
    /// another host has released before the claim.
    fn refresh(&mut self) {
        let (started, done) = self.refreshes;
        let Some(store) = self.store.clone().filter(|_| started == done) else { return };
        self.refreshes.0 += 1;
        let events = self.events.clone();
        tokio::spawn(async move {
            let _ = events.send(Event::Refreshed(store.list(PREFIX).await));
        });
    }

    fn holds_claims(&self, (network, name): &EndpointKey) -> bool {
        let own = crate::record::Claim::Endpoint { name: name.clone(), node: self.own.id.clone() };
        self.view.as_ref().is_some_and(|view| view.claims_on(network).any(|(_, one)| *one == own))
    }

    fn beat(&self) {
        let Some(node) = self.effective.nodes.get(&self.own.id) else { return };
        let (revision, now) = (self.effective.revision.0, Instant::now());
        let beats = self.liveness.heartbeats(node.index, &node.boot, revision, now);
        for (to, beat) in beats {
            // A full buffer or a missing route: the heartbeat is lost.
            let _ = self.socket.try_send_to(&beat.encode(), SocketAddr::new(to, liveness::PORT));
        }
    }

    /// Updates which hosts are heard. Returns whether that has changed.
    fn listen(&mut self) -> bool {
        let now = Instant::now();
        let heard: BTreeSet<String> = self
            .effective
            .nodes
            .keys()
            .filter(|id| self.liveness.hearing(id, now) == Some(Hearing::Heard))
            .cloned()
            .collect();
        self.last_heard.extend(heard.iter().map(|id| (id.clone(), now)));
        for id in heard.difference(&self.heard) {
            tracing::info!(target: STATE, host = id, "host is heard");
        }
        for id in self.heard.difference(&heard) {
            tracing::warn!(target: STATE, host = id, "host is silent");
        }
        let changed = heard != self.heard;
        self.heard = heard;
        changed
    }

    /// Compares the kernel with the view.
    async fn check(&mut self) {
        for object in self.programmer.repair().await {
            tracing::warn!(object, "removed or changed by other software; restored");
        }
        if self.view.is_some() {
            self.program().await;
        }
        let mut problems = BTreeSet::new();
        problems.extend(self.programmer.failures().cloned());
        problems.extend(self.refused.iter().map(ToString::to_string));
        problems.extend(self.refused_endpoints.values().map(ToString::to_string));
        for network in &self.networks {
            let (_, conflicts) =
                crate::overlay::desired(&self.effective, &self.own.id, &network.name);
            problems.extend(conflicts.iter().map(ToString::to_string));
        }
        for (name, network) in &self.effective.networks {
            problems
                .extend(membership::obstacle(&self.own, name, network).map(|one| one.to_string()));
        }
        if let StoreState::Lost(error) = &self.store_state {
            problems.insert(error.to_string());
        }
        for problem in &problems {
            if !self.problems.contains_key(problem) {
                tracing::warn!("{problem}");
            }
        }
        self.problems.retain(|known, _| problems.contains(known));
        for problem in problems {
            self.problems.entry(problem).or_insert_with(SystemTime::now);
        }
        self.reports.send_replace(Some(Arc::new(self.status())));
        self.register();
    }

    /// Handles a request.
    async fn handle(&mut self, request: Request) {
        let deadline = Instant::now() + PATIENCE;
        let refresh = self.refreshes.0 + 1;
        match request {
            Request::Networks { networks, done } => {
                self.networks = networks;
                self.changed().await;
                let _ = done.send(Ok(()));
            }
            Request::Endpoints(endpoints) => {
                self.own.endpoints = endpoints;
                self.register();
            }
            Request::Claim { key, endpoint, done } => {
                self.own.endpoints.insert(key.clone(), endpoint.clone());
                self.waiting.push(Waiting {
                    key,
                    endpoint: Some(endpoint),
                    refresh,
                    deadline,
                    done,
                });
                self.register();
                self.settle();
            }
            Request::Release { key, done } => {
                if let StoreState::Lost(error) = &self.store_state {
                    let _ = done.send(Err(error.clone().into()));
                    return;
                }
                self.own.endpoints.remove(&key);
                self.waiting.push(Waiting { key, endpoint: None, refresh, deadline, done });
                self.register();
                self.settle();
            }
            Request::Create { name, network, done } => {
                self.commit(
                    move |view| Ok(vec![membership::creation(view, &name, &network)?]),
                    done,
                );
            }
            Request::Delete { name, done } => {
                self.commit(move |view| Ok(vec![membership::deletion(view, &name)?]), done);
            }
            Request::CreateService { name, service, done } => {
                let decide =
                    move |view: &View| Ok(vec![services::creation(view, &name, &service)?]);
                self.commit(decide, done);
            }
            Request::RemoveService { name, done } => {
                self.commit(move |view| Ok(vec![services::removal(view, &name)?]), done);
            }
            Request::Scale { name, replicas, done } => {
                let decide = move |view: &View| Ok(vec![services::scaling(view, &name, replicas)?]);
                self.commit(decide, done);
            }
            Request::Noticed { done } => {
                self.unnoticed.push((self.effective.revision, deadline, done));
            }
            Request::Bindings(bindings) => {
                if self.own.bindings != bindings {
                    self.own.bindings = bindings;
                    self.register();
                }
            }
            Request::RemoveHost { id, done } => {
                let is_alive = self.heard.contains(&id) || id == self.own.id;
                let decide = move |view: &View| {
                    let is_member = view.node_indexes.values().any(|known| *known == id);
                    if is_alive || view.nodes.contains_key(&id) {
                        Err(MeshError::Alive(id.clone()))
                    } else if !is_member {
                        Err(MeshError::UnknownHost(id.clone()))
                    } else {
                        Ok(membership::removal(view, &id, now()))
                    }
                };
                self.commit(decide, done);
            }
            Request::Leave { done } => self.leave(done),
            Request::Status { done } => {
                self.check().await;
                let _ = done.send(self.status());
            }
        }
    }

    /// The store, if it answers.
    fn answering(&self) -> Result<Arc<dyn ClusterStore>, MeshError> {
        match (&self.store_state, &self.store, &self.view) {
            (StoreState::Lost(error), ..) => Err(error.clone().into()),
            (_, Some(store), Some(_)) => Ok(Arc::clone(store)),
            _ => Err(MeshError::Late),
        }
    }

    /// Commits what `decide` returns, on a task.
    fn commit(
        &self,
        decide: impl Fn(&View) -> Result<Vec<Transaction>, MeshError> + Send + Sync + 'static,
        done: Done<()>,
    ) {
        match self.answering() {
            Err(error) => drop(done.send(Err(error))),
            Ok(store) => drop(tokio::spawn(async move {
                let _ = done.send(commit(&*store, decide).await);
            })),
        }
    }

    /// Begins to leave: removes the records of this host, on a task.
    fn leave(&mut self, done: Done<()>) {
        let store = match self.answering() {
            Ok(store) => store,
            Err(error) => return drop(done.send(Err(error))),
        };
        self.leaves = true;
        let (id, lease, events) = (self.own.id.clone(), self.lease, self.events.clone());
        tokio::spawn(async move {
            let removal = move |view: &View| Ok(membership::removal(view, &id, now()));
            let removed = commit(&*store, removal).await;
            if let (Ok(()), Some(lease)) = (&removed, lease) {
                let _ = timeout(PATIENCE, store.revoke(lease)).await;
            }
            let _ = events.send(Event::Left(removed, done));
        });
    }

    /// Ends the membership, whose records are removed.
    async fn end(&mut self, left: Result<(), MeshError>, done: Done<()>) -> bool {
        if left.is_err() {
            self.leaves = false;
            let _ = done.send(left);
            return false;
        }
        if let Err(error) = self.programmer.remove().await {
            tracing::warn!(%error, "VXLAN devices not removed");
        }
        for name in std::mem::take(&mut self.named).into_keys() {
            self.names.set(&name, &BTreeMap::new());
        }
        let _ = done.send(left);
        true
    }

    fn status(&self) -> Status {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let view = &self.effective;
        let ids: BTreeSet<&String> = view.nodes.keys().chain(view.node_indexes.values()).collect();
        let mut endpoints: BTreeMap<&str, usize> = BTreeMap::new();
        for endpoint in view.endpoints.values() {
            *endpoints.entry(&endpoint.node).or_default() += 1;
        }
        let host = |id: &String| {
            let is_own = *id == self.own.id;
            let since = match self.liveness.hearing(id, now) {
                Some(Hearing::Heard) => None,
                Some(Hearing::Silent(since)) => Some(since),
                // Its record has ended.
                None => self.last_heard.get(id).copied(),
            };
            let since = since.filter(|_| !is_own);
            let silent_since = since.map(|since| wall - now.saturating_duration_since(since));
            HostStatus {
                id: id.clone(),
                vtep: view.nodes.get(id).map(|node: &Node| node.vtep),
                is_own,
                silent_since,
                is_heard: is_own || self.heard.contains(id),
                has_record: self.view.as_ref().is_some_and(|view| view.nodes.contains_key(id)),
                latency: self.liveness.latency(id).filter(|_| self.heard.contains(id)),
                endpoints: endpoints.get(id.as_str()).copied().unwrap_or_default(),
            }
        };
        Status {
            id: self.own.id.clone(),
            store: self.store_state.clone(),
            store_since: self.store_since,
            revision: view.revision,
            hosts: ids.into_iter().map(host).collect(),
            networks: view.networks.len(),
            problems: self.problems.iter().map(|(text, since)| (text.clone(), *since)).collect(),
            figures: self.programmer.figures(),
            repairs: self.programmer.repairs(),
        }
    }
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Waits for a change, if there are notifications.
async fn changed(links: &mut Option<LinkChanges>) {
    match links {
        Some(links) => links.changed().await,
        None => std::future::pending().await,
    }
}

/// Lists the cluster state and follows its changes, again after each failure.
async fn follow(connect: Arc<dyn Connect>, events: mpsc::UnboundedSender<Event>) {
    let store = loop {
        match connect.connect().await {
            Ok(store) => break store,
            Err(error) => {
                if events.send(Event::Lost(error)).is_err() {
                    return;
                }
                sleep(RETRY).await;
            }
        }
    };
    if events.send(Event::Connected(Arc::clone(&store))).is_err() {
        return;
    }
    loop {
        let lost = follow_once(&*store, &events).await;
        let lost = match lost {
            Some(StoreError::Compacted) => continue,
            Some(error) => error,
            None => return,
        };
        if events.send(Event::Lost(lost)).is_err() {
            return;
        }
        sleep(RETRY).await;
    }
}

/// Returns why the watch ended. `None` if the agent has.
async fn follow_once(
    store: &dyn ClusterStore,
    events: &mpsc::UnboundedSender<Event>,
) -> Option<StoreError> {
    let (entries, revision) = match store.list(PREFIX).await {
        Ok(listed) => listed,
        Err(error) => return Some(error),
    };
    let mut watch = match store.watch(PREFIX, revision).await {
        Ok(watch) => watch,
        Err(error) => return Some(error),
    };
    events.send(Event::Listed(entries, revision)).ok()?;
    loop {
        match watch.next().await {
            Ok(changes) => events.send(Event::Changed(changes)).ok()?,
            Err(error) => return Some(error),
        }
    }
}

/// Keeps a lease, and obtains another one when it has ended.
async fn keep(store: Arc<dyn ClusterStore>, events: mpsc::UnboundedSender<Event>) {
    loop {
        let Ok(lease) = store.grant(LEASE).await else {
            sleep(RETRY).await;
            continue;
        };
        if events.send(Event::Lease(Some(lease))).is_err() {
            return;
        }
        loop {
            sleep(KEEP_ALIVE).await;
            // Other errors do not end it.
            if matches!(store.keep_alive(lease).await, Err(StoreError::LeaseEnded)) {
                break;
            }
        }
        if events.send(Event::Lease(None)).is_err() {
            return;
        }
    }
}

/// Commits what `decide` returns for the current state, until all conditions hold.
async fn commit(
    store: &dyn ClusterStore,
    decide: impl Fn(&View) -> Result<Vec<Transaction>, MeshError>,
) -> Result<(), MeshError> {
    let attempts = async {
        loop {
            // Not the view of the watch: a refused condition shows that it is behind.
            let (entries, revision) = store.list(PREFIX).await?;
            let (view, _) = View::of(&entries, revision);
            let mut all = true;
            for transaction in decide(&view)? {
                all &= store.commit(transaction).await?.is_some();
            }
            if all {
                return Ok(());
            }
        }
    };
    timeout(PATIENCE, attempts).await.map_err(|_| MeshError::Late)?
}

/// Commits `transactions` until one is refused. Returns the last revision.
async fn commit_all(
    store: &dyn ClusterStore,
    transactions: Vec<Transaction>,
) -> Result<Option<Revision>, StoreError> {
    let mut last = None;
    for transaction in transactions {
        match store.commit(transaction).await? {
            Some(revision) => last = Some(revision),
            None => return Ok(last),
        }
    }
    Ok(last)
}
