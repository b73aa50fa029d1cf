//! The engine beside slirp4netns and the kernel's own MASQUERADE: iperf3 through each, in alternating rounds.
//!
//! ```text
//! cargo run --release -p tidegate-nat --example compare -- [--rounds 5] [--seconds 3] [--streams 1] [--mtu 1500] [--only engine,kernel]
//! ```
//!
//! Everything is in namespaces of its own that have no way out. Client, engine and server share this machine's cores, and TCP runs
//! `reno`; compare only figures of one run. CPU is the helper's: of the engine this process's, of slirp4netns its process's.

use serde_json::Value;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tidegate_nat::{Nat, Policy, Settings, Tun, TunOptions};
use tidegate_reactor::Descriptors;
use tidegate_testbed::{Namespace, Process, eventually, raise_open_files, require_program};

const SERVER: &str = "192.0.2.2";

/// One way out of a container.
struct Way {
    name: &'static str,
    container: Namespace,
    helper: Helper,
}

enum Helper {
    Engine(#[allow(dead_code, reason = "kept, for it ends when dropped")] Nat),
    Process(Process),
    Kernel,
}

struct Arguments {
    rounds: usize,
    seconds: u32,
    streams: u32,
    mtu: u16,
    only: Option<String>,
}

/// Bits a second, and CPU seconds of the helper for each gigabyte.
#[derive(Clone, Copy, Default)]
struct Figure {
    rate: f64,
    cpu: f64,
}

fn main() {
    let arguments = arguments();
    require_program("iperf3");
    require_program("slirp4netns");
    require_program("nft");
    raise_open_files(65_536);
    let (host, server) = outside();
    let _iperf = Process::spawn(server.command("iperf3").args(["-s", "--forceflush"]));
    server.wait_until_bound(tidegate_testbed::Protocol::Tcp, 5201, Duration::from_secs(5));
    let makers: [fn(&Namespace, u16) -> Way; 3] = [kernel, slirp, engine];
    let ways: Vec<Way> = makers.iter().map(|make| make(&host, arguments.mtu)).collect();
    let only = |way: &&Way| arguments.only.as_ref().is_none_or(|only| only.split(',').any(|o| o == way.name));
    let ways: Vec<&Way> = ways.iter().filter(only).collect();

    let loads: [(&str, Vec<&str>); 4] = [
        ("tcp up", vec![]),
        ("tcp down", vec!["-R"]),
        ("udp up 1200", vec!["-u", "-b", "0", "-l", "1200"]),
        ("udp down 1200", vec!["-u", "-b", "0", "-l", "1200", "-R"]),
    ];
    println!(
        "MTU {}, {} stream(s), {} rounds of {} s; medians (least..most)",
        arguments.mtu, arguments.streams, arguments.rounds, arguments.seconds
    );
    for (name, load) in &loads {
        let mut figures: Vec<Vec<Figure>> = ways.iter().map(|_| Vec::new()).collect();
        for _ in 0..arguments.rounds {
            for (way, figures) in ways.iter().zip(&mut figures) {
                figures.push(measure(way, load, &arguments));
            }
        }
        println!("{name}");
        let medians: Vec<f64> = figures.iter().map(|figures| median(figures, |f| f.rate)).collect();
        for ((way, figures), rate) in ways.iter().zip(&figures).zip(&medians) {
            let rates = figures.iter().map(|figure| figure.rate);
            let (least, most) = rates.fold((f64::MAX, 0f64), |(l, m), rate| (l.min(rate), m.max(rate)));
            let unit = if name.starts_with("udp") { (1e3, "kpps") } else { (1e9, "Gbit/s") };
            let ratio = ways.iter().position(|way| way.name == "engine").map_or(0.0, |e| medians[e] / rate);
            println!(
                "  {:8} {:7.2} {} ({:.2}..{:.2})  {:6.3} CPU s/GB   engine / it {ratio:.2}",
                way.name,
                rate / unit.0,
                unit.1,
                least / unit.0,
                most / unit.0,
                median(figures, |f| f.cpu),
            );
        }
    }
}

fn arguments() -> Arguments {
    let mut arguments = Arguments { rounds: 5, seconds: 3, streams: 1, mtu: 1500, only: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} wants a value"));
        match word.as_str() {
            "--rounds" => arguments.rounds = value.parse().expect("a number"),
            "--seconds" => arguments.seconds = value.parse().expect("a number"),
            "--streams" => arguments.streams = value.parse().expect("a number"),
            "--mtu" => arguments.mtu = value.parse().expect("a number"),
            "--only" => arguments.only = Some(value),
            other => panic!("{other} is no option"),
        }
    }
    arguments
}

fn median(figures: &[Figure], of: impl Fn(&Figure) -> f64) -> f64 {
    let mut values: Vec<f64> = figures.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn cpu_seconds() -> f64 {
    let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    usage.tv_sec as f64 + usage.tv_nsec as f64 / 1e9
}

fn measure(way: &Way, load: &[&str], arguments: &Arguments) -> Figure {
    let used = || match &way.helper {
        Helper::Engine(_) => cpu_seconds(),
        Helper::Process(process) => process.cpu_seconds(),
        Helper::Kernel => 0.0,
    };
    let before = used();
    let output = way
        .container
        .command("iperf3")
        .args([
            "-c",
            SERVER,
            "-J",
            "-t",
            &arguments.seconds.to_string(),
            "-P",
            &arguments.streams.to_string(),
        ])
        .args(load)
        .stdin(Stdio::null())
        .output()
        .expect("start iperf3");
    let used = used() - before;
    let report: Value = serde_json::from_slice(&output.stdout).expect("iperf3 writes JSON");
    if let Some(error) = report["error"].as_str() {
        eprintln!("{}: {error}", way.name);
        return Figure::default();
    }
    let end = &report["end"];
    let received = &end["sum_received"];
    let (bytes, seconds) = (received["bytes"].as_f64(), received["seconds"].as_f64());
    let (bytes, seconds) = (bytes.unwrap_or(0.0), seconds.unwrap_or(1.0));
    let rate = if load.contains(&"-u") {
        let sum = if end["sum_received"].is_object() { received } else { &end["sum"] };
        let packets = sum["packets"].as_f64().unwrap_or(0.0) - sum["lost_packets"].as_f64().unwrap_or(0.0);
        packets / sum["seconds"].as_f64().unwrap_or(1.0)
    } else {
        bytes * 8.0 / seconds
    };
    Figure { rate, cpu: used / (bytes / 1e9).max(1e-9) }
}

/// The host, and the server beyond it.
fn outside() -> (Namespace, Namespace) {
    let (host, server) = (Namespace::new(), Namespace::new());
    host.ip_all(&format!(
        "link add eth0 type veth peer name eth0 netns {}
         addr add 192.0.2.1/24 dev eth0
         link set eth0 up",
        server.path().display()
    ));
    server.ip_all(&format!("addr add {SERVER}/24 dev eth0\nlink set eth0 up"));
    for namespace in [&host, &server] {
        let up = || namespace.ip(&["-o", "link", "show", "dev", "eth0"]).contains("state UP");
        assert!(eventually(Duration::from_secs(10), up));
    }
    (host, server)
}

fn known(namespace: &Namespace) -> tidegate_netns::Namespace {
    tidegate_netns::Namespace::from_path(&namespace.path()).expect("open a namespace")
}

fn engine(host: &Namespace, mtu: u16) -> Way {
    let container = Namespace::new();
    let tun = TunOptions { mtu, ..TunOptions::new("tun0") };
    let tun = Tun::open(&known(&container), &tun).expect("make a TUN device");
    let mut settings = Settings::new(mtu);
    settings.policy = Policy { gateways: vec!["10.0.2.2".parse().expect("an address")], ..Policy::default() };
    let descriptors = Arc::new(Descriptors::of_process(64));
    let nat = Nat::start(settings, tun, &known(host), descriptors).expect("start the engine");
    container.ip_all("addr add 10.0.2.100/24 dev tun0\nroute add default dev tun0");
    Way { name: "engine", container, helper: Helper::Engine(nat) }
}

fn slirp(host: &Namespace, mtu: u16) -> Way {
    let container = Namespace::new();
    let mut command: Command = host.command("slirp4netns");
    command.args(["--configure", "--netns-type=path", &format!("--mtu={mtu}")]);
    let process = Process::spawn(command.arg(container.path()).arg("tap0"));
    let ready = || {
        let route = container.ip(&["route", "show", "default"]);
        route.contains("tap0")
    };
    assert!(eventually(Duration::from_secs(5), ready), "slirp4netns: {}", process.output());
    Way { name: "slirp", container, helper: Helper::Process(process) }
}

fn kernel(host: &Namespace, mtu: u16) -> Way {
    let container = Namespace::new();
    host.ip_all(&format!(
        "link add port type veth peer name eth0 netns {}
         addr add 10.9.0.1/24 dev port
         link set port mtu {mtu} up",
        container.path().display()
    ));
    container.ip_all(&format!(
        "addr add 10.9.0.2/24 dev eth0
         link set eth0 mtu {mtu} up
         route add default via 10.9.0.1"
    ));
    host.sysctl("net.ipv4.ip_forward", "1");
    let rules = "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname eth0 masquerade; }; }";
    host.exec("nft", &[rules]);
    Way { name: "kernel", container, helper: Helper::Kernel }
}
