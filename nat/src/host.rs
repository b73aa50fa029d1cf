//! Interface of the engine to the outside: a device for packets, and sockets on the host.
//!
//! It separates logic from I/O. `io` implements it with a TUN device and kernel sockets, and the
//! simulation with queues in memory. The engine is generic over the implementation, so there is no
//! dynamic dispatch and no extra copy. No call may block: an operation that cannot complete returns
//! [`WouldBlock`](io::ErrorKind::WouldBlock), and [`Engine::ready`](crate::engine::Engine::ready)
//! reports when to retry.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::wire::icmp::IcmpError;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use tidegate_reactor::{Key, StreamIngress};

/// Readiness of a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Data, the end of the stream or an error can be read.
    pub readable: bool,
    /// The send buffer has space, or a connect has completed.
    pub writable: bool,
    /// A socket error or an entry of the error queue is pending.
    pub error: bool,
    /// The stream has ended or contains urgent data. A short peek does not mean that the receive
    /// queue is empty.
    pub more: bool,
}

/// Size of the receive buffer of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveBuffer {
    /// 128 KiB of payload.
    Narrow,
    /// 1 MiB of payload ([`UNREAD_BYTES`](tidegate_reactor::UNREAD_BYTES)).
    Wide,
}

/// Kind of a datagram socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKind {
    /// A connected UDP socket.
    Udp,
    /// An unconnected UDP socket for several peers.
    SharedUdp,
    /// A ping socket for ICMP or ICMPv6 echoes, by address family (`SOCK_DGRAM` with
    /// `IPPROTO_ICMP`).
    Echo,
}

/// Result of sending a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// The kernel accepted the batch.
    Sent,
    /// The send buffer is full.
    NoRoom,
    /// A datagram has DF set and exceeds the path MTU, which is given in bytes.
    TooBig(u32),
    /// The destination is unreachable.
    Unreachable(IcmpError),
}

/// Destination of a datagram on an unconnected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The destination.
    pub to: SocketAddr,
    /// The source address; `None` to select it by the routing table.
    pub from: Option<IpAddr>,
}

/// Socket of a published port.
#[derive(Debug)]
pub enum Port<L, D> {
    /// A listening TCP socket.
    Tcp(L),
    /// An unconnected UDP socket.
    Udp(D),
}

/// An ICMP error about an earlier datagram of a socket (`IP_RECVERR`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketError {
    /// The error.
    pub icmp_error: IcmpError,
    /// The sender of the error; `None` for this host.
    pub offender: Option<IpAddr>,
    /// The destination of that datagram, for an unconnected socket.
    pub destination: Option<SocketAddr>,
    /// The start of the payload of that datagram.
    pub payload: Vec<u8>,
}

/// Messages received by one call.
pub trait Batch: Default {
    /// Number of messages.
    fn len(&self) -> usize;

    /// Whether the batch is empty.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Message `index` (a datagram or a GSO batch) and its segment size.
    fn get(&self, index: usize) -> (&[u8], usize);

    /// The sender of message `index`. Called only for unconnected sockets.
    fn source(&self, index: usize) -> Option<SocketAddr>;

    /// The arrival of message `index`. Called only for the socket of a published port.
    fn arrival(&self, index: usize) -> Arrival;
}

/// Arrival of a datagram at the socket of a published port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// The source address for replies; `None` to let the kernel choose.
    pub local: Option<IpAddr>,
    /// The destination address.
    pub destination: Option<IpAddr>,
    /// The destination is a broadcast or multicast address.
    pub to_group: bool,
    /// The index of the ingress interface; 0 if unknown.
    pub interface: u32,
}

/// Device and sockets of an engine; see the module.
pub trait Host {
    /// A TCP socket.
    type Stream;
    /// A UDP or ping socket; connected unless it is shared.
    type Datagrams;
    /// A listening TCP socket.
    type Listener;
    /// Receive buffer for datagrams.
    type Batch: Batch;

    /// Writes a packet to the guest: the headers, starting with the virtio header, and the payload.
    /// Returns false if the packet is lost.
    fn emit(&mut self, head: &[u8], payload: &[IoSlice<'_>]) -> bool;

    /// Whether `ip` is an address of the host, including loopback.
    fn is_local(&self, ip: IpAddr) -> bool;

    /// Starts to connect a TCP socket.
    ///
    /// # Errors
    /// No descriptor is available (`EMFILE`), or an immediate error of the connect.
    fn connect(&mut self, to: SocketAddr) -> io::Result<Self::Stream>;

    /// Starts to report events of the socket to [`Engine::ready`](crate::engine::Engine::ready)
    /// with `key`. Returns the current readiness: on the same host, a connect may already be
    /// complete.
    ///
    /// # Errors
    /// The socket cannot be added to epoll.
    fn watch_stream(&mut self, stream: &mut Self::Stream, key: Key) -> io::Result<Ready>;

    /// Starts to call [`Engine::port_ready`](crate::engine::Engine::port_ready) with `key` while
    /// clients or datagrams are queued.
    ///
    /// # Errors
    /// The socket cannot be added to epoll.
    fn watch_port(
        &mut self,
        port: &Port<Self::Listener, Self::Datagrams>,
        key: Key,
    ) -> io::Result<()>;

    /// Stops watching `port`. Its queue is kept until it is watched again.
    fn ignore_port(&mut self, port: &Port<Self::Listener, Self::Datagrams>);

    /// Accepts the next client and returns its address.
    ///
    /// # Errors
    /// `WouldBlock` if no client is queued, `EMFILE` if no descriptor is available for it.
    fn accept(&mut self, listener: &mut Self::Listener) -> io::Result<(Self::Stream, SocketAddr)>;

    /// The ingress interface and local address of an accepted connection; `None` if unknown.
    fn ingress(&self, stream: &Self::Stream) -> Option<StreamIngress>;

    /// The result of a connect, or whether an accepted client is still connected.
    ///
    /// # Errors
    /// The connect failed, or the connection is reset.
    fn connect_result(&mut self, stream: &Self::Stream) -> io::Result<()>;

    /// Whether the final ACK of the handshake is still delayed. On a busy engine it is delayed so
    /// that the first payload carries it.
    fn is_handshake_ack_delayed(&self, stream: &Self::Stream) -> bool {
        let _ = stream;
        false
    }

    /// Sends the delayed handshake ACK, in case the remote side sends first.
    fn send_handshake_ack(&mut self, stream: &mut Self::Stream) {
        let _ = stream;
    }

    /// Sends a prefix of `bytes` and returns its length.
    ///
    /// # Errors
    /// `WouldBlock`; any other error means that the connection is broken.
    fn send(&mut self, stream: &mut Self::Stream, bytes: &[u8]) -> io::Result<usize>;

    /// Copies bytes of the receive queue, starting at `offset`, without removing them. Returns 0 at
    /// the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` if no data has arrived yet; any other error means that the connection is
    /// broken.
    fn peek(
        &mut self,
        stream: &mut Self::Stream,
        offset: usize,
        into: &mut [u8],
    ) -> io::Result<usize>;

    /// Removes the first `length` bytes, which were peeked before, from the receive queue.
    ///
    /// # Errors
    /// The connection is broken.
    fn discard(&mut self, stream: &mut Self::Stream, length: usize) -> io::Result<()>;

    /// Sets the size of the receive buffer. Data in the queue is kept.
    fn set_receive_buffer(&mut self, stream: &mut Self::Stream, size: ReceiveBuffer);

    /// Shuts down the sending direction.
    fn shutdown(&mut self, stream: &mut Self::Stream);

    /// Resets the connection.
    fn abort(&mut self, stream: Self::Stream);

    /// Opens a datagram socket, connected unless `kind` is shared.
    ///
    /// # Errors
    /// No descriptor is available (`EMFILE`), there is no route, or ping sockets are not permitted.
    fn open(&mut self, kind: DatagramKind, to: SocketAddr) -> io::Result<Self::Datagrams>;

    /// Like [`watch_stream`](Self::watch_stream).
    ///
    /// # Errors
    /// The socket cannot be added to epoll.
    fn watch_datagrams(&mut self, socket: &Self::Datagrams, key: Key) -> io::Result<()>;

    /// Sends `bytes` to the peer or to `destination`, as datagrams of `segment` bytes; the last one
    /// may be shorter. `dont_fragment` sets DF. A `hop_limit` is given only if that of the guest is
    /// low enough to matter.
    fn send_gso_batch(
        &mut self,
        socket: &mut Self::Datagrams,
        destination: Option<Destination>,
        bytes: &[u8],
        segment: usize,
        dont_fragment: bool,
        hop_limit: Option<u8>,
    ) -> SendOutcome;

    /// Receives queued messages into `batch`, replacing the previous ones.
    ///
    /// # Errors
    /// `WouldBlock` if no message is queued; otherwise an ICMP error, with details in
    /// [`next_socket_error`](Self::next_socket_error).
    fn receive(
        &mut self,
        socket: &mut Self::Datagrams,
        batch: &mut Self::Batch,
    ) -> io::Result<usize>;

    /// Removes one entry from the error queue of the socket.
    fn next_socket_error(&mut self, socket: &mut Self::Datagrams) -> Option<SocketError>;
}
