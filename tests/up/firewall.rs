//! Firewalls of the host's, and their users: their rules come first, and nobody else's change.

use super::matrix::peer_as_seen;
use super::scene::{Scene, refused, state};
use super::uplink::Uplink;
use super::witness::Witness;
use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Segment, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);
/// How long an answer is waited for that is to come, and one that is not.
const PATIENCE: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(5)];

const FILE: &str = r#"
name: wall
networks:
  home: { enable_ipv6: true, ipam: { config: [ { subnet: 10.78.1.0/24 }, { subnet: "fd78:1::/64" } ] } }
services:
  server:
    x-netns: SERVER
    networks: { home: { ipv4_address: 10.78.1.10, ipv6_address: "fd78:1::10" } }
    ports: [ "8080:80", "8080:80/udp" ]
"#;

/// Every way to have a published port with a firewall.
pub(super) const MODES: [&[&str]; 4] = [
    &["--firewall=nftables", "--publish=proxy"],
    &["--firewall=nftables", "--publish=kernel"],
    &["--firewall=iptables", "--publish=proxy"],
    &["--firewall=iptables", "--publish=kernel"],
];

/// A host on which iptables is in use: it has the tables, and what a rule of the user's once needed
/// stays anyway.
const IN_USE: &str = "for program in iptables ip6tables; do for chain in INPUT FORWARD; do $program -A $chain -i none -j DROP; done; done";

/// A host with two outsides, and a container that tells its clients who they are.
struct Wall {
    scene: Scene,
    uplink: Uplink,
    server: Namespace,
    file: String,
}

impl Wall {
    fn new(scene: Scene) -> Self {
        let uplink = Uplink::new(&scene);
        let server = Namespace::new();
        let file = FILE.replace("SERVER", &server.path().display().to_string());
        Self { scene, uplink, server, file }
    }

    fn servers(&self) -> [PeerServer; 4] {
        let [v4, v6]: [SocketAddr; 2] = ["0.0.0.0:80", "[::1]:80"].map(|at| at.parse().unwrap());
        let v6 = SocketAddr::new("fd78:1::10".parse().unwrap(), v6.port());
        [
            PeerServer::tcp(&self.server, v4),
            PeerServer::udp(&self.server, v4),
            PeerServer::tcp(&self.server, v6),
            PeerServer::udp(&self.server, v6),
        ]
    }

    #[track_caller]
    fn up(&self, flags: &[&str]) -> Process {
        let up = self.scene.up_with(&self.file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    }

    #[track_caller]
    fn refused(&self, flags: &[&str]) -> String {
        refused(self.scene.command(&self.file).args(flags))
    }

    /// Whether the port answers `from` at the host's addresses.
    #[track_caller]
    fn answers(&self, from: &Namespace, expected: bool) {
        for at in ["203.0.113.1:8080", "[2001:db8:1::1]:8080"] {
            for udp in [false, true] {
                self.is_answered(from, at, udp, expected);
            }
        }
    }

    #[track_caller]
    fn is_answered(&self, from: &Namespace, at: &str, udp: bool, expected: bool) {
        let at: SocketAddr = at.parse().unwrap();
        let answer = from.run(|| peer_as_seen(at, udp, PATIENCE[usize::from(expected)]));
        assert_eq!(answer.is_ok(), expected, "{at} (udp {udp}): {answer:?}");
    }
}

/// What a user does to shut out the client in front of the house, and to take that back.
fn rules(flags: &[&str], add: bool) -> String {
    if flags.contains(&"--firewall=nftables") {
        return if add {
            "nft add rule inet tidegate_user TIDEGATE-USER ip saddr 203.0.113.9 drop
             nft add rule inet tidegate_user TIDEGATE-USER ip6 saddr 2001:db8:1::9 drop"
                .to_owned()
        } else {
            "nft flush chain inet tidegate_user TIDEGATE-USER".to_owned()
        };
    }
    let chain = if flags.contains(&"--firewall=none") { "INPUT" } else { "TIDEGATE-USER" };
    let how = if add { "-A" } else { "-D" };
    format!(
        "iptables {how} {chain} -s 203.0.113.9 -j DROP
         ip6tables {how} {chain} -s 2001:db8:1::9 -j DROP"
    )
}

#[track_caller]
fn a_rule_shuts(scene: Scene, flags: &[&str]) {
    let wall = Wall::new(scene);
    wall.scene.sh(IN_USE);
    let before = state(&wall.scene.net.host);
    let mut up = wall.up(flags);
    let _servers = wall.servers();
    let (shut_out, other) = (&wall.scene.net.client, &wall.uplink.client);
    wall.answers(shut_out, true);
    wall.scene.sh(&rules(flags, true));
    wall.answers(shut_out, false);
    wall.answers(other, true);
    // It outlasts us, and a kill.
    up.signal(Signal::KILL);
    up.wait(SOON);
    up = wall.up(flags);
    wall.answers(shut_out, false);
    wall.answers(other, true);
    up.stop(Signal::INT, SOON);
    up = wall.up(flags);
    wall.answers(shut_out, false);
    wall.scene.sh(&rules(flags, false));
    wall.answers(shut_out, true);
    up.stop(Signal::INT, SOON);
    if !flags.contains(&"--firewall=none") {
        assert_eq!(state(&wall.scene.net.host), before);
    }
}

#[test]
fn a_users_rule_shuts_the_port_in_every_mode() {
    for flags in MODES {
        a_rule_shuts(Scene::new(), flags);
    }
    a_rule_shuts(Scene::with_legacy_iptables(), MODES[2]);
    a_rule_shuts(Scene::with_legacy_iptables(), MODES[3]);
    // There it is the rule that shuts any port of the host.
    a_rule_shuts(Scene::new(), &["--firewall=none"]);
}

/// By the number that clients know, whichever way it is published.
#[test]
fn a_users_rule_about_the_published_port_holds_in_every_mode() {
    for flags in MODES {
        let wall = Wall::new(Scene::new());
        let _up = wall.up(flags);
        let _servers = wall.servers();
        wall.scene.sh(if flags.contains(&"--firewall=nftables") {
            "nft add rule inet tidegate_user TIDEGATE-USER meta l4proto tcp ct original proto-dst 8080 drop"
        } else {
            "iptables -A TIDEGATE-USER -p tcp -m conntrack --ctorigdstport 8080 -j DROP
             ip6tables -A TIDEGATE-USER -p tcp -m conntrack --ctorigdstport 8080 -j DROP"
        });
        for at in ["203.0.113.1:8080", "[2001:db8:1::1]:8080"] {
            wall.is_answered(&wall.scene.net.client, at, false, false);
            wall.is_answered(&wall.scene.net.client, at, true, true);
        }
    }
}

/// As Docker has it, with a rule of the administrator's.
fn docker_user(rule: &str) -> String {
    let of = |program: &str, rule: &str| {
        format!(
            "{program} -N DOCKER-USER
             {program} -A DOCKER-USER {rule}
             {program} -A DOCKER-USER -j RETURN
             {program} -I FORWARD -j DOCKER-USER\n"
        )
    };
    of("iptables", rule) + &of("ip6tables", &rule.replace("203.0.113.9", "2001:db8:1::9"))
}

#[test]
fn a_rule_for_dockers_ports_holds_for_ours() {
    let wall = Wall::new(Scene::new());
    wall.scene.sh(IN_USE);
    wall.scene.sh(&docker_user("-s 203.0.113.9 -j DROP"));
    let (shut_out, other) = (&wall.scene.net.client, &wall.uplink.client);
    let others = state(&wall.scene.net.host);
    for flags in [&[][..], &["--firewall=nftables"], MODES[1], MODES[2], MODES[3]] {
        let mut up = wall.up(flags);
        let _servers = wall.servers();
        wall.answers(other, true);
        wall.answers(shut_out, false);
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&wall.scene.net.host), others, "{flags:?}");
    }
    for flags in [MODES[0], &["--firewall=none"]] {
        let told = wall.refused(flags);
        assert!(told.contains("\"-A DOCKER-USER -s 203.0.113.9/32 -j DROP\""), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
    assert_eq!(state(&wall.scene.net.host), others);
}

/// What comes in for a socket has no such port: the kernel has to publish, or nobody does.
#[test]
fn a_rule_about_containers_makes_the_kernel_publish() {
    let wall = Wall::new(Scene::new());
    wall.scene.sh(&docker_user("-p tcp -m tcp --dport 80 -j DROP"));
    let client = &wall.scene.net.client;
    let mut up = wall.up(&[]);
    let _servers = wall.servers();
    for at in ["203.0.113.1:8080", "[2001:db8:1::1]:8080"] {
        wall.is_answered(client, at, false, false);
        wall.is_answered(client, at, true, true);
    }
    up.stop(Signal::INT, SOON);
    for flags in [MODES[2], MODES[0]] {
        let told = wall.refused(flags);
        assert!(told.contains("\"-A DOCKER-USER -p tcp -m tcp --dport 80 -j DROP\""), "{told}");
    }
    // A client that only a socket can serve: over IPv6, to a container that has none.
    let file = FILE.replace("SERVER", &wall.server.path().display().to_string());
    let file =
        file.replace(r#"enable_ipv6: true, "#, "").replace(r#", { subnet: "fd78:1::/64" }"#, "");
    let file = file.replace(r#", ipv6_address: "fd78:1::10""#, "");
    let told = refused(&mut wall.scene.command(&file));
    assert!(
        told.contains("port [::]:8080/") && told.contains("would be served by a userspace socket"),
        "{told}"
    );
}

#[test]
fn a_rule_for_dockers_ports_that_comes_later_holds_within_a_second() {
    let wall = Wall::new(Scene::new());
    let up = wall.up(MODES[2]);
    let _servers = wall.servers();
    wall.answers(&wall.scene.net.client, true);
    wall.scene.sh(&docker_user("-s 203.0.113.9 -j DROP"));
    let added = Instant::now();
    let asks = || state(&wall.scene.net.host).matches("jump DOCKER-USER").count() >= 2 * 4;
    assert!(eventually(SOON, asks), "{}", state(&wall.scene.net.host));
    assert!(added.elapsed() < Duration::from_secs(1));
    wall.answers(&wall.scene.net.client, false);
    wall.answers(&wall.uplink.client, true);
    // One that cannot hold is not passed over in silence.
    wall.scene.sh("iptables -I DOCKER-USER -p tcp -m tcp --dport 80 -j DROP");
    up.wait_for_line("rule=\"-A DOCKER-USER -p tcp -m tcp --dport 80 -j DROP\"", SOON);
}

impl Wall {
    /// Publishes the server's port 80 as `port` too, by the API: status and body.
    fn publish(&self, port: u16) -> (u16, String) {
        let body = format!(r#"{{"endpoint": "server", "spec": "{port}:80"}}"#);
        let mut curl = self.scene.net.host.command("curl");
        curl.args(["-sS", "-w", "\n%{http_code}", "--unix-socket"]).arg(self.scene.socket());
        let output = curl.args(["http://tidegate/v1/ports", "-d", &body]).output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        let (body, status) = told.trim_end().rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    /// Whether the server's TCP port is answered there at both of the host's addresses.
    #[track_caller]
    fn tcp_answers(&self, from: &Namespace, port: u16, expected: bool) {
        for at in [format!("203.0.113.1:{port}"), format!("[2001:db8:1::1]:{port}")] {
            self.is_answered(from, &at, false, expected);
        }
    }
}

/// Whatever publishes: the rule holds for the ports that are there, and for those that come.
#[test]
fn a_rule_of_docker_user_that_comes_later_holds_for_all_ports() {
    for (flags, rule) in [
        (MODES[0], "-s 203.0.113.9 -j DROP"),
        (MODES[1], "-s 203.0.113.9 -j DROP"),
        (MODES[2], "-s 203.0.113.9 -j DROP"),
        (MODES[2], "-s 203.0.113.9 -p tcp -m tcp --dport 80 -j DROP"),
        (MODES[3], "-s 203.0.113.9 -j DROP"),
    ] {
        let wall = Wall::new(Scene::new());
        let (shut_out, other) = (&wall.scene.net.client, &wall.uplink.client);
        let _up = wall.up(flags);
        let _servers = wall.servers();
        wall.tcp_answers(shut_out, 8080, true);
        wall.scene.sh(&docker_user(rule));
        // At once, before anybody has looked at the rules.
        let (status, told) = wall.publish(8081);
        assert_eq!(status, 201, "{flags:?}: {told}");
        wall.tcp_answers(other, 8081, true);
        wall.tcp_answers(shut_out, 8081, false);
        let refused = || {
            let at: SocketAddr = "203.0.113.1:8080".parse().unwrap();
            shut_out.run(|| peer_as_seen(at, false, PATIENCE[0])).is_err()
        };
        assert!(eventually(SOON, refused), "{flags:?} {rule}");
        wall.tcp_answers(shut_out, 8080, false);
        wall.tcp_answers(other, 8080, true);
    }
}

/// Without a firewall nothing enforces it: the port is refused, and what is open is named once.
#[test]
fn a_rule_of_docker_user_that_nothing_enforces_refuses_the_port() {
    let wall = Wall::new(Scene::new());
    let up = wall.up(&["--firewall=none"]);
    let _servers = wall.servers();
    wall.scene.sh(&docker_user("-s 203.0.113.9 -j DROP"));
    let (status, told) = wall.publish(8081);
    assert_eq!(status, 409, "{told}");
    assert!(told.contains("-A DOCKER-USER -s 203.0.113.9/32 -j DROP"), "{told}");
    assert!(told.contains("--firewall=iptables"), "{told}");
    up.wait_for_line("published port bypasses DOCKER-USER rule", SOON);
    wall.scene.sh("iptables -F DOCKER-USER; ip6tables -F DOCKER-USER");
    assert_eq!(wall.publish(8081).0, 201);
}

/// Nobody jumps to the chain, so what the kernel forwards would not be asked either.
#[test]
fn a_chain_that_is_not_asked_of_forwarded_packets_refuses_the_port_with_nftables() {
    let wall = Wall::new(Scene::new());
    let _up = wall.up(MODES[0]);
    wall.scene.sh("iptables -N DOCKER-USER; iptables -A DOCKER-USER -s 203.0.113.9 -j DROP");
    let (status, told) = wall.publish(8081);
    assert_eq!(status, 409, "{told}");
}

#[test]
fn a_users_rule_holds_for_ports_that_are_published_later() {
    for flags in MODES {
        let wall = Wall::new(Scene::new());
        let _up = wall.up(flags);
        let _servers = wall.servers();
        wall.scene.sh(&rules(flags, true));
        let (status, told) = wall.publish(8081);
        assert_eq!(status, 201, "{flags:?}: {told}");
        wall.tcp_answers(&wall.scene.net.client, 8081, false);
        wall.tcp_answers(&wall.uplink.client, 8081, true);
    }
}

/// What ufw makes of iptables, in short: policies that drop, chains of its own, one port that is
/// open.
const LIKE_UFW: &str = "
    P -P INPUT DROP
    P -P FORWARD DROP
    P -N ufw-before-input
    P -N ufw-user-input
    P -N ufw-before-forward
    P -A INPUT -j ufw-before-input
    P -A INPUT -j ufw-user-input
    P -A FORWARD -j ufw-before-forward
    P -A ufw-before-input -i lo -j ACCEPT
    P -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    P -A ufw-before-input -m conntrack --ctstate INVALID -j DROP
    P -A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    ip6tables -A ufw-before-input -p ipv6-icmp -j ACCEPT
";

#[test]
fn a_firewall_like_ufws_stays_as_it_is_and_has_the_say_about_sockets() {
    let wall = Wall::new(Scene::new());
    let both = LIKE_UFW.lines().map(|line| {
        let of = |program: &str| line.replace("P -", &format!("{program} -"));
        if line.contains("P -") {
            of("iptables") + "\n" + &of("ip6tables")
        } else {
            line.to_owned()
        }
    });
    wall.scene.sh(&both.collect::<Vec<_>>().join("\n"));
    let theirs = state(&wall.scene.net.host);
    let client = &wall.scene.net.client;
    let mut up = wall.up(&[]);
    let _servers = wall.servers();
    wall.answers(client, false);
    wall.scene.sh("iptables -A ufw-user-input -p tcp --dport 8080 -j ACCEPT");
    wall.is_answered(client, "203.0.113.1:8080", false, true);
    // Egress, past a policy that drops.
    let outside = TcpListenerOutside::new(client);
    assert!(outside.is_reached_from(&wall.server), "containers reach the outside");
    wall.scene.sh("iptables -D ufw-user-input -p tcp --dport 8080 -j ACCEPT");
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&wall.scene.net.host), theirs);
}

/// A server at 203.0.113.9:7000.
struct TcpListenerOutside(
    #[expect(dead_code, reason = "it listens for as long as it lives")] TcpListener,
);

impl TcpListenerOutside {
    fn new(client: &Namespace) -> Self {
        Self(client.run(|| TcpListener::bind("203.0.113.9:7000")).unwrap())
    }

    fn is_reached_from(&self, container: &Namespace) -> bool {
        let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
        container.run(|| std::net::TcpStream::connect_timeout(&at, PATIENCE[1])).is_ok()
    }
}

/// What firewalld makes of nftables, in short.
const LIKE_FIREWALLD: &str = r#"
table inet firewalld {
    chain filter_INPUT {
        type filter hook input priority 10; policy accept;
        ct state { established, related } accept
        iifname "lo" accept
        meta l4proto ipv6-icmp accept
        tcp dport 8080 accept
        ct state invalid drop
        reject with icmpx admin-prohibited
    }
    chain filter_FORWARD {
        type filter hook forward priority 10; policy accept;
        ct state { established, related } accept
        iifname "eth7" accept
        reject with icmpx admin-prohibited
    }
}
"#;

#[test]
fn a_firewall_like_firewallds_stays_as_it_is_and_has_the_say() {
    let wall = Wall::new(Scene::new());
    let rules = wall.scene.directory.path().join("firewalld.nft");
    fs::write(&rules, LIKE_FIREWALLD).unwrap();
    wall.scene.sh(&format!("nft -f {}", rules.display()));
    let theirs = state(&wall.scene.net.host);
    for flags in [&[][..], MODES[1], MODES[2], &["--firewall=none"]] {
        let mut up = wall.up(flags);
        let _servers = wall.servers();
        let by_socket = !flags.contains(&"--publish=kernel");
        wall.is_answered(&wall.scene.net.client, "203.0.113.1:8080", false, by_socket);
        wall.is_answered(&wall.scene.net.client, "203.0.113.1:8080", true, false);
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&wall.scene.net.host), theirs, "{flags:?}");
    }
}

/// Two machines on a bridge of somebody else's, where bridged packets pass the host's rules, and a
/// route between two such bridges.
#[test]
fn virtual_machines_beside_us_go_on_talking() {
    let scene = Scene::new();
    let (one, other, apart) = (Namespace::new(), Namespace::new(), Namespace::new());
    let (bridge, far) = (Segment::new(), Segment::new());
    bridge.attach(&scene.net.host, "eth5", &["10.50.0.1/24"]);
    far.attach(&scene.net.host, "eth6", &["10.60.0.1/24"]);
    bridge.attach(&one, "eth0", &["10.50.0.2/24"]);
    far.attach(&apart, "eth0", &["10.60.0.2/24"]);
    one.ip_all("route add default via 10.50.0.1");
    apart.ip_all("route add default via 10.60.0.1");
    scene.net.host.ip_all(&format!(
        "link add vmbr0 type bridge
         link set vmbr0 up
         link add vm0 type veth peer name eth0 netns {}
         link set vm0 master vmbr0 up
         link add vm1 type veth peer name eth1 netns {}
         link set vm1 master vmbr0 up",
        other.path().display(),
        one.path().display()
    ));
    other.ip_all("addr add 10.70.0.3/24 dev eth0\n link set eth0 up");
    one.ip_all("addr add 10.70.0.2/24 dev eth1\n link set eth1 up");
    scene.net.host.sysctl("net.bridge.bridge-nf-call-iptables", "1");
    let wall = Wall::new(scene);
    let ping = |from: &Namespace, to: &str| {
        let ping = from.command("ping").args(["-c", "1", "-W", "5", to]).output().unwrap();
        assert!(ping.status.success(), "{to}: {}", String::from_utf8_lossy(&ping.stdout));
    };
    for flags in MODES.into_iter().chain([&["--firewall=none"][..]]) {
        let mut up = wall.up(flags);
        ping(&one, "10.70.0.3");
        ping(&one, "10.60.0.2");
        ping(&apart, "10.50.0.2");
        up.stop(Signal::INT, SOON);
    }
}

/// Egress that is smaller than the network, and does not say so.
#[test]
fn connections_fit_a_smaller_egress() {
    for flags in [MODES[0], MODES[2]] {
        let wall = Wall::new(Scene::new());
        wall.scene.net.host.ip_all("link set eth0 mtu 1400");
        let file = wall.file.replace(
            "  home: { enable_ipv6",
            "  home: { driver_opts: { com.docker.network.driver.mtu: '1500' }, enable_ipv6",
        );
        let up = wall.scene.up_with(&file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
        let listener = wall.scene.net.client.run(|| TcpListener::bind(at)).unwrap();
        let container =
            wall.server.run(|| std::net::TcpStream::connect_timeout(&at, PATIENCE[1])).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        for stream in [&accepted, &container] {
            let mss = socket2::SockRef::from(stream).tcp_mss().unwrap();
            assert!(mss <= 1360, "{flags:?}: {mss}");
        }
    }
}

/// A program in the place of one of the machine's.
pub(super) fn program(scene: &Scene, name: &str, script: &str) {
    let path = scene.programs.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn an_iptables_that_does_not_do_is_one_line_and_changes_nothing() {
    for (name, script, error) in [
        (
            "iptables",
            "echo iptables v1.4.21",
            "--firewall=iptables: \"iptables v1.4.21\" is too old; 1.6 or newer is needed",
        ),
        ("iptables", "echo >&2 no such thing; exit 3", "--firewall=iptables: no such thing"),
        (
            "iptables-restore",
            "echo >&2 'iptables-restore v1.8.9 (nf_tables): line 5 failed'; exit 2",
            "line 5 failed: -A TIDEGATE-wall-",
        ),
        // The tables before `nat` are done then.
        (
            "iptables-restore",
            "if [ -e RAN ]; then exec iptables-nft-restore \"$@\"; fi; touch RAN; sed '/^.nat/,$d' | iptables-nft-restore \"$@\"; echo >&2 half; exit 1",
            "half",
        ),
        (
            "ip6tables-save",
            "exit 1",
            "has IPv6, and ip6tables is missing; install it, or leave IPv6 out",
        ),
        ("iptables-save", "sleep 60", "iptables-save: timed out after 10 s and was killed"),
    ] {
        let wall = Wall::new(Scene::new());
        wall.scene.sh(IN_USE);
        let before = state(&wall.scene.net.host);
        let ran = wall.scene.directory.path().join("ran");
        program(&wall.scene, name, &script.replace("RAN", ran.to_str().unwrap()));
        let mut up = wall.scene.up_with(&wall.file, &["--firewall=iptables"]);
        let code = up.wait(Duration::from_secs(60)).code();
        let told = up.wait_for_output(SOON);
        assert_eq!(code, Some(1), "{told}");
        assert!(told.starts_with("tidegate: error: ") && told.contains(error), "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
        assert_eq!(state(&wall.scene.net.host), before, "{told}");
    }
}

/// Where the programs are missing `auto` takes what is there.
#[test]
fn without_iptables_there_is_still_nftables() {
    let wall = Wall::new(Scene::new());
    for name in ["iptables", "ip6tables"] {
        program(&wall.scene, name, "exit 1");
    }
    let _up = wall.up(&[]);
    assert!(state(&wall.scene.net.host).contains("table inet tidegate-wall"));
}

/// A client that never pauses. The kernel would go on sending its datagrams where the port once
/// led.
#[test]
fn a_udp_flow_follows_its_port_when_that_is_moved_and_ends_with_it() {
    for flags in [MODES[1], MODES[3]] {
        let scene = Scene::new();
        let containers = [Namespace::new(), Namespace::new()];
        let mut file = String::from(
            "name: flows\nnetworks: { home: { ipam: { config: [ { subnet: 10.78.1.0/24 } ] } } }\nservices:\n",
        );
        for (number, container) in containers.iter().enumerate() {
            file += &format!(
                "  s{number}: {{ x-netns: {}, networks: {{ home: {{ ipv4_address: 10.78.1.1{number} }} }} }}\n",
                container.path().display()
            );
        }
        let up = scene.up_with(&file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        let witnesses = [0, 1]
            .map(|number| Witness::new(&containers[number], &["0.0.0.0:80".parse().unwrap()]));
        let ask = |args: &[&str]| {
            let mut curl = scene.net.host.command("curl");
            let output = curl
                .args(["-sSf", "--unix-socket"])
                .arg(scene.socket())
                .args(args)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        };
        let open = |endpoint: &str| {
            let body =
                format!(r#"{{"endpoint": "{endpoint}", "spec": "203.0.113.1:9000:80/udp"}}"#);
            let told: serde_json::Value =
                serde_json::from_str(&ask(&["http://tidegate/v1/ports", "-d", &body])).unwrap();
            told[0]["id"].to_string()
        };
        let close =
            |id: &str| drop(ask(&["-X", "DELETE", &format!("http://tidegate/v1/ports/{id}")]));
        let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:5000")).unwrap();
        let comes = |text: &str, witness: &Witness, patience| {
            eventually(patience, || {
                // Nobody may be there, which is told with the next.
                let _ = client.send_to(text.as_bytes(), "203.0.113.1:9000");
                witness.has_seen(text)
            })
        };
        let id = open("s0");
        assert!(comes("first", &witnesses[0], SOON));
        close(&id);
        let id = open("s1");
        assert!(comes("second", &witnesses[1], Duration::from_secs(1)), "{flags:?}");
        assert!(!witnesses[0].has_seen("second"));
        close(&id);
        assert!(
            !comes("third", &witnesses[1], PATIENCE[0]) && !witnesses[0].has_seen("third"),
            "{flags:?}"
        );
    }
}
