//! What can be set, and what it is when nobody sets it.

use crate::flow_table::TableLimits;
use crate::policy::Policy;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

/// Which features of newer kernels are used. All of them are, where they are there; each can be
/// forced off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `SO_PEEK_OFF` on TCP (Linux 6.9). Without it everything that the guest has not acknowledged
    /// is copied again with each look, and less of it may be under way.
    pub peek_offset: bool,
    /// TCP and checksum offload of the TUN device (`TUNSETOFFLOAD`).
    pub tcp_offload: bool,
    /// UDP segmentation offload of the TUN device (Linux 6.2). Without it datagrams cross the
    /// device one by one.
    pub udp_offload: bool,
    /// GSO batches of datagrams on the host's sockets (`UDP_SEGMENT`, Linux 4.18, and
    /// `UDP_GRO`, 5.0).
    pub udp_gso: bool,
}

impl Capabilities {
    /// Everything.
    pub const ALL: Self =
        Self { peek_offset: true, tcp_offload: true, udp_offload: true, udp_gso: true };
    /// What Linux 4.9 had.
    pub const NONE: Self =
        Self { peek_offset: false, tcp_offload: false, udp_offload: false, udp_gso: false };

    /// Those that both have.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            peek_offset: self.peek_offset && other.peek_offset,
            tcp_offload: self.tcp_offload && other.tcp_offload,
            udp_offload: self.udp_offload && other.udp_offload,
            udp_gso: self.udp_gso && other.udp_gso,
        }
    }
}

impl Default for Capabilities {
    fn default() -> Self {
        Self::ALL
    }
}

/// What a far end sees of a container's UDP socket that talks to several (RFC 4787 section 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapping {
    /// Another port for each far end ("address and port-dependent"): each session has a connected
    /// socket, and the kernel lets in what comes from its far end only.
    #[default]
    PerFarEnd,
    /// One port for all of them ("endpoint-independent"), which is what STUN (RFC 8489) and hole
    /// punching live on. What comes from addresses that the container has not sent to is kept out
    /// (section 5, "address-dependent filtering").
    EndpointIndependent,
}

/// Addresses to go out from. Flows to loopback go out from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outbound {
    /// Of IPv4.
    pub v4: Option<Ipv4Addr>,
    /// Of IPv6.
    pub v6: Option<Ipv6Addr>,
}

impl Outbound {
    /// The one for a flow to `to`, if there is one.
    pub(crate) fn towards(&self, to: IpAddr) -> Option<IpAddr> {
        match to {
            to if to.is_loopback() => None,
            IpAddr::V4(_) => self.v4.map(Into::into),
            IpAddr::V6(_) => self.v6.map(Into::into),
        }
    }
}

/// How long what is silent is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Until a connect has succeeded (the kernel's own is 127 s, BSD's 75 s).
    pub connect: Duration,
    /// A TCP connection. RFC 5382 REQ-5 wants 2 h 4 min at least.
    pub idle: Duration,
    /// A TCP connection with one half closed. RFC 5382 section 5 has 4 minutes for those that open
    /// or close; slirp4netns 2.
    pub half_closed: Duration,
    /// How long a connection that the far end closed first answers for its last acknowledgement,
    /// should that be lost.
    pub linger: Duration,
    /// A UDP session that nobody has answered (the kernel's conntrack: 30 s).
    pub udp_tentative: Duration,
    /// A UDP session with traffic both ways. RFC 4787 REQ-5 wants 2 minutes at least; passt has 180
    /// s.
    pub udp_assured: Duration,
    /// A UDP session with port 53, which is over with its answer.
    pub dns: Duration,
    /// Echoes. RFC 5508 REQ-1 wants 60 s at least.
    pub echo: Duration,
    /// The pieces of a packet (the kernel's `ipfrag_time`).
    pub fragments: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(75),
            idle: Duration::from_secs(2 * 3600 + 240),
            half_closed: Duration::from_secs(240),
            linger: Duration::from_secs(1),
            udp_tentative: Duration::from_secs(30),
            udp_assured: Duration::from_secs(180),
            dns: Duration::from_secs(10),
            echo: Duration::from_secs(60),
            fragments: Duration::from_secs(30),
        }
    }
}

/// Hears which endpoints flood, so that their packets can be dropped before they reach the device.
pub trait FloodListener: fmt::Debug + Send + Sync {
    /// SYNs from `source` are being refused. Called on the engine's thread, for one in 64 of them:
    /// it must not block.
    fn flooding(&self, source: IpAddr);
}

/// The engine's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the networks behind it are called in the log.
    pub network: Arc<str>,
    /// Bytes that fit into one packet of the device.
    pub mtu: u16,
    /// Who may go where.
    pub policy: Policy,
    /// There is one guest alone, so that nobody has to be served fairly beside it.
    pub one_guest: bool,
    /// Bounds of the flow table.
    pub limits: TableLimits,
    /// Time limits.
    pub timeouts: Timeouts,
    /// What TCP windows are bounded by, in bytes: at most 2 MiB. 1 MiB is the fastest here: 4 MiB
    /// do not stay in the cache.
    pub window: u32,
    /// What is made of the kernel.
    pub capabilities: Capabilities,
    /// Which far ends share a socket.
    pub mapping: Mapping,
    /// Which of the host's addresses flows go out from, of each family; where none is given, as the
    /// route says.
    pub outbound: Outbound,
    /// Hears of floods.
    pub floods: Option<Arc<dyn FloodListener>>,
}

impl Settings {
    /// The defaults, for a device with `mtu`.
    #[must_use]
    pub fn new(mtu: u16) -> Self {
        Self {
            network: Arc::from(""),
            mtu,
            policy: Policy::default(),
            one_guest: false,
            limits: TableLimits::default(),
            timeouts: Timeouts::default(),
            window: 1 << 20,
            capabilities: Capabilities::ALL,
            mapping: Mapping::default(),
            outbound: Outbound::default(),
            floods: None,
        }
    }
}
