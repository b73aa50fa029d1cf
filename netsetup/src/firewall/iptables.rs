//! The iptables and ip6tables back end.
//!
//! Each owner has its own chains and one jump from each built-in chain that it uses; nothing else
//! in the built-in chains is changed. An update is one run of `iptables-restore --noflush` per
//! family, in which each table is a transaction. If a run fails, the previous rules are restored,
//! so either the old or the new rules are in force.
//!
//! iptables has no sets: the number of rules grows with the number of ports, and each change of a
//! port costs a run.

mod docker_user;
mod program;
mod rules;
mod saved;

pub use saved::{DockerUser, UserRule};

use super::{Backend, Previous, Ruleset, Zone};
use program::{Family, Program, TABLES, Variants, unprintable_table};
use rules::Table;
use saved::Saved;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use tidegate_model::registry;
use tidegate_netfilter::{Connection, TableFamily};
use tidegate_netns::{ChangeListener, Namespace};

/// Renders the input of iptables-restore or ip6tables-restore, for a host on which iptables is in
/// use.
#[cfg(test)]
pub(super) fn rendered(ruleset: &Ruleset, v6: bool, docker_user: bool) -> String {
    let tables = rules::tables(ruleset, if v6 { Family::V6 } else { Family::V4 }, docker_user);
    rules::restore(
        &tables,
        &ruleset.owner,
        &Saved::of("*raw\n*mangle\n*filter\n*nat\n"),
        &BTreeSet::new(),
    )
}

/// Maximum number of times that the jump to the mark chain is moved after appended foreign rules.
/// The limit prevents an endless contest with a program that always appends again.
const MAX_MOVES: u32 = 64;

/// The rules of one owner, installed by external programs.
#[derive(Debug)]
pub(super) struct Iptables {
    families: Vec<FamilyRules>,
    /// The ruleset applied last.
    in_force: Option<Ruleset>,
}

/// The rules of one family.
#[derive(Debug)]
struct FamilyRules {
    program: Program,
    /// The owner's rules by table, as listed after they were applied.
    listed: BTreeMap<String, Vec<String>>,
    /// Number of times that the jump to the mark chain was moved after appended foreign rules.
    moves: u32,
    /// Tables that were created for tidegate. A rule in the kernel also records this for the next
    /// process, but rules can be flushed.
    created: BTreeSet<String>,
}

impl FamilyRules {
    /// # Errors
    /// The programs are not installed, or the kernel lacks what they need.
    fn open(family: Family) -> io::Result<Self> {
        let program = Program::find(family)?;
        program.save(None)?;
        Ok(Self { program, listed: BTreeMap::new(), moves: 0, created: BTreeSet::new() })
    }

    fn saved(&self) -> io::Result<Saved> {
        self.program.save_printable(None)
    }

    /// Returns the owner's rules by table. Those of unprintable tables are taken as unmodified.
    fn found(&self, saved: &Saved, owner: &str) -> BTreeMap<String, Vec<String>> {
        let mut found = saved.of_owner(owner);
        let unprintable = self.listed.iter().filter(|(table, _)| saved.is_unprintable(table));
        found.extend(unprintable.map(|(table, lines)| (table.clone(), lines.clone())));
        found
    }

    /// Returns whether the rules in `saved` are complete. Of the rules of a previous process, only
    /// their presence in each table is known.
    fn previous(&self, saved: &Saved, owner: &str) -> Previous {
        let found = self.found(saved, owner);
        let has_rules = |table: &&str| {
            saved.is_unprintable(table)
                || found
                    .get(*table)
                    .is_some_and(|lines| lines.iter().any(|one| one.starts_with('-')))
        };
        let complete = match self.listed.is_empty() {
            true => TABLES.iter().all(has_rules),
            false => found == self.listed,
        };
        if complete { Previous::Complete } else { Previous::Changed }
    }

    /// Installs `ruleset` in place of `before`. A table that other software has made unprintable
    /// keeps its rules, if they do not change.
    fn install(&mut self, ruleset: &Ruleset, before: Option<&Ruleset>) -> io::Result<Previous> {
        let saved = self.saved()?;
        let previous = self.previous(&saved, &ruleset.owner);
        let (family, asks_docker) = (self.program.family, self.asks_docker(&saved));
        let mut tables = rules::tables(ruleset, family, asks_docker);
        let known = before.map(|before| rules::tables(before, family, asks_docker));
        let is_known = |table: &Table| known.iter().flatten().any(|known| known == table);
        let unprintable = |table: &&Table| saved.is_unprintable(table.name);
        if let Some(table) = tables.iter().filter(unprintable).find(|table| !is_known(table)) {
            return Err(unprintable_table(table.name));
        }
        tables.retain(|table| !saved.is_unprintable(table.name));
        self.created.extend(saved.created_tables());
        self.created.extend(rules::missing(&tables, &saved));
        let text = rules::restore(&tables, &ruleset.owner, &saved, &self.created);
        self.program.restore(&text)?;
        let mut listed = self.saved()?.of_owner(&ruleset.owner);
        // After concurrent changes, `holds` returns false, and the rules are applied again.
        if listed.values().map(Vec::len).sum::<usize>() != rules::count(&text, &tables) {
            listed.clear();
        }
        self.listed.retain(|table, _| saved.is_unprintable(table));
        self.listed.extend(listed);
        Ok(previous)
    }

    /// Whether the owner's chains have to jump to DOCKER-USER. They do if the chain exists, so that
    /// rules hold that are added to it later.
    fn asks_docker(&self, saved: &Saved) -> bool {
        if saved.is_unprintable("filter") {
            let mut listed = self.listed.get("filter").into_iter().flatten();
            return listed.any(|line| line.ends_with(saved::TO_DOCKER_USER));
        }
        saved.has_chain("filter", saved::DOCKER_USER)
    }

    /// Returns whether the installed rules are unmodified, and the mark is set after all foreign
    /// rules.
    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool> {
        let saved = self.saved()?;
        if let Some(rule) = rules::rule_after_mark(ruleset, &saved) {
            if self.moves < MAX_MOVES {
                self.moves += 1;
                return Ok(false);
            }
            if self.moves == MAX_MOVES {
                self.moves += 1;
                tracing::warn!(
                    rule,
                    "rule repeatedly appended after the gate mark; packets that it marks reach no container"
                );
            }
        }
        let filter = self.listed.get("filter").into_iter().flatten();
        let asks_docker = filter.clone().any(|line| line.ends_with(saved::TO_DOCKER_USER));
        let found = self.found(&saved, &ruleset.owner);
        Ok(found == self.listed && self.asks_docker(&saved) == asks_docker)
    }

    /// Removes the rules of `owner`, and the tables that were created for tidegate.
    fn uninstall(&mut self, owner: &str) -> io::Result<()> {
        let saved = self.saved()?;
        let text = rules::removal(&saved, owner);
        if !text.is_empty() {
            self.program.restore(&text)?;
        }
        if let Some(table) = self.listed.keys().find(|table| saved.is_unprintable(table)) {
            return Err(unprintable_table(table));
        }
        let mut created = std::mem::take(&mut self.created);
        created.extend(saved.created_tables());
        if self.program.uses_nftables() && !created.is_empty() {
            let family = table_family(self.program.family);
            let mut connection = Connection::open()?;
            for table in created {
                connection.remove_unused(family, &table)?;
            }
        }
        Ok(())
    }
}

impl Iptables {
    /// Finds the programs, for use in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut families = vec![FamilyRules::open(Family::V4)?];
        match FamilyRules::open(Family::V6) {
            Ok(v6) => families.push(v6),
            Err(error) => tracing::debug!(%error, "ip6tables unavailable"),
        }
        Ok(Self { families, in_force: None })
    }
}

/// A network with IPv6, on a host that has only iptables.
#[derive(Debug, thiserror::Error)]
#[error("{bridge:?} has IPv6, and ip6tables is missing; install it, or leave IPv6 out")]
struct MissingIp6tables {
    bridge: String,
}

impl Backend for Iptables {
    fn apply(&mut self, ruleset: &Ruleset) -> io::Result<Previous> {
        let has_v6 = |zone: &&Zone| zone.subnets.iter().any(|subnet| subnet.addr().is_ipv6());
        if self.families.len() < 2
            && let Some(zone) = ruleset.zones.iter().find(has_v6)
        {
            let bridge = zone.bridge.clone();
            return Err(io::Error::new(io::ErrorKind::Unsupported, MissingIp6tables { bridge }));
        }
        let mut previous = Previous::Complete;
        let mut tried = 0;
        for rules_of_family in &mut self.families {
            tried += 1;
            let error = match rules_of_family.install(ruleset, self.in_force.as_ref()) {
                Ok(Previous::Complete) => continue,
                Ok(Previous::Changed) => {
                    previous = Previous::Changed;
                    continue;
                }
                Err(error) => error,
            };
            for rules_of_family in self.families.iter_mut().take(tried) {
                let back = match &self.in_force {
                    Some(before) => rules_of_family.install(before, Some(before)).map(drop),
                    None => rules_of_family.uninstall(&ruleset.owner),
                };
                if let Err(error) = back {
                    tracing::warn!(%error, "previous rules not restored");
                }
            }
            return Err(error);
        }
        self.in_force = Some(ruleset.clone());
        Ok(previous)
    }

    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool> {
        if self.in_force.as_ref() != Some(ruleset) {
            return Ok(false);
        }
        for rules_of_family in &mut self.families {
            if !rules_of_family.holds(ruleset)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn remove(&mut self, owner: &str) -> io::Result<()> {
        self.in_force = None;
        let mut result = Ok(());
        for rules_of_family in &mut self.families {
            // A failure with one family does not affect the other.
            result = result.and(rules_of_family.uninstall(owner));
        }
        result
    }

    fn changes(&self) -> io::Result<Option<ChangeListener>> {
        let notifies =
            self.families.iter().all(|rules_of_family| rules_of_family.program.uses_nftables());
        if notifies { ChangeListener::of_rules().map(Some) } else { Ok(None) }
    }
}

/// The state of iptables on a host, for the choice of a firewall.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IptablesState {
    /// Version, as in `iptables v1.8.9 (nf_tables)`.
    pub version: String,
    /// The policy of the FORWARD chain is DROP.
    pub forward_drops: bool,
    /// The chain `DOCKER-USER`.
    pub docker_user: DockerUser,
}

impl IptablesState {
    /// Returns whether iptables is installed, regardless of its use.
    #[must_use]
    pub fn is_installed() -> bool {
        Program::is_installed(Family::V4)
    }

    /// Lists chains in the calling thread's network namespace that may change the gate mark after
    /// tidegate's iptables rules have set it, as `ip nat POSTROUTING`.
    ///
    /// # Errors
    /// Errors of the kernel.
    pub fn mark_setters_behind() -> io::Result<Vec<String>> {
        /// Priority of `mangle` (`NF_IP_PRI_MANGLE`).
        const MANGLE: i32 = -150;
        Connection::open()?.mark_setters(MANGLE, registry::FORWARD_MARK_MASK)
    }

    /// Returns the states of iptables and ip6tables on `host`. `None` if the program is not
    /// installed or not in use, or if the table `filter` is not one of its own.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the rules cannot be listed: whether a rule would apply
    /// to containers is then unknown.
    pub fn of(host: &Namespace) -> io::Result<[Option<Self>; 2]> {
        host.with(|| Ok([Self::of_family(Family::V4)?, Self::of_family(Family::V6)?]))?
    }

    fn of_family(family: Family) -> io::Result<Option<Self>> {
        if !is_in_use(family) {
            return Ok(None);
        }
        let docker_user = docker_user::of_family(family)?;
        let program = match Program::find(family) {
            // Rules of nft(8) in a table of this name.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let state = Self { docker_user, ..Self::default() };
                return Ok(Some(state).filter(|state| state.docker_user.has_rules()));
            }
            found => found?,
        };
        let forward_drops = match program.list_filter() {
            // The table has rules that iptables cannot print.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                Connection::open()?.drops_by_policy(table_family(family), "filter", "FORWARD")?
            }
            lines => Saved::of_listed("filter", &lines?).forward_drops(),
        };
        Ok(Some(Self { version: program.version, forward_drops, docker_user }))
    }

    /// Returns whether the user chain of iptables or ip6tables has rules in `host`: in the variant
    /// in `PATH`, and in the other one.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the rules cannot be listed.
    pub fn has_user_rules(host: &Namespace) -> io::Result<[bool; 2]> {
        let of = |family: Family| -> io::Result<[bool; 2]> {
            let variants = Variants::of(family);
            let of_legacy = is_legacy_in_use(family) && {
                let saved = variants.with(false, |program| program.save(Some("filter")))?;
                saved.rules_in("filter", registry::USER_CHAIN) > 0
            };
            let of_nftables = user_chain_has_rules(table_family(family), "filter")?;
            if !of_nftables && !of_legacy {
                // No program is run.
                return Ok([false; 2]);
            }
            Ok(variants.ours_first(of_nftables, of_legacy))
        };
        host.with(|| {
            let ([ours, other], [ours_v6, other_v6]) = (of(Family::V4)?, of(Family::V6)?);
            Ok([ours || ours_v6, other || other_v6])
        })?
    }
}

impl DockerUser {
    /// Reads the current chains of `host` for IPv4 and IPv6. Costs one request to the kernel if no
    /// variant of iptables has the chain, otherwise runs of `iptables-save`, each limited to 10 s.
    ///
    /// # Errors
    /// The request to the kernel or a program failed.
    pub fn of(host: &Namespace) -> io::Result<[Self; 2]> {
        let of = docker_user::of_family;
        host.with(|| Ok([of(Family::V4)?, of(Family::V6)?]))?
    }
}

/// Returns whether the user chain in `table` of nftables has rules, in the network namespace of the
/// calling thread.
pub(super) fn user_chain_has_rules(family: TableFamily, table: &str) -> io::Result<bool> {
    let Some(mut connection) = connection_to(family, table, registry::USER_CHAIN)? else {
        return Ok(false);
    };
    Ok(connection.list_rules(family, table)?.iter().any(|rule| rule.chain == registry::USER_CHAIN))
}

/// Opens a connection in the network namespace of the calling thread, if nftables has the chain
/// `name` in `table` there. A kernel without netfilter has no chains.
fn connection_to(family: TableFamily, table: &str, name: &str) -> io::Result<Option<Connection>> {
    let mut connection = match Connection::open() {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(None),
        opened => opened?,
    };
    Ok(connection.has_chain(family, table, name)?.then_some(connection))
}

/// Returns whether legacy iptables has a table `filter` in `host`, in either family. The kernel
/// sends no notifications about its changes.
pub(crate) fn legacy_is_in_use(host: &Namespace) -> bool {
    host.with(|| [Family::V4, Family::V6].into_iter().any(is_legacy_in_use)).unwrap_or(false)
}

/// Returns whether legacy iptables has a table `filter` in the calling thread's network namespace.
fn is_legacy_in_use(family: Family) -> bool {
    let names = match family {
        Family::V4 => "ip_tables_names",
        Family::V6 => "ip6_tables_names",
    };
    let names =
        std::fs::read_to_string(format!("/proc/thread-self/net/{names}")).unwrap_or_default();
    names.lines().any(|name| name == "filter")
}

fn table_family(family: Family) -> TableFamily {
    match family {
        Family::V4 => TableFamily::Ipv4,
        Family::V6 => TableFamily::Ipv6,
    }
}

/// Returns whether the calling thread's network namespace has a table `filter` of either variant.
/// Does not run the programs, which would create the table.
fn is_in_use(family: Family) -> bool {
    let of_nftables = || {
        Connection::open()
            .and_then(|mut connection| connection.has_table(table_family(family), "filter"))
    };
    is_legacy_in_use(family) || of_nftables().unwrap_or(false)
}

/// Returns whether `chain` is a chain of `owner` or the user chain.
fn is_of_owner(chain: &str, owner: &str) -> bool {
    chain.strip_prefix(&rules::prefix(owner)).is_some_and(|rest| rest.starts_with('-'))
        || chain == registry::USER_CHAIN
}
