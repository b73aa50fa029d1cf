//! The loads, one module per kind, behind the trait [`Scenario`].

mod connections;
mod daemon;
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

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::contender::{Contender, Kind};
use crate::lab::Lab;
use crate::options::Options;

/// A load with the metrics that it yields for each contender.
pub(crate) trait Scenario {
    /// The name for `--only`, and the prefix of its metrics.
    fn name(&self) -> String;

    /// The metrics of [`measure`](Self::measure), in its order.
    fn metrics(&self) -> Vec<Metric>;

    /// Whether the contender supports the load.
    fn takes(&self, kind: Kind) -> bool {
        kind.publishes()
    }

    /// The maximum number of useful rounds: memory hardly varies between rounds.
    fn most_rounds(&self) -> u32 {
        u32::MAX
    }

    /// Applies the load to the contender for about `duration`.
    ///
    /// A missing value is `None`: forwarding by the kernel has no process with CPU time or memory.
    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>>;
}

/// A measured quantity.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Metric {
    /// The key in results and figures: `tcp.1.up.cpu`.
    pub(crate) name: String,
    /// The title for people.
    pub(crate) title: String,
    /// The unit of its values.
    pub(crate) unit: &'static str,
}

impl Metric {
    fn new(name: impl Into<String>, title: impl Into<String>, unit: &'static str) -> Self {
        Self { name: name.into(), title: title.into(), unit }
    }
}

/// The scenarios selected by the options, in the order of the report.
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
    let (networks, count) = if options.quick { (4, 20) } else { (100, 1_000) };
    all.push(Box::new(daemon::Daemon { networks, endpoints: setup::Endpoints::new(count) }));
    all.retain(|scenario| options.wants(&scenario.name()));
    all
}

/// `used / per`, where `used` is the increase of CPU time during a run.
fn per(before: Option<f64>, after: Option<f64>, per: f64) -> Option<f64> {
    Some((after? - before?) / per)
}

/// Asks the API at `socket`. Returns the body of the response.
fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket).context("connect to the API")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: tidegate\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).unwrap_or_default();
    ensure!(status.starts_with('2'), "{method} {path}: {answer}");
    Ok(answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}
