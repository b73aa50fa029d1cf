//! Comparison of sequence numbers modulo 2^32 (RFC 9293 section 3.4).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

/// Whether `a` precedes `b`.
pub(super) const fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// Whether `a` equals or precedes `b`.
pub(super) const fn up_to(a: u32, b: u32) -> bool {
    !before(b, a)
}

/// The later of `a` and `b`.
pub(super) const fn later(a: u32, b: u32) -> u32 {
    if before(a, b) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequence_numbers_wrap() {
        assert!(before(u32::MAX, 0) && before(u32::MAX - 5, 5) && !before(5, 5));
        assert!(up_to(5, 5) && up_to(u32::MAX, 0) && !up_to(0, u32::MAX));
        assert_eq!(later(u32::MAX, 1), 1);
    }
}
