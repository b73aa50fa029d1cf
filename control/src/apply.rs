//! The transition from a state and a command to the next state. Pure: the observed host, time and
//! randomness are arguments.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::quarantine::Quarantine;
use crate::{
    AttachSpec, Command, Endpoint, Membership, Name, Network, NetworkAttachment, NetworkSpec,
    ProjectSpec, PublishedPort, Refusal, State,
};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tidegate_model::validity::{
    address_problem, is_alias, is_host_name, is_interface_name, subnet_problem, subnets_overlap,
};
use tidegate_model::{MacAddress, Protocol, registry};
use tidegate_netsetup::{
    self as netsetup, Attachment, Interface, Observed, Place, Pools, Subnet, gateway,
};

/// Maximum number of networks.
pub const MAX_NETWORKS: usize = 1_000;

/// Maximum number of endpoints.
pub const MAX_ENDPOINTS: usize = 10_000;

/// Maximum number of projects.
pub const MAX_PROJECTS: usize = 1_000;

/// Maximum number of networks of an endpoint.
pub const MAX_NETWORKS_OF_ENDPOINT: usize = 64;

/// Maximum number of endpoints on a network: the ports of a bridge (`BR_MAX_PORTS`, of which port 0
/// is reserved; `find_portno` in net/bridge/br_if.c).
pub const MAX_ENDPOINTS_OF_NETWORK: usize = 1_023;

/// Maximum number of published ports, of all endpoints.
pub const MAX_PORTS: usize = 65_536;

/// Maximum number of aliases of an endpoint on a network.
pub const MAX_ALIASES: usize = 64;

/// Maximum number of upstream DNS servers of a network.
pub const MAX_DNS_SERVERS: usize = 16;

/// The network on which endpoints of overlay networks have egress. Endpoints cannot reach each
/// other on it, and have no names.
pub const MESH_GATEWAY: &str = "mesh-gateway";

/// The first part of the names of sandboxes ([`Name::sandbox_on`]).
pub const MESH_SANDBOX: &str = "mesh-sandbox";

/// Maximum length of a path in bytes (`PATH_MAX` less the terminating NUL).
const MAX_PATH: usize = 4_095;

/// MTU of a network in bytes, if the host has no default route to take it from.
const DEFAULT_MTU: u32 = 1_500;

/// The range of an MTU in the kernel (`ETH_MIN_MTU` to `ETH_MAX_MTU`).
const MTU: std::ops::RangeInclusive<u32> = 68..=65_535;

/// The minimum MTU of IPv6 (RFC 8200, section 5).
const MTU_V6: u32 = 1_280;

/// Number of attempts to find an unused name or MAC address.
const ATTEMPTS: u32 = 100;

/// Inputs of [`apply`] from outside the state.
pub struct Surroundings<'a> {
    /// Routes, links and MTU of the host. Observed after the last state was applied: links and
    /// routes of removed networks would still count as foreign.
    pub observed: &'a Observed,
    /// Identifies this host: the global ID of its unique local IPv6 prefix (RFC 4193, section 3.2).
    pub host_id: [u8; 5],
    /// Random bytes for MAC addresses and veth names.
    pub random: &'a mut dyn FnMut() -> [u8; 6],
    /// Current time, for the quarantine of addresses.
    pub now: Instant,
    /// Recently released addresses.
    pub quarantine: &'a mut Quarantine,
}

/// Returns the state after `command`. A refused command changes nothing, including the quarantine.
///
/// Takes O(n) time in the number of endpoints and published ports.
///
/// # Errors
/// [`Refusal`].
pub fn apply(
    state: &State,
    command: &Command,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    match command {
        Command::CreateNetwork(spec) => create_network(state, spec, with),
        Command::RemoveNetwork(name) => remove_network(state, name, with),
        Command::Attach(spec) => attach(state, spec, &BTreeSet::new(), with),
        Command::Detach(name) => detach(state, name, with),
        Command::Publish { endpoint, ports } => publish(state, endpoint, ports),
        Command::Unpublish { address, port, protocol } => {
            unpublish(state, *address, *port, *protocol)
        }
        Command::Relocate { endpoint, namespace } => relocate(state, endpoint, namespace),
        Command::ApplyProject(spec) => apply_project(state, spec, with),
        Command::RemoveProject(name) => remove_project(state, name, with),
        Command::Join(membership) => join(state, membership),
        Command::Leave => leave(state),
    }
}

fn join(state: &State, membership: &Membership) -> Result<State, Refusal> {
    if let Some(current) = state.membership() {
        return Err(Refusal::InCluster { host: current.host.clone() });
    }
    let mut state = state.clone();
    state.mesh.insert(membership.host.clone(), Arc::new(membership.clone()));
    Ok(state)
}

fn leave(state: &State) -> Result<State, Refusal> {
    if state.mesh.is_empty() {
        return Err(Refusal::NotInCluster);
    }
    let overlays = state.networks.values().filter(|network| network.setup.overlay.is_some());
    let gateway = state.networks.values().filter(|network| network.name.is_mesh_gateway());
    for network in overlays.chain(gateway) {
        let endpoints: Vec<Name> =
            state.members(&network.name).map(|endpoint| endpoint.name.clone()).collect();
        if !endpoints.is_empty() {
            return Err(Refusal::NetworkInUse { network: network.name.clone(), endpoints });
        }
    }
    let mut state = state.clone();
    state
        .networks
        .retain(|name, network| network.setup.overlay.is_none() && !name.is_mesh_gateway());
    state.mesh.clear();
    Ok(state)
}

fn apply_project(
    state: &State,
    spec: &ProjectSpec,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    let name = &spec.project.name;
    if state.projects.contains_key(name) {
        return Err(Refusal::ProjectExists(name.clone()));
    }
    limit("projects", state.projects.len() + 1, MAX_PROJECTS)?;
    check_parts(spec)?;
    let quarantine = with.quarantine.clone();
    let parts = add_parts(state, spec, with);
    if parts.is_err() {
        // A refused command changes nothing.
        *with.quarantine = quarantine;
    }
    let mut state = parts?;
    state.projects.insert(name.clone(), Arc::new(spec.project.clone()));
    Ok(state)
}

/// Adds the networks and endpoints of a project.
fn add_parts(
    state: &State,
    spec: &ProjectSpec,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    // No endpoint is assigned a fixed address of a later one.
    let attachments = spec.endpoints.iter().flat_map(|endpoint| &endpoint.networks);
    let fixed: BTreeSet<IpAddr> =
        attachments.flat_map(|one| one.addresses.iter().copied()).collect();
    let mut state = state.clone();
    // Chosen subnets must not overlap configured ones of later networks.
    let (configured, chosen): (Vec<_>, Vec<_>) =
        spec.networks.iter().partition(|network| !network.subnets.is_empty());
    for network in configured.into_iter().chain(chosen) {
        state = create_network(&state, network, with)?;
    }
    for endpoint in &spec.endpoints {
        state = attach(&state, endpoint, &fixed, with)?;
    }
    Ok(state)
}

/// Checks that all parts of a project have its name, and that each service has an endpoint.
fn check_parts(spec: &ProjectSpec) -> Result<(), Refusal> {
    let project = &spec.project.name;
    let foreign = |part: String| Refusal::ForeignPart { project: project.clone(), part };
    if project.project().is_some() || project.name() == MESH_SANDBOX {
        return Err(foreign(format!("name {project}")));
    }
    let is_part = |part: &Name| part.is_part_of(project);
    if let Some(network) = spec.networks.iter().find(|network| !is_part(&network.name)) {
        return Err(foreign(format!("network {}", network.name)));
    }
    for endpoint in &spec.endpoints {
        if !is_part(&endpoint.name) {
            return Err(foreign(format!("endpoint {}", endpoint.name)));
        }
        if let Some(one) = endpoint.networks.iter().find(|one| !is_part(&one.network)) {
            return Err(foreign(format!("network {}", one.network)));
        }
    }
    let has_endpoint =
        |service: &str| spec.endpoints.iter().any(|endpoint| endpoint.name.name() == service);
    match spec.project.services.iter().find(|service| !has_endpoint(&service.name)) {
        Some(service) => Err(foreign(format!("service {:?}", service.name))),
        None => Ok(()),
    }
}

fn remove_project(
    state: &State,
    name: &Name,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    if !state.projects.contains_key(name) {
        return Err(Refusal::UnknownProject(name.clone()));
    }
    let is_part = |part: &&Name| part.is_part_of(name);
    let mut after = state.clone();
    for endpoint in state.endpoints.keys().filter(is_part) {
        after = detach(&after, endpoint, with)?;
    }
    for network in state.networks.keys().filter(is_part) {
        after = remove_network(&after, network, with)?;
    }
    after.projects.remove(name);
    Ok(after)
}

fn create_network(
    state: &State,
    spec: &NetworkSpec,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    if spec.name.is_mesh_gateway() {
        return Err(Refusal::ReservedName(spec.name.clone()));
    }
    // The first overlay network with egress brings the network on which its endpoints have it.
    let gateway = Name::mesh_gateway();
    let has_egress = spec.overlay.is_some_and(|overlay| !overlay.internal);
    let with_gateway = if has_egress && !state.networks.contains_key(&gateway) {
        let gateway = NetworkSpec {
            ipv6: true,
            inter_container: false,
            has_names: false,
            ..NetworkSpec::new(gateway)
        };
        Some(add_network(state, &gateway, with)?)
    } else {
        None
    };
    add_network(with_gateway.as_ref().unwrap_or(state), spec, with)
}

fn add_network(
    state: &State,
    spec: &NetworkSpec,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    let name = &spec.name;
    if state.networks.contains_key(name) {
        return Err(Refusal::NetworkExists(name.clone()));
    }
    limit("networks", state.networks.len() + 1, MAX_NETWORKS)?;
    limit_of("DNS servers", "network", name, spec.dns.len(), MAX_DNS_SERVERS)?;
    let subnets = subnets(state, spec, with)?;
    let lowest = if spec.ipv6 { MTU_V6 } else { *MTU.start() };
    if let Some(mtu) = spec.mtu.filter(|mtu| !(lowest..=*MTU.end()).contains(mtu)) {
        return Err(Refusal::InvalidMtu { network: name.clone(), mtu, lowest });
    }
    // A default route with a smaller MTU than IPv6 requires cannot carry IPv6 anyway.
    let default_mtu = with.observed.default_mtu.unwrap_or(DEFAULT_MTU).clamp(lowest, *MTU.end());
    let bridge = Interface {
        name: bridge(state, spec, with.observed)?,
        mac: unused_mac(state, &mut Vec::new(), name, with.random)?,
    };
    let network = Network {
        name: name.clone(),
        setup: netsetup::Network {
            name: name.to_string(),
            bridge,
            subnets,
            // An overlay network has no egress at its bridge.
            internal: spec.internal || spec.overlay.is_some(),
            inter_container: spec.inter_container,
            mtu: spec.mtu.unwrap_or(default_mtu),
            overlay: spec.overlay,
        },
        dns: spec.dns.clone(),
        names_at_gateway: spec.names_at_gateway,
        has_names: spec.has_names,
    };
    let mut state = state.clone();
    state.networks.insert(name.clone(), Arc::new(network));
    Ok(state)
}

/// Checks the subnets of a new network, and chooses missing ones.
fn subnets(
    state: &State,
    spec: &NetworkSpec,
    with: &Surroundings<'_>,
) -> Result<Vec<Subnet>, Refusal> {
    let network = || spec.name.clone();
    let mut subnets: Vec<Subnet> = Vec::new();
    for &(subnet, configured) in &spec.subnets {
        if let Some(problem) = subnet_problem(&subnet) {
            return Err(Refusal::InvalidSubnet { network: network(), subnet, problem });
        }
        if matches!(subnet, IpNet::V6(_)) && !spec.ipv6 {
            return Err(Refusal::Ipv6Disabled { network: network(), subnet });
        }
        let gateway = configured.unwrap_or_else(|| gateway(subnet));
        if let Some(problem) = address_problem(gateway, &subnet) {
            return Err(Refusal::InvalidGateway { network: network(), gateway, problem });
        }
        let same_family = |other: &&Subnet| other.gateway.is_ipv4() == gateway.is_ipv4();
        if let Some(other) = subnets.iter().find(same_family) {
            return Err(Refusal::TwoSubnets { network: network(), subnet, other: other.subnet });
        }
        check_overlap(state, spec, subnet, with.observed)?;
        subnets.push(Subnet { subnet, gateway });
    }
    let pools = Pools::usual(with.host_id);
    for v6 in [false, true] {
        if subnets.iter().any(|subnet| subnet.gateway.is_ipv6() == v6) || (v6 && !spec.ipv6) {
            continue;
        }
        let others = state.networks.values().flat_map(|network| &network.setup.subnets);
        let in_use: Vec<IpNet> = routes(with.observed)
            .map(|(route, _)| *route)
            .chain(others.map(|other| other.subnet))
            .collect();
        let subnet = pools
            .obtain(v6, &in_use)
            .map_err(|source| Refusal::NoSubnet { network: network(), source })?;
        subnets.push(Subnet { subnet, gateway: gateway(subnet) });
    }
    subnets.sort_by_key(|subnet| subnet.gateway.is_ipv6());
    Ok(subnets)
}

fn check_overlap(
    state: &State,
    spec: &NetworkSpec,
    subnet: IpNet,
    observed: &Observed,
) -> Result<(), Refusal> {
    for other in state.networks.values() {
        if let Some(taken) =
            other.setup.subnets.iter().find(|one| subnets_overlap(&one.subnet, &subnet))
        {
            return Err(Refusal::SubnetsOverlap {
                network: spec.name.clone(),
                subnet,
                other_network: other.name.clone(),
                other: taken.subnet,
            });
        }
    }
    match routes(observed).find(|(route, _)| subnets_overlap(route, &subnet)) {
        Some((route, link)) => Err(Refusal::RouteOverlaps {
            network: spec.name.clone(),
            subnet,
            route: *route,
            link: link.clone(),
        }),
        None => Ok(()),
    }
}

/// Returns the routes and addresses of the host that a subnet must not overlap. Those of networks
/// of the state are among them, and overlap the subnets of the state as well.
fn routes(observed: &Observed) -> impl Iterator<Item = &(IpNet, String)> {
    observed.routes.iter().filter(|(net, _)| !is_default(net))
}

/// Returns the configured name of the bridge, or derives it from the name of the network.
fn bridge(state: &State, spec: &NetworkSpec, observed: &Observed) -> Result<String, Refusal> {
    let network = || spec.name.clone();
    if let Some(bridge) = &spec.bridge {
        if !is_interface_name(bridge) {
            return Err(Refusal::InvalidBridge { network: network(), bridge: bridge.clone() });
        }
        return match interface_holder(state, observed, bridge) {
            Some(holder) => {
                Err(Refusal::BridgeTaken { network: network(), bridge: bridge.clone(), holder })
            }
            None => Ok(bridge.clone()),
        };
    }
    // Four digits of a hash are not unique among 1,000 networks.
    let mut candidates = (0..ATTEMPTS).map(|attempt| bridge_name(&spec.name, attempt));
    candidates
        .find(|candidate| interface_holder(state, observed, candidate).is_none())
        .ok_or_else(|| Refusal::NoInterfaceName(network()))
}

/// Returns the holder of an interface name on the host.
fn interface_holder(state: &State, observed: &Observed, interface: &str) -> Option<String> {
    let named = |one: &Interface| one.name == interface;
    if let Some(network) = state.networks.values().find(|one| named(&one.setup.bridge)) {
        return Some(format!("network {}", network.name));
    }
    if let Some(endpoint) = state
        .endpoints
        .values()
        .find(|one| one.setup.attachments.iter().any(|attachment| named(&attachment.host_end)))
    {
        return Some(format!("endpoint {}", endpoint.name));
    }
    let links = observed.links.get(&Place::Host)?;
    links.contains_key(interface).then(|| "another interface of the host".to_owned())
}

/// Returns the bridge name. It stays the same across restarts.
fn bridge_name(network: &Name, attempt: u32) -> String {
    let mut text = network.to_string();
    if attempt > 0 {
        // A space is not part of a name, so no other network has this text.
        let _ = write!(text, " {attempt}");
    }
    registry::bridge_name(network.name(), &text)
}

/// Returns six bytes that depend on addresses of a network.
fn mac_of(network: &Name, addresses: impl Iterator<Item = IpAddr>) -> [u8; 6] {
    let mut text = network.to_string();
    for address in addresses {
        // Writing to a string does not fail.
        let _ = write!(text, " {address}");
    }
    let hash = registry::folded_hash(text.as_bytes());
    let [.., a, b, c, d, e, f] = hash.to_be_bytes();
    [a, b, c, d, e, f]
}

/// Returns a random MAC address that is neither in the state nor in `new`, and adds it to `new`.
fn unused_mac(
    state: &State,
    new: &mut Vec<MacAddress>,
    object: &Name,
    random: &mut dyn FnMut() -> [u8; 6],
) -> Result<MacAddress, Refusal> {
    for _ in 0..ATTEMPTS {
        let mac = MacAddress::local(random());
        if !state.networks.values().any(|network| network.setup.bridge.mac == mac)
            && !state.attachments().any(|one| one.host_end.mac == mac || one.inside.mac == mac)
            && !new.contains(&mac)
        {
            new.push(mac);
            return Ok(mac);
        }
    }
    Err(Refusal::NoInterfaceName(object.clone()))
}

fn unused_veth_name(
    state: &State,
    new: &[Attachment],
    object: &Name,
    with: &mut Surroundings<'_>,
) -> Result<String, Refusal> {
    let links = with.observed.links.get(&Place::Host);
    for _ in 0..ATTEMPTS {
        let name = registry::veth_name((with.random)());
        if !state.host_interfaces().any(|interface| interface.name == name)
            && !new.iter().any(|attachment| attachment.host_end.name == name)
            && !links.is_some_and(|links| links.contains_key(&name))
        {
            return Ok(name);
        }
    }
    Err(Refusal::NoInterfaceName(object.clone()))
}

fn remove_network(
    state: &State,
    name: &Name,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    let network = state.networks.get(name).ok_or_else(|| Refusal::UnknownNetwork(name.clone()))?;
    if name.is_mesh_gateway() {
        return Err(Refusal::ReservedName(name.clone()));
    }
    let endpoints: Vec<Name> = state.members(name).map(|endpoint| endpoint.name.clone()).collect();
    if !endpoints.is_empty() {
        return Err(Refusal::NetworkInUse { network: name.clone(), endpoints });
    }
    for subnet in &network.setup.subnets {
        with.quarantine.forget(subnet.subnet);
    }
    let mut state = state.clone();
    state.networks.remove(name);
    Ok(state)
}

/// An address for a new endpoint.
struct Assigned {
    subnet: IpNet,
    address: IpAddr,
    /// The address was chosen, not fixed.
    chosen: bool,
}

/// `reserved` are addresses that are not chosen.
fn attach(
    state: &State,
    spec: &AttachSpec,
    reserved: &BTreeSet<IpAddr>,
    with: &mut Surroundings<'_>,
) -> Result<State, Refusal> {
    let name = &spec.name;
    if state.endpoints.contains_key(name) {
        return Err(Refusal::EndpointExists(name.clone()));
    }
    limit("endpoints", state.endpoints.len() + 1, MAX_ENDPOINTS)?;
    if spec.networks.is_empty() {
        return Err(Refusal::NoNetwork(name.clone()));
    }
    limit_of("networks", "endpoint", name, spec.networks.len(), MAX_NETWORKS_OF_ENDPOINT)?;
    limit_of("DNS servers", "endpoint", name, spec.dns.len(), MAX_DNS_SERVERS)?;
    if let Some(hostname) = spec.hostname.as_ref().filter(|hostname| !is_host_name(hostname)) {
        let hostname = hostname.clone();
        return Err(Refusal::InvalidHostname { endpoint: name.clone(), hostname });
    }
    let namespace = check_namespace(state, name, &spec.namespace)?;
    let ports = check_ports(state, name, &spec.ports)?;

    let mut aliases = BTreeMap::new();
    let mut networks = Vec::new();
    let gateway = mesh_gateway(state, spec);
    for wanted in spec.networks.iter().chain(&gateway) {
        let network = state
            .networks
            .get(&wanted.network)
            .ok_or_else(|| Refusal::UnknownNetwork(wanted.network.clone()))?;
        check_aliases(name, wanted)?;
        if aliases.insert(wanted.network.clone(), wanted.aliases.clone()).is_some() {
            let network = wanted.network.clone();
            return Err(Refusal::NetworkTwice { endpoint: name.clone(), network });
        }
        networks.push((wanted, &**network));
    }
    let egress = networks.iter().position(|(_, network)| !network.setup.internal);
    let (mut attachments, mut assigned, mut macs) = (Vec::new(), Vec::new(), Vec::new());
    for (number, (wanted, network)) in networks.into_iter().enumerate() {
        let addresses = addresses(state, name, wanted, network, reserved, with)?;
        let host_end = Interface {
            name: unused_veth_name(state, &attachments, name, with)?,
            mac: unused_mac(state, &mut macs, name, with.random)?,
        };
        // The next owner of the same addresses has the same MAC address. Neighbours have it in
        // their caches, and would use that of the previous owner for half a minute. An owner of
        // only one of them has another one: it must not receive the packets to the others.
        let of_addresses = addresses.iter().map(|one| one.address);
        let mut of_addresses = Some(mac_of(&wanted.network, of_addresses));
        let mut candidates = || of_addresses.take().unwrap_or_else(|| (with.random)());
        let inside = Interface {
            name: format!("eth{number}"),
            mac: unused_mac(state, &mut macs, name, &mut candidates)?,
        };
        attachments.push(Attachment {
            network: wanted.network.to_string(),
            host_end,
            inside,
            addresses: addresses
                .iter()
                .filter_map(|one| IpNet::new(one.address, one.subnet.prefix_len()).ok())
                .collect(),
            default_route: egress == Some(number),
            any_address: wanted.any_source,
        });
        assigned.extend(addresses);
    }
    for one in assigned {
        with.quarantine.assigned(one.subnet, one.address, one.chosen);
    }
    let endpoint = Endpoint {
        name: name.clone(),
        setup: netsetup::Endpoint { name: name.to_string(), attachments },
        aliases,
        hostname: spec.hostname.clone(),
        dns: spec.dns.clone(),
        namespace,
        ports,
        task: spec.task.clone(),
    };
    let mut state = state.clone();
    state.endpoints.insert(name.clone(), Arc::new(endpoint));
    Ok(state)
}

/// The attachment for the egress of an endpoint of overlay networks, unless another of its networks
/// has egress.
fn mesh_gateway(state: &State, spec: &AttachSpec) -> Option<NetworkAttachment> {
    let networks = spec.networks.iter().filter_map(|one| state.networks.get(&one.network));
    let setups = || networks.clone().map(|network| &network.setup);
    // Nothing leaves a sandbox but connections to tasks.
    let needs_it = !spec.name.is_sandbox()
        && setups().any(|one| one.overlay.is_some_and(|overlay| !overlay.internal))
        && setups().all(|one| one.internal);
    needs_it.then(|| NetworkAttachment::new(Name::mesh_gateway()))
}

fn check_aliases(endpoint: &Name, wanted: &NetworkAttachment) -> Result<(), Refusal> {
    limit_of("aliases on a network", "endpoint", endpoint, wanted.aliases.len(), MAX_ALIASES)?;
    match wanted.aliases.iter().find(|alias| !is_alias(alias)) {
        Some(alias) => {
            Err(Refusal::InvalidAlias { endpoint: endpoint.clone(), alias: alias.clone() })
        }
        None => Ok(()),
    }
}

/// Checks the fixed addresses of an attachment, and chooses the others. Returns one per subnet of
/// the network.
fn addresses(
    state: &State,
    endpoint: &Name,
    wanted: &NetworkAttachment,
    network: &Network,
    reserved: &BTreeSet<IpAddr>,
    with: &Surroundings<'_>,
) -> Result<Vec<Assigned>, Refusal> {
    let subnets = &network.setup.subnets;
    let mut taken: BTreeSet<IpAddr> = subnets.iter().map(|subnet| subnet.gateway).collect();
    let mut members = 0;
    for member in state.members(&network.name) {
        members += 1;
        taken.extend(member.addresses_on(&network.name));
    }
    limit_of("endpoints", "network", &network.name, members + 1, MAX_ENDPOINTS_OF_NETWORK)?;
    let mut fixed: BTreeMap<bool, IpAddr> = BTreeMap::new();
    for &address in &wanted.addresses {
        let (endpoint, network) = (endpoint.clone(), network.name.clone());
        if let Some(other) = fixed.insert(address.is_ipv6(), address) {
            return Err(Refusal::TwoAddresses { endpoint, address, other, network });
        }
        let same_family = |one: &&Subnet| one.gateway.is_ipv6() == address.is_ipv6();
        let Some(Subnet { subnet, gateway }) = subnets.iter().find(same_family) else {
            return Err(Refusal::NoSuchFamily { endpoint, address, network });
        };
        if let Some(problem) = address_problem(address, subnet) {
            return Err(Refusal::InvalidAddress { endpoint, address, network, problem });
        }
        if taken.contains(&address) {
            let holds = |one: &&Arc<Endpoint>| one.addresses_on(&network).any(|ip| ip == address);
            let holder = match state.members(&network).find(holds) {
                Some(member) => format!("endpoint {}", member.name),
                None => {
                    debug_assert_eq!(*gateway, address);
                    "the gateway".to_owned()
                }
            };
            return Err(Refusal::AddressTaken { endpoint, address, network, holder });
        }
    }
    taken.extend(reserved);
    let assign = |&Subnet { subnet, gateway }: &Subnet| {
        let fixed = fixed.get(&gateway.is_ipv6()).copied();
        let address = fixed.or_else(|| with.quarantine.choose(subnet, &taken, with.now));
        address.map(|address| Assigned { subnet, address, chosen: fixed.is_none() }).ok_or_else(
            || Refusal::NoAddress {
                endpoint: endpoint.clone(),
                network: network.name.clone(),
                subnet,
            },
        )
    };
    subnets.iter().map(assign).collect()
}

/// Checks the namespace of an endpoint, and returns its path without repeated slashes and `.`.
fn check_namespace(state: &State, endpoint: &Name, path: &Path) -> Result<PathBuf, Refusal> {
    let text = path.to_str().filter(|text| text.len() <= MAX_PATH && !text.contains('\0'));
    if text.is_none() || !path.is_absolute() {
        return Err(Refusal::InvalidNamespace { endpoint: endpoint.clone(), path: path.into() });
    }
    let path: PathBuf = path.components().collect();
    // As text: a comparison of paths is several times slower.
    let holds = |other: &&Arc<Endpoint>| {
        other.namespace.as_os_str() == path.as_os_str() && other.name != *endpoint
    };
    match state.endpoints.values().find(holds) {
        Some(holder) => Err(Refusal::NamespaceTaken {
            endpoint: endpoint.clone(),
            path,
            holder: holder.name.clone(),
        }),
        None => Ok(path),
    }
}

/// Checks the new ports of an endpoint, and returns them sorted.
fn check_ports(
    state: &State,
    endpoint: &Name,
    new: &[PublishedPort],
) -> Result<Vec<PublishedPort>, Refusal> {
    if new.is_empty() {
        return Ok(Vec::new());
    }
    if new.iter().any(|port| port.host_port == 0 || port.container_port == 0) {
        return Err(Refusal::PortZero { endpoint: endpoint.clone() });
    }
    let taken = |port: PublishedPort, holder: &Name| Refusal::PortTaken {
        endpoint: endpoint.clone(),
        port,
        holder: holder.clone(),
    };
    let mut by_socket: BTreeMap<(Protocol, u16), Vec<PublishedPort>> = BTreeMap::new();
    for port in new {
        let port = PublishedPort { address: port.address.to_canonical(), ..*port };
        let others = by_socket.entry(port.socket()).or_default();
        if others.iter().any(|other| other.conflicts(&port)) {
            return Err(taken(port, endpoint));
        }
        others.push(port);
    }
    let mut count = new.len();
    for (holder, other) in state.ports() {
        count += 1;
        let same = by_socket.get(&other.socket()).into_iter().flatten();
        if let Some(port) = same.into_iter().find(|port| port.conflicts(other)) {
            return Err(taken(*port, &holder.name));
        }
    }
    limit("published ports", count, MAX_PORTS)?;
    let mut ports: Vec<PublishedPort> = by_socket.into_values().flatten().collect();
    ports.sort();
    Ok(ports)
}

fn endpoint<'a>(state: &'a State, name: &Name) -> Result<&'a Arc<Endpoint>, Refusal> {
    state.endpoints.get(name).ok_or_else(|| Refusal::UnknownEndpoint(name.clone()))
}

fn detach(state: &State, name: &Name, with: &mut Surroundings<'_>) -> Result<State, Refusal> {
    let endpoint = endpoint(state, name)?;
    for address in endpoint.setup.attachments.iter().flat_map(|one| &one.addresses) {
        with.quarantine.release(address.addr(), with.now);
    }
    let mut state = state.clone();
    state.endpoints.remove(name);
    Ok(state)
}

fn publish(state: &State, name: &Name, new: &[PublishedPort]) -> Result<State, Refusal> {
    let mut endpoint = Endpoint::clone(endpoint(state, name)?);
    endpoint.ports.extend(check_ports(state, name, new)?);
    endpoint.ports.sort();
    Ok(with_endpoint(state, endpoint))
}

fn unpublish(
    state: &State,
    address: IpAddr,
    port: u16,
    protocol: Protocol,
) -> Result<State, Refusal> {
    let address = address.to_canonical();
    let is = |one: &PublishedPort| one.socket() == (protocol, port) && one.address == address;
    let Some((endpoint, _)) = state.ports().find(|(_, one)| is(one)) else {
        return Err(Refusal::NotPublished { address, port, protocol });
    };
    let mut endpoint = Endpoint::clone(endpoint);
    endpoint.ports.retain(|one| !is(one));
    Ok(with_endpoint(state, endpoint))
}

fn relocate(state: &State, name: &Name, namespace: &Path) -> Result<State, Refusal> {
    let mut endpoint = Endpoint::clone(endpoint(state, name)?);
    endpoint.namespace = check_namespace(state, name, namespace)?;
    Ok(with_endpoint(state, endpoint))
}

fn with_endpoint(state: &State, endpoint: Endpoint) -> State {
    let mut state = state.clone();
    state.endpoints.insert(endpoint.name.clone(), Arc::new(endpoint));
    state
}

fn limit(what: &str, count: usize, limit: usize) -> Result<(), Refusal> {
    if count > limit { Err(Refusal::TooMany { what: what.to_owned(), limit }) } else { Ok(()) }
}

fn limit_of(
    what: &str,
    kind: &str,
    holder: &Name,
    count: usize,
    most: usize,
) -> Result<(), Refusal> {
    limit(&format!("{what} of {kind} {holder}"), count, most)
}

/// Returns whether `route` is a default route or a part of one. VPNs add routes for halves
/// (0.0.0.0/1, 128.0.0.0/1), quarters or eighths of the address space. These take precedence over a
/// default route without replacing it.
fn is_default(route: &IpNet) -> bool {
    route.prefix_len() <= 3
}
