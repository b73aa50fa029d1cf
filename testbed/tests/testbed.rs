//! Tests of the testbed: connectivity, servers, and that nothing is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use tidegate_testbed::server::{EchoServer, PeerServer, Sink, Source, StalledServer};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Mounts, Namespace, Process, Protocol, Signal, Topology, addr, eventually};

const SOON: Duration = Duration::from_secs(10);

/// The address that a TCP server at `server` sees when `from` connects to it.
fn seen_by(server_in: &Namespace, server: IpAddr, from: &Namespace) -> IpAddr {
    let server = PeerServer::tcp(server_in, (server, 0).into());
    let text = from.run(|| {
        let mut text = String::new();
        connect(server.addr()).read_to_string(&mut text).unwrap();
        text
    });
    text.parse::<SocketAddr>().unwrap().ip()
}

fn connect(addr: SocketAddr) -> TcpStream {
    TcpStream::connect_timeout(&addr, SOON)
        .unwrap_or_else(|error| panic!("connect to {addr}: {error}"))
}

#[test]
fn all_namespaces_connect_with_their_own_address() {
    let net = Topology::three();
    let neighbour = net.neighbour();
    let v4: [(&Namespace, IpAddr); 4] = [
        (&net.client, addr::CLIENT_V4.into()),
        (&net.host, addr::HOST_V4.into()),
        (&net.container, addr::CONTAINER_V4.into()),
        (&neighbour, addr::NEIGHBOUR_V4.into()),
    ];
    let v6: [(&Namespace, IpAddr); 4] = [
        (&net.client, addr::CLIENT_V6.into()),
        (&net.host, addr::HOST_V6.into()),
        (&net.container, addr::CONTAINER_V6.into()),
        (&neighbour, addr::NEIGHBOUR_V6.into()),
    ];
    for family in [v4, v6] {
        for (from, source) in family {
            for (to, target) in family {
                let seen = seen_by(to, target, from);
                // The host uses its address on the link to the server.
                let gateway = [addr::GATEWAY_V4.into(), addr::GATEWAY_V6.into()].contains(&seen);
                assert!(seen == source || gateway, "{target} saw {seen} for {source}");
            }
        }
    }
}

#[test]
fn without_forwarding_the_container_is_unreachable() {
    let net = Topology::builder().forwarding(false).build();
    let listener = net.container.run(|| TcpListener::bind((addr::CONTAINER_V4, 80))).unwrap();
    let result = net.client.run(|| {
        TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_millis(300))
    });
    assert!(result.is_err());
}

#[test]
fn the_congestion_control_is_configurable() {
    let net = Topology::three();
    assert_eq!(net.host.read_sysctl("net.ipv4.tcp_congestion_control"), "reno");
    // Namespaces may only use the algorithms that the machine permits to all users.
    let allowed = fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
    let wanted = allowed.split_whitespace().last().unwrap();
    let net = Topology::builder().congestion_control(wanted).build();
    for namespace in [&net.client, &net.container, &net.neighbour()] {
        assert_eq!(namespace.read_sysctl("net.ipv4.tcp_congestion_control"), wanted);
    }
}

#[test]
fn tcp_echo_ends_with_the_half_close_of_the_client() {
    let net = Topology::three();
    let server = EchoServer::tcp(&net.container, (addr::CONTAINER_V6, 0).into());
    net.client.run(|| {
        let mut stream = connect(server.addr());
        stream.write_all(b"ping").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ping");
    });
    assert_eq!(server.served(), 1);
    assert!(eventually(SOON, || server.open_connections() == 0));
}

#[test]
fn udp_echo_handles_empty_and_maximum_datagrams() {
    let net = Topology::three();
    let server = EchoServer::udp(&net.container, (addr::CONTAINER_V4, 0).into());
    net.client.run(|| {
        let socket = UdpSocket::bind((addr::CLIENT_V4, 0)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let mut buffer = vec![0; 70_000];
        for length in [0, 1, 1472, 65_507] {
            socket.send_to(&vec![7; length], server.addr()).unwrap();
            assert_eq!(socket.recv_from(&mut buffer).unwrap(), (length, server.addr()));
        }
    });
    assert_eq!(server.served(), 4);
}

#[test]
fn the_udp_peer_server_sends_the_address_of_the_client() {
    let net = Topology::three();
    let server = PeerServer::udp(&net.container, (addr::CONTAINER_V6, 0).into());
    net.client.run(|| {
        let socket = UdpSocket::bind((addr::CLIENT_V6, 0)).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.send_to(b"?", server.addr()).unwrap();
        let mut buffer = [0; 100];
        let (length, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..length], *socket.local_addr().unwrap().to_string().as_bytes());
    });
}

#[test]
fn bulk_transfers_are_checked_in_both_directions() {
    const LENGTH: u64 = 5_000_001;
    let net = Topology::three();
    let sink = Sink::tcp(&net.container, (addr::CONTAINER_V4, 0).into(), 1);
    let source = Source::tcp(&net.container, (addr::CONTAINER_V4, 0).into(), 2, LENGTH);
    net.client.run(|| {
        transfer::send(&mut connect(sink.addr()), 1, LENGTH).unwrap();
        let mut stream = connect(source.addr());
        assert_eq!(transfer::receive(&mut stream, 2), Transfer::complete(LENGTH));
    });
    assert_eq!(sink.wait(1, SOON), [Transfer::complete(LENGTH)]);
}

#[test]
fn a_reset_is_not_an_orderly_end() {
    let net = Topology::three();
    let sink = Sink::tcp(&net.container, (addr::CONTAINER_V4, 0).into(), 1);
    net.client.run(|| {
        let mut stream = connect(sink.addr());
        transfer::send(&mut stream, 1, 1000).unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    });
    let ends = sink.wait(1, SOON);
    assert_eq!(ends[0].error, Some(io::ErrorKind::ConnectionReset));
}

#[test]
fn dropping_a_server_ends_its_connections() {
    let net = Topology::three();
    let server = StalledServer::tcp(&net.container, (addr::CONTAINER_V4, 0).into());
    let mut stream = net.client.run(|| connect(server.addr()));
    assert!(eventually(SOON, || server.open_connections() == 1));
    drop(server);
    stream.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(stream.read(&mut [0; 10]).unwrap_or(0), 0);
}

#[test]
fn bound_ports_are_found_without_connecting() {
    let namespace = Namespace::new();
    let (tcp, udp) = namespace
        .run(|| (TcpListener::bind("[::]:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()));
    let (tcp, udp) = (tcp.local_addr().unwrap().port(), udp.local_addr().unwrap().port());
    namespace.wait_until_bound(Protocol::Tcp, tcp, SOON);
    namespace.wait_until_bound(Protocol::Udp, udp, SOON);
    assert!(!namespace.is_bound(Protocol::Tcp, 1));
}

#[test]
fn a_command_runs_in_the_namespace_with_its_mounts() {
    let namespace = Namespace::new();
    namespace.ip(&["link", "add", "only-here", "type", "bridge"]);
    let directory = std::env::temp_dir();
    let mounts = Mounts::builder().tmpfs("/run").bind(&directory, "/mnt").build(&namespace);
    let inside = namespace.with_mounts(mounts);
    assert_eq!(inside.exec("ls", &["-A", "/run"]), "");
    inside.exec("touch", &["/run/left-in-the-tmpfs"]);
    assert_eq!(inside.exec("ls", &["-A", "/run"]), "left-in-the-tmpfs\n");
    assert!(inside.exec("ls", &["/sys/class/net"]).contains("only-here"));
    let same = inside.exec("stat", &["-c", "%d:%i", "/mnt", &directory.display().to_string()]);
    let lines: BTreeSet<&str> = same.lines().collect();
    assert_eq!(lines.len(), 1, "{same}");
    if fs::exists("/sys/fs/cgroup/cgroup.procs").unwrap()
        || fs::exists("/sys/fs/cgroup/memory").unwrap()
    {
        assert_ne!(inside.exec("ls", &["/sys/fs/cgroup"]), "");
    }
    assert!(!fs::exists("/run/left-in-the-tmpfs").unwrap());
    assert!(!fs::exists("/sys/class/net/only-here").unwrap());
}

#[test]
#[should_panic(
    expected = "ip link show no-such-link: exit status: 1: Device \"no-such-link\" does not exist"
)]
fn a_failing_ip_command_panics_with_the_error() {
    Namespace::new().ip(&["link", "show", "no-such-link"]);
}

#[test]
#[should_panic(expected = "from inside")]
fn a_panic_inside_is_propagated() {
    Namespace::new().run(|| panic!("from inside"));
}

/// The network links and the named namespaces of the machine.
fn left_on_the_machine() -> BTreeSet<String> {
    let names = |directory: &str| -> Vec<String> {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries
            .map(|entry| format!("{directory}/{}", entry.file_name().to_string_lossy()))
            .collect()
    };
    [names("/sys/class/net"), names("/run/netns")].concat().into_iter().collect()
}

#[test]
fn a_topology_leaves_nothing_on_the_machine() {
    let before = left_on_the_machine();
    let net = Topology::three();
    let neighbour = net.neighbour();
    assert_eq!(left_on_the_machine(), before);
    drop((net, neighbour));
    assert_eq!(left_on_the_machine(), before);
}

#[test]
fn a_dropped_namespace_removes_its_links() {
    let (stays, goes) = (Namespace::new(), Namespace::new());
    let path = goes.path().display().to_string();
    stays.ip(&["link", "add", "here", "type", "veth", "peer", "name", "there", "netns", &path]);
    drop(goes);
    assert!(eventually(SOON, || !stays.ip(&["-brief", "link"]).contains("here")));
}

/// The environment variable that turns [`owner_of_a_namespace`] into a helper process. Its value is
/// the path of another namespace.
const PEER_NAMESPACE: &str = "TIDEGATE_TESTBED_PEER";

#[test]
fn a_killed_process_removes_its_namespaces() {
    let namespace = Namespace::new();
    let this_test = std::env::current_exe().unwrap();
    let mut owner = Process::spawn(
        Command::new(this_test)
            .args(["--exact", "owner_of_a_namespace", "--nocapture"])
            .env(PEER_NAMESPACE, namespace.path()),
    );
    owner.wait_for_line("joined", SOON);
    assert!(namespace.ip(&["-brief", "link"]).contains("here"));
    owner.stop(Signal::KILL, SOON);
    assert!(eventually(SOON, || !namespace.ip(&["-brief", "link"]).contains("here")));
}

/// Not a test itself: the process that the test above kills.
#[test]
fn owner_of_a_namespace() {
    let Ok(peer) = std::env::var(PEER_NAMESPACE) else { return };
    let namespace = Namespace::new();
    namespace.ip(&["link", "add", "there", "type", "veth", "peer", "name", "here", "netns", &peer]);
    println!("joined");
    std::thread::sleep(SOON * 2);
}
