//! What goes wrong, each with the name of what it is about.

use crate::name::NameError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why networks and endpoints stay as they were.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// What is to be a name cannot be one.
    #[error("name {name:?} {source}")]
    Name {
        /// The text.
        name: String,
        /// What is wrong with it.
        source: NameError,
    },
    /// There is one of that name.
    #[error("network {0:?} has names already")]
    NetworkExists(String),
    /// There is none.
    #[error("network {0:?} has no names")]
    NoNetwork(String),
    /// At the limit.
    #[error("network {network:?}: there are names of {limit} networks already")]
    TooManyNetworks {
        /// The one that is too many.
        network: String,
        /// How many there may be.
        limit: usize,
    },
    /// At the limit.
    #[error("endpoint {endpoint:?}: more than {limit} {what}")]
    TooMany {
        /// Which endpoint.
        endpoint: String,
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// At the limit.
    #[error("{0}: too many different lists of DNS servers are in use")]
    TooManyServerLists(String),
    /// It would be asked, ask us, and so on.
    #[error("{of}: DNS server {server} is tidegate itself")]
    Ourselves {
        /// Whose list it is in.
        of: String,
        /// The server.
        server: SocketAddr,
    },
}

/// Why a container is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A process in the container has the port, and packets cannot be redirected past it.
    #[error(
        "container {container:?}: {address} is in use by a DNS server in it, and nftables cannot redirect past that"
    )]
    InUse {
        /// Which container.
        container: String,
        /// What is in use.
        address: SocketAddr,
    },
    /// The same of the host.
    #[error("network {network:?}: {address} is in use by another DNS server")]
    GatewayInUse {
        /// Which network.
        network: String,
        /// What is in use.
        address: SocketAddr,
    },
    /// Redirecting was asked for, and is impossible.
    #[error("container {container:?}: redirect DNS in its namespace: {source}")]
    Redirect {
        /// Which container.
        container: String,
        /// What the kernel said.
        source: tidegate_netfilter::Error,
    },
    /// The sockets cannot be made.
    #[error("{of}: serve DNS at {address}: {source}")]
    Socket {
        /// The container or network.
        of: String,
        /// Where.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The servers given for it cannot be taken.
    #[error(transparent)]
    Servers(#[from] ZoneError),
}

/// Why there is no resolver.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Changes of the host's list of servers cannot be followed.
    #[error("watch {}: {source}", .path.display())]
    Watch {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace that questions go out from is not known.
    #[error("the host's network namespace: {0}")]
    Outside(io::Error),
}
