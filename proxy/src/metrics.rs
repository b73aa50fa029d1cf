//! What the proxy counts, and how it is told to Prometheus.
//!
//! Families of the whole process go through the `metrics` facade. Those of a port come from the port's own counters at
//! scrape time and are gone with the port: there is nothing to expire, and a quiet port is not forgotten.

use crate::port::{Direction, Drop, Port, Refusal};
use metrics::{Counter, Histogram, Unit, counter, describe_counter, describe_histogram, histogram};
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_model::{Protocol, PublishLabel};

/// What kind of series a family has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// A family of series, one for each port (and label value).
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// What it tells, in a sentence.
    pub help: &'static str,
    /// Its label beside `publish`, if it has one.
    pub label: Option<&'static str>,
}

const fn family(name: &'static str, kind: Kind, label: Option<&'static str>, help: &'static str) -> Family {
    Family { name, kind, help, label }
}

const CONNECTIONS_TOTAL: Family = family(
    "tidegate_proxy_connections_total",
    Kind::Counter,
    None,
    "TCP connections that clients made to a published port, refused ones included.",
);
const CONNECTIONS: Family =
    family("tidegate_proxy_connections", Kind::Gauge, None, "TCP connections through a published port now.");
const RESETS: Family = family(
    "tidegate_proxy_connection_resets_total",
    Kind::Counter,
    None,
    "TCP connections that ended in a reset or an error after the backend was reached.",
);
const REFUSED: Family = family(
    "tidegate_proxy_refused_connections_total",
    Kind::Counter,
    Some("reason"),
    "TCP connections that never reached the backend.",
);
const BYTES: Family = family(
    "tidegate_proxy_bytes_total",
    Kind::Counter,
    Some("direction"),
    "Payload carried: in to the container, out to the client.",
);
const SESSIONS_TOTAL: Family =
    family("tidegate_proxy_sessions_total", Kind::Counter, None, "UDP sessions begun at a published port.");
const SESSIONS: Family =
    family("tidegate_proxy_sessions", Kind::Gauge, None, "UDP sessions of a published port now.");
const EVICTED: Family = family(
    "tidegate_proxy_evicted_sessions_total",
    Kind::Counter,
    None,
    "UDP sessions ended before their time to make room for new ones.",
);
const DATAGRAMS: Family = family(
    "tidegate_proxy_datagrams_total",
    Kind::Counter,
    Some("direction"),
    "Datagrams carried: in to the container, out to the client.",
);
const DROPPED: Family = family(
    "tidegate_proxy_dropped_datagrams_total",
    Kind::Counter,
    Some("reason"),
    "Datagrams that were not carried; of backend_refused, those the backend told about.",
);

/// The families of a port.
pub const FAMILIES: [Family; 10] = [
    CONNECTIONS_TOTAL,
    CONNECTIONS,
    RESETS,
    REFUSED,
    BYTES,
    SESSIONS_TOTAL,
    SESSIONS,
    EVICTED,
    DATAGRAMS,
    DROPPED,
];

/// The figures of one port at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSnapshot {
    /// Which port.
    pub label: PublishLabel,
    /// TCP connections accepted, or UDP sessions begun.
    pub accepted: u64,
    /// TCP connections or UDP sessions now.
    pub live: usize,
    /// TCP connections that ended in a reset, or UDP sessions evicted.
    pub cut: u64,
    /// Payload, indexed by [`Direction`].
    pub bytes: [u64; Direction::ALL.len()],
    /// Datagrams, indexed by [`Direction`].
    pub datagrams: [u64; Direction::ALL.len()],
    /// Connections refused, indexed by [`Refusal`].
    pub refused: [u64; Refusal::ALL.len()],
    /// Datagrams dropped, indexed by [`Drop`].
    pub dropped: [u64; Drop::ALL.len()],
}

impl PortSnapshot {
    pub(crate) fn of(port: &Port) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stats = &port.stats;
        Self {
            label: port.label,
            accepted: read(&stats.accepted),
            live: stats.live.load(Ordering::Relaxed),
            cut: read(&stats.cut),
            bytes: stats.bytes.each_ref().map(read),
            datagrams: stats.datagrams.each_ref().map(read),
            refused: stats.refused.each_ref().map(read),
            dropped: stats.dropped.each_ref().map(read),
        }
    }

    /// The values of `family` for this port, each with the value of the family's label.
    fn values(&self, family: &Family) -> Vec<(Option<&'static str>, u64)> {
        let tcp = self.label.protocol() == Protocol::Tcp;
        let directions = |values: &[u64]| {
            Direction::ALL.iter().map(|d| Some(d.as_str())).zip(values.iter().copied()).collect()
        };
        match family.name {
            name if name == CONNECTIONS_TOTAL.name && tcp => vec![(None, self.accepted)],
            name if name == CONNECTIONS.name && tcp => vec![(None, self.live as u64)],
            name if name == RESETS.name && tcp => vec![(None, self.cut)],
            name if name == REFUSED.name && tcp => {
                Refusal::ALL.iter().map(|r| Some(r.as_str())).zip(self.refused).collect()
            }
            name if name == BYTES.name => directions(&self.bytes),
            name if name == SESSIONS_TOTAL.name && !tcp => vec![(None, self.accepted)],
            name if name == SESSIONS.name && !tcp => vec![(None, self.live as u64)],
            name if name == EVICTED.name && !tcp => vec![(None, self.cut)],
            name if name == DATAGRAMS.name && !tcp => directions(&self.datagrams),
            name if name == DROPPED.name && !tcp => {
                Drop::ALL.iter().map(|d| Some(d.as_str())).zip(self.dropped).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Writes the families of `ports` in the text format of Prometheus (exposition format 0.0.4).
///
/// # Errors
/// Only those of `out`.
pub fn describe(ports: &[PortSnapshot], out: &mut impl Write) -> fmt::Result {
    for family in &FAMILIES {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
        };
        writeln!(out, "# HELP {} {}\n# TYPE {} {kind}", family.name, family.help, family.name)?;
        for port in ports {
            for (value_of_label, value) in port.values(family) {
                write!(out, "{}{{publish=\"{}\"", family.name, port.label)?;
                if let (Some(label), Some(value)) = (family.label, value_of_label) {
                    write!(out, ",{label}=\"{value}\"")?;
                }
                writeln!(out, "}} {value}")?;
            }
        }
    }
    Ok(())
}

/// The families of the process, resolved once.
pub(crate) struct ProcessMetrics {
    pub(crate) dial_seconds: Histogram,
    pub(crate) accept_pauses: Counter,
}

impl ProcessMetrics {
    pub(crate) fn new() -> Self {
        const DIAL: &str = "tidegate_proxy_dial_seconds";
        const PAUSES: &str = "tidegate_proxy_accept_pauses_total";
        describe_histogram!(DIAL, Unit::Seconds, "Time from accepting a client to reaching its backend.");
        describe_counter!(PAUSES, "Times that a port stopped accepting because descriptors had run out.");
        Self { dial_seconds: histogram!(DIAL), accept_pauses: counter!(PAUSES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(label: &str) -> PortSnapshot {
        PortSnapshot {
            label: label.parse().unwrap(),
            accepted: 3,
            live: 2,
            cut: 1,
            bytes: [10, 20],
            datagrams: [4, 5],
            refused: [0; Refusal::ALL.len()],
            dropped: [0; Drop::ALL.len()],
        }
    }

    #[test]
    fn each_family_is_told_once_and_only_for_the_protocol_it_is_of() {
        let mut text = String::new();
        describe(&[snapshot("0.0.0.0:8080/tcp"), snapshot("[::]:53/udp")], &mut text).unwrap();
        for family in FAMILIES {
            assert_eq!(text.matches(&format!("# TYPE {} ", family.name)).count(), 1);
        }
        assert!(text.contains("tidegate_proxy_connections{publish=\"0.0.0.0:8080/tcp\"} 2\n"));
        assert!(text.contains("tidegate_proxy_bytes_total{publish=\"[::]:53/udp\",direction=\"out\"} 20\n"));
        assert!(!text.contains("tidegate_proxy_connections{publish=\"[::]:53/udp\"}"));
        assert!(!text.contains("tidegate_proxy_sessions{publish=\"0.0.0.0:8080/tcp\"}"));
    }
}
