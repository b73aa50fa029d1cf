//! Questions and orders to the kernel's routing socket, one at a time.
//!
//! Synchronous, because the kernel is: it has handled a request when `send(2)` returns, and the
//! answer waits in the socket. There is nothing to await and no thread to keep for it.

use crate::Namespace;
use crate::system::namespace_cookie;
use netlink_packet_core::{
    ErrorBuffer, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE,
    NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage, ParseableParametrized,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;

/// The most that the kernel puts into one datagram of a dump, in bytes (`netlink_recvmsg` caps it
/// at 32 KiB).
const DATAGRAM: usize = 32 << 10;

/// How often a dump is begun again because what it lists was changed meanwhile.
const DUMP_ATTEMPTS: u32 = 8;

/// What to do with the object that a request describes.
#[derive(Clone, Copy)]
pub(crate) enum Order {
    /// Make it; `EEXIST` if it is there.
    Create,
    /// Make it although it may be there; of what the kernel keeps in order, at the end.
    CreateAgain,
    /// Put it in the place of the one that is there.
    Replace,
    /// Delete it; `ENOENT` or `ESRCH` if it is not there.
    Delete,
}

/// A connection to the routing part of a namespace's kernel.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects to `namespace`, for as long as the value lives; the privilege to enter is not
    /// needed again.
    pub(crate) fn open(namespace: &Namespace) -> io::Result<Self> {
        let socket = namespace.with(|| Socket::new(NETLINK_ROUTE))??;
        // Connected to the kernel, so that no other process can put an answer into our socket.
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel then honours the filter in a request for a dump, instead of listing
        // everything.
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// The namespace's cookie, if the kernel gives out such.
    pub(crate) fn cookie(&self) -> Option<u64> {
        namespace_cookie(&self.socket).ok()
    }

    /// Changes something.
    pub(crate) fn execute(&mut self, message: RouteNetlinkMessage, order: Order) -> io::Result<()> {
        let flags = match order {
            Order::Create => NLM_F_CREATE | NLM_F_EXCL,
            Order::CreateAgain => NLM_F_CREATE,
            Order::Replace => NLM_F_CREATE | NLM_F_REPLACE,
            Order::Delete => 0,
        };
        self.request(message, flags, |_| ()).map(drop)
    }

    /// Asks for one thing.
    pub(crate) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut answer = None;
        self.request(message, 0, |message| answer = Some(message))?;
        Ok(answer)
    }

    /// Asks for all there is that `message` lets through. What cannot be understood is left out.
    pub(crate) fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            let mut listed = Vec::new();
            let whole =
                self.request(message.clone(), NLM_F_DUMP, |message| listed.push(message))?;
            if whole {
                return Ok(listed);
            }
        }
        Err(io::Error::other("what was to be listed keeps changing"))
    }

    /// The name of the interface with this index.
    pub(crate) fn interface_name(&self, index: u32) -> io::Result<String> {
        Ok(rustix::net::netdevice::index_to_name(&self.socket, index)?)
    }

    /// The index of the interface with this name.
    pub(crate) fn interface_index(&self, name: &str) -> io::Result<u32> {
        Ok(rustix::net::netdevice::name_to_index(&self.socket, name)?)
    }

    /// Sends a request and hands on all that is answered, up to the final word. Says whether that
    /// was a consistent picture: a dump in several datagrams can be overtaken by a change.
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

        let mut whole = true;
        loop {
            let length = self.receive(&mut buffer)?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let packet = NetlinkBuffer::new_checked(rest).map_err(malformed)?;
                let length = (packet.length() as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                // Answers to a request that was given up half-way.
                if packet.sequence_number() != self.sequence {
                    continue;
                }
                whole &= packet.flags() & NLM_F_DUMP_INTR == 0;
                match packet.message_type() {
                    // Both carry a code: zero, or the negative number of an error.
                    NLMSG_ERROR | NLMSG_DONE => {
                        let code =
                            ErrorBuffer::new_checked(packet.payload()).map_err(malformed)?.code();
                        return match code {
                            None => Ok(whole),
                            Some(code) => Err(io::Error::from_raw_os_error(-code.get())),
                        };
                    }
                    kind => match RouteNetlinkMessage::parse_with_param(packet.payload(), kind) {
                        Ok(message) => each(message),
                        // Something newer than the parser, hence nothing that we have made.
                        Err(error) => {
                            tracing::debug!(kind, %error, "netlink message not understood");
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
