//! The keys of the cluster state. Pure.
//!
//! | key | value | deleted |
//! |---|---|---|
//! | `nodes/ID` | [`Node`](crate::record::Node) | with the lease of the node |
//! | `node-index/N` | ID of the node | when the node leaves |
//! | `networks/NAME` | [`Network`](crate::record::Network) | with the network |
//! | `vni/N` | name of the network | with the network |
//! | `endpoints/NETWORK/NAME` | [`Endpoint`](crate::record::Endpoint) | with the lease of its node |
//! | `addresses/NETWORK/IP` | [`Claim`](crate::record::Claim) | after the quarantine |
//! | `services/NAME` | [`Service`](crate::record::Service) | with the service |
//! | `ports/PROTOCOL/PORT` | name of the service | with the service |
//! | `bindings/SERVICE/ID` | [`Binding`](crate::record::Binding) | with the lease of the node |
//! | `topology` | number of created networks: networks are created one after another | never |
//!
//! All keys are below [`PREFIX`], which contains the version of the records.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use tidegate_model::Protocol;
use tidegate_model::validity::is_object_name;

/// Prefix of all keys, with the version of the records.
pub const PREFIX: &str = "/tidegate/1/";

/// Maximum VNI: 24 bits (RFC 7348, 5).
pub const MAX_VNI: u32 = (1 << 24) - 1;

/// A key of the cluster state.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A host of the cluster.
    Node(String),
    /// The claim of a number by a host.
    NodeIndex(u16),
    /// An overlay network.
    Network(String),
    /// The claim of a VNI by a network.
    Vni(u32),
    /// An endpoint on a network.
    Endpoint {
        /// The network.
        network: String,
        /// The endpoint.
        name: String,
    },
    /// The claim of an address of a network.
    Address {
        /// The network.
        network: String,
        /// The address.
        address: IpAddr,
    },
    /// A service.
    Service(String),
    /// The claim of a published port by a service.
    Port(Protocol, u16),
    /// What a host has made of a service.
    Binding {
        /// The service.
        service: String,
        /// ID of the host.
        node: String,
    },
    /// The number of created networks.
    Topology,
}

impl Key {
    /// The prefix of the keys of the endpoints on `network`.
    #[must_use]
    pub fn endpoints_of(network: &str) -> String {
        format!("{PREFIX}endpoints/{network}/")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(PREFIX)?;
        match self {
            Self::Node(id) => write!(f, "nodes/{id}"),
            Self::NodeIndex(number) => write!(f, "node-index/{number}"),
            Self::Network(name) => write!(f, "networks/{name}"),
            Self::Vni(number) => write!(f, "vni/{number}"),
            Self::Endpoint { network, name } => write!(f, "endpoints/{network}/{name}"),
            Self::Address { network, address } => write!(f, "addresses/{network}/{address}"),
            Self::Service(name) => write!(f, "services/{name}"),
            Self::Port(protocol, port) => write!(f, "ports/{protocol}/{port}"),
            Self::Binding { service, node } => write!(f, "bindings/{service}/{node}"),
            Self::Topology => f.write_str("topology"),
        }
    }
}

/// A key that no version of tidegate with this [`PREFIX`] writes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a key of the cluster state")]
pub struct KeyError(pub String);

impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        let parse = || {
            let rest = text.strip_prefix(PREFIX)?;
            if rest == "topology" {
                return Some(Self::Topology);
            }
            let (kind, rest) = rest.split_once('/')?;
            Some(match kind {
                "nodes" => Self::Node(name(rest)?),
                "node-index" => Self::NodeIndex(rest.parse().ok()?),
                "networks" => Self::Network(name(rest)?),
                "vni" => {
                    Self::Vni(rest.parse().ok().filter(|number| (1..=MAX_VNI).contains(number))?)
                }
                "endpoints" => {
                    let (network, endpoint) = rest.split_once('/')?;
                    Self::Endpoint { network: name(network)?, name: name(endpoint)? }
                }
                "addresses" => {
                    let (network, address) = rest.split_once('/')?;
                    Self::Address { network: name(network)?, address: address.parse().ok()? }
                }
                "services" => Self::Service(name(rest)?),
                "ports" => {
                    let (protocol, port) = rest.split_once('/')?;
                    let port = port.parse().ok().filter(|port| *port > 0)?;
                    Self::Port(protocol.parse().ok()?, port)
                }
                "bindings" => {
                    let (service, node) = rest.split_once('/')?;
                    Self::Binding { service: name(service)?, node: name(node)? }
                }
                _ => return None,
            })
        };
        // Each key has one spelling.
        let key = parse().filter(|key| key.to_string() == text);
        key.ok_or_else(|| KeyError(text.to_owned()))
    }
}

fn name(text: &str) -> Option<String> {
    is_object_name(text).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names() -> impl Strategy<Value = String> {
        "[a-z0-9][a-zA-Z0-9._-]{0,62}"
    }

    fn keys() -> impl Strategy<Value = Key> {
        prop_oneof![
            names().prop_map(Key::Node),
            any::<u16>().prop_map(Key::NodeIndex),
            names().prop_map(Key::Network),
            (1..=MAX_VNI).prop_map(Key::Vni),
            (names(), names()).prop_map(|(network, name)| Key::Endpoint { network, name }),
            (names(), any::<IpAddr>())
                .prop_map(|(network, address)| Key::Address { network, address }),
            names().prop_map(Key::Service),
            (prop_oneof![Just(Protocol::Tcp), Just(Protocol::Udp)], 1..=u16::MAX)
                .prop_map(|(protocol, port)| Key::Port(protocol, port)),
            (names(), names()).prop_map(|(service, node)| Key::Binding { service, node }),
            Just(Key::Topology),
        ]
    }

    proptest! {
        #[test]
        fn a_key_is_read_as_it_was_written(key in keys()) {
            prop_assert_eq!(key.to_string().parse(), Ok(key));
        }

        #[test]
        fn any_text_is_a_key_with_that_spelling_or_an_error(text in "(/tidegate/1/)?[a-z-]{1,12}/.{0,30}") {
            if let Ok(key) = text.parse::<Key>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }

    #[test]
    fn other_spellings_are_rejected() {
        for text in [
            "",
            "/tidegate/1/",
            "/tidegate/2/nodes/a",
            "/tidegate/1/nodes/",
            "/tidegate/1/nodes/a/b",
            "/tidegate/1/nodes/-a",
            "/tidegate/1/vni/0",
            "/tidegate/1/vni/007",
            "/tidegate/1/vni/16777216",
            "/tidegate/1/node-index/65536",
            "/tidegate/1/addresses/front/010.0.0.1",
            "/tidegate/1/addresses/front/FD00::1",
            "/tidegate/1/endpoints/front",
            "/tidegate/1/ports/TCP/80",
            "/tidegate/1/ports/tcp/0",
            "/tidegate/1/ports/tcp/080",
        ] {
            assert_eq!(text.parse::<Key>(), Err(KeyError(text.to_owned())));
        }
    }
}
