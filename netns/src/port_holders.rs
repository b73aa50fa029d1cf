//! The sockets bound to a port, and the processes that hold them, from `/proc`.

use procfs::ProcResult;
use procfs::net::TcpState;
use procfs::process::{FDTarget, Process};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use tidegate_model::{Protocol, bracketed};

/// Number of processes that a message names. A server that forks shares its socket with all its
/// children; if there are more, the message has the first and the number of the others.
const MAX_NAMED_HOLDERS: usize = 3;

/// A socket bound to a port: a TCP listener, or a UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The local address and port.
    pub local: SocketAddr,
    /// The connected peer; address and port are 0 without one.
    pub remote: SocketAddr,
    /// The inode, which identifies descriptors of the socket.
    pub inode: u64,
}

impl Bound {
    /// Whether clients reach the socket by any address of the host.
    pub fn is_open_to_all(&self) -> bool {
        self.local.ip().to_canonical().is_unspecified() && self.remote.port() == 0
    }
}

/// The bound sockets of the current network namespace. A kernel without IPv6 has no IPv6 sockets.
///
/// # Errors
/// If `/proc` is not readable.
pub fn bound(protocol: Protocol) -> ProcResult<Vec<Bound>> {
    let bound = |local, remote, inode| Bound { local, remote, inode };
    match protocol {
        Protocol::Tcp => {
            let all =
                procfs::net::tcp()?.into_iter().chain(procfs::net::tcp6().into_iter().flatten());
            let listening = all.filter(|entry| entry.state == TcpState::Listen);
            Ok(listening
                .map(|one| bound(one.local_address, one.remote_address, one.inode))
                .collect())
        }
        Protocol::Udp => {
            let all =
                procfs::net::udp()?.into_iter().chain(procfs::net::udp6().into_iter().flatten());
            Ok(all.map(|one| bound(one.local_address, one.remote_address, one.inode)).collect())
        }
        Protocol::Sctp => Ok(Vec::new()),
    }
}

/// A process that holds sockets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The name in `/proc/PID/comm`.
    pub name: String,
    /// The process ID.
    pub pid: i32,
    /// The command line; empty if it is not readable.
    pub command: Vec<String>,
    /// The sockets it holds, of those in the query.
    pub inodes: BTreeSet<u64>,
}

/// In the format `nginx (pid 812)`.
impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// The processes that hold one of the sockets `inodes`. The sockets of other users' processes are
/// visible only to root.
pub fn holders(inodes: &BTreeSet<u64>) -> Vec<Holder> {
    if inodes.is_empty() {
        return Vec::new();
    }
    let all = procfs::process::all_processes().into_iter().flatten().flatten();
    all.filter_map(|process| holder(&process, inodes)).collect()
}

fn holder(process: &Process, inodes: &BTreeSet<u64>) -> Option<Holder> {
    let held = |target: FDTarget| match target {
        FDTarget::Socket(inode) if inodes.contains(&inode) => Some(inode),
        _ => None,
    };
    let held: BTreeSet<u64> =
        process.fd().ok()?.flatten().filter_map(|one| held(one.target)).collect();
    if held.is_empty() {
        return None;
    }
    let name = process.stat().map_or_else(|_| "a process".to_owned(), |stat| stat.comm);
    let command = process.cmdline().unwrap_or_default();
    Some(Holder { name, pid: process.pid(), command, inodes: held })
}

/// The message that the port of `protocol` at `address` is in use. It names the processes that hold
/// the port, if this process may read their descriptors.
pub fn in_use(address: SocketAddr, protocol: Protocol) -> String {
    let port = port_at(address, protocol);
    let mut holders = holders_of(address, protocol);
    if holders.is_empty() {
        // The lists in /proc are read in pieces, and lack entries if others are removed meanwhile.
        holders = holders_of(address, protocol);
    }
    match holders.as_slice() {
        [] => format!("{port} is in use"),
        holders if holders.len() <= MAX_NAMED_HOLDERS => {
            format!("{port} is in use by {}", holders.join(", "))
        }
        [first, others @ ..] => format!("{port} is in use by {first} and {} more", others.len()),
    }
}

/// The port as errors name it: `port 80/tcp on [::]`.
pub fn port_at(address: SocketAddr, protocol: Protocol) -> String {
    format!("port {}/{protocol} on {}", address.port(), bracketed(address.ip()))
}

/// The processes that hold the port, as `nginx (pid 812)`, if this process may read their
/// descriptors.
fn holders_of(wanted: SocketAddr, protocol: Protocol) -> Vec<String> {
    let clashes = |local: SocketAddr| {
        let overlaps = local.ip() == wanted.ip()
            || local.ip().is_unspecified()
            || wanted.ip().is_unspecified();
        local.port() == wanted.port() && overlaps
    };
    let bound = bound(protocol).unwrap_or_default();
    let inodes =
        bound.iter().filter(|socket| clashes(socket.local)).map(|socket| socket.inode).collect();
    let holders: BTreeSet<String> = holders(&inodes).iter().map(ToString::to_string).collect();
    holders.into_iter().collect()
}
