//! Published ports: clients of the host's network come in through the device.
//!
//! # Theory of operation
//! A published port is a socket of the host's. What comes there becomes a flow of the same table
//! that the guest's own flows are in, under the five-tuple that the guest will see:
//!
//! ```text
//!  client ─► socket ─► may it ask here? ─► which address does it show? ─► five-tuple free? ─no─► the gateway, and another port
//!                          │ no                                               │ yes                 │ none of 64 is free
//!                          ▼                                                  ▼                     ▼
//!                   reset, or silence ◄──────── no ◄─────── limits? ◄─────────┴─────────────────────┘ refused
//!                                                             │ yes
//!                                                             ▼
//!                                               TCP: our SYN   UDP: the datagram
//! ```
//!
//! - TCP: a client that was accepted has a connection that calls
//!   ([`Phase::Calling`](crate::tcp::conn::Phase)); from there on it is one like any other.
//! - UDP: a session for each client and each of our addresses that it asks at. It has no socket:
//!   answers leave by the port's, from the address that was asked. Nothing that the guest sends
//!   goes that way but answers, for only a client makes a session.
//!
//! Where descriptors are short clients wait in the kernel's queue, and the port is looked at again
//! after a moment. At a limit of flows another flow of the container's clients yields. At the limit
//! of one client its own oldest session ends, or its next connection is reset.

use super::datagrams::{Session, Via};
use super::tcp::is_exhaustion;
use super::{Engine, Flow};
use crate::flow_table::{Admission, Class, FlowKey, Limit, Origin};
use crate::forward::{Forward, ForwardId, ForwardSource, Guard};
use crate::host::{Arrival, Batch, Host, Port, Ready};
use crate::metrics::{DropReason, FlowKind, ForwardStats};
use crate::tcp::Connection;
use crate::tcp::conn::{Inbound, Phase};
use crate::wire::protocol;
use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::{Ingress, Protocol, share_of};
use tidegate_reactor::Key;

/// Clients accepted of one port before others have their turn.
const CLIENTS_PER_TURN: usize = 64;

/// Batches received of one port before others have their turn.
const BATCHES_PER_TURN: usize = 4;

/// Ports of the gateway that are tried for a flow.
const TRIES: u16 = 64;

/// The first port that the gateway is shown with; those before belong to services.
const FIRST_PORT: u16 = 1024;

/// When a port is looked at again that had to be left for want of descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// A published port.
pub(super) struct Published<H: Host> {
    id: ForwardId,
    forward: Forward,
    port: Port<H::Listener, H::Datagrams>,
    guard: Option<Arc<dyn Guard>>,
    stats: Arc<ForwardStats>,
}

/// The sessions of one client of published ports.
#[derive(Debug, Default)]
pub(super) struct OfClient {
    held: usize,
    /// In the order in which they began; some have ended.
    begun: VecDeque<Key>,
}

/// Sessions of a client that are looked at for one that nobody has answered.
const OLDEST: usize = 64;

impl OfClient {
    fn begin(&mut self, flow: Key) {
        self.held += 1;
        self.begun.push_back(flow);
    }

    /// Forgets those that have ended, when they are more than half.
    fn tidy(&mut self, is_there: impl Fn(Key) -> bool) {
        if self.begun.len() > 2 * self.held + OLDEST {
            self.begun.retain(|flow| is_there(*flow));
        }
    }

    /// The one that yields: the oldest unanswered one of the first few, or the oldest.
    fn oldest(
        &mut self,
        is_there: impl Fn(Key) -> bool,
        is_unanswered: impl Fn(Key) -> bool,
    ) -> Option<Key> {
        while self.begun.front().is_some_and(|flow| !is_there(*flow)) {
            self.begun.pop_front();
        }
        let unanswered = self.begun.iter().take(OLDEST).find(|flow| is_unanswered(**flow));
        unanswered.or(self.begun.front()).copied()
    }
}

impl<H: Host> Published<H> {
    pub(super) fn port_mut(&mut self) -> &mut Port<H::Listener, H::Datagrams> {
        &mut self.port
    }
}

/// Who asks at which port, and at which address of ours.
pub(super) type Client = (Key, SocketAddr, Option<IpAddr>);

impl<H: Host> Engine<H> {
    /// Opens a published port: `port` is its socket.
    ///
    /// # Errors
    /// The kernel watches no more sockets.
    pub fn publish(
        &mut self,
        id: ForwardId,
        forward: Forward,
        port: Port<H::Listener, H::Datagrams>,
        guard: Option<Arc<dyn Guard>>,
        stats: Arc<ForwardStats>,
    ) -> io::Result<()> {
        let key = self.ports.insert(Published { id, forward, port, guard, stats });
        if let Some(published) = self.ports.get(key)
            && let Err(error) = self.host.watch_port(&published.port, key)
        {
            self.ports.remove(key);
            return Err(error);
        }
        self.ports_by_id.insert(id, key);
        Ok(())
    }

    /// Closes a published port. Connections go on; sessions, which leave by nothing else, end.
    pub fn unpublish(&mut self, id: ForwardId) -> bool {
        let Some(key) = self.ports_by_id.remove(&id) else { return false };
        let sessions: Vec<Key> = self
            .clients
            .iter()
            .filter(|(client, _)| client.0 == key)
            .map(|(_, flow)| *flow)
            .collect();
        for session in sessions {
            self.end(session, false);
        }
        self.ports.remove(key).is_some()
    }

    /// Something waits at a published port. The key may be stale.
    pub fn port_ready(&mut self, key: Key, ready: Ready, now: Instant) {
        if ready.error {
            // It would be told of for as long as it is in the queue, whoever has met with it first.
            self.tell_port_problems(key, now);
        }
        match self.ports.get(key).map(|published| &published.port) {
            Some(Port::Tcp(_)) => self.accept(key, now),
            Some(Port::Udp(_)) => self.receive_at(key, now),
            None => {}
        }
    }

    /// Looks at the ports again that were left alone for a while.
    pub(super) fn resume_ports(&mut self, now: Instant) {
        if self.resume_at.is_none_or(|at| now < at) {
            return;
        }
        self.resume_at = None;
        for key in std::mem::take(&mut self.paused) {
            if let Some(published) = self.ports.get(key)
                && self.host.watch_port(&published.port, key).is_err()
            {
                self.pause(key, now);
            }
        }
    }

    fn pause(&mut self, key: Key, now: Instant) {
        self.paused.push(key);
        self.resume_at.get_or_insert(now + PAUSE);
    }

    fn accept(&mut self, key: Key, now: Instant) {
        for _ in 0..CLIENTS_PER_TURN {
            let Some(published) = self.ports.get_mut(key) else { return };
            let Port::Tcp(listener) = &mut published.port else { return };
            match self.host.accept(listener) {
                Ok((stream, client)) => self.welcome(key, stream, client, now),
                Err(error)
                    if is_exhaustion(&error) && error.kind() != io::ErrorKind::WouldBlock =>
                {
                    if self.give_up_a_flow(now) {
                        continue;
                    }
                    self.at_a_limit(DropReason::Descriptors, None, now);
                    if let Some(published) = self.ports.get(key) {
                        self.host.ignore_port(&published.port);
                        self.pause(key, now);
                    }
                    return;
                }
                // Nobody waits, or who waited is gone (`ECONNABORTED`): what is left is told again.
                Err(_) => return,
            }
        }
    }

    /// A client has connected: the guest is asked whether it takes it.
    fn welcome(&mut self, key: Key, stream: H::Stream, client: SocketAddr, now: Instant) {
        let Some(published) = self.ports.get(key) else { return };
        let (forward, stats) = (published.forward, Arc::clone(&published.stats));
        let client = canonical(client);
        let host = &self.host;
        let admits = |guard: &Arc<dyn Guard>| {
            let told = host.ingress(&stream);
            guard.admits(&Ingress {
                client,
                destination: told.map(|told| told.local),
                to_group: false,
                interface: told.map_or(0, |told| told.interface),
                handshake: true,
            })
        };
        let admitted = published.guard.as_ref().is_none_or(admits);
        let five_tuple = match self.has_its_share(client.ip()) {
            _ if !admitted => Err(DropReason::ShutOut),
            true => Err(DropReason::ClientLimit),
            false => self.five_tuple(&forward, &stats, client, now),
        };
        let (five_tuple, admission) = match five_tuple {
            Ok(admitted) => admitted,
            Err(reason) => {
                stats.refuse(reason, 1);
                self.stats.resets.add(1);
                self.host.abort(stream);
                return self.refuse_client(reason, now);
            }
        };
        let opening = self.opening(&five_tuple, now);
        let mut connection = Connection::call(opening, stream, &mut self.io(now));
        connection.inbound =
            Some(Inbound { stats: Arc::clone(&stats), client: share_of(client.ip()) });
        let flow = Flow::Tcp(Box::new(connection));
        let inserted = self.flows.insert(five_tuple, admission, Class::Connection, flow, now);
        let Some(flow) = inserted else { return };
        *self.connections.entry(share_of(client.ip())).or_default() += 1;
        self.begun(FlowKind::Tcp, now);
        stats.flows.add(1);
        stats.flows_begun.add(1);
        let watched = match self.flows.get_mut(flow) {
            Some((_, Flow::Tcp(connection))) => connection.watched_as(flow, &mut self.host),
            _ => return,
        };
        if watched.is_err() {
            self.at_a_limit(DropReason::Descriptors, None, now);
            return self.end(flow, true);
        }
        self.arm_stream(flow);
    }

    /// The five-tuple under which the guest is to see a client's flow, which is within the limits.
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
            // It would be answered by itself, and so on.
            return Err(DropReason::ShutOut);
        }
        if !self.settings.policy.knows(guest.ip()) {
            return Err(DropReason::Policy);
        }
        let (number, class) = match forward.protocol {
            Protocol::Tcp => (protocol::TCP, Class::Connection),
            Protocol::Udp | Protocol::Sctp => (protocol::UDP, Class::Tentative),
        };
        let own = FlowKey { inside: guest, outside: client, protocol: number };
        let shows_itself =
            forward.source == ForwardSource::Client && self.may_show(client.ip(), guest.ip());
        let five_tuple =
            if shows_itself && client.is_ipv4() == guest.is_ipv4() && self.make_free(&own) {
                own
            } else {
                if shows_itself {
                    stats.fallbacks.add(1);
                }
                self.behind_gateway(own).ok_or(DropReason::Conflict)?
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

    /// Whether a client may be shown as itself: not if it would be answered past us, or trusted for
    /// its address.
    fn may_show(&self, client: IpAddr, guest: IpAddr) -> bool {
        let policy = &self.settings.policy;
        let is_of_a_link = match client {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        !(client.is_loopback()
            || is_of_a_link
            || client == guest
            || policy.is_own(client)
            || policy.sources.iter().any(|net| net.contains(&client))
            || self.host.is_local(client))
    }

    /// Whether no flow has this five-tuple: one that only lingers makes way.
    fn make_free(&mut self, five_tuple: &FlowKey) -> bool {
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

    /// A five-tuple for the same guest with the gateway as its far end.
    fn behind_gateway(&mut self, five_tuple: FlowKey) -> Option<FlowKey> {
        let guest = five_tuple.inside.ip();
        let gateways = &self.settings.policy.gateways;
        let gateway =
            *gateways.iter().find(|ip| ip.is_ipv4() == guest.is_ipv4() && **ip != guest)?;
        for _ in 0..TRIES {
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT).max(FIRST_PORT);
            let key = FlowKey { outside: SocketAddr::new(gateway, self.next_port), ..five_tuple };
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
                Ok(_) => self.hand_over(key, now),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.tell_port_problems(key, now),
            }
        }
    }

    /// Writes what has come to a port to its guest, neighbours of one client together.
    fn hand_over(&mut self, key: Key, now: Instant) {
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
                Ok(flow) => self.hand_over_to(flow, messages, now),
                Err(reason) => {
                    let datagrams = self.datagrams(messages.clone());
                    if let Some(published) = self.ports.get(key) {
                        published.stats.refuse(reason, datagrams);
                    }
                    messages.skip(1).for_each(|_| self.stats.refuse(reason));
                    self.refuse_client(reason, now);
                }
            }
        }
    }

    /// Counts a refusal; limits are something to be told.
    fn refuse_client(&mut self, reason: DropReason, now: Instant) {
        match reason {
            DropReason::ShutOut | DropReason::Malformed | DropReason::Policy => {
                self.stats.refuse(reason);
            }
            limit => self.at_a_limit(limit, None, now),
        }
    }

    fn hand_over_to(&mut self, flow: Key, messages: Range<usize>, now: Instant) {
        self.flows.touch(flow, false, now);
        let datagrams = self.datagrams(messages.clone());
        let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(flow) else { return };
        if let Via::Port { stats, .. } = &session.via {
            let bytes = messages.clone().map(|index| self.batch.get(index).0.len() as u64);
            stats.carried(1, bytes.sum(), datagrams);
        }
        self.deliver(five_tuple, messages);
    }

    /// How many datagrams `messages` of the batch are.
    fn datagrams(&self, messages: Range<usize>) -> u64 {
        let count = |index| {
            let (bytes, segment) = self.batch.get(index);
            bytes.len().div_ceil(segment.max(1)).max(1) as u64
        };
        messages.map(count).sum()
    }

    /// The session of `client`, made if there is none yet.
    fn session_of(
        &mut self,
        port: Key,
        address: SocketAddr,
        arrival: &Arrival,
        now: Instant,
    ) -> Result<Key, DropReason> {
        let &Arrival { local, destination, to_group, interface } = arrival;
        let client = (port, address, local);
        let published = self.ports.get(port).ok_or(DropReason::ShutOut)?;
        let ingress =
            Ingress { client: address, destination, to_group, interface, handshake: false };
        let admits = |guard: &Arc<dyn Guard>| guard.admits(&ingress);
        // Of one that has a session too: a forged datagram may differ by its interface alone.
        if !published.guard.as_ref().is_none_or(admits) {
            return Err(DropReason::ShutOut);
        }
        if let Some(flow) = self.clients.get(&client) {
            return Ok(*flow);
        }
        let (forward, stats) = (published.forward, Arc::clone(&published.stats));
        self.make_room_for_client(address.ip(), now);
        let (five_tuple, admission) = self.five_tuple(&forward, &stats, address, now)?;
        let via = Via::Port { port, client: address, local, stats: Arc::clone(&stats) };
        let session = Flow::Datagrams(Session::of_a_client(via));
        let flow = self.flows.insert(five_tuple, admission, Class::Tentative, session, now);
        let flow = flow.ok_or(DropReason::Sources)?;
        if let Some((_, Flow::Datagrams(session))) = self.flows.get_mut(flow) {
            session.key = Some(flow);
        }
        self.clients.insert(client, flow);
        self.sessions.entry(share_of(address.ip())).or_default().begin(flow);
        self.begun(FlowKind::Udp, now);
        stats.flows.add(1);
        stats.flows_begun.add(1);
        self.arm_session(flow);
        Ok(flow)
    }

    /// Whether a client has as many TCP connections as it may: of what one container may have, a
    /// third is left for others.
    fn has_its_share(&self, client: IpAddr) -> bool {
        let limits = &self.settings.limits;
        let most = limits.sessions_per_client.min((limits.flows_per_source * 2 / 3).max(1));
        self.connections.get(&share_of(client)).is_some_and(|held| *held >= most)
    }

    /// A connection of a client, which is known by its share, has ended.
    pub(super) fn forget_connection_of(&mut self, client: IpAddr) {
        if let Entry::Occupied(mut held) = self.connections.entry(client) {
            *held.get_mut() -= 1;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }

    /// Ends a session of the client's own if it has as many as it may.
    fn make_room_for_client(&mut self, client: IpAddr, now: Instant) {
        let limit = self.settings.limits.sessions_per_client;
        let Some(of_client) = self.sessions.get_mut(&share_of(client)) else { return };
        let flows = &self.flows;
        of_client.tidy(|flow| flows.get(flow).is_some());
        if of_client.held < limit {
            return;
        }
        let victim =
            of_client.oldest(|flow| flows.get(flow).is_some(), |flow| flows.is_unanswered(flow));
        if let Some((five_tuple, flow)) = victim.and_then(|victim| self.flows.remove(victim)) {
            self.evicted(five_tuple, flow, Limit::Client, now);
        }
    }

    /// Tells the guest what the network told a port about answers.
    fn tell_port_problems(&mut self, key: Key, now: Instant) {
        for _ in 0..CLIENTS_PER_TURN {
            let Some(published) = self.ports.get_mut(key) else { return };
            let guest = published.forward.guest;
            let Port::Udp(socket) = &mut published.port else { return };
            let Some(found) = self.host.next_problem(socket) else { return };
            // A client that does not show itself is nobody that the guest has heard of.
            let Some(client) = found.destination.map(canonical) else { continue };
            let five_tuple = FlowKey { inside: guest, outside: client, protocol: protocol::UDP };
            let is_answer = |flow| matches!(self.flows.get(flow), Some(Flow::Datagrams(s)) if s.is_of_port(key));
            if self.flows.find(&five_tuple).is_some_and(is_answer) {
                self.tell_session(five_tuple, found.problem, found.offender, &found.payload, now);
            }
        }
    }

    /// A session of a published port has ended.
    pub(super) fn forget_client(&mut self, via: &Via<H::Datagrams>) {
        if let Via::Port { port, client, local, stats } = via {
            self.clients.remove(&(*port, *client, *local));
            stats.flows.sub();
            if let Entry::Occupied(mut held) = self.sessions.entry(share_of(client.ip())) {
                held.get_mut().held -= 1;
                if held.get().held == 0 {
                    held.remove();
                }
            }
        }
    }

    /// A flow has made room for another.
    pub(super) fn evicted_at_port(&self, flow: &Flow<H>) {
        match flow {
            Flow::Datagrams(Session { via: Via::Port { stats, .. }, .. }) => stats.evicted.add(1),
            Flow::Tcp(connection) => {
                if let Some(inbound) = &connection.inbound {
                    inbound.stats.evicted.add(1);
                }
            }
            Flow::Datagrams(_) => {}
        }
    }

    /// Which ports are open.
    pub fn published(&self) -> Vec<ForwardId> {
        self.ports.iter().map(|(_, published)| published.id).collect()
    }
}

/// An address as it is compared: a mapped one is the IPv4 address, and a scope says nothing to the
/// guest.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => address,
        _ => SocketAddr::new(address.ip().to_canonical(), address.port()),
    }
}

/// Whether a container can be there.
pub(crate) fn can_be_a_guest(guest: SocketAddr) -> bool {
    let ip = guest.ip();
    let broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    let link_local = matches!(ip, IpAddr::V6(ip) if Ipv6Addr::is_unicast_link_local(&ip));
    let nowhere =
        ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast || link_local;
    guest.port() != 0 && !nowhere && ip == ip.to_canonical()
}
