//! The sandbox (`--enable-sandbox`): the process gives up the file system and its privileges.
//!
//! # Theory of operation
//! There are two steps. Between them, the process starts threads, which read `/proc` first and must
//! never have privileges.
//!
//! 1. [`Sandbox::enter`] creates a mount namespace. A process without privileges in the network
//!    namespace of its ports also creates a user namespace. Privileges in that user namespace have
//!    no effect outside.
//! 2. [`Sandbox::close`] replaces the root by an empty read-only file system and drops the
//!    privileges. [`Sandbox::drop_privileges`] drops them earlier, for a thread that starts others.
//!
//! Descriptors stay open. `CAP_NET_BIND_SERVICE` is kept if it has an effect: if the network
//! namespace belongs to the process's own user namespace, as for root, ports below 1024 can be
//! forwarded.

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{CapabilitySet, UnshareFlags, set_no_new_privs, unshare_unsafe};
use std::io;
use tidegate_netns::{Namespace, become_root_of_a_user_namespace, is_privileged};
use tidegate_process::confine;

/// The mount point of the empty file system before it becomes the root: a directory that exists
/// everywhere and is no longer needed.
const MOUNT_POINT: &str = "/proc";

/// Why the sandbox was not created.
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

/// A process between the two steps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sandbox {
    kept: CapabilitySet,
}

impl Sandbox {
    /// The first step. Must be called while the process has a single thread.
    ///
    /// # Errors
    /// For example, if the host forbids user namespaces for ordinary users.
    pub(super) fn enter(host: &Namespace) -> Result<Self, SandboxError> {
        let privileged = is_privileged();
        let owns_network = privileged && host.belongs_to_own_user_namespace();
        let kept =
            if owns_network { CapabilitySet::NET_BIND_SERVICE } else { CapabilitySet::empty() };
        if !owns_network
            && let Err(source) = become_root_of_a_user_namespace()
            // With privileges, a mount namespace alone suffices if no user namespace can be
            // created.
            && !privileged
        {
            return Err(SandboxError {
                step: "create a user namespace",
                source,
                hint: " (see sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone and \
                       kernel.apparmor_restrict_unprivileged_userns)",
            });
        }
        // SAFETY: there is a single thread, so no other one loses shared state.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
            .map_err(failed("create a mount namespace"))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(failed("keep mounts private"))?;
        set_no_new_privs(true).map_err(failed("no new privileges"))?;
        Ok(Self { kept })
    }

    /// The second step: replaces the root for all threads, and drops the privileges of the calling
    /// one.
    ///
    /// # Errors
    /// If a system call fails.
    pub(super) fn close(self) -> Result<(), SandboxError> {
        let nothing = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("tmpfs", MOUNT_POINT, "tmpfs", nothing, Some(c"size=0,nr_inodes=2,mode=0555"))
            .map_err(failed("mount an empty file system"))?;
        chdir(MOUNT_POINT).map_err(failed("enter it"))?;
        // This stacks the old root on the new one, so that it can be unmounted (`pivot_root(".",
        // ".")` in pivot_root(2)).
        pivot_root(".", ".").map_err(failed("make it the root"))?;
        unmount(".", UnmountFlags::DETACH).map_err(failed("unmount the old root"))?;
        chdir("/").map_err(failed("enter it"))?;
        mount_remount("/", nothing | MountFlags::RDONLY, "")
            .map_err(failed("make it read-only"))?;
        self.drop_privileges()
    }

    /// Drops the privileges of the calling thread and of threads that it starts.
    ///
    /// # Errors
    /// If a system call fails.
    pub(super) fn drop_privileges(self) -> Result<(), SandboxError> {
        confine::drop_privileges(self.kept).map_err(|error| failed(error.step)(error.source))
    }
}
