//! Ports that questions go out from.
//!
//! Who wants to forge an answer has to guess number and port (RFC 5452 section 4.5). Numbers are random. A port is the kernel's choice, and another one after
//! [`USES`] questions or [`LIFE`]: so few descriptors serve many questions at once, and no port is there for long.

use crate::answer::{Asked, Reading};
use crate::cache::Key;
use crate::message::{Bits, question};
use metrics::Counter;
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_netns::{Namespace, NamespaceId};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// How many questions go out from a port, and for how long it takes new ones.
const USES: usize = 32;
const LIFE: Duration = Duration::from_secs(5);
/// Servers with a port in waiting.
const SERVERS: usize = 256;
/// The largest datagram that is an answer: more than we ask for.
const LONGEST: usize = 4096;

type Heard = mpsc::Sender<(SocketAddr, Reading)>;

/// The port that the next question to each server goes out from.
pub(super) struct Ports {
    next: Mutex<BTreeMap<(SocketAddr, NamespaceId), Arc<Port>>>,
    strangers: Counter,
}

struct Port {
    shared: Arc<Shared>,
    reader: AbortHandle,
    made: Instant,
    uses: AtomicUsize,
}

struct Shared {
    server: SocketAddr,
    socket: UdpSocket,
    waiting: Mutex<HashMap<u16, (Asked, Heard)>>,
    strangers: Counter,
}

/// A question that has been asked. Nobody listens for its answer any more when it is dropped.
pub(super) struct Outstanding {
    port: Arc<Port>,
    id: u16,
    bits: Bits,
    message: Vec<u8>,
    asked: Instant,
}

impl Ports {
    /// None yet. `strangers` counts datagrams that answer no question.
    pub(super) fn new(strangers: Counter) -> Self {
        Self { next: Mutex::default(), strangers }
    }

    /// Prepares a question to `server`. What comes back goes to `heard`.
    pub(super) fn ask(
        &self,
        way: &Namespace,
        server: SocketAddr,
        key: &Key,
        bits: Bits,
        heard: Heard,
    ) -> io::Result<Outstanding> {
        let now = super::now();
        let port = self.port(way, server, now)?;
        let id = port.shared.expect(key, heard)?;
        let mut message = Vec::with_capacity(key.name.len() + 32);
        question(id, &key.name, key.kind, bits, &mut message);
        Ok(Outstanding { port, id, bits, message, asked: now })
    }

    fn port(&self, way: &Namespace, server: SocketAddr, now: Instant) -> io::Result<Arc<Port>> {
        let mut ports = lock(&self.next);
        let known = ports.get(&(server, way.id()));
        if let Some(port) = known {
            let young = now.saturating_duration_since(port.made) < LIFE;
            if young && port.uses.fetch_add(1, Ordering::Relaxed) < USES {
                return Ok(Arc::clone(port));
            }
        }
        let port = match Port::open(way, server, self.strangers.clone(), now) {
            Ok(port) => Arc::new(port),
            // Out of descriptors: an old port is better than none.
            Err(error) => return known.cloned().ok_or(error),
        };
        if ports.len() >= SERVERS {
            ports.clear();
        }
        ports.insert((server, way.id()), Arc::clone(&port));
        Ok(port)
    }
}

impl Port {
    fn open(way: &Namespace, server: SocketAddr, strangers: Counter, now: Instant) -> io::Result<Self> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = way.with(|| std::net::UdpSocket::bind(any))??;
        socket.set_nonblocking(true)?;
        // From then on the kernel lets nobody else's datagrams in, and tells of a closed port.
        socket.connect(server)?;
        let socket = UdpSocket::from_std(socket)?;
        let shared = Arc::new(Shared { server, socket, waiting: Mutex::default(), strangers });
        let reader = tokio::spawn(Arc::clone(&shared).read()).abort_handle();
        Ok(Self { shared, reader, made: now, uses: AtomicUsize::new(1) })
    }
}

/// With the last question that went out from it, and not before another port has taken its place.
impl Drop for Port {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Shared {
    fn expect(&self, key: &Key, heard: Heard) -> io::Result<u16> {
        let mut waiting = lock(&self.waiting);
        loop {
            let mut random = [0; 2];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let id = u16::from_ne_bytes(random);
            if let Entry::Vacant(place) = waiting.entry(id) {
                let asked = Asked { id, name: key.name.clone(), kind: key.kind };
                place.insert((asked, heard));
                return Ok(id);
            }
        }
    }

    async fn read(self: Arc<Self>) {
        let mut buffer = vec![0; LONGEST];
        loop {
            match self.socket.recv(&mut buffer).await {
                Ok(length) => self.hear(&buffer[..length]),
                // Nobody is at that port: true of all that was asked from this one.
                Err(error) if is_refusal(&error) => self.tell_all(),
                Err(error) => {
                    tracing::debug!(server = %self.server, %error, "receive from a DNS server");
                    self.tell_all();
                }
            }
        }
    }

    fn hear(&self, message: &[u8]) {
        let waiting = lock(&self.waiting);
        let id = crate::message::short(message, 0);
        let Some((asked, heard)) = id.and_then(|id| waiting.get(&id)) else {
            return self.strangers.increment(1);
        };
        match asked.read(message) {
            Reading::Other => self.strangers.increment(1),
            // Who does not read has an answer already.
            reading => drop(heard.try_send((self.server, reading))),
        }
    }

    fn tell_all(&self) {
        for (_, heard) in lock(&self.waiting).values() {
            let _ = heard.try_send((self.server, Reading::Unreachable));
        }
    }
}

impl Outstanding {
    pub(super) fn server(&self) -> SocketAddr {
        self.port.shared.server
    }

    pub(super) fn bits(&self) -> Bits {
        self.bits
    }

    pub(super) fn asked(&self) -> Instant {
        self.asked
    }

    /// Sends it, for the first time or again. Whether there was a way.
    pub(super) fn send(&self) -> bool {
        // Not by the runtime, which has not heard yet that a new socket has room.
        let send = || rustix::net::send(&self.port.shared.socket, &self.message, SendFlags::DONTWAIT);
        match send() {
            Ok(_) => true,
            // Of an earlier datagram.
            Err(Errno::CONNREFUSED) => {
                self.port.shared.tell_all();
                send().is_ok()
            }
            // A full buffer loses datagrams, as networks do.
            Err(error) => error == Errno::AGAIN,
        }
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        lock(&self.port.shared.waiting).remove(&self.id);
    }
}

fn is_refusal(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in there holds after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
