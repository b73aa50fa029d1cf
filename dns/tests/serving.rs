//! Servers in namespaces, with real clients and simulated upstream servers.
//!
//! No traffic leaves the namespaces of these tests. Each has a loopback interface, and links to
//! other test namespaces where needed.

#[path = "serving/abuse.rs"]
mod abuse;
#[path = "serving/churn.rs"]
mod churn;
#[path = "serving/docker.rs"]
mod docker;
#[path = "serving/gateway.rs"]
mod gateway;
#[path = "serving/listening.rs"]
mod listening;
#[path = "serving/programs.rs"]
mod programs;
#[path = "serving/protocol.rs"]
mod protocol;
#[path = "serving/shares.rs"]
mod shares;
#[path = "support/mod.rs"]
mod support;
#[path = "serving/upstreams.rs"]
mod upstreams;
