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
use tidegate_testbed::{Namespace, eventually};

const NONE: [String; 0] = [];
/// Less than any server is waited for before another one is asked.
const UNWAITED: Duration = Duration::from_millis(190);

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
    assert!(!page.contains("tidegate_dns_upstream_timeouts_total{server=\"127.0.0.1:53\"} 0"), "{page}");
    assert!(page.contains("tidegate_dns_upstream_seconds_count{server=\"127.0.0.2:53\"} 100"), "{page}");
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
        time(&asker, &format!("{number}.example"));
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
fn ports_and_numbers_cannot_be_foreseen() {
    let (_house, first, _second, asker) = scene();
    for number in 0..200 {
        time(&asker, &format!("{number}.example"));
    }
    let seen = first.seen();
    let ports: BTreeSet<_> = seen.iter().map(|seen| seen.from.port()).collect();
    let ids: BTreeSet<_> = seen.iter().map(|seen| seen.id).collect();
    assert!(ports.len() >= 6, "{} ports", ports.len());
    assert!(ids.len() >= 190, "{} numbers", ids.len());
    let steps = seen.windows(2).filter(|two| two[1].id.wrapping_sub(two[0].id) < 100).count();
    assert!(steps < 20, "{steps} small steps");
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
        let question = question(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
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
        let question = question(number as u16, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        sockets[number % sockets.len()].send_to(&question, "127.0.0.11:53").unwrap();
    }
    let mut answers = [0; 2];
    let mut seen = BTreeSet::new();
    for _ in 0..COUNT / sockets.len() {
        for socket in &sockets {
            let mut buffer = [0; 512];
            let Ok(length) = socket.recv(&mut buffer) else { panic!("{} of {COUNT} answered", seen.len()) };
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
fn too_many_questions_are_told_so_and_local_names_go_on() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let house = House::with(host, "nameserver 127.0.0.53\n", |settings| settings.in_flight = 10);
    house.network("un1");
    house.endpoint("un1", "web", &[], &["172.30.1.2"]);
    let asker = house.serve("web");
    upstream.mood(Mood::Silent);
    let socket = asker.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    let start = Instant::now();
    for number in 0..15 {
        let question = question(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
    }
    for _ in 0..5 {
        let mut buffer = [0; 512];
        let length = socket.recv(&mut buffer).unwrap();
        let answer = Message::from_vec(&buffer[..length]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
    assert_eq!(asker.told("web", RecordType::A), "172.30.1.2");
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[test]
fn one_container_leaves_places_to_the_others() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let house = House::with(host, "nameserver 127.0.0.53\n", |settings| settings.waiting_of_one = 10);
    house.network("un1");
    house.endpoint("un1", "greedy", &[], &["172.30.1.2"]);
    house.endpoint("un1", "modest", &[], &["172.30.1.3"]);
    let (greedy, modest) = (house.serve("greedy"), house.serve("modest"));
    upstream.mood(Mood::Silent);
    let socket = greedy.namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.set_read_timeout(Some(SOON)).unwrap();
    for number in 0..30 {
        let question = question(number, &format!("{number}.example"), RecordType::A).to_vec().unwrap();
        socket.send_to(&question, "127.0.0.11:53").unwrap();
    }
    // What is too much is told at once.
    for _ in 0..20 {
        socket.recv(&mut [0; 512]).unwrap();
    }
    upstream.mood(Mood::Good);
    time(&modest, "modest.example");
    assert_eq!(upstream.names().len(), 11);
}

/// CVE-2024-29018: an internal network's names went out.
#[test]
fn nothing_leaves_an_internal_network() {
    let (house, first, second, open) = scene();
    house.internal_network("shut");
    house.endpoint("shut", "safe", &[], &["172.30.2.2"]);
    let asker = house
        .serve_with("safe", &ServeOptions { servers: vec![at("127.0.0.1:53")], ..ServeOptions::default() });
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
    assert_eq!(asker.told("example.com", RecordType::A), "192.0.2.1", "once it is on an open one too");
}

#[test]
fn containers_networks_and_the_host_have_servers_in_that_order() {
    let (house, hosts, _second, asker) = scene();
    let networks = Upstream::start(&house.host, "127.0.0.3:53");
    let containers = Upstream::start(&house.host, "127.0.0.4:53");
    let spec =
        NetworkSpec { name: "own".into(), servers: vec![at("127.0.0.3:53")], ..NetworkSpec::default() };
    house.network_with(&spec);
    house.endpoint("own", "a", &[], &["172.30.3.2"]);
    house.endpoint("own", "b", &[], &["172.30.3.3"]);
    let a = house.serve("a");
    let b =
        house.serve_with("b", &ServeOptions { servers: vec![at("127.0.0.4:53")], ..ServeOptions::default() });
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
    let _serving = house.resolver.serve_gateway(&host, "un1", [172, 30, 1, 1].into(), "br0").unwrap();
    let spec =
        NetworkSpec { name: "own".into(), servers: vec![at("172.30.1.1:53")], ..NetworkSpec::default() };
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
