//! Metric families `tidegate_network_*`. They are rendered from the current state at each scrape,
//! so the series of an object end with the object.

use super::mesh::{BalancedUpstream, Figures, Registry};
use ::metrics::{Counter, counter, describe_counter};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::{Arc, PoisonError};
use tidegate_mesh::agent::{Status, StoreState};
use tidegate_model::exposition::{Family, Labels};
use tidegate_model::registry;
use tidegate_netfilter::{Dropped, Mechanism, PortGuards, SpoofReason};
use tidegate_netns::Namespace;
use tidegate_netsetup::{Change, Desired, Firewall, Network, RepairKind, capacity};
use tidegate_publish::publisher::Publisher;
use tidegate_services::Observer;

const INFO: Family = Family::gauge(
    "tidegate_network_info",
    "Always 1. The label bridge names the interface of the network on the host.",
);
const ENDPOINTS: Family = Family::gauge("tidegate_network_endpoints", "Endpoints on a network.");
const USED: Family = Family::gauge(
    "tidegate_network_addresses_used",
    "Addresses of a network in use, including the gateway.",
);
const FREE: Family =
    Family::gauge("tidegate_network_addresses_free", "Free addresses of a network.");
const ATTACHED: Family =
    Family::gauge("tidegate_network_endpoint_info", "Always 1: the endpoint is on the network.");
const PORTS: Family = Family::gauge(
    "tidegate_network_endpoint_ports",
    "Published ports of an endpoint, one per socket.",
);
const RELOCATIONS: Family = Family::counter(
    "tidegate_network_endpoint_relocations_total",
    "Times that an endpoint was re-attached because its container returned in another namespace.",
);

const RESTARTS: Family = Family::counter(
    "tidegate_network_endpoint_restarts_total",
    "Restarts of the command of an endpoint's service.",
);
const UPDATES: Family = Family::histogram(
    "tidegate_network_ruleset_update_seconds",
    "Duration of firewall updates: all rules, or those of ports that are published or closed.",
);
const UPDATES_FAILED: Family = Family::counter(
    "tidegate_network_ruleset_update_failures_total",
    "Updates that the firewall rejected.",
);

const TRACKED: [Family; 3] = [
    Family::gauge(
        "tidegate_network_tracked_flows",
        "Entries of the host's conntrack table, of containers and others.",
    ),
    Family::gauge(
        "tidegate_network_tracked_flows_limit",
        "Entries of the conntrack table above which containers lose flows.",
    ),
    Family::counter(
        "tidegate_network_evicted_tracked_flows_total",
        "Flows of containers that were evicted from the conntrack table.",
    ),
];

const SPOOFED: Family = Family::counter(
    "tidegate_network_spoofed_frames_total",
    "Frames of an endpoint that its port guard dropped because of a spoofed source.",
);

const POLICED: Family = Family::counter(
    "tidegate_network_policed_frames_total",
    "Frames of a flooding endpoint that its port guard dropped: new TCP connections beyond a rate.",
);

const MESH_STORE: Family =
    Family::gauge("tidegate_mesh_store_up", "1 if the cluster store answers, otherwise 0.");
const MESH_HOSTS: Family = Family::gauge(
    "tidegate_mesh_hosts",
    "Hosts of the cluster by state: heard (this one included) or silent.",
);
const MESH_LATENCY: Family = Family::gauge(
    "tidegate_mesh_latency_seconds",
    "Mean round-trip time of heartbeats between this host and another one.",
);
const MESH_HOST_ENDPOINTS: Family = Family::gauge(
    "tidegate_mesh_endpoints",
    "Endpoints on overlay networks, by the host that they are on.",
);
const MESH_STATIONS: Family = Family::gauge(
    "tidegate_mesh_remote_endpoints",
    "Endpoints of other hosts that are programmed on this one, by network.",
);
const MESH_DROPPED: Family = Family::counter(
    "tidegate_mesh_dropped_frames_total",
    "Frames from other hosts that were dropped, because their source is no endpoint there.",
);
const MESH_PROBLEMS: Family =
    Family::gauge("tidegate_mesh_problems", "Problems that tidegate mesh status lists.");
const MESH_REPAIRS: Family = Family::counter(
    "tidegate_mesh_repairs_total",
    "Restored objects of overlay networks that other software had removed or changed.",
);

const SERVICE_TASKS: Family = Family::gauge(
    "tidegate_mesh_service_tasks",
    "Tasks of a service of the cluster, by whether they get connections of this host.",
);
const SERVICE_OPEN: Family = Family::gauge(
    "tidegate_mesh_service_open_connections",
    "Open connections and UDP sessions through this host, by service and host of the task.",
);
const SERVICE_CONNECTIONS: Family = Family::counter(
    "tidegate_mesh_service_connections_total",
    "Connections and UDP sessions through this host, by service and host of the task.",
);
const SERVICE_FAILURES: Family = Family::counter(
    "tidegate_mesh_service_failures_total",
    "Connections through this host that a task has not accepted; another one was tried.",
);
const SERVICE_EJECTIONS: Family = Family::counter(
    "tidegate_mesh_service_ejections_total",
    "Times that this host has given a task no connections for some seconds, after failures.",
);

/// Counts of a service by the host of the task.
#[derive(Default)]
struct ServiceFigures {
    ready: u64,
    standby: u64,
    other: u64,
    by_host: BTreeMap<String, Figures>,
}

/// Appends the families of the services of the cluster to `page`.
pub(super) fn service_families(registry: &Registry, page: &mut impl Write) {
    let services = registry.read().unwrap_or_else(PoisonError::into_inner).clone();
    let of = |(name, upstream): (String, Arc<BalancedUpstream>)| {
        let by_host = upstream.totals();
        let mut figures = ServiceFigures { by_host, ..ServiceFigures::default() };
        for (task, of_task) in upstream.tasks() {
            let count = match (task.target.is_ready, task.stands_by) {
                (true, _) if !of_task.is_ejected => &mut figures.ready,
                (_, true) => &mut figures.standby,
                _ => &mut figures.other,
            };
            *count += 1;
        }
        (name, figures)
    };
    let services: Vec<(String, ServiceFigures)> = services.into_iter().map(of).collect();
    // Writing to a String does not fail.
    let _ = render_services(&services, page);
}

fn render_services(services: &[(String, ServiceFigures)], page: &mut impl Write) -> fmt::Result {
    SERVICE_TASKS.write_head(page)?;
    for (service, figures) in services {
        for (state, count) in
            [("ready", figures.ready), ("standby", figures.standby), ("other", figures.other)]
        {
            SERVICE_TASKS.write_value(&[("service", service), ("state", &state)], count, page)?;
        }
    }
    type Of = fn(&Figures) -> u64;
    let families: [(Family, Of); 4] = [
        (SERVICE_OPEN, |figures| figures.open.into()),
        (SERVICE_CONNECTIONS, |figures| figures.connections),
        (SERVICE_FAILURES, |figures| figures.failures),
        (SERVICE_EJECTIONS, |figures| figures.ejections),
    ];
    for (family, of) in families {
        family.write_head(page)?;
        for (service, figures) in services {
            for (host, figures) in &figures.by_host {
                let labels: Labels<'_> = &[("service", service), ("host", host)];
                family.write_value(labels, of(figures), page)?;
            }
        }
    }
    Ok(())
}

/// Appends the families of the cluster to `page`. On a host in no cluster they have no series.
pub(super) fn mesh_families(status: Option<&Status>, page: &mut impl Write) {
    // Writing to a String does not fail.
    let _ = render_mesh(status, page);
}

fn render_mesh(status: Option<&Status>, page: &mut impl Write) -> fmt::Result {
    let hosts = || status.into_iter().flat_map(|status| &status.hosts);
    let networks = || status.into_iter().flat_map(|status| &status.figures);
    MESH_STORE.write_head(page)?;
    if let Some(status) = status {
        let is_up = status.store == StoreState::Connected;
        MESH_STORE.write_value(&[], u64::from(is_up), page)?;
    }
    MESH_HOSTS.write_head(page)?;
    if status.is_some() {
        for (state, is_heard) in [("heard", true), ("silent", false)] {
            let count = hosts().filter(|host| host.is_heard == is_heard).count();
            MESH_HOSTS.write_value(&[("state", &state)], count as u64, page)?;
        }
    }
    MESH_LATENCY.write_head(page)?;
    for host in hosts() {
        if let Some(latency) = host.latency {
            MESH_LATENCY.write_value(&[("host", &host.id)], latency.as_secs_f64(), page)?;
        }
    }
    MESH_HOST_ENDPOINTS.write_head(page)?;
    for host in hosts() {
        MESH_HOST_ENDPOINTS.write_value(&[("host", &host.id)], host.endpoints as u64, page)?;
    }
    MESH_STATIONS.write_head(page)?;
    for (network, figures) in networks() {
        MESH_STATIONS.write_value(&[("network", network)], figures.stations as u64, page)?;
    }
    MESH_DROPPED.write_head(page)?;
    for (network, figures) in networks() {
        MESH_DROPPED.write_value(&[("network", network)], figures.dropped, page)?;
    }
    MESH_PROBLEMS.write_head(page)?;
    MESH_REPAIRS.write_head(page)?;
    if let Some(status) = status {
        MESH_PROBLEMS.write_value(&[], status.problems.len() as u64, page)?;
        MESH_REPAIRS.write_value(&[], status.repairs, page)?;
    }
    Ok(())
}

/// Counts objects that other software removed.
pub(super) struct Repairs {
    /// In the order of [`RepairKind::ALL`].
    restored: [Counter; RepairKind::ALL.len()],
    pub(super) failed: Counter,
}

impl Repairs {
    pub(super) fn new() -> Self {
        const FAILED: &str = "tidegate_network_repair_failures_total";
        describe_counter!(registry::REPAIRS_METRIC, registry::REPAIRS_HELP);
        describe_counter!(FAILED, "Failed attempts to restore objects. They are retried.");
        let restored =
            RepairKind::ALL.map(|kind| counter!(registry::REPAIRS_METRIC, "kind" => kind.as_str()));
        Self { restored, failed: counter!(FAILED) }
    }

    pub(super) fn count(&self, restored: RepairKind) {
        for (kind, counter) in RepairKind::ALL.iter().zip(&self.restored) {
            if *kind == restored {
                counter.increment(1);
            }
        }
    }
}

/// Appends the families of `firewall` to `page`, in the Prometheus text format (exposition format
/// 0.0.4). Without a firewall they have no series.
pub(super) fn ruleset_families(firewall: Option<&Firewall>, page: &mut impl Write) {
    // Writing to a String does not fail.
    let _ = render_updates(firewall, page);
}

fn render_updates(firewall: Option<&Firewall>, page: &mut impl Write) -> fmt::Result {
    let changes =
        || firewall.iter().flat_map(|firewall| Change::ALL.map(|change| (*firewall, change)));
    UPDATES.write_head(page)?;
    for (firewall, change) in changes() {
        let labels: Labels<'_> = &[("firewall", &firewall.kind()), ("change", &change.as_str())];
        UPDATES.write_histogram(labels, &firewall.updates(change).took(), page)?;
    }
    UPDATES_FAILED.write_head(page)?;
    for (firewall, change) in changes() {
        let labels: Labels<'_> = &[("firewall", &firewall.kind()), ("change", &change.as_str())];
        UPDATES_FAILED.write_value(labels, firewall.updates(change).failed(), page)?;
    }
    for (family, number) in TRACKED.into_iter().zip(0..) {
        family.write_head(page)?;
        if let Some(firewall) = firewall {
            let value: u64 = firewall.tracked_flows()[number];
            family.write_value(&[], value, page)?;
        }
    }
    Ok(())
}

/// Appends the families of the networks and endpoints of `desired` to `page`, in the Prometheus
/// text format (exposition format 0.0.4).
pub(super) fn families(
    desired: &Desired,
    publisher: &Publisher,
    observer: Option<&Observer>,
    page: &mut impl Write,
) {
    let mut ports: BTreeMap<String, u64> = BTreeMap::new();
    for port in publisher.ports() {
        *ports.entry(port.endpoint).or_default() += 1;
    }
    let statuses = observer.map(Observer::statuses).unwrap_or_default();
    let restarts =
        statuses.into_iter().map(|status| (status.name, u64::from(status.restarts))).collect();
    // Writing to a String does not fail.
    let _ = render(desired, &ports, &publisher.relocations(), &restarts, page);
}

/// Appends the counters of frames that `guards`, at bridge ports in `host`, dropped from endpoints
/// of `desired`. Classic BPF does not count by reason and has no series.
pub(super) fn spoofed_families(
    desired: &Desired,
    guards: &PortGuards,
    host: &Namespace,
    page: &mut impl Write,
) {
    let dropped = match guards.mechanism() {
        Mechanism::Classic => BTreeMap::new(),
        _ => host.with(|| guards.dropped()).unwrap_or_default(),
    };
    // Writing to a String does not fail.
    let _ = render_spoofed(desired, &dropped, page);
}

fn render_spoofed(
    desired: &Desired,
    dropped: &BTreeMap<String, Dropped>,
    page: &mut impl Write,
) -> fmt::Result {
    let ports = || {
        let attachments = desired.endpoints.iter().flat_map(|endpoint| {
            endpoint.attachments.iter().map(move |attachment| (&endpoint.name, attachment))
        });
        attachments.filter_map(|(endpoint, attachment)| {
            let dropped = dropped.get(&attachment.host_end.name)?;
            Some((endpoint, &attachment.network, dropped))
        })
    };
    SPOOFED.write_head(page)?;
    for (endpoint, network, dropped) in ports() {
        for (reason, frames) in SpoofReason::ALL.into_iter().zip(dropped.spoofed) {
            let labels: Labels<'_> =
                &[("network", network), ("endpoint", endpoint), ("reason", &reason.as_str())];
            SPOOFED.write_value(labels, frames, page)?;
        }
    }
    POLICED.write_head(page)?;
    ports().try_for_each(|(endpoint, network, dropped)| {
        let labels: Labels<'_> = &[("network", network), ("endpoint", endpoint)];
        POLICED.write_value(labels, dropped.policed, page)
    })
}

fn render(
    desired: &Desired,
    ports: &BTreeMap<String, u64>,
    relocations: &BTreeMap<String, u64>,
    restarts: &BTreeMap<String, u64>,
    page: &mut impl Write,
) -> fmt::Result {
    INFO.write_head(page)?;
    for network in &desired.networks {
        let labels: Labels<'_> = &[("network", &network.name), ("bridge", &network.bridge.name)];
        INFO.write_value(labels, 1, page)?;
    }
    ENDPOINTS.write_head(page)?;
    for network in &desired.networks {
        let attachments = desired.endpoints.iter().flat_map(|endpoint| &endpoint.attachments);
        let count = attachments.filter(|attachment| attachment.network == network.name).count();
        ENDPOINTS.write_value(&[("network", &network.name)], count, page)?;
    }
    for family in [USED, FREE] {
        family.write_head(page)?;
        for network in &desired.networks {
            for (address_family, used, free) in addresses(desired, network) {
                let labels: Labels<'_> = &[("network", &network.name), ("family", &address_family)];
                family.write_value(labels, if family == USED { used } else { free }, page)?;
            }
        }
    }
    ATTACHED.write_head(page)?;
    for endpoint in &desired.endpoints {
        for attachment in &endpoint.attachments {
            let labels: Labels<'_> =
                &[("endpoint", &endpoint.name), ("network", &attachment.network)];
            ATTACHED.write_value(labels, 1, page)?;
        }
    }
    for (family, values) in [(PORTS, ports), (RELOCATIONS, relocations), (RESTARTS, restarts)] {
        family.write_head(page)?;
        for endpoint in &desired.endpoints {
            let value = values.get(&endpoint.name).copied().unwrap_or_default();
            family.write_value(&[("endpoint", &endpoint.name)], value, page)?;
        }
    }
    Ok(())
}

/// Label, used addresses and free addresses of each subnet of `network`.
fn addresses(desired: &Desired, network: &Network) -> Vec<(&'static str, u128, u128)> {
    let count = |subnet: IpNet| {
        let attachments = desired.endpoints.iter().flat_map(|endpoint| &endpoint.attachments);
        let here = attachments.filter(|attachment| attachment.network == network.name);
        let given =
            here.flat_map(|one| &one.addresses).filter(|one| subnet.contains(&one.addr())).count();
        let used = given as u128 + 1;
        let family = if subnet.addr().is_ipv4() { "ipv4" } else { "ipv6" };
        (family, used, capacity(subnet).saturating_sub(used))
    };
    network.subnets.iter().map(|one| count(one.subnet)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_model::MacAddress;
    use tidegate_netsetup::{Attachment, Endpoint, Interface, Subnet};

    #[test]
    fn families_list_networks_endpoints_and_address_usage() {
        let interface =
            |name: &str| Interface { name: name.into(), mac: MacAddress([2, 0, 0, 0, 0, 1]) };
        let subnet = |subnet: &str, gateway: &str| Subnet {
            subnet: subnet.parse().unwrap(),
            gateway: gateway.parse().unwrap(),
        };
        let desired = Desired {
            networks: vec![Network {
                name: "front".into(),
                bridge: interface("tg-front-0001"),
                subnets: vec![subnet("10.9.0.0/24", "10.9.0.1"), subnet("fd09::/64", "fd09::1")],
                internal: false,
                inter_container: true,
                overlay: None,
                mtu: 1500,
            }],
            endpoints: vec![Endpoint {
                name: "web".into(),
                attachments: vec![Attachment {
                    network: "front".into(),
                    host_end: interface("tgv-1"),
                    inside: interface("eth0"),
                    addresses: vec!["10.9.0.2/24".parse().unwrap(), "fd09::2/64".parse().unwrap()],
                    default_route: true,
                    any_address: false,
                }],
            }],
            ..Desired::default()
        };
        let ports = BTreeMap::from([("web".to_owned(), 2)]);
        let mut page = String::new();
        render(&desired, &ports, &BTreeMap::new(), &BTreeMap::new(), &mut page).unwrap();
        let series: Vec<&str> = page.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            series,
            [
                "tidegate_network_info{network=\"front\",bridge=\"tg-front-0001\"} 1",
                "tidegate_network_endpoints{network=\"front\"} 1",
                "tidegate_network_addresses_used{network=\"front\",family=\"ipv4\"} 2",
                "tidegate_network_addresses_used{network=\"front\",family=\"ipv6\"} 2",
                "tidegate_network_addresses_free{network=\"front\",family=\"ipv4\"} 252",
                "tidegate_network_addresses_free{network=\"front\",family=\"ipv6\"} 18446744073709551613",
                "tidegate_network_endpoint_info{endpoint=\"web\",network=\"front\"} 1",
                "tidegate_network_endpoint_ports{endpoint=\"web\"} 2",
                "tidegate_network_endpoint_relocations_total{endpoint=\"web\"} 0",
                "tidegate_network_endpoint_restarts_total{endpoint=\"web\"} 0",
            ]
        );
    }
}
