//! A connection per request: the rate of new connections of a published port.

use std::time::Duration;

use anyhow::Result;

use super::{Metric, Scenario, per};
use crate::contender::Contender;
use crate::lab::{Lab, Service};
use crate::load::{client, server::RequestServer};

/// Connects, makes one request and closes, with `at_a_time` connections in parallel.
pub(super) struct Connections {
    pub(super) at_a_time: usize,
}

impl Scenario for Connections {
    fn name(&self) -> String {
        format!("connections.{}", self.at_a_time)
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let title = format!("New connections, {} at a time", self.at_a_time);
        vec![
            Metric::new(format!("{name}.rate"), &title, "1/s"),
            Metric::new(format!("{name}.cpu"), format!("{title}: CPU"), "us each"),
        ]
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let _server = RequestServer::start(&lab.net.container, Service::TCP.backend())?;
        let running = contender.start(lab, Service::TCP)?;
        let target = Service::TCP.published();
        let before = running.cpu_seconds();
        let (rate, count) =
            lab.net.client.run(|| client::connections(target, self.at_a_time, duration))?;
        let after = running.cpu_seconds();
        Ok(vec![Some(rate), per(before, after, count as f64).map(|seconds| seconds * 1e6)])
    }
}
