//! Drop-in personalities: other programs' command lines and protocols, with our engine behind them.

pub mod docker_proxy;
pub mod slirp4netns;
mod start_up_pages;
