//! Raw Ethernet frames: what root in a container can send regardless of its kernel.

use crate::Namespace;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Every ethertype (`ETH_P_ALL`).
const ALL: u16 = 3;

/// A packet socket bound to a link.
#[derive(Debug)]
pub struct LinkSocket {
    socket: OwnedFd,
}

impl LinkSocket {
    /// Opens a socket on `link` of `namespace`. It receives every frame on the link, including
    /// those for other stations.
    ///
    /// # Panics
    ///
    /// If the link does not exist, or without CAP_NET_RAW.
    #[track_caller]
    pub fn open(namespace: &Namespace, link: &str) -> Self {
        Self::bound(namespace, link, ALL)
    }

    /// Opens a socket that only sends. It does not slow down the receive path of the link, because
    /// it receives nothing.
    ///
    /// # Panics
    ///
    /// As for [`open`](Self::open).
    #[track_caller]
    pub fn sender(namespace: &Namespace, link: &str) -> Self {
        Self::bound(namespace, link, 0)
    }

    #[track_caller]
    fn bound(namespace: &Namespace, link: &str, ethertype: u16) -> Self {
        let opened = namespace.run(|| -> io::Result<OwnedFd> {
            let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            let index = name_to_index(&any, link)?;
            // SAFETY: socket(2) takes numbers and returns a descriptor.
            let packets = unsafe {
                libc::socket(
                    libc::AF_PACKET,
                    libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                    i32::from(ethertype.to_be()),
                )
            };
            if packets < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: the descriptor is new and has no other owner.
            let packets = unsafe { OwnedFd::from_raw_fd(packets) };
            // SAFETY: an all-zero `sockaddr_ll` is valid.
            let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = ethertype.to_be();
            address.sll_ifindex = index.cast_signed();
            let length = size_of_val(&address) as libc::socklen_t;
            // SAFETY: `address` is valid for the length passed.
            let bound =
                unsafe { libc::bind(packets.as_raw_fd(), (&raw const address).cast(), length) };
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
    /// If the link rejects it.
    #[track_caller]
    pub fn send(&self, frame: &[u8]) {
        loop {
            match rustix::net::send(&self.socket, frame, rustix::net::SendFlags::empty()) {
                Ok(_) => return,
                Err(rustix::io::Errno::NOBUFS | rustix::io::Errno::AGAIN) => {
                    std::thread::yield_now();
                }
                Err(errno) => panic!("send a frame of {} bytes: {errno}", frame.len()),
            }
        }
    }

    /// Returns the frames received since the last call, except for those sent by this host.
    pub fn received(&self) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            // SAFETY: an all-zero `sockaddr_ll` is valid.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut length = size_of_val(&from) as libc::socklen_t;
            // SAFETY: buffer and address are valid for the lengths passed.
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

/// The broadcast address.
pub const BROADCAST: Mac = [0xff; 6];

/// An Ethernet frame.
pub fn ethernet(destination: Mac, source: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&destination[..], &source, &ethertype.to_be_bytes(), payload].concat()
}

/// An ARP packet: `operation` 1 is a request, 2 a reply.
pub fn arp(operation: u8, sender_mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    let payload = [&head[..], &sender_mac, &sender.octets(), &[0; 6], &target.octets()].concat();
    ethernet(BROADCAST, sender_mac, 0x0806, &payload)
}

/// An IPv4 packet with `payload` of the given protocol number.
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

/// An IPv6 packet, with the hop limit 255 that neighbour discovery requires.
pub fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend(payload);
    packet
}

/// A UDP datagram in IPv4, without a checksum, which is optional in IPv4.
pub fn udp4(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let udp = udp(source.1, destination.1, payload);
    ipv4(source.0, destination.0, 17, &udp)
}

/// A TCP SYN in IPv4.
pub fn syn4(source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16), sequence: u32) -> Vec<u8> {
    let mut syn = [source.1.to_be_bytes(), destination.1.to_be_bytes()].concat();
    syn.extend(sequence.to_be_bytes());
    // No acknowledgement; a header of 20 bytes, the SYN flag, and a window of 64,240 bytes.
    syn.extend([0, 0, 0, 0, 0x50, 2, 0xfa, 0xf0, 0, 0, 0, 0]);
    let pseudo = [&source.0.octets()[..], &destination.0.octets(), &[0, 6, 0, 20], &syn].concat();
    syn[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    ipv4(source.0, destination.0, 6, &syn)
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

/// An ICMPv6 message, with its checksum filled in.
pub fn icmp6(source: Ipv6Addr, destination: Ipv6Addr, message: &[u8]) -> Vec<u8> {
    let mut message = message.to_vec();
    let sum = pseudo_checksum(source, destination, 58, &message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv6(source, destination, 58, &message)
}

/// A neighbour advertisement of `target` at `mac`, with the override flag.
pub fn advertisement(
    source: Ipv6Addr,
    destination: Ipv6Addr,
    target: Ipv6Addr,
    mac: Mac,
) -> Vec<u8> {
    let message = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac].concat();
    icmp6(source, destination, &message)
}

fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload]
        .concat()
}

fn pseudo_checksum(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> u16 {
    let length = (payload.len() as u32).to_be_bytes();
    let head = [&source.octets()[..], &destination.octets(), &length, &[0, 0, 0, next]].concat();
    checksum(&[&head[..], payload].concat())
}

/// An ICMP error "fragmentation needed" to `destination` (RFC 792, RFC 1191). It quotes a datagram
/// from `port` of `destination` to `server`, and reports a next-hop MTU of `mtu` bytes.
pub fn too_big4(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    server: (Ipv4Addr, u16),
    port: u16,
    mtu: u16,
) -> Vec<u8> {
    let quoted = udp4((destination, port), server, &[]);
    let mut message = [&[3, 4, 0, 0, 0, 0][..], &mtu.to_be_bytes(), &quoted].concat();
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv4(source, destination, 1, &message)
}

/// Returns the Internet checksum (RFC 1071).
pub fn checksum(bytes: &[u8]) -> u16 {
    let pairs = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The kinds of forged frames.
pub const KINDS: [&str; 9] =
    ["mac", "arp", "nd", "ipv4", "ipv6", "ethertype", "link-control", "icmp", "loopback"];

/// The payload of every forged UDP packet.
pub const MARKER: &[u8] = b"forged-by-root";

/// Root in a container, which forges the addresses of others. The frames are determined by the
/// seed.
#[derive(Debug)]
pub struct Forger {
    /// Its own MAC address.
    pub mac: Mac,
    /// Its own addresses.
    pub own: (Ipv4Addr, Ipv6Addr),
    /// Its own link-local address.
    pub link_local: Ipv6Addr,
    /// The addresses of its gateway.
    pub gateway: (Ipv4Addr, Ipv6Addr),
    /// The addresses of a neighbour.
    pub neighbor: (Ipv4Addr, Ipv6Addr),
    /// The state of a linear congruential generator (Knuth, MMIX).
    pub seed: u64,
}

impl Forger {
    fn next(&mut self) -> u64 {
        self.seed = self
            .seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.seed >> 24
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()].clone()
    }

    fn source4(&mut self) -> Ipv4Addr {
        let any = Ipv4Addr::from_bits(self.next() as u32);
        let any = if any == self.own.0 { self.gateway.0 } else { any };
        self.pick(&[
            self.gateway.0,
            self.neighbor.0,
            Ipv4Addr::LOCALHOST,
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::BROADCAST,
            Ipv4Addr::new(203, 0, 113, 9),
            any,
        ])
    }

    fn source6(&mut self) -> Ipv6Addr {
        let any = Ipv6Addr::from_bits(u128::from(self.next()) << 64 | u128::from(self.next()));
        let outside = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 9);
        let router = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let (gateway, neighbor) = (self.gateway.1, self.neighbor.1);
        self.pick(&[
            gateway,
            neighbor,
            router,
            Ipv6Addr::LOCALHOST,
            Ipv6Addr::UNSPECIFIED,
            outside,
            any,
        ])
    }

    /// Returns the next forged frame of a kind in [`KINDS`].
    ///
    /// # Panics
    ///
    /// If `kind` is unknown.
    pub fn frame(&mut self, kind: &str) -> Vec<u8> {
        const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let own_mac = self.mac;
        let ip4 = |packet: &[u8]| ethernet(BROADCAST, own_mac, 0x0800, packet);
        let ip6 = |packet: &[u8]| ethernet(BROADCAST, own_mac, 0x86dd, packet);
        let [_, _, mut mac @ ..]: [u8; 8] = self.next().to_be_bytes();
        mac[0] &= 0xfe;
        mac[5] = if mac == own_mac { !mac[5] } else { mac[5] };
        let (source4, source6) = (self.source4(), self.source6());
        let ((own4, own6), own_link, (gateway4, gateway6)) =
            (self.own, self.link_local, self.gateway);
        let (neighbor4, neighbor6) = self.neighbor;
        match kind {
            "mac" => ethernet(BROADCAST, mac, 0x0800, &udp4((own4, 1), (gateway4, 2), MARKER)),
            "arp" => match self.next() % 3 {
                // The sender 0.0.0.0 is valid only in a probe for its own address.
                0 => arp(1 + (self.next() % 2) as u8, own_mac, source4, gateway4),
                1 => {
                    let mut frame = arp(2, own_mac, own4, gateway4);
                    frame[22..28].copy_from_slice(&mac);
                    frame
                }
                _ => arp(3 + (self.next() % 8) as u8, own_mac, own4, gateway4),
            },
            "nd" => match self.next() % 7 {
                0 => {
                    let target = self.pick(&[gateway6, neighbor6]);
                    ip6(&advertisement(own_link, ALL_NODES, target, own_mac))
                }
                1 => ip6(&advertisement(own_link, ALL_NODES, own6, mac)),
                // A router advertisement and a redirect.
                2 => ip6(&icmp6(
                    own_link,
                    ALL_NODES,
                    &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0],
                )),
                3 => ip6(&icmp6(own_link, ALL_NODES, &[&[137, 0, 0, 0][..], &[0; 36]].concat())),
                // A second option overrides the first.
                4 => {
                    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
                    let head = [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &own6.octets()].concat();
                    ip6(&icmp6(own_link, ALL_NODES, &[&head[..], &nonce, &[2, 1], &mac].concat()))
                }
                // A router solicitation with a foreign source link-layer address.
                5 => ip6(&icmp6(
                    own_link,
                    ALL_NODES,
                    &[&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1][..], &mac].concat(),
                )),
                // An advertisement after an extension header.
                _ => {
                    let message =
                        advertisement(own_link, ALL_NODES, gateway6, own_mac)[40..].to_vec();
                    let header = [58, 0, 1, 4, 0, 0, 0, 0];
                    let next = self.pick(&[0, 43, 60]);
                    ip6(&ipv6(own_link, ALL_NODES, next, &[&header[..], &message].concat()))
                }
            },
            "ipv4" => match self.next() % 2 {
                0 => ip4(&udp4((source4, 9), (gateway4, 53), MARKER)),
                _ => {
                    let protocol = self.pick(&[1, 6]);
                    ip4(&ipv4(source4, neighbor4, protocol, &[0; 20]))
                }
            },
            "ipv6" => match self.next() % 2 {
                0 => ip6(&udp6((source6, 9), (ALL_NODES, 53), MARKER)),
                _ => {
                    let next = self.pick(&[6, 43, 44, 50, 60]);
                    ip6(&ipv6(source6, neighbor6, next, &[0; 40]))
                }
            },
            "ethertype" => {
                let kind = self.pick(&[0x8100, 0x88a8, 0x88cc, 0x8847, 0x0026, 0x9000, 0x888e]);
                ethernet(BROADCAST, own_mac, kind, &[0; 46])
            }
            // From its own addresses to the group addresses that a bridge does not forward (IEEE
            // 802.1Q, table 8-1).
            "link-control" => {
                let group = [0x01, 0x80, 0xc2, 0, 0, (self.next() % 16) as u8];
                let outside = Ipv4Addr::new(203, 0, 113, 9);
                let to = self.pick(&[gateway4, neighbor4, outside]);
                match self.next() % 2 {
                    0 => ethernet(group, own_mac, 0x0800, &udp4((own4, 1), (to, 2), MARKER)),
                    _ => ethernet(group, own_mac, 0x86dd, &udp6((own6, 1), (gateway6, 2), MARKER)),
                }
            }
            // Redirects, and errors that quote packets to other hosts, from its own addresses.
            "icmp" => {
                let outside = Ipv4Addr::new(203, 0, 113, 9);
                let outside6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 9);
                let kind = self.pick(&[3, 4, 5, 11, 12]);
                let mut packet = too_big4(own4, gateway4, (outside, 53), 9, 600);
                packet[20] = kind;
                let quoted = udp6((gateway6, 9), (outside6, 53), MARKER);
                let kind6 = self.pick(&[1, 2, 3, 4]);
                let error = [&[kind6, 0, 0, 0, 0, 0, 5, 0][..], &quoted].concat();
                match self.next() % 8 {
                    0 => ip4(&packet),
                    // The first fragment of such an error. The trailer of the frame quotes a packet
                    // to the sender.
                    5 => {
                        let mut first = ipv4(own4, gateway4, 1, &[kind, 0, 0, 0, 0, 0, 0, 0]);
                        first[6] = 0x20;
                        ip4(&[first, udp4((outside, 53), (own4, 9), &[])].concat())
                    }
                    // About a packet to the sender, with a segment routing header to another host.
                    6 => {
                        let header = [&[17, 2, 4, 0, 0, 0, 0, 0][..], &outside6.octets()].concat();
                        let quoted = ipv6(gateway6, own6, 43, &[&header[..], &[0; 8]].concat());
                        let head = [kind6, 0, 0, 0, 0, 0, 5, 0];
                        ip6(&icmp6(own6, gateway6, &[&head[..], &quoted].concat()))
                    }
                    // A router advertisement in a fragment.
                    7 => {
                        let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
                        let header = [58, 0, 0, 0, 0, 0, 0, 1];
                        let fragment = [&header[..], &advertisement].concat();
                        ip6(&ipv6(own_link, ALL_NODES, 44, &fragment))
                    }
                    // Only the ICMP header; the quoted packet would be in later fragments.
                    1 => {
                        packet[6] = 0x20;
                        ip4(&packet[..28])
                    }
                    2 => ip6(&icmp6(own6, gateway6, &error)),
                    3 => ip6(&ipv6(
                        own6,
                        gateway6,
                        44,
                        &[&[58, 0, 0, 1, 0, 0, 0, 1], &error[..]].concat(),
                    )),
                    _ => ip6(&ipv6(
                        own6,
                        gateway6,
                        60,
                        &[&[58, 0, 1, 4, 0, 0, 0, 0], &error[..]].concat(),
                    )),
                }
            }
            "loopback" => {
                let low = self.next() as u8;
                ip4(&udp4((own4, 9), (Ipv4Addr::new(127, 0, low, 1), 53), MARKER))
            }
            _ => panic!("unknown kind of forged frames: {kind}"),
        }
    }
}
