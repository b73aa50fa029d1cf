//! Notifications to the service manager (sd_notify(3)).

use super::host::{Host, SOON, refused};
use crate::ask::get;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;
use tidegate_testbed::{Process, Signal};

/// The notification socket of a service manager.
fn manager(host: &Host) -> UnixDatagram {
    let socket = UnixDatagram::bind(host.path("notify")).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// The lines of the next notification.
#[track_caller]
fn next(manager: &UnixDatagram) -> Vec<String> {
    let mut message = [0; 4096];
    let length = manager.recv(&mut message).unwrap();
    let text = std::str::from_utf8(&message[..length]).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn the_manager_is_notified_once_the_api_answers_and_at_the_end() {
    let host = Host::new();
    let manager = manager(&host);
    let mut daemon = Process::spawn(host.daemon().env("NOTIFY_SOCKET", host.path("notify")));
    let ready = next(&manager);
    // Without a wait: READY=1 promises an answer.
    let (code, status) = get(&host.socket(), "/v1/status");
    assert_eq!((code, status["pid"].as_u64()), (200, Some(daemon.pid().into())));
    assert_eq!(ready, ["READY=1", "STATUS=Networks are up, and the API is served"]);

    host.tidegate(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    assert!(daemon.stop(Signal::TERM, SOON).success(), "{}", daemon.output());
    assert_eq!(next(&manager)[0], "STOPPING=1");
    manager.set_nonblocking(true).unwrap();
    let end = manager.recv(&mut [0; 64]).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::WouldBlock, "no further notification");
}

/// `systemctl reload`: SIGUSR1, as `ExecReload=` sends it.
#[test]
fn a_reload_restores_what_is_missing_and_then_reports_ready() {
    let host = Host::new();
    let manager = manager(&host);
    let mut command = host.daemon();
    command.env("NOTIFY_SOCKET", host.path("notify")).env("TIDEGATE_LOG", "info");
    let mut daemon = Process::spawn(&mut command);
    assert_eq!(next(&manager)[0], "READY=1");
    host.tidegate(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    let bridges = || host.net.ip(&["-o", "link", "show", "type", "bridge"]);
    let listed = bridges();
    let name = listed.split(": ").nth(1).unwrap();
    // Without an address, the bridge stays, and the daemon is also notified of this.
    host.net.ip(&["addr", "flush", "dev", name, "scope", "global"]);
    daemon.signal(Signal::USR1);
    let reloading = next(&manager);
    assert_eq!(reloading[0], "RELOADING=1");
    let time: u64 = reloading[1].strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
    assert!(time > 0);
    assert_eq!(next(&manager)[0], "READY=1");
    assert!(host.net.ip(&["-o", "addr", "show", "dev", name]).contains("10.9.0.1/24"));
    daemon.wait_for_line("networks, endpoints and ports checked", SOON);
}

#[test]
fn a_daemon_that_cannot_start_is_never_ready() {
    let host = Host::new();
    let manager = manager(&host);
    std::fs::create_dir_all(host.path("state/state.redb")).unwrap();
    let error = refused(host.daemon().env("NOTIFY_SOCKET", host.path("notify")));
    assert!(error.contains("state.redb is not a regular file"), "{error}");
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut [0; 64]).is_err());
}

#[test]
fn a_daemon_without_its_manager_runs_and_logs_one_line() {
    let host = Host::new();
    let daemon = Process::spawn(host.daemon().env("NOTIFY_SOCKET", host.path("absent")));
    let line = daemon.wait_for_line("service manager not notified", SOON);
    assert!(line.contains("absent"), "{line}");
    daemon.wait_for_line("tidegate daemon is up", Duration::from_secs(10));
    assert_eq!(get(&host.socket(), "/v1/status").0, 200);
}
