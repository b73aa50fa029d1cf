//! Collects consecutive datagrams of one session into a GSO batch. No I/O.
//!
//! A program of the guest sends datagrams individually, and they are read from the device
//! individually. Consecutive datagrams with equal properties are sent as one GSO batch
//! (`UDP_SEGMENT`). Copying their payload costs one hundredth of a system call for each.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::SocketAddr;
use tidegate_reactor::Key;
use tidegate_reactor::batch::{MAX_BATCH_BYTES, MAX_SEGMENTS};

/// Properties that all datagrams of a GSO batch share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchKey {
    /// The session.
    pub(crate) flow: Key,
    /// The destination, if the socket is not connected.
    pub(crate) to: Option<SocketAddr>,
    /// DF is set.
    pub(crate) dont_fragment: bool,
    /// The hop limit, if it is low enough to matter.
    pub(crate) hop_limit: Option<u8>,
}

/// A GSO batch under construction.
#[derive(Debug, Default)]
pub(crate) struct GsoBatch {
    key: Option<BatchKey>,
    bytes: Vec<u8>,
    segment: usize,
    count: usize,
    /// A datagram shorter than the segment size was added, which must be the last.
    closed: bool,
}

impl GsoBatch {
    /// Adds a datagram, if it fits the current batch. Returns whether it was added.
    pub(crate) fn push(&mut self, key: BatchKey, datagram: &[u8]) -> bool {
        let length = datagram.len();
        match self.key {
            None => {
                self.key = Some(key);
                self.segment = length;
            }
            Some(held) => {
                let fits = held == key
                    && !self.closed
                    && length > 0
                    && length <= self.segment
                    && self.count < MAX_SEGMENTS
                    && self.bytes.len() + length <= MAX_BATCH_BYTES;
                if !fits {
                    return false;
                }
            }
        }
        self.bytes.extend_from_slice(datagram);
        self.count += 1;
        self.closed = length < self.segment || length == 0;
        true
    }

    /// Returns the key, payload and segment size of the batch.
    pub(crate) fn get(&self) -> Option<(BatchKey, &[u8], usize)> {
        self.key.map(|key| (key, &self.bytes[..], self.segment))
    }

    pub(crate) fn clear(&mut self) {
        self.key = None;
        self.bytes.clear();
        (self.segment, self.count, self.closed) = (0, 0, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tidegate_reactor::Arena;

    proptest! {
        #[test]
        fn batching_preserves_datagrams(
            lengths in prop::collection::vec(prop_oneof![Just(0usize), 1usize..5, Just(1200), Just(60_000)], 1..100),
        ) {
            let flow = Arena::new().insert(());
            let key = BatchKey { flow, to: None, dont_fragment: true, hop_limit: None };
            let mut batch = GsoBatch::default();
            let mut seen = Vec::new();
            let mut leave = |batch: &mut GsoBatch| {
                if let Some((_, bytes, segment)) = batch.get() {
                    if bytes.is_empty() {
                        seen.push(0);
                    }
                    seen.extend(bytes.chunks(segment.max(1)).map(<[u8]>::len));
                }
                batch.clear();
            };
            for &length in &lengths {
                if !batch.push(key, &vec![0; length]) {
                    leave(&mut batch);
                    prop_assert!(batch.push(key, &vec![0; length]));
                }
                prop_assert!(batch.count <= MAX_SEGMENTS);
                prop_assert!(batch.count == 1 || batch.bytes.len() <= MAX_BATCH_BYTES);
            }
            leave(&mut batch);
            prop_assert_eq!(seen, lengths);
        }
    }
}
