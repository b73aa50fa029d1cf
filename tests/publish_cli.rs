//! The command `tidegate publish`: errors, output, and metrics.

#[path = "publish_cli/confined.rs"]
mod confined;
#[path = "publish_cli/help.rs"]
mod help;
#[path = "publish_cli/metrics.rs"]
mod metrics;
#[path = "publish_cli/published.rs"]
mod published;
#[path = "publish_cli/refused.rs"]
mod refused;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use clap::CommandFactory;
use socket2::SockRef;
use support::{
    Backend, METRICS, Publisher, TIMEOUT, ask, connect, http, read_all, tidegate, wait_until,
    with_timeouts,
};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{
    Namespace, Process, Protocol, Signal, Topology, addr, eventually, raise_open_files,
};

/// The label of the published port for IPv4.
const PORT: &str = "0.0.0.0:8080/tcp";

/// The user id of nobody.
const NOBODY: u32 = 65_534;

/// A port in the output of `--json`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    publish: String,
    ip: String,
    host_port: u16,
    protocol: String,
    container_port: u16,
}

/// The ports in the output of `--json`.
#[track_caller]
fn published(process: &Process) -> Vec<Entry> {
    let printed: serde_json::Value =
        serde_json::from_str(&process.wait_for_line("{", TIMEOUT)).unwrap();
    let text = |entry: &serde_json::Value, key: &str| entry[key].as_str().unwrap().to_owned();
    let number =
        |entry: &serde_json::Value, key: &str| u16::try_from(entry[key].as_u64().unwrap()).unwrap();
    let entries = printed["published"].as_array().unwrap().iter();
    entries
        .map(|entry| Entry {
            publish: text(entry, "publish"),
            ip: text(entry, "host_ip"),
            host_port: number(entry, "host_port"),
            protocol: text(entry, "protocol"),
            container_port: number(entry, "container_port"),
        })
        .collect()
}

/// The label of port 8080 for clients that connect to `to`.
fn publish(to: SocketAddr) -> &'static str {
    if to.is_ipv4() { PORT } else { "[::]:8080/tcp" }
}

/// Runs a command that must exit with `code` and an empty standard output. Returns its standard
/// error.
#[track_caller]
fn fails(mut command: Command, code: i32) -> String {
    let (status, out, error) = run(&mut command);
    assert_eq!(status, Some(code), "{command:?}: {error}");
    assert_eq!(out, "", "{command:?}");
    error
}

/// Runs a command that must succeed and returns its standard output.
#[track_caller]
fn succeeds(mut command: Command) -> String {
    let (status, out, error) = run(&mut command);
    assert_eq!((status, error.as_str()), (Some(0), ""), "{command:?}: {out}");
    out
}

/// The exit code, standard output and standard error of a command.
#[track_caller]
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process =
        Killed(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")));
    let drain = |stream: &mut dyn Read| {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let (mut out, mut error) = (process.0.stdout.take().unwrap(), process.0.stderr.take().unwrap());
    let out = std::thread::spawn(move || drain(&mut out));
    let error = std::thread::spawn(move || drain(&mut error));
    wait_until("the command has ended", || process.0.try_wait().unwrap().is_some());
    let status = process.0.try_wait().unwrap().unwrap();
    (status.code(), out.join().unwrap(), error.join().unwrap())
}

#[track_caller]
fn assert_one_line(stderr: &str) {
    assert!(stderr.starts_with("tidegate: error: ") && stderr.ends_with('\n'), "{stderr:?}");
    assert_eq!(stderr.lines().count(), 1, "{stderr:?}");
    assert!(!stderr.contains("os error"), "{stderr:?} has an error number");
}

#[track_caller]
fn assert_nothing_is_bound(namespace: &Namespace) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        assert_eq!(namespace.bound_ports(protocol), BTreeSet::new(), "{protocol:?}");
    }
}

/// Connects and reads a byte. Returns the number of bytes or the error.
fn connect_and_see(from: &Namespace, to: SocketAddr) -> Result<usize, io::ErrorKind> {
    let read = from.run(|| {
        TcpStream::connect_timeout(&to, TIMEOUT)
            .and_then(|stream| with_timeouts(stream).read(&mut [0]))
    });
    read.map_err(|error| error.kind())
}

/// A child process that is killed and reaped on drop.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A copy of the program that an ordinary user can execute.
struct Unprivileged {
    directory: tempfile::TempDir,
}

impl Unprivileged {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = Self { directory };
        // Copied by another process: a child that another test starts could inherit a descriptor of
        // ours, and a file open for writing cannot be executed.
        let mut install = Command::new("install");
        install.args(["-m", "755", env!("CARGO_BIN_EXE_tidegate")]).arg(program.path());
        succeeds(install);
        program
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("tidegate")
    }

    /// `tidegate` with `arguments` in `namespace`, run as nobody without capabilities.
    fn command(&self, namespace: &Namespace, arguments: &str) -> Command {
        let mut command = namespace.command(self.path().to_str().unwrap());
        command
            .args(arguments.split_ascii_whitespace())
            .env_remove("TIDEGATE_LOG")
            .current_dir("/");
        // Runs after entering the namespace, which requires root.
        // SAFETY: the closure only makes system calls.
        unsafe {
            command.pre_exec(|| {
                let dropped = libc::setgroups(0, std::ptr::null()) == 0
                    && libc::setresgid(NOBODY, NOBODY, NOBODY) == 0
                    && libc::setresuid(NOBODY, NOBODY, NOBODY) == 0
                    // Changing the user has cleared the parent death signal.
                    && libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0;
                if dropped { Ok(()) } else { Err(io::Error::last_os_error()) }
            });
        }
        command
    }
}

/// Parses a page in the Prometheus text format (exposition format 0.0.4) and returns its families.
/// Checks that each family is declared once and before its samples, that its samples are
/// contiguous, and that no series is repeated.
#[track_caller]
fn check_exposition(page: &str) -> BTreeSet<String> {
    assert!(page.ends_with('\n'), "the last line is not terminated");
    let name_ok = |name: &str| {
        let head = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
        name.starts_with(head) && name.chars().all(|c| head(c) || c.is_ascii_digit())
    };
    let mut kinds: BTreeMap<String, String> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut series = BTreeSet::new();
    let mut current = String::new();
    for line in page.lines().filter(|line| !line.is_empty()) {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) =
                help.split_once(' ').unwrap_or_else(|| panic!("no help in {line:?}"));
            assert!(name_ok(name) && !text.trim().is_empty(), "{line:?}");
            assert!(helped.insert(name.to_owned()), "a second {line:?}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) =
                kind.split_once(' ').unwrap_or_else(|| panic!("no type in {line:?}"));
            assert!(["counter", "gauge", "histogram", "summary"].contains(&kind), "{line:?}");
            assert!(kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "a second {line:?}");
            name.clone_into(&mut current);
        } else {
            let (left, value) =
                line.rsplit_once(' ').unwrap_or_else(|| panic!("no value in {line:?}"));
            assert!(value.parse::<f64>().is_ok(), "{line:?}");
            let (name, labels) = match left.split_once('{') {
                Some((name, labels)) => {
                    (name, labels.strip_suffix('}').unwrap_or_else(|| panic!("{line:?}")))
                }
                None => (left, ""),
            };
            let kind = kinds.get(&current).map(String::as_str);
            let of_histogram = ["_bucket", "_sum", "_count"]
                .iter()
                .any(|end| name.strip_suffix(end) == Some(&current));
            assert!(
                name == current || (kind == Some("histogram") && of_histogram),
                "{line:?} does not belong to {current:?}"
            );
            assert!(
                kind != Some("counter") || name.ends_with("_total"),
                "{line:?}: the name of a counter ends in _total"
            );
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line:?}"));
                assert!(
                    name_ok(key)
                        && !key.contains(':')
                        && !value.trim_end_matches('"').contains('"'),
                    "{line:?}"
                );
            }
            assert!(series.insert(left.to_owned()), "a second {left}");
        }
    }
    let families: BTreeSet<String> = kinds.into_keys().collect();
    assert_eq!(families, helped, "families with a type, and families with a help text");
    families
}
