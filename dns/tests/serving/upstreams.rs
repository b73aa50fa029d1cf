//! Other servers: dead, slow, lying, cut short, gone and back, and what is not asked of them.

use crate::support::client::{question, told, with_edns};
use crate::support::upstream::{Mood, Upstream};
use crate::support::{Container, House, SOON, at};
use hickory_server::proto::op::{Message, ResponseCode};
use hickory_server::proto::rr::RecordType;
use std::collections::BTreeSet;
use std::fs;
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use tidegate_dns::{NetworkSpec, ServeOptions};
use tidegate_testbed::{Namespace, Topology, eventually};

const NONE: [String; 0] = [];
/// Less than any server is waited for before another one is asked.
const UNWAITED: Duration = Duration::from_millis(190);

/// A label that is in lower case by chance once in 2^26 times.
const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz";

/// A container on an open network, and servers at 127.0.0.1 and 127.0.0.2 of the host.
fn scene() -> (House, Upstream, Upstream, Container) {
    let host = Namespace::new();
    let first = Upstream::start(&host, "127.0.0.1:53");
    let second = Upstream::start(&host, "127.0.0.2:53");
    let house = House::new(host, "nameserver 127.0.0.1\nnameserver 127.0.0.2\n");
    house.network("un1");
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let container = house.serve("web");
    (house, first, second, container)
}

/// Asks for the address of a name, which must be there.
fn time(asker: &Container, name: &str) -> Duration {
    let start = Instant::now();
    assert_eq!(asker.told(name, RecordType::A), "192.0.2.1", "{name}");
    start.elapsed()
}

#[test]
fn a_dead_first_server_costs_one_question() {
    let (house, first, second, asker) = scene();
    first.mood(Mood::Silent);
    let took = time(&asker, "0.example");
    assert!(took < Duration::from_millis(500), "{took:?}");
    let later: Vec<_> = (1..100).map(|number| time(&asker, &format!("{number}.example"))).collect();
    // All of them, but on a machine that is busy with something else.
    let slow = later.iter().filter(|took| **took >= Duration::from_millis(50)).count();
    assert!(slow <= 5, "{later:?}");
    let asked = (first.names().len(), second.names().len());
    assert!(asked.0 <= 5 && asked.1 == 100, "{asked:?}");
    let page = house.page();
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
fn a_server_that_is_back_is_asked_first_again() {
    let (_house, first, second, asker) = scene();
    first.mood(Mood::Silent);
    time(&asker, "0.example");
    first.mood(Mood::Good);
    first.seen();
    let back = |number: &mut u32| {
        *number += 1;
        let took = time(&asker, &format!("{number}.example"));
        assert!(took < UNWAITED, "{took:?}");
        std::thread::sleep(Duration::from_millis(100));
        !first.names().is_empty()
    };
    let mut number = 0;
    assert!(eventually(Duration::from_secs(8), || back(&mut number)));
    second.seen();
    time(&asker, "last.example");
    assert_eq!(second.names(), NONE);
}

#[test]
fn where_nobody_listens_the_next_is_asked_at_once() {
    let (_house, first, _second, asker) = scene();
    drop(first);
    let took = time(&asker, "0.example");
    assert!(took < UNWAITED, "{took:?}");
}

#[test]
fn a_restart_of_the_only_server_is_survived() {
    let (house, upstream) = House::with_upstream();
    house.network("un1");
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let asker = house.serve("web");
    time(&asker, "0.example");
    drop(upstream);
    assert_eq!(asker.told("1.example", RecordType::A), "ServFail");
    let host = house.host.clone();
    let restart = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        Upstream::start(&host, "127.0.0.53:53")
    });
    // Asked while nobody is there.
    time(&asker, "during.example");
    let _upstream = restart.join().unwrap();
    time(&asker, "2.example");
    std::thread::sleep(Duration::from_millis(1_100));
    // RFC 9520: the failure itself is remembered, for a second.
    time(&asker, "1.example");
}

#[test]
fn failures_fail_over() {
    let (_house, first, second, asker) = scene();
    for code in [ResponseCode::ServFail, ResponseCode::Refused] {
        first.mood(Mood::Fails(code));
        let took = time(&asker, &format!("{code:?}.example"));
        assert!(took < UNWAITED, "{took:?}");
    }
    first.mood(Mood::Garbage);
    time(&asker, "garbage.example");
    second.mood(Mood::Fails(ResponseCode::Refused));
    assert_eq!(asker.told("both.example", RecordType::A), "Refused", "what the last of them said");
}

/// RFC 5452 section 9.1.
#[test]
fn lies_are_not_believed() {
    let (_house, first, _second, asker) = scene();
    first.mood(Mood::Lying);
    for number in 0..20 {
        time(&asker, &format!("{number}.{LETTERS}.example"));
    }
}

#[test]
fn answers_from_elsewhere_are_not_heard() {
    let (house, first, second, asker) = scene();
    first.mood(Mood::Slow(Duration::from_millis(100)));
    second.mood(Mood::Silent);
    let forger = house.host.run(|| UdpSocket::bind("127.0.0.9:53").unwrap());
    let forge = std::thread::spawn(move || {
        let end = Instant::now() + SOON;
        while Instant::now() < end {
            if let Some(seen) = first.seen().first() {
                let mut lie = question(seen.id, &seen.name, RecordType::A);
                lie.metadata.message_type = hickory_server::proto::op::MessageType::Response;
                lie.metadata.response_code = ResponseCode::NXDomain;
                forger.send_to(&lie.to_vec().unwrap(), seen.from).unwrap();
                return first;
            }
        }
        first
    });
    time(&asker, "forged.example");
    drop(forge.join().unwrap());
}

/// RFC 5452 section 9.2: "Use an unpredictable source port [...] Use an unpredictable query ID".
#[test]
fn ports_ids_and_cases_cannot_be_foreseen() {
    let (_house, first, _second, asker) = scene();
    for number in 0..200 {
        time(&asker, &format!("{number}.{LETTERS}.example"));
    }
    let seen = first.seen();
    let ports: BTreeSet<_> = seen.iter().map(|seen| seen.from.port()).collect();
    let ids: BTreeSet<_> = seen.iter().map(|seen| seen.id).collect();
    let cases: BTreeSet<_> =
        seen.iter().map(|seen| seen.cased.split_once('.').unwrap().1.to_owned()).collect();
    assert!(ports.len() >= 190, "{} ports", ports.len());
    assert!(ids.len() >= 190, "{} IDs", ids.len());
    assert!(cases.len() >= 180, "{} cases", cases.len());
    let steps = seen.windows(2).filter(|two| two[1].id.wrapping_sub(two[0].id) < 100).count();
    assert!(steps < 20, "{steps} small steps");
}

#[test]
fn a_question_has_a_source_port_of_its_own_while_there_are_enough() {
    const COUNT: usize = 300;
    let (_house, first, second, asker) = scene();
    for upstream in [&first, &second] {
        upstream.mood(Mood::Slow(Duration::from_millis(150)));
    }
    let socket = asker.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, 1 << 20);
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..COUNT {
        let question =
            question(number as u16, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
    }
    for _ in 0..COUNT {
        socket.recv(&mut [0; 512]).unwrap();
    }
    let ports: Vec<_> = first.seen().iter().map(|seen| seen.from.port()).collect();
    let different: BTreeSet<_> = ports.iter().collect();
    assert_eq!(different.len(), ports.len());
}

#[test]
fn a_server_that_changes_the_case_is_asked_over_tcp_once_and_then_in_lower_case() {
    let (_house, first, second, asker) = scene();
    first.mood(Mood::Folds);
    time(&asker, &format!("one.{LETTERS}"));
    time(&asker, &format!("two.{LETTERS}"));
    let seen: Vec<_> = first.seen().into_iter().map(|seen| (seen.name, seen.tcp)).collect();
    let [one, two] = ["one", "two"].map(|name| format!("{name}.{LETTERS}."));
    assert_eq!(seen, [(one.clone(), false), (one, true), (two, false)]);
    first.seen();
    time(&asker, &format!("three.{LETTERS}"));
    assert_eq!(first.seen()[0].cased, format!("three.{LETTERS}."));
    assert_eq!(second.names(), NONE);
}

/// What comes over UDP alone may be forged: it must not take the protection off.
#[test]
fn a_case_that_is_changed_over_udp_alone_is_never_believed() {
    let (_house, first, second, asker) = scene();
    first.mood(Mood::FoldsDatagrams);
    for number in 0..6 {
        time(&asker, &format!("{number}.{LETTERS}.example"));
    }
    let seen = first.seen();
    assert_eq!(seen.iter().filter(|seen| seen.tcp).count(), 6, "each answer is fetched over TCP");
    assert!(seen.iter().all(|seen| seen.cased != seen.name), "{seen:?}");
    assert_eq!(second.names(), NONE);
}

#[test]
fn guesses_at_a_source_port_end_it_and_the_answer_comes_over_tcp() {
    let (house, first, second, asker) = scene();
    first.mood(Mood::Guessed);
    let took = time(&asker, "one.example");
    assert!(took < UNWAITED, "{took:?}");
    let seen: Vec<_> = first.seen().iter().map(|seen| seen.tcp).collect();
    assert_eq!((seen, second.names()), (vec![false, true], NONE.to_vec()));
    drop(house);
}

#[test]
fn a_server_without_edns_is_asked_again_without() {
    let (_house, first, _second, asker) = scene();
    first.mood(Mood::Plain);
    time(&asker, "0.example");
    time(&asker, "1.example");
    let edns: Vec<_> = first.seen().iter().map(|seen| seen.edns).collect();
    assert_eq!(edns, [true, false, false]);
}

#[test]
fn many_questions_learn_at_once_that_a_server_has_no_edns() {
    let (_house, first, second, asker) = scene();
    first.mood(Mood::Plain);
    second.mood(Mood::Plain);
    let socket = asker.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..50 {
        let question =
            question(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
    }
    for _ in 0..50 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        assert_eq!(told(&Message::from_vec(&buffer[..length]).unwrap()), "192.0.2.1");
    }
}

#[test]
fn what_is_known_is_not_asked_again() {
    let (_house, first, second, asker) = scene();
    for _ in 0..10 {
        time(&asker, "web.example");
        assert_eq!(asker.told("nx.example", RecordType::A), "NXDomain");
        assert_eq!(asker.told("web.example", RecordType::AAAA), "nothing");
    }
    assert_eq!(
        (first.names().len(), second.names()),
        (3, NONE.to_vec()),
        "RFC 2308: what is not there is known as well"
    );
    std::thread::sleep(Duration::from_millis(1_100));
    let answer = asker.ask("web.example", RecordType::A);
    assert!((50..60).contains(&answer.answers[0].ttl), "it grows older");
}

#[test]
fn equal_questions_are_one_question() {
    let (_house, first, second, asker) = scene();
    let slow = Mood::Slow(Duration::from_millis(50));
    first.mood(slow);
    second.mood(slow);
    let sockets: Vec<_> =
        (0..100).map(|_| asker.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap())).collect();
    for (number, socket) in sockets.iter().enumerate() {
        let name = if number % 2 == 0 { "one.example" } else { "ONE.Example" };
        let question = question(number as u16, name, RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
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
fn five_thousand_questions_to_a_slow_server_are_all_answered() {
    const COUNT: usize = 5_000;
    let (house, upstream) = House::with_upstream();
    house.network("un1");
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let asker = house.serve("web");
    upstream.mood(Mood::Slow(Duration::from_secs(2)));
    let sockets: Vec<_> =
        (0..50).map(|_| asker.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap())).collect();
    for socket in &sockets {
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, 1 << 20);
        socket.set_read_timeout(Some(SOON)).unwrap();
    }
    let start = Instant::now();
    for number in 0..COUNT {
        let question =
            question(number as u16, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        sockets[number % sockets.len()].send_to(&question, "127.0.0.11:53").unwrap();
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
fn too_many_questions_wait_and_are_told_so_and_local_names_go_on() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let house = House::with(host, "nameserver 127.0.0.53\n", |settings| settings.in_flight = 9);
    house.network("un1");
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let asker = house.serve("web");
    upstream.mood(Mood::Silent);
    let socket = asker.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..15 {
        let question =
            question(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
    }
    let start = Instant::now();
    assert_eq!(asker.told("web", RecordType::A), "172.30.1.2");
    assert!(start.elapsed() < Duration::from_secs(1));
    // The local name is answered before all of the others have been handed on.
    let has_queued = || house.page().contains("tidegate_dns_queued 9\n");
    assert!(eventually(Duration::from_secs(1), has_queued), "{}", house.page());
    // Six are asked; the others wait for their turn, and are told before those have failed.
    for _ in 0..9 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert!(answer.metadata.id >= 6);
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

/// Names whose servers are slow, silent or failing are to be had by everybody.
#[test]
fn a_container_does_not_change_the_order_of_the_servers_for_others() {
    let (house, first, second, asker) = scene();
    house.network("un2");
    house.endpoint("un2", "evil", &[], &["172.30.2.2"]);
    let evil = house.serve("evil");
    first.mood(Mood::SilentAbout("slow"));
    for number in 0..6 {
        let took = time(&evil, &format!("{number}.slow.example"));
        assert!(took >= UNWAITED, "the second server has answered after {took:?}");
        time(&asker, &format!("{number}.corp.example"));
    }
    assert_eq!(first.names().iter().filter(|name| name.contains("corp")).count(), 6);
    assert_eq!(second.names().iter().filter(|name| name.contains("corp")).count(), 0);
    assert!(house.page().contains("tidegate_dns_upstream_trusted{server=\"127.0.0.1:53\"} 1"));
}

/// Neither how soon an answer comes nor how old it is tells what others have asked.
#[test]
fn what_one_network_has_asked_does_not_show_in_answers_to_another() {
    let (house, first, _second, asker) = scene();
    house.network("un2");
    house.endpoint("un2", "other", &[], &["172.30.2.2"]);
    house.endpoint("un1", "neighbour", &[], &["172.30.1.3"]);
    house.endpoint("un1", "both", &[], &["172.30.1.4"]);
    house.endpoint("un2", "both", &[], &["172.30.2.4"]);
    let [other, neighbour, both] = ["other", "neighbour", "both"].map(|name| house.serve(name));
    time(&asker, "secret.example");
    std::thread::sleep(Duration::from_millis(1_100));
    for (who, ttl, asked) in [(&other, 60, 1), (&both, 60, 1), (&neighbour, 59, 0)] {
        first.seen();
        let answer = who.ask("secret.example", RecordType::A);
        assert!(answer.answers[0].ttl <= ttl && (answer.answers[0].ttl == 60) == (ttl == 60));
        assert_eq!(first.names().len(), asked);
    }
    // In flight: equal questions of different networks are two.
    first.seen();
    first.mood(Mood::Slow(Duration::from_millis(100)));
    std::thread::scope(|scope| {
        for who in [&asker, &other] {
            scope.spawn(move || time(who, "flight.example"));
        }
    });
    assert_eq!(first.names(), ["flight.example."; 2]);
}

#[test]
fn one_network_cannot_use_up_the_questions_of_all() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let house = House::with(host, "nameserver 127.0.0.53\n", |settings| {
        settings.in_flight = 30;
        settings.source_ports = 10;
    });
    house.network("un1");
    house.network("un2");
    for (network, container, address) in [
        ("un1", "greedy", "172.30.1.2"),
        ("un1", "too", "172.30.1.3"),
        ("un2", "modest", "172.30.2.2"),
    ] {
        house.endpoint(network, container, &[], &[address]);
    }
    let [greedy, too, modest] = ["greedy", "too", "modest"].map(|name| house.serve(name));
    upstream.mood(Mood::SilentAbout("greedy"));
    for flooder in [&greedy, &too] {
        let socket = flooder.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        for number in 0..100 {
            let name = format!("{number}.greedy.example");
            let question = question(number, &name, RecordType::A).to_vec().unwrap();
            socket.send_to(&question, "127.0.0.11:53").unwrap();
        }
        // Those beyond the limit wait for their turn, and are told that it has not come.
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
fn one_container_leaves_places_to_the_others() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let house =
        House::with(host, "nameserver 127.0.0.53\n", |settings| settings.waiting_of_one = 10);
    house.network("un1");
    house.endpoint("un1", "greedy", &[], &["172.30.1.2"]);
    house.endpoint("un1", "modest", &[], &["172.30.1.3"]);
    let (greedy, modest) = (house.serve("greedy"), house.serve("modest"));
    upstream.mood(Mood::Silent);
    let socket = greedy.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..30 {
        let question =
            question(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
    }
    // For each beyond the limit, its own oldest one is told at once.
    let start = Instant::now();
    for _ in 0..20 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        assert!(answer.metadata.id < 20, "{}", answer.metadata.id);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(house.page().contains("tidegate_dns_endpoint_waiting_max 10\n"), "{}", house.page());
    upstream.mood(Mood::Good);
    time(&modest, "modest.example");
}

/// CVE-2024-29018: an internal network's names went out.
#[test]
fn nothing_leaves_an_internal_network() {
    let (house, first, second, open) = scene();
    house.internal_network("shut");
    house.endpoint("shut", "safe", &[], &["172.30.2.2"]);
    let asker = house.serve_with(
        "safe",
        &ServeOptions { servers: vec![at("127.0.0.1:53")], ..ServeOptions::default() },
    );
    assert_eq!(asker.told("safe", RecordType::A), "172.30.2.2");
    for (name, kind) in [
        ("example.com", RecordType::A),
        ("secret.attacker.example", RecordType::TXT),
        ("org", RecordType::NS),
        ("8.8.8.8.in-addr.arpa", RecordType::PTR),
    ] {
        let answer = asker.ask_message(&with_edns(question(1, name, kind), 1232));
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{name}");
        assert!(answer.edns.unwrap().option(15.into()).is_some(), "RFC 8914: it says why");
    }
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((first.names(), second.names()), (NONE.to_vec(), NONE.to_vec()));
    // What an open neighbour has asked is not told either.
    time(&open, "known.example");
    assert_eq!(asker.told("known.example", RecordType::A), "Refused");
    house.endpoint("un1", "safe", &[], &["172.30.1.9"]);
    assert_eq!(
        asker.told("example.com", RecordType::A),
        "192.0.2.1",
        "once it is on an open one too"
    );
}

#[test]
fn containers_networks_and_the_host_have_servers_in_that_order() {
    let (house, hosts, _second, asker) = scene();
    let networks = Upstream::start(&house.host, "127.0.0.3:53");
    let containers = Upstream::start(&house.host, "127.0.0.4:53");
    let spec = NetworkSpec {
        name: "own".into(),
        servers: vec![at("127.0.0.3:53")],
        ..NetworkSpec::default()
    };
    house.network_with(&spec);
    house.endpoint("own", "a", &[], &["172.30.3.2"]);
    house.endpoint("own", "b", &[], &["172.30.3.3"]);
    let a = house.serve("a");
    let b = house.serve_with(
        "b",
        &ServeOptions { servers: vec![at("127.0.0.4:53")], ..ServeOptions::default() },
    );
    for asker in [&asker, &a, &b] {
        time(asker, "one.example");
    }
    // What one list of servers says is not what another would: all three have been asked.
    for upstream in [&hosts, &networks, &containers] {
        assert_eq!(upstream.names(), ["one.example."]);
    }
}

/// As for an ordinary user, whose networks are not the host's.
#[test]
fn a_server_on_a_network_is_asked_from_where_networks_are() {
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
    let house = House::with(host, "nameserver 127.0.0.53\n", |settings| {
        settings.networks = crate::support::handle(&networks);
    });
    let subnets = vec!["172.30.1.0/24".parse().unwrap()];
    house.network_with(&NetworkSpec { name: "un1".into(), subnets, ..NetworkSpec::default() });
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let options = ServeOptions { servers: vec![at("172.30.1.53:53")], ..ServeOptions::default() };
    let asker = house.serve_with("web", &options);
    time(&asker, "one.example");
    assert_eq!(asker.ask("many.example", RecordType::A).answers.len(), 0, "cut short, for us");
    assert_eq!((inside.seen().len(), outside.names()), (3, NONE.to_vec()), "the third over TCP");
}

/// What a container forges reaches the source port of a question by the bridge of its network: the
/// kernel sees the server's address and port in it.
#[test]
fn an_answer_that_comes_in_by_a_bridge_is_dropped_unless_its_server_is_there() {
    let net = Topology::three();
    let upstream = Upstream::start(&net.client, "203.0.113.9:53");
    let house = House::new(net.host.clone(), "nameserver 203.0.113.9\n");
    let subnets = vec!["172.30.0.0/24".parse().unwrap()];
    house.network_with(&NetworkSpec { name: "un1".into(), subnets, ..NetworkSpec::default() });
    house.endpoint("un1", "web", &[], &["172.30.0.2"]);
    let index = net.host.run(|| {
        let any = UdpSocket::bind("127.0.0.1:0").unwrap();
        rustix::net::netdevice::name_to_index(&any, "br0").unwrap()
    });
    house.resolver.set_bridges([index]);
    let asker = house.serve("web");
    // Reverse path filtering of the host would drop a forged source before it comes to us.
    for name in ["all", "br0"] {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/rp_filter");
        net.host.run(|| fs::write(&path, "0")).unwrap();
    }
    upstream.mood(Mood::Silent);
    let forged = |name: &str, ends: &std::sync::atomic::AtomicBool| {
        // The container has the server's address and knows port, ID and case.
        let forger = net.container.run(|| UdpSocket::bind("203.0.113.9:53").unwrap());
        let start = Instant::now();
        while !ends.load(std::sync::atomic::Ordering::Relaxed) && start.elapsed() < 2 * SOON {
            for seen in upstream.seen().iter().filter(|seen| seen.name.starts_with(name)) {
                let mut lie = question(seen.id, &seen.cased, RecordType::A);
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
            let told = asker.told(&format!("{name}.example"), RecordType::A);
            ends.store(true, std::sync::atomic::Ordering::Relaxed);
            told
        })
    };
    assert_eq!(ask_while_forged("bridge"), "ServFail", "nobody else has answered");
    // It is that which dropped it, and nothing before.
    house.resolver.set_bridges([]);
    assert_eq!(ask_while_forged("anywhere"), "NXDomain");
    // A server that is a container answers by the bridge.
    house.resolver.set_bridges([index]);
    let _inside = Upstream::start(&net.container, "172.30.0.2:53");
    let options = ServeOptions { servers: vec![at("172.30.0.2:53")], ..ServeOptions::default() };
    time(&house.serve_with("web", &options), "inside.example");
}

#[test]
fn ourselves_are_not_asked() {
    let (house, ..) = scene();
    let _guard = house.runtime.enter();
    house.host.ip_all(
        "link add br0 type bridge
         addr add 172.30.1.1/24 dev br0
         link set br0 up",
    );
    let host = crate::support::handle(&house.host);
    let _serving =
        house.resolver.serve_gateway(&host, "un1", [172, 30, 1, 1].into(), "br0").unwrap();
    let spec = NetworkSpec {
        name: "own".into(),
        servers: vec![at("172.30.1.1:53")],
        ..NetworkSpec::default()
    };
    let error = house.resolver.add_network(&spec).unwrap_err();
    assert_eq!(error.to_string(), "network \"own\": DNS server 172.30.1.1:53 is tidegate itself");
    let asker = house.serve("web");
    fs::write(house.resolv_conf(), "nameserver 172.30.1.1\n").unwrap();
    let mut number = 0;
    let mut refused = || {
        number += 1;
        asker.ask(&format!("{number}.example"), RecordType::A)
    };
    let start = Instant::now();
    assert!(eventually(SOON, || refused().metadata.response_code == ResponseCode::ServFail));
    assert!(start.elapsed() < Duration::from_secs(2), "at once, and not when a loop is at its end");
}

#[test]
fn changes_of_the_hosts_servers_are_followed() {
    let (house, first, second, asker) = scene();
    time(&asker, "0.example");
    let mut number = 0;
    let mut goes_to = |upstream: &Upstream| {
        upstream.seen();
        eventually(SOON, || {
            number += 1;
            time(&asker, &format!("{number}.changed.example"));
            !upstream.names().is_empty()
        })
    };
    // Written over.
    fs::write(house.resolv_conf(), "nameserver 127.0.0.2\n").unwrap();
    assert!(goes_to(&second));
    // Replaced by renaming.
    let other = house.directory.path().join("other");
    fs::write(&other, "nameserver 127.0.0.1\n").unwrap();
    fs::rename(&other, house.resolv_conf()).unwrap();
    assert!(goes_to(&first));
    // A link that is replaced, to a file in another directory, which is then written over.
    let run = house.directory.path().join("run");
    fs::create_dir(&run).unwrap();
    fs::write(run.join("stub"), "nameserver 127.0.0.2\n").unwrap();
    std::os::unix::fs::symlink("run/stub", &other).unwrap();
    fs::rename(&other, house.resolv_conf()).unwrap();
    assert!(goes_to(&second));
    fs::write(run.join("stub"), "nameserver 127.0.0.1\n").unwrap();
    assert!(goes_to(&first));
    // What was known of the other ones is forgotten.
    second.seen();
    fs::write(run.join("stub"), "nameserver 127.0.0.2\n").unwrap();
    assert!(goes_to(&second));
    time(&asker, "0.example");
    assert!(second.names().contains(&"0.example.".to_owned()));
}
