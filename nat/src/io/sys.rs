//! System calls that neither rustix nor socket2 provides.

use crate::host::SocketError;
use crate::wire::icmp::IcmpError;
use socket2::{SockAddr, SockAddrStorage};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};

/// Not defined by the libc crate for every target (`include/uapi/asm-generic/socket.h`).
pub(super) const SO_PEEK_OFF: libc::c_int = 42;

/// Maximum bytes of a datagram that an error returns: the most that an ICMP error can quote.
const QUOTED: usize = 1280;

fn checked(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Reads an integer option.
pub(super) fn get(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: value and length point to live variables, and the length is the size of the value.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Copies data from the receive queue into `buffer` without removing it (`MSG_PEEK`).
pub(super) fn peek(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: pointer and length describe `buffer`.
    checked(unsafe {
        libc::recv(socket.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags)
    })
}

/// Like [`peek`], after the bytes that fill `skipped`, which are discarded.
pub(super) fn peek_behind(
    socket: impl AsFd,
    skipped: &mut [u8],
    buffer: &mut [u8],
) -> io::Result<usize> {
    let mut vectors = [
        libc::iovec { iov_base: skipped.as_mut_ptr().cast(), iov_len: skipped.len() },
        libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() },
    ];
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = vectors.as_mut_ptr();
    header.msg_iovlen = vectors.len() as _;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the header describes both buffers, which outlive the call.
    checked(unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags) })
}

/// Removes `length` bytes from the receive queue of a TCP socket without copying them (`MSG_TRUNC`,
/// tcp(7)).
pub(super) fn discard(socket: impl AsFd, length: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC, TCP writes nothing to the buffer.
    checked(unsafe { libc::recv(socket.as_fd().as_raw_fd(), std::ptr::null_mut(), length, flags) })
}

/// Whether a FIN has been received in order on a TCP socket (`TCP_INFO`).
pub(super) fn is_at_end(socket: impl AsFd) -> bool {
    let mut state = 0u8;
    let mut length = 1 as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, the first of which is `tcpi_state`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut state).cast(),
            &raw mut length,
        )
    };
    // TCP_TIME_WAIT, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_CLOSING
    // (include/net/tcp_states.h).
    result == 0 && matches!(state, 6 | 7 | 8 | 9 | 11)
}

/// Sends `bytes` on a connected socket.
pub(super) fn send(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length describe `bytes`.
    checked(unsafe {
        libc::send(socket.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags)
    })
}

/// Buffer for the control messages of an error-queue entry.
#[repr(C, align(8))]
struct ErrorControl([u8; 512]);

/// Removes and returns the next ICMP error from the error queue of a socket (`IP_RECVERR`, ip(7)).
/// Other entries are skipped.
pub(super) fn next_socket_error(socket: impl AsFd) -> Option<SocketError> {
    loop {
        let mut payload = vec![0; QUOTED];
        let mut control = ErrorControl([0; 512]);
        let mut vector =
            libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
        // SAFETY: all-zero is a valid msghdr.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        header.msg_control = control.0.as_mut_ptr().cast();
        header.msg_controllen = control.0.len() as _;
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        let receive = |name: *mut SockAddrStorage, length: *mut libc::socklen_t| {
            header.msg_name = name.cast();
            // SAFETY: socket2 provides a pointer to its storage, and one to the length of that
            // storage.
            header.msg_namelen = unsafe { *length };
            // SAFETY: the header describes buffers that outlive the call.
            let received = checked(unsafe {
                libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, flags)
            })?;
            // SAFETY: as above.
            unsafe { *length = header.msg_namelen };
            Ok(received)
        };
        // SAFETY: the kernel writes an address, or nothing and a length of 0.
        let (received, name) = unsafe { SockAddr::try_init(receive) }.ok()?;
        payload.truncate(received);
        // SAFETY: recvmsg has filled in the header.
        if let Some((icmp_error, offender)) = unsafe { parse_error(&header) } {
            return Some(SocketError {
                icmp_error,
                offender,
                destination: name.as_socket(),
                payload,
            });
        }
    }
}

/// Parses the control messages of an error: the error and its sender.
///
/// # Safety
/// `msg_control` and `msg_controllen` must be as set by recvmsg(2).
unsafe fn parse_error(header: &libc::msghdr) -> Option<(IcmpError, Option<IpAddr>)> {
    // SAFETY: the macros stay within the buffer, by the contract of this function. Reads are
    // unaligned, and only within the length of the message.
    unsafe {
        let mut cursor = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = cursor.as_ref() {
            let v6 =
                (message.cmsg_level, message.cmsg_type) == (libc::IPPROTO_IPV6, libc::IPV6_RECVERR);
            let v4 =
                (message.cmsg_level, message.cmsg_type) == (libc::IPPROTO_IP, libc::IP_RECVERR);
            let length = message.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as _);
            let size = size_of::<libc::sock_extended_err>();
            if (v4 || v6) && length >= size {
                let data = libc::CMSG_DATA(message);
                let error = data.cast::<libc::sock_extended_err>().read_unaligned();
                let from_network =
                    matches!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP | libc::SO_EE_ORIGIN_ICMP6);
                let icmp_error = IcmpError::of(v6, error.ee_type, error.ee_code, error.ee_info);
                if from_network && let Some(icmp_error) = icmp_error {
                    return Some((icmp_error, offender(data.add(size), length - size)));
                }
            }
            cursor = libc::CMSG_NXTHDR(header, message);
        }
    }
    None
}

/// # Safety
/// `length` bytes from `data` must be readable.
unsafe fn offender(data: *const u8, length: usize) -> Option<IpAddr> {
    // SAFETY: the family is read only if it is present, and the address only if it is complete.
    unsafe {
        let family =
            (length >= 2).then(|| i32::from(data.cast::<libc::sa_family_t>().read_unaligned()))?;
        match family {
            libc::AF_INET if length >= size_of::<libc::sockaddr_in>() => {
                let address = data.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()).into())
            }
            libc::AF_INET6 if length >= size_of::<libc::sockaddr_in6>() => {
                let address = data.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(address.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}
