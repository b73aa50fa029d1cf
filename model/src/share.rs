//! Shares of a limited resource: holder of a share, size of a share, largest holder.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

/// The address under which `address` counts against a limit: an IPv4 address itself, or the first
/// address of the /64 of an IPv6 address. A single host can use a whole /64 (RFC 4291 section
/// 2.5.4, RFC 8981), so limits per IPv6 address are ineffective. An IPv4-mapped address counts as
/// the IPv4 address.
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

/// Whether a holder of `held` units may take one more while `free` units are left. It may if it
/// holds fewer than twice as many units as are free (dynamic threshold, Choudhury and Hahne 1998).
/// One holder gets two thirds of a limit, and one third stays free for others; two holders get two
/// fifths each. A holder without a unit may take the last one.
#[must_use]
pub const fn may_take(held: usize, free: usize) -> bool {
    held < free.saturating_mul(2)
}

/// Holders ordered by the number of units they hold. When a limit is reached, the largest holder
/// loses a unit. Holders of at most one unit are not ranked, because evicting them would favour no
/// smaller holder.
#[derive(Clone, Debug)]
pub struct Ranking<K>(BTreeSet<(usize, K)>);

impl<K> Default for Ranking<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Copy + Ord> Ranking<K> {
    /// Updates `holder` from `before` to `now` units.
    pub fn change(&mut self, holder: K, before: usize, now: usize) {
        if before > 1 {
            self.0.remove(&(before, holder));
        }
        if now > 1 {
            self.0.insert((now, holder));
        }
    }

    /// The largest holder and its number of units, at least two.
    #[must_use]
    pub fn largest(&self) -> Option<(K, usize)> {
        self.0.last().map(|(held, holder)| (*holder, *held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units per holder if the holders take units in turn until none may take more.
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
    fn one_holder_gets_two_thirds_and_several_get_equal_shares() {
        assert_eq!(taken(99, 1), [66]);
        assert_eq!(taken(100, 2), [40, 40]);
        assert_eq!(taken(9, 3), [3, 3, 2]);
        assert_eq!((taken(1, 1), taken(2, 1), taken(3, 1)), (vec![1], vec![2], vec![2]));
        assert!(may_take(0, 1) && !may_take(0, 0) && may_take(usize::MAX - 1, usize::MAX));
    }

    #[test]
    fn the_largest_holder_ranks_first_and_single_places_do_not_rank() {
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
    fn each_ipv4_address_has_its_own_share() {
        assert_eq!(share("192.0.2.7"), "192.0.2.7");
        assert_eq!(share("::ffff:192.0.2.7"), "192.0.2.7");
    }

    #[test]
    fn addresses_of_a_slash_64_share() {
        assert_eq!(share("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(share("2001:db8:1:2:ffff::1"), share("2001:db8:1:2::9"));
        assert_ne!(share("2001:db8:1:3::1"), share("2001:db8:1:2::1"));
        assert_eq!(share("::1"), "::");
    }
}
