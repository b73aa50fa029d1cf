//! Settings and their defaults.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::flow_table::TableLimits;
use crate::policy::Policy;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

/// Optional kernel features to use. All available ones are used by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// `SO_PEEK_OFF` on TCP (Linux 6.9). Without it, each peek copies all bytes that the guest has
    /// not acknowledged, and fewer bytes may be in flight.
    pub peek_offset: bool,
    /// TCP and checksum offload of the TUN device (`TUNSETOFFLOAD`).
    pub tcp_offload: bool,
    /// UDP segmentation offload of the TUN device (Linux 6.2). Without it, each packet carries one
    /// datagram.
    pub udp_offload: bool,
    /// GSO batches on the sockets of the host (`UDP_SEGMENT`, Linux 4.18, and `UDP_GRO`, 5.0).
    pub udp_gso: bool,
}

impl Capabilities {
    /// All features.
    pub const ALL: Self =
        Self { peek_offset: true, tcp_offload: true, udp_offload: true, udp_gso: true };
    /// No optional feature.
    pub const NONE: Self =
        Self { peek_offset: false, tcp_offload: false, udp_offload: false, udp_gso: false };

    /// The features that both sets contain.
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

/// NAT mapping behaviour for a UDP socket of a container with several peers (RFC 4787 section 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mapping {
    /// Address and port-dependent mapping: a different port for each peer. Each session has a
    /// connected socket, and the kernel accepts datagrams only from its peer.
    #[default]
    AddressAndPortDependent,
    /// Endpoint-independent mapping: one port for all peers, as required by STUN (RFC 8489) and
    /// hole punching. Datagrams from addresses that the container has not sent to are dropped
    /// (address-dependent filtering, section 5).
    EndpointIndependent,
}

/// Source addresses of egress flows. Flows to loopback use a loopback address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outbound {
    /// Source address of IPv4 flows.
    pub v4: Option<Ipv4Addr>,
    /// Source address of IPv6 flows.
    pub v6: Option<Ipv6Addr>,
}

impl Outbound {
    /// The source address for a flow to `to`, if configured.
    pub(crate) fn source_for(&self, to: IpAddr) -> Option<IpAddr> {
        match to {
            to if to.is_loopback() => None,
            IpAddr::V4(_) => self.v4.map(Into::into),
            IpAddr::V6(_) => self.v6.map(Into::into),
        }
    }
}

/// Timeouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Until a connect succeeds (Linux: 127 s, BSD: 75 s).
    pub connect: Duration,
    /// Idle time of a TCP connection. RFC 5382 REQ-5 requires at least 2 h 4 min.
    pub idle: Duration,
    /// Idle time of a half-closed TCP connection. RFC 5382 section 5 specifies 4 minutes for
    /// connections that open or close; slirp4netns uses 2.
    pub half_closed: Duration,
    /// Time for which a retransmitted FIN of the guest is still acknowledged, after the remote side
    /// closed first.
    pub linger: Duration,
    /// Idle time of an unanswered UDP session (conntrack of the kernel: 30 s).
    pub udp_tentative: Duration,
    /// Idle time of an answered UDP session. RFC 4787 REQ-5 requires at least 2 minutes; passt uses
    /// 180 s.
    pub udp_assured: Duration,
    /// Idle time of a UDP session with port 53, which normally ends with the response.
    pub dns: Duration,
    /// Idle time of an echo session. RFC 5508 REQ-1 requires at least 60 s.
    pub echo: Duration,
    /// Reassembly time of a fragmented packet (`ipfrag_time` of the kernel).
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

/// Receives notifications of flooding endpoints, so that their packets can be dropped before the
/// device.
pub trait FloodListener: fmt::Debug + Send + Sync {
    /// The engine drops SYNs of `source`. Called on the thread of the engine for one in 64 dropped
    /// SYNs of all sources. Must not block.
    fn flooding(&self, source: IpAddr);
}

/// Settings of an engine.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Name of the networks behind the engine, for the log.
    pub network: Arc<str>,
    /// MTU of the device.
    pub mtu: u16,
    /// The egress policy.
    pub policy: Policy,
    /// The device has only one guest, so no fair queueing is needed.
    pub one_guest: bool,
    /// Limits of the flow table.
    pub limits: TableLimits,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Maximum TCP window in bytes, at most 2 MiB. 1 MiB is the fastest value; 4 MiB do not stay in
    /// the CPU cache.
    pub window: u32,
    /// Kernel features to use.
    pub capabilities: Capabilities,
    /// Mapping behaviour for UDP.
    pub mapping: Mapping,
    /// Source address of egress flows, per family; chosen by the routing table if not given.
    pub outbound: Outbound,
    /// Receiver of flood notifications.
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
