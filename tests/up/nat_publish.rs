//! Client addresses at published ports with egress through the NAT engine, as root and as an
//! ordinary user.

use super::matrix::peer_as_seen;
use super::scene::{Scene, service_namespace, state};
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);

const FILE: &str = r#"
name: in
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.81.1.0/24 }, { subnet: "fd81:1::/64" } ] } }
  shut: { internal: true, ipam: { config: [ { subnet: 10.81.2.0/24 } ] } }
services:
  box:
    command: [ sleep, "60" ]
    networks: { home: { ipv4_address: 10.81.1.2, ipv6_address: "fd81:1::2" }, shut: { ipv4_address: 10.81.2.2 } }
    ports: [ "8080:80", "8080:80/udp" ]
  isolated:
    command: [ sleep, "60" ]
    networks: { shut: { ipv4_address: 10.81.2.3 } }
    ports: [ "0.0.0.0:8082:80/udp" ]
"#;

/// The addresses of the engine.
const ENGINE: [&str; 2] = ["169.254.116.103", "fd74:6964:6567:6174::1"];
const GATEWAY: [&str; 2] = ["10.81.1.1", "fd81:1::1"];
const HOST: [&str; 2] = ["203.0.113.1", "2001:db8:1::1"];

fn up(scene: &Scene, rootless: bool) -> Process {
    let up =
        if rootless { scene.up_as_nobody(FILE) } else { scene.up_with(FILE, &["--firewall=none"]) };
    up.wait_for_line("Ctrl-C takes", SOON);
    up
}

/// The client address that the server published at `to` sees for `from`.
#[track_caller]
fn seen(from: &Namespace, to: &str, port: u16, udp: bool) -> String {
    let to = SocketAddr::new(to.parse().unwrap(), port);
    from.run(|| peer_as_seen(to, udp, SOON))
        .unwrap_or_else(|error| panic!("{to} (udp {udp}): {error}"))
}

#[test]
fn the_container_sees_client_addresses_over_tcp_and_udp() {
    for rootless in [false, true] {
        let scene = Scene::new().with_open_tun();
        let before = state(&scene.net.host);
        let mut up = up(&scene, rootless);
        let boxed = service_namespace(&up, "box");
        for (family, at) in ["10.81.1.2:80", "[fd81:1::2]:80"].into_iter().enumerate() {
            let at: SocketAddr = at.parse().unwrap();
            let (_tcp, _udp) = (PeerServer::tcp(&boxed, at), PeerServer::udp(&boxed, at));
            let (client, host) = (&scene.net.client, &scene.net.host);
            let outside = ["203.0.113.9", "2001:db8:1::9"][family];
            let loopback = ["127.0.0.1", "::1"][family];
            for udp in [false, true] {
                assert_eq!(
                    seen(client, HOST[family], 8080, udp),
                    outside,
                    "rootless {rootless}, udp {udp}"
                );
                // Addresses of the host and loopback are not shown: applications would trust them,
                // or reply to them directly.
                let gateway = if udp { ENGINE[family] } else { GATEWAY[family] };
                for to in [HOST[family], loopback] {
                    assert_eq!(
                        seen(host, to, 8080, udp),
                        gateway,
                        "rootless {rootless}, udp {udp}"
                    );
                }
                // Hairpin: the container itself, through the host.
                assert!(!seen(&boxed, HOST[family], 8080, udp).is_empty());
            }
        }
        // Replies of the container to a neighbour on an internal network would bypass the engine,
        // and come from its own address.
        let isolated = service_namespace(&up, "isolated");
        {
            let _udp = PeerServer::udp(&boxed, "0.0.0.0:80".parse().unwrap());
            // The inner namespace of an ordinary user has no port of the engine.
            let gateway = if rootless { GATEWAY[0] } else { ENGINE[0] };
            assert_eq!(seen(&isolated, "10.81.2.1", 8080, true), gateway, "rootless {rootless}");
        }
        // A container without egress sends nothing to the engine, so the proxy forwards its port.
        let _udp = PeerServer::udp(&isolated, "10.81.2.3:80".parse().unwrap());
        assert_eq!(seen(&scene.net.client, HOST[0], 8082, true), "10.81.2.1");
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&scene.net.host), before);
    }
}

#[test]
fn udp_ports_are_added_and_removed_at_run_time() {
    let scene = Scene::new().with_open_tun();
    let up = up(&scene, true);
    let boxed = service_namespace(&up, "box");
    let _udp = PeerServer::udp(&boxed, "10.81.1.2:80".parse().unwrap());
    let ask = |method: &str, path: &str, body: &str| {
        let socket = scene.run.path().join("api.sock");
        let mut curl = scene.net.host.command("curl");
        curl.args(["-sS", "--max-time", "5", "-X", method, "--unix-socket"]).arg(socket);
        curl.args([
            "-H",
            "content-type: application/json",
            "-d",
            body,
            &format!("http://localhost{path}"),
        ]);
        String::from_utf8(curl.output().unwrap().stdout).unwrap()
    };
    for _ in 0..2 {
        let opened = ask("POST", "/v1/ports", r#"{"endpoint":"box","spec":"0.0.0.0:8181:80/udp"}"#);
        let opened: serde_json::Value = serde_json::from_str(&opened).unwrap();
        let [port] = opened.as_array().unwrap().as_slice() else { panic!("one port: {opened}") };
        assert_eq!(seen(&scene.net.client, HOST[0], 8181, true), "203.0.113.9");
        ask("DELETE", &format!("/v1/ports/{}", port["id"]), "");
        let to: SocketAddr = "203.0.113.1:8181".parse().unwrap();
        let closed = scene.net.client.run(|| peer_as_seen(to, true, SOON / 10));
        assert!(closed.is_err(), "{closed:?}");
    }
    assert_eq!(
        seen(&scene.net.client, HOST[0], 8080, true),
        "203.0.113.9",
        "other ports are not affected"
    );
}

/// Ports of the engine use the same series as ports of the proxy.
#[test]
fn traffic_of_ports_of_the_engine_is_counted() {
    let scene = Scene::new();
    let path = scene.directory.path().join("compose.yaml");
    std::fs::write(&path, FILE).unwrap();
    let mut command = scene.tidegate();
    command.arg("up").arg("-f").arg(path).args(["--firewall=none", "--metrics", "127.0.0.1:9464"]);
    let up = Process::spawn(&mut command);
    up.wait_for_line("Ctrl-C takes", SOON);
    let boxed = service_namespace(&up, "box");
    let _udp = PeerServer::udp(&boxed, "10.81.1.2:80".parse().unwrap());
    seen(&scene.net.client, HOST[0], 8080, true);
    let page = || {
        scene.net.host.exec("curl", &["-sS", "--max-time", "5", "http://127.0.0.1:9464/metrics"])
    };
    let has = |line: &str| page().lines().any(|one| one == line);
    for line in [
        r#"tidegate_proxy_sessions_total{publish="0.0.0.0:8080/udp"} 1"#,
        r#"tidegate_proxy_sessions{publish="0.0.0.0:8080/udp"} 1"#,
        r#"tidegate_proxy_datagrams_total{publish="0.0.0.0:8080/udp",direction="in"} 1"#,
        r#"tidegate_proxy_datagrams_total{publish="0.0.0.0:8080/udp",direction="out"} 1"#,
        r#"tidegate_proxy_bytes_total{publish="0.0.0.0:8080/udp",direction="in"} 1"#,
    ] {
        assert!(eventually(SOON, || has(line)), "{line} in\n{}", page());
    }
}
