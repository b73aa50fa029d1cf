//! Analysis of repairs: facts to restore, and root causes among the restored facts. Pure.
//!
//! The kernel removes dependent objects implicitly: everything on a deleted link, the routes of a
//! link with its last address, the IPv6 addresses and routes of a link that is set down. All of
//! them are restored, but only the root cause is reported.

use crate::{Fact, Place, SetupError};
use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// The type of a restored object, as shown in logs and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RepairKind {
    /// A bridge.
    Bridge,
    /// A veth pair, regardless of which end was deleted.
    Veth,
    /// The TUN device of the NAT engine.
    Tun,
    /// A link that was set down, or whose group was changed.
    Link,
    /// A link that was removed from its bridge, or whose bridge port settings were changed.
    Port,
    /// A forwarding database entry of a bridge.
    Fdb,
    /// An address.
    Address,
    /// A route.
    Route,
    /// A sysctl.
    Sysctl,
    /// A policy rule.
    Rule,
    /// An nftables table, or iptables chains.
    Table,
    /// A BPF program.
    Program,
    /// The socket of a published port.
    Listener,
    /// A socket of a DNS server, or its redirection rules.
    Dns,
}

impl RepairKind {
    /// All types.
    pub const ALL: [Self; 14] = [
        Self::Bridge,
        Self::Veth,
        Self::Tun,
        Self::Link,
        Self::Port,
        Self::Fdb,
        Self::Address,
        Self::Route,
        Self::Sysctl,
        Self::Rule,
        Self::Table,
        Self::Program,
        Self::Listener,
        Self::Dns,
    ];

    /// Value of the metric label `kind`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Veth => "veth",
            Self::Tun => "tun",
            Self::Link => "link",
            Self::Port => "port",
            Self::Fdb => "fdb",
            Self::Address => "address",
            Self::Route => "route",
            Self::Sysctl => "sysctl",
            Self::Rule => "rule",
            Self::Table => "table",
            Self::Program => "program",
            Self::Listener => "listener",
            Self::Dns => "dns",
        }
    }

    /// Returns the type of `fact`.
    #[must_use]
    pub fn of(fact: &Fact) -> Self {
        match fact {
            Fact::Bridge { .. } => Self::Bridge,
            Fact::Veth { .. } => Self::Veth,
            Fact::EngineDevice { .. } => Self::Tun,
            Fact::Up { .. } | Fact::Group { .. } => Self::Link,
            Fact::Port { .. } => Self::Port,
            Fact::Station { .. } => Self::Fdb,
            Fact::Address { .. } => Self::Address,
            Fact::SubnetRoute { .. }
            | Fact::DefaultRoute { .. }
            | Fact::ReplyRoute { .. }
            | Fact::EngineRoute { .. } => Self::Route,
            Fact::Setting { .. } | Fact::Forwarding { .. } => Self::Sysctl,
            Fact::Rule(_) => Self::Rule,
            Fact::GuardTable { .. } | Fact::Ruleset { .. } => Self::Table,
            Fact::Gate { .. }
            | Fact::PortGuard { .. }
            | Fact::BridgeGuard { .. }
            | Fact::SourceGuard { .. }
            | Fact::GuardedSubnet(_) => Self::Program,
        }
    }
}

/// The result of a repair.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Removed facts that were restored, without implicitly removed ones.
    pub restored: Vec<Fact>,
    /// Failures: the endpoint (`None` for the host) and the error.
    pub failed: Vec<(Option<String>, SetupError)>,
    /// Endpoints without their veth pair that were not part of this repair.
    pub detached: BTreeSet<String>,
}

/// Inserts the facts that the kernel adds implicitly, at the places where it adds them: on-link
/// routes of addresses, and the address of a loopback interface.
pub(crate) fn with_derived(facts: Vec<Fact>) -> Vec<Fact> {
    let mut all: Vec<Fact> = Vec::with_capacity(facts.len() * 2);
    for fact in facts {
        let derived: Vec<Fact> = match &fact {
            Fact::Up { place, link } if *place != Place::Host && link == "lo" => {
                let loopback = IpNet::new_assert(Ipv4Addr::LOCALHOST.into(), 8);
                vec![Fact::Address { place: place.clone(), link: link.clone(), address: loopback }]
            }
            Fact::Up { place: of, link: on } => {
                let routes = all.iter().filter_map(|fact| match fact {
                    Fact::Address { place, link, address } if place == of && link == on => {
                        Some(Fact::SubnetRoute {
                            place: of.clone(),
                            link: on.clone(),
                            address: *address,
                        })
                    }
                    _ => None,
                });
                routes.filter(|route| !is_host_route(route)).collect()
            }
            _ => Vec::new(),
        };
        all.push(fact);
        all.extend(derived);
    }
    all
}

/// The kernel adds no on-link route for a single-address prefix.
fn is_host_route(fact: &Fact) -> bool {
    matches!(fact, Fact::SubnetRoute { address, .. } if address.prefix_len() == address.max_prefix_len())
}

/// Returns the facts of `restored` that were not removed implicitly with another one.
pub(crate) fn causes(restored: Vec<Fact>) -> Vec<Fact> {
    let all = restored.clone();
    let is_cause = |fact: &Fact| !all.iter().any(|other| removes_implicitly(other, fact));
    restored.into_iter().filter(is_cause).collect()
}

/// Returns whether the kernel removes `fact` implicitly with `cause`.
fn removes_implicitly(cause: &Fact, fact: &Fact) -> bool {
    if cause == fact {
        return false;
    }
    if cause.links().any(|link| fact.on().any(|on| on == link)) {
        return true;
    }
    let on = |fact: &Fact| {
        fact.on().next().map(|(place, link)| (place.map(str::to_owned), link.to_owned()))
    };
    let together = on(cause).is_some() && on(cause) == on(fact);
    let is_route = matches!(fact, Fact::SubnetRoute { .. } | Fact::DefaultRoute { .. });
    match (cause, fact) {
        (Fact::Up { .. }, Fact::Address { .. } | Fact::EngineRoute { .. }) => together,
        (Fact::EngineDevice { link }, Fact::Forwarding { link: of, .. }) => link == of,
        (Fact::Up { .. } | Fact::Address { .. } | Fact::SubnetRoute { .. }, _) if is_route => {
            together
                && !matches!((cause, fact), (Fact::SubnetRoute { .. }, Fact::SubnetRoute { .. }))
        }
        // Toggling `disable_ipv6` removes the IPv6 addresses.
        (Fact::Setting { name, .. }, Fact::Address { .. }) => {
            together && name.ends_with(".disable_ipv6")
        }
        (Fact::Port { link, .. }, Fact::Station { link: port, .. }) => link == port,
        // The port guards are chains of the table.
        (Fact::GuardTable { .. }, Fact::PortGuard { .. }) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Interface;
    use tidegate_model::MacAddress;

    fn place() -> Place {
        Place::Endpoint("web".into())
    }

    fn address(text: &str) -> Fact {
        Fact::Address { place: place(), link: "eth0".into(), address: text.parse().unwrap() }
    }

    fn up(link: &str) -> Fact {
        Fact::Up { place: place(), link: link.into() }
    }

    fn subnet(text: &str) -> Fact {
        Fact::SubnetRoute { place: place(), link: "eth0".into(), address: text.parse().unwrap() }
    }

    fn default_route() -> Fact {
        let gateway = "10.9.1.1".parse().unwrap();
        Fact::DefaultRoute { place: place(), link: "eth0".into(), gateway }
    }

    fn veth() -> Fact {
        let interface =
            |name: &str| Interface { name: name.into(), mac: MacAddress([2, 0, 0, 0, 0, 1]) };
        Fact::Veth {
            interface: interface("tgv1"),
            endpoint: "web".into(),
            inside: interface("eth0"),
            mtu: 1500,
        }
    }

    #[test]
    fn on_link_routes_follow_their_link_and_precede_gateway_routes() {
        let facts = vec![up("lo"), address("10.9.1.2/24"), up("eth0"), default_route()];
        let loopback = Fact::Address {
            place: place(),
            link: "lo".into(),
            address: "127.0.0.1/8".parse().unwrap(),
        };
        assert_eq!(
            with_derived(facts),
            [
                up("lo"),
                loopback,
                address("10.9.1.2/24"),
                up("eth0"),
                subnet("10.9.1.2/24"),
                default_route()
            ]
        );
        assert_eq!(
            with_derived(vec![address("fd00::1/128"), up("eth0")]).len(),
            2,
            "no on-link route"
        );
    }

    #[test]
    fn implicitly_removed_facts_are_not_reported() {
        let everything = vec![
            veth(),
            Fact::Port { link: "tgv1".into(), bridge: "tg-a".into(), isolated: false },
            address("10.9.1.2/24"),
            up("eth0"),
            subnet("10.9.1.2/24"),
            default_route(),
        ];
        assert_eq!(causes(everything.clone()), [veth()]);
        assert_eq!(causes(everything[2..].to_vec()), [up("eth0")], "set down");
        assert_eq!(causes(vec![address("10.9.1.2/24"), default_route()]), [address("10.9.1.2/24")]);
        assert_eq!(causes(vec![subnet("10.9.1.2/24"), default_route()]), [subnet("10.9.1.2/24")]);
        assert_eq!(causes(vec![default_route()]), [default_route()]);
        let two = vec![address("10.9.1.2/24"), address("fd09::2/64")];
        assert_eq!(causes(two.clone()), two, "independent facts");
    }

    #[test]
    fn engine_device_implies_the_facts_on_it() {
        let link = || "tgt-1".to_owned();
        let device = Fact::EngineDevice { link: link() };
        let up = Fact::Up { place: Place::Host, link: link() };
        let route = |v6| Fact::EngineRoute { link: link(), table: 7, v6 };
        let forwarding = Fact::Forwarding { link: link(), v6: false };
        let of_another = Fact::Forwarding { link: "eth0".into(), v6: false };
        let everything = vec![
            device.clone(),
            up.clone(),
            route(false),
            route(true),
            forwarding,
            of_another.clone(),
        ];
        assert_eq!(causes(everything.clone()), [device.clone(), of_another]);
        assert_eq!(causes(everything[1..4].to_vec()), [up]);
        assert_eq!(causes(everything[2..4].to_vec()), [route(false), route(true)]);
        assert_eq!(RepairKind::of(&device).as_str(), "tun");
    }

    #[test]
    fn bridge_port_implies_its_station() {
        let port = Fact::Port { link: "tgv1".into(), bridge: "tg-a".into(), isolated: false };
        let station =
            Fact::Station { link: "tgv1".into(), station: MacAddress([2, 0, 0, 0, 0, 1]) };
        assert_eq!(causes(vec![port.clone(), station.clone()]), [port]);
        assert_eq!(RepairKind::of(&station).as_str(), "fdb");
        assert_eq!(causes(vec![station]).len(), 1, "independent fact");
    }
}
