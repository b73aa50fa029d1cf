//! Reasons to refuse a command, each with the object and the remedy.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::{Name, PublishedPort};
use ipnet::IpNet;
use std::net::IpAddr;
use std::path::PathBuf;
use tidegate_model::{Protocol, bracketed};
use tidegate_netsetup::Exhausted;

/// Maximum number of endpoints that an error lists.
const LISTED: usize = 3;

/// A refused command. The state is unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The name of a new network is in use.
    #[error("network {0} already exists; remove it first, or choose another name")]
    NetworkExists(Name),
    /// The name of a new endpoint is in use.
    #[error("endpoint {0} already exists; detach it first, or choose another name")]
    EndpointExists(Name),
    /// The name of a new project is in use.
    #[error("project {0} is up already; take it down first (tidegate down {0})")]
    ProjectExists(Name),
    /// The project does not exist.
    #[error("project {0} is not up; tidegate ls lists the projects")]
    UnknownProject(Name),
    /// A part of a new project has a name outside of it, or the project has another one's name.
    #[error("project {project}: {part} is not a part of it; name its parts {project}/NAME")]
    ForeignPart {
        /// The project.
        project: Name,
        /// The network, endpoint or service.
        part: String,
    },
    /// The host is in a cluster already.
    #[error("this host is in a cluster already, as {host}; leave it first (tidegate mesh leave)")]
    InCluster {
        /// Its name in the cluster.
        host: Name,
    },
    /// The host is in no cluster.
    #[error("this host is in no cluster; join one first (tidegate mesh join)")]
    NotInCluster,
    /// The name is that of the network for the egress of overlay networks.
    #[error("the name {0} is reserved for the egress of overlay networks; choose another one")]
    ReservedName(Name),
    /// The network does not exist.
    #[error("network {0} does not exist; create it first")]
    UnknownNetwork(Name),
    /// The endpoint does not exist.
    #[error("endpoint {0} does not exist; attach it first")]
    UnknownEndpoint(Name),
    /// The network to remove has endpoints.
    #[error("network {network} is in use by {}; detach first", list("endpoint", .endpoints))]
    NetworkInUse {
        /// The network.
        network: Name,
        /// Its endpoints.
        endpoints: Vec<Name>,
    },
    /// The limit on the number of objects is reached.
    #[error("too many {what}: the limit is {limit}; remove one first")]
    TooMany {
        /// The kind of object, with the object that has too many of them.
        what: String,
        /// The limit.
        limit: usize,
    },

    /// The subnet cannot be used on any host.
    #[error("network {network}: subnet {subnet} is not usable: {problem}")]
    InvalidSubnet {
        /// The network.
        network: Name,
        /// The subnet.
        subnet: IpNet,
        /// The reason and the remedy.
        problem: String,
    },
    /// The network has two subnets of one family.
    #[error("network {network}: subnets {subnet} and {other} have the same family; remove one")]
    TwoSubnets {
        /// The network.
        network: Name,
        /// The second subnet.
        subnet: IpNet,
        /// The first subnet.
        other: IpNet,
    },
    /// The network has an IPv6 subnet, but IPv6 is not enabled.
    #[error("network {network}: {subnet} is an IPv6 subnet; enable IPv6 on the network")]
    Ipv6Disabled {
        /// The network.
        network: Name,
        /// The subnet.
        subnet: IpNet,
    },
    /// The gateway cannot be used in its subnet.
    #[error(
        "network {network}: gateway {gateway} is not usable: {problem}; choose another address"
    )]
    InvalidGateway {
        /// The network.
        network: Name,
        /// The gateway.
        gateway: IpAddr,
        /// The reason.
        problem: String,
    },
    /// The subnet overlaps the subnet of another network.
    #[error(
        "network {network}: subnet {subnet} overlaps {other} of network {other_network}; \
         choose another subnet"
    )]
    SubnetsOverlap {
        /// The network.
        network: Name,
        /// The subnet.
        subnet: IpNet,
        /// The other network.
        other_network: Name,
        /// The subnet of the other network.
        other: IpNet,
    },
    /// The subnet overlaps a route or an address of the host.
    #[error(
        "network {network}: subnet {subnet} overlaps {route}, which the host reaches through \
         {link}; choose another subnet"
    )]
    RouteOverlaps {
        /// The network.
        network: Name,
        /// The subnet.
        subnet: IpNet,
        /// Prefix of the route or address.
        route: IpNet,
        /// Link of the route or address.
        link: String,
    },
    /// No subnet of the default pools is free.
    #[error("network {network}: {source}")]
    NoSubnet {
        /// The network.
        network: Name,
        /// The cause and the remedy.
        source: Exhausted,
    },
    /// The name of the bridge is not a valid interface name.
    #[error(
        "network {network}: {bridge:?} is not a valid bridge name; use 1 to 15 characters without \
         spaces, slashes or colons, and without a + at the end"
    )]
    InvalidBridge {
        /// The network.
        network: Name,
        /// The name of the bridge.
        bridge: String,
    },
    /// Another interface of the host has the name of the bridge.
    #[error("network {network}: bridge name {bridge} is used by {holder}; choose another name")]
    BridgeTaken {
        /// The network.
        network: Name,
        /// The name of the bridge.
        bridge: String,
        /// The network or interface with that name.
        holder: String,
    },
    /// The MTU is out of range.
    #[error("network {network}: MTU {mtu} is not valid; use {lowest} to 65535")]
    InvalidMtu {
        /// The network.
        network: Name,
        /// The MTU in bytes.
        mtu: u32,
        /// The lowest valid MTU, which depends on the families.
        lowest: u32,
    },

    /// An endpoint without a network.
    #[error("endpoint {0} has no network; attach it to at least one")]
    NoNetwork(Name),
    /// An endpoint is attached twice to one network.
    #[error("endpoint {endpoint}: network {network} is listed twice; remove one")]
    NetworkTwice {
        /// The endpoint.
        endpoint: Name,
        /// The network.
        network: Name,
    },
    /// A fixed address belongs to another endpoint or is the gateway.
    #[error(
        "endpoint {endpoint}: address {address} on network {network} is in use by {holder}; choose \
         another address"
    )]
    AddressTaken {
        /// The endpoint.
        endpoint: Name,
        /// The address.
        address: IpAddr,
        /// The network.
        network: Name,
        /// The holder of the address.
        holder: String,
    },
    /// A fixed address cannot be used in the subnet.
    #[error(
        "endpoint {endpoint}: address {address} is not usable on network {network}: {problem}; \
         choose another address"
    )]
    InvalidAddress {
        /// The endpoint.
        endpoint: Name,
        /// The address.
        address: IpAddr,
        /// The network.
        network: Name,
        /// The reason.
        problem: String,
    },
    /// The network has no subnet of the family of a fixed address.
    #[error(
        "endpoint {endpoint}: network {network} has no {} subnet for address {address}; remove the \
         address, or create the network with one", family(.address)
    )]
    NoSuchFamily {
        /// The endpoint.
        endpoint: Name,
        /// The address.
        address: IpAddr,
        /// The network.
        network: Name,
    },
    /// Two fixed addresses of one family on one network.
    #[error(
        "endpoint {endpoint}: addresses {address} and {other} on network {network} have the same \
         family; remove one"
    )]
    TwoAddresses {
        /// The endpoint.
        endpoint: Name,
        /// The second address.
        address: IpAddr,
        /// The first address.
        other: IpAddr,
        /// The network.
        network: Name,
    },
    /// The subnet has no free address.
    #[error(
        "endpoint {endpoint}: no free address in {subnet} of network {network}; detach an endpoint \
         and wait 60 s, or create a network with a larger subnet"
    )]
    NoAddress {
        /// The endpoint.
        endpoint: Name,
        /// The network.
        network: Name,
        /// The subnet.
        subnet: IpNet,
    },
    /// An invalid host name.
    #[error(
        "endpoint {endpoint}: {hostname:?} is not a valid host name; use at most 64 letters, digits, \
         hyphens and dots"
    )]
    InvalidHostname {
        /// The endpoint.
        endpoint: Name,
        /// The host name.
        hostname: String,
    },
    /// An invalid alias.
    #[error(
        "endpoint {endpoint}: alias {alias:?} is not a valid DNS name; use letters, digits, hyphens \
         and underscores, separated by dots"
    )]
    InvalidAlias {
        /// The endpoint.
        endpoint: Name,
        /// The alias.
        alias: String,
    },
    /// A path that is not absolute, not UTF-8 or too long.
    #[error(
        "endpoint {endpoint}: namespace path {path:?} is not valid; use an absolute path in UTF-8 \
         of at most 4095 bytes"
    )]
    InvalidNamespace {
        /// The endpoint.
        endpoint: Name,
        /// The path.
        path: PathBuf,
    },
    /// Another endpoint has the namespace.
    #[error(
        "endpoint {endpoint}: namespace {} is already attached as endpoint {holder}; detach that \
         endpoint first", .path.display()
    )]
    NamespaceTaken {
        /// The endpoint.
        endpoint: Name,
        /// The path.
        path: PathBuf,
        /// The other endpoint.
        holder: Name,
    },
    /// All random interface names or MAC addresses were in use.
    #[error("endpoint or network {0}: no unused interface name or MAC address was found; retry")]
    NoInterfaceName(Name),

    /// A port number is 0.
    #[error("endpoint {endpoint}: port 0 cannot be published; use a port from 1 to 65535")]
    PortZero {
        /// The endpoint.
        endpoint: Name,
    },
    /// The port of the host is already published.
    #[error(
        "endpoint {endpoint}: port {}/{} on {} is already published by endpoint {holder}; choose \
         another host port", .port.host_port, .port.protocol, bracketed(.port.address)
    )]
    PortTaken {
        /// The endpoint.
        endpoint: Name,
        /// The port.
        port: PublishedPort,
        /// The endpoint that published it.
        holder: Name,
    },
    /// The port to unpublish is not published.
    #[error(
        "port {port}/{protocol} on {} is not published; use the address and port of a published one",
        bracketed(*.address)
    )]
    NotPublished {
        /// Address of the host.
        address: IpAddr,
        /// Port of the host.
        port: u16,
        /// Transport protocol.
        protocol: Protocol,
    },
}

fn family(address: &IpAddr) -> &'static str {
    if address.is_ipv4() { "IPv4" } else { "IPv6" }
}

/// Lists the first objects, and the number of the others.
fn list(kind: &str, names: &[Name]) -> String {
    let shown: Vec<String> = names.iter().take(LISTED).map(ToString::to_string).collect();
    let plural = if names.len() == 1 { "" } else { "s" };
    let others = match names.len().saturating_sub(LISTED) {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    format!("{kind}{plural} {}{others}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_in_use_lists_three_endpoints() {
        let names: Vec<Name> =
            ["a", "b", "p/c", "d", "e"].iter().map(|name| name.parse().unwrap()).collect();
        let network: Name = "p/front".parse().unwrap();
        for (count, expected) in [
            (1, "network p/front is in use by endpoint a; detach first"),
            (3, "network p/front is in use by endpoints a, b, p/c; detach first"),
            (5, "network p/front is in use by endpoints a, b, p/c and 2 more; detach first"),
        ] {
            let endpoints = names[..count].to_vec();
            let refusal = Refusal::NetworkInUse { network: network.clone(), endpoints };
            assert_eq!(refusal.to_string(), expected);
        }
    }
}
