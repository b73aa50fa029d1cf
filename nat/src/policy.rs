//! Who may go where. Pure.
//!
//! The engine's connects are the host's own, so the host's firewall does not judge them as a
//! container's: what a container must not reach has to be refused here. Some addresses mean nothing
//! to a NAT, or mean the host itself, and are refused always; the rest is asked for.
//!
//! An address may hide another one (IPv4-mapped, 6to4, NAT64): it is judged as both.

use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tidegate_model::CidrSet;

/// Where clouds tell a machine who it is and lend it credentials: EC2, GCE and Azure, and EC2 over
/// IPv6.
const METADATA: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// The well-known port of DNS.
pub(crate) const DNS: u16 = 53;

/// The subnets of one network, whose endpoints share a budget.
#[derive(Clone, Debug)]
pub struct PolicyNetwork {
    /// Its name, in the log.
    pub name: String,
    /// Its subnets.
    pub subnets: Vec<IpNet>,
}

/// What containers may reach.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Whose packets are taken: the containers' subnets. Empty: anybody's.
    pub sources: Vec<IpNet>,
    /// The networks that endpoints belong to. Sources outside all of them count as one more
    /// network.
    pub networks: Vec<PolicyNetwork>,
    /// The engine's own addresses, which containers know as their gateway. They answer pings, and
    /// what is said below.
    pub gateways: Vec<IpAddr>,
    /// More addresses of the engine's own, which answer pings and forward DNS. Where there is one,
    /// the gateways do not.
    pub name_servers: Vec<IpAddr>,
    /// Resolvers of the host that DNS is forwarded to (UDP and TCP port 53). One is asked until it
    /// refuses, cannot be reached or lets a query die unanswered, then the next.
    pub resolvers: Vec<SocketAddr>,
    /// The gateways' other ports are those of the host's loopback.
    pub host_loopback: bool,
    /// Destinations refused, such as other networks' subnets.
    pub refused: CidrSet,
    /// Exceptions from `refused` and `refuse_host`.
    pub allowed: CidrSet,
    /// The host's own addresses are refused.
    pub refuse_host: bool,
    /// The cloud's metadata service may be asked.
    pub metadata: bool,
}

/// Where a flow goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// There.
    To(SocketAddr),
    /// To one of the resolvers.
    Resolver,
    /// To the engine itself.
    Gateway,
    /// Nowhere.
    Refused,
}

impl Policy {
    /// Whether packets of `source` are taken.
    #[must_use]
    pub fn knows(&self, source: IpAddr) -> bool {
        let unusable = source.is_unspecified() || source.is_multicast() || source.is_loopback();
        !unusable
            && (self.sources.is_empty() || self.sources.iter().any(|net| net.contains(&source)))
    }

    /// The number of the network that `ip` belongs to: from 1 on, in the order of
    /// [`Self::networks`]; 0 for none of them.
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

    /// Whether `ip` is one of the engine's own.
    #[must_use]
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.gateways.contains(&ip) || self.name_servers.contains(&ip)
    }

    /// Where a flow to `destination` goes. `is_host` tells whether an address is the host's.
    #[must_use]
    pub fn way(&self, destination: SocketAddr, is_host: impl Fn(IpAddr) -> bool) -> Way {
        let ip = destination.ip();
        let forwards_dns =
            if self.name_servers.is_empty() { &self.gateways } else { &self.name_servers };
        if destination.port() == DNS && !self.resolvers.is_empty() && forwards_dns.contains(&ip) {
            return Way::Resolver;
        }
        if self.name_servers.contains(&ip) {
            return Way::Gateway;
        }
        if self.gateways.contains(&ip) {
            return if self.host_loopback && destination.port() != 0 {
                let loopback: IpAddr = if ip.is_ipv4() {
                    Ipv4Addr::LOCALHOST.into()
                } else {
                    Ipv6Addr::LOCALHOST.into()
                };
                Way::To(SocketAddr::new(loopback, destination.port()))
            } else {
                Way::Gateway
            };
        }
        let refused = self.refuses(ip, &is_host)
            || hidden(ip).is_some_and(|ip| self.refuses(ip.into(), &is_host));
        if refused { Way::Refused } else { Way::To(destination) }
    }

    fn refuses(&self, ip: IpAddr, is_host: impl Fn(IpAddr) -> bool) -> bool {
        if is_meaningless(ip) || !self.metadata && METADATA.contains(&ip) {
            return true;
        }
        !self.allowed.contains(ip) && (self.refused.contains(ip) || self.refuse_host && is_host(ip))
    }
}

/// Addresses that name nobody, everybody, this host or the link: there is no flow to them that a
/// NAT could carry.
fn is_meaningless(ip: IpAddr) -> bool {
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

/// The IPv4 address within an IPv6 one: IPv4-compatible (RFC 4291 section 2.5.5.1), 6to4
/// (RFC 3056), NAT64 (RFC 6052).
fn hidden(ip: IpAddr) -> Option<Ipv4Addr> {
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

    fn nobody(_: IpAddr) -> bool {
        false
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_hosts_loopback_is_refused_under_every_name() {
        let policy = Policy { metadata: true, ..Policy::default() };
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
            assert_eq!(policy.way(at(refused), nobody), Way::Refused, "{refused}");
        }
        for allowed in
            ["192.0.2.1:80", "[2001:db8::1]:80", "169.254.169.254:80", "[64:ff9b::c000:201]:80"]
        {
            assert_eq!(policy.way(at(allowed), nobody), Way::To(at(allowed)), "{allowed}");
        }
    }

    #[test]
    fn metadata_other_networks_and_the_host_are_refused_where_asked() {
        let policy = Policy {
            refused: CidrSet::parse(["10.1.0.0/16", "fd01::/16"]).unwrap(),
            allowed: CidrSet::parse(["10.1.0.9", "192.0.2.2"]).unwrap(),
            refuse_host: true,
            ..Policy::default()
        };
        let host = |ip: IpAddr| ["192.0.2.1", "192.0.2.2"].iter().any(|own| own.parse() == Ok(ip));
        for (address, refused) in [
            ("169.254.169.254:80", true),
            ("[fd00:ec2::254]:80", true),
            ("10.1.2.3:80", true),
            ("[64:ff9b::a01:203]:80", true),
            ("[fd01::1]:80", true),
            ("10.1.0.9:80", false),
            ("192.0.2.1:80", true),
            ("192.0.2.2:80", false),
            ("192.0.2.3:80", false),
        ] {
            assert_eq!(policy.way(at(address), host) == Way::Refused, refused, "{address}");
        }
    }

    #[test]
    fn a_gateway_forwards_dns_and_the_hosts_loopback_only_if_asked() {
        let mut policy =
            Policy { gateways: vec!["10.0.2.2".parse().unwrap()], ..Policy::default() };
        assert_eq!(policy.way(at("10.0.2.2:53"), nobody), Way::Gateway);
        policy.resolvers.push(at("127.0.0.53:53"));
        assert_eq!(policy.way(at("10.0.2.2:53"), nobody), Way::Resolver);
        assert_eq!(policy.way(at("10.0.2.2:80"), nobody), Way::Gateway);
        policy.host_loopback = true;
        assert_eq!(policy.way(at("10.0.2.2:80"), nobody), Way::To(at("127.0.0.1:80")));
    }

    #[test]
    fn where_there_is_a_name_server_the_gateway_leads_to_the_host_only() {
        let mut policy = Policy {
            gateways: vec!["10.0.2.2".parse().unwrap()],
            name_servers: vec!["10.0.2.3".parse().unwrap()],
            resolvers: vec![at("192.0.2.53:53")],
            host_loopback: true,
            ..Policy::default()
        };
        assert_eq!(policy.way(at("10.0.2.3:53"), nobody), Way::Resolver);
        assert_eq!(policy.way(at("10.0.2.3:80"), nobody), Way::Gateway);
        assert_eq!(policy.way(at("10.0.2.2:53"), nobody), Way::To(at("127.0.0.1:53")));
        policy.host_loopback = false;
        policy.resolvers.clear();
        assert_eq!(policy.way(at("10.0.2.3:53"), nobody), Way::Gateway);
        assert_eq!(policy.way(at("10.0.2.2:53"), nobody), Way::Gateway);
        assert!(["10.0.2.2", "10.0.2.3"].iter().all(|ip| policy.is_own(ip.parse().unwrap())));
    }

    #[test]
    fn packets_of_others_are_not_taken() {
        let policy = Policy { sources: vec!["10.0.2.0/24".parse().unwrap()], ..Policy::default() };
        assert!(policy.knows("10.0.2.100".parse().unwrap()));
        for other in ["10.0.3.1", "127.0.0.1", "fd00::1"] {
            assert!(!policy.knows(other.parse().unwrap()), "{other}");
        }
        assert!(!Policy::default().knows("::1".parse().unwrap()));
    }
}
