//! What flows carry: much, at once, apart from one another; and the end that they come to.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Namespace, eventually};

use crate::ask::{ask, connect, datagrams, echo, echo_datagram, open, open_datagrams};
use crate::scene::{ABOVE, Family, Mode, SERVED, SOON, Scene, Servers};

/// Where the container echoes, and how that is published.
const ECHO: u16 = 90;
const ECHO_SPECS: [&str; 2] = ["8090:90", "8090:90/udp"];

/// Where nobody listens.
const CLOSED: u16 = 99;

/// The port of both clients. Each mode has it anew: ending resets what is open.
const PORT: u16 = 40_123;

/// A second address for the client's namespace.
const OTHER_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
const OTHER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 10);

#[test]
fn a_big_transfer_takes_the_short_path_both_ways() {
    const LENGTH: u64 = 64 << 20;
    let scene = Scene::new();
    let _echo = echo_servers(&scene);
    let publisher = scene.publish(Mode::Netns, &ECHO_SPECS, &[]);
    for family in Family::BOTH {
        let stream = open(&scene.net.client, (family.host(), ABOVE + ECHO));
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
fn the_flows_of_two_clients_stay_apart() {
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
            let host = (family.host(), ABOVE + ECHO);
            // Their ports are the same.
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
fn a_closed_port_of_the_container_refuses_at_once() {
    /// Far below the kernel's second attempt at a lost SYN.
    const AT_ONCE: Duration = Duration::from_millis(700);
    let scene = Scene::new();
    for mode in Mode::ALL {
        let publisher = scene.publish(mode, &["8099:99"], &[]);
        for family in Family::BOTH {
            let ways: [(&Namespace, IpAddr); 4] = [
                (&scene.net.client, family.host()),
                (&scene.net.host, family.loopback()),
                (&scene.neighbour, family.gateway()),
                (&scene.net.container, family.gateway()),
            ];
            for (from, to) in ways {
                let refusal = || {
                    let begun = Instant::now();
                    let ending = connect(from, (family.unspecified(), 0), (to, ABOVE + CLOSED))
                        .and_then(|mut stream| io::copy(&mut stream, &mut io::sink()));
                    let error = ending.expect_err("nobody listens").kind();
                    assert_eq!(error, io::ErrorKind::ConnectionReset, "{mode:?}: {to}");
                    begun.elapsed()
                };
                // The first packet over a fresh bridge may get lost.
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
fn the_rule_for_a_udp_client_goes_with_its_last_session() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V4), Mode::ToClient(Family::V6)] {
        let publisher = scene.publish_all(mode, &["--udp-idle-timeout", "300ms"]);
        let steered =
            if mode == Mode::NetnsClient { &scene.net.container } else { &scene.net.host };
        for family in Family::BOTH.into_iter().filter(|family| mode.towards(*family) == *family) {
            for port in SERVED {
                let what = format!("{mode:?} {family:?} port {port}");
                let rules = || rules_about(steered, family.client(), port);
                assert!(eventually(SOON, || rules() == 0), "{what}: from before");
                ask(&scene.net.client, Udp, (family.host(), ABOVE + port));
                ask(&scene.net.client, Udp, (family.host(), ABOVE + port));
                // On a busy machine the sessions may be over already: then there is nothing to see
                // here.
                assert!(rules() <= 1, "{what}: one rule serves both sessions");
                assert!(eventually(SOON, || rules() == 0), "{what}: the rule is still there");
                // What it led to us goes its own way again.
                let seen = ask(&scene.net.client, Udp, (family.container(), port));
                assert_eq!(seen.peer, seen.own, "{what}");
                // And it comes back with the next session.
                let seen = ask(&scene.net.client, Udp, (family.host(), ABOVE + port));
                assert_eq!(seen.peer, seen.own, "{what}");
            }
        }
        publisher.terminate();
    }
}

#[test]
fn the_rule_for_a_udp_client_is_there_while_the_session_is() {
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
                    ask(&scene.net.client, Udp, (family.host(), ABOVE + port));
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
fn of_two_publishers_of_a_container_one_goes_on_when_the_other_ends() {
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
            let mut go_on = |what: &str| {
                echo(&mut stream, what);
                echo_datagram(&socket, what);
                let seen = ask(&scene.net.client, Tcp, (host, 9080));
                assert_eq!(seen.peer, seen.own, "{mode:?}: {what}");
                let seen = ask(&scene.net.client, Udp, (host, 9080));
                let shown = if mode == Mode::Netns { family.gateway() } else { family.client() };
                assert_eq!(seen.peer.ip(), shown, "{mode:?}: {what}");
            };
            go_on("both are there");
            for protocol in [Tcp, Udp] {
                ask(&scene.net.client, protocol, (host, 8080));
            }
            if killed {
                first.kill();
            } else {
                first.terminate();
            }
            go_on("the first one has ended");
            let third = scene.publish(mode, &["8080:80", "8080:80/udp"], &[]);
            go_on("there is a third one");
            third.terminate();
            go_on("the third one has ended");
            second.terminate();
            scene.assert_untouched(&before, &format!("{mode:?}, killed: {killed}"));
        }
    }
}

/// Sends a megabyte and expects it back, at the same time.
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

/// How many rules there are for what goes to `client` from `port`.
fn rules_about(namespace: &Namespace, client: IpAddr, port: u16) -> usize {
    let family = if client.is_ipv4() { "-4" } else { "-6" };
    let rules = namespace.ip(&[family, "rule"]);
    let wanted = [format!("to {client} "), format!("sport {port} ")];
    rules.lines().filter(|line| wanted.iter().all(|part| line.contains(part))).count()
}

/// Bytes that came in or went out by the container's interface so far.
fn eth0_bytes(namespace: &Namespace) -> u64 {
    let devices = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/dev")).unwrap();
    let line =
        devices.lines().find_map(|line| line.trim().strip_prefix("eth0:")).expect("there is eth0");
    let fields: Vec<u64> = line.split_whitespace().map(|field| field.parse().unwrap()).collect();
    // Eight columns about receiving, then those about sending.
    fields[0] + fields[8]
}
