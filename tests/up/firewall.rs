//! Firewalls and their users: rules of the user take precedence, and tables of other software stay
//! unchanged.

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
/// Timeouts of a probe without an expected answer, and with one.
const TIMEOUTS: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(5)];

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

/// All combinations of firewall and publishing.
pub(super) const MODES: [&[&str]; 4] = [
    &["--firewall=nftables", "--publish=proxy"],
    &["--firewall=nftables", "--publish=kernel"],
    &["--firewall=iptables", "--publish=proxy"],
    &["--firewall=iptables", "--publish=kernel"],
];

/// Puts iptables into use, so that its tables exist before and after the test. iptables keeps
/// tables and chains when their last rule is removed.
const IN_USE: &str = "for program in iptables ip6tables; do for chain in INPUT FORWARD; do $program -A $chain -i none -j DROP; done; done";

/// A host with two uplinks, and a container whose servers return the address of the client.
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

    /// Asserts whether the published port answers `from` at the host's addresses.
    #[track_caller]
    fn assert_answers(&self, from: &Namespace, expected: bool) {
        for at in ["203.0.113.1:8080", "[2001:db8:1::1]:8080"] {
            for udp in [false, true] {
                self.assert_answer(from, at, udp, expected);
            }
        }
    }

    #[track_caller]
    fn assert_answer(&self, from: &Namespace, at: &str, udp: bool, expected: bool) {
        let at: SocketAddr = at.parse().unwrap();
        let answer = from.run(|| peer_as_seen(at, udp, TIMEOUTS[usize::from(expected)]));
        assert_eq!(answer.is_ok(), expected, "{at} (udp {udp}): {answer:?}");
    }
}

/// The commands with which a user blocks the client on the first uplink (`add`) or unblocks it.
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
fn assert_rule_blocks(scene: Scene, flags: &[&str]) {
    let wall = Wall::new(scene);
    wall.scene.sh(IN_USE);
    let before = state(&wall.scene.net.host);
    let mut up = wall.up(flags);
    let _servers = wall.servers();
    let (blocked, other) = (&wall.scene.net.client, &wall.uplink.client);
    wall.assert_answers(blocked, true);
    wall.scene.sh(&rules(flags, true));
    wall.assert_answers(blocked, false);
    wall.assert_answers(other, true);
    // The rule survives a kill and a restart of tidegate.
    up.signal(Signal::KILL);
    up.wait(SOON);
    up = wall.up(flags);
    wall.assert_answers(blocked, false);
    wall.assert_answers(other, true);
    up.stop(Signal::INT, SOON);
    up = wall.up(flags);
    wall.assert_answers(blocked, false);
    wall.scene.sh(&rules(flags, false));
    wall.assert_answers(blocked, true);
    up.stop(Signal::INT, SOON);
    if !flags.contains(&"--firewall=none") {
        assert_eq!(state(&wall.scene.net.host), before);
    }
}

#[test]
fn a_users_rule_blocks_the_port_in_every_mode() {
    for flags in MODES {
        assert_rule_blocks(Scene::new(), flags);
    }
    assert_rule_blocks(Scene::with_legacy_iptables(), MODES[2]);
    assert_rule_blocks(Scene::with_legacy_iptables(), MODES[3]);
    // Without a firewall, the rule is in INPUT, as for any port of the host.
    assert_rule_blocks(Scene::new(), &["--firewall=none"]);
}

/// The rule matches the published port, not that of the container.
#[test]
fn a_users_rule_for_the_published_port_holds_in_every_mode() {
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
            wall.assert_answer(&wall.scene.net.client, at, false, false);
            wall.assert_answer(&wall.scene.net.client, at, true, true);
        }
    }
}

/// The commands that create DOCKER-USER as Docker does, with `rule` of the administrator.
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
fn a_docker_user_rule_applies_to_published_ports() {
    let wall = Wall::new(Scene::new());
    wall.scene.sh(IN_USE);
    wall.scene.sh(&docker_user("-s 203.0.113.9 -j DROP"));
    let (blocked, other) = (&wall.scene.net.client, &wall.uplink.client);
    let others = state(&wall.scene.net.host);
    for flags in [&[][..], &["--firewall=nftables"], MODES[1], MODES[2], MODES[3]] {
        let mut up = wall.up(flags);
        let _servers = wall.servers();
        wall.assert_answers(other, true);
        wall.assert_answers(blocked, false);
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&wall.scene.net.host), others, "{flags:?}");
    }
    for flags in [MODES[0], &["--firewall=none"]] {
        let printed = wall.refused(flags);
        assert!(printed.contains("\"-A DOCKER-USER -s 203.0.113.9/32 -j DROP\""), "{printed}");
        assert_eq!(printed.lines().count(), 1, "{printed}");
    }
    assert_eq!(state(&wall.scene.net.host), others);
}

/// The rule matches the port of the container. It does not apply to sockets of the proxy, so the
/// kernel has to publish the port.
#[test]
fn a_docker_user_rule_for_container_ports_selects_publishing_by_the_kernel() {
    let wall = Wall::new(Scene::new());
    wall.scene.sh(&docker_user("-p tcp -m tcp --dport 80 -j DROP"));
    let client = &wall.scene.net.client;
    let mut up = wall.up(&[]);
    let _servers = wall.servers();
    for at in ["203.0.113.1:8080", "[2001:db8:1::1]:8080"] {
        wall.assert_answer(client, at, false, false);
        wall.assert_answer(client, at, true, true);
    }
    up.stop(Signal::INT, SOON);
    for flags in [MODES[2], MODES[0]] {
        let printed = wall.refused(flags);
        assert!(
            printed.contains("\"-A DOCKER-USER -p tcp -m tcp --dport 80 -j DROP\""),
            "{printed}"
        );
    }
    // Only the proxy can forward IPv6 to a container without an IPv6 address.
    let file = FILE.replace("SERVER", &wall.server.path().display().to_string());
    let file =
        file.replace(r#"enable_ipv6: true, "#, "").replace(r#", { subnet: "fd78:1::/64" }"#, "");
    let file = file.replace(r#", ipv6_address: "fd78:1::10""#, "");
    let printed = refused(&mut wall.scene.command(&file));
    assert!(
        printed.contains("port [::]:8080/")
            && printed.contains("would be served by a userspace socket"),
        "{printed}"
    );
}

#[test]
fn a_later_docker_user_rule_holds_within_a_second() {
    let wall = Wall::new(Scene::new());
    let up = wall.up(MODES[2]);
    let _servers = wall.servers();
    wall.assert_answers(&wall.scene.net.client, true);
    wall.scene.sh(&docker_user("-s 203.0.113.9 -j DROP"));
    let added = Instant::now();
    let jumps = || state(&wall.scene.net.host).matches("jump DOCKER-USER").count() >= 2 * 4;
    assert!(eventually(SOON, jumps), "{}", state(&wall.scene.net.host));
    assert!(added.elapsed() < Duration::from_secs(1));
    wall.assert_answers(&wall.scene.net.client, false);
    wall.assert_answers(&wall.uplink.client, true);
    // A rule that cannot be enforced is reported.
    wall.scene.sh("iptables -I DOCKER-USER -p tcp -m tcp --dport 80 -j DROP");
    up.wait_for_line("rule=\"-A DOCKER-USER -p tcp -m tcp --dport 80 -j DROP\"", SOON);
}

impl Wall {
    /// Publishes the server's port 80 as `port` with the API. Returns status and body.
    fn publish(&self, port: u16) -> (u16, String) {
        let body = format!(r#"{{"endpoint": "server", "spec": "{port}:80"}}"#);
        let mut curl = self.scene.net.host.command("curl");
        curl.args(["-sS", "-w", "\n%{http_code}", "--unix-socket"]).arg(self.scene.socket());
        let output = curl.args(["http://tidegate/v1/ports", "-d", &body]).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        let (body, status) = printed.trim_end().rsplit_once('\n').unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    /// Asserts whether TCP `port` answers `from` at both addresses of the host.
    #[track_caller]
    fn assert_tcp_answers(&self, from: &Namespace, port: u16, expected: bool) {
        for at in [format!("203.0.113.1:{port}"), format!("[2001:db8:1::1]:{port}")] {
            self.assert_answer(from, &at, false, expected);
        }
    }
}

/// In all modes, the rule applies to ports published before and after it.
#[test]
fn a_later_docker_user_rule_holds_for_all_ports() {
    for (flags, rule) in [
        (MODES[0], "-s 203.0.113.9 -j DROP"),
        (MODES[1], "-s 203.0.113.9 -j DROP"),
        (MODES[2], "-s 203.0.113.9 -j DROP"),
        (MODES[2], "-s 203.0.113.9 -p tcp -m tcp --dport 80 -j DROP"),
        (MODES[3], "-s 203.0.113.9 -j DROP"),
    ] {
        let wall = Wall::new(Scene::new());
        let (blocked, other) = (&wall.scene.net.client, &wall.uplink.client);
        let _up = wall.up(flags);
        let _servers = wall.servers();
        wall.assert_tcp_answers(blocked, 8080, true);
        wall.scene.sh(&docker_user(rule));
        // Immediately, before tidegate has noticed the rule.
        let (status, printed) = wall.publish(8081);
        assert_eq!(status, 201, "{flags:?}: {printed}");
        wall.assert_tcp_answers(other, 8081, true);
        wall.assert_tcp_answers(blocked, 8081, false);
        let refused = || {
            let at: SocketAddr = "203.0.113.1:8080".parse().unwrap();
            blocked.run(|| peer_as_seen(at, false, TIMEOUTS[0])).is_err()
        };
        assert!(eventually(SOON, refused), "{flags:?} {rule}");
        wall.assert_tcp_answers(blocked, 8080, false);
        wall.assert_tcp_answers(other, 8080, true);
    }
}

/// Without a firewall the rule cannot be enforced: new ports are rejected, and open ports reported.
#[test]
fn a_docker_user_rule_rejects_the_port_without_a_firewall() {
    let wall = Wall::new(Scene::new());
    let up = wall.up(&["--firewall=none"]);
    let _servers = wall.servers();
    wall.scene.sh(&docker_user("-s 203.0.113.9 -j DROP"));
    let (status, printed) = wall.publish(8081);
    assert_eq!(status, 409, "{printed}");
    assert!(printed.contains("-A DOCKER-USER -s 203.0.113.9/32 -j DROP"), "{printed}");
    assert!(printed.contains("--firewall=iptables"), "{printed}");
    up.wait_for_line("published port bypasses DOCKER-USER rule", SOON);
    wall.scene.sh("iptables -F DOCKER-USER; ip6tables -F DOCKER-USER");
    assert_eq!(wall.publish(8081).0, 201);
}

/// FORWARD has no jump to DOCKER-USER, so publishing by the kernel would not enforce the rule.
#[test]
fn a_docker_user_chain_without_a_jump_rejects_the_port_with_nftables() {
    let wall = Wall::new(Scene::new());
    let _up = wall.up(MODES[0]);
    wall.scene.sh("iptables -N DOCKER-USER; iptables -A DOCKER-USER -s 203.0.113.9 -j DROP");
    let (status, printed) = wall.publish(8081);
    assert_eq!(status, 409, "{printed}");
}

/// nft(8) can add rules to DOCKER-USER that iptables cannot print, or prints without a match.
#[test]
fn rules_in_docker_user_that_iptables_cannot_print_hold() {
    let unprintable = "FAMILY filter DOCKER-USER ct status dnat counter";
    let misprinted = "FAMILY filter DOCKER-USER tcp dport { 79, 80 } ip saddr 203.0.113.9 drop";
    for rule in [unprintable, misprinted] {
        let wall = Wall::new(Scene::new());
        let (blocked, other) = (&wall.scene.net.client, &wall.uplink.client);
        let by_iptables =
            if rule == unprintable { "-s 203.0.113.9 -j DROP" } else { "-i none -j DROP" };
        wall.scene.sh(&docker_user(by_iptables));
        for family in ["ip", "ip6"] {
            let rule = rule.replace("FAMILY", family);
            let rule = match family {
                "ip6" => rule.replace("ip saddr 203.0.113.9", "ip6 saddr 2001:db8:1::9"),
                _ => rule,
            };
            wall.scene.sh(&format!("nft insert rule {rule}"));
        }
        for flags in [&[][..], MODES[1]] {
            let mut up = wall.up(flags);
            let _servers = wall.servers();
            wall.assert_tcp_answers(other, 8080, true);
            wall.assert_tcp_answers(blocked, 8080, false);
            up.stop(Signal::INT, SOON);
        }
        for flags in [MODES[0], MODES[2], &["--firewall=none"]] {
            let printed = wall.refused(flags);
            assert!(printed.contains("cannot print"), "{rule}, {flags:?}: {printed}");
            assert_eq!(printed.lines().count(), 1, "{printed}");
        }
    }
}

/// One that is added at run time, in any chain, neither switches the enforcement of later rules off
/// nor the repair of other tables.
#[test]
fn a_later_rule_that_iptables_cannot_print_changes_nothing_else() {
    for flags in [MODES[0], MODES[1], MODES[2], MODES[3]] {
        let wall = Wall::new(Scene::new());
        wall.scene.sh(&docker_user("-j RETURN"));
        let flags = if flags == MODES[0] { &["--firewall=nftables"] } else { flags };
        let mut up = wall.up(flags);
        let _servers = wall.servers();
        let (blocked, other) = (&wall.scene.net.client, &wall.uplink.client);
        wall.assert_tcp_answers(blocked, 8080, true);
        for family in ["ip", "ip6"] {
            wall.scene.sh(&format!(
                "nft add chain {family} filter mine
                 nft add rule {family} filter mine meta mark set 5"
            ));
        }
        for chain in ["iptables -t nat", "ip6tables -t nat", "iptables -t mangle"] {
            wall.scene.sh(&format!("{chain} -F"));
        }
        let answers = |from: &Namespace| {
            let at: SocketAddr = "203.0.113.1:8080".parse().unwrap();
            from.run(|| peer_as_seen(at, false, TIMEOUTS[0])).is_ok()
        };
        let outside = TcpListenerOutside::new(blocked);
        let recovers = || answers(other) && (0..3).all(|_| outside.is_reached_from(&wall.server));
        assert!(eventually(SOON, recovers), "{flags:?}: {}", up.output());
        wall.scene.sh("iptables -I DOCKER-USER -s 203.0.113.9 -j DROP
             ip6tables -I DOCKER-USER -s 2001:db8:1::9 -j DROP");
        assert!(eventually(SOON, || !answers(blocked)), "{flags:?}: {}", up.output());
        wall.assert_tcp_answers(blocked, 8080, false);
        wall.assert_tcp_answers(other, 8080, true);
        wall.scene.sh("nft flush chain ip filter mine; nft flush chain ip6 filter mine");
        up.stop(Signal::INT, SOON);
    }
}

/// A host can use both variants of iptables, and tidegate's rules are those of one of them.
#[test]
fn rules_in_docker_user_of_the_other_variant_of_iptables_hold() {
    for (scene, other_variant) in
        [(Scene::new(), "-legacy"), (Scene::with_legacy_iptables(), "-nft")]
    {
        let wall = Wall::new(scene);
        let rules = docker_user("-s 203.0.113.9 -j DROP");
        let rules = rules.replace("iptables ", &format!("iptables{other_variant} "));
        let rules = rules.replace("ip6tables ", &format!("ip6tables{other_variant} "));
        wall.scene.sh(&rules);
        for flags in [&[][..], MODES[1], MODES[3]] {
            let mut up = wall.up(flags);
            let _servers = wall.servers();
            wall.assert_answers(&wall.uplink.client, true);
            wall.assert_answers(&wall.scene.net.client, false);
            up.stop(Signal::INT, SOON);
        }
        for flags in [MODES[0], MODES[2], &["--firewall=none"]] {
            let printed = wall.refused(flags);
            let rule = "\"-A DOCKER-USER -s 203.0.113.9/32 -j DROP\"";
            assert!(printed.contains(rule), "{other_variant}, {flags:?}: {printed}");
        }
    }
}

/// TIDEGATE-USER belongs to one firewall. Another one would not apply its rules.
#[test]
fn a_users_rule_is_not_lost_with_another_firewall() {
    for (of, others) in [(MODES[0], [MODES[2], MODES[3]]), (MODES[2], [MODES[0], MODES[1]])] {
        let wall = Wall::new(Scene::new());
        let mut up = wall.up(of);
        wall.scene.sh(&rules(of, true));
        up.stop(Signal::INT, SOON);
        let before = state(&wall.scene.net.host);
        for flags in others.into_iter().chain([&["--firewall=none"][..]]) {
            let printed = wall.refused(flags);
            let firewall = of[0];
            assert!(
                printed.contains("the chain TIDEGATE-USER of ")
                    && printed.contains(&format!("use {firewall}")),
                "{flags:?}: {printed}"
            );
            assert_eq!(printed.lines().count(), 1, "{printed}");
            assert_eq!(state(&wall.scene.net.host), before);
        }
        let _up = wall.up(of);
        let _servers = wall.servers();
        wall.assert_answers(&wall.scene.net.client, false);
    }
    let wall = Wall::new(Scene::new());
    wall.scene.sh("iptables-legacy -N TIDEGATE-USER; iptables-legacy -A TIDEGATE-USER -j DROP");
    for flags in [MODES[0], MODES[2], &["--firewall=none"]] {
        let printed = wall.refused(flags);
        assert!(printed.contains("of the other variant of iptables"), "{flags:?}: {printed}");
    }
}

#[test]
fn a_users_rule_holds_for_ports_published_later() {
    for flags in MODES {
        let wall = Wall::new(Scene::new());
        let _up = wall.up(flags);
        let _servers = wall.servers();
        wall.scene.sh(&rules(flags, true));
        let (status, printed) = wall.publish(8081);
        assert_eq!(status, 201, "{flags:?}: {printed}");
        wall.assert_tcp_answers(&wall.scene.net.client, 8081, false);
        wall.assert_tcp_answers(&wall.uplink.client, 8081, true);
    }
}

/// An excerpt of ufw's rules: policy drop, its own chains, one open port.
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
fn rules_like_those_of_ufw_stay_unchanged_and_apply_to_sockets() {
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
    let before = state(&wall.scene.net.host);
    let client = &wall.scene.net.client;
    let mut up = wall.up(&[]);
    let _servers = wall.servers();
    wall.assert_answers(client, false);
    wall.scene.sh("iptables -A ufw-user-input -p tcp --dport 8080 -j ACCEPT");
    wall.assert_answer(client, "203.0.113.1:8080", false, true);
    // Egress is accepted despite the policy drop of FORWARD.
    let outside = TcpListenerOutside::new(client);
    assert!(outside.is_reached_from(&wall.server), "containers reach the outside");
    wall.scene.sh("iptables -D ufw-user-input -p tcp --dport 8080 -j ACCEPT");
    up.stop(Signal::INT, SOON);
    assert_eq!(state(&wall.scene.net.host), before);
}

/// A server at 203.0.113.9:7000.
struct TcpListenerOutside(#[expect(dead_code, reason = "listens until it is dropped")] TcpListener);

impl TcpListenerOutside {
    fn new(client: &Namespace) -> Self {
        Self(client.run(|| TcpListener::bind("203.0.113.9:7000")).unwrap())
    }

    fn is_reached_from(&self, container: &Namespace) -> bool {
        let at: SocketAddr = "203.0.113.9:7000".parse().unwrap();
        container.run(|| std::net::TcpStream::connect_timeout(&at, TIMEOUTS[1])).is_ok()
    }
}

/// An excerpt of firewalld's ruleset.
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
fn rules_like_those_of_firewalld_stay_unchanged_and_apply() {
    let wall = Wall::new(Scene::new());
    let rules = wall.scene.directory.path().join("firewalld.nft");
    fs::write(&rules, LIKE_FIREWALLD).unwrap();
    wall.scene.sh(&format!("nft -f {}", rules.display()));
    let before = state(&wall.scene.net.host);
    for flags in [&[][..], MODES[1], MODES[2], &["--firewall=none"]] {
        let mut up = wall.up(flags);
        let _servers = wall.servers();
        let by_socket = !flags.contains(&"--publish=kernel");
        wall.assert_answer(&wall.scene.net.client, "203.0.113.1:8080", false, by_socket);
        wall.assert_answer(&wall.scene.net.client, "203.0.113.1:8080", true, false);
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&wall.scene.net.host), before, "{flags:?}");
    }
}

/// Two machines on a bridge of other software with bridge-nf-call-iptables, and a route between two
/// subnets.
#[test]
fn traffic_of_virtual_machines_is_not_affected() {
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

/// The MTU of the uplink is lower than that of the network.
#[test]
fn the_mss_is_clamped_to_the_mtu_of_the_uplink() {
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
            wall.server.run(|| std::net::TcpStream::connect_timeout(&at, TIMEOUTS[1])).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        for stream in [&accepted, &container] {
            let mss = socket2::SockRef::from(stream).tcp_mss().unwrap();
            assert!(mss <= 1360, "{flags:?}: {mss}");
        }
    }
}

/// Replaces the program `name` by a shell `script`.
pub(super) fn program(scene: &Scene, name: &str, script: &str) {
    let path = scene.programs.path().join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn an_iptables_error_has_one_line_and_leaves_the_host_unchanged() {
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
        // Fails after the tables before `nat` were written.
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
        let printed = up.wait_for_output(SOON);
        assert_eq!(code, Some(1), "{printed}");
        assert!(printed.starts_with("tidegate: error: ") && printed.contains(error), "{printed}");
        assert_eq!(printed.lines().count(), 1, "{printed}");
        assert_eq!(state(&wall.scene.net.host), before, "{printed}");
    }
}

#[test]
fn nftables_is_selected_without_iptables() {
    let wall = Wall::new(Scene::new());
    for name in ["iptables", "ip6tables"] {
        program(&wall.scene, name, "exit 1");
    }
    let _up = wall.up(&[]);
    assert!(state(&wall.scene.net.host).contains("table inet tidegate-wall"));
}

/// The client sends continuously, so its conntrack entry would keep the previous target.
#[test]
fn a_udp_flow_follows_a_moved_port_and_ends_with_it() {
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
            let printed: serde_json::Value =
                serde_json::from_str(&ask(&["http://tidegate/v1/ports", "-d", &body])).unwrap();
            printed[0]["id"].to_string()
        };
        let close =
            |id: &str| drop(ask(&["-X", "DELETE", &format!("http://tidegate/v1/ports/{id}")]));
        let client = scene.net.client.run(|| UdpSocket::bind("203.0.113.9:5000")).unwrap();
        let arrives = |text: &str, witness: &Witness, timeout| {
            eventually(timeout, || {
                // May return an ICMP error for the previous datagram.
                let _ = client.send_to(text.as_bytes(), "203.0.113.1:9000");
                witness.has_seen(text)
            })
        };
        let id = open("s0");
        assert!(arrives("first", &witnesses[0], SOON));
        close(&id);
        let id = open("s1");
        assert!(arrives("second", &witnesses[1], Duration::from_secs(1)), "{flags:?}");
        assert!(!witnesses[0].has_seen("second"));
        close(&id);
        assert!(
            !arrives("third", &witnesses[1], TIMEOUTS[0]) && !witnesses[0].has_seen("third"),
            "{flags:?}"
        );
    }
}
