//! IP address management. Pure: the caller supplies the time.

use crate::plan::overlap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Time before a released address is assigned again. By then, the neighbour caches have expired its
/// old MAC address (`gc_stale_time`, 60 s), and most peers no longer use the address.
pub const QUARANTINE: Duration = Duration::from_secs(60);

/// The addresses of one subnet.
#[derive(Clone, Debug)]
pub struct Ipam {
    subnet: IpNet,
    taken: BTreeSet<IpAddr>,
    /// Released addresses in quarantine with their end times, earliest first.
    quarantined: VecDeque<(Instant, IpAddr)>,
    /// Offset at which the next search starts, so that a released address is reused as late as
    /// possible.
    next: u128,
}

/// An address that cannot be assigned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// All addresses are assigned or in quarantine.
    #[error("no free address in {0}")]
    Full(IpNet),
    /// The address is already assigned.
    #[error("address {0} is in use")]
    Taken(IpAddr),
    /// The address is outside the subnet or reserved.
    #[error("address {0} is not assignable in {1}")]
    Outside(IpAddr, IpNet),
}

impl Ipam {
    /// Creates the pool of `subnet`, with `gateway` assigned.
    #[must_use]
    pub fn new(subnet: IpNet, gateway: IpAddr) -> Self {
        Self {
            subnet: subnet.trunc(),
            taken: BTreeSet::from([gateway]),
            quarantined: VecDeque::new(),
            next: 0,
        }
    }

    /// Returns the subnet.
    #[must_use]
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// Assigns the next free address.
    ///
    /// # Errors
    /// [`IpamError::Full`].
    pub fn obtain(&mut self, now: Instant) -> Result<IpAddr, IpamError> {
        self.expire_quarantine(now);
        let (first, count) = usable(self.subnet);
        // The search skips at most the assigned and quarantined addresses.
        let attempts = count.min(self.taken.len() as u128 + self.quarantined.len() as u128 + 1);
        for step in 0..attempts {
            let offset = (self.next + step) % count;
            let address = nth(self.subnet, first + offset);
            if !self.taken.contains(&address) && !self.is_quarantined(address) {
                self.next = (offset + 1) % count;
                self.taken.insert(address);
                return Ok(address);
            }
        }
        Err(IpamError::Full(self.subnet))
    }

    /// Assigns the given address, even if it is in quarantine.
    ///
    /// # Errors
    /// [`IpamError::Taken`], [`IpamError::Outside`].
    pub fn claim(&mut self, address: IpAddr) -> Result<(), IpamError> {
        let (first, count) = usable(self.subnet);
        let usable = self.subnet.contains(&address)
            && (first..first + count).contains(&offset(self.subnet, address));
        if !usable {
            return Err(IpamError::Outside(address, self.subnet));
        }
        if !self.taken.insert(address) {
            return Err(IpamError::Taken(address));
        }
        self.quarantined.retain(|(_, quarantined)| *quarantined != address);
        Ok(())
    }

    /// Releases `address` into quarantine for [`QUARANTINE`].
    pub fn release(&mut self, address: IpAddr, now: Instant) {
        if self.taken.remove(&address) {
            self.quarantined.push_back((now + QUARANTINE, address));
        }
    }

    fn expire_quarantine(&mut self, now: Instant) {
        while self.quarantined.front().is_some_and(|(until, _)| *until <= now) {
            self.quarantined.pop_front();
        }
    }

    fn is_quarantined(&self, address: IpAddr) -> bool {
        self.quarantined.iter().any(|(_, quarantined)| *quarantined == address)
    }
}

/// Returns the first assignable offset and the number of assignable addresses. IPv4 reserves the
/// network and broadcast addresses, except in /31 (RFC 3021) and /32. IPv6 reserves the first
/// address as the subnet-router anycast address (RFC 4291, 2.6.1).
fn usable(subnet: IpNet) -> (u128, u128) {
    match subnet {
        IpNet::V4(subnet) => match 32 - subnet.prefix_len() {
            bits @ 0..=1 => (0, 1 << bits),
            bits => (1, (1 << bits) - 2),
        },
        IpNet::V6(subnet) => match 128 - subnet.prefix_len() {
            bits @ 0..=1 => (0, 1 << bits),
            // Limited to 2^64: more are never needed, and 2^128 would overflow.
            bits => (1, (1 << bits.min(64)) - 1),
        },
    }
}

fn nth(subnet: IpNet, offset: u128) -> IpAddr {
    match subnet.network() {
        IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits() + offset as u32).into(),
        IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits() + offset).into(),
    }
}

fn offset(subnet: IpNet, address: IpAddr) -> u128 {
    match (subnet.network(), address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            u128::from(address.to_bits() - network.to_bits())
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => address.to_bits() - network.to_bits(),
        _ => u128::MAX,
    }
}

/// Subnet pools for networks without a configured subnet.
#[derive(Clone, Debug)]
pub struct Pools {
    v4: Vec<(Ipv4Net, u8)>,
    v6: Ipv6Net,
}

/// No free subnet is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no free {} subnet: the pools overlap routes of the host; configure a subnet for the network", if *.v6 { "IPv6" } else { "IPv4" })]
pub struct Exhausted {
    v6: bool,
}

impl Pools {
    /// The default pools. For IPv4, /24 subnets of 172.28.0.0/14 and 10.201.0.0/16, which are
    /// neither allocated first by dockerd nor common in company networks. For IPv6, /64 subnets of
    /// a unique local /48 prefix (RFC 4193) derived from `host_id`.
    #[must_use]
    pub fn usual(host_id: [u8; 5]) -> Self {
        let [a, b, c, d, e] = host_id;
        let prefix = u128::from(u64::from_be_bytes([0, 0, 0xfd, a, b, c, d, e])) << 80;
        let net = |a, b, length| (Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), length), 24);
        Self {
            v4: vec![net(172, 28, 14), net(10, 201, 16)],
            v6: Ipv6Net::new_assert(Ipv6Addr::from_bits(prefix), 48),
        }
    }

    /// Returns whether `net` overlaps the pools.
    #[must_use]
    pub fn overlap(&self, net: &IpNet) -> bool {
        let v4 = self.v4.iter().map(|(pool, _)| IpNet::V4(*pool));
        v4.chain([IpNet::V6(self.v6)]).any(|pool| overlap(&pool, net))
    }

    /// Returns the first subnet that overlaps none of `in_use`.
    ///
    /// # Errors
    /// [`Exhausted`].
    pub fn obtain(&self, v6: bool, in_use: &[IpNet]) -> Result<IpNet, Exhausted> {
        let free = |subnet: &IpNet| !in_use.iter().any(|used| overlap(used, subnet));
        let found = if v6 {
            let mut parts = self.v6.subnets(64).into_iter().flatten();
            parts.find_map(|part| Some(IpNet::V6(part)).filter(free))
        } else {
            let mut parts = self
                .v4
                .iter()
                .flat_map(|(pool, length)| pool.subnets(*length).into_iter().flatten());
            parts.find_map(|part| Some(IpNet::V4(part)).filter(free))
        };
        found.ok_or(Exhausted { v6 })
    }
}

/// Returns the number of assignable addresses in `subnet`, including the gateway, at most 2^64.
#[must_use]
pub fn capacity(subnet: IpNet) -> u128 {
    usable(subnet).1
}

/// Returns the default gateway address: the first assignable address.
#[must_use]
pub fn gateway(subnet: IpNet) -> IpAddr {
    nth(subnet, usable(subnet).0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_assigned_in_order_and_quarantined_after_release() {
        let start = Instant::now();
        let mut ipam = Ipam::new(net("10.9.0.0/29"), ip("10.9.0.1"));
        let given: Vec<_> = (0..5).map(|_| ipam.obtain(start).unwrap()).collect();
        assert_eq!(given, ["10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5", "10.9.0.6"].map(ip));
        assert_eq!(ipam.obtain(start), Err(IpamError::Full(net("10.9.0.0/29"))));
        ipam.release(ip("10.9.0.3"), start);
        assert!(ipam.obtain(start + QUARANTINE - Duration::from_millis(1)).is_err());
        assert_eq!(ipam.obtain(start + QUARANTINE), Ok(ip("10.9.0.3")));
    }

    #[test]
    fn requested_address_must_be_free_and_assignable() {
        let mut ipam = Ipam::new(net("10.9.0.0/24"), ip("10.9.0.1"));
        ipam.claim(ip("10.9.0.77")).unwrap();
        assert_eq!(ipam.claim(ip("10.9.0.77")), Err(IpamError::Taken(ip("10.9.0.77"))));
        assert_eq!(ipam.claim(ip("10.9.0.1")), Err(IpamError::Taken(ip("10.9.0.1"))));
        for none in ["10.9.0.0", "10.9.0.255", "10.9.1.1", "fd00::1"] {
            assert_eq!(ipam.claim(ip(none)), Err(IpamError::Outside(ip(none), net("10.9.0.0/24"))));
        }
        ipam.release(ip("10.9.0.77"), Instant::now());
        assert_eq!(ipam.claim(ip("10.9.0.77")), Ok(()), "a requested address may be in quarantine");
    }

    #[test]
    fn overlapping_subnets_are_skipped() {
        let pools = Pools::usual([1, 2, 3, 4, 5]);
        assert_eq!(pools.obtain(false, &[]), Ok(net("172.28.0.0/24")));
        assert_eq!(
            pools.obtain(false, &[net("172.28.0.0/23"), net("172.28.3.7/32")]),
            Ok(net("172.28.2.0/24"))
        );
        assert_eq!(pools.obtain(false, &[net("172.16.0.0/12")]), Ok(net("10.201.0.0/24")));
        assert!(pools.obtain(false, &[net("172.16.0.0/12"), net("10.0.0.0/8")]).is_err());
        for (other, overlaps) in
            [("172.28.5.0/24", true), ("10.0.0.0/8", true), ("172.17.0.0/16", false)]
        {
            assert_eq!(pools.overlap(&net(other)), overlaps, "{other}");
        }
        assert_eq!(pools.obtain(true, &[net("fd01:203:405::/64")]), Ok(net("fd01:203:405:1::/64")));
        assert_eq!(gateway(net("172.28.0.0/24")), ip("172.28.0.1"));
        assert_eq!(gateway(net("fd01:203:405:1::/64")), ip("fd01:203:405:1::1"));
    }

    proptest! {
        /// Compared with a plain list of assigned and released addresses.
        #[test]
        fn assigned_and_quarantined_addresses_are_not_assigned(
            prefix in 24_u8..=30,
            steps in prop::collection::vec((any::<bool>(), 0_usize..300, 0_u64..40), 1..200),
        ) {
            let subnet = IpNet::new(ip("10.9.0.0"), prefix).unwrap();
            let mut ipam = Ipam::new(subnet, ip("10.9.0.1"));
            let mut now = Instant::now();
            let (mut held, mut left) = (Vec::new(), Vec::<(IpAddr, Instant)>::new());
            for (obtain, which, seconds) in steps {
                now += Duration::from_secs(seconds);
                left.retain(|(_, since)| now < *since + QUARANTINE);
                if obtain {
                    match ipam.obtain(now) {
                        Ok(address) => {
                            prop_assert!(subnet.contains(&address) && address != ip("10.9.0.1"));
                            prop_assert!(!held.contains(&address) && !left.iter().any(|(one, _)| *one == address));
                            held.push(address);
                        }
                        Err(_) => prop_assert_eq!(held.len() + left.len(), (1 << (32 - prefix)) - 3),
                    }
                } else if !held.is_empty() {
                    let address = held.swap_remove(which % held.len());
                    ipam.release(address, now);
                    left.push((address, now));
                }
            }
        }
    }
}
