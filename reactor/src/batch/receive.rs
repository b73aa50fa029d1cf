//! Receiving with `recvmmsg(2)` into preallocated slots.

use super::control::{self, Control};
use super::{SLOT_BYTES, SLOTS};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};

/// One received message: a datagram or a GSO batch.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// The payload; for a GSO batch, the payload of all its datagrams.
    pub payload: &'a [u8],
    /// The segment size of a GSO batch (the last datagram may be shorter); otherwise the length.
    pub segment: usize,
    /// The sender; `None` if the kernel did not report it, as on a connected socket.
    pub source: Option<SocketAddr>,
    /// The local address for replies, if [`super::enable_packet_info`] is set. It is the
    /// destination address of the datagram, or for an IPv4 broadcast or multicast the address that
    /// the kernel selects.
    pub destination: Option<IpAddr>,
    /// The destination address, under the same condition.
    pub sent_to: Option<IpAddr>,
    /// Index of the ingress interface, under the same condition; 0 if not reported.
    pub interface: u32,
}

impl Datagram<'_> {
    /// Whether the destination is a broadcast or multicast address. Only then does the kernel
    /// select a different address for replies (`fib_compute_spec_dst`).
    pub fn is_to_group(&self) -> bool {
        self.sent_to != self.destination
            || self.sent_to.is_some_and(|address| address.is_multicast())
    }

    /// Number of datagrams in the message.
    pub fn count(&self) -> usize {
        if self.payload.is_empty() { 1 } else { self.payload.len().div_ceil(self.segment) }
    }
}

/// Slots for [`SLOTS`] messages of up to [`SLOT_BYTES`] each.
///
/// The buffers reserve 4 MiB of address space. The kernel allocates only the pages that were
/// received into.
pub struct RecvBatch {
    buffers: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    /// Pointers into `vectors`, `names` and `controls`, which are never resized.
    headers: Vec<libc::mmsghdr>,
    /// Pointers into `buffers`, which is never resized.
    _vectors: Vec<libc::iovec>,
    received: usize,
}

// SAFETY: the raw pointers refer to heap blocks of the same value, which move with it.
unsafe impl Send for RecvBatch {}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl RecvBatch {
    /// Allocates empty slots.
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

    /// Restores the lengths that the kernel overwrote in the first `used` headers.
    fn reset(&mut self, used: usize) {
        for header in &mut self.headers[..used] {
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_hdr.msg_controllen = size_of::<Control>() as _;
            header.msg_hdr.msg_flags = 0;
        }
    }

    /// Receives up to [`SLOTS`] queued messages from `socket`, and replaces the previous ones.
    /// Returns their number.
    ///
    /// # Errors
    /// `WouldBlock` if no message is queued; otherwise the pending error of the socket
    /// (`ConnectionRefused` if the last datagram of a connected socket reached a closed port).
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

    /// Number of messages of the last [`Self::receive`].
    pub fn len(&self) -> usize {
        self.received
    }

    /// Whether the last [`Self::receive`] returned no message.
    pub fn is_empty(&self) -> bool {
        self.received == 0
    }

    /// Returns message `index` of the last [`Self::receive`].
    ///
    /// # Panics
    /// If there is no such message.
    pub fn get(&self, index: usize) -> Datagram<'_> {
        assert!(index < self.received, "message {index} of {}", self.received);
        let header = &self.headers[index];
        let payload = &self.buffers[index * SLOT_BYTES..][..header.msg_len as usize];
        // SAFETY: recvmmsg has filled in this header, because `index` is below the number of
        // messages.
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
