//! The metrics listener: one thread accepts clients and reads their requests, and each page is sent
//! by a thread of its own.
//!
//! Which client yields at a limit is decided by [`Clients`]. A client on this host is known by its
//! user, because all local clients have the same address; others by their address.

use super::clients::{Begin, Clients, Holder, Id};
use super::http::{self, MAX_REQUEST, Request};
use super::{PATIENCE, Page};
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_model::{Ingress, LogInterval, canonical, share_of};
use tidegate_netns::LocalPeers;
use tidegate_proxy::GatewayAcl;
use tidegate_reactor::stream_ingress;

/// Clients that have not sent a whole request.
const SILENT: usize = 64;

/// Pages that are sent at a time; more requests get 503. One holder gets two thirds.
const ANSWERS: usize = 24;

/// Clients accepted before those that are there are read from again.
const ACCEPTED_AT_A_TIME: usize = 16;

/// How long nobody is accepted after that has failed: descriptors come back.
const REST: Duration = Duration::from_millis(100);

/// What is read at most of what a client sends behind its request, in bytes.
const LEFT_OVER: usize = 64 << 10;

/// Why a client was sent away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// A silent one, for a new client.
    Silent,
    /// It took too long over its request.
    Timeout,
    /// Too many pages are being sent.
    Answers,
    /// Its page was being sent, and a smaller holder asked for one.
    Answered,
}

impl Refusal {
    const ALL: [Self; 4] = [Self::Silent, Self::Timeout, Self::Answers, Self::Answered];

    fn as_str(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Timeout => "timeout",
            Self::Answers => "pages",
            Self::Answered => "evicted",
        }
    }
}

/// A client that has not sent a whole request.
struct Silent {
    stream: TcpStream,
    request: Vec<u8>,
    until: Instant,
}

/// State that the threads that send pages share with the listener.
struct Shared {
    clients: Clients,
    /// The clients that are answered, to be cut.
    answered: BTreeMap<Id, Arc<TcpStream>>,
}

/// What the listener counts, and how often each limit is logged.
struct Counts {
    clients: Gauge,
    refused: [Counter; Refusal::ALL.len()],
    logs: [LogInterval; Refusal::ALL.len()],
}

/// The listener with its clients.
pub(super) struct Server {
    listener: TcpListener,
    acl: GatewayAcl,
    page: Arc<Page>,
    peers: Option<LocalPeers>,
    shared: Arc<Mutex<Shared>>,
    silent: BTreeMap<Id, Silent>,
    counts: Counts,
}

impl Server {
    /// Answers the clients of `listener` that `acl` does not deny. Without `peers`, all clients on
    /// this host are one holder.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub(super) fn new(
        listener: TcpListener,
        acl: GatewayAcl,
        peers: Option<LocalPeers>,
        page: Arc<Page>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Shared { clients: Clients::new(SILENT, ANSWERS), answered: BTreeMap::new() };
        gauge!(LIMIT).set(shared.clients.limit() as f64);
        let shared = Arc::new(Mutex::new(shared));
        Ok(Self {
            listener,
            acl,
            page,
            peers,
            shared,
            silent: BTreeMap::new(),
            counts: Counts::new(),
        })
    }

    /// Serves until the process ends.
    pub(super) fn run(mut self) {
        loop {
            let acceptable = self.wait();
            // Who has asked already is not evicted for who has not.
            for id in self.silent.keys().copied().collect::<Vec<_>>() {
                self.read(id);
            }
            self.expire();
            if acceptable {
                self.accept();
            }
            self.counts.clients.set(lock(&self.shared).clients.len() as f64);
        }
    }

    /// Waits until somebody has something to say. Whether there are new clients.
    fn wait(&self) -> bool {
        let mut all = vec![PollFd::new(&self.listener, PollFlags::IN)];
        all.extend(self.silent.values().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        let first = self.silent.values().map(|client| client.until).min();
        let left = first.map(|first| first.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left + Duration::from_millis(1)).ok());
        match poll(&mut all, left.as_ref()) {
            Ok(_) => !all[0].revents().is_empty(),
            // A signal, or no memory.
            Err(_) => false,
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPTED_AT_A_TIME {
            match self.listener.accept() {
                // Before a byte is read, and before it takes a place.
                Ok((client, address)) if is_denied(&self.acl, &client, address) => reset(&client),
                Ok((client, address)) => self.admit(client, address),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Out of descriptors, perhaps: the client waits in the queue meanwhile.
                Err(_) => return std::thread::sleep(REST),
            }
        }
    }

    fn admit(&mut self, stream: TcpStream, address: SocketAddr) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let holder = self.holder(&stream, address);
        let (id, evicted) = lock(&self.shared).clients.accept(holder);
        if let Some((evicted, of)) = evicted {
            self.silent.remove(&evicted);
            self.counts.refused(Refusal::Silent, Some(of));
        }
        let until = Instant::now() + PATIENCE;
        self.silent.insert(id, Silent { stream, request: Vec::new(), until });
        // A scraper has asked by now.
        self.read(id);
    }

    /// Who `stream`, from `address`, shares limits with.
    fn holder(&self, stream: &TcpStream, address: SocketAddr) -> Holder {
        let client = canonical(address);
        let local = stream.local_addr().map(canonical);
        let is_here = client.ip().is_loopback()
            || local.as_ref().is_ok_and(|local| local.ip() == client.ip());
        if !is_here {
            return Holder::Address(share_of(client.ip()));
        }
        let user = self
            .peers
            .as_ref()
            .zip(local.ok())
            .and_then(|(peers, local)| peers.user_of(client, local));
        user.map_or(Holder::Local, Holder::User)
    }

    /// Reads what the silent client `id` has sent, and answers when that is a request.
    fn read(&mut self, id: Id) {
        let Some(client) = self.silent.get_mut(&id) else { return };
        let mut chunk = [0; 1024];
        loop {
            let ended = match (&client.stream).read(&mut chunk) {
                Ok(length) => {
                    client.request.extend_from_slice(&chunk[..length]);
                    length == 0
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break self.forget(id),
            };
            debug_assert!(client.request.len() <= MAX_REQUEST + chunk.len());
            match http::read(&client.request, ended) {
                Request::Incomplete => {}
                Request::Page => break self.answer(id),
                Request::Answered(answer) => {
                    say(&client.stream, &answer);
                    break self.forget(id);
                }
            }
        }
    }

    fn forget(&mut self, id: Id) {
        self.silent.remove(&id);
        lock(&self.shared).clients.end(id);
    }

    /// Has the page sent to the client `id`, if not too many are.
    fn answer(&mut self, id: Id) {
        let Some(Silent { stream, .. }) = self.silent.remove(&id) else { return };
        let stream = Arc::new(stream);
        let mut shared = lock(&self.shared);
        match shared.clients.begin(id) {
            Begin::Answer => {}
            Begin::InPlaceOf(evicted, of) => {
                if let Some(evicted) = shared.answered.remove(&evicted) {
                    reset(&evicted);
                    let _ = evicted.shutdown(Shutdown::Both);
                }
                self.counts.refused(Refusal::Answered, Some(of));
            }
            Begin::Refuse => {
                let largest = shared.clients.largest(true);
                drop(shared);
                say(
                    &stream,
                    &http::whole("503 Service Unavailable", "", "too many scrapes at once\n"),
                );
                return self.counts.refused(Refusal::Answers, largest);
            }
        }
        shared.answered.insert(id, Arc::clone(&stream));
        drop(shared);
        let (page, shared) = (Arc::clone(&self.page), Arc::clone(&self.shared));
        let send = move || {
            // A client that goes away, or dawdles, is its own loss.
            let _ = page.answer(&stream);
            end(&shared, id);
        };
        if std::thread::Builder::new().name("tidegate-scrape".into()).spawn(send).is_err() {
            end(&self.shared, id);
        }
    }

    /// Sends those away who have not asked in time.
    fn expire(&mut self) {
        let now = Instant::now();
        let late: Vec<_> = self
            .silent
            .iter()
            .filter(|(_, client)| client.until <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            self.forget(id);
            self.counts.refused(Refusal::Timeout, None);
        }
    }
}

fn end(shared: &Mutex<Shared>, id: Id) {
    let mut shared = lock(shared);
    shared.answered.remove(&id);
    shared.clients.end(id);
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // What is in there holds after every statement.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

const CLIENTS: &str = "tidegate_scrape_clients";
const LIMIT: &str = "tidegate_scrape_clients_limit";
const REFUSED: &str = "tidegate_scrape_refused_total";

impl Counts {
    fn new() -> Self {
        describe_gauge!(CLIENTS, "Clients of the metrics listener.");
        describe_gauge!(LIMIT, "Clients that the metrics listener may have.");
        describe_counter!(
            REFUSED,
            "Clients of the metrics listener that were sent away at a limit."
        );
        Self {
            clients: gauge!(CLIENTS),
            refused: Refusal::ALL.map(|reason| counter!(REFUSED, "reason" => reason.as_str())),
            logs: Default::default(),
        }
    }

    /// Counts it, and says so now and then. `largest` is who holds most.
    fn refused(&self, reason: Refusal, largest: Option<Holder>) {
        self.refused[reason as usize].increment(1);
        // One that is slow is no limit.
        if reason == Refusal::Timeout {
            return;
        }
        if self.logs[reason as usize].is_due(Instant::now()) {
            let largest = largest.map(|largest| largest.to_string());
            tracing::warn!(reason = reason.as_str(), largest, "limit of metrics clients reached");
        }
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

/// Sends a short answer, for which a new connection has room, and reads what has come behind the
/// request: otherwise closing would reset the connection, and the answer could be lost.
fn say(mut client: &TcpStream, answer: &str) {
    let _ = client.write_all(answer.as_bytes());
    let _ = client.shutdown(Shutdown::Write);
    let mut left_over = [0; 4096];
    let mut read = 0;
    while read < LEFT_OVER {
        match client.read(&mut left_over) {
            Ok(0) | Err(_) => return,
            Ok(length) => read += length,
        }
    }
}
