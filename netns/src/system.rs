//! System calls that rustix lacks, and one that requires a temporary socket.

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Returns the index of the interface `name` in the calling thread's network namespace.
///
/// # Errors
/// `ENODEV` if the interface does not exist.
pub fn interface_index(name: &str) -> io::Result<u32> {
    // The ioctl requires any socket in the namespace.
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(name_to_index(&socket, name)?)
}

/// Returns whether `file` refers to a network namespace. The ioctl fails for files that are not
/// namespaces.
pub(crate) fn is_network_namespace(file: impl AsFd) -> bool {
    // SAFETY: NS_GET_NSTYPE takes no argument and returns a CLONE_NEW* flag (ioctl_ns(2)).
    let kind = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}

/// Returns the user namespace that owns the namespace `file`.
///
/// # Errors
/// `EPERM` if it is neither the caller's user namespace nor a descendant.
pub(crate) fn owner(file: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: NS_GET_USERNS takes no argument and returns a new descriptor, close-on-exec
    // (ioctl_ns(2)).
    let descriptor = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::NS_GET_USERNS) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created the descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Returns the cookie of the network namespace of `socket`. Unlike the inode number, the cookie is
/// not reused before the next boot.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub(crate) fn namespace_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length point to live variables, and length is the size of value.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
