//! The host's side, by the kernel's sockets.

use super::destinations::Destinations;
use super::sys::{self, SO_PEEK_OFF};
use super::tun::Tun;
use crate::forward::Forward;
use crate::host::{
    Arrival, Batch, DatagramKind, Destination, Host, Port, Ready, SendOutcome, SocketProblem,
};
use crate::layer2::{self, Layer2};
use crate::settings::{Capabilities, Outbound, Settings};
use crate::wire::icmp::Problem;
use crate::wire::{ethernet, virtio};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with, sockopt};
use rustix::time::Timespec;
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use std::io::{self, IoSlice};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::{Feature, Protocol};
use tidegate_netns::AddressBook;
use tidegate_reactor::batch::{self, MAX_SEGMENTS, RecvBatch};
use tidegate_reactor::{
    Descriptors, Epoll, Interest, Key, Permit, PortRange, StreamIngress, Token, begin_connect,
    enable_stream_ingress, revive_listener, says_destroyed, stream_ingress,
};

/// Tag of flows' sockets among the loop's tokens.
pub(super) const FLOW: u8 = 0;

/// Tag of published ports' sockets.
pub(super) const PORT: u8 = 3;

/// The queue of clients that wait to be accepted; the kernel caps it at `net.core.somaxconn`, whose
/// default it is.
const BACKLOG: i32 = 4096;

/// When a silent client is asked whether it is still there, how often, and after how many
/// unanswered questions it is gone: as with ports of the port publisher.
const KEEPALIVE: TcpKeepalive = TcpKeepalive::new()
    .with_time(Duration::from_secs(15))
    .with_interval(Duration::from_secs(15))
    .with_retries(9);

/// Buffers of a session's socket, as the port publisher has them: a batch of GSO batches.
const DATAGRAM_BUFFER: usize = 4 << 20;

/// Payload that may wait in a TCP socket to be read, in bytes (the kernel doubles it for its own
/// bookkeeping). Left to itself, the buffer grows to `tcp_rmem` (6 to 32 MiB) behind a container
/// that has stopped reading, for each of its connections. The price is the window: 1 MiB or a
/// little more for each round trip, as with published ports.
const UNREAD: usize = 1 << 20;

/// How often an error of an earlier datagram may come before this one.
const OLD_ERRORS: usize = 3;

/// TUN device and sockets.
pub(crate) struct Kernel {
    pub(super) tun: OwnedFd,
    /// Around packets, where the device is one of layer 2.
    pub(super) layer2: Option<Box<Layer2>>,
    epoll: Epoll,
    addresses: Arc<AddressBook>,
    descriptors: Arc<Descriptors>,
    capabilities: Capabilities,
    outbound: Outbound,
    bound_buffer: BoundBuffer,
    destinations: Destinations,
    /// The endpoint at hand has more for the engine to do.
    pub(super) crowded: bool,
    /// Where bytes go that are copied once more for want of `SO_PEEK_OFF`.
    skipped: Vec<u8>,
}

/// What fits into one segment on any path, in bytes (RFC 9293 section 3.7.1: 536, less what options
/// take).
const SMALL: usize = 500;

/// What a stream was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// The last segment of the handshake waits for the first bytes.
    NotEvenHello,
    Nothing,
    One,
    WithoutDelay,
}

/// A TCP socket.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    /// Where the kernel's next look begins (`SO_PEEK_OFF`), once that is set: who is sent little
    /// never needs it.
    peek_offset: Option<usize>,
    /// Something was sent, and then Nagle's algorithm switched off: the first piece goes at once in
    /// any case.
    sent: Sent,
    /// What its events carry, once it is watched.
    token: Option<Token>,
    /// Whether room to send is reported.
    watches_room: bool,
    /// It is a client's, and connected from the start.
    accepted: bool,
    _permit: Permit,
}

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    address: SocketAddr,
    _permit: Permit,
}

/// A datagram socket.
#[derive(Debug)]
pub(crate) struct Datagrams {
    socket: OwnedFd,
    v6: bool,
    dont_fragment: Option<bool>,
    hop_limit: Option<u8>,
    /// Larger segments were refused as a batch.
    max_segment: usize,
    _permit: Permit,
}

/// Received messages. Room for them is made when the first come: an empty one, which stands in
/// while they are dealt with, costs nothing.
#[derive(Default)]
pub(crate) struct Received(Option<RecvBatch>);

impl Received {
    fn message(&self, index: usize) -> Option<batch::Datagram<'_>> {
        self.0.as_ref().map(|batch| batch.get(index))
    }
}

impl Batch for Received {
    fn len(&self) -> usize {
        self.0.as_ref().map_or(0, RecvBatch::len)
    }

    fn get(&self, index: usize) -> (&[u8], usize) {
        self.message(index).map_or((&[], 0), |datagram| (datagram.payload, datagram.segment))
    }

    fn source(&self, index: usize) -> Option<SocketAddr> {
        self.message(index)?.source
    }

    fn arrival(&self, index: usize) -> Arrival {
        let Some(datagram) = self.message(index) else { return Arrival::default() };
        Arrival {
            // Nothing can be sent from a multicast address; the kernel selects one then.
            local: datagram.destination.filter(|address| !address.is_multicast()),
            destination: datagram.sent_to,
            to_group: datagram.is_to_group(),
            interface: datagram.interface,
        }
    }
}

/// How a receive buffer is fixed.
#[derive(Clone, Copy, Debug)]
enum BoundBuffer {
    /// With the privilege to pass `net.core.rmem_max`.
    Force,
    /// Within it.
    Ask,
    /// It would become so small that it cost more throughput than the bound is worth: it is left to
    /// the kernel.
    Leave,
}

impl BoundBuffer {
    fn probe() -> Self {
        let Ok(socket) = new_socket(AddressFamily::INET, SocketType::STREAM, None) else {
            return Self::Leave;
        };
        if Self::Force.apply(&socket).is_ok() {
            return Self::Force;
        }
        let asked =
            Self::Ask.apply(&socket).and_then(|()| SockRef::from(&socket).recv_buffer_size());
        // The kernel tells what it has doubled.
        if asked.is_ok_and(|size| size >= 2 * UNREAD) { Self::Ask } else { Self::Leave }
    }

    fn apply(self, socket: &OwnedFd) -> io::Result<()> {
        match self {
            Self::Force => Ok(sockopt::set_socket_recv_buffer_size_force(socket, UNREAD)?),
            Self::Ask => SockRef::from(socket).set_recv_buffer_size(UNREAD),
            Self::Leave => Ok(()),
        }
    }
}

/// What this kernel can do for sockets.
pub(crate) fn probe() -> Capabilities {
    let stream = new_socket(AddressFamily::INET, SocketType::STREAM, None);
    let peek_offset = !Feature::PeekOffset.is_forced_off();
    let peek_offset = peek_offset
        && stream.is_ok_and(|socket| sys::set(socket, libc::SOL_SOCKET, SO_PEEK_OFF, 0).is_ok());
    let datagrams = new_socket(AddressFamily::INET, SocketType::DGRAM, None);
    let udp_gso = !Feature::UdpGso.is_forced_off();
    let udp_gso = udp_gso
        && datagrams.is_ok_and(|socket| {
            sys::set(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
                && batch::enable_receive_offload(&socket).is_ok()
        });
    Capabilities { peek_offset, udp_gso, ..Capabilities::ALL }
}

fn new_socket(
    family: AddressFamily,
    kind: SocketType,
    protocol: Option<rustix::net::Protocol>,
) -> io::Result<OwnedFd> {
    Ok(socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, protocol)?)
}

fn family(of: SocketAddr) -> AddressFamily {
    if of.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

/// Takes `forward`'s port in the calling thread's namespace, so that nobody else has it. No client
/// is answered yet.
pub(crate) fn reserve(forward: &Forward) -> io::Result<OwnedFd> {
    let kind = if forward.protocol == Protocol::Udp { Type::DGRAM } else { Type::STREAM };
    let domain = Domain::for_address(forward.listen);
    let socket = Socket::new(domain, kind.nonblocking().cloexec(), None)?;
    if forward.listen.is_ipv6() {
        // The IPv4 half of a port has a socket of its own.
        socket.set_only_v6(true)?;
    }
    if forward.protocol == Protocol::Tcp {
        // Past connections in TIME_WAIT do not hold the port; a live listener still does.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&forward.listen.into())?;
    Ok(socket.into())
}

fn prepare_stream(socket: &OwnedFd, buffer: BoundBuffer) -> io::Result<()> {
    buffer.apply(socket)?;
    // Urgent data stays where it is in the stream.
    SockRef::from(socket).set_out_of_band_inline(true)
}

/// Whether the last segment of `socket`'s handshake waits for what is sent first, a fifth of a
/// second at most. Asked for before the connect; when it is withdrawn later, that segment leaves
/// (`tcp_rcv_synsent_state_process` and `__tcp_sock_set_quickack`, net/ipv4).
fn put_off_hello(socket: &OwnedFd, put_off: bool) -> io::Result<()> {
    sys::set(socket, libc::IPPROTO_TCP, libc::TCP_QUICKACK, (!put_off).into())
}

/// Binds a socket that goes to `to` to the address that it shall go out from. Its port is chosen
/// when it connects, so that one port serves many far ends.
fn bind_towards(socket: &OwnedFd, outbound: Outbound, to: SocketAddr) -> io::Result<()> {
    let Some(ip) = outbound.towards(to.ip()) else { return Ok(()) };
    sys::set(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    Ok(rustix::net::bind(socket, &SocketAddr::new(ip, 0))?)
}

/// Where `socket` is bound.
pub(crate) fn bound_to(socket: impl AsFd) -> io::Result<SocketAddr> {
    let address = SockRef::from(&socket).local_addr()?;
    address
        .as_socket()
        .filter(|address| address.port() != 0)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Kernel {
    /// Makes `socket` the one of a published port. Clients are answered from here on.
    pub(crate) fn open_port(
        &self,
        forward: &Forward,
        socket: OwnedFd,
    ) -> io::Result<Port<Listener, Datagrams>> {
        let permit = self.permit()?;
        SockRef::from(&socket).set_nonblocking(true)?;
        if forward.protocol == Protocol::Udp {
            let v6 = forward.listen.is_ipv6();
            self.prepare_datagrams(&socket)?;
            batch::enable_packet_info(&socket, v6)?;
            recall_errors(&socket, v6)?;
            return Ok(Port::Udp(self.datagrams(socket, v6, permit)));
        }
        // What a listener is set to, what it accepts is set to as well.
        prepare_stream(&socket, self.bound_buffer)?;
        SockRef::from(&socket).set_tcp_keepalive(&KEEPALIVE)?;
        enable_stream_ingress(&socket, forward.listen.is_ipv6())?;
        rustix::net::listen(&socket, BACKLOG)?;
        let address = SockRef::from(&socket).local_addr()?.as_socket().unwrap_or(forward.listen);
        Ok(Port::Tcp(Listener { socket, address, _permit: permit }))
    }

    fn prepare_datagrams(&self, socket: &OwnedFd) -> io::Result<()> {
        if self.capabilities.udp_gso {
            batch::enable_receive_offload(socket)?;
        }
        if sockopt::set_socket_recv_buffer_size_force(socket, DATAGRAM_BUFFER).is_err() {
            let _ = SockRef::from(socket).set_recv_buffer_size(DATAGRAM_BUFFER);
        }
        let _ = SockRef::from(socket).set_send_buffer_size(DATAGRAM_BUFFER);
        Ok(())
    }

    fn datagrams(&self, socket: OwnedFd, v6: bool, permit: Permit) -> Datagrams {
        Datagrams {
            socket,
            v6,
            dont_fragment: None,
            hop_limit: None,
            max_segment: if self.capabilities.udp_gso { usize::from(u16::MAX) } else { 0 },
            _permit: permit,
        }
    }

    pub(crate) fn new(
        device: Tun,
        epoll: Epoll,
        addresses: Arc<AddressBook>,
        descriptors: Arc<Descriptors>,
        settings: &Settings,
    ) -> Self {
        let Settings { capabilities, outbound, .. } = *settings;
        let bound_buffer = BoundBuffer::probe();
        let Tun { descriptor: tun, layer2, .. } = device;
        Self {
            tun,
            layer2: layer2.map(Box::new),
            epoll,
            addresses,
            descriptors,
            capabilities,
            outbound,
            bound_buffer,
            destinations: Destinations::new(PortRange::of_this_namespace()),
            crowded: false,
            skipped: Vec::new(),
        }
    }

    fn permit(&self) -> io::Result<Permit> {
        self.descriptors.take(1).ok_or_else(|| rustix::io::Errno::MFILE.into())
    }

    fn peek_anew(&mut self, stream: &Stream, offset: usize, into: &mut [u8]) -> io::Result<usize> {
        if self.skipped.len() < offset {
            self.skipped.resize(offset, 0);
        }
        let mut look = || sys::peek_behind(&stream.socket, &mut self.skipped[..offset], into);
        let mut seen = look()?;
        if seen <= offset && offset > 0 {
            // Nothing new. The end shows only in the state, which is looked at first: what came
            // before it is there then.
            if !sys::is_at_end(&stream.socket) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            seen = look()?;
        }
        Ok(seen.saturating_sub(offset))
    }
}

/// Writes a packet with Ethernet's header behind virtio's.
fn emit_frame(tun: &OwnedFd, layer2: &Layer2, head: &[u8], payload: &[IoSlice<'_>]) -> bool {
    let Some((virtio, head)) = head.split_first_chunk::<{ virtio::LENGTH }>() else { return false };
    let mut begin = [0; layer2::HEAD];
    begin[..virtio::LENGTH].copy_from_slice(&virtio::shifted(*virtio, ethernet::LENGTH as u16));
    begin[virtio::LENGTH..].copy_from_slice(&layer2.header(head));
    let mut all = [IoSlice::new(&[]); 2 + MAX_SEGMENTS];
    (all[0], all[1]) = (IoSlice::new(&begin), IoSlice::new(head));
    let count = payload.len().min(MAX_SEGMENTS);
    all[2..2 + count].copy_from_slice(&payload[..count]);
    rustix::io::writev(tun, &all[..2 + count]).is_ok()
}

impl Host for Kernel {
    type Stream = Stream;
    type Datagrams = Datagrams;
    type Listener = Listener;
    type Batch = Received;

    fn emit(&mut self, head: &[u8], payload: &[IoSlice<'_>]) -> bool {
        if let Some(layer2) = &self.layer2 {
            return emit_frame(&self.tun, layer2, head, payload);
        }
        let head = IoSlice::new(head);
        let written = match payload {
            [] => rustix::io::write(&self.tun, &head),
            [one] => rustix::io::writev(&self.tun, &[head, *one]),
            many => {
                let mut all = [IoSlice::new(&[]); 1 + MAX_SEGMENTS];
                all[0] = head;
                let count = many.len().min(MAX_SEGMENTS);
                all[1..=count].copy_from_slice(&many[..count]);
                rustix::io::writev(&self.tun, &all[..=count])
            }
        };
        written.is_ok()
    }

    fn is_local(&self, ip: IpAddr) -> bool {
        self.addresses.is_local(ip)
    }

    fn connect(&mut self, to: SocketAddr) -> io::Result<Stream> {
        let permit = self.permit()?;
        let quiet = self.crowded;
        let make = || {
            let socket = new_socket(family(to), SocketType::STREAM, None)?;
            prepare_stream(&socket, self.bound_buffer)?;
            bind_towards(&socket, self.outbound, to)?;
            if quiet {
                put_off_hello(&socket, true)?;
            }
            Ok(socket)
        };
        let socket = match self.destinations.ports_towards(to) {
            Some(ports) => ports.connect(make, self.outbound.towards(to.ip()), to)?,
            None => {
                let socket = make()?;
                begin_connect(&socket, to)?;
                socket
            }
        };
        Ok(Stream {
            socket,
            peek_offset: None,
            sent: if quiet { Sent::NotEvenHello } else { Sent::Nothing },
            token: None,
            watches_room: false,
            accepted: false,
            _permit: permit,
        })
    }

    fn watch_port(&mut self, port: &Port<Listener, Datagrams>, key: Key) -> io::Result<()> {
        self.epoll.add(descriptor(port), Token::new(PORT, key), Interest::Readable)
    }

    fn ignore_port(&mut self, port: &Port<Listener, Datagrams>) {
        // It is watched, and so can be ignored.
        let _ = self.epoll.remove(descriptor(port));
    }

    fn accept(&mut self, listener: &mut Listener) -> io::Result<(Stream, SocketAddr)> {
        let permit = self.permit()?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let accepted = rustix::net::acceptfrom_with(&listener.socket, flags);
        if let Err(errno) = accepted
            && says_destroyed(&errno.into())
            && revive_listener(&listener.socket, listener.address, None, BACKLOG)?
        {
            tracing::warn!(
                kind = "listener",
                object = %listener.address,
                "removed or changed by other software; restored"
            );
        }
        let (socket, client) = accepted?;
        let client = client.and_then(|client| SocketAddr::try_from(client).ok());
        let client = client.ok_or(io::ErrorKind::ConnectionAborted)?;
        let stream = Stream {
            socket,
            peek_offset: None,
            sent: Sent::Nothing,
            token: None,
            watches_room: false,
            accepted: true,
            _permit: permit,
        };
        Ok((stream, client))
    }

    fn ingress(&self, stream: &Stream) -> Option<StreamIngress> {
        let domain = SockRef::from(&stream.socket).domain().ok()?;
        stream_ingress(&stream.socket, domain == Domain::IPV6).ok()
    }

    fn watch_stream(&mut self, stream: &mut Stream, key: Key) -> io::Result<Ready> {
        if stream.accepted {
            let token = Token::new(FLOW, key);
            stream.token = Some(token);
            self.epoll.add(&stream.socket, token, Interest::InputEdges)?;
            return Ok(Ready { writable: true, ..Ready::default() });
        }
        let mut polled = [PollFd::new(&stream.socket, PollFlags::OUT)];
        let _ = poll(&mut polled, Some(&Timespec::default()));
        let told = polled[0].revents();
        let ready = Ready {
            writable: told.intersects(PollFlags::OUT),
            error: told.intersects(PollFlags::ERR | PollFlags::HUP),
            ..Ready::default()
        };
        // Room is there from the start: to be told of it would be an event for each connection.
        stream.watches_room = !ready.writable;
        let interest = if stream.watches_room { Interest::Edges } else { Interest::InputEdges };
        let token = Token::new(FLOW, key);
        stream.token = Some(token);
        self.epoll.add(&stream.socket, token, interest)?;
        Ok(ready)
    }

    fn connect_result(&mut self, stream: &Stream) -> io::Result<()> {
        SockRef::from(&stream.socket).take_error()?.map_or(Ok(()), Err)
    }

    fn is_quiet(&self, stream: &Stream) -> bool {
        stream.sent == Sent::NotEvenHello
    }

    fn say_hello(&mut self, stream: &mut Stream) {
        if stream.sent == Sent::NotEvenHello {
            stream.sent = Sent::Nothing;
            // Should it fail, the kernel says it after a fifth of a second.
            let _ = put_off_hello(&stream.socket, false);
        }
    }

    fn send(&mut self, stream: &mut Stream, bytes: &[u8]) -> io::Result<usize> {
        if stream.sent != Sent::WithoutDelay {
            // A piece of several segments ends in one that would wait.
            if stream.sent == Sent::One || bytes.len() > SMALL {
                SockRef::from(&stream.socket).set_tcp_nodelay(true)?;
                stream.sent = Sent::WithoutDelay;
            } else {
                stream.sent = Sent::One;
            }
        }
        let sent = sys::send(&stream.socket, bytes);
        let short = sent.as_ref().map_or(true, |sent| *sent < bytes.len());
        if short
            && !stream.watches_room
            && let Some(token) = stream.token
        {
            // What has become free since is reported again.
            self.epoll.modify(&stream.socket, token, Interest::Edges)?;
            stream.watches_room = true;
        }
        sent
    }

    fn peek(&mut self, stream: &mut Stream, offset: usize, into: &mut [u8]) -> io::Result<usize> {
        if !self.capabilities.peek_offset {
            return self.peek_anew(stream, offset, into);
        }
        if stream.peek_offset.unwrap_or(0) != offset {
            sys::set(&stream.socket, libc::SOL_SOCKET, SO_PEEK_OFF, offset as libc::c_int)?;
            stream.peek_offset = Some(offset);
        }
        let seen = sys::peek(&stream.socket, into)?;
        if let Some(offset) = &mut stream.peek_offset {
            *offset += seen;
        }
        Ok(seen)
    }

    fn discard(&mut self, stream: &mut Stream, length: usize) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            match sys::discard(&stream.socket, left)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                taken => left -= taken.min(left),
            }
        }
        // The kernel's offset goes back by what is taken out (sk_peek_offset_bwd,
        // include/net/sock.h).
        if let Some(offset) = &mut stream.peek_offset {
            *offset = offset.saturating_sub(length);
        }
        Ok(())
    }

    fn shutdown(&mut self, stream: &mut Stream) {
        // It fails only on a connection that is broken, which the next read tells.
        let _ = SockRef::from(&stream.socket).shutdown(Shutdown::Write);
    }

    fn abort(&mut self, stream: Stream) {
        // Closed this way, it resets; should that fail, it ends in a FIN behind bytes that are
        // short, or in nothing.
        let _ = SockRef::from(&stream.socket).set_linger(Some(Duration::ZERO));
    }

    fn open(&mut self, kind: DatagramKind, to: SocketAddr) -> io::Result<Datagrams> {
        let permit = self.permit()?;
        let v6 = to.is_ipv6();
        let protocol = match (kind, v6) {
            (DatagramKind::Udp | DatagramKind::SharedUdp, _) => None,
            (DatagramKind::Echo, false) => Some(ipproto::ICMP),
            (DatagramKind::Echo, true) => Some(ipproto::ICMPV6),
        };
        let socket = new_socket(family(to), SocketType::DGRAM, protocol)?;
        if kind != DatagramKind::Echo {
            self.prepare_datagrams(&socket)?;
        }
        recall_errors(&socket, v6)?;
        bind_towards(&socket, self.outbound, to)?;
        if kind != DatagramKind::SharedUdp {
            rustix::net::connect(&socket, &to)?;
        }
        Ok(self.datagrams(socket, v6, permit))
    }

    fn watch_datagrams(&mut self, socket: &Datagrams, key: Key) -> io::Result<()> {
        self.epoll.add(&socket.socket, Token::new(FLOW, key), Interest::InputEdges)
    }

    fn send_gso_batch(
        &mut self,
        socket: &mut Datagrams,
        destination: Option<Destination>,
        bytes: &[u8],
        segment: usize,
        dont_fragment: bool,
        hop_limit: Option<u8>,
    ) -> SendOutcome {
        socket.prepare(dont_fragment, hop_limit);
        if bytes.len() > segment && segment <= socket.max_segment {
            match attempt(|| {
                sys::send_message(&socket.socket, destination, bytes, Some(segment as u16))
            }) {
                Ok(_) => return SendOutcome::Sent,
                // Too long a segment for the path (EINVAL; EMSGSIZE since 6.12), or a device that
                // cannot checksum (EIO, until 6.11): one by one they may pass.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO)
                    ) =>
                {
                    socket.max_segment = segment.saturating_sub(1);
                }
                Err(error) => return socket.outcome(&error),
            }
        }
        let mut outcome = SendOutcome::Sent;
        let mut rest = bytes;
        loop {
            let (datagram, more) = rest.split_at(segment.min(rest.len()));
            if let Err(error) = attempt(|| match destination {
                Some(_) => sys::send_message(&socket.socket, destination, datagram, None),
                None => sys::send(&socket.socket, datagram),
            }) {
                outcome = socket.outcome(&error);
            }
            rest = more;
            if rest.is_empty() {
                return outcome;
            }
        }
    }

    fn receive(&mut self, socket: &mut Datagrams, batch: &mut Received) -> io::Result<usize> {
        batch.0.get_or_insert_default().receive(&socket.socket)
    }

    fn next_problem(&mut self, socket: &mut Datagrams) -> Option<SocketProblem> {
        sys::next_problem(&socket.socket)
    }
}

/// What is watched of a published port.
fn descriptor(port: &Port<Listener, Datagrams>) -> BorrowedFd<'_> {
    match port {
        Port::Tcp(listener) => listener.socket.as_fd(),
        Port::Udp(datagrams) => datagrams.socket.as_fd(),
    }
}

/// Has what the network tells about datagrams kept in the socket's error queue.
fn recall_errors(socket: &OwnedFd, v6: bool) -> io::Result<()> {
    let (level, option) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    } else {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    };
    sys::set(socket, level, option, 1)
}

/// Sends, past the errors of earlier datagrams: each is told once, and this one was not looked at
/// yet.
fn attempt(mut send: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    for _ in 0..OLD_ERRORS {
        match send() {
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(
                        libc::ECONNREFUSED
                            | libc::EHOSTUNREACH
                            | libc::EINTR
                            | libc::EPROTO
                            | libc::EACCES
                    )
                ) => {}
            done => return done,
        }
    }
    send()
}

impl Datagrams {
    /// Sets what differs from the last datagram's.
    fn prepare(&mut self, dont_fragment: bool, hop_limit: Option<u8>) {
        if self.dont_fragment != Some(dont_fragment) {
            let (level, option) = if self.v6 {
                (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
            } else {
                (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
            };
            // IP_PMTUDISC_DO and IP_PMTUDISC_WANT, the same numbers for IPv6.
            let _ = sys::set(&self.socket, level, option, if dont_fragment { 2 } else { 1 });
            self.dont_fragment = Some(dont_fragment);
        }
        if self.hop_limit != hop_limit {
            let (level, option) = if self.v6 {
                (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS)
            } else {
                (libc::IPPROTO_IP, libc::IP_TTL)
            };
            // -1 is the system's default.
            let _ = sys::set(&self.socket, level, option, hop_limit.map_or(-1, i32::from));
            self.hop_limit = hop_limit;
        }
    }

    fn outcome(&self, error: &io::Error) -> SendOutcome {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => SendOutcome::NoRoom,
            Some(libc::EMSGSIZE) => SendOutcome::TooBig(self.path_mtu()),
            Some(libc::ENETUNREACH) => SendOutcome::Unreachable(Problem::NetworkUnreachable),
            Some(libc::EPERM | libc::EACCES) => SendOutcome::Unreachable(Problem::Prohibited),
            // What the error queue tells in detail, and the guest then hears from there.
            _ => SendOutcome::Sent,
        }
    }

    /// What the path takes; of a socket that is not connected, what every path does (RFC 8200
    /// section 5, RFC 791 section 3.1).
    fn path_mtu(&self) -> u32 {
        let (level, option, least) = if self.v6 {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU, 1280)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU, 576)
        };
        sys::get(self.socket.as_fd(), level, option)
            .map_or(least, |mtu| mtu.unsigned_abs().max(least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};
    use std::time::Instant;
    use tidegate_testbed::{Namespace, eventually};

    #[test]
    fn who_listens_hears_of_a_connection_when_it_is_told() {
        Namespace::new().run(|| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            let to = listener.local_addr().unwrap();
            let quiet_until_told = || {
                let socket = new_socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
                put_off_hello(&socket, true).unwrap();
                let begun = Instant::now();
                begin_connect(&socket, to).unwrap();
                let heard = listener.accept().is_ok();
                let in_time = begun.elapsed() < Duration::from_millis(40);
                put_off_hello(&socket, false).unwrap();
                assert!(heard || eventually(Duration::from_secs(5), || listener.accept().is_ok()));
                (!heard, in_time)
            };
            // Whoever was kept from running for so long saw the kernel's own patience end.
            let first = (0..20).map(|_| quiet_until_told()).find(|(_, in_time)| *in_time);
            assert_eq!(first, Some((true, true)));
        });
    }
}
