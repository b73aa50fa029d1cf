//! What is taken from a client on behalf of a server that does not read.

use std::time::Duration;

use anyhow::Result;
use tidegate_testbed::server::StalledServer;

use super::{Metric, Scenario};
use crate::contender::Contender;
use crate::lab::{Lab, Service};
use crate::load::client;

/// A path that takes nothing for this long has no more room.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where to stop with a path that takes everything.
const LIMIT: usize = 1 << 30;

/// A client that pushes, and a server that accepts and never reads.
///
/// The figure is what has left the client: what the path holds, the server's own receive buffer
/// included. What still waits in the client's own socket is not the path's; the kernel's own path
/// shows the least it can be.
pub(super) struct Stalled;

impl Scenario for Stalled {
    fn name(&self) -> String {
        "stalled".into()
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![Metric::new("stalled", "Buffered for a stalled peer", "MB")]
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
        let _server = StalledServer::tcp(&lab.net.container, Service::TCP.backend());
        let _running = contender.start(lab, Service::TCP)?;
        let pushed =
            lab.net.client.run(|| client::push(Service::TCP.published(), PATIENCE, LIMIT))?;
        Ok(vec![Some(pushed as f64 / 1e6)])
    }
}
