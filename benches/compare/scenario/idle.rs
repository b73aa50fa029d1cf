//! The memory of idle connections in the process.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_testbed::{addr, raise_open_files};

use super::{Metric, Scenario};
use crate::contender::{Contender, Kind};
use crate::lab::{Lab, Service};
use crate::load::{client, server::RequestServer};

/// The time from the last request to the reading, in which memory can be released lazily.
const SETTLE: Duration = Duration::from_millis(500);

/// The timeout for the last connections to reach the container.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The open files of a process in addition to its connections.
const OTHER_FILES: usize = 400;

/// The number of clients that open the connections. A client may hold at most twice the number of
/// connections that are still possible, so fewer clients would not reach the limit.
const CLIENTS: u32 = 64;
/// The network of the clients, a /24.
const CLIENTS_NET: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);

/// Connections that are idle after one request.
///
/// If the limit of open files is too low, for the contender or for this process with both ends of
/// each connection, the cell stops at the limit; `reached` is the number.
pub(super) struct Idle {
    /// The numbers of connections at which memory is read, ascending; the first is always possible.
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
        // DNAT has no process, and socat forks one per connection.
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
        let start = running.rss().context("no process to measure")?;
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
            server.wait_until_open(wanted, TIMEOUT)?;
            thread::sleep(SETTLE);
            let now = running.rss().context("no process to measure")?;
            figures.push(Some((now - start) / wanted as f64 / 1e3));
            figures.push(Some(wanted as f64));
            // This process holds the ends of the client and of the server.
            let files_each = ((running.open_files() - files_at_start) / wanted).max(2);
            possible = (open_files_limit() - OTHER_FILES) / files_each;
        }
        Ok(figures)
    }
}

/// The limit of open files of this process and its children.
fn open_files_limit() -> usize {
    raise_open_files(0) as usize
}
