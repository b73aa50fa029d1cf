//! How a client reached one of our sockets.

use std::net::{IpAddr, SocketAddr};

/// What the kernel reports about the arrival of a connection or datagram.
///
/// The interface is the one fact that a client cannot choose. Its address can be forged in a
/// datagram. The destination can be any address of the host, whatever the interface (the weak host
/// model, RFC 1122, section 3.3.4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ingress {
    /// The client.
    pub client: SocketAddr,
    /// The destination address; `None` where it is not known.
    pub destination: Option<IpAddr>,
    /// The destination is a broadcast or multicast address.
    pub to_group: bool,
    /// The index of the ingress interface; 0 where it is not known. For what the host sends to an
    /// address of its own, the kernel reports the interface that carries the address, except for
    /// loopback addresses (`ip_route_output_key_hash_rcu`, `ip6_rcv_core`).
    pub interface: u32,
    /// The client completed a TCP handshake, so it does receive at its address.
    pub handshake: bool,
}
