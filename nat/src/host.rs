//! What the engine needs of the world: a device to write packets to, and sockets on the host's
//! side.
//!
//! It is the seam between logic and I/O. `io` implements it with a TUN device and the kernel's
//! sockets, the simulation with queues in memory; the engine is compiled for each, so that the seam
//! costs no call through a table and no copy. No call may wait: what cannot be done at once is
//! [`WouldBlock`](io::ErrorKind::WouldBlock), and [`Engine::ready`](crate::engine::Engine::ready)
//! tells when to try again.

use crate::wire::icmp::Problem;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use tidegate_reactor::{Key, StreamIngress};

/// What a socket has become ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    /// Data, the end of the stream or an error waits.
    pub readable: bool,
    /// There is room, or a connect is over.
    pub writable: bool,
    /// An error waits, of the socket or in its error queue.
    pub error: bool,
    /// The stream's end has come, or urgent data: a look that brings less than it could does not
    /// mean that nothing is left.
    pub more: bool,
}

/// Which kind of datagram socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatagramKind {
    /// UDP, connected.
    Udp,
    /// UDP, for whoever a datagram is for.
    SharedUdp,
    /// ICMP or ICMPv6 echoes, as the address's family has it (`SOCK_DGRAM` with `IPPROTO_ICMP`).
    Echo,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// It is sent, as far as the kernel tells.
    Sent,
    /// The send buffer is full.
    NoRoom,
    /// A datagram of it may not be cut, and does not fit the path, which takes packets of so many
    /// bytes.
    TooBig(u32),
    /// There is no way there.
    Unreachable(Problem),
}

/// Where a datagram goes whose socket is not connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// There.
    pub to: SocketAddr,
    /// The address of ours that it leaves from, if not the one that the route says.
    pub from: Option<IpAddr>,
}

/// The socket of a published port: one that listens, or one for datagrams.
#[derive(Debug)]
pub enum Port<L, D> {
    /// Of TCP.
    Tcp(L),
    /// Of UDP, not connected.
    Udp(D),
}

/// Something that the network told a datagram socket about an earlier datagram (`IP_RECVERR`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketProblem {
    /// What.
    pub problem: Problem,
    /// Who told, if it was not this host.
    pub offender: Option<IpAddr>,
    /// Where that datagram went, on a socket that is not connected.
    pub destination: Option<SocketAddr>,
    /// The beginning of that datagram's payload.
    pub payload: Vec<u8>,
}

/// Messages received in one call.
pub trait Batch: Default {
    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Message `index`: a datagram, or a GSO batch of them, and the size of each but the last.
    fn get(&self, index: usize) -> (&[u8], usize);

    /// Who sent message `index`; asked only of a socket that is not connected.
    fn source(&self, index: usize) -> Option<SocketAddr>;

    /// How message `index` reached us; asked only of a published port's socket.
    fn arrival(&self, index: usize) -> Arrival;
}

/// How a datagram reached the socket of a published port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// The address of ours to answer from; `None` leaves the choice to the kernel.
    pub local: Option<IpAddr>,
    /// The destination address.
    pub destination: Option<IpAddr>,
    /// The destination is a broadcast or multicast address.
    pub to_group: bool,
    /// The index of the ingress interface; 0 where it is not known.
    pub interface: u32,
}

/// See the module.
pub trait Host {
    /// A TCP socket.
    type Stream;
    /// A UDP or ping socket, connected unless it is shared.
    type Datagrams;
    /// A listening TCP socket.
    type Listener;
    /// What datagrams are received into.
    type Batch: Batch;

    /// Writes one packet to the guest: headers, virtio's first, and payload. False if it is lost.
    fn emit(&mut self, head: &[u8], payload: &[IoSlice<'_>]) -> bool;

    /// Whether an address is this host's own, loopback included.
    fn is_local(&self, ip: IpAddr) -> bool;

    /// Begins to connect.
    ///
    /// # Errors
    /// There is no descriptor left (`EMFILE`), or it is clear at once that there is no way.
    fn connect(&mut self, to: SocketAddr) -> io::Result<Self::Stream>;

    /// From now on [`Engine::ready`](crate::engine::Engine::ready) is called with `key`. Returns
    /// what the socket is ready for already: on one host a connect is over when the call returns.
    ///
    /// # Errors
    /// The kernel watches no more sockets.
    fn watch_stream(&mut self, stream: &mut Self::Stream, key: Key) -> io::Result<Ready>;

    /// From now on [`Engine::port_ready`](crate::engine::Engine::port_ready) is called with `key`
    /// for as long as something waits.
    ///
    /// # Errors
    /// The kernel watches no more sockets.
    fn watch_port(
        &mut self,
        port: &Port<Self::Listener, Self::Datagrams>,
        key: Key,
    ) -> io::Result<()>;

    /// What waits at `port` waits until it is watched again.
    fn ignore_port(&mut self, port: &Port<Self::Listener, Self::Datagrams>);

    /// Takes the next client that waits to be accepted, and tells its address.
    ///
    /// # Errors
    /// `WouldBlock` when nobody waits, `EMFILE` when there is no descriptor left for who does.
    fn accept(&mut self, listener: &mut Self::Listener) -> io::Result<(Self::Stream, SocketAddr)>;

    /// The interface by which a client has connected, and the address of ours; `None` where that is
    /// not known.
    fn ingress(&self, stream: &Self::Stream) -> Option<StreamIngress>;

    /// How a connect ended; of a client that was accepted, whether it is still there.
    ///
    /// # Errors
    /// It failed.
    fn connect_result(&mut self, stream: &Self::Stream) -> io::Result<()>;

    /// Whether the far end may not have heard yet that it is connected: where the engine is busy
    /// that is put off, so that the first bytes carry it.
    fn is_quiet(&self, stream: &Self::Stream) -> bool {
        let _ = stream;
        false
    }

    /// Lets the far end hear it now, which may be the one that is to speak first.
    fn say_hello(&mut self, stream: &mut Self::Stream) {
        let _ = stream;
    }

    /// Sends the beginning of `bytes`, and tells how much of it.
    ///
    /// # Errors
    /// `WouldBlock`; otherwise the connection is broken.
    fn send(&mut self, stream: &mut Self::Stream, bytes: &[u8]) -> io::Result<usize>;

    /// Copies bytes of the receive queue from `offset` on, and leaves them there. 0 is the end of
    /// the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there yet; otherwise the connection is broken.
    fn peek(
        &mut self,
        stream: &mut Self::Stream,
        offset: usize,
        into: &mut [u8],
    ) -> io::Result<usize>;

    /// Takes the first `length` bytes out of the receive queue; they were peeked at before.
    ///
    /// # Errors
    /// The connection is broken.
    fn discard(&mut self, stream: &mut Self::Stream, length: usize) -> io::Result<()>;

    /// Ends our half of the stream.
    fn shutdown(&mut self, stream: &mut Self::Stream);

    /// Resets the connection.
    fn abort(&mut self, stream: Self::Stream);

    /// Opens a datagram socket, connected unless it is to be shared.
    ///
    /// # Errors
    /// There is no descriptor left (`EMFILE`), no route, or no leave to have ping sockets.
    fn open(&mut self, kind: DatagramKind, to: SocketAddr) -> io::Result<Self::Datagrams>;

    /// As [`watch_stream`](Self::watch_stream).
    ///
    /// # Errors
    /// The kernel watches no more sockets.
    fn watch_datagrams(&mut self, socket: &Self::Datagrams, key: Key) -> io::Result<()>;

    /// Sends `bytes`, where the socket is connected to or to `destination`, as datagrams of
    /// `segment` bytes, the last one perhaps shorter. Whether one may be cut on its way says
    /// `dont_fragment`; a `hop_limit` is set where the guest's own is so low that it matters.
    fn send_gso_batch(
        &mut self,
        socket: &mut Self::Datagrams,
        destination: Option<Destination>,
        bytes: &[u8],
        segment: usize,
        dont_fragment: bool,
        hop_limit: Option<u8>,
    ) -> SendOutcome;

    /// Receives what waits, in place of what was in `batch`.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; otherwise what the network told, which
    /// [`next_problem`](Self::next_problem) has in detail.
    fn receive(
        &mut self,
        socket: &mut Self::Datagrams,
        batch: &mut Self::Batch,
    ) -> io::Result<usize>;

    /// Takes one entry out of the socket's error queue.
    fn next_problem(&mut self, socket: &mut Self::Datagrams) -> Option<SocketProblem>;
}
