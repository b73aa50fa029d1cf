//! Network namespaces: creation of sockets and policy routes inside, and information about their
//! network.
//!
//! A socket belongs to the namespace in which it was created, regardless of the process that holds
//! it. No part of tidegate therefore runs in a container: it creates sockets in the namespace of
//! the container and does ordinary I/O on them from one process:
//!
//! ```no_run
//! use std::{net::TcpListener, path::Path};
//! use tidegate_netns::Namespace;
//!
//! let container = Namespace::from_path(Path::new("/run/netns/blue"))?;
//! let listener = container.with(|| TcpListener::bind("127.0.0.11:53"))??;
//! let (connection, client) = listener.accept()?; // from a process in the container
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`Namespace`]: a handle, opened by path or PID. Runs code inside, reads and sets sysctls.
//! - [`AddressBook`]: current addresses, on-link subnets and routes of a namespace.
//! - [`HostContext`]: the namespaces of published ports and of networks.
//! - [`port_holders`]: the processes that hold a port.
//! - [`LocalPeers`]: user ID of a client on the same host.
//! - [`ChangeListener`]: change notifications.
//! - [`PolicyRoute`]: rules, routes and sysctls that are reverted on drop, or by a later process if
//!   the owner was killed ([`sweep()`]).
//!
//! The API is synchronous. Entering and leaving a namespace takes about 5 µs, and the kernel
//! processes netlink requests synchronously. Small programs such as the docker-proxy replacement
//! can thus use this crate without an async runtime.
//!
//! Entering a namespace requires root, or membership in the user namespace that owns it. An
//! unprivileged process creates a user namespace ([`become_root_of_a_user_namespace`]) and stays in
//! the host's network namespace. Its threads cannot return to the host's network namespace once
//! they have left it. A thread in the host's namespace therefore delegates to a temporary thread
//! ([`Namespace::with`]), and a thread that enters often moves inside permanently
//! ([`Namespace::enter`]).

#[cfg(not(target_os = "linux"))]
compile_error!("network namespaces exist on Linux only");

mod addresses;
mod background;
mod change_listener;
mod family;
mod handle;
mod host_context;
mod local_peer;
mod lock;
mod netlink;
mod policy_route;
pub mod port_holders;
mod routes;
mod run_directory;
mod system;
mod user;

pub use addresses::AddressBook;
pub use background::drop_in_background;
pub use change_listener::{ChangeListener, Topic};
pub use family::{Families, Family};
pub use handle::{Namespace, NamespaceId, OpenError};
pub use host_context::{HostContext, HostContextError};
pub use local_peer::LocalPeers;
pub use lock::{Lock, lock_file};
pub use policy_route::{
    MAX_SELECTORS, PolicyRoute, PolicyRouteError, Restored, Route, Selector, Steered, Sysctl,
    policy_route_sysctls_hold, repair_policy_routes, sweep, sweep_in,
};
pub use run_directory::run_directory;
pub use system::interface_index;
pub use user::{
    become_root_of_a_user_namespace, is_own_user_namespace, is_privileged, join_user_namespace,
};
