//! Which sockets have a port, and whose they are: from `/proc`, as far as this process may look.

use procfs::ProcResult;
use procfs::net::TcpState;
use procfs::process::{FDTarget, Process};
use std::collections::BTreeSet;
use std::net::SocketAddr;
use tidegate_model::Protocol;

/// A socket that a port is taken by: TCP that listens, or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bound {
    /// The port and the address that it answers at.
    pub(crate) local: SocketAddr,
    /// Whom alone it hears; without address and port, everybody.
    pub(crate) remote: SocketAddr,
    /// By which its descriptors are recognised.
    pub(crate) inode: u64,
}

impl Bound {
    /// Whether anybody who reaches the host, by any of its addresses, reaches it.
    pub(crate) fn is_open_to_all(&self) -> bool {
        self.local.ip().to_canonical().is_unspecified() && self.remote.port() == 0
    }
}

/// The sockets of this process's network namespace that have a port. A kernel without IPv6 has none
/// of that family.
///
/// # Errors
/// `/proc` is not there.
pub(crate) fn bound(protocol: Protocol) -> ProcResult<Vec<Bound>> {
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
pub(crate) struct Holder {
    /// As its own `/proc/PID/comm` says.
    pub(crate) name: String,
    pub(crate) pid: i32,
    /// Its command line; nothing if it may not be read.
    pub(crate) command: Vec<String>,
    /// Those of the sockets asked about that it holds.
    pub(crate) inodes: BTreeSet<u64>,
}

/// As `nginx (pid 812)`.
impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// The processes that hold one of the sockets `inodes`. Other users' processes show theirs to root
/// alone.
pub(crate) fn holders(inodes: &BTreeSet<u64>) -> Vec<Holder> {
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
