//! A connection's timers: sending again, probing a closed window, giving up.
//!
//! The guest is on the same machine, so the first timeout is the kernel's own minimum
//! (`TCP_RTO_MIN`, 200 ms) and not measured; it doubles with each that nothing comes of (RFC 6298
//! section 5.5). A guest may be stopped for a while: 12 of them in a row, five minutes, are the end
//! (RFC 9293 section 3.8.3 wants 100 s at least).

use super::Io;
use super::conn::{Connection, Outcome, Phase};
use crate::host::Host;
use crate::settings::Timeouts;
use crate::wire::tcp::flags;
use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(60);
const MOST: u8 = 12;

fn patience(tries: u8) -> Duration {
    FIRST.saturating_mul(1 << u32::from(tries.min(16))).min(LONGEST)
}

impl<S> Connection<S> {
    /// Arms the timer after which is sent again what is under way.
    pub(super) fn arm_resend(&mut self, now: Instant) {
        self.resend_at = Some(now + patience(self.retries));
    }

    /// Arms the timer after which a closed window is asked about (RFC 9293 section 3.8.6.1).
    pub(super) fn arm_probe(&mut self, now: Instant) {
        self.probe_at = Some(now + patience(self.probes));
    }

    fn half_closed(&self) -> bool {
        self.guest_is_done() || self.fin.is_some()
    }

    /// When [`Self::timeout`] is to be called next, as things stand.
    pub fn deadline(&self, timeouts: &Timeouts) -> Instant {
        match self.phase {
            Phase::Dialling => self.active + timeouts.connect,
            Phase::Calling => {
                let late = self.active + timeouts.connect;
                self.resend_at.map_or(late, |resend| resend.min(late))
            }
            Phase::Lingering => self.active + timeouts.linger,
            Phase::Open => {
                let idle = if self.half_closed() { timeouts.half_closed } else { timeouts.idle };
                [self.resend_at, self.probe_at, self.acknowledge_at(), self.handshake_ack_at]
                    .into_iter()
                    .flatten()
                    .fold(self.active + idle, Instant::min)
            }
        }
    }

    /// Does what is due.
    pub fn timeout<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> Outcome {
        let now = io.now;
        let timeouts = io.params.timeouts;
        match self.phase {
            Phase::Lingering if now >= self.active + timeouts.linger => return Outcome::Done,
            Phase::Dialling | Phase::Calling if now >= self.active + timeouts.connect => {
                self.send_reset(io);
                return Outcome::Reset;
            }
            Phase::Calling if self.resend_at.is_some_and(|at| at <= now) => {
                self.retries = self.retries.saturating_add(1);
                io.stats.retransmissions.add(1);
                self.send_syn(io);
                return Outcome::Alive;
            }
            Phase::Lingering | Phase::Dialling | Phase::Calling => return Outcome::Alive,
            Phase::Open => {}
        }
        let idle = if self.half_closed() { timeouts.half_closed } else { timeouts.idle };
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let (resend, probe) = (due(self.resend_at), due(self.probe_at));
        if resend || probe {
            self.retries += 1;
        }
        if due(self.handshake_ack_at) {
            self.say_hello(io);
        }
        if due(self.acknowledge_at()) {
            self.send_ack(io);
        }
        if self.retries > MOST || now >= self.active + idle {
            self.send_reset(io);
            return Outcome::Reset;
        }
        if resend && !self.is_established() {
            io.stats.retransmissions.add(1);
            self.send_syn_ack(io);
        } else if resend {
            io.stats.retransmissions.add(1);
            self.go_back();
        }
        if probe {
            // An old number, which every stack answers with where it is.
            let old = self.snd_una.wrapping_sub(1);
            self.emit(old, flags::ACK, 0, io);
            self.probes = self.probes.saturating_add(1);
            self.arm_probe(now);
        }
        Outcome::Alive
    }
}
