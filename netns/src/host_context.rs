//! The network namespaces of this process: that of the published ports and that of the bridges.
//!
//! | started by | published ports | bridges and rules | data plane threads |
//! |---|---|---|---|
//! | root | the host's namespace, in which it was started | the same | the same |
//! | an ordinary user | the host's namespace | a new one, owned by a new user namespace | the new one |
//!
//! A socket belongs to the namespace in which it was created, regardless of the thread that accepts
//! from it. A rootless instance therefore needs only one process: its listening sockets are in the
//! host's namespace, and the threads that connect to containers are in the new one.
//!
//! In a rootless instance, each service has its own user namespace, a child of the new one. It owns
//! only the network namespace of the service.

use crate::user::{is_own_user_namespace, join_user_namespace};
use crate::{Namespace, become_root_of_a_user_namespace, is_privileged};
use rustix::io::Errno;
use std::fs::File;
use std::io;

/// A failure to create or open the namespaces.
#[derive(Debug, thiserror::Error)]
pub enum HostContextError {
    /// The network namespace of this process cannot be opened.
    #[error("network namespace of this process: {0}")]
    Current(io::Error),
    /// A network namespace cannot be created.
    #[error("create a network namespace: {0}")]
    Network(io::Error),
    /// A user namespace cannot be created.
    #[error("create a user namespace: {error}: {remedy}", error = source)]
    UserNamespace {
        /// Error code of the kernel.
        source: io::Error,
        /// Settings that the administrator can change.
        remedy: &'static str,
    },
}

/// The namespaces of the published ports and of the bridges; see the [module](self).
#[derive(Clone, Debug)]
pub struct HostContext {
    ports: Namespace,
    networks: Namespace,
}

impl HostContext {
    /// Uses the current namespace for published ports and networks.
    ///
    /// # Errors
    /// `/proc` is not mounted, or the process is out of file descriptors.
    pub fn here() -> io::Result<Self> {
        let here = Namespace::current()?;
        Ok(Self { ports: here.clone(), networks: here })
    }

    /// Uses the current namespace for published ports, and for networks as well if this process may
    /// create them there. Otherwise, this process becomes root of a new user namespace, and the
    /// networks are in a new network namespace. Must be called while the process is
    /// single-threaded.
    ///
    /// # Errors
    /// One line that names the cause and, for user namespaces, the host settings to change.
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

    /// Uses the current namespace for published ports, and `networks`, which was created by another
    /// process, for networks. This process becomes root of the user namespace `user`, unless it is
    /// a member. Must be called while the process is single-threaded.
    ///
    /// # Errors
    /// `EPERM` if `user` belongs to another user.
    pub fn joining(user: &File, networks: Namespace) -> io::Result<Self> {
        let here = Self::here()?;
        if !is_own_user_namespace(user)? {
            join_user_namespace(user)?;
        }
        Ok(Self { networks, ..here })
    }

    /// Creates a network namespace for a service. In a rootless instance it is owned by a user
    /// namespace of its own, so that root in the service has no capability over the namespace of
    /// the bridges. The veth pair of the service reveals the ID of that namespace
    /// (`IFLA_LINK_NETNSID`), and a process with `CAP_NET_ADMIN` over it can create links there
    /// that bypass all guards.
    ///
    /// # Errors
    /// One line that names the cause and, for user namespaces, the host settings to change.
    pub fn create_for_service() -> Result<Namespace, HostContextError> {
        if Namespace::current_is_enterable() {
            return Namespace::create().map_err(HostContextError::Network);
        }
        Namespace::create_in_user_namespace().map_err(explain)
    }

    /// Returns the namespace of the published ports.
    #[must_use]
    pub fn ports(&self) -> &Namespace {
        &self.ports
    }

    /// Returns the namespace of the bridges.
    #[must_use]
    pub fn networks(&self) -> &Namespace {
        &self.networks
    }

    /// Returns whether the bridges are in another namespace than the published ports.
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
