//! `tidegate up`: the networks and services of a Compose file, in the foreground.

use super::duration::optional_timeout;
use super::{UsageError, metrics_address};
use crate::firewall::{FirewallChoice, PublishBy};
use crate::limits::ProxyLimits;
use crate::up::{NatLimits, Up as Instance};
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// The names that Compose looks for, in its order.
const FILES: [&str; 4] =
    ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];

/// Bring up the networks and services of a Compose file, in the foreground
///
/// Services are processes of this host, each in network, mount, process and host-name namespaces of
/// its own. Networks are closed to one another and to the outside; only published ports answer.
/// When all services have ended, or on SIGINT, SIGTERM, SIGHUP or SIGQUIT, everything is taken down
/// again; a second signal kills what has not ended yet.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  tidegate up\n  tidegate up -f examples/hello/compose.yaml --metrics none"
)]
pub(super) struct Up {
    /// The Compose file [default: compose.yaml, compose.yml, docker-compose.yaml or
    /// docker-compose.yml in this directory]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// What the project is called [default: the file's name key, or its directory's name]
    #[arg(short, long, value_name = "NAME")]
    project_name: Option<String>,

    /// What closes networks to one another and to the outside, and leads containers out
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    firewall: FirewallChoice,

    /// What carries connections to published ports (default: proxy, unless rules in Docker's
    /// DOCKER-USER can be asked by the kernel alone)
    #[arg(long, value_name = "HOW", value_enum)]
    publish: Option<PublishBy>,

    /// Serve Prometheus metrics at this ADDRESS:PORT, at the first free port of ADDRESS:PORT-PORT,
    /// or "none"; a port in use is tried again
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    metrics: String,

    /// Published ports that have series of their own in the metrics; those beyond are told in one
    /// sum for each protocol
    #[arg(long, value_name = "N", default_value_t = 1000)]
    metrics_max_ports: usize,

    /// How long services may take to end after the first signal, before they are killed
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = optional_timeout)]
    timeout: Duration,

    /// How long programs may keep what they are told of services' names; in whole seconds
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = optional_timeout)]
    dns_ttl: Duration,

    /// Names that other DNS servers are asked for in a second for one service; more wait for their
    /// turn
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    dns_forward_rate: u32,

    #[command(flatten)]
    limits: ProxyLimits,

    /// Flows that the NAT engine carries at most; at the limit, the endpoint that has most loses
    /// its idlest one
    #[arg(long, value_name = "N", default_value_t = NatLimits::default().flows, value_parser = clap::value_parser!(u32).range(1..))]
    nat_max_flows: u32,

    /// Flows of one endpoint through the NAT engine; at the limit it loses its idlest one. At most
    /// a quarter of the file descriptors for flows
    #[arg(long, value_name = "N", default_value_t = NatLimits::default().endpoint_flows, value_parser = clap::value_parser!(u32).range(1..))]
    nat_max_endpoint_flows: u32,

    /// Flows of one endpoint that nobody has answered yet, and twice the number that it may begin
    /// in a second
    #[arg(long, value_name = "N", default_value_t = NatLimits::default().unanswered, value_parser = clap::value_parser!(u32).range(1..))]
    nat_max_unanswered: u32,

    /// Let containers reach what the host has on its loopback, at 169.254.116.103
    /// (needs --firewall=none, or an ordinary user)
    #[arg(long)]
    allow_host_loopback: bool,
}

impl Up {
    pub(super) fn run(&self) -> anyhow::Result<bool> {
        let file = match &self.file {
            Some(file) => file.clone(),
            None => {
                FILES.iter().map(PathBuf::from).find(|file| file.exists()).ok_or_else(|| {
                    UsageError(format!("no {} here; say -f FILE", FILES.join(", ")))
                })?
            }
        };
        let metrics = metrics_address(&self.metrics)?;
        if let Some(name) = &self.project_name {
            let sound = |byte: u8| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_'
            };
            let begins_well = name
                .starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit());
            if !begins_well || !name.bytes().all(sound) || name.len() > 63 {
                let rule =
                    "lower-case letters, digits, - and _, a letter or digit first, 63 at most";
                return Err(UsageError(format!("--project-name {name:?}: {rule}")).into());
            }
        }
        let up = Instance {
            file,
            project: self.project_name.clone(),
            firewall: self.firewall,
            publish: self.publish,
            metrics,
            ports_with_series: self.metrics_max_ports,
            grace: self.timeout,
            dns_ttl: self.dns_ttl,
            dns_forward_rate: self.dns_forward_rate,
            limits: self.limits,
            nat_limits: NatLimits {
                flows: self.nat_max_flows,
                endpoint_flows: self.nat_max_endpoint_flows,
                unanswered: self.nat_max_unanswered,
            },
            allow_host_loopback: self.allow_host_loopback,
        };
        up.run()
    }
}
