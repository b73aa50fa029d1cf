//! The Internet checksum (RFC 1071) and the pseudo-headers of TCP, UDP and ICMPv6.
//!
//! Sums use 64 bits in native byte order (permitted by RFC 1071 section 2(B)), eight bytes per
//! addition, and are folded at the end.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::IpAddr;

/// An unfolded sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// Adds `bytes`. Only the last slice may have an odd length.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        let mut words = bytes.chunks_exact(8);
        for word in &mut words {
            let word = u64::from_ne_bytes([
                word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7],
            ]);
            self = self.add(word);
        }
        let rest = words.remainder();
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.add(u64::from_ne_bytes(last))
    }

    /// Adds a 16-bit field.
    #[must_use]
    pub fn number(self, number: u16) -> Self {
        self.add(u64::from(number.to_be()))
    }

    fn add(self, word: u64) -> Self {
        let (sum, carry) = self.0.overflowing_add(word);
        Self(sum + u64::from(carry))
    }

    /// The folded sum, not complemented, for a checksum field that the kernel completes.
    #[must_use]
    pub fn partial(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        while sum >> 16 != 0 {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        u16::from_be(sum as u16)
    }

    /// The checksum.
    #[must_use]
    pub fn finish(self) -> u16 {
        !self.partial()
    }
}

/// The sum of the pseudo-header: RFC 9293 section 3.1 for IPv4, RFC 8200 section 8.1 for IPv6. Both
/// addresses must be of the same family. `length` is that of the transport header and payload.
#[must_use]
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Sum {
    let sum = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Sum::default().bytes(&source.octets()).bytes(&destination.octets())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Sum::default().bytes(&source.octets()).bytes(&destination.octets())
        }
        _ => Sum::default(),
    };
    sum.number(u16::from(protocol)).number(length as u16).number((length >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The reference algorithm of RFC 1071 section 4.1.
    fn plain(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn rfc_1071_section_3_example() {
        assert_eq!(
            Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]).partial(),
            0xddf2
        );
    }

    proptest! {
        #[test]
        fn agrees_with_the_reference_algorithm(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..150) {
            prop_assert_eq!(Sum::default().bytes(&bytes).partial(), plain(&bytes));
            let (head, tail) = bytes.split_at((cut * 2).min(bytes.len() & !1));
            prop_assert_eq!(Sum::default().bytes(head).bytes(tail).partial(), plain(&bytes));
        }
    }
}
