//! Published ports: their sockets, the addresses of clients, the rules of the firewall, and the
//! upstreams that connect to containers.
//!
//! | module | purpose |
//! |---|---|
//! | [`bind`] | opens the sockets of a port mapping |
//! | [`client_address`] | the source address that a container sees |
//! | [`firewall`] | selects the firewall and how ports are forwarded |
//! | [`limits`] | limits of published ports, as flags and as a variable |
//! | [`nat_publish`] | ports that the NAT engine forwards |
//! | [`port_error`] | messages for ports that cannot be opened |
//! | [`publisher`] | adds and removes ports at run time |

#![forbid(unsafe_code)]

pub mod bind;
pub mod client_address;
pub mod firewall;
pub mod limits;
pub mod nat_publish;
pub mod port_error;
pub mod publisher;
