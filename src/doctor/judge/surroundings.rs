//! What else the host does that meets with tidegate's networks.

use crate::doctor::host::{Found, Host, Service};
use crate::doctor::report::Row;
use ipnet::IpNet;
use tidegate_model::registry;
use tidegate_netsetup::Pools;

/// More lines than so many nobody reads.
const TOLD: usize = 30;

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
                Ok(_) => Row::ok(check, "off: this host forwards for nobody"),
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
            "on ({families}): networks are kept closed by guards alone (ip rule, priority {}); rules of others before those are asked first",
            registry::GUARD_PRIORITY
        ),
    )
    .fix(format!("if nothing else needs it: sysctl -w {}", settings.join(" ")))
}

pub(super) fn policy_rules(host: &Host) -> Row {
    const ROOM: u32 = registry::PRECEDING_PRIORITIES;
    let check = "policy-rules";
    match &host.first_rule {
        Ok(Some(first)) if *first <= ROOM => {
            let found = format!(
                "a rule of priority {first} precedes those of tidegate, which have no room ahead of it"
            );
            let detail = "without a firewall, what it matches of what containers send leaves by its route, with the container's address";
            Row::limited(check, found)
                .details(vec![detail.to_owned()])
                .fix(format!("give it a priority of {} or higher (ip rule)", ROOM + 1))
        }
        Ok(_) => Row::ok(check, "none of other software that those of tidegate cannot precede"),
        Err(why) => Row::cannot_tell(check, why),
    }
}

pub(super) fn ipv6_force_forwarding(host: &Host) -> Row {
    let check = "ipv6-force-forwarding";
    match &host.forwarding.v6_per_interface {
        Ok(Some(_)) => Row::ok(check, "IPv6 forwarding can be switched per interface"),
        Ok(None) => Row::note(
            check,
            "IPv6 is forwarded by all interfaces or by none; guards close the networks",
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
    // The IPv6 pool is made of what only this host has; nobody else is in it.
    let pools = Pools::usual([0; 5]);
    let in_use: Vec<IpNet> = routes.iter().map(|(net, _)| *net).collect();
    let foreign = |(net, link): &&(IpNet, String)| {
        matches!(net, IpNet::V4(_))
            && pools.overlap(net)
            && !link.starts_with(registry::INTERFACE_PREFIX)
    };
    let mut others: Vec<String> =
        routes.iter().filter(foreign).map(|(net, link)| format!("{net} by {link}")).collect();
    others.sort();
    others.dedup();
    match (pools.obtain(false, &in_use), others.is_empty()) {
        (Ok(_), true) => Row::ok(check, "nobody else uses the addresses that networks get"),
        (Ok(next), false) => Row::note(
            check,
            format!("the host reaches something there, which is passed over; the next network gets {next}"),
        )
        .details(shortened(others)),
        (Err(_), _) => Row::limited(
            check,
            "no IPv4 subnet is left for networks: the host reaches something everywhere there",
        )
        .details(shortened(others))
        .fix("give each network one of its own: ipam.config.subnet in the Compose file"),
    }
}

pub(super) fn host_services(host: &Host) -> Row {
    let check = "host-services";
    let services = match &host.services {
        Ok(services) => services,
        Err(why) => return Row::cannot_tell(check, why),
    };
    if services.is_empty() {
        return Row::ok(check, "no socket answers on all addresses");
    }
    let told = |service: &Service| {
        let holder = service.holder.as_deref().unwrap_or("holder not visible from here");
        format!("{}/{}: {holder}", service.port, service.protocol)
    };
    let count = match services.len() {
        1 => "1 socket answers".to_owned(),
        count => format!("{count} sockets answer"),
    };
    Row::note(
        check,
        format!(
            "{count} on all addresses: containers, and who routes by way of this host, find them at the gateways"
        ),
    )
    .details(shortened(services.iter().map(told).collect()))
    .fix(format!(
        "bind them to 127.0.0.1, or let a firewall drop what comes in by {}-* for them",
        registry::INTERFACE_PREFIX
    ))
}

pub(super) fn shortened(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > TOLD {
        let more = lines.len() - TOLD;
        lines.truncate(TOLD);
        lines.push(format!("and {more} more"));
    }
    lines
}
