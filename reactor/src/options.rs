//! Options of data-plane sockets: sizes, keepalive, and options that neither rustix nor socket2
//! has.

use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::{SockRef, TcpKeepalive};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// Accept queue length of published ports: the default of `net.core.somaxconn`, at which the kernel
/// caps it.
pub const BACKLOG: i32 = 4096;

/// TCP keepalive of client connections: idle time, interval, and number of probes. A vanished peer
/// is detected after 15 + 9 × 15 s, as by docker-proxy (the defaults of Go).
pub const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(15))
    .with_retries(9);

/// Requested buffer size of a datagram socket in bytes; without privilege, the kernel caps it at
/// `net.core.rmem_max`. A sender with segmentation offload delivers up to 64 KiB at once.
pub const UDP_BUFFER: usize = 4 << 20;

/// Requests buffers of [`UDP_BUFFER`] for a datagram socket. A cap by the system is not an error.
pub fn enlarge_datagram_buffers(socket: impl AsFd) {
    if sockopt::set_socket_recv_buffer_size_force(&socket, UDP_BUFFER).is_err() {
        let _ = sockopt::set_socket_recv_buffer_size(&socket, UDP_BUFFER);
    }
    let _ = sockopt::set_socket_send_buffer_size(&socket, UDP_BUFFER);
}

/// Whether `error` means that the process or the system is out of descriptors or memory.
#[must_use]
pub fn is_exhaustion(error: &io::Error) -> bool {
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    Errno::from_io_error(error).is_some_and(|errno| exhausted.contains(&errno))
}

/// Restricts a socket bound to a loopback `address` to the interface `lo`. Other sockets are
/// unchanged. With `route_localnet` set, as by kube-proxy, packets to 127.0.0.0/8 can also arrive
/// on links (CVE-2020-8558). Must be called after bind(2), so that bind(2) detects conflicts with
/// sockets on the wildcard address.
///
/// # Errors
/// Errors of setsockopt(2); `EPERM` without `CAP_NET_RAW` before Linux 5.7.
pub fn accept_only_from_loopback(socket: impl AsFd, address: IpAddr) -> io::Result<()> {
    if address.to_canonical().is_loopback() {
        SockRef::from(&socket).bind_device(Some(b"lo"))?;
    }
    Ok(())
}

/// Sets a socket option whose value is one integer.
///
/// # Errors
/// Errors of setsockopt(2).
pub fn set_number(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
