//! The tests with real kernels once more, with everything forced off that is probed for: as on the
//! oldest kernel there may be.

#![allow(clippy::duplicate_mod, reason = "each of them has `common`, as it has on its own")]

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
fn nothing_is_used_that_an_old_kernel_has_not() {
    assert_eq!(common::Net::new().nat.capabilities(), tidegate_nat::Capabilities::NONE);
}
