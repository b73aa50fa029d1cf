//! Cost of a port guard: time per 64-byte frame through a bridge, with each mechanism and without a
//! guard. Also the time of the programs of a port guard and of reply steering alone.
//!
//! One thread, pinned to a core, sends from a member of the bridge. The kernel delivers in a
//! softirq on the same core, so the loop measures the total time per frame. All runs use one bridge
//! port and alternate between no guard and a guard; the cost is the median of the paired
//! differences. Unpaired runs would hide it: within minutes, the speed of the machine drifts by
//! more than the cost, and two bridges differ by more because of memory layout.
//!
//! `cargo bench -p tidegate-netfilter --bench port_guard [-- --rounds N]`

use rustix::thread::{CpuSet, sched_setaffinity};
use std::time::{Duration, Instant};
use tidegate_model::MacAddress;
use tidegate_netfilter::{
    Mechanism, PortGuards, PortPolicy, ReplySteering, Sandboxes, detach_programs, program_time,
};
use tidegate_testbed::Namespace;
use tidegate_testbed::frames::{LinkSocket, Mac, ethernet, udp4, udp6};

const MEMBER: Mac = [2, 0, 0, 0, 0, 7];
const NEIGHBOR: Mac = [2, 0, 0, 0, 0, 8];
/// Frames per run; a run takes about 10 ms.
const FRAMES: u32 = 2_000;
const SETTLES: Duration = Duration::from_millis(10);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let rounds =
        arguments.iter().position(|one| one == "--rounds").and_then(|at| arguments.get(at + 1));
    let rounds = rounds.and_then(|rounds| rounds.parse().ok()).unwrap_or(201_usize);
    let mut cores = CpuSet::new();
    cores.set(0);
    sched_setaffinity(None, &cores).expect("pin to a core");

    let bridge = Bridge::new();
    let frames = frames();
    let guards = Mechanism::ALL
        .map(|mechanism| Namespace::new().run(|| PortGuards::probe(&[mechanism], OWNER)).unwrap());
    let mut runs = Mechanism::ALL.map(|_| frames.each_ref().map(|_| Vec::new()));
    for round in 0..=rounds {
        for (guards, runs) in guards.iter().zip(&mut runs) {
            let bare = frames.each_ref().map(|(_, frame)| bridge.time_per_frame(frame));
            bridge.guard(guards);
            let guarded = frames.each_ref().map(|(_, frame)| bridge.time_per_frame(frame));
            bridge.unguard(guards);
            // The first round warms up caches.
            if round > 0 {
                for (runs, pair) in runs.iter_mut().zip(bare.into_iter().zip(guarded)) {
                    runs.push(pair);
                }
            }
        }
    }
    for (name, frame) in &frames {
        let times =
            (0..15).map(|_| program_time(&policy(), frame, 1_000_000).unwrap().as_nanos() as f64);
        let [_, time, _] = quartiles(times);
        println!("{name}  {:22} {time:5.0} ns, run by the kernel", "BPF program alone");
    }
    steering_times();
    println!(
        "ns per frame of 64 bytes through a bridge, sender included; medians of {rounds} rounds (quartiles)"
    );
    for (number, (name, _)) in frames.iter().enumerate() {
        for (mechanism, runs) in Mechanism::ALL.iter().zip(&runs) {
            let (runs, what) = (&runs[number], mechanism.as_str());
            let [_, bare, _] = quartiles(runs.iter().map(|(bare, _)| *bare));
            let [low, cost, high] = quartiles(runs.iter().map(|(bare, guarded)| guarded - bare));
            println!("{name}  {what:22} {bare:5.0} {cost:+5.0}  ({low:+.0}, {high:+.0})");
        }
    }
}

/// Prints the times of the programs of reply steering, run by the kernel.
fn steering_times() {
    const SANDBOX: Mac = [2, 0, 0, 0, 0, 2];
    const GATEWAY: Mac = [2, 0, 0, 0, 0, 1];
    let sandboxes = Sandboxes::new().unwrap();
    sandboxes.insert(MacAddress(SANDBOX)).unwrap();
    let steering = ReplySteering::new(&sandboxes).unwrap();
    let (client4, endpoint4) = (([198, 51, 100, 7].into(), 1), ([10, 9, 0, 7].into(), 2));
    let (client6, endpoint6) =
        (("2001:db8::7".parse().unwrap(), 1), ("fd09::7".parse().unwrap(), 2));
    let frames = [
        ("IPv4", 0x0800, udp4(client4, endpoint4, &[0; 22]), udp4(endpoint4, client4, &[0; 22])),
        ("IPv6", 0x86dd, udp6(client6, endpoint6, &[0; 2]), udp6(endpoint6, client6, &[0; 2])),
    ];
    for (name, ethertype, request, reply) in frames {
        let from_member = ethernet(MEMBER, NEIGHBOR, ethertype, &request);
        let request = ethernet(MEMBER, SANDBOX, ethertype, &request);
        let reply = ethernet(GATEWAY, MEMBER, ethertype, &reply);
        let [to_endpoint, from_endpoint] = [0, 1];
        let cases = [
            ("steering, known flow", &request, to_endpoint),
            ("steering, no sandbox", &from_member, to_endpoint),
            ("steering, steered", &reply, from_endpoint),
            // No flow has this as its reply.
            ("steering, not steered", &from_member, from_endpoint),
        ];
        for (what, frame, program) in cases {
            let times =
                (0..15).map(|_| steering.times(frame, 1_000_000).unwrap()[program].as_nanos());
            let [_, time, _] = quartiles(times.map(|time| time as f64));
            println!("{name}  {what:22} {time:5.0} ns, run by the kernel");
        }
    }
}

fn policy() -> PortPolicy {
    PortPolicy {
        mac: MacAddress(MEMBER),
        bridge: MacAddress([2, 0, 0, 0, 0, 1]),
        v4: vec![[10, 9, 0, 7].into()],
        v6: vec!["fd09::7".parse().unwrap()],
        any_address: false,
    }
}

fn quartiles(times: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| times[times.len() * quarter / 4])
}

/// Valid frames of the endpoint, 64 bytes long or of the minimum length.
fn frames() -> [(&'static str, Vec<u8>); 2] {
    let v4 = udp4(([10, 9, 0, 7].into(), 1), ([10, 9, 0, 8].into(), 2), &[0; 22]);
    let v6 = udp6(("fd09::7".parse().unwrap(), 1), ("fd09::8".parse().unwrap(), 2), &[0; 2]);
    [
        ("IPv4", ethernet(NEIGHBOR, MEMBER, 0x0800, &v4)),
        ("IPv6", ethernet(NEIGHBOR, MEMBER, 0x86dd, &v6)),
    ]
}

/// A bridge with a sending member and a neighbour.
struct Bridge {
    host: Namespace,
    _neighbor: Namespace,
    socket: LinkSocket,
    _member: Namespace,
}

/// The bridge port of the sending member.
const PORT: &str = "veth-m";

/// Owner of the guards.
const OWNER: &str = "bench";

impl Bridge {
    fn new() -> Self {
        let (host, member, neighbor) = (Namespace::new(), Namespace::new(), Namespace::new());
        host.ip_all("link add br0 type bridge mcast_snooping 0");
        // Excludes iptables from the path of bridged frames.
        host.sysctl("net.bridge.bridge-nf-call-iptables", "0");
        host.sysctl("net.bridge.bridge-nf-call-ip6tables", "0");
        for (link, namespace, mac) in [(PORT, &member, MEMBER), ("veth-n", &neighbor, NEIGHBOR)] {
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
        host.exec(
            "bridge",
            &["fdb", "replace", "02:00:00:00:00:08", "dev", "veth-n", "master", "static"],
        );
        let socket = LinkSocket::sender(&member, "eth0");
        Self { host, _neighbor: neighbor, socket, _member: member }
    }

    fn guard(&self, guards: &PortGuards) {
        self.host.run(|| guards.attach(self.index(), PORT, &policy())).unwrap();
    }

    fn unguard(&self, guards: &PortGuards) {
        guards.forget(PORT);
        match guards.mechanism() {
            Mechanism::Tcx => self.host.run(|| detach_programs(self.index())).unwrap(),
            Mechanism::Clsact | Mechanism::Classic => {
                self.host.exec("tc", &["qdisc", "del", "dev", PORT, "clsact"]);
            }
            Mechanism::Nftables => self.host.run(|| PortGuards::remove_table(OWNER)).unwrap(),
        }
    }

    fn index(&self) -> u32 {
        self.host.ip(&["-o", "link", "show", PORT]).split(':').next().unwrap().parse().unwrap()
    }

    /// Measures after the kernel has released the previous guard, with warm caches.
    fn time_per_frame(&self, frame: &[u8]) -> f64 {
        std::thread::sleep(SETTLES);
        for _ in 0..FRAMES / 10 {
            self.socket.send(frame);
        }
        let begun = Instant::now();
        for _ in 0..FRAMES {
            self.socket.send(frame);
        }
        begun.elapsed().as_secs_f64() * 1e9 / f64::from(FRAMES)
    }
}
