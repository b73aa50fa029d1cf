//! The cost of idle published ports.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::{Metric, Scenario};
use crate::contender::{Contender, Kind, Running};
use crate::lab::{Lab, Service};
use crate::load::{client, server::RequestServer};

/// The number of ports that a contender with a process per port publishes. Its figures are
/// extrapolated.
const SAMPLE: u16 = 50;

/// The time from the last open port to the reading of memory.
const SETTLE: Duration = Duration::from_millis(300);

/// `count` idle ports.
///
/// Memory is the resident set of a single process, including its program. With a process per port
/// it is the sum of the proportional sets, which counts the pages of the program once.
pub(super) struct Ports {
    pub(super) count: u16,
}

impl Scenario for Ports {
    fn name(&self) -> String {
        format!("ports.{}", self.count)
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let title = format!("{} published ports", self.count);
        vec![
            Metric::new(format!("{name}.memory"), format!("{title}: memory"), "MB"),
            Metric::new(format!("{name}.ready"), format!("{title}: time to ready"), "s"),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        matches!(kind, Kind::DockerProxy | Kind::Publish | Kind::DropIn)
    }

    fn most_rounds(&self) -> u32 {
        3
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        _duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let process_per_port = contender.kind != Kind::Publish;
        let count = if process_per_port { SAMPLE } else { self.count };
        let scale = f64::from(self.count) / f64::from(count);
        let running = contender.start(lab, Service::many(count))?;
        thread::sleep(SETTLE);
        let memory = if process_per_port { running.pss() } else { running.rss() };
        Ok(vec![
            memory.map(|bytes| bytes * scale / 1e6),
            Some(running.ready_after.as_secs_f64() * scale),
        ])
    }
}

/// The number of connections of each process of a pair before the second reading of its memory.
const CARRIED: usize = 100;

/// One `docker run -p`: two processes, for IPv4 and for IPv6. Their memory is read twice: before
/// the first connection, the permanent state of most such processes, and after some connections.
///
/// The proportional set of a process counts half of the pages shared with the other one, and less
/// if more processes of the program are running.
pub(super) struct Pair;

impl Scenario for Pair {
    fn name(&self) -> String {
        "ports.pair".into()
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![
            Metric::new("ports.pair", "PSS of a process, two of them for one -p", "MB"),
            Metric::new("ports.pair.used", format!("the same after {CARRIED} connections"), "MB"),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        matches!(kind, Kind::DockerProxy | Kind::DropIn)
    }

    fn most_rounds(&self) -> u32 {
        3
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        _duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let pair = Service::many(2);
        let ports: Vec<Service> = pair.each().collect();
        let servers =
            ports.iter().map(|port| RequestServer::start(&lab.net.container, port.backend()));
        let _servers = servers.collect::<Result<Vec<_>>>()?;
        let running = contender.start(lab, pair)?;
        let each = |running: &Running| running.pss().map(|bytes| bytes / 2.0 / 1e6);
        thread::sleep(SETTLE);
        let idle = each(&running);
        for port in ports {
            lab.net
                .client
                .run(|| client::idle(port.published(), &[Ipv4Addr::UNSPECIFIED], CARRIED))?;
        }
        thread::sleep(SETTLE);
        Ok(vec![idle, each(&running)])
    }
}
