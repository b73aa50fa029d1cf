//! From what is to what shall be: pure.

use crate::{ConflictError, Desired, Fact, Interface, Isolation, Observed, Op, Place, World};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

/// The longest name that an interface may have, in bytes (`IFNAMSIZ` less the NUL).
const LONGEST_NAME: usize = 15;

/// What is to be done, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub ops: Vec<Op>,
}

/// The steps from `observed` to `desired`. `owned` is what the same owner has made before, in the
/// order in which it was made: of it goes, last first, what is not desired any more. What others
/// have made stays.
///
/// # Errors
/// [`ConflictError`] when what is desired contradicts itself or what others have; nothing must be
/// done then.
pub fn plan(
    desired: &Desired,
    owned: &[Fact],
    observed: &Observed,
    isolation: &dyn Isolation,
) -> Result<Plan, ConflictError> {
    check(desired)?;
    check_surroundings(desired, owned, observed)?;
    Ok(difference(desired, owned, observed, isolation))
}

/// The same for networks that are in use. Routes that others have added to the host meanwhile are
/// not in the way.
///
/// # Errors
/// A link of somebody else's has the name of one of ours.
pub(crate) fn plan_again(
    desired: &Desired,
    owned: &[Fact],
    observed: &Observed,
    isolation: &dyn Isolation,
) -> Result<Plan, ConflictError> {
    check_links(desired, observed)?;
    Ok(difference(desired, owned, observed, isolation))
}

fn difference(
    desired: &Desired,
    owned: &[Fact],
    observed: &Observed,
    isolation: &dyn Isolation,
) -> Plan {
    let facts = desired.facts(isolation);
    let wanted: BTreeSet<&Fact> = facts.iter().collect();
    let mut world = World::new(observed.facts.clone());
    let mut ops = removals(owned.iter().filter(|fact| !wanted.contains(fact)), &mut world);
    for fact in &facts {
        if !world.holds(fact) {
            let op = Op::Add(fact.clone());
            world.execute(&op);
            ops.push(op);
        }
    }
    Plan { ops }
}

/// The steps that take back those of `facts` that hold in `world`, last first, and what they leave
/// of the world.
///
/// Links come before all else: with them goes what is on them and need not be removed one by one,
/// and rules that close a network outlast it.
pub(crate) fn removals<'a>(
    facts: impl IntoIterator<Item = &'a Fact, IntoIter: DoubleEndedIterator>,
    world: &mut World,
) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut rest: Vec<&Fact> = facts.into_iter().rev().collect();
    for kind in [Fact::is_link, |fact: &Fact| !fact.goes_with_its_link(), |_: &Fact| true] {
        let these: Vec<&Fact>;
        (these, rest) = rest.into_iter().partition(|fact| kind(fact));
        let held: BTreeSet<&Fact> =
            these.iter().copied().filter(|fact| world.holds(fact)).collect();
        world.remove(held.iter().copied());
        let mut told = BTreeSet::new();
        ops.extend(
            these
                .into_iter()
                .filter(|fact| held.contains(fact) && told.insert(*fact))
                .map(|fact| Op::Remove(fact.clone())),
        );
    }
    ops
}

/// Whether `desired` is free of contradictions.
fn check(desired: &Desired) -> Result<(), ConflictError> {
    let mut subnets: Vec<(IpNet, &str)> = Vec::new();
    let mut host_links: BTreeSet<&str> = BTreeSet::new();
    for network in &desired.networks {
        check_name(&network.bridge)?;
        for subnet in &network.subnets {
            let overlapping = subnets.iter().find(|(other, _)| overlap(other, &subnet.subnet));
            if let Some((other, name)) = overlapping {
                return Err(ConflictError::SubnetsOverlap {
                    network: network.name.clone(),
                    subnet: subnet.subnet,
                    other_network: (*name).to_owned(),
                    other: *other,
                });
            }
            if !subnet.subnet.contains(&subnet.gateway) {
                return Err(ConflictError::GatewayOutside {
                    network: network.name.clone(),
                    gateway: subnet.gateway,
                    subnet: subnet.subnet,
                });
            }
            subnets.push((subnet.subnet, &network.name));
        }
    }
    let mut addresses: BTreeMap<(&str, IpAddr), String> = BTreeMap::new();
    for network in &desired.networks {
        for subnet in &network.subnets {
            addresses.insert(
                (&network.name, subnet.gateway),
                format!("the gateway of network {:?}", network.name),
            );
        }
    }
    for endpoint in &desired.endpoints {
        for attachment in &endpoint.attachments {
            check_name(&attachment.host_end)?;
            check_name(&attachment.inside)?;
            let Some(network) =
                desired.networks.iter().find(|network| network.name == attachment.network)
            else {
                return Err(ConflictError::NoSuchNetwork {
                    endpoint: endpoint.name.clone(),
                    network: attachment.network.clone(),
                });
            };
            for address in &attachment.addresses {
                if !network.subnets.iter().any(|subnet| subnet.subnet.contains(&address.addr())) {
                    return Err(ConflictError::AddressOutside {
                        endpoint: endpoint.name.clone(),
                        address: address.addr(),
                        network: network.name.clone(),
                    });
                }
                let whose = format!("endpoint {:?}", endpoint.name);
                if let Some(holder) = addresses.insert((&network.name, address.addr()), whose) {
                    return Err(ConflictError::AddressInUse {
                        endpoint: endpoint.name.clone(),
                        address: address.addr(),
                        holder,
                    });
                }
            }
        }
    }
    let ends = desired
        .endpoints
        .iter()
        .flat_map(|endpoint| &endpoint.attachments)
        .map(|one| &one.host_end);
    for interface in desired.networks.iter().map(|network| &network.bridge).chain(ends) {
        if !host_links.insert(&interface.name) {
            return Err(ConflictError::NameTwice(interface.name.clone()));
        }
    }
    Ok(())
}

fn check_name(interface: &Interface) -> Result<(), ConflictError> {
    let name = &interface.name;
    let bad = |byte: u8| byte == b'/' || byte == b':' || byte.is_ascii_whitespace();
    if name.len() > LONGEST_NAME {
        return Err(ConflictError::NameTooLong { name: name.clone(), longest: LONGEST_NAME });
    }
    if name.is_empty() || name == "." || name == ".." || name.bytes().any(bad) {
        return Err(ConflictError::BadName(name.clone()));
    }
    Ok(())
}

/// Whether what others have leaves room for `desired`.
///
/// A route to more than a subnet (a default route, its halves that a VPN sets up, a
/// company's 10.0.0.0/8) leaves room: the bridge's own route is more specific. One to the subnet or
/// to a part of it does not.
fn check_surroundings(
    desired: &Desired,
    owned: &[Fact],
    observed: &Observed,
) -> Result<(), ConflictError> {
    let ours: BTreeSet<&str> = owned
        .iter()
        .filter_map(|fact| match fact {
            Fact::Bridge { interface, .. } => Some(interface.name.as_str()),
            _ => None,
        })
        .collect();
    for network in &desired.networks {
        for subnet in &network.subnets {
            let taken = observed.routes.iter().find(|(route, link)| {
                subnet.subnet.contains(&route.trunc())
                    && *link != network.bridge.name
                    && !ours.contains(link.as_str())
            });
            if let Some((route, link)) = taken {
                return Err(ConflictError::RouteOverlaps {
                    network: network.name.clone(),
                    subnet: subnet.subnet,
                    route: *route,
                    link: link.clone(),
                });
            }
        }
    }
    check_links(desired, observed)
}

/// Whether no link of others has the name of one of `desired`.
pub(crate) fn check_links(desired: &Desired, observed: &Observed) -> Result<(), ConflictError> {
    for network in &desired.networks {
        check_free(observed, &Place::Host, &network.bridge)?;
    }
    for endpoint in &desired.endpoints {
        let place = Place::Endpoint(endpoint.name.clone());
        for attachment in &endpoint.attachments {
            check_free(observed, &Place::Host, &attachment.host_end)?;
            check_free(observed, &place, &attachment.inside)?;
        }
    }
    Ok(())
}

/// Whether a link of that name, if there is one, is the one that is meant.
fn check_free(
    observed: &Observed,
    place: &Place,
    interface: &Interface,
) -> Result<(), ConflictError> {
    match observed.links.get(place).and_then(|links| links.get(&interface.name)) {
        Some(mac) if *mac != Some(interface.mac) => {
            Err(ConflictError::NameTaken { place: place.clone(), name: interface.name.clone() })
        }
        _ => Ok(()),
    }
}

pub(crate) fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(&b.network()) || b.contains(&a.network())
}

#[cfg(test)]
mod tests;
