//! Taking connections in, and what stands at the door: allow-list, limits, descriptors.

use super::connection::{Connection, Phase, Side, reset_on_close};
use crate::listener::prepare_stream;
use crate::port::{Port, Refusal};
use crate::upstream::{Flow, is_exhaustion};
use crate::worker::{Message, PortState, Tag, Worker};
use rustix::net::{SocketFlags, acceptfrom_with};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tidegate_model::{Protocol, canonical};
use tidegate_reactor::{Context, Interest, Key, Permit};

/// Connections accepted from one port before other events have their turn.
const BATCH: usize = 64;

/// How long a port rests when descriptors have run out and none came back on this loop.
const REST: Duration = Duration::from_millis(50);

/// A client that was let in and has no backend yet.
#[derive(Debug)]
pub(crate) struct Accepted {
    client: OwnedFd,
    address: SocketAddr,
    port: Arc<Port>,
    permit: Permit,
}

impl Worker {
    /// Accepts what waits at port `key`.
    pub(crate) fn accept(&mut self, cx: &mut Context<'_>, key: Key) {
        for _ in 0..BATCH {
            let Some(PortState::Tcp { port, listener, .. }) = self.ports.get(key) else { return };
            // Two sockets: what cannot have both is left in the kernel's queue.
            let Some(permit) = self.shared.descriptors.take(2) else {
                self.scratch.pipes.shrink();
                return self.rest(cx, key);
            };
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let (client, address) = match acceptfrom_with(listener, flags) {
                Ok(accepted) => accepted,
                Err(rustix::io::Errno::AGAIN) => return,
                Err(errno) if is_exhaustion(&errno.into()) => return self.rest(cx, key),
                // The connection that was to be accepted is gone already (accept(2), "Error handling").
                Err(_) => continue,
            };
            let Some(address) = address.and_then(|address| SocketAddr::try_from(address).ok()) else {
                continue;
            };
            let accepted = Accepted { client, address: canonical(address), port: Arc::clone(port), permit };
            match self.admit(&accepted) {
                Ok(()) => self.place(cx, accepted),
                Err(refusal) => refuse(&accepted, refusal),
            }
        }
    }

    /// Whether the client may come in; if so it is counted.
    fn admit(&self, accepted: &Accepted) -> Result<(), Refusal> {
        let Port { options, stats, .. } = &*accepted.port;
        stats.accepted.fetch_add(1, Ordering::Relaxed);
        if options.allow.as_ref().is_some_and(|allow| !allow.contains(accepted.address.ip())) {
            return Err(Refusal::NotAllowed);
        }
        if stats.live.load(Ordering::Relaxed) >= options.max_connections {
            return Err(Refusal::PortLimit);
        }
        if self.shared.connections() >= self.shared.settings.max_connections {
            return Err(Refusal::TotalLimit);
        }
        Ok(())
    }

    /// Keeps the connection, or hands it to another loop if this one has all it can do.
    fn place(&mut self, cx: &mut Context<'_>, accepted: Accepted) {
        accepted.port.stats.live.fetch_add(1, Ordering::Relaxed);
        let saturated = self.meter.is_saturated(cx.now);
        let target = if saturated { self.shared.idlest() } else { self.index };
        self.shared.loads[target].fetch_add(1, Ordering::Relaxed);
        if target == self.index {
            self.adopt(cx, accepted);
        } else if let Err(Message::Adopt(accepted)) = self.shared.send(target, Message::Adopt(accepted)) {
            // No thread could be started: stay with the one there is.
            self.shared.loads[target].fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_add(1, Ordering::Relaxed);
            self.adopt(cx, accepted);
        }
    }

    /// Begins to dial the backend for a connection that is this loop's now.
    pub(crate) fn adopt(&mut self, cx: &mut Context<'_>, accepted: Accepted) {
        if let Err((accepted, refusal)) = self.dial(cx, accepted) {
            accepted.port.stats.live.fetch_sub(1, Ordering::Relaxed);
            self.shared.loads[self.index].fetch_sub(1, Ordering::Relaxed);
            refuse(&accepted, refusal);
        }
    }

    fn dial(&mut self, cx: &mut Context<'_>, accepted: Accepted) -> Result<(), (Accepted, Refusal)> {
        let options = Arc::clone(&accepted.port.options);
        let wants_local = options.proxy_protocol.is_some() || options.upstream.wants_local_address();
        let local = if wants_local { local_address(&accepted.client) } else { None };
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
        if let Err(error) = prepare_stream(&opened.socket) {
            return Err((accepted, refusal(&error)));
        }
        let header = options
            .proxy_protocol
            .map(|version| version.header(accepted.address, local.unwrap_or(accepted.port.label.address())));
        let deadline = cx.now + self.shared.settings.dial_timeout;
        let phase = Phase::Dialling { since: cx.now, deadline };
        let Accepted { client, port, permit, .. } = accepted;
        let connection = Connection::new(client, opened.socket, phase, port, header, opened.lease, permit);
        let key = self.connections.insert(connection);
        cx.timers.arm(deadline, Tag::Dial.token(key));
        let Some(connection) = self.connections.get(key) else { return Ok(()) };
        for (side, tag) in [(Side::Backend, Tag::Backend), (Side::Client, Tag::Client)] {
            if cx.epoll.add(connection.socket(side), tag.token(key), Interest::Edges).is_err() {
                self.refuse_connection(cx, key, Refusal::Exhausted);
                break;
            }
        }
        Ok(())
    }

    /// Stops accepting at port `key` until descriptors come back.
    fn rest(&mut self, cx: &mut Context<'_>, key: Key) {
        let Some(PortState::Tcp { listener, resting, port }) = self.ports.get_mut(key) else { return };
        if *resting || cx.epoll.remove(&*listener).is_err() {
            return;
        }
        *resting = true;
        self.shared.metrics.accept_pauses.increment(1);
        if self.shared.pause_log.is_due(cx.now) {
            tracing::warn!(
                publish = %port.label,
                limit = self.shared.descriptors.limit(),
                "accepting pauses: all file descriptors are in use; raise the limit (ulimit -n)"
            );
        }
        if self.resting.is_empty() {
            cx.timers.arm(cx.now + REST, Tag::Rest.token(key));
        }
        self.resting.push(key);
    }

    /// Accepts again at the ports that rest. Without descriptors they will rest again at once.
    pub(crate) fn wake_resting(&mut self, cx: &mut Context<'_>) {
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
