//! Finds port specs that cannot be served together.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{HostPort, PortSpec, host_addresses};
use crate::Protocol;

/// Two specs of a list want the same port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("port specs \"{first}\" and \"{second}\" both claim {port}/{protocol} on {address}")]
pub struct OverlapError {
    /// The one that stands earlier in the list.
    pub first: PortSpec,
    /// The one that stands later.
    pub second: PortSpec,
    /// The host port that both claim, 1..=65535; the lowest of `second` that anyone before it
    /// claims.
    pub port: u16,
    /// The transport of both.
    pub protocol: Protocol,
    /// The address on which they meet: the more specific of the two.
    pub address: IpAddr,
}

/// Checks that no two of `specs` claim the same protocol and host port on the same address. The
/// wildcard address of a family (0.0.0.0 or `::`, and a spec without an address has both) meets
/// every address of that family.
///
/// Only fixed host ports are claims: an ephemeral mapping, or one that may choose from a range,
/// finds itself a free port later, or fails to.
///
/// Takes O(n log n) time and O(n) space for n claimed ports in all.
///
/// # Errors
///
/// The earliest spec that clashes with one before it, and one of those.
pub fn overlap(specs: &[PortSpec]) -> Result<(), OverlapError> {
    let mut claims = Claims::default();
    for second in specs {
        for mapping in second.mappings() {
            let HostPort::Fixed(port) = mapping.host_port else { continue };
            for address in host_addresses(mapping.host_ip) {
                let protocol = mapping.protocol;
                if let Some((address, &first)) = claims.meeting(protocol, port, address) {
                    return Err(OverlapError { first, second: *second, port, protocol, address });
                }
                claims.0.insert((protocol, port, address), second);
            }
        }
    }
    Ok(())
}

/// Who claims what. The order of the keys puts the addresses of one family on one port side by
/// side, its wildcard first, so that each question is a look-up or the start of a range.
#[derive(Default)]
struct Claims<'a>(BTreeMap<(Protocol, u16, IpAddr), &'a PortSpec>);

impl<'a> Claims<'a> {
    /// A claim that `address` cannot be added beside, and the more specific of the two addresses.
    fn meeting(
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
