//! Published ports: what can be said about one. Pure.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use tidegate_model::{Ingress, Protocol, PublishLabel};

/// How many there may be: as many as there are ports. Each takes a descriptor, which ends earlier.
pub const MAX_FORWARDS: usize = 65_536;

/// Which published port it is. Numbers are not given out twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardId(pub(crate) u32);

impl ForwardId {
    /// One of an engine that is not run by [`Nat`](crate::Nat), which numbers its own.
    #[doc(hidden)]
    #[must_use]
    pub const fn for_test(number: u32) -> Self {
        Self(number)
    }
}

/// Whom the container sees as its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForwardSource {
    /// The client itself, unless it would be answered past the engine or taken for somebody else:
    /// loopback, the host's own addresses and the container's neighbours show the gateway, as does
    /// a flow whose five-tuple is taken or whose client is of another family than the container's
    /// address.
    #[default]
    Client,
    /// The gateway, with a port of the engine's choice.
    Gateway,
}

/// A port of the host's that leads to a port of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where clients come. Port 0 takes any free one; IPv6 addresses take IPv6 clients only.
    pub listen: SocketAddr,
    /// Where they are led to.
    pub guest: SocketAddr,
    /// Who they seem to be there.
    pub source: ForwardSource,
}

impl Forward {
    /// What it is called in metrics and messages.
    #[must_use]
    pub fn label(&self) -> PublishLabel {
        PublishLabel::new(self.listen, self.protocol)
    }
}

/// Controls access to a published port. Called on the engine's thread for each connection and for
/// each run of datagrams of one client; must not block.
pub trait Guard: Send + Sync {
    /// Whether the client of `ingress` may use the port.
    fn admits(&self, ingress: &Ingress) -> bool;
}

impl fmt::Debug for dyn Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

/// Why a port is not published. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The host does not give the port away: in use, not permitted, no such address.
    #[error("listen {label}: {source}")]
    Listen {
        /// What was to be opened.
        label: PublishLabel,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The engine carries TCP and UDP.
    #[error("publish {0}: the engine carries tcp and udp only")]
    Protocol(PublishLabel),
    /// A container's port that cannot be: no address, or port 0.
    #[error("publish {label}: {guest} is nowhere that a container can be")]
    Guest {
        /// What was to be opened.
        label: PublishLabel,
        /// Where it was to lead.
        guest: SocketAddr,
    },
    /// The gateway is to be shown, and there is none of the container's family.
    #[error(
        "publish {label}: the gateway is to be shown to {guest}, and the engine has no gateway of that family"
    )]
    NoGateway {
        /// What was to be opened.
        label: PublishLabel,
        /// Where it was to lead.
        guest: SocketAddr,
    },
    /// There are [`MAX_FORWARDS`].
    #[error("{MAX_FORWARDS} ports are published, which is all there may be; remove some first")]
    TooMany,
    /// No descriptors are left for it.
    #[error("publish {0}: no file descriptors are left; raise the limit (ulimit -n)")]
    Descriptors(PublishLabel),
    /// The engine has ended.
    #[error("the NAT engine has ended")]
    Ended,
}
