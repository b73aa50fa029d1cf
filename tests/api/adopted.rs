//! Restarted containers of adopted namespaces keep their endpoint and their ports.

use super::ask::{ask, get};
use crate::SOON;
use crate::scene::{Scene, refused, state};
use serde_json::json;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const FILE: &str = r#"
name: demo
networks: { front: { ipam: { config: [ { subnet: 10.77.1.0/24 } ] } } }
services:
  box: { x-netns: BOX, networks: [ front ], ports: [ "8080:80", "8080:80/udp" ] }
  other: { x-netns: OTHER, networks: [ front ], ports: [ "8081:80" ] }
"#;

/// A symbolic link to the namespace of a container, which can be pointed to another namespace.
struct NamespaceLink(PathBuf);

impl NamespaceLink {
    fn new(scene: &Scene, name: &str) -> Self {
        Self(scene.directory.path().join(name))
    }

    fn point_to(&self, namespace: &Namespace) {
        self.remove();
        symlink(namespace.path(), &self.0).unwrap();
    }

    fn remove(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn up(scene: &Scene, name: &Path, other: &Namespace) -> Process {
    let file = FILE.replace("BOX", &name.display().to_string());
    let up = scene.up(&file.replace("OTHER", &other.path().display().to_string()));
    up.wait_for_line("Ctrl-C takes", SOON);
    up
}

/// The response of the server at `to` to an outside client.
fn answer(scene: &Scene, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    let mut stream = scene.net.client.run(|| TcpStream::connect_timeout(&to, SOON)).ok()?;
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    (!text.is_empty()).then_some(text)
}

fn udp_answer(scene: &Scene, socket: &std::net::UdpSocket) -> bool {
    scene.net.client.run(|| socket.send(b"?").is_ok() && socket.recv(&mut [0; 64]).is_ok())
}

#[test]
fn a_restarted_container_keeps_its_ports_and_others_are_not_affected() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let (name, other) = (NamespaceLink::new(&scene, "box"), Namespace::new());
    let container = Namespace::new();
    name.point_to(&container);
    let mut up = up(&scene, &name.0, &other);
    let at = "10.77.1.2:80".parse().unwrap();
    let servers = (PeerServer::tcp(&container, at), PeerServer::udp(&container, at));
    let _echo = EchoServer::tcp(&other, "10.77.1.3:80".parse().unwrap());
    let ports = get(&scene.socket(), "/v1/ports");
    let to: SocketAddr = "203.0.113.1:8081".parse().unwrap();
    let mut kept = scene.net.client.run(|| TcpStream::connect(to)).unwrap();
    let udp = scene.net.client.run(|| std::net::UdpSocket::bind("0.0.0.0:0")).unwrap();
    udp.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    scene.net.client.run(|| udp.connect("203.0.113.1:8080")).unwrap();
    assert!(answer(&scene, "203.0.113.1:8080").unwrap().starts_with("203.0.113.9:"));
    assert!(udp_answer(&scene, &udp));

    for _ in 0..2 {
        name.remove();
        let service = || get(&scene.socket(), "/v1/status").1["services"][0]["state"].clone();
        assert!(eventually(SOON, || service() == "gone"));
        let again = Namespace::new();
        let _servers = (
            PeerServer::tcp(&again, "0.0.0.0:80".parse().unwrap()),
            PeerServer::udp(&again, "0.0.0.0:80".parse().unwrap()),
        );
        name.point_to(&again);
        assert!(eventually(SOON, || service() == "adopted"));
        let seen = answer(&scene, "203.0.113.1:8080").expect("the restarted container responds");
        assert!(seen.starts_with("203.0.113.9:"), "the address of the client: {seen}");
        assert!(eventually(SOON, || udp_answer(&scene, &udp)), "the same client, over UDP");
        kept.write_all(b"tide").unwrap();
        kept.read_exact(&mut [0; 4]).unwrap();
        assert_eq!(get(&scene.socket(), "/v1/ports"), ports);
    }
    drop((servers, container));
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&scene.net.host), before);
}

#[test]
fn an_endpoint_is_attached_elsewhere_on_request() {
    let scene = Scene::new();
    let (name, other) = (NamespaceLink::new(&scene, "box"), Namespace::new());
    let (first, second) = (Namespace::new(), Namespace::new());
    name.point_to(&first);
    let _up = up(&scene, &name.0, &other);
    let inside = state(&second);
    let put = |path: &Path| {
        let body = json!({ "netns": path }).to_string();
        ask(&scene.socket(), "PUT", "/v1/endpoints/box/namespace", &body)
    };
    let _server = PeerServer::tcp(&second, "0.0.0.0:80".parse().unwrap());
    let (code, endpoint) = put(&second.path());
    assert_eq!(code, 200, "{endpoint}");
    assert_eq!(endpoint["netns"], second.path().to_str().unwrap());
    assert!(answer(&scene, "203.0.113.1:8080").is_some());
    assert!(!state(&first).contains("eth0"));

    // On a conflict it stays attached: the namespace of the other endpoint has its own eth0.
    let (code, error) = put(&other.path());
    assert_eq!(
        (
            code,
            error["error"]
                .as_str()
                .unwrap()
                .contains("\"eth0\" on endpoint \"box\" already exists")
        ),
        (409, true),
        "{error}"
    );
    for (path, reason) in
        [("/nowhere", "no such namespace /nowhere"), ("/etc/passwd", "is not a network namespace")]
    {
        let (code, error) = put(Path::new(path));
        assert_eq!(
            (code, error["error"].as_str().unwrap().contains(reason)),
            (400, true),
            "{error}"
        );
    }
    assert!(answer(&scene, "203.0.113.1:8080").is_some());
    // The first path is no longer watched.
    let third = Namespace::new();
    name.point_to(&third);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(
        get(&scene.socket(), "/v1/endpoints/box").1["netns"],
        second.path().to_str().unwrap()
    );
    assert_ne!(state(&second), inside);
}

/// The path names a process that moves to another namespace, as if its pid were reused by a foreign
/// process.
#[test]
fn a_reused_pid_is_not_attached() {
    let scene = Scene::new();
    let (other, first, second) = (Namespace::new(), Namespace::new(), Namespace::new());
    let go = scene.directory.path().join("go");
    let script = format!(
        "echo ready; while [ ! -e {} ]; do sleep 0.02; done; exec nsenter --net={} sleep 60",
        go.display(),
        second.path().display()
    );
    let process = Process::spawn(first.command("sh").args(["-c", &script]));
    process.wait_for_line("ready", SOON);
    let path = PathBuf::from(format!("/proc/{}/ns/net", process.pid()));
    let _up = up(&scene, &path, &other);
    let before = state(&second);
    std::fs::write(&go, "").unwrap();
    let service = || get(&scene.socket(), "/v1/status").1["services"][0]["state"].clone();
    assert!(eventually(SOON, || service() == "gone"));
    assert_eq!(state(&second), before);
    assert!(state(&first).contains("eth0"));
}

/// Its state includes that of published ports, which metrics and API reference until the end.
#[test]
fn an_adopted_namespace_is_restored() {
    let scene = Scene::new();
    let (name, other, again) =
        (NamespaceLink::new(&scene, "box"), Namespace::new(), Namespace::new());
    let setting = "net.ipv4.tcp_fwmark_accept";
    let all = |namespace: &Namespace| (state(namespace), namespace.read_sysctl(setting));
    let before = [&other, &again].map(all);
    let first = Namespace::new();
    name.point_to(&first);
    let path = scene.directory.path().join("with-metrics.yaml");
    let file = FILE.replace("BOX", &name.0.display().to_string());
    std::fs::write(&path, file.replace("OTHER", &other.path().display().to_string())).unwrap();
    let mut command = scene.tidegate();
    let mut up =
        Process::spawn(command.args(["up", "--metrics", "127.0.0.1:9464", "-f"]).arg(&path));
    up.wait_for_line("Ctrl-C takes", SOON);
    name.point_to(&again);
    assert!(eventually(SOON, || again.read_sysctl(setting) == "1"), "attached, with ports");
    up.stop(Signal::INT, SOON);
    assert!(
        eventually(SOON, || [&other, &again].map(all) == before),
        "{:?}",
        [&other, &again].map(all)
    );

    // It is restored after a failed start as well.
    let file = std::fs::read_to_string(&path).unwrap() + "  job: { command: /no/such/program }\n";
    std::fs::write(&path, file).unwrap();
    let mut command = scene.tidegate();
    let error = refused(command.args(["up", "--metrics", "127.0.0.1:9464", "-f"]).arg(path));
    assert!(error.contains("/no/such/program"), "{error}");
    assert!(
        eventually(SOON, || [&other, &again].map(all) == before),
        "{:?}",
        [&other, &again].map(all)
    );
}
