//! Small real servers, bound in a namespace and served by threads of this process.
//!
//! Each server is ready when its constructor returns. The drop shuts down the listener and the
//! connections, and joins their threads. Port 0 selects a free port; `addr()` returns it.
//!
//! They use one thread per connection. Benchmarks with thousands of connections have their own
//! servers.

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
