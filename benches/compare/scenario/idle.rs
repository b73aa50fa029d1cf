//! Memory that idle connections hold in the process.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_testbed::{addr, raise_open_files};

use super::{Metric, Scenario};
use crate::contender::{Contender, Kind};
use crate::lab::{Lab, Service};
use crate::load::{client, server::RequestServer};

/// From the last request to the reading: memory that is handed back lazily gets the chance.
const SETTLE: Duration = Duration::from_millis(500);

/// How long the last connections may take to reach the container.
const PATIENCE: Duration = Duration::from_secs(10);

/// Open files that a process needs besides its connections.
const OTHER_FILES: usize = 400;

/// Clients that the connections are of, of this network: one alone gets two thirds of what a port
/// has.
const CLIENTS: u32 = 8;
const CLIENTS_NET: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);

/// Connections that have answered one request and then rest.
///
/// Where the limit of open files does not allow as many as wanted, for the contender or for our own
/// process with both ends of each, the cell stops there; `reached` tells.
pub(super) struct Idle {
    /// Numbers of connections to stop at, rising; the first is always possible.
    pub(super) counts: &'static [usize],
}

impl Scenario for Idle {
    fn name(&self) -> String {
        "idle".into()
    }

    fn metrics(&self) -> Vec<Metric> {
        let mut metrics = vec![Metric::new("idle.0", "RSS without a connection", "MB")];
        for count in self.counts {
            let title = format!("RSS per connection, {count} idle");
            metrics.push(Metric::new(format!("idle.{count}"), &title, "KB"));
            metrics.push(Metric::new(
                format!("idle.{count}.reached"),
                format!("{title}: reached"),
                "open",
            ));
        }
        metrics
    }

    fn takes(&self, kind: Kind) -> bool {
        // DNAT has no process; socat forks one for each connection.
        kind.publishes() && !matches!(kind, Kind::Dnat | Kind::Socat)
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
        let server = RequestServer::start(&lab.net.container, Service::TCP.backend())?;
        let running = contender.start(lab, Service::TCP)?;
        thread::sleep(SETTLE);
        let start = running.rss().context("no process to look at")?;
        let files_at_start = running.open_files();
        let mut figures = vec![Some(start / 1e6)];
        let network = format!("{CLIENTS_NET}/24");
        lab.net.client.ip(&["route", "replace", "local", &network, "dev", "lo"]);
        let by_client = addr::CLIENT_V4.to_string();
        lab.net.host.ip(&["route", "replace", &network, "via", &by_client]);
        let clients: Vec<Ipv4Addr> = (1..=CLIENTS)
            .map(|number| Ipv4Addr::from_bits(CLIENTS_NET.to_bits() + number))
            .collect();
        let mut connections = Vec::new();
        let mut possible = self.counts[0];
        for &count in self.counts {
            let wanted = count.min(possible).max(connections.len());
            let more = wanted - connections.len();
            connections.extend(
                lab.net.client.run(|| client::idle(Service::TCP.published(), &clients, more))?,
            );
            server.wait_until_open(wanted, PATIENCE)?;
            thread::sleep(SETTLE);
            let now = running.rss().context("no process to look at")?;
            figures.push(Some((now - start) / wanted as f64 / 1e3));
            figures.push(Some(wanted as f64));
            // Our own process holds the client's and the server's end.
            let files_each = ((running.open_files() - files_at_start) / wanted).max(2);
            possible = (open_files_limit() - OTHER_FILES) / files_each;
        }
        Ok(figures)
    }
}

/// The limit of open files that this process and its children have.
fn open_files_limit() -> usize {
    raise_open_files(0) as usize
}
