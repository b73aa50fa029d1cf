//! Plans applied to the in-memory kernel model.

use super::*;
use crate::{
    Attachment, BridgePrograms, Endpoint, FirewallIsolation, FirewallKind, Guards, NatIsolation,
    Network, ObservedLink, RuleIsolation, Subnet, Uplink,
};
use proptest::prelude::*;
use std::sync::Arc;
use tidegate_model::MacAddress;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn interface(name: &str, number: u8) -> Interface {
    Interface { name: name.into(), mac: MacAddress([2, 0, 0, 0, 0, number]) }
}

fn network(name: &str, number: u8) -> Network {
    let subnet = net(&format!("10.9.{number}.0/24"));
    let gateway = crate::gateway(subnet);
    Network {
        name: name.into(),
        bridge: interface(&format!("tg-{name}"), number),
        subnets: vec![Subnet { subnet, gateway }],
        internal: false,
        inter_container: true,
        overlay: None,
        mtu: 1500,
    }
}

fn endpoint(name: &str, number: u8, network: &Network) -> Endpoint {
    let IpNet::V4(subnet) = network.subnets[0].subnet else { panic!("IPv4 comes first") };
    let address = IpAddr::from(std::net::Ipv4Addr::from_bits(
        subnet.network().to_bits() + 10 + u32::from(number),
    ));
    Endpoint {
        name: name.into(),
        attachments: vec![Attachment {
            network: network.name.clone(),
            host_end: interface(&format!("tgv{name}"), 100 + number),
            inside: interface("eth0", 200 + number),
            addresses: vec![IpNet::new(address, 24).unwrap()],
            default_route: true,
            any_address: false,
        }],
    }
}

fn plan_in(model: &KernelModel, owned: &[Fact], desired: &Desired) -> Vec<Op> {
    plan_with(&RuleIsolation::default(), model, owned, desired)
}

fn plan_with(
    isolation: &dyn Isolation,
    model: &KernelModel,
    owned: &[Fact],
    desired: &Desired,
) -> Vec<Op> {
    let observed = Observed { facts: model.facts().clone(), ..Observed::default() };
    plan(desired, owned, &observed, isolation).unwrap().ops
}

/// All isolation mechanisms.
fn some_isolation() -> impl Strategy<Value = Arc<dyn Isolation>> {
    let with = |firewall, gates| {
        let programs = BridgePrograms { gates, bridge_guards: true };
        Arc::new(FirewallIsolation { firewall, owner: "demo".to_owned(), programs })
            as Arc<dyn Isolation>
    };
    let engine = |gates| {
        let programs = BridgePrograms { gates, bridge_guards: true };
        Arc::new(NatIsolation { device: "tgt-1".to_owned(), table: 30_000, programs })
            as Arc<dyn Isolation>
    };
    let all: Vec<Arc<dyn Isolation>> = vec![
        Arc::new(RuleIsolation::default()),
        Arc::new(RuleIsolation { programs: BridgePrograms { gates: true, bridge_guards: true } }),
        engine(false),
        engine(true),
        with(FirewallKind::Nftables, true),
        with(FirewallKind::Iptables, false),
    ];
    prop::sample::select(all)
}

/// Random networks and endpoints.
fn some_desired() -> impl Strategy<Value = Desired> {
    let networks = prop::collection::vec(
        (any::<bool>(), any::<bool>(), prop::sample::select(vec![1400_u32, 1500])),
        3,
    );
    let endpoints = prop::collection::vec((any::<bool>(), 0_usize..3), 4);
    let uplinks = prop::collection::vec((any::<bool>(), any::<bool>()), 0..3);
    let guards = prop::sample::select(vec![
        Guards::None,
        Guards::AtLinks,
        Guards::InTable("demo".to_owned()),
    ]);
    let all = (any::<[bool; 3]>(), networks, endpoints, uplinks, guards, 0..2_000_u32);
    all.prop_map(|(present, options, endpoints, uplinks, guards, rules_ahead)| {
        let mut networks = Vec::new();
        for (number, (internal, inter_container, mtu)) in options.into_iter().enumerate() {
            let name = format!("n{number}");
            networks.push(Network {
                internal,
                inter_container,
                mtu,
                ..network(&name, number as u8)
            });
        }
        let endpoints = endpoints
            .into_iter()
            .enumerate()
            .filter(|(_, (present, _))| *present)
            .filter(|(_, (_, on))| present[*on])
            .map(|(number, (_, on))| endpoint(&format!("e{number}"), number as u8, &networks[on]));
        let endpoints = endpoints.collect();
        let networks = networks
            .into_iter()
            .zip(present)
            .filter(|(_, present)| *present)
            .map(|(network, _)| network)
            .collect();
        let uplinks = uplinks.into_iter().enumerate();
        let uplinks = uplinks
            .map(|(number, (v4, v6))| Uplink {
                link: format!("eth{number}"),
                v4,
                v6,
                ours: number != 0,
            })
            .collect();
        Desired { networks, endpoints, uplinks, rules_ahead, guards, ..Desired::default() }
    })
}

proptest! {
    #[test]
    fn plan_reaches_the_desired_state_from_any_owned_state_and_back(isolation in some_isolation(), first in some_desired(), second in some_desired()) {
        let mut model = KernelModel::default();
        let ops = plan_with(&*isolation, &model, &[], &first);
        ops.iter().for_each(|op| model.execute(op));
        let owned = first.facts(&*isolation);
        prop_assert_eq!(model.facts(), &owned.iter().cloned().collect());
        prop_assert_eq!(plan_with(&*isolation, &model, &owned, &first), vec![], "the plan is idempotent");

        let mut back = model.clone();
        ops.iter().rev().for_each(|op| back.execute(&op.inverse()));
        prop_assert_eq!(&back, &KernelModel::default(), "the inverse operations restore the initial state");

        plan_with(&*isolation, &model, &owned, &second).iter().for_each(|op| model.execute(op));
        let owned = second.facts(&*isolation);
        prop_assert_eq!(model.facts(), &owned.iter().cloned().collect(), "the result does not depend on the previous state");
        plan_with(&*isolation, &model, &owned, &Desired::default()).iter().for_each(|op| model.execute(op));
        prop_assert_eq!(&model, &KernelModel::default());
    }

    /// The process may be killed after any operation.
    #[test]
    fn partial_application_can_be_cleared_or_completed(isolation in some_isolation(), desired in some_desired(), done in any::<prop::sample::Index>()) {
        let ops = plan_with(&*isolation, &KernelModel::default(), &[], &desired);
        let done = done.index(ops.len() + 1);
        let owned: Vec<Fact> = ops[..done].iter().map(|op| op.fact().clone()).collect();
        let mut model = KernelModel::default();
        ops[..done].iter().for_each(|op| model.execute(op));
        let mut cleared = model.clone();
        plan_with(&*isolation, &model, &owned, &Desired::default()).iter().for_each(|op| cleared.execute(op));
        prop_assert_eq!(&cleared, &KernelModel::default());
        plan_with(&*isolation, &model, &owned, &desired).iter().for_each(|op| model.execute(op));
        prop_assert_eq!(model.facts(), &desired.facts(&*isolation).into_iter().collect());
    }
}

#[test]
fn a_network_is_closed_before_it_is_up() {
    let desired = Desired { networks: vec![network("blue", 1)], ..Desired::default() };
    let steps: Vec<String> =
        plan_in(&KernelModel::default(), &[], &desired).iter().map(Op::to_string).collect();
    assert_eq!(
        steps,
        [
            "add bridge \"tg-blue\"",
            "add net.ipv4.conf.tg-blue.arp_ignore = 1 on the host",
            "add net.ipv4.conf.tg-blue.accept_source_route = 0 on the host",
            "add net.ipv4.conf.tg-blue.accept_redirects = 0 on the host",
            "add net.ipv4.conf.tg-blue.forwarding = 0 on the host",
            "add net.ipv6.conf.tg-blue.disable_ipv6 = 1 on the host",
            "add rule 7656: to 10.9.1.0/24 iif lo lookup main",
            "add rule 7657: to 10.9.1.0/24 unreachable",
            "add rule 7657: iif tg-blue unreachable",
            "add address 10.9.1.1/24 of \"tg-blue\" on the host",
            "add \"tg-blue\" up on the host",
        ]
    );
}

/// If the firewall rules are flushed, no packet is marked, so the exemption does not apply and the
/// guard rules block.
#[test]
fn guards_close_a_network_behind_the_firewall() {
    let desired = Desired {
        networks: vec![network("blue", 1)],
        uplinks: vec![Uplink { link: "eth0".to_owned(), v4: true, v6: false, ours: true }],
        ..Desired::default()
    };
    let steps = |gates| -> Vec<String> {
        let programs = BridgePrograms { gates, bridge_guards: gates };
        let owner = "demo".to_owned();
        let isolation = FirewallIsolation { firewall: FirewallKind::Nftables, owner, programs };
        plan_with(&isolation, &KernelModel::default(), &[], &desired)
            .iter()
            .map(Op::to_string)
            .collect()
    };
    let gated = steps(true);
    assert_eq!(
        gated,
        [
            "add rules of \"demo\" in nftables",
            "add rule 7657: iif eth0 blackhole",
            "add forwarding of IPv4 from \"eth0\"",
            "add rule 7656: to 10.9.1.0/24 lookup main",
            "add bridge \"tg-blue\"",
            "add net.ipv4.conf.tg-blue.arp_ignore = 1 on the host",
            "add net.ipv4.conf.tg-blue.accept_source_route = 0 on the host",
            "add net.ipv4.conf.tg-blue.accept_redirects = 0 on the host",
            "add \"tg-blue\" in group 1200802033",
            "add guard at the ingress of \"tg-blue\"",
            "add gate at the egress of \"tg-blue\"",
            "add net.ipv4.conf.tg-blue.forwarding = 1 on the host",
            "add net.ipv6.conf.tg-blue.disable_ipv6 = 1 on the host",
            "add address 10.9.1.1/24 of \"tg-blue\" on the host",
            "add \"tg-blue\" up on the host",
        ]
    );
    assert_eq!(
        steps(false),
        [
            "add rules of \"demo\" in nftables",
            "add rule 7657: iif eth0 blackhole",
            "add forwarding of IPv4 from \"eth0\"",
            "add bridge \"tg-blue\"",
            "add net.ipv4.conf.tg-blue.arp_ignore = 1 on the host",
            "add net.ipv4.conf.tg-blue.accept_source_route = 0 on the host",
            "add net.ipv4.conf.tg-blue.accept_redirects = 0 on the host",
            "add \"tg-blue\" in group 1200802033",
            "add net.ipv4.conf.tg-blue.forwarding = 1 on the host",
            "add net.ipv6.conf.tg-blue.disable_ipv6 = 1 on the host",
            "add rule 7656: to 10.9.1.0/24 iif lo lookup main",
            "add rule 7657: to 10.9.1.0/24 unreachable",
            "add rule 7656: to 10.9.1.0/24 fwmark 0x74670000/0xffff0000 lookup main",
            "add address 10.9.1.1/24 of \"tg-blue\" on the host",
            "add \"tg-blue\" up on the host",
        ]
    );
}

#[test]
fn endpoint_of_an_internal_network_has_no_default_route() {
    let internal = Network { internal: true, ..network("inside", 1) };
    let desired = Desired {
        endpoints: vec![endpoint("web", 1, &internal)],
        networks: vec![internal],
        ..Desired::default()
    };
    let facts = desired.facts(&RuleIsolation::default());
    assert!(!facts.iter().any(|fact| matches!(fact, Fact::DefaultRoute { .. })));
}

#[test]
fn endpoint_is_guarded_before_it_joins_the_bridge() {
    let blue = network("blue", 1);
    let endpoints = vec![endpoint("web", 1, &blue)];
    let desired = |guards| Desired {
        networks: vec![blue.clone()],
        endpoints: endpoints.clone(),
        guards,
        ..Desired::default()
    };
    let steps = |guards| -> Vec<String> {
        let facts = desired(guards).facts(&RuleIsolation::default());
        facts.iter().map(Fact::to_string).collect()
    };
    let place = |steps: &[String], what: &str| steps.iter().position(|step| step.starts_with(what));
    let unguarded = steps(Guards::None);
    assert_eq!(place(&unguarded, "port guard"), None);
    let guarded = steps(Guards::AtLinks);
    assert!(
        place(&guarded, "port guard").unwrap() < place(&guarded, "port \"").unwrap(),
        "{guarded:?}"
    );
    let in_table = steps(Guards::InTable("demo".to_owned()));
    assert_eq!(place(&in_table, "nftables table"), Some(0));
}

/// Routes of a VPN or a company network: the route of the bridge is more specific.
#[test]
fn wider_foreign_routes_are_no_conflict() {
    let desired = Desired { networks: vec![network("blue", 1)], ..Desired::default() };
    for route in ["0.0.0.0/1", "128.0.0.0/1", "10.0.0.0/8", "10.9.0.0/23"] {
        let observed =
            Observed { routes: vec![(net(route), "tun0".into())], ..Observed::default() };
        assert!(plan(&desired, &[], &observed, &RuleIsolation::default()).is_ok(), "{route}");
    }
}

#[test]
fn policy_rules_precede_foreign_ones() {
    let priorities = |rules_ahead| -> Vec<u32> {
        let desired =
            Desired { networks: vec![network("blue", 1)], rules_ahead, ..Desired::default() };
        let facts = desired.facts(&RuleIsolation::default());
        let rules = facts.iter().filter_map(|fact| match fact {
            Fact::Rule(rule) => Some(rule.priority),
            _ => None,
        });
        rules.collect()
    };
    assert_eq!(priorities(0), [7656, 7657, 7657]);
    assert_eq!(priorities(2_460), [5196, 5197, 5197], "before 5200");
}

#[test]
fn conflicts_are_errors() {
    let (blue, red) = (network("blue", 1), network("red", 2));
    let taken = |links: &[(&str, u8)]| Observed {
        links: BTreeMap::from([(
            Place::Host,
            links
                .iter()
                .map(|(name, mac)| {
                    let mac = Some(MacAddress([2, 0, 0, 0, 0, *mac]));
                    ((*name).to_owned(), ObservedLink { mac, ..ObservedLink::default() })
                })
                .collect(),
        )]),
        ..Observed::default()
    };
    let error = |networks: Vec<Network>, endpoints: Vec<Endpoint>, observed: &Observed| {
        plan(
            &Desired { networks, endpoints, ..Desired::default() },
            &[],
            observed,
            &RuleIsolation::default(),
        )
        .unwrap_err()
        .to_string()
    };
    let nothing = Observed::default();
    let wide = Network {
        subnets: vec![Subnet { subnet: net("10.9.0.0/16"), gateway: ip("10.9.0.1") }],
        ..red.clone()
    };
    assert_eq!(
        error(vec![blue.clone(), wide], vec![], &nothing),
        "network \"red\": subnet 10.9.0.0/16 overlaps 10.9.1.0/24 of network \"blue\"; choose another subnet"
    );
    for route in ["10.9.1.0/24", "10.9.1.128/25", "10.9.1.77/32"] {
        let routed = Observed { routes: vec![(net(route), "eth7".into())], ..Observed::default() };
        assert_eq!(
            error(vec![blue.clone()], vec![], &routed),
            format!(
                "network \"blue\": subnet 10.9.1.0/24 overlaps {route}, which the host reaches through \"eth7\"; choose another subnet"
            )
        );
    }
    assert_eq!(
        error(vec![blue.clone()], vec![], &taken(&[("tg-blue", 99)])),
        "interface \"tg-blue\" on the host already exists and is not owned by tidegate; choose another name or remove it"
    );
    let long = Network { bridge: interface("tg-a-name-too-long", 1), ..blue.clone() };
    assert_eq!(
        error(vec![long], vec![], &nothing),
        "interface name \"tg-a-name-too-long\" exceeds 15 bytes"
    );
    let (one, mut other) = (endpoint("one", 1, &blue), endpoint("other", 2, &blue));
    other.attachments[0].addresses.clone_from(&one.attachments[0].addresses);
    assert_eq!(
        error(vec![blue.clone()], vec![one.clone(), other], &nothing),
        "endpoint \"other\": address 10.9.1.11 already belongs to endpoint \"one\""
    );
    assert_eq!(error(vec![red], vec![one], &nothing), "endpoint \"one\": no such network \"blue\"");
    assert!(
        plan(
            &Desired { networks: vec![blue], ..Desired::default() },
            &[],
            &taken(&[("tg-blue", 1)]),
            &RuleIsolation::default()
        )
        .is_ok()
    );
}
