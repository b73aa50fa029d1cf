//! The API of `tidegate up` as its clients see it: HTTP and JSON on a Unix socket.
//!
//! The types are not used internally, so that internal types can change independently.

#![forbid(unsafe_code)]

pub mod client;
pub mod socket;
pub mod types;
