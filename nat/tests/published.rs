//! Published ports through the device, with real kernels on both sides. The client runs where other
//! tests run the server.

mod common;

use common::{CONTAINER, GATEWAY, HOST, Net, Options, SERVER, at, netns};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_model::{Ingress, Protocol};
use tidegate_nat::{
    Capabilities, DropReason, FlowKind, Forward, ForwardSource, Guard, PublishError,
};
use tidegate_testbed::eventually;
use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};

const BULK_BYTES: u64 = if common::OLD_KERNEL { 20 << 20 } else { 200 << 20 };
const TIMEOUT: Duration = Duration::from_secs(60);

/// Address and port in the container, by family.
fn inside(family: usize, port: u16) -> SocketAddr {
    at(CONTAINER[family], port)
}

/// Publishes a free port on all addresses of a family, and returns the address for clients.
fn publish(
    net: &Net,
    protocol: Protocol,
    family: usize,
    guest: SocketAddr,
    source: ForwardSource,
) -> SocketAddr {
    let listen = at(["0.0.0.0", "::"][family], 0);
    let id = net.nat.publish(Forward { protocol, listen, guest, source }).unwrap();
    let open = net.nat.forwards().into_iter().find(|(open, _)| *open == id).unwrap().1;
    at(HOST[family], open.listen.port())
}

fn read_peer(net: &tidegate_testbed::Namespace, to: SocketAddr) -> String {
    net.run(|| {
        let mut seen = String::new();
        let mut stream = TcpStream::connect(to).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.read_to_string(&mut seen).unwrap();
        seen
    })
}

/// Transfers `bytes` to and from a server in the container, over both families, and verifies each
/// of them.
fn transfer_both_ways(net: &Net, bytes: u64) {
    for family in [0, 1] {
        let sink = Sink::tcp(&net.container, inside(family, 7001), 3);
        let to = publish(net, Protocol::Tcp, family, sink.addr(), ForwardSource::Client);
        let sent = net.server.run(|| {
            let mut stream = TcpStream::connect(to).unwrap();
            transfer::send(&mut stream, 3, bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            transfer::receive(&mut stream, 0)
        });
        assert_eq!(sent, Transfer::complete(0), "the container closes as well");
        assert_eq!(sink.wait(1, TIMEOUT), [Transfer::complete(bytes)]);

        let source = Source::tcp(&net.container, inside(family, 7002), 4, bytes);
        let to = publish(net, Protocol::Tcp, family, source.addr(), ForwardSource::Gateway);
        let received =
            net.server.run(|| transfer::receive(&mut TcpStream::connect(to).unwrap(), 4));
        assert_eq!(received, Transfer::complete(bytes));
    }
}

#[test]
fn two_hundred_megabytes_are_transferred_both_ways() {
    transfer_both_ways(&Net::new(), BULK_BYTES);
}

#[test]
fn it_works_without_optional_kernel_features() {
    let options = Options { capabilities: Capabilities::NONE, ..Options::default() };
    let net = Net::with(&options, |_| {});
    transfer_both_ways(&net, BULK_BYTES / 4);
    batches_arrive_in_order(&net);
}

#[test]
fn drops_at_the_device_lose_no_data() {
    transfer_both_ways(
        &Net::with(&Options { queue_length: 3, ..Options::default() }, |_| {}),
        BULK_BYTES / 8,
    );
}

#[test]
fn the_container_sees_the_client_or_the_gateway() {
    let net = Net::new();
    for family in [0, 1] {
        let peer = PeerServer::tcp(&net.container, inside(family, 80));
        let as_client = publish(&net, Protocol::Tcp, family, peer.addr(), ForwardSource::Client);
        let as_gateway = publish(&net, Protocol::Tcp, family, peer.addr(), ForwardSource::Gateway);
        assert!(read_peer(&net.server, as_client).contains(SERVER[family]));
        assert!(read_peer(&net.server, as_gateway).contains(GATEWAY[family]));
        // Addresses of the host, including loopback, are not shown.
        assert!(read_peer(&net.host, as_client).contains(GATEWAY[family]));
        let loopback = at(["127.0.0.1", "::1"][family], as_client.port());
        net.host.ip(&["link", "set", "lo", "up"]);
        assert!(read_peer(&net.host, loopback).contains(GATEWAY[family]));
    }
}

#[test]
fn datagrams_show_client_or_gateway_and_replies_use_the_destination_address() {
    let net = Net::new();
    net.host.ip_all("addr add 192.0.2.55/24 dev eth0\naddr add 2001:db8::55/64 dev eth0 nodad");
    for family in [0, 1] {
        let peer = PeerServer::udp(&net.container, inside(family, 53));
        let as_client = publish(&net, Protocol::Udp, family, peer.addr(), ForwardSource::Client);
        let as_gateway = publish(&net, Protocol::Udp, family, peer.addr(), ForwardSource::Gateway);
        for (to, seen) in [(as_client, SERVER[family]), (as_gateway, GATEWAY[family])] {
            let second = at(["192.0.2.55", "2001:db8::55"][family], to.port());
            for to in [to, second] {
                let socket = client(&net, to);
                socket.send(b"who am I?").unwrap();
                let mut buffer = [0; 100];
                let length = socket.recv(&mut buffer).unwrap();
                let reply = String::from_utf8_lossy(&buffer[..length]);
                assert!(reply.contains(seen), "{reply} at {to}");
            }
        }
    }
}

/// Creates a connected socket of the client.
fn client(net: &Net, to: SocketAddr) -> UdpSocket {
    net.server.run(|| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket.connect(to).unwrap();
        socket
    })
}

#[test]
fn datagrams_of_every_size_are_echoed() {
    let net = Net::new();
    for family in [0, 1] {
        let echo = EchoServer::udp(&net.container, inside(family, 7));
        let to = publish(&net, Protocol::Udp, family, echo.addr(), ForwardSource::Client);
        let socket = client(&net, to);
        for size in [1, 0, 1200, 1452, 1472, 1473, 9000, 65_000, 65_507 - 20 * family, 3] {
            let sent: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
            socket.send(&sent).unwrap();
            let mut buffer = vec![0; 70_000];
            let length = socket.recv(&mut buffer).unwrap_or_else(|error| {
                panic!("{size} bytes, family {family}: {error}\n{}", net.counters())
            });
            assert!(buffer[..length] == sent, "{size} bytes, family {family}");
        }
    }
    batches_arrive_in_order(&net);
}

/// Sends GSO batches in both directions. The receivers must see single datagrams, complete and in
/// order.
fn batches_arrive_in_order(net: &Net) {
    for family in [0, 1] {
        let near = net.container.run(|| UdpSocket::bind(inside(family, 9)).unwrap());
        let to = publish(net, Protocol::Udp, family, inside(family, 9), ForwardSource::Client);
        let far = client(net, to);
        for socket in [&far, &near] {
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket2::SockRef::from(socket).set_recv_buffer_size(4 << 20).unwrap();
        }
        far.send(b"hello").unwrap();
        let (_, from) = near.recv_from(&mut [0; 9]).unwrap();
        assert_eq!(from.ip(), SERVER[family].parse::<IpAddr>().unwrap());
        near.connect(from).unwrap();
        for (from, to) in [(&far, &near), (&near, &far)] {
            let size: libc::c_int = 1000;
            // SAFETY: pointer and length describe `size`.
            let set = unsafe {
                let option = (&raw const size).cast();
                libc::setsockopt(from.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, option, 4)
            };
            assert_eq!(set, 0);
            for batch in 0..10u8 {
                // The backlog of a CPU is shared with other processes of this machine, and may drop
                // a batch.
                let passed = (0..5).any(|_| common::batch_passes(from, to, batch));
                assert!(passed, "batch {batch}, family {family}: {}", net.counters());
            }
        }
    }
}

#[test]
fn a_closed_container_port_resets_the_client() {
    let net = Net::new();
    for family in [0, 1] {
        let to = publish(&net, Protocol::Tcp, family, inside(family, 9), ForwardSource::Client);
        let begun = Instant::now();
        let mut stream = net.server.run(|| TcpStream::connect(to).unwrap());
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    assert!(eventually(TIMEOUT, || net.nat.stats().flows(FlowKind::Tcp) == 0));
}

#[test]
fn half_closes_and_resets_are_forwarded() {
    let net = Net::new();
    for family in [0, 1] {
        let echo = EchoServer::tcp(&net.container, inside(family, 7));
        let to = publish(&net, Protocol::Tcp, family, echo.addr(), ForwardSource::Client);
        let answer = net.server.run(|| {
            let mut stream = TcpStream::connect(to).unwrap();
            stream.write_all(b"question").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        assert_eq!(answer, "question");
    }
    let listener = net.container.run(|| TcpListener::bind(inside(0, 80)).unwrap());
    let to = publish(&net, Protocol::Tcp, 0, inside(0, 80), ForwardSource::Client);
    let connect = || {
        let client = net.server.run(|| TcpStream::connect(to).unwrap());
        (client, listener.accept().unwrap().0)
    };
    let reset = |stream: TcpStream| {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    let (mut client, server) = connect();
    reset(server);
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (client, mut server) = connect();
    reset(client);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(eventually(TIMEOUT, || net.nat.stats().flows(FlowKind::Tcp) == 0), "no flow remains");
}

#[test]
fn ports_are_published_and_unpublished_and_conflicts_reported() {
    let net = Net::new();
    let echo = EchoServer::tcp(&net.container, inside(0, 7));
    let forward = Forward {
        protocol: Protocol::Tcp,
        listen: at("0.0.0.0", 8080),
        guest: echo.addr(),
        source: ForwardSource::Client,
    };
    let first = net.nat.publish(forward).unwrap();
    let error = net.nat.publish(forward).unwrap_err();
    assert_eq!(error.to_string(), "listen 0.0.0.0:8080/tcp: Address already in use (os error 98)");
    let mut connected = net.server.run(|| TcpStream::connect(at(HOST[0], 8080)).unwrap());
    connected.write_all(b"a").unwrap();
    connected.read_exact(&mut [0]).unwrap();
    assert_eq!(net.nat.forward_stats(first).unwrap().flows.get(), 1);
    assert!(net.nat.unpublish(first) && !net.nat.unpublish(first));
    assert_eq!(net.nat.forwards(), []);
    let refused = net.server.run(|| TcpStream::connect(at(HOST[0], 8080)).unwrap_err());
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    connected.write_all(b"b").unwrap();
    connected.read_exact(&mut [0]).unwrap();
    // The port is free immediately, and a socket bound by another process can be published.
    let bound = net.host.run(|| TcpListener::bind(at("0.0.0.0", 8080)).unwrap());
    let second = net.nat.publish_on(bound.into(), forward, None).unwrap();
    assert_ne!(first, second, "identifiers are not reused");
    assert_eq!(net.nat.forwards(), [(second, forward)]);
    let mut again = net.server.run(|| TcpStream::connect(at(HOST[0], 8080)).unwrap());
    again.write_all(b"c").unwrap();
    again.read_exact(&mut [0]).unwrap();
}

#[test]
fn invalid_forwards_are_rejected() {
    let net = Net::with(&Options::default(), |settings| settings.policy.gateways.truncate(1));
    let forward = |protocol, listen: &str, guest: &str, source| Forward {
        protocol,
        listen: listen.parse().unwrap(),
        guest: guest.parse().unwrap(),
        source,
    };
    for (forward, is_right) in [
        (
            forward(Protocol::Sctp, "0.0.0.0:0", "10.0.2.100:80", ForwardSource::Client),
            (|error| matches!(error, PublishError::Protocol(_))) as fn(&PublishError) -> bool,
        ),
        (forward(Protocol::Tcp, "0.0.0.0:0", "127.0.0.1:80", ForwardSource::Client), |error| {
            matches!(error, PublishError::Guest { .. })
        }),
        (forward(Protocol::Tcp, "0.0.0.0:0", "10.0.2.100:0", ForwardSource::Client), |error| {
            matches!(error, PublishError::Guest { .. })
        }),
        (forward(Protocol::Tcp, "[::]:0", "[fd00::100]:80", ForwardSource::Gateway), |error| {
            matches!(error, PublishError::NoGateway { .. })
        }),
        (
            forward(Protocol::Udp, "198.51.100.1:0", "10.0.2.100:80", ForwardSource::Client),
            |error| matches!(error, PublishError::Listen { .. }),
        ),
    ] {
        let error = net.nat.publish(forward).unwrap_err();
        assert!(is_right(&error), "{error}");
    }
    assert_eq!(net.nat.forwards(), []);
}

/// A guard that admits one client address.
struct Only(IpAddr);

impl Guard for Only {
    fn admits(&self, ingress: &Ingress) -> bool {
        assert_eq!(ingress.destination, Some(HOST[0].parse().unwrap()));
        // Neither `lo` nor unknown.
        assert!(ingress.interface > 1 && !ingress.to_group, "{ingress:?}");
        ingress.client.ip() == self.0
    }
}

#[test]
fn a_guard_controls_access() {
    let net = Net::new();
    net.server.ip(&["addr", "add", "192.0.2.3/24", "dev", "eth0"]);
    let guard: Arc<dyn Guard> = Arc::new(Only("192.0.2.3".parse().unwrap()));
    let tcp = EchoServer::tcp(&net.container, inside(0, 7));
    let udp = EchoServer::udp(&net.container, inside(0, 7));
    for (protocol, guest) in [(Protocol::Tcp, tcp.addr()), (Protocol::Udp, udp.addr())] {
        let forward =
            Forward { protocol, listen: at("0.0.0.0", 8080), guest, source: ForwardSource::Client };
        let socket: std::os::fd::OwnedFd = net.host.run(|| match protocol {
            Protocol::Udp => UdpSocket::bind(forward.listen).unwrap().into(),
            _ => TcpListener::bind(forward.listen).unwrap().into(),
        });
        net.nat.publish_on(socket, forward, Some(Arc::clone(&guard))).unwrap();
    }
    let tcp_answers = |from: &str| {
        net.server.run(|| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&at(from, 0).into()).unwrap();
            socket.connect(&at(HOST[0], 8080).into()).unwrap();
            let mut stream = TcpStream::from(socket);
            stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_ok()
        })
    };
    let udp_answers = |from: &str| {
        net.server.run(|| {
            let socket = UdpSocket::bind(at(from, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket.send_to(b"x", at(HOST[0], 8080)).unwrap();
            socket.recv(&mut [0; 9]).is_ok()
        })
    };
    assert!(tcp_answers("192.0.2.3") && !tcp_answers("192.0.2.2"));
    assert!(udp_answers("192.0.2.3") && !udp_answers("192.0.2.2"));
    assert_eq!(net.nat.stats().dropped(DropReason::Denied), 2);
}

#[test]
fn concurrent_clients_are_all_served() {
    let net = Net::new();
    let echo = EchoServer::tcp(&net.container, inside(0, 7));
    let to = publish(&net, Protocol::Tcp, 0, echo.addr(), ForwardSource::Client);
    common::echo_concurrently(&net.server, to);
    assert_eq!(echo.served(), 800);
}

#[test]
fn without_descriptors_clients_wait_until_some_are_free() {
    let net = Net::new();
    let few = Arc::new(tidegate_reactor::Descriptors::new(3));
    let tun = tidegate_nat::TunOptions {
        addresses: vec!["10.0.3.100/24".parse().unwrap()],
        ..tidegate_nat::TunOptions::new("tun1")
    };
    let tun = tidegate_nat::Tun::open(&netns(&net.container), &tun).unwrap();
    let nat =
        tidegate_nat::Nat::start(tidegate_nat::Settings::new(1500), tun, &netns(&net.host), few)
            .unwrap();
    net.container.ip(&["route", "add", "192.0.2.0/24", "dev", "tun1"]);
    let echo = EchoServer::tcp(&net.container, at("10.0.3.100", 7));
    let forward = Forward {
        protocol: Protocol::Tcp,
        listen: at("0.0.0.0", 8080),
        guest: echo.addr(),
        source: ForwardSource::Client,
    };
    nat.publish(forward).unwrap();
    let connect = || {
        let stream = net.server.run(|| TcpStream::connect(at(HOST[0], 8080)).unwrap());
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    };
    let speaks = |stream: &mut TcpStream| {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    };
    let mut two = [connect(), connect()];
    two.iter_mut().for_each(speaks);
    let mut third = connect();
    assert!(eventually(TIMEOUT, || nat.stats().dropped(DropReason::Descriptors) > 0));
    drop(two);
    speaks(&mut third);
}
