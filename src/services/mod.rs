//! Services: processes of this host, each in a network namespace that is handed in.
//!
//! # Theory of operation
//!
//! ```text
//! supervisor (tokio) ── one task per service
//!    │ order ▼ ▲ reports (Unix socket)
//! service-init   PID 1 of a PID namespace; own network, mounts, host name, session
//!    │ signals ▼ ▲ exit
//! the command    leads a process group; whatever it forks stays in the PID namespace
//! ```
//!
//! A service is started by this program executing itself as a tiny init (`init`), the first process
//! of a new PID namespace. Set-up happens there, in an ordinary process with one thread, and so
//! each failing step can be named. The init then starts the command, forwards signals to its
//! process group, reaps orphans and tells how the command ended.
//!
//! When the init ends, the kernel kills all that is left in its PID namespace, daemonised
//! grandchildren included, and lets nobody reap the init before. So one `SIGKILL` and one `wait`
//! are a complete end. The init ends with the command, by the supervisor's signal, when the
//! supervisor dies (`PR_SET_PDEATHSIG`), and when its socket closes.
//!
//! A service runs in the user namespace that owns its network namespace. For root that is the
//! supervisor's. For an ordinary user it is a child of it, one for each service, so that root in a
//! service has no capability over the supervisor's network namespace, where the bridges are.
//!
//! A service moves `Starting -> Running -> (Restarting -> Starting ...) -> Ended`, and from `Ended`
//! nowhere.

mod backoff;
mod error;
mod files;
pub mod init;
mod launch;
mod lines;
mod nsswitch;
mod order;
mod output;
mod protocol;
mod service;
mod supervisor;

pub use error::ServiceError;
pub use files::sweep;
pub use output::{Output, StandardOutput};
pub use supervisor::{DEFAULT_GRACE, Observer, Supervisor};

use crate::compose::Restart;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::SystemTime;
use tidegate_netns::Namespace;

/// A service to run.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// How it is called in output, errors and the run directory: 1 to 64 letters, digits, `.`, `_`
    /// and `-`.
    pub name: String,
    /// Program and arguments. The program is searched for in the service's `PATH`.
    pub command: Vec<String>,
    /// Variables beside `PATH`, `HOME`, `LANG`, `TERM` and `USER`, which are inherited unless they
    /// are named here.
    pub environment: BTreeMap<String, String>,
    /// What `hostname` says in there, 64 bytes at most.
    pub hostname: String,
    /// Where the command starts.
    pub working_dir: PathBuf,
    /// The network namespace that it lives in, across restarts. It runs in the user namespace that
    /// owns this one: the supervisor's, or a child of it.
    pub namespace: Namespace,
    /// The contents of its `/etc/hosts`.
    pub hosts: String,
    /// The contents of its `/etc/resolv.conf`.
    pub resolv_conf: String,
    /// Whether it is started again when it has ended.
    pub restart: Restart,
    /// The names of services that have to run before it starts.
    pub depends_on: Vec<String>,
}

/// How a service's command has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// With this exit code. 127 also if it could not be executed when it was to be restarted.
    Code(i32),
    /// Killed by the signal of this number.
    Signal(i32),
}

impl Exit {
    /// Whether that was exit code 0.
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

/// The names of signals that commonly end a process.
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

/// Where a service is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its surroundings are being set up.
    Starting,
    /// Its command runs.
    Running,
    /// It has ended so, and waits to be started again.
    Restarting(Exit),
    /// It has ended so for good.
    Ended(Exit),
}

/// What is known of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// The pid of its command, as this process sees it, while it runs.
    pub pid: Option<u32>,
    /// Where it is in its life.
    pub state: State,
    /// How often it was started again.
    pub restarts: u32,
    /// Since when it is in that state.
    pub since: SystemTime,
}

/// How services ended, in the order of their start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended(pub Vec<(String, Exit)>);

impl Ended {
    /// Whether all ended with exit code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.0.iter().all(|(_, exit)| exit.success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_as_one_reads_it() {
        assert_eq!(Exit::Code(1).to_string(), "exited with code 1");
        assert_eq!(Exit::Signal(libc::SIGKILL).to_string(), "was killed by SIGKILL");
        assert_eq!(Exit::Signal(34).to_string(), "was killed by signal 34");
    }

    #[test]
    fn all_have_to_succeed() {
        let ended = |codes: &[i32]| {
            Ended(codes.iter().map(|&code| (String::new(), Exit::Code(code))).collect())
        };
        assert!(ended(&[0, 0]).success());
        assert!(!ended(&[0, 3]).success());
    }
}
