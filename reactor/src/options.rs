//! Options of data-plane sockets: sizes, keepalive, and options that neither rustix nor socket2
//! has.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
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

/// Receive buffer of a TCP socket whose payload goes to a peer that may have stopped reading, in
/// bytes, not counting kernel overhead (the kernel doubles the value for that). Without a fixed
/// size the buffer grows to `tcp_rmem` (6 to 32 MiB). The cost is a throughput limit of slightly
/// more than 1 MiB per round trip.
pub const UNREAD_BYTES: usize = 1 << 20;

/// How the receive buffer of a TCP socket is fixed at [`UNREAD_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveBound {
    /// With the privilege to exceed `net.core.rmem_max`.
    Force,
    /// Within `net.core.rmem_max`.
    Ask,
    /// Not: `net.core.rmem_max` is lower, and a much smaller buffer would cost more throughput than
    /// the bound is worth.
    Leave,
}

impl ReceiveBound {
    /// What the calling thread may do.
    #[must_use]
    pub fn probe() -> Self {
        let flags = SocketFlags::CLOEXEC;
        let Ok(socket) = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None) else {
            return Self::Leave;
        };
        if Self::Force.apply(&socket).is_ok() {
            return Self::Force;
        }
        let asked =
            Self::Ask.apply(&socket).and_then(|()| SockRef::from(&socket).recv_buffer_size());
        // The kernel reports the doubled size.
        if asked.is_ok_and(|size| size >= 2 * UNREAD_BYTES) { Self::Ask } else { Self::Leave }
    }

    /// Fixes the receive buffer of `socket`.
    ///
    /// # Errors
    /// `EPERM` for [`Force`](Self::Force) without the privilege.
    pub fn apply(self, socket: impl AsFd) -> io::Result<()> {
        match self {
            Self::Force => Ok(sockopt::set_socket_recv_buffer_size_force(socket, UNREAD_BYTES)?),
            Self::Ask => Ok(sockopt::set_socket_recv_buffer_size(socket, UNREAD_BYTES)?),
            Self::Leave => Ok(()),
        }
    }
}

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
        SockRef::from(&socket).bind_device(Some(b"lo"))?;
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
