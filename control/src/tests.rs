//! Random commands, compared with a simple model and executed by a toy reconciler.

use crate::testing::{
    Environment, HOST_LINK, HOST_ROUTE, command, name, port, project_command, states,
};
use crate::{
    AttachSpec, Change, Command, Endpoint, EtcdAccess, MAX_ENDPOINTS_OF_NETWORK, MAX_PORTS,
    Membership, Name, Network, NetworkAttachment, NetworkSpec, Project, ProjectSpec, PublishedPort,
    Refusal, Service, State, changes,
};
use ipnet::IpNet;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::Restart;
use tidegate_netsetup::{Observed, Overlay, QUARANTINE, RuleIsolation, capacity, plan};

/// The model: the rules of the documentation as plain searches, over copies of what was assigned.
#[derive(Default)]
struct Model {
    networks: BTreeMap<Name, ModelNetwork>,
    endpoints: BTreeMap<Name, ModelEndpoint>,
    released: Vec<(IpAddr, Instant)>,
}

struct ModelNetwork {
    subnets: Vec<(IpNet, IpAddr)>,
    bridge: String,
}

struct ModelEndpoint {
    namespace: PathBuf,
    addresses: BTreeMap<Name, Vec<IpAddr>>,
    veths: Vec<String>,
    ports: BTreeSet<PublishedPort>,
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(&other.network()) || other.contains(&one.network())
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(' ') && !text.starts_with('-')
}

impl Model {
    fn allows(&self, command: &Command, now: Instant) -> bool {
        match command {
            Command::CreateNetwork(spec) => self.allows_network(spec),
            Command::RemoveNetwork(network) => {
                self.networks.contains_key(network)
                    && !self.endpoints.values().any(|one| one.addresses.contains_key(network))
            }
            Command::Attach(spec) => self.allows_attach(spec, now),
            Command::Detach(endpoint) => self.endpoints.contains_key(endpoint),
            Command::Publish { endpoint, ports } => {
                self.endpoints.contains_key(endpoint) && self.allows_ports(ports)
            }
            Command::Unpublish { address, port, protocol } => self.published().any(|one| {
                (one.address, one.host_port, one.protocol)
                    == (address.to_canonical(), *port, *protocol)
            }),
            Command::Relocate { endpoint, namespace } => {
                self.endpoints.contains_key(endpoint) && self.allows_namespace(endpoint, namespace)
            }
            Command::ApplyProject(_)
            | Command::RemoveProject(_)
            | Command::Join(_)
            | Command::Leave => unreachable!("not generated"),
        }
    }

    fn published(&self) -> impl Iterator<Item = &PublishedPort> {
        self.endpoints.values().flat_map(|endpoint| &endpoint.ports)
    }

    fn allows_network(&self, spec: &NetworkSpec) -> bool {
        let v4: Vec<_> = spec.subnets.iter().filter(|(net, _)| net.addr().is_ipv4()).collect();
        let v6: Vec<_> = spec.subnets.iter().filter(|(net, _)| net.addr().is_ipv6()).collect();
        let bridge_is_free = |bridge: &String| {
            is_word(bridge)
                && bridge != HOST_LINK
                && !self.networks.values().any(|one| one.bridge == *bridge)
                && !self.endpoints.values().any(|one| one.veths.contains(bridge))
        };
        let mtu = spec.mtu.unwrap_or(1_500);
        !self.networks.contains_key(&spec.name)
            && v4.len() <= 1
            && v6.len() <= usize::from(spec.ipv6)
            && spec.subnets.iter().all(|(subnet, gateway)| self.allows_subnet(*subnet, *gateway))
            && spec.bridge.iter().all(bridge_is_free)
            && (68..=65_535).contains(&mtu)
            && (mtu >= 1_280 || !spec.ipv6)
            // The /48 of the default pool can be taken as a whole.
            && (!spec.ipv6 || !v6.is_empty() || !self.networks.values().any(|network| {
                network.subnets.iter().any(|(subnet, _)| {
                    *subnet == "fd01:203:405::/48".parse().unwrap()
                })
            }))
    }

    fn allows_subnet(&self, subnet: IpNet, gateway: Option<IpAddr>) -> bool {
        let gateway_fits = gateway.is_none_or(|gateway| {
            let ends = [Some(subnet.network()), gateway.is_ipv4().then(|| subnet.broadcast())];
            subnet.contains(&gateway) && !ends.contains(&Some(gateway))
        });
        subnet.addr() == subnet.network()
            && capacity(subnet) >= 2
            && subnet.max_prefix_len() - subnet.prefix_len() >= 2
            && !overlap(&subnet, &"127.0.0.0/8".parse().unwrap())
            && !overlap(&subnet, &HOST_ROUTE.parse().unwrap())
            && gateway_fits
            && !self
                .networks
                .values()
                .any(|one| one.subnets.iter().any(|(other, _)| overlap(other, &subnet)))
    }

    fn allows_namespace(&self, endpoint: &Name, namespace: &PathBuf) -> bool {
        namespace.is_absolute()
            && !self
                .endpoints
                .iter()
                .any(|(name, one)| name != endpoint && one.namespace == *namespace)
    }

    fn allows_ports(&self, ports: &[PublishedPort]) -> bool {
        let ports: Vec<PublishedPort> = ports.iter().map(canonical).collect();
        let clash = |one: &PublishedPort, other: &PublishedPort| {
            (one.protocol, one.host_port, one.address.is_ipv4())
                == (other.protocol, other.host_port, other.address.is_ipv4())
                && (one.address == other.address
                    || [one, other].iter().any(|port| port.address.is_unspecified()))
        };
        ports.iter().enumerate().all(|(number, port)| {
            port.host_port > 0
                && port.container_port > 0
                && !ports[..number].iter().any(|other| clash(port, other))
                && !self.published().any(|other| clash(port, other))
        })
    }

    fn allows_attach(&self, spec: &AttachSpec, now: Instant) -> bool {
        let networks: BTreeSet<&Name> = spec.networks.iter().map(|one| &one.network).collect();
        !self.endpoints.contains_key(&spec.name)
            && !spec.networks.is_empty()
            && networks.len() == spec.networks.len()
            && spec.hostname.as_deref().is_none_or(is_word)
            && self.allows_namespace(&spec.name, &spec.namespace)
            && self.allows_ports(&spec.ports)
            && spec.networks.iter().all(|one| {
                one.aliases.iter().all(|alias| is_word(alias)) && self.has_addresses(one, now)
            })
    }

    fn has_addresses(&self, wanted: &NetworkAttachment, now: Instant) -> bool {
        let Some(network) = self.networks.get(&wanted.network) else { return false };
        let held: BTreeSet<IpAddr> = self
            .endpoints
            .values()
            .filter_map(|one| one.addresses.get(&wanted.network))
            .flatten()
            .copied()
            .collect();
        let of_family =
            |v6: bool| wanted.addresses.iter().filter(move |one| one.is_ipv6() == v6).count();
        let fixed_fit = wanted.addresses.iter().all(|address| {
            network.subnets.iter().any(|(subnet, gateway)| {
                subnet.contains(address)
                    && address != gateway
                    && *address != subnet.network()
                    && (address.is_ipv6() || *address != subnet.broadcast())
            }) && !held.contains(address)
        });
        let chosen_fit = network.subnets.iter().all(|(subnet, _)| {
            let used = held.iter().filter(|one| subnet.contains(*one)).count();
            let resting: BTreeSet<IpAddr> = self
                .released
                .iter()
                .filter(|(one, since)| now < *since + QUARANTINE && subnet.contains(one))
                .map(|(one, _)| *one)
                // The gateway of a new network may be an address that is still in quarantine.
                .filter(|one| {
                    !held.contains(one)
                        && !network.subnets.iter().any(|(_, gateway)| gateway == one)
                })
                .filter(|one| {
                    *one != subnet.network() && (one.is_ipv6() || *one != subnet.broadcast())
                })
                .collect();
            of_family(subnet.addr().is_ipv6()) > 0
                || ((used + resting.len() + 1) as u128) < capacity(*subnet)
        });
        of_family(false) <= 1 && of_family(true) <= 1 && fixed_fit && chosen_fit
    }

    /// Follows a command that was not refused.
    fn follow(&mut self, command: &Command, after: &State, now: Instant) {
        match command {
            Command::CreateNetwork(spec) => {
                let network = &after.networks[&spec.name].setup;
                let subnets = network.subnets.iter().map(|one| (one.subnet, one.gateway));
                let bridge = network.bridge.name.clone();
                let network = ModelNetwork { subnets: subnets.collect(), bridge };
                self.networks.insert(spec.name.clone(), network);
            }
            Command::RemoveNetwork(network) => {
                self.networks.remove(network);
            }
            Command::Attach(spec) => {
                let endpoint = &after.endpoints[&spec.name];
                let of = |one: &NetworkAttachment| {
                    (one.network.clone(), endpoint.addresses_on(&one.network).collect())
                };
                let addresses: BTreeMap<Name, Vec<IpAddr>> = spec.networks.iter().map(of).collect();
                let rests = |ip: &IpAddr| {
                    self.released.iter().any(|(one, since)| one == ip && now < *since + QUARANTINE)
                };
                for one in &spec.networks {
                    let mut chosen =
                        addresses[&one.network].iter().filter(|ip| !one.addresses.contains(ip));
                    assert!(!chosen.any(rests), "chosen from the quarantine");
                }
                self.released.retain(|(one, _)| !addresses.values().flatten().any(|ip| ip == one));
                let attachments = &endpoint.setup.attachments;
                self.endpoints.insert(
                    spec.name.clone(),
                    ModelEndpoint {
                        namespace: spec.namespace.clone(),
                        addresses,
                        veths: attachments.iter().map(|one| one.host_end.name.clone()).collect(),
                        ports: spec.ports.iter().map(canonical).collect(),
                    },
                );
            }
            Command::Detach(endpoint) => {
                let endpoint = self.endpoints.remove(endpoint).unwrap();
                let addresses = endpoint.addresses.into_values().flatten();
                self.released.extend(addresses.map(|address| (address, now)));
            }
            Command::Publish { endpoint, ports } => {
                let endpoint = self.endpoints.get_mut(endpoint).unwrap();
                endpoint.ports.extend(ports.iter().map(canonical));
            }
            Command::Unpublish { address, port, protocol } => {
                for endpoint in self.endpoints.values_mut() {
                    endpoint.ports.retain(|one| {
                        (one.address, one.host_port, one.protocol)
                            != (address.to_canonical(), *port, *protocol)
                    });
                }
            }
            Command::Relocate { endpoint, namespace } => {
                self.endpoints.get_mut(endpoint).unwrap().namespace.clone_from(namespace);
            }
            Command::ApplyProject(_)
            | Command::RemoveProject(_)
            | Command::Join(_)
            | Command::Leave => unreachable!("not generated"),
        }
    }

    /// Compares the parts that the model knows.
    fn check(&self, state: &State) {
        assert!(self.networks.keys().eq(state.networks.keys()));
        assert!(self.endpoints.keys().eq(state.endpoints.keys()));
        for (name, endpoint) in &self.endpoints {
            let real = &state.endpoints[name];
            assert_eq!(real.namespace, endpoint.namespace);
            assert_eq!(real.ports, endpoint.ports.iter().copied().collect::<Vec<_>>());
            for (network, addresses) in &endpoint.addresses {
                assert_eq!(real.addresses_on(network).collect::<Vec<_>>(), *addresses);
            }
        }
    }
}

fn canonical(port: &PublishedPort) -> PublishedPort {
    PublishedPort { address: port.address.to_canonical(), ..*port }
}

fn unique<T: Ord + std::fmt::Debug>(values: impl IntoIterator<Item = T>) {
    let mut seen = BTreeSet::new();
    for value in values {
        let text = format!("{value:?}");
        assert!(seen.insert(value), "{text} occurs twice");
    }
}

fn check_invariants(state: &State) {
    // Overlaps, addresses in subnets, names of interfaces on the host.
    let isolation = RuleIsolation::default();
    let desired = state.desired();
    plan(&desired, &[], &Observed::default(), &isolation).unwrap();
    unique(state.networks.values().map(|network| network.setup.bridge.mac).chain(
        state.attachments().flat_map(|attachment| [attachment.host_end.mac, attachment.inside.mac]),
    ));
    unique(state.host_interfaces().map(|interface| &interface.name));
    unique(state.endpoints.values().map(|endpoint| &endpoint.namespace));
    let ports: Vec<&PublishedPort> = state.ports().map(|(_, port)| port).collect();
    for (number, port) in ports.iter().enumerate() {
        assert!(
            !ports[..number].iter().any(|other| other.conflicts(port)),
            "{port} is published twice"
        );
    }
    for endpoint in state.endpoints.values() {
        assert_eq!(endpoint.setup.attachments.len(), endpoint.aliases.len());
        unique(endpoint.setup.attachments.iter().map(|attachment| &attachment.inside.name));
        let defaults = endpoint.setup.attachments.iter().filter(|one| one.default_route);
        assert!(defaults.count() <= 1);
        for attachment in &endpoint.setup.attachments {
            let network = &state.networks[&name(&attachment.network)].setup;
            assert_eq!(attachment.addresses.len(), network.subnets.len());
            assert!(!(attachment.default_route && network.internal));
        }
    }
}

/// A host that checks the order of the steps.
#[derive(Debug, Default, PartialEq)]
struct Host {
    networks: BTreeMap<Name, Arc<Network>>,
    endpoints: BTreeMap<Name, Arc<Endpoint>>,
    ports: BTreeMap<PublishedPort, Name>,
}

impl Host {
    fn execute(&mut self, change: Change) {
        match change {
            Change::ClosePort { endpoint, port } => {
                assert_eq!(self.ports.remove(&port), Some(endpoint.name.clone()));
                assert_eq!(self.endpoints[&endpoint.name].setup, endpoint.setup);
            }
            Change::RemoveEndpoint(endpoint) => {
                assert!(!self.ports.values().any(|holder| *holder == endpoint.name), "open ports");
                let old = self.endpoints.remove(&endpoint.name).unwrap();
                assert_eq!(old.setup, endpoint.setup);
            }
            Change::RemoveNetwork(network) => {
                let used = |one: &Arc<Endpoint>| one.aliases.contains_key(&network.name);
                assert!(!self.endpoints.values().any(used), "network in use");
                assert_eq!(self.networks.remove(&network.name).as_ref(), Some(&network));
            }
            Change::AddNetwork(network) => {
                for other in self.networks.values() {
                    assert_ne!(other.setup.bridge.name, network.setup.bridge.name);
                    for subnet in &network.setup.subnets {
                        let overlaps = other
                            .setup
                            .subnets
                            .iter()
                            .any(|one| overlap(&one.subnet, &subnet.subnet));
                        assert!(!overlaps, "subnet in use");
                    }
                }
                assert!(self.networks.insert(network.name.clone(), network).is_none());
            }
            Change::MoveEndpoint { old, new } => {
                assert_eq!(old.setup, new.setup);
                let current = self.endpoints.remove(&old.name).unwrap();
                assert_eq!(current.namespace, old.namespace);
                self.add(new);
            }
            Change::AddEndpoint(endpoint) => self.add(endpoint),
            Change::OpenPort { endpoint, port } => {
                assert_eq!(self.endpoints[&endpoint.name].setup, endpoint.setup);
                assert!(!self.ports.keys().any(|other| other.conflicts(&port)), "port in use");
                self.ports.insert(port, endpoint.name.clone());
            }
        }
    }

    fn add(&mut self, endpoint: Arc<Endpoint>) {
        for network in endpoint.aliases.keys() {
            assert!(self.networks.contains_key(network), "network missing");
        }
        for other in self.endpoints.values() {
            assert_ne!(other.namespace, endpoint.namespace, "namespace in use");
            for attachment in &other.setup.attachments {
                for new in &endpoint.setup.attachments {
                    assert_ne!(attachment.host_end.name, new.host_end.name);
                    assert!(
                        attachment.network != new.network
                            || !attachment.addresses.iter().any(|one| new.addresses.contains(one)),
                        "address in use"
                    );
                }
            }
        }
        assert!(self.endpoints.insert(endpoint.name.clone(), endpoint).is_none());
    }

    /// Endpoints differ from those of the state in their ports, which are separate here.
    fn assert_has(&self, state: &State) {
        assert_eq!(self.networks, state.networks);
        let ports = state.ports().map(|(endpoint, port)| (*port, endpoint.name.clone()));
        assert_eq!(self.ports, ports.collect());
        let without_ports = |endpoint: &Endpoint| Endpoint { ports: vec![], ..endpoint.clone() };
        let endpoints: Vec<Endpoint> =
            self.endpoints.values().map(|one| without_ports(one)).collect();
        assert_eq!(
            endpoints,
            state.endpoints.values().map(|one| without_ports(one)).collect::<Vec<_>>()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn commands_follow_the_model(
        steps in prop::collection::vec((command(), 0_u64..20, any::<bool>()), 1..150)
    ) {
        let mut environment = Environment::new();
        let (mut state, mut model) = (State::default(), Model::default());
        let (mut host, mut reconciled) = (Host::default(), State::default());
        for (command, seconds, reconcile) in steps {
            environment.now += Duration::from_secs(seconds);
            let allowed = model.allows(&command, environment.now);
            match environment.apply(&state, &command) {
                Ok(next) => {
                    prop_assert!(allowed, "{:?} was not refused", command);
                    check_invariants(&next);
                    model.follow(&command, &next, environment.now);
                    state = next;
                }
                Err(Refusal::NoInterfaceName(_)) => {
                    prop_assert!(Environment::exhausted(&state), "no value for {:?}", command);
                }
                Err(refusal) => {
                    prop_assert!(!allowed, "{:?} was refused: {}", command, refusal);
                    let text = refusal.to_string();
                    prop_assert!(!text.contains('\n') && text.contains("; "), "{}", text);
                }
            }
            model.check(&state);
            if reconcile {
                for change in changes(&reconciled, &state) {
                    host.execute(change);
                }
                host.assert_has(&state);
                reconciled = state.clone();
            }
        }
        for endpoint in state.clone().endpoints.into_keys() {
            state = environment.apply(&state, &Command::Detach(endpoint)).unwrap();
        }
        for network in state.clone().networks.into_keys() {
            state = environment.apply(&state, &Command::RemoveNetwork(network)).unwrap();
        }
        prop_assert_eq!(&state, &State::default());
        for change in changes(&reconciled, &state) {
            host.execute(change);
        }
        prop_assert_eq!(host, Host::default());
    }

    /// The quarantine is a part of what a refused command must not change.
    #[test]
    fn refused_commands_have_no_effect_on_later_ones(
        commands in prop::collection::vec(command(), 1..60)
    ) {
        let mut environment = Environment::new();
        let mut state = State::default();
        for command in &commands {
            let before = format!("{:?}", environment.quarantine);
            match environment.apply(&state, command) {
                Ok(next) => state = next,
                Err(_) => prop_assert_eq!(format!("{:?}", environment.quarantine), before),
            }
        }
    }

    /// A project is created and removed as a whole, beside commands for other objects.
    #[test]
    fn projects_are_applied_and_removed_as_a_whole(
        steps in prop::collection::vec(
            (prop_oneof![command(), project_command()], 0_u64..90, any::<bool>()), 1..60,
        )
    ) {
        let mut environment = Environment::new();
        let (mut state, mut reconciled, mut host) = <(State, State, Host)>::default();
        for (command, seconds, reconcile) in steps {
            if changes_a_part(&command) {
                continue;
            }
            environment.now += Duration::from_secs(seconds);
            let quarantine = format!("{:?}", environment.quarantine);
            let result = environment.apply(&state, &command);
            match (&command, &result) {
                (_, Err(refusal)) => {
                    prop_assert_eq!(format!("{:?}", environment.quarantine), quarantine);
                    let text = refusal.to_string();
                    prop_assert!(!text.contains('\n') && text.contains("; "), "{}", text);
                }
                (Command::ApplyProject(spec), Ok(next)) => {
                    let project = &spec.project.name;
                    prop_assert_eq!(&without(next, project), &state);
                    let of = |names: Vec<&Name>| names.into_iter().cloned().collect::<BTreeSet<_>>();
                    let is_part = |one: &&Name| one.is_part_of(project);
                    let networks = of(next.networks.keys().filter(is_part).collect());
                    prop_assert_eq!(networks, of(spec.networks.iter().map(|one| &one.name).collect()));
                    let endpoints = of(next.endpoints.keys().filter(is_part).collect());
                    let wanted = of(spec.endpoints.iter().map(|one| &one.name).collect());
                    prop_assert_eq!(endpoints, wanted);
                    // Fixed addresses and configured subnets are those of the project.
                    for endpoint in &spec.endpoints {
                        let attachments = &next.endpoints[&endpoint.name].setup.attachments;
                        for (wanted, made) in endpoint.networks.iter().zip(attachments) {
                            let has = |ip: &IpAddr| made.addresses.iter().any(|net| net.addr() == *ip);
                            prop_assert!(wanted.addresses.iter().all(has));
                        }
                    }
                }
                (Command::RemoveProject(project), Ok(next)) => {
                    prop_assert_eq!(next, &without(&state, project));
                }
                _ => {}
            }
            if let Ok(next) = result {
                check_invariants(&next);
                state = next;
            }
            if reconcile {
                for change in changes(&reconciled, &state) {
                    host.execute(change);
                }
                host.assert_has(&state);
                reconciled = state.clone();
            }
        }
    }

    /// Any two states, not only successive ones.
    #[test]
    fn changes_lead_from_any_state_to_any_other(
        one in prop::collection::vec(command(), 1..40),
        other in prop::collection::vec(command(), 1..40),
    ) {
        let (one, other) = (states(&one).pop().unwrap(), states(&other).pop().unwrap());
        let mut host = Host::default();
        for (from, to) in [(&State::default(), &one), (&one, &other), (&other, &one)] {
            for change in changes(from, to) {
                host.execute(change);
            }
            host.assert_has(to);
        }
        prop_assert_eq!(changes(&one, &one.clone()), vec![]);
    }
}

/// `state` without the project `project` and its parts.
fn without(state: &State, project: &Name) -> State {
    let mut state = state.clone();
    state.projects.remove(project);
    state.networks.retain(|name, _| !name.is_part_of(project));
    state.endpoints.retain(|name, _| !name.is_part_of(project));
    state
}

/// Whether `command` changes a part of a project, which the API refuses.
fn changes_a_part(command: &Command) -> bool {
    let name = match command {
        Command::CreateNetwork(network) => &network.name,
        Command::Attach(endpoint) => {
            let networks = endpoint.networks.iter().any(|one| one.network.project().is_some());
            return networks || endpoint.name.project().is_some();
        }
        Command::RemoveNetwork(name) | Command::Detach(name) => name,
        Command::Publish { endpoint, .. } | Command::Relocate { endpoint, .. } => endpoint,
        // It may remove a port of a project.
        Command::Unpublish { .. } => return false,
        Command::ApplyProject(_) | Command::RemoveProject(_) => return false,
        Command::Join(_) | Command::Leave => return false,
    };
    name.project().is_some()
}

fn attach(text: &str, networks: &[&str]) -> AttachSpec {
    AttachSpec {
        name: name(text),
        namespace: format!("/run/netns/{text}").into(),
        networks: networks.iter().map(|network| NetworkAttachment::new(name(network))).collect(),
        hostname: None,
        dns: vec![],
        ports: vec![],
        task: None,
    }
}

/// Applies commands that must not be refused.
fn apply_all(environment: &mut Environment, commands: &[Command]) -> State {
    commands
        .iter()
        .fold(State::default(), |state, command| environment.apply(&state, command).unwrap())
}

#[test]
fn subnets_bridges_and_addresses_are_chosen() {
    let mut environment = Environment::new();
    environment.observed.routes.push(("172.28.0.0/24".parse().unwrap(), "eth0".into()));
    let back = NetworkSpec {
        subnets: vec![("10.77.0.0/24".parse().unwrap(), None)],
        ipv6: true,
        internal: true,
        ..NetworkSpec::new(name("demo/back"))
    };
    let db = AttachSpec {
        networks: vec![NetworkAttachment {
            addresses: vec!["10.77.0.2".parse().unwrap()],
            ..NetworkAttachment::new(name("demo/back"))
        }],
        ..attach("db", &[])
    };
    let state = apply_all(
        &mut environment,
        &[
            Command::CreateNetwork(back),
            Command::CreateNetwork(NetworkSpec::new(name("demo/front"))),
            Command::Attach(db),
            Command::Attach(attach("web", &["demo/back", "demo/front"])),
        ],
    );
    let [back, front] = ["demo/back", "demo/front"].map(|text| &state.networks[&name(text)].setup);
    let subnets: Vec<String> = back.subnets.iter().map(|one| one.subnet.to_string()).collect();
    assert_eq!(subnets, ["10.77.0.0/24", "fd01:203:405::/64"]);
    assert_eq!(front.subnets[0].subnet.to_string(), "172.28.1.0/24", "the first free one");
    assert_eq!((front.mtu, back.internal, front.internal), (1_400, true, false));
    assert_eq!(front.bridge.name.len(), "tg-front-0000".len());
    let web = &state.endpoints[&name("web")].setup.attachments;
    let defaults: Vec<bool> = web.iter().map(|one| one.default_route).collect();
    assert_eq!(defaults, [false, true], "not on the internal network");
    let addresses: Vec<String> =
        web.iter().flat_map(|one| &one.addresses).map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.77.0.3/24", "fd01:203:405::3/64", "172.28.1.2/24"]);
}

#[test]
fn bridge_names_of_all_networks_differ() {
    let mut environment = Environment::without_collisions();
    // 1,000 hashes of 16 bits collide about 7 times.
    let create = |number| {
        Command::CreateNetwork(NetworkSpec::new(name(&format!("project-{number}/default"))))
    };
    let commands: Vec<Command> = (0..1_000).map(create).collect();
    let state = apply_all(&mut environment, &commands);
    unique(state.host_interfaces().map(|interface| &interface.name));
    assert!(state.host_interfaces().all(|interface| interface.name.len() <= 15));
    let refusal = environment.apply(&state, &create(1_000)).unwrap_err();
    assert_eq!(refusal.to_string(), "too many networks: the limit is 1000; remove one first");
}

#[test]
fn number_of_endpoints_networks_and_ports_is_bounded() {
    let mut environment = Environment::without_collisions();
    let network = NetworkSpec {
        subnets: vec![("10.9.0.0/16".parse().unwrap(), None)],
        ..NetworkSpec::new(name("a"))
    };
    let mut state = apply_all(&mut environment, &[Command::CreateNetwork(network)]);
    for number in 0..MAX_ENDPOINTS_OF_NETWORK {
        let command = Command::Attach(attach(&number.to_string(), &["a"]));
        state = environment.apply(&state, &command).unwrap();
    }
    let refusal = environment.apply(&state, &Command::Attach(attach("more", &["a"]))).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "too many endpoints of network a: the limit is 1023; remove one first"
    );

    let ports = |address: &str| (1..=u16::MAX).map(|number| port(address, number, 80)).collect();
    let publish = |ports| Command::Publish { endpoint: name("0"), ports };
    state = environment.apply(&state, &publish(ports("192.0.2.1"))).unwrap();
    assert_eq!(state.ports().count(), MAX_PORTS - 1);
    let refusal = environment.apply(&state, &publish(ports("192.0.2.2"))).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "too many published ports: the limit is 65536; remove one first"
    );
    let last = environment.apply(&state, &publish(vec![port("192.0.2.2", 1, 80)]));
    assert_eq!(last.unwrap().ports().count(), MAX_PORTS);

    let many: Vec<String> = (0..65).map(|number| format!("n{number}")).collect();
    let spec = attach("wide", &many.iter().map(String::as_str).collect::<Vec<_>>());
    let refusal = environment.apply(&state, &Command::Attach(spec)).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "too many networks of endpoint wide: the limit is 64; remove one first"
    );
}

#[test]
fn refusals_name_the_object_and_the_remedy() {
    let mut environment = Environment::new();
    let net = |text: &str| (text.parse::<IpNet>().unwrap(), None);
    let with_subnet = |text: &str, subnet: &str| {
        Command::CreateNetwork(NetworkSpec {
            subnets: vec![net(subnet)],
            ..NetworkSpec::new(name(text))
        })
    };
    let with_address = |address: &str| {
        let networks = vec![NetworkAttachment {
            addresses: vec![address.parse().unwrap()],
            ..NetworkAttachment::new(name("a"))
        }];
        Command::Attach(AttachSpec { networks, ..attach("new", &[]) })
    };
    let state = apply_all(
        &mut environment,
        &[
            with_subnet("a", "10.9.0.0/29"),
            Command::Attach(AttachSpec {
                ports: vec![port("0.0.0.0", 80, 80)],
                ..attach("p/web", &["a"])
            }),
        ],
    );
    let moved = |text: &str| AttachSpec { name: name(text), ..attach("p/web", &["a"]) };
    for (command, expected) in [
        (
            with_subnet("b", "10.9.0.0/24"),
            "network b: subnet 10.9.0.0/24 overlaps 10.9.0.0/29 of network a; choose another subnet",
        ),
        (
            with_subnet("b", "192.168.0.0/16"),
            "network b: subnet 192.168.0.0/16 overlaps 192.168.7.0/24, which the host reaches \
             through eth0; choose another subnet",
        ),
        (
            with_subnet("b", "fd09::/64"),
            "network b: fd09::/64 is an IPv6 subnet; enable IPv6 on the network",
        ),
        (
            Command::CreateNetwork(NetworkSpec {
                bridge: Some("eth0".into()),
                ..NetworkSpec::new(name("b"))
            }),
            "network b: bridge name eth0 is used by another interface of the host; choose another \
             name",
        ),
        (Command::RemoveNetwork(name("a")), "network a is in use by endpoint p/web; detach first"),
        (
            with_address("10.9.0.2"),
            "endpoint new: address 10.9.0.2 on network a is in use by endpoint p/web; choose another \
             address",
        ),
        (
            with_address("10.9.0.1"),
            "endpoint new: address 10.9.0.1 on network a is in use by the gateway; choose another \
             address",
        ),
        (
            with_address("fd09::1"),
            "endpoint new: network a has no IPv6 subnet for address fd09::1; remove the address, or \
             create the network with one",
        ),
        (
            Command::Attach(moved("new")),
            "endpoint new: namespace /run/netns/p/web is already attached as endpoint p/web; detach \
             that endpoint first",
        ),
        (
            Command::Attach(AttachSpec {
                ports: vec![port("127.0.0.1", 80, 80)],
                ..attach("new", &["a"])
            }),
            "endpoint new: port 80/tcp on 127.0.0.1 is already published by endpoint p/web; choose \
             another host port",
        ),
        (Command::Detach(name("new")), "endpoint new does not exist; attach it first"),
    ] {
        let refusal = environment.apply(&state, &command).unwrap_err();
        assert_eq!(refusal.to_string(), expected);
    }
}

#[test]
fn a_moved_endpoint_keeps_its_ports_open_unless_namespaces_are_exchanged() {
    let mut environment = Environment::new();
    let with_port = |text: &str, number| AttachSpec {
        ports: vec![port("0.0.0.0", number, 80)],
        ..attach(text, &["a"])
    };
    let old = apply_all(
        &mut environment,
        &[
            Command::CreateNetwork(NetworkSpec::new(name("a"))),
            Command::Attach(with_port("one", 1)),
            Command::Attach(with_port("two", 2)),
        ],
    );
    let relocate = |endpoint: &str, namespace: &str| Command::Relocate {
        endpoint: name(endpoint),
        namespace: namespace.into(),
    };
    let new = environment.apply(&old, &relocate("one", "/proc/7/ns/net")).unwrap();
    assert_eq!(
        changes(&old, &new),
        [Change::MoveEndpoint {
            old: Arc::clone(&old.endpoints[&name("one")]),
            new: Arc::clone(&new.endpoints[&name("one")]),
        }]
    );
    let new = environment.apply(&new, &relocate("two", "/run/netns/one")).unwrap();
    let new = environment.apply(&new, &relocate("one", "/run/netns/two")).unwrap();
    let steps = changes(&old, &new);
    assert_eq!(steps.len(), 8, "both are removed and added, with their ports");
    assert!(!steps.iter().any(|step| matches!(step, Change::MoveEndpoint { .. })));
}

/// A network that was removed and created again, while the endpoint has the same value.
#[test]
fn endpoints_of_a_replaced_network_are_removed_and_added() {
    let mut environment = Environment::new();
    let old = apply_all(
        &mut environment,
        &[
            Command::CreateNetwork(NetworkSpec::new(name("a"))),
            Command::CreateNetwork(NetworkSpec::new(name("b"))),
            Command::Attach(AttachSpec {
                ports: vec![port("0.0.0.0", 1, 80)],
                ..attach("one", &["a", "b"])
            }),
            Command::Attach(attach("two", &["b"])),
        ],
    );
    let mut new = old.clone();
    Arc::make_mut(new.networks.get_mut(&name("a")).unwrap()).setup.mtu = 1_280;
    let one = Arc::clone(&old.endpoints[&name("one")]);
    let port = one.ports[0];
    let expected = [
        Change::ClosePort { endpoint: Arc::clone(&one), port },
        Change::RemoveEndpoint(Arc::clone(&one)),
        Change::RemoveNetwork(Arc::clone(&old.networks[&name("a")])),
        Change::AddNetwork(Arc::clone(&new.networks[&name("a")])),
        Change::AddEndpoint(Arc::clone(&one)),
        Change::OpenPort { endpoint: one, port },
    ];
    assert_eq!(changes(&old, &new), expected);

    // Together with another namespace and without the port.
    let endpoint = Arc::make_mut(new.endpoints.get_mut(&name("one")).unwrap());
    endpoint.namespace = "/run/netns/new".into();
    endpoint.ports.clear();
    let steps = changes(&old, &new);
    assert_eq!(steps[..4], expected[..4]);
    assert_eq!(steps[4..], [Change::AddEndpoint(Arc::clone(&new.endpoints[&name("one")]))]);
}

fn project(text: &str, networks: &[NetworkSpec], endpoints: &[AttachSpec]) -> ProjectSpec {
    let service = |endpoint: &AttachSpec| Service {
        name: endpoint.name.name().to_owned(),
        command: vec!["true".to_owned()],
        environment: BTreeMap::new(),
        working_dir: "/".into(),
        dns_search: vec![],
        dns_options: vec![],
        restart: Restart::No,
        depends_on: vec![],
    };
    ProjectSpec {
        project: Project {
            name: name(text),
            file: None,
            grace: Duration::from_secs(10),
            services: endpoints.iter().map(service).collect(),
        },
        networks: networks.to_vec(),
        endpoints: endpoints.to_vec(),
    }
}

#[test]
fn a_project_is_created_and_removed_with_all_its_parts() {
    let mut environment = Environment::new();
    let before = apply_all(
        &mut environment,
        &[
            Command::CreateNetwork(NetworkSpec::new(name("front"))),
            Command::Attach(attach("web", &["front"])),
        ],
    );
    let fixed = AttachSpec {
        networks: vec![NetworkAttachment {
            addresses: vec!["10.77.0.2".parse().unwrap()],
            ..NetworkAttachment::new(name("shop/back"))
        }],
        ..attach("shop/db", &[])
    };
    let back = NetworkSpec {
        // The first subnet that would be chosen for the other network.
        subnets: vec![("10.77.0.0/24".parse().unwrap(), None)],
        ..NetworkSpec::new(name("shop/back"))
    };
    let endpoints = [attach("shop/web", &["shop/back", "shop/front"]), fixed];
    let spec = project("shop", &[NetworkSpec::new(name("shop/front")), back], &endpoints);
    let up = environment.apply(&before, &Command::ApplyProject(spec.clone())).unwrap();
    let web = &up.endpoints[&name("shop/web")];
    assert_eq!(
        web.addresses_on(&name("shop/back")).next(),
        Some("10.77.0.3".parse().unwrap()),
        "10.77.0.2 is a fixed address of another endpoint"
    );
    assert_eq!((up.networks.len(), up.endpoints.len(), up.projects.len()), (3, 3, 1));
    assert_eq!(
        environment.apply(&up, &Command::ApplyProject(spec)),
        Err(Refusal::ProjectExists(name("shop")))
    );
    let down = environment.apply(&up, &Command::RemoveProject(name("shop"))).unwrap();
    assert_eq!(down, before);
    assert_eq!(
        environment.apply(&down, &Command::RemoveProject(name("shop"))),
        Err(Refusal::UnknownProject(name("shop")))
    );
}

#[test]
fn a_refused_project_changes_nothing() {
    let mut environment = Environment::new();
    let before =
        apply_all(&mut environment, &[Command::CreateNetwork(NetworkSpec::new(name("a")))]);
    let network = NetworkSpec::new(name("shop/front"));
    let web = attach("shop/web", &["shop/front"]);
    let quarantine = format!("{:?}", environment.quarantine);
    for (spec, expected) in [
        (
            project("shop", std::slice::from_ref(&network), &[web.clone(), web.clone()]),
            "endpoint shop/web already exists",
        ),
        (project("shop", &[NetworkSpec::new(name("b"))], &[]), "network b is not a part of it"),
        (
            project("shop", std::slice::from_ref(&network), &[attach("web", &["shop/front"])]),
            "endpoint web is not a part of it",
        ),
        (
            project("shop", std::slice::from_ref(&network), &[attach("shop/web", &["a"])]),
            "network a is not a part of it",
        ),
        (project("shop/web", &[], &[]), "name shop/web is not a part of it"),
        (
            ProjectSpec {
                endpoints: vec![],
                ..project("shop", std::slice::from_ref(&network), std::slice::from_ref(&web))
            },
            "service \"web\" is not a part of it",
        ),
    ] {
        let refusal = environment.apply(&before, &Command::ApplyProject(spec)).unwrap_err();
        assert!(refusal.to_string().contains(expected), "{refusal}");
        assert_eq!(format!("{:?}", environment.quarantine), quarantine, "{expected}");
    }
}

#[test]
fn the_next_owner_of_the_same_addresses_has_the_same_mac_address() {
    let mut environment = Environment::without_collisions();
    let network = NetworkSpec {
        subnets: vec![
            ("10.77.0.0/24".parse().unwrap(), None),
            ("fd77::/64".parse().unwrap(), None),
        ],
        ipv6: true,
        ..NetworkSpec::new(name("a"))
    };
    let state = apply_all(&mut environment, &[Command::CreateNetwork(network)]);
    let mut mac = |text: &str, addresses: [&str; 2]| {
        let at = NetworkAttachment {
            addresses: addresses.map(|address| address.parse().unwrap()).to_vec(),
            ..NetworkAttachment::new(name("a"))
        };
        let spec = AttachSpec { networks: vec![at], ..attach(text, &[]) };
        let state = environment.apply(&state, &Command::Attach(spec)).unwrap();
        state.endpoints[&name(text)].setup.attachments[0].inside.mac
    };
    let first = mac("first", ["10.77.0.2", "fd77::2"]);
    assert_eq!(mac("second", ["10.77.0.2", "fd77::2"]), first);
    assert_ne!(mac("of-one", ["10.77.0.2", "fd77::3"]), first);
    assert_ne!(mac("of-the-other", ["10.77.0.3", "fd77::2"]), first);
}

fn overlay(text: &str, subnet: &str, internal: bool) -> NetworkSpec {
    NetworkSpec {
        subnets: vec![(subnet.parse().unwrap(), None)],
        mtu: Some(1_350),
        overlay: Some(Overlay { vni: 9, internal }),
        ..NetworkSpec::new(name(text))
    }
}

#[test]
fn endpoints_of_overlay_networks_have_egress_on_a_network_of_the_host() {
    let mut environment = Environment::without_collisions();
    let commands = [
        Command::CreateNetwork(NetworkSpec::new(name("local"))),
        Command::CreateNetwork(overlay("hidden", "10.90.0.0/24", true)),
    ];
    let state = apply_all(&mut environment, &commands);
    let gateway = name(crate::MESH_GATEWAY);
    assert!(!state.networks().contains_key(&gateway), "no overlay network has egress");
    let wide = Command::CreateNetwork(overlay("wide", "10.91.0.0/24", false));
    let mut state = environment.apply(&state, &wide).unwrap();
    let network = &state.networks()[&gateway];
    assert!(!network.setup.inter_container && !network.setup.internal && !network.has_names);
    for (endpoint, networks, expected) in [
        ("a", &["wide"][..], &["wide", crate::MESH_GATEWAY][..]),
        ("b", &["wide", "hidden"], &["wide", "hidden", crate::MESH_GATEWAY]),
        ("c", &["hidden"], &["hidden"]),
        ("d", &["wide", "local"], &["wide", "local"]),
    ] {
        state = environment.apply(&state, &Command::Attach(attach(endpoint, networks))).unwrap();
        let setup = &state.endpoints()[&name(endpoint)].setup;
        let found: Vec<_> = setup.attachments.iter().map(|one| one.network.as_str()).collect();
        assert_eq!(found, expected, "{endpoint}");
        let route = setup.attachments.iter().find(|one| one.default_route);
        let expected = expected.iter().find(|one| **one != "wide" && **one != "hidden");
        assert_eq!(route.map(|one| one.network.as_str()), expected.copied(), "{endpoint}");
    }
    for refused in [
        Command::CreateNetwork(NetworkSpec::new(gateway.clone())),
        Command::RemoveNetwork(gateway.clone()),
    ] {
        let refusal = environment.apply(&state, &refused).unwrap_err();
        assert_eq!(refusal, Refusal::ReservedName(gateway.clone()));
    }
}

#[test]
fn a_host_leaves_its_cluster_once_no_endpoint_uses_an_overlay_network() {
    let mut environment = Environment::without_collisions();
    let membership = Membership {
        host: name("a"),
        advertise: "192.0.2.1".parse().unwrap(),
        etcd: EtcdAccess::default(),
    };
    let join = Command::Join(membership.clone());
    let refusal = environment.apply(&State::default(), &Command::Leave).unwrap_err();
    assert_eq!(refusal, Refusal::NotInCluster);
    let local = Command::CreateNetwork(NetworkSpec::new(name("local")));
    let wide = Command::CreateNetwork(overlay("wide", "10.91.0.0/24", false));
    let web = Command::Attach(attach("web", &["wide"]));
    let state = apply_all(&mut environment, &[join.clone(), local, wide, web]);
    assert_eq!(state.membership().map(|one| &**one), Some(&membership));
    let refusal = environment.apply(&state, &join).unwrap_err();
    assert_eq!(refusal, Refusal::InCluster { host: name("a") });
    let refusal = environment.apply(&state, &Command::Leave).unwrap_err();
    assert_eq!(refusal.to_string(), "network wide is in use by endpoint web; detach first");
    let state = environment.apply(&state, &Command::Detach(name("web"))).unwrap();
    let state = environment.apply(&state, &Command::Leave).unwrap();
    let left: Vec<_> = state.networks().keys().map(ToString::to_string).collect();
    assert_eq!((left, state.membership()), (vec!["local".to_owned()], None));
}
