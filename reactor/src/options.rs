//! Socket options that neither rustix nor socket2 has.

use std::io;
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
