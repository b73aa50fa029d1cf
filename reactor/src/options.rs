//! Socket options that neither rustix nor socket2 has.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

/// Bounds the receive window of a TCP socket (`TCP_WINDOW_CLAMP`), in bytes.
///
/// A connection whose receive buffer is fixed after the handshake keeps the clamp that it had by
/// then: only autotuning raises it with the buffer (`tcp_rcv_space_adjust`, net/ipv4/tcp_input.c).
///
/// # Errors
/// What setsockopt(2) says.
pub fn set_window_clamp(stream: impl AsFd, bytes: u32) -> io::Result<()> {
    set_number(stream, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, bytes.cast_signed())
}

/// Restricts a socket bound to a loopback `address` to the interface `lo`. To be called after the
/// bind, which so finds conflicts with sockets at all addresses. With `route_localnet` set, as by
/// kube-proxy, packets to 127.0.0.0/8 come in from links too (CVE-2020-8558).
///
/// # Errors
/// What setsockopt(2) says; `EPERM` without `CAP_NET_RAW` before Linux 5.7.
pub fn accept_only_from_loopback(socket: impl AsFd, address: IpAddr) -> io::Result<()> {
    if address.to_canonical().is_loopback() {
        socket2::SockRef::from(&socket).bind_device(Some(b"lo"))?;
    }
    Ok(())
}

/// Lets the kernel manage the buffers of a socket again after their sizes were set
/// (`SO_BUF_LOCK`, Linux 5.14).
///
/// # Errors
/// What setsockopt(2) says; `ENOPROTOOPT` before Linux 5.14.
pub fn unfix_buffers(socket: impl AsFd) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0)
}

/// Sets a socket option whose value is one integer.
///
/// # Errors
/// What setsockopt(2) says.
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
