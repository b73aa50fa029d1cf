//! The cluster of a daemon: overlay networks and their endpoints on this host.
//!
//! ```text
//!   cluster state ──► networks of the state ──► bridges ──► devices of the agent
//!   command ──► claim of name and addresses ──► local change ──► answer
//! ```
//!
//! The agent ([`tidegate_mesh::agent`]) owns everything that is shared between hosts. This module
//! makes the overlay networks of the cluster networks of this host, and its endpoints on them
//! records of the cluster.

mod balanced;
mod drain;
mod health;
mod report;
mod services;

pub(super) use balanced::{BalancedUpstream, Figures, Registry};

use super::Instance;
use super::commands::Refused;
use super::initial::host_id;
use super::names::dns_name;
use crate::api::{Problem, Reserved};
use health::Health;
use services::Services;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use std::{fs, io};
use tidegate_api::types::{HostState, Mesh as MeshReport, MeshHost, MeshProblem};
use tidegate_control::{
    AttachSpec, Command, EtcdAccess, MESH_SANDBOX, Membership, Name, NetworkAttachment,
    NetworkSpec, State,
};
use tidegate_dns::{EndpointSpec, Resolver};
use tidegate_mesh::agent::{Agent, Cluster, MeshError, Names, Options, StoreState};
use tidegate_mesh::device::{Links, overhead};
use tidegate_mesh::membership::{Own, Refusal, free_addresses, obstacle, unused_vni};
use tidegate_mesh::programmer::LocalNetwork;
use tidegate_mesh::record::{
    Endpoint, EndpointKey, EndpointState, Network, Node, Role, Service, Subnet,
};
use tidegate_mesh::store::Connect;
use tidegate_mesh::underlay::underlay;
use tidegate_mesh::vtep_guard;
use tidegate_model::registry::fnv1a;
use tidegate_model::validity::is_object_name;
use tidegate_netns::Namespace;
use tidegate_netsetup::{Observed, Overlay};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Time for a host to join. An etcd that is down is noticed within five seconds.
const JOIN: Duration = Duration::from_secs(10);

/// Pause before an agent that could not be started is started again.
const RESTART: Duration = Duration::from_secs(5);

/// Attempts to find addresses that no other host claims at the same time.
const ATTEMPTS: u32 = 5;

/// Time for a change of the cluster to reach this host.
const PATIENCE: Duration = Duration::from_secs(3);

/// The membership of this host.
pub(super) struct Mesh {
    agent: Arc<Agent>,
    cluster: watch::Receiver<Arc<Cluster>>,
    own: Own,
    /// Networks of the cluster that this host does not have, with the reason.
    missing: BTreeMap<String, (String, SystemTime)>,
    services: Services,
    health: Health,
}

/// The membership of this host, or why it has none.
#[derive(Default)]
pub(super) enum Member {
    /// The host is in no cluster.
    #[default]
    No,
    /// The agent could not be started.
    Failed {
        /// Why.
        problem: String,
        since: SystemTime,
        /// When it is started again.
        again: Instant,
    },
    /// The agent runs.
    Yes(Box<Mesh>),
}

impl Member {
    /// Waits for a change of the cluster, or of the health of a task.
    pub(super) async fn changed(&mut self) {
        let Self::Yes(mesh) = self else { return std::future::pending().await };
        let Mesh { cluster, health, .. } = &mut **mesh;
        tokio::select! {
            Ok(()) = cluster.changed() => {}
            () = health.changed() => {}
        }
    }

    fn mesh(&self) -> Option<&Mesh> {
        match self {
            Self::Yes(mesh) => Some(mesh),
            Self::No | Self::Failed { .. } => None,
        }
    }
}

impl Mesh {
    /// The records of an endpoint of this host, with its health.
    fn records(
        &self,
        state: &State,
        endpoint: &tidegate_control::Endpoint,
    ) -> Vec<(EndpointKey, Endpoint)> {
        let name = &endpoint.setup.name;
        let state_of = match self.health.is_healthy(name) {
            _ if self.health.is_draining(name) => EndpointState::Draining,
            true => EndpointState::Ready,
            false => EndpointState::Starting,
        };
        let records = records(state, endpoint, &self.own.id).into_iter();
        records.map(|(key, record)| (key, Endpoint { state: state_of, ..record })).collect()
    }
}

/// Names of endpoints of other hosts.
struct RemoteNames {
    resolver: Arc<Resolver>,
    known: BTreeMap<String, BTreeMap<String, Endpoint>>,
}

impl Names for RemoteNames {
    fn set(&mut self, network: &str, endpoints: &BTreeMap<String, Endpoint>) {
        let before = self.known.remove(network).unwrap_or_default();
        let container = |name: &str, node: &str| format!("{name}@{node}");
        for (name, old) in &before {
            if endpoints.get(name) != Some(old) {
                self.resolver.remove_endpoint(network, &container(name, &old.node), name);
            }
        }
        let endpoints: BTreeMap<_, _> = endpoints
            .iter()
            .filter(|(_, endpoint)| !endpoint.is_sandbox())
            .map(|(name, endpoint)| (name.clone(), endpoint.clone()))
            .collect();
        for (name, endpoint) in &endpoints {
            if before.get(name) == Some(endpoint) {
                continue;
            }
            let spec = EndpointSpec {
                container: container(name, &endpoint.node),
                name: name.clone(),
                aliases: endpoint.aliases.clone(),
                hostname: endpoint.hostname.clone(),
                addresses: endpoint.addresses.clone(),
            };
            if let Err(error) = self.resolver.add_endpoint(network, &spec) {
                tracing::warn!(network, endpoint = name, %error, "name of another host not added");
            }
        }
        if !endpoints.is_empty() {
            self.known.insert(network.to_owned(), endpoints);
        }
    }
}

impl From<MeshError> for Problem {
    fn from(error: MeshError) -> Self {
        match &error {
            MeshError::Refused(Refusal::UnknownNetwork(_) | Refusal::UnknownService(_))
            | MeshError::UnknownHost(_) => Self::not_found(&error),
            MeshError::Refused(Refusal::InvalidService { .. }) => Self::bad_request(&error),
            MeshError::Refused(_) | MeshError::Alive(_) => Self::conflict(&error),
            MeshError::Store(_) | MeshError::Late | MeshError::Ended => Self::unavailable(&error),
        }
    }
}

/// The store of a cluster.
#[cfg(feature = "etcd")]
fn connect(access: &EtcdAccess) -> anyhow::Result<Arc<dyn Connect>> {
    use anyhow::Context;
    use std::path::Path;
    use tidegate_mesh::store::{EtcdOptions, EtcdTls};
    let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
    let user = match (&access.user, &access.password_file) {
        (Some(user), Some(file)) => {
            let password = String::from_utf8(read(file)?)
                .with_context(|| format!("{}: the password", file.display()))?;
            Some((user.clone(), password.trim_end_matches(['\r', '\n']).to_owned()))
        }
        _ => None,
    };
    let identity = match (&access.certificate, &access.key) {
        (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
        _ => None,
    };
    let tls = match &access.authorities {
        Some(file) => Some(EtcdTls { authorities: read(file)?, identity }),
        None => None,
    };
    Ok(Arc::new(EtcdOptions { servers: access.servers.clone(), user, tls }))
}

#[cfg(not(feature = "etcd"))]
fn connect(_: &EtcdAccess) -> anyhow::Result<Arc<dyn Connect>> {
    anyhow::bail!(
        "this tidegate has no client of etcd: protoc was missing when it was built; install \
         protobuf-compiler and libprotobuf-dev, and build it again with make build"
    )
}

/// The overlay networks of `state`.
fn local_networks(state: &State) -> Vec<LocalNetwork> {
    let local = state.networks().values().filter_map(|network| {
        let setup = &network.setup;
        Some(LocalNetwork {
            name: setup.name.clone(),
            vni: setup.overlay?.vni,
            bridge: setup.bridge.name.clone(),
            mtu: setup.mtu,
        })
    });
    local.collect()
}

/// The name of an endpoint of host `id` in the cluster.
fn cluster_name(endpoint: &tidegate_control::Endpoint, id: &str) -> String {
    if !endpoint.name.is_sandbox() {
        return dns_name(&endpoint.setup.name).to_owned();
    }
    // There is one on each host.
    let name = format!("{MESH_SANDBOX}.{id}");
    if is_object_name(&name) {
        name
    } else {
        format!("{MESH_SANDBOX}.{:016x}", fnv1a(id.as_bytes()))
    }
}

/// The records of the endpoint `endpoint` of host `id` on overlay networks of `state`.
fn records(
    state: &State,
    endpoint: &tidegate_control::Endpoint,
    id: &str,
) -> Vec<(EndpointKey, Endpoint)> {
    let of = |attachment: &tidegate_netsetup::Attachment| {
        let network: Name = attachment.network.parse().ok()?;
        state.networks().get(&network)?.setup.overlay?;
        let record = Endpoint {
            node: id.to_owned(),
            // The name of the link is random, and stored.
            generation: fnv1a(attachment.host_end.name.as_bytes()),
            addresses: attachment.addresses.iter().map(ipnet::IpNet::addr).collect(),
            mac: attachment.inside.mac,
            state: EndpointState::Ready,
            aliases: endpoint.aliases.get(&network).cloned().unwrap_or_default(),
            hostname: endpoint.hostname.clone(),
            role: match &endpoint.task {
                _ if endpoint.name.is_sandbox() => Role::Sandbox,
                Some(task) => Role::Task { service: task.service.clone(), weight: task.weight },
                None => Role::Container,
            },
        };
        Some(((attachment.network.clone(), cluster_name(endpoint, id)), record))
    };
    endpoint.setup.attachments.iter().filter_map(of).collect()
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

impl Instance {
    /// Starts the agent of the stored membership.
    pub(super) async fn start_mesh(&mut self) {
        let Some(membership) = self.owner.state().membership().cloned() else {
            // What a process that was killed while it left has left behind.
            self.member = Member::No;
            return;
        };
        match self.agent(&membership).await {
            Ok(mesh) => self.member = Member::Yes(Box::new(mesh)),
            Err(error) => {
                let problem = format!("{error:#}");
                let since = match &self.member {
                    Member::Failed { problem: known, since, .. } if *known == problem => *since,
                    _ => {
                        tracing::warn!("cluster: {problem}; retried every few seconds");
                        SystemTime::now()
                    }
                };
                let again = Instant::now() + RESTART;
                self.member = Member::Failed { problem, since, again };
            }
        }
    }

    /// Starts the agent again if it could not be started.
    pub(super) async fn restart_mesh(&mut self) {
        if matches!(&self.member, Member::Failed { again, .. } if *again <= Instant::now()) {
            self.start_mesh().await;
        }
    }

    async fn agent(&self, membership: &Membership) -> anyhow::Result<Mesh> {
        let under = underlay(&self.host, membership.advertise).await?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let machine = host_id().map(|byte| format!("{byte:02x}")).concat();
        let state = self.owner.state();
        let id = membership.host.to_string();
        let endpoints =
            state.endpoints().values().flat_map(|endpoint| records(&state, endpoint, &id));
        let own = Own {
            node: Node {
                index: 0,
                vtep: membership.advertise,
                boot: boot.trim().to_owned(),
                machine,
                mtu: under.mtu,
            },
            underlay: under.networks,
            endpoints: endpoints.collect(),
            bindings: BTreeMap::new(),
            id,
        };
        let names = RemoteNames { resolver: self.up.names.resolver(), known: BTreeMap::new() };
        let services = Services::new(Arc::clone(&self.services));
        let registry = Arc::clone(&self.services);
        let agent = Agent::start(Options {
            own: own.clone(),
            store: connect(&membership.etcd)?,
            namespace: self.host.clone(),
            networks: local_networks(&state),
            names: Box::new(names),
            follower: Box::new(move |cluster| balanced::follow(&registry, cluster)),
            reports: self.mesh_reports.clone(),
        })?;
        let cluster = agent.cluster();
        let agent = Arc::new(agent);
        Ok(Mesh {
            agent,
            cluster,
            own,
            missing: BTreeMap::new(),
            services,
            health: Health::default(),
        })
    }

    /// Joins a cluster.
    ///
    /// # Errors
    /// The host is in a cluster already, is refused, or etcd does not answer. Nothing has changed.
    pub(super) async fn join(&mut self, membership: Membership) -> Result<(), Problem> {
        if self.rootless {
            return Err(Problem::bad_request(
                &"a cluster needs root: the networks of an ordinary user have no access to the links of the host",
            ));
        }
        if let Some(current) = self.owner.state().membership() {
            let host = current.host.clone();
            let refusal = tidegate_control::Refusal::InCluster { host };
            return Err(Problem::conflict(&refusal));
        }
        let mesh = self.agent(&membership).await;
        let mesh = mesh.map_err(|error| Problem::bad_request(&format!("{error:#}")))?;
        if let Err(error) = mesh.agent.joined(JOIN).await {
            // Removes what it may have recorded.
            let _ = mesh.agent.leave().await;
            return Err(error.into());
        }
        if let Err(problem) = self.local_command(&Command::Join(membership), Reserved::new()).await
        {
            let _ = mesh.agent.leave().await;
            return Err(problem);
        }
        tracing::info!(host = mesh.own.id, vtep = %mesh.own.node.vtep, "joined the cluster");
        self.member = Member::Yes(Box::new(mesh));
        self.follow_cluster().await;
        Ok(())
    }

    /// Leaves the cluster. With `force`, detaches the endpoints on overlay networks first, and
    /// leaves even if etcd does not answer.
    ///
    /// # Errors
    /// Endpoints are attached, or etcd does not answer.
    pub(super) async fn leave_mesh(&mut self, force: bool) -> Result<(), Problem> {
        if force {
            let state = self.owner.state();
            let on_overlay = |endpoint: &&Arc<tidegate_control::Endpoint>| {
                !endpoint.name.is_sandbox() && !records(&state, endpoint, "").is_empty()
            };
            let endpoints: Vec<Name> =
                state.endpoints().values().filter(on_overlay).map(|one| one.name.clone()).collect();
            for name in endpoints {
                self.local_command(&Command::Detach(name), Reserved::new()).await?;
            }
        }
        // Refused before anything changes.
        self.check_leave()?;
        self.end_services().await;
        if let Some(mesh) = self.member.mesh() {
            let agent = Arc::clone(&mesh.agent);
            match agent.leave().await {
                Err(error) if !force => return Err(error.into()),
                Err(error) => {
                    tracing::warn!("the records of this host end with its lease: {error}");
                    agent.set_networks(Vec::new()).await;
                }
                Ok(()) => {}
            }
        }
        self.local_command(&Command::Leave, Reserved::new()).await?;
        self.member = Member::No;
        self.mesh_reports.send_replace(None);
        if let Err(error) = remove_stale_guard(&self.host).await {
            tracing::warn!(%error, "guard of VXLAN not removed");
        }
        tracing::info!("left the cluster");
        Ok(())
    }

    /// Removes a host that no longer exists from the cluster.
    ///
    /// # Errors
    /// It is alive or unknown, or etcd does not answer.
    pub(super) async fn remove_host(&self, host: &str) -> Result<(), Problem> {
        Ok(self.mesh()?.agent.remove_host(host).await?)
    }

    /// Returns whether this host may leave: its sandboxes are the only endpoints on overlay
    /// networks.
    fn check_leave(&self) -> Result<(), Problem> {
        let state = self.owner.state();
        if !state.endpoints().keys().any(Name::is_sandbox) {
            return self.owner.check(&Command::Leave);
        }
        let endpoints = state.endpoints().values().filter(|endpoint| !endpoint.name.is_sandbox());
        let on_overlays: Vec<String> = endpoints
            .filter(|endpoint| !records(&state, endpoint, "").is_empty())
            .map(|endpoint| endpoint.name.to_string())
            .collect();
        if on_overlays.is_empty() {
            return Ok(());
        }
        Err(Problem::conflict(&format!(
            "endpoints are attached to overlay networks: {}; detach them first, or use --force",
            on_overlays.join(", ")
        )))
    }

    fn mesh(&self) -> Result<&Mesh, Problem> {
        match &self.member {
            Member::Yes(mesh) => Ok(mesh),
            Member::No => Err(Problem::conflict(&tidegate_control::Refusal::NotInCluster)),
            Member::Failed { problem, .. } => Err(Problem::unavailable(problem)),
        }
    }

    /// Reports the cluster.
    ///
    /// # Errors
    /// The host is in none.
    pub(super) async fn mesh_report(&self) -> Result<MeshReport, Problem> {
        let state = self.owner.state();
        let Some(membership) = state.membership() else {
            return Err(Problem::not_found(&tidegate_control::Refusal::NotInCluster));
        };
        let mut report = MeshReport {
            host: membership.host.to_string(),
            etcd: membership.etcd.servers.clone(),
            connected: false,
            connected_since: String::new(),
            hosts: Vec::new(),
            networks: 0,
            services: Vec::new(),
            problems: Vec::new(),
        };
        let problem = |problem: &str, since: SystemTime| MeshProblem {
            problem: problem.to_owned(),
            since: time(since),
        };
        let mesh = match &self.member {
            Member::Yes(mesh) => mesh,
            Member::Failed { problem: text, since, .. } => {
                report.connected_since = time(*since);
                report.problems.push(problem(text, *since));
                return Ok(report);
            }
            Member::No => return Ok(report),
        };
        let Some(status) = mesh.agent.status().await else {
            return Err(MeshError::Ended.into());
        };
        report.connected = status.store == StoreState::Connected;
        report.connected_since = time(status.store_since);
        report.networks = status.networks;
        report.services = self.service_reports()?;
        report.hosts = status
            .hosts
            .iter()
            .map(|host| MeshHost {
                name: host.id.clone(),
                address: host.vtep,
                state: match (host.is_own, host.is_heard, host.has_record) {
                    (true, ..) => HostState::Own,
                    (_, true, true) => HostState::Up,
                    (_, true, false) => HostState::Unrecorded,
                    (_, false, true) => HostState::Silent,
                    (_, false, false) => HostState::Down,
                },
                silent_since: host.silent_since.map(time),
                latency_us: host.latency.map(|latency| latency.as_micros() as u64),
                endpoints: host.endpoints,
            })
            .collect();
        let known = status.problems.iter().map(|(text, since)| problem(text, *since));
        report.problems.extend(known);
        report.problems.extend(mesh.missing.values().map(|(text, since)| problem(text, *since)));
        let unhealthy = mesh.health.problems();
        report.problems.extend(unhealthy.map(|(text, since)| problem(&text, since)));
        let failed = mesh.services.problems();
        report.problems.extend(failed.map(|(text, since)| problem(text, since)));
        Ok(report)
    }

    /// Makes the overlay networks of the cluster those of this host.
    pub(super) async fn follow_cluster(&mut self) {
        let Member::Yes(mesh) = &mut self.member else { return };
        let cluster = Arc::clone(&mesh.cluster.borrow_and_update());
        if !cluster.is_known {
            return;
        }
        let (agent, own) = (Arc::clone(&mesh.agent), mesh.own.clone());
        let mut missing = BTreeMap::new();
        let state = self.owner.state();
        let mut changed = false;
        for network in state.networks().values() {
            let Some(overlay) = network.setup.overlay else { continue };
            let known = cluster.view.networks.get(&network.setup.name);
            if known.is_some_and(|known| known.vni == overlay.vni) {
                continue;
            }
            if state.members(&network.name).next().is_some() {
                let problem = format!(
                    "network {}: it was removed from the cluster, and this host has endpoints on it; detach them",
                    network.name
                );
                missing.insert(network.setup.name.clone(), problem);
                continue;
            }
            // Its names are removed before the network.
            let kept = local_networks(&state).into_iter();
            let kept = kept.filter(|one| one.name != network.setup.name).collect();
            agent.set_networks(kept).await;
            let remove = Command::RemoveNetwork(network.name.clone());
            if let Err(problem) = self.local_command(&remove, Reserved::new()).await {
                missing.insert(network.setup.name.clone(), problem.to_string());
            }
            changed = true;
        }
        for (name, network) in &cluster.view.networks {
            let Ok(local_name) = name.parse::<Name>() else { continue };
            if let Some(local) = self.owner.state().networks().get(&local_name) {
                if local.setup.overlay.is_none() {
                    let problem = format!(
                        "network {name} of the cluster is not available here: this host has a network with this name; remove that one"
                    );
                    missing.insert(name.clone(), problem);
                }
                continue;
            }
            if obstacle(&own, name, network).is_some() {
                // The agent reports it.
                continue;
            }
            let create = Command::CreateNetwork(spec_of(local_name, network));
            match self.local_command(&create, Reserved::new()).await {
                Ok(()) => changed = true,
                Err(problem) => drop(missing.insert(name.clone(), problem.to_string())),
            }
        }
        if changed {
            agent.set_networks(local_networks(&self.owner.state())).await;
        }
        let Member::Yes(mesh) = &mut self.member else { return };
        for (name, problem) in &missing {
            if mesh.missing.get(name).is_none_or(|(known, _)| known != problem) {
                tracing::warn!("{problem}");
            }
        }
        mesh.missing.retain(|name, (known, _)| missing.get(name) == Some(known));
        for (name, problem) in missing {
            mesh.missing.entry(name).or_insert_with(|| (problem, SystemTime::now()));
        }
        self.follow_services(false).await;
    }

    /// Creates a service in the cluster, and waits for the hosts to publish it.
    ///
    /// # Errors
    /// It was refused, or etcd does not answer.
    pub(super) async fn create_service(
        &mut self,
        name: &str,
        service: Service,
    ) -> Result<(), Problem> {
        let mesh = self.mesh()?;
        let (agent, mut seen) = (Arc::clone(&mesh.agent), mesh.cluster.clone());
        agent.create_service(name, service).await?;
        let is_there = |cluster: &Arc<Cluster>| cluster.view.services.contains_key(name);
        let _ = timeout(PATIENCE, seen.wait_for(is_there)).await;
        self.follow_services(false).await;
        Ok(())
    }

    /// Removes a service from the cluster.
    ///
    /// # Errors
    /// It does not exist, or etcd does not answer.
    pub(super) async fn remove_service(&mut self, name: &str) -> Result<(), Problem> {
        let mesh = self.mesh()?;
        let (agent, mut seen) = (Arc::clone(&mesh.agent), mesh.cluster.clone());
        agent.remove_service(name).await?;
        let is_gone = |cluster: &Arc<Cluster>| !cluster.view.services.contains_key(name);
        let _ = timeout(PATIENCE, seen.wait_for(is_gone)).await;
        self.follow_services(false).await;
        Ok(())
    }

    /// Sets the maximum number of tasks of a service with connections.
    ///
    /// # Errors
    /// It does not exist, or etcd does not answer.
    pub(super) async fn scale_service(
        &mut self,
        name: &str,
        replicas: Option<u32>,
    ) -> Result<(), Problem> {
        let mesh = self.mesh()?;
        let (agent, mut seen) = (Arc::clone(&mesh.agent), mesh.cluster.clone());
        agent.scale(name, replicas).await?;
        let is_scaled = |cluster: &Arc<Cluster>| {
            cluster.view.services.get(name).is_none_or(|one| one.replicas == replicas)
        };
        let _ = timeout(PATIENCE, seen.wait_for(is_scaled)).await;
        Ok(())
    }

    /// Creates an overlay network: in the cluster, and then on this host.
    ///
    /// # Errors
    /// It was refused, or etcd does not answer.
    pub(super) async fn create_overlay(&mut self, spec: NetworkSpec) -> Result<(), Problem> {
        let name = spec.name.to_string();
        for (given, option) in [
            (spec.bridge.is_some(), "--bridge"),
            (!spec.inter_container, "--isolated"),
            (spec.names_at_gateway, "DNS at the gateway"),
            (!spec.dns.is_empty(), "--dns"),
        ] {
            if given {
                return Err(Problem::bad_request(&format!(
                    "network {name}: {option} is not available for overlay networks"
                )));
            }
        }
        for _ in 0..ATTEMPTS {
            self.follow_cluster().await;
            let mesh = self.mesh()?;
            let (own, agent) = (mesh.own.clone(), Arc::clone(&mesh.agent));
            let mut seen = mesh.cluster.clone();
            let cluster = Arc::clone(&seen.borrow_and_update());
            if let StoreState::Lost(error) = &cluster.store {
                return Err(MeshError::from(error.clone()).into());
            }
            let smallest = cluster
                .view
                .nodes
                .values()
                .map(|node| node.mtu.saturating_sub(overhead(&node.vtep)));
            let smallest = smallest.chain([own.node.mtu.saturating_sub(overhead(&own.node.vtep))]);
            let mtu = spec.mtu.or(smallest.min());
            let vni = unused_vni(&cluster.view, || {
                let [a, b, c, d, ..] = super::initial::random_bytes();
                u32::from_be_bytes([a, b, c, d])
            });
            // The subnets are chosen as for a network of this host.
            let overlay = Overlay { vni, internal: spec.internal };
            let local = NetworkSpec { mtu, overlay: Some(overlay), ..spec.clone() };
            let observed = self.setup.surroundings().await;
            let observed = observed.map_err(|error| Problem::failed(&error))?;
            let chosen = self.owner.try_out(&Command::CreateNetwork(local), &observed)?;
            let chosen = &chosen.networks()[&spec.name].setup;
            let subnets = chosen.subnets.iter();
            let subnets = subnets.map(|one| Subnet { subnet: one.subnet, gateway: one.gateway });
            let network = Network {
                vni,
                subnets: subnets.collect(),
                mtu: chosen.mtu,
                internal: spec.internal,
            };
            if let Some(refusal) = obstacle(&own, &name, &network) {
                return Err(Problem::conflict(&refusal));
            }
            match agent.create(&name, network).await {
                Ok(()) => {}
                // Another host has created a network meanwhile.
                Err(MeshError::Refused(Refusal::SubnetsOverlap { .. }))
                    if spec.subnets.is_empty() =>
                {
                    sleep(Duration::from_millis(50)).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            let is_there = |cluster: &Arc<Cluster>| cluster.view.networks.contains_key(&name);
            let _ = timeout(PATIENCE, seen.wait_for(is_there)).await;
            self.follow_cluster().await;
            return match self.owner.state().networks().contains_key(&spec.name) {
                true => Ok(()),
                false => Err(Problem::failed(&format!(
                    "network {name} is in the cluster, and not available here; see tidegate mesh status"
                ))),
            };
        }
        Err(Problem::conflict(&format!(
            "network {name}: other hosts create networks at the same time; retry"
        )))
    }

    /// Executes `command`. What it changes on overlay networks is changed in the cluster first.
    ///
    /// # Errors
    /// The command was refused or failed, and changed nothing.
    pub(super) async fn command(
        &mut self,
        command: &Command,
        reserved: Reserved,
    ) -> Result<(), Problem> {
        let state = self.owner.state();
        let is_overlay = |name: &Name| {
            state.networks().get(name).is_some_and(|network| network.setup.overlay.is_some())
        };
        match command {
            Command::Attach(spec) if spec.networks.iter().any(|one| is_overlay(&one.network)) => {
                if let Some(task) = &spec.task {
                    self.check_task(spec, &task.service)?;
                }
                self.attach_to_overlay(spec, reserved).await?;
                self.follow_services_after(command, &state).await;
                Ok(())
            }
            Command::Attach(AttachSpec { name, task: Some(task), .. }) => {
                Err(Problem::bad_request(&format!(
                    "endpoint {name}: service {} is reached on an overlay network; attach it to that network",
                    task.service
                )))
            }
            Command::Detach(name) => {
                let detached = self.detach(name).await;
                self.follow_services_after(command, &state).await;
                detached
            }
            Command::RemoveNetwork(name) if is_overlay(name) => {
                self.mesh()?.agent.delete(&name.to_string()).await?;
                let (agent, kept) = (Arc::clone(&self.mesh()?.agent), local_networks(&state));
                let text = name.to_string();
                agent.set_networks(kept.into_iter().filter(|one| one.name != text).collect()).await;
                self.local_command(command, reserved).await
            }
            _ => self.local_command(command, reserved).await,
        }
    }

    /// Detaches an endpoint. Its records in the cluster are removed first.
    async fn detach(&mut self, name: &Name) -> Result<(), Problem> {
        let state = self.owner.state();
        if let Some(endpoint) = state.endpoints().get(name) {
            let id = self.member.mesh().map_or("", |mesh| &mesh.own.id);
            self.release(&records(&state, endpoint, id)).await?;
        }
        let command = Command::Detach(name.clone());
        let detached = self.local_command(&command, Reserved::new()).await;
        self.sync_endpoints().await;
        detached
    }

    /// Returns whether the endpoint of `spec` can be a task of `service`.
    fn check_task(&self, spec: &AttachSpec, service: &str) -> Result<(), Problem> {
        let cluster = Arc::clone(&self.mesh()?.cluster.borrow());
        let known = cluster.view.services.get(service);
        let known = known
            .ok_or_else(|| Problem::not_found(&Refusal::UnknownService(service.to_owned())))?;
        if spec.networks.iter().any(|one| one.network.to_string() == known.network) {
            return Ok(());
        }
        Err(Problem::bad_request(&format!(
            "endpoint {}: the tasks of service {service} are on network {}; attach it to that network",
            spec.name, known.network
        )))
    }

    /// Adapts the services after a command on an endpoint that is a task, before or after it.
    async fn follow_services_after(&mut self, command: &Command, before: &State) {
        let is_task = match command {
            Command::Attach(spec) => spec.task.is_some(),
            Command::Detach(name) => {
                before.endpoints().get(name).is_some_and(|endpoint| endpoint.task.is_some())
            }
            _ => false,
        };
        if is_task {
            self.follow_services(false).await;
        }
    }

    async fn release(&self, records: &[((String, String), Endpoint)]) -> Result<(), Problem> {
        if records.is_empty() {
            return Ok(());
        }
        let agent = Arc::clone(&self.mesh()?.agent);
        for ((network, name), _) in records {
            agent.release(network, name).await?;
        }
        Ok(())
    }

    /// Tells the agent which endpoints exist.
    async fn sync_endpoints(&self) {
        let Some(mesh) = self.member.mesh() else { return };
        let state = self.owner.state();
        let endpoints =
            state.endpoints().values().flat_map(|endpoint| mesh.records(&state, endpoint));
        let endpoints = endpoints.collect();
        mesh.agent.set_endpoints(endpoints).await;
    }

    pub(super) async fn attach_to_overlay(
        &mut self,
        spec: &AttachSpec,
        mut reserved: Reserved,
    ) -> Result<(), Problem> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.try_to_attach(spec, &mut reserved).await {
                Err(Refused::AddressTaken(problem)) => last = Some(problem),
                Err(Refused::Other(problem)) => return Err(problem),
                Ok(()) => return Ok(()),
            }
            // The view of this host follows within milliseconds.
            sleep(Duration::from_millis(50)).await;
        }
        Err(last.unwrap_or_else(|| Problem::failed(&"no address was found; retry")))
    }

    async fn try_to_attach(
        &mut self,
        spec: &AttachSpec,
        reserved: &mut Reserved,
    ) -> Result<(), Refused> {
        if let Some(project) = spec.name.project().filter(|_| !spec.name.is_sandbox()) {
            return Err(Problem::bad_request(&format!(
                "endpoint {}: services of project {project} cannot be attached to overlay networks yet",
                spec.name
            ))
            .into());
        }
        let mesh = self.mesh()?;
        let agent = Arc::clone(&mesh.agent);
        let cluster = Arc::clone(&mesh.cluster.borrow());
        if let StoreState::Lost(error) = &cluster.store {
            return Err(Problem::from(MeshError::from(error.clone())).into());
        }
        let old = self.owner.state();
        let mut chosen = BTreeSet::new();
        let mut networks = Vec::new();
        for wanted in &spec.networks {
            let mut addresses = wanted.addresses.clone();
            let network = old.networks().get(&wanted.network);
            if network.is_some_and(|network| network.setup.overlay.is_some()) {
                let free =
                    free_addresses(&cluster.view, &wanted.network.to_string(), &addresses, now());
                let free: Vec<IpAddr> = free.map_err(|refusal| Problem::conflict(&refusal))?;
                chosen.extend(free.iter().copied());
                addresses.extend(free);
            }
            networks.push(NetworkAttachment { addresses, ..wanted.clone() });
        }
        let command = Command::Attach(AttachSpec { networks, ..spec.clone() });
        let new = self.owner.decide(&command, &Observed::default())?;
        if let Member::Yes(mesh) = &mut self.member
            && spec.task.is_some()
        {
            // It gets connections once it can reply.
            mesh.health.starts(&spec.name.to_string());
        }
        let claims = self.mesh()?.records(&new, &new.endpoints()[&spec.name]);
        for ((network, name), endpoint) in &claims {
            let claimed = agent.claim(network, name, endpoint.clone()).await;
            if let Err(error) = claimed {
                self.sync_endpoints().await;
                let is_race = match &error {
                    MeshError::Refused(
                        Refusal::AddressTaken { address, .. }
                        | Refusal::Quarantined { address, .. },
                    ) => chosen.contains(address),
                    _ => false,
                };
                let problem = Problem::from(error);
                return Err(if is_race { Refused::AddressTaken(problem) } else { problem.into() });
            }
        }
        let executed = self.execute(&old, new, reserved).await;
        if executed.is_err() {
            self.sync_endpoints().await;
        }
        Ok(executed?)
    }
}

/// Removes the guard of an agent that has ended.
async fn remove_stale_guard(host: &Namespace) -> io::Result<()> {
    let links = Links::open(host)?.host_links().await?;
    vtep_guard::remove_stale(host, &links)
}

/// The network of this host for `network` of the cluster.
fn spec_of(name: Name, network: &Network) -> NetworkSpec {
    let subnets: Vec<_> =
        network.subnets.iter().map(|one| (one.subnet, Some(one.gateway))).collect();
    NetworkSpec {
        ipv6: subnets.iter().any(|(subnet, _)| subnet.addr().is_ipv6()),
        subnets,
        mtu: Some(network.mtu),
        overlay: Some(Overlay { vni: network.vni, internal: network.internal }),
        ..NetworkSpec::new(name)
    }
}
