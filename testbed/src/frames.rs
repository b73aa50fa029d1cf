//! Ethernet frames by hand: what root in a container can send, whatever its kernel would.

use crate::Namespace;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Every ethertype (`ETH_P_ALL`).
const ALL: u16 = 3;

/// A packet socket at one link.
#[derive(Debug)]
pub struct LinkSocket {
    socket: OwnedFd,
}

impl LinkSocket {
    /// At `link` of `namespace`. It receives every frame that the link does, those for other stations too.
    ///
    /// # Panics
    ///
    /// Without such a link, or without CAP_NET_RAW.
    #[track_caller]
    pub fn open(namespace: &Namespace, link: &str) -> Self {
        let opened = namespace.run(|| -> io::Result<OwnedFd> {
            let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            let index = name_to_index(&any, link)?;
            // SAFETY: numbers go in and a descriptor comes out.
            let packets = unsafe {
                libc::socket(
                    libc::AF_PACKET,
                    libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                    i32::from(ALL.to_be()),
                )
            };
            if packets < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the kernel has just made it, and nothing else knows of it.
            let packets = unsafe { OwnedFd::from_raw_fd(packets) };
            // SAFETY: all zeros are a `sockaddr_ll`.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = ALL.to_be();
            address.sll_ifindex = index.cast_signed();
            let length = size_of_val(&address) as libc::socklen_t;
            // SAFETY: `address` is as long as it says.
            let bound = unsafe { libc::bind(packets.as_raw_fd(), (&raw const address).cast(), length) };
            if bound != 0 {
                return Err(io::Error::last_os_error());
            }
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&packets, 64 << 20);
            Ok(packets)
        });
        let socket = opened.unwrap_or_else(|error| panic!("packet socket at {link}: {error}"));
        Self { socket }
    }

    /// Sends `frame`.
    ///
    /// # Panics
    ///
    /// The link does not take it.
    #[track_caller]
    pub fn send(&self, frame: &[u8]) {
        loop {
            match rustix::net::send(&self.socket, frame, rustix::net::SendFlags::empty()) {
                Ok(_) => return,
                Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::AGAIN) => std::thread::yield_now(),
                Err(errno) => panic!("send a frame of {} bytes: {errno}", frame.len()),
            }
        }
    }

    /// The frames that have come since the last call, those that this host sent itself left out.
    pub fn received(&self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            // SAFETY: all zeros are a `sockaddr_ll`.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut length = size_of_val(&from) as libc::socklen_t;
            // SAFETY: buffer and address are as long as they are said to be.
            let count = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            let Ok(count) = usize::try_from(count) else { return all };
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                all.push(buffer[..count].to_vec());
            }
        }
    }
}

/// A MAC address.
pub type Mac = [u8; 6];

/// Everybody on the link.
pub const BROADCAST: Mac = [0xff; 6];

/// An Ethernet frame.
pub fn ethernet(destination: Mac, source: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&destination[..], &source, &ethertype.to_be_bytes(), payload].concat()
}

/// ARP: `operation` 1 asks, 2 answers.
pub fn arp(operation: u8, sender_mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let payload = [&head[..], &sender_mac, &sender.octets(), &[0; 6], &target.octets()].concat();
    ethernet(BROADCAST, sender_mac, 0x0806, &payload)
}

/// The IPv4 packet of `payload`, whose protocol has that number.
pub fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = (20 + payload.len()) as u16;
    let mut head = vec![0x45, 0];
    head.extend(length.to_be_bytes());
    head.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    head.extend(source.octets());
    head.extend(destination.octets());
    let sum = checksum(&head);
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    head.extend(payload);
    head
}

/// The same of IPv6, with a hop limit of 255 as neighbour discovery has it.
pub fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// A UDP datagram in IPv4. It has no checksum, which IPv4 allows.
pub fn udp4(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let udp = udp(source.1, destination.1, payload);
    ipv4(source.0, destination.0, 17, &udp)
}

/// A UDP datagram in IPv6.
pub fn udp6(source: (Ipv6Addr, u16), destination: (Ipv6Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut udp = udp(source.1, destination.1, payload);
    let sum = match pseudo_checksum(source.0, destination.0, 17, &udp) {
        0 => 0xffff,
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    ipv6(source.0, destination.0, 17, &udp)
}

/// A message of ICMPv6; its checksum is filled in.
pub fn icmp6(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let sum = pseudo_checksum(source, destination, 58, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv6(source, destination, 58, &message)
}

/// A neighbour advertisement that `target` is at `mac`, overriding what is known.
pub fn advertisement(source: Ipv6Addr, destination: Ipv6Addr, target: Ipv6Addr, mac: Mac) -> Vec<u8> {
    let message = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac].concat();
    icmp6(source, destination, &message)
}

fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload].concat()
}

fn pseudo_checksum(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> u16 {
    let length = (payload.len() as u32).to_be_bytes();
    let head = [&source.octets()[..], &destination.octets(), &length, &[0, 0, 0, next]].concat();
    checksum(&[&head[..], payload].concat())
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let pairs =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
