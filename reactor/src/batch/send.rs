//! Forwarding of received messages with `sendmmsg(2)`, merged into GSO batches.

use super::control::{self, Control};
use super::merge::{Group, next_group};
use super::{RecvBatch, SLOTS};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Destination of messages on an unconnected socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The receiver.
    pub to: SocketAddr,
    /// Source address and egress interface (0: selected by the routing table).
    pub from: Option<(IpAddr, u32)>,
}

/// GSO capability of one path: of a connected socket, or of a listener towards one client.
///
/// The kernel rejects a GSO batch with a segment larger than the path MTU, while it would fragment
/// a single datagram of that size. The limit is known only after a failed send, and is recorded
/// here.
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
    /// A path without GSO.
    pub const OFF: Self = Self { max_segment: 0 };

    fn reject_segment(&mut self, segment: usize) {
        self.max_segment =
            self.max_segment.min(u16::try_from(segment.saturating_sub(1)).unwrap_or(u16::MAX));
    }
}

/// Sends `bytes` with one sendmsg(2), to `destination` if the socket is not connected, and as
/// datagrams of `segment` bytes if given (`UDP_SEGMENT`, udp(7)). Returns the number of bytes sent.
///
/// # Errors
/// Errors of sendmsg(2), including pending ICMP errors of earlier datagrams, and `EAGAIN` if the
/// send buffer is full.
pub fn send_message(
    socket: impl AsFd,
    destination: Option<&Destination>,
    bytes: &[u8],
    segment: Option<u16>,
) -> io::Result<usize> {
    let from = destination.and_then(|destination| destination.from);
    let mut control = Control::EMPTY;
    let control_length = control::encode(&mut control, from, segment);
    let mut vector =
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero is a valid sockaddr_storage and a valid msghdr. sendmsg(2) only reads what
    // the header describes, which outlives the call.
    let sent = unsafe {
        let mut name: libc::sockaddr_storage = MaybeUninit::zeroed().assume_init();
        let mut header: libc::msghdr = MaybeUninit::zeroed().assume_init();
        if let Some(destination) = destination {
            header.msg_namelen = control::store(&destination.to, &mut name);
            header.msg_name = (&raw mut name).cast();
        }
        header.msg_iov = &raw mut vector;
        header.msg_iovlen = 1;
        if control_length > 0 {
            header.msg_control = control.0.as_mut_ptr().cast();
            header.msg_controllen = control_length as _;
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const header, flags)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Result of [`SendBatch::forward`].
#[derive(Debug, Default)]
pub struct Sent {
    /// Datagrams that the kernel accepted.
    pub datagrams: u64,
    /// Their payload in bytes.
    pub bytes: u64,
    /// Datagrams dropped because the send buffer was full.
    pub no_room: u64,
    /// Datagrams dropped because they exceed the path MTU and must not be fragmented.
    pub too_long: u64,
    /// Datagrams dropped because of other errors, including `error`.
    pub failed: u64,
    /// Number of pending ICMP port-unreachable errors that the socket reported for earlier
    /// datagrams. The current datagram is sent regardless.
    pub refusals: u64,
    /// The error that ended the run early: the path is unavailable (`NetworkUnreachable` and
    /// similar).
    pub error: Option<io::Error>,
}

/// Buffers for sending, reused between calls; one per loop.
pub struct SendBatch {
    vectors: Vec<libc::iovec>,
    messages: Vec<Message>,
    headers: Vec<libc::mmsghdr>,
    controls: Vec<Control>,
}

// SAFETY: the raw pointers are used only within `forward`, which sets them first.
unsafe impl Send for SendBatch {}

/// A message to send: a range of `vectors` and its group.
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
    /// Creates empty buffers.
    pub fn new() -> Self {
        Self {
            vectors: Vec::new(),
            messages: Vec::new(),
            headers: Vec::new(),
            controls: Vec::new(),
        }
    }

    /// Forwards messages `run` of `received` through `socket`, to its peer if it is connected, or
    /// to `destination`. Preserves order and datagram boundaries. Never blocks.
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

    /// Adds each datagram of `group` as a message of its own.
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

    /// Sends all added messages.
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
        let mut retried = false;
        while next < self.messages.len() {
            // SAFETY: the headers from `next` on point to `vectors`, `controls`, `name` and the
            // buffers of `received`, which outlive the call and are not modified during it.
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
                retried = false;
                continue;
            }
            let error = io::Error::last_os_error();
            let group = self.messages[next].group.clone();
            let lost = group.datagrams as u64;
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // A pending error of an earlier datagram. The kernel has not processed this one.
                Some(libc::ECONNREFUSED) if !retried => {
                    sent.refusals += 1;
                    retried = true;
                }
                Some(libc::ECONNREFUSED) => {
                    sent.failed += lost;
                    next += 1;
                    retried = false;
                }
                Some(libc::EAGAIN | libc::ENOBUFS) => {
                    sent.no_room += self.remaining(next);
                    return;
                }
                // The segment exceeds the path MTU (EINVAL; EMSGSIZE since 6.12), or the device has
                // no checksum offload (EIO, until 6.11).
                Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO) if group.is_batch() => {
                    if error.raw_os_error() == Some(libc::EIO) {
                        *offload = Offload::OFF;
                    }
                    offload.reject_segment(group.segment);
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

    /// Writes a header for each message. `vectors` must not change afterwards.
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
