//! What can be set, and what it is when nobody sets it.

use crate::{GatewayAcl, ProxyProtocol, TableLimits, Upstream, tcp};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::CidrSet;

/// Settings of a whole [`Engine`](crate::Engine).
#[derive(Clone, Debug)]
pub struct Settings {
    /// Event loops at most, at least 1. They are started as the load asks for them.
    pub workers: usize,
    /// TCP connections over all ports at most, of which one client gets two thirds.
    pub max_connections: usize,
    /// TCP connections of one client (an IPv4 address, an IPv6 /64) at most, if that is less than
    /// its share.
    pub max_client_connections: Option<usize>,
    /// Bytes of memory that TCP connections may hold for peers that do not drain; at least
    /// [`Self::LEAST_HELD_BYTES`].
    pub held_bytes: usize,
    /// How long a backend may take to accept before the client is reset.
    pub dial_timeout: Duration,
    /// Descriptors to leave alone for the rest of the process.
    pub reserved_descriptors: usize,
    /// Payload of one read, in bytes, from which the next one is spliced and not copied.
    pub splice_from: usize,
    /// Ports that have series of their own in metrics; what is published beyond that is told in one
    /// sum for each protocol.
    pub ports_with_series: usize,
}

impl Settings {
    /// What one connection may hold, blocked both ways.
    pub const LEAST_HELD_BYTES: usize = 2 * tcp::NARROW_BYTES;
}

impl Default for Settings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            // One loop moves some 60 Gbit/s here; four are more than a host's network card brings.
            workers: cores.min(4),
            max_connections: 100_000,
            max_client_connections: None,
            held_bytes: 256 << 20,
            // docker-proxy leaves it to the kernel (127 s); a client has given up by then.
            dial_timeout: Duration::from_secs(10),
            reserved_descriptors: 24,
            splice_from: tcp::SPLICE_FROM,
            // 37 series for each TCP port, 3 MB for each scrape.
            ports_with_series: 1000,
        }
    }
}

/// Options of a published port; ports that share them share one value.
pub struct PortOptions {
    /// Where its flows go.
    pub upstream: Arc<dyn Upstream>,
    /// The header that tells the backend the client's address (TCP).
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Who may connect; `None`: everybody.
    pub allow: Option<CidrSet>,
    /// Which clients may use which address of this host.
    pub gateway_acl: GatewayAcl,
    /// TCP connections of this port at most, of which one client gets two thirds.
    pub max_connections: usize,
    /// Bounds of the table of UDP sessions.
    pub sessions: TableLimits,
}

impl PortOptions {
    /// The defaults, towards `upstream`.
    pub fn new(upstream: Arc<dyn Upstream>) -> Self {
        Self {
            upstream,
            proxy_protocol: None,
            allow: None,
            gateway_acl: GatewayAcl::default(),
            max_connections: 100_000,
            sessions: TableLimits {
                sessions: 16_384,
                per_source: 8192,
                idle: Duration::from_secs(90),
            },
        }
    }
}

impl fmt::Debug for PortOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortOptions")
            .field("proxy_protocol", &self.proxy_protocol)
            .field("allow", &self.allow)
            .field("gateway_acl", &self.gateway_acl)
            .field("max_connections", &self.max_connections)
            .field("sessions", &self.sessions)
            .finish_non_exhaustive()
    }
}
