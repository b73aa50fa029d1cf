//! TCP throughput of ports that the kernel translates, with the rules of Docker and with ours.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use tidegate_testbed::{Namespace, addr};

use super::setup::project::{self, Up};
use super::throughput::{Direction, load, serve};
use super::{Metric, Scenario};
use crate::contender::{Contender, Kind};
use crate::lab::{CONTAINER, Lab, Service};

/// The address of the container in tidegate.
const ENDPOINT: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 2);

/// The iptables rules of dockerd 20.10 for one network and one published port, with the bridge name
/// of the lab, in the format of `iptables-save`. Unreachable chains are omitted.
const DOCKER: &str = "\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.30.0.0/24 ! -o br0 -j MASQUERADE
-A POSTROUTING -s CONTAINER/32 -d CONTAINER/32 -p tcp -m tcp --dport PORT -j MASQUERADE
-A DOCKER -i br0 -j RETURN
-A DOCKER ! -i br0 -p tcp -m tcp --dport PORT -j DNAT --to-destination CONTAINER:PORT
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o br0 -j DOCKER
-A FORWARD -i br0 ! -o br0 -j ACCEPT
-A FORWARD -i br0 -o br0 -j ACCEPT
-A DOCKER -d CONTAINER/32 ! -i br0 -o br0 -p tcp -m tcp --dport PORT -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i br0 ! -o br0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o br0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
";

/// Bulk transfers over `streams` connections.
pub(super) struct Forward {
    pub(super) streams: u32,
    pub(super) direction: Direction,
}

impl Scenario for Forward {
    fn name(&self) -> String {
        format!("forward.{}.{}", self.streams, self.direction.name())
    }

    fn metrics(&self) -> Vec<Metric> {
        let plural = if self.streams == 1 { "" } else { "s" };
        let title = format!(
            "Translated by the kernel, {} stream{plural} {}",
            self.streams,
            self.direction.name()
        );
        vec![Metric::new(format!("{}.rate", self.name()), title, "Gbit/s")]
    }

    fn takes(&self, kind: Kind) -> bool {
        kind.translates()
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let firewall = match contender.kind {
            Kind::DockerRules | Kind::DockerRulesAgain => {
                let _server = serve(&lab.net.container, CONTAINER);
                restore(lab, contender)?;
                return self.rate(lab, duration);
            }
            Kind::KernelIptables => "--firewall=iptables",
            _ => "--firewall=nftables",
        };
        let endpoint = Namespace::new();
        let control = lab.net.host.read_sysctl("net.ipv4.tcp_congestion_control");
        endpoint.sysctl("net.ipv4.tcp_congestion_control", &control);
        let port = Service::TCP.first_port;
        let file = format!(
            "name: bench
networks: {{ n: {{ ipam: {{ config: [ {{ subnet: 10.100.0.0/24 }} ] }} }} }}
services: {{ s: {{ x-netns: {}, networks: {{ n: {{ ipv4_address: {ENDPOINT} }} }}, ports: [ \"{port}:{port}\" ] }} }}
",
            endpoint.path().display()
        );
        let Up { process: _up, directory: _files } =
            project::up(lab, contender, &file, &[firewall, "--publish=kernel"])?;
        let _server = serve(&endpoint, ENDPOINT);
        self.rate(lab, duration)
    }
}

impl Forward {
    fn rate(&self, lab: &Lab, duration: Duration) -> Result<Vec<Option<f64>>> {
        // The client and the server run on separate cores. The scheduler sometimes leaves both on
        // one core for a second, which halves the rate and exceeds the differences to be measured.
        let apart: &[&str] =
            if thread::available_parallelism()?.get() > 1 { &["-A", "0,1"] } else { &[] };
        let report = load(lab, self.streams, self.direction, duration, apart)?;
        Ok(vec![Some(report.bits_per_second / 1e9)])
    }
}

fn restore(lab: &Lab, contender: &Contender) -> Result<()> {
    let port = Service::TCP.first_port.to_string();
    let rules = DOCKER.replace("CONTAINER", &addr::CONTAINER_V4.to_string()).replace("PORT", &port);
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rules");
    std::fs::write(&file, rules)?;
    let output = contender.command(lab).arg(file).output()?;
    ensure!(
        output.status.success(),
        "iptables-restore: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
