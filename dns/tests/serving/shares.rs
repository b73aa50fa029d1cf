//! Fairness: latency of one container while another floods the resolver.

use crate::support::client::query;
use crate::support::upstream::{Mode, Upstream};
use crate::support::{Container, TestBed};
use hickory_server::proto::op::ResponseCode;
use hickory_server::proto::rr::RecordType;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tidegate_testbed::{Namespace, eventually};

/// Queries per second of the greedy container, each for a new name.
const FLOOD_RATE: usize = 20_000;
/// Lookups of the modest container, each of a cached, a local and a forwarded name.
const LOOKUPS: usize = 150;

const SOON: Duration = Duration::from_secs(10);

/// A container that sends queries until it is dropped.
struct Greedy {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<Figures>>,
}

/// Query and response counts of a greedy container.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    asked: usize,
    answered: usize,
    failed: usize,
}

impl Greedy {
    fn start(container: &Container) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let socket = container.namespace.run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
        socket.connect("127.0.0.11:53").unwrap();
        socket.set_nonblocking(true).unwrap();
        let over = Arc::clone(&ends);
        Self { ends, thread: Some(std::thread::spawn(move || flood(&socket, &over))) }
    }

    fn stop(mut self) -> Figures {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Greedy {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

fn flood(socket: &UdpSocket, over: &AtomicBool) -> Figures {
    let mut figures = Figures::default();
    let mut message = query(1, "00000000.greedy.example", RecordType::A).to_vec().unwrap();
    // After the header and the length of the first label.
    let digits = 13..21;
    let start = Instant::now();
    let mut answer = [0; 512];
    while !over.load(Ordering::Relaxed) && start.elapsed() < Duration::from_secs(60) {
        let due = (start.elapsed().as_secs_f64() * FLOOD_RATE as f64) as usize;
        // On a busy machine, a backlog is limited instead of sent at once.
        for _ in figures.asked..due.min(figures.asked + 200) {
            message[digits.clone()].copy_from_slice(format!("{:08}", figures.asked).as_bytes());
            let _ = socket.send(&message);
            figures.asked += 1;
        }
        while let Ok(length) = socket.recv(&mut answer) {
            match answer[..length].get(3).map(|flags| flags & 0x0f) {
                Some(0) => figures.answered += 1,
                _ => figures.failed += 1,
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    figures
}

/// Lookup times in ascending order.
#[derive(Debug)]
struct Times(Vec<Duration>);

impl Times {
    fn median(&self) -> Duration {
        self.0[self.0.len() / 2]
    }

    fn p99(&self) -> Duration {
        self.0[self.0.len() * 99 / 100]
    }
}

/// Looks up names from `container` sequentially: cached, local and forwarded ones. Each has to be
/// answered.
fn look_up(container: &Container, round: &str) -> [Times; 3] {
    let mut times = [const { Vec::new() }; 3];
    let socket = container.namespace.run(|| UdpSocket::bind("127.0.0.1:0")).unwrap();
    socket.connect("127.0.0.11:53").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    let ask = |id: u16, name: &str| {
        let message = query(id, name, RecordType::A).to_vec().unwrap();
        let start = Instant::now();
        socket.send(&message).unwrap();
        let mut answer = [0; 512];
        match socket.recv(&mut answer) {
            Ok(length) => assert_eq!(
                (&answer[..2], ResponseCode::from(0, answer[..length][3] & 0x0f)),
                (&message[..2], ResponseCode::NoError),
                "{name}"
            ),
            Err(error) => panic!("{name}: {error}, {:?}", ErrorKind::TimedOut),
        }
        start.elapsed()
    };
    ask(0, "known.modest.example");
    for number in 0..LOOKUPS {
        let id = number as u16 * 3;
        times[0].push(ask(id, "known.modest.example"));
        times[1].push(ask(id + 1, "modest"));
        times[2].push(ask(id + 2, &format!("{round}{number}.modest.example")));
        std::thread::sleep(Duration::from_millis(3));
    }
    times.map(|mut times| {
        times.sort_unstable();
        Times(times)
    })
}

/// Compares the lookups of a modest container during a flood of a greedy one with those before it.
fn compare(greedy: &Container, modest: &Container) {
    let calm = look_up(modest, "calm");
    let flooding = Greedy::start(greedy);
    // Long enough to use up the burst and fill the queue.
    std::thread::sleep(Duration::from_millis(700));
    let beside = look_up(modest, "flood");
    let figures = flooding.stop();
    for (what, (calm, beside)) in
        ["cached", "local", "forwarded"].iter().zip(calm.iter().zip(&beside))
    {
        println!(
            "{what}: median {:?} idle, {:?} during the flood; p99 {:?}, {:?}",
            calm.median(),
            beside.median(),
            calm.p99(),
            beside.p99()
        );
        // The greedy client, this one, the server and the upstream server share two cores.
        let bound = calm.median() * 10 + Duration::from_millis(10);
        assert!(beside.median() < bound, "{what}: {:?}, idle {:?}", beside.median(), calm.median());
        let bound = calm.p99() * 10 + Duration::from_millis(50);
        assert!(beside.p99() < bound, "{what}: {:?}, idle {:?}", beside.p99(), calm.p99());
    }
    println!("{figures:?}");
    assert!(figures.answered > 500, "the greedy container gets its share: {figures:?}");
}

fn scene() -> (TestBed, Upstream) {
    let (bed, upstream) = TestBed::with_upstream();
    bed.network("un1");
    bed.network("un2");
    bed.endpoint("un1", "greedy", &[], &["172.30.1.2"]);
    (bed, upstream)
}

#[test]
fn a_flood_hardly_delays_another_container_of_the_network() {
    let (bed, _upstream) = scene();
    bed.endpoint("un1", "modest", &[], &["172.30.1.3"]);
    compare(&bed.serve("greedy"), &bed.serve("modest"));
    let page = bed.page();
    assert!(page.contains("tidegate_dns_endpoint_rate_limit 2000\n"), "{page}");
}

#[test]
fn a_flood_hardly_delays_another_network() {
    let (bed, _upstream) = scene();
    bed.endpoint("un2", "modest", &[], &["172.30.2.3"]);
    compare(&bed.serve("greedy"), &bed.serve("modest"));
}

/// An upstream server that never responds to the greedy container, which then has the maximum of
/// outstanding queries.
#[test]
fn a_flood_of_unanswered_queries_does_not_block_another_container() {
    let (bed, upstream) = scene();
    bed.endpoint("un1", "modest", &[], &["172.30.1.3"]);
    let (greedy, modest) = (bed.serve("greedy"), bed.serve("modest"));
    upstream.set_mode(Mode::SilentAbout("greedy"));
    let flooding = Greedy::start(&greedy);
    let full = "tidegate_dns_endpoint_waiting_max 6144\n";
    assert!(eventually(SOON, || bed.page().contains(full)), "{}", bed.page());
    look_up(&modest, "silent");
    let figures = flooding.stop();
    println!("{figures:?}");
    assert!(figures.failed > 1_000, "evicted queries get SERVFAIL: {figures:?}");
}

#[test]
fn forwarding_for_an_endpoint_is_rate_limited() {
    let host = Namespace::new();
    let upstream = Upstream::start(&host, "127.0.0.53:53");
    let bed = TestBed::with(host, "nameserver 127.0.0.53\n", |settings| settings.forward_rate = 50);
    bed.network("un1");
    bed.endpoint("un1", "greedy", &[], &["172.30.1.2"]);
    let greedy = bed.serve("greedy");
    let start = Instant::now();
    let flooding = Greedy::start(&greedy);
    std::thread::sleep(Duration::from_secs(2));
    let figures = flooding.stop();
    let (asked, took) = (upstream.names().len(), start.elapsed());
    println!("{asked} forwarded in {took:?}, {figures:?}");
    let most = 50.0 * (took.as_secs_f64() + 1.0) + 1.0;
    assert!(asked >= 50 && asked as f64 <= most, "{asked} in {took:?}");
}
