//! Small real servers, bound inside a namespace and served by threads of this process.
//!
//! Each is ready when its constructor returns and stopped when dropped: listener and connections
//! are shut down, and their threads waited for. A port of 0 asks for a free one; `addr()` tells
//! which.
//!
//! They are plain on purpose, one thread per connection. Loads of thousands of connections are the
//! benchmarks' business, which bring servers of their own.

mod bulk;
mod echo;
mod peer;
mod stalled;
mod tcp;
mod udp;

pub use bulk::{Sink, Source};
pub use echo::EchoServer;
pub use peer::PeerServer;
pub use stalled::StalledServer;
