//! The mesh: networks that span hosts. Under construction; it consists of the cluster state only.
//!
//! | module | contents |
//! |---|---|
//! | [`store`] | the key-value store that the hosts share |
//! | [`key`], [`record`] | its keys and values |
//! | [`view`] | the cluster as one host knows it |

#![forbid(unsafe_code)]

pub mod key;
pub mod record;
pub mod store;
pub mod view;
