//! Many datagrams per system call, both ways.
//!
//! A datagram proxy pays for each system call and for each walk through the network stack, hardly
//! for bytes. Three features of the kernel make both rarer:
//!
//! - `recvmmsg(2)` and `sendmmsg(2)` move up to [`SLOTS`] messages per call;
//! - `UDP_GRO` (5.0) delivers a GSO batch of equal datagrams of one flow as one message, with the
//!   segment size in a control message;
//! - `UDP_SEGMENT` (4.18) takes such a GSO batch and cuts it only at the device, so it walks the
//!   stack once.
//!
//! Measured on a published port with 1200-byte datagrams from a sender that uses segmentation
//! itself: 67 to 72 thousand datagrams a second with one call each, over a million with all three.
//!
//! [`RecvBatch`] receives, [`Datagram`] is one message of it, [`SendBatch::forward`] sends a run of
//! messages on, merged by the rules in [`merge`]. Boundaries between datagrams are kept exactly;
//! zero-length datagrams and those of 65,507 bytes included.

mod control;
mod merge;
mod receive;
mod send;

pub use merge::{Group, MAX_BATCH_BYTES, MAX_SEGMENTS, next_group};
pub use receive::{Datagram, RecvBatch};
pub use send::{Destination, Offload, SendBatch, Sent};

use crate::options::set_number;
use std::io;
use std::os::fd::AsFd;

/// How many messages one call moves at most.
pub const SLOTS: usize = 64;

/// What a slot must hold: the largest batch that the kernel builds, or the largest datagram.
pub const SLOT_BYTES: usize = 1 << 16;

/// Lets the kernel deliver GSO batches (`UDP_GRO`).
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.0; then messages come one by one, which [`RecvBatch`] takes as
/// well.
pub fn enable_receive_offload(socket: impl AsFd) -> io::Result<()> {
    set_option(socket, libc::SOL_UDP, libc::UDP_GRO)
}

/// Lets the kernel tell which of our addresses each datagram was sent to (`IP_PKTINFO`,
/// `IPV6_RECVPKTINFO`): an answer must come from there, or a client behind a NAT never sees it.
///
/// # Errors
/// What setsockopt(2) says.
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
