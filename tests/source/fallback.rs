//! Flows that cannot use the address of the client fall back to the gateway and are counted.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Instant;

use socket2::{Domain, Socket, Type};
use tidegate_testbed::Protocol::{self, Tcp, Udp};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, addr};

use crate::ask::{ask, bind_datagrams, connect, try_ask};
use crate::scene::{Family, Mode, PORT_OFFSET, SERVED, SOON, SPECIFIC, Scene, Servers, WILDCARD};

/// A fixed port of the client.
const PORT: u16 = 40_123;

#[test]
fn an_address_and_port_in_use_falls_back_to_the_gateway() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V4), Mode::ToClient(Family::V6)] {
        let publisher = scene.publish_all(mode, &[]);
        // The namespace of the socket that would use the address.
        let ours = if mode == Mode::NetnsClient { &scene.net.container } else { &scene.net.host };
        let mut conflicts = 0;
        for family in Family::BOTH.into_iter().filter(|family| mode.towards(*family) == *family) {
            for protocol in [Tcp, Udp] {
                let case = format!("{mode:?} {protocol:?} {family:?}");
                let client = (family.client(), PORT);
                let taken = occupy(ours, protocol, client);
                for port in SERVED {
                    // A new port each time: that of the first connection is in TIME_WAIT.
                    let host = (family.host(), PORT_OFFSET + port);
                    let seen = try_ask(&scene.net.client, protocol, client, host).expect(&case);
                    assert_eq!(seen.peer.ip(), family.gateway(), "{case}: {seen:?}");
                    conflicts += 1;
                    assert_eq!(publisher.fallbacks("conflict"), conflicts, "{case}");
                    // Other flows are not affected.
                    let seen = ask(&scene.net.client, protocol, host);
                    assert_eq!(seen.peer, seen.own, "{case}");
                }
                drop(taken);
            }
        }
        assert_eq!(publisher.fallbacks("conflict"), conflicts, "{mode:?}");
        publisher.terminate();
    }
}

#[test]
fn one_client_port_at_two_published_ports_is_two_connections() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V4)] {
        // Two host ports forward to the same container port.
        let publisher = scene.publish(mode, &["8080:80", "8081:81", "9080:80"], &[]);
        let peers = [8080, 8081, 9080].map(|port| {
            let stream = connect(&scene.net.client, own(), (addr::HOST_V4.into(), port)).unwrap();
            let mut text = String::new();
            (&stream).read_to_string(&mut text).unwrap();
            // Kept open as long as the others.
            (text.parse::<SocketAddr>().unwrap(), stream)
        });
        let [first, other, again] = peers.each_ref().map(|(peer, _)| *peer);
        assert_eq!([first, other], [own().into(); 2], "{mode:?}: two ports of the container");
        assert_eq!(again.ip(), IpAddr::from(addr::GATEWAY_V4), "{mode:?}: the first one once more");
        assert_eq!(publisher.fallbacks("conflict"), 1, "{mode:?}");
        drop(peers);
        publisher.terminate();
    }
}

#[test]
fn one_client_port_at_two_published_udp_ports_is_two_sessions() {
    let specs = ["8080:80/udp", "8081:81/udp", "9080:80/udp"];
    let host = IpAddr::from(addr::HOST_V4);
    assert_sessions(&specs, &[(host, 8080), (host, 8081), (host, 9080)]);
}

#[test]
fn one_client_port_at_two_addresses_of_a_udp_port_is_two_sessions() {
    assert_sessions(
        &["8080:80/udp"],
        &[(addr::HOST_V4.into(), 8080), (addr::GATEWAY_V4.into(), 8080)],
    );
}

#[test]
fn an_ipv6_client_of_an_ipv4_container_is_shown_as_the_gateway() {
    let scene = Scene::new();
    let container = &scene.net.container;
    container.ip_all(&format!("-6 addr del {}/64 dev eth0", addr::CONTAINER_V6));
    let _servers = servers(container, Family::V4);
    assert_mismatch(&scene, Family::V4);
}

#[test]
fn an_ipv4_client_of_an_ipv6_container_is_shown_as_the_gateway() {
    let scene = Scene::new();
    let container = &scene.net.container;
    container.ip_all(&format!("addr del {}/24 dev eth0", addr::CONTAINER_V4));
    let _servers = servers(container, Family::V6);
    assert_mismatch(&scene, Family::V6);
}

/// Sends to each of `targets` in turn from one socket, and expects each response from the address
/// it was sent to. Two of them forward to the same container port.
#[track_caller]
fn assert_sessions(specs: &[&str], targets: &[(IpAddr, u16)]) {
    let scene = Scene::new();
    let _servers = [SPECIFIC, WILDCARD]
        .map(|port| EchoServer::udp(&scene.net.container, (addr::CONTAINER_V4, port).into()));
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V4)] {
        let publisher = scene.publish(mode, specs, &[]);
        let socket = bind_datagrams(&scene.net.client, own()).unwrap();
        for (turn, target) in [targets, targets].concat().into_iter().enumerate() {
            let target = SocketAddr::from(target);
            let text = format!("turn {turn} to {target}");
            assert_eq!(
                reply_source(&socket, target, &text),
                target,
                "{mode:?}: {text}: the response came from another address"
            );
        }
        assert_eq!(publisher.fallbacks("conflict"), 1, "{mode:?}");
        publisher.terminate();
    }
}

/// Sends `text` to an echo server until it comes back, and returns the source of the response.
#[track_caller]
fn reply_source(socket: &UdpSocket, to: SocketAddr, text: &str) -> SocketAddr {
    let deadline = Instant::now() + SOON;
    let mut buffer = [0; 256];
    while Instant::now() < deadline {
        socket.send_to(text.as_bytes(), to).unwrap();
        // Late responses to earlier datagrams are skipped.
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if &buffer[..length] == text.as_bytes() {
                return from;
            }
        }
    }
    panic!("{text}: no response within {SOON:?}");
}

/// The address of the client with [`PORT`].
fn own() -> (IpAddr, u16) {
    (addr::CLIENT_V4.into(), PORT)
}

/// Checks a container with addresses of only `family`.
#[track_caller]
fn assert_mismatch(scene: &Scene, family: Family) {
    for mode in [Mode::Netns, Mode::NetnsProxy, Mode::NetnsClient] {
        let publisher = scene.publish(mode, &["8080-8081:80-81", "8080-8081:80-81/udp"], &[]);
        let mut mismatched = 0;
        for (protocol, shows) in [(Tcp, mode != Mode::NetnsProxy), (Udp, mode == Mode::NetnsClient)]
        {
            for port in [SPECIFIC, WILDCARD] {
                for from in Family::BOTH {
                    let case = format!("{mode:?} {protocol:?} from {from:?}, port {port}");
                    let seen = ask(&scene.net.client, protocol, (from.host(), PORT_OFFSET + port));
                    if from == family && shows {
                        assert_eq!(seen.peer, seen.own, "{case}");
                    } else {
                        assert_eq!(seen.peer.ip(), family.gateway(), "{case}");
                        mismatched += u64::from(shows);
                    }
                    // The host is never shown as itself, so this is not a fallback.
                    let seen =
                        ask(&scene.net.host, protocol, (from.loopback(), PORT_OFFSET + port));
                    assert_eq!(seen.peer.ip(), family.gateway(), "{case}: the host");
                }
            }
        }
        assert_eq!(publisher.fallbacks("family"), mismatched, "{mode:?}");
        assert_eq!(publisher.fallbacks("conflict"), 0, "{mode:?}");
        publisher.terminate();
    }
}

/// Servers on the only address of the container, and on the wildcard.
fn servers(container: &Namespace, family: Family) -> Vec<PeerServer> {
    let addresses = [(family.container(), SPECIFIC), (family.unspecified(), WILDCARD)];
    let each = |address: (IpAddr, u16)| {
        [PeerServer::tcp(container, address.into()), PeerServer::udp(container, address.into())]
    };
    addresses.into_iter().flat_map(each).collect()
}

/// Binds an address exclusively, even a foreign one.
fn occupy(namespace: &Namespace, protocol: Protocol, address: (IpAddr, u16)) -> Socket {
    let address = SocketAddr::from(address);
    let kind = if protocol == Tcp { Type::STREAM } else { Type::DGRAM };
    let occupied = namespace.run(|| {
        let socket = Socket::new(Domain::for_address(address), kind, None)?;
        if address.is_ipv4() {
            socket.set_freebind_v4(true)?;
        } else {
            socket.set_freebind_v6(true)?;
        }
        socket.bind(&address.into())?;
        Ok::<_, std::io::Error>(socket)
    });
    occupied.unwrap_or_else(|error| panic!("occupy {address}: {error}"))
}
