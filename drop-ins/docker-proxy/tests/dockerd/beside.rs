//! `tidegate up` on a host with a running dockerd and its iptables rules.

use super::{host, outside};
use crate::daemon::Daemon;
use crate::machine::{Machine, SOON};
use crate::place::Place;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;
use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::{Namespace, Process, Signal, addr};

const OURS: Ipv4Addr = Ipv4Addr::new(10, 79, 1, 10);

/// The iptables state of other software: chains, DROP policies and rules, in order within each
/// table.
fn rules_of_others(machine: &Machine) -> String {
    let saved =
        ["iptables-save", "ip6tables-save"].map(|program| machine.net.host.exec(program, &[]));
    let lines = saved.iter().flat_map(|text| text.lines());
    let lines = lines.map(|line| line.split(" [").next().unwrap_or_default());
    let is_relevant =
        |line: &&str| line.starts_with("-A") || line.ends_with(" -") || line.ends_with("DROP");
    let mut lines: Vec<&str> =
        lines.filter(is_relevant).filter(|line| !line.contains("TIDEGATE")).collect();
    // The order of tables varies; only the order within chains matters.
    lines.sort_by_key(|line| line.split(' ').nth(1).unwrap_or_default().to_owned());
    lines.join("\n")
}

/// A project of tidegate: a container with a server, published on 8090.
struct Project {
    container: Namespace,
    directory: tempfile::TempDir,
}

impl Project {
    fn new(machine: &Machine) -> (Self, Process) {
        let container = Namespace::new();
        let server =
            Process::spawn(container.command(&machine.server()).args(["tcp:80", "udp:80"]));
        server.wait_for_line("ready", SOON);
        (Self { container, directory: tempfile::tempdir().unwrap() }, server)
    }

    fn up(&self, machine: &Machine, flags: &[&str]) -> Process {
        let file = self.directory.path().join("compose.yaml");
        let text = format!(
            r#"
name: beside
networks: {{ home: {{ ipam: {{ config: [ {{ subnet: 10.79.1.0/24 }} ] }} }} }}
services:
  web: {{ x-netns: {}, networks: {{ home: {{ ipv4_address: {OURS} }} }}, ports: [ "8090:80", "8090:80/udp" ] }}
"#,
            self.container.path().display()
        );
        std::fs::write(&file, text).unwrap();
        let mut command = machine
            .net
            .host
            .command(tidegate_testbed::workspace_program("tidegate").to_str().unwrap());
        command.arg("up").arg("-f").arg(file).args(["--metrics", "none"]).args(flags);
        let up = Process::spawn(
            command
                .env("TIDEGATE_RUN_DIR", self.directory.path().join("run"))
                .env_remove("TIDEGATE_SOCKET"),
        );
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    }
}

#[track_caller]
fn is_unreachable(from: &Place, to: impl Into<SocketAddr>) {
    let to = to.into();
    let timeout = Duration::from_millis(300);
    assert!(from.run(|| TcpStream::connect_timeout(&to, timeout)).is_err(), "{from} reaches {to}");
}

#[test]
fn docker_and_tidegate_coexist() {
    // If Docker has enabled forwarding, it drops unknown traffic.
    for (forwarded_before, flags, chosen) in [
        ("0", &[][..], "firewall=iptables"),
        ("0", &["--publish=kernel"], "firewall=iptables"),
        ("1", &[], "firewall=nftables"),
    ] {
        let machine = Machine::new();
        machine.net.host.sysctl("net.ipv4.ip_forward", forwarded_before);
        let daemon = Daemon::start(&machine, &[]);
        let theirs = daemon.run(
            "server",
            &["-p", "8080:80", "-p", "8080:53/udp"],
            &["tcp:80", "udp:53", "tcp:81"],
        );
        let before = rules_of_others(&machine);
        let (host, outside) = (host(&machine), outside(&machine));
        let (project, _server) = Project::new(&machine);
        let ours = Place::open("ours", project.container.path());
        let mut up = project.up(&machine, flags);
        assert!(up.output().contains(chosen), "{}", up.output());
        assert_eq!(rules_of_others(&machine), before);

        let both_work = |daemon: &Daemon, theirs: &Place, address: std::net::IpAddr| {
            for protocol in [Tcp, Udp] {
                outside.asks(protocol, (addr::HOST_V4, 8080));
                outside.asks(protocol, (addr::HOST_V4, 8090));
                host.asks(protocol, (addr::HOST_V4, 8080));
                host.asks(protocol, (addr::HOST_V4, 8090));
                // Through published ports, each container reaches the other and itself.
                ours.asks(protocol, (addr::HOST_V4, 8080));
                ours.asks(protocol, (addr::HOST_V4, 8090));
                theirs.asks(protocol, (addr::HOST_V4, 8090));
            }
            // Not by other addresses.
            if forwarded_before == "0" {
                is_unreachable(&ours, (address, 81));
            }
            is_unreachable(theirs, (OURS, 80));
            is_unreachable(&outside, (OURS, 80));
            assert_eq!(daemon.inspect("server")["State"]["Running"], true);
        };
        both_work(&daemon, &theirs.place, theirs.address);

        // Replaces a container, and the daemon, which recreates its rules.
        daemon.remove(theirs);
        let theirs = daemon.run(
            "server",
            &["-p", "8080:80", "-p", "8080:53/udp"],
            &["tcp:80", "udp:53", "tcp:81"],
        );
        both_work(&daemon, &theirs.place, theirs.address);
        daemon.remove(theirs);
        daemon.end(Signal::TERM);
        let daemon = Daemon::start(&machine, &[]);
        let theirs = daemon.run(
            "again",
            &["-p", "8080:80", "-p", "8080:53/udp"],
            &["tcp:80", "udp:53", "tcp:81"],
        );
        outside.asks(Tcp, (addr::HOST_V4, 8080));
        outside.asks(Tcp, (addr::HOST_V4, 8090));
        is_unreachable(&theirs.place, (OURS, 80));

        let before = rules_of_others(&machine);
        up.stop(Signal::INT, SOON);
        assert_eq!(rules_of_others(&machine), before);
        assert!(!machine.net.host.exec("iptables-save", &[]).contains("TIDEGATE"));
        outside.asks(Tcp, (addr::HOST_V4, 8080));
        daemon.remove(theirs);
        daemon.end(Signal::TERM);
        machine.teardown();
    }
}
