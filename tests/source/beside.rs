//! Traffic to the container that does not pass the proxy, while its ports are published: it must
//! not be intercepted or lost.

use std::net::{IpAddr, TcpStream, UdpSocket};

use tidegate_testbed::Namespace;
use tidegate_testbed::Protocol::{Tcp, Udp};
use tidegate_testbed::server::{EchoServer, PeerServer};

use crate::ask::{ask, echo, echo_datagram, open, open_datagrams};
use crate::scene::{Family, Mode, PORT_OFFSET, SERVED, Scene, Servers};

/// The echo port of the container.
const ECHO: u16 = 90;

/// The port of servers on the neighbour, the host and the client.
const ELSEWHERE: u16 = 5000;

#[test]
fn neighbour_and_host_reach_the_container_directly_in_every_mode() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let any = (Family::V6.unspecified(), ECHO).into();
    let _echo =
        [EchoServer::tcp(&scene.net.container, any), EchoServer::udp(&scene.net.container, any)];
    let _elsewhere: Vec<_> = [&scene.net.client, &scene.net.host, &scene.neighbour]
        .into_iter()
        .flat_map(|namespace| {
            let any = (Family::V6.unspecified(), ELSEWHERE).into();
            [PeerServer::tcp(namespace, any), PeerServer::udp(namespace, any)]
        })
        .collect();
    let mut direct = EchoSessions::direct(&scene);
    direct.exchange("before anything is published");
    for mode in Mode::STEERING {
        assert_direct(&scene, &format!("{mode:?}: before"));
        let ports = "8080-8082:80-82";
        let echo = format!("{}:{ECHO}", PORT_OFFSET + ECHO);
        let publisher = scene.publish(
            mode,
            &[ports, &format!("{ports}/udp"), &echo, &format!("{echo}/udp")],
            &["--udp-idle-timeout", "300ms", "--drain-timeout", "0"],
        );
        direct.exchange("published");
        assert_direct(&scene, &format!("{mode:?}: published"));

        // These sessions use the same source ports and servers as the direct ones.
        let mut sessions = EchoSessions::through(&scene);
        sessions.exchange("a session");
        for port in SERVED {
            for protocol in [Tcp, Udp] {
                for family in Family::BOTH {
                    ask(&scene.net.client, protocol, (family.host(), PORT_OFFSET + port));
                }
            }
        }
        direct.exchange("with sessions");
        assert_direct(&scene, &format!("{mode:?}: with sessions"));
        sessions.exchange("the session continues");

        drop(sessions);
        direct.exchange("after the sessions");
        assert_direct(&scene, &format!("{mode:?}: after the sessions"));
        publisher.terminate();
        direct.exchange("no longer published");
        assert_direct(&scene, &format!("{mode:?}: no longer published"));
    }
}

#[test]
fn outside_clients_reach_the_container_directly_as_documented() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::Netns, Mode::NetnsProxy, Mode::NetnsClient] {
        let publisher = scene.publish_all(mode, &["--udp-idle-timeout", "300ms"]);
        for family in Family::BOTH {
            for port in SERVED {
                for protocol in [Tcp, Udp] {
                    let published =
                        || ask(&scene.net.client, protocol, (family.host(), PORT_OFFSET + port));
                    let direct = || {
                        let seen = ask(&scene.net.client, protocol, (family.container(), port));
                        assert_eq!(seen.peer, seen.own, "{mode:?}: {protocol:?} port {port}");
                    };
                    direct();
                    published();
                    // With a UDP session, this is served only after the session has ended.
                    direct();
                    published();
                }
            }
        }
        publisher.terminate();
    }
}

/// The neighbour and the host connect to each server of the container, and the container to theirs
/// and to that of the client.
#[track_caller]
fn assert_direct(scene: &Scene, when: &str) {
    let (host, neighbour) = (&scene.net.host, &scene.neighbour);
    for family in Family::BOTH {
        for protocol in [Tcp, Udp] {
            for (peer, from) in [("neighbour", neighbour), ("host", host)] {
                for port in SERVED {
                    let seen = ask(from, protocol, (family.container(), port));
                    assert_eq!(seen.peer, seen.own, "{when}: {peer}, {protocol:?} port {port}");
                }
            }
            let others = [
                ("neighbour", family.neighbour()),
                ("host", family.gateway()),
                ("client", family.client()),
            ];
            for (peer, address) in others {
                let seen = ask(&scene.net.container, protocol, (address, ELSEWHERE));
                assert_eq!(seen.peer, seen.own, "{when}: container to {peer}, {protocol:?}");
            }
        }
    }
}

/// Long-lived sessions with echo servers.
#[derive(Default)]
struct EchoSessions {
    streams: Vec<TcpStream>,
    sockets: Vec<UdpSocket>,
}

impl EchoSessions {
    /// From the neighbour and the host to the container itself.
    fn direct(scene: &Scene) -> Self {
        let mut sessions = Self::default();
        for family in Family::BOTH {
            for from in [&scene.neighbour, &scene.net.host] {
                sessions.add(from, (family.container(), ECHO));
            }
        }
        sessions
    }

    /// From an outside client, the host and the neighbour to the published port.
    fn through(scene: &Scene) -> Self {
        let mut sessions = Self::default();
        for family in Family::BOTH {
            for from in [&scene.net.client, &scene.neighbour, &scene.net.host] {
                sessions.add(from, (family.host(), PORT_OFFSET + ECHO));
            }
        }
        sessions
    }

    fn add(&mut self, from: &Namespace, to: (IpAddr, u16)) {
        self.streams.push(open(from, to));
        self.sockets.push(open_datagrams(from, to));
    }

    /// Exchanges `case` on each session.
    #[track_caller]
    fn exchange(&mut self, case: &str) {
        for stream in &mut self.streams {
            echo(stream, case);
        }
        for socket in &self.sockets {
            echo_datagram(socket, case);
        }
    }
}
