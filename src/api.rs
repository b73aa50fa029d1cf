//! The API of `tidegate up`: HTTP and JSON on a Unix socket.
//!
//! ```text
//! client ─► socket (0600) ─► server: one request a connection, bounded ─► routes ─► view ─► publisher, services' states
//!                                                                           │
//!                                                     networks: an order to the task that makes them
//! ```
//!
//! What is asked is answered from what the parts of the project know; ports come and go in the
//! publisher. Networks have one task that changes them, which gets orders and carries each out to
//! its end, also when the client has gone meanwhile.
//!
//! The types of the API are in [`types`] and are used for nothing else, so that what is inside may
//! change without them. The OpenAPI document is made of them and of the routes; `docs/openapi.json`
//! is a copy, which a test compares.

pub(crate) mod client;
mod problem;
mod routes;
mod server;
pub(crate) mod socket;
pub(crate) mod types;
mod view;

pub(crate) use problem::Problem;
pub(crate) use server::{MAX_CLIENTS, Server};
pub(crate) use view::{Adopted, Order, View};
