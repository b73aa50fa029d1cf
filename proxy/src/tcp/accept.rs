//! Taking connections in, and what stands at the door: allow-list, limits, descriptors.

use super::connection::{Connection, Phase, Side, reset_on_close};
use super::shares::{Holder, Room, Seat, Verdict};
use crate::port::{Port, Refusal, Tally};
use crate::upstream::{Flow, is_exhaustion};
use crate::worker::{Message, PortState, Tag, Worker};
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tidegate_model::{Ingress, Protocol, PublishLabel, canonical, share_of};
use tidegate_reactor::{
    Context, Interest, Key, List, Permit, Readiness, says_destroyed, stream_ingress,
};

/// Connections accepted from one port before other events have their turn.
const BATCH: usize = 64;

/// How soon after a connection its next event comes, where the backend is on this host and answers
/// at once, and what may be spent on looking out for it: 100 connections a second cost 2% of a
/// core.
const ANSWER: Duration = Duration::from_micros(200);

/// How long a port rests when descriptors have run out and none came back on this loop.
const REST: Duration = Duration::from_millis(50);

/// How many connections arrive at a port at a time. accept(2) makes a socket and its file before it
/// finds out that nobody waits, which costs more than a tenth of a connection's system calls; so it
/// is asked only for as many as there will be. Those that it is not asked for keep the port
/// readable.
#[derive(Debug)]
pub(crate) struct Crowd {
    expected: usize,
    /// The last round in which as many came.
    filled: Option<u64>,
}

impl Default for Crowd {
    fn default() -> Self {
        Self { expected: 1, filled: None }
    }
}

impl Crowd {
    /// How many to accept in `round`: twice as many as last time, if that was the round before and
    /// there were more.
    fn expect(&mut self, round: u64) -> usize {
        if self.filled.is_some_and(|filled| filled + 1 == round) {
            self.expected = (2 * self.expected).min(BATCH);
        }
        self.expected
    }

    /// So many came.
    fn came(&mut self, round: u64, count: usize) {
        if count == self.expected {
            self.filled = Some(round);
        } else {
            self.expected = count.max(1);
        }
    }
}

/// A client that has come in and has no backend yet.
#[derive(Debug)]
pub(crate) struct Accepted {
    client: OwnedFd,
    address: SocketAddr,
    /// The address of ours that it connected to, where that was needed already.
    local: Option<SocketAddr>,
    pub(crate) port: Arc<Port>,
}

/// What becomes of a client for which there is no place in this loop.
#[derive(Clone, Copy)]
enum NoPlace {
    /// It waits, and its port with it, unless another loop has a connection that can end for it.
    Wait(Key),
    /// It is refused, for this limit or for want of descriptors.
    Refuse(Refusal),
}

impl Accepted {
    fn holder(&self) -> Holder {
        Holder { client: share_of(self.address.ip()), port: self.port.id }
    }
}

impl Worker {
    /// Accepts what waits at port `key`.
    pub(crate) fn accept(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(PortState::Tcp { crowd, .. }) = self.ports.get_mut(key) else { return };
        let expected = crowd.expect(cx.round);
        let came = (0..expected).find(|_| !self.accept_one(cx, key)).unwrap_or(expected);
        if let Some(PortState::Tcp { crowd, .. }) = self.ports.get_mut(key) {
            crowd.came(cx.round, came);
        }
    }

    /// Accepts the next one that waits at port `key`; false if there is none, or none can be taken.
    fn accept_one(&mut self, cx: &mut Context<'_>, key: Key) -> bool {
        let Some(PortState::Tcp { port, listener, .. }) = self.ports.get(key) else { return false };
        // Two sockets. Where there are none left, it depends on who comes.
        let permit = self.shared.descriptors.take(2);
        if permit.is_none() && self.waiting.is_some() {
            self.rest(cx, key);
            return false;
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (client, address) = match acceptfrom_with(listener, flags) {
            Ok(accepted) => accepted,
            Err(Errno::AGAIN) => return false,
            Err(errno) if is_exhaustion(&errno.into()) => {
                self.rest(cx, key);
                return false;
            }
            Err(errno) if says_destroyed(&errno.into()) => return self.revive(cx, key),
            // The connection that was to be accepted is gone already (accept(2), "Error handling").
            Err(_) => return true,
        };
        let Some(address) = address.and_then(|address| SocketAddr::try_from(address).ok()) else {
            return true;
        };
        let port = Arc::clone(port);
        let mut accepted = Accepted { client, address: canonical(address), local: None, port };
        match self.admit(&mut accepted) {
            Ok(()) => self.seat(cx, accepted, permit, NoPlace::Wait(key)),
            Err(refusal) => {
                refuse(&accepted, refusal);
                true
            }
        }
    }

    /// Finds a place for a client, with a `permit` for two descriptors if there was one; false if
    /// it has to wait.
    fn seat(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        mut permit: Option<Permit>,
        no_place: NoPlace,
    ) -> bool {
        let holder = accepted.holder();
        let room = self.room(&accepted.port, permit.as_ref());
        let verdict = self.shared.shares.admit(holder, self.index, room);
        match (verdict, no_place) {
            (Verdict::Room, _) => {
                // Another loop may have taken the last ones meanwhile.
                permit = permit.or_else(|| self.shared.descriptors.take(2));
                if let Some(permit) = permit {
                    self.place(cx, accepted, permit);
                    return true;
                }
                self.shared.shares.end(holder, self.index);
                match no_place {
                    NoPlace::Wait(key) => return self.keep_waiting(cx, key, accepted),
                    NoPlace::Refuse(_) => self.refuse_at_limit(cx, &accepted, Refusal::Exhausted),
                }
            }
            (Verdict::Refused(refusal), _) => self.refuse_at_limit(cx, &accepted, refusal),
            (Verdict::InPlaceOf { holder, at, limit }, _) if at == self.index => {
                self.supplant(cx, accepted, holder, limit, permit);
            }
            (Verdict::InPlaceOf { at, limit, .. }, NoPlace::Wait(_)) => {
                let message = Message::Supplant { accepted: Box::new(accepted), limit };
                if let Err(Message::Supplant { accepted, .. }) = self.shared.send(at, message) {
                    self.refuse_at_limit(cx, &accepted, limit);
                }
            }
            (Verdict::Wait, NoPlace::Wait(key)) => return self.keep_waiting(cx, key, accepted),
            (Verdict::InPlaceOf { .. } | Verdict::Wait, NoPlace::Refuse(limit)) => {
                self.refuse_at_limit(cx, &accepted, limit);
            }
        }
        true
    }

    /// Finds a place for a client that another loop accepted, and for which a connection of this
    /// loop has to end for `limit`, as things were then.
    pub(crate) fn seat_here(&mut self, cx: &mut Context<'_>, accepted: Accepted, limit: Refusal) {
        let permit = self.shared.descriptors.take(2);
        self.seat(cx, accepted, permit, NoPlace::Refuse(limit));
    }

    /// What there is for a connection to `port`, which has this `permit`.
    fn room(&self, port: &Port, permit: Option<&Permit>) -> Room {
        Room {
            port_limit: port.options.max_connections,
            descriptors: self.shared.descriptors.left() / 2 + usize::from(permit.is_some()),
            among_others: self.shared.several_ports.load(Ordering::Relaxed),
        }
    }

    /// Cuts the connection of `victim` that has carried nothing for longest, and gives its place
    /// away.
    fn supplant(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        victim: Holder,
        limit: Refusal,
        permit: Option<Permit>,
    ) {
        let idlest = self.silence.get(&victim).and_then(List::oldest);
        let Some(idlest) = idlest else { return self.refuse_at_limit(cx, &accepted, limit) };
        if let Some(connection) = self.connections.get(idlest) {
            self.shared.log_limit(&connection.port, limit, cx.now);
        }
        self.shared.metrics.evicted(limit).increment(1);
        self.cut_connection(cx, idlest);
        let Some(permit) = permit.or_else(|| self.shared.descriptors.take(2)) else {
            return self.refuse_at_limit(cx, &accepted, Refusal::Exhausted);
        };
        let holder = accepted.holder();
        self.shared.shares.add(holder, self.index);
        self.place(cx, accepted, permit);
    }

    /// Keeps the client until descriptors come back, and accepts nobody meanwhile; false.
    fn keep_waiting(&mut self, cx: &mut Context<'_>, key: Key, accepted: Accepted) -> bool {
        self.scratch.pipes.shrink();
        self.waiting = Some((key, accepted));
        self.rest(cx, key);
        false
    }

    fn refuse_at_limit(&self, cx: &Context<'_>, accepted: &Accepted, limit: Refusal) {
        self.shared.log_limit(&accepted.port, limit, cx.now);
        refuse(accepted, limit);
    }

    /// Whether the client may come in, as far as it depends on who it is.
    fn admit(&self, accepted: &mut Accepted) -> Result<(), Refusal> {
        let Accepted { client, address, local, port, .. } = accepted;
        let Port { options, stats, label, .. } = &**port;
        stats.accepted.add(1);
        if options.allow.as_ref().is_some_and(|allow| !allow.contains(address.ip())) {
            return Err(Refusal::NotAllowed);
        }
        if !options.gateway_acl.is_empty() {
            let listen = label.address();
            let ingress = stream_ingress(client, listen.is_ipv6())
                .map_err(|error| ingress_unknown(*label, &error))?;
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

    /// Keeps the connection, which is in the book, or hands it to another loop if this one has all
    /// it can do.
    fn place(&mut self, cx: &mut Context<'_>, accepted: Accepted, permit: Permit) {
        let shares = Arc::clone(&self.shared.shares);
        let mut seat = Seat::new(shares, accepted.holder(), self.index, permit);
        accepted.port.stats.live.fetch_add(1, Ordering::Relaxed);
        let saturated = self.meter.is_saturated(cx.now);
        let target = if saturated { self.shared.idlest() } else { self.index };
        if !saturated {
            self.expects_until = Some(cx.now + ANSWER);
        }
        self.shared.loads[target].fetch_add(1, Ordering::Relaxed);
        if target == self.index {
            return self.adopt(cx, accepted, seat);
        }
        seat.hand_over(target);
        let message = Message::Adopt(Box::new((accepted, seat)));
        if let Err(Message::Adopt(refused)) = self.shared.send(target, message) {
            let (accepted, mut seat) = *refused;
            // No thread could be started: stay with the one there is.
            self.shared.loads[target].fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_add(1, Ordering::Relaxed);
            seat.hand_over(self.index);
            self.adopt(cx, accepted, seat);
        }
    }

    /// Begins to dial the backend for a connection that is this loop's now.
    pub(crate) fn adopt(&mut self, cx: &mut Context<'_>, accepted: Accepted, seat: Seat) {
        if accepted.port.closed.load(Ordering::Relaxed) {
            accepted.port.stats.live.fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
            return reset_on_close(&accepted.client);
        }
        if let Err((accepted, refusal)) = self.dial(cx, accepted, seat) {
            accepted.port.stats.live.fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
            refuse(&accepted, refusal);
        }
    }

    fn dial(
        &mut self,
        cx: &mut Context<'_>,
        accepted: Accepted,
        seat: Seat,
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
                tracing::debug!(publish = %accepted.port.label, %error, "backend cannot be dialled");
                return Err((accepted, refusal(&error)));
            }
        };
        let header = options.proxy_protocol.map(|version| {
            version.header(accepted.address, local.unwrap_or(accepted.port.label.address()))
        });
        let deadline = cx.now + self.shared.settings.dial_timeout;
        let phase = Phase::Dialling { since: cx.now, deadline };
        let holder = seat.holder();
        let Accepted { client, port, .. } = accepted;
        let connection =
            Connection::new(client, opened.socket, phase, port, header, opened.lease, seat);
        let key = self.connections.insert(connection);
        let silence = self.silence.entry(holder).or_default();
        silence.append(&mut self.connections, key, |connection| &mut connection.links);
        self.make_a_start(cx, key);
        self.watch(cx, key);
        Ok(())
    }

    /// Does at once what can be done at once: on one host, often the whole connect and the client's
    /// first message.
    fn make_a_start(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get(key) else { return };
        let sides = [Side::Backend, Side::Client];
        let ready = Readiness::of(sides.map(|side| connection.socket(side).as_fd()));
        let learnt =
            sides.into_iter().zip(ready).map(|(side, ready)| self.learn(cx, key, side, ready));
        // Both, and in this order: what the client says first has a meaning only when there is a
        // backend.
        if learnt.fold(false, |_, open| open) {
            self.take_turn(cx, key);
        }
    }

    /// Has epoll watch connection `key`, if there was not an end to it at the start.
    fn watch(&mut self, cx: &mut Context<'_>, key: Key) {
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
    }

    /// Has epoll tell of room on a side that connection `key` waits for, from the first time that
    /// there is none.
    pub(crate) fn watch_for_room(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        for (side, tag) in [(Side::Backend, Tag::Backend), (Side::Client, Tag::Client)] {
            if !connection.must_watch_for_room(side) {
                continue;
            }
            let interest = connection.interest(side);
            if cx.epoll.modify(connection.socket(side), tag.token(key), interest).is_err() {
                tracing::debug!(publish = %connection.port.label, "a connection cannot be watched and is cut");
                return self.cut_connection(cx, key);
            }
        }
    }

    /// Has the socket of port `key`, of which accept(2) says that it does not listen, listen again.
    /// Whether more may wait there.
    fn revive(&mut self, cx: &mut Context<'_>, key: Key) -> bool {
        let Some(PortState::Tcp { listener, port, .. }) = self.ports.get(key) else { return false };
        match listener.revive() {
            // The client has gone.
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

    /// Stops accepting at port `key` until descriptors come back.
    fn rest(&mut self, cx: &mut Context<'_>, key: Key) {
        if !self.pause(cx, key) {
            return;
        }
        let Some(PortState::Tcp { port, .. }) = self.ports.get(key) else { return };
        self.shared.metrics.accept_pauses.increment(1);
        if self.shared.pause_log.is_due(cx.now) {
            tracing::warn!(
                publish = %port.label,
                limit = self.shared.descriptors.limit(),
                "accepting pauses: all file descriptors are in use; raise the limit (ulimit -n)"
            );
        }
    }

    /// Stops accepting at port `key` for a while. Whether it had not yet.
    fn pause(&mut self, cx: &mut Context<'_>, key: Key) -> bool {
        let Some(PortState::Tcp { listener, resting, .. }) = self.ports.get_mut(key) else {
            return false;
        };
        if *resting || cx.epoll.remove(&*listener).is_err() {
            return false;
        }
        *resting = true;
        if self.resting.is_empty() {
            cx.timers.arm(cx.now + REST, Tag::Rest.token(key));
        }
        self.resting.push(key);
        true
    }

    /// Accepts again at the ports that rest. Without descriptors they will rest again at once.
    pub(crate) fn wake_resting(&mut self, cx: &mut Context<'_>) {
        if let Some((key, accepted)) = self.waiting.take() {
            let permit = self.shared.descriptors.take(2);
            // One that has to wait still leaves its port at rest.
            if !self.seat(cx, accepted, permit, NoPlace::Wait(key)) {
                if !self.resting.is_empty() {
                    cx.timers.arm(cx.now + REST, Tag::Rest.token(key));
                }
                return;
            }
        }
        for key in std::mem::take(&mut self.resting) {
            if let Some(PortState::Tcp { listener, resting, .. }) = self.ports.get_mut(key) {
                if cx.epoll.add(&*listener, Tag::Port.token(key), Interest::Readable).is_ok() {
                    *resting = false;
                } else {
                    if self.resting.is_empty() {
                        cx.timers.arm(cx.now + REST, Tag::Rest.token(key));
                    }
                    self.resting.push(key);
                }
            }
        }
    }
}

/// The socket of a port was destroyed, and answers again.
pub(crate) fn log_revived(publish: PublishLabel) {
    tracing::warn!(%publish, kind = "listener", "destroyed by other software; restored");
}

/// The kernel does not report by which interface a client came, so the ACL cannot be applied.
fn ingress_unknown(label: PublishLabel, error: &io::Error) -> Refusal {
    tracing::debug!(publish = %label, %error, "ingress interface of a connection unknown");
    Refusal::NotAllowed
}

/// Turns a client away at the door, with a reset: it must not take it for an answer.
fn refuse(accepted: &Accepted, refusal: Refusal) {
    accepted.port.stats.refuse(refusal);
    tracing::debug!(publish = %accepted.port.label, reason = refusal.as_str(), "connection refused");
    reset_on_close(&accepted.client);
}

/// What an error on the way to the backend means.
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

    /// What accept(2) is asked for in each round in which the port is readable, with so many
    /// waiting then.
    fn asked(arrivals: &[(u64, usize)]) -> Vec<usize> {
        let mut crowd = Crowd::default();
        let ask = |(round, waiting): &(u64, usize)| {
            let expected = crowd.expect(*round);
            crowd.came(*round, expected.min(*waiting));
            expected
        };
        arrivals.iter().map(ask).collect()
    }

    #[test]
    fn those_who_come_one_by_one_are_accepted_without_asking_for_a_second() {
        assert_eq!(asked(&[(1, 1), (3, 1), (5, 1), (9, 1)]), [1, 1, 1, 1]);
    }

    #[test]
    fn a_crowd_is_met_with_ever_more_up_to_a_batch_and_forgotten_when_it_is_gone() {
        let crowd: Vec<_> = (1..=8).map(|round| (round, 1000)).collect();
        assert_eq!(asked(&crowd), [1, 2, 4, 8, 16, 32, 64, 64]);
        assert_eq!(asked(&[(1, 9), (2, 8), (3, 6), (4, 2), (5, 1), (6, 1)]), [1, 2, 4, 8, 2, 1]);
    }
}
