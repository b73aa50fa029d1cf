//! Network topologies in throwaway namespaces, and what tests and benchmarks put into them.
//!
//! A test of container networking needs a client, a host and a container with a real kernel between
//! them, and must leave the machine it runs on as it found it. This crate gives it:
//!
//! - [`Namespace`]: a network namespace that exists as a descriptor of this process and nowhere
//!   else, so it vanishes with the process however that ends;
//! - [`Topology`]: client, host and container joined by veth pairs and a bridge, IPv4 and IPv6;
//! - [`Segment`]: one more link, with as many hosts on it as wanted;
//! - [`Process`]: a child that is killed and reaped when its guard goes, with its output and its
//!   use of CPU, memory and descriptors at hand;
//! - [`flood`]: a container that floods, and what its neighbour's requests take meanwhile;
//! - [`frames`]: Ethernet frames by hand, sent and received at a link;
//! - `puppet`: a thread of another process that makes system calls for a test (x86_64);
//! - [`server`]: small TCP and UDP servers that run on threads of their own inside a namespace.
//!
//! # Failure is a panic
//!
//! Half a topology gives results that look like findings. Whatever cannot be set up therefore
//! panics, says what was tried and what the kernel or the tool answered, and points at the caller's
//! line. Nothing here skips: a test that cannot run must fail, so [`require_root`] and
//! [`require_program`] panic as well.
//!
//! # Nothing gets out
//!
//! A namespace made here has only the links that were put into it, and [`Topology`] joins
//! namespaces of its own to one another. No packet can reach the machine's own network.
//!
//! ```no_run
//! use std::{io::Read, net::TcpStream};
//! use tidegate_testbed::{Topology, addr, server::PeerServer};
//!
//! let net = Topology::three();
//! let server = PeerServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
//! let seen = net.client.run(|| {
//!     let mut text = String::new();
//!     TcpStream::connect(server.addr()).unwrap().read_to_string(&mut text).unwrap();
//!     text
//! });
//! assert!(seen.starts_with("203.0.113.9:"));
//! ```

#[cfg(not(target_os = "linux"))]
compile_error!("network namespaces exist on Linux only");

pub mod flood;
pub mod frames;
mod mounts;
mod namespace;
mod pattern;
mod process;
pub mod procfs;
#[cfg(target_arch = "x86_64")]
pub mod puppet;
mod require;
mod segment;
pub mod server;
mod topology;
pub mod transfer;

pub use mounts::{Mounts, MountsBuilder};
pub use namespace::{Namespace, Protocol};
pub use pattern::Pattern;
pub use process::{Process, Signal, pass_fd};
pub use require::{
    debian_package, find_program, raise_open_files, require_program, require_root, version_line,
};
pub use segment::Segment;
pub use topology::{Builder as TopologyBuilder, Topology, addr};

use std::time::{Duration, Instant};

/// Calls `ready` every millisecond until it answers true, for at most `timeout`.
///
/// Returns whether it did. For conditions that the kernel or another process brings about and that
/// nothing announces: a link that goes away, a counter that settles.
pub fn eventually(timeout: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if ready() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
