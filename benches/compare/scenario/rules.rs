//! The time to add or remove a port while the kernel translates many, and the number of rules.

use std::time::{Duration, Instant};

use anyhow::Result;
use tidegate_testbed::{Namespace, Signal};

use super::setup::project::{self, Up};
use super::{Metric, Scenario, ask};
use crate::contender::{Contender, Kind};
use crate::lab::Lab;

/// The first port; the others follow.
const FIRST: u32 = 20_000;

/// The port that is added and removed.
const PORT: u16 = 8080;

/// The number of repetitions.
const TIMES: usize = 10;

/// `ports` published TCP ports of one endpoint.
pub(super) struct Rules {
    pub(super) ports: u32,
}

impl Scenario for Rules {
    fn name(&self) -> String {
        format!("rules.{}", self.ports)
    }

    fn metrics(&self) -> Vec<Metric> {
        let (name, ports) = (self.name(), self.ports);
        vec![
            Metric::new(
                format!("{name}.update"),
                format!("{ports} ports in nftables: one comes or goes"),
                "ms",
            ),
            Metric::new(
                format!("{name}.more"),
                format!("{ports} ports in nftables: more rules than for one"),
                "rules",
            ),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        kind == Kind::Publish
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
        let mut few = project(lab, contender, 1)?;
        let least = rules(lab);
        few.process.stop(Signal::TERM, Duration::from_secs(10));
        let Up { process: _up, directory } = project(lab, contender, self.ports)?;
        let more = rules(lab) - least;
        let socket = directory.path().join("run/api.sock");
        // The time includes the socket for each address family.
        let mut slowest = Duration::ZERO;
        for _ in 0..TIMES {
            let begin = Instant::now();
            let opened = ask(
                &socket,
                "POST",
                "/v1/ports",
                &format!(r#"{{"endpoint":"s","spec":"{PORT}:80"}}"#),
            )?;
            slowest = slowest.max(begin.elapsed());
            for id in opened.split("\"id\":").skip(1) {
                let id: String = id
                    .trim_start_matches('"')
                    .chars()
                    .take_while(|c| c.is_ascii_alphanumeric() || *c == '-')
                    .collect();
                let begin = Instant::now();
                ask(&socket, "DELETE", &format!("/v1/ports/{id}"), "")?;
                slowest = slowest.max(begin.elapsed());
            }
        }
        Ok(vec![Some(slowest.as_secs_f64() * 1e3), Some(more)])
    }
}

fn project(lab: &Lab, contender: &Contender, ports: u32) -> Result<Up> {
    let endpoint = Namespace::new();
    let last = FIRST + ports - 1;
    let file = format!(
        "name: bench
services: {{ s: {{ x-netns: {}, ports: [ \"0.0.0.0:{FIRST}-{last}:{FIRST}-{last}\" ] }} }}
",
        endpoint.path().display()
    );
    // The process that has adopted the namespace keeps it alive.
    project::up(
        lab,
        contender,
        &file,
        &["--firewall=nftables", "--publish=kernel", "--metrics=none"],
    )
}

/// The number of nftables rules on the host.
fn rules(lab: &Lab) -> f64 {
    let listed = lab.net.host.exec("nft", &["-j", "list", "ruleset"]);
    listed.matches("{\"rule\": ").count() as f64
}
