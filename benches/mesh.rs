//! Services of a cluster: three hosts as namespaces, a client outside, and a real etcd.
//!
//! | row | measures |
//! |---|---|
//! | requests | round trips of one byte per second on open connections: through the host of the task, and through another host, in alternating rounds |
//! | connections | new connections per second, with a round trip of one byte each: a published port of a container, a service with its task on the same host, and on another host |
//! | death | 200 connections per second through two hosts while the third one is unplugged: failed ones, their times, and the time until its tasks are out |
//! | replacements | 500 connections per second through all hosts while tasks are replaced |
//!
//! `cargo bench --features etcd --bench mesh -- [--rounds N] [--steps N] [--only ROW]`, as root.
//! `TIDEGATE_BENCH_BIN` is another program to measure.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tidegate_testbed::hosts::{Etcd, Hosts};
use tidegate_testbed::{Namespace, Process, eventually, raise_open_files, require_root};

const SOON: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(5);

/// Clients, each with a connection at a time. More than the cores of the development machine.
const CLIENTS: usize = 8;

/// Duration of a round.
const ROUND: Duration = Duration::from_secs(1);

/// The ports of all that is measured: a plain published port, and those of services.
const PLAIN: u16 = 8080;
const NEAR: u16 = 8081;
const FAR: u16 = 8082;
const SHOP: u16 = 8083;

struct Cluster {
    hosts: Hosts,
    directory: TempDir,
    daemons: Vec<Process>,
    _etcd: Etcd,
}

impl Cluster {
    fn new() -> Self {
        let hosts = Hosts::new(3);
        let etcd = Etcd::start(vec![(hosts.switch.clone(), [192, 0, 2, 254].into())]);
        let directory = tempfile::tempdir().unwrap();
        let mut cluster = Self { hosts, directory, daemons: Vec::new(), _etcd: etcd };
        for number in 0..3 {
            let state = cluster.directory.path().join(format!("state{number}"));
            let mut command = cluster.command(number);
            command.arg("daemon").arg("--state").arg(state).args(["--metrics", "none"]);
            let daemon = Process::spawn(&mut command);
            daemon.wait_for_line("tidegate daemon is up", SOON);
            cluster.daemons.push(daemon);
            let (address, name) = (Hosts::address(number).to_string(), format!("host-{number}"));
            let url = cluster._etcd.urls();
            let args = ["mesh", "join", "--etcd", &url, "--advertise", &address, "--name", &name];
            cluster.run(number, &args);
        }
        // Released addresses are not used again for ten minutes.
        let subnet = ["--subnet", "10.77.0.0/16"];
        let args = ["network", "create", "--driver", "overlay", "front"];
        cluster.run(0, &[&args[..], &subnet].concat());
        for number in 0..3 {
            let has = || cluster.run(number, &["network", "ls"]).contains("front");
            assert!(eventually(SOON, has));
        }
        cluster
    }

    fn command(&self, number: usize) -> Command {
        let program = std::env::var("TIDEGATE_BENCH_BIN");
        let program = program.unwrap_or_else(|_| env!("CARGO_BIN_EXE_tidegate").to_owned());
        let mut command = self.hosts.hosts[number].command(&program);
        let path = |name: &str| self.directory.path().join(format!("{name}{number}"));
        command.env("TIDEGATE_RUN_DIR", path("run")).env("TIDEGATE_SOCKET", path("socket"));
        command.env("TIDEGATE_LOG", "warn");
        command
    }

    fn run(&self, number: usize, args: &[&str]) -> String {
        let output = self.command(number).args(args).output().unwrap();
        assert!(output.status.success(), "host {number}: {args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn create(&self, service: &str, port: u16) {
        let spec = format!("{port}:80");
        self.run(0, &["service", "create", service, "--network", "front", "-p", &spec]);
    }

    /// Attaches a server to `network` on host `number`.
    fn attach(&self, number: usize, name: &str, network: &str, more: &[&str]) -> Server {
        let server = Server::start();
        let path = server.namespace.path();
        let args = ["attach", network, "--netns", path.to_str().unwrap(), "--name", name];
        self.run(number, &[&args[..], more].concat());
        server
    }

    /// Waits until all hosts have `count` tasks of `service` that are ready.
    fn has_ready(&self, service: &str, count: usize) {
        for number in 0..3 {
            assert!(eventually(SOON, || self.ready(number, service) == count), "host {number}");
        }
    }

    fn ready(&self, number: usize, service: &str) -> usize {
        let text = self.run(number, &["service", "ls", "--json"]);
        let services: serde_json::Value = serde_json::from_str(&text).unwrap();
        let services = services.as_array().unwrap();
        let found = services.iter().find(|one| one["name"] == service);
        let tasks = found.map_or(&[][..], |one| one["tasks"].as_array().unwrap());
        tasks.iter().filter(|task| task["state"] == "ready").count()
    }
}

/// A container that echoes single bytes.
struct Server {
    namespace: Namespace,
    listener: TcpListener,
    stop: std::sync::Arc<AtomicBool>,
}

impl Server {
    fn start() -> Self {
        let namespace = Namespace::new();
        let listener = namespace.run(|| TcpListener::bind("0.0.0.0:80")).unwrap();
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        // One thread for each client: a connection is served by the thread that has accepted it.
        for _ in 0..2 * CLIENTS {
            let (listener, stop) = (listener.try_clone().unwrap(), stop.clone());
            thread::spawn(move || {
                while let Ok((mut stream, _)) = listener.accept() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let _ = stream.set_nodelay(true);
                    let mut byte = [0];
                    while let Ok(1) = stream.read(&mut byte) {
                        if stream.write_all(&byte).is_err() {
                            break;
                        }
                    }
                }
            });
        }
        Self { namespace, listener, stop }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Each thread accepts once more.
        let at = self.listener.local_addr().unwrap();
        for _ in 0..2 * CLIENTS {
            let _ = self
                .namespace
                .run(|| TcpStream::connect_timeout(&([127, 0, 0, 1], at.port()).into(), PATIENCE));
        }
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])
}

/// Runs `each` on all clients for a round. Returns the number of calls per second.
fn rate(from: &Namespace, each: impl Fn(&mut Option<TcpStream>) -> io::Result<()> + Sync) -> f64 {
    let (count, begun) = (AtomicU64::new(0), Instant::now());
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                from.run(|| {
                    let mut stream = None;
                    while begun.elapsed() < ROUND {
                        each(&mut stream).unwrap();
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            });
        }
    });
    count.into_inner() as f64 / begun.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints the medians of `rates`, and those of the ratios of each to the first one, by round.
fn report(row: &str, rates: &[(&str, Vec<f64>)]) {
    let (_, base) = &rates[0];
    for (name, values) in rates {
        let ratios = values.iter().zip(base).map(|(value, base)| value / base).collect();
        let ratio = median(ratios);
        println!("{row:14} {name:34} {:9.0} /s   {ratio:.2}x", median(values.clone()));
    }
}

fn requests(cluster: &Cluster, rounds: usize) {
    let at = |port| SocketAddr::new(Hosts::address(0), port);
    let mut rates = [
        ("through the host of the task", NEAR, Vec::new()),
        ("through another host", FAR, Vec::new()),
    ];
    for _ in 0..rounds {
        for (_, port, values) in &mut rates {
            let to = at(*port);
            values.push(rate(&cluster.hosts.switch, |stream| {
                let stream = match stream {
                    Some(stream) => stream,
                    None => stream.insert(connect(to)?),
                };
                ask(stream)
            }));
        }
    }
    report("requests", &rates.map(|(name, _, values)| (name, values)));
}

fn connections(cluster: &Cluster, rounds: usize) {
    let mut rates = [
        ("published port of a container", PLAIN, Vec::new()),
        ("service, task on the same host", NEAR, Vec::new()),
        ("service, task on another host", FAR, Vec::new()),
    ];
    for _ in 0..rounds {
        for (_, port, values) in &mut rates {
            let to = SocketAddr::new(Hosts::address(0), *port);
            values.push(rate(&cluster.hosts.switch, |_| ask(&mut connect(to)?)));
        }
    }
    report("connections", &rates.map(|(name, _, values)| (name, values)));
}

/// Connects `per_second` times a second through `through` in turn until `during` is done. Returns
/// the times, and the errors.
fn load(
    from: &Namespace,
    through: &[IpAddr],
    per_second: u32,
    during: impl FnOnce(),
) -> (Vec<Duration>, BTreeMap<String, usize>) {
    let (done, number) = (AtomicBool::new(false), AtomicU64::new(0));
    let results = Mutex::new((Vec::new(), BTreeMap::new()));
    let begun = Instant::now();
    thread::scope(|scope| {
        // A connection that takes long does not delay the next ones.
        for _ in 0..4 * CLIENTS {
            scope.spawn(|| {
                from.run(|| {
                    while !done.load(Ordering::Relaxed) {
                        let number = number.fetch_add(1, Ordering::Relaxed) as u32;
                        let due = begun + Duration::from_secs(1) / per_second * number;
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        let to = through[number as usize % through.len()];
                        let asked = Instant::now();
                        let result =
                            connect(SocketAddr::new(to, SHOP)).and_then(|mut one| ask(&mut one));
                        let mut results = results.lock().unwrap();
                        match result {
                            Ok(()) => results.0.push(asked.elapsed()),
                            Err(error) => *results.1.entry(error.to_string()).or_insert(0) += 1,
                        }
                    }
                });
            });
        }
        thread::sleep(Duration::from_millis(500));
        during();
        done.store(true, Ordering::Relaxed);
    });
    results.into_inner().unwrap()
}

fn times(row: &str, (mut times, failed): (Vec<Duration>, BTreeMap<String, usize>)) {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 1000].as_secs_f64() * 1e3;
    println!(
        "{row:14} {} connections, failed {}: {failed:?}; p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
        times.len(),
        failed.values().sum::<usize>(),
        at(500),
        at(990),
        at(1000)
    );
}

fn death(cluster: &Cluster, rounds: usize) {
    let _tasks: Vec<Server> = (0..6)
        .map(|number| {
            let name = format!("task-{number}");
            cluster.attach(number % 3, &name, "front", &["--service", "shop"])
        })
        .collect();
    cluster.has_ready("shop", 6);
    let through = [Hosts::address(0), Hosts::address(1)];
    let mut out = Vec::new();
    let result = load(&cluster.hosts.switch, &through, 200, || {
        for _ in 0..rounds {
            cluster.hosts.plug(2, false);
            let begun = Instant::now();
            assert!(eventually(SOON, || (0..2).all(|host| cluster.ready(host, "shop") == 4)));
            out.push(begun.elapsed().as_secs_f64());
            thread::sleep(Duration::from_millis(500));
            cluster.hosts.plug(2, true);
            cluster.has_ready("shop", 6);
        }
    });
    times("death", result);
    println!("death          tasks are out on both hosts after {:.0} ms", median(out) * 1e3);
    for number in 0..6 {
        cluster.run(number % 3, &["detach", &format!("task-{number}")]);
    }
}

fn replacements(cluster: &Cluster, steps: usize) {
    let begin =
        |host: usize| cluster.attach(host, &format!("r{host}-0"), "front", &["--service", "shop"]);
    let first: Vec<Server> = (0..3).map(begin).collect();
    cluster.has_ready("shop", 3);
    let through = [0, 1, 2].map(Hosts::address);
    // The last ones serve until the load has ended.
    let last = Mutex::new(Vec::new());
    let result = load(&cluster.hosts.switch, &through, 500, || {
        thread::scope(|scope| {
            for (host, mut server) in first.into_iter().enumerate() {
                let last = &last;
                scope.spawn(move || {
                    for step in 1..=steps / 3 {
                        let name = format!("r{host}-{step}");
                        let new = cluster.attach(host, &name, "front", &["--service", "shop"]);
                        cluster.run(host, &["detach", &format!("r{host}-{}", step - 1)]);
                        server = new;
                    }
                    last.lock().unwrap().push(server);
                });
            }
        });
    });
    times("replacements", result);
    println!("replacements   {} tasks were replaced", steps / 3 * 3);
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if !arguments.iter().any(|argument| argument == "--bench") {
        println!("no measurement without --bench, which `cargo bench` passes");
        return;
    }
    require_root();
    raise_open_files(8192);
    let value = |name: &str| {
        let at = arguments.iter().position(|one| one == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name, usual| value(name).map_or(usual, |text: String| text.parse().unwrap());
    let (rounds, steps) = (number("--rounds", 5), number("--steps", 1_000));
    let only = value("--only");
    let wants = |row: &str| only.as_ref().is_none_or(|only| only == row);
    let cluster = Cluster::new();
    cluster.run(0, &["network", "create", "local"]);
    for (name, port) in [("near", NEAR), ("far", FAR), ("shop", SHOP)] {
        cluster.create(name, port);
    }
    let spec = format!("{PLAIN}:80");
    let _servers = [
        cluster.attach(0, "plain", "local", &["-p", &spec]),
        cluster.attach(0, "near-1", "front", &["--service", "near"]),
        cluster.attach(1, "far-1", "front", &["--service", "far"]),
    ];
    cluster.has_ready("near", 1);
    cluster.has_ready("far", 1);
    if wants("requests") {
        requests(&cluster, rounds);
    }
    if wants("connections") {
        connections(&cluster, rounds);
    }
    if wants("death") {
        death(&cluster, rounds);
    }
    if wants("replacements") {
        replacements(&cluster, steps);
    }
}
