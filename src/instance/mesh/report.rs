//! Reports of the services of the cluster.

use super::balanced::Figures;
use super::{Instance, Member, Mesh};
use crate::api::Problem;
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use tidegate_api::types::{
    Balance, HealthCheck, MeshService, Probe, ServiceHost, ServicePort, ServiceSource, ServiceTask,
    TaskState, Transport,
};
use tidegate_mesh::agent::Cluster;
use tidegate_mesh::balance::Method;
use tidegate_mesh::record::{self, ClientSource, EndpointState, Service};
use tidegate_mesh::services::{Task, tasks};
use tidegate_model::Protocol;

impl Instance {
    /// Reports the services of the cluster.
    ///
    /// # Errors
    /// This host is in no cluster.
    pub(in crate::instance) fn service_reports(&self) -> Result<Vec<MeshService>, Problem> {
        let mesh = match &self.member {
            Member::Yes(mesh) => mesh,
            Member::No => {
                return Err(Problem::not_found(&tidegate_control::Refusal::NotInCluster));
            }
            Member::Failed { problem, .. } => return Err(Problem::unavailable(problem)),
        };
        let cluster = Arc::clone(&mesh.cluster.borrow());
        let services = cluster.view.services.iter();
        Ok(services.map(|(name, service)| report(mesh, &cluster, name, service)).collect())
    }
}

fn report(mesh: &Mesh, cluster: &Cluster, name: &str, service: &Service) -> MeshService {
    let registry = mesh.services.registry.read().unwrap_or_else(PoisonError::into_inner);
    let figures: BTreeMap<String, Figures> = match registry.get(name) {
        Some(upstream) => {
            upstream.tasks().into_iter().map(|(task, figures)| (task.name, figures)).collect()
        }
        None => BTreeMap::new(),
    };
    drop(registry);
    let seen = tasks(&cluster.view, name, &cluster.own, &|host| cluster.hears(host));
    let task = |task: Task| {
        let figures = figures.get(&task.name).copied().unwrap_or_default();
        ServiceTask {
            state: state(cluster, &service.network, &task, figures),
            name: task.name,
            host: task.node,
            addresses: task.addresses,
            weight: task.target.weight,
            open: figures.open,
            connections: figures.connections,
            failures: figures.failures,
            ejections: figures.ejections,
        }
    };
    let mut tasks: Vec<ServiceTask> = seen.into_values().map(task).collect();
    tasks.sort_by(|a, b| a.name.cmp(&b.name));
    let host = |host: &String| {
        let binding = cluster.view.bindings.get(&(name.to_owned(), host.clone()));
        ServiceHost {
            host: host.clone(),
            ports: binding
                .map(|binding| binding.ports.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
            problem: binding.and_then(|binding| binding.problem.clone()),
        }
    };
    MeshService {
        name: name.to_owned(),
        network: service.network.clone(),
        ports: service.ports.iter().map(port).collect(),
        balance: match service.balance {
            Method::RoundRobin => Balance::RoundRobin,
            Method::LeastConnections => Balance::LeastConn,
            Method::Source => Balance::Source,
        },
        prefer_local: service.prefers_local,
        source: match service.source {
            ClientSource::Client => ServiceSource::Client,
            ClientSource::Proxy => ServiceSource::Proxy,
            ClientSource::ProxyProtocol => ServiceSource::ProxyProtocol,
            ClientSource::ProxyProtocolV1 => ServiceSource::ProxyProtocolV1,
        },
        health: service.health.as_ref().map(health_check),
        drain_s: service.drain_s,
        replicas: service.replicas,
        tasks,
        hosts: cluster.view.nodes.keys().filter(|id| cluster.hears(id)).map(host).collect(),
    }
}

fn port(port: &record::ServicePort) -> ServicePort {
    ServicePort {
        protocol: match port.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        },
        published: port.published,
        target: port.target,
    }
}

fn health_check(check: &record::HealthCheck) -> HealthCheck {
    HealthCheck {
        probe: match &check.probe {
            record::Probe::Tcp(port) => Probe::Tcp(*port),
            record::Probe::Http { port, path } => Probe::Http { port: *port, path: path.clone() },
        },
        interval_ms: check.interval_ms,
        timeout_ms: check.timeout_ms,
        retries: check.retries,
    }
}

fn state(cluster: &Cluster, network: &str, task: &Task, figures: Figures) -> TaskState {
    let record = cluster.view.endpoints.get(&(network.to_owned(), task.name.clone()));
    match record.map(|record| record.state) {
        _ if !cluster.hears(&task.node) => TaskState::Silent,
        Some(EndpointState::Starting) => TaskState::Starting,
        Some(EndpointState::Draining) => TaskState::Draining,
        _ if task.stands_by => TaskState::Standby,
        _ if figures.is_ejected => TaskState::Ejected,
        _ => TaskState::Ready,
    }
}
