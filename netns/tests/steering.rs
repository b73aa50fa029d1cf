//! End-to-end tests of policy routes: a container sees the addresses of its clients, and its
//! replies return to tidegate.
//!
//! Two variants, each for TCP and UDP over IPv4 and IPv6:
//!
//! - short path: the socket is created in the container's namespace, so no packet crosses the
//!   bridge;
//! - from the host: the socket is created in the host's namespace, for a container without a
//!   namespace handle.

use socket2::{Domain, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tidegate_model::Protocol;
use tidegate_model::registry::MARK;
use tidegate_netns::{Families, Family, Namespace, PolicyRoute, Selector, Steered, Sysctl};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Topology, addr, eventually};

const SHORT_PATH_SYSCTLS: [&str; 3] =
    ["net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"];

/// Published port inside the container, and a closed port.
const PORT: u16 = 8080;
const CLOSED_PORT: u16 = 8081;

/// Source port of the client, unique per use. Child processes of other tests briefly inherit
/// descriptors, so a port may stay in use longer than its socket.
static NEXT_CLIENT_PORT: AtomicU16 = AtomicU16::new(40_001);

/// Timeout for expected packets. The first packet over a new link may be lost.
const SOON: Duration = Duration::from_secs(10);

/// Timeout for packets that must not arrive.
const ABSENCE_TIMEOUT: Duration = Duration::from_millis(500);

struct Scene {
    net: Topology,
    container: Namespace,
    host: Namespace,
    journal: TempDir,
}

/// The addresses of one family.
#[derive(Clone, Copy)]
struct Ends {
    family: Family,
    client: IpAddr,
    container: IpAddr,
    neighbour: IpAddr,
}

const ENDS: [Ends; 2] = [
    Ends {
        family: Family::V4,
        client: IpAddr::V4(addr::CLIENT_V4),
        container: IpAddr::V4(addr::CONTAINER_V4),
        neighbour: IpAddr::V4(addr::NEIGHBOUR_V4),
    },
    Ends {
        family: Family::V6,
        client: IpAddr::V6(addr::CLIENT_V6),
        container: IpAddr::V6(addr::CONTAINER_V6),
        neighbour: IpAddr::V6(addr::NEIGHBOUR_V6),
    },
];

impl Scene {
    fn new() -> Self {
        Self::of(Topology::three())
    }

    fn of(net: Topology) -> Self {
        let open = |namespace: &tidegate_testbed::Namespace| {
            Namespace::from_path(&namespace.path()).unwrap()
        };
        let (container, host) = (open(&net.container), open(&net.host));
        Self { net, container, host, journal: tempfile::tempdir().unwrap() }
    }

    fn install(&self, namespace: &Namespace, sysctls: &[&str]) -> Arc<PolicyRoute> {
        let sysctls: Vec<Sysctl> = sysctls.iter().map(|name| Sysctl::new(*name, "1")).collect();
        let route =
            PolicyRoute::install_in(self.journal.path(), namespace, Families::Both, &sysctls);
        Arc::new(route.unwrap())
    }

    /// Installs the policy route for short-path TCP with these sysctls.
    fn short_path(&self, sysctls: &[&str]) -> [Steered; 2] {
        let route = self.install(&self.container, sysctls);
        Family::ALL.map(|family| route.steer(Selector::marked(family, MARK)).unwrap())
    }

    /// Enables strict reverse path filtering on all interfaces of both namespaces.
    fn enable_reverse_path_filters(&self) {
        for namespace in [&self.net.container, &self.net.host] {
            for interface in ["all", "default", "lo", "eth0"] {
                namespace.sysctl(&format!("net.ipv4.conf.{interface}.rp_filter"), "1");
            }
        }
        self.net.host.sysctl("net.ipv4.conf.br0.rp_filter", "1");
    }
}

impl Ends {
    fn next_client(self) -> SocketAddr {
        SocketAddr::new(self.client, NEXT_CLIENT_PORT.fetch_add(1, Ordering::Relaxed))
    }

    fn server(self) -> SocketAddr {
        SocketAddr::new(self.container, PORT)
    }

    /// Selector of the container's replies to this client from the server port.
    fn replies(self, protocol: Protocol) -> Selector {
        Selector {
            to: Some(self.client),
            protocol: Some(protocol),
            source_port: Some(PORT),
            ..Selector::new(self.family)
        }
    }

    /// Selector of the same replies as received by the host.
    fn replies_at_host(self, protocol: Protocol) -> Selector {
        Selector {
            from: Some(self.container),
            input_interface: Some("br0".to_owned()),
            ..self.replies(protocol)
        }
    }
}

/// Creates a socket bound to the address of `client`.
fn socket_of_client(client: SocketAddr, kind: Type, mark: Option<u32>) -> Socket {
    let socket = Socket::new(Domain::for_address(client), kind, None).unwrap();
    match client {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true).unwrap(),
        SocketAddr::V6(_) => socket.set_ip_transparent_v6(true).unwrap(),
    }
    if let Some(mark) = mark {
        socket.set_mark(mark).unwrap();
    }
    socket.set_read_timeout(Some(ABSENCE_TIMEOUT)).unwrap();
    socket.bind(&client.into()).unwrap();
    socket
}

fn connect(
    namespace: &Namespace,
    client: SocketAddr,
    server: SocketAddr,
    mark: Option<u32>,
    patience: Duration,
) -> io::Result<Socket> {
    namespace.with(|| {
        let socket = socket_of_client(client, Type::STREAM, mark);
        socket.connect_timeout(&server.into(), patience)?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(socket)
    })?
}

/// Connects, checks the peer address seen by the server, and transfers a megabyte in each
/// direction.
#[track_caller]
fn check_tcp(scene: &Scene, namespace: &Namespace, ends: Ends, mark: Option<u32>) {
    let server = PeerServer::tcp(&scene.net.container, ends.server());
    let client = ends.next_client();
    let mut seen = String::new();
    connect(namespace, client, ends.server(), mark, SOON)
        .unwrap()
        .read_to_string(&mut seen)
        .unwrap();
    assert_eq!(seen, client.to_string());
    drop(server);

    let _server = EchoServer::tcp(&scene.net.container, ends.server());
    let stream = connect(namespace, ends.next_client(), ends.server(), mark, SOON).unwrap();
    let sent = vec![0x5a_u8; 1 << 20];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&stream).write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        (&stream).read_to_end(&mut received).unwrap();
        assert!(received == sent, "{} of {} bytes came back", received.len(), sent.len());
    });
}

/// Queries a UDP server from the client's address. Returns whether the server saw that address.
fn ask_udp(namespace: &Namespace, ends: Ends) -> io::Result<bool> {
    let client = ends.next_client();
    let socket = namespace.with(|| socket_of_client(client, Type::DGRAM, None))?;
    socket.connect(&ends.server().into())?;
    Ok(ask(&UdpSocket::from(socket))? == client.to_string())
}

/// Sends one datagram and returns the reply.
fn ask(socket: &UdpSocket) -> io::Result<String> {
    socket.set_read_timeout(Some(ABSENCE_TIMEOUT))?;
    socket.send(b"who am I?")?;
    let mut answer = [0; 100];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

#[track_caller]
fn check_udp(namespace: &Namespace, ends: Ends) {
    assert!(
        eventually(SOON, || ask_udp(namespace, ends).is_ok_and(|shown| shown)),
        "{}",
        ends.family
    );
}

#[test]
fn short_path_tcp_preserves_the_client_address_and_transfers_data() {
    let scene = Scene::new();
    let _steered = scene.short_path(&SHORT_PATH_SYSCTLS);
    let before = scene.net.container.ip(&["-s", "link", "show", "eth0"]);
    for ends in ENDS {
        check_tcp(&scene, &scene.container, ends, Some(MARK));
    }
    let after = scene.net.container.ip(&["-s", "link", "show", "eth0"]);
    let packets = |text: &str| -> u64 {
        // The counters are on the line below `RX:` and `TX:`, bytes before packets.
        let lines: Vec<&str> = text.lines().collect();
        let figures = lines.windows(2).filter(|pair| pair[0].trim_start().starts_with(['R', 'T']));
        figures.map(|pair| pair[1].split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum()
    };
    assert!(packets(&after) - packets(&before) < 20, "only a few IPv6 reports cross the veth pair");
}

#[test]
fn short_path_tcp_passes_reverse_path_filters() {
    let scene = Scene::new();
    scene.enable_reverse_path_filters();
    let _steered = scene.short_path(&SHORT_PATH_SYSCTLS);
    for ends in ENDS {
        check_tcp(&scene, &scene.container, ends, Some(MARK));
    }
}

#[test]
fn short_path_tcp_to_a_closed_port_is_refused_immediately() {
    let scene = Scene::new();
    let _steered = scene.short_path(&SHORT_PATH_SYSCTLS);
    for ends in ENDS {
        let closed = SocketAddr::new(ends.container, CLOSED_PORT);
        let start = Instant::now();
        let error =
            connect(&scene.container, ends.next_client(), closed, Some(MARK), SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
        assert!(start.elapsed() < ABSENCE_TIMEOUT, "{:?}", start.elapsed());
    }
}

#[test]
fn short_path_tcp_reset_reaches_both_sides() {
    let scene = Scene::new();
    let _steered = scene.short_path(&SHORT_PATH_SYSCTLS);
    for ends in ENDS {
        let listener = scene.container.with(|| TcpListener::bind(ends.server())).unwrap().unwrap();
        for server_resets in [true, false] {
            let near =
                connect(&scene.container, ends.next_client(), ends.server(), Some(MARK), SOON)
                    .unwrap();
            let far = Socket::from(listener.accept().unwrap().0);
            let (cut, mut notified) = if server_resets { (far, near) } else { (near, far) };
            notified.set_read_timeout(Some(SOON)).unwrap();
            cut.set_linger(Some(Duration::ZERO)).unwrap();
            drop(cut);
            assert_eq!(notified.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
    }
}

/// Without any one of the sysctls, the replies leave by the default route.
#[test]
fn short_path_tcp_needs_each_of_its_sysctls() {
    let [accept, reflect_v4, reflect_v6] = SHORT_PATH_SYSCTLS;
    let timed_out =
        |result: io::Result<Socket>| result.unwrap_err().kind() == io::ErrorKind::TimedOut;

    // Despite its name, the sysctl applies to both families.
    let scene = Scene::new();
    let _steered = scene.short_path(&[reflect_v4, reflect_v6]);
    for ends in ENDS {
        let _server = EchoServer::tcp(&scene.net.container, ends.server());
        // The listener sends the SYN-ACK before a socket exists that could inherit the mark.
        assert!(
            timed_out(connect(
                &scene.container,
                ends.next_client(),
                ends.server(),
                Some(MARK),
                ABSENCE_TIMEOUT
            )),
            "{}",
            ends.family
        );
    }

    let scene = Scene::new();
    let _steered = scene.short_path(&[accept]);
    for ends in ENDS {
        check_tcp(&scene, &scene.container, ends, Some(MARK));
        let closed = SocketAddr::new(ends.container, CLOSED_PORT);
        assert!(
            timed_out(connect(
                &scene.container,
                ends.next_client(),
                closed,
                Some(MARK),
                ABSENCE_TIMEOUT
            )),
            "{}",
            ends.family
        );
    }
}

/// The rule matches marked packets only, so direct connections to the container are unaffected.
#[test]
fn short_path_tcp_does_not_affect_neighbours_and_the_host() {
    let scene = Scene::new();
    let neighbour = scene.net.neighbour();
    let _steered = scene.short_path(&SHORT_PATH_SYSCTLS);
    for ends in ENDS {
        let _server = PeerServer::tcp(&scene.net.container, ends.server());
        let ask = || {
            let mut seen = String::new();
            TcpStream::connect(ends.server())
                .and_then(|mut stream| stream.read_to_string(&mut seen))
                .unwrap();
            seen.parse::<SocketAddr>().unwrap().ip()
        };
        assert_eq!(neighbour.run(ask), ends.neighbour);
        assert!(scene.net.host.run(ask) != ends.client);
        assert_eq!(scene.net.client.run(ask), ends.client, "forwarded by the host");
    }
}

#[test]
fn short_path_udp_preserves_the_client_address_with_steering() {
    let scene = Scene::new();
    scene.enable_reverse_path_filters();
    let route = scene.install(&scene.container, &[]);
    for ends in ENDS {
        let _server = PeerServer::udp(&scene.net.container, ends.server());
        let lost = ask_udp(&scene.container, ends).unwrap_err();
        assert_eq!(lost.kind(), io::ErrorKind::WouldBlock, "not steered yet");
        let steered = route.steer(ends.replies(Protocol::Udp)).unwrap();
        check_udp(&scene.container, ends);
        drop(steered);
        assert!(ask_udp(&scene.container, ends).is_err());
    }
}

#[test]
fn short_path_udp_to_a_closed_port_is_refused() {
    let scene = Scene::new();
    let route = scene.install(&scene.container, &SHORT_PATH_SYSCTLS);
    for ends in ENDS {
        let mark = route.steer(Selector::marked(ends.family, MARK)).unwrap();
        let socket = scene
            .container
            .with(|| socket_of_client(ends.next_client(), Type::DGRAM, Some(MARK)))
            .unwrap();
        socket.connect(&ends.server().into()).unwrap();
        socket.send(b"anybody there?").unwrap();
        let error = (&socket).read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
        drop(mark);
    }
}

/// The rule matches one client, so direct datagrams from neighbours and the host are unaffected.
#[test]
fn short_path_udp_does_not_affect_neighbours_and_the_host() {
    let scene = Scene::new();
    let neighbour = scene.net.neighbour();
    let route = scene.install(&scene.container, &[]);
    for ends in ENDS {
        let _server = PeerServer::udp(&scene.net.container, ends.server());
        let _steered = route.steer(ends.replies(Protocol::Udp)).unwrap();
        let seen = || {
            let any = if ends.family == Family::V4 { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(ends.server()).unwrap();
            let mut seen = String::new();
            assert!(eventually(SOON, || ask(&socket).map(|answer| seen = answer).is_ok()));
            seen.parse::<SocketAddr>().unwrap().ip()
        };
        assert_eq!(neighbour.run(seen), ends.neighbour);
        assert!(scene.net.host.run(seen) != ends.client);
    }
}

#[test]
fn from_the_host_tcp_preserves_the_client_address_and_transfers_data() {
    let scene = Scene::new();
    let route = scene.install(&scene.host, &[]);
    for ends in ENDS {
        let steered = route.steer(ends.replies_at_host(Protocol::Tcp)).unwrap();
        check_tcp(&scene, &scene.host, ends, None);
        drop(steered);
        let _server = EchoServer::tcp(&scene.net.container, ends.server());
        assert!(
            connect(&scene.host, ends.next_client(), ends.server(), None, ABSENCE_TIMEOUT).is_err(),
            "no longer steered"
        );
    }
}

#[test]
fn from_the_host_works_with_reverse_path_filters_and_without_forwarding() {
    let scene = Scene::of(Topology::builder().forwarding(false).build());
    scene.enable_reverse_path_filters();
    let route = scene.install(&scene.host, &[]);
    for ends in ENDS {
        let _tcp = route.steer(ends.replies_at_host(Protocol::Tcp)).unwrap();
        check_tcp(&scene, &scene.host, ends, None);
        let _udp = route.steer(ends.replies_at_host(Protocol::Udp)).unwrap();
        let _server = PeerServer::udp(&scene.net.container, ends.server());
        check_udp(&scene.host, ends);
    }
}

#[test]
fn from_the_host_tcp_to_a_closed_port_is_refused_immediately() {
    let scene = Scene::new();
    let route = scene.install(&scene.host, &[]);
    for ends in ENDS {
        let _steered = route.steer(ends.replies_at_host(Protocol::Tcp)).unwrap();
        let error =
            connect(&scene.host, ends.next_client(), ends.server(), None, SOON).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
    }
}

#[test]
fn from_the_host_udp_preserves_the_client_address_with_steering() {
    let scene = Scene::new();
    let route = scene.install(&scene.host, &[]);
    for ends in ENDS {
        let _server = PeerServer::udp(&scene.net.container, ends.server());
        assert!(ask_udp(&scene.host, ends).is_err(), "not steered yet");
        let _steered = route.steer(ends.replies_at_host(Protocol::Udp)).unwrap();
        check_udp(&scene.host, ends);
    }
}
