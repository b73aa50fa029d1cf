//! Published ports: forwarding of TCP and UDP from ports of the host to ports of containers.
//!
//! The [`Engine`] runs a few event loops (`tidegate_reactor`), each with its part of the ports,
//! connections and UDP sessions. Loops share only counters and the table of client shares. An
//! [`Upstream`] opens the connection to a backend, so this crate does not depend on networks,
//! namespaces or containers.
//!
//! Guarantees, all covered by tests:
//! - Half-close, reset, refusal and backpressure of one side are visible to the other. Bytes are
//!   never lost, reordered or added, and an aborted connection never appears complete.
//! - Every table, queue and buffer has a limit. At the limit the largest holder is evicted and
//!   counted, and all others are served.
//! - Publishing or closing a port does not affect the flows of other ports.
//!
//! TCP is in [`tcp`], UDP in [`udp`]; the documentation of both starts with a theory of operation.

#![forbid(unsafe_code)]

mod config;

#[doc(hidden)]
pub mod bench_support;
mod cpu_meter;
mod engine;
mod gateway_acl;
mod listener;
mod metrics;
mod port;
pub mod proxy_protocol;
mod shared;
mod side;
pub mod tcp;
pub mod udp;
mod upstream;
mod worker;

pub use config::{PortOptions, Settings};
pub use engine::{Drained, Engine, PublishedPort};
pub use gateway_acl::{Bridge, ForeignNetwork, GatewayAcl, GatewayNetwork, GatewayNetworks};
pub use listener::{AdoptError, BindError, Listener};
pub use metrics::{
    EngineUsage, FAMILIES, PortSnapshot, SeriesLabel, USAGE_FAMILIES, describe, describe_engine,
};
pub use port::{DropReason, Refusal};
pub use proxy_protocol::ProxyProtocol;
pub use tidegate_reactor::{Permit, UDP_BUFFER, UNREAD_BYTES, is_exhaustion};
pub use udp::session_table::TableLimits;
pub use upstream::{
    BackendId, DialFailure, Direct, Flow, Lease, Opened, Upstream, has_lost_local_address, socket,
};
