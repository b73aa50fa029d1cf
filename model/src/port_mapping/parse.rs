//! Parser for port specs, with an error for each kind of mistake.
//!
//! The parser is stricter than Docker's. These are errors: an empty host address, an empty host
//! port without an address, an empty protocol (Docker uses defaults for all three), an IPv6 address
//! without brackets, a number with a sign (`+80`), and 0 inside a host range.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::{HostPorts, PortRange, PortSpec};
use crate::{Protocol, UnknownProtocol};

/// Parse error of a [`PortSpec`]. The message quotes the whole spec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("port spec {spec:?}: {problem}")]
pub struct PortSpecError {
    /// The spec as given.
    pub spec: String,
    /// The cause.
    pub problem: PortSpecProblem,
}

/// The cause of a [`PortSpecError`], without the spec itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortSpecProblem {
    /// A port is empty, next to a colon.
    #[error("{0} port is empty")]
    PortEmpty(PortSide),
    /// A port, or an end of a range, has characters other than digits.
    #[error("{side} port {text:?} is not a number")]
    PortNotANumber {
        /// The side of the mapping.
        side: PortSide,
        /// The invalid text.
        text: String,
    },
    /// A port is above 65535, or 0 in a position where 0 is not allowed.
    #[error("{side} port {text} is not between 1 and 65535")]
    PortOutOfRange {
        /// The side of the mapping.
        side: PortSide,
        /// The number as given.
        text: String,
    },
    /// A range ends before it starts.
    #[error("{side} port range {start}-{end} ends before it starts")]
    RangeReversed {
        /// The side of the mapping.
        side: PortSide,
        /// The number before the hyphen.
        start: u16,
        /// The number after the hyphen.
        end: u16,
    },
    /// There are several container ports, and a different number of host ports.
    #[error(
        "host ports {host} and container ports {container} differ in number ({} and {})",
        .host.len(),
        .container.len()
    )]
    UnequalRanges {
        /// The host ports.
        host: PortRange,
        /// The container ports.
        container: PortRange,
    },
    /// Host port 0, a single ephemeral port, with several container ports.
    #[error("host port 0 is one ephemeral port, container ports {container} are {}", .container.len())]
    EphemeralForRange {
        /// The container ports.
        container: PortRange,
    },
    /// The spec starts with a colon.
    #[error("host address is empty")]
    HostAddressEmpty,
    /// The host address is a name. A name can resolve to several addresses, and the result can
    /// change.
    #[error("host {0:?} is a name; an IP address is needed")]
    HostName(String),
    /// The host address is neither an IP address nor a name.
    #[error("host address {0:?} is not an IP address")]
    HostAddressInvalid(String),
    /// An IPv6 address has no brackets, so its end is ambiguous.
    #[error("IPv6 host address {0} must be in brackets, as [{0}]")]
    HostAddressUnbracketed(Ipv6Addr),
    /// An opening bracket has no closing one, or the closing bracket is not followed by a colon.
    #[error(
        "brackets must hold an IPv6 host address and be followed by a colon, as in [::1]:8080:80"
    )]
    HostAddressBrackets,
    /// The host address has a zone (`%eth0`).
    #[error("host address {0:?} has a zone; zones cannot be published on")]
    HostAddressZone(String),
    /// The field of the host port contains an address: the colon of the empty host port is missing.
    #[error("host port is missing behind the address {0}; for an ephemeral one write {0}::PORT")]
    HostPortMissing(String),
    /// The text after the slash is not a protocol.
    #[error(transparent)]
    Protocol(#[from] UnknownProtocol),
}

/// A side of a port mapping. [`Display`](fmt::Display) prints it for an error message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSide {
    /// The side that clients connect to.
    Host,
    /// The side on which the container listens.
    Container,
}

impl fmt::Display for PortSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "host",
            Self::Container => "container",
        })
    }
}

impl FromStr for PortSpec {
    type Err = PortSpecError;

    fn from_str(spec: &str) -> Result<Self, Self::Err> {
        parse(spec).map_err(|problem| PortSpecError { spec: spec.to_owned(), problem })
    }
}

fn parse(spec: &str) -> Result<PortSpec, PortSpecProblem> {
    let fields = Fields::split(spec)?;
    let (container, protocol) = match fields.container.split_once('/') {
        Some((ports, word)) => (ports, word.to_ascii_lowercase().parse()?),
        None => (fields.container, Protocol::Tcp),
    };
    let host_ip = fields.host_ip.map(parse_host_ip).transpose()?;
    let container_ports = parse_port_range(PortSide::Container, container)?;
    let host_ports = match fields.host_port {
        None => HostPorts::Ephemeral,
        Some("") if host_ip.is_some() => HostPorts::Ephemeral,
        Some(text) if is_zero(text) => {
            if container_ports.len() > 1 {
                return Err(PortSpecProblem::EphemeralForRange { container: container_ports });
            }
            HostPorts::Ephemeral
        }
        Some(text) => HostPorts::Fixed(parse_port_range(PortSide::Host, text)?),
    };
    PortSpec::new(host_ip, host_ports, container_ports, protocol)
}

/// The fields of a spec, which colons separate outside of an IPv6 address. A missing field is
/// `None`; a field that is present and empty is an empty string.
struct Fields<'a> {
    /// Without brackets.
    host_ip: Option<&'a str>,
    host_port: Option<&'a str>,
    /// With the protocol.
    container: &'a str,
}

impl<'a> Fields<'a> {
    /// Splits from the right, as Docker does, so that excess fields become part of the address.
    fn split(spec: &'a str) -> Result<Self, PortSpecProblem> {
        if let Some(bracketed) = spec.strip_prefix('[') {
            return Self::split_bracketed(bracketed);
        }
        let Some((before, container)) = spec.rsplit_once(':') else {
            return Ok(Self { host_ip: None, host_port: None, container: spec });
        };
        let Some((address, host_port)) = before.rsplit_once(':') else {
            if before.parse::<Ipv4Addr>().is_ok() {
                return Err(PortSpecProblem::HostPortMissing(before.to_owned()));
            }
            return Ok(Self { host_ip: None, host_port: Some(before), container });
        };
        // Docker accepts `::1` here. The other cases are IPv6 addresses whose last groups could be
        // ports.
        let v6 = [address, before, spec].into_iter().find_map(|text| text.parse().ok());
        if let Some(v6) = v6.filter(|_| !address.is_empty()) {
            return Err(PortSpecProblem::HostAddressUnbracketed(v6));
        }
        Ok(Self { host_ip: Some(address), host_port: Some(host_port), container })
    }

    /// Splits a spec whose opening bracket has been removed.
    fn split_bracketed(spec: &'a str) -> Result<Self, PortSpecProblem> {
        let (address, ports) = spec.split_once("]:").ok_or(PortSpecProblem::HostAddressBrackets)?;
        if address.parse::<Ipv4Addr>().is_ok() {
            return Err(PortSpecProblem::HostAddressBrackets);
        }
        let (host_port, container) = ports
            .split_once(':')
            .ok_or_else(|| PortSpecProblem::HostPortMissing(format!("[{address}]")))?;
        Ok(Self { host_ip: Some(address), host_port: Some(host_port), container })
    }
}

fn parse_host_ip(text: &str) -> Result<IpAddr, PortSpecProblem> {
    if let Ok(ip) = text.parse() {
        return Ok(ip);
    }
    Err(if text.is_empty() {
        PortSpecProblem::HostAddressEmpty
    } else if text.contains('%') {
        PortSpecProblem::HostAddressZone(text.to_owned())
    } else if !text.contains(':') && text.chars().any(char::is_alphabetic) {
        PortSpecProblem::HostName(text.to_owned())
    } else {
        PortSpecProblem::HostAddressInvalid(text.to_owned())
    })
}

fn parse_port_range(side: PortSide, text: &str) -> Result<PortRange, PortSpecProblem> {
    let (start, end) = match text.split_once('-') {
        Some((start, end)) => (parse_port(side, start)?, parse_port(side, end)?),
        None => {
            let port = parse_port(side, text)?;
            (port, port)
        }
    };
    PortRange::new(start, end).ok_or(PortSpecProblem::RangeReversed { side, start, end })
}

/// Parses a decimal port of 1..=65535; leading zeros are allowed.
fn parse_port(side: PortSide, text: &str) -> Result<u16, PortSpecProblem> {
    if text.is_empty() {
        return Err(PortSpecProblem::PortEmpty(side));
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(PortSpecProblem::PortNotANumber { side, text: text.to_owned() });
    }
    match text.parse() {
        Ok(0) | Err(_) => Err(PortSpecProblem::PortOutOfRange { side, text: text.to_owned() }),
        Ok(port) => Ok(port),
    }
}

fn is_zero(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte == b'0')
}
