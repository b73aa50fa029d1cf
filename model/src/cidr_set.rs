//! Address allow-lists.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

/// The IPv4-mapped addresses, `::ffff:0:0/96` (RFC 4291 section 2.5.5.2).
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

/// A set of addresses, built from CIDR blocks and single addresses.
///
/// The address families are separate. An IPv4-mapped IPv6 address is looked up as the embedded IPv4
/// address, so a client cannot bypass the list by using the mapped form. `::/0` contains no IPv4
/// address. A block of mapped addresses (`::ffff:192.0.2.0/120`) is equivalent to the IPv4 block.
///
/// An empty set [`contains`](Self::contains) nothing. The caller decides whether an empty set means
/// "allow all" or "deny all".
///
/// Blocks are stored as sorted, disjoint, non-adjacent ranges; a lookup is one binary search. A set
/// is built from at most [`MAX_ENTRIES`](Self::MAX_ENTRIES) blocks and takes at most 2 MiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CidrSet {
    v4: Vec<(Ipv4Addr, Ipv4Addr)>,
    v6: Vec<(Ipv6Addr, Ipv6Addr)>,
}

impl CidrSet {
    /// Maximum number of blocks.
    pub const MAX_ENTRIES: usize = 65_536;

    /// Parses a list of blocks (`10.0.0.0/8`, `2001:db8::/32`) and single addresses (`192.0.2.1`,
    /// `::1`). Order and duplicates do not matter.
    ///
    /// # Errors
    ///
    /// Returns an error for the first invalid entry, or if there are more than
    /// [`MAX_ENTRIES`](Self::MAX_ENTRIES).
    ///
    /// ```
    /// use tidegate_model::CidrSet;
    ///
    /// let set = CidrSet::parse(["10.0.0.0/8", "::1"])?;
    /// assert!(set.contains("10.1.2.3".parse().unwrap()));
    /// assert!(!set.contains("192.0.2.1".parse().unwrap()));
    ///
    /// let error = CidrSet::parse(["10.1.2.3/8"]).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "10.1.2.3/8 has host bits set: 10.0.0.0/8 or 10.1.2.3/32 was probably meant"
    /// );
    /// # Ok::<(), tidegate_model::CidrSetError>(())
    /// ```
    pub fn parse<S: AsRef<str>>(
        entries: impl IntoIterator<Item = S>,
    ) -> Result<Self, CidrSetError> {
        let mut set = Self::default();
        for (index, entry) in entries.into_iter().enumerate() {
            if index >= Self::MAX_ENTRIES {
                return Err(CidrSetError::TooMany);
            }
            set.push(parse_block(entry.as_ref())?);
        }
        set.normalize();
        Ok(set)
    }

    fn push(&mut self, block: IpNet) {
        match canonical_block(block) {
            IpNet::V4(block) => self.v4.push((block.network(), block.broadcast())),
            IpNet::V6(block) => self.v6.push((block.network(), block.broadcast())),
        }
    }

    fn normalize(&mut self) {
        merge(&mut self.v4, |end| end.to_bits().checked_add(1).map(Ipv4Addr::from_bits));
        merge(&mut self.v6, |end| end.to_bits().checked_add(1).map(Ipv6Addr::from_bits));
    }

    /// Whether the set contains `ip`.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip.to_canonical() {
            IpAddr::V4(ip) => ranges_contain(&self.v4, ip),
            IpAddr::V6(ip) => ranges_contain(&self.v6, ip),
        }
    }

    /// Whether the set was built from no blocks.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// Builds a set from valid blocks. Host bits are ignored. The caller limits the number of blocks.
impl FromIterator<IpNet> for CidrSet {
    fn from_iter<I: IntoIterator<Item = IpNet>>(blocks: I) -> Self {
        let mut set = Self::default();
        blocks.into_iter().for_each(|block| set.push(block));
        set.normalize();
        set
    }
}

/// Parse error of a [`CidrSet`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CidrSetError {
    /// The entry is neither an address nor a block.
    #[error("{0:?} is not an address or a CIDR block such as 10.0.0.0/8")]
    Invalid(String),
    /// The address has bits set after the prefix.
    #[error("{given} has host bits set: {block} or {host} was probably meant")]
    HostBits {
        /// The entry as given.
        given: IpNet,
        /// The block that contains the address.
        block: IpNet,
        /// The address alone.
        host: IpNet,
    },
    /// The list is longer than [`CidrSet::MAX_ENTRIES`].
    #[error("more than {} address blocks", CidrSet::MAX_ENTRIES)]
    TooMany,
}

fn parse_block(entry: &str) -> Result<IpNet, CidrSetError> {
    let invalid = || CidrSetError::Invalid(entry.to_owned());
    if !entry.contains('/') {
        return entry.parse().map(|address: IpAddr| address.into()).map_err(|_| invalid());
    }
    let given: IpNet = entry.parse().map_err(|_| invalid())?;
    let block = given.trunc();
    if block == given {
        Ok(block)
    } else {
        Err(CidrSetError::HostBits { given, block, host: given.addr().into() })
    }
}

/// Converts a block of IPv4-mapped addresses to the IPv4 block that [`CidrSet::contains`] searches.
fn canonical_block(block: IpNet) -> IpNet {
    match block {
        IpNet::V6(v6) if MAPPED.contains(&v6) => {
            let prefix = v6.prefix_len() - MAPPED.prefix_len();
            IpNet::new_assert(IpAddr::V6(v6.addr()).to_canonical(), prefix)
        }
        _ => block,
    }
}

/// Sorts inclusive ranges and joins those that overlap or are adjacent. `next` returns the address
/// after its argument.
fn merge<A: Copy + Ord>(ranges: &mut Vec<(A, A)>, next: impl Fn(A) -> Option<A>) {
    ranges.sort_unstable();
    ranges.dedup_by(|(start, end), (_, previous_end)| {
        let joined = next(*previous_end).is_none_or(|behind| *start <= behind);
        if joined {
            *previous_end = (*previous_end).max(*end);
        }
        joined
    });
    ranges.shrink_to_fit();
}

/// Whether one of the sorted, disjoint ranges contains `ip`. Only the last range that starts at or
/// before `ip` can contain it.
fn ranges_contain<A: Copy + Ord>(ranges: &[(A, A)], ip: A) -> bool {
    let behind = ranges.partition_point(|&(start, _)| start <= ip);
    behind.checked_sub(1).is_some_and(|index| ip <= ranges[index].1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mapped_address_matches_as_the_ipv4_address() {
        let set = CidrSet::parse(["192.0.2.0/24"]).unwrap();
        assert!(set.contains(ip("::ffff:192.0.2.7")));
        assert!(!set.contains(ip("::ffff:192.0.3.7")));
        let everything_v6 = CidrSet::parse(["::/0"]).unwrap();
        assert!(everything_v6.contains(ip("2001:db8::1")));
        assert!(!everything_v6.contains(ip("::ffff:192.0.2.7")));
        assert!(!everything_v6.contains(ip("192.0.2.7")));
    }

    #[test]
    fn a_block_of_mapped_addresses_equals_the_ipv4_block() {
        assert_eq!(CidrSet::parse(["::ffff:192.0.2.0/120"]), CidrSet::parse(["192.0.2.0/24"]));
        assert_eq!(CidrSet::parse(["::ffff:192.0.2.1"]), CidrSet::parse(["192.0.2.1"]));
        assert_eq!(CidrSet::parse(["::ffff:0:0/96"]), CidrSet::parse(["0.0.0.0/0"]));
    }

    #[test]
    fn an_empty_set_contains_nothing() {
        let set = CidrSet::parse([] as [&str; 0]).unwrap();
        assert!(set.is_empty());
        assert!(!set.contains(ip("0.0.0.0")));
        assert!(!set.contains(ip("::")));
    }

    #[test]
    fn adjacent_blocks_are_joined() {
        let halves =
            CidrSet::parse(["128.0.0.0/1", "0.0.0.0/1", "10.0.0.0/8", "8000::/1", "::/1"]).unwrap();
        assert_eq!(halves, CidrSet::parse(["::/0", "0.0.0.0/0"]).unwrap());
        assert_eq!((halves.v4.len(), halves.v6.len()), (1, 1));
    }

    #[test]
    fn host_bits_are_an_error_that_suggests_a_correction() {
        assert_eq!(
            error("10.0.0.5/8"),
            "10.0.0.5/8 has host bits set: 10.0.0.0/8 or 10.0.0.5/32 was probably meant"
        );
        assert_eq!(
            error("fd00::1/64"),
            "fd00::1/64 has host bits set: fd00::/64 or fd00::1/128 was probably meant"
        );
    }

    #[test]
    fn an_invalid_entry_is_quoted_in_the_error() {
        for entry in [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "fe80::1%eth0",
            "localhost",
            " ::1",
        ] {
            let expected =
                format!("{entry:?} is not an address or a CIDR block such as 10.0.0.0/8");
            assert_eq!(error(entry), expected);
        }
    }

    #[test]
    fn a_list_over_the_limit_is_an_error() {
        let list = |length| CidrSet::parse(std::iter::repeat_n("192.0.2.1", length));
        assert!(list(CidrSet::MAX_ENTRIES).is_ok());
        assert_eq!(list(CidrSet::MAX_ENTRIES + 1), Err(CidrSetError::TooMany));
    }

    proptest! {
        #[test]
        fn agrees_with_checking_each_block(
            blocks in prop::collection::vec(block(), 0..12),
            probes in prop::collection::vec(close_ip(), 1..32),
        ) {
            let set = CidrSet::parse(blocks.iter().map(ToString::to_string)).unwrap();
            let edges = blocks.iter().flat_map(|block| [block.network(), block.broadcast()]);
            for probe in probes.into_iter().chain(edges) {
                let canonical = probe.to_canonical();
                let expected = blocks.iter().any(|&block| canonical_block(block).contains(&canonical));
                prop_assert_eq!(set.contains(probe), expected, "{}", probe);
            }
        }

        #[test]
        fn order_does_not_matter(mut blocks in prop::collection::vec(block(), 0..12)) {
            let set = CidrSet::parse(blocks.iter().map(ToString::to_string));
            blocks.reverse();
            prop_assert_eq!(CidrSet::parse(blocks.iter().map(ToString::to_string)), set);
        }

        #[test]
        fn parsing_never_panics(entry in "[0-9a-f:./%]{0,24}|.*") {
            let _ = CidrSet::parse([entry]);
        }
    }

    /// Addresses close enough together for blocks to overlap, in all three forms.
    fn close_ip() -> impl Strategy<Value = IpAddr> {
        let v4 = prop_oneof![0..64_u32, u32::MAX - 64..=u32::MAX, any::<u32>()]
            .prop_map(Ipv4Addr::from_bits);
        let v6 = prop_oneof![0..64_u128, u128::MAX - 64..=u128::MAX, any::<u128>()]
            .prop_map(Ipv6Addr::from_bits);
        prop_oneof![
            v4.clone().prop_map(IpAddr::V4),
            v6.prop_map(IpAddr::V6),
            v4.prop_map(|v4| v4.to_ipv6_mapped().into()),
        ]
    }

    fn block() -> impl Strategy<Value = IpNet> {
        (close_ip(), 0..=128_u8, any::<bool>()).prop_map(|(ip, prefix, long)| {
            let whole = IpNet::from(ip).max_prefix_len();
            let prefix = if long { whole - prefix % 8 } else { prefix % (whole + 1) };
            IpNet::new_assert(ip, prefix).trunc()
        })
    }

    fn error(entry: &str) -> String {
        CidrSet::parse([entry]).unwrap_err().to_string()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }
}
