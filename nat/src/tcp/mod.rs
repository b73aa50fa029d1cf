//! TCP: a connection of the container ends here, and goes on as a socket of the host's.
//!
//! # Theory of operation
//!
//! ```text
//!             SYN                  connected: SYN-ACK                  both FINs acknowledged
//!   (none) ────────► Dialling ───────────────────────► Open ─────────────────────────────────► (none)
//!                       │ refused: RST                  │ RST either way, too late: (none)        ▲
//!                       │ unreachable: ICMP             │ the far end closed first                │ 1 s
//!                       ▼                               ▼                                         │
//!                     (none)                         Lingering ───────────────────────────────────┘
//! ```
//!
//! Towards a port that the container has published the roles are changed:
//!
//! ```text
//!             a client          guest: SYN-ACK
//!   (none) ────────────► Calling ─────────────► Open
//!                           │ guest: RST, too late: reset to the client
//!                           ▼
//!                         (none)
//! ```
//!
//! | state | socket | what may be sent to the guest |
//! |---|---|---|
//! | Dialling | connecting | nothing: its SYN waits, so that a closed port is closed to it as well |
//! | Calling | the client's | our SYN, until the guest accepts or refuses; what the client says waits in the socket |
//! | Open | connected | SYN-ACK until it is acknowledged; then data and acknowledgements |
//! | Lingering | closed | the acknowledgement of its FIN, should the first have been lost |
//!
//! **Out** (guest to host): what comes in order is sent on from the buffer that it was read into.
//! Only what the socket does not take is kept, in [`Pending`](queue::Pending), and what comes too
//! early in [`OutOfOrder`](queue::OutOfOrder); both are within the window, which is what they leave
//! of it. One acknowledgement answers all that came in one batch.
//!
//! **In** (host to guest): the kernel's receive queue is the send buffer. Bytes are looked at where
//! they lie, written to the guest, and taken out of the queue when the guest has acknowledged them.
//! To send again is to look again. Numbers:
//!
//! ```text
//!      queue_base      snd_una            snd_nxt             snd_max
//!  ────────┴──────────────┴──────────────────┴───────────────────┴────────► sequence numbers
//!           acknowledged,   under way          sent before, to     still in the
//!           not taken out                      be sent again       socket's queue
//! ```
//!
//! After a timeout, or three duplicate acknowledgements, `snd_nxt` goes back to `snd_una`
//! (go-back-N). There is no congestion between the engine and its guest, so there is no congestion
//! control; what limits the flow is the guest's window and [`Params::max_in_flight`]. Neither SACK
//! nor urgent data nor Nagle's algorithm is implemented: the host's socket has them towards the
//! world.
//!
//! Everything is told on: a half-close is shut down when all before it is sent, a reset becomes a
//! reset (`SO_LINGER` 0), an error of the socket becomes a reset. A connection that is cut never
//! looks complete.

pub mod conn;
mod emit;
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

/// By how many bits our windows are shifted: 2 MiB can be said, in steps of 32 bytes.
const SCALE: u8 = 5;

/// The largest shift there is (RFC 7323 section 2.3).
const MAX_SCALE: u8 = 14;

/// Payload of one write at most: a packet with its headers has 65,535 bytes.
const MAX_WRITE: usize = 65_535 - 60 - 40;

/// In flight at most where every look copies all of it again.
const MAX_IN_FLIGHT_COPIED: usize = 256 << 10;

/// What all connections have in common.
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
    /// From the engine's settings; `epoch` is when its clocks began.
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

    /// Milliseconds since the epoch: the clock of timestamps (RFC 7323 section 5.4 allows 1 ms to 1
    /// s).
    fn clock(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.epoch).as_millis() as u32
    }
}

/// What a connection may use while it does something.
pub struct Io<'a, H: Host> {
    /// The world.
    pub host: &'a mut H,
    /// Room for one write's payload.
    pub scratch: &'a mut [u8],
    /// The time.
    pub now: Instant,
    /// What is counted.
    pub stats: &'a Stats,
    /// What all have in common.
    pub params: &'a Params,
    /// Bytes that may be buffered beyond what is already.
    pub allowance: usize,
}

/// Counts payload: out (0) or in (1).
fn count(stats: &Stats, forward: Option<&ForwardStats>, direction: usize, bytes: u64) {
    stats.bytes[direction].add(bytes);
    if let Some(forward) = forward {
        forward.bytes[direction].add(bytes);
    }
}
