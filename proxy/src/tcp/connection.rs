//! One connection and how its halves move payload.

use super::{
    COPY_BYTES, Holder, NARROW_BYTES, READS_PER_TURN, SOON, SPLICE_BYTES, Seat, WIDE_BYTES,
    WIDEN_AFTER,
};
use crate::listener::{narrow, widen};
use crate::port::{Direction, Port, Tally};
use crate::upstream::Lease;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown, sockopt};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use tidegate_reactor::{Interest, Links, Loan, PipePool, Readiness, Splice};

/// One of a connection's two sockets; also the tag of its epoll token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client = 0,
    Backend = 1,
}

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The backend is being connected to.
    Dialling {
        /// When that began.
        since: Instant,
        /// When it is given up.
        deadline: Instant,
    },
    /// Payload may flow.
    Open {
        /// When the backend was reached.
        since: Instant,
    },
}

/// What a turn left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Nothing more to do until an event comes.
    Wait,
    /// The budget is used up, the work is not.
    Again,
    /// Both directions have ended well.
    Done,
    /// The connection is broken.
    Broken,
}

/// What a loop lends to the connection whose turn it is.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) buffer: Box<[u8]>,
    pub(crate) pipes: PipePool,
    /// Payload of one read from which the next one is spliced.
    splice_from: usize,
}

impl Scratch {
    pub(crate) fn new(pipes: PipePool, splice_from: usize) -> Self {
        Self { buffer: Box::default(), pipes, splice_from }
    }
}

/// Payload that was read and not yet delivered.
#[derive(Debug)]
enum Waiting {
    Nothing,
    Copied { bytes: Box<[u8]>, delivered: usize },
    Piped(Loan),
}

/// One direction of a connection.
#[derive(Debug)]
struct Half {
    waiting: Waiting,
    /// The last read brought so much that the next one is worth a pipe.
    plenty: bool,
    /// The source may have something to read.
    readable: bool,
    /// The source has closed its writing side: read until the end shows.
    closing: bool,
    /// Splicing is over, and a short read does not mean that nothing is left: there is urgent data,
    /// at whose mark reads stop short and splice(2) returns 0 as if the stream had ended
    /// (`tcp_read_sock`, net/ipv4/tcp.c); or splice(2) has returned 0, and only a read can tell
    /// whether that was the end.
    copy_only: bool,
    /// The end was read.
    ended: bool,
    /// The sink may have room.
    writable: bool,
    /// The end was passed on.
    shut: bool,
    /// It has large buffers, and its part of the budget.
    wide: bool,
    /// The receive buffer was fixed at the small size.
    was_narrow: bool,
    /// What it has of the budget, in bytes.
    charged: usize,
    /// Payload delivered since `counted_from`, and whether it was blocked since.
    delivered: u64,
    counted_from: Instant,
    was_blocked: bool,
}

impl Half {
    fn new(now: Instant) -> Self {
        Self {
            waiting: Waiting::Nothing,
            plenty: false,
            readable: false,
            closing: false,
            copy_only: false,
            ended: false,
            writable: false,
            shut: false,
            wide: false,
            was_narrow: false,
            charged: 0,
            delivered: 0,
            counted_from: now,
            was_blocked: false,
        }
    }

    /// Payload waits for room at the sink.
    fn is_blocked(&self) -> bool {
        !self.writable && !matches!(self.waiting, Waiting::Nothing)
    }
}

/// What a half wants of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// To become wide.
    Widen,
    /// It is narrow and blocked, and holds something.
    Hold,
    /// It is no longer.
    Release,
}

/// A client's connection and the one to the backend.
pub(crate) struct Connection<T = AtomicU64> {
    sockets: [OwnedFd; 2],
    /// Indexed by [`Direction`]: `In` reads from the client, `Out` from the backend.
    halves: [Half; 2],
    /// Whether each side has told of an error.
    failed: [bool; 2],
    /// What epoll tells of each side; nothing before it has been asked the first time.
    watched: [Option<Interest>; 2],
    /// A read or a write has failed: what looks like an end from here on is none.
    broken: bool,
    pub(crate) phase: Phase,
    pub(crate) port: Arc<Port<T>>,
    /// In the loop's run queue.
    pub(crate) queued: bool,
    /// Its place in its holder's list, and since when at the end of it.
    pub(crate) links: Links,
    pub(crate) moved: Instant,
    /// Its place in the list of those with a wide half, if it is in it.
    pub(crate) wide_links: Links,
    pub(crate) is_listed_wide: bool,
    /// Payload was delivered since [`Self::take_progress`].
    progressed: bool,
    _lease: Option<Lease>,
    seat: Seat,
}

impl<T: Tally> Connection<T> {
    /// A connection whose backend is being dialled. `header` goes to the backend before anything
    /// else.
    pub(crate) fn new(
        client: OwnedFd,
        backend: OwnedFd,
        phase: Phase,
        port: Arc<Port<T>>,
        header: Option<Vec<u8>>,
        lease: Option<Lease>,
        seat: Seat,
    ) -> Self {
        let (Phase::Dialling { since: moved, .. } | Phase::Open { since: moved }) = phase;
        let mut halves = [Half::new(moved), Half::new(moved)];
        // The client may be written to from the start.
        halves[Direction::Out as usize].writable = true;
        if let Some(header) = header {
            halves[Direction::In as usize].waiting =
                Waiting::Copied { bytes: header.into_boxed_slice(), delivered: 0 };
        }
        Self {
            sockets: [client, backend],
            halves,
            failed: [false; 2],
            watched: [None; 2],
            broken: false,
            phase,
            port,
            queued: false,
            links: Links::default(),
            moved,
            wide_links: Links::default(),
            is_listed_wide: false,
            progressed: false,
            _lease: lease,
            seat,
        }
    }

    /// Whose it is.
    pub(crate) fn holder(&self) -> Holder {
        self.seat.holder()
    }

    /// Whether it has carried payload since this was last asked.
    pub(crate) fn take_progress(&mut self) -> bool {
        std::mem::take(&mut self.progressed)
    }

    pub(crate) fn socket(&self, side: Side) -> &OwnedFd {
        &self.sockets[side as usize]
    }

    /// Notes what an event says about one side.
    pub(crate) fn note(&mut self, side: Side, readiness: Readiness) {
        let (reads, writes) = match side {
            Side::Client => (Direction::In, Direction::Out),
            Side::Backend => (Direction::Out, Direction::In),
        };
        let source = &mut self.halves[reads as usize];
        source.readable |= readiness.is_readable();
        source.closing |= readiness.is_read_closed();
        source.copy_only |= readiness.is_urgent();
        self.halves[writes as usize].writable |= readiness.is_writable();
        self.failed[side as usize] |= readiness.is_error();
    }

    /// Whether payload for `side` waits for room that epoll has not been asked to tell of.
    pub(crate) fn must_watch_for_room(&self, side: Side) -> bool {
        self.watched[side as usize] == Some(Interest::InputEdges) && self.waits_for_room(side)
    }

    /// What to watch `side` for from now on. To be connected is to have room.
    pub(crate) fn interest(&mut self, side: Side) -> Interest {
        let dialling = side == Side::Backend && matches!(self.phase, Phase::Dialling { .. });
        let for_room = dialling || self.waits_for_room(side);
        *self.watched[side as usize].insert(if for_room {
            Interest::Edges
        } else {
            Interest::InputEdges
        })
    }

    fn waits_for_room(&self, side: Side) -> bool {
        let half = match side {
            Side::Client => &self.halves[Direction::Out as usize],
            Side::Backend => &self.halves[Direction::In as usize],
        };
        half.is_blocked()
    }

    /// What the half of `direction` wants of the budget since its last turn.
    pub(crate) fn claim(&mut self, direction: Direction, now: Instant) -> Option<Claim> {
        let half = &mut self.halves[direction as usize];
        let blocked = half.is_blocked();
        half.was_blocked |= blocked;
        if half.wide {
            return None;
        }
        if half.delivered >= WIDEN_AFTER {
            let fast = !half.was_blocked || now < half.counted_from + SOON;
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

    /// Makes the half of `direction` wide: it has [`WIDE_BYTES`] of the budget.
    pub(crate) fn widen(&mut self, direction: Direction) {
        let (source, sink) = self.ends(direction);
        widen(source, sink, self.halves[direction as usize].was_narrow);
        let half = &mut self.halves[direction as usize];
        (half.wide, half.charged) = (true, WIDE_BYTES);
    }

    /// Makes the half of `direction` narrow. Returns the bytes that it has of the budget from here
    /// on, which are what it still holds.
    pub(crate) fn narrow(&mut self, direction: Direction) -> usize {
        let (source, sink) = self.ends(direction);
        narrow(source, sink);
        let unread = rustix::io::ioctl_fionread(source).unwrap_or(0) as usize;
        let half = &mut self.halves[direction as usize];
        (half.wide, half.was_narrow) = (false, true);
        (half.delivered, half.was_blocked) = (0, false);
        let held = match &half.waiting {
            Waiting::Nothing => 0,
            Waiting::Copied { .. } => NARROW_BYTES,
            Waiting::Piped(pipe) => NARROW_BYTES + pipe.held(),
        };
        half.charged = (held + unread).min(WIDE_BYTES);
        half.charged
    }

    /// Bounds what the half of `direction`, which is blocked, holds: left to itself the receive
    /// buffer at its source grows to `tcp_rmem`.
    pub(crate) fn bound(&mut self, direction: Direction) {
        if !std::mem::replace(&mut self.halves[direction as usize].was_narrow, true) {
            let (source, sink) = self.ends(direction);
            narrow(source, sink);
        }
    }

    /// Notes what the half of `direction` has of the budget; how much it had before.
    pub(crate) fn charge(&mut self, direction: Direction, bytes: usize) -> usize {
        std::mem::replace(&mut self.halves[direction as usize].charged, bytes)
    }

    /// What the half of `direction` has of the budget, in bytes.
    pub(crate) fn charged(&self, direction: Direction) -> usize {
        self.halves[direction as usize].charged
    }

    /// Whether the half of `direction` is wide.
    pub(crate) fn is_wide(&self, direction: Direction) -> bool {
        self.halves[direction as usize].wide
    }

    /// Whether a half is blocked.
    pub(crate) fn is_blocked(&self) -> bool {
        self.halves.iter().any(Half::is_blocked)
    }

    pub(crate) fn seat(&mut self) -> &mut Seat {
        &mut self.seat
    }

    fn ends(&self, direction: Direction) -> (&OwnedFd, &OwnedFd) {
        let [client, backend] = &self.sockets;
        match direction {
            Direction::In => (client, backend),
            Direction::Out => (backend, client),
        }
    }

    /// Whether `side` has told of an error.
    pub(crate) fn has_failed(&self, side: Side) -> bool {
        self.failed[side as usize]
    }

    /// Moves what can be moved.
    pub(crate) fn turn(&mut self, scratch: &mut Scratch) -> Turn {
        // Not before there is a use for it: most published ports are idle, and some have a process
        // to themselves.
        if scratch.buffer.is_empty() {
            scratch.buffer = vec![0; COPY_BYTES].into_boxed_slice();
        }
        let mut again = false;
        self.broken |= self.failed[0] || self.failed[1];
        for direction in Direction::ALL {
            match self.advance(direction, scratch) {
                Ok(more) => again |= more,
                // The other direction may still have something to pass on: the answer of a server
                // that hung up on a client in the middle of its request.
                Err(_) => self.broken = true,
            }
        }
        if again {
            return Turn::Again;
        }
        if self.broken {
            return Turn::Broken;
        }
        if self.halves.iter().all(|half| half.ended && matches!(half.waiting, Waiting::Nothing)) {
            return Turn::Done;
        }
        Turn::Wait
    }

    /// Moves payload in one direction until the source is empty, the sink is full or the budget is
    /// used up; true in the last case.
    fn advance(&mut self, direction: Direction, scratch: &mut Scratch) -> io::Result<bool> {
        let [client, backend] = &self.sockets;
        let (source, sink) = match direction {
            Direction::In => (client, backend),
            Direction::Out => (backend, client),
        };
        let other_ended = self.halves[1 - direction as usize].shut;
        let half = &mut self.halves[direction as usize];
        let stats = &self.port.stats;
        let mut reads = READS_PER_TURN;
        loop {
            if !matches!(half.waiting, Waiting::Nothing) {
                if !half.writable {
                    return Ok(false);
                }
                let delivered = half.deliver(sink, &mut scratch.pipes)?;
                self.progressed |= delivered > 0;
                half.delivered += delivered;
                stats.add_bytes(direction, delivered);
                continue;
            }
            if half.ended {
                if self.broken {
                    return Err(Errno::CONNRESET.into());
                }
                // When the other half is through as well, closing says it all.
                if !half.shut && !other_ended {
                    shut_down(sink)?;
                }
                half.shut = true;
                return Ok(false);
            }
            if !half.readable {
                return Ok(false);
            }
            if reads == 0 {
                return Ok(true);
            }
            reads -= 1;
            if (half.plenty && half.wide || scratch.splice_from == 0)
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

    /// Ends the connection with a reset to both sides; what they had not read yet is lost, as it
    /// should be.
    pub(crate) fn reset(self, pipes: &mut PipePool) {
        reset_on_close(&self.sockets[0]);
        reset_on_close(&self.sockets[1]);
        self.close(pipes);
    }

    /// Ends the connection: what was sent is delivered, then FIN. Borrowed pipes go back.
    pub(crate) fn close(self, pipes: &mut PipePool) {
        for half in self.halves {
            if let Waiting::Piped(pipe) = half.waiting {
                pipes.release(pipe);
            }
        }
    }

    /// Ends a connection whose backend was never reached: the client is reset.
    pub(crate) fn refuse(self, pipes: &mut PipePool) {
        reset_on_close(&self.sockets[Side::Client as usize]);
        self.close(pipes);
    }

    /// The result of the connect that has just ended.
    pub(crate) fn connect_result(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.sockets[Side::Backend as usize])??)
    }
}

impl Half {
    /// Delivers some of what waits. Returns the bytes that went.
    fn deliver(&mut self, sink: &OwnedFd, pipes: &mut PipePool) -> io::Result<u64> {
        let (moved, empty) = match &mut self.waiting {
            Waiting::Nothing => return Ok(0),
            Waiting::Copied { bytes, delivered } => match try_send(sink, &bytes[*delivered..])? {
                Some(sent) => {
                    *delivered += sent;
                    (sent, *delivered == bytes.len())
                }
                None => (0, false),
            },
            Waiting::Piped(pipe) => match pipe.drain(sink)? {
                Splice::Moved(sent) => (sent, pipe.held() == 0),
                Splice::Blocked => (0, false),
                // A pipe that holds something does not end.
                Splice::End => return Err(Errno::PIPE.into()),
            },
        };
        if moved == 0 {
            self.writable = false;
        }
        if empty
            && let Waiting::Piped(pipe) = std::mem::replace(&mut self.waiting, Waiting::Nothing)
        {
            pipes.release(pipe);
        }
        Ok(moved as u64)
    }

    /// Reads through the loop's buffer and sends at once; what the sink does not take is kept.
    /// Returns the bytes that went.
    fn copy(&mut self, source: &OwnedFd, sink: &OwnedFd, scratch: &mut Scratch) -> io::Result<u64> {
        let buffer = &mut scratch.buffer;
        let read = match recv(source, &mut buffer[..], RecvFlags::empty()) {
            Ok((0, _)) => {
                self.ended = true;
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
        self.plenty = read >= scratch.splice_from;
        if read < buffer.len() && !self.closing && !self.copy_only {
            self.readable = false;
        }
        let sent = if self.writable { try_send(sink, &buffer[..read])? } else { None };
        let sent_bytes = sent.unwrap_or(0);
        if sent_bytes < read {
            // Until the sink says so, it has no more room.
            self.writable = false;
            self.waiting = Waiting::Copied { bytes: buffer[sent_bytes..read].into(), delivered: 0 };
        }
        Ok(sent_bytes as u64)
    }

    /// Fills `pipe` from the source.
    fn splice(
        &mut self,
        source: &OwnedFd,
        mut pipe: Loan,
        scratch: &mut Scratch,
    ) -> io::Result<()> {
        match pipe.fill(source, SPLICE_BYTES) {
            Ok(Splice::Moved(read)) => {
                self.plenty = read >= scratch.splice_from / 4;
                self.waiting = Waiting::Piped(pipe);
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

/// Sends what there is room for; `None` when there is none.
fn try_send(sink: impl AsFd, bytes: &[u8]) -> io::Result<Option<usize>> {
    match rustix::io::retry_on_intr(|| send(&sink, bytes, SendFlags::NOSIGNAL)) {
        Ok(sent) => Ok(Some(sent)),
        Err(Errno::AGAIN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Passes the end on. A sink that is no longer connected has its own way of saying so.
fn shut_down(sink: impl AsFd) -> io::Result<()> {
    match shutdown(sink, Shutdown::Write) {
        Ok(()) | Err(Errno::NOTCONN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Makes the next close(2) of `socket` a reset.
pub(super) fn reset_on_close(socket: impl AsFd) {
    // It fails on what is not a socket only.
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}
