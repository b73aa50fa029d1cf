//! TCP in the engine: lookup, creation and termination of connections.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::{Engine, Flow};
use crate::flow_table::{Class, FlowKey};
use crate::host::{Host, Ready};
use crate::metrics::{DropReason, FlowKind};
use crate::policy::Verdict;
use crate::tcp::conn::Phase;
use crate::tcp::{Connection, Io, Outcome};
use crate::wire::head::TcpHead;
use crate::wire::icmp::IcmpError;
use crate::wire::ip::Packet;
use crate::wire::protocol;
use crate::wire::tcp::{Segment, flags};
use crate::wire::virtio::VirtioHeader;
use rustix::io::Errno;
use std::io;
use std::net::SocketAddr;
use std::time::Instant;
use tidegate_reactor::Key;

impl<H: Host> Engine<H> {
    pub(super) fn tcp_packet(&mut self, packet: &Packet<'_>, header: VirtioHeader, now: Instant) {
        let Ok(segment) = Segment::parse(packet, header.verify) else {
            return self.stats.count_drop(DropReason::Malformed);
        };
        let key = FlowKey {
            inside: SocketAddr::new(packet.source, segment.source),
            outside: SocketAddr::new(packet.destination, segment.destination),
            protocol: protocol::TCP,
        };
        let Some(flow) = self.flows.find(&key) else {
            return self.unmatched_segment(packet, &segment, key, now);
        };
        let arrived = self.with_connection(flow, now, |connection, io| {
            let established = connection.is_established();
            let outcome = connection.segment(&segment, io);
            (outcome, !established && connection.is_established())
        });
        let Some((outcome, opened)) = arrived else { return };
        self.flows.touch(flow, false, now);
        if opened {
            self.flows.mark_answered(flow);
        }
        if outcome == Outcome::Replaced {
            self.end(flow, true);
            return self.unmatched_segment(packet, &segment, key, now);
        }
        if outcome == Outcome::Stray {
            return self.reply_with_reset(&segment, key, now);
        }
        if self.conclude(flow, outcome) {
            self.enqueue(flow);
        }
    }

    /// Handles a segment that matches no connection.
    fn unmatched_segment(
        &mut self,
        packet: &Packet<'_>,
        segment: &Segment<'_>,
        key: FlowKey,
        now: Instant,
    ) {
        if segment.has(flags::SYN) && !segment.has(flags::ACK) {
            return self.connect_flow(packet, segment, key, now);
        }
        if segment.has(flags::RST) || packet.destination.is_multicast() {
            return self.stats.count_drop(DropReason::Window);
        }
        self.reply_with_reset(segment, key, now);
    }

    /// Replies with a reset (RFC 9293 section 3.10.7.1).
    fn reply_with_reset(&mut self, segment: &Segment<'_>, key: FlowKey, now: Instant) {
        if !self.may_send_error(key.inside.ip(), now) {
            return self.stats.count_drop(DropReason::Rate);
        }
        let (sequence, acknowledgement, flags) = if segment.has(flags::ACK) {
            (segment.acknowledgement, 0, flags::RST)
        } else {
            (0, segment.sequence.wrapping_add(segment.length()), flags::RST | flags::ACK)
        };
        let head = TcpHead {
            source: key.outside,
            destination: key.inside,
            sequence,
            acknowledgement,
            flags,
            window: 0,
            mss: None,
            scale: None,
            timestamps: None,
            segment: u16::MAX,
        };
        self.host.emit(head.write(0).bytes(), &[]);
    }

    /// Handles a SYN: starts to connect, unless policy or a limit prevents it.
    fn connect_flow(
        &mut self,
        packet: &Packet<'_>,
        segment: &Segment<'_>,
        key: FlowKey,
        now: Instant,
    ) {
        if packet.hop_limit <= 1 && !self.settings.policy.is_own(packet.destination) {
            self.stats.count_drop(DropReason::HopLimit);
            return self.send_icmp_error(IcmpError::HopLimit, None, packet, now);
        }
        let host = &self.host;
        let to = match self.settings.policy.verdict(key.outside, |ip| host.is_local(ip)) {
            Verdict::Forward(to) => to,
            Verdict::Resolver => self.resolver(key.outside),
            Verdict::Gateway => return self.reply_with_reset(segment, key, now),
            Verdict::Reject => {
                self.stats.count_drop(DropReason::Policy);
                return self.send_icmp_error(IcmpError::Prohibited, None, packet, now);
            }
        };
        let Some(admission) = self.admit(key.inside.ip(), Class::Connection, now) else { return };
        let mut stream = self.host.connect(to);
        if stream.as_ref().is_err_and(is_exhaustion) && self.evict_for_descriptor(now) {
            stream = self.host.connect(to);
        }
        let stream = match stream {
            Ok(stream) => stream,
            // The SYN is dropped. The guest retransmits it, and a descriptor may be available then.
            Err(error) if is_exhaustion(&error) => {
                return self.count_limit_drop(DropReason::Descriptors, Some(key.inside.ip()), now);
            }
            Err(error) => {
                self.stats.count_drop(DropReason::Unreachable);
                self.stats.resets.add(1);
                return match icmp_error_of(&error) {
                    Some(icmp_error) => self.send_icmp_error(icmp_error, None, packet, now),
                    None => self.reply_with_reset(segment, key, now),
                };
            }
        };
        let opening = self.opening(&key, now);
        let connection = Connection::new(opening, segment, stream, &self.params, now);
        let connection = Flow::Tcp(Box::new(connection));
        let inserted = self.flows.insert(key, admission, Class::Connection, connection, now);
        let Some(flow) = inserted else { return };
        self.count_new_flow(FlowKind::Tcp, now);
        let watched = match self.flows.get_mut(flow) {
            Some((_, Flow::Tcp(connection))) => connection.watched_as(flow, &mut self.host),
            _ => return,
        };
        match watched {
            Ok(ready) => {
                self.arm_stream(flow);
                self.stream_ready(flow, ready, now);
            }
            Err(_) => {
                self.count_limit_drop(DropReason::Descriptors, Some(key.inside.ip()), now);
                self.end(flow, true);
            }
        }
    }

    /// The current resolver, or `instead` if there is none.
    pub(super) fn resolver(&self, instead: SocketAddr) -> SocketAddr {
        let resolvers = &self.settings.policy.resolvers;
        resolvers.get(self.resolver % resolvers.len().max(1)).copied().unwrap_or(instead)
    }

    /// Switches to the next resolver, after the current one did not answer.
    pub(super) fn select_next_resolver(&mut self, outside: SocketAddr) {
        if self.settings.policy.is_own(outside.ip()) {
            self.resolver = self.resolver.wrapping_add(1);
        }
    }

    pub(super) fn stream_ready(&mut self, key: Key, ready: Ready, now: Instant) {
        let Some((five_tuple, Flow::Tcp(connection))) = self.flows.get_mut(key) else { return };
        connection.note(ready);
        if connection.phase() == Phase::Connecting {
            if !ready.writable && !ready.error {
                return;
            }
            let initial = connection.initial_sequence();
            let result = match connection.stream() {
                // Writability without an error means that the socket is connected.
                Some(stream) if ready.error => self.host.connect_result(stream),
                Some(_) => Ok(()),
                None => return,
            };
            match result {
                Ok(()) => {
                    self.with_connection(key, now, Connection::connected);
                }
                Err(error) => return self.connect_failed(key, five_tuple, initial, &error, now),
            }
        }
        self.enqueue(key);
        self.arm_stream(key);
    }

    fn connect_failed(
        &mut self,
        key: Key,
        five_tuple: FlowKey,
        initial: u32,
        error: &io::Error,
        now: Instant,
    ) {
        tracing::debug!(%error, "connect failed");
        self.select_next_resolver(five_tuple.outside);
        match icmp_error_of(error) {
            Some(icmp_error) => self.send_icmp_error_for_syn(icmp_error, five_tuple, initial, now),
            None => {
                self.with_connection(key, now, Connection::send_reset);
            }
        }
        self.end(key, true);
    }

    pub(super) fn stream_turn(&mut self, key: Key, now: Instant) {
        let turned = self.with_connection(key, now, Connection::turn);
        let Some((outcome, more)) = turned else { return };
        if self.conclude(key, outcome) && more {
            self.enqueue(key);
        }
    }

    pub(super) fn stream_timeout(&mut self, key: Key, now: Instant) {
        let outcome = self.with_connection(key, now, Connection::timeout);
        if outcome.is_some_and(|outcome| self.conclude(key, outcome)) {
            self.enqueue(key);
        }
    }

    /// Ends the flow if the connection has ended. Returns whether it continues.
    fn conclude(&mut self, key: Key, outcome: Outcome) -> bool {
        match outcome {
            Outcome::Alive | Outcome::Stray => self.arm_stream(key),
            Outcome::Done => self.end(key, false),
            Outcome::Reset | Outcome::Replaced => self.end(key, true),
        }
        outcome == Outcome::Alive
    }

    pub(super) fn arm_stream(&mut self, key: Key) {
        let Some(Flow::Tcp(connection)) = self.flows.get(key) else { return };
        let deadline = connection.deadline(&self.settings.timeouts);
        if connection.timer.is_none_or(|armed| deadline < armed) {
            self.arm(key, deadline);
        }
    }

    /// Calls `f` on connection `key`, and accounts for the bytes that it holds.
    pub(super) fn with_connection<T>(
        &mut self,
        key: Key,
        now: Instant,
        f: impl FnOnce(&mut Connection<H::Stream>, &mut Io<'_, H>) -> T,
    ) -> Option<T> {
        let (Flow::Tcp(connection), allowance) = self.flows.with_allowance(key)? else {
            return None;
        };
        let mut io = Io {
            host: &mut self.host,
            scratch: &mut self.scratch,
            now,
            stats: &self.stats,
            params: &self.params,
            allowance,
        };
        let result = f(connection, &mut io);
        let (held, blocked) = (connection.held(), connection.is_blocked());
        self.flows.set_held(key, held, blocked);
        Some(result)
    }
}

/// Whether a local resource is exhausted, as opposed to a network error: descriptors, memory, or
/// source ports (`EADDRNOTAVAIL` of connect(2), `EAGAIN` of bind(2)).
pub(super) fn is_exhaustion(error: &io::Error) -> bool {
    let ports = [Errno::ADDRNOTAVAIL, Errno::AGAIN];
    tidegate_reactor::is_exhaustion(error)
        || Errno::from_io_error(error).is_some_and(|errno| ports.contains(&errno))
}

/// The ICMP error that a router would send for `error`; `None` if the remote side sent a reset.
pub(super) fn icmp_error_of(error: &io::Error) -> Option<IcmpError> {
    let errno = Errno::from_raw_os_error(error.raw_os_error()?);
    Some(match errno {
        Errno::NETUNREACH => IcmpError::NetworkUnreachable,
        Errno::HOSTUNREACH | Errno::TIMEDOUT | Errno::HOSTDOWN => IcmpError::HostUnreachable,
        Errno::ACCESS | Errno::PERM => IcmpError::Prohibited,
        Errno::NOPROTOOPT => IcmpError::ProtocolUnreachable,
        _ => return None,
    })
}
