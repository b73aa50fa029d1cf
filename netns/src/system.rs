//! System calls that rustix does not have, and one that needs a socket first.

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// The index of the interface `name` of the calling thread's namespace.
///
/// # Errors
/// `ENODEV` if there is none.
pub fn interface_index(name: &str) -> io::Result<u32> {
    // The ioctl needs a socket of the namespace; any will do.
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(name_to_index(&socket, name)?)
}

/// Whether `file` stands for a network namespace. Of any other file, the kernel does not know the
/// question.
pub(crate) fn is_network_namespace(file: impl AsFd) -> bool {
    // SAFETY: NS_GET_NSTYPE takes no argument and returns a CLONE_NEW* flag (ioctl_ns(2)).
    let kind = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::NS_GET_NSTYPE) };
    kind == libc::CLONE_NEWNET
}

/// The user namespace that the namespace behind `file` belongs to.
///
/// # Errors
/// `EPERM` if it is neither the caller's nor inside of it.
pub(crate) fn owner(file: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: NS_GET_USERNS takes no argument and returns a new descriptor, close-on-exec
    // (ioctl_ns(2)).
    let descriptor = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::NS_GET_USERNS) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, so nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// The cookie of the namespace that `socket` belongs to: a number that no other network namespace
/// has or will have until the next boot, unlike its inode number.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub(crate) fn namespace_cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length point to live variables, and the length is the size of the value.
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
