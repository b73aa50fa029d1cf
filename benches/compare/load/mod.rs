//! Load generators. They are event-driven with one thread each, so that they do not limit the
//! result.
//!
//! Clients run in the client namespace and connect to the published port; servers run in the
//! container namespace. All loads are bounded in time and count.

pub(crate) mod client;
pub(crate) mod datagrams;
pub(crate) mod server;

/// The size of a request and of its response in bytes.
pub(crate) const MESSAGE: usize = 64;

/// Maximum number of events of one `epoll_wait`.
const EVENTS: usize = 256;
