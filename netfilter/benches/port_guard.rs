//! What a port guard costs: time per frame of 64 bytes through a bridge, with each mechanism and without a guard.
//!
//! One thread, pinned to a core, sends from a member of the bridge. The kernel delivers in a softirq of the same core, so
//! the time of the loop is all of the time that a frame takes. Medians of alternating rounds, and the least of each, which
//! is what nothing else has disturbed.
//!
//! `cargo bench -p tidegate-netfilter --bench port_guard [-- --rounds N]`

use rustix::thread::{CpuSet, sched_setaffinity};
use std::time::Instant;
use tidegate_netfilter::{Mechanism, PortGuards, PortPolicy};
use tidegate_testbed::Namespace;
use tidegate_testbed::frames::{LinkSocket, Mac, ethernet, udp4, udp6};

const MEMBER: Mac = [2, 0, 0, 0, 0, 7];
const NEIGHBOR: Mac = [2, 0, 0, 0, 0, 8];
const FRAMES: u32 = 20_000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let rounds = arguments.iter().position(|one| one == "--rounds").and_then(|at| arguments.get(at + 1));
    let rounds = rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(81_usize);
    let mut cores = CpuSet::new();
    cores.set(0);
    sched_setaffinity(None, &cores).expect("pin to a core");

    let variants: Vec<Option<Mechanism>> = [None].into_iter().chain(Mechanism::ALL.map(Some)).collect();
    let bridges: Vec<Bridge> = variants.iter().map(|mechanism| Bridge::new(*mechanism)).collect();
    println!(
        "ns per frame of 64 bytes through a bridge, sender included; medians of {rounds} alternating rounds (least, most)"
    );
    for (name, frame) in frames() {
        let mut times = vec![Vec::new(); variants.len()];
        for round in 0..=rounds {
            for (bridge, times) in bridges.iter().zip(&mut times) {
                let time = bridge.time_per_frame(&frame);
                // The first one warms caches up.
                if round > 0 {
                    times.push(time);
                }
            }
        }
        let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
        let least = times[0][0];
        for ((mechanism, times), median) in variants.iter().zip(&times).zip(&medians) {
            let what = mechanism.map_or("no guard", Mechanism::as_str);
            let (cost, least) = (median - medians[0], times[0] - least);
            let (low, most) = (times[0], times[times.len() - 1]);
            println!(
                "{name:5} {what:22} {median:7.0} ({low:.0}, {most:.0})  guard: {cost:+.0}, by the least {least:+.0}"
            );
        }
    }
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Of the endpoint's own, each 64 bytes long or the least there is.
fn frames() -> [(&'static str, Vec<u8>); 2] {
    let v4 = udp4(([10, 9, 0, 7].into(), 1), ([10, 9, 0, 8].into(), 2), &[0; 22]);
    let v6 = udp6(("fd09::7".parse().unwrap(), 1), ("fd09::8".parse().unwrap(), 2), &[0; 2]);
    [("IPv4", ethernet(NEIGHBOR, MEMBER, 0x0800, &v4)), ("IPv6", ethernet(NEIGHBOR, MEMBER, 0x86dd, &v6))]
}

/// A bridge with two members, of which one sends.
struct Bridge {
    _host: Namespace,
    _neighbor: Namespace,
    _guards: Option<PortGuards>,
    socket: LinkSocket,
    _member: Namespace,
}

impl Bridge {
    fn new(mechanism: Option<Mechanism>) -> Self {
        let (host, member, neighbor) = (Namespace::new(), Namespace::new(), Namespace::new());
        host.ip_all("link add br0 type bridge mcast_snooping 0");
        // The path of frames is the bridge's alone.
        host.sysctl("net.bridge.bridge-nf-call-iptables", "0");
        host.sysctl("net.bridge.bridge-nf-call-ip6tables", "0");
        for (link, namespace, mac) in [("veth-m", &member, MEMBER), ("veth-n", &neighbor, NEIGHBOR)] {
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            let path = namespace.path();
            host.ip_all(&format!(
                "link add {link} type veth peer name eth0 address {mac} netns {}",
                path.display()
            ));
            namespace.ip_all("link set eth0 arp off\nlink set eth0 up");
            host.ip_all(&format!("link set {link} master br0\nlink set {link} up"));
        }
        host.ip_all("link set br0 up");
        host.exec("bridge", &["fdb", "replace", "02:00:00:00:00:08", "dev", "veth-n", "master", "static"]);
        let guards = mechanism.map(|mechanism| {
            let guards = Namespace::new().run(|| PortGuards::probe(&[mechanism], "bench")).unwrap();
            let listed = host.ip(&["-o", "link", "show", "veth-m"]);
            let index = listed.split(':').next().unwrap().parse().unwrap();
            let policy = PortPolicy {
                mac: MEMBER,
                v4: vec![[10, 9, 0, 7].into()],
                v6: vec!["fd09::7".parse().unwrap()],
                any_address: false,
            };
            host.run(|| guards.attach(index, "veth-m", &policy)).unwrap();
            guards
        });
        let socket = LinkSocket::sender(&member, "eth0");
        Self { _host: host, _neighbor: neighbor, _guards: guards, socket, _member: member }
    }

    fn time_per_frame(&self, frame: &[u8]) -> f64 {
        let begun = Instant::now();
        for _ in 0..FRAMES {
            self.socket.send(frame);
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(FRAMES)
    }
}
