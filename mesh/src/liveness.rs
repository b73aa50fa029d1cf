//! Which hosts are alive, by heartbeats. Pure: time is an argument.
//!
//! Every host sends a heartbeat to every other one each [`INTERVAL`]. A host is silent after
//! [`MISSED`] intervals. The cluster state is the truth about which endpoints exist; heartbeats
//! only decide whether the records of a host outlive its lease ([`Retention`]): an etcd without
//! quorum must not take endpoints away that work.
//!
//! A host is heard if it hears this one as well: a link may fail in one direction, and connections
//! need both. Its heartbeats echo those that it has received.
//!
//! A heartbeat has the revision of the cluster state that its sender has put into effect, so that a
//! host knows when the others have noticed a change ([`Liveness::noticed`]).
//!
//! A heartbeat is accepted only from the VTEP of the host that it names, and with the boot ID in
//! the record of that host. It is not encrypted: a sender that can use the address of a host can
//! send its heartbeats, and VXLAN packets as well.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::record::{Claim, Endpoint, EndpointKey, Node};
use crate::view::View;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tidegate_model::registry::fnv1a;

/// UDP port of heartbeats.
pub const PORT: u16 = 4788;

/// Interval of heartbeats.
pub const INTERVAL: Duration = Duration::from_millis(50);

/// Intervals without a heartbeat after which a host is silent. Three had false alarms under load.
const MISSED: u32 = 5;

/// Weight of a new latency in the moving average is one of this number.
const WEIGHT: u32 = 8;

/// Identifies heartbeats.
const MAGIC: [u8; 4] = *b"TGh1";

/// A heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// Index of the sender.
    pub index: u16,
    /// Hash of the boot ID of the sender.
    pub boot: u64,
    /// When it was sent, in nanoseconds of the clock of the sender.
    pub sent: u64,
    /// `sent` of the last heartbeat that the sender has received from the destination; 0 if none.
    pub echo: u64,
    /// Time between the reception of that one and the sending of this one, in nanoseconds.
    pub held: u64,
    /// The revision that the sender has put into effect.
    pub revision: u64,
}

impl Heartbeat {
    /// Length in bytes.
    pub const LENGTH: usize = 48;

    /// Encodes the heartbeat: magic, index, zeros, boot, sent, echo, held, revision, in network
    /// byte order.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.index.to_be_bytes());
        let values = [self.boot, self.sent, self.echo, self.held, self.revision];
        for (number, value) in values.into_iter().enumerate() {
            bytes[8 + 8 * number..][..8].copy_from_slice(&value.to_be_bytes());
        }
        bytes
    }

    /// Decodes a heartbeat. `None` if it is none.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::LENGTH] = bytes.try_into().ok()?;
        if bytes[..4] != MAGIC {
            return None;
        }
        let value = |at: usize| {
            bytes[at..].first_chunk().map(|chunk| u64::from_be_bytes(*chunk)).unwrap_or_default()
        };
        Some(Self {
            index: u16::from_be_bytes([bytes[4], bytes[5]]),
            boot: value(8),
            sent: value(16),
            echo: value(24),
            held: value(32),
            revision: value(40),
        })
    }
}

/// Hash of a boot ID, for [`Heartbeat::boot`].
#[must_use]
pub fn boot_hash(boot: &str) -> u64 {
    fnv1a(boot.as_bytes())
}

/// Whether a host is heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// It is heard.
    Heard,
    /// It has not been heard since then.
    Silent(Instant),
}

#[derive(Clone, Debug)]
struct Peer {
    node: Node,
    known_since: Instant,
    last: Option<Last>,
    /// When a heartbeat has arrived that was sent within [`MISSED`] intervals after one of this
    /// host had arrived there.
    mutual: Option<Instant>,
    /// Moving average of the round-trip time.
    latency: Option<Duration>,
    /// The revision that it has put into effect.
    revision: u64,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    received: Instant,
    sent: u64,
}

/// The other hosts, as heard by one.
#[derive(Clone, Debug)]
pub struct Liveness {
    /// Zero of the clock in heartbeats.
    epoch: Instant,
    peers: BTreeMap<String, Peer>,
}

impl Liveness {
    /// Creates a table without hosts.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        // Heartbeats without an echo have 0.
        let epoch = now.checked_sub(Duration::from_nanos(1)).unwrap_or(now);
        Self { epoch, peers: BTreeMap::new() }
    }

    /// Sets the other hosts, by ID. One with another boot ID is another one.
    pub fn set_peers<'a>(
        &mut self,
        nodes: impl Iterator<Item = (&'a String, &'a Node)>,
        now: Instant,
    ) {
        let mut known = std::mem::take(&mut self.peers);
        for (id, node) in nodes {
            let peer = known
                .remove(id)
                .filter(|peer| (&peer.node.boot, peer.node.vtep) == (&node.boot, node.vtep));
            let new = || Peer {
                node: node.clone(),
                known_since: now,
                last: None,
                mutual: None,
                latency: None,
                revision: 0,
            };
            let peer = peer.map(|peer| Peer { node: node.clone(), ..peer });
            self.peers.insert(id.clone(), peer.unwrap_or_else(new));
        }
    }

    /// Handles a datagram from `source`. Returns the ID of the host, if it is a heartbeat of one.
    pub fn receive(&mut self, bytes: &[u8], source: IpAddr, now: Instant) -> Option<&str> {
        let beat = Heartbeat::decode(bytes)?;
        let (id, peer) = self.peers.iter_mut().find(|(_, peer)| {
            peer.node.index == beat.index
                && peer.node.vtep == source
                && boot_hash(&peer.node.boot) == beat.boot
        })?;
        peer.last = Some(Last { received: now, sent: beat.sent });
        peer.revision = beat.revision;
        if beat.echo > 0 && Duration::from_nanos(beat.held) < INTERVAL * MISSED {
            peer.mutual = Some(now);
        }
        let clock = nanoseconds(now, self.epoch);
        if beat.echo > 0
            && let Some(round_trip) = clock.checked_sub(beat.echo)
            && let Some(latency) = round_trip.checked_sub(beat.held)
        {
            let latency = Duration::from_nanos(latency);
            peer.latency = Some(match peer.latency {
                Some(average) => average.mul_f64(1.0 - 1.0 / f64::from(WEIGHT)) + latency / WEIGHT,
                None => latency,
            });
        }
        Some(id)
    }

    /// The heartbeats to send at `now` by the host with `index` and `boot`, which has put
    /// `revision` into effect, with their destinations.
    pub fn heartbeats(
        &self,
        index: u16,
        boot: &str,
        revision: u64,
        now: Instant,
    ) -> impl Iterator<Item = (IpAddr, Heartbeat)> {
        let boot = boot_hash(boot);
        self.peers.values().map(move |peer| {
            let held = peer.last.map(|last| now.saturating_duration_since(last.received));
            let beat = Heartbeat {
                index,
                boot,
                sent: nanoseconds(now, self.epoch),
                echo: peer.last.map_or(0, |last| last.sent),
                held: held.map_or(0, |held| held.as_nanos() as u64),
                revision,
            };
            (peer.node.vtep, beat)
        })
    }

    /// Whether all hosts that are heard at `now` have put `revision` into effect.
    #[must_use]
    pub fn noticed(&self, revision: u64, now: Instant) -> bool {
        let heard =
            self.peers.iter().filter(|(id, _)| self.hearing(id, now) == Some(Hearing::Heard));
        heard.into_iter().all(|(_, peer)| peer.revision >= revision)
    }

    /// Whether the host `id` is heard at `now`. `None` if it is not in the table.
    #[must_use]
    pub fn hearing(&self, id: &str, now: Instant) -> Option<Hearing> {
        let peer = self.peers.get(id)?;
        let since = peer.mutual.unwrap_or(peer.known_since);
        let is_heard =
            peer.mutual.is_some() && now.saturating_duration_since(since) < INTERVAL * MISSED;
        Some(if is_heard { Hearing::Heard } else { Hearing::Silent(since) })
    }

    /// The mean round-trip time to the host `id`.
    #[must_use]
    pub fn latency(&self, id: &str) -> Option<Duration> {
        self.peers.get(id)?.latency
    }
}

fn nanoseconds(now: Instant, epoch: Instant) -> u64 {
    now.saturating_duration_since(epoch).as_nanos() as u64
}

/// Hosts and endpoints whose records have ended with a lease, and that are kept.
#[derive(Clone, Debug, Default)]
pub struct Retention {
    nodes: BTreeMap<String, Node>,
    endpoints: BTreeMap<EndpointKey, Endpoint>,
}

impl Retention {
    /// Adds to `view` the hosts and endpoints of earlier views whose records are missing, while
    /// their host `is_heard` and they still hold their claims. What a host removes itself has no
    /// claim.
    pub fn extend(&mut self, view: &mut View, is_heard: impl Fn(&str) -> bool) {
        for (id, node) in &self.nodes {
            let is_member = view.node_indexes.get(&node.index) == Some(id);
            if is_member && is_heard(id) && !view.nodes.contains_key(id) {
                view.nodes.insert(id.clone(), node.clone());
            }
        }
        for (key, endpoint) in &self.endpoints {
            let (network, name) = key;
            let own = Claim::Endpoint { name: name.clone(), node: endpoint.node.clone() };
            let is_claimed = endpoint
                .addresses
                .iter()
                .all(|address| view.addresses.get(&(network.clone(), *address)) == Some(&own));
            if is_claimed
                && !view.endpoints.contains_key(key)
                && view.networks.contains_key(network)
                && view.nodes.contains_key(&endpoint.node)
                && is_heard(&endpoint.node)
            {
                view.endpoints.insert(key.clone(), endpoint.clone());
            }
        }
        self.nodes.clone_from(&view.nodes);
        self.endpoints.clone_from(&view.endpoints);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(index: u16, boot: &str) -> Node {
        let [_, last] = index.to_be_bytes();
        let vtep = [192, 0, 2, last].into();
        Node { index, vtep, boot: boot.into(), machine: String::new(), mtu: 1500 }
    }

    fn beat(index: u16, boot: &str) -> Heartbeat {
        Heartbeat { index, boot: boot_hash(boot), sent: 1, echo: 1, held: 0, revision: 7 }
    }

    proptest! {
        #[test]
        fn a_heartbeat_is_read_as_it_was_written(
            index: u16, boot: u64, sent: u64, echo: u64, held: u64, revision: u64
        ) {
            let beat = Heartbeat { index, boot, sent, echo, held, revision };
            prop_assert_eq!(Heartbeat::decode(&beat.encode()), Some(beat));
        }

        #[test]
        fn any_bytes_are_a_heartbeat_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            if let Some(beat) = Heartbeat::decode(&bytes) {
                prop_assert_eq!(&beat.encode()[8..], &bytes[8..]);
            }
        }
    }

    #[test]
    fn a_host_is_silent_after_five_intervals() {
        let begin = Instant::now();
        let mut table = Liveness::new(begin);
        let (id, one) = ("a".to_owned(), node(1, "x"));
        table.set_peers([(&id, &one)].into_iter(), begin);
        assert_eq!(table.hearing("a", begin), Some(Hearing::Silent(begin)), "never heard");
        assert_eq!(table.hearing("b", begin), None);
        assert_eq!(table.receive(&beat(1, "x").encode(), one.vtep, begin), Some("a"));
        // It does not hear this host.
        let deaf = Heartbeat { echo: 0, ..beat(1, "x") };
        let outdated = Heartbeat { held: (INTERVAL * 5).as_nanos() as u64, ..beat(1, "x") };
        for beat in [deaf, outdated] {
            table.receive(&beat.encode(), one.vtep, begin + INTERVAL * 4);
        }
        assert_eq!(table.hearing("a", begin + INTERVAL * 5), Some(Hearing::Silent(begin)));
        assert!(table.noticed(7, begin) && !table.noticed(8, begin));
        assert!(table.noticed(8, begin + INTERVAL * 5), "a silent host is not waited for");
        assert_eq!(table.hearing("a", begin + INTERVAL * 4), Some(Hearing::Heard));
        assert_eq!(table.hearing("a", begin + INTERVAL * 5), Some(Hearing::Silent(begin)));
        // Its record was written again, then it has booted again.
        table.set_peers([(&id, &Node { mtu: 1400, ..one })].into_iter(), begin);
        assert_eq!(table.hearing("a", begin), Some(Hearing::Heard));
        table.set_peers([(&id, &node(1, "y"))].into_iter(), begin);
        assert_eq!(table.hearing("a", begin), Some(Hearing::Silent(begin)));
    }

    #[test]
    fn heartbeats_of_others_are_ignored() {
        let now = Instant::now();
        let mut table = Liveness::new(now);
        let one = node(1, "x");
        table.set_peers([(&"a".to_owned(), &one)].into_iter(), now);
        assert_eq!(table.receive(&beat(1, "x").encode(), [192, 0, 2, 9].into(), now), None);
        assert_eq!(table.receive(&beat(2, "x").encode(), one.vtep, now), None);
        assert_eq!(table.receive(&beat(1, "y").encode(), one.vtep, now), None, "a previous boot");
        assert_eq!(table.receive(b"TGh1", one.vtep, now), None);
    }

    #[test]
    fn latency_excludes_the_time_at_the_other_host() {
        let begin = Instant::now();
        let (mut a, mut b) = (Liveness::new(begin), Liveness::new(begin));
        a.set_peers([(&"b".to_owned(), &node(2, "b"))].into_iter(), begin);
        b.set_peers([(&"a".to_owned(), &node(1, "a"))].into_iter(), begin);
        let ms = |number| begin + Duration::from_millis(number);
        let (_, beat) = a.heartbeats(1, "a", 0, ms(10)).next().unwrap();
        b.receive(&beat.encode(), node(1, "a").vtep, ms(13)).unwrap();
        let (to, answer) = b.heartbeats(2, "b", 0, ms(50)).next().unwrap();
        assert_eq!(to, node(1, "a").vtep);
        a.receive(&answer.encode(), node(2, "b").vtep, ms(52)).unwrap();
        assert_eq!(a.latency("b"), Some(Duration::from_millis(5)));
    }

    #[test]
    fn endpoints_of_a_heard_host_outlive_its_lease() {
        use crate::record::{EndpointState, Network, Role};
        let entry = ("front".to_owned(), "web".to_owned());
        let address = IpAddr::from([10, 9, 0, 2]);
        let mut full = View::default();
        full.nodes.insert("a".into(), node(1, "x"));
        full.node_indexes.insert(1, "a".into());
        let network = Network { vni: 9, subnets: Vec::new(), mtu: 1450, internal: false };
        full.networks.insert("front".into(), network);
        let endpoint = Endpoint {
            node: "a".into(),
            generation: 1,
            addresses: vec![address],
            mac: tidegate_model::MacAddress([2; 6]),
            state: EndpointState::Ready,
            aliases: Vec::new(),
            hostname: None,
            role: Role::Container,
        };
        full.endpoints.insert(entry.clone(), endpoint);
        let claim = Claim::Endpoint { name: "web".into(), node: "a".into() };
        full.addresses.insert(("front".into(), address), claim);
        let mut retention = Retention::default();
        let mut seen = |view: &View, heard: bool| {
            let mut view = view.clone();
            retention.extend(&mut view, |_| heard);
            (view.nodes.len(), view.endpoints.len())
        };
        assert_eq!(seen(&full, false), (1, 1), "its records exist");
        let mut ended = full.clone();
        ended.nodes.clear();
        ended.endpoints.clear();
        assert_eq!(seen(&ended, true), (1, 1), "the lease has ended, the host is heard");
        let mut released = ended.clone();
        let key = ("front".to_owned(), address);
        released.addresses.insert(key, Claim::Quarantined(9));
        assert_eq!(seen(&released, true), (1, 0), "the host has removed the endpoint");
        assert_eq!(seen(&full, true), (1, 1));
        assert_eq!(seen(&ended, false), (0, 0), "the host is silent");
        assert_eq!(seen(&ended, true), (0, 0), "gone for good until it registers again");
    }
}
