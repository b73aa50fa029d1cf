//! TUN device and kernel sockets. All system calls of this crate are in this module.

mod destinations;
pub(crate) mod driver;
mod netlink;
pub(crate) mod sockets;
mod sys;
pub(crate) mod tun;
pub(crate) mod tun_options;
