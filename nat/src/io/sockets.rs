//! [`Host`] implementation with a TUN device and kernel sockets.

use super::destinations::Destinations;
use super::sys::{self, SO_PEEK_OFF};
use super::tun::Tun;
use crate::forward::Forward;
use crate::host::{
    Arrival, Batch, DatagramKind, Destination, Host, Port, Ready, ReceiveBuffer, SendOutcome,
    SocketError,
};
use crate::layer2::{self, Layer2};
use crate::settings::{Capabilities, Outbound, Settings};
use crate::wire::icmp::IcmpError;
use crate::wire::{ethernet, virtio};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, socket_with};
use rustix::time::Timespec;
use socket2::{Domain, SockRef, Socket, Type};
use std::io::{self, IoSlice};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::{Feature, Protocol};
use tidegate_netns::AddressBook;
use tidegate_reactor::batch::{self, MAX_SEGMENTS, RecvBatch};
use tidegate_reactor::{
    BACKLOG, Descriptors, Epoll, Interest, KEEPALIVE, Key, Permit, PortRange, StreamIngress, Token,
    UNSENT_WIDE, accept_only_from_loopback, begin_connect, enable_stream_ingress,
    enlarge_datagram_buffers, narrow_receive_buffer, revive_listener, says_destroyed, set_number,
    stream_ingress, widen_receive_buffer,
};

/// Token tag of flow sockets.
pub(super) const FLOW: u8 = 0;

/// Token tag of published port sockets.
pub(super) const PORT: u8 = 3;

/// Maximum number of pending errors of earlier datagrams to skip per send.
const MAX_PENDING_ERRORS: usize = 3;

/// TUN device and sockets of the host.
pub(crate) struct Kernel {
    pub(super) tun: OwnedFd,
    /// Ethernet emulation for a layer 2 device.
    pub(super) layer2: Option<Box<Layer2>>,
    epoll: Epoll,
    addresses: Arc<AddressBook>,
    descriptors: Arc<Descriptors>,
    capabilities: Capabilities,
    outbound: Outbound,
    destinations: Destinations,
    /// The current endpoint is busy, so handshake ACKs are delayed.
    pub(super) delay_handshake_acks: bool,
    /// Buffer for bytes that must be copied again without `SO_PEEK_OFF`.
    skipped: Vec<u8>,
}

/// Payload that fits one segment on any path, in bytes (RFC 9293 section 3.7.1: 536, minus
/// options).
const MIN_PATH_PAYLOAD: usize = 500;

/// Send state of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SendState {
    /// The final handshake ACK is delayed until the first payload.
    HandshakeAckDelayed,
    Unsent,
    SentOnce,
    NoDelay,
}

/// A TCP socket of the host.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    /// Current peek offset (`SO_PEEK_OFF`), once set. Short connections never need it.
    peek_offset: Option<usize>,
    /// Nagle's algorithm is disabled after the first send, because the first segment is sent
    /// immediately in any case.
    sent: SendState,
    /// Token of its events, once watched.
    token: Option<Token>,
    watches_writable: bool,
    /// The socket was accepted from a client, and is connected from the start.
    accepted: bool,
    _permit: Permit,
}

#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    address: SocketAddr,
    _permit: Permit,
}

#[derive(Debug)]
pub(crate) struct Datagrams {
    socket: OwnedFd,
    v6: bool,
    dont_fragment: Option<bool>,
    hop_limit: Option<u8>,
    /// Maximum segment size for GSO batches; larger ones were rejected.
    max_segment: usize,
    _permit: Permit,
}

/// Received messages. The buffer is allocated on first use, so the empty placeholder during
/// processing costs nothing.
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
            // A multicast address cannot be a source address; the kernel selects one.
            local: datagram.destination.filter(|address| !address.is_multicast()),
            destination: datagram.sent_to,
            to_group: datagram.is_to_group(),
            interface: datagram.interface,
        }
    }
}

/// Probes socket features of the kernel.
pub(crate) fn probe() -> Capabilities {
    let stream = new_socket(AddressFamily::INET, SocketType::STREAM, None);
    let peek_offset = !Feature::PeekOffset.is_forced_off();
    let peek_offset = peek_offset
        && stream.is_ok_and(|socket| set_number(socket, libc::SOL_SOCKET, SO_PEEK_OFF, 0).is_ok());
    let datagrams = new_socket(AddressFamily::INET, SocketType::DGRAM, None);
    let udp_gso = !Feature::UdpGso.is_forced_off();
    let udp_gso = udp_gso
        && datagrams.is_ok_and(|socket| {
            set_number(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok()
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

/// Binds a port for [`Nat::publish_on`](crate::Nat::publish_on) in the namespace of the calling
/// thread. It does not serve clients yet.
///
/// # Errors
/// Errors of bind(2).
pub fn reserve_port(protocol: Protocol, listen: SocketAddr) -> io::Result<OwnedFd> {
    let kind = if protocol == Protocol::Udp { Type::DGRAM } else { Type::STREAM };
    let domain = Domain::for_address(listen);
    let socket = Socket::new(domain, kind.nonblocking().cloexec(), None)?;
    if listen.is_ipv6() {
        // The IPv4 part of a port has its own socket.
        socket.set_only_v6(true)?;
    }
    if protocol == Protocol::Tcp {
        // Ignores connections in TIME_WAIT, but not an active listener.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&listen.into())?;
    if let Err(error) = accept_only_from_loopback(&socket, listen.ip()) {
        tracing::debug!(%listen, %error, "socket not bound to the loopback interface");
    }
    Ok(socket.into())
}

fn prepare_stream(socket: &OwnedFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_notsent_lowat(UNSENT_WIDE)?;
    // Keeps urgent data in the stream.
    socket.set_out_of_band_inline(true)
}

/// Sets whether the final ACK of the handshake is delayed until the first payload, for at most 200
/// ms. Must be set before connect(2). Clearing it later sends the ACK
/// (`tcp_rcv_synsent_state_process` and `__tcp_sock_set_quickack`, net/ipv4).
fn delay_handshake_ack(socket: &OwnedFd, delayed: bool) -> io::Result<()> {
    set_number(socket, libc::IPPROTO_TCP, libc::TCP_QUICKACK, (!delayed).into())
}

/// Binds a socket for `to` to its configured source address. The port is chosen at connect(2), so
/// one port can serve several destinations.
fn bind_towards(socket: &OwnedFd, outbound: Outbound, to: SocketAddr) -> io::Result<()> {
    let Some(ip) = outbound.source_for(to.ip()) else { return Ok(()) };
    set_number(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    Ok(rustix::net::bind(socket, &SocketAddr::new(ip, 0))?)
}

/// Returns the bound address of `socket`.
pub(crate) fn bound_to(socket: impl AsFd) -> io::Result<SocketAddr> {
    let address = SockRef::from(&socket).local_addr()?;
    address
        .as_socket()
        .filter(|address| address.port() != 0)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Kernel {
    /// Turns `socket` into the socket of a published port, which serves clients from now on.
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
            enable_error_queue(&socket, v6)?;
            return Ok(Port::Udp(self.datagrams(socket, v6, permit)));
        }
        // Accepted sockets inherit the options of the listener.
        prepare_stream(&socket)?;
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
        enlarge_datagram_buffers(socket);
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
        let Tun { descriptor: tun, layer2, .. } = device;
        Self {
            tun,
            layer2: layer2.map(Box::new),
            epoll,
            addresses,
            descriptors,
            capabilities,
            outbound,
            destinations: Destinations::new(PortRange::of_this_namespace()),
            delay_handshake_acks: false,
            skipped: Vec::new(),
        }
    }

    fn permit(&self) -> io::Result<Permit> {
        self.descriptors.take(1).ok_or_else(|| rustix::io::Errno::MFILE.into())
    }

    fn peek_without_offset(
        &mut self,
        stream: &Stream,
        offset: usize,
        into: &mut [u8],
    ) -> io::Result<usize> {
        if self.skipped.len() < offset {
            self.skipped.resize(offset, 0);
        }
        let mut peek = || sys::peek_behind(&stream.socket, &mut self.skipped[..offset], into);
        let mut seen = peek()?;
        if seen <= offset && offset > 0 {
            // No new data. Only the state shows the end of the stream. It is checked before the
            // second peek, so that no earlier data is missed.
            if !sys::is_at_end(&stream.socket) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            seen = peek()?;
        }
        Ok(seen.saturating_sub(offset))
    }
}

/// Writes a packet with an Ethernet header after the virtio header.
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
        let delay_ack = self.delay_handshake_acks;
        let make = || {
            let socket = new_socket(family(to), SocketType::STREAM, None)?;
            prepare_stream(&socket)?;
            bind_towards(&socket, self.outbound, to)?;
            if delay_ack {
                delay_handshake_ack(&socket, true)?;
            }
            Ok(socket)
        };
        let socket = match self.destinations.ports_towards(to) {
            Some(ports) => ports.connect(make, self.outbound.source_for(to.ip()), to)?,
            None => {
                let socket = make()?;
                begin_connect(&socket, to)?;
                socket
            }
        };
        Ok(Stream {
            socket,
            peek_offset: None,
            sent: if delay_ack { SendState::HandshakeAckDelayed } else { SendState::Unsent },
            token: None,
            watches_writable: false,
            accepted: false,
            _permit: permit,
        })
    }

    fn watch_port(&mut self, port: &Port<Listener, Datagrams>, key: Key) -> io::Result<()> {
        self.epoll.add(descriptor(port), Token::new(PORT, key), Interest::Readable)
    }

    fn ignore_port(&mut self, port: &Port<Listener, Datagrams>) {
        // Removal succeeds because the port is watched.
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
                "destroyed by other software; restored"
            );
        }
        let (socket, client) = accepted?;
        let client = client.and_then(|client| SocketAddr::try_from(client).ok());
        let client = client.ok_or(io::ErrorKind::ConnectionAborted)?;
        let stream = Stream {
            socket,
            peek_offset: None,
            sent: SendState::Unsent,
            token: None,
            watches_writable: false,
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
        let revents = polled[0].revents();
        let ready = Ready {
            writable: revents.intersects(PollFlags::OUT),
            error: revents.intersects(PollFlags::ERR | PollFlags::HUP),
            ..Ready::default()
        };
        // A new socket is writable, so watching for it would cause an event per connection.
        stream.watches_writable = !ready.writable;
        let interest = if stream.watches_writable { Interest::Edges } else { Interest::InputEdges };
        let token = Token::new(FLOW, key);
        stream.token = Some(token);
        self.epoll.add(&stream.socket, token, interest)?;
        Ok(ready)
    }

    fn connect_result(&mut self, stream: &Stream) -> io::Result<()> {
        SockRef::from(&stream.socket).take_error()?.map_or(Ok(()), Err)
    }

    fn is_handshake_ack_delayed(&self, stream: &Stream) -> bool {
        stream.sent == SendState::HandshakeAckDelayed
    }

    fn send_handshake_ack(&mut self, stream: &mut Stream) {
        if stream.sent == SendState::HandshakeAckDelayed {
            stream.sent = SendState::Unsent;
            // On failure, the kernel sends the ACK after 200 ms.
            let _ = delay_handshake_ack(&stream.socket, false);
        }
    }

    fn send(&mut self, stream: &mut Stream, bytes: &[u8]) -> io::Result<usize> {
        if stream.sent != SendState::NoDelay {
            // With several segments, Nagle's algorithm would delay the last one.
            if stream.sent == SendState::SentOnce || bytes.len() > MIN_PATH_PAYLOAD {
                SockRef::from(&stream.socket).set_tcp_nodelay(true)?;
                stream.sent = SendState::NoDelay;
            } else {
                stream.sent = SendState::SentOnce;
            }
        }
        let sent = sys::send(&stream.socket, bytes);
        let short = sent.as_ref().map_or(true, |sent| *sent < bytes.len());
        if short
            && !stream.watches_writable
            && let Some(token) = stream.token
        {
            // If space has become free meanwhile, epoll reports it again.
            self.epoll.modify(&stream.socket, token, Interest::Edges)?;
            stream.watches_writable = true;
        }
        sent
    }

    fn peek(&mut self, stream: &mut Stream, offset: usize, into: &mut [u8]) -> io::Result<usize> {
        if !self.capabilities.peek_offset {
            return self.peek_without_offset(stream, offset, into);
        }
        if stream.peek_offset.unwrap_or(0) != offset {
            set_number(&stream.socket, libc::SOL_SOCKET, SO_PEEK_OFF, offset as libc::c_int)?;
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
        // The kernel reduces its offset by the removed bytes (sk_peek_offset_bwd,
        // include/net/sock.h).
        if let Some(offset) = &mut stream.peek_offset {
            *offset = offset.saturating_sub(length);
        }
        Ok(())
    }

    fn set_receive_buffer(&mut self, stream: &mut Stream, size: ReceiveBuffer) {
        match size {
            ReceiveBuffer::Narrow => narrow_receive_buffer(&stream.socket),
            ReceiveBuffer::Wide => widen_receive_buffer(&stream.socket),
        }
    }

    fn shutdown(&mut self, stream: &mut Stream) {
        // Fails only on a broken connection, which the next read reports.
        let _ = SockRef::from(&stream.socket).shutdown(Shutdown::Write);
    }

    fn abort(&mut self, stream: Stream) {
        // Closing the socket now sends a reset. On failure, the stream ends with a FIN after
        // missing bytes, or not at all.
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
        enable_error_queue(&socket, v6)?;
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
        let destination = destination.map(|destination| batch::Destination {
            to: destination.to,
            from: destination.from.map(|address| (address, 0)),
        });
        if bytes.len() > segment && segment <= socket.max_segment {
            match send_past_errors(|| {
                batch::send_message(
                    &socket.socket,
                    destination.as_ref(),
                    bytes,
                    Some(segment as u16),
                )
            }) {
                Ok(_) => return SendOutcome::Sent,
                // The segment exceeds the path MTU (EINVAL; EMSGSIZE since 6.12), or the device has
                // no checksum offload (EIO, until 6.11). Single datagrams may still succeed.
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
            if let Err(error) = send_past_errors(|| match destination {
                Some(_) => {
                    batch::send_message(&socket.socket, destination.as_ref(), datagram, None)
                }
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

    fn next_socket_error(&mut self, socket: &mut Datagrams) -> Option<SocketError> {
        sys::next_socket_error(&socket.socket)
    }
}

/// The watched descriptor of a published port.
fn descriptor(port: &Port<Listener, Datagrams>) -> BorrowedFd<'_> {
    match port {
        Port::Tcp(listener) => listener.socket.as_fd(),
        Port::Udp(datagrams) => datagrams.socket.as_fd(),
    }
}

/// Enables the error queue of the socket for ICMP errors.
fn enable_error_queue(socket: &OwnedFd, v6: bool) -> io::Result<()> {
    let (level, option) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_RECVERR)
    } else {
        (libc::IPPROTO_IP, libc::IP_RECVERR)
    };
    set_number(socket, level, option, 1)
}

/// Calls `send`, and retries after pending errors of earlier datagrams. The kernel reports each
/// error once, before it processes the current datagram.
fn send_past_errors(mut send: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    for _ in 0..MAX_PENDING_ERRORS {
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
    /// Updates socket options that differ from the previous datagram.
    fn prepare(&mut self, dont_fragment: bool, hop_limit: Option<u8>) {
        if self.dont_fragment != Some(dont_fragment) {
            let (level, option) = if self.v6 {
                (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER)
            } else {
                (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER)
            };
            // IP_PMTUDISC_DO and IP_PMTUDISC_WANT; the IPv6 constants are equal.
            let _ = set_number(&self.socket, level, option, if dont_fragment { 2 } else { 1 });
            self.dont_fragment = Some(dont_fragment);
        }
        if self.hop_limit != hop_limit {
            let (level, option) = if self.v6 {
                (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS)
            } else {
                (libc::IPPROTO_IP, libc::IP_TTL)
            };
            // -1 selects the system default.
            let _ = set_number(&self.socket, level, option, hop_limit.map_or(-1, i32::from));
            self.hop_limit = hop_limit;
        }
    }

    fn outcome(&self, error: &io::Error) -> SendOutcome {
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => SendOutcome::NoRoom,
            Some(libc::EMSGSIZE) => SendOutcome::TooBig(self.path_mtu()),
            Some(libc::ENETUNREACH) => SendOutcome::Unreachable(IcmpError::NetworkUnreachable),
            Some(libc::EPERM | libc::EACCES) => SendOutcome::Unreachable(IcmpError::Prohibited),
            // The error queue provides the details, which are forwarded to the guest.
            _ => SendOutcome::Sent,
        }
    }

    /// The path MTU. For an unconnected socket, the minimum that every path supports (RFC 8200
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
    fn a_listener_sees_a_connection_when_its_delayed_ack_is_sent() {
        Namespace::new().run(|| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            let to = listener.local_addr().unwrap();
            let hidden_until_acked = || {
                let socket = new_socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
                delay_handshake_ack(&socket, true).unwrap();
                let begun = Instant::now();
                begin_connect(&socket, to).unwrap();
                let heard = listener.accept().is_ok();
                let in_time = begun.elapsed() < Duration::from_millis(40);
                delay_handshake_ack(&socket, false).unwrap();
                assert!(heard || eventually(Duration::from_secs(5), || listener.accept().is_ok()));
                (!heard, in_time)
            };
            // If the test was not scheduled for that long, the kernel has sent the ACK by itself.
            let first = (0..20).map(|_| hidden_until_acked()).find(|(_, in_time)| *in_time);
            assert_eq!(first, Some((true, true)));
        });
    }
}
