//! Effect of a container's flood on another container that uses the NAT engine.

use super::scene::{Scene, TIDEGATE};
use socket2::{Domain, Socket, Type};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;
use tidegate_testbed::flood::{FloodKind, Flooder, request_times};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, addr, eventually, raise_open_files};

/// The flooding container may send from any address of its network, as without a port guard.
const FILE: &str = r#"
name: floods
networks:
  one: { ipam: { config: [ { subnet: 10.83.1.0/24 } ] } }
  two: { ipam: { config: [ { subnet: 10.83.2.0/24 } ] } }
services:
  flooding: { x-netns: FLOODING, networks: { one: { ipv4_address: 10.83.1.2, x-any-source: true } } }
  other: { x-netns: OTHER, networks: { two: { ipv4_address: 10.83.2.2 } } }
"#;

/// Frames per second.
const RATE: u32 = 60_000;
/// Requests per measurement.
const REQUESTS: usize = 200;
/// Maximum time of checks that are retried.
const SOON: Duration = Duration::from_secs(10);
/// Pause between two requests.
const PAUSE: Duration = Duration::from_millis(5);
/// Maximum median latency of the other container's requests. A lost SYN costs 1 s. The benchmark
/// `neighbour` measures the exact slowdown on an idle machine.
const SERVED: Duration = Duration::from_millis(100);

#[test]
fn a_container_is_served_during_the_flood_of_another() {
    let scene = Scene::new();
    let (_up, [flooding, other]) =
        scene.up_with_services(FILE, ["flooding", "other"], false, &["--firewall=none"]);
    let flooded = (addr::CLIENT_V4, 7001);
    let _flooded = PeerServer::tcp(&scene.net.client, flooded.into());
    let asked = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7002).into());
    let flooder = Flooder {
        namespace: &flooding,
        address: Ipv4Addr::new(10, 83, 1, 2),
        gateway: Ipv4Addr::new(10, 83, 1, 1),
        target: flooded,
    };
    let median = |kind| {
        let _flood = flooder.start(kind, RATE);
        thread::sleep(Duration::from_millis(500));
        let mut took = other.run(|| request_times(asked.addr(), REQUESTS, PAUSE));
        took.sort_unstable();
        took[REQUESTS / 2]
    };
    for kind in [FloodKind::Syn, FloodKind::SynOfManySources, FloodKind::Udp, FloodKind::Fragments]
    {
        let mut seen = Vec::new();
        let is_served = (0..3).any(|_| {
            seen.push(median(kind));
            seen.last().is_some_and(|median| *median <= SERVED)
        });
        assert!(is_served, "{kind:?}: medians of three rounds: {seen:?}");
    }
}

/// The port guard of the flooding container drops excess SYNs. The policer, which also limits the
/// container's legitimate connections, is removed after the flood.
#[track_caller]
fn assert_flood_policed(rootless: bool) {
    let scene = Scene::new().with_metrics();
    let scene = if rootless { scene.with_open_tun() } else { scene };
    let file = FILE.replace(", x-any-source: true", "");
    let (_up, [flooding, _other]) =
        scene.up_with_services(&file, ["flooding", "other"], rootless, &["--firewall=none"]);
    let target = (addr::CLIENT_V4, 7001);
    let _server = PeerServer::tcp(&scene.net.client, target.into());
    let policed = || {
        let figures = scene.figures();
        let mut policed = figures.lines().filter_map(|line| {
            let value = line.strip_prefix(
                "tidegate_network_policed_frames_total{network=\"one\",endpoint=\"flooding\"} ",
            )?;
            value.parse::<u64>().ok()
        });
        policed.next().expect("a series of the flooding container")
    };
    assert_eq!(policed(), 0);
    let flooder = Flooder {
        namespace: &flooding,
        address: Ipv4Addr::new(10, 83, 1, 2),
        gateway: Ipv4Addr::new(10, 83, 1, 1),
        target,
    };
    let flood = flooder.start(FloodKind::Syn, RATE);
    assert!(eventually(Duration::from_secs(1), || policed() > 1000), "{}", policed());
    let before = policed();
    thread::sleep(Duration::from_secs(2));
    let passed = 2.0 * f64::from(RATE) - (policed() - before) as f64;
    assert!(passed < f64::from(RATE) / 4.0, "{passed} of {RATE} per second passed in 2 s");
    drop(flood);
    // The policer is removed about 2 s after the flood. More connections than its burst then
    // succeed.
    thread::sleep(Duration::from_millis(2500));
    let before = policed();
    let times = flooding.run(|| request_times(target.into(), 200, Duration::ZERO));
    assert_eq!(times.len(), 200);
    assert_eq!(policed(), before);
}

#[test]
fn a_flood_is_policed_at_the_bridge_port() {
    assert_flood_policed(false);
}

#[test]
fn a_flood_is_policed_at_the_bridge_port_rootless() {
    assert_flood_policed(true);
}

#[test]
fn the_error_of_a_zero_engine_limit_names_the_flag() {
    let scene = Scene::new();
    fs::write(scene.directory.path().join("compose.yaml"), FILE).unwrap();
    for flag in ["--nat-max-flows", "--nat-max-endpoint-flows", "--nat-max-unanswered"] {
        let output = scene.net.host.command(TIDEGATE).args(["up", flag, "0"]).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{printed}");
        assert!(printed.contains(flag) && printed.contains('0'), "{printed}");
    }
}

/// Established connections are never evicted by the kernel, and expire after five days.
#[test]
fn a_container_cannot_fill_the_conntrack_table() {
    const LIMIT: usize = 600;
    raise_open_files(8192);
    for firewall in ["--firewall=nftables", "--firewall=iptables"] {
        let scene = Scene::new().with_metrics();
        let limit = format!("--max-tracked-flows={LIMIT}");
        let (up, [flooding, other]) =
            scene.up_with_services(FILE, ["flooding", "other"], false, &[firewall, &limit]);
        let echo = EchoServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7001).into());
        let mut modest: Vec<TcpStream> =
            (0..30).map(|_| other.run(|| TcpStream::connect(echo.addr()).unwrap())).collect();
        let accomplice: SocketAddr = (addr::CLIENT_V4, 7002).into();
        let listener = scene.net.client.run(|| TcpListener::bind(accomplice)).unwrap();
        let held: Vec<(TcpStream, TcpStream)> = (0..2 * LIMIT)
            .map(|_| {
                let opened = flooding.run(|| TcpStream::connect(accomplice)).unwrap();
                (opened, listener.accept().unwrap().0)
            })
            .collect();
        let flows_of = |source: &str| {
            let listed = scene.net.host.exec("conntrack", &["-L", "-s", source]);
            listed.lines().filter(|line| line.contains("ESTABLISHED")).count()
        };
        assert!(eventually(SOON, || flows_of("10.83.1.2") <= LIMIT), "{firewall}");
        for stream in &mut modest {
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(b"?").unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
        assert!(other.run(|| TcpStream::connect_timeout(&echo.addr(), SOON)).is_ok());
        let figures = scene.figures();
        let evicted = figures
            .lines()
            .find_map(|line| line.strip_prefix("tidegate_network_evicted_tracked_flows_total "))
            .and_then(|value| value.parse::<usize>().ok());
        assert!(evicted.is_some_and(|evicted| evicted >= LIMIT), "{firewall}: {evicted:?}");
        let warning = up.wait_for_line("limit of tracked flows reached", SOON);
        assert!(warning.contains("largest=\"10.83.1.2\""), "{warning}");
        drop(held);
    }
}

/// Each instance counts the flows of the other, and evicts only its own.
#[test]
fn containers_lose_no_tracked_flows_because_of_other_projects_or_outside_clients() {
    const LIMIT: usize = 600;
    raise_open_files(8192);
    let scene = Scene::new();
    let limit = format!("--max-tracked-flows={LIMIT}");
    let flags = ["--firewall=nftables", &limit];
    let (_up, [_, other]) = scene.up_with_services(FILE, ["flooding", "other"], false, &flags);
    let beside = Namespace::new();
    let file = format!(
        "name: beside
networks: {{ net: {{ ipam: {{ config: [ {{ subnet: 10.84.1.0/24 }} ] }} }} }}
services:
  box:
    x-netns: {}
    networks: {{ net: {{ ipv4_address: 10.84.1.2 }} }}
    ports: [ '8080:80' ]
",
        beside.path().display()
    );
    let second = scene.up_beside(&file, &flags);
    second.wait_for_line("Ctrl-C takes", SOON);
    let echo = EchoServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7001).into());
    let modest: Vec<TcpStream> =
        (0..200).map(|_| other.run(|| TcpStream::connect(echo.addr()).unwrap())).collect();
    let flows_of = |source: &str| {
        let listed = scene.net.host.exec("conntrack", &["-L", "-s", source]);
        listed.lines().filter(|line| line.contains("ESTABLISHED")).count()
    };
    let hold = |from: &Namespace, at: &Namespace, listen: SocketAddr, to: SocketAddr| {
        let listener = at.run(|| TcpListener::bind(listen)).unwrap();
        (0..2 * LIMIT)
            .map(|_| (from.run(|| TcpStream::connect(to)).unwrap(), listener.accept().unwrap().0))
            .collect::<Vec<_>>()
    };
    let accomplice: SocketAddr = (addr::CLIENT_V4, 7002).into();
    let held = hold(&beside, &scene.net.client, accomplice, accomplice);
    assert!(eventually(SOON, || flows_of("10.84.1.2") <= LIMIT), "the hog of the other project");
    assert_eq!(flows_of("10.83.2.2"), modest.len());
    drop(held);
    let to: SocketAddr = (addr::HOST_V4, 8080).into();
    let _held = hold(&scene.net.client, &beside, "0.0.0.0:80".parse().unwrap(), to);
    let client = addr::CLIENT_V4.to_string();
    assert!(eventually(SOON, || flows_of(&client) <= LIMIT), "the client of a published port");
    assert_eq!(flows_of("10.83.2.2"), modest.len());
}

/// The link-local address of a container is in no subnet. It reaches services of the host.
#[test]
fn tracked_flows_from_link_local_addresses_count_for_their_container() {
    const LIMIT: usize = 600;
    raise_open_files(8192);
    let scene = Scene::new();
    let limit = format!("--max-tracked-flows={LIMIT}");
    let container = Namespace::new();
    let file = format!(
        "name: link-local
networks:
  net:
    enable_ipv6: true
    driver_opts: {{ com.docker.network.bridge.name: tg-net }}
    ipam: {{ config: [ {{ subnet: 10.83.9.0/24 }}, {{ subnet: 'fd83:9::/64' }} ] }}
services: {{ box: {{ x-netns: {}, networks: [ net ] }} }}
",
        container.path().display()
    );
    let up = scene.up_with(&file, &["--firewall=nftables", &limit]);
    up.wait_for_line("Ctrl-C takes", SOON);
    let shown = scene.net.host.ip(&["-6", "-o", "addr", "show", "dev", "tg-net", "scope", "link"]);
    let address = shown.split("inet6 ").nth(1).unwrap().split('/').next().unwrap();
    let scope = container.ip(&["-o", "link", "show", "eth0"]);
    let scope = scope.split(':').next().unwrap().parse().unwrap();
    let service = SocketAddrV6::new(address.parse().unwrap(), 9998, 0, scope);
    let listener = scene.net.host.run(|| TcpListener::bind("[::]:9998")).unwrap();
    let own = || container.ip(&["-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]);
    assert!(eventually(SOON, || !own().contains("tentative")));
    let own = own();
    let own = own.split("inet6 ").nth(1).unwrap().split('/').next().unwrap();
    let own = SocketAddrV6::new(own.parse().unwrap(), 0, 0, scope);
    let connect = || {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.bind(&own.into()).unwrap();
        socket.connect(&service.into()).unwrap();
        socket
    };
    let held: Vec<_> =
        (0..2 * LIMIT).map(|_| (container.run(connect), listener.accept().unwrap().0)).collect();
    let flows = || {
        let listed = scene.net.host.exec("conntrack", &["-L", "-f", "ipv6"]);
        listed.lines().filter(|line| line.contains("ESTABLISHED")).count()
    };
    assert!(eventually(SOON, || flows() <= LIMIT), "{}", flows());
    let warning = up.wait_for_line("limit of tracked flows reached", SOON);
    assert!(warning.contains("largest=\"fe80::"), "{warning}");
    drop(held);
}
