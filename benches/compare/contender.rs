//! The ways to publish a port that are compared, and how each is started.

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

/// How long a contender may take to be ready.
const START: Duration = Duration::from_secs(20);

/// Pipes that haproxy may use for splice(2); it needs one for each direction of a busy connection.
const HAPROXY_PIPES: u64 = 64;

/// One way to publish a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// An nftables rule in the host's namespace: the kernel's own path.
    Dnat,
    /// Docker's userland proxy.
    DockerProxy,
    /// haproxy in TCP mode, with splice(2), a thread per core.
    Haproxy,
    /// socat, a process per client.
    Socat,
    /// netavark, which sets up networks for podman: no way to publish a port on a network that is
    /// there.
    Netavark,
    /// `tidegate publish --to`; where networks are set up, `tidegate up`.
    Publish,
    /// `tidegate publish --netns`: the upstream socket is made in the container's namespace.
    PublishNetns,
    /// tidegate's docker-proxy.
    DropIn,
    /// The rules that dockerd has for a published port, by iptables.
    DockerRules,
    /// The same once more: how far chance alone carries two that are equal.
    DockerRulesAgain,
    /// `tidegate up --publish=kernel --firewall=nftables`.
    KernelNftables,
    /// `tidegate up --publish=kernel --firewall=iptables`.
    KernelIptables,
    /// The kernel's masquerade, by an nftables rule on the host.
    Masquerade,
    /// slirp4netns, as rootless containers have it.
    Slirp,
    /// pasta, likewise.
    Pasta,
    /// tidegate's slirp4netns: the NAT engine.
    Engine,
}

/// The contenders in the order of columns.
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

    /// Whether it is a part of tidegate.
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

    /// Whether it can publish a TCP port of a container that has its network.
    pub(crate) fn publishes(self) -> bool {
        let with_a_network = self == Self::Netavark || self.translates();
        !with_a_network && !self.leads_out()
    }

    /// Whether it is rules by which the kernel translates a published port.
    pub(crate) fn translates(self) -> bool {
        matches!(
            self,
            Self::DockerRules
                | Self::DockerRulesAgain
                | Self::KernelNftables
                | Self::KernelIptables
        )
    }

    /// Whether it leads a container out that has no network.
    pub(crate) fn leads_out(self) -> bool {
        matches!(self, Self::Masquerade | Self::Slirp | Self::Pasta | Self::Engine)
    }

    /// Whether it can publish a UDP port.
    pub(crate) fn does_udp(self) -> bool {
        self.publishes() && self != Self::Haproxy
    }

    /// Where its program is: an environment variable for our own binaries, else what Cargo built.
    fn program(self) -> Option<PathBuf> {
        let built = |variable: &str, path: Option<&str>| {
            env::var_os(variable).map(PathBuf::from).or_else(|| path.map(PathBuf::from))
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
                built("TIDEGATE_BENCH_BIN", option_env!("CARGO_BIN_EXE_tidegate"))
            }
            Self::Engine => {
                built("TIDEGATE_BENCH_SLIRP4NETNS", option_env!("CARGO_BIN_EXE_slirp4netns"))
            }
            Self::DropIn => {
                built("TIDEGATE_BENCH_DOCKER_PROXY", option_env!("CARGO_BIN_EXE_docker-proxy"))
            }
        }
    }
}

/// A contender whose program is there.
#[derive(Clone, Debug)]
pub(crate) struct Contender {
    pub(crate) kind: Kind,
    program: PathBuf,
}

impl Contender {
    /// Looks for the program of `kind`.
    ///
    /// # Errors
    ///
    /// Says what to install or to build.
    pub(crate) fn find(kind: Kind) -> Result<Self> {
        let program = kind.program().filter(|path| path.is_file());
        let program = program.with_context(|| match kind {
            Kind::Dnat | Kind::Masquerade => {
                format!("nft is not installed: apt-get install {}", debian_package("nft"))
            }
            kind if kind.is_ours() => format!("the program for {} has not been built", kind.name()),
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

    /// What it says about its version, in one line.
    pub(crate) fn version(&self) -> String {
        let program = self.program.to_string_lossy();
        let line = match self.kind {
            // Old versions of docker-proxy do not tell theirs; the daemon comes in the same
            // package.
            Kind::DockerProxy => version_line("dockerd", &["--version"]),
            Kind::Haproxy | Kind::DropIn => version_line(&program, &["-v"]),
            Kind::Socat => socat_version(&self.program),
            _ => version_line(&program, &["--version"]),
        };
        line.unwrap_or_else(|| "unknown version".to_owned())
    }

    /// Publishes `service` and returns when all its ports are open.
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
                bail!("{} publishes nothing", self.kind.name())
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

    /// Starts docker-proxy as dockerd does: the status comes through a pipe that the child has
    /// as 3.
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
        let patience = Timespec::try_from(START)?;
        let answered = poll(&mut [PollFd::new(&status, PollFlags::IN)], Some(&patience))?;
        ensure!(answered == 1, "docker-proxy says nothing on its status pipe");
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
        // haproxy does not start unless the limit of open files covers the most that it could need.
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
        // -db: stay in the foreground, one process.
        Ok(Process::spawn(self.command(lab).arg("-db").arg("-f").arg(file)))
    }

    fn socat(&self, lab: &Lab, service: Service) -> Result<Process> {
        ensure!(service.ports == 1, "socat publishes one port");
        let port = service.first_port;
        let mut command = self.command(lab);
        // The default buffer of 8 KiB would say more about the default than about socat.
        command.args(["-b", "131072"]);
        match service.protocol {
            Protocol::Tcp => {
                command.arg(format!("TCP4-LISTEN:{port},bind={HOST},reuseaddr,fork,backlog=4096"));
                command.arg(format!("TCP4:{CONTAINER}:{port}"));
            }
            Protocol::Udp => {
                // A datagram has no end of stream: only idle time ends the process of a client.
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

    /// Its program, to be run on the host.
    pub(crate) fn command(&self, lab: &Lab) -> Command {
        lab.net.host.command(&self.program.to_string_lossy())
    }
}

/// A contender at work; what it runs is killed when this is dropped.
pub(crate) struct Running {
    processes: Vec<Process>,
    /// Files that the processes need.
    _files: Option<TempDir>,
    /// From the start to the last open port.
    pub(crate) ready_after: Duration,
}

impl Running {
    /// CPU seconds used so far by all processes and the children they forked; `None` for the
    /// kernel's path.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        self.sum(|process| {
            procfs::tree(process.pid()).into_iter().filter_map(procfs::cpu_seconds).sum()
        })
    }

    /// Resident bytes of all processes; `None` for the kernel's path.
    pub(crate) fn rss(&self) -> Option<f64> {
        self.sum(|process| process.rss() as f64)
    }

    /// Proportional bytes of all processes; `None` for the kernel's path.
    pub(crate) fn pss(&self) -> Option<f64> {
        self.sum(|process| process.pss() as f64)
    }

    /// Open files of all processes.
    pub(crate) fn open_files(&self) -> usize {
        self.processes.iter().map(Process::open_fds).sum()
    }

    fn sum(&self, figure: impl Fn(&Process) -> f64) -> Option<f64> {
        if self.processes.is_empty() { None } else { Some(self.processes.iter().map(figure).sum()) }
    }

    /// Waits until the kernel shows every port bound. A rule is ready as soon as it is added.
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
                ensure!(process.is_running(), "ended at once: {}", last_line(&process.output()));
            }
            // Reading a table of thousands of sockets takes the kernel a while: not without a
            // pause.
            thread::sleep(Duration::from_millis(2));
            ensure!(Instant::now() < deadline, "{bound} of {wanted} ports open after {START:?}");
        }
    }
}

/// The second line of `socat -V`: the first names the authors.
fn socat_version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("-V").output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().nth(1).map(str::to_owned)
}

/// Where programs say why they gave up.
fn last_line(output: &str) -> &str {
    output.trim_end().lines().last().unwrap_or("it said nothing")
}
