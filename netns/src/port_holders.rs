//! Bound sockets and the processes that hold them, read from `/proc`.

use procfs::ProcResult;
use procfs::net::TcpState;
use procfs::process::{FDTarget, Process};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use tidegate_model::{Protocol, bracketed};

/// Maximum number of processes that an error names. A forking server shares its socket with all its
/// children; with more holders, the error names the first one and counts the others.
const MAX_NAMED_HOLDERS: usize = 3;

/// A socket bound to a port: a TCP listener, or a UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The local address and port.
    pub local: SocketAddr,
    /// The connected peer; address and port are 0 if there is none.
    pub remote: SocketAddr,
    /// Inode of the socket, as in the links in `/proc/PID/fd`.
    pub inode: u64,
}

impl Bound {
    /// Returns whether the socket receives from any client, at any address of the host.
    pub fn is_open_to_all(&self) -> bool {
        self.local.ip().to_canonical().is_unspecified() && self.remote.port() == 0
    }
}

/// Returns the bound sockets of the current network namespace. A kernel without IPv6 has no IPv6
/// sockets.
///
/// # Errors
/// `/proc` cannot be read.
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
    /// The name in `/proc/PID/comm`, with control characters escaped: a process chooses its name,
    /// and messages must stay one line and not control a terminal.
    pub name: String,
    /// The process ID.
    pub pid: i32,
    /// The command line; empty if it is not readable.
    pub command: Vec<String>,
    /// The queried sockets that it holds, by inode.
    pub inodes: BTreeSet<u64>,
}

/// Prints `nginx (pid 812)`.
impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// Returns the processes that hold any of the sockets `inodes`. Only root sees the sockets of other
/// users' processes.
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
    let name = process.stat().map_or_else(|_| "a process".to_owned(), |stat| printable(&stat.comm));
    let command = process.cmdline().unwrap_or_default();
    Some(Holder { name, pid: process.pid(), command, inodes: held })
}

/// Escapes the control characters of `text`.
fn printable(text: &str) -> String {
    let escape = |c: char| {
        let escaped = c.is_control().then(|| c.escape_default());
        escaped.map_or_else(|| c.to_string(), |escaped| escaped.to_string())
    };
    text.chars().map(escape).collect()
}

/// Returns the error text for a port in use at `address`. It names the processes that hold the
/// port, if this process may read their descriptors.
pub fn in_use(address: SocketAddr, protocol: Protocol) -> String {
    let port = port_at(address, protocol);
    let mut holders = holders_of(address, protocol);
    if holders.is_empty() {
        // A list in /proc is read by several system calls, and misses entries if others are removed
        // concurrently.
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

/// Returns the port as errors name it: `port 80/tcp on [::]`.
pub fn port_at(address: SocketAddr, protocol: Protocol) -> String {
    format!("port {}/{protocol} on {}", address.port(), bracketed(address.ip()))
}

/// Returns the processes that hold the port, in the format of [`Holder`], if this process may read
/// their descriptors.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_processes_cannot_control_a_terminal() {
        assert_eq!(printable("\n ERROR \r\u{1b}[2J\u{9b}x"), r"\n ERROR \r\u{1b}[2J\u{9b}x");
        assert_eq!(printable("nginx: worker é"), "nginx: worker é");
    }
}
