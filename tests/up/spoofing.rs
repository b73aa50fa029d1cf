//! Root in a container sends in the name of others, by hand-made frames: nobody receives them, in any mode and with each
//! mechanism of port guards. What an unmodified kernel sends is not dropped.

use super::scene::{Scene, rootless_namespace, service_namespace};
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;
use tidegate_testbed::frames::{Forger, KINDS, LinkSocket, MARKER, Mac};
use tidegate_testbed::{Namespace, Process, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Frames of each kind.
const COUNT: usize = 10_000;
const METRICS: &str = "127.0.0.1:9477";

const FILE: &str = r#"
name: spoofing
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.1.0/24 }, { subnet: "fd77:1::/64" } ] } }
  away: { enable_ipv6: true, ipam: { config: [ { subnet: 10.77.2.0/24 }, { subnet: "fd77:2::/64" } ] } }
services:
  hostile: { RUN_HOSTILE, networks: { home: { ipv4_address: 10.77.1.7, ipv6_address: "fd77:1::7" } } }
  neighbor: { RUN_NEIGHBOR, networks: { home: { ipv4_address: 10.77.1.8, ipv6_address: "fd77:1::8" } } }
  stranger: { RUN_STRANGER, networks: { away: { ipv4_address: 10.77.2.9, ipv6_address: "fd77:2::9" } }, ports: [ "8080:80" ] }
"#;

const SERVICES: [&str; 3] = ["hostile", "neighbor", "stranger"];

/// Begins to bring `file` up by `tidegate`, with metrics.
fn bring_up(scene: &Scene, mut tidegate: Command, file: &str, flags: &[&str]) -> Process {
    let path = scene.directory.path().join("compose.yaml");
    fs::write(&path, file).unwrap();
    Process::spawn(tidegate.arg("up").arg("-f").arg(path).args(["--metrics", METRICS]).args(flags))
}

/// A project, its containers, and where its bridges are.
struct Project {
    scene: Scene,
    containers: [Namespace; 3],
    host: Namespace,
    _up: Process,
}

impl Project {
    fn as_root(firewall: &str, lacks: &'static str) -> Self {
        let scene = Scene::lacking(lacks);
        scene.net.host.sysctl("net.ipv4.ip_forward", "1");
        let containers = SERVICES.map(|_| Namespace::new());
        let mut file = FILE.to_owned();
        for (name, namespace) in SERVICES.iter().zip(&containers) {
            let adopted = format!("x-netns: {}", namespace.path().display());
            file = file.replace(&format!("RUN_{}", name.to_uppercase()), &adopted);
        }
        let flag = format!("--firewall={firewall}");
        let up = bring_up(&scene, scene.tidegate(), &file, &[&flag]);
        up.wait_for_line("Ctrl-C takes", SOON);
        let host = scene.net.host.clone();
        Self { scene, containers, host, _up: up }
    }

    fn as_nobody(lacks: &'static str) -> Self {
        let scene = Scene::lacking(lacks);
        let mut file = FILE.to_owned();
        for name in SERVICES {
            file = file.replace(&format!("RUN_{}", name.to_uppercase()), "command: sleep 60");
        }
        let up = bring_up(&scene, scene.tidegate_as_nobody(), &file, &[]);
        up.wait_for_line("Ctrl-C takes", SOON);
        let containers = SERVICES.map(|name| service_namespace(&up, name));
        let host = rootless_namespace(&up, &scene.net.host);
        Self { scene, containers, host, _up: up }
    }

    fn forger(&self) -> Forger {
        let address = self.containers[0].run(|| fs::read_to_string("/proc/thread-self/net/if_inet6"));
        let address = address.unwrap();
        let link_local = address.lines().find(|line| line.starts_with("fe80")).expect("a link-local address");
        let link_local = u128::from_str_radix(&link_local[..32], 16).unwrap().into();
        let listed = self.containers[0].ip(&["-o", "link", "show", "eth0"]);
        let mac = listed.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let mac: Mac = bytes.try_into().unwrap();
        Forger {
            mac,
            own: ("10.77.1.7".parse().unwrap(), "fd77:1::7".parse().unwrap()),
            link_local,
            gateway: ("10.77.1.1".parse().unwrap(), "fd77:1::1".parse().unwrap()),
            neighbor: ("10.77.1.8".parse().unwrap(), "fd77:1::8".parse().unwrap()),
            seed: 7,
        }
    }

    /// Everywhere that a frame could get to: neighbour, other network, bridges, the outside.
    fn receivers(&self) -> Vec<(String, LinkSocket)> {
        let mut all = vec![
            ("the neighbour".to_owned(), LinkSocket::open(&self.containers[1], "eth0")),
            ("the stranger".to_owned(), LinkSocket::open(&self.containers[2], "eth0")),
            ("the outside".to_owned(), LinkSocket::open(&self.scene.net.client, "eth0")),
        ];
        let listed = self.host.ip(&["-o", "link", "show", "type", "bridge"]);
        for bridge in
            listed.lines().filter_map(|line| line.split(": ").nth(1)).filter(|name| name.starts_with("tg-"))
        {
            all.push((bridge.to_owned(), LinkSocket::open(&self.host, bridge)));
        }
        assert_eq!(all.len(), 5, "{listed}");
        all
    }

    /// The frames that guards have dropped, by endpoint and reason, as a scrape shows them.
    fn dropped(&self) -> Vec<(String, u64)> {
        let url = format!("http://{METRICS}/metrics");
        let page = self.scene.net.host.exec("curl", &["-sS", "--max-time", "5", &url]);
        let lines =
            page.lines().filter_map(|line| line.strip_prefix("tidegate_network_spoofed_frames_total"));
        let counts = lines.map(|line| {
            let (labels, count) = line.rsplit_once(' ').unwrap();
            (labels.to_owned(), count.parse().unwrap())
        });
        counts.collect()
    }

    /// What forged frames got to, and how many.
    fn leaks(&self, count: usize) -> Vec<String> {
        let mut forger = self.forger();
        let sender = LinkSocket::open(&self.containers[0], "eth0");
        let receivers = self.receivers();
        let mut leaks = Vec::new();
        for kind in KINDS {
            let mut sent = HashSet::new();
            let mut take = |sent: &HashSet<Vec<u8>>| {
                for (place, receiver) in &receivers {
                    let forged = |frame: &Vec<u8>| {
                        sent.contains(frame) || frame.windows(MARKER.len()).any(|part| part == MARKER)
                    };
                    let count = receiver.received().iter().filter(|frame| forged(frame)).count();
                    if count > 0 {
                        leaks.push(format!("{kind}: {count} at {place}"));
                    }
                }
            };
            for number in 0..count {
                let frame = forger.frame(kind);
                sender.send(&frame);
                sent.insert(frame);
                if number % 512 == 0 {
                    take(&sent);
                }
            }
            thread::sleep(Duration::from_millis(100));
            take(&sent);
        }
        leaks
    }

    /// Forged frames get nowhere and are counted; nothing else was dropped before.
    #[track_caller]
    fn holds(&self, counts: bool) {
        self.talks();
        assert!(self.dropped().iter().all(|(_, count)| *count == 0), "{:?}", self.dropped());
        assert_eq!(self.leaks(COUNT), [""; 0]);
        let dropped = self.dropped();
        let of = |service: &str| -> u64 {
            let label = format!("endpoint=\"{service}\"");
            dropped.iter().filter(|(labels, _)| labels.contains(&label)).map(|(_, count)| count).sum()
        };
        let expected = if counts { (KINDS.len() * COUNT) as u64 } else { 0 };
        assert_eq!([of("hostile"), of("neighbor"), of("stranger")], [expected, 0, 0], "{dropped:?}");
        self.talks();
    }

    /// The containers of the network reach each other and their gateway.
    #[track_caller]
    fn talks(&self) {
        for to in ["10.77.1.8", "fd77:1::8", "10.77.1.1", "fd77:1::1"] {
            let answers = || {
                let mut ping = self.containers[0].command("ping");
                ping.args(["-c", "1", "-W", "1", to]).output().unwrap().status.success()
            };
            assert!(eventually(SOON, answers), "{to}");
        }
    }
}

#[test]
fn forged_frames_of_a_container_reach_nobody_in_any_mode() {
    for firewall in ["none", "nftables", "iptables"] {
        Project::as_root(firewall, "").holds(true);
    }
}

#[test]
fn forged_frames_reach_nobody_whichever_mechanism_the_guard_has() {
    Project::as_root("nftables", "tcx").holds(true);
    Project::as_root("none", "bpf-guards").holds(true);
    Project::as_root("iptables", "bpf-guards,netdev-guards").holds(false);
}

#[test]
fn forged_frames_reach_nobody_in_the_networks_of_an_ordinary_user() {
    Project::as_nobody("").holds(true);
    Project::as_nobody("netdev-guards").holds(false);
}

/// Or the others would hold for want of an attack.
#[test]
fn without_a_guard_forged_frames_reach_the_neighbor_and_it_is_said() {
    let project = Project::as_root("none", "bpf-guards,netdev-guards,classic-guards");
    project._up.wait_for_line("what containers send is not checked", SOON);
    let leaks = project.leaks(200);
    for kind in KINDS {
        assert!(
            leaks.iter().any(|leak| leak.starts_with(kind) && leak.contains("the neighbour")),
            "{leaks:?}"
        );
    }
    assert!(!leaks.iter().any(|leak| leak.contains("the stranger")), "networks are apart: {leaks:?}");
    let doctor = project.scene.tidegate().args(["doctor"]).output().unwrap();
    let told = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(told.contains("of their gateway") && told.contains("port-guards"), "{told}");
}

/// It comes back in another namespace with the addresses it had.
#[test]
fn a_container_that_comes_back_is_guarded_again_and_loses_no_frame() {
    let scene = Scene::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hostile");
    let link = |namespace: &Namespace| {
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(namespace.path(), &path).unwrap();
    };
    let (old, new) = (Namespace::new(), Namespace::new());
    link(&old);
    let others = [Namespace::new(), Namespace::new()];
    let adopted = |path: &Path| format!("x-netns: {}", path.display());
    let file = FILE
        .replace("RUN_HOSTILE", &adopted(&path))
        .replace("RUN_NEIGHBOR", &adopted(&others[0].path()))
        .replace("RUN_STRANGER", &adopted(&others[1].path()));
    let up = bring_up(&scene, scene.tidegate(), &file, &[]);
    up.wait_for_line("Ctrl-C takes", SOON);
    link(&new);
    assert!(eventually(SOON, || new.ip(&["-o", "addr"]).contains("10.77.1.7/24")));
    let [neighbor, stranger] = others;
    let host = scene.net.host.clone();
    let project = Project { scene, containers: [new, neighbor, stranger], host, _up: up };
    project.holds(true);
}
