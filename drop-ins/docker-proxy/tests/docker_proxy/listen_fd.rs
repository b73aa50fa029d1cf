//! `-use-listen-fd`: dockerd 28 and later bind the port themselves and pass the socket as
//! descriptor 4.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, fcntl_getfl};
use socket2::{Domain, Socket, Type};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Protocol, Signal, Topology, addr};

use crate::driver::{LOOPBACK, LOOPBACK_UDP, Launch, SOON, back, connect, echo, front, udp};

#[test]
fn an_inherited_tcp_socket_is_served_and_kept_by_the_daemon() {
    let host = Namespace::new();
    let server = EchoServer::tcp(&host, back());
    let socket = bound(&host, Type::STREAM, front());
    let kept = socket.try_clone().unwrap();
    let arguments = format!("{LOOPBACK} -use-listen-fd");
    let mut proxy = Launch::new(&host, &arguments).listen_on(socket).start().ready();
    echo(&mut connect(&host, front()), b"inherited");
    assert_eq!(server.served(), 1);
    assert!(
        fcntl_getfl(&kept).unwrap().contains(OFlags::NONBLOCK),
        "accepting must never block the loop"
    );
    assert_eq!(proxy.stop(Signal::INT, SOON).code(), Some(0));
    assert!(host.is_bound(Protocol::Tcp, 8080), "the copy of the daemon keeps the port open");

    // A second proxy continues to serve the port.
    let _proxy = Launch::new(&host, &arguments).listen_on(kept).start().ready();
    echo(&mut connect(&host, front()), b"again");
}

#[test]
fn an_inherited_udp_socket_answers_from_the_address_the_client_used() {
    let net = Topology::three();
    let server = EchoServer::udp(&net.container, (addr::CONTAINER_V4, 53).into());
    let second = SocketAddr::from(([203, 0, 113, 2], 5353));
    net.host.ip(&["addr", "add", "203.0.113.2/24", "dev", "eth0"]);
    let socket = bound(&net.host, Type::DGRAM, ([0; 4], 5353).into());
    let arguments = format!(
        "-proto udp -host-ip 0.0.0.0 -host-port 5353 -container-ip {} -container-port 53 -use-listen-fd",
        addr::CONTAINER_V4
    );
    let _proxy = Launch::new(&net.host, &arguments).listen_on(socket).start().ready();
    for to in [SocketAddr::from((addr::HOST_V4, 5353)), second] {
        // A connected socket receives only from this address.
        let client = udp(&net.client, to);
        client.send(b"question").unwrap();
        let mut answer = [0; 100];
        assert_eq!(client.recv(&mut answer).unwrap(), 8, "from {to}");
    }
    assert_eq!(server.served(), 2);
}

#[test]
fn an_inherited_ipv6_socket_forwards_to_an_ipv4_container() {
    let net = Topology::three();
    let _server = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let socket = bound(&net.host, Type::STREAM, ([0; 16], 8080).into());
    let arguments = format!(
        "-host-ip :: -host-port 8080 -container-ip {} -container-port 80 -use-listen-fd",
        addr::CONTAINER_V4
    );
    let _proxy = Launch::new(&net.host, &arguments).listen_on(socket).start().ready();
    echo(&mut connect(&net.client, (addr::HOST_V6, 8080)), b"from six to four");
}

#[test]
fn with_a_socket_the_host_address_and_port_are_informative() {
    let host = Namespace::new();
    let _server = EchoServer::tcp(&host, back());
    for informative in ["-host-ip 192.0.2.1 -host-port 1", ""] {
        let socket = bound(&host, Type::STREAM, front());
        let arguments =
            format!("{informative} -container-ip 127.0.0.1 -container-port 9000 -use-listen-fd");
        let _proxy = Launch::new(&host, &arguments).listen_on(socket).start().ready();
        echo(&mut connect(&host, front()), b"where the socket is");
    }
}

#[test]
fn without_the_flag_descriptor_4_is_ignored() {
    let host = Namespace::new();
    let _server = EchoServer::tcp(&host, back());
    let stray = host.run(|| TcpListener::bind("127.0.0.1:8081")).unwrap();
    let _proxy = Launch::new(&host, LOOPBACK).listen_on(stray).start().ready();
    echo(&mut connect(&host, front()), b"its own socket");
}

#[test]
fn an_unsuitable_socket_is_rejected() {
    let host = Namespace::new();
    let tcp = format!("{LOOPBACK} -use-listen-fd");
    let udp = format!("{LOOPBACK_UDP} -use-listen-fd");
    let prefix = "listening socket on descriptor 4";
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let datagrams: OwnedFd = bound(&host, Type::DGRAM, ([127, 0, 0, 1], 1).into()).into();
    let stream: OwnedFd = bound(&host, Type::STREAM, ([127, 0, 0, 1], 2).into()).into();
    let unbound: OwnedFd =
        host.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None)).unwrap().into();
    let cases = [
        (&tcp, datagrams, "it is not a tcp socket"),
        (&udp, stream, "it is not a udp socket"),
        (&tcp, not_listening(&host).into(), "it is not listening"),
        (&udp, unbound, "it has no IP address"),
        (&udp, unix_datagrams(), "it has no IP address"),
        (&tcp, file, "it is not a socket: "),
    ];
    for (arguments, socket, reason) in cases {
        let refusal = Launch::new(&host, arguments).listen_on(socket).start().refused();
        assert!(refusal.reason.starts_with(&format!("{prefix}: {reason}")), "{}", refusal.reason);
        assert_eq!(refusal.exit_code, Some(1));
    }
    for arguments in [tcp, udp] {
        let refusal = Launch::new(&host, &arguments).start().refused();
        assert_eq!(refusal.reason, format!("{prefix}: the descriptor is not open"));
        assert_eq!(refusal.exit_code, Some(1));
    }
}

#[test]
fn clients_in_the_backlog_are_served() {
    let host = Namespace::new();
    let _server = EchoServer::tcp(&host, back());
    let socket = bound(&host, Type::STREAM, front());
    // The kernel completes handshakes as soon as the daemon listens.
    let mut early = connect(&host, front());
    early.write_all(b"early").unwrap();
    let arguments = format!("{LOOPBACK} -use-listen-fd");
    let _proxy = Launch::new(&host, &arguments).listen_on(socket).start().ready();
    let mut answer = [0; 5];
    early.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"early");
}

/// A socket as dockerd creates it: a TCP socket listens, and a UDP socket reports destination
/// addresses.
fn bound(namespace: &Namespace, kind: Type, address: SocketAddr) -> Socket {
    let socket = namespace.run(|| Socket::new(Domain::for_address(address), kind, None)).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(true).unwrap();
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    if kind == Type::STREAM {
        socket.listen(4096).unwrap();
    }
    socket
}

fn not_listening(namespace: &Namespace) -> Socket {
    let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap();
    socket.bind(&front().into()).unwrap();
    socket
}

fn unix_datagrams() -> OwnedFd {
    std::os::unix::net::UnixDatagram::unbound().unwrap().into()
}
