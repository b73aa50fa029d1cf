//! Who reaches what: one table, for every way to keep networks closed.

use super::scene::Scene;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Signal};

const SOON: Duration = Duration::from_secs(10);
/// How long an answer is waited for that is to come, and one that is not.
const PATIENCE: [Duration; 2] = [Duration::from_secs(3), Duration::from_millis(250)];

/// Where a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// Beyond the host.
    Outside,
    /// The host itself.
    Host,
    /// Another endpoint of the same network.
    Neighbour,
    /// An endpoint of another network.
    Stranger,
    /// An endpoint of an internal network.
    Inmate,
    /// The server's own endpoint.
    Itself,
}

/// What it asks.
#[derive(Clone, Copy, Debug)]
enum To {
    /// The container's address and port.
    Container,
    /// The published port at the host's address on the outside.
    Published,
    /// The published port at the gateway address of the server's network.
    Gateway,
    /// The published port on the host's loopback address; a client elsewhere asks its own.
    Loopback,
    /// Another port, published on the host's loopback address alone, at the host's address on the outside.
    LoopbackOnly,
}

const FROM: [From; 6] =
    [From::Outside, From::Host, From::Neighbour, From::Stranger, From::Inmate, From::Itself];

/// Rows in the order of [`FROM`].
const EXPECTED: [(To, [bool; 6]); 5] = [
    //                  outside  host   neighbour stranger inmate itself
    (To::Container, [false, true, true, false, false, true]),
    (To::Published, [true, true, true, true, false, true]),
    (To::Gateway, [false, true, true, false, false, true]),
    (To::Loopback, [false, true, false, false, false, false]),
    (To::LoopbackOnly, [false, false, false, false, false, false]),
];

const FILE: &str = r#"
name: matrix
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  away: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.2.0/24 }, { subnet: "fd77:2::/64" } ] } }
  inside: { internal: true, enable_ipv6: true, ipam: { config: [ { subnet: 10.77.3.0/24 }, { subnet: "fd77:3::/64" } ] } }
services:
  server:
    x-netns: SERVER
    networks: { home: { ipv4_address: 10.77.1.10, ipv6_address: "fd77:1::10" } }
    ports: [ "8080:80", "8080:80/udp", "127.0.0.1:9090:80", "127.0.0.1:9090:80/udp" ]
  neighbour: { x-netns: NEIGHBOUR, networks: [ home ] }
  stranger: { x-netns: STRANGER, networks: [ away ] }
  inmate: { x-netns: INMATE, networks: [ inside ] }
"#;

/// Whether a server that tells its client's address answers at `to`.
fn answers(from: &Namespace, to: SocketAddr, udp: bool, patience: Duration) -> bool {
    from.run(|| {
        let mut answer = [0; 100];
        if udp {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.set_read_timeout(Some(patience)).unwrap();
            return socket.connect(to).and_then(|()| socket.send(b"?")).is_ok()
                && socket.recv(&mut answer).is_ok_and(|length| length > 0);
        }
        let Ok(mut stream) = TcpStream::connect_timeout(&to, patience) else { return false };
        stream.set_read_timeout(Some(patience)).unwrap();
        let _ = stream.write_all(b"?");
        stream.read(&mut answer).is_ok_and(|length| length > 0)
    })
}

fn address(to: To, v6: bool) -> SocketAddr {
    let at = |v4: &str, six: &str, port| {
        SocketAddr::new((if v6 { six } else { v4 }).parse::<IpAddr>().unwrap(), port)
    };
    match to {
        To::Container => at("10.77.1.10", "fd77:1::10", 80),
        To::Published => at("203.0.113.1", "2001:db8:1::1", 8080),
        To::Gateway => at("10.77.1.1", "fd77:1::1", 8080),
        To::Loopback => at("127.0.0.1", "::1", 8080),
        To::LoopbackOnly => at("203.0.113.1", "2001:db8:1::1", 9090),
    }
}

/// Also where the host forwards for others, and the outside knows the way to every subnet.
#[test]
fn everyone_reaches_what_the_table_says_and_nothing_else() {
    for forwarding in [false, true] {
        let scene = Scene::new();
        let [server, neighbour, stranger, inmate] = [(); 4].map(|()| Namespace::new());
        let mut file = FILE.to_owned();
        for (name, namespace) in
            [("SERVER", &server), ("NEIGHBOUR", &neighbour), ("STRANGER", &stranger), ("INMATE", &inmate)]
        {
            file = file.replace(name, &namespace.path().display().to_string());
        }
        let on = if forwarding { "1" } else { "0" };
        scene.net.host.sysctl("net.ipv4.ip_forward", on);
        scene.net.host.sysctl("net.ipv6.conf.all.forwarding", on);
        scene.net.client.ip_all(
            "route add 10.77.0.0/16 via 203.0.113.1
             -6 route add fd77::/16 via 2001:db8:1::1",
        );
        let mut up = scene.up(&file);
        up.wait_for_line("Ctrl-C takes", SOON);
        let _servers = ["10.77.1.10:80", "[fd77:1::10]:80"].map(|at| {
            let at = at.parse().unwrap();
            (PeerServer::tcp(&server, at), PeerServer::udp(&server, at))
        });
        let clients = [&scene.net.client, &scene.net.host, &neighbour, &stranger, &inmate, &server];
        let mut wrong = Vec::new();
        for (to, row) in EXPECTED {
            for ((from, client), expected) in FROM.into_iter().zip(clients).zip(row) {
                for (udp, v6) in [(false, false), (false, true), (true, false), (true, true)] {
                    let reached = answers(client, address(to, v6), udp, PATIENCE[usize::from(!expected)]);
                    if reached != expected {
                        wrong.push(format!("{from:?} to {to:?}, udp {udp}, v6 {v6}: {reached}"));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "forwarding {forwarding}:\n{}", wrong.join("\n"));
        up.stop(Signal::INT, SOON);
    }
}
