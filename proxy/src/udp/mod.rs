//! UDP: one connected socket to the backend for each client, so that answers find their way back.
//!
//! # Theory of operation
//! A datagram that arrives at a published port belongs to a session, found by its sender and by the
//! address of ours it was sent to. A new session opens a socket towards the backend and connects
//! it: from then on the kernel delivers the backend's answers to that socket and nobody else's.
//! They leave through the published socket, from the very address the client had used. Sessions
//! live in a bounded [`session_table`], and end when they are silent for the idle timeout, when
//! they must make room, or when their path turns out to be gone (the next datagram then opens a new
//! one).
//!
//! Datagrams are received and sent many at a time (`tidegate_reactor::batch`): neighbours in a
//! batch that belong to the same session go out as one run.
//!
//! A datagram whose sender is a published port of ours would be answered for ever, and opens no
//! session ([`loop_guard`]).
//!
//! A closed port at the backend (`ECONNREFUSED`, from ICMP) is counted and changes nothing: the
//! backend may be starting. UDP promises no delivery, so a full send buffer drops, and that is
//! counted too.

mod loop_guard;
mod relay;
pub mod session_table;

pub(crate) use loop_guard::LoopGuard;
pub(crate) use relay::{Batches, Relay};
