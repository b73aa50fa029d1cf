//! Objects removed by other software or by processes of a container are restored, logged once and
//! counted.

use super::matrix::peer_as_seen;
use super::scene::{Scene, rootless_namespace, service_namespace};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tidegate_testbed::server::{PeerServer, Source};
use tidegate_testbed::transfer::{self, Transfer};
use tidegate_testbed::{Namespace, Process, eventually};

const SOON: Duration = Duration::from_secs(10);

/// Maximum repair time. It is 1 s on an idle machine, but tests run concurrently.
const BOUND: Duration = Duration::from_secs(3);

/// Bytes of a transfer that is not complete when the device is deleted.
const MUCH: u64 = 500 << 20;

const FILE: &str = r#"
name: repairs
networks:
  home:
    enable_ipv6: true
    driver_opts: { com.docker.network.bridge.name: tg-home }
    ipam: { config: [ { subnet: 10.83.1.0/24 }, { subnet: "fd83:1::/64" } ] }
  second:
    driver_opts: { com.docker.network.bridge.name: tg-second }
    ipam: { config: [ { subnet: 10.83.2.0/24 } ] }
services:
  box:
    command: [ sleep, "600" ]
    networks: { home: { ipv4_address: 10.83.1.2, ipv6_address: "fd83:1::2" } }
    ports: [ "8080:80", "8080:80/udp" ]
"#;

/// The namespace in which an object is removed.
#[derive(Clone, Copy, Debug)]
enum Place {
    Host,
    Inside,
}

use Place::{Host, Inside};

struct Bed {
    scene: Scene,
    up: Process,
    /// The namespace of the bridges.
    networks: Namespace,
    boxed: Namespace,
    _servers: Vec<PeerServer>,
}

impl Bed {
    /// Removes the address of the container. Returns the repair time.
    #[track_caller]
    fn address_repair_time(&self) -> Duration {
        let removed = Instant::now();
        self.boxed.ip(&["addr", "del", "10.83.1.2/24", "dev", "eth0"]);
        let is_back = || self.boxed.ip(&["addr", "show", "eth0"]).contains("10.83.1.2");
        assert!(eventually(SOON, is_back), "{}", self.up.output());
        removed.elapsed()
    }

    fn new(flags: &[&str]) -> Self {
        Self::on(Scene::new(), flags)
    }

    fn on(scene: Scene, flags: &[&str]) -> Self {
        let command = scene.tidegate();
        Self::start(scene, command, FILE, flags, |scene, _| scene.net.host.clone())
    }

    /// Starts the project with further `services` in the Compose file.
    fn with_services(services: &str, flags: &[&str]) -> Self {
        let scene = Scene::new();
        let command = scene.tidegate();
        let file = format!("{FILE}{services}");
        Self::start(scene, command, &file, flags, |scene, _| scene.net.host.clone())
    }

    fn rootless() -> Self {
        let scene = Scene::new().with_open_tun();
        let command = scene.tidegate_as_nobody();
        Self::start(scene, command, FILE, &[], |scene, up| rootless_namespace(up, &scene.net.host))
    }

    fn start(
        scene: Scene,
        mut command: Command,
        file: &str,
        flags: &[&str],
        networks: impl Fn(&Scene, &Process) -> Namespace,
    ) -> Self {
        let path = scene.directory.path().join("compose.yaml");
        let file = file.replace("DIRECTORY", scene.directory.path().to_str().unwrap());
        fs::write(&path, file).unwrap();
        command.arg("up").arg("-f").arg(path).args(["--metrics", "127.0.0.1:9464"]).args(flags);
        let up = Process::spawn(&mut command);
        up.wait_for_line("Ctrl-C takes", SOON);
        let boxed = service_namespace(&up, "box");
        let at: SocketAddr = "[::]:80".parse().unwrap();
        let servers = vec![PeerServer::tcp(&boxed, at), PeerServer::udp(&boxed, at)];
        let networks = networks(&scene, &up);
        let bed = Self { scene, up, networks, boxed, _servers: servers };
        assert!(eventually(SOON, || bed.carries_traffic(SOON)), "before anything is removed");
        bed
    }

    /// Whether published TCP and UDP ports, direct connections from the host and DNS all work.
    fn carries_traffic(&self, timeout: Duration) -> bool {
        let host = |to: &str, udp| {
            let to = to.parse().unwrap();
            self.scene.net.client.run(|| peer_as_seen(to, udp, timeout)).is_ok()
        };
        let direct = |to: &str| {
            let to = to.parse().unwrap();
            self.networks.run(|| peer_as_seen(to, false, timeout)).is_ok()
        };
        let failed = [
            ("direct IPv4", direct("10.83.1.2:80")),
            ("direct IPv6", direct("[fd83:1::2]:80")),
            ("published TCP", host("203.0.113.1:8080", false)),
            ("published UDP", host("203.0.113.1:8080", true)),
            ("DNS over UDP", self.resolves("+notcp")),
            ("DNS over TCP", self.resolves("+tcp")),
        ];
        let failed: Vec<_> =
            failed.iter().filter(|(_, works)| !works).map(|(what, _)| what).collect();
        if !failed.is_empty() {
            eprintln!("{failed:?}");
        }
        failed.is_empty()
    }

    fn resolves(&self, over: &str) -> bool {
        let mut dig = self.boxed.command("dig");
        dig.args(["@127.0.0.11", "+short", "+tries=1", "+time=1", over, "box"]);
        let output = dig.output().unwrap();
        String::from_utf8_lossy(&output.stdout).contains("10.83.1.2")
    }

    fn run(&self, place: Place, script: &str) -> bool {
        let namespace = match place {
            Host => &self.networks,
            Inside => &self.boxed,
        };
        let mut sh = namespace.command("sh");
        sh.args(["-ec", script]).env("PATH", self.scene.path());
        sh.env("VETH", self.link("tgv")).env("TUN", self.link("tgt-"));
        let output = sh.output().unwrap();
        if !output.stderr.is_empty() {
            eprintln!("{script}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        output.status.success()
    }

    /// Name of the first link with `prefix`, or an empty string.
    fn link(&self, prefix: &str) -> String {
        let links = self.networks.ip(&["-o", "link", "show"]);
        let link = links.split_whitespace().find(|word| word.starts_with(prefix));
        link.and_then(|link| link.split(['@', ':']).next()).unwrap_or_default().to_owned()
    }

    fn count(&self, kind: &str) -> u64 {
        let page = self
            .scene
            .net
            .host
            .exec("curl", &["-sS", "--max-time", "5", "http://127.0.0.1:9464/metrics"]);
        let series = format!("tidegate_network_repairs_total{{kind=\"{kind}\"}} ");
        let value = page.lines().find_map(|line| line.strip_prefix(series.as_str()));
        value.unwrap_or_else(|| panic!("no {series} in\n{page}")).parse().unwrap()
    }

    fn logged(&self, kind: &str) -> usize {
        let log = self.up.output();
        let of = |line: &&str| {
            line.contains("other software; restored") && line.contains(&format!("kind=\"{kind}\""))
        };
        log.lines().filter(of).count()
    }

    /// Removes an object with `script` and asserts that it is restored: `check` succeeds while the
    /// object exists.
    #[track_caller]
    fn assert_repair(&self, kind: &str, place: Place, script: &str, check: &str) {
        let logged = self.logged(kind);
        self.assert_repeated_repair(kind, place, script, check);
        assert_eq!(self.logged(kind), logged + 1, "{script}\n{}", self.up.output());
    }

    /// Like [`Self::assert_repair`], for a kind that was logged within the last minute and is
    /// therefore not logged again.
    #[track_caller]
    fn assert_repeated_repair(&self, kind: &str, place: Place, script: &str, check: &str) {
        let counted = self.count(kind);
        assert!(self.run(place, check), "{check} before {script}");
        let removed = Instant::now();
        assert!(self.run(place, script), "{script}");
        let is_back = eventually(SOON, || self.run(place, check));
        let object = removed.elapsed();
        let log = || self.up.output();
        assert!(is_back, "{script}: {check}\n{}", log());
        let carries = eventually(SOON, || self.carries_traffic(Duration::from_secs(1)));
        let traffic = removed.elapsed();
        eprintln!("{kind:9} {object:>8.0?} {traffic:>8.0?}  {place:?}: {script}");
        assert!(carries, "no traffic after {script}\n{}", log());
        assert!(object < BOUND, "{script} took {object:?}");
        assert!(
            eventually(SOON, || self.count(kind) == counted + 1),
            "{script}: {} times\n{}",
            self.count(kind),
            log()
        );
    }
}

#[test]
fn every_kind_of_object_is_restored_logged_once_and_counted() {
    let bed = Bed::new(&["--firewall=none"]);
    let up = |name: &str| format!("ip link show {name} | grep -q ,UP");
    bed.assert_repair("bridge", Host, "ip link del tg-home", &up("tg-home"));
    bed.assert_repair("link", Host, "ip link set tg-home down", &up("tg-home"));
    bed.assert_repair("veth", Inside, "ip link del eth0", &up("eth0"));
    bed.assert_repeated_repair(
        "veth",
        Host,
        "ip link del $VETH",
        "ip -o link | grep tgv | grep -q ,UP",
    );
    bed.assert_repair("link", Inside, "ip link set eth0 down", &up("eth0"));
    bed.assert_repair(
        "port",
        Host,
        "ip link set $VETH nomaster",
        "ip link show $VETH | grep -q 'master tg-home'",
    );
    let entry = "bridge fdb show br tg-home | grep 'master tg-home static'";
    bed.assert_repair(
        "fdb",
        Host,
        &format!("bridge fdb del $({entry} | cut -d' ' -f1) dev $VETH master static"),
        entry,
    );
    for (address, link, place) in [
        ("10.83.1.1/24", "tg-home", Host),
        ("10.83.1.2/24", "eth0", Inside),
        ("127.0.0.1/8", "lo", Inside),
    ] {
        let check = format!("ip addr show {link} | grep -q {address}");
        bed.assert_repair("address", place, &format!("ip addr del {address} dev {link}"), &check);
    }
    bed.assert_repair(
        "route",
        Host,
        "ip route del 10.83.1.0/24 dev tg-home",
        "ip route | grep -q '10.83.1.0/24 dev tg-home'",
    );
    bed.assert_repair(
        "route",
        Inside,
        "ip route del default",
        "ip route | grep -q 'default via 10.83.1.1'",
    );
    // One table for TCP, one for UDP.
    let answers = "[ $(ip route show table all | grep -c '^local default dev lo') = 2 ]";
    let table = "$(ip route show table all | grep -m1 '^local default dev lo' | sed 's/.*table //; s/ .*//')";
    bed.assert_repeated_repair("route", Inside, &format!("ip route flush table {table}"), answers);
    let marked = "ip rule | grep -q fwmark";
    bed.assert_repair(
        "rule",
        Inside,
        "ip rule del pref $(ip rule | grep -m1 fwmark | cut -d: -f1)",
        marked,
    );
    let sysctl = |name: &str, others: u8, ours: u8| {
        (format!("sysctl -q {name}={others}"), format!("sysctl -n {name} | grep -qx {ours}"))
    };
    let (set, check) = sysctl("net.ipv6.conf.tg-home.accept_ra", 1, 0);
    bed.assert_repair("sysctl", Host, &set, &check);
    for (name, others, ours) in [
        ("tg-home.arp_ignore", 0, 1),
        ("tg-home.accept_source_route", 1, 0),
        ("$VETH.rp_filter", 0, 1),
        ("$VETH.arp_ignore", 0, 8),
    ] {
        let (set, check) = sysctl(&format!("net.ipv4.conf.{name}"), others, ours);
        bed.assert_repeated_repair("sysctl", Host, &set, &check);
    }
    let (set, check) = sysctl("net.ipv6.conf.eth0.accept_redirects", 1, 0);
    bed.assert_repair("sysctl", Inside, &set, &check);
    let (set, check) = sysctl("net.ipv4.tcp_fwmark_accept", 0, 1);
    bed.assert_repair("sysctl", Inside, &set, &check);
    bed.assert_repair(
        "rule",
        Host,
        "ip rule del from all to 10.83.1.0/24 iif lo",
        "ip rule | grep -q 'to 10.83.1.0/24 iif lo'",
    );
}

/// `ss -K` destroys the sockets. The DNS redirection is removed by deleting or flushing its table.
#[test]
fn destroyed_sockets_are_restored() {
    let bed = Bed::new(&["--firewall=nftables", "--publish=proxy"]);
    // Sockets have no other check than their traffic.
    let answers = "true";
    let destroy = |place, kind: &str, filter: &str| {
        let found = bed.run(place, &format!("ss -Hn{filter} | grep -q ."));
        assert!(found, "no socket: ss -Hn{filter}");
        bed.assert_repair(kind, place, &format!("ss -K -n{filter}"), answers);
    };
    destroy(Host, "listener", "tl4 sport = 8080");
    destroy(Host, "listener", "ul4 sport = 8080");
    destroy(Inside, "dns", "ul4 src 127.0.0.11");
    destroy(Inside, "dns", "tl4 src 127.0.0.11");
    let table = "nft list chain inet tidegate_dns questions | grep -q 'dport set'";
    bed.assert_repair("dns", Inside, "nft delete table inet tidegate_dns", table);
    bed.assert_repeated_repair("dns", Inside, "nft flush table inet tidegate_dns", table);
    let cpu = bed.up.cpu_seconds();
    std::thread::sleep(Duration::from_secs(2));
    let cpu = bed.up.cpu_seconds() - cpu;
    assert!(cpu < 0.5, "{cpu} s of CPU time in 2 s");
}

/// The engine's socket is bound to a port given by number, and so the kernel keeps the binding.
#[test]
fn a_destroyed_socket_of_the_engine_keeps_working() {
    let bed = Bed::new(&["--firewall=none"]);
    assert!(bed.run(Host, "ss -K -nul4 sport = 8080"));
    assert!(
        eventually(SOON, || bed.carries_traffic(Duration::from_secs(1))),
        "{}",
        bed.up.output()
    );
    let cpu = bed.up.cpu_seconds();
    std::thread::sleep(Duration::from_secs(2));
    let cpu = bed.up.cpu_seconds() - cpu;
    assert!(cpu < 0.5, "{cpu} s of CPU time in 2 s");
}

/// Flows and published ports of the engine continue on the new device.
#[test]
fn the_device_of_the_engine_is_restored() {
    for rootless in [false, true] {
        let bed = if rootless { Bed::rootless() } else { Bed::new(&["--firewall=none"]) };
        let _outside = PeerServer::tcp(&bed.scene.net.client, "[::]:81".parse().unwrap());
        let egress = || {
            let to =
                |to: &str| bed.boxed.run(|| peer_as_seen(to.parse().unwrap(), false, SOON)).is_ok();
            to("203.0.113.9:81") && to("[2001:db8:1::9]:81")
        };
        assert!(egress());
        let up = "ip link show $TUN | grep -q ,UP";
        let table = r"$(ip rule | sed -n 's/.*iif tg-home lookup \([0-9]*\).*/\1/p' | head -n1)";
        bed.assert_repair("tun", Host, "ip link del $TUN", up);
        assert!(egress(), "{}", bed.up.output());
        bed.assert_repeated_repair("tun", Host, "ip link set $TUN name elsewhere", up);
        assert!(egress(), "{}", bed.up.output());
        bed.assert_repair("link", Host, "ip link set $TUN down", up);
        for family in ["-4", "-6"] {
            let check =
                format!("ip {family} route show table {table} | grep -q 'default dev tgt-'");
            bed.assert_repair(
                "route",
                Host,
                &format!("ip {family} route del default table {table}"),
                &check,
            );
        }
        bed.assert_repair(
            "sysctl",
            Host,
            "sysctl -q net.ipv4.conf.$TUN.forwarding=0",
            "sysctl -n net.ipv4.conf.$TUN.forwarding | grep -qx 1",
        );
        assert!(egress(), "{}", bed.up.output());
        assert!(
            !bed.networks.ip(&["-o", "link"]).contains("elsewhere"),
            "the renamed device is closed"
        );
    }
}

#[test]
fn a_flow_survives_the_loss_of_the_device() {
    let bed = Bed::new(&["--firewall=none"]);
    let at = "203.0.113.9:82".parse().unwrap();
    let _source = Source::tcp(&bed.scene.net.client, at, 5, MUCH);
    let received = std::thread::scope(|scope| {
        let receives = scope.spawn(|| {
            bed.boxed.run(|| {
                let mut stream = TcpStream::connect(at).unwrap();
                transfer::receive(&mut stream, 5)
            })
        });
        std::thread::sleep(Duration::from_millis(100));
        assert!(bed.run(Host, "ip link del $TUN"));
        receives.join().unwrap()
    });
    assert_eq!(received, Transfer::complete(MUCH), "{}", bed.up.output());
    assert_eq!(bed.count("tun"), 1);
}

/// The device cannot be restored while another interface has its name.
#[test]
fn a_failed_repair_does_not_prevent_others() {
    let bed = Bed::new(&["--firewall=none"]);
    let tun = bed.link("tgt-");
    let replace =
        r"printf 'link set %s name elsewhere\nlink add %s type bridge\n' $TUN $TUN | ip -batch -";
    assert!(bed.run(Host, replace));
    let there = "ip addr show tg-home | grep -q 10.83.1.1/24";
    for _ in 0..2 {
        let counted = bed.count("address");
        let removed = Instant::now();
        assert!(bed.run(Host, "ip addr del 10.83.1.1/24 dev tg-home"));
        assert!(eventually(SOON, || bed.run(Host, there)), "{}", bed.up.output());
        assert!(removed.elapsed() < BOUND, "{:?}", removed.elapsed());
        assert!(eventually(SOON, || bed.count("address") == counted + 1), "{}", bed.up.output());
    }
    let counted = bed.count("tun");
    bed.networks.ip(&["link", "del", &tun]);
    assert!(eventually(SOON, || bed.count("tun") == counted + 1), "{}", bed.up.output());
    assert!(
        eventually(SOON, || bed.carries_traffic(Duration::from_secs(1))),
        "{}",
        bed.up.output()
    );
}

/// Other software changes MAC addresses, and puts a bridge in the place of another one.
#[test]
fn a_changed_mac_address_is_restored_and_a_foreign_bridge_stops_no_repair() {
    for firewall in ["--firewall=none", "--firewall=nftables"] {
        let bed = Bed::with_services(
            r#"
  other:
    command: [ sleep, "600" ]
    networks: { second: { ipv4_address: 10.83.2.2 } }
"#,
            &[firewall],
        );
        let mac = |link: &str| {
            let shown = bed.networks.ip(&["-o", "link", "show", link]);
            shown.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
        };
        let port = bed.networks.ip(&["-o", "link", "show", "master", "tg-home"]);
        let port = port.split(": ").nth(1).unwrap().split('@').next().unwrap().to_owned();
        for link in ["tg-home", &port] {
            let before = mac(link);
            bed.networks.ip(&["link", "set", link, "address", "02:00:00:00:00:55"]);
            assert!(
                eventually(SOON, || mac(link) == before),
                "{firewall} {link}: {}",
                bed.up.output()
            );
            assert!(eventually(SOON, || bed.carries_traffic(SOON)), "{}", bed.up.output());
        }
        // By one program: the repair of a missing bridge begins within milliseconds.
        let foreign = "ip -batch - <<END
link add spare address 02:00:00:00:00:66 type bridge
link set tg-home down
link set tg-home name home0
link set spare name tg-home
link set home0 alias \"\"
END";
        assert!(bed.run(Host, foreign));
        bed.up.wait_for_line("not restored", SOON);
        let there = "ip addr show tg-second | grep -q 10.83.2.1/24";
        let removed = Instant::now();
        assert!(bed.run(Host, "ip addr del 10.83.2.1/24 dev tg-second"));
        assert!(eventually(SOON, || bed.run(Host, there)), "{firewall}: {}", bed.up.output());
        assert!(removed.elapsed() < BOUND, "{:?}", removed.elapsed());
        assert!(!bed.networks.ip(&["addr", "show", "tg-home"]).contains("10.83.1.1"));
        assert!(bed.run(Host, "ip link del tg-home; ip link del home0"));
        let repaired = eventually(SOON * 4, || bed.carries_traffic(Duration::from_secs(1)));
        assert!(repaired, "{firewall}: {}", bed.up.output());
    }
}

/// Other containers are repaired meanwhile.
#[test]
fn an_ended_container_is_not_repaired() {
    let bed = Bed::with_services(
        r#"
  brief:
    command: [ sh, -c, "until [ -e DIRECTORY/end ]; do sleep 0.05; done" ]
    networks: { home: { ipv4_address: 10.83.1.3 } }
"#,
        &["--firewall=none"],
    );
    let brief = service_namespace(&bed.up, "brief");
    let has =
        |namespace: &Namespace, address| namespace.ip(&["addr", "show", "eth0"]).contains(address);
    let remove =
        |namespace: &Namespace, address| namespace.ip(&["addr", "del", address, "dev", "eth0"]);
    remove(&brief, "10.83.1.3/24");
    assert!(eventually(SOON, || has(&brief, "10.83.1.3")), "repaired while it runs");
    fs::write(bed.scene.directory.path().join("end"), "").unwrap();
    let status = || {
        let mut ps = bed.scene.tidegate();
        String::from_utf8(ps.args(["ps", "--json"]).output().unwrap().stdout).unwrap()
    };
    assert!(eventually(SOON, || status().contains("ended")), "{}", status());
    assert!(eventually(SOON, || bed.count("address") == 1));
    remove(&brief, "10.83.1.3/24");
    brief.ip(&["link", "set", "lo", "down"]);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_secs(1));
        remove(&bed.boxed, "10.83.1.2/24");
        assert!(eventually(SOON, || has(&bed.boxed, "10.83.1.2")), "{}", bed.up.output());
    }
    assert!(!has(&brief, "10.83.1.3"), "{}", bed.up.output());
    brief.ip(&["link", "del", "eth0"]);
    std::thread::sleep(Duration::from_secs(2));
    assert!(!brief.ip(&["-o", "link"]).contains("eth0"), "{}", bed.up.output());
    assert!(eventually(SOON, || bed.count("address") == 3), "{}", bed.up.output());
    assert_eq!(bed.count("veth"), 0);
    assert!(!bed.up.output().contains("not restored"), "{}", bed.up.output());
}

/// Root in a container creates a link with the name of its veth end. The link must not get the
/// addresses of the veth end.
#[test]
fn a_foreign_link_with_the_name_of_a_veth_end_is_not_configured() {
    let bed = Bed::new(&["--firewall=none"]);
    let replace = "ip link set eth0 name real; ip link add eth0 type bridge; ip link set eth0 up";
    assert!(bed.run(Inside, replace));
    bed.up.wait_for_line("not restored", SOON);
    std::thread::sleep(Duration::from_secs(2));
    let shown = bed.boxed.ip(&["addr", "show", "eth0"]);
    assert!(!shown.contains("10.83.1.2") && !shown.contains("fd83:1::2"), "{shown}");
    let log = bed.up.output();
    assert_eq!(log.matches("not restored").count(), 1, "{log}");
    let counted = bed.count("veth");
    assert!(bed.run(Inside, "ip link del eth0"));
    assert!(
        eventually(SOON * 4, || bed.carries_traffic(Duration::from_secs(1))),
        "{}",
        bed.up.output()
    );
    assert!(eventually(SOON * 4, || bed.count("veth") == counted + 1), "{}", bed.up.output());
    assert!(!bed.boxed.ip(&["-o", "link"]).contains("real"), "the veth pair is a new one");
}

/// Root in a container creates 20,000 routes and changes them continuously. Repairs of other
/// containers and API requests are not delayed.
#[test]
fn route_changes_of_a_container_do_not_delay_others() {
    const ROUTES: u32 = 20_000;
    let bed = Bed::with_services(
        r#"
  noisy:
    command: [ sleep, "600" ]
    networks: { home: { ipv4_address: 10.83.1.3, ipv6_address: "fd83:1::3" } }
"#,
        &["--firewall=none"],
    );
    let noisy = service_namespace(&bed.up, "noisy");
    noisy.ip_all("link add more type bridge\nlink set more up");
    let routes = bed.scene.directory.path().join("routes");
    let lines = (0..ROUTES)
        .map(|at| format!("route add 11.{}.{}.0/24 dev more proto kernel\n", at / 256, at % 256));
    fs::write(&routes, lines.collect::<String>()).unwrap();
    let routes = routes.to_str().unwrap();
    noisy.ip(&["-batch", routes]);
    // Each change causes a check of the namespace. The script also deletes the container's address.
    let changes = "while :; do ip route del 11.0.0.0/24; ip route add 11.0.0.0/24 dev more proto kernel; \
                   ip addr del 10.83.1.3/24 dev eth0; done 2>/dev/null";
    let mut changes =
        noisy.command("sh").args(["-c", changes]).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let mut times = Vec::new();
    for _ in 0..5 {
        times.push(bed.address_repair_time());
        let asked = Instant::now();
        let mut curl = bed.scene.net.host.command("curl");
        curl.args(["-sS", "--max-time", "5", "-X", "PUT", "--unix-socket"]).arg(bed.scene.socket());
        curl.args(["-H", "content-type: application/json", "-d", r#"{"netns":"/nowhere"}"#]);
        let answer = curl.arg("http://localhost/v1/endpoints/box/namespace").output().unwrap();
        assert!(answer.status.success());
        eprintln!(
            "restored in {:?}, order answered in {:?}",
            times[times.len() - 1],
            asked.elapsed()
        );
        assert!(asked.elapsed() < BOUND);
        std::thread::sleep(Duration::from_millis(500));
    }
    changes.kill().unwrap();
    changes.wait().unwrap();
    times.sort_unstable();
    assert!(times[2] < Duration::from_secs(1), "{times:?}");
    assert!(times[4] < BOUND, "{times:?}");
}

/// Root in a container creates 50,000 nftables chains, runs transactions continuously, and causes
/// permanent checks of its namespace. This delays only its own repairs, not those of others, DNS or
/// the API.
#[test]
fn chains_of_a_container_do_not_delay_others() {
    const CHAINS: u32 = 50_000;
    const QUICK: Duration = Duration::from_millis(500);
    let bed = Bed::with_services(
        r#"
  noisy:
    command: [ sleep, "600" ]
    networks: { home: { ipv4_address: 10.83.1.3 } }
    ports: [ "8081:80" ]
"#,
        &["--firewall=none"],
    );
    let noisy = service_namespace(&bed.up, "noisy");
    let batch = |name: &str, head: &str, chains: u32| {
        let path = bed.scene.directory.path().join(name);
        let chains = (0..chains).map(|at| format!("add chain inet {name} c{at}\n"));
        fs::write(&path, format!("{head}{}", chains.collect::<String>())).unwrap();
        path.to_str().unwrap().to_owned()
    };
    noisy.exec("nft", &["-f", &batch("many", "add table inet many\n", CHAINS)]);
    let head = "add table inet churn\ndelete table inet churn\nadd table inet churn\n";
    let churn = batch("churn", head, CHAINS / 5);
    let start = |script: &str| {
        let mut sh = noisy.command("sh");
        sh.args(["-c", script]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut attacks = [
        start("while :; do ip addr add 10.99.0.1/32 dev lo; ip addr del 10.99.0.1/32 dev lo; done"),
        start(&format!("while :; do nft -f {churn}; done")),
    ];
    std::thread::sleep(Duration::from_secs(1));
    let socket = bed.scene.socket();
    let api = std::thread::spawn(move || {
        worst_of_50(|| {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(b"GET /v1/endpoints HTTP/1.1\r\nhost: tidegate\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        })
    });
    let names = bed.boxed.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect("127.0.0.11:53").unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        worst_of_50(|| {
            socket.send(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03box\0\0\x01\0\x01").unwrap();
            let mut answer = [0; 512];
            let length = socket.recv(&mut answer).unwrap();
            assert!(answer[..length].ends_with(&[10, 83, 1, 2]), "{:?}", &answer[..length]);
        })
    });
    let api = api.join().unwrap();
    let mut repairs = Vec::new();
    for _ in 0..5 {
        repairs.push(bed.address_repair_time());
        std::thread::sleep(Duration::from_millis(300));
    }
    repairs.sort_unstable();
    let removed = Instant::now();
    noisy.exec("nft", &["delete", "table", "inet", "tidegate_dns"]);
    let is_back = || {
        let mut list = noisy.command("nft");
        list.args(["list", "chain", "inet", "tidegate_dns", "questions"]).stderr(Stdio::null());
        String::from_utf8(list.output().unwrap().stdout).unwrap().contains("dport set")
    };
    assert!(eventually(SOON * 3, is_back), "{}", bed.up.output());
    let own = removed.elapsed();
    for attack in &mut attacks {
        attack.kill().unwrap();
        attack.wait().unwrap();
    }
    eprintln!(
        "worst of 50: name {names:.0?}, API {api:.0?}; address of another container restored in \
         {repairs:.0?}, its own redirect in {own:.0?}"
    );
    assert!(names < QUICK, "names: {names:?}");
    assert!(api < QUICK, "API: {api:?}");
    assert!(repairs[2] < Duration::from_secs(1), "{repairs:?}");
    assert!(repairs[4] < BOUND, "{repairs:?}");
}

/// The maximum duration of 50 calls of `f`.
fn worst_of_50(f: impl Fn()) -> Duration {
    let took = (0..50).map(|_| {
        let begun = Instant::now();
        f();
        let took = begun.elapsed();
        std::thread::sleep(Duration::from_millis(100));
        took
    });
    took.max().unwrap_or_default()
}

#[test]
fn tables_of_firewalls_are_restored() {
    let nftables = Bed::on(Scene::lacking("owned-tables"), &["--firewall=nftables"]);
    let table = "nft list tables | grep -q 'inet tidegate-repairs'";
    nftables.assert_repair("table", Host, "nft delete table inet tidegate-repairs", table);
    let iptables = Bed::new(&["--firewall=iptables"]);
    let jump = "iptables -S FORWARD | grep -q TIDEGATE";
    iptables.assert_repair("table", Host, "iptables -F FORWARD", jump);
}

#[test]
fn programs_are_restored() {
    let bed = Bed::new(&["--firewall=nftables"]);
    let mut all = 0;
    for link in ["tg-home".to_owned(), bed.link("tgv"), "eth0".to_owned()] {
        let host = &bed.scene.net.host;
        let shown = host.ip(&["-o", "link", "show", "dev", &link]);
        let number: u32 = shown.split(':').next().unwrap().parse().unwrap();
        let count = || host.run(|| tidegate_netfilter::count_programs(number).unwrap());
        let (attached, counted) = (count(), bed.count("program"));
        assert!(attached > 0, "{link}");
        let removed = Instant::now();
        host.run(|| tidegate_netfilter::detach_programs(number).unwrap());
        assert!(eventually(SOON, || count() == attached), "{link}\n{}", bed.up.output());
        let took = removed.elapsed();
        eprintln!("program   {took:>8.0?}  Host: {link}");
        assert!(took < BOUND, "{link} took {took:?}");
        let restored = counted + attached as u64;
        assert!(eventually(SOON, || bed.count("program") == restored), "{link}");
        all += attached;
    }
    assert!(bed.carries_traffic(SOON));
    assert_eq!(bed.logged("program"), all, "{}", bed.up.output());
}

/// A process of the container deletes its address in a loop.
#[test]
fn repairs_of_repeatedly_removed_objects_back_off() {
    let bed = Bed::new(&["--firewall=none"]);
    let removed = Instant::now();
    let mut restored = 0;
    while removed.elapsed() < Duration::from_secs(15) {
        if bed.run(Inside, "ip addr del 10.83.1.2/24 dev eth0 2>/dev/null") {
            restored += 1;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let counted = bed.count("address");
    eprintln!("{restored} removals, {counted} restored in 15 s");
    assert!((8..=25).contains(&counted), "{counted}");
    let log = bed.up.output();
    assert_eq!(log.matches("are removed repeatedly").count(), 1, "{log}");
    assert_eq!(bed.logged("address"), 1, "{log}");
    assert!(
        eventually(SOON * 4, || bed.carries_traffic(Duration::from_secs(1))),
        "{}",
        bed.up.output()
    );
}
