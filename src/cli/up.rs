//! `tidegate up`: runs the networks and services of a Compose file in the foreground.

use super::UsageError;
use super::compose_file::compose_file;
use super::duration::optional_timeout;
use super::instance_options::InstanceOptions;
use crate::instance::Source;
use crate::service_manager::ServiceManager;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// Bring up the networks and services of a Compose file, in the foreground or with -d in the daemon
///
/// Services are processes on this host, each with its own network, mount, PID and UTS namespaces.
/// Networks are isolated from each other and from the outside; only published ports are reachable.
/// When all services have exited, or on SIGINT, SIGTERM, SIGHUP or SIGQUIT, everything is removed.
/// A second signal kills the remaining services. With -d, they run until tidegate down, also while
/// no daemon runs.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate up\n  tidegate up -f examples/hello/compose.yaml --metrics none\n  tidegate up -d"
)]
pub(super) struct Up {
    /// The Compose file [default: compose.yaml, compose.yml, docker-compose.yaml or
    /// docker-compose.yml in this directory]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// Name of the project [default: the name key of the file, or the name of its directory]
    #[arg(short, long, value_name = "NAME")]
    project_name: Option<String>,

    /// Run the project in the daemon, in the background; options of the daemon apply
    #[arg(short, long, conflicts_with_all = [
        "firewall", "publish", "metrics", "metrics_max_ports", "dns_ttl", "dns_forward_rate", "max_connections",
        "max_port_connections", "max_client_connections", "udp_max_sessions", "udp_max_source_sessions", "max_held",
        "nat_max_flows", "nat_max_endpoint_flows", "nat_max_unanswered", "nat_max_held", "max_tracked_flows",
        "allow_host_loopback",
    ])]
    detach: bool,

    /// Time for services to exit after the first signal, before they are killed
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = optional_timeout)]
    timeout: Duration,

    #[command(flatten)]
    options: InstanceOptions,
}

impl Up {
    pub(super) fn run(&self) -> anyhow::Result<bool> {
        let file = compose_file(self.file.as_ref())?;
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
        if self.detach {
            let mut project = tidegate_compose::load(&file)?;
            if let Some(name) = &self.project_name {
                project.name.clone_from(name);
            }
            return super::project::up(&file, project, self.timeout).map(|()| true);
        }
        let source = Source::Project { file, name: self.project_name.clone() };
        self.options.instance(source, self.timeout)?.run(ServiceManager::default())
    }
}
