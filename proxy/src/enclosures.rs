//! Addresses of this host that are there for one network each: the gateways of container networks.
//!
//! A socket on all addresses answers on these as well, and the kernel hands it what comes in by any interface (the weak host model,
//! RFC 1122, 3.3.4.2). So who asks there is looked at.

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The index of `lo` in every namespace (`LOOPBACK_IFINDEX`, include/net/flow.h): by it comes what the host sends to itself.
const LOOPBACK: u32 = 1;

/// One such address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enclosure {
    /// The address.
    pub gateway: IpAddr,
    /// The network.
    pub network: IpNet,
    /// Its members may ask there; otherwise the host alone may, whose address it is.
    pub admits: bool,
    /// The index of the only interface that they come by, besides `lo`; 0 if it is not known, [`ELSEWHERE`](Self::ELSEWHERE) if
    /// it is in another namespace than the listening socket.
    pub interface: u32,
}

impl Enclosure {
    /// An interface by which nothing comes here.
    pub const ELSEWHERE: u32 = u32::MAX;

    fn is_by_another(&self, interface: u32) -> bool {
        interface != 0 && self.interface != 0 && ![self.interface, LOOPBACK].contains(&interface)
    }
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enclosures(BTreeMap<IpAddr, Enclosure>);

impl Enclosures {
    /// Whether `client` must not be answered at `local`: at the gateway of another network, or anywhere if his own network is one that is not admitted. Over TCP no client can pretend to be of the network: the answer to its SYN
    /// goes there. Of a datagram the interface tells; 0 if it is not known.
    #[must_use]
    pub fn shut_out(&self, client: IpAddr, local: IpAddr, interface: u32) -> bool {
        let shut_in = |enclosure: &Enclosure| {
            !enclosure.admits && enclosure.network.contains(&client) && client != enclosure.gateway
        };
        if self.0.values().any(shut_in) {
            return true;
        }
        self.0.get(&local).is_some_and(|enclosure| {
            let may = client == enclosure.gateway || enclosure.admits && enclosure.network.contains(&client);
            !may || enclosure.is_by_another(interface)
        })
    }

    /// Whether a datagram claims to come from one of the networks and came by another interface, whichever address it was sent to.
    #[must_use]
    pub fn is_forged(&self, client: IpAddr, interface: u32) -> bool {
        let claims = |enclosure: &&Enclosure| enclosure.network.contains(&client);
        self.0.values().find(claims).is_some_and(|enclosure| enclosure.is_by_another(interface))
    }

    /// The same, for sockets of another namespace than the networks'.
    #[must_use]
    pub fn seen_from_elsewhere(&self) -> Self {
        let elsewhere = |one: &Enclosure| Enclosure { interface: Enclosure::ELSEWHERE, ..*one };
        self.0.values().map(elsewhere).collect()
    }

    /// Whether `address` is one of them.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains_key(&address)
    }

    /// Whether there are none, so that nobody has to be asked for the address he used.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Enclosure> for Enclosures {
    fn from_iter<T: IntoIterator<Item = Enclosure>>(enclosures: T) -> Self {
        Self(enclosures.into_iter().map(|enclosure| (enclosure.gateway, enclosure)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gateway_answers_its_own_network_alone() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let pairs = [("10.9.0.1", "10.9.0.0/24", 7), ("fd09::1", "fd09::/64", 0)];
        let enclosures: Enclosures = pairs
            .into_iter()
            .map(|(at, net, interface)| Enclosure {
                gateway: ip(at),
                network: net.parse().unwrap(),
                admits: true,
                interface,
            })
            .collect();
        for (client, local, interface, out) in [
            ("10.9.0.7", "10.9.0.1", 0, false),
            ("10.9.0.7", "10.9.0.1", 7, false),
            ("10.9.0.7", "10.9.0.1", 2, true),
            ("10.9.0.1", "10.9.0.1", LOOPBACK, false),
            ("10.9.1.7", "10.9.0.1", 7, true),
            ("203.0.113.9", "10.9.0.1", 2, true),
            ("203.0.113.9", "203.0.113.1", 2, false),
            ("fd09::7", "fd09::1", 2, false),
            ("2001:db8::7", "fd09::1", 0, true),
        ] {
            assert_eq!(
                enclosures.shut_out(ip(client), ip(local), interface),
                out,
                "{client} at {local} by {interface}"
            );
        }
        assert!(enclosures.is_forged(ip("10.9.0.7"), 2) && !enclosures.is_forged(ip("10.9.0.7"), 7));
        assert!(!enclosures.is_forged(ip("203.0.113.9"), 2));
        assert!(enclosures.seen_from_elsewhere().is_forged(ip("10.9.0.7"), 7));
    }

    #[test]
    fn one_that_admits_nobody_answers_the_host() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let one = Enclosure {
            gateway: ip("10.9.0.1"),
            network: "10.9.0.0/24".parse().unwrap(),
            admits: false,
            interface: 7,
        };
        let enclosures = Enclosures::from_iter([one]);
        assert!(enclosures.shut_out(ip("10.9.0.7"), ip("10.9.0.1"), 7));
        assert!(!enclosures.shut_out(ip("10.9.0.1"), ip("10.9.0.1"), LOOPBACK));
    }
}
