//! User-space NAT engine: egress for containers without iptables and without privileges.
//!
//! The default route of a container leads to a TUN device. A *guest* is the network stack of a
//! container behind the device. The engine reads packets from the device, terminates each flow, and
//! continues it with a regular socket of the host. A connection of the container becomes a
//! connection of this process, and its datagrams become datagrams of this process. Replies take the
//! reverse path. The host needs no firewall rule, no forwarding and no kernel module. The process
//! needs no privilege except the TUN device, which an unprivileged user can create in a user
//! namespace.
//!
//! ```text
//!  container                                   this process                          host's network
//!  ┌──────────┐  default route  ┌─────┐  read  ┌────────┐  send, connect   ┌──────────────┐
//!  │ program  ├────────────────►│ TUN │◄──────►│ Engine │◄────────────────►│ TCP, UDP and │◄─────► network
//!  └──────────┘  64 KiB packets └─────┘  write └────────┘  recv(MSG_PEEK)  │ ping sockets │
//!                                                                          └──────────────┘
//! ```
//!
//! The engine is fast because packets stay large on both sides. The TCP stack of the guest sends 64
//! KiB at a time (TSO), the engine does the same in reverse, and UDP uses GSO batches in both
//! directions. The engine buffers no payload: bytes that the guest has not acknowledged remain in
//! the receive queue of the kernel.
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
//! # drop(nat); // resets all connections and removes the device
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`Nat`]: a running engine on its own thread; the main entry point.
//! - [`Settings`], [`Policy`]: configuration and egress policy.
//! - [`Stats`], [`describe`]: metrics.
//! - [`engine`], [`host`]: the logic, and its interface to the kernel. Everything except `io` is
//!   free of sockets, clocks and random numbers, so the simulation in `tests` runs it with
//!   simulated time.
//!
//! `io/tun.rs` creates the TUN device with the crate `tun` and requests offloads and the length of
//! the virtio header by ioctls. `tun-rs` (2.8) supports the offloads, but only with a software GRO
//! layer, which a NAT does not need.

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
pub use io::sockets::reserve_port;
pub use io::tun::Tun;
pub use io::tun_options::{MIN_MTU, TunOptions};
pub use layer2::{Layer2Options, Layer2V6};
pub use limits::Rate;
pub use metrics::{Count, DropReason, FAMILIES, Figures, FlowKind, ForwardStats, Stats, describe};
pub use nat::Nat;
pub use policy::{Policy, PolicyNetwork};
pub use settings::{Capabilities, FloodListener, Mapping, Outbound, Settings, Timeouts};
pub use wire::ethernet::ETHERNET_MAX_MTU;
