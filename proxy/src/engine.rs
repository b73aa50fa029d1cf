//! The engine: starts event loops, publishes and unpublishes ports, drains and stops.

use crate::config::{PortOptions, Settings};
use crate::gateway_acl::GatewayAcl;
use crate::listener::Listener;
use crate::metrics::{EngineUsage, PortSnapshot, ProcessMetrics, SeriesLabel};
use crate::port::{Port, PortStats};
use crate::shared::{Message, Shared};
use crate::tcp::{Limits, Shares};
use crate::udp::LoopGuard;
use crate::upstream::BackendId;
use crate::worker::Worker;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_model::{LogInterval, Protocol};
use tidegate_reactor::{Descriptors, EventLoop, Permit};

/// Polling interval of [`Engine::drain`].
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Minimum interval between two log events about paused ports.
const PAUSE_LOG: Duration = Duration::from_secs(1);

/// Descriptors that each loop needs when the limit is reached: one for a client that is being
/// accepted and one for a client that waits.
const DESCRIPTORS_PER_LOOP: usize = 2;

/// Runs the loop `index` on the calling thread.
fn run(index: usize, shared: Arc<Shared>, event_loop: EventLoop<Message>) {
    if let Err(error) = event_loop.run(&mut Worker::new(index, shared)) {
        tracing::error!(%error, "event loop ended");
    }
}

/// Identifies a published port. Dropping it has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PublishedPort(u64);

/// Result of [`Engine::drain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// TCP connections that were reset at the deadline.
    pub cut: usize,
}

/// Publishes ports and forwards their traffic on its own threads.
pub struct Engine {
    shared: Arc<Shared>,
    ports: Mutex<Ports>,
    next: AtomicU64,
}

/// The published ports, and totals of closed ones.
#[derive(Default)]
struct Ports {
    published: BTreeMap<PublishedPort, Arc<Port>>,
    /// Ports without their own series that are being closed. Their counters may change until all
    /// loops have closed them.
    closing: BTreeMap<PublishedPort, Arc<Port>>,
    /// Number of ports with their own series, including ports that are being published.
    with_series: usize,
    /// Number of sockets for each published TCP port number.
    tcp_numbers: BTreeMap<u16, usize>,
    /// Counters of closed ports without their own series, summed by protocol.
    closed_totals: Vec<PortSnapshot>,
}

impl Ports {
    /// The sum of the ports of `protocol` without their own series; `None` if there never was one.
    fn others_total(&self, protocol: Protocol) -> Option<PortSnapshot> {
        let mut sum =
            self.closed_totals.iter().find(|sum| sum.series.protocol() == protocol).cloned();
        let others =
            self.published.values().chain(self.closing.values()).filter(|port| !port.has_series);
        for port in others.filter(|port| port.label.protocol() == protocol) {
            let empty = || PortSnapshot::empty(SeriesLabel::Others(protocol));
            sum.get_or_insert_with(empty).add(&PortSnapshot::of(port));
        }
        sum
    }

    /// Adds the counters of a closed port to the totals.
    fn add_closed(&mut self, counted: &PortSnapshot) {
        let protocol = counted.series.protocol();
        let index = self.closed_totals.iter().position(|sum| sum.series.protocol() == protocol);
        let index = index.unwrap_or_else(|| {
            self.closed_totals.push(PortSnapshot::empty(SeriesLabel::Others(protocol)));
            self.closed_totals.len() - 1
        });
        self.closed_totals[index].add_counted(counted);
    }
}

impl Engine {
    /// Creates an engine without ports. Threads are started on demand.
    pub fn new(settings: Settings) -> Self {
        Self::with_prepared_threads(settings, || Ok(()))
    }

    /// Like [`new`](Self::new), but each thread first calls `prepare`, for instance to enter a
    /// network namespace. If `prepare` fails, the loop is not started, and
    /// [`publish`](Self::publish) returns an error.
    pub fn with_prepared_threads(
        settings: Settings,
        prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        let workers = settings.workers.max(1);
        let shared = Shared {
            descriptors: Arc::new(Descriptors::of_process(
                settings.reserved_descriptors + DESCRIPTORS_PER_LOOP * workers,
            )),
            loads: (0..workers).map(|_| AtomicUsize::new(0)).collect(),
            shares: Arc::new(Shares::new(Limits {
                connections: settings.max_connections,
                per_client: settings.max_client_connections,
                bytes: settings.held_bytes,
            })),
            several_ports: AtomicBool::new(false),
            metrics: ProcessMetrics::new(),
            pause_log: LogInterval::new(PAUSE_LOG),
            limit_logs: std::array::from_fn(|_| LogInterval::default()),
            budget_log: LogInterval::default(),
            loop_guard: LoopGuard::default(),
            prepare: Box::new(prepare),
            run,
            loops: Mutex::new((0..workers).map(|_| None).collect()),
            settings,
        };
        Self { shared: Arc::new(shared), ports: Mutex::default(), next: AtomicU64::new(0) }
    }

    /// Serves `listeners`, each with its container port, with common options. UDP ports are
    /// distributed over the loops. Must be called in the namespace in which ports are published,
    /// because it creates the probe sockets of [`LoopGuard`] there. Individual listeners may be in
    /// other namespaces.
    ///
    /// # Errors
    /// If no event loop can be started (no thread or no descriptor). The listeners are then closed.
    pub fn publish(
        &self,
        listeners: Vec<(Listener, u16)>,
        options: &Arc<PortOptions>,
    ) -> io::Result<Vec<PublishedPort>> {
        let loops = self.shared.loads.len();
        let mut shares: Vec<Vec<(Arc<Port>, Listener)>> = (0..loops).map(|_| Vec::new()).collect();
        let mut published = Vec::with_capacity(listeners.len());
        let mut with_series = self.reserve_series(listeners.len());
        let taken = with_series;
        for (listener, container_port) in listeners {
            let id = self.next.fetch_add(1, Ordering::Relaxed);
            let port = Arc::new(Port {
                id,
                label: listener.label(),
                container_port,
                options: Arc::clone(options),
                stats: PortStats::default(),
                closed: AtomicBool::new(false),
                has_series: with_series > 0,
            });
            with_series = with_series.saturating_sub(1);
            if port.label.protocol() == Protocol::Udp {
                self.shared.loop_guard.add(port.label.address());
            }
            // TCP connections move to other loops when one is saturated; UDP sessions do not.
            let index = match port.label.protocol() {
                Protocol::Udp => id as usize % loops,
                Protocol::Tcp | Protocol::Sctp => 0,
            };
            published.push((PublishedPort(id), Arc::clone(&port)));
            shares[index].push((port, listener));
        }
        for (index, share) in shares.into_iter().enumerate() {
            if share.is_empty() {
                continue;
            }
            let sent = self.shared.ensure_started(index).and_then(|()| {
                let sent = self.shared.send(index, Message::Publish(share));
                sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
            });
            if let Err(error) = sent {
                let mut ports = self.ports();
                ports.with_series = ports.with_series.saturating_sub(taken);
                return Err(error);
            }
        }
        let ids = published.iter().map(|(id, _)| *id).collect();
        let mut ports = self.ports();
        for (_, port) in published.iter().filter(|(_, port)| port.label.protocol() == Protocol::Tcp)
        {
            *ports.tcp_numbers.entry(port.label.address().port()).or_default() += 1;
        }
        self.update_several_ports(&ports);
        ports.published.extend(published);
        drop(ports);
        Ok(ids)
    }

    /// Reserves metric series for up to `count` ports and returns the number of reserved ones.
    /// Ports that the NAT engine forwards are included, because they are reported together with
    /// these.
    pub fn reserve_series(&self, count: usize) -> usize {
        let mut ports = self.ports();
        let left = self.shared.settings.ports_with_series.saturating_sub(ports.with_series);
        let taken = left.min(count);
        ports.with_series += taken;
        taken
    }

    /// Closes a port. Its address is free when this returns. Its connections are reset and its
    /// sessions end; other ports are not affected. Returns false if the port is not published.
    pub fn unpublish(&self, id: PublishedPort) -> bool {
        let port = {
            let mut ports = self.ports();
            let Some(port) = ports.published.remove(&id) else { return false };
            if port.has_series {
                ports.with_series = ports.with_series.saturating_sub(1);
            } else {
                ports.closing.insert(id, Arc::clone(&port));
            }
            if port.label.protocol() == Protocol::Tcp
                && let Entry::Occupied(mut sockets) =
                    ports.tcp_numbers.entry(port.label.address().port())
            {
                *sockets.get_mut() -= 1;
                if *sockets.get() == 0 {
                    sockets.remove();
                }
            }
            self.update_several_ports(&ports);
            port
        };
        if port.label.protocol() == Protocol::Udp {
            self.shared.loop_guard.remove(port.label.address());
        }
        port.closed.store(true, Ordering::Relaxed);
        self.shared.broadcast(|done| Message::Unpublish { port: Arc::clone(&port), done });
        let mut ports = self.ports();
        if ports.closing.remove(&id).is_some() {
            ports.add_closed(&PortSnapshot::of(&port));
        }
        true
    }

    /// Ends the flows whose client has one of these addresses, which may get a new owner. They have
    /// ended when this returns.
    pub fn end_clients(&self, clients: impl IntoIterator<Item = IpAddr>) {
        let clients = Arc::new(clients.into_iter().collect::<BTreeSet<_>>());
        self.shared.broadcast(|done| Message::EndClients { clients: Arc::clone(&clients), done });
    }

    /// Resets the TCP connections to these backends, which no longer exist. UDP sessions move to
    /// other backends with their next datagram ([`Upstream::is_available`]).
    ///
    /// [`Upstream::is_available`]: crate::Upstream::is_available
    pub fn end_backends(&self, backends: impl IntoIterator<Item = BackendId>) {
        let backends = Arc::new(backends.into_iter().collect::<BTreeSet<_>>());
        self.shared
            .broadcast(|done| Message::EndBackends { backends: Arc::clone(&backends), done });
    }

    fn update_several_ports(&self, ports: &Ports) {
        self.shared.several_ports.store(ports.tcp_numbers.len() > 1, Ordering::Relaxed);
    }

    /// Adds the address of a UDP port that another component serves, such as the NAT engine.
    /// Datagrams with this source are dropped as well. Must be called in the namespace in which
    /// ports are published.
    pub fn add_foreign_udp_port(&self, address: SocketAddr) {
        self.shared.loop_guard.add(address);
    }

    /// Removes an address added by [`add_foreign_udp_port`](Self::add_foreign_udp_port).
    pub fn remove_foreign_udp_port(&self, address: SocketAddr) {
        self.shared.loop_guard.remove(address);
    }

    /// Whether the source of a datagram, `client`, is a published port. A reply would go to that
    /// port, and its service would reply in turn, in an endless loop.
    pub fn is_reflected(&self, client: SocketAddr, acl: &GatewayAcl) -> bool {
        self.shared.loop_guard.is_reflected(client, acl)
    }

    /// Closes all ports and lets connections continue until they end or `deadline` has passed, then
    /// resets the rest. Stops earlier if `impatient` returns true.
    pub fn drain(&self, deadline: Duration, mut impatient: impl FnMut() -> bool) -> Drained {
        self.shared.broadcast(|done| Message::Drain { done });
        let deadline = Instant::now() + deadline;
        while self.shared.connections() > 0 && Instant::now() < deadline && !impatient() {
            std::thread::sleep(DRAIN_POLL);
        }
        let cut = self.shared.connections();
        self.stop();
        Drained { cut }
    }

    /// Closes all ports, resets all connections and ends the threads immediately.
    pub fn stop(&self) {
        *self.ports() = Ports::default();
        let loops: Vec<_> = self.shared.loops().iter_mut().filter_map(Option::take).collect();
        for running in &loops {
            // A loop that has ended has no receiver.
            let _ = running.sender.send(Message::Stop);
        }
        for running in loops {
            if running.thread.join().is_err() {
                tracing::error!("event loop panicked");
            }
        }
    }

    /// Reserves `count` descriptors for as long as the permit is held. For sockets that are opened
    /// while the engine runs and that [`Settings::reserved_descriptors`] does not cover.
    pub fn reserve(&self, count: u32) -> Option<Permit> {
        self.shared.descriptors.take(count)
    }

    /// Number of descriptors still available to connections and sessions.
    pub fn descriptors_left(&self) -> usize {
        self.shared.descriptors.left()
    }

    /// The counters of the published ports with their own series, in the order of publishing,
    /// followed by the sums of all others.
    pub fn snapshot(&self) -> Vec<PortSnapshot> {
        let ports = self.ports();
        let own = ports
            .published
            .values()
            .filter(|port| port.has_series)
            .map(|port| PortSnapshot::of(port));
        let sums = [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .filter_map(|protocol| ports.others_total(protocol));
        own.chain(sums).collect()
    }

    /// Calls `each` with the counters of every published port, with or without its own series, in
    /// the order of publishing.
    pub fn for_each_port(&self, mut each: impl FnMut(PublishedPort, &PortSnapshot)) {
        // Copied, so that `each` runs without the lock that `publish` needs.
        let ports: Vec<_> =
            self.ports().published.iter().map(|(id, port)| (*id, Arc::clone(port))).collect();
        for (id, port) in ports {
            each(id, &PortSnapshot::of(&port));
        }
    }

    /// The use of the limits of the engine.
    pub fn usage(&self) -> EngineUsage {
        let (published, with_series) = {
            let ports = self.ports();
            (ports.published.len(), ports.published.values().filter(|port| port.has_series).count())
        };
        let descriptors = &self.shared.descriptors;
        let usage = self.shared.shares.usage();
        EngineUsage {
            ports: [with_series as u64, (published - with_series) as u64],
            connections: self.shared.connections() as u64,
            connections_limit: self.shared.settings.max_connections as u64,
            largest_client: usage.most as u64,
            held_bytes: usage.bytes as u64,
            held_bytes_limit: self.shared.settings.held_bytes as u64,
            descriptors: descriptors.taken() as u64,
            descriptors_limit: descriptors.limit() as u64,
        }
    }

    /// Releases the series of one port that another component serves.
    pub fn release_series(&self) {
        let mut ports = self.ports();
        ports.with_series = ports.with_series.saturating_sub(1);
    }

    /// Adds the counters of a closed port that another component served without its own series.
    pub fn add_closed(&self, counted: &PortSnapshot) {
        self.ports().add_closed(counted);
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("settings", &self.shared.settings).finish_non_exhaustive()
    }
}
