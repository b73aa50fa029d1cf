//! Upstream servers: failover, spoofing protection, cache, limits and isolation.

use crate::support::client::{query, summary, with_edns};
use crate::support::upstream::{Mode, Upstream};
use crate::support::{Container, SOON, TestBed, at};
use hickory_server::proto::op::{Message, ResponseCode};
use hickory_server::proto::rr::RecordType;
use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use tidegate_dns::{NetworkSpec, ServeOptions};
use tidegate_testbed::{Namespace, Topology, eventually};

const NONE: [String; 0] = [];
/// Just below the delay after which the next server is queried.
const FAILOVER_DELAY: Duration = Duration::from_millis(190);

/// A label that random case leaves in lower case with a probability of 2^-26.
const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz";

/// A container on a network with egress, and upstream servers at 127.0.0.1 and 127.0.0.2 of the
/// host.
fn scene() -> (TestBed, Upstream, Upstream, Container) {
    let host = Namespace::new();
    let first = Upstream::start(&host, "127.0.0.1:53");
    let second = Upstream::start(&host, "127.0.0.2:53");
    let bed = TestBed::new(host, "nameserver 127.0.0.1\nnameserver 127.0.0.2\n");
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let container = bed.serve("web");
    (bed, first, second, container)
}

/// Resolves a name, which has to exist. Returns the time.
fn time(client: &Container, name: &str) -> Duration {
    let start = Instant::now();
    assert_eq!(client.resolve(name, RecordType::A), "192.0.2.1", "{name}");
    start.elapsed()
}

#[test]
fn a_dead_first_server_delays_one_query() {
    let (bed, first, second, client) = scene();
    first.set_mode(Mode::Silent);
    let took = time(&client, "0.example");
    assert!(took < Duration::from_millis(500), "{took:?}");
    let later: Vec<_> =
        (1..100).map(|number| time(&client, &format!("{number}.example"))).collect();
    // None should be slow, except on a machine that is busy with other work.
    let slow = later.iter().filter(|took| **took >= Duration::from_millis(50)).count();
    assert!(slow <= 5, "{later:?}");
    let asked = (first.names().len(), second.names().len());
    assert!(asked.0 <= 5 && asked.1 == 100, "{asked:?}");
    let page = bed.page();
    assert!(page.contains("tidegate_dns_upstream_trusted{server=\"127.0.0.1:53\"} 0"), "{page}");
    assert!(
        !page.contains("tidegate_dns_upstream_timeouts_total{server=\"127.0.0.1:53\"} 0"),
        "{page}"
    );
    assert!(
        page.contains("tidegate_dns_upstream_seconds_count{server=\"127.0.0.2:53\"} 100"),
        "{page}"
    );
}

#[test]
fn a_recovered_server_is_queried_first_again() {
    let (_bed, first, second, client) = scene();
    first.set_mode(Mode::Silent);
    time(&client, "0.example");
    first.set_mode(Mode::Good);
    first.seen();
    let back = |number: &mut u32| {
        *number += 1;
        let took = time(&client, &format!("{number}.example"));
        assert!(took < FAILOVER_DELAY, "{took:?}");
        std::thread::sleep(Duration::from_millis(100));
        !first.names().is_empty()
    };
    let mut number = 0;
    assert!(eventually(Duration::from_secs(8), || back(&mut number)));
    second.seen();
    time(&client, "last.example");
    assert_eq!(second.names(), NONE);
}

#[test]
fn after_a_closed_port_the_next_server_is_queried_at_once() {
    let (_bed, first, _second, client) = scene();
    drop(first);
    let took = time(&client, "0.example");
    assert!(took < FAILOVER_DELAY, "{took:?}");
}

#[test]
fn a_query_survives_a_restart_of_the_only_server() {
    let (bed, upstream) = TestBed::with_upstream();
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let client = bed.serve("web");
    time(&client, "0.example");
    drop(upstream);
    assert_eq!(client.resolve("1.example", RecordType::A), "ServFail");
    let host = bed.host.clone();
    let restart = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        Upstream::start(&host, "127.0.0.53:53")
    });
    // Queried while the server is down.
    time(&client, "during.example");
    let _upstream = restart.join().unwrap();
    time(&client, "2.example");
    std::thread::sleep(Duration::from_millis(1_100));
    // RFC 9520: the failure is cached for a second.
    time(&client, "1.example");
}

#[test]
fn failures_cause_failover() {
    let (_bed, first, second, client) = scene();
    for code in [ResponseCode::ServFail, ResponseCode::Refused] {
        first.set_mode(Mode::Fails(code));
        let took = time(&client, &format!("{code:?}.example"));
        assert!(took < FAILOVER_DELAY, "{took:?}");
    }
    first.set_mode(Mode::Garbage);
    time(&client, "garbage.example");
    second.set_mode(Mode::Fails(ResponseCode::Refused));
    assert_eq!(
        client.resolve("both.example", RecordType::A),
        "Refused",
        "the response of the last server"
    );
}

/// RFC 5452 section 9.1.
#[test]
fn mismatched_responses_are_not_accepted() {
    let (_bed, first, _second, client) = scene();
    first.set_mode(Mode::WrongThenRight);
    for number in 0..20 {
        time(&client, &format!("{number}.{LETTERS}.example"));
    }
}

#[test]
fn responses_from_other_addresses_are_not_accepted() {
    let (bed, first, second, client) = scene();
    first.set_mode(Mode::Slow(Duration::from_millis(100)));
    second.set_mode(Mode::Silent);
    let forger = bed.host.run(|| UdpSocket::bind("127.0.0.9:53").unwrap());
    let forge = std::thread::spawn(move || {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            if let Some(seen) = first.seen().first() {
                let mut lie = query(seen.id, &seen.name, RecordType::A);
                lie.metadata.message_type = hickory_server::proto::op::MessageType::Response;
                lie.metadata.response_code = ResponseCode::NXDomain;
                forger.send_to(&lie.to_vec().unwrap(), seen.from).unwrap();
                return first;
            }
        }
        first
    });
    time(&client, "forged.example");
    drop(forge.join().unwrap());
}

/// RFC 5452 section 9.2: "Use an unpredictable source port [...] Use an unpredictable query ID".
#[test]
fn ports_ids_and_case_are_random() {
    let (_bed, first, _second, client) = scene();
    for number in 0..200 {
        time(&client, &format!("{number}.{LETTERS}.example"));
    }
    let seen = first.seen();
    let ports: BTreeSet<_> = seen.iter().map(|seen| seen.from.port()).collect();
    let ids: BTreeSet<_> = seen.iter().map(|seen| seen.id).collect();
    let cases: BTreeSet<_> =
        seen.iter().map(|seen| seen.name_as_sent.split_once('.').unwrap().1.to_owned()).collect();
    assert!(ports.len() >= 190, "{} ports", ports.len());
    assert!(ids.len() >= 190, "{} IDs", ids.len());
    assert!(cases.len() >= 180, "{} cases", cases.len());
    let steps = seen.windows(2).filter(|two| two[1].id.wrapping_sub(two[0].id) < 100).count();
    assert!(steps < 20, "{steps} small steps");
}

#[test]
fn each_query_has_its_own_source_port_below_the_limit() {
    const COUNT: usize = 300;
    let (_bed, first, second, client) = scene();
    for upstream in [&first, &second] {
        upstream.set_mode(Mode::Slow(Duration::from_millis(150)));
    }
    let socket = client.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 1 << 20);
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..COUNT {
        let query =
            query(number as u16, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&query, "127.0.0.11:53").unwrap();
    }
    for _ in 0..COUNT {
        socket.recv(&mut [0; 512]).unwrap();
    }
    let ports: Vec<_> = first.seen().iter().map(|seen| seen.from.port()).collect();
    let different: BTreeSet<_> = ports.iter().collect();
    assert_eq!(different.len(), ports.len());
}

#[test]
fn a_server_that_changes_case_is_queried_over_tcp_once_and_then_in_lower_case() {
    let (_bed, first, second, client) = scene();
    first.set_mode(Mode::LowerCase);
    time(&client, &format!("one.{LETTERS}"));
    time(&client, &format!("two.{LETTERS}"));
    let seen: Vec<_> = first.seen().into_iter().map(|seen| (seen.name, seen.tcp)).collect();
    let [one, two] = ["one", "two"].map(|name| format!("{name}.{LETTERS}."));
    assert_eq!(seen, [(one.clone(), false), (one, true), (two, false)]);
    first.seen();
    time(&client, &format!("three.{LETTERS}"));
    assert_eq!(first.seen()[0].name_as_sent, format!("three.{LETTERS}."));
    assert_eq!(second.names(), NONE);
}

/// A response over UDP may be forged and must not disable the protection.
#[test]
fn case_changed_over_udp_only_is_never_accepted() {
    let (_bed, first, second, client) = scene();
    first.set_mode(Mode::LowerCaseUdp);
    for number in 0..6 {
        time(&client, &format!("{number}.{LETTERS}.example"));
    }
    let seen = first.seen();
    assert_eq!(seen.iter().filter(|seen| seen.tcp).count(), 6, "each query is repeated over TCP");
    assert!(seen.iter().all(|seen| seen.name_as_sent != seen.name), "{seen:?}");
    assert_eq!(second.names(), NONE);
}

#[test]
fn guesses_close_the_source_port_and_the_query_is_sent_over_tcp() {
    let (bed, first, second, client) = scene();
    first.set_mode(Mode::WrongIds);
    let took = time(&client, "one.example");
    assert!(took < FAILOVER_DELAY, "{took:?}");
    let seen: Vec<_> = first.seen().iter().map(|seen| seen.tcp).collect();
    assert_eq!((seen, second.names()), (vec![false, true], NONE.to_vec()));
    drop(bed);
}

#[test]
fn a_server_without_edns_is_queried_again_without_it() {
    let (_bed, first, _second, client) = scene();
    first.set_mode(Mode::NoEdns);
    time(&client, "0.example");
    time(&client, "1.example");
    let edns: Vec<_> = first.seen().iter().map(|seen| seen.edns).collect();
    assert_eq!(edns, [true, false, false]);
}

#[test]
fn concurrent_queries_detect_a_server_without_edns() {
    let (_bed, first, second, client) = scene();
    first.set_mode(Mode::NoEdns);
    second.set_mode(Mode::NoEdns);
    let socket = client.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..50 {
        let query = query(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&query, "127.0.0.11:53").unwrap();
    }
    for _ in 0..50 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(summary(&Message::from_vec(&buffer[..length]).unwrap()), "192.0.2.1");
    }
}

#[test]
fn responses_are_cached() {
    let (_bed, first, second, client) = scene();
    for _ in 0..10 {
        time(&client, "web.example");
        assert_eq!(client.resolve("nx.example", RecordType::A), "NXDomain");
        assert_eq!(client.resolve("web.example", RecordType::AAAA), "nothing");
    }
    assert_eq!(
        (first.names().len(), second.names()),
        (3, NONE.to_vec()),
        "RFC 2308: negative responses are cached too"
    );
    std::thread::sleep(Duration::from_millis(1_100));
    let answer = client.ask("web.example", RecordType::A);
    assert!((50..60).contains(&answer.answers[0].ttl), "the TTL decreases");
}

#[test]
fn equal_queries_are_forwarded_once() {
    let (_bed, first, second, client) = scene();
    let slow = Mode::Slow(Duration::from_millis(50));
    first.set_mode(slow);
    second.set_mode(slow);
    let sockets: Vec<_> = (0..100)
        .map(|_| client.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap()))
        .collect();
    for (number, socket) in sockets.iter().enumerate() {
        let name = if number % 2 == 0 { "one.example" } else { "ONE.Example" };
        let query = query(number as u16, name, RecordType::A).to_vec().unwrap();
        socket.send_to(&query, "127.0.0.11:53").unwrap();
    }
    for (number, socket) in sockets.iter().enumerate() {
        socket.set_read_timeout(Some(SOON)).unwrap();
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(usize::from(answer.metadata.id), number);
        let expected = if number % 2 == 0 { "one.example." } else { "ONE.Example." };
        assert_eq!(answer.queries[0].name().to_string(), expected);
        assert_eq!(answer.answers.len(), 1);
    }
    assert_eq!(first.names(), ["one.example."]);
    assert_eq!(second.names(), NONE);
}

#[test]
fn five_thousand_queries_to_a_slow_server_are_all_answered() {
    const COUNT: usize = 5_000;
    let (bed, upstream) = TestBed::with_upstream();
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let client = bed.serve("web");
    upstream.set_mode(Mode::Slow(Duration::from_secs(2)));
    let sockets: Vec<_> =
        (0..50).map(|_| client.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap())).collect();
    for socket in &sockets {
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, 1 << 20);
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    let start = Instant::now();
    for number in 0..COUNT {
        let query =
            query(number as u16, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        sockets[number % sockets.len()].send_to(&query, "127.0.0.11:53").unwrap();
    }
    let mut answers = [0; 2];
    let mut seen = BTreeSet::new();
    for _ in 0..COUNT / sockets.len() {
        for socket in &sockets {
            let mut buffer = [0; 512];
            let Ok(length) = socket.recv(&mut buffer) else {
                panic!("{} of {COUNT} answered", seen.len())
            };
            let answer = Message::from_vec(&buffer[..length]).unwrap();
            seen.insert(answer.metadata.id);
            answers[usize::from(answer.metadata.response_code == ResponseCode::ServFail)] += 1;
        }
    }
    assert_eq!(seen.len(), COUNT);
    println!("{} answered, {} SERVFAIL, in {:?}", answers[0], answers[1], start.elapsed());
    assert!(answers[0] > COUNT * 9 / 10, "{answers:?}");
}

#[test]
fn queries_beyond_the_limit_are_queued_and_expire_and_local_names_resolve() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let bed = TestBed::with(host, "nameserver 127.0.0.53\n", |settings| settings.in_flight = 9);
    bed.network("un1");
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let client = bed.serve("web");
    upstream.set_mode(Mode::Silent);
    let socket = client.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..15 {
        let query = query(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&query, "127.0.0.11:53").unwrap();
    }
    let start = Instant::now();
    assert_eq!(client.resolve("web", RecordType::A), "172.30.1.2");
    assert!(start.elapsed() < Duration::from_secs(1));
    // The local name is answered before all other queries are queued.
    let has_queued = || bed.page().contains("tidegate_dns_queued 9\n");
    assert!(eventually(Duration::from_secs(1), has_queued), "{}", bed.page());
    // Six are in flight. The others are queued and expire before those six fail.
    for _ in 0..9 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert!(answer.metadata.id >= 6);
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

/// Names with slow, silent or failing authoritative servers are available to everyone.
#[test]
fn a_container_does_not_change_the_order_of_the_servers_for_others() {
    let (bed, first, second, client) = scene();
    bed.network("un2");
    bed.endpoint("un2", "evil", &[], &["172.30.2.2"]);
    let evil = bed.serve("evil");
    first.set_mode(Mode::SilentAbout("slow"));
    for number in 0..6 {
        let took = time(&evil, &format!("{number}.slow.example"));
        assert!(took >= FAILOVER_DELAY, "the second server responded after {took:?}");
        time(&client, &format!("{number}.corp.example"));
    }
    assert_eq!(first.names().iter().filter(|name| name.contains("corp")).count(), 6);
    assert_eq!(second.names().iter().filter(|name| name.contains("corp")).count(), 0);
    assert!(bed.page().contains("tidegate_dns_upstream_trusted{server=\"127.0.0.1:53\"} 1"));
}

/// Neither the response time nor the TTL reveals the queries of other networks.
#[test]
fn responses_do_not_reveal_queries_of_other_networks() {
    let (bed, first, _second, client) = scene();
    bed.network("un2");
    bed.endpoint("un2", "other", &[], &["172.30.2.2"]);
    bed.endpoint("un1", "neighbour", &[], &["172.30.1.3"]);
    bed.endpoint("un1", "both", &[], &["172.30.1.4"]);
    bed.endpoint("un2", "both", &[], &["172.30.2.4"]);
    let [other, neighbour, both] = ["other", "neighbour", "both"].map(|name| bed.serve(name));
    time(&client, "secret.example");
    std::thread::sleep(Duration::from_millis(1_100));
    for (who, ttl, asked) in [(&other, 60, 1), (&both, 60, 1), (&neighbour, 59, 0)] {
        first.seen();
        let answer = who.ask("secret.example", RecordType::A);
        assert!(answer.answers[0].ttl <= ttl && (answer.answers[0].ttl == 60) == (ttl == 60));
        assert_eq!(first.names().len(), asked);
    }
    // In flight: equal queries of different networks are not shared.
    first.seen();
    first.set_mode(Mode::Slow(Duration::from_millis(100)));
    std::thread::scope(|scope| {
        for who in [&client, &other] {
            scope.spawn(move || time(who, "flight.example"));
        }
    });
    assert_eq!(first.names(), ["flight.example."; 2]);
}

#[test]
fn one_network_cannot_exhaust_outstanding_queries() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let bed = TestBed::with(host, "nameserver 127.0.0.53\n", |settings| {
        settings.in_flight = 30;
        settings.source_ports = 10;
    });
    bed.network("un1");
    bed.network("un2");
    for (network, container, address) in [
        ("un1", "greedy", "172.30.1.2"),
        ("un1", "too", "172.30.1.3"),
        ("un2", "modest", "172.30.2.2"),
    ] {
        bed.endpoint(network, container, &[], &[address]);
    }
    let [greedy, too, modest] = ["greedy", "too", "modest"].map(|name| bed.serve(name));
    upstream.set_mode(Mode::SilentAbout("greedy"));
    for flooder in [&greedy, &too] {
        let socket = flooder.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        for number in 0..100 {
            let name = format!("{number}.greedy.example");
            let query = query(number, &name, RecordType::A).to_vec().unwrap();
            socket.send_to(&query, "127.0.0.11:53").unwrap();
        }
        // Queries beyond the limit are queued and expire.
        socket.set_read_timeout(Some(SOON)).unwrap();
        for _ in 0..70 {
            socket.recv(&mut [0; 512]).unwrap();
        }
    }
    for number in 0..5 {
        time(&modest, &format!("{number}.modest.example"));
    }
}

#[test]
fn one_container_cannot_exhaust_waiting_clients() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let bed =
        TestBed::with(host, "nameserver 127.0.0.53\n", |settings| settings.waiting_of_one = 10);
    bed.network("un1");
    bed.endpoint("un1", "greedy", &[], &["172.30.1.2"]);
    bed.endpoint("un1", "modest", &[], &["172.30.1.3"]);
    let (greedy, modest) = (bed.serve("greedy"), bed.serve("modest"));
    upstream.set_mode(Mode::Silent);
    let socket = greedy.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..30 {
        let query = query(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&query, "127.0.0.11:53").unwrap();
    }
    // For each query beyond the limit, the oldest queued one gets SERVFAIL at once. Those that were
    // sent upstream before stay.
    let start = Instant::now();
    let mut previous = None;
    for _ in 0..20 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert!(previous < Some(answer.metadata.id), "{previous:?} {}", answer.metadata.id);
        previous = Some(answer.metadata.id);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(bed.page().contains("tidegate_dns_endpoint_waiting_max 10\n"), "{}", bed.page());
    upstream.set_mode(Mode::Good);
    time(&modest, "modest.example");
}

/// CVE-2024-29018: queries of an internal network were forwarded.
#[test]
fn queries_of_an_internal_network_are_not_forwarded() {
    let (bed, first, second, open) = scene();
    bed.internal_network("shut");
    bed.endpoint("shut", "safe", &[], &["172.30.2.2"]);
    let client = bed.serve_with(
        "safe",
        &ServeOptions { servers: vec![at("127.0.0.1:53")], ..ServeOptions::default() },
    );
    assert_eq!(client.resolve("safe", RecordType::A), "172.30.2.2");
    for (name, kind) in [
        ("example.com", RecordType::A),
        ("secret.attacker.example", RecordType::TXT),
        ("org", RecordType::NS),
        ("8.8.8.8.in-addr.arpa", RecordType::PTR),
    ] {
        let answer = client.ask_message(&with_edns(query(1, name, kind), 1232));
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{name}");
        assert!(answer.edns.unwrap().option(15.into()).is_some(), "RFC 8914: the reason");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((first.names(), second.names()), (NONE.to_vec(), NONE.to_vec()));
    // Cached responses of a network with egress are not available either.
    time(&open, "known.example");
    assert_eq!(client.resolve("known.example", RecordType::A), "Refused");
    bed.endpoint("un1", "safe", &[], &["172.30.1.9"]);
    assert_eq!(
        client.resolve("example.com", RecordType::A),
        "192.0.2.1",
        "after it has joined a network with egress"
    );
}

#[test]
fn servers_of_the_container_precede_those_of_network_and_host() {
    let (bed, hosts, _second, client) = scene();
    let networks = Upstream::start(&bed.host, "127.0.0.3:53");
    let containers = Upstream::start(&bed.host, "127.0.0.4:53");
    let spec = NetworkSpec {
        name: "own".into(),
        servers: vec![at("127.0.0.3:53")],
        ..NetworkSpec::default()
    };
    bed.network_with(&spec);
    bed.endpoint("own", "a", &[], &["172.30.3.2"]);
    bed.endpoint("own", "b", &[], &["172.30.3.3"]);
    let a = bed.serve("a");
    let b = bed.serve_with(
        "b",
        &ServeOptions { servers: vec![at("127.0.0.4:53")], ..ServeOptions::default() },
    );
    for client in [&client, &a, &b] {
        time(client, "one.example");
    }
    // Responses are not shared between server lists: all three were queried.
    for upstream in [&hosts, &networks, &containers] {
        assert_eq!(upstream.names(), ["one.example."]);
    }
}

/// As in rootless mode, where networks are not in the namespace of the host.
#[test]
fn a_server_on_a_network_is_queried_from_the_namespace_of_networks() {
    let networks = Namespace::new();
    networks.ip_all(
        "link add br0 type bridge
         addr add 172.30.1.1/24 dev br0
         addr add 172.30.1.53/24 dev br0
         link set br0 up",
    );
    let host = Namespace::new();
    let outside = Upstream::start(&host, "127.0.0.53:53");
    let inside = Upstream::start(&networks, "172.30.1.53:53");
    let bed = TestBed::with(host, "nameserver 127.0.0.53\n", |settings| {
        settings.networks = crate::support::handle(&networks);
    });
    let index = networks.run(|| {
        let any = UdpSocket::bind("127.0.0.1:0").unwrap();
        rustix::net::netdevice::name_to_index(&any, "br0").unwrap()
    });
    bed.resolver.set_bridges([index]);
    let subnets = vec!["172.30.1.0/24".parse().unwrap()];
    bed.network_with(&NetworkSpec { name: "un1".into(), subnets, ..NetworkSpec::default() });
    bed.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let options = ServeOptions { servers: vec![at("172.30.1.53:53")], ..ServeOptions::default() };
    let client = bed.serve_with("web", &options);
    time(&client, "one.example");
    assert_eq!(
        client.ask("many.example", RecordType::A).answers.len(),
        0,
        "truncated for this client"
    );
    assert_eq!((inside.seen().len(), outside.names()), (3, NONE.to_vec()), "the third over TCP");
}

/// A forged response of a container arrives on the bridge of its network. For the kernel, it has
/// the address and port of the server.
#[test]
fn a_response_on_a_bridge_is_dropped_unless_its_server_is_on_a_network() {
    let net = Topology::three();
    let upstream = Upstream::start(&net.client, "203.0.113.9:53");
    let bed = TestBed::new(net.host.clone(), "nameserver 203.0.113.9\n");
    let subnets = vec!["172.30.0.0/24".parse().unwrap()];
    bed.network_with(&NetworkSpec { name: "un1".into(), subnets, ..NetworkSpec::default() });
    bed.endpoint("un1", "web", &[], &["172.30.0.2"]);
    let index = net.host.run(|| {
        let any = UdpSocket::bind("127.0.0.1:0").unwrap();
        rustix::net::netdevice::name_to_index(&any, "br0").unwrap()
    });
    bed.resolver.set_bridges([index]);
    let client = bed.serve("web");
    // Reverse path filtering of the host would drop the datagram earlier, because of its forged
    // source.
    for name in ["all", "br0"] {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        net.host.run(|| fs::write(&path, "0")).unwrap();
    }
    upstream.set_mode(Mode::Silent);
    let forged = |name: &str, ends: &std::sync::atomic::AtomicBool| {
        // The container has the address of the server and knows port, ID and case.
        let forger = net.container.run(|| UdpSocket::bind("203.0.113.9:53").unwrap());
        let start = Instant::now();
        while !ends.load(std::sync::atomic::Ordering::Relaxed) && start.elapsed() < 2 * SOON {
            for seen in upstream.seen().iter().filter(|seen| seen.name.starts_with(name)) {
                let mut lie = query(seen.id, &seen.name_as_sent, RecordType::A);
                lie.metadata.message_type = hickory_server::proto::op::MessageType::Response;
                lie.metadata.response_code = ResponseCode::NXDomain;
                forger.send_to(&lie.to_vec().unwrap(), seen.from).unwrap();
            }
        }
    };
    net.container.ip_all("addr add 203.0.113.9/32 dev lo");
    let ask_while_forged = |name: &str| {
        let ends = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| forged(name, &ends));
            let summary = client.resolve(&format!("{name}.example"), RecordType::A);
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
            summary
        })
    };
    assert_eq!(ask_while_forged("bridge"), "ServFail", "no other server has responded");
    // The check of the bridge has dropped it, and nothing else.
    bed.resolver.set_bridges([]);
    assert_eq!(ask_while_forged("anywhere"), "NXDomain");
    // A server in a container responds through the bridge.
    bed.resolver.set_bridges([index]);
    let _inside = Upstream::start(&net.container, "172.30.0.2:53");
    let options = ServeOptions { servers: vec![at("172.30.0.2:53")], ..ServeOptions::default() };
    let client = bed.serve_with("web", &options);
    time(&client, "inside.example");
    // One that arrives elsewhere is forged by a neighbour of the host.
    bed.resolver.set_bridges([index + 1000]);
    assert_eq!(client.resolve("elsewhere.example", RecordType::A), "ServFail");
}

#[test]
fn own_addresses_are_not_queried() {
    let (bed, ..) = scene();
    let _guard = bed.runtime.enter();
    bed.host.ip_all(
        "link add br0 type bridge
         addr add 172.30.1.1/24 dev br0
         link set br0 up",
    );
    let host = crate::support::handle(&bed.host);
    let _serving = bed.resolver.serve_gateway(&host, "un1", [172, 30, 1, 1].into(), "br0").unwrap();
    let spec = NetworkSpec {
        name: "own".into(),
        servers: vec![at("172.30.1.1:53")],
        ..NetworkSpec::default()
    };
    let error = bed.resolver.add_network(&spec).unwrap_err();
    assert_eq!(
        error.to_string(),
        "network \"own\": DNS server 172.30.1.1:53 is tidegate itself; use another server"
    );
    let client = bed.serve("web");
    fs::write(bed.resolv_conf(), "nameserver 172.30.1.1\n").unwrap();
    let mut number = 0;
    let mut refused = || {
        number += 1;
        client.ask(&format!("{number}.example"), RecordType::A)
    };
    let start = Instant::now();
    assert!(eventually(SOON, || refused().metadata.response_code == ResponseCode::ServFail));
    assert!(start.elapsed() < Duration::from_secs(2), "at once, without a forwarding loop");
}

#[test]
fn changes_of_resolv_conf_apply() {
    let (bed, first, second, client) = scene();
    time(&client, "0.example");
    let mut number = 0;
    let mut goes_to = |upstream: &Upstream| {
        upstream.seen();
        eventually(SOON, || {
            number += 1;
            time(&client, &format!("{number}.changed.example"));
            !upstream.names().is_empty()
        })
    };
    // Overwritten.
    fs::write(bed.resolv_conf(), "nameserver 127.0.0.2\n").unwrap();
    assert!(goes_to(&second));
    // Replaced by rename(2).
    let other = bed.directory.path().join("other");
    fs::write(&other, "nameserver 127.0.0.1\n").unwrap();
    fs::rename(&other, bed.resolv_conf()).unwrap();
    assert!(goes_to(&first));
    // Replaced by a link to a file in another directory, which is then overwritten.
    let run = bed.directory.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join("stub"), "nameserver 127.0.0.2\n").unwrap();
    std::os::unix::fs::symlink("run/stub", &other).unwrap();
    fs::rename(&other, bed.resolv_conf()).unwrap();
    assert!(goes_to(&second));
    fs::write(run.join("stub"), "nameserver 127.0.0.1\n").unwrap();
    assert!(goes_to(&first));
    // Cached responses of the previous servers are dropped.
    second.seen();
    fs::write(run.join("stub"), "nameserver 127.0.0.2\n").unwrap();
    assert!(goes_to(&second));
    time(&client, "0.example");
    assert!(second.names().contains(&"0.example.".to_owned()));
}
