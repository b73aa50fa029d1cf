//! Resource limits, and the run directory.

#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::iter_over_hash_type))]

use super::known;
use crate::doctor::host::Host;
use crate::doctor::report::Row;
use tidegate_proxy::{UDP_BUFFER, UNREAD_BYTES};

/// The lowest commonly published port.
const COMMON_PORT: u64 = 80;

/// The recommended minimum of open files; each connection takes two.
const OPEN_FILES: u64 = 4096;

/// The default of the kernel (`fs.pipe-user-pages-soft` of 16384 pages of 4 KiB).
const PIPE_BYTES: u64 = 64 << 20;

/// The size of a pipe for splicing.
const PIPE: u64 = 1 << 20;

pub(super) fn low_ports(host: &Host) -> Row {
    let check = "low-ports";
    if host.capabilities.net_bind_service {
        return Row::ok(check, "every port can be published (CAP_NET_BIND_SERVICE)");
    }
    match known(check, &host.limits.first_port) {
        Ok(Some(first)) if first <= COMMON_PORT => {
            Row::ok(check, format!("ports from {first} can be published"))
        }
        // Before Linux 4.11 the kernel had no such setting.
        Ok(first) => Row::limited(
            check,
            format!(
                "ports below {} cannot be published (no CAP_NET_BIND_SERVICE)",
                first.unwrap_or(1024)
            ),
        )
        .fix(format!("sysctl -w net.ipv4.ip_unprivileged_port_start={COMMON_PORT}")),
        Err(row) => *row,
    }
}

pub(super) fn open_files(host: &Host) -> Row {
    let check = "open-files";
    let (soft, hard) = host.limits.open_files;
    let text =
        |limit: Option<u64>| limit.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string());
    let found = format!("soft {}, hard {}", text(soft), text(hard));
    match hard {
        Some(hard) if hard < OPEN_FILES => {
            Row::limited(check, format!("{found}: fewer than {} concurrent connections", hard / 2))
                .fix("raise the hard limit (ulimit -Hn, LimitNOFILE= of a unit) to 65536")
        }
        Some(hard) => Row::ok(
            check,
            format!(
                "{found} (tidegate raises the soft limit to it): about {} connections",
                hard / 2
            ),
        ),
        None => Row::ok(check, found),
    }
}

pub(super) fn pipe_memory(host: &Host) -> Row {
    let check = "pipe-memory";
    if host.capabilities.many_pipes {
        return Row::ok(check, "no limit for this user");
    }
    match known(check, &host.limits.pipe_bytes) {
        Ok(None | Some(0)) => Row::ok(check, "no limit"),
        Ok(Some(bytes)) => {
            let found = format!(
                "{} MiB: {} concurrent connections forward payload without copying",
                bytes >> 20,
                bytes / PIPE
            );
            if bytes >= PIPE_BYTES {
                Row::ok(check, found)
            } else {
                Row::limited(check, found).fix("sysctl -w fs.pipe-user-pages-soft=16384")
            }
        }
        Err(row) => *row,
    }
}

pub(super) fn receive_buffer(host: &Host) -> Row {
    let check = "receive-buffer";
    if host.sockets.force_buffer.is_ok() {
        return Row::ok(check, "not limited by net.core.rmem_max (CAP_NET_ADMIN)");
    }
    let fix = format!("sysctl -w net.core.rmem_max={UDP_BUFFER}");
    match known(check, &host.limits.receive_buffer) {
        Ok(Some(most)) if most >= UDP_BUFFER as u64 => Row::ok(check, format!("up to {most} bytes")),
        Ok(Some(most)) if most >= UNREAD_BYTES as u64 => {
            Row::limited(check, format!("up to {most} bytes: UDP ports drop datagrams of large bursts")).fix(fix)
        }
        Ok(Some(most)) => Row::limited(
            check,
            format!("up to {most} bytes: UDP ports drop datagrams of bursts, and TCP buffers keep the defaults of the kernel"),
        )
        .fix(fix),
        Ok(None) => Row::cannot_tell(check, "this network namespace does not show net.core.rmem_max"),
        Err(row) => *row,
    }
}

pub(super) fn run_directory(host: &Host) -> Row {
    let check = "run-directory";
    let Some(path) = &host.run_directory.path else {
        return Row::missing(check, "no directory for journals and sockets")
            .fix("set XDG_RUNTIME_DIR, or TIDEGATE_RUN_DIR, to a directory of your own");
    };
    let path = path.display();
    match host.run_directory.writable {
        Ok(()) => Row::ok(check, format!("{path} is writable")),
        Err(error) => Row::missing(check, format!("{path} is not writable: {error}"))
            .fix("set TIDEGATE_RUN_DIR to a writable directory"),
    }
}
