//! The network namespaces of this process: the one in which it publishes ports, and the one of its
//! networks.
//!
//! | started by | published ports | bridges and rules | threads of the data plane |
//! |---|---|---|---|
//! | root | the namespace of the host, in which it was started | the same | the same |
//! | an ordinary user | the namespace of the host | a new one, in a new user namespace | in the new one |
//!
//! A socket belongs to the namespace in which it was created, regardless of the thread that accepts
//! from it. One process is therefore enough without root too: its listening sockets are in the
//! namespace of the host, and the threads that connect to containers are in the new one.
//!
//! Without root, each service has a user namespace of its own, a child of the new one. It owns only
//! the network namespace of the service.

use crate::{Namespace, become_root_of_a_user_namespace, is_privileged};
use rustix::io::Errno;
use std::io;

/// A namespace cannot be created or opened.
#[derive(Debug, thiserror::Error)]
pub enum HostContextError {
    /// The network namespace of this process cannot be opened.
    #[error("network namespace of this process: {0}")]
    Current(io::Error),
    /// A network namespace cannot be created.
    #[error("make a network namespace: {0}")]
    Network(io::Error),
    /// A user namespace cannot be created.
    #[error("make a user namespace: {error}: {remedy}", error = source)]
    UserNamespace {
        /// The error of the kernel.
        source: io::Error,
        /// What the administrator can change.
        remedy: &'static str,
    },
}

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct HostContext {
    ports: Namespace,
    networks: Namespace,
}

impl HostContext {
    /// Ports and networks in the current namespace.
    ///
    /// # Errors
    /// If `/proc` is not mounted, or no file descriptor is left.
    pub fn here() -> io::Result<Self> {
        let here = Namespace::current()?;
        Ok(Self { ports: here.clone(), networks: here })
    }

    /// Ports in the current namespace, and networks in the same if this process may create them
    /// there. Otherwise this makes the process root of a new user namespace, and the networks are
    /// in a new network namespace. Must be called while the process has a single thread.
    ///
    /// # Errors
    /// One line with the setting of the host that prevents this.
    pub fn for_networks() -> Result<Self, HostContextError> {
        let here = Self::here().map_err(HostContextError::Current)?;
        if Namespace::current_is_enterable() {
            return Ok(here);
        }
        if !is_privileged() {
            become_root_of_a_user_namespace().map_err(explain)?;
        }
        let networks = Namespace::create().map_err(HostContextError::Network)?;
        Ok(Self { networks, ..here })
    }

    /// Creates a network namespace for a service. Without root, it belongs to a user namespace of
    /// its own, so that root in the service has no capability over the namespace of the bridges.
    /// The veth pair of the service reveals the ID of that namespace (`IFLA_LINK_NETNSID`), and a
    /// process with `CAP_NET_ADMIN` over it can create links there that bypass all guards.
    ///
    /// # Errors
    /// One line with the setting of the host that prevents this.
    pub fn create_for_service(&self) -> Result<Namespace, HostContextError> {
        if !self.is_rootless() {
            return Namespace::create().map_err(HostContextError::Network);
        }
        Namespace::create_in_user_namespace().map_err(explain)
    }

    /// The namespace in which ports are published.
    #[must_use]
    pub fn ports(&self) -> &Namespace {
        &self.ports
    }

    /// The namespace of the bridges.
    #[must_use]
    pub fn networks(&self) -> &Namespace {
        &self.networks
    }

    /// Whether the networks are in another namespace than the published ports.
    #[must_use]
    pub fn is_rootless(&self) -> bool {
        self.ports.id() != self.networks.id()
    }
}

fn explain(source: io::Error) -> HostContextError {
    let remedy = match Errno::from_io_error(&source) {
        Some(Errno::NOSPC) => {
            "the limit of the host is reached; raise the sysctls user.max_user_namespaces and \
             user.max_net_namespaces"
        }
        Some(Errno::PERM | Errno::ACCESS) => {
            "the host denies them to ordinary users; set the sysctl that exists, \
             kernel.unprivileged_userns_clone=1 or \
             kernel.apparmor_restrict_unprivileged_userns=0, or run as root"
        }
        _ => "run as root",
    };
    HostContextError::UserNamespace { source, remedy }
}
