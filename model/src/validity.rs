//! Validity of subnets, addresses, and names of interfaces and hosts, for all front ends.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::registry;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Maximum length of an interface name, in bytes (`IFNAMSIZ` less the terminating NUL).
pub const INTERFACE_NAME: usize = 15;

/// Maximum length of a host name for sethostname(2), in bytes (`__NEW_UTS_LEN`).
pub const HOST_NAME: usize = 64;

/// Maximum length of a DNS label, in bytes (RFC 1035, section 2.3.4).
const LABEL: usize = 63;

/// Maximum length of a DNS name in text form, in bytes.
const DOMAIN_NAME: usize = 253;

/// Ranges without addresses of hosts on a network of containers: this host, loopback, multicast and
/// reserved addresses (RFC 6890), and link-local IPv6 addresses, which every link has.
const NO_HOSTS: [IpNet; 6] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 127)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8)),
];

/// Returns the reason why `subnet` cannot be the subnet of a network, and the remedy. `None` if it
/// can.
#[must_use]
pub fn subnet_problem(subnet: &IpNet) -> Option<String> {
    if subnet.trunc() != *subnet {
        return Some(format!("it has host bits set; use {}", subnet.trunc()));
    }
    // A subnet holds the network address, a gateway, an endpoint and, for IPv4, the broadcast
    // address.
    if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
        let largest = subnet.max_prefix_len() - 2;
        return Some(format!(
            "it is too small for a gateway and an endpoint; use a prefix length of at most {largest}"
        ));
    }
    if NO_HOSTS.iter().any(|range| subnets_overlap(range, subnet)) {
        return Some("it has no host addresses; use a private range".to_owned());
    }
    let engine = registry::ENGINE_ADDRESSES.into_iter().find(|ip| subnet.contains(ip))?;
    Some(format!("it contains {engine}, the address of the NAT engine; use another subnet"))
}

/// Returns the reason why a host in `subnet` cannot use `address`; `None` if it can.
#[must_use]
pub fn address_problem(address: IpAddr, subnet: &IpNet) -> Option<String> {
    if !subnet.contains(&address) {
        Some(format!("it is outside {subnet}"))
    } else if address == subnet.network() {
        // With IPv6, the subnet-router anycast address (RFC 4291, section 2.6.1).
        Some(format!("it is the network address of {subnet}"))
    } else if address.is_ipv4() && address == subnet.broadcast() {
        Some(format!("it is the broadcast address of {subnet}"))
    } else {
        None
    }
}

/// Returns whether two subnets have addresses in common.
#[must_use]
pub fn subnets_overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// Returns whether the kernel and iptables accept `name` for an interface.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    // `all` and `default` are directories of sysctls. iptables reads a `+` at the end as a
    // wildcard.
    let special = matches!(name, "." | ".." | "all" | "default") || name.ends_with('+');
    (1..=INTERFACE_NAME).contains(&name.len()) && !special && name.bytes().all(allowed)
}

/// Returns whether `name` is a host name in the sense of hostname(7) that sethostname(2) accepts.
#[must_use]
pub fn is_host_name(name: &str) -> bool {
    let allowed = |label: &str| {
        (1..=LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= HOST_NAME && name.split('.').all(allowed)
}

/// Maximum length of the name of a network, an endpoint or a project, in bytes: that of a DNS label
/// (RFC 1035, 2.3.4), because the name of an endpoint is resolved.
pub const OBJECT_NAME: usize = 63;

/// Returns whether `name` can name a network, an endpoint or a project: 1 to [`OBJECT_NAME`]
/// letters, digits, dots, hyphens and underscores, with a letter or digit first.
#[must_use]
pub fn is_object_name(name: &str) -> bool {
    let follows = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    name.len() <= OBJECT_NAME
        && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && name.bytes().all(follows)
}

/// Returns whether `alias` can be a DNS name of an endpoint. Underscores are permitted.
#[must_use]
pub fn is_alias(alias: &str) -> bool {
    let allowed = |label: &str| {
        (1..=LABEL).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    alias.len() <= DOMAIN_NAME && alias.split('.').all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_need_host_addresses_for_a_gateway_and_an_endpoint() {
        for (subnet, problem) in [
            ("10.9.0.0/30", None),
            ("10.9.0.1/24", Some("it has host bits set; use 10.9.0.0/24")),
            (
                "10.9.0.0/31",
                Some(
                    "it is too small for a gateway and an endpoint; use a prefix length of at most 30",
                ),
            ),
            (
                "fd09::/127",
                Some(
                    "it is too small for a gateway and an endpoint; use a prefix length of at most 126",
                ),
            ),
            ("fd09::/64", None),
            ("0.0.0.0/0", Some("it has no host addresses; use a private range")),
            ("127.3.0.0/24", Some("it has no host addresses; use a private range")),
            ("240.0.0.0/24", Some("it has no host addresses; use a private range")),
            ("::/120", Some("it has no host addresses; use a private range")),
            ("fe80::/64", Some("it has no host addresses; use a private range")),
            (
                "169.254.0.0/16",
                Some(
                    "it contains 169.254.116.103, the address of the NAT engine; use another subnet",
                ),
            ),
        ] {
            assert_eq!(subnet_problem(&subnet.parse().unwrap()).as_deref(), problem, "{subnet}");
        }
    }

    #[test]
    fn reserved_addresses_are_not_usable() {
        let usable = |address: &str, subnet: &str| {
            address_problem(address.parse().unwrap(), &subnet.parse().unwrap()).is_none()
        };
        for address in ["10.9.0.0", "10.9.0.255", "10.9.1.1", "fd09::1"] {
            assert!(!usable(address, "10.9.0.0/24"), "{address}");
        }
        assert!(usable("10.9.0.254", "10.9.0.0/24"));
        assert!(!usable("fd09::", "fd09::/64"));
        assert!(usable("fd09::ffff:ffff:ffff:ffff", "fd09::/64"));
    }

    #[test]
    fn names_of_interfaces_and_hosts_are_checked() {
        for name in ["", "a/b", "a b", "all", "default", "..", "br+", "sixteen-bytes-xx", "ä"] {
            assert!(!is_interface_name(name), "{name:?}");
        }
        assert!(is_interface_name("fifteen-bytes-x"));
        for name in ["", "-a", "a-", "a..b", "a_b", &"a".repeat(64)] {
            assert!(!is_host_name(name), "{name:?}");
        }
        assert!(is_host_name("a.b-c"));
        assert!(is_alias("_sip.a-b") && !is_alias("a b") && !is_alias(&"a.".repeat(127)));
    }
}
