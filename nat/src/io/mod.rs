//! The engine's world: a TUN device and the kernel's sockets. All system calls of this crate are
//! below here.

mod destinations;
pub(crate) mod driver;
mod netlink;
pub(crate) mod sockets;
mod sys;
pub(crate) mod tun;
