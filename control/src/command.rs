//! Commands, the only way to change the state.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::{Membership, Name, Project, PublishedPort, Task};
use ipnet::IpNet;
use std::net::IpAddr;
use std::path::PathBuf;
use tidegate_model::Protocol;
use tidegate_netsetup::Overlay;

/// A change of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Creates a network.
    CreateNetwork(NetworkSpec),
    /// Removes a network without endpoints.
    RemoveNetwork(Name),
    /// Creates an endpoint: attaches a namespace to networks, and publishes ports of it.
    Attach(AttachSpec),
    /// Removes an endpoint and its published ports.
    Detach(Name),
    /// Publishes further ports of an endpoint.
    Publish {
        /// The endpoint.
        endpoint: Name,
        /// The ports, with ephemeral host ports already chosen.
        ports: Vec<PublishedPort>,
    },
    /// Removes a published port.
    Unpublish {
        /// Address of the host, as it was published.
        address: IpAddr,
        /// Port of the host.
        port: u16,
        /// Transport protocol.
        protocol: Protocol,
    },
    /// Replaces the namespace of an endpoint, which keeps its addresses and ports. Its container
    /// was restarted.
    Relocate {
        /// The endpoint.
        endpoint: Name,
        /// Absolute path of the new network namespace.
        namespace: PathBuf,
    },
    /// Creates a project with its networks and endpoints.
    ApplyProject(ProjectSpec),
    /// Removes a project, its endpoints and its networks.
    RemoveProject(Name),
    /// Joins a cluster.
    Join(Membership),
    /// Leaves the cluster.
    Leave,
}

/// A project to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProjectSpec {
    /// Its name and services.
    pub project: Project,
    /// Its networks, named `project/network`.
    pub networks: Vec<NetworkSpec>,
    /// Its endpoints, named `project/service`, with the networks of the project.
    pub endpoints: Vec<AttachSpec>,
}

/// A network to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSpec {
    /// Its name.
    pub name: Name,
    /// Subnets, at most one per family, each with its gateway. Without a gateway, it is the first
    /// address. A missing subnet is chosen from the default pools, IPv6 only with `ipv6`.
    pub subnets: Vec<(IpNet, Option<IpAddr>)>,
    /// The network has an IPv6 subnet.
    pub ipv6: bool,
    /// The network has no egress.
    pub internal: bool,
    /// Endpoints of the network can communicate with each other.
    pub inter_container: bool,
    /// MTU in bytes, 68..=65535, and at least 1280 with IPv6. If `None`, that of the host's default
    /// route.
    pub mtu: Option<u32>,
    /// Name of the bridge. If `None`, it is derived from the name of the network.
    pub bridge: Option<String>,
    /// Upstream DNS servers of its endpoints. If empty, those of the host.
    pub dns: Vec<IpAddr>,
    /// DNS is served at the gateway addresses, instead of in each container.
    pub names_at_gateway: bool,
    /// Endpoints have names on the network.
    pub has_names: bool,
    /// The network is the part of an overlay network on this host. Its subnets and MTU are given,
    /// and the other options have their defaults.
    pub overlay: Option<Overlay>,
}

impl NetworkSpec {
    /// Returns a network with default options and chosen IPv4 subnet.
    #[must_use]
    pub fn new(name: Name) -> Self {
        Self {
            name,
            subnets: Vec::new(),
            ipv6: false,
            internal: false,
            inter_container: true,
            mtu: None,
            bridge: None,
            dns: Vec::new(),
            names_at_gateway: false,
            has_names: true,
            overlay: None,
        }
    }
}

/// An endpoint to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachSpec {
    /// Its name.
    pub name: Name,
    /// Absolute path of the network namespace.
    pub namespace: PathBuf,
    /// The networks in the order of the interfaces (`eth0`, `eth1`, ...), at least one. The first
    /// one that is not internal has the default route.
    pub networks: Vec<NetworkAttachment>,
    /// Host name, an additional DNS name on all networks.
    pub hostname: Option<String>,
    /// Upstream DNS servers. If empty, those of its networks.
    pub dns: Vec<IpAddr>,
    /// Published ports, with ephemeral host ports already chosen.
    pub ports: Vec<PublishedPort>,
    /// The service of the cluster that it belongs to.
    pub task: Option<Task>,
}

/// An attachment to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkAttachment {
    /// The network.
    pub network: Name,
    /// Fixed addresses, at most one per family. The others are chosen.
    pub addresses: Vec<IpAddr>,
    /// Additional DNS names on this network.
    pub aliases: Vec<String>,
    /// The endpoint may also send from other addresses (routers, VRRP).
    pub any_source: bool,
}

impl NetworkAttachment {
    /// Returns an attachment with chosen addresses and without aliases.
    #[must_use]
    pub fn new(network: Name) -> Self {
        Self { network, addresses: Vec::new(), aliases: Vec::new(), any_source: false }
    }
}
