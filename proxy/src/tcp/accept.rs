//! Accepting connections: access check, limits, and file descriptors.

use super::connection::{Connection, Phase, reset_on_close};
use super::dial::Dial;
use super::shares::{Capacity, Holder, Reservation, Verdict};
use crate::port::{Port, Refusal, Tally};
use crate::shared::Message;
use crate::side::Side;
use crate::upstream::Flow;
use crate::worker::{PortState, Tag, Worker};
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tidegate_model::{Ingress, Protocol, PublishLabel, canonical, share_of};
use tidegate_reactor::{
    Context, Interest, Key, List, Permit, Readiness, is_exhaustion, says_destroyed, stream_ingress,
};

/// Maximum connections accepted from one port before the loop processes other events.
const BATCH: usize = 64;

/// Upper bound of the time to the first event of a new connection if the backend is on this host
/// and responds immediately. The loop busy-polls for this long after an accept. At 100 connections
/// per second, this costs 2% of a core.
const ANSWER: Duration = Duration::from_micros(200);

/// How long a port stops accepting when descriptors are exhausted and none is released on this
/// loop.
const PAUSE: Duration = Duration::from_millis(50);

/// Adaptive number of accept(2) calls per event. accept(2) allocates a socket and a file before it
/// returns `EAGAIN`, which costs more than a tenth of the system calls of a connection. So the loop
/// calls it only as often as it expects connections. If more are queued, the port stays readable.
#[derive(Debug)]
pub(crate) struct AcceptBatch {
    expected: usize,
    /// The last round that accepted `expected` connections.
    filled: Option<u64>,
}

impl Default for AcceptBatch {
    fn default() -> Self {
        Self { expected: 1, filled: None }
    }
}

impl AcceptBatch {
    /// Returns how many connections to accept in `round`. The number doubles if the
    /// previous round reached it.
    fn next_size(&mut self, round: u64) -> usize {
        if self.filled.is_some_and(|filled| filled + 1 == round) {
            self.expected = (2 * self.expected).min(BATCH);
        }
        self.expected
    }

    /// Records how many connections were accepted in `round`.
    fn record(&mut self, round: u64, count: usize) {
        if count == self.expected {
            self.filled = Some(round);
        } else {
            self.expected = count.max(1);
        }
    }
}

/// An accepted client without a backend connection.
#[derive(Debug)]
pub(crate) struct Accepted {
    client: OwnedFd,
    address: SocketAddr,
    /// The local address of the connection, if already determined.
    local: Option<SocketAddr>,
    pub(crate) port: Arc<Port>,
}

/// What to do with a client that this loop has no capacity for.
#[derive(Clone, Copy)]
enum Fallback {
    /// Keep the client and pause port `Key`, unless another loop can evict a connection for it.
    Wait(Key),
    /// Refuse the client because of this limit, or because descriptors are exhausted.
    Refuse(Refusal),
}

impl Accepted {
    fn holder(&self) -> Holder {
        Holder { client: share_of(self.address.ip()), port: self.port.id }
    }

    pub(crate) fn client_ip(&self) -> IpAddr {
        self.address.ip()
    }
}

impl Worker {
    /// Accepts queued connections of port `key`.
    pub(crate) fn accept(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(PortState::Tcp { accept_batch, .. }) = self.ports.get_mut(key) else { return };
        let expected = accept_batch.next_size(cx.round);
        let accepted = (0..expected).find(|_| !self.accept_one(cx, key)).unwrap_or(expected);
        if let Some(PortState::Tcp { accept_batch, .. }) = self.ports.get_mut(key) {
            accept_batch.record(cx.round, accepted);
        }
    }

    /// Accepts one queued connection of port `key`. Returns false if the queue is empty or
    /// descriptors are exhausted.
    fn accept_one(&mut self, cx: &mut Context<'_>, key: Key) -> bool {
        let Some(PortState::Tcp { port, listener, .. }) = self.ports.get(key) else { return false };
        // Two sockets. Without free descriptors, the decision depends on the client.
        let permit = self.shared.descriptors.take(2);
        if permit.is_none() && self.waiting.is_some() {
            self.pause_for_descriptors(cx, key);
            return false;
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (client, address) = match acceptfrom_with(listener, flags) {
            Ok(accepted) => accepted,
            Err(Errno::AGAIN) => return false,
            Err(errno) if is_exhaustion(&errno.into()) => {
                self.pause_for_descriptors(cx, key);
                return false;
            }
            Err(errno) if says_destroyed(&errno.into()) => return self.revive(cx, key),
            // The client has already reset the connection (accept(2), "Error handling").
            Err(_) => return true,
        };
        let Some(address) = address.and_then(|address| SocketAddr::try_from(address).ok()) else {
            return true;
        };
        let port = Arc::clone(port);
        let mut accepted = Accepted { client, address: canonical(address), local: None, port };
        match self.check_access(&mut accepted) {
            Ok(()) => self.admit(cx, accepted, permit, Fallback::Wait(key)),
            Err(refusal) => {
                refuse(&accepted, refusal);
                true
            }
        }
    }

    /// Admits a client, evicts a connection for it, or applies `fallback`. `permit` covers two
    /// descriptors and is `None` if none were free. Returns false if the client has to wait.
    fn admit(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        mut permit: Option<Permit>,
        fallback: Fallback,
    ) -> bool {
        let holder = accepted.holder();
        let capacity = self.capacity(&accepted.port, permit.as_ref());
        let verdict = self.shared.shares.admit(holder, self.index, capacity);
        match (verdict, fallback) {
            (Verdict::Admitted, _) => {
                // Another loop may have taken the last descriptors meanwhile.
                permit = permit.or_else(|| self.shared.descriptors.take(2));
                if let Some(permit) = permit {
                    self.place(cx, accepted, permit);
                    return true;
                }
                self.shared.shares.end(holder, self.index);
                match fallback {
                    Fallback::Wait(key) => return self.keep_waiting(cx, key, accepted),
                    Fallback::Refuse(_) => self.refuse_at_limit(cx, &accepted, Refusal::Exhausted),
                }
            }
            (Verdict::Refused(refusal), _) => self.refuse_at_limit(cx, &accepted, refusal),
            (Verdict::Evict { holder, at, limit }, _) if at == self.index => {
                self.evict_and_place(cx, accepted, holder, limit, permit);
            }
            (Verdict::Evict { at, limit, .. }, Fallback::Wait(_)) => {
                let message = Message::AdmitByEviction { accepted: Box::new(accepted), limit };
                if let Err(Message::AdmitByEviction { accepted, .. }) =
                    self.shared.send(at, message)
                {
                    self.refuse_at_limit(cx, &accepted, limit);
                }
            }
            (Verdict::Wait, Fallback::Wait(key)) => return self.keep_waiting(cx, key, accepted),
            (Verdict::Evict { .. } | Verdict::Wait, Fallback::Refuse(limit)) => {
                self.refuse_at_limit(cx, &accepted, limit);
            }
        }
        true
    }

    /// Admits a client that another loop accepted, by evicting a connection of this loop if `limit`
    /// still requires it.
    pub(crate) fn admit_forwarded(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        limit: Refusal,
    ) {
        let permit = self.shared.descriptors.take(2);
        self.admit(cx, accepted, permit, Fallback::Refuse(limit));
    }

    /// Returns the capacity for a connection to `port` with this `permit`.
    fn capacity(&self, port: &Port, permit: Option<&Permit>) -> Capacity {
        Capacity {
            port_limit: port.options.max_connections,
            descriptors: self.shared.descriptors.left() / 2 + usize::from(permit.is_some()),
            several_ports: self.shared.several_ports.load(Ordering::Relaxed),
        }
    }

    /// Evicts the connection of `victim` with the longest idle time and gives its place to
    /// `accepted`.
    fn evict_and_place(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        victim: Holder,
        limit: Refusal,
        permit: Option<Permit>,
    ) {
        let longest_idle = self.idle_order.get(&victim).and_then(List::oldest);
        let Some(longest_idle) = longest_idle else {
            return self.refuse_at_limit(cx, &accepted, limit);
        };
        if let Some(connection) = self.connections.get(longest_idle) {
            self.shared.log_limit(&connection.port, limit, cx.now);
        }
        self.shared.metrics.evicted(limit).increment(1);
        self.cut_connection(cx, longest_idle);
        let Some(permit) = permit.or_else(|| self.shared.descriptors.take(2)) else {
            return self.refuse_at_limit(cx, &accepted, Refusal::Exhausted);
        };
        let holder = accepted.holder();
        self.shared.shares.add(holder, self.index);
        self.place(cx, accepted, permit);
    }

    /// Keeps the client until descriptors are released, and pauses the port. Returns false.
    fn keep_waiting(&mut self, cx: &mut Context<'_>, key: Key, accepted: Accepted) -> bool {
        self.scratch.pipes.shrink();
        self.waiting = Some((key, accepted));
        self.pause_for_descriptors(cx, key);
        false
    }

    fn refuse_at_limit(&self, cx: &Context<'_>, accepted: &Accepted, limit: Refusal) {
        self.shared.log_limit(&accepted.port, limit, cx.now);
        refuse(accepted, limit);
    }

    /// Checks the allow-list and the gateway ACL.
    fn check_access(&self, accepted: &mut Accepted) -> Result<(), Refusal> {
        let Accepted { client, address, local, port, .. } = accepted;
        let Port { options, stats, label, .. } = &**port;
        stats.accepted.add(1);
        if options.allow.as_ref().is_some_and(|allow| !allow.contains(address.ip())) {
            return Err(Refusal::NotAllowed);
        }
        if !options.gateway_acl.is_empty() {
            let listen = label.address();
            let ingress = stream_ingress(client, listen.is_ipv6())
                .map_err(|error| refuse_unknown_ingress(*label, &error))?;
            *local = Some(SocketAddr::new(ingress.local, listen.port()));
            let ingress = Ingress {
                client: *address,
                destination: Some(ingress.local),
                to_group: false,
                interface: ingress.interface,
                handshake: true,
            };
            if options.gateway_acl.denies(&ingress) {
                return Err(Refusal::NotAllowed);
            }
        }
        Ok(())
    }

    /// Keeps the admitted connection, or passes it to another loop if this one is saturated.
    fn place(&mut self, cx: &mut Context<'_>, accepted: Accepted, permit: Permit) {
        let shares = Arc::clone(&self.shared.shares);
        let mut reservation = Reservation::new(shares, accepted.holder(), self.index, permit);
        accepted.port.stats.live.fetch_add(1, Ordering::Relaxed);
        let saturated = self.meter.is_saturated(cx.now);
        let target = if saturated { self.shared.least_loaded() } else { self.index };
        if !saturated {
            self.expects_until = Some(cx.now + ANSWER);
        }
        self.shared.loads[target].fetch_add(1, Ordering::Relaxed);
        if target == self.index {
            return self.adopt(cx, accepted, reservation);
        }
        reservation.hand_over(target);
        let message = Message::Adopt(Box::new((accepted, reservation)));
        if let Err(Message::Adopt(refused)) = self.shared.send(target, message) {
            let (accepted, mut reservation) = *refused;
            // No thread could be started, so the connection stays in this loop.
            self.shared.loads[target].fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_add(1, Ordering::Relaxed);
            reservation.hand_over(self.index);
            self.adopt(cx, accepted, reservation);
        }
    }

    /// Dials the backend for a connection that this loop now owns.
    pub(crate) fn adopt(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        reservation: Reservation,
    ) {
        if accepted.port.closed.load(Ordering::Relaxed) {
            accepted.port.stats.live.fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
            return reset_on_close(&accepted.client);
        }
        if let Err((accepted, refusal)) = self.dial(cx, accepted, reservation) {
            accepted.port.stats.live.fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
            refuse(&accepted, refusal);
        }
    }

    fn dial(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        reservation: Reservation,
    ) -> Result<(), (Accepted, Refusal)> {
        let options = Arc::clone(&accepted.port.options);
        let wants_local =
            options.proxy_protocol.is_some() || options.upstream.wants_local_address();
        let known = accepted.local;
        let local =
            if wants_local { known.or_else(|| local_address(&accepted.client)) } else { None };
        let flow = Flow {
            protocol: Protocol::Tcp,
            client: accepted.address,
            local,
            container_port: accepted.port.container_port,
        };
        let opened = match options.upstream.open(&flow) {
            Ok(opened) => opened,
            Err(error) => {
                tracing::debug!(publish = %accepted.port.label, %error, "backend dial failed");
                return Err((accepted, refusal(&error)));
            }
        };
        let header = options.proxy_protocol.map(|version| {
            version.header(accepted.address, local.unwrap_or(accepted.port.label.address()))
        });
        let deadline = cx.now + self.shared.settings.dial_timeout;
        let phase = Phase::Dialling { since: cx.now, deadline };
        let holder = reservation.holder();
        let Accepted { client, port, .. } = accepted;
        let mut connection =
            Connection::new(client, opened.socket, phase, port, header, opened.lease, reservation);
        connection.dial = opened.backend.map(|backend| Box::new(Dial::new(flow, backend)));
        let key = self.connections.insert(connection);
        let idle_order = self.idle_order.entry(holder).or_default();
        idle_order.append(&mut self.connections, key, |connection| &mut connection.links);
        self.try_immediately(cx, key);
        self.register(cx, key);
        Ok(())
    }

    /// Polls both sockets once and forwards the first payload: on one host the connect has often
    /// completed and the first message of the client has arrived.
    fn try_immediately(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get(key) else { return };
        let sides = [Side::Backend, Side::Client];
        let ready = Readiness::of(sides.map(|side| connection.socket(side).as_fd()));
        let outcomes = sides
            .into_iter()
            .zip(ready)
            .map(|(side, ready)| self.apply_readiness(cx, key, side, ready));
        // Both sides, the backend first: payload of the client can be forwarded only after the
        // connect.
        if outcomes.fold(false, |_, open| open) {
            self.run_connection(cx, key);
        }
    }

    /// Registers connection `key` with epoll, unless it has ended already.
    fn register(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        if let Phase::Dialling { deadline, .. } = connection.phase {
            cx.timers.arm(deadline, Tag::Dial.token(key));
        }
        for (side, tag) in [(Side::Backend, Tag::Backend), (Side::Client, Tag::Client)] {
            let interest = connection.interest(side);
            if cx.epoll.add(connection.socket(side), tag.token(key), interest).is_err() {
                return self.refuse_connection(cx, key, Refusal::Exhausted);
            }
        }
        self.begin_hedging(cx, key);
    }

    /// Adds writability to the epoll interest of each side of connection `key` that blocks a half.
    /// Until then epoll reports readability only.
    pub(crate) fn watch_writable(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        for (side, tag) in [(Side::Backend, Tag::Backend), (Side::Client, Tag::Client)] {
            if !connection.must_watch_writable(side) {
                continue;
            }
            let interest = connection.interest(side);
            if cx.epoll.modify(connection.socket(side), tag.token(key), interest).is_err() {
                tracing::debug!(publish = %connection.port.label, "epoll registration failed; connection cut");
                return self.cut_connection(cx, key);
            }
        }
    }

    /// Makes the socket of port `key` listen again after accept(2) has reported that it does not.
    /// Returns whether more connections may be queued.
    fn revive(&mut self, cx: &mut Context<'_>, key: Key) -> bool {
        let Some(PortState::Tcp { listener, port, .. }) = self.ports.get(key) else { return false };
        match listener.revive() {
            // The socket still listens; the error was about the client.
            Ok(false) => true,
            Ok(true) => {
                self.shared.metrics.revived.increment(1);
                log_revived(port.label);
                true
            }
            Err(error) => {
                tracing::error!(publish = %port.label, kind = "listener", %error, "destroyed by other software; not restored");
                self.pause(cx, key);
                false
            }
        }
    }

    /// Pauses port `key` because descriptors are exhausted.
    fn pause_for_descriptors(&mut self, cx: &mut Context<'_>, key: Key) {
        if !self.pause(cx, key) {
            return;
        }
        let Some(PortState::Tcp { port, .. }) = self.ports.get(key) else { return };
        self.shared.metrics.accept_pauses.increment(1);
        if self.shared.pause_log.is_due(cx.now) {
            tracing::warn!(
                publish = %port.label,
                limit = self.shared.descriptors.limit(),
                "accepting paused: file descriptors exhausted; raise the limit (ulimit -n)"
            );
        }
    }

    /// Stops accepting at port `key` for [`PAUSE`]. Returns false if it was already paused.
    fn pause(&mut self, cx: &mut Context<'_>, key: Key) -> bool {
        let Some(PortState::Tcp { listener, paused, .. }) = self.ports.get_mut(key) else {
            return false;
        };
        if *paused || cx.epoll.remove(&*listener).is_err() {
            return false;
        }
        *paused = true;
        if self.paused.is_empty() {
            cx.timers.arm(cx.now + PAUSE, Tag::Resume.token(key));
        }
        self.paused.push(key);
        true
    }

    /// Resumes accepting at all paused ports. They pause again if descriptors are still exhausted.
    pub(crate) fn resume_accepting(&mut self, cx: &mut Context<'_>) {
        if let Some((key, accepted)) = self.waiting.take() {
            let permit = self.shared.descriptors.take(2);
            // If the client still has to wait, its port stays paused.
            if !self.admit(cx, accepted, permit, Fallback::Wait(key)) {
                if !self.paused.is_empty() {
                    cx.timers.arm(cx.now + PAUSE, Tag::Resume.token(key));
                }
                return;
            }
        }
        for key in std::mem::take(&mut self.paused) {
            if let Some(PortState::Tcp { listener, paused, .. }) = self.ports.get_mut(key) {
                if cx.epoll.add(&*listener, Tag::Port.token(key), Interest::Readable).is_ok() {
                    *paused = false;
                } else {
                    if self.paused.is_empty() {
                        cx.timers.arm(cx.now + PAUSE, Tag::Resume.token(key));
                    }
                    self.paused.push(key);
                }
            }
        }
    }
}

/// Logs that the destroyed socket of a port was restored.
pub(crate) fn log_revived(publish: PublishLabel) {
    tracing::warn!(%publish, kind = "listener", "destroyed by other software; restored");
}

/// Without the ingress interface the ACL cannot be evaluated, so the client is refused.
fn refuse_unknown_ingress(label: PublishLabel, error: &io::Error) -> Refusal {
    tracing::debug!(publish = %label, %error, "ingress interface of connection unknown");
    Refusal::NotAllowed
}

/// Refuses a client with a reset; a FIN would look like a response.
fn refuse(accepted: &Accepted, refusal: Refusal) {
    accepted.port.stats.refuse(refusal);
    tracing::debug!(publish = %accepted.port.label, reason = refusal.as_str(), "connection refused");
    reset_on_close(&accepted.client);
}

/// Maps an error of a dial to its reason.
pub(crate) fn refusal(error: &io::Error) -> Refusal {
    match error.kind() {
        _ if is_exhaustion(error) => Refusal::Exhausted,
        io::ErrorKind::ConnectionRefused => Refusal::BackendRefused,
        io::ErrorKind::TimedOut => Refusal::DialTimeout,
        _ => Refusal::BackendUnreachable,
    }
}

fn local_address(client: &OwnedFd) -> Option<SocketAddr> {
    let address = rustix::net::getsockname(client).ok()?;
    SocketAddr::try_from(address).ok().map(canonical)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the accept limit of each round, for pairs of a round and the number of queued
    /// connections.
    fn batch_sizes(arrivals: &[(u64, usize)]) -> Vec<usize> {
        let mut accept_batch = AcceptBatch::default();
        let ask = |(round, waiting): &(u64, usize)| {
            let expected = accept_batch.next_size(*round);
            accept_batch.record(*round, expected.min(*waiting));
            expected
        };
        arrivals.iter().map(ask).collect()
    }

    #[test]
    fn single_connections_are_accepted_one_per_event() {
        assert_eq!(batch_sizes(&[(1, 1), (3, 1), (5, 1), (9, 1)]), [1, 1, 1, 1]);
    }

    #[test]
    fn the_accept_batch_doubles_while_connections_are_queued_and_then_shrinks() {
        let queued: Vec<_> = (1..=8).map(|round| (round, 1000)).collect();
        assert_eq!(batch_sizes(&queued), [1, 2, 4, 8, 16, 32, 64, 64]);
        assert_eq!(
            batch_sizes(&[(1, 9), (2, 8), (3, 6), (4, 2), (5, 1), (6, 1)]),
            [1, 2, 4, 8, 2, 1]
        );
    }
}
