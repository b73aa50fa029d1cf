//! Source ports of upstream queries.
//!
//! A blind attacker has to guess the source port, the query ID and the case of the letters of the
//! name (RFC 5452 section 4, draft-vixie-dnsext-dns0x20-00). All three are random; docs/dns.md has
//! the arithmetic.
//!
//! - A source port serves one query and is closed with it. The kernel chooses it at random from
//!   `net.ipv4.ip_local_port_range` (`udp_lib_get_port`).
//! - The socket is connected: the kernel drops datagrams from other addresses and ports.
//! - A datagram that arrives on a bridge of a network is dropped unless the server is on a network:
//!   a container can forge any source address if no guard at its bridge port prevents that.
//! - After [`MAX_MISMATCHES`] mismatched datagrams the port is closed, because an attacker has
//!   found it and is guessing.
//!
//! The number of sockets is limited. A partition at its share sends further queries from its open
//! ports, chosen at random: guessing does not become easier, but mismatches close the port for
//! several queries.

use super::ServerResponse;
use crate::answer::{Response, SentQuery};
use crate::cache::Key;
use crate::message::{Bits, encode_query, mix_case};
use crate::metrics::{Mismatch, Overload, ProcessMetrics};
use crate::partition::{Partition, Shares};
use crate::upstream::Form;
use rustix::io::Errno;
use rustix::net::SendFlags;
use socket2::{Domain, Protocol, Socket, Type};
use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Instant;
use tidegate_model::LOOPBACK_INDEX;
use tidegate_netns::{Namespace, NamespaceId};
use tidegate_reactor::batch::{Datagram, RecvBatch, SLOTS, enable_packet_info};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Mismatched datagrams after which a source port is closed. A port has one query with identical
/// retransmissions, so a correct server sends hardly anything else to it.
pub(super) const MAX_MISMATCHES: u32 = 8;

thread_local! {
    static RECEIVED: RefCell<RecvBatch> = RefCell::new(RecvBatch::new());
}

/// Interface indexes of the bridges of all networks, in the namespace of the networks.
#[derive(Debug, Default)]
pub(crate) struct Bridges(RwLock<BTreeSet<u32>>);

impl Bridges {
    pub(crate) fn set(&self, indexes: BTreeSet<u32>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = indexes;
    }

    fn contains(&self, index: u32) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&index)
    }
}

/// Where responses of a server may arrive.
#[derive(Clone, Debug)]
pub(super) enum Ingress {
    /// At any interface, in a namespace without bridges.
    Any,
    /// At an interface other than these bridges.
    Outside(Arc<Bridges>),
    /// At one of these bridges: the server is on a network. Or at the loopback interface, if it is
    /// on the host.
    Inside(Arc<Bridges>),
}

impl Ingress {
    fn accepts(&self, interface: u32) -> bool {
        match self {
            Self::Any => true,
            Self::Outside(bridges) => !bridges.contains(interface),
            Self::Inside(bridges) => interface == LOOPBACK_INDEX || bridges.contains(interface),
        }
    }
}

/// The open source ports.
pub(super) struct Ports {
    open: Arc<Mutex<Open>>,
    metrics: Arc<ProcessMetrics>,
}

/// Partition, server and namespace of a port.
type PortKey = (Partition, SocketAddr, NamespaceId);

struct Open {
    shares: Shares,
    /// Open ports by sequence number.
    ports: BTreeMap<PortKey, BTreeMap<u64, Weak<Port>>>,
    next: u64,
}

impl Open {
    fn unlist(&mut self, key: &PortKey, number: u64) {
        if let Some(ports) = self.ports.get_mut(key) {
            ports.remove(&number);
            if ports.is_empty() {
                self.ports.remove(key);
            }
        }
    }
}

struct Port {
    shared: Arc<Shared>,
    reader: AbortHandle,
}

struct Shared {
    server: SocketAddr,
    socket: UdpSocket,
    awaited: Mutex<AwaitedResponses>,
    /// Where a datagram is not considered forged.
    ingress: Ingress,
    metrics: Arc<ProcessMetrics>,
    open: Arc<Mutex<Open>>,
    key: PortKey,
    number: u64,
}

#[derive(Default)]
struct AwaitedResponses {
    /// Outstanding queries by ID.
    queries: HashMap<u16, (SentQuery, mpsc::Sender<ServerResponse>)>,
    mismatches: u32,
}

/// The namespace from which a query is sent.
pub(super) struct Egress<'a> {
    pub(super) namespace: &'a Namespace,
    /// Where responses are accepted.
    pub(super) ingress: Ingress,
}

/// An outstanding query. Its response is ignored after it is dropped.
pub(super) struct Outstanding {
    port: Arc<Port>,
    id: u16,
    form: Form,
    message: Vec<u8>,
    asked: Instant,
}

impl Ports {
    /// Creates a set of at most `limit` ports.
    pub(super) fn new(limit: usize, metrics: Arc<ProcessMetrics>) -> Self {
        let open = Open { shares: Shares::new(limit), ports: BTreeMap::new(), next: 0 };
        Self { open: Arc::new(Mutex::new(open)), metrics }
    }

    /// Prepares a query to `server`. Responses are sent to `responses`.
    pub(super) fn ask(
        &self,
        egress: Egress<'_>,
        server: SocketAddr,
        key: &Key,
        form: Form,
        responses: mpsc::Sender<ServerResponse>,
    ) -> io::Result<Outstanding> {
        let port = self.port(egress, server, &key.partition)?;
        let (id, name) = port.shared.register(key, form, responses)?;
        let mut message = Vec::with_capacity(name.len() + 32);
        encode_query(id, &name, key.kind, Bits { edns: form.edns, ..key.bits }, &mut message);
        Ok(Outstanding { port, id, form, message, asked: super::now() })
    }

    fn port(
        &self,
        egress: Egress<'_>,
        server: SocketAddr,
        partition: &Partition,
    ) -> io::Result<Arc<Port>> {
        let key = (partition.clone(), server, egress.namespace.id());
        let number = {
            let mut open = lock(&self.open);
            if !open.shares.allows(partition) {
                if let Some(port) = shared_port(&open, &key) {
                    return Ok(port);
                }
                if open.shares.free() == 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::QuotaExceeded,
                        "limit of source ports for upstream DNS queries reached",
                    ));
                }
            }
            open.shares.take(partition);
            open.next += 1;
            open.next
        };
        match self.open_port(egress, key.clone(), number) {
            Ok(port) => Ok(port),
            Err(error) => {
                let mut open = lock(&self.open);
                open.shares.release(partition, 1);
                // No new socket is available, for example without free descriptors. A shared port
                // is better than none.
                shared_port(&open, &key).ok_or(error)
            }
        }
    }

    fn open_port(&self, egress: Egress<'_>, key: PortKey, number: u64) -> io::Result<Arc<Port>> {
        let server = key.1;
        let socket = egress.namespace.with(|| {
            let kind = Type::DGRAM.nonblocking().cloexec();
            Socket::new_raw(Domain::for_address(server), kind, Some(Protocol::UDP))
        })??;
        if !matches!(egress.ingress, Ingress::Any) {
            enable_packet_info(&socket, server.is_ipv6())?;
        }
        // Chooses the port, filters by peer, and enables ICMP errors.
        socket.connect(&server.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        let shared = Arc::new(Shared {
            server,
            socket,
            awaited: Mutex::default(),
            ingress: egress.ingress,
            metrics: Arc::clone(&self.metrics),
            open: Arc::clone(&self.open),
            key,
            number,
        });
        let reader = tokio::spawn(Arc::clone(&shared).read()).abort_handle();
        let port = Arc::new(Port { shared, reader });
        let listed = Arc::downgrade(&port);
        lock(&self.open).ports.entry(port.shared.key.clone()).or_default().insert(number, listed);
        Ok(port)
    }
}

/// An open port of `key`, chosen at random.
fn shared_port(open: &Open, key: &PortKey) -> Option<Arc<Port>> {
    let ports = open.ports.get(key)?;
    let mut random = [0; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).ok()?;
    let first = u32::from_ne_bytes(random) as usize % ports.len();
    // A port whose last query has just ended cannot be upgraded.
    ports.values().cycle().skip(first).take(ports.len()).find_map(Weak::upgrade)
}

/// Closes the port with its last query.
impl Drop for Port {
    fn drop(&mut self) {
        self.reader.abort();
        let mut open = lock(&self.shared.open);
        open.unlist(&self.shared.key, self.shared.number);
        open.shares.release(&self.shared.key.0, 1);
    }
}

impl Shared {
    /// Registers a query for `key`. Returns its ID, and the name as it is sent.
    fn register(
        &self,
        key: &Key,
        form: Form,
        responses: mpsc::Sender<ServerResponse>,
    ) -> io::Result<(u16, Box<[u8]>)> {
        let mut awaited = lock(&self.awaited);
        loop {
            let mut random = [0; 34];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let [first, second, case @ ..] = random;
            let id = u16::from_ne_bytes([first, second]);
            if let Entry::Vacant(place) = awaited.queries.entry(id) {
                let mut name = key.name.clone();
                if form.mixed {
                    mix_case(&mut name, &case);
                }
                let asked = SentQuery { id, name: name.clone(), kind: key.kind, exact: form.mixed };
                place.insert((asked, responses));
                return Ok((id, name));
            }
        }
    }

    async fn read(self: Arc<Self>) {
        // An ICMP error does not make a socket readable.
        let either = Interest::READABLE | Interest::ERROR;
        loop {
            let Ok(ready) = self.socket.ready(either).await else { return };
            // `try_io` accepts one interest at a time.
            let interest = if ready.is_error() { Interest::ERROR } else { Interest::READABLE };
            let received = self
                .socket
                .try_io(interest, || RECEIVED.with_borrow_mut(|received| self.receive(received)));
            match received {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The server is unreachable (`ECONNREFUSED` and others), which affects all queries
                // of this port.
                Err(error) => {
                    tracing::trace!(server = %self.server, %error, "DNS server unreachable");
                    self.notify_all(&Response::Unreachable);
                }
            }
        }
    }

    /// Receives one batch. Returns whether the port stays open.
    fn receive(&self, received: &mut RecvBatch) -> io::Result<bool> {
        let count = received.receive(&self.socket)?;
        for index in 0..count {
            if !self.handle(&received.get(index)) {
                return Ok(false);
            }
        }
        if count < SLOTS { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(true) }
    }

    /// Handles one datagram. Returns whether the port stays open.
    fn handle(&self, datagram: &Datagram<'_>) -> bool {
        if !self.ingress.accepts(datagram.interface) {
            // Not counted as a mismatch that closes the port, because such a guess cannot succeed.
            self.metrics.mismatch(Mismatch::Bridge);
            return true;
        }
        let mut awaited = lock(&self.awaited);
        let id = crate::message::short(datagram.payload, 0);
        let known = id.and_then(|id| awaited.queries.get(&id));
        let response = known.map_or(Response::Unrelated, |(asked, _)| asked.read(datagram.payload));
        let mismatch = match (&response, known) {
            (Response::Unrelated, None) => Some(Mismatch::Id),
            (Response::Unrelated, Some(_)) => Some(Mismatch::Question),
            (Response::CaseChanged, _) => Some(Mismatch::Case),
            _ => None,
        };
        if let Some((_, responses)) = known.filter(|_| response != Response::Unrelated) {
            // If the channel is full, the query has a response already.
            let _ = responses.try_send(ServerResponse {
                server: self.server,
                response,
                same_case: None,
            });
        }
        let Some(reason) = mismatch else { return true };
        self.metrics.mismatch(reason);
        awaited.mismatches += 1;
        if awaited.mismatches < MAX_MISMATCHES {
            return true;
        }
        drop(awaited);
        self.metrics.refused(Overload::Guesses, None);
        lock(&self.open).unlist(&self.key, self.number);
        self.notify_all(&Response::Flooded);
        false
    }

    fn notify_all(&self, response: &Response) {
        for (_, responses) in lock(&self.awaited).queries.values() {
            let _ = responses.try_send(ServerResponse {
                server: self.server,
                response: response.clone(),
                same_case: None,
            });
        }
    }
}

impl Outstanding {
    pub(super) fn server(&self) -> SocketAddr {
        self.port.shared.server
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    pub(super) fn asked(&self) -> Instant {
        self.asked
    }

    /// Sends the query, for the first time or again. Returns whether that succeeded.
    pub(super) fn send(&self) -> bool {
        // Sent directly, because the runtime does not know yet that a new socket is writable.
        let send =
            || rustix::net::send(&self.port.shared.socket, &self.message, SendFlags::DONTWAIT);
        match send() {
            Ok(_) => true,
            // The error of an earlier datagram.
            Err(Errno::CONNREFUSED) => {
                self.port.shared.notify_all(&Response::Unreachable);
                send().is_ok()
            }
            // A full send buffer drops the datagram, like a loss on the network.
            Err(error) => error == Errno::AGAIN,
        }
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        lock(&self.port.shared.awaited).queries.remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Invariants hold after every statement, so a poisoned lock is usable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
