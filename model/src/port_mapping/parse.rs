//! Reads the grammar of a port spec, and says what is wrong with one.
//!
//! Differences from Docker, all of them refusals: an empty host address, an empty host port that is
//! not behind an address, and an empty protocol are errors here and defaults there; an IPv6 address
//! has to be in brackets; a number is digits only (Docker also takes `+80`); 0 inside a host range
//! is an error.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::{HostPorts, PortRange, PortSpec};
use crate::{Protocol, UnknownProtocol};

/// Why a text is not a [`PortSpec`]. The message quotes the whole spec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("port spec {spec:?}: {problem}")]
pub struct PortSpecError {
    /// The text that did not parse.
    pub spec: String,
    /// What is wrong with it.
    pub problem: PortSpecProblem,
}

/// What is wrong with a port spec, without the spec itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortSpecProblem {
    /// There is nothing between two colons, or before or behind one.
    #[error("{0} port is empty")]
    PortEmpty(PortSide),
    /// A port, or an end of a range, is not made of digits.
    #[error("{side} port {text:?} is not a number")]
    PortNotANumber {
        /// Which side of the mapping.
        side: PortSide,
        /// The piece that should have been a number.
        text: String,
    },
    /// A port is 0 where that means nothing, or above 65535.
    #[error("{side} port {text} is not between 1 and 65535")]
    PortOutOfRange {
        /// Which side of the mapping.
        side: PortSide,
        /// The number as it was written.
        text: String,
    },
    /// A range ends before it starts.
    #[error("{side} port range {start}-{end} ends before it starts")]
    RangeReversed {
        /// Which side of the mapping.
        side: PortSide,
        /// The number before the hyphen.
        start: u16,
        /// The number behind it.
        end: u16,
    },
    /// Several container ports, and another number of host ports.
    #[error(
        "host ports {host} and container ports {container} differ in number ({} and {})",
        .host.len(),
        .container.len()
    )]
    UnequalRanges {
        /// The host ports asked for.
        host: PortRange,
        /// The container ports asked for.
        container: PortRange,
    },
    /// Host port 0, which stands for one ephemeral port, before several container ports.
    #[error("host port 0 is one ephemeral port, container ports {container} are {}", .container.len())]
    EphemeralForRange {
        /// The container ports asked for.
        container: PortRange,
    },
    /// The spec starts with a colon.
    #[error("host address is empty")]
    HostAddressEmpty,
    /// The host address is a name. A name can change its meaning and can have several addresses.
    #[error("host {0:?} is a name; an IP address is needed")]
    HostName(String),
    /// The host address is neither an IP address nor a name.
    #[error("host address {0:?} is not an IP address")]
    HostAddressInvalid(String),
    /// An IPv6 address stands without brackets, where its end can only be guessed.
    #[error("IPv6 host address {0} must be in brackets, as [{0}]")]
    HostAddressUnbracketed(Ipv6Addr),
    /// An opening bracket has no closing one, or something other than a colon follows that.
    #[error(
        "brackets must hold an IPv6 host address and be followed by a colon, as in [::1]:8080:80"
    )]
    HostAddressBrackets,
    /// The host address has a zone (`%eth0`).
    #[error("host address {0:?} has a zone; zones cannot be published on")]
    HostAddressZone(String),
    /// An address stands where the host port should: the colon of the empty host port is missing.
    #[error("host port is missing behind the address {0}; for an ephemeral one write {0}::PORT")]
    HostPortMissing(String),
    /// The word behind the slash is no protocol.
    #[error(transparent)]
    Protocol(#[from] UnknownProtocol),
}

/// A side of a port mapping, as a word in an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSide {
    /// What clients connect to.
    Host,
    /// What the container listens on.
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
    let pieces = Pieces::split(spec)?;
    let (container, protocol) = match pieces.container.split_once('/') {
        Some((ports, word)) => (ports, word.to_ascii_lowercase().parse()?),
        None => (pieces.container, Protocol::Tcp),
    };
    let host_ip = pieces.host_ip.map(host_ip).transpose()?;
    let container_ports = port_range(PortSide::Container, container)?;
    let host_ports = match pieces.host_port {
        None => HostPorts::Ephemeral,
        Some("") if host_ip.is_some() => HostPorts::Ephemeral,
        Some(text) if is_zero(text) => {
            if container_ports.len() > 1 {
                return Err(PortSpecProblem::EphemeralForRange { container: container_ports });
            }
            HostPorts::Ephemeral
        }
        Some(text) => HostPorts::Fixed(port_range(PortSide::Host, text)?),
    };
    PortSpec::new(host_ip, host_ports, container_ports, protocol)
}

/// The text between the colons, of which those of an IPv6 address do not count. `None` is a piece
/// that has no colon, an empty string one that has.
struct Pieces<'a> {
    /// Without brackets.
    host_ip: Option<&'a str>,
    host_port: Option<&'a str>,
    /// With the protocol.
    container: &'a str,
}

impl<'a> Pieces<'a> {
    /// Splits from the right, as Docker does, so that whatever is left over ends up in the address.
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
        // Docker takes `::1` here; the others are IPv6 addresses whose last groups look like ports.
        let v6 = [address, before, spec].into_iter().find_map(|text| text.parse().ok());
        if let Some(v6) = v6.filter(|_| !address.is_empty()) {
            return Err(PortSpecProblem::HostAddressUnbracketed(v6));
        }
        Ok(Self { host_ip: Some(address), host_port: Some(host_port), container })
    }

    /// The same behind an opening bracket.
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

fn host_ip(text: &str) -> Result<IpAddr, PortSpecProblem> {
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

fn port_range(side: PortSide, text: &str) -> Result<PortRange, PortSpecProblem> {
    let (start, end) = match text.split_once('-') {
        Some((start, end)) => (port(side, start)?, port(side, end)?),
        None => {
            let port = port(side, text)?;
            (port, port)
        }
    };
    PortRange::new(start, end).ok_or(PortSpecProblem::RangeReversed { side, start, end })
}

/// A port of 1..=65535 in decimal, leading zeros allowed.
fn port(side: PortSide, text: &str) -> Result<u16, PortSpecProblem> {
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
