//! Egress of a container: through the slirp4netns of tidegate, the original one, pasta, and
//! masquerade by the kernel.
//!
//! The container is a namespace without a network. The server is outside of the host, on a link
//! with an MTU of 1500 bytes.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use tempfile::NamedTempFile;
use tidegate_testbed::{Namespace, Process, addr, eventually, procfs};

use super::throughput::{Direction, EXTRA_TIME, serve};
use super::{Metric, Scenario, per};
use crate::contender::{Contender, Kind};
use crate::iperf::Report;
use crate::lab::{Lab, Service};
use crate::load::MESSAGE;
use crate::load::server::RequestServer;

/// The size of a datagram in bytes.
const DATAGRAM: u32 = 1200;

/// The number of open connections for the memory measurement.
const HELD: usize = 5_000;

/// The server for small exchanges.
const SMALL: SocketAddr = SocketAddr::new(IpAddr::V4(addr::CLIENT_V4), 5300);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Bulk transfer over TCP streams.
    Tcp { streams: u32, direction: Direction },
    /// A flood of datagrams.
    Udp { direction: Direction },
    /// A request and its response, on one connection.
    Latency,
    /// Connections with one request each, so many in parallel.
    Connections { at_a_time: u32 },
    /// Connections with one request each, this many in parallel.
    Held,
}

/// A load, and the MTU between the container and the helper.
pub(super) struct Egress {
    pub(super) mtu: u32,
    pub(super) load: Load,
}

/// All loads.
pub(super) fn all(quick: bool) -> impl Iterator<Item = Egress> {
    let directions = [Direction::Up, Direction::Down];
    let streams: &[u32] = if quick { &[1] } else { &[1, 8] };
    let mut all = Vec::new();
    for mtu in [1500, 65520] {
        for streams in streams {
            all.extend(
                directions.map(|direction| Egress {
                    mtu,
                    load: Load::Tcp { streams: *streams, direction },
                }),
            );
        }
    }
    let one = directions.map(|direction| Load::Udp { direction });
    let rest = [
        Load::Latency,
        Load::Connections { at_a_time: 1 },
        Load::Connections { at_a_time: 16 },
        Load::Held,
    ];
    all.extend(one.into_iter().chain(rest).map(|load| Egress { mtu: 1500, load }));
    all.into_iter()
}

impl Scenario for Egress {
    fn name(&self) -> String {
        let load = match self.load {
            Load::Tcp { streams, direction } => {
                format!("tcp.{}.{streams}.{}", self.mtu, direction.name())
            }
            Load::Udp { direction } => format!("udp.{}", direction.name()),
            Load::Latency => "latency".to_owned(),
            Load::Connections { at_a_time } => format!("connections.{at_a_time}"),
            Load::Held => "held".to_owned(),
        };
        format!("egress.{load}")
    }

    fn metrics(&self) -> Vec<Metric> {
        let name = self.name();
        let metric =
            |part: &str, title: String, unit| Metric::new(format!("{name}.{part}"), title, unit);
        match self.load {
            Load::Tcp { streams, direction } => {
                let plural = if streams == 1 { "" } else { "s" };
                let title = format!(
                    "Egress, MTU {}, TCP, {streams} stream{plural} {}",
                    self.mtu,
                    direction.name()
                );
                vec![
                    metric("rate", title.clone(), "Gbit/s"),
                    metric("cpu", format!("{title}: CPU"), "s/GB"),
                ]
            }
            Load::Udp { direction } => {
                vec![metric(
                    "rate",
                    format!("Egress, UDP {DATAGRAM} B {}", direction.name()),
                    "packets/s",
                )]
            }
            Load::Latency => {
                vec![metric("median", "Egress, a question and its answer, median".to_owned(), "us")]
            }
            Load::Connections { at_a_time } => {
                vec![metric(
                    "rate",
                    format!("Egress, new connections, {at_a_time} at a time"),
                    "1/s",
                )]
            }
            Load::Held => {
                vec![metric("memory", format!("Egress, RSS with {HELD} connections"), "MB")]
            }
        }
    }

    fn takes(&self, kind: Kind) -> bool {
        let has_process = kind != Kind::Masquerade;
        kind.provides_egress() && (has_process || self.load != Load::Held)
    }

    fn most_rounds(&self) -> u32 {
        if self.load == Load::Held { 2 } else { u32::MAX }
    }

    fn measure(
        &self,
        lab: &Lab,
        contender: &Contender,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let setup = Setup::start(lab, contender, self.mtu)?;
        setup.container.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
        // Permits connections at the highest possible rate.
        setup.container.sysctl("net.ipv4.tcp_tw_reuse", "1");
        let control = lab.net.host.read_sysctl("net.ipv4.tcp_congestion_control");
        setup.container.sysctl("net.ipv4.tcp_congestion_control", &control);
        match self.load {
            Load::Tcp { streams, direction } => setup.tcp(lab, streams, direction, duration),
            Load::Udp { direction } => setup.udp(lab, direction, duration),
            Load::Latency => {
                let _server = RequestServer::start(&lab.net.client, SMALL)?;
                setup.latency(duration)
            }
            Load::Connections { at_a_time } => {
                let _server = RequestServer::start(&lab.net.client, SMALL)?;
                setup.connections(at_a_time, duration)
            }
            Load::Held => {
                let _server = RequestServer::start(&lab.net.client, SMALL)?;
                setup.held()
            }
        }
    }
}

/// A container with egress.
struct Setup {
    container: Namespace,
    /// The helper process; `None` for masquerade by the kernel.
    helper: Option<Process>,
    _file: Option<NamespaceFile>,
}

/// A file that represents a namespace, because pasta cannot open descriptors of another process.
struct NamespaceFile(NamedTempFile);

impl NamespaceFile {
    fn new(namespace: &Namespace) -> Result<Self> {
        let file = NamedTempFile::new()?;
        mount_bind(namespace.path(), file.path())?;
        Ok(Self(file))
    }
}

impl Drop for NamespaceFile {
    fn drop(&mut self) {
        // A leftover mount would keep the file visible.
        let _ = unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

impl Setup {
    fn start(lab: &Lab, contender: &Contender, mtu: u32) -> Result<Self> {
        let container = Namespace::new();
        let path = container.path().display().to_string();
        let host = &lab.net.host;
        let mut command = contender.command(lab);
        let mut file = None;
        let helper = match contender.kind {
            Kind::Masquerade => {
                host.ip_all(&format!(
                    "link add egress type veth peer name eth0 netns {path}
                     addr add 10.0.2.2/24 dev egress
                     link set egress mtu {mtu} up"
                ));
                container.ip_all(&format!(
                    "addr add 10.0.2.100/24 dev eth0
                     link set eth0 mtu {mtu} up
                     route add default via 10.0.2.2"
                ));
                host.sysctl("net.ipv4.ip_forward", "1");
                let rule = "table ip out { chain out { type nat hook postrouting priority srcnat; ip saddr 10.0.2.0/24 masquerade; }; }";
                host.exec("nft", &[rule]);
                None
            }
            Kind::Pasta => {
                let file = file.insert(NamespaceFile::new(&container)?);
                command.args([
                    "--foreground",
                    "--config-net",
                    "--quiet",
                    "--runas",
                    "0:0",
                    "--no-map-gw",
                    "-4",
                ]);
                command.args(["-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
                command.args([
                    "--address",
                    "10.0.2.100",
                    "--netmask",
                    "24",
                    "--gateway",
                    "10.0.2.2",
                ]);
                command.args([
                    "--interface",
                    "eth0",
                    "--ns-ifname",
                    "tap0",
                    "--mtu",
                    &mtu.to_string(),
                    "--netns-only",
                    "--netns",
                ]);
                command.arg(file.0.path());
                Some(start(&mut command, &container, contender)?)
            }
            _ => {
                command.args([
                    "--configure",
                    "--netns-type=path",
                    &format!("--mtu={mtu}"),
                    &path,
                    "tap0",
                ]);
                Some(start(&mut command, &container, contender)?)
            }
        };
        Ok(Self { container, helper, _file: file })
    }

    fn cpu_seconds(&self) -> Option<f64> {
        let of = |pid| procfs::cpu_seconds(pid).unwrap_or(0.0);
        self.helper.as_ref().map(|helper| procfs::tree(helper.pid()).into_iter().map(of).sum())
    }

    fn tcp(
        &self,
        lab: &Lab,
        streams: u32,
        direction: Direction,
        duration: Duration,
    ) -> Result<Vec<Option<f64>>> {
        let _server = serve(&lab.net.client, addr::CLIENT_V4);
        let before = self.cpu_seconds();
        let report = self.iperf(direction, duration, &["-P", &streams.to_string()])?;
        let after = self.cpu_seconds();
        Ok(vec![Some(report.bits_per_second / 1e9), per(before, after, report.bytes / 1e9)])
    }

    fn udp(&self, lab: &Lab, direction: Direction, duration: Duration) -> Result<Vec<Option<f64>>> {
        let _server = serve(&lab.net.client, addr::CLIENT_V4);
        let report =
            self.iperf(direction, duration, &["-u", "-b", "0", "-l", &DATAGRAM.to_string()])?;
        Ok(vec![Some(report.bits_per_second / 8.0 / f64::from(DATAGRAM))])
    }

    fn iperf(&self, direction: Direction, duration: Duration, more: &[&str]) -> Result<Report> {
        let (server, port) = (addr::CLIENT_V4.to_string(), Service::TCP.first_port.to_string());
        let seconds = duration.as_secs().to_string();
        let mut client = self.container.command("iperf3");
        client.args(["-J", "-i", "0", "-c", &server, "-p", &port, "-t", &seconds]).args(more);
        if direction == Direction::Down {
            client.arg("-R");
        }
        let output = Process::spawn(&mut client).wait_for_output(duration + EXTRA_TIME);
        Report::parse(&output).context("iperf3")
    }

    fn latency(&self, duration: Duration) -> Result<Vec<Option<f64>>> {
        let mut times = self.container.run(|| -> Result<Vec<Duration>> {
            let mut stream = connect()?;
            let (mut times, until) = (Vec::new(), Instant::now() + duration);
            while Instant::now() < until {
                let begun = Instant::now();
                exchange(&mut stream)?;
                times.push(begun.elapsed());
            }
            Ok(times)
        })?;
        times.sort_unstable();
        Ok(vec![times.get(times.len() / 2).map(|time| time.as_secs_f64() * 1e6)])
    }

    fn connections(&self, at_a_time: u32, duration: Duration) -> Result<Vec<Option<f64>>> {
        let until = Instant::now() + duration;
        let client = || {
            self.container.run(|| -> Result<u32> {
                let mut count = 0;
                while Instant::now() < until {
                    exchange(&mut connect()?)?;
                    count += 1;
                }
                Ok(count)
            })
        };
        let counts = thread::scope(|scope| {
            let threads: Vec<_> = (0..at_a_time).map(|_| scope.spawn(client)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("clients do not panic"))
                .collect::<Result<Vec<u32>>>()
        })?;
        Ok(vec![Some(f64::from(counts.iter().sum::<u32>()) / duration.as_secs_f64())])
    }

    fn held(&self) -> Result<Vec<Option<f64>>> {
        let held = self.container.run(|| -> Result<Vec<TcpStream>> {
            (0..HELD)
                .map(|_| {
                    let mut stream = connect()?;
                    exchange(&mut stream)?;
                    Ok(stream)
                })
                .collect()
        })?;
        let memory = self.helper.as_ref().map(|helper| {
            let of = |pid| procfs::rss(pid).unwrap_or(0) as f64;
            procfs::tree(helper.pid()).into_iter().map(of).sum::<f64>() / 1e6
        });
        drop(held);
        Ok(vec![memory])
    }
}

/// Starts a helper and waits until the container has egress.
fn start(command: &mut Command, container: &Namespace, contender: &Contender) -> Result<Process> {
    let mut process = Process::spawn(command);
    let ready = || container.ip(&["route", "show", "default"]).contains("tap0");
    let name = contender.kind.name();
    ensure!(
        eventually(Duration::from_secs(10), ready),
        "{name} is not ready: {}",
        process.output()
    );
    ensure!(process.is_running(), "{name} has exited: {}", process.output());
    Ok(process)
}

fn connect() -> Result<TcpStream> {
    let stream = TcpStream::connect(SMALL)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> Result<()> {
    let mut message = [0; MESSAGE];
    stream.write_all(&message)?;
    Ok(stream.read_exact(&mut message)?)
}
