//! A host with an ordinary user, the containers of the user, and the program that serves them.

use rustix::pipe::{PipeFlags, pipe_with};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tidegate_testbed::server::{Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{
    Mounts, Namespace, Process, Topology, eventually, pass_fd, require_program,
};

/// The timeout of operations that should be immediate.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// The size of a bulk transfer in bytes.
const BULK_BYTES: u64 = 64 << 20;

/// The user id of `nobody` in Debian and most other distributions.
pub(crate) const NOBODY: u32 = 65_534;

/// The binary under test.
pub(crate) const OURS: &str = env!("CARGO_BIN_EXE_slirp4netns");

/// A host, with an outside namespace at the address `addr::CLIENT_V4`.
pub(crate) struct Scene {
    pub(crate) net: Topology,
    host: Namespace,
    directory: tempfile::TempDir,
}

impl Scene {
    #[track_caller]
    pub(crate) fn new() -> Self {
        Self::with(|mounts, _| mounts)
    }

    /// A scene with additional mounts. The scene itself mounts the program, which nobody may not
    /// read, and a `resolv.conf`.
    #[track_caller]
    pub(crate) fn with(
        change: impl FnOnce(tidegate_testbed::MountsBuilder, &Path) -> tidegate_testbed::MountsBuilder,
    ) -> Self {
        require_program("setpriv");
        let net = Topology::three();
        // A new namespace permits ping to no group; hosts usually permit it to all.
        net.host.sysctl("net.ipv4.ping_group_range", "0 2147483647");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["bin", "home"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        chown(path.join("home"), Some(NOBODY), Some(NOBODY)).unwrap();
        for name in ["bin/slirp4netns", "resolv.conf"] {
            fs::write(path.join(name), "").unwrap();
        }
        let mounts = Mounts::builder()
            .bind(OURS, path.join("bin/slirp4netns"))
            .bind(path.join("resolv.conf"), "/etc/resolv.conf");
        let host = net.host.with_mounts(change(mounts, path).build(&net.host));
        Self { net, host, directory }
    }

    /// A path in a directory that nobody may not read.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A path in a directory that nobody may not write.
    pub(crate) fn home(&self, name: &str) -> PathBuf {
        self.path("home").join(name)
    }

    /// The path of the program under test on the host.
    pub(crate) fn ours(&self) -> String {
        self.path("bin/slirp4netns").display().to_string()
    }

    /// Sets the `resolv.conf` of the host.
    pub(crate) fn resolvers(&self, text: &str) {
        fs::write(self.path("resolv.conf"), text).unwrap();
    }

    /// `program` on the host, as root.
    pub(crate) fn as_root(&self, program: &str) -> Command {
        let mut command = self.host.command(program);
        command.env_remove("TIDEGATE_LOG");
        command
    }

    /// `program` on the host, as nobody.
    pub(crate) fn as_nobody(&self, program: &str) -> Command {
        let user = NOBODY.to_string();
        let mut command = self.as_root("setpriv");
        // Without this, changing the user would clear the parent death signal.
        command.args([
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
            "--pdeathsig",
            "KILL",
            program,
        ]);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", self.path("bin").display()));
        command.env("HOME", self.path("home"));
        command
    }

    /// A container of nobody: a network namespace in a user namespace, with a process.
    #[track_caller]
    pub(crate) fn guest(&self) -> Guest {
        let mut command = self.as_nobody("unshare");
        let process =
            Process::spawn(command.args(["--user", "--map-root-user", "--net", "sleep", "300"]));
        let pid = process.pid();
        let runs =
            || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
        assert!(eventually(SOON, runs), "{}", process.output());
        Guest { namespace: Namespace::at(format!("/proc/{pid}/ns/net").as_ref()), process }
    }

    /// Serves `guest` with the program under test, as nobody with `options`, until it is ready.
    #[track_caller]
    pub(crate) fn serve(&self, guest: &Guest, options: &[&str]) -> Slirp {
        let mut command = self.as_nobody(&self.ours());
        command.args(options);
        Slirp::start(command, guest)
    }

    /// Runs the program under test with `arguments`, which must fail, and returns its line.
    #[track_caller]
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let output =
            self.as_nobody(&self.ours()).args(arguments).stdin(Stdio::null()).output().unwrap();
        one_line(&output)
    }
}

/// The error line of a failed start.
#[track_caller]
pub(crate) fn one_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("slirp4netns: error: ") && text.lines().count() == 1, "{text}");
    assert!(output.stdout.is_empty());
    text
}

/// A container.
pub(crate) struct Guest {
    pub(crate) namespace: Namespace,
    pub(crate) process: Process,
}

impl Guest {
    pub(crate) fn pid(&self) -> String {
        self.process.pid().to_string()
    }

    /// Runs `ip` in the container.
    #[track_caller]
    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        self.namespace.ip(arguments)
    }

    /// Makes a bulk TCP transfer to a server at `address` in `outside`, and one from it.
    #[track_caller]
    pub(crate) fn transfers_both_ways(&self, outside: &Namespace, address: IpAddr) {
        let sink = Sink::tcp(outside, (address, 7002).into(), 1);
        let source = Source::tcp(outside, (address, 7003).into(), 2, BULK_BYTES);
        self.namespace.run(|| {
            let mut stream = TcpStream::connect(sink.addr()).unwrap();
            transfer::send(&mut stream, 1, BULK_BYTES).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut stream = TcpStream::connect(source.addr()).unwrap();
            assert_eq!(transfer::receive(&mut stream, 2), Transfer::complete(BULK_BYTES));
        });
        assert_eq!(sink.wait(1, SOON), [Transfer::complete(BULK_BYTES)]);
    }
}

/// A running slirp4netns, ours or the original.
pub(crate) struct Slirp {
    pub(crate) process: Process,
    /// The exit descriptor; the process ends when it is closed.
    pub(crate) exit: Option<OwnedFd>,
}

impl Slirp {
    /// Starts `command`, which already has its options, for `guest`, and waits until it is ready.
    #[track_caller]
    pub(crate) fn start(mut command: Command, guest: &Guest) -> Self {
        let (ready, sender) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (exit_reader, exit) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        // Descriptor numbers in an unusual order.
        command.args(["--ready-fd=9", "-e", "8", &guest.pid(), "tap0"]);
        pass_fd(&mut command, sender, 9);
        pass_fd(&mut command, exit_reader, 8);
        let process = Process::spawn(&mut command);
        drop(command);
        let mut word = String::new();
        File::from(ready).read_to_string(&mut word).unwrap();
        assert_eq!(word, "1", "{}", process.output());
        Self { process, exit: Some(exit) }
    }
}

/// Sends a request to an API socket and returns the response.
#[track_caller]
pub(crate) fn ask(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
