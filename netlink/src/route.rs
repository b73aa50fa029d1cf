//! Requests of the route family.

use crate::Request;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;

/// A message of the route family with its flags (`NLM_F_*`).
#[derive(Clone, Debug)]
pub struct RouteRequest {
    /// The message.
    pub message: RouteNetlinkMessage,
    /// Flags in addition to `NLM_F_REQUEST`.
    pub flags: u16,
}

impl Request for RouteRequest {
    /// The parser of `netlink-packet-route` includes the family header.
    const HEAD: usize = 0;

    fn write(&self, sequence: u32, more_flags: u16, buffer: &mut Vec<u8>) {
        let mut message = NetlinkMessage::from(self.message.clone());
        message.header.flags = NLM_F_REQUEST | self.flags | more_flags;
        message.header.sequence_number = sequence;
        message.finalize();
        let start = buffer.len();
        buffer.resize(start + message.buffer_len(), 0);
        message.serialize(&mut buffer[start..]);
    }
}
