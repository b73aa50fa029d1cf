//! Optional kernel features. Each is probed for and has a fallback. Each can also be forced off, so
//! that tests on a new kernel exercise the behaviour on an old one.
//!
//! This is the only module of this crate that reads external state: the environment variable
//! [`LACKS`], once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Environment variable with a comma-separated list of features to treat as missing. `all` means
/// every feature that depends on the kernel version. For tests.
pub const LACKS: &str = "TIDEGATE_LACKS";

/// A kernel feature that is used if present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// `/dev/net/tun`, independent of the kernel version; without it there is no NAT engine.
    Tun,
    /// nftables tables that a netlink socket owns and that persist when it is closed (Linux 6.9);
    /// otherwise tables without an owner, which are repaired after changes.
    OwnedTables,
    /// BPF programs at the egress of bridges; otherwise policy rules back up the firewall.
    Gates,
    /// Attaching gates through tcx (Linux 6.6), and port guards without `clsact`.
    Tcx,
    /// Port guards in the qdisc `clsact`, independent of the kernel version; otherwise through tcx.
    Clsact,
    /// Port guards as BPF programs, independent of the kernel version; otherwise nftables.
    BpfGuards,
    /// Port guards in nftables, independent of the kernel version; otherwise classic BPF.
    NetdevGuards,
    /// Port guards in classic BPF, independent of the kernel version; otherwise no port guards.
    ClassicGuards,
    /// IPv6 forwarding per link (`force_forwarding`, Linux 6.17); otherwise forwarding is enabled
    /// for a whole namespace, if tidegate created it.
    ForceForwarding,
    /// `SO_PEEK_OFF` on TCP (Linux 6.9); otherwise bytes that were peeked before are copied again.
    PeekOffset,
    /// Checksum and segmentation offload of TUN devices; otherwise packets carry one segment each.
    TunOffload,
    /// UDP segmentation offload of TUN devices (Linux 6.2); otherwise each packet carries one
    /// datagram.
    Uso,
    /// `UDP_SEGMENT` (Linux 4.18) and `UDP_GRO` (5.0); otherwise each message carries one datagram.
    UdpGso,
    /// nftables in the namespaces of containers, to redirect DNS; otherwise DNS is served on port
    /// 53 directly.
    DnsRedirect,
    /// The guard of VXLAN in nftables, independent of the kernel version; otherwise BPF programs.
    MeshRules,
}

impl Feature {
    /// All features.
    pub const ALL: [Self; 15] = [
        Self::Tun,
        Self::OwnedTables,
        Self::Gates,
        Self::Tcx,
        Self::Clsact,
        Self::BpfGuards,
        Self::NetdevGuards,
        Self::ClassicGuards,
        Self::ForceForwarding,
        Self::PeekOffset,
        Self::TunOffload,
        Self::Uso,
        Self::UdpGso,
        Self::DnsRedirect,
        Self::MeshRules,
    ];

    /// The name of the feature in [`LACKS`].
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::OwnedTables => "owned-tables",
            Self::Gates => "gates",
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::BpfGuards => "bpf-guards",
            Self::NetdevGuards => "netdev-guards",
            Self::ClassicGuards => "classic-guards",
            Self::ForceForwarding => "force-forwarding",
            Self::PeekOffset => "peek-offset",
            Self::TunOffload => "tun-offload",
            Self::Uso => "uso",
            Self::UdpGso => "udp-gso",
            Self::DnsRedirect => "dns-redirect",
            Self::MeshRules => "mesh-rules",
        }
    }

    /// Whether the feature is to be treated as missing without probing for it.
    #[must_use]
    pub fn is_forced_off(self) -> bool {
        static FORCED_OFF: OnceLock<String> = OnceLock::new();
        let forced_off = FORCED_OFF.get_or_init(|| std::env::var(LACKS).unwrap_or_default());
        ALL_OFF.load(Ordering::Relaxed) && self.depends_on_version() || is_listed(self, forced_off)
    }

    /// Whether some supported kernel (Linux 5.10 or later) is too old for the feature. Other
    /// features depend on privileges or on the kernel configuration.
    const fn depends_on_version(self) -> bool {
        !matches!(
            self,
            Self::Tun
                | Self::Clsact
                | Self::BpfGuards
                | Self::NetdevGuards
                | Self::ClassicGuards
                | Self::MeshRules
        )
    }
}

static ALL_OFF: AtomicBool = AtomicBool::new(false);

/// Equivalent to `all` in [`LACKS`], for the rest of this process. For tests within the process.
#[doc(hidden)]
pub fn force_all_off() {
    ALL_OFF.store(true, Ordering::Relaxed);
}

fn is_listed(feature: Feature, forced_off: &str) -> bool {
    let matches =
        |one: &str| one == feature.as_str() || one == "all" && feature.depends_on_version();
    forced_off.split(',').any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_forced_off_by_name_or_all_at_once() {
        assert!(Feature::ALL.iter().all(|feature| !is_listed(*feature, "")));
        assert!(is_listed(Feature::Uso, "tun,uso") && !is_listed(Feature::Uso, "tun,us"));
        for feature in Feature::ALL {
            assert!(is_listed(feature, feature.as_str()));
            assert_eq!(is_listed(feature, "all"), feature.depends_on_version());
        }
    }
}
