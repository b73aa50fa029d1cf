//! Reply steering with each mechanism at the port of a real bridge: transparent sockets in an
//! ingress sandbox, and ordinary servers in the endpoint.

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;
use tidegate_model::MacAddress;
use tidegate_netfilter::{
    Mechanism, PortGuards, PortPolicy, ReplySteering, Sandboxes, SpoofReason, count_programs,
};
use tidegate_testbed::frames::{LinkSocket, Mac, ethernet, udp4};
use tidegate_testbed::{Namespace, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Time after which a reply does not come any longer.
const NEVER: Duration = Duration::from_millis(400);

const GATEWAY: Mac = [2, 0, 0, 0, 0, 1];
const SANDBOX: Mac = [2, 0, 0, 0, 0, 2];
const ENDPOINT: Mac = [2, 0, 0, 0, 0, 7];
const ENDPOINT_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 7);
const NEIGHBOR_V4: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 8);
const ENDPOINT_V6: Ipv6Addr = Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 7);
const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
/// An address behind the gateway.
const PEER_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const PEER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9);
/// Client and endpoint, by family.
const PAIRS: [(IpAddr, IpAddr); 2] = [
    (IpAddr::V4(CLIENT_V4), IpAddr::V4(ENDPOINT_V4)),
    (IpAddr::V6(CLIENT_V6), IpAddr::V6(ENDPOINT_V6)),
];

/// Mechanisms of the port guard and of the steering. The guard runs first with all of them.
const MECHANISMS: [(Mechanism, Mechanism); 4] = [
    (Mechanism::Clsact, Mechanism::Clsact),
    (Mechanism::Tcx, Mechanism::Tcx),
    (Mechanism::Tcx, Mechanism::Clsact),
    (Mechanism::Classic, Mechanism::Clsact),
];

/// The port of the servers in the endpoint, and a port without a server.
const SERVICE: u16 = 8_080;
const CLOSED: u16 = 8_081;

/// A bridge with the ports of an ingress sandbox, an endpoint and its gateway. The gateway has the
/// address of the client, too.
struct Bridge {
    host: Namespace,
    sandbox: Namespace,
    endpoint: Namespace,
    gateway: Namespace,
    guards: PortGuards,
    sandboxes: Sandboxes,
    steering: ReplySteering,
    index: u32,
}

impl Bridge {
    fn new((guard, mechanism): (Mechanism, Mechanism)) -> Self {
        let bridge = Self::bare((guard, mechanism));
        bridge.attach_guard();
        bridge.attach();
        bridge
    }

    /// A bridge without programs.
    fn bare((guard, mechanism): (Mechanism, Mechanism)) -> Self {
        let [host, sandbox, endpoint, gateway] = [(); 4].map(|()| Namespace::new());
        host.ip_all("link add br0 type bridge mcast_snooping 0\nlink set br0 up");
        let members = [
            ("veth-s", &sandbox, SANDBOX, 2),
            ("veth-k", &endpoint, ENDPOINT, 7),
            ("veth-g", &gateway, GATEWAY, 1),
        ];
        for (link, namespace, mac, number) in members {
            let path = namespace.path();
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            host.ip_all(&format!(
                "link add {link} type veth peer name eth0 address {mac} netns {}
                 link set {link} master br0
                 link set {link} up",
                path.display()
            ));
            host.sysctl(&format!("net.ipv6.conf.{link}.disable_ipv6"), "1");
            namespace.sysctl("net.ipv6.conf.eth0.accept_ra", "0");
            namespace.sysctl("net.ipv4.conf.all.rp_filter", "0");
            namespace.sysctl("net.ipv4.conf.eth0.rp_filter", "0");
            namespace.ip_all(&format!(
                "addr add 10.9.0.{number}/24 dev eth0
                 -6 addr add fd09::{number}/64 dev eth0 nodad
                 link set eth0 up"
            ));
        }
        sandbox.ip_all(
            "rule add iif eth0 lookup 100
             route add local default dev lo table 100
             -6 rule add iif eth0 lookup 100
             -6 route add local default dev lo table 100",
        );
        endpoint.ip_all("route add default via 10.9.0.1\n-6 route add default via fd09::1");
        for address in [IpAddr::V4(CLIENT_V4), PEER_V4.into(), CLIENT_V6.into(), PEER_V6.into()] {
            gateway.ip_all(&format!("addr add {address} dev lo"));
        }
        let listed = host.ip(&["-o", "link", "show", "veth-k"]);
        let index = listed.split(':').next().unwrap().parse().unwrap();
        let guards = Namespace::new().run(|| PortGuards::probe(&[guard], "test")).unwrap();
        let sandboxes = Sandboxes::new().unwrap();
        sandboxes.insert(MacAddress(SANDBOX)).unwrap();
        let steering = ReplySteering::with_mechanism(&sandboxes, mechanism).unwrap();
        let bridge = Self { host, sandbox, endpoint, gateway, guards, sandboxes, steering, index };
        for address in ["10.9.0.2", "fd09::2", "10.9.0.1", "fd09::1"] {
            assert!(eventually(SOON, || bridge.pings(address)), "{address}");
        }
        bridge
    }

    fn policy(v4: Vec<Ipv4Addr>) -> PortPolicy {
        PortPolicy {
            mac: MacAddress(ENDPOINT),
            bridge: MacAddress([2, 0, 0, 0, 0, 0xb]),
            v4,
            v6: vec![ENDPOINT_V6],
            any_address: false,
        }
    }

    fn attach_guard(&self) {
        let policy = Self::policy(vec![ENDPOINT_V4]);
        self.host.run(|| self.guards.attach(self.index, "veth-k", &policy)).unwrap();
    }

    fn attach(&self) {
        self.host.run(|| self.steering.attach(self.index)).unwrap();
    }

    fn is_attached(&self) -> bool {
        self.host.run(|| self.steering.is_attached(self.index)).unwrap()
    }

    fn programs(&self) -> usize {
        self.host.run(|| count_programs(self.index)).unwrap()
    }

    fn steered(&self) -> u64 {
        self.steering.steered().unwrap()
    }

    /// Whether the endpoint gets an answer from `address`.
    fn pings(&self, address: &str) -> bool {
        let mut ping = self.endpoint.command("ping");
        ping.args(["-c", "1", "-W", "1", address]).output().unwrap().status.success()
    }

    /// Starts servers at `address` in `namespace`: TCP returns what it receives, UDP as many bytes
    /// as the request says. They end with the test.
    fn serve(namespace: &Namespace, address: impl Into<IpAddr>) {
        let at = SocketAddr::from((address.into(), SERVICE));
        let (tcp, udp) =
            namespace.run(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
        thread::spawn(move || {
            for connection in tcp.incoming() {
                let mut connection = connection.unwrap();
                thread::spawn(move || {
                    let mut reader = connection.try_clone().unwrap();
                    io::copy(&mut reader, &mut connection)
                });
            }
        });
        thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                let length = u32::from_be_bytes(buffer[..4].try_into().unwrap());
                let _ = udp.send_to(&vec![7; length as usize], from);
            }
        });
    }

    /// A UDP socket of the sandbox with the address of the client.
    fn udp(&self, (client, endpoint): (IpAddr, IpAddr), ports: (u16, u16)) -> UdpSocket {
        let addresses = ((client, ports.0).into(), (endpoint, ports.1).into());
        let connected = self.sandbox.run(|| transparent(SocketType::DGRAM, addresses)).unwrap();
        UdpSocket::from(connected)
    }

    /// A TCP connection likewise.
    fn tcp(&self, (client, endpoint): (IpAddr, IpAddr), port: u16) -> io::Result<TcpStream> {
        let addresses = ((client, port).into(), (endpoint, SERVICE).into());
        self.sandbox.run(|| transparent(SocketType::STREAM, addresses)).map(TcpStream::from)
    }
}

/// A connected socket with a source address of another host.
fn transparent(
    kind: SocketType,
    (source, destination): (SocketAddr, SocketAddr),
) -> io::Result<OwnedFd> {
    let (family, level, option) = match source {
        SocketAddr::V4(_) => (AddressFamily::INET, libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        SocketAddr::V6(_) => (AddressFamily::INET6, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    let on = 1_i32;
    // SAFETY: `on` is valid for the length passed.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(2 * NEVER))?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(2 * NEVER))?;
    bind(&socket, &source)?;
    connect(&socket, &destination)?;
    Ok(socket)
}

/// Requests `length` bytes over UDP, in a request of `sent` bytes. Returns the length of the reply.
fn request(socket: &UdpSocket, sent: usize, length: u32) -> io::Result<usize> {
    let mut request = length.to_be_bytes().to_vec();
    request.resize(sent, 0);
    socket.send(&request)?;
    socket.recv(&mut vec![0; 65_536])
}

/// Sends and receives `length` bytes.
fn echo(connection: &TcpStream, length: usize) -> io::Result<()> {
    let (mut reader, mut writer) = (connection.try_clone()?, connection.try_clone()?);
    let sent: Vec<u8> = (0..length).map(|number| number as u8).collect();
    let mut received = vec![0; length];
    thread::scope(|scope| {
        let writing = scope.spawn(|| writer.write_all(&sent));
        reader.read_exact(&mut received)?;
        writing.join().unwrap()
    })?;
    assert!(sent == received);
    Ok(())
}

/// Whether `frame` is an IPv4 or IPv6 packet to the client.
fn is_to_client(frame: &[u8]) -> bool {
    match frame[12..14] {
        [8, 0] => frame[30..34] == CLIENT_V4.octets(),
        [0x86, 0xdd] => frame[38..54] == CLIENT_V6.octets(),
        _ => false,
    }
}

#[test]
fn replies_reach_the_transparent_sockets_of_the_sandbox() {
    for mechanisms in MECHANISMS {
        let bridge = Bridge::new(mechanisms);
        Bridge::serve(&bridge.endpoint, Ipv6Addr::UNSPECIFIED);
        let gateway = LinkSocket::open(&bridge.gateway, "eth0");
        for pair in PAIRS {
            let connection = bridge.tcp(pair, 40_000).unwrap();
            echo(&connection, 4 << 20).unwrap();
            let steered = bridge.steered();
            assert!(steered > 0, "{mechanisms:?}");
            let socket = bridge.udp(pair, (40_000, SERVICE));
            assert_eq!(request(&socket, 4, 1_000).unwrap(), 1_000, "{mechanisms:?}");
            assert_eq!(bridge.steered(), steered + 1);
            // In fragments: replies, then requests.
            for number in 1..=20 {
                assert_eq!(request(&socket, 4, 9_000).unwrap(), 9_000, "{mechanisms:?}");
                assert_eq!(bridge.steered(), steered + 1 + 7 * number);
            }
            let socket = bridge.udp(pair, (40_001, SERVICE));
            assert_eq!(request(&socket, 9_000, 60_000).unwrap(), 60_000, "{mechanisms:?}");
            // Port unreachable.
            let steered = bridge.steered();
            let socket = bridge.udp(pair, (40_002, CLOSED));
            socket.send(&[0; 4]).unwrap();
            let refused = socket.recv(&mut [0; 4]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{mechanisms:?}");
            assert_eq!(bridge.steered(), steered + 1);
        }
        let diverted = gateway.received().into_iter().filter(|frame| is_to_client(frame)).count();
        assert_eq!(diverted, 0, "{mechanisms:?}: frames to the client at the gateway");
        let dropped = bridge.host.run(|| bridge.guards.dropped());
        assert_eq!(dropped["veth-k"].spoofed.iter().sum::<u64>(), 0, "{mechanisms:?}");
    }
}

#[test]
fn connections_of_the_endpoint_use_its_gateway() {
    for mechanisms in MECHANISMS {
        let bridge = Bridge::new(mechanisms);
        Bridge::serve(&bridge.endpoint, Ipv6Addr::UNSPECIFIED);
        // Flows of the client.
        let sockets = PAIRS.map(|pair| bridge.udp(pair, (SERVICE, SERVICE)));
        for socket in &sockets {
            assert_eq!(request(socket, 4, 9_000).unwrap(), 9_000);
        }
        let steered = bridge.steered();
        let peers: [IpAddr; 4] =
            [PEER_V4.into(), PEER_V6.into(), CLIENT_V4.into(), CLIENT_V6.into()];
        for peer in peers {
            assert!(bridge.pings(&peer.to_string()), "{mechanisms:?}: {peer}");
            Bridge::serve(&bridge.gateway, peer);
            let any = match peer {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            let (connection, socket) = bridge.endpoint.run(|| {
                let connection = TcpStream::connect((peer, SERVICE)).unwrap();
                let socket = UdpSocket::bind((any, 0)).unwrap();
                socket.connect((peer, SERVICE)).unwrap();
                (connection, socket)
            });
            echo(&connection, 1 << 20).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            assert_eq!(request(&socket, 9_000, 9_000).unwrap(), 9_000, "{mechanisms:?}: {peer}");
        }
        assert_eq!(bridge.steered(), steered, "{mechanisms:?}");
        for socket in &sockets {
            assert_eq!(request(socket, 4, 9_000).unwrap(), 9_000, "{mechanisms:?}");
        }
    }
}

#[test]
fn only_known_sandboxes_receive_replies() {
    for mechanisms in MECHANISMS {
        let bridge = Bridge::new(mechanisms);
        Bridge::serve(&bridge.endpoint, Ipv6Addr::UNSPECIFIED);
        bridge.sandboxes.remove(MacAddress(SANDBOX)).unwrap();
        for pair in PAIRS {
            bridge.tcp(pair, 40_000).unwrap_err();
            let socket = bridge.udp(pair, (40_000, SERVICE));
            request(&socket, 4, 4).unwrap_err();
        }
        assert_eq!(bridge.steered(), 0, "{mechanisms:?}");
        bridge.sandboxes.insert(MacAddress(SANDBOX)).unwrap();
        for pair in PAIRS {
            let connection = bridge.tcp(pair, 40_001).unwrap();
            echo(&connection, 1_000).unwrap();
            let socket = bridge.udp(pair, (40_001, SERVICE));
            assert_eq!(request(&socket, 4, 4).unwrap(), 4);
            bridge.sandboxes.remove(MacAddress(SANDBOX)).unwrap();
            let steered = bridge.steered();
            request(&socket, 4, 4).unwrap_err();
            assert_eq!(bridge.steered(), steered, "{mechanisms:?}: flows of a sandbox that left");
            bridge.sandboxes.insert(MacAddress(SANDBOX)).unwrap();
            assert_eq!(request(&socket, 4, 4).unwrap(), 4, "{mechanisms:?}: it returned");
        }
    }
}

#[test]
fn members_cannot_add_flows() {
    for mechanisms in MECHANISMS {
        let bridge = Bridge::new(mechanisms);
        Bridge::serve(&bridge.endpoint, Ipv6Addr::UNSPECIFIED);
        let member = LinkSocket::open(&bridge.gateway, "eth0");
        let sandbox = LinkSocket::open(&bridge.sandbox, "eth0");
        let datagram = |mac, port| {
            let request = 4_u32.to_be_bytes();
            let packet = udp4((CLIENT_V4, port), (ENDPOINT_V4, SERVICE), &request);
            ethernet(ENDPOINT, mac, 0x0800, &packet)
        };
        let replies = |socket: &LinkSocket| {
            thread::sleep(NEVER / 4);
            socket.received().into_iter().filter(|frame| is_to_client(frame)).count()
        };
        member.send(&datagram(GATEWAY, 40_000));
        assert_eq!((replies(&member), replies(&sandbox)), (1, 0), "{mechanisms:?}");
        assert_eq!(bridge.steered(), 0, "{mechanisms:?}");
        // Nor with the address of the sandbox, if its port has a guard.
        let policy = PortPolicy {
            mac: MacAddress(GATEWAY),
            any_address: true,
            ..Bridge::policy(vec![[10, 9, 0, 1].into()])
        };
        let listed = bridge.host.ip(&["-o", "link", "show", "veth-g"]);
        let index = listed.split(':').next().unwrap().parse().unwrap();
        bridge.host.run(|| bridge.guards.attach(index, "veth-g", &policy)).unwrap();
        member.send(&datagram(SANDBOX, 40_000));
        assert_eq!((replies(&member), replies(&sandbox)), (0, 0), "{mechanisms:?}");
        member.send(&datagram(GATEWAY, 40_000));
        assert_eq!((replies(&member), replies(&sandbox)), (1, 0), "{mechanisms:?}");
        assert_eq!(bridge.steered(), 0, "{mechanisms:?}");
    }
}

/// The kernel moves the tag out of the frame.
#[test]
fn frames_with_a_vlan_tag_are_unchanged() {
    let bridge = Bridge::bare(MECHANISMS[0]);
    bridge.attach();
    let [sandbox, endpoint] =
        [&bridge.sandbox, &bridge.endpoint].map(|member| LinkSocket::open(member, "eth0"));
    let client = (CLIENT_V4, 40_000);
    // Not an address of the endpoint, whose kernel would reply.
    let request = udp4(client, (NEIGHBOR_V4, SERVICE), b"request");
    let request = ethernet(ENDPOINT, SANDBOX, 0x0800, &request);
    let reply = udp4((NEIGHBOR_V4, SERVICE), client, b"reply");
    let reply = ethernet(GATEWAY, ENDPOINT, 0x0800, &reply);
    let tagged = |frame: &[u8]| [&frame[..12], &[0x81, 0, 0, 5], &frame[12..]].concat();
    for (request, reply, steered) in [
        (tagged(&request), reply.clone(), 0),
        (request.clone(), tagged(&reply), 0),
        (request, reply, 1),
    ] {
        sandbox.send(&request);
        let arrived = || endpoint.received().iter().any(|frame| frame.ends_with(b"request"));
        assert!(eventually(SOON, arrived));
        endpoint.send(&reply);
        thread::sleep(NEVER / 4);
        assert_eq!(bridge.steered(), steered);
    }
}

#[test]
fn port_guard_runs_first() {
    for mechanisms in MECHANISMS {
        let bridge = Bridge::bare(mechanisms);
        // Steering is there before the guard.
        bridge.attach();
        let sandbox = LinkSocket::open(&bridge.sandbox, "eth0");
        let endpoint = LinkSocket::open(&bridge.endpoint, "eth0");
        let client = (CLIENT_V4, 40_000);
        let flow = udp4(client, (NEIGHBOR_V4, SERVICE), b"request");
        let forged = udp4((NEIGHBOR_V4, SERVICE), client, b"reply");
        let forged = ethernet(GATEWAY, ENDPOINT, 0x0800, &forged);
        sandbox.send(&ethernet(ENDPOINT, SANDBOX, 0x0800, &flow));
        let request = || endpoint.received().iter().any(|frame| frame.ends_with(b"request"));
        assert!(eventually(SOON, request));
        let steers = || {
            let before = bridge.steered();
            endpoint.send(&forged);
            thread::sleep(NEVER / 4);
            let steered = bridge.steered() - before;
            let received = sandbox.received();
            let received = received.iter().filter(|frame| frame.ends_with(b"reply")).count();
            assert_eq!(steered, received as u64, "{mechanisms:?}");
            steered
        };
        assert_eq!(steers(), 1, "{mechanisms:?}: without a guard");
        bridge.attach_guard();
        assert_eq!(steers(), 0, "{mechanisms:?}: with a guard");
        // A guard with another policy takes the place of the first one.
        let both = Bridge::policy(vec![ENDPOINT_V4, NEIGHBOR_V4]);
        bridge.host.run(|| bridge.guards.attach(bridge.index, "veth-k", &both)).unwrap();
        assert_eq!(steers(), 1, "{mechanisms:?}: allowed by the guard");
        bridge.attach_guard();
        assert_eq!(steers(), 0, "{mechanisms:?}");
        bridge.host.run(|| bridge.steering.detach(bridge.index)).unwrap();
        bridge.attach();
        assert_eq!(steers(), 0, "{mechanisms:?}: steering attached again");
        if mechanisms.0 != Mechanism::Classic {
            let dropped = bridge.host.run(|| bridge.guards.dropped())["veth-k"].spoofed;
            assert_eq!(dropped.iter().sum::<u64>(), 3, "{mechanisms:?}");
            let source = SpoofReason::ALL.iter().position(|one| *one == SpoofReason::Ipv4Source);
            assert_eq!(dropped[source.unwrap()], 3, "{mechanisms:?}");
        }
    }
}

#[test]
fn programs_are_attached_once_and_replace_those_of_a_previous_process() {
    for mechanisms in [MECHANISMS[0], MECHANISMS[1]] {
        let (_, mechanism) = mechanisms;
        let mut bridge = Bridge::bare(mechanisms);
        Bridge::serve(&bridge.endpoint, Ipv6Addr::UNSPECIFIED);
        let works = |bridge: &Bridge, port| {
            let socket = bridge.udp(PAIRS[0], (port, SERVICE));
            request(&socket, 4, 4).is_ok()
        };
        assert!(!bridge.is_attached() && bridge.programs() == 0 && !works(&bridge, 1));
        bridge.attach();
        bridge.attach();
        assert!(bridge.is_attached() && bridge.programs() == 2 && works(&bridge, 2));
        bridge.host.exec("nft", &["flush", "ruleset"]);
        assert!(bridge.is_attached() && works(&bridge, 3), "{mechanism}");
        // A new process, then one that uses the other mechanism, then again.
        let other = if mechanism == Mechanism::Tcx { Mechanism::Clsact } else { Mechanism::Tcx };
        for next in [mechanism, other, mechanism] {
            let next = ReplySteering::with_mechanism(&bridge.sandboxes, next).unwrap();
            let previous = std::mem::replace(&mut bridge.steering, next);
            assert!(!bridge.is_attached(), "{mechanism}");
            bridge.attach();
            assert!(bridge.is_attached() && bridge.programs() == 2, "{mechanism}");
            assert!(!bridge.host.run(|| previous.is_attached(bridge.index)).unwrap());
            assert!(works(&bridge, 4), "{mechanism}");
        }
        bridge.attach_guard();
        assert_eq!(bridge.programs(), 3);
        bridge.host.run(|| {
            bridge.steering.detach(bridge.index).unwrap();
            bridge.steering.detach(bridge.index).unwrap();
        });
        assert!(!bridge.is_attached() && bridge.programs() == 1 && !works(&bridge, 5));
        bridge.attach();
        assert!(bridge.is_attached() && works(&bridge, 6), "{mechanism}");
        if mechanism == Mechanism::Clsact {
            bridge.host.exec("tc", &["qdisc", "del", "dev", "veth-k", "clsact"]);
            assert!(!bridge.is_attached() && !works(&bridge, 7));
            bridge.attach();
            assert!(bridge.is_attached() && works(&bridge, 8));
        }
        bridge.host.ip(&["link", "del", "veth-k"]);
        let gone = bridge.host.run(|| bridge.steering.attach(bridge.index)).unwrap_err();
        assert_eq!(gone.raw_os_error(), Some(libc::ENODEV), "{mechanism}");
    }
}
