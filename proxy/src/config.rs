//! What can be set, and what it is when nobody sets it.

use crate::{ProxyProtocol, TableLimits, Upstream, tcp};
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::CidrSet;

/// Settings of a whole [`Engine`](crate::Engine).
#[derive(Clone, Debug)]
pub struct Settings {
    /// Event loops at most, at least 1. They are started as the load asks for them.
    pub workers: usize,
    /// TCP connections over all ports at most; beyond that a client is reset.
    pub max_connections: usize,
    /// How long a backend may take to accept before the client is reset.
    pub dial_timeout: Duration,
    /// Descriptors to leave alone for the rest of the process.
    pub reserved_descriptors: usize,
    /// Payload of one read, in bytes, from which the next one is spliced and not copied.
    pub splice_from: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            // One loop moves some 60 Gbit/s here; four are more than a host's network card brings.
            workers: cores.min(4),
            max_connections: 100_000,
            // docker-proxy leaves it to the kernel (127 s); a client has given up by then.
            dial_timeout: Duration::from_secs(10),
            reserved_descriptors: 24,
            splice_from: tcp::SPLICE_FROM,
        }
    }
}

/// Addresses of this host that are there for one network each: the gateways of container networks. A socket on all addresses answers
/// on these as well, and the kernel hands it what comes in by any interface (the weak host model, RFC 1122, 3.3.4.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enclosures(BTreeMap<IpAddr, IpNet>);

impl Enclosures {
    /// Whether `client` must not be answered at `local`. Over TCP no client can pretend to be of the network: the answer to its SYN
    /// goes there.
    #[must_use]
    pub fn shut_out(&self, client: IpAddr, local: IpAddr) -> bool {
        self.0.get(&local).is_some_and(|network| !network.contains(&client))
    }

    /// Whether there are none, so that nobody has to be asked for the address he used.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(IpAddr, IpNet)> for Enclosures {
    /// Each address with the network whose clients may use it.
    fn from_iter<T: IntoIterator<Item = (IpAddr, IpNet)>>(enclosures: T) -> Self {
        Self(enclosures.into_iter().collect())
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
    /// Who may use which address of this host.
    pub enclosures: Enclosures,
    /// TCP connections of this port at most; beyond that a client is reset.
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
            enclosures: Enclosures::default(),
            max_connections: 100_000,
            sessions: TableLimits { sessions: 4096, per_source: 1024, idle: Duration::from_secs(90) },
        }
    }
}

impl fmt::Debug for PortOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortOptions")
            .field("proxy_protocol", &self.proxy_protocol)
            .field("allow", &self.allow)
            .field("enclosures", &self.enclosures)
            .field("max_connections", &self.max_connections)
            .field("sessions", &self.sessions)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_answers_its_own_network_alone() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let pairs = [("10.9.0.1", "10.9.0.0/24"), ("fd09::1", "fd09::/64")];
        let enclosures: Enclosures = pairs.iter().map(|(at, net)| (ip(at), net.parse().unwrap())).collect();
        for (client, local, out) in [
            ("10.9.0.7", "10.9.0.1", false),
            ("10.9.0.1", "10.9.0.1", false),
            ("10.9.1.7", "10.9.0.1", true),
            ("203.0.113.9", "10.9.0.1", true),
            ("203.0.113.9", "203.0.113.1", false),
            ("fd09::7", "fd09::1", false),
            ("2001:db8::7", "fd09::1", true),
        ] {
            assert_eq!(enclosures.shut_out(ip(client), ip(local)), out, "{client} at {local}");
        }
    }
}
