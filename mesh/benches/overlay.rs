//! Overlay networks: three hosts as namespaces, with a real etcd of three members.
//!
//! | row | measures |
//! |---|---|
//! | endpoint appears, disappears | from the request until the last host has programmed it |
//! | joining host | from the start of its agent until 1,000 endpoints are programmed |
//! | throughput | iperf3 between containers, and between their hosts, in alternating rounds: with the links of veth pairs, which carry 64 KiB at once and are limited by the processor only, and with limited links |
//! | address reuse | packets that reach the previous owner of an address, over 100,000 moves |
//!
//! `cargo bench -p tidegate-mesh --features etcd --bench overlay [-- --rounds N --steps N
//! --only appearance|joining|throughput|reuse]`

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Hosts, mac, vtep};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tidegate_mesh::agent::{Agent, Names, Options};
use tidegate_mesh::device::{Device, DeviceSpec, Links};
use tidegate_mesh::membership::Own;
use tidegate_mesh::overlay::Entries;
use tidegate_mesh::programmer::LocalNetwork;
use tidegate_mesh::record::{Endpoint, EndpointState, Network, Node, Role, Subnet};
use tidegate_mesh::store::EtcdOptions;
use tidegate_mesh::vtep_guard::{VtepGuard, VtepPolicy};
use tidegate_model::MacAddress;
use tidegate_netfilter::FrameGuard;
use tidegate_testbed::hosts::Etcd;
use tidegate_testbed::{Namespace, Process, eventually};

const SOON: Duration = Duration::from_secs(60);
const VNI: u32 = 0x12_3456;

/// When each endpoint of other hosts was last programmed or removed.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<BTreeMap<String, Instant>>>);

impl Names for Seen {
    fn set(&mut self, _: &str, endpoints: &BTreeMap<String, Endpoint>) {
        let now = Instant::now();
        let mut seen = self.0.lock().unwrap();
        seen.retain(|name, _| endpoints.contains_key(name));
        for name in endpoints.keys() {
            seen.entry(name.clone()).or_insert(now);
        }
    }
}

struct Host {
    agent: Agent,
    seen: Seen,
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(future)
}

fn address(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    [10, 9, high, low].into()
}

fn endpoint(node: &str, number: u16) -> Endpoint {
    let [high, low] = number.to_be_bytes();
    Endpoint {
        node: node.to_owned(),
        generation: number.into(),
        addresses: vec![address(number)],
        mac: MacAddress([2, 1, 10, 9, high, low]),
        state: EndpointState::Ready,
        aliases: Vec::new(),
        hostname: None,
        role: Role::Container,
    }
}

fn start(hosts: &Hosts, etcd: &Etcd, number: usize, endpoints: std::ops::Range<u16>) -> Host {
    let namespace = tidegate_netns::Namespace::from_path(&hosts.hosts[number].path()).unwrap();
    let id = format!("host-{number}");
    let node = Node {
        index: 0,
        vtep: vtep(number, false),
        boot: id.clone(),
        machine: id.clone(),
        mtu: 1500,
    };
    let name = |number: u16| (("front".to_owned(), format!("e{number}")), endpoint(&id, number));
    let endpoints = endpoints.map(name).collect();
    let front = LocalNetwork { name: "front".into(), vni: VNI, bridge: "front".into(), mtu: 1450 };
    let seen = Seen::default();
    let servers = etcd.urls().split(',').map(str::to_owned).collect();
    let options = Options {
        own: Own { id, node, underlay: Vec::new(), endpoints, bindings: BTreeMap::new() },
        store: Arc::new(EtcdOptions { servers, ..EtcdOptions::default() }),
        namespace,
        networks: vec![front],
        follower: Box::new(|_| {}),
        names: Box::new(seen.clone()),
        reports: tokio::sync::watch::Sender::new(None),
    };
    // The thread of the agent, which connects to etcd, is in the namespace of the one that starts
    // it.
    let agent = hosts.hosts[number].run(|| Agent::start(options)).unwrap();
    Host { agent, seen }
}

fn etcd(hosts: &Hosts) -> Etcd {
    let members = (0..3).map(|number| (hosts.hosts[number].clone(), vtep(number, false)));
    Etcd::start(members.collect())
}

fn create_network(host: &Host) {
    wait(host.agent.joined(SOON)).unwrap();
    let subnet =
        Subnet { subnet: "10.9.0.0/16".parse().unwrap(), gateway: "10.9.255.254".parse().unwrap() };
    let network = Network { vni: VNI, subnets: vec![subnet], mtu: 1450, internal: true };
    wait(host.agent.create("front", network)).unwrap();
}

fn quantile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share).round() as usize]
}

fn print_times(what: &str, times: &mut [Duration]) {
    let [median, p99, longest] = [0.5, 0.99, 1.0].map(|share| quantile(times, share));
    println!("{what:32} p50 {median:9.1?}  p99 {p99:9.1?}  max {longest:9.1?}  of {}", times.len());
}

/// An endpoint of the first host, at the other two.
fn appearance(rounds: u16) {
    let hosts = Hosts::new(3);
    let etcd = etcd(&hosts);
    let all: Vec<Host> = (0..3).map(|number| start(&hosts, &etcd, number, 0..0)).collect();
    create_network(&all[0]);
    let (mut appear, mut vanish) = (Vec::new(), Vec::new());
    for number in 1..=rounds {
        let name = format!("e{number}");
        let at = |host: &Host| host.seen.0.lock().unwrap().get(&name).copied();
        let begun = Instant::now();
        wait(all[0].agent.claim("front", &name, endpoint("host-0", number))).unwrap();
        assert!(eventually(SOON, || all[1..].iter().all(|host| at(host).is_some())));
        let last = all[1..].iter().filter_map(at).max().unwrap();
        appear.push(last - begun);
        let begun = Instant::now();
        wait(all[0].agent.release("front", &name)).unwrap();
        assert!(eventually(SOON, || all[1..].iter().all(|host| at(host).is_none())));
        // The poll of `eventually` adds up to a millisecond.
        vanish.push(begun.elapsed());
    }
    print_times("endpoint appears on all hosts", &mut appear);
    print_times("endpoint disappears", &mut vanish);
}

fn joining(rounds: u16) {
    let mut times = Vec::new();
    for _ in 0..rounds.min(5) {
        let hosts = Hosts::new(3);
        let etcd = etcd(&hosts);
        let first = start(&hosts, &etcd, 0, 1..1001);
        create_network(&first);
        let second = start(&hosts, &etcd, 1, 0..0);
        let has_all = |host: &Host| host.seen.0.lock().unwrap().len() == 1000;
        assert!(eventually(SOON, || has_all(&second)));
        let begun = Instant::now();
        let third = start(&hosts, &etcd, 2, 0..0);
        assert!(eventually(SOON, || has_all(&third)));
        times.push(begun.elapsed());
    }
    print_times("1,000 endpoints, joining host", &mut times);
}

/// Gbit/s from `from` to the server at `to`.
fn iperf(from: &Namespace, to: &str) -> f64 {
    let output = from.command("iperf3").args(["-c", to, "-t", "2", "-J"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or_default() / 1e9
}

/// An overlay network on two hosts, with its guards.
struct Overlay {
    _links: Links,
    _device: Device,
    _frames: FrameGuard,
    _vtep: VtepGuard,
}

async fn two_hosts(hosts: &Hosts, containers: &[u8; 2]) -> Vec<Overlay> {
    let mut overlays = Vec::new();
    for number in 0..2 {
        let namespace = tidegate_netns::Namespace::from_path(&hosts.hosts[number].path()).unwrap();
        let links = Links::open(&namespace).unwrap();
        let (other, id) = (1 - number, containers[1 - number]);
        let frames = FrameGuard::new().unwrap();
        frames.allow(mac(id), [10, 9, 0, id].into()).unwrap();
        let attach = |index| namespace.with(|| frames.attach(index))?;
        let device = links.ensure(&spec(number), attach).await.unwrap();
        let mut guard = VtepGuard::open(&namespace, vtep(number, false)).unwrap();
        let vteps = (0..2).map(|number| vtep(number, false)).collect();
        let policy = VtepPolicy { vteps, vnis: [VNI].into(), underlay: None };
        guard.apply(&policy).unwrap();
        let mut entries = Entries::default();
        entries.stations.insert(mac(id), vtep(other, false));
        entries.neighbours.insert([10, 9, 0, id].into(), mac(id));
        device.reconcile(&entries).await.unwrap();
        overlays.push(Overlay { _links: links, _device: device, _frames: frames, _vtep: guard });
    }
    overlays
}

fn spec(number: usize) -> DeviceSpec {
    DeviceSpec {
        name: "vx".into(),
        bridge: "front".into(),
        vni: VNI,
        vtep: vtep(number, false),
        mtu: 1450,
    }
}

fn throughput(rounds: u16) {
    let hosts = Hosts::new(2);
    let (a, b) = (hosts.container(0, 7), hosts.container(1, 8));
    for container in [&a, &b] {
        container.ip(&["link", "set", "eth0", "mtu", "1450"]);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _overlays = runtime.block_on(two_hosts(&hosts, &[7, 8]));
    let serve = |namespace: &Namespace| {
        let server = Process::spawn(namespace.command("iperf3").args(["-s", "--forceflush"]));
        server.wait_for_line("Server listening", SOON);
        server
    };
    let _servers = [serve(&hosts.hosts[1]), serve(&b)];
    let spread = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2], values[0], values[values.len() - 1])
    };
    for limit in ["", "5gbit", "1gbit"] {
        if !limit.is_empty() {
            for host in &hosts.hosts {
                let tbf = ["root", "tbf", "rate", limit, "burst", "512kb", "latency", "20ms"];
                host.exec("tc", &[&["qdisc", "replace", "dev", "eth0"][..], &tbf].concat());
            }
        }
        let (mut under, mut over) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            under.push(iperf(&hosts.hosts[0], "192.0.2.2"));
            over.push(iperf(&a, "10.9.0.8"));
        }
        let ((under, a, b), (over, c, d)) = (spread(&mut under), spread(&mut over));
        println!(
            "{:32} overlay {over:.2} Gbit/s ({c:.2} to {d:.2}), underlay {under:.2} ({a:.2} to {b:.2}): {:.3}x",
            format!(
                "throughput, iperf3, link {}",
                if limit.is_empty() { "unlimited" } else { limit }
            ),
            over / under
        );
    }
}

/// An address with its MAC address moves between two hosts, while a third one sends to it.
fn reuse(steps: u64) {
    const ID: u8 = 9;
    let hosts = Hosts::new(3);
    let sender = hosts.container(0, 7);
    let twins = [hosts.container(1, ID), hosts.container(2, ID)];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut devices = Vec::new();
    runtime.block_on(async {
        for number in 0..3 {
            let namespace =
                tidegate_netns::Namespace::from_path(&hosts.hosts[number].path()).unwrap();
            let links = Links::open(&namespace).unwrap();
            devices.push((links.ensure(&spec(number), |_| Ok(())).await.unwrap(), links));
        }
    });
    // Even: stable. Odd: the entries change.
    let step = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let owner = |step: u64| (step / 2 % 2) as usize;
    let desired = |owner: usize| {
        let mut entries = Entries::default();
        entries.stations.insert(mac(ID), vtep(owner + 1, false));
        entries.neighbours.insert([10, 9, 0, ID].into(), mac(ID));
        entries
    };
    let mut handles = Vec::new();
    for (number, twin) in twins.iter().enumerate() {
        let socket = twin.run(|| UdpSocket::bind("0.0.0.0:7")).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (step, over) = (Arc::clone(&step), Arc::clone(&over));
        handles.push(std::thread::spawn(move || {
            let (mut received, mut wrong) = (0_u64, 0_u64);
            let mut buffer = [0; 8];
            while !over.load(Ordering::Relaxed) {
                if socket.recv(&mut buffer).is_err() {
                    continue;
                }
                let (sent, now) = (u64::from_be_bytes(buffer), step.load(Ordering::SeqCst));
                received += 1;
                // Nothing has changed between sending and receiving.
                wrong += u64::from(sent == now && sent % 2 == 0 && owner(sent) != number);
            }
            (received, wrong)
        }));
    }
    let socket = sender.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    let flood = {
        let (step, over) = (Arc::clone(&step), Arc::clone(&over));
        std::thread::spawn(move || {
            let mut sent = 0_u64;
            while !over.load(Ordering::Relaxed) {
                let now = step.load(Ordering::SeqCst);
                sent += u64::from(socket.send_to(&now.to_be_bytes(), "10.9.0.9:7").is_ok());
            }
            sent
        })
    };
    runtime.block_on(async {
        let device = &devices[0].0;
        let mut entries = Entries::default();
        for number in 0..steps {
            let wanted = desired((number % 2) as usize);
            for change in tidegate_mesh::overlay::changes(&wanted, &entries) {
                device.execute(&change).await.unwrap();
                entries.execute(&change);
            }
            // To the even number of this owner.
            step.store(2 * number, Ordering::SeqCst);
            if number % 16 == 0 {
                // Time for some packets within a step.
                tokio::time::sleep(Duration::from_micros(300)).await;
            }
            step.store(2 * number + 1, Ordering::SeqCst);
        }
        assert_eq!(device.entries().await.unwrap(), entries);
    });
    over.store(true, Ordering::Relaxed);
    let sent = flood.join().unwrap();
    let results: Vec<(u64, u64)> = handles.into_iter().map(|one| one.join().unwrap()).collect();
    let wrong: u64 = results.iter().map(|(_, wrong)| wrong).sum();
    let received: u64 = results.iter().map(|(received, _)| received).sum();
    println!(
        "{:32} {steps} moves, {sent} packets sent, {received} received: {wrong} at the previous owner",
        "address reuse"
    );
    assert_eq!(wrong, 0);
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str, usual: u64| {
        let at = arguments.iter().position(|one| one == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok()).unwrap_or(usual)
    };
    let rounds = value("--rounds", 5) as u16;
    let only = arguments.iter().position(|one| one == "--only");
    let only = only.map(|at| arguments.get(at + 1).map(String::as_str).unwrap_or_default());
    let wants = |row| only.is_none_or(|only| only == row);
    if wants("appearance") {
        appearance(rounds * 60);
    }
    if wants("joining") {
        joining(rounds);
    }
    if wants("throughput") {
        throughput(rounds);
    }
    if wants("reuse") {
        reuse(value("--steps", 100_000));
    }
}
