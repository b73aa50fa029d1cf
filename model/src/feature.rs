//! What newer kernels have, is probed for and can be done without; and how each of it is forced
//! off, so that tests on a new kernel show what happens on an old one.
//!
//! It is the one place of this crate that looks around: at the environment variable [`LACKS`],
//! once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Features that the kernel is taken not to have, separated by commas; `all` for every one that old
/// kernels lack. For tests.
pub const LACKS: &str = "TIDEGATE_LACKS";

/// Something that is used where it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// `/dev/net/tun`, which is no matter of the kernel's age: without it there is no NAT engine.
    Tun,
    /// Tables of nftables that belong to a connection and outlast it (Linux 6.9); otherwise they
    /// are everybody's, and repaired.
    OwnedTables,
    /// BPF programs at the egress of bridges; otherwise policy rules stand behind a firewall.
    Gates,
    /// Attachment of BPF programs through tcx (Linux 6.6); otherwise through the qdisc `clsact`.
    Tcx,
    /// BPF programs as port guards, which is no matter of the kernel's age; otherwise nftables.
    BpfGuards,
    /// nftables as port guards, which is no matter of the kernel's age; otherwise classic BPF.
    NetdevGuards,
    /// Classic BPF as port guards, which is no matter of the kernel's age; otherwise there are
    /// none.
    ClassicGuards,
    /// IPv6 forwarding of single links (`force_forwarding`, Linux 6.17); otherwise all of a
    /// namespace's, where it is our own.
    ForceForwarding,
    /// `SO_PEEK_OFF` on TCP (Linux 6.9); otherwise what was looked at before is copied again.
    PeekOffset,
    /// Checksum and segmentation offload of TUN devices; otherwise packets of one segment.
    TunOffload,
    /// UDP segmentation offload of TUN devices (Linux 6.2); otherwise datagrams cross them one by
    /// one.
    Uso,
    /// `UDP_SEGMENT` (Linux 4.18) and `UDP_GRO` (5.0); otherwise datagrams go one by one.
    UdpGso,
    /// nftables in containers' namespaces for DNS; otherwise it is served at port 53 itself.
    DnsRedirect,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Tun,
        Self::OwnedTables,
        Self::Gates,
        Self::Tcx,
        Self::BpfGuards,
        Self::NetdevGuards,
        Self::ClassicGuards,
        Self::ForceForwarding,
        Self::PeekOffset,
        Self::TunOffload,
        Self::Uso,
        Self::UdpGso,
        Self::DnsRedirect,
    ];

    /// Its name in [`LACKS`].
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::OwnedTables => "owned-tables",
            Self::Gates => "gates",
            Self::Tcx => "tcx",
            Self::BpfGuards => "bpf-guards",
            Self::NetdevGuards => "netdev-guards",
            Self::ClassicGuards => "classic-guards",
            Self::ForceForwarding => "force-forwarding",
            Self::PeekOffset => "peek-offset",
            Self::TunOffload => "tun-offload",
            Self::Uso => "uso",
            Self::UdpGso => "udp-gso",
            Self::DnsRedirect => "dns-redirect",
        }
    }

    /// Whether the kernel is to be taken for one that does not have it. If not, it is to be probed
    /// for.
    #[must_use]
    pub fn is_forced_off(self) -> bool {
        static TOLD: OnceLock<String> = OnceLock::new();
        let told = TOLD.get_or_init(|| std::env::var(LACKS).unwrap_or_default());
        ALL_OFF.load(Ordering::Relaxed) && self.comes_with_age() || is_among(self, told)
    }

    /// Whether some kernel from Linux 5.10 on lacks it because it is old. Else privileges or the
    /// kernel's configuration decide.
    const fn comes_with_age(self) -> bool {
        !matches!(self, Self::Tun | Self::BpfGuards | Self::NetdevGuards | Self::ClassicGuards)
    }
}

static ALL_OFF: AtomicBool = AtomicBool::new(false);

/// As with `all` in [`LACKS`], for the rest of this process: for tests within it.
#[doc(hidden)]
pub fn force_all_off() {
    ALL_OFF.store(true, Ordering::Relaxed);
}

fn is_among(feature: Feature, told: &str) -> bool {
    let is_it = |one: &str| one == feature.as_str() || one == "all" && feature.comes_with_age();
    told.split(',').any(is_it)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_forced_off_by_name_or_all_at_once() {
        assert!(Feature::ALL.iter().all(|feature| !is_among(*feature, "")));
        assert!(is_among(Feature::Uso, "tun,uso") && !is_among(Feature::Uso, "tun,us"));
        for feature in Feature::ALL {
            assert!(is_among(feature, feature.as_str()));
            assert_eq!(is_among(feature, "all"), feature.comes_with_age());
        }
    }
}
