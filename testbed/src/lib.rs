//! Network topologies in temporary namespaces, with servers and tools for tests and benchmarks.
//!
//! A test of container networking needs a client, a host and a container connected by a real
//! kernel, and must not leave traces on the machine. This crate provides:
//!
//! - [`Namespace`]: a network namespace that exists only as a descriptor of this process, so it
//!   vanishes with the process even if that is killed;
//! - [`Topology`]: client, host and container connected by veth pairs and a bridge, IPv4 and IPv6;
//! - [`Segment`]: one more link, with any number of hosts on it;
//! - [`Process`]: a child process that is killed and reaped on drop, with its output and its CPU,
//!   memory and descriptor usage;
//! - [`flood`]: a flooding container, and the response times that its neighbour sees meanwhile;
//! - [`hosts`]: hosts of a cluster on one switch, and their etcd;
//! - [`frames`]: raw Ethernet frames, sent and received on a link;
//! - `puppet`: a thread of another process that makes system calls for a test (x86_64);
//! - [`server`]: small TCP and UDP servers that run on threads inside a namespace.
//!
//! # Failure is a panic
//!
//! An incomplete topology yields results that look like findings. So every failed setup panics,
//! with the attempted step, the error of the kernel or the tool, and the line of the caller.
//! Nothing is skipped: a test that cannot run must fail, so [`require_root`] and
//! [`require_program`] panic as well.
//!
//! # Isolation
//!
//! A namespace created here has only the links that were added to it, and [`Topology`] connects
//! only its own namespaces. No packet can reach the network of the machine.
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
pub mod hosts;
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
    workspace_program,
};
pub use segment::Segment;
pub use topology::{Builder as TopologyBuilder, Topology, addr};

use std::time::{Duration, Instant};

/// Calls `ready` every millisecond until it returns true, for at most `timeout`. Returns whether it
/// did.
///
/// For conditions without a notification, such as a link that goes away or a counter that settles.
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
