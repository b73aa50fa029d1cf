//! Who the container says its client is: `tidegate publish --source` on a small network of real
//! kernels.
//!
//! `docs/source-address.md` has the promises; these tests hold the binary to each of them. Every
//! test has an outside client, a host, a container and its neighbour in namespaces of its own
//! (`source/scene.rs`). In the container reverse path filters are strict throughout, and its
//! servers listen in each way there is: on its addresses, on the wildcard of each family, and on
//! both families at once.

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
