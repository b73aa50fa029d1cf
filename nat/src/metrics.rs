//! Counters of the engine, and their Prometheus families.
//!
//! A single thread writes each counter, so an update is a load and a store without a locked
//! instruction. The families are rendered at scrape time with the label `network`, and disappear
//! with the engine.

use crate::flow_table::Limit;
use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_model::exposition::{Family, Labels};
use tidegate_model::{Direction, PerDirection};
use tidegate_reactor::Descriptors;

/// Reason for dropping a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// The packet is malformed.
    Malformed,
    /// The source address does not belong to a container.
    ForeignSource,
    /// The protocol is not supported.
    Protocol,
    /// The policy rejects the destination.
    Policy,
    /// The flow table is full.
    TableFull,
    /// The source exceeds its rate of new flows.
    Rate,
    /// The source or its network has exhausted the budget for unanswered flows.
    Unanswered,
    /// The queue was full, and the source or its network used most of it.
    Queue,
    /// The table of sources is full.
    Sources,
    /// No file descriptor is available.
    Descriptors,
    /// The destination is unreachable.
    Unreachable,
    /// Ping sockets are not permitted for this process (`net.ipv4.ping_group_range`).
    PingRefused,
    /// The segment matches no connection, or is outside of the receive window.
    Window,
    /// The buffer limit of the source is reached, or a queue is full.
    Buffers,
    /// Fragments that overlap, are too many, or arrive too late.
    Fragments,
    /// The socket's send buffer is full.
    NoRoom,
    /// The packet exceeds the path MTU and has DF set.
    TooBig,
    /// The hop limit is exceeded.
    HopLimit,
    /// The device rejected the packet.
    Device,
    /// The datagram came from an address that the container has not sent to.
    Unsolicited,
    /// At a published port: the access guard denied the client, or the source address is spoofed.
    Denied,
    /// At a published port: all five-tuples that could identify the flow are in use.
    Conflict,
    /// At a published port: the client has reached its limit of connections.
    ClientLimit,
}

impl DropReason {
    /// All reasons.
    pub const ALL: [Self; 23] = [
        Self::Malformed,
        Self::ForeignSource,
        Self::Protocol,
        Self::Policy,
        Self::TableFull,
        Self::Rate,
        Self::Unanswered,
        Self::Queue,
        Self::Sources,
        Self::Descriptors,
        Self::Unreachable,
        Self::PingRefused,
        Self::Window,
        Self::Buffers,
        Self::Fragments,
        Self::NoRoom,
        Self::TooBig,
        Self::HopLimit,
        Self::Device,
        Self::Unsolicited,
        Self::Denied,
        Self::Conflict,
        Self::ClientLimit,
    ];

    /// The value of the label `reason`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::ForeignSource => "foreign_source",
            Self::Protocol => "protocol",
            Self::Policy => "policy",
            Self::TableFull => "table_full",
            Self::Rate => "rate",
            Self::Unanswered => "unanswered",
            Self::Queue => "queue",
            Self::Sources => "sources",
            Self::Descriptors => "descriptors",
            Self::Unreachable => "unreachable",
            Self::PingRefused => "ping_refused",
            Self::Window => "window",
            Self::Buffers => "buffers",
            Self::Fragments => "fragments",
            Self::NoRoom => "no_room",
            Self::TooBig => "too_big",
            Self::HopLimit => "hop_limit",
            Self::Device => "device",
            Self::Unsolicited => "unsolicited",
            Self::Denied => "denied",
            Self::Conflict => "conflict",
            Self::ClientLimit => "client_limit",
        }
    }
}

/// Kinds of flows, as distinguished by the label `protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowKind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echoes.
    Icmp,
}

impl FlowKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Icmp];

    /// The value of the label `protocol`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

/// A counter that a single thread writes.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `more`.
    pub fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// Subtracts one.
    pub fn sub(&self) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(1), Ordering::Relaxed);
    }

    /// Sets the value.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Returns the value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of an engine.
#[derive(Debug, Default)]
pub struct Stats {
    /// Current flows, by [`FlowKind`].
    pub flows: [Count; 3],
    /// Flows created, by [`FlowKind`].
    pub flows_begun: [Count; 3],
    /// Payload bytes forwarded.
    pub bytes: PerDirection<Count>,
    /// Packets that crossed the device. A packet with segmentation offload counts once.
    pub packets: PerDirection<Count>,
    /// Packets dropped, by [`DropReason`].
    pub dropped: [Count; DropReason::ALL.len()],
    /// TCP connections that failed or were reset.
    pub resets: Count,
    /// Retransmissions to the container.
    pub retransmissions: Count,
    /// UDP and ICMP sessions evicted.
    pub evicted: Count,
    /// Flows evicted, by [`Limit`](crate::flow_table::Limit).
    pub evicted_by_limit: [Count; Limit::ALL.len()],
    /// Current sources.
    pub sources: Count,
    /// The maximum number of flows of any source, and the maximum number of unanswered flows.
    pub largest_shares: [Count; 2],
    /// Bytes of queued packets.
    pub queued_bytes: Count,
    /// Bytes held for sides that do not take them.
    pub held_bytes: Count,
}

/// Counters of an engine and the limits of its tables.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The counters.
    pub stats: Arc<Stats>,
    /// Maximum number of flows.
    pub flows_limit: u64,
    /// Maximum number of flows per container. Flows through its published ports have a separate
    /// limit of the same size.
    pub share_limit: u64,
    /// Maximum number of unanswered flows per container.
    pub unanswered_limit: u64,
    /// Maximum number of queued bytes.
    pub queued_bytes_limit: u64,
    /// Maximum number of held bytes.
    pub held_bytes_limit: u64,
    /// Maximum number of sources.
    pub sources_limit: u64,
    /// The descriptor budget of its sockets.
    pub descriptors: Arc<Descriptors>,
}

/// Counters of a published port.
#[derive(Debug, Default)]
pub struct ForwardStats {
    /// Current flows.
    pub flows: Count,
    /// Flows created.
    pub flows_begun: Count,
    /// Sessions evicted.
    pub evicted: Count,
    /// Refused client connections, and datagrams dropped in either direction, by [`DropReason`].
    pub dropped: [Count; DropReason::ALL.len()],
    /// Datagrams that the guest rejected with ICMP port unreachable.
    pub refusals: Count,
    /// Flows that showed the gateway address instead of the client address, because the five-tuple
    /// was in use or the address families differed.
    pub fallbacks: Count,
    /// Payload bytes forwarded.
    pub bytes: PerDirection<Count>,
    /// Datagrams forwarded.
    pub datagrams: PerDirection<Count>,
}

impl ForwardStats {
    pub(crate) fn count_drop(&self, reason: DropReason, count: u64) {
        self.dropped[reason as usize].add(count);
    }

    /// Refused connections and dropped datagrams, for all reasons.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.dropped.iter().map(Count::get).sum()
    }

    /// Counts forwarded payload.
    pub(crate) fn carried(&self, direction: Direction, bytes: u64, datagrams: u64) {
        self.bytes[direction].add(bytes);
        self.datagrams[direction].add(datagrams);
    }
}

impl Stats {
    pub(crate) fn count_drop(&self, reason: DropReason) {
        self.dropped[reason as usize].add(1);
        tracing::trace!(reason = reason.as_str(), "packet dropped");
    }

    /// Packets dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize].get()
    }

    /// Current flows of `kind`.
    #[must_use]
    pub fn flows(&self, kind: FlowKind) -> u64 {
        self.flows[kind as usize].get()
    }
}

/// The metric families of an engine.
pub const FAMILIES: [Family; 22] = [
    Family::gauge("tidegate_nat_flows", "Current flows of containers."),
    Family::gauge("tidegate_nat_flows_limit", "Maximum number of flows of all protocols."),
    Family::gauge(
        "tidegate_nat_endpoint_flows_max",
        "Flows of the endpoint with the most flows; flows through its published ports count separately.",
    ),
    Family::gauge("tidegate_nat_endpoint_flows_limit", "Maximum number of flows of one endpoint."),
    Family::gauge(
        "tidegate_nat_endpoint_unanswered_max",
        "Unanswered flows of the endpoint with the most of them.",
    ),
    Family::gauge(
        "tidegate_nat_endpoint_unanswered_limit",
        "Maximum number of unanswered flows of one endpoint.",
    ),
    Family::gauge("tidegate_nat_queued_bytes", "Bytes of packets queued for the engine."),
    Family::gauge("tidegate_nat_queued_bytes_limit", "Maximum number of queued bytes."),
    Family::gauge(
        "tidegate_nat_held_bytes",
        "Bytes held for sides of TCP connections that do not take them.",
    ),
    Family::gauge("tidegate_nat_held_bytes_limit", "Maximum number of held bytes."),
    Family::gauge("tidegate_nat_sources", "Container addresses in the flow table."),
    Family::gauge("tidegate_nat_sources_limit", "Maximum number of container addresses."),
    Family::gauge("tidegate_nat_descriptors", "File descriptors used by flows."),
    Family::gauge(
        "tidegate_nat_descriptors_limit",
        "Maximum number of file descriptors for flows.",
    ),
    Family::counter("tidegate_nat_flows_total", "Flows created by containers."),
    Family::counter(
        "tidegate_nat_bytes_total",
        "Payload bytes forwarded: out of the container, or in to it.",
    ),
    Family::counter(
        "tidegate_nat_packets_total",
        "Packets that crossed the device; a packet with segmentation offload counts once.",
    ),
    Family::counter("tidegate_nat_dropped_packets_total", "Packets dropped, by reason."),
    Family::counter(
        "tidegate_nat_connection_resets_total",
        "TCP connections that failed or were reset.",
    ),
    Family::counter(
        "tidegate_nat_retransmissions_total",
        "Retransmissions of data that a container had not acknowledged.",
    ),
    Family::counter(
        "tidegate_nat_evicted_flows_total",
        "Flows evicted, by the limit that was reached.",
    ),
    Family::counter(
        "tidegate_nat_evicted_sessions_total",
        "UDP and ICMP sessions evicted to make room.",
    ),
];

/// The values of a family for one engine.
enum Values {
    One(u64),
    /// The name of the label, and each of its values with the value of the series.
    ByLabel(&'static str, Vec<(&'static str, u64)>),
}

impl Figures {
    /// The values of `family`: with a label, its name and the value for each of its values.
    fn values(&self, family: &str) -> Values {
        let by_direction = |counts: &PerDirection<Count>| {
            let count = |direction: Direction| (direction.as_str(), counts[direction].get());
            Values::ByLabel("direction", [Direction::Out, Direction::In].map(count).to_vec())
        };
        let labelled = |label: &'static str, values: &[&'static str], counts: &[Count]| {
            let counts = counts.iter().map(Count::get);
            Values::ByLabel(label, values.iter().copied().zip(counts).collect())
        };
        let kinds = FlowKind::ALL.map(FlowKind::as_str);
        let stats = &self.stats;
        let one = Values::One;
        match family {
            "tidegate_nat_flows" => labelled("protocol", &kinds, &stats.flows),
            "tidegate_nat_flows_limit" => one(self.flows_limit),
            "tidegate_nat_endpoint_flows_max" => one(stats.largest_shares[0].get()),
            "tidegate_nat_endpoint_flows_limit" => one(self.share_limit),
            "tidegate_nat_endpoint_unanswered_max" => one(stats.largest_shares[1].get()),
            "tidegate_nat_endpoint_unanswered_limit" => one(self.unanswered_limit),
            "tidegate_nat_queued_bytes" => one(stats.queued_bytes.get()),
            "tidegate_nat_queued_bytes_limit" => one(self.queued_bytes_limit),
            "tidegate_nat_held_bytes" => one(stats.held_bytes.get()),
            "tidegate_nat_held_bytes_limit" => one(self.held_bytes_limit),
            "tidegate_nat_sources" => one(stats.sources.get()),
            "tidegate_nat_sources_limit" => one(self.sources_limit),
            "tidegate_nat_descriptors" => one(self.descriptors.taken() as u64),
            "tidegate_nat_descriptors_limit" => one(self.descriptors.limit() as u64),
            "tidegate_nat_flows_total" => labelled("protocol", &kinds, &stats.flows_begun),
            "tidegate_nat_bytes_total" => by_direction(&stats.bytes),
            "tidegate_nat_packets_total" => by_direction(&stats.packets),
            "tidegate_nat_dropped_packets_total" => {
                labelled("reason", &DropReason::ALL.map(DropReason::as_str), &stats.dropped)
            }
            "tidegate_nat_connection_resets_total" => one(stats.resets.get()),
            "tidegate_nat_retransmissions_total" => one(stats.retransmissions.get()),
            "tidegate_nat_evicted_flows_total" => {
                labelled("limit", &Limit::ALL.map(Limit::as_str), &stats.evicted_by_limit)
            }
            "tidegate_nat_evicted_sessions_total" => one(stats.evicted.get()),
            _ => Values::ByLabel("", Vec::new()),
        }
    }
}

/// Writes the families of `engines`, each with the name of its network, in the text format of
/// Prometheus (exposition format 0.0.4).
///
/// # Errors
/// Only errors of `out`.
pub fn describe(engines: &[(&str, &Figures)], out: &mut impl Write) -> fmt::Result {
    for family in &FAMILIES {
        family.write_head(out)?;
        for (network, figures) in engines {
            match figures.values(family.name) {
                Values::One(value) => family.write_value(&[("network", network)], value, out)?,
                Values::ByLabel(label, values) => {
                    for (label_value, value) in values {
                        let labels: Labels<'_> = &[("network", network), (label, &label_value)];
                        family.write_value(labels, value, out)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_described_once_with_its_labels() {
        let stats = Arc::new(Stats::default());
        stats.count_drop(DropReason::Policy);
        stats.bytes[Direction::In].add(7);
        stats.sources.set(3);
        let descriptors = Arc::new(Descriptors::new(50));
        let _taken = descriptors.take(2);
        let figures = Figures {
            stats,
            flows_limit: 9,
            share_limit: 3,
            unanswered_limit: 2,
            queued_bytes_limit: 5,
            held_bytes_limit: 6,
            sources_limit: 4,
            descriptors,
        };
        let mut text = String::new();
        describe(&[("blue", &figures)], &mut text).unwrap();
        for family in FAMILIES {
            assert_eq!(text.matches(&format!("# TYPE {} ", family.name)).count(), 1);
            assert!(
                text.contains(&format!("\n{}{{network=\"blue\"", family.name)),
                "{}",
                family.name
            );
        }
        assert!(text.contains("tidegate_nat_descriptors{network=\"blue\"} 2\n"));
        assert!(text.contains("tidegate_nat_sources_limit{network=\"blue\"} 4\n"));
        assert!(text.contains(
            "tidegate_nat_dropped_packets_total{network=\"blue\",reason=\"policy\"} 1\n"
        ));
        assert!(text.contains("tidegate_nat_bytes_total{network=\"blue\",direction=\"in\"} 7\n"));
        assert!(text.contains("tidegate_nat_connection_resets_total{network=\"blue\"} 0\n"));
        assert!(text.contains(
            "tidegate_nat_evicted_flows_total{network=\"blue\",limit=\"unanswered\"} 0\n"
        ));
    }

    #[test]
    fn reasons_are_numbered_in_list_order() {
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }
}
