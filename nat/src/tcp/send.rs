//! A connection's turn: what waits is sent on, both ways.

use super::conn::{Connection, Inbound, Outcome, Phase};
use super::seq::before;
use super::{Io, MAX_WRITE, count};
use crate::host::Host;
use crate::wire::tcp::flags;
use std::io;
use std::time::{Duration, Instant};

/// Writes to the guest in one turn, before others have theirs: half a megabyte.
const WRITES_PER_TURN: usize = 8;

/// How long the acknowledgement of a guest's FIN waits for the far end's: most servers close at
/// once when their client does. Far below any stack's retransmission timeout (the kernel's is 200
/// ms at least).
const FIN_WAITS: Duration = Duration::from_millis(10);

impl<S> Connection<S> {
    /// Does what can be done now. True if something is left that can be done at once.
    pub fn turn<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> (Outcome, bool) {
        if self.phase == Phase::Calling && self.may_hide && self.client_is_gone(io) {
            self.send_reset(io);
            return (Outcome::Reset, false);
        }
        if self.phase != Phase::Open {
            return (Outcome::Alive, false);
        }
        let moved = self.send_out(io).and_then(|()| self.send_in(io));
        let Ok(more) = moved else {
            self.send_reset(io);
            return (Outcome::Reset, false);
        };
        let looks_again = self.need_ack && self.acknowledge_soon(io);
        (self.finish(io.now), more || looks_again)
    }

    /// Acknowledges, or puts it off, so that an answer or the other end's FIN may carry it. True if
    /// only until the next round.
    ///
    /// What waits is less than a segment, in order, when nothing else is to be told (RFC 9293
    /// section 3.8.6.3 allows half a second). A guest may hold back its next bytes until it hears
    /// of the last ones (Nagle's algorithm), but after its FIN there are none.
    fn acknowledge_soon<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> bool {
        let untold = self.rcv_nxt.wrapping_sub(self.acknowledged);
        let may_wait = (1..u32::from(self.mss)).contains(&untold)
            && self.fin.is_none()
            && self.early.is_empty();
        let first = self.owed_since.is_none();
        let since = *self.owed_since.get_or_insert(io.now);
        let closing = self.guest_is_done();
        // Until the next round, or for a while.
        let waits = if closing { io.now < since + FIN_WAITS } else { first };
        if !(may_wait && waits) {
            self.send_ack(io);
            return false;
        }
        !closing
    }

    /// When an acknowledgement that waits leaves, if it is not the next round that it waits for.
    pub(super) fn acknowledge_at(&self) -> Option<Instant> {
        self.owed_since.filter(|_| self.guest_is_done()).map(|since| since + FIN_WAITS)
    }

    /// Whether a client that the guest has not accepted yet has gone. One that has only said all
    /// that it has to say is waiting.
    fn client_is_gone<H: Host<Stream = S>>(&self, io: &mut Io<'_, H>) -> bool {
        self.stream.as_ref().is_some_and(|stream| io.host.connect_result(stream).is_err())
    }

    /// Guest to host: what the socket did not take before, and the end.
    fn send_out<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> io::Result<()> {
        let done = self.guest_is_done();
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let waited = !self.pending.is_empty();
        while self.writable && !self.pending.is_empty() {
            let front = self.pending.front();
            match io.host.send(stream, front) {
                Ok(sent) => {
                    count(io.stats, Inbound::stats_of(self.inbound.as_ref()), 0, sent as u64);
                    self.writable = sent == front.len();
                    self.pending.pop(sent);
                    io.allowance = io.allowance.saturating_add(sent);
                    self.active = io.now;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) => return Err(error),
            }
        }
        if done && self.pending.is_empty() && !self.host_shut {
            io.host.shutdown(stream);
            self.host_shut = true;
        }
        // RFC 9293 section 3.8.6.2.2: not for less than is worth a segment, here a quarter of all.
        let untold = self.untold(io);
        if waited && untold > 0 && (untold >= io.params.window / 4 || self.pending.is_empty()) {
            self.need_ack = true;
        }
        Ok(())
    }

    /// Host to guest. True if there is more.
    fn send_in<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> io::Result<bool> {
        if !self.is_established() {
            return Ok(false);
        }
        self.take_out(io)?;
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
            // Less than a segment is not worth sending while an acknowledgement is to come (RFC
            // 9293 section 3.8.6.2.1).
            if nothing || room == 0 || !ending && room < mss && in_flight > 0 {
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
                    // What comes after this look is told anew.
                    self.readable = seen == length || self.may_hide;
                    self.send_data(seen, io);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Takes out of the socket's queue what the guest has acknowledged.
    fn take_out<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> io::Result<()> {
        let acknowledged = match self.fin {
            Some(fin) if before(fin, self.snd_una) => fin,
            _ => self.snd_una,
        };
        let length = acknowledged.wrapping_sub(self.queue_base) as usize;
        if length > 0
            && let Some(stream) = &mut self.stream
        {
            io.host.discard(stream, length)?;
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
            1,
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
