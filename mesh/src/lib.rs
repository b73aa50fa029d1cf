//! The mesh: networks that span hosts. Under construction: the cluster state, and the plan of an
//! overlay network.
//!
//! | module | contents |
//! |---|---|
//! | [`store`] | the key-value store that the hosts share |
//! | [`key`], [`record`] | its keys and values |
//! | [`view`] | the cluster as one host knows it |
//! | [`overlay`] | what a host has to program for an overlay network |

#![forbid(unsafe_code)]

pub mod key;
pub mod overlay;
pub mod record;
pub mod store;
pub mod view;
