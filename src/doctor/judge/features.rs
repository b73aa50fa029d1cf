//! Features of the kernel itself.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use crate::doctor::host::Host;
use crate::doctor::report::Row;

/// The oldest supported kernel: major and minor version.
const FLOOR: (u32, u32) = (5, 10);

pub(super) fn kernel(host: &Host) -> Row {
    let check = "kernel";
    let release = &host.release;
    match version(release) {
        Some(version) if version >= FLOOR => Row::ok(check, format!("Linux {release}")),
        Some(_) => {
            Row::missing(check, format!("Linux {release} is older than {}.{}", FLOOR.0, FLOOR.1))
                .fix(format!("run Linux {}.{} or newer", FLOOR.0, FLOOR.1))
        }
        None => Row::cannot_tell(check, &format!("{release:?} is not a Linux release")),
    }
}

/// Returns the major and minor version of a release such as `5.10.0-33-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn tcp_peek_offset(host: &Host) -> Row {
    let check = "tcp-peek-offset";
    match host.sockets.tcp_peek_offset {
        Ok(()) => Row::ok(check, "TCP data can be peeked at any offset of the receive queue"),
        Err(error) => Row::limited(
            check,
            format!("SO_PEEK_OFF on TCP: {error}; the NAT engine copies payload more often"),
        )
        .fix("run Linux 6.9 or newer"),
    }
}

pub(super) fn udp_offload(host: &Host) -> Row {
    let check = "udp-offload";
    let refused: Vec<String> =
        [("UDP_GRO", host.sockets.udp_gro), ("UDP_SEGMENT", host.sockets.udp_segment)]
            .into_iter()
            .filter_map(|(name, tried)| Some(format!("{name}: {}", tried.err()?)))
            .collect();
    if refused.is_empty() {
        return Row::ok(check, "batches of datagrams are received and sent with GRO and GSO");
    }
    // Both options predate the oldest supported kernel.
    Row::limited(check, format!("{}; datagrams are sent one by one", refused.join(", ")))
        .fix("allow the socket option: check the seccomp profile, or a sandbox with its own network stack")
}

pub(super) fn ipv6(host: &Host) -> Row {
    let check = "ipv6";
    if let Err(error) = host.sockets.ipv6 {
        return Row::limited(check, format!("no IPv6 sockets: {error}; only IPv4 works"))
            .fix("boot without ipv6.disable=1");
    }
    match host.forwarding.v6_disabled {
        Ok(Some(0)) => Row::ok(check, "available"),
        Ok(None) => Row::cannot_tell(check, "IPv6 sockets work, but IPv6 has no sysctls"),
        Ok(Some(_)) => Row::limited(check, "disabled on all interfaces of the host")
            .fix("sysctl -w net.ipv6.conf.all.disable_ipv6=0"),
        Err(ref why) => Row::cannot_tell(check, why),
    }
}

#[cfg(test)]
mod tests {
    use super::version;

    #[test]
    fn kernel_releases_of_distributions_are_parsed() {
        for (release, expected) in [
            ("5.10.0-33-amd64", Some((5, 10))),
            ("6.18.44", Some((6, 18))),
            ("7.0-rc1", Some((7, 0))),
            ("4.19.0+", Some((4, 19))),
            ("10.2", Some((10, 2))),
            ("", None),
            ("generic", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
