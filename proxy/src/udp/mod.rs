//! UDP proxying: each client has a socket connected to the backend, so that replies can be matched
//! to it.
//!
//! # Theory of operation
//! A datagram to a published port belongs to a session, identified by the address of the client and
//! the local address that it was sent to. A new session opens a socket and connects it to the
//! backend. From then on the kernel delivers replies of the backend to that socket. Replies leave
//! through the published socket, with the local address that the client used as their source.
//! Sessions are kept in a bounded [`session_table`]. A session ends after the idle timeout, when it
//! is evicted, or when its path is no longer available; the next datagram then opens a new session.
//!
//! Datagrams are received and sent in batches (`tidegate_reactor::batch`). Consecutive datagrams of
//! a session in a batch are sent together.
//!
//! A datagram with a published port as its source would cause an endless loop of replies. It opens
//! no session ([`loop_guard`]).
//!
//! A closed port of the backend (`ECONNREFUSED`, from ICMP) is counted and does not end the
//! session, because the backend may be starting. UDP does not guarantee delivery, so a full send
//! buffer drops datagrams; these are counted as well.

mod loop_guard;
mod relay;
pub mod session_table;

pub(crate) use loop_guard::LoopGuard;
pub(crate) use relay::{Batches, Relay};
