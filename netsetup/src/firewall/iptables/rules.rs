//! The ruleset as chains and rules, and what iptables-restore is told to have them. Pure.
//!
//! What may pass the gates is marked in POSTROUTING of `mangle`: the last chain that every packet
//! passes, and behind the rules of others there, which neither see the mark nor change it. (Chains
//! of others before ours may accept a packet in `filter`.) Where policy rules are the guards, it
//! has to be marked before routing, and no chain is asked between that and destination NAT: so it
//! is told by what the connection began with, and the first packet of a translated one is marked in
//! `nat` beside its translation.

use super::program::Family;
use super::saved::{DOCKER_USER, Saved};
use crate::firewall::ruleset::{MAPPED, MASQUERADED};
use crate::firewall::{Opening, Ruleset, Zone, on_link};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use tidegate_model::{Protocol, registry};

/// What a rule ends with by which our chains ask Docker's.
pub(super) const TO_DOCKER_USER: &str = "-j DOCKER-USER";

/// What the rule ends with that says that a table is there for us alone.
pub(super) const TABLE_MADE: &str = "--comment \"this table was made for tidegate\"";

/// Ports in one rule (`XT_MULTI_PORTS`).
const PORTS_IN_A_RULE: usize = 15;

/// A table, as far as it is ours.
#[derive(Debug)]
pub(super) struct Table {
    name: &'static str,
    /// With their rules, those that are jumped to first.
    chains: Vec<(String, Vec<String>)>,
    /// Built-in chains, each with the chain of ours that it leads to.
    jumps: Vec<(&'static str, String)>,
}

impl Table {
    /// Whether its jump in `from` comes behind all rules of others, not before them.
    fn is_last(&self, from: &str) -> bool {
        self.name == "mangle" && from != "FORWARD"
    }
}

/// What the names of `owner`'s chains begin with: what fits of its name, and what tells it from
/// others.
pub(super) fn prefix(owner: &str) -> String {
    let hash = registry::fnv1a(owner.as_bytes());
    let hash = (hash ^ hash >> 24 ^ hash >> 48) & 0xff_ffff;
    let readable: String = owner.chars().filter(char::is_ascii_alphanumeric).take(4).collect();
    format!("{}{readable}-{hash:06x}", registry::IPTABLES_CHAIN_PREFIX)
}

/// All that `ruleset` needs in `family`. With `docker_user` the chain DOCKER-USER is asked too.
pub(super) fn tables(ruleset: &Ruleset, family: Family, docker_user: bool) -> Vec<Table> {
    let with = With { ruleset, family, docker_user, prefix: prefix(&ruleset.owner) };
    vec![with.raw(), with.mangle(), with.filter(), with.nat()]
}

/// The first rule of others that is asked behind the one that sets the mark, and may change it.
pub(super) fn behind_mark<'a>(ruleset: &Ruleset, saved: &'a Saved) -> Option<&'a str> {
    let from = if ruleset.gated { "POSTROUTING" } else { "PREROUTING" };
    saved.behind("mangle", from, &format!("{}-MARK", prefix(&ruleset.owner))).next()
}

/// How many lines [`Saved::of_owner`] has where `text` was carried out: chains, the user's among
/// them, rules and jumps.
pub(super) fn count(text: &str, tables: &[Table]) -> usize {
    let chains: usize = tables.iter().map(|table| table.chains.len() + table.jumps.len()).sum();
    let ours = format!("-A {}", registry::IPTABLES_CHAIN_PREFIX);
    let rules = text.lines().filter(|line| line.starts_with(&ours)).count();
    chains + rules + 1
}

/// The names of the tables that `tables` are of and `saved` has not.
pub(super) fn missing(tables: &[Table], saved: &Saved) -> BTreeSet<String> {
    tables
        .iter()
        .filter(|table| !saved.has_table(table.name))
        .map(|table| table.name.to_owned())
        .collect()
}

struct With<'a> {
    ruleset: &'a Ruleset,
    family: Family,
    docker_user: bool,
    prefix: String,
}

impl With<'_> {
    fn chain(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn table(
        &self,
        name: &'static str,
        chains: Vec<(String, Vec<String>)>,
        jumps: &[(&'static str, &str)],
    ) -> Table {
        let jumps = jumps.iter().map(|(from, to)| (*from, self.chain(to))).collect();
        Table { name, chains, jumps }
    }

    fn is_of(&self, ip: IpAddr) -> bool {
        ip.is_ipv6() == self.family.is_v6()
    }

    fn subnets(&self) -> impl Iterator<Item = (&Zone, IpNet)> {
        let of = |zone| subnets_of(zone).map(move |subnet| (zone, subnet));
        self.ruleset.zones.iter().flat_map(of).filter(|(_, subnet)| self.is_of(subnet.addr()))
    }

    fn ports(&self) -> impl Iterator<Item = &Opening> {
        self.ruleset.ports.iter().filter(|port| self.is_of(port.address))
    }

    /// Translated ports, each with its target's address and port.
    fn translated(&self) -> impl Iterator<Item = (&Opening, IpAddr, u16)> {
        self.ports().filter_map(|port| Some((port, port.to?.ip(), port.to?.port())))
    }

    fn raw(&self) -> Table {
        // Only what is about to be dropped is asked whether it is the host's.
        let stray = self.chain("STRAY");
        let strays = vec![
            rule("-i lo", "RETURN", "the host reaches its networks"),
            rule("", "DROP", "from elsewhere than it should be"),
        ];
        let mut rules = Vec::new();
        for (Zone { bridge, .. }, subnet) in self.subnets() {
            rules.push(rule(
                &format!("-d {subnet} ! -i {bridge}"),
                &stray,
                "sent straight to a container or a gateway, past the published ports",
            ));
            rules.push(rule(
                &format!("-s {subnet} ! -i {bridge}"),
                &stray,
                "claims to come from a container",
            ));
        }
        let zones = &self.ruleset.zones;
        for zone @ Zone { bridge, .. } in zones.iter().filter(|zone| !zone.verified) {
            let own = subnets_of(zone).filter(|subnet| self.is_of(subnet.addr()));
            rules.extend(own.map(|own| {
                let why = "has a source address that is not of its network";
                rule(&format!("! -s {own} -i {bridge}"), &self.chain("SOURCE"), why)
            }));
        }
        for (Zone { bridge, .. }, subnet) in self.subnets().filter(|(zone, _)| zone.internal) {
            for net in on_link(self.family.is_v6()) {
                let why = "what neighbours need to find each other";
                rules.push(rule(&format!("-d {net} -i {bridge} -p ipv6-icmp"), "RETURN", why));
            }
            rules.push(rule(&format!("! -d {subnet} -i {bridge}"), "DROP", GATEWAY_ALONE));
        }
        let loopback = grouped(self.ports().filter(|port| port.address.is_loopback()));
        rules.extend(loopback.iter().map(|matches| {
            rule(matches, &stray, "published on a loopback address, and asked for from elsewhere")
        }));
        // Link-local addresses belong to no subnet, and who looks for duplicates of its address has
        // none yet (RFC 4862, section 5.4.2). The kernel forwards neither.
        let mut sources = Vec::new();
        if self.family.is_v6() {
            let why = "as neighbours have it";
            sources.extend(
                ["fe80::/10", "::/128"].map(|net| rule(&format!("-s {net}"), "RETURN", why)),
            );
        }
        sources.push(rule("", "DROP", "from nobody in this network"));
        let chains =
            vec![(stray, strays), (self.chain("SOURCE"), sources), (self.chain("RAW"), rules)];
        self.table("raw", chains, &[("PREROUTING", "RAW")])
    }

    fn mangle(&self) -> Table {
        let zones = &self.ruleset.zones;
        let from = zones.iter().map(|Zone { bridge, .. }| {
            rule(
                &format!("-i {bridge}"),
                "RETURN",
                "from a container: nothing that a network is closed to",
            )
        });
        let mut rules: Vec<_> = from.collect();
        if self.ruleset.gated {
            let to = zones.iter().filter(|zone| !zone.internal).map(|Zone { bridge, .. }| {
                rule(
                    &format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED,DNAT"),
                    &mark(),
                    "may be forwarded: an answer, or it came by a published port; the gate lets nothing else pass",
                )
            });
            rules.extend(to);
            return self.marking(rules, "POSTROUTING");
        }
        for (zone, subnet) in self.subnets() {
            if !zone.internal {
                rules.push(rule(
                    &format!("-m conntrack --ctstate RELATED,ESTABLISHED --ctorigsrc {subnet} --ctdir REPLY"),
                    &mark(),
                    "may be forwarded: an answer to a container; policy rules let nothing else pass",
                ));
            }
            rules.push(rule(
                &format!("-m conntrack --ctstate DNAT --ctreplsrc {subnet} --ctdir ORIGINAL"),
                &mark(),
                "may be forwarded: it came by a published port",
            ));
        }
        self.marking(rules, "PREROUTING")
    }

    /// The table in which `rules` set the mark, behind the rules of others in the chain `from`: so
    /// that those neither see it nor change it.
    fn marking(&self, rules: Vec<String>, from: &'static str) -> Table {
        let mut chains = vec![(self.chain("MARK"), rules)];
        let mut jumps = vec![(from, "MARK")];
        let marks = |value: fn(u8) -> u32| -> Vec<String> {
            let replies = self.ruleset.replies.iter().filter(|(_, net)| self.is_of(net.addr()));
            replies
                .flat_map(|(number, net)| {
                    let mark = format!(
                        "MARK --set-xmark {:#x}/{:#x}",
                        value(*number),
                        registry::UPLINK_MARK_MASK
                    );
                    let asked = format!("-m conntrack --ctorigdst {net}");
                    let why = "asked at an address of that uplink";
                    [rule(&asked, &mark, why), rule(&asked, "RETURN", why)]
                })
                .collect()
        };
        if self.ruleset.replies.iter().any(|(_, net)| self.is_of(net.addr())) {
            // What was asked tells the uplink; the mark of the connection is others'.
            let answers = |chain: &str| -> Vec<String> {
                let chain = self.chain(chain);
                let zones = self.ruleset.zones.iter().filter(|zone| !zone.internal);
                zones
                    .map(|Zone { bridge, .. }| {
                        let answer =
                            format!("-i {bridge} -m conntrack --ctstate DNAT --ctdir REPLY");
                        rule(&answer, &chain, "an answer of a translated port")
                    })
                    .collect()
            };
            chains.extend([
                (self.chain("ASKED"), marks(registry::uplink_mark)),
                (self.chain("ROUTED"), marks(|_| 0)),
                (self.chain("ROUTE"), answers("ASKED")),
                (self.chain("FORWARD"), answers("ROUTED")),
            ]);
            jumps.extend([("PREROUTING", "ROUTE"), ("FORWARD", "FORWARD")]);
        }
        self.table("mangle", chains, &jumps)
    }

    fn filter(&self) -> Table {
        let zones = &self.ruleset.zones;
        let to_users = |why: &str| {
            let mut rules = vec![rule("", registry::USER_CHAIN, why)];
            if self.docker_user {
                rules.push(rule("", DOCKER_USER, "and whoever has rules for Docker"));
            }
            rules
        };
        let clamp = || {
            rule(
                "-p tcp -m tcp --tcp-flags SYN,RST SYN",
                "TCPMSS --clamp-mss-to-pmtu",
                "segments that fit the path",
            )
        };
        let ports: BTreeSet<_> =
            self.translated().map(|(port, ip, to)| (ip, name(port.protocol), to)).collect();
        let ports = ports.into_iter().map(|(ip, protocol, to)| {
            format!("-d {ip} -p {protocol} -m {protocol} --dport {to} -j ACCEPT")
        });
        let mut to_network = to_users("forwarded to a container: the user comes first");
        to_network.push(clamp());
        to_network.push(rule(
            "-m conntrack --ctstate RELATED,ESTABLISHED",
            "ACCEPT",
            "an answer to a container, or a connection to a published port",
        ));
        to_network.push(rule("-m conntrack --ctstate INVALID", "DROP", "belongs to no connection"));
        to_network.extend(zones.iter().map(|Zone { bridge, .. }| {
            rule(
                &format!("-i {bridge} -o {bridge}"),
                "ACCEPT",
                "bridged, where br_netfilter shows that",
            )
        }));
        if self.family.is_v6() {
            // The kernel itself drops these in IPv4 (`__fib_validate_source`).
            let own = "-m addrtype --src-type LOCAL";
            to_network.push(rule(own, "DROP", "claims to come from the host itself"));
            let mapped = format!("-s {MAPPED}");
            let why = "an IPv4 address over IPv6: no kernel sends that";
            to_network.push(rule(&mapped, "DROP", why));
        }
        to_network.push(rule(
            "-m conntrack --ctstate DNAT",
            &self.chain("PORTS"),
            "a published port",
        ));
        to_network.push(rule("", "DROP", "networks are closed, to the outside and to one another"));

        let mut from_network = to_users("forwarded from a container: the user comes first");
        from_network.push(clamp());
        from_network.push(rule(
            "-m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY",
            "ACCEPT",
            "an answer to who asked for a published port",
        ));
        from_network.push(rule(
            "-m conntrack --ctstate INVALID",
            "DROP",
            "belongs to no connection, and would leave with a container's address",
        ));
        from_network.push(rule("", &self.chain("PROTO"), "may it be masqueraded?"));
        from_network.extend(
            // Their owners' rules decide about those: what we accept they would not be asked.
            registry::BRIDGES_OF_OTHERS.iter().map(|bridge| {
                rule(&format!("-o {bridge}"), "RETURN", "a network of others: theirs to say")
            }),
        );
        from_network.push(rule("", "ACCEPT", "containers reach the outside"));

        let mut forward = Vec::new();
        for Zone { bridge, .. } in zones {
            forward.push(rule(
                &format!("-o {bridge}"),
                &self.chain("TO"),
                "all that goes to a container",
            ));
        }
        for Zone { bridge, internal, .. } in zones {
            forward.push(if *internal {
                rule(&format!("-i {bridge}"), "DROP", "an internal network has no egress")
            } else {
                rule(&format!("-i {bridge}"), &self.chain("FROM"), "all that comes from one")
            });
        }

        let uplinks = || self.ruleset.uplinks.iter().filter(|(_, v6)| *v6 == self.family.is_v6());
        let bridges = self.ruleset.bridges.iter().filter(|_| uplinks().next().is_some());
        forward.extend(bridges.map(|bridge| {
            rule(&format!("-o {bridge}"), "RETURN", "a network of another project: its to say")
        }));
        for (link, _) in uplinks() {
            let elsewhere = format!("-i {link} ! -o {}+", registry::BRIDGE_PREFIX);
            forward.push(rule(
                &elsewhere,
                "DROP",
                "the host forwards for container networks alone",
            ));
        }

        let mut input =
            vec![rule("-i lo", "RETURN", "the host asks itself: nothing that is forwarded")];
        // The broadcast address of the subnet is in the subnet. Neighbour discovery is multicast.
        let but = if self.family.is_v6() { " ! -p ipv6-icmp" } else { "" };
        input.extend(zones.iter().filter(|zone| zone.internal).map(|Zone { bridge, .. }| {
            rule(&format!("-i {bridge}{but} -m addrtype ! --dst-type LOCAL"), "DROP", GATEWAY_ALONE)
        }));
        input.extend(grouped(self.ports().filter(|port| !port.address.is_loopback())).iter().map(
            |matches| {
                rule(
                    matches,
                    &self.chain("USERS"),
                    "a published port that a socket of ours serves: the user comes first",
                )
            },
        ));
        let chains = vec![
            (self.chain("PORTS"), ports.collect()),
            (self.chain("USERS"), to_users("the user comes first")),
            (self.chain("TO"), to_network),
            (self.chain("PROTO"), self.protocols()),
            (self.chain("FROM"), from_network),
            (self.chain("FORWARD"), forward),
            (self.chain("INPUT"), input),
        ];
        self.table("filter", chains, &[("FORWARD", "FORWARD"), ("INPUT", "INPUT")])
    }

    fn nat(&self) -> Table {
        let zones = &self.ruleset.zones;
        let mut translate: Vec<_> = zones
            .iter()
            .map(|Zone { bridge, .. }| {
                rule(
                    &format!("-i {bridge}"),
                    "RETURN",
                    "containers are served by our sockets: they may ask for their own port",
                )
            })
            .collect();
        for net in on_link(self.family.is_v6()).into_iter().filter(|net| !net.addr().is_multicast())
        {
            translate.push(rule(
                &format!("-d {net}"),
                "RETURN",
                "asks on the link: a socket serves it",
            ));
        }
        let loopback = if self.family.is_v6() { "::1/128" } else { "127.0.0.0/8" };
        let asked = format!("! -d {loopback} -m addrtype --dst-type LOCAL");
        translate.push(rule(&asked, &self.chain("PORTS"), "asks for the host"));
        let mut ports = Vec::new();
        for (port, ip, to) in self.translated() {
            let at = if port.address.is_unspecified() {
                String::new()
            } else {
                format!("-d {} ", port.address)
            };
            let protocol = name(port.protocol);
            let matches = format!("{at}-p {protocol} -m {protocol} --dport {}", port.port);
            let to = std::net::SocketAddr::new(ip, to);
            if !self.ruleset.gated {
                ports.push(format!("{matches} -j {}", mark()));
            }
            ports.push(format!("{matches} -j DNAT --to-destination {to}"));
        }
        let own = zones.iter().map(|zone| zone.bridge.as_str()).chain(["lo"]);
        let mut masquerade: Vec<_> =
            own.map(|link| rule(&format!("-o {link}"), "RETURN", "stays on the host")).collect();
        // By the pair of interfaces what is forwarded, whatever its source (the kernel gives the
        // input interface there from Linux 5.7 on); by the source what a process sends from a
        // gateway's address.
        masquerade.extend(self.subnets().filter(|(zone, _)| !zone.internal).flat_map(
            |(zone, subnet)| {
                [format!("-i {}", zone.bridge), format!("-s {subnet}")].map(|matches| {
                    rule(&matches, &self.chain("LEAVE"), "leaves with the host's address")
                })
            },
        ));
        let chains = vec![
            (self.chain("PORTS"), ports),
            (self.chain("DNAT"), translate),
            (self.chain("LEAVE"), self.leave()),
            (self.chain("SNAT"), masquerade),
        ];
        self.table("nat", chains, &[("PREROUTING", "DNAT"), ("POSTROUTING", "SNAT")])
    }

    /// Drops protocols other than [`MASQUERADED`].
    fn protocols(&self) -> Vec<String> {
        let known = MASQUERADED.iter().filter_map(|number| match (number, self.family.is_v6()) {
            (1, false) => Some("icmp"),
            (58, true) => Some("ipv6-icmp"),
            (6, _) => Some("tcp"),
            (17, _) => Some("udp"),
            (132, _) => Some("sctp"),
            (136, _) => Some("udplite"),
            _ => None,
        });
        let why = "connection tracking tells its connections apart";
        let known = known.map(|name| rule(&format!("-p {name}"), "RETURN", why));
        let why = "connections of this protocol differ by addresses alone";
        known.chain([rule("", "DROP", why)]).collect()
    }

    /// Masquerade, from ports at which no service is ([`Ruleset::source_ports`]). The target knows
    /// the ports of no other protocols.
    fn leave(&self) -> Vec<String> {
        let protocols = [("tcp", Protocol::Tcp), ("udp", Protocol::Udp), ("sctp", Protocol::Sctp)];
        let mut rules: Vec<String> = protocols
            .iter()
            .map(|(name, protocol)| {
                let ports = match self.ruleset.source_ports(*protocol) {
                    (first, last) if first == last => first.to_string(),
                    (first, last) => format!("{first}-{last}"),
                };
                let target = format!("MASQUERADE --to-ports {ports}");
                rule(&format!("-p {name}"), &target, "from a port at which no service is")
            })
            .collect();
        rules.push(rule("", "MASQUERADE", "has no ports"));
        rules
    }
}

const GATEWAY_ALONE: &str = "an internal network reaches nothing of the host but its gateway";

/// A rule without its chain.
fn rule(matches: &str, target: &str, why: &str) -> String {
    let separator = if matches.is_empty() { "" } else { " " };
    format!("{matches}{separator}-m comment --comment \"{why}\" -j {target}")
}

fn mark() -> String {
    format!("MARK --set-xmark {:#x}/{:#x}", registry::FORWARD_MARK, registry::FORWARD_MARK_MASK)
}

const fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Udp => "udp",
        // SCTP is refused before it gets here.
        Protocol::Tcp | Protocol::Sctp => "tcp",
    }
}

fn subnets_of(zone: &Zone) -> impl Iterator<Item = IpNet> + '_ {
    zone.subnets.iter().map(IpNet::trunc)
}

/// What matches `ports` at the addresses where they are published, in as few rules as can be.
fn grouped<'a>(ports: impl Iterator<Item = &'a Opening>) -> Vec<String> {
    let mut by_place: BTreeMap<_, BTreeSet<u16>> = BTreeMap::new();
    for port in ports {
        by_place.entry((port.address, name(port.protocol))).or_default().insert(port.port);
    }
    let mut rules = Vec::new();
    for ((address, protocol), ports) in by_place {
        let at = if address.is_unspecified() { String::new() } else { format!("-d {address} ") };
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        rules.extend(
            ports
                .chunks(PORTS_IN_A_RULE)
                .map(|some| format!("{at}-p {protocol} -m multiport --dports {}", some.join(","))),
        );
    }
    rules
}

/// What iptables-restore is told with `--noflush`, to have `tables` of `owner` where `saved` is
/// there. Tables in `made` are known to be there for us alone.
pub(super) fn restore(
    tables: &[Table],
    owner: &str,
    saved: &Saved,
    made: &BTreeSet<String>,
) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    for table in tables {
        let _ = writeln!(text, "*{}", table.name);
        if table.name == "filter" && !saved.has_chain("filter", registry::USER_CHAIN) {
            let _ = writeln!(text, ":{} - [0:0]", registry::USER_CHAIN);
        }
        for (chain, _) in &table.chains {
            let _ = writeln!(text, ":{chain} - [0:0]");
        }
        let made = made.contains(table.name) || !saved.has_table(table.name);
        let made = made.then(|| format!("-m comment {TABLE_MADE}"));
        // With the first, which each table has.
        for ((chain, rules), made) in
            table.chains.iter().zip([made].into_iter().chain(std::iter::repeat(None)))
        {
            for rule in rules.iter().chain(&made) {
                let _ = writeln!(text, "-A {chain} {rule}");
            }
        }
        for (from, to) in &table.jumps {
            let there = saved.count(table.name, &format!("-A {from} -j {to}"));
            // Elsewhere than it has to be it goes, and is made anew.
            let last = table.is_last(from);
            let moves = last && saved.behind(table.name, from, to).next().is_some();
            if there == 0 || moves {
                let how = if last { "-A" } else { "-I" };
                let _ = writeln!(text, "{how} {from} -j {to}");
            }
            // The first of several is deleted, which is not the one that was appended.
            for _ in usize::from(!moves)..there {
                let _ = writeln!(text, "-D {from} -j {to}");
            }
        }
        // What an earlier ruleset needed, or an earlier version.
        for (from, to) in saved.jumps(table.name, owner) {
            if !table.jumps.iter().any(|jump| *jump == (from, to.to_owned())) {
                let _ = writeln!(text, "-D {from} -j {to}");
            }
        }
        let left: Vec<&str> = saved
            .chains_of(table.name, owner)
            .filter(|left| !table.chains.iter().any(|(chain, _)| chain == left))
            .collect();
        for how in ["-F", "-X"] {
            for chain in &left {
                let _ = writeln!(text, "{how} {chain}");
            }
        }
        let _ = writeln!(text, "COMMIT");
    }
    text
}

/// What it is told to remove all of `owner` that `saved` has; empty if it has nothing.
pub(super) fn removal(saved: &Saved, owner: &str) -> String {
    let mut text = String::new();
    for table in ["raw", "mangle", "filter", "nat"] {
        let mut lines = String::new();
        for (from, to) in saved.jumps(table, owner) {
            let _ = writeln!(lines, "-D {from} -j {to}");
        }
        let chains: Vec<&str> = saved.chains_of(table, owner).collect();
        let users = table == "filter"
            && saved.has_chain("filter", registry::USER_CHAIN)
            && saved.user_chain_is_owners_alone(owner);
        for chain in &chains {
            let _ = writeln!(lines, "-F {chain}");
        }
        for chain in chains.into_iter().chain(users.then_some(registry::USER_CHAIN)) {
            let _ = writeln!(lines, "-X {chain}");
        }
        if !lines.is_empty() {
            let _ = write!(text, "*{table}\n{lines}COMMIT\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_chains_fit_and_differ() {
        /// `XT_EXTENSION_MAXNAMELEN` less the NUL.
        const LONGEST: usize = 28;
        let long = "a-very-long-name-of-a-project-that-goes-on-and-on-and-on-and-on";
        let ruleset = Ruleset { owner: long.to_owned(), ..Ruleset::default() };
        for table in tables(&ruleset, Family::V6, true) {
            for (chain, _) in table.chains {
                assert!(chain.len() <= LONGEST, "{chain}");
            }
        }
        assert_ne!(prefix("demo"), prefix("demo2"));
        assert_ne!(prefix("demo-1"), prefix("demo1"));
    }

    #[test]
    fn ports_are_grouped_by_fifteen() {
        let opening = |port| Opening {
            protocol: Protocol::Tcp,
            address: "0.0.0.0".parse().unwrap(),
            port,
            to: None,
        };
        let ports: Vec<Opening> = (1..=16).map(opening).collect();
        assert_eq!(
            grouped(ports.iter()),
            [
                "-p tcp -m multiport --dports 1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "-p tcp -m multiport --dports 16",
            ]
        );
    }

    #[test]
    fn what_is_there_is_not_made_again_and_what_is_there_twice_goes_once() {
        let ruleset = Ruleset { owner: "demo".to_owned(), ..Ruleset::default() };
        let chain = format!("{}-RAW", prefix("demo"));
        let saved = Saved::of(&format!(
            "*raw\n:PREROUTING ACCEPT [0:0]\n:{chain} - [0:0]\n-A PREROUTING -j {chain}\n-A PREROUTING -j {chain}\nCOMMIT\n"
        ));
        let text =
            restore(&tables(&ruleset, Family::V4, false)[..1], "demo", &saved, &BTreeSet::new());
        assert!(!text.contains("-I PREROUTING"), "{text}");
        assert_eq!(text.matches("-D PREROUTING").count(), 1, "{text}");
        assert!(!text.contains(TABLE_MADE), "{text}");
        let text = removal(&saved, "demo");
        assert_eq!(text.matches("-D PREROUTING").count(), 2, "{text}");
        assert!(text.contains(&format!("-X {chain}")), "{text}");
        assert_eq!(removal(&saved, "other"), "");
        let mark = format!("{}-MARK", prefix("demo"));
        for hook in ["PREROUTING", "POSTROUTING", "FORWARD"] {
            let saved = Saved::of(&format!(
                "*mangle\n:{hook} ACCEPT [0:0]\n:{mark} - [0:0]\n-A {hook} -j {mark}\nCOMMIT\n"
            ));
            let text = removal(&saved, "demo");
            assert_eq!(text.matches(&format!("-D {hook} -j {mark}")).count(), 1, "{text}");
        }
    }
}
