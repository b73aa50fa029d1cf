//! An API socket that the service manager passes (sd_listen_fds(3)).

use super::host::{Host, SOON, TIDEGATE, refused};
use crate::ask::get;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use tidegate_testbed::{Process, Signal, find_program};

/// `O_CLOEXEC` in `/proc/PID/fdinfo` (`include/uapi/asm-generic/fcntl.h`).
const CLOEXEC: u32 = 0o2_000_000;

#[test]
fn an_inherited_socket_serves_the_api_and_outlives_the_daemon() {
    let host = Host::new();
    let path = host.path("activated.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // This client is the reason why a service manager starts the daemon.
    let mut first = UnixStream::connect(&path).unwrap();
    first.set_read_timeout(Some(SOON)).unwrap();
    first.write_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();

    let mut command = host.activated(Some(listener.try_clone().unwrap().into()), "1", "state");
    let mut daemon = Process::spawn(&mut command);
    let mut answer = String::new();
    first.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (code, status) = get(&path, "/v1/status");
    assert_eq!((code, status["pid"].as_u64()), (200, Some(daemon.pid().into())));
    assert!(!host.socket().exists(), "no second socket");

    let info = fs::read_to_string(format!("/proc/{}/fdinfo/3", daemon.pid())).unwrap();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
    assert_ne!(u32::from_str_radix(flags, 8).unwrap() & CLOEXEC, 0, "{info}");

    assert!(daemon.stop(Signal::TERM, SOON).success(), "{}", daemon.output());
    assert!(path.exists(), "the socket belongs to the service manager");
    assert!(!host.path("activated.sock.lock").exists());
    // The next client waits in the backlog for the next daemon.
    let _second = UnixStream::connect(&path).unwrap();
    let _daemon = Process::spawn(&mut command);
    assert_eq!(get(&path, "/v1/status").0, 200);
}

#[test]
fn a_second_daemon_with_an_inherited_socket_is_refused() {
    let host = Host::new();
    let (first, second) = (host.path("first.sock"), host.path("second.sock"));
    let listener = UnixListener::bind(&first).unwrap();
    let daemon = Process::spawn(&mut host.activated(Some(listener.into()), "1", "state"));
    daemon.wait_for_line("tidegate daemon is up", SOON);

    let listener = UnixListener::bind(&second).unwrap();
    let inherited = || Some(listener.try_clone().unwrap().into());
    let error = refused(&mut host.activated(inherited(), "1", "state"));
    assert!(error.contains("state.redb is in use by another process"), "{error}");
    // The journal of the networks is in the run directory.
    let error = refused(&mut host.activated(inherited(), "1", "other"));
    let expected = format!("a daemon is running already (process {})", daemon.pid());
    assert!(error.contains(&expected), "{error}");

    // Without an inherited socket, at the path of the first.
    let error = refused(host.daemon().env("TIDEGATE_SOCKET", &first));
    let expected = format!("another process listens on {}; ", first.display());
    assert!(error.contains(&expected) && error.contains("systemctl start tidegate"), "{error}");
    assert_eq!(get(&first, "/v1/status").0, 200);
}

#[test]
fn other_descriptors_are_refused_with_the_remedy() {
    let host = Host::new();
    let (connected, _peer) = UnixStream::pair().unwrap();
    let datagram = UnixDatagram::bind(host.path("datagram")).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let cases: [(Option<OwnedFd>, &str); 5] = [
        (Some(File::open("/dev/null").unwrap().into()), "is not a socket"),
        (Some(tcp.into()), "is an internet socket"),
        (Some(datagram.into()), "is a Unix datagram socket"),
        (Some(connected.into()), "is a Unix socket that does not listen"),
        (None, "(LISTEN_FDS=1) is not open"),
    ];
    for (descriptor, found) in cases {
        let error = refused(&mut host.activated(descriptor, "1", "state"));
        let start = format!("tidegate: error: inherited descriptor 3 {found}");
        assert!(error.starts_with(&start), "{error}");
        assert!(error.contains("socket unit"), "the remedy: {error}");
    }
    for count in ["2", "one"] {
        let listener = UnixListener::bind(host.path(&format!("{count}.sock"))).unwrap();
        let error = refused(&mut host.activated(Some(listener.into()), count, "state"));
        let start = format!("tidegate: error: LISTEN_FDS=\"{count}\": expected 1, ");
        assert!(error.starts_with(&start) && error.contains("ListenStream="), "{error}");
    }
    assert!(!host.path("state").exists(), "nothing was created");
}

/// A shell that a service manager has started passes the variables on to its children.
#[test]
fn a_socket_for_another_process_is_not_used() {
    let host = Host::new();
    let path = host.path("activated.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = host.daemon();
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", std::process::id().to_string());
    tidegate_testbed::pass_fd(&mut command, listener.into(), 3);
    let daemon = Process::spawn(&mut command);
    daemon.wait_for_line("tidegate daemon is up", SOON);
    assert_eq!(get(&host.socket(), "/v1/status").1["pid"].as_u64(), Some(daemon.pid().into()));
}

/// iptables stands for any child of the daemon.
#[test]
fn children_inherit_no_variables_of_the_service_manager() {
    let host = Host::new();
    let (programs, log) = (host.path("programs"), host.path("environments"));
    fs::create_dir(&programs).unwrap();
    for family in ["iptables", "ip6tables"] {
        for end in ["", "-save", "-restore"] {
            let name = format!("{family}{end}");
            let program = find_program(&name).unwrap_or_else(|| panic!("{name} is not installed"));
            let script = format!(
                "#!/bin/sh\nenv >> '{}'\nexec '{}' \"$@\"\n",
                log.display(),
                program.display()
            );
            let wrapper = programs.join(name);
            fs::write(&wrapper, script).unwrap();
            fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    let manager = UnixDatagram::bind(host.path("notify")).unwrap();
    let listener = UnixListener::bind(host.path("activated.sock")).unwrap();
    let mut command = host.activated(Some(listener.into()), "1", "state");
    let path = std::env::var("PATH").unwrap_or_default();
    command.arg("--firewall=iptables");
    command.env("PATH", format!("{}:{path}:/usr/sbin:/sbin", programs.display()));
    command.env("NOTIFY_SOCKET", host.path("notify")).env("LISTEN_FDNAMES", "tidegate.socket");
    let daemon = Process::spawn(&mut command);
    daemon.wait_for_line("tidegate daemon is up", SOON);
    assert!(manager.recv(&mut [0; 64]).is_ok());
    let mut tidegate = host.command(TIDEGATE);
    tidegate.env("TIDEGATE_SOCKET", host.path("activated.sock"));
    let created = tidegate.args(["network", "create", "front"]).output().unwrap();
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let environments = fs::read_to_string(&log).unwrap();
    assert!(environments.contains("TIDEGATE_RUN_DIR="), "{environments}");
    for variable in ["LISTEN_", "NOTIFY_SOCKET"] {
        assert!(!environments.contains(variable), "{environments}");
    }
}
