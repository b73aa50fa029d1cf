//! Regression tests of attacks that security reviews have found.

use super::matrix::peer_as_seen;
use super::scene::{Scene, service_namespace, state};
use super::spoofing::{link_layer_address, mac_of};
use super::uplink::Uplink;
use super::witness::Witness;
use socket2::{Domain, Socket, Type};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tidegate_testbed::frames::{LinkSocket, checksum, ethernet, icmp6, ipv4, ipv6, udp4, udp6};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, Process, Signal, addr, eventually};

const SOON: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(300);
const FIREWALLS: [&str; 2] = ["--firewall=nftables", "--firewall=iptables"];

fn file(container: &Namespace, more: &str) -> String {
    format!(
        "name: attacked
networks: {{ home: {{ ipam: {{ config: [ {{ subnet: 10.77.1.0/24 }} ] }} }}, away: {{ ipam: {{ config: [ {{ subnet: 10.77.2.0/24 }} ] }} }} }}
services:
  server: {{ x-netns: {}, networks: {{ home: {{ ipv4_address: 10.77.1.10 }} }}{more} }}
",
        container.path().display()
    )
}

#[track_caller]
fn up(scene: &Scene, file: &str, flags: &[&str]) -> Process {
    let up = scene.up_with(file, flags);
    up.wait_for_line("Ctrl-C takes", SOON);
    up
}

/// A UDP socket with the spoofed source `address`.
fn spoofed_socket(namespace: &Namespace, address: &str) -> UdpSocket {
    let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None)).unwrap();
    socket.set_ip_transparent_v4(true).unwrap();
    socket.bind(&address.parse::<SocketAddr>().unwrap().into()).unwrap();
    UdpSocket::from(socket)
}

/// Conntrack is active before tidegate's rules exist, and two external hosts have created an entry
/// for the container's address.
#[test]
fn a_conntrack_entry_from_before_the_rules_grants_no_access() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let uplink = Uplink::new(&scene);
        scene.net.host.sysctl("net.ipv4.ip_forward", "1");
        scene.sh("nft add table ip others
                  nft add chain ip others seen '{ type filter hook prerouting priority 0; }'
                  nft add rule ip others seen ct state new counter");
        scene.net.client.ip_all("route add 10.77.0.0/16 via 203.0.113.1");
        let container = Namespace::new();
        let witness = Witness::new(&container, &["0.0.0.0:6666".parse().unwrap()]);
        let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:5000")).unwrap();
        let accomplice = spoofed_socket(&uplink.hostile, "10.77.1.10:6666");
        let create_entry = || {
            let _ = accomplice.send_to(b"I am the container", "203.0.113.9:5000");
            let _ = client.send_to(b"let me in", "10.77.1.10:6666");
            thread::sleep(Duration::from_millis(1));
        };
        (0..20).for_each(|_| create_entry());
        for _ in 0..3 {
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        create_entry();
                    }
                });
                let mut up = up(&scene, &file(&container, ""), &[firewall]);
                thread::sleep(PAUSE);
                up.signal(Signal::KILL);
                up.wait(SOON);
                over.store(true, Ordering::Relaxed);
            });
        }
        let _up = up(&scene, &file(&container, ""), &[firewall]);
        (0..20).for_each(|_| create_entry());
        let host = scene.net.host.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        assert!(eventually(SOON, || host.send_to(b"hello", "10.77.1.10:6666").is_ok()
            && witness.has_seen("hello")));
        assert!(!witness.has_seen("let me in"), "{firewall}");
    }
}

/// The client sends continuously, and the next instance does not publish the port.
#[test]
fn a_port_that_the_next_instance_does_not_publish_is_closed_after_a_kill() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let container = Namespace::new();
        let flags = [firewall, "--publish=kernel"];
        let mut first = up(&scene, &file(&container, ", ports: [ \"5300:53/udp\" ]"), &flags);
        let witness = Witness::new(&container, &["0.0.0.0:53".parse().unwrap()]);
        let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:5000")).unwrap();
        assert!(eventually(SOON, || {
            let _ = client.send_to(b"open", "203.0.113.1:5300");
            witness.has_seen("open")
        }));
        first.signal(Signal::KILL);
        first.wait(SOON);
        let _second = up(&scene, &file(&container, ""), &flags);
        for _ in 0..10 {
            let _ = client.send_to(b"shut", "203.0.113.1:5300");
            thread::sleep(PAUSE / 10);
        }
        assert!(!witness.has_seen("shut"), "{firewall}");
    }
}

/// Port shadowing (CVE-2021-3773): a container sends from the port number of a service of the host,
/// so that conntrack takes requests of a client to that service for replies to the container.
#[test]
fn a_container_cannot_shadow_ports_of_the_host() {
    for firewall in FIREWALLS {
        for publish in ["--publish=proxy", "--publish=kernel"] {
            assert_no_shadowing(firewall, publish);
        }
    }
}

fn assert_no_shadowing(firewall: &str, publish: &str) {
    /// A published port, one in the ephemeral range, and a service of the host.
    const PORTS: [u16; 3] = [8080, 40_000, 5300];
    let scene = Scene::new();
    let (server, attacker) = (Namespace::new(), Namespace::new());
    let more = format!(
        ", ports: [ '8080:80', '8080:80/udp', '40000:80', '40000:80/udp' ] }}\n  attacker: {{ x-netns: {}, networks: [ away ]",
        attacker.path().display()
    );
    let _up = up(&scene, &file(&server, &more), &[firewall, publish]);
    let at = |port: u16| SocketAddr::from(([0, 0, 0, 0], port));
    let host = &scene.net.host;
    let _servers = [PeerServer::tcp(&server, at(80)), PeerServer::udp(&server, at(80))];
    let _own = [PeerServer::tcp(host, at(5300)), PeerServer::udp(host, at(5300))];
    // The client drops SYN-ACKs for the attacker's connection. It would reset it otherwise.
    scene.net.client.exec(
        "sh",
        &[
            "-ec",
            "nft add table ip deaf
        nft add chain ip deaf input '{ type filter hook input priority 0; }'
        nft add rule ip deaf input tcp dport 5600-5700 'tcp flags & (syn | ack) == syn' drop",
        ],
    );
    for (number, port) in (0..).zip(PORTS) {
        let client_at = SocketAddr::from(([203, 0, 113, 9], 5600 + number));
        let service = SocketAddr::from(([203, 0, 113, 1], port));
        let case = format!("{firewall} {publish} {port}");

        let client = scene.net.client.run(|| UdpSocket::bind(client_at)).unwrap();
        let shadowing = attacker.run(|| UdpSocket::bind(at(port))).unwrap();
        for socket in [&client, &shadowing] {
            socket.set_read_timeout(Some(PAUSE)).unwrap();
        }
        let mut buffer = [0; 100];
        assert!(
            eventually(SOON, || {
                shadowing.send_to(b"mine", client_at).unwrap();
                client.recv(&mut buffer).is_ok_and(|length| &buffer[..length] == b"mine")
            }),
            "{case}: containers reach the outside"
        );
        while client.recv(&mut buffer).is_ok() {}
        client.send_to(b"?", service).unwrap();
        assert!(shadowing.recv(&mut buffer).is_err(), "{case}: UDP");
        assert!(client.recv(&mut buffer).is_ok(), "{case}: the service answers over UDP");

        let bound = |namespace: &Namespace, from: SocketAddr| {
            let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::STREAM, None)).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&from.into()).unwrap();
            socket
        };
        let shadowing = bound(&attacker, at(port));
        let connecting =
            thread::spawn(move || shadowing.connect_timeout(&client_at.into(), 5 * PAUSE));
        thread::sleep(PAUSE);
        let client = bound(&scene.net.client, client_at);
        client
            .connect_timeout(&service.into(), SOON)
            .unwrap_or_else(|error| panic!("{case}: {error}"));
        let mut client = TcpStream::from(client);
        client.set_read_timeout(Some(SOON)).unwrap();
        client.write_all(b"?").unwrap();
        assert!(
            client.read(&mut buffer).is_ok_and(|length| length > 0),
            "{case}: the service answers"
        );
        assert!(connecting.join().unwrap().is_err(), "{case}: TCP");
    }

    // Published while the attacker already sends from that port.
    let case = format!("{firewall} {publish}, published later");
    let (client_at, service) = ("203.0.113.9:5650", "203.0.113.1:41000");
    let client = scene.net.client.run(|| UdpSocket::bind(client_at)).unwrap();
    let shadowing = attacker.run(|| UdpSocket::bind(at(41_000))).unwrap();
    for socket in [&client, &shadowing] {
        socket.set_read_timeout(Some(PAUSE)).unwrap();
    }
    shadowing.send_to(b"mine", client_at).unwrap();
    let mut buffer = [0; 100];
    let (_, seen) = client.recv_from(&mut buffer).unwrap();
    assert_eq!(seen, service.parse().unwrap(), "{case}: an ephemeral port is kept");
    let mut curl = host.command("curl");
    curl.args(["-sSf", "--unix-socket"])
        .arg(scene.socket())
        .args(["http://tidegate/v1/ports", "-d"]);
    let published = curl.arg(r#"{"endpoint": "server", "spec": "41000:80/udp"}"#).output().unwrap();
    assert!(published.status.success(), "{case}: {published:?}");
    client.send_to(b"?", service).unwrap();
    assert!(shadowing.recv(&mut buffer).is_err(), "{case}");
    assert!(client.recv(&mut buffer).is_ok(), "{case}: the service answers");
    // Its further packets are masqueraded to another port.
    shadowing.send_to(b"mine", client_at).unwrap();
    let (_, seen) = client.recv_from(&mut buffer).unwrap();
    assert_ne!(seen, service.parse().unwrap(), "{case}");
}

/// Conntrack can create entries without NAT while rules are missing for a moment.
#[test]
fn a_conntrack_entry_without_nat_grants_no_access() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let _uplink = Uplink::new(&scene);
        scene.net.client.ip_all("route add 10.77.0.0/16 via 203.0.113.1");
        let container = Namespace::new();
        let _up = up(&scene, &file(&container, ""), &[firewall]);
        let witness = Witness::new(&container, &["0.0.0.0:6666".parse().unwrap()]);
        let (inside, outside) = (("10.77.1.10", "6666"), ("203.0.113.9", "5000"));
        for (from, to) in [(inside, outside), (outside, inside)] {
            scene.sh(&format!(
                "conntrack -F
                 conntrack -I -p udp -s {source} -d {destination} --sport {sport} --dport {dport} -u SEEN_REPLY,ASSURED -t 60",
                source = from.0,
                sport = from.1,
                destination = to.0,
                dport = to.1,
            ));
            let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:5000")).unwrap();
            for _ in 0..5 {
                let _ = client.send_to(b"let me in", "10.77.1.10:6666");
            }
        }
        let host = scene.net.host.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        assert!(eventually(SOON, || host.send_to(b"hello", "10.77.1.10:6666").is_ok()
            && witness.has_seen("hello")));
        assert!(!witness.has_seen("let me in"), "{firewall}");
    }
}

/// With `br_netfilter`, conntrack sees the packet on the bridge first, where it is not translated.
#[test]
fn a_packet_that_was_bridged_before_does_not_leave_without_masquerade() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        scene.net.host.sysctl("net.bridge.bridge-nf-call-iptables", "1");
        let [container, neighbour] = [(); 2].map(|()| Namespace::new());
        let neighbour_service = format!(
            "\n  neighbour: {{ x-netns: {}, networks: {{ home: {{ ipv4_address: 10.77.1.11 }} }} }}",
            neighbour.path().display()
        );
        let _up = up(&scene, &(file(&container, "") + &neighbour_service), &[firewall]);
        let mac = |namespace: &Namespace| {
            mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
        };
        let bridges = scene.net.host.ip(&["-o", "link", "show", "type", "bridge"]);
        let bridge = bridges.lines().find(|line| line.contains("tg-home")).unwrap();
        let gateway = mac_of(link_layer_address(bridge));
        let (own, neighbour) = (mac(&container), mac(&neighbour));
        let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:7000")).unwrap();
        client.set_read_timeout(Some(PAUSE)).unwrap();
        let link = LinkSocket::open(&container, "eth0");
        let send = |destination, port: u16| {
            let from = ("10.77.1.10".parse().unwrap(), port);
            let packet = udp4(from, ("203.0.113.9".parse().unwrap(), 7000), b"out");
            link.send(&ethernet(destination, own, 0x0800, &packet));
        };
        send(gateway, 40_000);
        assert_eq!(client.recv_from(&mut [0; 9]).unwrap().1, "203.0.113.1:40000".parse().unwrap());
        for (first, port) in [([0xff; 6], 40_001), (neighbour, 40_002)] {
            send(first, port);
            thread::sleep(PAUSE / 10);
            send(gateway, port);
            let seen = client.recv_from(&mut [0; 9]);
            assert!(seen.is_err(), "{firewall}: {seen:?}");
        }
    }
}

/// A neighbour of the host forges the source address of a container, in packets that conntrack
/// considers invalid or does not track. The kernel would return an ICMP error that quotes them.
#[test]
fn a_neighbour_cannot_have_the_host_send_its_payload_to_a_container() {
    const PAYLOAD: &[u8] = b"payload of the neighbour";
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let container = Namespace::new();
        scene.net.host.sysctl("net.ipv4.ipfrag_time", "1");
        let file = file(&container, "").replace(
            "home: { ipam: { config: [ { subnet: 10.77.1.0/24 } ] } }",
            "home: { internal: true, enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: 'fd77:1::/64' } ] } }",
        );
        let file = file.replace("10.77.1.10 }", "10.77.1.10, ipv6_address: 'fd77:1::10' }");
        let _up = up(&scene, &file, &[firewall]);
        let mac = |namespace: &Namespace| {
            mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
        };
        let (host, neighbour) = (mac(&scene.net.host), mac(&scene.net.client));
        // Errors about packets of the container arrive. Before the forged ones, because the kernel
        // limits the rate of errors to one destination.
        let traced = container.exec("ping", &["-c", "1", "-W", "5", "10.77.1.1"]);
        assert!(traced.contains("1 received"), "{traced}");
        let closed = container.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        closed.connect("10.77.1.1:9").unwrap();
        closed.set_read_timeout(Some(SOON)).unwrap();
        closed.send(b"to a closed port").unwrap();
        let refused = closed.recv(&mut [0; 9]).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{firewall}");
        let inside = LinkSocket::open(&container, "eth0");
        let link = LinkSocket::open(&scene.net.client, "eth0");
        let v4 = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap();
        let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap();
        for (to, to_v6) in [
            ("10.77.1.77", "fd77:1::77"),
            ("198.51.100.1", "2001:db8:9::9"),
            ("203.0.113.1", "2001:db8:1::1"),
        ] {
            // An echo reply that no one has requested.
            let mut reply = [&[0, 0, 0, 0, 0, 1, 0, 1][..], PAYLOAD].concat();
            let sum = checksum(&reply);
            reply[2..4].copy_from_slice(&sum.to_be_bytes());
            for ttl in [1, 64] {
                let mut packet = ipv4(v4("10.77.1.10"), v4(to), 1, &reply);
                packet[8] = ttl;
                packet[10..12].copy_from_slice(&[0, 0]);
                let sum = checksum(&packet[..20]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                link.send(&ethernet(host, neighbour, 0x0800, &packet));
            }
            // A fragment that is never completed.
            let mut packet = ipv4(v4("10.77.1.10"), v4(to), 17, &[PAYLOAD, PAYLOAD].concat());
            (packet[6], packet[10], packet[11]) = (0x20, 0, 0);
            let sum = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            link.send(&ethernet(host, neighbour, 0x0800, &packet));
            // An unknown hop-by-hop option whose type requires an error (RFC 8200, 4.2).
            let options = [&[59, 0, 0x80, 4, 0, 0, 0, 0][..], PAYLOAD].concat();
            let packet = ipv6(v6("fd77:1::10"), v6(to_v6), 0, &options);
            link.send(&ethernet(host, neighbour, 0x86dd, &packet));
            // MLD and neighbour discovery are not tracked.
            for kind in [130, 131, 132, 134, 135, 136, 143] {
                let target = v6(to_v6).octets();
                let message = [&[kind, 0, 0, 0, 0, 0, 0, 0][..], &target, PAYLOAD].concat();
                for hops in [1, 255] {
                    let mut packet = icmp6(v6("fd77:1::10"), v6(to_v6), &message);
                    packet[7] = hops;
                    link.send(&ethernet(host, neighbour, 0x86dd, &packet));
                }
            }
        }
        // Errors about fragments follow after `ipfrag_time`.
        thread::sleep(Duration::from_secs(2));
        let received = inside.received();
        let quotes =
            |frame: &&Vec<u8>| frame.windows(PAYLOAD.len()).any(|window| window == PAYLOAD);
        let quoting: Vec<_> = received.iter().filter(quotes).collect();
        assert!(quoting.is_empty(), "{firewall}: {quoting:x?}");
    }
}

/// A container spoofs the address of the server that a container of another network talks to.
#[test]
fn a_container_cannot_inject_packets_into_flows_of_another_network() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let (victim, other_network) = (Namespace::new(), Namespace::new());
        let more = format!(
            " }}\n  other: {{ x-netns: {}, networks: [ away ]",
            other_network.path().display()
        );
        let _up = up(&scene, &file(&victim, &more), &[firewall]);
        let server = Witness::new(&scene.net.client, &["203.0.113.9:9999".parse().unwrap()]);
        let asks = victim.run(|| UdpSocket::bind("0.0.0.0:4444")).unwrap();
        asks.set_read_timeout(Some(PAUSE)).unwrap();
        assert!(eventually(SOON, || {
            asks.send_to(b"question", "203.0.113.9:9999").unwrap();
            asks.recv(&mut [0; 9]).is_ok()
        }));
        assert!(server.has_seen("question"));
        while asks.recv(&mut [0; 9]).is_ok() {}
        let spoofer = spoofed_socket(&other_network, "203.0.113.9:9999");
        for _ in 0..5 {
            spoofer.send_to(b"spoofed", "203.0.113.1:4444").unwrap();
        }
        assert!(asks.recv(&mut [0; 9]).is_err(), "{firewall}");
    }
}

/// The first rule of a typical user chain accepts established connections. A connection accepted
/// before the rules are in force would therefore stay open.
#[test]
fn no_connection_is_accepted_before_the_users_rules_are_in_force() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let container = Namespace::new();
        let file = file(&container, ", ports: [ \"8080:80\", \"8080:80/udp\" ]");
        let flags = [firewall, "--publish=proxy"];
        let mut first = up(&scene, &file, &flags);
        let _server = PeerServer::tcp(&container, "0.0.0.0:80".parse().unwrap());
        scene.sh(if firewall == FIREWALLS[0] {
            "nft add rule inet tidegate_user TIDEGATE-USER ct state established accept
             nft add rule inet tidegate_user TIDEGATE-USER ip saddr 203.0.113.9 drop"
        } else {
            "iptables -A TIDEGATE-USER -m conntrack --ctstate ESTABLISHED -j ACCEPT
             iptables -A TIDEGATE-USER -s 203.0.113.9 -j DROP"
        });
        first.stop(Signal::INT, SOON);
        let over = Arc::new(AtomicBool::new(false));
        let at: SocketAddr = "203.0.113.1:8080".parse().unwrap();
        let prober = {
            let over = Arc::clone(&over);
            scene.net.client.spawn_thread(move || {
                let mut served = 0;
                while !over.load(Ordering::Relaxed) {
                    served += usize::from(peer_as_seen(at, false, PAUSE).is_ok());
                }
                served
            })
        };
        for _ in 0..4 {
            let mut next = up(&scene, &file, &flags);
            thread::sleep(PAUSE);
            next.stop(Signal::INT, SOON);
        }
        over.store(true, Ordering::Relaxed);
        assert_eq!(prober.join().unwrap(), 0, "{firewall}");
    }
}

/// A router with forwarding enabled per link instead of globally.
#[test]
fn a_host_with_forwarding_per_link_keeps_forwarding() {
    let scene = Scene::new();
    let uplink = Uplink::new(&scene);
    scene.net.host.sysctl("net.ipv4.ip_forward", "0");
    for link in ["eth0", "eth1"] {
        scene.net.host.sysctl(&format!("net.ipv4.conf.{link}.forwarding"), "1");
    }
    let before = state(&scene.net.host);
    let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
    let _server = scene.net.client.run(|| TcpListener::bind(at)).unwrap();
    let passes = || uplink.client.run(|| TcpStream::connect_timeout(&at, SOON)).is_ok();
    assert!(passes());
    let container = Namespace::new();
    for firewall in FIREWALLS {
        let mut up = up(&scene, &file(&container, ""), &[firewall]);
        assert!(passes(), "{firewall}");
        assert!(container.run(|| TcpStream::connect_timeout(&at, SOON)).is_ok(), "{firewall}");
        up.stop(Signal::INT, SOON);
        assert!(passes(), "{firewall}");
        for link in ["eth0", "eth1"] {
            assert_eq!(
                scene.net.host.read_sysctl(&format!("net.ipv4.conf.{link}.forwarding")),
                "1"
            );
        }
        assert_eq!(state(&scene.net.host), before, "{firewall}");
    }
}

/// The host does not forward. The hashes of both project names select the same routing table of the
/// NAT engine.
#[test]
fn two_projects_both_have_egress() {
    for flags in [&["--firewall=nftables"], &["--firewall=iptables"], &["--firewall=none"]] {
        let scene = Scene::new();
        scene.net.host.sysctl("net.ipv4.ip_forward", "0");
        let before = state(&scene.net.host);
        let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
        let _server = scene.net.client.run(|| TcpListener::bind(at)).unwrap();
        let file = |name: &str| {
            format!("name: {name}\nservices: {{ box: {{ command: [ sleep, '60' ] }} }}\n")
        };
        let has_egress = |up: &Process| {
            let inside = service_namespace(up, "box");
            eventually(SOON, || inside.run(|| TcpStream::connect_timeout(&at, 3 * PAUSE)).is_ok())
        };
        let mut first = up(&scene, &file("rva"), flags);
        assert!(has_egress(&first), "{flags:?}");
        let mut second = scene.up_beside(&file("rv1099"), flags);
        second.wait_for_line("Ctrl-C takes", SOON);
        assert!(has_egress(&second) && has_egress(&first), "{flags:?}: both");
        first.stop(Signal::INT, SOON);
        assert!(has_egress(&second), "{flags:?}: after the end of the other");
        second.stop(Signal::INT, SOON);
        assert_eq!(state(&scene.net.host), before, "{flags:?}");
    }
}

/// Each instance is notified of every change of rules, its own and those of others.
#[test]
fn projects_that_start_together_do_not_restore_each_others_rules() {
    let modes: [&[&str]; 4] = [
        &["--firewall=nftables"],
        &["--firewall=nftables", "--publish=kernel"],
        &["--firewall=iptables", "--publish=kernel"],
        &["--firewall=none"],
    ];
    for flags in modes {
        let scene = Scene::new();
        let before = state(&scene.net.host);
        let containers: [Namespace; 4] = std::array::from_fn(|_| Namespace::new());
        let mut projects: Vec<Process> = containers
            .iter()
            .enumerate()
            .map(|(number, container)| {
                let file = format!(
                    "name: together{number}
networks:
  net:
    enable_ipv6: true
    ipam: {{ config: [ {{ subnet: 10.81.{number}.0/24 }}, {{ subnet: 'fd81:{number}::/64' }} ] }}
services:
  box:
    x-netns: {}
    networks: {{ net: {{ x-any-source: true }} }}
    ports: [ '{}:80', '{}:53/udp' ]
",
                    container.path().display(),
                    8080 + number,
                    5353 + number,
                );
                scene.up_in(&format!("together{number}"), &file, flags)
            })
            .collect();
        for project in &projects {
            project.wait_for_line("Ctrl-C takes", 4 * SOON);
        }
        thread::sleep(Duration::from_secs(1));
        for project in &mut projects {
            let output = project.output();
            assert!(!output.contains("restored"), "{flags:?}: {output}");
            project.stop(Signal::INT, SOON);
        }
        assert_eq!(state(&scene.net.host), before, "{flags:?}");
    }
}

#[test]
fn there_is_egress_without_ipv6() {
    let scene = Scene::new();
    for key in ["all", "default"] {
        scene.net.host.sysctl(&format!("net.ipv6.conf.{key}.disable_ipv6"), "1");
    }
    let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
    let _server = scene.net.client.run(|| TcpListener::bind(at)).unwrap();
    let container = Namespace::new();
    let _up = up(&scene, &file(&container, ""), &["--firewall=none"]);
    assert!(container.run(|| TcpStream::connect_timeout(&at, SOON)).is_ok());
}

/// The container network of other software is created while the project is up.
#[test]
fn the_nat_engine_denies_access_to_container_networks_of_other_software() {
    let scene = Scene::new();
    let container = Namespace::new();
    let _up = up(&scene, &file(&container, ""), &["--firewall=none"]);
    let theirs = Namespace::new();
    scene.net.host.ip_all(&format!(
        "link add br-0123456789ab type bridge
         addr add 10.99.0.1/24 dev br-0123456789ab
         link set br-0123456789ab up
         link add their0 type veth peer name eth0 netns {}
         link set their0 master br-0123456789ab up",
        theirs.path().display()
    ));
    theirs.ip_all(
        "addr add 10.99.0.2/24 dev eth0\n link set eth0 up\n route add default via 10.99.0.1",
    );
    let at: SocketAddr = "10.99.0.2:80".parse().unwrap();
    let _server = theirs.run(|| TcpListener::bind(at)).unwrap();
    assert!(scene.net.host.run(|| TcpStream::connect_timeout(&at, SOON)).is_ok());
    assert!(eventually(SOON, || container.run(|| TcpStream::connect_timeout(&at, PAUSE)).is_err()));
    let outside: SocketAddr = "203.0.113.9:7000".parse().unwrap();
    let _outside = scene.net.client.run(|| TcpListener::bind(outside)).unwrap();
    assert!(container.run(|| TcpStream::connect_timeout(&outside, SOON)).is_ok());
}

#[test]
fn dns_queries_are_answered_while_iptables_hangs() {
    let scene = Scene::new();
    scene.sh("iptables -A INPUT -i none -j DROP");
    let container = Namespace::new();
    let _up = up(&scene, &file(&container, ""), &["--firewall=nftables"]);
    super::firewall::program(&scene, "iptables-save", "sleep 30");
    scene.net.host.exec("nft", &["add table ip foo"]);
    thread::sleep(5 * PAUSE);
    let output = container
        .command("dig")
        .args(["@127.0.0.11", "+short", "+time=2", "+tries=1", "server"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "10.77.1.10");
}

/// Conntrack distinguishes flows of these protocols by their addresses only. Packets of the peer to
/// the host would be delivered to the container as replies.
#[test]
fn protocols_without_ports_or_identifiers_are_not_masqueraded() {
    const PROTOCOLS: [u8; 9] = [4, 33, 41, 47, 50, 51, 89, 112, 115];
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let container = Namespace::new();
        let _up = up(&scene, &file(&container, ""), &[firewall]);
        let outside = LinkSocket::open(&scene.net.client, "eth0");
        let client = SocketAddr::from(([203, 0, 113, 9], 9));
        for protocol in PROTOCOLS {
            let kind = Some(socket2::Protocol::from(i32::from(protocol)));
            let raw = container.run(|| Socket::new(Domain::IPV4, Type::RAW, kind)).unwrap();
            raw.send_to(&[0; 64], &client.into()).unwrap();
        }
        let udp = container.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
        let mut seen = BTreeSet::new();
        assert!(eventually(SOON, || {
            udp.send_to(b"hello", client).unwrap();
            let frames = outside.received();
            // The protocol field of IPv4.
            seen.extend(frames.iter().filter(|one| one[12..14] == [8, 0]).map(|one| one[23]));
            seen.contains(&17)
        }));
        assert!(PROTOCOLS.iter().all(|one| !seen.contains(one)), "{firewall}: {seen:?}");
    }
}

/// The endpoint may send from any source address, and the reverse path filter is off.
#[test]
fn the_nat_engine_rejects_sources_of_another_network() {
    let scene = Scene::new();
    let (server, router) = (Namespace::new(), Namespace::new());
    let more = format!(
        " }}\n  router: {{ x-netns: {}, networks: {{ away: {{ ipv4_address: 10.77.2.10, x-any-source: true }} }}",
        router.path().display()
    );
    let _up = up(&scene, &file(&server, &more), &["--firewall=none"]);
    let links = scene.net.host.ip(&["-o", "link", "show", "type", "bridge"]);
    let bridges = links.lines().filter_map(|line| line.split(": ").nth(1));
    for key in bridges.chain(["all"]) {
        scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
    }
    let witness = Witness::new(&scene.net.client, &["203.0.113.9:9999".parse().unwrap()]);
    let forged = spoofed_socket(&router, "10.77.1.10:4444");
    let own = router.run(|| UdpSocket::bind("10.77.2.10:4444")).unwrap();
    assert!(eventually(SOON, || {
        forged.send_to(b"I am the server", "203.0.113.9:9999").unwrap();
        own.send_to(b"router", "203.0.113.9:9999").unwrap();
        witness.has_seen("router")
    }));
    thread::sleep(PAUSE);
    assert!(!witness.has_seen("I am the server"));
}

/// For IPv4, the kernel drops such packets as martians.
#[test]
fn external_packets_with_a_source_address_of_the_host_are_dropped_over_ipv6() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let container = Namespace::new();
        let file = format!(
            "name: attacked
networks: {{ home: {{ enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.77.1.0/24 }}, {{ subnet: 'fd77:1::/64' }} ] }} }} }}
services:
  server: {{ x-netns: {}, networks: {{ home: {{ ipv6_address: 'fd77:1::10' }} }}, ports: [ '8080:80/udp' ] }}
",
            container.path().display()
        );
        let _up = up(&scene, &file, &[firewall, "--publish=kernel"]);
        let witness = Witness::new(&container, &["[::]:80".parse().unwrap()]);
        let mac = |namespace: &Namespace| {
            mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
        };
        let (host, client) = (mac(&scene.net.host), mac(&scene.net.client));
        let link = LinkSocket::open(&scene.net.client, "eth0");
        let send = |source: Ipv6Addr, text: &[u8]| {
            let packet = udp6((source, 5000), (addr::HOST_V6, 8080), text);
            link.send(&ethernet(host, client, 0x86dd, &packet));
        };
        assert!(eventually(SOON, || {
            send(addr::HOST_V6, b"I am the host");
            send(addr::CLIENT_V6, b"client");
            witness.has_seen("client")
        }));
        thread::sleep(PAUSE);
        assert!(!witness.has_seen("I am the host"), "{firewall}");
    }
}

/// The host forwards only for container networks, and other software has a policy rule that
/// tidegate's rules cannot precede.
#[test]
fn a_preceding_policy_rule_does_not_make_the_host_a_router() {
    for firewall in FIREWALLS {
        let scene = Scene::new();
        let uplink = Uplink::new(&scene);
        for key in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            scene.net.host.sysctl(key, "0");
        }
        scene.sh("ip rule add pref 0 lookup main; ip -6 rule add pref 0 lookup main");
        let (one, two) = (Namespace::new(), Namespace::new());
        let _up = up(&scene, &file(&one, ""), &[firewall]);
        let beside = scene.up_beside(
            &format!(
                "name: beside
networks: {{ net: {{ driver_opts: {{ com.docker.network.bridge.name: theirs0 }}, ipam: {{ config: [ {{ subnet: 10.78.1.0/24 }} ] }} }} }}
services: {{ box: {{ x-netns: {}, networks: [ net ] }} }}
",
                two.path().display()
            ),
            &[firewall],
        );
        beside.wait_for_line("Ctrl-C takes", SOON);
        let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
        let _server = PeerServer::tcp(&scene.net.client, at);
        let reaches =
            |from: &Namespace| from.run(|| TcpStream::connect_timeout(&at, 3 * PAUSE)).is_ok();
        assert!(eventually(SOON, || reaches(&one) && reaches(&two)), "{firewall}: egress");
        assert!(!reaches(&uplink.client), "{firewall}");
    }
}

/// The kernel finds a ping socket by its identifier and local address, and ignores the sender.
#[test]
fn an_echo_reply_from_another_network_is_not_delivered() {
    let scene = Scene::new();
    scene.net.client.sysctl("net.ipv4.icmp_echo_ignore_all", "1");
    let (server, other_network) = (Namespace::new(), Namespace::new());
    let more =
        format!(" }}\n  other: {{ x-netns: {}, networks: [ away ]", other_network.path().display());
    let _up = up(&scene, &file(&server, &more), &["--firewall=none"]);
    let raw = other_network
        .run(|| Socket::new(Domain::IPV4, Type::RAW, Some(socket2::Protocol::ICMPV4)))
        .unwrap();
    let host = SocketAddr::from(([203, 0, 113, 1], 0)).into();
    thread::scope(|scope| {
        let ping = scope.spawn(|| {
            let mut ping = server.command("ping");
            ping.args(["-c", "10", "-i", "0.3", "-W", "1", "203.0.113.9"]).output().unwrap()
        });
        for number in 0_u32.. {
            if ping.is_finished() {
                break;
            }
            let mut reply = [0; 16];
            reply[4..6].copy_from_slice(&(number as u16).to_be_bytes());
            reply[6..8].copy_from_slice(&1_u16.to_be_bytes());
            let sum = checksum(&reply);
            reply[2..4].copy_from_slice(&sum.to_be_bytes());
            let _ = raw.send_to(&reply, &host);
        }
        let output = String::from_utf8(ping.join().unwrap().stdout).unwrap();
        assert!(output.contains(" 0 received"), "{output}");
    });
}

const INTERNAL: &str = r#"
name: attacked
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  away: { ipam: { config: [ { subnet: 10.77.2.0/24 } ] } }
  inside: { internal: true, enable_ipv6: true, ipam: { config: [ { subnet: 10.77.3.0/24 }, { subnet: "fd77:3::/64" } ] } }
services:
  guest: { x-netns: GUEST, networks: { home: { ipv4_address: 10.77.1.10, ipv6_address: "fd77:1::10" } } }
  router: { x-netns: ROUTER, networks: { away: { ipv4_address: 10.77.2.10, x-any-source: true } } }
  server: { x-netns: SERVER, networks: { inside: { ipv4_address: 10.77.3.10, ipv6_address: "fd77:3::10" } }, ports: [ "5002:5000/udp", "8082:80" ] }
  client: { x-netns: CLIENT, networks: [ inside ] }
"#;

/// The namespaces of the services of [`INTERNAL`], in this order.
fn internal() -> ([Namespace; 4], String) {
    let namespaces = [(); 4].map(|()| Namespace::new());
    let names = ["GUEST", "ROUTER", "SERVER", "CLIENT"];
    let file =
        names.iter().zip(&namespaces).fold(INTERNAL.to_owned(), |file, (name, namespace)| {
            file.replace(name, namespace.path().to_str().unwrap())
        });
    (namespaces, file)
}

/// The ports of the UDP sockets of the host towards `peer`.
fn ports_towards(host: &Namespace, peer: &str) -> Vec<u16> {
    let output = host.command("ss").args(["-uanH"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let sockets = text.lines().filter(|line| line.contains(peer));
    let local = sockets.filter_map(|line| line.split_whitespace().nth(3)?.rsplit(':').next());
    local.filter_map(|port| port.parse().ok()).collect()
}

/// Root in a container with `x-any-source`, and a neighbour on the link of the host, forge replies
/// to the sockets of the host: those of the NAT engine towards the outside, and those of UDP
/// sessions of a port that a container on an internal network publishes.
#[test]
fn forged_replies_reach_no_socket_of_the_host() {
    let scene = Scene::new();
    let ([guest, router, server, _client], file) = internal();
    let _up = up(&scene, &file, &["--firewall=none"]);
    let links = scene.net.host.ip(&["-o", "link"]);
    for key in links.lines().filter_map(|line| line.split(": ").nth(1)).chain(["all"]) {
        let key = key.split('@').next().unwrap();
        scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
    }
    let outside = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:6000")).unwrap();
    outside.set_read_timeout(Some(PAUSE)).unwrap();
    let own = guest.run(|| UdpSocket::bind("10.77.1.10:4000")).unwrap();
    own.set_read_timeout(Some(PAUSE)).unwrap();
    let mut buffer = [0; 64];
    let mapped = (0..50).find_map(|_| {
        own.send_to(b"question", "203.0.113.9:6000").unwrap();
        Some(outside.recv_from(&mut [0; 64]).ok()?.1)
    });
    let mapped = mapped.expect("egress through the engine");
    let forged = spoofed_socket(&router, "203.0.113.9:6000");
    for _ in 0..20 {
        forged.send_to(b"forged", mapped).unwrap();
    }
    outside.send_to(b"answer", mapped).unwrap();
    let received = own.recv(&mut buffer).map(|length| &buffer[..length]);
    assert_eq!(received.unwrap(), b"answer", "the reply of the outside server is the first");

    let echo = server.run(|| UdpSocket::bind("0.0.0.0:5000")).unwrap();
    echo.set_read_timeout(Some(PAUSE)).unwrap();
    let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:7778")).unwrap();
    client.set_read_timeout(Some(PAUSE)).unwrap();
    let port = SocketAddr::from(([203, 0, 113, 1], 5002));
    let session = (0..50).find_map(|_| {
        client.send_to(b"question", port).unwrap();
        Some(echo.recv_from(&mut [0; 64]).ok()?.1)
    });
    let session = session.expect("the port is published");
    let sockets = ports_towards(&scene.net.host, "10.77.3.10:5000");
    assert_eq!(sockets, [session.port()], "the session has a socket of the host");
    // The neighbour has a route to the gateway address through the host.
    scene.net.client.ip_all("route add 10.77.3.0/24 via 203.0.113.1");
    router.ip_all("route add 10.77.3.0/24 via 10.77.2.1");
    let forgers = [&router, &scene.net.client].map(|from| spoofed_socket(from, "10.77.3.10:5000"));
    for forged in forgers.iter().cycle().take(40) {
        let _ = forged.send_to(b"forged", session);
    }
    echo.send_to(b"answer", session).unwrap();
    let received = client.recv(&mut buffer).map(|length| &buffer[..length]);
    assert_eq!(received.unwrap(), b"answer", "the reply of the container is the first");
}

/// A container that trusts its own address must not take neighbours and processes of the host for
/// itself. It has no default route that would name a gateway.
#[test]
fn clients_of_a_port_on_an_internal_network_have_the_address_of_the_gateway() {
    for flags in [&["--firewall=none"][..], &["--firewall=nftables", "--publish=kernel"]] {
        let scene = Scene::new();
        let ([_guest, _router, server, client], file) = internal();
        let _up = up(&scene, &file, flags);
        let _server = PeerServer::tcp(&server, "[::]:80".parse().unwrap());
        for (from, to) in [
            (&scene.net.host, "127.0.0.1:8082"),
            (&scene.net.host, "203.0.113.1:8082"),
            (&client, "10.77.3.1:8082"),
            (&server, "10.77.3.1:8082"),
            (&client, "[fd77:3::1]:8082"),
        ] {
            let seen = from.run(|| peer_as_seen(to.parse().unwrap(), false, SOON));
            let expected = if to.starts_with('[') { "fd77:3::1" } else { "10.77.3.1" };
            let seen: IpAddr = seen.unwrap().parse().unwrap();
            assert_eq!(seen.to_canonical().to_string(), expected, "{flags:?}: {to}");
        }
    }
}

/// A neighbour on the link of the host forges the reply of a container to a session of `tidegate
/// publish` without the namespace of the container. With the address of the client as the source,
/// the socket has an address that the neighbour knows.
#[test]
fn forged_replies_reach_no_session_of_publish() {
    let scene = Scene::new();
    let ([guest, _router, _server, _client], file) = internal();
    let _up = up(&scene, &file, &["--firewall=none"]);
    for key in ["eth0", "all"] {
        scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
    }
    let echo = guest.run(|| UdpSocket::bind("0.0.0.0:5000")).unwrap();
    echo.set_read_timeout(Some(PAUSE)).unwrap();
    let mac = |namespace: &Namespace| {
        mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
    };
    let (host, neighbor) = (mac(&scene.net.host), mac(&scene.net.client));
    let link = LinkSocket::open(&scene.net.client, "eth0");
    for (source, published) in [("proxy", 7081), ("client", 7082)] {
        let mut publish = scene.tidegate();
        publish.args(["publish", &format!("{published}:5000/udp"), "--source", source]);
        let publish = Process::spawn(publish.args(["--to", "10.77.1.10"]));
        publish.wait_for_line("0.0.0.0:", SOON);
        let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:7778")).unwrap();
        client.set_read_timeout(Some(PAUSE)).unwrap();
        client.connect((addr::HOST_V4, published)).unwrap();
        let session = (0..50).find_map(|_| {
            client.send(b"question").unwrap();
            Some(echo.recv_from(&mut [0; 64]).ok()?.1)
        });
        let session = session.unwrap_or_else(|| panic!("{source}: {}", publish.output()));
        let SocketAddr::V4(session) = session else { panic!("{session}") };
        let expected = if source == "client" { "203.0.113.9" } else { "10.77.1.1" };
        assert_eq!(session.ip().to_string(), expected);
        // The kernel remembers the route of the first reply for the socket.
        let mut buffer = [0; 64];
        let mut receive = || client.recv(&mut buffer).map(|length| buffer[..length].to_vec());
        echo.send_to(b"first", session).unwrap();
        assert_eq!(receive().unwrap(), b"first", "{source}");
        for _ in 0..20 {
            let from = ([10, 77, 1, 10].into(), 5000);
            let packet = udp4(from, (*session.ip(), session.port()), b"forged");
            link.send(&ethernet(host, neighbor, 0x0800, &packet));
        }
        thread::sleep(PAUSE);
        echo.send_to(b"answer", session).unwrap();
        assert_eq!(receive().unwrap(), b"answer", "{source}: only the container's replies arrive");
    }
}

/// Part `range` of an IPv4 packet, whose identification is 77.
fn fragment(packet: &[u8], range: std::ops::Range<usize>) -> Vec<u8> {
    const HEADER: usize = 20;
    let (head, payload) = packet.split_at(HEADER);
    let mut head = head.to_vec();
    let more = u16::from(range.end < payload.len()) << 13;
    let offset = (range.start / 8) as u16;
    head[2..4].copy_from_slice(&((HEADER + range.len()) as u16).to_be_bytes());
    head[4..6].copy_from_slice(&77_u16.to_be_bytes());
    head[6..8].copy_from_slice(&(more | offset).to_be_bytes());
    head[10..12].fill(0);
    let sum = checksum(&head);
    head[10..12].copy_from_slice(&sum.to_be_bytes());
    [&head, &payload[range]].concat()
}

/// Conntrack reassembles packets regardless of their interface. A neighbour of the host, and an
/// endpoint on another network that may use any address, send the second part of a datagram of a
/// container. iptables has no rule before the reassembly (docs/networks.md, known gaps).
#[test]
fn forged_fragments_are_not_mixed_into_datagrams_of_a_container() {
    let scene = Scene::new();
    let (container, router) = (Namespace::new(), Namespace::new());
    let more = format!(
        " }}\n  router: {{ x-netns: {}, networks: {{ away: {{ x-any-source: true }} }}",
        router.path().display()
    );
    let _up = up(&scene, &file(&container, &more), &["--firewall=nftables"]);
    let service = scene.net.host.run(|| UdpSocket::bind("10.77.1.1:6000")).unwrap();
    let mac = |namespace: &Namespace| {
        mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
    };
    let gateway_of = |namespace: &Namespace, gateway: &str| {
        namespace.exec("ping", &["-c", "1", "-W", "5", gateway]);
        let neighbours = namespace.ip(&["neigh", "show", gateway]);
        mac_of(neighbours.split("lladdr ").nth(1).unwrap().split(' ').next().unwrap())
    };
    let own = LinkSocket::sender(&container, "eth0");
    let own_macs = (gateway_of(&container, "10.77.1.1"), mac(&container));
    let datagram = |text: &[u8; 24]| {
        let source = ([10, 77, 1, 10].into(), 5000);
        let mut packet = udp4(source, ([10, 77, 1, 1].into(), 6000), text);
        // Without a checksum.
        packet[26..28].fill(0);
        packet
    };
    let honest = datagram(b"the honest second part..");
    let forged = datagram(b"the honest forged part!!");
    let attackers = [
        (&scene.net.client, (mac(&scene.net.host), mac(&scene.net.client))),
        (&router, (gateway_of(&router, "10.77.2.1"), mac(&router))),
    ];
    for (attacker, macs) in attackers {
        let link = LinkSocket::sender(attacker, "eth0");
        // The last part to arrive decides on which interface the datagram has been received.
        link.send(&ethernet(macs.0, macs.1, 0x0800, &fragment(&forged, 16..32)));
        thread::sleep(PAUSE / 3);
        own.send(&ethernet(own_macs.0, own_macs.1, 0x0800, &fragment(&honest, 0..16)));
        service.set_read_timeout(Some(PAUSE)).unwrap();
        let mixed = service.recv(&mut [0; 64]);
        assert!(mixed.is_err(), "{mixed:?}");
        own.send(&ethernet(own_macs.0, own_macs.1, 0x0800, &fragment(&honest, 16..32)));
        service.set_read_timeout(Some(SOON)).unwrap();
        let mut buffer = [0; 64];
        let length = service.recv(&mut buffer).unwrap();
        assert_eq!(String::from_utf8_lossy(&buffer[..length]), "the honest second part..");
    }
}

/// The kernel answers some packets with an ICMP error before any rule sees them. The error carries
/// their payload to the source: with a forged source of a known flow, to a container.
#[test]
fn errors_about_forged_packets_reach_no_container() {
    for flags in ["--firewall=nftables", "--firewall=iptables", "--firewall=none"] {
        for is_bridged in [false, true] {
            errors_about_forged_packets(flags, is_bridged);
        }
    }
}

/// With `is_bridged`, the uplink of the host is the port of a bridge.
fn errors_about_forged_packets(flags: &str, is_bridged: bool) {
    const TEXT: &[u8; 24] = b"payload of the attacker.";
    let scene = Scene::new();
    let uplink = if is_bridged { "uplink" } else { "eth0" };
    if is_bridged {
        scene.net.host.ip_all(
            "link add uplink address 02:00:00:00:0b:0b type bridge
             addr flush dev eth0
             link set eth0 master uplink
             addr add 203.0.113.1/24 dev uplink
             addr add 2001:db8:1::1/64 dev uplink nodad
             link set uplink up",
        );
    }
    scene.net.host.sysctl("net.ipv4.ipfrag_time", "1");
    scene.net.host.sysctl("net.ipv6.ip6frag_time", "1");
    // A router answers packets whose time to live is over.
    scene.net.host.sysctl("net.ipv4.ip_forward", "1");
    scene.net.host.sysctl("net.ipv6.conf.all.forwarding", "1");
    let [container, insider, router] = [(); 3].map(|()| Namespace::new());
    let text = format!(
        "name: attacked
networks:
  home: {{ enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.77.1.0/24 }}, {{ subnet: \"fd77:1::/64\" }} ] }} }}
  away: {{ enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.77.2.0/24 }}, {{ subnet: \"fd77:2::/64\" }} ] }} }}
  inside: {{ internal: true, enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.77.3.0/24 }}, {{ subnet: \"fd77:3::/64\" }} ] }} }}
services:
  server: {{ x-netns: {}, networks: {{ home: {{ ipv4_address: 10.77.1.10, ipv6_address: \"fd77:1::10\" }} }} }}
  insider: {{ x-netns: {}, networks: {{ inside: {{ ipv4_address: 10.77.3.10, ipv6_address: \"fd77:3::10\" }} }} }}
  router: {{ x-netns: {}, networks: {{ away: {{ x-any-source: true }} }} }}
",
        container.path().display(),
        insider.path().display(),
        router.path().display()
    );
    let _up = up(&scene, &text, &[flags]);
    // Flows that the attackers know: to the host, and to the outside.
    let flows = [
        (&insider, "10.77.3.10", "10.77.3.1"),
        (&insider, "fd77:3::10", "fd77:3::1"),
        (&container, "10.77.1.10", "10.77.1.1"),
        (&container, "fd77:1::10", "fd77:1::1"),
        (&container, "10.77.1.10", "203.0.113.9"),
        (&container, "fd77:1::10", "2001:db8:1::9"),
    ];
    let _echoes = [
        EchoServer::udp(&scene.net.host, "[::]:7778".parse().unwrap()),
        EchoServer::udp(&scene.net.client, "[::]:7778".parse().unwrap()),
    ];
    let ask = |from: &Namespace, source: &str, to: &str| {
        let (source, to): (IpAddr, IpAddr) = (source.parse().unwrap(), to.parse().unwrap());
        let socket = from.run(|| UdpSocket::bind(SocketAddr::new(source, 43001))).unwrap();
        socket.set_read_timeout(Some(PAUSE)).unwrap();
        eventually(SOON, || {
            let _ = socket.send_to(b"q", SocketAddr::new(to, 7778));
            socket.recv(&mut [0; 8]).is_ok()
        })
    };
    for (from, source, to) in flows {
        assert!(ask(from, source, to), "{flags}: {source} to {to}");
    }
    let mac_at = |namespace: &Namespace, link: &str| {
        mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", link])))
    };
    let mac = |namespace: &Namespace| mac_at(namespace, "eth0");
    router.exec("ping", &["-c", "1", "-W", "5", "10.77.2.1"]);
    let neighbours = router.ip(&["neigh", "show", "10.77.2.1"]);
    let gateway = mac_of(neighbours.split("lladdr ").nth(1).unwrap().split(' ').next().unwrap());
    let (host, client) = (&scene.net.host, &scene.net.client);
    let mut attackers =
        vec![(client, mac_at(host, uplink), mac(client)), (&router, gateway, mac(&router))];
    if is_bridged {
        // A bridge also receives what is for one of its ports, and passes frames to link
        // control addresses up at the port.
        attackers.push((client, mac(host), mac(client)));
        attackers.push((client, [0x01, 0x80, 0xc2, 0, 0, 3], mac(client)));
    }
    let links = [&container, &insider].map(|namespace| LinkSocket::open(namespace, "eth0"));
    for (number, (attacker, to_mac, own_mac)) in (b'0'..).zip(attackers) {
        let link = LinkSocket::sender(attacker, "eth0");
        let mut text = *TEXT;
        text[23] = number;
        for (_, source, to) in flows {
            for packet in provoking(source.parse().unwrap(), to.parse().unwrap(), &text) {
                let ethertype = if source.contains(':') { 0x86dd } else { 0x0800 };
                let frame = ethernet(to_mac, own_mac, ethertype, &packet);
                for tags in PRIORITY_TAGS {
                    let mut tagged = frame.clone();
                    tagged.splice(12..12, tags.iter().copied());
                    link.send(&tagged);
                }
            }
        }
    }
    // Reassembly ends after a second.
    thread::sleep(Duration::from_secs(2));
    for link in &links {
        let mut frames = link.received().into_iter();
        // The text ends with the number of the attacker.
        let arrived = frames.find(|frame| frame.windows(12).any(|window| window == &TEXT[..12]));
        assert!(arrived.is_none(), "{flags}, bridged {is_bridged}: {:x?}", arrived.unwrap());
    }
}

/// VLAN tags without an ID, which the kernel ignores: none, 802.1Q, 802.1ad, and two of them.
const PRIORITY_TAGS: [&[u8]; 4] =
    [&[], &[0x81, 0, 0xe0, 0], &[0x88, 0xa8, 0, 0], &[0x81, 0, 0, 0, 0x81, 0, 0, 0]];

/// Datagrams from port 43001 to port 7778 that the kernel answers with an ICMP error.
fn provoking(source: IpAddr, to: IpAddr, text: &[u8]) -> Vec<Vec<u8>> {
    match (source, to) {
        (IpAddr::V4(source), IpAddr::V4(to)) => {
            let plain = udp4((source, 43001), (to, 7778), text);
            let with_head = |change: &dyn Fn(&mut Vec<u8>)| {
                let mut packet = plain.clone();
                change(&mut packet);
                let length = usize::from(packet[0] & 15) * 4;
                packet[10..12].fill(0);
                let total = packet.len() as u16;
                packet[2..4].copy_from_slice(&total.to_be_bytes());
                let sum = checksum(&packet[..length]);
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                packet
            };
            vec![
                // The time to live is over.
                with_head(&|packet| packet[8] = 1),
                // A malformed timestamp option.
                with_head(&|packet| {
                    packet[0] = 0x46;
                    packet.splice(20..20, [0x44, 4, 1, 0]);
                }),
                // A fragment whose others never arrive.
                fragment(&plain, 0..24),
            ]
        }
        (IpAddr::V6(source), IpAddr::V6(to)) => {
            let plain = udp6((source, 43001), (to, 7778), text);
            let datagram = &plain[40..];
            let mut late = plain.clone();
            late[7] = 1;
            // An option that has to be understood (RFC 8200, 4.2).
            let unknown = [&[17, 0, 0x9e, 4, 0, 0, 0, 0], datagram].concat();
            let part = [&[17, 0, 0, 1, 0, 0, 0, 7], &datagram[..24]].concat();
            vec![late, ipv6(source, to, 0, &unknown), ipv6(source, to, 44, &part)]
        }
        _ => unreachable!("one family"),
    }
}

/// Source guards are at all other links of the host, also at new ones, and leave nothing behind.
#[test]
fn source_guards_follow_the_links_of_the_host() {
    let scene = Scene::new();
    let host = &scene.net.host;
    let programs = |link: &str| {
        let index = host.run(|| tidegate_netns::interface_index(link)).unwrap();
        host.run(|| tidegate_netfilter::count_programs(index)).unwrap()
    };
    let before = programs("eth0");
    let container = Namespace::new();
    for killed in [false, true] {
        let mut up = up(&scene, &file(&container, ""), &["--firewall=nftables"]);
        assert_eq!(programs("eth0"), before + 1);
        host.ip_all(
            "link add late type veth peer name peer
             link add trunk type bridge
             link set peer master trunk",
        );
        assert!(eventually(SOON, || programs("late") == 1 && programs("trunk") == 1));
        assert!(eventually(SOON, || programs("peer") == 1), "a port of a bridge");
        if killed {
            up.signal(Signal::KILL);
            up.wait(SOON);
            assert_eq!(programs("eth0"), before + 1, "it remains in force");
            continue;
        }
        up.stop(Signal::INT, SOON);
        assert_eq!(["eth0", "late", "trunk", "peer"].map(programs), [before, 0, 0, 0]);
        host.ip_all("link del late\nlink del trunk");
    }
    let mut up = up(&scene, &file(&container, ""), &["--firewall=nftables"]);
    assert_eq!(programs("eth0"), before + 1, "the one of the killed instance is replaced");
    assert!(!up.output().contains("restored"), "{}", up.output());
    // A link with the same name.
    for _ in 0..3 {
        host.ip_all("link del late\nlink add late type veth peer name peer");
        assert!(eventually(SOON, || programs("late") == 1));
    }
    // The host does not receive the packets of a macvtap link.
    host.ip_all("link add tap0 link eth0 type macvtap\nlink add last type bridge");
    assert!(eventually(SOON, || programs("last") == 1));
    assert_eq!(programs("tap0"), 0);
    up.stop(Signal::INT, SOON);
    assert_eq!(["eth0", "late", "trunk"].map(programs), [before, 0, 0]);
}

/// Source guards of a daemon stay in force while its networks and endpoints change, also if other
/// daemons on the machine do the same.
#[test]
fn source_guards_of_daemons_are_not_replaced() {
    let scenes = [Scene::new(), Scene::new()];
    let daemons = scenes.each_ref().map(|scene| {
        let daemon = scene.daemon(&["--firewall=nftables"]);
        let containers = ["front", "back"].map(|network| {
            let container = Namespace::new();
            let netns = container.path().to_str().unwrap().to_owned();
            scene.succeeds(&["network", "create", network]);
            scene.succeeds(&["attach", network, "--name", network, "--netns", &netns]);
            container
        });
        (daemon, containers)
    });
    thread::sleep(Duration::from_secs(1));
    for (daemon, _) in &daemons {
        assert!(!daemon.output().contains("restored"), "{}", daemon.output());
    }
}

/// A link that moves to another namespace keeps its program, where the addresses of a network may
/// be in use too.
#[test]
fn a_link_that_leaves_the_host_is_not_guarded_any_longer() {
    let scene = Scene::new();
    let (container, near, far) = (Namespace::new(), Namespace::new(), Namespace::new());
    let reaches = || {
        let ping = near.command("ping").args(["-c", "1", "-W", "1", "10.77.1.60"]).output();
        ping.unwrap().status.success()
    };
    let host = &scene.net.host;
    for killed in [false, true] {
        let mut first = up(&scene, &file(&container, ""), &["--firewall=nftables"]);
        host.ip_all("link add guest0 type veth peer name end");
        let index = host.run(|| tidegate_netns::interface_index("guest0")).unwrap();
        let programs = || host.run(|| tidegate_netfilter::count_programs(index)).unwrap();
        assert!(eventually(SOON, || programs() == 1));
        if killed {
            first.signal(Signal::KILL);
            first.wait(SOON);
        }
        for (link, namespace, address) in
            [("guest0", &near, "10.77.1.50/24"), ("end", &far, "10.77.1.60/24")]
        {
            host.ip(&["link", "set", link, "netns", namespace.path().to_str().unwrap()]);
            namespace.ip(&["addr", "add", address, "dev", link]);
            namespace.ip(&["link", "set", link, "up"]);
        }
        let mut last = if killed {
            assert!(!reaches(), "no process can change it");
            up(&scene, &file(&container, ""), &["--firewall=nftables"])
        } else {
            first
        };
        assert!(eventually(SOON, reaches), "{}", last.output());
        last.stop(Signal::INT, SOON);
        assert!(reaches());
        near.ip(&["link", "del", "guest0"]);
    }
}
