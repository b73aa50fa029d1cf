//! Published ports, and their clients.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::forward::{Forward, ForwardId, Guard};
use crate::host::{Host, Port};
use crate::metrics::ForwardStats;
use crate::siphash::HashKey;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::share_of;
use tidegate_reactor::{Arena, Key};

/// Pause before a port without a free descriptor is retried.
const PAUSE: Duration = Duration::from_millis(100);

/// The first gateway port to use; lower ones belong to services.
const FIRST_PORT: u16 = 1024;

/// A published port.
pub(super) struct Published<H: Host> {
    pub(super) id: ForwardId,
    pub(super) forward: Forward,
    pub(super) port: HostPort<H>,
    pub(super) guard: Option<Arc<dyn Guard>>,
    pub(super) stats: Arc<ForwardStats>,
}

/// The socket of a published port.
type HostPort<H> = Port<<H as Host>::Listener, <H as Host>::Datagrams>;

/// The published ports.
pub(super) struct PublishedPorts<H: Host> {
    ports: Arena<Published<H>>,
    by_id: BTreeMap<ForwardId, Key>,
    /// Ports that are not watched until `resume_at`.
    paused: Vec<Key>,
    resume_at: Option<Instant>,
}

impl<H: Host> PublishedPorts<H> {
    pub(super) fn new() -> Self {
        Self { ports: Arena::new(), by_id: BTreeMap::new(), paused: Vec::new(), resume_at: None }
    }

    /// Adds a port, which `watch` adds to epoll.
    ///
    /// # Errors
    /// Errors of `watch`. The port is then closed.
    pub(super) fn insert(
        &mut self,
        published: Published<H>,
        watch: impl FnOnce(&HostPort<H>, Key) -> io::Result<()>,
    ) -> io::Result<()> {
        let id = published.id;
        let key = self.ports.insert(published);
        if let Some(published) = self.ports.get(key)
            && let Err(error) = watch(&published.port, key)
        {
            self.ports.remove(key);
            return Err(error);
        }
        self.by_id.insert(id, key);
        Ok(())
    }

    /// Closes a port.
    pub(super) fn remove(&mut self, id: ForwardId) {
        if let Some(key) = self.by_id.remove(&id) {
            self.ports.remove(key);
        }
    }

    pub(super) fn key_of(&self, id: ForwardId) -> Option<Key> {
        self.by_id.get(&id).copied()
    }

    pub(super) fn ids(&self) -> Vec<ForwardId> {
        self.by_id.keys().copied().collect()
    }

    pub(super) fn get(&self, key: Key) -> Option<&Published<H>> {
        self.ports.get(key)
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut Published<H>> {
        self.ports.get_mut(key)
    }

    /// Schedules a port, which the caller has removed from epoll, to be watched again.
    pub(super) fn pause(&mut self, key: Key, now: Instant) {
        self.paused.push(key);
        self.resume_at.get_or_insert(now + PAUSE);
    }

    /// When [`resume`](Self::resume) is due.
    pub(super) fn resume_at(&self) -> Option<Instant> {
        self.resume_at
    }

    /// Watches paused ports again, if the pause has passed.
    pub(super) fn resume(
        &mut self,
        now: Instant,
        mut watch: impl FnMut(&HostPort<H>, Key) -> io::Result<()>,
    ) {
        if self.resume_at.is_none_or(|at| now < at) {
            return;
        }
        self.resume_at = None;
        for key in std::mem::take(&mut self.paused) {
            if self.ports.get(key).is_some_and(|published| watch(&published.port, key).is_err()) {
                self.pause(key, now);
            }
        }
    }
}

/// The gateway ports under which clients appear whose own address cannot be shown.
pub(super) struct GatewayPorts {
    last: u16,
}

impl GatewayPorts {
    /// Starts after `last`.
    pub(super) fn after(last: u16) -> Self {
        Self { last }
    }

    /// The next port, from 1024 to 65535 and again from 1024.
    pub(super) fn advance(&mut self) -> u16 {
        self.last = self.last.checked_add(1).unwrap_or(FIRST_PORT).max(FIRST_PORT);
        self.last
    }
}

/// Published port, client address, and local address that the client sends to.
pub(super) type Client = (Key, SocketAddr, Option<IpAddr>);

/// The clients of published ports: their UDP sessions, and what counts against their shares
/// ([`share_of`]).
pub(super) struct Clients {
    sessions: HashMap<Client, Key, HashKey>,
    shares: HashMap<IpAddr, ClientSessions, HashKey>,
    /// Number of TCP connections by share.
    connections: HashMap<IpAddr, usize, HashKey>,
}

impl Clients {
    pub(super) fn new(hash: HashKey) -> Self {
        Self {
            sessions: HashMap::with_hasher(hash),
            shares: HashMap::with_hasher(hash),
            connections: HashMap::with_hasher(hash),
        }
    }

    pub(super) fn session(&self, client: &Client) -> Option<Key> {
        self.sessions.get(client).copied()
    }

    /// The sessions at port `port`.
    pub(super) fn sessions_at(&self, port: Key) -> Vec<Key> {
        let here = self.sessions.iter().filter(|(client, _)| client.0 == port);
        here.map(|(_, flow)| *flow).collect()
    }

    /// The sessions of clients with `addresses`.
    pub(super) fn sessions_of(&self, addresses: &[IpAddr]) -> Vec<Key> {
        let theirs =
            self.sessions.iter().filter(|((_, client, _), _)| addresses.contains(&client.ip()));
        theirs.map(|(_, flow)| *flow).collect()
    }

    /// The sessions of the share of `client`, if it has any.
    pub(super) fn share_of(&mut self, client: IpAddr) -> Option<&mut ClientSessions> {
        self.shares.get_mut(&share_of(client))
    }

    pub(super) fn begin_session(&mut self, client: Client, flow: Key) {
        self.sessions.insert(client, flow);
        self.shares.entry(share_of(client.1.ip())).or_default().begin(flow);
    }

    pub(super) fn end_session(&mut self, client: &Client) {
        self.sessions.remove(client);
        if let Entry::Occupied(mut held) = self.shares.entry(share_of(client.1.ip())) {
            held.get_mut().held -= 1;
            if held.get().held == 0 {
                held.remove();
            }
        }
    }

    /// Number of TCP connections of the share of `client`.
    pub(super) fn connections(&self, client: IpAddr) -> usize {
        self.connections.get(&share_of(client)).copied().unwrap_or_default()
    }

    pub(super) fn begin_connection(&mut self, client: IpAddr) {
        *self.connections.entry(share_of(client)).or_default() += 1;
    }

    pub(super) fn end_connection(&mut self, client: IpAddr) {
        if let Entry::Occupied(mut held) = self.connections.entry(share_of(client)) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }
}

/// Sessions of one client of published ports.
#[derive(Debug, Default)]
pub(super) struct ClientSessions {
    pub(super) held: usize,
    /// Sessions in order of creation; some have ended.
    pub(super) oldest_first: VecDeque<Key>,
}

/// Number of oldest sessions to search for an unanswered one.
const SCAN_LIMIT: usize = 64;

impl ClientSessions {
    pub(super) fn begin(&mut self, flow: Key) {
        self.held += 1;
        self.oldest_first.push_back(flow);
    }

    /// Removes ended sessions, if they are more than half of the list.
    pub(super) fn compact(&mut self, exists: impl Fn(Key) -> bool) {
        if self.oldest_first.len() > 2 * self.held + SCAN_LIMIT {
            self.oldest_first.retain(|flow| exists(*flow));
        }
    }

    /// The session to evict: the oldest unanswered one among the first [`SCAN_LIMIT`], or the
    /// oldest.
    pub(super) fn oldest(
        &mut self,
        exists: impl Fn(Key) -> bool,
        is_unanswered: impl Fn(Key) -> bool,
    ) -> Option<Key> {
        while self.oldest_first.front().is_some_and(|flow| !exists(*flow)) {
            self.oldest_first.pop_front();
        }
        let unanswered =
            self.oldest_first.iter().take(SCAN_LIMIT).find(|flow| is_unanswered(**flow));
        unanswered.or(self.oldest_first.front()).copied()
    }
}

impl<H: Host> Published<H> {
    pub(super) fn port_mut(&mut self) -> &mut Port<H::Listener, H::Datagrams> {
        &mut self.port
    }
}
