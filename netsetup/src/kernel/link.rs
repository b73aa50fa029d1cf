//! A link as the kernel describes it.

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
    pub(super) group: u32,
    pub(super) isolated: bool,
    /// The alias identifies the bridge of an internal network of tidegate.
    pub(super) internal: bool,
    /// The alias identifies a bridge of tidegate.
    pub(super) of_tidegate: bool,
    /// Learning or flooding of unknown unicast is enabled on the bridge port.
    pub(super) learns: bool,
    /// Value of `disable_ipv6`, if the kernel has IPv6.
    pub(super) without_ipv6: Option<bool>,
}
