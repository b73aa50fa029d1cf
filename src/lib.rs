//! What tidegate's binaries are made of: command line, drop-in personalities, and the wiring
//! between the crates.
//!
//! This is no library for others; it is one so that `tidegate`, `docker-proxy` and the tests share
//! it.

mod api;
mod bind;
pub mod cli;
pub mod client_address;
pub mod compat;
pub mod compose;
mod confine;
pub mod doctor;
pub mod firewall;
#[doc(hidden)]
pub mod fuzz;
pub mod host_context;
pub mod limits;
pub mod logging;
pub mod metrics_endpoint;
mod nat_publish;
pub mod port_error;
mod port_guards;
mod port_holders;
mod publisher;
pub mod services;
mod table;
mod top;
pub mod up;
pub mod version;

/// What a failed command exits with.
pub const EXIT_FAILURE: u8 = 1;

/// What a command line that was not understood exits with.
pub const EXIT_USAGE: u8 = 2;
