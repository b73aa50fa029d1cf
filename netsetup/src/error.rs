//! What can go wrong, with the object it went wrong with.

use crate::{Op, Place};
use ipnet::IpNet;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// What is desired cannot be: it contradicts itself, or what others have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConflictError {
    /// Two of the desired subnets.
    #[error(
        "network {network:?}: subnet {subnet} overlaps {other} of network {other_network:?}; give it another one"
    )]
    SubnetsOverlap {
        /// Whose subnet.
        network: String,
        /// Which.
        subnet: IpNet,
        /// The other's name.
        other_network: String,
        /// Its subnet.
        other: IpNet,
    },
    /// The host reaches something else there.
    #[error(
        "network {network:?}: subnet {subnet} overlaps {route}, which the host reaches by {link:?}; give it another one"
    )]
    RouteOverlaps {
        /// Whose subnet.
        network: String,
        /// Which.
        subnet: IpNet,
        /// The host's route or address.
        route: IpNet,
        /// By which link.
        link: String,
    },
    /// A gateway must be on its network.
    #[error("network {network:?}: gateway {gateway} is not in subnet {subnet}")]
    GatewayOutside {
        /// Whose.
        network: String,
        /// Which.
        gateway: IpAddr,
        /// Where it should be.
        subnet: IpNet,
    },
    /// An endpoint would be attached to the namespace that its bridge is in.
    #[error(
        "endpoint {endpoint:?}: its network namespace is the host's own; give it a container's"
    )]
    OnTheHost {
        /// Which.
        endpoint: String,
    },
    /// An endpoint names a network that is not there.
    #[error("endpoint {endpoint:?}: there is no network {network:?}")]
    NoSuchNetwork {
        /// Whose.
        endpoint: String,
        /// Which.
        network: String,
    },
    /// An endpoint's address is on none of the network's subnets.
    #[error("endpoint {endpoint:?}: address {address} is in no subnet of network {network:?}")]
    AddressOutside {
        /// Whose.
        endpoint: String,
        /// Which.
        address: IpAddr,
        /// Of this network.
        network: String,
    },
    /// Two want the same address.
    #[error("endpoint {endpoint:?}: address {address} is {holder}'s already")]
    AddressInUse {
        /// Who wants it.
        endpoint: String,
        /// Which.
        address: IpAddr,
        /// Who has it.
        holder: String,
    },
    /// Two interfaces of the host by the same name.
    #[error("interface {0:?} is wanted twice")]
    NameTwice(String),
    /// Someone else's interface has the name.
    #[error(
        "interface {name:?} on {place} exists already and is not ours; choose another name or remove it"
    )]
    NameTaken {
        /// Where.
        place: Place,
        /// Which.
        name: String,
    },
    /// The kernel takes no such long name.
    #[error("interface name {name:?} is too long: {longest} bytes at most")]
    NameTooLong {
        /// Which.
        name: String,
        /// Its limit, in bytes.
        longest: usize,
    },
    /// The kernel takes no such name.
    #[error("{0:?} is no name for an interface")]
    BadName(String),
}

/// The kernel refused something.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}{}", hint(.source))]
pub struct KernelError {
    /// What was tried.
    pub what: String,
    /// What it said.
    pub source: io::Error,
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => " (needs CAP_NET_ADMIN: run as root)",
        _ => "",
    }
}

/// A plan was not carried out.
#[derive(Debug, thiserror::Error)]
#[error("{source}{}", not_undone(.left))]
pub struct ApplyError {
    /// The step that failed; those before it were undone.
    pub op: Box<Op>,
    /// Why; it names the step.
    pub source: KernelError,
    /// What could not be undone. It is in the journal.
    pub left: Vec<KernelError>,
}

fn not_undone(left: &[KernelError]) -> String {
    left.iter().map(|error| format!("; and could not be undone: {error}")).collect()
}

/// The journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Another process works with it.
    #[error("{} is in use by process {holder}: one instance at a time", .path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
        /// The process, as it wrote itself down; 0 if it has not got that far.
        holder: u32,
    },
    /// Reading or writing failed.
    #[error("journal {}: {source}", .path.display())]
    Io {
        /// The journal.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line in it makes no sense.
    #[error("journal {}, line {line}: {source}; if no network of ours is left, delete the file", .path.display())]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        source: serde_json::Error,
    },
}
