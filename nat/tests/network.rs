//! Datagrams, echoes, policy and host services, with real kernels on both sides.

mod common;

use common::{CONTAINER, GATEWAY, HOST, Net, Options, SERVER, at, netns, server};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;
use tidegate_model::CidrSet;
use tidegate_nat::{Capabilities, DropReason, FlowKind, StartError, Tun, TunOptions};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, eventually, require_program};

/// Creates a connected socket in the container.
fn udp(net: &Net, to: SocketAddr) -> UdpSocket {
    net.container.run(|| {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        socket.connect(to).unwrap();
        socket
    })
}

fn answer(socket: &UdpSocket) -> Result<Vec<u8>, ErrorKind> {
    let mut buffer = vec![0; 70_000];
    let length = socket.recv(&mut buffer).map_err(|error| error.kind())?;
    buffer.truncate(length);
    Ok(buffer)
}

fn datagrams_of_every_size(net: &Net) {
    for family in [0, 1] {
        let echo = EchoServer::udp(&net.server, server(family, 7));
        let socket = udp(net, echo.addr());
        for size in [1, 0, 1200, 1452, 1472, 1473, 9000, 65_000, 65_507 - 20 * family, 3] {
            let sent: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
            socket.send(&sent).unwrap();
            assert_eq!(answer(&socket), Ok(sent), "{size} bytes, family {family}");
        }
    }
}

#[test]
fn datagrams_of_every_size_are_echoed() {
    datagrams_of_every_size(&Net::new());
}

#[test]
fn it_works_without_optional_kernel_features() {
    let options = Options { capabilities: Capabilities::NONE, ..Options::default() };
    let net = Net::with(&options, |_| {});
    assert_eq!(net.nat.capabilities(), Capabilities::NONE);
    datagrams_of_every_size(&net);
    batches_arrive_in_order(&net);
}

#[test]
fn it_works_without_uso_or_gso() {
    for capabilities in [
        Capabilities { udp_offload: false, ..Capabilities::ALL },
        Capabilities { udp_gso: false, ..Capabilities::ALL },
    ] {
        let net = Net::with(&Options { capabilities, ..Options::default() }, |_| {});
        datagrams_of_every_size(&net);
        batches_arrive_in_order(&net);
    }
}

/// Sends GSO batches in both directions. The receivers must see single datagrams, complete and in
/// order.
fn batches_arrive_in_order(net: &Net) {
    for family in [0, 1] {
        let far = net.server.run(|| UdpSocket::bind(server(family, 9)).unwrap());
        let near = udp(net, server(family, 9));
        for socket in [&far, &near] {
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            socket2::SockRef::from(socket).set_recv_buffer_size(4 << 20).unwrap();
        }
        let mut back = None;
        for _ in 0..5 {
            near.send(b"hello").unwrap();
            back = back.or(far.recv_from(&mut [0; 9]).ok());
        }
        let (_, back) = back.expect("a greeting");
        while far.recv(&mut [0; 9]).is_ok() {}
        far.connect(back).unwrap();
        for (from, to) in [(&near, &far), (&far, &near)] {
            segment_at(from, 1000);
            for batch in 0..20u8 {
                // The backlog of a CPU is shared with other processes of this machine, and may drop
                // a batch.
                let tries = (0..5)
                    .map(|_| common::batch_passes(from, to, batch))
                    .take_while(|passed| !passed)
                    .count();
                assert!(tries < 5, "batch {batch}, family {family}: {}", net.counters());
            }
        }
    }
}

fn segment_at(socket: &UdpSocket, size: libc::c_int) {
    // SAFETY: pointer and length describe `size`.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            4,
        )
    };
    assert_eq!(set, 0);
}

#[test]
fn gso_batches_arrive_complete_and_in_order() {
    batches_arrive_in_order(&Net::new());
}

#[test]
fn a_closed_port_is_reported_to_the_sender() {
    let net = Net::new();
    for family in [0, 1] {
        let socket = udp(&net, server(family, 9));
        socket.send(b"anybody?").unwrap();
        assert_eq!(answer(&socket), Err(ErrorKind::ConnectionRefused));
    }
}

#[test]
fn a_session_keeps_its_address_and_ends_when_idle() {
    let net = Net::with(&Options::default(), |settings| {
        settings.timeouts.udp_assured = Duration::from_millis(300);
    });
    let peer = PeerServer::udp(&net.server, server(0, 9));
    let socket = udp(&net, peer.addr());
    let seen = || {
        socket.send(b"who am I?").unwrap();
        String::from_utf8(answer(&socket).unwrap()).unwrap()
    };
    let (first, second) = (seen(), seen());
    assert_eq!(first, second);
    assert!(first.starts_with(HOST[0]));
    let flows = || net.nat.stats().flows(FlowKind::Udp);
    assert_eq!(flows(), 1);
    assert!(eventually(Duration::from_secs(3), || flows() == 0));
}

#[test]
fn flows_use_the_configured_source_address() {
    let net = Net::with(&Options::default(), |settings| {
        settings.outbound.v4 = Some("192.0.2.7".parse().unwrap());
        settings.outbound.v6 = Some("2001:db8::7".parse().unwrap());
    });
    net.host.ip_all("addr add 192.0.2.7/24 dev eth0\naddr add 2001:db8::7/64 dev eth0 nodad");
    for (family, expected) in [(0, "192.0.2.7:"), (1, "[2001:db8::7]:")] {
        let peer = PeerServer::udp(&net.server, server(family, 9));
        let socket = udp(&net, peer.addr());
        socket.send(b"who am I?").unwrap();
        let seen = String::from_utf8(answer(&socket).unwrap()).unwrap();
        assert!(seen.starts_with(expected), "{seen}");
        let peer = PeerServer::tcp(&net.server, server(family, 9));
        let mut seen = String::new();
        let mut stream = net.container.run(|| TcpStream::connect(peer.addr()).unwrap());
        stream.read_to_string(&mut seen).unwrap();
        assert!(seen.starts_with(expected), "{seen}");
    }
}

#[test]
fn with_endpoint_independent_mapping_all_peers_see_one_port_and_others_are_dropped() {
    let net = Net::with(&Options::default(), |settings| {
        settings.mapping = tidegate_nat::Mapping::EndpointIndependent;
    });
    net.server.ip_all("addr add 192.0.2.3/24 dev eth0\naddr add 2001:db8::3/64 dev eth0 nodad");
    for (family, other) in [(0, "192.0.2.3"), (1, "2001:db8::3")] {
        let far = [server(family, 9), server(family, 10), at(other, 9)];
        let far = far.map(|address| net.server.run(|| UdpSocket::bind(address).unwrap()));
        let near = net.container.run(|| UdpSocket::bind((CONTAINER[family], 0)).unwrap());
        for socket in far.iter().chain([&near]) {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        }
        let seen = far[..2].iter().map(|socket| {
            near.send_to(b"who am I?", socket.local_addr().unwrap()).unwrap();
            let seen = socket.recv_from(&mut [0; 20]).unwrap().1;
            socket.send_to(b"you", seen).unwrap();
            assert_eq!(near.recv_from(&mut [0; 20]).unwrap(), (3, socket.local_addr().unwrap()));
            seen
        });
        let seen: Vec<SocketAddr> = seen.collect();
        assert_eq!(seen[0], seen[1], "both peers see the same port");
        // The container has not sent to this address yet, so its datagram is dropped.
        far[2].send_to(b"hello", seen[0]).unwrap();
        near.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(near.recv_from(&mut [0; 20]).is_err());
        near.send_to(b"punch", far[2].local_addr().unwrap()).unwrap();
        assert_eq!(far[2].recv_from(&mut [0; 20]).unwrap().1, seen[0]);
        far[2].send_to(b"hello", seen[0]).unwrap();
        assert_eq!(near.recv_from(&mut [0; 20]).unwrap().0, 5);
        // A closed port is reported for the right peer.
        near.connect(server(family, 11)).unwrap();
        near.send(b"anybody?").unwrap();
        near.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        assert_eq!(near.recv(&mut [0; 20]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(net.nat.stats().flows(FlowKind::Udp), 2);
    assert_eq!(net.nat.stats().dropped(DropReason::Unsolicited), 2);
    datagrams_of_every_size(&net);
    batches_arrive_in_order(&net);
}

fn ping(net: &Net, arguments: &[&str]) -> String {
    require_program("ping");
    let output =
        net.container.command("ping").args(["-n", "-c", "1", "-W", "3"]).args(arguments).output();
    String::from_utf8_lossy(&output.unwrap().stdout).into_owned()
}

#[test]
fn pings_of_server_gateway_and_host_are_answered() {
    let net = Net::new();
    for ip in [SERVER, GATEWAY, HOST].concat() {
        for size in ["56", "1400", "5000"] {
            let output = ping(&net, &["-s", size, ip]);
            assert!(output.contains(" 0% packet loss"), "{ip}, {size}: {output}");
        }
    }
}

#[test]
fn expired_hop_limits_and_unreachable_hosts_are_reported() {
    let net = Net::new();
    for family in [0, 1] {
        let output = ping(&net, &["-t", "1", SERVER[family]]);
        assert!(
            output.contains("Time") && output.contains(&format!("From {}", GATEWAY[family])),
            "{output}"
        );
        let output = ping(&net, &["-t", "2", SERVER[family]]);
        assert!(output.contains(" 0% packet loss"), "one hop more: {output}");
    }
    let output = ping(&net, &["198.51.100.1"]);
    assert!(output.contains("Unreachable"), "{output}");
}

#[test]
fn a_smaller_path_mtu_is_reported_to_the_sender() {
    let net = Net::new();
    net.host.ip_all("route replace 192.0.2.2/32 dev eth0 mtu lock 1300");
    let output = ping(&net, &["-M", "do", "-s", "1400", SERVER[0]]);
    let reported = output.contains("mtu")
        || output.contains("Message too long")
        || output.contains("Frag needed");
    assert!(reported && output.contains("100% packet loss"), "{output}");
    // The container has learned the path MTU, and fragments the next datagram itself.
    let echo = EchoServer::udp(&net.server, server(0, 7));
    let socket = udp(&net, echo.addr());
    let sent = vec![5; 1400];
    let arrives = || {
        let _ = socket.send(&sent);
        answer(&socket) == Ok(sent.clone())
    };
    assert!(eventually(Duration::from_secs(10), arrives));
}

#[test]
fn rejected_destinations_are_reported() {
    let mut options = Options::default();
    options.policy.refused = CidrSet::parse(["192.0.2.2", "2001:db8::2"]).unwrap();
    let net = Net::with(&options, |_| {});
    let _listeners = [0, 1].map(|family| EchoServer::tcp(&net.server, server(family, 80)));
    for family in [0, 1] {
        let error = net.container.run(|| TcpStream::connect(server(family, 80)).unwrap_err());
        let kind = error.kind();
        assert!(
            matches!(kind, ErrorKind::HostUnreachable | ErrorKind::PermissionDenied),
            "{error}"
        );
        let socket = udp(&net, server(family, 80));
        let _ = socket.send(b"x");
        assert!(answer(&socket).is_err());
    }
    assert!(net.nat.stats().dropped(DropReason::Policy) >= 4);
    let mut policy = options.policy;
    policy.refused = CidrSet::default();
    net.nat.set_policy(policy);
    let connects = || net.container.run(|| TcpStream::connect(server(0, 80)).is_ok());
    assert!(eventually(Duration::from_secs(2), connects), "the policy can change at run time");
}

/// A container can open flows to an address before another program uses it for its containers.
#[test]
fn flows_to_destinations_that_a_new_policy_rejects_end() {
    let options = Options::default();
    let net = Net::with(&options, |_| {});
    for family in [0, 1] {
        let _echo = EchoServer::tcp(&net.server, server(family, 80));
        let _udp = EchoServer::udp(&net.server, server(family, 53));
        let mut stream = net.container.run(|| TcpStream::connect(server(family, 80))).unwrap();
        let socket = udp(&net, server(family, 53));
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        socket.send(b"x").unwrap();
        assert!(answer(&socket).is_ok());

        let mut policy = options.policy.clone();
        policy.refused = CidrSet::parse(["198.51.100.0/24"]).unwrap();
        net.nat.set_policy(policy.clone());
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();

        policy.refused = CidrSet::parse(["192.0.2.2", "2001:db8::2"]).unwrap();
        net.nat.set_policy(policy);
        let ended = || stream.write_all(b"x").and_then(|()| stream.read_exact(&mut [0])).is_err();
        assert!(eventually(Duration::from_secs(2), ended));
        let _ = socket.send(b"x");
        assert!(answer(&socket).is_err());
        net.nat.set_policy(options.policy.clone());
    }
}

#[test]
fn the_host_is_reachable_only_as_permitted() {
    let listen =
        |net: &Net, address: SocketAddr| net.host.run(|| TcpListener::bind(address).unwrap());
    let connects =
        |net: &Net, address: SocketAddr| net.container.run(|| TcpStream::connect(address).is_ok());
    for (refuse_host, host_loopback) in [(false, false), (true, false), (true, true)] {
        let mut options = Options::default();
        options.policy.refuse_host = refuse_host;
        options.policy.host_loopback = host_loopback;
        let net = Net::with(&options, |_| {});
        for (family, loopback) in [(0, "127.0.0.1"), (1, "::1")] {
            let _services =
                [listen(&net, at(loopback, 8080)), listen(&net, at(HOST[family], 8081))];
            assert_eq!(connects(&net, at(GATEWAY[family], 8080)), host_loopback);
            assert_eq!(connects(&net, at(HOST[family], 8081)), !refuse_host);
            assert!(
                !connects(&net, at(HOST[family], 8080)),
                "a service on loopback is not reachable"
            );
        }
        // A route from the container to loopback does not make loopback reachable.
        net.container.sysctl("net.ipv4.conf.all.route_localnet", "1");
        net.container.ip_all(
            "addr flush dev lo scope host\nroute flush table local proto kernel type local 127.0.0.0/8",
        );
        let _service = listen(&net, at("127.0.0.2", 8080));
        net.container.ip_all("route add 127.0.0.2/32 dev tun0 src 10.0.2.100");
        let error = net.container.run(|| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&at(CONTAINER[0], 0).into()).unwrap();
            socket.connect_timeout(&at("127.0.0.2", 8080).into(), Duration::from_secs(2)).err()
        });
        assert!(error.is_some());
    }
}

#[test]
fn the_gateway_answers_dns_over_udp_and_tcp() {
    let resolver = at("127.0.0.53", 53);
    let mut options = Options::default();
    options.policy.resolvers = vec![resolver];
    let net = Net::with(&options, |_| {});
    let _udp = EchoServer::udp(&net.host, resolver);
    let _tcp = EchoServer::tcp(&net.host, resolver);
    for gateway in GATEWAY {
        let socket = udp(&net, at(gateway, 53));
        socket.send(b"query").unwrap();
        assert_eq!(answer(&socket), Ok(b"query".to_vec()));
        net.container.run(|| {
            let mut stream = TcpStream::connect(at(gateway, 53)).unwrap();
            stream.write_all(b"query").unwrap();
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"query");
        });
        let refused = net.container.run(|| TcpStream::connect(at(gateway, 54)).unwrap_err());
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn device_errors_name_the_cause() {
    let namespace = Namespace::new();
    let open = |name: &str, mtu| {
        Tun::open(&netns(&namespace), &TunOptions { mtu, ..TunOptions::new(name) })
            .map(|_| ())
            .unwrap_err()
    };
    assert!(matches!(open("tun0", 1000), StartError::Mtu(1000)));
    for name in ["", "a name", "way/out", "much-too-long-a-name", "tun%d"] {
        assert!(matches!(open(name, 1500), StartError::Name(_)), "{name}");
    }
    namespace.ip(&["link", "add", "taken0", "type", "veth"]);
    namespace.ip(&["tuntap", "add", "dev", "taken1", "mode", "tun"]);
    for name in ["taken0", "taken1"] {
        let error = open(name, 1500).to_string();
        assert!(error.starts_with(&format!("TUN device {name:?}: ")), "{error}");
    }
}
