//! Packets without an ingress interface that the host has not sent of its own accord. They look
//! like packets of the host, which may connect to containers.

use super::scene::Scene;
use super::spoofing::{link_layer_address, mac_of};
use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;
use tidegate_testbed::frames::{LinkSocket, Mac, checksum, ethernet, ipv6, syn4, udp6};
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(300);

/// Brings up one network with egress, of both families, with `container` as its only service.
#[track_caller]
fn up(scene: &Scene, container: &Namespace, firewall: &str) -> Process {
    let text = format!(
        "name: ownerless
networks:
  home: {{ enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.77.1.0/24 }}, {{ subnet: \"fd77:1::/64\" }} ] }} }}
services:
  server: {{ x-netns: {}, networks: {{ home: {{ ipv4_address: 10.77.1.10, ipv6_address: \"fd77:1::10\" }} }} }}
",
        container.path().display()
    );
    let up = scene.up_with(&text, &[&format!("--firewall={firewall}")]);
    up.wait_for_line("Ctrl-C takes", SOON);
    up
}

fn mac(namespace: &Namespace) -> Mac {
    mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
}

/// The kernel reassembles a forwarded IPv6 packet for conntrack, and fragments it again if it has
/// grown larger than its parts. The new parts have no ingress interface, like packets of the host.
#[test]
fn fragments_of_forwarded_packets_are_not_taken_for_packets_of_the_host() {
    const TEXT: &[u8; 24] = b"payload of the attacker.";
    let scene = Scene::new();
    let container = Namespace::new();
    let mut up = up(&scene, &container, "nftables");
    // The rules are gone, and other software needs conntrack.
    up.signal(Signal::KILL);
    up.wait(SOON);
    let rules = "flush ruleset; add table inet other;
         add chain inet other forward { type filter hook forward priority 0; };
         add rule inet other forward ct state invalid counter";
    scene.net.host.exec("nft", &[rules]);
    let (to_mac, own_mac) = (mac(&scene.net.host), mac(&scene.net.client));
    let (source, to) = ("2001:db8:1::9".parse().unwrap(), "fd77:1::10".parse().unwrap());
    let datagram = udp6((source, 43001), (to, 7778), &TEXT.repeat(8))[40..].to_vec();
    let attacker = LinkSocket::sender(&scene.net.client, "eth0");
    let own = LinkSocket::open(&container, "eth0");
    // Options of 208 bytes: one that hosts ignore (0x1e, RFC 4727).
    let options = [&[44, 25, 0x1e, 204][..], &[0; 204]].concat();
    for (id, options) in [(1, &options[..]), (2, &[])] {
        let part = |range: std::ops::Range<usize>, offset: u16| {
            let offset = offset.to_be_bytes();
            [&[17, 0, offset[0], offset[1], 0, 0, 0, id], &datagram[range]].concat()
        };
        let parts = [(part(0..64, 1), options), (part(64..datagram.len(), 64), &[])];
        for (part, options) in parts {
            let first = if options.is_empty() { 44 } else { 0 };
            let packet = ipv6(source, to, first, &[options, &part].concat());
            attacker.send(&ethernet(to_mac, own_mac, 0x86dd, &packet));
        }
        thread::sleep(PAUSE);
        let mut frames = own.received().into_iter();
        let arrived = frames.find(|frame| frame.windows(12).any(|window| window == &TEXT[..12]));
        assert!(arrived.is_none(), "{:x?}", arrived.unwrap());
    }
    // Those of the host itself arrive.
    let inside = container.run(|| UdpSocket::bind("[fd77:1::10]:7778")).unwrap();
    inside.set_read_timeout(Some(PAUSE)).unwrap();
    let host = scene.net.host.run(|| UdpSocket::bind("[fd77:1::1]:0")).unwrap();
    let arrives = || {
        let _ = host.send_to(&[7; 4_000], "[fd77:1::10]:7778");
        inside.recv(&mut [0; 5_000]).is_ok_and(|length| length == 4_000)
    };
    assert!(eventually(SOON, arrives));
}

/// SYNPROXY opens connections on behalf of others. Its packets have no ingress interface, like
/// those of the host, and pass the rules of this software. Connections of the host itself, and
/// resets by its rules, still arrive.
#[test]
fn connections_of_synproxy_reach_no_container() {
    for firewall in ["nftables", "iptables", "none"] {
        let scene = Scene::new().with_open_tun();
        let (host, client, container) = (&scene.net.host, &scene.net.client, Namespace::new());
        let _up = up(&scene, &container, firewall);
        host.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0");
        let rules = "add table ip other;
             add chain ip other early { type filter hook prerouting priority -300; };
             add rule ip other early iifname eth0 tcp dport 80 tcp flags syn notrack;
             add chain ip other forward { type filter hook forward priority -50; };
             add rule ip other forward iifname eth0 ct state invalid,untracked synproxy mss 1460 \
                 wscale 7 timestamp sack-perm;
             add rule ip other forward tcp dport 9 reject with tcp reset";
        host.exec("nft", &[rules]);
        client.ip(&["route", "add", "10.77.1.0/24", "via", "203.0.113.1"]);
        let server: SocketAddr = ([10, 77, 1, 10], 80).into();
        let listener = container.run(|| TcpListener::bind(server)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let connect = |from: &Namespace, to| from.run(|| TcpStream::connect_timeout(&to, SOON));
        let inside = LinkSocket::open(&container, "eth0");
        let patience = Duration::from_secs(2);
        let opened = client.run(|| TcpStream::connect_timeout(&server, patience));
        // Elsewhere, its rules do not see the packets.
        assert!(opened.is_ok() || firewall != "nftables", "SYNPROXY does not answer");
        let _ = opened.map(|mut opened| opened.write_all(b"request"));
        thread::sleep(PAUSE);
        let from_client = |frame: &Vec<u8>| frame.get(26..30) == Some(&[203, 0, 113, 9]);
        let arrived = inside.received().into_iter().find(from_client);
        assert!(arrived.is_none(), "{firewall}: {:x?}", arrived.unwrap());
        connect(host, server).unwrap();
        assert!(eventually(SOON, || listener.accept().is_ok()), "{firewall}: from the host");
        if firewall != "none" {
            let error = connect(&container, ([203, 0, 113, 9], 9).into()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{firewall}");
        }
    }
}

/// With `accept_source_route`, the kernel answers along the reversed source route of a packet,
/// whose first hop is a container.
#[test]
fn answers_along_source_routes_reach_no_container() {
    for firewall in ["nftables", "iptables", "none"] {
        let scene = Scene::new().with_open_tun();
        let (host, client, container) = (&scene.net.host, &scene.net.client, Namespace::new());
        let _up = up(&scene, &container, firewall);
        host.sysctl("net.ipv4.conf.all.accept_source_route", "1");
        let _listener = host.run(|| TcpListener::bind("203.0.113.1:2222")).unwrap();
        let link = LinkSocket::sender(client, "eth0");
        let (own, inside) =
            (LinkSocket::open(client, "eth0"), LinkSocket::open(&container, "eth0"));
        let syn = |port, options: &[u8]| {
            let plain = syn4(([203, 0, 113, 9].into(), port), ([203, 0, 113, 1].into(), 2222), 7);
            let length = plain.len() + options.len();
            let mut packet = [&plain[..20], options, &plain[20..]].concat();
            packet[0] += options.len() as u8 / 4;
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum(&packet[..20 + options.len()]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            ethernet(mac(host), mac(client), 0x0800, &packet)
        };
        // The answer to `port`, a SYN-ACK of port 2222.
        let answer = |link: &LinkSocket, port: u16| {
            let ports = [2222_u16.to_be_bytes(), port.to_be_bytes()].concat();
            let is_answer = |frame: &Vec<u8>| frame.windows(4).any(|window| window == ports);
            link.received().into_iter().find(is_answer)
        };
        // Through the container: all addresses of the route are visited.
        for (port, route) in [(4001, 131), (4002, 137)] {
            link.send(&syn(port, &[1, route, 7, 8, 10, 77, 1, 10]));
            thread::sleep(PAUSE);
            let arrived = answer(&inside, port);
            assert!(arrived.is_none(), "{firewall}: {:x?}", arrived.unwrap());
        }
        link.send(&syn(4003, &[1, 131, 7, 8, 203, 0, 113, 9]));
        assert!(eventually(SOON, || answer(&own, 4003).is_some()), "the sysctl has an effect");
    }
}
