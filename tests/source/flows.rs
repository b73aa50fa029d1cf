//! Payload of flows: bulk transfers, concurrency and isolation; and how flows end.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Namespace, eventually};

use crate::ask::{ask, connect, datagrams, echo, echo_datagram, open, open_datagrams};
use crate::scene::{Family, Mode, PORT_OFFSET, SERVED, SOON, Scene, Servers};

/// The echo port of the container, and its published ports.
const ECHO: u16 = 90;
const ECHO_SPECS: [&str; 2] = ["8090:90", "8090:90/udp"];

/// A port without a listener.
const CLOSED: u16 = 99;

/// The port of both clients. It is new for each mode, because the exit resets open connections.
const PORT: u16 = 40_123;

/// A second address of the client namespace.
const OTHER_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const OTHER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 10);

#[test]
fn a_bulk_transfer_uses_the_short_path_in_both_directions() {
    const LENGTH: u64 = 64 << 20;
    let scene = Scene::new();
    let _echo = echo_servers(&scene);
    let publisher = scene.publish(Mode::Netns, &ECHO_SPECS, &[]);
    for family in Family::BOTH {
        let stream = open(&scene.net.client, (family.host(), PORT_OFFSET + ECHO));
        stream.set_read_timeout(Some(2 * SOON)).unwrap();
        let before = eth0_bytes(&scene.net.container);
        let sending = {
            let mut stream = stream.try_clone().unwrap();
            thread::spawn(move || {
                transfer::send(&mut stream, 5, LENGTH)?;
                stream.shutdown(Shutdown::Write)
            })
        };
        let received = transfer::receive(&mut &stream, 5);
        sending.join().unwrap().unwrap();
        assert_eq!(received, Transfer::complete(LENGTH), "{family:?}");
        let crossed = eth0_bytes(&scene.net.container) - before;
        assert!(crossed < LENGTH / 64, "{family:?}: {crossed} bytes crossed the container's eth0");
    }
    publisher.terminate();
}

#[test]
fn flows_of_two_clients_do_not_mix() {
    let scene = Scene::new();
    let client = &scene.net.client;
    client.ip_all(&format!(
        "addr add {OTHER_V4}/24 dev eth0\n addr add {OTHER_V6}/64 dev eth0 nodad"
    ));
    let _echo = echo_servers(&scene);
    for mode in Mode::STEERING {
        let publisher = scene.publish(mode, &ECHO_SPECS, &["--drain-timeout", "0"]);
        let mut streams = Vec::new();
        let mut sockets = Vec::new();
        for family in Family::BOTH {
            let host = (family.host(), PORT_OFFSET + ECHO);
            // Both clients use the same port.
            for client_address in [family.client(), family.pick(OTHER_V4, OTHER_V6)] {
                streams.push(connect(client, (client_address, PORT), host).unwrap());
                sockets.push(datagrams(client, (client_address, PORT), host).unwrap());
            }
        }
        for round in 0..20 {
            for (number, stream) in streams.iter_mut().enumerate() {
                echo(stream, &format!("stream {number}, round {round}"));
            }
            for (number, socket) in sockets.iter().enumerate() {
                echo_datagram(socket, &format!("socket {number}, round {round}"));
            }
        }
        thread::scope(|scope| {
            for (seed, stream) in streams.iter().enumerate() {
                scope.spawn(move || assert_echoes(stream, seed as u64));
            }
        });
        publisher.terminate();
    }
}

#[test]
fn a_closed_container_port_refuses_at_once() {
    /// Well below the retransmission timeout of a SYN.
    const AT_ONCE: Duration = Duration::from_millis(700);
    let scene = Scene::new();
    for mode in Mode::ALL {
        let publisher = scene.publish(mode, &["8099:99"], &[]);
        for family in Family::BOTH {
            let paths: [(&Namespace, IpAddr); 4] = [
                (&scene.net.client, family.host()),
                (&scene.net.host, family.loopback()),
                (&scene.neighbour, family.gateway()),
                (&scene.net.container, family.gateway()),
            ];
            for (from, to) in paths {
                let refusal = || {
                    let begun = Instant::now();
                    let ending =
                        connect(from, (family.unspecified(), 0), (to, PORT_OFFSET + CLOSED))
                            .and_then(|mut stream| io::copy(&mut stream, &mut io::sink()));
                    let error = ending.expect_err("no listener").kind();
                    assert_eq!(error, io::ErrorKind::ConnectionReset, "{mode:?}: {to}");
                    begun.elapsed()
                };
                // The first packet over a new bridge may be lost.
                let took = [refusal(), refusal()];
                assert!(
                    took.iter().any(|took| *took < AT_ONCE),
                    "{mode:?}: {to}: it took {took:?}"
                );
            }
        }
        publisher.terminate();
    }
}

#[test]
fn the_rule_of_a_udp_client_is_removed_with_its_last_session() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V4), Mode::ToClient(Family::V6)] {
        let publisher = scene.publish_all(mode, &["--udp-idle-timeout", "300ms"]);
        let steered =
            if mode == Mode::NetnsClient { &scene.net.container } else { &scene.net.host };
        for family in Family::BOTH.into_iter().filter(|family| mode.towards(*family) == *family) {
            for port in SERVED {
                let case = format!("{mode:?} {family:?} port {port}");
                let rules = || rules_about(steered, family.client(), port);
                assert!(eventually(SOON, || rules() == 0), "{case}: a stale rule");
                ask(&scene.net.client, Udp, (family.host(), PORT_OFFSET + port));
                ask(&scene.net.client, Udp, (family.host(), PORT_OFFSET + port));
                // On a busy machine the sessions may already have ended; then there is no rule.
                assert!(rules() <= 1, "{case}: one rule serves both sessions");
                assert!(eventually(SOON, || rules() == 0), "{case}: the rule was not removed");
                // Traffic that matched the rule is routed directly again.
                let seen = ask(&scene.net.client, Udp, (family.container(), port));
                assert_eq!(seen.peer, seen.own, "{case}");
                // The next session adds the rule again.
                let seen = ask(&scene.net.client, Udp, (family.host(), PORT_OFFSET + port));
                assert_eq!(seen.peer, seen.own, "{case}");
            }
        }
        publisher.terminate();
    }
}

#[test]
fn the_rule_of_a_udp_client_exists_during_its_session() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V4), Mode::ToClient(Family::V6)] {
        let publisher = scene.publish_all(mode, &[]);
        let steered =
            if mode == Mode::NetnsClient { &scene.net.container } else { &scene.net.host };
        for family in Family::BOTH.into_iter().filter(|family| mode.towards(*family) == *family) {
            for port in SERVED {
                assert_eq!(rules_about(steered, family.client(), port), 0, "{mode:?} {family:?}");
                for _ in 0..2 {
                    ask(&scene.net.client, Udp, (family.host(), PORT_OFFSET + port));
                    assert_eq!(
                        rules_about(steered, family.client(), port),
                        1,
                        "{mode:?} {family:?}"
                    );
                }
            }
        }
        publisher.terminate();
    }
}

#[test]
fn one_of_two_publishers_of_a_container_continues_when_the_other_ends() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let _echo = echo_servers(&scene);
    let before = scene.state();
    let modes =
        [Mode::Netns, Mode::NetnsClient, Mode::ToClient(Family::V4), Mode::ToClient(Family::V6)];
    for mode in modes {
        for killed in [false, true] {
            let first = scene.publish(mode, &["8080:80", "8080:80/udp"], &[]);
            let options = ["--drain-timeout", "0"];
            let second = scene.publish(
                mode,
                &["9080:80", "9080:80/udp", "9090:90", "9090:90/udp"],
                &options,
            );
            let family = mode.towards(Family::V4);
            let host = family.host();
            let mut stream = open(&scene.net.client, (host, 9090));
            let socket = open_datagrams(&scene.net.client, (host, 9090));
            let mut exchange = |case: &str| {
                echo(&mut stream, case);
                echo_datagram(&socket, case);
                let seen = ask(&scene.net.client, Tcp, (host, 9080));
                assert_eq!(seen.peer, seen.own, "{mode:?}: {case}");
                let seen = ask(&scene.net.client, Udp, (host, 9080));
                let shown = if mode == Mode::Netns { family.gateway() } else { family.client() };
                assert_eq!(seen.peer.ip(), shown, "{mode:?}: {case}");
            };
            exchange("both are running");
            for protocol in [Tcp, Udp] {
                ask(&scene.net.client, protocol, (host, 8080));
            }
            if killed {
                first.kill();
            } else {
                first.terminate();
            }
            exchange("the first one has ended");
            let third = scene.publish(mode, &["8080:80", "8080:80/udp"], &[]);
            exchange("a third one has started");
            third.terminate();
            exchange("the third one has ended");
            second.terminate();
            scene.assert_untouched(&before, &format!("{mode:?}, killed: {killed}"));
        }
    }
}

/// Sends a megabyte and receives its echo at the same time.
fn assert_echoes(stream: &TcpStream, seed: u64) {
    const LENGTH: u64 = 1 << 20;
    thread::scope(|scope| {
        scope.spawn(|| {
            transfer::send(&mut &*stream, seed, LENGTH).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        assert_eq!(transfer::receive(&mut &*stream, seed), Transfer::complete(LENGTH));
    });
}

fn echo_servers(scene: &Scene) -> [EchoServer; 2] {
    let any = (Family::V6.unspecified(), ECHO).into();
    [EchoServer::tcp(&scene.net.container, any), EchoServer::udp(&scene.net.container, any)]
}

/// The number of rules for packets from `port` to `client`.
fn rules_about(namespace: &Namespace, client: IpAddr, port: u16) -> usize {
    let family = if client.is_ipv4() { "-4" } else { "-6" };
    let rules = namespace.ip(&[family, "rule"]);
    let wanted = [format!("to {client} "), format!("sport {port} ")];
    rules.lines().filter(|line| wanted.iter().all(|part| line.contains(part))).count()
}

/// The bytes received and sent on the interface of the container.
fn eth0_bytes(namespace: &Namespace) -> u64 {
    let devices = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
    let line =
        devices.lines().find_map(|line| line.trim().strip_prefix("eth0:")).expect("eth0 exists");
    let fields: Vec<u64> = line.split_whitespace().map(|field| field.parse().unwrap()).collect();
    // Eight receive columns, then the transmit columns.
    fields[0] + fields[8]
}
