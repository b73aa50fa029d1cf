//! Layer 2: a MAC address, a DHCP client, and an existing TAP.

use super::scene::{Guest, SOON, Scene, Slirp};
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{addr, eventually, require_program};

#[track_caller]
fn pings(guest: &Guest, to: &impl ToString) {
    let ping = || {
        let to = to.to_string();
        let output = guest
            .namespace
            .command("ping")
            .args(["-n", "-c", "1", "-W", "1", &to])
            .output()
            .unwrap();
        output.status.success()
    };
    assert!(eventually(SOON, ping), "{}", to.to_string());
}

/// Transfers in both directions over both families.
#[track_caller]
fn transfers(scene: &Scene, guest: &Guest) {
    for address in [addr::CLIENT_V4.into(), addr::CLIENT_V6.into()] {
        let address: std::net::IpAddr = address;
        guest.transfers_both_ways(&scene.net.client, address);
    }
}

#[test]
fn a_mac_address_selects_a_tap() {
    let scene = Scene::new();
    for mtu in ["--mtu=1500", "--mtu=65521"] {
        let guest = scene.guest();
        let options = [
            "-c",
            "-6",
            mtu,
            "--macaddress=02:00:00:11:22:33",
            "--enable-sandbox",
            "--enable-seccomp",
        ];
        let _slirp = scene.serve(&guest, &options);
        let link = guest.ip(&["link", "show", "tap0"]);
        assert!(link.contains("link/ether 02:00:00:11:22:33"), "{link}");
        for near in ["10.0.2.2", "10.0.2.3", "fd00::2", "fd00::3"] {
            pings(&guest, &near);
        }
        let neighbours = guest.ip(&["neigh"]);
        assert!(neighbours.contains("10.0.2.2 dev tap0 lladdr 52:55:0a:00:02:02"), "{neighbours}");
        pings(&guest, &addr::CLIENT_V4);
        pings(&guest, &addr::CLIENT_V6);
        transfers(&scene, &guest);
    }
}

#[test]
fn a_dhcp_client_gets_a_complete_configuration() {
    require_program("busybox");
    let scene = Scene::new();
    let guest = scene.guest();
    // An existing TAP, as rootlesskit creates it, is taken over.
    guest.ip(&["tuntap", "add", "name", "tap0", "mode", "tap"]);
    let mut command = scene.as_nobody(&scene.ours());
    command.args(["--enable-ipv6", "--cidr=10.9.8.0/24"]).env("TIDEGATE_SLIRP_DEVICE", "tap");
    let _slirp = Slirp::start(command, &guest);
    let script = scene.path("bound");
    let text = "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\necho \"$ip/$mask via $router dns $dns mtu $mtu\"\n\
                ip addr add $ip/$mask dev $interface\nip route add default via $router\n";
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let mut client = guest.namespace.command("busybox");
    client
        .args(["udhcpc", "-i", "tap0", "-n", "-q", "-f", "-t", "10", "-T", "1", "-s"])
        .arg(&script);
    let output = client.output().unwrap();
    let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output_text} {}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output_text.contains("10.9.8.15/24 via 10.9.8.2 dns 10.9.8.3 mtu 1500"),
        "{output_text}"
    );
    pings(&guest, &addr::CLIENT_V4);
    // For IPv6, it has configured an address from the router advertisement.
    let configured =
        || guest.ip(&["-6", "route", "show", "default"]).contains("via fe80::2 dev tap0");
    assert!(eventually(SOON, configured));
    let address = || {
        guest
            .ip(&["-6", "-o", "addr", "show", "dev", "tap0", "scope", "global"])
            .contains("inet6 fd00::")
    };
    assert!(eventually(SOON, address));
    pings(&guest, &addr::CLIENT_V6);
    transfers(&scene, &guest);
}

#[test]
fn ports_are_forwarded_to_a_container_that_has_not_sent_yet() {
    let scene = Scene::new();
    let guest = scene.guest();
    let socket = scene.home("api.sock");
    let options = ["-c", "--macaddress=02:00:00:11:22:33", "-a", &socket.display().to_string()]
        .map(str::to_owned);
    let _slirp = scene.serve(&guest, &options.iter().map(String::as_str).collect::<Vec<_>>());
    let _server = PeerServer::tcp(&guest.namespace, "10.0.2.100:80".parse().unwrap());
    let request =
        r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_port":8080,"guest_port":80}}"#;
    assert_eq!(super::scene::ask(&socket, request), r#"{"return":{"id":1}}"#);
    let seen = scene.net.client.run(|| {
        let mut text = String::new();
        let mut stream = TcpStream::connect((addr::HOST_V4, 8080)).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        std::io::Read::read_to_string(&mut stream, &mut text).unwrap();
        text
    });
    assert!(seen.starts_with("10.0.2.2:"), "{seen}");
}
