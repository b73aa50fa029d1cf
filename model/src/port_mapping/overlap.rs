//! Detection of conflicting port specs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{HostPort, PortSpec, host_addresses};
use crate::Protocol;

/// Two specs of a list claim the same host port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("port specs \"{first}\" and \"{second}\" both claim {port}/{protocol} on {address}")]
pub struct OverlapError {
    /// The earlier spec of the list.
    pub first: PortSpec,
    /// The later spec of the list.
    pub second: PortSpec,
    /// The host port that both claim, 1..=65535: the lowest port of `second` that an earlier spec
    /// claims.
    pub port: u16,
    /// The transport protocol of both.
    pub protocol: Protocol,
    /// The address of the conflict: the more specific of the two.
    pub address: IpAddr,
}

/// Checks that no two of `specs` claim the same protocol and host port on the same address. The
/// wildcard address of a family (0.0.0.0 or `::`) conflicts with every address of that family. A
/// spec without an address claims both wildcards.
///
/// Only fixed host ports are claims. An ephemeral mapping, or a mapping to any port of a range,
/// takes a free port when its socket is created, or fails.
///
/// Takes O(n log n) time and O(n) space for a total of n claimed ports.
///
/// # Errors
///
/// Returns the earliest spec that conflicts with a previous one, and one such previous spec.
pub fn overlap(specs: &[PortSpec]) -> Result<(), OverlapError> {
    let mut claims = Claims::default();
    for second in specs {
        for mapping in second.mappings() {
            let HostPort::Fixed(port) = mapping.host_port else { continue };
            for address in host_addresses(mapping.host_ip) {
                let protocol = mapping.protocol;
                if let Some((address, &first)) = claims.conflict(protocol, port, address) {
                    return Err(OverlapError { first, second: *second, port, protocol, address });
                }
                claims.0.insert((protocol, port, address), second);
            }
        }
    }
    Ok(())
}

/// The claims so far. The key order groups the addresses of one family on one port, its wildcard
/// first, so each conflict check is a lookup or the start of a range.
#[derive(Default)]
struct Claims<'a>(BTreeMap<(Protocol, u16, IpAddr), &'a PortSpec>);

impl<'a> Claims<'a> {
    /// Returns a claim that conflicts with `address`, and the more specific of the two addresses.
    fn conflict(
        &self,
        protocol: Protocol,
        port: u16,
        address: IpAddr,
    ) -> Option<(IpAddr, &'a PortSpec)> {
        let (wildcard, last): (IpAddr, IpAddr) = match address {
            IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into()),
            IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::from_bits(u128::MAX).into()),
        };
        if address == wildcard {
            let family = (protocol, port, wildcard)..=(protocol, port, last);
            return self.0.range(family).next().map(|(&(_, _, claimed), &spec)| (claimed, spec));
        }
        [wildcard, address]
            .into_iter()
            .find_map(|claimed| self.0.get(&(protocol, port, claimed)))
            .map(|&spec| (address, spec))
    }
}
