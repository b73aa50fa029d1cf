//! Small requests on open connections: their rate and response times.

use std::time::Duration;

use anyhow::Result;

use super::{Metric, Scenario, per};
use crate::contender::Contender;
use crate::lab::{Lab, Service};
use crate::load::{client, server::RequestServer};

/// Connections, each with one request of 64 bytes in flight.
const CONNECTIONS: usize = 64;

/// 64 connections that send the next request after each response.
pub(super) struct Requests;

impl Scenario for Requests {
    fn name(&self) -> String {
        "requests".into()
    }

    fn metrics(&self) -> Vec<Metric> {
        vec![
            Metric::new("requests.rate", "Requests, 64 connections of 64 B", "1/s"),
            Metric::new("requests.p50", "Requests: median latency", "us"),
            Metric::new("requests.p99", "Requests: p99 latency", "us"),
            Metric::new("requests.cpu", "Requests: CPU", "us each"),
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
        let mut before = None;
        let at_start = || before = running.cpu_seconds();
        let result =
            lab.net.client.run(|| client::requests(target, CONNECTIONS, duration, at_start))?;
        let after = running.cpu_seconds();
        let micros = |latency: Duration| Some(latency.as_secs_f64() * 1e6);
        let count = result.per_second * duration.as_secs_f64();
        Ok(vec![
            Some(result.per_second),
            micros(result.p50),
            micros(result.p99),
            per(before, after, count).map(|seconds| seconds * 1e6),
        ])
    }
}
