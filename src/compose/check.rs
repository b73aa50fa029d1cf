//! What the parts of a Compose file say about each other: names that exist, addresses that fit,
//! ports that do not meet, dependencies that have an order. No check takes more than O(n log n) for
//! what the file holds.

use super::error::{Fault, Site};
use super::network::{self, unusable};
use super::project::Subnet;
use super::service::{AttachmentSites, Draft};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tidegate_model::{PortSpec, overlap};

/// How many ports a project may publish: each protocol's whole range, twice.
pub(super) const MAX_PORTS: usize = 4 * 65_535;

/// How many services of a circle of dependencies are told.
const CIRCLE_SHOWN: usize = 8;

type Networks = BTreeMap<String, network::Draft>;

/// Checks networks against each other.
pub(super) fn networks(networks: &Networks) -> Result<(), Fault> {
    let mut bridges: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, draft) in networks {
        if let (Some(bridge), Some(site)) = (&draft.network.bridge, &draft.bridge)
            && let Some(other) = bridges.insert(bridge, name)
        {
            return Err(site.fault(format!(
                "networks.{other} has the bridge {bridge:?} too; choose another name"
            )));
        }
    }
    let mut subnets: Vec<(IpNet, &Site)> = networks
        .values()
        .flat_map(|draft| {
            draft.network.subnets.iter().map(|subnet| subnet.subnet).zip(&draft.subnets)
        })
        .collect();
    // Either of two subnets holds the other or they are apart; so where any two meet, two
    // neighbours do.
    subnets.sort_by_key(|(subnet, site)| (subnet.network(), subnet.prefix_len(), site.place));
    for pair in subnets.windows(2) {
        if let [(first, first_site), (second, second_site)] = pair
            && first.contains(second)
        {
            let (site, subnet, other_site, other) = if first_site.place < second_site.place {
                (second_site, second, first_site, first)
            } else {
                (first_site, first, second_site, second)
            };
            return Err(site.fault(format!(
                "{subnet} overlaps with {other} ({}); choose another",
                other_site.key
            )));
        }
    }
    Ok(())
}

/// Checks that the networks of each service exist and its fixed addresses fit into them.
pub(super) fn attachments(services: &[Draft], networks: &Networks) -> Result<(), Fault> {
    let mut taken = BTreeMap::new();
    for draft in services {
        for (attachment, sites) in draft.service.networks.iter().zip(&draft.networks) {
            let name = attachment.network.as_str();
            let Some(network) = networks.get(name) else {
                return Err(sites
                    .network
                    .fault(format!("there is no network {name:?}; define it under networks")));
            };
            let AttachmentSites { ipv4_address, ipv6_address, .. } = sites;
            let v4 = attachment.ipv4_address.map(IpAddr::V4).zip(ipv4_address.as_ref());
            let v6 = attachment.ipv6_address.map(IpAddr::V6).zip(ipv6_address.as_ref());
            for (address, site) in v4.into_iter().chain(v6) {
                fixed_address(address, name, &network.network.subnets)
                    .map_err(|problem| site.fault(problem))?;
                if let Some(other) = taken.insert((name, address), &draft.service.name) {
                    let problem = format!(
                        "{address} is the address of services.{other} already; choose another"
                    );
                    return Err(site.fault(problem));
                }
            }
        }
    }
    Ok(())
}

fn fixed_address(address: IpAddr, network: &str, subnets: &[Subnet]) -> Result<(), String> {
    let Some(subnet) =
        subnets.iter().find(|subnet| subnet.subnet.addr().is_ipv4() == address.is_ipv4())
    else {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(format!(
            "networks.{network} has no subnet of {family} to choose {address} from; give it one under ipam.config"
        ));
    };
    if let Some(problem) = unusable(address, &subnet.subnet) {
        return Err(format!("{address} cannot be on networks.{network}: {problem}"));
    }
    if address == subnet.gateway_address() {
        return Err(format!("{address} is the gateway of networks.{network}; choose another"));
    }
    Ok(())
}

/// Checks that no two published ports meet.
pub(super) fn ports(services: &[Draft]) -> Result<(), Fault> {
    let mut specs: Vec<PortSpec> = Vec::new();
    let mut origins: Vec<(&str, &Site)> = Vec::new();
    let mut published = 0;
    for draft in services {
        for (spec, site) in draft.service.ports.iter().zip(&draft.ports) {
            published += usize::from(spec.container_ports().len());
            if published > MAX_PORTS {
                return Err(site.fault(format!(
                    "more than {MAX_PORTS} ports are published in all; publish fewer"
                )));
            }
            specs.push(*spec);
            origins.push((&draft.service.name, site));
        }
    }
    let Err(clash) = overlap(&specs) else { return Ok(()) };
    let first = specs.iter().position(|spec| *spec == clash.first).unwrap_or(0);
    let second = specs.iter().skip(first + 1).position(|spec| *spec == clash.second).unwrap_or(0)
        + first
        + 1;
    let (Some((service, first_site)), Some((_, site))) = (origins.get(first), origins.get(second))
    else {
        return Err(Site::start().fault(clash.to_string()));
    };
    let address = match clash.address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    Err(site.fault(format!(
        "port {}/{} on {address} is published by services.{service} already (line {}, \"{}\"); choose another host port",
        clash.port, clash.protocol, first_site.place.line, clash.first
    )))
}

/// Checks that the dependencies of services exist and have an order.
pub(super) fn dependencies(services: &[Draft]) -> Result<(), Fault> {
    let by_name: BTreeMap<&str, usize> = services
        .iter()
        .enumerate()
        .map(|(index, draft)| (draft.service.name.as_str(), index))
        .collect();
    let mut needs: Vec<Vec<usize>> = Vec::new();
    for draft in services {
        let mut indexes = Vec::new();
        for (name, site) in draft.service.depends_on.iter().zip(&draft.depends_on) {
            let index = by_name.get(name.as_str());
            indexes.push(
                *index.ok_or_else(|| {
                    site.fault(format!("there is no service {name:?} to depend on"))
                })?,
            );
        }
        needs.push(indexes);
    }
    let stuck = unordered(&needs);
    // Each of those that are left needs another of them: going on from any leads into a circle.
    let Some(mut at) = stuck.iter().next().copied() else { return Ok(()) };
    let mut way: Vec<(usize, usize)> = Vec::new();
    let mut visited = BTreeMap::new();
    while let Some(needed) =
        needs.get(at).and_then(|needs| needs.iter().position(|need| stuck.contains(need)))
    {
        if let Some(&begin) = visited.get(&at) {
            return Err(circle(services, way.get(begin..).unwrap_or_default()));
        }
        visited.insert(at, way.len());
        way.push((at, needed));
        at = needs[at][needed];
    }
    Ok(())
}

/// Those that cannot be put behind everything they need.
fn unordered(needs: &[Vec<usize>]) -> BTreeSet<usize> {
    let mut missing: Vec<usize> = needs.iter().map(Vec::len).collect();
    let mut needed_by: Vec<Vec<usize>> = vec![Vec::new(); needs.len()];
    for (index, needs) in needs.iter().enumerate() {
        for need in needs {
            needed_by[*need].push(index);
        }
    }
    let mut ready: Vec<usize> = (0..needs.len()).filter(|index| missing[*index] == 0).collect();
    let mut stuck: BTreeSet<usize> = (0..needs.len()).collect();
    while let Some(index) = ready.pop() {
        stuck.remove(&index);
        for &dependent in &needed_by[index] {
            missing[dependent] -= 1;
            if missing[dependent] == 0 {
                ready.push(dependent);
            }
        }
    }
    stuck
}

/// The error of a circle of services, each with the number of its dependency that is the next one.
fn circle(services: &[Draft], way: &[(usize, usize)]) -> Fault {
    let name = |index: usize| services.get(index).map_or("", |draft| draft.service.name.as_str());
    let mut names: Vec<&str> =
        way.iter().take(CIRCLE_SHOWN).map(|(index, _)| name(*index)).collect();
    if way.len() > CIRCLE_SHOWN {
        names.push("...");
    }
    names.extend(way.first().map(|(index, _)| name(*index)));
    let site = way.last().and_then(|(index, needed)| services.get(*index)?.depends_on.get(*needed));
    let problem =
        format!("services depend on each other in a circle: {}; remove one", names.join(" -> "));
    site.map_or_else(|| Site::start().fault(problem.clone()), |site| site.fault(problem.clone()))
}
