//! What a service sees of the file system: the host's, except for `/proc`, `/sys`, a few files
//! below `/etc`, and the host's name services.

use super::super::files::{NSSWITCH, SHOWN};
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

/// What no file on `/proc` and `/sys` may be.
const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Sets up the mounts of this process's mount namespace; what could not be had is told in the
/// notes.
pub(super) fn set_up(files: &Path) -> Result<(NameServices, Vec<String>), Report> {
    // What the host mounts later shows in here, what is mounted here does not show on the host.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    step("keep own mounts from the host", mount_change("/", slave))?;
    let mut notes = Vec::new();
    // Inside a container parts of /proc may be covered, and then the kernel lets nobody mount an
    // open one.
    if let Err(error) = mount("proc", "/proc", "proc", PLAIN, None) {
        notes.push(format!("sees the host's processes: {}", reason("mount a new /proc", error)));
    }
    own_sys();
    // Before the files: a link may lead to one of these directories.
    let name_services = NameServices::hide(files, &mut notes);
    let nsswitch = files.join(NSSWITCH.0).exists().then_some(NSSWITCH);
    for (name, shown) in SHOWN.into_iter().chain(nsswitch) {
        // Where `shown` is a link, as systemd-resolved's resolv.conf, the file behind it is
        // covered.
        match mount_bind(files.join(name), shown) {
            Ok(()) => {}
            Err(Errno::NOENT) => {
                notes.push(format!(
                    "has no {shown} of its own: this host has none to cover; make an empty file there"
                ));
            }
            Err(error) => {
                return Err(Report::SetUpFailed(reason(&format!("cover {shown}"), error)));
            }
        }
    }
    Ok((name_services, notes))
}

/// Mounts a `/sys` that shows the links of this network namespace, with the control groups that
/// hang below it. Where that is not allowed the old one stays: few look there.
fn own_sys() {
    const GROUPS: &str = "/sys/fs/cgroup";
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let groups = open_tree(CWD, GROUPS, clone);
    // In a user namespace a /sys that is read-only must stay so.
    let mounted = mount("sysfs", "/sys", "sysfs", PLAIN, None)
        .or_else(|_| mount("sysfs", "/sys", "sysfs", PLAIN | MountFlags::RDONLY, None));
    if let (Ok(()), Ok(groups)) = (mounted, groups) {
        let _ = move_mount(groups, "", CWD, GROUPS, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
    }
}
