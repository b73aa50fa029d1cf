use super::*;
use crate::client_id::ClientId;
use crate::name::Name;
use crate::zone::tests::{endpoint, network, zones};
use crate::zone::{NetworkSpec, Zones};

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

/// The resolution as text.
fn ask(zones: &Zones, client_id: &str, name: &str, kind: u16) -> String {
    ask_rotated(zones, client_id, name, kind, 0)
}

fn ask_rotated(zones: &Zones, client_id: &str, name: &str, kind: u16, rotation: u32) -> String {
    let client_id = ClientId::Container(client_id.into());
    let view = zones.view(&client_id, [0; 4].into());
    let name = Name::parse(name).unwrap();
    let zone = |at: usize| crate::name::DisplayName(&name.wire()[at..]).to_string();
    match resolve(&view, Policy::default(), name.wire(), kind, rotation) {
        Resolution::Answer(answers) => {
            let text = |data: &Data| match data {
                Data::A(ip) => ip.to_string(),
                Data::Aaaa(ip) => ip.to_string(),
                Data::Ptr(name) => crate::name::DisplayName(name).to_string(),
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
fn all_names_of_an_endpoint_resolve() {
    let zones = example();
    for name in ["web", "WEB", "web.un1", "Web.Un1", "dotted.example", "dotted.example.un1"] {
        assert_eq!(ask(&zones, "db", name, kind::A), "198.18.1.2", "{name}");
    }
    assert_eq!(ask(&zones, "svc-6", "svc-6", kind::AAAA), "fd88::2");
    assert_eq!(ask(&zones, "svc-6", "svc-6", kind::ANY), "10.88.0.2 fd88::2");
}

#[test]
fn addresses_of_a_shared_name_are_rotated() {
    let zones = example();
    let rotation = |rotation| ask_rotated(&zones, "web", "all", kind::A, rotation);
    assert_eq!(rotation(0), "198.18.1.2 198.18.1.3 198.18.1.4");
    assert_eq!(rotation(1), "198.18.1.3 198.18.1.4 198.18.1.2");
    assert_eq!(rotation(2), "198.18.1.4 198.18.1.2 198.18.1.3");
    assert_eq!(rotation(u32::MAX), rotation(u32::MAX % 3));
}

/// RFC 2308 section 2.2: "NODATA", a name that exists without records of the type. After NXDOMAIN
/// for AAAA, a resolver would not query A (RFC 8020 section 2).
#[test]
fn other_types_of_a_local_name_are_nodata_and_not_forwarded() {
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

/// RFC 6895 section 3.1: 128 to 254 are meta types.
#[test]
fn meta_types_are_refused() {
    let zones = example();
    for kind in [kind::OPT, 249, 250, 251, 252, 253, 254] {
        assert_eq!(ask(&zones, "db", "web", kind), "refused: Type", "{kind}");
        assert_eq!(ask(&zones, "db", "example.com", kind), "refused: Type", "{kind}");
    }
}

#[test]
fn names_on_other_networks_do_not_exist_and_are_not_forwarded() {
    let zones = example();
    assert_eq!(ask(&zones, "web", "alone", kind::A), "no name in .");
    assert_eq!(ask(&zones, "web", "alone.own", kind::A), "no name in own");
    assert_eq!(ask(&zones, "web", "safe.shut", kind::TXT), "no name in shut");
    assert_eq!(
        ask(&zones, "alone", "dotted.example", kind::A),
        "[192.0.2.53:53]",
        "the name may exist on the Internet"
    );
    assert_eq!(
        ask(&zones, "web", "other.own", kind::A),
        "host",
        "a network may have the name of a public domain"
    );
}

#[test]
fn names_of_removed_endpoints_are_not_forwarded() {
    let mut zones = example();
    zones.remove_endpoint("un1", "db", "db");
    assert_eq!(ask(&zones, "web", "db.un1", kind::A), "no name in un1");
    assert_eq!(ask(&zones, "alone", "db.un1", kind::A), "no name in un1");
    assert_eq!(
        ask(&zones, "web", "never.un1", kind::A),
        "host",
        "a network may have the name of a public domain"
    );
    for number in 0..1_000 {
        let name = format!("c{number}");
        zones.add_endpoint("un1", &endpoint(&name, &[], &[])).unwrap();
        zones.remove_endpoint("un1", &name, &name);
    }
    assert_eq!(ask(&zones, "web", "c999.un1", kind::A), "no name in un1");
    assert_eq!(
        ask(&zones, "web", "c0.un1", kind::A),
        "host",
        "only the most recent names are remembered"
    );
}

/// RFC 6761 section 6.3 (localhost), 6.4 (invalid), RFC 7686 (onion).
#[test]
fn reserved_names_are_not_forwarded() {
    let zones = example();
    assert_eq!(ask(&zones, "web", "localhost", kind::A), "127.0.0.1");
    assert_eq!(ask(&zones, "web", "app.localhost", kind::AAAA), "::1");
    assert_eq!(ask(&zones, "web", "app.localhost", kind::MX), "nothing in localhost");
    assert_eq!(ask(&zones, "web", "a.invalid", kind::A), "no name in invalid");
    assert_eq!(ask(&zones, "web", "a.onion", kind::A), "no name in onion");
    assert_eq!(ask(&zones, "web", "notlocalhost.example", kind::A), "host");
}

#[test]
fn single_labels_are_not_forwarded_except_zone_queries_of_validators() {
    let zones = example();
    for kind in [kind::A, kind::AAAA, kind::MX, kind::TXT, kind::HTTPS, kind::ANY] {
        assert_eq!(ask(&zones, "web", "nosuch", kind), "no name in .", "{kind}");
    }
    for kind in [kind::NS, kind::SOA, kind::DS, kind::DNSKEY] {
        assert_eq!(ask(&zones, "web", "org", kind), "host", "{kind}");
    }
    let client_id = ClientId::Container("web".into());
    let view = zones.view(&client_id, [0; 4].into());
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
fn addresses_of_endpoints_have_reverse_names() {
    let zones = example();
    assert_eq!(ask(&zones, "db", "2.1.18.198.in-addr.arpa", kind::PTR), "web.un1");
    assert_eq!(
        ask(&zones, "db", "2.1.18.198.in-addr.arpa", kind::A),
        "nothing in 2.1.18.198.in-addr.arpa"
    );
    assert_eq!(
        ask(&zones, "db", "77.1.18.198.in-addr.arpa", kind::PTR),
        "no name in 77.1.18.198.in-addr.arpa",
        "in the subnet, without an endpoint"
    );
    assert_eq!(
        ask(&zones, "alone", "2.1.18.198.in-addr.arpa", kind::PTR),
        "no name in 2.1.18.198.in-addr.arpa",
        "of a network that the client is not on"
    );
    let v6 = format!("2.{}8.8.d.f.ip6.arpa", "0.".repeat(27));
    assert_eq!(ask(&zones, "svc-6", &v6, kind::PTR), "svc-6.un6");
}

/// RFC 6303 section 4: locally served zones.
#[test]
fn reverse_names_of_private_addresses_are_not_forwarded() {
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
fn clients_on_internal_networks_only_have_no_egress() {
    let zones = example();
    assert_eq!(ask(&zones, "safe", "mixed", kind::A), "10.0.2.3");
    assert_eq!(ask(&zones, "safe", "example.com", kind::A), "refused: NoEgress");
    assert_eq!(ask(&zones, "safe", "org", kind::NS), "refused: NoEgress");
    assert_eq!(
        ask(&zones, "mixed", "example.com", kind::A),
        "host",
        "not the servers of the internal network"
    );
    assert_eq!(ask(&zones, "nobody", "example.com", kind::A), "refused: NoEgress", "on no network");
}

#[test]
fn the_servers_of_a_network_are_used() {
    assert_eq!(ask(&example(), "alone", "example.com", kind::A), "[192.0.2.53:53]");
}

/// CVE-2024-29018, at a gateway: an address without an endpoint must not get more than an endpoint.
#[test]
fn unknown_clients_at_a_gateway_are_always_refused() {
    let zones = example();
    for network in ["un1", "shut"] {
        let client_id = ClientId::Network(network.into());
        let view = zones.view(&client_id, [198, 18, 1, 99].into());
        for name in ["web", "safe", "example.com", "localhost", "2.1.18.198.in-addr.arpa"] {
            let name = Name::parse(name).unwrap();
            let resolution = resolve(&view, Policy::default(), name.wire(), kind::A, 0);
            assert_eq!(resolution, Resolution::Refused(Refusal::UnknownClient), "{name}");
        }
        assert!(view.stats().is_some(), "counted for the network");
    }
}
