//! The mesh: networks that span hosts. Under construction: the cluster state, and the devices of
//! overlay networks.
//!
//! | module | contents |
//! |---|---|
//! | [`store`] | the key-value store that the hosts share |
//! | [`key`], [`record`] | its keys and values |
//! | [`view`] | the cluster as one host knows it |
//! | [`overlay`] | what a host has to program for an overlay network |
//! | [`device`] | the VXLAN device of a network, and its entries in the kernel |

#![forbid(unsafe_code)]

pub mod agent;
pub mod device;
pub mod key;
pub mod liveness;
pub mod membership;
pub mod overlay;
pub mod programmer;
pub mod record;
pub mod store;
pub mod underlay;
pub mod view;
pub mod vtep_guard;
