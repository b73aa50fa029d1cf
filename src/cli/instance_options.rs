//! Options of an instance: networks in the foreground, or a daemon.

use super::duration::optional_timeout;
use super::metrics_address;
use crate::instance::{NatLimits, Source, Up};
use clap::Args;
use std::num::NonZeroUsize;
use std::time::Duration;
use tidegate_publish::firewall::{FirewallChoice, PublishBy};
use tidegate_publish::limits::{HeldBytes, ProxyLimits};

#[derive(Debug, Args)]
pub(super) struct InstanceOptions {
    /// Firewall that isolates networks and masquerades the egress of containers
    #[arg(long, value_name = "WHICH", value_enum, default_value_t)]
    firewall: FirewallChoice,

    /// How connections to published ports are forwarded [default: proxy, unless rules in
    /// DOCKER-USER match only packets that the kernel forwards]
    #[arg(long, value_name = "HOW", value_enum)]
    publish: Option<PublishBy>,

    /// Serve Prometheus metrics on this ADDRESS:PORT, or on the first free port of
    /// ADDRESS:PORT-PORT; "none" disables them. A port in use is retried [default: 127.0.0.1:9464
    /// for the daemon, 127.0.0.1:9464-9563 for a project]
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<String>,

    /// Maximum number of published ports with their own metric series; further ports are summed by
    /// protocol
    #[arg(long, value_name = "N", default_value_t = 1000)]
    metrics_max_ports: usize,

    /// TTL of the DNS names of containers, in whole seconds
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = optional_timeout)]
    dns_ttl: Duration,

    /// Maximum number of DNS queries of one container forwarded to upstream servers per second;
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

    /// Maximum memory for data of NAT flows over TCP that one side does not take, in bytes or with
    /// the suffix K, M or G; at the limit, the endpoint that holds most loses its longest blocked
    /// one
    #[arg(long, value_name = "SIZE", default_value_t = NatLimits::default().held)]
    nat_max_held: HeldBytes,

    /// Maximum number of conntrack entries; above it, the container with the most entries loses its
    /// longest idle ones [default: three quarters of net.netfilter.nf_conntrack_max]
    #[arg(long, value_name = "N")]
    max_tracked_flows: Option<NonZeroUsize>,

    /// Give containers access to the loopback addresses of the host at 169.254.116.103 (requires
    /// --firewall=none or rootless mode)
    #[arg(long)]
    allow_host_loopback: bool,
}

impl InstanceOptions {
    /// The instance with networks from `source`. `grace` is the time for its services to exit.
    pub(super) fn instance(&self, source: Source, grace: Duration) -> anyhow::Result<Up> {
        let metrics = self.metrics.as_deref().unwrap_or(match source {
            Source::Daemon { .. } => "127.0.0.1:9464",
            Source::Project { .. } => "127.0.0.1:9464-9563",
        });
        let metrics = metrics_address(metrics)?;
        Ok(Up {
            source,
            firewall: self.firewall,
            publish: self.publish,
            metrics,
            ports_with_series: self.metrics_max_ports,
            grace,
            dns_ttl: self.dns_ttl,
            dns_forward_rate: self.dns_forward_rate,
            limits: self.limits,
            nat_limits: NatLimits {
                flows: self.nat_max_flows,
                endpoint_flows: self.nat_max_endpoint_flows,
                unanswered: self.nat_max_unanswered,
                held: self.nat_max_held,
            },
            max_tracked_flows: self.max_tracked_flows,
            allow_host_loopback: self.allow_host_loopback,
        })
    }
}
