//! Source ports of questions to other servers.
//!
//! A blind attacker has to guess the source port, the query ID and the case of the letters of the
//! name (RFC 5452 section 4, draft-vixie-dnsext-dns0x20-00). All three are random; docs/dns.md has
//! the arithmetic.
//!
//! - A source port serves one question and is closed with it. The kernel chooses it at random among
//!   `net.ipv4.ip_local_port_range` (`udp_lib_get_port`).
//! - The socket is connected: the kernel drops what does not come from the server's address and
//!   port.
//! - A datagram that came in by a bridge of our networks is dropped unless the server is on one of
//!   them: a container can send any source address, if nothing at its bridge port prevents that.
//! - [`MISMATCHES`] datagrams that answer nothing end the port: someone is guessing, and has found
//!   it.
//!
//! Sockets are bounded. A partition that has used up its share puts further questions on ports of
//! its own, chosen at random: they are then as hard to guess as before, but a mismatch ends
//! several.

use super::Word;
use crate::answer::{Asked, Reading};
use crate::cache::Key;
use crate::message::{Bits, mix_case, question};
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
use tidegate_netns::{Namespace, NamespaceId};
use tidegate_reactor::batch::{Datagram, RecvBatch, SLOTS, enable_packet_info};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// Datagrams that answer nothing after which a source port is given up. A port has one question,
/// and its repetitions are equal, so that an honest server has hardly anything else to say to it.
pub(super) const MISMATCHES: u32 = 8;

thread_local! {
    static RECEIVED: RefCell<RecvBatch> = RefCell::new(RecvBatch::new());
}

/// The indexes of the bridges of our networks, in the namespace that networks are in.
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

/// All source ports that are open.
pub(super) struct Ports {
    open: Arc<Mutex<Open>>,
    metrics: Arc<ProcessMetrics>,
}

/// Whose port it is, to which server it is connected, and where.
type PortKey = (Partition, SocketAddr, NamespaceId);

struct Open {
    shares: Shares,
    /// By number.
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
    waiting: Mutex<Waiting>,
    /// What comes in by one of these is forged.
    bridges: Option<Arc<Bridges>>,
    metrics: Arc<ProcessMetrics>,
    open: Arc<Mutex<Open>>,
    key: PortKey,
    number: u64,
}

#[derive(Default)]
struct Waiting {
    /// By ID.
    questions: HashMap<u16, (Asked, mpsc::Sender<Word>)>,
    mismatches: u32,
}

/// Where a question goes out from.
pub(super) struct Way<'a> {
    pub(super) namespace: &'a Namespace,
    /// What comes in by these bridges is no answer.
    pub(super) bridges: Option<Arc<Bridges>>,
}

/// A question that has been asked. Its answer is no longer awaited when it is dropped.
pub(super) struct Outstanding {
    port: Arc<Port>,
    id: u16,
    form: Form,
    message: Vec<u8>,
    asked: Instant,
}

impl Ports {
    /// None yet, and never more than `limit`.
    pub(super) fn new(limit: usize, metrics: Arc<ProcessMetrics>) -> Self {
        let open = Open { shares: Shares::new(limit), ports: BTreeMap::new(), next: 0 };
        Self { open: Arc::new(Mutex::new(open)), metrics }
    }

    /// Prepares a question to `server`. What comes back goes to `heard`.
    pub(super) fn ask(
        &self,
        way: Way<'_>,
        server: SocketAddr,
        key: &Key,
        form: Form,
        heard: mpsc::Sender<Word>,
    ) -> io::Result<Outstanding> {
        let port = self.port(way, server, &key.partition)?;
        let (id, name) = port.shared.expect(key, form, heard)?;
        let mut message = Vec::with_capacity(name.len() + 32);
        question(id, &name, key.kind, Bits { edns: form.edns, ..key.bits }, &mut message);
        Ok(Outstanding { port, id, form, message, asked: super::now() })
    }

    fn port(
        &self,
        way: Way<'_>,
        server: SocketAddr,
        partition: &Partition,
    ) -> io::Result<Arc<Port>> {
        let key = (partition.clone(), server, way.namespace.id());
        let number = {
            let mut open = lock(&self.open);
            if !open.shares.allows(partition) {
                if let Some(port) = shared_port(&open, &key) {
                    return Ok(port);
                }
                if open.shares.free() == 0 {
                    return Err(io::Error::other("all source ports for DNS questions are in use"));
                }
            }
            open.shares.take(partition);
            open.next += 1;
            open.next
        };
        match self.open_port(way, key.clone(), number) {
            Ok(port) => Ok(port),
            Err(error) => {
                let mut open = lock(&self.open);
                open.shares.give_back(partition, 1);
                // Out of descriptors: a port that is shared is better than none.
                shared_port(&open, &key).ok_or(error)
            }
        }
    }

    fn open_port(&self, way: Way<'_>, key: PortKey, number: u64) -> io::Result<Arc<Port>> {
        let server = key.1;
        let socket = way.namespace.with(|| {
            let kind = Type::DGRAM.nonblocking().cloexec();
            Socket::new_raw(Domain::for_address(server), kind, Some(Protocol::UDP))
        })??;
        if way.bridges.is_some() {
            enable_packet_info(&socket, server.is_ipv6())?;
        }
        // Chooses the port, lets nobody else's datagrams in, and has the kernel tell of a closed
        // port.
        socket.connect(&server.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        let shared = Arc::new(Shared {
            server,
            socket,
            waiting: Mutex::default(),
            bridges: way.bridges,
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

/// One of the ports that `key` has open already, at random.
fn shared_port(open: &Open, key: &PortKey) -> Option<Arc<Port>> {
    let ports = open.ports.get(key)?;
    let mut random = [0; 4];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).ok()?;
    let first = u32::from_ne_bytes(random) as usize % ports.len();
    // One whose last question is just over cannot be had any more.
    ports.values().cycle().skip(first).take(ports.len()).find_map(Weak::upgrade)
}

/// With the last question that went out from it.
impl Drop for Port {
    fn drop(&mut self) {
        self.reader.abort();
        let mut open = lock(&self.shared.open);
        open.unlist(&self.shared.key, self.shared.number);
        open.shares.give_back(&self.shared.key.0, 1);
    }
}

impl Shared {
    /// Begins to await the answer to `key`; its ID, and the name as it is to be sent.
    fn expect(
        &self,
        key: &Key,
        form: Form,
        heard: mpsc::Sender<Word>,
    ) -> io::Result<(u16, Box<[u8]>)> {
        let mut waiting = lock(&self.waiting);
        loop {
            let mut random = [0; 34];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            let [first, second, case @ ..] = random;
            let id = u16::from_ne_bytes([first, second]);
            if let Entry::Vacant(place) = waiting.questions.entry(id) {
                let mut name = key.name.clone();
                if form.mixed {
                    mix_case(&mut name, &case);
                }
                let asked = Asked { id, name: name.clone(), kind: key.kind, exact: form.mixed };
                place.insert((asked, heard));
                return Ok((id, name));
            }
        }
    }

    async fn read(self: Arc<Self>) {
        // Word that nobody is there does not make a socket readable.
        let either = Interest::READABLE | Interest::ERROR;
        loop {
            let Ok(ready) = self.socket.ready(either).await else { return };
            // One at a time: `try_io` knows nothing of both.
            let interest = if ready.is_error() { Interest::ERROR } else { Interest::READABLE };
            let received = self
                .socket
                .try_io(interest, || RECEIVED.with_borrow_mut(|received| self.receive(received)));
            match received {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Nobody is at that port (`ECONNREFUSED`), or no way leads there: true of all
                // questions that went out from here.
                Err(error) => {
                    tracing::trace!(server = %self.server, %error, "no answer can come");
                    self.tell_all(&Reading::Unreachable);
                }
            }
        }
    }

    /// Reads what has come. Whether more may come.
    fn receive(&self, received: &mut RecvBatch) -> io::Result<bool> {
        let count = received.receive(&self.socket)?;
        for index in 0..count {
            if !self.hear(&received.get(index)) {
                return Ok(false);
            }
        }
        if count < SLOTS { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(true) }
    }

    /// Takes one datagram. Whether more may come.
    fn hear(&self, datagram: &Datagram<'_>) -> bool {
        if self.bridges.as_ref().is_some_and(|bridges| bridges.contains(datagram.interface)) {
            // Not counted as a guess: it is none that could succeed.
            self.metrics.mismatch(Mismatch::Bridge);
            return true;
        }
        let mut waiting = lock(&self.waiting);
        let id = crate::message::short(datagram.payload, 0);
        let known = id.and_then(|id| waiting.questions.get(&id));
        let reading = known.map_or(Reading::Other, |(asked, _)| asked.read(datagram.payload));
        let mismatch = match (&reading, known) {
            (Reading::Other, None) => Some(Mismatch::Id),
            (Reading::Other, Some(_)) => Some(Mismatch::Question),
            (Reading::CaseChanged, _) => Some(Mismatch::Case),
            _ => None,
        };
        if let Some((_, heard)) = known.filter(|_| reading != Reading::Other) {
            // Who does not read has an answer already.
            let _ = heard.try_send(Word { server: self.server, reading, same_case: None });
        }
        let Some(reason) = mismatch else { return true };
        self.metrics.mismatch(reason);
        waiting.mismatches += 1;
        if waiting.mismatches < MISMATCHES {
            return true;
        }
        drop(waiting);
        self.metrics.refused(Overload::Guesses, None);
        lock(&self.open).unlist(&self.key, self.number);
        self.tell_all(&Reading::Flooded);
        false
    }

    fn tell_all(&self, reading: &Reading) {
        for (_, heard) in lock(&self.waiting).questions.values() {
            let _ = heard.try_send(Word {
                server: self.server,
                reading: reading.clone(),
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

    /// Sends it, for the first time or again. Whether there was a way.
    pub(super) fn send(&self) -> bool {
        // Not by the runtime, which has not heard yet that a new socket has room.
        let send =
            || rustix::net::send(&self.port.shared.socket, &self.message, SendFlags::DONTWAIT);
        match send() {
            Ok(_) => true,
            // Of an earlier datagram.
            Err(Errno::CONNREFUSED) => {
                self.port.shared.tell_all(&Reading::Unreachable);
                send().is_ok()
            }
            // A full buffer loses datagrams, as networks do.
            Err(error) => error == Errno::AGAIN,
        }
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        lock(&self.port.shared.waiting).questions.remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in there holds after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
