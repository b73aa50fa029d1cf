//! The cost of metrics: `cargo bench --bench metrics_cost`, as root, about two minutes.
//!
//! 1. Counting. An iteration of an event loop (poll the sockets of a connection, receive, send)
//!    with active and with inactive counters: the same code, compiled twice ([`Tally`]). Rounds of
//!    both alternate, and the result is the median of the ratios of adjacent rounds.
//! 2. All counting for one connection, from accept to its end.
//! 3. A storm of scrapes: the response times through `tidegate publish` with 1,000 ports, with and
//!    without 100 clients that scrape in a loop.

use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tidegate_proxy::bench_support::{BenchConnection, BenchCounters, Tally, Uncounted};
use tidegate_testbed::server::EchoServer;
use tidegate_testbed::{Namespace, Process, Topology, addr, raise_open_files, require_root};

/// Message sizes in bytes. The smallest one shows the overhead most clearly.
const SIZES: [usize; 3] = [1, 1024, 16_384];

/// The number of rounds of each variant, and of messages per round.
const ROUNDS: usize = 201;
const MESSAGES: usize = 400;

const CONNECTIONS: u32 = 1_000_000;

const PORTS: u16 = 1000;
const SCRAPERS: usize = 100;
/// In total less than half of the ephemeral ports: with more ports in TIME_WAIT, connect(2) takes
/// milliseconds to find a free port.
const REQUESTS: usize = 1000;
const SOON: Duration = Duration::from_secs(30);

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("no measurement without --bench, which `cargo bench` passes");
        return;
    }
    require_root();
    raise_open_files(4096);
    counting();
    connections();
    storm();
}

/// A connection whose ends both belong to the test.
struct Line<T: Tally> {
    connection: BenchConnection<T>,
    client: TcpStream,
    backend: TcpStream,
}

impl<T: Tally> Line<T> {
    fn new() -> io::Result<Self> {
        let pair = || -> io::Result<(TcpStream, TcpStream)> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let client = TcpStream::connect(listener.local_addr()?)?;
            let server = listener.accept()?.0;
            server.set_nonblocking(true)?;
            client.set_nodelay(true)?;
            server.set_nodelay(true)?;
            Ok((client, server))
        };
        let ((client, at_client), (backend, at_backend)) = (pair()?, pair()?);
        let connection = BenchConnection::new(OwnedFd::from(at_client), OwnedFd::from(at_backend));
        Ok(Self { connection, client, backend })
    }

    /// The time of the iterations for messages of `size` bytes to the backend and back.
    fn round(&mut self, size: usize) -> io::Result<Duration> {
        let mut message = vec![b'.'; size];
        let mut spent = Duration::ZERO;
        for _ in 0..MESSAGES {
            for (from, to) in [(&self.client, &self.backend), (&self.backend, &self.client)] {
                { from }.write_all(&message)?;
                let begun = Instant::now();
                let goes_on = black_box(self.connection.turn());
                spent += begun.elapsed();
                assert!(goes_on, "a connection ended");
                { to }.read_exact(&mut message)?;
            }
        }
        Ok(spent)
    }
}

fn counting() {
    // Only `lo`.
    let host = Namespace::new();
    println!(
        "{:>8}  {:>10}  {:>10}  {:>8}   ns per iteration, and the ratio, medians of {ROUNDS} rounds",
        "bytes", "counted", "uncounted", "ratio"
    );
    for size in SIZES {
        let (counted, uncounted, ratio) =
            host.run(|| compare(size)).expect("messages over loopback");
        println!("{size:>8}  {counted:>10.0}  {uncounted:>10.0}  {ratio:>8.4}");
    }
}

fn compare(size: usize) -> io::Result<(f64, f64, f64)> {
    let mut counted = Line::<AtomicU64>::new()?;
    let mut uncounted = Line::<Uncounted>::new()?;
    let mut rounds = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + 10 {
        // The order alternates.
        let (with, without) = if round % 2 == 0 {
            let with = counted.round(size)?;
            (with, uncounted.round(size)?)
        } else {
            let without = uncounted.round(size)?;
            (counted.round(size)?, without)
        };
        // The first rounds warm up.
        if round >= 10 {
            rounds.push((with.as_secs_f64(), without.as_secs_f64()));
        }
    }
    let turns = 2.0 * MESSAGES as f64;
    let of = |value: fn(&(f64, f64)) -> f64| median(rounds.iter().map(value).collect());
    Ok((
        of(|round| round.0) / turns * 1e9,
        of(|round| round.1) / turns * 1e9,
        of(|round| round.0 / round.1),
    ))
}

fn connections() {
    let each = |figures: &dyn Fn(Duration, Duration)| {
        let begun = Instant::now();
        for number in 0..CONNECTIONS {
            figures(
                Duration::from_nanos(black_box(number.into())),
                Duration::from_micros(black_box(number.into())),
            );
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(CONNECTIONS)
    };
    let (counted, uncounted) =
        (BenchCounters::<AtomicU64>::default(), BenchCounters::<Uncounted>::default());
    let with = median((0..9).map(|_| each(&|dial, life| counted.connection(dial, life))).collect());
    let without =
        median((0..9).map(|_| each(&|dial, life| uncounted.connection(dial, life))).collect());
    println!(
        "\na whole connection: {with:.1} ns of counting, including {without:.1} ns for its timers and the gauges of limits"
    );
}

fn storm() {
    let net = Topology::three();
    let _echo = EchoServer::tcp(&net.container, (addr::CONTAINER_V4, 80).into());
    let mut command = net.host.command(env!("CARGO_BIN_EXE_tidegate"));
    let range = format!("{0}:20000-{1}:20000-{1}", addr::HOST_V4, 20_000 + PORTS - 2);
    command.args([
        "publish",
        &format!("{}:8080:80", addr::HOST_V4),
        &range,
        "--to",
        &addr::CONTAINER_V4.to_string(),
    ]);
    let publisher = Process::spawn(command.args(["--metrics", "127.0.0.1:9464"]));
    publisher.wait_for_line("metrics at http", SOON);
    let page = net.host.run(scrape).expect("a page");
    println!("\n{PORTS} TCP ports: a page of {page} bytes");
    println!(
        "{:>8}  {:>9}  {:>9}  {:>9}   us per request, {REQUESTS} requests",
        "", "median", "p99", "slowest"
    );
    let mut p99 = [Vec::new(), Vec::new()];
    for round in 0..5 {
        let quiet = requests(&net.client);
        let over = Arc::new(AtomicBool::new(false));
        let pages = Arc::new(AtomicUsize::new(0));
        let scrapers: Vec<_> = (0..SCRAPERS)
            .map(|_| {
                let (over, pages) = (Arc::clone(&over), Arc::clone(&pages));
                net.host.spawn_thread(move || {
                    while !over.load(Ordering::Relaxed) {
                        match scrape() {
                            Ok(_) => drop(pages.fetch_add(1, Ordering::Relaxed)),
                            // Refused at the limit.
                            Err(_) => std::thread::sleep(Duration::from_millis(100)),
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(200));
        let stormy = requests(&net.client);
        over.store(true, Ordering::Relaxed);
        for scraper in scrapers {
            scraper.join().expect("scrapers do not panic");
        }
        for (index, (name, times)) in [("quiet", quiet), ("stormy", stormy)].into_iter().enumerate()
        {
            let at =
                |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
            p99[index].push(at(0.99));
            println!("{name:>8}  {:>9.0}  {:>9.0}  {:>9.0}", at(0.5), at(0.99), at(1.0));
        }
        println!("          round {round}: {} pages meanwhile", pages.load(Ordering::Relaxed));
    }
    let [quiet, stormy] = p99;
    let ratio = median(quiet.iter().zip(&stormy).map(|(quiet, stormy)| stormy / quiet).collect());
    println!("p99 in a storm / in quiet, median of the rounds: {ratio:.2}");
}

/// The response times of sequential requests, sorted. None may fail.
fn requests(client: &Namespace) -> Vec<Duration> {
    let mut times = client.run(|| {
        (0..REQUESTS)
            .map(|_| {
                let begun = Instant::now();
                request((addr::HOST_V4, 8080).into()).expect("the request succeeds");
                begun.elapsed()
            })
            .collect::<Vec<_>>()
    });
    times.sort();
    times
}

fn request(to: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, SOON)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"echo")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    if answer == b"echo" { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// The size of a page in bytes; an error if the scrape is refused.
fn scrape() -> io::Result<usize> {
    let mut stream = TcpStream::connect("127.0.0.1:9464")?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut buffer = vec![0; 1 << 16];
    let (mut bytes, mut begins_well) = (0, false);
    loop {
        match stream.read(&mut buffer)? {
            0 if begins_well => return Ok(bytes),
            0 => return Err(io::ErrorKind::ConnectionRefused.into()),
            read => {
                begins_well |= bytes == 0 && buffer.starts_with(b"HTTP/1.1 200 ");
                bytes += read;
            }
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
