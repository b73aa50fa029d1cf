//! The values of the cluster state, as JSON. Pure.
//!
//! Unknown fields are ignored, so that a newer host can add some.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::balance::Method;
use crate::key::Key;
use crate::store::{Entry, LeaseId, Write};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::time::Duration;
use tidegate_model::{MacAddress, Protocol};

/// A host of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// The number that it has claimed.
    pub index: u16,
    /// Address at which other hosts reach its VXLAN endpoint (VTEP).
    pub vtep: IpAddr,
    /// Identifies the run of the host. Another boot has lost all state of the kernel.
    pub boot: String,
    /// Identifies the machine, across boots.
    pub machine: String,
    /// MTU of the route between VTEPs, in bytes.
    pub mtu: u32,
}

/// An overlay network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The VNI that it has claimed.
    pub vni: u32,
    /// Subnets, each with an address that no endpoint uses.
    pub subnets: Vec<Subnet>,
    /// MTU of its interfaces, in bytes.
    pub mtu: u32,
    /// The network has no egress.
    #[serde(default)]
    pub internal: bool,
}

/// A subnet of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// Reserved for a gateway, the same on every host.
    pub gateway: IpAddr,
}

/// The state of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// It is being attached.
    Starting,
    /// It is reachable.
    Ready,
    /// It accepts no new connections.
    Draining,
}

/// The network and the name of an endpoint.
pub type EndpointKey = (String, String);

/// An endpoint on a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// ID of its host.
    pub node: String,
    /// Distinguishes endpoints that have the same name one after another.
    pub generation: u64,
    /// Its addresses on the network.
    pub addresses: Vec<IpAddr>,
    /// Its MAC address on the network.
    #[serde(with = "mac_address")]
    pub mac: MacAddress,
    /// Its state.
    pub state: EndpointState,
    /// Additional DNS names on the network.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// Host name, another DNS name.
    #[serde(default)]
    pub hostname: Option<String>,
    /// What it is besides a container with names.
    #[serde(default)]
    pub role: Role,
}

/// What an endpoint is besides a container with names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Nothing more.
    #[default]
    Container,
    /// It gets connections to the published ports of a service.
    Task {
        /// The service.
        service: String,
        /// Its share of the connections.
        weight: u16,
    },
    /// The sandbox through which its host forwards connections to published ports. It sends from
    /// the addresses of the clients.
    Sandbox,
}

impl Endpoint {
    /// Returns whether it is a sandbox.
    #[must_use]
    pub fn is_sandbox(&self) -> bool {
        self.role == Role::Sandbox
    }

    /// Returns its weight, if it is a task of `service`.
    #[must_use]
    pub fn weight_in(&self, service: &str) -> Option<u16> {
        match &self.role {
            Role::Task { service: own, weight } if own == service => Some(*weight),
            _ => None,
        }
    }
}

/// A service: ports that every host publishes, and that lead to its tasks on any host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The network on which its tasks are reached.
    pub network: String,
    /// Its ports, sorted.
    pub ports: Vec<ServicePort>,
    /// Which task gets the next connection.
    pub balance: Method,
    /// Tasks on the host that has accepted a connection are preferred.
    #[serde(default)]
    pub prefers_local: bool,
    /// What the tasks see of the client.
    pub source: ClientSource,
    /// When a task is healthy. Without it, it is when it is attached.
    #[serde(default)]
    pub health: Option<HealthCheck>,
    /// Time for open connections when a task is detached, in seconds.
    pub drain_s: u32,
    /// Maximum number of tasks with connections. The others stand by.
    #[serde(default)]
    pub replicas: Option<u32>,
}

/// A published port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ServicePort {
    /// TCP or UDP.
    #[serde(with = "protocol")]
    pub protocol: Protocol,
    /// The port on all hosts.
    pub published: u16,
    /// The port of the tasks.
    pub target: u16,
}

impl std::fmt::Display for ServicePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.published, self.protocol)
    }
}

/// What the tasks of a service see of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientSource {
    /// Its address.
    #[default]
    Client,
    /// The address of the host's sandbox.
    Proxy,
    /// The same, and the address of the client in a header of the PROXY protocol, version 2 (TCP).
    ProxyProtocol,
    /// The same with version 1.
    ProxyProtocolV1,
}

/// A health check, by the host of the task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is tried.
    pub probe: Probe,
    /// Time between two checks, in milliseconds.
    pub interval_ms: u64,
    /// Time for one check, in milliseconds.
    pub timeout_ms: u64,
    /// Failed checks in succession after which the task gets no more connections.
    pub retries: u32,
}

impl HealthCheck {
    /// Time between two checks.
    #[must_use]
    pub fn interval(&self) -> Duration {
        Duration::from_millis(self.interval_ms)
    }

    /// Time for one check.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }
}

/// What a health check tries.
///
/// Commands are not among them: a host runs only those that its own user has configured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// A TCP connection to this port of the task.
    Tcp(u16),
    /// A GET request, whose response has a status below 400.
    Http {
        /// The port of the task.
        port: u16,
        /// The path.
        path: String,
    },
}

/// What a host has made of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// The ports that it serves.
    pub ports: Vec<ServicePort>,
    /// Why it does not serve others.
    #[serde(default)]
    pub problem: Option<String>,
}

/// The claim of an address. It has no lease: an endpoint keeps its addresses while its host is
/// silent, and the deletion of its record with the lease is no release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Claim {
    /// Used by an endpoint.
    Endpoint {
        /// Name of the endpoint.
        name: String,
        /// ID of its host.
        node: String,
    },
    /// Released, and not to be used before this time, in seconds since the Unix epoch.
    Quarantined(u64),
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A host.
    Node(String, Node),
    /// The host that has claimed a number.
    NodeIndex(u16, String),
    /// A network.
    Network(String, Network),
    /// The network that has claimed a VNI.
    Vni(u32, String),
    /// An endpoint, with its network and name.
    Endpoint(String, String, Endpoint),
    /// The claim of an address of a network.
    Address(String, IpAddr, Claim),
    /// A service.
    Service(String, Service),
    /// The service that has claimed a port.
    Port(Protocol, u16, String),
    /// What a host has made of a service, with the service and the host.
    Binding(String, String, Binding),
    /// The number of created networks.
    Topology(u64),
}

/// An entry that is not a record of this version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster state: {key}: {reason}")]
pub struct RecordError {
    /// The key.
    pub key: String,
    /// What is wrong.
    pub reason: String,
}

impl TryFrom<&Entry> for Record {
    type Error = RecordError;

    fn try_from(entry: &Entry) -> Result<Self, RecordError> {
        fn of<'a, T: Deserialize<'a>>(entry: &'a Entry) -> Result<T, RecordError> {
            let error = |error: serde_json::Error| RecordError {
                key: entry.key.clone(),
                reason: error.to_string(),
            };
            serde_json::from_slice(&entry.value).map_err(error)
        }
        let key = entry.key.parse();
        let key: Key = key.map_err(|error: crate::key::KeyError| RecordError {
            key: entry.key.clone(),
            reason: error.to_string(),
        })?;
        Ok(match key {
            Key::Node(id) => Self::Node(id, of(entry)?),
            Key::NodeIndex(number) => Self::NodeIndex(number, of(entry)?),
            Key::Network(name) => Self::Network(name, of(entry)?),
            Key::Vni(number) => Self::Vni(number, of(entry)?),
            Key::Endpoint { network, name } => Self::Endpoint(network, name, of(entry)?),
            Key::Address { network, address } => Self::Address(network, address, of(entry)?),
            Key::Service(name) => Self::Service(name, of(entry)?),
            Key::Port(protocol, port) => Self::Port(protocol, port, of(entry)?),
            Key::Binding { service, node } => Self::Binding(service, node, of(entry)?),
            Key::Topology => Self::Topology(of(entry)?),
        })
    }
}

impl Record {
    /// The write that stores it. With a lease, it ends with that.
    #[must_use]
    pub fn put(&self, lease: Option<LeaseId>) -> Write {
        let (key, value) = self.encode();
        Write::Put { key: key.to_string(), value, lease }
    }

    /// The key and the value, to be stored.
    #[must_use]
    pub fn encode(&self) -> (Key, Vec<u8>) {
        fn value(value: &impl Serialize) -> Vec<u8> {
            // Fails only for maps whose keys are not strings, and there are none.
            serde_json::to_vec(value).unwrap_or_default()
        }
        match self {
            Self::Node(id, node) => (Key::Node(id.clone()), value(node)),
            Self::NodeIndex(number, id) => (Key::NodeIndex(*number), value(id)),
            Self::Network(name, network) => (Key::Network(name.clone()), value(network)),
            Self::Vni(number, name) => (Key::Vni(*number), value(name)),
            Self::Endpoint(network, name, endpoint) => {
                let key = Key::Endpoint { network: network.clone(), name: name.clone() };
                (key, value(endpoint))
            }
            Self::Address(network, address, claim) => {
                (Key::Address { network: network.clone(), address: *address }, value(claim))
            }
            Self::Service(name, service) => (Key::Service(name.clone()), value(service)),
            Self::Port(protocol, port, service) => (Key::Port(*protocol, *port), value(service)),
            Self::Binding(service, node, binding) => {
                let key = Key::Binding { service: service.clone(), node: node.clone() };
                (key, value(binding))
            }
            Self::Topology(number) => (Key::Topology, value(number)),
        }
    }
}

/// A transport protocol as text.
mod protocol {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use tidegate_model::Protocol;

    pub(super) fn serialize<S: Serializer>(protocol: &Protocol, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(protocol)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Protocol, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// A MAC address as text.
mod mac_address {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use tidegate_model::MacAddress;

    pub(super) fn serialize<S: Serializer>(mac: &MacAddress, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(mac)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<MacAddress, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Revision;

    fn entry(key: &str, value: &str) -> Entry {
        Entry { key: key.into(), value: value.into(), lease: None, modified: Revision(1) }
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let endpoint = Endpoint {
            node: "host-a".into(),
            generation: 7,
            addresses: vec!["10.9.0.2".parse().unwrap(), "fd09::2".parse().unwrap()],
            mac: MacAddress([2, 0, 10, 9, 0, 2]),
            state: EndpointState::Ready,
            aliases: vec!["www".into()],
            hostname: Some("w1".into()),
            role: Role::Task { service: "shop".into(), weight: 3 },
        };
        let service = Service {
            network: "front".into(),
            ports: vec![ServicePort { protocol: Protocol::Udp, published: 53, target: 5353 }],
            balance: Method::Source,
            prefers_local: true,
            source: ClientSource::ProxyProtocol,
            health: Some(HealthCheck {
                probe: Probe::Http { port: 80, path: "/up".into() },
                interval_ms: 1_000,
                timeout_ms: 500,
                retries: 3,
            }),
            drain_s: 10,
            replicas: Some(2),
        };
        let binding = Binding { ports: service.ports.clone(), problem: Some("in use".into()) };
        let node = Node {
            index: 3,
            vtep: "192.0.2.1".parse().unwrap(),
            boot: "b".into(),
            machine: "m".into(),
            mtu: 1500,
        };
        let subnet =
            Subnet { subnet: "10.9.0.0/24".parse().unwrap(), gateway: "10.9.0.1".parse().unwrap() };
        let network = Network { vni: 4097, subnets: vec![subnet], mtu: 1450, internal: true };
        let claim = Claim::Endpoint { name: "web".into(), node: "host-a".into() };
        let address = "10.9.0.2".parse().unwrap();
        for record in [
            Record::Node("host-a".into(), node),
            Record::NodeIndex(3, "host-a".into()),
            Record::Network("front".into(), network),
            Record::Vni(4097, "front".into()),
            Record::Endpoint("front".into(), "web".into(), endpoint),
            Record::Address("front".into(), address, claim),
            Record::Address("front".into(), address, Claim::Quarantined(1_800_000_000)),
            Record::Service("shop".into(), service),
            Record::Port(Protocol::Tcp, 80, "shop".into()),
            Record::Binding("shop".into(), "host-a".into(), binding),
            Record::Topology(7),
        ] {
            let (key, value) = record.encode();
            let stored = entry(&key.to_string(), std::str::from_utf8(&value).unwrap());
            assert_eq!(Record::try_from(&stored), Ok(record));
        }
    }

    /// The format is that of the running hosts of a cluster.
    #[test]
    fn the_format_does_not_change() {
        let stored = entry(
            "/tidegate/1/endpoints/front/web",
            r#"{"node":"a","generation":1,"addresses":["10.9.0.2"],
                "mac":"02:00:0a:09:00:02","state":"ready","new":[1]}"#,
        );
        let Ok(Record::Endpoint(network, name, endpoint)) = Record::try_from(&stored) else {
            panic!("an endpoint");
        };
        assert_eq!((&*network, &*name, &*endpoint.node), ("front", "web", "a"));
        assert_eq!(endpoint.mac, MacAddress([2, 0, 10, 9, 0, 2]));
    }

    #[test]
    fn an_invalid_entry_is_named() {
        let error = Record::try_from(&entry("/tidegate/1/nodes/a", "{}")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cluster state: /tidegate/1/nodes/a: missing field `index` at line 1 column 2"
        );
        let error = Record::try_from(&entry("/other", "{}")).unwrap_err();
        assert!(error.to_string().contains("is not a key of the cluster state"), "{error}");
    }
}
