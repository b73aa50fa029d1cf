//! DNS server for the containers of a network, at 127.0.0.11 in each of them.
//!
//! # Theory of operation
//!
//! ```text
//! namespace of the container       namespace of the host
//! 127.0.0.11:53 ─nftables─► socket ─┬─► resolve ─► zones: names on the client's networks ─► response
//!                                   │       │ other names
//!                                   │       ▼
//!                                   │     cache ─► pending ─► upstream servers of the container, the
//!                                   │       │                 network or the host
//!                                   ◄───────┘
//! ```
//!
//! Responses of upstream servers are shared only between clients on exactly the same networks
//! (`partition`). Clients on other networks thus cannot observe, by response time or TTL, which
//! names were queried.
//!
//! A [`Resolver`] holds networks and endpoints. [`Resolver::serve`] creates two sockets in the
//! namespace of a container; both stay in this process. The socket that receives a query identifies
//! the container, and the networks of the container determine which names it can resolve
//! ([`zone`]). Other names are forwarded to upstream servers ([`upstream`], [`forward`]) from the
//! namespace of the host. One process serves thousands of containers: a server costs its two
//! sockets and two tasks.
//!
//! Forwarding is scheduled round robin between endpoints, each with a rate limit (`scheduler`).
//! When a limit is reached, the largest holder loses its oldest query (`pending`). Local names and
//! cached responses are not scheduled.
//!
//! Pure modules (no socket, clock or runtime): `name`, `message`, `non_query`, `zone`, `partition`,
//! `resolve`, `answer`, `cache`, `scheduler`, `pending`, `upstream`, `servers`, `resolv_conf`.
//!
//! # Hickory
//!
//! hickory-server parses and answers messages other than plain queries, and the decoder of hickory
//! validates upstream responses. The serving loop is implemented here. That of hickory creates a
//! task per datagram and a channel for its response, limits neither tasks nor TCP clients, and logs
//! names at INFO. Queries per second for local names on one core, measured with dnsperf on a second
//! core: an echo of the datagram 190,000, hickory-server 157,000, dnsmasq 154,000, aardvark-dns
//! 91,000. The remaining cost is in the kernel. Receiving and sending batches per system call
//! reduces it. docs/dns.md has the figures of this crate.

#[cfg(not(target_os = "linux"))]
compile_error!("network namespaces exist on Linux only");

mod answer;
mod cache;
mod client_id;
mod error;
mod forward;
pub mod fuzz;
mod handler;
mod message;
mod metrics;
mod name;
mod non_query;
mod partition;
mod pending;
mod resolv_conf;
mod resolv_conf_watch;
mod resolve;
mod resolver;
mod scheduler;
mod server;
mod servers;
mod shared;
mod upstream;
mod zone;

pub use client_id::ClientId;
pub use error::{ServeError, StartError, ZoneError};
pub use metrics::{FAMILIES, Questions, USAGE_FAMILIES, Upstream, Usage};
pub use name::NameError;
pub use resolv_conf::{PORT, ResolvConf, SERVER};
pub use resolv_conf_watch::{REST, Watch, servers};
pub use resolver::{Resolver, ResolverSettings, ServeOptions};
pub use server::{Listen, Serving};
pub use zone::{EndpointSpec, Limits, NetworkSpec};
