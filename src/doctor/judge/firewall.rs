//! What can close networks by rules, and what `tidegate up` takes of it.

use super::namespaces::inside;
use super::surroundings::shortened;
use crate::doctor::host::Host;
use crate::doctor::report::Row;
use crate::firewall::preference;
use rustix::io::Errno;
use tidegate_netsetup::{FirewallKind, IptablesState, UserRule};

const NFTABLES: &str = "nftables";
const IPTABLES: &str = "iptables";

pub(super) fn nftables(host: &Host) -> Row {
    let Some(inside) = inside(&host.direct) else {
        return Row::cannot_tell(NFTABLES, "no network namespace could be made to try it in");
    };
    match inside.nftables {
        Ok(true) => Row::ok(NFTABLES, "is there; nobody else can flush tables of tidegate's"),
        Ok(false) => {
            Row::note(NFTABLES, "is there; rules that others flush are put back, and nothing opens meanwhile")
                .fix("run Linux 6.9 or newer, and nobody else can flush them")
        }
        Err(error)
            if error == Errno::PROTONOSUPPORT || error == Errno::OPNOTSUPP || error == Errno::INVAL =>
        {
            Row::note(
                NFTABLES,
                "is not in this kernel; iptables or no firewall does as well, but no service can have a DNS server of its own at 0.0.0.0:53",
            )
                .fix("modprobe nf_tables")
        }
        Err(error) => {
            Row::note(NFTABLES, format!("cannot be used: {error}; iptables or no firewall does as well"))
                .fix("run as root, with CAP_NET_ADMIN")
        }
    }
}

pub(super) fn gates(host: &Host) -> Row {
    let check = "gates";
    let Some(inside) = inside(&host.direct) else {
        return Row::cannot_tell(check, "no network namespace could be made to try it in");
    };
    match inside.gates {
        Ok(()) => Row::ok(
            check,
            "programs at the bridges' exits keep networks closed when firewall rules are gone",
        ),
        Err(error) => {
            let fix = if error == Errno::PERM {
                "run as root on the host itself, with CAP_BPF"
            } else {
                "run Linux 6.6 or newer"
            };
            Row::note(
                check,
                format!("{error}: policy rules keep networks closed when firewall rules are gone, which slows down by some 5% what the host forwards"),
            )
            .fix(fix)
        }
    }
}

pub(super) fn iptables(host: &Host) -> Row {
    if !host.iptables_installed {
        return Row::note(IPTABLES, "is not installed, and not needed");
    }
    let states = match &host.iptables {
        Ok(states) => states,
        Err(why) => return Row::cannot_tell(IPTABLES, why),
    };
    let Some(state) = states.iter().flatten().next() else {
        return Row::ok(IPTABLES, "is installed, and nobody uses it");
    };
    let mut details: Vec<String> = states.iter().flatten().flat_map(told).collect();
    details.extend(host.mark_setters.iter().map(|chain| {
        format!(
            "{chain} may change the mark by which packets pass the gates; use --firewall=nftables beside it"
        )
    }));
    let row = if details.is_empty() {
        Row::ok(IPTABLES, format!("{}; nothing there is in the way", state.version))
    } else {
        Row::note(IPTABLES, format!("{}; has a say about containers", state.version))
    };
    row.details(shortened(details))
}

/// What matters to containers of what there is.
fn told(state: &IptablesState) -> Vec<String> {
    let program = state.version.split(' ').next().unwrap_or(IPTABLES);
    let drops = state.forward_drops.then(|| format!("{program}: the policy of FORWARD is DROP"));
    let asked = |rule: &UserRule| {
        let by = if rule.is_about_forwarding() {
            "it can be asked of what the kernel forwards alone: ports are published by the kernel"
        } else {
            "it holds for published ports"
        };
        format!("{program}: {} ({by})", rule.text)
    };
    drops.into_iter().chain(state.docker_user.rules.iter().map(asked)).collect()
}

/// What `tidegate up` takes if it is not told.
pub(super) fn choice(host: &Host) -> Row {
    let check = "firewall";
    let nothing = [None, None];
    let has_nftables = inside(&host.direct).is_some_and(|inside| inside.nftables.is_ok());
    if inside(&host.direct).is_none() || !host.capabilities.net_admin {
        return Row::note(
            check,
            "none is used: networks of an ordinary user are apart from the host",
        );
    }
    let (order, why) = preference(host.iptables.as_ref().unwrap_or(&nothing));
    let is_there = |kind: &FirewallKind| match kind {
        FirewallKind::Nftables => has_nftables,
        FirewallKind::Iptables => host.iptables_installed,
    };
    match order.iter().position(is_there) {
        Some(0) => Row::note(check, format!("tidegate up takes {}: {why}", order[0])),
        Some(second) => Row::note(check, format!("tidegate up takes {}: no {}", order[second], order[0])),
        None => Row::limited(
            check,
            "there is none: networks are closed by guards alone, and the NAT engine leads containers out",
        )
        .fix("modprobe nf_tables"),
    }
}
