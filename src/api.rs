//! The API of `tidegate up`: HTTP and JSON on a Unix socket.
//!
//! ```text
//! client ─► socket (0600) ─► server: one request per connection, bounded ─► routes ─► view
//!                                                                                       │
//!                                   publisher, service states ◄─────────────────────────┤
//!                                   networks: an order to the task that changes them ◄──┘
//! ```
//!
//! Handlers answer queries from the state of the running project; the publisher adds and removes
//! ports. A single task changes the networks. It carries out one order at a time to the end, even
//! if the client disconnects.
//!
//! The types of the API are in [`tidegate_api::types`] and are not used internally, so that
//! internal types can change independently. The OpenAPI document is generated from them and from
//! the routes. `docs/openapi.json` is a copy; a test compares the two.

mod events;
mod json_lines;
mod long_running;
mod mesh;
mod problem;
mod projects;
mod projects_view;
mod request;
mod reserve;
mod routes;
mod server;
mod service;
mod services;
mod view;

pub(crate) use problem::{Problem, blocking};
pub(crate) use projects_view::{ProjectOrder, ProjectsView, Supervised};
pub(crate) use reserve::{Reserved, label_of, reserve_port};
pub(crate) use server::{MAX_CLIENTS, Server};
pub(crate) use view::{Adopted, Order, View, snapshot};
