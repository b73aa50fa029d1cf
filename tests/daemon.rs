//! `tidegate daemon`: commands at run time, durability, and crashes at any time.

#[path = "up/scene.rs"]
mod scene;

mod api {
    pub(crate) mod ask;
}

use api::ask::{ask, get};
use scene::{Scene, state};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Mounts, Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);

/// A daemon with the network `front`.
fn daemon(scene: &Scene, flags: &[&str]) -> Process {
    let daemon = scene.daemon(flags);
    scene.succeeds(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    daemon
}

/// Attaches a new namespace to `front`.
#[track_caller]
fn attach(scene: &Scene, name: &str, more: &[&str]) -> Namespace {
    let namespace = Namespace::new();
    let path = namespace.path();
    let mut args = vec!["attach", "front", "--name", name, "--netns", path.to_str().unwrap()];
    args.extend(more);
    scene.succeeds(&args);
    namespace
}

/// Networks, and endpoints with the addresses and ports of each.
fn objects(scene: &Scene) -> (BTreeSet<String>, BTreeSet<String>) {
    let names =
        |target: &str| -> Vec<Value> { get(&scene.socket(), target).1.as_array().unwrap().clone() };
    let networks = names("/v1/networks").iter().map(|one| one["name"].to_string()).collect();
    let endpoint = |one: &Value| {
        let ports: BTreeSet<String> = one["ports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|port| port["publish"].to_string())
            .collect();
        format!("{} {} {ports:?}", one["name"], one["attachments"])
    };
    (networks, names("/v1/endpoints").iter().map(endpoint).collect())
}

#[test]
fn endpoints_are_attached_named_published_and_detached() {
    for flags in [["--firewall=nftables"], ["--firewall=iptables"], ["--firewall=none"]] {
        let scene = Scene::new();
        let mut daemon = daemon(&scene, &flags);
        let web = attach(&scene, "web", &["--alias", "site", "-p", "8080:80"]);
        let db = attach(&scene, "db", &["--ip", "10.9.0.77"]);
        let _server = PeerServer::tcp(&web, "10.9.0.2:80".parse().unwrap());
        let answers = |address: &str| {
            scene.net.client.run(|| {
                let mut stream = TcpStream::connect(address)?;
                stream.write_all(b"?")?;
                stream.read(&mut [0; 100])
            })
        };
        assert!(answers("203.0.113.1:8080").is_ok_and(|length| length > 0), "{flags:?}");
        let name = db.exec("dig", &["+short", "@127.0.0.11", "site"]);
        assert_eq!(name, "10.9.0.2\n", "{flags:?}");
        assert!(scene.succeeds(&["ps"]).contains("0.0.0.0:8080/tcp->80"), "{flags:?}");

        scene.succeeds(&["detach", "web"]);
        assert!(answers("203.0.113.1:8080").is_err(), "{flags:?}");
        assert_eq!(db.exec("dig", &["+short", "@127.0.0.11", "site"]), "", "{flags:?}");
        assert!(!web.exec("ip", &["-o", "link"]).contains("eth0"), "{flags:?}");
        scene.succeeds(&["detach", "db"]);
        scene.succeeds(&["network", "rm", "front"]);
        assert_eq!(objects(&scene), (BTreeSet::new(), BTreeSet::new()));
        daemon.stop(Signal::INT, SOON);
        assert!(!state(&scene.net.host).contains("10.9.0."), "{flags:?}");
    }
}

#[test]
fn errors_name_the_object_and_change_nothing() {
    let scene = Scene::new();
    let _daemon = daemon(&scene, &["--firewall=nftables"]);
    let web = attach(&scene, "web", &["-p", "8080:80"]);
    let path = web.path().to_str().unwrap().to_owned();
    let free = Namespace::new();
    let other = free.path().to_str().unwrap().to_owned();
    let _holder = scene.net.host.run(|| TcpListener::bind("0.0.0.0:9999")).unwrap();
    let before = (objects(&scene), state(&scene.net.host));
    let attach = |netns: &str, more: &[&str]| -> Vec<String> {
        let args = ["attach", "front", "--netns", netns, "--name", "new"];
        args.iter().chain(more).map(|arg| (*arg).to_owned()).collect()
    };
    let create = |more: &[&str]| -> Vec<String> {
        ["network", "create"].iter().chain(more).map(|arg| (*arg).to_owned()).collect()
    };
    for (args, error) in [
        (create(&["front"]), "network front already exists; "),
        (create(&["new", "--subnet", "10.9.0.128/25"]), "overlaps 10.9.0.0/24 of network front"),
        (create(&["new", "--subnet", "203.0.113.0/24"]), "which the host reaches through"),
        (create(&["new", "--subnet", "127.0.0.0/8"]), "subnet 127.0.0.0/8 is not usable"),
        (create(&["a/b"]), "invalid name \"a/b\""),
        (vec!["network".into(), "rm".into(), "front".into()], "is in use by endpoint web"),
        (vec!["network".into(), "rm".into(), "nope".into()], "network nope does not exist"),
        (vec!["detach".into(), "nope".into()], "endpoint nope does not exist"),
        (attach("/nowhere", &[]), "no such namespace /nowhere"),
        (attach("/proc/self/ns/net", &[]), "its network namespace is the host's own"),
        (attach(&path, &[]), "is already attached as endpoint web"),
        (attach(&other, &["--ip", "10.9.0.2"]), "10.9.0.2"),
        (attach(&other, &["--ip", "192.0.2.1"]), "192.0.2.1"),
        (attach(&other, &["-p", "9999:80"]), "port 9999/tcp on 0.0.0.0 is in use by "),
        (attach(&other, &["-p", "8080:80"]), "port 8080/tcp on 0.0.0.0 is in use by "),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let line = scene.fails(&args);
        assert!(line.contains(error), "{args:?}: {line}");
        assert_eq!((objects(&scene), state(&scene.net.host)), before, "{args:?}");
    }
    assert!(!free.exec("ip", &["-o", "link"]).contains("eth0"));
}

#[test]
fn a_project_in_the_foreground_refuses_commands() {
    let scene = Scene::new();
    let up = scene.up("name: demo\nservices: { job: { command: [ sleep, '60' ] } }\n");
    up.wait_for_line("Ctrl-C takes", SOON);
    let line = scene.fails(&["network", "create", "front"]);
    assert!(line.starts_with("project \"demo\" runs in the foreground"), "{line}");
}

/// Descriptors that endpoints hold are not those of connections. At the limit, the next endpoint is
/// refused, and others are served.
#[test]
fn an_endpoint_without_file_descriptors_is_refused() {
    let scene = Scene::new();
    let limited = ["prlimit", "--nofile=1000:1000", "setpriv", "--bounding-set=-sys_resource"];
    let _daemon = scene.start_daemon(scene.tidegate_through(&limited), &["--firewall=nftables"]);
    scene.succeeds(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    let first = attach(&scene, "first", &["-p", "8080:80"]);
    let _server = PeerServer::tcp(&first, "10.9.0.2:80".parse().unwrap());
    let answers = || {
        scene.net.client.run(|| {
            let mut stream = TcpStream::connect("203.0.113.1:8080")?;
            stream.set_read_timeout(Some(SOON))?;
            stream.read(&mut [0; 100])
        })
    };
    let mut attached = Vec::new();
    let refused = (0..100).find_map(|number| {
        let (name, namespace) = (format!("e{number}"), Namespace::new());
        let path = namespace.path();
        let args = ["attach", "front", "--name", &name, "--netns", path.to_str().unwrap()];
        let output = scene.tidegate().args(args).output().unwrap();
        if output.status.success() {
            attached.push(namespace);
            return None;
        }
        Some(String::from_utf8(output.stderr).unwrap())
    });
    let line = refused.expect("the limit");
    let expected = format!("endpoint e{} leaves no file descriptors", attached.len());
    assert!(line.contains(&expected) && line.contains("LimitNOFILE="), "{line}");
    assert!(answers().is_ok_and(|length| length > 0));
    scene.succeeds(&["detach", "e0"]);
    let _again = attach(&scene, "again", &[]);
    assert!(scene.fails(&["detach", &format!("e{}", attached.len())]).contains("does not exist"));
}

/// Every command is in force after a kill that follows its answer.
#[test]
fn a_command_is_durable_when_it_is_answered() {
    let scene = Scene::new();
    let mut daemon = daemon(&scene, &["--firewall=nftables"]);
    let mut namespaces = Vec::new();
    let check = |daemon: &mut Process, what: &str| {
        let before = objects(&scene);
        daemon.signal(Signal::KILL);
        daemon.wait(SOON);
        *daemon = scene.daemon(&["--firewall=nftables"]);
        assert_eq!(objects(&scene), before, "{what}");
    };
    check(&mut daemon, "network create");
    namespaces.push(attach(&scene, "web", &["-p", "8080:80"]));
    check(&mut daemon, "attach");
    let ports = json!({ "endpoint": "web", "spec": "127.0.0.1:9090:90/udp" });
    let (status, opened) = ask(&scene.socket(), "POST", "/v1/ports", &ports.to_string());
    assert_eq!(status, 201, "{opened}");
    check(&mut daemon, "publish");
    let id = get(&scene.socket(), "/v1/ports").1[0]["id"].as_u64().unwrap();
    assert_eq!(ask(&scene.socket(), "DELETE", &format!("/v1/ports/{id}"), "").0, 204);
    check(&mut daemon, "unpublish");
    scene.succeeds(&["detach", "web"]);
    check(&mut daemon, "detach");
    scene.succeeds(&["network", "rm", "front"]);
    check(&mut daemon, "network rm");
}

/// The daemon is killed at many points during a command. Afterwards the command was executed, or
/// not, and the host matches the state.
#[test]
fn a_kill_during_a_command_leaves_it_executed_or_not() {
    let scene = Scene::new();
    let mut daemon = daemon(&scene, &["--firewall=nftables"]);
    let keeper = attach(&scene, "keeper", &["-p", "8081:80"]);
    let boxed = Namespace::new();
    let path = boxed.path().to_str().unwrap().to_owned();
    let add = ["attach", "front", "--name", "new", "--netns", &path, "-p", "8080:80"];
    let links = || {
        let links = scene.net.host.exec("ip", &["-o", "link"]);
        links.lines().filter(|line| line.contains(": tgv")).count()
    };
    let mut outcomes = BTreeSet::new();
    for step in 0..24_u64 {
        let is_attached = || objects(&scene).1.iter().any(|one| one.starts_with("\"new\""));
        let attached = is_attached();
        let args: &[&str] = if attached { &["detach", "new"] } else { &add };
        let mut command = scene.tidegate();
        let mut client = command.args(args).stdout(std::process::Stdio::null());
        client = client.stderr(std::process::Stdio::null());
        let mut client = client.spawn().unwrap();
        thread::sleep(Duration::from_millis(4 + step * 2));
        daemon.signal(Signal::KILL);
        daemon.wait(SOON);
        let answered = client.wait().unwrap().success();
        daemon = scene.daemon(&["--firewall=nftables"]);
        let now = is_attached();
        assert!(!answered || now != attached, "step {step}: an answered command is lost");
        outcomes.insert((attached, now));
        let expected = 1 + usize::from(now);
        assert!(
            eventually(SOON, || links() == expected),
            "step {step}: {} links; {:?}\n{}",
            links(),
            objects(&scene),
            daemon.output()
        );
        assert_eq!(boxed.exec("ip", &["-o", "link"]).contains("eth0"), now, "step {step}");
        assert!(keeper.exec("ip", &["-o", "addr"]).contains("10.9.0.2"));
    }
    assert!(outcomes.len() >= 2, "{outcomes:?}");
}

/// Traffic between containers continues while the daemon is killed and started again.
#[test]
fn traffic_between_containers_survives_a_kill() {
    let scene = Scene::new();
    let mut daemon = daemon(&scene, &["--firewall=nftables"]);
    let [a, b] = ["a", "b"].map(|name| attach(&scene, name, &[]));
    let lost = thread::scope(|scope| {
        let ping = scope.spawn(|| {
            let args = ["-i", "0.02", "-c", "150", "-q", "10.9.0.3"];
            a.command("ping").args(args).output().unwrap()
        });
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(300));
            daemon.signal(Signal::KILL);
            daemon.wait(SOON);
            thread::sleep(Duration::from_millis(200));
            daemon = scene.daemon(&["--firewall=nftables"]);
        }
        String::from_utf8(ping.join().unwrap().stdout).unwrap()
    });
    assert!(lost.contains("150 received"), "{lost}");
    drop(b);
}

/// Attaches and detaches endpoints while connections of others transfer data.
/// Sets the flag when it is dropped.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn changes_do_not_affect_the_flows_of_others() {
    const CHANGES: usize = 500;
    let scene = Scene::new();
    let _daemon = daemon(&scene, &["--firewall=nftables"]);
    let server = attach(&scene, "server", &["-p", "8080:80"]);
    let client = attach(&scene, "client", &[]);
    let _echo = EchoServer::tcp(&server, "10.9.0.2:80".parse().unwrap());
    let ends = AtomicBool::new(false);
    let talk = |namespace: &Namespace, to: &str| {
        namespace.run(|| {
            let mut stream = TcpStream::connect(to).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut rounds = 0;
            while !ends.load(Ordering::Relaxed) {
                stream.write_all(&[7; 1000]).unwrap();
                stream.read_exact(&mut [0; 1000]).unwrap();
                rounds += 1;
                thread::sleep(Duration::from_millis(1));
            }
            rounds
        })
    };
    thread::scope(|scope| {
        let direct = scope.spawn(|| talk(&client, "10.9.0.2:80"));
        let published = scope.spawn(|| talk(&scene.net.client, "203.0.113.1:8080"));
        // Ends the flows also if a command fails.
        let guard = End(&ends);
        let boxed = Namespace::new();
        let path = boxed.path();
        let path = path.to_str().unwrap();
        for number in 0..CHANGES {
            let name = format!("e{number}");
            let port = format!("{}:80", 20_000 + number);
            // An address is not chosen again at once, but may be requested.
            let at = ["--netns", path, "--ip", "10.9.0.77", "-p", &port];
            scene.succeeds(&[&["attach", "front", "--name", &name][..], &at].concat());
            scene.succeeds(&["detach", &name]);
        }
        drop(guard);
        assert!(direct.join().unwrap() > 100 && published.join().unwrap() > 100);
    });
}

/// The server continues to send to the address of a detached endpoint, which another one has taken.
#[test]
fn the_next_endpoint_with_an_address_receives_nothing_of_the_last() {
    for firewall in ["--firewall=nftables", "--firewall=iptables", "--firewall=none"] {
        let scene = Scene::new();
        let _daemon = daemon(&scene, &[firewall]);
        let server = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:6201")).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let bind = |namespace: &Namespace| {
            let socket = namespace.run(|| UdpSocket::bind("10.9.0.50:5555")).unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket
        };
        // A question that arrives late must not count as one of the next endpoint.
        let open = |socket: &UdpSocket, question: &[u8]| {
            (0..50).find_map(|_| {
                socket.send_to(question, "203.0.113.9:6201").unwrap();
                let mut buffer = [0; 64];
                let (length, from) = server.recv_from(&mut buffer).ok()?;
                (buffer[..length] == *question).then_some(from)
            })
        };
        let old_namespace = attach(&scene, "old", &["--ip", "10.9.0.50"]);
        let old = bind(&old_namespace);
        // Entries of ICMP have no ports.
        if firewall != "--firewall=none" {
            old_namespace.exec("ping", &["-c", "1", "-W", "5", "203.0.113.9"]);
        }
        let mapped = open(&old, b"of the old one").expect("egress");
        server.send_to(b"for the old one", mapped).unwrap();
        let mut buffer = [0; 64];
        assert_eq!(old.recv(&mut buffer).unwrap(), 15, "{firewall}");
        scene.succeeds(&["detach", "old"]);
        if firewall != "--firewall=none" {
            let entries = scene.net.host.exec("conntrack", &["-L"]);
            assert!(!entries.contains("10.9.0.50"), "{firewall}: {entries}");
        }
        let new = attach(&scene, "new", &["--ip", "10.9.0.50"]);
        // The neighbour entry of the host has the address of the new one.
        new.exec("ping", &["-c", "1", "-W", "2", "10.9.0.1"]);
        let new = bind(&new);
        for _ in 0..10 {
            server.send_to(b"for the old one", mapped).unwrap();
        }
        new.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(new.recv(&mut buffer).is_err(), "{firewall}");
        new.set_read_timeout(Some(SOON)).unwrap();
        let mapped = open(&new, b"of the new one").expect("egress of the new one");
        server.send_to(b"new", mapped).unwrap();
        assert_eq!(new.recv(&mut buffer).unwrap(), 3, "{firewall}");
    }
}

/// The detached endpoint was the client of a published port, and the server continues to send.
#[test]
fn the_next_endpoint_with_an_address_receives_nothing_from_published_ports_of_the_last() {
    for firewall in ["--firewall=nftables", "--firewall=none"] {
        let scene = Scene::new();
        let _daemon = daemon(&scene, &[firewall]);
        let web = attach(&scene, "web", &["-p", "8080:80", "-p", "8080:80/udp"]);
        let datagrams = web.run(|| UdpSocket::bind("0.0.0.0:80")).unwrap();
        let streams = web.run(|| TcpListener::bind("0.0.0.0:80")).unwrap();
        datagrams.set_read_timeout(Some(SOON)).unwrap();
        let old = attach(&scene, "old", &["--ip", "10.9.0.50"]);
        let client = old.run(|| UdpSocket::bind("10.9.0.50:5555")).unwrap();
        client.send_to(b"question", "203.0.113.1:8080").unwrap();
        let (_, session) = datagrams.recv_from(&mut [0; 64]).unwrap();
        let _client = old.run(|| TcpStream::connect("203.0.113.1:8080")).unwrap();
        let (mut accepted, _) = streams.accept().unwrap();
        accepted.set_read_timeout(Some(SOON)).unwrap();
        // Others are not affected.
        let other = attach(&scene, "other", &[]);
        let mut other = other.run(|| TcpStream::connect("203.0.113.1:8080")).unwrap();
        let (mut accepted_other, _) = streams.accept().unwrap();
        scene.succeeds(&["detach", "old"]);
        let new = attach(&scene, "new", &["--ip", "10.9.0.50"]);
        // The neighbour entry of the host has the address of the new one.
        new.exec("ping", &["-c", "1", "-W", "2", "10.9.0.1"]);
        let new = new.run(|| UdpSocket::bind("10.9.0.50:5555")).unwrap();
        new.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        for _ in 0..10 {
            datagrams.send_to(b"answer", session).unwrap();
        }
        let received = new.recv_from(&mut [0; 64]);
        assert!(received.is_err(), "{firewall}, {session}: {received:?}");
        let ended = accepted.read(&mut [0; 64]);
        assert!(!matches!(ended, Ok(1..)) && !is_timeout(&ended), "{firewall}: {ended:?}");
        other.write_all(b"still here").unwrap();
        assert_eq!(accepted_other.read(&mut [0; 64]).unwrap(), 10, "{firewall}");
    }
}

/// A daemon can be killed after it has removed an endpoint and before it has ended its flows.
#[test]
fn a_start_ends_flows_of_addresses_without_an_endpoint() {
    let scene = Scene::new();
    let mut before = daemon(&scene, &["--firewall=nftables"]);
    let _web = attach(&scene, "web", &["--ip", "10.9.0.50"]);
    before.stop(Signal::KILL, SOON);
    for (source, port) in [("10.9.0.50", "7001"), ("10.9.0.99", "7002")] {
        scene.sh(&format!(
            "conntrack -I -p udp -s {source} -d 203.0.113.9 --sport {port} --dport 7000 -u SEEN_REPLY -t 60"
        ));
    }
    let _daemon = scene.daemon(&["--firewall=nftables"]);
    let entries = scene.net.host.exec("conntrack", &["-L"]);
    assert!(entries.contains("sport=7001") && !entries.contains("sport=7002"), "{entries}");
}

/// The host and another endpoint have neighbour entries from the previous owner.
#[test]
fn an_address_is_reachable_at_once_when_it_has_another_owner() {
    let scene = Scene::new();
    let _daemon = scene.daemon(&["--firewall=none"]);
    let create = ["network", "create", "front", "--subnet", "10.9.0.0/24", "--subnet", "fd09::/64"];
    scene.succeeds(&create);
    let other = attach(&scene, "other", &[]);
    let at = &["--ip", "10.9.0.50", "--ip", "fd09::50"];
    let ping = |from: &Namespace, address: &str| {
        from.command("ping")
            .args(["-c", "1", "-W", "1", address])
            .output()
            .unwrap()
            .status
            .success()
    };
    for owner in ["first", "second", "third"] {
        let _namespace = attach(&scene, owner, at);
        for address in ["10.9.0.50", "fd09::50"] {
            let reached = eventually(Duration::from_secs(2), || ping(&other, address));
            assert!(reached, "{owner} from an endpoint at {address}");
            let reached = eventually(Duration::from_secs(2), || ping(&scene.net.host, address));
            assert!(reached, "{owner} from the host at {address}");
        }
        scene.succeeds(&["detach", owner]);
    }
}

fn is_timeout<T>(result: &std::io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

/// No packet of a container leaves with its own address while the firewall changes.
#[test]
fn a_change_of_the_firewall_lets_no_untranslated_packet_out() {
    for (before, after) in
        [("none", "nftables"), ("none", "iptables"), ("nftables", "iptables"), ("nftables", "none")]
    {
        let scene = Scene::new();
        let mut first = daemon(&scene, &[&format!("--firewall={before}")]);
        let web = attach(&scene, "web", &[]);
        // So that untranslated packets can arrive.
        scene.net.client.ip_all("route add 10.9.0.0/24 via 203.0.113.1");
        let server = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:7000")).unwrap();
        server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let ends = AtomicBool::new(false);
        let sources = thread::scope(|scope| {
            let _end = End(&ends);
            let receiver = scope.spawn(|| {
                let mut sources = BTreeSet::new();
                let deadline = Instant::now() + Duration::from_secs(60);
                while Instant::now() < deadline && !ends.load(Ordering::Relaxed) {
                    if let Ok((_, from)) = server.recv_from(&mut [0; 100]) {
                        sources.insert(from.ip().to_string());
                    }
                }
                sources
            });
            let (web, ended) = (&web, &ends);
            scope.spawn(move || {
                web.run(|| {
                    let deadline = Instant::now() + Duration::from_secs(60);
                    while Instant::now() < deadline && !ended.load(Ordering::Relaxed) {
                        // A new flow each time.
                        if let Ok(socket) = UdpSocket::bind("0.0.0.0:0") {
                            let _ = socket.send_to(b"?", "203.0.113.9:7000");
                        }
                        thread::sleep(Duration::from_micros(300));
                    }
                });
            });
            thread::sleep(Duration::from_millis(300));
            first.stop(Signal::TERM, SOON);
            let second = scene.daemon(&[&format!("--firewall={after}")]);
            thread::sleep(Duration::from_millis(700));
            ends.store(true, Ordering::Relaxed);
            let sources = receiver.join().unwrap();
            drop(second);
            sources
        });
        let expected = BTreeSet::from(["203.0.113.1".to_owned()]);
        assert_eq!(sources, expected, "{before} to {after}");
    }
}

/// The networks of the state come up with each firewall, whatever the previous one was.
#[test]
fn a_restart_with_another_firewall_replaces_the_rules() {
    let scene = Scene::new();
    let mut before = daemon(&scene, &["--firewall=nftables"]);
    let web = attach(&scene, "web", &["-p", "8080:80"]);
    let neighbour = attach(&scene, "neighbour", &[]);
    let _server = PeerServer::tcp(&web, "10.9.0.2:80".parse().unwrap());
    let answers = |from: &Namespace, address: &str| {
        from.run(|| {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"?")?;
            stream.read(&mut [0; 100])
        })
    };
    for (number, firewall) in
        ["none", "iptables", "nftables", "iptables", "none", "nftables"].into_iter().enumerate()
    {
        let end = if number % 2 == 0 { Signal::KILL } else { Signal::INT };
        before.stop(end, SOON);
        before = scene.daemon(&[&format!("--firewall={firewall}")]);
        for (from, address) in [
            (&scene.net.client, "203.0.113.1:8080"),
            (&neighbour, "10.9.0.2:80"),
            (&neighbour, "203.0.113.1:8080"),
        ] {
            let length = answers(from, address);
            assert!(length.is_ok_and(|length| length > 0), "{firewall}: {address}");
        }
        let tables = scene.net.host.exec("nft", &["list", "tables"]);
        assert_eq!(tables.contains("tidegate"), firewall == "nftables", "{firewall}: {tables}");
        let rules = scene.net.host.exec("iptables-save", &[]);
        assert_eq!(rules.contains("TIDEGATE"), firewall == "iptables", "{firewall}: {rules}");
    }
}

/// While another program holds the xtables lock, a publish waits, and fails with 503. Status,
/// metrics and DNS are served meanwhile.
#[test]
fn a_held_xtables_lock_delays_a_publish_only() {
    let mut scene = Scene::with_legacy_iptables().with_metrics();
    let run = tempfile::tempdir().unwrap();
    // iptables-legacy takes flock(2) on this file.
    let lock = fs::File::create(run.path().join("xtables.lock")).unwrap();
    let mounts = Mounts::builder().bind(run.path(), "/run").build(&scene.net.host);
    scene.net.host = scene.net.host.with_mounts(mounts);
    let _daemon = daemon(&scene, &["--firewall=iptables"]);
    let web = attach(&scene, "web", &[]);
    lock.lock().unwrap();
    let publish = thread::scope(|scope| {
        let publish = scope.spawn(|| {
            let body = json!({ "endpoint": "web", "spec": "8080:80" }).to_string();
            let begun = Instant::now();
            let (status, body) = ask(&scene.socket(), "POST", "/v1/ports", &body);
            (status, body, begun.elapsed())
        });
        thread::sleep(Duration::from_millis(500));
        let begun = Instant::now();
        assert_eq!(get(&scene.socket(), "/v1/status").0, 200);
        assert_eq!(get(&scene.socket(), "/v1/ports").0, 200);
        assert!(scene.figures().contains("tidegate_network_endpoints"));
        assert_eq!(web.exec("dig", &["+short", "@127.0.0.11", "web"]), "10.9.0.2\n");
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        publish.join().unwrap()
    });
    lock.unlock().unwrap();
    let (status, body, took) = publish;
    assert_eq!(status, 503, "{body} after {took:?}");
    assert!(body["error"].as_str().unwrap().contains("xtables lock"), "{body}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    scene.succeeds(&["ps"]);
    let body = json!({ "endpoint": "web", "spec": "8080:80" }).to_string();
    assert_eq!(ask(&scene.socket(), "POST", "/v1/ports", &body).0, 201, "a retry succeeds");
}

/// A container that returns in another namespace is attached again, also while no daemon runs.
#[test]
fn containers_return_in_another_namespace() {
    let scene = Scene::new();
    let mut daemon = daemon(&scene, &["--firewall=nftables"]);
    let place = scene.directory.path().join("web");
    let put = |namespace: &Namespace| {
        let link = scene.directory.path().join("next");
        std::os::unix::fs::symlink(namespace.path(), &link).unwrap();
        fs::rename(&link, &place).unwrap();
    };
    let [first, second, third] = [(); 3].map(|()| Namespace::new());
    put(&first);
    let path = place.to_str().unwrap();
    scene.succeeds(&["attach", "front", "--name", "web", "--netns", path, "-p", "8080:80"]);
    let is_in = |namespace: &Namespace| namespace.exec("ip", &["-o", "addr"]).contains("10.9.0.2");
    let other = attach(&scene, "worker", &[]);
    assert!(is_in(&first));
    put(&second);
    assert!(eventually(SOON, || is_in(&second)));
    daemon.signal(Signal::KILL);
    daemon.wait(SOON);
    fs::remove_file(&place).unwrap();
    daemon = scene.daemon(&["--firewall=nftables"]);
    let shown = || get(&scene.socket(), "/v1/status").1["services"][0]["state"].to_string();
    assert_eq!(shown(), "\"gone\"");
    // Its name stays private. Without a reachable upstream server, a forwarded query would fail.
    for name in ["web.front", "web"] {
        let answer = other.exec("dig", &["@127.0.0.11", "+tries=1", "+time=2", name]);
        assert!(answer.contains("status: NOERROR") && answer.contains("ANSWER: 0"), "{answer}");
    }
    put(&third);
    assert!(eventually(SOON, || is_in(&third)), "{}", daemon.output());
    let ports = || get(&scene.socket(), "/v1/ports").1.as_array().unwrap().len();
    assert!(eventually(SOON, || ports() == 2 && shown() == "\"adopted\""), "{}", shown());
    assert_eq!(other.exec("dig", &["+short", "@127.0.0.11", "web.front"]), "10.9.0.2\n");
}

/// The second daemon joins the namespaces of the first, fails, and leaves them as they are.
#[test]
fn a_second_daemon_of_an_ordinary_user_changes_nothing() {
    let scene = Scene::new().with_open_tun();
    let mut daemon = scene.daemon_as_nobody(&[]);
    scene.succeeds(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    let (keeper, inside) = (scene.keeper(), scene.kept_namespace());
    let before = state(&inside);
    assert!(before.contains("10.9.0.1/24"), "{before}");
    let mut second = scene.tidegate_as_nobody();
    second.args(["daemon", "--metrics", "none", "--state"]).arg(scene.run.path().join("state"));
    let line = scene::refused(&mut second);
    assert!(line.starts_with("tidegate: error: tidegate is up already (process"), "{line}");
    assert_eq!((scene.keeper(), state(&inside)), (keeper, before.clone()));

    // A daemon that fails on its own keeps the networks of the previous one, too.
    daemon.stop(Signal::INT, SOON);
    let file = scene.run.path().join("state/state.redb");
    let good = fs::read(&file).unwrap();
    fs::write(&file, b"not a database").unwrap();
    let line = scene::refused(&mut second);
    assert!(line.contains("corrupt"), "{line}");
    assert_eq!(scene.keeper(), keeper);
    fs::write(&file, good).unwrap();
    let mut daemon = scene.daemon_as_nobody(&[]);
    scene.succeeds(&["network", "rm", "front"]);
    daemon.stop(Signal::INT, SOON);
    assert_eq!(scene.keeper(), None);
}

#[test]
fn two_daemons_and_bad_state_files_are_one_line() {
    let scene = Scene::new();
    let mut daemon = daemon(&scene, &["--firewall=nftables"]);
    let file = scene.run.path().join("state/state.redb");
    let state_directory = scene.run.path().join("state");
    let start = |socket: &str| {
        let mut command = scene.tidegate();
        command.args(["daemon", "--metrics", "none", "--state"]).arg(&state_directory);
        scene::refused(command.env("TIDEGATE_SOCKET", scene.run.path().join(socket)))
    };
    let line = start("other.sock");
    assert!(line.contains("is in use by another process"), "{line}");
    daemon.stop(Signal::INT, SOON);
    assert_eq!(scene.keeper(), None, "only a daemon without root needs one");
    fs::write(&file, b"not a database").unwrap();
    let before = state(&scene.net.host);
    let line = start("api.sock");
    assert!(line.starts_with("tidegate: error: state file ") && line.contains("corrupt"), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert_eq!(state(&scene.net.host), before, "what exists is left alone");
}
