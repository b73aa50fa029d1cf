//! `tidegate up`: runs the networks and services of a Compose file in the foreground.

use super::UsageError;
use super::duration::optional_timeout;
use super::instance_options::InstanceOptions;
use crate::instance::Source;
use crate::service_manager::ServiceManager;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// The default file names of Compose, in order of precedence.
const FILES: [&str; 4] =
    ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];

/// Bring up the networks and services of a Compose file, in the foreground
///
/// Services are processes on this host, each with its own network, mount, PID and UTS namespaces.
/// Networks are isolated from each other and from the outside; only published ports are reachable.
/// When all services have exited, or on SIGINT, SIGTERM, SIGHUP or SIGQUIT, everything is removed.
/// A second signal kills the remaining services.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate up\n  tidegate up -f examples/hello/compose.yaml --metrics none"
)]
pub(super) struct Up {
    /// The Compose file [default: compose.yaml, compose.yml, docker-compose.yaml or
    /// docker-compose.yml in this directory]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Name of the project [default: the name key of the file, or the name of its directory]
    #[arg(short, long, value_name = "NAME")]
    project_name: Option<String>,

    /// Time for services to exit after the first signal, before they are killed
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = optional_timeout)]
    timeout: Duration,

    #[command(flatten)]
    options: InstanceOptions,
}

impl Up {
    pub(super) fn run(&self) -> anyhow::Result<bool> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => {
                FILES.iter().map(PathBuf::from).find(|file| file.exists()).ok_or_else(|| {
                    UsageError(format!("no {} in this directory; use -f FILE", FILES.join(", ")))
                })?
            }
        };
        if let Some(name) = &self.project_name {
            let allowed = |byte: u8| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_'
            };
            let begins_well = name
                .starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit());
            if !begins_well || !name.bytes().all(allowed) || name.len() > 63 {
                let rule = "use 1 to 63 lower-case letters, digits, - and _, starting with a letter or digit";
                return Err(UsageError(format!("--project-name {name:?}: {rule}")).into());
            }
        }
        let source = Source::Project { file, name: self.project_name.clone() };
        self.options.instance(source, self.timeout)?.run(ServiceManager::default())
    }
}
