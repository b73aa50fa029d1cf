//! An outside that knows the way, and a container of another network, which knock at a container
//! all the while: during starts and ends, kills, and while others throw our rules away.

use super::matrix::{ENDPOINTS, FILE};
use super::scene::{Scene, state};
use super::witness::Witness;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);

/// How often each of them knocks.
const PAUSE: Duration = Duration::from_millis(1);

/// What a container listens at that nobody else shall reach.
const CONTAINER: [&str; 2] = ["10.77.1.10:80", "[fd77:1::10]:80"];

/// The scene with all of it going on, on a host that forwards for others.
struct Knocking {
    scene: Scene,
    endpoints: [Namespace; 4],
    file: String,
    witness: Witness,
    over: Arc<AtomicBool>,
    knocks: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Knocking {
    fn new(scene: Scene) -> Self {
        scene.net.host.sysctl("net.ipv4.ip_forward", "1");
        scene.net.host.sysctl("net.ipv6.conf.all.forwarding", "1");
        scene.net.client.ip_all(
            "route add 10.77.0.0/16 via 203.0.113.1
             -6 route add fd77::/16 via 2001:db8:1::1",
        );
        let endpoints = ENDPOINTS.map(|_| Namespace::new());
        let mut file = FILE.to_owned();
        for (name, namespace) in ENDPOINTS.iter().zip(&endpoints) {
            file = file.replace(&name.to_uppercase(), &namespace.path().display().to_string());
        }
        let witness = Witness::new(&endpoints[0], &["[::]:80".parse().unwrap()]);
        let (over, knocks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        for from in [&scene.net.client, &endpoints[2]] {
            for to in CONTAINER {
                let to: SocketAddr = to.parse().unwrap();
                let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
                let socket = from.run(|| UdpSocket::bind(any)).unwrap();
                let (over, knocks) = (Arc::clone(&over), Arc::clone(&knocks));
                threads.push(thread::spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        // That there is no way is what is hoped for.
                        let _ = socket.send_to(b"let me in", to);
                        knocks.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(PAUSE);
                    }
                }));
            }
        }
        Self { scene, endpoints, file, witness, over, knocks, threads }
    }

    fn up(&self, flags: &[&str]) -> Process {
        let up = self.scene.up_with(&self.file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    }

    /// Whether a neighbour of the container is answered, by which the witness hears what comes in.
    fn neighbour_is_answered(&self) -> bool {
        self.endpoints[1].run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket.send_to(b"hello", CONTAINER[0]).is_ok() && socket.recv(&mut [0; 10]).is_ok()
        })
    }

    /// Nobody was let in.
    #[track_caller]
    fn end(mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        assert!(self.witness.has_seen("hello"), "the witness does hear what comes in");
        assert!(self.knocks.load(Ordering::Relaxed) > 400, "and there was knocking");
        assert!(!self.witness.has_seen("let me in"));
    }
}

/// Starts, ends, and kills.
#[track_caller]
fn is_never_open_through_restarts(flags: &[&str], restarts: usize) {
    let knocking = Knocking::new(Scene::new());
    let endings = [Signal::KILL, Signal::INT, Signal::KILL, Signal::TERM];
    for ending in endings.into_iter().cycle().take(restarts) {
        let mut up = knocking.up(flags);
        assert!(knocking.neighbour_is_answered());
        up.signal(ending);
        up.wait(SOON);
    }
    knocking.end();
}

#[test]
fn there_is_no_moment_at_which_a_container_is_open() {
    is_never_open_through_restarts(&["--firewall=none"], 6);
}

#[test]
fn there_is_none_with_nftables_through_twenty_restarts() {
    is_never_open_through_restarts(&["--firewall=nftables", "--publish=kernel"], 20);
}

#[test]
fn there_is_none_with_iptables_through_twenty_restarts() {
    is_never_open_through_restarts(&["--firewall=iptables", "--publish=kernel"], 20);
}

/// Others throw rules away, ours among them: they are back within a second, and nobody is let in
/// meanwhile.
#[track_caller]
fn heals(scene: Scene, flags: &[&str], harms: &[&str], times: usize) {
    let knocking = Knocking::new(scene);
    let host = &knocking.scene.net.host;
    let mut up = knocking.up(flags);
    assert!(knocking.neighbour_is_answered());
    let ours = state(host);
    let mut longest = Duration::ZERO;
    for harm in harms.iter().cycle().take(times) {
        // What cannot be done to us, because it is ours alone, need not be repaired.
        let _ = host
            .command("sh")
            .args(["-c", harm])
            .env("PATH", knocking.scene.path())
            .output()
            .unwrap();
        let harmed = Instant::now();
        let healed = eventually(SOON, || state(host) == ours);
        assert!(healed, "{harm}:\n{}\ninstead of\n{ours}{}", state(host), up.output());
        longest = longest.max(harmed.elapsed());
    }
    println!("back after {longest:?} at most");
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    assert!(knocking.neighbour_is_answered());
    assert!(!up.output().contains("ERROR"), "{}", up.output());
    up.stop(Signal::INT, SOON);
    knocking.end();
}

#[test]
fn nftables_flushed_a_hundred_times_let_nobody_in() {
    let harms = [
        "nft flush ruleset",
        "nft delete table inet tidegate-matrix",
        "nft delete table inet tidegate_user",
        "nft flush table inet tidegate_user",
    ];
    heals(Scene::new(), &["--firewall=nftables"], &harms, 100);
}

#[test]
fn tables_of_nftables_that_are_everybodys_flushed_let_nobody_in() {
    let harms = [
        "nft flush ruleset",
        "nft delete table inet tidegate-matrix",
        "nft flush chain inet tidegate-matrix forward",
        "for link in $(ls /sys/class/net | grep ^tg-); do ip link set $link group 0; done",
    ];
    heals(Scene::lacking("owned-tables"), &["--firewall=nftables", "--publish=kernel"], &harms, 30);
}

/// Nobody is there to put anything back, and the tables are nobody's.
#[test]
fn flushed_while_we_are_dead_let_nobody_in() {
    for (firewall, lacks) in
        [("nftables", ""), ("iptables", ""), ("nftables", "gates"), ("iptables", "gates")]
    {
        let flags = &[&format!("--firewall={firewall}")[..], "--publish=kernel"];
        let knocking = Knocking::new(Scene::lacking(lacks));
        for _ in 0..3 {
            let mut up = knocking.up(flags);
            assert!(knocking.neighbour_is_answered());
            up.signal(Signal::KILL);
            up.wait(SOON);
            knocking.scene.sh("nft flush ruleset");
            thread::sleep(50 * PAUSE);
        }
        let mut up = knocking.up(flags);
        up.stop(Signal::INT, SOON);
        knocking.end();
    }
}

#[test]
fn tables_flushed_where_policy_rules_stand_behind_let_nobody_in() {
    let lacking = || Scene::lacking("owned-tables,gates");
    heals(lacking(), &["--firewall=nftables", "--publish=kernel"], &["nft flush ruleset"], 20);
    let harms = ["iptables -F; ip6tables -F", "nft flush ruleset", "iptables -t mangle -F"];
    heals(lacking(), &["--firewall=iptables", "--publish=kernel"], &harms, 20);
}

#[test]
fn iptables_flushed_a_hundred_times_let_nobody_in() {
    let harms = [
        "iptables -F; ip6tables -F",
        "iptables -t nat -F; ip6tables -t nat -F",
        "nft flush ruleset",
        "iptables -D FORWARD 1; ip6tables -t mangle -F",
        "iptables -t raw -F; iptables -t raw -X",
    ];
    heals(Scene::new(), &["--firewall=iptables", "--publish=kernel"], &harms, 100);
}

/// Whose kernel says nothing of changes.
#[test]
fn legacy_iptables_flushed_let_nobody_in() {
    let harms =
        ["iptables -F; ip6tables -F", "iptables -t nat -F", "iptables -t raw -D PREROUTING 1"];
    heals(Scene::with_legacy_iptables(), &["--firewall=iptables", "--publish=kernel"], &harms, 12);
}
