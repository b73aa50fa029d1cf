//! The network of a test, and `tidegate publish` in it.

use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use tempfile::TempDir;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, Topology, addr};

/// A timeout with a margin for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// The sysctls that publishing sets in the container namespace.
const MARK_SYSCTLS: [&str; 3] =
    ["net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"];

/// The ports of [`Servers`]; each is published 8000 higher.
pub(crate) const SPECIFIC: u16 = 80;
pub(crate) const WILDCARD: u16 = 81;
pub(crate) const DUAL_STACK: u16 = 82;
pub(crate) const SERVED: [u16; 3] = [SPECIFIC, WILDCARD, DUAL_STACK];

/// The difference between a published port and the container port.
pub(crate) const PORT_OFFSET: u16 = 8000;

/// Client, host, container and neighbour.
pub(crate) struct Scene {
    pub(crate) net: Topology,
    pub(crate) neighbour: Namespace,
    /// The run directory, in place of `/run/tidegate`.
    run: TempDir,
}

/// Both address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// How `tidegate publish` is configured: the container and the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Only `--netns`.
    Netns,
    NetnsProxy,
    NetnsClient,
    /// Only `--pid`.
    Pid,
    PidClient,
    /// Only `--to`.
    To(Family),
    ToClient(Family),
}

/// Servers in the container that send each client its address.
pub(crate) struct Servers(#[expect(dead_code, reason = "stopped when dropped")] Vec<PeerServer>);

/// A running `tidegate publish`.
pub(crate) struct Publisher {
    process: Process,
    host: Namespace,
    metrics: SocketAddr,
    /// The process of `--pid`, if the mode needs one.
    _resident: Option<Process>,
}

/// The rules, routes and sysctls of every namespace that tidegate might change.
#[derive(PartialEq, Eq)]
pub(crate) struct State(String);

impl Scene {
    pub(crate) fn new() -> Self {
        let net = Topology::three();
        let neighbour = net.neighbour();
        for interface in ["all", "default", "lo", "eth0"] {
            net.container.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "1");
        }
        Self { net, neighbour, run: tempfile::tempdir().expect("make a directory") }
    }

    /// `program` in the namespace of the host, with the run directory of this scene.
    pub(crate) fn command(&self, program: &str) -> std::process::Command {
        let mut command = self.net.host.command(program);
        command
            .env("TIDEGATE_RUN_DIR", self.run.path())
            .env("TIDEGATE_LOG", "warn")
            .current_dir("/");
        command
    }

    /// Publishes `specs` and waits until they are ready.
    #[track_caller]
    pub(crate) fn publish(&self, mode: Mode, specs: &[&str], options: &[&str]) -> Publisher {
        let resident = mode.needs_resident().then(|| self.resident());
        let target = mode.arguments(&self.net.container, resident.as_ref());
        let mut command = self.command(env!("CARGO_BIN_EXE_tidegate"));
        command.arg("publish").args(specs).args(&target);
        command.args(["--metrics", "127.0.0.1:0"]).args(options);
        let process = Process::spawn(&mut command);
        // The last line of output.
        let line = process.wait_for_line("metrics at http://", SOON);
        let metrics = line.trim_start_matches("metrics at http://").trim_end_matches("/metrics");
        let metrics = metrics.parse().unwrap_or_else(|error| panic!("{line}: {error}"));
        Publisher { process, host: self.net.host.clone(), metrics, _resident: resident }
    }

    /// Publishes all of [`SERVED`], TCP and UDP.
    #[track_caller]
    pub(crate) fn publish_all(&self, mode: Mode, options: &[&str]) -> Publisher {
        let ports = format!("{}-{}:80-82", PORT_OFFSET + SPECIFIC, PORT_OFFSET + DUAL_STACK);
        self.publish(mode, &[&ports, &format!("{ports}/udp")], options)
    }

    /// A process in the container.
    fn resident(&self) -> Process {
        let resident = Process::spawn(
            self.net.container.command("sh").args(["-c", "echo in; exec sleep 600"]),
        );
        resident.wait_for_line("in", SOON);
        resident
    }

    #[track_caller]
    pub(crate) fn state(&self) -> State {
        let mut text = String::new();
        for (name, namespace) in [("container", &self.net.container), ("host", &self.net.host)] {
            for family in ["-4", "-6"] {
                for what in ["rule", "route show table all"] {
                    let mut arguments = vec![family];
                    arguments.extend(what.split(' '));
                    text += &format!("{name}: ip {family} {what}\n{}", namespace.ip(&arguments));
                }
            }
            for sysctl in MARK_SYSCTLS {
                text += &format!("{name}: {sysctl} = {}\n", namespace.read_sysctl(sysctl));
            }
        }
        State(text)
    }

    /// Asserts that the state equals `before`, and that no journal is left.
    #[track_caller]
    pub(crate) fn assert_untouched(&self, before: &State, after_what: &str) {
        let after = self.state();
        assert!(
            *before == after,
            "{after_what}: removed\n{}added\n{}",
            before.less(&after),
            after.less(before)
        );
        assert_eq!(self.journals(), [""; 0], "{after_what}: journals");
    }

    /// The files of the policy journal.
    pub(crate) fn journals(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.run_directory().join("policy")) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.expect("read it").file_name().to_string_lossy().into_owned())
            .collect()
    }

    pub(crate) fn run_directory(&self) -> &Path {
        self.run.path()
    }
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(crate) fn pick(self, v4: Ipv4Addr, v6: Ipv6Addr) -> IpAddr {
        match self {
            Self::V4 => v4.into(),
            Self::V6 => v6.into(),
        }
    }

    /// The address of the client.
    pub(crate) fn client(self) -> IpAddr {
        self.pick(addr::CLIENT_V4, addr::CLIENT_V6)
    }

    /// The address of the host on the side of the client.
    pub(crate) fn host(self) -> IpAddr {
        self.pick(addr::HOST_V4, addr::HOST_V6)
    }

    pub(crate) fn gateway(self) -> IpAddr {
        self.pick(addr::GATEWAY_V4, addr::GATEWAY_V6)
    }

    pub(crate) fn container(self) -> IpAddr {
        self.pick(addr::CONTAINER_V4, addr::CONTAINER_V6)
    }

    pub(crate) fn neighbour(self) -> IpAddr {
        self.pick(addr::NEIGHBOUR_V4, addr::NEIGHBOUR_V6)
    }

    pub(crate) fn loopback(self) -> IpAddr {
        self.pick(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST)
    }

    pub(crate) fn unspecified(self) -> IpAddr {
        self.pick(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED)
    }
}

impl Mode {
    /// The modes that may change rules, routes and sysctls.
    pub(crate) const STEERING: [Self; 5] = [
        Self::Netns,
        Self::NetnsProxy,
        Self::NetnsClient,
        Self::ToClient(Family::V4),
        Self::ToClient(Family::V6),
    ];

    pub(crate) const ALL: [Self; 9] = [
        Self::Netns,
        Self::NetnsProxy,
        Self::NetnsClient,
        Self::Pid,
        Self::PidClient,
        Self::To(Family::V4),
        Self::To(Family::V6),
        Self::ToClient(Family::V4),
        Self::ToClient(Family::V6),
    ];

    fn needs_resident(self) -> bool {
        matches!(self, Self::Pid | Self::PidClient)
    }

    fn arguments(self, container: &Namespace, resident: Option<&Process>) -> Vec<String> {
        let target = match (self, resident) {
            (Self::To(family) | Self::ToClient(family), _) => {
                ["--to".into(), family.container().to_string()]
            }
            (_, Some(resident)) => ["--pid".into(), resident.pid().to_string()],
            (_, None) => ["--netns".into(), container.path().display().to_string()],
        };
        let source = match self {
            Self::NetnsProxy => Some("proxy"),
            Self::NetnsClient | Self::PidClient | Self::ToClient(_) => Some("client"),
            Self::Netns | Self::Pid | Self::To(_) => None,
        };
        target.into_iter().chain(source.map(|source| format!("--source={source}"))).collect()
    }

    /// The family of the container address for a client of family `client`.
    pub(crate) fn towards(self, client: Family) -> Family {
        match self {
            Self::To(family) | Self::ToClient(family) => family,
            _ => client,
        }
    }
}

impl Servers {
    /// Starts servers on all of [`SERVED`] in the container of `scene`, TCP and UDP.
    pub(crate) fn start(scene: &Scene) -> Self {
        let container = &scene.net.container;
        // The default of new sockets.
        container.sysctl("net.ipv6.bindv6only", "1");
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for family in Family::BOTH {
            addresses.push((family.container(), SPECIFIC).into());
            addresses.push((family.unspecified(), WILDCARD).into());
        }
        let mut servers: Vec<PeerServer> = Vec::new();
        let mut start = |address: SocketAddr| {
            servers.push(PeerServer::tcp(container, address));
            servers.push(PeerServer::udp(container, address));
        };
        addresses.into_iter().for_each(&mut start);
        container.sysctl("net.ipv6.bindv6only", "0");
        start((Ipv6Addr::UNSPECIFIED, DUAL_STACK).into());
        Self(servers)
    }
}

impl Publisher {
    /// Ends the process with SIGTERM, like a service manager.
    #[track_caller]
    pub(crate) fn terminate(mut self) {
        let status = self.process.stop(Signal::TERM, SOON);
        assert_eq!(status.code(), Some(0), "output:\n{}", self.process.output());
    }

    /// Kills the process, without a chance to clean up.
    pub(crate) fn kill(mut self) {
        self.process.stop(Signal::KILL, SOON);
    }

    /// The log and the standard output.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }

    /// The number of flows that fell back to the gateway for `reason`.
    #[track_caller]
    pub(crate) fn fallbacks(&self, reason: &str) -> u64 {
        let page = self.host.run(|| {
            let mut stream = TcpStream::connect(self.metrics)?;
            stream.set_read_timeout(Some(SOON))?;
            stream
                .write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
            let mut page = String::new();
            stream.read_to_string(&mut page)?;
            Ok::<_, std::io::Error>(page)
        });
        let page = page.expect("scrape the metrics");
        let series = format!("tidegate_proxy_source_fallbacks_total{{reason=\"{reason}\"}} ");
        assert!(page.starts_with("HTTP/1.1 200 "), "{page}");
        // The counters exist only in modes that show clients.
        let value = page.lines().find_map(|line| line.strip_prefix(&series));
        value.map_or(0, |value| value.parse().expect("an integer"))
    }
}

impl State {
    /// The lines that `other` does not contain.
    pub(crate) fn less(&self, other: &Self) -> String {
        let lines = self.0.lines().filter(|line| !other.0.lines().any(|other| other == *line));
        lines.map(|line| format!("{line}\n")).collect()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
