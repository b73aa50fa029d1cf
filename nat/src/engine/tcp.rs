//! TCP in the engine: which connection a segment belongs to, and how one begins and ends.

use super::{Engine, Flow};
use crate::flow_table::{Class, FlowKey};
use crate::host::{Host, Ready};
use crate::metrics::{DropReason, FlowKind};
use crate::policy::Way;
use crate::tcp::conn::Phase;
use crate::tcp::{Connection, Io, Outcome};
use crate::wire::head::TcpHead;
use crate::wire::icmp::Problem;
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
            return self.stats.refuse(DropReason::Malformed);
        };
        let key = FlowKey {
            inside: SocketAddr::new(packet.source, segment.source),
            outside: SocketAddr::new(packet.destination, segment.destination),
            protocol: protocol::TCP,
        };
        let Some(flow) = self.flows.find(&key) else {
            return self.stranger(packet, &segment, key, now);
        };
        let arrived = self.with_connection(flow, now, |connection, io| {
            let established = connection.is_established();
            let outcome = connection.segment(&segment, io);
            (outcome, !established && connection.is_established())
        });
        let Some((outcome, opened)) = arrived else { return };
        self.flows.touch(flow, false, now);
        if opened {
            self.flows.opened(flow);
        }
        if outcome == Outcome::Replaced {
            self.end(flow, true);
            return self.stranger(packet, &segment, key, now);
        }
        if outcome == Outcome::Stray {
            return self.refuse(&segment, key, now);
        }
        if self.conclude(flow, outcome) {
            self.enqueue(flow);
        }
    }

    /// A segment of no connection.
    fn stranger(&mut self, packet: &Packet<'_>, segment: &Segment<'_>, key: FlowKey, now: Instant) {
        if segment.has(flags::SYN) && !segment.has(flags::ACK) {
            return self.begin(packet, segment, key, now);
        }
        if segment.has(flags::RST) || packet.destination.is_multicast() {
            return self.stats.refuse(DropReason::Window);
        }
        self.refuse(segment, key, now);
    }

    /// Answers with a reset (RFC 9293 section 3.10.7.1).
    fn refuse(&mut self, segment: &Segment<'_>, key: FlowKey, now: Instant) {
        if !self.may_tell(key.inside.ip(), now) {
            return self.stats.refuse(DropReason::Rate);
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

    /// A SYN: begins to connect, unless something forbids it.
    fn begin(&mut self, packet: &Packet<'_>, segment: &Segment<'_>, key: FlowKey, now: Instant) {
        if packet.hop_limit <= 1 && !self.settings.policy.is_own(packet.destination) {
            self.stats.refuse(DropReason::HopLimit);
            return self.tell(Problem::HopLimit, None, packet, now);
        }
        let host = &self.host;
        let to = match self.settings.policy.way(key.outside, |ip| host.is_local(ip)) {
            Way::To(to) => to,
            Way::Resolver => self.resolver(key.outside),
            Way::Gateway => return self.refuse(segment, key, now),
            Way::Refused => {
                self.stats.refuse(DropReason::Policy);
                return self.tell(Problem::Prohibited, None, packet, now);
            }
        };
        let Some(admission) = self.admit(key.inside.ip(), Class::Connection, now) else { return };
        let mut stream = self.host.connect(to);
        if stream.as_ref().is_err_and(is_exhaustion) && self.give_up_a_flow(now) {
            stream = self.host.connect(to);
        }
        let stream = match stream {
            Ok(stream) => stream,
            // Silence: the guest will ask again, and there may be room then.
            Err(error) if is_exhaustion(&error) => {
                return self.at_a_limit(DropReason::Descriptors, Some(key.inside.ip()), now);
            }
            Err(error) => {
                self.stats.refuse(DropReason::Unreachable);
                self.stats.resets.add(1);
                return match problem(&error) {
                    Some(problem) => self.tell(problem, None, packet, now),
                    None => self.refuse(segment, key, now),
                };
            }
        };
        let opening = self.opening(&key, now);
        let connection = Connection::new(opening, segment, stream, &self.params, now);
        let connection = Flow::Tcp(Box::new(connection));
        let inserted = self.flows.insert(key, admission, Class::Connection, connection, now);
        let Some(flow) = inserted else { return };
        self.begun(FlowKind::Tcp, now);
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
                self.at_a_limit(DropReason::Descriptors, Some(key.inside.ip()), now);
                self.end(flow, true);
            }
        }
    }

    /// Where DNS goes.
    pub(super) fn resolver(&self, instead: SocketAddr) -> SocketAddr {
        let resolvers = &self.settings.policy.resolvers;
        resolvers.get(self.resolver % resolvers.len().max(1)).copied().unwrap_or(instead)
    }

    /// A resolver does not answer: the next one is asked from now on.
    pub(super) fn try_next_resolver(&mut self, outside: SocketAddr) {
        if self.settings.policy.is_own(outside.ip()) {
            self.resolver = self.resolver.wrapping_add(1);
        }
    }

    pub(super) fn stream_ready(&mut self, key: Key, ready: Ready, now: Instant) {
        let Some((five_tuple, Flow::Tcp(connection))) = self.flows.get_mut(key) else { return };
        connection.note(ready);
        if connection.phase() == Phase::Dialling {
            if !ready.writable && !ready.error {
                return;
            }
            let initial = connection.initial_sequence();
            let result = match connection.stream() {
                // Room alone says that it is connected.
                Some(stream) if ready.error => self.host.connect_result(stream),
                Some(_) => Ok(()),
                None => return,
            };
            match result {
                Ok(()) => {
                    self.with_connection(key, now, Connection::connected);
                }
                Err(error) => return self.not_connected(key, five_tuple, initial, &error, now),
            }
        }
        self.enqueue(key);
        self.arm_stream(key);
    }

    fn not_connected(
        &mut self,
        key: Key,
        five_tuple: FlowKey,
        initial: u32,
        error: &io::Error,
        now: Instant,
    ) {
        tracing::debug!(%error, "connect failed");
        self.try_next_resolver(five_tuple.outside);
        match problem(error) {
            Some(problem) => self.tell_recalled(problem, five_tuple, initial, now),
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

    /// Ends the connection if it has ended. Whether it goes on.
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

    /// Lets connection `key` do something, and accounts for what it buffers.
    pub(super) fn with_connection<T>(
        &mut self,
        key: Key,
        now: Instant,
        f: impl FnOnce(&mut Connection<H::Stream>, &mut Io<'_, H>) -> T,
    ) -> Option<T> {
        let (Flow::Tcp(connection), allowance) = self.flows.with_allowance(key)? else {
            return None;
        };
        let before = connection.buffered();
        let mut io = Io {
            host: &mut self.host,
            scratch: &mut self.scratch,
            now,
            stats: &self.stats,
            params: &self.params,
            allowance,
        };
        let result = f(connection, &mut io);
        let after = connection.buffered();
        self.flows.account_buffered(key, before, after);
        Some(result)
    }
}

/// Whether something of ours is short, and not of the network's.
pub(super) fn is_exhaustion(error: &io::Error) -> bool {
    let short = [
        Errno::MFILE,
        Errno::NFILE,
        Errno::NOBUFS,
        Errno::NOMEM,
        Errno::ADDRNOTAVAIL,
        Errno::AGAIN,
    ];
    short.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// What a router would have told; `None` for what the far end itself told, with a reset.
pub(super) fn problem(error: &io::Error) -> Option<Problem> {
    let errno = Errno::from_raw_os_error(error.raw_os_error()?);
    Some(match errno {
        Errno::NETUNREACH => Problem::NetworkUnreachable,
        Errno::HOSTUNREACH | Errno::TIMEDOUT | Errno::HOSTDOWN => Problem::HostUnreachable,
        Errno::ACCESS | Errno::PERM => Problem::Prohibited,
        Errno::NOPROTOOPT => Problem::ProtocolUnreachable,
        _ => return None,
    })
}
