//! A link as the kernel describes it.

use crate::ObservedLink;
use tidegate_model::MacAddress;

/// An observed link.
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Option<MacAddress>,
    /// Interface index of the peer in its namespace, for a veth pair across two namespaces.
    pub(super) peer: Option<u32>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    pub(super) controller: Option<u32>,
    pub(super) is_bridge: bool,
    /// A macvtap or ipvtap link: the reader of its device receives its packets, not the host.
    pub(super) is_tap: bool,
    pub(super) group: u32,
    pub(super) isolated: bool,
    /// The alias identifies the bridge of an internal network of tidegate.
    pub(super) internal: bool,
    /// The MAC address with which tidegate has created the bridge, as recorded in its alias.
    pub(super) created_with: Option<MacAddress>,
    /// Learning or flooding of unknown unicast is enabled on the bridge port.
    pub(super) learns: bool,
    /// Value of `disable_ipv6`, if the kernel has IPv6.
    pub(super) without_ipv6: Option<bool>,
}

impl Link {
    /// Whether the alias identifies a bridge of tidegate.
    pub(super) fn is_bridge_of_tidegate(&self) -> bool {
        self.created_with.is_some()
    }

    /// The link with what identifies its owner. `is_bridge_of_tidegate` tells this of the interface
    /// with an index.
    pub(super) fn observed(&self, is_bridge_of_tidegate: impl Fn(u32) -> bool) -> ObservedLink {
        let is_port = self.peer.is_some() && self.controller.is_some_and(is_bridge_of_tidegate);
        ObservedLink { mac: self.mac, created_with: self.created_with, is_port }
    }
}
