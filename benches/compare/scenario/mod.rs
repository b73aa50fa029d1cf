//! What is measured: one module per kind of load, all behind [`Scenario`].

mod connections;
mod datagrams;
mod egress;
mod forward;
mod idle;
mod neighbour;
mod ports;
mod requests;
mod rules;
mod setup;
mod stalled;
mod throughput;

use std::time::Duration;

use anyhow::Result;

use crate::contender::{Contender, Kind};
use crate::lab::Lab;
use crate::options::Options;

/// One load, and the figures it yields for each contender.
pub(crate) trait Scenario {
    /// The name by which `--only` selects it, and with which the names of its metrics begin.
    fn name(&self) -> String;

    /// The figures that [`measure`](Self::measure) yields, in its order.
    fn metrics(&self) -> Vec<Metric>;

    /// Whether the contender can take part.
    fn takes(&self, kind: Kind) -> bool {
        kind.publishes()
    }

    /// How many rounds are of use at most: memory hardly differs from one to the next.
    fn most_rounds(&self) -> u32 {
        u32::MAX
    }

    /// Puts the load on the contender for about `duration`.
    ///
    /// A figure that it does not have is `None`: the kernel's own path has no process whose CPU
    /// time or memory could be read.
    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>>;
}

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Metric {
    /// The key in results and in figures: `tcp.1.up.cpu`.
    pub(crate) name: String,
    /// For people.
    pub(crate) title: String,
    /// The unit of its values.
    pub(crate) unit: &'static str,
}

impl Metric {
    fn new(name: impl Into<String>, title: impl Into<String>, unit: &'static str) -> Self {
        Self { name: name.into(), title: title.into(), unit }
    }
}

/// The scenarios that the options ask for, in the order of the report.
pub(crate) fn all(options: &Options) -> Vec<Box<dyn Scenario>> {
    let mut all: Vec<Box<dyn Scenario>> = Vec::new();
    let streams: &[u32] = if options.quick { &[1, 16] } else { &[1, 4, 16] };
    for &streams in streams {
        for direction in [throughput::Direction::Up, throughput::Direction::Down] {
            all.push(Box::new(throughput::Throughput { streams, direction }));
        }
    }
    all.push(Box::new(requests::Requests));
    all.push(Box::new(connections::Connections { at_a_time: 1 }));
    all.push(Box::new(connections::Connections { at_a_time: 32 }));
    all.push(Box::new(datagrams::Datagrams { size: 64, offload: false }));
    all.push(Box::new(datagrams::Datagrams { size: 1200, offload: false }));
    all.push(Box::new(datagrams::Datagrams { size: 1200, offload: true }));
    all.push(Box::new(idle::Idle {
        counts: if options.quick { &[1_000] } else { &[1_000, 10_000] },
    }));
    all.push(Box::new(ports::Pair));
    all.push(Box::new(ports::Ports { count: 1_000 }));
    all.push(Box::new(ports::Ports { count: 10_000 }));
    all.push(Box::new(stalled::Stalled));
    for direction in [throughput::Direction::Up, throughput::Direction::Down] {
        all.push(Box::new(forward::Forward { streams: 1, direction }));
        all.push(Box::new(forward::Forward { streams: 16, direction }));
    }
    all.extend(egress::all(options.quick).map(|one| Box::new(one) as Box<dyn Scenario>));
    all.extend(neighbour::all().map(|one| Box::new(one) as Box<dyn Scenario>));
    all.push(Box::new(rules::Rules { ports: if options.quick { 100 } else { 10_000 } }));
    for firewall in [setup::Firewall::None, setup::Firewall::Nftables] {
        all.push(Box::new(setup::Single { firewall }));
    }
    let endpoints = setup::Endpoints::new(if options.quick { 50 } else { 1_000 });
    for firewall in [setup::Firewall::None, setup::Firewall::Nftables, setup::Firewall::Iptables] {
        all.push(Box::new(setup::Many { networks: 4, firewall, endpoints: endpoints.clone() }));
    }
    all.push(Box::new(setup::Many { networks: 1, firewall: setup::Firewall::Nftables, endpoints }));
    all.retain(|scenario| options.wants(&scenario.name()));
    all
}

/// `used / per`, where `used` is the growth of a CPU time over a run.
fn per(before: Option<f64>, after: Option<f64>, per: f64) -> Option<f64> {
    Some((after? - before?) / per)
}
