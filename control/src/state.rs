//! The desired state: networks and endpoints, with all names, addresses and ports resolved.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::Name;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tidegate_model::{Protocol, Restart, bracketed};
use tidegate_netsetup::{self as netsetup, Desired};

/// The desired state of a host.
///
/// Only [`apply`](crate::apply) creates a changed state. The values are shared between states, so a
/// clone is a snapshot: its cost is a pointer per object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub(crate) networks: BTreeMap<Name, Arc<Network>>,
    pub(crate) endpoints: BTreeMap<Name, Arc<Endpoint>>,
    pub(crate) projects: BTreeMap<Name, Arc<Project>>,
    /// At most one, by the name of this host.
    pub(crate) mesh: BTreeMap<Name, Arc<Membership>>,
}

/// The membership of this host in a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The name of this host in the cluster.
    pub host: Name,
    /// The address at which other hosts reach its VXLAN endpoint.
    pub advertise: IpAddr,
    /// How to reach the cluster state.
    pub etcd: EtcdAccess,
}

/// How to reach the servers of etcd. Secrets are in files, which are read at each start. All paths
/// are absolute and in UTF-8.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdAccess {
    /// URLs of the servers.
    pub servers: Vec<String>,
    /// User name.
    pub user: Option<String>,
    /// File with the password of the user.
    pub password_file: Option<PathBuf>,
    /// File with the certificates of the authorities of the servers.
    pub authorities: Option<PathBuf>,
    /// File with the certificate of this client.
    pub certificate: Option<PathBuf>,
    /// File with the private key of this client.
    pub key: Option<PathBuf>,
}

/// A Compose project, whose services run in the background.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    /// Its name, without a project.
    pub name: Name,
    /// Path of its Compose file, for reports. In UTF-8.
    pub file: Option<PathBuf>,
    /// Time between SIGTERM and SIGKILL when its services are stopped.
    pub grace: Duration,
    /// Its services in the order of the file, without those in adopted namespaces.
    pub services: Vec<Service>,
}

/// A service of a project: a command that runs in the namespace of the endpoint `project/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name in the project.
    pub name: String,
    /// Program and arguments, at least the program.
    pub command: Vec<String>,
    /// Environment variables in addition to the inherited ones.
    pub environment: BTreeMap<String, String>,
    /// Absolute path of the working directory. In UTF-8.
    pub working_dir: PathBuf,
    /// DNS search domains. If empty, those of the host.
    pub dns_search: Vec<String>,
    /// Options of resolv.conf(5).
    pub dns_options: Vec<String>,
    /// Restart policy.
    pub restart: Restart,
    /// Names of the services that have to run before this one starts.
    pub depends_on: Vec<String>,
}

/// A network of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its name.
    pub name: Name,
    /// The bridge and its subnets. Their network is named by the text of `name`.
    pub setup: netsetup::Network,
    /// Upstream DNS servers of its endpoints. If empty, those of the host.
    pub dns: Vec<IpAddr>,
    /// DNS is served at the gateway addresses, instead of in each container.
    pub names_at_gateway: bool,
    /// Endpoints have names on the network.
    pub has_names: bool,
}

/// A network namespace that is attached to networks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its name.
    pub name: Name,
    /// The attachments: veth pairs and addresses. Their endpoint and networks are named by the text
    /// of their [`Name`]s.
    pub setup: netsetup::Endpoint,
    /// Additional DNS names of the endpoint on each of its networks. Contains all of its networks.
    pub aliases: BTreeMap<Name, Vec<String>>,
    /// Host name, an additional DNS name on all of its networks.
    pub hostname: Option<String>,
    /// Upstream DNS servers. If empty, those of its networks.
    pub dns: Vec<IpAddr>,
    /// Absolute path of the network namespace, in UTF-8.
    pub namespace: PathBuf,
    /// The published ports, sorted.
    pub ports: Vec<PublishedPort>,
    /// The service of the cluster that it belongs to.
    pub task: Option<Task>,
}

/// The part of an endpoint in a service of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The service.
    pub service: String,
    /// Its share of the connections, in relation to the other tasks.
    pub weight: u16,
    /// A command that succeeds while the task is healthy, in its network namespace.
    pub health_command: Option<Vec<String>>,
}

/// A published port of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublishedPort {
    /// Transport protocol on both sides.
    pub protocol: Protocol,
    /// Address of the host, or the wildcard address of a family. Never an IPv4-mapped address.
    pub address: IpAddr,
    /// Port of the host, 1..=65535.
    pub host_port: u16,
    /// Port of the container, 1..=65535.
    pub container_port: u16,
}

impl PublishedPort {
    /// Returns whether both need the same socket of the host. A wildcard address includes all
    /// addresses of its family.
    #[must_use]
    pub fn conflicts(&self, other: &Self) -> bool {
        self.socket() == other.socket()
            && (self.address == other.address
                || self.address.is_ipv4() == other.address.is_ipv4()
                    && (self.address.is_unspecified() || other.address.is_unspecified()))
    }

    /// Returns the protocol and the port on the host.
    pub(crate) fn socket(&self) -> (Protocol, u16) {
        (self.protocol, self.host_port)
    }
}

/// The host's side in the format of the `publish` label: `0.0.0.0:8080/tcp`.
impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", bracketed(self.address), self.host_port, self.protocol)
    }
}

impl Endpoint {
    /// Returns the addresses on the network, IPv4 before IPv6.
    pub fn addresses_on(&self, network: &Name) -> impl Iterator<Item = IpAddr> {
        let text = network.to_string();
        let attachment = self.setup.attachments.iter().find(|one| one.network == text);
        attachment.into_iter().flat_map(|one| one.addresses.iter().map(ipnet::IpNet::addr))
    }
}

impl State {
    /// Returns the networks by name.
    #[must_use]
    pub fn networks(&self) -> &BTreeMap<Name, Arc<Network>> {
        &self.networks
    }

    /// Returns the endpoints by name.
    #[must_use]
    pub fn endpoints(&self) -> &BTreeMap<Name, Arc<Endpoint>> {
        &self.endpoints
    }

    /// Returns the membership in a cluster, if there is one.
    #[must_use]
    pub fn membership(&self) -> Option<&Arc<Membership>> {
        self.mesh.values().next()
    }

    /// Returns the projects by name.
    #[must_use]
    pub fn projects(&self) -> &BTreeMap<Name, Arc<Project>> {
        &self.projects
    }

    /// Returns the endpoints on the network.
    pub fn members<'a>(&'a self, network: &Name) -> impl Iterator<Item = &'a Arc<Endpoint>> {
        self.endpoints.values().filter(|endpoint| endpoint.aliases.contains_key(network))
    }

    /// Returns all published ports with their endpoints.
    pub fn ports(&self) -> impl Iterator<Item = (&Arc<Endpoint>, &PublishedPort)> {
        self.endpoints
            .values()
            .flat_map(|endpoint| endpoint.ports.iter().map(move |port| (endpoint, port)))
    }

    /// Returns the part that netsetup implements. Uplinks, reply paths, priorities and guards have
    /// their defaults: they follow from the observed state of the host.
    #[must_use]
    pub fn desired(&self) -> Desired {
        Desired {
            networks: self.networks.values().map(|network| network.setup.clone()).collect(),
            endpoints: self.endpoints.values().map(|endpoint| endpoint.setup.clone()).collect(),
            ..Desired::default()
        }
    }

    /// Returns the interfaces on the host: bridges and the host's ends of veth pairs.
    pub(crate) fn host_interfaces(&self) -> impl Iterator<Item = &netsetup::Interface> {
        let bridges = self.networks.values().map(|network| &network.setup.bridge);
        bridges.chain(self.attachments().map(|attachment| &attachment.host_end))
    }

    /// Returns all attachments of all endpoints.
    pub(crate) fn attachments(&self) -> impl Iterator<Item = &netsetup::Attachment> {
        self.endpoints.values().flat_map(|endpoint| &endpoint.setup.attachments)
    }
}
