//! Segments to the guest: headers and window advertisement.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::conn::{Connection, Opening, Phase};
use super::seq::later;
use super::{Io, SCALE};
use crate::host::Host;
use crate::metrics::DropReason;
use crate::wire::head::TcpHead;
use crate::wire::tcp::flags;
use std::io::IoSlice;
use std::time::Duration;
use tidegate_model::Direction;

/// Minimum interval between challenge ACKs of one connection (RFC 5961 section 7;
/// `tcp_invalid_ratelimit` of the kernel).
const CHALLENGE_INTERVAL: Duration = Duration::from_millis(500);

impl<S> Connection<S> {
    /// Sends a SYN to the guest.
    pub(super) fn send_syn<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        let Opening { iss, clock_offset, inside, .. } = self.opening;
        self.snd_nxt = iss.wrapping_add(1);
        self.snd_max = self.snd_nxt;
        let headers = if inside.is_ipv6() { 60 } else { 40 };
        let head = TcpHead {
            acknowledgement: 0,
            window: io.params.window.min(0xffff) as u16,
            mss: Some(io.params.mtu.saturating_sub(headers)),
            scale: Some(SCALE),
            timestamps: Some((io.params.clock(io.now).wrapping_add(clock_offset), 0)),
            ..self.head(iss, flags::SYN, io)
        };
        self.write(&head, io);
        self.arm_resend(io.now);
    }

    /// Writes a segment without payload.
    fn write<H: Host<Stream = S>>(&self, head: &TcpHead, io: &mut Io<'_, H>) {
        if io.host.emit(head.write(0).bytes(), &[]) {
            io.stats.packets[Direction::In].add(1);
        } else {
            // The segment is retransmitted, as after a loss on the wire.
            io.stats.count_drop(DropReason::Device);
        }
    }

    pub(super) fn send_syn_ack<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        let iss = self.opening.iss;
        self.snd_nxt = iss.wrapping_add(1);
        self.snd_max = self.snd_nxt;
        let headers = if self.opening.inside.is_ipv6() { 60 } else { 40 };
        let window = self.advertise(io).min(0xffff) as u16;
        let head = TcpHead {
            window,
            mss: Some(io.params.mtu.saturating_sub(headers)),
            scale: self.guest_scale.map(|_| SCALE),
            ..self.head(iss, flags::SYN | flags::ACK, io)
        };
        self.write(&head, io);
        self.arm_resend(io.now);
    }

    /// Right edge of the largest possible window.
    pub(super) fn possible_edge<H: Host<Stream = S>>(&self, io: &Io<'_, H>) -> u32 {
        let most = if self.guest_scale.is_some() {
            io.params.window
        } else {
            io.params.window.min(0xffff)
        };
        let free = if self.pending.is_empty() {
            most
        } else {
            most.saturating_sub(self.pending.len() as u32)
                .min(io.allowance.try_into().unwrap_or(u32::MAX))
        };
        later(self.rcv_edge, self.rcv_nxt.wrapping_add(free))
    }

    /// Number of bytes of the possible window that are not advertised yet.
    pub(super) fn unadvertised<H: Host<Stream = S>>(&self, io: &Io<'_, H>) -> u32 {
        self.possible_edge(io).wrapping_sub(self.rcv_edge)
    }

    /// Advances the window edge as far as possible and returns the window size in bytes.
    pub(super) fn advertise<H: Host<Stream = S>>(&mut self, io: &Io<'_, H>) -> u32 {
        // An advertised edge is never withdrawn (RFC 9293 section 3.8.6).
        self.rcv_edge = self.possible_edge(io);
        self.rcv_edge.wrapping_sub(self.rcv_nxt)
    }

    pub(super) fn options_length(&self) -> u16 {
        if self.timestamps.is_some() { 12 } else { 0 }
    }

    pub(super) fn head<H: Host<Stream = S>>(
        &self,
        sequence: u32,
        flags: u8,
        io: &Io<'_, H>,
    ) -> TcpHead {
        let clock = io.params.clock(io.now);
        TcpHead {
            source: self.opening.outside,
            destination: self.opening.inside,
            sequence,
            acknowledgement: self.rcv_nxt,
            flags,
            window: 0,
            mss: None,
            scale: None,
            timestamps: self
                .timestamps
                .map(|timestamps| (clock.wrapping_add(timestamps.offset), timestamps.recent)),
            segment: self.mss,
        }
    }

    /// Writes a segment to the guest.
    pub(super) fn emit<H: Host<Stream = S>>(
        &mut self,
        sequence: u32,
        flags: u8,
        payload: usize,
        io: &mut Io<'_, H>,
    ) {
        let window = self.advertise(io);
        let window = if self.guest_scale.is_some() { window >> SCALE } else { window };
        let head = TcpHead { window: window.min(0xffff) as u16, ..self.head(sequence, flags, io) };
        (self.need_ack, self.ack_delayed_since, self.acknowledged) = (false, None, self.rcv_nxt);
        let head = head.write(payload);
        let emitted = match payload {
            0 => io.host.emit(head.bytes(), &[]),
            payload => io.host.emit(head.bytes(), &[IoSlice::new(&io.scratch[..payload])]),
        };
        if emitted {
            io.stats.packets[Direction::In].add(1);
        } else {
            // The segment is retransmitted, as after a loss on the wire.
            io.stats.count_drop(DropReason::Device);
        }
    }

    pub(super) fn send_ack<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        self.emit(self.snd_nxt, flags::ACK, 0, io);
    }

    /// Sends a reset to the guest.
    pub fn send_reset<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        let (sequence, flags) = match self.phase {
            // RFC 9293 section 3.10.7.1: a reset in reply to a SYN.
            Phase::Connecting => (0, flags::RST | flags::ACK),
            // The guest has sent nothing yet that could be acknowledged.
            Phase::SynSent => (self.snd_nxt, flags::RST),
            Phase::Open | Phase::Lingering => (self.snd_nxt, flags::RST | flags::ACK),
        };
        self.emit(sequence, flags, 0, io);
    }

    /// Sends a challenge ACK (RFC 5961), at a limited rate.
    pub(super) fn send_challenge_ack<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        io.stats.count_drop(DropReason::Window);
        let due = self.challenge_sent_at.is_none_or(|last| io.now >= last + CHALLENGE_INTERVAL);
        if due {
            self.challenge_sent_at = Some(io.now);
            self.send_ack(io);
        }
    }
}
