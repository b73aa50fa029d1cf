//! Docker's chain DOCKER-USER: of both variants of iptables, which a host can use side by side.
//!
//! The rules are those that the programs print. nft(8) can add rules to the same chain that
//! iptables cannot print, or prints without some of their matches. Each of these is represented by
//! one rule of unknown meaning.

use super::program::{Family, Variants};
use super::saved::{DOCKER_USER, DockerUser, Saved, UserRule};
use super::{connection_to, is_legacy_in_use, table_family};
use std::collections::BTreeSet;
use std::io;
use tidegate_netfilter::{Connection, ListedRule};

/// The table of the chain.
const TABLE: &str = "filter";

/// Attempts to read the same rules from the kernel and from iptables-save, between which they can
/// change.
const ATTEMPTS: usize = 3;

/// Stands for a rule that iptables cannot print.
const UNPRINTABLE: &str = "-A DOCKER-USER (a rule of nft that iptables cannot print)";

/// Expressions of the rules that iptables-nft adds, and prints completely.
const PRINTABLE: [&str; 12] = [
    "bitwise",
    "byteorder",
    "cmp",
    "counter",
    "immediate",
    "limit",
    "log",
    "match",
    "meta",
    "payload",
    "range",
    "target",
];

/// Reads the chain in the network namespace of the calling thread.
///
/// # Errors
/// The kernel or a program failed, or a variant is in use whose programs are missing.
pub(super) fn of_family(family: Family) -> io::Result<DockerUser> {
    let connection = connection_to(table_family(family), TABLE, DOCKER_USER)?;
    let has_legacy = is_legacy_in_use(family);
    if connection.is_none() && !has_legacy {
        // No program is run.
        return Ok(DockerUser::default());
    }
    let variants = Variants::of(family);
    let of_nftables = match connection {
        Some(connection) => of_nftables(family, connection, &variants)?,
        None => DockerUser::default(),
    };
    let of_legacy = if has_legacy {
        variants.with(false, |program| program.save(Some(TABLE)))?.docker_user()
    } else {
        DockerUser::default()
    };
    let [ours, other] = variants.ours_first(of_nftables, of_legacy);
    Ok(DockerUser { elsewhere: other.rules, forward_elsewhere: other.forward, ..ours })
}

fn of_nftables(
    family: Family,
    mut connection: Connection,
    variants: &Variants,
) -> io::Result<DockerUser> {
    let mut found = DockerUser::default();
    for _ in 0..ATTEMPTS {
        let rules = connection.list_rules(table_family(family), TABLE)?;
        let reached = reachable(&rules, DOCKER_USER);
        let saved = match variants.with(true, |program| program.save_printable(Some(TABLE))) {
            // The chain was created with nft(8).
            Err(error) if error.kind() == io::ErrorKind::NotFound => Saved::default(),
            saved => saved?,
        };
        found = saved.docker_user();
        found.forward = reachable(&rules, "FORWARD").contains(DOCKER_USER);
        let in_reach = rules.iter().filter(|rule| reached.contains(rule.chain.as_str()));
        let is_printable = |rule: &ListedRule| {
            rule.expressions.iter().all(|name| PRINTABLE.contains(&name.as_str()))
        };
        let printed: usize = reached.iter().map(|chain| saved.rules_in(TABLE, chain)).sum();
        if in_reach.clone().all(is_printable) && in_reach.count() == printed {
            return Ok(found);
        }
    }
    // Errors quote the first rule, and others may be printed wrongly.
    found.rules.insert(0, UserRule { text: UNPRINTABLE.to_owned() });
    Ok(found)
}

/// Returns the chain `from` and those to which its rules jump.
fn reachable<'a>(rules: &'a [ListedRule], from: &'a str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::from([from]);
    let mut next = vec![from];
    while let Some(chain) = next.pop() {
        let targets = rules.iter().filter(|rule| rule.chain == chain);
        for target in targets.filter_map(|rule| rule.target.as_deref()) {
            if reached.insert(target) {
                next.push(target);
            }
        }
    }
    reached
}
