//! Rates: the difference of two [`Figures`] over the time between them.

use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;
use tidegate_api::types::{Figures, Fill, PortFigures};

/// Current values and rates per second (`_rate`). A rate is NaN until there are earlier figures to
/// compare with; in JSON it is null.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Rates {
    /// Name of the project.
    pub(crate) project: String,
    /// Seconds since the start of the project.
    pub(crate) up_seconds: f64,
    /// The seconds between the two figures.
    pub(crate) over_seconds: f64,
    pub(crate) connections: Fill,
    pub(crate) descriptors: Fill,
    pub(crate) ports: Vec<PortRates>,
    pub(crate) endpoints: Vec<EndpointRates>,
    pub(crate) networks: Vec<NetworkRates>,
    pub(crate) nat: Option<NatRates>,
    pub(crate) upstreams: Vec<UpstreamRates>,
}

/// Traffic of published ports.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Flow {
    /// Open TCP connections and UDP sessions.
    pub(crate) open: u64,
    pub(crate) begun_rate: f64,
    /// Connections that did not reach the endpoint, and dropped datagrams.
    pub(crate) failed_rate: f64,
    pub(crate) bytes_in_rate: f64,
    pub(crate) bytes_out_rate: f64,
}

impl Flow {
    fn add(&mut self, other: &Self) {
        self.open += other.open;
        self.begun_rate += other.begun_rate;
        self.failed_rate += other.failed_rate;
        self.bytes_in_rate += other.bytes_in_rate;
        self.bytes_out_rate += other.bytes_out_rate;
    }
}

/// A published port.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PortRates {
    pub(crate) publish: String,
    pub(crate) endpoint: String,
    pub(crate) container_port: u16,
    #[serde(flatten)]
    pub(crate) flow: Flow,
    /// The average time to connect to the endpoint.
    pub(crate) dial_seconds: f64,
}

/// The published ports of an endpoint.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct EndpointRates {
    pub(crate) endpoint: String,
    pub(crate) networks: Vec<String>,
    pub(crate) ports: u64,
    #[serde(flatten)]
    pub(crate) flow: Flow,
}

/// The published ports and the DNS queries of a network.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct NetworkRates {
    pub(crate) network: String,
    pub(crate) endpoints: u64,
    #[serde(flatten)]
    pub(crate) flow: Flow,
    pub(crate) questions_rate: f64,
    pub(crate) questions_failed_rate: f64,
    pub(crate) questions_unknown_rate: f64,
}

/// The NAT engine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct NatRates {
    pub(crate) flows: Fill,
    pub(crate) begun_rate: f64,
    pub(crate) bytes_in_rate: f64,
    pub(crate) bytes_out_rate: f64,
    pub(crate) dropped_rate: f64,
    pub(crate) retransmissions_rate: f64,
}

/// An upstream name server.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct UpstreamRates {
    pub(crate) server: String,
    pub(crate) trusted: bool,
    pub(crate) asked_rate: f64,
    pub(crate) silent_rate: f64,
    pub(crate) failed_rate: f64,
    /// The average response time.
    pub(crate) answer_seconds: f64,
}

/// Computes rates over an interval.
#[derive(Clone, Copy)]
struct Per {
    seconds: f64,
}

impl Per {
    fn second(self, now: u64, before: u64) -> f64 {
        // 0/0 is NaN, for an interval that is not known.
        now.saturating_sub(before) as f64 / self.seconds
    }
}

/// Returns the average of `times` durations with a total of `now - before` microseconds, in
/// seconds.
fn average((now, before): (u64, u64), times: u64) -> f64 {
    now.saturating_sub(before) as f64 / 1e6 / if times == 0 { f64::NAN } else { times as f64 }
}

impl Rates {
    /// The rates from `before` to `now`.
    pub(crate) fn between(before: Option<&Figures>, now: &Figures) -> Self {
        // Counters of another instance are not comparable.
        let before =
            before.filter(|before| (before.pid, &before.started) == (now.pid, &now.started));
        let passed = before.map(|before| now.elapsed_ms.saturating_sub(before.elapsed_ms));
        let passed = Duration::from_millis(passed.unwrap_or(0));
        let per = Per { seconds: if passed.is_zero() { f64::NAN } else { passed.as_secs_f64() } };
        let ports = ports(before, now, per);
        let networks = networks(before, now, per, &ports);
        Self {
            project: now.project.clone(),
            up_seconds: now.elapsed_ms as f64 / 1e3,
            over_seconds: passed.as_secs_f64(),
            connections: now.connections,
            descriptors: now.descriptors,
            endpoints: endpoints(now, &ports),
            ports,
            networks,
            nat: nat(before, now, per),
            upstreams: upstreams(before, now, per),
        }
    }

    /// Returns the sum over all published ports.
    pub(crate) fn flow(&self) -> Flow {
        let mut sum = Flow::default();
        self.ports.iter().for_each(|port| sum.add(&port.flow));
        sum
    }
}

fn ports(before: Option<&Figures>, now: &Figures, per: Per) -> Vec<PortRates> {
    let old: BTreeMap<u32, &PortFigures> =
        before.iter().flat_map(|before| &before.ports).map(|port| (port.id, port)).collect();
    let rates = |port: &PortFigures| {
        // A port that is new since then counts from 0.
        let old = old.get(&port.id);
        let of = |field: fn(&PortFigures) -> u64| (field(port), old.map_or(0, |old| field(old)));
        let rate = |field: fn(&PortFigures) -> u64| {
            let (now, before) = of(field);
            per.second(now, before)
        };
        let (dialled, dialled_before) = of(|port| port.dialled);
        PortRates {
            publish: port.publish.clone(),
            endpoint: port.endpoint.clone(),
            container_port: port.container_port,
            flow: Flow {
                open: port.open.used,
                begun_rate: rate(|port| port.begun),
                failed_rate: rate(|port| port.refused + port.dropped),
                bytes_in_rate: rate(|port| port.bytes_in),
                bytes_out_rate: rate(|port| port.bytes_out),
            },
            dial_seconds: average(of(|port| port.dial_us), dialled.saturating_sub(dialled_before)),
        }
    };
    now.ports.iter().map(rates).collect()
}

fn endpoints(now: &Figures, ports: &[PortRates]) -> Vec<EndpointRates> {
    let mut endpoints: BTreeMap<&str, EndpointRates> = BTreeMap::new();
    let mut order = Vec::new();
    for network in &now.networks {
        for name in &network.endpoints {
            let endpoint = endpoints.entry(name).or_insert_with(|| {
                order.push(name.as_str());
                let (networks, flow) = (Vec::new(), Flow::default());
                EndpointRates { endpoint: name.clone(), networks, ports: 0, flow }
            });
            endpoint.networks.push(network.name.clone());
        }
    }
    for port in ports {
        if let Some(endpoint) = endpoints.get_mut(port.endpoint.as_str()) {
            endpoint.ports += 1;
            endpoint.flow.add(&port.flow);
        }
    }
    order.into_iter().filter_map(|name| endpoints.remove(name)).collect()
}

fn networks(
    before: Option<&Figures>,
    now: &Figures,
    per: Per,
    ports: &[PortRates],
) -> Vec<NetworkRates> {
    let rates = |network: &tidegate_api::types::NetworkFigures| {
        let old =
            before.and_then(|before| before.networks.iter().find(|old| old.name == network.name));
        let rate = |field: fn(&tidegate_api::types::NetworkFigures) -> u64| {
            per.second(field(network), old.map_or(0, field))
        };
        let mut flow = Flow::default();
        let on_it = ports.iter().filter(|port| network.endpoints.contains(&port.endpoint));
        on_it.for_each(|port| flow.add(&port.flow));
        NetworkRates {
            network: network.name.clone(),
            endpoints: network.endpoints.len() as u64,
            flow,
            questions_rate: rate(|network| network.questions),
            questions_failed_rate: rate(|network| network.questions_failed),
            questions_unknown_rate: rate(|network| network.questions_unknown),
        }
    };
    now.networks.iter().map(rates).collect()
}

fn nat(before: Option<&Figures>, now: &Figures, per: Per) -> Option<NatRates> {
    let nat = now.nat.as_ref()?;
    let old = before.and_then(|before| before.nat.as_ref());
    let rate = |field: fn(&tidegate_api::types::NatFigures) -> u64| {
        per.second(field(nat), old.map_or(0, field))
    };
    Some(NatRates {
        flows: nat.flows,
        begun_rate: rate(|nat| nat.begun),
        bytes_in_rate: rate(|nat| nat.bytes_in),
        bytes_out_rate: rate(|nat| nat.bytes_out),
        dropped_rate: rate(|nat| nat.dropped),
        retransmissions_rate: rate(|nat| nat.retransmissions),
    })
}

fn upstreams(before: Option<&Figures>, now: &Figures, per: Per) -> Vec<UpstreamRates> {
    let rates = |upstream: &tidegate_api::types::UpstreamFigures| {
        let old = before
            .and_then(|before| before.upstreams.iter().find(|old| old.server == upstream.server));
        let of = |field: fn(&tidegate_api::types::UpstreamFigures) -> u64| {
            (field(upstream), old.map_or(0, field))
        };
        let rate = |field: fn(&tidegate_api::types::UpstreamFigures) -> u64| {
            let (now, before) = of(field);
            per.second(now, before)
        };
        let (answered, answered_before) = of(|upstream| upstream.answered);
        UpstreamRates {
            server: upstream.server.clone(),
            trusted: upstream.trusted,
            asked_rate: rate(|upstream| upstream.asked),
            silent_rate: rate(|upstream| upstream.silent),
            failed_rate: rate(|upstream| upstream.failed),
            answer_seconds: average(
                of(|upstream| upstream.took_us),
                answered.saturating_sub(answered_before),
            ),
        }
    };
    now.upstreams.iter().map(rates).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use tidegate_api::types::{NatFigures, NetworkFigures, UpstreamFigures};

    /// Two networks, two endpoints and three ports, `elapsed_ms` after the start, with every
    /// counter a multiple of `done`.
    pub(in crate::top) fn figures(elapsed_ms: u64, done: u64) -> Figures {
        let port = |id, publish: &str, endpoint: &str, times: u64| PortFigures {
            id,
            endpoint: endpoint.into(),
            publish: publish.into(),
            container_port: 80,
            open: Fill { used: times, limit: 100 },
            begun: times * done,
            refused: done / 10,
            cut: 0,
            bytes_in: 1000 * times * done,
            bytes_out: 50_000 * times * done,
            datagrams_in: 0,
            datagrams_out: 0,
            dropped: 0,
            dialled: done,
            dial_us: 200 * done,
        };
        let network = |name: &str, endpoints: &[&str]| NetworkFigures {
            name: name.into(),
            endpoints: endpoints.iter().map(|name| (*name).to_owned()).collect(),
            questions: 4 * done,
            questions_failed: done / 5,
            questions_unknown: done,
        };
        Figures {
            project: "shop".into(),
            pid: 7,
            started: "2026-01-31T12:00:00Z".into(),
            elapsed_ms,
            ports: vec![
                port(1, "0.0.0.0:8080/tcp", "web", 1),
                port(2, "[::]:8080/tcp", "web", 2),
                port(3, "0.0.0.0:53/udp", "dns", 3),
            ],
            connections: Fill { used: 3, limit: 100_000 },
            descriptors: Fill { used: 30, limit: 1024 },
            networks: vec![network("front", &["web", "dns"]), network("back", &["web"])],
            nat: Some(NatFigures {
                flows: Fill { used: 12, limit: 65_536 },
                flows_tcp: 2,
                begun: done,
                bytes_in: 2000 * done,
                bytes_out: 1000 * done,
                packets_in: done,
                packets_out: done,
                dropped: 0,
                resets: 0,
                retransmissions: done,
            }),
            upstreams: vec![UpstreamFigures {
                server: "192.0.2.53:53".into(),
                trusted: true,
                asked: done,
                silent: 0,
                failed: 0,
                answered: done,
                took_us: 400 * done,
            }],
        }
    }

    #[test]
    fn a_rate_is_the_difference_over_the_interval() {
        let rates = Rates::between(Some(&figures(10_000, 100)), &figures(12_000, 200));
        assert_eq!((rates.up_seconds, rates.over_seconds), (12.0, 2.0));
        let port = &rates.ports[1];
        assert_eq!((port.flow.open, port.flow.begun_rate, port.flow.failed_rate), (2, 100.0, 5.0));
        assert_eq!((port.flow.bytes_in_rate, port.flow.bytes_out_rate), (100_000.0, 5_000_000.0));
        assert!((port.dial_seconds - 0.0002).abs() < 1e-9);
        // The sum of its two ports, on both networks.
        let web = &rates.endpoints[0];
        assert_eq!(
            (web.endpoint.as_str(), web.ports, web.networks.join(" ")),
            ("web", 2, "front back".into())
        );
        assert_eq!((web.flow.open, web.flow.bytes_in_rate), (3, 150_000.0));
        let front = &rates.networks[0];
        assert_eq!(
            (front.flow.open, front.questions_rate, front.questions_failed_rate),
            (6, 200.0, 10.0)
        );
        assert_eq!(rates.networks[1].flow.open, 3);
        let nat = rates.nat.as_ref().unwrap();
        assert_eq!(
            (nat.begun_rate, nat.bytes_in_rate, nat.retransmissions_rate),
            (50.0, 100_000.0, 50.0)
        );
        assert!((rates.upstreams[0].answer_seconds - 0.0004).abs() < 1e-9);
        assert_eq!(rates.flow().open, 6);
    }

    #[test]
    fn rates_are_unknown_without_earlier_figures_of_the_same_instance() {
        let now = figures(12_000, 200);
        let mut other = figures(10_000, 100);
        other.pid = 8;
        for before in [None, Some(&other), Some(&now)] {
            let rates = Rates::between(before, &now);
            assert!(rates.flow().bytes_in_rate.is_nan());
            assert!(rates.nat.as_ref().unwrap().begun_rate.is_nan());
            assert_eq!(rates.flow().open, 6);
            let json = serde_json::to_value(&rates).unwrap();
            assert!(json["ports"][0]["begun_rate"].is_null());
            assert_eq!(json["ports"][0]["publish"], "0.0.0.0:8080/tcp");
        }
    }

    #[test]
    fn new_ports_count_from_zero_and_removed_ports_vanish() {
        let (mut before, mut now) = (figures(10_000, 100), figures(11_000, 100));
        before.ports.remove(1);
        now.ports.remove(0);
        let rates = Rates::between(Some(&before), &now);
        let rates: Vec<_> =
            rates.ports.iter().map(|port| (port.publish.as_str(), port.flow.begun_rate)).collect();
        assert_eq!(rates, [("[::]:8080/tcp", 200.0), ("0.0.0.0:53/udp", 0.0)]);
    }
}
