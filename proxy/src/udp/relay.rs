//! Forwarding of datagrams in both directions.

use super::session_table::{Client, SessionTable};
use crate::listener::{Listener, enable_gro};
use crate::port::{DropReason, Port, Tally};
use crate::shared::Shared;
use crate::tcp::log_revived;
use crate::upstream::{BackendId, DialFailure, Flow, Lease};
use crate::worker::{PortState, SessionRef, Tag, Worker};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tidegate_model::Direction;
use tidegate_model::{Feature, Ingress, Protocol, canonical};
use tidegate_reactor::batch::{self, Datagram, Destination, Offload, RecvBatch, SendBatch, Sent};
use tidegate_reactor::{
    Arena, Context, Interest, Key, Permit, enlarge_datagram_buffers, is_exhaustion, says_destroyed,
};

/// Maximum number of batches received from one socket before other sockets are processed.
const BATCHES_PER_TURN: usize = 4;

/// How long a session may go without replies before its path is verified.
const PATH_CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// A session with its backend socket.
pub(crate) struct Session {
    socket: OwnedFd,
    /// Key of its [`SessionRef`], used in epoll tokens.
    reference: Key,
    to_backend: Offload,
    to_client: Offload,
    /// The backend has replied.
    answered: bool,
    /// When the backend last replied, or the path was last verified.
    path_verified: Instant,
    /// When the first datagram arrived, and the last.
    began: Instant,
    last: Instant,
    backend: Option<BackendId>,
    _lease: Option<Lease>,
    _permit: Permit,
}

/// A published UDP port with its socket and sessions.
pub(crate) struct Relay {
    pub(crate) port: Arc<Port>,
    pub(crate) listener: Listener,
    sessions: SessionTable<Session>,
    timer: Option<Instant>,
}

/// Buffers of a loop for datagrams, allocated with its first UDP port.
#[derive(Debug, Default)]
pub(crate) struct Batches {
    received: RecvBatch,
    sending: SendBatch,
}

impl Relay {
    pub(crate) fn new(port: Arc<Port>, listener: Listener) -> Self {
        let sessions = SessionTable::new(port.options.sessions);
        Self { port, listener, sessions, timer: None }
    }

    /// Ends all sessions and returns the keys of their [`SessionRef`]s.
    pub(crate) fn end_sessions(&mut self) -> Vec<Key> {
        let stats = &self.port.stats;
        let ended = self
            .sessions
            .drain()
            .inspect(|session| stats.record_lifetime(session.last - session.began));
        let references: Vec<Key> = ended.map(|session| session.reference).collect();
        stats.live.fetch_sub(references.len(), Ordering::Relaxed);
        references
    }

    /// Ends the sessions of `clients` and returns the keys of their [`SessionRef`]s.
    pub(crate) fn end_sessions_of(&mut self, clients: &BTreeSet<IpAddr>) -> Vec<Key> {
        let ended = self.sessions.remove_clients(|client| clients.contains(&client.address.ip()));
        ended.iter().map(|session| self.count_ended(session)).collect()
    }

    /// Counts the end of a session and returns the key of its [`SessionRef`].
    fn count_ended(&self, session: &Session) -> Key {
        self.port.stats.live.fetch_sub(1, Ordering::Relaxed);
        self.port.stats.record_lifetime(session.last - session.began);
        session.reference
    }

    /// Whether replies can reach the socket of the session. Verified at most once per
    /// [`PATH_CHECK_INTERVAL`]; true in between.
    fn is_path_valid(&mut self, session: Key, now: Instant) -> bool {
        let Some((_, carried)) = self.sessions.get_mut(session) else { return false };
        if now < carried.path_verified + PATH_CHECK_INTERVAL {
            return true;
        }
        carried.path_verified = now;
        !self.port.options.upstream.is_stale(carried.socket.as_fd())
    }

    /// Whether the session may continue with its backend.
    fn is_backend_available(&mut self, session: Key) -> bool {
        let backend = self.sessions.get_mut(session).and_then(|(_, carried)| carried.backend);
        backend.is_none_or(|backend| self.port.options.upstream.is_available(backend))
    }

    /// Reports to the upstream that the port of `backend` is closed.
    fn report_refusal(&self, backend: Option<BackendId>) {
        if let Some(backend) = backend {
            self.port.options.upstream.failed(backend, DialFailure::Refused);
        }
    }

    /// Counts the result of sending a run of datagrams.
    fn account(&self, direction: Direction, sent: &Sent) {
        let stats = &self.port.stats;
        stats.add_bytes(direction, sent.bytes);
        stats.datagrams[direction].add(sent.datagrams);
        stats.drop_datagrams(DropReason::NoRoom, sent.no_room);
        stats.drop_datagrams(DropReason::TooLong, sent.too_long);
        stats.drop_datagrams(DropReason::BackendUnreachable, sent.failed);
        stats.drop_datagrams(DropReason::BackendRefused, sent.refusals);
    }
}

impl Worker {
    /// Forwards datagrams of clients of port `key` to the backend.
    pub(crate) fn relay_in(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(PortState::Udp(relay)) = self.ports.get_mut(key) else { return };
        let Batches { received, sending } = self.batches.get_or_insert_default();
        for _ in 0..BATCHES_PER_TURN {
            // The error is an ICMP error for an earlier reply to a client. The next receive
            // succeeds.
            let count = match received.receive(&relay.listener) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if says_destroyed(&error) => {
                    match relay.listener.revive() {
                        Ok(_) => {
                            self.shared.metrics.revived.increment(1);
                            log_revived(relay.port.label);
                        }
                        Err(error) => {
                            let publish = relay.port.label;
                            tracing::error!(%publish, kind = "listener", %error, "destroyed by other software; not restored");
                        }
                    }
                    continue;
                }
                Err(_) => continue,
            };
            let mut start = 0;
            while start < count {
                let datagram = received.get(start);
                let path = |datagram: &Datagram<'_>| {
                    (datagram.source, datagram.destination, datagram.sent_to, datagram.interface)
                };
                let same = |index: &usize| path(&received.get(*index)) == path(&datagram);
                let run = start..(start + 1..count).take_while(same).last().unwrap_or(start) + 1;
                start = run.end;
                let Some(client) = client(&relay.listener, &datagram) else { continue };
                let opener =
                    SessionOpener { cx, key, references: &mut self.sessions, shared: &self.shared };
                let session = match opener.find_or_open(relay, client, &datagram) {
                    Ok(session) => session,
                    Err(reason) => {
                        let lost: usize = run.map(|index| received.get(index).count()).sum();
                        relay.port.stats.drop_datagrams(reason, lost as u64);
                        continue;
                    }
                };
                relay.sessions.touch(session, false, cx.now);
                let Some((_, carried)) = relay.sessions.get_mut(session) else { continue };
                carried.last = cx.now;
                let sent =
                    sending.forward(&carried.socket, received, run, None, &mut carried.to_backend);
                let backend = carried.backend;
                relay.account(Direction::In, &sent);
                if sent.refusals > 0 {
                    relay.report_refusal(backend);
                }
                if let Some(error) = sent.error {
                    tracing::debug!(publish = %relay.port.label, %error, "session path lost");
                    end_session(relay, &mut self.sessions, session);
                }
            }
            if count < batch::SLOTS {
                break;
            }
        }
        arm_timer(cx, key, relay);
    }

    /// Forwards replies of the backend to the client of a session.
    pub(crate) fn relay_out(&mut self, cx: &mut Context<'_>, reference: Key) {
        let Some(&SessionRef { port, session }) = self.sessions.get(reference) else { return };
        let Some(PortState::Udp(relay)) = self.ports.get_mut(port) else { return };
        let Batches { received, sending } = self.batches.get_or_insert_default();
        for _ in 0..BATCHES_PER_TURN {
            let Some((client, carried)) = relay.sessions.get_mut(session) else { return };
            let count = match received.receive(&carried.socket) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    let backend = carried.backend;
                    relay.report_refusal(backend);
                    relay.port.stats.drop_datagrams(DropReason::BackendRefused, 1);
                    continue;
                }
                Err(error) => {
                    tracing::debug!(publish = %relay.port.label, %error, "session path lost");
                    return end_session(relay, &mut self.sessions, session);
                }
            };
            let destination =
                Destination { to: client.address, from: client.local.map(|local| (local, 0)) };
            let sent = sending.forward(
                &relay.listener,
                received,
                0..count,
                Some(&destination),
                &mut carried.to_client,
            );
            carried.path_verified = cx.now;
            carried.last = cx.now;
            if !std::mem::replace(&mut carried.answered, true)
                && let Some(backend) = carried.backend
            {
                relay.port.options.upstream.connected(backend);
            }
            relay.account(Direction::Out, &sent);
            relay.sessions.touch(session, true, cx.now);
            if count < batch::SLOTS {
                return;
            }
        }
    }

    /// Ends the sessions of port `key` that have reached the idle timeout.
    pub(crate) fn expire_sessions(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(PortState::Udp(relay)) = self.ports.get_mut(key) else { return };
        relay.timer = None;
        while let Some(session) = relay.sessions.expire(cx.now) {
            self.sessions.remove(relay.count_ended(&session));
        }
        arm_timer(cx, key, relay);
    }
}

/// State of the loop that opening a session requires.
struct SessionOpener<'a, 'b> {
    cx: &'a mut Context<'b>,
    key: Key,
    references: &'a mut Arena<SessionRef>,
    shared: &'a Shared,
}

impl SessionOpener<'_, '_> {
    fn find_or_open(
        self,
        relay: &mut Relay,
        client: Client,
        datagram: &Datagram<'_>,
    ) -> Result<Key, DropReason> {
        let ingress = Ingress {
            client: client.address,
            destination: datagram.sent_to,
            to_group: datagram.is_to_group(),
            interface: datagram.interface,
            handshake: false,
        };
        // Existing sessions are checked as well: a forged datagram may differ only in its ingress
        // interface.
        if relay.port.options.gateway_acl.denies(&ingress) {
            return Err(DropReason::NotAllowed);
        }
        if let Some(session) = relay.sessions.find(&client) {
            if !relay.is_path_valid(session, self.cx.now) {
                tracing::debug!(publish = %relay.port.label, "local address of session lost");
            } else if !relay.is_backend_available(session) {
                tracing::debug!(publish = %relay.port.label, "backend of session unavailable");
            } else {
                return Ok(session);
            }
            end_session(relay, self.references, session);
        }
        check_access(relay, &client)?;
        if self.shared.loop_guard.is_reflected(client.address, &relay.port.options.gateway_acl) {
            return Err(DropReason::Reflected);
        }
        self.open(relay, client)
    }

    fn open(self, relay: &mut Relay, client: Client) -> Result<Key, DropReason> {
        let free = self.shared.descriptors.left();
        if let Some(evicted) = relay.sessions.make_room(&client, free, self.cx.now) {
            self.references.remove(relay.count_ended(&evicted));
            relay.port.stats.cut.add(1);
        }
        let permit = self.shared.descriptors.take(1).ok_or(DropReason::Exhausted)?;
        let flow = Flow {
            protocol: Protocol::Udp,
            client: client.address,
            local: client
                .local
                .map(|local| SocketAddr::new(local, relay.port.label.address().port())),
            container_port: relay.port.container_port,
        };
        let opened = relay.port.options.upstream.open(&flow).map_err(|error| {
            tracing::debug!(publish = %relay.port.label, %error, "backend unreachable");
            if is_exhaustion(&error) {
                DropReason::Exhausted
            } else {
                DropReason::BackendUnreachable
            }
        })?;
        // A reply would go to the backend itself, in an endless loop.
        if peer(&opened.socket) == Some(client.address) {
            return Err(DropReason::Reflected);
        }
        // Receive offload requires Linux 5.0. Without it only throughput is lower.
        let _ = enable_gro(&opened.socket);
        enlarge_datagram_buffers(&opened.socket);
        let now = self.cx.now;
        let port = self.key;
        let mut session = None;
        let reference = self.references.insert_with(|reference| {
            let carried = Session {
                socket: opened.socket,
                reference,
                to_backend: offload(),
                to_client: offload(),
                answered: false,
                path_verified: now,
                began: now,
                last: now,
                backend: opened.backend,
                _lease: opened.lease,
                _permit: permit,
            };
            let key = relay.sessions.insert(client, carried, now);
            session = Some(key);
            SessionRef { port, session: key }
        });
        relay.port.stats.accepted.add(1);
        relay.port.stats.live.fetch_add(1, Ordering::Relaxed);
        let session = session.ok_or(DropReason::Exhausted)?;
        let Some((_, carried)) = relay.sessions.get_mut(session) else {
            return Err(DropReason::Exhausted);
        };
        if self
            .cx
            .epoll
            .add(&carried.socket, Tag::Session.token(reference), Interest::Readable)
            .is_err()
        {
            end_session(relay, self.references, session);
            return Err(DropReason::Exhausted);
        }
        Ok(session)
    }
}

/// Checks the allow-list for a new client.
fn check_access(relay: &Relay, client: &Client) -> Result<(), DropReason> {
    let allow = relay.port.options.allow.as_ref();
    if allow.is_some_and(|allow| !allow.contains(client.address.ip())) {
        return Err(DropReason::NotAllowed);
    }
    Ok(())
}

/// The remote address of a connected socket.
fn peer(socket: &OwnedFd) -> Option<SocketAddr> {
    let peer = rustix::net::getpeername(socket).ok()??;
    SocketAddr::try_from(peer).ok().map(canonical)
}

fn end_session(relay: &mut Relay, references: &mut Arena<SessionRef>, session: Key) {
    if let Some(ended) = relay.sessions.remove(session) {
        references.remove(relay.count_ended(&ended));
    }
}

/// Arms the session timer of the port unless it is armed. Traffic of the session in the meantime
/// makes the timer expire early, which is harmless.
fn arm_timer(cx: &mut Context<'_>, key: Key, relay: &mut Relay) {
    if relay.timer.is_none()
        && let Some(expiry) = relay.sessions.next_expiry()
    {
        relay.timer = Some(expiry);
        cx.timers.arm(expiry, Tag::Sessions.token(key));
    }
}

/// The client of `datagram`; `None` if a reply is not possible. To the unspecified address, the
/// kernel would send it to a socket of this host at the loopback address.
fn client(listener: &Listener, datagram: &Datagram<'_>) -> Option<Client> {
    let address = canonical(datagram.source?);
    let bound = listener.label().address().ip();
    let local = if bound.is_unspecified() { datagram.destination } else { Some(bound) };
    let local = local.filter(|local| !matches!(local, IpAddr::V6(v6) if v6.is_multicast()));
    let is_reachable = address.port() != 0 && !address.ip().is_unspecified();
    is_reachable.then_some(Client { address, local })
}

/// The initial GSO capability of a path.
fn offload() -> Offload {
    if Feature::UdpGso.is_forced_off() { Offload::OFF } else { Offload::default() }
}
