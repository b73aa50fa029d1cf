//! Settings of the engine and of ports, with their defaults.

use crate::{GatewayAcl, ProxyProtocol, TableLimits, Upstream, tcp};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::CidrSet;

/// Settings of an [`Engine`](crate::Engine).
#[derive(Clone, Debug)]
pub struct Settings {
    /// Maximum number of event loops, at least 1. Loops are started on demand.
    pub workers: usize,
    /// Maximum TCP connections of all ports. One client may hold at most two thirds of them.
    pub max_connections: usize,
    /// Maximum TCP connections of one client (an IPv4 address or an IPv6 /64), if lower than its
    /// share.
    pub max_client_connections: Option<usize>,
    /// Maximum memory in bytes that TCP connections hold for peers that do not read; at least
    /// [`Self::LEAST_HELD_BYTES`].
    pub held_bytes: usize,
    /// How long a connect to a backend may take before the client is reset.
    pub dial_timeout: Duration,
    /// Descriptors reserved for the rest of the process.
    pub reserved_descriptors: usize,
    /// Size of a read in bytes from which the next read is spliced instead of copied.
    pub splice_from: usize,
    /// Maximum number of ports with their own series in metrics. Ports published beyond it are
    /// summed by protocol.
    pub ports_with_series: usize,
}

impl Settings {
    /// Bytes that one connection may hold when both directions are blocked.
    pub const LEAST_HELD_BYTES: usize = 2 * tcp::NARROW_BYTES;
}

impl Default for Settings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            // One loop forwards about 60 Gbit/s on a development machine, so four exceed common
            // network cards.
            workers: cores.min(4),
            max_connections: 100_000,
            max_client_connections: None,
            held_bytes: 256 << 20,
            // docker-proxy uses the timeout of the kernel (127 s), which is longer than clients
            // wait.
            dial_timeout: Duration::from_secs(10),
            reserved_descriptors: 24,
            splice_from: tcp::SPLICE_FROM,
            // 37 series per TCP port; 3 MB per scrape.
            ports_with_series: 1000,
        }
    }
}

/// Options of published ports. Several ports can share one value.
pub struct PortOptions {
    /// Opens the connections to the backend.
    pub upstream: Arc<dyn Upstream>,
    /// PROXY protocol header with the address of the client, sent to the backend (TCP).
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Clients that may connect; `None` permits all.
    pub allow: Option<CidrSet>,
    /// Decides by ingress interface which clients may connect at which address of this host.
    pub gateway_acl: GatewayAcl,
    /// Maximum TCP connections of this port. One client may hold at most two thirds of them.
    pub max_connections: usize,
    /// Limits of the session table (UDP).
    pub sessions: TableLimits,
}

impl PortOptions {
    /// Default options with `upstream`.
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
