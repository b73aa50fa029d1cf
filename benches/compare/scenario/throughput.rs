//! TCP throughput by iperf3, and the CPU time that moving a gigabyte costs.

use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_testbed::Process;

use super::{Metric, Scenario, per};
use crate::contender::Contender;
use crate::iperf::Report;
use crate::lab::{CONTAINER, HOST, Lab, Service};

/// Time for iperf3 to connect and to exchange results, beyond the load itself.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the client to the container.
    Up,
    /// From the container to the client.
    Down,
}

/// `streams` connections that carry as much as they can.
pub(super) struct Throughput {
    pub(super) streams: u32,
    pub(super) direction: Direction,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
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

    fn measure(&self, lab: &Lab, contender: &Contender, duration: Duration) -> Result<Vec<Option<f64>>> {
        let port = Service::TCP.first_port.to_string();
        let container = CONTAINER.to_string();
        let server = Process::spawn(lab.net.container.command("iperf3").args([
            "-s",
            "-1",
            "--forceflush",
            "-B",
            &container,
            "-p",
            &port,
        ]));
        server.wait_for_line("Server listening", PATIENCE);
        let running = contender.start(lab, Service::TCP)?;

        let seconds = duration.as_secs().to_string();
        let streams = self.streams.to_string();
        let host = HOST.to_string();
        let mut client = lab.net.client.command("iperf3");
        client.args(["-J", "-i", "0", "-c", &host, "-p", &port, "-t", &seconds, "-P", &streams]);
        if self.direction == Direction::Down {
            client.arg("-R");
        }
        let before = running.cpu_seconds();
        let output = Process::spawn(&mut client).wait_for_output(duration + PATIENCE);
        let after = running.cpu_seconds();
        let report = Report::parse(&output).context("iperf3")?;
        let gigabytes = report.bytes / 1e9;
        Ok(vec![Some(report.bits_per_second / 1e9), per(before, after, gigabytes)])
    }
}
