//! rtnetlink client with one request in flight at a time.
//!
//! The client is synchronous because the kernel is: when `send(2)` returns, the request has been
//! processed and the reply is in the receive queue. Neither an async runtime nor a thread is
//! needed.

use crate::Namespace;
use crate::system::namespace_cookie;
use netlink_packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE,
    NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage, ParseableParametrized,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

/// Maximum length of a dump datagram, in bytes (`netlink_recvmsg` caps it at 32 KiB).
const DATAGRAM: usize = 32 << 10;

/// Maximum attempts at a dump that concurrent changes interrupt (`NLM_F_DUMP_INTR`).
const DUMP_ATTEMPTS: u32 = 8;

/// The operation on the object in a request.
#[derive(Clone, Copy)]
pub(crate) enum Operation {
    /// Create it; `EEXIST` if it exists.
    Create,
    /// Create it even if an equal object exists. In an ordered list, it is appended.
    CreateDuplicate,
    /// Create it, replacing an existing object.
    Replace,
    /// Delete it; `ENOENT` or `ESRCH` if it does not exist.
    Delete,
}

/// An rtnetlink connection in one network namespace.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects to `namespace`. Later requests do not need the privilege to enter it.
    pub(crate) fn open(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.with(|| Socket::new(NETLINK_ROUTE))??;
        // Connected to the kernel, so that other processes cannot inject replies.
        socket.connect(&SocketAddr::new(0, 0))?;
        // Without strict checking, the kernel ignores the filter of a dump request and lists all
        // objects.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Returns the cookie of the namespace, if the kernel supports cookies.
    pub(crate) fn cookie(&self) -> Option<u64> {
        namespace_cookie(&self.socket).ok()
    }

    /// Performs `operation` on the object in `message`.
    pub(crate) fn execute(
        &mut self,
        message: RouteNetlinkMessage,
        operation: Operation,
    ) -> io::Result<()> {
        let flags = match operation {
            Operation::Create => NLM_F_CREATE | NLM_F_EXCL,
            Operation::CreateDuplicate => NLM_F_CREATE,
            Operation::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Operation::Delete => 0,
        };
        self.request(message, flags, |_| ()).map(drop)
    }

    /// Requests one object.
    pub(crate) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut answer = None;
        self.request(message, 0, |message| answer = Some(message))?;
        Ok(answer)
    }

    /// Dumps all objects that match `message`. Skips replies that cannot be parsed.
    pub(crate) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut listed = Vec::new();
            let consistent =
                self.request(message.clone(), NLM_F_DUMP, |message| listed.push(message))?;
            if consistent {
                return Ok(listed);
            }
        }
        Err(io::Error::other("dump interrupted repeatedly by concurrent changes"))
    }

    /// Returns the name of the interface with index `index`.
    pub(crate) fn interface_name(&self, index: u32) -> io::Result<String> {
        Ok(rustix::net::netdevice::index_to_name(&self.socket, index)?)
    }

    /// Returns the index of the interface `name`.
    pub(crate) fn interface_index(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.socket, name)?)
    }

    /// Sends a request and passes every reply to `each`, until the final status. Returns whether
    /// the replies are a consistent snapshot: a change between two datagrams of a dump interrupts
    /// it.
    fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut buffer = vec![0; DATAGRAM.max(message.buffer_len())];
        message.serialize(&mut buffer);
        self.socket.send(&buffer[..message.buffer_len()], 0)?;

        let mut consistent = true;
        loop {
            let length = self.receive(&mut buffer)?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let packet = NetlinkBuffer::new_checked(rest).map_err(malformed)?;
                let length = (packet.length() as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                // A reply to a request that was abandoned.
                if packet.sequence_number() != self.sequence {
                    continue;
                }
                consistent &= packet.flags() & NLM_F_DUMP_INTR == 0;
                match packet.message_type() {
                    // Both carry a status: zero or a negative errno.
                    NLMSG_ERROR | NLMSG_DONE => {
                        let code =
                            ErrorBuffer::new_checked(packet.payload()).map_err(malformed)?.code();
                        return match code {
                            None => Ok(consistent),
                            Some(code) => Err(io::Error::from_raw_os_error(-code.get())),
                        };
                    }
                    kind => match RouteNetlinkMessage::parse_with_param(packet.payload(), kind) {
                        Ok(message) => each(message),
                        // The message is newer than the parser, so it does not describe an object
                        // of tidegate.
                        Err(error) => {
                            tracing::debug!(kind, %error, "netlink message not parsed");
                        }
                    },
                }
            }
        }
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.socket.recv(&mut &mut *buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => return received,
            }
        }
    }
}

fn malformed(error: netlink_packet_core::DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
