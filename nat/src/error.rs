//! Errors of starting an engine.

use std::io;

/// Error of starting an engine.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `/dev/net/tun` cannot be opened: it is missing, or not accessible to this user.
    #[error(
        "open /dev/net/tun: {0} (the module tun must be loaded, and the device be readable and writable for this user)"
    )]
    Device(#[source] io::Error),
    /// The device cannot be created.
    #[error("TUN device {name:?}: {source}")]
    Interface {
        /// Name of the device.
        name: String,
        /// Error of the kernel: `EBUSY` if the name is in use, `EPERM` without `CAP_NET_ADMIN` in
        /// the namespace.
        #[source]
        source: io::Error,
    },
    /// Not a valid interface name.
    #[error(
        "{0:?} is not a valid interface name: it must have 1 to 15 bytes, without slash, space and colon"
    )]
    Name(String),
    /// An MTU that the engine does not support.
    #[error("MTU {0} is out of range (1280 to 65535; for a TAP device 65521)")]
    Mtu(u16),
    /// A namespace cannot be entered.
    #[error("enter a network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// The thread or event loop cannot be created, or there are no random numbers.
    #[error("start an event loop: {0}")]
    Loop(#[source] io::Error),
    /// The thread of the engine has ended, after an error that it logged.
    #[error("NAT engine has ended")]
    Ended,
}
