//! Ports forwarded through the API, and malicious clients of the API.

use super::scene::{Guest, SOON, Scene, Slirp, ask};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, addr, eventually};

/// A served container with an API socket.
fn served(scene: &Scene, options: &[&str]) -> (Guest, Slirp, PathBuf) {
    let guest = scene.guest();
    let socket = scene.home("api.sock");
    let path = socket.display().to_string();
    let options =
        ["-c", "-6", "-a", &path].into_iter().chain(options.iter().copied()).collect::<Vec<_>>();
    let slirp = scene.serve(&guest, &options);
    (guest, slirp, socket)
}

#[track_caller]
fn answer(socket: &Path, request: &Value) -> Value {
    serde_json::from_str(&ask(socket, &request.to_string())).unwrap()
}

fn add(protocol: &str, host: &str, port: u16, guest_port: u16) -> Value {
    json!({"execute": "add_hostfwd", "arguments":
        {"proto": protocol, "host_addr": host, "host_port": port, "guest_addr": "", "guest_port": guest_port}})
}

/// The client address that the server behind `to` sees.
fn seen_by_tcp(from: &Namespace, to: impl Into<SocketAddr>) -> Option<String> {
    let to = to.into();
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2)).ok()?;
        stream.set_read_timeout(Some(SOON)).ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        (!text.is_empty()).then_some(text)
    })
}

fn seen_by_udp(from: &Namespace, to: impl Into<SocketAddr>) -> Option<String> {
    let to = to.into();
    from.run(|| {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).ok()?;
        socket.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        socket.connect(to).ok()?;
        socket.send(b"who").ok()?;
        let mut buffer = [0; 256];
        let length = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..length]).into_owned())
    })
}

#[test]
fn ports_reach_the_container_until_they_are_removed() {
    let scene = Scene::new();
    let (guest, slirp, socket) = served(&scene, &["--enable-sandbox", "--enable-seccomp"]);
    let _tcp = PeerServer::tcp(&guest.namespace, "10.0.2.100:80".parse().unwrap());
    let _udp = PeerServer::udp(&guest.namespace, "10.0.2.100:53".parse().unwrap());
    assert_eq!(answer(&socket, &add("tcp", "0.0.0.0", 8080, 80)), json!({"return": {"id": 1}}));
    assert_eq!(answer(&socket, &add("udp", "0.0.0.0", 5353, 53)), json!({"return": {"id": 2}}));
    assert_eq!(answer(&socket, &add("tcp", "127.0.0.1", 8081, 80)), json!({"return": {"id": 3}}));
    // The container sees the gateway, as with slirp4netns.
    let outside = &scene.net.client;
    for seen in [
        seen_by_tcp(outside, (addr::HOST_V4, 8080)),
        seen_by_udp(outside, (addr::HOST_V4, 5353)),
        seen_by_tcp(&scene.net.host, "127.0.0.1:8080".parse::<SocketAddr>().unwrap()),
        seen_by_tcp(&scene.net.host, "127.0.0.1:8081".parse::<SocketAddr>().unwrap()),
    ] {
        let seen = seen.unwrap_or_else(|| panic!("no answer: {}", slirp.process.output()));
        assert!(seen.starts_with("10.0.2.2:"), "{seen}");
    }
    assert_eq!(seen_by_tcp(outside, (addr::HOST_V4, 8081)), None, "loopback only");

    // A port in use, and a privileged port.
    let failed = json!({"error": {"desc": "bad request: add_hostfwd: slirp_add_hostfwd failed"}});
    assert_eq!(answer(&socket, &add("tcp", "0.0.0.0", 8080, 81)), failed);
    assert_eq!(answer(&socket, &add("tcp", "0.0.0.0", 80, 80)), failed);
    assert_eq!(answer(&socket, &add("tcp", "192.0.2.99", 8082, 80)), failed);
    slirp.process.wait_for_line("Address already in use", SOON);

    let listed = answer(&socket, &json!({"execute": "list_hostfwd"}));
    assert_eq!(listed["return"]["entries"].as_array().unwrap().len(), 3);
    assert_eq!(
        answer(&socket, &json!({"execute": "remove_hostfwd", "arguments": {"id": 1}})),
        json!({"return": {}})
    );
    assert_eq!(seen_by_tcp(outside, (addr::HOST_V4, 8080)), None);
    // The port is free again.
    assert_eq!(answer(&socket, &add("tcp", "0.0.0.0", 8080, 80)), json!({"return": {"id": 4}}));
    assert!(seen_by_tcp(outside, (addr::HOST_V4, 8080)).is_some());
}

/// Other software has set `route_localnet`, and packets to loopback addresses come in from links.
#[test]
fn a_port_on_a_loopback_address_serves_the_host_only() {
    let scene = Scene::new();
    let (guest, _slirp, socket) = served(&scene, &[]);
    let net = &scene.net;
    for namespace in [&net.host, &net.client] {
        namespace.sysctl("net.ipv4.conf.all.route_localnet", "1");
    }
    net.client.ip_all("addr del 127.0.0.1/8 dev lo\nroute add 127.0.0.0/8 via 203.0.113.1");
    let _servers = (
        PeerServer::tcp(&guest.namespace, "0.0.0.0:80".parse().unwrap()),
        PeerServer::udp(&guest.namespace, "0.0.0.0:80".parse().unwrap()),
    );
    for protocol in ["tcp", "udp"] {
        answer(&socket, &add(protocol, "127.0.0.1", 8080, 80));
    }
    let of_others: SocketAddr = "127.0.0.1:9191".parse().unwrap();
    let _others = PeerServer::tcp(&net.host, of_others);
    assert!(seen_by_tcp(&net.client, of_others).is_some(), "such packets arrive");
    let ours: SocketAddr = "127.0.0.1:8080".parse().unwrap();
    assert!(seen_by_tcp(&net.host, ours).is_some() && seen_by_udp(&net.host, ours).is_some());
    assert_eq!(seen_by_tcp(&net.client, ours), None);
    assert_eq!(seen_by_udp(&net.client, ours), None);
}

#[test]
fn the_container_sees_the_client_address_on_request() {
    let scene = Scene::new();
    let guest = scene.guest();
    let socket = scene.home("api.sock");
    let mut command = scene.as_nobody(&scene.ours());
    command
        .args(["-c", "-a", &socket.display().to_string()])
        .env("TIDEGATE_SLIRP_SOURCE", "client");
    let _slirp = Slirp::start(command, &guest);
    let _tcp = PeerServer::tcp(&guest.namespace, "10.0.2.100:80".parse().unwrap());
    let _udp = PeerServer::udp(&guest.namespace, "10.0.2.100:53".parse().unwrap());
    answer(&socket, &add("tcp", "", 8080, 80));
    answer(&socket, &add("udp", "", 5353, 53));
    let outside = &scene.net.client;
    assert!(seen_by_tcp(outside, (addr::HOST_V4, 8080)).unwrap().starts_with("203.0.113.9:"));
    assert!(seen_by_udp(outside, (addr::HOST_V4, 5353)).unwrap().starts_with("203.0.113.9:"));
}

#[test]
fn root_forwards_low_ports_out_of_its_sandbox() {
    let scene = Scene::new();
    let guest = scene.guest();
    let socket = scene.home("api.sock");
    let mut command = scene.as_root(&scene.ours());
    command.args([
        "-c",
        "--enable-sandbox",
        "--enable-seccomp",
        "-a",
        &socket.display().to_string(),
    ]);
    let slirp = Slirp::start(command, &guest);
    let _tcp = PeerServer::tcp(&guest.namespace, "10.0.2.100:80".parse().unwrap());
    assert_eq!(
        answer(&socket, &add("tcp", "0.0.0.0", 80, 80)),
        json!({"return": {"id": 1}}),
        "{}",
        slirp.process.output()
    );
    assert!(seen_by_tcp(&scene.net.client, (addr::HOST_V4, 80)).is_some());
}

#[test]
fn malicious_api_clients_do_not_block_others() {
    let scene = Scene::new();
    let (guest, mut slirp, socket) = served(&scene, &["--enable-sandbox", "--enable-seccomp"]);
    let _tcp = PeerServer::tcp(&guest.namespace, "10.0.2.100:80".parse().unwrap());
    answer(&socket, &add("tcp", "0.0.0.0", 8080, 80));
    // Many clients that send nothing or half a request.
    let mut held: Vec<UnixStream> = Vec::new();
    for n in 0..200 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        if n % 2 == 0 {
            stream.write_all(b"{\"execute\":").unwrap();
        }
        held.push(stream);
        if n % 50 == 49 {
            let listed = answer(&socket, &json!({"execute": "list_hostfwd"}));
            assert_eq!(listed["return"]["entries"][0]["id"], 1);
        }
    }
    assert!(slirp.process.open_fds() < 100, "{}", slirp.process.open_fds());
    // A client that sends too much.
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let _ = stream.write_all(&[b' '; 1 << 16]);
    let mut response = String::new();
    let _ = stream.read_to_string(&mut response);
    assert!(response.is_empty() || response.contains("too large message"), "{response}");
    let exact = format!("{}{}", " ".repeat(4096 - 26), r#"{"execute":"list_hostfwd"}"#);
    assert!(ask(&socket, &exact).contains("bad request: too large message"));
    assert!(ask(&socket, &exact[1..]).contains("entries"));
    // Random bytes.
    let mut noise = 1_u64;
    for length in 0..300 {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (noise >> 33) as u8
            })
            .collect();
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        assert!(response.contains("bad request"), "{response}");
    }
    assert!(ask(&socket, &"[".repeat(4000)).contains("cannot parse JSON"));
    // A client that keeps its sending side open, like some callers.
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"{\"execute\":\"list_hostfwd\"}\n").unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.contains("entries"), "{response}");
    assert!(seen_by_tcp(&scene.net.client, (addr::HOST_V4, 8080)).is_some());
    // The silent clients time out.
    let begun = Instant::now();
    let gone = eventually(SOON, || slirp.process.open_fds() < 24);
    assert!(gone, "{} descriptors after {:?}", slirp.process.open_fds(), begun.elapsed());
    assert!(slirp.process.is_running());
}
