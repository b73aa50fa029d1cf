//! Container networks: bridges, endpoints and isolation.
//!
//! # Theory of operation
//!
//! ```text
//! Desired ──facts──►┐
//!                   ├─► plan ──► [Op, Op, …] ──► apply ──► observe again: empty plan
//! Observed ────────►┘                              │
//!                                               journal
//! ```
//!
//! The kernel state of a network is a list of [`Fact`]s: a bridge exists, an address is assigned, a
//! rule is in force. [`Desired`] produces facts in the order in which they can be created;
//! [`Observed`] holds the state of the kernel. A plan is the difference between the two. Each
//! [`Op`] adds or removes one fact and therefore has an inverse. All of this is pure.
//!
//! Every operation is recorded in the [`Journal`] before it is performed. If an operation fails,
//! the previous ones are rolled back in reverse order. If the process is killed, the next process
//! finds the journal and does the same. Interfaces are identified by name *and* MAC address, which
//! are in the journal before the interface exists. An interface of another program with the same
//! name is therefore never touched.
//!
//! This crate does not handle published ports served in userspace, nor container processes: the
//! binary does.

#![forbid(unsafe_code)]

mod desired;
mod error;
mod fact;
mod firewall;
mod ipam;
mod isolation;
mod journal;
mod kernel;
mod kernel_model;
mod observed;
mod plan;
mod repair;
mod setup;

pub use desired::{
    Attachment, Desired, Endpoint, Guards, Network, Overlay, ReplyPath, Subnet, Uplink,
};
pub use error::{ApplyError, ConflictError, JournalError, KernelError};
pub use fact::{Fact, Interface, Op, Passes, Place, Reach, Rule};
pub use firewall::{
    Change, DockerUser, EvictedFlows, Firewall, FirewallKind, IptablesState, Opening, Ruleset,
    UPDATE_BOUNDS, Updates, UserRule, Zone,
};
pub use ipam::{Exhausted, Ipam, IpamError, Pools, QUARANTINE, capacity, gateway};
pub use isolation::{BridgePrograms, FirewallIsolation, Isolation, NatIsolation, RuleIsolation};
pub use journal::Journal;
pub use kernel::{EngineDevice, Kernel};
pub use kernel_model::KernelModel;
pub use observed::{DefaultRoute, Observed, ObservedBridge, ObservedLink};
pub use plan::{Plan, plan};
pub use repair::{RepairKind, Repaired};
pub use setup::{Setup, SetupError, Stop};
