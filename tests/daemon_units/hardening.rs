//! The restrictions of the unit leave the daemon what it needs.

use super::host::{Host, SOON, TIDEGATE, read};
use super::installed::values;
use std::io::Read;
use std::net::TcpStream;
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
