//! What Docker's server answers, row by row, and where this one answers something else; docs/dns.md
//! says why.

use crate::support::client::{question, read, told, with_edns, write};
use crate::support::upstream::{Mood, Upstream};
use crate::support::{Container, House, endpoint};
use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::RecordType;
use std::time::{Duration, Instant};
use tidegate_dns::EndpointSpec;

const NONE: [String; 0] = [];

/// `hosta` on `un1` asks, with two neighbours that share an alias; there is another network.
fn scene() -> (House, Upstream, Container) {
    let (house, upstream) = House::with_upstream();
    for network in ["un1", "un2", "un6"] {
        house.network(network);
    }
    let own = EndpointSpec {
        hostname: Some("hosta".to_owned()),
        ..endpoint("svc-a", &["0123456789ab"], &["172.30.1.2"])
    };
    house.resolver.add_endpoint("un1", &own).unwrap();
    house.endpoint("un1", "svc-b", &["89abcdef0123", "both"], &["172.30.1.3"]);
    house.endpoint("un1", "svc-c", &["both"], &["172.30.1.4"]);
    house.endpoint("un2", "elsewhere", &[], &["172.30.2.2"]);
    house.endpoint("un6", "svc-6", &[], &["172.30.6.2", "fd88::2"]);
    let container = house.serve("svc-a");
    (house, upstream, container)
}

#[test]
fn name_short_id_alias_and_host_name_are_answered() {
    let (_house, upstream, asker) = scene();
    for (name, address) in [
        ("svc-b", "172.30.1.3"),
        ("89abcdef0123", "172.30.1.3"),
        ("svc-a", "172.30.1.2"),
        ("hosta", "172.30.1.2"),
        ("svc-b.un1", "172.30.1.3"),
        ("both.un1", "172.30.1.3 172.30.1.4"),
    ] {
        let answer = asker.ask(name, RecordType::A);
        let mut addresses: Vec<_> = told(&answer).split(' ').map(str::to_owned).collect();
        addresses.sort();
        assert_eq!(addresses.join(" "), address, "{name}");
        let head = &answer.metadata;
        assert!(head.recursion_desired && head.recursion_available, "qr rd ra");
        assert!(!head.authoritative && !head.authentic_data, "no aa");
        assert!(answer.edns.is_none());
        // Docker: 600. Who asks again shall hear what is true.
        assert_eq!(answer.answers[0].ttl, 5);
    }
    assert_eq!(upstream.names(), NONE);
}

#[test]
fn those_who_share_an_alias_take_turns() {
    let (_house, _upstream, asker) = scene();
    let answers: Vec<_> = (0..4).map(|_| asker.told("both", RecordType::A)).collect();
    assert_eq!(answers[0], answers[2]);
    assert_eq!(answers[1], answers[3]);
    assert_ne!(answers[0], answers[1]);
}

#[test]
fn the_owner_of_a_record_keeps_the_case_that_was_asked() {
    let (_house, _upstream, asker) = scene();
    let answer = asker.ask("SVC-B", RecordType::A);
    assert_eq!(answer.answers[0].name.to_string(), "SVC-B.");
    assert_eq!(answer.queries[0].name().to_string(), "SVC-B.");
}

#[test]
fn what_a_known_name_has_not_is_nothing_and_is_not_forwarded() {
    let (_house, upstream, asker) = scene();
    // Docker forwards TXT and ANY, and so tells the outside what services are called.
    for kind in
        [RecordType::AAAA, RecordType::MX, RecordType::TXT, RecordType::HTTPS, RecordType::SRV]
    {
        let answer = asker.ask("svc-b", kind);
        assert_eq!(told(&answer), "nothing", "{kind}");
        assert_eq!(answer.authorities[0].record_type(), RecordType::SOA, "RFC 2308 section 3");
    }
    assert_eq!(asker.told("svc-b", RecordType::ANY), "172.30.1.3");
    assert_eq!(upstream.names(), NONE);
}

#[test]
fn ipv6_has_names_both_ways() {
    let (house, _upstream, _) = scene();
    let asker = house.serve("svc-6");
    assert_eq!(asker.told("svc-6", RecordType::AAAA), "fd88::2");
    let reverse = format!("2.{}8.8.d.f.ip6.arpa", "0.".repeat(27));
    assert_eq!(asker.told(&reverse, RecordType::PTR), "svc-6.un6.");
}

#[test]
fn a_containers_address_is_its_name_on_the_network() {
    let (_house, _upstream, asker) = scene();
    let answer = asker.ask("3.1.30.172.in-addr.arpa", RecordType::PTR);
    assert_eq!(told(&answer), "svc-b.un1.");
    assert_eq!(answer.answers[0].ttl, 5);
}

#[test]
fn names_of_other_networks_are_none_and_are_not_forwarded() {
    let (_house, upstream, asker) = scene();
    // Docker forwards both, and unknown names without a dot.
    for name in ["elsewhere", "elsewhere.un2", "nosuch"] {
        assert_eq!(asker.told(name, RecordType::A), "NXDomain", "{name}");
    }
    assert_eq!(upstream.names(), NONE);
}

#[test]
fn localhost_is_here_and_the_docker_host_has_no_name() {
    let (_house, upstream, asker) = scene();
    // Docker forwards it.
    assert_eq!(asker.told("localhost", RecordType::A), "127.0.0.1");
    assert_eq!(asker.told("localhost", RecordType::AAAA), "::1");
    assert_eq!(upstream.names(), NONE);
    assert_eq!(asker.told("host.docker.internal", RecordType::A), "192.0.2.1");
    assert_eq!(upstream.names(), ["host.docker.internal."]);
}

#[test]
fn names_of_private_addresses_are_not_forwarded_those_of_others_are() {
    let (_house, upstream, asker) = scene();
    // Docker forwards all.
    for name in ["9.9.9.10.in-addr.arpa", "77.1.30.172.in-addr.arpa", "2.2.30.172.in-addr.arpa"] {
        assert_eq!(asker.told(name, RecordType::PTR), "NXDomain", "{name}");
    }
    assert_eq!(upstream.names(), NONE);
    assert_eq!(asker.told("8.8.8.8.in-addr.arpa", RecordType::PTR), "nothing");
    assert_eq!(upstream.names(), ["8.8.8.8.in-addr.arpa."]);
}

#[test]
fn questions_over_tcp_are_served_and_forwarded_by_datagram() {
    let (_house, upstream, asker) = scene();
    let mut stream = asker.connect();
    write(&mut stream, &question(1, "svc-b", RecordType::A));
    assert_eq!(told(&read(&mut stream).unwrap()), "172.30.1.3");
    write(&mut stream, &question(2, "example.com", RecordType::A));
    assert_eq!(told(&read(&mut stream).unwrap()), "192.0.2.1");
    // Docker forwards these over TCP.
    assert!(!upstream.seen()[0].tcp);
}

#[test]
fn what_is_cut_short_upstream_is_fetched_whole() {
    let (_house, upstream, asker) = scene();
    let answer = asker.ask("many.example", RecordType::A);
    assert!(answer.metadata.truncation && answer.answers.is_empty(), "300 addresses in 512 bytes");
    let seen: Vec<_> = upstream.seen().iter().map(|seen| seen.tcp).collect();
    // Docker passes the mark on, and leaves the rest to the client.
    assert_eq!(seen, [false, true]);
    let mut stream = asker.connect();
    write(&mut stream, &question(1, "many.example", RecordType::A));
    assert_eq!(read(&mut stream).unwrap().answers.len(), 300);
    assert_eq!(upstream.names(), NONE, "it is known by now");
}

#[test]
fn without_an_answer_upstream_it_is_servfail() {
    let (_house, upstream, asker) = scene();
    upstream.mood(Mood::Silent);
    let start = Instant::now();
    assert_eq!(asker.told("example.com", RecordType::A), "ServFail");
    assert!(start.elapsed() < Duration::from_secs(5), "before a client of glibc asks again");
}

#[test]
fn who_sends_an_opt_record_gets_one_and_another_is_sent_upstream() {
    let (_house, upstream, asker) = scene();
    // Docker answers local names without, and forwards the client's.
    let answer = asker.ask_message(&with_edns(question(1, "svc-b", RecordType::A), 4096));
    assert_eq!(answer.edns.unwrap().max_payload(), 1232);
    let answer = asker.ask_message(&with_edns(question(1, "example.com", RecordType::A), 4096));
    assert!(answer.edns.is_some());
    assert!(upstream.seen()[0].edns);
    let answer = asker.ask("other.example.com", RecordType::A);
    assert!(answer.edns.is_none());
    assert!(upstream.seen()[0].edns, "between us and that server");
}

#[test]
fn a_code_from_upstream_is_passed_on() {
    let (_house, _upstream, asker) = scene();
    let answer = asker.ask("nx.example.com", RecordType::A);
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(answer.authorities.len(), 1);
}
