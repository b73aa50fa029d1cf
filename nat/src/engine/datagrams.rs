//! Datagram sessions: UDP, and ICMP echoes, which work the same way.
//!
//! # Theory of operation
//! A session has its own connected socket, on which the kernel delivers only datagrams of its peer.
//! It is *tentative* until the peer has replied, and then *assured* ([`Class`]). It ends after its
//! idle timeout, or when it is evicted. UDP does not guarantee delivery: a datagram that does not
//! fit a buffer is dropped and counted.
//!
//! A session of a published port ([`SessionSocket::Port`]) has no socket of its own. The client
//! creates it, and replies of the guest are sent from the socket of the port. Such a session
//! becomes assured when the guest replies.
//!
//! With [`Mapping::EndpointIndependent`], one unconnected socket of a container serves all its
//! peers. The session records the addresses that the container has sent to, and accepts datagrams
//! only from them.
//!
//! Datagrams are sent in GSO batches ([`GsoBatch`](crate::gso_batch::GsoBatch)), and received in
//! batches if the kernel has merged them (`UDP_GRO`). Consecutive datagrams of equal size are
//! written to the guest as one packet, which the guest kernel segments when the program reads it. A
//! datagram larger than the MTU of the device is fragmented.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::published::Published;
use super::tcp::{icmp_error_of, is_exhaustion};
use super::{Engine, Flow};
use crate::flow_table::{Class, FlowKey};
use crate::gso_batch::BatchKey;
use crate::host::{Batch, DatagramKind, Destination, Host, Port, Ready, SendOutcome};
use crate::metrics::{DropReason, FlowKind, ForwardStats, Stats};
use crate::policy::{DNS, Verdict};
use crate::settings::{Mapping, Timeouts};
use crate::wire::head::{self, MAX_PACKET};
use crate::wire::icmp::IcmpError;
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
use tidegate_model::Direction;
use tidegate_reactor::Key;
use tidegate_reactor::batch::{MAX_BATCH_BYTES, MAX_SEGMENTS, next_group};

/// Maximum number of batches received per session and turn.
const BATCHES_PER_TURN: usize = 4;

/// Maximum number of error-queue entries forwarded to the guest per turn.
const ERRORS_PER_TURN: usize = 16;

/// Maximum number of peers of a shared socket. A new one replaces the first.
const PEERS: usize = 64;

/// Lower hop limits are intentional (traceroute); higher ones are defaults of operating systems.
const LOW_HOP_LIMIT: u8 = 33;

/// Socket over which a session reaches its peer.
#[derive(Debug)]
pub(super) enum SessionSocket<D> {
    /// A socket of the session.
    Own(D),
    /// The socket of a published port.
    Port {
        /// The published port.
        port: Key,
        /// The client.
        client: SocketAddr,
        /// The local address that the client sends to.
        local: Option<IpAddr>,
        /// The counters of the port.
        stats: Arc<ForwardStats>,
    },
}

/// A session of datagrams.
#[derive(Debug)]
pub(super) struct Session<D> {
    pub(super) via: SessionSocket<D>,
    kind: DatagramKind,
    /// The destination differs from the one that the guest used.
    mapped: bool,
    /// Peers of a shared socket to which the guest has sent, the most recent last.
    peers: VecDeque<IpAddr>,
    dns: bool,
    readable: bool,
    has_error: bool,
    pub(super) queued: bool,
    pub(super) timer: Option<Instant>,
    pub(super) key: Option<Key>,
}

impl<D> Session<D> {
    /// Creates a session for a client of a published port.
    pub(super) fn for_client(via: SessionSocket<D>) -> Self {
        Self::new(via, DatagramKind::Udp)
    }

    fn new(via: SessionSocket<D>, kind: DatagramKind) -> Self {
        Self {
            via,
            kind,
            mapped: false,
            peers: VecDeque::new(),
            dns: false,
            readable: false,
            has_error: false,
            queued: false,
            timer: None,
            key: None,
        }
    }

    /// Whether the session belongs to published port `key`.
    pub(super) fn belongs_to_port(&self, key: Key) -> bool {
        matches!(self.via, SessionSocket::Port { port, .. } if port == key)
    }

    pub(super) fn kind(&self) -> FlowKind {
        match self.kind {
            DatagramKind::Udp | DatagramKind::SharedUdp => FlowKind::Udp,
            DatagramKind::Echo => FlowKind::Icmp,
        }
    }

    pub(super) fn is_shared(&self) -> bool {
        self.kind == DatagramKind::SharedUdp
    }

    /// Removes the peers that do not satisfy `keep`: their datagrams are no longer accepted, and
    /// new ones to them are checked by the policy.
    pub(super) fn retain_peers(&mut self, keep: impl Fn(IpAddr) -> bool) {
        self.peers.retain(|peer| keep(*peer));
    }

    /// Whether the session belongs to a client of a published port.
    pub(super) fn is_of_published_port(&self) -> bool {
        matches!(self.via, SessionSocket::Port { .. })
    }

    /// The counters of the published port, for a session of one of its clients.
    pub(super) fn port_stats(&self) -> Option<&ForwardStats> {
        match &self.via {
            SessionSocket::Own(_) => None,
            SessionSocket::Port { stats, .. } => Some(stats),
        }
    }

    /// Accepts datagrams from `peer` from now on.
    fn add_peer(&mut self, peer: IpAddr) {
        if self.peers.len() >= PEERS {
            self.peers.pop_front();
        }
        self.peers.push_back(peer);
    }

    pub(super) fn note(&mut self, ready: Ready) {
        self.readable |= ready.readable || ready.error;
        self.has_error |= ready.error;
    }

    fn idle_timeout(&self, class: Class, timeouts: &Timeouts) -> Duration {
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
            return self.stats.count_drop(DropReason::Malformed);
        };
        let key = FlowKey {
            inside: SocketAddr::new(packet.source, datagram.source),
            outside: SocketAddr::new(packet.destination, datagram.destination),
            protocol: protocol::UDP,
        };
        // Services behind a gateway address do not take part in STUN.
        let shared = self.settings.mapping == Mapping::EndpointIndependent
            && !self.settings.policy.is_own(packet.destination)
            && self.flows.find(&key).is_none();
        let kind = if shared { DatagramKind::SharedUdp } else { DatagramKind::Udp };
        let Some(flow) = self.session(packet, key, kind, now) else { return };
        let answers = matches!(self.flows.get(flow),
            Some(Flow::Datagrams(session)) if session.is_of_published_port());
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

    /// Returns the session of `packet`, and creates it if necessary. If that is refused, the guest
    /// is notified and `None` is returned.
    fn session(
        &mut self,
        packet: &Packet<'_>,
        key: FlowKey,
        kind: DatagramKind,
        now: Instant,
    ) -> Option<Key> {
        let to_us = self.settings.policy.is_own(packet.destination);
        if packet.hop_limit <= 1 && !to_us {
            self.stats.count_drop(DropReason::HopLimit);
            self.send_icmp_error(IcmpError::HopLimit, None, packet, now);
            return None;
        }
        let outside = key.outside;
        let key = if kind == DatagramKind::SharedUdp { shared_key(key) } else { key };
        if let Some(flow) = self.flows.find(&key) {
            return self.check_peer(flow, packet, outside, now).then_some(flow);
        }
        let to = self.resolve_destination(packet, outside, now)?;
        let admission = self.admit(key.inside.ip(), Class::Tentative, now)?;
        let mut socket = self.host.open(kind, to);
        if socket.as_ref().is_err_and(is_exhaustion) && self.evict_for_descriptor(now) {
            socket = self.host.open(kind, to);
        }
        let socket = match socket {
            Ok(socket) => socket,
            Err(error) => {
                self.socket_failed(packet, kind, &error, now);
                return None;
            }
        };
        let dns = kind == DatagramKind::Udp && outside.port() == DNS;
        let mut session = Session {
            mapped: to != outside,
            dns,
            ..Session::new(SessionSocket::Own(socket), kind)
        };
        if session.is_shared() {
            session.add_peer(outside.ip());
        }
        let flow_kind = session.kind();
        let session = Flow::Datagrams(Box::new(session));
        let flow = self.flows.insert(key, admission, Class::Tentative, session, now)?;
        self.count_new_flow(flow_kind, now);
        let watched = match self.flows.get_mut(flow) {
            Some((_, Flow::Datagrams(session))) => {
                session.key = Some(flow);
                match &session.via {
                    SessionSocket::Own(socket) => self.host.watch_datagrams(socket, flow),
                    SessionSocket::Port { .. } => Ok(()),
                }
            }
            _ => return None,
        };
        if watched.is_err() {
            self.count_limit_drop(DropReason::Descriptors, Some(packet.source), now);
            self.end(flow, false);
            return None;
        }
        self.arm_session(flow);
        Some(flow)
    }

    /// The destination of `packet`. If the policy rejects it, the guest is notified and `None` is
    /// returned.
    fn resolve_destination(
        &mut self,
        packet: &Packet<'_>,
        outside: SocketAddr,
        now: Instant,
    ) -> Option<SocketAddr> {
        let host = &self.host;
        let (icmp_error, reporter) =
            match self.settings.policy.verdict(outside, |ip| host.is_local(ip)) {
                Verdict::Forward(to) => return Some(to),
                Verdict::Resolver => return Some(self.resolver(outside)),
                Verdict::Gateway => (IcmpError::PortUnreachable, Some(packet.destination)),
                Verdict::Reject => (IcmpError::Prohibited, None),
            };
        self.stats.count_drop(DropReason::Policy);
        self.send_icmp_error(icmp_error, reporter, packet, now);
        None
    }

    /// Whether session `flow` may be used for `packet`. A shared session checks the policy for each
    /// new peer.
    fn check_peer(
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
            if self.resolve_destination(packet, outside, now).is_none() {
                return false;
            }
            if let Some((_, Flow::Datagrams(session))) = self.flows.get_mut(flow) {
                session.add_peer(peer);
            }
        }
        true
    }

    fn socket_failed(
        &mut self,
        packet: &Packet<'_>,
        kind: DatagramKind,
        error: &io::Error,
        now: Instant,
    ) {
        tracing::debug!(%error, "session socket failed");
        if is_exhaustion(error) {
            return self.count_limit_drop(DropReason::Descriptors, Some(packet.source), now);
        }
        if kind == DatagramKind::Echo && error.kind() == io::ErrorKind::PermissionDenied {
            return self.count_limit_drop(DropReason::PingRefused, Some(packet.source), now);
        }
        self.stats.count_drop(DropReason::Unreachable);
        self.send_icmp_error(
            icmp_error_of(error).unwrap_or(IcmpError::HostUnreachable),
            None,
            packet,
            now,
        );
    }

    /// Sends the pending GSO batch.
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
            SessionSocket::Own(socket) => {
                (socket, to.map(|to| Destination { to, from: None }), None)
            }
            SessionSocket::Port { port, client, local, stats } => {
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
                self.stats.bytes[Direction::Out].add(bytes.len() as u64);
                if let Some(stats) = port {
                    stats.carried(Direction::Out, bytes.len() as u64, count);
                }
            }
            SendOutcome::NoRoom => {
                self.stats.count_drop(DropReason::NoRoom);
                if let Some(stats) = port {
                    stats.count_drop(DropReason::NoRoom, count);
                }
            }
            SendOutcome::TooBig(mtu) => {
                if let Some(stats) = port {
                    stats.count_drop(DropReason::TooBig, count);
                }
                self.stats.count_drop(DropReason::TooBig);
                self.send_session_error(
                    key,
                    IcmpError::TooBig(mtu),
                    None,
                    &bytes[..segment.min(bytes.len())],
                    now,
                );
            }
            SendOutcome::Unreachable(icmp_error) => {
                self.stats.count_drop(DropReason::Unreachable);
                self.send_session_error(
                    key,
                    icmp_error,
                    None,
                    &bytes[..segment.min(bytes.len())],
                    now,
                );
            }
        }
    }

    /// Sends the guest an ICMP error about one of its datagrams. For an echo, `payload` is the
    /// whole message.
    pub(super) fn send_session_error(
        &mut self,
        key: FlowKey,
        icmp_error: IcmpError,
        reporter: Option<IpAddr>,
        payload: &[u8],
        now: Instant,
    ) {
        if key.protocol == protocol::UDP {
            let length = udp::HEADER + payload.len();
            let header = head::quoted_ports(key.inside, key.outside, (length as u32) << 16);
            self.send_rebuilt_icmp_error(icmp_error, reporter, key, &header, payload, now);
        } else {
            // The kernel has replaced the identifier with its own.
            let mut message = payload.to_vec();
            if let Some(identifier) = message.get_mut(4..6) {
                identifier.copy_from_slice(&key.inside.port().to_be_bytes());
            }
            head::complete_icmp(key.inside.ip(), key.outside.ip(), &mut message);
            self.send_rebuilt_icmp_error(icmp_error, reporter, key, &[], &message, now);
        }
    }

    /// Receives from session `key`.
    pub(super) fn session_turn(&mut self, key: Key, now: Instant) {
        self.forward_socket_errors(key, now);
        for _ in 0..BATCHES_PER_TURN {
            let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(key) else {
                return;
            };
            if !session.readable {
                return;
            }
            let kind = session.kind;
            let SessionSocket::Own(socket) = &mut session.via else { return };
            match self.host.receive(socket, &mut self.batch) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    session.readable = false;
                    return;
                }
                Err(_) => {
                    session.has_error = true;
                    self.forward_socket_errors(key, now);
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

    /// Writes datagrams of a shared socket to the guest, if their source is a known peer.
    /// Consecutive datagrams of one source are written together.
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
                None => messages.for_each(|_| self.stats.count_drop(DropReason::Unsolicited)),
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
            self.stats.bytes[Direction::In].add(group.bytes as u64);
            if group.segment <= room && (!group.is_batch() || max_segment > 0) {
                // A batch shares one header, so the total fits a packet.
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
                // An empty message is one empty datagram.
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
            let header = head::checksummed_udp_header(outside, inside, payload);
            let whole = [&header, payload].concat();
            self.deliver_fragments(inside.ip(), outside.ip(), protocol::UDP, &whole);
        }
    }

    /// Writes a packet as fragments that fit the MTU of the device.
    fn deliver_fragments(&mut self, inside: IpAddr, outside: IpAddr, protocol: u8, whole: &[u8]) {
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
            // A ping socket receives only echo replies, but from any sender: the kernel looks it up
            // by the identifier and the local address (`ping_lookup`, net/ipv4/ping.c).
            if batch.source(index).is_some_and(|source| source.ip() != key.outside.ip()) {
                self.stats.count_drop(DropReason::Unsolicited);
                continue;
            }
            if message.len() >= icmp::HEADER {
                self.stats.bytes[Direction::In].add(message.len() as u64);
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

    /// Writes `message` to the guest as an echo reply, with the identifier of its request.
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
            let head = head::ip_header(source, inside, kind, message.len());
            emit(&mut self.host, &self.stats, head.bytes(), &[IoSlice::new(&message)]);
        } else {
            self.deliver_fragments(inside, source, kind, &message);
        }
    }

    /// Forwards ICMP errors of the session socket to the guest.
    fn forward_socket_errors(&mut self, key: Key, now: Instant) {
        for _ in 0..ERRORS_PER_TURN {
            let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(key) else {
                return;
            };
            if !session.has_error {
                return;
            }
            let SessionSocket::Own(socket) = &mut session.via else { return };
            let Some(found) = self.host.next_socket_error(socket) else {
                session.has_error = false;
                return;
            };
            let (mapped, dns, session_is_shared) =
                (session.mapped, session.dns, session.is_shared());
            // The error queue of a ping socket contains all errors with its identifier, whatever
            // the destination.
            let is_echo = five_tuple.protocol != protocol::UDP;
            let outside = five_tuple.outside.ip();
            if is_echo && found.destination.is_some_and(|to| to.ip() != outside) {
                self.stats.count_drop(DropReason::Unsolicited);
                continue;
            }
            if mapped && dns {
                self.select_next_resolver(five_tuple.outside);
            }
            // The guest does not know the address behind a mapped destination.
            let reporter = if mapped { Some(five_tuple.outside.ip()) } else { found.offender };
            let five_tuple = match found.destination {
                Some(outside) if session_is_shared => FlowKey { outside, ..five_tuple },
                _ => five_tuple,
            };
            self.send_session_error(five_tuple, found.icmp_error, reporter, &found.payload, now);
        }
    }

    pub(super) fn session_timeout(&mut self, key: Key, now: Instant) {
        match self.session_deadline(key) {
            Some(deadline) if deadline <= now => {
                self.note_dns_timeout(key);
                self.end(key, false);
            }
            Some(deadline) => self.arm(key, deadline),
            None => {}
        }
    }

    /// A resolver that never replied may be down.
    fn note_dns_timeout(&mut self, key: Key) {
        let unanswered =
            self.flows.last_seen(key).is_some_and(|(_, class)| class == Class::Tentative);
        if let Some((five_tuple, Flow::Datagrams(session))) = self.flows.get_mut(key)
            && unanswered
            && session.dns
            && session.mapped
        {
            self.select_next_resolver(five_tuple.outside);
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
        Some(last_seen + session.idle_timeout(class, &self.settings.timeouts))
    }
}

/// The lookup key of a session that all peers of one family share.
pub(super) fn shared_key(key: FlowKey) -> FlowKey {
    let nobody: IpAddr = if key.outside.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    FlowKey { outside: SocketAddr::new(nobody, 0), ..key }
}

fn batch_key(flow: Key, packet: &Packet<'_>) -> BatchKey {
    let hop_limit = (packet.hop_limit < LOW_HOP_LIMIT).then(|| packet.hop_limit.saturating_sub(1));
    BatchKey { flow, to: None, dont_fragment: packet.dont_fragment, hop_limit }
}

fn emit<H: Host>(host: &mut H, stats: &Stats, head: &[u8], payload: &[IoSlice<'_>]) {
    if host.emit(head, payload) {
        stats.packets[Direction::In].add(1);
    } else {
        stats.count_drop(DropReason::Device);
    }
}
