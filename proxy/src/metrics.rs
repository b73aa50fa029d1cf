//! Metrics of the proxy in the Prometheus text format.
//!
//! Families of the whole process use the `metrics` facade. Families of a port are written from the
//! counters of that port at scrape time and disappear with the port. No series expires, so an idle
//! port keeps its series.
//!
//! A TCP port has 37 series, 22 of them of histograms; a UDP port has 26, of which 11. Histograms
//! have only the label `publish`. Dial times and lifetimes are questions about one port, and a
//! further label for direction or reason would double the page.
//! [`ports_with_series`](crate::Settings::ports_with_series) bounds the page: ports published
//! beyond it are summed by protocol as `publish="other/tcp"` and `"other/udp"`. A port never
//! changes between its own series and the sum, and the sum keeps the counts of closed ports, so no
//! counter decreases.

use crate::port::{DIAL_BOUNDS, DropReason, LIFE_BOUNDS, Port, Refusal};
use metrics::{Counter, counter, describe_counter};
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_model::{Direction, PerDirection};
use tidegate_model::{HistogramReading, Protocol, PublishLabel, registry};

/// Type of a metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never decreases.
    Counter,
    /// Increases and decreases.
    Gauge,
    /// Durations in buckets.
    Histogram,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric family with one series per port and label value.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// The name of the family.
    pub name: &'static str,
    /// The type of the family.
    pub kind: Kind,
    /// The help text, one sentence.
    pub help: &'static str,
    /// The label besides `publish`, if any.
    pub label: Option<&'static str>,
}

const fn family(
    name: &'static str,
    kind: Kind,
    label: Option<&'static str>,
    help: &'static str,
) -> Family {
    Family { name, kind, help, label }
}

const CONNECTIONS_TOTAL: Family = family(
    "tidegate_proxy_connections_total",
    Kind::Counter,
    None,
    "TCP connections accepted at a published port, including refused ones.",
);
const CONNECTIONS: Family = family(
    "tidegate_proxy_connections",
    Kind::Gauge,
    None,
    "Current TCP connections of a published port.",
);
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
    "Payload forwarded, in bytes: in to the container, out to the client.",
);
const SESSIONS_TOTAL: Family = family(
    "tidegate_proxy_sessions_total",
    Kind::Counter,
    None,
    "UDP sessions started at a published port.",
);
const SESSIONS: Family = family(
    "tidegate_proxy_sessions",
    Kind::Gauge,
    None,
    "Current UDP sessions of a published port.",
);
const EVICTED: Family = family(
    "tidegate_proxy_evicted_sessions_total",
    Kind::Counter,
    None,
    "UDP sessions evicted for new ones.",
);
const DATAGRAMS: Family = family(
    "tidegate_proxy_datagrams_total",
    Kind::Counter,
    Some("direction"),
    "Datagrams forwarded: in to the container, out to the client.",
);
const DROPPED: Family = family(
    "tidegate_proxy_dropped_datagrams_total",
    Kind::Counter,
    Some("reason"),
    "Datagrams dropped; for backend_refused, ICMP errors of the backend.",
);

const CONNECTIONS_LIMIT: Family = family(
    "tidegate_proxy_port_connections_limit",
    Kind::Gauge,
    None,
    "Maximum concurrent TCP connections of a published port.",
);
const SESSIONS_LIMIT: Family = family(
    "tidegate_proxy_port_sessions_limit",
    Kind::Gauge,
    None,
    "Maximum concurrent UDP sessions of a published port.",
);
const DIAL: Family = family(
    "tidegate_proxy_dial_seconds",
    Kind::Histogram,
    None,
    "Time from accept at a published port to the connect of the backend.",
);
const CONNECTION_LIFE: Family = family(
    "tidegate_proxy_connection_seconds",
    Kind::Histogram,
    None,
    "Time from the connect of the backend to the end of a TCP connection, for ended connections.",
);
const SESSION_LIFE: Family = family(
    "tidegate_proxy_session_seconds",
    Kind::Histogram,
    None,
    "Time from the first to the last datagram of a UDP session, for ended sessions.",
);

/// The families of ports.
pub const FAMILIES: [Family; 15] = [
    CONNECTIONS_TOTAL,
    CONNECTIONS,
    CONNECTIONS_LIMIT,
    RESETS,
    REFUSED,
    BYTES,
    SESSIONS_TOTAL,
    SESSIONS,
    SESSIONS_LIMIT,
    EVICTED,
    DATAGRAMS,
    DROPPED,
    DIAL,
    CONNECTION_LIFE,
    SESSION_LIFE,
];

/// The port or ports that a series is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeriesLabel {
    /// A port with its own series.
    Port(PublishLabel),
    /// The sum of all ports of a protocol without their own series.
    Others(Protocol),
}

impl SeriesLabel {
    /// The protocol of the port or ports.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::Port(label) => label.protocol(),
            Self::Others(protocol) => protocol,
        }
    }
}

/// The value of the label `publish`.
impl fmt::Display for SeriesLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(label) => label.fmt(f),
            Self::Others(protocol) => write!(f, "other/{protocol}"),
        }
    }
}

/// Counters of one port, or of several ports summed, at one point in time.
#[derive(Clone, Debug, PartialEq)]
pub struct PortSnapshot {
    /// The port or ports.
    pub series: SeriesLabel,
    /// TCP connections accepted, or UDP sessions started.
    pub accepted: u64,
    /// Current TCP connections or UDP sessions.
    pub live: u64,
    /// Maximum of TCP connections or UDP sessions.
    pub limit: u64,
    /// TCP connections that ended in a reset, or UDP sessions evicted.
    pub cut: u64,
    /// Payload in bytes.
    pub bytes: PerDirection<u64>,
    /// Datagrams, indexed by [`Direction`].
    pub datagrams: PerDirection<u64>,
    /// Connections refused, indexed by [`Refusal`].
    pub refused: [u64; Refusal::ALL.len()],
    /// Datagrams dropped, indexed by [`DropReason`].
    pub dropped: [u64; DropReason::ALL.len()],
    /// Time from accept to the connect of the backend (TCP).
    pub dial: HistogramReading<{ DIAL_BOUNDS.len() }>,
    /// Lifetime of TCP connections or UDP sessions.
    pub life: HistogramReading<{ LIFE_BOUNDS.len() }>,
}

impl PortSnapshot {
    /// A snapshot with all values zero.
    pub fn empty(series: SeriesLabel) -> Self {
        Self {
            series,
            accepted: 0,
            live: 0,
            limit: 0,
            cut: 0,
            bytes: Default::default(),
            datagrams: Default::default(),
            refused: Default::default(),
            dropped: Default::default(),
            dial: HistogramReading::empty(&DIAL_BOUNDS),
            life: HistogramReading::empty(&LIFE_BOUNDS),
        }
    }

    pub(crate) fn of(port: &Port) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (stats, options) = (&port.stats, &port.options);
        let limit = match port.label.protocol() {
            Protocol::Udp => options.sessions.sessions,
            Protocol::Tcp | Protocol::Sctp => options.max_connections,
        };
        let times = stats.times();
        Self {
            series: SeriesLabel::Port(port.label),
            accepted: read(&stats.accepted),
            live: stats.live.load(Ordering::Relaxed) as u64,
            limit: limit as u64,
            cut: read(&stats.cut),
            bytes: PerDirection::new(|direction| read(&stats.bytes[direction])),
            datagrams: PerDirection::new(|direction| read(&stats.datagrams[direction])),
            refused: stats.refused.each_ref().map(read),
            dropped: stats.dropped.each_ref().map(read),
            dial: times.map_or(HistogramReading::empty(&DIAL_BOUNDS), |times| times.dial.read()),
            life: times.map_or(HistogramReading::empty(&LIFE_BOUNDS), |times| times.life.read()),
        }
    }

    /// Adds the counters and gauges of `other`.
    pub fn add(&mut self, other: &Self) {
        self.live += other.live;
        self.limit += other.limit;
        self.add_counted(other);
    }

    /// Adds the counters of `other`, which is closed, but not its gauges.
    pub(crate) fn add_counted(&mut self, other: &Self) {
        self.accepted += other.accepted;
        self.cut += other.cut;
        let add = |sums: &mut [u64], more: &[u64]| {
            sums.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        };
        for direction in Direction::ALL {
            self.bytes[direction] += other.bytes[direction];
            self.datagrams[direction] += other.datagrams[direction];
        }
        add(&mut self.refused, &other.refused);
        add(&mut self.dropped, &other.dropped);
        self.dial.add(&other.dial);
        self.life.add(&other.life);
    }

    /// Writes the series of `family`, if it applies to the protocol.
    fn describe(&self, family: &Family, out: &mut impl Write) -> fmt::Result {
        let tcp = self.series.protocol() == Protocol::Tcp;
        let one = |out: &mut _, value: u64| writeln_series(out, family, self.series, None, value);
        match family.name {
            name if name == CONNECTIONS_TOTAL.name && tcp => one(out, self.accepted),
            name if name == CONNECTIONS.name && tcp => one(out, self.live),
            name if name == CONNECTIONS_LIMIT.name && tcp => one(out, self.limit),
            name if name == RESETS.name && tcp => one(out, self.cut),
            name if name == REFUSED.name && tcp => {
                let mut labelled =
                    Refusal::ALL.iter().map(|reason| reason.as_str()).zip(self.refused);
                labelled.try_for_each(|(label, value)| {
                    writeln_series(out, family, self.series, Some(label), value)
                })
            }
            name if name == BYTES.name => self.describe_directions(family, &self.bytes, out),
            name if name == SESSIONS_TOTAL.name && !tcp => one(out, self.accepted),
            name if name == SESSIONS.name && !tcp => one(out, self.live),
            name if name == SESSIONS_LIMIT.name && !tcp => one(out, self.limit),
            name if name == EVICTED.name && !tcp => one(out, self.cut),
            name if name == DATAGRAMS.name && !tcp => {
                self.describe_directions(family, &self.datagrams, out)
            }
            name if name == DROPPED.name && !tcp => {
                let mut labelled =
                    DropReason::ALL.iter().map(|reason| reason.as_str()).zip(self.dropped);
                labelled.try_for_each(|(label, value)| {
                    writeln_series(out, family, self.series, Some(label), value)
                })
            }
            name if name == DIAL.name && tcp => self.dial.describe(name, &self.labels(), out),
            name if name == CONNECTION_LIFE.name && tcp => {
                self.life.describe(name, &self.labels(), out)
            }
            name if name == SESSION_LIFE.name && !tcp => {
                self.life.describe(name, &self.labels(), out)
            }
            _ => Ok(()),
        }
    }

    fn describe_directions(
        &self,
        family: &Family,
        values: &PerDirection<u64>,
        out: &mut impl Write,
    ) -> fmt::Result {
        Direction::ALL.into_iter().try_for_each(|direction| {
            let label = Some(direction.as_str());
            writeln_series(out, family, self.series, label, values[direction])
        })
    }

    fn labels(&self) -> String {
        format!("publish=\"{}\"", self.series)
    }
}

fn writeln_series(
    out: &mut impl Write,
    family: &Family,
    series: SeriesLabel,
    label_value: Option<&str>,
    value: u64,
) -> fmt::Result {
    write!(out, "{}{{publish=\"{series}\"", family.name)?;
    if let (Some(label), Some(value)) = (family.label, label_value) {
        write!(out, ",{label}=\"{value}\"")?;
    }
    writeln!(out, "}} {value}")
}

/// Writes the families of `ports` in the Prometheus text format (exposition format 0.0.4).
///
/// # Errors
/// Only errors of `out`.
pub fn describe(ports: &[PortSnapshot], out: &mut impl Write) -> fmt::Result {
    for family in &FAMILIES {
        head(family.name, family.kind, family.help, out)?;
        ports.iter().try_for_each(|port| port.describe(family, out))?;
    }
    Ok(())
}

/// Writes the families of `ports` and of `usage`.
///
/// # Errors
/// Only errors of `out`.
pub fn describe_engine(
    ports: &[PortSnapshot],
    usage: &EngineUsage,
    out: &mut impl Write,
) -> fmt::Result {
    describe(ports, out)?;
    usage.describe(out)
}

fn head(name: &str, kind: Kind, help: &str, out: &mut impl Write) -> fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str())
}

/// Use of the limits of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineUsage {
    /// Published ports with their own series, and without.
    pub ports: [u64; 2],
    /// TCP connections of all ports.
    pub connections: u64,
    /// Maximum of `connections`.
    pub connections_limit: u64,
    /// TCP connections of the client that has most.
    pub largest_client: u64,
    /// Bytes that TCP connections hold, or are permitted to hold, for peers that do not read.
    pub held_bytes: u64,
    /// Maximum of `held_bytes`.
    pub held_bytes_limit: u64,
    /// Descriptors in use by connections, sessions and reservations.
    pub descriptors: u64,
    /// Maximum of `descriptors`.
    pub descriptors_limit: u64,
}

/// The families of [`EngineUsage`].
pub const USAGE_FAMILIES: [&str; 7] = [
    "tidegate_proxy_ports",
    "tidegate_proxy_connections_limit",
    "tidegate_proxy_client_connections_max",
    "tidegate_proxy_held_bytes",
    "tidegate_proxy_held_bytes_limit",
    "tidegate_proxy_descriptors",
    "tidegate_proxy_descriptors_limit",
];

impl EngineUsage {
    /// Writes the families in the Prometheus text format (exposition format 0.0.4).
    ///
    /// # Errors
    /// Only errors of `out`.
    pub fn describe(&self, out: &mut impl Write) -> fmt::Result {
        let [
            ports,
            connections_limit,
            largest_client,
            held,
            held_limit,
            descriptors,
            descriptors_limit,
        ] = USAGE_FAMILIES;
        let help = "Published ports, one per socket: own if the port has its own series, other if it is part of a sum.";
        head(ports, Kind::Gauge, help, out)?;
        for (series, count) in ["own", "other"].iter().zip(self.ports) {
            writeln!(out, "{ports}{{series=\"{series}\"}} {count}")?;
        }
        for (name, help, value) in [
            (
                connections_limit,
                "Maximum TCP connections of all published ports.",
                self.connections_limit,
            ),
            (
                largest_client,
                "TCP connections of the client (an IPv4 address or an IPv6 /64) that has most.",
                self.largest_client,
            ),
            (
                held,
                "Memory that TCP connections hold, or are permitted to hold, for peers that do not read, in bytes.",
                self.held_bytes,
            ),
            (held_limit, "Maximum of tidegate_proxy_held_bytes.", self.held_bytes_limit),
            (
                descriptors,
                "File descriptors in use by published ports, connections and sessions.",
                self.descriptors,
            ),
            (descriptors_limit, "Maximum of tidegate_proxy_descriptors.", self.descriptors_limit),
        ] {
            head(name, Kind::Gauge, help, out)?;
            writeln!(out, "{name} {value}")?;
        }
        Ok(())
    }
}

/// Counters of the process, registered once.
pub(crate) struct ProcessMetrics {
    pub(crate) accept_pauses: Counter,
    evicted: [Counter; EVICTING.len()],
    /// Connections evicted because of the byte budget.
    pub(crate) evicted_for_bytes: Counter,
    /// Sockets of ports restored after other software destroyed them.
    pub(crate) revived: Counter,
}

/// Connection limits at which running connections are evicted.
const EVICTING: [Refusal; 2] = [Refusal::PortLimit, Refusal::TotalLimit];

impl ProcessMetrics {
    pub(crate) fn new() -> Self {
        const PAUSES: &str = "tidegate_proxy_accept_pauses_total";
        const EVICTED: &str = "tidegate_proxy_evicted_connections_total";
        describe_counter!(
            PAUSES,
            "Times that a port paused accepting because descriptors were exhausted."
        );
        describe_counter!(
            EVICTED,
            "TCP connections of the largest client evicted at a limit, for another client or for the byte budget."
        );
        describe_counter!(registry::REPAIRS_METRIC, registry::REPAIRS_HELP);
        let evicted = |reason: &'static str| counter!(EVICTED, "reason" => reason);
        Self {
            accept_pauses: counter!(PAUSES),
            evicted: EVICTING.map(|limit| evicted(limit.as_str())),
            evicted_for_bytes: evicted("held_bytes"),
            revived: counter!(registry::REPAIRS_METRIC, "kind" => "listener"),
        }
    }

    /// The counter of connections evicted because of `limit`.
    pub(crate) fn evicted(&self, limit: Refusal) -> &Counter {
        let index = EVICTING.iter().position(|evicting| *evicting == limit);
        &self.evicted[index.unwrap_or(EVICTING.len() - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tidegate_model::Histogram;

    static TIMES: Histogram<8> = Histogram::new(&LIFE_BOUNDS);

    fn snapshot(series: SeriesLabel) -> PortSnapshot {
        TIMES.record(std::time::Duration::from_millis(20));
        PortSnapshot {
            accepted: 3,
            live: 2,
            limit: 9,
            cut: 1,
            bytes: PerDirection { inbound: 10, outbound: 20 },
            datagrams: PerDirection { inbound: 4, outbound: 5 },
            life: TIMES.read(),
            ..PortSnapshot::empty(series)
        }
    }

    fn port(label: &str) -> PortSnapshot {
        snapshot(SeriesLabel::Port(label.parse().unwrap()))
    }

    #[test]
    fn each_family_is_written_once_and_only_for_its_protocol() {
        let mut text = String::new();
        describe(&[port("0.0.0.0:8080/tcp"), port("[::]:53/udp")], &mut text).unwrap();
        for family in FAMILIES {
            assert_eq!(text.matches(&format!("# TYPE {} ", family.name)).count(), 1);
        }
        assert!(text.contains("tidegate_proxy_connections{publish=\"0.0.0.0:8080/tcp\"} 2\n"));
        assert!(text.contains(
            "tidegate_proxy_bytes_total{publish=\"[::]:53/udp\",direction=\"out\"} 20\n"
        ));
        assert!(text.contains(
            "tidegate_proxy_connection_seconds_bucket{publish=\"0.0.0.0:8080/tcp\",le=\"0.1\"} "
        ));
        assert!(text.contains("tidegate_proxy_session_seconds_count{publish=\"[::]:53/udp\"} "));
        assert!(text.contains("tidegate_proxy_port_sessions_limit{publish=\"[::]:53/udp\"} 9\n"));
        assert!(!text.contains("tidegate_proxy_connections{publish=\"[::]:53/udp\"}"));
        assert!(!text.contains("tidegate_proxy_sessions{publish=\"0.0.0.0:8080/tcp\"}"));
        assert!(!text.contains("tidegate_proxy_dial_seconds_count{publish=\"[::]:53/udp\"}"));
    }

    /// docs/metrics.md states these numbers.
    #[test]
    fn a_tcp_port_has_37_series_and_a_udp_port_26() {
        for (label, count) in [("0.0.0.0:80/tcp", 37), ("0.0.0.0:80/udp", 26)] {
            let mut text = String::new();
            describe(&[port(label)], &mut text).unwrap();
            assert_eq!(
                text.lines().filter(|line| !line.starts_with('#')).count(),
                count,
                "{label}"
            );
        }
    }

    #[test]
    fn snapshots_add_up_and_closed_ports_add_no_gauges() {
        let mut sum = PortSnapshot::empty(SeriesLabel::Others(Protocol::Udp));
        let (one, gone) = (port("[::]:53/udp"), port("[::]:54/udp"));
        sum.add(&one);
        sum.add_counted(&gone);
        assert_eq!((sum.accepted, sum.live, sum.limit, sum.cut), (6, 2, 9, 2));
        assert_eq!(sum.bytes, PerDirection { inbound: 20, outbound: 40 });
        assert_eq!(sum.datagrams, PerDirection { inbound: 8, outbound: 10 });
        assert_eq!(sum.life.count(), one.life.count() + gone.life.count());
        let mut text = String::new();
        describe(&[sum], &mut text).unwrap();
        assert!(
            text.contains("tidegate_proxy_sessions_total{publish=\"other/udp\"} 6\n"),
            "{text}"
        );
    }

    #[test]
    fn usage_is_written_with_its_limits() {
        let usage = EngineUsage {
            ports: [1000, 24],
            connections: 7,
            connections_limit: 100_000,
            largest_client: 5,
            held_bytes: 384 << 10,
            held_bytes_limit: 256 << 20,
            descriptors: 30,
            descriptors_limit: 1000,
        };
        let mut text = String::new();
        usage.describe(&mut text).unwrap();
        for family in USAGE_FAMILIES {
            assert_eq!(text.matches(&format!("# TYPE {family} gauge\n")).count(), 1, "{family}");
        }
        assert!(text.contains("tidegate_proxy_ports{series=\"other\"} 24\n"), "{text}");
        assert!(text.contains("tidegate_proxy_descriptors 30\n"), "{text}");
    }
}
