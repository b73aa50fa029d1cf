//! ICMP in the engine: echo requests to the engine, errors from the guest, and errors to the guest.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::{Engine, Flow};
use crate::flow_table::FlowKey;
use crate::host::Host;
use crate::metrics::DropReason;
use crate::tcp::conn::Phase;
use crate::wire::head;
use crate::wire::icmp::{IcmpError, Message};
use crate::wire::ip::Packet;
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

impl<H: Host> Engine<H> {
    pub(super) fn icmp_packet(&mut self, packet: &Packet<'_>, now: Instant) {
        match Message::parse(packet) {
            Err(_) => self.stats.count_drop(DropReason::Malformed),
            Ok(Message::Other) => self.stats.count_drop(DropReason::Protocol),
            Ok(Message::EchoRequest { identifier, bytes }) => {
                self.echo_request(packet, identifier, bytes, now);
            }
            Ok(Message::Error { icmp_error, source, destination, protocol }) => {
                self.handle_icmp_error(
                    packet.source,
                    icmp_error,
                    source,
                    destination,
                    protocol,
                    now,
                );
            }
        }
    }

    /// Handles an ICMP error of the guest about a packet from `source` to `destination`.
    fn handle_icmp_error(
        &mut self,
        reporter: IpAddr,
        icmp_error: IcmpError,
        source: SocketAddr,
        destination: SocketAddr,
        protocol: u8,
        now: Instant,
    ) {
        let key = FlowKey { inside: destination, outside: source, protocol };
        let flow = self.flows.find(&key);
        // A router of the container's network may report the path MTU. All other errors are
        // accepted only from the container itself.
        let network = |ip| self.settings.policy.network_of(ip);
        let same_network = || network(reporter) == network(destination.ip());
        let sound = reporter == destination.ip()
            || matches!(icmp_error, IcmpError::TooBig(_)) && same_network();
        let Some(flow) = flow.filter(|_| sound) else {
            return self.stats.count_drop(DropReason::Window);
        };
        match (self.flows.get_mut(flow), icmp_error) {
            (Some((_, Flow::Tcp(_))), IcmpError::TooBig(mtu)) => {
                self.with_connection(flow, now, |connection, _| connection.reduce_mtu(mtu));
                self.enqueue(flow);
            }
            // The guest has no listener: a REJECT rule in front of the port (RFC 1122 section
            // 4.2.3.9).
            (Some((_, Flow::Tcp(connection))), _) if connection.phase() == Phase::SynSent => {
                self.end(flow, true);
            }
            // A later datagram of the client may find a listener. The session belongs to the
            // published port, and ending it would notify no one.
            (Some((_, Flow::Datagrams(session))), IcmpError::PortUnreachable) => {
                match session.port_stats() {
                    Some(stats) => stats.refusals.add(1),
                    // Once the socket is closed, the host reports the error to the remote side.
                    None => self.end(flow, false),
                }
            }
            // TCP must not abort on soft errors (RFC 5927); its timers apply.
            _ => {}
        }
    }

    /// Sends an ICMP error about `packet` to the guest. `reporter` is its source if it is not the
    /// engine.
    pub(super) fn send_icmp_error(
        &mut self,
        icmp_error: IcmpError,
        reporter: Option<IpAddr>,
        packet: &Packet<'_>,
        now: Instant,
    ) {
        // RFC 1122 section 3.2.2: no error about a packet to a broadcast or multicast address.
        let many = match packet.destination {
            IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
            IpAddr::V6(ip) => ip.is_multicast(),
        };
        if many || !self.may_send_error(packet.source, now) {
            return;
        }
        let own = self.own_address(packet.destination);
        let reporter = reporter.filter(|ip| ip.is_ipv4() == own.is_ipv4()).unwrap_or(own);
        let quotation = [packet.header, packet.payload];
        let (head, message) = head::icmp_error(reporter, packet.source, icmp_error, &quotation);
        self.host.emit(head.bytes(), &[IoSlice::new(&message)]);
    }

    /// Whether one more ICMP error or reset may be sent to `source`.
    pub(super) fn may_send_error(&mut self, source: IpAddr, now: Instant) -> bool {
        let network = self.settings.policy.network_of(source);
        self.flows.may_send_error(source, network, now)
    }

    /// Like [`Self::send_icmp_error`], about a SYN that is no longer available.
    pub(super) fn send_icmp_error_for_syn(
        &mut self,
        icmp_error: IcmpError,
        key: FlowKey,
        sequence: u32,
        now: Instant,
    ) {
        let transport = head::quoted_ports(key.inside, key.outside, sequence);
        self.send_rebuilt_icmp_error(icmp_error, None, key, &transport, &[], now);
    }

    /// Like [`Self::send_icmp_error`], about a packet that is no longer available. Its headers are
    /// rebuilt.
    pub(super) fn send_rebuilt_icmp_error(
        &mut self,
        icmp_error: IcmpError,
        reporter: Option<IpAddr>,
        key: FlowKey,
        transport: &[u8],
        payload: &[u8],
        now: Instant,
    ) {
        if !self.may_send_error(key.inside.ip(), now) {
            return;
        }
        let (inside, outside) = (key.inside.ip(), key.outside.ip());
        let own = self.own_address(outside);
        let reporter = reporter.filter(|ip| ip.is_ipv4() == own.is_ipv4()).unwrap_or(own);
        let length = transport.len() + payload.len();
        let header = head::quoted_headers(inside, outside, key.protocol, transport, length);
        let (head, message) = head::icmp_error(reporter, inside, icmp_error, &[&header, payload]);
        self.host.emit(head.bytes(), &[IoSlice::new(&message)]);
    }
}
