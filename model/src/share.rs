//! Whose share of a resource a client's address counts to.

use std::net::{IpAddr, Ipv6Addr};

/// The address that stands for everybody who shares a limit with `address`: an IPv4 address itself,
/// for an IPv6 address the first one of its /64. One host has a whole /64 at its disposal (RFC 4291
/// section 2.5.4, RFC 8981), so an IPv6 address alone bounds nobody. An IPv4-mapped address counts
/// as the IPv4 address.
#[must_use]
pub fn share_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(address: &str) -> String {
        share_of(address.parse().unwrap()).to_string()
    }

    #[test]
    fn an_ipv4_address_has_a_share_of_its_own() {
        assert_eq!(share("192.0.2.7"), "192.0.2.7");
        assert_eq!(share("::ffff:192.0.2.7"), "192.0.2.7");
    }

    #[test]
    fn the_addresses_of_a_64_have_one_share() {
        assert_eq!(share("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(share("2001:db8:1:2:ffff::1"), share("2001:db8:1:2::9"));
        assert_ne!(share("2001:db8:1:3::1"), share("2001:db8:1:2::1"));
        assert_eq!(share("::1"), "::");
    }
}
