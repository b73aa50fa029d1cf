//! The code of the binaries: the command line, the replacements for docker-proxy and slirp4netns,
//! and the wiring between the crates.
//!
//! It is a library so that the binaries and the tests share it, and has no stable interface.

mod api;
pub mod cli;
pub mod doctor;
#[doc(hidden)]
pub mod fuzz;
pub mod instance;
mod port_guards;
mod service_manager;
mod table;
mod top;
