//! Metrics of the proxy in the Prometheus text format.
//!
//! Families of the whole process use the `metrics` facade. Families of a port are written from the
//! counters of that port at scrape time and disappear with the port. No series expires, so an idle
//! port keeps its series.
//!
//! A TCP port has 37 series, of which 22 belong to histograms. A UDP port has 26, of which 11 do.
//! Histograms have only the label `publish`: dial times and lifetimes are examined per port, and a
//! further label for direction or reason would double the page.
//! [`ports_with_series`](crate::Settings::ports_with_series) bounds the page: ports published
//! beyond it are summed by protocol as `publish="other/tcp"` and `"other/udp"`. A port never
//! changes between its own series and the sum, and the sum keeps the counts of closed ports, so no
//! counter decreases.

use crate::port::{DIAL_BOUNDS, DropReason, LIFE_BOUNDS, Port, Refusal};
use metrics::{Counter, counter, describe_counter};
use std::fmt::{self, Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use tidegate_model::exposition::Family;
use tidegate_model::{Direction, PerDirection};
use tidegate_model::{HistogramReading, Protocol, PublishLabel, registry};

const CONNECTIONS_TOTAL: Family = Family::counter(
    "tidegate_proxy_connections_total",
    "TCP connections accepted at a published port, including refused ones.",
);
const CONNECTIONS: Family =
    Family::gauge("tidegate_proxy_connections", "Current TCP connections of a published port.");
const RESETS: Family = Family::counter(
    "tidegate_proxy_connection_resets_total",
    "TCP connections that ended in a reset or an error after the backend was reached.",
);
const REFUSED: Family = Family::counter(
    "tidegate_proxy_refused_connections_total",
    "TCP connections that never reached the backend.",
);
const BYTES: Family = Family::counter(
    "tidegate_proxy_bytes_total",
    "Payload forwarded, in bytes: in to the container, out to the client.",
);
const SESSIONS_TOTAL: Family =
    Family::counter("tidegate_proxy_sessions_total", "UDP sessions started at a published port.");
const SESSIONS: Family =
    Family::gauge("tidegate_proxy_sessions", "Current UDP sessions of a published port.");
const EVICTED: Family =
    Family::counter("tidegate_proxy_evicted_sessions_total", "UDP sessions evicted for new ones.");
const DATAGRAMS: Family = Family::counter(
    "tidegate_proxy_datagrams_total",
    "Datagrams forwarded: in to the container, out to the client.",
);
const DROPPED: Family = Family::counter(
    "tidegate_proxy_dropped_datagrams_total",
    "Datagrams dropped; for backend_refused, ICMP errors of the backend.",
);

const CONNECTIONS_LIMIT: Family = Family::gauge(
    "tidegate_proxy_port_connections_limit",
    "Maximum concurrent TCP connections of a published port.",
);
const SESSIONS_LIMIT: Family = Family::gauge(
    "tidegate_proxy_port_sessions_limit",
    "Maximum concurrent UDP sessions of a published port.",
);
const DIAL: Family = Family::histogram(
    "tidegate_proxy_dial_seconds",
    "Time from accept at a published port to the connect of the backend.",
);
const CONNECTION_LIFE: Family = Family::histogram(
    "tidegate_proxy_connection_seconds",
    "Time from the connect of the backend to the end of a TCP connection, for ended connections.",
);
const SESSION_LIFE: Family = Family::histogram(
    "tidegate_proxy_session_seconds",
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
impl Display for SeriesLabel {
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
    /// Datagrams forwarded.
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
        let publish: (&str, &dyn Display) = ("publish", &self.series);
        let directions = |values: &PerDirection<u64>| {
            Direction::ALL.map(|direction| (direction.as_str(), values[direction]))
        };
        match *family {
            CONNECTIONS_TOTAL if tcp => family.write_value(&[publish], self.accepted, out),
            CONNECTIONS if tcp => family.write_value(&[publish], self.live, out),
            CONNECTIONS_LIMIT if tcp => family.write_value(&[publish], self.limit, out),
            RESETS if tcp => family.write_value(&[publish], self.cut, out),
            REFUSED if tcp => {
                let reasons = Refusal::ALL.iter().map(|reason| reason.as_str()).zip(self.refused);
                labelled(family, publish, "reason", reasons, out)
            }
            BYTES => labelled(family, publish, "direction", directions(&self.bytes), out),
            SESSIONS_TOTAL if !tcp => family.write_value(&[publish], self.accepted, out),
            SESSIONS if !tcp => family.write_value(&[publish], self.live, out),
            SESSIONS_LIMIT if !tcp => family.write_value(&[publish], self.limit, out),
            EVICTED if !tcp => family.write_value(&[publish], self.cut, out),
            DATAGRAMS if !tcp => {
                labelled(family, publish, "direction", directions(&self.datagrams), out)
            }
            DROPPED if !tcp => {
                let reasons =
                    DropReason::ALL.iter().map(|reason| reason.as_str()).zip(self.dropped);
                labelled(family, publish, "reason", reasons, out)
            }
            DIAL if tcp => family.write_histogram(&[publish], &self.dial, out),
            CONNECTION_LIFE if tcp => family.write_histogram(&[publish], &self.life, out),
            SESSION_LIFE if !tcp => family.write_histogram(&[publish], &self.life, out),
            _ => Ok(()),
        }
    }
}

/// Writes one series of the port `publish` for each value of `label`.
fn labelled(
    family: &Family,
    publish: (&str, &dyn Display),
    label: &str,
    values: impl IntoIterator<Item = (&'static str, u64)>,
    out: &mut impl Write,
) -> fmt::Result {
    values.into_iter().try_for_each(|(label_value, value)| {
        family.write_value(&[publish, (label, &label_value)], value, out)
    })
}

/// Writes the families of `ports` in the Prometheus text format (exposition format 0.0.4).
///
/// # Errors
/// Only errors of `out`.
pub fn describe(ports: &[PortSnapshot], out: &mut impl Write) -> fmt::Result {
    for family in &FAMILIES {
        family.write_head(out)?;
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
pub const USAGE_FAMILIES: [Family; 7] = [
    Family::gauge(
        "tidegate_proxy_ports",
        "Published ports, one per socket: own if the port has its own series, other if it is part of a sum.",
    ),
    Family::gauge(
        "tidegate_proxy_connections_limit",
        "Maximum TCP connections of all published ports.",
    ),
    Family::gauge(
        "tidegate_proxy_client_connections_max",
        "TCP connections of the client (an IPv4 address or an IPv6 /64) that has most.",
    ),
    Family::gauge(
        "tidegate_proxy_held_bytes",
        "Memory that TCP connections hold, or are permitted to hold, for peers that do not read, in bytes.",
    ),
    Family::gauge("tidegate_proxy_held_bytes_limit", "Maximum of tidegate_proxy_held_bytes."),
    Family::gauge(
        "tidegate_proxy_descriptors",
        "File descriptors in use by published ports, connections and sessions.",
    ),
    Family::gauge("tidegate_proxy_descriptors_limit", "Maximum of tidegate_proxy_descriptors."),
];

impl EngineUsage {
    /// Writes the families in the Prometheus text format (exposition format 0.0.4).
    ///
    /// # Errors
    /// Only errors of `out`.
    pub fn describe(&self, out: &mut impl Write) -> fmt::Result {
        let [ports, single @ ..] = USAGE_FAMILIES;
        ports.write_head(out)?;
        for (series, count) in ["own", "other"].iter().zip(self.ports) {
            ports.write_value(&[("series", series)], count, out)?;
        }
        let values = [
            self.connections_limit,
            self.largest_client,
            self.held_bytes,
            self.held_bytes_limit,
            self.descriptors,
            self.descriptors_limit,
        ];
        single.iter().zip(values).try_for_each(|(family, value)| family.write_single(value, out))
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
            let head = format!("# TYPE {} gauge\n", family.name);
            assert_eq!(text.matches(&head).count(), 1, "{}", family.name);
        }
        assert!(text.contains("tidegate_proxy_ports{series=\"other\"} 24\n"), "{text}");
        assert!(text.contains("tidegate_proxy_descriptors 30\n"), "{text}");
    }
}
