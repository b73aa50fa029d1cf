//! TCP: one connection from the client, one to the backend, and payload moved between them.
//!
//! # Theory of operation
//!
//! ```text
//!            accept                    connected
//!  (backlog) ------> Dialling ------------------------> Open ----> both directions ended: close
//!                      |  backend refuses, no route,      |
//!                      |  no answer in time: reset client |  error on either side: reset both
//!                      |  client resets: abandon the dial |
//!                      +----------------------------------+----> gone
//! ```
//!
//! A connection has two halves, one for each direction. A half reads from its source until there is
//! nothing to read, delivers before it reads again, and so holds at most one buffer or pipe of
//! payload: when the sink stops reading, the half stops, the source's receive window closes, and
//! the sender waits. When the source ends (FIN) and everything is delivered, the half shuts the
//! sink's writing side down (FIN), and the other half goes on.
//!
//! A half begins *narrow*: small socket buffers, and copying through the loop's one buffer. One
//! that has carried [`WIDEN_AFTER`] without being blocked, or fast, becomes *wide*: large socket
//! buffers, and where a read brings [`SPLICE_FROM`] bytes or more, it borrows a pipe for the next
//! one and splices: the payload then stays in the kernel. When that brings less than a quarter of
//! it, it copies again: an exchange of small messages never splices, however long it goes on. A
//! drained pipe goes back to the pool at once, so idle connections hold none.
//!
//! What halves may hold for peers that do not drain is budgeted ([`shares`]). A wide half has
//! [`WIDE_BYTES`] of the budget, and is made narrow again when it carries nothing for a while;
//! where the budget has nothing left for it, it stays narrow, which slows it down. A narrow half
//! takes [`NARROW_BYTES`] as long as it is blocked. When that exceeds the budget, of the client
//! that holds most the connection is cut that has been blocked without carrying anything for
//! longest.
//!
//! On one host a connect is over by the time connect(2) returns, and a client that speaks first has
//! spoken by the time it is accepted. So both sockets are asked at once, and the first exchange
//! goes on its way before epoll has heard of them; the backend, which the connect wakes up, finds
//! it there already.
//!
//! Who may come in, and who yields when there is no room, is decided in [`shares`]. Each loop has a
//! list of the connections of each holder, from the one that has carried nothing for longest: the
//! one that is cut.
//!
//! An error is a reset, a timeout, anything that means the connection did not end well. What has
//! already arrived is passed on first, as far as the other side takes it; then both sides are reset
//! (`SO_LINGER` with zero seconds, and no `shutdown` before it, which would send a FIN). So a cut
//! connection never looks complete.
//!
//! Readiness is edge-triggered: what a half knows of its sockets is kept in flags, set by events
//! and cleared by `EAGAIN`. A read that fills less than the buffer has emptied the socket, which
//! saves the read that would say so, unless the peer has closed: then only a read that returns
//! nothing is the end.

use std::time::Duration;

mod accept;
mod connection;
mod shares;

pub(crate) use accept::{Accepted, Crowd, log_revived, refusal};
pub(crate) use connection::{Claim, Connection, Phase, Scratch, Side, Turn};
pub(crate) use shares::{Holder, Limits, Seat, Shares};

/// Payload of one read from which the next one is spliced, in bytes: below it moving pages through
/// a pipe costs as much as the copy or more (`cargo bench --bench splice_threshold`;
/// docs/benchmarks.md has the figures).
pub const SPLICE_FROM: usize = COPY_BYTES;

/// The loop's copy buffer, in bytes, and so the most that a copying half holds.
pub const COPY_BYTES: usize = 64 << 10;

/// The most that a splicing half holds in its pipe, in bytes.
pub const SPLICE_BYTES: usize = 1 << 20;

/// Payload after which a half becomes wide, if it was not blocked meanwhile or took no longer than
/// [`SOON`].
pub const WIDEN_AFTER: u64 = 256 << 10;
pub(crate) const SOON: Duration = Duration::from_millis(100);

/// What a wide half can hold at most, in bytes of kernel memory: a full receive buffer at its
/// source ([`UNREAD_BYTES`](crate::UNREAD_BYTES), with the kernel's bookkeeping), a full pipe, and
/// what is unsent.
pub const WIDE_BYTES: usize = 5 << 19;

/// What a narrow half that is blocked holds at most, in bytes of kernel memory: a receive buffer,
/// what was read, and what is unsent.
pub const NARROW_BYTES: usize = 384 << 10;

/// Reads of one half in one turn, so that a fast connection does not keep the others waiting.
pub const READS_PER_TURN: u32 = 8;
