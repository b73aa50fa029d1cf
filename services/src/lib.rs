//! Services: processes of this host, each in a given network namespace.
//!
//! # Theory of operation
//!
//! ```text
//! supervisor (tokio) ── one task per service
//!    │ request ▼ ▲ reports (Unix socket)
//! service-init   PID 1 of a PID namespace; own network, mount and UTS namespace, own session
//!    │ signals ▼ ▲ exit
//! the command    leader of a process group; its descendants stay in the PID namespace
//! ```
//!
//! To start a service, this program executes itself as a minimal init (`init`), which is PID 1 of a
//! new PID namespace. The init sets the service up as an ordinary single-threaded process, so that
//! it can report which step failed. It then starts the command, forwards signals to its process
//! group, reaps orphans and reports the exit of the command.
//!
//! When the init ends, the kernel kills all remaining processes of its PID namespace, including
//! daemons. The init can be reaped only after that, so one `SIGKILL` and one `wait` end a service
//! completely. The init ends after the command, on a signal of the supervisor, when the supervisor
//! dies (`PR_SET_PDEATHSIG`), and when its socket is closed.
//!
//! A service runs in the user namespace that owns its network namespace. For root, this is the
//! supervisor's. For an ordinary user, it is a child of the supervisor's, one per service. Root in
//! a service thus has no capability over the supervisor's network namespace, which contains the
//! bridges.
//!
//! # Supervisor processes
//!
//! `tidegate up` runs the supervisor itself, and its services end with it. The services of a daemon
//! belong to a supervisor process, one per project. It outlives the daemon, and the next daemon
//! connects to it:
//!
//! ```text
//! daemon (`RemoteSupervisor`)          started by a daemon, detached from it:
//!    │ request ▼ ▲ replies             own session, no death signal, no descriptors but stderr
//!    │ supervisor.sock
//! service-supervisor DIRECTORY (`process`, `server`)
//!    │ network namespaces (/proc/PID/fd/N), log, exit statuses
//!    │ supervisor (tokio), as above: one thread, on which the death signal of the inits depends
//! ```
//!
//! | request | answered with |
//! |---|---|
//! | describe | descriptors of the network namespaces |
//! | start | success or error, once all services run |
//! | is started | whether a start has succeeded |
//! | statuses | statuses of all services, now and after each change |
//! | logs | the last lines of a service or of all, and new ones |
//! | stop | success; the process exits after its services |
//!
//! A connection carries one request. Messages are JSON with a length and a version (`wire`). The
//! daemon holds no state of the services: statuses, output and namespaces are those of the process.
//! The lock file in its directory decides whether a process runs there.
//!
//! A slow client cannot block services, because the log drops its oldest lines instead (`log`). A
//! process that is killed takes its services down, as their inits have a death signal.
//!
//! # States
//!
//! The states of a service are `Starting -> Running -> (Restarting -> Starting ...) -> Ended`.
//! `Ended` is final.

mod backoff;
mod error;
mod files;
pub mod init;
pub mod keeper;
mod launch;
mod lines;
mod log;
mod milliseconds;
mod nsswitch;
mod order;
mod output;
pub mod process;
mod protocol;
mod remote;
mod server;
mod service;
mod spawn;
mod supervisor;
mod wire;

pub use error::ServiceError;
pub use files::sweep;
pub use log::{LogLine, OutputStream};
pub use output::{Output, StandardOutput};
pub use remote::{LogStream, RemoteError, RemoteSupervisor, StatusStream};
pub use supervisor::{DEFAULT_GRACE, Observer, Supervisor};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::SystemTime;
use tidegate_model::Restart;
use tidegate_netns::Namespace;

/// A service to run.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Name in output, errors and the run directory: 1 to 64 letters, digits, `.`, `_` and `-`,
    /// beginning with a letter or digit.
    pub name: String,
    /// Program and arguments. The program is searched for in the service's `PATH`.
    pub command: Vec<String>,
    /// Environment variables. `PATH`, `HOME`, `LANG`, `TERM` and `USER` are inherited unless they
    /// are set here.
    pub environment: BTreeMap<String, String>,
    /// Host name in the UTS namespace. At most 64 bytes.
    pub hostname: String,
    /// Initial working directory of the command.
    pub working_dir: PathBuf,
    /// Network namespace, kept across restarts. The service runs in the user namespace that owns
    /// it: the supervisor's, or a child of that.
    pub namespace: Namespace,
    /// Contents of `/etc/hosts`.
    pub hosts: String,
    /// Contents of `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// Restart policy.
    pub restart: Restart,
    /// Names of the services that have to run before this one starts.
    pub depends_on: Vec<String>,
}

/// A service to run in a supervisor process: a [`ServiceSpec`] without the namespace, which is the
/// one that [`RemoteSupervisor::launch`] created for the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteSpec {
    /// Name, as in [`ServiceSpec::name`]. One of those given to [`RemoteSupervisor::launch`].
    pub name: String,
    /// Program and arguments. The program is searched for in the service's `PATH`.
    pub command: Vec<String>,
    /// Environment variables. `PATH`, `HOME`, `LANG`, `TERM` and `USER` are inherited from the
    /// supervisor process, and thus from the daemon that launched it, unless they are set here.
    pub environment: BTreeMap<String, String>,
    /// Host name in the UTS namespace. At most 64 bytes.
    pub hostname: String,
    /// Initial working directory of the command. Absolute.
    pub working_dir: PathBuf,
    /// Contents of `/etc/hosts`.
    pub hosts: String,
    /// Contents of `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// Restart policy.
    #[serde(with = "wire::Restart")]
    pub restart: Restart,
    /// Names of the services that have to run before this one starts.
    pub depends_on: Vec<String>,
}

impl RemoteSpec {
    /// Returns the service in `namespace`.
    fn in_namespace(self, namespace: Namespace) -> ServiceSpec {
        let Self {
            name,
            command,
            environment,
            hostname,
            working_dir,
            hosts,
            resolv_conf,
            restart,
            depends_on,
        } = self;
        ServiceSpec {
            name,
            command,
            environment,
            hostname,
            working_dir,
            namespace,
            hosts,
            resolv_conf,
            restart,
            depends_on,
        }
    }
}

/// Exit status of a service's command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// Exit code. 127 if the command could not be executed on a restart.
    Code(i32),
    /// Number of the signal that killed it.
    Signal(i32),
}

impl Exit {
    /// Returns whether the exit code is 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

/// `exited with code 1`, `was killed by SIGKILL`.
impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(number) => match signal_name(number) {
                Some(name) => write!(f, "was killed by {name}"),
                None => write!(f, "was killed by signal {number}"),
            },
        }
    }
}

/// Names of the signals that commonly end a process.
fn signal_name(number: i32) -> Option<&'static str> {
    Some(match number {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGTERM => "SIGTERM",
        _ => return None,
    })
}

/// State of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Its namespaces and mounts are being set up.
    Starting,
    /// Its command runs.
    Running,
    /// Its command has ended, and the backoff before the restart runs.
    Restarting(Exit),
    /// It has ended and is not restarted.
    Ended(Exit),
}

/// Status of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the service.
    pub name: String,
    /// PID of its command in the PID namespace of this process, while it runs.
    pub pid: Option<u32>,
    /// Current state.
    pub state: State,
    /// Number of restarts.
    pub restarts: u32,
    /// Time of the last change of `state`. With a resolution of 1 ms if the service runs in a
    /// supervisor process.
    #[serde(with = "milliseconds")]
    pub since: SystemTime,
}

/// Name and exit of each service, in start order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended(pub Vec<(String, Exit)>);

impl Ended {
    /// Returns whether all services ended with exit code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.0.iter().all(|(_, exit)| exit.success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_displayed_with_its_code_or_signal() {
        assert_eq!(Exit::Code(1).to_string(), "exited with code 1");
        assert_eq!(Exit::Signal(libc::SIGKILL).to_string(), "was killed by SIGKILL");
        assert_eq!(Exit::Signal(34).to_string(), "was killed by signal 34");
    }

    #[test]
    fn success_requires_exit_code_0_of_all_services() {
        let ended = |codes: &[i32]| {
            Ended(codes.iter().map(|&code| (String::new(), Exit::Code(code))).collect())
        };
        assert!(ended(&[0, 0]).success());
        assert!(!ended(&[0, 3]).success());
    }
}
