//! The words every tidegate crate speaks: what a published port is, what a flow is, which addresses
//! a list allows, and which marks, tables, priorities and names tidegate claims on a host.
//!
//! Everything here is a value or a pure function of values. There are no sockets, files, clocks,
//! random numbers or name look-ups, and no configuration formats: a front end (the command line, a
//! Compose file, the API) turns its input into these types, and everything below works with nothing
//! else.
//!
//! | module | answers |
//! |---|---|
//! | [`Protocol`] | which transports can be published |
//! | [`PortSpec`] | what `-p 127.0.0.1:8080-8082:80-82/udp` means, and whether two of them collide |
//! | [`FlowKey`], [`PublishLabel`] | how one conversation, and one published socket, is named |
//! | [`Ingress`] | by which interface, and to which address, a client came |
//! | [`share_of`], [`may_take`], [`Ranking`] | whose share of a limit a client's address counts to, how much a holder may take, who holds most |
//! | [`Histogram`] | how often something took how long |
//! | [`LogInterval`] | whether the log tells of an event that repeats itself |
//! | [`CidrSet`] | whether an address is in an allow-list |
//! | [`Feature`] | what a kernel may not have, or be taken not to have |
//! | [`registry`] | what tidegate claims on the host, and whom it avoids |

mod cidr_set;
pub mod feature;
mod flow_key;
#[doc(hidden)]
pub mod fuzz;
mod histogram;
mod ingress;
mod log_interval;
mod port_mapping;
mod protocol;
pub mod registry;
mod share;

pub use cidr_set::{CidrSet, CidrSetError};
pub use feature::{Feature, LACKS};
pub use flow_key::{FlowKey, PublishLabel, PublishLabelError, canonical};
pub use histogram::{Histogram, HistogramReading};
pub use ingress::Ingress;
pub use log_interval::LogInterval;
pub use port_mapping::{
    HostPort, HostPorts, OverlapError, PortMapping, PortRange, PortSide, PortSpec, PortSpecError,
    PortSpecProblem, host_addresses, overlap,
};
pub use protocol::{Protocol, UnknownProtocol};
pub use share::{Ranking, may_take, share_of};
