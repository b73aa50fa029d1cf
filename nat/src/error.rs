//! Why an engine does not start.

use std::io;

/// See the variants.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `/dev/net/tun` cannot be opened: it is not there, or not for us.
    #[error(
        "open /dev/net/tun: {0} (the module tun must be loaded, and the device be readable and writable for this user)"
    )]
    Device(#[source] io::Error),
    /// The device cannot be made.
    #[error("TUN device {name:?}: {source}")]
    Interface {
        /// Its name.
        name: String,
        /// What the kernel says: `EBUSY` if there is one, `EPERM` without `CAP_NET_ADMIN` in the
        /// namespace.
        #[source]
        source: io::Error,
    },
    /// A name that no interface can have.
    #[error("{0:?} is no name for an interface: 1 to 15 bytes, no slash, no space, no colon")]
    Name(String),
    /// An MTU that the engine cannot work with.
    #[error("an MTU of {0} is out of range (1280 to 65535, of a TAP 65521)")]
    Mtu(u16),
    /// A namespace cannot be entered.
    #[error("enter a network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// No thread, no event loop, no random numbers.
    #[error("start an event loop: {0}")]
    Loop(#[source] io::Error),
}
