//! What the servers count, and how it is told to Prometheus.
//!
//! What belongs to a network or an upstream server is kept with it and rendered at each scrape, so
//! that its series go with it. What the process has once goes through the facade.

use crate::message::{Rcode, kind};
use crate::upstream::{BUCKETS, Figures};
use crate::zone::Asker;
use metrics::{Counter, Gauge, counter, describe_counter, describe_gauge, gauge};
use std::fmt::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tidegate_model::{LogInterval, registry};

/// The types of questions that are told apart.
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

/// What is counted of a network.
#[derive(Debug)]
pub(crate) struct NetworkStats {
    name: String,
    /// Questions by type, and within that by code of the answer.
    queries: [AtomicU64; (KINDS.len() + 1) * COLUMNS],
}

impl NetworkStats {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            queries: [const { AtomicU64::new(0) }; (KINDS.len() + 1) * COLUMNS],
        }
    }

    /// A question of type `kind` was answered with `rcode`.
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

    /// Those of all types.
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

/// Questions of a network that have been answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Questions {
    /// In all.
    pub answered: u64,
    /// Of those, with `SERVFAIL` or `REFUSED`.
    pub failed: u64,
    /// Of those, that there is no such name.
    pub unknown: u64,
}

/// How a server is that questions are forwarded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Which one.
    pub server: SocketAddr,
    /// Others are not asked before it because it was silent.
    pub trusted: bool,
    /// Questions sent.
    pub asked: u64,
    /// Of those, not answered in time, or not at all.
    pub silent: u64,
    /// Of those, answered with a failure.
    pub failed: u64,
    /// Answers of which the time was taken.
    pub answered: u64,
    /// What they took together.
    pub took: Duration,
}

/// How full the tables are: what there is, and what there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Bytes of answers that are kept.
    pub cache_bytes: [usize; 2],
    /// Questions that are with other servers.
    pub in_flight: [usize; 2],
    /// Clients that wait for those.
    pub waiting: [usize; 2],
    /// Clients of one endpoint that wait: of the one that has most, and the limit of each.
    pub waiting_of_one: [usize; 2],
    /// Questions that wait for their turn to be forwarded.
    pub queued: usize,
    /// Questions of one endpoint that may be forwarded in a second.
    pub rate: u32,
    /// TCP clients of all servers.
    pub tcp_clients: [usize; 2],
}

/// The families of [`Fill`], each with its limit's.
pub const FILL_FAMILIES: [&str; 11] = [
    "tidegate_dns_cache_bytes",
    "tidegate_dns_cache_bytes_limit",
    "tidegate_dns_upstream_in_flight_limit",
    "tidegate_dns_waiting",
    "tidegate_dns_waiting_limit",
    "tidegate_dns_endpoint_waiting_max",
    "tidegate_dns_endpoint_waiting_limit",
    "tidegate_dns_queued",
    "tidegate_dns_endpoint_rate_limit",
    "tidegate_dns_tcp_clients",
    "tidegate_dns_tcp_clients_limit",
];

/// Writes how full the tables are in the text format of Prometheus (exposition format 0.0.4).
pub(crate) fn describe_fill(fill: &Fill, page: &mut impl Write) -> fmt::Result {
    let help = [
        "Bytes that the answers in the cache take, about.",
        "Bytes that the answers in the cache may take.",
        "Questions that may be with other servers.",
        "Clients that wait for an answer of another server.",
        "Clients that may wait for answers of other servers.",
        "Clients that wait for an answer of another server, of the endpoint that has most.",
        "Clients of one endpoint that may wait for answers of other servers.",
        "Questions that wait for their turn to be forwarded.",
        "Questions of one endpoint that may be forwarded in a second.",
        "TCP clients of all DNS servers.",
        "TCP clients that all DNS servers together may have.",
    ];
    let values = [
        fill.cache_bytes[0],
        fill.cache_bytes[1],
        // How many there are the facade tells.
        fill.in_flight[1],
        fill.waiting[0],
        fill.waiting[1],
        fill.waiting_of_one[0],
        fill.waiting_of_one[1],
        fill.queued,
        fill.rate as usize,
        fill.tcp_clients[0],
        fill.tcp_clients[1],
    ];
    for ((name, help), value) in FILL_FAMILIES.into_iter().zip(help).zip(values) {
        head((name, "gauge", help), page)?;
        writeln!(page, "{name} {value}")?;
    }
    Ok(())
}

/// A family: its name, its type, and what it tells.
type Family = (&'static str, &'static str, &'static str);

const QUERIES: Family = (
    "tidegate_dns_queries_total",
    "counter",
    "Questions answered, by the network that the asker joined first, by type and by code of the answer.",
);
const ENDPOINTS: Family =
    ("tidegate_dns_endpoints", "gauge", "Endpoints of a network that have names.");
const UP: Family = (
    "tidegate_dns_upstream_trusted",
    "gauge",
    "1 for a server that is asked first, 0 for one that others are asked before because it was silent.",
);
const ASKED: Family =
    ("tidegate_dns_upstream_queries_total", "counter", "Questions sent to a server.");
const MISSED: Family = (
    "tidegate_dns_upstream_timeouts_total",
    "counter",
    "Questions that a server did not answer in time, or not at all.",
);
const FAILED: Family = (
    "tidegate_dns_upstream_failures_total",
    "counter",
    "Questions that a server answered with a failure.",
);
const TOOK: Family =
    ("tidegate_dns_upstream_seconds", "histogram", "Time that a server took to answer.");

/// The families that [`Resolver::describe`](crate::Resolver::describe) writes.
pub const FAMILIES: [&str; 7] = [QUERIES.0, ENDPOINTS.0, UP.0, ASKED.0, MISSED.0, FAILED.0, TOOK.0];

/// Writes the families of networks and servers in the text format of Prometheus (exposition
/// format 0.0.4).
pub(crate) fn describe<'a>(
    networks: impl Iterator<Item = (&'a NetworkStats, usize)> + Clone,
    servers: &[(SocketAddr, bool, Figures)],
    page: &mut impl Write,
) -> fmt::Result {
    head(QUERIES, page)?;
    for (network, _) in networks.clone() {
        for (number, count) in network.queries.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            let kind = KINDS.get(number / COLUMNS).map_or(OTHER, |(_, name)| name);
            let rcode = RCODES[number % COLUMNS];
            if count > 0 {
                let name = &network.name;
                writeln!(
                    page,
                    "{}{{network=\"{name}\",qtype=\"{kind}\",rcode=\"{rcode}\"}} {count}",
                    QUERIES.0
                )?;
            }
        }
    }
    head(ENDPOINTS, page)?;
    for (network, endpoints) in networks {
        writeln!(page, "{}{{network=\"{}\"}} {endpoints}", ENDPOINTS.0, network.name)?;
    }
    type Value = fn(&(SocketAddr, bool, Figures)) -> u64;
    let simple: [(Family, Value); 4] = [
        (UP, |(_, trusted, _)| u64::from(*trusted)),
        (ASKED, |(_, _, figures)| figures.asked),
        (MISSED, |(_, _, figures)| figures.missed),
        (FAILED, |(_, _, figures)| figures.failed),
    ];
    for (family, value) in simple {
        head(family, page)?;
        for one in servers {
            writeln!(page, "{}{{server=\"{}\"}} {}", family.0, one.0, value(one))?;
        }
    }
    head(TOOK, page)?;
    for (server, _, figures) in servers {
        let mut sum = 0;
        for (number, count) in figures.took.iter().enumerate() {
            sum += count;
            let bound = BUCKETS.get(number).map_or("+Inf".to_owned(), ToString::to_string);
            writeln!(page, "{}_bucket{{server=\"{server}\",le=\"{bound}\"}} {sum}", TOOK.0)?;
        }
        writeln!(
            page,
            "{}_sum{{server=\"{server}\"}} {}",
            TOOK.0,
            figures.took_micros as f64 / 1e6
        )?;
        writeln!(page, "{}_count{{server=\"{server}\"}} {sum}", TOOK.0)?;
    }
    Ok(())
}

fn head((name, kind, help): Family, page: &mut impl Write) -> fmt::Result {
    writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// Why something was not done, or given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overload {
    /// Too many questions are with other servers: one of the largest holder yielded.
    Flights,
    /// Too many clients wait for those: the oldest of the largest holder yielded, or a new one was
    /// refused.
    Waiters,
    /// An endpoint had as many clients that wait as one may have: its own oldest yielded.
    Share,
    /// A question had waited too long for its turn.
    Queue,
    /// Too many TCP clients: the one that was idle for longest had to go.
    Clients,
    /// An answer found no room in a socket's buffer.
    Socket,
    /// So many datagrams with wrong IDs or questions came to a source port that it was given up.
    Guesses,
}

/// Why a datagram that came to the source port of a question is not its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mismatch {
    /// No question with its ID is outstanding there.
    Id,
    /// It is about another question, or is none of a response's.
    Question,
    /// The letters of the name have another case.
    Case,
    /// It came in by the bridge of a network that the server is not on.
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
        Self::Flights,
        Self::Waiters,
        Self::Share,
        Self::Queue,
        Self::Clients,
        Self::Socket,
        Self::Guesses,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Flights => "upstream_queries",
            Self::Waiters => "waiting_clients",
            Self::Share => "endpoint_share",
            Self::Queue => "queue_time",
            Self::Clients => "tcp_clients",
            Self::Socket => "socket_buffer",
            Self::Guesses => "mismatches",
        }
    }
}

/// The families of the process, resolved once.
pub(crate) struct ProcessMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
    pub(crate) coalesced: Counter,
    pub(crate) evicted: Counter,
    /// Sockets that other software had destroyed.
    pub(crate) revived: Counter,
    pub(crate) entries: Gauge,
    pub(crate) flights: Gauge,
    pub(crate) containers: Gauge,
    pub(crate) unusual: Counter,
    /// Datagrams that answer no question.
    mismatches: [Counter; Mismatch::ALL.len()],
    refused: [Counter; Overload::ALL.len()],
    logs: [LogInterval; Overload::ALL.len()],
}

impl ProcessMetrics {
    pub(crate) fn new() -> Self {
        const CACHE: &str = "tidegate_dns_cache_lookups_total";
        const EVICTED: &str = "tidegate_dns_cache_evictions_total";
        const ENTRIES: &str = "tidegate_dns_cache_entries";
        const FLIGHTS: &str = "tidegate_dns_upstream_in_flight";
        const SERVING: &str = "tidegate_dns_servers";
        const UNUSUAL: &str = "tidegate_dns_unusual_messages_total";
        const MISMATCHES: &str = "tidegate_dns_upstream_mismatches_total";
        const REFUSED: &str = "tidegate_dns_refused_total";
        describe_counter!(
            CACHE,
            "Questions for other servers: found in the cache (hit), asked (miss), or already on their way (coalesced)."
        );
        describe_counter!(registry::REPAIRS_METRIC, registry::REPAIRS_HELP);
        describe_counter!(EVICTED, "Answers that had to leave the cache before their time.");
        describe_gauge!(ENTRIES, "Answers in the cache.");
        describe_gauge!(FLIGHTS, "Questions that are with other servers.");
        describe_gauge!(SERVING, "DNS servers that containers and gateways have.");
        describe_counter!(
            UNUSUAL,
            "Messages that were malformed, or of a kind that is not served."
        );
        describe_counter!(
            MISMATCHES,
            "Datagrams at the source port of a question that did not answer it: late, or forged."
        );
        describe_counter!(REFUSED, "What was refused or given up at a limit.");
        Self {
            hits: counter!(CACHE, "result" => "hit"),
            misses: counter!(CACHE, "result" => "miss"),
            coalesced: counter!(CACHE, "result" => "coalesced"),
            evicted: counter!(EVICTED),
            revived: counter!(registry::REPAIRS_METRIC, "kind" => "dns"),
            entries: gauge!(ENTRIES),
            flights: gauge!(FLIGHTS),
            containers: gauge!(SERVING),
            unusual: counter!(UNUSUAL),
            mismatches: Mismatch::ALL
                .map(|reason| counter!(MISMATCHES, "reason" => reason.as_str())),
            refused: Overload::ALL.map(|reason| counter!(REFUSED, "reason" => reason.as_str())),
            logs: Default::default(),
        }
    }

    /// A datagram at the source port of a question did not answer it.
    pub(crate) fn mismatch(&self, reason: Mismatch) {
        self.mismatches[reason as usize].increment(1);
    }

    /// Counts it, and says so now and then. `asker` is who yielded, or was refused.
    pub(crate) fn refused(&self, reason: Overload, asker: Option<&Asker>) {
        self.refused[reason as usize].increment(1);
        if self.logs[reason as usize].is_due(Instant::now()) {
            let (endpoint, network) =
                (asker.and_then(Asker::endpoint), asker.and_then(Asker::network));
            tracing::warn!(
                reason = reason.as_str(),
                endpoint,
                network,
                "a limit of the DNS servers is reached"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_those_of_all_types() {
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
    fn how_full_tables_are_is_told_in_a_family_each() {
        let fill = Fill {
            cache_bytes: [1, 2],
            in_flight: [3, 4],
            waiting: [5, 6],
            waiting_of_one: [9, 10],
            queued: 11,
            rate: 12,
            tcp_clients: [7, 8],
        };
        let mut page = String::new();
        describe_fill(&fill, &mut page).unwrap();
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
    fn each_family_is_told_once_and_a_histogram_adds_up() {
        let stats = NetworkStats::new("un1");
        stats.count(kind::A, Rcode::NoError);
        stats.count(kind::A, Rcode::NoError);
        stats.count(65_280, Rcode::Other(9));
        let figures = Figures {
            asked: 9,
            missed: 2,
            took: [1, 2, 0, 0, 0, 0, 0, 0, 4],
            took_micros: 1_500_000,
            ..Figures::default()
        };
        let server = ("192.0.2.1:53".parse().unwrap(), false, figures);
        let mut page = String::new();
        describe([(&stats, 3)].into_iter(), &[server], &mut page).unwrap();
        for family in FAMILIES {
            assert_eq!(page.matches(&format!("# TYPE {family} ")).count(), 1, "{family}");
        }
        for line in [
            "tidegate_dns_queries_total{network=\"un1\",qtype=\"A\",rcode=\"NOERROR\"} 2",
            "tidegate_dns_queries_total{network=\"un1\",qtype=\"other\",rcode=\"other\"} 1",
            "tidegate_dns_endpoints{network=\"un1\"} 3",
            "tidegate_dns_upstream_trusted{server=\"192.0.2.1:53\"} 0",
            "tidegate_dns_upstream_seconds_bucket{server=\"192.0.2.1:53\",le=\"0.001\"} 1",
            "tidegate_dns_upstream_seconds_bucket{server=\"192.0.2.1:53\",le=\"5\"} 3",
            "tidegate_dns_upstream_seconds_bucket{server=\"192.0.2.1:53\",le=\"+Inf\"} 7",
            "tidegate_dns_upstream_seconds_sum{server=\"192.0.2.1:53\"} 1.5",
            "tidegate_dns_upstream_seconds_count{server=\"192.0.2.1:53\"} 7",
        ] {
            assert!(page.lines().any(|one| one == line), "{line}\n{page}");
        }
    }
}
