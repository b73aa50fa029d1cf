//! Privileges over network namespaces for who has none on this host: a user namespace of one's own.
//!
//! Whoever makes a user namespace is root in it: over the network namespaces that are made from
//! within, and over nothing else (user_namespaces(7)). The process stays in the host's network all
//! the while, so that it publishes ports there, and its threads may enter the namespaces inside;
//! none of them gets back from there, which is what [`Namespace::with`](crate::Namespace::with) has
//! to see to.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, WaitOptions, getegid, geteuid, kill_process, waitpid};
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, UnshareFlags, capabilities, move_into_link_name_space,
    unshare_unsafe,
};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

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

/// Makes a network namespace that belongs to a new user namespace, a child of the caller's that
/// maps every ID to itself. Returns the network namespace, which keeps the user namespace alive.
///
/// A process that joins the child has every capability over the network namespace and none over
/// what belongs to the caller's user namespace. The caller has every capability over both: it holds
/// those of the parent, and its user is the owner of the child (`cap_capable` of
/// `security/commoncap.c`).
///
/// A process with several threads cannot make a user namespace for itself, so a copy of this
/// process makes both and ends.
///
/// # Errors
/// As of [`become_root_of_a_user_namespace`]; `EPERM` without `CAP_SETUID`, `CAP_SETGID` and
/// `CAP_SETFCAP`, which mapping the IDs takes.
pub(crate) fn network_of_a_child() -> io::Result<File> {
    let child = Child::start()?;
    child.has_taken_step()?;
    // The network namespace comes after the mapping: the kernel gives its files in /proc and /sys
    // to the root of its user namespace, if that is a user by then (`net_ns_get_ownership` of
    // `net/core/net-sysfs.c`).
    for map in ["uid_map", "gid_map"] {
        let own = fs::read_to_string(format!("/proc/self/{map}"))?;
        fs::write(child.file(map), identity(&own))?;
    }
    rustix::io::write(&child.line, &[0])?;
    child.has_taken_step()?;
    File::open(child.file("ns/net"))
}

/// The mapping of each ID to itself, for the IDs that the mapping `own` has.
fn identity(own: &str) -> String {
    let mut identity = String::new();
    for line in own.lines() {
        // First ID inside, first ID in the parent, count (user_namespaces(7)).
        let mut fields = line.split_ascii_whitespace();
        if let (Some(first), Some(count)) = (fields.next(), fields.nth(1)) {
            // A string takes whatever is written to it.
            let _ = writeln!(identity, "{first} {first} {count}");
        }
    }
    identity
}

/// The copy of this process that makes namespaces. Killed and reaped when dropped.
struct Child {
    pid: Pid,
    /// The child writes an error number to it after each step, 0 for none, and waits for a byte
    /// before the next.
    line: OwnedFd,
}

impl Child {
    fn start() -> io::Result<Self> {
        let (line, childs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // SAFETY: other threads may hold locks, which nobody releases in the copy. So all that it
        // does are system calls, which neither allocate nor lock.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: `line` owns it in this process too, and is not used or dropped here.
                // Closed, it does not keep the child waiting when the parent is gone.
                unsafe { libc::close(line.as_raw_fd()) };
                make_namespaces(&childs);
                // SAFETY: ends the process, without what the parent has set up for its own end.
                unsafe { libc::_exit(0) }
            }
            pid => Ok(Self { pid: Pid::from_raw(pid).ok_or(Errno::SRCH)?, line }),
        }
    }

    /// Waits for the end of the child's current step.
    fn has_taken_step(&self) -> io::Result<()> {
        let mut error = [0; 4];
        // Ends when the child does, which closes its end of the line.
        let length = loop {
            match rustix::io::read(&self.line, &mut error) {
                Err(Errno::INTR) => {}
                read => break read?,
            }
        };
        match (length, i32::from_ne_bytes(error)) {
            (4, 0) => Ok(()),
            (4, number) => Err(io::Error::from_raw_os_error(number)),
            _ => Err(io::Error::other("the process that makes a namespace ended early")),
        }
    }

    fn file(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.pid.as_raw_nonzero())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It is this process's until it is waited for, whatever has become of it.
        let _ = kill_process(self.pid, Signal::KILL);
        while let Err(Errno::INTR) = waitpid(Some(self.pid), WaitOptions::empty()) {}
    }
}

/// What the child does. Async-signal-safe.
fn make_namespaces(line: &OwnedFd) {
    for flags in [UnshareFlags::NEWUSER, UnshareFlags::NEWNET] {
        // SAFETY: this process has one thread, which shares nothing with others.
        let made = unsafe { unshare_unsafe(flags) };
        let error = made.err().map_or(0, Errno::raw_os_error);
        let told = rustix::io::write(line, &error.to_ne_bytes());
        // A byte when the parent has done its part; the end of the line when it has ended.
        if told.is_err() || error != 0 || !matches!(rustix::io::read(line, &mut [0; 1]), Ok(1)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_repeated_with_ids_as_they_are_inside() {
        assert_eq!(identity("         0       1000          1\n"), "0 0 1\n");
        let two = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(identity(two), "0 0 1\n1 1 65536\n");
        assert_eq!(identity(""), "");
    }
}
