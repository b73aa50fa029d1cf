//! Responses in comparison with the DNS server of Docker; docs/dns.md gives the reasons of
//! differences.

use crate::support::client::{query, read, summary, with_edns, write};
use crate::support::upstream::{Mode, Upstream};
use crate::support::{Container, TestBed, endpoint};
use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::RecordType;
use std::time::{Duration, Instant};
use tidegate_dns::EndpointSpec;

const NONE: [String; 0] = [];

/// The client is `hosta` on `un1`, with two neighbours that share an alias. There are other
/// networks.
fn scene() -> (TestBed, Upstream, Container) {
    let (bed, upstream) = TestBed::with_upstream();
    for network in ["un1", "un2", "un6"] {
        bed.network(network);
    }
    let own = EndpointSpec {
        hostname: Some("hosta".to_owned()),
        ..endpoint("svc-a", &["0123456789ab"], &["172.30.1.2"])
    };
    bed.resolver.add_endpoint("un1", &own).unwrap();
    bed.endpoint("un1", "svc-b", &["89abcdef0123", "both"], &["172.30.1.3"]);
    bed.endpoint("un1", "svc-c", &["both"], &["172.30.1.4"]);
    bed.endpoint("un2", "elsewhere", &[], &["172.30.2.2"]);
    bed.endpoint("un6", "svc-6", &[], &["172.30.6.2", "fd88::2"]);
    let container = bed.serve("svc-a");
    (bed, upstream, container)
}

#[test]
fn name_short_id_alias_and_host_name_are_answered() {
    let (_bed, upstream, client) = scene();
    for (name, address) in [
        ("svc-b", "172.30.1.3"),
        ("89abcdef0123", "172.30.1.3"),
        ("svc-a", "172.30.1.2"),
        ("hosta", "172.30.1.2"),
        ("svc-b.un1", "172.30.1.3"),
        ("both.un1", "172.30.1.3 172.30.1.4"),
    ] {
        let answer = client.ask(name, RecordType::A);
        let mut addresses: Vec<_> = summary(&answer).split(' ').map(str::to_owned).collect();
        addresses.sort();
        assert_eq!(addresses.join(" "), address, "{name}");
        let head = &answer.metadata;
        assert!(head.recursion_desired && head.recursion_available, "qr rd ra");
        assert!(!head.authoritative && !head.authentic_data, "no aa");
        assert!(answer.edns.is_none());
        // Docker: 600. A short TTL follows changes of addresses.
        assert_eq!(answer.answers[0].ttl, 5);
    }
    assert_eq!(upstream.names(), NONE);
}

#[test]
fn addresses_of_a_shared_alias_are_rotated() {
    let (_bed, _upstream, client) = scene();
    let answers: Vec<_> = (0..4).map(|_| client.resolve("both", RecordType::A)).collect();
    assert_eq!(answers[0], answers[2]);
    assert_eq!(answers[1], answers[3]);
    assert_ne!(answers[0], answers[1]);
}

#[test]
fn the_owner_name_has_the_case_of_the_query() {
    let (_bed, _upstream, client) = scene();
    let answer = client.ask("SVC-B", RecordType::A);
    assert_eq!(answer.answers[0].name.to_string(), "SVC-B.");
    assert_eq!(answer.queries[0].name().to_string(), "SVC-B.");
}

#[test]
fn other_types_of_a_local_name_are_nodata_and_not_forwarded() {
    let (_bed, upstream, client) = scene();
    // Docker forwards TXT and ANY, which discloses names of services.
    for kind in
        [RecordType::AAAA, RecordType::MX, RecordType::TXT, RecordType::HTTPS, RecordType::SRV]
    {
        let answer = client.ask("svc-b", kind);
        assert_eq!(summary(&answer), "nothing", "{kind}");
        assert_eq!(answer.authorities[0].record_type(), RecordType::SOA, "RFC 2308 section 3");
    }
    assert_eq!(client.resolve("svc-b", RecordType::ANY), "172.30.1.3");
    assert_eq!(upstream.names(), NONE);
}

#[test]
fn ipv6_names_and_addresses_are_resolved() {
    let (bed, _upstream, _) = scene();
    let client = bed.serve("svc-6");
    assert_eq!(client.resolve("svc-6", RecordType::AAAA), "fd88::2");
    let reverse = format!("2.{}8.8.d.f.ip6.arpa", "0.".repeat(27));
    assert_eq!(client.resolve(&reverse, RecordType::PTR), "svc-6.un6.");
}

#[test]
fn the_reverse_name_of_a_container_is_its_name_on_the_network() {
    let (_bed, _upstream, client) = scene();
    let answer = client.ask("3.1.30.172.in-addr.arpa", RecordType::PTR);
    assert_eq!(summary(&answer), "svc-b.un1.");
    assert_eq!(answer.answers[0].ttl, 5);
}

#[test]
fn names_on_other_networks_do_not_exist_and_are_not_forwarded() {
    let (_bed, upstream, client) = scene();
    // Docker forwards both, and unknown names without a dot.
    for name in ["elsewhere", "elsewhere.un2", "nosuch"] {
        assert_eq!(client.resolve(name, RecordType::A), "NXDomain", "{name}");
    }
    assert_eq!(upstream.names(), NONE);
}

#[test]
fn localhost_is_local_and_host_docker_internal_is_forwarded() {
    let (_bed, upstream, client) = scene();
    // Docker forwards it.
    assert_eq!(client.resolve("localhost", RecordType::A), "127.0.0.1");
    assert_eq!(client.resolve("localhost", RecordType::AAAA), "::1");
    assert_eq!(upstream.names(), NONE);
    assert_eq!(client.resolve("host.docker.internal", RecordType::A), "192.0.2.1");
    assert_eq!(upstream.names(), ["host.docker.internal."]);
}

#[test]
fn only_reverse_names_of_public_addresses_are_forwarded() {
    let (_bed, upstream, client) = scene();
    // Docker forwards all.
    for name in ["9.9.9.10.in-addr.arpa", "77.1.30.172.in-addr.arpa", "2.2.30.172.in-addr.arpa"] {
        assert_eq!(client.resolve(name, RecordType::PTR), "NXDomain", "{name}");
    }
    assert_eq!(upstream.names(), NONE);
    assert_eq!(client.resolve("8.8.8.8.in-addr.arpa", RecordType::PTR), "nothing");
    assert_eq!(upstream.names(), ["8.8.8.8.in-addr.arpa."]);
}

#[test]
fn queries_over_tcp_are_served_and_forwarded_over_udp() {
    let (_bed, upstream, client) = scene();
    let mut stream = client.connect();
    write(&mut stream, &query(1, "svc-b", RecordType::A));
    assert_eq!(summary(&read(&mut stream).unwrap()), "172.30.1.3");
    write(&mut stream, &query(2, "example.com", RecordType::A));
    assert_eq!(summary(&read(&mut stream).unwrap()), "192.0.2.1");
    // Docker forwards these over TCP.
    assert!(!upstream.seen()[0].tcp);
}

#[test]
fn a_truncated_upstream_response_is_fetched_over_tcp() {
    let (bed, upstream, client) = scene();
    let answer = client.ask("many.example", RecordType::A);
    assert!(answer.metadata.truncation && answer.answers.is_empty(), "300 addresses in 512 bytes");
    let seen: Vec<_> = upstream.seen().iter().map(|seen| seen.tcp).collect();
    // Docker relays TC and leaves the rest to the client.
    assert_eq!(seen, [false, true]);
    let sockets = bed.host.exec("cat", &["/proc/thread-self/net/tcp"]);
    /// `TCP_TIME_WAIT` (include/net/tcp_states.h).
    const TIME_WAIT: &str = "06";
    let in_time_wait = |line: &str| line.split_whitespace().nth(3) == Some(TIME_WAIT);
    assert!(!sockets.lines().any(in_time_wait), "a source port stays occupied:\n{sockets}");
    let mut stream = client.connect();
    write(&mut stream, &query(1, "many.example", RecordType::A));
    assert_eq!(read(&mut stream).unwrap().answers.len(), 300);
    assert_eq!(upstream.names(), NONE, "cached");
}

#[test]
fn without_an_upstream_response_the_client_gets_servfail() {
    let (_bed, upstream, client) = scene();
    upstream.set_mode(Mode::Silent);
    let start = Instant::now();
    assert_eq!(client.resolve("example.com", RecordType::A), "ServFail");
    assert!(start.elapsed() < Duration::from_secs(5), "before a glibc client retries");
}

#[test]
fn edns_is_negotiated_separately_with_client_and_server() {
    let (_bed, upstream, client) = scene();
    // Docker responds without EDNS for local names, and forwards the OPT record of the client.
    let answer = client.ask_message(&with_edns(query(1, "svc-b", RecordType::A), 4096));
    assert_eq!(answer.edns.unwrap().max_payload(), 1232);
    let answer = client.ask_message(&with_edns(query(1, "example.com", RecordType::A), 4096));
    assert!(answer.edns.is_some());
    assert!(upstream.seen()[0].edns);
    let answer = client.ask("other.example.com", RecordType::A);
    assert!(answer.edns.is_none());
    assert!(upstream.seen()[0].edns, "upstream EDNS is independent of the client");
}

#[test]
fn the_response_code_of_an_upstream_server_is_relayed() {
    let (_bed, _upstream, client) = scene();
    let answer = client.ask("nx.example.com", RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(answer.authorities.len(), 1);
}
