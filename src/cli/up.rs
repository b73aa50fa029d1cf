//! `tidegate up`: runs the networks and services of a Compose file in the foreground.

use super::duration::optional_timeout;
use super::{UsageError, metrics_address};
use crate::up::{NatLimits, Source, Up as Instance};
use clap::Args;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;
use tidegate_publish::firewall::{FirewallChoice, PublishBy};
use tidegate_publish::limits::ProxyLimits;

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

    /// Firewall that isolates networks and masquerades the egress of containers
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    firewall: FirewallChoice,

    /// How connections to published ports are forwarded [default: proxy, unless rules in
    /// DOCKER-USER match only packets that the kernel forwards]
    #[arg(long, value_name = "HOW", value_enum)]
    publish: Option<PublishBy>,

    /// Serve Prometheus metrics on this ADDRESS:PORT, or on the first free port of
    /// ADDRESS:PORT-PORT; "none" disables them. A port in use is retried
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    metrics: String,

    /// Maximum number of published ports with their own metric series; further ports are summed by
    /// protocol
    #[arg(long, value_name = "N", default_value_t = 1000)]
    metrics_max_ports: usize,

    /// Time for services to exit after the first signal, before they are killed
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = optional_timeout)]
    timeout: Duration,

    /// TTL of the DNS names of services, in whole seconds
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = optional_timeout)]
    dns_ttl: Duration,

    /// Maximum number of DNS queries of one service forwarded to upstream servers per second;
    /// further queries are queued
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
    dns_forward_rate: u32,

    #[command(flatten)]
    limits: ProxyLimits,

    /// Maximum number of flows of the NAT engine; at the limit, the endpoint with the most flows
    /// loses its longest idle one
    #[arg(long, value_name = "N", default_value_t = NatLimits::default().flows, value_parser = clap::value_parser!(u32).range(1..))]
    nat_max_flows: u32,

    /// Maximum number of NAT flows of one endpoint; at the limit, it loses its longest idle one. At
    /// most a quarter of the file descriptors for flows
    #[arg(long, value_name = "N", default_value_t = NatLimits::default().endpoint_flows, value_parser = clap::value_parser!(u32).range(1..))]
    nat_max_endpoint_flows: u32,

    /// Maximum number of unanswered NAT flows of one endpoint; also the burst of new flows that
    /// stay unanswered, whose sustained rate is half of it per second
    #[arg(long, value_name = "N", default_value_t = NatLimits::default().unanswered, value_parser = clap::value_parser!(u32).range(1..))]
    nat_max_unanswered: u32,

    /// Maximum number of conntrack entries; above it, the container with the most entries loses its
    /// longest idle ones [default: three quarters of net.netfilter.nf_conntrack_max]
    #[arg(long, value_name = "N")]
    max_tracked_flows: Option<NonZeroUsize>,

    /// Give containers access to the loopback addresses of the host at 169.254.116.103 (requires
    /// --firewall=none or rootless mode)
    #[arg(long)]
    allow_host_loopback: bool,
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
        let metrics = metrics_address(&self.metrics)?;
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
        let up = Instance {
            source: Source::Project { file, name: self.project_name.clone() },
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
            max_tracked_flows: self.max_tracked_flows,
            allow_host_loopback: self.allow_host_loopback,
        };
        up.run()
    }
}
