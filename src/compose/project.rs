//! What a Compose file says, checked: the values that the rest of tidegate works with.

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use tidegate_model::PortSpec;

/// The name of the network that services belong to which name none.
pub const DEFAULT_NETWORK: &str = "default";

/// A position in a Compose file, both numbers counted from 1, the column in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The line.
    pub line: u64,
    /// The column.
    pub column: u64,
}

impl Place {
    /// The beginning of a file.
    pub const START: Self = Self { line: 1, column: 1 };
}

/// A checked Compose file.
///
/// What stands here is consistent in itself: every network that a service names is in `networks`,
/// fixed addresses lie in their subnets and are not given twice, dependencies have an order, and no
/// two services publish the same port. Whether the host can serve it is another question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    /// What scopes the names of everything that is made: `[a-z0-9][a-z0-9_-]*`.
    pub name: String,
    /// The networks by name. `default` is among them exactly if a service is on it.
    pub networks: BTreeMap<String, Network>,
    /// The services in the order of the file; there is at least one.
    pub services: Vec<Service>,
    /// What a user should be told, complete lines in the form of errors: variables that are not
    /// set.
    pub warnings: Vec<String>,
}

/// A network of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its key in the file: `[a-zA-Z0-9._-]+`, 63 characters at most.
    pub name: String,
    /// Whether there is no egress of it (and none in).
    pub internal: bool,
    /// Whether it has IPv6 addresses, given or chosen.
    pub enable_ipv6: bool,
    /// The given subnets, at most one of IPv4 and one of IPv6; the others are chosen where the
    /// network is made.
    pub subnets: Vec<Subnet>,
    /// Whether its services may talk to each other.
    pub inter_container: bool,
    /// The MTU of its links, 68..=65535 (with IPv6 from 1280), if given.
    pub mtu: Option<u32>,
    /// The name of its bridge, if given; no two networks have the same.
    pub bridge: Option<String>,
    /// Where its names are served.
    pub names: Names,
    /// The servers that names beyond its own are asked of, by services without servers of their own
    /// (`x-dns-servers`); none for those of the host.
    pub dns: Vec<IpAddr>,
    /// Where its key stands; for a `default` that the file does not mention, the first service on
    /// it.
    pub place: Place,
}

impl Network {
    /// The network called `name` whose section is empty.
    pub(super) fn plain(name: &str, place: Place) -> Self {
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

/// Where names of a network are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Names {
    /// In each container, at 127.0.0.11.
    #[default]
    InContainers,
    /// At the gateway's address (`x-dns: gateway`).
    AtGateway,
}

/// A subnet of a network. No host bits are set, and there is room for a gateway and a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    /// The subnet.
    pub subnet: IpNet,
    /// The gateway's address in it, if given.
    pub gateway: Option<IpAddr>,
}

impl Subnet {
    /// The gateway's address: the given one, otherwise the first of the subnet.
    #[must_use]
    pub fn gateway_address(&self) -> IpAddr {
        self.gateway.unwrap_or_else(|| match self.subnet.network() {
            IpAddr::V4(network) => Ipv4Addr::from_bits(network.to_bits().saturating_add(1)).into(),
            IpAddr::V6(network) => Ipv6Addr::from_bits(network.to_bits().saturating_add(1)).into(),
        })
    }
}

/// A service of a project: one process tree in a network namespace, or a namespace that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its key in the file: `[a-zA-Z0-9._-]+`, 63 characters at most.
    pub name: String,
    /// What it is.
    pub run: Run,
    /// Variables for the command, beyond those it inherits. Those passed through have their values
    /// here.
    pub environment: BTreeMap<String, String>,
    /// The host name it sees, if given.
    pub hostname: Option<String>,
    /// The networks it is on, in the order of the file; at least one, none twice.
    pub networks: Vec<Attachment>,
    /// The ports it publishes.
    pub ports: Vec<PortSpec>,
    /// The servers that names beyond its networks are asked of, in order; none for those of the
    /// host.
    pub dns: Vec<IpAddr>,
    /// The domains that names are looked for in; none for the host's, and `.` for none at all.
    pub dns_search: Vec<String>,
    /// Options of resolv.conf(5).
    pub dns_options: Vec<String>,
    /// The services to start before it, none twice.
    pub depends_on: Vec<String>,
    /// What to do when the command ends.
    pub restart: Restart,
    /// The directory the command starts in: the one of the file.
    pub working_dir: PathBuf,
    /// Where its key stands.
    pub place: Place,
}

/// What a service is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    /// A program and its arguments, to run in a namespace made for it. There is at least the
    /// program.
    Command(Vec<String>),
    /// The namespace at this path (`x-netns`). A relative path is joined to the directory of the
    /// file already.
    Adopt(PathBuf),
}

/// A service on a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The network's key.
    pub network: String,
    /// Names of the service on this network beside its own.
    pub aliases: Vec<String>,
    /// Its IPv4 address, if fixed.
    pub ipv4_address: Option<Ipv4Addr>,
    /// Its IPv6 address, if fixed.
    pub ipv6_address: Option<Ipv6Addr>,
    /// It may send from other addresses than its own (`x-any-source`): a router, VRRP.
    pub any_source: bool,
}

impl Attachment {
    /// On `network`, with nothing else said.
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

/// What to do when a service's command ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Restart {
    /// Nothing.
    #[default]
    No,
    /// Start it again if it failed (exit code other than 0, or killed by a signal), `max` times at
    /// most; without `max` always.
    OnFailure {
        /// How often, 1 and up.
        max: Option<u32>,
    },
    /// Start it again.
    Always,
    /// Start it again unless it was stopped on purpose. Differs from `Always` only where services
    /// are started by themselves after a reboot, which is not done here.
    UnlessStopped,
}
