//! The data plane's only runtime: what the port publisher and the NAT engine share.
//!
//! - [`EventLoop`]: one thread, one epoll instance, one [`Handler`]; timers and a mailbox included.
//! - [`Arena`]: slots that events refer to by a key which goes stale when the slot is freed.
//! - [`List`]: lists that run through an arena, to find what has been silent for longest.
//! - [`Timers`]: deadlines by token, pure.
//! - [`PipePool`]: the pipes that `splice(2)` moves payload through.
//! - [`Descriptors`]: the allowance of file descriptors that all loops of a process share.
//! - [`SourcePorts`]: where TCP connections come from that go to one place, however many they are.
//! - [`stream_ingress`]: by which interface an accepted connection came in.
//! - [`batch`]: many datagrams per system call, merged into segmentation offload where they allow
//!   it.
//!
//! It knows no protocol and no policy, and it is not an async runtime: the control plane (API, DNS,
//! metrics) runs on tokio, and no byte of payload passes through there. Own loops measured 25% more
//! connections and requests per second than tokio with the same system calls (ARCHITECTURE.md).

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
mod timers;

pub use arena::{Arena, Key};
pub use descriptors::{Descriptors, Permit};
pub use epoll::{Epoll, Interest, Readiness, Token};
pub use event_loop::{Context, EventLoop, Handler};
pub use ingress::{StreamIngress, drop_forged_own_source, enable_stream_ingress, stream_ingress};
pub use lists::{Links, List};
pub use mailbox::{Closed, Sender};
pub use options::set_window_clamp;
pub use pipes::{Loan, Pipe, PipePool, Splice};
pub use revive::{revive_datagrams, revive_listener, says_destroyed};
pub use source_ports::{PortRange, SourcePorts, begin_connect};
pub use timers::Timers;
