//! Netlink attributes and nfnetlink messages (`include/uapi/linux/netfilter/nfnetlink.h`).

use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;
use tidegate_netlink::{NetlinkSocket, Request, write_message};

/// Opens a netfilter socket in the calling thread's network namespace.
pub(crate) fn open_socket() -> io::Result<NetlinkSocket> {
    NetlinkSocket::open(NETLINK_NETFILTER)
}

/// The nf_tables subsystem (`NFNL_SUBSYS_NFTABLES`).
pub(crate) const NFTABLES: u16 = 10;
/// The connection tracking subsystem (`NFNL_SUBSYS_CTNETLINK`).
pub(crate) const CONNTRACK: u16 = 1;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// Mask that removes the flag bits from an attribute type.
const TYPE_MASK: u16 = 0x3fff;

/// An nfnetlink message without its netlink header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Subsystem in the upper byte, request in the lower byte.
    pub(crate) kind: u16,
    /// `NLM_F_*` flags in addition to `NLM_F_REQUEST`.
    pub(crate) flags: u16,
    /// `NFPROTO_*`.
    pub(crate) family: u8,
    /// `res_id` of `struct nfgenmsg`, in network byte order. Holds the subsystem in the messages
    /// that begin and end a batch.
    pub(crate) resource: u16,
    /// Attributes after `struct nfgenmsg`.
    pub(crate) attributes: Attributes,
    /// Object of the request, for the error message if the kernel rejects it.
    pub(crate) about: String,
}

impl Request for Message {
    /// `struct nfgenmsg`.
    const HEAD: usize = 4;

    fn write(&self, sequence: u32, more_flags: u16, buffer: &mut Vec<u8>) {
        let [high, low] = self.resource.to_be_bytes();
        let head = [self.family, 0, high, low];
        let flags = self.flags | more_flags;
        write_message(self.kind, flags, sequence, &head, self.attributes.encoded(), buffer);
    }
}

/// An encoded list of attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    /// Appends an attribute.
    pub(crate) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        self.put(kind, value);
        self
    }

    /// Appends a `u32` in network byte order, the byte order of nearly all netfilter attributes.
    pub(crate) fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Appends a NUL-terminated string.
    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Appends a nested list of attributes.
    pub(crate) fn nest(self, kind: u16, inner: &Self) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }

    fn put(&mut self, kind: u16, value: &[u8]) {
        let length = 4 + value.len();
        self.0.extend((length as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the encoded attributes.
    pub(crate) fn encoded(&self) -> &[u8] {
        &self.0
    }
}

/// Iterates over the attributes in `bytes` as (type, value). Stops at the first malformed
/// attribute.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Returns the value of the first attribute of type `kind`.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(one, _)| *one == kind).map(|(_, value)| value)
}

/// Decodes a `u32` in network byte order.
pub(crate) fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.get(..4)?.try_into().ok()?))
}

/// Decodes a string up to its NUL terminator.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip() {
        let inner = Attributes::default().text(1, "abc").number(2, 7);
        let all = Attributes::default().bytes(9, &[1]).nest(3, &inner);
        let read: Vec<_> = attributes(&all.0).collect();
        assert_eq!(read[0], (9, &[1_u8][..]), "value without padding");
        assert_eq!(read[1].0, 3, "type without flags");
        assert_eq!(text(attribute(read[1].1, 1).unwrap()), "abc");
        assert_eq!(attribute(read[1].1, 2).and_then(number), Some(7));
        assert_eq!(attributes(&[9, 0, 1, 0, 0]).count(), 0, "length exceeds the buffer");
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0, "length below the attribute header");
    }
}
