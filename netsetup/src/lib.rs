//! Container networks: bridges, endpoints, isolation.
//!
//! # Theory of operation
//!
//! ```text
//! Desired ──facts──►┐
//!                   ├─► plan ──► [Op, Op, …] ──► apply ──► observe again: an empty plan
//! Observed ────────►┘                              │
//!                                               journal
//! ```
//!
//! What a network needs of the kernel is a list of [`Fact`]s: there is a bridge of this name, that
//! address is on it, this rule is in force. [`Desired`] renders into facts in the order in which
//! they can be made; [`Observed`] is what the kernel has. Planning is the difference of the two,
//! and an [`Op`] adds a fact or removes one, so that each has its inverse. All of that is pure.
//!
//! Applying writes every operation into the [`Journal`] before it does it. Fails one, those before
//! it are undone in reverse; is the process killed, the next one finds the journal and does the
//! same. What is removed is recognised by its name *and* its hardware address, both of which are in
//! the journal before the interface is there: an interface that someone else has made under our
//! name is never touched.
//!
//! This crate knows no published ports and no container processes: those are the binary's.

mod desired;
mod error;
mod fact;
mod firewall;
mod ipam;
mod isolation;
mod journal;
mod kernel;
mod mac;
mod observed;
mod plan;
mod repair;
mod setup;
mod world;

pub use desired::{Attachment, Desired, Endpoint, Guards, Network, ReplyPath, Subnet, Uplink};
pub use error::{ApplyError, ConflictError, JournalError, KernelError};
pub use fact::{Fact, Interface, Op, Passes, Place, Reach, Rule};
pub use firewall::{
    Change, DockerUser, Firewall, FirewallKind, IptablesState, Opening, Ruleset, UPDATE_BOUNDS,
    Updates, UserRule, Zone,
};
pub use ipam::{Exhausted, Ipam, IpamError, Pools, QUARANTINE, capacity, gateway};
pub use isolation::{FirewallIsolation, Isolation, NatIsolation, RuleIsolation};
pub use journal::Journal;
pub use kernel::{EngineDevice, Kernel};
pub use mac::Mac;
pub use observed::{DefaultRoute, Observed, ObservedBridge};
pub use plan::{Plan, plan};
pub use repair::{RepairKind, Repaired};
pub use setup::{Setup, SetupError};
pub use world::World;
