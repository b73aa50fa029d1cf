//! Queries per second of this crate, dnsmasq and aardvark-dns with dnsperf, in alternating rounds.
//!
//! `cargo bench -p tidegate-dns`, as root, with dnsperf, dnsmasq and aardvark-dns installed. Each
//! server runs in its own namespace on the first core, dnsperf and the upstream server on the
//! second. If dnsperf is the bottleneck, the CPU time of the server per query is more informative
//! than the rate; both are printed. `BENCH_ROUNDS` (5) and `BENCH_SECONDS` (3) set the duration.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tidegate_dns::{EndpointSpec, Listen, NetworkSpec, Resolver, ResolverSettings, ServeOptions};
use tidegate_testbed::{
    Namespace, Process, eventually, find_program, procfs, require_program, require_root,
};

/// Number of container names, and of cached upstream names.
const NAMES: u32 = 100;
/// Number of uncached upstream names, each queried once before any is repeated: more than a cache
/// holds.
const NEW_NAMES: u32 = 300_000;
/// Source ports of the contender with a shortage of ports.
const FEW_PORTS: usize = 4;
/// Addresses of dnsmasq and aardvark-dns, and of their client.
const GATEWAY: &str = "10.99.0.1";
const CLIENT: &str = "10.99.0.2";
/// Address of the upstream server.
const UPSTREAM: &str = "127.0.0.1";

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("serve") => serve(&args[2], Path::new(&args[3])),
        _ => compare(),
    }
}

/// The child process: serves its own namespace until it is killed.
fn serve(listen: &str, resolv_conf: &Path) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let here = tidegate_netns::Namespace::current().expect("a namespace");
        let mut settings = ResolverSettings {
            resolv_conf: resolv_conf.to_owned(),
            ..ResolverSettings::new(here.clone())
        };
        if listen == "few-ports" {
            settings.source_ports = FEW_PORTS;
        }
        let resolver = Resolver::new(settings).expect("a resolver");
        resolver
            .add_network(&NetworkSpec { name: "net".into(), ..NetworkSpec::default() })
            .expect("a network");
        for number in 0..=NAMES {
            let name =
                if number == NAMES { "client_id".to_owned() } else { format!("svc-{number}") };
            let addresses = vec![std::net::Ipv4Addr::from(0x0a63_0100 + number).into()];
            let spec = EndpointSpec {
                container: name.clone(),
                name,
                addresses,
                ..EndpointSpec::default()
            };
            resolver.add_endpoint("net", &spec).expect("an endpoint");
        }
        let listen = if listen == "redirected" { Listen::Redirected } else { Listen::Direct };
        let options = ServeOptions { listen, ..ServeOptions::default() };
        let _serving = resolver.serve(&here, "client_id", &options).expect("a server");
        println!("serving");
        std::future::pending::<()>().await;
    });
}

/// A server in its namespace.
struct Contender {
    name: &'static str,
    namespace: Namespace,
    address: &'static str,
    pid: u32,
    _processes: Vec<Process>,
}

/// One measurement: queries per second, CPU time per query in us, latency in us, lost queries.
#[derive(Clone, Copy)]
struct Sample {
    per_second: f64,
    micros: f64,
    latency: f64,
    lost: f64,
}

fn compare() {
    require_root();
    for program in ["dnsperf", "dnsmasq", "taskset"] {
        require_program(program);
    }
    let directory = TempDir::new().expect("a directory");
    let local: String = (0..NAMES).fold(String::new(), |mut all, number| {
        let _ = writeln!(all, "svc-{number} A");
        all
    });
    let cached = local.replace(" A", ".cached.test A");
    let new: String = (0..NEW_NAMES).fold(String::new(), |mut all, number| {
        let _ = writeln!(all, "new-{number}.cached.test A");
        all
    });
    let files = ["local", "cached", "new"].map(|name| directory.path().join(name));
    for (file, names) in files.iter().zip([local, cached, new]) {
        fs::write(file, names).expect("names");
    }
    let contenders = contenders(directory.path());
    let number =
        |name, usual| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (rounds, seconds) = (number("BENCH_ROUNDS", 5_u32), number("BENCH_SECONDS", 3_u32));
    let mut samples: BTreeMap<(usize, usize), Vec<Sample>> = BTreeMap::new();
    for round in 0..rounds {
        for (kind, file) in files.iter().enumerate() {
            for turn in 0..contenders.len() {
                // The order rotates.
                let who = (turn + round as usize) % contenders.len();
                samples.entry((kind, who)).or_default().push(measure(
                    &contenders[who],
                    file,
                    seconds,
                ));
            }
        }
    }
    println!(
        "medians of {rounds} rounds of {seconds} s, (min - max); one core for the server, one for dnsperf"
    );
    let kinds = ["local names", "upstream names, cached", "upstream names, not cached"];
    for (kind, name) in kinds.into_iter().enumerate() {
        println!("\n{name}");
        println!(
            "{:<24} {:>30} {:>24} {:>12} {:>6}",
            "", "queries/s", "us of CPU/query", "latency us", "lost"
        );
        for (who, contender) in contenders.iter().enumerate() {
            let all = &samples[&(kind, who)];
            let (rate, least, most) = median(all, |one| one.per_second);
            let (micros, few, many) = median(all, |one| one.micros);
            let (latency, ..) = median(all, |one| one.latency);
            let lost: f64 = all.iter().map(|one| one.lost).sum();
            println!(
                "{:<24} {:>30} {:>24} {latency:>12.0} {lost:>6}",
                contender.name,
                format!("{rate:.0} ({least:.0} - {most:.0})"),
                format!("{micros:.2} ({few:.2} - {many:.2})"),
            );
        }
    }
    println!("\nlocal names, 1,000 sequential queries/s: median and p99 in us");
    for contender in &contenders {
        let (half, most) = latency(contender);
        println!("{:<24} {half:>8.0} {most:>8.0}", contender.name);
    }
}

/// Median and p99 latency in us, at 1,000 sequential queries per second for a container name.
fn latency(contender: &Contender) -> (f64, f64) {
    const COUNT: u32 = 3_000;
    let query = b"\0\x07\x01\0\0\x01\0\0\0\0\0\0\x05svc-7\0\0\x01\0\x01";
    let socket =
        contender.namespace.run(|| UdpSocket::bind((bind(contender), 0)).expect("a socket"));
    socket.connect((contender.address, 53)).expect("a server");
    socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a time");
    let start = Instant::now();
    let mut times: Vec<f64> = (1..=COUNT)
        .map(|number| {
            let asked = Instant::now();
            socket.send(query).expect("sent");
            socket.recv(&mut [0; 512]).expect("an answer");
            let took = asked.elapsed();
            let next = start + number * Duration::from_millis(1);
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            took.as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

fn median(samples: &[Sample], value: impl Fn(&Sample) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<f64> = samples.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn on_core(namespace: &Namespace, core: &str, program: &Path) -> Command {
    let mut command = namespace.command("taskset");
    command.args(["-c", core]).arg(program);
    command
}

/// A namespace with an upstream server at [`UPSTREAM`].
fn upstream_namespace(directory: &Path) -> (Namespace, Process) {
    let namespace = Namespace::new();
    namespace.ip_all(&format!("addr add {GATEWAY}/32 dev lo\naddr add {CLIENT}/32 dev lo"));
    let dnsmasq = find_program("dnsmasq").expect("it was there");
    let mut command = on_core(&namespace, "1", &dnsmasq);
    command.args([
        "-k",
        "-C",
        "/dev/null",
        "-h",
        "--no-resolv",
        "--bind-interfaces",
        "--pid-file=",
    ]);
    command.args([
        &format!("--listen-address={UPSTREAM}"),
        "--address=/cached.test/192.0.2.1",
        "--local-ttl=3600",
    ]);
    let upstream = Process::spawn(command.current_dir(directory));
    namespace.wait_until_bound(tidegate_testbed::Protocol::Udp, 53, Duration::from_secs(5));
    (namespace, upstream)
}

fn contenders(directory: &Path) -> Vec<Contender> {
    let mut all = vec![
        ours("tidegate, direct", "direct", directory),
        ours("tidegate, redirected", "redirected", directory),
        ours("tidegate, 4 source ports", "few-ports", directory),
    ];
    let hosts: String = (0..NAMES).fold(String::new(), |mut all, number| {
        let _ = writeln!(all, "10.99.1.{number} svc-{number}");
        all
    });
    fs::write(directory.join("hosts"), hosts).expect("hosts");
    let (namespace, upstream) = upstream_namespace(directory);
    let mut command = on_core(&namespace, "0", &find_program("dnsmasq").expect("it was there"));
    command.args([
        "-k",
        "-C",
        "/dev/null",
        "-h",
        "--no-resolv",
        "--bind-interfaces",
        "--pid-file=",
        "--local-ttl=5",
    ]);
    command.args([
        "--cache-size=10000",
        &format!("--listen-address={GATEWAY}"),
        &format!("--server={UPSTREAM}"),
    ]);
    let process = Process::spawn(command.arg("-H").arg(directory.join("hosts")));
    all.push(Contender {
        name: "dnsmasq",
        address: GATEWAY,
        pid: process.pid(),
        namespace,
        _processes: vec![upstream, process],
    });
    match aardvark() {
        Some(program) => all.push(aardvark_dns(&program, directory)),
        None if std::env::var_os("CI").is_some() => panic!("aardvark-dns is not installed"),
        None => println!("aardvark-dns is not installed; skipped"),
    }
    for one in &all {
        let asked = || {
            let args = [
                "+short",
                "+tries=1",
                "+time=1",
                &format!("@{}", one.address),
                "-b",
                bind(one),
                "svc-7",
            ];
            one.namespace
                .command("dig")
                .args(args)
                .output()
                .is_ok_and(|output| output.stdout.starts_with(b"10.99.1.7"))
        };
        assert!(eventually(Duration::from_secs(5), asked), "{} does not answer", one.name);
    }
    all
}

fn ours(name: &'static str, listen: &str, directory: &Path) -> Contender {
    let (namespace, upstream) = upstream_namespace(directory);
    let path = directory.join(format!("resolv.conf.{listen}"));
    fs::write(&path, format!("nameserver {UPSTREAM}\n")).expect("resolv.conf");
    let program = std::env::current_exe().expect("the path of this program");
    let process =
        Process::spawn(on_core(&namespace, "0", &program).args(["serve", listen]).arg(&path));
    process.wait_for_line("serving", Duration::from_secs(5));
    let pid = process.pid();
    Contender { name, namespace, address: "127.0.0.11", pid, _processes: vec![upstream, process] }
}

fn aardvark() -> Option<PathBuf> {
    ["/usr/lib/podman/aardvark-dns", "/usr/libexec/podman/aardvark-dns"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

fn aardvark_dns(program: &Path, directory: &Path) -> Contender {
    let (namespace, upstream) = upstream_namespace(directory);
    let config = directory.join("aardvark-dns");
    fs::create_dir(&config).expect("a directory");
    let mut network = format!("{GATEWAY} {UPSTREAM}\n");
    for number in 0..NAMES {
        let _ = writeln!(network, "{number:064x} 10.99.1.{number}  svc-{number}");
    }
    let _ = writeln!(network, "{:064x} {CLIENT}  client_id", NAMES + 1);
    fs::write(config.join("net"), network).expect("its network");
    let mut command = on_core(&namespace, "0", program);
    command
        .args(["--config", config.to_str().expect("a path"), "-p", "53", "run"])
        .env("RUST_LOG", "error");
    // It forks; the parent exits when the child serves.
    let parent = Process::spawn(&mut command);
    let mut pid = None;
    let started = eventually(Duration::from_secs(5), || {
        let text = fs::read_to_string(config.join("aardvark.pid")).unwrap_or_default();
        pid = text.trim().parse().ok();
        pid.is_some()
    });
    assert!(started, "aardvark-dns has not started: {}", parent.output());
    let pid = pid.unwrap_or_default();
    Contender {
        name: "aardvark-dns",
        namespace,
        address: GATEWAY,
        pid,
        _processes: vec![upstream, parent],
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // The daemon is not a child of the parent process any more, so its guard does not end it.
        let pid = rustix::process::Pid::from_raw(self.pid.cast_signed())
            .filter(|_| self.name == "aardvark-dns");
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

fn bind(contender: &Contender) -> &'static str {
    if contender.address == GATEWAY { CLIENT } else { UPSTREAM }
}

fn measure(contender: &Contender, names: &Path, seconds: u32) -> Sample {
    let dnsperf = find_program("dnsperf").expect("it was there");
    let mut command = on_core(&contender.namespace, "1", &dnsperf);
    command.args([
        "-s",
        contender.address,
        "-a",
        bind(contender),
        "-c",
        "4",
        "-q",
        "100",
        "-l",
        &seconds.to_string(),
    ]);
    let before = procfs::cpu_seconds(contender.pid).unwrap_or(f64::NAN);
    let output = command.arg("-d").arg(names).output().expect("dnsperf runs");
    let used = procfs::cpu_seconds(contender.pid).unwrap_or(f64::NAN) - before;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let figure = |label: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(label));
        let word = line.and_then(|line| line.split(':').nth(1)?.split_whitespace().next());
        word.and_then(|word| word.parse::<f64>().ok())
            .unwrap_or_else(|| panic!("no {label:?} in:\n{text}"))
    };
    Sample {
        per_second: figure("Queries per second"),
        micros: used / figure("Queries completed") * 1e6,
        latency: figure("Average Latency (s)") * 1e6,
        lost: figure("Queries lost"),
    }
}
