//! Shares of a limited resource: who shares one, how much one holder may take, and who holds most.

use std::collections::BTreeSet;
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

/// Whether a holder of `held` places may take one more while `free` are left: while it has fewer
/// than twice as many as are free (a dynamic threshold, Choudhury and Hahne 1998). One holder gets
/// two thirds of a limit, and a third is left at once for the others; two get two fifths each. A
/// holder of nothing may take the last place.
#[must_use]
pub const fn may_take(held: usize, free: usize) -> bool {
    held < free.saturating_mul(2)
}

/// Holders by how much they hold, to find the largest one, which yields at a limit. Who holds one
/// place or none is left out: there is nobody for whom it would have to yield.
#[derive(Clone, Debug)]
pub struct Ranking<K>(BTreeSet<(usize, K)>);

impl<K> Default for Ranking<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Copy + Ord> Ranking<K> {
    /// Notes that `holder`, which held `before` places, holds `now`.
    pub fn change(&mut self, holder: K, before: usize, now: usize) {
        if before > 1 {
            self.0.remove(&(before, holder));
        }
        if now > 1 {
            self.0.insert((now, holder));
        }
    }

    /// The largest holder, and what it holds: two at least.
    #[must_use]
    pub fn largest(&self) -> Option<(K, usize)> {
        self.0.last().map(|(held, holder)| (*holder, *held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What holders get who take places in turn, as long as they may.
    fn taken(limit: usize, holders: usize) -> Vec<usize> {
        let mut held = vec![0; holders];
        for _ in 0..limit {
            for holder in 0..holders {
                let free = limit - held.iter().sum::<usize>();
                held[holder] += usize::from(may_take(held[holder], free));
            }
        }
        held
    }

    #[test]
    fn one_holder_gets_two_thirds_and_several_get_the_same() {
        assert_eq!(taken(99, 1), [66]);
        assert_eq!(taken(100, 2), [40, 40]);
        assert_eq!(taken(9, 3), [3, 3, 2]);
        assert_eq!((taken(1, 1), taken(2, 1), taken(3, 1)), (vec![1], vec![2], vec![2]));
        assert!(may_take(0, 1) && !may_take(0, 0) && may_take(usize::MAX - 1, usize::MAX));
    }

    #[test]
    fn the_largest_holder_is_known_and_one_of_a_single_place_is_not_ranked() {
        let mut ranking = Ranking::default();
        ranking.change('a', 0, 1);
        assert_eq!(ranking.largest(), None);
        ranking.change('a', 1, 2);
        ranking.change('b', 0, 5);
        assert_eq!(ranking.largest(), Some(('b', 5)));
        ranking.change('b', 5, 1);
        assert_eq!(ranking.largest(), Some(('a', 2)));
        ranking.change('a', 2, 0);
        assert_eq!(ranking.largest(), None);
    }

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
