//! The kernel's packet filter: tables of nftables as values, which are written down for people and sent to the kernel.
//!
//! It knows nothing of networks or containers. What a table says is the business of who makes it.

mod table;

pub use table::{
    Action, Base, Chain, Element, Field, Hook, Key, Kind, Match, Rule, Set, Table, Transport, Value,
};
