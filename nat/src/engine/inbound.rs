//! Published ports: connections and datagrams from clients to containers through the device.
//!
//! # Theory of operation
//! A published port is a socket of the host. Its clients create flows in the same table as those of
//! the guest, under the five-tuple that the guest sees:
//!
//! ```text
//!  client ─► socket ─► access guard ─► client address:  ─no─► gateway address:
//!                          │           five-tuple free?         one of 64 ports free?
//!                          │ deny          │ yes                  │ yes         │ no
//!                          ▼               ▼                      ▼             ▼
//!                    reset or drop ◄─yes─ limit reached? ◄────────┘       reset or drop
//!                                          │ no
//!                                          ▼
//!                                 TCP: SYN, UDP: datagram
//! ```
//!
//! - TCP: an accepted client becomes a connection in [`Phase::SynSent`](crate::tcp::conn::Phase),
//!   and then behaves like any other connection.
//! - UDP: each pair of client and local address has a session. It has no socket: replies are sent
//!   from the socket of the port, from the address that the client used. Only a client creates a
//!   session, so the guest can use the port only to reply.
//!
//! Without a free descriptor, clients wait in the accept queue of the kernel, and the engine
//! accepts again after a pause. At a limit of flows, another client flow of the container is
//! evicted. At the limit of one client, its own oldest session is evicted, or its next connection
//! is reset.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::datagrams::{Session, SessionSocket};
use super::published::Published;
use super::tcp::is_exhaustion;
use super::{Engine, Flow};
use crate::flow_table::{Admission, Class, FlowKey, Limit, Origin};
use crate::forward::{Forward, ForwardId, ForwardSource, Guard};
use crate::host::{Arrival, Batch, Host, Port, Ready};
use crate::metrics::{DropReason, FlowKind, ForwardStats};
use crate::tcp::Connection;
use crate::tcp::conn::{Inbound, Phase};
use crate::wire::protocol;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use tidegate_model::{Direction, Ingress, Protocol, canonical};
use tidegate_reactor::Key;

/// Maximum number of clients accepted per port and turn.
const CLIENTS_PER_TURN: usize = 64;

/// Maximum number of batches received per port and turn.
const BATCHES_PER_TURN: usize = 4;

/// Maximum number of gateway ports to try for a flow.
const TRIES: u16 = 64;

impl<H: Host> Engine<H> {
    /// Publishes a port with socket `port`.
    ///
    /// # Errors
    /// The socket cannot be added to epoll.
    pub fn publish(
        &mut self,
        id: ForwardId,
        forward: Forward,
        port: Port<H::Listener, H::Datagrams>,
        guard: Option<Arc<dyn Guard>>,
        stats: Arc<ForwardStats>,
    ) -> io::Result<()> {
        let host = &mut self.host;
        let published = Published { id, forward, port, guard, stats };
        self.ports.insert(published, |port, key| host.watch_port(port, key))
    }

    /// Closes a published port. TCP connections continue. UDP sessions end, because they use its
    /// socket.
    pub fn unpublish(&mut self, id: ForwardId) -> bool {
        let Some(key) = self.ports.key_of(id) else { return false };
        for session in self.clients.sessions_at(key) {
            self.end(session, false);
        }
        self.ports.remove(id);
        true
    }

    /// Handles readiness of a published port. The key may be stale.
    pub fn port_ready(&mut self, key: Key, ready: Ready, now: Instant) {
        if ready.error {
            // The error queue keeps the socket ready until it is drained.
            self.forward_port_errors(key, now);
        }
        match self.ports.get(key).map(|published| &published.port) {
            Some(Port::Tcp(_)) => self.accept(key, now),
            Some(Port::Udp(_)) => self.receive_at(key, now),
            None => {}
        }
    }

    fn accept(&mut self, key: Key, now: Instant) {
        for _ in 0..CLIENTS_PER_TURN {
            let Some(published) = self.ports.get_mut(key) else { return };
            let Port::Tcp(listener) = &mut published.port else { return };
            match self.host.accept(listener) {
                Ok((stream, client)) => self.accept_client(key, stream, client, now),
                Err(error)
                    if is_exhaustion(&error) && error.kind() != io::ErrorKind::WouldBlock =>
                {
                    if self.evict_for_descriptor(now) {
                        continue;
                    }
                    self.count_limit_drop(DropReason::Descriptors, None, now);
                    if let Some(published) = self.ports.get(key) {
                        self.host.ignore_port(&published.port);
                        self.ports.pause(key, now);
                    }
                    return;
                }
                // No client is queued, or it has disconnected (`ECONNABORTED`). The socket is
                // level-triggered.
                Err(_) => return,
            }
        }
    }

    /// Handles an accepted client: checks access and limits, and sends a SYN to the guest.
    fn accept_client(&mut self, key: Key, stream: H::Stream, client: SocketAddr, now: Instant) {
        let Some(published) = self.ports.get(key) else { return };
        let (forward, stats) = (published.forward, Arc::clone(&published.stats));
        let client = canonical(client);
        let host = &self.host;
        let admits = |guard: &Arc<dyn Guard>| {
            let ingress = host.ingress(&stream);
            guard.admits(&Ingress {
                client,
                destination: ingress.map(|ingress| ingress.local),
                to_group: false,
                interface: ingress.map_or(0, |ingress| ingress.interface),
                handshake: true,
            })
        };
        let admitted = published.guard.as_ref().is_none_or(admits);
        let five_tuple = match self.is_at_client_limit(client.ip()) {
            _ if !admitted => Err(DropReason::Denied),
            true => Err(DropReason::ClientLimit),
            false => self.five_tuple(&forward, &stats, client, now),
        };
        let (five_tuple, admission) = match five_tuple {
            Ok(admitted) => admitted,
            Err(reason) => {
                stats.count_drop(reason, 1);
                self.stats.resets.add(1);
                self.host.abort(stream);
                return self.count_refused_client(reason, now);
            }
        };
        let opening = self.opening(&five_tuple, now);
        let mut connection = Connection::to_guest(opening, stream, &mut self.io(now));
        connection.inbound = Some(Inbound { stats: Arc::clone(&stats), client: client.ip() });
        let flow = Flow::Tcp(Box::new(connection));
        let inserted = self.flows.insert(five_tuple, admission, Class::Connection, flow, now);
        let Some(flow) = inserted else { return };
        self.clients.begin_connection(client.ip());
        self.count_new_flow(FlowKind::Tcp, now);
        stats.flows.add(1);
        stats.flows_begun.add(1);
        let watched = match self.flows.get_mut(flow) {
            Some((_, Flow::Tcp(connection))) => connection.watched_as(flow, &mut self.host),
            _ => return,
        };
        if watched.is_err() {
            self.count_limit_drop(DropReason::Descriptors, None, now);
            return self.end(flow, true);
        }
        self.arm_stream(flow);
    }

    /// Selects the five-tuple of a client flow and admits the flow.
    fn five_tuple(
        &mut self,
        forward: &Forward,
        stats: &ForwardStats,
        client: SocketAddr,
        now: Instant,
    ) -> Result<(FlowKey, Admission), DropReason> {
        let guest = forward.guest;
        if client.port() == 0 || client.ip().is_unspecified() || client.ip().is_multicast() {
            return Err(DropReason::Malformed);
        }
        if client == guest {
            // Its replies would loop back to the guest.
            return Err(DropReason::Denied);
        }
        if !self.settings.policy.accepts_source(guest.ip()) {
            return Err(DropReason::Policy);
        }
        let (number, class) = match forward.protocol {
            Protocol::Tcp => (protocol::TCP, Class::Connection),
            Protocol::Udp | Protocol::Sctp => (protocol::UDP, Class::Tentative),
        };
        let own = FlowKey { inside: guest, outside: client, protocol: number };
        let shows_client = forward.source == ForwardSource::Client
            && self.may_show_client(client.ip(), guest.ip());
        let five_tuple =
            if shows_client && client.is_ipv4() == guest.is_ipv4() && self.free_five_tuple(&own) {
                own
            } else {
                if shows_client {
                    stats.fallbacks.add(1);
                }
                self.gateway_five_tuple(own).ok_or(DropReason::Conflict)?
            };
        let network = self.settings.policy.network_of(guest.ip());
        let admitted = self.flows.admit(guest.ip(), network, Origin::Outside, now);
        self.stats.sources.set(self.flows.sources() as u64);
        let admission = admitted.map_err(super::drop_reason)?;
        if !self.make_room(guest.ip(), Origin::Outside, class, now) {
            return Err(DropReason::TableFull);
        }
        Ok((five_tuple, admission))
    }

    /// Whether the guest may see the client address. It must not if its replies would bypass the
    /// engine, or if programs trust the address.
    fn may_show_client(&self, client: IpAddr, guest: IpAddr) -> bool {
        let policy = &self.settings.policy;
        let is_of_a_link = match client {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        !(client.is_loopback()
            || is_of_a_link
            || client == guest
            || policy.is_own(client)
            || policy.is_neighbour(client)
            || self.host.is_local(client))
    }

    /// Whether the five-tuple is free. Ends a flow in [`Phase::Lingering`](crate::tcp::conn::Phase)
    /// that uses it.
    fn free_five_tuple(&mut self, five_tuple: &FlowKey) -> bool {
        let Some(flow) = self.flows.find(five_tuple) else { return true };
        let lingers = matches!(
            self.flows.get(flow),
            Some(Flow::Tcp(connection)) if connection.phase() == Phase::Lingering
        );
        if lingers {
            self.end(flow, false);
        }
        lingers
    }

    /// A five-tuple for the same guest with the gateway as its remote side.
    fn gateway_five_tuple(&mut self, five_tuple: FlowKey) -> Option<FlowKey> {
        let guest = five_tuple.inside.ip();
        let gateways = &self.settings.policy.gateways;
        let gateway =
            *gateways.iter().find(|ip| ip.is_ipv4() == guest.is_ipv4() && **ip != guest)?;
        for _ in 0..TRIES {
            let outside = SocketAddr::new(gateway, self.gateway_ports.advance());
            let key = FlowKey { outside, ..five_tuple };
            if self.flows.find(&key).is_none() {
                return Some(key);
            }
        }
        None
    }

    fn receive_at(&mut self, key: Key, now: Instant) {
        for _ in 0..BATCHES_PER_TURN {
            let Some(published) = self.ports.get_mut(key) else { return };
            let Port::Udp(socket) = &mut published.port else { return };
            match self.host.receive(socket, &mut self.batch) {
                Ok(_) => self.deliver_port_batch(key, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.forward_port_errors(key, now),
            }
        }
    }

    /// Writes received datagrams of a port to its guest. Consecutive datagrams of one client are
    /// written together.
    fn deliver_port_batch(&mut self, key: Key, now: Instant) {
        let mut start = 0;
        while start < self.batch.len() {
            let asks = |batch: &H::Batch, index| (batch.source(index), batch.arrival(index));
            let asked = asks(&self.batch, start);
            let run = start + 1..self.batch.len();
            let end =
                run.take_while(|index| asks(&self.batch, *index) == asked).last().unwrap_or(start)
                    + 1;
            let messages = start..end;
            start = end;
            let (client, arrival) = asked;
            let Some(client) = client.map(canonical) else { continue };
            match self.session_of(key, client, &arrival, now) {
                Ok(flow) => self.deliver_to_session(flow, messages, now),
                Err(reason) => {
                    let datagrams = self.datagrams(messages.clone());
                    if let Some(published) = self.ports.get(key) {
                        published.stats.count_drop(reason, datagrams);
                    }
                    messages.skip(1).for_each(|_| self.stats.count_drop(reason));
                    self.count_refused_client(reason, now);
                }
            }
        }
    }

    /// Counts a refusal. Refusals caused by a limit are also logged.
    fn count_refused_client(&mut self, reason: DropReason, now: Instant) {
        match reason {
            DropReason::Denied | DropReason::Malformed | DropReason::Policy => {
                self.stats.count_drop(reason);
            }
            limit => self.count_limit_drop(limit, None, now),
        }
    }

    fn deliver_to_session(&mut self, flow: Key, messages: Range<usize>, now: Instant) {
        self.flows.touch(flow, false, now);
        let datagrams = self.datagrams(messages.clone());
        let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(flow) else { return };
        if let SessionSocket::Port { stats, .. } = &session.via {
            let bytes = messages.clone().map(|index| self.batch.get(index).0.len() as u64);
            stats.carried(Direction::In, bytes.sum(), datagrams);
        }
        self.deliver(five_tuple, messages);
    }

    /// Number of datagrams in `messages` of the batch.
    fn datagrams(&self, messages: Range<usize>) -> u64 {
        let count = |index| {
            let (bytes, segment) = self.batch.get(index);
            bytes.len().div_ceil(segment.max(1)).max(1) as u64
        };
        messages.map(count).sum()
    }

    /// Returns the session of a client, and creates it if necessary.
    fn session_of(
        &mut self,
        port: Key,
        address: SocketAddr,
        arrival: &Arrival,
        now: Instant,
    ) -> Result<Key, DropReason> {
        let &Arrival { local, destination, to_group, interface } = arrival;
        let client = (port, address, local);
        let published = self.ports.get(port).ok_or(DropReason::Denied)?;
        let ingress =
            Ingress { client: address, destination, to_group, interface, handshake: false };
        let admits = |guard: &Arc<dyn Guard>| guard.admits(&ingress);
        // Existing sessions are checked as well: a spoofed datagram may differ only by its
        // interface.
        if !published.guard.as_ref().is_none_or(admits) {
            return Err(DropReason::Denied);
        }
        if let Some(flow) = self.clients.session(&client) {
            return Ok(flow);
        }
        let (forward, stats) = (published.forward, Arc::clone(&published.stats));
        self.make_room_for_client(address.ip(), now);
        let (five_tuple, admission) = self.five_tuple(&forward, &stats, address, now)?;
        let via = SessionSocket::Port { port, client: address, local, stats: Arc::clone(&stats) };
        let session = Flow::Datagrams(Box::new(Session::for_client(via)));
        let flow = self.flows.insert(five_tuple, admission, Class::Tentative, session, now);
        let flow = flow.ok_or(DropReason::Sources)?;
        if let Some((_, Flow::Datagrams(session))) = self.flows.get_mut(flow) {
            session.key = Some(flow);
        }
        self.clients.begin_session(client, flow);
        self.count_new_flow(FlowKind::Udp, now);
        stats.flows.add(1);
        stats.flows_begun.add(1);
        self.arm_session(flow);
        Ok(flow)
    }

    /// Whether a client has reached its limit of TCP connections. One third of the flows of a
    /// container is reserved for other clients.
    fn is_at_client_limit(&self, client: IpAddr) -> bool {
        let limits = &self.settings.limits;
        let most = limits.sessions_per_client.min((limits.flows_per_source * 2 / 3).max(1));
        self.clients.connections(client) >= most
    }

    /// Evicts a session of the client if it has reached its limit.
    fn make_room_for_client(&mut self, client: IpAddr, now: Instant) {
        let limit = self.settings.limits.sessions_per_client;
        let Some(client_sessions) = self.clients.share_of(client) else { return };
        let flows = &self.flows;
        client_sessions.compact(|flow| flows.get(flow).is_some());
        if client_sessions.held < limit {
            return;
        }
        let victim = client_sessions
            .oldest(|flow| flows.get(flow).is_some(), |flow| flows.is_unanswered(flow));
        if let Some((five_tuple, flow)) = victim.and_then(|victim| self.flows.remove(victim)) {
            self.finish_eviction(five_tuple, flow, Limit::Client, now);
        }
    }

    /// Forwards ICMP errors of a port about replies to the guest.
    fn forward_port_errors(&mut self, key: Key, now: Instant) {
        for _ in 0..CLIENTS_PER_TURN {
            let Some(published) = self.ports.get_mut(key) else { return };
            let guest = published.forward.guest;
            let Port::Udp(socket) = &mut published.port else { return };
            let Some(found) = self.host.next_socket_error(socket) else { return };
            // The guest does not know a client that appears as the gateway, so such an error is
            // dropped.
            let Some(client) = found.destination.map(canonical) else { continue };
            let five_tuple = FlowKey { inside: guest, outside: client, protocol: protocol::UDP };
            let is_answer = |flow| matches!(self.flows.get(flow), Some(Flow::Datagrams(s)) if s.belongs_to_port(key));
            if self.flows.find(&five_tuple).is_some_and(is_answer) {
                self.send_session_error(
                    five_tuple,
                    found.icmp_error,
                    found.offender,
                    &found.payload,
                    now,
                );
            }
        }
    }

    /// The published ports.
    pub fn published(&self) -> Vec<ForwardId> {
        self.ports.ids()
    }

    /// Removes the accounting of a session of a published port.
    pub(super) fn remove_client_session(&mut self, via: &SessionSocket<H::Datagrams>) {
        if let SessionSocket::Port { port, client, local, stats } = via {
            self.clients.end_session(&(*port, *client, *local));
            stats.flows.sub();
        }
    }

    /// Counts an eviction at its published port.
    pub(super) fn count_port_eviction(&self, flow: &Flow<H>) {
        let stats = match flow {
            Flow::Datagrams(session) => session.port_stats(),
            Flow::Tcp(connection) => connection.inbound.as_ref().map(|inbound| &*inbound.stats),
        };
        if let Some(stats) = stats {
            stats.evicted.add(1);
        }
    }
}

/// Whether `guest` is a valid container address and port.
pub(crate) fn can_be_a_guest(guest: SocketAddr) -> bool {
    let ip = guest.ip();
    let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    let link_local = matches!(ip, IpAddr::V6(ip) if Ipv6Addr::is_unicast_link_local(&ip));
    let nowhere =
        ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast || link_local;
    guest.port() != 0 && !nowhere && ip == ip.to_canonical()
}
