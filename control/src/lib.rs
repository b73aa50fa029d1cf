//! The desired state of the networks of a host: its only owner, the commands that change it, and
//! the store that keeps it.
//!
//! # Theory of operation
//!
//! ```text
//!   Command ──►┐                       ┌──► Store::commit: durable before the answer
//!              ├─► apply ──► State ────┤
//!   State ────►┘   │                   ├──► changes(old, new): steps for the reconciler
//!                  ▼                   │
//!               Refusal                └──► snapshots for DNS, API and metrics
//! ```
//!
//! The state holds results, not wishes: [`apply`] chooses subnets, addresses, interface names and
//! MAC addresses, so the same state is applied again after a restart. `apply` and [`changes`] are
//! pure functions.
//!
//! | module | contents |
//! |---|---|
//! | `name` | [`Name`]: `name` or `project/name` |
//! | `state` | [`State`], [`Network`], [`Endpoint`], [`PublishedPort`], [`Project`] |
//! | `command` | [`Command`] and its specs |
//! | `apply` | [`apply`]: from a state and a command to the next state; the limits |
//! | `refusal` | [`Refusal`]: why a command was refused |
//! | `subnet` | validity of subnets, addresses and names |
//! | `quarantine` | [`Quarantine`]: choice of addresses, without recently released ones |
//! | `changes` | [`changes`]: the difference between two states, as ordered steps |
//! | `record` | the on-disk form of the state |
//! | `store` | [`Store`]: the database |

#![forbid(unsafe_code)]

mod apply;
mod changes;
mod command;
mod name;
mod quarantine;
mod record;
mod refusal;
mod state;
mod store;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use apply::{
    MAX_ALIASES, MAX_DNS_SERVERS, MAX_ENDPOINTS, MAX_ENDPOINTS_OF_NETWORK, MAX_NETWORKS,
    MAX_NETWORKS_OF_ENDPOINT, MAX_PORTS, MAX_PROJECTS, MESH_GATEWAY, MESH_SANDBOX, Surroundings,
    apply,
};
pub use changes::{Change, changes};
pub use command::{AttachSpec, Command, NetworkAttachment, NetworkSpec, ProjectSpec};
pub use name::{Name, NameError};
pub use quarantine::Quarantine;
pub use refusal::Refusal;
pub use state::{
    Endpoint, EtcdAccess, Membership, Network, Project, PublishedPort, Service, State, Task,
};
pub use store::{Store, StoreError};
