//! Forwards the connections of a service to its tasks.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tidegate_mesh::agent::Cluster;
use tidegate_mesh::balance::{Balancer, Target, TargetId};
use tidegate_mesh::record::{ClientSource, Service};
use tidegate_mesh::services::{Task, tasks};
use tidegate_netsetup::Desired;
use tidegate_proxy::{BackendId, DialFailure, Flow, Lease, Opened, Upstream, is_exhaustion};
use tidegate_publish::client_address::Sandbox;
use tokio::sync::watch;

/// Time after which a task that has not answered gets a rival on another host. Within a data
/// centre, an answer takes less than a millisecond, and a host that has died is ejected after
/// 250 ms.
const HEDGE_AFTER: Duration = Duration::from_millis(20);

/// Maximum number of tasks to which one connection is tried at once, because the port of its
/// client is taken at each.
const TRIES: usize = 8;

/// The services that this host forwards, by name. Shared with the thread of the agent, which
/// reports lost hosts, and with the metrics.
pub(in crate::instance) type Registry = Arc<RwLock<BTreeMap<String, Arc<BalancedUpstream>>>>;

/// Adapts all services to the cluster.
pub(super) fn follow(registry: &Registry, cluster: &Cluster) {
    let services = registry.read().unwrap_or_else(PoisonError::into_inner).clone();
    for (name, upstream) in services {
        upstream.follow(&name, cluster);
    }
}

/// An upstream to the tasks of a service.
pub(in crate::instance) struct BalancedUpstream {
    service: String,
    sandbox: Arc<Sandbox>,
    source: ClientSource,
    /// The networks of this host.
    networks: watch::Receiver<Arc<Desired>>,
    state: Arc<Mutex<State>>,
}

struct State {
    balancer: Balancer,
    tasks: BTreeMap<TargetId, Known>,
    /// Counts of present and former tasks, by host.
    totals: BTreeMap<String, Figures>,
}

impl State {
    /// Counts something of a task, and of its host.
    fn count(&mut self, task: TargetId, count: impl Fn(&mut Figures)) {
        if let Some(known) = self.tasks.get_mut(&task) {
            count(&mut known.figures);
            count(self.totals.entry(known.task.node.clone()).or_default());
        }
    }
}

struct Known {
    task: Task,
    figures: Figures,
}

/// Counts of a task, since this host has known it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::instance) struct Figures {
    /// Connections that it has accepted, and UDP sessions that it has answered.
    pub(in crate::instance) connections: u64,
    /// Connections that it has not accepted.
    pub(in crate::instance) failures: u64,
    /// Times that it was ejected.
    pub(in crate::instance) ejections: u64,
    /// Open connections.
    pub(in crate::instance) open: u32,
    /// It is ejected now.
    pub(in crate::instance) is_ejected: bool,
}

/// A flow of a task. Dropping it ends the flow.
struct OpenFlow {
    state: Arc<Mutex<State>>,
    task: TargetId,
    /// What the sandbox holds for it.
    lease: Option<Lease>,
}

impl Drop for OpenFlow {
    fn drop(&mut self) {
        // The port of the client is free before the task gets other connections.
        self.lease = None;
        lock(&self.state).balancer.closed(self.task);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BalancedUpstream {
    /// An upstream of `service` without tasks.
    pub(super) fn new(
        name: &str,
        service: &Service,
        sandbox: Arc<Sandbox>,
        networks: watch::Receiver<Arc<Desired>>,
    ) -> Self {
        let balancer = Balancer::new(service.balance, service.prefers_local);
        Self {
            service: name.to_owned(),
            sandbox,
            source: service.source,
            networks,
            state: Arc::new(Mutex::new(State {
                balancer,
                tasks: BTreeMap::new(),
                totals: BTreeMap::new(),
            })),
        }
    }

    /// Adapts the tasks to the cluster.
    pub(super) fn follow(&self, name: &str, cluster: &Cluster) {
        let tasks = tasks(&cluster.view, name, &cluster.own, &|host| cluster.hears(host));
        let targets: BTreeMap<TargetId, Target> =
            tasks.iter().map(|(id, task)| (*id, task.target.clone())).collect();
        let mut state = lock(&self.state);
        state.balancer.set(targets);
        let mut old = std::mem::take(&mut state.tasks);
        let known = |(id, task): (TargetId, Task)| {
            let figures = old.remove(&id).map(|known| known.figures).unwrap_or_default();
            (id, Known { task, figures })
        };
        state.tasks = tasks.into_iter().map(known).collect();
    }

    /// Returns the counts of present and former tasks, by host. Those of a host in no cluster any
    /// more are kept, too: names of hosts are few.
    pub(in crate::instance) fn totals(&self) -> BTreeMap<String, Figures> {
        let state = lock(&self.state);
        let mut totals = state.totals.clone();
        for (id, known) in &state.tasks {
            totals.entry(known.task.node.clone()).or_default().open += state.balancer.open(*id);
        }
        totals
    }

    /// Returns the tasks with their counts.
    pub(in crate::instance) fn tasks(&self) -> Vec<(Task, Figures)> {
        let state = lock(&self.state);
        let ejected: Vec<TargetId> = state.balancer.ejected(Instant::now()).collect();
        let of = |(id, known): (&TargetId, &Known)| {
            let open = state.balancer.open(*id);
            let figures = Figures { open, is_ejected: ejected.contains(id), ..known.figures };
            (known.task.clone(), figures)
        };
        state.tasks.iter().map(of).collect()
    }

    /// Chooses a task other than those in `tried`, and preferably on a host without one of these.
    fn choose(&self, flow: &Flow, tried: &[TargetId]) -> Option<(TargetId, SocketAddr)> {
        let (client, now) = (flow.client.ip(), Instant::now());
        let mut state = lock(&self.state);
        let State { balancer, tasks, .. } = &mut *state;
        let chosen = if tried.is_empty() {
            balancer.choose(client, &[], now)
        } else {
            let hosts: Vec<&str> =
                tried.iter().filter_map(|id| Some(&*tasks.get(id)?.task.node)).collect();
            let there = tasks.iter().filter(|(_, known)| hosts.contains(&&*known.task.node));
            let there: Vec<TargetId> = there.map(|(id, _)| *id).chain(tried.to_vec()).collect();
            balancer.choose(client, &there, now).or_else(|| balancer.choose(client, tried, now))
        };
        let id = chosen?;
        let addresses = &tasks.get(&id)?.task.addresses;
        let same = addresses.iter().find(|address| address.is_ipv4() == client.is_ipv4());
        let address = same.or_else(|| addresses.first())?;
        balancer.opened(id);
        Some((id, SocketAddr::new(*address, flow.container_port)))
    }

    /// Whether tasks see the address of `client`. A container of this host may have an address that
    /// exists on the host of the task as well.
    fn shows(&self, client: IpAddr, task: IpAddr) -> bool {
        self.source == ClientSource::Client
            && self.sandbox.shows(client, task)
            && !self
                .networks
                .borrow()
                .networks
                .iter()
                .any(|network| network.subnets.iter().any(|subnet| subnet.subnet.contains(&client)))
    }

    /// Opens a flow to a task other than those in `tried`. `None` if there is none.
    fn open_except(&self, flow: &Flow, tried: &[TargetId]) -> Option<io::Result<Opened>> {
        let mut tried = tried.to_vec();
        let (mut taken, mut last) = (None, None);
        for _ in 0..TRIES {
            let Some((task, to)) = self.choose(flow, &tried) else { break };
            // Closed again if it is not opened.
            let open = OpenFlow { state: Arc::clone(&self.state), task, lease: None };
            let is_shown = self.shows(flow.client.ip(), to.ip());
            let opened = match is_shown {
                true => self.sandbox.connect_as_client(flow, to),
                false => self.sandbox.connect(flow, to),
            };
            match opened {
                Ok(opened) => return Some(Ok(with_lease(opened, open))),
                Err(error) if is_exhaustion(&error) => return Some(Err(error)),
                Err(error) if is_shown && Sandbox::is_taken(&error) => {
                    taken.get_or_insert((open, to));
                }
                Err(error) => {
                    self.failed(task, DialFailure::Refused);
                    last = Some(error);
                }
            }
            tried.push(task);
        }
        match taken {
            Some((open, to)) => {
                let opened = self.sandbox.connect_from_other_port(flow, to);
                Some(opened.map(|opened| with_lease(opened, open)))
            }
            None => last.map(Err),
        }
    }
}

/// Ends `flow` with `opened`.
fn with_lease(opened: Opened, mut flow: OpenFlow) -> Opened {
    let backend = Some(flow.task);
    flow.lease = opened.lease;
    Opened { socket: opened.socket, lease: Some(Box::new(flow)), backend }
}

impl Upstream for BalancedUpstream {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        let no_task = || {
            let text = format!("service {}: no task is ready", self.service);
            io::Error::new(io::ErrorKind::HostUnreachable, text)
        };
        self.open_except(flow, &[]).unwrap_or_else(|| Err(no_task()))
    }

    fn open_other(&self, flow: &Flow, tried: &[BackendId]) -> Option<io::Result<Opened>> {
        self.open_except(flow, tried)
    }

    fn hedge_after(&self) -> Option<Duration> {
        Some(HEDGE_AFTER)
    }

    fn connected(&self, task: BackendId) {
        let mut state = lock(&self.state);
        state.balancer.succeeded(task);
        state.count(task, |figures| figures.connections += 1);
    }

    fn failed(&self, task: BackendId, why: DialFailure) {
        let mut state = lock(&self.state);
        let ejected = state.balancer.failed(task, Instant::now());
        state.count(task, |figures| {
            figures.failures += 1;
            figures.ejections += u64::from(ejected.is_some());
        });
        if let (Some(time), Some(known)) = (ejected, state.tasks.get(&task)) {
            let (name, host) = (known.task.name.clone(), known.task.node.clone());
            drop(state);
            tracing::warn!(
                service = self.service,
                task = name,
                host,
                reason = match why {
                    DialFailure::Refused => "refused",
                    DialFailure::Silent => "silent",
                },
                "task does not accept connections; ejected for {time:?}"
            );
        }
    }

    fn is_available(&self, task: BackendId) -> bool {
        lock(&self.state).tasks.get(&task).is_some_and(|known| known.task.target.is_ready)
    }
}
