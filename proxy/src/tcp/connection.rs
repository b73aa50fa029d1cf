//! A proxied connection and the transfer of payload in its two halves.

use super::{
    COPY_BYTES, Dial, FAST_WINDOW, FIX_AFTER, Holder, NARROW_BYTES, READS_PER_TURN, Reservation,
    SPLICE_BYTES, WIDE_BYTES, WIDEN_AFTER,
};
use crate::listener::{narrow, widen};
use crate::port::{Port, Tally};
use crate::side::{PerSide, Side};
use crate::upstream::{BackendId, Lease};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use tidegate_model::{Direction, PerDirection, canonical};
use tidegate_reactor::{Interest, Links, Loan, PipePool, Readiness, Splice, narrow_receive_buffer};

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The connect to the backend is in progress.
    Dialling {
        /// When the connect started.
        since: Instant,
        /// When the dial times out.
        deadline: Instant,
    },
    /// Payload may be transferred.
    Open {
        /// When the backend was connected.
        since: Instant,
    },
}

/// Result of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing to do until the next event.
    Wait,
    /// The turn has used up its reads, and more payload is available.
    Again,
    /// EOF was forwarded in both directions.
    Done,
    /// The connection has failed.
    Broken,
}

/// Buffers of a loop, lent to the connection that has its turn.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) buffer: Box<[u8]>,
    pub(crate) pipes: PipePool,
    /// Size of a read in bytes from which the next read is spliced.
    splice_from: usize,
}

impl Scratch {
    pub(crate) fn new(pipes: PipePool, splice_from: usize) -> Self {
        Self { buffer: Box::default(), pipes, splice_from }
    }
}

/// Payload that was read and is not delivered yet.
#[derive(Debug)]
enum Buffered {
    Nothing,
    Copied { bytes: Box<[u8]>, delivered: usize },
    Piped(Loan),
}

/// One direction of a connection.
#[derive(Debug)]
struct Half {
    buffered: Buffered,
    /// The last read was large enough to splice the next one.
    read_was_large: bool,
    /// The source may be readable.
    readable: bool,
    /// The source has closed its write side: read until EOF.
    closing: bool,
    /// Do not splice, and do not treat a short read as an empty socket. Set when there is urgent
    /// data: reads stop at its mark, and splice(2) returns 0 there as at EOF (`tcp_read_sock`,
    /// net/ipv4/tcp.c). Also set after splice(2) has returned 0, because only a read can tell
    /// whether that was EOF.
    copy_only: bool,
    /// EOF was read from the source.
    eof_read: bool,
    /// The sink may be writable.
    writable: bool,
    /// EOF was forwarded to the sink.
    eof_forwarded: bool,
    /// The half has large socket buffers and is charged for them.
    wide: bool,
    /// The receive buffer is fixed, so the kernel does not change it.
    receive_fixed: bool,
    /// Bytes charged to the budget.
    charged: usize,
    /// Payload in bytes delivered since `counted_from`, and whether the half was blocked since
    /// then.
    delivered: u64,
    counted_from: Instant,
    was_blocked: bool,
}

impl Half {
    fn new(now: Instant) -> Self {
        Self {
            buffered: Buffered::Nothing,
            read_was_large: false,
            readable: false,
            closing: false,
            copy_only: false,
            eof_read: false,
            writable: false,
            eof_forwarded: false,
            wide: false,
            receive_fixed: false,
            charged: 0,
            delivered: 0,
            counted_from: now,
            was_blocked: false,
        }
    }

    /// Whether payload waits for the sink to become writable.
    fn is_blocked(&self) -> bool {
        !self.writable && !matches!(self.buffered, Buffered::Nothing)
    }
}

/// Request of a half to change its charge on the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Become wide.
    Widen,
    /// Charge a narrow half that is blocked.
    Hold,
    /// Release the charge of a narrow half that is no longer blocked.
    Release,
}

/// The connection of a client and the connection to its backend.
pub(crate) struct Connection<T = AtomicU64> {
    sockets: PerSide<OwnedFd>,
    /// `In` reads from the client, `Out` from the backend.
    halves: PerDirection<Half>,
    /// Whether an error event was reported.
    failed: PerSide<bool>,
    /// The registered epoll interest; `None` before registration.
    watched: PerSide<Option<Interest>>,
    /// A read or write has failed, so a read of zero bytes no longer means EOF.
    broken: bool,
    pub(crate) phase: Phase,
    /// While dialling, if the upstream has several backends.
    pub(crate) dial: Option<Box<Dial>>,
    /// The backend that has accepted, if the upstream has several.
    pub(crate) backend: Option<BackendId>,
    pub(crate) port: Arc<Port<T>>,
    /// Whether the connection is in the run queue of the loop.
    pub(crate) queued: bool,
    /// Links in the list of its holder, and when it was last moved to the end of that list.
    pub(crate) links: Links,
    pub(crate) reordered: Instant,
    /// Links in the list of connections with a wide half, and whether it is in that list.
    pub(crate) wide_links: Links,
    pub(crate) is_listed_wide: bool,
    /// Payload was delivered since the last [`Self::take_progress`].
    progressed: bool,
    lease: Option<Lease>,
    reservation: Reservation,
}

impl<T: Tally> Connection<T> {
    /// Creates a connection in `phase`. `header` is sent to the backend before any payload.
    pub(crate) fn new(
        client: OwnedFd,
        backend: OwnedFd,
        phase: Phase,
        port: Arc<Port<T>>,
        header: Option<Vec<u8>>,
        lease: Option<Lease>,
        reservation: Reservation,
    ) -> Self {
        let (Phase::Dialling { since, .. } | Phase::Open { since }) = phase;
        let mut halves = PerDirection::new(|_| Half::new(since));
        // An accepted socket is writable.
        halves[Direction::Out].writable = true;
        if let Some(header) = header {
            halves[Direction::In].buffered =
                Buffered::Copied { bytes: header.into_boxed_slice(), delivered: 0 };
        }
        Self {
            sockets: PerSide { client, backend },
            halves,
            failed: PerSide::default(),
            watched: PerSide::default(),
            broken: false,
            phase,
            dial: None,
            backend: None,
            port,
            queued: false,
            links: Links::default(),
            reordered: since,
            wide_links: Links::default(),
            is_listed_wide: false,
            progressed: false,
            lease,
            reservation,
        }
    }

    /// The client and port that the connection counts for.
    pub(crate) fn holder(&self) -> Holder {
        self.reservation.holder()
    }

    /// Returns the address of the client. `None` if it has reset the connection.
    pub(crate) fn client_ip(&self) -> Option<IpAddr> {
        let address = rustix::net::getpeername(&self.sockets[Side::Client]).ok()??;
        Some(canonical(SocketAddr::try_from(address).ok()?).ip())
    }

    /// Returns whether payload was delivered since the last call.
    pub(crate) fn take_progress(&mut self) -> bool {
        std::mem::take(&mut self.progressed)
    }

    pub(crate) fn socket(&self, side: Side) -> &OwnedFd {
        &self.sockets[side]
    }

    /// Exchanges the backend socket and its lease, while no readiness of it is recorded.
    pub(crate) fn swap_backend(&mut self, socket: &mut OwnedFd, lease: &mut Option<Lease>) {
        std::mem::swap(&mut self.sockets[Side::Backend], socket);
        std::mem::swap(&mut self.lease, lease);
    }

    /// Whether the socket of `side` is registered with epoll.
    pub(crate) fn is_registered(&self, side: Side) -> bool {
        self.watched[side].is_some()
    }

    /// Records the readiness of one side.
    pub(crate) fn record_readiness(&mut self, side: Side, readiness: Readiness) {
        let (reads, writes) = match side {
            Side::Client => (Direction::In, Direction::Out),
            Side::Backend => (Direction::Out, Direction::In),
        };
        let source = &mut self.halves[reads];
        source.readable |= readiness.is_readable();
        source.closing |= readiness.is_read_closed();
        source.copy_only |= readiness.is_urgent();
        self.halves[writes].writable |= readiness.is_writable();
        self.failed[side] |= readiness.is_error();
    }

    /// Whether a half is blocked on `side`, but epoll does not report writability of that side yet.
    pub(crate) fn must_watch_writable(&self, side: Side) -> bool {
        self.watched[side] == Some(Interest::InputEdges) && self.is_blocked_towards(side)
    }

    /// Returns the epoll interest for `side` and records it. A socket becomes writable when its
    /// connect completes.
    pub(crate) fn interest(&mut self, side: Side) -> Interest {
        let dialling = side == Side::Backend && matches!(self.phase, Phase::Dialling { .. });
        let for_room = dialling || self.is_blocked_towards(side);
        *self.watched[side].insert(if for_room { Interest::Edges } else { Interest::InputEdges })
    }

    fn is_blocked_towards(&self, side: Side) -> bool {
        let half = match side {
            Side::Client => &self.halves[Direction::Out],
            Side::Backend => &self.halves[Direction::In],
        };
        half.is_blocked()
    }

    /// Returns the request of the half of `direction` after its last turn.
    pub(crate) fn claim(&mut self, direction: Direction, now: Instant) -> Option<Claim> {
        let half = &mut self.halves[direction];
        let blocked = half.is_blocked();
        half.was_blocked |= blocked;
        if half.wide {
            return None;
        }
        if half.delivered >= WIDEN_AFTER {
            let fast = !half.was_blocked || now < half.counted_from + FAST_WINDOW;
            (half.delivered, half.counted_from, half.was_blocked) = (0, now, blocked);
            if fast {
                return Some(Claim::Widen);
            }
        }
        match (blocked, half.charged > 0) {
            (true, false) => Some(Claim::Hold),
            (false, true) => Some(Claim::Release),
            _ => None,
        }
    }

    /// Makes the half of `direction` wide, charged with [`WIDE_BYTES`].
    pub(crate) fn widen(&mut self, direction: Direction) {
        let (source, sink) = self.ends(direction);
        widen(source, sink);
        let half = &mut self.halves[direction];
        (half.wide, half.receive_fixed, half.charged) = (true, true, WIDE_BYTES);
    }

    /// Makes the half of `direction` narrow. Returns its new charge in bytes, which is what it
    /// still holds.
    pub(crate) fn narrow(&mut self, direction: Direction) -> usize {
        let (source, sink) = self.ends(direction);
        narrow(source, sink);
        let unread = rustix::io::ioctl_fionread(source).unwrap_or(0) as usize;
        let half = &mut self.halves[direction];
        (half.wide, half.receive_fixed) = (false, true);
        (half.delivered, half.was_blocked) = (0, false);
        let held = match &half.buffered {
            Buffered::Nothing => 0,
            Buffered::Copied { .. } => NARROW_BYTES,
            Buffered::Piped(pipe) => NARROW_BYTES + pipe.held(),
        };
        half.charged = (held + unread).min(WIDE_BYTES);
        half.charged
    }

    /// Fixes the receive buffer of the half of `direction`, which is blocked. Otherwise the kernel
    /// would grow that buffer up to `tcp_rmem`.
    pub(crate) fn limit_receive_buffer(&mut self, direction: Direction) {
        if !std::mem::replace(&mut self.halves[direction].receive_fixed, true) {
            let (source, _) = self.ends(direction);
            narrow_receive_buffer(source);
        }
    }

    /// Sets the charge of the half of `direction` in bytes. Returns the previous charge.
    pub(crate) fn charge(&mut self, direction: Direction, bytes: usize) -> usize {
        std::mem::replace(&mut self.halves[direction].charged, bytes)
    }

    /// The charge of the half of `direction` in bytes.
    pub(crate) fn charged(&self, direction: Direction) -> usize {
        self.halves[direction].charged
    }

    pub(crate) fn is_wide(&self, direction: Direction) -> bool {
        self.halves[direction].wide
    }

    /// Whether either half is blocked.
    pub(crate) fn is_blocked(&self) -> bool {
        self.halves.values().into_iter().any(Half::is_blocked)
    }

    pub(crate) fn reservation(&mut self) -> &mut Reservation {
        &mut self.reservation
    }

    fn ends(&self, direction: Direction) -> (&OwnedFd, &OwnedFd) {
        let PerSide { client, backend } = &self.sockets;
        match direction {
            Direction::In => (client, backend),
            Direction::Out => (backend, client),
        }
    }

    /// Whether an error event was reported for `side`.
    pub(crate) fn has_failed(&self, side: Side) -> bool {
        self.failed[side]
    }

    /// Transfers available payload in both directions.
    pub(crate) fn turn(&mut self, scratch: &mut Scratch) -> Turn {
        // Allocated on first use: most published ports are idle, and under docker-proxy each has
        // its own process.
        if scratch.buffer.is_empty() {
            scratch.buffer = vec![0; COPY_BYTES].into_boxed_slice();
        }
        let mut again = false;
        self.broken |= self.failed.client || self.failed.backend;
        for direction in Direction::ALL {
            match self.advance(direction, scratch) {
                Ok(more) => again |= more,
                // The other direction may still have payload to forward, such as the response of a
                // server that closed the connection in the middle of a request.
                Err(_) => self.broken = true,
            }
        }
        if again {
            return Turn::Again;
        }
        if self.broken {
            return Turn::Broken;
        }
        if self
            .halves
            .values()
            .into_iter()
            .all(|half| half.eof_read && matches!(half.buffered, Buffered::Nothing))
        {
            return Turn::Done;
        }
        Turn::Wait
    }

    /// Transfers payload in one direction until the source is empty, the sink is full, or the reads
    /// of the turn are used up. Returns true in the last case.
    fn advance(&mut self, direction: Direction, scratch: &mut Scratch) -> io::Result<bool> {
        let PerSide { client, backend } = &self.sockets;
        let (source, sink) = match direction {
            Direction::In => (client, backend),
            Direction::Out => (backend, client),
        };
        let other_ended = self.halves[direction.opposite()].eof_forwarded;
        let half = &mut self.halves[direction];
        let stats = &self.port.stats;
        let mut reads = READS_PER_TURN;
        loop {
            if !matches!(half.buffered, Buffered::Nothing) {
                if !half.writable {
                    return Ok(false);
                }
                let delivered = half.deliver(sink, &mut scratch.pipes)?;
                self.progressed |= delivered > 0;
                half.delivered += delivered;
                stats.add_bytes(direction, delivered);
                continue;
            }
            if half.eof_read {
                if self.broken {
                    return Err(Errno::CONNRESET.into());
                }
                // If the other half has finished as well, close(2) sends the FIN.
                if !half.eof_forwarded && !other_ended {
                    shut_down(sink)?;
                }
                half.eof_forwarded = true;
                return Ok(false);
            }
            if !half.readable {
                return Ok(false);
            }
            if reads == 0 {
                return Ok(true);
            }
            reads -= 1;
            if half.delivered >= FIX_AFTER && !std::mem::replace(&mut half.receive_fixed, true) {
                narrow_receive_buffer(source);
            }
            if (half.read_was_large && half.wide || scratch.splice_from == 0)
                && !half.copy_only
                && let Some(pipe) = scratch.pipes.obtain()
            {
                half.splice(source, pipe, scratch)?;
            } else {
                let delivered = half.copy(source, sink, scratch)?;
                self.progressed |= delivered > 0;
                half.delivered += delivered;
                stats.add_bytes(direction, delivered);
            }
        }
    }

    /// Resets both sides. Payload that they have not read is discarded, as a reset requires.
    pub(crate) fn reset(self, pipes: &mut PipePool) {
        reset_on_close(&self.sockets.client);
        reset_on_close(&self.sockets.backend);
        self.close(pipes);
    }

    /// Closes both sockets: the kernel delivers sent data and then a FIN. Pipes return to the pool.
    pub(crate) fn close(self, pipes: &mut PipePool) {
        for half in [self.halves.inbound, self.halves.outbound] {
            if let Buffered::Piped(pipe) = half.buffered {
                pipes.release(pipe);
            }
        }
        if let Some(dial) = self.dial {
            dial.abort();
        }
    }

    /// Resets the client of a connection that never reached its backend.
    pub(crate) fn refuse(self, pipes: &mut PipePool) {
        reset_on_close(&self.sockets[Side::Client]);
        self.close(pipes);
    }
}

/// Returns the result of a completed connect (`SO_ERROR`). A backend that accepted and then reset
/// the connection was reached, and may have sent payload.
pub(crate) fn connect_result(backend: &OwnedFd, readiness: Readiness) -> io::Result<()> {
    if !readiness.is_error() {
        return Ok(());
    }
    match sockopt::socket_error(backend)? {
        Ok(()) | Err(Errno::CONNRESET) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl Half {
    /// Delivers buffered payload to the sink. Returns the number of bytes.
    fn deliver(&mut self, sink: &OwnedFd, pipes: &mut PipePool) -> io::Result<u64> {
        let (moved, empty) = match &mut self.buffered {
            Buffered::Nothing => return Ok(0),
            Buffered::Copied { bytes, delivered } => match try_send(sink, &bytes[*delivered..])? {
                Some(sent) => {
                    *delivered += sent;
                    (sent, *delivered == bytes.len())
                }
                None => (0, false),
            },
            Buffered::Piped(pipe) => match pipe.drain(sink)? {
                Splice::Moved(sent) => (sent, pipe.held() == 0),
                Splice::Blocked => (0, false),
                // A pipe that holds data never reports EOF.
                Splice::End => return Err(Errno::PIPE.into()),
            },
        };
        if moved == 0 {
            self.writable = false;
        }
        if empty
            && let Buffered::Piped(pipe) = std::mem::replace(&mut self.buffered, Buffered::Nothing)
        {
            pipes.release(pipe);
        }
        Ok(moved as u64)
    }

    /// Reads into the buffer of the loop and sends from it; keeps what the sink does not accept.
    /// Returns the number of bytes sent.
    fn copy(&mut self, source: &OwnedFd, sink: &OwnedFd, scratch: &mut Scratch) -> io::Result<u64> {
        let buffer = &mut scratch.buffer;
        let read = match recv(source, &mut buffer[..], RecvFlags::empty()) {
            Ok((0, _)) => {
                self.eof_read = true;
                return Ok(0);
            }
            Ok((read, _)) => read,
            Err(Errno::AGAIN) => {
                self.readable = false;
                return Ok(0);
            }
            Err(Errno::INTR) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        self.read_was_large = read >= scratch.splice_from;
        if read < buffer.len() && !self.closing && !self.copy_only {
            self.readable = false;
        }
        let sent = if self.writable { try_send(sink, &buffer[..read])? } else { None };
        let sent_bytes = sent.unwrap_or(0);
        if sent_bytes < read {
            // The send buffer is full until an event reports otherwise.
            self.writable = false;
            self.buffered =
                Buffered::Copied { bytes: buffer[sent_bytes..read].into(), delivered: 0 };
        }
        Ok(sent_bytes as u64)
    }

    /// Splices from the source into `pipe`.
    fn splice(
        &mut self,
        source: &OwnedFd,
        mut pipe: Loan,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        match pipe.fill(source, SPLICE_BYTES) {
            Ok(Splice::Moved(read)) => {
                self.read_was_large = read >= scratch.splice_from / 4;
                self.buffered = Buffered::Piped(pipe);
                return Ok(());
            }
            Ok(Splice::Blocked) => self.readable = false,
            Ok(Splice::End) => self.copy_only = true,
            Err(error) => {
                scratch.pipes.release(pipe);
                return Err(error);
            }
        }
        scratch.pipes.release(pipe);
        Ok(())
    }
}

/// Sends as much as the send buffer accepts; `None` if it is full.
fn try_send(sink: impl AsFd, bytes: &[u8]) -> io::Result<Option<usize>> {
    match rustix::io::retry_on_intr(|| send(&sink, bytes, SendFlags::NOSIGNAL)) {
        Ok(sent) => Ok(Some(sent)),
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sends a FIN. A sink that is no longer connected reports its error by an event.
fn shut_down(sink: impl AsFd) -> io::Result<()> {
    match shutdown(sink, Shutdown::Write) {
        Ok(()) | Err(Errno::NOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes close(2) of `socket` send a reset.
pub(super) fn reset_on_close(socket: impl AsFd) {
    // Fails only for descriptors that are not sockets.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
