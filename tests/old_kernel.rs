//! The UDP tests with all probed kernel features disabled, as on the oldest supported kernel. TCP
//! probes for no feature.

#[path = "udp.rs"]
mod udp;
