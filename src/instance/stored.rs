//! Objects of the state of a daemon, converted to those of the parts that use them.

use super::names::{EndpointDns, NetworkDns};
use std::net::IpAddr;
use std::path::Path;
use tidegate_control::{Endpoint, Network};

/// Whether `path` refers to a process, not to a container.
pub(super) fn is_of_a_process(path: &Path) -> bool {
    path.starts_with("/proc")
}

pub(super) fn network_dns(network: &Network) -> NetworkDns {
    NetworkDns {
        servers: network.dns.clone(),
        at_gateway: network.names_at_gateway,
        nameless: !network.has_names,
    }
}

pub(super) fn endpoint_dns(endpoint: &Endpoint) -> EndpointDns {
    let aliases = endpoint.aliases.iter();
    EndpointDns {
        hostname: endpoint.hostname.clone(),
        servers: endpoint.dns.clone(),
        aliases: aliases.map(|(network, names)| (network.to_string(), names.clone())).collect(),
    }
}

pub(super) fn addresses_of(endpoint: &Endpoint) -> Vec<IpAddr> {
    let attachments = endpoint.setup.attachments.iter();
    attachments.flat_map(|one| &one.addresses).map(ipnet::IpNet::addr).collect()
}
