//! Namespaces, and what can be created in them.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::doctor::host::{Code, Found, Host, Inside, Trial, UserNamespaces};
use crate::doctor::report::Row;
use crate::port_guards::remedy;
use rustix::io::Errno;

const NO_NAMESPACE: &str = "no namespace could be created for the trial";

/// Returns the result of a trial inside its namespace, if the namespace was entered.
pub(super) fn inside(trial: &Found<Trial>) -> Option<&Inside> {
    match trial {
        Ok(Trial::Entered(inside)) => Some(inside),
        _ => None,
    }
}

/// Returns the error of a namespace without capabilities. AppArmor, as configured by Ubuntu, allows
/// user namespaces but drops the capabilities inside.
fn powerless(inside: &Inside) -> Option<Code> {
    match inside.network {
        Err((_, error)) if is_denial(error) => Some(error),
        _ => None,
    }
}

fn is_denial(error: Code) -> bool {
    error == Errno::PERM || error == Errno::ACCESS
}

/// Returns the features that work within a user namespace.
fn in_user_namespace(host: &Host) -> Option<&Inside> {
    inside(&host.in_user_namespace).filter(|inside| powerless(inside).is_none())
}

/// Returns the most privileged namespace available to this process.
fn any_inside(host: &Host) -> Option<&Inside> {
    inside(&host.direct).or_else(|| in_user_namespace(host))
}

/// The guarantees that do not hold without port guards.
const WITHOUT_PORT_GUARDS: [&str; 3] = [
    "a container can use the MAC and IP addresses of its neighbours and of their gateway",
    "a container can send to the outside with addresses that are not its own, without masquerade",
    "a DNS server at a gateway (x-dns: gateway) trusts the source address of a client",
];

pub(super) fn port_guards(host: &Host) -> Row {
    let check = "port-guards";
    let Some(inside) = any_inside(host) else { return Row::cannot_tell(check, NO_NAMESPACE) };
    match &inside.port_guards {
        Ok(mechanism) => Row::ok(
            check,
            format!("{mechanism}: each container can send only from its own addresses"),
        ),
        Err(failures) => {
            let fix = remedy(failures.iter().map(|(_, error)| is_denial(*error)));
            let why: Vec<String> =
                failures.iter().map(|(mechanism, error)| format!("{mechanism}: {error}")).collect();
            let details =
                WITHOUT_PORT_GUARDS.iter().map(|one| (*one).to_owned()).chain(why).collect();
            Row::limited(check, "packets from containers are not checked").details(details).fix(fix)
        }
    }
}

pub(super) fn network_namespaces(host: &Host) -> Row {
    let check = "network-namespaces";
    let (why, fix) = match &host.direct {
        Ok(Trial::Entered(_)) if host.capabilities.net_admin => {
            return Row::ok(check, "created, entered and left");
        }
        Ok(Trial::Entered(_)) => ("no CAP_NET_ADMIN".to_owned(), "run as root, with CAP_NET_ADMIN"),
        Ok(Trial::NoReturn(error)) => (
            format!("the host's network cannot be entered from another namespace: {error}"),
            "run as root of the host, or in a network namespace of your own (unshare --user --map-root-user --net)",
        ),
        Ok(Trial::NotMade(error)) if *error == Errno::NOSPC => (
            "user.max_net_namespaces is exhausted".to_owned(),
            "sysctl -w user.max_net_namespaces=10000",
        ),
        Ok(Trial::NotMade(error)) if *error == Errno::INVAL => (
            "this kernel has no network namespaces".to_owned(),
            "run a kernel with CONFIG_NET_NS, outside of sandboxes",
        ),
        Ok(Trial::NotMade(error)) => {
            (format!("not created: {error}"), "run as root, with CAP_SYS_ADMIN")
        }
        Err(why) => return Row::cannot_tell(check, why),
    };
    if in_user_namespace(host).is_some() {
        Row::limited(
            check,
            format!("{why}; available only within a user namespace: no `tidegate up`, no `publish --netns` or --pid"),
        )
        .fix(fix)
    } else {
        Row::missing(check, why).fix(fix)
    }
}

pub(super) fn user_namespaces(host: &Host) -> Row {
    let check = "user-namespaces";
    let refused = match &host.in_user_namespace {
        Ok(Trial::NotMade(error) | Trial::NoReturn(error)) => Some(("not created", *error)),
        Ok(Trial::Entered(inside)) => {
            powerless(inside).map(|error| ("created, but without capabilities", error))
        }
        Err(why) => return Row::cannot_tell(check, why),
    };
    let forbidding = forbidding(&host.user_namespaces);
    let is_root = inside(&host.direct).is_some();
    let Some((what, error)) = refused else {
        return match forbidding {
            Some((setting, fix)) if is_root => Row::note(
                check,
                format!("available to this user, but not to ordinary users: {setting}"),
            )
            .fix(fix),
            _ => Row::ok(check, "created, with a network namespace"),
        };
    };
    let (why, fix) = match forbidding {
        Some((setting, fix)) => (format!("{what}: {error}; {setting}"), fix),
        None if error == Errno::NOSPC || error == Errno::USERS => (
            "too many user namespaces, or nested too deeply".to_owned(),
            "sysctl -w user.max_user_namespaces=10000",
        ),
        None => (
            format!("{what}: {error}"),
            "allow unshare(2): check the seccomp profile of the container, or the security module",
        ),
    };
    if is_root {
        Row::note(check, format!("{why}; required only for ordinary users")).fix(fix)
    } else {
        Row::limited(check, why).fix(fix)
    }
}

/// Returns the setting that forbids user namespaces to ordinary users, and the command that allows
/// them.
fn forbidding(settings: &UserNamespaces) -> Option<(&'static str, &'static str)> {
    let is = |setting: &Found<Option<u64>>, value: u64| *setting == Ok(Some(value));
    if is(&settings.max, 0) {
        Some(("user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=10000"))
    } else if is(&settings.unprivileged_clone, 0) {
        Some((
            "kernel.unprivileged_userns_clone is 0",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ))
    } else if is(&settings.apparmor_restricts, 1) {
        Some((
            "kernel.apparmor_restrict_unprivileged_userns is 1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ))
    } else {
        None
    }
}

pub(super) fn networks(host: &Host) -> Row {
    let check = "networks";
    let Some(inside) = any_inside(host) else { return Row::cannot_tell(check, NO_NAMESPACE) };
    let Err((what, error)) = &inside.network else {
        return Row::ok(
            check,
            "bridge, veth pair, addresses and guards were created in a namespace",
        );
    };
    let found = format!("{what}: {error}");
    let row = if self::inside(&host.direct).is_some() {
        Row::missing(check, found)
    } else {
        Row::limited(check, found)
    };
    row.fix(fix_for_network(*error))
}

fn fix_for_network(error: Code) -> &'static str {
    if error == Errno::ROFS {
        "mount -o remount,rw /proc/sys"
    } else if is_denial(error) {
        "run as root, with CAP_NET_ADMIN"
    } else {
        "modprobe -a bridge veth"
    }
}

pub(super) fn tun(host: &Host) -> Row {
    let check = "tun";
    let mode = host.tun_mode.map_or_else(String::new, |mode| format!(" (mode {mode:04o})"));
    let limited = |found: String, fix: &str| {
        Row::limited(check, format!("{found}; without a firewall, networks have no egress"))
            .fix(fix)
    };
    if let Err(error) = host.tun_device {
        let found = format!("/dev/net/tun: {error}");
        return if error == Errno::NOENT {
            limited(found, "modprobe tun (for a container: --device /dev/net/tun)")
        } else if error == Errno::ACCESS {
            limited(found + &mode, "chmod 0666 /dev/net/tun (the default of udev)")
        } else if error == Errno::PERM {
            limited(found, "grant the device to the container: --device /dev/net/tun")
        } else {
            limited(found, "modprobe tun")
        };
    }
    match any_inside(host).map(|inside| inside.tun) {
        Some(Ok(_)) => Row::ok(check, "a device was created"),
        Some(Err(error)) => limited(
            format!("no device could be created: {error}"),
            "run as root, with CAP_NET_ADMIN",
        ),
        None => Row::cannot_tell(check, &format!("/dev/net/tun can be opened, but {NO_NAMESPACE}")),
    }
}

pub(super) fn tun_offload(host: &Host) -> Row {
    let check = "tun-offload";
    match any_inside(host).map(|inside| inside.tun) {
        Some(Ok(offload)) if offload.tcp && offload.udp => {
            Row::ok(check, "TCP and UDP segmentation")
        }
        Some(Ok(offload)) if offload.tcp => Row::limited(
            check,
            "TCP segmentation, no UDP segmentation: UDP is sent datagram by datagram",
        )
        .fix("run Linux 6.2 or newer"),
        Some(Ok(_)) => Row::limited(check, "no segmentation: data is sent packet by packet")
            .fix("use the kernel's own TUN driver, outside of sandboxes"),
        Some(Err(_)) => Row::cannot_tell(check, "no TUN device could be created"),
        None => Row::cannot_tell(check, NO_NAMESPACE),
    }
}
