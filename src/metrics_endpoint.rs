//! `GET /metrics`, for Prometheus.
//!
//! Plain blocking I/O on threads of its own, because the small docker-proxy binary, which has no
//! async runtime, serves it as well as the large one. Clients are bounded, and each holder of them
//! has a share ([`clients`]); a client has [`PATIENCE`] for its request, and [`ANSWER_TIME`] to
//! take the page. The page is written by one thread at a time, whose priority is low ([`NICE`]) and
//! who often rests, and those who came before it was begun all get the same. Pages are sent in
//! pieces ([`PIECE`]), one thread's at a time as well, and after each as long is waited as it took:
//! a storm of scrapes has half of a core at most. So whatever happens here, the data plane hardly
//! notices.
//!
//! A port that is in use is no reason not to start: any user of the host can take one. It is tried
//! again ([`Backoff`]) for as long as the process runs.

mod clients;
mod http;
mod server;

use crate::port_error;
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
use tidegate_model::Protocol;
use tidegate_netns::LocalPeers;
use tidegate_proxy::{Fill, GatewayAcl, PortSnapshot, describe};
use tidegate_reactor::enable_stream_ingress;

/// How long a client may take over its request, and over reading anything of the page.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a client may take over reading the page. Prometheus gives up after 10 s unless told
/// otherwise (`scrape_timeout`).
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// When a port in use is tried again: after the first time, which doubles, up to the second.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// How often histograms are folded when nobody scrapes, so that they do not pile up.
const UPKEEP: Duration = Duration::from_secs(5);

/// Niceness of the threads that let clients in and write pages: beside a loop at work they have a
/// tenth of its time (sched(7)).
const NICE: i32 = 10;

/// Bytes of a page that are sent at a time: some 50 us.
const PIECE: usize = 256 << 10;

/// Ports behind the first one in the range that is suggested where one is in use.
const RANGE: u16 = 10;

/// Where to serve: an address and a port, or the first free port of a range (for the many
/// docker-proxies of one host, which share one environment).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetricsAddress {
    ip: IpAddr,
    first: u16,
    last: u16,
}

/// An address that is not understood.
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
    /// The same with the ports behind it, as an example.
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

/// Why there is no endpoint. A port in use is none: [`Recorder::install`].
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is not of this host, or not allowed.
    #[error("metrics address {address}: {source}")]
    Bind {
        /// Where it should have been.
        address: MetricsAddress,
        /// What the system says of the last port tried.
        source: io::Error,
    },
}

/// Whether metrics are served, and where.
#[derive(Clone, Debug)]
pub struct MetricsStatus {
    wanted: MetricsAddress,
    served: Arc<OnceLock<SocketAddr>>,
}

impl MetricsStatus {
    /// Where they were asked for: an address and a port, or a range of ports.
    #[must_use]
    pub fn wanted(&self) -> MetricsAddress {
        self.wanted
    }

    /// They are served by `listener`.
    fn set(&self, listener: &TcpListener) {
        if let Ok(address) = listener.local_addr() {
            // Nobody else sets it.
            let _ = self.served.set(address);
        }
    }

    /// Where they are served; `None` while the port is in use by others.
    #[must_use]
    pub fn served(&self) -> Option<SocketAddr> {
        self.served.get().copied()
    }
}

/// The recorder behind the `metrics` facade; make it before anything resolves its instruments.
pub struct Recorder {
    handle: PrometheusHandle,
    status: MetricsStatus,
    /// Nothing while the port is in use.
    listener: Option<TcpListener>,
    acl: GatewayAcl,
    more: Vec<Families>,
}

/// Writes families of series in the text format of Prometheus.
type Families = Box<dyn Fn(&mut String) + Send + Sync>;

impl Recorder {
    /// Binds `address` and takes the facade's place. If the port, or each port of the range, is in
    /// use, that is logged with its remedy, and [`Self::serve`] tries again.
    ///
    /// # Errors
    /// [`EndpointError`]; nothing is left open then.
    pub fn install(address: MetricsAddress) -> Result<Self, EndpointError> {
        let listener = match bind(address) {
            Ok(listener) => Some(listener),
            Err(EndpointError::Bind { source, .. })
                if source.kind() == io::ErrorKind::AddrInUse =>
            {
                tracing::warn!(
                    "metrics are not served: {}; trying again until it is free, or give another address, or a range of ports \
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
            tracing::warn!("metrics were set up twice; the first stay");
        }
        let status = MetricsStatus { wanted: address, served: Arc::default() };
        if let Some(listener) = &listener {
            status.set(listener);
        }
        Ok(Self { handle, status, listener, acl: GatewayAcl::default(), more: Vec::new() })
    }

    /// With the families that `families` writes at each scrape (exposition format 0.0.4).
    #[must_use]
    pub fn with(mut self, families: impl Fn(&mut String) + Send + Sync + 'static) -> Self {
        self.more.push(Box::new(families));
        self
    }

    /// Answers only clients that `acl` does not deny.
    #[must_use]
    pub fn controlled_by(self, acl: GatewayAcl) -> Self {
        Self { acl, ..self }
    }

    /// Whether it answers, and where, now and later.
    #[must_use]
    pub fn status(&self) -> MetricsStatus {
        self.status.clone()
    }

    /// Answers scrapes with the figures of the published ports, which `ports` tells, and of the
    /// process, on threads of its own, until the process ends.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn serve(
        self,
        ports: impl Fn() -> (Vec<PortSnapshot>, Fill) + Send + Sync + 'static,
    ) -> io::Result<()> {
        gauge!("tidegate_build_info", "version" => crate::version::VERSION, "commit" => crate::version::COMMIT)
            .set(1.0);
        metrics::describe_gauge!("tidegate_build_info", "Always 1; its labels say what was built.");
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
            ports: Box::new(ports),
            collector,
            more: self.more,
            last: Mutex::default(),
            turn: Mutex::default(),
        };
        let page = Arc::new(page);
        let (status, listener, acl) = (self.status, self.listener, self.acl);
        // Not in the thread: a process that confines itself when this returns may open no netlink
        // socket then.
        let peers = LocalPeers::new();
        if let Err(error) = &peers {
            tracing::warn!(%error, "all metrics clients on this host share one limit: their users are not known");
        }
        std::thread::Builder::new().name("tidegate-metrics".into()).spawn(move || {
            // On Linux it is this thread's, and that of those which it starts. That it is refused
            // changes nothing but that.
            let _ = rustix::process::nice(NICE);
            let listener = listener.unwrap_or_else(|| wait_for(&status));
            match Server::new(listener, acl, peers.ok(), page) {
                Ok(server) => server.run(),
                Err(error) => tracing::error!(%error, "metrics are not served"),
            }
        })?;
        Ok(())
    }
}

/// When a port in use is tried again. Pure.
struct Backoff(Duration);

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let next = (self.0 * 2).min(LONGEST_RETRY);
        Some(std::mem::replace(&mut self.0, next))
    }
}

/// Tries to bind the address that is wanted until that succeeds.
fn wait_for(status: &MetricsStatus) -> TcpListener {
    let mut backoff = Backoff(RETRY);
    loop {
        std::thread::sleep(backoff.next().unwrap_or(LONGEST_RETRY));
        match bind(status.wanted) {
            Ok(listener) => {
                status.set(&listener);
                let address = status.served().map(|address| address.to_string());
                tracing::info!(metrics = address, "metrics are served now; the port was in use");
                return listener;
            }
            Err(error) => tracing::debug!(%error, "metrics are still not served"),
        }
    }
}

/// `address` and by whom it is in use.
fn in_use(address: &MetricsAddress) -> String {
    let one = (address.first == address.last).then(|| SocketAddr::new(address.ip, address.first));
    match one {
        Some(one) => port_error::in_use(one, Protocol::Tcp),
        None => format!("ports {}-{} on {} are in use", address.first, address.last, address.ip),
    }
}

fn bind(address: MetricsAddress) -> Result<TcpListener, EndpointError> {
    let mut last_error = None;
    for port in address.first..=address.last {
        match TcpListener::bind((address.ip, port)) {
            Ok(listener) => {
                let told = enable_stream_ingress(&listener, address.ip.is_ipv6());
                told.map_err(|source| EndpointError::Bind { address, source })?;
                return Ok(listener);
            }
            Err(error) => last_error = Some(error),
        }
    }
    let source = last_error.unwrap_or_else(|| io::ErrorKind::InvalidInput.into());
    Err(EndpointError::Bind { address, source })
}

/// What is on the page.
struct Page {
    handle: PrometheusHandle,
    ports: Box<dyn Fn() -> (Vec<PortSnapshot>, Fill) + Send + Sync>,
    collector: Collector,
    more: Vec<Families>,
    /// The page that was written last for several, and when it was begun.
    last: Mutex<Option<(Instant, Arc<str>)>>,
    /// Whose turn it is to work.
    turn: Mutex<()>,
}

impl Page {
    /// The page as it is at this moment, or a moment later.
    fn now(&self) -> Arc<str> {
        let asked = Instant::now();
        // While others wait for it.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((begun, page)) = &*last
            && *begun >= asked
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

    /// Does a piece of work when nobody else does, and rests for as long as it took.
    fn at_ones_turn<T>(&self, work: impl FnOnce() -> T) -> T {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let done = work();
        std::thread::sleep(begun.elapsed());
        done
    }

    /// Sends the page to `client`, whose socket does not block.
    fn answer(&self, client: &TcpStream) -> io::Result<()> {
        let until = Instant::now() + ANSWER_TIME;
        let text = self.now();
        self.send(client, http::head("200 OK", "", Some(text.len())).as_bytes(), until)?;
        self.send(client, text.as_bytes(), until)
    }

    /// Sends `bytes` piece by piece, until `until` at most.
    fn send(&self, mut client: &TcpStream, bytes: &[u8], until: Instant) -> io::Result<()> {
        let patience = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
        let mut left = bytes;
        while !left.is_empty() {
            if Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let piece = &left[..left.len().min(PIECE)];
            match self.at_ones_turn(|| client.write(piece)) {
                Ok(sent) => left = &left[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Not while others wait for their turn.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let room = poll(&mut [PollFd::new(client, PollFlags::OUT)], Some(&patience));
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
        // Writing to a String does not fail.
        let (ports, fill) = (self.ports)();
        let _ =
            describe(&ports, &mut Gently::new(&mut text)).and_then(|()| fill.describe(&mut text));
        self.more.iter().for_each(|families| families(&mut text));
        text
    }
}

/// Writes, and rests every now and then for as long as it has written. A loop that is woken may
/// have to wait until whoever has its core sleeps or its time is over, however low its priority is:
/// 3 ms (`sysctl_sched_base_slice`, kernel/sched/fair.c), where this is over in a tenth of that.
struct Gently<'a> {
    text: &'a mut String,
    begun: Instant,
    /// How long the text was when it rested last.
    rested: usize,
}

impl<'a> Gently<'a> {
    /// Bytes of text between two rests: a hundred series, some 50 us.
    const STRETCH: usize = 8 << 10;

    fn new(text: &'a mut String) -> Self {
        let rested = text.len();
        Self { text, begun: Instant::now(), rested }
    }
}

impl fmt::Write for Gently<'_> {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        self.text.push_str(more);
        if self.text.len() - self.rested >= Self::STRETCH {
            std::thread::sleep(self.begun.elapsed());
            self.begun = Instant::now();
            self.rested = self.text.len();
        }
        Ok(())
    }
}

/// What poll(2) has said; nothing if a signal came.
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
    fn an_address_may_be_a_range_of_ports() {
        let one: MetricsAddress = "127.0.0.1:9464".parse().unwrap();
        assert_eq!((one.first, one.last), (9464, 9464));
        let many: MetricsAddress = "[::1]:9500-9599".parse().unwrap();
        assert_eq!((many.first, many.last), (9500, 9599));
        for bad in ["9464", "127.0.0.1", "127.0.0.1:9-8", "localhost:1", "127.0.0.1:1-x", ""] {
            assert!(bad.parse::<MetricsAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_free_port_of_a_range_is_taken_and_a_full_range_is_told() {
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
    fn a_port_in_use_is_tried_again_after_ever_longer_and_bounded() {
        let seconds: Vec<_> = Backoff(RETRY).take(8).map(|time| time.as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 30, 30, 30]);
    }
}
