//! Notifications about network changes in a namespace. A notification carries no details; its
//! receiver observes the current state.
//!
//! The kernel drops messages when the socket buffer overflows and reports only `ENOBUFS`. The
//! contents of messages are therefore not applied: a message or a loss just means that the state
//! has changed. Only headers are read, to ignore frequent changes that cannot remove objects of
//! tidegate, such as ARP, neighbour discovery and routes of routing protocols.

use crate::Namespace;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use tidegate_model::registry;

/// A subject of notifications, mapped to rtnetlink multicast groups
/// (`include/uapi/linux/rtnetlink.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// IPv4 and IPv6 addresses.
    Addresses,
    /// Forwarding database entries of bridges. Neighbour entries of other families are ignored.
    Fdb,
    /// Interfaces and their bridge membership.
    Links,
    /// Deletion of routes created by the kernel or by tidegate.
    Routes,
    /// Policy rules.
    Rules,
    /// Interface settings such as forwarding, global or per interface (`net.ipv4.conf`,
    /// `net.ipv6.conf`).
    Settings,
}

impl Topic {
    const fn groups(self) -> &'static [u32] {
        match self {
            // RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR
            Self::Addresses => &[5, 9],
            // RTNLGRP_NEIGH
            Self::Fdb => &[3],
            // RTNLGRP_LINK
            Self::Links => &[1],
            // RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV6_ROUTE
            Self::Routes => &[7, 11],
            // RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_RULE
            Self::Rules => &[8, 19],
            // RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF
            Self::Settings => &[24, 25],
        }
    }
}

/// Maximum number of messages read per call, which bounds a call while changes continue.
const MAX_MESSAGES: usize = 1024;

/// A netlink socket that receives notifications. It becomes readable with the first one and stays
/// readable until [`drain`](Self::drain).
pub struct ChangeListener {
    socket: Socket,
    /// The socket is an rtnetlink socket, whose messages are filtered.
    is_routing: bool,
}

impl ChangeListener {
    /// Subscribes to `topics` in `namespace`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the process is out of file descriptors.
    pub fn of(namespace: &Namespace, topics: &[Topic]) -> io::Result<Self> {
        let groups = topics.iter().flat_map(|topic| topic.groups());
        namespace.with(|| Self::listen(NETLINK_ROUTE, groups))?
    }

    /// Subscribes to changes of nftables, which includes iptables-nft, in the calling thread's
    /// network namespace.
    ///
    /// # Errors
    /// The process is out of file descriptors, or lacks the privilege to subscribe.
    pub fn of_rules() -> io::Result<Self> {
        // NFNLGRP_NFTABLES (include/uapi/linux/netfilter/nfnetlink.h)
        Self::listen(NETLINK_NETFILTER, [&7])
    }

    fn listen<'a>(protocol: isize, groups: impl IntoIterator<Item = &'a u32>) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        // All groups with one call: it takes time proportional to the number of listeners in all
        // namespaces (`netlink_update_listeners` in net/netlink/af_netlink.c).
        let groups = groups.into_iter().fold(0, |all, group| all | 1 << (group - 1));
        socket.bind(&SocketAddr::new(0, groups))?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, is_routing: protocol == NETLINK_ROUTE })
    }

    /// Reads all pending messages. Returns whether any of them is relevant.
    pub fn drain(&self) -> bool {
        let mut changed = false;
        for _ in 0..MAX_MESSAGES {
            // The kernel truncates the message to the headers; the rest is not needed.
            let mut headers = [0; HEADERS];
            match self.socket.recv(&mut &mut headers[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return changed,
                Err(_) => changed = true,
                Ok(length) => {
                    changed |= !self.is_routing || is_relevant(&headers[..length.min(HEADERS)]);
                }
            }
        }
        // More messages may be pending, for which an edge-triggered poll would not wake up again.
        true
    }
}

/// Bytes to read per message: `struct nlmsghdr`, and the longer of `struct rtmsg` and `struct
/// ndmsg`.
const HEADERS: usize = 16 + 12;

/// Returns whether an rtnetlink message with these headers may report the removal of an object of
/// tidegate.
fn is_relevant(headers: &[u8]) -> bool {
    /// include/uapi/linux/rtnetlink.h
    const NEWROUTE: u16 = 24;
    const DELROUTE: u16 = 25;
    const NEWNEIGH: u16 = 28;
    const DELNEIGH: u16 = 29;
    /// `RTPROT_KERNEL`: routes that the kernel adds with an address.
    const KERNEL: u8 = 2;
    /// `NUD_NOARP`: a static entry.
    const NOARP: u16 = 0x40;
    let byte = |at: usize| headers.get(at).copied();
    let short = |at: usize| Some(u16::from_ne_bytes([byte(at)?, byte(at + 1)?]));
    match short(4) {
        Some(NEWROUTE) => false,
        // rtm_protocol
        Some(DELROUTE) => {
            byte(16 + 5).is_none_or(|by| by == KERNEL || by == registry::ROUTE_PROTOCOL)
        }
        // ndm_family; ndm_state
        Some(DELNEIGH) => byte(16).is_none_or(|family| i32::from(family) == libc::AF_BRIDGE),
        Some(NEWNEIGH) => {
            byte(16).is_none_or(|family| i32::from(family) == libc::AF_BRIDGE)
                && short(16 + 8).is_none_or(|state| state & NOARP != 0)
        }
        _ => true,
    }
}

/// The descriptor never changes.
impl AsRawFd for ChangeListener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl fmt::Debug for ChangeListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ChangeListener").field(&self.socket.as_raw_fd()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds a message of type `kind`, with these bytes of its second header set.
    fn message(kind: u16, set: &[(usize, u8)]) -> [u8; HEADERS] {
        let mut message = [0; HEADERS];
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        for (at, byte) in set {
            message[16 + at] = *byte;
        }
        message
    }

    #[test]
    fn changes_that_cannot_remove_own_objects_are_ignored() {
        const BRIDGE: u8 = 7;
        const ARP: u8 = 2;
        const BGP: u8 = 186;
        for (kind, set, is) in [
            (17, &[][..], true),
            (24, &[(5, 2)], false),
            (25, &[(5, 2)], true),
            (25, &[(5, registry::ROUTE_PROTOCOL)], true),
            (25, &[(5, BGP)], false),
            (28, &[(0, ARP), (8, 2)], false),
            (29, &[(0, ARP)], false),
            (29, &[(0, BRIDGE)], true),
            (28, &[(0, BRIDGE), (8, 2)], false),
            (28, &[(0, BRIDGE), (8, 0x40)], true),
        ] {
            assert_eq!(is_relevant(&message(kind, set)), is, "{kind} {set:?}");
        }
        assert!(is_relevant(&[]), "truncated");
    }
}
