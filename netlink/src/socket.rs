//! Netlink sockets with one request in flight at a time.
//!
//! The kernel processes netlink requests synchronously: when `send(2)` returns, the replies are in
//! the receive queue.

use crate::{HEADER, Request};
use netlink_sys::{Socket, SocketAddr};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Maximum length of a dump datagram, in bytes (`netlink_recvmsg` caps it at 32 KiB).
const DATAGRAM: usize = 32 << 10;

/// Maximum attempts at a dump that concurrent changes interrupt (`NLM_F_DUMP_INTR`).
const DUMP_ATTEMPTS: u32 = 8;

/// `NLM_F_ACK`, `NLM_F_DUMP`, `NLM_F_DUMP_INTR`.
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const INTERRUPTED: u16 = 0x10;

/// `NLMSG_ERROR`, `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// A message that the kernel rejected.
#[derive(Debug)]
pub struct Rejection {
    /// Index of the message in the list that was sent.
    pub index: usize,
    /// Error code of the kernel.
    pub source: io::Error,
}

/// Concurrent changes interrupted every attempt at a dump (`NLM_F_DUMP_INTR`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("dump interrupted repeatedly by concurrent changes")]
pub struct DumpInterrupted;

/// A netlink socket in one network namespace.
pub struct NetlinkSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
}

impl fmt::Debug for NetlinkSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NetlinkSocket").field(&self.port).finish()
    }
}

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open while `self.socket` lives.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

impl NetlinkSocket {
    /// Opens a socket of netlink family `family` (`NETLINK_*`) in the calling thread's network
    /// namespace.
    ///
    /// # Errors
    /// Errors of socket(2).
    pub fn open(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        let port = socket.bind_auto()?.port_number();
        // Connected to the kernel, so that other processes cannot inject replies.
        socket.connect(&SocketAddr::new(0, 0))?;
        // NETLINK_CAP_ACK: errors without a copy of the request.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, port, sequence: 0 })
    }

    /// Makes the kernel apply the filter of a dump request of the route family. Otherwise it lists
    /// all objects.
    ///
    /// # Errors
    /// Errors of setsockopt(2).
    pub fn filter_dumps(&self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// Returns the netlink port ID, by which the kernel also identifies the owner of a table.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Sends `messages` in one datagram and returns the rejected ones. The kernel reports errors
    /// even without `NLM_F_ACK`. Calls `each_echo` with the type and the attributes of each object
    /// that the kernel echoes (`NLM_F_ECHO`).
    ///
    /// # Errors
    /// Errors of the socket. Rejected messages are returned and are not an error.
    pub fn send_all<M: Request>(
        &mut self,
        messages: &[M],
        mut each_echo: impl FnMut(u16, &[u8]),
    ) -> io::Result<Vec<Rejection>> {
        self.discard()?;
        let first = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            message.write(self.sequence, 0, &mut buffer);
        }
        self.send(&buffer)?;
        let mut rejected = Vec::new();
        self.socket.set_non_blocking(true)?;
        let received = self.drain(|kind, sequence, payload| {
            let index = sequence.wrapping_sub(first) as usize;
            if index >= messages.len() {
                return;
            }
            if kind != ERROR {
                each_echo(kind, payload.get(M::HEAD..).unwrap_or_default());
            } else if let Some(source) = error_of(payload) {
                rejected.push(Rejection { index, source });
            }
        });
        self.socket.set_non_blocking(false)?;
        received.map(|()| rejected)
    }

    /// Sends one message and waits for its acknowledgement.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn execute(&mut self, message: &impl Request) -> io::Result<()> {
        self.request(message, ACK, |_, _| ()).map(drop)
    }

    /// Requests one object. Returns the type and the attributes of the reply.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn get(&mut self, message: &impl Request) -> io::Result<Option<(u16, Vec<u8>)>> {
        let mut answer = None;
        self.request(message, ACK, |kind, attributes| answer = Some((kind, attributes.to_vec())))?;
        Ok(answer)
    }

    /// Dumps all objects that match `message`. Calls `each` with the type and the attributes of
    /// each object.
    ///
    /// # Errors
    /// Errors of the kernel; [`DumpInterrupted`].
    pub fn dump(
        &mut self,
        message: &impl Request,
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut listed = Vec::new();
            let consistent = self.request(message, DUMP, |kind, attributes| {
                listed.push((kind, attributes.to_vec()));
            })?;
            if consistent {
                listed.iter().for_each(|(kind, attributes)| each(*kind, attributes));
                return Ok(());
            }
        }
        Err(io::Error::other(DumpInterrupted))
    }

    /// Sends a request and passes every reply to `each`, until the final status. Returns whether
    /// the replies are a consistent snapshot.
    fn request<M: Request>(
        &mut self,
        message: &M,
        flags: u16,
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<bool> {
        self.discard()?;
        self.sequence = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        message.write(self.sequence, flags, &mut buffer);
        self.send(&buffer)?;
        let mut consistent = true;
        let mut outcome = None;
        let sequence = self.sequence;
        while outcome.is_none() {
            let datagram = self.receive()?;
            for (kind, flags, number, payload) in messages(&datagram) {
                if number != sequence {
                    continue;
                }
                consistent &= flags & INTERRUPTED == 0;
                match kind {
                    // Both carry a status: zero or a negative errno.
                    ERROR | DONE => outcome = Some(error_of(payload)),
                    _ => each(kind, payload.get(M::HEAD..).unwrap_or_default()),
                }
            }
        }
        match outcome.flatten() {
            Some(error) => Err(error),
            None => Ok(consistent),
        }
    }

    fn send(&self, buffer: &[u8]) -> io::Result<()> {
        if buffer.len() > DATAGRAM {
            // SO_SNDBUFFORCE exceeds `net.core.wmem_max`, which a table with thousands of ports
            // requires. The factor 2 covers the overhead that the kernel accounts. Without
            // CAP_NET_ADMIN the call fails, and the default buffer may still suffice.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(self, 2 * buffer.len());
        }
        self.socket.send(buffer, 0).map(drop)
    }

    /// Discards replies to abandoned requests.
    fn discard(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)?;
        let drained = self.drain(|_, _, _| ());
        self.socket.set_non_blocking(false)?;
        drained
    }

    /// Reads all queued replies without blocking.
    fn drain(&self, mut each: impl FnMut(u16, u32, &[u8])) -> io::Result<()> {
        loop {
            match self.receive() {
                Ok(datagram) => {
                    for (kind, _, sequence, payload) in messages(&datagram) {
                        each(kind, sequence, payload);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; DATAGRAM];
        loop {
            match self.socket.recv(&mut &mut *buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => {
                    buffer.truncate(received?);
                    return Ok(buffer);
                }
            }
        }
    }
}

/// Iterates over the messages of a datagram as (type, flags, sequence number, payload).
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let short = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let number = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        let message = (short(4)?, short(6)?, number, bytes.get(HEADER..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn error_of(payload: &[u8]) -> Option<io::Error> {
    let code = i32::from_ne_bytes(payload.get(..4)?.try_into().ok()?);
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}
