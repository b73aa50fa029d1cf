//! Questions and orders to the kernel's netfilter socket, one at a time.
//!
//! The kernel has handled a message when `send(2)` returns, and what it has to say waits in the
//! socket.

use crate::wire::{Message, NETLINK_HEADER, Request};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The most that the kernel puts into one datagram of a dump, in bytes (`netlink_recvmsg` caps it
/// at 32 KiB).
const DATAGRAM: usize = 32 << 10;

/// How often a dump is begun again because what it lists was changed meanwhile.
const DUMP_ATTEMPTS: u32 = 8;

/// `NLM_F_ACK`, `NLM_F_DUMP`, `NLM_F_DUMP_INTR`.
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const INTERRUPTED: u16 = 0x10;

/// `NLMSG_ERROR`, `NLMSG_DONE`.
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// The kernel refused something.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Which message of those that were sent.
    pub(crate) index: usize,
    /// Why.
    pub(crate) source: io::Error,
}

/// A netfilter socket in one namespace.
pub(crate) struct NetfilterSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
}

impl NetfilterSocket {
    /// Opens one in the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        Self::speaking(NETLINK_NETFILTER)
    }

    /// Opens a socket of another netlink family (`NETLINK_*`) in the calling thread's namespace.
    pub(crate) fn speaking(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        let port = socket.bind_auto()?.port_number();
        // Connected to the kernel, so that no other process can put an answer into our socket.
        socket.connect(&SocketAddr::new(0, 0))?;
        // Errors need not repeat what they are about.
        socket.set_cap_ack(true)?;
        Ok(Self { socket, port, sequence: 0 })
    }

    /// What the kernel calls this socket, and whoever owns a table by it.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Sends `messages` together and returns what was refused of them; `NLM_F_ACK` is not needed
    /// for that. What the kernel echoes is handed on: its type and its attributes.
    pub(crate) fn send_all(
        &mut self,
        messages: &[Message],
        mut echoed: impl FnMut(u16, &[u8]),
    ) -> io::Result<Vec<Refusal>> {
        self.discard()?;
        let first = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        for message in messages {
            self.sequence = self.sequence.wrapping_add(1);
            message.write(self.sequence, 0, &mut buffer);
        }
        self.send(&buffer)?;
        let mut refused = Vec::new();
        self.socket.set_non_blocking(true)?;
        let received = self.drain(|kind, sequence, payload| {
            let index = sequence.wrapping_sub(first) as usize;
            if index >= messages.len() {
                return;
            }
            if kind != ERROR {
                echoed(kind, payload.get(Message::HEAD..).unwrap_or_default());
            } else if let Some(source) = error_of(payload) {
                refused.push(Refusal { index, source });
            }
        });
        self.socket.set_non_blocking(false)?;
        received.map(|()| refused)
    }

    /// Sends one message and waits for the kernel's word on it.
    pub(crate) fn order(&mut self, message: &impl Request) -> io::Result<()> {
        self.request(message, ACK, |_| ()).map(drop)
    }

    /// Asks for one thing: its attributes.
    pub(crate) fn ask(&mut self, message: &Message) -> io::Result<Vec<u8>> {
        let mut answer = Vec::new();
        self.request(message, ACK, |attributes| answer = attributes.to_vec())?;
        Ok(answer)
    }

    /// Asks for all there is that `message` lets through: the attributes of each.
    pub(crate) fn dump(
        &mut self,
        message: &impl Request,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut listed = Vec::new();
            if self.request(message, DUMP, |attributes| listed.push(attributes.to_vec()))? {
                listed.iter().for_each(|attributes| each(attributes));
                return Ok(());
            }
        }
        Err(io::Error::other("what was to be listed keeps changing"))
    }

    /// Sends a request and hands on all that is answered, up to the final word. Says whether that
    /// was a consistent picture.
    fn request<M: Request>(
        &mut self,
        message: &M,
        flags: u16,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<bool> {
        self.discard()?;
        self.sequence = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        message.write(self.sequence, flags, &mut buffer);
        self.send(&buffer)?;
        let mut whole = true;
        let mut outcome = None;
        let sequence = self.sequence;
        while outcome.is_none() {
            let datagram = self.receive()?;
            for (kind, flags, number, payload) in messages(&datagram) {
                if number != sequence {
                    continue;
                }
                whole &= flags & INTERRUPTED == 0;
                match kind {
                    // Both carry a code: zero, or the negative number of an error.
                    ERROR | DONE => outcome = Some(error_of(payload)),
                    _ => each(payload.get(M::HEAD..).unwrap_or_default()),
                }
            }
        }
        match outcome.flatten() {
            Some(error) => Err(error),
            None => Ok(whole),
        }
    }

    fn send(&self, buffer: &[u8]) -> io::Result<()> {
        if buffer.len() > DATAGRAM {
            // SAFETY: the descriptor is open for as long as the socket is.
            let socket = unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) };
            // Beyond the limit that holds for everyone, which a table with thousands of ports
            // exceeds; twice, for the kernel's own accounting. Without the privilege a smaller one
            // may do.
            let _ =
                rustix::net::sockopt::set_socket_send_buffer_size_force(socket, 2 * buffer.len());
        }
        self.socket.send(buffer, 0).map(drop)
    }

    /// Throws away answers to what was given up half-way.
    fn discard(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)?;
        let drained = self.drain(|_, _, _| ());
        self.socket.set_non_blocking(false)?;
        drained
    }

    /// Takes all that has come, without waiting.
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

/// The messages of a datagram: type, flags, number, and what is behind the header.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        let short = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let number = u32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        let message = (short(4)?, short(6)?, number, bytes.get(NETLINK_HEADER..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn error_of(payload: &[u8]) -> Option<io::Error> {
    let code = i32::from_ne_bytes(payload.get(..4)?.try_into().ok()?);
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}
