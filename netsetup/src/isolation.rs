//! What keeps a network closed: to the outside, and to the other networks.

use crate::desired::setting;
use crate::{Desired, Fact, FirewallKind, Network, Passes, Place, Reach, Rule, Uplink};
use ipnet::IpNet;
use std::fmt;
use tidegate_model::registry;

/// A way to keep networks closed.
pub trait Isolation: fmt::Debug + Send + Sync {
    /// What it is called where one is told: a word.
    fn name(&self) -> &'static str;

    /// What all networks need together, before the first of them.
    fn groundwork(&self, _desired: &Desired) -> Vec<Fact> {
        Vec::new()
    }

    /// What `network` needs, in the order to make it, behind its bridge and before its addresses.
    fn facts(&self, network: &Network) -> Vec<Fact>;
}

/// Without a firewall: by forwarding switched off on the bridge, and by policy rules.
///
/// Either would do on a host that forwards for nobody. Both are there on every host, because a host
/// that does not forward now may begin to at any time: a Docker daemon that starts switches
/// forwarding on for all interfaces, ours included.
///
/// - Nothing that comes in by the bridge is forwarded: `forwarding` is off there (IPv4 judges by
///   the interface a packet came in by; IPv6 before Linux 6.17 by `all` alone,
///   net/ipv6/ip6_output.c), and a rule makes every destination unreachable for it. The host's own
///   addresses are not concerned: the `local` table is asked before any rule of ours.
/// - Nothing that comes in elsewhere is forwarded to the subnet: a rule makes it unreachable,
///   behind one that exempts what the host itself sends. It takes two: a single
///   `not iif lo to SUBNET` would negate both halves.
/// - A network without IPv6 subnet has no IPv6 at all, or link-local addresses would be a way in.
#[derive(Clone, Copy, Debug, Default)]
pub struct RuleIsolation {
    /// BPF programs are available: a [gate](Fact::Gate) at the egress of each bridge closes it
    /// whatever policy rules others insert before ours.
    pub gated: bool,
}

impl Isolation for RuleIsolation {
    fn name(&self) -> &'static str {
        "without-firewall"
    }

    fn facts(&self, network: &Network) -> Vec<Fact> {
        let programs = self.gated.then(|| closed_by_programs(network));
        programs.into_iter().flatten().chain(closed(network)).collect()
    }
}

/// Without a firewall, and with egress by the NAT engine: as [`RuleIsolation`], but what comes
/// from a network that is not internal is led into the engine's device, and what comes out of that
/// is let into the networks.
///
/// The guards come first, so that what goes from one network to another gets nowhere. Behind the
/// egress is another one: when the engine has ended, and its device and routes with it, nothing
/// that comes from a network is forwarded.
#[derive(Clone, Debug)]
pub struct NatIsolation {
    /// The engine's device, which is there before the networks.
    pub device: String,
    /// The table that has its routes.
    pub table: u32,
    /// As of [`RuleIsolation`].
    pub gated: bool,
}

impl Isolation for NatIsolation {
    fn name(&self) -> &'static str {
        RuleIsolation::default().name()
    }

    fn groundwork(&self, desired: &Desired) -> Vec<Fact> {
        let has =
            |v6: bool| desired.networks.iter().any(|network| !network.internal && network.has(v6));
        let link = || self.device.clone();
        let families: Vec<bool> = [false, true].into_iter().filter(|v6| has(*v6)).collect();
        if families.is_empty() {
            return Vec::new();
        }
        let mut facts = vec![
            Fact::EngineDevice { link: link() },
            Fact::Up { place: Place::Host, link: link() },
        ];
        for v6 in families {
            facts.push(Fact::EngineRoute { link: link(), table: self.table, v6 });
            facts.push(Fact::Forwarding { link: link(), v6 });
        }
        facts
    }

    fn facts(&self, network: &Network) -> Vec<Fact> {
        if network.internal {
            return RuleIsolation { gated: self.gated }.facts(network);
        }
        let bridge = &network.bridge.name;
        let gate = self.gated.then(|| gate(network, Passes::From(self.device.clone())));
        let mut facts: Vec<Fact> = gate.into_iter().chain(open(network)).collect();
        for to in network.subnets.iter().map(|subnet| subnet.subnet.trunc()) {
            let v6 = is_v6(to);
            facts.extend(shut(to));
            let from_engine = Rule { from_interface: Some(self.device.clone()), ..exemption(v6) };
            facts.push(Fact::Rule(Rule { to: Some(to), ..from_engine }));
            let from_network = |priority, reach, from| {
                let from_interface = Some(bridge.clone());
                Fact::Rule(Rule { priority, reach, from_interface, from, ..guard(v6) })
            };
            facts.push(from_network(registry::NO_EGRESS_PRIORITY, Reach::Nothing, None));
            // The engine takes a source address for the endpoint that has it. Port guards verify
            // it, except where an endpoint may send from any address.
            let engine = Reach::Table(self.table);
            facts.push(from_network(registry::EGRESS_PRIORITY, engine, Some(to)));
        }
        facts
    }
}

/// With a firewall: by its rules, and behind them by the policy rules of [`RuleIsolation`], with
/// an exemption for what the firewall has marked.
///
/// Rules of a firewall can be flushed by whoever likes to. The policy rules are then what keeps the
/// networks closed: without its rules the firewall marks nothing, and nothing but the host itself
/// reaches a container. Where the kernel has them, [gates](Fact::Gate) at the exits of the bridges
/// do the same for networks that are not internal, and cost a packet less than the mere presence of
/// a policy rule does. What containers send is not concerned: from a network that is not internal
/// it goes the way that the host's own routes and rules say.
///
/// A host that forwards for nobody is not made a router. The links by which answers to containers
/// come ([`Uplink`]) forward, and what else comes in there goes nowhere, as before.
#[derive(Clone, Debug)]
pub struct FirewallIsolation {
    /// Which one.
    pub firewall: FirewallKind,
    /// Whose rules.
    pub owner: String,
    /// It has gates ([`Firewall::gate`](crate::Firewall)).
    pub gated: bool,
}

impl Isolation for FirewallIsolation {
    fn name(&self) -> &'static str {
        self.firewall.name()
    }

    fn groundwork(&self, desired: &Desired) -> Vec<Fact> {
        if desired.networks.is_empty() {
            return Vec::new();
        }
        let mut facts = vec![Fact::Ruleset { firewall: self.firewall, owner: self.owner.clone() }];
        for Uplink { link, v4, v6, .. } in desired.uplinks.iter().filter(|uplink| uplink.ours) {
            for v6 in v4.then_some(false).into_iter().chain(v6.then_some(true)) {
                facts.push(Fact::Rule(Rule {
                    from_interface: Some(link.clone()),
                    reach: Reach::Silence,
                    ..guard(v6)
                }));
                facts.push(Fact::Forwarding { link: link.clone(), v6 });
            }
        }
        if self.gated {
            facts.extend(past_uplinks(desired));
        }
        facts.extend(reply_paths(desired));
        facts
    }

    fn facts(&self, network: &Network) -> Vec<Fact> {
        let link = &network.bridge.name;
        let mut facts = Vec::new();
        if self.firewall == FirewallKind::Nftables {
            // Its rules know bridges by that.
            facts.push(Fact::Group {
                link: link.clone(),
                group: registry::bridge_group(&self.owner),
            });
        }
        if network.internal {
            facts.extend(self.gated.then(|| closed_by_programs(network)).into_iter().flatten());
            facts.extend(closed(network));
        } else if self.gated {
            facts.push(gate(network, Passes::Marked));
            facts.extend(open(network));
        } else {
            facts.extend(open(network));
            for to in network.subnets.iter().map(|subnet| subnet.subnet.trunc()) {
                facts.extend(shut(to));
                facts.push(Fact::Rule(Rule { to: Some(to), marked: true, ..exemption(is_v6(to)) }));
            }
        }
        facts
    }
}

/// What leads answers of ports that the kernel translates to the uplink that was asked.
fn reply_paths(desired: &Desired) -> impl Iterator<Item = Fact> + '_ {
    desired.reply_paths.iter().flat_map(|path| {
        let made = path.made.map(|gateway| Fact::ReplyRoute {
            link: path.link.clone(),
            table: path.table,
            gateway,
        });
        let networks =
            desired.networks.iter().filter(|network| !network.internal && network.has(path.v6));
        let rules = networks.flat_map(|network| {
            let rule = |priority, reach| {
                let from_interface = Some(network.bridge.name.clone());
                Fact::Rule(Rule {
                    priority,
                    reach,
                    from_interface,
                    uplink: path.number,
                    ..guard(path.v6)
                })
            };
            [
                rule(registry::UPLINK_MAIN_PRIORITY, Reach::MainButDefault),
                rule(registry::UPLINK_PRIORITY, Reach::Table(path.table)),
            ]
        });
        made.into_iter().chain(rules)
    })
}

/// What comes in by an uplink of `desired` goes nowhere else than to networks that have egress.
/// Which of it may is told at their gates.
fn past_uplinks(desired: &Desired) -> impl Iterator<Item = Fact> + '_ {
    let has_uplink =
        |v6: bool| desired.uplinks.iter().any(|uplink| if v6 { uplink.v6 } else { uplink.v4 });
    let subnets =
        desired.networks.iter().filter(|network| !network.internal).flat_map(|one| &one.subnets);
    let subnets =
        subnets.map(|subnet| subnet.subnet.trunc()).filter(move |to| has_uplink(is_v6(*to)));
    subnets.map(|to| Fact::Rule(Rule { to: Some(to), ..exemption(is_v6(to)) }))
}

/// What closes a network whatever rules there are. One that is not internal is closed to the engine
/// as well, where there is none.
fn closed_by_programs(network: &Network) -> Vec<Fact> {
    let link = network.bridge.name.clone();
    let gateways = network.subnets.iter();
    let gateways =
        gateways.filter_map(|one| IpNet::new(one.gateway, one.subnet.prefix_len()).ok()).collect();
    let guard = network.internal.then_some(Fact::InternalGuard { link, gateways });
    guard.into_iter().chain([gate(network, Passes::Nothing)]).collect()
}

fn gate(network: &Network, passes: Passes) -> Fact {
    Fact::Gate { link: network.bridge.name.clone(), passes }
}

/// What comes from the network may be forwarded.
fn open(network: &Network) -> Vec<Fact> {
    let bridge = &network.bridge.name;
    let mut facts = vec![setting(Place::Host, format!("net.ipv4.conf.{bridge}.forwarding"), "1")];
    facts.push(ipv6(network));
    if network.has(true) {
        facts.push(Fact::Forwarding { link: bridge.clone(), v6: true });
    }
    facts
}

/// No way in, and none out.
fn closed(network: &Network) -> Vec<Fact> {
    let bridge = &network.bridge.name;
    let mut facts = vec![setting(Place::Host, format!("net.ipv4.conf.{bridge}.forwarding"), "0")];
    facts.push(ipv6(network));
    if network.has(true) {
        facts.push(setting(Place::Host, format!("net.ipv6.conf.{bridge}.forwarding"), "0"));
    }
    for to in network.subnets.iter().map(|subnet| subnet.subnet.trunc()) {
        facts.extend(shut(to));
        facts.push(Fact::Rule(Rule { from_interface: Some(bridge.clone()), ..guard(is_v6(to)) }));
    }
    facts
}

/// IPv6 on the bridge, or none.
fn ipv6(network: &Network) -> Fact {
    let bridge = &network.bridge.name;
    let (name, value) = if network.has(true) { ("accept_ra", "0") } else { ("disable_ipv6", "1") };
    setting(Place::Host, format!("net.ipv6.conf.{bridge}.{name}"), value)
}

/// Nothing but the host itself reaches the subnet `to`.
fn shut(to: IpNet) -> [Fact; 2] {
    let (own, all) = (exemption(is_v6(to)), guard(is_v6(to)));
    [
        Fact::Rule(Rule { from_interface: Some("lo".into()), to: Some(to), ..own }),
        Fact::Rule(Rule { to: Some(to), ..all }),
    ]
}

fn is_v6(net: IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

fn exemption(v6: bool) -> Rule {
    Rule { priority: registry::GUARD_EXEMPTION_PRIORITY, reach: Reach::Main, ..guard(v6) }
}

fn guard(v6: bool) -> Rule {
    Rule {
        priority: registry::GUARD_PRIORITY,
        v6,
        from_interface: None,
        from: None,
        to: None,
        marked: false,
        uplink: 0,
        reach: Reach::Nothing,
    }
}
