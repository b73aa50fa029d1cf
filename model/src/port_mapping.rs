//! Published ports, in the syntax of Docker's `-p`.
//!
//! ```text
//! [HOST_IP:][HOST_PORT[-END]:]CONTAINER_PORT[-END][/tcp|udp|sctp]
//! ```
//!
//! A [`PortSpec`] is one parsed spec. Its [`mappings`](PortSpec::mappings) are the individual
//! ports, and [`overlap`] finds conflicting specs in a list. Whether a port is free on the host,
//! and which port an ephemeral mapping gets, is known only once the socket is created.
//!
//! [`parse`] implements the grammar. The reference is `ParsePortSpec` of docker/go-connections.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

mod overlap;
mod parse;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use self::overlap::{OverlapError, overlap};
pub use self::parse::{PortSide, PortSpecError, PortSpecProblem};
use crate::Protocol;

/// An inclusive range of ports, none of them 0. It contains at least one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    start: u16,
    end: u16,
}

impl PortRange {
    /// The ports from `start` to `end`; `None` if `start` is 0 or greater than `end`.
    #[must_use]
    pub const fn new(start: u16, end: u16) -> Option<Self> {
        if start == 0 || end < start { None } else { Some(Self { start, end }) }
    }

    /// A range of one port; `None` if `port` is 0.
    #[must_use]
    pub const fn single(port: u16) -> Option<Self> {
        Self::new(port, port)
    }

    /// The lowest port, 1..=65535.
    #[must_use]
    pub const fn start(self) -> u16 {
        self.start
    }

    /// The highest port, 1..=65535.
    #[must_use]
    pub const fn end(self) -> u16 {
        self.end
    }

    /// The number of ports, 1..=65535.
    #[expect(clippy::len_without_is_empty, reason = "a port range is never empty")]
    #[must_use]
    pub const fn len(self) -> u16 {
        self.end - self.start + 1
    }

    /// Whether the range contains `port`.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.start <= port && port <= self.end
    }

    /// The ports, lowest first.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = u16> + Clone {
        self.start..=self.end
    }
}

/// Format: `80`, or `80-82`.
impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.start)?;
        if self.end > self.start {
            write!(f, "-{}", self.end)?;
        }
        Ok(())
    }
}

/// The host side of a [`PortSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostPorts {
    /// Missing or 0: the host chooses a host port for each container port.
    Ephemeral,
    /// The same number of host ports as container ports, paired in order.
    Fixed(PortRange),
    /// Any one free port of a range of at least two ports, for a single container port. This is
    /// Docker's special case of a host range with one container port.
    AnyOf(PortRange),
}

/// The host side of a [`PortMapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostPort {
    /// A port chosen by the host.
    Ephemeral,
    /// Exactly this port, 1..=65535.
    Fixed(u16),
    /// The first free port of the range.
    AnyOf(PortRange),
}

/// One published port, which one listener per host address serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMapping {
    /// The host address to listen on; `None` for all addresses (see [`host_addresses`]).
    pub host_ip: Option<IpAddr>,
    /// The host port to listen on.
    pub host_port: HostPort,
    /// The port inside the container, 1..=65535.
    pub container_port: u16,
    /// The transport protocol on both sides.
    pub protocol: Protocol,
}

/// A validated argument of Docker's `-p`: one or more published ports.
///
/// [`FromStr`](std::str::FromStr) parses Docker's grammar. [`new`](Self::new) validates parts from
/// other sources (the long syntax of a Compose file, the API). [`Display`](fmt::Display) prints the
/// shortest text that parses back to the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortSpec {
    host_ip: Option<IpAddr>,
    host_ports: HostPorts,
    container_ports: PortRange,
    protocol: Protocol,
}

impl PortSpec {
    /// Creates a spec from its parts.
    ///
    /// An IPv4-mapped `host_ip` is converted to IPv4, because no IPv6-only socket can be bound to
    /// it. Ranges of different lengths follow Docker: [`HostPorts::Fixed`] with several ports and
    /// one container port becomes [`HostPorts::AnyOf`], and `AnyOf` with a single port becomes
    /// `Fixed`.
    ///
    /// # Errors
    ///
    /// [`PortSpecProblem::UnequalRanges`] if the numbers of host and container ports differ and
    /// there is more than one container port.
    pub fn new(
        host_ip: Option<IpAddr>,
        host_ports: HostPorts,
        container_ports: PortRange,
        protocol: Protocol,
    ) -> Result<Self, PortSpecProblem> {
        let host_ports = match host_ports {
            HostPorts::Ephemeral => HostPorts::Ephemeral,
            HostPorts::Fixed(host) | HostPorts::AnyOf(host)
                if host.len() == container_ports.len() =>
            {
                HostPorts::Fixed(host)
            }
            HostPorts::Fixed(host) | HostPorts::AnyOf(host) if container_ports.len() == 1 => {
                HostPorts::AnyOf(host)
            }
            HostPorts::Fixed(host) | HostPorts::AnyOf(host) => {
                return Err(PortSpecProblem::UnequalRanges { host, container: container_ports });
            }
        };
        let host_ip = host_ip.map(|ip| ip.to_canonical());
        Ok(Self { host_ip, host_ports, container_ports, protocol })
    }

    /// The host address to listen on, never IPv4-mapped; `None` for all addresses.
    #[must_use]
    pub const fn host_ip(&self) -> Option<IpAddr> {
        self.host_ip
    }

    /// The host ports.
    #[must_use]
    pub const fn host_ports(&self) -> HostPorts {
        self.host_ports
    }

    /// The ports inside the container.
    #[must_use]
    pub const fn container_ports(&self) -> PortRange {
        self.container_ports
    }

    /// The transport protocol on both sides.
    #[must_use]
    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The individual ports of the spec, one per container port, lowest first.
    pub fn mappings(&self) -> impl ExactSizeIterator<Item = PortMapping> + use<> {
        let Self { host_ip, host_ports, container_ports, protocol } = *self;
        (0..container_ports.len()).map(move |index| PortMapping {
            host_ip,
            host_port: match host_ports {
                HostPorts::Ephemeral => HostPort::Ephemeral,
                HostPorts::Fixed(range) => HostPort::Fixed(range.start + index),
                HostPorts::AnyOf(range) => HostPort::AnyOf(range),
            },
            container_port: container_ports.start + index,
            protocol,
        })
    }
}

/// The shortest text that parses back to the same value: `8080:80`, `[::1]:53:53/udp`,
/// `127.0.0.1::80`.
impl fmt::Display for PortSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host_ip {
            Some(IpAddr::V4(ip)) => write!(f, "{ip}:")?,
            Some(IpAddr::V6(ip)) => write!(f, "[{ip}]:")?,
            None => {}
        }
        match self.host_ports {
            HostPorts::Fixed(range) | HostPorts::AnyOf(range) => write!(f, "{range}:")?,
            // After an address, the empty host port keeps its colon: `127.0.0.1:80` has another
            // meaning.
            HostPorts::Ephemeral if self.host_ip.is_some() => f.write_str(":")?,
            HostPorts::Ephemeral => {}
        }
        write!(f, "{}", self.container_ports)?;
        match self.protocol {
            Protocol::Tcp => Ok(()),
            protocol => write!(f, "/{protocol}"),
        }
    }
}

/// The addresses to listen on for an optional host address. Without one, these are 0.0.0.0 and
/// `::`, each with its own socket (`IPV6_V6ONLY`) and its own `publish` label, as in docker-proxy.
pub fn host_addresses(host_ip: Option<IpAddr>) -> impl Iterator<Item = IpAddr> + Clone {
    let (first, second) = match host_ip {
        Some(ip) => (ip, None),
        None => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED))),
    };
    std::iter::once(first).chain(second)
}
