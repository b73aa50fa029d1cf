//! Privileges over network namespaces for who has none on this host: a user namespace of one's own.
//!
//! Whoever makes a user namespace is root in it: over the network namespaces that are made from
//! within, and over nothing else (user_namespaces(7)). The process stays in the host's network all
//! the while, so that it publishes ports there, and its threads may enter the namespaces inside;
//! none of them gets back from there, which is what [`Namespace::with`](crate::Namespace::with) has
//! to see to.

use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, UnshareFlags, capabilities, move_into_link_name_space,
    unshare_unsafe,
};
use std::fs;
use std::io;
use std::os::fd::AsFd;

/// Whether this process may make network namespaces (`CAP_SYS_ADMIN` where it is).
#[must_use]
pub fn is_privileged() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Makes a user namespace and this process its root: every privilege over what is made from then
/// on, none that it did not have over what is there already. Files that it makes belong to the user
/// who called it.
///
/// To be called before the process has a second thread.
///
/// # Errors
/// `EINVAL` with more than one thread, `ENOSPC` at `user.max_user_namespaces`, `EPERM` or `EACCES`
/// where the host does not let ordinary users have them (`kernel.unprivileged_userns_clone`,
/// `kernel.apparmor_restrict_unprivileged_userns`).
pub fn become_root_of_a_user_namespace() -> io::Result<()> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // SAFETY: nothing that threads share is unshared from others: there are none, or the kernel
    // refuses.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }?;
    // Without it no group may be mapped: a process could drop one by which it is denied something
    // (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    // A security module may grant the namespace and nothing in it.
    if is_privileged() { Ok(()) } else { Err(Errno::PERM.into()) }
}

/// Makes the calling process a member of `namespace`, a user namespace made by its user or by one
/// inside of it, with every privilege over what belongs to that one. There is no way back.
///
/// To be called while the process has but one thread.
///
/// # Errors
/// `EINVAL` if it is in there already or has several threads; `EPERM` if the namespace is another
/// user's.
pub fn join_user_namespace(namespace: impl AsFd) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))?)
}
