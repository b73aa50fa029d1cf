//! Timers of a connection: retransmission, zero-window probe, and giving up.
//!
//! The guest is on the same machine, so the initial timeout is the minimum of the kernel
//! (`TCP_RTO_MIN`, 200 ms) instead of a measurement. It doubles with each timeout (RFC 6298 section
//! 5.5). A guest may be stopped for a while, so a connection is given up after 12 consecutive
//! timeouts, about five minutes (RFC 9293 section 3.8.3 requires at least 100 s).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::Io;
use super::conn::{Connection, Outcome, Phase};
use crate::host::Host;
use crate::settings::Timeouts;
use crate::wire::tcp::flags;
use std::time::{Duration, Instant};

const RTO_MIN: Duration = Duration::from_millis(200);
const RTO_MAX: Duration = Duration::from_secs(60);
const MAX_RETRIES: u8 = 12;

fn backoff(tries: u8) -> Duration {
    RTO_MIN.saturating_mul(1 << u32::from(tries.min(16))).min(RTO_MAX)
}

impl<S> Connection<S> {
    /// Arms the retransmission timer.
    pub(super) fn arm_resend(&mut self, now: Instant) {
        self.resend_at = Some(now + backoff(self.retries));
    }

    /// Arms the zero-window probe timer (RFC 9293 section 3.8.6.1).
    pub(super) fn arm_probe(&mut self, now: Instant) {
        self.probe_at = Some(now + backoff(self.probes));
    }

    fn half_closed(&self) -> bool {
        self.guest_has_finished() || self.fin.is_some()
    }

    /// The deadline for the next call of [`Self::timeout`] in the current state.
    pub fn deadline(&self, timeouts: &Timeouts) -> Instant {
        match self.phase {
            Phase::Connecting => self.active + timeouts.connect,
            Phase::SynSent => {
                let late = self.active + timeouts.connect;
                self.resend_at.map_or(late, |resend| resend.min(late))
            }
            Phase::Lingering => self.active + timeouts.linger,
            Phase::Open => {
                let idle = if self.half_closed() { timeouts.half_closed } else { timeouts.idle };
                let acks = [self.delayed_ack_at(), self.handshake_ack_at];
                [self.resend_at, self.probe_at, self.memory.check_at()]
                    .into_iter()
                    .chain(acks)
                    .flatten()
                    .fold(self.active + idle, Instant::min)
            }
        }
    }

    /// Handles expired timers.
    pub fn timeout<H: Host<Stream = S>>(&mut self, io: &mut Io<'_, H>) -> Outcome {
        let now = io.now;
        let timeouts = io.params.timeouts;
        match self.phase {
            Phase::Lingering if now >= self.active + timeouts.linger => return Outcome::Done,
            Phase::Connecting | Phase::SynSent if now >= self.active + timeouts.connect => {
                self.send_reset(io);
                return Outcome::Reset;
            }
            Phase::SynSent if self.resend_at.is_some_and(|at| at <= now) => {
                self.retries = self.retries.saturating_add(1);
                io.stats.retransmissions.add(1);
                self.send_syn(io);
                return Outcome::Alive;
            }
            Phase::Lingering | Phase::Connecting | Phase::SynSent => return Outcome::Alive,
            Phase::Open => {}
        }
        let idle = if self.half_closed() { timeouts.half_closed } else { timeouts.idle };
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let (resend, probe) = (due(self.resend_at), due(self.probe_at));
        if resend || probe {
            self.retries += 1;
        }
        if due(self.handshake_ack_at) {
            self.send_handshake_ack(io);
        }
        if due(self.delayed_ack_at()) {
            self.send_ack(io);
        }
        if self.retries > MAX_RETRIES || now >= self.active + idle {
            self.send_reset(io);
            return Outcome::Reset;
        }
        let size = self.memory.resize_idle(self.is_blocked(), self.active, now);
        self.resize_buffer(size, io);
        if resend && !self.is_established() {
            io.stats.retransmissions.add(1);
            self.send_syn_ack(io);
        } else if resend {
            io.stats.retransmissions.add(1);
            self.go_back();
        }
        if probe {
            // An old sequence number, to which every stack replies with its current acknowledgement
            // and window.
            let old = self.snd_una.wrapping_sub(1);
            self.emit(old, flags::ACK, 0, io);
            self.probes = self.probes.saturating_add(1);
            self.arm_probe(now);
        }
        Outcome::Alive
    }
}
