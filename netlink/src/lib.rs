//! Synchronous netlink sockets: the transport of all netlink requests except those of `rtnetlink`.
//!
//! The kernel processes netlink requests synchronously: when `send(2)` returns, the replies are in
//! the receive queue. Neither an async runtime nor a thread is needed.
//!
//! A [`Request`] is anything that can be encoded: the messages of nfnetlink and of traffic control
//! in `netfilter`, and [`RouteRequest`] for the messages of `netlink-packet-route`.

mod request;
mod route;
mod socket;

pub use request::{HEADER, Request, write_message};
pub use route::RouteRequest;
pub use socket::{DumpInterrupted, NetlinkSocket, Rejection};
