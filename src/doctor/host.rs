//! What is known of a host: all that a verdict depends on.

use ipnet::IpNet;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tidegate_model::Protocol;
use tidegate_netsetup::IptablesState;

/// What was found, or why it cannot be told.
pub(super) type Found<T> = Result<T, String>;

/// One host, as one process sees it.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// As `uname -r`.
    pub(super) release: String,
    pub(super) capabilities: Capabilities,
    /// What can be done in a network namespace that this process makes directly.
    pub(super) direct: Found<Trial>,
    /// The same in one that belongs to a user namespace, which needs no privilege.
    pub(super) in_user_namespace: Found<Trial>,
    pub(super) user_namespaces: UserNamespaces,
    /// Whether `/dev/net/tun` opens.
    pub(super) tun_device: Result<(), Code>,
    /// The permission bits of `/dev/net/tun`.
    pub(super) tun_mode: Option<u32>,
    pub(super) sockets: Sockets,
    pub(super) forwarding: Forwarding,
    /// What iptables has here, IPv4 and IPv6; none where it is not in use.
    pub(super) iptables: Found<[Option<IptablesState>; 2]>,
    /// Whether the programs are installed.
    pub(super) iptables_installed: bool,
    /// Chains that may change the mark of the gates behind the rules of iptables that set it.
    pub(super) mark_setters: Vec<String>,
    /// What the host reaches otherwise than by a default route, and by which link.
    pub(super) routes: Found<Vec<(IpNet, String)>>,
    /// The lowest priority of a policy rule of other software.
    pub(super) first_rule: Found<Option<u32>>,
    /// What listens on all addresses.
    pub(super) services: Found<Vec<Service>>,
    pub(super) limits: Limits,
    pub(super) run_directory: RunDirectory,
}

/// What this process may do. Of the capabilities only those that something depends on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Capabilities {
    pub(super) net_admin: bool,
    pub(super) net_bind_service: bool,
    /// One of the two that `fs.pipe-user-pages-soft` does not hold for.
    pub(super) many_pipes: bool,
}

/// An error of the kernel, as a number that can be handed from one process to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Code(i32);

impl From<Errno> for Code {
    fn from(errno: Errno) -> Self {
        Self(errno.raw_os_error())
    }
}

impl From<std::io::Error> for Code {
    /// One that is not of the system becomes `EIO`.
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()))
    }
}

impl PartialEq<Errno> for Code {
    fn eq(&self, errno: &Errno) -> bool {
        self.0 == errno.raw_os_error()
    }
}

/// As strerror(3) says it.
impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(&crate::port_error::without_numbers(&text))
    }
}

/// What came of making a network namespace and trying things in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Trial {
    /// It could not be made.
    NotMade(Code),
    /// It was made, and where this process came from cannot be returned to.
    NoWayBack(Code),
    /// It was made, entered and left.
    Entered(Inside),
}

/// What is possible inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inside {
    /// Bridge, veth pair, addresses and guards: what failed.
    pub(super) network: Result<(), (String, Code)>,
    /// Tables of nftables, and whether they can be made so that nobody else changes them.
    pub(super) nftables: Result<bool, Code>,
    /// Gates at the exits of links.
    pub(super) gates: Result<(), Code>,
    /// Port guards: the mechanism that works, or what is in the way of each.
    pub(super) port_guards: Result<String, Vec<(String, Code)>>,
    /// A TUN device.
    pub(super) tun: Result<TunOffload, Code>,
}

/// What a TUN device leaves to the sender and the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TunOffload {
    /// TCP segmentation.
    pub(super) tcp: bool,
    /// UDP segmentation (Linux 6.2).
    pub(super) udp: bool,
}

/// What may forbid user namespaces. `None`: this kernel does not have the setting.
#[derive(Clone, Debug)]
pub(super) struct UserNamespaces {
    /// `user.max_user_namespaces`
    pub(super) max: Found<Option<u64>>,
    /// `kernel.unprivileged_userns_clone`, of Debian's kernels
    pub(super) unprivileged_clone: Found<Option<u64>>,
    /// `kernel.apparmor_restrict_unprivileged_userns`, of Ubuntu's
    pub(super) apparmor_restricts: Found<Option<u64>>,
}

/// What sockets can do, each tried on one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sockets {
    /// `SO_PEEK_OFF` of TCP (Linux 6.9)
    pub(super) tcp_peek_offset: Result<(), Code>,
    /// `UDP_GRO`
    pub(super) udp_gro: Result<(), Code>,
    /// `UDP_SEGMENT`
    pub(super) udp_segment: Result<(), Code>,
    /// `SO_RCVBUFFORCE`
    pub(super) force_buffer: Result<(), Code>,
    /// A socket of that family.
    pub(super) ipv6: Result<(), Code>,
}

/// What the host does with packets for others.
#[derive(Clone, Debug)]
pub(super) struct Forwarding {
    /// `net.ipv4.ip_forward`
    pub(super) v4: Found<Option<u64>>,
    /// `net.ipv6.conf.all.forwarding`
    pub(super) v6: Found<Option<u64>>,
    /// `net.ipv6.conf.all.disable_ipv6`
    pub(super) v6_disabled: Found<Option<u64>>,
    /// `net.ipv6.conf.all.force_forwarding` (Linux 6.17)
    pub(super) v6_per_interface: Found<Option<u64>>,
}

/// A socket that whoever reaches the host reaches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Service {
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    /// As `nginx (pid 812)`; `None` if this process may not see it.
    pub(super) holder: Option<String>,
}

/// How much of something there may be.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Open files, soft and hard; `None` is no limit.
    pub(super) open_files: (Option<u64>, Option<u64>),
    /// `fs.pipe-user-pages-soft` in bytes; 0 is no limit.
    pub(super) pipe_bytes: Found<Option<u64>>,
    /// `net.core.rmem_max`
    pub(super) receive_buffer: Found<Option<u64>>,
    /// `net.ipv4.ip_unprivileged_port_start`
    pub(super) first_port: Found<Option<u64>>,
}

/// Where tidegate keeps its journals and sockets.
#[derive(Clone, Debug)]
pub(super) struct RunDirectory {
    /// `None`: there is no place for it.
    pub(super) path: Option<PathBuf>,
    /// Whether files can be made in it, or it can be made.
    pub(super) writable: Result<(), Code>,
}
