//! The mesh: networks that span hosts. Under construction; it consists of the [cluster
//! state](store) only.

#![forbid(unsafe_code)]

pub mod store;
