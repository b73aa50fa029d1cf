//! The table of `docs/source-address.md`, cell by cell.

use std::io::Read;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6, TcpStream};

use tidegate_testbed::Protocol::{self, Tcp, Udp};
use tidegate_testbed::{Namespace, addr};

use crate::ask::{Seen, ask, bind_datagrams, exchange};
use crate::scene::{Family, Mode, PORT_OFFSET, SERVED, SOON, Scene, Servers, WILDCARD};

/// Names of clients.
const OUTSIDE: &str = "an outside client";
const HOST: &str = "the host";

#[test]
fn with_a_namespace_tcp_shows_outside_clients_and_udp_the_gateway() {
    assert_table(Mode::Netns);
}

#[test]
fn with_a_namespace_proxy_shows_the_gateway() {
    assert_table(Mode::NetnsProxy);
}

#[test]
fn with_a_namespace_client_shows_outside_clients() {
    assert_table(Mode::NetnsClient);
}

#[test]
fn a_process_identifies_its_namespace() {
    assert_table(Mode::Pid);
    assert_table(Mode::PidClient);
}

#[test]
fn without_a_namespace_the_gateway_is_shown() {
    assert_table(Mode::To(Family::V4));
    assert_table(Mode::To(Family::V6));
}

#[test]
fn without_a_namespace_client_shows_outside_clients_of_an_ipv4_container() {
    assert_table(Mode::ToClient(Family::V4));
}

#[test]
fn without_a_namespace_client_shows_outside_clients_of_an_ipv6_container() {
    assert_table(Mode::ToClient(Family::V6));
}

#[test]
fn a_network_that_the_container_joins_later_counts_as_its_own() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let publisher = scene.publish_all(Mode::NetnsClient, &[]);
    for protocol in [Tcp, Udp] {
        let question =
            || ask(&scene.net.client, protocol, (addr::HOST_V4.into(), PORT_OFFSET + WILDCARD));
        assert_shown(question(), addr::CLIENT_V4.into(), true, "an outside client");
        scene.net.container.ip(&["addr", "add", "203.0.113.77/24", "dev", "eth0"]);
        assert_shown(question(), addr::GATEWAY_V4.into(), false, "a client on the network");
        scene.net.container.ip(&["addr", "del", "203.0.113.77/24", "dev", "eth0"]);
        assert_shown(question(), addr::CLIENT_V4.into(), true, "an outside client again");
    }
    publisher.terminate();
}

#[test]
fn a_client_on_the_link_is_shown_as_the_gateway() {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    for mode in [Mode::NetnsClient, Mode::ToClient(Family::V6)] {
        let publisher = scene.publish_all(mode, &[]);
        let (host, _) = link_local(&scene.net.host);
        let (_, scope) = link_local(&scene.net.client);
        let to = SocketAddrV6::new(host, PORT_OFFSET + WILDCARD, 0, scope);
        let mut text = String::new();
        let mut stream = scene.net.client.run(|| TcpStream::connect(to)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("[fd30::1]:"), "{mode:?}: TCP: {text}");
        drop(stream);
        let socket = bind_datagrams(&scene.net.client, (Family::V6.unspecified(), 0)).unwrap();
        socket.connect(to).unwrap();
        let text = exchange(&socket, b"who am I?").unwrap();
        assert!(text.starts_with(b"[fd30::1]:"), "{mode:?}: UDP: {}", text.escape_ascii());
        publisher.terminate();
    }
}

/// Sends requests from all clients to all servers.
#[track_caller]
fn assert_table(mode: Mode) {
    let scene = Scene::new();
    let _servers = Servers::start(&scene);
    let publisher = scene.publish_all(mode, &[]);
    let mut mismatched = 0;
    for (client, from, to) in paths(&scene) {
        let family = Family::of(to);
        let container = mode.towards(family);
        for protocol in [Tcp, Udp] {
            for port in SERVED {
                let case = format!("{mode:?}: {client} to {to}, {protocol:?} port {port}");
                let seen = ask(from, protocol, (to, PORT_OFFSET + port));
                assert!(!seen.peer.ip().is_loopback(), "{case}: {seen:?}");
                let shows = shows_clients(mode, protocol);
                if shows && client == OUTSIDE && container == family {
                    assert_shown(seen, family.client(), true, &case);
                } else {
                    assert_shown(seen, container.gateway(), false, &case);
                }
                // If the families differ, it cannot be detected that client and container share a
                // network.
                mismatched += u64::from(shows && container != family && client != HOST);
            }
        }
    }
    assert_eq!(publisher.fallbacks("family"), mismatched, "{mode:?}");
    assert_eq!(publisher.fallbacks("conflict"), 0, "{mode:?}");
    assert_eq!(publisher.fallbacks("rule"), 0, "{mode:?}");
    publisher.terminate();
}

/// The link-local address of `eth0`, and the index of the interface.
fn link_local(namespace: &Namespace) -> (Ipv6Addr, u32) {
    let table =
        namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6")).unwrap();
    let line = table.lines().find(|line| line.starts_with("fe80") && line.ends_with(" eth0"));
    let fields: Vec<&str> = line.expect("link-local address of eth0").split_whitespace().collect();
    let ip = u128::from_str_radix(fields[0], 16).unwrap();
    (Ipv6Addr::from_bits(ip), u32::from_str_radix(fields[1], 16).unwrap())
}

/// Clients and the host addresses that they connect to.
fn paths(scene: &Scene) -> Vec<(&'static str, &Namespace, IpAddr)> {
    let net = &scene.net;
    let each = |family: Family| {
        [
            (OUTSIDE, &net.client, family.host()),
            (OUTSIDE, &net.client, family.gateway()),
            (HOST, &net.host, family.loopback()),
            (HOST, &net.host, family.host()),
            (HOST, &net.host, family.gateway()),
            ("the neighbour", &scene.neighbour, family.host()),
            ("the neighbour", &scene.neighbour, family.gateway()),
            ("the container itself", &net.container, family.host()),
            ("the container itself", &net.container, family.gateway()),
        ]
    };
    Family::BOTH.into_iter().flat_map(each).collect()
}

/// Whether outside clients are shown with their own address.
fn shows_clients(mode: Mode, protocol: Protocol) -> bool {
    match mode {
        Mode::NetnsClient | Mode::PidClient | Mode::ToClient(_) => true,
        Mode::Netns | Mode::Pid => protocol == Tcp,
        Mode::NetnsProxy | Mode::To(_) => false,
    }
}

/// Checks the address, and with `with_port` the port of the client as well.
#[track_caller]
fn assert_shown(seen: Seen, expected: IpAddr, with_port: bool, case: &str) {
    assert_eq!(seen.peer.ip(), expected, "{case}: {seen:?}");
    assert!(!with_port || seen.peer.port() == seen.own.port(), "{case}: {seen:?}");
}
