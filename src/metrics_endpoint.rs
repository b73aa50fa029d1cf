//! `GET /metrics`, for Prometheus.
//!
//! A scrape is one short request every few seconds, so this is a thread that answers with plain blocking I/O, and
//! it serves the small docker-proxy binary, which has no async runtime, as well as the large one. It is bounded:
//! [`MAX_CLIENTS`] at a time, [`MAX_REQUEST`] bytes of request, [`PATIENCE`] for a slow client. The page is written by one
//! thread at a time, whose priority is low ([`NICE`]) and who often rests, and those who came before it was begun all get the same. Pages are
//! sent in pieces ([`PIECE`]), one thread's at a time as well, and after each as long is waited as it took: a storm of scrapes has half of a core at
//! most. So whatever happens here, the data plane hardly notices.

use metrics::gauge;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use metrics_process::Collector;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tidegate_model::{Ingress, canonical};
use tidegate_proxy::{Fill, GatewayAcl, PortSnapshot, describe};
use tidegate_reactor::{enable_stream_ingress, stream_ingress};

/// Scrapes answered at the same time; more are told 503.
const MAX_CLIENTS: usize = 16;

/// The most that a request may be, in bytes, headers included.
const MAX_REQUEST: usize = 8 << 10;

/// How long a client may take over its request, and over reading the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often histograms are folded when nobody scrapes, so that they do not pile up.
const UPKEEP: Duration = Duration::from_secs(5);

/// Niceness of the threads that let clients in and write pages: beside a loop at work they have a tenth of its time (sched(7)).
const NICE: i32 = 10;

/// Bytes of a page that are sent at a time: some 50 us.
const PIECE: usize = 256 << 10;

/// Where to serve: an address and a port, or the first free port of a range (for the many docker-proxies of one
/// host, which share one environment).
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

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The port, or every port of the range, is taken.
    #[error("metrics address {ip}:{ports}: {source}", ip = .address.ip, ports = ports(.address))]
    Bind {
        /// Where it should have been.
        address: MetricsAddress,
        /// What the system says of the last port tried.
        source: io::Error,
    },
}

fn ports(address: &MetricsAddress) -> String {
    if address.first == address.last {
        address.first.to_string()
    } else {
        format!("{}-{}", address.first, address.last)
    }
}

/// The recorder behind the `metrics` facade; make it before anything resolves its instruments.
pub struct Recorder {
    handle: PrometheusHandle,
    listener: TcpListener,
    acl: GatewayAcl,
    more: Vec<Families>,
}

/// Writes families of series in the text format of Prometheus.
type Families = Box<dyn Fn(&mut String) + Send + Sync>;

impl Recorder {
    /// Binds `address` and takes the facade's place.
    ///
    /// # Errors
    /// [`EndpointError`]; nothing is left open then.
    pub fn install(address: MetricsAddress) -> Result<Self, EndpointError> {
        let listener = bind(address)?;
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("metrics were set up twice; the first stay");
        }
        Ok(Self { handle, listener, acl: GatewayAcl::default(), more: Vec::new() })
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

    /// Where it answers.
    ///
    /// # Errors
    /// What getsockname(2) says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers scrapes with the figures of the published ports, which `ports` tells, and of the process, on threads of its own, until the process
    /// ends.
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
        let clients = Arc::new(AtomicUsize::new(0));
        std::thread::Builder::new().name("tidegate-metrics".into()).spawn(move || {
            // On Linux it is this thread's, and that of those which it starts. That it is refused changes nothing but that.
            let _ = rustix::process::nice(NICE);
            loop {
                match self.listener.accept() {
                    // Before a byte is read, and before it takes a place.
                    Ok((client, address)) if is_denied(&self.acl, &client, address) => reset(&client),
                    Ok((client, _)) => admit(client, &page, &clients),
                    // Out of descriptors: the client waits in the queue meanwhile.
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        })?;
        Ok(())
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

    /// Sends `bytes` piece by piece.
    fn send(&self, mut client: &TcpStream, bytes: &[u8]) -> io::Result<()> {
        client.set_nonblocking(true)?;
        let patience = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
        let mut left = bytes;
        while !left.is_empty() {
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
        let _ = describe(&ports, &mut Gently::new(&mut text)).and_then(|()| fill.describe(&mut text));
        self.more.iter().for_each(|families| families(&mut text));
        text
    }
}

/// Writes, and rests every now and then for as long as it has written. A loop that is woken may have to wait until whoever has its core sleeps or its time
/// is over, however low its priority is: 3 ms (`sysctl_sched_base_slice`, kernel/sched/fair.c), where this is over in a tenth of that.
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

/// Whether `acl` denies `client`, which came from `address`.
fn is_denied(acl: &GatewayAcl, client: &TcpStream, address: SocketAddr) -> bool {
    if acl.is_empty() {
        return false;
    }
    let ingress = stream_ingress(client, address.is_ipv6());
    ingress.is_err()
        || ingress.is_ok_and(|ingress| {
            acl.denies(&Ingress {
                client: canonical(address),
                destination: Some(ingress.local),
                to_group: false,
                interface: ingress.interface,
                handshake: true,
            })
        })
}

/// Has the client see a reset when the connection is closed.
fn reset(client: &TcpStream) {
    let _ = socket2::SockRef::from(client).set_linger(Some(Duration::ZERO));
}

/// Gives `client` a thread, if one is left.
fn admit(client: TcpStream, page: &Arc<Page>, clients: &Arc<AtomicUsize>) {
    if clients.fetch_add(1, Ordering::Relaxed) >= MAX_CLIENTS {
        clients.fetch_sub(1, Ordering::Relaxed);
        let _ = respond(&client, "503 Service Unavailable", "too many scrapes at once\n");
        return;
    }
    let (page, at_work) = (Arc::clone(page), Arc::clone(clients));
    let answer = move || {
        // A client that goes away, or dawdles, is its own loss.
        let _ = answer(&client, &page);
        at_work.fetch_sub(1, Ordering::Relaxed);
    };
    if std::thread::Builder::new().name("tidegate-scrape".into()).spawn(answer).is_err() {
        clients.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(client: &TcpStream, page: &Page) -> io::Result<()> {
    client.set_write_timeout(Some(PATIENCE))?;
    match request_path(client)? {
        Some(path) if path == "/metrics" => {
            let text = page.now();
            let head = head("200 OK", text.len());
            page.send(client, head.as_bytes())?;
            page.send(client, text.as_bytes())
        }
        Some(path) if path == "/" => respond(client, "200 OK", "tidegate's metrics are at /metrics\n"),
        Some(_) => respond(client, "404 Not Found", "there is only /metrics\n"),
        None => respond(client, "400 Bad Request", "that was not a GET request\n"),
    }
}

/// Reads a request and returns the path of a GET; `None` for anything else.
fn request_path(mut client: &TcpStream) -> io::Result<Option<String>> {
    let deadline = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        let left = deadline.checked_duration_since(Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        client.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let read = client.read(&mut chunk)?;
        request.extend_from_slice(&chunk[..read]);
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(&request) {
            Ok(httparse::Status::Complete(_)) if parsed.method == Some("GET") => {
                let path = parsed.path.unwrap_or_default();
                return Ok(Some(path.split('?').next().unwrap_or_default().to_owned()));
            }
            Ok(httparse::Status::Partial) if read > 0 && request.len() < MAX_REQUEST => {}
            _ => return Ok(None),
        }
    }
}

fn respond(mut client: &TcpStream, status: &str, body: &str) -> io::Result<()> {
    client.write_all(head(status, body.len()).as_bytes())?;
    client.write_all(body.as_bytes())
}

fn head(status: &str, length: usize) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n"
    )
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
        let range: MetricsAddress = format!("127.0.0.1:{busy}-{}", busy.saturating_add(20)).parse().unwrap();
        assert_ne!(bind(range).unwrap().local_addr().unwrap().port(), busy);
        let only: MetricsAddress = format!("127.0.0.1:{busy}").parse().unwrap();
        let error = bind(only).unwrap_err().to_string();
        assert!(error.starts_with(&format!("metrics address 127.0.0.1:{busy}: ")), "{error}");
    }
}
