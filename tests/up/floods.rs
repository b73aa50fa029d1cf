//! A greedy container and a modest one behind the NAT engine: what the flood of the one costs the other.

use super::scene::{Scene, TIDEGATE};
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tidegate_testbed::frames::{LinkSocket, Mac, ethernet, ipv4, syn4, udp4};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, addr};

const SOON: Duration = Duration::from_secs(10);

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
/// Requests that a figure is made of.
const REQUESTS: usize = 200;
/// What noise of the machine may hide; benches judge the factors.
const NOISE: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug)]
enum Flood {
    /// Its frames are dropped at its own bridge port: their source is another station.
    DroppedAtPort,
    Syn,
    SynOfManySources,
    Udp,
    Fragments,
}

impl Flood {
    fn frames(self, own: Mac, gateway: Mac) -> Vec<Vec<u8>> {
        let greedy = Ipv4Addr::new(10, 83, 1, 2);
        let frame = |number: u32| {
            let port = 1024 + (number % 60_000) as u16;
            let spoofed = Ipv4Addr::new(10, 83, 1, 10 + (number % 200) as u8);
            let to = (addr::CLIENT_V4, 7001);
            let packet = match self {
                Self::DroppedAtPort | Self::Syn => syn4((greedy, port), to, number),
                Self::SynOfManySources => syn4((spoofed, port), to, number),
                Self::Udp => udp4((greedy, port), to, b"flood"),
                Self::Fragments => {
                    let mut packet = ipv4(greedy, to.0, 17, &[0; 1024]);
                    packet[4..6].copy_from_slice(&port.to_be_bytes());
                    // More of them follow, which never come. The header's checksum sums up to the same as before.
                    packet[6] = 0x20;
                    let before = u16::from_be_bytes([packet[10], packet[11]]);
                    let added = u32::from(before) + 0xffff * 2 - 0x2000 - u32::from(port) + 1;
                    let folded = (added & 0xffff) + (added >> 16);
                    let folded = (folded & 0xffff) + (folded >> 16);
                    packet[10..12].copy_from_slice(&(folded as u16).to_be_bytes());
                    packet
                }
            };
            let source = if matches!(self, Self::DroppedAtPort) { [2, 9, 9, 9, 9, 9] } else { own };
            ethernet(gateway, source, 0x0800, &packet)
        };
        (0..20_000).map(frame).collect()
    }
}

/// The hardware address behind `words` in a line of ip(8).
fn mac(line: &str, word: &str) -> Mac {
    let text = line.split(word).nth(1).unwrap_or_else(|| panic!("no {word} in {line}"));
    let mut bytes = text.trim().split([':', ' ', '\n']).map(|byte| u8::from_str_radix(byte, 16).unwrap());
    std::array::from_fn(|_| bytes.next().unwrap())
}

/// Sends frames until it is told to stop.
fn flood(greedy: &Namespace, frames: Vec<Vec<u8>>, stop: Arc<AtomicBool>) -> thread::JoinHandle<()> {
    let socket = LinkSocket::sender(greedy, "eth0");
    thread::spawn(move || {
        let begin = Instant::now();
        for (number, frame) in frames.iter().cycle().enumerate() {
            socket.send(frame);
            if number % 64 == 0 {
                let due = begin + Duration::from_secs(number as u64) / RATE;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        }
    })
}

/// The median, and the 99th percentile, of what a request takes; each is a connection of its own.
fn requests(modest: &Namespace, to: SocketAddr) -> (Duration, Duration) {
    let mut took: Vec<Duration> = modest.run(|| {
        let request = |_| {
            thread::sleep(Duration::from_millis(5));
            let begin = Instant::now();
            let mut stream = TcpStream::connect_timeout(&to, SOON).expect("a modest container connects");
            stream.set_read_timeout(Some(SOON)).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("and is answered");
            begin.elapsed()
        };
        (0..REQUESTS).map(request).collect()
    });
    took.sort_unstable();
    (took[REQUESTS / 2], took[REQUESTS * 99 / 100])
}

#[test]
fn a_flood_of_one_container_does_not_slow_another_down() {
    let scene = Scene::new();
    let (_up, [greedy, modest]) =
        scene.up_with_services(FILE, ["greedy", "modest"], false, &["--firewall=none"]);
    let _flooded = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7001).into());
    let asked = PeerServer::tcp(&scene.net.client, (addr::CLIENT_V4, 7002).into());
    // The gateway's address is looked up by a datagram to it.
    greedy.run(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"x", "10.83.1.1:9").unwrap();
    });
    thread::sleep(Duration::from_millis(300));
    let gateway = mac(&greedy.ip(&["neigh", "show", "10.83.1.1"]), "lladdr ");
    let own = mac(&greedy.ip(&["-o", "link", "show", "eth0"]), "link/ether ");

    let round = |kind: Flood| {
        let stop = Arc::new(AtomicBool::new(false));
        let sender = flood(&greedy, kind.frames(own, gateway), Arc::clone(&stop));
        thread::sleep(Duration::from_millis(500));
        let figures = requests(&modest, asked.addr());
        stop.store(true, Ordering::Relaxed);
        sender.join().unwrap();
        figures
    };
    for kind in [Flood::Syn, Flood::SynOfManySources, Flood::Udp, Flood::Fragments] {
        let mut seen = Vec::new();
        let is_fair = (0..3).any(|_| {
            let ((alone, alone_99), (beside, beside_99)) = (round(Flood::DroppedAtPort), round(kind));
            seen.push(((alone, beside), (alone_99, beside_99)));
            beside <= 3 * alone + NOISE / 10 && beside_99 <= 5 * alone_99 + NOISE
        });
        assert!(
            is_fair,
            "{kind:?}: medians and 99th percentiles beside a dropped flood and this one: {seen:?}"
        );
        eprintln!("{kind:?}: {seen:?}");
    }
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
