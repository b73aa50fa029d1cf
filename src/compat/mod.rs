//! Replacements for other programs: their command lines and protocols on top of tidegate.

pub mod docker_proxy;
pub mod slirp4netns;
mod startup_pages;
