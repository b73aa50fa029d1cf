//! Conntrack entries that a neighbour of the host plants while no rules protect a network. The host
//! forwards, and translates for others.

use super::scene::Scene;
use super::spoofing::{link_layer_address, mac_of};
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread;
use std::time::Duration;
use tidegate_testbed::frames::{LinkSocket, ethernet, udp4};
use tidegate_testbed::{Namespace, Process, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);
const CONTAINER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 50);
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
/// The firewall, and the features that are disabled. Other software cannot flush owned tables.
const MODES: [(&str, &str); 2] =
    [("--firewall=iptables", ""), ("--firewall=nftables", "owned-tables")];

/// A neighbour that forges packets of the container to itself. Those that the host translates come
/// back, and have left a conntrack entry.
struct Planter {
    link: LinkSocket,
    macs: [[u8; 6]; 2],
    socket: UdpSocket,
}

impl Planter {
    fn new(scene: &Scene) -> Self {
        let mac = |namespace: &Namespace| {
            mac_of(link_layer_address(&namespace.ip(&["-o", "link", "show", "eth0"])))
        };
        let socket = scene.net.client.run(|| UdpSocket::bind((NEIGHBOUR, 5000))).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        Self {
            link: LinkSocket::sender(&scene.net.client, "eth0"),
            macs: [mac(&scene.net.host), mac(&scene.net.client)],
            socket,
        }
    }

    /// Plants an entry. Returns the port of the host that leads to port 80 of the container, or
    /// `None` if the packet has not come back.
    fn plant(&self) -> Option<u16> {
        let forged = udp4((CONTAINER, 80), (NEIGHBOUR, 5000), b"forged");
        self.link.send(&ethernet(self.macs[0], self.macs[1], 0x0800, &forged));
        let (_, from) = self.socket.recv_from(&mut [0; 64]).ok()?;
        (from.ip() != CONTAINER).then(|| from.port())
    }

    /// Plants entries until `over`. The port of the last one is in `planted`.
    fn plant_until(&self, over: &AtomicBool, planted: &AtomicU16) {
        while !over.load(Ordering::Relaxed) {
            self.plant().inspect(|port| planted.store(*port, Ordering::Relaxed));
        }
    }

    fn attack(&self, port: u16) {
        for _ in 0..20 {
            self.socket.send_to(b"attack", ("203.0.113.1", port)).unwrap();
        }
    }
}

/// A scene whose host is the router of an administrator.
fn router(mode: (&str, &str)) -> Scene {
    let scene = Scene::new();
    scene.net.host.sysctl("net.ipv4.ip_forward", "1");
    if mode.0 == "--firewall=iptables" {
        scene.sh("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE");
    } else {
        scene.sh(MASQUERADE);
    }
    scene
}

/// In one transaction, as when a service reads its file of rules again.
const MASQUERADE: &str = "nft 'flush ruleset; add table ip admin;
    add chain ip admin after { type nat hook postrouting priority 100; };
    add rule ip admin after oifname eth0 masquerade'";

fn daemon(scene: &Scene, (firewall, lacks): (&str, &str)) -> Process {
    let mut command = scene.tidegate();
    // Source guards drop what the neighbour plants, before it is tracked.
    command.env("TIDEGATE_LACKS", [lacks, "tcx"].join(",").trim_start_matches(','));
    scene.start_daemon(command, &[firewall])
}

fn create_and_attach(scene: &Scene, namespace: &Namespace) {
    create_and_attach_with(scene, namespace, &[]);
}

fn create_and_attach_with(scene: &Scene, namespace: &Namespace, more: &[&str]) {
    scene.succeeds(&["network", "create", "front", "--subnet", "10.9.0.0/24"]);
    let path = namespace.path();
    let path = path.to_str().unwrap();
    let attach = ["attach", "front", "--name", "web", "--netns", path, "--ip", "10.9.0.50"];
    scene.succeeds(&[&attach, more].concat());
}

/// Asserts that the host reaches `server`, and that nothing of the neighbour has.
fn assert_untouched(scene: &Scene, server: &UdpSocket, what: &str) {
    server.set_read_timeout(Some(SOON)).unwrap();
    let host = scene.net.host.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap();
    host.send_to(b"hello", (CONTAINER, 80)).unwrap();
    let mut buffer = [0; 64];
    let length = server.recv(&mut buffer).unwrap();
    assert_eq!(String::from_utf8_lossy(&buffer[..length]), "hello", "{what}");
}

fn server(container: &Namespace) -> UdpSocket {
    container.run(|| UdpSocket::bind("0.0.0.0:80")).unwrap()
}

/// The rules of `raw` are not the only ones that close the gateway.
#[test]
fn a_kernel_published_port_at_a_gateway_is_closed_without_the_rules_of_raw() {
    let scene = Scene::new();
    scene.net.host.sysctl("net.ipv4.ip_forward", "1");
    scene.net.client.ip(&["route", "add", "10.9.0.0/24", "via", "203.0.113.1"]);
    let mut daemon = scene.daemon(&["--firewall=iptables", "--publish=kernel"]);
    let container = Namespace::new();
    create_and_attach_with(&scene, &container, &["-p", "8080:80/udp"]);
    let server = server(&container);
    daemon.stop(Signal::KILL, SOON);
    scene.sh("iptables -t raw -F");
    let client = scene.net.client.run(|| UdpSocket::bind((NEIGHBOUR, 5000))).unwrap();
    client.send_to(b"at the gateway", "10.9.0.1:8080").unwrap();
    // Without a daemon, the kernel still translates the port of the host.
    client.send_to(b"hello", "203.0.113.1:8080").unwrap();
    assert_untouched(&scene, &server, "gateway");
}

#[test]
fn entries_from_before_a_network_grant_no_access() {
    for mode in MODES {
        let scene = router(mode);
        let planter = Planter::new(&scene);
        let _daemon = daemon(&scene, mode);
        scene.succeeds(&["network", "create", "other", "--subnet", "10.8.0.0/24"]);
        let port = (0..500).find_map(|_| planter.plant()).expect("the host translates for others");
        let container = Namespace::new();
        create_and_attach(&scene, &container);
        let server = server(&container);
        planter.attack(port);
        assert_untouched(&scene, &server, &format!("{mode:?}, a new network"));
    }
}

/// Also when the network existed before: without its bridge, a strict reverse path filter accepts
/// the forged source.
#[test]
fn entries_from_the_removal_of_a_network_grant_no_access_to_the_next() {
    for mode in MODES {
        let scene = router(mode);
        scene.net.host.sysctl("net.ipv4.conf.all.rp_filter", "1");
        scene.net.host.ip(&["route", "replace", "default", "via", "203.0.113.9"]);
        let planter = Planter::new(&scene);
        let _daemon = daemon(&scene, mode);
        scene.succeeds(&["network", "create", "other", "--subnet", "10.8.0.0/24"]);
        let container = Namespace::new();
        create_and_attach(&scene, &container);
        let (planted, over) = (AtomicU16::new(0), AtomicBool::new(false));
        thread::scope(|threads| {
            threads.spawn(|| planter.plant_until(&over, &planted));
            scene.succeeds(&["detach", "web"]);
            scene.succeeds(&["network", "rm", "front"]);
            thread::sleep(Duration::from_millis(500));
            create_and_attach(&scene, &container);
            over.store(true, Ordering::Relaxed);
        });
        let server = server(&container);
        assert_ne!(planted.load(Ordering::Relaxed), 0, "{mode:?}: planted in between");
        planter.attack(planted.into_inner());
        assert_untouched(&scene, &server, &format!("{mode:?}, a network created again"));
    }
}

/// Other software removes the rules. Flows that began before continue.
#[test]
fn entries_from_a_time_without_rules_end_with_the_repair() {
    for mode in MODES {
        let scene = router(mode);
        let planter = Planter::new(&scene);
        let _daemon = daemon(&scene, mode);
        let container = Namespace::new();
        create_and_attach(&scene, &container);
        let server = server(&container);
        let outside = scene.net.client.run(|| UdpSocket::bind((NEIGHBOUR, 6000))).unwrap();
        outside.set_read_timeout(Some(SOON)).unwrap();
        let client = container.run(|| UdpSocket::bind("10.9.0.50:7000")).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.send_to(b"question", (NEIGHBOUR, 6000)).unwrap();
        let (_, mapped) = outside.recv_from(&mut [0; 64]).unwrap();
        // The rules are known to be in force up to the last tick, of one per second.
        thread::sleep(Duration::from_secs(4));
        assert_eq!(planter.plant(), None, "{mode:?}");
        let (planted, over) = (AtomicU16::new(0), AtomicBool::new(false));
        thread::scope(|threads| {
            threads.spawn(|| planter.plant_until(&over, &planted));
            let (flush, list) = match mode.0 {
                "--firewall=iptables" => (
                    "for t in raw mangle filter; do iptables -t $t -F; done".to_owned(),
                    "iptables-save",
                ),
                _ => (MASQUERADE.to_owned(), "nft list ruleset"),
            };
            let listed = || scene.net.host.exec("sh", &["-c", list]);
            let are_restored = || listed().contains("access to a container or gateway");
            // The rules can be back before a forged packet arrives.
            for _ in 0..20 {
                scene.sh(&flush);
                assert!(eventually(SOON, are_restored), "{mode:?}");
                if planted.load(Ordering::Relaxed) != 0 {
                    break;
                }
            }
            // The entries are deleted after the rules are in force.
            thread::sleep(Duration::from_millis(500));
            over.store(true, Ordering::Relaxed);
        });
        assert_ne!(
            planted.load(Ordering::Relaxed),
            0,
            "{mode:?}: planted while rules were missing"
        );
        planter.attack(planted.into_inner());
        assert_untouched(&scene, &server, &format!("{mode:?}, repaired rules"));
        let continues = eventually(SOON, || {
            outside.send_to(b"answer", mapped).unwrap();
            client.recv(&mut [0; 64]).is_ok_and(|length| length == 6)
        });
        assert!(continues, "{mode:?}: an earlier flow");
    }
}
