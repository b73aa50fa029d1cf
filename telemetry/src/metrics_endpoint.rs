//! The metrics endpoint: `GET /metrics` for Prometheus.
//!
//! It uses blocking I/O on its own threads, because the small docker-proxy binary also serves
//! metrics and has no async runtime. The number of clients is bounded, and each holder has a share
//! of it ([`clients`]). A client has [`REQUEST_TIMEOUT`] for its request and [`RESPONSE_TIMEOUT`]
//! to read the page.
//!
//! The load on the data plane is bounded, too. One thread at a time renders a page, with low
//! priority ([`NICE`]) and frequent pauses. Clients that arrive before rendering starts share the
//! page. Pages are sent in pieces ([`PIECE`]), one piece at a time, each followed by a pause of
//! equal length. A storm of scrapes therefore uses at most half a core.
//!
//! A port in use does not prevent the start, because any user of the host can occupy a port.
//! Binding is retried ([`Backoff`]) until the process ends.

mod clients;
mod http;
mod server;

use metrics::gauge;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use server::Server;
use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tidegate_model::{Ingress, Protocol};
use tidegate_netns::{LocalPeers, port_holders};
use tidegate_reactor::{accept_only_from_loopback, enable_stream_ingress};

/// The time for a client to send its request, and the longest wait for it to read more of the page.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The total time for a client to read the page. Prometheus gives up after 10 s by default
/// (`scrape_timeout`).
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// The first and the longest interval between attempts to bind a port in use. The interval doubles.
const RETRY: Duration = Duration::from_secs(1);
const MAX_RETRY: Duration = Duration::from_secs(30);

/// The interval for folding histograms without scrapes, so that their samples do not accumulate.
const UPKEEP: Duration = Duration::from_secs(5);

/// The niceness of the threads that accept clients and render pages. Next to a busy event loop,
/// they get a tenth of its CPU time (sched(7)).
const NICE: i32 = 10;

/// The bytes of a page that are sent at a time, which takes about 50 us.
const PIECE: usize = 256 << 10;

/// The length of the port range that the error for a port in use suggests.
const RANGE: u16 = 10;

/// The address to serve on, with a port or a range of ports. The first free port of a range is
/// used. The docker-proxy processes of a host share one environment and need a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsAddress {
    ip: IpAddr,
    first: u16,
    last: u16,
}

/// The address is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("metrics address {0:?} is not ADDRESS:PORT or ADDRESS:PORT-PORT")]
pub struct MetricsAddressError(String);

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let first = SocketAddr::new(self.ip, self.first);
        if self.first == self.last {
            write!(f, "{first}")
        } else {
            write!(f, "{first}-{}", self.last)
        }
    }
}

impl MetricsAddress {
    /// The same address with a range of ports, as an example for the error.
    fn as_range(self) -> String {
        let last = self.first.saturating_add(RANGE);
        format!("{}-{last}", SocketAddr::new(self.ip, self.first))
    }
}

impl FromStr for MetricsAddress {
    type Err = MetricsAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MetricsAddressError(text.to_owned());
        let (single, last) = match text.rsplit_once('-') {
            Some((single, last)) => (single, Some(last.parse::<u16>().map_err(|_| error())?)),
            None => (text, None),
        };
        let address: SocketAddr = single.parse().map_err(|_| error())?;
        let last = last.unwrap_or(address.port());
        if last < address.port() {
            return Err(error());
        }
        Ok(Self { ip: address.ip(), first: address.port(), last })
    }
}

/// Why the endpoint cannot be served. A port in use is not an error, see [`Recorder::install`].
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address does not belong to this host, or is not permitted.
    #[error("metrics address {address}: {source}")]
    Bind {
        /// The configured address.
        address: MetricsAddress,
        /// The error of the last port tried.
        source: io::Error,
    },
}

/// The state of the endpoint.
#[derive(Clone, Debug)]
pub struct MetricsStatus {
    wanted: MetricsAddress,
    served: Arc<OnceLock<SocketAddr>>,
}

impl MetricsStatus {
    /// Returns the configured address, with a port or a range of ports.
    #[must_use]
    pub fn wanted(&self) -> MetricsAddress {
        self.wanted
    }

    /// Records the address of `listener` as served.
    fn set(&self, listener: &TcpListener) {
        if let Ok(address) = listener.local_addr() {
            // Only one listener is ever bound.
            let _ = self.served.set(address);
        }
    }

    /// Returns the address in use; `None` while another program occupies it.
    #[must_use]
    pub fn served(&self) -> Option<SocketAddr> {
        self.served.get().copied()
    }
}

/// The recorder of the `metrics` facade. It must be installed before instruments are resolved.
pub struct Recorder {
    handle: PrometheusHandle,
    status: MetricsStatus,
    /// `None` while the port is in use.
    listener: Option<TcpListener>,
    denies: Option<Denies>,
    families: Vec<Families>,
}

/// Writes families of series in the Prometheus text format.
type Families = Box<dyn Fn(&mut PacedText<'_>) + Send + Sync>;

/// Whether the client of a connection is denied.
type Denies = Box<dyn Fn(&Ingress) -> bool + Send + Sync>;

impl Recorder {
    /// Binds `address` and installs the recorder in the facade. If all its ports are in use, a
    /// warning with the remedy is logged, and [`Self::serve`] retries.
    ///
    /// # Errors
    /// [`EndpointError`]. Nothing stays open.
    pub fn install(address: MetricsAddress) -> Result<Self, EndpointError> {
        let listener = match bind(address) {
            Ok(listener) => Some(listener),
            Err(EndpointError::Bind { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse =>
            {
                tracing::warn!(
                    "metrics are not served: {}; retrying; stop that program, or use another address, or a range of ports \
                     such as {}",
                    in_use(&address),
                    address.as_range()
                );
                None
            }
            Err(error) => return Err(error),
        };
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("metrics recorder already installed; keeping the first");
        }
        let status = MetricsStatus { wanted: address, served: Arc::default() };
        if let Some(listener) = &listener {
            status.set(listener);
        }
        Ok(Self { handle, status, listener, denies: None, families: Vec::new() })
    }

    /// Adds families that are written at each scrape (exposition format 0.0.4), in the order in
    /// which they are added.
    #[must_use]
    pub fn with(mut self, families: impl Fn(&mut PacedText<'_>) + Send + Sync + 'static) -> Self {
        self.families.push(Box::new(families));
        self
    }

    /// Resets connections for which `denies` returns true.
    #[must_use]
    pub fn denying(self, denies: impl Fn(&Ingress) -> bool + Send + Sync + 'static) -> Self {
        Self { denies: Some(Box::new(denies)), ..self }
    }

    /// Returns the state of the endpoint, kept up to date.
    #[must_use]
    pub fn status(&self) -> MetricsStatus {
        self.status.clone()
    }

    /// Serves the metrics on threads of its own, until the process ends.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn serve(self) -> io::Result<()> {
        gauge!("tidegate_build_info", "version" => crate::version::VERSION, "commit" => crate::version::COMMIT)
            .set(1.0);
        metrics::describe_gauge!("tidegate_build_info", "Always 1; the labels identify the build.");
        let collector = Collector::default();
        collector.describe();
        let upkeep = self.handle.clone();
        std::thread::Builder::new().name("tidegate-upkeep".into()).spawn(move || {
            loop {
                std::thread::sleep(UPKEEP);
                upkeep.run_upkeep();
            }
        })?;
        let page = Page {
            handle: self.handle,
            collector,
            families: self.families,
            last: Mutex::default(),
            turn: Mutex::default(),
        };
        let page = Arc::new(page);
        let (status, listener, denies) = (self.status, self.listener, self.denies);
        // Opened here and not in the thread: the process may drop its privileges after this call,
        // and cannot open a netlink socket then.
        let peers = LocalPeers::new();
        if let Err(error) = &peers {
            tracing::warn!(%error, "metrics clients on this host share one limit; their users are unknown");
        }
        std::thread::Builder::new().name("tidegate-metrics".into()).spawn(move || {
            // On Linux, niceness is per thread and inherited by its child threads. An error only
            // leaves the priority as it is.
            let _ = rustix::process::nice(NICE);
            let listener = listener.unwrap_or_else(|| wait_for(&status));
            match Server::new(listener, denies, peers.ok(), page) {
                Ok(server) => server.run(),
                Err(error) => tracing::error!(%error, "metrics are not served"),
            }
        })?;
        Ok(())
    }
}

/// The intervals between attempts to bind a port in use.
struct Backoff(Duration);

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let next = (self.0 * 2).min(MAX_RETRY);
        Some(std::mem::replace(&mut self.0, next))
    }
}

/// Binds the configured address, with retries until that succeeds.
fn wait_for(status: &MetricsStatus) -> TcpListener {
    let mut backoff = Backoff(RETRY);
    loop {
        std::thread::sleep(backoff.next().unwrap_or(MAX_RETRY));
        match bind(status.wanted) {
            Ok(listener) => {
                status.set(&listener);
                let address = status.served().map(|address| address.to_string());
                tracing::info!(metrics = address, "metrics are served now; the port was in use");
                return listener;
            }
            Err(error) => tracing::debug!(%error, "metrics still not served"),
        }
    }
}

/// `address` with the program that uses it.
fn in_use(address: &MetricsAddress) -> String {
    let one = (address.first == address.last).then(|| SocketAddr::new(address.ip, address.first));
    match one {
        Some(one) => port_holders::in_use(one, Protocol::Tcp),
        None => format!("ports {}-{} on {} are in use", address.first, address.last, address.ip),
    }
}

fn bind(address: MetricsAddress) -> Result<TcpListener, EndpointError> {
    let mut last_error = None;
    for port in address.first..=address.last {
        match TcpListener::bind((address.ip, port)) {
            Ok(listener) => {
                let enabled = enable_stream_ingress(&listener, address.ip.is_ipv6());
                enabled.map_err(|source| EndpointError::Bind { address, source })?;
                if let Err(error) = accept_only_from_loopback(&listener, address.ip) {
                    tracing::debug!(%address, %error, "socket not bound to the loopback interface");
                }
                return Ok(listener);
            }
            Err(error) => last_error = Some(error),
        }
    }
    let source = last_error.unwrap_or_else(|| io::ErrorKind::InvalidInput.into());
    Err(EndpointError::Bind { address, source })
}

/// The source of the metrics page.
struct Page {
    handle: PrometheusHandle,
    collector: Collector,
    families: Vec<Families>,
    /// The last rendered page, and when rendering started.
    last: Mutex<Option<(Instant, Arc<str>)>>,
    /// Held by the thread that renders or sends.
    turn: Mutex<()>,
}

impl Page {
    /// Returns a page whose rendering started after this call.
    fn now(&self) -> Arc<str> {
        let requested = Instant::now();
        // Concurrent requests wait here for the page of the first request.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((begun, page)) = &*last
            && *begun >= requested
        {
            return Arc::clone(page);
        }
        let begun = Instant::now();
        let page: Arc<str> = {
            let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
            self.render().into()
        };
        *last = Some((begun, Arc::clone(&page)));
        page
    }

    /// Does a piece of work under the lock, then pauses for the same time.
    fn throttled<T>(&self, work: impl FnOnce() -> T) -> T {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let done = work();
        std::thread::sleep(begun.elapsed());
        done
    }

    /// Sends the page to `client`, a nonblocking socket.
    fn answer(&self, client: &TcpStream) -> io::Result<()> {
        let until = Instant::now() + RESPONSE_TIMEOUT;
        let text = self.now();
        self.send(client, http::head("200 OK", "", Some(text.len())).as_bytes(), until)?;
        self.send(client, text.as_bytes(), until)
    }

    /// Sends `bytes` in pieces, with the deadline `until`.
    fn send(&self, mut client: &TcpStream, bytes: &[u8], until: Instant) -> io::Result<()> {
        let timeout = Timespec::try_from(REQUEST_TIMEOUT).map_err(io::Error::other)?;
        let mut left = bytes;
        while !left.is_empty() {
            if Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let piece = &left[..left.len().min(PIECE)];
            match self.throttled(|| client.write(piece)) {
                Ok(sent) => left = &left[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Waits without the lock, so that other threads can send.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let room = poll(&mut [PollFd::new(client, PollFlags::OUT)], Some(&timeout));
                    if retry(room)? == Some(0) {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn render(&self) -> String {
        self.collector.collect();
        let mut text = self.handle.render();
        let mut paced = PacedText::new(&mut text);
        self.families.iter().for_each(|families| families(&mut paced));
        text
    }
}

/// Writes text, and pauses at intervals for as long as the writing took. Without pauses, a woken
/// event loop may have to wait until the thread on its core sleeps or has used up its time slice of
/// up to 3 ms (`sysctl_sched_base_slice`, kernel/sched/fair.c), regardless of the priority of that
/// thread. The pauses shorten this wait to a tenth.
pub struct PacedText<'a> {
    text: &'a mut String,
    begun: Instant,
    /// The length of the text at the last pause.
    paused_at: usize,
}

impl<'a> PacedText<'a> {
    /// The bytes of text between two pauses: about a hundred series, rendered in 50 us.
    const STRETCH: usize = 8 << 10;

    fn new(text: &'a mut String) -> Self {
        let paused_at = text.len();
        Self { text, begun: Instant::now(), paused_at }
    }
}

impl fmt::Write for PacedText<'_> {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        self.text.push_str(more);
        if self.text.len() - self.paused_at >= Self::STRETCH {
            std::thread::sleep(self.begun.elapsed());
            self.begun = Instant::now();
            self.paused_at = self.text.len();
        }
        Ok(())
    }
}

/// Returns the result of poll(2); `None` after a signal.
fn retry(polled: rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    match polled {
        Ok(ready) => Ok(Some(ready)),
        Err(Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_can_have_a_range_of_ports() {
        let one: MetricsAddress = "127.0.0.1:9464".parse().unwrap();
        assert_eq!((one.first, one.last), (9464, 9464));
        let many: MetricsAddress = "[::1]:9500-9599".parse().unwrap();
        assert_eq!((many.first, many.last), (9500, 9599));
        for bad in ["9464", "127.0.0.1", "127.0.0.1:9-8", "localhost:1", "127.0.0.1:1-x", ""] {
            assert!(bad.parse::<MetricsAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_free_port_of_a_range_is_bound() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = holder.local_addr().unwrap().port();
        let range: MetricsAddress =
            format!("127.0.0.1:{busy}-{}", busy.saturating_add(20)).parse().unwrap();
        assert_ne!(bind(range).unwrap().local_addr().unwrap().port(), busy);
        let only: MetricsAddress = format!("127.0.0.1:{busy}").parse().unwrap();
        assert!(bind(only).is_err());
        assert!(in_use(&only).starts_with(&format!("port {busy}/tcp on 127.0.0.1 is in use by ")));
    }

    #[test]
    fn retries_back_off_up_to_the_maximum() {
        let seconds: Vec<_> = Backoff(RETRY).take(8).map(|time| time.as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
    }
}
