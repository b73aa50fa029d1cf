//! Continuous probes of a container, from outside and from another network, during starts, stops,
//! kills, and while other software flushes tidegate's rules. None of them must arrive.

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

/// Interval between two probes of a prober.
const PAUSE: Duration = Duration::from_millis(1);

/// Addresses of the container that only its own network may reach.
const CONTAINER: [&str; 2] = ["10.77.1.10:80", "[fd77:1::10]:80"];

/// Running probers, on a host with forwarding enabled.
struct Probing {
    scene: Scene,
    endpoints: [Namespace; 4],
    file: String,
    witness: Witness,
    over: Arc<AtomicBool>,
    probes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Probing {
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
        let (over, probes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut threads = Vec::new();
        for from in [&scene.net.client, &endpoints[2]] {
            for to in CONTAINER {
                let to: SocketAddr = to.parse().unwrap();
                let any = if to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
                let socket = from.run(|| UdpSocket::bind(any)).unwrap();
                let (over, probes) = (Arc::clone(&over), Arc::clone(&probes));
                threads.push(thread::spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        // Errors such as a missing route are expected.
                        let _ = socket.send_to(b"let me in", to);
                        probes.fetch_add(1, Ordering::Relaxed);
                        thread::sleep(PAUSE);
                    }
                }));
            }
        }
        Self { scene, endpoints, file, witness, over, probes, threads }
    }

    fn up(&self, flags: &[&str]) -> Process {
        let up = self.scene.up_with(&self.file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    }

    /// Whether the container answers a client of its network, which shows that the witness records
    /// datagrams.
    fn neighbour_is_answered(&self) -> bool {
        self.endpoints[1].run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(SOON)).unwrap();
            socket.send_to(b"hello", CONTAINER[0]).is_ok() && socket.recv(&mut [0; 10]).is_ok()
        })
    }

    /// Asserts that no probe has arrived.
    #[track_caller]
    fn assert_none_arrived(mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        assert!(self.witness.has_seen("hello"), "the witness works");
        assert!(self.probes.load(Ordering::Relaxed) > 400, "probes were sent");
        assert!(!self.witness.has_seen("let me in"));
    }
}

/// Starts, stops and kills.
#[track_caller]
fn assert_closed_through_restarts(flags: &[&str], restarts: usize) {
    let probing = Probing::new(Scene::new());
    let endings = [Signal::KILL, Signal::INT, Signal::KILL, Signal::TERM];
    for ending in endings.into_iter().cycle().take(restarts) {
        let mut up = probing.up(flags);
        assert!(probing.neighbour_is_answered());
        up.signal(ending);
        up.wait(SOON);
    }
    probing.assert_none_arrived();
}

#[test]
fn a_container_stays_closed_through_restarts() {
    assert_closed_through_restarts(&["--firewall=none"], 6);
}

#[test]
fn a_container_stays_closed_through_twenty_restarts_with_nftables() {
    assert_closed_through_restarts(&["--firewall=nftables", "--publish=kernel"], 20);
}

#[test]
fn a_container_stays_closed_through_twenty_restarts_with_iptables() {
    assert_closed_through_restarts(&["--firewall=iptables", "--publish=kernel"], 20);
}

/// Other software removes rules (`harms`, repeated to `times`). They are restored, and no probe
/// arrives before that. Prints the longest time until they were restored.
#[track_caller]
fn assert_restored(scene: Scene, flags: &[&str], harms: &[&str], times: usize) {
    let probing = Probing::new(scene);
    let host = &probing.scene.net.host;
    let mut up = probing.up(flags);
    assert!(probing.neighbour_is_answered());
    let ours = state(host);
    let mut longest = Duration::ZERO;
    for harm in harms.iter().cycle().take(times) {
        // Fails where the kernel denies the change of an owned table.
        let _ = host
            .command("sh")
            .args(["-c", harm])
            .env("PATH", probing.scene.path())
            .output()
            .unwrap();
        let removed = Instant::now();
        let restored = eventually(SOON, || state(host) == ours);
        assert!(restored, "{harm}:\n{}\ninstead of\n{ours}{}", state(host), up.output());
        longest = longest.max(removed.elapsed());
    }
    println!("restored within {longest:?}");
    assert!(probing.neighbour_is_answered());
    assert!(!up.output().contains("ERROR"), "{}", up.output());
    up.stop(Signal::INT, SOON);
    probing.assert_none_arrived();
}

#[test]
fn a_container_stays_closed_while_nftables_is_flushed_a_hundred_times() {
    let harms = [
        "nft flush ruleset",
        "nft delete table inet tidegate-matrix",
        "nft delete table inet tidegate_user",
        "nft flush table inet tidegate_user",
    ];
    assert_restored(Scene::new(), &["--firewall=nftables"], &harms, 100);
}

#[test]
fn a_container_stays_closed_while_tables_without_an_owner_are_flushed() {
    let harms = [
        "nft flush ruleset",
        "nft delete table inet tidegate-matrix",
        "nft flush chain inet tidegate-matrix forward",
        "for link in $(ls /sys/class/net | grep ^tg-); do ip link set $link group 0; done",
    ];
    assert_restored(
        Scene::lacking("owned-tables"),
        &["--firewall=nftables", "--publish=kernel"],
        &harms,
        30,
    );
}

/// After a kill, no process restores the rules, and no process owns the tables.
#[test]
fn a_container_stays_closed_while_rules_of_a_killed_instance_are_flushed() {
    for (firewall, lacks) in
        [("nftables", ""), ("iptables", ""), ("nftables", "gates"), ("iptables", "gates")]
    {
        let flags = &[&format!("--firewall={firewall}")[..], "--publish=kernel"];
        let probing = Probing::new(Scene::lacking(lacks));
        for _ in 0..3 {
            let mut up = probing.up(flags);
            assert!(probing.neighbour_is_answered());
            up.signal(Signal::KILL);
            up.wait(SOON);
            probing.scene.sh("nft flush ruleset");
            thread::sleep(50 * PAUSE);
        }
        let mut up = probing.up(flags);
        up.stop(Signal::INT, SOON);
        probing.assert_none_arrived();
    }
}

#[test]
fn a_container_stays_closed_by_policy_rules_while_tables_are_flushed() {
    let lacking = || Scene::lacking("owned-tables,gates");
    assert_restored(
        lacking(),
        &["--firewall=nftables", "--publish=kernel"],
        &["nft flush ruleset"],
        20,
    );
    let harms = ["iptables -F; ip6tables -F", "nft flush ruleset", "iptables -t mangle -F"];
    assert_restored(lacking(), &["--firewall=iptables", "--publish=kernel"], &harms, 20);
}

#[test]
fn a_container_stays_closed_while_iptables_is_flushed_a_hundred_times() {
    let harms = [
        "iptables -F; ip6tables -F",
        "iptables -t nat -F; ip6tables -t nat -F",
        "nft flush ruleset",
        "iptables -D FORWARD 1; ip6tables -t mangle -F",
        "iptables -t raw -F; iptables -t raw -X",
    ];
    assert_restored(Scene::new(), &["--firewall=iptables", "--publish=kernel"], &harms, 100);
}

/// The kernel sends no notifications about legacy rules.
#[test]
fn a_container_stays_closed_while_legacy_iptables_is_flushed() {
    let harms =
        ["iptables -F; ip6tables -F", "iptables -t nat -F", "iptables -t raw -D PREROUTING 1"];
    assert_restored(
        Scene::with_legacy_iptables(),
        &["--firewall=iptables", "--publish=kernel"],
        &harms,
        12,
    );
}
