//! Rendering of rulesets as iptables chains and as input of iptables-restore. Pure.
//!
//! Packets that may pass the gates are marked in POSTROUTING of `mangle`, after all foreign rules
//! there, which can therefore neither see nor change the mark. This is the last chain that every
//! packet passes; in `filter`, a foreign chain before tidegate's may accept a packet. With policy
//! rules as guards, packets must be marked before routing. No chain exists between destination NAT
//! and routing, so packets are identified by the original direction of their connection, and the
//! first packet of a translated connection is marked in `nat`, next to its translation.

use super::program::{Family, TABLES};
use super::saved::{DOCKER_USER, Saved, TABLE_MADE};
use crate::firewall::ruleset::{MAPPED, MASQUERADED};
use crate::firewall::{Opening, Ruleset, Zone, link_scoped_prefixes};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::IpAddr;
use tidegate_model::{Protocol, registry};

/// A packet of an established connection that conntrack translates. A flow without NAT is not one
/// of a container: tidegate translates all that pass a bridge. One match tests both, because each
/// takes time for every packet; `SEEN_REPLY` is what makes a connection established.
const ESTABLISHED_WITH_NAT: &str = "--ctstate SNAT,DNAT --ctstatus SEEN_REPLY";
/// A reply of a connection that conntrack translates.
const REPLY_WITH_NAT: &str = "--ctstate SNAT,DNAT --ctdir REPLY";
/// A reply of a connection that was masqueraded.
const REPLY_TO_EGRESS: &str = "--ctstate SNAT --ctdir REPLY";

/// Chain for ICMP errors about packets of no connection.
const UNRELATED: &str = "ICMP";

/// Maximum ports per rule (`XT_MULTI_PORTS`).
const MAX_PORTS_PER_RULE: usize = 15;

/// The owner's part of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) name: &'static str,
    /// Chains with their rules. Jump targets precede the chains that jump to them.
    chains: Vec<(String, Vec<String>)>,
    /// Jumps from built-in chains to the owner's chains.
    jumps: Vec<(&'static str, String)>,
}

impl Table {
    /// Returns whether the jump in `from` must follow all foreign rules instead of preceding them.
    fn is_last(&self, from: &str) -> bool {
        self.name == "mangle" && from != "FORWARD"
    }
}

/// Returns the prefix of the owner's chain names: a part of its name, and a hash for uniqueness.
pub(super) fn prefix(owner: &str) -> String {
    let hash = registry::fnv1a(owner.as_bytes());
    let hash = (hash ^ hash >> 24 ^ hash >> 48) & 0xff_ffff;
    let readable: String = owner.chars().filter(char::is_ascii_alphanumeric).take(4).collect();
    format!("{}{readable}-{hash:06x}", registry::IPTABLES_CHAIN_PREFIX)
}

/// Renders `ruleset` for `family`. With `docker_user`, also jumps to the chain DOCKER-USER.
pub(super) fn tables(ruleset: &Ruleset, family: Family, docker_user: bool) -> Vec<Table> {
    let renderer = Renderer { ruleset, family, docker_user, prefix: prefix(&ruleset.owner) };
    vec![renderer.raw(), renderer.mangle(), renderer.filter(), renderer.nat()]
}

/// Returns the first foreign rule after the mark chain that may change the mark.
pub(super) fn rule_after_mark<'a>(ruleset: &Ruleset, saved: &'a Saved) -> Option<&'a str> {
    let from = if ruleset.gated { "POSTROUTING" } else { "PREROUTING" };
    saved.mark_rules_after("mangle", from, &format!("{}-MARK", prefix(&ruleset.owner))).next()
}

/// Returns the expected number of lines of [`Saved::of_owner`] after `text` was applied: chains
/// including the user chain, rules and jumps.
pub(super) fn count(text: &str, tables: &[Table]) -> usize {
    let chains: usize = tables.iter().map(|table| table.chains.len() + table.jumps.len()).sum();
    let ours = format!("-A {}", registry::IPTABLES_CHAIN_PREFIX);
    let rules = text.lines().filter(|line| line.starts_with(&ours)).count();
    let users = tables.iter().filter(|table| table.name == "filter").count();
    chains + rules + users
}

/// Returns the names of `tables` that are missing in `saved`.
pub(super) fn missing(tables: &[Table], saved: &Saved) -> BTreeSet<String> {
    tables
        .iter()
        .filter(|table| !saved.has_table(table.name))
        .map(|table| table.name.to_owned())
        .collect()
}

struct Renderer<'a> {
    ruleset: &'a Ruleset,
    family: Family,
    docker_user: bool,
    prefix: String,
}

impl Renderer<'_> {
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

    /// Returns kernel-published ports with the address and port of their target.
    fn translated(&self) -> impl Iterator<Item = (&Opening, IpAddr, u16)> {
        self.ports().filter_map(|port| Some((port, port.to?.ip(), port.to?.port())))
    }

    fn raw(&self) -> Table {
        // Packets sent by the host are exempted only here, for packets about to be dropped.
        let stray = self.chain("STRAY");
        let strays = vec![
            rule("-i lo", "RETURN", "sent by the host itself"),
            rule("", "DROP", "wrong input interface"),
        ];
        let mut rules = Vec::new();
        for (Zone { bridge, .. }, subnet) in self.subnets() {
            rules.push(rule(
                &format!("-d {subnet} ! -i {bridge}"),
                &stray,
                "direct access to a container or gateway address",
            ));
            rules.push(rule(
                &format!("-s {subnet} ! -i {bridge}"),
                &stray,
                "spoofed container source address",
            ));
        }
        let zones = &self.ruleset.zones;
        let unverified = zones.iter().filter(|zone| !zone.verified && !zone.overlay);
        for zone @ Zone { bridge, .. } in unverified {
            let own = subnets_of(zone).filter(|subnet| self.is_of(subnet.addr()));
            rules.extend(own.map(|own| {
                let comment = "source address outside the subnet of the bridge";
                rule(&format!("! -s {own} -i {bridge}"), &self.chain("SOURCE"), comment)
            }));
        }
        let internal = self.subnets().filter(|(zone, _)| zone.internal && !zone.overlay);
        for (Zone { bridge, .. }, subnet) in internal {
            for net in link_scoped_prefixes(self.family.is_v6()) {
                let comment = "neighbour discovery";
                rules.push(rule(&format!("-d {net} -i {bridge} -p ipv6-icmp"), "RETURN", comment));
            }
            rules.push(rule(&format!("! -d {subnet} -i {bridge}"), "DROP", GATEWAY_ONLY));
        }
        let loopback = grouped(self.ports().filter(|port| port.address.is_loopback()));
        rules.extend(loopback.iter().map(|matches| {
            rule(
                matches,
                &stray,
                "port published on a loopback address: no access from other interfaces",
            )
        }));
        // Exempt are link-local sources, which are in no subnet, and the unspecified source of
        // duplicate address detection (RFC 4862, section 5.4.2). The kernel forwards neither.
        let mut sources = Vec::new();
        if self.family.is_v6() {
            let comment = "link-local or unspecified source";
            sources.extend(
                ["fe80::/10", "::/128"].map(|net| rule(&format!("-s {net}"), "RETURN", comment)),
            );
        }
        sources.push(rule("", "DROP", "source address outside the subnet of the bridge"));
        let chains =
            vec![(stray, strays), (self.chain("SOURCE"), sources), (self.chain("RAW"), rules)];
        self.table("raw", chains, &[("PREROUTING", "RAW")])
    }

    fn mangle(&self) -> Table {
        let zones = &self.ruleset.zones;
        let from = zones.iter().map(|Zone { bridge, .. }| {
            rule(&format!("-i {bridge}"), "RETURN", "from a container: guards do not apply")
        });
        let mut rules: Vec<_> = from.collect();
        if self.ruleset.gated {
            rules.push(self.unrelated_errors());
            let to = zones.iter().filter(|zone| !zone.internal).map(|Zone { bridge, .. }| {
                [("--ctstate DNAT", "published ports"), (REPLY_TO_EGRESS, "replies")].map(
                    |(is, what)| {
                        let matches = format!("-o {bridge} -m conntrack {is}");
                        rule(&matches, &mark(), &format!("mark for the gate: {what}"))
                    },
                )
            });
            rules.extend(to.flatten());
            return self.marking(rules, "POSTROUTING");
        }
        for (zone, subnet) in self.subnets() {
            if !zone.internal {
                rules.push(rule(
                    &format!("-m conntrack {REPLY_TO_EGRESS} --ctorigsrc {subnet}"),
                    &mark(),
                    "mark for policy rules: replies to containers",
                ));
            }
            rules.push(rule(
                &format!("-m conntrack --ctstate DNAT --ctreplsrc {subnet} --ctdir ORIGINAL"),
                &mark(),
                "mark for policy rules: published port",
            ));
        }
        self.marking(rules, "PREROUTING")
    }

    /// Drops ICMP errors of the host about packets of no connection. Conntrack knows the packets
    /// that an error concerns, except for forged ones that the kernel rejects before: fragments
    /// that are never completed, and unknown options. A neighbour of the host, or a router in a
    /// container, could otherwise have the host send their payload to a container.
    ///
    /// One rule selects the errors, so that the number of networks costs other packets nothing.
    fn unrelated_errors(&self) -> String {
        let icmp = if self.family.is_v6() { "ipv6-icmp" } else { "icmp" };
        let matches = format!("-p {icmp} -m conntrack --ctstate INVALID");
        rule(&matches, &self.chain(UNRELATED), "ICMP error about a packet of no connection")
    }

    /// Builds the table in which `rules` set the mark. The chain is entered after all foreign rules
    /// in the built-in chain `from`, so that these neither see nor change the mark.
    fn marking(&self, rules: Vec<String>, from: &'static str) -> Table {
        let drops = self.ruleset.zones.iter().map(|Zone { bridge, .. }| {
            rule(&format!("-o {bridge}"), "DROP", "ICMP error about a packet of no connection")
        });
        let mut chains =
            vec![(self.chain(UNRELATED), drops.collect()), (self.chain("MARK"), rules)];
        let mut jumps = vec![(from, "MARK")];
        if from != "POSTROUTING" {
            chains.push((self.chain("ERRORS"), vec![self.unrelated_errors()]));
            jumps.push(("POSTROUTING", "ERRORS"));
        }
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
                    let comment = "original destination is an address of this uplink";
                    [rule(&asked, &mark, comment), rule(&asked, "RETURN", comment)]
                })
                .collect()
        };
        if self.ruleset.replies.iter().any(|(_, net)| self.is_of(net.addr())) {
            // The original destination determines the uplink. Connection marks belong to other
            // software.
            let answers = |chain: &str| -> Vec<String> {
                let chain = self.chain(chain);
                let zones = self.ruleset.zones.iter().filter(|zone| !zone.internal);
                zones
                    .map(|Zone { bridge, .. }| {
                        let answer =
                            format!("-i {bridge} -m conntrack --ctstate DNAT --ctdir REPLY");
                        rule(&answer, &chain, "reply of a kernel-published port")
                    })
                    .collect()
            };
            chains.extend([
                (self.chain("UPLINK"), marks(registry::uplink_mark)),
                (self.chain("CLEAR"), marks(|_| 0)),
                (self.chain("ROUTE"), answers("UPLINK")),
                (self.chain("FORWARD"), answers("CLEAR")),
            ]);
            jumps.extend([("PREROUTING", "ROUTE"), ("FORWARD", "FORWARD")]);
        }
        self.table("mangle", chains, &jumps)
    }

    fn filter(&self) -> Table {
        let zones = &self.ruleset.zones;
        let to_users = |comment: &str| {
            let mut rules = vec![rule("", registry::USER_CHAIN, comment)];
            if self.docker_user {
                rules.push(rule("", DOCKER_USER, "rules for Docker"));
            }
            rules
        };
        let clamp = || {
            rule(
                "-p tcp -m tcp --tcp-flags SYN,RST SYN",
                "TCPMSS --clamp-mss-to-pmtu",
                "clamp MSS to path MTU",
            )
        };
        let ports: BTreeSet<_> =
            self.translated().map(|(port, ip, to)| (ip, name(port.protocol), to)).collect();
        let ports = ports.into_iter().map(|(ip, protocol, to)| {
            format!("-d {ip} -p {protocol} -m {protocol} --dport {to} -j ACCEPT")
        });
        let mut to_network = to_users("forwarded to a container: user rules first");
        to_network.push(clamp());
        to_network.push(rule(
            &format!("-m conntrack {ESTABLISHED_WITH_NAT}"),
            "ACCEPT",
            "established connections with NAT",
        ));
        to_network.push(rule("-m conntrack --ctstate INVALID", "DROP", "invalid connection state"));
        to_network.extend(zones.iter().map(|Zone { bridge, .. }| {
            rule(
                &format!("-i {bridge} -o {bridge}"),
                "ACCEPT",
                "bridged traffic, visible with br_netfilter",
            )
        }));
        if self.family.is_v6() {
            // For IPv4, the kernel drops such packets itself (`__fib_validate_source`).
            let own = "-m addrtype --src-type LOCAL";
            to_network.push(rule(own, "DROP", "spoofed source address of the host"));
            let mapped = format!("-s {MAPPED}");
            to_network.push(rule(&mapped, "DROP", "spoofed source address: IPv4-mapped"));
        }
        to_network.push(rule(
            "-m conntrack --ctstate DNAT",
            &self.chain("PORTS"),
            "published port",
        ));
        to_network.push(rule("", "DROP", "isolation"));

        let mut from_network = to_users("forwarded from a container: user rules first");
        from_network.push(clamp());
        from_network.push(rule(
            &format!("-m conntrack {REPLY_WITH_NAT}"),
            "ACCEPT",
            "replies of published ports",
        ));
        from_network.push(rule(
            "-m conntrack --ctstate INVALID",
            "DROP",
            "invalid connection state: would leave without masquerade",
        ));
        // Conntrack has seen its first packet elsewhere: on a bridge with `br_netfilter`, or before
        // these rules were in force. It does not translate such a connection.
        from_network.push(rule(
            "-m conntrack ! --ctstate SNAT --ctstatus CONFIRMED",
            "DROP",
            "would leave without masquerade",
        ));
        from_network.push(rule("", &self.chain("PROTO"), "check for protocols without egress"));
        from_network.extend(
            // The rules of other software decide about its bridges. They would not be evaluated
            // after an accept here.
            registry::BRIDGES_OF_OTHERS.iter().map(|bridge| {
                rule(
                    &format!("-o {bridge}"),
                    "RETURN",
                    "bridge of other software: its rules decide",
                )
            }),
        );
        from_network.push(rule("", "ACCEPT", "egress"));

        let mut forward = Vec::new();
        for Zone { bridge, .. } in zones {
            forward.push(rule(&format!("-o {bridge}"), &self.chain("TO"), "to a container"));
        }
        for Zone { bridge, internal, .. } in zones {
            forward.push(if *internal {
                rule(&format!("-i {bridge}"), "DROP", "no egress from internal networks")
            } else {
                rule(&format!("-i {bridge}"), &self.chain("FROM"), "from a container")
            });
        }

        let uplinks = || self.ruleset.uplinks.iter().filter(|(_, v6)| *v6 == self.family.is_v6());
        let bridges = self.ruleset.bridges.iter().filter(|_| uplinks().next().is_some());
        forward.extend(bridges.map(|bridge| {
            rule(&format!("-o {bridge}"), "RETURN", "bridge of another project: its rules decide")
        }));
        for (link, _) in uplinks() {
            let elsewhere = format!("-i {link} ! -o {}+", registry::BRIDGE_PREFIX);
            forward.push(rule(&elsewhere, "DROP", "the host forwards for container networks only"));
        }

        let mut input = vec![rule("-i lo", "RETURN", "sent by the host itself")];
        // The subnet includes its broadcast address. Neighbour discovery uses multicast.
        let but = if self.family.is_v6() { " ! -p ipv6-icmp" } else { "" };
        input.extend(zones.iter().filter(|zone| zone.internal).map(|Zone { bridge, .. }| {
            rule(&format!("-i {bridge}{but} -m addrtype ! --dst-type LOCAL"), "DROP", GATEWAY_ONLY)
        }));
        input.extend(grouped(self.ports().filter(|port| !port.address.is_loopback())).iter().map(
            |matches| {
                rule(
                    matches,
                    &self.chain("USERS"),
                    "published port served by a userspace socket: user rules first",
                )
            },
        ));
        let chains = vec![
            (self.chain("PORTS"), ports.collect()),
            (self.chain("USERS"), to_users("user rules first")),
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
                    "hairpin: containers are served by userspace sockets",
                )
            })
            .collect();
        for net in link_scoped_prefixes(self.family.is_v6())
            .into_iter()
            .filter(|net| !net.addr().is_multicast())
        {
            translate.push(rule(
                &format!("-d {net}"),
                "RETURN",
                "link-local destination: served by a userspace socket",
            ));
        }
        translate.extend(self.subnets().map(|(_, subnet)| {
            rule(&format!("-d {subnet}"), "RETURN", "gateway: served by a userspace socket")
        }));
        let loopback = if self.family.is_v6() { "::1/128" } else { "127.0.0.0/8" };
        let asked = format!("! -d {loopback} -m addrtype --dst-type LOCAL");
        translate.push(rule(&asked, &self.chain("PORTS"), "destination is the host"));
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
            own.map(|link| rule(&format!("-o {link}"), "RETURN", "not egress")).collect();
        // Forwarded packets are matched by the pair of interfaces, regardless of their source; the
        // kernel provides the input interface here since Linux 5.7. Packets that a process of the
        // host sends from a gateway address are matched by source. Other sources of the subnet are
        // not: if the rules of `raw` are missing, they could be forged.
        for zone in zones.iter().filter(|zone| !zone.internal) {
            for gateway in zone.subnets.iter().map(IpNet::addr).filter(|ip| self.is_of(*ip)) {
                masquerade.extend(
                    [format!("-i {}", zone.bridge), format!("-s {gateway}")]
                        .map(|matches| rule(&matches, &self.chain("EGRESS"), "masquerade")),
                );
            }
        }
        let chains = vec![
            (self.chain("PORTS"), ports),
            (self.chain("DNAT"), translate),
            (self.chain("EGRESS"), self.egress()),
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
        let comment = "protocols with egress";
        let known = known.map(|name| rule(&format!("-p {name}"), "RETURN", comment));
        let comment = "no egress for protocols that conntrack identifies by addresses only";
        known.chain([rule("", "DROP", comment)]).collect()
    }

    /// Masquerade with source ports that are not published ([`Ruleset::source_ports`]). The
    /// MASQUERADE target supports ports for these protocols only.
    fn egress(&self) -> Vec<String> {
        let protocols = [("tcp", Protocol::Tcp), ("udp", Protocol::Udp), ("sctp", Protocol::Sctp)];
        let mut rules: Vec<String> = protocols
            .iter()
            .map(|(name, protocol)| {
                let ports = match self.ruleset.source_ports(*protocol) {
                    (first, last) if first == last => first.to_string(),
                    (first, last) => format!("{first}-{last}"),
                };
                let target = format!("MASQUERADE --to-ports {ports}");
                rule(&format!("-p {name}"), &target, "source ports without a published port")
            })
            .collect();
        rules.push(rule("", "MASQUERADE", "protocols without ports"));
        rules
    }
}

const GATEWAY_ONLY: &str = "internal networks reach only the gateway address of the host";

/// Renders a rule without its chain.
fn rule(matches: &str, target: &str, comment: &str) -> String {
    let separator = if matches.is_empty() { "" } else { " " };
    format!("{matches}{separator}-m comment --comment \"{comment}\" -j {target}")
}

fn mark() -> String {
    format!("MARK --set-xmark {:#x}/{:#x}", registry::FORWARD_MARK, registry::FORWARD_MARK_MASK)
}

const fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Udp => "udp",
        // SCTP ports are rejected earlier.
        Protocol::Tcp | Protocol::Sctp => "tcp",
    }
}

fn subnets_of(zone: &Zone) -> impl Iterator<Item = IpNet> + '_ {
    zone.subnets.iter().map(IpNet::trunc)
}

/// Renders matches for `ports` at their addresses, in as few rules as possible.
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
                .chunks(MAX_PORTS_PER_RULE)
                .map(|some| format!("{at}-p {protocol} -m multiport --dports {}", some.join(","))),
        );
    }
    rules
}

/// Renders the input of `iptables-restore --noflush` that changes `saved` to contain `tables` of
/// `owner`. Tables in `created` are known to have been created for tidegate.
pub(super) fn restore(
    tables: &[Table],
    owner: &str,
    saved: &Saved,
    created: &BTreeSet<String>,
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
        let created = created.contains(table.name) || !saved.has_table(table.name);
        let created = created.then(|| format!("-m comment {TABLE_MADE}"));
        // In the first chain, which every table has.
        for ((chain, rules), created) in
            table.chains.iter().zip([created].into_iter().chain(std::iter::repeat(None)))
        {
            for rule in rules.iter().chain(&created) {
                let _ = writeln!(text, "-A {chain} {rule}");
            }
        }
        for (from, to) in &table.jumps {
            let count = saved.count(table.name, &format!("-A {from} -j {to}"));
            // A misplaced jump is deleted and added again.
            let last = table.is_last(from);
            let moves = last && saved.mark_rules_after(table.name, from, to).next().is_some();
            if count == 0 || moves {
                let how = if last { "-A" } else { "-I" };
                let _ = writeln!(text, "{how} {from} -j {to}");
            }
            // -D deletes the first of several equal rules, which is not the appended one.
            for _ in usize::from(!moves)..count {
                let _ = writeln!(text, "-D {from} -j {to}");
            }
        }
        // Delete objects of an earlier ruleset or version.
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

/// Renders the input that removes everything of `owner` from `saved`. Empty if `owner` has no
/// rules.
pub(super) fn removal(saved: &Saved, owner: &str) -> String {
    let mut text = String::new();
    for table in TABLES {
        let mut lines = String::new();
        for (from, to) in saved.jumps(table, owner) {
            let _ = writeln!(lines, "-D {from} -j {to}");
        }
        let chains: Vec<&str> = saved.chains_of(table, owner).collect();
        let users = table == "filter"
            && saved.has_chain("filter", registry::USER_CHAIN)
            && saved.user_chain_is_unused_by_others(owner);
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
    fn chain_names_fit_and_are_unique() {
        /// `XT_EXTENSION_MAXNAMELEN` without the NUL.
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
    fn existing_jumps_are_kept_and_duplicates_deleted() {
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
