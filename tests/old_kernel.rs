//! Published ports once more, with everything forced off that is probed for: as on the oldest
//! kernel there may be. Of TCP nothing is probed for.

#[path = "udp.rs"]
mod udp;
