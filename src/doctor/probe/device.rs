//! The TUN device: whether it opens, and its offloads.

use crate::doctor::host::TunOffload;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

/// The control node of TUN devices.
const PATH: &str = "/dev/net/tun";

/// Checksum and TCP segmentation offload, supported since Linux 2.6.27.
const TCP: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// UDP segmentation offload (Linux 6.2). The kernel accepts only both flags together.
const UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Opens the control node. This does not create a device.
///
/// # Errors
/// `ENOENT` without the node, `EACCES` without permission, `EPERM` if a container denies the
/// device, `ENODEV` or `ENXIO` without the driver.
pub(super) fn open() -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, PATH, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
}

/// Returns the permission bits of the node.
pub(super) fn mode() -> Option<u32> {
    fs::metadata(PATH).ok().map(|metadata| metadata.permissions().mode() & 0o777)
}

/// Creates a device in the namespace of the calling thread and determines its offloads. The device
/// is removed on return.
///
/// # Errors
/// Those of [`open`]; `EPERM` without `CAP_NET_ADMIN` in the namespace.
pub(super) fn make() -> Result<TunOffload, Errno> {
    let device = open()?;
    // SAFETY: all-zero is a valid ifreq. For the empty name, the kernel chooses one.
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
