//! Receive buffers of a connection: bytes that the socket did not accept, and data out of order.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::collections::VecDeque;

/// Maximum number of out-of-order ranges. A guest with single packet losses needs one for each gap.
pub const MAX_RANGES: usize = 128;

/// Capacity in bytes above which an empty buffer is freed.
const KEEP: usize = 16 << 10;

/// Bytes in order that the socket has not accepted yet.
#[derive(Debug, Default)]
pub struct Pending(VecDeque<u8>);

impl Pending {
    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the buffer is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Appends `bytes`.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// The first contiguous slice.
    #[must_use]
    pub fn front(&self) -> &[u8] {
        self.0.as_slices().0
    }

    /// Removes the first `count` bytes.
    pub fn pop(&mut self, count: usize) {
        self.0.drain(..count.min(self.0.len()));
        if self.0.is_empty() && self.0.capacity() > KEEP {
            self.0 = VecDeque::new();
        }
    }
}

/// Bytes after a gap, as disjoint ranges.
#[derive(Debug, Default)]
pub struct OutOfOrder {
    /// Sorted by distance from the next expected sequence number.
    ranges: Vec<(u32, Vec<u8>)>,
    bytes: usize,
}

impl OutOfOrder {
    /// Number of bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Whether the buffer is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Inserts `bytes`, which start at `sequence`, at or after the next expected sequence number
    /// `base`. Bytes that are already present are not overwritten. Returns false if some bytes
    /// exceed the limits: `allowance` bytes, and [`MAX_RANGES`].
    pub fn insert(
        &mut self,
        base: u32,
        sequence: u32,
        mut bytes: &[u8],
        mut allowance: usize,
    ) -> bool {
        let distance = |sequence: u32| sequence.wrapping_sub(base) as usize;
        let mut at = distance(sequence);
        let mut index = 0;
        while !bytes.is_empty() {
            let end = |(start, bytes): &(u32, Vec<u8>)| distance(*start) + bytes.len();
            while self.ranges.get(index).is_some_and(|range| end(range) <= at) {
                index += 1;
            }
            let next = self.ranges.get(index).map_or(usize::MAX, |(start, _)| distance(*start));
            if next <= at {
                let covered = self.ranges.get(index).map_or(0, end) - at;
                bytes = bytes.get(covered..).unwrap_or_default();
                at += covered;
                continue;
            }
            let (new, rest) = bytes.split_at(bytes.len().min(next - at));
            let Some(left) = allowance.checked_sub(new.len()) else { return false };
            let full = self.ranges.len() >= MAX_RANGES;
            match self.ranges[..index].last_mut() {
                Some(before) if end(before) == at => before.1.extend_from_slice(new),
                _ if full => return false,
                _ => self.ranges.insert(index, (base.wrapping_add(at as u32), new.to_vec())),
            }
            allowance = left;
            self.bytes += new.len();
            at += new.len();
            bytes = rest;
        }
        true
    }

    /// Removes and returns the first range, if it starts at or before `next`.
    pub fn pop(&mut self, next: u32) -> Option<(u32, Vec<u8>)> {
        let (start, _) = self.ranges.first()?;
        if super::seq::before(next, *start) {
            return None;
        }
        let range = self.ranges.remove(0);
        self.bytes -= range.1.len();
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_agree_with_a_plain_array(
            base: u32,
            pieces in prop::collection::vec((1usize..200, 1usize..60), 1..40),
        ) {
            let mut queue = OutOfOrder::default();
            let mut plain: Vec<Option<u8>> = vec![None; 300];
            for (at, length) in pieces {
                let bytes: Vec<u8> = (at..at + length).map(|at| at as u8).collect();
                prop_assert!(queue.insert(base, base.wrapping_add(at as u32), &bytes, usize::MAX));
                for (slot, byte) in plain[at..].iter_mut().zip(bytes) {
                    *slot = Some(byte);
                }
                prop_assert_eq!(queue.len(), plain.iter().flatten().count());
            }
            let mut seen = vec![None; 300];
            let mut next = base.wrapping_add(300);
            while let Some((start, bytes)) = queue.pop(next) {
                let at = start.wrapping_sub(base) as usize;
                for (slot, byte) in seen[at..].iter_mut().zip(bytes) {
                    prop_assert!(slot.is_none(), "no byte is stored twice");
                    *slot = Some(byte);
                }
                next = base.wrapping_add(300);
            }
            prop_assert_eq!(seen, plain);
            prop_assert!(queue.is_empty());
        }
    }

    #[test]
    fn bytes_and_ranges_are_limited() {
        let mut queue = OutOfOrder::default();
        assert!(queue.insert(0, 10, &[1; 5], 5));
        assert!(!queue.insert(0, 20, &[1; 5], 4));
        for gap in 0..2 * MAX_RANGES as u32 {
            queue.insert(0, 100 + gap * 2, &[1], 1);
        }
        assert_eq!(queue.ranges.len(), MAX_RANGES);
        assert!(queue.insert(0, 11, &[1; 4], 0), "duplicate bytes take no space");
    }

    #[test]
    fn a_range_after_a_gap_is_not_returned() {
        let mut queue = OutOfOrder::default();
        queue.insert(u32::MAX - 1, 3, &[1, 2], 10);
        assert_eq!(queue.pop(2), None);
        assert_eq!(queue.pop(3), Some((3, vec![1, 2])));
    }
}
