//! A network namespace as a factory: of sockets, of policy routes, and of knowledge about its
//! network.
//!
//! A socket belongs to the namespace it was made in, for life, whoever holds it. So no part of
//! tidegate lives in a container. It asks for what it needs to be made there, and then does
//! ordinary I/O from one process:
//!
//! ```no_run
//! use std::{net::TcpListener, path::Path};
//! use tidegate_netns::Namespace;
//!
//! let container = Namespace::from_path(Path::new("/run/netns/blue"))?;
//! let listener = container.with(|| TcpListener::bind("127.0.0.11:53"))??;
//! let (connection, client) = listener.accept()?; // of a process in the container
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`Namespace`]: a handle by path or process; makes things inside, reads and sets sysctls.
//! - [`AddressBook`]: which addresses are the namespace's own, which are its neighbours, where its
//!   packets go; always current.
//! - [`LocalPeers`]: the user of a client on this host.
//! - [`ChangeListener`]: word that something has changed.
//! - [`PolicyRoute`]: rules, routes and sysctls as one value that takes all of them back when it
//!   goes, and that is cleaned up after when its process was killed ([`sweep()`]).
//!
//! Everything is synchronous. Going into a namespace and back takes some 5 µs, the kernel answers
//! netlink requests at once, and programs as small as the docker-proxy drop-in link this crate
//! without a runtime.
//!
//! Entering takes root, or a user namespace that owns the namespace to enter. An ordinary user has
//! one made ([`become_root_of_a_user_namespace`]) and stays in the host's network. Its threads find
//! no way back there once they have entered another namespace, so those that come from the host
//! send one of their own ([`Namespace::with`]), and those that enter often live inside from the
//! start ([`Namespace::enter`]).

#[cfg(not(target_os = "linux"))]
compile_error!("network namespaces exist on Linux only");

mod addresses;
mod change_listener;
mod elsewhere;
mod family;
mod handle;
mod local_peer;
mod lock;
mod netlink;
mod policy_route;
mod routes;
mod run_directory;
mod system;
mod user;

pub use addresses::AddressBook;
pub use change_listener::{ChangeListener, Topic};
pub use elsewhere::drop_elsewhere;
pub use family::{Families, Family};
pub use handle::{Namespace, NamespaceId, OpenError};
pub use local_peer::LocalPeers;
pub use lock::{Lock, lock_file};
pub use policy_route::{
    MAX_SELECTORS, PolicyRoute, PolicyRouteError, Restored, Selector, Steered, Sysctl,
    policy_route_sysctls_hold, repair_policy_routes, sweep, sweep_in,
};
pub use run_directory::run_directory;
pub use system::interface_index;
pub use user::{become_root_of_a_user_namespace, is_privileged, join_user_namespace};
