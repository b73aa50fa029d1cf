//! Forwarding from an outside client through the proxy on the host to the container.

use std::io::Read;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::thread;

use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Process, Topology, addr, eventually};

use crate::driver::{Launch, SOON, assert_reset, connect, echo, udp};

/// The host addresses on the side of the client.
const HOST: [IpAddr; 2] = [IpAddr::V4(addr::HOST_V4), IpAddr::V6(addr::HOST_V6)];

const CONTAINER: IpAddr = IpAddr::V4(addr::CONTAINER_V4);

#[test]
fn tcp_over_ipv4_and_ipv6_reaches_an_ipv4_container() {
    let net = Topology::three();
    let server = EchoServer::tcp(&net.container, (CONTAINER, 80).into());
    let _proxies = publish(&net, "tcp", CONTAINER);
    for host in HOST {
        let mut client = connect(&net.client, (host, 8080));
        echo(&mut client, b"there and back");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(
            client.read(&mut [0; 1]).unwrap(),
            0,
            "half-closes are forwarded in both directions"
        );
    }
    assert_eq!(server.served(), 2);
}

#[test]
fn tcp_over_ipv6_reaches_an_ipv6_container() {
    let net = Topology::three();
    let _server = EchoServer::tcp(&net.container, (addr::CONTAINER_V6, 80).into());
    let _proxies = publish(&net, "tcp", addr::CONTAINER_V6.into());
    for host in HOST {
        echo(&mut connect(&net.client, (host, 8080)), b"there and back");
    }
}

#[test]
fn the_container_sees_its_gateway_as_the_client() {
    let net = Topology::three();
    let _tcp = PeerServer::tcp(&net.container, (CONTAINER, 80).into());
    let _udp = PeerServer::udp(&net.container, (CONTAINER, 80).into());
    let _tcp_proxies = publish(&net, "tcp", CONTAINER);
    let _udp_proxies = publish(&net, "udp", CONTAINER);
    for host in HOST {
        let mut seen = String::new();
        connect(&net.client, (host, 8080)).read_to_string(&mut seen).unwrap();
        assert_eq!(seen.parse::<SocketAddr>().unwrap().ip(), addr::GATEWAY_V4);

        let client = udp(&net.client, (host, 8080));
        client.send(b"?").unwrap();
        let mut answer = [0; 100];
        let length = client.recv(&mut answer).unwrap();
        let seen = std::str::from_utf8(&answer[..length]).unwrap();
        assert_eq!(seen.parse::<SocketAddr>().unwrap().ip(), addr::GATEWAY_V4);
    }
}

#[test]
fn bulk_data_arrives_intact_in_both_directions() {
    const LENGTH: u64 = 32 << 20;
    let net = Topology::three();
    let source = Source::tcp(&net.container, (CONTAINER, 80).into(), 1, LENGTH);
    let sink = Sink::tcp(&net.container, (CONTAINER, 81).into(), 2);
    let down = launch(&net, "tcp", "0.0.0.0", 8080, source.addr());
    let up = launch(&net, "tcp", "::", 8081, sink.addr());
    let mut from_source = connect(&net.client, (addr::HOST_V4, 8080));
    let mut to_sink = connect(&net.client, (addr::HOST_V6, 8081));
    let sending = thread::spawn(move || transfer::send(&mut to_sink, 2, LENGTH));
    assert_eq!(transfer::receive(&mut from_source, 1), Transfer::complete(LENGTH));
    sending.join().unwrap().unwrap();
    assert_eq!(sink.wait(1, SOON), [Transfer::complete(LENGTH)]);
    drop((down, up));
}

#[test]
fn a_closed_backend_port_resets_and_works_once_it_is_open() {
    let net = Topology::three();
    let _proxies = publish(&net, "tcp", CONTAINER);
    assert_reset(&net.client, (addr::HOST_V4, 8080));
    assert_reset(&net.client, (addr::HOST_V6, 8080));
    let _server = EchoServer::tcp(&net.container, (CONTAINER, 80).into());
    echo(&mut connect(&net.client, (addr::HOST_V4, 8080)), b"now");
}

#[test]
fn udp_over_ipv4_and_ipv6_reaches_an_ipv4_container() {
    let net = Topology::three();
    let _server = EchoServer::udp(&net.container, (CONTAINER, 80).into());
    let _proxies = publish(&net, "udp", CONTAINER);
    for host in HOST {
        let client = udp(&net.client, (host, 8080));
        let mut answer = vec![0; 70_000];
        for length in [0, 1, 1452, 65_507] {
            client.send(&vec![7; length]).unwrap();
            assert_eq!(client.recv(&mut answer).unwrap(), length, "by {host}");
        }
    }
}

#[test]
fn a_closed_udp_backend_port_works_once_it_is_open() {
    let net = Topology::three();
    let _proxies = publish(&net, "udp", CONTAINER);
    let client = udp(&net.client, (addr::HOST_V4, 8080));
    for _ in 0..3 {
        client.send(b"anybody?").unwrap();
    }
    let server = EchoServer::udp(&net.container, (CONTAINER, 80).into());
    client.send(b"now?").unwrap();
    // Earlier datagrams may be answered too, if the proxy was slow.
    client.recv(&mut [0; 10]).unwrap();
    assert!(server.served() >= 1);
}

/// The pair of proxies that dockerd starts for `-p 8080:80`.
#[track_caller]
fn publish(net: &Topology, protocol: &str, container: IpAddr) -> [Process; 2] {
    ["0.0.0.0", "::"].map(|host| launch(net, protocol, host, 8080, (container, 80).into()))
}

#[track_caller]
fn launch(net: &Topology, protocol: &str, host: &str, port: u16, container: SocketAddr) -> Process {
    let arguments = format!(
        "-proto {protocol} -host-ip {host} -host-port {port} -container-ip {} -container-port {}",
        container.ip(),
        container.port()
    );
    Launch::new(&net.host, &arguments).start().ready()
}

/// dockerd starts two processes for every published port, and most of them stay idle.
#[test]
fn startup_pages_are_released_and_mapped_again_on_use() {
    let net = Topology::three();
    let _server = EchoServer::tcp(&net.container, (CONTAINER, 80).into());
    let proxies = publish(&net, "tcp", CONTAINER);
    for proxy in &proxies {
        // Debug builds are larger; without the release they hold more than twice as much.
        assert!(eventually(SOON, || proxy.rss() < 3 << 20), "idle: {} bytes", proxy.rss());
    }
    for host in HOST {
        let mut client = connect(&net.client, (host, 8080));
        echo(&mut client, b"there and back");
    }
}
