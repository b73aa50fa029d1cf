//! Egress policy. Pure functions.
//!
//! The engine connects from the host, so the firewall of the host does not treat its connections as
//! those of a container. Destinations that a container must not reach must therefore be rejected
//! here. Some addresses have no meaning behind a NAT or denote the host itself, and are always
//! rejected. The rest is configurable.
//!
//! An address may embed another one (IPv4-mapped, 6to4, NAT64). Both are checked.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tidegate_model::CidrSet;

/// The well-known port of DNS.
pub(crate) const DNS: u16 = 53;

/// A network and its subnets. Its endpoints share a budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyNetwork {
    /// The name in the log.
    pub name: String,
    /// The subnets.
    pub subnets: Vec<IpNet>,
}

/// Egress policy of an engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Source addresses to accept: the subnets of the containers. Empty: any.
    pub sources: Vec<IpNet>,
    /// Subnets of networks without egress, to which endpoints can be attached as well. Their
    /// replies to a client in these bypass the engine.
    pub internal: Vec<IpNet>,
    /// The networks of endpoints. Sources outside all of them form one additional network.
    pub networks: Vec<PolicyNetwork>,
    /// Addresses of the engine, which containers use as their gateway. The engine replies to pings
    /// to them, and forwards ports as configured below.
    pub gateways: Vec<IpAddr>,
    /// Additional addresses of the engine, which reply to pings and forward DNS. If there are any,
    /// the gateways do not forward DNS.
    pub name_servers: Vec<IpAddr>,
    /// Resolvers of the host to which DNS is forwarded (UDP and TCP port 53). The engine uses one
    /// until it refuses, is unreachable or does not answer a query, then the next.
    pub resolvers: Vec<SocketAddr>,
    /// Other ports of the gateways are forwarded to loopback of the host.
    pub host_loopback: bool,
    /// Destinations to reject, such as the subnets of other networks.
    pub refused: CidrSet,
    /// Exceptions to `refused` and `refuse_host`.
    pub allowed: CidrSet,
    /// Reject the addresses of the host.
    pub refuse_host: bool,
}

/// Verdict for a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Forward to this address.
    Forward(SocketAddr),
    /// Forward to a resolver.
    Resolver,
    /// The destination is the engine itself.
    Gateway,
    /// Reject.
    Reject,
}

impl Policy {
    /// Whether packets from `source` are accepted.
    #[must_use]
    pub fn accepts_source(&self, source: IpAddr) -> bool {
        let unusable = source.is_unspecified() || source.is_multicast() || source.is_loopback();
        !unusable
            && (self.sources.is_empty() || self.sources.iter().any(|net| net.contains(&source)))
    }

    /// Whether `client` can be a neighbour of an endpoint, whose replies then bypass the engine.
    #[must_use]
    pub fn is_neighbour(&self, client: IpAddr) -> bool {
        self.sources.iter().chain(&self.internal).any(|net| net.contains(&client))
    }

    /// The number of the network of `ip`: from 1 in the order of [`Self::networks`]; 0 if `ip` is
    /// in none.
    #[must_use]
    pub fn network_of(&self, ip: IpAddr) -> u16 {
        let contains =
            |network: &PolicyNetwork| network.subnets.iter().any(|net| net.contains(&ip));
        let index = self.networks.iter().position(contains);
        index.and_then(|index| u16::try_from(index + 1).ok()).unwrap_or(0)
    }

    /// The name of network `number` in the log.
    #[must_use]
    pub fn name_of(&self, number: u16) -> &str {
        usize::from(number)
            .checked_sub(1)
            .and_then(|index| self.networks.get(index))
            .map_or("", |network| &network.name)
    }

    /// Whether `ip` is an address of the engine.
    #[must_use]
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.gateways.contains(&ip) || self.name_servers.contains(&ip)
    }

    /// The verdict for a flow to `destination`. `is_host` returns whether an address belongs to the
    /// host.
    #[must_use]
    pub fn verdict(&self, destination: SocketAddr, is_host: impl Fn(IpAddr) -> bool) -> Verdict {
        let ip = destination.ip();
        let forwards_dns =
            if self.name_servers.is_empty() { &self.gateways } else { &self.name_servers };
        if destination.port() == DNS && !self.resolvers.is_empty() && forwards_dns.contains(&ip) {
            return Verdict::Resolver;
        }
        if self.name_servers.contains(&ip) {
            return Verdict::Gateway;
        }
        if self.gateways.contains(&ip) {
            return if self.host_loopback && destination.port() != 0 {
                let loopback: IpAddr = if ip.is_ipv4() {
                    Ipv4Addr::LOCALHOST.into()
                } else {
                    Ipv6Addr::LOCALHOST.into()
                };
                Verdict::Forward(SocketAddr::new(loopback, destination.port()))
            } else {
                Verdict::Gateway
            };
        }
        let refused = self.refuses(ip, &is_host)
            || embedded_v4(ip).is_some_and(|ip| self.refuses(ip.into(), &is_host));
        if refused { Verdict::Reject } else { Verdict::Forward(destination) }
    }

    fn refuses(&self, ip: IpAddr, is_host: impl Fn(IpAddr) -> bool) -> bool {
        if is_unroutable(ip) {
            return true;
        }
        !self.allowed.contains(ip) && (self.refused.contains(ip) || self.refuse_host && is_host(ip))
    }
}

/// Addresses that denote no host, a group or this host, and IPv6 link-local addresses. A NAT cannot
/// forward flows to them.
fn is_unroutable(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            // 0.0.0.0/8 is "this host" to connect(2); 240.0.0.0/4 is reserved, broadcast included.
            ip.is_loopback() || ip.is_multicast() || ip.octets()[0] == 0 || ip.octets()[0] >= 240
        }
        IpAddr::V6(ip) => {
            let mapped = ip.to_ipv4_mapped().is_some();
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || mapped
        }
    }
}

/// The IPv4 address embedded in an IPv6 address: IPv4-compatible (RFC 4291 section 2.5.5.1), 6to4
/// (RFC 3056), NAT64 (RFC 6052).
fn embedded_v4(ip: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(ip) = ip else { return None };
    let [a, b, c, d, e, f, g, h] = ip.segments();
    let (high, low) = match (a, b) {
        (0, 0) if [c, d, e, f] == [0; 4] => (g, h),
        (0x64, 0xff9b) if [c, d, e, f] == [0; 4] => (g, h),
        (0x2002, high) => (high, c),
        _ => return None,
    };
    Some(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_host(_: IpAddr) -> bool {
        false
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn loopback_of_the_host_is_rejected_in_every_notation() {
        let policy = Policy::default();
        for refused in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "[::1]:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:192.0.2.1]:80",
            "[::127.0.0.1]:80",
            "[64:ff9b::7f00:1]:80",
            "[2002:7f00:1::1]:80",
            "[fe80::1]:80",
            "224.0.0.1:80",
            "255.255.255.255:80",
            "[ff02::1]:80",
        ] {
            assert_eq!(policy.verdict(at(refused), not_host), Verdict::Reject, "{refused}");
        }
        for allowed in
            ["192.0.2.1:80", "[2001:db8::1]:80", "169.254.169.254:80", "[64:ff9b::c000:201]:80"]
        {
            assert_eq!(
                policy.verdict(at(allowed), not_host),
                Verdict::Forward(at(allowed)),
                "{allowed}"
            );
        }
    }

    #[test]
    fn other_networks_and_the_host_are_rejected_if_configured() {
        let policy = Policy {
            refused: CidrSet::parse(["10.1.0.0/16", "fd01::/16"]).unwrap(),
            allowed: CidrSet::parse(["10.1.0.9", "192.0.2.2"]).unwrap(),
            refuse_host: true,
            ..Policy::default()
        };
        let host = |ip: IpAddr| ["192.0.2.1", "192.0.2.2"].iter().any(|own| own.parse() == Ok(ip));
        for (address, refused) in [
            ("10.1.2.3:80", true),
            ("[64:ff9b::a01:203]:80", true),
            ("[fd01::1]:80", true),
            ("10.1.0.9:80", false),
            ("192.0.2.1:80", true),
            ("192.0.2.2:80", false),
            ("192.0.2.3:80", false),
        ] {
            assert_eq!(policy.verdict(at(address), host) == Verdict::Reject, refused, "{address}");
        }
    }

    #[test]
    fn a_gateway_forwards_dns_and_host_loopback_only_if_configured() {
        let mut policy =
            Policy { gateways: vec!["10.0.2.2".parse().unwrap()], ..Policy::default() };
        assert_eq!(policy.verdict(at("10.0.2.2:53"), not_host), Verdict::Gateway);
        policy.resolvers.push(at("127.0.0.53:53"));
        assert_eq!(policy.verdict(at("10.0.2.2:53"), not_host), Verdict::Resolver);
        assert_eq!(policy.verdict(at("10.0.2.2:80"), not_host), Verdict::Gateway);
        policy.host_loopback = true;
        assert_eq!(
            policy.verdict(at("10.0.2.2:80"), not_host),
            Verdict::Forward(at("127.0.0.1:80"))
        );
    }

    #[test]
    fn with_a_name_server_the_gateway_forwards_to_the_host_only() {
        let mut policy = Policy {
            gateways: vec!["10.0.2.2".parse().unwrap()],
            name_servers: vec!["10.0.2.3".parse().unwrap()],
            resolvers: vec![at("192.0.2.53:53")],
            host_loopback: true,
            ..Policy::default()
        };
        assert_eq!(policy.verdict(at("10.0.2.3:53"), not_host), Verdict::Resolver);
        assert_eq!(policy.verdict(at("10.0.2.3:80"), not_host), Verdict::Gateway);
        assert_eq!(
            policy.verdict(at("10.0.2.2:53"), not_host),
            Verdict::Forward(at("127.0.0.1:53"))
        );
        policy.host_loopback = false;
        policy.resolvers.clear();
        assert_eq!(policy.verdict(at("10.0.2.3:53"), not_host), Verdict::Gateway);
        assert_eq!(policy.verdict(at("10.0.2.2:53"), not_host), Verdict::Gateway);
        assert!(["10.0.2.2", "10.0.2.3"].iter().all(|ip| policy.is_own(ip.parse().unwrap())));
    }

    #[test]
    fn packets_from_other_sources_are_not_accepted() {
        let policy = Policy { sources: vec!["10.0.2.0/24".parse().unwrap()], ..Policy::default() };
        assert!(policy.accepts_source("10.0.2.100".parse().unwrap()));
        for other in ["10.0.3.1", "127.0.0.1", "fd00::1"] {
            assert!(!policy.accepts_source(other.parse().unwrap()), "{other}");
        }
        assert!(!Policy::default().accepts_source("::1".parse().unwrap()));
    }
}
