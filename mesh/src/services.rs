//! Services: ports that every host publishes, and the tasks behind them. Pure.
//!
//! ```text
//!   services/shop ─┐
//!   ports/tcp/80 ──┴─► every host listens ─► balancer ─► task, on any host
//!   endpoints/front/web-1 {task of shop} ────────┘
//! ```

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::balance::{MAX_WEIGHT, Target, TargetId};
use crate::key::Key;
use crate::membership::Refusal;
use crate::record::{Endpoint, EndpointState, HealthCheck, Probe, Record, Service, ServicePort};
use crate::store::{Transaction, Write};
use crate::view::View;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tidegate_model::Protocol;
use tidegate_model::registry::fnv1a;

/// Maximum number of services of a cluster.
pub const MAX_SERVICES: usize = 1_000;

/// Maximum number of ports of a service. Its creation is one transaction, and etcd accepts 128
/// operations in one (`--max-txn-ops`).
pub const MAX_PORTS: usize = 100;

/// Longest time for open connections of a task that is detached, in seconds.
pub const MAX_DRAIN_S: u32 = 3_600;

/// Longest time between two health checks, and for one, in milliseconds.
pub const MAX_INTERVAL_MS: u64 = 3_600_000;

/// A task of a service, as one host sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The name of the endpoint.
    pub name: String,
    /// ID of its host.
    pub node: String,
    /// Its addresses on the network of the service.
    pub addresses: Vec<IpAddr>,
    /// How it is used.
    pub target: Target,
    /// It is ready, and beyond the number of replicas.
    pub stands_by: bool,
}

/// Returns why `service` is not valid.
fn problem(service: &Service) -> Option<&'static str> {
    let ports: BTreeSet<(Protocol, u16)> =
        service.ports.iter().map(|port| (port.protocol, port.published)).collect();
    let is_zero = |port: &ServicePort| port.published == 0 || port.target == 0;
    let health = |check: &HealthCheck| {
        let times = [check.interval_ms, check.timeout_ms];
        match &check.probe {
            _ if times.iter().any(|time| !(1..=MAX_INTERVAL_MS).contains(time)) => {
                Some("the interval and the timeout of a health check are 1 ms to 1 hour")
            }
            _ if check.retries == 0 => Some("a health check has at least one try"),
            Probe::Tcp(0) | Probe::Http { port: 0, .. } => Some("the port of a health check is 0"),
            Probe::Http { path, .. }
                if !path.starts_with('/') || path.contains(|c: char| c <= ' ' || c == '\x7f') =>
            {
                Some("the path of a health check begins with a slash, and has no spaces")
            }
            _ => None,
        }
    };
    match () {
        () if service.ports.is_empty() => Some("a service has at least one port"),
        () if service.ports.len() > MAX_PORTS => Some("a service has at most 100 ports"),
        () if ports.len() < service.ports.len() => Some("a port is published twice"),
        () if service.ports.iter().any(is_zero) => Some("a port is 0"),
        () if service.ports.iter().any(|port| port.protocol == Protocol::Sctp) => {
            Some("SCTP is not supported")
        }
        () if service.drain_s > MAX_DRAIN_S => Some("the drain time is at most 3600 s"),
        () => service.health.as_ref().and_then(health),
    }
}

/// Returns the transaction that creates a service.
///
/// # Errors
/// It is not valid or exists, its network does not exist, or a port belongs to another service.
pub fn creation(view: &View, name: &str, service: &Service) -> Result<Transaction, Refusal> {
    if let Some(problem) = problem(service) {
        return Err(Refusal::InvalidService { service: name.to_owned(), problem });
    }
    if view.services.contains_key(name) {
        return Err(Refusal::ServiceExists(name.to_owned()));
    }
    if view.services.len() >= MAX_SERVICES {
        return Err(Refusal::TooManyServices);
    }
    if !view.networks.contains_key(&service.network) {
        return Err(Refusal::UnknownNetwork(service.network.clone()));
    }
    let keys = [Key::Service(name.to_owned()), Key::Network(service.network.clone())];
    let mut conditions: Vec<_> = keys.iter().map(|key| view.unmodified(key)).collect();
    let mut writes = vec![Record::Service(name.to_owned(), service.clone()).put(None)];
    for port in &service.ports {
        if let Some(holder) = view.ports.get(&(port.protocol, port.published)) {
            let (service, holder) = (name.to_owned(), holder.clone());
            return Err(Refusal::PortTaken { service, port: *port, holder });
        }
        conditions.push(view.unmodified(&Key::Port(port.protocol, port.published)));
        writes.push(Record::Port(port.protocol, port.published, name.to_owned()).put(None));
    }
    Ok(Transaction { conditions, writes })
}

/// Returns the transaction that removes a service. Its tasks stay attached.
///
/// # Errors
/// It does not exist.
pub fn removal(view: &View, name: &str) -> Result<Transaction, Refusal> {
    let known = view.services.contains_key(name);
    if !known {
        return Err(Refusal::UnknownService(name.to_owned()));
    }
    let ports = view.ports.iter().filter(|(_, holder)| *holder == name);
    let ports = ports.map(|((protocol, port), _)| Key::Port(*protocol, *port));
    let keys: Vec<Key> = ports.chain([Key::Service(name.to_owned())]).collect();
    Ok(Transaction {
        conditions: keys.iter().map(|key| view.unmodified(key)).collect(),
        writes: keys.iter().map(|key| Write::Delete(key.to_string())).collect(),
    })
}

/// Returns the transaction that sets the maximum number of tasks with connections; `None` for all.
///
/// # Errors
/// The service does not exist.
pub fn scaling(view: &View, name: &str, replicas: Option<u32>) -> Result<Transaction, Refusal> {
    let known = view.services.get(name);
    let known = known.ok_or_else(|| Refusal::UnknownService(name.to_owned()))?;
    let scaled = Service { replicas, ..known.clone() };
    Ok(Transaction {
        conditions: vec![view.unmodified(&Key::Service(name.to_owned()))],
        writes: vec![Record::Service(name.to_owned(), scaled).put(None)],
    })
}

/// Returns whether connections to `service` may be forwarded to `endpoint`.
fn is_ready(endpoint: &Endpoint, is_heard: &dyn Fn(&str) -> bool) -> bool {
    endpoint.state == EndpointState::Ready && is_heard(&endpoint.node)
}

/// Returns the tasks of `service`, as the host `own` sees them. `is_heard` tells whether a host is
/// heard.
///
/// With a limit of replicas, the first ready ones in the order of their names get connections: all
/// hosts choose the same ones, and one that fails is replaced by the next.
#[must_use]
pub fn tasks(
    view: &View,
    name: &str,
    own: &str,
    is_heard: &dyn Fn(&str) -> bool,
) -> BTreeMap<TargetId, Task> {
    let Some(service) = view.services.get(name) else { return BTreeMap::new() };
    let mut left = service.replicas.unwrap_or(u32::MAX);
    let mut tasks = BTreeMap::new();
    for (endpoint_name, endpoint) in view.endpoints_on(&service.network) {
        let Some(weight) = endpoint.weight_in(name) else { continue };
        let could = is_ready(endpoint, is_heard);
        let is_ready = could && left > 0;
        left -= u32::from(is_ready);
        let target = Target {
            weight: weight.clamp(1, MAX_WEIGHT),
            is_ready,
            is_local: endpoint.node == own,
        };
        let task = Task {
            name: endpoint_name.to_owned(),
            node: endpoint.node.clone(),
            addresses: endpoint.addresses.clone(),
            target,
            stands_by: could && !is_ready,
        };
        tasks.insert(id(endpoint_name, endpoint), task);
    }
    tasks
}

/// Identifies an endpoint for its whole life.
fn id(name: &str, endpoint: &Endpoint) -> TargetId {
    let generation = endpoint.generation.to_be_bytes();
    fnv1a(&[name.as_bytes(), &[0], endpoint.node.as_bytes(), &[0], &generation].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::Method;
    use crate::key::PREFIX;
    use crate::record::{ClientSource, Network, Role, Subnet};
    use crate::store::{ClusterStore, Embedded};
    use tidegate_model::MacAddress;

    fn service(ports: &[u16]) -> Service {
        let port =
            |port: &u16| ServicePort { protocol: Protocol::Tcp, published: *port, target: 80 };
        Service {
            network: "front".into(),
            ports: ports.iter().map(port).collect(),
            balance: Method::RoundRobin,
            prefers_local: false,
            source: ClientSource::Client,
            health: None,
            drain_s: 10,
            replicas: None,
        }
    }

    fn view_with_network() -> View {
        let subnet =
            Subnet { subnet: "10.9.0.0/24".parse().unwrap(), gateway: [10, 9, 0, 1].into() };
        let network = Network { vni: 9, subnets: vec![subnet], mtu: 1450, internal: false };
        View { networks: [("front".to_owned(), network)].into(), ..View::default() }
    }

    fn task(view: &mut View, name: &str, node: &str, state: EndpointState) {
        let number = u8::try_from(view.endpoints.len()).unwrap();
        let endpoint = Endpoint {
            node: node.into(),
            generation: 1,
            addresses: vec![[10, 9, 0, 2 + number].into()],
            mac: MacAddress([2, 0, 0, 0, 0, number]),
            state,
            aliases: Vec::new(),
            hostname: None,
            role: Role::Task { service: "shop".into(), weight: 1 },
        };
        view.endpoints.insert(("front".into(), name.into()), endpoint);
    }

    #[test]
    fn a_port_belongs_to_one_service() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Embedded::new();
            let network = view_with_network().networks["front"].clone();
            let network = crate::membership::creation(&View::default(), "front", &network).unwrap();
            store.commit(network).await.unwrap().unwrap();
            let view = async || {
                let (entries, revision) = store.list(PREFIX).await.unwrap();
                View::of(&entries, revision).0
            };
            let before = view().await;
            let [shop, other] =
                ["shop", "other"].map(|name| creation(&before, name, &service(&[80, 443])));
            assert!(store.commit(shop.unwrap()).await.unwrap().is_some());
            assert!(store.commit(other.unwrap()).await.unwrap().is_none(), "the port is claimed");
            let now = view().await;
            let error = creation(&now, "other", &service(&[8080, 443])).unwrap_err();
            assert_eq!(
                error.to_string(),
                "service other: port 443/tcp is published by service shop of the cluster"
            );
            assert!(matches!(
                creation(&now, "shop", &service(&[81])),
                Err(Refusal::ServiceExists(_))
            ));
            store.commit(scaling(&now, "shop", Some(1)).unwrap()).await.unwrap().unwrap();
            assert!(
                store.commit(removal(&now, "shop").unwrap()).await.unwrap().is_none(),
                "it was scaled meanwhile"
            );
            let now = view().await;
            assert_eq!(now.services["shop"].replicas, Some(1));
            store.commit(removal(&now, "shop").unwrap()).await.unwrap().unwrap();
            let now = view().await;
            assert!(now.services.is_empty() && now.ports.is_empty());
        });
    }

    #[test]
    fn invalid_services_are_refused() {
        let view = view_with_network();
        let with = |change: &dyn Fn(&mut Service)| {
            let mut service = service(&[80]);
            change(&mut service);
            creation(&view, "shop", &service)
        };
        assert!(with(&|_| {}).is_ok());
        let check = |probe| HealthCheck { probe, interval_ms: 1, timeout_ms: 1, retries: 1 };
        let invalid: [&dyn Fn(&mut Service); 8] = [
            &|service| service.ports.clear(),
            &|service| service.ports = vec![service.ports[0]; 2],
            &|service| service.ports[0].target = 0,
            &|service| service.ports[0].protocol = Protocol::Sctp,
            &|service| service.drain_s = MAX_DRAIN_S + 1,
            &|service| service.health = Some(check(Probe::Tcp(0))),
            &|service| service.health = Some(check(Probe::Http { port: 1, path: "up".into() })),
            &|service| {
                service.health = Some(HealthCheck { retries: 0, ..check(Probe::Tcp(1)) });
            },
        ];
        for change in invalid {
            assert!(matches!(with(change), Err(Refusal::InvalidService { .. })));
        }
        let elsewhere = with(&|service| service.network = "back".into());
        assert_eq!(elsewhere, Err(Refusal::UnknownNetwork("back".into())));
    }

    #[test]
    fn tasks_that_are_ready_on_hosts_that_are_heard_get_connections() {
        let mut view = view_with_network();
        view.services.insert("shop".into(), service(&[80]));
        task(&mut view, "a", "one", EndpointState::Starting);
        task(&mut view, "b", "silent", EndpointState::Ready);
        task(&mut view, "c", "one", EndpointState::Ready);
        task(&mut view, "d", "two", EndpointState::Draining);
        task(&mut view, "e", "two", EndpointState::Ready);
        let is_heard = |node: &str| node != "silent";
        let ready = |view: &View| -> Vec<(String, bool)> {
            let tasks = tasks(view, "shop", "one", &is_heard).into_values();
            let ready = tasks.filter(|task| task.target.is_ready);
            let mut ready: Vec<_> = ready.map(|task| (task.name, task.target.is_local)).collect();
            ready.sort();
            ready
        };
        assert_eq!(tasks(&view, "shop", "one", &is_heard).len(), 5);
        assert_eq!(ready(&view), [("c".into(), true), ("e".into(), false)]);
        view.services.get_mut("shop").unwrap().replicas = Some(1);
        assert_eq!(ready(&view), [("c".into(), true)]);
        view.endpoints.get_mut(&("front".into(), "c".into())).unwrap().state =
            EndpointState::Draining;
        assert_eq!(ready(&view), [("e".into(), false)], "the next one takes over");
    }
}
