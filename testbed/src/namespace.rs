//! A network namespace held by a descriptor, with operations inside it.
//!
//! A temporary thread unshares its network namespace; the descriptor of its
//! `/proc/thread-self/ns/net` remains. There is no name under `/run/netns` that could outlive a
//! killed test. The kernel destroys the namespace and its links with the last descriptor, process
//! or socket.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::{Mounts, eventually, require_root};

/// The default congestion control of a namespace. Every kernel has `reno`, and its throughput does
/// not depend on pacing timers, so measurements are repeatable.
const DEFAULT_CONGESTION_CONTROL: &str = "reno";

/// A new network namespace in which only `lo` exists and is up.
///
/// Clones are handles to the same namespace. It ends with the last handle, socket and process.
#[derive(Clone)]
pub struct Namespace {
    net: Arc<OwnedFd>,
    mounts: Option<Mounts>,
}

impl Namespace {
    /// Creates a namespace with `lo` up and TCP congestion control `reno`.
    #[track_caller]
    pub fn new() -> Self {
        require_root();
        let net = thread::spawn(|| {
            // SAFETY: this changes only the network namespace of this thread, which ends right
            // after; descriptors stay shared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("unshare a network namespace");
            fs::File::open("/proc/thread-self/ns/net").expect("open the new network namespace")
        })
        .join()
        .expect("create a network namespace");
        let namespace = Self { net: Arc::new(net.into()), mounts: None };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace.sysctl("net.ipv4.tcp_congestion_control", DEFAULT_CONGESTION_CONTROL);
        namespace
    }

    /// Opens an existing namespace at `path`, such as `/proc/PID/ns/net` of a program under test.
    #[track_caller]
    pub fn at(path: &Path) -> Self {
        let net =
            fs::File::open(path).unwrap_or_else(|error| panic!("open {}: {error}", path.display()));
        Self { net: Arc::new(net.into()), mounts: None }
    }

    /// The same namespace, where commands started through the returned handle also enter `mounts`.
    ///
    /// Closures passed to [`run`](Self::run) are not affected: they see the files of the machine.
    pub fn with_mounts(&self, mounts: Mounts) -> Self {
        Self { net: Arc::clone(&self.net), mounts: Some(mounts) }
    }

    /// A path that other programs can open while this process lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.net.as_raw_fd()).into()
    }

    /// Runs `f` on a new thread inside the namespace and returns its result.
    ///
    /// Sockets created by `f` stay in the namespace, so `f` may return them. A child process that
    /// `f` starts through [`command`](Self::command) is killed when the thread ends: spawn it
    /// outside of `f`.
    ///
    /// # Panics
    ///
    /// If `f` panics.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let done = thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter();
                    f()
                })
                .join()
        });
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Starts a thread inside the namespace that continues to run.
    pub fn spawn_thread<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let namespace = self.clone();
        thread::spawn(move || {
            namespace.enter();
            f()
        })
    }

    /// A command that enters the namespace, and the mounts if there are any, before it executes
    /// `program`.
    ///
    /// The child is killed when the *thread* that spawned it ends (`PR_SET_PDEATHSIG`), and
    /// therefore also when this process is killed. [`Process`](crate::Process) kills and reaps it
    /// as well.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let net = Arc::clone(&self.net);
        let mounts = self.mounts.clone();
        let parent = rustix::process::getpid();
        // SAFETY: the closure only makes system calls; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(parent) {
                    // The parent died before the call above, so the signal would never be sent.
                    return Err(rustix::io::Errno::SRCH.into());
                }
                move_into_link_name_space(net.as_fd(), Some(LinkNameSpaceType::Network))?;
                if let Some(mounts) = &mounts {
                    mounts.enter()?;
                }
                Ok(())
            });
        }
        command
    }

    /// Runs `program` in the namespace and returns its standard output.
    ///
    /// # Panics
    ///
    /// If it cannot be started or fails; the message contains its standard error.
    #[track_caller]
    pub fn exec(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program).args(args).stdin(Stdio::null()).output();
        let output = output.unwrap_or_else(|error| panic!("start {program}: {error}"));
        assert!(
            output.status.success(),
            "{program} {}: {}: {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs iproute2's `ip` in the namespace:
    /// `ns.ip(&["addr", "add", "10.0.0.1/24", "dev", "eth0"])`.
    #[track_caller]
    pub fn ip(&self, args: &[&str]) -> String {
        self.exec("ip", args)
    }

    /// Runs one `ip` command per line of `lines`; empty lines do nothing.
    #[track_caller]
    pub fn ip_all(&self, lines: &str) {
        for line in lines.lines() {
            let args: Vec<&str> = line.split_whitespace().collect();
            if !args.is_empty() {
                self.ip(&args);
            }
        }
    }

    /// Sets a sysctl of the namespace, in the dotted notation of `sysctl(8)`.
    ///
    /// # Panics
    ///
    /// If `key` is not below `net.`, because other sysctls belong to the machine.
    #[track_caller]
    pub fn sysctl(&self, key: &str, value: &str) {
        let path = sysctl_path(key);
        let written = self.run(|| fs::write(&path, value));
        written.unwrap_or_else(|error| panic!("set {key} to {value:?}: {error}"));
    }

    /// Reads a sysctl of the namespace, without the final newline.
    #[track_caller]
    pub fn read_sysctl(&self, key: &str) -> String {
        let path = sysctl_path(key);
        let read = self.run(|| fs::read_to_string(&path));
        read.unwrap_or_else(|error| panic!("read {key}: {error}")).trim_end().to_owned()
    }

    /// Returns whether the namespace has the sysctl `key`; some exist only with a module loaded.
    #[track_caller]
    pub fn has_sysctl(&self, key: &str) -> bool {
        let path = sysctl_path(key);
        self.run(|| path.exists())
    }

    /// Returns the ports with a TCP listener, or with a bound and unconnected UDP socket, on any
    /// address.
    ///
    /// This reads the socket tables of the kernel and makes no connection.
    pub fn bound_ports(&self, protocol: Protocol) -> BTreeSet<u16> {
        let tables = match protocol {
            Protocol::Tcp => ["tcp", "tcp6"],
            Protocol::Udp => ["udp", "udp6"],
        };
        self.run(|| {
            // A kernel without IPv6 lacks a table.
            let tables =
                tables.map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")));
            let lines = tables.iter().flatten().flat_map(|text| text.lines().skip(1));
            lines.filter_map(|line| bound_port(line, protocol)).collect()
        })
    }

    /// Returns whether `port` is one of [`bound_ports`](Self::bound_ports).
    pub fn is_bound(&self, protocol: Protocol, port: u16) -> bool {
        self.bound_ports(protocol).contains(&port)
    }

    /// Waits until [`is_bound`](Self::is_bound).
    ///
    /// # Panics
    ///
    /// If it is still unbound after `timeout`.
    #[track_caller]
    pub fn wait_until_bound(&self, protocol: Protocol, port: u16, timeout: Duration) {
        let bound = eventually(timeout, || self.is_bound(protocol, port));
        assert!(bound, "nothing is bound to port {port} ({protocol:?}) after {timeout:?}");
    }

    /// Moves the calling thread into the namespace.
    fn enter(&self) {
        move_into_link_name_space(self.net.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("enter a network namespace");
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.net.as_fd()
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Namespace").field(&self.path()).finish()
    }
}

/// The transport of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

#[track_caller]
fn sysctl_path(key: &str) -> PathBuf {
    assert!(key.starts_with("net."), "{key} is not a sysctl of a network namespace");
    // As in sysctl(8), dots in interface names are written as slashes:
    // `net.ipv4.conf.eth0/1.rp_filter`.
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    PathBuf::from("/proc/sys").join(key.chars().map(swap).collect::<String>())
}

/// Parses a line of `/proc/net/{tcp,udp}{,6}`: `sl: local_address:port rem_address:port state ...`,
/// in hex. Returns the port of a listening or unconnected socket.
fn bound_port(line: &str, protocol: Protocol) -> Option<u16> {
    // Values of the `enum` in the kernel's include/net/tcp_states.h. An unconnected UDP socket is
    // in TCP_CLOSE.
    let bound_state = match protocol {
        Protocol::Tcp => "0A",
        Protocol::Udp => "07",
    };
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (local, _remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let (_address, port) = local.rsplit_once(':')?;
    if state == bound_state { u16::from_str_radix(port, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_table_lines_are_parsed() {
        let listening =
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0";
        assert_eq!(bound_port(listening, Protocol::Tcp), Some(8080));
        assert_eq!(bound_port(listening, Protocol::Udp), None);
        let established =
            "   1: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0";
        assert_eq!(bound_port(established, Protocol::Tcp), None);
        let datagram =
            "  12: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0";
        assert_eq!(bound_port(datagram, Protocol::Udp), Some(53));
        assert_eq!(bound_port("garbage", Protocol::Udp), None);
    }

    #[test]
    fn sysctl_names_follow_sysctl_8() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward"),
            PathBuf::from("/proc/sys/net/ipv4/ip_forward")
        );
        let dotted = PathBuf::from("/proc/sys/net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.rp_filter"), dotted);
    }

    #[test]
    #[should_panic(expected = "not a sysctl of a network namespace")]
    fn sysctls_of_the_machine_are_rejected() {
        sysctl_path("kernel.panic");
    }
}
