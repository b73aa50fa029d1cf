//! SipHash-1-3 and SipHash-2-4 (Aumasson and Bernstein, 2012): keyed hashes that cannot be
//! predicted without the key.
//!
//! The flow table uses the fast variant, so that a guest cannot choose ports that collide in one
//! bucket. Initial sequence numbers use the strong variant as the pseudo-random function of RFC
//! 6528 section 3.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::hash::{BuildHasher, Hasher};

/// A key, generated at random once per process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashKey(pub [u64; 2]);

/// A hasher state. It processes whole words; each shorter write is padded to a word.
#[derive(Clone, Copy, Debug)]
pub struct SipHasher<const ROUNDS: usize, const LAST_ROUNDS: usize> {
    state: [u64; 4],
    words: u64,
}

impl<const ROUNDS: usize, const LAST_ROUNDS: usize> SipHasher<ROUNDS, LAST_ROUNDS> {
    /// Creates a hasher without input.
    #[must_use]
    pub const fn new(key: HashKey) -> Self {
        let [k0, k1] = key.0;
        let state = [
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ];
        Self { state, words: 0 }
    }

    fn word(&mut self, word: u64) {
        self.state[3] ^= word;
        rounds::<ROUNDS>(&mut self.state);
        self.state[0] ^= word;
        self.words += 1;
    }
}

fn rounds<const COUNT: usize>([v0, v1, v2, v3]: &mut [u64; 4]) {
    for _ in 0..COUNT {
        *v0 = v0.wrapping_add(*v1);
        *v1 = v1.rotate_left(13) ^ *v0;
        *v0 = v0.rotate_left(32);
        *v2 = v2.wrapping_add(*v3);
        *v3 = v3.rotate_left(16) ^ *v2;
        *v0 = v0.wrapping_add(*v3);
        *v3 = v3.rotate_left(21) ^ *v0;
        *v2 = v2.wrapping_add(*v1);
        *v1 = v1.rotate_left(17) ^ *v2;
        *v2 = v2.rotate_left(32);
    }
}

impl<const ROUNDS: usize, const LAST_ROUNDS: usize> Hasher for SipHasher<ROUNDS, LAST_ROUNDS> {
    fn finish(&self) -> u64 {
        let mut last = *self;
        // The length in bytes, modulo 256, in the topmost byte.
        last.word(last.words.wrapping_mul(8) << 56);
        last.state[2] ^= 0xff;
        rounds::<LAST_ROUNDS>(&mut last.state);
        last.state.iter().fold(0, |hash, word| hash ^ word)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.word(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.word(word);
    }
}

impl BuildHasher for HashKey {
    type Hasher = SipHasher<1, 3>;

    fn build_hasher(&self) -> Self::Hasher {
        SipHasher::new(*self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: HashKey = HashKey([0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908]);

    /// Test vectors of the reference implementation: input 00 01 02 ..., key 00 01 02 ....
    #[test]
    fn whole_words_match_the_reference_vectors() {
        let mut hasher = SipHasher::<2, 4>::new(KEY);
        assert_eq!(hasher.finish(), 0x726f_db47_dd0e_0e31);
        hasher.write(&[0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(hasher.finish(), 0x93f5_f579_9a93_2462);
        hasher.write(&[8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(hasher.finish(), 0x3f2a_cc7f_57c2_9bdb);
    }

    #[test]
    fn different_keys_give_different_hashes() {
        let other = HashKey([KEY.0[0] ^ 1, KEY.0[1]]);
        assert_ne!(KEY.hash_one(7u64), other.hash_one(7u64));
    }
}
