//! TCP proxying: one connection from the client, one to the backend, and payload copied between
//! them.
//!
//! # Theory of operation
//!
//! ```text
//!            accept                    connected
//!  (backlog) ------> Dialling ------------------------> Open ----> EOF in both directions: close
//!                      |  backend refuses, no route,      |
//!                      |  dial timeout: reset the client  |  error on either side: reset both
//!                      |  client resets: abort the dial   |
//!                      +----------------------------------+----> removed
//! ```
//!
//! If the upstream has several backends, the dial is a set of *attempts*, each with a socket to a
//! different backend. Its state is [`Dial`], which other connections do not have. The first attempt
//! that completes wins: its socket becomes the backend socket. No payload is sent before, so it
//! reaches only that backend.
//!
//! | attempts | event | next |
//! |---|---|---|
//! | any | one completes | Open with the earliest completed one; all others are reset |
//! | any | one fails, a backend is left | an attempt to that backend replaces it |
//! | several | one fails, no backend is left | continue with the others |
//! | one | it fails, no backend is left | reset the client |
//! | 1 or 2 | no answer during [`hedge_after`] since the last attempt | one more, a *rival* |
//! | any | dial timeout, or the client resets | all are closed |
//!
//! A failed attempt is reported to the upstream. So is a silent one, at the dial timeout or if a
//! later attempt wins. One that loses to an earlier attempt had less time, which proves nothing.
//! Each rival takes a descriptor from the budget; if none is free, the dial continues without.
//!
//! Backend events of an earlier socket may still be queued in the round that replaces it. While
//! dialling, events therefore only cause the sockets to be polled. Afterwards, the loop ignores
//! backend events for the rest of the round.
//!
//! A connection has two halves, one per direction. A half reads from its source until the source is
//! empty. It delivers what it has read before it reads again, so it holds at most one buffer or
//! pipe of payload. When the sink stops reading, the half stops, the receive window of the source
//! closes, and the sender blocks. After EOF from the source, the half delivers the remaining
//! payload and sends a FIN to the sink; the other half continues.
//!
//! A half starts *narrow*: it has small socket buffers and copies through the buffer of the loop.
//! It becomes *wide* after [`WIDEN_AFTER`] bytes if it was not blocked or was fast. A wide half has
//! large socket buffers. After a read of at least [`SPLICE_FROM`] bytes it borrows a pipe and
//! splices the next read, so that the payload stays in the kernel. After a splice of less than a
//! quarter of [`SPLICE_FROM`] it copies again, so an exchange of small messages never splices. A
//! drained pipe returns to the pool immediately, and idle connections hold none.
//!
//! A byte budget limits what halves hold for peers that do not read ([`shares`]). A wide half is
//! charged [`WIDE_BYTES`] and becomes narrow after a period without payload. If the budget is
//! exhausted, a half stays narrow and is slower. A narrow half is charged [`NARROW_BYTES`] while it
//! is blocked. When the sum of all charges exceeds the budget, one connection of the client that
//! holds most is reset: the blocked one that has been idle for longest.
//!
//! On the same host, a connect has completed when connect(2) returns, and a client that sends first
//! has sent its request before it is accepted. The loop therefore polls both sockets once and
//! forwards the first exchange before it registers them with epoll. When the connect wakes the
//! backend, the request has already arrived.
//!
//! [`shares`] decides which clients are admitted and which connection is evicted when a limit is
//! reached. Each loop keeps one list of connections per holder, ordered by idle time; the first one
//! is evicted.
//!
//! An error is a reset, a timeout, or any other end except EOF. Payload that has already arrived is
//! forwarded first, as far as the other side accepts it. Then both sides are reset with `SO_LINGER`
//! of zero seconds. No `shutdown` precedes the reset, because it would send a FIN. An aborted
//! connection therefore never appears complete.
//!
//! Readiness is edge-triggered: each half caches the readiness of its sockets in flags, which
//! events set and `EAGAIN` clears. A read that does not fill the buffer has emptied the socket,
//! which saves a read that would return `EAGAIN`. This does not hold after the peer has closed:
//! then only a read of zero bytes marks EOF.
//!
//! [`hedge_after`]: crate::Upstream::hedge_after

use std::time::Duration;

mod accept;
mod connection;
mod dial;
mod shares;

pub(crate) use accept::{AcceptBatch, Accepted, log_revived, refusal};
pub(crate) use connection::{Claim, Connection, Phase, Scratch, Turn, connect_result};
pub(crate) use dial::Dial;
pub(crate) use shares::{Holder, Limits, Reservation, Shares};

/// Size of a read in bytes from which the next read is spliced. Below it, moving pages through a
/// pipe costs at least as much as the copy (`cargo bench --bench splice_threshold`; figures in
/// docs/benchmarks.md).
pub const SPLICE_FROM: usize = COPY_BYTES;

/// Size of the copy buffer of a loop in bytes. A copying half holds at most this much.
pub const COPY_BYTES: usize = 64 << 10;

/// Maximum payload in the pipe of a splicing half, in bytes.
pub const SPLICE_BYTES: usize = 1 << 20;

/// Payload in bytes after which a half becomes wide, if it was not blocked meanwhile or took no
/// longer than [`FAST_WINDOW`].
pub const WIDEN_AFTER: u64 = 256 << 10;
pub(crate) const FAST_WINDOW: Duration = Duration::from_millis(100);

/// Payload in bytes after which the receive buffer of a half is fixed. The kernel grows a buffer to
/// megabytes within the next read (`tcp_rcv_space_adjust`); reducing it later would drop what the
/// sender has in flight. Below this size a connection saves the system call.
pub(crate) const FIX_AFTER: u64 = 8 << 10;

/// Maximum kernel memory that a wide half holds, in bytes: a full receive buffer at its source
/// ([`UNREAD_BYTES`](crate::UNREAD_BYTES) plus kernel overhead), a full pipe, and unsent data.
pub const WIDE_BYTES: usize = 5 << 19;

/// Maximum kernel memory that a blocked narrow half holds, in bytes: a receive buffer, the payload
/// that was read, and unsent data.
pub const NARROW_BYTES: usize = 512 << 10;

/// Maximum number of backends that are dialled for one connection. Each takes a connect(2) in the
/// loop, which others wait for. If eight have failed, more are unlikely to answer.
pub const MAX_TRIES: usize = 8;

/// Maximum number of backends that are dialled at the same time for one connection. Each takes a
/// descriptor, and a connection of a backend that does not use it.
pub const MAX_IN_FLIGHT: usize = 3;

/// Maximum number of reads of one half per turn, so that a fast connection does not starve others.
pub const READS_PER_TURN: u32 = 8;
