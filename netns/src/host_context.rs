//! Where this process stands: the namespace that it publishes ports in, and the one that its
//! networks are in.
//!
//! | | ports | bridges and rules | the data plane's threads |
//! |---|---|---|---|
//! | as root | the namespace it was started in | the same | the same |
//! | as an ordinary user | the same | one of its own, in a user namespace of its own | in the latter |
//!
//! A listening socket belongs to the namespace that it was made in, whoever accepts from it. So
//! without privileges too one process does it all: what publishes stays outside, what connects to
//! containers lives inside, and only descriptors of one process lie in between.
//!
//! An ordinary user's services are one step further inside: each in a child of that user namespace,
//! which owns the service's network namespace and nothing else.

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
    /// Where this process was started; its networks are there too.
    ///
    /// # Errors
    /// `/proc` is not mounted, or no descriptor is left.
    pub fn here() -> io::Result<Self> {
        let here = Namespace::current()?;
        Ok(Self { ports: here.clone(), networks: here })
    }

    /// Here, for who may make networks here. For others, who become root of a user namespace by it,
    /// one inside that. To be called while the process has but one thread.
    ///
    /// # Errors
    /// One line that says what the host would have to allow.
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

    /// A network namespace for a service. Without root it belongs to a user namespace of its own,
    /// so that root in the service has no capability over the namespace of the bridges. Every veth
    /// pair tells the ID of that one (`IFLA_LINK_NETNSID`), and a process that has `CAP_NET_ADMIN`
    /// over it can make links there, past all guards.
    ///
    /// # Errors
    /// One line that says what the host would have to allow.
    pub fn create_for_service(&self) -> Result<Namespace, HostContextError> {
        if !self.is_rootless() {
            return Namespace::create().map_err(HostContextError::Network);
        }
        Namespace::create_in_user_namespace().map_err(explain)
    }

    /// Where ports are published.
    #[must_use]
    pub fn ports(&self) -> &Namespace {
        &self.ports
    }

    /// Where bridges are.
    #[must_use]
    pub fn networks(&self) -> &Namespace {
        &self.networks
    }

    /// Whether the networks are apart from the host.
    #[must_use]
    pub fn is_rootless(&self) -> bool {
        self.ports.id() != self.networks.id()
    }
}

fn explain(source: io::Error) -> HostContextError {
    let remedy = match Errno::from_io_error(&source) {
        Some(Errno::NOSPC) => {
            "the host allows no more of them; raise sysctls user.max_user_namespaces and \
             user.max_net_namespaces"
        }
        Some(Errno::PERM | Errno::ACCESS) => {
            "the host keeps them from ordinary users; set sysctl kernel.unprivileged_userns_clone=1 or \
             kernel.apparmor_restrict_unprivileged_userns=0, whichever it has, or run as root"
        }
        _ => "run as root",
    };
    HostContextError::UserNamespace { source, remedy }
}
