//! VPNs, QoS scripts and second uplinks of the host. Isolation holds, connectivity is kept, and
//! their marks and rules are unchanged, regardless of whether tidegate or they start first.

use super::firewall::MODES;
use super::matrix::peer_as_seen;
use super::scene::{Scene, service_namespace, state, with_commands};
use std::net::SocketAddr;
use std::time::Duration;
use tidegate_testbed::server::PeerServer;
use tidegate_testbed::{Namespace, Process, Segment, Signal, eventually};

const SOON: Duration = Duration::from_secs(10);
/// Timeouts of a probe without an expected answer, and with one.
const TIMEOUTS: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(5)];

/// Without a firewall.
const NONE: &[&str] = &["--firewall=none"];

const FILE: &str = r#"
name: vpn
networks:
  home: { ipam: { config: [ { subnet: 10.78.1.0/24 } ] } }
  away: { ipam: { config: [ { subnet: 10.78.2.0/24 } ] } }
services:
  server:
    x-netns: SERVER
    networks: { home: { ipv4_address: 10.78.1.10 } }
    ports: [ "8080:80" ]
  stranger:
    x-netns: STRANGER
    networks: { away: { ipv4_address: 10.78.2.10 } }
"#;

/// Commands with which other software configures the host, and reverts that.
struct Vpn {
    up: &'static str,
    down: &'static str,
}

/// Rules of mesh VPNs: packets that arrive on their link are marked (bits 16 to 23) and accepted.
const MESH: Vpn = Vpn {
    up: "iptables -N vpn-fwd
         iptables -A vpn-fwd -i vpn0 -j MARK --set-xmark 0x40000/0xff0000
         iptables -A vpn-fwd -m mark --mark 0x40000/0xff0000 -j ACCEPT
         iptables -A vpn-fwd -o vpn0 -j ACCEPT
         iptables -I FORWARD -j vpn-fwd",
    down: "iptables -D FORWARD -j vpn-fwd
           iptables -F vpn-fwd
           iptables -X vpn-fwd",
};

/// A QoS class for packets on the uplink, saved in the connection mark. The counters show whether
/// the mark is restored, and whether it has bits of other software.
const QOS: Vpn = Vpn {
    up: "iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark
         iptables -t mangle -A FORWARD -i eth0 -m mark --mark 0x5 -m comment --comment restored
         iptables -t mangle -A FORWARD -m mark ! --mark 0x0/0xfffffff8 -m comment --comment foreign
         iptables -t mangle -A POSTROUTING -o eth0 -j MARK --set-mark 0x5
         iptables -t mangle -A POSTROUTING -j CONNMARK --save-mark
         iptables -t mangle -A FORWARD -m connmark ! --mark 0x0/0xfffffff8 -m comment --comment foreign",
    down: "iptables -t mangle -D PREROUTING -j CONNMARK --restore-mark
           iptables -t mangle -D FORWARD -i eth0 -m mark --mark 0x5 -m comment --comment restored
           iptables -t mangle -D FORWARD -m mark ! --mark 0x0/0xfffffff8 -m comment --comment foreign
           iptables -t mangle -D FORWARD -m connmark ! --mark 0x0/0xfffffff8 -m comment --comment foreign
           iptables -t mangle -D POSTROUTING -o eth0 -j MARK --set-mark 0x5
           iptables -t mangle -D POSTROUTING -j CONNMARK --save-mark",
};

/// `wg-quick up` without the tunnel itself. Its rules have no priority, so the kernel places them
/// before all others.
const WG_QUICK: Vpn = Vpn {
    up: "ip route add default dev vpn0 table 51820
         ip rule add not fwmark 51820 table 51820
         ip rule add table main suppress_prefixlength 0",
    down: "ip rule del table main suppress_prefixlength 0
           ip rule del not fwmark 51820 table 51820
           ip route del default dev vpn0 table 51820",
};

/// OpenVPN's `redirect-gateway def1`.
const HALVES: Vpn = Vpn {
    up: "ip route add 0.0.0.0/1 via 100.64.7.2
         ip route add 128.0.0.0/1 via 100.64.7.2",
    down: "ip route del 0.0.0.0/1
           ip route del 128.0.0.0/1",
};

/// A host with a link to a VPN, and two containers.
struct Host {
    scene: Scene,
    peer: Namespace,
    server: Namespace,
    stranger: Namespace,
    file: String,
    _link: Segment,
}

impl Host {
    fn new(scene: Scene) -> Self {
        let (peer, server, stranger, link) =
            (Namespace::new(), Namespace::new(), Namespace::new(), Segment::new());
        link.attach(&scene.net.host, "vpn0", &["100.64.7.1/24"]);
        link.attach(&peer, "eth0", &["100.64.7.2/24", "192.0.2.50/32"]);
        peer.ip_all("route add default via 100.64.7.1");
        scene.net.host.ip_all("route add default via 203.0.113.9");
        for key in ["all", "default", "eth0", "vpn0"] {
            scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
        }
        // Creates all chains now, since iptables does not remove chains with the last rule.
        scene.sh("for program in iptables ip6tables; do
               for table in filter mangle; do
                 for chain in INPUT FORWARD; do $program -t $table -A $chain -i none -j ACCEPT; done
                 $program -t $table -A OUTPUT -o none -j ACCEPT
               done
               $program -t mangle -A PREROUTING -i none -j ACCEPT
               $program -t mangle -A POSTROUTING -o none -j ACCEPT
             done");
        let path = |namespace: &Namespace| namespace.path().display().to_string();
        let file = FILE.replace("SERVER", &path(&server)).replace("STRANGER", &path(&stranger));
        Self { scene, peer, server, stranger, file, _link: link }
    }

    #[track_caller]
    fn up(&self, flags: &[&str]) -> Process {
        let up = self.scene.up_with(&self.file, flags);
        up.wait_for_line("Ctrl-C takes", SOON);
        up
    }

    /// Checks `modes` with `vpn` started before the project, and after it.
    #[track_caller]
    fn assert_compatible(&self, vpn: &Vpn, modes: &[&[&str]], check: impl Fn(&Self, &str)) {
        for flags in modes {
            let before = state(&self.scene.net.host);
            self.scene.sh(vpn.up);
            let theirs = state(&self.scene.net.host);
            let mut up = self.up(flags);
            self.check(&format!("VPN first, {flags:?}"));
            check(self, &format!("VPN first, {flags:?}"));
            up.stop(Signal::INT, SOON);
            assert_eq!(state(&self.scene.net.host), theirs, "VPN first, {flags:?}");
            self.scene.sh(vpn.down);
            assert_eq!(state(&self.scene.net.host), before, "VPN first, {flags:?}");
            self.assert_compatible_later(vpn, flags, &theirs, &check);
        }
    }

    /// Starts `vpn` while a project is up. The host's state after the project is `theirs`.
    #[track_caller]
    fn assert_compatible_later(
        &self,
        vpn: &Vpn,
        flags: &[&str],
        theirs: &str,
        check: &impl Fn(&Self, &str),
    ) {
        let before = state(&self.scene.net.host);
        let mut up = self.up(flags);
        self.scene.sh(vpn.up);
        if flags.contains(&"--firewall=iptables") {
            // A rule appended after the jump sees the mark until the jump is moved to the end.
            assert!(eventually(SOON, || self.marks_last()), "VPN later, {flags:?}");
        }
        self.check(&format!("VPN later, {flags:?}"));
        check(self, &format!("VPN later, {flags:?}"));
        up.stop(Signal::INT, SOON);
        if !theirs.is_empty() {
            assert_eq!(
                without_priorities(&state(&self.scene.net.host)),
                without_priorities(theirs)
            );
        }
        self.scene.sh(vpn.down);
        assert_eq!(state(&self.scene.net.host), before, "VPN later, {flags:?}");
    }

    /// Whether the jump to the chain that sets the mark is the last rule of its hook: mangle
    /// POSTROUTING, or PREROUTING if policy rules are the guards.
    fn marks_last(&self) -> bool {
        ["POSTROUTING", "PREROUTING"].iter().any(|hook| {
            let listed = self.scene.net.host.exec("iptables", &["-t", "mangle", "-S", hook]);
            listed.trim_end().ends_with("-MARK")
        })
    }

    #[track_caller]
    fn check(&self, when: &str) {
        let client = &self.scene.net.client;
        let _servers = [&self.server, &self.peer, client]
            .map(|namespace| PeerServer::tcp(namespace, "0.0.0.0:80".parse().unwrap()));
        // Retried until tidegate has noticed a rule appended after its own.
        let works = |from: &Namespace, at: &str| {
            assert!(eventually(SOON, || answers(from, at, true)), "{when}: {at} does not answer");
        };
        works(&self.server, "203.0.113.9:80");
        works(&self.server, "100.64.7.2:80");
        works(client, "203.0.113.1:8080");
        works(&self.peer, "100.64.7.1:8080");
        let closed = |from: &Namespace, at: &str| {
            assert!(!answers(from, at, false), "{when}: {at} answers");
        };
        closed(client, "10.78.1.10:80");
        closed(&self.peer, "10.78.1.10:80");
        closed(&self.stranger, "10.78.1.10:80");
    }
}

fn answers(from: &Namespace, at: &str, expected: bool) -> bool {
    let at: SocketAddr = at.parse().unwrap();
    from.run(|| peer_as_seen(at, false, TIMEOUTS[usize::from(expected)])).is_ok()
}

/// Removes the priorities of policy rules. The kernel's choice depends on tidegate's rules.
fn without_priorities(state: &str) -> String {
    let rule = |line: &str| match line.split_once(":\t") {
        Some((number, rule)) if number.parse::<u32>().is_ok() => format!("{rule}\n"),
        _ => format!("{line}\n"),
    };
    state.lines().map(rule).collect()
}

#[test]
fn isolation_and_connectivity_hold_with_a_marking_mesh_vpn() {
    let host = Host::new(Scene::new());
    host.assert_compatible(&MESH, &MODES, |_, _| {});
    host.assert_compatible(&MESH, &[NONE], |_, _| {});
}

/// With policy rules as guards, the mark is set before the route lookup.
#[test]
fn isolation_and_connectivity_hold_with_a_mesh_vpn_and_policy_rules() {
    Host::new(Scene::lacking("gates")).assert_compatible(&MESH, &MODES, |_, _| {});
}

#[test]
fn marks_of_a_qos_script_are_preserved() {
    Host::new(Scene::new()).assert_compatible(&QOS, &MODES, |host, when| {
        // Counts forwarded connections. Sockets of the proxy have their own mark.
        let listed = host.scene.net.host.exec("iptables", &["-t", "mangle", "-nvxL"]);
        let packets = |comment: &str| -> Vec<u64> {
            let rules = listed.lines().filter(|line| line.contains(&format!("/* {comment} */")));
            rules.map(|line| line.split_whitespace().next().unwrap().parse().unwrap()).collect()
        };
        assert!(packets("restored").iter().all(|count| *count > 0), "{when}: {listed}");
        assert_eq!(packets("foreign"), [0, 0], "{when}: {listed}");
    });
    Host::new(Scene::new()).assert_compatible(&QOS, &[NONE], |_, _| {});
}

#[test]
fn isolation_and_connectivity_hold_with_wg_quick() {
    let modes: Vec<_> = MODES.into_iter().chain([NONE]).collect();
    Host::new(Scene::new()).assert_compatible(&WG_QUICK, &modes, |host, when| {
        // Egress through the tunnel is masqueraded to the host's address in it.
        let at: SocketAddr = "192.0.2.50:80".parse().unwrap();
        let _server = PeerServer::tcp(&host.peer, at);
        let seen = host.server.run(|| peer_as_seen(at, false, TIMEOUTS[1])).unwrap();
        assert!(seen.starts_with("100.64.7.1"), "{when}: {seen}");
    });
}

#[test]
fn isolation_and_connectivity_hold_with_openvpn() {
    let modes: Vec<_> = MODES.into_iter().chain([NONE]).collect();
    Host::new(Scene::new()).assert_compatible(&HALVES, &modes, |_, _| {});
}

/// Rootless: the engine's sockets use the host's rules and routes, and marks do not apply to
/// packets of containers.
#[test]
fn isolation_and_connectivity_hold_with_vpns_rootless() {
    let mut host = Host::new(Scene::new().with_open_tun());
    host.file = with_commands(FILE, &["server", "stranger"]);
    for (name, vpn) in [("mesh", MESH), ("QoS", QOS), ("wg-quick", WG_QUICK), ("OpenVPN", HALVES)] {
        for first in [true, false] {
            let when = format!("{name}, {}", if first { "first" } else { "later" });
            let before = state(&host.scene.net.host);
            if first {
                host.scene.sh(vpn.up);
            }
            let mut up = host.scene.up_as_nobody(&host.file);
            up.wait_for_line("Ctrl-C takes", SOON);
            host.server = service_namespace(&up, "server");
            host.stranger = service_namespace(&up, "stranger");
            if !first {
                host.scene.sh(vpn.up);
            }
            host.check(&when);
            up.stop(Signal::INT, SOON);
            host.scene.sh(vpn.down);
            assert_eq!(state(&host.scene.net.host), before, "{when}");
        }
    }
}

/// Tidegate needs four priorities before the rule. Isolation holds without them, and a warning is
/// logged.
#[test]
fn isolation_holds_with_a_preceding_rule_and_a_warning_is_logged() {
    for priority in [0, 4, 5] {
        for first in [true, false] {
            let when = format!("priority {priority}, {}", if first { "first" } else { "later" });
            let host = Host::new(Scene::new());
            let add = format!(
                "ip route add default via 100.64.7.2 table 52; ip rule add pref {priority} lookup 52"
            );
            if first {
                host.scene.sh(&add);
            }
            let up = host.up(NONE);
            if !first {
                host.scene.sh(&add);
            }
            let is_logged = || up.output().contains("precedes those of tidegate");
            assert!(eventually(SOON, || is_logged() == (priority < 5)), "{when}: {}", up.output());
            if priority == 5 {
                // Tidegate's rules precede it, and the engine's sockets use its route.
                let at: SocketAddr = "192.0.2.50:80".parse().unwrap();
                let _server = PeerServer::tcp(&host.peer, at);
                let seen = || host.server.run(|| peer_as_seen(at, false, TIMEOUTS[1]));
                assert!(
                    eventually(SOON, || seen().is_ok_and(|seen| seen.starts_with("100.64.7.1"))),
                    "{when}"
                );
                assert!(!is_logged(), "{when}");
            } else {
                assert!(
                    up.output().contains("a priority of 5 or higher"),
                    "{when}: {}",
                    up.output()
                );
            }
            let _servers = PeerServer::tcp(&host.server, "0.0.0.0:80".parse().unwrap());
            for from in [&host.scene.net.client, &host.peer, &host.stranger] {
                assert!(!answers(from, "10.78.1.10:80", false), "{when}");
            }
        }
    }
}

/// Scripts that run when a link comes up append such rules.
#[test]
fn a_rule_appended_after_the_mark_is_moved_before_it() {
    let host = Host::new(Scene::new());
    for flags in [MODES[2], MODES[3]] {
        let mut up = host.up(flags);
        host.scene.sh("iptables -t mangle -A POSTROUTING -j MARK --set-mark 0x7");
        assert!(eventually(SOON, || host.marks_last()), "{flags:?}");
        host.check(&format!("{flags:?}"));
        up.stop(Signal::INT, SOON);
        host.scene.sh("iptables -t mangle -D POSTROUTING -j MARK --set-mark 0x7");
    }
}

/// Two uplinks, with a client beyond the router of the second one.
struct TwoUplinks {
    host: Host,
    far: Namespace,
    _link: Segment,
}

impl TwoUplinks {
    fn new() -> Self {
        let host = Host::new(Scene::new());
        let (far, link) = (Namespace::new(), Segment::new());
        link.attach(&host.scene.net.host, "eth1", &["198.51.100.1/24", "2001:db8:2::1/64"]);
        link.attach(&far, "eth0", &["198.51.100.9/24", "2001:db8:2::9/64", "192.0.2.77/32"]);
        for key in ["eth1", "all"] {
            host.scene.net.host.sysctl(&format!("net.ipv4.conf.{key}.rp_filter"), "0");
        }
        Self { host, far, _link: link }
    }

    fn is_answered(&self) -> bool {
        self.far.run(|| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&"192.0.2.77:0".parse::<SocketAddr>().unwrap().into()).unwrap();
            let at: SocketAddr = "198.51.100.1:8080".parse().unwrap();
            socket.connect_timeout(&at.into(), TIMEOUTS[1]).is_ok()
        })
    }
}

#[test]
fn replies_leave_by_the_uplink_of_the_request() {
    for routes in [
        // Cloud images: a separate table for the second address.
        "ip rule add from 198.51.100.1 table 200
         ip route add 198.51.100.0/24 dev eth1 table 200
         ip route add default via 198.51.100.9 table 200",
        // DHCP on two links: a second default route in `main`.
        "ip route add default via 198.51.100.9 metric 300",
    ] {
        for flags in [MODES[1], MODES[3]] {
            let two = TwoUplinks::new();
            two.host.scene.sh(routes);
            let before = state(&two.host.scene.net.host);
            let mut up = two.host.up(flags);
            {
                let _server = PeerServer::tcp(&two.host.server, "0.0.0.0:80".parse().unwrap());
                assert!(two.is_answered(), "{flags:?} {routes}");
            }
            two.host.check(&format!("{flags:?} {routes}"));
            up.stop(Signal::INT, SOON);
            assert_eq!(state(&two.host.scene.net.host), before, "{flags:?} {routes}");
        }
    }
}

/// The route of the second uplink is added while the project is up.
#[test]
fn replies_leave_by_an_uplink_that_is_added_later() {
    let two = TwoUplinks::new();
    for flags in [MODES[1], MODES[3]] {
        let before = state(&two.host.scene.net.host);
        let mut up = two.host.up(flags);
        let _server = PeerServer::tcp(&two.host.server, "0.0.0.0:80".parse().unwrap());
        two.host.scene.sh("ip route add default via 198.51.100.9 metric 300");
        assert!(eventually(SOON, || two.is_answered()), "{flags:?}");
        two.host.scene.sh("ip route del default via 198.51.100.9 metric 300");
        let listed = || two.host.scene.net.host.exec("ip", &["rule"]);
        assert!(eventually(SOON, || !listed().contains("fwmark")), "{flags:?}: {}", listed());
        up.stop(Signal::INT, SOON);
        assert_eq!(state(&two.host.scene.net.host), before, "{flags:?}");
    }
}
