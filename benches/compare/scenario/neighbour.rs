//! The effect of a flooding container on its neighbour, both with egress through the NAT engine.
//!
//! The baseline is the same generator with frames that are dropped at its bridge port, which costs
//! only the CPU time of the generator. Baseline and flood alternate within a cell.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Result;
use tidegate_testbed::flood::{FloodKind, Flooder, request_times};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, addr};

use super::setup::project::{self, Up};
use super::{Metric, Scenario};
use crate::contender::{Contender, Kind};
use crate::lab::Lab;

/// Frames per second.
const RATE: u32 = 60_000;

/// The pause between two requests of the neighbour.
const PAUSE: Duration = Duration::from_millis(2);

/// The approximate time of a request with the pause before it.
const TURN: Duration = Duration::from_millis(3);

/// The time from the start of a flood to the first timed request.
const BEFORE: Duration = Duration::from_millis(300);

/// The number of alternations of baseline and flood.
const TURNS: u32 = 4;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 83, 1, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 83, 1, 1);

/// A kind of flood.
pub(super) struct Neighbour {
    pub(super) flood: FloodKind,
    /// Whether the container may send from any address (`x-any-source`).
    pub(super) any_source: bool,
}

/// All kinds of floods.
pub(super) fn all() -> [Neighbour; 3] {
    [
        Neighbour { flood: FloodKind::Syn, any_source: false },
        Neighbour { flood: FloodKind::SynOfManySources, any_source: false },
        Neighbour { flood: FloodKind::SynOfManySources, any_source: true },
    ]
}

impl Neighbour {
    fn words(&self) -> (&'static str, &'static str) {
        match (self.flood, self.any_source) {
            (FloodKind::SynOfManySources, true) => {
                ("any-source", "SYNs from 200 addresses, allowed")
            }
            (FloodKind::SynOfManySources, false) => ("spoofed", "SYNs from 200 spoofed addresses"),
            _ => ("syn", "SYNs"),
        }
    }
}

impl Scenario for Neighbour {
    fn name(&self) -> String {
        format!("neighbour.{}", self.words().0)
    }

    fn metrics(&self) -> Vec<Metric> {
        let (name, title) = (self.name(), self.words().1);
        let title = |figure: &str| format!("{RATE} {title}/s: neighbour's {figure}");
        vec![
            Metric::new(format!("{name}.median"), title("median, / dropped at the port"), "x"),
            Metric::new(
                format!("{name}.p99"),
                title("99th percentile, / dropped at the port"),
                "x",
            ),
            Metric::new(format!("{name}.median-time"), title("median"), "us"),
            Metric::new(format!("{name}.p99-time"), title("99th percentile"), "us"),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        kind == Kind::Publish
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let [greedy, modest] = [Namespace::new(), Namespace::new()];
        let file = format!(
            "name: bench
networks:
  one: {{ ipam: {{ config: [ {{ subnet: 10.83.1.0/24 }} ] }} }}
  two: {{ ipam: {{ config: [ {{ subnet: 10.83.2.0/24 }} ] }} }}
services:
  greedy: {{ x-netns: {}, networks: {{ one: {{ ipv4_address: {ADDRESS}, x-any-source: {} }} }} }}
  modest: {{ x-netns: {}, networks: {{ two: {{ ipv4_address: 10.83.2.2 }} }} }}
",
            greedy.path().display(),
            self.any_source,
            modest.path().display()
        );
        let Up { process: _up, directory: _files } =
            project::up(lab, contender, &file, &["--firewall=none", "--metrics=none"])?;
        let flooded = (addr::CLIENT_V4, 7001);
        let _flooded = PeerServer::tcp(&lab.net.client, flooded.into());
        let asked = PeerServer::tcp(&lab.net.client, (addr::CLIENT_V4, 7002).into());
        let flooder =
            Flooder { namespace: &greedy, address: ADDRESS, gateway: GATEWAY, target: flooded };
        let count = (duration / TURNS).div_duration_f64(TURN).ceil() as usize;
        let time = |kind| {
            let _flood = flooder.start(kind, RATE);
            std::thread::sleep(BEFORE);
            modest.run(|| request_times(asked.addr(), count, PAUSE))
        };
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            alone.extend(time(FloodKind::ForeignMac));
            beside.extend(time(self.flood));
        }
        let quantiles = |mut times: Vec<Duration>| {
            times.sort_unstable();
            [times.len() / 2, times.len() * 99 / 100].map(|rank| times[rank].as_secs_f64() * 1e6)
        };
        let ([alone, alone_99], [beside, beside_99]) = (quantiles(alone), quantiles(beside));
        Ok([beside / alone, beside_99 / alone_99, beside, beside_99].map(Some).to_vec())
    }
}
