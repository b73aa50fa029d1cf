//! Errors, each with the name of the object that it is about.

use crate::name::NameError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Error of a change to networks, endpoints or server lists. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// The text is not a valid domain name.
    #[error("name {name:?} {source}")]
    Name {
        /// The text as given.
        name: String,
        /// The violated rule.
        source: NameError,
    },
    /// A network with that name exists. Names are compared without regard to case.
    #[error("network {0:?} already exists")]
    NetworkExists(String),
    /// No network has that name.
    #[error("network {0:?} does not exist")]
    NoNetwork(String),
    /// The limit on networks is reached.
    #[error("network {network:?}: limit of {limit} networks reached")]
    TooManyNetworks {
        /// The rejected network.
        network: String,
        /// The limit.
        limit: usize,
    },
    /// A limit on endpoints, or on the names or addresses of an endpoint, is exceeded.
    #[error("endpoint {endpoint:?}: limit of {limit} {what} exceeded")]
    TooMany {
        /// The rejected endpoint.
        endpoint: String,
        /// The limited items: `names`, `addresses` or `endpoints`.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The limit on different server lists is reached.
    #[error(
        "{0}: limit of different DNS server lists reached; use the servers of another network or container, or those of the host"
    )]
    TooManyServerLists(String),
    /// An upstream server is a server of this process, which would be a forwarding loop.
    #[error("{of}: DNS server {server} is tidegate itself; use another server")]
    OwnAddress {
        /// The network or container that the list is for.
        of: String,
        /// The address of the server.
        server: SocketAddr,
    },
}

/// Error of starting a server.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Port 53 is in use in the container, and redirecting is not available.
    #[error(
        "container {container:?}: {address} is in use by a DNS server in the container, and nftables is not available to redirect queries; stop that server, or bind it to another address"
    )]
    InUse {
        /// The container.
        container: String,
        /// The address in use.
        address: SocketAddr,
    },
    /// Port 53 of the gateway address is in use.
    #[error(
        "network {network:?}: {address} is in use by another DNS server; stop it, or bind it to other addresses"
    )]
    GatewayInUse {
        /// The network.
        network: String,
        /// The address in use.
        address: SocketAddr,
    },
    /// [`Listen::Redirected`](crate::Listen::Redirected) was requested, and the nftables rules
    /// cannot be installed.
    #[error("container {container:?}: cannot redirect DNS in its namespace: {source}")]
    Redirect {
        /// The container.
        container: String,
        /// The cause.
        source: tidegate_netfilter::Error,
    },
    /// A socket cannot be created or bound.
    #[error("{of}: cannot serve DNS at {address}: {source}")]
    Socket {
        /// The container or network.
        of: String,
        /// The address to bind.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// The server list of the container is invalid.
    #[error(transparent)]
    Servers(#[from] ZoneError),
}

/// Error of creating a resolver.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The `resolv.conf` of the host cannot be watched.
    #[error("cannot watch {}: {source}", .path.display())]
    Watch {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The network namespace of the host cannot be opened.
    #[error("cannot open the network namespace of the host: {0}")]
    Outside(io::Error),
}
