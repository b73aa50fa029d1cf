use super::*;
use crate::name::Name;
use crate::zone::tests::{endpoint, network, zones};
use crate::zone::{Asker, NetworkSpec, Zones};

fn example() -> Zones {
    let un1 = NetworkSpec { subnets: vec!["198.18.1.0/24".parse().unwrap()], ..network("un1") };
    let own = NetworkSpec { servers: vec!["192.0.2.53:53".parse().unwrap()], ..network("own") };
    let shut = NetworkSpec {
        internal: true,
        servers: vec!["192.0.2.99:53".parse().unwrap()],
        ..network("shut")
    };
    zones(
        &[un1, own, shut, network("un6")],
        &[
            ("un1", endpoint("web", &["all", "dotted.example"], &["198.18.1.2"])),
            ("un1", endpoint("db", &["all"], &["198.18.1.3"])),
            ("un1", endpoint("third", &["all"], &["198.18.1.4"])),
            ("own", endpoint("alone", &[], &["10.0.1.2"])),
            ("shut", endpoint("safe", &[], &["10.0.2.2"])),
            ("shut", endpoint("mixed", &[], &["10.0.2.3"])),
            ("un1", endpoint("mixed", &[], &["198.18.1.5"])),
            ("un6", endpoint("svc-6", &[], &["fd88::2", "10.88.0.2"])),
        ],
    )
}

/// What becomes of a question, as text.
fn ask(zones: &Zones, asker: &str, name: &str, kind: u16) -> String {
    ask_in_turn(zones, asker, name, kind, 0)
}

fn ask_in_turn(zones: &Zones, asker: &str, name: &str, kind: u16, turn: u32) -> String {
    let asker = Asker::Container(asker.into());
    let view = zones.view(&asker, [0; 4].into());
    let name = Name::parse(name).unwrap();
    let zone = |at: usize| crate::name::Shown(&name.wire()[at..]).to_string();
    match resolve(&view, Policy::default(), name.wire(), kind, turn) {
        Resolution::Answer(answers) => {
            let text = |data: &Data| match data {
                Data::A(ip) => ip.to_string(),
                Data::Aaaa(ip) => ip.to_string(),
                Data::Ptr(name) => crate::name::Shown(name).to_string(),
            };
            answers.iter().map(text).collect::<Vec<_>>().join(" ")
        }
        Resolution::NoData(at) => format!("nothing in {}", zone(at)),
        Resolution::NxDomain(at) => format!("no name in {}", zone(at)),
        Resolution::Refused(why) => format!("refused: {why:?}"),
        Resolution::Forward(list) => match list {
            None => "host".to_owned(),
            Some(list) => format!("{:?}", list.servers),
        },
    }
}

#[test]
fn names_of_neighbours_are_answered_in_all_their_forms() {
    let zones = example();
    for name in ["web", "WEB", "web.un1", "Web.Un1", "dotted.example", "dotted.example.un1"] {
        assert_eq!(ask(&zones, "db", name, kind::A), "198.18.1.2", "{name}");
    }
    assert_eq!(ask(&zones, "svc-6", "svc-6", kind::AAAA), "fd88::2");
    assert_eq!(ask(&zones, "svc-6", "svc-6", kind::ANY), "10.88.0.2 fd88::2");
}

#[test]
fn those_who_share_a_name_take_turns() {
    let zones = example();
    let turn = |turn| ask_in_turn(&zones, "web", "all", kind::A, turn);
    assert_eq!(turn(0), "198.18.1.2 198.18.1.3 198.18.1.4");
    assert_eq!(turn(1), "198.18.1.3 198.18.1.4 198.18.1.2");
    assert_eq!(turn(2), "198.18.1.4 198.18.1.2 198.18.1.3");
    assert_eq!(turn(u32::MAX), turn(u32::MAX % 3));
}

/// RFC 2308 section 2.2: "NODATA", a name that exists without records of the type. A resolver that
/// heard NXDOMAIN for AAAA would not ask for A (RFC 8020 section 2).
#[test]
fn other_types_of_a_known_name_are_empty_and_stay_here() {
    let zones = example();
    for kind in [
        kind::AAAA,
        kind::MX,
        kind::TXT,
        kind::SRV,
        kind::HTTPS,
        kind::SOA,
        kind::NS,
        kind::CNAME,
        65_280,
    ] {
        assert_eq!(ask(&zones, "db", "web", kind), "nothing in web", "{kind}");
        assert_eq!(
            ask(&zones, "db", "dotted.example", kind),
            "nothing in dotted.example",
            "{kind}"
        );
    }
}

/// RFC 6895 section 3.1: types 128 to 254 are not of records but of questions and messages.
#[test]
fn questions_about_messages_are_refused() {
    let zones = example();
    for kind in [kind::OPT, 249, 250, 251, 252, 253, 254] {
        assert_eq!(ask(&zones, "db", "web", kind), "refused: Type", "{kind}");
        assert_eq!(ask(&zones, "db", "example.com", kind), "refused: Type", "{kind}");
    }
}

#[test]
fn names_of_others_are_none_and_stay_here() {
    let zones = example();
    assert_eq!(ask(&zones, "web", "alone", kind::A), "no name in .");
    assert_eq!(ask(&zones, "web", "alone.own", kind::A), "no name in own");
    assert_eq!(ask(&zones, "web", "safe.shut", kind::TXT), "no name in shut");
    assert_eq!(
        ask(&zones, "alone", "dotted.example", kind::A),
        "[192.0.2.53:53]",
        "that may be someone on the Internet"
    );
    assert_eq!(
        ask(&zones, "web", "other.own", kind::A),
        "host",
        "a network may be called like a domain"
    );
}

#[test]
fn names_of_services_that_are_being_restarted_stay_here() {
    let mut zones = example();
    zones.remove_endpoint("un1", "db", "db");
    assert_eq!(ask(&zones, "web", "db.un1", kind::A), "no name in un1");
    assert_eq!(ask(&zones, "alone", "db.un1", kind::A), "no name in un1");
    assert_eq!(
        ask(&zones, "web", "never.un1", kind::A),
        "host",
        "a network may be called like a domain"
    );
    for number in 0..1_000 {
        let name = format!("c{number}");
        zones.add_endpoint("un1", &endpoint(&name, &[], &[])).unwrap();
        zones.remove_endpoint("un1", &name, &name);
    }
    assert_eq!(ask(&zones, "web", "c999.un1", kind::A), "no name in un1");
    assert_eq!(ask(&zones, "web", "c0.un1", kind::A), "host", "of so many the last ones");
}

/// RFC 6761 section 6.3 (localhost), 6.4 (invalid), RFC 7686 (onion).
#[test]
fn reserved_names_are_nobody_elses_business() {
    let zones = example();
    assert_eq!(ask(&zones, "web", "localhost", kind::A), "127.0.0.1");
    assert_eq!(ask(&zones, "web", "app.localhost", kind::AAAA), "::1");
    assert_eq!(ask(&zones, "web", "app.localhost", kind::MX), "nothing in localhost");
    assert_eq!(ask(&zones, "web", "a.invalid", kind::A), "no name in invalid");
    assert_eq!(ask(&zones, "web", "a.onion", kind::A), "no name in onion");
    assert_eq!(ask(&zones, "web", "notlocalhost.example", kind::A), "host");
}

#[test]
fn single_labels_are_asked_of_nobody_but_what_validators_ask_of_domains() {
    let zones = example();
    for kind in [kind::A, kind::AAAA, kind::MX, kind::TXT, kind::HTTPS, kind::ANY] {
        assert_eq!(ask(&zones, "web", "nosuch", kind), "no name in .", "{kind}");
    }
    for kind in [kind::NS, kind::SOA, kind::DS, kind::DNSKEY] {
        assert_eq!(ask(&zones, "web", "org", kind), "host", "{kind}");
    }
    let asker = Asker::Container("web".into());
    let view = zones.view(&asker, [0; 4].into());
    let open = Policy { forward_single_labels: true };
    assert_eq!(resolve(&view, open, b"\x06nosuch\0", kind::A, 0), Resolution::Forward(None));
    assert_eq!(
        resolve(&view, Policy::default(), b"\0", kind::NS, 0),
        Resolution::Forward(None),
        "the root"
    );
}

/// RFC 1035 section 3.5.
#[test]
fn addresses_of_neighbours_have_names() {
    let zones = example();
    assert_eq!(ask(&zones, "db", "2.1.18.198.in-addr.arpa", kind::PTR), "web.un1");
    assert_eq!(
        ask(&zones, "db", "2.1.18.198.in-addr.arpa", kind::A),
        "nothing in 2.1.18.198.in-addr.arpa"
    );
    assert_eq!(
        ask(&zones, "db", "77.1.18.198.in-addr.arpa", kind::PTR),
        "no name in 77.1.18.198.in-addr.arpa",
        "in the subnet, and nobody's"
    );
    assert_eq!(
        ask(&zones, "alone", "2.1.18.198.in-addr.arpa", kind::PTR),
        "no name in 2.1.18.198.in-addr.arpa",
        "of a network that is not its own"
    );
    let v6 = format!("2.{}8.8.d.f.ip6.arpa", "0.".repeat(27));
    assert_eq!(ask(&zones, "svc-6", &v6, kind::PTR), "svc-6.un6");
}

/// RFC 6303 section 4: the zones that are answered where they are asked, for nobody else can.
#[test]
fn the_reverse_of_private_addresses_never_leaves() {
    let zones = example();
    for (name, expected) in [
        ("9.9.9.10.in-addr.arpa", "no name in 10.in-addr.arpa"),
        ("1.0.31.172.in-addr.arpa", "no name in 31.172.in-addr.arpa"),
        ("1.1.168.192.in-addr.arpa", "no name in 168.192.in-addr.arpa"),
        ("1.1.254.169.in-addr.arpa", "no name in 254.169.in-addr.arpa"),
        ("1.0.0.127.in-addr.arpa", "no name in 127.in-addr.arpa"),
        ("10.in-addr.arpa", "nothing in 10.in-addr.arpa"),
        ("168.192.in-addr.arpa", "nothing in 168.192.in-addr.arpa"),
        ("lb._dns-sd._udp.0.1.168.192.in-addr.arpa", "no name in 0.1.168.192.in-addr.arpa"),
        ("0/25.9.168.192.in-addr.arpa", "no name in 9.168.192.in-addr.arpa"),
        (&format!("{}d.f.ip6.arpa", "1.".repeat(30)), "no name in d.f.ip6.arpa"),
        (&format!("{}0.8.e.f.ip6.arpa", "1.".repeat(28)), "no name in 8.e.f.ip6.arpa"),
        (&format!("1.{}ip6.arpa", "0.".repeat(31)), ""),
    ] {
        let got = ask(&zones, "web", name, kind::PTR);
        if expected.is_empty() {
            assert!(got.starts_with("no name in 1.0.0"), "{name}: {got}");
        } else {
            assert_eq!(got, expected, "{name}");
        }
    }
    for public in [
        "8.8.8.8.in-addr.arpa",
        "1.0.32.172.in-addr.arpa",
        "172.in-addr.arpa",
        "in-addr.arpa",
        &format!("{}1.0.0.2.ip6.arpa", "1.".repeat(28)),
    ] {
        assert_eq!(ask(&zones, "web", public, kind::PTR), "host", "{public}");
    }
}

#[test]
fn who_is_on_internal_networks_only_has_no_egress() {
    let zones = example();
    assert_eq!(ask(&zones, "safe", "mixed", kind::A), "10.0.2.3");
    assert_eq!(ask(&zones, "safe", "example.com", kind::A), "refused: NoWayOut");
    assert_eq!(ask(&zones, "safe", "org", kind::NS), "refused: NoWayOut");
    assert_eq!(
        ask(&zones, "mixed", "example.com", kind::A),
        "host",
        "not to the servers of the internal one"
    );
    assert_eq!(
        ask(&zones, "nobody", "example.com", kind::A),
        "refused: NoWayOut",
        "on no network at all"
    );
}

#[test]
fn a_network_may_have_servers_of_its_own() {
    assert_eq!(ask(&example(), "alone", "example.com", kind::A), "[192.0.2.53:53]");
}

/// CVE-2024-29018 again, at a gateway: an address that nobody has must not have more than an
/// endpoint.
#[test]
fn strangers_at_a_gateway_are_refused_whatever_they_ask() {
    let zones = example();
    for network in ["un1", "shut"] {
        let asker = Asker::Network(network.into());
        let view = zones.view(&asker, [198, 18, 1, 99].into());
        for name in ["web", "safe", "example.com", "localhost", "2.1.18.198.in-addr.arpa"] {
            let name = Name::parse(name).unwrap();
            let resolution = resolve(&view, Policy::default(), name.wire(), kind::A, 0);
            assert_eq!(resolution, Resolution::Refused(Refusal::Stranger), "{name}");
        }
        assert!(view.stats().is_some(), "it is counted with the network");
    }
}
