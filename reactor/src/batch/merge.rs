//! Merging of consecutive messages into GSO batches. Pure functions.
//!
//! A GSO batch (`UDP_SEGMENT`) is one buffer with one segment size, and the kernel cuts it at
//! multiples of that size. So all datagrams except the last must have exactly the segment size. The
//! last may be shorter but not empty.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::ops::Range;

/// Maximum number of datagrams in a GSO batch: `UDP_MAX_SEGMENTS` of include/linux/udp.h (64 until
/// Linux 6.8, 128 since).
pub const MAX_SEGMENTS: usize = 64;

/// Maximum payload of a GSO batch in bytes. Until segmentation it is one IP packet of at most
/// 65,535 bytes including headers; the rest is reserved for encapsulation.
pub const MAX_BATCH_BYTES: usize = 64_000;

/// Consecutive received messages that are sent as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Indices of the messages.
    pub messages: Range<usize>,
    /// Segment size in bytes; for a single datagram its length.
    pub segment: usize,
    /// Total payload in bytes.
    pub bytes: usize,
    /// Number of datagrams. A received message may itself be a GSO batch.
    pub datagrams: usize,
}

impl Group {
    /// Whether the group contains more than one datagram.
    pub fn is_batch(&self) -> bool {
        self.datagrams > 1
    }
}

/// Number of datagrams in a message of `bytes` with segment size `segment`. An empty message is one
/// empty datagram.
fn datagrams(bytes: usize, segment: usize) -> usize {
    if bytes == 0 { 1 } else { bytes.div_ceil(segment) }
}

/// Returns the longest group that starts at message `run.start` and stays within `run`.
///
/// `size` returns the length and segment size of a message, both in bytes. Messages with segments
/// larger than `max_segment`, which may be 0, are not merged with others.
pub fn next_group(
    run: Range<usize>,
    max_segment: usize,
    size: impl Fn(usize) -> (usize, usize),
) -> Group {
    let (bytes, segment) = size(run.start);
    let mut group = Group {
        messages: run.start..run.start + 1,
        segment,
        bytes,
        datagrams: datagrams(bytes, segment),
    };
    if segment == 0 || segment > max_segment {
        return group;
    }
    for next in run.start + 1..run.end {
        let (bytes, segment) = size(next);
        let more = datagrams(bytes, segment);
        let aligned = group.bytes.is_multiple_of(group.segment);
        let fits = segment == group.segment || (more == 1 && bytes < group.segment);
        if !aligned
            || !fits
            || bytes == 0
            || group.bytes + bytes > MAX_BATCH_BYTES
            || group.datagrams + more > MAX_SEGMENTS
        {
            break;
        }
        group.messages.end = next + 1;
        group.bytes += bytes;
        group.datagrams += more;
    }
    group
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn groups(messages: &[(usize, usize)], max_segment: usize) -> Vec<Group> {
        let mut groups = Vec::new();
        let mut start = 0;
        while start < messages.len() {
            let group = next_group(start..messages.len(), max_segment, |i| messages[i]);
            start = group.messages.end;
            groups.push(group);
        }
        groups
    }

    /// Lengths of the datagrams after segmentation of `bytes` at `segment`.
    fn cut(bytes: usize, segment: usize) -> Vec<usize> {
        if bytes == 0 {
            return vec![0];
        }
        (0..bytes).step_by(segment).map(|at| segment.min(bytes - at)).collect()
    }

    #[test]
    fn equal_datagrams_merge_and_a_shorter_one_ends_the_batch() {
        let sizes = [(100, 100), (100, 100), (40, 40), (100, 100)];
        let lengths: Vec<_> = groups(&sizes, 1500).iter().map(|g| g.messages.len()).collect();
        assert_eq!(lengths, [3, 1]);
    }

    #[test]
    fn an_empty_datagram_is_sent_alone() {
        let sizes = [(100, 100), (0, 0), (100, 100)];
        let lengths: Vec<_> = groups(&sizes, 1500).iter().map(|g| g.messages.len()).collect();
        assert_eq!(lengths, [1, 1, 1]);
    }

    fn message() -> impl Strategy<Value = (usize, usize)> {
        prop_oneof![
            Just((0, 0)),
            (1usize..=9).prop_map(|bytes| (bytes, bytes)),
            (1usize..=9, 1usize..=40).prop_map(|(segment, bytes)| (bytes, segment.min(bytes))),
            Just((65_507, 65_507)),
            Just((60_000, 1200)),
        ]
    }

    proptest! {
        #[test]
        fn merging_preserves_datagrams(
            messages in prop::collection::vec(message(), 1..64),
            max_segment in prop_oneof![Just(0usize), Just(5), Just(1472), Just(65_535)],
        ) {
            let sent: Vec<usize> = messages.iter().flat_map(|(bytes, segment)| cut(*bytes, *segment)).collect();
            let groups = groups(&messages, max_segment);
            let seen: Vec<usize> = groups.iter().flat_map(|g| cut(g.bytes, g.segment)).collect();
            prop_assert_eq!(sent, seen);
            for group in groups {
                prop_assert_eq!(cut(group.bytes, group.segment).len(), group.datagrams);
                if group.messages.len() > 1 {
                    prop_assert!(group.segment <= max_segment);
                    prop_assert!(group.datagrams <= MAX_SEGMENTS && group.bytes <= MAX_BATCH_BYTES);
                }
            }
        }
    }
}
