//! The mounts of a service: the host's file system, except for `/proc`, `/sys`, a few files below
//! `/etc`, and the sockets of the host's name services.

use super::super::files::mounted;
use super::super::protocol::Report;
use super::name_services::NameServices;
use super::{reason, step};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_bind,
    mount_change, move_mount, open_tree,
};
use std::path::Path;

/// Mount flags of `/proc` and `/sys`.
const FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Sets up the mounts of this process's mount namespace. `files` is the directory of the service's
/// files. Returns a note for each mount that failed and is not essential.
///
/// # Errors
/// The propagation cannot be changed, or a file below `/etc` cannot be mounted.
pub(super) fn set_up(files: &Path) -> Result<(NameServices, Vec<String>), Report> {
    // Slave: mounts of the host propagate into the service, but not in the other direction.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    step("change the mount propagation to slave", mount_change("/", slave))?;
    let mut notes = Vec::new();
    // Fails inside a container that hides parts of /proc: the kernel then denies a new, complete
    // mount of it (`mount_too_revealing`, fs/namespace.c).
    if let Err(error) = mount("proc", "/proc", "proc", FLAGS, None) {
        notes.push(format!("sees the host's processes: {}", reason("mount a new /proc", error)));
    }
    mount_sys();
    // Before the files: `/etc/resolv.conf` can be a symbolic link into one of these directories.
    let name_services = NameServices::hide(files, &mut notes);
    for (name, target) in mounted().filter(|(name, _)| files.join(name).exists()) {
        // If `target` is a symbolic link, as with systemd-resolved, the mount point is the file
        // that it refers to.
        match mount_bind(files.join(name), target) {
            Ok(()) => {}
            Err(Errno::NOENT) => {
                notes.push(format!(
                    "has no {target} of its own: this host has no such file to mount over; create an empty one"
                ));
            }
            Err(error) => {
                return Err(Report::SetUpFailed(reason(&format!("mount over {target}"), error)));
            }
        }
    }
    Ok((name_services, notes))
}

/// Mounts a `/sys` that shows the links of this network namespace, and moves the host's control
/// groups into it. Keeps the host's `/sys` if that is denied, since few programs depend on it.
fn mount_sys() {
    const GROUPS: &str = "/sys/fs/cgroup";
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let groups = open_tree(CWD, GROUPS, clone);
    // In a user namespace, a new mount of a read-only /sys must be read-only too.
    let mounted = mount("sysfs", "/sys", "sysfs", FLAGS, None)
        .or_else(|_| mount("sysfs", "/sys", "sysfs", FLAGS | MountFlags::RDONLY, None));
    if let (Ok(()), Ok(groups)) = (mounted, groups) {
        let _ = move_mount(groups, "", CWD, GROUPS, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    }
}
