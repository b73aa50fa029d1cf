//! A host with an external client, on which tests bring projects up.

#![allow(dead_code, reason = "each test crate uses a part of it")]

use std::fs;
use std::os::unix::fs::{chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tidegate_testbed::{Mounts, Namespace, Process, Topology, find_program};

/// The binary under test.
pub(crate) const TIDEGATE: &str = env!("CARGO_BIN_EXE_tidegate");

/// The user ID of `nobody` on most distributions.
const NOBODY: u32 = 65_534;

/// Kills the process that keeps the namespaces of an unprivileged daemon. It outlives the daemon,
/// and would outlive a test that panics.
struct EndKeeper {
    run: PathBuf,
}

impl Drop for EndKeeper {
    fn drop(&mut self) {
        if let Some(pid) = keeper_in(&self.run).and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// The process that keeps the namespaces of an unprivileged daemon with the run directory `run`.
fn keeper_in(run: &Path) -> Option<i32> {
    fs::read_to_string(run.join("daemon/namespaces.lock")).ok()?.trim().parse().ok()
}

/// A host, an external client, and temporary directories.
pub(crate) struct Scene {
    _keeper: EndKeeper,
    pub(crate) net: Topology,
    /// `TIDEGATE_RUN_DIR`.
    pub(crate) run: tempfile::TempDir,
    /// Directory of the Compose file.
    pub(crate) directory: tempfile::TempDir,
    /// Programs that precede those of the machine in `PATH`.
    pub(crate) programs: tempfile::TempDir,
    /// Kernel features that are treated as missing (`TIDEGATE_LACKS`).
    pub(crate) lacks: &'static str,
    /// Value of `--metrics`.
    pub(crate) metrics: &'static str,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let directory = || tempfile::tempdir().unwrap();
        let run = directory();
        Self {
            _keeper: EndKeeper { run: run.path().to_owned() },
            net: Topology::three(),
            run,
            directory: directory(),
            programs: directory(),
            lacks: "",
            metrics: "none",
        }
    }

    /// Creates a scene on a kernel that treats the features `lacks` as missing.
    pub(crate) fn lacking(lacks: &'static str) -> Self {
        Self { lacks, ..Self::new() }
    }

    /// Enables metrics, which [`figures`](Self::figures) reads.
    pub(crate) fn with_metrics(self) -> Self {
        Self { metrics: "127.0.0.1:9464", ..self }
    }

    /// The metrics page.
    #[track_caller]
    pub(crate) fn figures(&self) -> String {
        self.net
            .host
            .exec("curl", &["-sS", "--max-time", "5", &format!("http://{}/metrics", self.metrics)])
    }

    /// Creates a scene with legacy iptables instead of iptables-nft.
    pub(crate) fn with_legacy_iptables() -> Self {
        let scene = Self::new();
        for family in ["iptables", "ip6tables"] {
            for end in ["", "-save", "-restore"] {
                let legacy = find_program(&format!("{family}-legacy{end}")).unwrap();
                symlink(legacy, scene.programs.path().join(format!("{family}{end}"))).unwrap();
            }
        }
        scene
    }

    /// Permits all users to open `/dev/net/tun`, as on most distributions.
    pub(crate) fn with_open_tun(mut self) -> Self {
        let device = self.programs.path().join("tun");
        let path = device.to_str().unwrap();
        self.sh(&format!(
            "mknod -m 666 {path} c 10 200; chmod 755 {}",
            self.programs.path().display()
        ));
        let mounts = Mounts::builder().bind(&device, "/dev/net/tun").build(&self.net.host);
        self.net.host = self.net.host.with_mounts(mounts);
        self
    }

    /// `PATH` with the scene's programs first.
    pub(crate) fn path(&self) -> String {
        let machine = std::env::var("PATH").unwrap_or_default();
        format!("{}:{machine}:/usr/sbin:/sbin", self.programs.path().display())
    }

    /// Runs a shell `script` on the host.
    #[track_caller]
    pub(crate) fn sh(&self, script: &str) {
        let output = self
            .net
            .host
            .command("sh")
            .args(["-ec", script])
            .env("PATH", self.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// `tidegate` on the host, with the scene's run directory.
    pub(crate) fn tidegate(&self) -> Command {
        self.with_environment(self.net.host.command(TIDEGATE))
    }

    /// `tidegate` started by the command `words`.
    pub(crate) fn tidegate_through(&self, words: &[&str]) -> Command {
        let mut command = self.net.host.command(words[0]);
        command.args(&words[1..]).arg(TIDEGATE);
        self.with_environment(command)
    }

    /// Like [`Self::tidegate`], as an unprivileged user.
    pub(crate) fn tidegate_as_nobody(&self) -> Command {
        for directory in [&self.run, &self.directory] {
            chown(directory.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let mut command = self.net.host.command("setpriv");
        command.args([
            &format!("--reuid={NOBODY}"),
            &format!("--regid={NOBODY}"),
            "--clear-groups",
        ]);
        // Dropping privileges clears the parent death signal, so it is set again.
        command.args(["--pdeathsig", "KILL", TIDEGATE]);
        self.with_environment(command)
    }

    fn with_environment(&self, mut command: Command) -> Command {
        command.env("TIDEGATE_RUN_DIR", self.run.path()).env("TIDEGATE_LOG", "warn");
        // One path for projects and daemons, as tests ask the API at `socket`.
        command.env("TIDEGATE_SOCKET", self.socket()).env("PATH", self.path());
        command.env("TIDEGATE_LACKS", self.lacks);
        command
    }

    /// The command that brings `file` up.
    pub(crate) fn command(&self, file: &str) -> Command {
        self.up_command(self.tidegate(), file)
    }

    fn up_command(&self, mut tidegate: Command, file: &str) -> Command {
        let path = self.directory.path().join("compose.yaml");
        fs::write(&path, file).unwrap();
        tidegate.arg("up").arg("-f").arg(path).args(["--metrics", self.metrics]);
        tidegate
    }

    /// Starts the daemon, and waits until it is up.
    #[track_caller]
    pub(crate) fn daemon(&self, flags: &[&str]) -> Process {
        self.start_daemon(self.tidegate(), flags)
    }

    /// Like [`Self::daemon`], as an unprivileged user.
    #[track_caller]
    pub(crate) fn daemon_as_nobody(&self, flags: &[&str]) -> Process {
        self.start_daemon(self.tidegate_as_nobody(), flags)
    }

    /// Starts the daemon with `command`, and waits until it is up.
    #[track_caller]
    pub(crate) fn start_daemon(&self, mut command: Command, flags: &[&str]) -> Process {
        command.args(["daemon", "--metrics", self.metrics, "--state"]);
        let daemon = Process::spawn(command.arg(self.run.path().join("state")).args(flags));
        daemon.wait_for_line("tidegate daemon is up", Duration::from_secs(10));
        daemon
    }

    /// The process that keeps the namespaces of an unprivileged daemon.
    pub(crate) fn keeper(&self) -> Option<i32> {
        keeper_in(self.run.path())
    }

    /// The namespace of the networks of an unprivileged daemon.
    #[track_caller]
    pub(crate) fn kept_namespace(&self) -> Namespace {
        let keeper = self.keeper().expect("a keeper");
        Namespace::at(Path::new(&format!("/proc/{keeper}/ns/net")))
    }

    /// Creates a network namespace as the user of an unprivileged daemon does, in a user namespace
    /// below that of the daemon. It exists as long as the process. Returns its path, too.
    #[track_caller]
    pub(crate) fn namespace_below_the_daemon(&self) -> (Process, Namespace, String) {
        let keeper = self.keeper().expect("a keeper");
        let mut command = self.net.host.command("setpriv");
        command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}")]);
        command.args(["--clear-groups", "--pdeathsig", "KILL", "nsenter", "--user"]);
        command.args(["--preserve-credentials", "--target", &keeper.to_string()]);
        command.args(["unshare", "--user", "--map-root-user", "--net", "--fork", "--kill-child"]);
        let process = Process::spawn(command.args(["sh", "-c", "echo inside; exec sleep 600"]));
        process.wait_for_line("inside", Duration::from_secs(10));
        let children = format!("/proc/{0}/task/{0}/children", process.pid());
        let child = fs::read_to_string(children).unwrap();
        let path = format!("/proc/{}/ns/net", child.trim());
        let namespace = Namespace::at(Path::new(&path));
        (process, namespace, path)
    }

    /// Runs `tidegate` with `args`, which must succeed, and returns its standard output.
    #[track_caller]
    pub(crate) fn succeeds(&self, args: &[&str]) -> String {
        let output = self.tidegate().args(args).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `tidegate` with `args`, which must fail with exit code 1 and one line, and returns that
    /// line without `tidegate: error: `.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str]) -> String {
        let output = self.tidegate().args(args).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        let line = error.strip_prefix("tidegate: error: ").and_then(|line| line.strip_suffix('\n'));
        let line = line.unwrap_or_else(|| panic!("{args:?}: {error:?}"));
        assert!(!line.contains('\n'), "{line}");
        line.to_owned()
    }

    /// Starts to bring `file` up as a second project besides that of [`up`](Self::up).
    pub(crate) fn up_beside(&self, file: &str, flags: &[&str]) -> Process {
        self.up_in("beside", file, flags)
    }

    /// Like [`Self::up_beside`], with the API socket in a subdirectory of the run directory.
    pub(crate) fn up_in(&self, subdirectory: &str, file: &str, flags: &[&str]) -> Process {
        let run = self.run.path().join(subdirectory);
        fs::create_dir_all(&run).unwrap();
        let path = run.join("compose.yaml");
        fs::write(&path, file).unwrap();
        let mut command = self.tidegate();
        command.arg("up").arg("-f").arg(path).args(["--metrics", "none"]).args(flags);
        Process::spawn(command.env("TIDEGATE_SOCKET", run.join("api.sock")))
    }

    /// Starts to bring `file` up.
    pub(crate) fn up(&self, file: &str) -> Process {
        Process::spawn(&mut self.command(file))
    }

    /// Like [`Self::up`], with flags.
    pub(crate) fn up_with(&self, file: &str, flags: &[&str]) -> Process {
        Process::spawn(self.command(file).args(flags))
    }

    /// Like [`Self::up`], as an unprivileged user.
    pub(crate) fn up_as_nobody(&self, file: &str) -> Process {
        Process::spawn(&mut self.command_as_nobody(file))
    }

    /// The command that brings `file` up as an unprivileged user.
    pub(crate) fn command_as_nobody(&self, file: &str) -> Command {
        self.up_command(self.tidegate_as_nobody(), file)
    }

    /// Brings `file` up and waits until it is up. Returns the namespaces of `services`. As root,
    /// these are adopted: they replace the placeholders `x-netns: NAME` in `file`, with the name of
    /// the service in upper case. With `rootless`, the placeholders are replaced by commands, and
    /// tidegate creates the namespaces.
    #[track_caller]
    pub(crate) fn up_with_services<const N: usize>(
        &self,
        file: &str,
        services: [&str; N],
        rootless: bool,
        flags: &[&str],
    ) -> (Process, [Namespace; N]) {
        const SOON: Duration = Duration::from_secs(10);
        if rootless {
            let up = self.up_as_nobody(&with_commands(file, &services));
            up.wait_for_line("Ctrl-C takes", SOON);
            let namespaces = services.map(|name| service_namespace(&up, name));
            return (up, namespaces);
        }
        let namespaces = services.map(|_| Namespace::new());
        let mut file = file.to_owned();
        for (name, namespace) in services.iter().zip(&namespaces) {
            file = file.replace(&name.to_uppercase(), &namespace.path().display().to_string());
        }
        let up = self.up_with(&file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        (up, namespaces)
    }

    /// The output for `file`, which cannot be brought up.
    #[track_caller]
    pub(crate) fn refused(&self, file: &str) -> String {
        refused(&mut self.command(file))
    }

    /// Path of the API socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run.path().join("api.sock")
    }
}

/// The output of `command`, which must fail with exit code 1.
#[track_caller]
pub(crate) fn refused(command: &mut Command) -> String {
    let mut process = Process::spawn(command);
    let code = process.wait(Duration::from_secs(10)).code();
    let printed = process.wait_for_output(Duration::from_secs(10));
    assert_eq!(code, Some(1), "{printed}");
    printed
}

/// The state of a namespace as text: links, addresses, routes, policy rules and firewall rules.
pub(crate) fn state(namespace: &Namespace) -> String {
    let ip = |args: &[&str]| namespace.exec("ip", args);
    let all = [
        ip(&["-o", "addr"]),
        ip(&["route", "show", "table", "all"]),
        ip(&["-6", "route", "show", "table", "all"]),
        ip(&["rule"]),
        ip(&["-6", "rule"]),
        tables(namespace),
        legacy_rules(namespace, "iptables"),
        legacy_rules(namespace, "ip6tables"),
    ];
    let lines = all.iter().flat_map(|text| text.lines());
    lines
        .filter(|line| !line.contains("fe80:") && !line.contains("expires"))
        // A flag of routes, which follows the state of the link.
        .map(|line| format!("{}\n", line.replace(" linkdown", "")))
        .collect()
}

/// The nftables tables, sorted. Lists one family at a time: nft(8) shows extensions of iptables
/// (`masquerade`, `dnat to`) only for the first of `ip` and `ip6` in a listing.
fn tables(namespace: &Namespace) -> String {
    let families = ["ip", "ip6", "inet", "netdev", "bridge", "arp"];
    let listed = families.map(|family| namespace.exec("nft", &["-s", "list", "ruleset", family]));
    let mut tables: Vec<&str> =
        listed.iter().flat_map(|listed| listed.split_inclusive("\n}\n")).collect();
    tables.sort_unstable();
    tables.concat()
}

/// The rules and chains of the legacy variant of `program`. Listing a table creates it.
fn legacy_rules(namespace: &Namespace, program: &str) -> String {
    let saved = namespace.exec(&format!("{program}-legacy-save"), &[]);
    let is_there =
        |line: &&str| line.starts_with("-A") || line.starts_with('*') || line.contains(" - [");
    let lines =
        saved.lines().filter(is_there).map(|line| line.split(" [").next().unwrap_or_default());
    let lines: Vec<&str> = lines.collect();
    // Empty tables are ignored.
    let tables = lines.split(|line| line.starts_with('*')).filter(|table| !table.is_empty());
    tables.map(|table| format!("{program}: {}\n", table.join("\n"))).collect()
}

/// `file` with the placeholders `x-netns: NAME` of `services` replaced by commands.
pub(crate) fn with_commands(file: &str, services: &[&str]) -> String {
    let one = |file: String, name: &&str| {
        file.replace(&format!("x-netns: {}", name.to_uppercase()), "command: sleep 60")
    };
    services.iter().fold(file.to_owned(), one)
}

/// The namespace of the networks of a rootless `up`, found by a thread that has entered it.
pub(crate) fn rootless_namespace(up: &Process, host: &Namespace) -> Namespace {
    let tasks = fs::read_dir(format!("/proc/{}/task", up.pid())).unwrap();
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    let machine = host.run(|| fs::read_link("/proc/thread-self/ns/net")).unwrap();
    let inside = tasks
        .map(|task| task.unwrap().path().join("ns/net"))
        .find(|path| fs::read_link(path).is_ok_and(|there| there != own && there != machine));
    Namespace::at(&inside.expect("a thread inside"))
}

/// The network namespace of a service, found by its init process.
pub(crate) fn service_namespace(up: &Process, service: &str) -> Namespace {
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", up.pid())).unwrap();
    let init = children.split_whitespace().find(|pid| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.ends_with(format!("service-init\0{service}\0").as_bytes())
    });
    let init = init.unwrap_or_else(|| panic!("no init of {service} among {children}"));
    Namespace::at(Path::new(&format!("/proc/{init}/ns/net")))
}
