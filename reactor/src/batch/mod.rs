//! Batched receive and send of datagrams.
//!
//! The cost of a datagram proxy depends on the number of system calls and traversals of the network
//! stack, and hardly on the number of bytes. Three kernel features reduce both:
//!
//! - `recvmmsg(2)` and `sendmmsg(2)` transfer up to [`SLOTS`] messages per call;
//! - `UDP_GRO` (5.0) delivers datagrams of equal size and of one flow as one GSO batch, with the
//!   segment size in a control message;
//! - `UDP_SEGMENT` (4.18) sends such a GSO batch through the stack once and segments it at the
//!   device.
//!
//! Measured on a published port with 1200-byte datagrams from a sender that uses GSO: 67,000 to
//! 72,000 datagrams per second with one system call each, over a million with all three features.
//!
//! [`RecvBatch`] receives messages, and [`Datagram`] is one of them. [`SendBatch::forward`] sends a
//! run of messages, merged by the rules in [`merge`]. Datagram boundaries are preserved exactly,
//! including datagrams of zero and of 65,507 bytes.

mod control;
mod merge;
mod receive;
mod send;

pub use merge::{Group, MAX_BATCH_BYTES, MAX_SEGMENTS, next_group};
pub use receive::{Datagram, RecvBatch};
pub use send::{Destination, Offload, SendBatch, Sent, send_message};

use crate::options::set_number;
use std::io;
use std::os::fd::AsFd;

/// Maximum number of messages per system call.
pub const SLOTS: usize = 64;

/// Size of a slot in bytes: the largest GSO batch of the kernel, and the largest datagram.
pub const SLOT_BYTES: usize = 1 << 16;

/// Enables delivery of GSO batches (`UDP_GRO`).
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.0. Each message is then a single datagram, which [`RecvBatch`] also
/// supports.
pub fn enable_receive_offload(socket: impl AsFd) -> io::Result<()> {
    set_option(socket, libc::SOL_UDP, libc::UDP_GRO)
}

/// Enables reporting of the local address that each datagram was sent to (`IP_PKTINFO`,
/// `IPV6_RECVPKTINFO`). A reply must use it as its source, or a NAT in front of the client drops
/// the reply.
///
/// # Errors
/// Errors of setsockopt(2).
pub fn enable_packet_info(socket: impl AsFd, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO)
    } else {
        set_option(socket, libc::IPPROTO_IP, libc::IP_PKTINFO)
    }
}

fn set_option(socket: impl AsFd, level: libc::c_int, option: libc::c_int) -> io::Result<()> {
    set_number(socket, level, option, 1)
}

#[cfg(test)]
mod tests;
