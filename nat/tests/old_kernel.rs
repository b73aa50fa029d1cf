//! Runs the tests with real kernels again, with all optional features forced off, as on the oldest
//! supported kernel.

#![allow(
    clippy::duplicate_mod,
    reason = "each module includes `common`, as in its own test binary"
)]

#[path = "bridge.rs"]
mod bridge;
mod common;
#[path = "network.rs"]
mod network;
#[path = "published.rs"]
mod published;
#[path = "tcp.rs"]
mod tcp;

#[test]
fn no_optional_feature_is_used() {
    assert_eq!(common::Net::new().nat.capabilities(), tidegate_nat::Capabilities::NONE);
}
