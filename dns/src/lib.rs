//! Names of containers: a DNS server for every network, at 127.0.0.11 in every container.
//!
//! # Theory of operation
//!
//! ```text
//! container's namespace            host's namespace
//! 127.0.0.11:53 ─nftables─► socket ─┬─► resolve ─► zones: names of the asker's networks ─► answer
//!                                   │       │ not ours
//!                                   │       ▼
//!                                   │     cache ─► flight ─► servers of the host, the network or the container
//!                                   ◄───────────────┘
//! ```
//!
//! What other servers say is kept apart for askers on different networks (`partition`), so that
//! none of them learns from an answer what others have asked.
//!
//! A [`Resolver`] knows networks and endpoints. [`Resolver::serve`] makes two sockets in a
//! container's namespace, which stay in this process; the socket identifies the container, and its
//! networks decide what it may be told ([`zone`]). What is not ours goes to other servers
//! ([`upstream`], [`forward`]), from the host's namespace. One process serves thousands of
//! containers: a server costs its sockets and two tasks.
//!
//! Endpoints take turns at being forwarded for, and each has a rate (`scheduler`); at a limit the
//! largest holder yields (`pending`). Names of containers and cached answers take no turn.
//!
//! What is pure has no socket, clock or runtime in it: `name`, `message`, `non_query`, `zone`,
//! `partition`, `resolve`, `answer`, `cache`, `scheduler`, `pending`, `upstream`, `servers`,
//! `resolv_conf`.
//!
//! # Hickory
//!
//! Messages that are no plain question are read and answered by hickory-server, and what other
//! servers answer is checked by hickory's decoder. The loop that serves is our own: hickory's makes
//! a task for each datagram and a channel for its answer, bounds neither tasks nor TCP clients, and
//! logs names at INFO. One core, local names, dnsperf on the other core: an echo of the question
//! without looking at it 190,000 a second, hickory-server 157,000, dnsmasq 154,000, aardvark-dns
//! 91,000. What is left is the kernel's, and a batch of questions for each system call is what
//! makes a difference to it. docs/dns.md has the figures of this crate.

#[cfg(not(target_os = "linux"))]
compile_error!("network namespaces exist on Linux only");

mod answer;
mod cache;
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
mod upstream;
mod zone;

pub use error::{ServeError, StartError, ZoneError};
pub use metrics::{FAMILIES, FILL_FAMILIES, Fill, Questions, Upstream};
pub use name::NameError;
pub use resolv_conf::{PORT, ResolvConf, SERVER};
pub use resolv_conf_watch::{REST, Watch, servers};
pub use resolver::{Resolver, ServeOptions, Settings};
pub use server::{Listen, Serving};
pub use zone::{Asker, EndpointSpec, Limits, NetworkSpec};
