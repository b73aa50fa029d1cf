//! `tidegate daemon` with many endpoints: the time of one command, of a restart, and its memory.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tidegate_testbed::{Process, Signal};

use super::setup::Endpoints;
use super::setup::project::in_memory;
use super::{Metric, Scenario, ask};
use crate::contender::{Contender, Kind};
use crate::lab::Lab;

/// The time within which the daemon must start.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The first published port; each endpoint has the next one.
const FIRST_PORT: usize = 20_000;

/// The number of the last commands whose median is the result.
const LAST: usize = 100;

/// `endpoints` with one published port each, in `networks`.
pub(super) struct Daemon {
    pub(super) networks: usize,
    pub(super) endpoints: Endpoints,
}

impl Scenario for Daemon {
    fn name(&self) -> String {
        format!("daemon.{}.{}", self.endpoints.count(), self.networks)
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let title = format!(
            "Daemon, nftables, {} endpoints in {} networks",
            self.endpoints.count(),
            self.networks
        );
        let metric = |key: &str, text: &str, unit| {
            Metric::new(format!("{name}.{key}"), format!("{title}: {text}"), unit)
        };
        vec![
            metric("attach", "attach the last ones, with a port, durable, median", "ms"),
            metric("restart", "start after kill -9", "s"),
            metric("memory", "memory", "MB"),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        kind == Kind::Publish
    }

    fn most_rounds(&self) -> u32 {
        1
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        _duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        // The state file is on the disk of temporary files, because commands are durable.
        let (run, state) = (in_memory()?, tempfile::tempdir()?);
        let mut daemon = start(lab, contender, &run, &state)?;
        let socket = run.path().join("api.sock");
        for network in 0..self.networks {
            let subnet = format!("10.{}.{}.0/24", 100 + network / 256, network % 256);
            let body = format!(r#"{{"name":"n{network}","subnets":[{{"subnet":"{subnet}"}}]}}"#);
            ask(&socket, "POST", "/v1/networks", &body)?;
        }
        let endpoints = self.endpoints.get();
        let mut times = Vec::new();
        for (number, namespace) in endpoints.iter().enumerate() {
            let (network, port) = (number % self.networks, FIRST_PORT + number);
            let body = format!(
                r#"{{"name":"e{number}","netns":{:?},"networks":[{{"network":"n{network}"}}],"ports":["{port}:80"]}}"#,
                namespace.path()
            );
            let begin = Instant::now();
            ask(&socket, "POST", "/v1/endpoints", &body)?;
            times.push(begin.elapsed());
        }
        let mut last = times.split_off(times.len().saturating_sub(LAST));
        last.sort_unstable();
        let attach = last[last.len() / 2].as_secs_f64() * 1e3;
        daemon.stop(Signal::KILL, TIMEOUT);
        let begin = Instant::now();
        let mut daemon = start(lab, contender, &run, &state)?;
        let restart = begin.elapsed().as_secs_f64();
        let memory = daemon.rss() as f64 / 1e6;
        for number in 0..endpoints.len() {
            ask(&socket, "DELETE", &format!("/v1/endpoints/e{number}"), "")?;
        }
        for network in 0..self.networks {
            ask(&socket, "DELETE", &format!("/v1/networks/n{network}"), "")?;
        }
        daemon.stop(Signal::TERM, TIMEOUT);
        Ok(vec![Some(attach), Some(restart), Some(memory)])
    }
}

/// Starts a daemon, and waits until it is up.
fn start(lab: &Lab, contender: &Contender, run: &TempDir, state: &TempDir) -> Result<Process> {
    let mut command = contender.command(lab);
    command.args(["daemon", "--firewall=nftables", "--metrics=none", "--state"]).arg(state.path());
    command.env("TIDEGATE_RUN_DIR", run.path()).env_remove("TIDEGATE_SOCKET");
    let daemon = Process::spawn(&mut command);
    let line = daemon.wait_for_line("tidegate daemon is up", TIMEOUT);
    ensure!(!line.is_empty(), "the daemon is not up");
    fs::metadata(run.path().join("api.sock")).context("socket of the daemon")?;
    Ok(daemon)
}
