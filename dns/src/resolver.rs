//! The names of all networks, and the servers that tell them.

use crate::error::{ServeError, StartError, ZoneError};
use crate::forward::{Bounds, Forwarder, Ways, dispatch};
use crate::metrics::{self, Fill, NetworkStats, ProcessMetrics, Questions, Upstream};
use crate::partition::{Partition, Shares};
use crate::resolv_conf_watch::{self, Watch};
use crate::resolve::Policy;
use crate::server::{self, Listen, Serving};
use crate::servers::{ServerList, ServerLists, TooManyLists};
use crate::upstream::Figures;
use crate::zone::{EndpointSpec, Limits, NetworkSpec, Zones};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;
use tidegate_netns::Namespace;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// What a resolver is made with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The namespace that questions for other servers go out from: the host's, so that 127.0.0.53
    /// is the host's.
    pub outside: Namespace,
    /// The namespace that networks are in, for servers that are on one of them. The host's, but for
    /// an ordinary user.
    pub networks: Namespace,
    /// The file that names the host's servers.
    pub resolv_conf: PathBuf,
    /// How long clients may keep what we say of endpoints. Whole seconds.
    pub ttl: Duration,
    /// Names without a dot that no endpoint has are forwarded. Docker does that; it tells the
    /// outside what services are called, and has the outside answer for those that are down.
    pub forward_single_labels: bool,
    /// How many networks, endpoints and names there may be.
    pub limits: Limits,
    /// Different lists of servers, of networks and containers.
    pub server_lists: usize,
    /// Bytes of answers of other servers that are kept.
    pub cache: usize,
    /// Different questions that are with other servers at once. Askers that are on the same
    /// networks get two thirds of it at most, and so of the other limits of all askers.
    pub in_flight: usize,
    /// Clients that wait for other servers at once, for their turn or for an answer.
    pub waiting: usize,
    /// The same of one endpoint, one at least.
    pub waiting_of_one: usize,
    /// Questions of one endpoint that are forwarded to other servers in a second, and that may go
    /// at once after a second of silence; one at least.
    pub forward_rate: u32,
    /// UDP sockets that questions go out from at once. One has a single question while there are
    /// enough.
    pub source_ports: usize,
    /// Letters of names are sent to other servers in a random case, which their answers must
    /// repeat.
    pub mixed_case: bool,
    /// TCP clients of one server.
    pub tcp_clients: usize,
    /// TCP clients of all servers.
    pub tcp_clients_in_all: usize,
}

impl Settings {
    /// The usual ones.
    #[must_use]
    pub fn new(outside: Namespace) -> Self {
        Self {
            networks: outside.clone(),
            outside,
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

/// What is known of servers in the namespaces that questions go out from.
#[derive(Default)]
struct Host {
    /// Where we are ourselves, and how often.
    ourselves: BTreeMap<SocketAddr, usize>,
    /// Those of the host's file.
    servers: Arc<[SocketAddr]>,
}

/// What every server has in common.
pub(crate) struct Shared {
    zones: RwLock<Zones>,
    lists: Mutex<ServerLists>,
    host: Mutex<Host>,
    pub(crate) forwarder: Arc<Forwarder>,
    /// The host's servers, for whoever wants to hear of them.
    told: watch::Sender<Arc<[SocketAddr]>>,
    pub(crate) policy: Policy,
    pub(crate) ttl: u32,
    pub(crate) ways: Ways,
    pub(crate) tcp_clients: usize,
    /// TCP clients of all servers.
    pub(crate) connections: Mutex<Shares>,
    pub(crate) metrics: Arc<ProcessMetrics>,
}

impl Shared {
    pub(crate) fn zones(&self) -> RwLockReadGuard<'_, Zones> {
        // What is in there holds after every change.
        self.zones.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn zones_mut(&self) -> RwLockWriteGuard<'_, Zones> {
        self.zones.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// We are at `address` from now on.
    pub(crate) fn ourselves(&self, address: SocketAddr) {
        let mut host = lock(&self.host);
        *host.ourselves.entry(address).or_default() += 1;
        self.tell_forwarder(&host);
    }

    pub(crate) fn no_longer_ourselves(&self, address: SocketAddr) {
        let mut host = lock(&self.host);
        if let Some(count) = host.ourselves.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                host.ourselves.remove(&address);
            }
        }
        self.tell_forwarder(&host);
    }

    fn host_servers(&self, servers: Arc<[SocketAddr]>) {
        let mut host = lock(&self.host);
        host.servers = servers;
        self.tell_forwarder(&host);
    }

    /// The host's servers are those of its file but for ourselves: we would ask ourselves, and so
    /// on.
    fn tell_forwarder(&self, host: &Host) {
        let is_own = |server: &SocketAddr| host.ourselves.contains_key(server);
        let (own, others): (Vec<_>, Vec<_>) = host.servers.iter().copied().partition(is_own);
        for server in own {
            tracing::warn!(%server, "a DNS server of the host is tidegate itself, and is not asked");
        }
        let others: Arc<[SocketAddr]> = others.into();
        self.told.send_if_modified(|told| {
            let changed = *told != others;
            told.clone_from(&others);
            changed
        });
        self.forwarder.set_host(others);
    }

    /// Takes a place for a TCP client of `partition`, until the value is dropped.
    pub(crate) fn admit(self: &Arc<Self>, partition: Partition) -> Option<Admitted> {
        let mut connections = lock(&self.connections);
        connections.allows(&partition).then(|| {
            connections.take(&partition);
            Admitted { shared: Arc::clone(self), partition }
        })
    }

    /// The list of `servers`, which `of` is to have.
    fn list(
        &self,
        of: impl Fn() -> String,
        servers: &[SocketAddr],
    ) -> Result<Option<ServerList>, ZoneError> {
        if let Some(server) =
            servers.iter().find(|server| lock(&self.host).ourselves.contains_key(server))
        {
            return Err(ZoneError::Ourselves { of: of(), server: *server });
        }
        lock(&self.lists).get(servers).map_err(|TooManyLists| ZoneError::TooManyServerLists(of()))
    }
}

/// The place of a TCP client among those of all servers.
pub(crate) struct Admitted {
    shared: Arc<Shared>,
    partition: Partition,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        lock(&self.shared.connections).give_back(&self.partition, 1);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// The names of networks. Changes are seen by the next question.
///
/// Made, and asked to serve, within a tokio runtime that has I/O and time: it panics outside of
/// one, as tokio does. Follows the host's servers until it is dropped.
#[derive(Debug)]
pub struct Resolver {
    shared: Arc<Shared>,
    follower: AbortHandle,
}

impl Resolver {
    /// One without networks.
    ///
    /// # Errors
    /// [`StartError`]: the host's `resolv.conf` cannot be watched.
    pub fn new(settings: Settings) -> Result<Self, StartError> {
        let path = settings.resolv_conf;
        let watch = Watch::new(&path)
            .and_then(resolv_conf_watch::register)
            .map_err(|source| StartError::Watch { path: path.clone(), source })?;
        let metrics = Arc::new(ProcessMetrics::new());
        let bounds = Bounds {
            flights: settings.in_flight,
            waiters: settings.waiting,
            waiters_of_one: settings.waiting_of_one,
            rate: settings.forward_rate,
            cache: settings.cache,
            ports: settings.source_ports,
        };
        let mixed_case = settings.mixed_case;
        let outside = settings.outside;
        let ways = Ways { outside: outside.clone(), networks: settings.networks };
        let shared = Arc::new(Shared {
            zones: RwLock::new(Zones::new(settings.limits)),
            lists: Mutex::new(ServerLists::new(settings.server_lists)),
            host: Mutex::default(),
            told: watch::Sender::new(Arc::default()),
            forwarder: Arc::new(Forwarder::new(
                ways.clone(),
                bounds,
                mixed_case,
                Arc::clone(&metrics),
            )),
            policy: Policy { forward_single_labels: settings.forward_single_labels },
            ttl: u32::try_from(settings.ttl.as_secs()).unwrap_or(u32::MAX),
            ways,
            tcp_clients: settings.tcp_clients.max(1),
            connections: Mutex::new(Shares::new(settings.tcp_clients_in_all)),
            metrics,
        });
        // Before anybody can ask.
        if let Some(servers) = resolv_conf_watch::servers(&path, &outside) {
            shared.host_servers(servers);
        }
        // It ends with the last server.
        tokio::spawn(dispatch(Arc::clone(&shared.forwarder)));
        let following = Arc::clone(&shared);
        let each = move |servers| following.host_servers(servers);
        let follower =
            tokio::spawn(resolv_conf_watch::follow(path, outside, watch, each)).abort_handle();
        Ok(Self { shared, follower })
    }

    /// Adds a network, without endpoints.
    ///
    /// # Errors
    /// [`ZoneError`]; nothing has changed then.
    pub fn add_network(&self, spec: &NetworkSpec) -> Result<(), ZoneError> {
        let servers = self.shared.list(|| format!("network {:?}", spec.name), &spec.servers)?;
        let stats = Arc::new(NetworkStats::new(&spec.name));
        self.shared.zones_mut().add_network(spec, servers, stats)
    }

    /// Removes a network with its endpoints. Whether it was there.
    pub fn remove_network(&self, name: &str) -> bool {
        self.shared.zones_mut().remove_network(name)
    }

    /// Adds an endpoint to a network, or puts it in the place of the one that the container has
    /// there under the same name. Names that other containers have as well are answered with the
    /// addresses of all of them, and logged.
    ///
    /// # Errors
    /// [`ZoneError`]; nothing has changed then.
    pub fn add_endpoint(&self, network: &str, spec: &EndpointSpec) -> Result<(), ZoneError> {
        let shared = self.shared.zones_mut().add_endpoint(network, spec)?;
        if !shared.is_empty() {
            let names = shared.join(", ");
            tracing::info!(
                network,
                endpoint = spec.name,
                names,
                "several containers have these names; all of them answer"
            );
        }
        Ok(())
    }

    /// Removes the endpoint that `container` has on a network under `name`. Whether it was there.
    pub fn remove_endpoint(&self, network: &str, container: &str, name: &str) -> bool {
        self.shared.zones_mut().remove_endpoint(network, container, name)
    }

    /// Serves a container at 127.0.0.11:53 in its namespace, whose `lo` is up. What it is told
    /// depends on the endpoints that it has at the time of each question. It may take as long as
    /// root in the container likes, as to repair a [`Serving`] may.
    ///
    /// # Errors
    /// [`ServeError`]: above all, that the port is taken.
    pub fn serve(
        &self,
        namespace: &Namespace,
        container: &str,
        options: &ServeOptions,
    ) -> Result<Serving, ServeError> {
        let servers = self.shared.list(|| format!("container {container:?}"), &options.servers)?;
        server::in_container(&self.shared, namespace, container, options.listen, servers)
    }

    /// Serves a network at its gateway's address, to those who come in by `device`, its bridge.
    /// They are told apart by their addresses.
    ///
    /// # Errors
    /// [`ServeError`]: above all, that the port is taken.
    pub fn serve_gateway(
        &self,
        namespace: &Namespace,
        network: &str,
        gateway: IpAddr,
        device: &str,
    ) -> Result<Serving, ServeError> {
        server::at_gateway(&self.shared, namespace, network, gateway, device)
    }

    /// From now on these are the indexes of the bridges of all networks, in [`Settings::networks`].
    /// What comes in by a bridge is no answer of a server that is not on a network: a container has
    /// forged it. To be called again when a bridge is made anew, which gives it another index.
    pub fn set_bridges(&self, indexes: impl IntoIterator<Item = u32>) {
        self.shared.forwarder.bridges().set(indexes.into_iter().collect());
    }

    /// The host's servers as they are asked, now and from here on.
    #[must_use]
    pub fn host_servers(&self) -> watch::Receiver<Arc<[SocketAddr]>> {
        self.shared.told.subscribe()
    }

    /// Writes the families of networks and servers in the text format of Prometheus (exposition
    /// format 0.0.4).
    ///
    /// # Errors
    /// Only those of `page`.
    pub fn describe(&self, page: &mut impl Write) -> fmt::Result {
        let networks = self.shared.zones().stats();
        let figures = self.shared.forwarder.figures();
        metrics::describe(
            networks.iter().map(|(stats, endpoints)| (&**stats, *endpoints)),
            &figures,
            page,
        )?;
        metrics::describe_fill(&self.fill(), page)
    }

    /// How full the tables are.
    #[must_use]
    pub fn fill(&self) -> Fill {
        let fill = self.shared.forwarder.fill();
        let connections = lock(&self.shared.connections);
        Fill {
            tcp_clients: [connections.taken(), connections.taken() + connections.free()],
            ..fill
        }
    }

    /// What the networks have asked, by name.
    #[must_use]
    pub fn questions(&self) -> Vec<(String, Questions)> {
        let networks = self.shared.zones().stats();
        networks.iter().map(|(stats, _)| (stats.name().to_owned(), stats.questions())).collect()
    }

    /// How the servers are that questions are forwarded to.
    #[must_use]
    pub fn upstreams(&self) -> Vec<Upstream> {
        let upstream = |(server, trusted, figures): (SocketAddr, bool, Figures)| Upstream {
            server,
            trusted,
            asked: figures.asked,
            silent: figures.missed,
            failed: figures.failed,
            answered: figures.took.iter().sum(),
            took: Duration::from_micros(figures.took_micros),
        };
        self.shared.forwarder.figures().into_iter().map(upstream).collect()
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

/// How a container is served.
#[derive(Clone, Debug, Default)]
pub struct ServeOptions {
    /// How port 53 is come by.
    pub listen: Listen,
    /// Servers of the container's own; empty for those of its networks, or the host's. They are
    /// asked from the host's namespace, and for containers on internal networks only not at all.
    pub servers: Vec<SocketAddr>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
