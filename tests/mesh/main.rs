//! `tidegate mesh`: daemons of several hosts, which are namespaces, with a real etcd.

mod services;

use serde_json::Value;
use std::fs;
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tidegate_model::LOOPBACK_INDEX;
use tidegate_testbed::frames::{LinkSocket, checksum, ethernet, ipv4};
use tidegate_testbed::hosts::{Etcd, Hosts};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(15);

/// Daemons on hosts of one switch.
struct Mesh {
    hosts: Hosts,
    directory: TempDir,
    daemons: Vec<Process>,
    etcd: Option<Etcd>,
    /// Kernel features that are treated as missing (`TIDEGATE_LACKS`).
    lacks: &'static str,
}

impl Mesh {
    /// `count` hosts with daemons, in no cluster yet.
    #[track_caller]
    fn new(count: u8) -> Self {
        Self::lacking("", count)
    }

    #[track_caller]
    fn lacking(lacks: &'static str, count: u8) -> Self {
        let hosts = Hosts::new(count);
        let directory = tempfile::tempdir().unwrap();
        let mut mesh = Self { hosts, directory, daemons: Vec::new(), etcd: None, lacks };
        for number in 0..count.into() {
            let daemon = mesh.start(number, &[]);
            mesh.daemons.push(daemon);
        }
        mesh
    }

    /// `count` hosts that have joined, with an etcd member on each, and the network `front`.
    #[track_caller]
    fn joined(count: u8) -> Self {
        Self::new(count).all_joined()
    }

    /// Joins all hosts, with an etcd member on each, and creates `front`.
    #[track_caller]
    fn all_joined(mut self) -> Self {
        let count = self.daemons.len() as u8;
        let mesh = &mut self;
        let member = |number: usize| (mesh.hosts.hosts[number].clone(), Hosts::address(number));
        mesh.etcd = Some(Etcd::start((0..count.into()).map(member).collect()));
        for number in 0..count.into() {
            mesh.join(number);
        }
        mesh.succeeds(0, &["network", "create", "--driver", "overlay", "front", "--ipv6"]);
        for number in 0..count.into() {
            mesh.until(number, &["network", "ls"], |text| text.contains("front"));
        }
        self
    }

    /// Joins the first two hosts, with an etcd of one member beside them, and creates `front`.
    #[track_caller]
    fn join_etcd_at_switch(&mut self) {
        let etcd_host = self.hosts.switch.clone();
        self.etcd = Some(Etcd::start(vec![(etcd_host, [192, 0, 2, 254].into())]));
        self.join(0);
        self.join(1);
        self.succeeds(0, &["network", "create", "--driver", "overlay", "front"]);
        self.until(1, &["network", "ls"], |text| text.contains("front"));
    }

    #[track_caller]
    fn join(&self, number: usize) {
        let urls = self.etcd.as_ref().unwrap().urls();
        let (address, name) = (Hosts::address(number).to_string(), format!("host-{number}"));
        let args = ["mesh", "join", "--etcd", &urls, "--advertise", &address, "--name", &name];
        self.succeeds(number, &args);
    }

    fn command(&self, number: usize) -> Command {
        let mut command = self.hosts.hosts[number].command(env!("CARGO_BIN_EXE_tidegate"));
        let path = |name: &str| self.directory.path().join(format!("{name}{number}"));
        command.env("TIDEGATE_RUN_DIR", path("run")).env("TIDEGATE_SOCKET", path("socket"));
        command.env("TIDEGATE_LACKS", self.lacks);
        command
    }

    #[track_caller]
    fn start(&self, number: usize, flags: &[&str]) -> Process {
        let state = self.directory.path().join(format!("state{number}"));
        let mut command = self.command(number);
        command.arg("daemon").arg("--state").arg(state).args(["--metrics", "127.0.0.1:9464"]);
        let daemon = Process::spawn(command.args(flags));
        daemon.wait_for_line("tidegate daemon is up", SOON);
        daemon
    }

    fn run(&self, number: usize, args: &[&str]) -> Output {
        self.command(number).args(args).output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, number: usize, args: &[&str]) -> String {
        let output = self.run(number, args);
        assert!(output.status.success(), "host {number}: {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The error without its prefix.
    #[track_caller]
    fn fails(&self, number: usize, args: &[&str]) -> String {
        let output = self.run(number, args);
        assert!(!output.status.success(), "host {number}: {args:?}: {output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        text.trim_end().strip_prefix("tidegate: error: ").unwrap_or(&text).to_owned()
    }

    #[track_caller]
    fn until(&self, number: usize, args: &[&str], wanted: impl Fn(&str) -> bool) -> String {
        let mut last = String::new();
        let is_so = eventually(SOON, || {
            last = self.succeeds(number, args);
            wanted(&last)
        });
        assert!(is_so, "host {number}: {args:?}: {last}");
        last
    }

    fn status(&self, number: usize) -> Value {
        serde_json::from_str(&self.succeeds(number, &["mesh", "status", "--json"])).unwrap()
    }

    /// Waits until etcd answers host `number`.
    #[track_caller]
    fn connected(&self, number: usize) {
        assert!(eventually(SOON, || self.status(number)["connected"] == true), "host {number}");
    }

    /// Waits until host `number` reports `state` of host `other`.
    #[track_caller]
    fn reports(&self, number: usize, other: usize, state: &str) {
        let mut last = Value::Null;
        let is_so = eventually(SOON, || {
            last = self.status(number);
            let name = format!("host-{other}");
            let hosts = last["hosts"].as_array().unwrap();
            hosts.iter().any(|host| host["name"] == name.as_str() && host["state"] == state)
        });
        let log = self.daemons[other].output();
        assert!(is_so, "host {number} about {other}, {state}: {last}\n{log}");
    }

    /// Attaches a new namespace to `front` on host `number`. Returns it with its IPv4 address.
    #[track_caller]
    fn attach(&self, number: usize, name: &str, more: &[&str]) -> (Namespace, IpAddr) {
        let namespace = Namespace::new();
        let path = namespace.path();
        let mut args = vec!["attach", "front", "--netns", path.to_str().unwrap(), "--name", name];
        args.push("--json");
        args.extend(more);
        let endpoint: Value = serde_json::from_str(&self.succeeds(number, &args)).unwrap();
        let address = endpoint["attachments"][0]["addresses"][0].as_str().unwrap();
        (namespace, address.split('/').next().unwrap().parse().unwrap())
    }
}

fn reaches(from: &Namespace, to: IpAddr) -> bool {
    let to = to.to_string();
    let output = from.command("ping").args(["-c", "1", "-W", "1", &to]).output().unwrap();
    output.status.success()
}

/// Pings `to` every 10 ms until `during` is done. Returns the numbers of packets sent and lost.
fn lost_during(from: &Namespace, to: IpAddr, during: impl FnOnce()) -> (u32, u32) {
    let mut command = from.command("ping");
    let mut ping = Process::spawn(command.args(["-i", "0.01", "-W", "1", "-q", &to.to_string()]));
    std::thread::sleep(Duration::from_millis(100));
    during();
    std::thread::sleep(Duration::from_millis(100));
    ping.signal(Signal::INT);
    ping.wait(SOON);
    let summary = ping.wait_for_line("packets transmitted", SOON);
    let numbers: Vec<u32> =
        summary.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[0] - numbers[1])
}

#[test]
fn endpoints_on_three_hosts_reach_each_other_by_name_and_have_egress_and_ports() {
    let mesh = Mesh::joined(3);
    let (a, at_a) = mesh.attach(0, "a", &["-p", "8080:80"]);
    let (b, at_b) = mesh.attach(1, "b", &["--alias", "database"]);
    let (c, at_c) = mesh.attach(2, "c", &[]);
    assert!(reaches(&a, at_b) && reaches(&a, at_c) && reaches(&c, at_b));
    // Names, over both families, of other hosts and of this one.
    for (from, name) in [(&a, "b"), (&a, "database"), (&a, "c.front"), (&b, "a"), (&c, "c")] {
        let v4 = from.exec("dig", &["+short", "@127.0.0.11", "-q", name, "-t", "A"]);
        let v6 = from.exec("dig", &["+short", "@127.0.0.11", "-q", name, "-t", "AAAA"]);
        assert!(v4.lines().count() == 1 && v6.lines().count() == 1, "{name}: {v4:?} {v6:?}");
        assert!(reaches(from, v6.trim().parse().unwrap()), "{name}: {v6}");
    }
    // The gateway network has no names, and neighbours do not reach each other on it.
    let (sibling, _) = mesh.attach(0, "sibling", &[]);
    let gateway_address = |namespace: &Namespace| -> IpAddr {
        let text = namespace.ip(&["-4", "-o", "addr", "show", "eth1"]);
        text.split_whitespace().nth(3).unwrap().split('/').next().unwrap().parse().unwrap()
    };
    assert!(!reaches(&sibling, gateway_address(&a)), "siblings on the gateway network");
    // Egress, and no access to the containers from outside or from the host.
    let outside: IpAddr = [192, 0, 2, 254].into();
    assert!(reaches(&a, outside) && reaches(&a, "2001:db8::fe".parse().unwrap()), "egress");
    let gateway = gateway_address(&a).to_string();
    mesh.hosts.switch.ip(&["route", "add", &at_a.to_string(), "via", "192.0.2.1"]);
    mesh.hosts.switch.ip(&["route", "add", &gateway, "via", "192.0.2.1"]);
    assert!(!reaches(&mesh.hosts.switch, at_a), "routed from outside");
    assert!(!reaches(&mesh.hosts.switch, gateway_address(&a)), "routed from outside");
    assert!(!reaches(&mesh.hosts.hosts[0], at_a), "from the host itself");
    // A published port, from outside, the host, another host's container and itself.
    let _server = PeerServer::tcp(&a, "[::]:80".parse().unwrap());
    for from in [&mesh.hosts.switch, &mesh.hosts.hosts[0], &b, &a, &sibling] {
        let answer = from.run(|| {
            let mut stream = TcpStream::connect("192.0.2.1:8080")?;
            std::io::Write::write_all(&mut stream, b"?")?;
            std::io::Read::read(&mut stream, &mut [0; 64])
        });
        assert!(answer.is_ok_and(|length| length > 0));
    }
    // The frames of others are dropped, and everything is counted.
    let page = mesh.hosts.hosts[0].exec("curl", &["-s", "http://127.0.0.1:9464/metrics"]);
    for line in [
        "tidegate_mesh_store_up 1",
        "tidegate_mesh_hosts{state=\"heard\"} 3",
        "tidegate_mesh_hosts{state=\"silent\"} 0",
        "tidegate_mesh_endpoints{host=\"host-1\"} 1",
        "tidegate_mesh_remote_endpoints{network=\"front\"} 2",
        "tidegate_mesh_problems 0",
    ] {
        let mut page = page.clone();
        let has = eventually(SOON, || {
            let found = page.lines().any(|one| one == line);
            page = mesh.hosts.hosts[0].exec("curl", &["-s", "http://127.0.0.1:9464/metrics"]);
            found
        });
        assert!(has, "{line} in {page}");
    }
    assert!(page.contains("tidegate_mesh_latency_seconds{host=\"host-1\"} 0.00"), "{page}");
    // The last host leaves. Its endpoint must be detached first.
    let error = mesh.fails(2, &["mesh", "leave"]);
    assert_eq!(error, "network front is in use by endpoint c; detach first");
    mesh.succeeds(2, &["mesh", "leave", "--force"]);
    let left = mesh.hosts.hosts[2].ip(&["-o", "link"]);
    assert!(!left.contains("tgx") && !left.contains("tg-"), "{left}");
    assert!(!mesh.hosts.hosts[2].exec("nft", &["list", "tables"]).contains("tidegate_mesh"));
    assert_eq!(
        mesh.fails(2, &["mesh", "status"]),
        "this host is in no cluster; join one first (tidegate mesh join)"
    );
    let status = mesh.until(0, &["mesh", "status"], |text| !text.contains("host-2"));
    assert!(status.starts_with("2 hosts, 1 overlay network; etcd answers"), "{status}");
    assert_eq!(a.exec("dig", &["+short", "@127.0.0.11", "c"]), "");
    assert!(!reaches(&a, at_c));
    // The network is removed on all hosts.
    for (number, name) in [(0, "a"), (0, "sibling"), (1, "b")] {
        mesh.succeeds(number, &["detach", name]);
    }
    mesh.succeeds(1, &["network", "rm", "front"]);
    mesh.until(0, &["network", "ls"], |text| !text.contains("front"));
}

#[test]
fn invalid_requests_are_refused_with_the_remedy() {
    let mut mesh = Mesh::new(2);
    let join = |mesh: &Mesh, number: usize, url: &str, more: &[&str]| {
        let mut args = vec!["mesh", "join", "--etcd", url, "--name", "host"];
        args.extend(more);
        mesh.fails(number, &args)
    };
    let at = ["--advertise", "192.0.2.1"];
    // No cluster.
    let error = mesh.fails(0, &["network", "create", "-d", "overlay", "front"]);
    assert_eq!(error, "this host is in no cluster; join one first (tidegate mesh join)");
    // An etcd that does not exist, and one that is none.
    let error = join(&mesh, 0, "http://192.0.2.99:2379", &at);
    assert!(error.contains("192.0.2.99:2379") && error.contains("whether etcd runs"), "{error}");
    let listener = mesh.hosts.hosts[1].run(|| TcpListener::bind("192.0.2.2:80")).unwrap();
    let answer = std::thread::spawn(move || {
        for stream in listener.incoming().take(20) {
            let mut stream = stream.unwrap();
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 404 Not Found\r\n\r\n");
        }
    });
    let error = join(&mesh, 0, "http://192.0.2.2:80", &at);
    assert!(error.contains("check the URLs"), "{error}");
    drop(answer);
    // One that requires credentials.
    let etcd = Etcd::start(vec![(mesh.hosts.hosts[1].clone(), Hosts::address(1))]);
    etcd.ctl(&["user", "add", "root:secret"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    etcd.ctl(&["auth", "enable"]);
    let url = etcd.url(0);
    let error = join(&mesh, 0, &url, &at);
    assert!(error.contains("access denied"), "{error}");
    let password = mesh.directory.path().join("password");
    fs::write(&password, "wrong\n").unwrap();
    let password = password.to_str().unwrap().to_owned();
    let with_user = ["--etcd-user", "root", "--etcd-password-file", &password];
    let error = join(&mesh, 0, &url, &[&at[..], &with_user].concat());
    assert!(error.contains("access denied"), "{error}");
    // An address of nobody.
    let error = join(&mesh, 0, &url, &["--advertise", "192.0.2.77"]);
    assert!(
        error.contains("192.0.2.77 is not an address of this host; its addresses are 192.0.2.1"),
        "{error}"
    );
    let error = join(&mesh, 0, &url, &["--advertise", "127.0.0.1"]);
    assert!(error.contains("127.0.0.1 is not an address at which other hosts"), "{error}");
    assert!(!mesh.hosts.hosts[0].exec("nft", &["list", "tables"]).contains("tidegate_mesh"));
    // With the password.
    fs::write(&password, "secret\n").unwrap();
    let args = ["mesh", "join", "--etcd", &url, "--name", "host"];
    mesh.succeeds(0, &[&args[..], &at, &with_user].concat());
    let error = mesh.fails(0, &[&args[..], &at, &with_user].concat());
    assert_eq!(
        error,
        "this host is in a cluster already, as host; leave it first (tidegate mesh leave)"
    );
    // Its etcd is on the same host, at another address.
    mesh.hosts.hosts[1].ip(&["addr", "add", "192.0.2.1/32", "dev", "lo"]);
    let twin = ["mesh", "join", "--etcd", &url, "--name", "twin"];
    let error = mesh.fails(1, &[&twin[..], &at, &with_user].concat());
    mesh.hosts.hosts[1].ip(&["addr", "del", "192.0.2.1/32", "dev", "lo"]);
    mesh.connected(0);
    assert!(error.starts_with("192.0.2.1 is the address of host host; "), "{error}");
    // Networks.
    let create = |more: &[&str]| {
        mesh.fails(0, &[&["network", "create", "--driver", "overlay", "front"], more].concat())
    };
    let error = create(&["--opt", "encrypted"]);
    assert!(
        error.contains("encryption is not supported") && error.contains("WireGuard"),
        "{error}"
    );
    let error = create(&["--subnet", "192.0.2.128/25"]);
    assert!(error.contains("192.0.2.128/25") && error.contains("192.0.2.0/24"), "{error}");
    let error = create(&["--mtu", "1451"]);
    assert!(error.contains("create it with --mtu 1450"), "{error}");
    let error = create(&["--bridge", "br7"]);
    assert!(error.contains("--bridge is not available for overlay networks"), "{error}");
    let error = mesh.fails(0, &["network", "create", "mesh-gateway"]);
    assert!(error.contains("the name mesh-gateway is reserved"), "{error}");
    mesh.succeeds(0, &["network", "create", "-d", "overlay", "front", "--subnet", "10.90.0.0/24"]);
    let error = create(&[]);
    assert!(error.contains("network front already exists"), "{error}");
    let (_web, _) = mesh.attach(0, "web", &["--ip", "10.90.0.7"]);
    let error = mesh.fails(0, &["network", "rm", "front"]);
    assert!(error.contains("web on host; detach them first"), "{error}");
    let other = Namespace::new();
    let path = other.path().to_str().unwrap().to_owned();
    let error =
        mesh.fails(0, &["attach", "front", "--netns", &path, "--name", "db", "--ip", "10.90.0.7"]);
    assert!(error.contains("10.90.0.7"), "{error}");
    mesh.succeeds(0, &["detach", "web"]);
    let error =
        mesh.fails(0, &["attach", "front", "--netns", &path, "--name", "db", "--ip", "10.90.0.7"]);
    assert!(error.contains("10.90.0.7 on network front was released recently"), "{error}");
    mesh.succeeds(0, &["network", "rm", "front"]);
    mesh.succeeds(0, &["mesh", "leave"]);
    for daemon in &mut mesh.daemons {
        daemon.stop(Signal::INT, SOON);
    }
}

/// kill -9, a restart, a stop of longer than the lease, and what other software removes.
#[test]
fn traffic_survives_the_daemons() {
    let mut mesh = Mesh::joined(2);
    let (a, at_a) = mesh.attach(0, "a", &[]);
    let (b, at_b) = mesh.attach(1, "b", &[]);
    assert!(reaches(&a, at_b));
    let (sent, lost) = lost_during(&b, at_a, || {
        mesh.daemons[0].signal(Signal::KILL);
        mesh.daemons[0].wait(SOON);
        mesh.daemons[0] = mesh.start(0, &[]);
        mesh.reports(1, 0, "up");
        mesh.reports(0, 1, "up");
    });
    assert!(sent > 10 && lost == 0, "{lost} of {sent}");
    // After the lease, other hosts forget the endpoints of a host without a daemon.
    mesh.daemons[0].stop(Signal::INT, SOON);
    mesh.reports(1, 0, "down");
    assert!(eventually(SOON, || !reaches(&b, at_a)));
    // They keep their addresses, and return with the daemon.
    mesh.daemons[0] = mesh.start(0, &[]);
    assert!(eventually(SOON, || reaches(&b, at_a)));
    assert_eq!(
        b.exec("dig", &["+short", "@127.0.0.11", "-q", "a", "-t", "A"]).trim(),
        at_a.to_string()
    );
    // Other software.
    mesh.hosts.hosts[0]
        .exec("sh", &["-c", "ip link del $(ip -o link show type vxlan | cut -d: -f2)"]);
    assert!(eventually(SOON, || reaches(&b, at_a)), "the device is restored");
}

#[test]
fn partitions_and_deaths_remove_nothing_that_works() {
    let mut mesh = Mesh::joined(3);
    let (a, at_a) = mesh.attach(0, "a", &[]);
    let (b, at_b) = mesh.attach(1, "b", &[]);
    let (c, _) = mesh.attach(2, "c", &[]);
    assert!(reaches(&a, at_b) && reaches(&c, at_a));
    let etcd = mesh.etcd.as_mut().unwrap();
    // A member that does not answer, then without a quorum, for longer than the lease.
    let leader = etcd.leader();
    let (others, stopped): (Vec<usize>, [usize; 2]) = {
        let others: Vec<usize> = (0..3).filter(|number| *number != leader).collect();
        (others.clone(), [leader, others[0]])
    };
    drop(others);
    for number in stopped {
        etcd.servers[number].signal(Signal::STOP);
    }
    let host = (0..3).find(|number| !stopped.contains(number)).unwrap();
    let (sent, lost) = lost_during(&b, at_a, || {
        let no_answer = eventually(SOON, || mesh.status(host)["connected"] == false);
        assert!(no_answer);
        std::thread::sleep(Duration::from_secs(7));
    });
    assert!(sent > 300 && lost == 0, "without a quorum: {lost} of {sent}");
    // Changes fail at once, and name the reason.
    let begun = Instant::now();
    let error = mesh.fails(host, &["network", "create", "--driver", "overlay", "back"]);
    assert!(error.contains("the cluster store does not answer"), "{error}");
    let name = ["a", "b", "c"][host];
    let error = mesh.fails(host, &["detach", name]);
    assert!(error.contains("the cluster store does not answer"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let etcd = mesh.etcd.as_mut().unwrap();
    let (sent, lost) = lost_during(&b, at_a, || {
        for number in stopped {
            etcd.servers[number].signal(Signal::CONT);
        }
        // The leases end once there is a quorum again.
        std::thread::sleep(Duration::from_secs(7));
    });
    assert!(sent > 300 && lost == 0, "after the quorum is back: {lost} of {sent}");
    for number in 0..3 {
        mesh.connected(number);
        for other in (0..3).filter(|other| *other != number) {
            mesh.reports(number, other, "up");
        }
    }
    // Changes work again.
    mesh.succeeds(host, &["network", "create", "--driver", "overlay", "back"]);
    mesh.until((host + 1) % 3, &["network", "ls"], |text| text.contains("back"));

    // The leader dies together with its host.
    let leader = mesh.etcd.as_ref().unwrap().leader();
    mesh.hosts.plug(leader, false);
    let alive: Vec<usize> = (0..3).filter(|number| *number != leader).collect();
    mesh.reports(alive[0], leader, "down");
    mesh.until(alive[0], &["network", "ls"], |text| text.contains("front"));
    let (namespace, address) = mesh.attach(alive[0], "late", &[]);
    let other = [&a, &b, &c][alive[1]];
    assert!(eventually(SOON, || reaches(other, address)), "a change without the dead host");
    // It is back. What it missed is programmed.
    mesh.hosts.plug(leader, true);
    mesh.reports(alive[0], leader, "up");
    mesh.reports(leader, alive[0], "up");
    assert!(eventually(SOON, || reaches([&a, &b, &c][leader], address)));
    assert!(reaches(&namespace, [at_a, at_b, at_a][leader]) || leader == 2);
}

/// A host that is cut off from etcd only is still heard, and keeps its endpoints.
#[test]
fn a_host_without_etcd_keeps_its_endpoints_and_a_compacted_history_is_listed_again() {
    let mut mesh = Mesh::new(2);
    mesh.join_etcd_at_switch();
    let (a, at_a) = mesh.attach(0, "a", &[]);
    let (b, at_b) = mesh.attach(1, "b", &[]);
    assert!(reaches(&a, at_b));
    let block = |add: bool| {
        let verb = if add { "add" } else { "del" };
        for direction in ["from", "to"] {
            mesh.hosts.hosts[0].ip(&["rule", verb, direction, "192.0.2.254", "prohibit"]);
        }
    };
    let (sent, lost) = lost_during(&b, at_a, || {
        block(true);
        assert!(eventually(SOON, || mesh.status(0)["connected"] == false));
        mesh.reports(1, 0, "unrecorded");
        std::thread::sleep(Duration::from_secs(1));
    });
    assert!(sent > 100 && lost == 0, "{lost} of {sent}");
    // Meanwhile the history is compacted.
    let (_c, at_c) = mesh.attach(1, "c", &[]);
    let etcd = mesh.etcd.as_ref().unwrap();
    let status = etcd.ctl(&["endpoint", "status", "--write-out", "json"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    let revision = status[0]["Status"]["header"]["revision"].to_string();
    etcd.ctl(&["compact", &revision]);
    let (sent, lost) = lost_during(&b, at_a, || {
        block(false);
        mesh.reports(1, 0, "up");
        mesh.connected(0);
        assert!(eventually(SOON, || reaches(&a, at_c)), "what was attached meanwhile");
    });
    assert!(lost == 0, "{lost} of {sent}");
}

/// Datagrams that inject frames into the network of a container on another host, with the guard in
/// nftables and in programs.
#[test]
fn forged_vxlan_packets_are_dropped() {
    for lacks in ["", "mesh-rules"] {
        let mesh = Mesh::lacking(lacks, 2).all_joined();
        let has_rules = mesh.hosts.hosts[0].exec("nft", &["list", "tables"]).contains("mesh");
        assert_eq!(has_rules, lacks.is_empty());
        forged_vxlan_packets(&mesh);
    }
}

fn forged_vxlan_packets(mesh: &Mesh) {
    let (a, at_a) = mesh.attach(0, "a", &[]);
    let (b, at_b) = mesh.attach(1, "b", &[]);
    assert!(reaches(&b, at_a));
    let receiver = a.run(|| UdpSocket::bind("0.0.0.0:7")).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let link = mesh.hosts.hosts[0].ip(&["-o", "link", "show", "type", "vxlan"]);
    let device = link.split_whitespace().nth(1).unwrap().trim_end_matches(':').to_owned();
    let vni = u32::from_str_radix(device.strip_prefix("tgx").unwrap(), 16).unwrap();
    let mac = |namespace: &Namespace| -> [u8; 6] {
        let text = namespace.ip(&["-o", "link", "show", "eth0"]);
        let text = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let bytes: Vec<u8> =
            text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    };
    let (mac_a, mac_b) = (mac(&a), mac(&b));
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(_) => unreachable!(),
    };
    // VXLAN, Ethernet, IPv4, UDP without a checksum, to port 7.
    let packet = |vni: u32, from: [u8; 6], source: [u8; 4]| {
        let mut packet = vec![8, 0, 0, 0];
        packet.extend(&(vni << 8).to_be_bytes());
        packet.extend(mac_a);
        packet.extend(from);
        packet.extend([8, 0]);
        let mut header = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
        header.extend(source);
        header.extend(octets(at_a));
        let sum: u32 =
            header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(header);
        packet.extend([0, 9, 0, 7, 0, 12, 0, 0, b'e', b'v', b'i', b'l']);
        packet
    };
    let received = || {
        std::thread::sleep(Duration::from_millis(200));
        let mut count = 0;
        while receiver.recv(&mut [0; 64]).is_ok() {
            count += 1;
        }
        count
    };
    const EACH: u32 = 5_000;
    let flood = |from: &Namespace, to: &str, packets: &[Vec<u8>]| {
        from.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for number in 0..EACH {
                // The output rule denies the call of a process of a host.
                let _ = socket.send_to(&packets[number as usize % packets.len()], to);
            }
        });
    };
    let good = packet(vni, mac_b, octets(at_b));
    let (local, _) = mesh.attach(0, "local", &[]);
    let (remote, _) = mesh.attach(1, "remote", &[]);
    for (what, from, to) in [
        ("a host outside of the cluster", &mesh.hosts.switch, "192.0.2.1:4789"),
        ("a process of the host", &mesh.hosts.hosts[0], "192.0.2.1:4789"),
        ("a process of the host", &mesh.hosts.hosts[0], "127.0.0.1:4789"),
        ("a process of another host of the cluster", &mesh.hosts.hosts[1], "192.0.2.1:4789"),
        ("a container of the host", &local, "192.0.2.1:4789"),
        ("a container of another host", &remote, "192.0.2.1:4789"),
    ] {
        flood(from, to, std::slice::from_ref(&good));
        assert_eq!(received(), 0, "{what}");
    }
    // A container of other software, whose bridge is newer than the guard.
    let (other, host) = (Namespace::new(), &mesh.hosts.hosts[0]);
    host.ip_all(&format!(
        "link add docker0 type bridge
         addr add 172.17.0.1/16 dev docker0
         link set docker0 up
         link add other type veth peer name eth0 netns {}
         link set other master docker0 up",
        other.path().display()
    ));
    other.ip_all(
        "addr add 172.17.0.2/16 dev eth0
         addr add 192.0.2.2/32 dev lo
         link set eth0 up
         route add default via 172.17.0.1",
    );
    for setting in ["all", "docker0"] {
        host.sysctl(&format!("net.ipv4.conf.{setting}.rp_filter"), "0");
    }
    assert!(eventually(SOON, || reaches(&other, [172, 17, 0, 1].into())));
    for source in ["172.17.0.2:0", "192.0.2.2:0"] {
        other.run(|| {
            let socket = UdpSocket::bind(source).unwrap();
            (0..EACH).for_each(|_| drop(socket.send_to(&good, "192.0.2.1:4789")));
        });
        assert_eq!(received(), 0, "a container of other software from {source}");
    }
    // All addresses at which the host receives, and in parts of eight bytes.
    let outside = &mesh.hosts.switch;
    outside.run(|| {
        let socket = UdpSocket::bind("192.0.2.254:0").unwrap();
        socket.set_broadcast(true).unwrap();
        for to in ["192.0.2.255:4789", "255.255.255.255:4789", "224.0.0.1:4789"] {
            (0..EACH).for_each(|_| drop(socket.send_to(&good, to)));
        }
    });
    assert_eq!(received(), 0, "broadcast and multicast");
    let (mac_host, link) = (mac(host), LinkSocket::sender(outside, "br0"));
    let udp = [&[0xc0, 0, 0x12, 0xb5, 0, 8 + good.len() as u8, 0, 0][..], &good].concat();
    let parts = |source: [u8; 4]| {
        for (number, part) in udp.chunks(8).enumerate() {
            let mut packet = ipv4(source.into(), [192, 0, 2, 1].into(), 17, part);
            let more = u16::from((number + 1) * 8 < udp.len()) << 13;
            packet[6..8].copy_from_slice(&(more | number as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            link.send(&ethernet(mac_host, [2, 0, 0, 0, 0, 1], 0x0800, &packet));
        }
    };
    parts([192, 0, 2, 254]);
    assert_eq!(received(), 0, "fragments");
    assert!(reaches(&b, at_a), "the network still works");
    parts([192, 0, 2, 2]);
    assert_eq!(received(), 1, "fragments with a forged address of the underlay");

    // A control: the same packet, sent by a host with the address of a VTEP, is delivered.
    mesh.hosts.switch.ip_all("addr add 192.0.2.2/32 dev br0");
    mesh.hosts.hosts[1].ip(&["link", "set", "eth0", "down"]);
    mesh.hosts.switch.run(|| {
        let socket = UdpSocket::bind("192.0.2.2:0").unwrap();
        for _ in 0..10 {
            socket.send_to(&good, "192.0.2.1:4789").unwrap();
        }
    });
    assert!(received() > 0, "the documented limit: forged addresses of the underlay");
    // The frames of an endpoint that does not exist are dropped even then.
    let foreign = [
        packet(vni, [2, 0, 0, 0, 0, 9], octets(at_b)),
        packet(vni, mac_b, [10, 1, 2, 3]),
        packet(vni, mac_a, octets(at_a)),
        packet(vni ^ 1, mac_b, octets(at_b)),
    ];
    mesh.hosts.switch.run(|| {
        let socket = UdpSocket::bind("192.0.2.2:0").unwrap();
        for number in 0..EACH {
            let _ = socket.send_to(&foreign[number as usize % 4], "192.0.2.1:4789");
        }
    });
    assert_eq!(received(), 0, "frames of no endpoint");
}

/// The guard outlives the daemon, and goes with the membership.
#[test]
fn a_host_that_has_left_has_no_guard() {
    for lacks in ["", "mesh-rules"] {
        let mut mesh = Mesh::lacking(lacks, 1).all_joined();
        let guards = |mesh: &Mesh| {
            let host = &mesh.hosts.hosts[0];
            let programs = host.run(|| tidegate_netfilter::count_programs(LOOPBACK_INDEX)).unwrap();
            (host.exec("nft", &["list", "tables"]).contains("mesh"), programs)
        };
        let expected = if lacks.is_empty() { (true, 0) } else { (false, 2) };
        assert_eq!(guards(&mesh), expected, "{lacks}");
        mesh.daemons[0].signal(Signal::KILL);
        mesh.daemons[0].wait(SOON);
        assert_eq!(guards(&mesh), expected, "{lacks}: killed");
        mesh.daemons[0] = mesh.start(0, &[]);
        mesh.connected(0);
        assert_eq!(guards(&mesh), expected, "{lacks}: restarted");
        mesh.succeeds(0, &["network", "rm", "front"]);
        mesh.succeeds(0, &["mesh", "leave"]);
        assert_eq!(guards(&mesh), (false, 0), "{lacks}");
    }
}

/// As with WireGuard between sites: a TUN device with an MTU of 1420 carries the packets.
#[test]
fn the_mtu_follows_the_underlay() {
    let mut mesh = Mesh::new(2);
    for host in &mesh.hosts.hosts {
        host.ip(&["link", "set", "eth0", "mtu", "1420"]);
    }
    mesh.join_etcd_at_switch();
    let (a, _) = mesh.attach(0, "a", &[]);
    let (_b, at_b) = mesh.attach(1, "b", &[]);
    assert!(a.ip(&["-o", "link", "show", "eth0"]).contains("mtu 1370"));
    let ping = |size: &str| {
        let to = at_b.to_string();
        let args = ["-c", "1", "-W", "1", "-M", "do", "-s", size, &to];
        a.command("ping").args(args).output().unwrap().status.success()
    };
    assert!(ping("1342") && !ping("1343"), "1370 bytes");
}
