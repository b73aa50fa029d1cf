//! Tells that something about a namespace's network has changed. What has changed, the listener
//! observes itself.
//!
//! Messages can be lost when many come at once (`ENOBUFS`), and then the kernel says just that. So
//! what they say is not applied: that there was one, or that one was lost, is all there is to know.
//! Only the header is read, to leave out what happens all the time on a busy host and removes
//! nothing of ours: ARP and neighbour discovery, routes of routing protocols.

use crate::Namespace;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use tidegate_model::registry;

/// What is listened for; by its multicast groups (`include/uapi/linux/rtnetlink.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Addresses of IPv4 and IPv6.
    Addresses,
    /// Entries of forwarding databases of bridges. Neighbours of other families are not reported.
    Fdb,
    /// Interfaces, and the bridges that they are ports of.
    Links,
    /// Routes that were deleted, and were made by the kernel or by tidegate.
    Routes,
    /// Policy rules.
    Rules,
    /// Forwarding and its like, for all interfaces or one (`net.ipv4.conf`, `net.ipv6.conf`).
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

/// Messages taken at a time, should someone change things without end.
const AT_A_TIME: usize = 1024;

/// A socket at which word arrives. It becomes readable then, and stays so until
/// [`drain`](Self::drain).
pub struct ChangeListener {
    socket: Socket,
    /// Of the routing socket, whose messages are filtered.
    is_routing: bool,
}

impl ChangeListener {
    /// Begins to listen for `topics` in `namespace`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no descriptor is left.
    pub fn of(namespace: &Namespace, topics: &[Topic]) -> io::Result<Self> {
        let groups = topics.iter().flat_map(|topic| topic.groups());
        namespace.with(|| Self::listen(NETLINK_ROUTE, groups))?
    }

    /// Begins to listen, in the namespace of the calling thread, for changes of nftables, and of
    /// the variant of iptables that is made of them.
    ///
    /// # Errors
    /// No descriptor is left, or there is no privilege to listen.
    pub fn of_rules() -> io::Result<Self> {
        // NFNLGRP_NFTABLES (include/uapi/linux/netfilter/nfnetlink.h)
        Self::listen(NETLINK_NETFILTER, [&7])
    }

    fn listen<'a>(protocol: isize, groups: impl IntoIterator<Item = &'a u32>) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self { socket, is_routing: protocol == NETLINK_ROUTE })
    }

    /// Takes what has come. Whether there was anything of interest.
    pub fn drain(&self) -> bool {
        let mut changed = false;
        for _ in 0..AT_A_TIME {
            // What does not fit is cut off, and is not read anyway.
            let mut beginning = [0; HEADERS];
            match self.socket.recv(&mut &mut beginning[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return changed,
                Err(_) => changed = true,
                Ok(length) => {
                    changed |=
                        !self.is_routing || is_of_interest(&beginning[..length.min(HEADERS)]);
                }
            }
        }
        // There may be more, which nobody would tell of again.
        true
    }
}

/// Bytes of a message that are read: `struct nlmsghdr` and the longer one of `struct rtmsg` and
/// `struct ndmsg`.
const HEADERS: usize = 16 + 12;

/// Whether a message of the routing socket, of which `beginning` is the beginning, may be about
/// something of ours that was removed.
fn is_of_interest(beginning: &[u8]) -> bool {
    /// include/uapi/linux/rtnetlink.h
    const NEWROUTE: u16 = 24;
    const DELROUTE: u16 = 25;
    const NEWNEIGH: u16 = 28;
    const DELNEIGH: u16 = 29;
    /// `RTPROT_KERNEL`: routes that come with an address.
    const KERNEL: u8 = 2;
    /// `NUD_NOARP`: a static entry.
    const NOARP: u16 = 0x40;
    let byte = |at: usize| beginning.get(at).copied();
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

/// The same as long as it lives.
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

    /// A message of `kind`, with the bytes at these places of its second header set.
    fn message(kind: u16, set: &[(usize, u8)]) -> [u8; HEADERS] {
        let mut message = [0; HEADERS];
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        for (at, byte) in set {
            message[16 + at] = *byte;
        }
        message
    }

    #[test]
    fn what_removes_nothing_of_ours_is_left_out() {
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
            assert_eq!(is_of_interest(&message(kind, set)), is, "{kind} {set:?}");
        }
        assert!(is_of_interest(&[]), "cut off");
    }
}
