//! Ingress interface of accepted TCP connections.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use tidegate_model::LOOPBACK_INDEX;

use crate::batch;

/// Ingress interface and local address of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamIngress {
    /// Index of the interface that received the last packet of the handshake.
    pub interface: u32,
    /// The local address.
    pub local: IpAddr,
}

/// Enables [`stream_ingress`] for the connections that `listener` accepts. Without it,
/// [`stream_ingress`] fails for IPv4; for IPv6 it always works.
///
/// # Errors
/// Errors of setsockopt(2).
pub fn enable_stream_ingress(listener: impl AsFd, ipv6: bool) -> io::Result<()> {
    // Accepted sockets inherit the option. TCP does not use it otherwise.
    if ipv6 { Ok(()) } else { batch::enable_packet_info(listener, false) }
}

/// Returns the ingress of `stream`. `ipv6` is the family of the listener that accepted it. Takes
/// one system call for IPv4 and two for IPv6.
///
/// # Errors
/// Errors of getsockopt(2); `InvalidData` if the kernel does not report the interface.
pub fn stream_ingress(stream: impl AsFd, ipv6: bool) -> io::Result<StreamIngress> {
    let ingress = if ipv6 { v6(stream)? } else { v4(stream)? };
    if ingress.interface == 0 { Err(io::ErrorKind::InvalidData.into()) } else { Ok(ingress) }
}

/// `tcp_v4_syn_recv_sock` stores the interface in `mc_index`, and `IP_PKTOPTIONS` reports it with
/// the local address (`do_ip_getsockopt`).
fn v4(stream: impl AsFd) -> io::Result<StreamIngress> {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        info: libc::in_pktinfo,
        /// Space for `IP_TTL` and `IP_TOS`, in case those are enabled too.
        _more: [u64; 6],
    }
    let mut control = std::mem::MaybeUninit::<Control>::zeroed();
    let length = get_option(
        stream,
        libc::IPPROTO_IP,
        IP_PKTOPTIONS,
        control.as_mut_ptr().cast(),
        size_of::<Control>(),
    )?;
    // SAFETY: all-zero is a valid value, and the kernel has overwritten part of it.
    let control = unsafe { control.assume_init() };
    let is_info = (control.header.cmsg_level, control.header.cmsg_type)
        == (libc::IPPROTO_IP, libc::IP_PKTINFO);
    if length < std::mem::offset_of!(Control, _more) || !is_info {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(StreamIngress {
        interface: control.info.ipi_ifindex as u32,
        local: Ipv4Addr::from(control.info.ipi_addr.s_addr.to_ne_bytes()).into(),
    })
}

/// `tcp_v6_syn_recv_sock` stores the interface in `mcast_oif`, and `IPV6_MULTICAST_IF` reports it.
/// `IPV6_2292PKTOPTIONS` reports the same index, but requires `IPV6_RECVPKTINFO`, which makes the
/// kernel clone every received segment (`tcp_v6_do_rcv`).
fn v6(stream: impl AsFd) -> io::Result<StreamIngress> {
    let mut interface: libc::c_int = 0;
    get_option(
        &stream,
        libc::IPPROTO_IPV6,
        libc::IPV6_MULTICAST_IF,
        (&raw mut interface).cast(),
        size_of::<libc::c_int>(),
    )?;
    let local = rustix::net::getsockname(&stream)?;
    let local = std::net::SocketAddr::try_from(local).map_err(io::Error::from)?;
    let local = match local.ip() {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4),
        v4 @ IpAddr::V4(_) => v4,
    };
    debug_assert_ne!(local, IpAddr::V6(Ipv6Addr::UNSPECIFIED), "an accepted socket has an address");
    Ok(StreamIngress { interface: interface as u32, local })
}

/// Attaches a filter that drops datagrams with equal source and destination addresses, unless the
/// host itself sent them and `lo` delivers them. `IP_PKTINFO` cannot distinguish the two: for
/// packets from the host to one of its own addresses, it reports the interface that has the
/// address.
///
/// For IPv4, the kernel drops such datagrams itself unless `accept_local` is set
/// (`fib_validate_source`). For IPv6, it does not. With `ipv6`, datagrams from IPv4-mapped
/// addresses are dropped too ([`drop_mapped_sources`]).
///
/// # Errors
/// Errors of setsockopt(2).
pub fn drop_forged_own_source(datagrams: impl AsFd, ipv6: bool) -> io::Result<()> {
    let (source, destination, words): (u32, u32, u8) = if ipv6 { (8, 24, 4) } else { (12, 16, 1) };
    let interface = (libc::SKF_AD_OFF as u32).wrapping_add(libc::SKF_AD_IFINDEX as u32);
    let mut program = if ipv6 { mapped_sources() } else { Vec::new() };
    program.extend([
        load(interface),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 4 * words + 1, 0, LOOPBACK_INDEX),
    ]);
    for word in 0..words {
        let offset = u32::from(word) * 4;
        program.push(load(at(source + offset)));
        program.push(filter(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0));
        program.push(load(at(destination + offset)));
        let to_accept = 4 * (words - 1 - word) + 1;
        program.push(filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_X, 0, to_accept, 0));
    }
    program.extend([verdict(0), verdict(u32::MAX)]);
    attach_filter(datagrams, program)
}

/// Attaches a filter that drops IPv6 datagrams from IPv4-mapped addresses (`::ffff:0:0/96`), to a
/// socket with `IPV6_V6ONLY`. No kernel sends from such an address, and an allow-list or a service
/// would take the client for one with the IPv4 address.
///
/// # Errors
/// Errors of setsockopt(2).
pub fn drop_mapped_sources(datagrams: impl AsFd) -> io::Result<()> {
    let mut program = mapped_sources();
    program.push(verdict(u32::MAX));
    attach_filter(datagrams, program)
}

/// Instructions that drop a packet from an IPv4-mapped address and continue otherwise.
fn mapped_sources() -> Vec<libc::sock_filter> {
    const SOURCE: u32 = 8;
    let words = [(0, 0, 5), (4, 0, 3), (8, 0xffff, 1)];
    let mut program = Vec::new();
    for (offset, value, to_end) in words {
        program.push(load(at(SOURCE + offset)));
        program.push(filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, to_end, value));
    }
    program.push(verdict(0));
    program
}

/// Offset in the IP header, for loads of classic BPF.
const fn at(offset: u32) -> u32 {
    (libc::SKF_NET_OFF as u32).wrapping_add(offset)
}

fn load(address: u32) -> libc::sock_filter {
    filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, address)
}

fn verdict(bytes: u32) -> libc::sock_filter {
    filter(libc::BPF_RET | libc::BPF_K, 0, 0, bytes)
}

fn attach_filter(socket: impl AsFd, mut program: Vec<libc::sock_filter>) -> io::Result<()> {
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the pointer and the length describe `program`, which refers to a vector that outlives
    // the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn filter(code: u32, if_true: u8, if_false: u8, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: if_true, jf: if_false, k: value }
}

/// `IP_PKTOPTIONS` (include/uapi/linux/in.h), which the libc crate does not define for every C
/// library.
const IP_PKTOPTIONS: libc::c_int = 9;

/// Calls getsockopt(2) with a `value` of `size` bytes and returns the length that the kernel wrote.
fn get_option(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: *mut libc::c_void,
    size: usize,
) -> io::Result<usize> {
    let mut length = size as libc::socklen_t;
    // SAFETY: both callers pass a value of `size` bytes that outlives the call.
    let result = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, option, value, &raw mut length)
    };
    if result == 0 { Ok(length as usize) } else { Err(io::Error::last_os_error()) }
}
