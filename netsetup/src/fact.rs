//! What can be true in a kernel, and how it becomes so.

use crate::{FirewallKind, Mac};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use tidegate_model::registry;

/// Which network namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Place {
    /// The one that the bridges are in.
    Host,
    /// The one of the endpoint of this name.
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

/// An interface that is ours: by its name and its hardware address, which together nobody else's
/// has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Interface {
    /// At most 15 bytes (`IFNAMSIZ`).
    pub name: String,
    /// Chosen by us, and in force from the moment the interface is there.
    pub mac: Mac,
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A policy rule (ip-rule(8)).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Where among the others; lower ones are asked first.
    pub priority: u32,
    /// Of the IPv6 rules, not the IPv4 ones.
    pub v6: bool,
    /// Packets that came in here (`iif`); `lo` means those that the host itself sends.
    pub from_interface: Option<String>,
    /// Packets from here.
    #[serde(default)]
    pub from: Option<IpNet>,
    /// Packets to here.
    pub to: Option<IpNet>,
    /// Packets that our firewall rules have marked (`fwmark`
    /// [`FORWARD_MARK`](tidegate_model::registry::FORWARD_MARK)).
    #[serde(default)]
    pub marked: bool,
    /// Answers that leave by the [reply path](crate::ReplyPath) of this number; 0 for no such
    /// condition.
    #[serde(default)]
    pub uplink: u8,
    /// What becomes of them.
    pub reach: Reach,
}

/// What a [`Rule`] does with the packets it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Reach {
    /// They are routed by the `main` table.
    Main,
    /// They are routed by the `main` table, if it has more than a default route for them.
    MainButDefault,
    /// They are routed by this table, and if it knows no way by what comes behind.
    Table(u32),
    /// They go nowhere, and who sent them is told.
    Nothing,
    /// They go nowhere, and nobody is told: as on a host that does not forward.
    Silence,
}

/// Something that is true in a kernel, or is to become so.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Fact {
    /// There is a bridge on the host.
    Bridge {
        /// Its own end.
        interface: Interface,
        /// Bytes that fit into one packet.
        mtu: u32,
        /// It is that of an internal network. Its alias says so
        /// ([`INTERNAL_ALIAS`](tidegate_model::registry::INTERNAL_ALIAS)).
        #[serde(default)]
        internal: bool,
    },
    /// There is a veth pair: one end on the host, the other with the endpoint.
    Veth {
        /// The host's end.
        interface: Interface,
        /// Whose the other end is.
        endpoint: String,
        /// The other end.
        inside: Interface,
        /// Bytes that fit into one packet, at both ends.
        mtu: u32,
    },
    /// A link of the host is a port of a bridge.
    ///
    /// It learns no addresses: the one station behind it is a static entry of the bridge's
    /// forwarding database ([`Station`](Self::Station)), and frames to unknown addresses are not
    /// flooded to it.
    Port {
        /// The link.
        link: String,
        /// The bridge.
        bridge: String,
        /// It reaches the bridge itself, and none of the other ports that are isolated too.
        isolated: bool,
    },
    /// The forwarding database of a bridge has a static entry for the station behind one of its
    /// ports.
    Station {
        /// The port.
        link: String,
        /// The hardware address of the station.
        station: Mac,
    },
    /// What a link of the host receives comes from the endpoint behind it, or is dropped: a [port
    /// guard](tidegate_netfilter::PortGuards). It is in force before the link is a port of a
    /// bridge.
    PortGuard {
        /// The link.
        link: String,
        /// The endpoint's hardware address.
        station: Mac,
        /// The hardware address of the bridge.
        bridge: Mac,
        /// The endpoint's addresses on this network.
        addresses: Vec<IpAddr>,
        /// The endpoint may use other addresses too: source addresses other than `station` are not
        /// checked.
        any_address: bool,
    },
    /// A program at the ingress of this bridge of an internal network takes what is for its gateway
    /// addresses alone.
    InternalGuard {
        /// The bridge.
        link: String,
        /// Those, with their networks.
        gateways: Vec<IpNet>,
    },
    /// There is a table of nftables for the port guards of this owner.
    GuardTable {
        /// Whose.
        owner: String,
    },
    /// A setting of one of our links (sysctl(8), a dot in an interface's name written `/`). It goes
    /// with the link.
    Setting {
        /// Where.
        place: Place,
        /// Its name.
        name: String,
        /// Its value.
        value: String,
    },
    /// A link has an address.
    Address {
        /// Where.
        place: Place,
        /// The link.
        link: String,
        /// The address, and the network that is on the link with it.
        address: IpNet,
    },
    /// A link is up.
    Up {
        /// Where.
        place: Place,
        /// The link.
        link: String,
    },
    /// The subnet of an address of a link is on that link: the route that the kernel adds to `main`
    /// with the address.
    SubnetRoute {
        /// Where.
        place: Place,
        /// The link.
        link: String,
        /// The address, and the network that is on the link.
        address: IpNet,
    },
    /// All that is not on a link goes this way.
    DefaultRoute {
        /// Where.
        place: Place,
        /// By this link.
        link: String,
        /// To this address.
        gateway: IpAddr,
    },
    /// A policy rule of the host.
    Rule(Rule),
    /// There is a default route by a link of the host, which is somebody else's, in a table of
    /// ours.
    ReplyRoute {
        /// The link.
        link: String,
        /// The table.
        table: u32,
        /// The next hop.
        gateway: IpAddr,
    },
    /// There is the TUN device of the NAT engine, which [`EngineDevice`](crate::EngineDevice)
    /// makes. It goes with the engine.
    EngineDevice {
        /// Its link.
        link: String,
    },
    /// All that is not on a link is led into the engine's device by a table of ours.
    EngineRoute {
        /// The device's link.
        link: String,
        /// The table.
        table: u32,
        /// IPv6.
        v6: bool,
    },
    /// What comes in by this link of the host, which is somebody else's, may be forwarded, although
    /// the host forwards for nobody.
    Forwarding {
        /// The link.
        link: String,
        /// IPv6, by `force_forwarding` (Linux 6.17).
        v6: bool,
    },
    /// A link of the host is in this group of links (ip-link(8), `group`).
    Group {
        /// The link.
        link: String,
        /// The group.
        group: u32,
    },
    /// A program at the egress of this bridge lets pass what the host itself sends, and what
    /// `passes` says.
    Gate {
        /// The bridge.
        link: String,
        /// What else leaves by it.
        #[serde(default)]
        passes: Passes,
    },
    /// The host's firewall has our rules.
    Ruleset {
        /// Which one.
        firewall: FirewallKind,
        /// Whose rules, if there are several of us.
        owner: String,
    },
}

/// What a [gate](Fact::Gate) lets pass besides what the host itself sends.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Passes {
    /// What our firewall rules have marked
    /// ([`FORWARD_MARK`](tidegate_model::registry::FORWARD_MARK)).
    #[default]
    Marked,
    /// What came in by this link.
    From(String),
    /// Nothing.
    Nothing,
}

/// A link: the endpoint that it is with, none for the host, and its name.
type Link<'a> = (Option<&'a str>, &'a str);

impl Fact {
    /// The endpoint that it is about: in its namespace, or the link to it.
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

    /// Whether it is about the endpoint `name`: in its namespace, or the link to it.
    pub(crate) fn is_of_endpoint(&self, name: &str) -> bool {
        self.endpoint() == Some(name)
    }

    /// Whether it is decided on the host.
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

    /// Whether the kernel makes it true by itself, with something else, and unmakes it.
    pub(crate) fn is_derived(&self) -> bool {
        match self {
            Self::SubnetRoute { .. } => true,
            Self::Address { address, .. } => address.addr().is_loopback(),
            _ => false,
        }
    }

    /// Whether it is no failure to restore it where it, or something in its place, is there
    /// already.
    pub(crate) fn may_exist(&self) -> bool {
        matches!(self, Self::Address { .. } | Self::SubnetRoute { .. } | Self::DefaultRoute { .. })
    }

    /// Whether it is a link of the host, perhaps with another end elsewhere.
    pub(crate) fn is_link(&self) -> bool {
        matches!(self, Self::Bridge { .. } | Self::Veth { .. })
    }

    /// The links that are there because of it.
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

    /// The links without any one of which it would not be.
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
            | Self::InternalGuard { link, .. }
            | Self::PortGuard { link, .. } => (Some((None, link.as_str())), None),
            // Forwarding does end with its link. But it has to be over before the rules are gone
            // that bound it.
            Self::Bridge { .. }
            | Self::Veth { .. }
            | Self::EngineDevice { .. }
            | Self::Rule(_)
            | Self::ReplyRoute { .. }
            | Self::Forwarding { .. }
            | Self::GuardTable { .. }
            | Self::Ruleset { .. } => (None, None),
        };
        link.into_iter().chain(other)
    }

    /// Whether it ends by itself with the link that it is about.
    pub(crate) fn goes_with_its_link(&self) -> bool {
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
                write!(f, "default route by {gateway} on {link:?} of {place}")
            }
            Self::Rule(rule) => write!(f, "{rule}"),
            Self::ReplyRoute { link, table, gateway } => {
                write!(f, "default route by {gateway} on {link:?} in table {table}")
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
            Self::InternalGuard { link, .. } => write!(f, "guard at the ingress of {link:?}"),
            Self::PortGuard { link, .. } => write!(f, "port guard at {link:?}"),
            Self::GuardTable { owner } => {
                write!(f, "table of nftables for the port guards of {owner:?}")
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

/// One step: a fact becomes true, or ceases to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Makes it so.
    Add(Fact),
    /// Unmakes it.
    Remove(Fact),
}

impl Op {
    /// What takes it back.
    #[must_use]
    pub fn inverse(&self) -> Self {
        match self {
            Self::Add(fact) => Self::Remove(fact.clone()),
            Self::Remove(fact) => Self::Add(fact.clone()),
        }
    }

    /// What it makes true, if it does not end something.
    pub(crate) fn added(&self) -> Option<&Fact> {
        match self {
            Self::Add(fact) => Some(fact),
            Self::Remove(_) => None,
        }
    }

    /// What it is about.
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
