//! Payload of received segments: forwarded, stored or dropped.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::Io;
use super::conn::Connection;
use super::send::send_to_host;
use super::seq::{before, later, up_to};
use crate::host::Host;
use crate::metrics::DropReason;
use crate::wire::tcp::{Segment, flags};
use std::io;

impl<S> Connection<S> {
    /// Processes the payload and FIN of a segment, within the window.
    pub(super) fn receive_payload<H: Host<Stream = S>>(
        &mut self,
        segment: &Segment<'_>,
        io: &mut Io<'_, H>,
    ) -> io::Result<()> {
        let end = segment.sequence.wrapping_add(segment.payload.len() as u32);
        if segment.has(flags::FIN) && self.guest_fin.is_none() && up_to(end, self.rcv_edge) {
            self.guest_fin = Some(end);
        }
        self.need_ack = true;
        let skip = self.rcv_nxt.wrapping_sub(segment.sequence) as i32;
        let limit = match self.guest_fin {
            // No data follows a FIN.
            Some(fin) if before(fin, self.rcv_edge) => fin,
            _ => self.rcv_edge,
        };
        if skip >= 0 {
            let bytes = segment.payload.get(skip as usize..).unwrap_or_default();
            if self.accept(up_to_limit(bytes, self.rcv_nxt, limit), io)? {
                while let Some((start, bytes)) = self.out_of_order.pop(self.rcv_nxt) {
                    io.allowance = io.allowance.saturating_add(bytes.len());
                    let known = self.rcv_nxt.wrapping_sub(start) as usize;
                    let bytes = bytes.get(known..).unwrap_or_default();
                    if !self.accept(up_to_limit(bytes, self.rcv_nxt, limit), io)? {
                        break;
                    }
                }
            }
        } else if before(segment.sequence, limit) {
            let bytes = up_to_limit(segment.payload, segment.sequence, limit);
            let kept = self.out_of_order.len();
            if !self.out_of_order.insert(self.rcv_nxt, segment.sequence, bytes, io.allowance) {
                io.stats.count_drop(DropReason::Buffers);
            }
            io.allowance = io.allowance.saturating_sub(self.out_of_order.len() - kept);
            // RFC 5681 section 4.2: each out-of-order segment is acknowledged immediately. A packet
            // with segmentation offload counts as several segments.
            let segments = segment.payload.len().div_ceil(usize::from(self.mss.max(1))).clamp(1, 3);
            for _ in 0..segments {
                self.send_ack(io);
            }
        }
        if self.guest_fin == Some(self.rcv_nxt) {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.rcv_edge = later(self.rcv_edge, self.rcv_nxt);
            self.closed_first = self.fin.is_some();
        }
        Ok(())
    }

    /// Forwards or stores `bytes`, which are the next in order. Returns false if some did not fit.
    fn accept<H: Host<Stream = S>>(
        &mut self,
        bytes: &[u8],
        io: &mut Io<'_, H>,
    ) -> io::Result<bool> {
        let mut rest = bytes;
        if let Some(stream) = &mut self.stream {
            while self.writable && self.pending.is_empty() && !rest.is_empty() {
                self.handshake_ack_at = None;
                let sent = send_to_host(stream, self.inbound.as_ref(), rest, io)?;
                self.writable = sent == rest.len();
                rest = &rest[sent.min(rest.len())..];
            }
        }
        let kept = rest.len().min(io.allowance);
        self.pending.push(&rest[..kept]);
        io.allowance -= kept;
        let lost = rest.len() - kept;
        self.rcv_nxt = self.rcv_nxt.wrapping_add((bytes.len() - lost) as u32);
        if lost > 0 {
            io.stats.count_drop(DropReason::Buffers);
        }
        Ok(lost == 0)
    }
}

/// The prefix of `bytes`, which start at sequence number `at`, that precedes `limit`.
fn up_to_limit(bytes: &[u8], at: u32, limit: u32) -> &[u8] {
    let room = if before(at, limit) { limit.wrapping_sub(at) as usize } else { 0 };
    &bytes[..bytes.len().min(room)]
}
