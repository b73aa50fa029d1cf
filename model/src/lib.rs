//! Types shared by all tidegate crates: published ports, flows, address lists, and the marks,
//! tables, priorities and names that tidegate claims on a host.
//!
//! The crate contains values and pure functions of values. It has no sockets, files, clocks, random
//! numbers or name resolution, and no configuration formats. A front end (the command line, a
//! Compose file, the API) converts its input to these types, and the other crates use only these
//! types.
//!
//! | item | purpose |
//! |---|---|
//! | [`Protocol`] | transports that can be published |
//! | [`PortSpec`] | parses `-p 127.0.0.1:8080-8082:80-82/udp` and detects conflicts |
//! | [`FlowKey`], [`PublishLabel`] | identify a flow and a published socket |
//! | [`Direction`], [`PerDirection`] | direction of payload, and values for each |
//! | [`Ingress`] | ingress interface and destination address of a client |
//! | [`share_of`], [`may_take`], [`Ranking`] | share of a limit that a client address counts against, size of a share, largest holder |
//! | [`Histogram`] | distribution of durations |
//! | [`exposition`] | writes metric families in the text format of Prometheus |
//! | [`LogInterval`] | rate limit for log events |
//! | [`CidrSet`] | address allow-list |
//! | [`MacAddress`] | address of a link |
//! | [`Restart`] | restart policy of a service |
//! | [`bracketed`], [`without_errno`] | addresses and kernel errors in messages |
//! | [`Feature`] | kernel features that are optional, and their overrides |
//! | [`validity`] | rules for subnets, addresses, and names of interfaces, hosts and objects |
//! | [`registry`] | identifiers that tidegate claims on the host, and the ranges of other software that it avoids |

#![forbid(unsafe_code)]

mod cidr_set;
mod direction;
mod error_text;
pub mod exposition;
pub mod feature;
mod flow_key;
#[doc(hidden)]
pub mod fuzz;
mod histogram;
mod ingress;
mod log_interval;
mod mac_address;
mod port_mapping;
mod protocol;
pub mod registry;
mod restart;
mod share;
pub mod validity;

pub use cidr_set::{CidrSet, CidrSetError};
pub use direction::{Direction, PerDirection};
pub use error_text::{bracketed, without_errno};
pub use feature::{Feature, LACKS};
pub use flow_key::{FlowKey, PublishLabel, PublishLabelError, canonical};
pub use histogram::{Histogram, HistogramReading};
pub use ingress::{Ingress, LOOPBACK_INDEX};
pub use log_interval::LogInterval;
pub use mac_address::{MacAddress, ParseMacAddressError};
pub use port_mapping::{
    HostPort, HostPorts, OverlapError, PortMapping, PortRange, PortSide, PortSpec, PortSpecError,
    PortSpecProblem, host_addresses, overlap,
};
pub use protocol::{Protocol, UnknownProtocol};
pub use restart::Restart;
pub use share::{Ranking, may_take, share_of};
