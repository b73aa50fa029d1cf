//! Routes of a slot's table.

use crate::Family;
use ipnet::IpNet;
use std::fmt;
use std::net::IpAddr;

/// A route for packets that a rule of the slot selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// `local default dev lo`: all packets are delivered to sockets of the namespace.
    Local(Family),
    /// A default route.
    Via {
        /// The next hop, on the network of `link`.
        gateway: IpAddr,
        /// Index of the interface.
        link: u32,
    },
    /// Packets to this subnet are routed as without the rule.
    Throw(IpNet),
}

impl Route {
    /// The address family.
    #[must_use]
    pub fn family(&self) -> Family {
        match self {
            Self::Local(family) => *family,
            Self::Via { gateway, .. } => Family::of(*gateway),
            Self::Throw(subnet) => Family::of(subnet.addr()),
        }
    }
}

/// Prints the syntax of ip-route(8), with the number of an interface instead of its name.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(_) => f.write_str("local default dev lo"),
            Self::Via { gateway, link } => write!(f, "default via {gateway} dev {link}"),
            Self::Throw(subnet) => write!(f, "throw {subnet}"),
        }
    }
}
