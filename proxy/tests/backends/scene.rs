//! The upstream of the tests, backends, and what a test observes of a published port.

use socket2::{Domain, SockRef, Socket, Type};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_model::Protocol;
use tidegate_proxy::{
    BackendId, DialFailure, Engine, Flow, Listener, Opened, PortOptions, PortSnapshot, Refusal,
    Settings, Upstream, socket,
};

/// The timeout of operations that should be immediate, with a margin for a busy machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// A short hedge interval.
pub(crate) const HEDGE: Duration = Duration::from_millis(20);

/// An address without a listener.
pub(crate) const CLOSED: SocketAddr = loopback([127, 9, 9, 9], 9);

/// An address for which connect(2) itself fails.
pub(crate) const NO_ROUTE: SocketAddr = loopback([255, 255, 255, 255], 9);

const fn loopback([a, b, c, d]: [u8; 4], port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port)
}

/// A call of the proxy to the upstream, with its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Opened(BackendId),
    Connected(BackendId),
    Failed(BackendId, DialFailure),
}

/// Blocks the loop in [`Upstream::open`] until a test releases it.
struct Gate {
    entered: mpsc::Sender<()>,
    release: mpsc::Receiver<()>,
}

/// An upstream with several backends, identified by index. It dials them in order, starting
/// at `first` of the flow.
pub(crate) struct Balancer {
    backends: Vec<SocketAddr>,
    hedge_after: Option<Duration>,
    first: fn(&Flow) -> usize,
    unavailable: Mutex<Vec<BackendId>>,
    events: Mutex<Vec<Event>>,
    leases: Arc<AtomicUsize>,
    gate: Mutex<Option<Gate>>,
}

struct CountedLease(Arc<AtomicUsize>);

impl Drop for CountedLease {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Balancer {
    pub(crate) fn new(backends: &[SocketAddr], hedge_after: Option<Duration>) -> Self {
        Self {
            backends: backends.to_vec(),
            hedge_after,
            first: |_| 0,
            unavailable: Mutex::default(),
            events: Mutex::default(),
            leases: Arc::default(),
            gate: Mutex::default(),
        }
    }

    pub(crate) fn starting_at(self, first: fn(&Flow) -> usize) -> Self {
        Self { first, ..self }
    }

    /// Takes backend `id` out of service.
    pub(crate) fn remove(&self, id: BackendId) {
        self.unavailable.lock().unwrap().push(id);
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    pub(crate) fn count(&self, which: impl Fn(&Event) -> bool) -> usize {
        self.events().iter().filter(|event| which(event)).count()
    }

    /// Waits until `event` has occurred.
    #[track_caller]
    pub(crate) fn wait_for(&self, event: Event) {
        assert!(
            eventually(|| self.events().contains(&event)),
            "no {event:?}, only {:?}",
            self.events()
        );
    }

    /// Number of sockets whose lease is held.
    pub(crate) fn leases(&self) -> usize {
        self.leases.load(Ordering::SeqCst)
    }

    /// Makes the next [`Upstream::open`] block its loop and then fail. The receiver reports that it
    /// is blocked, and the sender releases it.
    pub(crate) fn block_next_open(&self) -> (mpsc::Receiver<()>, mpsc::Sender<()>) {
        let (entered, is_entered) = mpsc::channel();
        let (releaser, release) = mpsc::channel();
        *self.gate.lock().unwrap() = Some(Gate { entered, release });
        (is_entered, releaser)
    }

    fn dial(&self, flow: &Flow, id: BackendId) -> io::Result<Opened> {
        let to = self.backends[id as usize];
        let socket = socket(flow.protocol, to.ip())?;
        match rustix::net::connect(&socket, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => {
                // The next call must return another backend.
                self.remove(id);
                return Err(error.into());
            }
        }
        self.events.lock().unwrap().push(Event::Opened(id));
        self.leases.fetch_add(1, Ordering::SeqCst);
        let lease = Some(Box::new(CountedLease(Arc::clone(&self.leases))) as _);
        Ok(Opened { socket, lease, backend: Some(id) })
    }

    fn choose(&self, flow: &Flow, tried: &[BackendId]) -> Option<BackendId> {
        let count = self.backends.len();
        let first = (self.first)(flow);
        let mut ids = (first..first + count).map(|index| (index % count) as BackendId);
        ids.find(|id| !tried.contains(id) && self.is_available(*id))
    }
}

impl Upstream for Balancer {
    fn open(&self, flow: &Flow) -> io::Result<Opened> {
        let gate = self.gate.lock().unwrap().take();
        if let Some(Gate { entered, release }) = gate {
            entered.send(()).unwrap();
            release.recv().unwrap();
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        self.dial(flow, self.choose(flow, &[]).ok_or(io::ErrorKind::ConnectionRefused)?)
    }

    fn open_other(&self, flow: &Flow, tried: &[BackendId]) -> Option<io::Result<Opened>> {
        Some(self.dial(flow, self.choose(flow, tried)?))
    }

    fn hedge_after(&self) -> Option<Duration> {
        self.hedge_after
    }

    fn connected(&self, backend: BackendId) {
        self.events.lock().unwrap().push(Event::Connected(backend));
    }

    fn failed(&self, backend: BackendId, why: DialFailure) {
        self.events.lock().unwrap().push(Event::Failed(backend, why));
    }

    fn is_available(&self, backend: BackendId) -> bool {
        !self.unavailable.lock().unwrap().contains(&backend)
    }
}

/// A published port of an engine with one loop.
pub(crate) struct Scene {
    pub(crate) engine: Engine,
    pub(crate) port: SocketAddr,
    pub(crate) upstream: Arc<Balancer>,
    /// Free descriptors before the first flow.
    free: usize,
}

impl Scene {
    pub(crate) fn tcp(upstream: Balancer) -> Self {
        Self::with(Protocol::Tcp, upstream, |_, _| {})
    }

    pub(crate) fn with(
        protocol: Protocol,
        upstream: Balancer,
        adjust: impl FnOnce(&mut Settings, &mut PortOptions),
    ) -> Self {
        let upstream = Arc::new(upstream);
        let mut settings = Settings { workers: 1, ..Settings::default() };
        let mut options = PortOptions::new(Arc::clone(&upstream) as Arc<dyn Upstream>);
        adjust(&mut settings, &mut options);
        let engine = Engine::new(settings);
        let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into(), protocol).unwrap();
        let port = listener.label().address();
        engine.publish(vec![(listener, 0)], &Arc::new(options)).unwrap();
        let free = engine.descriptors_left();
        Self { engine, port, upstream, free }
    }

    #[track_caller]
    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.port).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    pub(crate) fn snapshot(&self) -> PortSnapshot {
        self.engine.snapshot().remove(0)
    }

    pub(crate) fn refused(&self, refusal: Refusal) -> u64 {
        self.snapshot().refused[refusal as usize]
    }

    /// Waits until all flows have ended, and asserts that they have left nothing.
    #[track_caller]
    pub(crate) fn assert_idle(&self) {
        let is_idle = || {
            (self.snapshot().live, self.upstream.leases(), self.engine.descriptors_left())
                == (0, 0, self.free)
        };
        assert!(
            eventually(is_idle),
            "{} flows, {} leases, {} of {} descriptors",
            self.snapshot().live,
            self.upstream.leases(),
            self.engine.descriptors_left(),
            self.free
        );
    }
}

/// A listener that does not complete connections, until it accepts one.
pub(crate) struct Hanging {
    listener: TcpListener,
    /// Fills the backlog.
    _queued: TcpStream,
}

impl Hanging {
    pub(crate) fn new() -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        socket.listen(0).unwrap();
        let listener = TcpListener::from(socket);
        SockRef::from(&listener).set_read_timeout(Some(TIMEOUT)).unwrap();
        let queued = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        Self { listener, _queued: queued }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Makes room in the backlog.
    pub(crate) fn unblock(&self) {
        self.listener.accept().unwrap();
    }

    /// Accepts the next connection, which the kernel of the peer may retry only after a second.
    pub(crate) fn accept(&self) -> TcpStream {
        self.listener.accept().unwrap().0
    }

    /// Whether a connection waits to be accepted.
    pub(crate) fn has_waiting(&self) -> bool {
        self.listener.set_nonblocking(true).unwrap();
        let waiting = self.listener.accept().is_ok();
        self.listener.set_nonblocking(false).unwrap();
        waiting
    }
}

/// Starts a server that returns every byte. It ends with the process.
pub(crate) fn echo() -> SocketAddr {
    serve(|mut stream| {
        let mut reader = stream.try_clone().unwrap();
        // A reset by a test is no failure of the server.
        let _ = io::copy(&mut reader, &mut stream);
        let _ = stream.shutdown(Shutdown::Write);
    })
}

/// Starts a server that calls `each` with every connection. It ends with the process.
pub(crate) fn serve(each: impl Fn(TcpStream) + Copy + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            thread::spawn(move || each(stream));
        }
    });
    addr
}

/// Sends `request`, half-closes, and returns the complete response.
#[track_caller]
pub(crate) fn ask(mut stream: &TcpStream, request: &[u8]) -> Vec<u8> {
    stream.write_all(request).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).unwrap();
    response
}

/// Waits until the connection is reset without payload.
#[track_caller]
pub(crate) fn assert_reset(mut stream: &TcpStream) {
    let error = stream.read(&mut [0]).expect_err("the connection is reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

/// Closes the connection with a reset.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Number of connects to `to` that are in progress.
pub(crate) fn dials(to: SocketAddr) -> usize {
    const SYN_SENT: &str = "02";
    sockets(to).filter(|state| state == SYN_SENT).count()
}

/// Number of sockets connected to `to` that are not closed on this side.
pub(crate) fn connections(to: SocketAddr) -> usize {
    const ESTABLISHED: &str = "01";
    const CLOSE_WAIT: &str = "08";
    sockets(to).filter(|state| [ESTABLISHED, CLOSE_WAIT].contains(&&**state)).count()
}

/// The states of all sockets with the peer `to`, as in include/net/tcp_states.h.
fn sockets(to: SocketAddr) -> impl Iterator<Item = String> {
    let SocketAddr::V4(to) = to else { panic!("{to} is not an IPv4 address") };
    let peer = format!("{:08X}:{:04X}", u32::from_ne_bytes(to.ip().octets()), to.port());
    let table = fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    let states = table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(2);
        (fields.next()? == peer).then(|| fields.next().unwrap_or_default().to_owned())
    });
    states.collect::<Vec<_>>().into_iter()
}

/// Waits until `ready` returns true.
#[track_caller]
pub(crate) fn wait_until(condition: &str, ready: impl FnMut() -> bool) {
    assert!(eventually(ready), "not within {TIMEOUT:?}: {condition}");
}

fn eventually(mut ready: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + TIMEOUT;
    while !ready() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}
