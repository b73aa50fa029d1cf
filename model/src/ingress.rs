//! Ingress interface and addresses of traffic to a local socket.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::net::{IpAddr, SocketAddr};

/// The interface index of `lo` in every network namespace (`LOOPBACK_IFINDEX`,
/// include/net/flow.h).
pub const LOOPBACK_INDEX: u32 = 1;

/// How a connection or datagram reached a local socket, as reported by the kernel.
///
/// The interface is the only field that a client cannot choose. It can forge the source address of
/// a datagram. The destination can be any address of the host, on any interface (the weak host
/// model, RFC 1122, section 3.3.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// Source address and port.
    pub client: SocketAddr,
    /// The destination address; `None` if unknown.
    pub destination: Option<IpAddr>,
    /// The destination is a broadcast or multicast address.
    pub to_group: bool,
    /// The index of the ingress interface; 0 if unknown. For packets from the host to one of its
    /// own addresses, the kernel reports the interface that has the address, except for loopback
    /// addresses (`ip_route_output_key_hash_rcu`, `ip6_rcv_core`).
    pub interface: u32,
    /// The client completed a TCP handshake, which proves that it receives packets at its address.
    pub handshake: bool,
}
