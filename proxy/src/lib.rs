//! Published ports: what arrives at a port of the host is carried to a port of a container.
//!
//! The [`Engine`] runs a few event loops (`tidegate_reactor`), each with its share of the ports,
//! connections and UDP sessions; nothing is shared between loops but counters and the book of
//! shares. Where a flow goes says an [`Upstream`], so this crate knows neither networks nor
//! namespaces nor containers.
//!
//! What it promises, each under test:
//! - What one side does the other sees: half-close, reset, refusal, backpressure. Bytes are never
//!   lost, reordered or invented, and a cut connection never looks complete.
//! - Every table, queue and buffer has a limit. At the limit the largest holder yields, which is
//!   counted, and the others are served.
//! - Ports come and go without disturbing other ports' flows.
//!
//! TCP is in [`tcp`], UDP in [`udp`]; both begin with a theory of operation.

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
pub mod tcp;
pub mod udp;
mod upstream;
mod worker;

pub use config::{PortOptions, Settings};
pub use engine::{Drained, Engine, PublishedPort};
pub use gateway_acl::{Bridge, ForeignNetwork, GatewayAcl, GatewayNetwork, GatewayNetworks};
pub use listener::{AdoptError, BindError, Listener, UDP_BUFFER, UNREAD_BYTES};
pub use metrics::{FAMILIES, FILL_FAMILIES, Family, Fill, Kind, PortSnapshot, Whose, describe};
pub use port::{Direction, Drop, Refusal};
pub use proxy_protocol::ProxyProtocol;
pub use tidegate_reactor::Permit;
pub use udp::session_table::TableLimits;
pub use upstream::{
    Direct, Flow, Lease, Opened, Upstream, has_lost_its_address, is_exhaustion, socket,
};
