//! ICMP in the engine: echoes that are for us, errors that the guest tells us, errors that we tell
//! the guest.

use super::datagrams::{Session, Via};
use super::{Engine, Flow};
use crate::flow_table::FlowKey;
use crate::host::Host;
use crate::metrics::DropReason;
use crate::tcp::conn::Phase;
use crate::wire::head;
use crate::wire::icmp::{Message, Problem};
use crate::wire::ip::Packet;
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

impl<H: Host> Engine<H> {
    pub(super) fn icmp_packet(&mut self, packet: &Packet<'_>, now: Instant) {
        match Message::parse(packet) {
            Err(_) => self.stats.refuse(DropReason::Malformed),
            Ok(Message::Other) => self.stats.refuse(DropReason::Protocol),
            Ok(Message::EchoRequest { identifier, bytes }) => {
                self.echo_request(packet, identifier, bytes, now);
            }
            Ok(Message::Error { problem, source, destination, protocol }) => {
                self.guest_tells(packet.source, problem, source, destination, protocol, now);
            }
        }
    }

    /// A packet of ours, from `source` to `destination`, did not please the guest.
    fn guest_tells(
        &mut self,
        teller: IpAddr,
        problem: Problem,
        source: SocketAddr,
        destination: SocketAddr,
        protocol: u8,
        now: Instant,
    ) {
        let key = FlowKey { inside: destination, outside: source, protocol };
        let flow = self.flows.find(&key);
        // The endpoint itself reports an error, or a router of its network reports a size.
        let network = |ip| self.settings.policy.network_of(ip);
        let same_network = || network(teller) == network(destination.ip());
        let sound =
            teller == destination.ip() || matches!(problem, Problem::TooBig(_)) && same_network();
        let Some(flow) = flow.filter(|_| sound) else {
            return self.stats.refuse(DropReason::Window);
        };
        match (self.flows.get_mut(flow), problem) {
            (Some((_, Flow::Tcp(_))), Problem::TooBig(mtu)) => {
                self.with_connection(flow, now, |connection, _| connection.reduce_mtu(mtu));
                self.enqueue(flow);
            }
            // Nobody is called on where nobody listens: a host's REJECT in front of the port (RFC
            // 1122 section 4.2.3.9).
            (Some((_, Flow::Tcp(connection))), _) if connection.phase() == Phase::Calling => {
                self.end(flow, true);
            }
            // The client's next may find somebody; the session is the port's, and nobody would hear
            // of its end.
            (
                Some((_, Flow::Datagrams(Session { via: Via::Port { stats, .. }, .. }))),
                Problem::PortUnreachable,
            ) => {
                stats.refusals.add(1);
            }
            // With its socket gone, the far end is told by the host what the guest told us.
            (Some((_, Flow::Datagrams(_))), Problem::PortUnreachable) => self.end(flow, false),
            // A TCP that is attacked this way must not give in (RFC 5927); it has its timers.
            _ => {}
        }
    }

    /// Tells the guest what is wrong with `packet`. `teller` is who says so, if not we.
    pub(super) fn tell(
        &mut self,
        problem: Problem,
        teller: Option<IpAddr>,
        packet: &Packet<'_>,
        now: Instant,
    ) {
        // RFC 1122 section 3.2.2: never about what went to more than one.
        let many = match packet.destination {
            IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
            IpAddr::V6(ip) => ip.is_multicast(),
        };
        if many || !self.may_tell(packet.source, now) {
            return;
        }
        let own = self.own_address(packet.destination);
        let teller = teller.filter(|ip| ip.is_ipv4() == own.is_ipv4()).unwrap_or(own);
        let quotation = [packet.header, packet.payload];
        let (head, message) = head::problem(teller, packet.source, problem, &quotation);
        self.host.emit(head.bytes(), &[IoSlice::new(&message)]);
    }

    /// Whether `source` may be told of one error more.
    pub(super) fn may_tell(&mut self, source: IpAddr, now: Instant) -> bool {
        let network = self.settings.policy.network_of(source);
        self.flows.may_tell(source, network, now)
    }

    /// As [`Self::tell`], about a SYN that is long gone.
    pub(super) fn tell_recalled(
        &mut self,
        problem: Problem,
        key: FlowKey,
        sequence: u32,
        now: Instant,
    ) {
        let transport = head::recalled_ports(key.inside, key.outside, sequence);
        self.tell_about(problem, None, key, &transport, &[], now);
    }

    /// As [`Self::tell`], about a packet that is gone: its headers are written anew.
    pub(super) fn tell_about(
        &mut self,
        problem: Problem,
        teller: Option<IpAddr>,
        key: FlowKey,
        transport: &[u8],
        payload: &[u8],
        now: Instant,
    ) {
        if !self.may_tell(key.inside.ip(), now) {
            return;
        }
        let (inside, outside) = (key.inside.ip(), key.outside.ip());
        let own = self.own_address(outside);
        let teller = teller.filter(|ip| ip.is_ipv4() == own.is_ipv4()).unwrap_or(own);
        let length = transport.len() + payload.len();
        let header = head::recalled(inside, outside, key.protocol, transport, length);
        let (head, message) = head::problem(teller, inside, problem, &[&header, payload]);
        self.host.emit(head.bytes(), &[IoSlice::new(&message)]);
    }
}
