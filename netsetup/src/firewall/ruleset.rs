//! What a firewall shall do for one owner's networks: the one value that every back-end renders.
//!
//! # What the rules do
//!
//! | where | rule | why |
//! |---|---|---|
//! | before destination NAT | what claims to come from a subnet and came in otherwise than by its bridge or from the host is dropped | forged sources |
//! | | what is addressed to a subnet and came in otherwise than by its bridge or from the host is dropped | the direct-route hole, and gateway addresses |
//! | | what is addressed to a port published on a loopback address and did not come in by `lo` is dropped | a neighbour may send those too |
//! | forwarding, and where the guards are policy rules before routing | answers to connections of containers, and what was translated to a published port, get the mark [`FORWARD_MARK`](tidegate_model::registry::FORWARD_MARK) | without it the guards (gates at the bridges' exits or policy rules, outside of the firewall) let nothing through to a container, so that rules that are gone do not either |
//! | forwarding | the user's chain comes first | |
//! | | to a bridge: what comes from the same bridge accepted, from another of ours dropped; segments clamped to the path; established ones accepted, invalid ones dropped, what was translated to a published port accepted; all else dropped | isolation |
//! | | from a bridge to elsewhere: segments clamped to the path; established ones accepted, from an internal network dropped, invalid ones dropped, other protocols than [`MASQUERADED`] dropped; accepted | |
//! | | from an uplink of a host that forwards for the networks alone to another link than a bridge of tidegate: dropped | the host is made no router |
//! | input | the user's chain, for ports that are served in userspace and were not asked for by way of `lo` | |
//! | behind routing | what comes from a subnet that is not internal and leaves otherwise than by a bridge of ours is masqueraded, from source ports at which nothing is published ([`Ruleset::source_ports`]) | port shadowing |
//! | destination NAT | what is addressed to the host at a port published by the kernel and did not come in by a bridge of ours is translated | those that did are served in userspace (hairpin) |
//!
//! nftables looks at the last two of what comes first only until a connection is established:
//! iptables, whose `raw` table does not know that, in every packet.
//!
//! Nothing is ever a chain's policy, and what is neither from nor to a network of ours is left
//! alone.

use ipnet::{IpNet, Ipv6Net};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use tidegate_model::{Protocol, registry};

/// The protocols that containers reach the outside by: ICMP, TCP, UDP, ICMPv6, SCTP and UDP-Lite.
///
/// Connection tracking knows a flow of another protocol by its addresses alone
/// (`nf_conntrack_l4proto_generic`). Masquerade would give the flow of a container the host's
/// address, and what the far end sends to the host by that protocol would be an answer to the
/// container.
pub(super) const MASQUERADED: [u8; 6] = [1, 6, 17, 58, 132, 136];

/// IPv4-mapped IPv6 addresses (RFC 4291, 2.5.5.2). A socket of both families would show such a
/// client as that IPv4 address.
pub(super) const MAPPED: IpNet =
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96));

/// Everything that a firewall shall do for one owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Tells owners apart where names are shared: letters, digits, `-` and `_`, at most 63 bytes.
    pub owner: String,
    /// The networks.
    pub zones: Vec<Zone>,
    /// The published ports.
    pub ports: BTreeSet<Opening>,
    /// Which answers of translated ports leave by which [reply path](crate::ReplyPath): the number
    /// of the path, and the addresses that were asked. The narrowest network decides.
    pub replies: Vec<(u8, IpNet)>,
    /// Links of a host that forwards for nobody which forward for the networks alone, each for
    /// IPv4, or with `true` for IPv6.
    pub uplinks: Vec<(String, bool)>,
    /// The bridges of other projects on the host, to which such links forward too.
    pub bridges: BTreeSet<String>,
    /// Gates at the bridges' exits keep networks closed when the rules are gone, not policy rules.
    pub gated: bool,
}

impl Ruleset {
    /// The first and the last source port of what containers send over `protocol`: the widest range
    /// of ephemeral ports in which no port is published.
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

/// Whether what containers send could have that port, if nothing were published there.
pub(super) fn is_source_port(port: &u16) -> bool {
    registry::MASQUERADE_PORTS.contains(port)
}

/// A network as a firewall sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// The bridge's name.
    pub bridge: String,
    /// At most one of each family, not truncated to fewer bits than their prefix.
    pub subnets: Vec<IpNet>,
    /// It has no egress.
    pub internal: bool,
    /// A guard at each of its bridge ports verifies the source address of every frame. Otherwise
    /// the rules verify it, in every packet.
    pub verified: bool,
}

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Opening {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// On which address of the host; `0.0.0.0` and `::` stand for all of their family.
    pub address: IpAddr,
    /// The host's port.
    pub port: u16,
    /// What the kernel translates it to, of the same family; `None` where a socket of ours serves
    /// it alone.
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
