//! The `slirp4netns` binary, driven as by rootless engines, and by these engines themselves.
//!
//! An ordinary user (nobody) starts it on a host created by the test, for containers in user
//! namespaces. `rootlesskit.rs` and `podman.rs` use the real callers, and `side_by_side.rs`
//! compares it with the real slirp4netns.

#[path = "slirp4netns/command_line.rs"]
mod command_line;
#[path = "slirp4netns/ending.rs"]
mod ending;
#[path = "slirp4netns/layer2.rs"]
mod layer2;
#[path = "slirp4netns/podman.rs"]
mod podman;
#[path = "slirp4netns/ports.rs"]
mod ports;
#[path = "slirp4netns/rootlesskit.rs"]
mod rootlesskit;
#[path = "slirp4netns/sandbox.rs"]
mod sandbox;
#[path = "slirp4netns/scene.rs"]
mod scene;
#[path = "slirp4netns/side_by_side.rs"]
mod side_by_side;
#[path = "slirp4netns/traffic.rs"]
mod traffic;
