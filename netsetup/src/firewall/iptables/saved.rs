//! Parsed output of `iptables-save`.

use super::is_of_owner;
use std::collections::{BTreeMap, BTreeSet};
use tidegate_model::registry;

/// The listed tables, without counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Saved {
    tables: Vec<SavedTable>,
    /// Tables with rules of nft(8) that iptables cannot print. Their contents are unknown.
    unprintable: BTreeSet<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SavedTable {
    name: String,
    /// Name and policy; `-` for a user-defined chain.
    chains: Vec<(String, String)>,
    /// Rules in the form `-A CHAIN …`.
    rules: Vec<String>,
}

impl SavedTable {
    fn rules_of<'a>(&'a self, chain: &'a str) -> impl Iterator<Item = &'a str> {
        self.rules.iter().filter(move |rule| chain_of(rule) == chain).map(String::as_str)
    }
}

impl Saved {
    pub(super) fn of(text: &str) -> Self {
        let mut tables: Vec<SavedTable> = Vec::new();
        let mut unprintable = BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# Table `") {
                let name = rest.split_once("' is incompatible").map(|(name, _)| name.to_owned());
                unprintable.extend(name);
            } else if let Some(name) = line.strip_prefix('*') {
                tables.push(SavedTable { name: name.to_owned(), ..SavedTable::default() });
            } else if let Some(table) = tables.last_mut() {
                if let Some(chain) = line.strip_prefix(':') {
                    let mut words = chain.split(' ').map(str::to_owned);
                    table.chains.extend(words.next().zip(words.next()));
                } else if line.starts_with("-A ") {
                    table.rules.push(line.to_owned());
                }
            }
        }
        Self { tables, unprintable }
    }

    /// A table whose contents are unknown.
    pub(super) fn of_unprintable(table: &str) -> Self {
        Self { tables: Vec::new(), unprintable: BTreeSet::from([table.to_owned()]) }
    }

    /// All tables of `parts`.
    pub(super) fn joined(parts: Vec<Self>) -> Self {
        let mut all = Self::default();
        for part in parts {
            all.tables.extend(part.tables);
            all.unprintable.extend(part.unprintable);
        }
        all
    }

    /// Parses the table `name` as listed by `iptables -S`.
    pub(super) fn of_listed(name: &str, lines: &[String]) -> Self {
        let mut table = SavedTable { name: name.to_owned(), ..SavedTable::default() };
        for line in lines {
            let words: Vec<&str> = line.splitn(3, ' ').collect();
            match words[..] {
                ["-P", chain, policy] => table.chains.push((chain.to_owned(), policy.to_owned())),
                ["-N", chain] => table.chains.push((chain.to_owned(), "-".to_owned())),
                ["-A", ..] => table.rules.push(line.clone()),
                _ => {}
            }
        }
        Self { tables: vec![table], unprintable: BTreeSet::new() }
    }

    fn table(&self, name: &str) -> Option<&SavedTable> {
        self.tables.iter().find(|table| table.name == name)
    }

    /// The tables whose contents are unknown.
    pub(super) fn unprintable(&self) -> impl Iterator<Item = &str> {
        self.unprintable.iter().map(String::as_str)
    }

    /// Returns whether the table exists, and its contents are unknown.
    pub(super) fn is_unprintable(&self, table: &str) -> bool {
        self.unprintable.contains(table)
    }

    /// Returns whether the table exists.
    pub(super) fn has_table(&self, name: &str) -> bool {
        self.table(name).is_some()
    }

    /// Returns whether the chain exists.
    pub(super) fn has_chain(&self, table: &str, chain: &str) -> bool {
        self.table(table).is_some_and(|table| table.chains.iter().any(|(name, _)| name == chain))
    }

    /// Returns the chains of `owner` in `table`.
    pub(super) fn chains_of<'a>(
        &'a self,
        table: &'a str,
        owner: &'a str,
    ) -> impl Iterator<Item = &'a str> {
        let chains = self.table(table).into_iter().flat_map(|table| &table.chains);
        chains
            .map(|(name, _)| name.as_str())
            .filter(move |name| is_of_owner(name, owner) && *name != registry::USER_CHAIN)
    }

    /// Counts the occurrences of `rule`.
    pub(super) fn count(&self, table: &str, rule: &str) -> usize {
        self.table(table).map_or(0, |table| table.rules.iter().filter(|line| *line == rule).count())
    }

    /// Returns the jumps from built-in chains of `table` to chains of `owner`, one per rule.
    pub(super) fn jumps<'a>(
        &'a self,
        table: &str,
        owner: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        let rules = self.table(table).into_iter().flat_map(|table| &table.rules);
        rules.filter_map(move |rule| {
            let (from, to) = rule.strip_prefix("-A ")?.split_once(" -j ")?;
            let is_jump =
                !from.contains(' ') && !is_of_owner(from, owner) && is_of_owner(to, owner);
            (is_jump && to != registry::USER_CHAIN).then_some((from, to))
        })
    }

    /// Returns the foreign rules in the chain `from` after the first jump to `to` that may change a
    /// packet mark. Jumps to other chains always count.
    pub(super) fn mark_rules_after<'a>(
        &'a self,
        table: &str,
        from: &'a str,
        to: &str,
    ) -> impl Iterator<Item = &'a str> {
        /// Targets that do not change the mark (iptables-extensions(8)).
        const HARMLESS: [&str; 16] = [
            "ACCEPT",
            "CHECKSUM",
            "CLASSIFY",
            "DROP",
            "DSCP",
            "ECN",
            "HL",
            "LOG",
            "NFLOG",
            "RETURN",
            "TCPMSS",
            "TCPOPTSTRIP",
            "TEE",
            "TOS",
            "TRACE",
            "TTL",
        ];
        let jump = format!("-A {from} -j {to}");
        let rules = self.table(table).into_iter().flat_map(move |table| table.rules_of(from));
        let mark_rules_after = rules.skip_while(move |rule| *rule != jump).skip(1);
        mark_rules_after.filter(|rule| {
            let mut words = rule.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
            words.nth(1).is_some_and(|target| !HARMLESS.contains(&target))
                && !rule.contains(&format!(" {}", registry::IPTABLES_CHAIN_PREFIX))
        })
    }

    /// Returns the number of rules in a chain.
    pub(super) fn rules_in(&self, table: &str, chain: &str) -> usize {
        self.table(table).map_or(0, |table| table.rules_of(chain).count())
    }

    /// Returns whether the user chain is empty and only `owner` jumps to it.
    pub(super) fn user_chain_is_unused_by_others(&self, owner: &str) -> bool {
        self.table("filter").is_some_and(|table| {
            let jumps_to_user_chain = |rule: &&String| {
                let mut words = rule.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
                words.nth(1) == Some(registry::USER_CHAIN)
            };
            table.rules_of(registry::USER_CHAIN).next().is_none()
                && table
                    .rules
                    .iter()
                    .filter(jumps_to_user_chain)
                    .all(|rule| is_of_owner(chain_of(rule), owner))
        })
    }

    /// Returns the tables that were created for tidegate, according to the marker rules.
    pub(super) fn created_tables(&self) -> BTreeSet<String> {
        let is_marker = |rule: &String| {
            rule.ends_with(TABLE_MADE)
                && chain_of(rule).starts_with(registry::IPTABLES_CHAIN_PREFIX)
        };
        let created_tables = self.tables.iter().filter(|table| table.rules.iter().any(is_marker));
        created_tables.map(|table| table.name.clone()).collect()
    }

    /// Lists everything of `owner` by table: its chains with their rules, the jumps to them, and
    /// the existence of the user chain.
    pub(super) fn of_owner(&self, owner: &str) -> BTreeMap<String, Vec<String>> {
        let mut all = BTreeMap::new();
        for table in &self.tables {
            let mut lines = Vec::new();
            let chains = table.chains.iter().filter(|(name, _)| is_of_owner(name, owner));
            lines.extend(chains.map(|(name, _)| format!("{}:{name}", table.name)));
            let jumps_to_owner = |rule: &str| {
                let to = rule.split(' ').next_back().unwrap_or_default();
                is_of_owner(to, owner) && to != registry::USER_CHAIN
            };
            let is_one = |rule: &&String| {
                let chain = chain_of(rule);
                chain != registry::USER_CHAIN && (is_of_owner(chain, owner) || jumps_to_owner(rule))
            };
            lines.extend(table.rules.iter().filter(is_one).cloned());
            if !lines.is_empty() {
                all.insert(table.name.clone(), lines);
            }
        }
        all
    }

    /// Returns whether the policy of FORWARD is DROP.
    pub(super) fn forward_drops(&self) -> bool {
        let forward = ("FORWARD".to_owned(), "DROP".to_owned());
        self.table("filter").is_some_and(|table| table.chains.contains(&forward))
    }

    /// Returns the chain `DOCKER-USER`.
    pub(super) fn docker_user(&self) -> DockerUser {
        let Some(table) = self.table("filter") else { return DockerUser::default() };
        let mut rules = Vec::new();
        let mut reached = vec![DOCKER_USER.to_owned()];
        let mut next = 0;
        while let Some(chain) = reached.get(next).cloned() {
            next += 1;
            for rule in table.rules_of(&chain) {
                let rule = UserRule { text: rule.to_owned() };
                if let Some(target) = rule.target()
                    && table.chains.iter().any(|(name, policy)| name == target && policy == "-")
                    && !reached.iter().any(|known| known == target)
                {
                    reached.push(target.to_owned());
                }
                if !rule.only_returns() {
                    rules.push(rule);
                }
            }
        }
        let forward = table.rules_of("FORWARD").any(|rule| rule.ends_with(TO_DOCKER_USER));
        DockerUser { rules, forward, ..DockerUser::default() }
    }
}

/// Suffix of rules that jump to DOCKER-USER.
pub(super) const TO_DOCKER_USER: &str = "-j DOCKER-USER";

/// Suffix of the rule which records that a table was created for tidegate.
pub(super) const TABLE_MADE: &str = "--comment \"this table was made for tidegate\"";

/// Docker's chain for rules of the administrator.
pub(super) const DOCKER_USER: &str = "DOCKER-USER";

/// The chain `DOCKER-USER` and the chains reachable from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DockerUser {
    /// Rules, without the `RETURN` that Docker adds.
    pub rules: Vec<UserRule>,
    /// FORWARD jumps to the chain, so it applies to traffic forwarded by the kernel.
    pub forward: bool,
    /// Rules of the variant of iptables that tidegate does not use.
    pub elsewhere: Vec<UserRule>,
    /// The same as `forward` for that variant.
    pub forward_elsewhere: bool,
}

impl DockerUser {
    /// Returns whether the chain has rules.
    #[must_use]
    pub fn has_rules(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Returns whether all rules apply to packets that the kernel forwards. With `jumps`, packets
    /// traverse the chain of tidegate's variant in any case.
    #[must_use]
    pub fn applies_to_forwarded(&self, jumps: bool) -> bool {
        (jumps || self.forward || self.rules.is_empty())
            && (self.forward_elsewhere || self.elsewhere.is_empty())
    }

    /// Returns the first rule that is meaningful for forwarded packets only.
    #[must_use]
    pub fn about_forwarding(&self) -> Option<&UserRule> {
        self.rules.iter().find(|rule| rule.is_about_forwarding())
    }
}

/// An iptables rule in the format of `iptables-save`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserRule {
    /// The rule, as in `-A DOCKER-USER -s 198.51.100.0/24 -j DROP`.
    pub text: String,
}

impl UserRule {
    /// Options with the same meaning for a packet forwarded to a container and for a packet to a
    /// published port: properties of the client, and of the connection as seen by the client. Each
    /// with its number of arguments.
    const PORTABLE: [(&str, usize); 27] = [
        ("-A", 1),
        ("!", 0),
        ("-s", 1),
        ("-i", 1),
        ("-p", 1),
        ("-j", 1),
        ("-g", 1),
        ("--sport", 1),
        ("--sports", 1),
        ("--ctstate", 1),
        ("--state", 1),
        ("--ctproto", 1),
        ("--ctorigsrc", 1),
        ("--ctorigdst", 1),
        ("--ctorigsrcport", 1),
        ("--ctorigdstport", 1),
        ("--ctdir", 1),
        ("--comment", 1),
        ("--limit", 1),
        ("--limit-burst", 1),
        ("--src-range", 1),
        ("--mac-source", 1),
        ("--reject-with", 1),
        ("--log-prefix", 1),
        ("--log-level", 1),
        ("--syn", 0),
        ("--tcp-flags", 2),
    ];

    /// Matches whose options are checked individually.
    const MATCHES: [&str; 10] = [
        "comment",
        "conntrack",
        "icmp",
        "iprange",
        "limit",
        "mac",
        "multiport",
        "state",
        "tcp",
        "udp",
    ];

    /// Returns the target: a verdict or a chain.
    fn target(&self) -> Option<&str> {
        let mut words = self.text.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g"));
        words.nth(1)
    }

    /// Returns whether the rule is `-A CHAIN -j RETURN`, which has no effect.
    fn only_returns(&self) -> bool {
        self.text.split(' ').skip(2).eq(["-j", "RETURN"])
    }

    /// Returns whether the rule may depend on the destination of forwarding: the address or port of
    /// a container, or egress.
    #[must_use]
    pub fn is_about_forwarding(&self) -> bool {
        let words = words(&self.text);
        let mut words = words.iter().map(String::as_str);
        while let Some(word) = words.next() {
            let known = match word {
                "-m" => {
                    if !words.next().is_some_and(|name| Self::MATCHES.contains(&name)) {
                        return true;
                    }
                    Some(0)
                }
                // Only translated packets are forwarded.
                "--ctstate" | "--state" => {
                    let states = words.next().unwrap_or_default();
                    if states.split(',').any(|state| matches!(state, "DNAT" | "SNAT")) {
                        return true;
                    }
                    Some(0)
                }
                _ => Self::PORTABLE
                    .iter()
                    .find(|(option, _)| *option == word)
                    .map(|(_, values)| *values),
            };
            let Some(values) = known else { return true };
            for _ in 0..values {
                words.next();
            }
        }
        false
    }
}

/// Splits a rule into words. A quoted string is one word.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut escaped) = (false, false);
    for c in text.chars() {
        match c {
            _ if escaped => {
                word.push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(c),
        }
    }
    words.push(word);
    words
}

/// Returns the chain of a rule.
fn chain_of(rule: &str) -> &str {
    rule.split(' ').nth(1).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BESIDE_DOCKER: &str = r#"# Generated by iptables-save
*nat
:PREROUTING ACCEPT [1:60]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
:OFFICE - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -s 198.51.100.0/24 -m comment --comment "not \"them\" -d" -j DROP
-A DOCKER-USER -i eth0 -j OFFICE
-A DOCKER-USER -j RETURN
-A OFFICE -p tcp -m tcp --dport 80 -j DROP
COMMIT
"#;

    #[test]
    fn docker_user_includes_reachable_chains() {
        let saved = Saved::of(BESIDE_DOCKER);
        assert!(saved.forward_drops());
        let docker_user = saved.docker_user();
        assert_eq!(docker_user.rules.len(), 3);
        assert_eq!(
            docker_user.about_forwarding().map(|rule| rule.text.as_str()),
            Some("-A OFFICE -p tcp -m tcp --dport 80 -j DROP")
        );
        assert!(
            !Saved::of("*filter\n:DOCKER-USER - [0:0]\n-A DOCKER-USER -j RETURN\n")
                .docker_user()
                .has_rules()
        );
        assert!(!Saved::default().docker_user().has_rules());
    }

    #[test]
    fn a_listed_table_is_the_same_as_a_saved_one() {
        let saved =
            "*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\n";
        let listed = ["-P FORWARD DROP", "-N DOCKER-USER", "-A FORWARD -j DOCKER-USER"];
        assert_eq!(Saved::of_listed("filter", &listed.map(str::to_owned)), Saved::of(saved));
    }

    #[test]
    fn rules_for_clients_and_published_ports_differ_from_rules_for_containers() {
        for (rule, about_forwarding) in [
            ("-s 203.0.113.0/24 -j DROP", false),
            ("! -s 203.0.113.0/24 -i eth0 -j REJECT --reject-with icmp-port-unreachable", false),
            ("-p tcp -m conntrack --ctorigdstport 8080 -j DROP", false),
            ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", false),
            ("-p tcp -m tcp --sport 1:1023 -j DROP", false),
            ("-d 172.18.0.2/32 -j DROP", true),
            ("-o docker0 -j DROP", true),
            ("-p tcp -m multiport --dports 80,443 -j DROP", true),
            ("-m set --match-set bad src -j DROP", true),
            ("-m mark --mark 0x1 -j ACCEPT", true),
            ("-i eth0 -m conntrack --ctstate DNAT -j DROP", true),
            ("-m socket -j ACCEPT", true),
        ] {
            let text = format!("-A DOCKER-USER {rule}");
            assert_eq!(UserRule { text }.is_about_forwarding(), about_forwarding, "{rule}");
        }
    }
}
