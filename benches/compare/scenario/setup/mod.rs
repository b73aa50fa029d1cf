//! How long networks take to come and to go: `tidegate up` on namespaces that are there already,
//! and netavark doing the same.
//!
//! Times are those of whole processes, from their start: to the exit of netavark, to the
//! announcement of tidegate that all is up, and from the signal to the exit of tidegate. That the
//! ports answer is seen to outside of what is timed.

mod netavark;
pub(super) mod project;

use std::cell::OnceCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use tidegate_testbed::Namespace;

use super::{Metric, Scenario};
use crate::contender::{Contender, Kind};
use crate::lab::{HOST, Lab};
use crate::load::{client, server::RequestServer};

/// Where the first endpoint's port is published; those of the others follow.
const FIRST_PORT: u16 = 20_000;

/// Where a server listens in an endpoint.
const CONTAINER_PORT: u16 = 80;

/// How long anything may take before it is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was timed.
struct Times {
    ready: Duration,
    gone: Duration,
}

/// What closes the networks of `tidegate up`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Firewall {
    None,
    Nftables,
    Iptables,
}

impl Firewall {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }

    fn flag(self) -> String {
        format!("--firewall={}", self.name())
    }
}

/// One network, one endpoint, one published TCP port.
///
/// netavark publishes the port by its default firewall: before 2.0 that is iptables, then nftables.
pub(super) struct Single {
    pub(super) firewall: Firewall,
}

impl Scenario for Single {
    fn name(&self) -> String {
        format!("setup.netavark.{}", self.firewall.name())
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let title = format!("Network with one endpoint and port ({})", self.firewall.name());
        vec![
            Metric::new(format!("{name}.ready"), format!("{title}: set up"), "ms"),
            Metric::new(format!("{name}.gone"), format!("{title}: taken down"), "ms"),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        matches!(kind, Kind::Netavark | Kind::Publish)
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        _duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let endpoints = [Namespace::new()];
        let check = || answer(lab, &endpoints);
        let times = match contender.kind {
            Kind::Netavark => netavark::time(lab, contender, &endpoints[0], check)?,
            _ => project::time(lab, contender, 1, &endpoints, self.firewall, check)?,
        };
        Ok(vec![Some(times.ready.as_secs_f64() * 1e3), Some(times.gone.as_secs_f64() * 1e3)])
    }
}

/// Namespaces to be endpoints, made when they are first asked for and kept for the whole run: the
/// kernel takes seconds to take a thousand of them apart, and the cells after that would feel it.
#[derive(Clone)]
pub(super) struct Endpoints {
    count: u16,
    made: Rc<OnceCell<Vec<Namespace>>>,
}

impl Endpoints {
    /// `count` of them.
    pub(super) fn new(count: u16) -> Self {
        Self { count, made: Rc::default() }
    }

    fn get(&self) -> &[Namespace] {
        self.made.get_or_init(|| (0..self.count).map(|_| Namespace::new()).collect())
    }
}

/// As many endpoints as there are, each with a published TCP port, spread over some networks.
pub(super) struct Many {
    pub(super) networks: u8,
    pub(super) firewall: Firewall,
    pub(super) endpoints: Endpoints,
}

impl Scenario for Many {
    fn name(&self) -> String {
        format!("setup.{}.{}.{}", self.endpoints.count, self.networks, self.firewall.name())
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let plural = if self.networks == 1 { "" } else { "s" };
        let (count, firewall) = (self.endpoints.count, self.firewall.name());
        let title =
            format!("{count} endpoints and ports, {} network{plural} ({firewall})", self.networks);
        vec![
            Metric::new(format!("{name}.ready"), format!("{title}: set up"), "s"),
            Metric::new(format!("{name}.gone"), format!("{title}: taken down"), "s"),
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
        let endpoints = self.endpoints.get();
        let times = project::time(lab, contender, self.networks, endpoints, self.firewall, || {
            answer(lab, endpoints)
        })?;
        Ok(vec![Some(times.ready.as_secs_f64()), Some(times.gone.as_secs_f64())])
    }
}

/// Makes sure that the published ports of the first and the last of `endpoints` answer the client.
fn answer(lab: &Lab, endpoints: &[Namespace]) -> Result<()> {
    let ends = endpoints.iter().zip(FIRST_PORT..);
    let last = endpoints.len().saturating_sub(1);
    for (endpoint, port) in
        ends.enumerate().filter(|(number, _)| [0, last].contains(number)).map(|(_, end)| end)
    {
        let server =
            RequestServer::start(endpoint, (Ipv4Addr::UNSPECIFIED, CONTAINER_PORT).into())?;
        let published = SocketAddr::from((HOST, port));
        let asked = lab.net.client.run(|| client::idle(published, &[Ipv4Addr::UNSPECIFIED], 1));
        drop(asked.with_context(|| format!("published port {port}"))?);
        // What is still open would have to be waited for, or cut.
        server.wait_until_open(0, PATIENCE)?;
    }
    Ok(())
}
