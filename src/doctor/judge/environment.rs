//! Settings and software of the host that interact with networks of tidegate.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::doctor::host::{Found, Host, Service};
use crate::doctor::report::Row;
use ipnet::IpNet;
use tidegate_model::registry;
use tidegate_netsetup::Pools;

/// Maximum number of details of a row; further ones are only counted.
const MAX_DETAILS: usize = 30;

pub(super) fn ip_forward(host: &Host) -> Row {
    let check = "ip-forward";
    let is_on = |setting: &Found<Option<u64>>| matches!(setting, Ok(Some(value)) if *value != 0);
    let (v4, v6) = (&host.forwarding.v4, &host.forwarding.v6);
    let families = match (is_on(v4), is_on(v6)) {
        (true, true) => "IPv4 and IPv6",
        (true, false) => "IPv4",
        (false, true) => "IPv6",
        (false, false) => {
            return match v4.as_ref().and(v6.as_ref()) {
                Ok(_) => Row::ok(check, "off: this host does not forward packets"),
                Err(why) => Row::cannot_tell(check, why),
            };
        }
    };
    let settings =
        [(is_on(v4), "net.ipv4.ip_forward=0"), (is_on(v6), "net.ipv6.conf.all.forwarding=0")];
    let settings: Vec<&str> =
        settings.into_iter().filter(|(on, _)| *on).map(|(_, setting)| setting).collect();
    Row::note(
        check,
        format!(
            "on ({families}): only guards (ip rule, priority {}) isolate the networks; rules of other software with a lower priority number precede them",
            registry::GUARD_PRIORITY
        ),
    )
    .fix(format!("if nothing else needs forwarding: sysctl -w {}", settings.join(" ")))
}

pub(super) fn policy_rules(host: &Host) -> Row {
    const ROOM: u32 = registry::PRECEDING_PRIORITIES;
    let check = "policy-rules";
    match &host.first_rule {
        Ok(Some(first)) if *first <= ROOM => {
            let found = format!(
                "a rule with priority {first} leaves no room for rules of tidegate before it"
            );
            let detail = "without a firewall, packets from containers that match it leave by its route, with the address of the container";
            Row::limited(check, found)
                .details(vec![detail.to_owned()])
                .fix(format!("give that rule a priority of {} or higher (ip rule)", ROOM + 1))
        }
        Ok(_) => Row::ok(check, "rules of tidegate can precede those of other software"),
        Err(why) => Row::cannot_tell(check, why),
    }
}

pub(super) fn ipv6_force_forwarding(host: &Host) -> Row {
    let check = "ipv6-force-forwarding";
    match &host.forwarding.v6_per_interface {
        Ok(Some(_)) => Row::ok(check, "IPv6 forwarding can be set per interface"),
        Ok(None) => Row::note(
            check,
            "IPv6 forwarding is on for all interfaces or for none; guards isolate the networks",
        )
        .fix("run Linux 6.17 or newer"),
        Err(why) => Row::cannot_tell(check, why),
    }
}

pub(super) fn address_pools(host: &Host) -> Row {
    let check = "address-pools";
    let routes = match &host.routes {
        Ok(routes) => routes,
        Err(why) => return Row::cannot_tell(check, why),
    };
    // The IPv6 pool is a ULA prefix unique to this host, so it cannot collide.
    let pools = Pools::usual([0; 5]);
    let in_use: Vec<IpNet> = routes.iter().map(|(net, _)| *net).collect();
    let foreign = |(net, link): &&(IpNet, String)| {
        matches!(net, IpNet::V4(_))
            && pools.overlap(net)
            && !link.starts_with(registry::INTERFACE_PREFIX)
    };
    let mut others: Vec<String> =
        routes.iter().filter(foreign).map(|(net, link)| format!("{net} via {link}")).collect();
    others.sort();
    others.dedup();
    match (pools.obtain(false, &in_use), others.is_empty()) {
        (Ok(_), true) => Row::ok(check, "no other route overlaps the address pools"),
        (Ok(next), false) => Row::note(
            check,
            format!("routes of the host overlap the address pools and are skipped; the next network gets {next}"),
        )
        .details(shortened(others)),
        (Err(_), _) => Row::limited(
            check,
            "no free IPv4 subnet for networks: routes of the host cover the address pools",
        )
        .details(shortened(others))
        .fix("set a subnet for each network: ipam.config.subnet in the Compose file"),
    }
}

pub(super) fn host_services(host: &Host) -> Row {
    let check = "host-services";
    let services = match &host.services {
        Ok(services) => services,
        Err(why) => return Row::cannot_tell(check, why),
    };
    if services.is_empty() {
        return Row::ok(check, "no socket is bound to all addresses");
    }
    let describe = |service: &Service| {
        let holder = service.holder.as_deref().unwrap_or("process not visible to this user");
        format!("{}/{}: {holder}", service.port, service.protocol)
    };
    let count = match services.len() {
        1 => "1 socket is bound to all addresses".to_owned(),
        count => format!("{count} sockets are bound to all addresses"),
    };
    Row::note(
        check,
        format!(
            "{count}: containers, and hosts that route through this one, reach them on the gateway addresses"
        ),
    )
    .details(shortened(services.iter().map(describe).collect()))
    .fix(format!(
        "bind them to 127.0.0.1, or drop input from {}-* to them in a firewall",
        registry::INTERFACE_PREFIX
    ))
}

pub(super) fn shortened(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MAX_DETAILS {
        let more = lines.len() - MAX_DETAILS;
        lines.truncate(MAX_DETAILS);
        lines.push(format!("and {more} more"));
    }
    lines
}
