//! The mesh: networks that span hosts.
//!
//! | module | contents |
//! |---|---|
//! | [`store`] | the key-value store that the hosts share |
//! | [`key`], [`record`] | its keys and values |
//! | [`view`] | the cluster as one host knows it |
//! | [`membership`] | what a host writes to the store |
//! | [`agent`] | the tasks of a host: follows the store, keeps its records, programs the kernel |
//! | [`liveness`] | heartbeats: which hosts are heard |
//! | [`overlay`] | what a host has to program for an overlay network |
//! | [`programmer`], [`device`] | the VXLAN devices of the networks, and their entries in the kernel |
//! | [`vtep_guard`] | who may send VXLAN packets |
//! | [`underlay`] | the network between the hosts |
//! | [`services`] | ports that every host publishes, and the endpoints behind them |
//! | [`balance`] | which endpoint of a service gets a connection |

#![forbid(unsafe_code)]

pub mod agent;
pub mod balance;
pub mod device;
pub mod key;
pub mod liveness;
pub mod membership;
pub mod overlay;
pub mod programmer;
pub mod record;
pub mod services;
pub mod store;
pub mod underlay;
pub mod view;
pub mod vtep_guard;
