//! The ruleset as chains of iptables and ip6tables.
//!
//! Chains of our own, named for the owner, and one jump to each from the built-in chain it belongs
//! to; nothing else in those chains changes. All of it is one run of `iptables-restore --noflush`
//! for each family, in which each table is one transaction. Should a run fail, what was there
//! before is put back, so that there are the old rules or the new ones.
//!
//! iptables has no sets of its own: the number of rules grows with the ports, and a port that comes
//! or goes costs a run.

mod program;
mod rules;
mod saved;

pub use saved::{DockerUser, UserRule};

use super::{Backend, Ruleset, Zone};
use program::{Family, Program};
use saved::Saved;
use std::collections::BTreeSet;
use std::io;
use tidegate_model::registry;
use tidegate_netfilter::{Connection, TableFamily};
use tidegate_netns::{ChangeListener, Namespace};

/// What iptables-restore is told, or ip6tables-restore, on a host where iptables is in use.
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

/// How often in one run the jump to the mark is put behind rules that others append: who appends
/// again each time shall not keep both of us busy for ever.
const MOST_MOVES: u32 = 64;

/// The rules of one owner, by the programs that are installed.
#[derive(Debug)]
pub(super) struct Iptables {
    sides: Vec<Side>,
    /// What was applied last.
    in_force: Option<Ruleset>,
}

/// The rules of one family.
#[derive(Debug)]
struct Side {
    program: Program,
    /// What was listed of ours when it was applied.
    listed: Vec<String>,
    /// How often the jump that has to be the last was put behind rules that others had appended.
    moves: u32,
    /// The tables that are there for us alone. In the kernel a rule says so, for the next one
    /// should this process be killed; but rules can be flushed.
    made: BTreeSet<String>,
}

impl Side {
    /// # Errors
    /// The programs are not installed, or the kernel has not what they need.
    fn open(family: Family) -> io::Result<Self> {
        let program = Program::find(family)?;
        program.save(None)?;
        Ok(Self { program, listed: Vec::new(), moves: 0, made: BTreeSet::new() })
    }

    fn saved(&self) -> io::Result<Saved> {
        Ok(Saved::of(&self.program.save(None)?))
    }

    /// Puts `ruleset` into force.
    fn put(&mut self, ruleset: &Ruleset) -> io::Result<()> {
        let saved = self.saved()?;
        let tables = rules::tables(ruleset, self.program.family, saved.docker_user().has_rules());
        self.made.extend(saved.made());
        self.made.extend(rules::missing(&tables, &saved));
        let text = rules::restore(&tables, &ruleset.owner, &saved, &self.made);
        self.program.restore(&text)?;
        self.listed = self.saved()?.of_owner(&ruleset.owner);
        // Others may have been at it meanwhile. Then it does not hold, and is applied again with
        // the next look.
        if self.listed.len() != rules::count(&text, &tables) {
            self.listed.clear();
        }
        Ok(())
    }

    /// Whether what was put there last is there, and the mark is set behind the rules of others.
    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool> {
        let saved = self.saved()?;
        if let Some(rule) = rules::behind_mark(ruleset, &saved) {
            if self.moves < MOST_MOVES {
                self.moves += 1;
                return Ok(false);
            }
            if self.moves == MOST_MOVES {
                self.moves += 1;
                tracing::warn!(
                    rule,
                    "rule is appended behind the mark of the gates again and again; left there, and what it marks \
                     reaches no container"
                );
            }
        }
        let asks_docker = self.listed.iter().any(|line| line.ends_with(rules::TO_DOCKER_USER));
        Ok(saved.of_owner(&ruleset.owner) == self.listed
            && saved.docker_user().has_rules() == asks_docker)
    }

    /// Removes what `owner` has, and the tables that were made for it alone.
    fn take_away(&mut self, owner: &str) -> io::Result<()> {
        let saved = self.saved()?;
        let text = rules::removal(&saved, owner);
        if !text.is_empty() {
            self.program.restore(&text)?;
        }
        let mut made = std::mem::take(&mut self.made);
        made.extend(saved.made());
        if self.program.is_made_of_nftables() && !made.is_empty() {
            let family = table_family(self.program.family);
            let mut connection = Connection::open()?;
            for table in made {
                connection.remove_unused(family, &table)?;
            }
        }
        Ok(())
    }
}

impl Iptables {
    /// In the namespace of the calling thread.
    pub(super) fn open() -> io::Result<Self> {
        let mut sides = vec![Side::open(Family::V4)?];
        match Side::open(Family::V6) {
            Ok(v6) => sides.push(v6),
            Err(error) => tracing::debug!(%error, "no ip6tables"),
        }
        Ok(Self { sides, in_force: None })
    }
}

impl Backend for Iptables {
    fn apply(&mut self, ruleset: &Ruleset) -> io::Result<()> {
        let has_v6 = |zone: &&Zone| zone.subnets.iter().any(|subnet| subnet.addr().is_ipv6());
        if self.sides.len() < 2
            && let Some(zone) = ruleset.zones.iter().find(has_v6)
        {
            return Err(io::Error::other(format!(
                "{:?} has IPv6, and ip6tables is missing; install it, or leave IPv6 out",
                zone.bridge
            )));
        }
        let mut tried = 0;
        for side in &mut self.sides {
            tried += 1;
            let Err(error) = side.put(ruleset) else { continue };
            for side in self.sides.iter_mut().take(tried) {
                let back = match &self.in_force {
                    Some(before) => side.put(before),
                    None => side.take_away(&ruleset.owner),
                };
                if let Err(error) = back {
                    tracing::warn!(%error, "the rules that were there could not be put back");
                }
            }
            return Err(error);
        }
        self.in_force = Some(ruleset.clone());
        Ok(())
    }

    fn holds(&mut self, ruleset: &Ruleset) -> io::Result<bool> {
        if self.in_force.as_ref() != Some(ruleset) {
            return Ok(false);
        }
        for side in &mut self.sides {
            if !side.holds(ruleset)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn remove(&mut self, owner: &str) -> io::Result<()> {
        self.in_force = None;
        let mut result = Ok(());
        for side in &mut self.sides {
            // What fails with one family is not left undone with the other.
            result = result.and(side.take_away(owner));
        }
        result
    }

    fn changes(&self) -> io::Result<Option<ChangeListener>> {
        let tells = self.sides.iter().all(|side| side.program.is_made_of_nftables());
        if tells { ChangeListener::of_rules().map(Some) } else { Ok(None) }
    }
}

/// What iptables has on a host, for those who choose between firewalls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IptablesState {
    /// As `iptables v1.8.9 (nf_tables)`.
    pub version: String,
    /// Its FORWARD chain drops what no rule lets through.
    pub forward_drops: bool,
    /// The chain `DOCKER-USER`.
    pub docker_user: DockerUser,
}

impl IptablesState {
    /// Whether iptables is installed, in use or not.
    #[must_use]
    pub fn is_installed() -> bool {
        Program::is_installed(Family::V4)
    }

    /// Chains in the calling thread's namespace that may change the mark of the gates behind the
    /// rules of iptables that set it, as `ip nat POSTROUTING`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mark_setters_behind() -> io::Result<Vec<String>> {
        /// That of `mangle` (`NF_IP_PRI_MANGLE`).
        const MANGLE: i32 = -150;
        Connection::open()?.mark_setters(MANGLE, registry::FORWARD_MARK_MASK)
    }

    /// Of `host`: IPv4, and IPv6. None where it is not installed, or nobody has used it yet.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn of(host: &Namespace) -> io::Result<[Option<Self>; 2]> {
        host.with(|| {
            [Family::V4, Family::V6].map(|family| {
                let program = is_in_use(family).then(|| Program::find(family).ok())??;
                let saved = Saved::of(&program.save(Some("filter")).ok()?);
                let (forward_drops, docker_user) = (saved.forward_drops(), saved.docker_user());
                Some(Self { version: program.version, forward_drops, docker_user })
            })
        })
    }
}

impl DockerUser {
    /// That of `host`, as it is now: of IPv4, and of IPv6. Where nobody has such a chain it costs a
    /// question to the kernel; else a run of `iptables-save`, which takes 10 s at most.
    ///
    /// # Errors
    /// The kernel or the program did not tell.
    pub fn of(host: &Namespace) -> io::Result<[Self; 2]> {
        let of = |family| -> io::Result<Self> {
            if !may_have_docker_user(family)? {
                return Ok(Self::default());
            }
            Ok(Saved::of(&Program::find(family)?.save(Some("filter"))?).docker_user())
        };
        host.with(|| Ok([of(Family::V4)?, of(Family::V6)?]))?
    }
}

/// Whether the calling thread's namespace has the chain DOCKER-USER, or may have it: the kernel
/// does not tell of chains of the legacy variant.
fn may_have_docker_user(family: Family) -> io::Result<bool> {
    if is_legacy_in_use(family) {
        return Ok(true);
    }
    let mut connection = match Connection::open() {
        Ok(connection) => connection,
        // A kernel without netfilter has no chains.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(false),
        Err(error) => return Err(error),
    };
    connection.has_chain(table_family(family), "filter", saved::DOCKER_USER)
}

/// Whether the legacy variant has its table `filter` in `host`, of either family. The kernel sends
/// no word of changes there.
pub(crate) fn legacy_is_in_use(host: &Namespace) -> bool {
    host.with(|| [Family::V4, Family::V6].into_iter().any(is_legacy_in_use)).unwrap_or(false)
}

/// The same in the calling thread's namespace, of one family.
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

/// Whether the calling thread's namespace has the table `filter`, of either variant: without a look
/// at it by its programs, which make it.
fn is_in_use(family: Family) -> bool {
    let of_nftables = || {
        Connection::open()
            .and_then(|mut connection| connection.has_table(table_family(family), "filter"))
    };
    is_legacy_in_use(family) || of_nftables().unwrap_or(false)
}

/// The names of `owner`'s chains, and of the user's.
fn is_of_owner(chain: &str, owner: &str) -> bool {
    chain.strip_prefix(&rules::prefix(owner)).is_some_and(|rest| rest.starts_with('-'))
        || chain == registry::USER_CHAIN
}
