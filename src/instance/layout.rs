//! Assigns names, subnets, addresses and interfaces to the networks and services of a Compose file.
//! Pure: the state of the host, time and randomness are arguments.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;
use tidegate_compose::{self, Project};
use tidegate_model::{MacAddress, registry};
use tidegate_netsetup::{
    Attachment, Desired, Endpoint, Exhausted, Interface, Ipam, IpamError, Network, Observed,
    ObservedBridge, Pools, Subnet, gateway,
};
use tidegate_proxy::{Bridge, ForeignNetwork, GatewayNetwork};

/// MTU of a network in bytes, if the host has no default route to take it from.
const MTU: u32 = 1500;

/// The networks and endpoints of a project on this host.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) desired: Desired,
    /// The addresses of each service, in the order of its networks. IPv4 precedes IPv6 on each.
    pub(super) addresses: BTreeMap<String, Vec<IpAddr>>,
}

/// A project cannot be laid out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LayoutError {
    #[error("network {network:?}: {source}")]
    NoSubnet { network: String, source: Exhausted },
    #[error("service {service:?} on network {network:?}: {source}")]
    NoAddress { service: String, network: String, source: IpamError },
}

/// Inputs of [`layout()`] from outside the project.
pub(super) struct Surroundings<'a> {
    /// Routes, bridges and MTU of the host.
    pub(super) observed: &'a Observed,
    /// Identifies this host: the global ID of its unique local IPv6 prefix (RFC 4193, section 3.2).
    pub(super) host_id: [u8; 5],
    /// Random bytes for MAC addresses and veth names.
    pub(super) random: &'a mut dyn FnMut() -> [u8; 6],
    /// Current time, for the quarantine of addresses.
    pub(super) now: Instant,
}

/// Returns the networks of all projects on this host, by bridge index, for the ACLs of published
/// ports.
pub(super) fn foreign_networks(observed: &Observed) -> BTreeMap<u32, ForeignNetwork> {
    let network = |bridge: &ObservedBridge| ForeignNetwork {
        internal: bridge.internal,
        subnets: bridge.subnets.clone(),
    };
    observed.bridges.values().map(|bridge| (bridge.index, network(bridge))).collect()
}

/// Assigns subnets and a bridge to every network, and interfaces and addresses to every service.
///
/// # Errors
/// [`LayoutError`]: no subnet or address is free, or a fixed address is in use.
pub(super) fn layout(
    project: &Project,
    with: &mut Surroundings<'_>,
) -> Result<Layout, LayoutError> {
    let (networks, mut pools) = networks(project, with)?;
    let mut desired = Desired { networks, ..Desired::default() };
    let mut addresses = BTreeMap::new();
    // Fixed addresses first, regardless of the order in the file, so that none of them is assigned
    // to another service dynamically.
    for service in &project.services {
        for attachment in &service.networks {
            let failed = |source| no_address(&service.name, &attachment.network, source);
            for fixed in fixed(attachment) {
                if let Some(pool) = pool_for(&mut pools, &attachment.network, fixed) {
                    pool.claim(fixed).map_err(failed)?;
                }
            }
        }
    }
    let now = with.now;
    for service in &project.services {
        let mut attachments = Vec::new();
        let mut all = Vec::new();
        let egress = service.networks.iter().position(|one| {
            project.networks.get(&one.network).is_some_and(|network| !network.internal)
        });
        for (number, attachment) in service.networks.iter().enumerate() {
            let mut nets = Vec::new();
            for pool in pools.get_mut(&attachment.network).into_iter().flatten() {
                let fixed = fixed(attachment)
                    .find(|ip| ip.is_ipv4() == matches!(pool.subnet(), IpNet::V4(_)));
                let address = match fixed {
                    Some(address) => address,
                    None => pool
                        .obtain(now)
                        .map_err(|source| no_address(&service.name, &attachment.network, source))?,
                };
                nets.extend(IpNet::new(address, pool.subnet().prefix_len()));
                all.push(address);
            }
            let random = (with.random)();
            attachments.push(Attachment {
                network: attachment.network.clone(),
                host_end: Interface {
                    name: registry::veth_name(random),
                    mac: MacAddress::local((with.random)()),
                },
                inside: Interface {
                    name: format!("eth{number}"),
                    mac: MacAddress::local((with.random)()),
                },
                addresses: nets,
                default_route: egress == Some(number),
                any_address: attachment.any_source,
            });
        }
        desired.endpoints.push(Endpoint { name: service.name.clone(), attachments });
        addresses.insert(service.name.clone(), all);
    }
    Ok(Layout { desired, addresses })
}

impl Layout {
    /// Returns the networks of this project for the ACLs of published ports. `indexes` holds the
    /// index of each bridge by network name.
    pub(super) fn gateway_networks(&self, indexes: &BTreeMap<String, u32>) -> Vec<GatewayNetwork> {
        let of = |network: &Network| GatewayNetwork {
            name: network.name.clone(),
            bridge: indexes
                .get(&network.name)
                .map_or(Bridge::Missing(0), |index| Bridge::Present(*index)),
            internal: network.internal,
            subnets: network.subnets.iter().map(|one| (one.subnet, one.gateway)).collect(),
        };
        self.desired.networks.iter().map(of).collect()
    }

    /// Returns the names of the networks that `endpoint` is attached to.
    pub(super) fn networks_of(&self, endpoint: &str) -> impl Iterator<Item = String> {
        let endpoint = self.desired.endpoints.iter().find(|one| one.name == endpoint);
        endpoint
            .into_iter()
            .flat_map(|one| &one.attachments)
            .map(|attachment| attachment.network.clone())
    }
}

type AddressPools = BTreeMap<String, Vec<Ipam>>;

fn networks(
    project: &Project,
    with: &mut Surroundings<'_>,
) -> Result<(Vec<Network>, AddressPools), LayoutError> {
    let pools = Pools::usual(with.host_id);
    let given =
        project.networks.values().flat_map(|network| &network.subnets).map(|subnet| subnet.subnet);
    let routes = with.observed.routes.iter().map(|(net, _)| *net).filter(|net| !is_default(net));
    let mut in_use: Vec<IpNet> = routes.chain(given).collect();
    let mut networks = Vec::new();
    let mut addresses = AddressPools::new();
    for network in project.networks.values() {
        let mut subnets: Vec<Subnet> = network
            .subnets
            .iter()
            .map(|one| Subnet { subnet: one.subnet, gateway: one.gateway_address() })
            .collect();
        for v6 in [false, true] {
            let has = subnets.iter().any(|subnet| subnet.gateway.is_ipv6() == v6);
            if has || (v6 && !network.enable_ipv6) {
                continue;
            }
            let subnet = pools.obtain(v6, &in_use).map_err(|source| LayoutError::NoSubnet {
                network: network.name.clone(),
                source,
            })?;
            in_use.push(subnet);
            subnets.push(Subnet { subnet, gateway: gateway(subnet) });
        }
        subnets.sort_by_key(|subnet| subnet.gateway.is_ipv6());
        let pools = subnets.iter().map(|subnet| Ipam::new(subnet.subnet, subnet.gateway)).collect();
        addresses.insert(network.name.clone(), pools);
        let name = network.bridge.clone().unwrap_or_else(|| {
            registry::bridge_name(&network.name, &format!("{}/{}", project.name, network.name))
        });
        networks.push(Network {
            name: network.name.clone(),
            bridge: Interface { name, mac: MacAddress::local((with.random)()) },
            subnets,
            internal: network.internal,
            inter_container: network.inter_container,
            overlay: None,
            mtu: network.mtu.or(with.observed.default_mtu).unwrap_or(MTU),
        });
    }
    Ok((networks, addresses))
}

/// Whether `route` is a default route or a part of one. VPNs add routes for halves (0.0.0.0/1,
/// 128.0.0.0/1), quarters or eighths of the address space. These take precedence over a default
/// route without replacing it.
fn is_default(route: &IpNet) -> bool {
    route.prefix_len() <= 3
}

fn fixed(attachment: &tidegate_compose::ServiceNetwork) -> impl Iterator<Item = IpAddr> + use<> {
    let v4 = attachment.ipv4_address.map(IpAddr::V4);
    v4.into_iter().chain(attachment.ipv6_address.map(IpAddr::V6))
}

fn pool_for<'a>(
    pools: &'a mut AddressPools,
    network: &str,
    address: IpAddr,
) -> Option<&'a mut Ipam> {
    pools.get_mut(network)?.iter_mut().find(|pool| pool.subnet().contains(&address))
}

fn no_address(service: &str, network: &str, source: IpamError) -> LayoutError {
    LayoutError::NoAddress { service: service.to_owned(), network: network.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use std::path::Path;
    use std::sync::Arc;
    use tidegate_model::Ingress;
    use tidegate_proxy::{GatewayAcl, GatewayNetworks};

    const FILE: &str = "
networks:
  front: {}
  back:
    internal: true
    enable_ipv6: true
    ipam: { config: [ { subnet: 10.77.0.0/24 } ] }
services:
  web:
    command: web
    networks: [ back, front ]
  db:
    command: db
    hostname: data
    networks: { back: { aliases: [ sql ], ipv4_address: 10.77.0.2 } }
";

    fn lay_out(text: &str, observed: &Observed) -> (Project, Result<Layout, LayoutError>) {
        let project =
            tidegate_compose::parse(text, Path::new("compose.yaml"), "demo", &|_| None).unwrap();
        let mut count = 0;
        let mut random = || {
            count += 1;
            [0x10, 0, 0, 0, 0, count]
        };
        let laid_out = layout(
            &project,
            &mut Surroundings {
                observed,
                host_id: [1, 2, 3, 4, 5],
                random: &mut random,
                now: Instant::now(),
            },
        );
        (project, laid_out)
    }

    #[test]
    fn subnets_bridges_and_addresses_are_assigned_where_the_file_has_none() {
        let observed = Observed {
            routes: vec![("172.28.0.0/24".parse().unwrap(), "eth0".into())],
            default_mtu: Some(1400),
            ..Observed::default()
        };
        let (_, laid_out) = lay_out(FILE, &observed);
        let laid_out = laid_out.unwrap();
        let [back, front] = &laid_out.desired.networks[..] else { panic!("two networks") };
        assert_eq!(
            back.subnets.iter().map(|one| one.subnet.to_string()).collect::<Vec<_>>(),
            ["10.77.0.0/24", "fd01:203:405::/64"]
        );
        assert_eq!(front.subnets[0].subnet.to_string(), "172.28.1.0/24", "the first free one");
        assert_eq!((front.mtu, back.internal, front.internal), (1400, true, false));
        assert_eq!(front.bridge.name.len(), "tg-front-0000".len());
        let web = &laid_out.desired.endpoints[0].attachments;
        assert_eq!(
            web.iter().map(|one| one.default_route).collect::<Vec<_>>(),
            [false, true],
            "not on the internal network"
        );
        assert_eq!(
            laid_out.addresses["web"],
            ["10.77.0.3", "fd01:203:405::2", "172.28.1.2"].map(|ip| ip.parse::<IpAddr>().unwrap()),
            "10.77.0.2 is a fixed address of db"
        );
        assert_eq!(
            super::super::names::hosts(&laid_out, "db", "data"),
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             10.77.0.2\tdata db\nfd01:203:405::3\tdata db\n",
            "names of other services are not in /etc/hosts"
        );
    }

    #[test]
    fn clients_on_an_internal_network_reach_only_its_own_endpoints() {
        let text = "
networks: { external: {}, internal: { internal: true } }
services:
  inside: { command: x, networks: [ internal ] }
  outside: { command: x, networks: [ external ] }
";
        let layout = lay_out(text, &Observed::default()).1.unwrap();
        let [external, internal] = &layout.desired.networks[..] else { panic!("two networks") };
        let indexes = BTreeMap::from([(external.name.clone(), 7), (internal.name.clone(), 8)]);
        let networks = Arc::new(GatewayNetworks::new(layout.gateway_networks(&indexes)));
        let denies = |endpoint: &str, network: &Network, client: IpAddr| {
            GatewayAcl::new(Arc::clone(&networks), layout.networks_of(endpoint)).denies(&Ingress {
                client: SocketAddr::new(client, 5000),
                destination: Some(network.subnets[0].gateway),
                to_group: false,
                interface: indexes[&network.name],
                handshake: false,
            })
        };
        for (endpoint, from, allowed) in [
            ("inside", internal, true),
            ("outside", internal, false),
            ("outside", external, true),
            ("inside", external, true),
        ] {
            let client = from.subnets[0].subnet.hosts().nth(5).unwrap();
            assert_eq!(!denies(endpoint, from, client), allowed, "{endpoint} from {}", from.name);
        }
        assert!(!denies("outside", internal, internal.subnets[0].gateway), "the host itself");
    }

    #[test]
    fn the_error_of_a_full_subnet_names_the_service() {
        let text = "
networks: { tiny: { ipam: { config: [ { subnet: 10.77.0.0/30 } ] } } }
services:
  one: { command: x, networks: [ tiny ] }
  two: { command: x, networks: [ tiny ] }
";
        let error = lay_out(text, &Observed::default()).1.unwrap_err();
        assert_eq!(
            error.to_string(),
            "service \"two\" on network \"tiny\": no free address in 10.77.0.0/30"
        );
    }
}
