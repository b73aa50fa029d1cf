//! What tidegate's binaries are made of: command line, drop-in personalities, and the wiring
//! between the crates.
//!
//! This is no library for others; it is one so that `tidegate`, `docker-proxy` and the tests share
//! it.

mod api;
pub mod cli;
pub mod doctor;
#[doc(hidden)]
pub mod fuzz;
mod port_guards;
mod table;
mod top;
pub mod up;
