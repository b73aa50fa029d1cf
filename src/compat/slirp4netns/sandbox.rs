//! What a process gives up that serves a container: the file system and its privileges
//! (`--enable-sandbox`).
//!
//! # Theory of operation
//! It is done in two steps, for threads are started in between that begin with a look at `/proc`,
//! and have to be without privileges from their first moment on.
//!
//! 1. [`Sandbox::enter`]: into a mount namespace of our own. Who has no privileges in the network
//!    that ports are bound in makes a user namespace as well: privileges in there count for nothing
//!    outside.
//! 2. [`Sandbox::close`]: the root becomes an empty file system that cannot be written to, and the
//!    privileges go. [`Sandbox::drop_privileges`] is for a thread that starts others before that.
//!
//! What stays are descriptors, and `CAP_NET_BIND_SERVICE` where it means something: where the
//! network is our own user namespace's, as it is for root, ports below 1024 can be forwarded.

use crate::confine;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{CapabilitySet, UnshareFlags, set_no_new_privs, unshare_unsafe};
use std::io;
use tidegate_netns::{Namespace, become_root_of_a_user_namespace, is_privileged};

/// Where the empty file system is mounted on its way to become the root: a directory that is
/// everywhere, and not needed any more.
const STEPPING_STONE: &str = "/proc";

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
#[error("--enable-sandbox: {step}: {source}{hint}")]
pub(super) struct SandboxError {
    step: &'static str,
    source: io::Error,
    hint: &'static str,
}

fn failed(step: &'static str) -> impl Fn(rustix::io::Errno) -> SandboxError {
    move |error| SandboxError { step, source: error.into(), hint: "" }
}

/// A process on its way into a sandbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sandbox {
    kept: CapabilitySet,
}

impl Sandbox {
    /// The first step. To be called while the process has but one thread.
    ///
    /// # Errors
    /// The host has no user namespaces for ordinary users, for instance.
    pub(super) fn enter(host: &Namespace) -> Result<Self, SandboxError> {
        let privileged = is_privileged();
        let owns_network = privileged && host.belongs_to_own_user_namespace();
        let kept =
            if owns_network { CapabilitySet::NET_BIND_SERVICE } else { CapabilitySet::empty() };
        if !owns_network
            && let Err(source) = become_root_of_a_user_namespace()
            // A mount namespace alone will do, where there may be no more user namespaces.
            && !privileged
        {
            return Err(SandboxError {
                step: "make a user namespace",
                source,
                hint: " (see sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and \
                       kernel.apparmor_restrict_unprivileged_userns)",
            });
        }
        // SAFETY: nothing is unshared that threads share: there is one.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed("make a mount namespace"))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(failed("keep mounts private"))?;
        set_no_new_privs(true).map_err(failed("no new privileges"))?;
        Ok(Self { kept })
    }

    /// The second step, for the calling thread. The file system goes for all of them.
    ///
    /// # Errors
    /// The kernel refuses one of its parts.
    pub(super) fn close(self) -> Result<(), SandboxError> {
        let nothing = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("tmpfs", STEPPING_STONE, "tmpfs", nothing, Some(c"size=0,nr_inodes=2,mode=0555"))
            .map_err(failed("mount an empty file system"))?;
        chdir(STEPPING_STONE).map_err(failed("enter it"))?;
        // The old root ends up on top of the new one, and comes off (pivot_root(2),
        // "pivot_root(".", ".")").
        pivot_root(".", ".").map_err(failed("make it the root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?;
        chdir("/").map_err(failed("enter it"))?;
        mount_remount("/", nothing | MountFlags::RDONLY, "")
            .map_err(failed("make it read-only"))?;
        self.drop_privileges()
    }

    /// Drops privileges of the calling thread, and of those that it starts.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn drop_privileges(self) -> Result<(), SandboxError> {
        confine::drop_privileges(self.kept).map_err(|error| failed(error.step)(error.source))
    }
}
