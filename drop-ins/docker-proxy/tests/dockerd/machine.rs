//! A machine for dockerd: private namespaces for network, mounts and processes, and a private
//! image.
//!
//! dockerd requires paths such as `/run/docker`, `/opt/containerd` and `/etc/docker`, starts
//! helpers that outlive it, and leaves interfaces and control groups behind when it is killed. So
//! everything that it uses is private:
//!
//! - the network is the host of a [`Topology`], which has no egress;
//! - the mounts are a copy, with empty file systems where dockerd would write;
//! - its processes run in a PID namespace, so all of them are known and end with the machine, even
//!   if the test is killed;
//! - control groups cannot be hidden; they have a parent named after the test.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;
use tidegate_testbed::{
    Mounts, Process, Signal, Topology, eventually, find_program, procfs, require_program,
};

/// A timeout with a margin for a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// The prefix of control group names, followed by the pid of the creator and a number.
const CGROUP_PREFIX: &str = "tidegate-test-";

/// The source of the server in containers.
const SERVER_SOURCE: &str = include_str!("container_server.rs");

/// The two processes of the machine itself; no other process inside has these names.
const OWN: [&str; 2] = ["docker-init", "sleep"];

/// Paths that dockerd and containerd create outside of their data directory. They are hidden, and
/// must not appear on the machine of the test.
const DOCKERD_PATHS: [&str; 5] = [
    "/etc/docker/key.json",
    "/opt/containerd",
    "/run/containerd",
    "/run/docker",
    "/var/lib/docker",
];

/// An isolated environment for dockerd.
pub(crate) struct Machine {
    /// The outside client, and the host that runs dockerd.
    pub(crate) net: Topology,
    init: Process,
    /// The pid of the first process inside, which reaps orphans, in our `/proc`.
    init_pid: u32,
    init_handle: Handle,
    cgroup_parent: String,
    before: HostState,
    directory: TempDir,
}

/// A process inside that was started by the test.
pub(crate) struct Inside {
    /// nsenter(1), which waits for the process and exits with its status.
    entry: Process,
    /// Its pid in our `/proc`.
    pid: u32,
    handle: Handle,
}

/// A pidfd for signals. The pid itself can be reused at any time, because the process is not our
/// child.
struct Handle(OwnedFd);

/// Any process inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its pid inside.
    pid: u32,
    /// Its start time in clock ticks.
    started: u64,
    arguments: Vec<String>,
}

/// The state of the machine of the test that dockerd might change.
#[derive(Debug, Default)]
struct HostState {
    links: BTreeSet<String>,
    mounts: BTreeSet<String>,
    dockerd_paths: BTreeSet<&'static str>,
}

impl Machine {
    #[track_caller]
    pub(crate) fn new() -> Self {
        for program in
            ["dockerd", "docker", "docker-init", "iptables", "unshare", "nsenter", "tar", "timeout"]
        {
            require_program(program);
        }
        sweep_control_groups();
        let before = HostState::now();
        let net = Topology::three();
        let mounts =
            Mounts::builder().tmpfs("/run").tmpfs("/opt").tmpfs("/etc/docker").build(&net.host);
        let mut command = net.host.with_mounts(mounts).command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", "docker-init", "--"]);
        command.args(["sh", "-c", "echo up; exec sleep infinity"]);
        let init = Process::spawn(&mut command);
        init.wait_for_line("up", SOON);
        let init_pid = procfs::tree(init.pid())[1];
        let directory = tempfile::tempdir().expect("make a directory");
        let cgroup_parent = cgroup_name();
        let init_handle = Handle::open(init_pid);
        let machine = Self { net, init, init_pid, init_handle, cgroup_parent, before, directory };
        machine.write_image();
        machine
    }

    /// A path in the directory of the machine, valid inside and outside.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The value of `dockerd --cgroup-parent`.
    pub(crate) fn cgroup_parent(&self) -> &str {
        &self.cgroup_parent
    }

    /// The path of the server, for occupying ports outside of containers.
    pub(crate) fn server(&self) -> String {
        self.path("rootfs/server").display().to_string()
    }

    /// Starts `program` inside.
    #[track_caller]
    pub(crate) fn spawn(
        &self,
        program: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Inside {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init_pid.to_string(), "--pid", "--mount", "--net", "--"]);
        command.arg(program).args(arguments);
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.starts_with("TIDEGATE_") || name.starts_with("DOCKER_") {
                command.env_remove(&*name);
            }
        }
        // dockerd searches for iptables and runc, which the PATH of an ordinary user lacks.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("HOME", self.directory.path());
        command.envs(environment.iter().copied());
        let mut entry = Process::spawn(&mut command);
        let mut pid = None;
        let started = eventually(SOON, || {
            pid = procfs::tree(entry.pid()).get(1).copied();
            pid.is_some() || !entry.is_running()
        });
        let pid = pid.filter(|_| started);
        let pid = pid.unwrap_or_else(|| panic!("{program} did not start: {}", entry.output()));
        Inside { entry, pid, handle: Handle::open(pid) }
    }

    /// All processes inside, except for the two of the machine itself, in order of their start.
    pub(crate) fn processes(&self) -> Vec<Found> {
        let entries = fs::read_dir(self.proc()).into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let mut found: Vec<Found> = pids.filter_map(|pid| self.found(pid)).collect();
        found.sort_by_key(|process| (process.started, process.pid));
        found
    }

    fn found(&self, pid: u32) -> Option<Found> {
        let stat = self.stat(pid)?;
        let (state, started) = (stat.first()?, stat.get(22 - 3)?);
        let arguments = fs::read(self.proc().join(format!("{pid}/cmdline"))).ok()?;
        let arguments = arguments.strip_suffix(b"\0").unwrap_or(&arguments);
        let arguments = arguments.split(|byte| *byte == 0);
        let arguments =
            arguments.map(|argument| String::from_utf8_lossy(argument).into_owned()).collect();
        let process = Found { pid, started: started.parse().ok()?, arguments };
        (state != "Z" && !OWN.contains(&process.program())).then_some(process)
    }

    /// The arguments of every docker-proxy inside, without the program name, in order of their
    /// start.
    pub(crate) fn proxies(&self) -> Vec<String> {
        let all = self.processes().into_iter();
        let proxies = all.filter(|process| process.program() == "docker-proxy");
        proxies.map(|process| process.arguments[1..].join(" ")).collect()
    }

    /// Waits until no docker-proxy is running inside.
    #[track_caller]
    pub(crate) fn assert_no_proxies(&self) {
        let gone = eventually(Duration::from_secs(2), || self.proxies().is_empty());
        assert!(gone, "left behind: {:#?}", self.proxies());
    }

    /// The network namespace of a process inside.
    pub(crate) fn namespace_of(&self, pid: u32) -> PathBuf {
        self.proc().join(format!("{pid}/ns/net"))
    }

    /// Whether a process inside is running.
    pub(crate) fn is_alive(&self, pid: u32) -> bool {
        self.stat(pid).is_some_and(|stat| stat.first().is_some_and(|state| state != "Z"))
    }

    /// The fields of `/proc/PID/stat` from the state (field 3) on.
    fn stat(&self, pid: u32) -> Option<Vec<String>> {
        let stat = fs::read_to_string(self.proc().join(format!("{pid}/stat"))).ok()?;
        let (_, behind_name) = stat.rsplit_once(')')?;
        Some(behind_name.split_ascii_whitespace().map(str::to_owned).collect())
    }

    /// Takes everything down, and checks that dockerd left nothing behind. dockerd must be stopped.
    #[track_caller]
    pub(crate) fn teardown(mut self) {
        let empty = eventually(SOON, || self.processes().is_empty());
        assert!(empty, "processes left behind: {:#?}", self.processes());
        let host = self.net.host.ip(&["-o", "link"]);
        let links: BTreeSet<&str> = host.lines().filter_map(link_name).collect();
        let expected = ["br0", "docker0", "eth0", "lo", "port2"].into();
        assert_eq!(links, expected, "interfaces left behind");
        let groups = self.control_groups();
        assert!(
            groups.iter().all(|group| subdirectories(group).is_empty()),
            "left behind in {groups:?}"
        );

        self.end();
        assert_eq!(self.processes(), []);
        assert_eq!(self.control_groups(), [] as [PathBuf; 0]);
        let mut new = HostState::default();
        let same = eventually(SOON, || {
            new = HostState::now().without(&self.before);
            new.is_empty()
        });
        assert!(same, "the test machine has changed: {new:#?}");
    }

    /// The `/proc` of the PID namespace, which includes processes of containers. It is empty once
    /// the first process has ended.
    fn proc(&self) -> PathBuf {
        format!("/proc/{}/root/proc", self.init_pid).into()
    }

    /// The control groups of this machine, in every hierarchy.
    fn control_groups(&self) -> Vec<PathBuf> {
        let ours = |group: &PathBuf| group.ends_with(&self.cgroup_parent[1..]);
        all_control_groups().into_iter().filter(ours).collect()
    }

    /// Ends all processes inside and removes the state that outlives them.
    fn end(&mut self) {
        // All processes end with the first one. Its parent is unshare(1), which reaps it and exits.
        self.init_handle.signal(Signal::KILL);
        eventually(SOON, || !self.init.is_running());
        for group in self.control_groups() {
            remove_groups(&group);
        }
    }

    /// Writes `image.tar`, a root directory that contains only the server.
    #[track_caller]
    fn write_image(&self) {
        let rootfs = self.path("rootfs");
        fs::create_dir(&rootfs).expect("make a directory");
        let server = rootfs.join("server");
        fs::write(&server, server_binary()).expect("write the server");
        fs::set_permissions(&server, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("chmod");
        let mut tar = Command::new("tar");
        tar.arg("-C").arg(&rootfs).arg("-cf").arg(self.path("image.tar")).arg("server");
        assert!(tar.status().expect("start tar").success(), "tar failed");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

impl Inside {
    /// Its pid inside.
    #[track_caller]
    pub(crate) fn inner_pid(&self) -> u32 {
        let status =
            fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("it has ended");
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        line.split_ascii_whitespace()
            .last()
            .and_then(|pid| pid.parse().ok())
            .expect("a process has a pid")
    }

    pub(crate) fn process(&self) -> &Process {
        &self.entry
    }

    /// Sends `signal` and waits for the exit.
    #[track_caller]
    pub(crate) fn stop(&mut self, signal: Signal) -> ExitStatus {
        self.handle.signal(signal);
        self.entry.wait(SOON)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // The process ends first, because nsenter must reap it.
        self.handle.signal(Signal::KILL);
        eventually(SOON, || !self.entry.is_running());
    }
}

impl Handle {
    #[track_caller]
    fn open(pid: u32) -> Self {
        let pid = Pid::from_raw(pid as i32).expect("a process number");
        Self(pidfd_open(pid, PidfdFlags::empty()).expect("open a process"))
    }

    /// Sends a signal. This does nothing if the process has ended.
    fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.0, signal);
    }
}

impl Found {
    /// The file name of the program.
    pub(crate) fn program(&self) -> &str {
        let path = self.arguments.first().map_or("", String::as_str);
        path.rsplit('/').next().unwrap_or(path)
    }
}

impl HostState {
    #[track_caller]
    fn now() -> Self {
        let links = Command::new("ip").args(["-o", "link"]).output().expect("start ip").stdout;
        let links = String::from_utf8_lossy(&links);
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read the mounts");
        Self {
            links: links.lines().filter_map(link_name).map(str::to_owned).collect(),
            mounts: mounts.lines().map(str::to_owned).collect(),
            dockerd_paths: DOCKERD_PATHS
                .into_iter()
                .filter(|path| Path::new(path).exists())
                .collect(),
        }
    }

    fn without(mut self, before: &Self) -> Self {
        self.links.retain(|link| !before.links.contains(link));
        self.mounts.retain(|mount| !before.mounts.contains(mount));
        self.dockerd_paths.retain(|path| !before.dockerd_paths.contains(path));
        self
    }

    fn is_empty(&self) -> bool {
        self.links.is_empty() && self.mounts.is_empty() && self.dockerd_paths.is_empty()
    }
}

/// A unique name that contains the pid of the test.
fn cgroup_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("/{CGROUP_PREFIX}{}-{number}", std::process::id())
}

/// The control groups of all tests, in every hierarchy (v1), or in the unified one (v2).
fn all_control_groups() -> Vec<PathBuf> {
    let root = PathBuf::from("/sys/fs/cgroup");
    let hierarchies = subdirectories(&root).into_iter().chain([root]);
    hierarchies
        .flat_map(|hierarchy| subdirectories(&hierarchy))
        .filter(|group| maker(group).is_some())
        .collect()
}

/// The pid of the test that created a control group.
fn maker(group: &Path) -> Option<u32> {
    let (pid, _number) =
        group.file_name()?.to_str()?.strip_prefix(CGROUP_PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

/// Removes the control groups of killed tests.
fn sweep_control_groups() {
    for group in all_control_groups() {
        if maker(&group).is_some_and(|pid| procfs::state(pid).is_none()) {
            remove_groups(&group);
        }
    }
}

/// Compiles the server, once.
#[track_caller]
fn server_binary() -> &'static [u8] {
    static BINARY: OnceLock<Vec<u8>> = OnceLock::new();
    BINARY.get_or_init(|| {
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| {
            find_program("rustc")
                .unwrap_or_else(|| panic!("no rustc to build the server with"))
                .into()
        });
        let directory = tempfile::tempdir().expect("make a directory");
        let source = directory.path().join("server.rs");
        let binary = directory.path().join("server");
        fs::write(&source, SERVER_SOURCE).expect("write the source");
        let mut command = Command::new(rustc);
        command.args([
            "--edition",
            "2024",
            "-C",
            "target-feature=+crt-static",
            "-C",
            "strip=symbols",
        ]);
        command.args(["-C", "panic=abort", "-o"]).arg(&binary).arg(&source);
        let output = command.output().expect("start rustc");
        assert!(output.status.success(), "rustc: {}", String::from_utf8_lossy(&output.stderr));
        fs::read(&binary).expect("read the server")
    })
}

/// The name of the interface in a line of `ip -o link`: `4: eth0@if3: <...`.
fn link_name(line: &str) -> Option<&str> {
    let name = line.split(": ").nth(1)?;
    name.split('@').next()
}

fn subdirectories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes an empty control group and its children.
fn remove_groups(group: &Path) {
    for below in subdirectories(group) {
        remove_groups(&below);
    }
    // A process that has just ended still occupies its group for a moment.
    eventually(SOON, || fs::remove_dir(group).is_ok() || !group.exists());
}
