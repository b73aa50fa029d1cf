//! Sessions of datagrams: UDP, and echoes, which are much the same.
//!
//! # Theory of operation
//! A session has a connected socket of its own: the kernel delivers to it what its far end sends,
//! and nobody else's. It is *tentative* until the far end has answered and *assured* from then on
//! ([`Class`]); silent for its time, or in the way when the table is full, it ends. UDP promises no
//! delivery: what does not fit into a buffer is dropped and counted.
//!
//! A session of a published port ([`Via::Port`]) has no socket: a client has begun it, and the
//! guest's answers leave by the port's. It is the guest whose answer makes it assured.
//!
//! With [`Mapping::EndpointIndependent`] the far ends of one container's socket share a session,
//! whose socket is not connected, and the session remembers whom the container has sent to: they
//! alone are let in.
//!
//! Datagrams leave in GSO batches ([`GsoBatch`](crate::gso_batch::GsoBatch)), and arrive in them if
//! the kernel has merged them (`UDP_GRO`); those of a batch that are alike are merged into one
//! write, which the guest's kernel takes apart again where the program reads them. One that is
//! larger than the device's packets is written in fragments.

use super::inbound::Published;
use super::tcp::{is_exhaustion, problem};
use super::{Engine, Flow};
use crate::flow_table::{Class, FlowKey};
use crate::gso_batch::BatchKey;
use crate::host::{Batch, DatagramKind, Destination, Host, Port, Ready, SendOutcome};
use crate::metrics::{DropReason, FlowKind, ForwardStats, Stats};
use crate::policy::{DNS, Way};
use crate::settings::{Mapping, Timeouts};
use crate::wire::head::{self, MAX_PACKET};
use crate::wire::icmp::Problem;
use crate::wire::ip::Packet;
use crate::wire::udp::{self, Datagram};
use crate::wire::virtio::{Segmentation, VirtioHeader};
use crate::wire::{icmp, protocol};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_reactor::Key;
use tidegate_reactor::batch::{MAX_BATCH_BYTES, MAX_SEGMENTS, next_group};

/// Batches received of one session before others have their turn.
const BATCHES_PER_TURN: usize = 4;

/// Entries of an error queue told to the guest at a time.
const PROBLEMS_PER_TURN: usize = 16;

/// Far ends that a shared socket lets in; one more, and the one that was sent to first is a
/// stranger again.
const PEERS: usize = 64;

/// Hop limits below this are meant (traceroute); above it they are some system's default.
const HOPS_THAT_MATTER: u8 = 33;

/// By what a session reaches its far end.
#[derive(Debug)]
pub(super) enum Via<D> {
    /// A socket of its own.
    Own(D),
    /// A published port's.
    Port {
        /// Which port's.
        port: Key,
        /// The far end.
        client: SocketAddr,
        /// The address of ours that it asks at.
        local: Option<IpAddr>,
        /// The port's figures.
        stats: Arc<ForwardStats>,
    },
}

/// A session, and how it reaches its far end.
#[derive(Debug)]
pub(super) struct Session<D> {
    pub(super) via: Via<D>,
    kind: DatagramKind,
    /// The far end is not where the guest believes.
    mapped: bool,
    /// Of a shared socket, whom the guest has sent to, the latest last.
    peers: VecDeque<IpAddr>,
    dns: bool,
    readable: bool,
    troubled: bool,
    pub(super) queued: bool,
    pub(super) timer: Option<Instant>,
    pub(super) key: Option<Key>,
}

impl<D> Session<D> {
    /// One of a published port's client.
    pub(super) fn of_a_client(via: Via<D>) -> Self {
        Self::new(via, DatagramKind::Udp)
    }

    fn new(via: Via<D>, kind: DatagramKind) -> Self {
        Self {
            via,
            kind,
            mapped: false,
            peers: VecDeque::new(),
            dns: false,
            readable: false,
            troubled: false,
            queued: false,
            timer: None,
            key: None,
        }
    }

    /// Whether it is one of published port `key`.
    pub(super) fn is_of_port(&self, key: Key) -> bool {
        matches!(self.via, Via::Port { port, .. } if port == key)
    }

    pub(super) fn kind(&self) -> FlowKind {
        match self.kind {
            DatagramKind::Udp | DatagramKind::SharedUdp => FlowKind::Udp,
            DatagramKind::Echo => FlowKind::Icmp,
        }
    }

    fn is_shared(&self) -> bool {
        self.kind == DatagramKind::SharedUdp
    }

    /// Lets in what comes from `peer`.
    fn let_in(&mut self, peer: IpAddr) {
        if self.peers.len() >= PEERS {
            self.peers.pop_front();
        }
        self.peers.push_back(peer);
    }

    pub(super) fn note(&mut self, ready: Ready) {
        self.readable |= ready.readable || ready.error;
        self.troubled |= ready.error;
    }

    fn patience(&self, class: Class, timeouts: &Timeouts) -> Duration {
        match (self.kind, class) {
            (DatagramKind::Echo, _) => timeouts.echo,
            _ if self.dns => timeouts.dns,
            (_, Class::Tentative) => timeouts.udp_tentative,
            _ => timeouts.udp_assured,
        }
    }
}

impl<H: Host> Engine<H> {
    pub(super) fn udp_packet(&mut self, packet: &Packet<'_>, header: VirtioHeader, now: Instant) {
        let segment = usize::from(header.segment);
        let batch = header.segmentation == Segmentation::Udp && segment > 0;
        let Ok(datagram) = Datagram::parse(packet, batch, header.verify) else {
            return self.stats.refuse(DropReason::Malformed);
        };
        let key = FlowKey {
            inside: SocketAddr::new(packet.source, datagram.source),
            outside: SocketAddr::new(packet.destination, datagram.destination),
            protocol: protocol::UDP,
        };
        // What a gateway stands for is none of the far ends that find one another by STUN.
        let shared = self.settings.mapping == Mapping::EndpointIndependent
            && !self.settings.policy.is_own(packet.destination)
            && self.flows.find(&key).is_none();
        let kind = if shared { DatagramKind::SharedUdp } else { DatagramKind::Udp };
        let Some(flow) = self.session(packet, key, kind, now) else { return };
        let answers = matches!(
            self.flows.get(flow),
            Some(Flow::Datagrams(Session { via: Via::Port { .. }, .. }))
        );
        self.flows.touch(flow, answers, now);
        let batch_key = BatchKey { to: shared.then_some(key.outside), ..batch_key(flow, packet) };
        if batch && datagram.payload.len() > segment {
            self.send_gso_batch(now);
            let whole = MAX_SEGMENTS.min(MAX_BATCH_BYTES / segment).max(1) * segment;
            for part in datagram.payload.chunks(whole) {
                self.send(batch_key, part, segment, now);
            }
        } else if !self.gso_batch.push(batch_key, datagram.payload) {
            self.send_gso_batch(now);
            self.gso_batch.push(batch_key, datagram.payload);
        }
    }

    pub(super) fn echo_request(
        &mut self,
        packet: &Packet<'_>,
        identifier: u16,
        message: &[u8],
        now: Instant,
    ) {
        if self.settings.policy.is_own(packet.destination) {
            return self.echo_reply(packet.destination, packet.source, None, message);
        }
        let kind = if packet.source.is_ipv6() { protocol::ICMPV6 } else { protocol::ICMP };
        let key = FlowKey {
            inside: SocketAddr::new(packet.source, identifier),
            outside: SocketAddr::new(packet.destination, 0),
            protocol: kind,
        };
        let Some(flow) = self.session(packet, key, DatagramKind::Echo, now) else { return };
        self.flows.touch(flow, false, now);
        self.send_gso_batch(now);
        self.send(batch_key(flow, packet), message, message.len(), now);
    }

    /// The session of `packet`, made if there is none yet; `None` if there may be none, which the
    /// guest has been told.
    fn session(
        &mut self,
        packet: &Packet<'_>,
        key: FlowKey,
        kind: DatagramKind,
        now: Instant,
    ) -> Option<Key> {
        let to_us = self.settings.policy.is_own(packet.destination);
        if packet.hop_limit <= 1 && !to_us {
            self.stats.refuse(DropReason::HopLimit);
            self.tell(Problem::HopLimit, None, packet, now);
            return None;
        }
        let outside = key.outside;
        let key = if kind == DatagramKind::SharedUdp { shared_key(key) } else { key };
        if let Some(flow) = self.flows.find(&key) {
            return self.may_go_on(flow, packet, outside, now).then_some(flow);
        }
        let to = self.way(packet, outside, now)?;
        let admission = self.admit(key.inside.ip(), Class::Tentative, now)?;
        let mut socket = self.host.open(kind, to);
        if socket.as_ref().is_err_and(is_exhaustion) && self.give_up_a_flow(now) {
            socket = self.host.open(kind, to);
        }
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                self.not_opened(packet, kind, &error, now);
                return None;
            }
        };
        let dns = kind == DatagramKind::Udp && outside.port() == DNS;
        let mut session =
            Session { mapped: to != outside, dns, ..Session::new(Via::Own(socket), kind) };
        if session.is_shared() {
            session.let_in(outside.ip());
        }
        let flow_kind = session.kind();
        let session = Flow::Datagrams(session);
        let flow = self.flows.insert(key, admission, Class::Tentative, session, now)?;
        self.begun(flow_kind, now);
        let watched = match self.flows.get_mut(flow) {
            Some((_, Flow::Datagrams(session))) => {
                session.key = Some(flow);
                match &session.via {
                    Via::Own(socket) => self.host.watch_datagrams(socket, flow),
                    Via::Port { .. } => Ok(()),
                }
            }
            _ => return None,
        };
        if watched.is_err() {
            self.at_a_limit(DropReason::Descriptors, Some(packet.source), now);
            self.end(flow, false);
            return None;
        }
        self.arm_session(flow);
        Some(flow)
    }

    /// Where `packet` goes; `None` if it may not, which the guest is told.
    fn way(
        &mut self,
        packet: &Packet<'_>,
        outside: SocketAddr,
        now: Instant,
    ) -> Option<SocketAddr> {
        let host = &self.host;
        let (problem, teller) = match self.settings.policy.way(outside, |ip| host.is_local(ip)) {
            Way::To(to) => return Some(to),
            Way::Resolver => return Some(self.resolver(outside)),
            Way::Gateway => (Problem::PortUnreachable, Some(packet.destination)),
            Way::Refused => (Problem::Prohibited, None),
        };
        self.stats.refuse(DropReason::Policy);
        self.tell(problem, teller, packet, now);
        None
    }

    /// Whether session `flow` may be used for `packet`: a shared one is judged anew for each far
    /// end.
    fn may_go_on(
        &mut self,
        flow: Key,
        packet: &Packet<'_>,
        outside: SocketAddr,
        now: Instant,
    ) -> bool {
        let peer = outside.ip();
        let known = match self.flows.get(flow) {
            Some(Flow::Datagrams(session)) => !session.is_shared() || session.peers.contains(&peer),
            _ => return false,
        };
        if !known {
            if self.way(packet, outside, now).is_none() {
                return false;
            }
            if let Some((_, Flow::Datagrams(session))) = self.flows.get_mut(flow) {
                session.let_in(peer);
            }
        }
        true
    }

    fn not_opened(
        &mut self,
        packet: &Packet<'_>,
        kind: DatagramKind,
        error: &io::Error,
        now: Instant,
    ) {
        tracing::debug!(%error, "no socket for a session");
        if is_exhaustion(error) {
            return self.at_a_limit(DropReason::Descriptors, Some(packet.source), now);
        }
        if kind == DatagramKind::Echo && error.kind() == io::ErrorKind::PermissionDenied {
            return self.at_a_limit(DropReason::PingRefused, Some(packet.source), now);
        }
        self.stats.refuse(DropReason::Unreachable);
        self.tell(problem(error).unwrap_or(Problem::HostUnreachable), None, packet, now);
    }

    /// Sends what has been gathered.
    pub(super) fn send_gso_batch(&mut self, now: Instant) {
        let batch = std::mem::take(&mut self.gso_batch);
        if let Some((batch_key, bytes, segment)) = batch.get() {
            self.send(batch_key, bytes, segment, now);
        }
        self.gso_batch = batch;
        self.gso_batch.clear();
    }

    fn send(&mut self, batch_key: BatchKey, bytes: &[u8], segment: usize, now: Instant) {
        let Some((key, Flow::Datagrams(session))) = self.flows.get_mut(batch_key.flow) else {
            return;
        };
        let BatchKey { to, dont_fragment, hop_limit, .. } = batch_key;
        let key = FlowKey { outside: to.unwrap_or(key.outside), ..key };
        let (socket, destination, port) = match &mut session.via {
            Via::Own(socket) => (socket, to.map(|to| Destination { to, from: None }), None),
            Via::Port { port, client, local, stats } => {
                let Some(Port::Udp(socket)) = self.ports.get_mut(*port).map(Published::port_mut)
                else {
                    return;
                };
                (socket, Some(Destination { to: *client, from: *local }), Some(&*stats))
            }
        };
        let count = bytes.len().div_ceil(segment.max(1)).max(1) as u64;
        match self.host.send_gso_batch(
            socket,
            destination,
            bytes,
            segment,
            dont_fragment,
            hop_limit,
        ) {
            SendOutcome::Sent => {
                self.stats.bytes[0].add(bytes.len() as u64);
                if let Some(stats) = port {
                    stats.carried(0, bytes.len() as u64, count);
                }
            }
            SendOutcome::NoRoom => {
                self.stats.refuse(DropReason::NoRoom);
                if let Some(stats) = port {
                    stats.refuse(DropReason::NoRoom, count);
                }
            }
            SendOutcome::TooBig(mtu) => {
                if let Some(stats) = port {
                    stats.refuse(DropReason::TooBig, count);
                }
                self.stats.refuse(DropReason::TooBig);
                self.tell_session(
                    key,
                    Problem::TooBig(mtu),
                    None,
                    &bytes[..segment.min(bytes.len())],
                    now,
                );
            }
            SendOutcome::Unreachable(problem) => {
                self.stats.refuse(DropReason::Unreachable);
                self.tell_session(key, problem, None, &bytes[..segment.min(bytes.len())], now);
            }
        }
    }

    /// Tells the guest about a datagram of its own; of an echo, `payload` is the whole message.
    pub(super) fn tell_session(
        &mut self,
        key: FlowKey,
        problem: Problem,
        teller: Option<IpAddr>,
        payload: &[u8],
        now: Instant,
    ) {
        if key.protocol == protocol::UDP {
            let length = udp::HEADER + payload.len();
            let header = head::recalled_ports(key.inside, key.outside, (length as u32) << 16);
            self.tell_about(problem, teller, key, &header, payload, now);
        } else {
            // The kernel has put its own identifier in.
            let mut message = payload.to_vec();
            if let Some(identifier) = message.get_mut(4..6) {
                identifier.copy_from_slice(&key.inside.port().to_be_bytes());
            }
            head::complete_icmp(key.inside.ip(), key.outside.ip(), &mut message);
            self.tell_about(problem, teller, key, &[], &message, now);
        }
    }

    /// Receives what waits at session `key`.
    pub(super) fn session_turn(&mut self, key: Key, now: Instant) {
        self.tell_problems(key, now);
        for _ in 0..BATCHES_PER_TURN {
            let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(key) else {
                return;
            };
            if !session.readable {
                return;
            }
            let kind = session.kind;
            let Via::Own(socket) = &mut session.via else { return };
            match self.host.receive(socket, &mut self.batch) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    session.readable = false;
                    return;
                }
                Err(_) => {
                    session.troubled = true;
                    self.tell_problems(key, now);
                    continue;
                }
            }
            self.flows.touch(key, true, now);
            self.arm_session(key);
            match kind {
                DatagramKind::Udp => self.deliver(five_tuple, 0..self.batch.len()),
                DatagramKind::SharedUdp => self.deliver_shared(key, five_tuple),
                DatagramKind::Echo => self.deliver_echoes(five_tuple),
            }
        }
        self.enqueue(key);
    }

    /// Writes to the guest what came to a shared socket from those it has sent to, neighbours of
    /// one source together.
    fn deliver_shared(&mut self, key: Key, five_tuple: FlowKey) {
        let mut start = 0;
        while start < self.batch.len() {
            let source = self.batch.source(start);
            let run = start + 1..self.batch.len();
            let end =
                run.take_while(|index| self.batch.source(*index) == source).last().unwrap_or(start)
                    + 1;
            let messages = start..end;
            start = end;
            let Some(Flow::Datagrams(session)) = self.flows.get(key) else { return };
            match source.filter(|source| session.peers.contains(&source.ip())) {
                Some(outside) => self.deliver(FlowKey { outside, ..five_tuple }, messages),
                None => messages.for_each(|_| self.stats.refuse(DropReason::Unsolicited)),
            }
        }
    }

    /// Writes `messages` of the batch to the guest.
    pub(super) fn deliver(&mut self, key: FlowKey, messages: Range<usize>) {
        let FlowKey { inside, outside, .. } = key;
        let headers = udp::HEADER + if inside.is_ipv6() { 40 } else { 20 };
        let room = usize::from(self.settings.mtu).saturating_sub(headers);
        let max_segment = if self.settings.capabilities.udp_offload { room } else { 0 };
        let batch = std::mem::take(&mut self.batch);
        let mut start = messages.start;
        while start < messages.end {
            let size = |index| {
                let (bytes, segment) = batch.get(index);
                (bytes.len(), segment)
            };
            let group = next_group(start..messages.end, max_segment, size);
            start = group.messages.end;
            self.stats.bytes[1].add(group.bytes as u64);
            if group.segment <= room && (!group.is_batch() || max_segment > 0) {
                // Payload and one header of its own for the first.
                debug_assert!(group.bytes + headers <= MAX_PACKET);
                let identification = self.next_identification() as u16;
                let head =
                    head::datagrams(outside, inside, group.bytes, group.segment, identification);
                let mut pieces = [IoSlice::new(&[]); MAX_SEGMENTS];
                let count = group.messages.len();
                for (piece, index) in pieces.iter_mut().zip(group.messages) {
                    *piece = IoSlice::new(batch.get(index).0);
                }
                emit(&mut self.host, &self.stats, head.bytes(), &pieces[..count.min(MAX_SEGMENTS)]);
                continue;
            }
            for index in group.messages {
                let (bytes, segment) = batch.get(index);
                let mut rest = bytes;
                // An empty one is one, too.
                loop {
                    let (datagram, more) = rest.split_at(segment.min(rest.len()));
                    self.deliver_one(inside, outside, datagram);
                    rest = more;
                    if rest.is_empty() {
                        break;
                    }
                }
            }
        }
        self.batch = batch;
    }

    fn deliver_one(&mut self, inside: SocketAddr, outside: SocketAddr, payload: &[u8]) {
        let headers = udp::HEADER + if inside.is_ipv6() { 40 } else { 20 };
        if payload.len() + headers <= usize::from(self.settings.mtu) {
            let identification = self.next_identification() as u16;
            let head =
                head::datagrams(outside, inside, payload.len(), payload.len(), identification);
            emit(&mut self.host, &self.stats, head.bytes(), &[IoSlice::new(payload)]);
        } else {
            let header = head::whole_udp_header(outside, inside, payload);
            let whole = [&header, payload].concat();
            self.deliver_pieces(inside.ip(), outside.ip(), protocol::UDP, &whole);
        }
    }

    /// Writes a packet in fragments that the device takes.
    fn deliver_pieces(&mut self, inside: IpAddr, outside: IpAddr, protocol: u8, whole: &[u8]) {
        let headers = if inside.is_ipv6() { 48 } else { 20 };
        let size = usize::from(self.settings.mtu).saturating_sub(headers).max(8) & !7;
        let identification = self.next_identification();
        for at in (0..whole.len()).step_by(size) {
            let end = (at + size).min(whole.len());
            let more = end < whole.len();
            let head = head::fragment(outside, inside, protocol, at..end, more, identification);
            emit(&mut self.host, &self.stats, head.bytes(), &[IoSlice::new(&whole[at..end])]);
        }
    }

    fn deliver_echoes(&mut self, key: FlowKey) {
        let batch = std::mem::take(&mut self.batch);
        for index in 0..batch.len() {
            let (message, _) = batch.get(index);
            // A ping socket is told of nothing else than answers.
            if message.len() >= icmp::HEADER {
                self.stats.bytes[1].add(message.len() as u64);
                self.echo_reply(
                    key.outside.ip(),
                    key.inside.ip(),
                    Some(key.inside.port()),
                    message,
                );
            }
        }
        self.batch = batch;
    }

    /// Writes `message` to the guest as an answer, with the identifier that it had asked under.
    fn echo_reply(
        &mut self,
        source: IpAddr,
        inside: IpAddr,
        identifier: Option<u16>,
        message: &[u8],
    ) {
        let v6 = inside.is_ipv6();
        let mut message = message.to_vec();
        message[0] = if v6 { 129 } else { 0 };
        if let Some(identifier) = identifier {
            message[4..6].copy_from_slice(&identifier.to_be_bytes());
        }
        head::complete_icmp(source, inside, &mut message);
        let kind = if v6 { protocol::ICMPV6 } else { protocol::ICMP };
        let headers = if v6 { 40 } else { 20 };
        if message.len() + headers <= usize::from(self.settings.mtu) {
            let head = head::whole(source, inside, kind, message.len());
            emit(&mut self.host, &self.stats, head.bytes(), &[IoSlice::new(&message)]);
        } else {
            self.deliver_pieces(inside, source, kind, &message);
        }
    }

    /// Tells the guest what the network told the session's socket.
    fn tell_problems(&mut self, key: Key, now: Instant) {
        for _ in 0..PROBLEMS_PER_TURN {
            let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(key) else {
                return;
            };
            if !session.troubled {
                return;
            }
            let Via::Own(socket) = &mut session.via else { return };
            let Some(found) = self.host.next_problem(socket) else {
                session.troubled = false;
                return;
            };
            let (mapped, dns, session_is_shared) =
                (session.mapped, session.dns, session.is_shared());
            if mapped && dns {
                self.try_next_resolver(five_tuple.outside);
            }
            // Whoever is behind a mapped address is nobody the guest has heard of.
            let teller = if mapped { Some(five_tuple.outside.ip()) } else { found.offender };
            let five_tuple = match found.destination {
                Some(outside) if session_is_shared => FlowKey { outside, ..five_tuple },
                _ => five_tuple,
            };
            self.tell_session(five_tuple, found.problem, teller, &found.payload, now);
        }
    }

    pub(super) fn session_timeout(&mut self, key: Key, now: Instant) {
        match self.session_deadline(key) {
            Some(deadline) if deadline <= now => {
                self.note_silence(key);
                self.end(key, false);
            }
            Some(deadline) => self.arm(key, deadline),
            None => {}
        }
    }

    /// A resolver that has never answered may be gone without a word.
    fn note_silence(&mut self, key: Key) {
        let unanswered =
            self.flows.last_seen(key).is_some_and(|(_, class)| class == Class::Tentative);
        if let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(key)
            && unanswered
            && session.dns
            && session.mapped
        {
            self.try_next_resolver(five_tuple.outside);
        }
    }

    pub(super) fn arm_session(&mut self, key: Key) {
        if let Some(deadline) = self.session_deadline(key) {
            self.arm(key, deadline);
        }
    }

    fn session_deadline(&self, key: Key) -> Option<Instant> {
        let (last_seen, class) = self.flows.last_seen(key)?;
        let Some(Flow::Datagrams(session)) = self.flows.get(key) else { return None };
        Some(last_seen + session.patience(class, &self.settings.timeouts))
    }
}

/// What finds a session that all far ends of a family share.
pub(super) fn shared_key(key: FlowKey) -> FlowKey {
    let nobody: IpAddr = if key.outside.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    FlowKey { outside: SocketAddr::new(nobody, 0), ..key }
}

fn batch_key(flow: Key, packet: &Packet<'_>) -> BatchKey {
    let hop_limit =
        (packet.hop_limit < HOPS_THAT_MATTER).then(|| packet.hop_limit.saturating_sub(1));
    BatchKey { flow, to: None, dont_fragment: packet.dont_fragment, hop_limit }
}

fn emit<H: Host>(host: &mut H, stats: &Stats, head: &[u8], payload: &[IoSlice<'_>]) {
    if host.emit(head, payload) {
        stats.packets[1].add(1);
    } else {
        stats.refuse(DropReason::Device);
    }
}
