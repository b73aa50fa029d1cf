//! The checked content of a Compose file.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use tidegate_model::PortSpec;
use tidegate_model::Restart;

/// The network of services that list no networks.
pub const DEFAULT_NETWORK: &str = "default";

/// A position in a Compose file. Line and column count from 1, the column in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The line.
    pub line: u64,
    /// The column.
    pub column: u64,
}

impl Position {
    /// The beginning of a file.
    pub const START: Self = Self { line: 1, column: 1 };
}

/// A checked Compose file.
///
/// The value is consistent: `networks` contains every network that a service lists, fixed addresses
/// are unique and lie in their subnets, dependencies have an order, and no two services publish the
/// same port. Whether the host can serve it is checked elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    /// The project name, a prefix of the names of all resources: `[a-z0-9][a-z0-9_-]*`.
    pub name: String,
    /// The networks by name. `default` is present exactly if a service is attached to it.
    pub networks: BTreeMap<String, NetworkConfig>,
    /// The services in the order of the file, at least one.
    pub services: Vec<Service>,
    /// Warnings for the user, complete lines in the format of errors: variables that are not set.
    pub warnings: Vec<String>,
}

/// A network of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The key in the file: `[a-zA-Z0-9._-]+`, at most 63 characters.
    pub name: String,
    /// The network has neither egress nor published ports.
    pub internal: bool,
    /// The network has IPv6 addresses, from a configured or a chosen subnet.
    pub enable_ipv6: bool,
    /// The configured subnets, at most one per address family. The others are chosen when the
    /// network is created.
    pub subnets: Vec<SubnetConfig>,
    /// Its services may connect to each other.
    pub inter_container: bool,
    /// The configured MTU of its links, 68..=65535 (at least 1280 with IPv6).
    pub mtu: Option<u32>,
    /// The configured name of its bridge, unique within the project.
    pub bridge: Option<String>,
    /// Where DNS is served.
    pub names: Names,
    /// The upstream name servers (`x-dns-servers`) of services that configure none. If empty, those
    /// of the host.
    pub dns: Vec<IpAddr>,
    /// The position of its key. If the file does not define `default`, the position of the first
    /// service attached to it.
    pub place: Position,
}

impl NetworkConfig {
    /// A network with an empty section.
    pub(super) fn plain(name: &str, place: Position) -> Self {
        Self {
            name: name.to_owned(),
            internal: false,
            enable_ipv6: false,
            subnets: Vec::new(),
            inter_container: true,
            mtu: None,
            bridge: None,
            names: Names::default(),
            dns: Vec::new(),
            place,
        }
    }
}

/// Where the names of a network are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Names {
    /// In each container, on 127.0.0.11.
    #[default]
    InContainers,
    /// On the gateway address (`x-dns: gateway`).
    AtGateway,
}

/// A subnet of a network. Its host bits are zero, and it has room for a gateway and a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubnetConfig {
    /// The subnet.
    pub subnet: IpNet,
    /// The configured gateway address.
    pub gateway: Option<IpAddr>,
}

impl SubnetConfig {
    /// Returns the gateway address: the configured one, otherwise the first host address of the
    /// subnet.
    #[must_use]
    pub fn gateway_address(&self) -> IpAddr {
        self.gateway.unwrap_or_else(|| match self.subnet.network() {
            IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits().saturating_add(1)).into(),
            IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits().saturating_add(1)).into(),
        })
    }
}

/// A service of a project: a process tree in its own network namespace, or an adopted namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The key in the file: `[a-zA-Z0-9._-]+`, at most 63 characters.
    pub name: String,
    /// The command, or the namespace to adopt.
    pub run: Run,
    /// Variables of the command in addition to the inherited ones. Variables that the file passes
    /// through are resolved here.
    pub environment: BTreeMap<String, String>,
    /// The configured host name.
    pub hostname: Option<String>,
    /// Its networks in the order of the file, at least one, without duplicates.
    pub networks: Vec<ServiceNetwork>,
    /// The published ports.
    pub ports: Vec<PortSpec>,
    /// The upstream name servers, in order. If empty, those of its networks or of the host.
    pub dns: Vec<IpAddr>,
    /// The DNS search domains. If empty, those of the host; `.` stands for none.
    pub dns_search: Vec<String>,
    /// Options of resolv.conf(5).
    pub dns_options: Vec<String>,
    /// The services to start first, without duplicates.
    pub depends_on: Vec<String>,
    /// The restart policy.
    pub restart: Restart,
    /// The working directory of the command: the directory of the file.
    pub working_dir: PathBuf,
    /// The position of its key.
    pub place: Position,
}

/// What a service consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// A program and its arguments, run in a new namespace. The program is always present.
    Command(Vec<String>),
    /// The namespace at this path (`x-netns`). A relative path is already joined to the directory
    /// of the file.
    Adopt(PathBuf),
}

/// The attachment of a service to a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceNetwork {
    /// The key of the network.
    pub network: String,
    /// Additional names of the service on this network.
    pub aliases: Vec<String>,
    /// The fixed IPv4 address.
    pub ipv4_address: Option<Ipv4Addr>,
    /// The fixed IPv6 address.
    pub ipv6_address: Option<Ipv6Addr>,
    /// It may send from source addresses other than its own (`x-any-source`), for routers and VRRP.
    pub any_source: bool,
}

impl ServiceNetwork {
    /// An attachment with default settings.
    pub(super) fn plain(network: &str) -> Self {
        Self {
            network: network.to_owned(),
            aliases: Vec::new(),
            ipv4_address: None,
            ipv6_address: None,
            any_source: false,
        }
    }
}
