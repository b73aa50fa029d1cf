//! Fair queueing: deficit round robin between networks, and between the endpoints of a network.
//!
//! # Theory of operation
//! Each endpoint has a FIFO queue. Queues are served by deficit round robin (Shreedhar and
//! Varghese, 1995): the current queue is served until its deficit is used up, and gains a quantum
//! at the end of each turn. The algorithm runs at two levels: between networks, and between the
//! endpoints of the current network. An endpoint that spoofs source addresses therefore gains
//! nothing beyond the share of its network.
//!
//! As in FQ-CoDel (RFC 8290 section 4.2), a queue that was empty enters a list of new queues, which
//! is served first. It moves to the end of the list of old queues when it has used up its quantum
//! or is empty. So a sparse endpoint is served before the backlog of others, and cannot stay ahead
//! by sending more.
//!
//! Each item has a cost, which is charged to the deficits. It represents the work of serving the
//! item, not only its bytes.
//!
//! The queue is limited in items and bytes. At a limit, the endpoint with the longest queue, in the
//! network with the longest queue, drops from the head. Head drop notifies the sender soonest (as
//! in RFC 8290 section 4.1.2).

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;

/// Limits and quantum of a [`FairQueue`].
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Maximum number of items.
    pub items: usize,
    /// Maximum number of bytes.
    pub bytes: usize,
    /// Cost that may be served per turn.
    pub quantum: u32,
}

#[derive(Debug)]
struct Item<T> {
    cost: u32,
    bytes: usize,
    value: T,
}

/// Round-robin order: new queues first, then old ones.
#[derive(Debug)]
struct Schedule<K> {
    new: VecDeque<K>,
    old: VecDeque<K>,
}

impl<K> Default for Schedule<K> {
    fn default() -> Self {
        Self { new: VecDeque::new(), old: VecDeque::new() }
    }
}

impl<K: Copy> Schedule<K> {
    /// The current queue.
    fn first(&self) -> Option<K> {
        self.new.front().or(self.old.front()).copied()
    }

    /// Ends the turn of the current queue.
    fn rotate(&mut self) {
        if let Some(key) = self.new.pop_front().or_else(|| self.old.pop_front()) {
            self.old.push_back(key);
        }
    }

    /// Retires the current queue, which is empty. A new queue moves to the old ones, unless there
    /// are none. Returns whether the queue was removed from the schedule.
    fn retire(&mut self) -> bool {
        let Some(key) = self.new.pop_front() else { return self.old.pop_front().is_some() };
        if self.old.is_empty() {
            return true;
        }
        self.old.push_back(key);
        false
    }
}

#[derive(Debug)]
struct Endpoint<T> {
    queue: VecDeque<Item<T>>,
    bytes: usize,
    deficit: i64,
}

#[derive(Debug)]
struct Network<T> {
    endpoints: HashMap<IpAddr, Endpoint<T>>,
    schedule: Schedule<IpAddr>,
    bytes: usize,
    deficit: i64,
}

/// A fair queue; see the module.
#[derive(Debug)]
pub struct FairQueue<T> {
    limits: QueueLimits,
    networks: BTreeMap<u16, Network<T>>,
    schedule: Schedule<u16>,
    items: usize,
    bytes: usize,
}

impl<T> FairQueue<T> {
    /// Creates an empty queue without allocating.
    #[must_use]
    pub fn new(limits: QueueLimits) -> Self {
        Self {
            limits,
            networks: BTreeMap::new(),
            schedule: Schedule::default(),
            items: 0,
            bytes: 0,
        }
    }

    /// Number of queued items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items
    }

    /// Whether the queue is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items == 0
    }

    /// Number of queued bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds an item of `endpoint` in `network`. [`Self::drop_excess`] must be called afterwards.
    pub fn push(&mut self, network: u16, endpoint: IpAddr, cost: u32, bytes: usize, value: T) {
        // Minimum size of an item. It makes the limit of items a limit of bytes as well, so a
        // single measure determines the longest queue.
        let bytes = bytes.max(self.limits.bytes / self.limits.items.max(1));
        let quantum = i64::from(self.limits.quantum);
        let schedule = &mut self.schedule;
        let network_queue = self.networks.entry(network).or_insert_with(|| {
            schedule.new.push_back(network);
            Network {
                endpoints: HashMap::new(),
                schedule: Schedule::default(),
                bytes: 0,
                deficit: quantum,
            }
        });
        let schedule = &mut network_queue.schedule;
        let endpoint_queue = network_queue.endpoints.entry(endpoint).or_insert_with(|| {
            schedule.new.push_back(endpoint);
            Endpoint { queue: VecDeque::new(), bytes: 0, deficit: quantum }
        });
        endpoint_queue.queue.push_back(Item { cost, bytes, value });
        endpoint_queue.bytes += bytes;
        network_queue.bytes += bytes;
        self.bytes += bytes;
        self.items += 1;
    }

    /// Removes an item that exceeds the limits, and returns it with its endpoint. Must be called
    /// until it returns `None`.
    pub fn drop_excess(&mut self) -> Option<(IpAddr, T)> {
        if self.items <= self.limits.items && self.bytes <= self.limits.bytes {
            return None;
        }
        let network = self.networks.values_mut().max_by_key(|network| network.bytes)?;
        let (ip, endpoint) =
            network.endpoints.iter_mut().max_by_key(|(_, endpoint)| endpoint.bytes)?;
        let item = endpoint.queue.pop_front()?;
        endpoint.bytes -= item.bytes;
        network.bytes -= item.bytes;
        self.bytes -= item.bytes;
        self.items -= 1;
        Some((*ip, item.value))
    }

    /// Removes and returns the next item to serve.
    pub fn pop(&mut self) -> Option<T> {
        let quantum = i64::from(self.limits.quantum);
        loop {
            let number = self.schedule.first()?;
            let Some(network) = self.networks.get_mut(&number) else {
                self.schedule.retire();
                continue;
            };
            if network.deficit <= 0 {
                network.deficit += quantum;
                self.schedule.rotate();
                continue;
            }
            let Some(item) = network.pop(quantum) else {
                if network.endpoints.is_empty() && self.schedule.retire() {
                    self.networks.remove(&number);
                }
                continue;
            };
            network.deficit -= i64::from(item.cost);
            network.bytes -= item.bytes;
            self.bytes -= item.bytes;
            self.items -= 1;
            return Some(item.value);
        }
    }
}

impl<T> Network<T> {
    fn pop(&mut self, quantum: i64) -> Option<Item<T>> {
        loop {
            let ip = self.schedule.first()?;
            let Some(endpoint) = self.endpoints.get_mut(&ip) else {
                self.schedule.retire();
                continue;
            };
            if endpoint.deficit <= 0 {
                endpoint.deficit += quantum;
                self.schedule.rotate();
                continue;
            }
            let Some(item) = endpoint.queue.pop_front() else {
                if self.schedule.retire() {
                    self.endpoints.remove(&ip);
                }
                continue;
            };
            endpoint.bytes -= item.bytes;
            endpoint.deficit -= i64::from(item.cost);
            return Some(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    const LIMITS: QueueLimits = QueueLimits { items: 100, bytes: 10_000, quantum: 1000 };

    fn ip(host: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, host).into()
    }

    fn filled(pushes: impl IntoIterator<Item = (u16, u8, u32)>) -> FairQueue<(u16, u8)> {
        let limits = QueueLimits { items: 100_000, bytes: usize::MAX, ..LIMITS };
        let mut queue = FairQueue::new(limits);
        for (network, host, cost) in pushes {
            queue.push(network, ip(host), cost, cost as usize, (network, host));
        }
        queue
    }

    #[test]
    fn a_sparse_endpoint_is_served_before_the_backlog_of_another() {
        let mut queue = filled((0..500).map(|_| (1, 1, 500)));
        for _ in 0..50 {
            queue.pop();
        }
        queue.push(2, ip(2), 100, 100, (2, 2));
        queue.push(1, ip(3), 100, 100, (1, 3));
        let next: Vec<_> = (0..8).filter_map(|_| queue.pop()).collect();
        assert!(next[..4].contains(&(2, 2)), "{next:?}");
        assert!(next.contains(&(1, 3)), "{next:?}");
    }

    #[test]
    fn spoofed_addresses_do_not_increase_the_share_of_their_network() {
        let spoofed = (0..20).flat_map(|_| (1..=200).map(|host| (1, host, 100)));
        let mut queue = filled(spoofed.chain((0..400).map(|_| (2, 250, 100))));
        let served =
            (0..400).filter_map(|_| queue.pop()).filter(|(network, _)| *network == 2).count();
        assert!((180..=220).contains(&served), "{served} of 400");
    }

    #[test]
    fn many_small_items_are_dropped_before_a_few_large_ones() {
        let mut queue = FairQueue::new(LIMITS);
        for _ in 0..4 {
            queue.push(1, ip(2), 100, 1000, 2);
        }
        for _ in 0..200 {
            queue.push(1, ip(1), 100, 10, 1);
            while let Some((dropped, _)) = queue.drop_excess() {
                assert_eq!(dropped, ip(1));
            }
        }
    }

    #[test]
    fn shares_are_measured_by_cost() {
        let mut queue = filled((0..1000).flat_map(|_| [(1, 1, 2000), (2, 2, 100)]));
        let served: Vec<_> = (0..420).filter_map(|_| queue.pop()).collect();
        let expensive = served.iter().filter(|(network, _)| *network == 1).count();
        assert!((15..=25).contains(&expensive), "{expensive} of 420");
    }

    #[test]
    fn the_longest_queue_drops_its_head() {
        let mut queue = FairQueue::new(LIMITS);
        for number in 0..200u32 {
            queue.push(1, ip(1), 1, 10, number);
            if number % 10 == 0 {
                queue.push(1, ip(2), 1, 10, number + 1000);
            }
            while let Some((owner, _)) = queue.drop_excess() {
                assert_eq!(owner, ip(1));
            }
        }
        assert_eq!(queue.len(), 100);
        let left: Vec<_> =
            std::iter::from_fn(|| queue.pop()).filter(|number| *number < 1000).collect();
        assert_eq!(left, (120..200).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn limits_and_order_hold_and_no_item_is_lost(
            steps in prop::collection::vec((0u16..3, 0u8..5, 1u32..3000, 1usize..900, prop::bool::weighted(0.4)), 1..400),
        ) {
            let mut queue = FairQueue::new(LIMITS);
            let mut seen: HashMap<(u16, u8), u64> = HashMap::new();
            let (mut pushed, mut popped, mut dropped) = (0u64, 0, 0);
            let check = |seen: &mut HashMap<(u16, u8), u64>, (owner, number): ((u16, u8), u64)| {
                let last = seen.insert(owner, number);
                last.is_none_or(|last| last < number)
            };
            for (network, host, cost, bytes, pops) in steps {
                if pops {
                    let before = queue.len();
                    match queue.pop() {
                        Some(item) => {
                            popped += 1;
                            prop_assert!(check(&mut seen, item));
                        }
                        None => prop_assert_eq!(before, 0, "queued items are served"),
                    }
                } else {
                    pushed += 1;
                    queue.push(network, ip(host), cost, bytes, ((network, host), pushed));
                    while let Some((_, item)) = queue.drop_excess() {
                        dropped += 1;
                        prop_assert!(check(&mut seen, item));
                    }
                }
                prop_assert!(queue.len() <= LIMITS.items && queue.bytes() <= LIMITS.bytes);
            }
            while let Some(item) = queue.pop() {
                popped += 1;
                prop_assert!(check(&mut seen, item));
            }
            prop_assert_eq!(pushed, popped + dropped);
            prop_assert_eq!((queue.len(), queue.bytes()), (0, 0));
            prop_assert!(queue.networks.is_empty(), "empty queues are removed");
        }

        #[test]
        fn backlogged_endpoints_get_equal_shares_for_any_cost(
            first in 1u32..1500, second in 1u32..1500, same in any::<bool>(),
        ) {
            let network = if same { 1 } else { 2 };
            let mut queue = filled((0..3000).flat_map(|_| [(1, 1, first), (network, 2, second)]));
            let mut served = [0i64; 2];
            while served.iter().sum::<i64>() < 60_000 {
                let Some((_, host)) = queue.pop() else { break };
                served[usize::from(host) - 1] += i64::from(if host == 1 { first } else { second });
            }
            if queue.len() > 3000 {
                prop_assert!((served[0] - served[1]).abs() <= 4000, "{:?}", served);
            }
        }
    }
}
