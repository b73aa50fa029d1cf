//! Servers in namespaces, with real clients, and other servers that this test plays.
//!
//! Nothing leaves the namespaces that are made here: each has its loopback interface, and links to
//! others of them where a test says so.

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
