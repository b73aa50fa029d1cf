//! Root in a container sends raw frames with spoofed addresses. No frame arrives, in any mode and
//! with any mechanism of port guards. Frames of an unmodified kernel are not dropped.

use super::scene::{Scene, rootless_namespace, service_namespace};
use std::collections::HashSet;
use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;
use tidegate_testbed::frames::{Forger, KINDS, LinkSocket, MARKER, Mac, arp, ethernet, udp4};
use tidegate_testbed::{Namespace, Process, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Number of frames per kind.
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

/// Starts to bring `file` up with the command `tidegate`, with metrics.
fn bring_up(scene: &Scene, mut tidegate: Command, file: &str, flags: &[&str]) -> Process {
    let path = scene.directory.path().join("compose.yaml");
    fs::write(&path, file).unwrap();
    Process::spawn(tidegate.arg("up").arg("-f").arg(path).args(["--metrics", METRICS]).args(flags))
}

/// A project with its containers and the namespace of its bridges (`host`).
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
        let address =
            self.containers[0].run(|| fs::read_to_string("/proc/thread-self/net/if_inet6"));
        let address = address.unwrap();
        let link_local =
            address.lines().find(|line| line.starts_with("fe80")).expect("a link-local address");
        let link_local = u128::from_str_radix(&link_local[..32], 16).unwrap().into();
        let listed = self.containers[0].ip(&["-o", "link", "show", "eth0"]);
        let mac = mac_of(link_layer_address(&listed));
        Forger {
            mac,
            own: ("10.77.1.7".parse().unwrap(), "fd77:1::7".parse().unwrap()),
            link_local,
            gateway: ("10.77.1.1".parse().unwrap(), "fd77:1::1".parse().unwrap()),
            neighbor: ("10.77.1.8".parse().unwrap(), "fd77:1::8".parse().unwrap()),
            seed: 7,
        }
    }

    /// All possible receivers: neighbour, other network, bridges and the external client.
    fn receivers(&self) -> Vec<(String, LinkSocket)> {
        let mut all = vec![
            ("the neighbour".to_owned(), LinkSocket::open(&self.containers[1], "eth0")),
            ("the stranger".to_owned(), LinkSocket::open(&self.containers[2], "eth0")),
            ("the outside".to_owned(), LinkSocket::open(&self.scene.net.client, "eth0")),
        ];
        let listed = self.host.ip(&["-o", "link", "show", "type", "bridge"]);
        for bridge in listed
            .lines()
            .filter_map(|line| line.split(": ").nth(1))
            .filter(|name| name.starts_with("tg-"))
        {
            all.push((bridge.to_owned(), LinkSocket::open(&self.host, bridge)));
        }
        assert_eq!(all.len(), 5, "{listed}");
        all
    }

    /// The frames that guards have dropped, by endpoint and reason, from the metrics.
    fn dropped(&self) -> Vec<(String, u64)> {
        let url = format!("http://{METRICS}/metrics");
        let page = self.scene.net.host.exec("curl", &["-sS", "--max-time", "5", &url]);
        let lines = page
            .lines()
            .filter_map(|line| line.strip_prefix("tidegate_network_spoofed_frames_total"));
        let counts = lines.map(|line| {
            let (labels, count) = line.rsplit_once(' ').unwrap();
            (labels.to_owned(), count.parse().unwrap())
        });
        counts.collect()
    }

    /// The receivers that spoofed frames have reached, each with the kind and number of frames.
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
                        sent.contains(frame)
                            || frame.windows(MARKER.len()).any(|part| part == MARKER)
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

    /// Asserts that spoofed frames are dropped and that no other frames are. `counts` is whether
    /// the mechanism counts dropped frames.
    #[track_caller]
    fn assert_guarded(&self, counts: bool) {
        self.assert_connectivity();
        assert!(self.dropped().iter().all(|(_, count)| *count == 0), "{:?}", self.dropped());
        assert_eq!(self.leaks(COUNT), [""; 0]);
        let dropped = self.dropped();
        let of = |service: &str| -> u64 {
            let label = format!("endpoint=\"{service}\"");
            dropped
                .iter()
                .filter(|(labels, _)| labels.contains(&label))
                .map(|(_, count)| count)
                .sum()
        };
        let expected = if counts { (KINDS.len() * COUNT) as u64 } else { 0 };
        assert_eq!(
            [of("hostile"), of("neighbor"), of("stranger")],
            [expected, 0, 0],
            "{dropped:?}"
        );
        self.assert_connectivity();
    }

    /// Asserts that containers of the network reach each other and their gateway.
    #[track_caller]
    fn assert_connectivity(&self) {
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
fn spoofed_frames_are_dropped_in_all_modes() {
    for firewall in ["none", "nftables", "iptables"] {
        Project::as_root(firewall, "").assert_guarded(true);
    }
}

#[test]
fn spoofed_frames_are_dropped_by_all_mechanisms() {
    Project::as_root("nftables", "clsact").assert_guarded(true);
    Project::as_root("none", "bpf-guards").assert_guarded(true);
    Project::as_root("iptables", "bpf-guards,netdev-guards").assert_guarded(false);
}

#[test]
fn spoofed_frames_are_dropped_rootless() {
    Project::as_nobody("").assert_guarded(true);
    Project::as_nobody("netdev-guards").assert_guarded(false);
}

/// Counter-test: the tests above do exercise an attack.
#[test]
fn without_a_guard_spoofed_frames_arrive_and_a_warning_is_logged() {
    let project = Project::as_root("none", "bpf-guards,netdev-guards,classic-guards");
    project._up.wait_for_line("source addresses of containers are not checked", SOON);
    project._up.wait_for_line("run a kernel with CONFIG_NF_TABLES_NETDEV", SOON);
    let leaks = project.leaks(200);
    for kind in KINDS {
        assert!(
            leaks.iter().any(|leak| leak.starts_with(kind) && leak.contains("the neighbour")),
            "{leaks:?}"
        );
    }
    assert!(
        !leaks.iter().any(|leak| leak.contains("the stranger")),
        "networks are isolated: {leaks:?}"
    );
    let doctor = project.scene.tidegate().args(["doctor"]).output().unwrap();
    let printed = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(printed.contains("of their gateway") && printed.contains("port-guards"), "{printed}");
}

/// A bridge delivers frames to link-local group addresses (01:80:c2:00:00:0x) at its port. A packet
/// in such a frame would arrive on an interface that the bridge's guards do not cover. Without port
/// guards, sysctls of the port drop it. The bridge itself receives frames to 01:80:c2:00:00:00
/// while it runs no spanning tree, so its guards apply to them.
#[test]
fn frames_to_link_control_addresses_do_not_reach_the_host() {
    const NETWORKS: &str = r#"
name: links
networks:
  front: { ipam: { config: [ { subnet: 10.77.1.0/24 } ] } }
  back: { internal: true, ipam: { config: [ { subnet: 10.77.2.0/24 } ] } }
services:
  other: { x-netns: OTHER, networks: { front: { ipv4_address: 10.77.1.10 } }, ports: [ "8080:80/udp" ] }
  isolated: { x-netns: ISOLATED, networks: { back: { ipv4_address: 10.77.2.10 } } }
  router: { x-netns: ROUTER, networks: { back: { ipv4_address: 10.77.2.11, x-any-source: true } } }
"#;
    for lacks in ["", "bpf-guards,netdev-guards,classic-guards"] {
        let scene = Scene::lacking(lacks);
        let (_up, [other, isolated, router]) = scene.up_with_services(
            NETWORKS,
            ["other", "isolated", "router"],
            false,
            &["--firewall=none"],
        );
        let host = scene.net.host.run(|| UdpSocket::bind("0.0.0.0:5555")).unwrap();
        let served = other.run(|| UdpSocket::bind("0.0.0.0:80")).unwrap();
        for socket in [&host, &served] {
            socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        }
        let received = |socket: &UdpSocket| {
            let mut buffer = [0; 100];
            std::iter::from_fn(|| {
                socket.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec())
            })
            .count()
        };
        let bridges = scene.net.host.ip(&["-o", "link", "show", "type", "bridge"]);
        let bridge = bridges.lines().find(|line| line.contains("tg-back")).unwrap();
        let gateway = mac_of(link_layer_address(bridge));
        for (member, own) in [(&isolated, "10.77.2.10"), (&router, "10.77.2.11")] {
            let own = own.parse().unwrap();
            let mac = mac_of(link_layer_address(&member.ip(&["-o", "link", "show", "eth0"])));
            let link = LinkSocket::open(member, "eth0");
            let send = |destination: Mac, to: &str, port: u16| {
                let packet = udp4((own, 4000), (to.parse().unwrap(), port), MARKER);
                link.send(&ethernet(destination, mac, 0x0800, &packet));
            };
            send(gateway, "10.77.2.1", 5555);
            assert_eq!(received(&host), 1, "its own gateway answers");
            for last in 0..16 {
                let group = [0x01, 0x80, 0xc2, 0, 0, last];
                for to in ["203.0.113.1", "10.77.1.1", "10.77.2.1"] {
                    // The bridge receives this one, for its own gateway.
                    if (last, to) != (0, "10.77.2.1") {
                        send(group, to, 5555);
                    }
                    send(group, to, 8080);
                }
            }
            assert_eq!(received(&host), 0, "the host's own services: {lacks}");
            assert_eq!(received(&served), 0, "published ports: {lacks}");

            link.received();
            for target in ["203.0.113.1", "10.77.1.1", "10.77.2.1"] {
                link.send(&arp(1, mac, own, target.parse().unwrap()));
            }
            thread::sleep(Duration::from_millis(300));
            let replies: Vec<[u8; 4]> = link
                .received()
                .iter()
                .filter(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2])
                .map(|frame| frame[28..32].try_into().unwrap())
                .collect();
            assert_eq!(replies, [[10, 77, 2, 1]], "addresses that ARP tells: {lacks}");
        }
    }
}

/// The MAC address in a line of `ip -o link`.
pub(super) fn link_layer_address(listed: &str) -> &str {
    listed.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap()
}

pub(super) fn mac_of(text: &str) -> Mac {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// The container returns in another namespace with the same addresses.
#[test]
fn a_restarted_container_is_guarded_again_and_loses_no_frame() {
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
    project.assert_guarded(true);
}
