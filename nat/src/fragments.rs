//! Putting packets together again that arrive in pieces (RFC 791 section 3.2, RFC 8200
//! section 4.5). Pure, and bounded: a guest can send first pieces for ever.
//!
//! Pieces of one packet may not overlap. RFC 5722 forbids it for IPv6, and nobody has reason to
//! over IPv4: a packet with pieces that do is dropped with all of them, and what else comes of it
//! with the time that is left to it.

use crate::wire::head::MAX_PACKET;
use crate::wire::ip::{Fragment, Packet};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Packets under way at once.
pub const MAX_PACKETS: usize = 128;
/// Of one source.
pub const MAX_PACKETS_PER_SOURCE: usize = 32;
/// Pieces of one packet: the largest one in pieces of 512 bytes, which is less than any link here
/// has.
pub const MAX_PIECES: usize = 128;
/// Bytes of all of them.
pub const MAX_BYTES: usize = 4 << 20;

/// What all pieces of a packet have in common.
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
    pieces: BTreeMap<usize, Vec<u8>>,
    bytes: usize,
    /// Known once the last piece has come.
    length: Option<usize>,
    /// Something in it contradicts itself: what comes of it is dropped until its time is over.
    spoilt: bool,
}

/// What a piece came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// Others are missing.
    Kept,
    /// The payload of the whole packet.
    Whole(Vec<u8>),
    /// It does not fit with the others, or there is no room.
    Dropped,
}

/// The packets under way.
#[derive(Debug)]
pub struct Reassembly {
    packets: BTreeMap<Id, Partial>,
    bytes: usize,
    timeout: Duration,
}

impl Reassembly {
    /// Packets have `timeout` from their first piece to their last.
    #[must_use]
    pub fn new(timeout: Duration) -> Self {
        Self { packets: BTreeMap::new(), bytes: 0, timeout }
    }

    /// Adds a piece.
    pub fn add(&mut self, packet: &Packet<'_>, fragment: Fragment, now: Instant) -> Piece {
        let id = Id {
            source: packet.source,
            destination: packet.destination,
            protocol: packet.protocol,
            identification: fragment.identification,
        };
        if !self.make_room(&id, packet.payload.len(), now) {
            return Piece::Dropped;
        }
        let partial = self.packets.entry(id).or_insert_with(|| Partial {
            deadline: now + self.timeout,
            pieces: BTreeMap::new(),
            bytes: 0,
            length: None,
            spoilt: false,
        });
        let before = partial.bytes;
        let kept = partial.add(fragment, packet.payload);
        self.bytes = self.bytes - before + partial.bytes;
        if !kept {
            return Piece::Dropped;
        }
        if partial.length != Some(partial.bytes) {
            return Piece::Kept;
        }
        // No overlaps, nothing beyond the length, and as many bytes as that: there are no gaps.
        self.remove(&id).map_or(Piece::Dropped, |partial| {
            Piece::Whole(partial.pieces.into_values().flatten().collect())
        })
    }

    /// Forgets packets whose time is over. Returns how many there were.
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

    /// When [`Self::expire`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.packets.values().map(|partial| partial.deadline).min()
    }

    /// Bytes kept.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    fn remove(&mut self, id: &Id) -> Option<Partial> {
        let partial = self.packets.remove(id)?;
        self.bytes -= partial.bytes;
        Some(partial)
    }

    /// Whether `bytes` more of packet `id` may be kept. A source that has its share loses its own
    /// oldest packet, so that it takes nobody else's room.
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
    fn add(&mut self, fragment: Fragment, payload: &[u8]) -> bool {
        let end = fragment.offset + payload.len();
        let sound = !self.spoilt
            && !payload.is_empty()
            // All pieces but the last end where another one can begin.
            && (!fragment.more || payload.len().is_multiple_of(8))
            && end <= MAX_PACKET
            && self.pieces.len() < MAX_PIECES
            && self.length.is_none_or(|length| if fragment.more { end < length } else { end == length })
            && !self.overlaps(fragment.offset, end);
        if !sound {
            // One that came twice spoils nothing (RFC 8200 section 4.5 allows to ignore it).
            if self.pieces.get(&fragment.offset).is_some_and(|piece| piece == payload) {
                return true;
            }
            *self = Self {
                deadline: self.deadline,
                pieces: BTreeMap::new(),
                bytes: 0,
                length: None,
                spoilt: true,
            };
            return false;
        }
        if !fragment.more {
            let beyond =
                self.pieces.last_key_value().is_some_and(|(at, piece)| at + piece.len() > end);
            if beyond {
                *self = Self {
                    deadline: self.deadline,
                    pieces: BTreeMap::new(),
                    bytes: 0,
                    length: None,
                    spoilt: true,
                };
                return false;
            }
            self.length = Some(end);
        }
        self.bytes += payload.len();
        self.pieces.insert(fragment.offset, payload.to_vec());
        true
    }

    fn overlaps(&self, start: usize, end: usize) -> bool {
        let before = self.pieces.range(..end).next_back();
        before.is_some_and(|(at, piece)| at + piece.len() > start)
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
    ) -> Piece {
        reassembly.add(&packet(1, payload), Fragment { identification: 7, offset, more }, now)
    }

    #[test]
    fn rfc_5722_pieces_that_overlap_spoil_the_packet() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        assert_eq!(add(&mut reassembly, 0, true, &[1; 16], now), Piece::Kept);
        assert_eq!(add(&mut reassembly, 8, true, &[2; 16], now), Piece::Dropped);
        assert_eq!(add(&mut reassembly, 24, false, &[3; 8], now), Piece::Dropped);
        assert_eq!(reassembly.bytes(), 0);
        reassembly.expire(now + Duration::from_secs(30));
        assert_eq!(add(&mut reassembly, 8, false, &[2; 8], now), Piece::Kept);
        assert_eq!(
            add(&mut reassembly, 0, true, &[1; 8], now),
            Piece::Whole([[1; 8], [2; 8]].concat())
        );
    }

    #[test]
    fn a_piece_that_comes_twice_is_ignored() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        add(&mut reassembly, 0, true, &[1; 8], now);
        assert_eq!(add(&mut reassembly, 0, true, &[1; 8], now), Piece::Kept);
        assert_eq!(
            add(&mut reassembly, 8, false, &[2; 3], now),
            Piece::Whole(vec![1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2])
        );
    }

    #[test]
    fn a_packet_too_long_for_its_length_field_is_dropped() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        assert_eq!(add(&mut reassembly, 65_528, false, &[0; 100], now), Piece::Dropped);
        assert_eq!(reassembly.bytes(), 0);
    }

    #[test]
    fn a_source_that_never_finishes_loses_its_own_and_nobody_elses() {
        let now = Instant::now();
        let mut reassembly = Reassembly::new(Duration::from_secs(30));
        let part = Fragment { identification: 1, offset: 0, more: true };
        assert_eq!(reassembly.add(&packet(2, &[5; 8]), part, now), Piece::Kept);
        for identification in 0..100_000 {
            let part = Fragment { identification, offset: 0, more: true };
            reassembly.add(&packet(1, &[0; 1480]), part, now);
            assert!(reassembly.packets.len() <= MAX_PACKETS_PER_SOURCE + 1);
            assert!(reassembly.bytes() <= MAX_BYTES);
        }
        let last = Fragment { identification: 1, offset: 8, more: false };
        assert_eq!(
            reassembly.add(&packet(2, &[6; 8]), last, now),
            Piece::Whole([[5; 8], [6; 8]].concat())
        );
    }

    proptest! {
        #[test]
        fn any_order_makes_the_same_packet(
            length in 1usize..4000,
            size in 1usize..60,
            order in prop::collection::vec(any::<u32>(), 600),
        ) {
            let now = Instant::now();
            let whole: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let size = (size * 8).max(length.div_ceil(MAX_PIECES).next_multiple_of(8));
            let mut pieces: Vec<usize> = (0..length).step_by(size).collect();
            pieces.sort_by_key(|at| order[at / size]);
            let mut reassembly = Reassembly::new(Duration::from_secs(30));
            let mut done = None;
            for at in pieces {
                prop_assert_eq!(&done, &None);
                let end = (at + size).min(length);
                if let Piece::Whole(bytes) = add(&mut reassembly, at, end < length, &whole[at..end], now) {
                    done = Some(bytes);
                }
            }
            prop_assert_eq!(done, Some(whole));
            prop_assert_eq!(reassembly.bytes(), 0);
        }

        #[test]
        fn whatever_pieces_come_no_bound_is_passed(
            pieces in prop::collection::vec((0usize..9000, any::<bool>(), 0usize..3000, 0u32..3), 0..200),
        ) {
            let now = Instant::now();
            let mut reassembly = Reassembly::new(Duration::from_secs(30));
            for (offset, more, length, identification) in pieces {
                let payload = vec![0; length];
                let part = Fragment { identification, offset: offset * 8, more };
                if let Piece::Whole(bytes) = reassembly.add(&packet(1, &payload), part, now) {
                    prop_assert!(bytes.len() <= MAX_PACKET);
                }
                let kept: usize = reassembly.packets.values().map(|p| p.pieces.values().map(Vec::len).sum::<usize>()).sum();
                prop_assert_eq!(kept, reassembly.bytes());
            }
        }
    }
}
