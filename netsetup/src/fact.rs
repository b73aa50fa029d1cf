//! Facts about kernel state, and operations that add or remove them.

use crate::FirewallKind;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use tidegate_model::{MacAddress, registry};

/// A network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Place {
    /// The namespace of the bridges.
    Host,
    /// The namespace of the named endpoint.
    Endpoint(String),
}

impl Place {
    fn endpoint(&self) -> Option<&str> {
        match self {
            Self::Host => None,
            Self::Endpoint(name) => Some(name),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host"),
            Self::Endpoint(name) => write!(f, "endpoint {name:?}"),
        }
    }
}

/// An interface of tidegate, identified by name and MAC address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Interface {
    /// Name, at most 15 bytes (`IFNAMSIZ`).
    pub name: String,
    /// MAC address, chosen by tidegate and assigned when the interface is created.
    pub mac: MacAddress,
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A policy rule (ip-rule(8)).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Priority; rules with lower values are evaluated first.
    pub priority: u32,
    /// An IPv6 rule instead of an IPv4 rule.
    pub v6: bool,
    /// Input interface (`iif`); `lo` matches packets sent by the host.
    pub from_interface: Option<String>,
    /// Source prefix.
    #[serde(default)]
    pub from: Option<IpNet>,
    /// Destination prefix.
    pub to: Option<IpNet>,
    /// Match packets marked by tidegate's firewall rules (`fwmark`
    /// [`FORWARD_MARK`](tidegate_model::registry::FORWARD_MARK)).
    #[serde(default)]
    pub marked: bool,
    /// Match replies that use the [reply path](crate::ReplyPath) with this number; 0 disables the
    /// condition.
    #[serde(default)]
    pub uplink: u8,
    /// Action for matching packets.
    pub reach: Reach,
}

/// The action of a [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reach {
    /// Look up the `main` table.
    Main,
    /// Look up the `main` table, ignoring its default routes.
    MainButDefault,
    /// Look up this table, and continue with the next rule if it has no route.
    Table(u32),
    /// `unreachable`: drop with an ICMP error to the sender.
    Nothing,
    /// `blackhole`: drop silently, like a host that does not forward.
    Silence,
}

/// A piece of kernel state, existing or desired.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Fact {
    /// A bridge on the host.
    Bridge {
        /// The bridge interface.
        interface: Interface,
        /// MTU in bytes.
        mtu: u32,
        /// The bridge belongs to an internal network, which its alias records
        /// ([`bridge_alias`](tidegate_model::registry::bridge_alias)).
        #[serde(default)]
        internal: bool,
    },
    /// A veth pair between the host and an endpoint.
    Veth {
        /// The host's end.
        interface: Interface,
        /// The endpoint.
        endpoint: String,
        /// The endpoint's end.
        inside: Interface,
        /// MTU of both ends, in bytes.
        mtu: u32,
    },
    /// A link of the host is a bridge port.
    ///
    /// Learning and flooding of unknown unicast are off. The single station behind the bridge port
    /// is a static entry in the forwarding database ([`Station`](Self::Station)).
    Port {
        /// The link.
        link: String,
        /// The bridge.
        bridge: String,
        /// The bridge port is isolated: it communicates with the bridge, but not with other
        /// isolated bridge ports.
        isolated: bool,
    },
    /// A static entry in the forwarding database of a bridge, for the station behind a bridge port.
    Station {
        /// The bridge port.
        link: String,
        /// MAC address of the station.
        station: MacAddress,
    },
    /// A [port guard](tidegate_netfilter::PortGuards) at a link of the host. It drops received
    /// frames that do not come from the endpoint behind the link. It is attached before the link
    /// joins a bridge.
    PortGuard {
        /// The link.
        link: String,
        /// MAC address of the endpoint.
        station: MacAddress,
        /// MAC address of the bridge.
        bridge: MacAddress,
        /// The endpoint's addresses on this network.
        addresses: Vec<IpAddr>,
        /// The endpoint may use additional addresses: only `station` is checked.
        any_address: bool,
    },
    /// A program at the ingress of a bridge.
    BridgeGuard {
        /// The bridge.
        link: String,
        /// Gateway addresses with their prefix lengths.
        gateways: Vec<IpNet>,
        /// It accepts packets to `gateways` only. Otherwise it accepts packets to any destination
        /// from addresses of the subnets.
        internal: bool,
    },
    /// A [source guard](tidegate_netfilter::SourceGuard) at the ingress of a link of other
    /// software. It drops packets with a source in a [`GuardedSubnet`](Self::GuardedSubnet).
    SourceGuard {
        /// The link.
        link: String,
    },
    /// A prefix of the source guards: no other link has packets from a container network.
    GuardedSubnet(IpNet),
    /// The nftables table for the port guards of an owner.
    GuardTable {
        /// The owner.
        owner: String,
    },
    /// A sysctl of a link of tidegate (sysctl(8) syntax, with `/` for a dot in an interface name).
    /// It is removed with the link.
    Setting {
        /// The namespace.
        place: Place,
        /// Name of the sysctl.
        name: String,
        /// Value of the sysctl.
        value: String,
    },
    /// An address of a link.
    Address {
        /// The namespace.
        place: Place,
        /// The link.
        link: String,
        /// The address with its on-link prefix length.
        address: IpNet,
    },
    /// A link is up.
    Up {
        /// The namespace.
        place: Place,
        /// The link.
        link: String,
    },
    /// The on-link route that the kernel adds to `main` with an address.
    SubnetRoute {
        /// The namespace.
        place: Place,
        /// The link.
        link: String,
        /// The address with its on-link prefix length.
        address: IpNet,
    },
    /// A default route.
    DefaultRoute {
        /// The namespace.
        place: Place,
        /// The output link.
        link: String,
        /// The next hop.
        gateway: IpAddr,
    },
    /// A policy rule of the host.
    Rule(Rule),
    /// A default route through a foreign link of the host, in a routing table of tidegate.
    ReplyRoute {
        /// The link.
        link: String,
        /// The table.
        table: u32,
        /// The next hop.
        gateway: IpAddr,
    },
    /// The TUN device of the NAT engine, created by [`EngineDevice`](crate::EngineDevice). It is
    /// removed with the engine.
    EngineDevice {
        /// Link of the device.
        link: String,
    },
    /// A default route to the engine's device, in a routing table of tidegate.
    EngineRoute {
        /// Link of the device.
        link: String,
        /// The table.
        table: u32,
        /// IPv6.
        v6: bool,
    },
    /// Forwarding is enabled for packets received on this foreign link, on a host that does not
    /// forward in general.
    Forwarding {
        /// The link.
        link: String,
        /// IPv6, through `force_forwarding` (Linux 6.17).
        v6: bool,
    },
    /// A link of the host is in an interface group (ip-link(8), `group`).
    Group {
        /// The link.
        link: String,
        /// The group.
        group: u32,
    },
    /// A program at the egress of a bridge. It passes packets sent by the host and packets that
    /// match `passes`.
    Gate {
        /// The bridge.
        link: String,
        /// Condition for forwarded packets.
        #[serde(default)]
        passes: Passes,
    },
    /// The rules of an owner are in force in the host's firewall.
    Ruleset {
        /// The firewall.
        firewall: FirewallKind,
        /// Owner of the rules.
        owner: String,
    },
}

/// Condition under which a [gate](Fact::Gate) passes a forwarded packet.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Passes {
    /// The packet is marked by tidegate's firewall rules
    /// ([`FORWARD_MARK`](tidegate_model::registry::FORWARD_MARK)).
    #[default]
    Marked,
    /// The packet was received on this link.
    From(String),
    /// No forwarded packet passes.
    Nothing,
}

/// A link: its endpoint (`None` for the host) and name.
type Link<'a> = (Option<&'a str>, &'a str);

impl Fact {
    /// Returns the endpoint of the fact: of its namespace, or of the link to it.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        match self {
            Self::Veth { endpoint, .. } => Some(endpoint),
            Self::Setting { place, .. }
            | Self::Address { place, .. }
            | Self::Up { place, .. }
            | Self::SubnetRoute { place, .. }
            | Self::DefaultRoute { place, .. } => place.endpoint(),
            _ => None,
        }
    }

    /// Returns whether [`endpoint`](Self::endpoint) is `name`.
    pub(crate) fn is_of_endpoint(&self, name: &str) -> bool {
        self.endpoint() == Some(name)
    }

    /// Returns whether the fact is state of the host's namespace.
    pub(crate) fn is_of_the_host(&self) -> bool {
        match self {
            Self::Setting { place, .. }
            | Self::Address { place, .. }
            | Self::Up { place, .. }
            | Self::SubnetRoute { place, .. }
            | Self::DefaultRoute { place, .. } => *place == Place::Host,
            _ => true,
        }
    }

    /// Returns whether the kernel adds and removes the fact implicitly with another one.
    pub(crate) fn is_derived(&self) -> bool {
        match self {
            Self::SubnetRoute { .. } => true,
            Self::Address { address, .. } => address.addr().is_loopback(),
            _ => false,
        }
    }

    /// Returns whether `EEXIST` while restoring the fact is not a failure.
    pub(crate) fn may_exist(&self) -> bool {
        matches!(self, Self::Address { .. } | Self::SubnetRoute { .. } | Self::DefaultRoute { .. })
    }

    /// Returns whether the fact is a link of the host, possibly with a peer in another namespace.
    pub(crate) fn is_link(&self) -> bool {
        matches!(self, Self::Bridge { .. } | Self::Veth { .. })
    }

    /// Returns the links that the fact creates.
    pub(crate) fn links(&self) -> impl Iterator<Item = Link<'_>> {
        let (host, other) = match self {
            Self::Bridge { interface, .. } => (Some((None, interface.name.as_str())), None),
            Self::Veth { interface, endpoint, inside, .. } => (
                Some((None, interface.name.as_str())),
                Some((Some(endpoint.as_str()), inside.name.as_str())),
            ),
            Self::EngineDevice { link } => (Some((None, link.as_str())), None),
            _ => (None, None),
        };
        host.into_iter().chain(other)
    }

    /// Returns the links on which the fact depends. It ceases to hold if any of them is removed.
    pub(crate) fn on(&self) -> impl Iterator<Item = Link<'_>> {
        let (link, other) = match self {
            Self::Port { link, bridge, .. } => {
                (Some((None, link.as_str())), Some((None, bridge.as_str())))
            }
            Self::Setting { place, name, .. } => {
                (name.split('.').nth(3).map(|link| (place.endpoint(), link)), None)
            }
            Self::Address { place, link, .. }
            | Self::Up { place, link }
            | Self::SubnetRoute { place, link, .. }
            | Self::DefaultRoute { place, link, .. } => {
                (Some((place.endpoint(), link.as_str())), None)
            }
            Self::Group { link, .. }
            | Self::EngineRoute { link, .. }
            | Self::Station { link, .. }
            | Self::Gate { link, .. }
            | Self::BridgeGuard { link, .. }
            | Self::PortGuard { link, .. }
            | Self::SourceGuard { link } => (Some((None, link.as_str())), None),
            // Forwarding also ends with its link. However, it must be disabled before the rules
            // that restrict it are removed.
            Self::Bridge { .. }
            | Self::Veth { .. }
            | Self::EngineDevice { .. }
            | Self::Rule(_)
            | Self::ReplyRoute { .. }
            | Self::Forwarding { .. }
            | Self::GuardTable { .. }
            | Self::GuardedSubnet(_)
            | Self::Ruleset { .. } => (None, None),
        };
        link.into_iter().chain(other)
    }

    /// Returns whether the kernel removes the fact with a link.
    pub(crate) fn is_removed_with_link(&self) -> bool {
        self.on().next().is_some()
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bridge { interface, .. } => write!(f, "bridge {:?}", interface.name),
            Self::Veth { interface, endpoint, inside, .. } => {
                write!(
                    f,
                    "veth pair {:?} to {:?} of endpoint {endpoint:?}",
                    interface.name, inside.name
                )
            }
            Self::Port { link, bridge, .. } => write!(f, "port {link:?} of bridge {bridge:?}"),
            Self::Station { link, station } => {
                write!(f, "forwarding database entry {station} of port {link:?}")
            }
            Self::Setting { place, name, value } => write!(f, "{name} = {value} on {place}"),
            Self::Address { place, link, address } => {
                write!(f, "address {address} of {link:?} on {place}")
            }
            Self::Up { place, link } => write!(f, "{link:?} up on {place}"),
            Self::SubnetRoute { place, link, address } => {
                write!(f, "route to {} on {link:?} of {place}", address.trunc())
            }
            Self::DefaultRoute { place, link, gateway } => {
                write!(f, "default route via {gateway} on {link:?} of {place}")
            }
            Self::Rule(rule) => write!(f, "{rule}"),
            Self::ReplyRoute { link, table, gateway } => {
                write!(f, "default route via {gateway} on {link:?} in table {table}")
            }
            Self::Forwarding { link, v6 } => {
                write!(f, "forwarding of IPv{} from {link:?}", if *v6 { '6' } else { '4' })
            }
            Self::Group { link, group } => write!(f, "{link:?} in group {group}"),
            Self::EngineDevice { link } => write!(f, "TUN device {link:?} of the NAT engine"),
            Self::EngineRoute { link, table, v6 } => {
                let family = if *v6 { "IPv6" } else { "IPv4" };
                write!(f, "{family} default route on {link:?} in table {table}")
            }
            Self::Gate { link, .. } => write!(f, "gate at the egress of {link:?}"),
            Self::BridgeGuard { link, .. } => write!(f, "guard at the ingress of {link:?}"),
            Self::PortGuard { link, .. } => write!(f, "port guard at {link:?}"),
            Self::SourceGuard { link } => write!(f, "source guard at {link:?}"),
            Self::GuardedSubnet(net) => write!(f, "prefix {net} of source guards"),
            Self::GuardTable { owner } => {
                write!(f, "nftables table for the port guards of {owner:?}")
            }
            Self::Ruleset { firewall, owner } => write!(f, "rules of {owner:?} in {firewall}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}{}:", if self.v6 { "-6 " } else { "" }, self.priority)?;
        if let Some(from) = &self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = &self.to {
            write!(f, " to {to}")?;
        }
        if let Some(interface) = &self.from_interface {
            write!(f, " iif {interface}")?;
        }
        if self.marked {
            write!(f, " fwmark {:#x}/{:#x}", registry::FORWARD_MARK, registry::FORWARD_MARK_MASK)?;
        }
        if self.uplink != 0 {
            let mark = registry::uplink_mark(self.uplink);
            write!(f, " fwmark {mark:#x}/{:#x}", registry::UPLINK_MARK_MASK)?;
        }
        match self.reach {
            Reach::MainButDefault => f.write_str(" lookup main suppress_prefixlength 0"),
            Reach::Main => f.write_str(" lookup main"),
            Reach::Table(table) => write!(f, " lookup {table}"),
            Reach::Nothing => f.write_str(" unreachable"),
            Reach::Silence => f.write_str(" blackhole"),
        }
    }
}

/// An operation on one fact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Adds the fact.
    Add(Fact),
    /// Removes the fact.
    Remove(Fact),
}

impl Op {
    /// Returns the inverse operation.
    #[must_use]
    pub fn inverse(&self) -> Self {
        match self {
            Self::Add(fact) => Self::Remove(fact.clone()),
            Self::Remove(fact) => Self::Add(fact.clone()),
        }
    }

    /// Returns the fact if the operation adds it.
    pub(crate) fn added(&self) -> Option<&Fact> {
        match self {
            Self::Add(fact) => Some(fact),
            Self::Remove(_) => None,
        }
    }

    /// Returns the fact.
    #[must_use]
    pub fn fact(&self) -> &Fact {
        match self {
            Self::Add(fact) | Self::Remove(fact) => fact,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(fact) => write!(f, "add {fact}"),
            Self::Remove(fact) => write!(f, "remove {fact}"),
        }
    }
}
