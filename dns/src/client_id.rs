//! The identity of a client.

use std::sync::Arc;

/// The client of a server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClientId {
    /// A container, identified by the socket.
    Container(Arc<str>),
    /// The clients at the gateway of a network: the endpoint with the source address of the query
    /// or, if sources are not verified
    /// ([`NetworkSpec::sources_are_verified`](crate::NetworkSpec::sources_are_verified)), any
    /// client on the network.
    Network(Arc<str>),
}

impl ClientId {
    /// The endpoint, for logs.
    pub(crate) fn endpoint(&self) -> Option<&str> {
        match self {
            Self::Container(name) => Some(name),
            Self::Network(_) => None,
        }
    }

    /// The network, for logs, if the endpoint is not known.
    pub(crate) fn network(&self) -> Option<&str> {
        match self {
            Self::Container(_) => None,
            Self::Network(name) => Some(name),
        }
    }
}
