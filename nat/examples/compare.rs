//! The engine beside slirp4netns and the kernel's own MASQUERADE: iperf3 through each, in alternating rounds.
//!
//! ```text
//! cargo run --release -p tidegate-nat --example compare -- [--rounds 5] [--seconds 3] [--streams 1] [--mtu 1500] [--only engine,kernel]
//!     [--loads tcp,udp,connections,latency,memory]
//! ```
//!
//! Everything is in namespaces of its own that have no way out. Client, engine and server share this machine's cores, and TCP runs
//! `reno`; compare only figures of one run. CPU is the helper's: of the engine this process's, of slirp4netns its process's.

use serde_json::Value;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidegate_nat::{Nat, Policy, Settings, Tun, TunOptions};
use tidegate_netns::Family;
use tidegate_reactor::Descriptors;
use tidegate_testbed::{Namespace, Process, eventually, raise_open_files, require_program};

/// The server, as seen from the host, and from the host whose kernel masquerades: conntrack shall cost only who has it.
const SERVER: &str = "192.0.2.2";
const SERVER_OF_KERNEL: &str = "198.51.100.2";

/// One way out of a container.
struct Way {
    name: &'static str,
    container: Namespace,
    server: &'static str,
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
    loads: String,
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
    let server = Namespace::new();
    let host = outside(&server, "192.0.2", "eth0");
    let router = outside(&server, "198.51.100", "eth1");
    let _iperf = Process::spawn(server.command("iperf3").args(["-s", "--forceflush"]));
    server.wait_until_bound(tidegate_testbed::Protocol::Tcp, 5201, Duration::from_secs(5));
    let mtu = arguments.mtu;
    let ways = [kernel(&router, mtu), slirp(&host, mtu), engine(&host, mtu)];
    let only = |way: &&Way| arguments.only.as_ref().is_none_or(|only| only.split(',').any(|o| o == way.name));
    let ways: Vec<&Way> = ways.iter().filter(only).collect();
    for way in &ways {
        // Clients that come and go by the ten thousand.
        way.container.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
        way.container.sysctl("net.ipv4.tcp_tw_reuse", "1");
    }

    println!(
        "MTU {}, {} stream(s), {} rounds of {} s; medians (least..most)",
        arguments.mtu, arguments.streams, arguments.rounds, arguments.seconds
    );
    let _small = SmallServer::start(&server);
    let udp = ["-u", "-b", "0", "-l", "1200"];
    let down: Vec<&str> = udp.iter().copied().chain(["-R"]).collect();
    let iperf = |load: &'static [&'static str]| move |way: &Way, a: &Arguments| measure(way, load, a);
    let wanted = |name: &str| arguments.loads.split(',').any(|load| load == name);
    let udp_up = |way: &Way, a: &Arguments| measure(way, &udp, a);
    let udp_down = |way: &Way, a: &Arguments| measure(way, &down, a);
    let one = |way: &Way, a: &Arguments| connections(way, 1, a.seconds);
    let many = |way: &Way, a: &Arguments| connections(way, 16, a.seconds);
    let loads: [(&str, &str, &Load<'_>, f64, &str); 7] = [
        ("tcp", "tcp up", &iperf(&[]), 1e9, "Gbit/s"),
        ("tcp", "tcp down", &iperf(&["-R"]), 1e9, "Gbit/s"),
        ("udp", "udp up, 1200 bytes", &udp_up, 1e3, "kpps"),
        ("udp", "udp down, 1200 bytes", &udp_down, 1e3, "kpps"),
        ("connections", "connections, one at a time", &one, 1.0, "a second"),
        ("connections", "connections, 16 at a time", &many, 1.0, "a second"),
        ("latency", "exchanges of one byte", &|way, a| exchanges(way, a.seconds), 1.0, "us at the median"),
    ];
    for (group, name, load, unit, unit_name) in loads {
        if wanted(group) {
            compare(&ways, &arguments, name, load, (unit, unit_name));
        }
    }
    if wanted("memory") {
        for way in &ways {
            flows(way);
        }
    }
}

type Load<'a> = dyn Fn(&Way, &Arguments) -> Figure + 'a;

fn compare(ways: &[&Way], arguments: &Arguments, name: &str, load: &Load<'_>, unit: (f64, &str)) {
    let mut figures: Vec<Vec<Figure>> = ways.iter().map(|_| Vec::new()).collect();
    for _ in 0..arguments.rounds {
        for (way, figures) in ways.iter().zip(&mut figures) {
            figures.push(load(way, arguments));
        }
    }
    println!("{name}");
    let medians: Vec<f64> = figures.iter().map(|figures| median(figures, |f| f.rate)).collect();
    for ((way, figures), rate) in ways.iter().zip(&figures).zip(&medians) {
        let rates = figures.iter().map(|figure| figure.rate);
        let (least, most) = rates.fold((f64::MAX, 0f64), |(l, m), rate| (l.min(rate), m.max(rate)));
        let ratio = ways.iter().position(|way| way.name == "engine").map_or(0.0, |e| medians[e] / rate);
        println!(
            "  {:8} {:9.2} {} ({:.2}..{:.2})  {:6.3} CPU s/GB   engine / it {ratio:.2}",
            way.name,
            rate / unit.0,
            unit.1,
            least / unit.0,
            most / unit.0,
            median(figures, |f| f.cpu),
        );
    }
}

/// Answers each byte with one, on connections that are many and short.
struct SmallServer;

const SMALL: u16 = 5300;

impl SmallServer {
    fn start(server: &Namespace) -> Self {
        let listener = server.run(|| TcpListener::bind(("0.0.0.0", SMALL)).expect("bind"));
        socket2::SockRef::from(&listener).listen(4096).expect("listen");
        let listener = Arc::new(listener);
        for _ in 0..32 {
            let listener = Arc::clone(&listener);
            std::thread::spawn(move || {
                while let Ok((mut stream, _)) = listener.accept() {
                    let mut byte = [0];
                    match stream.read(&mut byte) {
                        // One that is to be kept.
                        Ok(1) if byte[0] == b'k' => std::mem::forget(stream),
                        Ok(1) => {
                            let _ = stream.set_nodelay(true);
                            while stream.write_all(&byte).is_ok() && stream.read_exact(&mut byte).is_ok() {}
                        }
                        _ => {}
                    }
                }
            });
        }
        Self
    }
}

/// Connects, asks, is answered and closes, as often as it goes; `at_a_time` at once.
fn connections(way: &Way, at_a_time: u32, seconds: u32) -> Figure {
    let until = Instant::now() + Duration::from_secs(seconds.into());
    let ask = || {
        let mut count = 0u32;
        way.container.run(|| {
            while Instant::now() < until {
                let mut stream = TcpStream::connect((way.server, SMALL)).expect("connect");
                stream.write_all(b"x").expect("ask");
                stream.read_exact(&mut [0]).expect("an answer");
                count += 1;
            }
        });
        count
    };
    let all: u32 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_a_time).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a client")).sum()
    });
    Figure { rate: f64::from(all) / f64::from(seconds), cpu: 0.0 }
}

/// How long an exchange takes on a connection that is there.
fn exchanges(way: &Way, seconds: u32) -> Figure {
    let mut times = way.container.run(|| {
        let mut stream = TcpStream::connect((way.server, SMALL)).expect("connect");
        stream.set_nodelay(true).expect("an option");
        let until = Instant::now() + Duration::from_secs(seconds.into());
        let mut times = Vec::new();
        while Instant::now() < until {
            let begun = Instant::now();
            stream.write_all(b"x").expect("ask");
            stream.read_exact(&mut [0]).expect("an answer");
            times.push(begun.elapsed());
        }
        times
    });
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    Figure { rate: median.as_secs_f64() * 1e6, cpu: 0.0 }
}

/// How much memory 5000 open connections take.
fn flows(way: &Way) {
    let resident = || match &way.helper {
        Helper::Engine(_) => resident_of_this_process(),
        Helper::Process(process) => process.rss(),
        Helper::Kernel => 0,
    };
    let before = resident();
    let kept: Vec<TcpStream> = way.container.run(|| {
        (0..5000)
            .map_while(|_| {
                let mut stream = TcpStream::connect((way.server, SMALL)).ok()?;
                stream.write_all(b"k").ok()?;
                Some(stream)
            })
            .collect()
    });
    let after = resident();
    println!(
        "{}: {} open connections took {:.2} MB, {:.2} MB in all",
        way.name,
        kept.len(),
        after.saturating_sub(before) as f64 / 1e6,
        after as f64 / 1e6
    );
}

fn resident_of_this_process() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages: u64 = statm.split(' ').nth(1).and_then(|word| word.parse().ok()).expect("a number");
    pages * rustix::param::page_size() as u64
}

fn arguments() -> Arguments {
    let mut arguments = Arguments {
        rounds: 5,
        seconds: 3,
        streams: 1,
        mtu: 1500,
        only: None,
        loads: "tcp,udp,connections,latency,memory".into(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().unwrap_or_else(|| panic!("{word} wants a value"));
        match word.as_str() {
            "--rounds" => arguments.rounds = value.parse().expect("a number"),
            "--seconds" => arguments.seconds = value.parse().expect("a number"),
            "--streams" => arguments.streams = value.parse().expect("a number"),
            "--mtu" => arguments.mtu = value.parse().expect("a number"),
            "--only" => arguments.only = Some(value),
            "--loads" => arguments.loads = value,
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
            way.server,
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
fn outside(server: &Namespace, prefix: &str, link: &str) -> Namespace {
    let host = Namespace::new();
    host.ip_all(&format!(
        "link add eth0 type veth peer name {link} netns {}
         addr add {prefix}.1/24 dev eth0
         link set eth0 up",
        server.path().display()
    ));
    server.ip_all(&format!("addr add {prefix}.2/24 dev {link}\nlink set {link} up"));
    for (namespace, link) in [(&host, "eth0"), (server, link)] {
        let up = || namespace.ip(&["-o", "link", "show", "dev", link]).contains("state UP");
        assert!(eventually(Duration::from_secs(10), up));
    }
    host.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
    host.sysctl("net.ipv4.tcp_tw_reuse", "1");
    host
}

fn known(namespace: &Namespace) -> tidegate_netns::Namespace {
    tidegate_netns::Namespace::from_path(&namespace.path()).expect("open a namespace")
}

fn engine(host: &Namespace, mtu: u16) -> Way {
    let container = Namespace::new();
    let tun = TunOptions {
        mtu,
        addresses: vec!["10.0.2.100/24".parse().expect("an address")],
        default_routes: vec![Family::V4],
        ..TunOptions::new("tun0")
    };
    let tun = Tun::open(&known(&container), &tun).expect("make a TUN device");
    let mut settings = Settings::new(mtu);
    settings.policy = Policy { gateways: vec!["10.0.2.2".parse().expect("an address")], ..Policy::default() };
    let descriptors = Arc::new(Descriptors::of_process(64));
    let nat = Nat::start(settings, tun, &known(host), descriptors).expect("start the engine");
    Way { name: "engine", container, server: SERVER, helper: Helper::Engine(nat) }
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
    Way { name: "slirp", container, server: SERVER, helper: Helper::Process(process) }
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
    Way { name: "kernel", container, server: SERVER_OF_KERNEL, helper: Helper::Kernel }
}
