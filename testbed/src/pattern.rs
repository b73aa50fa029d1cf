//! A reproducible stream of bytes that locates errors in a transfer.
//!
//! A hash only shows that a transfer differs. A stream that both ends can generate shows at which
//! byte, without a copy of the sent data.

/// A stream of pseudo-random bytes determined by a seed, with a position.
///
/// No part repeats within a transfer, so a lost, duplicated or moved block is detected where it
/// starts.
#[derive(Clone, Debug)]
pub struct Pattern {
    state: u64,
    /// The last `left` bytes of `block` are unused.
    block: [u8; 8],
    left: usize,
    position: u64,
}

impl Pattern {
    /// The stream of `seed` at its start.
    pub fn new(seed: u64) -> Self {
        Self { state: seed, block: [0; 8], left: 0, position: 0 }
    }

    /// Returns the number of bytes generated or checked.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Fills `buffer` with the next bytes of the stream.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        self.position += buffer.len() as u64;
        let (head, rest) = buffer.split_at_mut(self.left.min(buffer.len()));
        self.take(head);
        let mut words = rest.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next_block());
        }
        let tail = words.into_remainder();
        if !tail.is_empty() {
            self.block = self.next_block();
            self.left = 8;
            self.take(tail);
        }
    }

    /// Compares `data` with the next bytes of the stream.
    ///
    /// # Errors
    ///
    /// The stream position of the first differing byte.
    pub fn check(&mut self, data: &[u8]) -> Result<(), u64> {
        let mut expected = [0; 4096];
        for chunk in data.chunks(expected.len()) {
            let start = self.position;
            let expected = &mut expected[..chunk.len()];
            self.fill(expected);
            if let Some(at) = chunk.iter().zip(expected.iter()).position(|(got, want)| got != want)
            {
                return Err(start + at as u64);
            }
        }
        Ok(())
    }

    /// Copies bytes of the current block, which must have enough.
    fn take(&mut self, out: &mut [u8]) {
        let start = self.block.len() - self.left;
        out.copy_from_slice(&self.block[start..start + out.len()]);
        self.left -= out.len();
    }

    /// SplitMix64 (Steele, Lea and Flood, 2014): one addition and a few shifts for eight bytes.
    fn next_block(&mut self) -> [u8; 8] {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_size_yield_the_same_stream() {
        let mut whole = [0; 1000];
        Pattern::new(7).fill(&mut whole);
        for size in [1, 3, 8, 13, 64, 999] {
            let mut pieces = Pattern::new(7);
            let mut got = [0; 1000];
            got.chunks_mut(size).for_each(|piece| pieces.fill(piece));
            assert_eq!(got, whole, "in pieces of {size}");
            assert_eq!(pieces.position(), 1000);
        }
    }

    #[test]
    fn the_first_wrong_byte_is_located() {
        let mut data = vec![0; 10_000];
        Pattern::new(1).fill(&mut data);
        assert_eq!(Pattern::new(1).check(&data), Ok(()));
        data[5000] ^= 1;
        assert_eq!(Pattern::new(1).check(&data), Err(5000));
        assert_eq!(Pattern::new(2).check(&data), Err(0));
    }
}
