//! Shared parts of the tests: commands in a small domain, so that they often conflict.

use crate::{
    AttachSpec, Command, Name, NetworkAttachment, NetworkSpec, Project, ProjectSpec, PublishedPort,
    Quarantine, Refusal, State, Surroundings, Task, apply,
};
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tidegate_model::Protocol;
use tidegate_netsetup::{Observed, ObservedLink, Place};

/// The link of the host in [`Environment`], with its route.
pub(crate) const HOST_LINK: &str = "eth0";
pub(crate) const HOST_ROUTE: &str = "192.168.7.0/24";

/// Number of different random values.
const PERIOD: u32 = 31;

/// The surroundings of a host with one link.
pub(crate) struct Environment {
    pub(crate) observed: Observed,
    pub(crate) quarantine: Quarantine,
    pub(crate) now: Instant,
    count: u32,
    /// Number of different random values. A small one makes names and MAC addresses collide.
    period: u32,
}

impl Environment {
    pub(crate) fn new() -> Self {
        let route = |net: &str| (net.parse().unwrap(), HOST_LINK.to_owned());
        let observed = Observed {
            routes: vec![route("0.0.0.0/1"), route("128.0.0.0/1"), route(HOST_ROUTE)],
            links: BTreeMap::from([(
                Place::Host,
                BTreeMap::from([(HOST_LINK.into(), ObservedLink::default())]),
            )]),
            default_mtu: Some(1_400),
            ..Observed::default()
        };
        Self {
            observed,
            quarantine: Quarantine::new(),
            now: Instant::now(),
            count: 0,
            period: PERIOD,
        }
    }

    /// Returns whether all random values can be in use after the attachment to three networks.
    pub(crate) fn exhausted(state: &State) -> bool {
        state.networks.len() + 2 * (state.attachments().count() + 3) >= PERIOD as usize
    }

    /// Random names and MAC addresses differ.
    pub(crate) fn without_collisions() -> Self {
        Self { period: u32::MAX, ..Self::new() }
    }

    /// Applies a command on a host that has the bridges of `state`.
    pub(crate) fn apply(&mut self, state: &State, command: &Command) -> Result<State, Refusal> {
        let mut observed = self.observed.clone();
        for network in state.networks.values().map(|network| &network.setup) {
            let bridge = &network.bridge;
            let links = observed.links.get_mut(&Place::Host).unwrap();
            let mac = Some(bridge.mac);
            links.insert(bridge.name.clone(), ObservedLink { mac, ..ObservedLink::default() });
            let routes = network.subnets.iter().map(|one| (one.subnet, bridge.name.clone()));
            observed.routes.extend(routes);
        }
        let (count, period) = (&mut self.count, self.period);
        let mut random = || {
            *count += 1;
            // Every fifth value is repeated at once.
            let [a, b, c, d] = ((*count - *count / 5) % period).to_be_bytes();
            [0, 0, a, b, c, d]
        };
        apply(
            state,
            command,
            &mut Surroundings {
                observed: &observed,
                host_id: [1, 2, 3, 4, 5],
                random: &mut random,
                now: self.now,
                quarantine: &mut self.quarantine,
            },
        )
    }
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().unwrap()
}

pub(crate) fn port(text: &str, host_port: u16, container_port: u16) -> PublishedPort {
    let address = text.parse().unwrap();
    PublishedPort { protocol: Protocol::Tcp, address, host_port, container_port }
}

fn network_name() -> impl Strategy<Value = Name> {
    select(vec!["a", "p/a", "q/default", "r/default"]).prop_map(name)
}

fn endpoint_name() -> impl Strategy<Value = Name> {
    select(vec!["one", "two", "three", "p/one", "p/two", "q/one", "q/two"]).prop_map(name)
}

fn path() -> impl Strategy<Value = std::path::PathBuf> {
    let paths: Vec<String> = (0..9).map(|number| format!("/run/netns/{number}")).collect();
    prop_oneof![100 => select(paths), 1 => Just("relative".to_owned())].prop_map(Into::into)
}

fn subnet() -> impl Strategy<Value = (IpNet, Option<IpAddr>)> {
    let subnets = vec![
        ("10.9.0.0/24", None),
        ("10.9.0.0/24", Some("10.9.0.254")),
        ("10.9.0.0/24", Some("10.9.1.1")),
        ("10.9.0.0/29", None),
        ("10.9.0.128/30", None),
        ("10.9.0.128/30", Some("10.9.0.131")),
        ("10.8.0.0/15", None),
        ("10.9.0.1/24", None),
        ("127.1.0.0/16", None),
        ("192.168.0.0/16", None),
        ("192.168.7.128/30", None),
        ("172.28.0.0/22", None),
        ("10.10.0.0/31", None),
        ("fd09::/64", None),
        ("fd09::/126", None),
        ("fd01:203:405::/48", None),
    ];
    select(subnets).prop_map(|(subnet, gateway)| {
        (subnet.parse().unwrap(), gateway.map(|gateway: &str| gateway.parse().unwrap()))
    })
}

fn address() -> impl Strategy<Value = IpAddr> {
    select(vec![
        "10.9.0.0",
        "10.9.0.1",
        "10.9.0.2",
        "10.9.0.3",
        "10.9.0.7",
        "10.9.0.130",
        "10.9.0.254",
        "172.28.0.1",
        "172.28.0.2",
        "172.28.0.77",
        "fd09::",
        "fd09::2",
        "fd09::3",
        "fd01:203:405::2",
    ])
    .prop_map(|address| address.parse().unwrap())
}

fn published() -> impl Strategy<Value = PublishedPort> {
    let address =
        select(vec!["0.0.0.0", "::", "127.0.0.1", "::ffff:127.0.0.1", "192.0.2.1", "::1"]);
    let protocol = select(Protocol::ALL.to_vec());
    (address, 0_u16..30, 0_u16..99, protocol).prop_map(
        |(text, host_port, container_port, protocol)| PublishedPort {
            protocol,
            ..port(text, host_port, container_port)
        },
    )
}

fn ports() -> impl Strategy<Value = Vec<PublishedPort>> {
    prop_oneof![3 => Just(vec![]), 2 => prop::collection::vec(published(), 1..3)]
}

fn network() -> impl Strategy<Value = NetworkSpec> {
    let subnets = prop_oneof![
        9 => Just(vec![]),
        6 => Just(vec![
            ("10.9.0.128/30".parse().unwrap(), None),
            ("fd09::/126".parse().unwrap(), None),
        ]),
        6 => prop::collection::vec(subnet(), 1),
        1 => prop::collection::vec(subnet(), 2),
    ];
    let bridge = prop_oneof![
        20 => Just(None),
        3 => select(vec!["br-a", "br-b", "br-c", HOST_LINK, "tgv000000000001", "bad name"])
            .prop_map(Some),
    ];
    let mtu = prop_oneof![
        20 => Just(None),
        1 => select(vec![67, 68, 1_279, 1_280, 9_000, 65_536]).prop_map(Some),
    ];
    (network_name(), subnets, any::<[bool; 4]>(), bridge, mtu).prop_map(
        |(name, subnets, [ipv6, internal, inter_container, names_at_gateway], bridge, mtu)| {
            NetworkSpec {
                subnets,
                ipv6,
                internal,
                inter_container,
                mtu,
                bridge: bridge.map(Into::into),
                dns: vec!["192.0.2.53".parse().unwrap()],
                names_at_gateway,
                ..NetworkSpec::new(name)
            }
        },
    )
}

fn attachment() -> impl Strategy<Value = NetworkAttachment> {
    let addresses = prop_oneof![
        30 => Just(vec![]),
        3 => prop::collection::vec(address(), 1),
        1 => prop::collection::vec(address(), 2),
    ];
    let aliases = prop_oneof![
        30 => Just(vec![]),
        30 => Just(vec!["www".to_owned(), "_a.b".to_owned()]),
        1 => Just(vec!["a b".to_owned()]),
    ];
    (network_name(), addresses, aliases, any::<bool>()).prop_map(
        |(network, addresses, aliases, any_source)| NetworkAttachment {
            network,
            addresses,
            aliases,
            any_source,
        },
    )
}

fn attach() -> impl Strategy<Value = AttachSpec> {
    let networks = prop_oneof![
        4 => prop::collection::vec(attachment(), 1), 3 => prop::collection::vec(attachment(), 0..4),
    ];
    let hostname = prop_oneof![
        30 => Just(None), 30 => Just(Some("host.example")), 1 => Just(Some("-bad")),
    ];
    (endpoint_name(), path(), networks, hostname, ports()).prop_map(
        |(name, namespace, networks, hostname, ports)| AttachSpec {
            name,
            namespace,
            networks,
            hostname: hostname.map(Into::into),
            dns: Vec::new(),
            task: ports.first().map(|port| Task {
                service: "shop".into(),
                weight: port.host_port,
                health_command: Some(vec!["true".into()]),
            }),
            ports,
        },
    )
}

pub(crate) fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        6 => network().prop_map(Command::CreateNetwork),
        1 => network_name().prop_map(Command::RemoveNetwork),
        20 => attach().prop_map(Command::Attach),
        3 => endpoint_name().prop_map(Command::Detach),
        3 => (endpoint_name(), ports())
            .prop_map(|(endpoint, ports)| Command::Publish { endpoint, ports }),
        2 => published().prop_map(|port| Command::Unpublish {
            address: port.address,
            port: port.host_port,
            protocol: port.protocol,
        }),
        2 => (endpoint_name(), path())
            .prop_map(|(endpoint, namespace)| Command::Relocate { endpoint, namespace }),
    ]
}

/// A project of few networks and services, and commands that change projects as a whole.
pub(crate) fn project_command() -> impl Strategy<Value = Command> {
    let project = || select(vec!["p", "q", "r"]).prop_map(name);
    let networks = prop::collection::vec(network(), 0..3);
    let endpoints = prop::collection::vec(attach(), 0..4);
    let create = (project(), networks, endpoints, any::<bool>()).prop_map(
        |(project, networks, endpoints, is_consistent)| {
            let part = |one: &Name| Name::new(Some(project.name()), one.name()).unwrap();
            let mut spec = ProjectSpec {
                project: Project {
                    name: project.clone(),
                    file: None,
                    grace: Duration::from_secs(10),
                    services: Vec::new(),
                },
                networks,
                endpoints,
            };
            // Otherwise it has parts of other projects, and is refused.
            if is_consistent {
                for network in &mut spec.networks {
                    network.name = part(&network.name);
                }
                for endpoint in &mut spec.endpoints {
                    endpoint.name = part(&endpoint.name);
                    for attachment in &mut endpoint.networks {
                        attachment.network = part(&attachment.network);
                    }
                }
            }
            Command::ApplyProject(spec)
        },
    );
    prop_oneof![3 => create, 1 => project().prop_map(Command::RemoveProject)]
}

/// Returns the states after each of the commands that are not refused.
pub(crate) fn states(commands: &[Command]) -> Vec<State> {
    let mut environment = Environment::new();
    let mut states = vec![State::default()];
    for command in commands {
        if let Ok(state) = environment.apply(&states[states.len() - 1], command) {
            states.push(state);
        }
    }
    states
}
