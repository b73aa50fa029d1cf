//! Verdicts: pure functions from the facts about a host to rows of the report.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

mod environment;
mod features;
mod firewall;
mod limits;
mod namespaces;
#[cfg(test)]
mod tests;

use super::host::{Found, Host};
use super::report::Row;

/// All checks, in the order of the report.
pub(super) fn all(host: &Host) -> Vec<Row> {
    vec![
        features::kernel(host),
        namespaces::network_namespaces(host),
        namespaces::user_namespaces(host),
        namespaces::networks(host),
        namespaces::tun(host),
        namespaces::tun_offload(host),
        features::tcp_peek_offset(host),
        features::udp_offload(host),
        features::ipv6(host),
        environment::ip_forward(host),
        environment::ipv6_force_forwarding(host),
        environment::policy_rules(host),
        firewall::nftables(host),
        firewall::gates(host),
        namespaces::port_guards(host),
        firewall::iptables(host),
        firewall::choice(host),
        environment::address_pools(host),
        environment::host_services(host),
        limits::low_ports(host),
        limits::open_files(host),
        limits::pipe_memory(host),
        limits::receive_buffer(host),
        limits::run_directory(host),
    ]
}

/// Returns the value of a setting, or the row that says why it cannot be determined.
fn known<T: Copy>(check: &'static str, found: &Found<T>) -> Result<T, Box<Row>> {
    found.as_ref().copied().map_err(|why| Box::new(Row::cannot_tell(check, why)))
}
