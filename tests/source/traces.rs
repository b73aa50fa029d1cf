//! State in the namespaces, and its removal.

use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::server::EchoServer;

use crate::ask::{ask, echo, echo_datagram, open, open_datagrams};
use crate::scene::{Family, Mode, PORT_OFFSET, SERVED, Scene, Servers};

/// The protocol of all rules and routes of tidegate.
const PROTOCOL: &str = "proto 116";

#[test]
fn the_exit_restores_the_previous_state() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let _echo = echo_servers(&scene);
    let before = scene.state();
    for mode in Mode::ALL {
        let publisher = scene.publish_all(mode, &["--drain-timeout", "0"]);
        open_flows_to_all_servers(&scene);
        publisher.terminate();
        scene.assert_untouched(&before, &format!("{mode:?}"));

        // The traces of sessions and connections that are reset are removed as well.
        let publisher = scene.publish(mode, &["8090:90", "8090:90/udp"], &["--drain-timeout", "0"]);
        let host = mode.towards(Family::V4).host();
        let mut stream = open(&scene.net.client, (host, 8090));
        let socket = open_datagrams(&scene.net.client, (host, 8090));
        echo(&mut stream, "hello");
        echo_datagram(&socket, "hello");
        publisher.terminate();
        scene.assert_untouched(&before, &format!("{mode:?} with sessions"));
    }
}

#[test]
fn the_next_process_removes_the_state_of_a_killed_one() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let before = scene.state();
    for mode in Mode::STEERING {
        let publisher = scene.publish_all(mode, &[]);
        let idle = scene.state().to_string();
        open_flows_to_all_servers(&scene);
        publisher.kill();
        let left = scene.state().to_string();
        assert!(left.contains(PROTOCOL), "{mode:?}: a killed process cannot clean up:\n{left}");

        let publisher = scene.publish_all(mode, &[]);
        assert_eq!(
            scene.state().to_string(),
            idle,
            "{mode:?}: only the state of the second one remains"
        );
        open_flows_to_all_servers(&scene);
        publisher.terminate();
        scene.assert_untouched(&before, &format!("{mode:?}"));
    }
}

#[test]
fn a_start_without_own_rules_removes_the_state_of_a_killed_process() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let before = scene.state();
    let publisher = scene.publish_all(Mode::NetnsClient, &[]);
    open_flows_to_all_servers(&scene);
    publisher.kill();
    // UDP with the address of the gateway needs no rule.
    let publisher = scene.publish(Mode::NetnsProxy, &["8080:80/udp"], &[]);
    publisher.terminate();
    scene.assert_untouched(&before, "after a start in the same namespace");
}

#[test]
fn a_sysctl_that_was_already_set_stays_set() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    scene.net.container.sysctl("net.ipv4.tcp_fwmark_accept", "1");
    scene.net.container.sysctl("net.ipv6.fwmark_reflect", "1");
    let before = scene.state();
    let publisher = scene.publish_all(Mode::Netns, &[]);
    open_flows_to_all_servers(&scene);
    publisher.terminate();
    scene.assert_untouched(&before, "terminated");
    scene.publish_all(Mode::Netns, &[]).kill();
    scene.publish_all(Mode::Netns, &[]).terminate();
    scene.assert_untouched(&before, "killed, then cleaned up");
}

#[test]
fn only_documented_state_is_set() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let before = scene.state().to_string();
    for mode in Mode::ALL {
        let publisher = scene.publish_all(mode, &[]);
        open_flows_to_all_servers(&scene);
        let during = scene.state().to_string();
        let (ours, sysctls): (Vec<_>, Vec<_>) = during
            .lines()
            .filter(|line| !before.contains(line))
            .partition(|line| !line.contains(" = "));
        // With a namespace, the host is not changed; with an address, the container is not changed.
        let inside = matches!(
            mode,
            Mode::Netns | Mode::NetnsProxy | Mode::NetnsClient | Mode::Pid | Mode::PidClient
        );
        assert!(ours.iter().all(|line| line.contains(PROTOCOL)), "{mode:?}: {ours:#?}");
        let expected = if inside {
            vec![
                "container: net.ipv4.tcp_fwmark_accept = 1",
                "container: net.ipv4.fwmark_reflect = 1",
                "container: net.ipv6.fwmark_reflect = 1",
            ]
        } else {
            Vec::new()
        };
        assert_eq!(sysctls, expected, "{mode:?}");
        match mode {
            Mode::To(_) => assert!(ours.is_empty(), "{mode:?}: {ours:#?}"),
            _ => assert!(!ours.is_empty(), "{mode:?}"),
        }
        for line in &ours {
            let table = line.contains("table 297") || line.contains("lookup 297");
            assert!(table, "{mode:?}: {line}");
        }
        assert_eq!(publisher.output().lines().filter(|line| line.contains("WARN")).count(), 0);
        publisher.terminate();
    }
}

/// Opens one flow of each kind to every server.
#[track_caller]
fn open_flows_to_all_servers(scene: &Scene) {
    for family in Family::BOTH {
        for port in SERVED {
            for protocol in [Tcp, Udp] {
                ask(&scene.net.client, protocol, (family.host(), PORT_OFFSET + port));
                ask(&scene.net.host, protocol, (family.loopback(), PORT_OFFSET + port));
            }
        }
    }
}

fn echo_servers(scene: &Scene) -> [EchoServer; 2] {
    let any = (Family::V6.unspecified(), 90).into();
    [EchoServer::tcp(&scene.net.container, any), EchoServer::udp(&scene.net.container, any)]
}
