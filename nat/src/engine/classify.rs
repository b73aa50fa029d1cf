//! Classification of packets: queue, cost, and admission before any resource is allocated.
//!
//! A flood consists of packets that create flows. Dropping them after queueing would still take
//! queue space from others, and creating each flow costs a socket. So packets that create flows
//! above the budgets ([`FlowTable`](crate::flow_table::FlowTable)) are dropped when they are read
//! from the device, before the queue.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::Engine;
use crate::flow_table::{Admission, FlowKey, Origin};
use crate::host::Host;
use crate::metrics::DropReason;
use crate::settings::Mapping;
use crate::wire::ip::Packet;
use crate::wire::tcp::flags;
use crate::wire::virtio::VirtioHeader;
use crate::wire::{protocol, read_u16};
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;
use tidegate_model::Direction;

/// Cost of any packet in addition to its bytes.
const PACKET_COST: u32 = 2048;

/// Cost of a packet that creates a flow: as measured, about that of a write of 64 KiB.
const FLOW_COST: u32 = 65_536;

/// Quantum of the queue: sufficient to create a flow, or to send the largest packet, in one turn.
pub const QUANTUM: u32 = FLOW_COST;

/// Dropped SYNs per flood report ([`FloodListener`](crate::settings::FloodListener)).
const REFUSED_PER_REPORT: u32 = 64;

/// Queue and cost of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// Network of the source.
    pub network: u16,
    /// Source address.
    pub endpoint: IpAddr,
    /// Cost of processing, in equivalent bytes copied.
    pub cost: u32,
    /// Admission of the flow that the packet creates.
    pub admission: Option<Admission>,
}

/// A parsed frame of the device.
#[derive(Clone, Copy, Debug)]
pub struct Parsed<'a> {
    pub(super) header: VirtioHeader,
    pub(super) packet: Packet<'a>,
}

impl<'a> Parsed<'a> {
    /// Parses a frame; `None` if it is malformed.
    pub(super) fn of(frame: &'a [u8]) -> Option<Self> {
        let (header, bytes) = VirtioHeader::parse(frame)?;
        Some(Self { header, packet: Packet::parse(bytes).ok()? })
    }
}

impl<H: Host> Engine<H> {
    /// Classifies a frame of the device, including the virtio header. A drop is counted and returns
    /// `None`.
    pub fn classify<'a>(&mut self, frame: &'a [u8], now: Instant) -> Option<(Class, Parsed<'a>)> {
        self.stats.packets[Direction::Out].add(1);
        let Some(parsed) = Parsed::of(frame) else {
            self.stats.count_drop(DropReason::Malformed);
            return None;
        };
        let packet = &parsed.packet;
        let policy = &self.settings.policy;
        if !policy.accepts_source(packet.source) {
            self.stats.count_drop(DropReason::ForeignSource);
            return None;
        }
        let (endpoint, network) = (packet.source, policy.network_of(packet.source));
        let bytes = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let mut cost = bytes.saturating_add(PACKET_COST);
        let mut admission = None;
        if packet.fragment.is_none() && self.begins_flow(packet) {
            match self.flows.admit(endpoint, network, Origin::Inside, now) {
                Ok(admitted) => admission = Some(admitted),
                Err(refused) => {
                    if packet.protocol == protocol::TCP {
                        self.report_flood(endpoint);
                    }
                    self.count_limit_drop(super::drop_reason(refused), Some(endpoint), now);
                    return None;
                }
            }
            cost = cost.saturating_add(FLOW_COST);
        }
        Some((Class { network, endpoint, cost, admission }, parsed))
    }

    /// Counts a dropped SYN. The more SYNs an endpoint sends, the more likely it is reported.
    fn report_flood(&mut self, endpoint: IpAddr) {
        self.refused_syns = self.refused_syns.wrapping_add(1);
        if self.refused_syns.is_multiple_of(REFUSED_PER_REPORT)
            && let Some(floods) = &self.settings.floods
        {
            floods.flooding(endpoint);
        }
    }

    /// Whether `packet` would create a flow.
    fn begins_flow(&self, packet: &Packet<'_>) -> bool {
        let Some(ports) = packet.payload.get(..4) else { return false };
        let (source, destination) = (read_u16(ports, 0), read_u16(ports, 2));
        let (source, destination) = match packet.protocol {
            protocol::TCP => {
                let flags = packet.payload.get(13).copied().unwrap_or(0);
                if flags & (flags::SYN | flags::ACK) != flags::SYN {
                    return false;
                }
                (source, destination)
            }
            protocol::UDP => (source, destination),
            // An echo request: type and code, checksum, identifier.
            protocol::ICMP | protocol::ICMPV6 if matches!(packet.payload[0], 8 | 128) => {
                (packet.payload.get(4..6).map_or(0, |bytes| read_u16(bytes, 0)), 0)
            }
            _ => return false,
        };
        let key = FlowKey {
            inside: SocketAddr::new(packet.source, source),
            outside: SocketAddr::new(packet.destination, destination),
            protocol: packet.protocol,
        };
        let shares_socket = packet.protocol == protocol::UDP
            && self.settings.mapping == Mapping::EndpointIndependent;
        self.flows.find(&key).is_none()
            && !(shares_socket && self.flows.find(&super::datagrams::shared_key(key)).is_some())
    }
}
