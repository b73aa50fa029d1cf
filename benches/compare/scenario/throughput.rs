//! TCP throughput measured with iperf3, and the CPU time per gigabyte.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_testbed::{Namespace, Process};

use super::{Metric, Scenario, per};
use crate::contender::Contender;
use crate::iperf::Report;
use crate::lab::{CONTAINER, HOST, Lab, Service};

/// The time for iperf3 to connect and exchange results, in addition to the load.
pub(super) const EXTRA_TIME: Duration = Duration::from_secs(20);

/// The direction of the payload.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the client to the container.
    Up,
    /// From the container to the client.
    Down,
}

/// Bulk transfers over `streams` connections.
pub(super) struct Throughput {
    pub(super) streams: u32,
    pub(super) direction: Direction,
}

impl Direction {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// Starts an iperf3 server for one run in `namespace`.
pub(super) fn serve(namespace: &Namespace, address: Ipv4Addr) -> Process {
    let (address, port) = (address.to_string(), Service::TCP.first_port.to_string());
    let mut command = namespace.command("iperf3");
    let server =
        Process::spawn(command.args(["-s", "-1", "--forceflush", "-B", &address, "-p", &port]));
    server.wait_for_line("Server listening", EXTRA_TIME);
    server
}

/// Runs an iperf3 client against the published port, with additional options `more`.
pub(super) fn load(
    lab: &Lab,
    streams: u32,
    direction: Direction,
    duration: Duration,
    more: &[&str],
) -> Result<Report> {
    let (seconds, streams) = (duration.as_secs().to_string(), streams.to_string());
    let (host, port) = (HOST.to_string(), Service::TCP.first_port.to_string());
    let mut client = lab.net.client.command("iperf3");
    client
        .args(["-J", "-i", "0", "-c", &host, "-p", &port, "-t", &seconds, "-P", &streams])
        .args(more);
    if direction == Direction::Down {
        client.arg("-R");
    }
    let output = Process::spawn(&mut client).wait_for_output(duration + EXTRA_TIME);
    Report::parse(&output).context("iperf3")
}

impl Scenario for Throughput {
    fn name(&self) -> String {
        format!("tcp.{}.{}", self.streams, self.direction.name())
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let plural = if self.streams == 1 { "" } else { "s" };
        let title = format!("TCP, {} stream{plural} {}", self.streams, self.direction.name());
        vec![
            Metric::new(format!("{name}.rate"), &title, "Gbit/s"),
            Metric::new(format!("{name}.cpu"), format!("{title}: CPU"), "s/GB"),
        ]
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let _server = serve(&lab.net.container, CONTAINER);
        let running = contender.start(lab, Service::TCP)?;
        let before = running.cpu_seconds();
        let report = load(lab, self.streams, self.direction, duration, &[])?;
        let after = running.cpu_seconds();
        let gigabytes = report.bytes / 1e9;
        Ok(vec![Some(report.bits_per_second / 1e9), per(before, after, gigabytes)])
    }
}
