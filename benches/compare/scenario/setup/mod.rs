//! The time to set up and take down networks: `tidegate up` with existing namespaces, and netavark
//! doing the same.
//!
//! Times are those of whole processes: from the start to the exit of netavark, from the start of
//! tidegate to its announcement that it is ready, and from the signal to its exit. The check that
//! ports are served is not part of the time.

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

/// The published port of the first endpoint; those of the others follow.
const FIRST_PORT: u16 = 20_000;

/// The port of the server in an endpoint.
const CONTAINER_PORT: u16 = 80;

/// The timeout of every step.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The times of setup and removal.
struct Times {
    ready: Duration,
    gone: Duration,
}

/// The firewall option of `tidegate up`.
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

/// One network with one endpoint and one published TCP port.
///
/// netavark publishes the port by its default firewall: iptables before 2.0, then nftables.
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

/// Namespaces for endpoints, created on first use and kept for the whole run. The kernel takes
/// seconds to destroy a thousand of them, which would affect later cells.
#[derive(Clone)]
pub(super) struct Endpoints {
    count: u16,
    made: Rc<OnceCell<Vec<Namespace>>>,
}

impl Endpoints {
    /// A set of `count` namespaces.
    pub(super) fn new(count: u16) -> Self {
        Self { count, made: Rc::default() }
    }

    /// The number of namespaces.
    pub(super) fn count(&self) -> usize {
        self.count.into()
    }

    /// The namespaces.
    pub(super) fn get(&self) -> &[Namespace] {
        self.made.get_or_init(|| (0..self.count).map(|_| Namespace::new()).collect())
    }
}

/// All endpoints, each with a published TCP port, distributed over several networks.
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

/// Checks that the published ports of the first and the last of `endpoints` are served.
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
        // Open connections would delay the exit or be reset.
        server.wait_until_open(0, TIMEOUT)?;
    }
    Ok(())
}
