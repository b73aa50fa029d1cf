//! Published ports: what Docker's `-p` means, as a value.
//!
//! ```text
//! [HOST_IP:][HOST_PORT[-END]:]CONTAINER_PORT[-END][/tcp|udp|sctp]
//! ```
//!
//! A [`PortSpec`] is one such text; its [`mappings`](PortSpec::mappings) are the single ports it
//! stands for, and [`overlap`] finds the specs of a list that cannot be served together. Whether a
//! port is free on the host, and which one an ephemeral mapping gets, is known only where the
//! socket is made.
//!
//! The grammar is read in [`parse`]; its reference is `ParsePortSpec` of docker/go-connections.

mod overlap;
mod parse;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub use self::overlap::{OverlapError, overlap};
pub use self::parse::{PortSide, PortSpecError, PortSpecProblem};
use crate::Protocol;

/// A range of ports, both ends included, none of them 0. It holds at least one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    start: u16,
    end: u16,
}

impl PortRange {
    /// The ports from `start` to `end`; `None` if `start` is 0 or behind `end`.
    #[must_use]
    pub const fn new(start: u16, end: u16) -> Option<Self> {
        if start == 0 || end < start { None } else { Some(Self { start, end }) }
    }

    /// The one port `port`; `None` if it is 0.
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

    /// How many ports there are, 1..=65535.
    #[expect(clippy::len_without_is_empty, reason = "a port range is never empty")]
    #[must_use]
    pub const fn len(self) -> u16 {
        self.end - self.start + 1
    }

    /// Whether `port` is one of them.
    #[must_use]
    pub const fn contains(self, port: u16) -> bool {
        self.start <= port && port <= self.end
    }

    /// The ports, lowest first.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = u16> + Clone {
        self.start..=self.end
    }
}

/// `80`, or `80-82`
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
    /// Not given, or 0: each container port gets a host port that the host chooses.
    Ephemeral,
    /// As many host ports as container ports, joined in order.
    Fixed(PortRange),
    /// Any one free port of the range, for a single container port. Docker's special case of a host
    /// range with one container port; the range has at least two ports.
    AnyOf(PortRange),
}

/// The host side of a [`PortMapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostPort {
    /// Any port that the host chooses.
    Ephemeral,
    /// This port, 1..=65535, and no other.
    Fixed(u16),
    /// The first free port of the range.
    AnyOf(PortRange),
}

/// One published port: what a single listener needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortMapping {
    /// The host address to listen on; `None` for all of them (see [`host_addresses`]).
    pub host_ip: Option<IpAddr>,
    /// The host port to listen on.
    pub host_port: HostPort,
    /// The port inside the container, 1..=65535.
    pub container_port: u16,
    /// The transport on both sides.
    pub protocol: Protocol,
}

/// Docker's `-p` argument, checked: the ports one text asks to publish.
///
/// [`FromStr`](std::str::FromStr) reads Docker's grammar, [`new`](Self::new) checks parts that come
/// from elsewhere (a Compose file's long form, the API). [`Display`](fmt::Display) gives the
/// shortest text that parses back to the same value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortSpec {
    host_ip: Option<IpAddr>,
    host_ports: HostPorts,
    container_ports: PortRange,
    protocol: Protocol,
}

impl PortSpec {
    /// A spec made of its parts.
    ///
    /// A `host_ip` in IPv4-mapped form is kept as IPv4: no IPv6-only socket can be bound to it.
    /// Unequal numbers of ports are read as Docker reads them: [`HostPorts::Fixed`] with several
    /// ports before one container port becomes [`HostPorts::AnyOf`], and `AnyOf` with a single port
    /// becomes `Fixed`.
    ///
    /// # Errors
    ///
    /// [`PortSpecProblem::UnequalRanges`] if host and container ports differ in number and there is
    /// more than one container port.
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

    /// The host address to listen on, never in IPv4-mapped form; `None` for all of them.
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

    /// The transport on both sides.
    #[must_use]
    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The single ports the spec stands for, one per container port, lowest first.
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
            // Behind an address the empty piece keeps its colon: `127.0.0.1:80` would be something
            // else.
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

/// The addresses to listen on for a host address that may not have been given: without one, 0.0.0.0
/// and `::`, each a socket of its own (`IPV6_V6ONLY`) with a `publish` label of its own, as
/// docker-proxy has them.
pub fn host_addresses(host_ip: Option<IpAddr>) -> impl Iterator<Item = IpAddr> + Clone {
    let (first, second) = match host_ip {
        Some(ip) => (ip, None),
        None => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED))),
    };
    std::iter::once(first).chain(second)
}
