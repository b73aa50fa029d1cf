//! What a kernel has, as far as a plan must know.

use crate::{Fact, Mac, Place, Uplink};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// A default route of the host; of one with several next hops, one of those.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The link.
    pub link: String,
    /// IPv6.
    pub v6: bool,
    /// The table, unless it is `main`.
    pub table: Option<u32>,
    /// The next hop; `None` where the link is point to point.
    pub gateway: Option<IpAddr>,
    /// It shares its packets with other next hops.
    pub shared: bool,
    /// The networks of the link's own addresses of that family.
    pub nets: Vec<IpNet>,
}

/// A bridge of tidegate, of this project or another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedBridge {
    /// The index of its interface.
    pub index: u32,
    /// It is that of an internal network.
    pub internal: bool,
    /// The subnets of its addresses.
    pub subnets: Vec<IpNet>,
}

/// What was found when the kernel was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Those of the facts asked about that are true.
    pub facts: BTreeSet<Fact>,
    /// Every link, also those of others.
    pub links: BTreeMap<Place, BTreeMap<String, Option<Mac>>>,
    /// What the host reaches otherwise than by a default route, and by which link: its routes and
    /// its own addresses.
    pub routes: Vec<(IpNet, String)>,
    /// What packets hold, in bytes, as they leave the host; `None` without a default route.
    pub default_mtu: Option<u32>,
    /// Of a host that forwards for nobody, the links by which answers to containers could come:
    /// those that have an address.
    pub uplinks: Vec<Uplink>,
    /// The bridges of tidegate by name, ours and those of other projects.
    pub bridges: BTreeMap<String, ObservedBridge>,
    /// The lowest priority among the policy rules of others that are behind the `local` table's, if
    /// one precedes `main`.
    pub first_rule_of_others: Option<u32>,
    /// The default routes of the host: of `main` the best one first, then those of other tables.
    pub default_routes: Vec<DefaultRoute>,
    /// Those of them that forward already, each for itself: over IPv6, or IPv4.
    pub forwarding: BTreeSet<(String, bool)>,
}
