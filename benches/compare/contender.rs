//! The compared ways to publish a port, and how each is started.

use std::env;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use tidegate_testbed::{
    Process, Protocol, debian_package, find_program, pass_fd, procfs, raise_open_files,
    version_line,
};

use crate::lab::{CONTAINER, HOST, Lab, Service};

/// Timeout for a contender to be ready.
const START: Duration = Duration::from_secs(20);

/// The pipes that haproxy may use for splice(2): one per direction of a busy connection.
const HAPROXY_PIPES: u64 = 64;

/// A way to publish a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// An nftables rule on the host: forwarding by the kernel.
    Dnat,
    /// Docker's userland proxy.
    DockerProxy,
    /// haproxy in TCP mode with splice(2), one thread per core.
    Haproxy,
    /// socat, one process per client.
    Socat,
    /// netavark, which sets up networks for podman. It cannot publish a port on an existing
    /// network.
    Netavark,
    /// `tidegate publish --to`; in scenarios that set up networks, `tidegate up`.
    Publish,
    /// `tidegate publish --netns`: the upstream socket is created in the container namespace.
    PublishNetns,
    /// The docker-proxy of tidegate.
    DropIn,
    /// The iptables rules of dockerd for a published port.
    DockerRules,
    /// The same rules again, to measure the variation between equal contenders.
    DockerRulesAgain,
    /// `tidegate up --publish=kernel --firewall=nftables`.
    KernelNftables,
    /// `tidegate up --publish=kernel --firewall=iptables`.
    KernelIptables,
    /// Masquerade by the kernel, with an nftables rule on the host.
    Masquerade,
    /// slirp4netns as used by rootless containers.
    Slirp,
    /// pasta as used by rootless containers.
    Pasta,
    /// The slirp4netns of tidegate: the NAT engine.
    Engine,
}

/// The contenders, in the order of columns.
pub(crate) const ALL: [Kind; 16] = [
    Kind::Dnat,
    Kind::DockerProxy,
    Kind::Haproxy,
    Kind::Socat,
    Kind::Netavark,
    Kind::Publish,
    Kind::PublishNetns,
    Kind::DropIn,
    Kind::DockerRules,
    Kind::DockerRulesAgain,
    Kind::KernelNftables,
    Kind::KernelIptables,
    Kind::Masquerade,
    Kind::Slirp,
    Kind::Pasta,
    Kind::Engine,
];

impl Kind {
    /// The name in options, tables and files.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dnat => "dnat",
            Self::DockerProxy => "docker-proxy",
            Self::Haproxy => "haproxy",
            Self::Socat => "socat",
            Self::Netavark => "netavark",
            Self::Publish => "tidegate",
            Self::PublishNetns => "tidegate-netns",
            Self::DropIn => "drop-in",
            Self::DockerRules => "docker-rules",
            Self::DockerRulesAgain => "docker-rules-2",
            Self::KernelNftables => "nftables",
            Self::KernelIptables => "iptables",
            Self::Masquerade => "masquerade",
            Self::Slirp => "slirp4netns",
            Self::Pasta => "pasta",
            Self::Engine => "engine",
        }
    }

    /// Whether it is part of tidegate.
    pub(crate) fn is_ours(self) -> bool {
        matches!(
            self,
            Self::Publish
                | Self::PublishNetns
                | Self::DropIn
                | Self::KernelNftables
                | Self::KernelIptables
                | Self::Engine
        )
    }

    /// Whether it can publish a TCP port of a container with an existing network.
    pub(crate) fn publishes(self) -> bool {
        let with_a_network = self == Self::Netavark || self.translates();
        !with_a_network && !self.provides_egress()
    }

    /// Whether it translates a published port by rules in the kernel.
    pub(crate) fn translates(self) -> bool {
        matches!(
            self,
            Self::DockerRules
                | Self::DockerRulesAgain
                | Self::KernelNftables
                | Self::KernelIptables
        )
    }

    /// Whether it provides egress to a container without a network.
    pub(crate) fn provides_egress(self) -> bool {
        matches!(self, Self::Masquerade | Self::Slirp | Self::Pasta | Self::Engine)
    }

    /// Whether it can publish a UDP port.
    pub(crate) fn does_udp(self) -> bool {
        self.publishes() && self != Self::Haproxy
    }

    /// The path of its program: an environment variable for our own binaries, otherwise the result
    /// of Cargo.
    fn program(self) -> Option<PathBuf> {
        let built = |variable: &str, name: &str| {
            let beside = || Some(env::current_exe().ok()?.ancestors().nth(2)?.join(name));
            env::var_os(variable).map(PathBuf::from).or_else(beside).filter(|path| path.exists())
        };
        match self {
            Self::Dnat | Self::Masquerade => find_program("nft"),
            Self::Slirp => find_program("slirp4netns"),
            Self::Pasta => find_program("pasta"),
            Self::DockerProxy => find_program("docker-proxy"),
            Self::Haproxy => find_program("haproxy"),
            Self::Socat => find_program("socat"),
            Self::Netavark => find_program("netavark"),
            Self::DockerRules | Self::DockerRulesAgain => find_program("iptables-restore"),
            Self::Publish | Self::PublishNetns | Self::KernelNftables | Self::KernelIptables => {
                built("TIDEGATE_BENCH_BIN", "tidegate")
            }
            Self::Engine => built("TIDEGATE_BENCH_SLIRP4NETNS", "slirp4netns"),
            Self::DropIn => built("TIDEGATE_BENCH_DOCKER_PROXY", "docker-proxy"),
        }
    }
}

/// A contender with an installed program.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) kind: Kind,
    program: PathBuf,
}

impl Contender {
    /// Finds the program of `kind`.
    ///
    /// # Errors
    ///
    /// The error says what to install or to build.
    pub(crate) fn find(kind: Kind) -> Result<Self> {
        let program = kind.program().filter(|path| path.is_file());
        let program = program.with_context(|| match kind {
            Kind::Dnat | Kind::Masquerade => {
                format!("nft is not installed: apt-get install {}", debian_package("nft"))
            }
            kind if kind.is_ours() => format!("the program of {} has not been built", kind.name()),
            peer => {
                format!(
                    "{0} is not installed: apt-get install {1}",
                    peer.name(),
                    debian_package(peer.name())
                )
            }
        })?;
        Ok(Self { kind, program })
    }

    /// Its version, in one line.
    pub(crate) fn version(&self) -> String {
        let program = self.program.to_string_lossy();
        let line = match self.kind {
            // Old versions of docker-proxy have no version option; the daemon is in the same
            // package.
            Kind::DockerProxy => version_line("dockerd", &["--version"]),
            Kind::Haproxy | Kind::DropIn => version_line(&program, &["-v"]),
            Kind::Socat => socat_version(&self.program),
            _ => version_line(&program, &["--version"]),
        };
        line.unwrap_or_else(|| "unknown version".to_owned())
    }

    /// Publishes `service` and waits until all its ports are open.
    pub(crate) fn start(&self, lab: &Lab, service: Service) -> Result<Running> {
        let begin = Instant::now();
        let mut files = None;
        let processes = match self.kind {
            Kind::Dnat => {
                self.add_rule(lab, service)?;
                Vec::new()
            }
            Kind::DockerProxy | Kind::DropIn => (service.first_port..=service.last_port())
                .map(|port| self.docker_proxy(lab, service.protocol_name(), port))
                .collect::<Result<_>>()?,
            Kind::Haproxy => {
                let directory = files.insert(tempfile::tempdir()?);
                vec![self.haproxy(lab, service, directory.path())?]
            }
            Kind::Socat => vec![self.socat(lab, service)?],
            Kind::Netavark
            | Kind::DockerRules
            | Kind::DockerRulesAgain
            | Kind::KernelNftables
            | Kind::KernelIptables => {
                bail!("{} publishes a port with its network, not by itself", self.kind.name())
            }
            Kind::Masquerade | Kind::Slirp | Kind::Pasta | Kind::Engine => {
                bail!("{} does not publish ports", self.kind.name())
            }
            Kind::Publish => vec![self.publish(lab, service, "--to", &CONTAINER.to_string())],
            Kind::PublishNetns => {
                let path = lab.net.container.path().display().to_string();
                vec![self.publish(lab, service, "--netns", &path)]
            }
        };
        let mut running = Running { processes, _files: files, ready_after: Duration::ZERO };
        running.wait_until_ready(lab, service)?;
        running.ready_after = begin.elapsed();
        Ok(running)
    }

    fn add_rule(&self, lab: &Lab, service: Service) -> Result<()> {
        ensure!(service.ports == 1, "one rule, one port");
        let (protocol, port) = (service.protocol_name(), service.first_port);
        let rule = format!(
            "add table ip compare; \
             add chain ip compare prerouting {{ type nat hook prerouting priority dstnat; }}; \
             add rule ip compare prerouting ip daddr {HOST} {protocol} dport {port} dnat to {CONTAINER}:{port}"
        );
        lab.net.host.exec(&self.program.to_string_lossy(), &[&rule]);
        Ok(())
    }

    /// Starts docker-proxy like dockerd: the child reports its status through a pipe on descriptor
    /// 3.
    fn docker_proxy(&self, lab: &Lab, protocol: &str, port: u16) -> Result<Process> {
        let port = port.to_string();
        let (host, container) = (HOST.to_string(), CONTAINER.to_string());
        let mut command = self.command(lab);
        command.args(["-proto", protocol, "-host-ip", &host, "-host-port", &port]);
        command.args(["-container-ip", &container, "-container-port", &port]);
        let (mut status, child_end) = io::pipe()?;
        pass_fd(&mut command, child_end.into(), 3);
        let process = Process::spawn(&mut command);
        drop(command);
        let timeout = Timespec::try_from(START)?;
        let answered = poll(&mut [PollFd::new(&status, PollFlags::IN)], Some(&timeout))?;
        ensure!(answered == 1, "no status from docker-proxy");
        let mut word = [0; 2];
        let length = status.read(&mut word)?;
        ensure!(word[..length] == *b"0\n", "failed to start: {}", last_line(&process.output()));
        Ok(process)
    }

    fn haproxy(&self, lab: &Lab, service: Service, directory: &Path) -> Result<Process> {
        if service.protocol == Protocol::Udp || service.ports != 1 {
            bail!("haproxy publishes one TCP port here");
        }
        let port = service.first_port;
        let threads = thread::available_parallelism()?;
        // haproxy does not start unless the limit of open files covers its maximum need.
        let connections = (raise_open_files(0).min(40_000) - 2 * HAPROXY_PIPES - 100) / 2;
        let configuration = format!(
            "global\n\
             \x20   nbthread {threads}\n\
             \x20   maxconn {connections}\n\
             \x20   maxpipes {HAPROXY_PIPES}\n\
             defaults\n\
             \x20   mode tcp\n\
             \x20   timeout connect 5s\n\
             \x20   timeout client 1h\n\
             \x20   timeout server 1h\n\
             \x20   option splice-auto\n\
             \x20   option splice-request\n\
             \x20   option splice-response\n\
             listen port\n\
             \x20   bind {HOST}:{port}\n\
             \x20   server container {CONTAINER}:{port}\n"
        );
        let file = directory.join("haproxy.cfg");
        fs::write(&file, configuration)?;
        // -db: a single process in the foreground.
        Ok(Process::spawn(self.command(lab).arg("-db").arg("-f").arg(file)))
    }

    fn socat(&self, lab: &Lab, service: Service) -> Result<Process> {
        ensure!(service.ports == 1, "socat publishes one port");
        let port = service.first_port;
        let mut command = self.command(lab);
        // The default buffer of 8 KiB would put socat at a disadvantage.
        command.args(["-b", "131072"]);
        match service.protocol {
            Protocol::Tcp => {
                command.arg(format!("TCP4-LISTEN:{port},bind={HOST},reuseaddr,fork,backlog=4096"));
                command.arg(format!("TCP4:{CONTAINER}:{port}"));
            }
            Protocol::Udp => {
                // UDP has no end of stream, so only the idle timeout ends the process of a client.
                command.args(["-T", "5"]);
                command.arg(format!("UDP4-LISTEN:{port},bind={HOST},reuseaddr,fork"));
                command.arg(format!("UDP4:{CONTAINER}:{port}"));
            }
        }
        Ok(Process::spawn(&mut command))
    }

    fn publish(&self, lab: &Lab, service: Service, target: &str, value: &str) -> Process {
        let (first, last, protocol) =
            (service.first_port, service.last_port(), service.protocol_name());
        let spec = match service.ports {
            1 => format!("{HOST}:{first}:{first}/{protocol}"),
            _ => format!("{HOST}:{first}-{last}:{first}-{last}/{protocol}"),
        };
        Process::spawn(self.command(lab).args(["publish", &spec, target, value]))
    }

    /// The command of its program, on the host.
    pub(crate) fn command(&self, lab: &Lab) -> Command {
        lab.net.host.command(&self.program.to_string_lossy())
    }
}

/// A running contender; its processes are killed on drop.
pub(crate) struct Running {
    processes: Vec<Process>,
    /// Files that the processes need.
    _files: Option<TempDir>,
    /// The time from the start to the last open port.
    pub(crate) ready_after: Duration,
}

impl Running {
    /// The CPU seconds of all processes and their children; `None` for forwarding by the kernel.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        self.sum(|process| {
            procfs::tree(process.pid()).into_iter().filter_map(procfs::cpu_seconds).sum()
        })
    }

    /// The resident set size of all processes in bytes; `None` for forwarding by the kernel.
    pub(crate) fn rss(&self) -> Option<f64> {
        self.sum(|process| process.rss() as f64)
    }

    /// The proportional set size of all processes in bytes; `None` for forwarding by the kernel.
    pub(crate) fn pss(&self) -> Option<f64> {
        self.sum(|process| process.pss() as f64)
    }

    /// The open files of all processes.
    pub(crate) fn open_files(&self) -> usize {
        self.processes.iter().map(Process::open_fds).sum()
    }

    fn sum(&self, figure: impl Fn(&Process) -> f64) -> Option<f64> {
        if self.processes.is_empty() { None } else { Some(self.processes.iter().map(figure).sum()) }
    }

    /// Waits until every port is bound. A rule is ready as soon as it is added.
    fn wait_until_ready(&mut self, lab: &Lab, service: Service) -> Result<()> {
        if self.processes.is_empty() {
            return Ok(());
        }
        let deadline = Instant::now() + START;
        let wanted = usize::from(service.ports);
        loop {
            let ports = service.first_port..=service.last_port();
            let bound = lab.net.host.bound_ports(service.protocol).into_iter();
            let bound = bound.filter(|port| ports.contains(port)).count();
            if bound == wanted {
                return Ok(());
            }
            for process in &mut self.processes {
                ensure!(process.is_running(), "exited at once: {}", last_line(&process.output()));
            }
            // Pauses between checks, because the kernel takes a while to list thousands of sockets.
            thread::sleep(Duration::from_millis(2));
            ensure!(Instant::now() < deadline, "{bound} of {wanted} ports open after {START:?}");
        }
    }
}

/// The second line of `socat -V`; the first one names the authors.
fn socat_version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("-V").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().nth(1).map(str::to_owned)
}

/// The last line of output, usually the error.
fn last_line(output: &str) -> &str {
    output.trim_end().lines().last().unwrap_or("no output")
}
