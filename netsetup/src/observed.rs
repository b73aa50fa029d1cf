//! Observed kernel state, as input for planning.

use crate::{Fact, Interface, Place, Uplink};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tidegate_model::MacAddress;

/// A next hop of a default route of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// The link.
    pub link: String,
    /// IPv6.
    pub v6: bool,
    /// The routing table, `None` for `main`.
    pub table: Option<u32>,
    /// The gateway; `None` on a point-to-point link.
    pub gateway: Option<IpAddr>,
    /// One of several next hops of a multipath route.
    pub shared: bool,
    /// Prefixes of the link's addresses of this family.
    pub nets: Vec<IpNet>,
}

/// A bridge of tidegate, of any project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedBridge {
    /// Interface index.
    pub index: u32,
    /// The bridge belongs to an internal network.
    pub internal: bool,
    /// Subnets of its addresses.
    pub subnets: Vec<IpNet>,
}

/// The attributes of a link by which its owner is recognized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ObservedLink {
    /// The MAC address.
    pub mac: Option<MacAddress>,
    /// For a bridge of tidegate, the MAC address with which it was created.
    pub created_with: Option<MacAddress>,
    /// A veth end that is a port of a bridge of tidegate.
    pub is_port: bool,
}

impl ObservedLink {
    /// Whether the link, which has the name of `interface`, is that interface. A link of other
    /// software can have this name, and other software may change the MAC address of a link. A
    /// bridge is then identified by its alias, and a veth end by its bridge.
    #[must_use]
    pub fn is(&self, interface: &Interface) -> bool {
        let mac = Some(interface.mac);
        self.mac == mac || self.created_with == mac || self.is_port
    }
}

/// The observed state of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The requested facts that hold.
    pub facts: BTreeSet<Fact>,
    /// All links, including foreign ones.
    pub links: BTreeMap<Place, BTreeMap<String, ObservedLink>>,
    /// Prefixes that the host reaches without a default route, with their link: its routes and
    /// addresses.
    pub routes: Vec<(IpNet, String)>,
    /// MTU of the default routes in bytes; `None` without a default route.
    pub default_mtu: Option<u32>,
    /// On a host that does not forward: the links on which replies to containers may arrive, which
    /// are those with an address.
    pub uplinks: Vec<Uplink>,
    /// Links of other software on which the host can receive packets: all but `lo`, those with the
    /// prefix of tidegate, and ports of bridges, whose packets the host receives on the bridge.
    pub receivers: BTreeSet<String>,
    /// Bridges of tidegate by name, of all projects.
    pub bridges: BTreeMap<String, ObservedBridge>,
    /// The lowest priority of the policy rules after the rule for the `local` table that tidegate
    /// did not create.
    pub first_rule_of_others: Option<u32>,
    /// Default routes of the host: those of `main`, best first, then those of other tables.
    pub default_routes: Vec<DefaultRoute>,
    /// Uplinks that already forward individually: link, and whether for IPv6.
    pub forwarding: BTreeSet<(String, bool)>,
}
