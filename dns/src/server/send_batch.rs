//! Sends responses to several clients with one system call (sendmmsg).

use socket2::SockAddr;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

#[derive(Default)]
pub(super) struct SendBatch {
    bytes: Vec<u8>,
    answers: Vec<(Range<usize>, SockAddr)>,
    vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl SendBatch {
    /// Adds the response that `write` appends, for `client`, if it returns `true`.
    pub(super) fn push(&mut self, client: SocketAddr, write: impl FnOnce(&mut Vec<u8>) -> bool) {
        let start = self.bytes.len();
        if write(&mut self.bytes) {
            self.answers.push((start..self.bytes.len(), client.into()));
        } else {
            self.bytes.truncate(start);
        }
    }

    /// Sends all responses without blocking. Returns the number that was lost.
    pub(super) fn send(&mut self, socket: impl AsFd) -> usize {
        self.vectors.clear();
        self.headers.clear();
        for (range, _) in &self.answers {
            let bytes = &mut self.bytes[range.clone()];
            self.vectors
                .push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        }
        for (vector, (_, client)) in self.vectors.iter_mut().zip(&self.answers) {
            // SAFETY: all-zero is a valid mmsghdr.
            let mut header: libc::mmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
            header.msg_hdr.msg_name = client.as_ptr().cast_mut().cast();
            header.msg_hdr.msg_namelen = client.len();
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            self.headers.push(header);
        }
        let mut next = 0;
        let mut lost = 0;
        while next < self.headers.len() {
            // SAFETY: the headers from `next` on point to `vectors`, `answers` and `bytes`, which
            // outlive the call and are not touched meanwhile. The kernel only reads what they point
            // to.
            let sent = unsafe {
                libc::sendmmsg(
                    socket.as_fd().as_raw_fd(),
                    self.headers.as_mut_ptr().add(next),
                    (self.headers.len() - next) as libc::c_uint,
                    libc::MSG_DONTWAIT as _,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) => next += sent,
                Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                // The send buffer is full, or this client is unreachable. Later responses may
                // succeed.
                Err(_) => {
                    lost += 1;
                    next += 1;
                }
            }
        }
        self.bytes.clear();
        self.answers.clear();
        self.headers.clear();
        self.vectors.clear();
        lost
    }
}
