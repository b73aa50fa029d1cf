//! Load generators: event-driven, one thread each, so that they are not what is measured.
//!
//! The clients run inside the client's namespace and speak to the published port; the servers run
//! inside the container's. Everything is bounded in time and count.

pub(crate) mod client;
pub(crate) mod datagrams;
pub(crate) mod server;

/// Bytes of a request, and of the reply to it.
pub(crate) const MESSAGE: usize = 64;

/// How many events one `epoll_wait` takes.
const EVENTS: usize = 256;
