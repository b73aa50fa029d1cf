//! TCP: terminates connections of the container, and continues each with a socket of the host.
//!
//! # Theory of operation
//!
//! ```text
//!             SYN                  connected: SYN-ACK                  both FINs acknowledged
//!   (none) ───────► Connecting ──────────────────────► Open ─────────────────────────────────► (none)
//!                       │ refused: RST                  │ RST, or timeout: (none)                 ▲
//!                       │ unreachable: ICMP             │ the remote side closed first            │ 1 s
//!                       ▼                               ▼                                         │
//!                     (none)                         Lingering ───────────────────────────────────┘
//! ```
//!
//! For a published port, the roles are reversed:
//!
//! ```text
//!         client accepted       guest: SYN-ACK
//!   (none) ────────────► SynSent ─────────────► Open
//!                           │ guest: RST, or timeout: reset to the client
//!                           ▼
//!                         (none)
//! ```
//!
//! | state | socket | what may be sent to the guest |
//! |---|---|---|
//! | Connecting | connecting | nothing: the SYN stays unanswered, so that the guest also sees a closed port as closed |
//! | SynSent | accepted | SYN, until the guest accepts or refuses; data of the client stays in the socket |
//! | Open | connected | SYN-ACK until acknowledged; then data and acknowledgements |
//! | Lingering | closed | the acknowledgement of its FIN, in case the first was lost |
//!
//! **Out** (guest to host): data in order is sent directly from the read buffer. Bytes that the
//! socket does not accept are stored in [`Pending`](queue::Pending), and data out of order in
//! [`OutOfOrder`](queue::OutOfOrder). Both reduce the advertised window. One acknowledgement covers
//! all segments of a batch.
//!
//! **In** (host to guest): the receive queue of the kernel is the send buffer. Bytes are peeked,
//! written to the guest, and removed from the queue once the guest has acknowledged them. A
//! retransmission peeks again. Sequence numbers:
//!
//! ```text
//!      queue_base      snd_una            snd_nxt             snd_max
//!  ────────┴──────────────┴──────────────────┴───────────────────┴────────► sequence numbers
//!           acknowledged,   in flight          sent before, to     not sent yet
//!           not discarded                      be retransmitted
//! ```
//!
//! After a timeout or three duplicate acknowledgements, `snd_nxt` returns to `snd_una` (go-back-N).
//! There is no congestion between the engine and its guest, and therefore no congestion control.
//! The window of the guest and [`Params::max_in_flight`] limit the bytes in flight. SACK, urgent
//! data and Nagle's algorithm are not implemented here; the host socket provides them towards the
//! network.
//!
//! Every state change is forwarded: a half-close becomes shutdown(2) once all earlier bytes are
//! sent, a reset becomes a reset (`SO_LINGER` 0), and a socket error becomes a reset. An aborted
//! connection never appears complete.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

pub mod conn;
mod emit;
pub mod memory;
pub mod queue;
mod receive;
mod send;
mod seq;
mod timer;

pub use conn::{Connection, Opening, Outcome};

use crate::host::Host;
use crate::metrics::{ForwardStats, Stats};
use crate::settings::{Capabilities, Settings, Timeouts};
use std::time::Instant;
use tidegate_model::Direction;

/// Window scale of the engine: windows up to 2 MiB, in steps of 32 bytes.
const SCALE: u8 = 5;

/// Maximum window scale (RFC 7323 section 2.3).
const MAX_SCALE: u8 = 14;

/// Maximum payload of one write: a packet with headers has at most 65,535 bytes.
const MAX_WRITE: usize = 65_535 - 60 - 40;

/// Maximum bytes in flight if each peek copies all of them again.
const MAX_IN_FLIGHT_COPIED: usize = 256 << 10;

/// Parameters that all connections share.
#[derive(Clone, Debug)]
pub struct Params {
    mtu: u16,
    window: u32,
    max_in_flight: usize,
    segmentation: bool,
    timeouts: Timeouts,
    epoch: Instant,
}

impl Params {
    /// Derives the parameters from the settings of the engine. `epoch` is the start of its clocks.
    #[must_use]
    pub fn new(settings: &Settings, epoch: Instant) -> Self {
        let Capabilities { peek_offset, tcp_offload, .. } = settings.capabilities;
        let window = settings.window.clamp(1 << 12, 1 << 21);
        let max_in_flight =
            if peek_offset { window as usize } else { MAX_IN_FLIGHT_COPIED.min(window as usize) };
        Self {
            mtu: settings.mtu,
            window,
            max_in_flight,
            segmentation: tcp_offload,
            timeouts: settings.timeouts,
            epoch,
        }
    }

    /// Milliseconds since the epoch: the timestamp clock (RFC 7323 section 5.4 permits ticks of 1
    /// ms to 1 s).
    fn clock(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.epoch).as_millis() as u32
    }
}

/// Resources of the engine for one call into a connection.
pub struct Io<'a, H: Host> {
    /// The host.
    pub host: &'a mut H,
    /// Buffer for the payload of one write.
    pub scratch: &'a mut [u8],
    /// The current time.
    pub now: Instant,
    /// The counters.
    pub stats: &'a Stats,
    /// The shared parameters.
    pub params: &'a Params,
    /// Additional bytes that the byte budget permits the endpoint to hold.
    pub allowance: usize,
}

/// Counts payload bytes, for the engine and for the published port, if any.
fn count(stats: &Stats, forward: Option<&ForwardStats>, direction: Direction, bytes: u64) {
    stats.bytes[direction].add(bytes);
    if let Some(forward) = forward {
        forward.bytes[direction].add(bytes);
    }
}
