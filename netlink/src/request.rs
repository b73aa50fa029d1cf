//! Encoding of requests (`struct nlmsghdr`, include/uapi/linux/netlink.h).

/// Length of `struct nlmsghdr`, in bytes.
pub const HEADER: usize = 16;

/// A netlink request: `struct nlmsghdr`, a header defined by the netlink family, and attributes.
pub trait Request {
    /// Length of the family header in requests and replies, in bytes. Callbacks receive the bytes
    /// after it.
    const HEAD: usize;

    /// Appends the encoded request to `buffer`.
    fn write(&self, sequence: u32, more_flags: u16, buffer: &mut Vec<u8>);
}

/// Appends a message to `buffer`. `NLM_F_REQUEST` is added to `flags`.
pub fn write_message(
    kind: u16,
    flags: u16,
    sequence: u32,
    head: &[u8],
    attributes: &[u8],
    buffer: &mut Vec<u8>,
) {
    /// `NLM_F_REQUEST`.
    const REQUEST: u16 = 1;
    let length = HEADER + head.len() + attributes.len();
    // Cannot overflow: large sets are split into several messages.
    buffer.extend((length as u32).to_ne_bytes());
    buffer.extend(kind.to_ne_bytes());
    buffer.extend((REQUEST | flags).to_ne_bytes());
    buffer.extend(sequence.to_ne_bytes());
    buffer.extend(0_u32.to_ne_bytes());
    buffer.extend(head);
    buffer.extend(attributes);
}
