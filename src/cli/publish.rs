//! `tidegate publish`: publishes ports of a container in the foreground, without a daemon.

use super::duration::{optional_timeout, timeout};
use super::output::print;
use super::{UsageError, metrics_address};
use anyhow::{Context, anyhow, bail};
use clap::{ArgGroup, Args};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::{CidrSet, PortSpec, Protocol, PublishLabel, overlap};
use tidegate_netns::HostContext;
use tidegate_netns::{AddressBook, Namespace};
use tidegate_process::{confine, raise_descriptor_limit, without_lost_signals};
use tidegate_proxy::{
    Engine, Listener, PortOptions, ProxyProtocol, Settings, Upstream, describe_engine,
};
use tidegate_publish::bind::{bind, runs};
use tidegate_publish::client_address::{Source, sweep_stale_owners};
use tidegate_publish::limits::ProxyLimits;
use tidegate_telemetry::metrics_endpoint::Recorder;

/// Publish ports of a container or an address, in the foreground
///
/// Connections and datagrams to the published ports of this host are forwarded to the container. On
/// SIGINT or SIGTERM, no new connections are accepted, and open ones may finish within
/// --drain-timeout; a second signal resets them.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true).multiple(true))]
#[command(after_help = "Examples:\n  \
    tidegate publish 8080:80 --to 172.17.0.2\n  \
    tidegate publish 127.0.0.1:5353:53/udp --netns /run/netns/web\n  \
    tidegate publish 9000-9009:9000-9009 --pid 4711 --source client --metrics 127.0.0.1:9464")]
pub(super) struct Publish {
    /// Ports to publish, in the syntax of docker run -p
    ///
    /// [HOST_IP:][HOST_PORT[-END]:]CONTAINER_PORT[-END][/tcp|udp]; an IPv6 HOST_IP is in brackets.
    /// Without HOST_IP, the port is published on all IPv4 and IPv6 addresses. Without HOST_PORT, a
    /// free port is chosen and printed.
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<PortSpec>,

    /// Address of the container
    #[arg(long, value_name = "IP", group = "target")]
    to: Option<IpAddr>,

    /// Network namespace of the container; its address is detected unless --to is set
    #[arg(long, value_name = "PATH", group = "target", conflicts_with = "pid")]
    netns: Option<PathBuf>,

    /// A process in the container, instead of --netns
    #[arg(long, value_name = "PID", group = "target")]
    pid: Option<u32>,

    /// Source address that the container sees: proxy, client or proxy-protocol
    ///
    /// proxy: the address of the gateway. client: the address of the client. proxy-protocol: the
    /// address of the gateway, with a PROXY protocol header that carries the address of the client.
    /// Default: with a namespace, client for TCP and proxy for UDP; otherwise proxy.
    #[arg(long)]
    source: Option<Source>,

    /// Version of the PROXY protocol header sent to the backend: v1 or v2 [with --source
    /// proxy-protocol: v2]
    #[arg(long, value_name = "VERSION")]
    proxy_protocol: Option<ProxyProtocol>,

    /// Accept only clients from this network; can be repeated
    #[arg(long, value_name = "CIDR")]
    allow: Vec<String>,

    #[command(flatten)]
    limits: ProxyLimits,

    /// Timeout for a connect to the container
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = timeout)]
    dial_timeout: Duration,

    /// Timeout for a UDP session without datagrams in either direction
    #[arg(long, value_name = "TIME", default_value = "90s", value_parser = timeout)]
    udp_idle_timeout: Duration,

    /// Time for open connections to finish after the first signal; 0 resets them at once
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = optional_timeout)]
    drain_timeout: Duration,

    /// Maximum number of event loops [default: one per core, up to 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: Option<u32>,

    /// Payload of one read from which the next read uses splice instead of a copy (for
    /// measurements)
    #[arg(long, value_name = "BYTES", hide = true)]
    splice_from: Option<usize>,

    /// Serve Prometheus metrics on this ADDRESS:PORT, or on the first free port of
    /// ADDRESS:PORT-PORT; "none" disables them. A port in use is retried
    #[arg(long, value_name = "ADDRESS", default_value = "none")]
    metrics: String,

    /// Maximum number of published ports with their own metric series; further ports are summed by
    /// protocol
    #[arg(long, value_name = "N", default_value_t = 1000)]
    metrics_max_ports: usize,

    /// Print the published ports as JSON
    #[arg(long)]
    json: bool,
}

/// Rejects a port that forwards to itself. Such a port would connect to itself until the process
/// reaches its limits.
fn refuse_loops<'a>(
    container: IpAddr,
    mut listeners: impl Iterator<Item = &'a (Listener, u16)>,
) -> anyhow::Result<()> {
    let own = AddressBook::of(&Namespace::current()?)
        .context("addresses of this host")?
        .is_local(container);
    let is_loop = |(listener, container_port): &&(Listener, u16)| {
        let at = listener.label().address();
        let on_all = at.ip().is_unspecified() && at.is_ipv4() == container.is_ipv4();
        at.port() == *container_port && (at.ip() == container || on_all && own)
    };
    match listeners.find(is_loop) {
        Some((listener, container_port)) => bail!(
            "port {} would forward to itself at {}; publish another port",
            listener.label(),
            SocketAddr::new(container, *container_port)
        ),
        None => Ok(()),
    }
}

impl Publish {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        // From here on, both signals stay pending until they are read, instead of killing.
        let signals = without_lost_signals(|| Signals::new([SIGINT, SIGTERM]));
        let mut signals = signals.context("signal handlers")?;
        overlap(&self.specs).map_err(|error| UsageError(error.to_string()))?;
        let allow = self.allow_list()?;
        let metrics = metrics_address(&self.metrics)?;
        if let Some(spec) = self.specs.iter().find(|spec| spec.protocol() == Protocol::Sctp) {
            bail!("port spec \"{spec}\": protocol not supported");
        }
        let target = self.target()?;
        sweep_stale_owners();
        raise_descriptor_limit();

        let mut bound: BTreeMap<Protocol, Vec<(Listener, u16)>> = BTreeMap::new();
        for mapping in self.specs.iter().flat_map(PortSpec::mappings) {
            let listeners =
                bind(&mapping)?.into_iter().map(|listener| (listener, mapping.container_port));
            bound.entry(mapping.protocol).or_default().extend(listeners);
        }
        if let Target::Address(container) = target {
            refuse_loops(container, bound.values().flatten())?;
        }
        // The engine resolves its instruments once, so the recorder must exist before it.
        let recorder = metrics.map(Recorder::install).transpose()?;
        let listeners = bound.values().map(Vec::len).sum();
        let is_confined = self.is_confined(&target);
        if is_confined {
            let ports = bound.get(&Protocol::Tcp).into_iter().flatten().map(|(_, port)| *port);
            confine::confine_proxy(&ports.collect::<Vec<u16>>());
        } else {
            confine::confine_privileged_proxy();
        }
        let engine = Arc::new(Engine::new(self.settings(listeners)));
        if engine.descriptors_left() < 2 {
            bail!(
                "{listeners} listening sockets leave no file descriptors for connections; raise the limit (ulimit -n)"
            );
        }
        let mut published = Vec::new();
        for (protocol, listeners) in bound {
            let options =
                Arc::new(self.port_options(self.upstream(&target, protocol)?, allow.clone()));
            published.extend(listeners.iter().map(|(listener, port)| (listener.label(), *port)));
            engine.publish(listeners, &options).context("event loops")?;
        }
        let metrics_at = match recorder {
            Some(recorder) => {
                let served = recorder.status().served();
                let view = Arc::clone(&engine);
                let recorder = recorder.with(move |page| {
                    // Writing to text cannot fail.
                    let _ = describe_engine(&view.snapshot(), &view.usage(), page);
                });
                recorder.serve().context("metrics endpoint")?;
                served
            }
            None => None,
        };
        if is_confined {
            confine::filter_proxy_calls();
        }
        self.announce(&published, &target, metrics_at)?;

        signals.forever().next();
        let drained = engine.drain(self.drain_timeout, || signals.pending().next().is_some());
        if drained.cut > 0 {
            tracing::warn!(connections = drained.cut, "connections reset at shutdown");
        }
        Ok(())
    }

    fn allow_list(&self) -> anyhow::Result<Option<CidrSet>> {
        if self.allow.is_empty() {
            return Ok(None);
        }
        let set =
            CidrSet::parse(&self.allow).map_err(|error| UsageError(format!("--allow: {error}")))?;
        Ok(Some(set))
    }

    /// Returns the settings of the engine, with `listeners` sockets already open.
    fn settings(&self, listeners: usize) -> Settings {
        let mut settings = Settings {
            dial_timeout: self.dial_timeout,
            ports_with_series: self.metrics_max_ports,
            ..Settings::default()
        };
        self.limits.limit_engine(&mut settings);
        if let Some(workers) = self.workers {
            settings.workers = workers as usize;
        }
        if let Some(bytes) = self.splice_from {
            settings.splice_from = bytes;
        }
        settings.reserved_descriptors += listeners;
        settings
    }

    fn port_options(&self, upstream: Arc<dyn Upstream>, allow: Option<CidrSet>) -> PortOptions {
        let mut options = PortOptions::new(upstream);
        options.allow = allow;
        self.limits.limit_port(&mut options);
        options.sessions.idle = self.udp_idle_timeout;
        options.proxy_protocol = match self.source {
            Some(Source::ProxyProtocol) => self.proxy_protocol.or(Some(ProxyProtocol::V2)),
            _ => self.proxy_protocol,
        };
        options
    }

    /// Returns whether all sockets belong to this namespace and use its own addresses, so that the
    /// process can drop its privileges.
    fn is_confined(&self, target: &Target) -> bool {
        matches!(target, Target::Address(_)) && self.source != Some(Source::Client)
    }

    fn target(&self) -> anyhow::Result<Target> {
        let namespace = match (&self.netns, self.pid) {
            (Some(path), _) => Some((Namespace::from_path(path)?, path.display().to_string())),
            (None, Some(pid)) => Some((Namespace::from_pid(pid)?, format!("process {pid}"))),
            (None, None) => None,
        };
        match (namespace, self.to) {
            (Some((namespace, name)), address) => {
                Ok(Target::Namespace { namespace, name, address })
            }
            (None, Some(address)) if address.is_unspecified() => {
                Err(UsageError(format!("--to {address}: not an address to connect to")).into())
            }
            (None, Some(address)) => Ok(Target::Address(address)),
            (None, None) => Err(anyhow!("a target is required")),
        }
    }

    fn upstream(&self, target: &Target, protocol: Protocol) -> anyhow::Result<Arc<dyn Upstream>> {
        Ok(match target {
            Target::Address(address) => {
                self.source.unwrap_or(Source::Proxy).upstream_to(*address, protocol)?
            }
            Target::Namespace { namespace, address, .. } => {
                let host_context =
                    HostContext::here().context("this process's own network namespace")?;
                Source::upstream_to_namespace(
                    self.source,
                    &host_context,
                    namespace,
                    address.as_slice(),
                    protocol,
                )?
            }
        })
    }

    /// Prints the published ports.
    fn announce(
        &self,
        published: &[(PublishLabel, u16)],
        target: &Target,
        metrics: Option<SocketAddr>,
    ) -> anyhow::Result<()> {
        let text = if self.json {
            let ports: Vec<_> = published
                .iter()
                .map(|(label, container_port)| {
                    serde_json::json!({
                        "publish": label.to_string(),
                        "host_ip": label.address().ip(),
                        "host_port": label.address().port(),
                        "protocol": label.protocol().as_str(),
                        "container_port": container_port,
                    })
                })
                .collect();
            let metrics = metrics.map(|address| format!("http://{address}/metrics"));
            format!("{}\n", serde_json::json!({ "published": ports, "metrics": metrics }))
        } else {
            let runs = runs(published);
            let width = runs.iter().map(|(from, _)| from.len()).max().unwrap_or(0);
            let to = target.to_string();
            let ports = runs.iter();
            let ports =
                ports.map(|(from, ports)| format!("{from:width$}  ->  {to} port {ports}\n"));
            let metrics = metrics.map(|address| format!("metrics at http://{address}/metrics\n"));
            ports.chain(metrics).collect()
        };
        // If the reader closed the pipe, the ports stay published.
        print(&text)
    }
}

/// Where published ports forward to.
enum Target {
    Address(IpAddr),
    Namespace { namespace: Namespace, name: String, address: Option<IpAddr> },
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Namespace { name, address: Some(address), .. } => {
                write!(f, "{address} in {name}")
            }
            Self::Namespace { name, .. } => f.write_str(name),
        }
    }
}
