//! The NAT engine: containers reach the world without iptables and without privileges.
//!
//! What leaves a container goes into a TUN device, its default route. The engine reads it there,
//! ends every flow, and goes on with an ordinary socket of the host's: a container's connection
//! becomes a connection of this process, its datagrams become this process's datagrams, and answers
//! take the way back. The host needs no rule, no forwarding and no module for that, and the process
//! no privilege but the TUN device, which an ordinary user makes in a user namespace.
//!
//! ```text
//!  container                                   this process                          host's network
//!  ┌──────────┐  default route  ┌─────┐  read  ┌────────┐  send, connect   ┌──────────────┐
//!  │ program  ├────────────────►│ TUN │◄──────►│ Engine │◄────────────────►│ TCP, UDP and │◄──────► world
//!  └──────────┘  64 KiB a piece └─────┘  write └────────┘  recv(MSG_PEEK)  │ ping sockets │
//!                                                                          └──────────────┘
//! ```
//!
//! It is fast for one reason: neither side cuts what the other would put together again. The
//! guest's TCP hands 64 KiB over at a time (TSO), the engine answers in kind, and UDP goes in
//! GSO batches both ways. And it keeps no payload: what the guest has not acknowledged stays in the
//! kernel's receive queue.
//!
//! ```no_run
//! use std::{path::Path, sync::Arc};
//! use tidegate_nat::{Nat, Settings, Tun, TunOptions};
//! use tidegate_netns::{Family, Namespace};
//! use tidegate_reactor::Descriptors;
//!
//! let container = Namespace::from_path(Path::new("/run/netns/blue"))?;
//! let options = TunOptions {
//!     addresses: vec!["10.0.2.100/24".parse()?],
//!     default_routes: vec![Family::V4],
//!     ..TunOptions::new("tun0")
//! };
//! let tun = Tun::open(&container, &options)?;
//! let descriptors = Arc::new(Descriptors::of_process(64));
//! let mut settings = Settings::new(options.mtu);
//! settings.policy.gateways = vec!["10.0.2.2".parse()?];
//! let nat = Nat::start(settings, tun, &Namespace::current()?, descriptors)?;
//! # drop(nat); // resets what it carries, and the device is gone
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`Nat`]: a running engine on a thread of its own; the way in for everybody else.
//! - [`Settings`], [`Policy`]: what can be set, and who may go where.
//! - [`Stats`], [`describe`]: what is counted.
//! - [`engine`], [`host`]: the logic, and the seam to the kernel below it. All but `io` is pure: no
//!   socket, no clock, no randomness; the simulation in `tests` runs it in invented time.
//!
//! The TUN device is made with the ioctls themselves (`io/tun.rs`). Of the `tun` crate (0.8.14) two
//! calls would be left: it has neither `TUNSETVNETHDRSZ` nor `TUNSETOFFLOAD`, nor a queue length;
//! it opens the device to wait, and cannot tell a host without `/dev/net/tun` from a name that is
//! taken, which are two different things to do for whoever reads the error. `tun-rs` (2.8) has the
//! offloads behind a software GRO layer that a NAT does not want.

#[cfg(not(target_os = "linux"))]
compile_error!("TUN devices with virtio headers exist on Linux only");

pub mod engine;
mod error;
pub mod fair_queue;
pub mod flow_table;
pub mod forward;
pub mod fragments;
#[doc(hidden)]
pub mod fuzz;
mod gso_batch;
pub mod host;
mod io;
pub mod layer2;
pub mod limits;
mod metrics;
mod nat;
mod policy;
mod settings;
pub mod siphash;
pub mod tcp;
pub mod wire;

pub use error::StartError;
pub use flow_table::TableLimits;
pub use forward::{Forward, ForwardId, ForwardSource, Guard, MAX_FORWARDS, PublishError};
pub use io::tun::{MIN_MTU, Tun, TunOptions};
pub use layer2::{Layer2Options, Layer2V6};
pub use limits::Rate;
pub use metrics::{
    Count, DropReason, FAMILIES, Family, Figures, FlowKind, ForwardStats, Stats, describe,
};
pub use nat::Nat;
pub use policy::{Policy, PolicyNetwork};
pub use settings::{Capabilities, FloodListener, Mapping, Outbound, Settings, Timeouts};
pub use wire::ethernet::{ETHERNET_MAX_MTU, MacAddress};
