//! The kernel's packet filter: tables of nftables as values, which are written down for people and
//! sent to the kernel.
//!
//! ```text
//! Table ──Display──► what nft(8) reads and lists
//!      └──Change───► messages ──► one transaction: all of it, or nothing
//! ```
//!
//! It speaks to the kernel itself (nfnetlink), needs neither the program `nft` nor a C library, and
//! can do what they cannot yet everywhere: tables that [belong](Change::Replace) to a connection
//! and outlast it. It knows nothing of networks or containers. What a table says is the business of
//! who makes it.
//!
//! Beside the tables, where no flush reaches them, are BPF programs: a [`Gate`] at the egress of a
//! bridge, behind the firewall, and [`PortGuards`] at the ingress of its ports, before everything
//! else.

mod bpf;
mod connection;
mod conntrack;
mod encode;
mod expression;
mod gate;
mod guard;
mod identity;
mod socket;
mod table;
mod text;
mod wire;

pub use connection::{Change, Connection, Error, Listed, TableFamily};
pub use conntrack::{Conntrack, Flow};
pub use gate::{Gate, GatePolicy};
#[doc(hidden)]
pub use gate::{count_programs, detach_programs};
#[doc(hidden)]
pub use guard::program_time;
pub use guard::{Dropped, InternalGuard, Mechanism, PortGuards, PortPolicy, SpoofReason};
pub use identity::TableIdentity;
pub use table::{
    Action, Base, Chain, Element, Field, Hook, Key, Kind, Match, Rule, Set, Table, Transport, Value,
};
