//! The nftables back end.
//!
//! Networks and ports are stored in sets and maps. The number of rules that a packet passes
//! therefore does not depend on the number of networks and ports, and a port is opened or closed by
//! changing an element.

use super::ruleset::{MAPPED, MASQUERADED, is_source_port};
use super::{Backend, Opening, PortChange, Previous, Ruleset, Zone, link_scoped_prefixes};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tidegate_model::{Protocol, registry};
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Element, Field, Hook, Key, Kind, Match, Rule, Set,
    Table, Transport, Value,
};
use tidegate_netns::ChangeListener;

/// The rules of one owner. Its connection owns the table if the kernel supports that.
#[derive(Debug)]
pub(super) struct Nftables {
    connection: Connection,
    owns: bool,
    /// Ruleset generation at which the tables were known to be unmodified.
    unmodified_at: Option<u32>,
    /// Fingerprints of the unmodified tables, once recorded.
    fingerprints: Option<[Option<u64>; 2]>,
}

impl Nftables {
    /// Opens a connection in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut connection = Connection::open()?;
        let owns = connection.can_own().map_err(io::Error::other)?;
        Ok(Self { connection, owns, unmodified_at: None, fingerprints: None })
    }

    fn commit(&mut self, changes: &[Change]) -> io::Result<()> {
        self.connection.commit(changes).map_err(io::Error::other)
    }

    /// Commits `changes`. Returns whether no other program has changed the ruleset concurrently, so
    /// that the tables are known to be as intended.
    fn commit_exclusively(&mut self, changes: &[Change]) -> io::Result<bool> {
        let before = self.connection.generation()?;
        (self.unmodified_at, self.fingerprints) = (None, None);
        self.commit(changes)?;
        let after = self.connection.generation()?;
        self.unmodified_at = Some(after).filter(|_| after == before.wrapping_add(1));
        Ok(self.unmodified_at.is_some())
    }

    /// Returns whether the tables are unmodified. Reads all elements, unless the ruleset generation
    /// is unchanged.
    fn is_unmodified(&mut self, owner: &str) -> io::Result<bool> {
        let generation = self.connection.generation()?;
        if self.unmodified_at == Some(generation) {
            return Ok(true);
        }
        let Some(fingerprints) = self.fingerprints else { return Ok(false) };
        let same = self.read_fingerprints(owner)? == fingerprints;
        self.unmodified_at = Some(generation).filter(|_| same);
        Ok(same)
    }

    /// Returns whether the tables are complete. Of the tables of a previous process, only their
    /// existence is known.
    fn previous(&mut self, owner: &str) -> io::Result<Previous> {
        let complete = match self.fingerprints {
            Some(_) => self.is_unmodified(owner)?,
            None => self.read_fingerprints(owner)?[0].is_some(),
        };
        Ok(if complete { Previous::Complete } else { Previous::Changed })
    }

    /// Records the fingerprints of the tables, which are known to be unmodified. Returns false if
    /// the ruleset was changed meanwhile.
    fn read_unmodified(&mut self, owner: &str) -> io::Result<bool> {
        let fingerprints = self.read_fingerprints(owner)?;
        let unchanged = self.unmodified_at == Some(self.connection.generation()?);
        self.fingerprints = Some(fingerprints).filter(|_| unchanged);
        Ok(unchanged)
    }

    /// Returns fingerprints of the owner's table and of its part of the user table.
    fn read_fingerprints(&mut self, owner: &str) -> io::Result<[Option<u64>; 2]> {
        let table = table_name(owner);
        let own = match self.owns && self.connection.owns(&table)? {
            // Other processes cannot change an owned table.
            true => Some(0),
            false => self.connection.fingerprint(&table, |_| true)?,
        };
        let names = user_table_names(owner);
        let user_part = self
            .connection
            .fingerprint(registry::NFTABLES_USER_TABLE, |name| names.contains(name))?;
        Ok([own, user_part])
    }
}

impl Backend for Nftables {
    fn apply(&mut self, ruleset: &Ruleset) -> io::Result<Previous> {
        let previous = self.previous(&ruleset.owner)?;
        let replace = Change::Replace { table: table(ruleset), owned: self.owns };
        let part = Change::ReplacePart {
            part: user_table(ruleset),
            kept: registry::USER_CHAIN.to_owned(),
        };
        let changes = [replace, part];
        for attempt in 1..=ATTEMPTS {
            // The fingerprint is read immediately. Without it, a concurrent change by another
            // program, such as an instance that starts, would be taken for a change of these rules.
            // Their restoration would in turn look like a change to that instance, and so on.
            if self.commit_exclusively(&changes)? && self.read_unmodified(&ruleset.owner)? {
                break;
            }
            // Instances that start together would otherwise interfere with each other in step.
            std::thread::sleep(BACKOFF * (1 + std::process::id() % 7) * attempt);
        }
        // After persistent interference, `holds` returns false, and the rules are applied again.
        Ok(previous)
    }

    fn change_ports(&mut self, ruleset: &Ruleset, change: &PortChange) -> io::Result<Previous> {
        // Masquerade port ranges are part of rules, not of sets.
        let changes_source_ports =
            change.added.union(&change.removed).any(|port| is_source_port(&port.port));
        if changes_source_ports || !self.is_unmodified(&ruleset.owner)? {
            return self.apply(ruleset);
        }
        let mut changes = Vec::new();
        // Two ports may have the same target. The target stays in the set while one of them exists.
        let targets = |ports: &BTreeSet<Opening>| {
            ports.iter().filter_map(|port| port.to).collect::<BTreeSet<_>>()
        };
        let left = targets(&ruleset.ports);
        for family in &FAMILIES {
            let [added, removed] =
                [&change.added, &change.removed].map(|ports| port_sets(ports.iter(), family));
            for (added, mut removed) in added.into_iter().zip(removed) {
                if added.name == family.set("to") {
                    removed
                        .elements
                        .retain(|element| !left.iter().any(|target| is_to(element, *target)));
                }
                changes.push(Change::Elements {
                    table: table_name(&ruleset.owner),
                    added,
                    removed,
                });
            }
        }
        let of = |ports: &BTreeSet<Opening>| {
            let owner = ruleset.owner.clone();
            user_table(&Ruleset { ports: ports.clone(), owner, ..Ruleset::default() }).sets
        };
        for (added, removed) in of(&change.added).into_iter().zip(of(&change.removed)) {
            let table = registry::NFTABLES_USER_TABLE.to_owned();
            changes.push(Change::Elements { table, added, removed });
        }
        changes.retain(|change| match change {
            Change::Elements { added, removed, .. } => {
                !(added.elements.is_empty() && removed.elements.is_empty())
            }
            _ => true,
        });
        match self.commit_exclusively(&changes) {
            Ok(true) => Ok(Previous::Complete),
            // Another program has changed the rules, or may have, so apply all of them again.
            Ok(false) | Err(_) => self.apply(ruleset),
        }
    }

    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool> {
        self.is_unmodified(&ruleset.owner)
    }

    fn record_fingerprint(&mut self, owner: &str) -> io::Result<()> {
        if self.fingerprints.is_some() || !self.is_unmodified(owner)? {
            return Ok(());
        }
        self.read_unmodified(owner)?;
        Ok(())
    }

    fn remove(&mut self, owner: &str) -> io::Result<()> {
        (self.unmodified_at, self.fingerprints) = (None, None);
        let table = registry::NFTABLES_USER_TABLE.to_owned();
        let kept = registry::USER_CHAIN.to_owned();
        self.commit(&[
            Change::Remove { table: table_name(owner) },
            Change::RemovePart { table, names: user_table_names(owner), kept },
        ])
    }

    fn disable_ownership(&mut self) {
        self.owns = false;
    }

    fn changes(&self) -> io::Result<Option<ChangeListener>> {
        ChangeListener::of_rules().map(Some)
    }
}

/// Maximum attempts to apply rules while other programs change the ruleset.
const ATTEMPTS: u32 = 12;

/// Unit of the time between two attempts.
const BACKOFF: Duration = Duration::from_micros(200);

/// Returns whether `element` of a target set is `target`.
fn is_to(element: &Element, target: SocketAddr) -> bool {
    element.key.contains(&Value::Net(target.ip().into()))
        && element.key.contains(&Value::Port(target.port()))
}

/// Returns the names of the chains and sets of [`user_table`].
fn user_table_names(owner: &str) -> BTreeSet<String> {
    let part = user_table(&Ruleset { owner: owner.to_owned(), ..Ruleset::default() });
    let sets = part.sets.into_iter().map(|set| set.name);
    sets.chain(part.chains.into_iter().map(|chain| chain.name)).collect()
}

/// The address families and their nftables keys.
const FAMILIES: [Family; 2] = [
    Family {
        digit: '4',
        address: Field::Ipv4,
        source: Key::SourceV4,
        destination: Key::DestinationV4,
        original_source: Key::OriginalSourceV4,
        original_destination: Key::OriginalDestinationV4,
        reply_source: Key::ReplySourceV4,
        loopback: IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    },
    Family {
        digit: '6',
        address: Field::Ipv6,
        source: Key::SourceV6,
        destination: Key::DestinationV6,
        original_source: Key::OriginalSourceV6,
        original_destination: Key::OriginalDestinationV6,
        reply_source: Key::ReplySourceV6,
        loopback: IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
    },
];

struct Family {
    digit: char,
    address: Field,
    source: Key,
    destination: Key,
    original_source: Key,
    original_destination: Key,
    reply_source: Key,
    loopback: IpNet,
}

impl Family {
    fn is_of(&self, ip: IpAddr) -> bool {
        ip.is_ipv6() == self.is_v6()
    }

    fn is_v6(&self) -> bool {
        self.address == Field::Ipv6
    }

    /// Link-scoped prefixes of the family.
    fn link_scoped_prefixes(&self) -> Vec<IpNet> {
        link_scoped_prefixes(self.is_v6())
    }

    /// Returns the name of a per-family set.
    fn set(&self, name: &str) -> String {
        format!("{name}{}", self.digit)
    }
}

/// Renders the table of the owner.
pub(crate) fn table(ruleset: &Ruleset) -> Table {
    let name = table_name(&ruleset.owner);
    let mut chains = vec![
        between_networks(),
        to_network(ruleset),
        from_network(ruleset),
        sent_by_host(ruleset),
        other_interfaces(ruleset),
        from_container(ruleset),
    ];
    chains.push(translate(ruleset));
    if !ruleset.gated {
        chains.push(mark(ruleset));
    }
    if has_unverified(ruleset) {
        chains.extend([sources(ruleset), fragments(ruleset)]);
    }
    if !ruleset.replies.is_empty() {
        chains.extend(reply_paths(ruleset));
    }
    chains.extend([input(ruleset), egress(ruleset), masquerade(ruleset), postrouting(ruleset)]);
    Table { name, sets: sets(ruleset), chains }
}

/// Returns the name of the table of `owner`.
pub(crate) fn table_name(owner: &str) -> String {
    format!("{}{owner}", registry::NFTABLES_PREFIX)
}

/// Renders the owner's part of the user table, which all owners share: the jumps to the user chain.
pub(crate) fn user_table(ruleset: &Ruleset) -> Table {
    let owner = &ruleset.owner;
    let of = |name: &str| format!("{name}-{owner}");
    let jump = |matches: Vec<Match>, comment: &str| {
        rule(matches, vec![Action::Jump(registry::USER_CHAIN.to_owned())], comment)
    };
    let goto = |matches: Vec<Match>, comment: &str| {
        rule(matches, vec![Action::Goto(registry::USER_CHAIN.to_owned())], comment)
    };
    let mut sets = Vec::new();
    let forward = Chain {
        name: of("forward"),
        base: Some(Base { kind: Kind::Filter, hook: Hook::Forward, priority: BEFORE_FILTER }),
        rules: vec![
            goto(
                vec![own_bridge(Key::OutGroup, ruleset)],
                "forwarded to a container: user rules first",
            ),
            goto(
                vec![own_bridge(Key::InGroup, ruleset)],
                "forwarded from a container: user rules first",
            ),
        ],
    };
    let mut rules = vec![rule(vec![from_host()], vec![Action::Return], "sent by the host itself")];
    for family in &FAMILIES {
        let [at, any] = ["at", "any"].map(|name| format!("{}-{owner}", family.set(name)));
        let ports_of_family = ruleset.ports.iter().filter(|port| family.is_of(port.address));
        let (wildcard, specific): (Vec<&Opening>, Vec<&Opening>) =
            ports_of_family.partition(|port| port.address.is_unspecified());
        let key =
            |port: &Opening| [Value::Protocol(transport(port.protocol)), Value::Port(port.port)];
        sets.push(Set {
            name: at.clone(),
            elements: specific
                .iter()
                .map(|port| element([Value::Net(port.address.into())].into_iter().chain(key(port))))
                .collect(),
            ..set("", vec![family.address, Field::Protocol, Field::Port])
        });
        sets.push(Set {
            name: any.clone(),
            elements: wildcard.iter().map(|port| element(key(port))).collect(),
            ..set("", vec![Field::Protocol, Field::Port])
        });
        let comment = "published port served by a userspace socket: user rules first";
        rules.push(jump(
            vec![is_in([family.destination, Key::Protocol, Key::DestinationPort], &at)],
            comment,
        ));
        rules.push(jump(
            vec![not_loopback(family), is_in([Key::Protocol, Key::DestinationPort], &any)],
            comment,
        ));
    }
    let input = Chain {
        name: of("input"),
        base: Some(Base { kind: Kind::Filter, hook: Hook::Input, priority: BEFORE_FILTER }),
        rules,
    };
    Table { name: registry::NFTABLES_USER_TABLE.to_owned(), sets, chains: vec![forward, input] }
}

/// `dstnat`.
const DSTNAT: i32 = -100;
/// After all other chains. In `prerouting` the route lookup follows, in `postrouting` the output
/// interface, so no other chain can change the packet mark in between.
const LAST: i32 = i32::MAX;
/// Before all other chains.
const FIRST: i32 = i32::MIN;
/// Before `filter`, which other software uses.
const BEFORE_FILTER: i32 = FILTER - 10;
/// `filter`.
const FILTER: i32 = 0;
/// `srcnat`.
const SRCNAT: i32 = 100;

fn sets(ruleset: &Ruleset) -> Vec<Set> {
    let zones = &ruleset.zones;
    let internal = zones.iter().filter(|zone| zone.internal).map(bridge);
    let same = zones.iter().map(bridge).map(|bridge| element([bridge.clone(), bridge]));
    let mut sets = vec![
        Set {
            constant: true,
            elements: internal.map(|bridge| element([bridge])).collect(),
            ..set("internal", vec![Field::Interface])
        },
        Set {
            constant: true,
            elements: same.collect(),
            ..set("same", vec![Field::Interface, Field::Interface])
        },
        Set {
            elements: ruleset.bridges.iter().map(|name| element([interface(name)])).collect(),
            ..set("bridges", vec![Field::Interface])
        },
        Set {
            constant: true,
            elements: MASQUERADED.map(protocol).map(|one| element([one])).into(),
            ..set("masqueraded", vec![Field::Protocol])
        },
    ];
    if has_overlay(ruleset) {
        let overlays = zones.iter().filter(|zone| zone.overlay).map(bridge);
        sets.push(Set {
            constant: true,
            elements: overlays.map(|bridge| element([bridge])).collect(),
            ..set("overlays", vec![Field::Interface])
        });
    }
    for family in &FAMILIES {
        let subnets = || {
            let of = |zone| subnets(zone, family).map(move |subnet| (zone, Value::Net(subnet)));
            zones.iter().flat_map(of)
        };
        let own = subnets().map(|(zone, subnet)| element([bridge(zone), subnet]));
        let outgoing =
            subnets().filter(|(zone, _)| !zone.internal).map(|(_, subnet)| element([subnet]));
        sets.extend([
            Set {
                intervals: true,
                constant: true,
                elements: subnets().map(|(_, subnet)| element([subnet])).collect(),
                ..set(&family.set("subnets"), vec![family.address])
            },
            Set {
                intervals: true,
                constant: true,
                elements: own.collect(),
                ..set(&family.set("own"), vec![Field::Interface, family.address])
            },
            Set {
                intervals: true,
                constant: true,
                elements: outgoing.collect(),
                ..set(&family.set("outgoing"), vec![family.address])
            },
        ]);
        sets.extend(port_sets(ruleset.ports.iter(), family));
    }
    sets
}

/// Builds the sets of published ports with the elements of `ports`.
fn port_sets<'a>(ports: impl Iterator<Item = &'a Opening> + Clone, family: &Family) -> [Set; 4] {
    let ports = ports.filter(|port| family.is_of(port.address));
    let here = |port: &Opening| {
        [
            Value::Net(port.address.into()),
            Value::Protocol(transport(port.protocol)),
            Value::Port(port.port),
        ]
    };
    let translated = ports.clone().filter_map(|port| Some((port, port.to?)));
    let (mut at, mut any, mut to) = (Vec::new(), Vec::new(), Vec::new());
    for (port, target) in translated {
        let key = here(port);
        let data = [Value::Net(target.ip().into()), Value::Port(target.port())];
        to.push(element([data[0].clone(), key[1].clone(), data[1].clone()]));
        if port.address.is_unspecified() {
            any.push(Element { key: key[1..].to_vec(), data: data.to_vec() });
        } else {
            at.push(Element { key: key.to_vec(), data: data.to_vec() });
        }
    }
    to.sort();
    to.dedup();
    let loopback = ports.filter(|port| port.address.is_loopback()).map(|port| element(here(port)));
    let here = vec![family.address, Field::Protocol, Field::Port];
    let target = vec![family.address, Field::Port];
    [
        Set { elements: loopback.collect(), ..set(&family.set("loopback"), here.clone()) },
        Set { elements: at, data: target.clone(), ..set(&family.set("at"), here.clone()) },
        Set {
            elements: any,
            data: target,
            ..set(&family.set("any"), vec![Field::Protocol, Field::Port])
        },
        Set { elements: to, ..set(&family.set("to"), here) },
    ]
}

/// Regardless of connection state: a container that spoofs the address of a server could otherwise
/// inject packets into the flows of other containers.
fn between_networks() -> Chain {
    let rules = vec![
        rule(
            vec![is_in([Key::InInterface, Key::OutInterface], "same")],
            accept(),
            "bridged traffic, visible with br_netfilter",
        ),
        rule(vec![], drop(), "isolation between networks"),
    ];
    Chain { name: "between-networks".to_owned(), base: None, rules }
}

/// Conntrack entries may predate the rules. A legitimate connection has source or destination NAT.
fn to_network(ruleset: &Ruleset) -> Chain {
    let accept_marked = || if ruleset.gated { marked() } else { accept() };
    let mut rules = vec![
        rule(
            vec![own_bridge(Key::InGroup, ruleset)],
            vec![Action::Goto("between-networks".to_owned())],
            "from a container",
        ),
        rule(vec![Match::Syn], vec![Action::ClampSegments], "clamp MSS to path MTU"),
    ];
    // The source is not checked here: foreign source NAT may have changed it already, and
    // connections with a spoofed source were never translated (`translate`).
    rules.extend([
        rule(
            vec![Match::Translated, Match::Established],
            accept_marked(),
            "established connections with NAT",
        ),
        rule(vec![Match::Invalid], drop(), "invalid connection state"),
    ]);
    for family in &FAMILIES {
        let to =
            is_in([family.destination, Key::Protocol, Key::DestinationPort], &family.set("to"));
        rules.push(rule(vec![Match::TranslatedDestination, to], accept_marked(), "published port"));
    }
    rules.push(rule(vec![], drop(), "isolation from the outside"));
    Chain { name: "to-network".to_owned(), base: None, rules }
}

/// Conntrack does not translate connections whose first packet it has seen elsewhere: on a bridge
/// with `br_netfilter`, or before the rules were in force.
fn from_network(ruleset: &Ruleset) -> Chain {
    let mut rules =
        vec![rule(vec![Match::Syn], vec![Action::ClampSegments], "clamp MSS to path MTU")];
    rules.push(rule(
        vec![Match::Translated, Match::Established],
        accept(),
        "established connections with NAT",
    ));
    if has_internal(ruleset) {
        let internal = is_in([Key::InInterface], "internal");
        rules.push(rule(vec![internal], drop(), "no egress from internal networks"));
    }
    rules.extend([
        rule(vec![not_in([Key::Protocol], "masqueraded")], drop(), UNKNOWN_PROTOCOL),
        rule(vec![Match::TranslatedSource], accept(), "egress"),
        rule(vec![], drop(), "would leave without masquerade"),
    ]);
    Chain { name: "from-network".to_owned(), base: None, rules }
}

/// Conntrack knows the packets that an ICMP error of the host concerns. It does not know forged
/// ones that are invalid, or not tracked: a neighbour of the host could otherwise have the host
/// send their payload to a container, by the source address.
fn sent_by_host(ruleset: &Ruleset) -> Chain {
    let errors = ICMP.map(|number| {
        let is_icmp = Match::Is { key: Key::Protocol, value: protocol(number), not: false };
        let matches = vec![own_bridge(Key::OutGroup, ruleset), is_icmp, Match::Invalid];
        rule(matches, drop(), "ICMP error about a packet of no connection")
    });
    let rules = errors.into_iter().chain([rule(vec![], accept(), "sent by the host itself")]);
    Chain { name: "from-host".to_owned(), base: None, rules: rules.collect() }
}

/// ICMP and ICMPv6.
const ICMP: [u8; 2] = [1, 58];

/// Packets between foreign interfaces that belong to a connection of a container: an external host
/// has spoofed the address of the container to inject packets. Translated packets are identified by
/// their connection, because their current addresses differ.
fn other_interfaces(ruleset: &Ruleset) -> Chain {
    let rules = families_of(ruleset).flat_map(|family| {
        [family.original_source, family.reply_source]
            .map(|key| rule(to_subnets(ruleset, family, key), drop(), SPOOFED_CONTAINER))
    });
    Chain { name: "other-interfaces".to_owned(), base: None, rules: rules.collect() }
}

/// Packets to the host from a bridge of the owner.
fn from_container(ruleset: &Ruleset) -> Chain {
    let mut rules = Vec::new();
    if has_unverified(ruleset) {
        rules.extend(FAMILIES.iter().map(|family| spoofed_source(ruleset, family)));
    }
    for family in families_with_others(ruleset) {
        let mut sent = to_subnets(ruleset, family, family.destination);
        sent.push(not_in([Key::InInterface, family.destination], &family.set("own")));
        rules.push(rule(sent, drop(), DIRECT_ACCESS));
    }
    rules.push(rule(vec![Match::Known], accept(), ESTABLISHED));
    for family in &FAMILIES {
        rules.push(protect_loopback_ports(family, vec![]));
    }
    if has_internal(ruleset) {
        let internal = || is_in([Key::InInterface], "internal");
        for family in &FAMILIES {
            let mut elsewhere = vec![
                internal(),
                not_in([Key::InInterface, family.destination], &family.set("own")),
            ];
            if family.is_v6() {
                // Neighbour discovery uses link-local and multicast addresses.
                elsewhere.push(Match::NotIcmpv6);
            }
            rules.push(rule(elsewhere, drop(), GATEWAY_ONLY));
        }
        // The subnet includes its broadcast address. Neighbour discovery uses multicast.
        let broadcast = vec![internal(), Match::NotToHost, Match::NotIcmpv6];
        rules.push(rule(broadcast, drop(), GATEWAY_ONLY));
    }
    Chain { name: "from-container".to_owned(), base: None, rules }
}

/// Drops fragments with a spoofed source before they are reassembled, which conntrack does at
/// priority -400. Reassembly ignores the interface: a forged fragment would be mixed into a packet
/// of a container, which then passes all checks.
///
/// The chain takes 2.7% of the throughput of a bulk transfer. Only networks whose sources no port
/// guard verifies have it; elsewhere, only a neighbour of the host can send such fragments.
///
/// Which IPv6 packets are fragments is only known after their extension headers, so all packets
/// are checked that have any.
fn fragments(ruleset: &Ruleset) -> Chain {
    let mut rules = vec![rule(vec![Match::Unfragmented], accept(), "not a fragment")];
    rules.extend(from_overlay(ruleset));
    if families_of(ruleset).any(Family::is_v6) {
        rules.extend(
            [Transport::Tcp, Transport::Udp].map(|protocol| {
                rule(vec![Match::NextHeader(protocol)], accept(), "not a fragment")
            }),
        );
    }
    rules.extend(families_of(ruleset).map(|family| {
        let elsewhere = not_in([Key::InInterface, family.source], &family.set("own"));
        stray(ruleset, family, family.source, vec![not_from_host(), elsewhere])
    }));
    rules.extend(families_of(ruleset).map(|family| spoofed_source(ruleset, family)));
    base("fragments", Kind::Filter, Hook::Prerouting, FIRST, rules)
}

/// Verifies sources per packet, if port guards do not. Costs egress traffic one additional hook (1
/// to 2% of throughput). Precedes source NAT.
fn sources(ruleset: &Ruleset) -> Chain {
    let spoofed = FAMILIES.iter().map(|family| spoofed_source(ruleset, family));
    let rules = from_overlay(ruleset).into_iter().chain(spoofed).collect();
    base("sources", Kind::Filter, Hook::Forward, FILTER, rules)
}

/// Exempts packets from overlay networks ([`Zone::overlay`](super::ruleset::Zone::overlay)).
fn from_overlay(ruleset: &Ruleset) -> Option<Rule> {
    let from = is_in([Key::InInterface], "overlays");
    has_overlay(ruleset).then(|| rule(vec![from], accept(), "overlay network: checked by programs"))
}

const UNKNOWN_PROTOCOL: &str =
    "no egress for protocols that conntrack identifies by addresses only";
const NO_ROUTER: &str = "the host forwards for container networks only";
const GATEWAY_ONLY: &str = "internal networks reach only the gateway address of the host";
const SPOOFED_CONTAINER: &str = "spoofed container source address";
const SPOOFED_SOURCE: &str = "source address outside the subnet of the bridge";
const DIRECT_ACCESS: &str = "direct access to a container or gateway address";
const ESTABLISHED: &str = "established connections";

/// Packets to the host. Every packet is checked regardless of its connection state, because packets
/// can be spoofed and connections may predate the rules. The host reaches its own networks through
/// `lo`.
fn input(ruleset: &Ruleset) -> Chain {
    let mut rules = vec![rule(
        vec![own_bridge(Key::InGroup, ruleset)],
        vec![Action::Goto("from-container".to_owned())],
        "from a container",
    )];
    rules.extend(strays(ruleset));
    rules.push(rule(vec![Match::Known], accept(), ESTABLISHED));
    rules.extend(
        FAMILIES.iter().map(|family| protect_loopback_ports(family, vec![not_from_host()])),
    );
    base("input", Kind::Filter, Hook::Input, BEFORE_FILTER, rules)
}

/// Drops packets with an address of the networks that were not received on a bridge of the owner.
fn strays(ruleset: &Ruleset) -> impl Iterator<Item = Rule> {
    families_of(ruleset).flat_map(move |family| {
        [family.source, family.destination]
            .map(|key| stray(ruleset, family, key, vec![not_from_host()]))
    })
}

/// Drops packets whose field `key` is an address of the networks, under additional `conditions`.
fn stray(ruleset: &Ruleset, family: &Family, key: Key, conditions: Vec<Match>) -> Rule {
    let mut matches = to_subnets(ruleset, family, key);
    matches.extend(conditions);
    rule(matches, drop(), if key == family.source { SPOOFED_CONTAINER } else { DIRECT_ACCESS })
}

/// Drops packets from a bridge of the owner with a source outside the subnet of that bridge. Exempt
/// are link-local sources, which are in no subnet, and the unspecified source of duplicate address
/// detection (RFC 4862, section 5.4.2). The kernel forwards neither.
fn spoofed_source(ruleset: &Ruleset, family: &Family) -> Rule {
    let mut matches = vec![own_bridge(Key::InGroup, ruleset)];
    let subnets: Vec<IpNet> = subnets_of(ruleset, family).collect();
    matches.push(match (&ruleset.zones[..], &subnets[..]) {
        // A single subnet is compared, which takes a tenth of the time of a set lookup.
        ([_], [subnet]) => Match::Is { key: family.source, value: Value::Net(*subnet), not: true },
        _ => not_in([Key::InInterface, family.source], &family.set("own")),
    });
    let unspecified = family.is_v6().then(|| IpNet::from(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
    let link_local =
        family.link_scoped_prefixes().into_iter().filter(|net| !net.addr().is_multicast());
    matches.extend(link_local.chain(unspecified).map(|net| Match::Is {
        key: family.source,
        value: Value::Net(net),
        not: true,
    }));
    rule(matches, drop(), SPOOFED_SOURCE)
}

/// Returns whether any network lacks port guards that verify sources.
fn has_unverified(ruleset: &Ruleset) -> bool {
    ruleset.zones.iter().any(|zone| !zone.verified)
}

/// Returns the families with subnets.
fn families_of(ruleset: &Ruleset) -> impl Iterator<Item = &'static Family> {
    FAMILIES.iter().filter(|family| subnets_of(ruleset, family).next().is_some())
}

/// Returns the families with subnets if there is more than one network. With a single network, a
/// container cannot spoof or directly access another one.
fn families_with_others(ruleset: &Ruleset) -> impl Iterator<Item = &'static Family> {
    families_of(ruleset).filter(|_| ruleset.zones.len() > 1)
}

/// Drops packets to a port published on a loopback address, under additional `conditions`.
fn protect_loopback_ports(family: &Family, conditions: Vec<Match>) -> Rule {
    let mut matches = vec![is_in(
        [family.destination, Key::Protocol, Key::DestinationPort],
        &family.set("loopback"),
    )];
    matches.extend(conditions);
    rule(matches, drop(), "port published on a loopback address: no access from other interfaces")
}

/// Matches packets whose field `key` is in a subnet of the networks. The set lookup is preceded by
/// a comparison with the longest common prefix, which takes a tenth of the time.
fn to_subnets(ruleset: &Ruleset, family: &Family, key: Key) -> Vec<Match> {
    let subnets: Vec<IpNet> = subnets_of(ruleset, family).collect();
    let common_prefix = common_prefix(&subnets).filter(|net| net.prefix_len() > 0);
    let is_around = common_prefix.map(|net| Match::Is { key, value: Value::Net(net), not: false });
    let is_one = (subnets.len() != 1).then(|| is_in([key], &family.set("subnets")));
    is_around.into_iter().chain(is_one).collect()
}

/// Returns the longest prefix that contains all of `nets`, which are of one family.
fn common_prefix(nets: &[IpNet]) -> Option<IpNet> {
    let mut all = nets.first()?.trunc();
    for net in nets {
        while !all.contains(net) {
            all = all.supernet()?;
        }
    }
    Some(all)
}

/// The first packet of each connection, on arrival. Packets dropped here create no conntrack entry
/// and get no reply. Later packets and packets without a connection are checked in the forward and
/// input paths. Forwarded packets thus pass one hook less; each hook costs 1% of throughput.
fn translate(ruleset: &Ruleset) -> Chain {
    let mut rules: Vec<Rule> = from_overlay(ruleset).into_iter().collect();
    rules.extend(FAMILIES.iter().map(|family| spoofed_source(ruleset, family)));
    let hairpin = vec![own_bridge(Key::InGroup, ruleset)];
    let comment = "hairpin: containers are served by userspace sockets";
    rules.push(rule(hairpin, accept(), comment));
    rules.extend(strays(ruleset));
    rules.extend(
        FAMILIES.iter().map(|family| protect_loopback_ports(family, vec![not_from_host()])),
    );
    // For IPv4, the kernel drops such packets itself (`__fib_validate_source`,
    // net/ipv4/fib_frontend.c).
    let own = vec![Match::Family { v6: true }, not_from_host(), Match::FromHostAddress];
    rules.push(rule(own, drop(), "spoofed source address of the host"));
    let mapped = Match::Is { key: Key::SourceV6, value: Value::Net(MAPPED), not: false };
    rules.push(rule(vec![mapped], drop(), "spoofed source address: IPv4-mapped"));
    for family in &FAMILIES {
        let ports = [Key::Protocol, Key::DestinationPort];
        let translate = |keys: Vec<Key>, map: &str| {
            vec![Action::Translate { keys, map: family.set(map), v6: family.is_v6() }]
        };
        let at = [family.destination].into_iter().chain(ports).collect();
        rules.push(rule(vec![], translate(at, "at"), "port published on one address"));
        // Packets to link-local addresses cannot be routed by policy rules; a userspace socket
        // serves them.
        let mut wildcard = vec![not_loopback(family), Match::ToHost];
        wildcard.extend(
            family.link_scoped_prefixes().into_iter().filter(|net| !net.addr().is_multicast()).map(
                |net| Match::Is { key: family.destination, value: Value::Net(net), not: true },
            ),
        );
        rules.push(rule(
            wildcard,
            translate(ports.to_vec(), "any"),
            "port published on all addresses",
        ));
    }
    base("translate", Kind::Nat, Hook::Prerouting, DSTNAT, rules)
}

/// For policy rules as guards, which are evaluated before forwarding.
fn mark(ruleset: &Ruleset) -> Chain {
    let own = vec![own_bridge(Key::InGroup, ruleset)];
    let mut rules = vec![rule(own, accept(), "from a container: guards do not apply")];
    for family in &FAMILIES {
        let to_subnet = || is_in([family.destination], &family.set("subnets"));
        rules.push(rule(
            vec![to_subnet(), Match::Established],
            marked(),
            "mark for policy rules: established connections",
        ));
        let to =
            is_in([family.destination, Key::Protocol, Key::DestinationPort], &family.set("to"));
        rules.push(rule(
            vec![Match::TranslatedDestination, to],
            marked(),
            "mark for policy rules: published port",
        ));
    }
    base("mark", Kind::Filter, Hook::Prerouting, LAST, rules)
}

/// Reply paths on a host with several default routes. The mark that selects the uplink is set
/// during the route lookup only, and is not visible in foreign hooks. The uplink is derived from
/// the original destination, so no connection mark is needed; connection marks belong to other
/// software.
fn reply_paths(ruleset: &Ruleset) -> [Chain; 4] {
    let marks = |value: fn(u8) -> u32| {
        let rule_of = |(number, net): &(u8, IpNet)| {
            let family = FAMILIES.iter().find(|family| family.is_of(net.addr()))?;
            let asked =
                Match::Is { key: family.original_destination, value: Value::Net(*net), not: false };
            let mark = Action::Mark { value: value(*number), mask: registry::UPLINK_MARK_MASK };
            Some(rule(
                vec![asked],
                vec![mark, Action::Return],
                "original destination is an address of this uplink",
            ))
        };
        ruleset.replies.iter().filter_map(rule_of).collect()
    };
    let answers = |chain: &str| {
        let answer =
            vec![own_bridge(Key::InGroup, ruleset), Match::Reply, Match::TranslatedDestination];
        vec![rule(answer, vec![Action::Jump(chain.to_owned())], "reply of a kernel-published port")]
    };
    [
        Chain { name: "to-uplink".to_owned(), base: None, rules: marks(registry::uplink_mark) },
        Chain { name: "clear-uplink".to_owned(), base: None, rules: marks(|_| 0) },
        base("before-route", Kind::Filter, Hook::Prerouting, LAST, answers("to-uplink")),
        base("after-route", Kind::Filter, Hook::Forward, FIRST, answers("clear-uplink")),
    ]
}

/// The verdict on forwarded packets. It is at the last hook before the output interface, so that no
/// other chain can see or change the mark for the gates. It adds a hook for packets sent by the
/// host, and none for forwarded packets. Conntrack confirms connections at the same priority.
fn postrouting(ruleset: &Ruleset) -> Chain {
    let jump = |key, chain: &str, comment| {
        rule(vec![own_bridge(key, ruleset)], vec![Action::Jump(chain.to_owned())], comment)
    };
    let mut rules = vec![
        rule(
            vec![Match::FromHost],
            vec![Action::Goto("from-host".to_owned())],
            "sent by the host itself",
        ),
        jump(Key::OutGroup, "to-network", "to a container"),
        jump(Key::InGroup, "from-network", "from a container"),
        rule(
            vec![Match::Translated],
            vec![Action::Jump("other-interfaces".to_owned())],
            "translated, between other interfaces: check for connections of containers",
        ),
    ];
    // Packets from and to containers have left this chain already.
    rules.extend(strays(ruleset));
    rules.extend(ruleset.uplinks.iter().map(|(link, v6)| {
        let is = |key, value, not| Match::Is { key, value, not };
        let elsewhere = Value::InterfacePrefix(registry::BRIDGE_PREFIX.to_owned());
        let matches = vec![
            Match::Family { v6: *v6 },
            is(Key::InInterface, Value::Interface(link.clone()), false),
            // For IPv6 packets sent by the host, `ip6_xmit` sets the output interface as the input
            // interface.
            is(Key::OutInterface, Value::Interface(link.clone()), true),
            is(Key::OutInterface, elsewhere, true),
            not_in([Key::OutInterface], "bridges"),
        ];
        rule(matches, drop(), NO_ROUTER)
    }));
    base("postrouting", Kind::Filter, Hook::Postrouting, LAST, rules)
}

/// Masquerade with source ports that are not published ([`Ruleset::source_ports`]).
fn egress(ruleset: &Ruleset) -> Chain {
    let from = |protocol: Value, (first, last): (u16, u16)| {
        let matches = vec![Match::Is { key: Key::Protocol, value: protocol, not: false }];
        rule(
            matches,
            vec![Action::MasqueradeTo { first, last }],
            "source ports without a published port",
        )
    };
    let mut rules = vec![
        from(Value::Protocol(Transport::Tcp), ruleset.source_ports(Protocol::Tcp)),
        from(Value::Protocol(Transport::Udp), ruleset.source_ports(Protocol::Udp)),
    ];
    let others = OTHERS_WITH_PORTS.map(protocol);
    rules.extend(others.map(|protocol| from(protocol, ruleset.source_ports(Protocol::Sctp))));
    rules.push(rule(vec![], vec![Action::Masquerade], "protocols without ports"));
    Chain { name: "egress".to_owned(), base: None, rules }
}

/// Protocols other than TCP and UDP whose ports NAT translates (`nf_nat_l4proto_unique_tuple`):
/// SCTP and UDP-Lite. They are never published.
const OTHERS_WITH_PORTS: [u8; 2] = [132, 136];

/// Forwarded packets are matched by the pair of interfaces, regardless of their source. Packets
/// that a process of the host sends from a gateway address are matched by source.
fn masquerade(ruleset: &Ruleset) -> Chain {
    let leaves = |first: Match, more: Option<Match>| {
        let lo = Match::Is {
            key: Key::OutInterface,
            value: Value::Interface("lo".to_owned()),
            not: true,
        };
        let group = Match::Is { key: Key::OutGroup, value: group(ruleset), not: true };
        let matches = [first, group, lo].into_iter().chain(more).collect();
        rule(matches, vec![Action::Goto("egress".to_owned())], "masquerade")
    };
    let outgoing = has_internal(ruleset).then(|| not_in([Key::InInterface], "internal"));
    let mut rules = vec![leaves(own_bridge(Key::InGroup, ruleset), outgoing)];
    rules.extend(
        FAMILIES.iter().map(|family| leaves(is_in([family.source], &family.set("outgoing")), None)),
    );
    base("masquerade", Kind::Nat, Hook::Postrouting, SRCNAT, rules)
}

fn base(name: &str, kind: Kind, hook: Hook, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { name: name.to_owned(), base: Some(Base { kind, hook, priority }), rules }
}

fn rule(matches: Vec<Match>, actions: Vec<Action>, comment: &str) -> Rule {
    Rule { matches, actions, comment: comment.to_owned() }
}

fn accept() -> Vec<Action> {
    vec![Action::Accept]
}

/// Drops are counted, for diagnosis.
fn drop() -> Vec<Action> {
    vec![Action::Count, Action::Drop]
}

fn is_in<const N: usize>(keys: [Key; N], set: &str) -> Match {
    Match::In { keys: keys.to_vec(), set: set.to_owned(), not: false }
}

fn not_in<const N: usize>(keys: [Key; N], set: &str) -> Match {
    Match::In { keys: keys.to_vec(), set: set.to_owned(), not: true }
}

/// Accepts the packet and marks it for the gates or policy rules.
fn marked() -> Vec<Action> {
    let set = Action::Mark { value: registry::FORWARD_MARK, mask: registry::FORWARD_MARK_MASK };
    vec![set, Action::Accept]
}

/// Matches packets whose input or output group is that of the owner's bridges.
fn own_bridge(key: Key, ruleset: &Ruleset) -> Match {
    Match::Is { key, value: group(ruleset), not: false }
}

/// Returns the interface group of the owner's bridges.
fn group(ruleset: &Ruleset) -> Value {
    Value::Group(registry::bridge_group(&ruleset.owner))
}

fn has_overlay(ruleset: &Ruleset) -> bool {
    ruleset.zones.iter().any(|zone| zone.overlay)
}

fn has_internal(ruleset: &Ruleset) -> bool {
    ruleset.zones.iter().any(|zone| zone.internal)
}

fn not_from_host() -> Match {
    Match::Is { key: Key::InInterface, value: Value::Interface("lo".to_owned()), not: true }
}

fn from_host() -> Match {
    Match::Is { key: Key::InInterface, value: Value::Interface("lo".to_owned()), not: false }
}

/// Matches destinations of the family except loopback.
fn not_loopback(family: &Family) -> Match {
    Match::Is { key: family.destination, value: Value::Net(family.loopback), not: true }
}

fn set(name: &str, key: Vec<Field>) -> Set {
    Set {
        name: name.to_owned(),
        key,
        data: Vec::new(),
        intervals: false,
        constant: false,
        elements: Vec::new(),
    }
}

fn element(key: impl IntoIterator<Item = Value>) -> Element {
    Element { key: key.into_iter().collect(), data: Vec::new() }
}

fn bridge(zone: &Zone) -> Value {
    interface(&zone.bridge)
}

fn interface(name: &str) -> Value {
    Value::Interface(name.to_owned())
}

fn subnets_of<'a>(ruleset: &'a Ruleset, family: &'a Family) -> impl Iterator<Item = IpNet> + 'a {
    ruleset.zones.iter().flat_map(move |zone| subnets(zone, family))
}

fn subnets<'a>(zone: &'a Zone, family: &'a Family) -> impl Iterator<Item = IpNet> + 'a {
    zone.subnets.iter().map(IpNet::trunc).filter(|subnet| family.is_of(subnet.addr()))
}

/// Converts a protocol number.
fn protocol(number: u8) -> Value {
    match number {
        6 => Value::Protocol(Transport::Tcp),
        17 => Value::Protocol(Transport::Udp),
        number => Value::OtherProtocol(number),
    }
}

fn transport(protocol: Protocol) -> Transport {
    match protocol {
        Protocol::Udp => Transport::Udp,
        // SCTP ports are rejected earlier.
        Protocol::Tcp | Protocol::Sctp => Transport::Tcp,
    }
}
