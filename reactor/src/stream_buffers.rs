//! Buffer sizes of TCP sockets whose payload goes to a peer that may have stopped reading.
//!
//! Without a fixed size, the kernel grows a receive buffer up to `tcp_rmem` (6 to 32 MiB) and a
//! send buffer up to `tcp_wmem` (4 MiB). The receive buffer is not fixed before the handshake,
//! because that would bound the window permanently (`tcp_select_initial_window`,
//! net/ipv4/tcp_output.c).

use crate::options::set_number;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};
use socket2::SockRef;
use std::io;
use std::os::fd::AsFd;
use std::sync::LazyLock;

/// Payload in a wide receive buffer, in bytes, not counting kernel overhead (the kernel doubles the
/// value for that). The cost is a throughput limit of slightly more than 1 MiB per round trip.
pub const UNREAD_BYTES: usize = 1 << 20;

/// Payload in a narrow receive buffer, in bytes, not counting kernel overhead. The window that it
/// permits exceeds what a sender has in flight before the buffer can become wide.
const UNREAD_NARROW: usize = 128 << 10;

/// Maximum unsent payload in a send buffer in bytes (`TCP_NOTSENT_LOWAT`), for a connection with
/// little and with much traffic. Data in flight is not included; the window of the receiver bounds
/// it.
pub const UNSENT_NARROW: u32 = 64 << 10;
/// See [`UNSENT_NARROW`].
pub const UNSENT_WIDE: u32 = 256 << 10;

/// How the receive buffer of a TCP socket is fixed at [`UNREAD_BYTES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ReceiveBound {
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
    fn probe() -> Self {
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
    fn apply(self, socket: impl AsFd) -> io::Result<()> {
        match self {
            Self::Force => Ok(sockopt::set_socket_recv_buffer_size_force(socket, UNREAD_BYTES)?),
            Self::Ask => Ok(sockopt::set_socket_recv_buffer_size(socket, UNREAD_BYTES)?),
            Self::Leave => Ok(()),
        }
    }
}

/// Fixes the receive buffer of `socket` at [`UNREAD_BYTES`]. Without the privilege, and with a
/// `net.core.rmem_max` below that size, the kernel manages the buffer: a much smaller one would
/// cost more throughput than the limit is worth.
pub fn widen_receive_buffer(socket: impl AsFd) {
    static BOUND: LazyLock<ReceiveBound> = LazyLock::new(ReceiveBound::probe);
    let is_left = *BOUND == ReceiveBound::Leave && unfix_buffers(&socket).is_ok();
    if !is_left && (*BOUND == ReceiveBound::Leave || BOUND.apply(&socket).is_err()) {
        // An error means that the peer has closed the connection, which then needs no buffer.
        let _ = ReceiveBound::Ask.apply(&socket);
    }
    // If the receive buffer is fixed after the handshake, the clamp keeps the value of that time,
    // because only autotuning raises it with the buffer (`tcp_rcv_space_adjust`,
    // net/ipv4/tcp_input.c). The kernel doubles the buffer size and uses a part of it for overhead.
    let clamp = 2 * UNREAD_BYTES as libc::c_int;
    let _ = set_number(&socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, clamp);
}

/// Fixes the receive buffer of `socket` at the size for little traffic. Data already received is
/// kept. The kernel drops data beyond the new size, and the sender retransmits it later
/// (`tcp_try_rmem_schedule`).
pub fn narrow_receive_buffer(socket: impl AsFd) {
    let _ = sockopt::set_socket_recv_buffer_size(&socket, UNREAD_NARROW);
}

/// Re-enables autotuning of the socket buffers after their sizes were set (`SO_BUF_LOCK`, Linux
/// 5.14; `ENOPROTOOPT` before).
fn unfix_buffers(socket: impl AsFd) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0)
}
