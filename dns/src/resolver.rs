//! The resolver: networks, endpoints and the servers of containers and gateways.

use crate::error::{ServeError, StartError, ZoneError};
use crate::forward::{Bounds, Forwarder, Namespaces, dispatch};
use crate::metrics::{self, NetworkStats, ProcessMetrics, Questions, Upstream, Usage};
use crate::partition::Shares;
use crate::resolv_conf_watch::{self, Watch};
use crate::resolve::Policy;
use crate::server::{self, Listen, Serving};
use crate::servers::ServerLists;
use crate::shared::{Shared, lock};
use crate::upstream::Figures;
use crate::zone::{EndpointSpec, Limits, NetworkSpec, Zones};
use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;
use tidegate_netns::Namespace;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Settings of a [`Resolver`].
#[derive(Clone, Debug)]
pub struct ResolverSettings {
    /// The namespace from which upstream servers are queried: that of the host, so that 127.0.0.53
    /// is the server of the host.
    pub host: Namespace,
    /// The namespace of the networks, for upstream servers with an address in one of their subnets.
    /// It differs from that of the host in rootless mode.
    pub networks: Namespace,
    /// The file with the upstream servers of the host. Default: `/etc/resolv.conf`.
    pub resolv_conf: PathBuf,
    /// TTL of local records, in whole seconds. Default: 5 s.
    pub ttl: Duration,
    /// Forward names with a single label that no endpoint has, as Docker does. This discloses names
    /// of services to upstream servers, and lets those servers answer for services that are down.
    /// Default: `false`.
    pub forward_single_labels: bool,
    /// Limits of networks, endpoints and names.
    pub limits: Limits,
    /// Maximum number of distinct lists of upstream servers of networks and containers. Default:
    /// 1024.
    pub server_lists: usize,
    /// Size of the cache in bytes. Default: 8 MiB.
    pub cache: usize,
    /// Limit of outstanding upstream queries. Clients on the same networks get at most two thirds
    /// of this and of the other limits that are shared by all clients. Default: 8192.
    pub in_flight: usize,
    /// Limit of clients that wait in the queue or for a response. Default: 32,768.
    pub waiting: usize,
    /// Limit of waiting clients of one endpoint, at least 1. Default: 6144.
    pub waiting_of_one: usize,
    /// Queries per second that are forwarded for one endpoint, at least 1. It is also the size of a
    /// burst after a second without queries. Default: 2000.
    pub forward_rate: u32,
    /// Limit of UDP sockets for upstream queries. While it is not reached, each query has its own.
    /// Default: 1024.
    pub source_ports: usize,
    /// Send names to upstream servers in random case, which the response has to repeat ("0x20").
    /// Default: `true`.
    pub mixed_case: bool,
    /// Limit of TCP clients of one server, at least 1. Default: 128.
    pub tcp_clients: usize,
    /// Limit of TCP clients of all servers. Default: 4096.
    pub tcp_clients_in_all: usize,
}

impl ResolverSettings {
    /// The defaults, with networks in the namespace of the host.
    #[must_use]
    pub fn new(host: Namespace) -> Self {
        Self {
            networks: host.clone(),
            host,
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            ttl: Duration::from_secs(5),
            forward_single_labels: false,
            limits: Limits::default(),
            server_lists: 1024,
            cache: 8 << 20,
            in_flight: 8192,
            waiting: 32_768,
            waiting_of_one: 6_144,
            forward_rate: 2_000,
            source_ports: 1024,
            mixed_case: true,
            tcp_clients: 128,
            tcp_clients_in_all: 4096,
        }
    }
}

/// A DNS resolver for networks of containers. A change applies to the next query.
///
/// [`Self::new`], [`Self::serve`] and [`Self::serve_gateway`] require a tokio runtime with I/O and
/// time enabled, and panic outside of one. The resolver watches the `resolv.conf` of the host until
/// it is dropped.
#[derive(Debug)]
pub struct Resolver {
    shared: Arc<Shared>,
    watcher: AbortHandle,
}

impl Resolver {
    /// Creates a resolver without networks.
    ///
    /// # Errors
    /// [`StartError`]: the `resolv.conf` of the host cannot be watched.
    pub fn new(settings: ResolverSettings) -> Result<Self, StartError> {
        let path = settings.resolv_conf;
        let watch = Watch::new(&path)
            .and_then(resolv_conf_watch::register)
            .map_err(|source| StartError::Watch { path: path.clone(), source })?;
        let metrics = Arc::new(ProcessMetrics::new());
        let bounds = Bounds {
            in_flight: settings.in_flight,
            waiters: settings.waiting,
            waiters_per_endpoint: settings.waiting_of_one,
            rate: settings.forward_rate,
            cache: settings.cache,
            ports: settings.source_ports,
        };
        let mixed_case = settings.mixed_case;
        let namespace = settings.host;
        let namespaces = Namespaces { host: namespace.clone(), networks: settings.networks };
        let shared = Arc::new(Shared {
            zones: RwLock::new(Zones::new(settings.limits)),
            lists: Mutex::new(ServerLists::new(settings.server_lists)),
            host: Mutex::default(),
            announced: watch::Sender::new(Arc::default()),
            forwarder: Arc::new(Forwarder::new(
                namespaces.clone(),
                bounds,
                mixed_case,
                Arc::clone(&metrics),
            )),
            policy: Policy { forward_single_labels: settings.forward_single_labels },
            ttl: u32::try_from(settings.ttl.as_secs()).unwrap_or(u32::MAX),
            namespaces,
            tcp_clients: settings.tcp_clients.max(1),
            connections: Mutex::new(Shares::new(settings.tcp_clients_in_all)),
            metrics,
        });
        // Set before the first query.
        if let Some(servers) = resolv_conf_watch::servers(&path, &namespace) {
            shared.host_servers(servers);
        }
        // The task ends when the forwarder is dropped.
        tokio::spawn(dispatch(Arc::clone(&shared.forwarder)));
        let watched = Arc::clone(&shared);
        let each = move |servers| watched.host_servers(servers);
        let watcher =
            tokio::spawn(resolv_conf_watch::run(path, namespace, watch, each)).abort_handle();
        Ok(Self { shared, watcher })
    }

    /// Adds a network without endpoints.
    ///
    /// # Errors
    /// [`ZoneError`]; nothing was changed.
    pub fn add_network(&self, spec: &NetworkSpec) -> Result<(), ZoneError> {
        let servers = self.shared.list(|| format!("network {:?}", spec.name), &spec.servers)?;
        let stats = Arc::new(NetworkStats::new(&spec.name));
        self.shared.zones_mut().add_network(spec, servers, stats)
    }

    /// Sets whether sources of queries on a network identify endpoints
    /// ([`NetworkSpec::sources_are_verified`]).
    pub fn set_sources_verified(&self, network: &str, verified: bool) {
        self.shared.zones_mut().set_sources_verified(network, verified);
    }

    /// Removes a network and its endpoints. Returns whether it existed.
    pub fn remove_network(&self, name: &str) -> bool {
        self.shared.zones_mut().remove_network(name)
    }

    /// Adds an endpoint to a network, or replaces the endpoint that the container has there with
    /// the same name. A name that several containers have resolves to the addresses of all of them,
    /// which is logged.
    ///
    /// # Errors
    /// [`ZoneError`]; nothing was changed.
    pub fn add_endpoint(&self, network: &str, spec: &EndpointSpec) -> Result<(), ZoneError> {
        let shared = self.shared.zones_mut().add_endpoint(network, spec)?;
        if !shared.is_empty() {
            let names = shared.join(", ");
            tracing::info!(
                network,
                endpoint = spec.name,
                names,
                "names shared by several containers; resolved to all of them"
            );
        }
        Ok(())
    }

    /// Removes the endpoint that `container` has on `network` with the name `name`. Returns whether
    /// it existed.
    pub fn remove_endpoint(&self, network: &str, container: &str, name: &str) -> bool {
        self.shared.zones_mut().remove_endpoint(network, container, name)
    }

    /// Serves a container at 127.0.0.11:53 in its namespace, whose `lo` has to be up. A query is
    /// resolved by the endpoints that the container has at that time. Root in the container can
    /// delay this call, like [`Serving::repair`], for any length of time (nftables transactions).
    ///
    /// # Errors
    /// [`ServeError`], typically because the port is in use.
    pub fn serve(
        &self,
        namespace: &Namespace,
        container: &str,
        options: &ServeOptions,
    ) -> Result<Serving, ServeError> {
        let servers = self.shared.list(|| format!("container {container:?}"), &options.servers)?;
        server::in_container(&self.shared, namespace, container, options.listen, servers)
    }

    /// Serves a network at the address of its gateway, on its bridge `device` only. Clients are
    /// identified by their source address.
    ///
    /// # Errors
    /// [`ServeError`], typically because the port is in use.
    pub fn serve_gateway(
        &self,
        namespace: &Namespace,
        network: &str,
        gateway: IpAddr,
        device: &str,
    ) -> Result<Serving, ServeError> {
        server::at_gateway(&self.shared, namespace, network, gateway, device)
    }

    /// Sets the interface indexes of the bridges of all networks in
    /// [`ResolverSettings::networks`]. A datagram that arrives on a bridge is not accepted as a
    /// response of a server that is not on a network, because a container has forged it. Has to be
    /// called again when a bridge is recreated, because its index changes.
    pub fn set_bridges(&self, indexes: impl IntoIterator<Item = u32>) {
        self.shared.forwarder.bridges().set(indexes.into_iter().collect());
    }

    /// The upstream servers of the host that are in use, and their changes.
    #[must_use]
    pub fn host_servers(&self) -> watch::Receiver<Arc<[SocketAddr]>> {
        self.shared.announced.subscribe()
    }

    /// Writes the metric families of networks, upstream servers and tables in the text format of
    /// Prometheus (exposition format 0.0.4).
    ///
    /// # Errors
    /// Errors of `page`.
    pub fn describe(&self, page: &mut impl Write) -> fmt::Result {
        let networks = self.shared.zones().stats();
        let figures = self.shared.forwarder.figures();
        metrics::describe(
            networks.iter().map(|(stats, endpoints)| (&**stats, *endpoints)),
            &figures,
            page,
        )?;
        metrics::describe_usage(&self.usage(), page)
    }

    /// Usage of the tables.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let usage = self.shared.forwarder.usage();
        let connections = lock(&self.shared.connections);
        Usage {
            tcp_clients: [connections.taken(), connections.taken() + connections.free()],
            ..usage
        }
    }

    /// Query counts by name of the network.
    #[must_use]
    pub fn questions(&self) -> Vec<(String, Questions)> {
        let networks = self.shared.zones().stats();
        networks.iter().map(|(stats, _)| (stats.name().to_owned(), stats.questions())).collect()
    }

    /// State of the upstream servers.
    #[must_use]
    pub fn upstreams(&self) -> Vec<Upstream> {
        let upstream = |(server, trusted, figures): (SocketAddr, bool, Figures)| Upstream {
            server,
            trusted,
            asked: figures.asked,
            silent: figures.missed,
            failed: figures.failed,
            answered: figures.took.count(),
            took: figures.took.total(),
        };
        self.shared.forwarder.figures().into_iter().map(upstream).collect()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

/// Options of [`Resolver::serve`].
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// How the server gets queries to port 53.
    pub listen: Listen,
    /// Upstream servers of the container; empty for those of its networks or the host. They are
    /// queried from the namespace of the host. A container on internal networks only has no
    /// upstream servers.
    pub servers: Vec<SocketAddr>,
}
