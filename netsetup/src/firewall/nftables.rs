//! The ruleset as tables of nftables.
//!
//! What differs between hosts is in sets and maps, and the rules are always the same few: however
//! many networks and ports there are, a packet passes the same number of rules, and a port that
//! comes or goes is an element.

use super::ruleset::{MAPPED, MASQUERADED, is_source_port};
use super::{Backend, Opening, Ports, Ruleset, Zone, on_link};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use tidegate_model::{Protocol, registry};
use tidegate_netfilter::{
    Action, Base, Chain, Change, Connection, Element, Field, Hook, Key, Kind, Match, Rule, Set,
    Table, Transport, Value,
};
use tidegate_netns::ChangeListener;

/// The rules of one owner, by a connection that owns their table where the kernel lets it.
#[derive(Debug)]
pub(super) struct Nftables {
    connection: Connection,
    owns: bool,
    /// The state of the namespace at which all was known to be as it was put.
    sound_at: Option<u32>,
    /// Of the tables as they were then, once they were looked at.
    fingerprints: Option<[Option<u64>; 2]>,
}

impl Nftables {
    /// In the namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut connection = Connection::open()?;
        let owns = connection.can_own().map_err(io::Error::other)?;
        Ok(Self { connection, owns, sound_at: None, fingerprints: None })
    }

    fn commit(&mut self, changes: &[Change]) -> io::Result<()> {
        self.connection.commit(changes).map_err(io::Error::other)
    }

    /// Carries `changes` out. Whether nobody else has changed anything meanwhile: then what was
    /// sound is, with them.
    fn commit_alone(&mut self, changes: &[Change]) -> io::Result<bool> {
        let before = self.connection.generation()?;
        (self.sound_at, self.fingerprints) = (None, None);
        self.commit(changes)?;
        let after = self.connection.generation()?;
        self.sound_at = Some(after).filter(|_| after == before.wrapping_add(1));
        Ok(self.sound_at.is_some())
    }

    /// Whether all is as it was put. It costs a look at every element, unless nobody has changed
    /// anything at all since.
    fn is_sound(&mut self, owner: &str) -> io::Result<bool> {
        let generation = self.connection.generation()?;
        if self.sound_at == Some(generation) {
            return Ok(true);
        }
        let Some(fingerprints) = self.fingerprints else { return Ok(false) };
        let same = self.look(owner)? == fingerprints;
        self.sound_at = Some(generation).filter(|_| same);
        Ok(same)
    }

    /// What tells whether the owner's table, and its part of the user's, are as they were.
    fn look(&mut self, owner: &str) -> io::Result<[Option<u64>; 2]> {
        let table = table_name(owner);
        let own = match self.owns && self.connection.owns(&table)? {
            // Nobody else can have changed it.
            true => Some(0),
            false => self.connection.fingerprint(&table, |_| true)?,
        };
        let names = names_of_ways(owner);
        let theirs = self
            .connection
            .fingerprint(registry::NFTABLES_USER_TABLE, |name| names.contains(name))?;
        Ok([own, theirs])
    }
}

impl Backend for Nftables {
    fn apply(&mut self, ruleset: &Ruleset) -> io::Result<()> {
        let replace = Change::Replace { table: table(ruleset), owned: self.owns };
        let part = Change::ReplacePart {
            part: ways_to_user(ruleset),
            kept: registry::USER_CHAIN.to_owned(),
        };
        let changes = [replace, part];
        for _ in 0..ATTEMPTS {
            if self.commit_alone(&changes)? {
                break;
            }
        }
        // What could not be looked at undisturbed does not hold, and is applied again with the next
        // look.
        Ok(())
    }

    fn change_ports(&mut self, ruleset: &Ruleset, change: &Ports) -> io::Result<()> {
        // The ports that containers send from are in rules.
        let moves = change.added.union(&change.removed).any(|port| is_source_port(&port.port));
        if moves || !self.is_sound(&ruleset.owner)? {
            return self.apply(ruleset);
        }
        let mut changes = Vec::new();
        // Two ports may lead to one, and what they lead to is known as long as one of them does.
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
            ways_to_user(&Ruleset { ports: ports.clone(), owner, ..Ruleset::default() }).sets
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
        match self.commit_alone(&changes) {
            Ok(true) => Ok(()),
            // Someone has thrown a part of it away, or may have, so all of it is made again.
            Ok(false) | Err(_) => self.apply(ruleset),
        }
    }

    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool> {
        self.is_sound(&ruleset.owner)
    }

    fn settle(&mut self, owner: &str) -> io::Result<()> {
        if self.fingerprints.is_some() || !self.is_sound(owner)? {
            return Ok(());
        }
        let fingerprints = self.look(owner)?;
        let undisturbed = self.sound_at == Some(self.connection.generation()?);
        self.fingerprints = Some(fingerprints).filter(|_| undisturbed);
        Ok(())
    }

    fn remove(&mut self, owner: &str) -> io::Result<()> {
        (self.sound_at, self.fingerprints) = (None, None);
        let table = registry::NFTABLES_USER_TABLE.to_owned();
        let kept = registry::USER_CHAIN.to_owned();
        self.commit(&[
            Change::Remove { table: table_name(owner) },
            Change::RemovePart { table, names: names_of_ways(owner), kept },
        ])
    }

    fn share(&mut self) {
        self.owns = false;
    }

    fn changes(&self) -> io::Result<Option<ChangeListener>> {
        ChangeListener::of_rules().map(Some)
    }
}

/// How often rules are put in place while others change theirs.
const ATTEMPTS: u32 = 5;

/// Whether `element` of the sets of targets stands for `target`.
fn is_to(element: &Element, target: SocketAddr) -> bool {
    element.key.contains(&Value::Net(target.ip().into()))
        && element.key.contains(&Value::Port(target.port()))
}

/// The names of what [`ways_to_user`] makes.
fn names_of_ways(owner: &str) -> BTreeSet<String> {
    let ways = ways_to_user(&Ruleset { owner: owner.to_owned(), ..Ruleset::default() });
    let sets = ways.sets.into_iter().map(|set| set.name);
    sets.chain(ways.chains.into_iter().map(|chain| chain.name)).collect()
}

/// The families, with what each has a name of its own for.
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

    /// Addresses that are meant for the link, whoever is on it.
    fn on_link(&self) -> Vec<IpNet> {
        on_link(self.is_v6())
    }

    /// A set's name, for this family.
    fn set(&self, name: &str) -> String {
        format!("{name}{}", self.digit)
    }
}

/// The table of `ruleset`'s owner.
pub(crate) fn table(ruleset: &Ruleset) -> Table {
    let name = table_name(&ruleset.owner);
    let mut chains = vec![
        between(),
        to_network(ruleset),
        from_network(ruleset),
        others(ruleset),
        inside(ruleset),
    ];
    chains.push(translate(ruleset));
    if !ruleset.gated {
        chains.push(mark(ruleset));
    }
    if has_unverified(ruleset) {
        chains.push(sources(ruleset));
    }
    if !ruleset.replies.is_empty() {
        chains.extend(reply_paths(ruleset));
    }
    chains.extend([input(ruleset), leave(ruleset), masquerade(ruleset), postrouting(ruleset)]);
    Table { name, sets: sets(ruleset), chains }
}

/// The name of the table of `owner`.
pub(crate) fn table_name(owner: &str) -> String {
    format!("{}{owner}", registry::NFTABLES_PREFIX)
}

/// What leads to the user's chain, in the table that it shares with the other owners' ways there.
pub(crate) fn ways_to_user(ruleset: &Ruleset) -> Table {
    let owner = &ruleset.owner;
    let of = |name: &str| format!("{name}-{owner}");
    let jump = |matches: Vec<Match>, comment: &str| {
        rule(matches, vec![Action::Jump(registry::USER_CHAIN.to_owned())], comment)
    };
    let go = |matches: Vec<Match>, comment: &str| {
        rule(matches, vec![Action::Goto(registry::USER_CHAIN.to_owned())], comment)
    };
    let mut sets = Vec::new();
    let forward = Chain {
        name: of("forward"),
        base: Some(Base { kind: Kind::Filter, hook: Hook::Forward, priority: BEFORE_FILTER }),
        rules: vec![
            go(
                vec![by_ours(Key::OutGroup, ruleset)],
                "forwarded to a container: the user comes first",
            ),
            go(
                vec![by_ours(Key::InGroup, ruleset)],
                "forwarded from a container: the user comes first",
            ),
        ],
    };
    let mut rules = vec![rule(
        vec![from_host()],
        vec![Action::Return],
        "the host asks itself: nothing that is forwarded",
    )];
    for family in &FAMILIES {
        let [at, any] = ["at", "any"].map(|name| format!("{}-{owner}", family.set(name)));
        let served = ruleset.ports.iter().filter(|port| family.is_of(port.address));
        let (everywhere, somewhere): (Vec<&Opening>, Vec<&Opening>) =
            served.partition(|port| port.address.is_unspecified());
        let key =
            |port: &Opening| [Value::Protocol(transport(port.protocol)), Value::Port(port.port)];
        sets.push(Set {
            name: at.clone(),
            elements: somewhere
                .iter()
                .map(|port| element([Value::Net(port.address.into())].into_iter().chain(key(port))))
                .collect(),
            ..set("", vec![family.address, Field::Protocol, Field::Port])
        });
        sets.push(Set {
            name: any.clone(),
            elements: everywhere.iter().map(|port| element(key(port))).collect(),
            ..set("", vec![Field::Protocol, Field::Port])
        });
        let comment = "a published port that a socket of ours serves: the user comes first";
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
/// Behind every chain of others. In `prerouting` the route is looked up next; in `postrouting` the
/// packet reaches its interface next, so nobody changes the packet mark in between.
const LAST: i32 = i32::MAX;
/// Before every chain of others.
const FIRST: i32 = i32::MIN;
/// Before `filter`, where the rules of others are.
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

/// The sets that published ports are in, with the elements of `ports`.
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

/// Whatever is known of its connection: who can forge the address of a server could else get into
/// flows of others.
fn between() -> Chain {
    let rules = vec![
        rule(
            vec![is_in([Key::InInterface, Key::OutInterface], "same")],
            accept(),
            "bridged, where br_netfilter shows that",
        ),
        rule(vec![], drop(), "networks are closed to one another"),
    ];
    Chain { name: "between".to_owned(), base: None, rules }
}

/// What is known of a connection may be of a time when there were no rules. One that began as it
/// should was translated at one of its ends.
fn to_network(ruleset: &Ruleset) -> Chain {
    let let_in = || if ruleset.gated { marked() } else { accept() };
    let mut rules = vec![
        rule(
            vec![by_ours(Key::InGroup, ruleset)],
            vec![Action::Goto("between".to_owned())],
            "from a container of ours",
        ),
        rule(vec![Match::Syn], vec![Action::ClampSegments], "segments that fit the path"),
    ];
    // No source is looked at: source NAT of others may have changed it by now, and no connection
    // of a forged one was translated (`translate`).
    rules.extend([
        rule(
            vec![Match::Translated, Match::Established],
            let_in(),
            "an answer to a container, or a connection to a published port",
        ),
        rule(vec![Match::Invalid], drop(), "belongs to no connection"),
    ]);
    for family in &FAMILIES {
        let to =
            is_in([family.destination, Key::Protocol, Key::DestinationPort], &family.set("to"));
        rules.push(rule(vec![Match::TranslatedDestination, to], let_in(), "a published port"));
    }
    rules.push(rule(vec![], drop(), "networks are closed to the outside"));
    Chain { name: "to-network".to_owned(), base: None, rules }
}

fn from_network(ruleset: &Ruleset) -> Chain {
    let mut rules =
        vec![rule(vec![Match::Syn], vec![Action::ClampSegments], "segments that fit the path")];
    rules.push(rule(vec![Match::Established], accept(), "what has begun goes on"));
    if has_internal(ruleset) {
        let internal = is_in([Key::InInterface], "internal");
        rules.push(rule(vec![internal], drop(), "an internal network has no egress"));
    }
    rules.extend([
        rule(
            vec![Match::Invalid],
            drop(),
            "belongs to no connection, and would leave with a container's address",
        ),
        rule(vec![not_in([Key::Protocol], "masqueraded")], drop(), UNKNOWN_PROTOCOL),
        rule(vec![], accept(), "containers reach the outside"),
    ]);
    Chain { name: "from-network".to_owned(), base: None, rules }
}

/// What neither comes from a bridge of ours nor goes to one, and belongs to a connection of a
/// container: an outsider has forged the container's address, to get into it. What was NATed tells
/// by its connection alone, since its own addresses are other ones by now.
fn others(ruleset: &Ruleset) -> Chain {
    let rules = families_of(ruleset).flat_map(|family| {
        [family.original_source, family.reply_source]
            .map(|key| rule(to_subnets(ruleset, family, key), drop(), STRAY_SOURCE))
    });
    Chain { name: "others".to_owned(), base: None, rules: rules.collect() }
}

/// Of what is for the host, what comes from a bridge of ours.
fn inside(ruleset: &Ruleset) -> Chain {
    let mut rules = Vec::new();
    if has_unverified(ruleset) {
        rules.extend(FAMILIES.iter().map(|family| false_source(ruleset, family)));
    }
    for family in families_with_others(ruleset) {
        let mut sent = to_subnets(ruleset, family, family.destination);
        sent.push(not_in([Key::InInterface, family.destination], &family.set("own")));
        rules.push(rule(sent, drop(), STRAY_DESTINATION));
    }
    rules.push(rule(vec![Match::Known], accept(), PART));
    for family in &FAMILIES {
        rules.push(not_on_loopback(family, vec![]));
    }
    if has_internal(ruleset) {
        let internal = || is_in([Key::InInterface], "internal");
        for family in &FAMILIES {
            let mut elsewhere = vec![
                internal(),
                not_in([Key::InInterface, family.destination], &family.set("own")),
            ];
            if family.is_v6() {
                // By link-local and multicast addresses neighbours find each other, and the host.
                elsewhere.push(Match::NotIcmpv6);
            }
            rules.push(rule(elsewhere, drop(), GATEWAY_ALONE));
        }
        // The broadcast address of the subnet is in the subnet. Neighbour discovery is multicast.
        let broadcast = vec![internal(), Match::NotToHost, Match::NotIcmpv6];
        rules.push(rule(broadcast, drop(), GATEWAY_ALONE));
    }
    Chain { name: "inside".to_owned(), base: None, rules }
}

/// Per packet, where no guard at the bridge port verifies sources. It costs what a container sends
/// a hook (1 to 2% of its throughput); source NAT comes after it.
fn sources(ruleset: &Ruleset) -> Chain {
    let rules = FAMILIES.iter().map(|family| false_source(ruleset, family)).collect();
    base("sources", Kind::Filter, Hook::Forward, FILTER, rules)
}

const UNKNOWN_PROTOCOL: &str =
    "connections of this protocol differ by addresses alone: answers would be the host's";
const NO_ROUTER: &str = "the host forwards for container networks alone";
const GATEWAY_ALONE: &str = "an internal network reaches nothing of the host but its gateway";
const STRAY_SOURCE: &str = "claims to come from a container";
const FALSE_SOURCE: &str = "has a source address that is not of its network";
const STRAY_DESTINATION: &str =
    "sent straight to a container or a gateway, past the published ports";
const PART: &str = "a part of a connection that was let through";

/// What is for the host itself. Every packet is looked at, whatever is known of its connection: a
/// part of one can be forged, and one can have been made while there were no rules. By `lo` the
/// host reaches its networks.
fn input(ruleset: &Ruleset) -> Chain {
    let mut rules = vec![rule(
        vec![by_ours(Key::InGroup, ruleset)],
        vec![Action::Goto("inside".to_owned())],
        "from a container",
    )];
    rules.extend(strays(ruleset));
    rules.push(rule(vec![Match::Known], accept(), PART));
    rules.extend(FAMILIES.iter().map(|family| not_on_loopback(family, vec![not_from_host()])));
    base("input", Kind::Filter, Hook::Input, BEFORE_FILTER, rules)
}

/// Drops what comes from elsewhere than a bridge of ours, and has an address of our networks.
fn strays(ruleset: &Ruleset) -> impl Iterator<Item = Rule> {
    families_of(ruleset).flat_map(move |family| {
        [family.source, family.destination]
            .map(|key| stray(ruleset, family, key, vec![not_from_host()]))
    })
}

/// Drops what has an address of our networks where `key` says, under further `conditions`.
fn stray(ruleset: &Ruleset, family: &Family, key: Key, conditions: Vec<Match>) -> Rule {
    let mut matches = to_subnets(ruleset, family, key);
    matches.extend(conditions);
    rule(matches, drop(), if key == family.source { STRAY_SOURCE } else { STRAY_DESTINATION })
}

/// Drops what comes from a network of ours with an address that is not of that network. Link-local
/// ones belong to no subnet, and who looks for duplicates of its address has none yet (RFC 4862,
/// section 5.4.2); the kernel forwards neither.
fn false_source(ruleset: &Ruleset, family: &Family) -> Rule {
    let mut matches = vec![by_ours(Key::InGroup, ruleset)];
    let subnets: Vec<IpNet> = subnets_of(ruleset, family).collect();
    matches.push(match (&ruleset.zones[..], &subnets[..]) {
        // Of one network: a comparison, which takes a tenth of the time of a look-up.
        ([_], [subnet]) => Match::Is { key: family.source, value: Value::Net(*subnet), not: true },
        _ => not_in([Key::InInterface, family.source], &family.set("own")),
    });
    let unspecified = family.is_v6().then(|| IpNet::from(IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
    let link_local = family.on_link().into_iter().filter(|net| !net.addr().is_multicast());
    matches.extend(link_local.chain(unspecified).map(|net| Match::Is {
        key: family.source,
        value: Value::Net(net),
        not: true,
    }));
    rule(matches, drop(), FALSE_SOURCE)
}

/// Whether a network of `ruleset` has ports at which nobody verifies sources.
fn has_unverified(ruleset: &Ruleset) -> bool {
    ruleset.zones.iter().any(|zone| !zone.verified)
}

/// The families that there are subnets of.
fn families_of(ruleset: &Ruleset) -> impl Iterator<Item = &'static Family> {
    FAMILIES.iter().filter(|family| subnets_of(ruleset, family).next().is_some())
}

/// The same, if there is more than one network: with a single one there is no other that a
/// container could claim to be in, or send to straight.
fn families_with_others(ruleset: &Ruleset) -> impl Iterator<Item = &'static Family> {
    families_of(ruleset).filter(|_| ruleset.zones.len() > 1)
}

/// Drops what is for a port that is published on a loopback address, under further `conditions`.
fn not_on_loopback(family: &Family, conditions: Vec<Match>) -> Rule {
    let mut matches = vec![is_in(
        [family.destination, Key::Protocol, Key::DestinationPort],
        &family.set("loopback"),
    )];
    matches.extend(conditions);
    rule(matches, drop(), "published on a loopback address, and asked for from elsewhere")
}

/// What `key` gives is in one of our subnets. A set is asked only about what is in the smallest
/// network that has all of them: that takes a tenth of the time.
fn to_subnets(ruleset: &Ruleset, family: &Family, key: Key) -> Vec<Match> {
    let subnets: Vec<IpNet> = subnets_of(ruleset, family).collect();
    let around = around(&subnets).filter(|net| net.prefix_len() > 0);
    let is_around = around.map(|net| Match::Is { key, value: Value::Net(net), not: false });
    let is_one = (subnets.len() != 1).then(|| is_in([key], &family.set("subnets")));
    is_around.into_iter().chain(is_one).collect()
}

/// The smallest network that has all of `nets`, which are of one family.
fn around(nets: &[IpNet]) -> Option<IpNet> {
    let mut all = nets.first()?.trunc();
    for net in nets {
        while !all.contains(net) {
            all = all.supernet()?;
        }
    }
    Some(all)
}

/// The first packet of each connection, on its arrival. What is dropped here leaves no trace, and
/// is answered by nothing; later packets, and those of no connection, are seen where they are
/// forwarded or come in. So those that are forwarded pass one hook less, of which each takes a
/// hundredth of the throughput.
fn translate(ruleset: &Ruleset) -> Chain {
    let mut rules: Vec<Rule> =
        FAMILIES.iter().map(|family| false_source(ruleset, family)).collect();
    let hairpin = vec![by_ours(Key::InGroup, ruleset)];
    let comment = "containers are served by our sockets: they may ask for their own port";
    rules.push(rule(hairpin, accept(), comment));
    rules.extend(strays(ruleset));
    rules.extend(FAMILIES.iter().map(|family| not_on_loopback(family, vec![not_from_host()])));
    // The kernel itself drops these in IPv4 (`__fib_validate_source`, net/ipv4/fib_frontend.c).
    let own = vec![Match::Family { v6: true }, not_from_host(), Match::FromHostAddress];
    rules.push(rule(own, drop(), "claims to come from the host itself"));
    let mapped = Match::Is { key: Key::SourceV6, value: Value::Net(MAPPED), not: false };
    rules.push(rule(vec![mapped], drop(), "an IPv4 address over IPv6: no kernel sends that"));
    for family in &FAMILIES {
        let ports = [Key::Protocol, Key::DestinationPort];
        let translate = |keys: Vec<Key>, map: &str| {
            vec![Action::Translate { keys, map: family.set(map), v6: family.is_v6() }]
        };
        let at = [family.destination].into_iter().chain(ports).collect();
        rules.push(rule(vec![], translate(at, "at"), "a port published on one address"));
        // What is addressed to the link no policy rule leads on; a socket serves it.
        let mut everywhere = vec![not_loopback(family), Match::ToHost];
        everywhere.extend(
            family.on_link().into_iter().filter(|net| !net.addr().is_multicast()).map(|net| {
                Match::Is { key: family.destination, value: Value::Net(net), not: true }
            }),
        );
        rules.push(rule(
            everywhere,
            translate(ports.to_vec(), "any"),
            "a port published on all addresses",
        ));
    }
    base("translate", Kind::Nat, Hook::Prerouting, DSTNAT, rules)
}

/// Where policy rules stand behind these: they are asked before a packet is forwarded.
fn mark(ruleset: &Ruleset) -> Chain {
    let own = vec![by_ours(Key::InGroup, ruleset)];
    let mut rules =
        vec![rule(own, accept(), "from a container: nothing that a network is closed to")];
    for family in &FAMILIES {
        let inside = || is_in([family.destination], &family.set("subnets"));
        rules.push(rule(
            vec![inside(), Match::Established],
            marked(),
            "may be forwarded: policy rules let nothing else pass",
        ));
        let to =
            is_in([family.destination, Key::Protocol, Key::DestinationPort], &family.set("to"));
        rules.push(rule(
            vec![Match::TranslatedDestination, to],
            marked(),
            "may be forwarded: it came by a published port",
        ));
    }
    base("mark", Kind::Filter, Hook::Prerouting, LAST, rules)
}

/// Where the host has several default routes: the mark by which an answer finds its uplink. It is
/// on the packet while its route is looked up, and at no hook of others. What was asked tells the
/// uplink, so that nothing has to be remembered with the connection, whose mark is others'.
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
                "asked at an address of that uplink",
            ))
        };
        ruleset.replies.iter().filter_map(rule_of).collect()
    };
    let answers = |chain: &str| {
        let answer =
            vec![by_ours(Key::InGroup, ruleset), Match::Reply, Match::TranslatedDestination];
        vec![rule(answer, vec![Action::Jump(chain.to_owned())], "an answer of a translated port")]
    };
    [
        Chain { name: "to-uplink".to_owned(), base: None, rules: marks(registry::uplink_mark) },
        Chain { name: "routed".to_owned(), base: None, rules: marks(|_| 0) },
        base("before-route", Kind::Filter, Hook::Prerouting, LAST, answers("to-uplink")),
        base("behind-route", Kind::Filter, Hook::Forward, FIRST, answers("routed")),
    ]
}

/// The verdict on what is forwarded: at the last hook before the interface, so that nobody changes
/// the mark that the gates look at, and nobody else sees it. A hook more for what the host sends,
/// and none for what it forwards. Conntrack confirms connections at the same priority.
fn postrouting(ruleset: &Ruleset) -> Chain {
    let jump = |key, chain: &str, comment| {
        rule(vec![by_ours(key, ruleset)], vec![Action::Jump(chain.to_owned())], comment)
    };
    let mut rules = vec![
        rule(vec![Match::FromHost], accept(), "sent by the host itself"),
        jump(Key::OutGroup, "to-network", "all that goes to a container"),
        jump(Key::InGroup, "from-network", "all that comes from one"),
        rule(
            vec![Match::Translated],
            vec![Action::Jump("others".to_owned())],
            "between others: is it of a connection of a container?",
        ),
    ];
    // What a container sends, and what is for one, has left by now.
    rules.extend(strays(ruleset));
    rules.extend(ruleset.uplinks.iter().map(|(link, v6)| {
        let is = |key, value, not| Match::Is { key, value, not };
        let elsewhere = Value::InterfacePrefix(registry::BRIDGE_PREFIX.to_owned());
        let matches = vec![
            Match::Family { v6: *v6 },
            is(Key::InInterface, Value::Interface(link.clone()), false),
            // What the host itself sends over IPv6 has the output interface for both (`ip6_xmit`).
            is(Key::OutInterface, Value::Interface(link.clone()), true),
            is(Key::OutInterface, elsewhere, true),
            not_in([Key::OutInterface], "bridges"),
        ];
        rule(matches, drop(), NO_ROUTER)
    }));
    base("postrouting", Kind::Filter, Hook::Postrouting, LAST, rules)
}

/// Masquerade, from ports at which no service is ([`Ruleset::source_ports`]).
fn leave(ruleset: &Ruleset) -> Chain {
    let from = |protocol: Value, (first, last): (u16, u16)| {
        let matches = vec![Match::Is { key: Key::Protocol, value: protocol, not: false }];
        rule(
            matches,
            vec![Action::MasqueradeTo { first, last }],
            "from a port at which no service is",
        )
    };
    let mut rules = vec![
        from(Value::Protocol(Transport::Tcp), ruleset.source_ports(Protocol::Tcp)),
        from(Value::Protocol(Transport::Udp), ruleset.source_ports(Protocol::Udp)),
    ];
    let others = OTHERS_WITH_PORTS.map(protocol);
    rules.extend(others.map(|protocol| from(protocol, ruleset.source_ports(Protocol::Sctp))));
    rules.push(rule(vec![], vec![Action::Masquerade], "has no ports"));
    Chain { name: "leave".to_owned(), base: None, rules }
}

/// Protocols besides TCP and UDP whose ports NAT translates (`nf_nat_l4proto_unique_tuple`): SCTP
/// and UDP-Lite. Nothing is published for them.
const OTHERS_WITH_PORTS: [u8; 2] = [132, 136];

/// By the pair of interfaces what is forwarded, whatever its source; by the source what a process
/// of the host sends from a gateway's address.
fn masquerade(ruleset: &Ruleset) -> Chain {
    let leaves = |first: Match, more: Option<Match>| {
        let lo = Match::Is {
            key: Key::OutInterface,
            value: Value::Interface("lo".to_owned()),
            not: true,
        };
        let group = Match::Is { key: Key::OutGroup, value: group(ruleset), not: true };
        let matches = [first, group, lo].into_iter().chain(more).collect();
        rule(matches, vec![Action::Goto("leave".to_owned())], "leaves with the host's address")
    };
    let outgoing = has_internal(ruleset).then(|| not_in([Key::InInterface], "internal"));
    let mut rules = vec![leaves(by_ours(Key::InGroup, ruleset), outgoing)];
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

/// What is dropped is counted, for those who wonder.
fn drop() -> Vec<Action> {
    vec![Action::Count, Action::Drop]
}

fn is_in<const N: usize>(keys: [Key; N], set: &str) -> Match {
    Match::In { keys: keys.to_vec(), set: set.to_owned(), not: false }
}

fn not_in<const N: usize>(keys: [Key; N], set: &str) -> Match {
    Match::In { keys: keys.to_vec(), set: set.to_owned(), not: true }
}

/// Accepted, and let through by the gates or the policy rules behind.
fn marked() -> Vec<Action> {
    let set = Action::Mark { value: registry::FORWARD_MARK, mask: registry::FORWARD_MARK_MASK };
    vec![set, Action::Accept]
}

/// It comes or goes, as `key` says, by a bridge of ours.
fn by_ours(key: Key, ruleset: &Ruleset) -> Match {
    Match::Is { key, value: group(ruleset), not: false }
}

/// The group that our bridges are in.
fn group(ruleset: &Ruleset) -> Value {
    Value::Group(registry::bridge_group(&ruleset.owner))
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

/// It is of this family, and not for the host alone.
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

/// The protocol of that number.
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
        // SCTP is refused before it gets here.
        Protocol::Tcp | Protocol::Sctp => Transport::Tcp,
    }
}
