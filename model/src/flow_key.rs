//! Identifiers of flows ([`FlowKey`]) and of published sockets ([`PublishLabel`]).
//!
//! The state, counters and expiry of a flow belong to the tables of `proxy` and `nat`, which use
//! these types as keys.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use crate::{Protocol, UnknownProtocol};

/// The five-tuple of one direction of a flow.
///
/// Keys are compared without normalization. A caller that reads addresses from a dual-stack socket
/// must pass them through [`canonical`]; otherwise the same peer can have two keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Sender in this direction.
    pub source: SocketAddr,
    /// Receiver in this direction.
    pub destination: SocketAddr,
}

impl FlowKey {
    /// The key of the opposite direction. Reversing twice returns the original key.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self { protocol: self.protocol, source: self.destination, destination: self.source }
    }
}

/// `tcp 192.0.2.1:4000 -> 192.0.2.10:80`
impl fmt::Display for FlowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.protocol, self.source, self.destination)
    }
}

/// The form of an address in which two addresses of the same peer are equal: the IPv4 form of an
/// IPv4-mapped IPv6 address (`[::ffff:192.0.2.1]:80` becomes `192.0.2.1:80`, RFC 4291 section
/// 2.5.5.2); an IPv6 address without flow label, and with a scope only if it is link-local.
///
/// A dual-stack socket reports IPv4 peers in the mapped form. A policy or table that does not
/// normalize can be bypassed.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(mut v6) if v6.ip().is_unicast_link_local() => {
            v6.set_flowinfo(0);
            v6.into()
        }
        _ => SocketAddr::new(address.ip().to_canonical(), address.port()),
    }
}

/// The value of the metrics label `publish`, which identifies a published socket:
/// `0.0.0.0:8080/tcp` or `[::]:8080/tcp`.
///
/// The address is stored in [`canonical`] form, so each socket has exactly one label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishLabel(SocketAddr, Protocol);

impl PublishLabel {
    /// The label of a `protocol` socket that listens on `address`.
    #[must_use]
    pub fn new(address: SocketAddr, protocol: Protocol) -> Self {
        Self(canonical(address), protocol)
    }

    /// The host address and port.
    #[must_use]
    pub const fn address(self) -> SocketAddr {
        self.0
    }

    /// The transport protocol.
    #[must_use]
    pub const fn protocol(self) -> Protocol {
        self.1
    }
}

impl From<(SocketAddr, Protocol)> for PublishLabel {
    fn from((address, protocol): (SocketAddr, Protocol)) -> Self {
        Self::new(address, protocol)
    }
}

impl fmt::Display for PublishLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}

impl FromStr for PublishLabel {
    type Err = PublishLabelError;

    fn from_str(label: &str) -> Result<Self, Self::Err> {
        let Some((address, protocol)) = label.rsplit_once('/') else {
            return Err(PublishLabelError::NoProtocol { label: label.to_owned() });
        };
        let protocol = protocol
            .parse()
            .map_err(|source| PublishLabelError::Protocol { label: label.to_owned(), source })?;
        let address = address.parse().map_err(|_| PublishLabelError::Address {
            label: label.to_owned(),
            address: address.to_owned(),
        })?;
        Ok(Self::new(address, protocol))
    }
}

/// Parse error of a [`PublishLabel`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishLabelError {
    /// There is no `/`.
    #[error("publish label {label:?}: no protocol; the format is 0.0.0.0:8080/tcp")]
    NoProtocol {
        /// The whole label.
        label: String,
    },
    /// The text after the last `/` is not a protocol.
    #[error("publish label {label:?}: {source}")]
    Protocol {
        /// The whole label.
        label: String,
        /// The cause, with that text.
        source: UnknownProtocol,
    },
    /// The text before the last `/` is not `IPV4:PORT` or `[IPV6]:PORT`.
    #[error("publish label {label:?}: {address:?} is not an address and a port")]
    Address {
        /// The whole label.
        label: String,
        /// The text before the last `/`.
        address: String,
    },
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddrV6};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_flow_prints_its_direction() {
        let key = FlowKey {
            protocol: Protocol::Tcp,
            source: address("192.0.2.1:4000"),
            destination: address("192.0.2.10:80"),
        };
        assert_eq!(key.to_string(), "tcp 192.0.2.1:4000 -> 192.0.2.10:80");
        assert_eq!(key.reversed().to_string(), "tcp 192.0.2.10:80 -> 192.0.2.1:4000");
        assert_eq!(key.reversed().reversed(), key);
    }

    #[test]
    fn only_mapped_addresses_are_converted_to_ipv4() {
        assert_eq!(canonical(address("[::ffff:192.0.2.1]:80")), address("192.0.2.1:80"));
        // The deprecated IPv4-compatible form is not the mapped form.
        assert_eq!(canonical(address("[::192.0.2.1]:80")), address("[::192.0.2.1]:80"));
        assert_eq!(canonical(address("[fe80::1%7]:80")), address("[fe80::1%7]:80"));
        assert_eq!(canonical(address("192.0.2.1:80")), address("192.0.2.1:80"));
    }

    #[test]
    fn labels_show_address_port_and_protocol() {
        let label = |text, protocol| PublishLabel::new(address(text), protocol).to_string();
        assert_eq!(label("0.0.0.0:8080", Protocol::Tcp), "0.0.0.0:8080/tcp");
        assert_eq!(label("[::]:8080", Protocol::Tcp), "[::]:8080/tcp");
        assert_eq!(label("[::ffff:192.0.2.1]:53", Protocol::Udp), "192.0.2.1:53/udp");
    }

    #[test]
    fn label_errors_name_the_part() {
        let error = |text: &str| text.parse::<PublishLabel>().unwrap_err().to_string();
        assert_eq!(
            error("0.0.0.0:80"),
            r#"publish label "0.0.0.0:80": no protocol; the format is 0.0.0.0:8080/tcp"#
        );
        assert_eq!(
            error("0.0.0.0:80/xtp"),
            r#"publish label "0.0.0.0:80/xtp": protocol "xtp" is not tcp, udp or sctp"#
        );
        assert_eq!(
            error(":80/tcp"),
            r#"publish label ":80/tcp": ":80" is not an address and a port"#
        );
    }

    proptest! {
        #[test]
        fn a_label_prints_and_parses_back(
            ip: IpAddr,
            port: u16,
            flowinfo: u32,
            scope: u32,
            protocol in proptest::sample::select(&Protocol::ALL[..]),
        ) {
            let socket = match ip {
                IpAddr::V4(ip) => SocketAddr::from((ip, port)),
                IpAddr::V6(ip) => SocketAddrV6::new(ip, port, flowinfo, scope).into(),
            };
            let label = PublishLabel::new(socket, protocol);
            prop_assert_eq!(label.to_string().parse(), Ok(label));
        }

        #[test]
        fn parsing_a_label_never_panics(text: String) {
            let _ = text.parse::<PublishLabel>();
        }
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }
}
