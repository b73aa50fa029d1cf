//! A published port in front of several backends, over loopback: failover, hedged dials, and UDP
//! sessions that move.
//!
//! A backend that does not answer is a listener with a full backlog: the kernel drops the SYN of
//! the proxy and sends it again a second later.

#[path = "backends/failover.rs"]
mod failover;
#[path = "backends/hedging.rs"]
mod hedging;
#[path = "backends/scene.rs"]
mod scene;
#[path = "backends/sessions.rs"]
mod sessions;
#[path = "backends/stress.rs"]
mod stress;
