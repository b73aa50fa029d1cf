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
//! | | from a bridge to elsewhere: segments clamped to the path; established ones accepted, from an internal network dropped, invalid ones dropped; accepted | |
//! | input | the user's chain, for ports that are served in userspace and were not asked for by way of `lo` | |
//! | behind routing | what comes from a subnet that is not internal and leaves otherwise than by a bridge of ours is masqueraded | |
//! | destination NAT | what is addressed to the host at a port published by the kernel and did not come in by a bridge of ours is translated | those that did are served in userspace (hairpin) |
//!
//! nftables looks at the last two of what comes first only until a connection is established: iptables, whose `raw` table does not know that, in every packet.
//!
//! Nothing is ever a chain's policy, and what is neither from nor to a network of ours is left alone.

use ipnet::IpNet;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use tidegate_model::Protocol;

/// Everything that a firewall shall do for one owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Tells owners apart where names are shared: letters, digits, `-` and `_`, at most 63 bytes.
    pub owner: String,
    /// The networks.
    pub zones: Vec<Zone>,
    /// The published ports.
    pub ports: BTreeSet<Opening>,
    /// Which answers of translated ports leave by which [reply path](crate::ReplyPath): the number of
    /// the path, and the addresses that were asked. The narrowest network decides.
    pub replies: Vec<(u8, IpNet)>,
    /// Gates at the bridges' exits keep networks closed when the rules are gone, not policy rules.
    pub gated: bool,
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
    /// What the kernel translates it to, of the same family; `None` where a socket of ours serves it alone.
    pub to: Option<SocketAddr>,
}
