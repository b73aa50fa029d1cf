//! UDP: the rate of datagrams of a flood that reach the container.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Metric, Scenario, per};
use crate::contender::{Contender, Kind};
use crate::lab::{Lab, Service};
use crate::load::datagrams::{Counter, Flood};

/// The time from the start of the flood to the start of counting.
const WARM_UP: Duration = Duration::from_millis(300);

/// A client that sends datagrams of `size` bytes as fast as it can. With `offload`, the kernel
/// segments them (UDP_SEGMENT), as for QUIC senders.
pub(super) struct Datagrams {
    pub(super) size: usize,
    pub(super) offload: bool,
}

impl Scenario for Datagrams {
    fn name(&self) -> String {
        format!("udp.{}{}", self.size, if self.offload { "-gso" } else { "" })
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let sender = if self.offload { " from a GSO sender" } else { "" };
        let title = format!("UDP received, {} B{sender}", self.size);
        vec![
            Metric::new(format!("{name}.rate"), &title, "kpps"),
            Metric::new(format!("{name}.cpu"), format!("{title}: CPU"), "us each"),
        ]
    }

    fn takes(&self, kind: Kind) -> bool {
        kind.does_udp()
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let counter = Counter::start(&lab.net.container, Service::UDP.backend())?;
        let running = contender.start(lab, Service::UDP)?;
        let flood =
            Flood::start(&lab.net.client, Service::UDP.published(), self.size, self.offload)?;
        thread::sleep(WARM_UP);
        let (start, before, first) = (Instant::now(), running.cpu_seconds(), counter.received());
        thread::sleep(duration);
        let (elapsed, after, last) = (start.elapsed(), running.cpu_seconds(), counter.received());
        drop(flood);
        let received = (last - first) as f64;
        ensure!(received > 0.0, "no datagram reached the container");
        let rate = received / elapsed.as_secs_f64();
        Ok(vec![Some(rate / 1e3), per(before, after, received).map(|seconds| seconds * 1e6)])
    }
}
