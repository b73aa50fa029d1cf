//! What the engine counts, and how it is told to Prometheus.
//!
//! One thread writes and others read, so counting is a load and a store and no locked instruction.
//! The families are rendered at scrape time with the label `network` and are gone with the engine,
//! as those of published ports are.

use crate::flow_table::Limit;
use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_reactor::Descriptors;

/// Why a packet was not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// It is not the packet that it claims to be.
    Malformed,
    /// Its source is none of the containers'.
    ForeignSource,
    /// Nothing here speaks its protocol.
    Protocol,
    /// Its destination is refused.
    Policy,
    /// The flow table is full.
    TableFull,
    /// Its source makes new flows too fast.
    Rate,
    /// Too many flows of its source, or of its network, stay unanswered.
    Unanswered,
    /// The queue was full, and its source or its network held most of it.
    Queue,
    /// There are too many sources.
    Sources,
    /// No descriptors are left.
    Descriptors,
    /// There is no way to its destination.
    Unreachable,
    /// This process may have no ping sockets (`net.ipv4.ping_group_range`).
    PingRefused,
    /// It fits no connection, or the connection's window does not hold it.
    Window,
    /// Its source has its share of buffered bytes, or a queue is full.
    Buffers,
    /// Pieces that do not fit together, too many of them, or too late.
    Fragments,
    /// The socket's send buffer is full.
    NoRoom,
    /// It is too big for the path and may not be cut.
    TooBig,
    /// It has been under way for too many hops.
    HopLimit,
    /// The device took it not.
    Device,
    /// It came from an address that the container has not sent to.
    Unsolicited,
    /// It came to a published port, from who may not ask there, or pretends to be somebody.
    ShutOut,
    /// It came to a published port, and every five-tuple that could tell its flow from others is
    /// taken.
    Conflict,
    /// It came to a published port, from a client that has its share of connections.
    ClientLimit,
}

impl DropReason {
    /// All of them.
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
        Self::ShutOut,
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
            Self::ShutOut => "shut_out",
            Self::Conflict => "conflict",
            Self::ClientLimit => "client_limit",
        }
    }
}

/// The kinds of flows, as the label `protocol` tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowKind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echoes.
    Icmp,
}

impl FlowKind {
    /// All of them.
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

/// A number that one thread writes.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `more`.
    pub fn add(&self, more: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// Takes one off.
    pub fn sub(&self) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_sub(1), Ordering::Relaxed);
    }

    /// It is `value` now.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// What it is now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The figures of an engine. "Out" is from the container to the world, "in" the other way.
#[derive(Debug, Default)]
pub struct Stats {
    /// Flows now, by [`FlowKind`].
    pub flows: [Count; 3],
    /// Flows begun, by [`FlowKind`].
    pub flows_begun: [Count; 3],
    /// Payload carried: out, in.
    pub bytes: [Count; 2],
    /// Packets that crossed the device, one with segmentation offload counting once: out, in.
    pub packets: [Count; 2],
    /// Packets not carried, by [`DropReason`].
    pub dropped: [Count; DropReason::ALL.len()],
    /// TCP connections that were not reached, or ended in a reset.
    pub resets: Count,
    /// Times that the engine went back to what the container had not acknowledged.
    pub retransmissions: Count,
    /// UDP and ICMP sessions ended before their time to make room.
    pub evicted: Count,
    /// Flows ended before their time to make room, by [`Limit`](crate::flow_table::Limit).
    pub evicted_by_limit: [Count; Limit::ALL.len()],
    /// Sources that are remembered.
    pub sources: Count,
    /// The most flows that one source has, and the most that are unanswered.
    pub largest_shares: [Count; 2],
    /// Bytes of packets that wait in the queue.
    pub queued_bytes: Count,
}

/// The figures of an engine, and what its tables may hold.
#[derive(Clone, Debug)]
pub struct Figures {
    /// What it counts.
    pub stats: Arc<Stats>,
    /// Flows at most.
    pub flows_limit: u64,
    /// Flows at most of one container, and as many again that come in by its published ports.
    pub share_limit: u64,
    /// Unanswered flows at most of one container.
    pub unanswered_limit: u64,
    /// Bytes at most of packets that wait.
    pub queued_bytes_limit: u64,
    /// Sources at most.
    pub sources_limit: u64,
    /// What its sockets count against.
    pub descriptors: Arc<Descriptors>,
}

/// The figures of a published port.
#[derive(Debug, Default)]
pub struct ForwardStats {
    /// Flows now.
    pub flows: Count,
    /// Flows begun.
    pub flows_begun: Count,
    /// Sessions ended before their time to make room.
    pub evicted: Count,
    /// Clients' connections that were refused, and datagrams that were not carried, either way, by
    /// [`DropReason`].
    pub dropped: [Count; DropReason::ALL.len()],
    /// Datagrams that the guest has refused: nobody listens, so it told by ICMP.
    pub refusals: Count,
    /// Flows that showed the gateway where the client was to be shown, because the five-tuple was
    /// taken or of another family.
    pub fallbacks: Count,
    /// Payload carried: out (to the client), in.
    pub bytes: [Count; 2],
    /// Datagrams carried: out, in.
    pub datagrams: [Count; 2],
}

impl ForwardStats {
    pub(crate) fn refuse(&self, reason: DropReason, count: u64) {
        self.dropped[reason as usize].add(count);
    }

    /// What was refused or dropped, for whatever reason.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.dropped.iter().map(Count::get).sum()
    }

    /// Counts payload that was carried: out (0) or in (1).
    pub(crate) fn carried(&self, direction: usize, bytes: u64, datagrams: u64) {
        self.bytes[direction].add(bytes);
        self.datagrams[direction].add(datagrams);
    }
}

impl Stats {
    pub(crate) fn refuse(&self, reason: DropReason) {
        self.dropped[reason as usize].add(1);
        tracing::trace!(reason = reason.as_str(), "packet dropped");
    }

    /// Packets dropped for `reason`.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize].get()
    }

    /// Flows of `kind` now.
    #[must_use]
    pub fn flows(&self, kind: FlowKind) -> u64 {
        self.flows[kind as usize].get()
    }
}

/// A family of series.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// `counter` or `gauge`.
    pub kind: &'static str,
    /// Its label beside `network`, if it has one.
    pub label: Option<&'static str>,
    /// What it tells, in a sentence.
    pub help: &'static str,
}

const fn family(
    name: &'static str,
    kind: &'static str,
    label: Option<&'static str>,
    help: &'static str,
) -> Family {
    Family { name, kind, label, help }
}

/// The families of an engine.
pub const FAMILIES: [Family; 20] = [
    family(
        "tidegate_nat_flows",
        "gauge",
        Some("protocol"),
        "Flows from containers to the world now.",
    ),
    family(
        "tidegate_nat_flows_limit",
        "gauge",
        None,
        "Flows that there may be, of all protocols together.",
    ),
    family(
        "tidegate_nat_endpoint_flows_max",
        "gauge",
        None,
        "Flows of the endpoint that has most, counted apart for its published ports.",
    ),
    family("tidegate_nat_endpoint_flows_limit", "gauge", None, "Flows that one endpoint may have."),
    family(
        "tidegate_nat_endpoint_unanswered_max",
        "gauge",
        None,
        "Flows without an answer of the endpoint that has most of them.",
    ),
    family(
        "tidegate_nat_endpoint_unanswered_limit",
        "gauge",
        None,
        "Flows without an answer that one endpoint may have.",
    ),
    family(
        "tidegate_nat_queued_bytes",
        "gauge",
        None,
        "Bytes of packets that wait for their turn.",
    ),
    family("tidegate_nat_queued_bytes_limit", "gauge", None, "Bytes of packets that may wait."),
    family("tidegate_nat_sources", "gauge", None, "Addresses of containers that are remembered."),
    family("tidegate_nat_sources_limit", "gauge", None, "Addresses that may be remembered."),
    family("tidegate_nat_descriptors", "gauge", None, "File descriptors taken by flows."),
    family(
        "tidegate_nat_descriptors_limit",
        "gauge",
        None,
        "File descriptors that flows may take.",
    ),
    family("tidegate_nat_flows_total", "counter", Some("protocol"), "Flows begun by containers."),
    family(
        "tidegate_nat_bytes_total",
        "counter",
        Some("direction"),
        "Payload carried: out to the world, in to the container.",
    ),
    family(
        "tidegate_nat_packets_total",
        "counter",
        Some("direction"),
        "Packets that crossed the device; one that is cut later counts once.",
    ),
    family(
        "tidegate_nat_dropped_packets_total",
        "counter",
        Some("reason"),
        "Packets that were not carried.",
    ),
    family(
        "tidegate_nat_connection_resets_total",
        "counter",
        None,
        "TCP connections that reached nobody, or ended in a reset.",
    ),
    family(
        "tidegate_nat_retransmissions_total",
        "counter",
        None,
        "Times that the engine sent again what a container had not acknowledged.",
    ),
    family(
        "tidegate_nat_evicted_flows_total",
        "counter",
        Some("limit"),
        "Flows ended before their time to make room, by the limit that was reached.",
    ),
    family(
        "tidegate_nat_evicted_sessions_total",
        "counter",
        None,
        "UDP and ICMP sessions ended before their time to make room.",
    ),
];

impl Figures {
    fn values(&self, family: &str) -> Vec<(Option<&'static str>, u64)> {
        let labelled = |labels: &[&'static str], counts: &[Count]| {
            labels.iter().zip(counts).map(|(label, count)| (Some(*label), count.get())).collect()
        };
        let (kinds, directions) = (FlowKind::ALL.map(FlowKind::as_str), ["out", "in"]);
        let stats = &self.stats;
        let one = |value| vec![(None, value)];
        match family {
            "tidegate_nat_flows" => labelled(&kinds, &stats.flows),
            "tidegate_nat_flows_limit" => one(self.flows_limit),
            "tidegate_nat_endpoint_flows_max" => one(stats.largest_shares[0].get()),
            "tidegate_nat_endpoint_flows_limit" => one(self.share_limit),
            "tidegate_nat_endpoint_unanswered_max" => one(stats.largest_shares[1].get()),
            "tidegate_nat_endpoint_unanswered_limit" => one(self.unanswered_limit),
            "tidegate_nat_queued_bytes" => one(stats.queued_bytes.get()),
            "tidegate_nat_queued_bytes_limit" => one(self.queued_bytes_limit),
            "tidegate_nat_sources" => one(stats.sources.get()),
            "tidegate_nat_sources_limit" => one(self.sources_limit),
            "tidegate_nat_descriptors" => one(self.descriptors.taken() as u64),
            "tidegate_nat_descriptors_limit" => one(self.descriptors.limit() as u64),
            "tidegate_nat_flows_total" => labelled(&kinds, &stats.flows_begun),
            "tidegate_nat_bytes_total" => labelled(&directions, &stats.bytes),
            "tidegate_nat_packets_total" => labelled(&directions, &stats.packets),
            "tidegate_nat_dropped_packets_total" => {
                labelled(&DropReason::ALL.map(DropReason::as_str), &stats.dropped)
            }
            "tidegate_nat_connection_resets_total" => one(stats.resets.get()),
            "tidegate_nat_retransmissions_total" => one(stats.retransmissions.get()),
            "tidegate_nat_evicted_flows_total" => {
                labelled(&Limit::ALL.map(Limit::as_str), &stats.evicted_by_limit)
            }
            "tidegate_nat_evicted_sessions_total" => one(stats.evicted.get()),
            _ => Vec::new(),
        }
    }
}

/// Writes the families of `engines`, each with its network's name, in the text format of Prometheus
/// (exposition format 0.0.4).
///
/// # Errors
/// Only those of `out`.
pub fn describe(engines: &[(&str, &Figures)], out: &mut impl Write) -> fmt::Result {
    for family in &FAMILIES {
        writeln!(
            out,
            "# HELP {} {}\n# TYPE {} {}",
            family.name, family.help, family.name, family.kind
        )?;
        for (network, figures) in engines {
            for (value_of_label, value) in figures.values(family.name) {
                write!(out, "{}{{network=\"{network}\"", family.name)?;
                if let (Some(label), Some(value)) = (family.label, value_of_label) {
                    write!(out, ",{label}=\"{value}\"")?;
                }
                writeln!(out, "}} {value}")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_told_once_and_with_its_labels() {
        let stats = Arc::new(Stats::default());
        stats.refuse(DropReason::Policy);
        stats.bytes[1].add(7);
        stats.sources.set(3);
        let descriptors = Arc::new(Descriptors::new(50));
        let _taken = descriptors.take(2);
        let figures = Figures {
            stats,
            flows_limit: 9,
            share_limit: 3,
            unanswered_limit: 2,
            queued_bytes_limit: 5,
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
    fn reasons_are_numbered_as_they_are_listed() {
        for (index, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
        }
    }
}
