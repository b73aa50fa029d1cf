//! Receiving: `recvmmsg(2)` into slots that are made once.

use super::control::{self, Control};
use super::{SLOT_BYTES, SLOTS};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

/// One received message: a datagram, or a GSO batch of them.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// The bytes; of a GSO batch, those of all its datagrams.
    pub payload: &'a [u8],
    /// The size of each datagram of a GSO batch but the last, which may be shorter; otherwise the
    /// length.
    pub segment: usize,
    /// Who sent it; `None` on a socket whose kernel did not say (a connected one, where it is
    /// known).
    pub source: Option<SocketAddr>,
    /// Which of our addresses to answer from, where [`super::enable_packet_info`] asked for that:
    /// the one it was sent to, or for an IPv4 broadcast or multicast the one that the kernel
    /// selects.
    pub destination: Option<IpAddr>,
    /// Its destination address, with the same condition.
    pub sent_to: Option<IpAddr>,
    /// The index of the interface it came in by, with the same condition; 0 when not told.
    pub interface: u32,
}

impl Datagram<'_> {
    /// Whether it was sent to a broadcast or multicast address. Only then does the kernel select
    /// another address to answer from (`fib_compute_spec_dst`).
    pub fn is_to_group(&self) -> bool {
        self.sent_to != self.destination
            || self.sent_to.is_some_and(|address| address.is_multicast())
    }

    /// How many datagrams it is.
    pub fn count(&self) -> usize {
        if self.payload.is_empty() { 1 } else { self.payload.len().div_ceil(self.segment) }
    }
}

/// Slots for [`SLOTS`] messages of up to [`SLOT_BYTES`] each.
///
/// The buffers are 4 MiB of address space, of which the kernel backs only what was ever received
/// into.
pub struct RecvBatch {
    buffers: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    /// Point into `vectors`, `names` and `controls`, none of which is ever resized.
    headers: Vec<libc::mmsghdr>,
    /// Point into `buffers`, which is never resized.
    _vectors: Vec<libc::iovec>,
    received: usize,
}

// SAFETY: the raw pointers inside refer to the heap blocks of the same value, which move with it.
unsafe impl Send for RecvBatch {}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl RecvBatch {
    /// Empty slots.
    pub fn new() -> Self {
        let mut buffers = vec![0; SLOTS * SLOT_BYTES];
        // SAFETY: all-zero is a valid sockaddr_storage.
        let mut names =
            vec![unsafe { MaybeUninit::<libc::sockaddr_storage>::zeroed().assume_init() }; SLOTS];
        let mut controls = vec![Control::EMPTY; SLOTS];
        let base = buffers.as_mut_ptr();
        let mut vectors: Vec<libc::iovec> = (0..SLOTS)
            .map(|slot| libc::iovec {
                // SAFETY: inside `buffers`.
                iov_base: unsafe { base.add(slot * SLOT_BYTES) }.cast(),
                iov_len: SLOT_BYTES,
            })
            .collect();
        let headers = (0..SLOTS)
            .map(|slot| {
                // SAFETY: all-zero is a valid mmsghdr.
                let mut header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
                // SAFETY: every index is inside its vector.
                unsafe {
                    header.msg_hdr.msg_iov = vectors.as_mut_ptr().add(slot);
                    header.msg_hdr.msg_iovlen = 1;
                    header.msg_hdr.msg_name = names.as_mut_ptr().add(slot).cast();
                    header.msg_hdr.msg_control = controls.as_mut_ptr().add(slot).cast();
                }
                header
            })
            .collect();
        let mut batch = Self { buffers, names, controls, headers, _vectors: vectors, received: 0 };
        batch.reset(SLOTS);
        batch
    }

    /// Puts back the lengths that the kernel overwrote in the first `used` headers.
    fn reset(&mut self, used: usize) {
        for header in &mut self.headers[..used] {
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_hdr.msg_controllen = size_of::<Control>() as _;
            header.msg_hdr.msg_flags = 0;
        }
    }

    /// Receives what waits at `socket`, at most [`SLOTS`] messages, in place of what was here
    /// before. Returns how many.
    ///
    /// # Errors
    /// `WouldBlock` when nothing waits; otherwise the socket's pending error (`ConnectionRefused`
    /// of a connected socket whose last datagram found the port closed).
    pub fn receive(&mut self, socket: impl AsFd) -> io::Result<usize> {
        self.reset(self.received);
        self.received = 0;
        // SAFETY: the headers describe buffers that live in `self`.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                SLOTS as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        self.received = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        Ok(self.received)
    }

    /// How many messages the last [`Self::receive`] brought.
    pub fn len(&self) -> usize {
        self.received
    }

    /// Whether it brought none.
    pub fn is_empty(&self) -> bool {
        self.received == 0
    }

    /// Message `index` of the last [`Self::receive`].
    ///
    /// # Panics
    /// When there is no such message.
    pub fn get(&self, index: usize) -> Datagram<'_> {
        assert!(index < self.received, "message {index} of {}", self.received);
        let header = &self.headers[index];
        let payload = &self.buffers[index * SLOT_BYTES..][..header.msg_len as usize];
        // SAFETY: recvmmsg has filled in this header, for it is one of those received.
        let ancillary = unsafe { control::decode(&header.msg_hdr) };
        let source = if header.msg_hdr.msg_namelen == 0 {
            None
        } else {
            control::address(&self.names[index])
        };
        Datagram {
            payload,
            segment: ancillary.segment.unwrap_or(payload.len()).min(payload.len()),
            source,
            destination: ancillary.destination,
            sent_to: ancillary.sent_to,
            interface: ancillary.interface,
        }
    }

    /// Length and segment size of message `index`, in bytes.
    pub(super) fn size(&self, index: usize) -> (usize, usize) {
        let datagram = self.get(index);
        (datagram.payload.len(), datagram.segment)
    }
}

impl std::fmt::Debug for RecvBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "RecvBatch({} of {} slots, {} control bytes each)",
            self.received,
            SLOTS,
            size_of_val(&self.controls[0])
        )
    }
}
