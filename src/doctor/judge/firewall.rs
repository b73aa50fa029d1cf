//! The available firewalls, and the one that `tidegate up` chooses.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::environment::shortened;
use super::namespaces::inside;
use crate::doctor::host::Host;
use crate::doctor::report::Row;
use rustix::io::Errno;
use tidegate_netsetup::{FirewallKind, IptablesState, UserRule};
use tidegate_publish::firewall::preference;

const NFTABLES: &str = "nftables";
const IPTABLES: &str = "iptables";

pub(super) fn nftables(host: &Host) -> Row {
    let Some(inside) = inside(&host.direct) else {
        return Row::cannot_tell(NFTABLES, "no network namespace could be created for the trial");
    };
    match inside.nftables {
        Ok(true) => Row::ok(NFTABLES, "available; other processes cannot flush tables of tidegate"),
        Ok(false) => {
            Row::note(NFTABLES, "available; rules flushed by other processes are restored, and networks stay closed meanwhile")
                .fix("run Linux 6.9 or newer, where tables have an owner that alone can flush them")
        }
        Err(error)
            if error == Errno::PROTONOSUPPORT || error == Errno::OPNOTSUPP || error == Errno::INVAL =>
        {
            Row::note(
                NFTABLES,
                "not in this kernel; iptables or no firewall work too, but a service cannot run its own DNS server on 0.0.0.0:53",
            )
                .fix("modprobe nf_tables")
        }
        Err(error) => {
            Row::note(NFTABLES, format!("not usable: {error}; iptables or no firewall work too"))
                .fix("run as root, with CAP_NET_ADMIN")
        }
    }
}

pub(super) fn gates(host: &Host) -> Row {
    let check = "gates";
    let Some(inside) = inside(&host.direct) else {
        return Row::cannot_tell(check, "no network namespace could be created for the trial");
    };
    match inside.gates {
        Ok(()) => Row::ok(
            check,
            "BPF programs on the egress of bridges keep networks closed if firewall rules vanish",
        ),
        Err(error) => {
            let fix = if error == Errno::PERM {
                "run as root on the host itself, with CAP_BPF"
            } else {
                "run Linux 6.6 or newer"
            };
            Row::note(
                check,
                format!("{error}: policy rules keep networks closed if firewall rules vanish; they slow down forwarding on the host by about 5%"),
            )
            .fix(fix)
        }
    }
}

pub(super) fn iptables(host: &Host) -> Row {
    if !host.iptables_installed {
        return Row::note(IPTABLES, "not installed, and not required");
    }
    let states = match &host.iptables {
        Ok(states) => states,
        Err(why) => return Row::cannot_tell(IPTABLES, why),
    };
    let Some(state) = states.iter().flatten().next() else {
        return Row::ok(IPTABLES, "installed, and without rules");
    };
    let mut details: Vec<String> = states.iter().flatten().flat_map(relevant_rules).collect();
    details.extend(host.mark_setters.iter().map(|chain| {
        format!(
            "{chain} may change the mark by which packets pass the gates; use --firewall=nftables alongside it"
        )
    }));
    let row = if details.is_empty() {
        Row::ok(IPTABLES, format!("{}; no rule affects containers", state.version))
    } else {
        Row::note(IPTABLES, format!("{}; has rules that affect containers", state.version))
    };
    row.details(shortened(details))
}

/// Returns the policies and rules of iptables that affect containers.
fn relevant_rules(state: &IptablesState) -> Vec<String> {
    let program = state.version.split(' ').next().unwrap_or(IPTABLES);
    let drops = state.forward_drops.then(|| format!("{program}: the policy of FORWARD is DROP"));
    let describe = |rule: &UserRule| {
        let effect = if rule.is_about_forwarding() {
            "matches only packets that the kernel forwards: ports are published by the kernel"
        } else {
            "applies to published ports"
        };
        format!("{program}: {} ({effect})", rule.text)
    };
    drops.into_iter().chain(state.docker_user.rules.iter().map(describe)).collect()
}

/// Returns the firewall that `tidegate up` chooses by default.
pub(super) fn choice(host: &Host) -> Row {
    let check = "firewall";
    let nothing = [None, None];
    let has_nftables = inside(&host.direct).is_some_and(|inside| inside.nftables.is_ok());
    if inside(&host.direct).is_none() || !host.capabilities.net_admin {
        return Row::note(check, "none: networks of an ordinary user are separate from the host");
    }
    let (order, why) = preference(host.iptables.as_ref().unwrap_or(&nothing));
    let is_there = |kind: &FirewallKind| match kind {
        FirewallKind::Nftables => has_nftables,
        FirewallKind::Iptables => host.iptables_installed,
    };
    match order.iter().position(is_there) {
        Some(0) => Row::note(check, format!("tidegate up uses {}: {why}", order[0])),
        Some(second) => {
            Row::note(check, format!("tidegate up uses {}: no {}", order[second], order[0]))
        }
        None => Row::limited(
            check,
            "not available: guards alone isolate the networks, and the NAT engine provides egress",
        )
        .fix("modprobe nf_tables"),
    }
}
