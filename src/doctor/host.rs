//! The facts about a host that verdicts depend on.

use ipnet::IpNet;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tidegate_model::Protocol;
use tidegate_netsetup::IptablesState;

/// A fact, or why it cannot be determined.
pub(super) type Found<T> = Result<T, String>;

/// A host as seen by one process.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// The kernel release, as in `uname -r`.
    pub(super) release: String,
    pub(super) capabilities: Capabilities,
    /// The trial in a network namespace created directly.
    pub(super) direct: Found<Trial>,
    /// The trial in a network namespace of a user namespace, which needs no privileges.
    pub(super) in_user_namespace: Found<Trial>,
    pub(super) user_namespaces: UserNamespaces,
    /// Whether `/dev/net/tun` can be opened.
    pub(super) tun_device: Result<(), Code>,
    /// The permission bits of `/dev/net/tun`.
    pub(super) tun_mode: Option<u32>,
    pub(super) sockets: Sockets,
    pub(super) forwarding: Forwarding,
    /// The iptables rules for IPv4 and IPv6; `None` for a family not in use.
    pub(super) iptables: Found<[Option<IptablesState>; 2]>,
    /// Whether the programs of iptables are installed.
    pub(super) iptables_installed: bool,
    /// iptables chains that may overwrite the gate mark after the rules that set it.
    pub(super) mark_setters: Vec<String>,
    /// Non-default routes of the host, with their links.
    pub(super) routes: Found<Vec<(IpNet, String)>>,
    /// The lowest priority of a policy rule that other software has added.
    pub(super) first_rule: Found<Option<u32>>,
    /// Sockets that are bound to all addresses.
    pub(super) services: Found<Vec<Service>>,
    pub(super) limits: Limits,
    pub(super) run_directory: RunDirectory,
}

/// Privileges of this process: the capabilities that verdicts depend on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Capabilities {
    pub(super) net_admin: bool,
    pub(super) net_bind_service: bool,
    /// `CAP_SYS_RESOURCE` or `CAP_SYS_ADMIN`, which exempt from `fs.pipe-user-pages-soft`.
    pub(super) many_pipes: bool,
}

/// An errno, in a form that can be passed between processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Code(i32);

impl From<Errno> for Code {
    fn from(errno: Errno) -> Self {
        Self(errno.raw_os_error())
    }
}

impl From<std::io::Error> for Code {
    /// An error that is not from the system becomes `EIO`.
    fn from(error: std::io::Error) -> Self {
        Self(error.raw_os_error().unwrap_or(Errno::IO.raw_os_error()))
    }
}

impl PartialEq<Errno> for Code {
    fn eq(&self, errno: &Errno) -> bool {
        self.0 == errno.raw_os_error()
    }
}

/// The text of strerror(3).
impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(&tidegate_model::without_errno(&text))
    }
}

/// The result of creating a network namespace and trying features in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Trial {
    /// The namespace could not be created.
    NotMade(Code),
    /// The namespace was created, but the process could not return to its original namespace.
    NoReturn(Code),
    /// The namespace was created, entered and left.
    Entered(Inside),
}

/// The features that work inside the namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inside {
    /// A bridge, a veth pair, addresses and guards: the step that failed.
    pub(super) network: Result<(), (String, Code)>,
    /// nftables, and whether a table can be owned so that no other process changes it.
    pub(super) nftables: Result<bool, Code>,
    /// BPF gates on the egress of links.
    pub(super) gates: Result<(), Code>,
    /// Port guards: the mechanism that works, or the error of each mechanism.
    pub(super) port_guards: Result<String, Vec<(String, Code)>>,
    /// A TUN device.
    pub(super) tun: Result<TunOffload, Code>,
}

/// The offloads of a TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TunOffload {
    /// TCP segmentation.
    pub(super) tcp: bool,
    /// UDP segmentation (Linux 6.2).
    pub(super) udp: bool,
}

/// Settings that can forbid user namespaces. `None`: the kernel has no such setting.
#[derive(Clone, Debug)]
pub(super) struct UserNamespaces {
    /// `user.max_user_namespaces`
    pub(super) max: Found<Option<u64>>,
    /// `kernel.unprivileged_userns_clone`, in Debian kernels
    pub(super) unprivileged_clone: Found<Option<u64>>,
    /// `kernel.apparmor_restrict_unprivileged_userns`, in Ubuntu kernels
    pub(super) apparmor_restricts: Found<Option<u64>>,
}

/// Socket options, each tried on a socket.
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
    /// A socket of the family `AF_INET6`
    pub(super) ipv6: Result<(), Code>,
}

/// The forwarding settings of the host.
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

/// A socket that is bound to all addresses of the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Service {
    pub(super) port: u16,
    pub(super) protocol: Protocol,
    /// Its process, as in `nginx (pid 812)`; `None` if this process may not see it.
    pub(super) holder: Option<String>,
}

/// Resource limits.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Open files, soft and hard; `None` for no limit.
    pub(super) open_files: (Option<u64>, Option<u64>),
    /// `fs.pipe-user-pages-soft` in bytes; 0 for no limit.
    pub(super) pipe_bytes: Found<Option<u64>>,
    /// `net.core.rmem_max`
    pub(super) receive_buffer: Found<Option<u64>>,
    /// `net.ipv4.ip_unprivileged_port_start`
    pub(super) first_port: Found<Option<u64>>,
}

/// The directory of journals and sockets.
#[derive(Clone, Debug)]
pub(super) struct RunDirectory {
    /// `None` if no directory is configured.
    pub(super) path: Option<PathBuf>,
    /// Whether the directory is writable, or can be created.
    pub(super) writable: Result<(), Code>,
}
