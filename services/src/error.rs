//! Errors of starting services.

use std::io;
use std::path::PathBuf;

/// Services cannot be started. Those that were started before the error are stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Two services have the same name.
    #[error("there are two services {0:?}; rename one")]
    Duplicate(String),
    /// A name that is not valid as a directory name or host name label.
    #[error(
        "invalid service name {0:?}: it must have 1 to 64 letters, digits, '.', '_' and '-', and begin with a letter or digit"
    )]
    Name(String),
    /// A service without a command.
    #[error("service {0:?} has no command; add one")]
    NoCommand(String),
    /// A dependency that is not among the services.
    #[error(
        "service {service:?} depends on {dependency:?}, which does not exist; add it, or remove the dependency"
    )]
    UnknownDependency {
        /// The dependent service.
        service: String,
        /// Name of the missing service.
        dependency: String,
    },
    /// Services that depend on each other. The first one is repeated at the end.
    #[error("dependency cycle between services: {}; remove one of these dependencies", cycle(.0))]
    Cycle(Vec<String>),
    /// [`Supervisor::start`](super::Supervisor::start) was called twice.
    #[error("the services were started already; stop them first")]
    AlreadyStarted,
    /// The directory of a service's files is locked by another process.
    #[error("service {service:?}: {} is in use by another tidegate; stop that one, or set TIDEGATE_RUN_DIR", .path.display())]
    Busy {
        /// The service.
        service: String,
        /// The directory.
        path: PathBuf,
    },
    /// The `hosts`, `resolv.conf`, `hostname` or `nsswitch.conf` of a service cannot be written.
    #[error("service {service:?}: write {}: {source}", .path.display())]
    Files {
        /// The service.
        service: String,
        /// The file or directory.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The command cannot be executed.
    #[error("service {service:?}: cannot run {program:?}: {reason}")]
    CannotRun {
        /// The service.
        service: String,
        /// The program of its command.
        program: String,
        /// Error of the system call, with a remedy if there is one.
        reason: String,
    },
    /// The namespaces, mounts or working directory of the command cannot be set up.
    #[error("service {service:?}: {reason}")]
    SetUp {
        /// The service.
        service: String,
        /// The failed step with its cause.
        reason: String,
    },
}

fn cycle(names: &[String]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" -> ")
}
