//! Socket options that neither rustix nor socket2 has.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

/// Bounds the receive window of a TCP socket (`TCP_WINDOW_CLAMP`), in bytes.
///
/// If the receive buffer is fixed after the handshake, the clamp keeps the value of that time,
/// because only autotuning raises it with the buffer (`tcp_rcv_space_adjust`,
/// net/ipv4/tcp_input.c).
///
/// # Errors
/// Errors of setsockopt(2).
pub fn set_window_clamp(stream: impl AsFd, bytes: u32) -> io::Result<()> {
    set_number(stream, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, bytes.cast_signed())
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
        socket2::SockRef::from(&socket).bind_device(Some(b"lo"))?;
    }
    Ok(())
}

/// Re-enables autotuning of the socket buffers after their sizes were set (`SO_BUF_LOCK`, Linux
/// 5.14).
///
/// # Errors
/// Errors of setsockopt(2); `ENOPROTOOPT` before Linux 5.14.
pub fn unfix_buffers(socket: impl AsFd) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0)
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
