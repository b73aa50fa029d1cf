//! Turn of a connection: forwards pending data in both directions.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::conn::{Connection, Inbound, Outcome, Phase};
use super::seq::before;
use super::{Io, MAX_WRITE, count};
use crate::host::Host;
use crate::wire::tcp::flags;
use std::io;
use std::time::{Duration, Instant};
use tidegate_model::Direction;

/// Maximum number of writes to the guest per turn, about half a megabyte.
const WRITES_PER_TURN: usize = 8;

/// Delay of the acknowledgement of a FIN of the guest, so that the FIN of the server can carry it.
/// Most servers close as soon as their client does. It is far below the retransmission timeout of
/// any stack (Linux: at least 200 ms).
const FIN_ACK_DELAY: Duration = Duration::from_millis(10);

impl<S> Connection<S> {
    /// Forwards as much as possible. Returns true if more can be done immediately.
    pub fn turn<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> (Outcome, bool) {
        if self.phase == Phase::SynSent && self.short_peeks && self.client_is_gone(io) {
            self.send_reset(io);
            return (Outcome::Reset, false);
        }
        if self.phase != Phase::Open {
            return (Outcome::Alive, false);
        }
        let moved = self.forward_to_host(io).and_then(|()| self.forward_to_guest(io));
        let Ok(more) = moved else {
            self.send_reset(io);
            return (Outcome::Reset, false);
        };
        let size = self.memory.resize(self.is_blocked(), io.allowance, io.now);
        self.resize_buffer(size, io);
        let ack_pending = self.need_ack && self.send_or_delay_ack(io);
        (self.finish(io.now), more || ack_pending)
    }

    /// Sends an acknowledgement, or delays it so that a reply or the FIN of the server can carry
    /// it. Returns true if it is delayed only until the next turn.
    ///
    /// An acknowledgement is delayed only for less than one segment, in order, and if nothing else
    /// must be sent to the guest (RFC 9293 section 3.8.6.3 permits half a second). Before its FIN,
    /// a guest may withhold data until the acknowledgement arrives (Nagle's algorithm). After its
    /// FIN there is no more data.
    fn send_or_delay_ack<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> bool {
        let untold = self.rcv_nxt.wrapping_sub(self.acknowledged);
        let may_wait = (1..u32::from(self.mss)).contains(&untold)
            && self.fin.is_none()
            && self.out_of_order.is_empty();
        let first = self.ack_delayed_since.is_none();
        let since = *self.ack_delayed_since.get_or_insert(io.now);
        let closing = self.guest_has_finished();
        // Until the next turn, or for [`FIN_ACK_DELAY`].
        let waits = if closing { io.now < since + FIN_ACK_DELAY } else { first };
        if !(may_wait && waits) {
            self.send_ack(io);
            return false;
        }
        !closing
    }

    /// The deadline of an acknowledgement that is delayed beyond the next turn.
    pub(super) fn delayed_ack_at(&self) -> Option<Instant> {
        self.ack_delayed_since
            .filter(|_| self.guest_has_finished())
            .map(|since| since + FIN_ACK_DELAY)
    }

    /// Whether the client has disconnected before the guest accepted it. A client that only closed
    /// its sending direction is still connected.
    fn client_is_gone<H: Host<Stream = S>>(&self, io: &mut Io<'_, H>) -> bool {
        self.stream.as_ref().is_some_and(|stream| io.host.connect_result(stream).is_err())
    }

    /// Guest to host: sends pending bytes, and then the FIN.
    fn forward_to_host<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> io::Result<()> {
        let done = self.guest_has_finished();
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let waited = !self.pending.is_empty();
        while self.writable && !self.pending.is_empty() {
            let front = self.pending.front();
            let sent = send_to_host(stream, self.inbound.as_ref(), front, io)?;
            self.writable = sent == front.len();
            if sent > 0 {
                self.pending.pop(sent);
                io.allowance = io.allowance.saturating_add(sent);
                self.active = io.now;
            }
        }
        if done && self.pending.is_empty() && !self.host_shut {
            io.host.shutdown(stream);
            self.host_shut = true;
        }
        // Silly window syndrome avoidance (RFC 9293 section 3.8.6.2.2): no update below a quarter
        // of the window, unless all pending bytes are sent.
        let unadvertised = self.unadvertised(io);
        if waited
            && unadvertised > 0
            && (unadvertised >= io.params.window / 4 || self.pending.is_empty())
        {
            self.need_ack = true;
        }
        Ok(())
    }

    /// Host to guest. Returns true if more can be sent.
    fn forward_to_guest<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> io::Result<bool> {
        self.window_limited = false;
        if !self.is_established() {
            return Ok(false);
        }
        self.discard_acknowledged(io)?;
        let mss = usize::from(self.mss);
        for _ in 0..WRITES_PER_TURN {
            let in_flight = self.snd_nxt.wrapping_sub(self.snd_una) as usize;
            let window = (self.snd_wnd as usize).min(io.params.max_in_flight);
            let room = window.saturating_sub(in_flight);
            let ended = self.fin.is_some_and(|fin| before(fin, self.snd_nxt));
            let ending = self.fin == Some(self.snd_nxt);
            let nothing = ended || !ending && !self.readable;
            let closed = room == 0 && in_flight == 0 && !nothing;
            if !closed {
                (self.probe_at, self.probes) = (None, 0);
            } else if self.probe_at.is_none() {
                self.arm_probe(io.now);
            }
            // Less than a segment is not sent while an acknowledgement is outstanding (RFC 9293
            // section 3.8.6.2.1).
            if nothing || room == 0 || !ending && room < mss && in_flight > 0 {
                self.window_limited = !nothing && !ending;
                return Ok(false);
            }
            if ending {
                self.send_fin(io);
                return Ok(false);
            }
            let most = if io.params.segmentation { MAX_WRITE.min(io.scratch.len()) } else { mss };
            let mut length = room.min(most);
            if length > mss {
                length -= length % mss;
            }
            let offset = self.snd_nxt.wrapping_sub(self.queue_base) as usize;
            let Some(stream) = &mut self.stream else { return Ok(false) };
            match io.host.peek(stream, offset, &mut io.scratch[..length]) {
                Ok(0) => self.fin = Some(self.snd_nxt),
                Ok(seen) => {
                    // Data that arrives after this peek is reported by a new event.
                    self.readable = seen == length || self.short_peeks;
                    self.send_data(seen, io);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Removes acknowledged bytes from the socket queue.
    fn discard_acknowledged<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> io::Result<()> {
        let acknowledged = match self.fin {
            Some(fin) if before(fin, self.snd_una) => fin,
            _ => self.snd_una,
        };
        let length = acknowledged.wrapping_sub(self.queue_base) as usize;
        if length > 0
            && let Some(stream) = &mut self.stream
        {
            io.host.discard(stream, length)?;
            self.memory.deliver(length);
            self.queue_base = acknowledged;
            self.active = io.now;
        }
        Ok(())
    }

    fn send_data<H: Host<Stream = S>>(&mut self, length: usize, io: &mut Io<'_, H>) {
        let sequence = self.snd_nxt;
        let before = self.snd_max;
        self.advance(length as u32, io);
        count(
            io.stats,
            Inbound::stats_of(self.inbound.as_ref()),
            Direction::In,
            self.snd_max.wrapping_sub(before).into(),
        );
        self.emit(sequence, flags::ACK | flags::PSH, length, io);
    }

    fn send_fin<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) {
        let sequence = self.snd_nxt;
        self.advance(1, io);
        self.emit(sequence, flags::ACK | flags::FIN, 0, io);
    }

    fn advance<H: Host<Stream = S>>(&mut self, length: u32, io: &Io<'_, H>) {
        if self.resend_at.is_none() {
            self.arm_resend(io.now);
        }
        self.snd_nxt = self.snd_nxt.wrapping_add(length);
        self.snd_max = super::seq::later(self.snd_max, self.snd_nxt);
    }
}

/// Sends a prefix of `bytes` to the host, and counts it. Returns its length. If it is shorter, the
/// send buffer is full, and the socket reports when it has space again.
pub(super) fn send_to_host<H: Host>(
    stream: &mut H::Stream,
    inbound: Option<&Inbound>,
    bytes: &[u8],
    io: &mut Io<'_, H>,
) -> io::Result<usize> {
    match io.host.send(stream, bytes) {
        Ok(sent) => {
            count(io.stats, Inbound::stats_of(inbound), Direction::Out, sent as u64);
            Ok(sent)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error),
    }
}
