//! Kernel memory of a connection: the size of its receive buffer, and its charge to the byte budget
//! of the engine.
//!
//! Data that the guest has not acknowledged stays in the receive queue of the host socket. The
//! kernel grows that queue up to `tcp_rmem` (6 to 32 MiB) as it is read, so a guest with many
//! stalled connections could use most of the memory of the host. The engine therefore sizes the
//! buffer itself:
//!
//! | buffer | from | charge |
//! |---|---|---|
//! | sized by the kernel, 128 KiB | the start | while the connection is blocked: [`NARROW_BYTES`] |
//! | narrow | [`FIX_AFTER`] bytes, or when it is blocked | the same |
//! | wide | [`WIDEN_AFTER`] bytes, if the guest kept up and the budget permits it | [`WIDE_BYTES`], until it has been idle for [`WIDE_IDLE`] |
//!
//! A connection is blocked while one side does not take data that the other has sent. The flow
//! table keeps the budget and chooses whose connection is evicted when blocked ones exceed it
//! ([`TableLimits::held_bytes`](crate::flow_table::TableLimits::held_bytes)).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::host::ReceiveBuffer;
use std::time::{Duration, Instant};

/// Maximum kernel memory of a connection with a wide receive buffer, in bytes: the full buffer, and
/// unsent data.
pub const WIDE_BYTES: usize = 5 << 19;

/// Maximum kernel memory of any other connection that is blocked, in bytes: the full buffer, and
/// unsent data.
pub const NARROW_BYTES: usize = 512 << 10;

/// Acknowledged bytes after which the receive buffer is fixed. A shorter connection saves the
/// system call.
const FIX_AFTER: u32 = 8 << 10;

/// Acknowledged bytes after which the receive buffer becomes wide, if the connection was not
/// blocked meanwhile or took no longer than [`FAST_WINDOW`].
const WIDEN_AFTER: u32 = 256 << 10;
const FAST_WINDOW: Duration = Duration::from_millis(100);

/// Idle time after which a wide receive buffer becomes narrow.
const WIDE_IDLE: Duration = Duration::from_secs(2);

/// Size of the receive buffer, and what decides about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// `None` until the engine has set it.
    size: Option<ReceiveBuffer>,
    was_blocked: bool,
    /// Bytes that the guest has acknowledged since `time`, if the buffer is not wide.
    delivered: u32,
    /// Start of the count; for a wide buffer, the time of the next check whether it is still
    /// needed.
    time: Instant,
}

impl Memory {
    pub(super) fn new(now: Instant) -> Self {
        Self { size: None, was_blocked: false, delivered: 0, time: now }
    }

    /// The charge to the byte budget, in bytes.
    pub(super) fn charge(&self, blocked: bool) -> usize {
        match self.size {
            Some(ReceiveBuffer::Wide) => WIDE_BYTES,
            _ if blocked => NARROW_BYTES,
            _ => 0,
        }
    }

    /// Records that the guest has acknowledged `bytes`.
    pub(super) fn deliver(&mut self, bytes: usize) {
        self.delivered = self.delivered.saturating_add(bytes as u32);
    }

    /// Returns the new size of the receive buffer, if it changes after a turn. `allowance` is the
    /// number of bytes that the budget still permits.
    pub(super) fn resize(
        &mut self,
        blocked: bool,
        allowance: usize,
        now: Instant,
    ) -> Option<ReceiveBuffer> {
        self.was_blocked |= blocked;
        if self.is_wide() {
            return None;
        }
        let needs_size = blocked || self.delivered >= FIX_AFTER;
        if self.delivered >= WIDEN_AFTER {
            let fast = !self.was_blocked || now < self.time + FAST_WINDOW;
            (self.delivered, self.time, self.was_blocked) = (0, now, blocked);
            if fast && allowance >= WIDE_BYTES {
                self.time = now + WIDE_IDLE;
                return self.set(ReceiveBuffer::Wide);
            }
        }
        if needs_size && self.size.is_none() { self.set(ReceiveBuffer::Narrow) } else { None }
    }

    /// Returns the new size of the receive buffer, if it changes because the connection has been
    /// idle since `active`. A blocked connection holds what its buffer contains and stays wide.
    pub(super) fn resize_idle(
        &mut self,
        blocked: bool,
        active: Instant,
        now: Instant,
    ) -> Option<ReceiveBuffer> {
        if self.check_at().is_none_or(|at| now < at) {
            return None;
        }
        let idle_at = active + WIDE_IDLE;
        if blocked || now < idle_at {
            self.time = idle_at.max(now + WIDE_IDLE / 2);
            return None;
        }
        (self.delivered, self.time, self.was_blocked) = (0, now, false);
        self.set(ReceiveBuffer::Narrow)
    }

    /// Time at which to call [`Self::resize_idle`].
    pub(super) fn check_at(&self) -> Option<Instant> {
        self.is_wide().then_some(self.time)
    }

    fn is_wide(&self) -> bool {
        self.size == Some(ReceiveBuffer::Wide)
    }

    fn set(&mut self, size: ReceiveBuffer) -> Option<ReceiveBuffer> {
        self.size = Some(size);
        self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LARGE: usize = usize::MAX;

    #[test]
    fn a_fast_connection_becomes_wide_and_an_idle_one_narrow() {
        let start = Instant::now();
        let mut memory = Memory::new(start);
        assert_eq!((memory.resize(false, LARGE, start), memory.charge(false)), (None, 0));
        memory.deliver(FIX_AFTER as usize);
        assert_eq!(memory.resize(false, LARGE, start), Some(ReceiveBuffer::Narrow));
        memory.deliver(WIDEN_AFTER as usize);
        assert_eq!(memory.resize(false, LARGE, start), Some(ReceiveBuffer::Wide));
        assert_eq!(memory.charge(false), WIDE_BYTES);
        let check = memory.check_at().unwrap();
        assert_eq!(memory.resize_idle(false, check, check), None, "it was active");
        let check = memory.check_at().unwrap();
        assert_eq!(memory.resize_idle(true, start, check), None, "it is blocked");
        let check = memory.check_at().unwrap();
        assert_eq!(memory.resize_idle(false, start, check), Some(ReceiveBuffer::Narrow));
        assert_eq!((memory.check_at(), memory.charge(false)), (None, 0));
    }

    #[test]
    fn a_blocked_connection_is_narrow_and_charged() {
        let start = Instant::now();
        let mut memory = Memory::new(start);
        assert_eq!(memory.resize(true, LARGE, start), Some(ReceiveBuffer::Narrow));
        assert_eq!((memory.charge(true), memory.charge(false)), (NARROW_BYTES, 0));
        memory.deliver(WIDEN_AFTER as usize);
        assert_eq!(memory.resize(false, LARGE, start + FAST_WINDOW), None, "a slow guest");
        memory.deliver(WIDEN_AFTER as usize);
        assert_eq!(
            memory.resize(false, LARGE, start + 20 * FAST_WINDOW),
            Some(ReceiveBuffer::Wide),
            "a slow remote side: a long round trip needs a large window"
        );
    }

    #[test]
    fn a_connection_stays_narrow_without_an_allowance() {
        let start = Instant::now();
        let mut memory = Memory::new(start);
        memory.deliver(WIDEN_AFTER as usize);
        assert_eq!(memory.resize(false, WIDE_BYTES - 1, start), Some(ReceiveBuffer::Narrow));
        memory.deliver(WIDEN_AFTER as usize);
        assert_eq!(memory.resize(false, WIDE_BYTES, start), Some(ReceiveBuffer::Wide));
    }
}
