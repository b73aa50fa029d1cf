//! The source address that the container sees: `tidegate publish --source` on a small network of
//! real kernels.
//!
//! These tests check each guarantee of `docs/source-address.md`. Every test has an outside client,
//! a host, a container and its neighbour in their own namespaces (`source/scene.rs`). Reverse path
//! filters are strict in the container. Its servers listen on its addresses, on the wildcard of
//! each family, and on a dual-stack wildcard.

#[path = "source/ask.rs"]
mod ask;
#[path = "source/beside.rs"]
mod beside;
#[path = "source/fallback.rs"]
mod fallback;
#[path = "source/flows.rs"]
mod flows;
#[path = "source/header.rs"]
mod header;
#[path = "source/peers.rs"]
mod peers;
#[path = "source/privilege.rs"]
mod privilege;
#[path = "source/scene.rs"]
mod scene;
#[path = "source/traces.rs"]
mod traces;
