//! The restrictions of the unit leave the daemon what it needs.

use super::host::{Host, SOON, TIDEGATE, read};
use super::installed::values;
use std::fs;
use std::io::{self, Read};
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, require_program};

/// The daemon with a bounding set of `capabilities`, in the syntax of setpriv(1).
fn daemon(host: &Host, capabilities: &str) -> Process {
    require_program("setpriv");
    let mut command = host.command("setpriv");
    command.arg("--no-new-privs").arg(format!("--bounding-set=-all{capabilities}"));
    command.arg(TIDEGATE).args(host.arguments("state"));
    let daemon = Process::spawn(&mut command);
    daemon.wait_for_line("tidegate daemon is up", SOON);
    daemon
}

/// The capabilities of the unit, in the syntax of setpriv(1), without `except`.
fn capabilities(except: &str) -> String {
    let unit = read("packaging/systemd/tidegate.service");
    let sets = values(&unit, "CapabilityBoundingSet");
    let names = sets[0].split(' ').filter(|name| *name != except);
    names.map(|name| format!(",+{}", name["CAP_".len()..].to_lowercase())).collect()
}

/// A process of another user in a network namespace of its own.
fn container() -> (Namespace, Process) {
    let namespace = Namespace::new();
    let mut command = namespace.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig", "KILL"]);
    let process = Process::spawn(command.args(["sleep", "600"]));
    (namespace, process)
}

fn attach(host: &Host, process: &Process) -> Command {
    let mut command = host.command(TIDEGATE);
    command.args(["attach", "front", "--name", "web", "-p", "80:80", "--pid"]);
    command.arg(process.pid().to_string());
    command
}

#[test]
fn the_capabilities_of_the_unit_suffice() {
    let host = Host::new();
    let daemon = daemon(&host, &capabilities(""));
    let (namespace, process) = container();
    host.tidegate(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    let attached = attach(&host, &process).output().unwrap();
    assert!(attached.status.success(), "{}", String::from_utf8_lossy(&attached.stderr));
    let _server = PeerServer::tcp(&namespace, "0.0.0.0:80".parse().unwrap());
    let answer = host.net.run(|| {
        let mut client = TcpStream::connect("127.0.0.1:80").unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        answer
    });
    assert!(!answer.is_empty());
    // Neither guards nor rules are missing.
    assert_eq!(daemon.output().lines().count(), 1, "{}", daemon.output());
}

/// The reason for `CAP_SYS_PTRACE` in the unit.
#[test]
fn without_ptrace_containers_of_other_users_cannot_be_attached() {
    let host = Host::new();
    let _daemon = daemon(&host, &capabilities("CAP_SYS_PTRACE"));
    let (_namespace, process) = container();
    host.tidegate(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    let refused = attach(&host, &process).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", String::from_utf8_lossy(&refused.stdout));
}

/// A service would inherit the restrictions of the unit, and could not be set up.
#[test]
fn a_restricted_daemon_names_the_drop_in_for_projects() {
    let host = Host::new();
    let mut command = host.daemon();
    let filter = [libc::sock_filter {
        code: (libc::BPF_RET | libc::BPF_K) as u16,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_ALLOW,
    }];
    // SAFETY: the closure makes system calls only. The kernel copies the filter.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog { len: 1, filter: filter.as_ptr().cast_mut() };
            let mode = libc::SECCOMP_MODE_FILTER;
            let restricted = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) == 0;
            if restricted { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
    }
    let daemon = Process::spawn(&mut command);
    daemon.wait_for_line("tidegate daemon is up", SOON);
    let file = host.path("compose.yaml");
    fs::write(&file, "name: shop\nservices: { web: { command: sleep 60 } }\n").unwrap();
    let up = host.command(TIDEGATE).args(["up", "-d", "-f"]).arg(&file).output().unwrap();
    let error = String::from_utf8(up.stderr).unwrap();
    assert_eq!((up.status.code(), error.lines().count()), (Some(1), 1), "{error}");
    assert!(error.starts_with("tidegate: error: project shop: its services would"), "{error}");
    assert!(error.contains("the drop-in projects.conf"), "{error}");
    host.tidegate(&["network", "create", "front"]);
}
