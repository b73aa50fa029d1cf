//! Published ports once more, with everything forced off that is probed for: as on the oldest kernel there may be.

#[path = "tcp.rs"]
mod tcp;
#[path = "udp.rs"]
mod udp;
