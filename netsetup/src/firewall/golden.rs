//! Golden tests of rendered rulesets, with the expected output in `golden/`.
//!
//! With `UPDATE_GOLDEN=1` the files are written instead of compared. Review the differences before
//! a commit.

use super::{Opening, Ruleset, Zone, iptables, nftables};
use std::fs;
use std::path::Path;
use tidegate_model::Protocol;

const FRONT: [&str; 2] = ["10.9.1.1/24", "fd09:1::1/64"];
const BACK: [&str; 2] = ["10.9.2.1/24", "fd09:2::1/64"];

fn zone(bridge: &str, subnets: &[&str], internal: bool) -> Zone {
    let subnets = subnets.iter().map(|subnet| subnet.parse().unwrap()).collect();
    Zone { bridge: bridge.to_owned(), subnets, internal, verified: false, overlay: false }
}

fn opening(protocol: Protocol, at: &str, to: Option<&str>) -> Opening {
    let at: std::net::SocketAddr = at.parse().unwrap();
    Opening { protocol, address: at.ip(), port: at.port(), to: to.map(|to| to.parse().unwrap()) }
}

fn ruleset(zones: Vec<Zone>, ports: impl IntoIterator<Item = Opening>) -> Ruleset {
    Ruleset {
        owner: "demo".to_owned(),
        zones,
        ports: ports.into_iter().collect(),
        replies: Vec::new(),
        uplinks: Vec::new(),
        bridges: Default::default(),
        gated: true,
    }
}

/// Renders the ruleset with all back ends.
fn rendered(ruleset: &Ruleset, docker_user: bool) -> String {
    format!(
        "# nftables\n{}\n{}\n# iptables\n{}\n# ip6tables\n{}",
        nftables::table(ruleset),
        nftables::user_table(ruleset),
        iptables::rendered(ruleset, false, docker_user),
        iptables::rendered(ruleset, true, docker_user)
    )
}

#[track_caller]
fn is_golden(name: &str, ruleset: &Ruleset, docker_user: bool) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.txt"));
    let text = rendered(ruleset, docker_user);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == golden, "{} is not this:\n{text}", path.display());
}

/// The example of the documentation, and a variant with policy rules as guards.
#[test]
fn demo_matches_golden_file() {
    // Port guards verify the sources of both networks.
    let zones = [zone("tg-front", &FRONT, false), zone("tg-back", &BACK[..1], true)];
    let zones = zones.into_iter().map(|zone| Zone { verified: true, ..zone }).collect();
    let ports = [
        opening(Protocol::Tcp, "0.0.0.0:8080", Some("10.9.1.2:80")),
        opening(Protocol::Tcp, "[::]:8080", Some("[fd09:1::2]:80")),
        opening(Protocol::Udp, "0.0.0.0:53", None),
        opening(Protocol::Udp, "[::]:53", None),
        opening(Protocol::Tcp, "127.0.0.1:9090", None),
    ];
    let demo = ruleset(zones, ports);
    is_golden("demo", &demo, false);
    is_golden("demo-without-gates", &Ruleset { gated: false, ..demo }, false);
}

#[test]
fn option_combinations_match_golden_files() {
    for (families, subnets) in [("v4", &FRONT[..1]), ("v6", &FRONT[1..]), ("v46", &FRONT[..])] {
        for (egress, internal) in [("", false), ("-internal", true)] {
            for publish in ["", "-proxy", "-kernel"] {
                let at = |at: &str, protocol, to| {
                    opening(
                        protocol,
                        at,
                        Some(to).filter(|_| publish == "-kernel" && !at.starts_with("127.")),
                    )
                };
                let (v4, v6) = ("10.9.1.2:80", "[fd09:1::2]:80");
                let ports = [
                    at("0.0.0.0:8080", Protocol::Tcp, v4),
                    at("203.0.113.1:8081", Protocol::Udp, v4),
                    at("127.0.0.1:9090", Protocol::Tcp, v4),
                    at("[::]:8080", Protocol::Tcp, v6),
                    at("[2001:db8::1]:8081", Protocol::Udp, v6),
                ];
                let has = |port: &Opening| {
                    !publish.is_empty()
                        && subnets
                            .iter()
                            .any(|subnet| subnet.contains(':') == port.address.is_ipv6())
                };
                let ports = ports.into_iter().filter(has);
                let name = format!("{families}{egress}{publish}");
                is_golden(&name, &ruleset(vec![zone("tg-front", subnets, internal)], ports), false);
            }
        }
    }
}

#[test]
fn nothing_two_networks_and_docker_user_match_golden_files() {
    is_golden("nothing", &ruleset(Vec::new(), []), false);
    let zones = || vec![zone("tg-front", &FRONT, false), zone("tg-back", &BACK, false)];
    is_golden("two-networks", &ruleset(zones(), []), false);
    // A family with a subnet in one network only is also isolated from the other network.
    let apart = vec![zone("tg-front", &FRONT[..1], false), zone("tg-back", &BACK[1..], false)];
    is_golden("a-family-each", &ruleset(apart, []), false);
    is_golden(
        "docker-user",
        &ruleset(zones(), [opening(Protocol::Tcp, "0.0.0.0:8080", None)]),
        true,
    );
}

/// Two uplinks, each with a default route.
#[test]
fn two_uplinks_match_golden_file() {
    let ports = [opening(Protocol::Tcp, "0.0.0.0:8080", Some("10.9.1.2:80"))];
    let host = ruleset(vec![zone("tg-front", &FRONT, false)], ports);
    let replies = [(1, "203.0.113.0/24"), (2, "2001:db8:2::/64")];
    let replies = replies.iter().map(|(number, net)| (*number, net.parse().unwrap())).collect();
    is_golden("two-uplinks", &Ruleset { replies, ..host }, false);
}

#[test]
fn host_without_general_forwarding_matches_golden_file() {
    let host = ruleset(vec![zone("tg-front", &FRONT, false)], []);
    let uplinks = vec![("eth0".to_owned(), false), ("eth0".to_owned(), true)];
    let bridges = ["their-bridge".to_owned()].into();
    is_golden("no-router", &Ruleset { uplinks, bridges, ..host }, false);
}

/// Port guards verify all sources, so no hook does.
#[test]
fn verified_sources_match_golden_file() {
    let verified = Zone { verified: true, ..zone("tg-front", &FRONT, false) };
    is_golden("verified", &ruleset(vec![verified], []), false);
}

/// Two ports with the same target, and more ports than fit into one rule.
#[test]
fn many_ports_match_golden_file() {
    let more =
        (0..20).map(|port| opening(Protocol::Tcp, &format!("0.0.0.0:{}", 9000 + port), None));
    let two = [8080, 8081]
        .map(|port| opening(Protocol::Tcp, &format!("0.0.0.0:{port}"), Some("10.9.1.2:80")));
    let zones = vec![zone("tg-front", &FRONT[..1], false)];
    is_golden("many-ports", &ruleset(zones, more.chain(two)), false);
}
