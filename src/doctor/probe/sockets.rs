//! Socket options, each tried on an unbound socket that is closed immediately.

use crate::doctor::host::{Code, Sockets};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};
use std::os::fd::OwnedFd;
use tidegate_proxy::UDP_BUFFER;

/// Tries all socket options.
pub(super) fn probe() -> Sockets {
    let tcp = || open(AddressFamily::INET, SocketType::STREAM);
    let udp = || open(AddressFamily::INET, SocketType::DGRAM);
    Sockets {
        // Before Linux 6.9, TCP rejects the option with `EOPNOTSUPP`, whatever the value.
        tcp_peek_offset: tcp()
            .and_then(|socket| set(socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0)),
        udp_gro: udp().and_then(|socket| set(socket, libc::SOL_UDP, libc::UDP_GRO, 1)),
        udp_segment: udp().and_then(|socket| set(socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1200)),
        force_buffer: udp().and_then(|socket| {
            Ok(sockopt::set_socket_recv_buffer_size_force(&socket, UDP_BUFFER)?)
        }),
        ipv6: open(AddressFamily::INET6, SocketType::DGRAM).map(drop),
    }
}

fn open(family: AddressFamily, kind: SocketType) -> Result<OwnedFd, Code> {
    let protocol = if kind == SocketType::STREAM { ipproto::TCP } else { ipproto::UDP };
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, Some(protocol))?)
}

#[expect(clippy::needless_pass_by_value, reason = "the socket is closed here")]
fn set(
    socket: OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> Result<(), Code> {
    Ok(tidegate_reactor::set_number(&socket, level, option, value)?)
}
