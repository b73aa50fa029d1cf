//! Isolation of networks from the outside and from each other.

use crate::desired::setting;
use crate::{Desired, Fact, FirewallKind, Network, Passes, Place, Reach, Rule, Uplink};
use ipnet::IpNet;
use std::fmt;
use tidegate_model::registry;

/// An isolation mechanism.
pub trait Isolation: fmt::Debug + Send + Sync {
    /// Name in logs and reports, one word.
    fn name(&self) -> &'static str;

    /// Returns the facts shared by all networks, to be created before the first network.
    fn shared_facts(&self, _desired: &Desired) -> Vec<Fact> {
        Vec::new()
    }

    /// Returns the facts of `network` in order of creation. They are created after its bridge and
    /// before its addresses.
    fn facts(&self, network: &Network) -> Vec<Fact>;
}

/// BPF programs that can be attached to bridges on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BridgePrograms {
    /// [Gates](Fact::Gate) at the egress of bridges.
    pub gates: bool,
    /// [Guards](Fact::BridgeGuard) at the ingress of bridges.
    pub bridge_guards: bool,
}

/// Isolation without a firewall, by disabled forwarding on the bridge and by policy rules.
///
/// On a host that does not forward, either measure would be sufficient. Both are used on every
/// host, because forwarding may be enabled at any time: a starting Docker daemon enables it for all
/// interfaces, including tidegate's.
///
/// - Packets from the bridge are not forwarded: `forwarding` is off for the bridge, and a rule
///   makes every destination unreachable. IPv4 evaluates the setting of the input interface; IPv6
///   before Linux 6.17 evaluates `all` only (net/ipv6/ip6_output.c). The host's own addresses stay
///   reachable, because the `local` table precedes all rules of tidegate.
/// - Packets from other interfaces are not forwarded to the subnet: a rule makes it unreachable,
///   after a rule that exempts packets sent by the host. Two rules are necessary, because `not iif
///   lo to SUBNET` would negate both conditions.
/// - A network without an IPv6 subnet has IPv6 disabled, because link-local addresses would
///   otherwise bypass the isolation.
#[derive(Clone, Copy, Debug, Default)]
pub struct RuleIsolation {
    /// Programs that keep a network closed even if foreign policy rules precede tidegate's.
    pub programs: BridgePrograms,
}

impl Isolation for RuleIsolation {
    fn name(&self) -> &'static str {
        "without-firewall"
    }

    fn facts(&self, network: &Network) -> Vec<Fact> {
        let guard = bridge_guard(network, self.programs);
        guard.chain(closing_gate(network, self.programs)).chain(closed(network)).collect()
    }
}

/// Isolation without a firewall, with egress through the NAT engine. Extends [`RuleIsolation`]:
/// packets from networks that are not internal are routed to the engine's device, and packets from
/// that device may enter the networks.
///
/// The guard rules come first and block traffic between networks. Another guard rule follows the
/// egress rule: after the engine has exited, together with its device and routes, packets from a
/// network are not forwarded.
#[derive(Clone, Debug)]
pub struct NatIsolation {
    /// The engine's device, which exists before the networks.
    pub device: String,
    /// The routing table with its routes.
    pub table: u32,
    /// Same as in [`RuleIsolation`].
    pub programs: BridgePrograms,
}

impl Isolation for NatIsolation {
    fn name(&self) -> &'static str {
        RuleIsolation::default().name()
    }

    fn shared_facts(&self, desired: &Desired) -> Vec<Fact> {
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
            return RuleIsolation { programs: self.programs }.facts(network);
        }
        let bridge = &network.bridge.name;
        let gate = self.programs.gates.then(|| gate(network, Passes::From(self.device.clone())));
        let sources = bridge_guard(network, self.programs);
        let mut facts: Vec<Fact> = sources.chain(gate).chain(open(network)).collect();
        for to in network.subnets.iter().map(|subnet| subnet.subnet.trunc()) {
            let v6 = is_v6(to);
            facts.extend(guard_subnet(to));
            let from_engine = Rule { from_interface: Some(self.device.clone()), ..exemption(v6) };
            facts.push(Fact::Rule(Rule { to: Some(to), ..from_engine }));
            let from_network = |priority, reach, from| {
                let from_interface = Some(bridge.clone());
                Fact::Rule(Rule { priority, reach, from_interface, from, ..guard(v6) })
            };
            facts.push(from_network(registry::NO_EGRESS_PRIORITY, Reach::Nothing, None));
            // The engine identifies an endpoint by its source address. Port guards verify this
            // address, except for endpoints with `any_address`.
            let engine = Reach::Table(self.table);
            facts.push(from_network(registry::EGRESS_PRIORITY, engine, Some(to)));
        }
        facts
    }
}

/// Isolation by firewall rules, backed by the policy rules of [`RuleIsolation`] with an exemption
/// for packets that the firewall has marked.
///
/// Other programs can flush firewall rules. The policy rules then keep the networks closed: without
/// firewall rules no packet is marked, and only the host itself reaches containers. Where
/// available, [gates](Fact::Gate) at the egress of the bridges replace them for networks that are
/// not internal. A gate costs a packet less than the mere presence of a policy rule. Packets from
/// containers are unaffected: from a network that is not internal, they follow the host's own
/// routes and rules.
///
/// A host that does not forward is not turned into a router. Forwarding is enabled on the links
/// that receive replies to containers ([`Uplink`]), and all other packets received there are still
/// dropped.
#[derive(Clone, Debug)]
pub struct FirewallIsolation {
    /// The firewall.
    pub firewall: FirewallKind,
    /// Owner of the rules.
    pub owner: String,
    /// Programs that can be attached; `gates` as of [`Firewall::gate`](crate::Firewall).
    pub programs: BridgePrograms,
}

impl Isolation for FirewallIsolation {
    fn name(&self) -> &'static str {
        self.firewall.name()
    }

    fn shared_facts(&self, desired: &Desired) -> Vec<Fact> {
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
        if self.programs.gates {
            facts.extend(uplink_exemptions(desired));
        }
        facts.extend(reply_paths(desired));
        facts
    }

    fn facts(&self, network: &Network) -> Vec<Fact> {
        let link = &network.bridge.name;
        let mut facts = Vec::new();
        if self.firewall == FirewallKind::Nftables {
            // The nftables rules match bridges by this group.
            facts.push(Fact::Group {
                link: link.clone(),
                group: registry::bridge_group(&self.owner),
            });
        }
        if network.internal {
            facts.extend(bridge_guard(network, self.programs));
            facts.extend(closing_gate(network, self.programs));
            facts.extend(closed(network));
        } else if self.programs.gates {
            // Before the kernel answers an invalid packet, with an error to a forged source.
            facts.extend(bridge_guard(network, self.programs));
            facts.push(gate(network, Passes::Marked));
            facts.extend(open(network));
        } else {
            facts.extend(bridge_guard(network, self.programs));
            facts.extend(open(network));
            for to in network.subnets.iter().map(|subnet| subnet.subnet.trunc()) {
                facts.extend(guard_subnet(to));
                facts.push(Fact::Rule(Rule { to: Some(to), marked: true, ..exemption(is_v6(to)) }));
            }
        }
        facts
    }
}

/// Routes and rules that send replies of kernel-published ports through the uplink of the request.
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

/// Exemptions for packets from uplinks to the networks with egress. The gates decide which of these
/// packets pass.
fn uplink_exemptions(desired: &Desired) -> impl Iterator<Item = Fact> + '_ {
    let has_uplink =
        |v6: bool| desired.uplinks.iter().any(|uplink| if v6 { uplink.v6 } else { uplink.v4 });
    let subnets =
        desired.networks.iter().filter(|network| !network.internal).flat_map(|one| &one.subnets);
    let subnets =
        subnets.map(|subnet| subnet.subnet.trunc()).filter(move |to| has_uplink(is_v6(*to)));
    subnets.map(|to| Fact::Rule(Rule { to: Some(to), ..exemption(is_v6(to)) }))
}

/// The guard at the bridge of `network`. For an internal network it closes the network
/// independently of rules. For others it rejects forged sources where no firewall does: an endpoint
/// with `any_address` could otherwise forge replies to sockets of the host and of the NAT engine.
fn bridge_guard(network: &Network, programs: BridgePrograms) -> impl Iterator<Item = Fact> {
    let own = network.subnets.iter().filter(|_| network.overlay.is_none());
    let gateways = own.filter_map(|one| IpNet::new(one.gateway, one.subnet.prefix_len()).ok());
    let gateways = gateways.collect();
    let link = network.bridge.name.clone();
    let guard = Fact::BridgeGuard { link, gateways, internal: network.internal };
    programs.bridge_guards.then_some(guard).into_iter()
}

/// A gate that closes the network independently of rules. Used for internal networks, and for all
/// networks without egress.
fn closing_gate(network: &Network, programs: BridgePrograms) -> Option<Fact> {
    programs.gates.then(|| gate(network, Passes::Nothing))
}

fn gate(network: &Network, passes: Passes) -> Fact {
    Fact::Gate { link: network.bridge.name.clone(), passes }
}

/// Facts that permit forwarding of packets from the network.
fn open(network: &Network) -> Vec<Fact> {
    let bridge = &network.bridge.name;
    let mut facts = vec![setting(Place::Host, format!("net.ipv4.conf.{bridge}.forwarding"), "1")];
    facts.extend(ipv6(network));
    if network.has(true) {
        facts.push(Fact::Forwarding { link: bridge.clone(), v6: true });
    }
    facts
}

/// Facts that block forwarding to and from the network.
fn closed(network: &Network) -> Vec<Fact> {
    let bridge = &network.bridge.name;
    let mut facts = vec![setting(Place::Host, format!("net.ipv4.conf.{bridge}.forwarding"), "0")];
    facts.extend(ipv6(network));
    if network.has(true) {
        facts.push(setting(Place::Host, format!("net.ipv6.conf.{bridge}.forwarding"), "0"));
    }
    for to in network.subnets.iter().map(|subnet| subnet.subnet.trunc()) {
        let [own, others] = guard_subnet(to);
        // The host has no route to an overlay network, and must not use its default route.
        facts.extend((network.overlay.is_none()).then_some(own));
        facts.push(others);
        facts.push(Fact::Rule(Rule { from_interface: Some(bridge.clone()), ..guard(is_v6(to)) }));
    }
    facts
}

/// Returns the IPv6 settings of the bridge.
fn ipv6(network: &Network) -> Vec<Fact> {
    let bridge = &network.bridge.name;
    let settings: &[_] = match (network.has(true), network.overlay) {
        (false, _) => &[("disable_ipv6", "1")],
        (true, None) => &[("accept_ra", "0")],
        // The host has no address on the bridge, not even a link-local one
        // (`IN6_ADDR_GEN_MODE_NONE`). IPv6 stays enabled, because the bridge needs neighbour
        // entries to answer solicitations.
        (true, Some(_)) => &[("accept_ra", "0"), ("addr_gen_mode", "1")],
    };
    let fact = |(name, value): &(&str, &str)| {
        setting(Place::Host, format!("net.ipv6.conf.{bridge}.{name}"), value)
    };
    settings.iter().map(fact).collect()
}

/// Rules that restrict access to the subnet `to` to the host itself.
fn guard_subnet(to: IpNet) -> [Fact; 2] {
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
