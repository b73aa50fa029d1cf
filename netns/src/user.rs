//! User namespaces, which give an unprivileged user privileges over network namespaces.
//!
//! The creator of a user namespace is root in it, with privileges over the network namespaces
//! created inside and nothing else (user_namespaces(7)). The process stays in the host's network
//! namespace, so it can publish ports there. Its threads may enter the inner network namespaces but
//! cannot return; [`Namespace::with`](crate::Namespace::with) handles this case.

use rustix::fs::{Stat, fstat, stat};
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

/// Returns whether this process may create network namespaces (`CAP_SYS_ADMIN` in its user
/// namespace).
#[must_use]
pub fn is_privileged() -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// Moves this process into a new user namespace as root. The process gains all privileges over
/// namespaces created afterwards, and none over existing ones. Files that it creates belong to the
/// calling user.
///
/// Must be called while the process is single-threaded.
///
/// # Errors
/// `EINVAL` with more than one thread, `ENOSPC` at the limit `user.max_user_namespaces`, `EPERM` or
/// `EACCES` if the host restricts unprivileged user namespaces (`kernel.unprivileged_userns_clone`,
/// `kernel.apparmor_restrict_unprivileged_userns`).
pub fn become_root_of_a_user_namespace() -> io::Result<()> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // SAFETY: no state is unshared from other threads. The kernel rejects the call if the process
    // has any.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }?;
    // Required before mapping a group: otherwise a process could drop a group that denies it access
    // (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    // A security module may permit the namespace but deny all capabilities in it.
    if is_privileged() { Ok(()) } else { Err(Errno::PERM.into()) }
}

/// Returns whether this process is in the user namespace `namespace`.
///
/// # Errors
/// `/proc` is not mounted.
pub fn is_own_user_namespace(namespace: impl AsFd) -> io::Result<bool> {
    let id = |file: Stat| (file.st_dev, file.st_ino);
    Ok(fstat(namespace).map(id)? == stat("/proc/self/ns/user").map(id)?)
}

/// Moves the calling process into `namespace`, a user namespace of the same user or a descendant of
/// one. The process gains all privileges in it and cannot return.
///
/// Must be called while the process is single-threaded.
///
/// # Errors
/// `EINVAL` if the process is already a member or has several threads; `EPERM` if another user owns
/// the namespace.
pub fn join_user_namespace(namespace: impl AsFd) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))?)
}

/// Creates a network namespace owned by a new user namespace. The user namespace is a child of the
/// caller's and maps every ID to itself. Returns the network namespace, which keeps the user
/// namespace alive.
///
/// A process that joins the user namespace has all capabilities over the network namespace and none
/// over objects of the caller's user namespace. The caller has all capabilities over both: it has
/// those of the parent, and its user owns the child (`cap_capable` in `security/commoncap.c`).
///
/// A process with several threads cannot unshare its user namespace, so a forked child creates both
/// namespaces and exits.
///
/// # Errors
/// Same as [`become_root_of_a_user_namespace`]; `EPERM` without `CAP_SETUID`, `CAP_SETGID` and
/// `CAP_SETFCAP`, which the ID mapping requires.
pub(crate) fn create_owned_network() -> io::Result<File> {
    let child = Child::start()?;
    child.wait_for_step()?;
    // The IDs are mapped before the network namespace is created: the kernel assigns its files in
    // /proc and /sys to the root of its user namespace only if that ID is mapped at the time
    // (`net_ns_get_ownership` in `net/core/net-sysfs.c`).
    for map in ["uid_map", "gid_map"] {
        let own = fs::read_to_string(format!("/proc/self/{map}"))?;
        fs::write(child.proc_path(map), identity_mapping(&own))?;
    }
    rustix::io::write(&child.socket, &[0])?;
    child.wait_for_step()?;
    File::open(child.proc_path("ns/net"))
}

/// Returns the mapping of each ID inside of the mapping `own` to itself.
fn identity_mapping(own: &str) -> String {
    let mut mapping = String::new();
    for line in own.lines() {
        // First ID inside, first ID in the parent, count (user_namespaces(7)).
        let mut fields = line.split_ascii_whitespace();
        if let (Some(first), Some(count)) = (fields.next(), fields.nth(1)) {
            // Writing to a string cannot fail.
            let _ = writeln!(mapping, "{first} {first} {count}");
        }
    }
    mapping
}

/// Forked child process that creates namespaces. Killed and reaped on drop.
struct Child {
    pid: Pid,
    /// After each step, the child writes the errno to this socket, 0 on success, and waits for a
    /// byte before the next step.
    socket: OwnedFd,
}

impl Child {
    fn start() -> io::Result<Self> {
        let (socket, child_socket) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // SAFETY: locks that other threads hold are never released in the child. The child only
        // makes system calls, which neither allocate nor lock.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                // SAFETY: `socket` owns the descriptor in the child too, where it is neither used
                // nor dropped. With this copy closed, the child reads end of file when the parent
                // exits.
                unsafe { libc::close(socket.as_raw_fd()) };
                create_namespaces(&child_socket);
                // SAFETY: exits without running the exit handlers of the parent.
                unsafe { libc::_exit(0) }
            }
            pid => Ok(Self { pid: Pid::from_raw(pid).ok_or(Errno::SRCH)?, socket }),
        }
    }

    /// Waits until the child has completed its current step.
    fn wait_for_step(&self) -> io::Result<()> {
        let mut error = [0; 4];
        // Returns 0 bytes if the child exits, which closes its end of the socket pair.
        let length = loop {
            match rustix::io::read(&self.socket, &mut error) {
                Err(Errno::INTR) => {}
                read => break read?,
            }
        };
        match (length, i32::from_ne_bytes(error)) {
            (4, 0) => Ok(()),
            (4, number) => Err(io::Error::from_raw_os_error(number)),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "child process exited before it created the namespace",
            )),
        }
    }

    /// Path of `name` in the procfs directory of the child.
    fn proc_path(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.pid.as_raw_nonzero())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The PID cannot be reused until the child is reaped.
        let _ = kill_process(self.pid, Signal::KILL);
        while let Err(Errno::INTR) = waitpid(Some(self.pid), WaitOptions::empty()) {}
    }
}

/// Creates the namespaces in the child. Async-signal-safe.
fn create_namespaces(socket: &OwnedFd) {
    for flags in [UnshareFlags::NEWUSER, UnshareFlags::NEWNET] {
        // SAFETY: the child is single-threaded.
        let created = unsafe { unshare_unsafe(flags) };
        let error = created.err().map_or(0, Errno::raw_os_error);
        let reported = rustix::io::write(socket, &error.to_ne_bytes());
        // The parent sends a byte after its part of the step. End of file: the parent has exited.
        let stop = reported.is_err() || error != 0;
        if stop || !matches!(rustix::io::read(socket, &mut [0; 1]), Ok(1)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_mapping_covers_the_ids_inside() {
        assert_eq!(identity_mapping("         0       1000          1\n"), "0 0 1\n");
        let two = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(identity_mapping(two), "0 0 1\n1 1 65536\n");
        assert_eq!(identity_mapping(""), "");
    }
}
