//! Types for published ports.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::io;
use std::net::SocketAddr;
use tidegate_model::{Ingress, Protocol, PublishLabel};

/// Maximum number of published ports: the number of port numbers. In practice, the descriptor that
/// each port needs is the lower limit.
pub const MAX_FORWARDS: usize = 65_536;

/// Identifier of a published port. Identifiers are not reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardId(pub(crate) u32);

impl ForwardId {
    /// Creates an identifier for an engine without [`Nat`](crate::Nat), which otherwise assigns
    /// them.
    #[doc(hidden)]
    #[must_use]
    pub const fn for_test(number: u32) -> Self {
        Self(number)
    }
}

/// The client address that the container sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForwardSource {
    /// The address of the client. The container sees the gateway instead if a reply would bypass
    /// the engine or the address would be trusted: for loopback, addresses of the host and
    /// neighbours of the container. It also sees the gateway if the five-tuple is in use, or the
    /// client is of another family than the container address.
    #[default]
    Client,
    /// The gateway, with a port chosen by the engine.
    Gateway,
}

/// A port of the host that is forwarded to a port of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The listening address. Port 0 selects any free port; an IPv6 address accepts only IPv6
    /// clients.
    pub listen: SocketAddr,
    /// The destination in the container.
    pub guest: SocketAddr,
    /// The client address that the container sees.
    pub source: ForwardSource,
}

impl Forward {
    /// The label in metrics and messages.
    #[must_use]
    pub fn label(&self) -> PublishLabel {
        PublishLabel::new(self.listen, self.protocol)
    }
}

/// Access control for a published port. Called on the thread of the engine for each connection, and
/// for each run of datagrams of one client. Must not block.
pub trait Guard: Send + Sync {
    /// Whether the client of `ingress` may use the port.
    fn admits(&self, ingress: &Ingress) -> bool;
}

impl fmt::Debug for dyn Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

/// Error of publishing a port. The state of the engine is unchanged.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The host refuses the port: in use, not permitted, or no such address.
    #[error("listen {label}: {source}")]
    Listen {
        /// The port to publish.
        label: PublishLabel,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
    /// The engine supports only TCP and UDP.
    #[error("publish {0}: the NAT engine supports only tcp and udp")]
    Protocol(PublishLabel),
    /// An invalid container address, or port 0.
    #[error("publish {label}: {guest} is not a valid container address and port")]
    Guest {
        /// The port to publish.
        label: PublishLabel,
        /// The destination in the container.
        guest: SocketAddr,
    },
    /// The container must see the gateway address, and the engine has no gateway of that family.
    #[error(
        "publish {label}: {guest} must see the gateway address, but the NAT engine has no gateway of that family"
    )]
    NoGateway {
        /// The port to publish.
        label: PublishLabel,
        /// The destination in the container.
        guest: SocketAddr,
    },
    /// [`MAX_FORWARDS`] ports are published.
    #[error("{MAX_FORWARDS} ports are published, which is the maximum; remove some first")]
    TooMany,
    /// No file descriptor is available.
    #[error("publish {0}: no file descriptor is available; raise the limit (ulimit -n)")]
    Descriptors(PublishLabel),
    /// The engine has ended.
    #[error("the NAT engine has ended")]
    Ended,
}
