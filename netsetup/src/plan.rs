//! Planning: operations from the observed to the desired state. Pure.

use crate::{
    ConflictError, Desired, Fact, Interface, Isolation, KernelModel, Network, Observed, Op, Place,
};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

/// Maximum length of an interface name in bytes (`IFNAMSIZ` without the NUL).
const MAX_NAME_LENGTH: usize = 15;

/// A sequence of operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The operations in order.
    pub ops: Vec<Op>,
}

/// Plans the operations from `observed` to `desired`. `owned` are the facts that the same owner
/// created before, in order of creation. Those that are no longer desired are removed in reverse
/// order. Foreign objects are not changed.
///
/// # Errors
/// [`ConflictError`] if the desired state is inconsistent or conflicts with foreign objects.
pub fn plan(
    desired: &Desired,
    owned: &[Fact],
    observed: &Observed,
    isolation: &dyn Isolation,
) -> Result<Plan, ConflictError> {
    check(desired)?;
    check_surroundings(desired, owned, observed)?;
    Ok(difference(&desired.facts(isolation), owned, observed))
}

/// Plans like [`plan`] for networks that are in use. Ignores conflicts with routes that were added
/// to the host since.
///
/// # Errors
/// A foreign link has the name of a desired link.
pub(crate) fn plan_update(
    desired: &Desired,
    owned: &[Fact],
    observed: &Observed,
    isolation: &dyn Isolation,
) -> Result<Plan, ConflictError> {
    check_links(desired, observed)?;
    Ok(difference(&desired.facts(isolation), owned, observed))
}

/// Plans those of `facts` that are missing, which are facts of `part`, the part of `desired` that
/// is new or may have changed. `owned` are the facts that the same owner created before.
///
/// # Errors
/// [`ConflictError`] if `desired` is inconsistent, or `part` conflicts with foreign objects.
pub(crate) fn plan_extension(
    part: &Desired,
    desired: &Desired,
    facts: &[Fact],
    owned: &[Fact],
    observed: &Observed,
) -> Result<Plan, ConflictError> {
    check(desired)?;
    check_surroundings(part, owned, observed)?;
    Ok(difference(facts, &[], observed))
}

fn difference(facts: &[Fact], owned: &[Fact], observed: &Observed) -> Plan {
    let wanted: BTreeSet<&Fact> = facts.iter().collect();
    let mut holding = observed.facts.clone();
    // Rules that are modified, or those of a killed process, do not hold but may exist. Removing
    // missing rules is cheap.
    let is_ruleset = |fact: &&Fact| matches!(fact, Fact::Ruleset { .. });
    holding.extend(owned.iter().filter(is_ruleset).filter(|fact| !wanted.contains(fact)).cloned());
    let mut model = KernelModel::new(holding);
    let mut ops = removals(owned.iter().filter(|fact| !wanted.contains(fact)), &mut model);
    for fact in facts {
        if !model.holds(fact) {
            let op = Op::Add(fact.clone());
            model.execute(&op);
            ops.push(op);
        }
    }
    Plan { ops }
}

/// Returns the operations that remove those of `facts` that hold in `model`, in reverse order, and
/// applies them to `model`.
///
/// Links come first. The facts on them are removed implicitly, and the rules that isolate a network
/// outlive it.
pub(crate) fn removals<'a>(
    facts: impl IntoIterator<Item = &'a Fact, IntoIter: DoubleEndedIterator>,
    model: &mut KernelModel,
) -> Vec<Op> {
    let mut ops = Vec::new();
    let mut rest: Vec<&Fact> = facts.into_iter().rev().collect();
    for kind in [Fact::is_link, |fact: &Fact| !fact.is_removed_with_link(), |_: &Fact| true] {
        let these: Vec<&Fact>;
        (these, rest) = rest.into_iter().partition(|fact| kind(fact));
        let held: BTreeSet<&Fact> =
            these.iter().copied().filter(|fact| model.holds(fact)).collect();
        model.remove(held.iter().copied());
        let mut seen = BTreeSet::new();
        ops.extend(
            these
                .into_iter()
                .filter(|fact| held.contains(fact) && seen.insert(*fact))
                .map(|fact| Op::Remove(fact.clone())),
        );
    }
    ops
}

/// Who has an address.
enum Holder<'a> {
    Network(&'a str),
    Endpoint(&'a str),
}

impl fmt::Display for Holder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(name) => write!(f, "the gateway of network {name:?}"),
            Self::Endpoint(name) => write!(f, "endpoint {name:?}"),
        }
    }
}

/// Checks `desired` for inconsistencies.
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
    let mut addresses: BTreeMap<(&str, IpAddr), Holder> = BTreeMap::new();
    for network in &desired.networks {
        for subnet in &network.subnets {
            addresses.insert((&network.name, subnet.gateway), Holder::Network(&network.name));
        }
    }
    let networks: BTreeMap<&str, &Network> =
        desired.networks.iter().map(|network| (network.name.as_str(), network)).collect();
    for endpoint in &desired.endpoints {
        for attachment in &endpoint.attachments {
            check_name(&attachment.host_end)?;
            check_name(&attachment.inside)?;
            let Some(network) = networks.get(attachment.network.as_str()) else {
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
                let holder = Holder::Endpoint(&endpoint.name);
                if let Some(holder) = addresses.insert((&network.name, address.addr()), holder) {
                    return Err(ConflictError::AddressInUse {
                        endpoint: endpoint.name.clone(),
                        address: address.addr(),
                        holder: holder.to_string(),
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
    if name.len() > MAX_NAME_LENGTH {
        return Err(ConflictError::NameTooLong { name: name.clone(), longest: MAX_NAME_LENGTH });
    }
    // iptables reads a `+` at the end as a wildcard.
    let wildcard = name.ends_with('+');
    if name.is_empty() || name == "." || name == ".." || wildcard || name.bytes().any(bad) {
        return Err(ConflictError::BadName(name.clone()));
    }
    Ok(())
}

/// Checks `desired` for conflicts with routes and links of the host.
///
/// A route to a larger prefix is no conflict, because the route of the bridge is more specific: a
/// default route, the two halves installed by a VPN, or the 10.0.0.0/8 of a company. A route to the
/// subnet or to a part of it is a conflict.
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

/// Checks that no foreign link has the name of a link of `desired`.
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

/// Checks that an existing link with this name is not foreign.
pub(crate) fn check_free(
    observed: &Observed,
    place: &Place,
    interface: &Interface,
) -> Result<(), ConflictError> {
    match observed.links.get(place).and_then(|links| links.get(&interface.name)) {
        Some(link) if !link.is(interface) => {
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
