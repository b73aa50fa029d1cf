//! Tables in the kernel, compared with nft(8).

use serde_json::Value as Json;
use std::fs;
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Element, Error, Field, Hook, Key, Kind, Match, Rule,
    Set, Table, Transport, Value,
};
use tidegate_netns::ChangeListener;
use tidegate_testbed::{Namespace, eventually};

fn interface(name: &str) -> Value {
    Value::Interface(name.to_owned())
}

fn net(text: &str) -> Value {
    Value::Net(text.parse().unwrap())
}

fn ip(text: &str) -> Value {
    Value::Net(text.parse::<std::net::IpAddr>().unwrap().into())
}

fn element<const N: usize>(key: [Value; N]) -> Element {
    Element { key: key.into(), data: Vec::new() }
}

fn set<const N: usize>(name: &str, key: [Field; N], elements: Vec<Element>) -> Set {
    Set {
        name: name.to_owned(),
        key: key.to_vec(),
        data: Vec::new(),
        intervals: false,
        constant: false,
        elements,
    }
}

fn rule(matches: Vec<Match>, actions: Vec<Action>) -> Rule {
    Rule { matches, actions, comment: "because".to_owned() }
}

fn is_in<const N: usize>(keys: [Key; N], set: &str, not: bool) -> Match {
    Match::In { keys: keys.to_vec(), set: set.to_owned(), not }
}

fn base(name: &str, kind: Kind, hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), base: Some(Base { kind, hook, priority }), rules }
}

/// A map from a protocol and a port to an address and a port.
fn ports(count: u16) -> Set {
    let to = |port| Element {
        key: vec![Value::Protocol(Transport::Tcp), Value::Port(port)],
        data: vec![ip("10.9.0.2"), Value::Port(80)],
    };
    Set {
        data: vec![Field::Ipv4, Field::Port],
        ..set("ports", [Field::Protocol, Field::Port], (1..=count).map(to).collect())
    }
}

/// A table with every language element.
fn everything() -> Table {
    let own = |bridge: &str, subnet: &str| element([interface(bridge), net(subnet)]);
    let mut ports6 = ports(1);
    ports6.name = "ports6".to_owned();
    ports6.data[0] = Field::Ipv6;
    ports6.elements[0].data[0] = ip("fd09::2");
    let sets = vec![
        Set {
            constant: true,
            ..set(
                "bridges",
                [Field::Interface],
                vec![element([interface("tg-a")]), element([interface("tg-b")])],
            )
        },
        set("empty", [Field::Protocol], vec![]),
        set("same", [Field::Interface; 2], vec![element([interface("tg-a"), interface("tg-a")])]),
        Set {
            intervals: true,
            ..set(
                "subnets4",
                [Field::Ipv4],
                vec![
                    element([net("10.9.1.0/24")]),
                    element([net("10.9.2.0/24")]),
                    element([net("10.77.0.0/16")]),
                ],
            )
        },
        Set {
            intervals: true,
            constant: true,
            ..set("subnets6", [Field::Ipv6], vec![element([net("fd09::/64")])])
        },
        Set {
            intervals: true,
            ..set(
                "own4",
                [Field::Interface, Field::Ipv4],
                vec![own("tg-a", "10.9.1.0/24"), own("tg-b", "10.9.2.0/24")],
            )
        },
        Set {
            intervals: true,
            ..set("own6", [Field::Interface, Field::Ipv6], vec![own("tg-a", "fd09::/64")])
        },
        set(
            "at",
            [Field::Ipv4, Field::Protocol, Field::Port],
            vec![element([ip("127.0.0.1"), Value::Protocol(Transport::Udp), Value::Port(53)])],
        ),
        ports(3),
        ports6,
    ];
    let is = |key, value, not| Match::Is { key, value, not };
    let both = [Key::Protocol, Key::DestinationPort];
    let inner = vec![
        rule(vec![Match::Invalid], vec![Action::Count, Action::Drop]),
        rule(
            vec![is_in([Key::InInterface, Key::OutInterface], "same", false)],
            vec![Action::Accept],
        ),
        rule(vec![Match::Established], vec![Action::Accept]),
        rule(vec![Match::Known], vec![Action::Accept]),
        rule(vec![Match::TranslatedDestination], vec![Action::Return]),
        rule(vec![is_in([Key::SourceV6], "subnets6", true)], vec![Action::Drop]),
        rule(vec![is_in([Key::OriginalSourceV4], "subnets4", false)], vec![Action::Drop]),
        rule(vec![is_in([Key::ReplySourceV6], "subnets6", false)], vec![Action::Drop]),
        rule(vec![is(Key::ReplySourceV4, net("10.9.1.0/24"), false)], vec![Action::Drop]),
        rule(vec![is(Key::OriginalSourceV6, net("fd09::/64"), false)], vec![Action::Drop]),
        rule(
            vec![Match::Reply, is(Key::OriginalDestinationV4, ip("203.0.113.1"), false)],
            vec![Action::Accept],
        ),
        rule(
            vec![is(Key::OriginalDestinationV6, net("2001:db8::/32"), false)],
            vec![Action::Accept],
        ),
        rule(vec![Match::NotToHost, Match::NotIcmpv6], vec![Action::Drop]),
        rule(vec![], vec![Action::Drop]),
    ];
    let outer = vec![
        rule(vec![is(Key::InInterface, interface("lo"), false)], vec![Action::Accept]),
        rule(vec![is(Key::InGroup, Value::Group(0x4012_3456), false)], vec![Action::Accept]),
        rule(vec![is(Key::OutGroup, Value::Group(7), true)], vec![Action::Return]),
        rule(
            vec![
                is_in([Key::DestinationV4], "subnets4", false),
                is_in([Key::InInterface, Key::DestinationV4], "own4", true),
            ],
            vec![Action::Drop],
        ),
        rule(vec![is_in([Key::InInterface, Key::SourceV6], "own6", false)], vec![Action::Accept]),
        rule(
            vec![is_in([Key::DestinationV4, Key::Protocol, Key::DestinationPort], "at", false)],
            vec![Action::Drop],
        ),
        rule(
            vec![is(Key::DestinationV4, net("127.0.0.0/8"), true)],
            vec![Action::Jump("inner".to_owned())],
        ),
        rule(vec![is(Key::SourceV4, ip("10.9.1.1"), false)], vec![Action::Accept]),
        rule(vec![is(Key::DestinationV6, ip("::1"), true)], vec![Action::Accept]),
        rule(
            vec![is(Key::OutInterface, interface("lo"), true)],
            vec![Action::Mark { value: 0x7467_0000, mask: 0xffff_0000 }],
        ),
    ];
    let translate =
        |map: &str, v6| vec![Action::Translate { keys: both.to_vec(), map: map.to_owned(), v6 }];
    let nat = vec![
        rule(
            vec![is(Key::DestinationV4, net("127.0.0.0/8"), true), Match::ToHost],
            translate("ports", false),
        ),
        rule(
            vec![is(Key::DestinationV6, ip("::1"), true), Match::ToHost],
            translate("ports6", true),
        ),
    ];
    let own = vec![rule(
        vec![
            is(Key::DestinationV4, ip("127.0.0.11"), false),
            is(Key::DestinationPort, Value::Port(53), false),
        ],
        translate("ports", false),
    )];
    let set_port = |protocol, key, source, port| {
        let matches = vec![
            is(Key::Protocol, Value::Protocol(protocol), false),
            is(key, Value::Port(53), false),
        ];
        rule(matches, vec![Action::SetPort { protocol, source, port }])
    };
    let rewrite = vec![
        set_port(Transport::Udp, Key::DestinationPort, false, 4053),
        set_port(Transport::Tcp, Key::SourcePort, true, 4054),
    ];
    let leave = vec![rule(
        vec![
            is_in([Key::OutInterface], "bridges", true),
            is_in([Key::SourceV4], "subnets4", false),
        ],
        vec![Action::Masquerade],
    )];
    let from_ports = |protocol, first, last| {
        rule(vec![is(Key::Protocol, protocol, false)], vec![Action::MasqueradeTo { first, last }])
    };
    let leave = [
        leave,
        vec![
            from_ports(Value::Protocol(Transport::Tcp), 32_768, 60_999),
            from_ports(Value::OtherProtocol(132), 40_000, 40_000),
            from_ports(Value::OtherProtocol(33), 1, 2),
            from_ports(Value::OtherProtocol(136), 1, 2),
        ],
    ]
    .concat();
    let chains = vec![
        Chain { name: "inner".to_owned(), base: None, rules: inner },
        base("raw", Kind::Filter, Hook::Prerouting, -300, outer),
        base("input", Kind::Filter, Hook::Input, -10, vec![]),
        base(
            "forward",
            Kind::Filter,
            Hook::Forward,
            0,
            vec![rule(vec![Match::Syn], vec![Action::ClampSegments])],
        ),
        base("translate", Kind::Nat, Hook::Prerouting, -100, nat),
        base("own", Kind::Nat, Hook::Output, -100, own),
        base("rewrite", Kind::Filter, Hook::Output, -150, rewrite),
        base("leave", Kind::Nat, Hook::Postrouting, 100, leave),
        base(
            "last",
            Kind::Filter,
            Hook::Postrouting,
            i32::MAX,
            vec![
                rule(vec![Match::FromHost], vec![Action::Accept]),
                rule(vec![Match::Syn], vec![Action::ClampSegments]),
            ],
        ),
    ];
    Table { name: "everything".to_owned(), sets, chains }
}

fn connect(namespace: &Namespace) -> Connection {
    namespace.run(Connection::open).unwrap()
}

fn replace(table: &Table, owned: bool) -> [Change; 1] {
    [Change::Replace { table: table.clone(), owned }]
}

/// Ruleset as listed by nft(8), without fields that vary between runs.
fn listed(namespace: &Namespace) -> Json {
    let mut all: Json =
        serde_json::from_str(&namespace.exec("nft", &["-j", "-s", "list", "ruleset"])).unwrap();
    tidy(&mut all);
    all
}

fn tidy(json: &mut Json) {
    match json {
        Json::Object(map) => {
            map.retain(|key, _| !["handle", "metainfo", "flags"].contains(&key.as_str()));
            map.values_mut().for_each(tidy);
            if let Some(Json::Array(elements)) = map.get_mut("elem") {
                elements.sort_by_key(Json::to_string);
            }
        }
        Json::Array(list) => list.iter_mut().for_each(tidy),
        _ => {}
    }
}

#[test]
fn committed_table_equals_text_loaded_by_nft() {
    let (ours, theirs) = (Namespace::new(), Namespace::new());
    let table = everything();
    connect(&ours).commit(&replace(&table, false)).unwrap();
    let directory = std::env::temp_dir().join(format!("tidegate-nft-{}", std::process::id()));
    fs::write(&directory, table.to_string()).unwrap();
    theirs.exec("nft", &["-f", directory.to_str().unwrap()]);
    fs::remove_file(directory).unwrap();
    let (ours, theirs) = (listed(&ours), listed(&theirs));
    let lines = |json: &Json| {
        json["nftables"].as_array().unwrap().iter().map(Json::to_string).collect::<Vec<_>>()
    };
    assert_eq!(lines(&ours), lines(&theirs));
    assert!(lines(&ours).len() > 30);
}

#[test]
fn nft_listing_can_be_loaded_again() {
    let (ours, theirs) = (Namespace::new(), Namespace::new());
    connect(&ours).commit(&replace(&everything(), false)).unwrap();
    let text = ours.exec("nft", &["-s", "list", "ruleset"]);
    let file = std::env::temp_dir().join(format!("tidegate-nft-list-{}", std::process::id()));
    fs::write(&file, text).unwrap();
    theirs.exec("nft", &["-f", file.to_str().unwrap()]);
    fs::remove_file(file).unwrap();
    assert_eq!(listed(&ours), listed(&theirs));
}

#[test]
fn owned_table_cannot_be_changed_by_other_processes() {
    let namespace = Namespace::new();
    let mut owner = connect(&namespace);
    assert!(owner.can_own().unwrap());
    assert_eq!(owner.tables().unwrap(), [], "the probe leaves nothing behind");
    owner.commit(&replace(&everything(), true)).unwrap();
    let before = listed(&namespace);
    namespace.exec("nft", &["flush", "ruleset"]);
    for change in [
        "delete table inet everything",
        "flush chain inet everything raw",
        "add rule inet everything raw accept",
    ] {
        let refused = namespace.command("nft").args(change.split(' ')).output().unwrap();
        assert!(!refused.status.success(), "{change}");
    }
    assert_eq!(listed(&namespace), before);
    assert!(owner.owns("everything").unwrap());

    let mut other = connect(&namespace);
    let refused = other.commit(&replace(&everything(), true)).unwrap_err();
    assert!(matches!(&refused, Error::Owned(name) if name == "everything"), "{refused}");
    assert!(!other.owns("everything").unwrap());
}

#[test]
fn owned_table_persists_and_can_be_replaced_by_the_next_owner() {
    let namespace = Namespace::new();
    let mut first = connect(&namespace);
    first.commit(&replace(&everything(), true)).unwrap();
    let before = listed(&namespace);
    drop(first);
    assert_eq!(listed(&namespace), before);
    let mut next = connect(&namespace);
    assert!(!next.owns("everything").unwrap());
    assert!(next.tables().unwrap()[0].persists);
    next.commit(&replace(&everything(), true)).unwrap();
    assert!(next.owns("everything").unwrap());
    namespace.exec("nft", &["flush", "ruleset"]);
    assert_eq!(listed(&namespace), before);
    next.commit(&[Change::Remove { table: "everything".to_owned() }]).unwrap();
    assert_eq!(next.tables().unwrap(), []);
    next.commit(&[Change::Remove { table: "everything".to_owned() }]).unwrap();
}

#[test]
fn commit_is_atomic_and_the_error_names_the_rejected_object() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    connection.commit(&replace(&everything(), true)).unwrap();
    let before = listed(&namespace);
    let mut broken = everything();
    broken.chains[1].rules[3].matches = vec![is_in([Key::InInterface], "nowhere", false)];
    let error = connection.commit(&replace(&broken, true)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "rule \"because\" in chain raw of table everything: No such file or directory (os error 2)"
    );
    assert_eq!(listed(&namespace), before);
    assert!(connection.owns("everything").unwrap());
}

#[test]
fn every_change_alters_the_fingerprint() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    let fingerprint =
        |connection: &mut Connection| connection.fingerprint("everything", |_| true).unwrap();
    assert_eq!(fingerprint(&mut connection), None);
    for change in [
        "add rule inet everything raw accept",
        "insert rule inet everything raw accept",
        "flush chain inet everything inner",
        "add element inet everything empty { tcp }",
        "delete element inet everything own4 { tg-a . 10.9.1.0/24 }",
        "delete element inet everything ports { tcp . 2 }",
        "add chain inet everything more",
        "add chain inet everything raw { policy drop; }",
        "add table inet everything { flags dormant; }",
        "delete table inet everything",
    ] {
        connection.commit(&replace(&everything(), false)).unwrap();
        let before = fingerprint(&mut connection);
        assert_eq!(fingerprint(&mut connection), before);
        namespace.exec("nft", &[change]);
        assert_ne!(fingerprint(&mut connection), before, "{change}");
    }
}

#[test]
fn changes_to_a_table_are_detected_by_its_identity() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    for change in [
        "add rule inet everything raw accept",
        "insert rule inet everything raw accept",
        "flush chain inet everything inner",
        "add chain inet everything more",
        "add set inet everything more { type inet_service; }",
        "add chain inet everything raw { policy drop; }",
        "add table inet everything { flags dormant; }",
        "delete table inet everything",
    ] {
        let identity = connection.replace(everything()).unwrap();
        assert!(connection.is_intact(&identity).unwrap());
        namespace.exec("nft", &["add table inet elsewhere"]);
        assert!(connection.is_intact(&identity).unwrap());
        namespace.exec("nft", &[change]);
        assert!(!connection.is_intact(&identity).unwrap(), "{change}");
    }
}

/// Names, flags and counts are the same as before the replacement.
#[test]
fn replacing_a_table_or_rule_changes_the_identity() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    let identity = connection.replace(everything()).unwrap();
    let replaced = connection.replace(everything()).unwrap();
    assert_ne!(identity, replaced);
    assert!(!connection.is_intact(&identity).unwrap());
    let fingerprint =
        |connection: &mut Connection| connection.fingerprint("everything", |_| true).unwrap();
    let before = fingerprint(&mut connection);
    let listed = namespace.exec("nft", &["-a", "list", "chain", "inet", "everything", "raw"]);
    let rule = listed.lines().find(|line| line.contains("comment")).unwrap();
    let handle = rule.rsplit(' ').next().unwrap();
    let replace = ["replace", "rule", "inet", "everything", "raw", "handle", handle, "accept"];
    namespace.exec("nft", &replace);
    assert!(!connection.is_intact(&replaced).unwrap());
    assert_ne!(fingerprint(&mut connection), before);
}

#[test]
fn identity_check_does_not_depend_on_the_number_of_foreign_chains() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    let identity = connection.replace(everything()).unwrap();
    let chains = (0..50_000).map(|at| format!("add chain inet many c{at}\n"));
    let file = std::env::temp_dir().join(format!("tidegate-nft-many-{}", std::process::id()));
    fs::write(&file, format!("add table inet many\n{}", chains.collect::<String>())).unwrap();
    namespace.exec("nft", &["-f", file.to_str().unwrap()]);
    fs::remove_file(file).unwrap();
    let begin = Instant::now();
    connection.fingerprint("everything", |_| true).unwrap();
    let dumped = begin.elapsed();
    let begin = Instant::now();
    assert!(connection.is_intact(&identity).unwrap());
    let requested = begin.elapsed();
    println!("with 50,000 foreign chains: {dumped:?} by dump, {requested:?} by name");
    assert!(requested < dumped / 2, "{requested:?}");
}

#[test]
fn part_is_replaced_and_removed_without_affecting_foreign_chains() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    let part = |owner: &str| {
        let bridges = format!("bridges-{owner}");
        let jump = rule(
            vec![is_in([Key::InInterface], &bridges, false)],
            vec![Action::Jump("USER".to_owned())],
        );
        let chain = base(&format!("forward-{owner}"), Kind::Filter, Hook::Forward, -10, vec![jump]);
        let sets = vec![set(&bridges, [Field::Interface], vec![element([interface("tg-a")])])];
        Table { name: "shared".to_owned(), sets, chains: vec![chain] }
    };
    let put = |owner: &str| Change::ReplacePart { part: part(owner), kept: "USER".to_owned() };
    let take = |owner: &str| Change::RemovePart {
        table: "shared".to_owned(),
        names: [format!("bridges-{owner}"), format!("forward-{owner}")].into(),
        kept: "USER".to_owned(),
    };
    connection.commit(&[put("one"), put("two")].map(|change| change)[..1]).unwrap();
    connection.commit(&[put("two")]).unwrap();
    namespace.exec("nft", &["add rule inet shared USER ip saddr 192.0.2.1 drop"]);
    let both = listed(&namespace);
    connection.commit(&[put("one")]).unwrap();
    connection.commit(&[put("two")]).unwrap();
    assert_eq!(listed(&namespace), both, "rules in the chain are kept");
    connection.commit(&[take("one")]).unwrap();
    let left = namespace.exec("nft", &["list", "table", "inet", "shared"]);
    assert!(
        left.contains("192.0.2.1") && left.contains("forward-two") && !left.contains("one"),
        "{left}"
    );
    connection.commit(&[take("two")]).unwrap();
    let left = namespace.exec("nft", &["list", "table", "inet", "shared"]);
    assert!(left.contains("192.0.2.1") && !left.contains("forward"), "{left}");
    namespace.exec("nft", &["flush chain inet shared USER"]);
    connection.commit(&[put("one")]).unwrap();
    connection.commit(&[take("one")]).unwrap();
    assert_eq!(connection.tables().unwrap(), [], "the table is deleted with its last part");
}

#[test]
fn one_of_ten_thousand_ports_is_changed_by_element() {
    let namespace = Namespace::new();
    let mut connection = connect(&namespace);
    let table = Table { name: "many".to_owned(), sets: vec![ports(10_000)], chains: vec![] };
    let begin = Instant::now();
    connection.commit(&replace(&table, true)).unwrap();
    let replaced = begin.elapsed();
    let mut more = ports(10_001);
    more.elements.drain(..10_000);
    let mut less = ports(1);
    less.elements.truncate(1);
    let begin = Instant::now();
    connection
        .commit(&[Change::Elements { table: "many".to_owned(), added: more, removed: less }])
        .unwrap();
    println!("10,000 ports in {replaced:?}, one more and one less in {:?}", begin.elapsed());
    let listed = namespace.exec("nft", &["list", "map", "inet", "many", "ports"]);
    assert_eq!(listed.matches("tcp . ").count(), 10_000);
    assert!(listed.contains("tcp . 10001 :") && !listed.contains("tcp . 1 :"));
}

#[test]
fn generation_changes_with_foreign_transactions() {
    let namespace = Namespace::new();
    let changes = namespace.run(ChangeListener::of_rules).unwrap();
    assert!(!changes.drain());
    namespace.exec("nft", &["add table ip other"]);
    assert!(changes.drain());
    assert!(!changes.drain());
    namespace.exec("iptables-nft", &["-A", "FORWARD", "-j", "ACCEPT"]);
    assert!(changes.drain());
}

/// Functional test of a DNAT map, and of a set keyed by link and source network.
#[test]
fn packets_follow_the_nat_map_and_the_drop_rule() {
    let (host, outside) = (Namespace::new(), Namespace::new());
    host.ip_all(&format!(
        "link add eth0 type veth peer name eth0 netns {}
         addr add 192.0.2.1/24 dev eth0
         addr add 192.0.2.2/32 dev eth0
         link set eth0 up
         link set lo up",
        outside.path().display()
    ));
    outside.ip_all("addr add 192.0.2.9/24 dev eth0\n link set eth0 up");
    let mut map = ports(1);
    map.elements[0] = Element {
        key: vec![Value::Protocol(Transport::Udp), Value::Port(5000)],
        data: vec![ip("192.0.2.2"), Value::Port(6000)],
    };
    let own = Set {
        intervals: true,
        ..set(
            "own",
            [Field::Interface, Field::Ipv4],
            vec![element([interface("eth0"), net("192.0.2.0/25")])],
        )
    };
    let keys = vec![Key::Protocol, Key::DestinationPort];
    let translate = Action::Translate { keys, map: "ports".to_owned(), v6: false };
    let translate = rule(
        vec![Match::Is { key: Key::DestinationV4, value: net("127.0.0.0/8"), not: true }],
        vec![translate],
    );
    let mut table = Table {
        name: "t".to_owned(),
        sets: vec![map, own],
        chains: vec![
            base("translate", Kind::Nat, Hook::Prerouting, -100, vec![translate]),
            base("raw", Kind::Filter, Hook::Prerouting, -300, vec![]),
        ],
    };
    let server = host.run(|| UdpSocket::bind("192.0.2.2:6000")).unwrap();
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let client = outside.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    // A link that has just come up drops the first packets.
    let reaches =
        || client.send_to(b"!", "192.0.2.2:6000").is_ok() && server.recv(&mut [0; 9]).is_ok();
    assert!(eventually(Duration::from_secs(10), reaches));
    while server.recv(&mut [0; 9]).is_ok() {}
    let mut connection = connect(&host);
    let mut arrives = |table: &Table, patience| {
        connection.commit(&replace(table, true)).unwrap();
        server.set_read_timeout(Some(patience)).unwrap();
        client.send_to(b"?", "192.0.2.1:5000").unwrap();
        server.recv(&mut [0; 9]).is_ok()
    };
    let (long, short) = (Duration::from_secs(10), Duration::from_millis(300));
    assert!(arrives(&table, long));
    let drop = |not| {
        vec![rule(vec![is_in([Key::InInterface, Key::SourceV4], "own", not)], vec![Action::Drop])]
    };
    table.chains[1].rules = drop(true);
    assert!(arrives(&table, long));
    table.chains[1].rules = drop(false);
    assert!(!arrives(&table, short));
}
