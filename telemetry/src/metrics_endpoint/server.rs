//! The metrics listener. One thread accepts clients and reads their requests; each page is sent by
//! a thread of its own.
//!
//! [`Clients`] decides which client is evicted at a limit. Clients on this host are distinguished
//! by user, because they all have the same address; other clients are distinguished by address.

use super::clients::{Begin, Clients, Holder, Id};
use super::http::{self, MAX_REQUEST, Request};
use super::{Denies, Page, REQUEST_TIMEOUT};
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidegate_model::{Ingress, LogInterval, canonical, share_of};
use tidegate_netns::LocalPeers;
use tidegate_reactor::stream_ingress;

/// Maximum number of clients without a complete request.
const SILENT: usize = 64;

/// Maximum number of concurrent responses; further requests get a 503. One holder gets two thirds.
const ANSWERS: usize = 24;

/// Maximum number of clients accepted before pending clients are read again.
const ACCEPT_BATCH: usize = 16;

/// Pause after a failed accept, which usually means that no file descriptor is left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Maximum number of bytes drained after a request.
const MAX_DRAIN: usize = 64 << 10;

/// Why a client was refused or evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// A silent client was evicted for a new one.
    Silent,
    /// The request did not arrive in time.
    Timeout,
    /// The limit of concurrent responses was reached.
    Answers,
    /// A response was evicted for a smaller holder.
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

/// A client without a complete request.
struct Silent {
    stream: TcpStream,
    request: Vec<u8>,
    until: Instant,
}

/// State shared between the listener and the threads that send pages.
struct Shared {
    clients: Clients,
    /// The sockets of clients that are being served, for eviction.
    answered: BTreeMap<Id, Arc<TcpStream>>,
}

/// The metrics of the listener, and the rate limits of its log.
struct Counts {
    clients: Gauge,
    refused: [Counter; Refusal::ALL.len()],
    logs: [LogInterval; Refusal::ALL.len()],
}

/// The listener and its clients.
pub(super) struct Server {
    listener: TcpListener,
    denies: Option<Denies>,
    page: Arc<Page>,
    peers: Option<LocalPeers>,
    shared: Arc<Mutex<Shared>>,
    silent: BTreeMap<Id, Silent>,
    counts: Counts,
}

impl Server {
    /// Serves the clients of `listener` that `denies` does not reject. Without `peers`, all clients
    /// on this host are one holder.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub(super) fn new(
        listener: TcpListener,
        denies: Option<Denies>,
        peers: Option<LocalPeers>,
        page: Arc<Page>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Shared { clients: Clients::new(SILENT, ANSWERS), answered: BTreeMap::new() };
        gauge!(LIMIT).set(shared.clients.limit() as f64);
        let shared = Arc::new(Mutex::new(shared));
        Ok(Self {
            listener,
            denies,
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
            // Clients with a complete request must not be evicted for new ones.
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

    /// Waits for requests and new clients. Returns whether there are new clients.
    fn wait(&self) -> bool {
        let mut all = vec![PollFd::new(&self.listener, PollFlags::IN)];
        all.extend(self.silent.values().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        let first = self.silent.values().map(|client| client.until).min();
        let left = first.map(|first| first.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left + Duration::from_millis(1)).ok());
        match poll(&mut all, left.as_ref()) {
            Ok(_) => !all[0].revents().is_empty(),
            // EINTR or ENOMEM
            Err(_) => false,
        }
    }

    fn accept(&mut self) {
        for _ in 0..ACCEPT_BATCH {
            match self.listener.accept() {
                // Before reading a byte, and before it counts against a limit.
                Ok((client, address)) if is_denied(self.denies.as_ref(), &client, address) => {
                    reset(&client);
                }
                Ok((client, address)) => self.admit(client, address),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Probably out of descriptors: the client waits in the backlog.
                Err(_) => return std::thread::sleep(ACCEPT_PAUSE),
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
        let until = Instant::now() + REQUEST_TIMEOUT;
        self.silent.insert(id, Silent { stream, request: Vec::new(), until });
        // The request of a scraper usually arrives with the connection.
        self.read(id);
    }

    /// Returns the holder of `stream`, a client at `address`.
    fn holder(&self, stream: &TcpStream, address: SocketAddr) -> Holder {
        let client = canonical(address);
        let local = stream.local_addr().map(canonical);
        let is_local = client.ip().is_loopback()
            || local.as_ref().is_ok_and(|local| local.ip() == client.ip());
        if !is_local {
            return Holder::Address(share_of(client.ip()));
        }
        let user = self
            .peers
            .as_ref()
            .zip(local.ok())
            .and_then(|(peers, local)| peers.user_of(client, local));
        user.map_or(Holder::Local, Holder::User)
    }

    /// Reads from the silent client `id`, and responds to a complete request.
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
                    respond(&client.stream, &answer);
                    break self.forget(id);
                }
            }
        }
    }

    fn forget(&mut self, id: Id) {
        self.silent.remove(&id);
        lock(&self.shared).clients.end(id);
    }

    /// Sends the page to the client `id`, or refuses it at the limit.
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
                respond(
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
            // An error or a timeout concerns this client only.
            let _ = page.answer(&stream);
            end(&shared, id);
        };
        if std::thread::Builder::new().name("tidegate-scrape".into()).spawn(send).is_err() {
            end(&self.shared, id);
        }
    }

    /// Closes clients that did not send a request in time.
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
    // Every statement leaves the state consistent, so a poisoned lock is usable.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

const CLIENTS: &str = "tidegate_scrape_clients";
const LIMIT: &str = "tidegate_scrape_clients_limit";
const REFUSED: &str = "tidegate_scrape_refused_total";

impl Counts {
    fn new() -> Self {
        describe_gauge!(CLIENTS, "Clients of the metrics listener.");
        describe_gauge!(LIMIT, "Limit of clients of the metrics listener.");
        describe_counter!(
            REFUSED,
            "Clients of the metrics listener refused or evicted at a limit."
        );
        Self {
            clients: gauge!(CLIENTS),
            refused: Refusal::ALL.map(|reason| counter!(REFUSED, "reason" => reason.as_str())),
            logs: Default::default(),
        }
    }

    /// Counts a refusal and logs it, rate-limited. `largest` is the holder with the most clients.
    fn refused(&self, reason: Refusal, largest: Option<Holder>) {
        self.refused[reason as usize].increment(1);
        // A timeout is not a limit.
        if reason == Refusal::Timeout {
            return;
        }
        if self.logs[reason as usize].is_due(Instant::now()) {
            let largest = largest.map(|largest| largest.to_string());
            tracing::warn!(reason = reason.as_str(), largest, "limit of metrics clients reached");
        }
    }
}

/// Returns whether `denies` rejects `client`, connected from `address`. A client whose ingress
/// interface is unknown is rejected.
fn is_denied(denies: Option<&Denies>, client: &TcpStream, address: SocketAddr) -> bool {
    let Some(denies) = denies else { return false };
    let ingress = stream_ingress(client, address.is_ipv6());
    ingress.is_err()
        || ingress.is_ok_and(|ingress| {
            denies(&Ingress {
                client: canonical(address),
                destination: Some(ingress.local),
                to_group: false,
                interface: ingress.interface,
                handshake: true,
            })
        })
}

/// Makes the close of the connection send a reset.
fn reset(client: &TcpStream) {
    let _ = socket2::SockRef::from(client).set_linger(Some(Duration::ZERO));
}

/// Sends a short response, which fits into the send buffer of a new connection, and drains data
/// after the request. Closing with unread data would reset the connection and could lose the
/// response.
fn respond(mut client: &TcpStream, answer: &str) {
    let _ = client.write_all(answer.as_bytes());
    let _ = client.shutdown(Shutdown::Write);
    let mut drained = [0; 4096];
    let mut read = 0;
    while read < MAX_DRAIN {
        match client.read(&mut drained) {
            Ok(0) | Err(_) => return,
            Ok(length) => read += length,
        }
    }
}
