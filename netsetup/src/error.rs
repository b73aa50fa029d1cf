//! Errors, each with the affected object.

use crate::{Op, Place};
use ipnet::IpNet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// The desired state is inconsistent, or conflicts with existing objects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConflictError {
    /// Two desired subnets overlap.
    #[error(
        "network {network:?}: subnet {subnet} overlaps {other} of network {other_network:?}; choose another subnet"
    )]
    SubnetsOverlap {
        /// The network.
        network: String,
        /// The subnet.
        subnet: IpNet,
        /// Name of the other network.
        other_network: String,
        /// Subnet of the other network.
        other: IpNet,
    },
    /// The host has a route or address in the subnet.
    #[error(
        "network {network:?}: subnet {subnet} overlaps {route}, which the host reaches through {link:?}; choose another subnet"
    )]
    RouteOverlaps {
        /// The network.
        network: String,
        /// The subnet.
        subnet: IpNet,
        /// Prefix of the route or address.
        route: IpNet,
        /// Link of the route or address.
        link: String,
    },
    /// The gateway is outside the subnet.
    #[error("network {network:?}: gateway {gateway} is not in subnet {subnet}")]
    GatewayOutside {
        /// The network.
        network: String,
        /// The gateway.
        gateway: IpAddr,
        /// The subnet.
        subnet: IpNet,
    },
    /// The endpoint's namespace is the namespace of the bridges.
    #[error(
        "endpoint {endpoint:?}: its network namespace is the host's own; use the namespace of a container"
    )]
    OnTheHost {
        /// The endpoint.
        endpoint: String,
    },
    /// The endpoint refers to an unknown network.
    #[error("endpoint {endpoint:?}: no such network {network:?}")]
    NoSuchNetwork {
        /// The endpoint.
        endpoint: String,
        /// The network.
        network: String,
    },
    /// The endpoint's address is outside the subnets of the network.
    #[error("endpoint {endpoint:?}: address {address} is in no subnet of network {network:?}")]
    AddressOutside {
        /// The endpoint.
        endpoint: String,
        /// The address.
        address: IpAddr,
        /// The network.
        network: String,
    },
    /// Two endpoints have the same address, or an endpoint has a gateway address.
    #[error("endpoint {endpoint:?}: address {address} already belongs to {holder}")]
    AddressInUse {
        /// The second endpoint.
        endpoint: String,
        /// The address.
        address: IpAddr,
        /// The holder of the address.
        holder: String,
    },
    /// Two interfaces of the host have the same name.
    #[error("duplicate interface name {0:?}")]
    NameTwice(String),
    /// A foreign interface has the name.
    #[error(
        "interface {name:?} on {place} already exists and is not owned by tidegate; choose another name or remove it"
    )]
    NameTaken {
        /// The namespace.
        place: Place,
        /// The interface name.
        name: String,
    },
    /// The interface name is too long.
    #[error("interface name {name:?} exceeds {longest} bytes")]
    NameTooLong {
        /// The interface name.
        name: String,
        /// Maximum length in bytes.
        longest: usize,
    },
    /// The interface name is invalid.
    #[error("invalid interface name {0:?}")]
    BadName(String),
}

/// The kernel rejected an operation.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}{}", hint(.source))]
pub struct KernelError {
    /// The operation.
    pub what: String,
    /// Error code of the kernel.
    pub source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (needs CAP_NET_ADMIN: run as root)",
        _ => "",
    }
}

/// A failed plan.
#[derive(Debug, thiserror::Error)]
#[error("{source}{}", rollback_failures(.left))]
pub struct ApplyError {
    /// The failed operation. The previous ones were rolled back.
    pub op: Box<Op>,
    /// Cause, which includes the operation.
    pub source: KernelError,
    /// Failures during the rollback. The affected facts stay in the journal.
    pub left: Vec<KernelError>,
}

fn rollback_failures(left: &[KernelError]) -> String {
    left.iter().map(|error| format!("; rollback incomplete: {error}")).collect()
}

/// A failure of the journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process holds the lock.
    #[error("{} is in use by process {holder}; stop that process first", .path.display())]
    InUse {
        /// Path of the journal.
        path: PathBuf,
        /// PID recorded by the holder; 0 if it has not recorded it yet.
        holder: u32,
    },
    /// A read or write failed.
    #[error("journal {}: {source}", .path.display())]
    Io {
        /// Path of the journal.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A line is invalid.
    #[error("journal {}, line {line}: {source}; delete the file if no network of its owner exists", .path.display())]
    Damaged {
        /// Path of the journal.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// Cause.
        source: serde_json::Error,
    },
}
