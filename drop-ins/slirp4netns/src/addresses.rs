//! The address plan of slirp4netns. Pure.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use ipnet::{Ipv4Net, Ipv6Net};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The IPv4 addresses of a network. The IPv6 addresses are constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    network: Ipv4Net,
    /// The second address: the gateway, and access to the loopback of the host.
    pub(super) gateway: Ipv4Addr,
    /// The third address: DNS.
    pub(super) name_server: Ipv4Addr,
    /// The address number 100.
    guest: Ipv4Addr,
}

impl Addresses {
    pub(super) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    pub(super) const NAME_SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
    /// The IPv6 address of a configured guest. slirp4netns lets the guest choose its own.
    pub(super) const GUEST_V6: Ipv6Net =
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100), 64);

    pub(super) fn of(network: Ipv4Net) -> Self {
        let nth = |n: u32| Ipv4Addr::from_bits(network.addr().to_bits().wrapping_add(n));
        Self { network, gateway: nth(2), name_server: nth(3), guest: nth(100) }
    }

    /// Returns the address of the guest with its prefix length.
    pub(super) fn guest(&self) -> Ipv4Net {
        Ipv4Net::new_assert(self.guest, self.network.prefix_len())
    }

    pub(super) fn gateways(&self, ipv6: bool) -> Vec<IpAddr> {
        both(self.gateway, Self::GATEWAY_V6, ipv6)
    }

    pub(super) fn name_servers(&self, ipv6: bool) -> Vec<IpAddr> {
        both(self.name_server, Self::NAME_SERVER_V6, ipv6)
    }

    /// Returns the accepted source addresses.
    pub(super) fn sources(&self, ipv6: bool) -> Vec<ipnet::IpNet> {
        let v6 = ipv6.then(|| Self::GUEST_V6.trunc().into());
        std::iter::once(self.network.into()).chain(v6).collect()
    }
}

fn both(v4: Ipv4Addr, v6: Ipv6Addr, ipv6: bool) -> Vec<IpAddr> {
    std::iter::once(v4.into()).chain(ipv6.then(|| v6.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_match_those_of_slirp4netns() {
        let addresses = Addresses::of("10.9.8.0/24".parse().unwrap());
        assert_eq!(addresses.gateway.to_string(), "10.9.8.2");
        assert_eq!(addresses.name_server.to_string(), "10.9.8.3");
        assert_eq!(addresses.guest().to_string(), "10.9.8.100/24");
        let gateways: Vec<_> = addresses.gateways(true).iter().map(ToString::to_string).collect();
        assert_eq!(gateways, ["10.9.8.2", "fd00::2"]);
        assert_eq!(addresses.name_servers(false), ["10.9.8.3".parse::<IpAddr>().unwrap()]);
        let sources: Vec<_> = addresses.sources(true).iter().map(ToString::to_string).collect();
        assert_eq!(sources, ["10.9.8.0/24", "fd00::/64"]);
    }
}
