//! What is set in the namespaces, and that it is gone afterwards.

use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::server::EchoServer;

use crate::ask::{ask, echo, echo_datagram, open, open_datagrams};
use crate::scene::{ABOVE, Family, Mode, SERVED, Scene, Servers};

/// What every rule and route of ours is marked with.
const PROTOCOL: &str = "proto 116";

#[test]
fn when_it_ends_everything_is_as_it_was() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let _echo = echo_servers(&scene);
    let before = scene.state();
    for mode in Mode::ALL {
        let publisher = scene.publish_all(mode, &["--drain-timeout", "0"]);
        talk_to_everyone(&scene);
        publisher.terminate();
        scene.assert_untouched(&before, &format!("{mode:?}"));

        // With sessions and connections that are cut.
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
fn what_a_killed_one_left_the_next_one_takes_away() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let before = scene.state();
    for mode in Mode::STEERING {
        let publisher = scene.publish_all(mode, &[]);
        let idle = scene.state().to_string();
        talk_to_everyone(&scene);
        publisher.kill();
        let left = scene.state().to_string();
        assert!(left.contains(PROTOCOL), "{mode:?}: a killed process cannot clean up:\n{left}");

        let publisher = scene.publish_all(mode, &[]);
        assert_eq!(
            scene.state().to_string(),
            idle,
            "{mode:?}: only what the second one needs is there"
        );
        talk_to_everyone(&scene);
        publisher.terminate();
        scene.assert_untouched(&before, &format!("{mode:?}"));
    }
}

#[test]
fn a_start_that_steers_nothing_itself_takes_away_what_a_killed_one_left() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let before = scene.state();
    let publisher = scene.publish_all(Mode::NetnsClient, &[]);
    talk_to_everyone(&scene);
    publisher.kill();
    // UDP shown as the gateway needs no rule.
    let publisher = scene.publish(Mode::NetnsProxy, &["8080:80/udp"], &[]);
    publisher.terminate();
    scene.assert_untouched(&before, "after a start in the same namespace");
}

#[test]
fn a_sysctl_that_was_set_before_stays_set() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    scene.net.container.sysctl("net.ipv4.tcp_fwmark_accept", "1");
    scene.net.container.sysctl("net.ipv6.fwmark_reflect", "1");
    let before = scene.state();
    let publisher = scene.publish_all(Mode::Netns, &[]);
    talk_to_everyone(&scene);
    publisher.terminate();
    scene.assert_untouched(&before, "terminated");
    scene.publish_all(Mode::Netns, &[]).kill();
    scene.publish_all(Mode::Netns, &[]).terminate();
    scene.assert_untouched(&before, "killed, and cleaned up after");
}

#[test]
fn nothing_is_set_beyond_what_the_page_says() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let before = scene.state().to_string();
    for mode in Mode::ALL {
        let publisher = scene.publish_all(mode, &[]);
        talk_to_everyone(&scene);
        let during = scene.state().to_string();
        let (ours, sysctls): (Vec<_>, Vec<_>) = during
            .lines()
            .filter(|line| !before.contains(line))
            .partition(|line| !line.contains(" = "));
        // Of the host nothing is touched for a namespace, and of the container nothing for an
        // address.
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

/// One flow of each kind to every server.
#[track_caller]
fn talk_to_everyone(scene: &Scene) {
    for family in Family::BOTH {
        for port in SERVED {
            for protocol in [Tcp, Udp] {
                ask(&scene.net.client, protocol, (family.host(), ABOVE + port));
                ask(&scene.net.host, protocol, (family.loopback(), ABOVE + port));
            }
        }
    }
}

fn echo_servers(scene: &Scene) -> [EchoServer; 2] {
    let any = (Family::V6.unspecified(), 90).into();
    [EchoServer::tcp(&scene.net.container, any), EchoServer::udp(&scene.net.container, any)]
}
