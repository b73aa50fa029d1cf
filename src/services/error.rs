//! Why services cannot be started.

use std::io;
use std::path::PathBuf;

/// Services that cannot be started. What had been started before is stopped again.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Two services of one name.
    #[error("there are two services {0:?}; rename one")]
    Duplicate(String),
    /// A name that cannot be a directory's.
    #[error(
        "service name {0:?} is not 1 to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
    )]
    Name(String),
    /// A service without a command.
    #[error("service {0:?} has no command; give it one")]
    NoCommand(String),
    /// A dependency on something that is not among the services.
    #[error("service {service:?} depends on {dependency:?}, which is no service here")]
    UnknownDependency {
        /// Who depends.
        service: String,
        /// On what.
        dependency: String,
    },
    /// Services that wait for one another; the first is named again at the end.
    #[error("services depend on each other in a circle: {}; break it", circle(.0))]
    Cycle(Vec<String>),
    /// The supervisor has been started before.
    #[error("the services have been started already; stop them first")]
    AlreadyStarted,
    /// The directory of a service's files belongs to somebody who is alive.
    #[error("service {service:?}: {} is in use by another tidegate; stop that one, or set TIDEGATE_RUN_DIR", .path.display())]
    Busy {
        /// The service that wanted it.
        service: String,
        /// The directory.
        path: PathBuf,
    },
    /// A service's own `hosts`, `resolv.conf` or `hostname` cannot be written.
    #[error("service {service:?}: write {}: {source}", .path.display())]
    Files {
        /// The service.
        service: String,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The command cannot be executed.
    #[error("service {service:?}: cannot run {program:?}: {reason}")]
    CannotRun {
        /// The service.
        service: String,
        /// The first word of its command.
        program: String,
        /// What the system said, or what to do.
        reason: String,
    },
    /// What the command was to run in cannot be set up.
    #[error("service {service:?}: {reason}")]
    SetUp {
        /// The service.
        service: String,
        /// The step that failed, and why.
        reason: String,
    },
}

fn circle(names: &[String]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" -> ")
}
