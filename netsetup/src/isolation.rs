//! What keeps a network closed: to the outside, and to the other networks.

use crate::desired::setting;
use crate::{Fact, Network, Place, Reach, Rule, Subnet};
use tidegate_model::registry;

/// A way to keep networks closed.
pub trait Isolation: Send + Sync {
    /// What it is called where one is told: a word.
    fn name(&self) -> &'static str;

    /// What `network` needs, in the order to make it, behind its bridge and before its addresses.
    fn facts(&self, network: &Network) -> Vec<Fact>;
}

/// Without a firewall: by forwarding switched off on the bridge, and by policy rules.
///
/// Either would do on a host that forwards for nobody. Both are there on every host, because a host that does not forward now
/// may begin to at any time: a Docker daemon that starts switches forwarding on for all interfaces, ours included.
///
/// - Nothing that comes in by the bridge is forwarded: `forwarding` is off there (IPv4 judges by the interface a packet came in
///   by; IPv6 before Linux 6.17 by `all` alone, net/ipv6/ip6_output.c), and a rule makes every destination
///   unreachable for it. The host's own addresses are not concerned: the `local` table is asked before any rule of ours.
/// - Nothing that comes in elsewhere is forwarded to the subnet: a rule makes it unreachable, behind one that exempts what the
///   host itself sends. It takes two: a single `not iif lo to SUBNET` would negate both halves.
/// - A network without IPv6 subnet has no IPv6 at all, or link-local addresses would be a way in.
#[derive(Clone, Copy, Debug, Default)]
pub struct WithoutFirewall;

impl Isolation for WithoutFirewall {
    fn name(&self) -> &'static str {
        "without-firewall"
    }

    fn facts(&self, network: &Network) -> Vec<Fact> {
        let bridge = &network.bridge.name;
        let set = |name: String, value| setting(Place::Host, name, value);
        let mut facts = vec![set(format!("net.ipv4.conf.{bridge}.forwarding"), "0")];
        if network.has(true) {
            facts.push(set(format!("net.ipv6.conf.{bridge}.accept_ra"), "0"));
            facts.push(set(format!("net.ipv6.conf.{bridge}.forwarding"), "0"));
        } else {
            facts.push(set(format!("net.ipv6.conf.{bridge}.disable_ipv6"), "1"));
        }
        for Subnet { subnet, gateway } in &network.subnets {
            let v6 = gateway.is_ipv6();
            let to = Some(subnet.trunc());
            facts.push(Fact::Rule(Rule {
                priority: registry::GUARD_EXEMPTION_PRIORITY,
                v6,
                from_interface: Some("lo".into()),
                to,
                reach: Reach::Main,
            }));
            facts.push(Fact::Rule(Rule {
                priority: registry::GUARD_PRIORITY,
                v6,
                from_interface: None,
                to,
                reach: Reach::Nothing,
            }));
            facts.push(Fact::Rule(Rule {
                priority: registry::GUARD_PRIORITY,
                v6,
                from_interface: Some(bridge.clone()),
                to: None,
                reach: Reach::Nothing,
            }));
        }
        facts
    }
}
