//! The services of the cluster on this host.
//!
//! ```text
//!   client ─► port of the host ─► BalancedUpstream ─► socket in the sandbox ─► bridge, VXLAN ─► task
//!                                                       ▲                                        │
//!                                                       └── ReplySteering at the port of the task ◄─ rule in the task
//! ```
//!
//! Everything is level-triggered: [`Instance::follow_services`] compares what exists with the
//! cluster, after each change of the cluster and once a second. A sandbox exists for each network
//! with services. It is an endpoint of the state, so its addresses are claimed in the cluster, and
//! its links are repaired like those of containers. Its namespace has no path, and ends with the
//! process.

use super::balanced::{BalancedUpstream, Registry};
use super::health::Check;
use super::{Instance, Member};
use crate::api::{Problem, Reserved, blocking};
use crate::instance::names::dns_name;
use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;
use tidegate_control::{AttachSpec, Endpoint, Name, NetworkAttachment, State};
use tidegate_dns::EndpointSpec;
use tidegate_mesh::agent::Cluster;
use tidegate_mesh::balance::TargetId;
use tidegate_mesh::record::{Binding, ClientSource, Service, ServicePort};
use tidegate_mesh::services::{Task, tasks};
use tidegate_model::{MacAddress, Protocol};
use tidegate_netfilter::{ReplySteering, Sandboxes};
use tidegate_netns::{
    Family, Namespace, NamespaceId, PolicyRoute, Route, Selector, Steered, interface_index,
};
use tidegate_netsetup::Attachment;
use tidegate_proxy::{GatewayAcl, ProxyProtocol};
use tidegate_publish::client_address::Sandbox;
use tidegate_publish::publisher::PublishTarget;

/// The services of the cluster on this host.
pub(super) struct Services {
    /// The services that are forwarded.
    pub(super) registry: Registry,
    /// Open sandboxes by network.
    sandboxes: BTreeMap<String, OpenSandbox>,
    /// Services with a port that is open.
    published: BTreeMap<String, Published>,
    /// Tasks on this host whose replies are steered, by endpoint.
    tasks: BTreeMap<String, SteeredTask>,
    /// Tasks of the last time, on all hosts.
    known: BTreeSet<TargetId>,
    /// Addresses of the names of services, by network and service.
    names: BTreeMap<(String, String), Vec<IpAddr>>,
    /// What failed, by object, and since when.
    problems: BTreeMap<String, String>,
    since: BTreeMap<String, SystemTime>,
}

struct OpenSandbox {
    sandbox: Arc<Sandbox>,
    own: Vec<IpAddr>,
    /// The MAC addresses of the sandboxes of all hosts on the network.
    stations: Sandboxes,
    known: BTreeSet<MacAddress>,
}

struct Published {
    service: Service,
    binding: Binding,
}

struct SteeredTask {
    wanted: Steering,
    steering: ReplySteering,
    _rules: Vec<Steered>,
}

/// What the replies of a task depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Steering {
    namespace: NamespaceId,
    /// The sandbox of this host.
    gateways: Vec<IpAddr>,
    /// Host end of the link on the network of the service.
    link: u32,
    attachment: Attachment,
    /// Networks to which packets go directly.
    direct: Vec<ipnet::IpNet>,
    ports: BTreeSet<(Protocol, u16)>,
}

/// The name of a service as an endpoint with published ports. No endpoint has this name.
pub(super) fn publisher_name(service: &str) -> String {
    format!("service {service}")
}

/// The path of the namespace of a sandbox, for the state. No such file exists.
fn path_of(network: &Name) -> PathBuf {
    PathBuf::from(format!("/proc/tidegate/sandbox/{network}"))
}

impl Services {
    /// No services.
    pub(super) fn new(registry: Registry) -> Self {
        let (sandboxes, published, tasks, known, names) = Default::default();
        let (problems, since) = Default::default();
        Self { registry, sandboxes, published, tasks, known, names, problems, since }
    }

    /// What failed, and since when.
    pub(super) fn problems(&self) -> impl Iterator<Item = (&String, SystemTime)> {
        self.problems.iter().filter_map(|(object, text)| Some((text, *self.since.get(object)?)))
    }

    /// Reports problems that are new. `before` are those of the last time.
    fn compare_problems(&mut self, before: &BTreeMap<String, String>) {
        self.since.retain(|object, _| before.get(object) == self.problems.get(object));
        for (object, problem) in &self.problems {
            if !self.since.contains_key(object) {
                tracing::warn!("{problem}");
                self.since.insert(object.clone(), SystemTime::now());
            }
        }
    }

    /// What this host has made of the services.
    fn bindings(&self, cluster: &Cluster) -> BTreeMap<String, Binding> {
        let of = |name: &String| {
            let published = self.published.get(name).map(|one| one.binding.clone());
            let waiting =
                || Binding { ports: Vec::new(), problem: self.problems.get(name).cloned() };
            (name.clone(), published.unwrap_or_else(waiting))
        };
        cluster.view.services.keys().map(of).collect()
    }
}

impl Instance {
    /// Makes the services of the cluster those of this host. With `verify`, also restores programs
    /// that other software has removed, which takes time in proportion to the tasks.
    pub(in crate::instance) async fn follow_services(&mut self, verify: bool) {
        let Member::Yes(mesh) = &mut self.member else { return };
        let cluster = Arc::clone(&mesh.cluster.borrow());
        if !cluster.is_known {
            return;
        }
        let empty = Services::new(Arc::clone(&self.services));
        let mut services = std::mem::replace(&mut mesh.services, empty);
        let before = std::mem::take(&mut services.problems);
        let wanted: BTreeSet<Name> = cluster
            .view
            .services
            .values()
            .filter_map(|service| service.network.parse().ok())
            .filter(|name| self.owner.state().networks().contains_key(name))
            .collect();
        self.close_services(&mut services, |name| cluster.view.services.get(name)).await;
        self.close_sandboxes(&mut services, &wanted).await;
        for network in &wanted {
            if let Err(problem) = self.open_sandbox(&mut services, network, &cluster).await {
                let text = format!("network {network}: ingress sandbox: {problem}");
                services.problems.insert(format!("network {network}"), text);
            }
        }
        for (name, service) in &cluster.view.services {
            if let Err(problem) = self.publish_service(&mut services, name, service, &cluster).await
            {
                services.problems.insert(name.clone(), format!("service {name}: {problem}"));
            }
        }
        self.steer_replies(&mut services, &cluster, verify).await;
        self.end_connections(&mut services, &cluster).await;
        let checks = self.checks(&services, &cluster);
        self.name_services(&mut services, &cluster);
        services.compare_problems(&before);
        let bindings = services.bindings(&cluster);
        let state = self.owner.state();
        let tasks = state.endpoints().values().filter(|endpoint| {
            let service = endpoint.task.as_ref().map(|task| &task.service);
            service.is_some_and(|service| cluster.view.services.contains_key(service))
        });
        let names = tasks.map(|endpoint| endpoint.setup.name.clone());
        let mute = names.filter(|name| !services.tasks.contains_key(name)).collect();
        let Member::Yes(mesh) = &mut self.member else { return };
        mesh.services = services;
        mesh.health.set(checks, &mute);
        mesh.agent.set_bindings(bindings).await;
        self.sync_endpoints().await;
    }

    /// Resets connections to tasks that were removed, or whose host has been down for longer than
    /// its lease. Their addresses may get other owners.
    async fn end_connections(&mut self, services: &mut Services, cluster: &Cluster) {
        let names = cluster.view.services.keys();
        let known: BTreeSet<TargetId> =
            names.flat_map(|name| tasks_of(cluster, name).into_keys()).collect();
        let gone: BTreeSet<TargetId> = services.known.difference(&known).copied().collect();
        services.known = known;
        if !gone.is_empty() {
            let publisher = Arc::clone(&self.up.publisher);
            let _ = blocking(move || publisher.end_backends(gone)).await;
        }
    }

    /// The health checks of the tasks on this host, by endpoint.
    fn checks(
        &self,
        services: &Services,
        cluster: &Cluster,
    ) -> BTreeMap<String, (Check, Namespace, Namespace)> {
        let state = self.owner.state();
        let of = |endpoint: &Arc<Endpoint>| {
            let task = endpoint.task.as_ref()?;
            let service = cluster.view.services.get(&task.service)?;
            let command = task.health_command.clone();
            if service.health.is_none() && command.is_none() {
                return None;
            }
            let name = endpoint.setup.name.clone();
            let network: Name = service.network.parse().ok()?;
            let sandbox = services.sandboxes.get(&service.network)?.sandbox.namespace().clone();
            let namespace = self.up.publisher.namespace(&name)?;
            let check = Check {
                check: service.health.clone(),
                command,
                address: endpoint.addresses_on(&network).next()?,
                namespace: namespace.id(),
                sandbox: sandbox.id(),
            };
            Some((name, (check, namespace, sandbox)))
        };
        state.endpoints().values().filter_map(of).collect()
    }

    /// Closes everything that belongs to services.
    pub(super) async fn end_services(&mut self) {
        let Member::Yes(mesh) = &mut self.member else { return };
        let empty = Services::new(Arc::clone(&self.services));
        let mut services = std::mem::replace(&mut mesh.services, empty);
        self.close_services(&mut services, |_| None).await;
        services.tasks.clear();
        for ((network, service), _) in std::mem::take(&mut services.names) {
            self.remove_service_name(&network, &service);
        }
        self.close_sandboxes(&mut services, &BTreeSet::new()).await;
    }

    /// Closes the ports of services that have other ones now, or none.
    async fn close_services<'a>(
        &mut self,
        services: &mut Services,
        wanted: impl Fn(&str) -> Option<&'a Service>,
    ) {
        // Its tasks follow the number of replicas by themselves.
        let without_replicas = |service: &Service| Service { replicas: None, ..service.clone() };
        let is_stale = |(name, one): &(&String, &Published)| {
            wanted(name).map(without_replicas).as_ref() != Some(&without_replicas(&one.service))
        };
        let stale: Vec<String> =
            services.published.iter().filter(is_stale).map(|(name, _)| name.clone()).collect();
        for name in stale {
            services.published.remove(&name);
            self.unpublish_service(services, &name).await;
            tracing::info!(service = name, "service closed");
        }
    }

    async fn unpublish_service(&mut self, services: &Services, name: &str) {
        let registry = &services.registry;
        drop(registry.write().unwrap_or_else(PoisonError::into_inner).remove(name));
        let (publisher, of) = (Arc::clone(&self.up.publisher), publisher_name(name));
        let _ = blocking(move || publisher.remove_endpoint(&of)).await;
    }

    /// Removes the sandboxes on networks that are not `wanted`.
    async fn close_sandboxes(&mut self, services: &mut Services, wanted: &BTreeSet<Name>) {
        let state = self.owner.state();
        for name in state.endpoints().keys().filter(|name| name.is_sandbox()) {
            let network = dns_name(&name.to_string()).to_owned();
            if wanted.iter().any(|one| one.name() == network) {
                continue;
            }
            // Nothing of it is left in the namespaces of tasks.
            services.tasks.retain(|_, task| task.wanted.attachment.network != network);
            services.sandboxes.remove(&network);
            if let Err(problem) = self.detach(name).await {
                let text = format!("network {network}: ingress sandbox not removed: {problem}");
                services.problems.insert(format!("network {network}"), text);
            }
        }
    }

    /// Opens the sandbox on `network`, and tells its guards which sandboxes there are.
    async fn open_sandbox(
        &mut self,
        services: &mut Services,
        network: &Name,
        cluster: &Cluster,
    ) -> Result<(), Problem> {
        let name = Name::sandbox_on(network);
        if !self.owner.state().endpoints().contains_key(&name) {
            let attachment =
                NetworkAttachment { any_source: true, ..NetworkAttachment::new(network.clone()) };
            let spec = AttachSpec {
                name: name.clone(),
                namespace: path_of(network),
                networks: vec![attachment],
                hostname: None,
                dns: Vec::new(),
                ports: Vec::new(),
                task: None,
            };
            self.attach_to_overlay(&spec, Reserved::new()).await?;
        }
        let text = network.to_string();
        let state = self.owner.state();
        let endpoint = &state.endpoints()[&name];
        let own: Vec<IpAddr> = endpoint.addresses_on(network).collect();
        if services.sandboxes.get(&text).is_none_or(|open| open.own != own) {
            let namespace = self.up.publisher.namespace(&endpoint.setup.name);
            let namespace = namespace.ok_or_else(|| Problem::failed(&"it is not attached"))?;
            let interface = endpoint.setup.attachments.first().map(|one| one.inside.name.clone());
            let (host, addresses) = (self.host.clone(), own.clone());
            let sandbox = blocking(move || {
                Sandbox::new(&host, &namespace, &interface.unwrap_or_default(), &addresses)
            });
            let sandbox = Arc::new(sandbox.await?.map_err(|error| Problem::failed(&error))?);
            let stations = Sandboxes::new().map_err(|error| Problem::failed(&error))?;
            let known = BTreeSet::new();
            services.sandboxes.insert(text.clone(), OpenSandbox { sandbox, own, stations, known });
        }
        let Some(open) = services.sandboxes.get_mut(&text) else { return Ok(()) };
        let there = cluster.view.endpoints_on(&text).filter(|(_, one)| one.is_sandbox());
        let mut wanted: BTreeSet<MacAddress> = there.map(|(_, one)| one.mac).collect();
        wanted.extend(endpoint.setup.attachments.iter().map(|one| one.inside.mac));
        let change = || -> io::Result<()> {
            wanted.difference(&open.known).try_for_each(|mac| open.stations.insert(*mac))?;
            open.known.difference(&wanted).try_for_each(|mac| open.stations.remove(*mac))
        };
        change().map_err(|error| Problem::failed(&error))?;
        open.known = wanted;
        Ok(())
    }

    /// Opens the ports of a service.
    async fn publish_service(
        &mut self,
        services: &mut Services,
        name: &str,
        service: &Service,
        cluster: &Cluster,
    ) -> Result<(), Problem> {
        if services.published.get(name).is_some_and(|one| one.binding.problem.is_none()) {
            return Ok(());
        }
        let Some(open) = services.sandboxes.get(&service.network) else {
            // Its problem is known.
            let text = format!("network {} is not available here", service.network);
            return Err(Problem::failed(&text));
        };
        let endpoint = publisher_name(name);
        if !services.published.contains_key(name) {
            let upstream = BalancedUpstream::new(
                name,
                service,
                Arc::clone(&open.sandbox),
                self.up.shown.subscribe(),
            );
            upstream.follow(name, cluster);
            let upstream = Arc::new(upstream);
            let acl = Arc::clone(&self.up.gateway_networks);
            let acl = GatewayAcl::new(acl, [service.network.clone()]);
            let header = match service.source {
                ClientSource::ProxyProtocolV1 => Some(ProxyProtocol::V1),
                ClientSource::ProxyProtocol => Some(ProxyProtocol::V2),
                ClientSource::Client | ClientSource::Proxy => None,
            };
            let target = PublishTarget::new(open.sandbox.namespace().clone(), &[], acl)
                .balanced_by(Arc::clone(&upstream) as _, header);
            self.up.publisher.add_endpoint(&endpoint, target);
            let registry = &services.registry;
            registry
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(name.to_owned(), upstream);
            let binding = Binding { ports: Vec::new(), problem: None };
            let published = Published { service: service.clone(), binding };
            services.published.insert(name.to_owned(), published);
        }
        let Some(published) = services.published.get_mut(name) else { return Ok(()) };
        published.binding.problem = None;
        let mut first = Ok(());
        for port in &service.ports {
            if published.binding.ports.contains(port) {
                continue;
            }
            match self.open_service_port(&endpoint, *port).await {
                Ok(()) => {
                    published.binding.ports.push(*port);
                    tracing::info!(service = name, publish = %port, "service published");
                }
                Err(problem) => {
                    published.binding.problem.get_or_insert(problem.to_string());
                    first = first.and(Err(problem));
                }
            }
        }
        first
    }

    async fn open_service_port(&self, endpoint: &str, port: ServicePort) -> Result<(), Problem> {
        let ServicePort { protocol, published, target } = port;
        let spec = format!("{published}:{target}/{protocol}");
        let spec = spec.parse().map_err(|error| Problem::failed(&error))?;
        let (publisher, endpoint) = (Arc::clone(&self.up.publisher), endpoint.to_owned());
        blocking(move || publisher.publish(&endpoint, &spec)).await??;
        Ok(())
    }

    /// Makes the tasks on this host reply to the sandbox that a connection came from.
    async fn steer_replies(&mut self, services: &mut Services, cluster: &Cluster, verify: bool) {
        let state = self.owner.state();
        let mut wanted = BTreeMap::new();
        for endpoint in state.endpoints().values() {
            if let Some(steering) = self.steering_of(services, endpoint, cluster, &state) {
                wanted.insert(endpoint.setup.name.clone(), steering);
            }
        }
        // The rules of a task that is different now are removed first.
        services.tasks.retain(|name, task| wanted.get(name) == Some(&task.wanted));
        for (name, wanted) in wanted {
            if let Some(known) = services.tasks.get(&name) {
                if !verify {
                    continue;
                }
                let attached = self.host.with(|| known.steering.attach(wanted.link)).flatten();
                if let Err(error) = attached {
                    let text = format!("endpoint {name}: replies are not steered: {error}");
                    services.problems.insert(format!("endpoint {name}"), text);
                }
                continue;
            }
            let Some(open) = services.sandboxes.get(&wanted.attachment.network) else { continue };
            let Some(namespace) = self.up.publisher.namespace(&name) else { continue };
            match self.steer(open, namespace, wanted).await {
                Ok(task) => drop(services.tasks.insert(name, task)),
                Err(error) => {
                    let text = format!("endpoint {name}: replies are not steered: {error:#}");
                    services.problems.insert(format!("endpoint {name}"), text);
                }
            }
        }
    }

    /// What the replies of `endpoint` depend on, if it is a task of a service.
    fn steering_of(
        &self,
        services: &Services,
        endpoint: &Endpoint,
        cluster: &Cluster,
        state: &State,
    ) -> Option<Steering> {
        let service = cluster.view.services.get(&endpoint.task.as_ref()?.service)?;
        let attachments = &endpoint.setup.attachments;
        let attachment = attachments.iter().find(|one| one.network == service.network)?;
        let open = services.sandboxes.get(&service.network)?;
        let namespace = self.up.publisher.namespace(&endpoint.setup.name)?;
        let link = self.host.with(|| interface_index(&attachment.host_end.name)).flatten().ok()?;
        let is_attached = |network: &str| attachments.iter().any(|one| one.network == network);
        let networks = state.networks().values().map(|network| &network.setup);
        let direct = networks.filter(|network| is_attached(&network.name));
        Some(Steering {
            namespace: namespace.id(),
            gateways: open.own.clone(),
            link,
            attachment: attachment.clone(),
            direct: direct
                .flat_map(|network| network.subnets.iter().map(|one| one.subnet.trunc()))
                .collect(),
            ports: service.ports.iter().map(|port| (port.protocol, port.target)).collect(),
        })
    }

    /// Adds the rules in the namespace of a task, and the programs at its port.
    async fn steer(
        &self,
        open: &OpenSandbox,
        namespace: Namespace,
        wanted: Steering,
    ) -> anyhow::Result<SteeredTask> {
        let steering = ReplySteering::new(&open.stations).context("eBPF")?;
        self.host.with(|| steering.attach(wanted.link)).flatten().context("eBPF")?;
        let of = wanted.clone();
        let rules = blocking(move || add_rules(&namespace, &of)).await;
        let rules = rules.map_err(|problem| anyhow::anyhow!("{problem}"))??;
        Ok(SteeredTask { wanted, steering, _rules: rules })
    }

    /// Gives the services their names: those of all tasks that are ready.
    fn name_services(&mut self, services: &mut Services, cluster: &Cluster) {
        let mut wanted = BTreeMap::new();
        for (name, service) in &cluster.view.services {
            let tasks = tasks_of(cluster, name);
            let ready = tasks.into_values().filter(|task| task.target.is_ready);
            let addresses: Vec<IpAddr> = ready.flat_map(|task| task.addresses).collect();
            let is_local = |network: &Name| self.owner.state().networks().contains_key(network);
            if service.network.parse().is_ok_and(|network| is_local(&network)) {
                wanted.insert((service.network.clone(), name.clone()), addresses);
            }
        }
        for (network, service) in services.names.keys() {
            if !wanted.contains_key(&(network.clone(), service.clone())) {
                self.remove_service_name(network, service);
            }
        }
        services.names.retain(|key, _| wanted.contains_key(key));
        for (key, addresses) in wanted {
            if services.names.get(&key) == Some(&addresses) {
                continue;
            }
            let (network, service) = &key;
            let spec = EndpointSpec {
                container: publisher_name(service),
                name: service.clone(),
                aliases: Vec::new(),
                hostname: None,
                addresses: addresses.clone(),
            };
            match self.up.names.resolver().add_endpoint(network, &spec) {
                Ok(()) => drop(services.names.insert(key, addresses)),
                Err(error) => {
                    let text = format!("service {service}: name not added: {error}");
                    services.problems.insert(format!("name {service}"), text);
                }
            }
        }
    }

    fn remove_service_name(&self, network: &str, service: &str) {
        let container = publisher_name(service);
        self.up.names.resolver().remove_endpoint(network, &container, service);
    }
}

/// The tasks of a service, as this host sees them.
fn tasks_of(cluster: &Cluster, service: &str) -> BTreeMap<TargetId, Task> {
    tasks(&cluster.view, service, &cluster.own, &|host| cluster.hears(host))
}

/// Adds the rules that send replies of a service to the sandbox of this host. The programs at the
/// port replace that by the sandbox from which the connection came.
///
/// The rules select by source port, so connections that the container opens itself are not
/// affected. A reply over UDP often has no source address yet: its socket is bound to all of them.
fn add_rules(namespace: &Namespace, wanted: &Steering) -> anyhow::Result<Vec<Steered>> {
    let inside = &wanted.attachment.inside.name;
    let link = namespace
        .with(|| interface_index(inside))
        .flatten()
        .with_context(|| format!("interface {inside}"))?;
    let via = wanted.gateways.iter().map(|gateway| Route::Via { gateway: *gateway, link });
    let families: BTreeSet<Family> = wanted.gateways.iter().map(|ip| Family::of(*ip)).collect();
    let direct = wanted.direct.iter().map(|subnet| Route::Throw(*subnet));
    let routes = via.chain(direct).filter(|route| families.contains(&route.family())).collect();
    let routes = Arc::new(PolicyRoute::install_via(namespace, routes)?);
    let mut rules = Vec::new();
    for address in wanted.attachment.addresses.iter().map(ipnet::IpNet::addr) {
        let family = Family::of(address);
        for (protocol, port) in wanted.ports.iter().filter(|_| families.contains(&family)) {
            rules.push(routes.steer(Selector {
                // Replies of connections that were not forwarded through a sandbox are marked.
                mark: Some(0),
                from: (*protocol == Protocol::Tcp).then_some(address),
                protocol: Some(*protocol),
                source_port: Some(*port),
                ..Selector::new(family)
            })?);
        }
    }
    Ok(rules)
}
