//! Egress without a firewall: through the NAT engine, as root and as an ordinary user.

use super::matrix::peer_as_seen;
use super::scene::{Scene, refused, service_namespace, state};
use super::witness::Witness;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};
use tidegate_testbed::server::{PeerServer, Sink, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Mounts, Namespace, Process, Signal, addr, eventually};

const SOON: Duration = Duration::from_secs(10);
const MUCH: u64 = 50 << 20;

const FILE: &str = r#"
name: out
networks: { home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.81.1.0/24 }, { subnet: "fd81:1::/64" } ] } } }
services:
  box: { command: [ sleep, "60" ], networks: { home: { ipv4_address: 10.81.1.2 } }, ports: [ "8080:80" ] }
"#;

fn up(scene: &Scene, rootless: bool) -> (Process, Namespace) {
    let up =
        if rootless { scene.up_as_nobody(FILE) } else { scene.up_with(FILE, &["--firewall=none"]) };
    up.wait_for_line("Ctrl-C takes", SOON);
    let inside = service_namespace(&up, "box");
    (up, inside)
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to, SOON)
}

#[test]
fn transfers_are_complete_in_both_directions() {
    for rootless in [false, true] {
        let scene = Scene::new();
        let before = state(&scene.net.host);
        let (mut up, inside) = up(&scene, rootless);
        for world in [IpAddr::from(addr::CLIENT_V4), addr::CLIENT_V6.into()] {
            let sink = Sink::tcp(&scene.net.client, (world, 7001).into(), 3);
            inside.run(|| {
                let mut stream = connect(sink.addr()).unwrap();
                transfer::send(&mut stream, 3, MUCH).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
            });
            assert_eq!(
                sink.wait(1, 6 * SOON),
                [Transfer::complete(MUCH)],
                "rootless {rootless}, {world}"
            );
            let source = Source::tcp(&scene.net.client, (world, 7002).into(), 4, MUCH);
            let received =
                inside.run(|| transfer::receive(&mut connect(source.addr()).unwrap(), 4));
            assert_eq!(received, Transfer::complete(MUCH), "rootless {rootless}, {world}");

            // A refused connection is reported immediately.
            let begin = Instant::now();
            let refused = inside.run(|| connect((world, 7003).into()));
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert!(begin.elapsed() < SOON / 5);
        }
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&scene.net.host), before);
    }
}

/// Services on the host's loopback are not reachable at any address of the host.
#[test]
fn the_hosts_loopback_is_not_reachable() {
    for rootless in [false, true] {
        let scene = Scene::new();
        let (_up, inside) = up(&scene, rootless);
        let _secret = PeerServer::tcp(&scene.net.host, "127.0.0.1:9999".parse().unwrap());
        let _alias = PeerServer::tcp(&scene.net.host, "127.0.0.2:9998".parse().unwrap());
        for (to, port) in
            [("127.0.0.1", 9999), ("127.0.0.2", 9998), ("203.0.113.1", 9999), ("10.81.1.1", 9999)]
        {
            let to = SocketAddr::new(to.parse().unwrap(), port);
            let reached = inside.run(|| TcpStream::connect_timeout(&to, SOON / 10));
            assert!(reached.is_err(), "rootless {rootless}: {to}");
        }
        // Root in the container routes loopback addresses to the gateway.
        inside.sysctl("net.ipv4.conf.all.route_localnet", "1");
        inside.ip_all("addr del 127.0.0.1/8 dev lo\n route add 127.0.0.0/8 via 10.81.1.1");
        for port in [9999, 9998] {
            let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
            assert!(
                inside.run(|| TcpStream::connect_timeout(&to, SOON / 10)).is_err(),
                "rootless {rootless}: {to}"
            );
        }
    }
}

/// The addresses of the engine.
const ENGINE: [&str; 2] = ["169.254.116.103", "fd74:6964:6567:6174::1"];

#[test]
fn only_the_hosts_loopback_becomes_reachable_with_allow_host_loopback() {
    for (rootless, allowed) in [(false, false), (true, false), (false, true), (true, true)] {
        let scene = Scene::new();
        let mut flags = if rootless { vec![] } else { vec!["--firewall=none"] };
        flags.extend(allowed.then_some("--allow-host-loopback"));
        let file = FILE.to_owned()
            + "  other: { command: [ sleep, '60' ], networks: { away: { ipv4_address: 10.81.9.2 } } }\n"
            + "  isolated: { command: [ sleep, '60' ], networks: [ shut ] }\n";
        let networks = "networks: { away: { ipam: { config: [ { subnet: 10.81.9.0/24 } ] } }, shut: { internal: true }, ";
        let file = file.replace(
            "networks: { home: { enable_ipv6",
            &(networks.to_owned() + "home: { enable_ipv6"),
        );
        let up = if rootless {
            Process::spawn(scene.command_as_nobody(&file).args(&flags))
        } else {
            scene.up_with(&file, &flags)
        };
        up.wait_for_line("Ctrl-C takes", SOON);
        let inside = service_namespace(&up, "box");
        let host = &scene.net.host;
        let loopbacks: [SocketAddr; 2] =
            ["127.0.0.1:9999", "[::1]:9999"].map(|at| at.parse().unwrap());
        let _tcp = loopbacks.map(|at| PeerServer::tcp(host, at));
        let _udp = loopbacks.map(|at| PeerServer::udp(host, at));
        let timeout = if allowed { SOON } else { SOON / 10 };
        for to in ENGINE.map(|ip| SocketAddr::new(ip.parse().unwrap(), 9999)) {
            for udp in [false, true] {
                let seen = inside.run(|| peer_as_seen(to, udp, timeout));
                let is_right = seen.as_ref().is_ok_and(|peer| peer == "127.0.0.1" || peer == "::1");
                assert_eq!(is_right, allowed, "rootless {rootless}: {to} (udp {udp}): {seen:?}");
            }
        }
        // Other addresses of the host and other networks stay unreachable.
        let _other =
            PeerServer::tcp(&service_namespace(&up, "other"), "10.81.9.2:80".parse().unwrap());
        for (to, port) in
            [("203.0.113.1", 9999), ("10.81.1.1", 9999), ("10.81.9.1", 9999), ("10.81.9.2", 80)]
        {
            let to = SocketAddr::new(to.parse().unwrap(), port);
            let reached = inside.run(|| TcpStream::connect_timeout(&to, SOON / 10));
            assert!(reached.is_err(), "rootless {rootless}: {to}");
        }
        let isolated = service_namespace(&up, "isolated");
        isolated.ip_all("route add default dev eth0");
        let to = SocketAddr::new(ENGINE[0].parse().unwrap(), 9999);
        assert!(
            isolated.run(|| TcpStream::connect_timeout(&to, SOON / 10)).is_err(),
            "an internal network has no egress"
        );
    }
}

/// Old kernels have only a global switch for IPv6 forwarding, which would make the host a router.
#[test]
fn on_an_old_kernel_a_host_does_not_become_a_router() {
    let scene = Scene::lacking("all");
    scene.net.host.sysctl("net.ipv6.conf.all.forwarding", "0");
    let (mut up, inside) = up(&scene, false);
    let servers =
        ["203.0.113.9:7777", "[2001:db8:1::9]:7777"].map(|at| at.parse::<SocketAddr>().unwrap());
    let _servers = servers.map(|at| PeerServer::tcp(&scene.net.client, at));
    assert_eq!(inside.run(|| peer_as_seen(servers[0], false, SOON)).unwrap(), "203.0.113.1");
    assert!(inside.run(|| peer_as_seen(servers[1], false, SOON / 10)).is_err());
    assert_eq!(scene.net.host.read_sysctl("net.ipv6.conf.all.forwarding"), "0");
    assert!(up.output().contains("no egress over IPv6"), "{}", up.output());
    up.stop(Signal::INT, SOON);
}

#[test]
fn allow_host_loopback_is_rejected_with_a_firewall() {
    let scene = Scene::new();
    let printed =
        refused(scene.command(FILE).args(["--firewall=nftables", "--allow-host-loopback"]));
    assert!(printed.starts_with("tidegate: error: --allow-host-loopback: "), "{printed}");
    assert!(printed.contains("--firewall=none") && printed.lines().count() == 1, "{printed}");
}

/// A DNS server of the host, identified by the `address` in its answers.
fn dns_server(scene: &Scene, at: &str, address: &str) -> Process {
    let server = Process::spawn(scene.net.host.command("dnsmasq").args([
        "--no-daemon",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        &format!("--listen-address={at}"),
        "--bind-interfaces",
        &format!("--address=/example.test/{address}"),
        "--pid-file=",
        "--user=root",
    ]));
    server.wait_for_line("started", SOON);
    server
}

#[test]
fn the_engine_forwards_dns_to_the_current_servers_of_the_host() {
    for rootless in [false, true] {
        let mut scene = Scene::new();
        let file = scene.programs.path().join("resolv.conf");
        std::fs::write(&file, "nameserver 127.0.0.53\n").unwrap();
        let mounts = Mounts::builder().bind(&file, "/etc/resolv.conf").build(&scene.net.host);
        scene.net.host = scene.net.host.with_mounts(mounts);
        let _servers = [("127.0.0.53", "192.0.2.1"), ("127.0.0.54", "192.0.2.2")]
            .map(|(at, is)| dns_server(&scene, at, is));
        let (_up, inside) = up(&scene, rootless);
        let ask = |server: &str, how: &str| {
            let mut dig = inside.command("dig");
            dig.args([
                &format!("@{server}"),
                "+short",
                "+time=3",
                "+tries=1",
                how,
                "www.example.test",
            ]);
            String::from_utf8(dig.output().unwrap().stdout).unwrap().trim().to_owned()
        };
        for server in ENGINE {
            for how in ["+notcp", "+tcp"] {
                assert_eq!(ask(server, how), "192.0.2.1", "rootless {rootless}: {server} {how}");
            }
        }
        std::fs::write(&file, "nameserver 127.0.0.54\n").unwrap();
        let follows = || ENGINE.iter().all(|server| ask(server, "+notcp") == "192.0.2.2");
        assert!(eventually(SOON, follows), "rootless {rootless}: {}", ask(ENGINE[0], "+notcp"));
    }
}

/// An adopted container survives the kill of tidegate. Its packets must not be forwarded without
/// masquerading.
#[test]
fn a_killed_engine_forwards_nothing() {
    let scene = Scene::new();
    scene.net.host.sysctl("net.ipv4.ip_forward", "1");
    let inside = Namespace::new();
    let file = FILE
        .replace(r#"command: [ sleep, "60" ]"#, &format!("x-netns: {}", inside.path().display()));
    let mut up = scene.up_with(&file, &["--firewall=none"]);
    up.wait_for_line("Ctrl-C takes", SOON);
    let at: SocketAddr = "203.0.113.9:7777".parse().unwrap();
    let witness = Witness::new(&scene.net.client, &[at]);
    let socket = inside.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.send_to(b"alive", at).unwrap();
    socket.recv(&mut [0; 10]).unwrap();
    assert!(witness.has_seen("alive"));
    up.signal(Signal::KILL);
    up.wait(SOON);
    for _ in 0..5 {
        // The error may be an ICMP error for the previous datagram.
        let _ = socket.send_to(b"dead", at);
        std::thread::sleep(SOON / 100);
    }
    assert!(!witness.has_seen("dead"));
    let mut up = scene.up_with(&file, &["--firewall=none"]);
    up.wait_for_line("Ctrl-C takes", SOON);
    socket.send_to(b"again", at).unwrap();
    assert!(eventually(SOON, || {
        let _ = socket.send_to(b"again", at);
        witness.has_seen("again")
    }));
    up.stop(Signal::INT, SOON);
}
