//! Shares of the conntrack table.
//!
//! With a firewall, each flow of a container has an entry in the conntrack table of the host, which
//! all containers and the host share. When the table is full, the kernel evicts entries that are
//! not assured, and then refuses new flows of everybody. An established TCP connection is assured
//! and expires after five days. A container with an accomplice outside can therefore fill the
//! table.
//!
//! Before the table is full, the network with the most assured flows loses some, and in it the
//! address with the most, the longest idle first.

use ipnet::IpNet;
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use tidegate_model::share_of;
use tidegate_netfilter::{Conntrack, Entry, EntryKey, Flow, TableFamily};

/// Share of the limit that each network, and each address in it, may always use: one part of this.
const GUARANTEED_TO_NETWORK: usize = 16;
const GUARANTEED_TO_ADDRESS: usize = 64;

const FAMILIES: [TableFamily; 2] = [TableFamily::Ipv4, TableFamily::Ipv6];

/// Flows that were evicted from the conntrack table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvictedFlows {
    /// Number of flows.
    pub flows: usize,
    /// The address that had the most, a container or a client of published ports, and its flows
    /// before.
    pub largest: Option<(IpAddr, usize)>,
}

/// What counts for a flow: the index of its network, and an address.
type Holder = (usize, IpAddr);

/// Returns the holder of `flow`: the container that has opened it, or its client from outside, and
/// the network of the container. `None` if the flow concerns no network.
fn holder(flow: &Flow, networks: &[Vec<IpNet>]) -> Option<Holder> {
    let network_of = |ip: IpAddr| {
        networks.iter().position(|subnets| subnets.iter().any(|subnet| subnet.contains(&ip)))
    };
    let (client, server) = (flow.client.ip(), flow.server.ip());
    network_of(client)
        .map(|network| (network, client))
        .or_else(|| Some((network_of(server)?, share_of(client))))
}

/// Returns the highest level to which holders of `counts` are reduced to free `excess` places. It
/// is at least `guaranteed`.
fn level(counts: impl Iterator<Item = usize>, excess: usize, guaranteed: usize) -> usize {
    let mut counts: Vec<usize> = counts.collect();
    counts.sort_unstable_by(|a, b| b.cmp(a));
    let mut sum = 0;
    for (number, count) in counts.iter().enumerate() {
        sum += count;
        let (holders, next) = (number + 1, counts.get(number + 1).copied().unwrap_or(0));
        // Reducing the first `holders` to the next lower count frees this many.
        if sum - holders * next >= excess {
            return (sum.saturating_sub(excess) / holders).max(guaranteed);
        }
    }
    guaranteed
}

/// Returns the flows that each holder loses so that `excess` places become free.
fn reductions(
    held: &BTreeMap<Holder, usize>,
    excess: usize,
    limit: usize,
) -> BTreeMap<Holder, usize> {
    let mut networks: BTreeMap<usize, usize> = BTreeMap::new();
    for ((network, _), flows) in held {
        *networks.entry(*network).or_default() += flows;
    }
    let highest = level(networks.values().copied(), excess, limit / GUARANTEED_TO_NETWORK);
    let mut reductions = BTreeMap::new();
    for (network, flows) in networks {
        let Some(excess) = flows.checked_sub(highest).filter(|excess| *excess > 0) else {
            continue;
        };
        let own = || held.iter().filter(|((of, _), _)| *of == network);
        let guaranteed = limit / GUARANTEED_TO_ADDRESS;
        let highest = level(own().map(|(_, flows)| *flows), excess, guaranteed);
        let reduced = own().map(|(holder, flows)| (*holder, flows.saturating_sub(highest)));
        reductions.extend(reduced.filter(|(_, flows)| *flows > 0));
    }
    reductions
}

/// Evicts assured flows of `networks`, each given by its subnets, if the table has more than
/// `limit` assured entries. A sixth of the limit becomes free, as far as shares permit.
///
/// # Errors
/// Errors of the kernel.
pub(super) fn evict(networks: &[Vec<IpNet>], limit: usize) -> io::Result<EvictedFlows> {
    let mut conntrack = Conntrack::open()?;
    let (mut assured, mut held) = (0_usize, BTreeMap::<Holder, usize>::new());
    let count = |entry: &Entry<'_>| {
        if entry.is_assured() {
            assured += 1;
            if let Some(holder) = holder(&entry.flow, networks) {
                *held.entry(holder).or_default() += 1;
            }
        }
    };
    conntrack.for_each(&FAMILIES, count)?;
    if assured <= limit {
        return Ok(EvictedFlows::default());
    }
    let reductions = reductions(&held, assured - limit + limit / 6, limit);
    let mut candidates: BTreeMap<Holder, Vec<(u32, EntryKey)>> = BTreeMap::new();
    conntrack.for_each(&FAMILIES, |entry| {
        if let Some(holder) = holder(&entry.flow, networks)
            && entry.is_assured()
            && reductions.contains_key(&holder)
        {
            candidates.entry(holder).or_default().push((entry.remaining(), entry.key()));
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

    #[test]
    fn the_largest_holder_loses_all_that_is_needed() {
        let held = BTreeMap::from([((0, ip(2)), 900), ((0, ip(3)), 50), ((1, ip(4)), 60)]);
        assert_eq!(reductions(&held, 300, 1000), BTreeMap::from([((0, ip(2)), 300)]));
    }

    #[test]
    fn many_addresses_of_one_network_count_as_one() {
        let mut held: BTreeMap<Holder, usize> = (2..102).map(|last| ((0, ip(last)), 8)).collect();
        held.insert((1, ip(200)), 200);
        let reductions = reductions(&held, 300, 960);
        assert!(reductions.keys().all(|(network, _)| *network == 0), "{reductions:?}");
    }

    #[test]
    fn guaranteed_shares_stay() {
        // The table is full of flows of others.
        let held = BTreeMap::from([((0, ip(2)), 50), ((1, ip(3)), 60)]);
        assert_eq!(reductions(&held, 5000, 1000), BTreeMap::new());
    }

    proptest! {
        #[test]
        fn the_level_frees_enough_and_not_much_more(
            counts in prop::collection::vec(0_usize..1000, 1..20),
            part in 0_usize..100,
        ) {
            let excess = counts.iter().sum::<usize>() * part / 100;
            let level = level(counts.iter().copied(), excess, 0);
            let freed: usize = counts.iter().map(|count| count.saturating_sub(level)).sum();
            prop_assert!(freed >= excess && freed < excess + counts.len());
        }
    }
}
