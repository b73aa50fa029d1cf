//! Reassembly of fragmented packets (RFC 791 section 3.2, RFC 8200 section 4.5). It is bounded,
//! because a guest can send first fragments indefinitely.
//!
//! Fragments of a packet must not overlap. RFC 5722 forbids overlaps for IPv6, and they have no
//! legitimate use for IPv4. A packet with overlapping fragments is dropped as a whole, and so are
//! its further fragments until its reassembly timeout.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::wire::head::MAX_PACKET;
use crate::wire::ip::{Fragment, Packet};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Maximum number of incomplete packets.
pub const MAX_PACKETS: usize = 128;
/// Maximum number of incomplete packets per source.
pub const MAX_PACKETS_PER_SOURCE: usize = 32;
/// Maximum number of fragments per packet: the largest packet in fragments of 512 bytes, which is
/// below the MTU of any link here.
pub const MAX_FRAGMENTS: usize = 128;
/// Maximum number of buffered bytes.
pub const MAX_BYTES: usize = 4 << 20;

/// Fields that all fragments of a packet share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Id {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

#[derive(Debug)]
struct Partial {
    deadline: Instant,
    /// By offset.
    fragments: BTreeMap<usize, Vec<u8>>,
    bytes: usize,
    /// Known once the last fragment has arrived.
    length: Option<usize>,
    /// The fragments are inconsistent; further ones are dropped until the deadline.
    invalid: bool,
}

/// Result of adding a fragment.
#[derive(Debug, PartialEq, Eq)]
pub enum FragmentOutcome {
    /// Stored; other fragments are missing.
    Stored,
    /// The packet is complete; its payload.
    Complete(Vec<u8>),
    /// Dropped: inconsistent with other fragments, or over a limit.
    Dropped,
}

/// Incomplete packets.
#[derive(Debug)]
pub struct Reassembly {
    packets: BTreeMap<Id, Partial>,
    bytes: usize,
    timeout: Duration,
}

impl Reassembly {
    /// Creates an empty buffer. `timeout` is the time from the first fragment to the last.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { packets: BTreeMap::new(), bytes: 0, timeout }
    }

    /// Adds a fragment.
    pub fn add(
        &mut self,
        packet: &Packet<'_>,
        fragment: Fragment,
        now: Instant,
    ) -> FragmentOutcome {
        let id = Id {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            identification: fragment.identification,
        };
        if !self.make_room(&id, packet.payload.len(), now) {
            return FragmentOutcome::Dropped;
        }
        let partial = self.packets.entry(id).or_insert_with(|| Partial {
            deadline: now + self.timeout,
            fragments: BTreeMap::new(),
            bytes: 0,
            length: None,
            invalid: false,
        });
        let before = partial.bytes;
        let stored = partial.add(fragment, packet.payload);
        self.bytes = self.bytes - before + partial.bytes;
        if !stored {
            return FragmentOutcome::Dropped;
        }
        if partial.length != Some(partial.bytes) {
            return FragmentOutcome::Stored;
        }
        // Without overlaps and with no data beyond the length, this number of bytes leaves no gap.
        self.remove(&id).map_or(FragmentOutcome::Dropped, |partial| {
            FragmentOutcome::Complete(partial.fragments.into_values().flatten().collect())
        })
    }

    /// Drops packets that have reached their deadline. Returns their number.
    pub fn expire(&mut self, now: Instant) -> usize {
        let due: Vec<Id> = self
            .packets
            .iter()
            .filter(|(_, partial)| partial.deadline <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in &due {
            self.remove(id);
        }
        due.len()
    }

    /// The earliest deadline, at which to call [`Self::expire`].
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.packets.values().map(|partial| partial.deadline).min()
    }

    /// Number of buffered bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    fn remove(&mut self, id: &Id) -> Option<Partial> {
        let partial = self.packets.remove(id)?;
        self.bytes -= partial.bytes;
        Some(partial)
    }

    /// Whether `bytes` more of packet `id` may be stored. A source at its limit loses its own
    /// oldest packet, so it does not affect other sources.
    fn make_room(&mut self, id: &Id, bytes: usize, now: Instant) -> bool {
        if !self.packets.contains_key(id) {
            let of_source = self.packets.iter().filter(|(other, _)| other.source == id.source);
            let (count, oldest) = of_source.fold(
                (0, None),
                |(count, oldest): (usize, Option<(Instant, Id)>), (id, partial)| {
                    let this = (partial.deadline, *id);
                    (count + 1, Some(oldest.map_or(this, |oldest| oldest.min(this))))
                },
            );
            if count >= MAX_PACKETS_PER_SOURCE
                && let Some((_, oldest)) = oldest
            {
                self.remove(&oldest);
            }
            if self.packets.len() >= MAX_PACKETS && self.expire(now) == 0 {
                return false;
            }
        }
        self.bytes + bytes <= MAX_BYTES
    }
}

impl Partial {
    /// Discards the fragments. All further fragments of the packet are rejected until the deadline.
    fn invalidate(&mut self) {
        *self = Self {
            deadline: self.deadline,
            fragments: BTreeMap::new(),
            bytes: 0,
            length: None,
            invalid: true,
        };
    }

    fn add(&mut self, fragment: Fragment, payload: &[u8]) -> bool {
        let end = fragment.offset + payload.len();
        let valid = !self.invalid
            && !payload.is_empty()
            // All fragments except the last end at a multiple of 8 bytes.
            && (!fragment.more || payload.len().is_multiple_of(8))
            && end <= MAX_PACKET
            && self.fragments.len() < MAX_FRAGMENTS
            && self.length.is_none_or(|length| if fragment.more { end < length } else { end == length })
            && !self.overlaps(fragment.offset, end);
        if !valid {
            // A duplicate is ignored (permitted by RFC 8200 section 4.5).
            if self
                .fragments
                .get(&fragment.offset)
                .is_some_and(|fragment_bytes| fragment_bytes == payload)
            {
                return true;
            }
            self.invalidate();
            return false;
        }
        if !fragment.more {
            let beyond = self
                .fragments
                .last_key_value()
                .is_some_and(|(at, fragment_bytes)| at + fragment_bytes.len() > end);
            if beyond {
                self.invalidate();
                return false;
            }
            self.length = Some(end);
        }
        self.bytes += payload.len();
        self.fragments.insert(fragment.offset, payload.to_vec());
        true
    }

    fn overlaps(&self, start: usize, end: usize) -> bool {
        let before = self.fragments.range(..end).next_back();
        before.is_some_and(|(at, fragment_bytes)| at + fragment_bytes.len() > start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(source: u8, payload: &[u8]) -> Packet<'_> {
        Packet {
            source: IpAddr::from([10, 0, 0, source]),
            destination: IpAddr::from([192, 0, 2, 1]),
            protocol: 17,
            hop_limit: 64,
            dont_fragment: false,
            fragment: None,
            header: &[],
            payload,
        }
    }

    fn add(
        reassembly: &mut Reassembly,
        offset: usize,
        more: bool,
        payload: &[u8],
        now: Instant,
    ) -> FragmentOutcome {
        reassembly.add(&packet(1, payload), Fragment { identification: 7, offset, more }, now)
    }

    #[test]
    fn rfc_5722_overlapping_fragments_invalidate_the_packet() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        assert_eq!(add(&mut reassembly, 0, true, &[1; 16], now), FragmentOutcome::Stored);
        assert_eq!(add(&mut reassembly, 8, true, &[2; 16], now), FragmentOutcome::Dropped);
        assert_eq!(add(&mut reassembly, 24, false, &[3; 8], now), FragmentOutcome::Dropped);
        assert_eq!(reassembly.bytes(), 0);
        reassembly.expire(now + Duration::from_secs(30));
        assert_eq!(add(&mut reassembly, 8, false, &[2; 8], now), FragmentOutcome::Stored);
        assert_eq!(
            add(&mut reassembly, 0, true, &[1; 8], now),
            FragmentOutcome::Complete([[1; 8], [2; 8]].concat())
        );
    }

    #[test]
    fn a_duplicate_fragment_is_ignored() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        add(&mut reassembly, 0, true, &[1; 8], now);
        assert_eq!(add(&mut reassembly, 0, true, &[1; 8], now), FragmentOutcome::Stored);
        assert_eq!(
            add(&mut reassembly, 8, false, &[2; 3], now),
            FragmentOutcome::Complete(vec![1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2])
        );
    }

    #[test]
    fn a_packet_over_the_maximum_length_is_dropped() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        assert_eq!(add(&mut reassembly, 65_528, false, &[0; 100], now), FragmentOutcome::Dropped);
        assert_eq!(reassembly.bytes(), 0);
    }

    #[test]
    fn a_source_at_its_limit_loses_only_its_own_packets() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        let part = Fragment { identification: 1, offset: 0, more: true };
        assert_eq!(reassembly.add(&packet(2, &[5; 8]), part, now), FragmentOutcome::Stored);
        for identification in 0..100_000 {
            let part = Fragment { identification, offset: 0, more: true };
            reassembly.add(&packet(1, &[0; 1480]), part, now);
            assert!(reassembly.packets.len() <= MAX_PACKETS_PER_SOURCE + 1);
            assert!(reassembly.bytes() <= MAX_BYTES);
        }
        let last = Fragment { identification: 1, offset: 8, more: false };
        assert_eq!(
            reassembly.add(&packet(2, &[6; 8]), last, now),
            FragmentOutcome::Complete([[5; 8], [6; 8]].concat())
        );
    }

    proptest! {
        #[test]
        fn fragments_in_any_order_make_the_same_packet(
            length in 1usize..4000,
            size in 1usize..60,
            order in prop::collection::vec(any::<u32>(), 600),
        ) {
            let now = Instant::now();
            let whole: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let size = (size * 8).max(length.div_ceil(MAX_FRAGMENTS).next_multiple_of(8));
            let mut fragments: Vec<usize> = (0..length).step_by(size).collect();
            fragments.sort_by_key(|at| order[at / size]);
            let mut reassembly = Reassembly::new(Duration::from_secs(30));
            let mut done = None;
            for at in fragments {
                prop_assert_eq!(&done, &None);
                let end = (at + size).min(length);
                if let FragmentOutcome::Complete(bytes) = add(&mut reassembly, at, end < length, &whole[at..end], now) {
                    done = Some(bytes);
                }
            }
            prop_assert_eq!(done, Some(whole));
            prop_assert_eq!(reassembly.bytes(), 0);
        }

        #[test]
        fn no_limit_is_exceeded_for_any_fragments(
            fragments in prop::collection::vec((0usize..9000, any::<bool>(), 0usize..3000, 0u32..3), 0..200),
        ) {
            let now = Instant::now();
            let mut reassembly = Reassembly::new(Duration::from_secs(30));
            for (offset, more, length, identification) in fragments {
                let payload = vec![0; length];
                let part = Fragment { identification, offset: offset * 8, more };
                if let FragmentOutcome::Complete(bytes) = reassembly.add(&packet(1, &payload), part, now) {
                    prop_assert!(bytes.len() <= MAX_PACKET);
                }
                let stored: usize = reassembly.packets.values().map(|p| p.fragments.values().map(Vec::len).sum::<usize>()).sum();
                prop_assert_eq!(stored, reassembly.bytes());
            }
        }
    }
}
