//! The TUN device: whether it opens, and what it can do.

use crate::doctor::host::TunOffload;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

/// By which TUN devices are made.
const PATH: &str = "/dev/net/tun";

/// Checksums and TCP segmentation, which every kernel from 2.6.27 on has.
const TCP: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// UDP segmentation (6.2). The kernel takes both halves or neither.
const UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Opens it. By itself that makes no device.
///
/// # Errors
/// `ENOENT` without the node, `EACCES` without the permission, `EPERM` where a container may not,
/// `ENODEV` or `ENXIO` without the driver.
pub(super) fn open() -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, PATH, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
}

/// Its permission bits.
pub(super) fn mode() -> Option<u32> {
    fs::metadata(PATH).ok().map(|metadata| metadata.permissions().mode() & 0o777)
}

/// Makes a device in the namespace that the calling thread is in, and finds out what it can
/// offload. It is gone when this returns.
///
/// # Errors
/// As of [`open`]; `EPERM` without `CAP_NET_ADMIN` in there.
pub(super) fn make() -> Result<TunOffload, Errno> {
    let device = open()?;
    // SAFETY: all-zero is a valid ifreq: an empty name, of which the kernel makes one of its own.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    if result != 0 {
        return Err(last());
    }
    let takes = |offload: libc::c_uint| {
        // SAFETY: TUNSETOFFLOAD takes a number.
        let result = unsafe {
            libc::ioctl(device.as_raw_fd(), libc::TUNSETOFFLOAD as _, libc::c_ulong::from(offload))
        };
        result == 0
    };
    Ok(TunOffload { tcp: takes(TCP), udp: takes(TCP | UDP) })
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
