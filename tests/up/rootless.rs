//! `tidegate up` by an ordinary user: networks in a separate namespace, published ports on the
//! host.

use super::scene::{Scene, TIDEGATE, service_namespace, state};
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);

const FILE: &str = r#"
name: demo
networks:
  front: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  back: { internal: true, ipam: { config: [ { subnet: 10.77.2.0/24 } ] } }
services:
  web:
    command: TIDEGATE hello --listen [::]:80
    networks: { front: { ipv4_address: 10.77.1.10 } }
    ports: [ "8080:80", "5353:53/udp", "127.0.0.1:9090:80" ]
  neighbour: { command: sleep 60, networks: [ front ] }
  stranger: { command: sleep 60, networks: [ back ] }
"#;

fn up(scene: &Scene) -> Process {
    let up = scene.up_as_nobody(&FILE.replace("TIDEGATE", TIDEGATE));
    up.wait_for_line("Ctrl-C takes all of it down again.", SOON);
    up.wait_for_line("serving on", SOON);
    up
}

fn get(from: &Namespace, url: &str) -> Result<String, String> {
    let mut curl = from.command("curl");
    let output = curl.args(["-sS", "--max-time", "1", url]).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn an_ordinary_user_publishes_ports_and_leaves_the_host_unchanged() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let mut up = up(&scene);
    assert_eq!(state(&scene.net.host), before, "the networks are in another namespace");
    for (url, shown) in [
        ("http://203.0.113.1:8080/", "203.0.113.9"),
        ("http://[2001:db8:1::1]:8080/", "2001:db8:1::9"),
    ] {
        let answer = get(&scene.net.client, url).unwrap();
        assert!(answer.contains(shown), "the client's address: {answer}");
    }
    for url in ["http://127.0.0.1:8080/", "http://[::1]:8080/", "http://127.0.0.1:9090/"] {
        let answer = get(&scene.net.host, url).unwrap();
        assert!(
            answer.contains("10.77.1.1]") || answer.contains("fd77:1::1]"),
            "the gateway: {answer}"
        );
    }
    let web = service_namespace(&up, "web");
    let at: SocketAddr = "10.77.1.10:53".parse().unwrap();
    let _server = PeerServer::udp(&web, at);
    let answer = scene.net.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.send_to(b"?", "203.0.113.1:5353").unwrap();
        let mut answer = [0; 100];
        let length = socket.recv(&mut answer).unwrap();
        String::from_utf8_lossy(&answer[..length]).into_owned()
    });
    assert!(answer.starts_with("203.0.113.9:"), "over UDP too: {answer}");
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&scene.net.host), before);
    assert!(!scene.run.path().join("projects/demo").exists());
}

#[test]
fn ports_are_added_and_removed_at_gateways_too() {
    let scene = Scene::new();
    let up = up(&scene);
    let ps = scene.tidegate_as_nobody().arg("ps").output().unwrap();
    let printed = String::from_utf8(ps.stdout).unwrap();
    assert!(ps.status.success() && printed.contains("0.0.0.0:8080/tcp->80"), "{printed}");
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
    let opened = ask("POST", "/v1/ports", r#"{"endpoint":"web","spec":"0.0.0.0:8181:80"}"#);
    let opened: serde_json::Value = serde_json::from_str(&opened).unwrap();
    let [port] = opened.as_array().unwrap().as_slice() else { panic!("one port: {opened}") };
    let neighbour = service_namespace(&up, "neighbour");
    let reached = || {
        let outside = get(&scene.net.client, "http://203.0.113.1:8181/").is_ok();
        (outside, get(&neighbour, "http://10.77.1.1:8181/").is_ok())
    };
    assert_eq!(reached(), (true, true));
    ask("DELETE", &format!("/v1/ports/{}", port["id"]), "");
    assert_eq!(reached(), (false, false));
    assert!(get(&neighbour, "http://10.77.1.1:8080/").is_ok(), "other ports are not affected");
}

#[test]
fn a_killed_instance_leaves_no_state_and_can_be_restarted() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let mut first = up(&scene);
    let service = fs::read_to_string(format!("/proc/{0}/task/{0}/children", first.pid())).unwrap();
    first.signal(Signal::KILL);
    first.wait(SOON);
    let alive = || {
        service
            .split_whitespace()
            .any(|pid| fs::exists(format!("/proc/{pid}/ns/net")).unwrap_or(false))
    };
    assert!(eventually(SOON, || !alive()), "services end with it: {service}");
    let mut next = up(&scene);
    assert!(get(&scene.net.client, "http://203.0.113.1:8080/").is_ok());
    next.stop(Signal::TERM, SOON);
    assert_eq!(state(&scene.net.host), before);
}

/// `user.max_user_namespaces` belongs to a user namespace, so the test sets it in a new one.
#[test]
fn the_error_without_user_namespaces_names_the_sysctl() {
    let scene = Scene::new();
    let before = state(&scene.net.host);
    let path = scene.directory.path().join("compose.yaml");
    fs::write(&path, FILE).unwrap();
    // One user namespace for the networks, and one for each service.
    for (allowed, beginning) in [(0, "tidegate: error: "), (1, "tidegate: error: service \"")] {
        let mut command = scene.net.host.command("unshare");
        let deny = format!(
            "echo {allowed} > /proc/sys/user/max_user_namespaces
            exec setpriv --bounding-set=-sys_admin \"$0\" up -f \"$1\" --metrics none"
        );
        command.args(["--user", "--map-root-user", "sh", "-c", &deny, TIDEGATE]).arg(&path);
        command.env("TIDEGATE_RUN_DIR", scene.run.path()).env("TIDEGATE_LOG", "warn");
        let output = command.output().unwrap();
        let printed = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{printed}");
        assert!(printed.starts_with(beginning), "{printed}");
        assert!(printed.contains("create a user namespace: "), "{printed}");
        assert!(
            printed.contains("user.max_user_namespaces") && printed.lines().count() == 1,
            "{printed}"
        );
    }
    assert_eq!(state(&scene.net.host), before);
}

#[test]
fn a_permission_error_of_an_ordinary_user_has_one_line() {
    let scene = Scene::new();
    let adopted = Namespace::new();
    scene.net.host.sysctl("net.ipv4.ip_unprivileged_port_start", "1024");
    let service = |more: &str| format!("name: demo\nservices: {{ web: {{ {more} }} }}\n");
    for (file, error) in [
        (service("command: 'true', ports: [ '80:80' ]"), "port 80/tcp on 0.0.0.0"),
        (service(&format!("x-netns: {}", adopted.path().display())), "service \"web\""),
    ] {
        let mut up = scene.up_as_nobody(&file);
        assert_eq!(up.wait(SOON).code(), Some(1));
        let printed = up.wait_for_output(SOON);
        assert!(printed.starts_with("tidegate: error: ") && printed.contains(error), "{printed}");
        assert_eq!(printed.lines().count(), 1, "{printed}");
    }
}
