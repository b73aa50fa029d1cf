//! A private mount namespace, for programs that require fixed paths such as `/run` or
//! `/etc/docker`.

use std::ffi::CString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_bind_recursive,
    mount_change, move_mount, open_tree,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::{Namespace, require_root};

/// A mount namespace held by a descriptor: a copy of the mounts of the machine with private
/// changes.
///
/// Pass it to [`Namespace::with_mounts`]. Like a network namespace, it vanishes with its last user.
#[derive(Clone)]
pub struct Mounts(Arc<OwnedFd>);

/// One change to the mounts.
enum Change {
    Tmpfs(PathBuf),
    Bind { source: PathBuf, target: PathBuf },
}

/// Collects the changes for a [`Mounts`].
#[derive(Default)]
pub struct MountsBuilder(Vec<Change>);

impl Mounts {
    /// Starts with the unchanged mounts of the machine.
    pub fn builder() -> MountsBuilder {
        MountsBuilder::default()
    }

    /// Moves the calling process into the mount namespace. Async-signal-safe.
    ///
    /// The process must not share its root and working directory with another thread, which is the
    /// case after a `fork`.
    pub(crate) fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Mount))?)
    }
}

impl MountsBuilder {
    /// Mounts an empty file system at `path`, which must exist.
    #[must_use]
    pub fn tmpfs(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.push(Change::Tmpfs(path.into()));
        self
    }

    /// Binds `source` to `target`. Both must exist, and be either directories or files.
    #[must_use]
    pub fn bind(mut self, source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        self.0.push(Change::Bind { source: source.into(), target: target.into() });
        self
    }

    /// Creates the mounts for programs that run in `namespace`; `/sys` shows its links.
    #[track_caller]
    pub fn build(self, namespace: &Namespace) -> Mounts {
        require_root();
        let made = namespace.run(|| self.make());
        Mounts(Arc::new(
            made.unwrap_or_else(|error| panic!("create private mounts: {error}")).into(),
        ))
    }

    /// Must run on a temporary thread, because the thread cannot return to the mounts of the
    /// machine.
    fn make(&self) -> Result<File, String> {
        // SAFETY: a private copy of mounts, root and working directory affects only this thread.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
            .map_err(|error| format!("unshare: {error}"))?;
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).map_err(|error| format!("make / private: {error}"))?;
        own_sys().map_err(|error| format!("mount /sys: {error}"))?;
        for change in &self.0 {
            change.apply()?;
        }
        File::open("/proc/thread-self/ns/mnt")
            .map_err(|error| format!("open the namespace: {error}"))
    }
}

impl Change {
    fn apply(&self) -> Result<(), String> {
        match self {
            Self::Tmpfs(path) => {
                tmpfs(path).map_err(|error| format!("tmpfs on {}: {error}", path.display()))
            }
            Self::Bind { source, target } => {
                mount_bind_recursive(source, target).map_err(|error| {
                    format!("bind {} to {}: {error}", source.display(), target.display())
                })
            }
        }
    }
}

impl fmt::Debug for Mounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mounts").field(&self.0).finish()
    }
}

fn tmpfs(path: &Path) -> rustix::io::Result<()> {
    let mode = CString::new("mode=0755").expect("no NUL inside");
    mount("tmpfs", path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, mode.as_c_str())
}

/// Mounts a `/sys` for the network namespace of the thread, with the control groups below it.
///
/// sysfs shows the links of the network namespace that it was mounted from. Control groups are
/// mounted below `/sys`, so a detached copy of their mounts is attached to the new `/sys`.
fn own_sys() -> rustix::io::Result<()> {
    const GROUPS: &str = "/sys/fs/cgroup";
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let groups = match open_tree(CWD, GROUPS, clone) {
        Ok(groups) => Some(groups),
        Err(Errno::NOENT) => None,
        Err(error) => return Err(error),
    };
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None)?;
    if let Some(groups) = groups {
        move_mount(groups, "", CWD, GROUPS, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(())
}
