//! What an instance starts with: the networks and endpoints of a Compose project, or those that the
//! store of a daemon has recorded.

use super::layout::{Layout, Surroundings, layout};
use super::names::{self, EndpointDns, NetworkDns};
use super::stored::{addresses_of, endpoint_dns, is_of_a_process, network_dns};
use crate::api::reserve_port;
use anyhow::{Context, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Instant;
use tidegate_compose::{Project, Run};
use tidegate_control::{Name, State};
use tidegate_model::{PortSpec, Protocol, registry};
use tidegate_netns::{HostContext, Namespace};
use tidegate_netsetup::{Endpoint, Observed, Opening, Setup};
use tidegate_proxy::Listener;
use tidegate_publish::bind::reserve;
use tidegate_publish::firewall::{PublishBy, opening, targets};
use tidegate_services::ServiceSpec;

/// Listening sockets, each with its container port, by service and protocol.
pub(super) type OpenPorts = BTreeMap<(String, Protocol), Vec<(Listener, u16)>>;

/// What an instance starts with.
pub(super) struct Initial<'a> {
    pub(super) layout: Layout,
    pub(super) networks: BTreeMap<String, NetworkDns>,
    pub(super) endpoints: BTreeMap<String, EndpointDns>,
    /// Endpoints of the state that are left out until their namespaces appear.
    pub(super) waiting: BTreeMap<Name, Endpoint>,
    pub(super) namespaces: BTreeMap<String, Namespace>,
    /// The paths of adopted namespaces, by endpoint.
    pub(super) adopted: BTreeMap<String, PathBuf>,
    pub(super) ports: OpenPorts,
    /// The project whose services are run.
    pub(super) project: Option<&'a Project>,
}

impl<'a> Initial<'a> {
    /// The networks and services of `project`.
    pub(super) fn of_project(project: &'a Project, observed: &Observed) -> anyhow::Result<Self> {
        let mut surroundings = Surroundings {
            observed,
            host_id: host_id(),
            random: &mut random_bytes,
            now: Instant::now(),
        };
        let layout = layout(project, &mut surroundings)?;
        // Bound before any change to the host.
        let ports = open_ports(project)?;
        let mut namespaces: BTreeMap<String, Namespace> = BTreeMap::new();
        let mut adopted = BTreeMap::new();
        for service in &project.services {
            let namespace = match &service.run {
                Run::Command(_) => HostContext::create_for_service()
                    .with_context(|| format!("service {:?}", service.name))?,
                Run::Adopt(path) => {
                    adopted.insert(service.name.clone(), path.clone());
                    Namespace::from_path(path)
                        .with_context(|| format!("service {:?}", service.name))?
                }
            };
            let shared = |(_, other): &(&String, &Namespace)| other.id() == namespace.id();
            if let Some((other, _)) = namespaces.iter().find(shared) {
                bail!(
                    "services {other:?} and {:?} are in the same namespace, {}; adopt it once",
                    service.name,
                    namespace.id()
                );
            }
            namespaces.insert(service.name.clone(), namespace);
        }
        let networks = project.networks.iter();
        let services = project.services.iter();
        Ok(Self {
            layout,
            networks: networks.map(|(name, one)| (name.clone(), NetworkDns::of(one))).collect(),
            endpoints: services.map(|one| (one.name.clone(), EndpointDns::of(one))).collect(),
            namespaces,
            adopted,
            ports,
            waiting: BTreeMap::new(),
            project: Some(project),
        })
    }
}

impl Initial<'_> {
    /// The networks and endpoints of `state`. An endpoint whose namespace does not exist, or is
    /// that of the host or of another endpoint, and a port that is in use, are logged and left out.
    ///
    /// A path below `/proc` refers to a process, whose ID may have been reused. The namespace there
    /// is only taken if it has the interfaces of the endpoint.
    pub(super) async fn of_state(
        state: &State,
        host_context: &HostContext,
        setup: &mut Setup,
    ) -> Self {
        let mut desired = state.desired();
        let (mut namespaces, mut adopted) = (BTreeMap::new(), BTreeMap::new());
        let (mut addresses, mut waiting) = (BTreeMap::new(), BTreeMap::new());
        let mut ports = OpenPorts::new();
        for (name, endpoint) in state.endpoints() {
            let text = name.to_string();
            // The previous one ended with its process.
            let opened = match name.is_sandbox() {
                true => Namespace::create().map_err(|error| error.to_string()),
                false => {
                    Namespace::from_path(&endpoint.namespace).map_err(|error| error.to_string())
                }
            };
            let found = match opened {
                Ok(namespace) => {
                    let shared = |other: &Namespace| other.id() == namespace.id();
                    setup.kernel().add_endpoint(&text, namespace.clone());
                    if shared(host_context.networks()) || namespaces.values().any(shared) {
                        Err("its path leads to the namespace of the host or of another endpoint"
                            .to_owned())
                    } else if !name.is_sandbox()
                        && is_of_a_process(&endpoint.namespace)
                        && !setup.has_interfaces(&desired, &text).await.unwrap_or(false)
                    {
                        Err("its process has ended, or has another network namespace".to_owned())
                    } else {
                        Ok(namespace)
                    }
                }
                Err(reason) => Err(reason),
            };
            let namespace = match found {
                Ok(namespace) => namespace,
                Err(reason) => {
                    tracing::warn!(endpoint = text, "endpoint not attached: {reason}");
                    setup.kernel().remove_endpoint(&text);
                    desired.endpoints.retain(|one| one.name != text);
                    waiting.insert(name.clone(), endpoint.setup.clone());
                    adopted.insert(text, endpoint.namespace.clone());
                    continue;
                }
            };
            for port in &endpoint.ports {
                match reserve_port(port) {
                    Ok(listener) => ports
                        .entry((text.clone(), port.protocol))
                        .or_default()
                        .push((listener, port.container_port)),
                    Err(problem) => {
                        tracing::error!(endpoint = text, publish = %port, "not published: {problem}");
                    }
                }
            }
            addresses.insert(text.clone(), addresses_of(endpoint));
            if !name.is_sandbox() {
                adopted.insert(text.clone(), endpoint.namespace.clone());
            }
            namespaces.insert(text, namespace);
        }
        let networks = state.networks().iter();
        let networks = networks.map(|(name, one)| (name.to_string(), network_dns(one))).collect();
        let endpoints = state.endpoints().iter();
        let endpoints =
            endpoints.map(|(name, one)| (name.to_string(), endpoint_dns(one))).collect();
        let layout = Layout { desired, addresses };
        Self { layout, networks, endpoints, waiting, namespaces, adopted, ports, project: None }
    }
}

/// Random bytes for MAC addresses and interface names. Without random bytes, names collide, and
/// creating the second interface fails.
pub(super) fn random_bytes() -> [u8; 6] {
    let mut bytes = [0; 6];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    bytes
}

/// Binds every published port of `project`.
pub(super) fn open_ports(project: &Project) -> anyhow::Result<OpenPorts> {
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

/// Five bytes that identify this host across restarts. They are a hash of the machine ID, which
/// must not be exposed itself (machine-id(5)).
pub(super) fn host_id() -> [u8; 5] {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let [.., a, b, c, d, e] =
        registry::folded_hash(format!("tidegate {}", id.trim()).as_bytes()).to_be_bytes();
    [a, b, c, d, e]
}

/// Returns the services that the supervisor runs. Services in adopted namespaces are not among
/// them.
pub(super) fn specs(
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
    let spec = |service: &tidegate_compose::Service| {
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

/// DNAT targets of the endpoint `name`.
pub(super) fn targets_of(layout: &Layout, name: &str) -> Vec<IpAddr> {
    let endpoint = layout.desired.endpoints.iter().find(|endpoint| endpoint.name == name);
    endpoint.map(targets).unwrap_or_default()
}

/// Returns the firewall openings for `ports`.
pub(super) fn openings(
    layout: &Layout,
    ports: &OpenPorts,
    publish: PublishBy,
) -> BTreeSet<Opening> {
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
