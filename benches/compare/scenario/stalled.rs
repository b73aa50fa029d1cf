//! The amount that is buffered for a server that does not read.

use std::time::Duration;

use anyhow::Result;
use tidegate_testbed::server::StalledServer;

use super::{Metric, Scenario};
use crate::contender::Contender;
use crate::lab::{Lab, Service};
use crate::load::client;

/// The time without progress after which a path counts as full.
const QUIET: Duration = Duration::from_secs(2);

/// The limit for a path that never blocks.
const LIMIT: usize = 1 << 30;

/// A client that sends, and a server that accepts and never reads.
///
/// The figure is the number of bytes that have left the client and are buffered on the path,
/// including the receive buffer of the server. The send buffer of the client is not part of the
/// path. Forwarding by the kernel is the minimum.
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
        let pushed = lab.net.client.run(|| client::push(Service::TCP.published(), QUIET, LIMIT))?;
        Ok(vec![Some(pushed as f64 / 1e6)])
    }
}
