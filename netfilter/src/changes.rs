//! Word that the rules of a namespace have changed; what, the listener looks up himself.

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// Changes of nftables, and of the variant of iptables that is made of them (`NFNLGRP_NFTABLES`).
const GROUP: u32 = 7;

/// Messages taken at a time, should someone change things without end.
const AT_A_TIME: usize = 4096;

/// A socket at which word arrives. It becomes readable then, and stays so until [`drain`](Self::drain).
pub struct Changes(Socket);

impl Changes {
    /// Begins to listen in the namespace of the calling thread.
    ///
    /// # Errors
    /// No descriptor is left, or there is no privilege to listen.
    pub fn listen() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
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
impl AsRawFd for Changes {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Changes").field(&self.0.as_raw_fd()).finish()
    }
}
