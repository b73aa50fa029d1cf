//! Which address goes to whom: pure, the caller brings the time.

use crate::plan::overlap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::{BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// How long an address rests after it was given back: neighbours have forgotten its old hardware
/// address by then (`gc_stale_time`, 60 s), and so have most of those who knew it by number.
pub const QUARANTINE: Duration = Duration::from_secs(60);

/// The addresses of one subnet.
#[derive(Clone, Debug)]
pub struct Ipam {
    subnet: IpNet,
    taken: BTreeSet<IpAddr>,
    /// Given back, the longest resting first.
    resting: VecDeque<(Instant, IpAddr)>,
    /// Where to go on looking: an address just left is the last to be given out again.
    next: u128,
}

/// An address that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// All are taken, or rest.
    #[error("no address is left in {0}")]
    Full(IpNet),
    /// Somebody has it.
    #[error("address {0} is in use")]
    Taken(IpAddr),
    /// It is none of this subnet's, or has another meaning there.
    #[error("address {0} cannot be given out in {1}")]
    Outside(IpAddr, IpNet),
}

impl Ipam {
    /// The addresses of `subnet`, of which `gateway` is taken.
    #[must_use]
    pub fn new(subnet: IpNet, gateway: IpAddr) -> Self {
        Self {
            subnet: subnet.trunc(),
            taken: BTreeSet::from([gateway]),
            resting: VecDeque::new(),
            next: 0,
        }
    }

    /// The subnet.
    #[must_use]
    pub fn subnet(&self) -> IpNet {
        self.subnet
    }

    /// The next free address.
    ///
    /// # Errors
    /// [`IpamError::Full`].
    pub fn obtain(&mut self, now: Instant) -> Result<IpAddr, IpamError> {
        self.wake(now);
        let (first, count) = usable(self.subnet);
        // Of all addresses, at most those that are taken or rest have to be passed over.
        let attempts = count.min(self.taken.len() as u128 + self.resting.len() as u128 + 1);
        for step in 0..attempts {
            let offset = (self.next + step) % count;
            let address = nth(self.subnet, first + offset);
            if !self.taken.contains(&address) && !self.rests(address) {
                self.next = (offset + 1) % count;
                self.taken.insert(address);
                return Ok(address);
            }
        }
        Err(IpamError::Full(self.subnet))
    }

    /// This address and no other. One that rests may be asked for by name.
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
        self.resting.retain(|(_, resting)| *resting != address);
        Ok(())
    }

    /// Gives `address` back; it rests for [`QUARANTINE`].
    pub fn release(&mut self, address: IpAddr, now: Instant) {
        if self.taken.remove(&address) {
            self.resting.push_back((now + QUARANTINE, address));
        }
    }

    fn wake(&mut self, now: Instant) {
        while self.resting.front().is_some_and(|(until, _)| *until <= now) {
            self.resting.pop_front();
        }
    }

    fn rests(&self, address: IpAddr) -> bool {
        self.resting.iter().any(|(_, resting)| *resting == address)
    }
}

/// The first offset that may be given out, and how many. IPv4 keeps the network's own address and
/// the broadcast address for itself, except in /31 (RFC 3021) and /32; in IPv6 the first one is the
/// routers' anycast address (RFC 4291, 2.6.1).
fn usable(subnet: IpNet) -> (u128, u128) {
    match subnet {
        IpNet::V4(subnet) => match 32 - subnet.prefix_len() {
            bits @ 0..=1 => (0, 1 << bits),
            bits => (1, (1 << bits) - 2),
        },
        IpNet::V6(subnet) => match 128 - subnet.prefix_len() {
            bits @ 0..=1 => (0, 1 << bits),
            // More can never be asked for, and 2^128 does not fit.
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

/// Where subnets come from for networks that name none.
#[derive(Clone, Debug)]
pub struct Pools {
    v4: Vec<(Ipv4Net, u8)>,
    v6: Ipv6Net,
}

/// No subnet is left.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {} subnet is free: the host reaches something everywhere in the pools; give the network one", if *.v6 { "IPv6" } else { "IPv4" })]
pub struct Exhausted {
    v6: bool,
}

impl Pools {
    /// The usual ones: 172.28.0.0/14 and 10.201.0.0/16 in parts of /24, which is neither what
    /// dockerd begins with nor what most offices use, and a unique local prefix of /48 for IPv6
    /// (RFC 4193) made of `host_id`, in parts of /64.
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

    /// Whether some of `net` is in the pools.
    #[must_use]
    pub fn overlap(&self, net: &IpNet) -> bool {
        let v4 = self.v4.iter().map(|(pool, _)| IpNet::V4(*pool));
        v4.chain([IpNet::V6(self.v6)]).any(|pool| overlap(&pool, net))
    }

    /// The first subnet that overlaps none of `in_use`.
    ///
    /// # Errors
    /// [`Exhausted`].
    pub fn obtain(&self, v6: bool, in_use: &[IpNet]) -> Result<IpNet, Exhausted> {
        let free = |subnet: &IpNet| !in_use.iter().any(|used| overlap(used, subnet));
        let found = if v6 {
            // As many as can be in use, and one more.
            let mut parts = self.v6.subnets(64).into_iter().flatten().take(in_use.len() + 1);
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

/// How many addresses there are to give out in `subnet`, the gateway's included. More than 2^64 are
/// not counted.
#[must_use]
pub fn capacity(subnet: IpNet) -> u128 {
    usable(subnet).1
}

/// The address that a bridge takes when none is given: the first usable one.
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
    fn addresses_are_given_out_in_turn_and_rest_after_use() {
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
    fn a_named_address_is_had_unless_it_is_taken_or_none() {
        let mut ipam = Ipam::new(net("10.9.0.0/24"), ip("10.9.0.1"));
        ipam.claim(ip("10.9.0.77")).unwrap();
        assert_eq!(ipam.claim(ip("10.9.0.77")), Err(IpamError::Taken(ip("10.9.0.77"))));
        assert_eq!(ipam.claim(ip("10.9.0.1")), Err(IpamError::Taken(ip("10.9.0.1"))));
        for none in ["10.9.0.0", "10.9.0.255", "10.9.1.1", "fd00::1"] {
            assert_eq!(ipam.claim(ip(none)), Err(IpamError::Outside(ip(none), net("10.9.0.0/24"))));
        }
        ipam.release(ip("10.9.0.77"), Instant::now());
        assert_eq!(ipam.claim(ip("10.9.0.77")), Ok(()), "by name it need not rest");
    }

    #[test]
    fn a_subnet_that_something_is_in_is_passed_over() {
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
        /// Against a plain list of who has what since when.
        #[test]
        fn nobody_gets_what_another_has_or_has_just_left(
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
