//! Fair sharing of the conntrack table between networks and addresses.
//!
//! With a firewall, each flow of a container has an entry in the host's conntrack table, which all
//! containers and the host share. When the table is full, the kernel evicts entries that are not
//! assured; if there are none, it drops the first packet of every new flow. An established TCP
//! connection is assured and expires after five days. A container and a cooperating external host
//! can therefore fill the table.
//!
//! Flows are evicted before the table is full: from the largest [group](Group), and within it from
//! the address with the most flows, longest idle first. Flows of other owners count towards the
//! comparison, but only flows of this owner are evicted. An owner thus loses no flows because of a
//! larger group of another owner.

use super::protocol_of;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tidegate_model::{Protocol, share_of};
use tidegate_netfilter::{Conntrack, Entry, EntryKey, TableFamily};

const FAMILIES: [TableFamily; 2] = [TableFamily::Ipv4, TableFamily::Ipv6];

/// Flows that were evicted from the conntrack table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvictedFlows {
    /// Number of flows.
    pub flows: usize,
    /// The address with the most flows among those that lost flows, a container or a client of
    /// published ports, and its number of flows before the eviction.
    pub largest: Option<(IpAddr, usize)>,
}

/// A set of flows that is reduced as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    /// Flows created by the containers of a network, by index.
    Egress(usize),
    /// Flows to the containers of a network, by index, through ports that the kernel forwards.
    Ingress(usize),
    /// Connections to published ports that userspace sockets serve. They continue after the
    /// eviction, because they have no NAT.
    Ports,
    /// Flows of other programs and projects, by /24 or /64. They are not evicted.
    Other(IpAddr),
}

impl Group {
    fn may_be_evicted(self) -> bool {
        !matches!(self, Self::Other(_))
    }
}

/// The group and the address to which a flow is charged.
type Holder = (Group, IpAddr);

/// The networks of the owner, each as its subnets, and its published ports.
pub(super) struct Owned {
    pub(super) networks: Vec<Vec<IpNet>>,
    /// The link-local addresses of the containers of each network. They belong to no subnet, and
    /// reach services of the host.
    pub(super) link_local: Vec<BTreeSet<Ipv6Addr>>,
    pub(super) ports: BTreeSet<(Protocol, u16)>,
}

impl Owned {
    /// Returns the holder to which `entry` is charged.
    fn holder(&self, entry: &Entry<'_>) -> Holder {
        let network_of = |ip: IpAddr| {
            let has = |subnets: &Vec<IpNet>| subnets.iter().any(|subnet| subnet.contains(&ip));
            let is_member = |members: &BTreeSet<Ipv6Addr>| match ip {
                IpAddr::V6(v6) => members.contains(&v6),
                IpAddr::V4(_) => false,
            };
            let network = self.networks.iter().position(has);
            network.or_else(|| self.link_local.iter().position(is_member))
        };
        let client = match entry.client {
            // The link-local addresses of all containers are in one /64.
            IpAddr::V6(v6) if v6.is_unicast_link_local() => entry.client,
            client => share_of(client),
        };
        if let Some(network) = network_of(entry.client) {
            (Group::Egress(network), entry.client)
        } else if let Some(network) = network_of(entry.server) {
            (Group::Ingress(network), client)
        } else if self.is_published(entry) {
            (Group::Ports, client)
        } else {
            (Group::Other(block_of(entry.client)), client)
        }
    }

    /// Returns whether the destination of the flow is a published port, at any address.
    fn is_published(&self, entry: &Entry<'_>) -> bool {
        entry
            .flow
            .is_some_and(|flow| self.ports.contains(&(protocol_of(&flow), flow.destination.port())))
    }
}

/// Returns the /24 of an IPv4 address, or the /64 of an IPv6 address.
fn block_of(ip: IpAddr) -> IpAddr {
    match share_of(ip) {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            Ipv4Addr::new(a, b, c, 0).into()
        }
        v6 => v6,
    }
}

/// Returns the highest count such that reducing all larger `counts` to it frees `excess`
/// entries or more.
fn level(counts: impl Iterator<Item = usize>, excess: usize) -> usize {
    let mut counts: Vec<usize> = counts.collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let mut sum = 0;
    for (number, count) in counts.iter().enumerate() {
        sum += count;
        let (holders, next) = (number + 1, counts.get(number + 1).copied().unwrap_or(0));
        // Reducing the first `holders` to the next lower count frees `sum - holders * next`
        // entries.
        if sum - holders * next >= excess {
            return sum.saturating_sub(excess) / holders;
        }
    }
    0
}

/// Returns the number of flows that each holder loses. The numbers would free `excess` entries if
/// every group could be reduced.
fn reductions(held: &BTreeMap<Holder, usize>, excess: usize) -> BTreeMap<Holder, usize> {
    let mut groups: BTreeMap<Group, usize> = BTreeMap::new();
    for ((group, _), flows) in held {
        *groups.entry(*group).or_default() += flows;
    }
    let highest = level(groups.values().copied(), excess);
    let mut reductions = BTreeMap::new();
    for (group, flows) in groups.into_iter().filter(|(group, _)| group.may_be_evicted()) {
        let Some(excess) = flows.checked_sub(highest).filter(|excess| *excess > 0) else {
            continue;
        };
        let own = || held.iter().filter(|((of, _), _)| *of == group);
        let highest = level(own().map(|(_, flows)| *flows), excess);
        let reduced = own().map(|(holder, flows)| (*holder, flows.saturating_sub(highest)));
        reductions.extend(reduced.filter(|(_, flows)| *flows > 0));
    }
    reductions
}

/// Evicts assured flows of `owned` if the table has more than `limit` assured entries. Five sixths
/// of the limit remain, or more if the largest groups belong to others.
///
/// # Errors
/// Errors of the kernel.
pub(super) fn evict(owned: &Owned, limit: usize) -> io::Result<EvictedFlows> {
    let mut conntrack = Conntrack::open()?;
    let (mut assured, mut held) = (0_usize, BTreeMap::<Holder, usize>::new());
    conntrack.for_each(&FAMILIES, |entry| {
        if entry.is_assured() {
            assured += 1;
            *held.entry(owned.holder(entry)).or_default() += 1;
        }
    })?;
    if assured <= limit {
        return Ok(EvictedFlows::default());
    }
    let reductions = reductions(&held, assured - limit + limit / 6);
    if reductions.is_empty() {
        return Ok(EvictedFlows::default());
    }
    let mut candidates: BTreeMap<Holder, Vec<(u32, EntryKey)>> = BTreeMap::new();
    conntrack.for_each(&FAMILIES, |entry| {
        if entry.is_assured() {
            let holder = owned.holder(entry);
            if reductions.contains_key(&holder) {
                candidates.entry(holder).or_default().push((entry.remaining(), entry.key()));
            }
        }
    })?;
    let mut flows = 0;
    for (holder, mut entries) in candidates {
        entries.sort_unstable_by_key(|(remaining, _)| *remaining);
        let reduction = reductions.get(&holder).copied().unwrap_or(0);
        let longest_idle = entries.into_iter().take(reduction).map(|(_, key)| key);
        flows += conntrack.delete_entries(longest_idle)?;
    }
    let largest = held
        .into_iter()
        .filter(|(holder, _)| reductions.contains_key(holder))
        .max_by_key(|(_, flows)| *flows)
        .map(|((_, ip), flows)| (ip, flows));
    Ok(EvictedFlows { flows, largest })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(last: u8) -> IpAddr {
        [10, 9, 0, last].into()
    }

    const EGRESS: [Group; 2] = [Group::Egress(0), Group::Egress(1)];

    #[test]
    fn the_largest_holder_loses_all_that_is_needed() {
        let held = BTreeMap::from([
            ((EGRESS[0], ip(2)), 900),
            ((EGRESS[0], ip(3)), 50),
            ((EGRESS[1], ip(4)), 60),
        ]);
        assert_eq!(reductions(&held, 300), BTreeMap::from([((EGRESS[0], ip(2)), 300)]));
    }

    #[test]
    fn many_addresses_of_one_network_count_as_one() {
        let mut held: BTreeMap<Holder, usize> =
            (2..102).map(|last| ((EGRESS[0], ip(last)), 8)).collect();
        held.insert((EGRESS[1], ip(200)), 200);
        let reductions = reductions(&held, 300);
        assert!(reductions.keys().all(|(group, _)| *group == EGRESS[0]), "{reductions:?}");
        assert!(reductions.values().sum::<usize>() >= 300, "{reductions:?}");
    }

    #[test]
    fn clients_of_published_ports_do_not_reduce_the_flows_of_containers() {
        let mut held: BTreeMap<Holder, usize> =
            (2..67).map(|last| ((Group::Ingress(0), ip(last)), 90)).collect();
        held.insert((EGRESS[0], ip(200)), 1000);
        assert!(reductions(&held, 1900).keys().all(|(group, _)| *group == Group::Ingress(0)));
    }

    #[test]
    fn nobody_yields_to_others_that_hold_more() {
        let other = Group::Other(block_of([198, 51, 100, 7].into()));
        let held = BTreeMap::from([((EGRESS[0], ip(2)), 1000), ((other, ip(9)), 5900)]);
        assert_eq!(reductions(&held, 1900), BTreeMap::new());
    }

    proptest! {
        #[test]
        fn the_level_frees_enough_and_not_much_more(
            counts in prop::collection::vec(0_usize..1000, 1..20),
            part in 0_usize..100,
        ) {
            let excess = counts.iter().sum::<usize>() * part / 100;
            let level = level(counts.iter().copied(), excess);
            let freed: usize = counts.iter().map(|count| count.saturating_sub(level)).sum();
            prop_assert!(freed >= excess && freed < excess + counts.len());
        }
    }
}
