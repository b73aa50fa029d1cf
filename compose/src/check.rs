//! Cross-checks between the parts of a Compose file: references, fixed addresses, published ports
//! and the order of dependencies. Each check takes at most O(n log n) time in the size of the file.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::error::{Fault, Site};
use super::network;
use super::project::SubnetConfig;
use super::service::{AttachmentSites, Draft};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use tidegate_model::validity::address_problem;
use tidegate_model::{PortSpec, bracketed, overlap};

/// Maximum number of ports that a project may publish: the full range of each protocol, twice.
pub(super) const MAX_PORTS: usize = 4 * 65_535;

/// Maximum number of services of a dependency cycle that an error lists.
const CYCLE_SHOWN: usize = 8;

type Networks = BTreeMap<String, network::Draft>;

/// Checks that bridge names are unique and that subnets do not overlap.
pub(super) fn networks(networks: &Networks) -> Result<(), Fault> {
    let mut bridges: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, draft) in networks {
        if let (Some(bridge), Some(site)) = (&draft.network.bridge, &draft.bridge)
            && let Some(other) = bridges.insert(bridge, name)
        {
            return Err(site.fault(format!(
                "bridge {bridge:?} is already used by networks.{other}; choose another name"
            )));
        }
    }
    let mut subnets: Vec<(IpNet, &Site)> = networks
        .values()
        .flat_map(|draft| {
            draft.network.subnets.iter().map(|subnet| subnet.subnet).zip(&draft.subnets)
        })
        .collect();
    // Two prefixes are either nested or disjoint, so after sorting any overlap is between two
    // adjacent ones.
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
                "{subnet} overlaps {other} ({}); choose another subnet",
                other_site.key
            )));
        }
    }
    Ok(())
}

/// Checks that the networks of each service are defined and that its fixed addresses fit into them.
pub(super) fn attachments(services: &[Draft], networks: &Networks) -> Result<(), Fault> {
    let mut taken = BTreeMap::new();
    for draft in services {
        for (attachment, sites) in draft.service.networks.iter().zip(&draft.networks) {
            let name = attachment.network.as_str();
            let Some(network) = networks.get(name) else {
                return Err(sites
                    .network
                    .fault(format!("network {name:?} is not defined; add it under networks")));
            };
            let AttachmentSites { ipv4_address, ipv6_address, .. } = sites;
            let v4 = attachment.ipv4_address.map(IpAddr::V4).zip(ipv4_address.as_ref());
            let v6 = attachment.ipv6_address.map(IpAddr::V6).zip(ipv6_address.as_ref());
            for (address, site) in v4.into_iter().chain(v6) {
                fixed_address(address, name, &network.network.subnets)
                    .map_err(|problem| site.fault(problem))?;
                if let Some(other) = taken.insert((name, address), &draft.service.name) {
                    let problem = format!(
                        "{address} is already assigned to services.{other}; choose another"
                    );
                    return Err(site.fault(problem));
                }
            }
        }
    }
    Ok(())
}

fn fixed_address(address: IpAddr, network: &str, subnets: &[SubnetConfig]) -> Result<(), String> {
    let Some(subnet) =
        subnets.iter().find(|subnet| subnet.subnet.addr().is_ipv4() == address.is_ipv4())
    else {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(format!(
            "networks.{network} has no {family} subnet for {address}; add one under ipam.config"
        ));
    };
    if let Some(problem) = address_problem(address, &subnet.subnet) {
        return Err(format!("{address} is not usable on networks.{network}: {problem}"));
    }
    if address == subnet.gateway_address() {
        return Err(format!("{address} is the gateway of networks.{network}; choose another"));
    }
    Ok(())
}

/// Checks that no two published ports overlap.
pub(super) fn ports(services: &[Draft]) -> Result<(), Fault> {
    let mut specs: Vec<PortSpec> = Vec::new();
    let mut origins: Vec<(&str, &Site)> = Vec::new();
    let mut published = 0;
    for draft in services {
        for (spec, site) in draft.service.ports.iter().zip(&draft.ports) {
            published += usize::from(spec.container_ports().len());
            if published > MAX_PORTS {
                return Err(site.fault(format!(
                    "the project publishes more than {MAX_PORTS} ports; publish fewer"
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
    let address = bracketed(clash.address);
    Err(site.fault(format!(
        "port {}/{} on {address} is already published by services.{service} (line {}, \"{}\"); choose another host port",
        clash.port, clash.protocol, first_site.place.line, clash.first
    )))
}

/// Checks that the dependencies of services are defined and free of cycles.
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
            indexes.push(*index.ok_or_else(|| {
                site.fault(format!("service {name:?} is not defined; add it under services"))
            })?);
        }
        needs.push(indexes);
    }
    let stuck = unordered(&needs);
    // Every remaining service depends on another remaining one, so following dependencies leads
    // into a cycle.
    let Some(mut at) = stuck.iter().next().copied() else { return Ok(()) };
    let mut path: Vec<(usize, usize)> = Vec::new();
    let mut visited = BTreeMap::new();
    while let Some(needed) =
        needs.get(at).and_then(|needs| needs.iter().position(|need| stuck.contains(need)))
    {
        if let Some(&begin) = visited.get(&at) {
            return Err(cycle_fault(services, path.get(begin..).unwrap_or_default()));
        }
        visited.insert(at, path.len());
        path.push((at, needed));
        at = needs[at][needed];
    }
    Ok(())
}

/// Returns the services that a topological sort (Kahn) cannot place.
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

/// Returns the error for a cycle of services. Each service comes with the index of its dependency
/// on the next one.
fn cycle_fault(services: &[Draft], cycle: &[(usize, usize)]) -> Fault {
    let name = |index: usize| services.get(index).map_or("", |draft| draft.service.name.as_str());
    let mut names: Vec<&str> =
        cycle.iter().take(CYCLE_SHOWN).map(|(index, _)| name(*index)).collect();
    if cycle.len() > CYCLE_SHOWN {
        names.push("...");
    }
    names.extend(cycle.first().map(|(index, _)| name(*index)));
    let site =
        cycle.last().and_then(|(index, needed)| services.get(*index)?.depends_on.get(*needed));
    let problem = format!("dependency cycle: {}; remove one dependency", names.join(" -> "));
    site.map_or_else(|| Site::start().fault(problem.clone()), |site| site.fault(problem.clone()))
}
