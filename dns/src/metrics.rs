//! Metrics of the DNS servers in the Prometheus text format.
//!
//! Families of a network or an upstream server are written from its own counters at scrape time and
//! disappear with it. Families of the whole process use the `metrics` facade.

use crate::client_id::ClientId;
use crate::message::{Rcode, kind};
use crate::upstream::Figures;
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tidegate_model::exposition::{Family, Labels};
use tidegate_model::{LogInterval, registry};

/// Query types with their own label value.
const KINDS: [(u16, &str); 9] = [
    (kind::A, "A"),
    (kind::AAAA, "AAAA"),
    (kind::PTR, "PTR"),
    (kind::SRV, "SRV"),
    (kind::TXT, "TXT"),
    (kind::MX, "MX"),
    (kind::HTTPS, "HTTPS"),
    (kind::CNAME, "CNAME"),
    (kind::ANY, "ANY"),
];
const OTHER: &str = "other";

const RCODES: [&str; 8] =
    ["NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "BADVERS", OTHER];

const COLUMNS: usize = RCODES.len();

#[derive(Debug)]
pub(crate) struct NetworkStats {
    name: String,
    /// Queries by type and, within that, by response code.
    queries: [AtomicU64; (KINDS.len() + 1) * COLUMNS],
}

impl NetworkStats {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            queries: [const { AtomicU64::new(0) }; (KINDS.len() + 1) * COLUMNS],
        }
    }

    /// Counts a query of type `kind` with response code `rcode`.
    pub(crate) fn count(&self, kind: u16, rcode: Rcode) {
        let row = KINDS.iter().position(|(one, _)| *one == kind).unwrap_or(KINDS.len());
        let column = match rcode {
            Rcode::NoError => 0,
            Rcode::FormErr => 1,
            Rcode::ServFail => 2,
            Rcode::NxDomain => 3,
            Rcode::NotImp => 4,
            Rcode::Refused => 5,
            Rcode::BadVers => 6,
            Rcode::Other(_) => 7,
        };
        self.queries[row * COLUMNS + column].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Sums over all types.
    pub(crate) fn questions(&self) -> Questions {
        let of = |rcode: &str| {
            let column = RCODES.iter().position(|one| *one == rcode).unwrap_or(COLUMNS - 1);
            let column = self.queries.iter().skip(column).step_by(COLUMNS);
            column.map(|count| count.load(Ordering::Relaxed)).sum::<u64>()
        };
        let answered = RCODES.iter().map(|rcode| of(rcode)).sum();
        Questions { answered, failed: of("SERVFAIL") + of("REFUSED"), unknown: of("NXDOMAIN") }
    }
}

/// Answered queries of a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Questions {
    /// Total.
    pub answered: u64,
    /// Of those, with `SERVFAIL` or `REFUSED`.
    pub failed: u64,
    /// Of those, with `NXDOMAIN`.
    pub unknown: u64,
}

/// State of an upstream server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// The address of the server.
    pub server: SocketAddr,
    /// Whether the server is queried in the order of the list. `false`: the last liveness check
    /// failed, and the server is queried last.
    pub trusted: bool,
    /// Queries sent.
    pub asked: u64,
    /// Of those, not answered in time, or not at all.
    pub silent: u64,
    /// Of those, answered with another code than `NOERROR` or `NXDOMAIN`.
    pub failed: u64,
    /// Responses with a measured response time.
    pub answered: u64,
    /// Sum of their response times.
    pub took: Duration,
}

/// Usage of the tables. Pairs are the current value and the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Cached responses, in bytes.
    pub cache_bytes: [usize; 2],
    /// Outstanding upstream queries.
    pub in_flight: [usize; 2],
    /// Clients that wait for upstream servers.
    pub waiting: [usize; 2],
    /// Waiting clients of one endpoint: the highest number, and the limit.
    pub waiting_of_one: [usize; 2],
    /// Queries in the queue.
    pub queued: usize,
    /// Queries per second that are forwarded for one endpoint.
    pub rate: u32,
    /// TCP clients of all servers.
    pub tcp_clients: [usize; 2],
}

/// The families of [`Usage`], including those of limits.
pub const USAGE_FAMILIES: [Family; 11] = [
    Family::gauge("tidegate_dns_cache_bytes", "Size of the cached responses in bytes, estimated."),
    Family::gauge("tidegate_dns_cache_bytes_limit", "Limit of the cache in bytes."),
    Family::gauge(
        "tidegate_dns_upstream_in_flight_limit",
        "Limit of outstanding upstream queries.",
    ),
    Family::gauge("tidegate_dns_waiting", "Clients that wait for upstream servers."),
    Family::gauge("tidegate_dns_waiting_limit", "Limit of clients that wait for upstream servers."),
    Family::gauge(
        "tidegate_dns_endpoint_waiting_max",
        "Highest number of waiting clients of one endpoint.",
    ),
    Family::gauge(
        "tidegate_dns_endpoint_waiting_limit",
        "Limit of waiting clients of one endpoint.",
    ),
    Family::gauge("tidegate_dns_queued", "Queries in the queue for forwarding."),
    Family::gauge(
        "tidegate_dns_endpoint_rate_limit",
        "Queries per second that are forwarded for one endpoint.",
    ),
    Family::gauge("tidegate_dns_tcp_clients", "TCP clients of all DNS servers."),
    Family::gauge("tidegate_dns_tcp_clients_limit", "Limit of TCP clients of all DNS servers."),
];

/// Writes the usage of the tables in the text format of Prometheus (exposition format 0.0.4).
pub(crate) fn describe_usage(usage: &Usage, page: &mut impl Write) -> fmt::Result {
    let values = [
        usage.cache_bytes[0],
        usage.cache_bytes[1],
        // The current value is a gauge of the facade.
        usage.in_flight[1],
        usage.waiting[0],
        usage.waiting[1],
        usage.waiting_of_one[0],
        usage.waiting_of_one[1],
        usage.queued,
        usage.rate as usize,
        usage.tcp_clients[0],
        usage.tcp_clients[1],
    ];
    let mut families = USAGE_FAMILIES.iter().zip(values);
    families.try_for_each(|(family, value)| family.write_single(value, page))
}

const QUERIES: Family = Family::counter(
    "tidegate_dns_queries_total",
    "Answered queries by network (the one that the client joined first), type and response code.",
);
const ENDPOINTS: Family = Family::gauge("tidegate_dns_endpoints", "Endpoints of a network.");
const UP: Family = Family::gauge(
    "tidegate_dns_upstream_trusted",
    "1 if a server is queried in the order of the list, 0 if it is queried last because it did not respond.",
);
const ASKED: Family =
    Family::counter("tidegate_dns_upstream_queries_total", "Queries sent to a server.");
const MISSED: Family = Family::counter(
    "tidegate_dns_upstream_timeouts_total",
    "Queries that a server did not answer in time, or not at all.",
);
const FAILED: Family = Family::counter(
    "tidegate_dns_upstream_failures_total",
    "Queries that a server answered with a failure.",
);
const TOOK: Family =
    Family::histogram("tidegate_dns_upstream_seconds", "Response time of a server.");

/// The families that [`Resolver::describe`](crate::Resolver::describe) writes.
pub const FAMILIES: [Family; 7] = [QUERIES, ENDPOINTS, UP, ASKED, MISSED, FAILED, TOOK];

/// Writes the families of networks and servers in the text format of Prometheus (exposition
/// format 0.0.4).
pub(crate) fn describe<'a>(
    networks: impl Iterator<Item = (&'a NetworkStats, usize)> + Clone,
    servers: &[(SocketAddr, bool, Figures)],
    page: &mut impl Write,
) -> fmt::Result {
    QUERIES.write_head(page)?;
    for (network, _) in networks.clone() {
        for (number, count) in network.queries.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            let kind = KINDS.get(number / COLUMNS).map_or(OTHER, |(_, name)| name);
            let rcode = RCODES[number % COLUMNS];
            if count > 0 {
                let labels: Labels<'_> =
                    &[("network", &network.name), ("qtype", &kind), ("rcode", &rcode)];
                QUERIES.write_value(labels, count, page)?;
            }
        }
    }
    ENDPOINTS.write_head(page)?;
    for (network, endpoints) in networks {
        ENDPOINTS.write_value(&[("network", &network.name)], endpoints, page)?;
    }
    type Value = fn(&(SocketAddr, bool, Figures)) -> u64;
    let simple: [(Family, Value); 4] = [
        (UP, |(_, trusted, _)| u64::from(*trusted)),
        (ASKED, |(_, _, figures)| figures.asked),
        (MISSED, |(_, _, figures)| figures.missed),
        (FAILED, |(_, _, figures)| figures.failed),
    ];
    for (family, value) in simple {
        family.write_head(page)?;
        for one in servers {
            family.write_value(&[("server", &one.0)], value(one), page)?;
        }
    }
    TOOK.write_head(page)?;
    servers.iter().try_for_each(|(server, _, figures)| {
        TOOK.write_histogram(&[("server", server)], &figures.took, page)
    })
}

/// The limit at which a query, client or response was dropped. The text is the label `reason`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overload {
    /// Outstanding queries: the oldest of the largest holder was evicted.
    InFlight,
    /// Waiting clients: the oldest of the largest holder was evicted, or a new one refused.
    Waiters,
    /// Waiting clients of one endpoint: its own oldest was evicted.
    Share,
    /// Time in the queue.
    Queue,
    /// TCP clients: the one that was idle longest was closed, or a new one refused.
    Clients,
    /// The send buffer of a socket was full.
    Socket,
    /// Mismatched datagrams at one source port, which was closed.
    Guesses,
}

/// Why a datagram at the source port of a query was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// No query with its ID is outstanding.
    Id,
    /// Its question differs, or it is not a response.
    Question,
    /// The case of the name differs.
    Case,
    /// It arrived on the bridge of a network that the server is not on.
    Bridge,
}

impl Mismatch {
    const ALL: [Self; 4] = [Self::Id, Self::Question, Self::Case, Self::Bridge];

    fn as_str(self) -> &'static str {
        match self {
            Self::Id => "id",
            Self::Question => "question",
            Self::Case => "case",
            Self::Bridge => "bridge",
        }
    }
}

impl Overload {
    pub(crate) const ALL: [Self; 7] = [
        Self::InFlight,
        Self::Waiters,
        Self::Share,
        Self::Queue,
        Self::Clients,
        Self::Socket,
        Self::Guesses,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::InFlight => "upstream_queries",
            Self::Waiters => "waiting_clients",
            Self::Share => "endpoint_share",
            Self::Queue => "queue_time",
            Self::Clients => "tcp_clients",
            Self::Socket => "socket_buffer",
            Self::Guesses => "mismatches",
        }
    }
}

pub(crate) struct ProcessMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) coalesced: Counter,
    pub(crate) evicted: Counter,
    /// Sockets that were destroyed by other software and restored.
    pub(crate) revived: Counter,
    pub(crate) entries: Gauge,
    pub(crate) in_flight: Gauge,
    pub(crate) containers: Gauge,
    pub(crate) non_queries: Counter,
    /// Datagrams that were not accepted, by reason.
    mismatches: [Counter; Mismatch::ALL.len()],
    refused: [Counter; Overload::ALL.len()],
    logs: [LogInterval; Overload::ALL.len()],
}

impl ProcessMetrics {
    pub(crate) fn new() -> Self {
        const CACHE: &str = "tidegate_dns_cache_lookups_total";
        const EVICTED: &str = "tidegate_dns_cache_evictions_total";
        const ENTRIES: &str = "tidegate_dns_cache_entries";
        const IN_FLIGHT: &str = "tidegate_dns_upstream_in_flight";
        const SERVING: &str = "tidegate_dns_servers";
        const UNUSUAL: &str = "tidegate_dns_unusual_messages_total";
        const MISMATCHES: &str = "tidegate_dns_upstream_mismatches_total";
        const REFUSED: &str = "tidegate_dns_refused_total";
        describe_counter!(
            CACHE,
            "Queries for upstream servers: found in the cache (hit), forwarded (miss), or already outstanding (coalesced)."
        );
        describe_counter!(registry::REPAIRS_METRIC, registry::REPAIRS_HELP);
        describe_counter!(EVICTED, "Cached responses that were evicted before they expired.");
        describe_gauge!(ENTRIES, "Responses in the cache.");
        describe_gauge!(IN_FLIGHT, "Outstanding upstream queries.");
        describe_gauge!(SERVING, "DNS servers of containers and gateways.");
        describe_counter!(UNUSUAL, "Messages that are malformed or not supported.");
        describe_counter!(
            MISMATCHES,
            "Datagrams at the source port of a query that were not accepted as its response: late or forged."
        );
        describe_counter!(REFUSED, "Queries, clients and responses dropped at a limit.");
        Self {
            hits: counter!(CACHE, "result" => "hit"),
            misses: counter!(CACHE, "result" => "miss"),
            coalesced: counter!(CACHE, "result" => "coalesced"),
            evicted: counter!(EVICTED),
            revived: counter!(registry::REPAIRS_METRIC, "kind" => "dns"),
            entries: gauge!(ENTRIES),
            in_flight: gauge!(IN_FLIGHT),
            containers: gauge!(SERVING),
            non_queries: counter!(UNUSUAL),
            mismatches: Mismatch::ALL
                .map(|reason| counter!(MISMATCHES, "reason" => reason.as_str())),
            refused: Overload::ALL.map(|reason| counter!(REFUSED, "reason" => reason.as_str())),
            logs: Default::default(),
        }
    }

    /// Counts a datagram that was not accepted.
    pub(crate) fn mismatch(&self, reason: Mismatch) {
        self.mismatches[reason as usize].increment(1);
    }

    /// Counts a drop and logs it, at most once per interval and reason. `client_id` is the client
    /// that was evicted or refused.
    pub(crate) fn refused(&self, reason: Overload, client_id: Option<&ClientId>) {
        self.refused[reason as usize].increment(1);
        if self.logs[reason as usize].is_due(Instant::now()) {
            let (endpoint, network) =
                (client_id.and_then(ClientId::endpoint), client_id.and_then(ClientId::network));
            tracing::warn!(reason = reason.as_str(), endpoint, network, "DNS limit reached");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_counts_are_sums_over_all_types() {
        let stats = NetworkStats::new("un1");
        for (kind, rcode) in [
            (kind::A, Rcode::NoError),
            (kind::AAAA, Rcode::NxDomain),
            (kind::TXT, Rcode::ServFail),
            (65_280, Rcode::Refused),
        ] {
            stats.count(kind, rcode);
        }
        assert_eq!(stats.questions(), Questions { answered: 4, failed: 2, unknown: 1 });
    }

    #[test]
    fn each_usage_value_has_a_family() {
        let usage = Usage {
            cache_bytes: [1, 2],
            in_flight: [3, 4],
            waiting: [5, 6],
            waiting_of_one: [9, 10],
            queued: 11,
            rate: 12,
            tcp_clients: [7, 8],
        };
        let mut page = String::new();
        describe_usage(&usage, &mut page).unwrap();
        let values: Vec<_> = page.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            values,
            [
                "tidegate_dns_cache_bytes 1",
                "tidegate_dns_cache_bytes_limit 2",
                "tidegate_dns_upstream_in_flight_limit 4",
                "tidegate_dns_waiting 5",
                "tidegate_dns_waiting_limit 6",
                "tidegate_dns_endpoint_waiting_max 9",
                "tidegate_dns_endpoint_waiting_limit 10",
                "tidegate_dns_queued 11",
                "tidegate_dns_endpoint_rate_limit 12",
                "tidegate_dns_tcp_clients 7",
                "tidegate_dns_tcp_clients_limit 8",
            ]
        );
    }

    #[test]
    fn each_family_is_described_once_and_histograms_are_cumulative() {
        let stats = NetworkStats::new("un1");
        stats.count(kind::A, Rcode::NoError);
        stats.count(kind::A, Rcode::NoError);
        stats.count(65_280, Rcode::Other(9));
        let mut figures = Figures { asked: 9, missed: 2, ..Figures::default() };
        for milliseconds in [1, 4, 5, 10_000, 10_000] {
            figures.took.record(Duration::from_millis(milliseconds));
        }
        let server = ("192.0.2.1:53".parse().unwrap(), false, figures);
        let mut page = String::new();
        describe([(&stats, 3)].into_iter(), &[server], &mut page).unwrap();
        for family in FAMILIES {
            let head = format!("# TYPE {} ", family.name);
            assert_eq!(page.matches(&head).count(), 1, "{}", family.name);
        }
        for line in [
            "tidegate_dns_queries_total{network=\"un1\",qtype=\"A\",rcode=\"NOERROR\"} 2",
            "tidegate_dns_queries_total{network=\"un1\",qtype=\"other\",rcode=\"other\"} 1",
            "tidegate_dns_endpoints{network=\"un1\"} 3",
            "tidegate_dns_upstream_trusted{server=\"192.0.2.1:53\"} 0",
            "tidegate_dns_upstream_seconds_bucket{server=\"192.0.2.1:53\",le=\"0.001\"} 1",
            "tidegate_dns_upstream_seconds_bucket{server=\"192.0.2.1:53\",le=\"5\"} 3",
            "tidegate_dns_upstream_seconds_bucket{server=\"192.0.2.1:53\",le=\"+Inf\"} 5",
            "tidegate_dns_upstream_seconds_sum{server=\"192.0.2.1:53\"} 20.01",
            "tidegate_dns_upstream_seconds_count{server=\"192.0.2.1:53\"} 5",
        ] {
            assert!(page.lines().any(|one| one == line), "{line}\n{page}");
        }
    }
}
