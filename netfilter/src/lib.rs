//! Interface to the kernel's packet filter. nftables tables are plain values: they can be printed
//! in the syntax of nft(8) and committed to the kernel.
//!
//! ```text
//! Table ──Display──► text in the syntax of nft(8)
//!      └──Change───► netlink messages ──► one atomic transaction
//! ```
//!
//! The crate talks nfnetlink directly and needs neither the `nft` program nor a C library. Their
//! versions in current distributions do not support tables that are [owned](Change::Replace) by a
//! connection and persist after it closes; the crate does. It has no notion of networks or
//! containers: the caller decides the contents of a table.
//!
//! BPF programs complement the tables, because a ruleset flush does not remove them: a [`Gate`] at
//! the egress of a bridge, after the firewall, and [`PortGuards`] at the ingress of the bridge
//! ports, before all other processing. [`ReplySteering`] after a port guard returns replies to the
//! ingress sandbox of a routing mesh.

mod bpf;
mod connection;
mod conntrack;
mod encode;
mod expression;
mod frames;
mod gate;
mod guard;
mod identity;
mod source_guard;
mod steering;
mod table;
mod text;
mod vxlan_guard;
mod wire;

pub use connection::{Change, Connection, Error, Listed, ListedRule, TableFamily};
pub use conntrack::{Conntrack, Entry, EntryKey, Flow, TIMESTAMPS};
pub use frames::FrameGuard;
pub use gate::{Gate, GatePolicy};
#[doc(hidden)]
pub use gate::{count_programs, detach_programs};
#[doc(hidden)]
pub use guard::program_time;
pub use guard::{
    BridgeGuard, BridgePolicy, Dropped, Mechanism, PortGuards, PortPolicy, SpoofReason,
};
pub use identity::TableIdentity;
pub use source_guard::{OwnAddresses, SourceGuard};
pub use steering::{FLOWS, ReplySteering, Sandboxes};
pub use table::{
    Action, Base, Chain, Element, Field, Hook, Key, Kind, Match, Rule, Set, Table, Transport, Value,
};
pub use vxlan_guard::{VxlanFact, VxlanGuard};
