//! Ports added and removed at run time.

use super::ask::{ask, get};
use crate::SOON;
use crate::scene::Scene;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, Process};

/// The longest acceptable pause in a transfer, with a margin for a busy machine.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// The minimum number of rounds of a transfer.
const ROUNDS: u32 = 200;

/// An adopted container of the test, on a dual-stack network.
fn adopted(scene: &Scene, container: &Namespace) -> Process {
    let file = format!(
        r#"
name: demo
networks:
  front: {{ enable_ipv6: true, ipam: {{ config: [ {{ subnet: 10.77.1.0/24 }}, {{ subnet: "fd77:1::/64" }} ] }} }}
services: {{ box: {{ x-netns: {}, networks: [ front ], ports: [ "8080:80" ] }} }}
"#,
        container.path().display()
    );
    let up = scene.up(&file);
    up.wait_for_line("Ctrl-C takes", SOON);
    up
}

#[track_caller]
fn publish(scene: &Scene, spec: &str) -> Vec<Value> {
    let body = json!({ "endpoint": "box", "spec": spec }).to_string();
    let (code, opened) = ask(&scene.socket(), "POST", "/v1/ports", &body);
    assert_eq!(code, 201, "{opened}");
    opened.as_array().unwrap().clone()
}

#[track_caller]
fn close(scene: &Scene, port: &Value) {
    assert_eq!(
        ask(&scene.socket(), "DELETE", &format!("/v1/ports/{}", port["id"]), ""),
        (204, Value::Null)
    );
}

fn connect(from: &Namespace, to: &str) -> std::io::Result<TcpStream> {
    let to: SocketAddr = to.parse().unwrap();
    let stream = from.run(|| TcpStream::connect_timeout(&to, SOON))?;
    stream.set_read_timeout(Some(SOON)).unwrap();
    Ok(stream)
}

/// The response of a server that sends the address of its client.
fn seen(from: &Namespace, to: &str) -> std::io::Result<String> {
    let mut text = String::new();
    connect(from, to)?.read_to_string(&mut text)?;
    Ok(text)
}

/// TCP segments retransmitted by a namespace (`RetransSegs` of RFC 4022).
fn retransmitted_segments(namespace: &Namespace) -> u64 {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let [names, values] = [0, 1]
        .map(|index| text.lines().filter(|line| line.starts_with("Tcp:")).nth(index).unwrap());
    let mut columns = names.split(' ').zip(values.split(' '));
    columns.find(|(name, _)| *name == "RetransSegs").unwrap().1.parse().unwrap()
}

#[test]
fn ports_are_added_and_removed_without_interrupting_a_transfer() {
    let (scene, container) = (Scene::new(), Namespace::new());
    let _up = adopted(&scene, &container);
    let _echo = EchoServer::tcp(&container, "10.77.1.2:80".parse().unwrap());
    let _peer = PeerServer::tcp(&container, "10.77.1.2:81".parse().unwrap());
    let mut stream = connect(&scene.net.client, "203.0.113.1:8080").unwrap();
    let over = AtomicBool::new(false);
    let (rounds, longest) = std::thread::scope(|scope| {
        let transfer = scope.spawn(|| {
            let (mut rounds, mut longest) = (0_u32, Duration::ZERO);
            // The size of one segment, to avoid waiting for a delayed acknowledgement.
            let mut back = [0; 1024];
            while !over.load(Ordering::Relaxed) || rounds < ROUNDS {
                let block = [rounds as u8; 1024];
                let start = Instant::now();
                stream.write_all(&block).unwrap();
                stream.read_exact(&mut back).unwrap();
                longest = longest.max(start.elapsed());
                assert_eq!(back, block);
                rounds += 1;
            }
            (rounds, longest)
        });
        for _ in 0..20 {
            let opened = publish(&scene, "8081:81");
            assert_eq!(opened.len(), 2, "IPv4 and IPv6: {opened:?}");
            let seen = seen(&scene.net.client, "203.0.113.1:8081").unwrap();
            assert!(seen.starts_with("203.0.113.9:"), "the address of the client: {seen}");
            opened.iter().for_each(|port| close(&scene, port));
            let error = connect(&scene.net.client, "203.0.113.1:8081").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
        }
        over.store(true, Ordering::Relaxed);
        transfer.join().unwrap()
    });
    println!("{rounds} rounds, the longest {longest:?}");
    assert!(longest < MAX_PAUSE, "{rounds} rounds, the longest {longest:?}");
    let retransmitted =
        [&scene.net.client, &scene.net.host, &container].map(retransmitted_segments);
    assert_eq!(retransmitted, [0; 3], "segments were retransmitted");
    let (_, left) = get(&scene.socket(), "/v1/ports");
    assert_eq!(left.as_array().unwrap().len(), 2, "{left}");
}

#[test]
fn a_closed_port_resets_only_its_own_connections() {
    let (scene, container) = (Scene::new(), Namespace::new());
    let _up = adopted(&scene, &container);
    let _echo = EchoServer::tcp(&container, "10.77.1.2:80".parse().unwrap());
    let opened = publish(&scene, "127.0.0.1:8081:80");
    let echo = |stream: &mut TcpStream| {
        stream.write_all(b"tide").and_then(|()| stream.read_exact(&mut [0; 4])).is_ok()
    };
    let mut kept = connect(&scene.net.host, "127.0.0.1:8080").unwrap();
    let mut cut = connect(&scene.net.host, "127.0.0.1:8081").unwrap();
    assert!(echo(&mut kept) && echo(&mut cut));
    close(&scene, &opened[0]);
    assert!(!echo(&mut cut) && echo(&mut kept));
}

#[test]
fn an_ephemeral_port_is_reported_and_ids_are_not_reused() {
    let (scene, container) = (Scene::new(), Namespace::new());
    let _up = adopted(&scene, &container);
    let _peer = PeerServer::tcp(&container, "10.77.1.2:80".parse().unwrap());
    let _udp = PeerServer::udp(&container, "10.77.1.2:53".parse().unwrap());
    let first = publish(&scene, "80");
    let port = first[0]["host_port"].as_u64().unwrap();
    assert!(port > 0 && first[1]["host_port"] == port, "{first:?}");
    assert!(seen(&scene.net.client, &format!("203.0.113.1:{port}")).is_ok());
    first.iter().for_each(|port| close(&scene, port));
    let udp = publish(&scene, "0.0.0.0::53/udp");
    assert!(udp[0]["id"].as_u64() > first[1]["id"].as_u64(), "{first:?} {udp:?}");
    assert_eq!(udp[0]["protocol"], "udp");
    let to = format!("203.0.113.1:{}", udp[0]["host_port"]);
    scene.net.client.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        socket.send_to(b"?", &to).unwrap();
        assert!(socket.recv(&mut [0; 64]).unwrap() > 0);
    });
}
