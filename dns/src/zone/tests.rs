use super::*;
use proptest::prelude::*;

pub(crate) fn network(name: &str) -> NetworkSpec {
    NetworkSpec { name: name.into(), ..NetworkSpec::default() }
}

pub(crate) fn endpoint(container: &str, aliases: &[&str], addresses: &[&str]) -> EndpointSpec {
    EndpointSpec {
        container: container.into(),
        name: container.into(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
        hostname: None,
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
    }
}

pub(crate) fn zones(networks: &[NetworkSpec], endpoints: &[(&str, EndpointSpec)]) -> Zones {
    let mut zones = Zones::new(Limits::default());
    let mut lists = crate::servers::ServerLists::new(8);
    for network in networks {
        let servers = lists.get(&network.servers).unwrap();
        zones.add_network(network, servers, Arc::new(NetworkStats::new(&network.name))).unwrap();
    }
    for (network, endpoint) in endpoints {
        zones.add_endpoint(network, endpoint).unwrap();
    }
    zones
}

fn addresses(zones: &Zones, client_id: &str, name: &str) -> Vec<String> {
    let client_id = ClientId::Container(client_id.into());
    let view = zones.view(&client_id, [0; 4].into());
    let name = Name::parse(name).unwrap();
    view.endpoints_with_name(name.wire())
        .flatten()
        .flat_map(|one| &one.v4)
        .map(ToString::to_string)
        .collect()
}

#[test]
fn a_name_resolves_on_its_network_only() {
    let zones = zones(
        &[network("a"), network("b")],
        &[
            ("a", endpoint("web", &["site"], &["10.0.1.2"])),
            ("b", endpoint("db", &[], &["10.0.2.2"])),
            ("a", endpoint("both", &[], &["10.0.1.3"])),
            ("b", endpoint("both", &[], &["10.0.2.3"])),
        ],
    );
    assert_eq!(addresses(&zones, "web", "both"), ["10.0.1.3"]);
    assert_eq!(addresses(&zones, "db", "both"), ["10.0.2.3"]);
    assert_eq!(
        addresses(&zones, "both", "both"),
        ["10.0.1.3", "10.0.2.3"],
        "in the order of joining"
    );
    assert_eq!(addresses(&zones, "both", "site.a"), ["10.0.1.2"]);
    assert_eq!(addresses(&zones, "both", "both.b"), ["10.0.2.3"]);
    assert!(addresses(&zones, "db", "web").is_empty());
    assert!(addresses(&zones, "nobody", "web").is_empty());
}

#[test]
fn networks_with_the_same_domain_have_separate_names() {
    let with = |name: &str| NetworkSpec { domain: Some("front".into()), ..network(name) };
    let mut zones = zones(
        &[with("one/front"), with("two/front")],
        &[
            ("one/front", endpoint("web", &[], &["10.0.1.2"])),
            ("one/front", endpoint("db", &[], &["10.0.1.3"])),
            ("two/front", endpoint("other", &["db"], &["10.0.2.2"])),
        ],
    );
    assert_eq!(addresses(&zones, "web", "db.front"), ["10.0.1.3"]);
    assert_eq!(addresses(&zones, "other", "db.front"), ["10.0.2.2"]);
    assert_eq!(addresses(&zones, "other", "web.front"), [""; 0]);
    let web = ClientId::Container("web".into());
    let hidden = |zones: &Zones, name: &str| {
        let view = zones.view(&web, [0; 4].into());
        view.hidden(Name::parse(name).unwrap().wire())
    };
    // The names of both are never forwarded.
    for name in ["db.front", "other.front"] {
        assert!(hidden(&zones, name).is_some(), "{name}");
    }
    assert!(zones.remove_network("two/front"));
    assert_eq!(hidden(&zones, "other.front"), None);
    assert!(hidden(&zones, "db.front").is_some());
    assert_eq!(addresses(&zones, "web", "db.front"), ["10.0.1.3"]);
}

#[test]
fn a_removed_endpoint_loses_all_its_names() {
    let mut zones = zones(
        &[network("a")],
        &[
            ("a", endpoint("web", &["x"], &["10.0.1.2"])),
            ("a", endpoint("me", &["x"], &["10.0.1.3"])),
        ],
    );
    assert_eq!(addresses(&zones, "me", "x"), ["10.0.1.2", "10.0.1.3"]);
    assert!(zones.remove_endpoint("a", "web", "web"));
    assert!(!zones.remove_endpoint("a", "web", "web"));
    assert_eq!(addresses(&zones, "me", "x"), ["10.0.1.3"]);
    assert!(addresses(&zones, "me", "web.a").is_empty());
    assert!(zones.remove_network("a"));
    assert!(zones.containers.is_empty() && zones.endpoints == 0 && zones.by_domain.is_empty());
}

#[test]
fn a_replaced_endpoint_keeps_the_order_of_networks() {
    let mut zones = zones(
        &[network("a"), network("b")],
        &[
            ("a", endpoint("web", &["old"], &["10.0.1.2"])),
            ("b", endpoint("web", &[], &["10.0.2.2"])),
        ],
    );
    zones.add_endpoint("a", &endpoint("web", &["new"], &["10.0.1.9"])).unwrap();
    assert_eq!(
        addresses(&zones, "web", "web"),
        ["10.0.1.9", "10.0.2.2"],
        "the order of networks is kept"
    );
    assert!(addresses(&zones, "web", "old").is_empty());
    assert_eq!(zones.endpoints, 2);
}

#[test]
fn names_of_several_containers_are_reported() {
    let mut zones = zones(&[network("a")], &[("a", endpoint("web", &["x"], &["10.0.1.2"]))]);
    assert_eq!(
        zones.add_endpoint("a", &endpoint("db", &["x", "y"], &["10.0.1.3"])),
        Ok(vec!["x.a".into(), "x".into()])
    );
}

#[test]
fn errors_name_the_object_and_change_nothing() {
    let mut zones = Zones::new(Limits { networks: 1, endpoints: 1, names: 4, addresses: 1 });
    let mut add = |name: &str| {
        let stats = Arc::new(NetworkStats::new(name));
        zones.add_network(&network(name), None, stats).map_err(|error| error.to_string())
    };
    assert_eq!(add("a"), Ok(()));
    assert_eq!(add("A").unwrap_err(), "network \"A\" already exists", "names are case-insensitive");
    assert_eq!(add("b").unwrap_err(), "network \"b\": limit of 1 networks reached");
    assert_eq!(add("b..c").unwrap_err(), "name \"b..c\" has an empty label");
    let mut add = |spec: &EndpointSpec| {
        zones.add_endpoint("a", spec).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(
        add(&endpoint("web", &["1", "2", "3"], &[])).unwrap_err(),
        "endpoint \"web\": limit of 4 names exceeded"
    );
    assert_eq!(
        add(&endpoint("web", &[], &["::1", "::2"])).unwrap_err(),
        "endpoint \"web\": limit of 1 addresses exceeded"
    );
    assert_eq!(
        add(&endpoint("web", &[&"x".repeat(64)], &[])).unwrap_err(),
        format!("name {:?} has a label of more than 63 bytes", "x".repeat(64))
    );
    assert_eq!(add(&endpoint("web", &[], &[])), Ok(()));
    assert_eq!(add(&endpoint("web", &["again"], &[])), Ok(()), "it replaces the previous one");
    assert_eq!(
        add(&endpoint("db", &[], &[])).unwrap_err(),
        "endpoint \"db\": limit of 1 endpoints exceeded"
    );
    assert_eq!(
        zones.add_endpoint("z", &endpoint("web", &[], &[])).unwrap_err().to_string(),
        "network \"z\" does not exist"
    );
}

#[test]
fn a_client_at_a_gateway_is_identified_by_its_address() {
    let zones = zones(
        &[network("a"), network("b")],
        &[
            ("a", endpoint("both", &[], &["10.0.1.2"])),
            ("b", endpoint("both", &[], &["10.0.2.2"])),
            ("b", endpoint("db", &[], &["10.0.2.3"])),
        ],
    );
    let client_id = ClientId::Network("a".into());
    let sees = |source: [u8; 4]| {
        let view = zones.view(&client_id, source.into());
        [b"\x04both\0", &b"\x02db\0"[..]]
            .map(|name| view.endpoints_with_name(name).flatten().next().is_some())
    };
    assert_eq!(sees([10, 0, 1, 2]), [true, true], "the other network of the client too");
    assert_eq!(sees([10, 0, 1, 9]), [false, false], "an address that no endpoint has");
    assert!(zones.view(&client_id, [10, 0, 1, 9].into()).is_unknown_client());
    assert!(
        zones.view(&client_id, [10, 0, 2, 3].into()).is_unknown_client(),
        "an endpoint of another network"
    );
    assert!(!zones.view(&client_id, [10, 0, 1, 2].into()).is_unknown_client());
    let share = zones.view(&client_id, [10, 0, 1, 2].into()).client_id(&client_id);
    assert_eq!(share, ClientId::Container("both".into()), "one share of limits at all servers");
}

/// An endpoint that may use any address may use that of a neighbour.
#[test]
fn without_source_verification_all_clients_of_a_gateway_have_the_least_privilege() {
    let loose = NetworkSpec { sources_are_verified: false, ..network("a") };
    let shut = NetworkSpec { internal: true, ..loose.clone() };
    for (spec, forwards) in [(loose, true), (shut, false)] {
        let zones = zones(
            &[spec, network("b")],
            &[
                ("a", endpoint("both", &[], &["10.0.1.2"])),
                ("b", endpoint("both", &[], &["10.0.2.2"])),
                ("b", endpoint("db", &[], &["10.0.2.3"])),
            ],
        );
        let client_id = ClientId::Network("a".into());
        for source in [[10, 0, 1, 2], [10, 0, 1, 9]] {
            let view = zones.view(&client_id, source.into());
            let sees = |name: &[u8]| view.endpoints_with_name(name).flatten().count();
            assert_eq!(
                (sees(b"\x04both\0"), sees(b"\x02db\0")),
                (1, 0),
                "names of this network only"
            );
            assert_eq!(view.may_forward(), forwards);
            assert_eq!(view.partition(), Partition::of([0]));
            assert_eq!(view.client_id(&client_id), client_id, "all clients have one share");
        }
    }
}

#[test]
fn clients_on_exactly_the_same_networks_are_one_partition() {
    let mut zones = zones(
        &[network("a"), network("b")],
        &[
            ("a", endpoint("one", &[], &[])),
            ("a", endpoint("two", &[], &[])),
            ("b", endpoint("other", &[], &[])),
            ("b", endpoint("both", &[], &[])),
            ("a", endpoint("both", &[], &[])),
            ("a", endpoint("too", &[], &[])),
            ("b", endpoint("too", &[], &[])),
        ],
    );
    let of = |zones: &Zones, container: &str| {
        zones.view(&ClientId::Container(container.into()), [0; 4].into()).partition()
    };
    assert_eq!(of(&zones, "one"), of(&zones, "two"));
    assert_eq!(of(&zones, "both"), of(&zones, "too"), "in any order of joining");
    assert_ne!(of(&zones, "one"), of(&zones, "other"));
    assert_ne!(of(&zones, "one"), of(&zones, "both"));
    zones.remove_endpoint("b", "both", "both");
    assert_eq!(of(&zones, "one"), of(&zones, "both"));
    zones.remove_network("b");
    assert_eq!(of(&zones, "one"), of(&zones, "too"));
    zones.add_network(&network("b"), None, Arc::new(NetworkStats::new("b"))).unwrap();
    zones.add_endpoint("b", &endpoint("new", &[], &[])).unwrap();
    assert_eq!(
        of(&zones, "new"),
        Partition::of([2]),
        "a network that is created again is a new one"
    );
}

#[test]
fn a_host_name_with_dots_resolves_for_its_container_only() {
    let spec = |container: &str, hostname: &str| EndpointSpec {
        hostname: Some(hostname.into()),
        ..endpoint(container, &[], &["10.0.1.2"])
    };
    let zones =
        zones(&[network("a")], &[("a", spec("web", "www.example.com")), ("a", spec("db", "data"))]);
    assert_eq!(addresses(&zones, "web", "www.example.com"), ["10.0.1.2"]);
    assert!(addresses(&zones, "db", "www.example.com").is_empty(), "the public host is meant");
    assert_eq!(addresses(&zones, "web", "data"), ["10.0.1.2"]);
}

proptest! {
    /// After any sequence of changes, the state equals that of a new instance with the same
    /// endpoints.
    #[test]
    fn the_order_of_changes_does_not_matter(steps in proptest::collection::vec((0..3_usize, 0..4_usize, 0..3_usize, any::<bool>()), 0..60)) {
        const NETWORKS: [&str; 3] = ["a", "b", "c"];
        let container = |number: usize| format!("c{number}");
        let spec = |network: usize, number: usize, alias: usize| {
            endpoint(&container(number), &["x", "y", "z"][..alias], &[&format!("10.0.{network}.{number}")])
        };
        let mut changed = zones(&NETWORKS.map(network), &[]);
        let mut present: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for (network, number, alias, adds) in steps {
            if adds {
                changed.add_endpoint(NETWORKS[network], &spec(network, number, alias)).unwrap();
                present.insert((network, number), alias);
            } else {
                let name = container(number);
                let was = present.remove(&(network, number)).is_some();
                prop_assert_eq!(changed.remove_endpoint(NETWORKS[network], &name, &name), was);
            }
        }
        let endpoints: Vec<_> =
            present.iter().map(|((network, number), alias)| (NETWORKS[*network], spec(*network, *number, *alias))).collect();
        let fresh = zones(&NETWORKS.map(network), &endpoints);
        prop_assert_eq!(changed.endpoints, present.len());
        prop_assert_eq!(changed.containers.len(), fresh.containers.len());
        for client_id in (0..4).map(container) {
            for name in ["c0", "c1", "c2", "c3", "x", "y", "z", "c0.a", "x.b", "c"] {
                let [mut one, mut other] = [&changed, &fresh].map(|zones| addresses(zones, &client_id, name));
                one.sort();
                other.sort();
                prop_assert_eq!(one, other, "{} of {}", name, client_id);
            }
        }
        for network in changed.networks.values() {
            prop_assert_eq!(network.reverse.len(), network.endpoints.len());
            prop_assert!(network.names.values().all(|holders| !holders.is_empty()));
        }
    }
}
