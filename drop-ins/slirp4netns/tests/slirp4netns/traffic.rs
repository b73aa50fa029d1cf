//! Egress of a container, and its source address.

use super::scene::{Guest, SOON, Scene};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{addr, eventually};

/// The greeting of the server at `to`, which contains the client address that it sees.
fn greeting(guest: &Guest, to: SocketAddr) -> std::io::Result<String> {
    guest.namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

/// The UDP response to `message`.
fn exchange(guest: &Guest, to: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    guest.namespace.run(|| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.connect(to)?;
        socket.send(message)?;
        let mut buffer = vec![0; 65_536];
        let length = socket.recv(&mut buffer)?;
        buffer.truncate(length);
        Ok(buffer)
    })
}

#[track_caller]
fn pings(guest: &Guest, to: &impl ToString) -> bool {
    let to = to.to_string();
    let output =
        guest.namespace.command("ping").args(["-n", "-c", "1", "-W", "2", &to]).output().unwrap();
    output.status.success()
}

#[test]
fn a_container_of_an_ordinary_user_has_egress_over_both_families() {
    let scene = Scene::new();
    let outside = &scene.net.client;
    let outsides: [IpAddr; 2] = [addr::CLIENT_V4.into(), addr::CLIENT_V6.into()];
    for options in [
        &["-c", "--enable-ipv6"][..],
        &["-c", "--enable-ipv6", "--mtu=65520", "--enable-sandbox", "--enable-seccomp"],
    ] {
        let guest = scene.guest();
        let _slirp = scene.serve(&guest, options);
        for address in outsides {
            let _peer = PeerServer::tcp(outside, (address, 7000).into());
            let seen = greeting(&guest, (address, 7000).into()).unwrap();
            let host = if address.is_ipv4() { "203.0.113.1:" } else { "[2001:db8:1::1]:" };
            assert!(seen.starts_with(host), "the address of the host: {seen}");
            let _echo = EchoServer::udp(outside, (address, 7001).into());
            // The first datagram may exceed the path MTU, which is reported to the container.
            let large = || exchange(&guest, (address, 7001).into(), &[7; 9000]);
            assert_eq!(large().or_else(|_| large()).unwrap(), [7; 9000]);
            assert!(pings(&guest, &address), "{address}");
            guest.transfers_both_ways(outside, address);
        }
        for gateway in ["10.0.2.2", "10.0.2.3", "fd00::2", "fd00::3"] {
            assert!(pings(&guest, &gateway), "{gateway}");
        }
    }
}

#[test]
fn the_gateway_is_the_loopback_of_the_host_unless_disabled() {
    let scene = Scene::new();
    let _server = PeerServer::tcp(&scene.net.host, "127.0.0.1:8000".parse().unwrap());
    let _server6 = PeerServer::tcp(&scene.net.host, "[::1]:8000".parse().unwrap());
    let guest = scene.guest();
    {
        let _slirp = scene.serve(&guest, &["-c", "-6", "--cidr", "10.9.8.0/24"]);
        assert!(
            greeting(&guest, "10.9.8.2:8000".parse().unwrap()).unwrap().starts_with("127.0.0.1:")
        );
        assert!(greeting(&guest, "[fd00::2]:8000".parse().unwrap()).unwrap().starts_with("[::1]:"));
        assert!(
            greeting(&guest, "10.9.8.3:8000".parse().unwrap()).is_err(),
            "DNS has only its own port"
        );
    }
    let _slirp = scene.serve(&guest, &["-c", "-6", "--disable-host-loopback"]);
    for refused in ["10.0.2.2:8000", "[fd00::2]:8000", "127.0.0.1:8000"] {
        assert!(greeting(&guest, refused.parse().unwrap()).is_err(), "{refused}");
    }
    assert!(pings(&guest, &"10.0.2.2"), "the gateway still responds");
}

#[test]
fn dns_follows_the_resolvers_of_the_host() {
    let scene = Scene::new();
    let outside = &scene.net.client;
    scene.net.client.ip(&["addr", "add", "203.0.113.53/24", "dev", "eth0"]);
    let first = EchoServer::udp(outside, (addr::CLIENT_V4, 53).into());
    let second = EchoServer::udp(outside, "203.0.113.53:53".parse().unwrap());
    let over_tcp = EchoServer::tcp(outside, "203.0.113.53:53".parse().unwrap());
    scene.resolvers("nameserver 203.0.113.9\n");
    let guest = scene.guest();
    let name_server: SocketAddr = "10.0.2.3:53".parse().unwrap();
    let name_server6: SocketAddr = "[fd00::3]:53".parse().unwrap();
    // The sandboxed process cannot open files.
    let slirp = scene.serve(&guest, &["-c", "-6", "--enable-sandbox", "--enable-seccomp"]);
    assert_eq!(exchange(&guest, name_server, b"question").unwrap(), b"question");
    assert_eq!((first.served(), second.served()), (1, 0));
    assert!(
        exchange(&guest, "10.0.2.2:53".parse().unwrap(), b"question").is_err(),
        "the gateway does not answer"
    );
    scene.resolvers("# moved\nnameserver 203.0.113.53\n");
    let moved = eventually(SOON, || {
        exchange(&guest, name_server6, b"question").is_ok_and(|answer| answer == b"question")
            && second.served() > 0
    });
    assert!(moved, "{}", slirp.process.output());
    let answer = guest.namespace.run(|| {
        let mut stream = TcpStream::connect(name_server).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"question").unwrap();
        let mut answer = [0; 8];
        stream.read_exact(&mut answer).unwrap();
        answer
    });
    assert_eq!((&answer, over_tcp.served()), (b"question", 1));
    drop(slirp);
    let _slirp = scene.serve(&guest, &["-c", "--disable-dns"]);
    assert!(exchange(&guest, name_server, b"question").is_err());
}

#[test]
fn flows_use_the_configured_source_address() {
    let scene = Scene::new();
    scene.net.host.ip_all(
        "addr add 203.0.113.77/24 dev eth0
         addr add 2001:db8:1::77/64 dev eth0 nodad
         link add second type bridge
         addr add 203.0.113.78/32 dev second
         link set second up",
    );
    let _server = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7000).into());
    let _server6 = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V6, 7000).into());
    let guest = scene.guest();
    for (options, v4, v6) in [
        (
            &["-c6", "--outbound-addr=203.0.113.77", "--outbound-addr6", "2001:db8:1::77"][..],
            "203.0.113.77:",
            "[2001:db8:1::77]:",
        ),
        (
            &["-c6", "--outbound-addr=second", "--outbound-addr6=eth0"],
            "203.0.113.78:",
            "[2001:db8:1::",
        ),
    ] {
        let _slirp = scene.serve(&guest, options);
        assert!(greeting(&guest, (addr::CLIENT_V4, 7000).into()).unwrap().starts_with(v4), "{v4}");
        assert!(greeting(&guest, (addr::CLIENT_V6, 7000).into()).unwrap().starts_with(v6), "{v6}");
    }
}

#[test]
fn an_idle_tap_is_replaced() {
    let scene = Scene::new();
    let guest = scene.guest();
    // As rootlesskit creates it.
    guest.ip(&["tuntap", "add", "name", "tap0", "mode", "tap"]);
    guest.ip(&["link", "set", "tap0", "up"]);
    let _slirp = scene.serve(&guest, &["--mtu=65520"]);
    guest.namespace.ip_all(
        "link set lo up
         link set tap0 up
         addr add 10.0.2.100/24 dev tap0
         route add default via 10.0.2.2 dev tap0",
    );
    assert!(guest.ip(&["link", "show", "tap0"]).contains("POINTOPOINT"));
    assert!(pings(&guest, &addr::CLIENT_V4));
}

#[test]
fn a_namespace_is_found_by_its_path_alone() {
    let scene = Scene::new();
    let guest = scene.guest();
    // Its user namespace is not named.
    let path = format!("/proc/{}/ns/net", guest.pid());
    let mut command = scene.as_nobody(&scene.ours());
    command.args(["-c", "--netns-type=path", &path, "uplink"]);
    let _slirp = tidegate_testbed::Process::spawn(&mut command);
    assert!(eventually(SOON, || pings(&guest, &"10.0.2.2")));
    assert!(guest.ip(&["-o", "link"]).contains("uplink"));
}
