//! Choice of addresses, with a quarantine of released ones. Pure: the caller supplies the time.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;
use tidegate_netsetup::{QUARANTINE, capacity, gateway};

/// Maximum number of addresses in quarantine. The oldest ones leave early.
const MAX_RELEASED: usize = 65_536;

/// Addresses that were released less than [`QUARANTINE`] ago, and are not chosen again until then.
///
/// Not a part of the state: it is empty after a restart, and it remains changed if the store
/// rejects the new state. Both affect only which address is chosen next.
#[derive(Clone, Debug, Default)]
pub struct Quarantine {
    /// End of the quarantine. Subnets do not overlap, so the address identifies the subnet.
    until: BTreeMap<IpAddr, Instant>,
    /// The same in order of time. May contain addresses that left the quarantine.
    order: VecDeque<(Instant, IpAddr)>,
    /// The last chosen address of each subnet. The next search starts after it, so that a released
    /// address is reused as late as possible.
    last: BTreeMap<IpNet, IpAddr>,
}

impl Quarantine {
    /// Creates an empty quarantine.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses an address of `subnet` that is neither in `taken` nor in quarantine.
    pub(crate) fn choose(
        &self,
        subnet: IpNet,
        taken: &BTreeSet<IpAddr>,
        now: Instant,
    ) -> Option<IpAddr> {
        let (first, count) = (gateway(subnet), capacity(subnet));
        let start = self.last.get(&subnet).map_or(0, |last| bits(*last) - bits(first) + 1);
        // The search skips at most the assigned and quarantined addresses.
        let attempts = count.min((taken.len() + self.until.len() + 1) as u128);
        let mut candidates = (0..attempts).map(|step| nth(first, (start + step) % count));
        candidates.find(|address| {
            !taken.contains(address) && self.until.get(address).is_none_or(|until| *until <= now)
        })
    }

    /// Records that `address` was assigned. The next search starts after a `chosen` address.
    pub(crate) fn assigned(&mut self, subnet: IpNet, address: IpAddr, chosen: bool) {
        self.until.remove(&address);
        if chosen {
            self.last.insert(subnet, address);
        }
    }

    /// Puts `address` into quarantine.
    pub(crate) fn release(&mut self, address: IpAddr, now: Instant) {
        while let Some((until, address)) = self.order.front().copied()
            && (until <= now || self.order.len() >= MAX_RELEASED)
        {
            self.order.pop_front();
            if self.until.get(&address) == Some(&until) {
                self.until.remove(&address);
            }
        }
        let until = now + QUARANTINE;
        self.until.insert(address, until);
        self.order.push_back((until, address));
    }

    /// Forgets the last chosen address of a removed subnet.
    pub(crate) fn forget(&mut self, subnet: IpNet) {
        self.last.remove(&subnet);
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The address `offset` after `first`, within the same subnet.
fn nth(first: IpAddr, offset: u128) -> IpAddr {
    match first {
        IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + offset as u32).into(),
        IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + offset).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        /// Compared with plain lists of assigned and released addresses.
        #[test]
        fn assigned_and_quarantined_addresses_are_not_chosen(
            subnet in prop::sample::select(vec![
                "10.9.0.0/30", "10.9.0.0/28", "255.255.255.0/28", "fd09::/125", "fd09::/64",
            ]),
            steps in prop::collection::vec((any::<bool>(), 0_usize..300, 0_u64..40), 1..100),
        ) {
            let subnet: IpNet = subnet.parse().unwrap();
            let mut quarantine = Quarantine::new();
            let mut now = Instant::now();
            let gateway = gateway(subnet);
            let (mut held, mut left) = (BTreeSet::from([gateway]), Vec::<(IpAddr, Instant)>::new());
            for (obtain, which, seconds) in steps {
                now += Duration::from_secs(seconds);
                left.retain(|(_, since)| now < *since + QUARANTINE);
                if obtain {
                    if let Some(address) = quarantine.choose(subnet, &held, now) {
                        prop_assert!(subnet.contains(&address) && address != subnet.network());
                        prop_assert!(address.is_ipv6() || address != subnet.broadcast());
                        prop_assert!(!left.iter().any(|(one, _)| *one == address));
                        prop_assert!(held.insert(address));
                        quarantine.assigned(subnet, address, true);
                    } else {
                        prop_assert_eq!((held.len() + left.len()) as u128, capacity(subnet));
                    }
                } else if held.len() > 1 {
                    let chosen = *held.iter().filter(|one| **one != gateway)
                        .nth(which % (held.len() - 1)).unwrap();
                    held.remove(&chosen);
                    quarantine.release(chosen, now);
                    left.push((chosen, now));
                }
            }
        }
    }

    #[test]
    fn size_of_the_quarantine_is_bounded() {
        let (mut quarantine, now) = (Quarantine::new(), Instant::now());
        let first: IpAddr = "fd09::1".parse().unwrap();
        for number in 0..MAX_RELEASED as u128 + 10 {
            quarantine.release(nth(first, number), now);
            quarantine.release(first, now);
        }
        assert!(quarantine.order.len() <= MAX_RELEASED && quarantine.until.len() <= MAX_RELEASED);
    }
}
