//! Services: ports that every host publishes, which lead to tasks on any of them.

use super::{Mesh, SOON};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tidegate_testbed::hosts::Hosts;
use tidegate_testbed::server::{EchoServer, PeerServer};
use tidegate_testbed::{Namespace, Signal, eventually};

/// Time for an answer. An unanswered SYN is sent again after a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// A task that answers with the address of its client and its own name, over TCP and UDP.
struct Task {
    namespace: Namespace,
    _servers: [PeerServer; 2],
}

impl Task {
    #[track_caller]
    fn attach(mesh: &Mesh, host: usize, name: &str, more: &[&str]) -> Self {
        let args = [&["--service", "shop"], more].concat();
        let (namespace, _) = mesh.attach(host, name, &args);
        let any: SocketAddr = "[::]:8080".parse().unwrap();
        let servers = [
            PeerServer::tcp_named(&namespace, any, name),
            PeerServer::udp_named(&namespace, any, name),
        ];
        Self { namespace, _servers: servers }
    }
}

/// The answer of a task: the address of its client, and its name.
type Answer = (SocketAddr, String);

fn answer(text: &str) -> Option<Answer> {
    let (peer, name) = text.split_once(' ')?;
    let peer: SocketAddr = peer.parse().ok()?;
    Some((SocketAddr::new(peer.ip().to_canonical(), peer.port()), name.to_owned()))
}

/// Asks over TCP.
fn ask(from: &Namespace, to: SocketAddr) -> std::io::Result<Answer> {
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        answer(&text).ok_or_else(|| std::io::Error::other(format!("{text:?}")))
    })
}

/// Asks over UDP.
fn ask_udp(from: &Namespace, to: SocketAddr) -> std::io::Result<Answer> {
    from.run(|| {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send(b"?")?;
        let mut buffer = [0; 128];
        let length = socket.recv(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        answer(&text).ok_or_else(|| std::io::Error::other(text))
    })
}

impl Mesh {
    /// Creates `shop` on `front`, published on port 80.
    #[track_caller]
    fn create_shop(&self, more: &[&str]) -> Value {
        let args = ["service", "create", "shop", "--network", "front", "--json"];
        let ports = ["-p", "80:8080", "-p", "80:8080/udp"];
        serde_json::from_str(&self.succeeds(0, &[&args[..], &ports, more].concat())).unwrap()
    }

    /// Waits until host `number` sees `count` tasks that are ready.
    #[track_caller]
    fn has_ready(&self, number: usize, count: usize) {
        self.until(number, &["service", "ls", "--json"], |text| {
            let services: Value = serde_json::from_str(text).unwrap();
            let tasks = services[0]["tasks"].as_array().unwrap();
            tasks.iter().filter(|task| task["state"] == "ready").count() == count
        });
    }
}

fn v6(number: usize) -> IpAddr {
    format!("2001:db8::{:x}", number + 1).parse().unwrap()
}

#[test]
fn every_host_leads_to_all_tasks_which_see_the_address_of_the_client() {
    let mesh = Mesh::joined(3);
    let created = mesh.create_shop(&[]);
    for host in created["hosts"].as_array().unwrap() {
        assert_eq!(host["ports"], serde_json::json!(["80/tcp", "80/udp"]), "{created}");
        assert_eq!(host["problem"], Value::Null, "{created}");
    }
    let tasks = [
        Task::attach(&mesh, 0, "a", &[]),
        Task::attach(&mesh, 1, "b", &[]),
        Task::attach(&mesh, 1, "c", &[]),
    ];
    let outside = &mesh.hosts.switch;
    for number in 0..3 {
        mesh.has_ready(number, 3);
        for (at, client) in [(Hosts::address(number), "192.0.2.254"), (v6(number), "2001:db8::fe")]
        {
            let client: IpAddr = client.parse().unwrap();
            let mut names = BTreeSet::new();
            for _ in 0..6 {
                for ask in [ask, ask_udp] {
                    let answer = ask(outside, SocketAddr::new(at, 80));
                    let (peer, name) = answer.unwrap_or_else(|error| {
                        panic!("host {number} at {at}: {error}\n{}", mesh.daemons[number].output())
                    });
                    assert_eq!(peer.ip(), client, "{name} through host {number} at {at}");
                    names.insert(name);
                }
            }
            assert_eq!(names.len(), 3, "all tasks through host {number} at {at}");
        }
    }
    // From hosts and their containers, with and without a task of their own.
    let (other, _) = mesh.attach(2, "other", &[]);
    for number in 0..3 {
        let host = &mesh.hosts.hosts[number];
        let local: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        for at in
            local.into_iter().chain([Hosts::address(number), Hosts::address((number + 1) % 3)])
        {
            for ask in [ask, ask_udp] {
                let answer = ask(host, SocketAddr::new(at, 80));
                assert!(answer.is_ok(), "from host {number} to {at}: {answer:?}");
            }
        }
    }
    for (from, name) in [(&tasks[0].namespace, "a"), (&tasks[1].namespace, "b"), (&other, "other")]
    {
        for at in [Hosts::address(0), Hosts::address(1), Hosts::address(2), v6(0)] {
            for ask in [ask, ask_udp] {
                // The third one reaches the container itself, if it is a task.
                for _ in 0..3 {
                    let answer = ask(from, SocketAddr::new(at, 80));
                    assert!(answer.is_ok(), "from {name} to {at}: {answer:?}");
                }
            }
        }
        // The name of the service.
        let found = from.exec("dig", &["+short", "@127.0.0.11", "-q", "shop", "-t", "A"]);
        assert_eq!(found.lines().count(), 3, "{name}: {found}");
    }
    // Members of the network reach each other directly. A sandbox accepts packets to all addresses,
    // and must not answer ARP requests for them.
    let all = [&tasks[0].namespace, &tasks[1].namespace, &tasks[2].namespace, &other];
    let of = |namespace: &Namespace| -> (IpAddr, String) {
        let text = namespace.ip(&["-4", "-o", "addr", "show", "eth0"]);
        let address = text.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
        let link = namespace.ip(&["-o", "link", "show", "eth0"]);
        let mac = link.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        (address.parse().unwrap(), mac.to_owned())
    };
    for from in all {
        for to in all.map(of).into_iter().filter(|to| *to != of(from)) {
            let (address, mac) = to;
            from.ip(&["neigh", "flush", "all"]);
            assert!(super::reaches(from, address), "{address}");
            let seen = from.ip(&["neigh", "show", "to", &address.to_string()]);
            assert!(seen.contains(&mac), "{address}: {seen}");
            assert!(!seen.contains("FAILED"), "{seen}");
        }
    }
    // The hosts reach neither the containers nor the sandbox.
    let address = tasks[0].namespace.ip(&["-4", "-o", "addr", "show", "eth0"]);
    let address = address.split_whitespace().nth(3).unwrap().split('/').next().unwrap();
    assert!(!super::reaches(&mesh.hosts.hosts[0], address.parse().unwrap()));
    // The service ends with everything that it needs. Its tasks stay attached.
    mesh.succeeds(1, &["service", "rm", "shop"]);
    for number in 0..3 {
        let is_closed = eventually(SOON, || {
            ask(outside, SocketAddr::new(Hosts::address(number), 80))
                .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
        });
        assert!(is_closed, "host {number}");
    }
    let attached = mesh.succeeds(1, &["ps"]);
    assert_eq!(
        attached.lines().filter(|line| line.starts_with(['b', 'c'])).count(),
        2,
        "{attached}"
    );
    let rules = tasks[0].namespace.ip(&["rule"]);
    assert!(eventually(SOON, || !tasks[0].namespace.ip(&["rule"]).contains("sport")), "{rules}");
    for (number, name) in [(0, "a"), (1, "b"), (1, "c"), (2, "other")] {
        mesh.succeeds(number, &["detach", name]);
    }
    let removed = eventually(SOON, || mesh.run(0, &["network", "rm", "front"]).status.success());
    assert!(removed, "{}", mesh.fails(0, &["network", "rm", "front"]));
}

#[test]
fn invalid_services_are_refused_and_ports_in_use_are_named() {
    let mut mesh = Mesh::new(2);
    mesh.join_etcd_at_switch();
    fn create<'a>(args: &[&'a str]) -> Vec<&'a str> {
        [&["service", "create"], args].concat()
    }
    let front = ["--network", "front"];
    let error = mesh.fails(0, &create(&["a", "--network", "back", "-p", "80:80"]));
    assert_eq!(error, "network back does not exist in the cluster");
    let error = mesh.fails(0, &create(&[&["a", "-p", "127.0.0.1:80:80"], &front[..]].concat()));
    assert!(error.contains("at all of its addresses"), "{error}");
    let error = mesh.fails(0, &create(&[&["a", "-p", "80"], &front[..]].concat()));
    assert!(error.contains("use PORT:PORT"), "{error}");
    // Another service has the port.
    mesh.succeeds(0, &create(&[&["a", "-p", "80:80"], &front[..]].concat()));
    let error =
        mesh.fails(1, &create(&[&["b", "-p", "81:80", "-p", "80:80"], &front[..]].concat()));
    assert_eq!(error, "service b: port 80/tcp is published by service a of the cluster");
    // Another program of one host has the port.
    let taken = mesh.hosts.hosts[1].run(|| TcpListener::bind("0.0.0.0:81")).unwrap();
    let text = mesh.succeeds(0, &create(&[&["b", "-p", "81:80"], &front[..]].concat()));
    assert!(text.contains("b on host-1: port 81/tcp on 0.0.0.0 is in use"), "{text}");
    let problem = |text: &str| text.contains("service b: port 81/tcp on 0.0.0.0 is in use");
    mesh.until(1, &["mesh", "status"], problem);
    drop(taken);
    mesh.until(0, &["service", "ls"], |text| !text.contains("in use"));
    // Tasks.
    let namespace = Namespace::new();
    let path = namespace.path();
    let attach = |more: &[&str]| {
        let args = ["attach", "--netns", path.to_str().unwrap(), "--name", "x"];
        [&args[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let fails = |mesh: &Mesh, args: Vec<String>| {
        mesh.fails(0, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let error = fails(&mesh, attach(&["front", "--service", "none"]));
    assert_eq!(error, "there is no service none in the cluster");
    let error = fails(&mesh, attach(&["front", "--service", "a", "--weight", "257"]));
    assert_eq!(error, "a weight is 1 to 256");
    mesh.succeeds(0, &["network", "create", "local"]);
    let error = fails(&mesh, attach(&["local", "--service", "a"]));
    assert!(error.contains("attach it to that network"), "{error}");
    // The network of a service stays.
    let error = mesh.fails(0, &["network", "rm", "front"]);
    assert_eq!(error, "network front has services: a, b; remove them first");
    assert_eq!(
        mesh.fails(0, &["service", "scale", "none", "1"]),
        "there is no service none in the cluster"
    );
    assert_eq!(
        mesh.fails(0, &["service", "rm", "none"]),
        "there is no service none in the cluster"
    );
    // Without endpoints of users, a host can leave.
    mesh.succeeds(1, &["mesh", "leave"]);
    let left = mesh.hosts.hosts[1].ip(&["-o", "link"]);
    assert!(!left.contains("tg"), "{left}");
}

/// Connects 200 times a second through the hosts in turn until `during` is done. Returns the time
/// of each connection, and those that failed.
fn connect_during(
    from: &Namespace,
    through: &[IpAddr],
    during: impl FnOnce(),
) -> (Vec<Duration>, Vec<String>) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut times, mut failures) = (Vec::new(), Vec::new());
            for number in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let begun = Instant::now();
                let at = through[number % through.len()];
                match ask(from, SocketAddr::new(at, 80)) {
                    Ok(_) => times.push(begun.elapsed()),
                    Err(error) => {
                        failures.push(format!("{at} after {:?}: {error}", begun.elapsed()));
                    }
                }
                std::thread::sleep(Duration::from_millis(5).saturating_sub(begun.elapsed()));
            }
            (times, failures)
        });
        std::thread::sleep(Duration::from_millis(300));
        during();
        done.store(true, Ordering::Relaxed);
        load.join().unwrap()
    })
}

#[test]
fn clients_of_other_hosts_do_not_notice_that_a_host_dies() {
    let mesh = Mesh::joined(3);
    mesh.create_shop(&[]);
    let _tasks: Vec<Task> = (0..3)
        .flat_map(|host| (0..2).map(move |number| (host, format!("t{host}{number}"))))
        .map(|(host, name)| Task::attach(&mesh, host, &name, &[]))
        .collect();
    (0..3).for_each(|number| mesh.has_ready(number, 6));
    let through = [Hosts::address(0), Hosts::address(1)];
    let (mut times, failures) = connect_during(&mesh.hosts.switch, &through, || {
        mesh.hosts.plug(2, false);
        mesh.has_ready(0, 4);
        mesh.has_ready(1, 4);
        std::thread::sleep(Duration::from_secs(2));
        mesh.hosts.plug(2, true);
        mesh.has_ready(0, 6);
        std::thread::sleep(Duration::from_millis(500));
    });
    assert_eq!(failures, Vec::<String>::new(), "of {}", times.len());
    times.sort();
    let p99 = times[times.len() * 99 / 100];
    println!("{} connections, p50 {:?}, p99 {p99:?}", times.len(), times[times.len() / 2]);
    assert!(times.len() > 100);
}

#[test]
fn tasks_share_connections_by_policy_and_stand_by() {
    let mesh = Mesh::joined(2);
    mesh.create_shop(&["--replicas", "2"]);
    let tasks = [
        Task::attach(&mesh, 0, "a", &["--weight", "3"]),
        Task::attach(&mesh, 1, "b", &[]),
        Task::attach(&mesh, 1, "c", &[]),
    ];
    mesh.has_ready(0, 2);
    let count = |number: usize, connections: usize| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..connections {
            let at = SocketAddr::new(Hosts::address(number), 80);
            *counts.entry(ask(&mesh.hosts.switch, at).unwrap().1).or_default() += 1;
        }
        counts
    };
    assert_eq!(count(0, 40), [("a".to_owned(), 30), ("b".to_owned(), 10)].into());
    // The next one takes over.
    mesh.succeeds(0, &["detach", "a"]);
    mesh.has_ready(1, 2);
    assert_eq!(count(1, 20), [("b".to_owned(), 10), ("c".to_owned(), 10)].into());
    mesh.succeeds(1, &["service", "scale", "shop", "0"]);
    mesh.has_ready(0, 0);
    let at = SocketAddr::new(Hosts::address(0), 80);
    let refused = eventually(SOON, || ask(&mesh.hosts.switch, at).is_err());
    assert!(refused, "no task");
    mesh.succeeds(1, &["service", "scale", "shop", "all"]);
    mesh.has_ready(0, 2);
    assert_eq!(count(0, 20).len(), 2);
    drop(tasks);
}

/// The state of task `name`, as host `number` reports it.
fn state_of(mesh: &Mesh, number: usize, name: &str) -> String {
    let services = mesh.succeeds(number, &["service", "ls", "--json"]);
    let services: Value = serde_json::from_str(&services).unwrap();
    let tasks = services[0]["tasks"].as_array().unwrap();
    let task = tasks.iter().find(|task| task["name"] == name);
    task.map_or_else(|| "none".to_owned(), |task| task["state"].as_str().unwrap().to_owned())
}

#[track_caller]
fn until_state(mesh: &Mesh, number: usize, name: &str, wanted: &str) {
    let mut last = String::new();
    let is_so = eventually(SOON, || {
        last = state_of(mesh, number, name);
        last == wanted
    });
    assert!(is_so, "task {name} on host {number} is {last}, not {wanted}");
}

#[test]
fn tasks_are_ready_while_healthy_and_keep_their_connections_when_detached() {
    let mesh = Mesh::joined(2);
    let health = ["--health-http", "8080/ready", "--health-interval", "100ms"];
    mesh.create_shop(&[&health[..], &["--health-retries", "2"]].concat());
    let (status, ends) = (AtomicBool::new(true), AtomicBool::new(false));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let ready = mesh.directory.path().join("ready");
        let command = format!("test -e {}", ready.display());
        let (namespace, address) =
            mesh.attach(1, "web", &["--service", "shop", "--health-cmd", &command]);
        until_state(&mesh, 0, "web", "starting");
        let listener = namespace.run(|| TcpListener::bind("[::]:8080")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (status, ends) = (&status, &ends);
        scope.spawn(move || {
            // Answers requests, and echoes everything else.
            while !ends.load(Ordering::Relaxed) && begun.elapsed() < 4 * SOON {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                scope.spawn(move || {
                    let mut buffer = [0; 1024];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let is_good = status.load(Ordering::Relaxed);
                        let answer: &[u8] = match buffer.starts_with(b"GET /ready HTTP/1.1\r\n") {
                            true if is_good => b"HTTP/1.1 204 Up\r\n\r\n",
                            true => b"HTTP/1.1 503 Down\r\n\r\n",
                            false => &buffer[..length],
                        };
                        let _ = stream.write_all(answer);
                    }
                });
            }
        });
        // The server answers, and the command fails.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(state_of(&mesh, 0, "web"), "starting");
        std::fs::write(&ready, "").unwrap();
        until_state(&mesh, 0, "web", "ready");
        status.store(false, Ordering::Relaxed);
        until_state(&mesh, 0, "web", "starting");
        let problem = |text: &str| text.contains("endpoint web is not healthy: GET /ready");
        mesh.until(1, &["mesh", "status"], problem);
        status.store(true, Ordering::Relaxed);
        until_state(&mesh, 0, "web", "ready");
        // An open connection keeps it attached until the connection ends.
        let at = SocketAddr::new(Hosts::address(0), 80);
        let mut stream = mesh.hosts.switch.run(|| TcpStream::connect(at)).unwrap();
        let mut echo = |text: &[u8]| {
            stream.write_all(text).unwrap();
            let mut buffer = vec![0; text.len()];
            stream.read_exact(&mut buffer).unwrap();
            assert_eq!(buffer, text);
        };
        echo(b"before");
        let begun = Instant::now();
        let mesh_ref = &mesh;
        let detached = scope.spawn(move || mesh_ref.succeeds(1, &["detach", "web"]));
        until_state(&mesh, 0, "web", "draining");
        assert!(mesh.fails(1, &["detach", "web"]).contains("is being detached already"));
        // No new connection gets there.
        let refused = mesh.hosts.switch.run(|| {
            let mut other = TcpStream::connect(at)?;
            other.read(&mut [0])
        });
        assert!(refused.is_err(), "{refused:?}");
        std::thread::sleep(Duration::from_millis(1_000));
        echo(b"meanwhile");
        drop(stream);
        detached.join().unwrap();
        let took = begun.elapsed();
        assert!((1_000..8_000).contains(&took.as_millis()), "{took:?}");
        until_state(&mesh, 0, "web", "none");
        assert!(!namespace.ip(&["link"]).contains("eth0"), "{address} is detached");
        ends.store(true, Ordering::Relaxed);
    });
}

#[test]
fn other_hosts_do_not_notice_that_a_daemon_is_killed_and_etcd_has_ended() {
    let mut mesh = Mesh::joined(3);
    mesh.create_shop(&[]);
    let _tasks: Vec<Task> =
        (0..3).map(|host| Task::attach(&mesh, host, &format!("t{host}"), &[])).collect();
    (0..3).for_each(|number| mesh.has_ready(number, 3));
    let client = mesh.hosts.switch.clone();
    let through = [Hosts::address(0), Hosts::address(1)];
    let (times, failures) = connect_during(&client, &through, || {
        for _ in 0..2 {
            mesh.daemons[2].signal(Signal::KILL);
            mesh.daemons[2].wait(SOON);
            mesh.has_ready(0, 2);
            mesh.daemons[2] = mesh.start(2, &[]);
            mesh.has_ready(0, 3);
            mesh.has_ready(2, 3);
        }
        // It leads to all tasks again.
        let names: BTreeSet<String> = (0..6)
            .map(|_| ask(&client, SocketAddr::new(Hosts::address(2), 80)).unwrap().1)
            .collect();
        assert_eq!(names.len(), 3);
    });
    assert_eq!(failures, Vec::<String>::new(), "of {}", times.len());
    // Without etcd, everything that exists works.
    for server in &mut mesh.etcd.as_mut().unwrap().servers {
        server.signal(Signal::KILL);
    }
    let through = [0, 1, 2].map(Hosts::address);
    let (times, failures) = connect_during(&client, &through, || {
        std::thread::sleep(Duration::from_secs(8));
    });
    assert_eq!(failures, Vec::<String>::new(), "without etcd, of {}", times.len());
    assert!(times.len() > 300, "{}", times.len());
}

#[test]
fn clients_do_not_notice_that_all_tasks_are_replaced_again_and_again() {
    let mesh = Mesh::joined(3);
    mesh.create_shop(&[]);
    let mut tasks: Vec<(String, Task)> = (0..3)
        .map(|host| {
            let name = format!("r{host}");
            let task = Task::attach(&mesh, host, &name, &[]);
            (name, task)
        })
        .collect();
    (0..3).for_each(|number| mesh.has_ready(number, 3));
    let through = [0, 1, 2].map(Hosts::address);
    let (times, failures) = connect_during(&mesh.hosts.switch, &through, || {
        for round in 0..12 {
            let host = round % 3;
            let name = format!("n{round}");
            let new = Task::attach(&mesh, host, &name, &[]);
            until_state(&mesh, (host + 1) % 3, &name, "ready");
            let (old, task) = std::mem::replace(&mut tasks[host], (name, new));
            mesh.succeeds(host, &["detach", &old]);
            drop(task);
        }
    });
    assert_eq!(failures, Vec::<String>::new(), "of {}", times.len());
}

#[test]
fn udp_clients_move_to_another_task_and_tasks_can_see_the_proxy() {
    let mesh = Mesh::joined(2);
    mesh.create_shop(&["--drain", "0"]);
    let tasks: BTreeMap<&str, Task> = [("a", 0), ("b", 1)]
        .map(|(name, host)| (name, Task::attach(&mesh, host, name, &[])))
        .into();
    mesh.has_ready(0, 2);
    mesh.has_ready(1, 2);
    let socket = mesh.hosts.switch.run(|| UdpSocket::bind("0.0.0.0:5000")).unwrap();
    socket.connect(SocketAddr::new(Hosts::address(0), 80)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let ask = || {
        socket.send(b"?").unwrap();
        let mut buffer = [0; 128];
        let length = socket.recv(&mut buffer).ok()?;
        answer(std::str::from_utf8(&buffer[..length]).unwrap())
    };
    let (peer, first) = ask().unwrap();
    assert_eq!(peer, "192.0.2.254:5000".parse().unwrap(), "also the port of the client");
    assert_eq!(ask().unwrap().1, first, "a session has one task");
    mesh.succeeds(usize::from(first == "b"), &["detach", &first]);
    mesh.has_ready(0, 1);
    let (_, second) = ask().unwrap();
    assert_ne!(first, second);
    drop(tasks);
    // The PROXY protocol, and the address of the sandbox.
    mesh.succeeds(0, &["service", "rm", "shop"]);
    let args = ["service", "create", "raw", "--network", "front", "-p", "90:9000"];
    mesh.succeeds(0, &[&args[..], &["--source", "proxy-protocol"]].concat());
    let (namespace, _) = mesh.attach(1, "raw-1", &["--service", "raw"]);
    let listener = namespace.run(|| TcpListener::bind("[::]:9000")).unwrap();
    mesh.has_ready(0, 1);
    let at = SocketAddr::new(Hosts::address(0), 90);
    let client = mesh.hosts.switch.run(|| TcpStream::connect(at)).unwrap();
    let (mut stream, peer) = listener.accept().unwrap();
    assert!(peer.ip().to_canonical().to_string().starts_with("172."), "{peer}");
    let mut header = [0; 28];
    stream.read_exact(&mut header).unwrap();
    assert_eq!(header[..12], *b"\r\n\r\n\0\r\nQUIT\n");
    assert_eq!(header[16..24], [192, 0, 2, 254, 192, 0, 2, 1]);
    drop((client, stream));
    mesh.succeeds(0, &["service", "rm", "raw"]);
    mesh.succeeds(0, &[&args[..], &["--source", "proxy-protocol-v1"]].concat());
    mesh.has_ready(0, 1);
    let mut accepted = None;
    let is_served = eventually(SOON, || {
        let client = mesh.hosts.switch.run(|| TcpStream::connect(at));
        accepted = client.ok().and_then(|client| {
            let (mut stream, _) = listener.accept().ok()?;
            let mut line = vec![0; 32];
            stream.read_exact(&mut line).ok()?;
            drop(client);
            String::from_utf8(line).ok()
        });
        accepted.as_ref().is_some_and(|line| line.starts_with("PROXY TCP4 192.0.2.254 192.0.2.1"))
    });
    assert!(is_served, "{accepted:?}");
    // Rules of the user apply to the host that accepts the connection.
    let table = ["add", "rule", "inet", "tidegate_user", "TIDEGATE-USER"];
    let drops = ["ip", "saddr", "192.0.2.254", "drop"];
    mesh.hosts.hosts[0].exec("nft", &[&table[..], &drops].concat());
    let connects = |number: usize| {
        let at = SocketAddr::new(Hosts::address(number), 90);
        mesh.hosts
            .switch
            .run(|| TcpStream::connect_timeout(&at, Duration::from_millis(500)))
            .is_ok()
    };
    assert!(!connects(0) && connects(1));
}

#[test]
fn large_datagrams_and_transfers_pass_between_hosts() {
    let mesh = Mesh::joined(2);
    mesh.create_shop(&[]);
    let (namespace, _) = mesh.attach(1, "big", &["--service", "shop"]);
    let any: SocketAddr = "[::]:8080".parse().unwrap();
    let _servers = [EchoServer::tcp(&namespace, any), EchoServer::udp(&namespace, any)];
    mesh.has_ready(0, 1);
    for at in [Hosts::address(0), v6(0)] {
        let to = SocketAddr::new(at, 80);
        let any: IpAddr = if at.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = mesh.hosts.switch.run(|| UdpSocket::bind((any, 0))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(to).unwrap();
        for length in [1, 1_400, 1_473, 9_000, 40_000] {
            let sent: Vec<u8> = (0..length).map(|number: usize| number as u8).collect();
            socket.send(&sent).unwrap();
            let mut received = vec![0; 65_536];
            let got = socket.recv(&mut received);
            assert!(got.is_ok_and(|got| received[..got] == sent), "{length} bytes to {to}");
        }
        let mut stream = mesh.hosts.switch.run(|| TcpStream::connect(to)).unwrap();
        let sent: Vec<u8> = (0..4 << 20).map(|number: u32| (number / 7) as u8).collect();
        let mut back = stream.try_clone().unwrap();
        let expected = sent.clone();
        let reader = std::thread::spawn(move || {
            let mut received = vec![0; expected.len()];
            back.read_exact(&mut received).unwrap();
            assert!(received == expected, "4 MiB arrive unchanged");
        });
        stream.write_all(&sent).unwrap();
        reader.join().unwrap();
    }
}

#[test]
fn open_connections_to_tasks_of_a_dead_host_are_reset() {
    let mut mesh = Mesh::new(2);
    mesh.join_etcd_at_switch();
    mesh.create_shop(&[]);
    let (namespace, _) = mesh.attach(1, "echo", &["--service", "shop"]);
    let _server = EchoServer::tcp(&namespace, "[::]:8080".parse().unwrap());
    mesh.has_ready(0, 1);
    let at = SocketAddr::new(Hosts::address(0), 80);
    let mut stream = mesh.hosts.switch.run(|| TcpStream::connect(at)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut echo = || {
        stream.write_all(b"?")?;
        stream.read_exact(&mut [0])
    };
    echo().unwrap();
    // Not while it may return.
    mesh.hosts.plug(1, false);
    mesh.has_ready(0, 0);
    mesh.hosts.plug(1, true);
    mesh.has_ready(0, 1);
    assert!(eventually(SOON, || echo().is_ok()), "after a short interruption");
    mesh.hosts.plug(1, false);
    mesh.reports(0, 1, "down");
    let mut last = None;
    let is_reset = eventually(SOON, || {
        last = echo().err().map(|error| error.kind());
        last == Some(std::io::ErrorKind::ConnectionReset)
    });
    assert!(is_reset, "{last:?}");
}
