//! Word that something about a namespace's network has changed; what, the listener looks up himself.
//!
//! Messages can be lost when many come at once (`ENOBUFS`), and then the kernel says just that. So none is read: that there was one, or
//! that one was lost, is all there is to know.

use crate::Namespace;
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// What is listened for; by its multicast groups (`include/uapi/linux/rtnetlink.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Addresses of IPv4 and IPv6.
    Addresses,
    /// Interfaces, and the bridges that they are ports of.
    Links,
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
            // RTNLGRP_LINK
            Self::Links => &[1],
            // RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_RULE
            Self::Rules => &[8, 19],
            // RTNLGRP_IPV4_NETCONF, RTNLGRP_IPV6_NETCONF
            Self::Settings => &[24, 25],
        }
    }
}

/// Messages taken at a time, should someone change things without end.
const AT_A_TIME: usize = 1024;

/// A socket at which word arrives. It becomes readable then, and stays so until [`drain`](Self::drain).
pub struct News(Socket);

impl News {
    /// Begins to listen for `topics` in `namespace`.
    ///
    /// # Errors
    /// The namespace cannot be entered, or no descriptor is left.
    pub fn of(namespace: &Namespace, topics: &[Topic]) -> io::Result<Self> {
        let groups = topics.iter().flat_map(|topic| topic.groups());
        namespace.with(|| Self::listen(NETLINK_ROUTE, groups))?
    }

    /// Begins to listen, in the namespace of the calling thread, for changes of nftables, and of the variant of iptables that is made of them.
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
        Ok(Self(socket))
    }

    /// Takes what has come. Whether there was anything.
    pub fn drain(&self) -> bool {
        let mut changed = false;
        for _ in 0..AT_A_TIME {
            // What does not fit is cut off, and none of it is read anyway.
            let mut beginning = [0; 16];
            match self.0.recv(&mut &mut beginning[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return changed,
                _ => changed = true,
            }
        }
        changed
    }
}

/// The same as long as it lives.
impl AsRawFd for News {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl fmt::Debug for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("News").field(&self.0.as_raw_fd()).finish()
    }
}
