//! The firewall rules of one owner, independent of the back end.
//!
//! # Rules
//!
//! | hook | rule | reason |
//! |---|---|---|
//! | before destination NAT | drop packets with a source in a subnet, unless received on its bridge or sent by the host | source address spoofing |
//! | | drop packets to a subnet, unless received on its bridge or sent by the host | direct access by route, and gateway addresses |
//! | | drop packets to a port published on a loopback address, unless received on `lo` | neighbours can send such packets |
//! | forwarding; before routing if policy rules are the guards | set [`FORWARD_MARK`](tidegate_model::registry::FORWARD_MARK) on replies to containers and on packets translated to a published port | the guards outside the firewall (gates at bridge egress, or policy rules) pass only marked packets to containers, so flushed rules do not open a network |
//! | forwarding | jump to the user chain first | |
//! | | to a bridge: accept from the same bridge, drop from other bridges of the owner; clamp the MSS; accept established, drop invalid; accept packets translated to a published port; drop the rest | isolation |
//! | | from a bridge to other interfaces: clamp the MSS; accept established; drop from internal networks; drop invalid; drop protocols other than [`MASQUERADED`]; accept the rest | |
//! | | on a host that forwards for the networks only, drop packets from an uplink to links other than bridges of tidegate | the host does not become a router |
//! | input | jump to the user chain, for ports served in userspace, unless received on `lo` | |
//! | postrouting | masquerade packets from subnets that are not internal to interfaces other than bridges of the owner, with source ports that are not published ([`Ruleset::source_ports`]) | port shadowing |
//! | destination NAT | translate packets to kernel-published ports, unless received on a bridge of the owner | containers are served in userspace (hairpin) |
//!
//! Packets from overlay networks are exempt from checks of sources: see [`Zone::overlay`].
//!
//! nftables evaluates the second and third rule only until a connection is established. iptables
//! evaluates them for every packet, because conntrack state is not available in its `raw` table.
//!
//! Chain policies are never changed, and traffic unrelated to the networks of the owner is not
//! affected.

use ipnet::{IpNet, Ipv6Net};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use tidegate_model::{Protocol, registry};

/// Protocols with egress: ICMP, TCP, UDP, ICMPv6, SCTP and UDP-Lite.
///
/// Conntrack identifies flows of other protocols by their addresses only
/// (`nf_conntrack_l4proto_generic`). With masquerade, all packets of such a protocol from the
/// remote end to the host would match as replies to the container.
pub(super) const MASQUERADED: [u8; 6] = [1, 6, 17, 58, 132, 136];

/// IPv4-mapped IPv6 addresses (RFC 4291, 2.5.5.2). No kernel sends from these addresses. A
/// dual-stack socket would report such a client by the embedded IPv4 address.
pub(super) const MAPPED: IpNet =
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96));

/// The firewall rules of one owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Name of the owner, used in shared namespaces of names: letters, digits, `-` and `_`, at most
    /// 63 bytes.
    pub owner: String,
    /// The networks.
    pub zones: Vec<Zone>,
    /// The published ports.
    pub ports: BTreeSet<Opening>,
    /// [Reply paths](crate::ReplyPath) of kernel-published ports: number of the path, and prefix of
    /// the original destination. The longest prefix wins.
    pub replies: Vec<(u8, IpNet)>,
    /// Links that forward for the networks only, on a host that does not forward in general. `true`
    /// means IPv6.
    pub uplinks: Vec<(String, bool)>,
    /// Bridges of other projects on the host, to which the uplinks forward too.
    pub bridges: BTreeSet<String>,
    /// The guards are gates at the egress of the bridges instead of policy rules.
    pub gated: bool,
}

impl Ruleset {
    /// Returns the first and last source port for egress over `protocol`: the widest range of
    /// ephemeral ports without a published port.
    pub(super) fn source_ports(&self, protocol: Protocol) -> (u16, u16) {
        let (first, last) = registry::MASQUERADE_PORTS.into_inner();
        let of_protocol = self.ports.iter().filter(|port| port.protocol == protocol);
        let taken: BTreeSet<u16> =
            of_protocol.map(|port| port.port).filter(is_source_port).collect();
        let (mut widest, mut begin) = (None, first);
        for end in taken.into_iter().chain([last + 1]) {
            let width = end.saturating_sub(begin);
            if width > 0 && widest.is_none_or(|(from, to)| width > to - from + 1) {
                widest = Some((begin, end - 1));
            }
            begin = end + 1;
        }
        widest.unwrap_or((first, last))
    }
}

/// Returns whether the port is in the range of masqueraded source ports.
pub(super) fn is_source_port(port: &u16) -> bool {
    registry::MASQUERADE_PORTS.contains(port)
}

/// The firewall properties of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Name of the bridge.
    pub bridge: String,
    /// The gateway addresses with the prefix lengths of their subnets, at most one per family.
    pub subnets: Vec<IpNet>,
    /// The network has no egress.
    pub internal: bool,
    /// A port guard at each bridge port verifies the source address of every frame. Otherwise the
    /// rules verify every packet.
    pub verified: bool,
    /// The network spans hosts. On its bridge, sandboxes of the cluster send from the addresses of
    /// clients, and containers reply to these. With `br_netfilter`, the rules see these packets.
    /// Programs at the ports and at the bridge verify them, and drop packets to the host.
    pub overlay: bool,
}

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Opening {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Address of the host; `0.0.0.0` and `::` mean all addresses of the family.
    pub address: IpAddr,
    /// Port of the host.
    pub port: u16,
    /// Target of destination NAT in the kernel, of the same family; `None` if the port is served by
    /// a userspace socket only.
    pub to: Option<SocketAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_ports_are_the_widest_range_without_a_published_port() {
        for (ports, expected) in [
            (&[][..], (32_768, 60_999)),
            (&[80, 8080, 32_767, 61_000], (32_768, 60_999)),
            (&[32_768], (32_769, 60_999)),
            (&[60_999], (32_768, 60_998)),
            (&[40_000], (40_001, 60_999)),
            (&[40_000, 50_000, 50_001], (50_002, 60_999)),
            (&[34_000, 59_000], (34_001, 58_999)),
        ] {
            let port = |port: &u16| Opening {
                protocol: Protocol::Tcp,
                address: [0, 0, 0, 0].into(),
                port: *port,
                to: None,
            };
            let ruleset = Ruleset { ports: ports.iter().map(port).collect(), ..Ruleset::default() };
            assert_eq!(ruleset.source_ports(Protocol::Tcp), expected, "{ports:?}");
            assert_eq!(ruleset.source_ports(Protocol::Udp), (32_768, 60_999), "{ports:?}");
        }
    }
}
