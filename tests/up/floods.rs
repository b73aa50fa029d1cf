//! A greedy container and a modest one behind the NAT engine: what the flood of the one costs the
//! other.

use super::scene::{Scene, TIDEGATE};
use std::fs;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;
use tidegate_testbed::addr;
use tidegate_testbed::eventually;
use tidegate_testbed::flood::{FloodKind, Flooder, request_times};
use tidegate_testbed::server::PeerServer;

/// The greedy one may send from any address of its network, as where there is no port guard.
const FILE: &str = r#"
name: floods
networks:
  one: { ipam: { config: [ { subnet: 10.83.1.0/24 } ] } }
  two: { ipam: { config: [ { subnet: 10.83.2.0/24 } ] } }
services:
  greedy: { x-netns: GREEDY, networks: { one: { ipv4_address: 10.83.1.2, x-any-source: true } } }
  modest: { x-netns: MODEST, networks: { two: { ipv4_address: 10.83.2.2 } } }
"#;

/// Frames a second.
const RATE: u32 = 60_000;
/// Requests that a figure is made of, and the pause between two.
const REQUESTS: usize = 200;
const PAUSE: Duration = Duration::from_millis(5);
/// The median of the modest container's requests, where a lost SYN costs a second. How much slower
/// they are is for the bench `neighbour` to judge, on a machine where nothing else runs.
const SERVED: Duration = Duration::from_millis(100);

#[test]
fn a_container_is_served_beside_the_flood_of_another() {
    let scene = Scene::new();
    let (_up, [greedy, modest]) =
        scene.up_with_services(FILE, ["greedy", "modest"], false, &["--firewall=none"]);
    let flooded = (addr::CLIENT_V4, 7001);
    let _flooded = PeerServer::tcp(&scene.net.client, flooded.into());
    let asked = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7002).into());
    let flooder = Flooder {
        namespace: &greedy,
        address: Ipv4Addr::new(10, 83, 1, 2),
        gateway: Ipv4Addr::new(10, 83, 1, 1),
        target: flooded,
    };
    let median = |kind| {
        let _flood = flooder.start(kind, RATE);
        thread::sleep(Duration::from_millis(500));
        let mut took = modest.run(|| request_times(asked.addr(), REQUESTS, PAUSE));
        took.sort_unstable();
        took[REQUESTS / 2]
    };
    for kind in [FloodKind::Syn, FloodKind::SynOfManySources, FloodKind::Udp, FloodKind::Fragments]
    {
        let mut seen = Vec::new();
        let is_served = (0..3).any(|_| {
            seen.push(median(kind));
            seen.last().is_some_and(|median| *median <= SERVED)
        });
        assert!(is_served, "{kind:?}: medians of three rounds: {seen:?}");
    }
}

/// The greedy one's port guard drops what the engine would refuse, and lets all pass again once the
/// flood is over: its own connections are limited for as long.
#[track_caller]
fn a_flood_is_policed(rootless: bool) {
    let scene = Scene::new().with_metrics();
    let scene = if rootless { scene.with_open_tun() } else { scene };
    let file = FILE.replace(", x-any-source: true", "");
    let (_up, [greedy, _modest]) =
        scene.up_with_services(&file, ["greedy", "modest"], rootless, &["--firewall=none"]);
    let target = (addr::CLIENT_V4, 7001);
    let _server = PeerServer::tcp(&scene.net.client, target.into());
    let policed = || {
        let figures = scene.figures();
        let mut policed = figures.lines().filter_map(|line| {
            let value = line.strip_prefix(
                "tidegate_network_policed_frames_total{network=\"one\",endpoint=\"greedy\"} ",
            )?;
            value.parse::<u64>().ok()
        });
        policed.next().expect("a series of the greedy container")
    };
    assert_eq!(policed(), 0);
    let flooder = Flooder {
        namespace: &greedy,
        address: Ipv4Addr::new(10, 83, 1, 2),
        gateway: Ipv4Addr::new(10, 83, 1, 1),
        target,
    };
    let flood = flooder.start(FloodKind::Syn, RATE);
    assert!(eventually(Duration::from_secs(1), || policed() > 1000), "{}", policed());
    let before = policed();
    thread::sleep(Duration::from_secs(2));
    let passed = 2.0 * f64::from(RATE) - (policed() - before) as f64;
    assert!(passed < f64::from(RATE) / 4.0, "of {RATE} a second {passed} passed in two");
    drop(flood);
    // Some 2 s after the flood there is no policer any more: more connections than it lets pass at
    // once are made.
    thread::sleep(Duration::from_millis(2500));
    let before = policed();
    let times = greedy.run(|| request_times(target.into(), 200, Duration::ZERO));
    assert_eq!(times.len(), 200);
    assert_eq!(policed(), before);
}

#[test]
fn a_flood_ends_at_the_port_of_its_container() {
    a_flood_is_policed(false);
}

#[test]
fn a_flood_ends_at_the_port_of_its_container_rootless() {
    a_flood_is_policed(true);
}

#[test]
fn a_limit_of_the_engine_that_is_zero_is_refused_by_its_name() {
    let scene = Scene::new();
    fs::write(scene.directory.path().join("compose.yaml"), FILE).unwrap();
    for flag in ["--nat-max-flows", "--nat-max-endpoint-flows", "--nat-max-unanswered"] {
        let output = scene.net.host.command(TIDEGATE).args(["up", flag, "0"]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(flag) && told.contains('0'), "{told}");
    }
}
