//! Sending on: runs of received messages, merged into GSO batches, by `sendmmsg(2)`.

use super::control::{self, Control};
use super::merge::{Group, next_group};
use super::{RecvBatch, SLOTS};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Where a run goes on an unconnected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The receiver.
    pub to: SocketAddr,
    /// Which of our addresses to send from, and the interface to leave by (0: as the route says).
    pub from: Option<(IpAddr, u32)>,
}

/// What one path (a connected socket, or a client of a listener) can take in the way of GSO
/// batches.
///
/// A segment that does not fit the path's MTU is refused by the kernel as a GSO batch, while as a
/// datagram of its own it would be sent in fragments. That shows only on sending, so it is learnt
/// there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    pub(super) max_segment: u16,
}

impl Default for Offload {
    fn default() -> Self {
        Self { max_segment: u16::MAX }
    }
}

impl Offload {
    /// A path that takes no GSO batches at all.
    pub const OFF: Self = Self { max_segment: 0 };

    fn refused(&mut self, segment: usize) {
        self.max_segment =
            self.max_segment.min(u16::try_from(segment.saturating_sub(1)).unwrap_or(u16::MAX));
    }
}

/// What became of a run.
#[derive(Debug, Default)]
pub struct Sent {
    /// Datagrams that the kernel took.
    pub datagrams: u64,
    /// Their payload in bytes.
    pub bytes: u64,
    /// Datagrams lost because the socket's send buffer was full.
    pub no_room: u64,
    /// Datagrams too long for the path, where it does not fragment.
    pub too_long: u64,
    /// Datagrams lost to `error`.
    pub failed: u64,
    /// How often the socket told of an earlier datagram that the port was closed (ICMP); what was
    /// being sent was sent all the same.
    pub refusals: u64,
    /// Why the rest of the run was given up: the path is gone (`NetworkUnreachable` and the like).
    pub error: Option<io::Error>,
}

/// Scratch space for sending; one per loop.
pub struct SendBatch {
    vectors: Vec<libc::iovec>,
    messages: Vec<Message>,
    headers: Vec<libc::mmsghdr>,
    controls: Vec<Control>,
}

// SAFETY: the raw pointers inside are used only within `forward`, which sets them first.
unsafe impl Send for SendBatch {}

/// One message to send: part of `vectors`, and what it is.
#[derive(Clone)]
struct Message {
    vectors: Range<usize>,
    group: Group,
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl SendBatch {
    /// Empty scratch space.
    pub fn new() -> Self {
        Self {
            vectors: Vec::new(),
            messages: Vec::new(),
            headers: Vec::new(),
            controls: Vec::new(),
        }
    }

    /// Sends messages `run` of `received` on through `socket`: to its peer if it is connected, or
    /// to `destination`. Keeps their order and the datagrams' boundaries. Never waits.
    pub fn forward(
        &mut self,
        socket: impl AsFd,
        received: &RecvBatch,
        run: Range<usize>,
        destination: Option<&Destination>,
        offload: &mut Offload,
    ) -> Sent {
        let mut sent = Sent::default();
        let mut start = run.start;
        while start < run.end && sent.error.is_none() {
            self.clear();
            while start < run.end && self.messages.len() < SLOTS {
                let max_segment = usize::from(offload.max_segment);
                let group = next_group(start..run.end, max_segment, |index| received.size(index));
                start = group.messages.end;
                if group.is_batch() && group.segment > max_segment {
                    self.push_cut(received, &group);
                } else {
                    self.push(received, group);
                }
            }
            self.flush(socket.as_fd(), received, destination, offload, &mut sent);
        }
        sent
    }

    fn clear(&mut self) {
        self.vectors.clear();
        self.messages.clear();
    }

    /// Adds `group` as one message.
    fn push(&mut self, received: &RecvBatch, group: Group) {
        let first = self.vectors.len();
        for index in group.messages.clone() {
            self.vectors.push(vector(received.get(index).payload));
        }
        self.messages.push(Message { vectors: first..self.vectors.len(), group });
    }

    /// Adds the datagrams of `group` one by one.
    fn push_cut(&mut self, received: &RecvBatch, group: &Group) {
        for index in group.messages.clone() {
            let datagram = received.get(index);
            for piece in datagram.payload.chunks(datagram.segment) {
                let first = self.vectors.len();
                self.vectors.push(vector(piece));
                let group = Group {
                    messages: index..index + 1,
                    segment: piece.len(),
                    bytes: piece.len(),
                    datagrams: 1,
                };
                self.messages.push(Message { vectors: first..first + 1, group });
            }
        }
    }

    /// Sends what was pushed.
    fn flush(
        &mut self,
        socket: BorrowedFd<'_>,
        received: &RecvBatch,
        destination: Option<&Destination>,
        offload: &mut Offload,
        sent: &mut Sent,
    ) {
        // SAFETY: all-zero is a valid sockaddr_storage.
        let mut name: libc::sockaddr_storage = unsafe { MaybeUninit::zeroed().assume_init() };
        let name_length =
            destination.map_or(0, |destination| control::store(&destination.to, &mut name));
        self.write_headers(destination, &mut name, name_length);

        let mut next = 0;
        let mut tried_again = false;
        while next < self.messages.len() {
            // SAFETY: the headers from `next` on point to `vectors`, `controls`, `name` and the
            // buffers of `received`, all of which outlive the call and are not touched meanwhile.
            let count = unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    self.headers.as_mut_ptr().add(next),
                    (self.headers.len() - next) as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                )
            };
            if let Ok(count) = usize::try_from(count) {
                for message in &self.messages[next..next + count] {
                    sent.datagrams += message.group.datagrams as u64;
                    sent.bytes += message.group.bytes as u64;
                }
                next += count;
                tried_again = false;
                continue;
            }
            let error = io::Error::last_os_error();
            let group = self.messages[next].group.clone();
            let lost = group.datagrams as u64;
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // The error of an earlier datagram; this one was not looked at yet.
                Some(libc::ECONNREFUSED) if !tried_again => {
                    sent.refusals += 1;
                    tried_again = true;
                }
                Some(libc::ECONNREFUSED) => {
                    sent.failed += lost;
                    next += 1;
                    tried_again = false;
                }
                Some(libc::EAGAIN | libc::ENOBUFS) => {
                    sent.no_room += self.remaining(next);
                    return;
                }
                // Too long a segment for the path (EINVAL; EMSGSIZE since 6.12), or a device that
                // cannot checksum (EIO, until 6.11).
                Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO) if group.is_batch() => {
                    if error.raw_os_error() == Some(libc::EIO) {
                        *offload = Offload::OFF;
                    }
                    offload.refused(group.segment);
                    let rest = self.messages.split_off(next);
                    self.clear();
                    for message in rest {
                        if message.group.is_batch() {
                            self.push_cut(received, &message.group);
                        } else {
                            self.push(received, message.group);
                        }
                    }
                    self.write_headers(destination, &mut name, name_length);
                    next = 0;
                }
                Some(libc::EMSGSIZE) => {
                    sent.too_long += lost;
                    next += 1;
                }
                _ => {
                    sent.failed += self.remaining(next);
                    sent.error = Some(error);
                    return;
                }
            }
        }
    }

    fn remaining(&self, next: usize) -> u64 {
        self.messages[next..].iter().map(|message| message.group.datagrams as u64).sum()
    }

    /// Points a header at each message, now that nothing moves any more.
    fn write_headers(
        &mut self,
        destination: Option<&Destination>,
        name: &mut libc::sockaddr_storage,
        name_length: libc::socklen_t,
    ) {
        let from = destination.and_then(|destination| destination.from);
        self.controls.resize(self.messages.len(), Control::EMPTY);
        self.headers.clear();
        for (message, control) in self.messages.iter().zip(&mut self.controls) {
            let segment = message.group.is_batch().then_some(message.group.segment as u16);
            let length = control::encode(control, from, segment);
            // SAFETY: all-zero is a valid mmsghdr.
            let mut header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
            // SAFETY: the range is inside `vectors`.
            header.msg_hdr.msg_iov =
                unsafe { self.vectors.as_mut_ptr().add(message.vectors.start) };
            header.msg_hdr.msg_iovlen = message.vectors.len() as _;
            if name_length > 0 {
                header.msg_hdr.msg_name = (&raw mut *name).cast();
                header.msg_hdr.msg_namelen = name_length;
            }
            if length > 0 {
                header.msg_hdr.msg_control = (&raw mut *control).cast();
                header.msg_hdr.msg_controllen = length as _;
            }
            self.headers.push(header);
        }
    }
}

fn vector(payload: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() }
}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SendBatch")
    }
}
