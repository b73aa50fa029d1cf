//! The data-plane runtime that the port publisher and the NAT engine share.
//!
//! - [`EventLoop`]: one thread, one epoll instance and one [`Handler`], with timers and a mailbox.
//! - [`Arena`]: slots that events refer to by a key, which becomes stale when the slot is freed.
//! - [`List`]: intrusive lists of arena slots, which find the longest idle one.
//! - [`Timers`]: deadlines by token, without a clock.
//! - [`PipePool`]: pipes for moving payload with `splice(2)`.
//! - [`Descriptors`]: the budget of file descriptors shared by all loops of a process.
//! - [`SourcePorts`]: source ports for many TCP connections to one destination.
//! - [`UDP_BUFFER`], [`KEEPALIVE`] and others: options of data-plane sockets.
//! - [`stream_ingress`]: the ingress interface of an accepted connection.
//! - [`batch`]: many datagrams per system call, merged into GSO batches where possible.
//!
//! The crate implements no protocol and no policy. It is not an async runtime: the control plane
//! (API, DNS, metrics) runs on tokio, which handles no payload. With the same system calls, these
//! loops achieved 25% more connections and requests per second than tokio (ARCHITECTURE.md).

mod arena;
pub mod batch;
mod descriptors;
mod epoll;
mod event_loop;
mod ingress;
mod lists;
mod mailbox;
mod options;
mod pipes;
mod revive;
mod source_ports;
mod stream_buffers;
mod timers;

pub use arena::{Arena, Key};
pub use descriptors::{Descriptors, Permit};
pub use epoll::{Epoll, Interest, Readiness, Token};
pub use event_loop::{Context, EventLoop, Handler};
pub use ingress::{
    StreamIngress, drop_forged_own_source, drop_mapped_sources, enable_stream_ingress,
    stream_ingress,
};
pub use lists::{Links, List};
pub use mailbox::{Closed, Sender};
pub use options::{
    BACKLOG, KEEPALIVE, UDP_BUFFER, accept_only_from_loopback, enlarge_datagram_buffers,
    is_exhaustion, set_number,
};
pub use pipes::{Loan, Pipe, PipePool, Splice};
pub use revive::{revive_datagrams, revive_listener, says_destroyed};
pub use source_ports::{PortRange, SourcePorts, begin_connect};
pub use stream_buffers::{
    UNREAD_BYTES, UNSENT_NARROW, UNSENT_WIDE, narrow_receive_buffer, widen_receive_buffer,
};
pub use timers::Timers;
