//! Which neighbours may travel as one batch. Pure.
//!
//! A GSO batch (`UDP_SEGMENT`) is one buffer and one segment size: the kernel cuts it at each
//! multiple of the size, so every datagram but the last must have exactly that size, and the last
//! may be shorter but not empty.

use std::ops::Range;

/// The most datagrams in one GSO batch: `UDP_MAX_SEGMENTS` of include/linux/udp.h (64 until
/// Linux 6.8, 128 since).
pub const MAX_SEGMENTS: usize = 64;

/// The most payload in one GSO batch, in bytes: it is one IP packet until it is cut, 65,535 bytes
/// with its headers, and some of that is left for encapsulation.
pub const MAX_BATCH_BYTES: usize = 64_000;

/// Received messages that are sent on as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Which messages.
    pub messages: Range<usize>,
    /// The size at which the kernel cuts them; for a lone datagram its length.
    pub segment: usize,
    /// Payload of all of them, in bytes.
    pub bytes: usize,
    /// How many datagrams they hold: a received message may be a GSO batch itself.
    pub datagrams: usize,
}

impl Group {
    /// Whether it has to be cut at all.
    pub fn is_batch(&self) -> bool {
        self.datagrams > 1
    }
}

/// How many datagrams a message of `bytes` cut at `segment` is; an empty message is one empty
/// datagram.
fn datagrams(bytes: usize, segment: usize) -> usize {
    if bytes == 0 { 1 } else { bytes.div_ceil(segment) }
}

/// The longest group that begins with message `run.start` and stays within `run`.
///
/// `size` tells a message's length and segment size, both in bytes. Messages whose segments are
/// larger than `max_segment` (it may be 0) are not joined with others.
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

    /// The datagrams' lengths as the receiver of `bytes` cut at `segment` sees them.
    fn cut(bytes: usize, segment: usize) -> Vec<usize> {
        if bytes == 0 {
            return vec![0];
        }
        (0..bytes).step_by(segment).map(|at| segment.min(bytes - at)).collect()
    }

    #[test]
    fn equal_neighbours_join_and_a_shorter_one_ends_the_batch() {
        let sizes = [(100, 100), (100, 100), (40, 40), (100, 100)];
        let lengths: Vec<_> = groups(&sizes, 1500).iter().map(|g| g.messages.len()).collect();
        assert_eq!(lengths, [3, 1]);
    }

    #[test]
    fn an_empty_datagram_travels_alone() {
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
        fn the_receiver_sees_the_same_datagrams(
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
