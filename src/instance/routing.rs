//! What the observed state of the host means for an instance: uplinks, reply paths, bridges of
//! other projects, and policy rules of other software. Pure.

use super::egress;
use std::collections::BTreeSet;
use std::sync::Arc;
use tidegate_model::registry;
use tidegate_netsetup::{DefaultRoute, Desired, Firewall, Observed, ReplyPath, Uplink};

/// Returns the uplinks by which replies to the containers of `desired` arrive. An uplink is listed
/// with `ours` for the families in which tidegate enabled forwarding on it, and without `ours` for
/// those in which it forwarded before.
pub(super) fn uplinks(observed: &Observed, desired: &Desired) -> Vec<Uplink> {
    let select = |uplink: &Uplink, ours: bool| {
        let is_ours = |v6: bool| {
            let is_same_link = |one: &Uplink| {
                one.link == uplink.link && one.ours && if v6 { one.v6 } else { one.v4 }
            };
            // If a link forwards already, the host is a router. tidegate does not restrict what a
            // router forwards.
            let is_ours = desired.uplinks.iter().any(is_same_link)
                || !observed.forwarding.contains(&(uplink.link.clone(), v6));
            is_ours == ours
        };
        let link = uplink.link.clone();
        let selected =
            Uplink { link, v4: uplink.v4 && is_ours(false), v6: uplink.v6 && is_ours(true), ours };
        (selected.v4 || selected.v6).then_some(selected)
    };
    // A bridge of containers, of tidegate or of other software, is no uplink.
    let uplinks = observed.uplinks.iter().filter(|uplink| {
        !egress::is_bridge_of_containers(&uplink.link)
            && !observed.bridges.contains_key(&uplink.link)
    });
    uplinks
        .flat_map(|uplink| [true, false].into_iter().filter_map(|ours| select(uplink, ours)))
        .collect()
}

/// Returns the bridges of other projects.
pub(super) fn foreign_bridges(observed: &Observed, desired: &Desired) -> BTreeSet<String> {
    let is_ours =
        |name: &String| desired.networks.iter().any(|network| network.bridge.name == *name);
    observed.bridges.keys().filter(|name| !is_ours(name)).cloned().collect()
}

/// Returns the number to subtract from the usual priorities of our policy rules, so that they
/// precede those of other software. A rule added without a priority precedes all others but that of
/// the `local` table (`fib_default_rule_pref`, net/core/fib_rules.c). wg-quick adds such rules.
pub(super) fn rules_ahead(observed: &Observed) -> u32 {
    /// Number of priorities that our rules use.
    const COUNT: u32 = registry::UPLINK_PRIORITY - registry::GUARD_EXEMPTION_PRIORITY + 1;
    match observed.first_rule_of_others {
        Some(first) if first <= registry::UPLINK_PRIORITY => {
            registry::GUARD_EXEMPTION_PRIORITY - first.saturating_sub(COUNT).max(1)
        }
        _ => 0,
    }
}

/// Returns the priority of a policy rule of other software that ours cannot precede. `None` where
/// isolation does not depend on policy rules.
pub(super) fn preceding_rule(observed: &Observed, firewall: Option<&Arc<Firewall>>) -> Option<u32> {
    // With gates, BPF programs at the bridges isolate networks, and egress needs no policy rules.
    let matters = firewall.is_none_or(|firewall| firewall.gate().is_none());
    observed
        .first_rule_of_others
        .filter(|first| matters && *first <= registry::PRECEDING_PRIORITIES)
}

pub(super) fn warn_of_preceding_rule(priority: u32) {
    tracing::warn!(
        priority,
        "policy rule of other software precedes those of tidegate, and no lower priority is free: packets of containers \
         can take its route without masquerading; give that rule a priority of {} or higher",
        registry::PRECEDING_PRIORITIES + 1
    );
}

/// Returns the reply paths of a host with several default routes, by which replies leave through
/// the uplink that the request arrived on. The best default route of `main` needs none.
pub(super) fn reply_paths(observed: &Observed, project: &str) -> Vec<ReplyPath> {
    let mut paths: Vec<ReplyPath> = Vec::new();
    for v6 in [false, true] {
        let routes = observed.default_routes.iter().filter(|route| {
            route.v6 == v6
                && !route.link.starts_with(registry::INTERFACE_PREFIX)
                && !egress::is_bridge_of_containers(&route.link)
        });
        let routes: Vec<&DefaultRoute> = routes.collect();
        let best = routes.first().filter(|best| best.table.is_none() && !best.shared);
        for route in &routes {
            let known = paths.iter().any(|path| path.v6 == v6 && path.link == route.link);
            let is_best = best.is_some_and(|best| best.link == route.link);
            // A table of other software is preferred to one of ours, because its owner updates it.
            let elsewhere = routes.iter().find(|one| one.link == route.link && one.table.is_some());
            let made = if elsewhere.is_some() { None } else { route.gateway };
            if known || is_best || route.nets.is_empty() || elsewhere.is_none() && made.is_none() {
                continue;
            }
            let (link, nets) = (route.link.clone(), route.nets.clone());
            let table = elsewhere.and_then(|route| route.table).unwrap_or(0);
            paths.push(ReplyPath { number: 0, link, v6, table, made, nets });
        }
    }
    // Sorted by name, so that the number of a link does not depend on the order of routes.
    paths.sort_by(|a, b| (a.v6, &a.link).cmp(&(b.v6, &b.link)));
    paths.truncate(registry::UPLINKS.into());
    for (number, path) in (1..).zip(&mut paths) {
        path.number = number;
        if path.made.is_some() {
            path.table = registry::uplink_table(project, number);
        }
    }
    paths
}
